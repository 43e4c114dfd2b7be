"""model_logprobs against the model's own float32 log-softmax."""

import copy
import sys
from contextlib import contextmanager
from types import ModuleType

import pytest
import ranks
import torch
from torch.distributed.fsdp import fully_shard

from finealign_kernels.integrations.transformers import HEADS, model_logprobs

transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MIXED = dict(num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)
LATENT = dict(num_key_value_heads=2, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16)
MAMBA = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8)
SMALL = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
TOWER = dict(depth=1, hidden_size=32, num_heads=2, patch_size=4, spatial_merge_size=1, in_channels=3)
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
EXTRA = {
    "gemma2": {"final_logit_softcapping": 0.5},
    "gemma3_text": {"final_logit_softcapping": 0.5},
    "cohere": {"logit_scale": 3.0},
    "cohere2": {"logit_scale": 3.0},
    "granite": {"logits_scaling": 0.25},
    "granitemoe": {"logits_scaling": 0.25, **MIXED},
    "minicpm3": {"dim_model_base": 128, "q_lora_rank": 8, "kv_lora_rank": 8, **LATENT},
    "falcon_h1": {"lm_head_multiplier": 3.0, **MAMBA},
    "mixtral": MIXED,
    "qwen2_moe": {**MIXED, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**MIXED, "num_experts": 4, "moe_intermediate_size": 16},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    "gpt_oss": MIXED,
}
LLAVA = dict(
    text_config=dict(SIZES, model_type="llama"),
    vision_config=dict(model_type="clip_vision_model", image_size=8, patch_size=4, **SMALL),
    image_token_index=5,
    vision_feature_layer=-1,
)
QWEN = dict(text_config=dict(SIZES, rope_parameters=ROPE), image_token_id=5)
SEEN = {  # vision-language models
    "llava": LLAVA,
    "qwen2_vl": dict(QWEN, vision_config=dict(TOWER, embed_dim=32)),
    "qwen2_5_vl": dict(QWEN, vision_config=dict(TOWER, out_hidden_size=32, intermediate_size=32)),
}


def _model(kind, seed=0):
    torch.manual_seed(seed)
    sizes = copy.deepcopy(SEEN[kind]) if kind in SEEN else {**SIZES, **EXTRA.get(kind, {})}
    config = transformers.AutoConfig.for_model(kind, **sizes)
    auto = transformers.AutoModelForImageTextToText if kind in SEEN else transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").float().eval()
    model.get_output_embeddings().weight.data.normal_(0, 0.3)
    if model.get_output_embeddings().bias is not None:
        model.get_output_embeddings().bias.data.normal_(0, 0.3)
    return model


def _batch(kind="llama"):
    ids = torch.randint(6, 48, (2, 7), generator=torch.Generator().manual_seed(1))
    attention, inputs = torch.ones_like(ids), {}
    if kind in SEEN:
        ids[:, :4] = 5  # an image of four patches in each row
        if kind == "llava":
            inputs = {"pixel_values": torch.randn(2, 3, 8, 8)}
        else:
            inputs = {"pixel_values": torch.randn(8, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 2, 2]] * 2)}
            inputs["mm_token_type_ids"] = (ids == 5).long()
    else:
        attention[1, 5:] = 0
    labels = ids.clone()
    labels[:, :2] = -100
    return ids, attention, labels, inputs


def _own(model, ids, attention, inputs, dtype=torch.float32):
    found = model(input_ids=ids, attention_mask=attention, **inputs)
    return found.logits[:, :-1].to(dtype).log_softmax(-1), getattr(found, "aux_loss", None)


def _of(table, ids):
    return table.gather(-1, ids[:, 1:, None])[..., 0]


@pytest.mark.parametrize("kind", HEADS)
def test_the_models_own_log_softmax(kind):
    model = _model(kind)
    ids, attention, labels, inputs = _batch(kind)
    got = model_logprobs(model, ids, attention, labels, outputs=["entropy"], inputs=inputs)
    table, aux = _own(model, ids, attention, inputs)
    keep = (labels[:, 1:] != -100) & attention[:, 1:].bool()
    assert torch.equal(got.mask, keep)
    torch.testing.assert_close(got.scores.logp[keep], _of(table, ids)[keep], rtol=1e-5, atol=1e-5)
    entropy = -(table.exp() * table).sum(-1)
    torch.testing.assert_close(got.scores.entropy[keep], entropy[keep], rtol=1e-5, atol=1e-5)
    assert (len(got) == 3) == (aux is not None) == ("router" in str(EXTRA.get(kind)))
    if aux is not None:
        torch.testing.assert_close(got.aux_loss, aux)

    # S1: in bfloat16 no further from float64 on the same hidden states than the model's own logits
    half = model.to(torch.bfloat16)
    inputs = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}
    with torch.no_grad():
        ours = model_logprobs(half, ids, attention, labels, inputs=inputs).scores.logp[keep]
        theirs = _of(_own(half, ids, attention, inputs)[0], ids)[keep]
        states = half.base_model(input_ids=ids, attention_mask=attention, use_cache=False, **inputs).last_hidden_state
        truth = _truth(half, states[:, :-1].double())
    error, eager = ((x - _of(truth, ids)[keep]).square().mean().sqrt() for x in (ours, theirs))
    assert error <= 0.05 * eager + 1e-6


def _truth(model, hidden):
    """float64 log-softmax of the logits of hidden states, by the model's own head and steps."""
    head, config = model.get_output_embeddings(), model.config
    z = hidden @ head.weight.double().t() + (0 if head.bias is None else head.bias.double())
    kind = config.model_type
    if kind in ("granite", "granitemoe", "minicpm3"):
        z = z / config.logits_scaling
    elif kind.startswith("cohere"):
        z = z * config.logit_scale
    elif kind == "falcon_h1":
        z = z * config.lm_head_multiplier
    elif kind in ("gemma2", "gemma3_text"):
        z = config.final_logit_softcapping * torch.tanh(z / config.final_logit_softcapping)
    return z.log_softmax(-1)


def test_gradients_of_a_mixture_with_its_auxiliary_loss_and_with_checkpointing():
    ids, attention, labels, _ = _batch()
    found = []
    for way in ("own", "ours", "ours, checkpointing"):
        model = _model("mixtral").train()
        if "checkpointing" in way:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        factor = model.config.router_aux_loss_coef
        if way == "own":
            table, aux = _own(model, ids, attention, {})
            keep = (labels[:, 1:] != -100) & attention[:, 1:].bool()
            logp = _of(table, ids) * keep
        else:
            (logp, *_), _, aux = model_logprobs(model, ids, attention, labels)
        (logp.sum() + 100 * factor * aux).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for other in found[1:]:
        for name, grad in found[0].items():
            assert (other[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-9, name


def test_what_is_not_known_is_refused():
    model = _model("llama")
    model.config.model_type = "other"
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="model must be of type llama.*got 'other'"):
        model_logprobs(model, ids)
    for name in ("labels", "output_router_logits"):
        with pytest.raises(ValueError, match=f"inputs must hold further inputs of the model, .*got '{name}'"):
            model_logprobs(model, ids, inputs={name: ids})
    model = _model("mixtral")
    model.base_model.forward = lambda **_: transformers.modeling_outputs.BaseModelOutputWithPast(torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="config.output_router_logits must be False for MixtralForCausalLM"):
        model_logprobs(model, ids)


@pytest.mark.parametrize(
    "change, kind, message",
    [
        (dict(input_ids=[[1, 2]]), TypeError, "input_ids must be a tensor, got a list"),
        (
            dict(input_ids=torch.ones(3, dtype=torch.int64)),
            ValueError,
            r"input_ids must have shape \(B, T\), got \(3,\)",
        ),
        (dict(input_ids=torch.ones(2, 3)), TypeError, "input_ids must have dtype int64"),
        (
            dict(labels=torch.ones(2, 2, dtype=torch.int64)),
            ValueError,
            r"labels must have shape \(2, 3\), got \(2, 2\)",
        ),
        (dict(labels=torch.ones(2, 3)), TypeError, "labels must have dtype int64"),
        (dict(attention_mask=torch.ones(2, 2)), ValueError, r"attention_mask must have shape \(2, 3\), got \(2, 2\)"),
        (dict(attention_mask=[[1] * 3] * 2), TypeError, "attention_mask must be a tensor, got a list"),
        (dict(model=None), TypeError, "model must be a model of transformers, got a NoneType"),
        (dict(model="body"), ValueError, "model must be a causal LM, with a head over the vocabulary, got LlamaModel"),
    ],
)
def test_arguments_are_refused_by_name(change, kind, message):
    model = _model("llama")
    given = dict(model=model, input_ids=torch.ones(2, 3, dtype=torch.int64)) | change
    given["model"] = model.base_model if given["model"] == "body" else given["model"]
    with pytest.raises(kind, match=message):
        model_logprobs(**given)


# ---- LoRA on the head ----------------------------------------------------------------------------------------------

HEAD = dict(target_modules=["lm_head"], r=3, lora_alpha=5, init_lora_weights=False)


def _adapted(kind="granite", **more):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    return peft.get_peft_model(_model(kind), peft.LoraConfig(**{**HEAD, **more})).eval()


def _same(model):
    """Log-probs and gradients of the model's own logits and ours; the gradients."""
    ids, attention, labels, _ = _batch()
    keep = (labels[:, 1:] != -100) & attention[:, 1:].bool()
    found = []
    for way in ("own", "ours"):
        model.zero_grad()
        if way == "own":
            logp = _of(_own(model, ids, attention, {})[0], ids) * keep
        else:
            logp = model_logprobs(model, ids, attention, labels).scores.logp
        if logp.requires_grad:
            (logp * torch.linspace(-1, 2, 6)).sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((logp.detach(), grads))
    (own, want), (ours, got) = found
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)
    assert want.keys() == got.keys()
    for name, grad in want.items():
        assert (got[name] - grad).norm() <= 1e-5 * grad.norm(), name
    return got


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
def test_lora_on_the_head_by_its_low_rank_form(more):
    model = _adapted("phi" if "lora_bias" in more else "granite", **more)
    if more == {"lora_bias": True}:
        model.get_output_embeddings().lora_B["default"].bias.data.normal_()
    assert sum("lora" in name for name in _same(model)) == 2 + ("lora_bias" in more)
    with model.disable_adapter():
        _same(model)
    model.merge_adapter()
    _same(model)


def test_several_adapters_on_the_head_and_none():
    peft = pytest.importorskip("peft")
    model = _adapted()
    model.add_adapter("second", peft.LoraConfig(**{**HEAD, "r": 2}))
    model.base_model.set_adapter(["default", "second"])
    assert len(_same(model)) == 4
    model.add_adapter("elsewhere", peft.LoraConfig(**{**HEAD, "target_modules": ["q_proj"]}))
    model.set_adapter("elsewhere")
    assert all("q_proj" in name for name in _same(model))


def test_dropout_of_an_adapter_is_applied_before_a(monkeypatch):
    """In training: with the mask of the first rows of a generator, which the model's own head draws for all rows."""
    model = _adapted(lora_dropout=0.5).train()
    drawn = torch.bernoulli(torch.full((2, 7, 32), 0.5)) * 2
    dropout = model.get_output_embeddings().lora_dropout["default"]
    monkeypatch.setattr(dropout, "forward", lambda x: x * drawn[:, : x.shape[1]])
    _same(model)


def test_modules_to_save_is_the_copy_that_is_active():
    model = _adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    copy = model.get_output_embeddings().modules_to_save["default"]
    copy.weight.data += 0.3
    assert any("lm_head" in name for name in _same(model))
    with model.disable_adapter():
        _same(model)


def test_other_adapters_on_the_head_are_refused_by_name():
    model = _adapted(use_dora=True)
    with pytest.raises(TypeError, match="head must be an nn.Linear, or one with LoRA; give .* got DoraLinearVariant"):
        model_logprobs(model, torch.ones(1, 3, dtype=torch.int64))


# ---- ZeRO-3, with a stand-in for DeepSpeed -------------------------------------------------------------------------


@pytest.fixture
def zero3(monkeypatch):
    """The contract of deepspeed.zero.GatheredParameters: values inside, none outside. Says how often it was entered."""
    entered = []

    @contextmanager
    def gathered(parameters):
        entered.append(len(parameters))
        for p in parameters:
            p.data, p.ds_status = p.whole.clone(), "here"
        yield
        for p in parameters:
            p.data.fill_(torch.nan)
            p.data, p.ds_status = p.data.new_empty(0), "away"

    modules = [
        ModuleType(f"deepspeed{name}")
        for name in ("", ".runtime", ".runtime.zero", ".runtime.zero.partition_parameters")
    ]
    modules[0].zero = ModuleType("deepspeed.zero")
    modules[0].zero.GatheredParameters = gathered
    modules[-1].ZeroParamStatus = type("ZeroParamStatus", (), {"NOT_AVAILABLE": "away"})
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return entered


class Engine(torch.nn.Module):
    """What DeepSpeed's engine is to its model: forward calls it."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def zero_optimization_stage(self):
        return 3

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_a_head_of_zero3_is_gathered_forward_and_backward(kind, zero3):
    ids, attention, labels, _ = _batch()
    found = []
    for sharded in (False, True):
        model = _model(kind)
        if sharded:
            for p in model.get_output_embeddings().parameters():
                p.whole, p.ds_status, p.data = p.data, "away", p.data.new_empty(0)
        engine = Engine(model)
        scores = model_logprobs(engine if sharded else model, ids, attention, labels).scores
        assert engine.calls == sharded and model.get_output_embeddings().weight.numel() == (0 if sharded else 48 * 32)
        forward = len(zero3)
        grads = torch.autograd.grad((scores.logp * torch.linspace(-1, 2, 6)).sum(), list(model.parameters()))
        assert len(zero3) > forward or not sharded
        found.append((scores.logp.detach(), *grads))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


# ---- ranks ---------------------------------------------------------------------------------------------------------

WAYS = ("ddp", "fully_shard", "fully_shard, sharded again before backward")
KINDS = ("qwen2", "llama, tied")


def _ranked(kind):
    torch.manual_seed(0)
    name, tied = kind.split(",")[0], "tied" in kind
    config = transformers.AutoConfig.for_model(name, **SIZES, tie_word_embeddings=tied)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()


def _loss(model, rank):
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(3, 48, (2, 7), generator=generator)
    scores = model_logprobs(model, ids, outputs=["entropy"]).scores
    return (scores.logp * torch.rand(2, 6, generator=generator)).sum() + 0.1 * scores.entropy.sum()


def _of_two_ranks(group):
    """Gradients of one step of wrapped models."""
    rank, found = group.rank(), {}
    for kind in KINDS:
        for way in WAYS:
            model = wrapped = _ranked(kind)
            if way == "ddp":
                wrapped = torch.nn.parallel.DistributedDataParallel(model)
            else:
                for layer in model.model.layers:
                    fully_shard(layer)
                fully_shard(model, reshard_after_forward="again" in way)
            before = model.__dict__.get("forward")
            _loss(wrapped, rank).backward()
            assert model.__dict__.get("forward") is before
            whole = ((name, p.grad) for name, p in model.named_parameters())
            found[kind, way] = {name: g if way == "ddp" else g.full_tensor() for name, g in whole}
    return found


def test_wrapped_models_have_the_gradients_of_one_process():
    """Of the mean over ranks: what DDP and FSDP2 do before and after a forward is done."""
    found, _ = ranks.processes(2, _of_two_ranks)
    for kind in KINDS:
        alone = _ranked(kind)
        (sum(_loss(alone, rank) for rank in (0, 1)) / 2).backward()
        for way in WAYS:
            for name, p in alone.named_parameters():
                apart = (found[kind, way][name] - p.grad).norm()
                assert apart <= 1e-5 * p.grad.norm(), (kind, way, name)

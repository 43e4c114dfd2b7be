"""model_logprobs against the model's own float32 log-softmax."""

import pytest
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
EXTRA = {
    "gemma2": {"final_logit_softcapping": 0.5},
    "gemma3_text": {"final_logit_softcapping": 0.5},
    "cohere": {"logit_scale": 3.0},
    "granite": {"logits_scaling": 0.25},
}


def _model(kind):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, **EXTRA.get(kind, {}))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    model.get_output_embeddings().weight.data.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("kind", HEADS)
def test_the_models_own_log_softmax(kind):
    model = _model(kind)
    ids = torch.randint(3, 48, (2, 7))
    attention = torch.ones_like(ids)
    attention[1, 5:] = 0
    labels = ids.clone()
    labels[:, :2] = -100
    got = model_logprobs(model, ids, attention, labels, outputs=["entropy"])
    table = model(input_ids=ids, attention_mask=attention).logits[:, :-1].float().log_softmax(-1)
    keep = torch.zeros(2, 6, dtype=torch.bool)
    keep[0, 1:], keep[1, 1:4] = True, True
    assert torch.equal(got.mask, keep)
    own = table.gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(got.scores.logp[keep], own[keep], rtol=1e-5, atol=1e-5)
    entropy = -(table.exp() * table).sum(-1)
    torch.testing.assert_close(got.scores.entropy[keep], entropy[keep], rtol=1e-5, atol=1e-5)


def test_what_is_not_known_is_refused():
    model = _model("llama")
    model.config.model_type = "other"
    with pytest.raises(ValueError, match="model must be of type llama.*got 'other'"):
        model_logprobs(model, torch.ones(1, 3, dtype=torch.int64))


def test_an_adapter_on_the_head_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(_model("llama"), peft.LoraConfig(target_modules=["lm_head"], r=2))
    with pytest.raises(TypeError, match="head must be an nn.Linear without an adapter"):
        model_logprobs(model, torch.ones(1, 3, dtype=torch.int64))


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


def _of_two_ranks(rank, folder):
    """Gradients of one step of wrapped models; a fork knows the modules, not the rank, and has one thread."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    found = {}
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
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    torch.distributed.destroy_process_group()


def test_wrapped_models_have_the_gradients_of_one_process(tmp_path):
    """Of the mean over ranks: what DDP and FSDP2 do before and after a forward is done."""
    torch.multiprocessing.start_processes(_of_two_ranks, args=(tmp_path,), nprocs=2, start_method="fork")
    found = torch.load(tmp_path / "found.pt")
    for kind in KINDS:
        alone = _ranked(kind)
        (sum(_loss(alone, rank) for rank in (0, 1)) / 2).backward()
        for way in WAYS:
            for name, p in alone.named_parameters():
                apart = (found[kind, way][name] - p.grad).norm()
                assert apart <= 1e-5 * p.grad.norm(), (kind, way, name)

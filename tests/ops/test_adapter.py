"""A head with an adapter: refused as a module and as a weight that trains, with advice that is right."""

import warnings

import pytest
import torch
from torch.testing import assert_close

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import finealign_kernels as fk  # noqa: E402
from finealign_kernels.integrations.transformers import model_logprobs  # noqa: E402

HEAD = dict(task_type="CAUSAL_LM", target_modules=["lm_head"])
KINDS = {
    "lora": lambda: peft.LoraConfig(r=4, init_lora_weights=False, **HEAD),
    "dora": lambda: peft.LoraConfig(r=4, init_lora_weights=False, use_dora=True, **HEAD),
    "ia3": lambda: peft.IA3Config(feedforward_modules=[], init_ia3_weights=False, **HEAD),
    "loha": lambda: peft.LoHaConfig(r=4, init_weights=False, **HEAD),
}
SAYS = "give LoRA's factors as adapter=, merge it, leave lm_head out of target_modules, or put it in modules_to_save"


@pytest.fixture(autouse=True)
def unwarned(monkeypatch):
    monkeypatch.setattr("finealign_kernels.ops._warn._given", set())


def model(tied=False):
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


IDS = torch.randint(64, (2, 6), generator=torch.Generator().manual_seed(1))


def truth(whole):
    return torch.log_softmax(whole(input_ids=IDS).logits[:, :-1], -1).gather(2, IDS[:, 1:, None])[..., 0]


def parts(whole):
    causal = whole.get_base_model()
    return causal.model(input_ids=IDS).last_hidden_state[:, :-1], causal.lm_head


def quiet(hidden, weight):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fk.linear_logprobs(hidden, weight, IDS[:, 1:]).logp


@pytest.mark.parametrize("kind", KINDS)
def test_the_module_is_refused_and_the_weight_warned_of(kind):
    whole = peft.get_peft_model(model(), KINDS[kind]())
    hidden, head = parts(whole)
    with pytest.raises(TypeError, match=f"weight must be the head's weight .*; {SAYS}, got"):
        fk.linear_logprobs(hidden, head, IDS[:, 1:])
    if kind == "lora":
        assert_close(model_logprobs(whole, IDS).scores.logp, truth(whole), rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(TypeError, match=f"the model's head must be .*; {SAYS}"):
            model_logprobs(whole, IDS)
    with pytest.warns(UserWarning, match=f"weight is the base weight of a .* not the model's .*; {SAYS}") as seen:
        found = fk.linear_logprobs(hidden, head.weight, IDS[:, 1:]).logp
    assert seen[0].filename == __file__ and (found - truth(whole)).abs().max() > 1e-3
    quiet(hidden, head.weight)  # once
    assert not any(word in str(seen[0].message) for word in ("pass its", "pass the"))


@pytest.mark.parametrize("kind", KINDS)
def test_training_with_the_base_weight_is_refused(kind):
    """Every time, also after the warning; not where the adapter does nothing, nor where no gradient is wanted."""
    whole = peft.get_peft_model(model(), KINDS[kind]())
    hidden, head = parts(whole)
    hidden = hidden.detach().requires_grad_()
    with torch.no_grad(), pytest.warns(UserWarning, match="adapter is active"):
        fk.linear_logprobs(hidden, head.weight, IDS[:, 1:])
    for _ in range(2):
        with pytest.raises(TypeError, match=f"weight must be all of the head, got the base weight .*; {SAYS}"):
            fk.linear_logprobs(hidden, head.weight, IDS[:, 1:])
    with whole.disable_adapter():
        assert quiet(hidden, head.weight).requires_grad


def test_factors_beside_the_weight_give_the_models_log_probs_without_a_warning():
    whole = peft.get_peft_model(model(), KINDS["lora"]())
    hidden, head = parts(whole)
    a, b, scale = head.lora_A["default"].weight, head.lora_B["default"].weight, head.scaling["default"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fk.linear_logprobs(hidden, head.weight, IDS[:, 1:], adapter=(scale * hidden @ a.t(), b))
    assert_close(found.logp, truth(whole), rtol=1e-4, atol=1e-4)


def test_what_is_advised_gives_the_models_log_probs():
    merged = peft.get_peft_model(model(), KINDS["lora"]())
    want = truth(merged)
    plain = merged.merge_and_unload()
    hidden = plain.model(input_ids=IDS).last_hidden_state[:, :-1]
    assert_close(quiet(hidden, plain.lm_head.weight), want, rtol=1e-4, atol=1e-4)
    others = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    saved = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
    for config in (others, saved):
        whole = peft.get_peft_model(model(), config)
        hidden, head = parts(whole)
        assert_close(quiet(hidden, head.weight), truth(whole), rtol=1e-4, atol=1e-4)


def test_an_adapter_that_does_nothing_is_no_warning():
    """Switched off, as for reference log-probs, or merged in place: the weight is the model's."""
    whole = peft.get_peft_model(model(), KINDS["lora"]())
    hidden, head = parts(whole)
    with whole.disable_adapter():
        assert_close(quiet(hidden, head.weight), truth(whole), rtol=1e-4, atol=1e-4)
    whole.merge_adapter()
    assert_close(quiet(hidden, head.weight), truth(whole), rtol=1e-4, atol=1e-4)
    whole.unmerge_adapter()
    with pytest.warns(UserWarning, match="adapter is active"):  # though the weight was looked at before
        fk.linear_logprobs(hidden, head.weight, IDS[:, 1:])


def test_a_tied_head_beside_an_adapter_on_the_embedding():
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["embed_tokens"], init_lora_weights=False)
    whole = peft.get_peft_model(model(tied=True), config)
    hidden, head = parts(whole)
    if isinstance(head, torch.nn.Linear) and not hasattr(head, "base_layer"):
        assert_close(quiet(hidden, head.weight), truth(whole), rtol=1e-4, atol=1e-4)


def test_a_head_that_was_looked_at_before_it_got_its_adapter():
    plain = model()
    hidden = plain.model(input_ids=IDS).last_hidden_state[:, :-1]
    quiet(hidden, plain.lm_head.weight)
    whole = peft.get_peft_model(plain, KINDS["lora"]())
    with pytest.raises(TypeError, match="adapter is active"):
        fk.linear_logprobs(hidden, parts(whole)[1].weight, IDS[:, 1:])

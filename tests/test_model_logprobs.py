"""model_logprobs against the model's own float32 log-softmax."""

import pytest
import torch

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

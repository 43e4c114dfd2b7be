"""From a causal LM of transformers to per-token log-probs, without its logits."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..ops._adapter import ADVICE, has_adapter
from ..ops._check import fail
from ..ops.logprobs import LogProbs, linear_logprobs
from .steps import StepCounts, StepCountsMixin, step_counts

__all__ = ["HEADS", "ModelLogProbs", "StepCounts", "StepCountsMixin", "model_logprobs", "step_counts"]

# what a model type does between its LM head and its logits: (argument, field of the config, exponent of the field)
HEADS = {
    "llama": None,
    "qwen2": None,
    "qwen3": None,
    "mixtral": None,
    "gemma2": ("softcap", "final_logit_softcapping", 1),
    "gemma3_text": ("softcap", "final_logit_softcapping", 1),
    "cohere": ("logit_scale", "logit_scale", 1),
    "granite": ("logit_scale", "logits_scaling", -1),
}


class ModelLogProbs(NamedTuple):
    """Position t scores token t + 1 of the row."""

    scores: LogProbs  # fields (B, T - 1): logp, and what was asked for
    mask: Tensor  # (B, T - 1) bool, the tokens that are scored; logp is 0 elsewhere


def model_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    outputs: Iterable[str] = (),
) -> ModelLogProbs:
    """logp[b, t] = log softmax(z[b, t] / temperature)[labels[b, t + 1]], z the logits of the model.

    model            a causal LM of transformers of a type in HEADS, or a PEFT model of one, its head without adapter;
                     or one of these in DistributedDataParallel, or sharded by fully_shard: their hooks run
    input_ids        (B, T) int64
    attention_mask   (B, T), 1 for a token and 0 for padding; None where there is no padding
    labels           (B, T) int64, not shifted, -100 for what is not scored (prompts); None scores every token
    temperature, outputs   as in linear_logprobs; "entropy" is one of the outputs

    Raises ValueError for a type of model that is not known here, TypeError for a head that is not a plain nn.Linear.
    """
    if isinstance(model, DistributedDataParallel) or hasattr(model, "set_reshard_after_forward"):
        options = {"temperature": temperature, "outputs": outputs}
        return _inside(model, lambda inner: _scored(inner, input_ids, attention_mask, labels, **options))
    return _scored(model, input_ids, attention_mask, labels, temperature=temperature, outputs=outputs)


def _inside(model: nn.Module, score):
    """score(inner), called as the model's forward: what a wrapper does before and after a forward is done."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    own = inner.__dict__.get("forward")  # of this instance, where somebody has put one there

    def forward():
        restore()
        return score(inner)

    def restore():
        if own is not None:
            inner.forward = own
        else:
            inner.__dict__.pop("forward", None)

    inner.forward = forward
    try:
        return model()
    finally:
        restore()


def _scored(model: nn.Module, input_ids: Tensor, attention_mask, labels, *, temperature, outputs) -> ModelLogProbs:
    if hasattr(model, "get_base_model"):
        if model.active_peft_config.is_prompt_learning:
            fail("model", "have no prompt learning", model.active_peft_config.peft_type)
        model = model.get_base_model()
    config, head = model.config, model.get_output_embeddings()
    if config.model_type not in HEADS:
        fail("model", f"be of type {', '.join(HEADS)}", repr(config.model_type))
    if type(head) is not nn.Linear:
        hint = f"; {ADVICE}" if has_adapter(head) else ""
        fail("the model's head", f"be an nn.Linear without an adapter{hint}", type(head).__name__, TypeError)
    extra = {}
    if HEADS[config.model_type]:
        name, field, power = HEADS[config.model_type]
        value = getattr(config, field)
        extra = {} if value is None else {name: value**power}
    labels = (input_ids if labels is None else labels)[:, 1:]
    mask = labels != -100
    if attention_mask is not None:
        mask = mask & attention_mask[:, 1:].bool()
    hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    scores = linear_logprobs(
        hidden[:, :-1],
        head.weight,
        labels,
        bias=head.bias,
        mask=mask,
        temperature=temperature,
        outputs=outputs,
        **extra,
    )
    return ModelLogProbs(scores, mask)

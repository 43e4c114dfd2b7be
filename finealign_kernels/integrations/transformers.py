"""From a causal LM of transformers to per-token log-probs, without its logits."""

import sys
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from ..ops import _parallel
from ..ops._adapter import ADVICE, has_adapter
from ..ops._check import FLAGS, FLOATS, check_tensor, fail
from ..ops.logprobs import LogProbs, linear_logprobs
from ._zero3 import is_sharded, regathered
from .steps import StepCounts, StepCountsMixin, step_counts

__all__ = ["HEADS", "ModelLogProbs", "RoutedLogProbs", "StepCounts", "StepCountsMixin", "model_logprobs", "step_counts"]

# what a model type does between its LM head and its logits: (argument, field of the config, exponent of the field)
_CAP, _SCALE = ("softcap", "final_logit_softcapping", 1), ("logit_scale", "logit_scale", 1)
_DIVIDED = ("logit_scale", "logits_scaling", -1)
HEADS = {
    "llama": None,
    "mistral": None,
    "qwen2": None,
    "qwen3": None,
    "smollm3": None,
    "phi": None,  # its head has a bias
    "phi3": None,
    "olmo2": None,
    "glm4": None,
    "gpt2": None,
    "mixtral": None,
    "qwen2_moe": None,
    "qwen3_moe": None,
    "olmoe": None,
    "gpt_oss": None,
    "gemma": None,
    "gemma2": _CAP,
    "gemma3_text": _CAP,
    "cohere": _SCALE,
    "cohere2": _SCALE,
    "granite": _DIVIDED,
    "granitemoe": _DIVIDED,
    "minicpm3": _DIVIDED,  # which divides the hidden states
    "falcon_h1": ("logit_scale", "lm_head_multiplier", 1),
    "llava": None,
    "qwen2_vl": None,
    "qwen2_5_vl": None,
}
OWN = (
    *("input_ids", "attention_mask", "labels"),  # arguments of model_logprobs
    *("use_cache", "past_key_values", "logits_to_keep", "output_router_logits", "return_dict"),
)


class ModelLogProbs(NamedTuple):
    """Position t scores token t + 1 of the row."""

    scores: LogProbs  # fields (B, T - 1): logp, and what was asked for
    mask: Tensor  # (B, T - 1) bool, the tokens that are scored; logp is 0 elsewhere


class RoutedLogProbs(NamedTuple):
    """ModelLogProbs of a mixture of experts whose config.output_router_logits is set."""

    scores: LogProbs
    mask: Tensor
    aux_loss: Tensor  # () the router's load-balancing loss, without its factor config.router_aux_loss_coef


def model_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    outputs: Iterable[str] = (),
    inputs: Mapping[str, object] | None = None,
) -> ModelLogProbs | RoutedLogProbs:
    """logp[b, t] = log softmax(z[b, t] / temperature)[labels[b, t + 1]], z the logits of the model.

    model            a causal LM or vision-language model of transformers of a type in HEADS, or a PEFT model of one; or
                     one of these in DistributedDataParallel, in a DeepSpeed engine, or sharded by fully_shard: their
                     hooks run. Gradient checkpointing is the model's own. A head of ZeRO-3 is gathered, forward and
                     backward (tested with a stand-in for DeepSpeed)
    input_ids        (B, T) int64
    attention_mask   (B, T), 1 for a token and 0 for padding; None where there is no padding
    labels           (B, T) int64, not shifted, -100 for what is not scored (prompts); None scores every token
    temperature, outputs   as in linear_logprobs; "entropy" is one of the outputs
    inputs           further inputs of the model, by name: pixel_values, mm_token_type_ids, position_ids, ...

    LoRA on the head enters by its exact low-rank form, z = h Wᵀ + Σ s · dropout(h) Aᵀ Bᵀ over its active adapters: two
    products a tile, no merged copy, and A and B get their gradients. One switched off or merged is the base weight.
    Where config.output_router_logits is set, a third field holds the model's own load-balancing loss: add it, times
    config.router_aux_loss_coef, to yours.

    Raises ValueError for a type of model that is not known here, TypeError for a head that is neither a plain nn.Linear
    nor one with LoRA (DoRA and other kinds are named).
    """
    if not hasattr(model, "forward"):
        fail("model", "be a model of transformers", f"a {type(model).__name__}", TypeError)
    check_tensor("input_ids", input_ids, dtypes=(torch.int64, torch.int32))
    if input_ids.dim() != 2:
        fail("input_ids", "have shape (B, T)", tuple(input_ids.shape))
    if labels is not None:
        check_tensor("labels", labels, dtypes=(torch.int64, torch.int32), shape=input_ids.shape)
    if attention_mask is not None:
        check_tensor("attention_mask", attention_mask, dtypes=(*FLAGS, *FLOATS), shape=input_ids.shape)
    options = {"temperature": temperature, "outputs": outputs, "inputs": dict(inputs or {})}
    for name in options["inputs"]:
        if name in OWN:
            fail("inputs", "hold further inputs of the model, not what is set here", repr(name))
    if _is_engine(model) or hasattr(model, "set_reshard_after_forward"):
        return _inside(model, lambda inner: _scored(inner, input_ids, attention_mask, labels, **options))
    return _scored(model, input_ids, attention_mask, labels, **options)


def _is_engine(model: nn.Module) -> bool:
    """DDP's wrapper or DeepSpeed's: its model is .module."""
    return isinstance(model, DistributedDataParallel) or hasattr(model, "zero_optimization_stage")


def _inside(model: nn.Module, score):
    """Calls score(inner) as the model's forward, so that a wrapper's hooks before and after a forward run."""
    inner = model.module if _is_engine(model) else model
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


def _scored(model: nn.Module, input_ids: Tensor, attention_mask, labels, *, temperature, outputs, inputs):
    if hasattr(model, "get_base_model"):
        if model.active_peft_config.is_prompt_learning:
            fail("model", "have no prompt learning", model.active_peft_config.peft_type)
        model = model.get_base_model()
    if model.config.model_type not in HEADS:
        fail("model", f"be of type {', '.join(HEADS)}", repr(model.config.model_type))
    config, head = model.config.get_text_config(), _head(model)
    extra = {}
    if HEADS[model.config.model_type]:
        name, field, power = HEADS[model.config.model_type]
        value = getattr(config, field)
        extra = {} if value is None else {name: value**power}
    labels = (input_ids if labels is None else labels)[:, 1:]
    mask = labels != -100
    if attention_mask is not None:
        mask = mask & attention_mask[:, 1:].bool()
    routed = {"output_router_logits": True} if getattr(config, "output_router_logits", False) else {}
    found = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs, **routed)
    hidden = found.last_hidden_state[:, :-1]
    base, bias, adapter = _parts(head, hidden)
    with _gathered(base, adapter) as weight:
        bias = base.bias if bias is None else bias if base.bias is None else base.bias + bias
        options = dict(bias=bias, mask=mask, temperature=temperature, outputs=outputs, adapter=adapter, **extra)
        scores = linear_logprobs(hidden, weight, labels, **options)
    if routed:
        return RoutedLogProbs(scores, mask, _balance(model, config, found, attention_mask))
    return ModelLogProbs(scores, mask)


def _balance(model: nn.Module, config, found, attention_mask) -> Tensor:
    """The load-balancing loss by the function of the model's own module."""
    own = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    if own is None or getattr(found, "router_logits", None) is None:
        fail("config.output_router_logits", f"be False for {type(model).__name__}, whose loss is not known", True)
    experts = getattr(config, "num_local_experts", None) or config.num_experts
    return own(found.router_logits, experts, config.num_experts_per_tok, attention_mask)


# ---- the head ------------------------------------------------------------------------------------------------------


def _head(model: nn.Module) -> nn.Module:
    """The module that makes the logits: of PEFT's modules_to_save the one that is active."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        fail("model", "be a causal LM, with a head over the vocabulary", type(model).__name__)
    copies = head._modules.get("modules_to_save") if isinstance(head, nn.Module) else None
    if copies is None:
        return head
    active = [name for name in head.active_adapters if name in copies]
    return head.original_module if head.disable_adapters or not active else copies[active[0]]


def _parts(head: nn.Module, hidden: Tensor) -> tuple[nn.Linear, Tensor | None, tuple[Tensor, Tensor] | None]:
    """(base, the bias of adapters, (u, b)) of a head: hidden @ base.weightᵀ + base.bias + bias + u @ bᵀ."""
    if type(head) is nn.Linear:
        return head, None, None
    lora = sys.modules.get("peft.tuners.lora.layer")
    if lora is None or type(head) is not lora.Linear or type(head.base_layer) is not nn.Linear:
        hint = f"; {ADVICE}" if has_adapter(head) else ""
        fail("the model's head", f"be an nn.Linear, or one with LoRA{hint}", type(head).__name__, TypeError)
    base = head.base_layer
    if head.disable_adapters:
        if head.merged:
            head.unmerge()  # as its own forward does
        return base, None, None
    names = [] if head.merged else [name for name in head.active_adapters if name in head.lora_A]
    for name in names:
        if name in head.lora_variant:
            kind = type(head.lora_variant[name]).__name__
            fail("the model's head", f"be an nn.Linear, or one with LoRA; {ADVICE}", kind, TypeError)
    if not names:
        return base, None, None
    us, bs, bias = [], [], None
    for name in names:
        a, b, scale = head.lora_A[name].weight, head.lora_B[name], head.scaling[name]
        us.append(functional.linear(head.lora_dropout[name](hidden.to(a.dtype)), _parallel.whole(a)) * scale)
        bs.append(_parallel.whole(b.weight))
        if b.bias is not None:
            bias = _parallel.whole(b.bias) * scale if bias is None else bias + _parallel.whole(b.bias) * scale
    return base, bias, (us[0], bs[0]) if len(us) == 1 else (torch.cat(us, -1), torch.cat(bs, -1))


def _gathered(base: nn.Linear, adapter):
    """A context that gives the weight: a shard of ZeRO-3 gathered."""
    if not is_sharded(base.weight):
        return nullcontext(base.weight)
    if adapter is not None:
        fail("the model's head", "have no LoRA under ZeRO-3", "one with LoRA")
    return regathered(base.weight, base.bias)

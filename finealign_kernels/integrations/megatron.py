"""In Megatron-Core: a processor of GPTModel's output that scores labels without the vocabulary-parallel logits."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from ..ops._check import fail
from ..ops.logprobs import LogProbs, linear_logprobs

OPTIONS = ("vocab_size", "temperature", "softcap", "outputs", "ignore_index", "workspace", "backend")


def output_processor(
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    outputs: Iterable[str] = ("entropy",),
    ignore_index: int = -100,
    workspace: str | int = "auto",
    backend: str = "auto",
) -> Callable[..., LogProbs]:
    """What `GPTModel.forward(output_processor=...)` of Megatron-Core >= 0.18 calls in place of its head and loss.

        processor = output_processor(vocab_size=tokenizer.vocab_size)
        out = model(ids, positions, mask, labels=labels, loss_mask=loss_mask, output_processor=processor)
        out.logp, out.entropy                                           # (B, S) float32, on every tensor-parallel rank

    vocab_size   true size of the vocabulary: the columns that Megatron pads it with leave the softmax. None: they
                 count, as in Megatron's own loss
    the others   as in linear_logprobs; output_processor_context={"temperature": 0.7} replaces them in one call

    Handles untied and tied embeddings, sequence parallelism (hidden is gathered, its gradient reduce-scattered) and
    none (its gradient is all-reduced), in float32 both, and a scale of logits (MuP). Rows whose label is ignore_index
    or whose loss_mask is 0 are 0 and cost nothing in the head. Context, data and pipeline parallelism need no more.
    Gradients of the head are autograd's: Megatron's DDP adds them to main_grad. Tested in the real GPTModel of 0.16.1
    and 0.19.2 on two CPU ranks; no GPU has run it.

    On older versions, call it in place of the output layer with hidden_states (S, B, D), output_layer, output_weight
    and labels. Returns LogProbs in the shape of labels. Raises  as linear_logprobs; ValueError without labels.
    """
    given = vocab_size, temperature, softcap, outputs, ignore_index, workspace, backend
    options = dict(zip(OPTIONS, given, strict=True))

    def process(
        hidden_states: Tensor,  # (S, B, D), or (S / ranks, B, D) with sequence parallelism
        output_layer: torch.nn.Module,
        output_weight: Tensor | None = None,  # (V / ranks, D) where embeddings are tied
        labels: Tensor | None = None,  # (B, S) ids, the same on all tensor-parallel ranks
        loss_mask: Tensor | None = None,  # (B, S)
        scale_logits: Callable[[Tensor], Tensor] | None = None,
        context: Mapping | None = None,
        **_,
    ) -> LogProbs:
        if labels is None:
            fail("labels", "be given: this processor scores labels", None)
        unknown = sorted(set(context or {}) - set(OPTIONS))
        if unknown:
            fail("output_processor_context", f"hold names out of {OPTIONS}", unknown[0])
        weight = output_layer.weight if output_weight is None else output_weight
        scale = 1.0 if scale_logits is None else float(scale_logits(torch.ones((), dtype=torch.float64)))
        found = linear_logprobs(
            hidden_states,
            weight,
            labels.t().contiguous(),
            bias=getattr(output_layer, "bias", None),
            mask=None if loss_mask is None else (loss_mask != 0).t().contiguous(),
            logit_scale=scale,
            group=group_of(output_layer),
            hidden_grad="reduce_scatter" if output_layer.sequence_parallel else "all_reduce",
            **{**options, **(context or {})},
        )
        return LogProbs(*(None if x is None else x.t() for x in found))

    return process


def group_of(output_layer: torch.nn.Module):
    """The tensor-parallel group of a ColumnParallelLinear."""
    group = getattr(output_layer, "tp_group", None)
    if group is None:
        from megatron.core import parallel_state

        group = parallel_state.get_tensor_model_parallel_group()
    return group

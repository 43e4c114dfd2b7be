"""From tokens to sequences and from items to a batch: the two averages, each under its own word."""

import torch
from torch import Tensor

from ..ops._check import fail
from ..ops._layout import Tokens
from ..ops.segments import segment_broadcast, segment_sum

AVERAGES = (False, "kept", "all")
REDUCTIONS = ("mean", "sum", "none")


def check_average(average) -> None:
    if average not in AVERAGES or isinstance(average, int) and average is not False:
        fail("average", f"be one of {AVERAGES}", repr(average))


def sequence_weights(token_weight: Tensor | None, tokens: Tokens, average) -> Tensor:
    """w (N,), the weight of each token in its sequence's score Σ_t w_t x_t; 0 where the mask is false.

    average False   w_t = token_weight_t
    average "kept"  w_t = token_weight_t / Σ token_weight over the sequence's mask (0 where that is 0)
    average "all"   w_t = token_weight_t / max(1, number of the sequence's mask tokens)
    """
    ones = torch.ones_like(tokens.x, dtype=torch.promote_types(tokens.x.dtype, torch.float32))
    weight = ones if token_weight is None else token_weight.to(ones.dtype)
    weight = weight if tokens.mask is None else torch.where(tokens.mask, weight, 0)
    if average is False:
        return weight
    total = segment_sum(weight if average == "kept" else ones, tokens.cu_seqlens, mask=tokens.mask)
    total = torch.where(total == 0, 1, total)
    return weight / segment_broadcast(total, tokens.cu_seqlens, total=tokens.x.shape[0])


def sequence_scores(x: Tensor, weight: Tensor, tokens: Tokens) -> Tensor:
    """Σ_t w_t x_t of each sequence (S,). By selection: where the mask is false or w_t is 0, x may be NaN."""
    return segment_sum(weight * torch.where(weight != 0, x, 0), tokens.cu_seqlens)


def reduce(items: Tensor, reduction: str, denominator, counted: Tensor | None = None) -> Tensor:
    """Batch loss of items (S,): "mean", "sum" or "none"; a denominator divides the sum in place of the number of items.

    counted (S,) bool leaves items out of numerator and denominator. No item at all gives 0, connected to the graph.
    """
    if reduction not in REDUCTIONS:
        fail("reduction", f"be one of {REDUCTIONS}", repr(reduction))
    if counted is not None:
        items = torch.where(counted, items, 0)
    if reduction == "none":
        if denominator is not None:
            fail("denominator", "be None with reduction='none'", repr(denominator))
        return items
    total = items.sum()
    if denominator is not None:
        return total / check_denominator(denominator)
    if reduction == "sum":
        return total
    return total / (counted.sum().clamp(min=1) if counted is not None else max(1, items.numel()))


def check_denominator(denominator):
    """A number > 0, or a tensor with one element (a global count, say), which is not read on the host."""
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            fail("denominator", "hold one number", f"shape {tuple(denominator.shape)}")
        return denominator.detach().reshape(())
    if isinstance(denominator, bool) or not isinstance(denominator, (int, float)) or not 0 < denominator < float("inf"):
        fail("denominator", "be a finite number > 0 or a tensor with one element", repr(denominator))
    return denominator

"""From tokens to sequences and from items to a batch: the two averages, each under its own word."""

import torch
from torch import Tensor

from ..ops._check import fail
from ..ops._layout import Tokens, flatten_like
from ..ops.segments import segment_broadcast, segment_sum

AVERAGES = (False, "kept", "all", "segments")
REDUCTIONS = ("mean", "sum", "none")


def check_average(average, segment_ids=None) -> None:
    if average not in AVERAGES or isinstance(average, int) and average is not False:
        fail("average", f"be one of {AVERAGES}", repr(average))
    if (average == "segments") != (segment_ids is not None):
        wanted = "be given with average='segments'" if segment_ids is None else "be None but for average='segments'"
        fail("segment_ids", wanted, "None" if segment_ids is None else f"average={average!r}")


def sequence_weights(token_weight: Tensor | None, tokens: Tokens, average, segment_ids=None) -> Tensor:
    """w (N,), the weight of each token in its sequence's score Σ_t w_t x_t; 0 where the mask is false.

    average False       w_t = token_weight_t
    average "kept"      w_t = token_weight_t / Σ token_weight over the sequence's mask (0 where that is 0)
    average "all"       w_t = token_weight_t / max(1, number of the sequence's mask tokens)
    average "segments"  w_t = token_weight_t / (J Σ token_weight over its segment), J the sequence's segments in which
                        that sum is not 0: the mean of segment means. 0 for a token of no segment
    """
    ones = torch.ones_like(tokens.x, dtype=torch.promote_types(tokens.x.dtype, torch.float32))
    weight = ones if token_weight is None else token_weight.to(ones.dtype)
    weight = weight if tokens.mask is None else torch.where(tokens.mask, weight, 0)
    if average is False:
        return weight
    if average == "segments":
        return _balanced(weight, tokens, segment_ids)
    total = segment_sum(weight if average == "kept" else ones, tokens.cu_seqlens, mask=tokens.mask)
    total = torch.where(total == 0, 1, total)
    return weight / segment_broadcast(total, tokens.cu_seqlens, total=tokens.x.shape[0])


def _balanced(weight: Tensor, tokens: Tokens, segment_ids) -> Tensor:
    """Weights (N,) of the mean of segment means; segment_ids (N,) do not decrease in a sequence, -1 is no segment."""
    ids, total = flatten_like(segment_ids, tokens, "segment_ids", (torch.int32, torch.int64)).long(), weight.shape[0]
    inside = ids >= 0 if tokens.mask is None else (ids >= 0) & tokens.mask
    # one number per (sequence, segment) that grows along the batch; a token of none takes the one before it
    first = torch.bucketize(torch.arange(total, device=ids.device), tokens.cu_seqlens[1:], right=True) * (total + 1)
    own = torch.where(inside, first + ids.clamp(max=total - 1) + 1, first)
    key = own.cummax(0).values if total else own
    if ids.device.type == "cpu" and bool((inside & ((key != own) | (ids >= total))).any()):
        fail("segment_ids", f"not decrease in a sequence and lie in [-1, {total})", "ids that do not")
    starts = torch.ones_like(inside)
    starts[1:] = key[1:] != key[:-1]
    run = starts.cumsum(0) - 1
    ends = torch.searchsorted(run, torch.arange(total + 1, device=run.device))
    weight = torch.where(inside, weight, 0)
    sums = segment_sum(weight, ends)[run]
    segments = segment_sum((starts & (sums != 0)).to(weight.dtype), tokens.cu_seqlens)
    share = segment_broadcast(segments, tokens.cu_seqlens, total=total) * sums
    return weight / torch.where(share == 0, 1, share)


def sequence_scores(x: Tensor, weight: Tensor, tokens: Tokens) -> Tensor:
    """Σ_t w_t x_t of each sequence (S,). By selection: where the mask is false or w_t is 0, x may be NaN."""
    return segment_sum(weight * torch.where(weight != 0, x, 0), tokens.cu_seqlens)


def has_tokens(tokens: Tokens) -> Tensor:
    """(S,) bool: does the mask leave a sequence a token."""
    return segment_sum(torch.ones_like(tokens.x), tokens.cu_seqlens, mask=tokens.mask) > 0


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


def check_denominator(denominator, name: str = "denominator"):
    """A number > 0, or a tensor with one element (a global count, say), which is not read on the host."""
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            fail(name, "hold one number", f"shape {tuple(denominator.shape)}")
        return denominator.detach().reshape(())
    if isinstance(denominator, bool) or not isinstance(denominator, (int, float)) or not 0 < denominator < float("inf"):
        fail(name, "be a finite number > 0 or a tensor with one element", repr(denominator))
    return denominator

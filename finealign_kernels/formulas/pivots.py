"""Pivots and adaptive masks in a flat batch; row s has the tokens cu_seqlens[s] <= t < cu_seqlens[s + 1].

A pivot is a token at which the token score q changes. A segment runs from one pivot to the next. Tokens with a false
mask (N,) are left out: their scores may be NaN, and they are not neighbours of other tokens. q is float32; comparisons
are strict. Derived from arXiv:2411.00809.
"""

import torch
from torch import Tensor

from .segments import segment_ids, summed_in


def first_tokens(mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(N,) bool: True at the first token of each row that the mask keeps."""
    return mask & (previous(mask, cu_seqlens) < 0)


def previous(mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(N,) int64: index of the last kept token before t in the same row, or -1."""
    place = torch.cat([cu_seqlens.new_full((1,), -1, dtype=torch.int64), _last(mask)[:-1]])[: mask.shape[0]]
    start = cu_seqlens.long()[segment_ids(cu_seqlens, mask.shape[0])]
    return torch.where(place >= start, place, -1)


def threshold(q: Tensor, before: Tensor, tau: float | Tensor) -> Tensor:
    """|q_t - q_(t-1)| > tau. before (N,) comes from `previous`; a token without a previous one gets False."""
    return (before >= 0) & ((q - q[before]).abs() > tau)


def sign(q: Tensor, before: Tensor, baseline: Tensor) -> Tensor:
    """(q_t - b)(q_(t-1) - b) < 0 for a baseline b (N,). The signs are compared, because the product may underflow."""
    earlier = q[before]
    return (before >= 0) & (((q > baseline) & (earlier < baseline)) | ((q < baseline) & (earlier > baseline)))


def salience(q: Tensor, mask: Tensor, cu_seqlens: Tensor, baseline: Tensor, percent: float) -> Tensor:
    """True at the max(1, ceil(percent n / 100)) tokens of each row with the largest |q_t - b|; n tokens a row.

    Of equal values the one with the lower index comes first.
    """
    row = segment_ids(cu_seqlens, q.shape[0])
    size = torch.where(mask, (q - baseline).abs(), -1)
    size = torch.where(size.isnan(), -1, size)
    order = size.argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=q.device))
    many = -(-_count_before(mask, cu_seqlens).diff() * round(percent * 10**6) // 10**8)  # exact, in integers
    return (size >= 0) & (place - cu_seqlens.long()[row] < many.clamp(min=1)[row])


def ids(pivot: Tensor, mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(N,) int64: number of the token's segment within its row, which is the count of pivots up to t minus 1.

    -1 where the mask is false. The first token of each row must be a pivot.
    """
    row = segment_ids(cu_seqlens, mask.shape[0])
    return torch.where(mask, pivot.cumsum(0) - _count_before(pivot, cu_seqlens)[row] - 1, -1)


def bounds(pivot: Tensor) -> tuple[Tensor, Tensor]:
    """The segments of the whole batch as cu_seqlens (N + 2,), and the segment of each token (N,).

    Segment 0 holds the tokens before the first pivot. There are always N + 1 segments, the last ones empty, so that the
    number of pivots need not be read from the device.
    """
    total, count = pivot.shape[0], pivot.cumsum(0)
    starts = torch.searchsorted(count, torch.arange(1, total + 1, device=pivot.device))
    return torch.cat([starts.new_zeros(1), starts, starts.new_full((1,), total)]), count


def last_score(q: Tensor, mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(S,): q of the last kept token of each segment; 0 for a segment without kept tokens."""
    cu_seqlens = cu_seqlens.long()
    place = torch.cat([cu_seqlens.new_full((1,), -1), _last(mask)])[cu_seqlens[1:]]
    return torch.where(place >= cu_seqlens[:-1], torch.cat([q, q.new_zeros(1)])[place], 0)


def mean(q: Tensor, mask: Tensor) -> Tensor:
    """() float32: Σ m q / Σ m over the batch; 0 if the mask keeps no token."""
    return (_kept(q, mask).sum() / mask.sum().clamp(min=1)).to(q.dtype)


def std(q: Tensor, mask: Tensor) -> Tensor:
    """() float32: sqrt(Σ m (q - μ)² / Σ m) over the batch, the standard deviation of the population."""
    wide, count = _kept(q, mask), mask.sum().clamp(min=1)
    away = torch.where(mask, wide - wide.sum() / count, 0)
    return (away.square().sum() / count).sqrt().to(q.dtype)


def quantile(q: Tensor, mask: Tensor, p: float) -> Tensor:
    """() float32: the p-quantile of the batch, interpolated linearly; 0 if the mask keeps no token."""
    if not len(q):
        return q.new_zeros(())
    ordered = torch.where(mask, q, torch.inf).sort().values
    at = (mask.sum() - 1).clamp(min=0).to(summed_in(q)) * p
    low, high = ordered.take(at.floor().long()), ordered.take(at.ceil().long())
    between = torch.where(low == high, low, torch.lerp(low, high, (at - at.floor()).to(q.dtype)))
    return torch.where(mask.any(), between, 0)


def keep(score: Tensor, side: Tensor, baseline: Tensor) -> Tensor:
    """(N,) bool: score > b where side > 0, score < b where side < 0. A score of NaN gives False."""
    return ((side > 0) & (score > baseline)) | ((side < 0) & (score < baseline))


def soft_keep(score: Tensor, side: Tensor, baseline: Tensor, width: float) -> Tensor:
    """(N,) in [0, 1]: σ(side (score - b) / width). A score of NaN gives 0."""
    weight = (side * (score - baseline) / width).sigmoid()
    return torch.where(weight.isnan(), 0, weight)


def _last(mask: Tensor) -> Tensor:
    """(N,): index of the last kept token up to and with t, or -1."""
    token = torch.arange(mask.shape[0], device=mask.device)
    return torch.where(mask, token, -1).cummax(0).values if len(token) else token


def _count_before(flags: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(S + 1,): how many flags are set before each bound."""
    return torch.cat([cu_seqlens.new_zeros(1, dtype=torch.int64), flags.cumsum(0)])[cu_seqlens.long()]


def _kept(q: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, q, 0).to(summed_in(q))

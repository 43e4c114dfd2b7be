"""Pivots and masks of a flat batch, row s at [cu_seqlens[s], cu_seqlens[s + 1]); derived from arXiv:2411.00809.

A pivot is a token at which the token score q changes; a segment runs from a pivot to the next one. mask (N,) bool
leaves tokens out, by selection: one that is left out may hold NaN and is the neighbour of no token. q is float32,
comparisons are strict.
"""

import torch
from torch import Tensor

from .segments import segment_ids, summed_in


def firsts(mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(N,) bool: the first token of each row that mask keeps."""
    return mask & (previous(mask, cu_seqlens) < 0)


def previous(mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(N,) int64: where the last token before t stands that mask keeps and that is of t's row, or -1."""
    place = torch.cat([cu_seqlens.new_full((1,), -1, dtype=torch.int64), _last(mask)[:-1]])[: mask.shape[0]]
    start = cu_seqlens.long()[segment_ids(cu_seqlens, mask.shape[0])]
    return torch.where(place >= start, place, -1)


def threshold(q: Tensor, before: Tensor, tau: float | Tensor) -> Tensor:
    """|q_t - q_(t-1)| > tau; before (N,) is `previous`, a token without one is no pivot here."""
    return (before >= 0) & ((q - q[before]).abs() > tau)


def sign(q: Tensor, before: Tensor, baseline: Tensor) -> Tensor:
    """(q_t - b)(q_(t-1) - b) < 0, b (N,), without the product, which underflows."""
    earlier = q[before]
    return (before >= 0) & (((q > baseline) & (earlier < baseline)) | ((q < baseline) & (earlier > baseline)))


def salience(q: Tensor, mask: Tensor, cu_seqlens: Tensor, baseline: Tensor, percent: float) -> Tensor:
    """|q_t - b| among the max(1, ceil(percent n / 100)) largest of its row's n tokens, ties to the lower index."""
    row = segment_ids(cu_seqlens, q.shape[0])
    size = torch.where(mask, (q - baseline).abs(), -1)
    size = torch.where(size.isnan(), -1, size)
    order = size.argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=q.device))
    many = -(-_before(mask, cu_seqlens).diff() * round(percent * 10**6) // 10**8)  # in whole numbers: no digit is lost
    return (size >= 0) & (place - cu_seqlens.long()[row] < many.clamp(min=1)[row])


def ids(pivot: Tensor, mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(N,) int64: number of the segment in its row, the count of pivots up to t less 1; -1 where mask is false.

    pivot holds the first token of each row.
    """
    row = segment_ids(cu_seqlens, mask.shape[0])
    return torch.where(mask, pivot.cumsum(0) - _before(pivot, cu_seqlens)[row] - 1, -1)


def bounds(pivot: Tensor) -> tuple[Tensor, Tensor]:
    """Segments of the whole batch as cu_seqlens (N + 2,), and which of them each token is in (N,).

    Segment 0 is what stands before the first pivot; those past the last one are empty, so that no count is read.
    """
    total, count = pivot.shape[0], pivot.cumsum(0)
    starts = torch.searchsorted(count, torch.arange(1, total + 1, device=pivot.device))
    return torch.cat([starts.new_zeros(1), starts, starts.new_full((1,), total)]), count


def last_score(q: Tensor, mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(S,): q of the last token of each segment that mask keeps, 0 for a segment without one."""
    cu_seqlens = cu_seqlens.long()
    place = torch.cat([cu_seqlens.new_full((1,), -1), _last(mask)])[cu_seqlens[1:]]
    return torch.where(place >= cu_seqlens[:-1], torch.cat([q, q.new_zeros(1)])[place], 0)


def mean(q: Tensor, mask: Tensor) -> Tensor:
    """() float32: Σ m q / Σ m over the batch, 0 where mask keeps nothing."""
    return (_kept(q, mask).sum() / mask.sum().clamp(min=1)).to(q.dtype)


def std(q: Tensor, mask: Tensor) -> Tensor:
    """() float32: sqrt(Σ m (q - μ)² / Σ m) over the batch, the population's."""
    wide, count = _kept(q, mask), mask.sum().clamp(min=1)
    away = torch.where(mask, wide - wide.sum() / count, 0)
    return (away.square().sum() / count).sqrt().to(q.dtype)


def quantile(q: Tensor, mask: Tensor, p: float) -> Tensor:
    """() float32: p-quantile of the batch, linear between order statistics, 0 where mask keeps nothing."""
    if not len(q):
        return q.new_zeros(())
    ordered = torch.where(mask, q, torch.inf).sort().values
    at = (mask.sum() - 1).clamp(min=0).to(summed_in(q)) * p
    low, high = ordered.take(at.floor().long()), ordered.take(at.ceil().long())
    between = torch.where(low == high, low, torch.lerp(low, high, (at - at.floor()).to(q.dtype)))
    return torch.where(mask.any(), between, 0)


def keep(score: Tensor, side: Tensor, baseline: Tensor) -> Tensor:
    """(N,) bool: score > b where side > 0, score < b where side < 0; NaN is kept nowhere."""
    return ((side > 0) & (score > baseline)) | ((side < 0) & (score < baseline))


def soft_keep(score: Tensor, side: Tensor, baseline: Tensor, width: float) -> Tensor:
    """(N,) in [0, 1]: σ(side (score - b) / width); NaN counts 0."""
    weight = (side * (score - baseline) / width).sigmoid()
    return torch.where(weight.isnan(), 0, weight)


def _last(mask: Tensor) -> Tensor:
    """(N,): the last place up to t that mask keeps, -1 where there is none."""
    token = torch.arange(mask.shape[0], device=mask.device)
    return torch.where(mask, token, -1).cummax(0).values if len(token) else token


def _before(flags: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(S + 1,): flags set before each bound."""
    return torch.cat([cu_seqlens.new_zeros(1, dtype=torch.int64), flags.cumsum(0)])[cu_seqlens.long()]


def _kept(q: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, q, 0).to(summed_in(q))

"""Segments of a flat batch: segment s holds the tokens t with cu_seqlens[s] <= t < cu_seqlens[s + 1].

    sum        y_s = Σ_{t in s} x_t                    its transpose   x_t = y_s                     broadcast
    mean       y_s = Σ_{t in s} x_t / max(1, n_s)                      x_t = y_s / max(1, n_s)
    take_last  y_s = x_T, T the last token of s                        x_t = y_s where t = T, else 0  put_last

Tokens with a false mask (N,) are left out: they may hold NaN, they do not count in n_s, and none of them is the last
token. Sum, mean and last of an empty segment are 0. Results are float32 for half-precision tokens.
Sums are float64: one of float64 tokens whose partial sums pass 1.8e308 is infinite, and so is its mean.
"""

import torch
from torch import Tensor


def segment_ids(cu_seqlens: Tensor, total: int) -> Tensor:
    """(N,) int64: the segment of each token."""
    segments = torch.arange(cu_seqlens.shape[0] - 1, device=cu_seqlens.device)
    return segments.repeat_interleave(cu_seqlens.long().diff(), output_size=total)


def segment_sum(x: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sums of segments, (N,) -> (S,)."""
    return _sums(x, cu_seqlens, mask).to(_result(x))


def segment_mean(x: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Means of segments, (N,) -> (S,)."""
    count = cu_seqlens.diff() if mask is None else _sums(mask.to(summed_in(x)), cu_seqlens, None)
    return (_sums(x, cu_seqlens, mask) / count.clamp(min=1)).to(_result(x))


def segment_broadcast(v: Tensor, cu_seqlens: Tensor, total: int, mask: Tensor | None = None) -> Tensor:
    """The value of its segment at each token, (S,) -> (N,), N = total; 0 where the mask is false."""
    # in the wide dtype, because the gradient is a sum over tokens
    each = v.to(summed_in(v))[segment_ids(cu_seqlens, total)].to(v.dtype)
    return each if mask is None else torch.where(mask, each, 0)


def segment_put_last(v: Tensor, cu_seqlens: Tensor, total: int, mask: Tensor | None = None) -> Tensor:
    """The value of its segment at the last kept token of each segment, else 0, (S,) -> (N,), N = total."""
    ids, token = segment_ids(cu_seqlens, total), torch.arange(total, device=v.device)
    kept = token if mask is None else torch.where(mask, token, -1)
    last = token.new_full((v.shape[0],), -1).scatter_reduce(0, ids, kept, "amax")
    return torch.where(token == last[ids], v[ids], 0)


def _sums(x: Tensor, cu_seqlens: Tensor, mask: Tensor | None) -> Tensor:
    kept = (x if mask is None else torch.where(mask, x, 0)).to(summed_in(x))
    return kept.new_zeros(cu_seqlens.shape[0] - 1).index_add(0, segment_ids(cu_seqlens, x.shape[0]), kept)


def summed_in(x: Tensor) -> torch.dtype:
    """The dtype in which tokens of x are summed."""
    return torch.float32 if x.device.type == "mps" else torch.float64  # Metal has no float64


def _result(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32

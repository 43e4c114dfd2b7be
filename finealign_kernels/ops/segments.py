"""Sums, means and last tokens of the segments of a flat batch, and their transposes; formulas/segments.py says which.

Two native ops, segment_reduce (tokens to segments) and segment_spread (segments to tokens), are each other's backward,
so a second backward and a double backward are exact. A native sum is the same bit for bit on a CPU and on a GPU, with
any number of threads, at any place in the batch and with any padding after its end.
"""

import torch
from torch import Tensor

from ..formulas import segments as formula
from . import _native
from ._check import FLOATS, check_flags, check_integer, check_tensor, fail
from ._layout import Tokens, check_cu_seqlens, flatten, padded_cu_seqlens, unflatten

SUM, MEAN, LAST = 0, 1, 2  # Over in csrc/launch.h


def segment_sum(
    x: Tensor, cu_seqlens: Tensor | None = None, *, mask: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """y[s] = Σ x[t] over the tokens t of segment s that mask keeps; 0 for an empty segment.

    x           (N,) with cu_seqlens, or (B, T), where every row is a segment; float
    cu_seqlens  (S + 1,) int32 or int64, starts at 0, does not decrease, ends at N
    mask        bool (or ints, 0 and 1), the shape of x; tokens where it is False are ignored and may hold NaN
    backend     "auto", "reference" (torch), or "native" (the compiled extension, on a CPU or a CUDA GPU)
    Returns     (S,) float32 (float64 for float64), differentiable in x any number of times.
    Raises      ValueError, TypeError; for values of cu_seqlens on a CPU only: on a GPU a bad segment gives NaN.
    """
    return _reduce(flatten(x, mask, cu_seqlens), SUM, backend)


def segment_mean(
    x: Tensor, cu_seqlens: Tensor | None = None, *, mask: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """y[s] = mean of x over the tokens of segment s that mask keeps, 0 where it keeps none. Arguments: segment_sum."""
    return _reduce(flatten(x, mask, cu_seqlens), MEAN, backend)


def segment_broadcast(
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    total: int | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y[t] = v[s] for every token t of segment s, 0 where mask is false. The transpose of segment_sum.

    v           (S,) float
    cu_seqlens  (S + 1,), or None for a padded batch, whose shape (S, T) is that of mask
    total       N. Needed on a GPU, and in a compiled graph, where there is no mask: cu_seqlens[-1] is not read there
    Returns     (N,), or (S, T) for a padded batch, of v's dtype; differentiable in v any number of times.
    """
    return _spread(v, cu_seqlens, total, mask, SUM, backend)


def segment_put_last(
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    total: int | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y[t] = v[s] at the last token of segment s that mask keeps, 0 elsewhere; nothing for a segment without one.

    Arguments: segment_broadcast. The gradient takes the last token's.
    """
    return _spread(v, cu_seqlens, total, mask, LAST, backend)


def _reduce(tokens: Tokens, over: int, backend: str) -> Tensor:
    if _backend(backend, tokens.x.device) == "native":
        return _Reduce.apply(tokens.x, tokens.mask, tokens.cu_seqlens, over)
    reference = formula.segment_sum if over == SUM else formula.segment_mean
    return reference(tokens.x, tokens.cu_seqlens, tokens.mask)


def _spread(v: Tensor, cu_seqlens: Tensor | None, total: int | None, mask: Tensor | None, over: int, backend: str):
    check_tensor("v", v, dtypes=FLOATS)
    if mask is not None:
        mask = check_flags("mask", mask, like=v)
    if total is not None:
        total = check_integer("total", total, "be the number of tokens", least=0)
    if cu_seqlens is None:
        if mask is None or mask.dim() != 2:
            fail("mask", "be (S, T) where cu_seqlens is not given", None if mask is None else tuple(mask.shape))
        cu_seqlens, shape = padded_cu_seqlens((mask.shape,), v.device), mask.shape
    else:
        total = _total(cu_seqlens, total, mask)
        check_cu_seqlens(cu_seqlens, total, v)
        shape = torch.Size((total,))
    check_tensor("v", v, dtypes=FLOATS, shape=(cu_seqlens.shape[0] - 1,))
    if mask is not None:
        check_tensor("mask", mask, dtypes=(torch.bool,), shape=shape)
        mask = mask.reshape(-1)
    if _backend(backend, v.device) == "native":
        flat = _Spread.apply(v, mask, cu_seqlens, over, shape.numel(), v.dtype)
    else:
        reference = formula.segment_broadcast if over == SUM else formula.segment_put_last
        flat = reference(v, cu_seqlens, shape.numel(), mask)
    return unflatten(flat, (shape,))


def _total(cu_seqlens: Tensor, total: int | None, mask: Tensor | None) -> int:
    if total is not None:
        return total
    if mask is not None:
        return mask.numel()
    if cu_seqlens.device.type != "cpu":
        fail("total", "be given where cu_seqlens is on a GPU and there is no mask", None)
    return int(cu_seqlens[-1])


def _backend(backend: str, device: torch.device) -> str:
    """The backend that runs on a device. One asked for by name runs, or raises with its reason."""
    missing = _native.missing(device)
    if backend == "auto":
        return "reference" if missing else "native"
    if backend not in ("reference", "native"):
        fail("backend", "be 'auto', 'reference' or 'native'", repr(backend))
    if backend == "native" and missing:
        raise RuntimeError(f"backend 'native' cannot run here: {missing}")
    return backend


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask, cu_seqlens, over):
        ctx.save_for_backward(mask, cu_seqlens)
        ctx.over, ctx.total, ctx.dtype = over, x.shape[0], x.dtype
        return torch.ops.finealign.segment_reduce(x.contiguous(), _dense(mask), cu_seqlens.contiguous(), over)

    @staticmethod
    def backward(ctx, dy):
        mask, cu_seqlens = ctx.saved_tensors
        return _Spread.apply(dy, mask, cu_seqlens, ctx.over, ctx.total, ctx.dtype), None, None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, mask, cu_seqlens, over, total, dtype):
        ctx.save_for_backward(mask, cu_seqlens)
        ctx.over, ctx.dtype = over, v.dtype
        v = v.to(_wide(dtype)).contiguous()
        return torch.ops.finealign.segment_spread(v, _dense(mask), cu_seqlens.contiguous(), over, total, dtype)

    @staticmethod
    def backward(ctx, dy):
        mask, cu_seqlens = ctx.saved_tensors
        return _Reduce.apply(dy, mask, cu_seqlens, ctx.over).to(ctx.dtype), None, None, None, None, None


def _dense(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous()


if _native.available():

    @_native.fake("segment_reduce")
    def _(x, mask, cu_seqlens, over):
        return x.new_empty(cu_seqlens.shape[0] - 1, dtype=_wide(x.dtype))

    @_native.fake("segment_spread")
    def _(v, mask, cu_seqlens, over, total, dtype):
        return v.new_empty(total, dtype=dtype)

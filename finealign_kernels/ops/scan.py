"""The recurrence y_t = x_t + a_t y_(t+1) over sequences of a flat batch; formulas/returns.py says which.

The native op runs in both directions, and each is the other's backward: every derivative is exact, any number of times.
"""

import torch
from torch import Tensor

from ..formulas import returns as formula
from ..formulas.segments import segment_ids
from . import _native
from ._check import check_number, check_tensor
from ._layout import Tokens, flatten, flatten_like, unflatten
from .advantages import runs


def reverse_scan(
    x: Tensor,
    decay: float | Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y_t = x_t + a_t y_(t+1), from y = 0 at the end of each sequence.

    x           (N,) with cu_seqlens, or (B, T), where every row is a sequence; float
    decay       a: a number, (S,) one a sequence, or as x one a token, which is how a shape that is both is read. That
                of the last token of a sequence has no effect
    cu_seqlens  (S + 1,) int32 or int64, starts at 0, does not decrease, ends at N
    mask        bool, as x; a masked token gets 0 and passes the state on unchanged; its x and decay may be NaN
    backend     "auto", "reference" (torch, any device) or "native" (the compiled extension, on a CPU or a CUDA GPU)
    Returns     float32 (float64 if x or decay is), differentiable in x and decay any number of times.
    Raises      ValueError, TypeError naming argument, expectation and finding.

    Arithmetic is float64, rounded once. Decays above 1 whose product over 8192 tokens overflows give inf or NaN.
    """
    tokens = flatten(x, mask, cu_seqlens)
    decay, rates = _decays(decay, tokens)
    given = decay if rates is None else rates
    wide = torch.promote_types(tokens.x.dtype, torch.float32)
    if isinstance(decay, Tensor) or rates.dim():
        wide = torch.promote_types(wide, given.dtype)
    tokens = tokens.with_x(tokens.x.to(wide))
    native = runs(backend, tokens.x.device)
    if rates is not None and rates.dim() and (rates.requires_grad or not native):
        decay, rates = rates[segment_ids(tokens.cu_seqlens, tokens.x.shape[0])], None
    if native:
        y = _Scan.apply(tokens.x, *_dense(decay, rates, wide), tokens.mask, tokens.cu_seqlens, False)
    else:
        y = formula.reverse_scan(tokens.x, rates if decay is None else decay, tokens.cu_seqlens, tokens.mask)
    return unflatten(y, tokens.shapes)


def _decays(decay: float | Tensor, tokens: Tokens) -> tuple[Tensor | None, Tensor | None]:
    """Decays of tokens (N,), or rates: () one for all, float64, or (S,) one a sequence."""
    if not isinstance(decay, Tensor):
        decay = check_number("decay", decay)
        return None, torch.full((), decay, dtype=torch.float64, device=tokens.x.device)
    if decay.shape == (tokens.segments,) != tokens.shapes[0]:
        check_tensor("decay", decay, like=tokens.x)
        return None, decay
    return flatten_like(decay, tokens, "decay"), None


def _dense(decay: Tensor | None, rates: Tensor | None, wide: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    if rates is None:
        return decay.to(wide).contiguous(), None
    return None, rates.reshape(-1).double().contiguous()


class _Scan(torch.autograd.Function):
    """y of reverse_scan, or forward its transpose y_t = x_t + a_(t-1) y_(t-1); decay (N,), or rates (1,) or (S,)."""

    @staticmethod
    def forward(ctx, x, decay, rates, mask, cu_seqlens, forward):
        mask = None if mask is None else mask.contiguous()
        x, cu_seqlens = x.contiguous(), cu_seqlens.contiguous()
        y = torch.ops.finealign.reverse_scan.default(x, decay, rates, mask, cu_seqlens, forward)
        ctx.save_for_backward(decay, rates, mask, cu_seqlens, y)
        ctx.forward = forward
        return y

    @staticmethod
    def backward(ctx, dy):
        decay, rates, mask, cu_seqlens, y = ctx.saved_tensors
        dx = _Scan.apply(dy, decay, rates, mask, cu_seqlens, not ctx.forward)
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None, None, None
        ahead, back = (y, dx) if ctx.forward else (dx, y)  # of a token, and of the next one
        after, found = formula.following(mask, cu_seqlens, y)
        return dx, ahead * torch.where(found, back[after], 0), None, None, None, None


if _native.available():

    @_native.fake("reverse_scan")
    def _(x, decay, rates, mask, cu_seqlens, forward):
        return torch.empty_like(x)

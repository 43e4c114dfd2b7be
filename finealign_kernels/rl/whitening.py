"""Moments of a batch of tokens that add up over ranks, and whitening by them; formulas/returns.py says which."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..formulas import returns as formula
from ..ops import advantages as native
from ..ops._check import check_bool, check_callable, fail
from ..ops._layout import Tokens, unflatten
from .gae import constants

MODES = tuple(native.MODES)


def moments(x: Tensor, mask: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """(3,) float64: n, Σ x and Σ x² over the valid tokens. The triples of ranks or micro-batches add up.

    x     (B, T) or (N,); float
    mask  bool, as x; values at other tokens may be NaN
    """
    return moments_of(constants(x, mask, _one_sequence(x), "x"), backend)[:3].clone()


def whiten(
    x: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mode: str = "std",
    unbiased: bool = False,
    shift_mean: bool = True,
    sum_moments: Callable[[Tensor], Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """(x - μ) / std over the valid tokens of the batch, plus μ where shift_mean is False.

        "std"     (v + 1e-8)^-½          v the population's variance, or that of a sample of n (n - 1) if unbiased
        "clamp"   max(v, 1e-8)^-½        OpenRLHF's
        "compat"  (√v + 1e-8)^-½         the released code of Fine-Grained RLHF, which leaves a std of √(std)

    x            (B, T) or (N,); float
    mask         bool, as x; values at other tokens may be NaN, the result there is 0
    cu_seqlens   of (N,), if at hand; only checked: the moments are the batch's
    sum_moments  takes the triple (3,) float64 of `moments` and returns its sum over all ranks (an all_reduce, say)

    A valid value that is NaN or infinite makes every result NaN, and so does a sum of sum_moments that overflows: of
    float64 values beyond 1e154. Without it such values are scaled by a power of two before they are squared.
    Where fewer than two values are valid, or where all are one value (v <= 2^-46 Σx²/n; of float64 without sum_moments
    2^-104), the result is 0, or μ.
    v is taken about the mean, so that a mean far from 0 costs no digits. A sum over ranks has Σx² alone, and a relative
    error of v of about 2^-52 (1 + μ²/v): take a large common offset off before.
    Whitening two values maps them to ±1, so with fewer than about eight values it is mostly noise.
    Returns float32 (float64 for float64) in the shape of x, detached. Raises ValueError, TypeError.
    Source  arXiv:2306.01693 and its released code.
    """
    check_mode("mode", mode)
    unbiased, shift_mean = check_bool("unbiased", unbiased), check_bool("shift_mean", shift_mean)
    check_callable("sum_moments", sum_moments)
    tokens = constants(x, mask, _one_sequence(x) if cu_seqlens is None else cu_seqlens, "x")
    unit = _unit(tokens) if sum_moments is None else None
    if unit is not None:
        tokens = tokens.with_x(tokens.x / unit)
    known = summed(moments_of(tokens, backend), sum_moments)
    found = whiten_of(tokens, known, mode, unbiased, shift_mean, backend)
    if unit is not None:  # "compat" divides by the root of a standard deviation; a mean comes back in its own size
        mean, back = known[3], unit.sqrt() if mode == "compat" else 1
        far = found * back if shift_mean else (found - mean) * back + mean * unit
        far = far if tokens.mask is None else torch.where(tokens.mask, far, 0)
        found = torch.where(unit == 1, found, far)
    return unflatten(found, tokens.shapes)


def _unit(tokens: Tokens) -> Tensor | None:
    """() a power of four that float64 values are divided by before their squares overflow: 1 up to 2^480."""
    x = tokens.x
    if x.dtype != torch.float64 or not x.numel():
        return None
    top = (x if tokens.mask is None else torch.where(tokens.mask, x, 0)).abs().amax()
    large = (top > 2.0**480) & top.isfinite()
    half = (torch.frexp(top).exponent - 400) // 2  # scaled values stay so large that 1e-8 does not change a variance
    return torch.ldexp(torch.ones_like(top), torch.where(large, 2 * half, 0))


# ---- flat, checked: what advantages.py puts together as well --------------------------------------------------------


def moments_of(tokens: Tokens, backend: str) -> Tensor:
    if native.runs(backend, tokens.x.device):
        return native.moments(tokens)
    return formula.moments(tokens.x, tokens.mask)


def whiten_of(tokens: Tokens, known: Tensor, mode: str, unbiased: bool, shift_mean: bool, backend: str) -> Tensor:
    if native.runs(backend, tokens.x.device):
        return native.whiten(tokens, known, mode, unbiased, shift_mean)
    return formula.whiten(tokens.x, known, tokens.mask, mode=mode, unbiased=unbiased, shift_mean=shift_mean)


def summed(known: Tensor, sum_moments: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Moments (5,) of all ranks, whose first three add up."""
    if sum_moments is None:
        return known
    triple = known[:3].clone()  # which an all_reduce may overwrite
    total = sum_moments(triple)
    if not isinstance(total, Tensor) or total.shape != triple.shape or total.dtype != triple.dtype:
        found = f"{tuple(total.shape)} {total.dtype}" if isinstance(total, Tensor) else type(total).__name__
        fail("sum_moments", f"return its argument's sum over ranks, a (3,) {triple.dtype} tensor", found, TypeError)
    return formula.moments_by_sums(total)


def _one_sequence(x: Tensor) -> Tensor | None:
    """Bounds of flat tokens that are taken as one sequence; None for a padded batch."""
    flat = isinstance(x, Tensor) and x.dim() == 1
    return torch.arange(2, device=x.device) * x.shape[0] if flat else None


def check_mode(name: str, mode: str) -> None:
    if mode not in MODES:
        fail(name, f"be one of {MODES}", repr(mode))

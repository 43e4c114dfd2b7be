"""Losses of whole sequences in one launch, and their gradient by token in another; losses/preference.py says which.

    h = Σ_t w_t (logp_t - ref_logp_t) / D          score; D = 1, Σ w_t ("kept") or the number of mask tokens ("all")
    m = beta (h_chosen - h_rejected) - shift       margin of a pair, or sign (beta h - shift) of a sequence by itself
    loss = scale · phi(m)                          back: dlogp_t = upstream · slope_s · w_t / D

It is a short cut for what formulas and segments say one after the other. Sums, margin and phi are float64, in an order
that depends on nothing but the sequence; each result is rounded once.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..formulas import margin
from . import _native
from ._check import check_tensor, fail
from ._layout import Tokens, TokenTensor, flatten_like
from ._once import once

AVERAGES = {False: 0, "kept": 1, "all": 2}  # Average in csrc/launch.h
PAIRS = {None: 0, "halves": 1, "interleaved": 2}  # Pairs


class Code(NamedTuple):
    """A function of the margin that the kernels know."""

    number: int  # Phi in csrc/launch.h
    hyper: str | None = None  # the name of its constant
    default: float | None = None


CODES: dict[Callable, Code] = {
    margin.logistic: Code(0),
    margin.squared: Code(1, "center", 0.5),
    margin.hinge: Code(2),
    margin.smoothed: Code(3, "smoothing"),
    margin.robust: Code(4, "smoothing"),
    margin.bounded: Code(5),
    margin.linear: Code(6),
}


class SequenceLoss(NamedTuple):
    """losses carries the gradient; the others are detached. float32; float64 for float64 tokens."""

    losses: Tensor  # (S/2,) of pairs, (S,) of sequences
    score: Tensor  # (S,) h, in the order of the tokens; beta h is what is logged as a reward
    slope: Tensor  # (S,) d loss / d score


def missing(phi: Callable, device: torch.device) -> str | None:
    """Why sequence_loss cannot run phi on a device; None where it can."""
    if phi not in CODES:
        return f"it has no kernel for {getattr(phi, '__name__', phi)!r}"
    return _native.reason or (None if device.type == "cpu" else f"it has no kernel for {device.type}")


def sequence_loss(
    tokens: Tokens,
    ref_logp: TokenTensor | None = None,
    *,
    phi: Callable = margin.logistic,
    beta: float,
    shift: float | Tensor = 0.0,
    scale: float = 1.0,
    sign: Tensor | None = None,
    token_weight: TokenTensor | None = None,
    average: bool | str = False,
    pairs: str | None = "halves",
    **hyper: float | Tensor,
) -> SequenceLoss:
    """Loss of each pair of sequences, or of each sequence, from token log-probs.

    tokens        log-probs of flatten(logp, mask, cu_seqlens), nats; differentiable once, any number of times over
    ref_logp      in the shapes of the tokens, or (S,) sums of whole sequences (without weights and average); constant
    phi           a function of formulas/margin.py that CODES names, with its constant as a further argument
    beta, scale   numbers
    shift, hyper  numbers, or tensors with one number an item; constant
    sign          (S,), without pairs: multiplies the margin; constant
    token_weight  in the shapes of the tokens; constant
    average       False, "kept" or "all": what a score is divided by
    pairs         "halves", "interleaved", or None: every sequence is an item by itself

    An empty sequence has h = 0 and no gradient. What stands where the mask is false or the weight 0 is not looked at.
    Raises  ValueError, TypeError; RuntimeError with the reason where there is no kernel.
    """
    reason = missing(phi, tokens.x.device)
    if reason:
        raise RuntimeError(f"sequence_loss cannot run: {reason}")
    if pairs not in PAIRS:
        fail("pairs", f"be one of {tuple(PAIRS)}", repr(pairs))
    if average not in AVERAGES or isinstance(average, int) and average is not False:
        fail("average", f"be one of {tuple(AVERAGES)}", repr(average))
    count = tokens.segments
    if pairs and count % 2:
        fail("logp", "hold an even number of sequences, chosen and rejected", count)
    if pairs and sign is not None:
        fail("sign", "be None for pairs", "a tensor")
    items = count // 2 if pairs else count
    x, ref, ref_sum, weight = _inputs(tokens, ref_logp, token_weight, average)
    code = CODES[phi]
    if set(hyper) - {code.hyper}:
        fail("hyper", f"be {code.hyper or 'nothing'} for {phi.__name__!r}", tuple(hyper), TypeError)
    if code.hyper and code.default is None and not hyper:
        fail(code.hyper, f"be given for {phi.__name__!r}", None, TypeError)
    a = hyper.get(code.hyper, code.default) if code.hyper else 0.0
    shift, shifts = _number("shift", shift, items, x)
    a, each = _number(code.hyper, a, items, x)
    sign = None if sign is None else _number("sign", sign, items, x)[1]
    mask, cu_seqlens = tokens.mask, tokens.cu_seqlens
    mask = None if mask is None else mask.contiguous()
    cu_seqlens = cu_seqlens.contiguous()
    losses, score, slope, denominator = torch.ops.finealign.sequence_loss_fwd.default(
        x.detach(),
        ref,
        ref_sum,
        mask,
        weight,
        cu_seqlens,
        AVERAGES[average],
        PAIRS[pairs],
        code.number,
        beta,
        scale,
        shift,
        shifts,
        a,
        each,
        sign,
    )
    if x.requires_grad and torch.is_grad_enabled():
        losses = _FromTokens.apply(x, losses, slope, denominator, mask, weight, cu_seqlens, PAIRS[pairs])
    return SequenceLoss(losses, score, slope)


class _FromTokens(torch.autograd.Function):
    """Losses whose slopes are known: backward is upstream · slope · weight / denominator by token."""

    @staticmethod
    def forward(ctx, x, losses, slope, denominator, mask, weight, cu_seqlens, pairs):
        ctx.save_for_backward(x, slope, denominator, mask, weight, cu_seqlens)  # x is not read
        ctx.pairs, ctx.total, ctx.dtype = pairs, x.shape[0], x.dtype
        return losses.view_as(losses)

    @staticmethod
    def backward(ctx, upstream):
        x, slope, denominator, mask, weight, cu_seqlens = ctx.saved_tensors
        dlogp = torch.ops.finealign.sequence_loss_bwd.default(
            upstream.detach(), slope, denominator, mask, weight, cu_seqlens, ctx.pairs, ctx.total, ctx.dtype
        )
        (dlogp,) = once("sequence_loss", (dlogp,), (x, upstream))
        return dlogp, None, None, None, None, None, None, None


def _inputs(tokens: Tokens, ref_logp, token_weight, average) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """logp, ref_logp (N,) of one dtype or its sums (S,), and token_weight (N,), both in the dtype of the results."""
    x, ref, ref_sum, weight = tokens.x, None, None, None
    if isinstance(ref_logp, Tensor) and tokens.shapes[0] != ref_logp.shape == (tokens.segments,):
        if token_weight is not None or average is not False:
            wanted = "hold a log-prob per token where token_weight or an average is used"
            fail("ref_logp", wanted, f"sums per sequence, shape {tuple(ref_logp.shape)}")
        check_tensor("ref_logp", ref_logp, like=x)
        ref_sum = ref_logp.detach()
    elif ref_logp is not None:
        ref = flatten_like(ref_logp, tokens, "ref_logp").detach()
    either = x if ref is None and ref_sum is None else ref if ref is not None else ref_sum
    if either.dtype != x.dtype:
        x = x.to(torch.promote_types(x.dtype, either.dtype))
    wide = torch.promote_types(x.dtype, torch.float32)
    if token_weight is not None:
        weight = flatten_like(token_weight, tokens, "token_weight").detach().to(wide).contiguous()
    ref = None if ref is None else ref.to(x.dtype).contiguous()
    ref_sum = None if ref_sum is None else ref_sum.to(wide).contiguous()
    return x.contiguous(), ref, ref_sum, weight


def _number(name: str, value: float | Tensor, items: int, like: Tensor) -> tuple[float, Tensor | None]:
    """A number for all items, or a tensor (items,) float64 of one each."""
    if not isinstance(value, Tensor):
        return float(value), None
    if value.numel() == 1:
        value = value.reshape(1).expand(items)
    check_tensor(name, value, dtypes=(*NUMBERS, torch.float64), shape=(items,), like=like)
    return 0.0, value.detach().double().contiguous()


NUMBERS = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)

if _native.available():

    @torch.library.register_fake("finealign::sequence_loss_fwd")
    def _(logp, ref, ref_sum, mask, weight, cu_seqlens, average, pairs, phi, beta, scale, shift, shifts, a, each, sign):
        count, wide = cu_seqlens.shape[0] - 1, torch.promote_types(logp.dtype, torch.float32)
        items = count // 2 if pairs else count
        return tuple(logp.new_empty(size, dtype=wide) for size in (items, count, count, count))

    @torch.library.register_fake("finealign::sequence_loss_bwd")
    def _(upstream, slope, denominator, mask, weight, cu_seqlens, pairs, total, dtype):
        return slope.new_empty(total, dtype=dtype)

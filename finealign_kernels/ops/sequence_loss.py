"""Losses of whole sequences in one launch, and their gradient by token in another; losses/preference.py says which.

    h = Σ_t w_t (logp_t - ref_logp_t) / D          score; D = 1, Σ w_t ("kept") or the number of mask tokens ("all")
    m = beta (h_chosen - h_rejected) - shift       margin of a pair, or sign (beta h - shift) of a sequence by itself
    loss = scale · phi(m)                          back: dlogp_t = upstream · slope_s · w_t / D

It computes in one launch what the formulas and segment sums compute one after the other. Sums, margin and phi are
float64, in an order that depends on nothing but the sequence; each result is rounded once.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..formulas import margin
from . import _native
from ._check import check_one_of, check_tensor, fail
from ._layout import Tokens, TokenTensor, whole_like
from ._once import once

AVERAGES = {False: 0, "kept": 1, "all": 2}  # Average in csrc/launch.h
PAIRS = {None: 0, "halves": 1, "interleaved": 2}  # Pairs
MARGIN, BESIDE, SIDES = 0, 1, 2  # Form


class Code(NamedTuple):
    """A function of the margin that the kernels know."""

    number: int  # Phi in csrc/launch.h
    hyper: str | None = None  # the name of its constant
    default: float | None = None
    constant: Callable | None = None  # what the kernel takes in place of it


def _log_odds_against(smoothing: float | Tensor) -> float | Tensor:
    """log((1-ε)/ε)."""
    if isinstance(smoothing, Tensor):
        return -torch.logit(smoothing)
    return math.log1p(-smoothing) - math.log(smoothing)


CODES: dict[Callable, Code] = {
    margin.logistic: Code(0),
    margin.squared: Code(1, "center", 0.5),
    margin.hinge: Code(2),
    margin.smoothed: Code(3, "smoothing"),
    margin.robust: Code(4, "smoothing"),
    margin.bounded: Code(5),
    margin.linear: Code(6),
    margin.exo: Code(7, "smoothing", constant=_log_odds_against),
    margin.discovered: Code(8, "tau"),
    margin.rising: Code(9),
    margin.anchored: Code(10),
}


class SequenceLoss(NamedTuple):
    """losses carries the gradient; the others are detached. float32; float64 for float64 tokens."""

    losses: Tensor  # (S/2,) of pairs, (S,) of sequences
    score: Tensor  # (S,) h, in the order of the tokens; beta h is what is logged as a reward
    slope: Tensor  # (S,) d loss / d score


class BatchLoss(NamedTuple):
    """loss carries the gradient; the others are detached."""

    loss: Tensor  # () Σ losses / denominator
    losses: Tensor
    score: Tensor
    slope: Tensor


def over_count(total: Tensor, count: float | Tensor) -> Tensor:
    """total / count, in the dtype of total; where the count is a tensor of 0 (nothing in the whole step), 0 with a
    gradient of 0."""
    if not isinstance(count, Tensor):
        return total / count
    none = count == 0
    return (torch.where(none, 0, total) / torch.where(none, 1, count)).to(total.dtype)


def missing(phi: Callable, device: torch.device) -> str | None:
    """Why sequence_loss cannot run phi on a device; None where it can."""
    if phi not in CODES:
        return f"it has no kernel for {getattr(phi, '__name__', phi)!r}"
    return _native.missing(device)


def sequence_loss(
    tokens: Tokens,
    ref_logp: TokenTensor | None = None,
    *,
    phi: Callable = margin.logistic,
    chosen: Callable | None = None,
    positive: Callable | None = None,
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
    chosen        of pairs: a function without a constant of the chosen sequence's u = beta h - shift, added to phi
    positive      phi or one without a constant: the loss is positive(u) of a sequence whose sign is above 0, phi(-u) of
                  another; of a pair the mean of the two, the chosen sequence being the positive one
    beta, scale   numbers
    shift, hyper  numbers, or tensors with one number an item; constant
    sign          (S,), without pairs: multiplies the margin; constant
    token_weight  in the shapes of the tokens; constant
    average       False, "kept" or "all": what a score is divided by
    pairs         "halves", "interleaved", or None: every sequence is an item by itself

    An empty sequence has h = 0 and no gradient. Values at tokens that are masked or have weight 0 are ignored.
    Raises  ValueError, TypeError; RuntimeError with the reason where there is no kernel.
    """
    options = dict(phi=phi, chosen=chosen, positive=positive, beta=beta, shift=shift, scale=scale, sign=sign)
    options |= dict(token_weight=token_weight, average=average, pairs=pairs)
    return SequenceLoss(*_losses(tokens, ref_logp, None, **options, **hyper))


def batch_loss(
    tokens: Tokens, ref_logp: TokenTensor | None = None, *, denominator: float | Tensor, **options
) -> BatchLoss:
    """Σ losses / denominator of `sequence_loss`, with the same options: one autograd node instead of three.

    denominator   a number, or a tensor (); constant. A tensor of 0 gives 0, with a gradient of 0
    """
    return BatchLoss(*_losses(tokens, ref_logp, denominator, **options))


def item_losses(
    x: Tensor,
    *,
    phi: Callable,
    shift: float | Tensor = 0.0,
    sign: Tensor | None = None,
    **hyper: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """phi(sign (x - shift)) and its slope in x, (P,) each, of numbers x (P,) in one launch; without a graph."""
    code = CODES[phi]
    a, each = _constant(code, phi, hyper, x.shape[0], x)
    shift, shifts = _number("shift", shift, x.shape[0], x)
    if sign is not None:
        sign = _number("sign", sign, x.shape[0], x)[1]
    numbers = (0, PAIRS[None], MARGIN, code.number, code.number, 1.0, 1.0, shift, shifts, a, each, sign)
    losses, _, slope, _ = forward(x.detach()[:, None].contiguous(), None, None, None, None, None, *numbers)
    return losses, slope


def _losses(
    tokens,
    ref_logp,
    denominator,
    *,
    phi=margin.logistic,
    chosen=None,
    positive=None,
    beta,
    shift=0.0,
    scale=1.0,
    sign=None,
    token_weight=None,
    average=False,
    pairs="halves",
    **hyper,
) -> tuple[Tensor, ...]:
    """losses, score and slope; before them the loss where there is a denominator."""
    first = chosen or positive
    reason = missing(phi, tokens.whole.device) or (first and missing(first, tokens.whole.device))
    if reason:
        raise RuntimeError(f"sequence_loss cannot run: {reason}")
    check_one_of("pairs", pairs, tuple(PAIRS))
    check_one_of("average", average, tuple(AVERAGES))
    count = tokens.segments
    if pairs and count % 2:
        fail("logp", "hold an even number of sequences, chosen and rejected", count)
    if pairs and sign is not None:
        fail("sign", "be None for pairs", "a tensor")
    if chosen and (positive or not pairs):
        fail("chosen", "be None " + ("beside positive" if positive else "without pairs"), chosen.__name__)
    items = count // 2 if pairs else count
    code, other = CODES[phi], CODES[first or phi]
    if first and first is not phi and other.hyper:
        fail("chosen" if chosen else "positive", "be phi or take no constant", first.__name__)
    x, ref, ref_sum, weight = _inputs(tokens, ref_logp, token_weight, average)
    a, each = _constant(code, phi, hyper, items, x) if hyper or code.hyper else (0.0, None)
    shift, shifts = _number("shift", shift, items, x)
    if sign is not None:
        sign = _number("sign", sign, items, x)[1]
    form = BESIDE if chosen else SIDES if positive else MARGIN
    mask = tokens.whole_mask
    mask = mask if mask is None or mask.is_contiguous() else mask.contiguous()
    ends = tokens.ends if tokens.ends is None else tokens.ends.contiguous()
    numbers = (AVERAGES[average], PAIRS[pairs], form, code.number, other.number)
    numbers = (*numbers, beta, scale, shift, shifts, a, each, sign)
    losses, score, slope, divisor = forward(x.detach(), ref, ref_sum, mask, weight, ends, *numbers)
    if x.requires_grad and torch.is_grad_enabled():
        divisor = divisor if average else None
        carried = _FromTokens.apply(x, losses, slope, divisor, mask, weight, ends, PAIRS[pairs], denominator)
    else:
        carried = losses if denominator is None else over_count(losses.sum(), denominator)
    return (carried, score, slope) if denominator is None else (carried, losses, score, slope)


class _FromTokens(torch.autograd.Function):
    """Losses whose slopes are known, or their sum over a denominator; backward is upstream · slope · weight / D."""

    @staticmethod
    def forward(ctx, x, losses, slope, divisor, mask, weight, ends, pairs, denominator):
        ctx.pairs, ctx.size, ctx.dtype, ctx.items = pairs, x.shape[-1], x.dtype, losses.shape[0]
        ctx.number, tensor = (None, denominator) if isinstance(denominator, Tensor) else (denominator, None)
        ctx.save_for_backward(x, tensor, slope, divisor, mask, weight, ends)  # x is not read
        return losses.clone() if denominator is None else over_count(losses.sum(), denominator)

    @staticmethod
    def backward(ctx, upstream):
        x, tensor, slope, *given = ctx.saved_tensors
        each, denominator = upstream.detach(), ctx.number if tensor is None else tensor
        if denominator is not None:
            each = over_count(each, denominator).to(slope.dtype).expand(ctx.items)
        dlogp = backward(each, slope, *given, ctx.pairs, ctx.size, ctx.dtype)
        (dlogp,) = once("sequence_loss", (dlogp,), (x, upstream), instead="use torch's own arithmetic")
        return dlogp, None, None, None, None, None, None, None, None


def _inputs(tokens: Tokens, ref_logp, token_weight, average) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """logp, ref_logp of one dtype or its sums (S,), and token_weight in the dtype of the results, all contiguous."""
    x, ref, ref_sum, weight = tokens.whole, None, None, None
    if isinstance(ref_logp, Tensor) and tokens.shapes[0] != ref_logp.shape == (tokens.segments,):
        if token_weight is not None or average is not False:
            wanted = "hold a log-prob per token where token_weight or an average is used"
            fail("ref_logp", wanted, f"sums per sequence, shape {tuple(ref_logp.shape)}")
        check_tensor("ref_logp", ref_logp, like=x)
        ref_sum = ref_logp.detach()
    elif ref_logp is not None:
        ref = whole_like(ref_logp, tokens, "ref_logp").detach()
    either = x if ref is None and ref_sum is None else ref if ref is not None else ref_sum
    if either.dtype != x.dtype:
        x = x.to(torch.promote_types(x.dtype, either.dtype))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if token_weight is not None:
        weight = _dense(whole_like(token_weight, tokens, "token_weight").detach(), wide)
    return (
        x if x.is_contiguous() else x.contiguous(),
        None if ref is None else _dense(ref, x.dtype),
        None if ref_sum is None else _dense(ref_sum, wide),
        weight,
    )


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()


def _constant(code: Code, phi: Callable, hyper: dict, items: int, like: Tensor) -> tuple[float, Tensor | None]:
    """The constant of phi as its kernel takes it."""
    if set(hyper) - {code.hyper}:
        fail("hyper", f"be {code.hyper or 'nothing'} for {phi.__name__!r}", tuple(hyper), TypeError)
    a = hyper.get(code.hyper, code.default)
    if a is None:
        fail(code.hyper, f"be given for {phi.__name__!r}", None, TypeError)
    a, each = _number(code.hyper, a, items, like)
    if code.constant is None:
        return a, each
    return (code.constant(a), None) if each is None else (0.0, code.constant(each))


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
    forward = torch.ops.finealign.sequence_loss_fwd.default
    backward = torch.ops.finealign.sequence_loss_bwd.default

    @_native.fake("sequence_loss_fwd")
    def _(logp, ref, ref_sum, mask, weight, cu_seqlens, average, pairs, *numbers):
        count = logp.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        wide = torch.promote_types(logp.dtype, torch.float32)
        sizes = (count // 2 if pairs else count, count, count, count if average else 0)
        return tuple(logp.new_empty(size, dtype=wide) for size in sizes)

    @_native.fake("sequence_loss_bwd")
    def _(upstream, slope, denominator, mask, weight, cu_seqlens, pairs, size, dtype):
        return slope.new_empty((slope.shape[0], size) if cu_seqlens is None else (size,), dtype=dtype)

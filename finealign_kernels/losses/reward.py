"""Losses of a reward model on pairs of scores: a table with one row a loss, and its assembly.

    m = s d - δ,  d = r_chosen - r_rejected        s = -1 for a pair whose label is taken as wrong, else 1
    loss = (1-ε) phi(m) + ε phi(-m)  +  c (r_chosen + r_rejected)²

A row says where the margin δ, the smoothing ε and the sign s come from; the strength μ of a pair is the mean of d over
several reward models (`preference_strength`). Adding a loss is adding a row.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..formulas import margin as formula
from ..ops._check import LARGEST, check_bool, check_flags, check_number, check_one_of, check_tensor, fail, reads_values
from ..ops._layout import TokenTensor, warn_of_pairs
from ..ops._once import once, refuse_transforms
from ..ops.sequence_loss import item_losses, missing, over_count
from .pairs import PICKS, RankedPairs, pick_scores, plain_pair, score_pairs
from .reduce import plain_denominator, reduce, weigh
from .table import Formula, Hyper, _check_formula, check_hyper, hyper_of


class RewardRow(NamedTuple):
    """One loss: of the table by its name, or one of your own in place of a name."""

    equation: str  # with d, and the strength μ
    source: str
    margin: float | str = 0.0  # δ: a number, or "strength": μ. An argument `margin` takes its place
    smoothing: float | str = 0.0  # ε: a number, or "label": 1 - p. An argument `smoothing` takes its place
    weak: bool = False  # ε is 0 where μ >= 0
    flip: bool = False  # s = -1 where μ < 0. An argument `flip` takes its place
    phi: Formula = formula.smoothed  # any other phi(m, **hyper) -> value, slope has no smoothing
    hyper: dict[str, Hyper] = {}  # noqa: RUF012, read only

    def reads(self, margin, flip) -> bool:
        """Whether the loss needs the strength, with these arguments."""
        return (self.margin == "strength" and margin is None) or self.weak or (self.flip and flip is None)


_paper = "arXiv:2401.06080"

REWARD: dict[str, RewardRow] = {
    "bradley_terry": RewardRow("-log σ(d)", f"{_paper} eq. 2"),
    "margin": RewardRow("-log σ(d - δ), δ = margin = 1", "the margin of arXiv:2307.09288", margin=1.0),
    "adaptive_margin": RewardRow("-log σ(d - μ)", f"{_paper} eq. 6, inside the sigmoid", margin="strength"),
    "smoothing": RewardRow("-(1-ε) log σ(d) - ε log σ(-d), ε = smoothing = 0.1", f"{_paper} eq. 5", smoothing=0.1),
    "flip": RewardRow("-log σ(s d), s = -1 where μ < 0", f"{_paper}, label flipping", flip=True),
    "flip_margin": RewardRow(
        "-log σ(s d - |μ|), s = -1 where μ < 0", f"{_paper}; derived sign", margin="strength", flip=True
    ),
    "soft_label": RewardRow("smoothing where μ < 0, else -log σ(d)", f"{_paper}; derived", smoothing=0.1, weak=True),
    "soft_label_margin": RewardRow(
        "soft_label of d - μ", f"{_paper}; derived", margin="strength", smoothing=0.1, weak=True
    ),
    "soft_label_vote": RewardRow("-p log σ(d) - (1-p) log σ(-d), p = label", "derived", smoothing="label"),
    "log_exp": RewardRow("log(1 + e^-d) = -log σ(d), finite for any d", "OpenRLHF's LogExpLoss"),
    "floored": RewardRow(
        "-log(σ(d) + floor), floor = 1e-5: no slope for a badly wrong pair",
        "the code of arXiv:2401.06080",
        phi=formula.floored,
        hyper={"floor": Hyper(1e-5, lambda floor: floor > 0, "be above 0")},
    ),
}


class RewardLoss(NamedTuple):
    """loss carries the gradient; everything else is detached. (P,) over pairs."""

    loss: Tensor  # () or (P,) with reduction="none"
    losses: Tensor  # with the weight, and with the centering term
    margins: Tensor  # chosen - rejected, as given; 0 for a pair of weight 0
    accuracies: Tensor  # 1 where the chosen score is the larger one
    centering: Tensor  # (P,) c (chosen + rejected)², part of losses


def reward_loss(
    name: str | RewardRow,
    scores: TokenTensor,
    *,
    mask: TokenTensor | None = None,
    cu_seqlens: Tensor | None = None,
    pick: str = "last",
    token_weight: TokenTensor | None = None,
    pairs: str | RankedPairs = "halves",
    strength: Tensor | None = None,
    margin: float | Tensor | None = None,
    scale: float = 1.0,
    clamp: float | None = None,
    smoothing: float | Tensor | None = None,
    flip: Tensor | None = None,
    label: Tensor | None = None,
    weight: Tensor | None = None,
    centering: float = 0.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    **hyper: float,
) -> RewardLoss:
    """A named loss of pairs of scores, see REWARD: the mean over pairs of

        -(1-ε) log σ(m) - ε log σ(-m) + c (chosen + rejected)²,   m = s (chosen - rejected) - δ

    name      a key of REWARD, or a RewardRow of one's own
    scores    (S,) one a response, or a pair of (P,), chosen and rejected. Or token scores: (B, T) or a pair of them
              with mask, flat (N,) with cu_seqlens (S + 1,); see pick_scores
    pick, token_weight   how a response's score is taken from its tokens' scores: pick_scores
    pairs     "halves": all chosen, then all rejected; "interleaved"; or RankedPairs, k responses a prompt
    strength  (P,) finite, the mean difference of several reward models. Required by rows that use it, else refused
    margin    δ, a finite number or (P,), in place of the row's. δ = clamp(scale · margin, -clamp, clamp); where pairs
              are flipped its absolute value is taken for every pair
    smoothing ε, a number or (P,) in [0, 1], in place of the row's: how likely the label is wrong
    flip      (P,) bool: pairs whose label is taken as wrong, in place of the row's
    label     (P,) in [0, 1], p of "soft_label_vote": how likely the label is right
    weight    (P,) float, multiplies the loss of each pair; scores of a pair of weight 0 may be NaN
    centering c >= 0, draws scores towards 0 (TRL's center_rewards_coefficient)
    reduction "mean" over pairs, "sum" or "none"; denominator: a number or tensor to divide the sum by instead

    All but scores are constants. Values on a GPU are not read: an infinite margin is refused on a CPU alone.
    Returns RewardLoss, float32 (float64 for float64 scores); no pair at all gives 0, connected to the graph.
    Raises  ValueError, TypeError naming argument, expectation and finding.
    Source  arXiv:2401.06080 eq. 2, 5 and 6, whose margin is read as inside the sigmoid; the margin of a flipped pair,
            soft labels and weights are derived.
    """
    row = _row_of(name)
    hyper = hyper_of(name if isinstance(name, str) else "the row", row.hyper, hyper, reward_loss)
    check_one_of("pick", pick, PICKS)
    scale, centering = check_number("scale", scale, positive=True), check_number("centering", centering, least=0)
    clamp = clamp if clamp is None else check_number("clamp", clamp, positive=True)
    if not isinstance(pairs, RankedPairs):
        check_one_of("pairs", pairs, ("halves", "interleaved"))
    if isinstance(scores, (tuple, list)) and len(scores) == 2 and cu_seqlens is None and all(map(_is_flat, scores)):
        sources = plain_pair(scores, mask, token_weight)
    else:
        scores = pick_scores(scores, mask=mask, cu_seqlens=cu_seqlens, pick=pick, token_weight=token_weight)
        if isinstance(pairs, RankedPairs):
            sources = score_pairs(scores, pairs)
        else:
            refuse_transforms("scores", scores)
            sources = (scores,)
    together = len(sources) == 1  # chosen and rejected in one tensor, in the order of `pairs`
    chosen, rejected = score_pairs(scores.detach(), pairs) if together else (x.detach() for x in sources)
    count, dtype = chosen.shape[0], torch.promote_types(chosen.dtype, torch.float32)
    if chosen.dtype != dtype:
        chosen, rejected = chosen.to(dtype), rejected.to(dtype)

    def constant(name, x, **bounds):
        return None if x is None else _constant(name, x, count, chosen, dtype, **bounds)

    for key, value in (("strength", strength), ("label", label), ("weight", weight)):
        if value is not None:
            check_tensor(key, value)
    strength = constant("strength", strength)
    if row.reads(margin, flip) == (strength is None):
        wanted = "be given for" if strength is None else "be None for"
        fail("strength", f"{wanted} {name!r}", None if strength is None else "a tensor")
    if (row.smoothing == "label" and smoothing is None) == (label is None):
        fail("label", f"be {'given' if label is None else 'None'} for {name!r}", None if label is None else "a tensor")
    if smoothing is not None and row.phi is not formula.smoothed:
        fail("smoothing", f"be None for {name!r}", "smoothing")
    shift = constant("margin", margin)
    shift = strength if shift is None and row.margin == "strength" else row.margin if shift is None else shift
    shift = shift if scale == 1 else scale * shift
    if clamp is not None:
        shift = shift.clamp(-clamp, clamp) if isinstance(shift, Tensor) else max(-clamp, min(clamp, shift))
    elif scale != 1:
        _check_scaled(shift, scale)
    smoothing = constant("smoothing", smoothing, least=0, most=1)
    if smoothing is None:
        smoothing = 1 - constant("label", label, least=0, most=1) if row.smoothing == "label" else row.smoothing
    if row.weak:
        smoothing = smoothing * (strength < 0).to(dtype)
    if flip is not None:
        flip = check_flags("flip", flip, shape=(count,), like=chosen)
    elif row.flip:
        flip = strength < 0
    sign = None
    if flip is not None:
        shift, sign = abs(shift), 1 - 2 * flip.to(dtype)
    weight = constant("weight", weight)
    if weight is not None:
        warn_of_pairs("reward_loss", "weight", weight)
        kept = weight != 0
        chosen, rejected = torch.where(kept, chosen, 0), torch.where(kept, rejected, 0)

    d, center = chosen - rejected, None
    if row.phi is not formula.smoothed:
        losses, slope = row.phi((d if sign is None else sign * d) - shift, **hyper)
        slope = slope if sign is None else sign * slope
    elif _in_one_launch(d.device):
        own = shift if sign is None else sign * shift  # it stands inside the sign there
        losses, slope = item_losses(d, phi=row.phi, shift=own, sign=sign, smoothing=smoothing)
    else:
        m = d if sign is None else sign * d
        m = m - shift if isinstance(shift, Tensor) or shift else m
        exact = isinstance(smoothing, Tensor) or smoothing
        losses, slope = formula.smoothed(m, smoothing=smoothing) if exact else formula.logistic(m)
        slope = slope if sign is None else sign * slope
    slopes = (slope,)  # of the chosen scores; those of the rejected ones are the negative
    if centering:
        both = chosen + rejected
        center, pull = centering * both.square(), 2 * centering * both
        losses, slopes = losses + center, (pull + slope, pull - slope)
    if weight is not None:
        losses, slopes = weigh(weight, losses), tuple(weigh(weight, x) for x in slopes)
        center = center if center is None else weigh(weight, center)
    divisor = plain_denominator(reduction, denominator, count)
    loss = reduce(losses, reduction, denominator) if divisor is None else over_count(losses.sum(), divisor)
    if torch.is_grad_enabled() and any(x.requires_grad for x in sources):
        loss = _OfScores.apply(loss, divisor, pairs if together else None, len(slopes), *slopes, *sources)
    center = torch.zeros_like(d) if center is None else center
    return RewardLoss(loss, losses, d, (d > 0).to(dtype), center)


def _in_one_launch(device: torch.device) -> bool:
    """On a GPU the kernel of sequence_loss is one launch; on a CPU torch's vectorised functions are faster."""
    return device.type != "cpu" and missing(formula.smoothed, device) is None


class _OfScores(torch.autograd.Function):
    """A loss whose slopes (P,) are known: of the chosen scores, and of the rejected ones if not minus those.

    The scores are S that hold pairs, or the chosen and the rejected ones (pairs None).
    """

    @staticmethod
    def forward(ctx, loss, divisor, pairs, count, *tensors):
        ctx.pairs, ctx.count, ctx.number = pairs, count, None if isinstance(divisor, Tensor) else divisor
        ctx.save_for_backward(divisor if ctx.number is None else None, *tensors)  # scores are not read
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        divisor, *tensors = ctx.saved_tensors
        slopes, sources = tensors[: ctx.count], tensors[ctx.count :]
        each, divisor = upstream.detach(), ctx.number if divisor is None else divisor
        if divisor is not None:
            each = over_count(each, divisor)
        grads = [slope * each for slope in slopes]
        grads = [torch.where(each == 0, 0, grad) for grad in grads]  # what is not counted, whatever its slope
        up, down = grads if ctx.count == 2 else (grads[0], -grads[0])
        grads = (up, down) if ctx.pairs is None else (_join(up, down, ctx.pairs),)
        grads = tuple(grad.to(of.dtype) for grad, of in zip(grads, sources, strict=True))
        grads = once("reward_loss", grads, (*sources, upstream), instead="use torch's own arithmetic")
        return None, None, None, None, *(None for _ in slopes), *grads


def _join(chosen: Tensor, rejected: Tensor, pairs: str) -> Tensor:
    """(S,) of (P,) each, in the order of `pairs`."""
    return torch.cat((chosen, rejected)) if pairs == "halves" else torch.stack((chosen, rejected), 1).reshape(-1)


def _row_of(name: str | RewardRow) -> RewardRow:
    if isinstance(name, RewardRow):
        name = _checked(name)
        if name.phi is not formula.smoothed and not torch.compiler.is_compiling():
            if name.smoothing or name.weak:
                fail("RewardRow.smoothing", "be 0 for a phi of one's own", name.smoothing)
            _check_formula("phi", name.phi, tuple((key, one.default) for key, one in name.hyper.items()))
        return name
    if not isinstance(name, str) or name not in REWARD:
        fail("name", f"be a RewardRow or one of {tuple(REWARD)}", repr(name) if isinstance(name, str) else type(name))
    return REWARD[name]


def _checked(row: RewardRow) -> RewardRow:
    """A row of one's own with plain numbers; refuses columns of another type."""
    margin, smoothing = row.margin, row.smoothing
    if not (isinstance(margin, str) and margin == "strength"):
        margin = check_number("RewardRow.margin", margin)
    if not (isinstance(smoothing, str) and smoothing == "label"):
        smoothing = check_number("RewardRow.smoothing", smoothing, least=0, most=1)
    for part in ("weak", "flip"):
        check_bool(f"RewardRow.{part}", getattr(row, part))
    if not callable(row.phi):
        fail("RewardRow.phi", "be a function", repr(row.phi))
    check_hyper("RewardRow", row.hyper)
    return row._replace(margin=margin, smoothing=smoothing)


def _is_flat(x) -> bool:
    return isinstance(x, Tensor) and x.dim() == 1


def _constant(name: str, x, count: int, like: Tensor, dtype, *, least=None, most=None):
    """A finite number, or (P,) of them, detached. Values on a GPU are not read: that would be a host sync."""
    if not isinstance(x, Tensor):
        return check_number(name, x, least=least, most=most)
    check_tensor(name, x, shape=(count,), like=like)
    x = x.detach().to(dtype)
    if reads_values(x) and x.numel() and not _all_good(x, least, most):
        good = x.isfinite()
        good = good if least is None else good & (x >= least) & (x <= most)
        if not bool(good.all()):
            bounds = "" if least is None else f" in [{least}, {most}]"
            fail(name, f"hold finite numbers{bounds}", x[~good][0].item())
    return x


def _check_scaled(margin: float | Tensor, scale: float) -> None:
    """Refuses a scale that makes a margin too large for float32. Values on a GPU are not read."""
    if isinstance(margin, Tensor):
        overflows = reads_values(margin) and not (_all_good(margin, None, None) or bool(margin.isfinite().all()))
    else:
        overflows = abs(margin) > LARGEST
    if overflows:
        fail("scale", "leave every margin a finite number", scale)


def _all_good(x: Tensor, least, most) -> bool:
    """A quick look: infinities and NaN show in a sum and in the extremes. False is no verdict, finite sums overflow."""
    if least is None:
        return math.isfinite(x.sum().item())
    low, high = x.aminmax()
    return low.item() >= least and high.item() <= most

"""Losses of single responses with a target each (KTO, ...): the rows of `table` that need no pairs."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..formulas import margin
from ..ops._check import FLOATS, check_bool, check_number, check_one_of, check_tensor, fail, reads_values
from ..ops._layout import Tokens, TokenTensor, flatten, flatten_like, warn_of_tokens
from ..ops._warn import warn_once, warned
from ..ops.sequence_loss import batch_loss, sequence_loss
from .options import few_positions, short_form
from .preference import (
    FromScores,
    check_options,
    check_plain_reference,
    check_reference,
    flat_shift,
    number_or_tensor,
    response_scores,
    score_loss,
)
from .reduce import REDUCTIONS, has_tokens, plain_denominator, reduce, sequence_scores, sequence_weights, weigh
from .table import PREFERENCE, Row, describe, fused_functions, is_fused, row_of, scale_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import PointwiseOptions


class PointwiseLoss(NamedTuple):
    """loss carries the gradient; losses and rewards (S,) of the responses are detached."""

    loss: Tensor  # () or (S,) with reduction="none"
    losses: Tensor
    rewards: Tensor  # beta h


@few_positions
def pointwise_loss(
    name: str | Row,
    logp: TokenTensor,
    ref_logp: TokenTensor | None = None,
    *,
    target: Tensor,
    mask: TokenTensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_weight: TokenTensor | None = None,
    segment_ids: TokenTensor | None = None,
    average: bool | str | None = None,
    beta: float | None = None,
    shift: float | Tensor | None = None,
    positive_weight: float = 1.0,
    other_weight: float = 1.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    drop_empty: bool = False,
    **hyper,
) -> PointwiseLoss:
    """Loss of single responses from token log-probs; `PREFERENCE` lists the names with their equations.

        h = Σ_t w_t (logp_t - ref_logp_t),   u = beta h - shift,   loss = mean of L(u, target)

    target        (S,) bool or float: 1 for a response to be reinforced. Rows with a soft label take any number in
                  [0, 1], those that regress on it any number; to the others whatever is not exactly 1 is a negative
    shift         subtracted outside beta: beta z₀ for KTO, -c for point-wise DPO. A number or a tensor, () or (S,)
    positive_weight, other_weight  multiply the losses of responses with target 1 and of the others (KTO's λ);
                  0 leaves them out, even where they are NaN
    reduction     "mean" over responses, "sum", "none", or "class_mean": the mean over responses with target 1 plus the
                  mean over the others, 0 for a class that is absent
    denominator   divides the sum instead; with "class_mean" a tensor (2,), the numbers of positives and of others
    drop_empty    leave out responses without a token

    The other arguments are preference_loss's. Returns PointwiseLoss.
    Raises  ValueError, TypeError naming argument, expectation and finding.
    """
    row, hyper = row_of(name, hyper, pointwise_loss)
    if row.pair:
        known = tuple(n for n, r in PREFERENCE.items() if not r.pair)
        fail("name", f"be a Row with pair=False or one of {known}", describe(name))
    beta, shift, _, average = check_options(row, beta, shift, None, average, segment_ids)
    positive_weight = check_number("positive_weight", positive_weight)
    other_weight = check_number("other_weight", other_weight)
    if reduction not in (*REDUCTIONS, "class_mean"):
        fail("reduction", f"be one of {(*REDUCTIONS, 'class_mean')}", repr(reduction))
    check_bool("drop_empty", drop_empty)
    check_reference(name, row, ref_logp)

    tokens = flatten(logp, mask, cu_seqlens, name="logp")
    check_plain_reference(ref_logp)
    warn_of_tokens("pointwise_loss", tokens, token_weight)
    target = _targets(row, target, tokens)
    shift, positive = flat_shift(shift, tokens.segments, tokens), target == 1
    options = dict(token_weight=token_weight, average=average, beta=beta, shift=shift, **hyper)
    loss, weighted = None, positive_weight != 1 or other_weight != 1
    if average != "segments" and is_fused(row, tokens.whole.device):
        plain = None if weighted or drop_empty else plain_denominator(reduction, denominator, tokens.segments)
        loss, losses, score = _fused(row, tokens, ref_logp, target, plain, **options)
    else:
        losses, score = _composed(name, row, tokens, ref_logp, target, segment_ids=segment_ids, **options)
    if weighted:
        losses = weigh(torch.full_like(losses, other_weight).masked_fill(positive, positive_weight), losses)
    counted = has_tokens(tokens) if drop_empty else None
    if reduction == "class_mean":
        loss = _class_mean(losses, positive, counted, denominator)
    elif loss is None:
        loss = reduce(losses, reduction, denominator, counted)
    return PointwiseLoss(loss, losses.detach(), beta * score)


def _targets(row: Row, target, tokens: Tokens) -> Tensor:
    """(S,) in the dtype of the results."""
    check_tensor("target", target, dtypes=(torch.bool, *FLOATS), shape=(tokens.segments,), like=tokens.whole)
    if target.dtype != torch.bool and reads_values(target) and not bool(target.isfinite().all()):
        fail("target", "be finite", target[~target.isfinite()][0].item())
    target = target.detach().to(torch.promote_types(tokens.whole.dtype, torch.float32))
    if row.label == "soft" and reads_values(target) and not bool(((target >= 0) & (target <= 1)).all()):
        wrong = target[~((target >= 0) & (target <= 1))][0].item()
        fail("target", "lie in [0, 1] for a soft label", wrong)
    if row.label == "class" and reads_values(target) and not warned("soft targets"):
        soft = target[(target > 0) & (target < 1)]
        if len(soft):
            said = f"target {soft[0].item():g} counts as a negative: this loss takes 1 alone as a positive"
            warn_once("soft targets", said)
    return target


def _fused(row: Row, tokens: Tokens, ref_logp, target: Tensor, denominator, *, shift, **options):
    """Σ losses / denominator, where there is one, losses and scores (S,).

    The target is the sign of the margin, the noise of a label, or a part of the shift.
    """
    positive, functions = target == 1, fused_functions(row)
    if row.label == "soft":
        functions |= dict(phi=margin.smoothed, smoothing=1 - target)
    elif row.label == "value":
        shift = shift + (torch.where(positive, 0, target) if row.positive else target)
    if row.label == "class" or row.positive:
        functions["sign"] = torch.where(positive, 1.0, 0 * target - 1)  # a NaN stays
    scale = scale_of(row, options["beta"])
    options |= dict(shift=shift, scale=scale, pairs=None, **functions)
    if denominator is None:
        out = sequence_loss(tokens, ref_logp, **options)
        return None, out.losses, out.score
    return batch_loss(tokens, ref_logp, denominator=denominator, **options)[:3]


def _composed(name, row: Row, tokens: Tokens, ref_logp, target, *, token_weight, average, segment_ids, **options):
    """The same of any row, from the small ops."""
    if token_weight is not None:
        token_weight = flatten_like(token_weight, tokens, "token_weight").detach()
    weight = sequence_weights(token_weight, tokens, average, segment_ids)
    score = response_scores(tokens, ref_logp, weight, whole=token_weight is None and average is False)
    policy = sequence_scores(tokens.x.detach(), weight, tokens) if row.positive == "nll" else None
    target = target.to(score.dtype)
    losses, slope = score_loss(name, score.detach(), target=target, policy=policy, **options)
    losses, slope = losses.to(score.dtype), slope.to(score.dtype)  # a shift decides no dtype
    return FromScores.apply(score, losses, slope), score.detach()


def _class_mean(losses: Tensor, positive: Tensor, counted: Tensor | None, counts) -> Tensor:
    """Mean over the positives plus mean over the others, each 0 where there is none."""
    classes = [positive, ~positive] if counted is None else [positive & counted, ~positive & counted]
    if counts is None:
        counts = [inside.sum().clamp(min=1) for inside in classes]
    else:
        check_tensor("denominator", counts, dtypes=(*FLOATS, torch.int32, torch.int64), shape=(2,), like=losses)
    return sum(reduce(losses, "sum", count, inside) for inside, count in zip(classes, counts, strict=True))


@short_form(pointwise_loss, "shift", "positive_weight", "other_weight")
def kto(
    logp: TokenTensor,
    ref_logp: TokenTensor,
    target: Tensor,
    *,
    z0: float | Tensor = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    **options: "Unpack[PointwiseOptions]",
) -> PointwiseLoss:
    """Kahneman-Tversky Optimization of single responses, arXiv:2402.01306. With h = Σ_t w_t (logp_t - ref_logp_t)

        1 - σ(beta (h - z0)) for desirable responses, 1 - σ(beta (z0 - h)) for the others,   beta = 0.1

    logp, ref_logp  (S, T) with mask, a response a row
    target          (S,) bool: True for desirable responses
    z0              the batch's estimate of the divergence from the reference, made from mismatched prompts and
                    responses, averaged over the ranks like h. A number or a tensor; a negative one counts as 0
    desirable_weight, undesirable_weight  multiply the losses of the two classes, the paper's λ
    Keyword arguments and errors: pointwise_loss.
    """
    beta = PREFERENCE["kto"].beta if options.get("beta") is None else options["beta"]
    beta = check_number("beta", beta, positive=True)
    z0 = number_or_tensor("z0", z0)
    z0 = _wide(z0).detach().clamp(min=0) if isinstance(z0, Tensor) else max(0.0, z0)
    weights = dict(
        positive_weight=check_number("desirable_weight", desirable_weight),
        other_weight=check_number("undesirable_weight", undesirable_weight),
    )
    return pointwise_loss("kto", logp, ref_logp, target=target, shift=beta * z0, **weights, **options)


@short_form(pointwise_loss, "shift")
def pdpo(
    logp: TokenTensor,
    ref_logp: TokenTensor,
    target: Tensor,
    *,
    kind: str = "binary",
    c: float | Tensor = 0.0,
    **options: "Unpack[PointwiseOptions]",
) -> PointwiseLoss:
    """Point-wise DPO of single responses, arXiv:2312.02554. With u = beta Σ_t w_t (logp_t - ref_logp_t) + c

        kind "binary"   -log σ(u) where target is 1, else -log σ(-u)
        kind "soft"     -target log σ(u) - (1 - target) log σ(-u), target in [0, 1]
        kind "squared"  (target - u)²
        kind "hybrid"   -log σ(u) where target is 1, else (target - u)²

    logp, ref_logp  (S, T) with mask, a response a row
    target          (S,) bool or float
    c               estimate of beta log Z of the prompt, a number or a tensor, () or (S,)
    The paper's code uses average="kept" and reduction="class_mean". Keyword arguments and errors: pointwise_loss.
    """
    rows = {"binary": "pdpo", "soft": "pdpo_soft", "squared": "pdpo_squared", "hybrid": "pdpo_hybrid"}
    return pointwise_loss(_row(kind, rows), logp, ref_logp, target=target, shift=_minus(c), **options)


@short_form(pointwise_loss, "shift")
def ulma(
    logp: TokenTensor,
    ref_logp: TokenTensor,
    target: Tensor,
    *,
    kind: str = "binary",
    c: float | Tensor = 0.0,
    **options: "Unpack[PointwiseOptions]",
) -> PointwiseLoss:
    """ULMA of single responses, arXiv:2312.02554: supervised learning of demonstrations, point-wise DPO of the others.

        where target is 1  -Σ_t w_t logp_t
        elsewhere          kind "binary": -log σ(-u), kind "squared": (target - u)²

    with u = beta Σ_t w_t (logp_t - ref_logp_t) + c.

    logp, ref_logp  (S, T) with mask, a response a row
    target          (S,) bool or float: exactly 1 for a demonstration
    c               estimate of beta log Z of the prompt, a number or a tensor, () or (S,)
    The paper's code uses average="kept" and reduction="class_mean". Keyword arguments and errors: pointwise_loss.
    """
    rows = {"binary": "ulma", "squared": "ulma_squared"}
    return pointwise_loss(_row(kind, rows), logp, ref_logp, target=target, shift=_minus(c), **options)


@short_form(pointwise_loss)
def unlikelihood(logp: TokenTensor, target: Tensor, **options: "Unpack[PointwiseOptions]") -> PointwiseLoss:
    """Likelihood of good responses, unlikelihood of bad ones, from the code of arXiv:2312.02554:

        -(mean logp) where target is 1, +(mean logp) elsewhere

    logp is (S, T) with mask, a response a row; target is (S,) bool or float. The loss is unbounded below.
    Keyword arguments and errors: pointwise_loss.
    """
    return pointwise_loss("unlikelihood", logp, target=target, **options)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _minus(c: float | Tensor) -> float | Tensor:
    return -number_or_tensor("c", c)


def _row(kind: str, rows: dict[str, str]) -> str:
    check_one_of("kind", kind, tuple(rows))
    return rows[kind]

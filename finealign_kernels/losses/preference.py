"""Preference losses: a table of scalar functions, and their assembly from token log-probs.

    h = Σ_t w_t m_t (logp_t - ref_logp_t)        score of a response; ref_logp = 0 for a loss without reference
    m = beta (h_chosen - h_rejected) - shift     margin of a pair
    loss = scale · phi(m)

A loss is a row: phi with its slope, how its margin is formed, where it comes from. Adding one is adding a row.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..formulas import margin
from ..ops._check import check_tensor, fail
from ..ops._layout import Tokens, TokenTensor, flatten, flatten_like
from ..ops.segments import segment_sum
from .reduce import check_average, reduce, sequence_scores, sequence_weights


class Row(NamedTuple):
    """One loss of the table."""

    phi: Callable[..., tuple[Tensor, Tensor]]  # margin -> value, slope
    equation: str  # with m = beta Δ - shift, Δ = h_chosen - h_rejected
    source: str
    beta: float = 0.1
    shift: float = 0.0
    average: bool | str = False  # the length average it is defined with
    reference: bool = True  # reads ref_logp
    scale: Callable[[float], float] = lambda beta: 1.0
    derived: str = "averaged form"  # what is not in the source


PREFERENCE: dict[str, Row] = {
    "dpo": Row(margin.logistic, "-log σ(m)", "arXiv:2305.18290 eq. 7; averaged: arXiv:2406.19188"),
    "ipo": Row(
        margin.squared,
        "(Δ - 1/(2 beta))² = (m - ½)² / beta²",
        "arXiv:2310.12036 eq. 17",
        scale=lambda beta: beta**-2,
    ),
    "ipo_z": Row(margin.squared, "(m - ½)²", "arXiv:2402.05749, the squared f", derived="scaling of IPO by beta²"),
    "simpo": Row(
        margin.logistic,
        "-log σ(m), h = mean logp",
        "arXiv:2405.14734 eq. 6",
        beta=2.0,
        shift=1.0,
        average="kept",
        reference=False,
        derived="summed form",
    ),
}


class PreferenceLoss(NamedTuple):
    """loss carries the gradient; everything else is detached. (P,) over pairs."""

    loss: Tensor  # () or (P,) with reduction="none"
    losses: Tensor
    chosen_rewards: Tensor  # beta h of the chosen response
    rejected_rewards: Tensor
    margins: Tensor  # chosen_rewards - rejected_rewards
    accuracies: Tensor  # 1 where the chosen reward is the larger one


def score_loss(name: str, score: Tensor, *, beta: float, shift: float = 0.0, **hyper) -> tuple[Tensor, Tensor]:
    """Loss of each pair (P,) and its gradient with respect to score (2P,), nats: chosen first, then rejected."""
    row = PREFERENCE[name]
    chosen, rejected = score.chunk(2)
    value, slope = row.phi(beta * (chosen - rejected) - shift, **hyper)
    scale = row.scale(beta)
    slope = beta * scale * slope
    return scale * value, torch.cat([slope, -slope])


def preference_loss(
    name: str,
    logp: TokenTensor,
    ref_logp: TokenTensor | None = None,
    *,
    mask: TokenTensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_weight: TokenTensor | None = None,
    average: bool | str | None = None,
    beta: float | None = None,
    shift: float | None = None,
    pairs: str = "halves",
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    drop_empty: bool = False,
    **hyper,
) -> PreferenceLoss:
    """Preference loss of pairs of responses from token log-probs; `PREFERENCE` lists the names with their equations.

        h = Σ_t w_t (logp_t - ref_logp_t),   m = beta (h_chosen - h_rejected) - shift,   loss = mean of phi(m)

    logp          (2B, T) with mask; or flat (N,) with cu_seqlens (2B + 1,); or a pair (B, T⁺), (B, T⁻). float, nats
    ref_logp      as logp, of the frozen reference; or (2B,) sums of whole responses, without weights and average.
                  Required by rows with a reference, refused by the others
    mask          as logp, bool: is the token read. What stands elsewhere (NaN, inf) reaches neither value nor gradient
    token_weight  as logp, float: how much a token counts, in policy and reference alike; default 1
    average       False: h is the weighted sum; "kept": divided by Σ token_weight; "all": by the number of mask tokens;
                  None: as the loss is defined
    beta, shift   None: the row's default. shift is subtracted outside beta (SimPO's γ)
    pairs         "halves": all chosen, then all rejected; "interleaved": chosen, rejected, chosen, ...
    reduction     "mean" over pairs, "sum" or "none"; denominator: a number or tensor to divide the sum by instead
    drop_empty    leave out pairs of which neither response has a token, from numerator and denominator

    Returns PreferenceLoss. An empty response has h = 0 and no gradient; no pair at all gives 0, connected to the graph.
    Raises  ValueError, TypeError naming argument, expectation and finding.
    """
    if name not in PREFERENCE:
        fail("name", f"be one of {tuple(PREFERENCE)}", repr(name))
    row = PREFERENCE[name]
    beta = row.beta if beta is None else beta
    shift = row.shift if shift is None else shift
    _check_number("beta", beta, positive=True)
    _check_number("shift", shift)
    average = row.average if average is None else average
    check_average(average)
    if pairs not in ("halves", "interleaved"):
        fail("pairs", "be 'halves' or 'interleaved'", repr(pairs))
    if isinstance(logp, (tuple, list)) and pairs != "halves":
        fail("pairs", "be 'halves' for a pair (chosen, rejected) of tensors", repr(pairs))
    if row.reference and ref_logp is None:
        fail("ref_logp", f"be given for {name!r} (zeros for a loss without reference)", "None")
    if not row.reference and ref_logp is not None:
        fail("ref_logp", f"be None: {name!r} has no reference", f"a {type(ref_logp).__name__}")

    tokens = flatten(logp, mask, cu_seqlens, name="logp")
    if tokens.segments % 2:
        fail("logp", "hold an even number of sequences, chosen and rejected", tokens.segments)
    score = response_scores(tokens, ref_logp, token_weight, average)
    if pairs == "interleaved":
        score = torch.cat([score[0::2], score[1::2]])
    counted = _not_empty(tokens, pairs) if drop_empty else None

    losses = _FromScores.apply(score, *score_loss(name, score.detach(), beta=beta, shift=shift, **hyper))
    chosen, rejected = (beta * score.detach()).chunk(2)
    return PreferenceLoss(
        loss=reduce(losses, reduction, denominator, counted),
        losses=losses.detach(),
        chosen_rewards=chosen,
        rejected_rewards=rejected,
        margins=chosen - rejected,
        accuracies=(chosen > rejected).to(score.dtype),
    )


def response_scores(tokens: Tokens, ref_logp, token_weight, average) -> Tensor:
    """h of each sequence (S,): weighted sum or average of logp - ref_logp over its mask."""
    per_sequence = isinstance(ref_logp, Tensor) and tokens.shapes[0] != ref_logp.shape == (tokens.segments,)
    if per_sequence and (token_weight is not None or average is not False):
        wanted = "hold a log-prob per token where token_weight or an average is used"
        fail("ref_logp", wanted, f"sums per sequence, shape {tuple(ref_logp.shape)}")
    if token_weight is not None:
        token_weight = flatten_like(token_weight, tokens, "token_weight").detach()
    weight = sequence_weights(token_weight, tokens, average)
    if ref_logp is None:
        return sequence_scores(tokens.x, weight, tokens)
    if per_sequence:
        check_tensor("ref_logp", ref_logp, like=tokens.x)
        return sequence_scores(tokens.x, weight, tokens) - ref_logp.detach()
    return sequence_scores(tokens.x - flatten_like(ref_logp, tokens, "ref_logp").detach(), weight, tokens)


def _not_empty(tokens: Tokens, pairs: str) -> Tensor:
    """Pairs (P,) of which a response has a token."""
    count = segment_sum(torch.ones_like(tokens.x), tokens.cu_seqlens, mask=tokens.mask)
    chosen, rejected = count.chunk(2) if pairs == "halves" else (count[0::2], count[1::2])
    return (chosen > 0) | (rejected > 0)


class _FromScores(torch.autograd.Function):
    """Losses of scores whose slopes are known: backward is upstream times slope, for any upstream gradient per pair."""

    @staticmethod
    def forward(ctx, score, losses, slope):
        ctx.save_for_backward(slope)
        return losses.clone()

    @staticmethod
    def backward(ctx, upstream):
        (slope,) = ctx.saved_tensors
        # a pair that is not counted has upstream 0, whatever its slope
        both = torch.cat([upstream, upstream])
        return torch.where(both == 0, 0, both * slope), None, None


def dpo(logp, ref_logp, **options) -> PreferenceLoss:
    """-log σ(beta (h_chosen - h_rejected)), arXiv:2305.18290 eq. 7. Arguments: preference_loss."""
    return preference_loss("dpo", logp, ref_logp, **options)


def ipo(logp, ref_logp, *, scaling: str = "delta", **options) -> PreferenceLoss:
    """Identity Preference Optimization, arXiv:2310.12036 eq. 17. Arguments: preference_loss.

    scaling "delta": (Δ - 1/(2 beta))², as libraries have it; "z": (beta Δ - ½)², beta² times that.
    """
    if scaling not in ("delta", "z"):
        fail("scaling", "be 'delta' or 'z'", repr(scaling))
    return preference_loss("ipo" if scaling == "delta" else "ipo_z", logp, ref_logp, **options)


def simpo(logp, *, gamma: float = 1.0, **options) -> PreferenceLoss:
    """-log σ(beta (mean logp_chosen - mean logp_rejected) - gamma), arXiv:2405.14734 eq. 6. See preference_loss."""
    return preference_loss("simpo", logp, shift=gamma, **options)


def _check_number(name, value, positive=False) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
    if not good or (positive and value <= 0):
        fail(name, "be a finite number" + (" > 0" if positive else ""), repr(value))

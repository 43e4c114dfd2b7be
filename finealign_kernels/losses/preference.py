"""Preference losses of pairs: assembly of the rows of `table` from token log-probs.

    h = Σ_t w_t m_t (logp_t - ref_logp_t)        score of a response; ref_logp = 0 for a loss without reference
    m = beta (h_chosen - h_rejected) - shift     margin of a pair
    loss = scale · phi(m) + NLL of the chosen responses, for a row that has one

A loss is a row: phi with its slope, how its margin is formed, where it comes from. Adding one is adding a row.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..ops._check import FLOATS, check_bool, check_number, check_one_of, check_plain, check_tensor, fail
from ..ops._layout import Tokens, TokenTensor, flatten, flatten_like, warn_of_pairs, warn_of_tokens
from ..ops._once import once
from ..ops.segments import segment_sum
from ..ops.sequence_loss import batch_loss, over_count, sequence_loss
from .options import Sums, few_positions, short_form
from .reduce import (
    check_average,
    check_denominator,
    has_tokens,
    plain_denominator,
    reduce,
    sequence_scores,
    sequence_weights,
    weigh,
    wide_of,
)
from .table import (
    DIVERGENCE,
    PREFERENCE,
    Hyper,
    Row,
    describe,
    fused_functions,
    is_fused,
    row_of,
    scale_of,
    score_transform,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import PreferenceOptions

__all__ = ["PREFERENCE", "Hyper", "PreferenceLoss", "Row", "preference_loss", "score_loss"]


class PreferenceLoss(NamedTuple):
    """loss carries the gradient; everything else is detached. (P,) over pairs."""

    loss: Tensor  # () or (P,) with reduction="none": losses, reduced, and nll_weight · nll
    losses: Tensor
    chosen_rewards: Tensor  # beta h of the chosen response
    rejected_rewards: Tensor
    margins: Tensor  # beta (h_chosen - h_rejected): chosen_rewards - rejected_rewards, also where these overflow
    accuracies: Tensor  # 1 where h of the chosen response is the larger one, also where both rewards overflow
    nll: Tensor  # the NLL term of the chosen responses, as reduced; 0 where there is none


def score_loss(
    name: str | Row,
    score: Tensor,
    *,
    beta: float,
    shift: float | Tensor = 0.0,
    scale: float | None = None,
    target: Tensor | None = None,
    policy: Tensor | None = None,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
    **hyper,
) -> tuple[Tensor, Tensor]:
    """Loss of each item and its gradient with respect to score (S,), nats.

    Without target an item is a pair: all chosen, then all rejected, losses (S / 2,). With target (S,) an item is a
    response of a row that has a label, u = beta h - shift, and an s of 1 makes it a positive one:

        label "class"  phi(u) where s = 1, else phi(-u)      of a pair: the mean of chosen (s = 1) and rejected (s = 0)
        label "soft"   s phi(u) + (1 - s) phi(-u)
        label "value"  phi(u - s)

    policy (S,), default score, is what a positive's NLL is read from where the score has a reference.
    """
    row, hyper = row_of(name, hyper)
    transform = score_transform(name, row, divergence, alpha)
    h, stretch = transform(score) if transform else (score, 1)
    scale = scale_of(row, beta) if scale is None else scale
    if row.label is not None:
        return _labelled_loss(row, score if policy is None else policy, beta, h, shift, scale, target, hyper)
    chosen, rejected = h.chunk(2)
    value, slope = row.phi(beta * (chosen - rejected) - shift, **hyper)
    slope = beta * scale * slope
    slopes = torch.cat([slope, -slope])
    if row.chosen is not None:
        more, steeper = row.chosen(beta * chosen - shift)
        value, slopes[: len(slope)] = value + more, slope + beta * scale * steeper
    # where the slope of phi is 0, so is the gradient, also beside an infinite slope of the transform
    return scale * value, torch.where(slopes == 0, slopes, slopes * stretch) if transform else slopes


def _labelled_loss(row, policy, beta, score, shift, scale, target, hyper):
    paired = target is None
    if paired:
        target = torch.ones_like(score)
        target[len(score) // 2 :] = 0
    positive = target == 1
    if row.label == "value":
        value, slope = row.phi(beta * score - shift - target, **hyper)
    else:
        s = target if row.label == "soft" else torch.where(positive, 1, 0 * target)  # a NaN stays
        up, down = (row.phi(sign * (beta * score - shift), **hyper) for sign in (1, -1))
        value = torch.where(s == 1, up[0], torch.where(s == 0, down[0], s * up[0] + (1 - s) * down[0]))
        slope = torch.where(s == 1, up[1], torch.where(s == 0, -down[1], s * up[1] - (1 - s) * down[1]))
    value, slope = scale * value, beta * scale * slope
    if row.positive == "nll":
        value, slope = torch.where(positive, -policy, value), torch.where(positive, -1, slope)
    elif row.positive is not None:
        own = row.positive(beta * score - shift)
        value = torch.where(positive, scale * own[0], value)
        slope = torch.where(positive, beta * scale * own[1], slope)
    return (value.view(2, -1).mean(0), slope / 2) if paired else (value, slope)


@few_positions
def preference_loss(
    name: str | Row,
    logp: TokenTensor,
    ref_logp: TokenTensor | None = None,
    *,
    mask: TokenTensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_weight: TokenTensor | None = None,
    segment_ids: TokenTensor | None = None,
    average: bool | str | None = None,
    beta: float | None = None,
    shift: float | Tensor | None = None,
    scale: float | None = None,
    nll: str | None = None,
    nll_weight: float | None = None,
    nll_denominator: float | Tensor | None = None,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
    pair_weight: Tensor | None = None,
    pairs: str = "halves",
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    drop_empty: bool = False,
    **hyper,
) -> PreferenceLoss:
    """Preference loss of pairs of responses from token log-probs; `PREFERENCE` lists the names with their equations.

    A loss of one's own is a Row(phi, equation, source, ...) in place of a name: phi(m) gives value and slope.

        h = Σ_t w_t (logp_t - ref_logp_t),   m = beta (h_chosen - h_rejected) - shift,   loss = mean of phi(m)

    logp          (2B, T) with mask; or flat (N,) with cu_seqlens (2B + 1,); or a pair (B, T⁺), (B, T⁻). float, nats
                  By position also TRL's four sums of whole responses, (B,) each: chosen, rejected, reference's chosen,
                  reference's rejected; where nothing counts tokens (no average, no NLL, no weights)
    ref_logp      as logp, of the frozen reference; or (2B,) sums of whole responses, without weights and average.
                  Required by rows with a reference, refused by the others
    mask          as logp, bool (or ints, 0 and 1): True for response tokens; others may hold NaN
    token_weight  as logp, float: how much a token counts, in policy and reference alike; default 1
    segment_ids   as logp, int: the segment of each token, not decreasing in a response, -1 for none
    average       False: h is the weighted sum; "kept": divided by Σ token_weight; "all": by the number of mask tokens;
                  "segments": the mean of segment means; None: as the loss is defined
    beta, shift   None: the row's default. shift is subtracted outside beta (SimPO's γ); it may be a tensor, () or (P,)
    scale         multiplies phi; None: the row's own (ORPO's λ)
    nll           NLL of the chosen responses, added: "sequence", a mean over pairs of each response's own average, or
                  "token", one mean over the batch's chosen tokens: Σ w (-logp) / Σ w (average "all": / mask tokens)
    nll_weight    weight of that term; None: 1 for a row that has the term (CPO's α), 0 for the others
    nll_denominator  a number or tensor to divide the sum over tokens by instead (a global count); needed with a
                  denominator, which counts pairs
    divergence    from the reference, for losses of the difference of two log-ratios: h becomes g(h), after its average:
                  "reverse_kl" h, "forward_kl" 1 - e^-h, "js" log 2 + log σ(h), "alpha" (e^((α-1)h) - 1) / (α-1)
    pair_weight   (P,) float, multiplies the loss of each pair (WPO: wpo_weights); a constant. 0 leaves a NaN out
    pairs         "halves": all chosen, then all rejected; "interleaved": chosen, rejected, chosen, ...
    reduction     "mean" over pairs, "sum" or "none" (the NLL over tokens then comes as shares that add up to it);
                  denominator: a number or tensor to divide the sum over pairs by instead
    drop_empty    leave out pairs of which neither response has a token, from numerator and denominator
    hyper         numbers the row takes, `PREFERENCE[name].hyper`: smoothing, ...

    A log-prob of -inf, or a sum beyond float32, makes a margin infinite: loss and gradient are then the limits of the
    formula, which may be infinite. Where both scores of a pair are the same infinity, or a token is -inf in policy and
    reference alike, there is no limit and the loss is NaN, unless a weight of 0 leaves it out.

    A row of single responses (KTO, ...) takes a pair as a desirable and an undesirable one, with the mean of their
    losses. Returns PreferenceLoss. An empty response has h = 0 and no gradient; no pair at all gives 0, connected to
    the graph.
    Raises  ValueError, TypeError naming argument, expectation and finding.
    """
    row, hyper = row_of(name, hyper, preference_loss)
    beta, shift, scale, average = check_options(row, beta, shift, scale, average, segment_ids)
    if pairs not in ("halves", "interleaved"):
        fail("pairs", "be 'halves' or 'interleaved'", repr(pairs))
    if isinstance(logp, (tuple, list)) and pairs != "halves":
        fail("pairs", "be 'halves' for a pair (chosen, rejected) of tensors", repr(pairs))
    check_reference(name, row, ref_logp)
    nll_weight = (1.0 if row.nll else 0.0) if nll_weight is None else nll_weight
    nll = (row.nll or "token") if nll is None else nll
    nll_weight = check_number("nll_weight", nll_weight)
    if isinstance(logp, Sums) and (average or nll_weight):
        what = "an NLL" if nll_weight else f"average={average!r}"
        fail(
            "logp", f"hold log-probs of tokens for {describe(name)} with {what}, which count them", "sums of responses"
        )
    if nll not in ("sequence", "token"):
        fail("nll", "be 'sequence' or 'token'", repr(nll))
    if nll_denominator is not None and (nll != "token" or not nll_weight):
        fail("nll_denominator", "be None but for an NLL over tokens", repr(nll_denominator))
    if denominator is not None and nll_denominator is None and nll == "token" and nll_weight:
        wanted = "be given with a denominator of pairs: the chosen tokens that the step's NLL is divided by"
        fail("nll_denominator", wanted, None)
    check_bool("drop_empty", drop_empty)
    check_one_of("divergence", divergence, tuple(DIVERGENCE))
    alpha = check_number("alpha", alpha)
    if row.match and drop_empty:
        fail("drop_empty", f"be False for {describe(name)}, which matches pairs across the batch", drop_empty)

    tokens = flatten(logp, mask, cu_seqlens, name="logp")
    check_plain_reference(ref_logp)
    warn_of_tokens("preference_loss", tokens, token_weight)
    if tokens.segments % 2:
        fail("logp", "hold an even number of sequences, chosen and rejected", tokens.segments)
    if nll_weight:  # two gradients meet at the tokens: they are added before one of them is rounded to a half
        tokens = tokens.widened()
    shift = flat_shift(shift, tokens.segments // 2, tokens)
    fused = divergence == "reverse_kl" and average != "segments" and row.label != "value"
    fused = fused and is_fused(row, tokens.whole.device)
    flat_weight = weight = None
    if not fused or nll_weight:
        if token_weight is not None:
            flat_weight = flatten_like(token_weight, tokens, "token_weight").detach()
        weight = sequence_weights(flat_weight, tokens, average, segment_ids)
    loss, counted = None, _not_empty(tokens, pairs) if drop_empty else None
    if fused:
        options = dict(beta=beta, shift=shift, scale=scale_of(row, beta) if scale is None else scale, **hyper)
        options |= dict(token_weight=token_weight, average=average, pairs=pairs, **fused_functions(row))
        if row.label:
            options.setdefault("positive", options["phi"])
        plain = None
        if pair_weight is None and not drop_empty:
            plain = plain_denominator(reduction, denominator, tokens.segments // 2)
        if plain is None:
            out = sequence_loss(tokens, ref_logp, **options)
        else:
            out = batch_loss(tokens, ref_logp, denominator=plain, **options)
            loss = out.loss
        losses, score = out.losses, _halves(out.score, pairs)
    else:
        whole = token_weight is None and average is False
        score = _halves(response_scores(tokens, ref_logp, weight, whole=whole), pairs)
        options = dict(beta=beta, shift=shift, scale=scale, divergence=divergence, alpha=alpha, **hyper)
        losses = _losses_of_scores(name, row, score, tokens, ref_logp, weight, pairs, options)
    if pair_weight is not None:
        check_tensor("pair_weight", pair_weight, shape=losses.shape, like=losses)
        warn_of_pairs("preference_loss", "pair_weight", pair_weight)
        losses = weigh(pair_weight.detach().to(losses.dtype), losses)
    if loss is None:
        loss = reduce(losses, reduction, denominator, counted)
    if nll_weight:
        term = _chosen_nll(tokens, flat_weight, weight, average, nll, pairs, nll_denominator)
        if nll == "sequence":
            term = reduce(term, reduction, denominator, counted)
        elif reduction != "none":
            term = term.sum()
        loss = loss + nll_weight * term
    else:
        term = torch.zeros_like(loss)
    score = score.detach()
    chosen, rejected = (beta * score).chunk(2)
    return PreferenceLoss(
        loss=loss,
        losses=losses.detach(),
        chosen_rewards=chosen,
        rejected_rewards=rejected,
        margins=beta * torch.sub(*score.chunk(2)),
        accuracies=torch.gt(*score.chunk(2)).to(score.dtype),
        nll=term.detach(),
    )


def _losses_of_scores(name, row: Row, score, tokens: Tokens, ref_logp, weight, pairs: str, options) -> Tensor:
    """(P,) from scores, for any row: what is re-matched across the batch, what single responses have of their own."""
    shift, beta, policy, met, values = options["shift"], options["beta"], None, score, score.detach()
    if row.positive == "nll":
        policy = _halves(sequence_scores(tokens.x.detach(), weight, tokens), pairs)
    if row.label is not None and isinstance(shift, Tensor) and shift.dim():
        shift = torch.cat([shift, shift])
    if row.match == "rejected":
        met = _match_rejected(score)
        values = met.detach()
    elif row.match == "reference":
        reference = _halves(_reference_scores(tokens, ref_logp, weight), pairs)
        own = _halves(sequence_scores(tokens.x.detach(), weight, tokens), pairs)
        values, offset = _rank_offset(score.detach(), reference, own)
        shift = shift + beta * offset
    losses, slope = score_loss(name, values, policy=policy, **{**options, "shift": shift})
    return FromScores.apply(met, losses.to(score.dtype), slope.to(score.dtype))  # a shift decides no dtype


def check_options(row: Row, beta, shift, scale, average, segment_ids):
    """beta, shift, scale and average as given, else as the row has them."""
    beta = row.beta if beta is None else beta
    shift = row.shift if shift is None else shift
    average = row.average if average is None else average
    beta = check_number("beta", beta, positive=True)
    shift = number_or_tensor("shift", shift)
    _check_least(row, shift)
    if scale is not None:
        scale = check_number("scale", scale, positive=True)
    check_average(average, segment_ids)
    return beta, shift, scale, average


def number_or_tensor(name: str, value: float | Tensor) -> float | Tensor:
    if not isinstance(value, Tensor):
        return check_number(name, value)
    check_tensor(name, value, dtypes=(*FLOATS, torch.int32, torch.int64))
    return value


def _check_least(row: Row, shift: float | Tensor) -> None:
    """The values of a shift on a GPU are not checked: that would be a host sync."""
    if row.least_shift is None or torch.compiler.is_compiling():
        return
    least = shift.min().item() if isinstance(shift, Tensor) and shift.device.type == "cpu" and shift.numel() else shift
    if not isinstance(least, Tensor) and not least >= row.least_shift:
        fail("shift", f"be at least {row.least_shift:g}", least)


def check_reference(name: str | Row, row: Row, ref_logp) -> None:
    if row.reference and ref_logp is None:
        fail("ref_logp", f"be given for {describe(name)} (zeros for a loss without reference)", "None")
    if not row.reference and ref_logp is not None:
        found = "sums of responses" if isinstance(ref_logp, Sums) else f"a {type(ref_logp).__name__}"
        fail("ref_logp", f"be None: {describe(name)} has no reference", found)


def check_plain_reference(ref_logp) -> None:
    """Before any op runs, which would find a transform of torch.func first."""
    for part in ref_logp if isinstance(ref_logp, tuple) else (ref_logp,):
        check_plain("ref_logp", part)


def flat_shift(shift, items: int, tokens: Tokens):
    """shift as a number, or a detached tensor () or (items,)."""
    if not isinstance(shift, Tensor):
        return shift
    check_tensor("shift", shift, like=tokens.x)
    if shift.dim() and shift.shape != (items,):
        fail("shift", f"be a number or have shape () or ({items},)", tuple(shift.shape))
    return shift.detach()


def response_scores(tokens: Tokens, ref_logp, weight: Tensor, *, whole: bool) -> Tensor:
    """h of each sequence (S,): Σ_t weight_t (logp_t - ref_logp_t). whole: whether ref_logp may be sums of responses."""
    if ref_logp is None:
        return sequence_scores(tokens.x, weight, tokens)
    wide = wide_of(tokens)  # a difference of halves is not rounded to a half
    if _summed(ref_logp, tokens):
        if not whole:
            wanted = "hold a log-prob per token where token_weight or an average is used"
            fail("ref_logp", wanted, f"sums per sequence, shape {tuple(ref_logp.shape)}")
        check_tensor("ref_logp", ref_logp, like=tokens.x)
        return sequence_scores(tokens.x, weight, tokens) - ref_logp.detach()
    return sequence_scores(tokens.x.to(wide) - flatten_like(ref_logp, tokens, "ref_logp").detach(), weight, tokens)


def _summed(ref_logp, tokens: Tokens) -> bool:
    """Whether it is one number per response."""
    return isinstance(ref_logp, Tensor) and tokens.shapes[0] != ref_logp.shape == (tokens.segments,)


def _reference_scores(tokens: Tokens, ref_logp, weight: Tensor) -> Tensor:
    """(S,): Σ_t weight_t ref_logp_t."""
    if _summed(ref_logp, tokens):
        return ref_logp.detach().to(wide_of(tokens))
    return sequence_scores(flatten_like(ref_logp, tokens, "ref_logp").detach(), weight, tokens)


def _rank(x: Tensor) -> Tensor:
    """Place of each among the sorted; equal ones keep their order."""
    return x.argsort(stable=True).argsort()


def _match_rejected(score: Tensor) -> Tensor:
    """Each chosen response beside the rejected one whose score has the same rank."""
    chosen, rejected = score.chunk(2)
    order = rejected.detach().argsort(stable=True)
    return torch.cat([chosen, rejected[order[_rank(chosen.detach())]]])


def _rank_offset(score: Tensor, reference: Tensor, policy: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (2P,) and what to take off their differences (P,): the reference's difference whose rank is that of the
    policy's, less the pair's own. Where the pair's own is infinite, its scores are the policy's, less nothing."""
    own, ratio, other = (torch.sub(*x.chunk(2)) for x in (reference, score, policy))
    infinite = own.isinf()
    matched = own[own.argsort(stable=True)[_rank(torch.where(infinite, other, ratio + own))]]
    both = torch.cat([infinite, infinite])
    return torch.where(both, policy, score), torch.where(infinite, matched, matched - own)


def _chosen_nll(tokens: Tokens, token_weight, weight, average, nll: str, pairs: str, denominator) -> Tensor:
    """(P,): each chosen response's average -logp; or with nll="token" its share of the mean over all their tokens."""
    if nll == "sequence":
        own = weight if average else sequence_weights(token_weight, tokens, "kept")
        return -_halves(sequence_scores(tokens.x, own, tokens), pairs).chunk(2)[0]
    own = sequence_weights(token_weight, tokens, False)
    if denominator is None:
        counts = own if average != "all" else torch.ones_like(own)
        total = _halves(segment_sum(counts, tokens.cu_seqlens, mask=tokens.mask), pairs).chunk(2)[0].sum()
        denominator = torch.where(total == 0, 1, total)
    chosen = _halves(sequence_scores(tokens.x, own, tokens), pairs).chunk(2)[0]
    return over_count(-chosen, check_denominator(denominator, "nll_denominator"))


def _halves(score: Tensor, pairs: str) -> Tensor:
    """(S,): all chosen, then all rejected."""
    return torch.cat([score[0::2], score[1::2]]) if pairs == "interleaved" else score


def _not_empty(tokens: Tokens, pairs: str) -> Tensor:
    """Pairs (P,) of which a response has a token."""
    chosen, rejected = _halves(has_tokens(tokens), pairs).chunk(2)
    return chosen | rejected


class FromScores(torch.autograd.Function):
    """Losses of scores whose slopes are known: backward is upstream times slope, for any upstream gradient per item."""

    @staticmethod
    def forward(ctx, score, losses, slope):
        ctx.save_for_backward(score, slope)  # score is not read
        return losses.clone()

    @staticmethod
    def backward(ctx, upstream):
        score, slope = ctx.saved_tensors
        # an item that is not counted has upstream 0, whatever its slope
        each = upstream if upstream.shape == slope.shape else torch.cat([upstream, upstream])
        grad = torch.where(each == 0, 0, each * slope)
        (grad,) = once("a loss of scores", (grad,), (score, upstream), instead="use torch's own arithmetic")
        return grad, None, None


@short_form(preference_loss)
def dpo(logp: TokenTensor, ref_logp: TokenTensor, **options: "Unpack[PreferenceOptions]") -> PreferenceLoss:
    """Direct Preference Optimization, arXiv:2305.18290 eq. 7: the mean over pairs of

        -log σ(beta (h_chosen - h_rejected) - shift),   h = Σ_t w_t (logp_t - ref_logp_t),   beta = 0.1

    logp, ref_logp  (2B, T), all chosen responses, then all rejected ones; other layouts, all keyword arguments and
                    errors are those of preference_loss
    average="kept" gives the length-averaged form of arXiv:2406.19188. Returns PreferenceLoss.
    """
    return preference_loss("dpo", logp, ref_logp, **options)


@short_form(preference_loss)
def ipo(
    logp: TokenTensor, ref_logp: TokenTensor, *, scaling: str = "delta", **options: "Unpack[PreferenceOptions]"
) -> PreferenceLoss:
    """Identity Preference Optimization, arXiv:2310.12036 eq. 17. With Δ = h_chosen - h_rejected and beta = 0.1

        scaling "delta"  (Δ - 1/(2 beta))², the form of other libraries
        scaling "z"      (beta Δ - ½)², which is beta² times that

    logp and ref_logp are (2B, T), chosen responses first. Keyword arguments and errors: preference_loss.
    """
    if scaling not in ("delta", "z"):
        fail("scaling", "be 'delta' or 'z'", repr(scaling))
    return preference_loss("ipo" if scaling == "delta" else "ipo_z", logp, ref_logp, **options)


@short_form(preference_loss, "shift")
def simpo(logp: TokenTensor, *, gamma: float = 1.0, **options: "Unpack[PreferenceOptions]") -> PreferenceLoss:
    """Simple Preference Optimization, arXiv:2405.14734 eq. 6, which needs no reference model:

        -log σ(beta (mean logp_chosen - mean logp_rejected) - gamma),   beta = 2

    logp is (2B, T), chosen responses first; gamma is a target margin. Keyword arguments and errors: preference_loss.
    """
    return preference_loss("simpo", logp, shift=number_or_tensor("gamma", gamma), **options)


@short_form(preference_loss)
def slic(logp: TokenTensor, ref_logp: TokenTensor, **options: "Unpack[PreferenceOptions]") -> PreferenceLoss:
    """Hinge loss of SLiC, arXiv:2305.10425, on log-ratios as in arXiv:2402.05749:

        max(0, 1 - beta (h_chosen - h_rejected)),   beta = 0.1

    logp and ref_logp are (2B, T), chosen responses first; a ref_logp of zeros gives the form without a reference.
    Keyword arguments and errors: preference_loss.
    """
    return preference_loss("slic", logp, ref_logp, **options)


@short_form(preference_loss)
def cdpo(
    logp: TokenTensor, ref_logp: TokenTensor, *, smoothing: float = 0.1, **options: "Unpack[PreferenceOptions]"
) -> PreferenceLoss:
    """Conservative DPO, from E. Mitchell's note on DPO with noisy labels. With m = beta (h_chosen - h_rejected)

        -(1 - smoothing) log σ(m) - smoothing log σ(-m),   beta = 0.1

    smoothing, in [0, 0.5], is the probability that chosen and rejected are interchanged in the data. logp and ref_logp
    are (2B, T), chosen responses first. Keyword arguments and errors: preference_loss.
    """
    return preference_loss("cdpo", logp, ref_logp, smoothing=smoothing, **options)


@short_form(preference_loss)
def robust(
    logp: TokenTensor, ref_logp: TokenTensor, *, smoothing: float = 0.1, **options: "Unpack[PreferenceOptions]"
) -> PreferenceLoss:
    """Robust DPO, arXiv:2403.00409: an unbiased estimate of DPO's loss. With m = beta (h_chosen - h_rejected)

        (-(1 - smoothing) log σ(m) + smoothing log σ(-m)) / (1 - 2 smoothing),   beta = 0.1

    smoothing, in [0, 0.5), is the probability that chosen and rejected are interchanged in the data. logp and ref_logp
    are (2B, T), chosen responses first. Keyword arguments and errors: preference_loss.
    """
    return preference_loss("robust", logp, ref_logp, smoothing=smoothing, **options)


@short_form(preference_loss, "nll_weight")
def cpo(logp: TokenTensor, *, alpha: float = 1.0, **options: "Unpack[PreferenceOptions]") -> PreferenceLoss:
    """Contrastive Preference Optimization, arXiv:2401.08417, which needs no reference model:

        -log σ(beta (logp_chosen - logp_rejected)) + alpha NLL of the chosen tokens,   beta = 0.1

    logp is (2B, T), chosen responses first. Keyword arguments and errors: preference_loss.
    """
    return preference_loss("cpo", logp, nll_weight=check_number("alpha", alpha), **options)


@short_form(preference_loss, "scale")
def orpo(logp: TokenTensor, *, odds_weight: float = 0.1, **options: "Unpack[PreferenceOptions]") -> PreferenceLoss:
    """Odds Ratio Preference Optimization, arXiv:2403.07691, which needs no reference model:

        NLL of the chosen responses - odds_weight log σ(log-odds_chosen - log-odds_rejected)

    The log-odds are those of e^h, with h the mean logp of a response. logp is (2B, T), chosen responses first.
    Keyword arguments and errors: preference_loss.
    """
    return preference_loss("orpo", logp, scale=check_number("odds_weight", odds_weight, positive=True), **options)

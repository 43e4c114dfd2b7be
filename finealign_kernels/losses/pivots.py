"""Which tokens get a gradient: pivots, segments between them, and masks by token score; best-of-N selection.

    pivot_flags     scores -> where a segment starts
    pivot_segments  flags  -> number of each token's segment
    adaptive_mask   scores (and flags) -> token_weight of the losses
    best_of_n       rewards -> the response of each prompt to train on

The equations of the paper (arXiv:2411.00809) were not available: the token mask follows the code of a sibling paper,
the rest is derived from the abstract. Nothing here carries gradient.
"""

import os
from typing import NamedTuple

import torch
from torch import Tensor

from ..formulas import pivots as formula
from ..formulas.segments import segment_ids
from ..ops._check import FLAGS, FLOATS, as_flags, check_flags, check_number, check_tensor, fail, number, reads_values
from ..ops._layout import Tokens, TokenTensor, flatten, flatten_like, unflatten
from ..ops._warn import warn_of_empty_mask
from ..ops.segments import segment_mean, segment_sum

KINDS = ("threshold", "sign", "salience")
BASELINES = ("batch", "row", "quantile")
SEGMENT_SCORES = ("mean", "sum", "last")


class AdaptiveMask(NamedTuple):
    """The mask, and why: a token counts if its score is on the right side of its baseline. Shapes of token_score."""

    token_weight: TokenTensor  # float32: 0 or 1, or between them with soft
    score: TokenTensor  # float32: what was compared, the token's score or its segment's
    baseline: TokenTensor  # float32
    segment: TokenTensor | None  # int64, -1 where mask is false; None for a mask of single tokens
    kept: Tensor  # () float32: the share of the tokens of mask whose weight is not 0; on their device, not read


def implicit_scores(
    logp: TokenTensor,
    ref_logp: TokenTensor,
    *,
    mask: TokenTensor | None = None,
    cu_seqlens: Tensor | None = None,
    beta: float = 1.0,
) -> TokenTensor:
    """q_t = beta (logp_t - ref_logp_t), the token reward that a trained policy implies; 0 where mask is false.

    logp, ref_logp  as in preference_loss; nats. Returns float32 (float64 for float64), detached. Raises ValueError.

    All scores are 0 while the policy is its reference: a mask of them keeps no token, and nothing is ever trained.
    Train some steps without the mask first.
    """
    beta = check_number("beta", beta, above=0)
    tokens = flatten(logp, mask, cu_seqlens, name="logp")
    ref = flatten_like(ref_logp, tokens, "ref_logp")
    wide = torch.promote_types(tokens.x.dtype, torch.float32)
    q = beta * (tokens.x.detach().to(wide) - ref.detach().to(wide))
    return unflatten(q if tokens.mask is None else torch.where(tokens.mask, q, 0), tokens.shapes)


def prefix_scores(
    prefix_reward: TokenTensor,
    *,
    mask: TokenTensor | None = None,
    cu_seqlens: Tensor | None = None,
    start: float | Tensor = 0.0,
) -> TokenTensor:
    """q_t = R(y_≤t) - R(y_<t), what each token adds to the reward of the prefix that it ends; 0 where mask is false.

    prefix_reward  (B, T) with mask, flat (N,) with cu_seqlens, or a pair; R(y_≤t) is at token t
    start          reward of no response yet, before the first token of the mask: a number, or (S,) one a sequence

    Returns float32 (float64 for float64), detached. Masked tokens inside a response are skipped.
    Raises ValueError, TypeError.
    """
    tokens = flatten(prefix_reward, mask, cu_seqlens, name="prefix_reward")
    reward = tokens.x.detach().to(torch.promote_types(tokens.x.dtype, torch.float32))
    read = _mask(tokens)
    before = formula.previous(read, tokens.cu_seqlens)
    earlier = torch.where(before >= 0, reward[before], _per_token("start", start, tokens, reward.dtype))
    return unflatten(torch.where(read, reward - earlier, 0), tokens.shapes)


def pivot_flags(
    token_score: TokenTensor,
    *,
    kind: str,
    mask: TokenTensor | None = None,
    cu_seqlens: Tensor | None = None,
    threshold: float | None = None,
    unit: str = "score",
    percent: float | None = None,
    baseline: float | str | Tensor = 0.0,
    quantile: float | None = None,
) -> TokenTensor:
    """Tokens at which a segment starts: the first of each response, and those where the score q changes.

        "threshold"   |q_t - q_(t-1)| > threshold
        "sign"        (q_t - b)(q_(t-1) - b) < 0; a score exactly at b makes none
        "salience"    |q_t - b| among the max(1, ceil(percent n / 100)) largest of its row, ties to the lower index

    token_score  (B, T) with mask, flat (N,) with cu_seqlens, or a pair (B, T⁺), (B, T⁻); float, compared in float32
    mask         bool: the response tokens. Others are skipped and may hold NaN: t-1 is the previous response token
    threshold    >= 0, of "threshold" alone; unit "score": as it is, "std": times the batch's standard deviation of q
    percent      0 < percent <= 100, of "salience" alone
    baseline, quantile   b, see adaptive_mask; not of "threshold"

    Returns bool, the shape of token_score. A NaN score makes no pivot (FINEALIGN_DEBUG=1: ValueError).
    Raises  ValueError, TypeError naming argument, expectation and finding.
    Source  derived from the abstract of arXiv:2411.00809.
    """
    if kind not in KINDS:
        fail("kind", f"be one of {KINDS}", repr(kind))
    _check_only_with("threshold", threshold, "kind", "threshold", kind)
    _check_only_with("percent", percent, "kind", "salience", kind)
    if threshold is not None:
        threshold = check_number("threshold", threshold, least=0)
    if percent is not None:
        percent = check_number("percent", percent, above=0, most=100)
    if unit not in ("score", "std"):
        fail("unit", "be 'score' or 'std'", repr(unit))
    tokens = flatten(token_score, mask, cu_seqlens, name="token_score")
    q, read = _scores(tokens)
    first, before = formula.first_tokens(_mask(tokens), tokens.cu_seqlens), formula.previous(read, tokens.cu_seqlens)
    if kind == "threshold":
        if number(baseline) != 0 or quantile is not None:
            fail("baseline", "be left out with kind='threshold', which compares neighbours", repr(baseline))
        flags = read & formula.threshold(q, before, threshold * formula.std(q, read) if unit == "std" else threshold)
    else:
        level = _baseline(q, read, tokens, baseline, quantile)
        if kind == "sign":
            flags = read & formula.sign(q, before, level)
        else:
            flags = formula.salience(q, read, tokens.cu_seqlens, level, percent)
    return unflatten(first | flags, tokens.shapes)


def pivot_segments(
    pivots: TokenTensor, *, mask: TokenTensor | None = None, cu_seqlens: Tensor | None = None
) -> TokenTensor:
    """The segment of each token, counted from 0 in its sequence: pivots up to and with it, less 1; -1 outside mask.

    pivots  bool, (B, T) with mask, flat (N,) with cu_seqlens, or a pair. The first token of a mask is a pivot anyway
    Returns int64, the shape of pivots. Raises ValueError, TypeError.
    """
    tokens = _flatten_flags(pivots, mask, cu_seqlens)
    read = _mask(tokens)
    return unflatten(formula.ids(_starts(tokens.x != 0, tokens), read, tokens.cu_seqlens), tokens.shapes)


def adaptive_mask(
    token_score: TokenTensor,
    *,
    mask: TokenTensor | None = None,
    cu_seqlens: Tensor | None = None,
    side: int | str | TokenTensor = "halves",
    pivots: TokenTensor | None = None,
    segment_ids: TokenTensor | None = None,
    segment_score: str = "mean",
    baseline: float | str | Tensor = 0.0,
    quantile: float | None = None,
    soft: float | None = None,
) -> AdaptiveMask:
    """Keeps the tokens, or segments, whose score agrees with what the loss does to their response.

        M_t = m_t 1[s (q_t - b) > 0]            with segments: M_t = m_t 1[s (Q_segment(t) - b) > 0]

    Both sides are strict: a score exactly at b is dropped, so is NaN (FINEALIGN_DEBUG=1: ValueError). The result is the
    token_weight of preference_loss and nll_loss, for policy and reference alike, and of policy_loss with the advantages
    as the side: it keeps A_t >= 0 with q_t > b and A_t < 0 with q_t < b. The critic's loss uses the whole mask.

    Pass the advantages that enter the loss as the side. Either whiten them first, over all tokens. Or compute the mask
    from the raw ones and whiten over the tokens that it keeps (whiten(A, mask=weight != 0)): mean and deviation are
    then those of the kept tokens, and whitening may turn the sign of some.

    token_score    q: (B, T) with mask, flat (N,) with cu_seqlens, or a pair (B, T⁺), (B, T⁻); compared in float32
    mask           bool: the response tokens; values at other tokens are ignored
    side           s: "halves" or "interleaved" for pairs as in preference_loss; 1 or -1 for all; or advantages, (S,) or
                   in the shape of token_score: tokens with a number >= 0 are to be reinforced, with one < 0 suppressed,
                   with NaN dropped. The side of a segment is that of the mean over it
    pivots         bool, where segments start (pivot_flags); None: every token is a segment
    segment_ids    instead of pivots: int, the segment of each token, not decreasing in a sequence; -1: of none, dropped
    segment_score  Q: "mean" of q over the segment, "sum", or "last"
    baseline       b: a number; "batch": mean of q over all tokens; "row": over the sequence; "quantile" of all tokens;
                   a tensor with one element (a mean over all ranks, say) or (S,)
    quantile       in [0, 1], of baseline="quantile" alone
    soft           None: 0 or 1; a width κ > 0: M_t = m_t σ(s (q_t - b) / κ)

    Returns AdaptiveMask, detached. A response of which nothing is kept has score 0 and no gradient in the losses. A
    warning says once on a CPU that nothing at all is kept (kept = 0: implicit_scores where policy = reference).
    Raises  ValueError, TypeError naming argument, expectation and finding.
    Source  token form with b = 0: code of arXiv:2502.11555; batch mean: its reviews; the rest derived.
    """
    if segment_score not in SEGMENT_SCORES:
        fail("segment_score", f"be one of {SEGMENT_SCORES}", repr(segment_score))
    if soft is not None:
        soft = check_number("soft", soft, above=0)
    if pivots is not None and segment_ids is not None:
        fail("segment_ids", "be None where pivots are given", "both")
    tokens = flatten(token_score, mask, cu_seqlens, name="token_score")
    q, read = _scores(tokens)
    level, advantage = _baseline(q, read, tokens, baseline, quantile), _side(side, tokens)
    score, segment = q, None
    if pivots is not None or segment_ids is not None:
        inside, starts = _segments(tokens, pivots, segment_ids)
        read, segment = read & inside, formula.ids(starts, inside, tokens.cu_seqlens)
        score = _segment_scores(q, read, starts, segment_score)
        advantage = _segment_scores(advantage, inside, starts, "mean")
    signs = torch.where(advantage >= 0, 1.0, torch.where(advantage < 0, -1.0, torch.nan)).float()
    kept = formula.keep(score, signs, level) if soft is None else formula.soft_keep(score, signs, level, soft)
    weight = torch.where(read, kept, 0).float()
    if reads_values(weight):
        warn_of_empty_mask("adaptive_mask", weight, tokens.mask, baseline)
    count = max(1, weight.numel()) if tokens.mask is None else tokens.mask.sum().clamp(min=1)
    found = (weight, torch.where(read, score, 0), level.expand_as(q), segment)
    return AdaptiveMask(
        *(None if x is None else unflatten(x, tokens.shapes) for x in found), (weight != 0).sum().float() / count
    )


def best_of_n(reward: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """The response of each prompt with the largest reward: what rejection sampling trains on, with nll_loss.

    reward  (P, n), n responses a prompt; or (S,) with cu_seqlens (P + 1,), the responses of prompt p from cu_seqlens[p]
            to cu_seqlens[p + 1]
    mask    as reward, bool: False for a response that is missing

    Returns bool, the shape of reward, one true for each prompt. Of equal rewards the first response is taken. NaN is
            never the best (FINEALIGN_DEBUG=1: ValueError); a prompt without a reward that is a number has none.
    Raises  ValueError, TypeError naming argument, expectation and finding.
    """
    if not isinstance(reward, Tensor):
        fail("reward", "be a tensor", f"a {type(reward).__name__}", TypeError)
    tokens = flatten(reward, mask, cu_seqlens, name="reward")
    read = _numbers("reward", tokens)
    prompt, place = segment_ids(tokens.cu_seqlens, read.shape[0]), torch.arange(len(read), device=read.device)
    value = torch.where(read, tokens.x.detach(), -torch.inf)
    best = value.new_full((tokens.segments,), -torch.inf).scatter_reduce(0, prompt, value, "amax")
    at_best = torch.where(read & (value == best[prompt]), place, len(place))
    first = place.new_full((tokens.segments,), len(place)).scatter_reduce(0, prompt, at_best, "amin")
    return unflatten(place == first[prompt], tokens.shapes)


def _mask(tokens: Tokens) -> Tensor:
    return torch.ones_like(tokens.x, dtype=torch.bool) if tokens.mask is None else tokens.mask


def _numbers(name: str, tokens: Tokens) -> Tensor:
    """(N,) bool: what the mask keeps and is a number."""
    mask, nan = _mask(tokens), tokens.x.detach().isnan()
    if os.environ.get("FINEALIGN_DEBUG") == "1" and bool((mask & nan).any()):
        fail(name, "hold numbers where mask is true", f"NaN at flat index {int((mask & nan).nonzero()[0])}")
    return mask & ~nan


def _scores(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """q (N,) float32, 0 where it is not read, and where it is read: what the mask keeps and is a number."""
    read = _numbers("token_score", tokens)
    return torch.where(read, tokens.x.detach().float(), 0), read


def _starts(flags: Tensor, tokens: Tokens) -> Tensor:
    mask = _mask(tokens)
    return (flags & mask) | formula.first_tokens(mask, tokens.cu_seqlens)


def _segments(tokens: Tokens, pivots, segment_ids) -> tuple[Tensor, Tensor]:
    """Tokens that are in a segment and tokens at which one starts, (N,) bool."""
    if segment_ids is None:
        return _mask(tokens), _starts(as_flags("pivots", flatten_like(pivots, tokens, "pivots", FLAGS)), tokens)
    ids = flatten_like(segment_ids, tokens, "segment_ids", (torch.int32, torch.int64))
    inside = _mask(tokens) & (ids >= 0)
    before = formula.previous(inside, tokens.cu_seqlens)
    falls = inside & (before >= 0) & (ids < ids[before])
    if reads_values(ids) and falls.any():
        t = int(falls.nonzero()[0])
        found = f"{int(ids[t])} after {int(ids[before[t]])} at flat index {t}"
        fail("segment_ids", "not decrease in a sequence", found)
    return inside, inside & ((before < 0) | (ids != ids[before]))


def _segment_scores(q: Tensor, read: Tensor, starts: Tensor, kind: str) -> Tensor:
    """Q of each token's segment (N,)."""
    cu_seqlens, segment = formula.bounds(starts)
    if kind == "last":
        return formula.last_score(q, read, cu_seqlens)[segment]
    return (segment_mean if kind == "mean" else segment_sum)(q, cu_seqlens, mask=read)[segment]


def _baseline(q: Tensor, read: Tensor, tokens: Tokens, baseline, quantile) -> Tensor:
    """b of each token (N,), float32."""
    known = baseline in BASELINES if isinstance(baseline, str) else isinstance(baseline, Tensor)
    if not known and number(baseline) is None:
        fail("baseline", f"be a number, a tensor or one of {BASELINES}", repr(baseline))
    _check_only_with("quantile", quantile, "baseline", "quantile", baseline if isinstance(baseline, str) else None)
    if quantile is not None:
        quantile = check_number("quantile", quantile, least=0, most=1)
    if not isinstance(baseline, str):
        return _per_token("baseline", baseline, tokens)
    if baseline == "row":
        return _per_token("baseline", segment_mean(q, tokens.cu_seqlens, mask=read), tokens)
    level = formula.mean(q, read) if baseline == "batch" else formula.quantile(q, read, quantile)
    return level.expand_as(q)


def _per_token(name: str, value: float | Tensor, tokens: Tokens, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N,) of a number, a tensor with one element, or one number a sequence."""
    if not isinstance(value, Tensor):
        value = check_number(name, value)
        return torch.full_like(tokens.x, value, dtype=dtype)
    check_tensor(name, value, dtypes=FLOATS, like=tokens.x)
    if value.shape != (tokens.segments,) and value.numel() != 1:
        fail(name, f"hold one number or have shape ({tokens.segments},)", tuple(value.shape))
    value = value.detach().to(dtype).reshape(-1)
    return value.expand(tokens.segments)[segment_ids(tokens.cu_seqlens, tokens.x.shape[0])]


def _side(side: int | str | TokenTensor, tokens: Tokens) -> Tensor:
    """A number of each token (N,): >= 0 if it is to be reinforced, < 0 if suppressed, NaN if neither."""
    many = tokens.segments
    if isinstance(side, (tuple, list)):
        return flatten_like(side, tokens, "side").detach()
    if isinstance(side, Tensor):
        return _advantages(side, tokens)
    if isinstance(side, str) and side in ("halves", "interleaved"):
        if many % 2:
            fail("token_score", f"hold an even number of sequences with side={side!r}", many)
        place = torch.arange(many, device=tokens.x.device)
        signs = torch.where(place < many // 2 if side == "halves" else place % 2 == 0, 1, -1).float()
    elif number(side) in (1, -1):
        signs = torch.full((many,), float(number(side)), dtype=torch.float32, device=tokens.x.device)
    else:
        fail("side", "be 'halves', 'interleaved', 1, -1 or a tensor", repr(side))
    return signs[segment_ids(tokens.cu_seqlens, tokens.x.shape[0])]


def _advantages(side: Tensor, tokens: Tokens) -> Tensor:
    """(N,) of (S,) or of one number a token."""
    per_sequence, per_token = side.shape == (tokens.segments,), (side.shape,) == tokens.shapes
    check_tensor("side", side, like=tokens.x)
    if not (per_sequence or per_token):
        shapes = " and ".join(str(tuple(shape)) for shape in tokens.shapes)
        fail("side", f"have shape ({tokens.segments},) or {shapes}", tuple(side.shape))
    if per_sequence and per_token and reads_values(side) and bool((tokens.cu_seqlens.diff() != 1).any()):
        fail("side", "be of tokens or of sequences, not of as many as there are of both", tuple(side.shape))
    side = side.detach()
    return side.reshape(-1) if per_token else side[segment_ids(tokens.cu_seqlens, tokens.x.shape[0])]


def _flatten_flags(pivots, mask, cu_seqlens) -> Tokens:
    """Tokens whose x is 1 at a pivot."""
    pair = isinstance(pivots, (tuple, list))
    floats = tuple(check_flags("pivots", part).float() for part in (pivots if pair else (pivots,)))
    return flatten(floats if pair else floats[0], mask, cu_seqlens, name="pivots")


def _check_only_with(name, value, argument, when, found) -> None:
    """Requires an argument where another one is `when`, and refuses it everywhere else."""
    if value is None and found == when:
        fail(name, f"be given with {argument}={when!r}", None)
    if value is not None and found != when:
        fail(name, f"be None without {argument}={when!r}, which alone reads it", repr(value))

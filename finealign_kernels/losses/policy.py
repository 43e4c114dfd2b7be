"""Policy losses from token log-probs: a table with one row a loss, and its assembly.

    L = Σ_t c_t w_t ω_t ℓ_t  +  β Σ_t c'_t κ_t  -  η H̄,      ℓ_t = psi(log-ratio, A_t)

A loss is a row: psi with its slope, whose log-ratio it reads, how its tokens are reduced. Adding one is adding a row.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..formulas import divergence, surrogate
from ..ops._check import check_bool, check_number, check_one_of, fail
from ..ops._layout import Tokens, TokenTensor, flatten, flatten_like, unflatten, warn_of_tokens
from ..ops.policy_loss import Reduction, missing
from ..ops.policy_loss import policy_loss as fused_policy_loss
from ..ops.segments import segment_broadcast, segment_mean, segment_sum
from .reduce import (
    FromTokens,
    check_denominator,
    check_token_reduction,
    mean_of_tokens,
    per_token,
    read,
    same_in_rows,
    token_shares,
    weigh,
    wide_of,
)
from .table import Hyper, hyper_of

Formula = Callable[..., tuple[Tensor, Tensor]]


class PolicyRow(NamedTuple):
    """One loss of the table."""

    psi: Formula  # log_ratio, advantage, logp -> value, slope
    equation: str  # with ρ the ratio of a token, s and P those of its row: geometric mean and product of its tokens'
    source: str
    reduction: str  # see reduce.token_shares
    hyper: dict[str, Hyper] = {}  # noqa: RUF012, read only
    kl_coef: float = 0.0
    ratio: str = "token"  # or "mean", "sum": psi reads that of the row's log-ratios
    whole: bool = False  # one advantage per row, and nothing else that tells its tokens apart
    bounds: Callable[..., tuple[float, float]] | None = None  # hyper -> where the ratio is held


def _around_one(*, low: float, high: float, dual: float | None = None) -> tuple[float, float]:
    return 1 - low, 1 + high


def _absolute(*, low: float, high: float) -> tuple[float, float]:
    return low, high


def _clip(low: float, high: float) -> dict[str, Hyper]:
    return {
        "low": Hyper(low, lambda e: 0 <= e <= 1, "be in [0, 1]"),
        "high": Hyper(high, lambda e: e >= 0, "be 0 or above"),
        "dual": Hyper(None, lambda d: d > 1, "be above 1"),
    }


_temperature = partial(Hyper, holds=lambda tau: tau > 0, expected="be above 0")
_clipped = partial(PolicyRow, surrogate.clipped, "max(-A ρ, -A clip(ρ, 1-low, 1+high))", bounds=_around_one)
_row_clipped = partial(PolicyRow, surrogate.clipped, bounds=_around_one)

POLICY: dict[str, PolicyRow] = {
    "ppo": _clipped("arXiv:1707.06347 eq. 7; dual: arXiv:1912.09729", "token", _clip(0.2, 0.2)),
    "grpo": _clipped("arXiv:2402.03300", "sequence", _clip(0.2, 0.2), kl_coef=0.04),
    "bnpo": _clipped("TRL's loss_type bnpo", "token", _clip(0.2, 0.2)),
    "dr_grpo": _clipped("arXiv:2503.20783", "constant", _clip(0.2, 0.2)),
    "dapo": _clipped("arXiv:2503.14476", "token_global", _clip(0.2, 0.28)),
    "gspo": _row_clipped(
        "max(-A s, -A clip(s, 1-low, 1+high)), one A per row",
        "arXiv:2507.18071 eq. 5",
        "sequence",
        _clip(3e-4, 4e-4),
        ratio="mean",
        whole=True,
    ),
    "gspo_token": _row_clipped(
        "max(-A ρ', -A clip(ρ', 1-low, 1+high)), ρ' = sg(s) ρ / sg(ρ)",
        "arXiv:2507.18071, its token form",
        "sequence",
        _clip(3e-4, 4e-4),
        ratio="mean",
    ),
    "cispo": PolicyRow(
        surrogate.capped,
        "-sg(clamp(ρ, low, high)) A logp",
        "arXiv:2506.13585; its bounds: arXiv:2510.13786",
        "token_global",
        {
            "low": Hyper(0.0, lambda bound: bound >= 0, "be 0 or above"),
            "high": Hyper(5.0, lambda bound: bound > 0, "be above 0"),
        },
        bounds=_absolute,
    ),
    "reinforce": PolicyRow(surrogate.score_function, "-A logp", "R. J. Williams, 1992", "token_global"),
    "rloo": _row_clipped(
        "max(-A P, -A clip(P, 1-low, 1+high)), one per row",
        "arXiv:2402.14740; clipped: TRL's RLOO trainer",
        "sequence",
        _clip(0.2, 0.2),
        ratio="sum",
        whole=True,
    ),
    "sapo": PolicyRow(
        surrogate.soft_gate,
        "-A (4/τ) σ(τ (ρ-1)), τ = tau_pos where A > 0, else tau_neg",
        "arXiv:2511.20347",
        "sequence",
        {"tau_pos": _temperature(1.0), "tau_neg": _temperature(1.05)},
    ),
    "luspo": _row_clipped(
        "the row's tokens times gspo's max(-A s, -A clip(s, 1-low, 1+high))",
        "TRL's loss_type luspo",
        "sequence_sum",
        _clip(0.2, 0.2),
        ratio="mean",
        whole=True,
    ),
}

KL: dict[str, Formula] = {
    "k1": lambda d, log_ratio: divergence.k1(d),
    "k2": lambda d, log_ratio: divergence.k2(d),
    "k3": lambda d, log_ratio: divergence.k3(d),
    "k3_k2grad": lambda d, log_ratio: divergence.k3_k2grad(d),
    "k3_is": divergence.k3_is,
}


class PolicyLoss(NamedTuple):
    """loss carries the gradient; everything else is detached. Means are over the tokens that the mask keeps."""

    loss: Tensor  # () policy + kl_coef · kl - entropy_coef · entropy
    losses: Tensor  # ℓ of each token, as logp; 0 where the mask is false
    policy: Tensor  # () Σ c w ω ℓ
    kl: Tensor  # () the reduced estimate of KL(π‖ref); 0 without ref_logp
    entropy: Tensor  # () the reduced entropy; 0 where it is not given
    ratio: Tensor  # () mean of the ratio that the loss reads: the token's, or the row's
    old_kl: Tensor  # () mean of old_logp - logp
    clip_fraction_low: Tensor  # () share of tokens with A < 0 whose ratio is below the bounds
    clip_fraction_high: Tensor  # () share of tokens with A > 0 whose ratio is above the bounds
    clip_fraction_dual: Tensor  # () share of tokens with A < 0 whose ratio is above dual


def token_loss(name: str, log_ratio: Tensor, advantage: Tensor, logp: Tensor, **hyper) -> tuple[Tensor, Tensor]:
    """Loss of each token and its gradient with respect to logp (N,), nats. A = 0 is an exact 0 in both."""
    row = row_of(name)
    value, slope = row.psi(log_ratio, advantage, logp, **_hyper_of(name, row, **hyper))
    none = (advantage == 0) & (log_ratio == log_ratio)  # of a NaN, which goes through, nothing is known
    return torch.where(none, 0, value), torch.where(none, 0, slope)


def row_of(name: str) -> PolicyRow:
    check_one_of("name", name, tuple(POLICY))
    return POLICY[name]


def _hyper_of(name: str, row: PolicyRow, of: Callable | None = None, **given) -> dict:
    """As given, where None is the row's own."""
    return hyper_of(name, row.hyper, {key: value for key, value in given.items() if value is not None}, of)


def policy_loss(
    name: str,
    logp: TokenTensor,
    old_logp: TokenTensor | None = None,
    advantages: TokenTensor | None = None,
    *,
    mask: TokenTensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logp: TokenTensor | None = None,
    token_weight: TokenTensor | None = None,
    average: str = "all",
    reduction: str | None = None,
    denominator: float | Tensor | None = None,
    max_length: float | Tensor | None = None,
    count_empty: bool = True,
    low: float | None = None,
    high: float | None = None,
    dual: float | None = None,
    kl_coef: float | None = None,
    kl: str = "k3_is",
    entropy: TokenTensor | None = None,
    entropy_coef: float = 0.0,
    entropy_reduction: str = "token",
    entropy_denominator: float | Tensor | None = None,
    sampler_weight: TokenTensor | None = None,
    **hyper,
) -> PolicyLoss:
    """Policy loss of sampled responses from token log-probs; `POLICY` lists the names with their equations.

        r_t = logp_t - old_logp_t,   ρ_t = exp(clamp(r_t, ±20)),   L = Σ_t c_t w_t ω_t ℓ(r_t, A_t) + β KL - η H̄

    logp          (B, T) with mask (prompts and padding false), or flat (N,) with cu_seqlens (B + 1,); float, nats
    old_logp      as logp, of the policy that sampled the responses; None: logp itself as a constant, ρ = 1
    advantages    as logp, or one per response, (B,) or (B, 1)
    mask          as logp, bool: True for response tokens. Values at other tokens, even NaN or inf, affect neither the
                  loss nor its gradient
    ref_logp      as logp, of the reference that the KL is taken from; required where kl_coef is not 0
    token_weight  as logp, float: w, how much the policy loss of a token counts (a pivot mask, a segment weight)
    average       what the policy loss is divided by: "all" tokens, or the Σ w of those "kept"; KL and entropy: all
    reduction     None: the row's own. "token": 1 / tokens of this call; "token_global": 1 / denominator, the number of
                  tokens of the whole step; "sequence": mean over responses of the mean over tokens; "sequence_sum":
                  mean over responses of the sum; "constant": that divided by max_length, the longest allowed response
    denominator   the global count in place of this call's: tokens, or responses for reductions over sequences. With
                  it the losses of micro-batches and ranks add up to the loss of the whole
    count_empty   whether a response without a token counts in the mean over responses
    low, high     the ratio is clipped to [1-low, 1+high]; for cispo to [low, high]. None: the row's own
    dual          bound of the ratio where A < 0; None: no bound
    kl_coef       β; None: the row's own
    kl            estimator of the KL term, d = logp - ref_logp. "k3_is": ρ (e^-d - 1 + d), whose gradient is that of
                  KL(π‖ref) also on tokens of the old policy; "k3_k2grad", "k2": that of KL(π‖ref) on tokens of π;
                  "k3": that of KL(ref‖π); "k1": one of expectation 0
    entropy       as logp: of the distribution at each token; entropy_coef is η
    entropy_reduction  "token": a mean over tokens, by entropy_denominator, the step's tokens. None: by denominator
                  where that counts tokens, refused beside one that counts responses; without both, of this call.
                  "policy": as the policy loss
    sampler_weight  ω, as logp or (B,): see sampler_weights. It weighs the policy loss alone
    hyper         numbers the row takes, `POLICY[name].hyper`: tau_pos, tau_neg of sapo

    A loss with one ratio per row (gspo, rloo, luspo) takes one advantage and one ω per response, and no token_weight;
    `gspo_token` takes them per token. Beyond ±20 a log-ratio is a constant: value at the bound, gradient 0.
    Returns PolicyLoss; no token at all gives 0, connected to the graph. The gradient flows to logp and entropy.
    Raises  ValueError, TypeError naming argument, expectation and finding.
    """
    row = row_of(name)
    hyper = _hyper_of(name, row, policy_loss, low=low, high=high, dual=dual, **hyper)
    _check_bounds(row, hyper)
    reduction = row.reduction if reduction is None else reduction
    check_token_reduction(reduction, average, denominator, max_length)
    count_empty = check_bool("count_empty", count_empty)
    kl_coef = row.kl_coef if kl_coef is None else kl_coef
    kl_coef, entropy_coef = check_number("kl_coef", kl_coef), check_number("entropy_coef", entropy_coef)
    _check_terms(kl_coef, kl, ref_logp, entropy_coef, entropy, entropy_reduction, entropy_denominator)

    denominator, max_length, entropy_denominator = (
        value if value is None else check_denominator(value, argument)
        for argument, value in (
            ("denominator", denominator),
            ("max_length", max_length),
            ("entropy_denominator", entropy_denominator),
        )
    )
    if entropy is not None and entropy_reduction == "token":
        given = denominator, entropy_denominator
        entropy_denominator = _entropy_count(reduction, *given, entropy_coef != 0)

    tokens = flatten(logp, mask, cu_seqlens, name="logp")
    warn_of_tokens("policy_loss", tokens, token_weight)
    if row.whole:
        _check_whole(name, row, tokens, advantages, token_weight, reduction)
    terms = _Terms(
        Reduction(reduction, average, denominator, max_length, count_empty),
        ref_logp=ref_logp,
        kl=kl,
        kl_coef=kl_coef,
        entropy=entropy,
        entropy_coef=entropy_coef,
        entropy_by_token=entropy_reduction == "token",
        entropy_denominator=entropy_denominator,
        token_weight=token_weight,
        sampler_weight=sampler_weight,
    )
    if is_fused(row, tokens, advantages, sampler_weight, kl):
        return _fused(row, tokens, old_logp, advantages, hyper, terms)
    return _composed(name, row, tokens, old_logp, advantages, hyper, terms)


class _Terms(NamedTuple):
    """The other terms of a policy loss, checked; as the arguments of policy_loss."""

    reduction: Reduction
    ref_logp: TokenTensor | None
    kl: str
    kl_coef: float
    entropy: TokenTensor | None
    entropy_coef: float
    entropy_by_token: bool
    entropy_denominator: float | Tensor | None
    token_weight: TokenTensor | None
    sampler_weight: TokenTensor | None


def is_fused(row: PolicyRow, tokens: Tokens, advantages, sampler_weight, kl: str) -> bool:
    """Whether ops.policy_loss can run the row: known functions, and no argument whose meaning depends on its values."""
    if missing(row.psi, kl, tokens.whole.device):
        return False
    if row.whole and sampler_weight is not None and not _is_by_row(sampler_weight, tokens):
        return False  # it must not change inside a row
    single = tokens.ends is not None and tokens.segments == tokens.whole.shape[0]
    each = (advantages, sampler_weight)
    return not (single and any(isinstance(x, Tensor) and x.dim() == 1 for x in each))  # a row, or a token: see reduce


def _is_by_row(x, tokens: Tokens) -> bool:
    return isinstance(x, Tensor) and tuple(x.shape) in ((tokens.segments,), (tokens.segments, 1))


def _fused(row: PolicyRow, tokens: Tokens, old_logp, advantages, hyper: dict, terms: _Terms) -> PolicyLoss:
    bounds = row.bounds(**hyper) if row.bounds else (0.0, torch.inf)
    options = dict(psi=row.psi, hyper=hyper, ratio=row.ratio, bounds=bounds)
    out = fused_policy_loss(tokens, old_logp, advantages, **options, **terms._asdict())
    losses = out.losses if len(tokens.shapes) == 1 else unflatten(out.losses, tokens.shapes)
    return PolicyLoss(out.loss, losses, *out.numbers.unbind())


def _composed(
    name: str, row: PolicyRow, tokens: Tokens, old_logp, advantages, hyper: dict, terms: _Terms
) -> PolicyLoss:
    """The same from small ops, for any row on any device."""
    ref_logp, kl_coef, entropy, entropy_coef = terms.ref_logp, terms.kl_coef, terms.entropy, terms.entropy_coef
    logps = read(tokens.x, tokens)
    if old_logp is None:
        log_ratio = torch.where(logps == logps, 0, logps)
    else:
        log_ratio = logps - read(flatten_like(old_logp, tokens, "old_logp"), tokens)
    advantage = per_token("advantages", advantages, tokens)
    ratio_log = log_ratio if row.ratio == "token" else _of_rows(log_ratio, tokens, row.ratio)
    losses, slope = token_loss(name, ratio_log, advantage, logps, **hyper)
    if row.ratio == "sum":  # each token moves the whole row's loss, of which c_t is a share
        slope = slope * _lengths(tokens)

    reduction, average, *counts = terms.reduction
    options = dict(zip(("denominator", "max_length", "count_empty"), counts, strict=True))
    share = token_shares(tokens, reduction, **options)
    scale, counted = _scale(name, row, tokens, terms.token_weight, terms.sampler_weight)
    kept = share if average == "all" or counted is None else token_shares(tokens, reduction, counted, **options)
    weight = kept if scale is None else kept * scale
    policy, dlogp = weigh(weight, losses).sum(), weigh(weight, slope)
    loss, divergence_term, entropy_term = policy, torch.zeros_like(policy), torch.zeros_like(policy)

    if ref_logp is not None:
        to_reference = logps - read(flatten_like(ref_logp, tokens, "ref_logp"), tokens)
        kappa, push = KL[terms.kl](to_reference, log_ratio)
        divergence_term = (share * kappa).sum()
        if kl_coef != 0:
            loss, dlogp = loss + kl_coef * divergence_term, dlogp + kl_coef * (share * push)
    entropies, dentropy = None, None
    if entropy is not None:
        entropies = flatten_like(entropy, tokens, "entropy")
        if terms.entropy_by_token:
            share = token_shares(tokens, "token", denominator=terms.entropy_denominator)
        entropy_term = (share * read(entropies, tokens)).sum()
        if entropy_coef != 0:
            loss, dentropy = loss - entropy_coef * entropy_term, -entropy_coef * share

    loss = FromTokens.apply("policy_loss", tokens.x, entropies, loss, dlogp, dentropy)
    ratio = surrogate.bounded_ratio(ratio_log)
    mean = partial(mean_of_tokens, tokens=tokens)
    below, above = row.bounds(**hyper) if row.bounds else (0.0, torch.inf)
    return PolicyLoss(
        loss=loss,
        losses=unflatten(losses, tokens.shapes),
        policy=policy,
        kl=divergence_term,
        entropy=entropy_term,
        ratio=mean(read(ratio, tokens)),
        old_kl=mean(-log_ratio),
        clip_fraction_low=mean((advantage < 0) & (ratio < below)),
        clip_fraction_high=mean((advantage > 0) & (ratio > above)),
        clip_fraction_dual=mean((advantage < 0) & (ratio > (hyper.get("dual") or torch.inf))),
    )


def _check_bounds(row: PolicyRow, hyper: dict) -> None:
    if row.bounds:
        below, above = row.bounds(**hyper)
        if below > above:
            fail("low", f"not be above high = {above}", below)


def _check_terms(kl_coef, kl, ref_logp, entropy_coef, entropy, entropy_reduction, entropy_denominator) -> None:
    check_one_of("kl", kl, tuple(KL))
    if kl_coef != 0 and ref_logp is None:
        fail("ref_logp", f"be given for kl_coef = {kl_coef} (kl_coef=0 leaves the KL out)", None)
    if entropy_coef != 0 and entropy is None:
        fail("entropy", f"be given for entropy_coef = {entropy_coef}", None)
    if entropy_reduction not in ("token", "policy"):
        fail("entropy_reduction", "be 'token' or 'policy'", repr(entropy_reduction))
    if entropy_denominator is not None and entropy_reduction != "token":
        fail("entropy_denominator", "be None but for entropy_reduction='token'", repr(entropy_denominator))


def _entropy_count(reduction: str, denominator, entropy_denominator, matters: bool):
    """What a mean of entropies over tokens is divided by: the step's tokens, or None for this call's."""
    if (denominator is None) == (entropy_denominator is None):
        return entropy_denominator
    if denominator is None:
        fail("denominator", "be given beside entropy_denominator: one step, one count each", None)
    if reduction in ("token", "token_global"):
        return denominator
    if matters:
        wanted = f"be given beside denominator, which counts responses for {reduction!r}: the tokens of the step"
        fail("entropy_denominator", f"{wanted}, or entropy_reduction='policy'", None)
    return None


def _check_whole(name: str, row: PolicyRow, tokens: Tokens, advantages, token_weight, reduction: str) -> None:
    """With one ratio per row all its tokens have the same gradient: arguments that differ between them are refused."""
    instead = f"for {name!r}, whose ratio is the row's ('gspo_token' takes one per token)"
    rows = tokens.segments
    if not isinstance(advantages, Tensor) or tuple(advantages.shape) not in ((rows,), (rows, 1)):
        shape = tuple(advantages.shape) if isinstance(advantages, Tensor) else type(advantages).__name__
        fail("advantages", f"have shape ({rows},) {instead}", shape)
    if token_weight is not None:
        fail("token_weight", f"be None {instead}", "a tensor")
    if reduction != row.reduction:
        fail("reduction", f"be {row.reduction!r} for {name!r}, whose ratio is the row's", repr(reduction))


def _scale(name: str, row: PolicyRow, tokens: Tokens, token_weight, sampler_weight):
    """(N,) w ω and w, each None where nothing is given."""
    weight = None if token_weight is None else read(flatten_like(token_weight, tokens, "token_weight"), tokens)
    if sampler_weight is None:
        return weight, weight
    sampler = per_token("sampler_weight", sampler_weight, tokens)
    if row.whole:
        sampler = same_in_rows("sampler_weight", sampler, tokens, f"{name!r} ('gspo_token' takes one per token)")
    return sampler if weight is None else weight * sampler, weight


def _of_rows(log_ratio: Tensor, tokens: Tokens, kind: str) -> Tensor:
    """(N,): the mean or the sum of its row's log-ratios."""
    reduce = segment_mean if kind == "mean" else segment_sum
    rows = reduce(log_ratio, tokens.cu_seqlens, mask=tokens.mask)
    return segment_broadcast(rows, tokens.cu_seqlens, total=log_ratio.shape[0], mask=tokens.mask)


def _lengths(tokens: Tokens) -> Tensor:
    """(N,): the number of its row's tokens."""
    rows = segment_sum(torch.ones_like(tokens.x, dtype=wide_of(tokens)), tokens.cu_seqlens, mask=tokens.mask)
    return segment_broadcast(rows, tokens.cu_seqlens, total=tokens.x.shape[0])

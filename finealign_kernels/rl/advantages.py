"""Everything between rewards and a policy loss in one call; each step by itself is in rewards.py, gae.py, whitening.py.

    rewards of segments or tokens --place--> r_t --KL--> r_t - β kl_t --whiten--> r̂_t --GAE--> A_t, Ret_t = A_t + V_t
    A_t --whiten--> Â_t --pivots--> M_t

On a CPU with the extension that is one launch over the tokens, two or three where moments of the batch come in between
(they stay tensors, so that sum_moments may be an all_reduce); elsewhere the small functions, which define it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..formulas import returns as formula
from ..formulas.rewards import SegmentRewards
from ..formulas.segments import segment_ids
from ..ops import advantages as native
from ..ops._check import check_bool, check_callable, check_number, check_plain, fail, reads_values
from ..ops._layout import Tokens, flatten, flatten_like, unflatten
from ..ops._warn import warn_of_empty_mask
from .gae import MASKED, check_estimator, constant, gae_of, per_sequence, rate, returns_of
from .rewards import check_model, layout_of, token_rewards
from .whitening import check_mode, moments_of, summed, whiten_of

PIVOTS = ("after_whitening", "before_whitening")


class Advantages(NamedTuple):
    """In the shapes of the tokens, 0 where the mask is false; detached; float32 (float64 if an input is)."""

    advantages: Tensor  # for the policy loss: whitened, where that was asked for
    returns: Tensor  # for the value loss: of the advantages before they are whitened
    rewards: Tensor  # less the KL penalty, before they are whitened
    kl: Tensor | None  # nats; None without log-probs
    token_weight: Tensor | None  # float32, 1 at pivots; None without scores
    reward_moments: Tensor | None  # (3,) float64 n, Σx, Σx² of all ranks; None where rewards are not whitened
    advantage_moments: Tensor | None  # of the advantages that were whitened


class _Plan(NamedTuple):
    """Checked arguments. Token vectors are (N,) of one dtype."""

    tokens: Tokens  # x: rewards; with models what gives the dtype alone
    models: list[SegmentRewards] | None
    values: Tensor | None
    old_logp: Tensor | None
    ref_logp: Tensor | None
    kl: str
    kl_coef: float
    gamma: Tensor
    lam: Tensor
    masked: str
    bootstrap: Tensor | None
    whiten_rewards: bool
    whiten_advantages: bool
    mode: str
    unbiased: bool
    sum_moments: Callable[[Tensor], Tensor] | None
    score: Tensor | None
    baseline: float
    pivots_first: bool
    on_collision: str
    on_empty: str
    backend: str


def advantages(
    rewards: Tensor | SegmentRewards | Sequence[SegmentRewards],
    values: Tensor | None = None,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k1",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    masked: str = "carry",
    bootstrap: Tensor | None = None,
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
    whitening: str = "std",
    unbiased: bool = False,
    sum_moments: Callable[[Tensor], Tensor] | None = None,
    token_score: Tensor | None = None,
    baseline: float = 0.0,
    pivots: str = "after_whitening",
    on_collision: str = "add",
    on_empty: str = "previous",
    compat: bool = False,
    backend: str = "auto",
) -> Advantages:
    """Advantages, returns and pivots of the tokens of a batch of responses, from the rewards of reward models.

        r_t = Σ_k w_k Σ_j 1[t = T_kj] R_kj - β kl_t          A_t = r̂_t - V_t + γ V_u + γλ A_u,   Ret_t = A_t + V_t
        M_t = 1[Â_t >= 0] 1[q_t > b] + 1[Â_t < 0] 1[q_t < b]

    rewards      of tokens, (B, T) or (N,) with cu_seqlens; or SegmentRewards of one reward model or several, which are
                 placed at the last tokens of their segments (token_rewards)
    values       the critic's V_t in the shape of the tokens; None: A_t = Ret_t = r_t + γ A_u, without lam and bootstrap
    old_logp, ref_logp, kl_coef, kl   the KL penalty: log-probs in the shape of the tokens, β, and its estimator
                 (kl_penalty)
    mask         bool, the response tokens. Values at other tokens may be NaN
    gamma, lam, masked, bootstrap   of gae
    whiten_rewards     before the recurrence, keeping their mean
    whiten_advantages  after it, mean removed
    whitening, unbiased, sum_moments   of whiten (mode)
    token_score, baseline   q and b of the pivots, compared in float32; a NaN score, or one at b, is not kept; a
                 warning says once on a CPU that none is
    pivots       "after_whitening": by the sign of Â, the scale is that of all tokens. "before_whitening": by the sign
                 of A, which is then whitened over the pivots alone and 0 at other tokens
    on_collision, on_empty   of token_rewards
    compat       as the released code of Fine-Grained RLHF computes it: whitening="compat", and whitened rewards are not
                 masked again, so that padding up to the longest response of the batch counts as reward. Padded only
    backend      "auto", "reference" (torch, any device) or "native" (CPU)

    Returns  Advantages; all are constants of the losses.
    Raises   ValueError, TypeError naming argument, expectation and finding.
    Source   arXiv:2306.01693 (rewards, KL, GAE, whitening) and its code (compat); pivots derived from arXiv:2411.00809.
    """
    check_estimator("kl", kl)
    check_mode("whitening", whitening)
    kl_coef, baseline = check_number("kl_coef", kl_coef), check_number("baseline", baseline)
    for name, value, known in (
        ("masked", masked, MASKED),
        ("pivots", pivots, PIVOTS),
        ("on_collision", on_collision, ("add", "overwrite")),
        ("on_empty", on_empty, ("previous", "drop")),
    ):
        if value not in known:
            fail(name, f"be one of {known}", repr(value))
    whiten_rewards = check_bool("whiten_rewards", whiten_rewards)
    whiten_advantages = check_bool("whiten_advantages", whiten_advantages)
    unbiased, compat = check_bool("unbiased", unbiased), check_bool("compat", compat)
    check_callable("sum_moments", sum_moments)
    vectors = {"values": values, "old_logp": old_logp, "ref_logp": ref_logp, "token_score": token_score}
    for name, x in {**vectors, "bootstrap": bootstrap}.items():
        check_plain(name, x)
    tokens, models = _tokens(rewards, mask, cu_seqlens)
    if (old_logp is None) != (ref_logp is None):
        fail("old_logp and ref_logp", "be given together", "one of them", TypeError)
    if kl_coef and old_logp is None:
        fail("old_logp and ref_logp", "be given where kl_coef is not 0", None, TypeError)
    if bootstrap is not None and values is None:
        fail("bootstrap", "be None without values", "a tensor", TypeError)
    flat = {name: None if x is None else flatten_like(x, tokens, name) for name, x in vectors.items()}
    doubles = any(x.dtype == torch.float64 for x in (tokens.x, *flat.values()) if x is not None)
    wide = torch.float64 if doubles else torch.float32
    flat = {name: None if x is None else constant(x, wide) for name, x in flat.items()}
    tokens = tokens.with_x(constant(tokens.x, wide))
    plan = _Plan(
        tokens,
        models,
        flat["values"],
        flat["old_logp"],
        flat["ref_logp"],
        kl,
        kl_coef,
        rate("gamma", gamma, tokens),
        rate("lam", lam, tokens),
        masked,
        None if bootstrap is None else per_sequence("bootstrap", bootstrap, tokens),
        whiten_rewards,
        whiten_advantages,
        whitening,
        unbiased,
        sum_moments,
        flat["token_score"],
        float(baseline),
        pivots == "before_whitening",
        on_collision,
        on_empty,
        backend,
    )
    if compat:
        found = _as_released(plan)
    else:
        found = (_fused if native.runs(backend, tokens.x.device) else _composed)(plan)
    shaped = [None if x is None else unflatten(x, tokens.shapes) for x in found[:5]]
    if found.token_weight is not None and reads_values(found.token_weight):
        warn_of_empty_mask("advantages", found.token_weight, tokens.mask, baseline)
    return Advantages(*shaped, *found[5:])


def _composed(plan: _Plan) -> Advantages:
    """One step after another: what `advantages` means. All vectors (N,)."""
    rewards, kl = _shaped(plan)
    tokens, known = plan.tokens.with_x(rewards), None
    if plan.whiten_rewards:
        known = summed(moments_of(tokens, plan.backend), plan.sum_moments)
        tokens = tokens.with_x(whiten_of(tokens, known, plan.mode, plan.unbiased, False, plan.backend))
    if plan.values is None:
        raw = returns = returns_of(tokens, plan.gamma, plan.masked, plan.backend)
    else:
        raw, returns = gae_of(tokens, plan.values, plan.gamma, plan.lam, plan.bootstrap, plan.masked, plan.backend)
    weight = _pivots(plan, raw) if plan.pivots_first else None
    done, of_advantages = raw, None
    if plan.whiten_advantages:
        over = tokens.with_x(raw, weight)
        of_advantages = summed(moments_of(over, plan.backend), plan.sum_moments)
        done = whiten_of(over, of_advantages, plan.mode, plan.unbiased, True, plan.backend)
    weight = _pivots(plan, done) if weight is None else weight
    weight = None if weight is None else weight.float()
    return Advantages(done, returns, rewards, kl, weight, _sums(known), _sums(of_advantages))


def _fused(plan: _Plan) -> Advantages:
    """The same in one launch, or in up to three where moments are needed. On a GPU rewards are placed before."""
    if plan.models and plan.tokens.x.device.type != "cpu":
        plan = plan._replace(tokens=plan.tokens.with_x(_placed(plan)), models=None)
    tokens, by = plan.tokens, {"mode": plan.mode, "unbiased": plan.unbiased}
    shaping = {
        "models": _merged(plan) if plan.models else None,
        "old_logp": plan.old_logp,
        "ref_logp": plan.ref_logp,
        "estimator": plan.kl,
        "kl_coef": plan.kl_coef,
    }
    scan = {
        "values": plan.values,
        "gamma": plan.gamma,
        "lam": torch.ones_like(plan.gamma) if plan.values is None else plan.lam,
        "bootstrap": plan.bootstrap,
        "masked": plan.masked,
        "baseline": plan.baseline,
        "pivots_first": plan.pivots_first,
        "score": plan.score if plan.pivots_first or not plan.whiten_advantages else None,
        "wants_advantage_moments": plan.whiten_advantages,
    }
    known = of_advantages = None
    if plan.whiten_rewards:
        first = native.advantages(tokens, **shaping, wants_reward_moments=True)
        known = summed(first.reward_moments, plan.sum_moments)
        if shaping["models"] or plan.old_logp is not None:
            tokens = tokens.with_x(first.shaped)
        last = native.advantages(tokens, whitening=native.Whitening(known, **by), **scan)
    else:
        first = last = native.advantages(tokens, **shaping, **scan)
    weight = last.token_weight
    if plan.whiten_advantages:
        of_advantages = summed(last.advantage_moments, plan.sum_moments)
        kept, score = (weight, None) if plan.score is not None and plan.pivots_first else (None, plan.score)
        new = native.whiten_advantages_(
            last.advantages, tokens.mask, native.Whitening(of_advantages, **by), kept, score, plan.baseline
        )
        weight = new if kept is None else kept
    return Advantages(
        last.advantages,
        last.returns,
        first.shaped if shaping["models"] or plan.old_logp is not None else _kept(plan.tokens.x, tokens.mask),
        None if plan.old_logp is None else first.kl,
        None if plan.score is None else weight,
        _sums(known),
        _sums(of_advantages),
    )


def _as_released(plan: _Plan) -> Advantages:
    """`compat`: padding is a token of reward 0 and value 0 until the longest response of the batch ends."""
    tokens = plan.tokens
    if len(tokens.shapes[0]) != 2:
        fail("compat", "be False for flat tokens: the released code knows padded ones", True)
    if plan.values is None or plan.bootstrap is not None or plan.masked != "carry":
        fail("compat", "come with values, without bootstrap and masked='zero'", True)
    rewards, kl = _shaped(plan)
    whitened, known = rewards, None
    if plan.whiten_rewards:
        known = summed(formula.moments(rewards, tokens.mask), plan.sum_moments)
        whitened = formula.whiten(rewards, known, mode="compat", shift_mean=False)
    rows, width = tokens.shapes[0]
    column = torch.arange(width, device=rewards.device)
    within = torch.ones_like(column, dtype=torch.bool)
    if tokens.mask is not None:
        within = tokens.mask.view(rows, width).any(0).flip(0).cummax(0).values.flip(0)  # up to the longest response
    within = within.expand(rows, width).reshape(-1)
    rates = (
        r if r.shape[0] == 1 else r[segment_ids(tokens.cu_seqlens, rewards.shape[0])] for r in (plan.gamma, plan.lam)
    )
    gamma, lam = rates
    value = _kept(plan.values, tokens.mask)
    raw, returns = formula.gae(whitened, value, tokens.cu_seqlens, within, gamma=gamma, lam=lam)
    done, of_advantages = _kept(raw, tokens.mask), None
    if plan.whiten_advantages:
        of_advantages = summed(formula.moments(raw, tokens.mask), plan.sum_moments)
        done = formula.whiten(raw, of_advantages, tokens.mask, mode="compat")
    weight = _pivots(plan, raw if plan.pivots_first else done)
    weight = None if weight is None else weight.float()
    return Advantages(done, returns, rewards, kl, weight, _sums(known), _sums(of_advantages))


def _shaped(plan: _Plan) -> tuple[Tensor, Tensor | None]:
    """Token rewards less the penalty, and the KL."""
    tokens, rewards = plan.tokens, plan.tokens.x
    if plan.models is not None:
        rewards = _placed(plan)
    if plan.old_logp is None:
        return _kept(rewards, tokens.mask), None
    kl = formula.divergence(plan.old_logp, plan.ref_logp, plan.kl, tokens.mask)
    return formula.shaped(rewards, kl, plan.kl_coef, tokens.mask), kl


def _placed(plan: _Plan) -> Tensor:
    """Rewards of all models at their tokens (N,)."""
    tokens = plan.tokens
    mask = torch.ones_like(tokens.x, dtype=torch.bool) if tokens.mask is None else tokens.mask
    placing = {"on_collision": plan.on_collision, "on_empty": plan.on_empty}
    rewards = token_rewards(plan.models, mask=mask, cu_seqlens=tokens.cu_seqlens, **placing).detach()
    return rewards.to(tokens.x.dtype)


def _pivots(plan: _Plan, signs: Tensor) -> Tensor | None:
    """(N,) bool."""
    if plan.score is None:
        return None
    q, baseline = plan.score.float(), torch.full((), plan.baseline, device=signs.device)
    keep = ((signs >= 0) & (q > baseline)) | ((signs < 0) & (q < baseline))
    return keep if plan.tokens.mask is None else keep & plan.tokens.mask


def _merged(plan: _Plan) -> native.Models:
    """All models' segments, one model's after another's."""
    counts = [model.reward.shape[0] for model in plan.models]
    befores = [sum(counts[:k]) for k in range(len(counts))]
    starts = None
    if any(model.start is not None for model in plan.models):  # from 0 on is from the end before on
        starts = [torch.zeros_like(m.end) if m.start is None else m.start for m in plan.models]
        starts = torch.cat(starts).long()
    return native.Models(
        torch.cat([model.reward.detach().double() * model.weight for model in plan.models]),
        torch.cat([model.end for model in plan.models]).long(),
        starts,
        torch.stack([model.cu_segments.long() + k for model, k in zip(plan.models, befores, strict=True)]),
        plan.on_collision == "overwrite",
        plan.on_empty == "drop",
    )


def _tokens(rewards, mask, cu_seqlens) -> tuple[Tokens, list[SegmentRewards] | None]:
    """The layout, with rewards of tokens; of segments, a vector of their dtype."""
    if isinstance(rewards, Tensor):
        return flatten(rewards, mask, cu_seqlens, name="rewards"), None
    models = [rewards] if isinstance(rewards, SegmentRewards) else rewards
    if not isinstance(models, Sequence) or not models:
        found = "an empty one" if isinstance(models, Sequence) else type(rewards).__name__
        fail("rewards", "be a tensor, SegmentRewards or a sequence of them", found, TypeError)
    tokens = layout_of(mask, cu_seqlens)
    models = [check_model(f"rewards[{k}]", model, tokens) for k, model in enumerate(models)]
    double = any(model.reward.dtype == torch.float64 for model in models)
    x = torch.zeros((), dtype=torch.float64 if double else torch.float32, device=tokens.x.device)
    return tokens.with_x(x.expand(tokens.x.shape)), models


def _sums(known: Tensor | None) -> Tensor | None:
    """n, Σx and Σx² of moments (5,)."""
    return None if known is None else known[:3].clone()


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask, x, 0)

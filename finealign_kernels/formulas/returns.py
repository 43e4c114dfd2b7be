"""From rewards to advantages in a flat batch; sequence s has the tokens cu_seqlens[s] <= t < cu_seqlens[s + 1].

    reverse_scan        y_t = x_t + a_t y_(t+1)                      y_t = y_(t+1) at a masked token
    gae                 A_t = r_t + γ V_u - V_t + γλ A_u             u: the next valid token of the sequence
    discounted_returns  G_t = r_t + γ G_u
    whiten              (x - μ) (v + 1e-8)^-½

Tokens with a false mask (N,) are left out: their values, even NaN, have no effect, and the result is 0 there. A NaN at
a valid token reaches the tokens that depend on it by the equation, and no other sequence. Computed in float64; the
result is rounded once, to float32 unless the input is float64. Recurrences take log2(N) doubling steps, not a loop over
time.
"""

import torch
from torch import Tensor

from .divergence import k1, k2, k3
from .pivots import bounds, previous
from .segments import segment_ids, segment_sum

EPSILON = 1e-8  # of a variance
ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
CONSTANT = 2.0**-46  # if v <= CONSTANT Σx²/n, all values are equal within the precision of float32
SAME = 2.0**-104  # the same within the precision of float64


def reverse_scan(x: Tensor, decay: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None) -> Tensor:
    """(N,): y_t = x_t + a_t y_(t+1), with y = 0 behind the end of each sequence. decay a: () or (N,)."""
    y, a = _kept(x, mask, 0), _kept(decay.expand(x.shape), mask, 1)
    place = torch.arange(x.shape[0], device=x.device)
    stop = cu_seqlens.long()[1:][segment_ids(cu_seqlens, x.shape[0])]
    a = torch.where(place + 1 < stop, a, 0)  # no token follows a last token
    step = 1
    while step < x.shape[0]:  # y_t is the result over tokens [t, t + step), a_t the product of their decays
        inside = place[step:] < stop[:-step]
        later, onward = torch.where(inside, y[step:], 0), torch.where(inside, a[step:], 0)
        y = torch.cat([y[:-step] + a[:-step] * later, y[-step:]])
        a = torch.cat([a[:-step] * onward, a[-step:]])
        step *= 2
    return _out(y, x, mask)


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: Tensor,
    lam: Tensor,
    bootstrap: Tensor | None = None,
    masked: str = "carry",
) -> tuple[Tensor, Tensor]:
    """A_t = r_t - V_t + γ V_u + γλ A_u and Ret_t = A_t + V_t, (N,) each; gamma, lam () or (N,), bootstrap (S,).

    At the last valid token of a sequence V_u is the bootstrap and A_u is 0. With masked="zero", masked tokens are steps
    of the recurrence with r = V = 0: if k - 1 of them lie between t and u, all that comes from u is multiplied by
    (γλ)^(k - 1).
    """
    after, found = following(mask, cu_seqlens, rewards)
    r, value = _kept(rewards, mask, 0), _kept(values, mask, 0)
    gamma, lam = gamma.to(r.dtype), lam.to(r.dtype)
    beyond = 0 if bootstrap is None else bootstrap.to(r.dtype)[segment_ids(cu_seqlens, r.shape[0])]
    ahead, decay = torch.where(found, value[after], beyond), gamma * lam
    if masked == "zero":
        through = torch.where(found, decay ** (_gap(after, found) - 1), 1)
        ahead, decay = through * ahead, through * decay
    advantages = reverse_scan(r - value + gamma * ahead, decay, cu_seqlens, mask)
    return _out(advantages, rewards, mask), _out(advantages + value, rewards, mask)


def discounted_returns(
    rewards: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None, *, gamma: Tensor, masked: str = "carry"
) -> Tensor:
    """(N,): G_t = r_t + γ G_u with masked="carry", r_t + γ^k G_u with "zero", where u = t + k is the next valid token.

    With "restart" the return starts again from 0 at every masked token.
    """
    decay = gamma.to(_kept(rewards, mask, 0).dtype)
    if mask is not None and masked == "restart":
        cu_seqlens = runs(mask, cu_seqlens)
    if masked == "zero":
        after, found = following(mask, cu_seqlens, rewards)
        decay = torch.where(found, decay ** _gap(after, found), 1)
    return reverse_scan(rewards, decay, cu_seqlens, mask)


def following(mask: Tensor | None, cu_seqlens: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) int64, (N,) bool: next valid token of the sequence (t itself if none); True if there is one."""
    total = like.shape[0]
    place = torch.arange(total, device=like.device)
    valid = place if mask is None else torch.where(mask, place, total)
    later = torch.cat([valid[1:], valid.new_full((1,), total)])[:total]
    later = later.flip(0).cummin(0).values.flip(0) if total else later
    found = later < cu_seqlens.long()[1:][segment_ids(cu_seqlens, total)]
    return torch.where(found, later, place), found


def runs(mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(N + 2,): bounds of segments that end at every masked token."""
    place = torch.arange(mask.shape[0], device=mask.device)
    neighbours = previous(mask, cu_seqlens) == place - 1
    return bounds(~(mask & neighbours & (place > 0)))[0]


def actions(segment: Tensor, cu_seqlens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Segments as actions of a policy.

    segment (N,): the segment of each token, -1 for none. The tokens of a segment are adjacent, but for masked ones.
    Returns the bounds of the segments (N + 2,), the segment of each token (N,), and as (N,) bool the first token of
    each segment and the tokens that belong to a segment.
    """
    in_segment = segment >= 0 if mask is None else mask & (segment >= 0)
    before = previous(in_segment, cu_seqlens)
    first = in_segment & ((before < 0) | (segment != segment[before]))
    cuts, count = bounds(first)
    return cuts, count, first, in_segment


def moments(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """(5,) float64: n, Σ x, Σ x², μ and Σ (x - μ)² over the valid tokens.

    Σ (x - μ)² is computed in a second pass, as Σ d² - (Σ d)²/n with d = x - (the rounded μ). This keeps its digits if
    the mean is far from 0. The first three numbers of parts of a batch can be added up.
    """
    kept = _kept(x, mask, 0)
    n = kept.new_full((), x.shape[0]) if mask is None else mask.sum().to(kept.dtype)
    many = n.clamp(min=1)
    near = kept.sum() / many
    away = _kept(kept - near, mask, 0)
    rest = away.sum()
    spread = (away.square().sum() - rest * rest / many).clamp(min=0)
    return torch.stack([n, kept.sum(), kept.square().sum(), near + rest / many, spread])


def moments_by_sums(triple: Tensor) -> Tensor:
    """The result of `moments` (5,) from n, Σx and Σx² only, which is what a sum over ranks gives.

    Σ (x - μ)² = Σx² - (Σx)²/n, with a relative error of about 2^-52 (1 + μ²/v). If it is <= 2^-46 Σx², almost all of
    its digits are lost, and it is set to 0.
    """
    n = triple[0].clamp(min=1)
    mean, square = triple[1] / n, triple[2] / n
    v = (square - mean * mean).clamp(min=0)
    v = torch.where((v <= CONSTANT * square) & square.isfinite(), 0, v)
    return torch.cat([triple, torch.stack([mean, n * v])])


def standard(found: Tensor, mode: str, unbiased: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and scale of whitening, from the `moments` of values of a dtype. The scale is 0 if all values are the same.

        v = Σ (x - μ)² / n, times n / (n - 1) if unbiased
        scale = (v + 1e-8)^-½  "std",   max(v, 1e-8)^-½  "clamp",   (√v + 1e-8)^-½  "compat"

    The scale is 0 if n < 2 or v <= 2^-46 Σx²/n (2^-104 for float64): a deviation of less than 2^-23 (2^-52) of the
    values is rounding. The values are measured by their root mean square, not by their maximum, which a sum over ranks
    does not give. The scale is NaN if n >= 2 and Σx² overflows.
    """
    n = found[0].clamp(min=1)
    square, v = found[2] / n, found[4] / n
    same = SAME if dtype == torch.float64 else CONSTANT
    nothing = (found[0] < 2) | ((v <= same * square) & square.isfinite())
    v = torch.where(square == torch.inf, torch.nan, v)  # the sum has overflowed
    if unbiased:
        v = v * (n / (n - 1).clamp(min=1))
    spread = {"std": lambda: v + EPSILON, "clamp": lambda: v.clamp(min=EPSILON), "compat": lambda: v.sqrt() + EPSILON}
    return found[3], torch.where(nothing, 0, spread[mode]().rsqrt())


def whiten(
    x: Tensor,
    found: Tensor,
    mask: Tensor | None = None,
    *,
    mode: str = "std",
    unbiased: bool = False,
    shift_mean: bool = True,
) -> Tensor:
    """(N,): (x - μ) scale, plus μ unless shift_mean; found (5,) is `moments` of x, or of a batch that x is part of."""
    mean, scale = standard(found, mode, unbiased, x.dtype)
    away = torch.where(scale == 0, 0, (_kept(x, mask, 0) - mean) * scale)
    return _out(away if shift_mean else away + mean, x, mask)


def divergence(old_logp: Tensor, ref_logp: Tensor, estimator: str, mask: Tensor | None = None) -> Tensor:
    """(N,) nats: the estimate k1, k2 or k3 (divergence.py) of KL, from d = old_logp - ref_logp."""
    value, _ = ESTIMATORS[estimator](_kept(old_logp, mask, 0) - _kept(ref_logp, mask, 0))
    return _out(value, old_logp, mask)


def shaped(rewards: Tensor, kl: Tensor, kl_coef: float, mask: Tensor | None = None) -> Tensor:
    """(N,): r_t - β kl_t, β = kl_coef. With β = 0 the rewards are returned unchanged, even if kl is NaN."""
    r = _kept(rewards, mask, 0)
    return _out(r - kl_coef * _kept(kl, mask, 0) if kl_coef else r, rewards, mask)


def action_sums(x: Tensor, cuts: Tensor, count: Tensor, in_segment: Tensor) -> Tensor:
    """(N,): the sum of x over the token's segment; 0 at tokens without a segment. The arguments come from `actions`."""
    return torch.where(in_segment, segment_sum(x, cuts, in_segment)[count], 0)


def _gap(after: Tensor, found: Tensor) -> Tensor:
    """(N,): distance in tokens to the next valid one; 1 where there is none."""
    place = torch.arange(after.shape[0], device=after.device)
    return torch.where(found, after - place, 1)


def _kept(x: Tensor, mask: Tensor | None, other: float) -> Tensor:
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # Metal has no float64
    return (x if mask is None else torch.where(mask, x, other)).to(wide)


def _out(y: Tensor, like: Tensor, mask: Tensor | None) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return (y if mask is None else torch.where(mask, y, 0)).to(dtype)

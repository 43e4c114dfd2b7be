"""From rewards to advantages over a flat batch, sequence s at [cu_seqlens[s], cu_seqlens[s + 1]).

    reverse_scan        y_t = x_t + a_t y_(t+1)                      a masked token is the identity
    gae                 A_t = r_t + γ V_u - V_t + γλ A_u             u the next valid token of the sequence
    discounted_returns  G_t = r_t + γ G_u
    whiten              (x - μ) (v + 1e-8)^-½

mask (N,) bool leaves tokens out, by selection: what stands there, NaN too, changes nothing, and 0 is returned there. A
NaN at a valid token reaches every token that the equation lets it reach, and no other sequence. Arithmetic is float64,
the result is rounded once, to float32 for anything but float64. No loop over time: log2(N) steps of doubling.
"""

import torch
from torch import Tensor

from .divergence import k1, k2, k3
from .pivots import bounds, previous
from .segments import segment_ids, segment_sum

EPSILON = 1e-8  # of a variance
ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
CONSTANT = 2.0**-46  # v <= CONSTANT Σx²/n: the values are one value, as far as float32 can tell


def reverse_scan(x: Tensor, decay: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None) -> Tensor:
    """(N,): y_t = x_t + a_t y_(t+1), from 0 at the end of each sequence. decay (), or (N,)."""
    y, a = _kept(x, mask, 0), _kept(decay.expand(x.shape), mask, 1)
    place = torch.arange(x.shape[0], device=x.device)
    stop = cu_seqlens.long()[1:][segment_ids(cu_seqlens, x.shape[0])]
    a = torch.where(place + 1 < stop, a, 0)  # behind a last token stands nothing, whatever its decay is
    step = 1
    while step < x.shape[0]:  # y_t holds the sum over [t, t + step), a_t the product of its decays
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

    The last valid token of a sequence takes bootstrap for V_u and no A_u. masked "zero": the recurrence steps through
    masked tokens with r = V = 0, so that k - 1 of them before u multiply what comes from u by (γλ)^(k - 1).
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
    """(N,): G_t = r_t + γ G_u ("carry"), r_t + γ^k G_u ("zero"), or G_t = 0 again at every masked token ("restart")."""
    decay = gamma.to(_kept(rewards, mask, 0).dtype)
    if mask is not None and masked == "restart":
        cu_seqlens = runs(mask, cu_seqlens)
    if masked == "zero":
        after, found = following(mask, cu_seqlens, rewards)
        decay = torch.where(found, decay ** _gap(after, found), 1)
    return reverse_scan(rewards, decay, cu_seqlens, mask)


def following(mask: Tensor | None, cu_seqlens: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) int64, bool: where the next valid token of t's sequence stands, and if there is one; else t itself."""
    total = like.shape[0]
    place = torch.arange(total, device=like.device)
    valid = place if mask is None else torch.where(mask, place, total)
    later = torch.cat([valid[1:], valid.new_full((1,), total)])[:total]
    later = later.flip(0).cummin(0).values.flip(0) if total else later
    found = later < cu_seqlens.long()[1:][segment_ids(cu_seqlens, total)]
    return torch.where(found, later, place), found


def runs(mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(N + 2,): bounds that cut sequences at every masked token."""
    place = torch.arange(mask.shape[0], device=mask.device)
    neighbours = previous(mask, cu_seqlens) == place - 1
    return bounds(~(mask & neighbours & (place > 0)))[0]


def actions(segment: Tensor, cu_seqlens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Segments as actions: their bounds (N + 2,), each token's (N,), its first tokens and the tokens of any (N,) bool.

    segment (N,): the segment of each token, -1 for none; tokens of one segment stand together, masked ones apart.
    """
    of_any = segment >= 0 if mask is None else mask & (segment >= 0)
    before = previous(of_any, cu_seqlens)
    first = of_any & ((before < 0) | (segment != segment[before]))
    cuts, count = bounds(first)
    return cuts, count, first, of_any


def moments(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """(3,) float64: n, Σ x, Σ x² over the valid tokens. Triples of parts of a batch add up."""
    kept = _kept(x, mask, 0)
    n = kept.new_full((), x.shape[0]) if mask is None else mask.sum().to(kept.dtype)
    return torch.stack([n, kept.sum(), kept.square().sum()])


def standard(triple: Tensor, mode: str, unbiased: bool) -> tuple[Tensor, Tensor]:
    """Mean and scale of whitening, from n, Σx, Σx². The scale is 0 where there is nothing to scale by.

        v = max(0, Σx²/n - μ²), times n / (n - 1) if unbiased
        scale = (v + 1e-8)^-½  "std",   max(v, 1e-8)^-½  "clamp",   (√v + 1e-8)^-½  "compat"

    0 where n < 2 or v <= 2^-46 Σx²/n. For float32 that is v <= (2^-23 max|x|)² with the root mean square for the
    maximum, which a sum over ranks does not give: where v is that small the two differ by less than a factor of 2. It
    is also where the cancellation in Σx²/n - μ² leaves v no digits to speak of, so float64 has the same bound. NaN
    where n >= 2 and Σx² overflows.
    """
    n = triple[0].clamp(min=1)
    mean, square = triple[1] / n, triple[2] / n
    v = (square - mean * mean).clamp(min=0)
    nothing = (triple[0] < 2) | ((v <= CONSTANT * square) & square.isfinite())
    v = torch.where(square == torch.inf, torch.nan, v)  # of sums that overflow nothing is known
    if unbiased:
        v = v * (n / (n - 1).clamp(min=1))
    spread = {"std": lambda: v + EPSILON, "clamp": lambda: v.clamp(min=EPSILON), "compat": lambda: v.sqrt() + EPSILON}
    return mean, torch.where(nothing, 0, spread[mode]().rsqrt())


def whiten(
    x: Tensor,
    triple: Tensor,
    mask: Tensor | None = None,
    *,
    mode: str = "std",
    unbiased: bool = False,
    shift_mean: bool = True,
) -> Tensor:
    """(N,): (x - μ) scale, plus μ unless shift_mean; triple is that of `moments`, or a sum of several."""
    mean, scale = standard(triple, mode, unbiased)
    away = torch.where(scale == 0, 0, (_kept(x, mask, 0) - mean) * scale)
    return _out(away if shift_mean else away + mean, x, mask)


def divergence(old_logp: Tensor, ref_logp: Tensor, estimator: str, mask: Tensor | None = None) -> Tensor:
    """(N,) nats: divergence.py's k1, k2 or k3 of d = old_logp - ref_logp."""
    value, _ = ESTIMATORS[estimator](_kept(old_logp, mask, 0) - _kept(ref_logp, mask, 0))
    return _out(value, old_logp, mask)


def shaped(rewards: Tensor, kl: Tensor, kl_coef: float, mask: Tensor | None = None) -> Tensor:
    """(N,): r_t - β kl_t; a coefficient of 0 leaves the rewards as they are, whatever kl is."""
    r = _kept(rewards, mask, 0)
    return _out(r - kl_coef * _kept(kl, mask, 0) if kl_coef else r, rewards, mask)


def action_sums(x: Tensor, cuts: Tensor, count: Tensor, of_any: Tensor) -> Tensor:
    """(N,): at each token the sum over its segment's tokens, 0 at tokens of none; arguments as `actions` gives them."""
    return torch.where(of_any, segment_sum(x, cuts, of_any)[count], 0)


def _gap(after: Tensor, found: Tensor) -> Tensor:
    """Tokens from t to the next valid one; 1 where there is none."""
    place = torch.arange(after.shape[0], device=after.device)
    return torch.where(found, after - place, 1)


def _kept(x: Tensor, mask: Tensor | None, other: float) -> Tensor:
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # Metal has no float64
    return (x if mask is None else torch.where(mask, x, other)).to(wide)


def _out(y: Tensor, like: Tensor, mask: Tensor | None) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return (y if mask is None else torch.where(mask, y, 0)).to(dtype)

"""Log-probability of a label under a softmax over logits, and the other statistics of a row of logits.

z = softcap(scale * (x + bias)) / temperature,  softcap(u) = c tanh(u / c)

A logit of -inf bans its token and stays -inf. If all tokens of a row are banned, its outputs are NaN and its gradient
is 0. If a row holds an inf or a NaN, its outputs and its gradient are NaN.

    lse = log Σ e^z    logp = z_label - lse    H = lse - Σ p z    log Σ p²    mean of z    label is the first argmax

The state of a row is (m, R, T, Q): m is the maximum, and R = Σ e^(z-m), T = Σ (z-m) e^(z-m), Q = Σ e^(2(z-m)) are sums
over all tokens except the first one that attains m. Then lse = m + log1p(R). Leaving the maximum out of R keeps the
digits of 1 - p when p is close to 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SKIP, BAD = -2, -1  # target of a row that is left out, and of a row whose label is out of range
ENTROPY, SQUARES, MEAN = 1, 2, 4  # flags: what a pass over a tile computes besides m and R
PARTS = 6  # numbers a row has in each tile: m, R, T, Q, sum of z / UNIT, count of tokens that are not banned
# Logits are summed in this unit: even 2^24 of the largest float32 then have a finite sum. A power of two is exact.
UNIT = 2.0**24


class Head(NamedTuple):
    """How a product of hidden state and head becomes a logit."""

    scale: float = 1.0
    softcap: float = 0.0  # 0: none
    inv_temperature: float | Tensor = 1.0  # one number, or one for each row (N,)
    support: Tensor | None = None  # (N, K) ids of the tokens in each row's softmax; None: all tokens

    @property
    def numbers(self) -> tuple[float, float, float]:
        """scale, softcap, 1 / temperature."""
        return self[:3]

    @property
    def by_row(self) -> bool:
        """True if it has a temperature or a support for each row."""
        return isinstance(self.inv_temperature, Tensor) or self.support is not None

    def rows(self, at) -> "Head":
        """The head of the rows `at`, a slice or an index."""
        if at is None or not self.by_row:
            return self
        t = self.inv_temperature
        support = None if self.support is None else self.support[at]
        return self._replace(inv_temperature=t[at] if isinstance(t, Tensor) else t, support=support)

    @property
    def temperature_factor(self) -> float | Tensor:
        """1 / temperature, in a shape that multiplies logits (..., V)."""
        t = self.inv_temperature
        return t[:, None] if isinstance(t, Tensor) else t


class Rows(NamedTuple):
    """The statistics of each row, (N,) each, in nats."""

    logp: Tensor
    lse: Tensor
    entropy: Tensor
    log_sum_sq_probs: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    m: Tensor  # the maximum
    l: Tensor  # log1p(R) = lse - m; inf where all tokens are banned
    label_slope: Tensor  # 1 - tanh²(y / c) at the label; 1 without softcap
    allowed: Tensor  # number of tokens that are not banned; 0 where the mean is not computed


def outside(support: Tensor, col0: int, columns: int) -> Tensor:
    """(n, columns) bool: True for the tokens of [col0, col0 + columns) that are not in a row's support (n, K).

    Ids outside that range, for example negative ones, have no effect.
    """
    local = support.long() - col0
    local = torch.where((local >= 0) & (local < columns), local, columns)
    found = torch.ones(support.shape[0], columns + 1, dtype=torch.bool, device=support.device)
    return found.scatter_(1, local, False)[:, :columns]


def logits(x: Tensor, bias: Tensor | None, head: Head) -> Tensor:
    """Products of hidden state and head (..., V) to logits z."""
    y = x if bias is None else x + bias
    y = y * head.scale if head.scale != 1 else y
    t = head.temperature_factor
    if not head.softcap:
        return y * t if isinstance(t, Tensor) or t != 1 else y
    capped = head.softcap * torch.tanh(y / head.softcap) * t
    return torch.where(y == -torch.inf, y, capped)


def slope(x: Tensor, bias: Tensor | None, head: Head) -> Tensor:
    """1 - tanh²(y / c) of products (..., V), the derivative of the soft cap; 1 without one.

    Computed as 4 e / (1 + e)² with e = exp(-2 |y / c|), which does not cancel for large y.
    """
    if not head.softcap:
        return torch.ones_like(x)
    y = (x if bias is None else x + bias) * head.scale
    e = torch.exp(-2 * (y / head.softcap).abs())
    return 4 * e / (1 + e).square()


def reference(x: Tensor, bias: Tensor | None, target: Tensor, head: Head) -> Rows:
    """The definition, differentiable to any order. x (N, V) products; target (N,) label, SKIP or BAD."""
    read = (target != SKIP)[:, None]
    z = logits(torch.where(read, x, 0), bias, head)
    if head.support is not None:
        z = z.masked_fill(outside(head.support, 0, z.shape[-1]), -torch.inf)
    z = torch.where(z == -torch.inf, z.detach(), z)  # a banned token has no gradient, not even as the label
    label = target.clamp(min=0)[:, None]
    logp_all, m = torch.log_softmax(z, -1), z.detach().amax(-1)
    allowed = z != -torch.inf
    p = logp_all.exp()
    safe = torch.where(allowed, logp_all, 0)  # p log p = 0 where p = 0, in value and gradient
    lse = torch.where(m == -torch.inf, torch.nan, torch.logsumexp(z, -1))
    rows = Rows(
        logp=logp_all.gather(1, label)[:, 0],
        lse=lse,
        entropy=-(p * safe).sum(-1),
        log_sum_sq_probs=torch.logsumexp(2 * logp_all.detach(), -1),
        mean_logits=torch.where(allowed, z / UNIT, 0).sum(-1) / allowed.sum(-1) * UNIT,
        is_top1=first_argmax(z.detach()) == target,
        m=m,
        l=lse.detach() - m,
        label_slope=slope(x.detach(), bias, head).gather(1, label)[:, 0],
        allowed=allowed.sum(-1).to(z.dtype),
    )
    return settle(rows, target)


def first_argmax(z: Tensor) -> Tensor:
    """Index of the first maximum of each row. torch.argmax may return any of several equal maxima."""
    columns = torch.arange(z.shape[-1], device=z.device)
    return torch.where(z == z.amax(-1, keepdim=True), columns, z.shape[-1]).amin(-1)


def tile_state(z: Tensor, col0: int, want: int) -> tuple[Tensor, Tensor, Tensor]:
    """The state of a tile of logits z (n, C), whose first column is token col0.

    want adds up the flags ENTROPY, SQUARES, MEAN. Returns part (n, PARTS), the column of the first maximum (n,), and
    e = exp(z - m) (n, C).
    """
    m = z.amax(-1)
    finite = torch.where(m.isinf(), 0, m)[:, None]
    index = first_argmax(z).clamp(max=z.shape[-1] - 1)
    d = z - finite
    e = d.exp()
    others = e.scatter(1, index[:, None], 0)
    part = z.new_zeros(z.shape[0], PARTS)
    part[:, 0] = m
    part[:, 1] = others.sum(-1)
    part[:, 1] = torch.where((m == torch.inf) | m.isnan(), torch.nan, part[:, 1])
    if want & ENTROPY:
        part[:, 2] = torch.where(others > 0, d * others, 0).sum(-1)
    if want & SQUARES:
        part[:, 3] = (others * others).sum(-1)
    if want & MEAN:
        allowed = z != -torch.inf
        part[:, 4] = torch.where(allowed, z / UNIT, 0).sum(-1)
        part[:, 5] = allowed.sum(-1)
    return part, col0 + index, e


class State(NamedTuple):
    """The state of each row over a part of the vocabulary, for example over several tiles after `merge`."""

    part: Tensor  # (N, PARTS)
    first: Tensor  # (N,) id of the first maximum
    label: Tensor  # (N, 2) logit and slope of the label, NaN where the label is in another part


def merge(part: Tensor, first: Tensor, want: int) -> tuple[Tensor, Tensor]:
    """Merges the states of tiles (N, tiles, PARTS) and their first maxima (N, tiles) to (N, PARTS) and (N,).

    The owner is the first tile that holds the maximum m; d = m_t - m for another tile t:
    R = R_owner + Σ (1 + R_t) e^d,   T = T_owner + Σ (T_t + d (1 + R_t)) e^d,   Q = Q_owner + Σ (1 + Q_t) e^(2d).
    """
    m_tile, r_tile, t_tile, q_tile, z_tile, n_tile = part.unbind(-1)
    m = m_tile.amax(-1)
    tiles = torch.arange(part.shape[1], device=part.device)
    holds = m_tile == m[:, None]
    owner = tiles == torch.where(holds, tiles, part.shape[1]).amin(-1, keepdim=True)
    dead = (m_tile == -torch.inf) & (r_tile == 0)  # a tile in which all tokens are banned adds nothing
    d = torch.where(dead | owner, 0, m_tile - m[:, None])
    w = torch.where(dead, 0, d.exp())
    one = torch.where(owner, 0, 1 + r_tile)
    r = (torch.where(owner, r_tile, one) * w).sum(-1)
    t = q = total = count = torch.zeros_like(m)
    if want & ENTROPY:
        t = torch.where(w > 0, (t_tile + d * one) * w, 0).sum(-1)
    if want & SQUARES:
        q = ((q_tile + torch.where(owner, 0, 1)) * w * w).sum(-1)
    if want & MEAN:
        total, count = z_tile.sum(-1), n_tile.sum(-1)
    # a row of NaN has no first maximum
    top = torch.where(holds, first, torch.iinfo(first.dtype).max).amin(-1)
    return torch.stack([m, r, t, q, total, count], -1), top


def combine(part: Tensor, first: Tensor, label: Tensor, target: Tensor, want: int) -> Rows:
    """The statistics of rows from the states of tiles (N, tiles, PARTS), first maxima (N, tiles) and label (N, 2)."""
    part, top = merge(part, first, want)
    m, r, t, q, total, count = part.unbind(-1)
    none, l = (m == -torch.inf) & (r == 0), torch.where(m.isinf(), torch.nan, r).log1p()
    entropy = log_sum_sq = mean = torch.zeros_like(m)
    if want & ENTROPY:
        entropy = l - t / (1 + r)
    if want & SQUARES:
        log_sum_sq = q.log1p() - 2 * l
    if want & MEAN:
        mean = total / count * UNIT
    kept = torch.where(none, torch.inf, l)
    rows = Rows((label[:, 0] - m) - l, m + l, entropy, log_sum_sq, mean, top == target, m, kept, label[:, 1], count)
    return settle(rows, target)


def settle(rows: Rows, target: Tensor) -> Rows:
    """Sets the outputs of a row with target SKIP to 0, and those of a row with target BAD to NaN."""
    skip, bad = target == SKIP, target == BAD
    floats = [torch.where(skip, 0, torch.where(bad, torch.nan, x)) for x in rows if x.is_floating_point()]
    return Rows(*floats[:5], rows.is_top1 & ~skip & ~bad, *floats[5:])


class Coef(NamedTuple):
    """What the gradient of a row is computed from, (n,) each: gradients of logp, lse and H, and the row's state."""

    dlogp: Tensor
    dlse: Tensor
    dentropy: Tensor
    m: Tensor
    l: Tensor
    entropy: Tensor
    logp: Tensor
    label_slope: Tensor
    spread: Tensor | None = None  # gradient of the mean of z divided by the number of tokens that are not banned

    def active(self) -> Tensor:
        """(n,) bool: rows whose upstream gradient is not 0 (NaN included)."""
        active = torch.stack(self[:3]).ne(0).any(0)
        return active if self.spread is None else active | (self.spread != 0)

    def stacked(self) -> Tensor:
        """All fields as one tensor (8, n), or (9, n) with a spread: the argument of a row kernel."""
        return torch.stack([x for x in self if x is not None])


def coefficients(dlogp, dlse, dentropy, dmean, logp, entropy, m, l, label_slope, allowed) -> Coef:
    """Coef from upstream gradients (n,), each None if it is 0 everywhere, and from the state of rows.

    A row in which all tokens are banned has outputs of NaN and a gradient of 0.
    """
    zero, none = torch.zeros_like(m), l == torch.inf
    grads = (zero if d is None else torch.where(none, 0, d.to(m.dtype)) for d in (dlogp, dlse, dentropy))
    spread = None if dmean is None else torch.where(none | (allowed == 0), 0, dmean.to(m.dtype) / allowed)
    return Coef(*grads, m, l, entropy, logp, label_slope, spread)


def tile_gradient(
    src: Tensor, e_max: Tensor | None, bias: Tensor | None, target: Tensor, coef: Coef, col0: int, head: Head
) -> Tensor:
    """dL/dx of one tile (n, C). src is the products x, or exp(z - e_max) where e_max (n,) is given.

    dz_v = p_v (k - g) - h p_v (log p_v + H) + u            for every token v but the label; 0 if v is banned
    dz_label = -g expm1(logp) + k p - h p (logp + H) + u    from logp, not from src; 0 if the label is banned
    dx = dz (1 - tanh²(y/c)) scale / temperature

    g, k, h are the gradients of logp, lse and H. u is the gradient of the mean of z divided by the number of tokens
    that are not banned. Rows with u need the products: from exp(z - e_max) = 0 one cannot tell whether a token is
    banned.
    """
    g, k, h, m, l, entropy, logp, label_slope = (x[:, None] for x in coef[:8])
    spread = 0
    if e_max is None:
        z = logits(src, bias, head)
        if coef.spread is not None:
            spread = torch.where(z == -torch.inf, 0, coef.spread[:, None])
        logp_all = (z - m) - l
        p, curve = logp_all.exp(), slope(src, bias, head)
    else:
        shift = e_max[:, None] - m - l
        p = src * torch.where(e_max == -torch.inf, 0, shift.squeeze(1).exp())[:, None]
        logp_all = src.log() + shift
        bound = head.temperature_factor * head.softcap
        curve = 1 - ((src.log() + e_max[:, None]) / bound).square() if head.softcap else 1
    live = p > 0
    dz = p * (k - g) - torch.where(live & (h != 0), h * p * (logp_all + entropy), 0)
    local = target - col0
    here = (target >= 0) & (local >= 0) & (local < src.shape[1])
    p_label = logp.exp()
    curved = torch.where(h != 0, h * p_label * (logp + entropy), 0)
    dz_label = -g * torch.expm1(logp) + k * p_label - curved
    dz_label = dz_label if coef.spread is None else dz_label + coef.spread[:, None]
    dz_label = torch.where(logp == -torch.inf, 0, dz_label)
    is_label = (torch.arange(src.shape[1], device=src.device) == local[:, None]) & here[:, None]
    dz = torch.where(is_label, dz_label, torch.where(live | p.isnan(), dz, 0) + spread)
    if head.softcap:
        dz = torch.where(dz == 0, 0, dz * torch.where(is_label, label_slope, curve))
    dx = dz * (head.scale * head.temperature_factor)
    return torch.where(((target != SKIP) & coef.active())[:, None], dx, 0)

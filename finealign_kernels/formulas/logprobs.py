"""Log-probability of a label under a softmax over logits, and what else one pass over a row of logits gives.

z = softcap(scale * (x + bias)) / temperature,  softcap(u) = c tanh(u / c),  -inf stays -inf (a banned token)
A row whose every token is banned is NaN, with a gradient of 0; one with an inf or a NaN is NaN, and its gradient too.

    lse = log Σ e^z    logp = z_label - lse    H = lse - Σ p z    log Σ p²    mean of z    label is the first argmax

The state of a row is (m, R, T, Q) with the maximum apart: R = Σ e^(z-m), T = Σ (z-m) e^(z-m) and Q = Σ e^(2(z-m)) over
all tokens but the first that attains m. Then lse = m + log1p(R), and 1 - p of a confident token keeps its digits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SKIP, BAD = -2, -1  # targets of a row that is not read, and of one whose label is out of range
ENTROPY, SQUARES, MEAN = 1, 2, 4  # what a pass over a tile is asked for beside m and R
PARTS = 6  # a row's partial of one tile: m, R, T, Q, sum of z / UNIT, number of tokens that are not banned
UNIT = 2.0**24  # a power of two, so that no bit depends on it; 2^24 of the largest float32 have a sum that is finite


class Head(NamedTuple):
    """How a raw product becomes a logit."""

    scale: float = 1.0
    softcap: float = 0.0  # 0: none
    inv_temperature: float | Tensor = 1.0  # or (N,), of each row
    support: Tensor | None = None  # (N, K) ids of the tokens that a row's softmax is over; None: all

    @property
    def numbers(self) -> tuple[float, float, float]:
        """scale, softcap, 1 / temperature."""
        return self[:3]

    @property
    def by_row(self) -> bool:
        """Does it hold anything of each row."""
        return isinstance(self.inv_temperature, Tensor) or self.support is not None

    def rows(self, at) -> "Head":
        """The head of some rows: a slice, or an index."""
        if at is None or not self.by_row:
            return self
        t = self.inv_temperature
        support = None if self.support is None else self.support[at]
        return self._replace(inv_temperature=t[at] if isinstance(t, Tensor) else t, support=support)

    @property
    def heat(self) -> float | Tensor:
        """1 / temperature as a factor of (..., V)."""
        t = self.inv_temperature
        return t[:, None] if isinstance(t, Tensor) else t


class Rows(NamedTuple):
    """What is known of each row, (N,) each; nats."""

    logp: Tensor
    lse: Tensor
    entropy: Tensor
    log_sum_sq_probs: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    m: Tensor  # the maximum
    l: Tensor  # log1p(R) = lse - m; inf of a row without a token
    label_slope: Tensor  # 1 - tanh²(y / c) at the label; 1 without softcap
    allowed: Tensor  # number of tokens that are not banned, where the mean is wanted; else 0


def outside(support: Tensor, col0: int, columns: int) -> Tensor:
    """(n, columns) bool: which tokens of [col0, col0 + columns) are not in a row's support (n, K). Other ids, negative
    ones say, are those of no token."""
    local = support.long() - col0
    local = torch.where((local >= 0) & (local < columns), local, columns)
    found = torch.ones(support.shape[0], columns + 1, dtype=torch.bool, device=support.device)
    return found.scatter_(1, local, False)[:, :columns]


def logits(x: Tensor, bias: Tensor | None, head: Head) -> Tensor:
    """Raw products (..., V) to logits z."""
    y = x if bias is None else x + bias
    y = y * head.scale if head.scale != 1 else y
    if not head.softcap:
        return y * head.heat if isinstance(head.heat, Tensor) or head.heat != 1 else y
    capped = head.softcap * torch.tanh(y / head.softcap) * head.heat
    return torch.where(y == -torch.inf, y, capped)


def slope(x: Tensor, bias: Tensor | None, head: Head) -> Tensor:
    """1 - tanh²(y / c) of raw products (..., V), as 4 e / (1 + e)² with e = exp(-2 |y / c|); 1 without softcap."""
    if not head.softcap:
        return torch.ones_like(x)
    y = (x if bias is None else x + bias) * head.scale
    e = torch.exp(-2 * (y / head.softcap).abs())
    return 4 * e / (1 + e).square()


def reference(x: Tensor, bias: Tensor | None, target: Tensor, head: Head) -> Rows:
    """The definition, differentiable to any order. x (N, V) raw products; target (N,) label, SKIP or BAD."""
    read = (target != SKIP)[:, None]
    z = logits(torch.where(read, x, 0), bias, head)
    if head.support is not None:
        z = z.masked_fill(outside(head.support, 0, z.shape[-1]), -torch.inf)
    z = torch.where(z == -torch.inf, z.detach(), z)  # a banned token has no gradient, as a label neither
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
    """Index of the first maximum of each row; torch.argmax may return any."""
    columns = torch.arange(z.shape[-1], device=z.device)
    return torch.where(z == z.amax(-1, keepdim=True), columns, z.shape[-1]).amin(-1)


def tile_state(z: Tensor, col0: int, want: int) -> tuple[Tensor, Tensor, Tensor]:
    """State of a tile of logits z (n, C): part (n, PARTS), column of the first maximum (n,), e = exp(z - m) (n, C)."""
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
    """What a part of the vocabulary says of each row: of several tiles after `merge`."""

    part: Tensor  # (N, PARTS)
    first: Tensor  # (N,) id of the first maximum
    label: Tensor  # (N, 2) the label's logit and slope, NaN where the label is elsewhere


def merge(part: Tensor, first: Tensor, want: int) -> tuple[Tensor, Tensor]:
    """States of tiles (N, tiles, PARTS) and first maxima (N, tiles) to those of their union, (N, PARTS) and (N,).

    With the owner the first tile that holds the maximum and d = m_t - m of another tile:
    R = R_owner + Σ (1 + R_t) e^d,   T = T_owner + Σ (T_t + d (1 + R_t)) e^d,   Q = Q_owner + Σ (1 + Q_t) e^(2d).
    """
    m_tile, r_tile, t_tile, q_tile, z_tile, n_tile = part.unbind(-1)
    m = m_tile.amax(-1)
    tiles = torch.arange(part.shape[1], device=part.device)
    holds = m_tile == m[:, None]
    owner = tiles == torch.where(holds, tiles, part.shape[1]).amin(-1, keepdim=True)
    dead = (m_tile == -torch.inf) & (r_tile == 0)  # a tile of banned tokens adds nothing
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
    # a row that holds no number has no first maximum
    top = torch.where(holds, first, torch.iinfo(first.dtype).max).amin(-1)
    return torch.stack([m, r, t, q, total, count], -1), top


def combine(part: Tensor, first: Tensor, label: Tensor, target: Tensor, want: int) -> Rows:
    """Tiles' states (N, tiles, PARTS), first maxima (N, tiles), the label's logit and slope (N, 2) to statistics."""
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
    """0 for a row that is not read, NaN for one whose label is out of range."""
    skip, bad = target == SKIP, target == BAD
    floats = [torch.where(skip, 0, torch.where(bad, torch.nan, x)) for x in rows if x.is_floating_point()]
    return Rows(*floats[:5], rows.is_top1 & ~skip & ~bad, *floats[5:])


class Coef(NamedTuple):
    """What the gradient of a row is made of, (n,) each: upstream gradients of logp, lse and H, and the row's state."""

    dlogp: Tensor
    dlse: Tensor
    dentropy: Tensor
    m: Tensor
    l: Tensor
    entropy: Tensor
    logp: Tensor
    label_slope: Tensor
    spread: Tensor | None = None  # upstream gradient of the mean of z, over the number of tokens that are not banned

    def active(self) -> Tensor:
        """Rows with a gradient. A NaN is one."""
        active = torch.stack(self[:3]).ne(0).any(0)
        return active if self.spread is None else active | (self.spread != 0)

    def stacked(self) -> Tensor:
        """(8, n), or (9, n) with a spread: what a row kernel takes."""
        return torch.stack([x for x in self if x is not None])


def coefficients(dlogp, dlse, dentropy, dmean, logp, entropy, m, l, label_slope, allowed) -> Coef:
    """Coef of upstream gradients (n,), None for one that is 0 everywhere, and of a row's state.

    A row without a token, every one banned, has outputs of NaN and a gradient of 0.
    """
    zero, none = torch.zeros_like(m), l == torch.inf
    grads = (zero if d is None else torch.where(none, 0, d.to(m.dtype)) for d in (dlogp, dlse, dentropy))
    spread = None if dmean is None else torch.where(none | (allowed == 0), 0, dmean.to(m.dtype) / allowed)
    return Coef(*grads, m, l, entropy, logp, label_slope, spread)


def tile_gradient(
    src: Tensor, e_max: Tensor | None, bias: Tensor | None, target: Tensor, coef: Coef, col0: int, head: Head
) -> Tensor:
    """dL/dx of one tile (n, C), from raw products src, or from src = exp(z - e_max) where e_max (n,) is given.

    dz_v = p_v (k - g) - h p_v (log p_v + H) + u for all v but the label, 0 for a banned token
    dz_label = -g expm1(logp) + k p - h p (logp + H) + u: never from e, and 0 for a banned label
    dx = dz (1 - tanh²(y/c)) scale / temperature

    g, k, h: upstream of logp, lse, H;  u: of the mean of z, over the number of tokens that are not banned. Rows with a
    u come from src alone: where e is 0 the token may be banned or not.
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
        curve = 1 - ((src.log() + e_max[:, None]) / (head.heat * head.softcap)).square() if head.softcap else 1
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
    dx = dz * (head.scale * head.heat)
    return torch.where(((target != SKIP) & coef.active())[:, None], dx, 0)

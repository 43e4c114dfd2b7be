"""Losses of one margin m (nats). Each returns (value, slope), slope = d value / d m, elementwise.

m is infinite where a log-prob is -inf or a sum overflows. Value and slope are then the limits of the formula, which may
be infinite too. The difference of two infinite scores with the same sign has no limit: it is NaN, and so is its loss.

The last functions, from `log_odds` on, transform a score before the margin is formed. They return (value, slope) with
respect to the score.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LARGEST_EXPONENT = 80.0  # e^80 is still a float32


def times(weight: float | Tensor, x: Tensor) -> Tensor:
    """weight · x, and 0 where the weight is 0, also if x is infinite. (0 · inf would be NaN.)"""
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 0, weight * x)
    return weight * x if weight else torch.zeros_like(x)


def logistic(m: Tensor) -> tuple[Tensor, Tensor]:
    """-log σ(m); slope -σ(-m). Unlike σ(m) - 1, this form keeps its digits where m is large."""
    return -logsigmoid(m), -(-m).sigmoid()


def squared(m: Tensor, *, center: float = 0.5) -> tuple[Tensor, Tensor]:
    """(m - center)²; slope 2 (m - center)."""
    return (m - center).square(), 2 * (m - center)


def hinge(m: Tensor) -> tuple[Tensor, Tensor]:
    """max(0, 1 - m); slope -1 where m < 1, 0 at the kink."""
    return (1 - m).clamp(min=0), torch.where(m < 1, -1.0, 0.0).to(m.dtype)


def smoothed(m: Tensor, *, smoothing: float) -> tuple[Tensor, Tensor]:
    """-(1-ε) log σ(m) - ε log σ(-m) = -log σ(m) + ε m, ε the smoothing; slope ε - σ(-m)."""
    value = times(smoothing, m) - logsigmoid(m)
    at_least = times(1 - smoothing, m.new_full((), torch.inf))  # the value at -inf
    return torch.where(m == -torch.inf, at_least, value), smoothing - (-m).sigmoid()


def robust(m: Tensor, *, smoothing: float) -> tuple[Tensor, Tensor]:
    """[-(1-ε) log σ(m) + ε log σ(-m)] / (1-2ε) = -log σ(m) - ε/(1-2ε) m; slope -σ(-m) - ε/(1-2ε)."""
    push = smoothing / (1 - 2 * smoothing)
    return -logsigmoid(m) - times(push, m), -(-m).sigmoid() - push


def floored(m: Tensor, *, floor: float = 1e-5) -> tuple[Tensor, Tensor]:
    """-log(σ(m) + floor), at most -log floor; slope -σ(m) σ(-m) / (σ(m) + floor), close to 0 where σ(m) << floor."""
    up = m.sigmoid()
    return -(up + floor).log(), -up * (-m).sigmoid() / (up + floor)


def bounded(m: Tensor) -> tuple[Tensor, Tensor]:
    """σ(-m) = 1 - σ(m); slope -σ(m) σ(-m). A badly wrong example has almost no gradient."""
    return (-m).sigmoid(), -m.sigmoid() * (-m).sigmoid()


def linear(m: Tensor) -> tuple[Tensor, Tensor]:
    """-m, unbounded below; slope -1."""
    return -m, -torch.ones_like(m)


def exo(m: Tensor, *, smoothing: float) -> tuple[Tensor, Tensor]:
    """σ(m) (log σ(m) - log(1-ε)) + σ(-m) (log σ(-m) - log ε), the KL of (σ(m), σ(-m)) from (1-ε, ε), ε the smoothing.

    Slope σ(m) σ(-m) (m - log((1-ε)/ε)). The value tends to -log(1-ε) for m = inf, and to -log ε for m = -inf.
    """
    up, down = m.sigmoid(), (-m).sigmoid()
    likely, unlikely = math.log1p(-smoothing), math.log(smoothing)
    value = times(up, logsigmoid(m) - likely) + times(down, logsigmoid(-m) - unlikely)
    return value, times(up * down, m - (likely - unlikely))


def discovered(m: Tensor, *, tau: float) -> tuple[Tensor, Tensor]:
    """-σ(-m/τ) log σ(m) + σ(m/τ) e^-m. A product with e^-m is computed as one exponential.

    The slope at m = -inf is -1. Where τ > 1, it is -inf there, and wherever e^(m/τ - m) overflows.
    """
    up, down, lowest = logsigmoid(m / tau), logsigmoid(-m / tau), m == -torch.inf
    steep, soft = torch.where(lowest, times(1 / tau - 1, m), up - m).exp(), -logsigmoid(m)
    turn = torch.where(lowest, steep, (up + down - m).exp() - (up + down).exp() * soft)
    slope = turn / tau - down.exp() * (-m).sigmoid() - steep
    return down.exp() * soft + steep, torch.where(steep == torch.inf, -torch.inf, slope)


def rising(m: Tensor) -> tuple[Tensor, Tensor]:
    """σ(m); slope σ(m) σ(-m)."""
    return m.sigmoid(), m.sigmoid() * (-m).sigmoid()


def anchored(m: Tensor) -> tuple[Tensor, Tensor]:
    """-2 log σ(m) - log σ(-m), with its minimum at m = log 2; slope σ(m) - 2 σ(-m)."""
    return -2 * logsigmoid(m) - logsigmoid(-m), m.sigmoid() - 2 * (-m).sigmoid()


def log_odds(score: Tensor) -> tuple[Tensor, Tensor]:
    """The log-odds a - log(1 - e^a) of a log-probability a < 0; slope 1/(1 - e^a).

    The odds of a certain response (a = 0) are infinite. Therefore a is at most -1e-6 (float64: -1e-12), with slope 0
    above.
    """
    highest = -1e-12 if score.dtype == torch.float64 else -1e-6
    a = score.clamp(max=highest)
    return a - log1mexp(a), torch.where(score <= highest, -1 / torch.expm1(a), 0)


def log1mexp(a: Tensor) -> Tensor:
    """log(1 - e^a) for a < 0, by the one of two forms that keeps its digits."""
    return torch.where(a > -math.log(2), torch.log(-torch.expm1(a)), torch.log1p(-a.exp()))


def forward_kl(score: Tensor) -> tuple[Tensor, Tensor]:
    """1 - e^-h; slope e^-h."""
    return alpha_divergence(score, alpha=0.0)


def jensen_shannon(score: Tensor) -> tuple[Tensor, Tensor]:
    """log 2 + log σ(h); slope σ(-h)."""
    return math.log(2) + logsigmoid(score), (-score).sigmoid()


def alpha_divergence(score: Tensor, *, alpha: float = 0.5) -> tuple[Tensor, Tensor]:
    """(e^((α-1)h) - 1) / (α-1), and h for α = 1; slope e^((α-1)h).

    A finite exponent above 80 is replaced by 80, with slope 0. Without this, scores summed over hundreds of tokens
    would overflow.
    """
    if alpha == 1:
        return score, torch.ones_like(score)
    exponent = (alpha - 1) * score
    beyond = (exponent > LARGEST_EXPONENT) & exponent.isfinite()
    exponent = torch.where(beyond, LARGEST_EXPONENT, exponent)
    return torch.expm1(exponent) / (alpha - 1), torch.where(beyond, 0, exponent.exp())

"""Losses of one margin m (nats). Each returns (value, slope), slope = d value / d m, elementwise.

Below them, what a score may become before its margin is formed: (value, slope) with respect to the score.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LARGEST_EXPONENT = 80.0  # e^80 is still a float32


def logistic(m: Tensor) -> tuple[Tensor, Tensor]:
    """-log σ(m); slope -σ(-m), the form that keeps its digits where m is large."""
    return -logsigmoid(m), -(-m).sigmoid()


def squared(m: Tensor, *, center: float = 0.5) -> tuple[Tensor, Tensor]:
    """(m - center)²; slope 2 (m - center)."""
    return (m - center).square(), 2 * (m - center)


def hinge(m: Tensor) -> tuple[Tensor, Tensor]:
    """max(0, 1 - m); slope -1 where m < 1, 0 at the kink."""
    return (1 - m).clamp(min=0), torch.where(m < 1, -1.0, 0.0).to(m.dtype)


def smoothed(m: Tensor, *, smoothing: float) -> tuple[Tensor, Tensor]:
    """-(1-ε) log σ(m) - ε log σ(-m) = -log σ(m) + ε m, ε the smoothing; slope ε - σ(-m)."""
    return smoothing * m - logsigmoid(m), smoothing - (-m).sigmoid()


def robust(m: Tensor, *, smoothing: float) -> tuple[Tensor, Tensor]:
    """[-(1-ε) log σ(m) + ε log σ(-m)] / (1-2ε) = -log σ(m) - ε/(1-2ε) m; slope -σ(-m) - ε/(1-2ε)."""
    push = smoothing / (1 - 2 * smoothing)
    return -logsigmoid(m) - push * m, -(-m).sigmoid() - push


def bounded(m: Tensor) -> tuple[Tensor, Tensor]:
    """σ(-m) = 1 - σ(m): a badly wrong example stops pulling; slope -σ(m) σ(-m)."""
    return (-m).sigmoid(), -m.sigmoid() * (-m).sigmoid()


def linear(m: Tensor) -> tuple[Tensor, Tensor]:
    """-m, unbounded below; slope -1."""
    return -m, -torch.ones_like(m)


def log_odds(score: Tensor) -> tuple[Tensor, Tensor]:
    """a - log(1 - e^a), a a log-probability below 0; slope 1/(1 - e^a).

    Evaluated at min(a, -1e-6) (float64: -1e-12), with slope 0 above: a certain response has infinite odds.
    """
    highest = -1e-12 if score.dtype == torch.float64 else -1e-6
    a = score.clamp(max=highest)
    return a - log1mexp(a), torch.where(score <= highest, -1 / torch.expm1(a), 0)


def log1mexp(a: Tensor) -> Tensor:
    """log(1 - e^a) for a < 0: each of the two forms where it keeps its digits."""
    return torch.where(a > -math.log(2), torch.log(-torch.expm1(a)), torch.log1p(-a.exp()))

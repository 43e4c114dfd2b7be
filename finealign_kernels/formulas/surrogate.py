"""Policy losses of one token: psi(log_ratio, advantage, logp, ...) -> (value, slope), slope = d value / d logp.

log_ratio is logp - old_logp of the token, or its mean or sum over a row. A is the advantage, a constant. The ratio is
ρ = exp(clamp(log_ratio, ±20)); outside ±20 it is constant, and its slope is 0. All functions work elementwise, in nats,
and return NaN for NaN.
"""

import torch
from torch import Tensor

LARGEST_LOG_RATIO = 20.0


def bounded_ratio(log_ratio: Tensor) -> Tensor:
    """ρ = exp(clamp(log_ratio, ±20)). It is finite for any log-ratio, so 0 · ρ is never NaN."""
    return log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


def is_beyond(log_ratio: Tensor) -> Tensor:
    """True where the clamp acts and ρ is constant."""
    return log_ratio.abs() > LARGEST_LOG_RATIO


def clipped(
    log_ratio: Tensor, advantage: Tensor, logp: Tensor, *, low: float, high: float, dual: float | None = None
) -> tuple[Tensor, Tensor]:
    """max(-A ρ, -A clip(ρ, 1-low, 1+high)), and at most -A dual where A < 0; slope -A ρ, or 0 where it is clipped."""
    ratio = bounded_ratio(log_ratio)
    free, held = -advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high)
    flat = (held > free) | is_beyond(log_ratio)
    value = torch.maximum(free, held)
    if dual is not None:
        value = torch.where(advantage < 0, torch.minimum(value, -advantage * dual), value)
        flat = flat | ((advantage < 0) & (ratio > dual))
    return value, torch.where(flat, 0, free)


def capped(log_ratio: Tensor, advantage: Tensor, logp: Tensor, *, low: float, high: float) -> tuple[Tensor, Tensor]:
    """-w A logp with the constant w = clamp(ρ, low, high); slope -w A, also where w is clamped."""
    push = -bounded_ratio(log_ratio).clamp(low, high).detach() * advantage
    return push * logp, push


def score_function(log_ratio: Tensor, advantage: Tensor, logp: Tensor) -> tuple[Tensor, Tensor]:
    """-A logp; slope -A."""
    return -advantage * logp, -advantage


def soft_gate(
    log_ratio: Tensor, advantage: Tensor, logp: Tensor, *, tau_pos: float, tau_neg: float
) -> tuple[Tensor, Tensor]:
    """-A (4/τ) σ(τ (ρ-1)), τ = tau_pos where A > 0, else tau_neg; slope -A ρ 4 σ(u) σ(-u), u = τ (ρ-1)."""
    ratio, tau = bounded_ratio(log_ratio), torch.where(advantage > 0, tau_pos, torch.full_like(advantage, tau_neg))
    u = tau * (ratio - 1)
    slope = -4 * advantage * ratio * u.sigmoid() * (-u).sigmoid()
    return -4 * advantage * u.sigmoid() / tau, torch.where(is_beyond(log_ratio), 0, slope)


def clipped_square(value: Tensor, old_value: Tensor, target: Tensor, *, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """½ max((V - R)², (V' - R)²), V' = clamp(V, V_old ± clip). Returns value, slope and a flag.

    The slope is V - R, or 0 where (V' - R)² is the larger one; the flag is True there.
    """
    near = torch.clamp(value, old_value - clip, old_value + clip)
    free, held = ((x - target) * ((x - target) / 2) for x in (value, near))  # halved before it may overflow
    flat = held > free
    return torch.maximum(free, held), torch.where(flat, 0, value - target), flat

"""Estimators of KL(π‖ref) from one token, d = logp - ref_logp. Each returns (value, slope), slope = d value / d logp.

    name        value          slope             expectation of slope · ∇logp over tokens of π
    k1          d              1                 0: as a loss it has no force
    k2          d² / 2         d                 ∇ KL(π‖ref)
    k3          e^-d - 1 + d   1 - e^-d          ∇ KL(ref‖π), the other direction
    k3_k2grad   that of k3     d                 ∇ KL(π‖ref)
    k3_is       ρ · k3         ρ d               ∇ KL(π‖ref), also over tokens of the old policy; ρ = π / old

k3's d and ρ's log-ratio are clamped to ±20; where a clamp acts, the value is that at the bound and the slope is 0: of
k3_is where either clamp acts. Elementwise, nats.
Source: J. Schulman's note on approximating KL (values); DeepSeek-V3.2's report (k3_is).
"""

import torch
from torch import Tensor

from .surrogate import LARGEST_LOG_RATIO, bounded_ratio, is_beyond


def k1(d: Tensor) -> tuple[Tensor, Tensor]:
    return d, torch.ones_like(d)


def k2(d: Tensor) -> tuple[Tensor, Tensor]:
    return d.square() / 2, d


def k3(d: Tensor) -> tuple[Tensor, Tensor]:
    near = d.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    less = torch.expm1(-near)
    return less + near, torch.where(is_beyond(d), 0, -less)


def k3_k2grad(d: Tensor) -> tuple[Tensor, Tensor]:
    return k3(d)[0], torch.where(is_beyond(d), 0, d)


def k3_is(d: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """log_ratio = logp - old_logp. Inside both clamps the slope ρ (k3 + 1 - e^-d) is ρ d; beyond either it is 0.

    Beyond d = -20 the slope of ρ alone, ρ k3, would push the token away from the reference, with e^20.
    """
    ratio = bounded_ratio(log_ratio)
    held = (is_beyond(d) | is_beyond(log_ratio)) & (d == d)  # a NaN goes through
    return ratio * k3(d)[0], ratio * torch.where(held, 0, d)

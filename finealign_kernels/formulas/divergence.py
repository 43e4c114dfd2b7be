"""Estimators of KL(π‖ref) from one token, d = logp - ref_logp. Each returns (value, slope), slope = d value / d logp.

    name        value          slope             expectation of slope · ∇logp over tokens of π
    k1          d              1                 0: used as a loss, k1 trains nothing
    k2          d² / 2         d                 ∇ KL(π‖ref)
    k3          e^-d - 1 + d   1 - e^-d          ∇ KL(ref‖π), the other direction
    k3_k2grad   that of k3     d                 ∇ KL(π‖ref)
    k3_is       ρ · k3         ρ d               ∇ KL(π‖ref), also over tokens of the old policy; ρ = π / old

d in k3 and the log-ratio in ρ are clamped to ±20. Outside, the value is that at the bound and the slope is 0. The slope
of k3_is is 0 if either of its two numbers is outside. All functions work elementwise, in nats.
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
    """ρ k3 with ρ = e^log_ratio, log_ratio = logp - old_logp. Slope ρ (k3 + 1 - e^-d) = ρ d, and 0 outside a clamp.

    Why 0: below d = -20, k3 is constant and only the slope of ρ would remain. It is ρ k3, about ρ e^20, and pushes
    the token away from the reference.
    """
    ratio = bounded_ratio(log_ratio)
    held = (is_beyond(d) | is_beyond(log_ratio)) & (d == d)  # a NaN goes through
    return ratio * k3(d)[0], ratio * torch.where(held, 0, d)

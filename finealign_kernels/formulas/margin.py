"""Losses of one margin m (nats). Each returns (value, slope), slope = d value / d m, elementwise."""

from torch import Tensor
from torch.nn.functional import logsigmoid


def logistic(m: Tensor) -> tuple[Tensor, Tensor]:
    """-log σ(m); slope -σ(-m), the form that keeps its digits where m is large."""
    return -logsigmoid(m), -(-m).sigmoid()


def squared(m: Tensor, *, center: float = 0.5) -> tuple[Tensor, Tensor]:
    """(m - center)²; slope 2 (m - center)."""
    return (m - center).square(), 2 * (m - center)

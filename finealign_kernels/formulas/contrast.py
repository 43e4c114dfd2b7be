"""Contrastive terms between two views of the same rows: InfoNCE and SwAV, as plain torch operations.

The norm of a row is at least FLOOR. A row of zeros therefore has cosine 0 with every other row, and no gradient. If the
squares of a row overflow (values beyond 1e19 in float32, 1e154 in float64), its norm and its loss are NaN. Divided by
an infinite norm, it would become a row of zeros.
"""

from collections.abc import Callable

import torch
from torch import Tensor

FLOOR = 1e-8


def norm(x: Tensor) -> Tensor:
    """|x| of each row, (N, D) to (N, 1); NaN where it is infinite."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return torch.where(length == torch.inf, torch.nan, length)


def unit(x: Tensor) -> Tensor:
    """x / |x|, (N, D). A row whose norm is below FLOOR becomes x / FLOOR and has no gradient."""
    short = norm(x.detach()) < FLOOR
    safe = torch.where(short, 1, x)
    return torch.where(short, x.detach() / FLOOR, safe / norm(safe))


def info_nce(first: Tensor, second: Tensor, *, temperature: float) -> Tensor:
    """(N,): logsumexp_j S_ij - S_ii,  S_ij = cos(first_i, second_j) / temperature."""
    similar = unit(first) @ unit(second).T / temperature
    return similar.logsumexp(1) - similar.diagonal()


def sinkhorn(
    scores: Tensor, *, epsilon: float, iterations: int, over_ranks: Callable[[Tensor], Tensor] = lambda lse: lse
) -> Tensor:
    """Codes q (N, K) of each row, Σ_k q = 1, balanced over the K prototypes: Q = exp(scores / epsilon), then

        iterations times   each prototype's sum over all rows to 1/K,   then each row's sum over prototypes to 1/N

    and q = N Q. It is computed in logarithms, so a small epsilon does not underflow. over_ranks takes a rank's own
    logsumexp and returns the logsumexp over all ranks.
    """
    log_q = scores / epsilon
    for _ in range(iterations):
        log_q = log_q - over_ranks(log_q.logsumexp(0))
        log_q = log_q - log_q.logsumexp(1, keepdim=True)
    return log_q.exp()


def swapped(first: Tensor, second: Tensor, codes: tuple[Tensor, Tensor], *, temperature: float) -> Tensor:
    """(N,): -Σ_k q_first log p_second - Σ_k q_second log p_first, p = softmax(scores / temperature), (N, K)."""
    one, other = (-q * (s / temperature).log_softmax(1) for q, s in zip(codes, (second, first), strict=True))
    return one.sum(1) + other.sum(1)

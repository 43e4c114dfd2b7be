"""Inputs for tests and benches, and eager PyTorch to measure an error against."""

from typing import NamedTuple

import torch
from torch import Tensor


class Linear(NamedTuple):
    """A head's inputs and random upstream gradients of logp, lse and entropy."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    labels: Tensor  # (N,)
    upstream: Tensor  # (3, N)

    def to(self, dtype: torch.dtype) -> "Linear":
        return self._replace(hidden=self.hidden.to(dtype), weight=self.weight.to(dtype))


SPREADS = {"uniform": 0.01, "ordinary": 1.0, "peaked": 5.0}  # standard deviation of the logits


def linear(n: int, v: int, d: int, dtype=torch.float32, *, spread="ordinary", device="cpu", seed=0) -> Linear:
    """Random head inputs with logits of near-uniform, ordinary or peaked rows; half the labels are likely."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=rng).to(dtype)
    weight = (torch.randn(v, d, generator=rng) * SPREADS[spread] / d**0.5).to(dtype)
    labels = torch.randint(v, (n,), generator=rng)
    likely = (hidden.float() @ weight.float().t()).argmax(-1)
    labels = torch.where(torch.rand(n, generator=rng) < 0.5, likely, labels)
    upstream = torch.randn(3, n, generator=rng)
    return Linear(hidden.to(device), weight.to(device), labels.to(device), upstream.to(device))


def confident(p: float, v: int, dtype=torch.float32, *, rows: int = 4) -> tuple[Tensor, Tensor]:
    """Logits (rows, v) of dtype that give the label probability p over a flat tail, and labels (rows,)."""
    gap = torch.tensor(p / (1 - p) * (v - 1), dtype=torch.float64).log()
    logits = torch.zeros(rows, v, dtype=dtype)
    labels = torch.arange(rows) * 7 % v
    logits[torch.arange(rows), labels] = gap.to(dtype)
    return logits, labels


def eager(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, softcap=None, temperature=1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """logp, lse, entropy as plain PyTorch has them: logits in the input dtype, then float32 (float64)."""
    logits = hidden @ weight.t()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    logp = torch.log_softmax(logits, -1)
    return logp.gather(1, labels[:, None])[:, 0], torch.logsumexp(logits, -1), -(logp.exp() * logp).sum(-1)


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))

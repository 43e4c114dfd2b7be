"""Inputs for tests and benches, and eager PyTorch to measure an error against."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..formulas.rewards import SegmentRewards


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


def segment_rewards(
    lengths: list[int], *, models=3, dtype=torch.float32, index=torch.int64, device="cpu", seed=0
) -> list[SegmentRewards]:
    """Rewards of sequences of so many tokens (B, T: T for each), with whatever a reward model may come up with.

    Each sequence has no segment, one, or several; ends that coincide (segments without tokens), lie beyond the
    sequence, or at its first token; weights of either sign. Model 1 has starts: tokens lie between its segments.
    """
    rng = torch.Generator().manual_seed(seed)
    return [_segment_rewards(lengths, rng, k == 1, dtype, index, device) for k in range(models)]


def _segment_rewards(lengths, rng, with_starts, dtype, index, device) -> SegmentRewards:
    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=rng))

    ends, starts, counts = [], [], []
    for length in lengths:
        many = [0, 1, 2, draw(length + 1), length // 3][draw(5)]
        after = -1
        for end in sorted(draw(length + 2 + draw(2) * length) for _ in range(many)):
            starts.append(after + 1 + draw(3))
            ends.append(end)
            after = end
        counts.append(many)
    reward = torch.randn(len(ends), generator=rng).to(dtype)
    cu_segments = torch.tensor([0, *counts]).cumsum(0)
    weight = 2 * float(torch.rand((), generator=rng)) - 1
    integers = (torch.tensor(x, dtype=index, device=device) for x in (ends, cu_segments.tolist(), starts))
    end, cu_segments, start = integers
    return SegmentRewards(reward.to(device), end, cu_segments, weight, start if with_starts else None)


class Policy(NamedTuple):
    """A padded batch of sampled responses (B, T), with a hole, one of a single token and an empty one."""

    logp: Tensor
    old_logp: Tensor
    ref_logp: Tensor
    advantages: Tensor  # (B,)
    dense: Tensor  # advantages (B, T)
    token_weight: Tensor
    sampler_weight: Tensor  # (B,)
    entropy: Tensor
    mask: Tensor


def policy(rows: int = 6, width: int = 9, dtype=torch.float32, *, spread: float = 0.5, device="cpu", seed=0) -> Policy:
    """Random log-probs whose ratios leave a clip range of 0.2 on both sides, and what comes with them; rows >= 4."""
    rng = torch.Generator().manual_seed(seed)
    uniform = torch.rand(4, rows, width, generator=rng, dtype=torch.float64)
    normal = torch.randn(4, rows, width, generator=rng, dtype=torch.float64)
    lengths = torch.randint(2, width + 1, (rows,), generator=rng)
    lengths[1], lengths[2], lengths[3] = width, 1, 0
    mask = torch.arange(width) < lengths[:, None]
    mask[1, width // 2] = False
    old = -3 * uniform[0]
    batch = Policy(
        logp=old + spread * normal[0],
        old_logp=old,
        ref_logp=old + spread * normal[1],
        advantages=normal[2, :, 0],
        dense=normal[3],
        token_weight=uniform[1],
        sampler_weight=2 * uniform[2, :, 0],
        entropy=2 * uniform[3],
        mask=mask,
    )
    return Policy(*(x.to(device) if x.dtype == torch.bool else x.to(device, dtype) for x in batch))

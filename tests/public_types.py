"""Calls of the public functions as a user writes them, for a type checker: `make lint` runs mypy over this file.

It is not run. A call that mypy must refuse carries an ignore, and mypy reports an ignore that is not needed.
"""

import torch
from torch import Tensor

import finealign_kernels as fk


def log_probs(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    out = fk.linear_logprobs(hidden, weight, labels, mask=mask, outputs=("entropy",), workspace="full", backend="torch")
    entropy: Tensor | None = out.entropy
    fk.linear_logprobs(hidden, weight, labels, masks=mask)  # type: ignore[call-arg]
    return out.logp if entropy is None else out.logp + entropy


def preferences(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    step = fk.dpo(logp, ref_logp, mask=mask, token_weight=torch.ones(2, 4), average="kept", beta=0.1)
    total = step.loss + fk.simpo(logp, mask=mask).loss + fk.preference_loss("ipo", logp, ref_logp, mask=mask).loss
    fk.dpo(logp, ref_logp, mask=mask, betas=0.1)  # type: ignore[call-arg]
    step.losss  # type: ignore[attr-defined]
    return total + fk.kto(logp, ref_logp, torch.ones(2), mask=mask).loss + fk.nll_loss(logp, mask=mask).loss


def policy(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    rewards = fk.SegmentRewards(reward=torch.ones(2), end=torch.tensor([3, 3]), cu_segments=torch.arange(3))
    made = fk.advantages([rewards], torch.zeros(2, 4), mask=mask)
    loss: fk.PolicyLoss = fk.policy_loss("ppo", logp, old_logp, made.advantages, mask=mask)
    fk.policy_loss(1, logp)  # type: ignore[arg-type]
    return loss.loss


def weights(text: str) -> tuple[list[float], list[float]]:
    example: fk.feedback.Example = fk.feedback.sample()[0]
    offsets = [(0, 1)] * len(example.prompt)
    return fk.feedback.pair_weights((offsets, text, ()), (offsets, text, ()), span_weight=2.0)

"""What the adapters of several trainers share: their trainers average token losses and whiten advantages alike."""

from torch import Tensor

from ..rl.gae import gae
from ..rl.whitening import whiten

# Rows of policy_loss that are a loss of each token with its own advantage, so that the trainer's own mean applies.
LOSSES = ("ppo", "gspo_token", "cispo", "sapo", "reinforce")


def whitened_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages by GAE, whitened over the mask with the unbiased variance, and returns, (B, T)."""
    mask = mask.bool()
    found = gae(rewards, values, mask=mask, gamma=gamma, lam=lam)
    return whiten(found.advantages, mask=mask, unbiased=True), found.returns

"""OpenRLHF 0.11: its loss classes by this library, under its own names and arguments.

    from finealign_kernels.integrations.openrlhf import install
    install()                                             # in the entry script, and in each Ray worker

`install` puts the classes where OpenRLHF's trainers look for them. Each also goes in by hand: `trainer.loss_fn =
DPOLoss(beta)`, `trainer.actor_loss_fn = PolicyLoss(...)`. Names of OpenRLHF and of the rows here:

    PolicyLoss "ppo"          "ppo", dual = dual_clip, which is off by default
    PolicyLoss "gspo"         "gspo": one ratio and one advantage a row
    PolicyLoss "gspo_token"   "gspo_token", not in OpenRLHF: advantages that differ between the tokens of a row
    is_correction level "token", "seq"    sampler_weights mode "token_mask" or "token_truncate", "sequence_mask"
    is_correction gating "ratio"          gate "ratio"; of a sequence "geometric"
    PairWiseLoss, LogExpLoss  "bradley_terry"; a margin counts in both, and nothing overflows
    DPOLoss                   "cdpo", or "ipo"
    advantage estimator gae   `gae` with masked="zero", 0 where the mask is false

OpenRLHF hands its losses no token weights: a weight w >= 0 goes into experience.advantages after they are normalised,
by `integrations.verl.weigh_advantages`, exactly for "ppo" and "gspo_token".
"""

import importlib

import torch
from torch import Tensor, nn

from ..losses.policy import policy_loss
from ..losses.preference import preference_loss
from ..losses.reward import reward_loss
from ..losses.sampler import sampler_weights
from ..losses.value import value_loss
from ..ops._check import check_one_of, fail, reads_values
from ..rl.gae import gae
from ._versions import check_version

VERSIONS = ("0.11",)  # of OpenRLHF, that this adapter was written for and tested with
MAKER, METHODS = "RemoteExperienceMaker", ("get_advantages_and_returns",)  # a class that keeps the rest of its methods
SEAMS = {  # module -> names in it that trainers read
    "openrlhf.models": ("PolicyLoss", "ValueLoss", "PairWiseLoss", "LogExpLoss", "DPOLoss"),
    "openrlhf.trainer.ray.ppo_actor": ("PolicyLoss",),
    "openrlhf.trainer.ray.ppo_critic": ("ValueLoss",),
    "openrlhf.trainer.rm_trainer": ("PairWiseLoss", "LogExpLoss"),
    "openrlhf.trainer.dpo_trainer": ("DPOLoss",),
    "openrlhf.trainer.ppo_utils.experience_maker": (MAKER,),
}


def install(*modules: str) -> None:
    """Puts the classes of this module into those of OpenRLHF, in this process; all of SEAMS, or those that are named.

    Raises  ImportError without OpenRLHF; RuntimeError for a version, or a module without the name, not known here.
    """
    check_version("openrlhf", VERSIONS)
    for path in modules or SEAMS:
        check_one_of("modules", path, tuple(SEAMS))
        module = importlib.import_module(path)
        for name in SEAMS[path]:
            if not hasattr(module, name):
                fail(path, f"have {name}", "none", RuntimeError)
            place, wanted = (getattr(module, name), METHODS) if name == MAKER else (module, (name,))
            for one in wanted:
                if not hasattr(place, one):
                    fail(f"{path}.{name}", f"have {one}", "none", RuntimeError)
                setattr(place, one, globals()[one])


def _counted(token_level: bool, dp_size: int, tokens, rows) -> dict:
    """reduction and denominator; OpenRLHF's ranks average gradients, and the counts are those of all ranks."""
    count = tokens if token_level else rows
    reduction = "sequence" if not token_level else "token" if count is None else "token_global"
    return {"reduction": reduction, "denominator": None if count is None else count / dp_size, "count_empty": False}


class PolicyLoss(nn.Module):
    """OpenRLHF's PolicyLoss, with its arguments; returns (loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio)."""

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: tuple = (0.5, 5.0),
    ):
        super().__init__()
        check_one_of("policy_loss_type", policy_loss_type, ("ppo", "gspo", "gspo_token"))
        check_one_of("is_correction_level", is_correction_level, ("off", "token", "seq"))
        check_one_of("is_correction_mode", is_correction_mode, ("mask", "clip"))
        check_one_of("is_correction_gating", is_correction_gating, ("ratio", "binary_kl", "tv"))
        if is_correction_mode == "clip" and (is_correction_level == "seq" or is_correction_gating != "ratio"):
            fail("is_correction_mode", "be 'mask' for a sequence and for a divergence", repr(is_correction_mode))
        low, high = is_correction_threshold
        if is_correction_gating != "ratio" and is_correction_level != "off" and low > 0:
            fail("is_correction_threshold", "start at 0 for a divergence, bounded from above only", low)
        self.name, self.token_level_loss = policy_loss_type, token_level_loss and policy_loss_type == "ppo"
        self.options = {"low": clip_eps_low, "high": clip_eps_high, "dual": dual_clip}
        self.level, self.mode, self.gating = is_correction_level, is_correction_mode, is_correction_gating
        self.threshold = (low if is_correction_gating == "ratio" else None, high)

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        mask = torch.ones_like(log_probs, dtype=torch.bool) if action_mask is None else action_mask.bool()
        old, weight, kl, filtered = old_log_probs, None, None, None
        if self.level != "off" and self.name == "ppo":
            weight, kl, filtered = self._correction(old_log_probs, rollout_log_probs, mask)
        elif self.level != "off":
            old = rollout_log_probs  # a row's ratio is then of the policy to the sampler
        out = policy_loss(
            self.name,
            log_probs,
            old,
            _of_rows(advantages, mask) if self.name == "gspo" else advantages,
            mask=mask,
            sampler_weight=weight,
            kl_coef=0.0,
            **_counted(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size),
            **self.options,
        )
        moved = _mean(old_log_probs - log_probs.detach(), mask)
        return out.loss, out.clip_fraction_low + out.clip_fraction_high, moved, kl, filtered

    def _correction(self, old: Tensor, rollout: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of tokens against the sampler's log-probs, the KL between the two, and the share that is out."""
        low, high = self.threshold
        sequence = self.level == "seq"
        kind = "token_truncate" if self.mode == "clip" else "sequence_mask" if sequence else "token_mask"
        gate = "geometric" if sequence and self.gating == "ratio" else self.gating
        weight = sampler_weights(old, rollout, mode=kind, low=low, high=high, mask=mask, gate=gate)
        if self.mode == "clip":
            apart = (old - rollout).exp()
            out = _mean(((apart < low) | (apart > high)).to(old.dtype), mask)
        elif sequence:
            out = ((weight == 0) & mask).any(1).to(old.dtype).mean()
        else:
            out = _mean((weight == 0).to(old.dtype), mask)
        return weight, _mean(rollout - old, mask), out


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, 0).sum() / mask.sum()


def _of_rows(advantages: Tensor, mask: Tensor) -> Tensor:
    """(B,): the advantage of each row, which all of its tokens have."""
    if advantages.dim() == 1:
        return advantages
    mean = torch.where(mask, advantages, 0).sum(1) / mask.sum(1).clamp(min=1)
    apart = torch.where(mask, advantages - mean[:, None], 0).abs()
    if reads_values(apart) and bool((apart > 1e-5 * (1 + mean.abs())[:, None]).any()):
        fail("advantages", "be the same for all tokens of a row with 'gspo' ('gspo_token' takes others)", "others")
    return mean


@torch.no_grad()
def get_advantages_and_returns(
    maker, values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """OpenRLHF's method of its experience maker: advantages and returns, (B, T)."""
    mask = torch.ones_like(values, dtype=torch.bool) if action_mask is None else action_mask.bool()
    return tuple(gae(rewards, values, mask=mask, gamma=gamma, lam=lambd, masked="zero"))


class ValueLoss(nn.Module):
    """OpenRLHF's ValueLoss."""

    def __init__(self, clip_eps: float | None = None, token_level_loss: bool = True):
        super().__init__()
        self.clip, self.token_level_loss = clip_eps, token_level_loss

    def forward(
        self,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> Tensor:
        mask = None if action_mask is None else action_mask.bool()
        counted = _counted(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
        return value_loss(values, old_values, returns, mask=mask, clip=self.clip, **counted).loss


class PairWiseLoss(nn.Module):
    """-log σ(r_chosen - r_rejected - margin), the mean over pairs."""

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None) -> Tensor:
        margin = margin.reshape(-1) if isinstance(margin, Tensor) else margin
        return reward_loss("bradley_terry", (chosen_reward.reshape(-1), reject_reward.reshape(-1)), margin=margin).loss


class LogExpLoss(PairWiseLoss):
    """log(1 + exp(r_rejected - r_chosen)), the same function; OpenRLHF's ignores the margin and may overflow."""


class DPOLoss(nn.Module):
    """OpenRLHF's DPOLoss, of sums over responses; returns (loss, chosen_rewards, rejected_rewards)."""

    def __init__(self, beta: float, label_smoothing: float = 0.0, ipo: bool = False):
        super().__init__()
        self.name = "ipo" if ipo else "cdpo"
        self.options = {"beta": beta} | ({} if ipo else {"smoothing": label_smoothing})

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        policy = torch.cat([policy_chosen_logps, policy_rejected_logps])[:, None]
        reference = torch.cat([reference_chosen_logps, reference_rejected_logps])[:, None]
        out = preference_loss(self.name, policy, reference, **self.options)
        return out.loss, out.chosen_rewards, out.rejected_rewards

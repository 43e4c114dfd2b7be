"""SkyRL 0.4: policy losses and GAE of this library in SkyRL's registries.

    from finealign_kernels.integrations.skyrl import register

    register()        # in the entry script, before SkyRL checks its config; its registry brings them to Ray's workers

    trainer.algorithm.policy_loss_type=finealign_ppo
    trainer.algorithm.advantage_estimator=finealign_gae

    here                   SkyRL's own     what it is
    finealign_ppo          regular         "ppo"
    finealign_ppo_dual     dual_clip       "ppo" with dual = clip_ratio_c, which is 3 by default
    finealign_gspo_token   gspo            "gspo_token"
    finealign_cispo        cispo           "cispo" with bounds 1 - cispo_eps_clip_low and 1 + cispo_eps_clip_high, of
                                           cispo_anchor's log-probs
    finealign_sapo         sapo            "sapo"
    finealign_reinforce                    "reinforce"
    finealign_gae          gae             `gae`, whitened. In SkyRL's, masked tokens are steps; here they are skipped

SkyRL's KL (k1, abs, k2, k3), entropy, off-policy correction and loss_reduction stay its own: it scales the advantages,
and the losses are plain sums. A float loss_mask is a token weight w >= 0; the counts that SkyRL divides by are sums of
it, so that 2 at every token is the same as 1. The losses want old log-probs of the trainer, which SkyRL's fully
asynchronous training does not keep: it refuses them, as it does its own.
"""

import importlib
import sys
from functools import partial

import torch
from torch import Tensor

from ..losses.policy import policy_loss
from ..ops._check import check_one_of, fail
from ._token_losses import whitened_gae
from ._versions import check_version

VERSIONS = ("0.4",)  # of SkyRL, that this adapter was written for and tested with
UTILS = "skyrl.backends.skyrl_train.utils.ppo_utils"
ASYNC = "skyrl.train.fully_async_trainer"
LOSSES = ("ppo", "ppo_dual", "gspo_token", "cispo", "sapo", "reinforce")


def register(utils=None) -> tuple[str, ...]:
    """Registers the losses and the GAE with SkyRL. Returns their names; what is registered already stays.

    utils  skyrl.backends.skyrl_train.utils.ppo_utils; None: it is imported

    Raises  ImportError without SkyRL; RuntimeError for a version that is not known here.
    """
    check_version("skyrl", VERSIONS)
    utils = importlib.import_module(UTILS) if utils is None else utils
    known = utils.PolicyLossRegistry.list_available(), utils.AdvantageEstimatorRegistry.list_available()
    for name in LOSSES:
        if f"finealign_{name}" not in known[0]:
            utils.register_policy_loss(f"finealign_{name}")(globals()[name])
    names = frozenset(_Name(f"finealign_{name}") for name in LOSSES)
    for module in (utils, sys.modules.get(ASYNC)):
        if module is not None:
            module.LOSSES_WITH_OLD_LOGPROBS = module.LOSSES_WITH_OLD_LOGPROBS | names
    if "finealign_gae" not in known[1]:
        utils.register_advantage_estimator("finealign_gae")(gae)
    return (*(f"finealign_{name}" for name in LOSSES), "finealign_gae")


class _Name(str):
    """A name with what SkyRL reads of the members of its enumeration."""

    @property
    def value(self) -> str:
        return str(self)


def _loss(
    name: str,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict]:
    utils = importlib.import_module(UTILS)
    mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask
    old, row, options = old_log_probs, name, {}
    if name in ("ppo", "ppo_dual", "gspo_token"):
        options = {"low": config.eps_clip_low, "high": config.eps_clip_high}
    if name == "ppo_dual":
        row, options["dual"] = "ppo", config.clip_ratio_c
    if name == "sapo":
        options = {"tau_pos": float(config.sapo.tau_pos), "tau_neg": float(config.sapo.tau_neg)}
    if name == "cispo":
        options = {"low": 1 - config.cispo.cispo_eps_clip_low, "high": 1 + config.cispo.cispo_eps_clip_high}
        old = _anchor(config, old_log_probs, rollout_logprobs)
    correction = torch.ones_like(log_probs)  # SkyRL's is linear in the loss: of ones, its weights come back
    correction, kept, metrics = utils.apply_off_policy_correction(
        correction, old_log_probs, rollout_logprobs, mask, config.off_policy_correction
    )
    out = policy_loss(
        row,
        log_probs,
        old,
        advantages,
        mask=mask > 0,
        token_weight=kept.to(log_probs.dtype),
        reduction="token_global",
        denominator=1,
        sampler_weight=correction,
        kl_coef=0.0,
        **options,
    )
    return out.loss, {"clip_ratio": (out.clip_fraction_low + out.clip_fraction_high).item()} | metrics


def _anchor(config, old: Tensor, rollout: Tensor | None) -> Tensor:
    anchor = config.cispo.cispo_anchor
    check_one_of("cispo_anchor", anchor, ("old", "rollout"))
    if anchor == "old":
        return old
    if rollout is None:
        fail("rollout_logprobs", "be given for cispo_anchor='rollout'", None)
    if config.off_policy_correction.tis_ratio_type is not None:
        kind = config.off_policy_correction.tis_ratio_type
        fail("tis_ratio_type", "be None for cispo_anchor='rollout', which corrects for the sampler itself", repr(kind))
    return rollout


ppo, ppo_dual, gspo_token, cispo, sapo, reinforce = (partial(_loss, name) for name in LOSSES)


@torch.no_grad()
def gae(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lambd: float, **_
) -> tuple[Tensor, Tensor]:
    """SkyRL's "gae": whitened advantages and returns, (B, T). Rewards may be those of segments, at their ends."""
    return whitened_gae(token_level_rewards, values, response_mask, gamma, lambd)

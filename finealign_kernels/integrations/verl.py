"""verl 0.9: policy losses of this library by `loss_mode=finealign_ppo` and so on, and its GAE by ours.

`pip install finealign-kernels` is all: verl loads the entry point group "verl.plugins" in every process, and
`verl_plugin` registers the losses there when verl's own are imported. In a process without plugins call `register()`.

    actor_rollout_ref.actor.policy_loss.loss_mode=finealign_ppo

    here                    verl's own          what it is
    finealign_ppo           vanilla             "ppo" with dual = clip_ratio_c, which is 3 by default
    finealign_gspo_token    gspo                "gspo_token": verl's advantages are one a token
    finealign_cispo         cispo               "cispo" with bounds 1 - clip_ratio_low and 1 + clip_ratio_high
    finealign_sapo          sapo                "sapo", always seq-mean-token-mean, as there
    finealign_reinforce     reinforce           "reinforce"

Clip ranges, loss_agg_mode, global counts, dp_size and rollout weights are read from where verl's own losses read them.
verl hands its losses no token weights: a weight w >= 0 of a token goes into its advantage, see `weigh_advantages`.

In the environment of verl's processes:

FINEALIGN_VERL_GAE=1   `gae` and `whiten` in place of verl's loop over time; verl's registry of advantage estimators
                       hands over no values. The same function: 0 where the mask is false, not what is carried there
FINEALIGN_VERL_HEAD=1  `linear_logprobs` in place of the heads of verl's use_fused_kernels, backends torch and triton:
                       float32 log-probs, which verl rounds to the logits' dtype
"""

import importlib
import importlib.machinery
import logging
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..losses.policy import policy_loss
from ..ops._check import check_one_of, check_tensor, fail, reads_values
from ..ops.logprobs import linear_logprobs
from ._token_losses import LOSSES, whitened_gae
from ._versions import check_version

VERSIONS = ("0.9",)  # of verl, that this adapter was written for and tested with
CORE = "verl.trainer.ppo.core_algos"
HEADS = {  # module -> what the fused forwards of verl's models take out of it at each call
    "verl.utils.experimental.torch_functional": "FusedLinearForPPO",
    "verl.utils.kernel.linear_cross_entropy": "linear_cross_entropy",
}
MODES = {  # loss_agg_mode -> reduction, the global count that it is divided by
    "token-mean": ("token", "batch_num_tokens"),
    "token-sum": ("token_global", None),
    "seq-mean-token-mean": ("sequence", "global_batch_size"),
    "seq-mean-token-sum": ("sequence_sum", "global_batch_size"),
    "seq-mean-token-sum-norm": ("sequence_sum", "global_batch_size"),
}

logger = logging.getLogger(__name__)


def register(core=None) -> tuple[str, ...]:
    """Registers the losses with verl, and with FINEALIGN_VERL_GAE=1 the GAE. Returns the names of the losses.

    core  verl.trainer.ppo.core_algos; None: it is imported

    Raises  ImportError without verl; RuntimeError for a version that is not known here.
    """
    check_version("verl", VERSIONS)
    core = importlib.import_module(CORE) if core is None else core
    for name in LOSSES:
        core.register_policy_loss(f"finealign_{name}")(loss_of(name))
    if os.environ.get("FINEALIGN_VERL_GAE") == "1":
        core.compute_gae_advantage_return = gae_advantage_return
    return tuple(f"finealign_{name}" for name in LOSSES)


def patch_head(module) -> None:
    """Puts the head of this library into a module of HEADS.

    Raises  RuntimeError for a version of verl, or a module without the name, not known here.
    """
    check_version("verl", VERSIONS)
    name = HEADS[module.__name__]
    if not hasattr(module, name):
        fail(module.__name__, f"have {name}", "none", RuntimeError)
    setattr(module, name, globals()[name])


def register_when_imported() -> None:
    """Registers as soon as verl imports its losses: what a plugin does, since verl is half imported when it loads them.

    verl hides what a plugin raises. A version that is not known here is therefore logged as an error, and its training
    then stops at the name of the loss.
    """
    try:
        check_version("verl", VERSIONS)
    except (ImportError, RuntimeError) as error:
        logger.error("finealign_kernels has registered no loss with verl: %s", error)
        return
    actions = {CORE: register}
    if os.environ.get("FINEALIGN_VERL_HEAD") == "1":
        actions |= dict.fromkeys(HEADS, patch_head)
    for name in [name for name in actions if name in sys.modules]:
        actions.pop(name)(sys.modules[name])
    if actions:
        sys.meta_path.insert(0, _Watch(actions))


class _Watch:
    """Waits for modules to be imported, and removes itself after the last. An error in an action ends the import."""

    def __init__(self, actions: dict[str, Callable]):
        self.actions = actions

    def find_spec(self, name: str, path=None, target=None):
        if name not in self.actions:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                action = self.actions.pop(name)  # not before: a module may be looked for and not be imported
                if not self.actions:
                    sys.meta_path.remove(self)
                action(module)

            spec.loader.exec_module = exec_module
        return spec


def loss_of(name: str) -> Callable:
    """The loss with verl's signature: it takes keywords and returns (loss, metrics)."""

    def policy_loss_fn(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config=None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict]:
        mode = "seq-mean-token-mean" if name == "sapo" else loss_agg_mode
        if mode not in MODES:
            fail("loss_agg_mode", f"be one of {tuple(MODES)}", repr(mode))
        reduction, count = MODES[mode]
        counts = dict(getattr(config, "global_batch_info", None) or {})
        ranks = counts.get("dp_size") or 1  # verl averages gradients over them
        total = counts.get(count) if count else 1
        if total is None and ranks > 1:
            fail(f"config.global_batch_info[{count!r}]", "be given where dp_size is above 1", None)
        if total is not None:
            reduction = "token_global" if reduction == "token" else reduction
        out = policy_loss(
            name,
            log_prob,
            old_log_prob,
            advantages,
            mask=response_mask.bool(),
            reduction=reduction,
            denominator=total if total is None else total / ranks,
            count_empty=False,
            sampler_weight=rollout_is_weights,
            kl_coef=0.0,  # verl adds the KL and entropy terms itself
            **_options(name, config),
        )
        loss = out.loss
        if mode == "seq-mean-token-sum-norm":
            loss = loss / (counts.get("loss_scale_factor") or response_mask.shape[-1])
        metrics = torch.stack([out.clip_fraction_low + out.clip_fraction_high, out.old_kl, out.clip_fraction_dual])
        names = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
        return loss, dict(zip(names, metrics.tolist(), strict=True))

    policy_loss_fn.__name__ = f"finealign_{name}"
    return policy_loss_fn


def _options(name: str, config) -> dict:
    if name == "reinforce":
        return {}
    if name == "sapo":
        return {"tau_pos": float(config.tau_pos), "tau_neg": float(config.tau_neg)}
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    if name == "cispo":
        return {"low": 1 - low, "high": 1 + high}
    return {"low": low, "high": high} | ({"dual": config.get("clip_ratio_c", 3.0)} if name == "ppo" else {})


class FusedLinearForPPO(nn.Module):
    """verl's head by `linear_logprobs`: (log_probs, entropy) of labels, float32, in their shape."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch"):
        super().__init__()

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        labels = input_ids.long()
        out = linear_logprobs(hidden_states, vocab_weights, labels, temperature=temperature, outputs=("entropy",))
        return out.logp, out.entropy


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group=None,
) -> tuple[Tensor, Tensor]:
    """verl's kernel by `linear_logprobs`: (log_probs, entropy), flat; the vocabulary may be split over a group.

    As there, the caller sums hidden's gradient over the group: gathered sequence-parallel states do.
    """
    check_one_of("reduction", reduction, ("none",))
    out = linear_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1).long(),
        temperature=temperature,
        outputs=("entropy",),
        group=dist_process_group,
    )
    return out.logp, out.entropy


@torch.no_grad()
def gae_advantage_return(
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """verl's compute_gae_advantage_return: whitened advantages and returns, (B, T)."""
    return whitened_gae(token_level_rewards, values, response_mask, gamma, lam)


def weigh_advantages(advantages: Tensor, token_weight: Tensor) -> Tensor:
    """w A: the advantages with which a loss that takes no token weights trains as with them.

    Exact for all losses here, which are homogeneous in the advantage: l(w A) = w l(A) for w >= 0. The means over tokens
    count every token of the mask, as policy_loss's average="all" does. Whiten before, not after.

    advantages, token_weight  (B, T) float; weights of at least 0
    Raises  ValueError, TypeError.
    """
    check_tensor("advantages", advantages)
    check_tensor("token_weight", token_weight, shape=advantages.shape, like=advantages)
    if reads_values(token_weight) and not bool((token_weight >= 0).all()):
        wrong = token_weight[~(token_weight >= 0)][0].item()
        fail("token_weight", "be at least 0: a loss of a negative weight is no loss of an advantage", wrong)
    return token_weight * advantages

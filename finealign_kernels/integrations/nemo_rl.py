"""NeMo-RL 0.6: its clipped policy-gradient loss by this library, under its own config.

    from finealign_kernels.integrations.nemo_rl import install

    install()                                              # in the entry script, before the trainer is set up

`install` puts PolicyLossFn where NeMo-RL's GRPO and PPO look for ClippedPGLossFn. By hand: PolicyLossFn(loss_config).

    loss_fn of the config                       here
    default                                     "ppo", dual = ratio_clip_c, which is off by default
    use_cispo                                   "cispo" with bounds 1 - ratio_clip_min and 1 + ratio_clip_max
    sequence_level_importance_ratios            "gspo_token"; the same where a response has one advantage. Where its
                                                tokens have their own, NeMo-RL gives each the response's mean
    disable_ppo_ratio                           "reinforce"
    force_on_policy_ratio                       old_logp is the policy's own
    truncated_importance_sampling_type          sampler_weights: tis "truncate", icepop "mask", of tokens or, with
                                                sequence_level_importance_ratios, of sequences; seq-mask-tis
                                                "sequence_mask" with gate "geometric"
    reference_policy_kl_type k1, k2, k3         NeMo-RL's own, as are the term of positive examples and the metrics
    finealign_loss: sapo                        any of LOSSES; finealign_options: {tau_pos: 1.0} are its numbers

A float token_mask is a token weight w >= 0, as in NeMo-RL: a response's mean is over Σ w.
"""

import importlib
import sys

from torch import Tensor

from ..losses.policy import policy_loss
from ..losses.sampler import sampler_weights
from ..ops._check import check_one_of, fail
from ._token_losses import LOSSES
from ._versions import check_version

VERSIONS = ("0.6",)  # of NeMo-RL, that this adapter was written for and tested with
LOSS = "nemo_rl.algorithms.loss.loss_functions"
SEAMS = ("nemo_rl.algorithms.grpo", "nemo_rl.algorithms.ppo")  # modules that make the loss


def install(*modules: str) -> None:
    """Puts PolicyLossFn into NeMo-RL's modules, in this process; those of SEAMS, or those that are named.

    Raises  ImportError without NeMo-RL; RuntimeError for a version, or a module without the name, not known here.
    """
    check_version("nemo-rl", VERSIONS)
    for path in modules or SEAMS:
        check_one_of("modules", path, SEAMS)
        module = importlib.import_module(path)
        if not hasattr(module, "ClippedPGLossFn"):
            fail(path, "have ClippedPGLossFn", "none", RuntimeError)
        module.ClippedPGLossFn = sys.modules[__name__].PolicyLossFn


def __getattr__(name: str):
    """PolicyLossFn is made at its first use: NeMo-RL is imported then, and Ray's workers find it by its name."""
    if name != "PolicyLossFn":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_version("nemo-rl", VERSIONS)
    base = importlib.import_module(LOSS).ClippedPGLossFn
    body = {
        "__init__": _init,
        "__call__": _call,
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": _call.__doc__,
    }
    made = globals()[name] = type(base)(name, (base,), body)
    return made


def _init(self, cfg, use_fused_linear_logprobs: bool = False):
    super(sys.modules[__name__].PolicyLossFn, self).__init__(cfg, use_fused_linear_logprobs)
    name = getattr(cfg, "finealign_loss", None)
    if name is None:
        own = ("cispo", self.use_cispo), ("gspo_token", self.sequence_level_importance_ratios)
        own += (("reinforce", self.disable_ppo_ratio and not self.force_on_policy_ratio), ("ppo", True))
        name = next(name for name, chosen in own if chosen)
    check_one_of("finealign_loss", name, LOSSES)
    if name == "reinforce" and self.ratio_clip_c is not None:
        fail("ratio_clip_c", "be null without a ratio", self.ratio_clip_c)
    low, high = self.ratio_clip_min, self.ratio_clip_max
    options = {
        "ppo": {"low": low, "high": high, "dual": self.ratio_clip_c},
        "gspo_token": {"low": low, "high": high, "dual": self.ratio_clip_c},
        "cispo": {"low": 1 - low, "high": 1 + high},
    }.get(name, {})
    self.name, self.options = name, options | (getattr(cfg, "finealign_options", None) or {})


def _call(
    self, next_token_logprobs: Tensor, data, global_valid_seqs: Tensor, global_valid_toks: Tensor
) -> tuple[Tensor, dict]:
    """The policy loss by finealign_kernels; KL, positive examples and metrics are NeMo-RL's, of advantages 0."""
    base = super(sys.modules[__name__].PolicyLossFn, self)
    rest, metrics = base.__call__(
        next_token_logprobs, data | {"advantages": 0 * data["advantages"]}, global_valid_seqs, global_valid_toks
    )
    weight = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    old = None if self.force_on_policy_ratio else data["prev_logprobs"][:, 1:]
    by_token = self.loss_type is type(self.loss_type).TOKEN_LEVEL
    out = policy_loss(
        self.name,
        next_token_logprobs,
        old,
        data["advantages"][:, 1:],
        mask=weight > 0,
        token_weight=weight.to(next_token_logprobs.dtype),
        average="kept",
        reduction="token_global" if by_token else "sequence",
        denominator=global_valid_toks if by_token else global_valid_seqs,
        count_empty=False,
        sampler_weight=_correction(self, next_token_logprobs, old, data, weight > 0),
        kl_coef=0.0,
        **self.options,
    )
    loss = out.loss + rest
    return loss, metrics | {"loss": loss.item()}


def _correction(self, logp: Tensor, old: Tensor | None, data, mask: Tensor) -> Tensor | None:
    """Weights of NeMo-RL's importance-sampling correction, from old log-probs to those of the sampler."""
    if not self.use_importance_sampling_correction:
        return None
    old = logp.detach() if old is None else old
    kind, sampler = self.truncated_importance_sampling_type, data["generation_logprobs"][:, 1:]
    high, low = self.truncated_importance_sampling_ratio, self.truncated_importance_sampling_ratio_min
    of = "sequence" if self.sequence_level_importance_ratios else "token"
    if kind is None or high is None:  # no bound but that of the exponent
        return sampler_weights(old, sampler, mode=f"{of}_truncate", low=0.0, mask=mask)
    if kind == "seq-mask-tis":
        gated = {"mode": "sequence_mask", "gate": "geometric"}
        return sampler_weights(old, sampler, low=low, high=high, mask=mask, **gated)
    mode = f"{of}_{'truncate' if kind == 'tis' else 'mask'}"
    return sampler_weights(old, sampler, mode=mode, low=low, high=high, mask=mask)

"""Fused kernels and autograd functions for fine-grained LLM alignment."""

from . import feedback, integrations
from .integrations.segment_rewards import SegmentRewardModel
from .losses.contrastive import CONTRAST, ContrastiveLoss, contrastive_loss, dropout_views
from .losses.nll import NLLLoss, nll_loss
from .losses.pairs import RankedPairs, pick_scores, ranked_pairs
from .losses.pivots import (
    AdaptiveMask,
    adaptive_mask,
    best_of_n,
    implicit_scores,
    pivot_flags,
    pivot_segments,
    prefix_scores,
)
from .losses.pointwise import PointwiseLoss, kto, pdpo, pointwise_loss, ulma, unlikelihood
from .losses.policy import POLICY, PolicyLoss, policy_loss
from .losses.preference import (
    PREFERENCE,
    Hyper,
    PreferenceLoss,
    Row,
    cdpo,
    cpo,
    dpo,
    ipo,
    orpo,
    preference_loss,
    robust,
    simpo,
    slic,
)
from .losses.reward import REWARD, RewardLoss, RewardRow, reward_loss
from .losses.sampler import sampler_weights
from .losses.segment_classes import SegmentClassLoss, segment_class_loss
from .losses.strength import Strength, preference_strength
from .losses.value import ValueLoss, value_loss
from .losses.weights import ld_weights, wpo_weights
from .metarm import MetaRM, difference_loss
from .ops._check import check_errors
from .ops.context import ContextShard
from .ops.logprobs import LogProbs, linear_logprobs, token_logprobs
from .ops.ranks import sum_over_ranks
from .ops.scan import reverse_scan
from .ops.segments import segment_broadcast, segment_mean, segment_put_last, segment_sum
from .rl.advantages import Advantages, advantages
from .rl.gae import GAE, discounted_returns, gae, kl_penalty
from .rl.groups import decoupled_advantages, group_advantages, turn_advantages
from .rl.rewards import SegmentEnds, SegmentRewards, segment_ends, segment_rewards, token_rewards
from .rl.whitening import moments, whiten

__version__ = "0.1.0"

__all__ = [
    "AdaptiveMask",
    "Advantages",
    "CONTRAST",
    "ContextShard",
    "ContrastiveLoss",
    "GAE",
    "Hyper",
    "LogProbs",
    "MetaRM",
    "NLLLoss",
    "POLICY",
    "PREFERENCE",
    "PointwiseLoss",
    "PolicyLoss",
    "PreferenceLoss",
    "REWARD",
    "RankedPairs",
    "RewardLoss",
    "RewardRow",
    "Row",
    "SegmentClassLoss",
    "SegmentEnds",
    "SegmentRewardModel",
    "SegmentRewards",
    "Strength",
    "ValueLoss",
    "adaptive_mask",
    "advantages",
    "best_of_n",
    "cdpo",
    "check_errors",
    "contrastive_loss",
    "cpo",
    "decoupled_advantages",
    "difference_loss",
    "discounted_returns",
    "dpo",
    "dropout_views",
    "feedback",
    "gae",
    "group_advantages",
    "implicit_scores",
    "integrations",
    "ipo",
    "kl_penalty",
    "kto",
    "ld_weights",
    "linear_logprobs",
    "moments",
    "nll_loss",
    "orpo",
    "pdpo",
    "pick_scores",
    "pivot_flags",
    "pivot_segments",
    "pointwise_loss",
    "policy_loss",
    "preference_loss",
    "preference_strength",
    "prefix_scores",
    "ranked_pairs",
    "reverse_scan",
    "reward_loss",
    "robust",
    "sampler_weights",
    "segment_broadcast",
    "segment_class_loss",
    "segment_ends",
    "segment_mean",
    "segment_put_last",
    "segment_rewards",
    "segment_sum",
    "simpo",
    "slic",
    "sum_over_ranks",
    "token_logprobs",
    "token_rewards",
    "turn_advantages",
    "ulma",
    "unlikelihood",
    "value_loss",
    "whiten",
    "wpo_weights",
]

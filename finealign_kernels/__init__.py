"""Fused kernels and autograd functions for fine-grained LLM alignment."""

from .losses.nll import NLLLoss, nll_loss
from .losses.pivots import (
    AdaptiveMask,
    adaptive_mask,
    best_of_n,
    implicit_scores,
    pivot_flags,
    pivot_segments,
    prefix_scores,
)
from .losses.preference import PreferenceLoss, dpo, ipo, preference_loss, simpo
from .ops._check import check_errors
from .ops.logprobs import LogProbs, linear_logprobs, token_logprobs
from .ops.segments import segment_broadcast, segment_mean, segment_put_last, segment_sum

__version__ = "0.1.0"

__all__ = [
    "AdaptiveMask",
    "LogProbs",
    "NLLLoss",
    "PreferenceLoss",
    "adaptive_mask",
    "best_of_n",
    "check_errors",
    "dpo",
    "implicit_scores",
    "ipo",
    "linear_logprobs",
    "nll_loss",
    "pivot_flags",
    "pivot_segments",
    "preference_loss",
    "prefix_scores",
    "segment_broadcast",
    "segment_mean",
    "segment_put_last",
    "segment_sum",
    "simpo",
    "token_logprobs",
]

"""Fused kernels and autograd functions for fine-grained LLM alignment."""

from .losses.nll import NLLLoss, nll_loss
from .losses.preference import PreferenceLoss, dpo, ipo, preference_loss, simpo
from .ops._check import check_errors
from .ops.logprobs import LogProbs, linear_logprobs, token_logprobs
from .ops.segments import segment_broadcast, segment_mean, segment_put_last, segment_sum

__version__ = "0.1.0"

__all__ = [
    "LogProbs",
    "NLLLoss",
    "PreferenceLoss",
    "check_errors",
    "dpo",
    "ipo",
    "linear_logprobs",
    "nll_loss",
    "preference_loss",
    "segment_broadcast",
    "segment_mean",
    "segment_put_last",
    "segment_sum",
    "simpo",
    "token_logprobs",
]

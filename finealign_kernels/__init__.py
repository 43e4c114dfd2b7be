"""Fused kernels and autograd functions for fine-grained LLM alignment."""

from .ops._check import check_errors
from .ops.logprobs import LogProbs, linear_logprobs, token_logprobs

__version__ = "0.1.0"

__all__ = ["LogProbs", "check_errors", "linear_logprobs", "token_logprobs"]

"""Negative log-likelihood of responses: plain, weighted and masked supervised fine-tuning."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops._check import fail
from ..ops._layout import TokenTensor, flatten, flatten_like
from .reduce import check_average, check_denominator, reduce, sequence_scores, sequence_weights


class NLLLoss(NamedTuple):
    """loss carries the gradient; losses (S,) of the sequences are detached."""

    loss: Tensor
    losses: Tensor


def nll_loss(
    logp: TokenTensor,
    *,
    mask: TokenTensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_weight: TokenTensor | None = None,
    segment_ids: TokenTensor | None = None,
    average: bool | str = "kept",
    reduction: str = "token",
    denominator: float | Tensor | None = None,
) -> NLLLoss:
    """-Σ_t w_t logp_t of responses, under a named average of tokens and reduction of the batch.

    logp          (B, T) with mask, or flat (N,) with cu_seqlens; nats
    mask          as logp, bool: is the token read;  token_weight  as logp, float: how much it counts; default 1
    reduction     "token"  one mean over the batch's tokens: Σ w (-logp) / Σ w; average "all": / number of mask tokens
                  "mean"   over sequences, each with its own average;  "sum", "none"
    average       inside a sequence: False (sum), "kept" (by Σ token_weight), "all" (by its mask tokens), "segments"
                  (mean of segment means; segment_ids as logp, int, not decreasing in a sequence, -1 for none)
    denominator   a number or tensor to divide the sum by instead (a global token count, say)

    Returns NLLLoss; no token at all gives 0, connected to the graph.
    Raises  ValueError, TypeError naming argument, expectation and finding.
    Source  arXiv:2306.01693 (token mean), arXiv:2411.00809 as derived (masked forms).
    """
    check_average(average, segment_ids)
    if reduction == "token" and (average is False and denominator is None or average == "segments"):
        fail("average", "be 'kept' or 'all' with reduction='token', which divides by tokens", repr(average))
    tokens = flatten(logp, mask, cu_seqlens, name="logp")
    if token_weight is not None:
        token_weight = flatten_like(token_weight, tokens, "token_weight").detach()
    weight = sequence_weights(token_weight, tokens, average if reduction != "token" else False, segment_ids)
    items = -sequence_scores(tokens.x, weight, tokens)
    if reduction != "token":
        return NLLLoss(reduce(items, reduction, denominator), items.detach())
    if denominator is None:
        read = torch.ones_like(weight) if tokens.mask is None else tokens.mask
        denominator = weight.sum() if average == "kept" else read.sum()
        denominator = torch.where(denominator == 0, 1, denominator)
    return NLLLoss(items.sum() / check_denominator(denominator), items.detach())

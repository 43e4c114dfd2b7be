"""Negative log-likelihood of responses: plain, weighted and masked supervised fine-tuning."""

from typing import NamedTuple

from torch import Tensor

from ..formulas import margin
from ..ops._check import check_number, fail
from ..ops._layout import Tokens, TokenTensor, flatten, flatten_like, warn_of_tokens
from ..ops.sequence_loss import batch_loss, missing, sequence_loss
from .reduce import (
    check_average,
    one_for_none,
    plain_denominator,
    read,
    reduce,
    sequence_scores,
    sequence_weights,
)


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
    label_smoothing: float = 0.0,
    mean_logp: TokenTensor | None = None,
) -> NLLLoss:
    """-Σ_t w_t ((1 - ε) logp_t + ε mean_logp_t) of responses, by a named average of tokens and reduction of the batch.

    logp          (B, T) with mask, or flat (N,) with cu_seqlens; nats
    mask          as logp, bool: True for response tokens;  token_weight  as logp, float: how much it counts; default 1
    reduction     "token"  one mean over the batch's tokens: Σ w (-logp) / Σ w; average "all": / number of mask tokens
                  "mean"   over sequences, each with its own average;  "sum", "none"
    average       inside a sequence: False (sum), "kept" (by Σ token_weight), "all" (by its mask tokens), "segments"
                  (mean of segment means; segment_ids as logp, int, not decreasing in a sequence, -1 for none)
    denominator   a number or tensor to divide the sum by instead (a global token count, say)
    label_smoothing  ε in [0, 1]: the target is the label with 1 - ε, and every token of the vocabulary with ε / V more
    mean_logp     as logp, needed where ε > 0: mean of the log-probs of the vocabulary, Σ_v log p_v / V, nats. It is
                  `mean_logp` of linear_logprobs(..., outputs=("mean_logits",)), with its gradient

    Returns NLLLoss; no token at all gives 0, connected to the graph.
    Raises  ValueError, TypeError naming argument, expectation and finding.
    Source  arXiv:2306.01693 (token mean), arXiv:2411.00809 as derived (masked forms), arXiv:1512.00567 section 7
            (smoothing), as torch's cross_entropy has it.
    """
    check_average(average, segment_ids)
    if reduction == "token" and (average is False and denominator is None or average == "segments"):
        fail("average", "be 'kept' or 'all' with reduction='token', which divides by tokens", repr(average))
    epsilon = check_number("label_smoothing", label_smoothing, least=0, most=1)
    tokens = flatten(logp, mask, cu_seqlens, name="logp")
    warn_of_tokens("nll_loss", tokens, token_weight)
    if epsilon or mean_logp is not None:
        tokens = _smoothed(tokens, epsilon, mean_logp)
    given = denominator is not None
    if reduction == "token":
        if denominator is None:
            denominator = _token_count(tokens, token_weight if average == "kept" else None)
        reduction, average = "sum", False
    if average != "segments" and missing(margin.linear, tokens.whole.device) is None:
        options = dict(phi=margin.linear, beta=1.0, token_weight=token_weight, average=average, pairs=None)
        plain = plain_denominator(reduction, denominator, tokens.segments, given)
        if plain is not None:
            return NLLLoss(*batch_loss(tokens, denominator=plain, **options)[:2])
        items = sequence_loss(tokens, **options).losses
    else:
        if token_weight is not None:
            token_weight = flatten_like(token_weight, tokens, "token_weight").detach()
        weight = sequence_weights(token_weight, tokens, average, segment_ids)
        items = -sequence_scores(tokens.x, weight, tokens)
    return NLLLoss(reduce(items, reduction, denominator, given=given), items.detach())


def _smoothed(tokens: Tokens, epsilon: float, mean_logp: TokenTensor | None) -> Tokens:
    """(1 - ε) logp + ε mean_logp of each token, in float32 (float64)."""
    if mean_logp is None:
        expected = "be given where label_smoothing > 0: mean_logp of linear_logprobs(..., outputs=('mean_logits',))"
        fail("mean_logp", expected, "None")
    mean, wide = flatten_like(mean_logp, tokens, "mean_logp"), tokens.widened()
    if not epsilon:
        return tokens
    mean = mean.to(wide.x.dtype)
    return wide.with_x(mean if epsilon == 1 else (1 - epsilon) * wide.x + epsilon * mean)


def _token_count(tokens: Tokens, token_weight) -> float | Tensor:
    """Σ token_weight, or the number, of the tokens that the mask keeps; 1 where it is 0."""
    if token_weight is not None:
        return one_for_none(read(flatten_like(token_weight, tokens, "token_weight"), tokens).sum())
    if tokens.mask is None:
        return max(1, tokens.whole.numel())
    return one_for_none(tokens.mask.sum())

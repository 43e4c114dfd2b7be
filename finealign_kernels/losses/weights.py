"""Weights that published losses put on tokens and pairs, for `token_weight` and `pair_weight`."""

import torch
from torch import Tensor

from ..ops._check import check_number, fail
from ..ops._layout import Tokens, TokenTensor, flatten, flatten_like, unflatten
from ..ops.segments import segment_mean, segment_sum


def ld_weights(
    logp: TokenTensor,
    *,
    mask: TokenTensor | None = None,
    cu_seqlens: Tensor | None = None,
    alpha: float = 0.5,
    pairs: str = "halves",
) -> TokenTensor:
    """LD-DPO's token weights: 1 on the first min(n_chosen, n_rejected) tokens of a pair's responses, alpha after them.

    Of logp only the layout is read, which is that of the result, and float32 (float64) is its dtype. alpha in [0, 1].
    Raises ValueError, TypeError. Source: arXiv:2409.06411.
    """
    alpha = check_number("alpha", alpha)
    if not 0 <= alpha <= 1:
        fail("alpha", "be in [0, 1]", alpha)
    tokens = flatten(logp, mask, cu_seqlens, name="logp")
    ones = torch.ones_like(tokens.x, dtype=torch.promote_types(tokens.x.dtype, torch.float32))
    read = ones if tokens.mask is None else tokens.mask.to(ones.dtype)
    chosen, rejected = _pairs(segment_sum(read, tokens.cu_seqlens), tokens, pairs)
    shared = torch.minimum(chosen, rejected)
    shared = torch.cat([shared, shared]) if pairs == "halves" else shared.repeat_interleave(2)
    token = torch.arange(len(read), device=read.device)
    row = torch.bucketize(token, tokens.cu_seqlens[1:], right=True)
    seen = torch.nn.functional.pad(read.long().cumsum(0), (1, 0))
    place = seen[1:] - seen[tokens.cu_seqlens.long()][row]  # 1 at a response's first token
    return unflatten(torch.where(place <= shared[row], ones, alpha), tokens.shapes)


def wpo_weights(
    logp: TokenTensor,
    log_sum_sq_probs: TokenTensor,
    *,
    mask: TokenTensor | None = None,
    cu_seqlens: Tensor | None = None,
    pairs: str = "halves",
) -> Tensor:
    """WPO's pair weights (P,): exp(mean_t (logp_t - log Σ_v p_v²)) of the chosen times that of the rejected response.

    log_sum_sq_probs is an output of linear_logprobs and token_logprobs; layouts as in preference_loss. A constant.
    Source: arXiv:2406.11827 eq. 2 (sampled alignment).
    """
    tokens = flatten(logp, mask, cu_seqlens, name="logp")
    wide = torch.promote_types(tokens.x.dtype, torch.float32)
    aligned = tokens.x.detach().to(wide) - flatten_like(log_sum_sq_probs, tokens, "log_sum_sq_probs").detach()
    chosen, rejected = _pairs(segment_mean(aligned, tokens.cu_seqlens, mask=tokens.mask), tokens, pairs)
    return (chosen + rejected).exp()


def _pairs(x: Tensor, tokens: Tokens, pairs: str) -> tuple[Tensor, Tensor]:
    if pairs not in ("halves", "interleaved"):
        fail("pairs", "be 'halves' or 'interleaved'", repr(pairs))
    if tokens.segments % 2:
        fail("logp", "hold an even number of sequences, chosen and rejected", tokens.segments)
    return x.chunk(2) if pairs == "halves" else (x[0::2], x[1::2])

"""The critic's loss: clipped squared error of values against returns."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..formulas import surrogate
from ..ops._check import check_bool, check_number, fail
from ..ops._layout import TokenTensor, flatten, flatten_like, unflatten
from .reduce import FromTokens, check_token_reduction, mean_of_tokens, read, token_shares, weigh


class ValueLoss(NamedTuple):
    """loss carries the gradient; everything else is detached."""

    loss: Tensor  # ()
    losses: Tensor  # of each token, as values; 0 where the mask is false
    clip_fraction: Tensor  # () share of the mask's tokens at which the clipped error is the larger one


def value_loss(
    values: TokenTensor,
    old_values: TokenTensor | None,
    returns: TokenTensor,
    *,
    mask: TokenTensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_weight: TokenTensor | None = None,
    average: str = "all",
    clip: float | None = 0.2,
    reduction: str = "token",
    denominator: float | Tensor | None = None,
    max_length: float | Tensor | None = None,
    count_empty: bool = True,
) -> ValueLoss:
    """½ Σ_t c_t w_t max((V_t - R_t)², (V'_t - R_t)²) with V' = clamp(V, V_old - clip, V_old + clip).

    values      (B, T) with mask, or flat (N,) with cu_seqlens (B + 1,); float
    old_values  as values, of the rollout; a constant. None only where clip is None
    returns     as values; a constant
    clip        a number > 0, or None: ½ Σ c w (V - R)²

    The other arguments are policy_loss's. Where V' has the larger error the gradient is 0, else c w (V - R).
    Returns ValueLoss; no token at all gives 0, connected to the graph.
    Raises  ValueError, TypeError naming argument, expectation and finding.
    Source  the code of arXiv:2306.01693 (fgrlhf/ppo.py), verl and OpenRLHF.
    """
    if clip is not None:
        clip = check_number("clip", clip, positive=True)
        if old_values is None:
            fail("old_values", f"be given for clip = {clip} (clip=None compares with the returns alone)", None)
    count_empty = check_bool("count_empty", count_empty)
    check_token_reduction(reduction, average, denominator, max_length)
    tokens = flatten(values, mask, cu_seqlens, name="values")
    value, target = read(tokens.x, tokens), read(flatten_like(returns, tokens, "returns"), tokens)
    if clip is None:
        losses, slope, flat = (value - target) * ((value - target) / 2), value - target, torch.zeros_like(value)
    else:
        old = read(flatten_like(old_values, tokens, "old_values"), tokens)
        losses, slope, flat = surrogate.clipped_square(value, old, target, clip=clip)
    weight = None if token_weight is None else read(flatten_like(token_weight, tokens, "token_weight"), tokens)
    options = dict(denominator=denominator, max_length=max_length, count_empty=count_empty)
    share = token_shares(tokens, reduction, weight if average == "kept" else None, **options)
    share = share if weight is None else share * weight
    loss = FromTokens.apply("value_loss", tokens.x, None, weigh(share, losses).sum(), weigh(share, slope), None)
    return ValueLoss(loss, unflatten(losses, tokens.shapes), mean_of_tokens(flat, tokens))

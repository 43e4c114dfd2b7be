"""Weights for tokens whose sampler and trainer give them different probabilities."""

import torch
from torch import Tensor

from ..formulas.surrogate import bounded_ratio
from ..ops._check import check_number, fail
from ..ops._layout import TokenTensor, flatten, flatten_like, unflatten
from ..ops.segments import segment_broadcast, segment_sum
from .reduce import read

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def sampler_weights(
    old_logp: TokenTensor,
    sampler_logp: TokenTensor,
    *,
    mode: str,
    low: float | None = None,
    high: float | None = None,
    mask: TokenTensor | None = None,
    cu_seqlens: Tensor | None = None,
    on_missing: str = "propagate",
) -> TokenTensor:
    """ω of each token for policy_loss's sampler_weight: how likelier the trainer finds it than the sampler did.

        e_t = exp(clamp(old_logp_t - sampler_logp_t, ±20)),   E_b = exp(clamp(Σ_t (old_logp_t - sampler_logp_t), ±20))

    old_logp      (B, T) with mask, or flat (N,) with cu_seqlens: the trainer's log-probs of what was sampled; nats
    sampler_logp  as old_logp: those that the sampler reported
    mode          "token_truncate": clamp(e_t, low, high); "token_mask": e_t inside [low, high], else 0;
                  "sequence_truncate", "sequence_mask": the same of E_b, for every token of its sequence
    low, high     at least one of them; the other is no bound
    on_missing    what a NaN in sampler_logp at a token of the mask does: "propagate", or "one": count as no difference

    Returns a constant as old_logp, float32 (float64), 0 where the mask is false.
    Raises  ValueError, TypeError naming argument, expectation and finding.
    Source  F. Yao et al., off-policy RL by mismatched engines (2025), as TRL, verl and OpenRLHF have it.
    """
    if mode not in MODES:
        fail("mode", f"be one of {MODES}", repr(mode))
    if on_missing not in ("propagate", "one"):
        fail("on_missing", "be 'propagate' or 'one'", repr(on_missing))
    for name, bound in (("low", low), ("high", high)):
        if bound is not None:
            check_number(name, bound)
    if low is None and high is None:
        fail("high", "be given, or low: without a bound nothing is truncated or masked", None)
    if low is not None and high is not None and low > high:
        fail("low", f"not be above high = {high}", low)

    tokens = flatten(old_logp, mask, cu_seqlens, name="old_logp")
    sampler = read(flatten_like(sampler_logp, tokens, "sampler_logp"), tokens)
    old = read(tokens.x, tokens)
    apart = old - sampler
    if on_missing == "one":
        apart = torch.where(sampler.isnan() & ~old.isnan(), 0, apart)
    if mode.startswith("sequence"):
        rows = segment_sum(apart, tokens.cu_seqlens)
        apart = segment_broadcast(rows, tokens.cu_seqlens, total=apart.shape[0])
    weight = bounded_ratio(apart)
    if mode.endswith("truncate"):
        weight = weight.clamp(low, high)
    else:
        outside = torch.zeros_like(weight, dtype=torch.bool)
        outside = outside if low is None else outside | (weight < low)
        outside = outside if high is None else outside | (weight > high)
        weight = torch.where(outside, 0, weight)
    return unflatten(read(weight, tokens), tokens.shapes)

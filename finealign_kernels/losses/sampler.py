"""Weights for tokens whose sampler and trainer give them different probabilities."""

import torch
from torch import Tensor

from ..formulas.surrogate import bounded_ratio
from ..ops._check import check_number, fail
from ..ops._layout import Tokens, TokenTensor, flatten, flatten_like, unflatten
from ..ops.segments import segment_broadcast, segment_mean, segment_sum
from .reduce import read

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
GATES = ("ratio", "geometric", "binary_kl", "tv")
SMALLEST = 1e-6  # the distance of a probability from 0 and from 1 that the binary KL reads: its logs stay finite


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
    gate: str = "ratio",
) -> TokenTensor:
    """ω of each token for policy_loss's sampler_weight: the ratio of its probabilities in trainer and sampler.

        e_t = exp(clamp(old_logp_t - sampler_logp_t, ±20)),   E_b = exp(clamp(Σ_t (old_logp_t - sampler_logp_t), ±20))

    old_logp      (B, T) with mask, or flat (N,) with cu_seqlens: the trainer's log-probs of what was sampled; nats
    sampler_logp  as old_logp: those that the sampler reported
    mode          "token_truncate": clamp(e_t, low, high); "token_mask": e_t inside [low, high], else 0;
                  "sequence_truncate", "sequence_mask": the same of E_b, for every token of its sequence
    low, high     at least one of them, low >= 0, high > 0; the other is no bound
    on_missing    what a NaN in sampler_logp at a token of the mask does: "propagate", or "one": count as no difference
    gate          what the mask modes compare with the bounds. "ratio": the weight itself. The others keep e_t, of a
                  token or of every token of a sequence, if their statistic is inside the bounds, else 0:
                  "geometric" (with "sequence_mask"): exp(mean_t(old_logp_t - sampler_logp_t));
                  "binary_kl": p ln(p/q) + (1-p) ln((1-p)/(1-q)), p = exp(sampler_logp_t), q = exp(old_logp_t), both
                  clamped to [1e-6, 1 - 1e-6]; "tv": |p - q|. A sequence has the mean of its tokens; both take high only

    Returns a constant as old_logp, float32 (float64), 0 where the mask is false.
    Raises  ValueError, TypeError naming argument, expectation and finding.
    Source  F. Yao et al., off-policy RL by mismatched engines (2025), as TRL, verl and OpenRLHF have it.
    """
    if mode not in MODES:
        fail("mode", f"be one of {MODES}", repr(mode))
    if gate not in GATES:
        fail("gate", f"be one of {GATES}", repr(gate))
    if gate != "ratio" and not mode.endswith("mask"):
        fail("mode", f"be 'token_mask' or 'sequence_mask' with gate={gate!r}", repr(mode))
    if gate == "geometric" and mode != "sequence_mask":
        fail("mode", "be 'sequence_mask' with gate='geometric': the mean is that of a sequence", repr(mode))
    if on_missing not in ("propagate", "one"):
        fail("on_missing", "be 'propagate' or 'one'", repr(on_missing))
    low = low if low is None else check_number("low", low, least=0)
    high = high if high is None else check_number("high", high, positive=True)
    if gate in ("binary_kl", "tv") and low is not None:
        fail("low", f"be None with gate={gate!r}: a divergence is bounded from above", low)
    if low is None and high is None:
        fail("high", "be given, or low: without a bound nothing is truncated or masked", None)
    if low is not None and high is not None and low > high:
        fail("low", f"not be above high = {high}", low)

    tokens = flatten(old_logp, mask, cu_seqlens, name="old_logp")
    sampler = read(flatten_like(sampler_logp, tokens, "sampler_logp"), tokens)
    old = read(tokens.x, tokens)
    apart = old - sampler
    if on_missing == "one":
        missing = sampler.isnan() & ~old.isnan()
        apart, sampler = torch.where(missing, 0, apart), torch.where(missing, old, sampler)
    if gate == "ratio" and mode.startswith("sequence"):
        rows = segment_sum(apart, tokens.cu_seqlens)
        apart = segment_broadcast(rows, tokens.cu_seqlens, total=apart.shape[0])
    weight = bounded_ratio(apart)
    if mode.endswith("truncate"):
        weight = weight.clamp(low, high)
    else:
        gated = weight if gate == "ratio" else _statistic(gate, mode, apart, old, sampler, tokens)
        outside = torch.zeros_like(weight, dtype=torch.bool)
        outside = outside if low is None else outside | (gated < low)
        outside = outside if high is None else outside | (gated > high)
        weight = torch.where(gated.isnan(), gated, torch.where(outside, 0, weight))
    return unflatten(read(weight, tokens), tokens.shapes)


def _statistic(gate: str, mode: str, apart: Tensor, old: Tensor, sampler: Tensor, tokens: Tokens) -> Tensor:
    """(N,): what a gate other than "ratio" compares with the bounds, of each token or of its sequence."""
    if gate == "geometric":
        each = apart
    else:
        p, q = (logp.exp().clamp(SMALLEST, 1 - SMALLEST) for logp in (sampler, old))
        each = (p - q).abs() if gate == "tv" else p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    if mode.startswith("sequence"):
        rows = segment_mean(each, tokens.cu_seqlens, mask=tokens.mask)
        each = segment_broadcast(rows, tokens.cu_seqlens, total=each.shape[0])
    return bounded_ratio(each) if gate == "geometric" else each

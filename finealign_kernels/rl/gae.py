"""Advantages and returns of tokens, or of segments as actions, and the KL penalty; formulas/returns.py says which.

All results are constants of the policy loss: detached, in the shapes of the rewards, float32 (float64 for float64).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..formulas import returns as formula
from ..formulas.segments import segment_ids as row_of
from ..ops import advantages as native
from ..ops._check import check_number, check_tensor, fail
from ..ops._layout import Tokens, flatten, flatten_like, unflatten

MASKED = ("carry", "zero")
ESTIMATORS = native.ESTIMATORS


class GAE(NamedTuple):
    """Both in the shapes of the rewards, 0 where the mask is false."""

    advantages: Tensor
    returns: Tensor  # A + V


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    bootstrap: Tensor | None = None,
    masked: str = "carry",
    segment_ids: Tensor | None = None,
    backend: str = "auto",
) -> GAE:
    """Generalized advantage estimation over the valid tokens of each sequence.

        A_t = r_t - V_t + γ V_u + γλ A_u        u the next valid token; at the last one γ bootstrap stands for the rest
        Ret_t = A_t + V_t

    rewards      (B, T), or (N,) with cu_seqlens; float
    values       the critic's V_t, as rewards
    mask         bool, as rewards: the response tokens. Values at other tokens may be NaN; the results there are 0
    gamma, lam   in [0, 1]: numbers, or (S,) one a sequence
    bootstrap    (S,): the value of the state after the last valid token of a sequence that was cut off; None: 0
    masked       masked tokens inside a response: "carry" skips them (the length of a tool's output does not discount),
                 "zero" makes each a step with r = V = 0, which multiplies what follows by γλ
    segment_ids  int, as rewards, -1 for none: every segment is one action, with the sum of its rewards, V at its first
                 token, and one advantage for all its tokens; tokens of no segment get 0. Ids change from segment to
                 segment of a sequence. With masked="carry" only
    backend      "auto", "reference" (torch, any device) or "native" (CPU)

    Raises  ValueError, TypeError naming argument, expectation and finding.
    Source  arXiv:1506.02438 eq. 16; masked tokens: "carry" as verl, "zero" as OpenRLHF.
    """
    if masked not in MASKED:
        fail("masked", f"be one of {MASKED}", repr(masked))
    tokens = constants(rewards, mask, cu_seqlens, "rewards", also=values)
    values = like(values, tokens, "values")
    gamma, lam = rate("gamma", gamma, tokens), rate("lam", lam, tokens)
    bootstrap = None if bootstrap is None else per_sequence("bootstrap", bootstrap, tokens)
    if segment_ids is not None:
        if masked != "carry":
            fail("masked", "be 'carry' where segments are the actions", repr(masked))
        segment = flatten_like(segment_ids, tokens, "segment_ids", (torch.int32, torch.int64))
        return GAE(*_by_segment(tokens, values, segment, gamma, lam, bootstrap, backend))
    pair = gae_of(tokens, values, gamma, lam, bootstrap, masked, backend)
    return GAE(*(unflatten(y, tokens.shapes) for y in pair))


def discounted_returns(
    rewards: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    masked: str = "carry",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """G_t = r_t + γ G_u, u the next valid token of the sequence: the advantage of methods without a critic.

    masked   "carry"; "zero": γ^k G_u with k = u - t (OpenRLHF); "restart": G starts at 0 again at every masked token,
             so that a token before a tool call never sees the reward behind it (verl's REINFORCE++, for comparison)
    Other arguments, shapes and refusals: gae.
    """
    if masked not in (*MASKED, "restart"):
        fail("masked", f"be one of {(*MASKED, 'restart')}", repr(masked))
    tokens = constants(rewards, mask, cu_seqlens, "rewards")
    return unflatten(returns_of(tokens, rate("gamma", gamma, tokens), masked, backend), tokens.shapes)


def kl_penalty(
    old_logp: Tensor,
    ref_logp: Tensor,
    *,
    estimator: str = "k1",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Estimate by token of KL(policy || reference), nats: what β multiplies in r_t = reward_t - β kl_t.

        k1  d              d = old_logp - ref_logp; signed, unbiased
        k2  d²/2           biased, never negative
        k3  e^-d - 1 + d   unbiased, never negative; d clamped to ±20

    old_logp   log-probs of the sampled tokens under the policy that sampled them; (B, T), or (N,) with cu_seqlens
    ref_logp   under the reference; as old_logp
    mask       bool, as old_logp; 0 is returned elsewhere
    Raises     ValueError, TypeError.
    Source     arXiv:2306.01693 (k1); J. Schulman, "Approximating KL Divergence" (2020).
    """
    check_estimator("estimator", estimator)
    tokens = constants(old_logp, mask, cu_seqlens, "old_logp", also=ref_logp)
    kl = formula.divergence(tokens.x, like(ref_logp, tokens, "ref_logp"), estimator, tokens.mask)
    return unflatten(kl, tokens.shapes)


# ---- flat, checked: what advantages.py puts together as well --------------------------------------------------------


def gae_of(tokens: Tokens, values, gamma, lam, bootstrap, masked, backend) -> tuple[Tensor, Tensor]:
    """(N,) each; gamma, lam (1,) or (S,) float64, bootstrap (S,) or None."""
    if native.runs(backend, tokens.x.device):
        return native.gae(tokens, values, gamma, lam, bootstrap, masked)
    gamma, lam = (per_token(rate, tokens) for rate in (gamma, lam))
    return formula.gae(
        tokens.x, values, tokens.cu_seqlens, tokens.mask, gamma=gamma, lam=lam, bootstrap=bootstrap, masked=masked
    )


def returns_of(tokens: Tokens, gamma, masked, backend) -> Tensor:
    """(N,); gamma (1,) or (S,) float64."""
    if masked == "restart":
        native.runs(backend, tokens.x.device)  # for its refusals: a convention to compare with needs no kernel
    elif native.runs(backend, tokens.x.device):
        return native.gae(tokens, None, gamma, torch.ones_like(gamma), None, masked)[0]
    gamma = per_token(gamma, tokens)
    return formula.discounted_returns(tokens.x, tokens.cu_seqlens, tokens.mask, gamma=gamma, masked=masked)


def _by_segment(tokens: Tokens, values, segment, gamma, lam, bootstrap, backend) -> list[Tensor]:
    """Sums stand at the first token of each segment, where the mask of the recurrence is true; then all take it."""
    cuts, count, first, in_segment = formula.actions(segment, tokens.cu_seqlens, tokens.mask)
    sums = formula.action_sums(tokens.x, cuts, count, in_segment)
    pair = gae_of(tokens.with_x(sums, first), values, gamma, lam, bootstrap, "carry", backend)
    return [unflatten(formula.action_sums(y, cuts, count, in_segment), tokens.shapes) for y in pair]


def constants(x: Tensor, mask, cu_seqlens, name: str, also: Tensor | None = None) -> Tokens:
    """Flat tokens of x, detached and at least float32; float64 if x or `also` is."""
    tokens = flatten(x, mask, cu_seqlens, name=name)
    wide = torch.promote_types(tokens.x.dtype, torch.float32)
    if isinstance(also, Tensor) and also.dtype == torch.float64:
        wide = torch.float64
    return tokens.with_x(constant(tokens.x, wide))


def like(y: Tensor, tokens: Tokens, name: str) -> Tensor:
    """(N,) of the dtype of the tokens, detached."""
    return constant(flatten_like(y, tokens, name), tokens.x.dtype)


def constant(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x detached, of a dtype: a call less where it is so already."""
    x = x.detach() if x.requires_grad else x
    return x if x.dtype == dtype else x.to(dtype)


def rate(name: str, value: float | Tensor, tokens: Tokens) -> Tensor:
    """(1,) or (S,) float64 in [0, 1]."""
    if not isinstance(value, Tensor):
        value = check_number(name, value)
        if not 0 <= value <= 1:
            fail(name, "be in [0, 1]", value)
        return torch.full((1,), value, dtype=torch.float64, device=tokens.x.device)
    rates = per_sequence(name, value, tokens).double()
    if rates.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = ~((rates >= 0) & (rates <= 1))
        if wrong.any():
            s = int(wrong.nonzero()[0])
            fail(name, "be in [0, 1]", f"{name}[{s}] = {float(rates[s])}")
    return rates


def per_sequence(name: str, value: Tensor, tokens: Tokens) -> Tensor:
    """(S,), detached."""
    check_tensor(name, value, shape=(tokens.segments,), like=tokens.x)
    return value.detach()


def per_token(rates: Tensor, tokens: Tokens) -> Tensor:
    """(), or (N,) of (S,)."""
    if rates.shape[0] == 1:
        return rates[0]
    return rates[row_of(tokens.cu_seqlens, tokens.x.shape[0])]


def check_estimator(name: str, estimator: str) -> None:
    if estimator not in tuple(ESTIMATORS):
        fail(name, f"be one of {tuple(ESTIMATORS)}", repr(estimator))

"""Native ops of what comes before a policy loss, on flat, checked tokens; formulas/returns.py is their definition.

Results are constants. They are the same bit for bit with any number of threads; those of a sequence, moments apart, are
the same at any place in the batch and with any padding after its end. A GPU adds in another order than a CPU.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _native
from ._check import fail
from ._layout import Tokens

MODES = {"std": 0, "clamp": 1, "compat": 2}  # Scale in csrc/launch.h
ESTIMATORS = {"k1": 0, "k2": 1, "k3": 2}  # Estimator


class Models(NamedTuple):
    """Rewards of the segments of all sequences by K models, those of the first one first; for placement "end"."""

    reward: Tensor  # (M,) float64, times the weight
    end: Tensor  # (M,) int64
    start: Tensor | None  # (M,) int64
    bounds: Tensor  # (K, S + 1) int64: which of the M
    overwrite: bool  # of a model's rewards at one token the later stays
    drop: bool  # the reward of a segment without tokens


class Whitening(NamedTuple):
    """How to whiten: moments (5,), of any number of ranks, or None for not at all."""

    moments: Tensor | None = None
    mode: str = "std"
    unbiased: bool = False


AS_IT_IS = Whitening()


class Results(NamedTuple):
    """What `advantages` was asked for; the rest is empty."""

    shaped: Tensor  # (N,) rewards less β kl; empty where they are the rewards given
    kl: Tensor  # (N,)
    reward_moments: Tensor  # (5,) of formulas/returns.py `moments`
    advantages: Tensor  # (N,)
    returns: Tensor  # (N,)
    token_weight: Tensor  # (N,) float32
    advantage_moments: Tensor  # (5,)


def runs(backend: str, device: torch.device) -> bool:
    """Whether the native ops run on a device: True, False for the reference; one asked for by name runs or raises."""
    missing = _native.missing(device)
    if backend == "auto":
        return missing is None
    if backend not in ("reference", "native"):
        fail("backend", "be 'auto', 'reference' or 'native'", repr(backend))
    if backend == "native" and missing:
        raise RuntimeError(f"backend 'native' cannot run here: {missing}")
    return backend == "native"


def gae(
    tokens: Tokens, values: Tensor | None, gamma: Tensor, lam: Tensor, bootstrap: Tensor | None, masked: str
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (N,) of rewards tokens.x; values None: discounted returns, twice."""
    found = advantages(tokens, values=values, gamma=gamma, lam=lam, bootstrap=bootstrap, masked=masked)
    return found.advantages, found.returns


def advantages(
    tokens: Tokens,
    *,
    models: Models | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    estimator: str = "k1",
    kl_coef: float = 0.0,
    wants_reward_moments: bool = False,
    whitening: Whitening = AS_IT_IS,
    values: Tensor | None = None,
    gamma: Tensor | None = None,
    lam: Tensor | None = None,
    bootstrap: Tensor | None = None,
    masked: str = "carry",
    score: Tensor | None = None,
    baseline: float = 0.0,
    pivots_first: bool = False,
    wants_advantage_moments: bool = False,
) -> Results:
    """Rewards to advantages in one launch, as far as asked for: gamma None stops at the shaped rewards.

    tokens   rewards (N,), float32 or float64, which all (N,) share; with models x gives the dtype alone
    gamma, lam, bootstrap   float64, one a sequence, or one (1,) for all
    """
    reward, end, start, bounds, overwrite, drop = models or (None, None, None, None, False, False)
    return Results(
        *torch.ops.finealign.advantages.default(
            tokens.cu_seqlens.contiguous(),
            _dense(tokens.mask),
            None if models else tokens.x.contiguous(),
            reward,
            end,
            start,
            bounds,
            overwrite,
            drop,
            _dense(old_logp),
            _dense(ref_logp),
            ESTIMATORS[estimator],
            kl_coef,
            wants_reward_moments,
            whitening.moments,
            MODES[whitening.mode],
            whitening.unbiased,
            _dense(values),
            gamma,
            lam,
            None if bootstrap is None else bootstrap.double().contiguous(),
            masked == "zero",
            _dense(score),
            baseline,
            pivots_first,
            wants_advantage_moments,
            tokens.x.shape[0],
            tokens.x.dtype,
        )
    )


def moments(tokens: Tokens) -> Tensor:
    """(5,) float64."""
    return torch.ops.finealign.moments.default(tokens.x.contiguous(), _dense(tokens.mask))


def whiten(tokens: Tokens, known: Tensor, mode: str, unbiased: bool, shift_mean: bool) -> Tensor:
    """(N,)."""
    x, mask = tokens.x.contiguous(), _dense(tokens.mask)
    return torch.ops.finealign.whiten.default(x, mask, known, MODES[mode], unbiased, shift_mean)


def whiten_advantages_(
    x: Tensor,
    mask: Tensor | None,
    whitening: Whitening,
    kept: Tensor | None = None,
    score: Tensor | None = None,
    baseline: float = 0.0,
) -> Tensor:
    """In place, to 0 where kept (N,) float32 is 0. Returns the token weight (N,) by the new signs, if any score."""
    known, mode, unbiased = whitening
    return torch.ops.finealign.whiten_.default(
        x, _dense(mask), known, MODES[mode], unbiased, kept, _dense(score), baseline
    )


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


if _native.available():

    @_native.fake("advantages")
    def _(cu_seqlens, mask, rewards, reward, end, start, bounds, overwrite, drop, old_logp, ref_logp, *options):
        _, _, wants_of_rewards, _, _, _, _, gamma, _, _, _, score, _, _, wants_of_advantages, total, dtype = options
        like = reward if rewards is None else rewards
        shapes, scans = old_logp is not None or rewards is None, gamma is not None

        def result(wanted, size, dtype):
            return like.new_empty(size if wanted else 0, dtype=dtype)

        return (
            result(shapes, total, dtype),
            result(old_logp is not None, total, dtype),
            result(wants_of_rewards, 5, torch.float64),
            result(scans, total, dtype),
            result(scans, total, dtype),
            result(score is not None, total, torch.float32),
            result(wants_of_advantages, 5, torch.float64),
        )

    @_native.fake("moments")
    def _(x, mask):
        return x.new_empty(5, dtype=torch.float64)

    @_native.fake("whiten")
    def _(x, mask, moments, scale, unbiased, shift):
        return torch.empty_like(x)

    @_native.fake("whiten_")
    def _(x, mask, moments, scale, unbiased, kept, score, baseline):
        return x.new_empty(0 if score is None else x.shape[0], dtype=torch.float32)

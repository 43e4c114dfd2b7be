"""Advantages of responses to the same prompt. key (S,) holds any integers; rows with the same key are one group.

    group_mean     R_i - mean_g                       group_std   (R_i - mean_g) / (std_g + eps)
    leave_one_out  R_i - mean of the others           batch_std   (R_i - mean_g) / (std of all rewards + eps)

std divides by n - 1. A reward of NaN is left out of every statistic, and its advantage is 0. The advantages of a group
of one row, and of a group with equal rewards, are exactly 0, because the mean is computed of differences from one
member.
"""

import torch
from torch import Tensor

from .rewards import to_go
from .segments import segment_ids

KINDS = ("group_mean", "group_std", "batch_std", "leave_one_out")


def group_advantages(reward: Tensor, key: Tensor, *, kind: str, eps: float) -> Tensor:
    """Rewards (S,) to advantages (S,); kind is one of KINDS, and eps is added to a standard deviation."""
    unit, n = _unit(reward, key), group_sizes(reward, key)
    above = from_group_mean(reward / unit, key)
    if kind == "leave_one_out":
        return above * leave_one_out(n) * unit
    if kind == "group_mean":
        return above * unit
    if kind == "group_std":
        std = (_sums(above.square(), key) / (n - 1).clamp(min=1)).sqrt()
        return torch.where(above == 0, 0, above / (std + eps / unit))  # 0 / 0 where eps is 0
    whole = _unit(reward, torch.zeros_like(key))
    count = reward.isnan().logical_not().sum()
    std = (_squares(reward / whole) / (count - 1).clamp(min=1)).sqrt() * whole
    above = above * unit
    return torch.where(above == 0, 0, above / (std + eps))


def decoupled_advantages(rewards: Tensor, key: Tensor, weights: list[float], *, eps: float) -> Tensor:
    """Rewards (K, S) of K models to (S,): Σ_k w_k group_std(rewards_k), then group_std of that over the whole batch."""
    total = sum(w * group_advantages(r, key, kind="group_std", eps=eps) for w, r in zip(weights, rewards, strict=True))
    total = torch.where(rewards.isnan().all(0), torch.nan, total)
    return group_advantages(total, torch.zeros_like(key), kind="group_std", eps=eps)


def turn_advantages(reward: Tensor, cu_turns: Tensor, key: Tensor, *, kind: str, baseline: str) -> Tensor:
    """Rewards of turns (M,) to advantages (M,). Row s has the turns cu_turns[s] to cu_turns[s + 1] - 1.

    kind "outcome": every turn gets the advantage of its row's total reward. Otherwise the return of a turn (the sum of
    rewards from it to the end of its row) is compared with the returns of the group's rows at the same turn. A row that
    has ended before that turn counts as a return of 0.
    """
    if not len(reward):
        return reward
    cu_turns = cu_turns.long()
    row = segment_ids(cu_turns, len(reward))
    ahead = to_go(reward, cu_turns[1:][row])
    outcome = torch.where(cu_turns.diff() > 0, ahead[cu_turns[:-1].clamp(max=len(reward) - 1)], 0)
    if kind == "outcome":
        return group_advantages(outcome, key, kind=baseline, eps=0.0)[row]
    n, known = group_sizes(outcome, key)[row], ~outcome.isnan()[row]
    turn = torch.arange(len(reward), device=reward.device) - cu_turns[row]
    at_turn = _group_start(key)[row] * len(reward) + turn
    above = from_group_mean(torch.where(known, ahead, torch.nan), at_turn, n)
    return above if baseline == "group_mean" else above * leave_one_out(n)


def leave_one_out(n: Tensor) -> Tensor:
    """n / (n - 1), because x_i - (mean of the others) = n / (n - 1) (x_i - mean). For n = 1, x_i - mean is 0 anyway."""
    return n / (n - 1).clamp(min=1)


def from_group_mean(x: Tensor, key: Tensor, size: Tensor | None = None) -> Tensor:
    """(S,): x_i - Σ x_l / n over the rows l with the same key; NaN rows are left out and get 0.

    n is the number of these rows whose x is not NaN, or `size` (S,) where given, which is not smaller.
    """
    known, member = ~x.isnan(), _first_known(x, key)
    away = torch.where(known, x - member, 0)
    count = group_sizes(x, key)
    size = count if size is None else size
    above = away - _sums(away, key) / size.clamp(min=1)
    above = above + torch.where(count < size, member * (1 - count / size.clamp(min=1)), 0)
    return torch.where(known, above, 0)


def group_sizes(x: Tensor, key: Tensor) -> Tensor:
    """(S,): how many rows with the same key have an x that is not NaN. Its dtype is that of x, so quotients keep it."""
    return _sums((~x.isnan()).to(x.dtype), key)


def _unit(x: Tensor, key: Tensor) -> Tensor:
    """(S,): a power of two that float64 rewards of a group are divided by, so that squares neither overflow nor vanish.

    It is 1 where the largest of them is from 2^-480 to 2^480.
    """
    if not len(x):
        return torch.ones_like(x)
    row = _group_start(key)
    top = torch.zeros_like(x).scatter_reduce(0, row, x.abs().nan_to_num(0, posinf=0), "amax")[row]
    size, small = torch.frexp(top).exponent, (top > 0) & (top < 2.0**-480)
    return torch.ldexp(torch.ones_like(x), torch.where(top > 2.0**480, size - 400, torch.where(small, size + 400, 0)))


def _first_known(x: Tensor, key: Tensor) -> Tensor:
    """(S,): the first x with the same key that is not NaN; NaN if there is none."""
    order = x.isnan().long().argsort(stable=True)
    order = order[key[order].argsort(stable=True)]
    return x[order][_group_start(key)]


def _sums(x: Tensor, key: Tensor) -> Tensor:
    """(S,): Σ x over the rows with the same key. All rows of a group, and all runs, get the same bits."""
    order = key.argsort(stable=True)
    end = torch.searchsorted(key[order], key[order], right=True)
    return to_go(x[order], end)[_group_start(key)] if len(x) else x


def _group_start(key: Tensor) -> Tensor:
    """(S,) in [0, S): the number of rows with a smaller key. It is where the group begins after sorting by key."""
    return torch.searchsorted(key.sort().values, key)


def _squares(x: Tensor) -> Tensor:
    """Σ (x - mean)² over the values that are not NaN."""
    known = ~x.isnan()
    away = from_group_mean(x, torch.zeros_like(known, dtype=torch.int64))
    return away.square().sum()

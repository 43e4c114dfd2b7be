"""Advantages of rows that answer the same prompt: a row's group is named by its key, any integer (S,).

    group_mean     R_i - mean_g                       group_std   (R_i - mean_g) / (std_g + eps)
    leave_one_out  R_i - mean of the others           batch_std   (R_i - mean_g) / (std of all rewards + eps)

std has n - 1. A reward that is NaN leaves every statistic and has advantage 0. So has a group of one and a group of
equal rewards, exactly: means are taken of differences from one member.
"""

import torch
from torch import Tensor

from .rewards import to_go
from .segments import segment_ids

KINDS = ("group_mean", "group_std", "batch_std", "leave_one_out")


def group_advantages(reward: Tensor, key: Tensor, *, kind: str, eps: float) -> Tensor:
    """(S,) -> (S,)."""
    above, n = from_group_mean(reward, key), group_sizes(reward, key)
    if kind == "leave_one_out":
        return above * leave_one_out(n)
    if kind == "group_mean":
        return above
    squares = _sums(above.square(), key) if kind == "group_std" else _squares(reward)
    n = n if kind == "group_std" else reward.isnan().logical_not().sum()
    std = (squares / (n - 1).clamp(min=1)).sqrt()
    return torch.where(above == 0, 0, above / (std + eps))  # 0 / 0 where eps is 0


def decoupled_advantages(rewards: Tensor, key: Tensor, weights: list[float], *, eps: float) -> Tensor:
    """(K, S) -> (S,): Σ_k w_k of each model's group_std, then as if the batch were one group."""
    total = sum(w * group_advantages(r, key, kind="group_std", eps=eps) for w, r in zip(weights, rewards, strict=True))
    total = torch.where(rewards.isnan().all(0), torch.nan, total)
    return group_advantages(total, torch.zeros_like(key), kind="group_std", eps=eps)


def turn_advantages(reward: Tensor, cu_turns: Tensor, key: Tensor, *, kind: str, baseline: str) -> Tensor:
    """(M,) -> (M,), the turns of row s at [cu_turns[s], cu_turns[s + 1])."""
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
    at_turn = _dense(key)[row] * len(reward) + turn
    above = from_group_mean(torch.where(known, ahead, torch.nan), at_turn, n)
    return above if baseline == "group_mean" else above * leave_one_out(n)


def leave_one_out(n: Tensor) -> Tensor:
    """n / (n - 1): x_i - (mean of the others) = n / (n - 1) (x_i - mean); any number for n = 1, where that is 0."""
    return n / (n - 1).clamp(min=1)


def from_group_mean(x: Tensor, key: Tensor, size: Tensor | None = None) -> Tensor:
    """(S,): x_i - Σ x_l / n over the rows l of its key; n counts those that are numbers, or is size (S,), >= that."""
    known, member = ~x.isnan(), _first_known(x, key)
    away = torch.where(known, x - member, 0)
    count = group_sizes(x, key)
    size = count if size is None else size
    above = away - _sums(away, key) / size.clamp(min=1)
    above = above + torch.where(count < size, member * (1 - count / size.clamp(min=1)), 0)
    return torch.where(known, above, 0)


def group_sizes(x: Tensor, key: Tensor) -> Tensor:
    """(S,): rows of the same key whose x is a number; a float like x, for a quotient of integers is float32."""
    return _sums((~x.isnan()).to(x.dtype), key)


def _first_known(x: Tensor, key: Tensor) -> Tensor:
    """(S,): the first x of the same key that is a number, NaN if there is none."""
    order = x.isnan().long().argsort(stable=True)
    order = order[key[order].argsort(stable=True)]
    return x[order][_dense(key)]


def _sums(x: Tensor, key: Tensor) -> Tensor:
    """(S,): Σ x over the rows of the same key, the same for each of them and from run to run."""
    order = key.argsort(stable=True)
    end = torch.searchsorted(key[order], key[order], right=True)
    return to_go(x[order], end)[_dense(key)] if len(x) else x


def _dense(key: Tensor) -> Tensor:
    """(S,) in [0, S): how many rows have a lower key, the place of the key's first row once rows are sorted."""
    return torch.searchsorted(key.sort().values, key)


def _squares(x: Tensor) -> Tensor:
    """Σ (x - mean)² over what is a number."""
    known = ~x.isnan()
    away = from_group_mean(x, torch.zeros_like(known, dtype=torch.int64))
    return away.square().sum()

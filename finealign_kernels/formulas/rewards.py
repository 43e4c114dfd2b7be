"""Rewards of segments as rewards of tokens, in a flat batch whose sequence s is at [cu_seqlens[s], cu_seqlens[s + 1]).

    end      R_j at the last token of segment j             all      R_j at each of its tokens
    split    R_j / n_j at each of its tokens                rtg      Σ_{i≥j} R_i at each of its tokens
    rtg_all  the sum of `all` from a token to the end of its sequence

A segment's reward is received by one token: its last that mask keeps. A segment without tokens has its reward received
by the last token of the nearest earlier segment of its sequence that has some, or else by the first token of the
sequence, and by none if there is no such token. Every placement but `end` counts such a reward as one of that token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .segments import segment_broadcast, segment_ids

PLACEMENTS = ("end", "all", "split", "rtg", "rtg_all")


class SegmentRewards(NamedTuple):
    """The rewards that one reward model gives to the M segments of S sequences, those of sequence 0 first, in order.

    Segment j covers the tokens after the previous segment's end up to and with its own, or from `start` where that is
    given: only then can tokens before or between segments belong to none. Tokens after the last end belong to none.
    """

    reward: Tensor  # (M,) float
    end: Tensor  # (M,) int: place of its last token in the sequence, column t of (B, T) or t - cu_seqlens[s]
    cu_segments: Tensor  # (S + 1,) int: the segments of sequence s are cu_segments[s] to cu_segments[s + 1]
    weight: float = 1.0  # w_k, by which the rewards are multiplied
    start: Tensor | None = None  # (M,) int: place of its first token


class Places(NamedTuple):
    """Where M segments lie among N tokens, all of it int64 or bool (M,)."""

    begin: Tensor  # tokens begin to stop, the last one excluded, are the segment's
    stop: Tensor
    count: Tensor  # how many of them mask keeps
    receiver: Tensor  # the token that receives the reward; does not decrease
    received: Tensor  # is there such a token


def places(segments: SegmentRewards, mask: Tensor, cu_seqlens: Tensor, *, drop: bool = False) -> Places:
    """drop: a segment without tokens has its reward received by none. M and N are above 0."""
    total, cu_seqlens = mask.shape[0], cu_seqlens.long()
    row = segment_ids(segments.cu_segments, segments.end.shape[0])
    first, limit = cu_seqlens[row], cu_seqlens[row + 1]
    stop = torch.minimum(first + segments.end.long().clamp(-1, total - 1) + 1, limit).cummax(0).values
    begin = torch.maximum(torch.cat([stop.new_zeros(1), stop[:-1]]), first)
    if segments.start is not None:
        begin = torch.maximum(begin, first + segments.start.long().clamp(0, total))
    begin = torch.minimum(begin, stop)

    token = torch.arange(total, device=mask.device)
    kept = torch.cat([stop.new_zeros(1), mask.cumsum(0)])
    last = torch.cat([stop.new_full((1,), -1), torch.where(mask, token, -1).cummax(0).values])  # before place t
    following = torch.where(mask, token, total).flip(0).cummin(0).values.flip(0)  # at place t or after it
    following = torch.cat([following, stop.new_full((1,), total)])

    count = kept[stop] - kept[begin]
    receiver = torch.where(count > 0, last[stop], -1).cummax(0).values
    receiver = torch.where(receiver >= first, receiver, following[first])
    received = receiver < limit
    return Places(begin, stop, count, receiver, received & (count > 0) if drop else received)


def token_rewards(
    segments: SegmentRewards,
    mask: Tensor,
    cu_seqlens: Tensor,
    *,
    placement: str = "end",
    overwrite: bool = False,
    drop: bool = False,
) -> Tensor:
    """(M,) -> (N,) in the dtype of segments.reward, without the weight.

    overwrite: of the rewards that one token gets, that of the later segment stays; else they add up.
    """
    reward, total = segments.reward, mask.shape[0]
    if not total or not len(reward):
        return reward.new_zeros(total) + reward[:0].sum()
    at = places(segments, mask, cu_seqlens, drop=drop)
    limit = cu_seqlens.long()[1:][segment_ids(cu_seqlens, total)]
    if placement == "end":
        return _put(reward, at, at.received, total, overwrite)
    if placement == "rtg":
        ahead = to_go(_put(reward, at, at.received, total, overwrite), limit)
        return _spread(ahead[at.begin.clamp(max=total - 1)], at, mask)
    each = reward / at.count.clamp(min=1) if placement == "split" else reward
    value = _join(_spread(each, at, mask), reward, at, total, overwrite)
    return torch.where(mask, to_go(value, limit), 0) if placement == "rtg_all" else value


def to_go(x: Tensor, limit: Tensor) -> Tensor:
    """y_t = x_t + ... + x_(limit_t - 1), limit (N,) the same for all of a sequence: log N steps, none over a border."""
    place, step = torch.arange(x.shape[0], device=x.device), 1
    while step < x.shape[0]:
        ahead = torch.cat([x[step:], x.new_zeros(step)])
        x = x + torch.where(place + step < limit, ahead, 0)
        step *= 2
    return x


def _put(reward: Tensor, at: Places, received: Tensor, total: int, overwrite: bool) -> Tensor:
    """(N,): what each token receives. The segments of one receiver stand together, so a token looks at one run."""
    if overwrite:
        latest, some = _latest(at, received, total)
        return torch.where(some, reward[latest], 0)
    low, high = _runs(at, total)
    end = torch.searchsorted(at.receiver, at.receiver, right=True)
    sums = to_go(torch.where(received, reward, 0), end)
    return torch.where(low < high, sums[low.clamp(max=len(reward) - 1)], 0)


def _join(spread: Tensor, reward: Tensor, at: Places, total: int, overwrite: bool) -> Tensor:
    """What the segments with tokens give to each of theirs, and what those without give to their receivers."""
    homeless = at.received & (at.count == 0)
    if not overwrite:
        return spread + _put(reward, at, homeless, total, overwrite)
    latest, some = _latest(at, homeless, total)
    group = segment_ids(_edges(at, total), total)
    covering = torch.where(group % 2 == 1, group // 2, -1)
    return torch.where(some & (latest > covering), reward[latest], spread)


def _latest(at: Places, received: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The last segment that each token receives from, 0 where there is none, and whether there is one (N,)."""
    low, high = _runs(at, total)
    segment = torch.arange(len(received), device=received.device)
    latest = torch.where(received, segment, -1).cummax(0).values[(high - 1).clamp(min=0)]
    return latest.clamp(min=0), (low < high) & (latest >= low)


def _runs(at: Places, total: int) -> tuple[Tensor, Tensor]:
    """The segments low to high whose receiver is the token (N,)."""
    bounds = torch.searchsorted(at.receiver, torch.arange(total + 1, device=at.receiver.device))
    return bounds[:-1], bounds[1:]


def _spread(each: Tensor, at: Places, mask: Tensor) -> Tensor:
    """(M,) -> (N,): to every token of a segment, 0 to the others."""
    total = mask.shape[0]
    with_gaps = torch.cat([torch.stack([torch.zeros_like(each), each], 1).flatten(), each.new_zeros(1)])
    return segment_broadcast(with_gaps, _edges(at, total), total, mask)


def _edges(at: Places, total: int) -> Tensor:
    """(2M + 2,): bounds of gap 0, segment 0, gap 1, segment 1, ..., the last gap."""
    inner = torch.stack([at.begin, at.stop], 1).flatten()
    return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), total)])

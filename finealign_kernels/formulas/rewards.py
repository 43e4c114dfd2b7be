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

    reward       (M,) float32, float64, bfloat16 or float16: a number a segment
    end          (M,) int32 or int64: the column of its last token in the batch (B, T), counted from 0 at the first
                 column of its row, prompt and padding included; with cu_seqlens t - cu_seqlens[s]. It is no index into
                 the response: where the mask leaves out a prompt of P columns, response token i is column P + i
    cu_segments  (S + 1,) int32 or int64: the segments of sequence s are cu_segments[s] to cu_segments[s + 1]
    weight       w_k, a number by which the rewards are multiplied
    start        None, or (M,) int32 or int64: the column of its first token

    Segment j covers the tokens after the previous segment's end up to and with its own, or from `start` where that is
    given: only then can tokens before or between segments belong to none. Tokens after the last end belong to none.
    `segment_rewards` makes it from texts and token offsets, `segment_ends` finds `end` from a number for each token.
    """

    reward: Tensor
    end: Tensor
    cu_segments: Tensor
    weight: float = 1.0
    start: Tensor | None = None


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

    kept = torch.cat([stop.new_zeros(1), mask.cumsum(0)])  # before each place
    count = kept[stop] - kept[begin]
    last = torch.searchsorted(kept, kept[stop]) - 1  # of the tokens before stop that mask keeps
    receiver = torch.where(count > 0, last, -1).cummax(0).values
    receiver = torch.where(receiver >= first, receiver, torch.searchsorted(kept, kept[first] + 1) - 1)
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
    given = _latest(at) if overwrite else at.received
    if placement == "end":
        return _put(torch.where(given, reward, 0), at, total)
    if placement == "rtg":
        bounds, row = segments.cu_segments.long(), segment_ids(segments.cu_segments, len(reward))
        ahead = to_go(torch.where(given, reward, 0), bounds[row + 1])
        from_here = torch.searchsorted(at.receiver, at.begin)  # the first whose receiver is at `begin` or behind it
        from_here = torch.maximum(from_here, bounds[row]).clamp(max=len(reward) - 1)
        return _spread(ahead[from_here], at, mask)
    spread = _spread(reward / at.count.clamp(min=1) if placement == "split" else reward, at, mask)
    homeless = given & (at.count == 0)
    if overwrite:  # where the first token receives, a segment that covers it comes later
        homeless = homeless & ~((at.receiver >= at.stop) & _covered(at, total))
        spread = torch.where(_put(homeless.to(reward.dtype), at, total) > 0, 0, spread)
    value = spread + _put(torch.where(homeless, reward, 0), at, total)
    if placement != "rtg_all":
        return value
    limit = cu_seqlens.long()[1:][segment_ids(cu_seqlens, total)]
    return torch.where(mask, to_go(value, limit), 0)


def to_go(x: Tensor, limit: Tensor) -> Tensor:
    """y_t = x_t + ... + x_(limit_t - 1), limit (N,) the same for all of a sequence: log N steps, none over a border."""
    place, step = torch.arange(x.shape[0], device=x.device), 1
    while step < x.shape[0]:
        ahead = torch.cat([x[step:], x.new_zeros(step)])
        x = x + torch.where(place + step < limit, ahead, 0)
        step *= 2
    return x


def _put(reward: Tensor, at: Places, total: int) -> Tensor:
    """(M,) -> (N,): to each token the sum of what it receives, which is one run of rewards."""
    low, high = _runs(at)
    sums = to_go(reward, high)
    opens = (torch.arange(len(low), device=low.device) == low) & (at.receiver < total)
    place = torch.where(opens, at.receiver, total)
    return reward.new_zeros(total + 1).scatter(0, place, torch.where(opens, sums, 0))[:total]


def _latest(at: Places) -> Tensor:
    """(M,) bool: received, and no later one by the same token."""
    segment = torch.arange(len(at.received), device=at.received.device)
    latest = torch.where(at.received, segment, -1).cummax(0).values[_runs(at)[1] - 1]
    return at.received & (latest == segment)


def _runs(at: Places) -> tuple[Tensor, Tensor]:
    """(M,): the segments low to high have the same receiver as this one."""
    return torch.searchsorted(at.receiver, at.receiver), torch.searchsorted(at.receiver, at.receiver, right=True)


def _covered(at: Places, total: int) -> Tensor:
    """(M,) bool: is the receiver a token of some segment."""
    return torch.searchsorted(_edges(at, total), at.receiver, right=True) % 2 == 0


def _spread(each: Tensor, at: Places, mask: Tensor) -> Tensor:
    """(M,) -> (N,): to every token of a segment, 0 to the others."""
    total = mask.shape[0]
    with_gaps = torch.cat([torch.stack([torch.zeros_like(each), each], 1).flatten(), each.new_zeros(1)])
    return segment_broadcast(with_gaps, _edges(at, total), total, mask)


def _edges(at: Places, total: int) -> Tensor:
    """(2M + 2,): bounds of gap 0, segment 0, gap 1, segment 1, ..., the last gap."""
    inner = torch.stack([at.begin, at.stop], 1).flatten()
    return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), total)])

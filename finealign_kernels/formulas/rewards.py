"""Rewards of segments to rewards of tokens, in a flat batch; cu_seqlens[s] <= t < cu_seqlens[s + 1] in sequence s.

    end      R_j at the last token of segment j             all      R_j at each of its tokens
    split    R_j / n_j at each of its tokens                rtg      Σ_{i≥j} R_i at each of its tokens
    rtg_all  the sum of `all` from a token to the end of its sequence

Masked tokens do not count. The receiver of a segment's reward is its last token. If a segment has no token, its
receiver is the last token of the nearest earlier segment of its sequence that has one, or else the first token of the
sequence. If the sequence has no token, the reward is dropped. Every placement treats such a reward as one of its
receiver.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .segments import segment_broadcast, segment_ids

PLACEMENTS = ("end", "all", "split", "rtg", "rtg_all")


class SegmentRewards(NamedTuple):
    """The rewards of one reward model for the M segments of S sequences: segments of sequence 0 first, in order.

    reward       (M,) float32, float64, bfloat16 or float16: one number for each segment
    end          (M,) int32 or int64: the column of its last token in the batch (B, T), counted from 0 at the first
                 column of its row, prompt and padding included. In a packed batch (cu_seqlens) it is t - cu_seqlens[s].
                 It is not an index into the response: behind a prompt of P columns, response token i is column P + i
    cu_segments  (S + 1,) int32 or int64: the segments of sequence s are cu_segments[s] to cu_segments[s + 1]
    weight       a number by which the rewards are multiplied
    start        None, or (M,) int32 or int64: the column of its first token

    Segment j begins after the end of the previous segment, or at its `start` where that is given. Without `start`,
    every token up to the last end belongs to a segment. Tokens after the last end belong to none. `segment_rewards`
    makes one from texts and token offsets. `segment_ends` finds `end` from a number for each token.
    """

    reward: Tensor
    end: Tensor
    cu_segments: Tensor
    weight: float = 1.0
    start: Tensor | None = None


class Places(NamedTuple):
    """Where the M segments lie among the N tokens, (M,) int64 or bool each."""

    begin: Tensor  # the segment has the tokens begin <= t < stop
    stop: Tensor
    count: Tensor  # how many of them are not masked
    receiver: Tensor  # the token that receives the reward; in ascending order
    received: Tensor  # True if there is such a token


def places(segments: SegmentRewards, mask: Tensor, cu_seqlens: Tensor, *, drop: bool = False) -> Places:
    """The places of segments; M and N must be above 0. drop: rewards of segments without tokens are dropped."""
    total, cu_seqlens = mask.shape[0], cu_seqlens.long()
    row = segment_ids(segments.cu_segments, segments.end.shape[0])
    first, limit = cu_seqlens[row], cu_seqlens[row + 1]
    stop = torch.minimum(first + segments.end.long().clamp(-1, total - 1) + 1, limit).cummax(0).values
    begin = torch.maximum(torch.cat([stop.new_zeros(1), stop[:-1]]), first)
    if segments.start is not None:
        begin = torch.maximum(begin, first + segments.start.long().clamp(0, total))
    begin = torch.minimum(begin, stop)

    kept = torch.cat([stop.new_zeros(1), mask.cumsum(0)])  # how many tokens before t are not masked
    count = kept[stop] - kept[begin]
    last = torch.searchsorted(kept, kept[stop]) - 1  # the last of them before stop
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
    """Rewards of tokens (N,), in the dtype of segments.reward (M,), not yet multiplied by the weight.

    overwrite: if several rewards go to one token, the one of the latest segment counts; otherwise they add up.
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
        first_ahead = torch.searchsorted(
            at.receiver, at.begin
        )  # the first segment whose receiver is not before `begin`
        first_ahead = torch.maximum(first_ahead, bounds[row]).clamp(max=len(reward) - 1)
        return _spread(ahead[first_ahead], at, mask)
    spread = _spread(reward / at.count.clamp(min=1) if placement == "split" else reward, at, mask)
    without_tokens = given & (at.count == 0)
    if overwrite:  # a segment that covers the receiver comes later, if it is a sequence's first token
        without_tokens = without_tokens & ~((at.receiver >= at.stop) & _covered(at, total))
        spread = torch.where(_put(without_tokens.to(reward.dtype), at, total) > 0, 0, spread)
    value = spread + _put(torch.where(without_tokens, reward, 0), at, total)
    if placement != "rtg_all":
        return value
    limit = cu_seqlens.long()[1:][segment_ids(cu_seqlens, total)]
    return torch.where(mask, to_go(value, limit), 0)


def to_go(x: Tensor, limit: Tensor) -> Tensor:
    """y_t = x_t + ... + x_(limit_t - 1), in log2(N) steps. limit (N,): the end of the token's sequence."""
    place, step = torch.arange(x.shape[0], device=x.device), 1
    while step < x.shape[0]:
        ahead = torch.cat([x[step:], x.new_zeros(step)])
        x = x + torch.where(place + step < limit, ahead, 0)
        step *= 2
    return x


def _put(reward: Tensor, at: Places, total: int) -> Tensor:
    """(M,) -> (N,): the sum of the rewards that each token receives. They are adjacent in (M,)."""
    low, high = _runs(at)
    sums = to_go(reward, high)
    opens = (torch.arange(len(low), device=low.device) == low) & (at.receiver < total)
    place = torch.where(opens, at.receiver, total)
    return reward.new_zeros(total + 1).scatter(0, place, torch.where(opens, sums, 0))[:total]


def _latest(at: Places) -> Tensor:
    """(M,) bool: rewards that are received, and that are the last one of their token."""
    segment = torch.arange(len(at.received), device=at.received.device)
    latest = torch.where(at.received, segment, -1).cummax(0).values[_runs(at)[1] - 1]
    return at.received & (latest == segment)


def _runs(at: Places) -> tuple[Tensor, Tensor]:
    """(M,), (M,): segments low <= j < high have the same receiver as this one."""
    return torch.searchsorted(at.receiver, at.receiver), torch.searchsorted(at.receiver, at.receiver, right=True)


def _covered(at: Places, total: int) -> Tensor:
    """(M,) bool: True if the receiver belongs to a segment."""
    return torch.searchsorted(_edges(at, total), at.receiver, right=True) % 2 == 0


def _spread(each: Tensor, at: Places, mask: Tensor) -> Tensor:
    """(M,) -> (N,): the value of its segment at every token, 0 at tokens without a segment."""
    total = mask.shape[0]
    with_gaps = torch.cat([torch.stack([torch.zeros_like(each), each], 1).flatten(), each.new_zeros(1)])
    return segment_broadcast(with_gaps, _edges(at, total), total, mask)


def _edges(at: Places, total: int) -> Tensor:
    """(2M + 2,): the bounds of gap 0, segment 0, gap 1, segment 1, ..., gap M. A gap holds tokens of no segment."""
    inner = torch.stack([at.begin, at.stop], 1).flatten()
    return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), total)])

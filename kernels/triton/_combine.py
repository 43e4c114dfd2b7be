"""Combines the states of a row's tiles to statistics, as formulas.logprobs.combine does: one program for each row."""

import torch
from torch import Tensor

import triton
import triton.language as tl

from ._launch import OPTIONS, on_device_of
from ._tiles import ENTROPY, MEAN, SQUARES, UNIT, log1p

SKIP, BAD = tl.constexpr(-2), tl.constexpr(-1)  # target of a row that is left out, of one whose label is out of range
PARTS = tl.constexpr(6)  # numbers of a row in a tile: m, R, T, Q, sum of z / UNIT, count of tokens that are not banned
INT_MAX = tl.constexpr(2**31 - 1)


@triton.jit
def combine_kernel(
    part_ptr,  # (n, tiles, 6)
    first_ptr,  # (n, tiles)
    label_ptr,  # (n, 2)
    target_ptr,  # (N,)
    index_ptr,  # (n,) or None
    count_ptr,  # the number of rows, or None: n
    logp_ptr,  # this and the next ones (N,); written at the rows of the index
    lse_ptr,
    entropy_ptr,
    squares_ptr,
    mean_ptr,
    top1_ptr,
    m_ptr,
    l_ptr,
    slope_ptr,
    allowed_ptr,
    tiles,
    WANT: tl.constexpr,
    BLOCK: tl.constexpr,  # at least `tiles`
):
    row = tl.program_id(0).to(tl.int64)
    live = True
    if count_ptr is not None:
        live = row < tl.load(count_ptr)
    if live:
        at = row
        if index_ptr is not None:
            at = tl.load(index_ptr + row)
        target = tl.load(target_ptr + at)
        t = tl.arange(0, BLOCK)
        here = t < tiles
        part = part_ptr + (row * tiles + t) * PARTS
        m_tile = tl.load(part, mask=here, other=float("-inf"))
        r_tile = tl.load(part + 1, mask=here, other=0.0)
        m = tl.max(m_tile, axis=0)
        holds = m_tile == m
        owner = t == tl.min(tl.where(holds, t, BLOCK), axis=0)
        # a tile in which all tokens are banned adds nothing; this is not true of a tile with a NaN
        dead = (m_tile == float("-inf")) & (r_tile == 0)
        d = tl.where(dead | owner, 0.0, m_tile - m)
        w = tl.where(dead, 0.0, tl.exp(d))
        one = tl.where(owner, 0.0, 1.0 + r_tile)
        r = tl.sum(tl.where(owner, r_tile, one) * w, axis=0)
        none = (m == float("-inf")) & (r == 0)  # all tokens are banned
        r = tl.where(tl.abs(m) == float("inf"), float("nan"), r)
        l = log1p(r)
        zero = tl.full((), 0, tl.float32)
        entropy, squares, mean, allowed = zero, zero, zero, zero
        if ENTROPY & WANT:
            t_tile = tl.load(part + 2, mask=here, other=0.0)
            t_sum = tl.sum(tl.where(w > 0, (t_tile + d * one) * w, 0.0), axis=0)
            entropy = l - t_sum / (1.0 + r)
        if SQUARES & WANT:
            q_tile = tl.load(part + 3, mask=here, other=0.0)
            q = tl.sum((q_tile + tl.where(owner, 0.0, 1.0)) * w * w, axis=0)
            squares = log1p(q) - 2.0 * l
        if MEAN & WANT:
            total = tl.sum(tl.load(part + 4, mask=here, other=0.0), axis=0)
            allowed = tl.sum(tl.load(part + 5, mask=here, other=0.0), axis=0)
            mean = total / allowed * UNIT
        _settle(logp_ptr + at, (tl.load(label_ptr + row * 2) - m) - l, target)
        _settle(lse_ptr + at, m + l, target)
        _settle(entropy_ptr + at, entropy, target)
        _settle(squares_ptr + at, squares, target)
        _settle(mean_ptr + at, mean, target)
        _settle(m_ptr + at, m, target)
        _settle(l_ptr + at, tl.where(none, float("inf"), l), target)
        _settle(slope_ptr + at, tl.load(label_ptr + row * 2 + 1), target)
        _settle(allowed_ptr + at, allowed, target)
        first = tl.load(first_ptr + row * tiles + t, mask=here & holds, other=INT_MAX)
        tl.store(top1_ptr + at, (tl.min(first, axis=0) == target).to(tl.int8))


@triton.jit
def _settle(ptr, x, target):
    """Stores x; 0 for a row with target SKIP, NaN for a row with target BAD."""
    tl.store(ptr, tl.where(target == SKIP, 0.0, tl.where(target == BAD, float("nan"), x)))


def combine_into(
    found, part: Tensor, first: Tensor, label: Tensor, target: Tensor, want, index=None, count=None
) -> None:
    """Writes the statistics of rows into found, a formulas.Rows of (N,) tensors.

    part (n, tiles, 6), first (n, tiles), label (n, 2)  the states of the tiles
    index  (n,) where the rows lie among the N; None: 0, 1, ...
    count  on the device, how many entries of index are valid; None: n
    """
    n, tiles = first.shape
    if n == 0:
        return
    found = [x.view(torch.int8) if x.dtype == torch.bool else x for x in found]
    block = max(16, triton.next_power_of_2(tiles))
    with on_device_of(part):
        combine_kernel[(n,)](
            part, first, label, target, index, count, *found, tiles, WANT=want, BLOCK=block,
            num_warps=warps(block), **OPTIONS,
        )  # fmt: skip


def warps(block: int) -> int:
    return 1 if block <= 64 else 4

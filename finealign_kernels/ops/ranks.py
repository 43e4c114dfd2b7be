"""Counts, sums and moments of a step over ranks, and small per-row numbers of all of them."""

import torch
import torch.distributed as dist
from torch import Tensor

from . import _parallel
from ._check import check_tensor, fail

NUMBERS = (torch.bool, torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.float16, torch.float64)


def sum_over_ranks(*x: Tensor, group=None) -> Tensor | tuple[Tensor, ...]:
    """Sums over all ranks of numbers that add up: the counts that losses divide by, or the moments that whiten.

    x      tensors of any shape, the same on all ranks, on one device; one collective serves all of them
    group  torch.distributed.ProcessGroup, None: all ranks. A rank without rows takes part with zeros

    Returns float64, detached, each in its shape; one tensor for one. A step's counts in one all-reduce of 8 bytes each:

        tokens, responses = sum_over_ranks(mask.sum(), mask.any(1).sum())
        policy_loss(..., reduction="token_global", denominator=tokens).loss        # gradients of ranks add up
        whiten(x, mask=mask, sum_moments=sum_over_ranks)

    DDP and FSDP average gradients over their ranks: multiply such a loss by their number.
    Raises  TypeError, ValueError naming the argument.
    """
    if not x:
        fail("x", "hold a tensor", "none")
    for k, one in enumerate(x):
        check_tensor(f"x[{k}]", one, dtypes=NUMBERS, like=x[0] if k else None)
    _parallel.check_group(group)
    flat = torch.cat([one.detach().reshape(-1).double() for one in x])
    dist.all_reduce(flat, group=group)
    parts = flat.split([one.numel() for one in x])
    found = tuple(part.view(one.shape) for part, one in zip(parts, x, strict=True))
    return found[0] if len(x) == 1 else found


def rows_of_all(group, *x: Tensor) -> tuple[tuple[Tensor, ...], slice]:
    """Rows (S_r, ...) of all ranks, in the order of the ranks, and which of them are this rank's.

    S_r may differ, and be 0. Two all-gathers: 8 bytes a rank of sizes, which are read on the host, then the rows of all
    x, padded to the longest rank's, as bytes.
    """
    rows = x[0].shape[0]
    sizes = _parallel.all_gather(torch.tensor([rows], device=x[0].device), group).flatten().tolist()
    first = sum(sizes[: dist.get_rank(group)])
    return gather_rows(x, sizes, group), slice(first, first + rows)


def gather_rows(x: tuple[Tensor, ...], sizes: list[int], group) -> tuple[Tensor, ...]:
    """Rows (Σ sizes, ...) of all ranks, in their order, from this rank's (n, ...) of each x; sizes holds each rank's n.

    One all-gather of the bytes of all x, padded to the longest rank's.
    """
    rows, tails = x[0].shape[0], [one.shape[1:] for one in x]
    widths = [one.element_size() * tail.numel() for one, tail in zip(x, tails, strict=True)]
    wire = torch.zeros(max(sizes), sum(widths), dtype=torch.uint8, device=x[0].device)
    if rows:
        parts = [one.reshape(rows, tail.numel()) for one, tail in zip(x, tails, strict=True)]
        # copied: a single row or column is contiguous with any strides, which have no view as bytes
        parts = [part.clone(memory_format=torch.contiguous_format) for part in parts]
        wire[:rows] = torch.cat([part.view(torch.uint8) for part in parts], 1)
    got = _parallel.all_gather(wire, group)
    got = torch.cat([one[:size] for one, size in zip(got, sizes, strict=True)])
    # copied: a single row's bytes would be contiguous where they lie, at any place
    parts = [part.clone(memory_format=torch.contiguous_format).view(-1) for part in got.split(widths, 1)]
    return tuple(part.view(one.dtype).view(sum(sizes), *one.shape[1:]) for part, one in zip(parts, x, strict=True))

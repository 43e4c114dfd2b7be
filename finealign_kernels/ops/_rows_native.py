"""Row kernels over tiles in C++ (csrc/cpu/row_kernels.h): float32, bfloat16 and float16 on a CPU."""

import torch

from ..formulas.logprobs import combine  # noqa: F401

TILE = SPAN = None  # a row of any length is one tile, and has one state


def tile_fwd(x, bias, target, col0, head, want, part, first, label, e=None, in_place=False) -> None:
    """State of a tile of raw products x (n, C) into part (n, 6), first (n,), label (n, 2); exp(z - m) into e or x."""
    torch.ops.finealign.row_tile_fwd(x, bias, target, col0, *head.numbers, want, part, first, label, e, in_place)


def tile_bwd(out, src, index, e_max, bias, target, coef, col0, head) -> None:
    """dL/dx of one tile into out (n, C), from raw products src (None: out itself) or exp(z - e_max)."""
    torch.ops.finealign.row_tile_bwd(out, src, index, e_max, bias, target, coef, col0, *head.numbers)

"""Row kernels over tiles in torch ops, for any device and float dtype. Every row backend has these names."""

import torch
from torch import Tensor

from ..formulas import logprobs as formula
from ..formulas.logprobs import combine  # noqa: F401

TILE = (2048, 4096)  # rows and columns of existing logits that are widened at a time
SPAN = TILE[1]  # columns under one state


def tile_fwd(x, bias, target, col0, head, want, part, first, label, e=None, in_place=False) -> None:
    """State of a tile of raw products x (n, C) into part (n, 6), first (n,), label (n, 2); exp(z - m) into e or x."""
    read = target != formula.SKIP
    wide = x if x.dtype == torch.float64 else x.float()
    z = formula.logits(torch.where(read[:, None], wide, 0), bias, head)
    state, index, exps = formula.tile_state(z, col0, want)
    part.copy_(torch.where(read[:, None], state, 0))
    first.copy_(index)
    local = target - col0
    here = (target >= 0) & (local >= 0) & (local < x.shape[1])
    at = local.clamp(0, x.shape[1] - 1)[:, None]
    x_label = wide.gather(1, at)
    bias_label = None if bias is None else bias[at]
    own = torch.cat([z.gather(1, at), formula.slope(x_label, bias_label, head)], 1)
    label.copy_(torch.where(here[:, None], own, label))
    if in_place or e is not None:
        (x if e is None else e).copy_(exps)


def tile_bwd(out, src, index, e_max, bias, target, coef: Tensor, col0, head) -> None:
    """dL/dx of one tile into out (n, C), from raw products src (None: out itself) or exp(z - e_max)."""
    src = out if src is None else src
    src = src if index is None else src.index_select(0, index)
    wide = src if src.dtype == torch.float64 else src.float()
    coef = formula.Coef(*coef.unbind(0))
    wide = torch.where(((target != formula.SKIP) & coef.active())[:, None], wide, 0)
    out.copy_(formula.tile_gradient(wide, e_max, bias, target, coef, col0, head))

"""The fused layer: one Triton program a tile of the product, whose logits never leave the chip. Contract of _chunked.

fwd    states of all tiles, then one program a row that combines them; the first rows that are read, as many as the
       workspace holds, keep E = exp(z - m_tile), laid out as the chunked layer's with one maximum a tile.
bwd    the chunked layer's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..formulas import logprobs as formula
from . import _choose, _chunked


class Order(NamedTuple):
    """Rows that are read, in their order, at the front of an index."""

    n: int  # how many there may be
    index: Tensor | None  # (n,) of all rows; None: all of them
    count: Tensor | None  # how many there are, on the device; None: n


def order(read: Tensor, on_device: bool) -> Order:
    if on_device:
        return Order(read.shape[0], front(read), read.sum())
    index = _chunked.rows_in(read)
    return Order(read.shape[0] if index is None else index.shape[0], index, None)


def front(flags: Tensor) -> Tensor:
    """All indices, those of true flags first: no count is read on the host."""
    return (~flags).to(torch.uint8).argsort(stable=True)


def tile_of(x: Tensor, head: formula.Head):
    """The tile of the product: a function of GPU, dtype and head alone."""
    return _choose.fused().config(_choose.arch(x), x.dtype, bool(head.softcap))


def maxima(x: Tensor, vocab: int, head: formula.Head) -> int:
    """Maxima of a row of E, one a tile."""
    return -(-vocab // tile_of(x, head).columns)


def fwd(hidden, weight, bias, target, head, want, workspace, on_device, _, static=False):
    """Rows (N,) each, E (room·V,) and its maxima (room, tiles). Arguments as of _chunked.fwd."""
    kernels, tile = _choose.fused(), tile_of(hidden, head)
    n_all, vocab = hidden.shape[0], weight.shape[0]
    chunk = _chunked.tile_of(hidden.device.type).columns
    rows = order(target != formula.SKIP, on_device)
    tiles = maxima(hidden, vocab, head)
    room = _chunked.kept_rows(n_all if static else rows.n, vocab, hidden.dtype, workspace)

    part = hidden.new_empty(rows.n, tiles, formula.PARTS, dtype=torch.float32)
    first = hidden.new_empty(rows.n, tiles, dtype=torch.int64)
    label = torch.full((rows.n, 2), torch.nan, device=hidden.device)
    e = torch.empty(room * vocab, dtype=hidden.dtype, device=hidden.device)
    kept = e if room else None
    kernels.linear_fwd(hidden, weight, bias, target, rows, head, want, part, first, label, kept, room, chunk, tile)
    floats = [part.new_zeros(n_all) for _ in range(8)]
    found = formula.Rows(*floats[:5], torch.zeros(n_all, dtype=torch.bool, device=hidden.device), *floats[5:])
    kernels.combine(part, first, label, target, rows, want, found)
    e_max = part.new_zeros(room, tiles)
    e_max[: min(room, rows.n)] = part[:room, :, 0]
    return (*found, e, e_max)


def bwd(coef, curved, hidden, weight, bias, target, e, e_max, head, needs, on_device, _):
    """dhidden, dweight, dbias, None where not needed. Arguments as of _chunked.bwd."""
    if on_device:
        e, e_max = e[:0], e_max[:0]
    width = tile_of(hidden, head).columns
    return _chunked.bwd(
        coef, curved, hidden, weight, bias, target, e, e_max, head, needs, on_device, "triton", e_columns=width
    )

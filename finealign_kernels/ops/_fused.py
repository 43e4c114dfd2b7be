"""The fused layer: one Triton program a tile of the product, whose logits never leave the chip. Contract of _chunked.

fwd    states of all tiles, then one program a row that combines them; the first rows that are read, as many as the
       workspace holds, keep E = exp(z - m_tile), laid out as the chunked layer's with one maximum a tile.
bwd    where counts are read on the host: the chunked layer's, with products of rows without E by the forward's tiles.
       Otherwise the same steps, with products that stop at a count on the device.
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
        return Order(read.shape[0], _chunked.front(read, read), read.sum())
    index = _chunked.rows_in(read)
    return Order(read.shape[0] if index is None else index.shape[0], index, None)


def tile_of(x: Tensor, head: formula.Head):
    """The tile of the product: a function of GPU, dtype and head alone."""
    return _choose.fused().config(_choose.arch(x), x.dtype, bool(head.softcap))


def _copies(hidden: Tensor, weight: Tensor, tile):
    """Whether the kernels by descriptors copy whole blocks of the head, and the tile of those that are launched."""
    kernels = _choose.fused()
    by_blocks = kernels.supports_tma(weight, _choose.arch(hidden))
    return by_blocks, tile if by_blocks else kernels.by_pointers(weight, tile)


def maxima(x: Tensor, vocab: int, head: formula.Head) -> int:
    """Maxima of a row of E, one a tile."""
    return -(-vocab // tile_of(x, head).columns)


def fwd(hidden, weight, bias, target, head, want, workspace, on_device, _, static=False, shard=False):
    """Rows (N,) each, E (room·V,) and its maxima (room, tiles). Arguments as of _chunked.fwd."""
    kernels = _choose.fused()
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
    tile = kernels.forward_config(_choose.arch(hidden), hidden.dtype, bool(head.softcap), want)
    by_blocks, tile = _copies(hidden, weight, tile)
    launch = kernels.linear_fwd_tma if by_blocks else kernels.linear_fwd
    launch(hidden, weight, bias, target, rows, head, want, part, first, label, kept, room, chunk, tile)
    e_max = part[:room, :, 0].contiguous()
    if rows.n < room:
        e_max = torch.cat([e_max, e_max.new_zeros(room - rows.n, tiles)])
    if shard:
        found = formula.State(*formula.merge(part, first, want), label)
        if rows.index is not None:
            found = (x.new_zeros(n_all, *x.shape[1:]).index_copy_(0, rows.index, x) for x in found)
        return (*found, e, e_max)
    floats = [part.new_zeros(n_all) for _ in range(9)]
    found = formula.Rows(*floats[:5], torch.zeros(n_all, dtype=torch.bool, device=hidden.device), *floats[5:])
    kernels.combine(part, first, label, target, rows, want, found)
    return (*found, e, e_max)


def bwd(coef, curved, hidden, weight, bias, target, e, e_max, head, needs, on_device, _, shard=None):
    """dhidden, dweight, dbias, None where not needed. Arguments as of _chunked.bwd."""
    kernels, tile = _choose.fused(), tile_of(hidden, head)
    if on_device:
        return _bounded_bwd(coef, curved, hidden, weight, bias, target, e, e_max, head, needs, tile, shard)

    by_blocks, tile = _copies(hidden, weight, tile)
    launch = kernels.linear_bwd_tma if by_blocks else kernels.linear_bwd

    def again(dz, x, at, coef, c0, c1):
        """By the forward's tiles: p = exp(z - lse) needs the very z that lse was computed from."""
        b = None if bias is None else bias[c0:c1]
        launch(dz, x, weight[c0:c1], b, kernels.Block(0, at, coef), None, None, c0, head, tile)

    return _chunked.bwd(
        coef,
        curved,
        hidden,
        weight,
        bias,
        target,
        e,
        e_max,
        head,
        needs,
        False,
        "triton",
        e_columns=tile.columns,
        again=again,
        shard=shard,
    )


def _bounded_bwd(coef, curved, hidden, weight, bias, target, e, e_max, head, needs, tile, shard):
    """No count is read on the host: each launch is for all rows, its programs stop where those with a gradient do."""
    kernels, area = _choose.fused(), _chunked.tile_of(hidden.device.type)
    (n, _), vocab, room = hidden.shape, weight.shape[0], e_max.shape[0]
    read = target != formula.SKIP
    active = read & coef.active()
    recompute = _chunked.unfit_for_e(coef, curved and e.dtype != torch.float32, bias, vocab)
    index, from_e, rank = _chunked.from_e_first(active, read, room, recompute)
    place = _chunked.places(read, rank, index)
    counts = torch.stack([from_e.sum(), active.sum()])
    at, coef = target[index], coef.stacked()[:, index]
    by_blocks, tile = _copies(hidden, weight, tile)
    x = hidden.index_select(0, index) if by_blocks else None

    chunks, blocks = _chunked.spans(vocab, area.columns), _chunked.spans(n, area.rows)
    columns = min(vocab, area.columns)
    buffer = hidden.new_empty(min(n, area.rows) * columns)
    grads = BoundedGradients(needs, n, hidden, weight, torch.float32, columns)
    for c0, c1 in chunks:
        wc, b = weight[c0:c1], None if bias is None else bias[c0:c1]
        chunk, top = None, None
        if room:
            chunk, top = _chunked.e_slice(e, room, c0, c1), e_max[:, c0 // tile.columns :]
        grads.open(c0, c1, empty=not blocks)
        for start, stop in blocks:
            rows = slice(start, stop)
            block = kernels.Block(start, at[rows], coef[:, rows].contiguous(), index[rows], place[rows], counts)
            dz = buffer[: (stop - start) * (c1 - c0)].view(stop - start, c1 - c0)
            if by_blocks:
                kernels.linear_bwd_tma(dz, x[rows], wc, b, block, chunk, top, c0, head, tile)
            else:
                kernels.linear_bwd(dz, hidden, wc, b, block, chunk, top, c0, head, tile)
            grads.add_bounded(dz, wc, block)
        grads.close()
    return grads.result(None, shard)


class BoundedGradients(_chunked.Gradients):
    """The same sums, by products that stop at a count on the device. dX has all rows, in their own places."""

    def add_bounded(self, dz: Tensor, w: Tensor, block) -> None:
        kernels = _choose.fused()
        tile = kernels.product_config(_choose.arch(dz), dz.dtype)
        if self.dx is not None:
            kernels.bounded_product(dz, w, self.dx, block, tile, across=False, add=True)
        if self.dw is not None:
            kernels.bounded_product(dz.t(), self.hidden, self.slice, block, tile, across=True, add=block.start > 0)
        if self.db is not None:
            live = torch.arange(block.start, block.start + dz.shape[0], device=dz.device) < block.counts[1]
            self.db[self.span] += torch.where(live[:, None], dz, 0).sum(0, dtype=self.db.dtype)

"""The chunked layer: GEMMs by torch on tiles of a fixed size, one row kernel a tile, the (N, V) logits never kept.

fwd    for each chunk of the vocabulary, for each block of rows: product, row state; then one combine.
       The first rows, as many as the workspace holds, keep E = exp(z - m_tile) for backward.
bwd    for each chunk, for each block of rows with a gradient: dZ from E or from the product again, then
       dX += dZ W (float32) and the chunk's slice of dW = dZᵀ X, summed in float32 and written once.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..formulas import logprobs as formula
from . import _choose

FULL = -1  # a workspace without bound


class Tile(NamedTuple):
    """Rows and columns of a tile. A function of the device alone, never of N. Measured on 2 cores (AMD Zen 4, float32,
    D = 576, V = 49152): 2048 x 4096 within 3 % of the whole product; 512 rows 10 % slower. GPU: not yet run."""

    rows: int
    columns: int


def tile_of(device: str) -> Tile:
    return Tile(2048, 4096) if device == "cpu" else Tile(4096, 16384)


def compute_dtype(x: Tensor) -> torch.dtype:
    """dtype of the GEMMs' operands. Their products are float32 (float64): only CUDA multiplies halves into float32."""
    return x.dtype if x.device.type == "cuda" or x.dtype == torch.float64 else torch.float32


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out (+)= a @ b, out float32 (float64), summed in its own dtype. Autocast does not touch products into an out."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


class Operand:
    """Blocks of a matrix's rows in the GEMMs' dtype; the last one made is kept."""

    def __init__(self, matrix: Tensor, dtype: torch.dtype, index: Tensor | None = None, keep: Tensor | None = None):
        self.matrix, self.dtype, self.index, self.keep = matrix, dtype, index, keep
        self.last = (None, None)

    def __getitem__(self, span: tuple[int, int]) -> Tensor:
        if self.last[0] != span:
            self.last = (span, self._make(*span))
        return self.last[1]

    def _make(self, start: int, stop: int) -> Tensor:
        if self.index is not None:
            return self.matrix.index_select(0, self.index[start:stop]).to(self.dtype)
        block = self.matrix[start:stop].to(self.dtype)
        if self.keep is not None:  # rows that are computed and thrown away may hold NaN
            block = torch.where(self.keep[start:stop, None], block, 0)
        return block


def spans(total: int, step: int, cut: int = 0) -> list[tuple[int, int]]:
    """[0, total) in steps, none of which crosses `cut`."""
    ends = [*range(step, cut, step), cut] if cut else []
    ends += [*range(cut + step, total, step), total] if total > cut else []
    return list(zip([0, *ends], ends, strict=False))


def kept_rows(rows: int, vocab: int, dtype: torch.dtype, workspace: int) -> int:
    """How many rows keep their E within the workspace, in bytes."""
    if workspace == FULL:
        return rows
    return min(rows, workspace // (vocab * dtype.itemsize))


def e_slice(e: Tensor, room: int, c0: int, c1: int) -> Tensor:
    """The chunk's part of E, (room, columns): chunks lie one behind the other, so each is contiguous."""
    return e[room * c0 : room * c1].view(room, c1 - c0)


def maxima(x: Tensor, vocab: int, head: formula.Head) -> int:
    """Maxima of a row of E, one a chunk."""
    return -(-vocab // tile_of(x.device.type).columns)


def fwd(hidden, weight, bias, target, head, want, workspace, on_device, rows_name, static=False):
    """Rows (N,) each, E (room·V,) and its maxima (room, chunks).

    workspace: bytes for E, FULL or 0. on_device: no count is read on the host; rows that are left out are computed.
    static: E has room for rows that are not read too, so that its size is known to a compiler.
    """
    rows_of, tile = _choose.rows(rows_name), tile_of(hidden.device.type)
    n_all, vocab = hidden.shape[0], weight.shape[0]
    dtype, out_dtype = compute_dtype(hidden), wide(hidden.dtype)
    read = target != formula.SKIP
    index = None if on_device else rows_in(read)
    x = Operand(hidden, dtype, index, read if on_device else None)
    w = Operand(weight, dtype)
    at = target if index is None else target[index]
    n = at.shape[0]
    chunks = spans(vocab, tile.columns)
    room = kept_rows(n_all if static else n, vocab, hidden.dtype, workspace)
    kept = min(n, room)

    part = torch.zeros(n, len(chunks), formula.PARTS, dtype=out_dtype, device=hidden.device)
    first = torch.zeros(n, len(chunks), dtype=torch.int64, device=hidden.device)
    label = torch.full((n, 2), torch.nan, dtype=out_dtype, device=hidden.device)
    e = torch.empty(room * vocab, dtype=hidden.dtype, device=hidden.device)
    direct = e.dtype == out_dtype  # the product is written where its E will stand
    buffer = torch.empty(min(n, tile.rows) * min(vocab, tile.columns), dtype=out_dtype, device=hidden.device)
    for t, (c0, c1) in enumerate(chunks):
        wt, b = w[c0, c1].t(), None if bias is None else bias[c0:c1]
        for start, stop in spans(n, tile.rows, kept):
            here = e_slice(e, room, c0, c1)[start:stop] if stop <= kept else None
            in_place = direct and here is not None
            z = here if in_place else buffer[: (stop - start) * (c1 - c0)].view(stop - start, c1 - c0)
            product(x[start, stop], wt, z)
            side = dict(e=None if direct else here, in_place=in_place)
            state = part[start:stop, t], first[start:stop, t], label[start:stop]
            rows_of.tile_fwd(z, b, at[start:stop], c0, head, want, *state, **side)
    found = rows_of.combine(part, first, label, at, want)
    if index is not None:
        found = formula.Rows(*(x.new_zeros(n_all).index_copy_(0, index, x) for x in found))
    e_max = part.new_zeros(room, len(chunks))
    e_max[:kept] = part[:kept, :, 0]
    return (*found, e, e_max)


def bwd(
    coef, curved, hidden, weight, bias, target, e, e_max, head, needs, on_device, rows_name, e_columns=0, again=None
):
    """dhidden, dweight, dbias, None where not needed.

    coef: formulas.Coef, (N,) each in float32 (float64); curved: there is an upstream gradient of the entropy.
    e_columns: columns under one maximum of E, 0 for a chunk's. again: how a layer whose products are not the library's
    writes dZ of rows without E, again(dz, start, stop, index, target, coef, c0, c1).
    """
    rows_of, tile = _choose.rows(rows_name), tile_of(hidden.device.type)
    vocab, room, dtype, out_dtype = weight.shape[0], e_max.shape[0], compute_dtype(hidden), wide(hidden.dtype)
    read = target != formula.SKIP
    active = read & coef.active()
    recompute = near_uniform(coef, bias, vocab) if curved and e.dtype != out_dtype else None
    if on_device:  # every row; which of them must be recomputed is not known here
        rows = Active(None, None, hidden.shape[0], room if recompute is None else 0)
    else:
        rows = active_rows(active, read, room, recompute)
    x, w = Operand(hidden, dtype, rows.index, active if on_device else None), Operand(weight, dtype)
    at, coef = rows.take(target), torch.stack([rows.take(c) for c in coef])

    blocks, columns = spans(rows.count, tile.rows, rows.stored), min(vocab, tile.columns)
    dz_buffer = torch.empty(min(rows.count, tile.rows) * columns, dtype=dtype, device=hidden.device)
    wider = dtype != out_dtype and again is None
    z_buffer = torch.empty_like(dz_buffer, dtype=out_dtype) if wider else dz_buffer
    grads = Gradients(needs, rows.count, hidden, weight, out_dtype, columns)
    for t, (c0, c1) in enumerate(spans(vocab, tile.columns)):
        wc, b = w[c0, c1], None if bias is None else bias[c0:c1]
        chunk = e_slice(e, room, c0, c1)
        tops = slice(c0 // e_columns, -(-c1 // e_columns)) if e_columns else t
        grads.open(c0, c1, empty=not blocks)
        for start, stop in blocks:
            shape = (stop - start, c1 - c0)
            dz = dz_buffer[: shape[0] * shape[1]].view(shape)
            block = at[start:stop], coef[:, start:stop].contiguous()
            if stop <= rows.stored:
                place = None if rows.place is None else rows.place[start:stop]
                src, top = (
                    (chunk[start:stop], e_max[start:stop, tops]) if place is None else (chunk, e_max[place, tops])
                )
                side = dict(e_columns=e_columns) if e_columns else {}
                rows_of.tile_bwd(dz, src, place, top.contiguous(), b, *block, c0, head, **side)
            elif again is not None:
                again(dz, start, stop, rows.index, *block, c0, c1)
            else:
                z = z_buffer[: shape[0] * shape[1]].view(shape)
                product(x[start, stop], wc.t(), z)
                rows_of.tile_bwd(dz, None if dz_buffer is z_buffer else z, None, None, b, *block, c0, head)
            grads.add(dz, x, wc, start, stop)
        grads.close()
    return grads.result(rows.index)


class Gradients:
    """Sums of the gradients in float32 (float64): dX over chunks, a chunk's slice of dW and dbias over blocks."""

    def __init__(self, needs, rows: int, hidden: Tensor, weight: Tensor, dtype: torch.dtype, columns: int):
        need_x, need_w, need_b = needs
        self.hidden = hidden
        self.dx = hidden.new_zeros(rows, hidden.shape[1], dtype=dtype) if need_x else None
        self.dw = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if need_w else None
        self.db = weight.new_zeros(weight.shape[0], dtype=dtype) if need_b else None
        narrow = need_w and weight.dtype != dtype
        self.sums = weight.new_empty(columns, weight.shape[1], dtype=dtype) if narrow else None

    def open(self, c0: int, c1: int, empty: bool) -> None:
        """A chunk begins; with no row at all its slice of dW is 0."""
        self.span = slice(c0, c1)
        if self.dw is not None:
            self.slice = self.dw[self.span] if self.sums is None else self.sums[: c1 - c0]
            if empty:
                self.slice.zero_()

    def add(self, dz: Tensor, x: Operand, w: Tensor, start: int, stop: int) -> None:
        if self.dx is not None:
            product(dz, w, self.dx[start:stop], accumulate=True)
        if self.dw is not None:
            product(dz.t(), x[start, stop], self.slice, accumulate=start > 0)
        if self.db is not None:
            self.db[self.span] += dz.sum(0, dtype=self.db.dtype)

    def close(self) -> None:
        """The chunk's slice of dW is complete: rounded once, if at all."""
        if self.sums is not None:
            self.dw[self.span] = self.slice

    def result(self, index: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        dx = self.dx
        if dx is not None:
            dx = dx if index is None else dx.new_zeros(self.hidden.shape).index_copy_(0, index, dx)
            dx = dx.to(self.hidden.dtype)
        return dx, self.dw, self.db


class Active(NamedTuple):
    """Rows that have a gradient: those that use their E first."""

    index: Tensor | None  # (count,) of all rows; None: all of them, in their order
    place: Tensor | None  # (stored,) their rows in E; None: 0, 1, ...
    count: int
    stored: int

    def take(self, x: Tensor) -> Tensor:
        return x if self.index is None else x[self.index]


def rows_in(flags: Tensor) -> Tensor | None:
    """Indices of the rows that are in, None for all of them. Reads the count: a sync on a GPU, none on a CPU."""
    index = flags.nonzero()[:, 0]
    return None if index.shape[0] == flags.shape[0] else index


def active_rows(active: Tensor, read: Tensor, room: int, recompute: Tensor | None) -> Active:
    """The active rows of a call that read `read` and kept E of its first `room`, without those to recompute."""
    index = active.nonzero()[:, 0]
    place = (read.cumsum(0) - 1)[index]  # E has the rows that were read
    from_e = place < room
    if recompute is not None:
        from_e &= ~recompute[index]
    if index.shape[0] == active.shape[0] and bool(from_e[:room].all()):
        return Active(None, None, index.shape[0], min(room, index.shape[0]))
    count = int(from_e.sum())
    order = torch.cat([from_e.nonzero()[:, 0], (~from_e).nonzero()[:, 0]])
    return Active(index[order], place[order[:count]], index.shape[0], count)


def near_uniform(coef: formula.Coef, bias: Tensor | None, vocab: int) -> Tensor:
    """Rows (N,) whose entropy gradient half-precision E is not good for: log V - H < ½, where log p + H cancels."""
    banned = 0 if bias is None else (bias == -torch.inf).sum()
    tokens = torch.full_like(coef.entropy[:1], vocab) - banned  # filled there: a number made here would be copied
    return (coef.dentropy != 0) & (tokens.log() - coef.entropy < 0.5)

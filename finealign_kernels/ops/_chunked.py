"""The chunked layer: GEMMs by torch on tiles of a fixed size, one row kernel a tile, the (N, V) logits never kept.

fwd    for each chunk of the vocabulary, for each block of rows: product, row state; then one combine.
       The first rows, as many as the workspace holds, keep E = exp(z - m_tile) for backward.
bwd    for each chunk, for each block of rows with a gradient: dZ from E or from the product again, then
       dX += dZ W (float32) and the chunk's slice of dW = dZᵀ X, summed in float32 and rounded once. On a GPU a block
       holds as many rows as fit into a number of bytes, so that dW of a usual batch is one product a chunk.
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
    gradient: int = 0  # bytes of dZ that backward may hold at a time, if those of `rows` are fewer

    def gradient_rows(self, dtype: torch.dtype) -> int:
        """Rows of a block of backward."""
        return max(self.rows, self.gradient // (self.columns * dtype.itemsize))


def tile_of(device: str) -> Tile:
    return Tile(2048, 4096) if device == "cpu" else Tile(4096, 16384, gradient=2**28)


def compute_dtype(x: Tensor) -> torch.dtype:
    """dtype of the GEMMs' operands. Their products are float32 (float64): only CUDA multiplies halves into float32."""
    return x.dtype if x.device.type == "cuda" or x.dtype == torch.float64 else torch.float32


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def blank_stats(like: Tensor, n: int) -> list[Tensor]:
    """What a forward returns of n rows, without values: for the fakes of ops."""
    stats = [like.new_empty(n, dtype=wide(like.dtype)) for _ in range(9)]
    return [*stats[:5], like.new_empty(n, dtype=torch.bool), *stats[5:]]


def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out (+)= a @ b, out float32 (float64), summed in its own dtype. Autocast does not touch products into an out."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def ban(z: Tensor, head: formula.Head, col0: int) -> None:
    """-inf for the products of a tile (n, C) whose tokens are not in the row's support."""
    if head.support is not None:
        z.masked_fill_(formula.outside(head.support, col0, z.shape[1]), -torch.inf)


def operand(matrix: Tensor, dtype: torch.dtype, index: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
    """Rows of a matrix in the GEMMs' dtype: those of an index, all, or all with 0 in rows that are not kept."""
    if index is not None:
        matrix = matrix.index_select(0, index)
    elif keep is not None:  # rows that are computed and thrown away may hold NaN
        matrix = torch.where(keep[:, None], matrix, 0)
    return matrix.to(dtype)


def on_host(*counts: Tensor) -> list[int]:
    """Numbers on the device, copied to the host in one read: the only synchronization of a forward or backward."""
    return torch.stack(counts).tolist()


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


class Low(NamedTuple):
    """A low-rank part of the head: its products u @ bᵀ are added to those of the head, tile by tile."""

    u: Tensor  # (N, R)
    b: Tensor  # (V, R)


def fwd(hidden, weight, bias, target, head, want, workspace, on_device, rows_name, static=False, shard=False, low=None):
    """Rows (N,) each, E (room·V,) and its maxima (room, chunks).

    workspace: bytes for E, FULL or 0. on_device: no count is read on the host; rows that are left out are computed.
    static: E has room for rows that are not read too, so that its size is known to a compiler.
    shard: weight is a part of the head; its State instead of Rows. low: the head's low-rank part, Low.
    """
    rows_of, tile = _choose.rows(rows_name), tile_of(hidden.device.type)
    n_all, vocab = hidden.shape[0], weight.shape[0]
    dtype, out_dtype = compute_dtype(hidden), wide(hidden.dtype)
    read = target != formula.SKIP
    index = None if on_device else rows_in(read)
    x = operand(hidden, dtype, index, read if on_device else None)
    u = None if low is None else operand(low.u, compute_dtype(low.u), index, read if on_device else None)
    at, head = target if index is None else target[index], head.rows(index)
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
        wt, b = weight[c0:c1].to(dtype).t(), None if bias is None else bias[c0:c1]
        bt = None if low is None else low.b[c0:c1].to(u.dtype).t()
        for start, stop in spans(n, tile.rows, kept):
            here = e_slice(e, room, c0, c1)[start:stop] if stop <= kept else None
            in_place = direct and here is not None
            z = here if in_place else buffer[: (stop - start) * (c1 - c0)].view(stop - start, c1 - c0)
            product(x[start:stop], wt, z)
            if low is not None:
                product(u[start:stop], bt, z, accumulate=True)
            ban(z, head.rows(slice(start, stop)), c0)
            side = dict(e=None if direct else here, in_place=in_place)
            state = part[start:stop, t], first[start:stop, t], label[start:stop]
            rows_of.tile_fwd(z, b, at[start:stop], c0, head.rows(slice(start, stop)), want, *state, **side)
    if shard:
        found = formula.State(*formula.merge(part, first, want), label)
    else:
        found = rows_of.combine(part, first, label, at, want)
    if index is not None:
        found = (x.new_zeros(n_all, *x.shape[1:]).index_copy_(0, index, x) for x in found)
    e_max = part[:kept, :, 0].contiguous()
    if kept < room:
        e_max = torch.cat([e_max, e_max.new_zeros(room - kept, len(chunks))])
    return (*found, e, e_max)


def bwd(
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
    on_device,
    rows_name,
    e_columns=0,
    again=None,
    shard=None,
    low=None,
):
    """dhidden, dweight, dbias, None where not needed; with low two more, du and db, by five needs.

    coef: formulas.Coef, (N,) each in float32 (float64); curved: there is an upstream gradient of the entropy.
    e_columns: columns under one maximum of E, 0 for a chunk's. again: how a layer whose products are not the library's
    writes dZ of rows without E, again(dz, x, target, coef, c0, c1).
    shard: weight is a part of the head; dhidden, a part of the sum, is not rounded to hidden's dtype. It is called with
    it as soon as it is complete, before the last product of dW.
    """
    rows_of, tile = _choose.rows(rows_name), tile_of(hidden.device.type)
    vocab, room, dtype, out_dtype = weight.shape[0], e_max.shape[0], compute_dtype(hidden), wide(hidden.dtype)
    read = target != formula.SKIP
    active = read & coef.active()
    recompute = unfit_for_e(coef, curved and e.dtype != out_dtype, bias, vocab, head.support)
    if on_device:  # every row; which of them must be recomputed is not known here
        rows = Active(None, None, hidden.shape[0], room if recompute is None else 0)
    else:
        rows = active_rows(active, read, room, recompute)
    head = head.rows(rows.index)
    x = operand(hidden, dtype, rows.index, active if on_device else None)
    u = None if low is None else operand(low.u, compute_dtype(low.u), rows.index, active if on_device else None)
    at, coef = rows.take(target), coef.stacked() if rows.index is None else coef.stacked()[:, rows.index]
    tops = e_max if rows.place is None else e_max[rows.place]
    tops = tops if e_columns else tops.t().contiguous()

    size, columns = tile.gradient_rows(dtype), min(vocab, tile.columns)
    blocks = [(start, stop, pieces(start, stop, rows.stored, tile.rows)) for start, stop in spans(rows.count, size)]
    coefs = {span: coef[:, slice(*span)].contiguous() for *_, inner in blocks for span in inner}
    dz_buffer = hidden.new_empty(min(rows.count, size) * columns, dtype=dtype)
    wider = dtype != out_dtype and again is None and rows.stored < rows.count
    z_buffer = hidden.new_empty(min(rows.count, tile.rows) * columns, dtype=out_dtype) if wider else None
    grads = Gradients(
        needs[:3], rows.count, hidden, weight, out_dtype, columns, direct=len(blocks) == 1 and dtype == weight.dtype
    )
    low_grads = None
    if low is not None:
        once = len(blocks) == 1 and dtype == low.b.dtype
        low_grads = Gradients((*needs[3:], False), rows.count, *low, out_dtype, columns, direct=once)
        u_dz = u.to(dtype)  # the operands of a product with dZ have its dtype
    for t, (c0, c1) in enumerate(spans(vocab, tile.columns)):
        wc, b, width = weight[c0:c1].to(dtype), None if bias is None else bias[c0:c1], c1 - c0
        chunk = e_slice(e, room, c0, c1)
        grads.open(c0, c1, empty=not blocks)
        if low is not None:
            bc = low.b[c0:c1]
            low_grads.open(c0, c1, empty=not blocks)
        for start, stop, inner in blocks:
            block = dz_buffer[: (stop - start) * width].view(stop - start, width)
            for i, j in inner:
                dz, side = block[i - start : j - start], (at[i:j], coefs[i, j], c0)
                if j <= rows.stored:
                    src, place = (chunk[i:j], None) if rows.place is None else (chunk, rows.place[i:j])
                    if e_columns:
                        top = tops[i:j, c0 // e_columns : -(-c1 // e_columns)]
                        rows_of.tile_bwd(dz, src, place, top, b, *side, head, e_columns=e_columns)
                    else:
                        rows_of.tile_bwd(dz, src, place, tops[t, i:j], b, *side, head.rows(slice(i, j)))
                elif again is not None:
                    again(dz, x[i:j].to(hidden.dtype), *side, c1)
                else:
                    z = dz if z_buffer is None else z_buffer[: (j - i) * width].view(j - i, width)
                    product(x[i:j], wc.t(), z)
                    if low is not None:
                        product(u[i:j], bc.to(u.dtype).t(), z, accumulate=True)
                    ban(z, head.rows(slice(i, j)), c0)
                    rows_of.tile_bwd(dz, None if z is dz else z, None, None, b, *side, head.rows(slice(i, j)))
            last = c1 == vocab and stop == rows.count
            grads.add(block, x, wc, start, stop, shard if last else None, rows.index)
            if low is not None:
                low_grads.add(block, u_dz, bc.to(dtype), start, stop)
        grads.close()
        if low is not None:
            low_grads.close()
    found = grads.result(rows.index, shard)
    return found if low is None else (*found, *low_grads.result(rows.index)[:2])


def pieces(start: int, stop: int, stored: int, step: int) -> list[tuple[int, int]]:
    """A block of rows in pieces: those that have their E in one, the others in steps."""
    cut = min(max(start, stored), stop)
    ends = [(start, cut)] if cut > start else []
    return ends + [(cut + i, cut + j) for i, j in spans(stop - cut, step)]


class Gradients:
    """Sums of the gradients in float32 (float64): dX over chunks, a chunk's slice of dW and dbias over blocks."""

    def __init__(self, needs, rows: int, hidden, weight, dtype: torch.dtype, columns: int, direct: bool = False):
        """direct: a chunk's dW is one product, which sums in float32 and rounds once, in the weight's dtype."""
        need_x, need_w, need_b = needs
        self.hidden, self.handed = hidden, False
        self.dx = hidden.new_zeros(rows, hidden.shape[1], dtype=dtype) if need_x else None
        self.dw = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if need_w else None
        self.db = weight.new_zeros(weight.shape[0], dtype=dtype) if need_b else None
        narrow = need_w and weight.dtype != dtype and not direct
        self.sums = weight.new_empty(columns, weight.shape[1], dtype=dtype) if narrow else None

    def open(self, c0: int, c1: int, empty: bool) -> None:
        """A chunk begins; with no row at all its slice of dW is 0."""
        self.span = slice(c0, c1)
        if self.dw is not None:
            self.slice = self.dw[self.span] if self.sums is None else self.sums[: c1 - c0]
            if empty:
                self.slice.zero_()

    def add(self, dz: Tensor, x: Tensor, w: Tensor, start: int, stop: int, shard=None, index=None) -> None:
        """A block of rows. shard: dX is complete with it, and handed over."""
        if self.dx is not None:
            product(dz, w, self.dx[start:stop], accumulate=True)
            if shard is not None:
                self.hand_over(index, shard)
        if self.dw is not None:
            product(dz.t(), x[start:stop], self.slice, accumulate=start > 0)
        if self.db is not None:
            self.db[self.span] += dz.sum(0, dtype=self.db.dtype)

    def close(self) -> None:
        """The chunk's slice of dW is complete: rounded once, if at all."""
        if self.sums is not None:
            self.dw[self.span] = self.slice

    def hand_over(self, index: Tensor | None, shard) -> None:
        """Passes dX, with all rows in their places, to the function that sums it over ranks."""
        if index is not None:
            self.dx = self.dx.new_zeros(self.hidden.shape).index_copy_(0, index, self.dx)
        self.handed = True
        shard(self.dx)

    def result(self, index: Tensor | None, shard=None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if shard is not None and self.dx is not None and not self.handed:
            self.hand_over(index, shard)
        dx = self.dx
        if dx is not None and shard is None:
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
    """Indices of the rows whose flag is set, None for all rows. Reads their number, which synchronizes on a GPU."""
    index = flags.nonzero()[:, 0]
    return None if index.shape[0] == flags.shape[0] else index


def front(flags: Tensor, first: Tensor) -> Tensor:
    """All indices: those of `first`, which are in flags, first, then the others of `flags`, each in their order."""
    return (flags.to(torch.uint8) + first).argsort(descending=True, stable=True)


def from_e_first(active: Tensor, read: Tensor, room: int, recompute: Tensor | None):
    """The order of the rows of a call that read `read` and kept E of its first `room`, without those to recompute:

    index (N,), rows that use their E first, then the others that are active; which do (N,); how many were read up to
    each (N,), None where that decides nothing.
    """
    rank = None if room >= active.shape[0] else read.cumsum(0)  # E has the rows that were read
    from_e = active if rank is None else active & (rank <= room)
    if recompute is not None:
        from_e = from_e & ~recompute
    return front(active, from_e), from_e, rank


def places(read: Tensor, rank: Tensor | None, index: Tensor) -> Tensor:
    """Positions of rows in E."""
    return (read.cumsum(0) if rank is None else rank)[index] - 1


def active_rows(active: Tensor, read: Tensor, room: int, recompute: Tensor | None) -> Active:
    """The active rows, counted on the host. Arguments as of from_e_first."""
    n = active.shape[0]
    index, from_e, rank = from_e_first(active, read, room, recompute)
    stored, count = on_host(from_e.sum(), active.sum())
    if count == n and stored in (0, min(room, n)):
        return Active(None, None, n, stored)
    return Active(index[:count], places(read, rank, index[:stored]), count, stored)


def unfit_for_e(coef: formula.Coef, rounded: bool, bias: Tensor | None, vocab: int, support=None) -> Tensor | None:
    """Rows (N,) that must be computed again though their E was kept, None for none.

    rounded: E has half the digits, and the entropy a gradient. A gradient of mean_logits is the same for all tokens
    that are not banned, also for those whose E is 0.
    """
    flags = [near_uniform(coef, bias, vocab, support)] if rounded else []
    flags += [] if coef.spread is None else [coef.spread != 0]
    return None if not flags else flags[0] if len(flags) == 1 else flags[0] | flags[1]


def near_uniform(coef: formula.Coef, bias: Tensor | None, vocab: int, support: Tensor | None = None) -> Tensor:
    """Rows (N,) whose entropy gradient half-precision E is not good for: log V - H < ½, where log p + H cancels."""
    banned = 0 if bias is None else (bias == -torch.inf).sum()
    tokens = torch.full_like(coef.entropy[:1], vocab) - banned  # filled there: a number made here would be copied
    if support is not None:
        ids = support.sort(-1).values  # one that is given twice counts once
        new = (ids >= 0) & torch.cat([ids[:, :1] >= 0, ids[:, 1:] != ids[:, :-1]], 1)
        tokens = torch.minimum(tokens, new.sum(-1))
    return (coef.dentropy != 0) & (tokens.log() - coef.entropy < 0.5)

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
    """out (+)= a @ b, out float32 (float64), summed in its own dtype."""
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


def e_slice(e: Tensor, kept: int, c0: int, c1: int) -> Tensor:
    """The chunk's part of E, (kept, columns): chunks lie one behind the other, so each is contiguous."""
    return e[kept * c0 : kept * c1].view(kept, c1 - c0)


def fwd(hidden, weight, bias, target, head, want, workspace, on_device, rows_name):
    """logp, lse, entropy, log_sum_sq_probs, mean_logits, is_top1, m, l (N,) and E (kept·V,), its maxima (kept, chunks).

    workspace: bytes for E, FULL or 0. on_device: no count is read on the host; rows that are left out are computed.
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
    kept = kept_rows(n, vocab, hidden.dtype, workspace)

    part = torch.zeros(n, len(chunks), formula.PARTS, dtype=out_dtype, device=hidden.device)
    first = torch.zeros(n, len(chunks), dtype=torch.int64, device=hidden.device)
    label = torch.full((n, 2), torch.nan, dtype=out_dtype, device=hidden.device)
    e = torch.empty(kept * vocab, dtype=hidden.dtype, device=hidden.device)
    direct = e.dtype == out_dtype  # the product is written where its E will stand
    buffer = torch.empty(min(n, tile.rows) * min(vocab, tile.columns), dtype=out_dtype, device=hidden.device)
    for t, (c0, c1) in enumerate(chunks):
        wt, b = w[c0, c1].t(), None if bias is None else bias[c0:c1]
        for start, stop in spans(n, tile.rows, kept):
            here = e_slice(e, kept, c0, c1)[start:stop] if stop <= kept else None
            z = (
                here
                if here is not None and direct
                else buffer[: (stop - start) * (c1 - c0)].view(stop - start, c1 - c0)
            )
            product(x[start, stop], wt, z)
            side = dict(e=None if direct else here, in_place=direct and here is not None)
            state = part[start:stop, t], first[start:stop, t], label[start:stop]
            rows_of.tile_fwd(z, b, at[start:stop], c0, head, want, *state, **side)
    found = formula.combine(part, first, label, at, want)
    if index is not None:
        found = formula.Rows(*(x.new_zeros(n_all).index_copy_(0, index, x) for x in found))
    return (*found, e, part[:kept, :, 0].contiguous())


def bwd(coef, curved, hidden, weight, bias, target, e, e_max, head, needs, on_device, rows_name):
    """dhidden, dweight, dbias (None where not needed). coef: formulas.Coef, (N,) each in float32 (float64); curved: there is
    an upstream gradient of the entropy."""
    rows_of, tile = _choose.rows(rows_name), tile_of(hidden.device.type)
    vocab, kept = weight.shape[0], e_max.shape[0]
    dtype, out_dtype = compute_dtype(hidden), wide(hidden.dtype)
    read = target != formula.SKIP
    active = read & coef.active()
    recompute = near_uniform(coef, bias, vocab) if curved and e.dtype != out_dtype else None
    if on_device:
        index = position = None
        kept = kept if recompute is None else 0  # which rows those are is not known here
        x = Operand(hidden, dtype, None, active)
        n, at, coef = hidden.shape[0], target, torch.stack(coef)
    else:
        index, position, kept = order(active, read, kept, recompute)
        x = Operand(hidden, dtype, index)
        n = hidden.shape[0] if index is None else index.shape[0]
        at = target if index is None else target[index]
        coef = torch.stack(coef if index is None else [c[index] for c in coef])
    w = Operand(weight, dtype)
    need_x, need_w, need_b = needs
    dx = torch.zeros(n, hidden.shape[1], dtype=out_dtype, device=hidden.device) if need_x else None
    dw = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if need_w else None
    db = torch.empty(vocab, dtype=out_dtype, device=weight.device) if need_b else None
    columns = min(vocab, tile.columns)
    z_buffer = torch.empty(min(n, tile.rows) * columns, dtype=out_dtype, device=hidden.device)
    dz_buffer = z_buffer if dtype == out_dtype else torch.empty_like(z_buffer, dtype=dtype)
    sums = (
        torch.empty(columns, weight.shape[1], dtype=out_dtype, device=weight.device)
        if need_w and dw.dtype != out_dtype
        else None
    )
    blocks = spans(n, tile.rows, kept)
    for t, (c0, c1) in enumerate(spans(vocab, tile.columns)):
        wc, b = w[c0, c1], None if bias is None else bias[c0:c1]
        dwc = None if not need_w else dw[c0:c1] if sums is None else sums[: c1 - c0]
        if not blocks:
            for slice_ in (dwc, db[c0:c1] if need_b else None):
                slice_.zero_() if slice_ is not None else None
        for start, stop in blocks:
            size = (stop - start) * (c1 - c0)
            dz = dz_buffer[:size].view(stop - start, c1 - c0)
            rows = at[start:stop], coef[:, start:stop].contiguous()
            if stop <= kept:
                where = None if position is None else position[start:stop]
                chunk = e_slice(e, e_max.shape[0], c0, c1)
                top = e_max[start:stop, t] if where is None else e_max[where, t]
                src = chunk[start:stop] if where is None else chunk
                rows_of.tile_bwd(dz, src, where, top.contiguous(), b, *rows, c0, head)
            else:
                z = z_buffer[:size].view(stop - start, c1 - c0)
                product(x[start, stop], wc.t(), z)
                rows_of.tile_bwd(dz, None if z_buffer is dz_buffer else z, None, None, b, *rows, c0, head)
            if need_x:
                product(dz, wc, dx[start:stop], accumulate=True)
            if need_w:
                product(dz.t(), x[start, stop], dwc, accumulate=start > 0)
            if need_b:
                column_sums = dz.sum(0, dtype=out_dtype)
                db[c0:c1] = column_sums if start == 0 else db[c0:c1] + column_sums
        if sums is not None:
            dw[c0:c1] = dwc
    if need_x and index is not None:
        dx = torch.zeros_like(hidden, dtype=dx.dtype).index_copy_(0, index, dx)
    return dx.to(hidden.dtype) if need_x else None, dw, db


def rows_in(flags: Tensor) -> Tensor | None:
    """Indices of the rows that are in, None for all of them. Reads the count: a sync on a GPU, none on a CPU."""
    index = flags.nonzero()[:, 0]
    return None if index.shape[0] == flags.shape[0] else index


def order(
    active: Tensor, read: Tensor, kept: int, recompute: Tensor | None
) -> tuple[Tensor | None, Tensor | None, int]:
    """Rows with a gradient, those that use their E first: row indices, their places in E, and how many those are."""
    place = read.cumsum(0) - 1  # E holds the rows that were read
    index = active.nonzero()[:, 0]
    stored = place[index] < kept
    if recompute is not None:
        stored &= ~recompute[index]
    if index.shape[0] == active.shape[0] and bool(stored[:kept].all()):
        return None, None, min(kept, index.shape[0])
    index = torch.cat([index[stored], index[~stored]])
    count = int(stored.sum())
    return index, place[index[:count]], count


def near_uniform(coef: formula.Coef, bias: Tensor | None, vocab: int) -> Tensor | None:
    """Rows whose entropy gradient half-precision E is not good for: there log p + H cancels. None: no row can be one."""
    banned = 0 if bias is None else (bias == -torch.inf).sum()
    tokens = torch.as_tensor(vocab - banned, dtype=coef.entropy.dtype, device=coef.entropy.device)
    return (coef.dentropy != 0) & (tokens.log() - coef.entropy < 0.5)

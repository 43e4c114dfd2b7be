"""The fused head: tiles of the product hidden @ weightᵀ stay in registers; only their states (m, R, T, Q) are stored.

Forward: a program computes a tile of products in float32, then the logits z, then the state of each row in that tile.
One more program for each row combines its tiles in a fixed order. The mathematics is in formulas/logprobs.py.

Backward: the same tiles are computed again, with the same bits, so that p = exp(z - lse) belongs to the same z. Their
gradient is computed from z, or from the exponentials saved in forward. Then the gradient is multiplied with hidden and
weight; these products stop at a row count that is known only on the device.

All tiles have the same size, no sum is split over programs, and the tree that combines the tiles of a row depends only
on the number of tiles. The outputs of a row therefore do not depend on other rows, their number, or its place among
them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ._combine import PARTS, combine_into
from ._launch import OPTIONS, head_arguments, on_device_of
from ._tiles import (
    ENTROPY,
    LOG2E,
    LOWEST,
    MEAN,
    SQUARES,
    UNIT,
    base_of,
    label_gradient,
    log_of_e,
    logit,
    others,
    product,
    sloped,
    slopes,
    tanh_slope,
    ties_of,
    tokens,
)


class Config(NamedTuple):
    """A tile of the product, and how it is launched."""

    rows: int
    columns: int
    depth: int  # columns of hidden that one step of the product takes
    warps: int
    stages: int
    slice: int  # columns of the tile whose statistics are computed together; limits registers
    group: int  # row tiles that use the same columns of weight, so that they come from the cache
    # only for the persistent TMA kernel:
    flatten: bool = False  # one loop over tiles and depth, so that copies overlap with the sums of the tile before
    specialize: bool = False  # some warps copy and the others multiply; compiles for few tiles and not in every Triton


# The tile for each GPU. They were only compiled (bench/compile_gate.py). None has run on a GPU, and none was chosen by
# measured times; bench/sweep.py does that, and says how its result gets here. 8 warps, because 4 spill; 256 columns if
# they fit the registers, which they do not with a softcap; slices of 16 or 32 columns, whichever spills less. No
# register is spilled in a loop of products; bench/compile_gate.py says how much may be spilled outside of it.
HALF = {
    "sm_80": Config(128, 128, 64, 8, 3, 32, 8),
    "sm_90": Config(128, 256, 64, 8, 3, 32, 8),
    "sm_100": Config(128, 128, 64, 8, 3, 16, 8),
    "sm_120": Config(64, 128, 32, 8, 3, 16, 8),  # 99 KB of shared memory; 128 rows spill 450 to 810 bytes
    "gfx942": Config(128, 128, 64, 8, 2, 16, 8),
    "interpreter": Config(64, 128, 64, 4, 1, 128, 8),
}
CAPPED = HALF | {
    "sm_80": Config(64, 128, 64, 8, 3, 16, 8),  # 128 rows spill 592 bytes, or 112 with 16 warps
    "sm_90": Config(128, 128, 64, 8, 3, 32, 8),
}
PRODUCT = CAPPED | {  # for the products of a gradient, which have no slices
    "sm_80": Config(128, 128, 64, 8, 3, 16, 8),
    "sm_120": Config(128, 128, 32, 8, 3, 16, 8),
    "gfx942": Config(128, 128, 32, 8, 2, 16, 8),
}
FLOAT = dict.fromkeys(HALF, Config(64, 64, 32, 4, 2, 32, 8)) | {"interpreter": Config(64, 128, 64, 4, 1, 128, 8)}
# for the products of a float32 gradient: half the depth, because 32 does not fit the registers of sm_80 in Triton 3.9
FLOAT_PRODUCT = {arch: tile if arch == "interpreter" else tile._replace(depth=16) for arch, tile in FLOAT.items()}

TMA = ("sm_90", "sm_100", "sm_120")  # GPUs that copy whole blocks by means of a tensor descriptor


def config(arch: str, dtype: torch.dtype, capped: bool) -> Config:
    """The tile for a GPU, a dtype, and with or without a softcap. Raises KeyError for an unknown arch."""
    return (FLOAT if dtype == torch.float32 else CAPPED if capped else HALF)[arch]


def forward_config(arch: str, dtype: torch.dtype, capped: bool, want: int) -> Config:
    """The tile for the forward pass. With all outputs, whose sums need registers, it is the one for a softcap.

    The two must have the same columns, because forward and backward agree on them.
    """
    tile, small = config(arch, dtype, capped), config(arch, dtype, True)
    every = ENTROPY.value | SQUARES.value | MEAN.value
    return small if want == every and small.columns == tile.columns else tile


def slim(tile: Config) -> Config:
    """A smaller tile for a head that cannot be loaded 16 bytes at a time: each element then needs a register.

    It has the columns of `tile`: E has one maximum for each tile, and forward and backward must agree on its width.
    """
    return tile._replace(rows=min(tile.rows, 64), depth=min(tile.depth, 32), slice=min(tile.slice, 16))


def product_config(arch: str, dtype: torch.dtype) -> Config:
    """The tile for the products of a gradient, for a GPU and a dtype."""
    return (FLOAT_PRODUCT if dtype == torch.float32 else PRODUCT)[arch]


def sums_of(tile: Config, dtype: torch.dtype, arch: str) -> int:
    """Number of columns in which the sums of a slice are kept.

    Columns with this distance are in the same thread (on sm_100, adjacent columns of a row are), so that adding them
    needs no exchange between threads.
    """
    if dtype == torch.float32 or arch.startswith("gfx"):
        return tile.slice
    return min(tile.slice, 2 if arch == "sm_100" else 8)


@triton.jit
def _place(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """The row tile and the column tile of a program, int64."""
    group_size = GROUP * column_tiles
    first = program // group_size * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    inside = program % group_size
    return first + inside % height, inside // height


@triton.jit
def _rows_at(index_ptr, rows, live):
    """The index of each row of a tile among all rows. Rows beyond the last live row repeat that row."""
    rows = tl.minimum(rows, live - 1)
    if index_ptr is not None:
        return tl.load(index_ptr + rows)
    return rows


@triton.jit
def _product(
    x_ptr, x_stride_n, x_stride_d, at, w_ptr, w_stride_v, w_stride_d, cols, depth,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x[at] @ w[cols]ᵀ over the first `depth` columns; at and cols are valid int64 indices.

    EVEN: depth is a multiple of BLOCK_K.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    x_rows = x_ptr + at[:, None] * x_stride_n
    w_rows = w_ptr + cols[:, None] * w_stride_v
    for k in range(0, depth, BLOCK_K):
        ks = (k + tl.arange(0, BLOCK_K))[None, :]
        if EVEN:
            x = tl.load(x_rows + ks.to(tl.int64) * x_stride_d)
            w = tl.load(w_rows + ks.to(tl.int64) * w_stride_d)
        else:
            x = tl.load(x_rows + ks.to(tl.int64) * x_stride_d, mask=ks < depth, other=0.0)
            w = tl.load(w_rows + ks.to(tl.int64) * w_stride_d, mask=ks < depth, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    return acc


@triton.jit
def _product_of_blocks(
    x, w, row_tile, tile, depth, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The same for a row tile and a column tile by descriptors; what lies outside of a matrix is loaded as 0."""
    row_start, column_start = (row_tile * BLOCK_M).to(tl.int32), (tile * BLOCK_N).to(tl.int32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, depth, BLOCK_K):
        a, b = x.load([row_start, k]), w.load([column_start, k])
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    return acc


@triton.jit
def _halves(x):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _products(acc, bias_ptr, cols, vocab, scale, SCALED: tl.constexpr):
    """y = scale (x + bias) of a tile of products. Values beyond the last column are arbitrary."""
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=cols < vocab, other=0.0).to(tl.float32)[None, :]
    return product(acc, bias, scale, bias_ptr is not None, SCALED)


@triton.jit
def _top(y, softcap, inv_temperature, CAPPED: tl.constexpr, SCALED: tl.constexpr):
    """The largest z of each row of y, ignoring NaN; -inf if all are NaN."""
    top = tl.max(y, axis=1)
    return logit(tl.where(top == top, top, float("-inf")), softcap, inv_temperature, CAPPED, SCALED)


@triton.jit
def _fold(x, SUMS: tl.constexpr):
    """Sums over columns with distance SUMS, (BLOCK_M, SUMS)."""
    if x.shape[1] > SUMS:
        x = tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // SUMS, SUMS)), axis=1)
    return x


@triton.jit
def _sums(
    y, base, below, every, t, q, total, count, e_rows, kept, columns, softcap, inv_temperature, CAPPED: tl.constexpr,
    SCALED: tl.constexpr, WANT: tl.constexpr, SLICE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Adds the tokens of a tile to sums (BLOCK_M, SUMS), and stores e of the kept rows at e_rows, `columns` of it.

    The tile is halved until it has SLICE columns, to limit registers.
    """
    if y.shape[1] > SLICE:
        left, right = _halves(y)
        half: tl.constexpr = y.shape[1] // 2
        below, every, t, q, total, count = _sums(
            left, base, below, every, t, q, total, count, e_rows, kept, columns, softcap, inv_temperature, CAPPED,
            SCALED, WANT, SLICE, SUMS,
        )  # fmt: skip
        if e_rows is not None:
            e_rows += half
        return _sums(
            right, base, below, every, t, q, total, count, e_rows, kept, columns - half, softcap, inv_temperature,
            CAPPED, SCALED, WANT, SLICE, SUMS,
        )  # fmt: skip
    else:
        z = logit(y, softcap, inv_temperature, CAPPED, SCALED)
        e, e_below, slanted = tokens(z, base[:, None], WANT)
        if ENTROPY & WANT:
            t += _fold(slanted, SUMS)
        if SQUARES & WANT:
            q += _fold(e_below * e_below, SUMS)
        if MEAN & WANT:
            allowed = z != float("-inf")
            total += _fold(tl.where(allowed, z / UNIT, 0.0), SUMS)
            count += _fold(allowed.to(tl.float32), SUMS)
        if e_rows is not None:
            lanes = tl.arange(0, y.shape[1])[None, :]
            mask = kept[:, None] & (lanes < columns)
            tl.store(e_rows[:, None] + lanes, e.to(e_rows.dtype.element_ty), mask=mask)
        return below + _fold(e_below, SUMS), every + _fold(e, SUMS), t, q, total, count


@triton.jit
def _store_tile(
    acc, rows, live, target, tile, tiles, vocab, bias_ptr, part_ptr, first_ptr, label_ptr, e_ptr, room, chunk, scale,
    softcap, inv_temperature, CAPPED: tl.constexpr, SCALED: tl.constexpr, WANT: tl.constexpr, BLOCK_N: tl.constexpr,
    SLICE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Stores the results of a tile of products: the state of each row, the label's logit and slope, exp(z - m)."""
    start = tile * BLOCK_N
    cols = start.to(tl.int32) + tl.arange(0, BLOCK_N)
    is_live = rows < live
    here = is_live & (target >= start) & (target < tl.minimum(start + BLOCK_N, vocab))

    y = _products(acc, bias_ptr, cols, vocab, scale, SCALED)
    if start + BLOCK_N > vocab:  # only the last tile
        y = tl.where((cols < vocab)[None, :], y, float("-inf"))
    m = _top(y, softcap, inv_temperature, CAPPED, SCALED)

    first = tl.zeros_like(target) + start
    if tl.max(here.to(tl.int32), axis=0) > 0:  # few tiles hold a label
        label = target.to(tl.int32)[:, None]
        # taken from the tile, so that it has the bits of the maximum if the label is the maximum
        y_label = tl.sum(tl.where(cols[None, :] == label, y, 0.0), axis=1)
        z = logit(y_label, softcap, inv_temperature, CAPPED, SCALED)
        above = _top(
            tl.where(cols[None, :] < label, y, float("-inf")), softcap, inv_temperature, CAPPED, SCALED
        )  # fmt: skip
        is_first = (z >= m) & ((above < m) | (target == start))
        first = tl.where(here, tl.where(is_first, target, -1), first)
        slope = tl.full(z.shape, 1.0, tl.float32)
        if CAPPED:
            slope = tanh_slope(y_label / softcap)
        tl.store(label_ptr + rows * 2, z, mask=here)
        tl.store(label_ptr + rows * 2 + 1, slope, mask=here)
    tl.store(first_ptr + rows * tiles + tile, first, mask=is_live)

    e_rows = None
    if e_ptr is not None:
        # e has (room, width) for each chunk of columns, one chunk after the other
        c0 = start // chunk * chunk
        width = tl.minimum(chunk, vocab - c0)
        e_rows = e_ptr + room * c0 + rows * width + (start - c0)
    zeros = tl.zeros((y.shape[0], SUMS), tl.float32)
    below, every, t, q, total, count = _sums(
        y, base_of(m), zeros, zeros, zeros, zeros, zeros, zeros, e_rows, is_live & (rows < room),
        (vocab - start).to(tl.int32), softcap, inv_temperature, CAPPED, SCALED, WANT, SLICE, SUMS,
    )  # fmt: skip
    r = tl.sum(below, axis=1)
    ties = ties_of(r, tl.sum(every, axis=1))
    t_sum, q_sum, z_sum, n = tl.zeros_like(m), tl.zeros_like(m), tl.zeros_like(m), tl.zeros_like(m)
    if ENTROPY & WANT:
        t_sum = tl.sum(t, axis=1)
    if SQUARES & WANT:
        q_sum = others(tl.sum(q, axis=1), ties)
    if MEAN & WANT:
        z_sum, n = tl.sum(total, axis=1), tl.sum(count, axis=1)
    part = part_ptr + (rows * tiles + tile) * PARTS
    tl.store(part, m, mask=is_live)
    tl.store(part + 1, tl.where(m == float("inf"), float("nan"), others(r, ties)), mask=is_live)
    tl.store(part + 2, t_sum, mask=is_live)
    tl.store(part + 3, q_sum, mask=is_live)
    tl.store(part + 4, z_sum, mask=is_live)
    tl.store(part + 5, n, mask=is_live)


@triton.jit(do_not_specialize=["n", "room"])
def linear_fwd_kernel(
    x_ptr,  # (N, D)
    x_stride_n,
    x_stride_d,
    w_ptr,  # (V, D)
    w_stride_v,
    w_stride_d,
    bias_ptr,  # (V,) or None
    target_ptr,  # (N,)
    index_ptr,  # (n,) rows that are computed, or None: the first n
    count_ptr,  # how many entries of index are valid, or None: n
    part_ptr,  # (n, tiles, 6)
    first_ptr,  # (n, tiles)
    label_ptr,  # (n, 2)
    e_ptr,  # (room·V,) or None
    room,
    chunk,
    n,
    vocab,
    depth,
    scale,
    softcap,
    inv_temperature,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    WANT: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SLICE: tl.constexpr,
    SUMS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    live = tl.cast(n, tl.int64)
    if count_ptr is not None:
        live = tl.load(count_ptr)
    tiles = tl.cdiv(vocab, BLOCK_N).to(tl.int64)
    row_tiles = tl.cdiv(live, BLOCK_M)
    if program < row_tiles * tiles:
        row_tile, tile = _place(program, row_tiles, tiles, GROUP)
        rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        at = _rows_at(index_ptr, rows, live)
        cols = tl.minimum(tile * BLOCK_N + tl.arange(0, BLOCK_N), vocab - 1)
        acc = _product(
            x_ptr,
            x_stride_n,
            x_stride_d,
            at,
            w_ptr,
            w_stride_v,
            w_stride_d,
            cols,
            depth,
            EVEN,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        _store_tile(
            acc, rows, live, tl.load(target_ptr + at), tile, tiles, vocab, bias_ptr, part_ptr, first_ptr, label_ptr,
            e_ptr, tl.cast(room, tl.int64), chunk, scale, softcap, inv_temperature, CAPPED, SCALED, WANT, BLOCK_N,
            SLICE, SUMS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n", "room"])
def linear_fwd_tma_kernel(
    x,  # descriptor of (rows, D), blocks of (BLOCK_M, BLOCK_K): row i is the i-th row that is computed
    w,  # descriptor of (V, D), blocks of (BLOCK_N, BLOCK_K)
    bias_ptr,
    target_ptr,
    index_ptr,
    count_ptr,
    part_ptr,
    first_ptr,
    label_ptr,
    e_ptr,
    room,
    chunk,
    n,
    vocab,
    depth,
    scale,
    softcap,
    inv_temperature,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    WANT: tl.constexpr,
    EVEN: tl.constexpr,  # unused: a descriptor loads 0 outside of its matrix
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SLICE: tl.constexpr,
    SUMS: tl.constexpr,
    FLATTEN: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """linear_fwd_kernel with copies of whole blocks. It is persistent: a program takes every num_programs-th tile."""
    live = tl.cast(n, tl.int64)
    if count_ptr is not None:
        live = tl.load(count_ptr)
    tiles = tl.cdiv(vocab, BLOCK_N).to(tl.int64)
    row_tiles = tl.cdiv(live, BLOCK_M)
    last, step = (row_tiles * tiles).to(tl.int32), tl.num_programs(0)
    for program in tl.range(
        tl.program_id(0), last, step, flatten=FLATTEN, warp_specialize=SPECIALIZE, disable_licm=True
    ):
        row_tile, tile = _place(tl.cast(program, tl.int64), row_tiles, tiles, GROUP)
        acc = _product_of_blocks(x, w, row_tile, tile, depth, BLOCK_M, BLOCK_N, BLOCK_K)
        rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        target = tl.load(target_ptr + _rows_at(index_ptr, rows, live))
        _store_tile(
            acc, rows, live, target, tile, tiles, vocab, bias_ptr, part_ptr, first_ptr, label_ptr, e_ptr,
            tl.cast(room, tl.int64), chunk, scale, softcap, inv_temperature, CAPPED, SCALED, WANT, BLOCK_N, SLICE, SUMS,
        )  # fmt: skip


@triton.jit
def _store_gradient(
    acc, start, columns, out_rows, e_rows, top, is_live, from_e, a, b, curved, spread, m, bias_ptr, scale, softcap,
    inv_temperature, CAPPED: tl.constexpr, SCALED: tl.constexpr, SPREAD: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Stores dL/dx of a tile at out_rows, as if no token were the label.

    It is computed from the products, or, for rows with from_e, from exp(z - top) at e_rows.
    """
    if acc.shape[1] > SLICE:
        left, right = _halves(acc)
        half: tl.constexpr = acc.shape[1] // 2
        _store_gradient(
            left, start, columns, out_rows, e_rows, top, is_live, from_e, a, b, curved, spread, m, bias_ptr, scale,
            softcap, inv_temperature, CAPPED, SCALED, SPREAD, SLICE,
        )  # fmt: skip
        _store_gradient(
            right, start + half, columns, out_rows, e_rows, top, is_live, from_e, a, b, curved, spread, m, bias_ptr,
            scale, softcap, inv_temperature, CAPPED, SCALED, SPREAD, SLICE,
        )  # fmt: skip
    else:
        cols = start + tl.arange(0, acc.shape[1])
        inside = is_live[:, None] & (cols < columns)[None, :]
        y = _products(acc, bias_ptr, cols, columns, scale, SCALED)
        d = logit(y, softcap, inv_temperature, CAPPED, SCALED) - m[:, None]
        e, log_e = tl.exp2(d * LOG2E), tl.maximum(d, LOWEST)
        slope = tl.full(e.shape, 1.0, tl.float32)
        if CAPPED:
            slope = tanh_slope(y / softcap)
        by_e = from_e[:, None]
        if e_rows is not None:
            kept = tl.load(e_rows[:, None] + cols[None, :], mask=inside & by_e, other=0.0).to(tl.float32)
            e = tl.where(by_e, kept, e)
            if CAPPED:
                log_e = tl.where(by_e, log_of_e(kept), log_e)
                u = (log_e + top[:, None]) / inv_temperature / softcap
                slope = tl.where(by_e, (1.0 - u) * (1.0 + u), slope)
        dx = sloped(e, log_e, a[:, None], b[:, None], False)
        if curved:
            if e_rows is not None and not CAPPED:
                log_e = tl.where(by_e, log_of_e(e), log_e)
            dx = sloped(e, log_e, a[:, None], b[:, None], True)
        if SPREAD:  # the spread is 0 in rows that come from e
            dx += tl.where(y == float("-inf"), 0.0, spread[:, None])
        if CAPPED:
            dx = tl.where(dx == 0, 0.0, dx * slope)
        tl.store(out_rows[:, None] + cols[None, :], dx.to(out_rows.dtype.element_ty), mask=inside)


@triton.jit
def _count(count_ptr, at: tl.constexpr, known, start, height):
    """How many of the `height` rows from `start` on are below a count, which is on the device or given as `known`."""
    count = tl.cast(known, tl.int64)
    if count_ptr is not None:
        count = tl.load(count_ptr + at)
    return tl.maximum(tl.minimum(count - start, height), 0)


@triton.jit
def _kept(e_ptr, counts_ptr, stored, start, height):
    """How many of the `height` rows from `start` on are computed from saved exponentials."""
    kept = tl.zeros((), tl.int64)
    if e_ptr is not None:
        kept = _count(counts_ptr, 0, stored, start, height)
    return kept


@triton.jit
def _write_gradient(
    acc, row_tile, tile, live, kept, out_ptr, out_stride, bias_ptr, target_ptr, coef_ptr, coef_stride, e_ptr, place_ptr,
    e_max_ptr, e_max_stride, col0, columns, scale, softcap, inv_temperature, CAPPED: tl.constexpr,
    SCALED: tl.constexpr, SPREAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Stores dL/dx of a tile of products; the first `kept` rows are computed from saved exponentials."""
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_live = rows < live
    rows = tl.minimum(rows, live - 1)
    e_rows = None
    top = tl.zeros((BLOCK_M,), tl.float32)
    from_e = tl.zeros((BLOCK_M,), tl.int1)
    if e_ptr is not None:
        from_e = rows < kept
        place = tl.load(place_ptr + rows, mask=from_e, other=0)
        e_rows = e_ptr + place * columns
        top = tl.load(e_max_ptr + place * e_max_stride + tile, mask=from_e, other=0.0)
    coef = coef_ptr + rows
    step = tl.cast(coef_stride, tl.int64)
    g, k, h = tl.load(coef), tl.load(coef + step), tl.load(coef + 2 * step)
    m, l = tl.load(coef + 3 * step), tl.load(coef + 4 * step)
    entropy, logp, label_slope = tl.load(coef + 5 * step), tl.load(coef + 6 * step), tl.load(coef + 7 * step)
    out_rows = out_ptr + rows * out_stride
    factor = 1.0
    if SCALED:
        factor = scale * inv_temperature
    shift = tl.where(from_e, (top - m) - l, -l)
    a, b = slopes(g, k, h, shift, entropy, factor)
    curved = tl.max((h != 0).to(tl.int32), axis=0) > 0
    spread = tl.zeros((BLOCK_M,), tl.float32)
    if SPREAD:
        spread = tl.load(coef + 8 * step)
    _store_gradient(
        acc, (tile * BLOCK_N).to(tl.int32), columns, out_rows, e_rows, top, is_live, from_e, a, b, curved,
        spread * factor, m, bias_ptr, scale, softcap, inv_temperature, CAPPED, SCALED, SPREAD, SLICE,
    )  # fmt: skip
    # The label has the largest gradient. It is computed from logp, not from e and its slope, which are rounded.
    dx = label_gradient(g, k, h, logp, entropy)
    if SPREAD:
        dx = tl.where(logp == float("-inf"), dx, dx + spread)
    if CAPPED:
        dx = tl.where(dx == 0, 0.0, dx * label_slope)
    if SCALED:
        dx = dx * scale * inv_temperature
    label = tl.load(target_ptr + rows) - col0
    end = tl.minimum((tile + 1) * BLOCK_N, columns)
    tl.debug_barrier()  # another thread has stored a value there before
    here = is_live & (label >= tile * BLOCK_N) & (label < end)
    tl.store(out_rows + label, dx.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["stored", "count", "start", "height", "coef_stride", "col0", "e_max_stride"])
def linear_bwd_kernel(
    out_ptr,  # (height, columns): dL/dx of the rows from `start` on
    out_stride,
    x_ptr,  # (N, D)
    x_stride_n,
    x_stride_d,
    w_ptr,  # (columns, D), of the vocabulary's columns from col0 on
    w_stride_v,
    w_stride_d,
    bias_ptr,  # (columns,) or None
    index_ptr,  # (height,) index of each row in x, or None: 0, 1, ...
    target_ptr,  # (height,)
    coef_ptr,  # (8, height), or (9, height) with SPREAD: the gradient of the mean of z for each token, 0 in rows from e
    coef_stride,
    e_ptr,  # (room, columns) or None
    place_ptr,  # (height,) index of each row in e
    e_max_ptr,  # (room, maxima), one for each tile, from col0 on
    e_max_stride,
    counts_ptr,  # number of rows that come from e, and number of rows; or None: stored and count
    stored,
    count,
    start,
    height,
    col0,
    columns,
    depth,
    scale,
    softcap,
    inv_temperature,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    SPREAD: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SLICE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    live = _count(counts_ptr, 1, count, start, height)
    tiles = tl.cdiv(columns, BLOCK_N).to(tl.int64)
    row_tiles = tl.cdiv(live, BLOCK_M)
    if program < row_tiles * tiles:
        row_tile, tile = _place(program, row_tiles, tiles, GROUP)
        kept = _kept(e_ptr, counts_ptr, stored, start, height)
        # if all rows of a tile come from e, its product is not needed
        depth = tl.where((row_tile + 1) * BLOCK_M <= kept, 0, depth)
        rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = tl.minimum(tile * BLOCK_N + tl.arange(0, BLOCK_N), columns - 1)
        acc = _product(
            x_ptr, x_stride_n, x_stride_d, _rows_at(index_ptr, rows, live), w_ptr, w_stride_v, w_stride_d, cols, depth,
            EVEN, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        _write_gradient(
            acc, row_tile, tile, live, kept, out_ptr, out_stride, bias_ptr, target_ptr, coef_ptr, coef_stride, e_ptr,
            place_ptr, e_max_ptr, e_max_stride, col0, columns, scale, softcap, inv_temperature, CAPPED, SCALED, SPREAD,
            BLOCK_M, BLOCK_N, SLICE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["stored", "count", "start", "height", "coef_stride", "col0", "e_max_stride"])
def linear_bwd_tma_kernel(
    out_ptr,
    out_stride,
    x,  # descriptor of (height, D), blocks of (BLOCK_M, BLOCK_K): the rows from `start` on, next to each other
    w,  # descriptor of (columns, D), blocks of (BLOCK_N, BLOCK_K)
    bias_ptr,
    target_ptr,
    coef_ptr,
    coef_stride,
    e_ptr,
    place_ptr,
    e_max_ptr,
    e_max_stride,
    counts_ptr,
    stored,
    count,
    start,
    height,
    col0,
    columns,
    depth,
    scale,
    softcap,
    inv_temperature,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    SPREAD: tl.constexpr,
    EVEN: tl.constexpr,  # unused: a descriptor loads 0 outside of its matrix
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SLICE: tl.constexpr,
):
    """linear_bwd_kernel with copies of whole blocks."""
    program = tl.program_id(0).to(tl.int64)
    live = _count(counts_ptr, 1, count, start, height)
    tiles = tl.cdiv(columns, BLOCK_N).to(tl.int64)
    row_tiles = tl.cdiv(live, BLOCK_M)
    if program < row_tiles * tiles:
        row_tile, tile = _place(program, row_tiles, tiles, GROUP)
        kept = _kept(e_ptr, counts_ptr, stored, start, height)
        depth = tl.where((row_tile + 1) * BLOCK_M <= kept, 0, depth)
        acc = _product_of_blocks(x, w, row_tile, tile, depth, BLOCK_M, BLOCK_N, BLOCK_K)
        _write_gradient(
            acc, row_tile, tile, live, kept, out_ptr, out_stride, bias_ptr, target_ptr, coef_ptr, coef_stride, e_ptr,
            place_ptr, e_max_ptr, e_max_stride, col0, columns, scale, softcap, inv_temperature, CAPPED, SCALED, SPREAD,
            BLOCK_M, BLOCK_N, SLICE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["start", "height"])
def bounded_product_kernel(
    a_ptr,  # (rows, inner)
    a_stride_m,
    a_stride_k,
    b_ptr,  # (inner, columns)
    b_stride_k,
    b_stride_n,
    out_ptr,  # (rows, columns) float32
    out_stride,
    index_ptr,  # (height,) index of each row in out, or with ACROSS in b
    counts_ptr,
    start,
    height,
    rows,  # 0 without ACROSS, where the count is used
    inner,  # 0 with ACROSS, where the count is used
    columns,
    ACROSS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out (+)= a @ b for rows from `start` up to the count: rows of a and out, or with ACROSS rows of b."""
    program = tl.program_id(0).to(tl.int64)
    live = _count(counts_ptr, 1, 0, start, height)
    if ACROSS:
        row_tiles = tl.cdiv(rows, BLOCK_M).to(tl.int64)
        height_of_out, stop = tl.cast(rows, tl.int64), live.to(tl.int32)
    else:
        row_tiles = tl.cdiv(live, BLOCK_M)
        height_of_out, stop = live, tl.cast(inner, tl.int32)
    column_tiles = tl.cdiv(columns, BLOCK_N).to(tl.int64)
    if program < row_tiles * column_tiles:
        row_tile, column_tile = _place(program, row_tiles, column_tiles, GROUP)
        ms = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        ns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        # adjacent elements are masked instead of clamped to the last one: clamped indices would be loaded one by one
        is_live, is_column = ms < height_of_out, ns < columns
        a_rows = a_ptr + (ms if ACROSS else tl.minimum(ms, height_of_out - 1))[:, None] * a_stride_m
        b_columns = b_ptr + ns[None, :] * b_stride_n
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start_k in range(0, stop, BLOCK_K):
            ks = start_k + tl.arange(0, BLOCK_K)
            here = ks < stop
            at = ks.to(tl.int64)
            a_here = here[None, :]
            if ACROSS:
                a_here = a_here & is_live[:, None]
            a = tl.load(a_rows + at[None, :] * a_stride_k, mask=a_here, other=0.0)
            if ACROSS:
                at = tl.load(index_ptr + ks, mask=here, other=0)
            b = tl.load(b_columns + at[:, None] * b_stride_k, mask=here[:, None] & is_column[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
        if not ACROSS:
            ms = tl.load(index_ptr + ms, mask=is_live, other=0)
        to = out_ptr + ms[:, None] * out_stride + ns[None, :]
        inside = is_live[:, None] & is_column[None, :]
        if ADD:
            acc += tl.load(to, mask=inside, other=0.0)
        tl.store(to, acc, mask=inside)


# ---- launches ------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """The rows that are computed: the first `count` of `index`, at most n."""

    n: int
    index: Tensor | None = None  # (n,) int64; None: 0, 1, ...
    count: Tensor | None = None  # int64 on the device; None: n


def linear_fwd(hidden, weight, bias, target, rows: Rows, head, want, part, first, label, e, room, chunk, tile) -> None:
    """Writes the states of all tiles into part (n, tiles, 6), first (n, tiles), label (n, 2).

    exp(z - m) of the first `room` rows goes into e (room·V,), if not None, chunk after chunk of `chunk` columns, which
    is a multiple of the tile's columns.
    """
    (vocab, depth), n = weight.shape, rows.n
    if chunk % tile.columns:
        raise ValueError(f"chunk must be a multiple of {tile.columns}, the columns of a tile, got {chunk}")
    if n == 0:
        return
    programs = triton.cdiv(n, tile.rows) * triton.cdiv(vocab, tile.columns)
    with on_device_of(hidden):
        linear_fwd_kernel[(programs,)](
            hidden, *hidden.stride(), weight, *weight.stride(), bias, target, rows.index, rows.count, part, first,
            label, e, room, chunk, n, vocab, depth, *head_arguments(head), WANT=want, SUMS=_sums_here(tile, hidden),
            **_launch(tile, depth),
        )  # fmt: skip


def supports_tma(weight: Tensor, arch: str) -> bool:
    """True if the TMA kernels can run: on sm_90 and later, if the rows of the head lie at multiples of 16 bytes.

    It depends only on the head, not on the number of rows. False for float32: these products do not run on tensor
    cores, and the TMA kernel spills 700 bytes in their loop, where the pointer kernel spills none.
    """
    by_blocks = arch in TMA and weight.dtype != torch.float32
    return by_blocks and weight.stride(0) >= weight.shape[1] and _in_words(weight)


def by_pointers(weight: Tensor, tile: Config) -> Config:
    """The tile of linear_fwd and linear_bwd for a weight: slim if its rows do not lie at multiples of 16 bytes."""
    return tile if _in_words(weight) else slim(tile)


def _in_words(weight: Tensor) -> bool:
    """True if rows lie at multiples of 16 bytes."""
    starts = weight.data_ptr(), weight.stride(0) * weight.element_size()
    return weight.stride(1) == 1 and not any(start % 16 for start in starts)


def _descriptors(x: Tensor, weight: Tensor, tile: Config) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Descriptors for the blocks of a tile. x is copied if its rows do not lie as a descriptor needs."""
    depth = x.shape[1]
    if x.stride(1) != 1 or x.stride(0) * x.element_size() % 16 or x.data_ptr() % 16 or x.stride(0) < depth:
        aligned = -(-depth * x.element_size() // 16) * 16 // x.element_size()
        x = x.new_empty(x.shape[0], aligned)[:, :depth].copy_(x)
    blocks = (x, tile.rows), (weight, tile.columns)
    return tuple(TensorDescriptor.from_tensor(matrix, [rows, tile.depth]) for matrix, rows in blocks)


def linear_fwd_tma(
    hidden, weight, bias, target, rows: Rows, head, want, part, first, label, e, room, chunk, tile
) -> None:
    """linear_fwd for a weight that supports_tma. The rows that are computed are gathered first."""
    (vocab, depth), n = weight.shape, rows.n
    if chunk % tile.columns:
        raise ValueError(f"chunk must be a multiple of {tile.columns}, the columns of a tile, got {chunk}")
    if n == 0:
        return
    x = hidden if rows.index is None else hidden.index_select(0, rows.index)
    programs = triton.cdiv(n, tile.rows) * triton.cdiv(vocab, tile.columns)
    with on_device_of(hidden):
        linear_fwd_tma_kernel[(min(programs, _places(hidden, tile)),)](
            *_descriptors(x, weight, tile), bias, target, rows.index, rows.count, part, first, label, e, room, chunk,
            n, vocab, depth, *head_arguments(head), WANT=want, FLATTEN=tile.flatten, SPECIALIZE=tile.specialize,
            SUMS=_sums_here(tile, hidden), **_launch(tile, depth),
        )  # fmt: skip


def resident(tile: Config, itemsize: int, registers: int, shared: int) -> int:
    """How many programs of a tile a multiprocessor runs at a time, if each thread has 255 registers, as here."""
    stages = tile.stages * (tile.rows + tile.columns) * tile.depth * itemsize
    return max(1, min(registers // (256 * 32 * tile.warps), shared // (stages + 2048)))


def _places(x: Tensor, tile: Config) -> int:
    """How many programs the GPU runs at a time. More would have to wait, because a program goes on to its last tile."""
    if not x.is_cuda:
        return 3
    gpu = torch.cuda.get_device_properties(x.device)
    each = resident(tile, x.element_size(), gpu.regs_per_multiprocessor, gpu.shared_memory_per_multiprocessor)
    return gpu.multi_processor_count * each


class Block(NamedTuple):
    """Rows with a gradient, from `start` on, in the order of the call."""

    start: int
    target: Tensor  # (height,)
    coef: Tensor  # (8, height), stride 1; (9, height) where the mean of z has a gradient
    index: Tensor | None = None  # (height,) index of each row in x; None: 0, 1, ...
    place: Tensor | None = None  # (height,) index of each row in e
    counts: Tensor | None = None  # on the device: number of rows from e, number of rows; None: none from e, all rows


def linear_bwd(out, hidden, weight, bias, block: Block, e, e_max, col0, head, tile) -> None:
    """Writes dL/dx of a block into out (height, columns), for the vocabulary from col0 on.

    weight, bias, e (room, columns) and e_max (room, maxima) are slices for these columns. If e and e_max are None, all
    rows are computed from products.
    """
    (columns, depth), height = weight.shape, block.target.shape[0]
    if height == 0:
        return
    programs = triton.cdiv(height, tile.rows) * triton.cdiv(columns, tile.columns)
    with on_device_of(hidden):
        linear_bwd_kernel[(programs,)](
            out, out.stride(0), hidden, *hidden.stride(), weight, *weight.stride(), bias, block.index, block.target,
            block.coef, block.coef.stride(0), e, block.place, e_max, 0 if e_max is None else e_max.stride(0),
            block.counts, 0, block.start + height, block.start, height, col0, columns, depth, *head_arguments(head),
            SPREAD=len(block.coef) == 9, **_launch(tile, depth),
        )  # fmt: skip


def linear_bwd_tma(out, x, weight, bias, block: Block, e, e_max, col0, head, tile) -> None:
    """linear_bwd for a weight that supports_tma. x (height, D) has the rows of the block; its index is not used."""
    (columns, depth), height = weight.shape, block.target.shape[0]
    if height == 0:
        return
    programs = triton.cdiv(height, tile.rows) * triton.cdiv(columns, tile.columns)
    with on_device_of(x):
        linear_bwd_tma_kernel[(programs,)](
            out, out.stride(0), *_descriptors(x, weight, tile), bias, block.target, block.coef, block.coef.stride(0),
            e, block.place, e_max, 0 if e_max is None else e_max.stride(0), block.counts, 0, block.start + height,
            block.start, height, col0, columns, depth, *head_arguments(head), SPREAD=len(block.coef) == 9,
            **_launch(tile, depth),
        )  # fmt: skip


def bounded_product(a, b, out, block: Block, tile, across: bool, add: bool) -> None:
    """out[index] (+)= a @ b for the rows below the count. With across: out (+)= a @ b[index], summed over them."""
    (rows, inner), columns, height = a.shape, b.shape[1], block.target.shape[0]
    blocks = {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth, "GROUP": tile.group}
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    with on_device_of(a):
        bounded_product_kernel[(programs,)](
            a, *a.stride(), b, *b.stride(), out, out.stride(0), block.index, block.counts, block.start, height,
            rows if across else 0, 0 if across else inner, columns, ACROSS=across, ADD=add, **blocks,
            num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
        )  # fmt: skip


def combine(part, first, label, target, rows: Rows, want, found) -> None:
    """Writes the statistics of each computed row into found, a formulas.Rows of tensors (N,)."""
    combine_into(found, part, first, label, target, want, rows.index, rows.count)


def _sums_here(tile: Config, x: Tensor) -> int:
    if torch.version.hip is not None:
        return sums_of(tile, x.dtype, "gfx942")
    return sums_of(tile, x.dtype, "sm_100" if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 10 else "")


def _launch(tile: Config, depth: int) -> dict:
    blocks = {
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "GROUP": tile.group,
        "SLICE": tile.slice,
    }
    return {"EVEN": depth % tile.depth == 0, **blocks, "num_warps": tile.warps, "num_stages": tile.stages, **OPTIONS}

"""Row kernels over a tile of logits: the state (m, R, T, Q) of each row forward, the gradient of the logits backward.

z = softcap(scale * (x + bias)) / temperature. The mathematics is in formulas/logprobs.py. A program computes SPAN
columns of a row, so a few long rows fill a GPU too. It goes through them in blocks, whose size depends only on the
number of columns. The bits of a row therefore depend on no other row and not on the number of rows.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

from ..formulas import logprobs as formula
from ._combine import PARTS, SKIP, combine_into
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

TILE = None  # logits of any size are one launch
SPAN = 16384  # columns of a row that one program computes; a whole number of blocks
STAGES = 1  # loads go to registers, of which enough are free, not to shared memory

# (largest number of columns, BLOCK, num_warps). Compiled for every target of bench/compile_gate.py, not yet run on a
# GPU.
LAUNCH = ((1024, 1024, 4), (8192, 2048, 8), (float("inf"), 4096, 8))
# Backward computes no sums. With eight elements a thread more blocks run at once; 16 and a softcap do not fit
# registers.
BACKWARD = ((1024, 1024, 4), (float("inf"), 2048, 8))


@triton.jit
def _span_of(spans, columns, SPAN: tl.constexpr):
    """The row of a program, the index of its span in the row, the span's first column and its number of columns."""
    program = tl.program_id(0)  # divided in 32 bits, because a GPU has no 64-bit division instruction
    place = (program % spans).to(tl.int64)
    begin = (place * SPAN).to(tl.int32)
    return (program // spans).to(tl.int64), place, begin, tl.minimum(columns - begin, SPAN)


@triton.jit
def _local_label(target, col0, columns):
    """The column of the label in this span, or -1 if it is elsewhere. SKIP and BAD are below any col0."""
    local = target - col0
    return tl.where((local >= 0) & (local < columns), local, -1).to(tl.int32)


@triton.jit
def _load_product(x_ptr, bias_ptr, cols, columns, scale, SCALED: tl.constexpr, WHOLE: tl.constexpr):
    """y = scale * (x + bias); -inf beyond the last column. A WHOLE block has no columns beyond."""
    bias = 0.0
    if WHOLE:
        x = tl.load(x_ptr + cols).to(tl.float32)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + cols).to(tl.float32)
        y = product(x, bias, scale, bias_ptr is not None, SCALED)
    else:
        x = tl.load(x_ptr + cols, mask=cols < columns, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + cols, mask=cols < columns, other=0.0).to(tl.float32)
        y = tl.where(cols < columns, product(x, bias, scale, bias_ptr is not None, SCALED), float("-inf"))
    return y


@triton.jit
def _highest(x_ptr, bias_ptr, columns, scale, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    """The largest y of the first columns; -inf where no number is there."""
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    whole = tl.multiple_of(columns - columns % BLOCK, BLOCK)
    lanes = tl.arange(0, BLOCK)
    for start in range(0, whole, BLOCK):
        top = tl.maximum(top, _load_product(x_ptr, bias_ptr, start + lanes, columns, scale, SCALED, True))
    if whole < columns:
        top = tl.maximum(top, _load_product(x_ptr, bias_ptr, whole + lanes, columns, scale, SCALED, False))
    return tl.max(top, axis=0)


@triton.jit
def _fold(x, GROUP: tl.constexpr):
    """Sums of GROUP neighbours, which one thread holds where the rows are aligned."""
    return tl.sum(tl.reshape(x, (x.shape[0] // GROUP, GROUP)), axis=1)


@triton.jit
def _add_block(
    start, x_ptr, bias_ptr, e_ptr, columns, base, below, every, t, q, total, count, scale, softcap, inv_temperature,
    CAPPED: tl.constexpr, SCALED: tl.constexpr, WANT: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """A block of columns into a row's sums, and its e where it is kept."""
    cols = start + tl.arange(0, BLOCK)
    y = _load_product(x_ptr, bias_ptr, cols, columns, scale, SCALED, WHOLE)
    z = logit(y, softcap, inv_temperature, CAPPED, SCALED)
    e, e_below, slanted = tokens(z, base, WANT)
    below += _fold(e_below, GROUP)
    every += _fold(e, GROUP)
    if ENTROPY & WANT:
        t += _fold(slanted, GROUP)
    if SQUARES & WANT:
        q += _fold(e_below * e_below, GROUP)
    if MEAN & WANT:
        allowed = z != float("-inf")
        total += tl.where(allowed, z / UNIT, 0.0)
        count += _fold(allowed.to(tl.float32), GROUP)
    if e_ptr is not None:
        e = e.to(e_ptr.dtype.element_ty)
        if WHOLE:
            tl.store(e_ptr + cols, e)
        else:
            tl.store(e_ptr + cols, e, mask=cols < columns)
    return below, every, t, q, total, count


@triton.jit(do_not_specialize=["part_stride", "first_stride", "label_stride", "col0"])
def row_fwd_kernel(
    x_ptr,  # (n, columns)
    x_stride,
    bias_ptr,  # (columns,) or None
    target_ptr,  # (n,)
    part_ptr,  # (n, spans, 6)
    part_stride,
    first_ptr,  # (n, spans): the label, -1 or the first column, as tile_fwd says
    first_stride,
    label_ptr,  # (n, 2)
    label_stride,
    e_ptr,  # (n, columns), None, or x itself
    e_stride,
    col0,
    columns,
    spans,
    scale,
    softcap,
    inv_temperature,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    WANT: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Finds the maximum of a span first, then the sums, for which the span is read again from the cache."""
    row, place, begin, columns = _span_of(spans, columns, SPAN)
    col0 += begin
    target = tl.load(target_ptr + row)
    label = _local_label(target, col0, columns)
    read = target != SKIP
    stop = tl.where(read, columns, 0)
    x_ptr += row * x_stride + begin
    if bias_ptr is not None:
        bias_ptr += begin
    label_ptr += row * label_stride

    m = logit(_highest(x_ptr, bias_ptr, stop, scale, SCALED, BLOCK), softcap, inv_temperature, CAPPED, SCALED)
    first = tl.cast(col0, tl.int64)
    if label >= 0:
        y = tl.load(x_ptr + label).to(tl.float32)
        bias = 0.0
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + label).to(tl.float32)
        y = product(y, bias, scale, bias_ptr is not None, SCALED)
        z = logit(y, softcap, inv_temperature, CAPPED, SCALED)
        slope = 1.0
        if CAPPED:
            slope = tanh_slope(y / softcap)
        tl.store(label_ptr, z)
        tl.store(label_ptr + 1, slope)
        first = tl.full((), -1, tl.int64)
        if z >= m:
            above = _highest(x_ptr, bias_ptr, label, scale, SCALED, BLOCK)
            if (label == 0) | (logit(above, softcap, inv_temperature, CAPPED, SCALED) < m):
                first = tl.cast(col0 + label, tl.int64)
    tl.store(first_ptr + row * first_stride + place, first)

    below = tl.zeros((BLOCK // GROUP,), tl.float32)
    every, t, q = tl.zeros_like(below), tl.zeros_like(below), tl.zeros_like(below)
    total, count = tl.zeros((BLOCK,), tl.float32), tl.zeros_like(below)
    base = base_of(m)
    if e_ptr is not None:
        tl.debug_barrier()  # e may overwrite x: all warps must have read the label before
        e_ptr += row * e_stride + begin
    whole = tl.multiple_of(stop - stop % BLOCK, BLOCK)
    for start in range(0, whole, BLOCK):
        below, every, t, q, total, count = _add_block(
            start, x_ptr, bias_ptr, e_ptr, stop, base, below, every, t, q, total, count, scale, softcap,
            inv_temperature, CAPPED, SCALED, WANT, GROUP, BLOCK, True,
        )  # fmt: skip
    if whole < stop:
        below, every, t, q, total, count = _add_block(
            whole, x_ptr, bias_ptr, e_ptr, stop, base, below, every, t, q, total, count, scale, softcap,
            inv_temperature, CAPPED, SCALED, WANT, GROUP, BLOCK, False,
        )  # fmt: skip

    ties = tl.sum(ties_of(below, every), axis=0)
    r = others(tl.sum(below, axis=0), ties)
    part_ptr += row * part_stride + place * PARTS
    tl.store(part_ptr, tl.where(read, m, 0.0))
    tl.store(part_ptr + 1, tl.where(m == float("inf"), float("nan"), r))
    zero = tl.full((), 0, tl.float32)
    t_sum, q_sum, z_sum, n = zero, zero, zero, zero
    if ENTROPY & WANT:
        t_sum = tl.sum(t, axis=0)
    if SQUARES & WANT:
        q_sum = others(tl.sum(q, axis=0), ties)
    if MEAN & WANT:
        z_sum, n = tl.sum(total, axis=0), tl.sum(count, axis=0)
    tl.store(part_ptr + 2, t_sum)
    tl.store(part_ptr + 3, q_sum)
    tl.store(part_ptr + 4, z_sum)
    tl.store(part_ptr + 5, n)


@triton.jit
def _store_gradients(
    out_ptr, src_ptr, e_max_ptr, bias_ptr, columns, g, k, h, m, l, entropy, spread, top, scale, softcap,
    inv_temperature, CAPPED: tl.constexpr, SCALED: tl.constexpr, E_COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    CURVED: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """dL/dx of a span, as if no token were the label.

    CURVED: the entropy has a gradient; otherwise h is 0. SPREAD: the mean of z has a gradient.
    """
    whole = tl.multiple_of(columns - columns % BLOCK, BLOCK)
    for start in range(0, whole, BLOCK):
        _store_gradient(
            start, out_ptr, src_ptr, e_max_ptr, bias_ptr, columns, g, k, h, m, l, entropy, spread, top, scale, softcap,
            inv_temperature, CAPPED, SCALED, E_COLUMNS, BLOCK, CURVED, SPREAD, True,
        )  # fmt: skip
    if whole < columns:
        _store_gradient(
            whole, out_ptr, src_ptr, e_max_ptr, bias_ptr, columns, g, k, h, m, l, entropy, spread, top, scale, softcap,
            inv_temperature, CAPPED, SCALED, E_COLUMNS, BLOCK, CURVED, SPREAD, False,
        )  # fmt: skip


@triton.jit
def _store_gradient(
    start, out_ptr, src_ptr, e_max_ptr, bias_ptr, columns, g, k, h, m, l, entropy, spread, top, scale, softcap,
    inv_temperature, CAPPED: tl.constexpr, SCALED: tl.constexpr, E_COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    CURVED: tl.constexpr, SPREAD: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """_store_gradients of one block."""
    cols = start + tl.arange(0, BLOCK)
    if e_max_ptr is None:
        y = _load_product(src_ptr, bias_ptr, cols, columns, scale, SCALED, WHOLE)
        d = logit(y, softcap, inv_temperature, CAPPED, SCALED) - m
        e, log_e = tl.exp2(d * LOG2E), tl.maximum(d, LOWEST)
        shift = -l
    else:
        if WHOLE:
            e = tl.load(src_ptr + cols).to(tl.float32)
        else:
            e = tl.load(src_ptr + cols, mask=cols < columns, other=0.0).to(tl.float32)
        if E_COLUMNS >= BLOCK:
            top = tl.load(e_max_ptr + start // E_COLUMNS)
        elif E_COLUMNS:  # several maxima a block: one row of the reshaped block for each
            tiles = start // E_COLUMNS + tl.arange(0, BLOCK // E_COLUMNS)
            if WHOLE:
                top = tl.load(e_max_ptr + tiles)
            else:
                top = tl.load(e_max_ptr + tiles, mask=tiles * E_COLUMNS < columns, other=0.0)
            top = top[:, None]
            e = tl.reshape(e, (BLOCK // E_COLUMNS, E_COLUMNS))
        log_e = e
        if CURVED or CAPPED:
            log_e = log_of_e(e)
        shift = (top - m) - l
    factor = 1.0
    if SCALED:
        factor = scale * inv_temperature
    a, b = slopes(g, k, h, shift, entropy, factor)
    dx = sloped(e, log_e, a, b, CURVED)
    if SPREAD and e_max_ptr is None:
        dx += tl.where(y == float("-inf"), 0.0, spread * factor)
    if CAPPED:
        if e_max_ptr is None:
            slope = tanh_slope(y / softcap)
        else:
            u = (log_e + top) / inv_temperature / softcap
            slope = (1.0 - u) * (1.0 + u)
        dx = tl.where(dx == 0, 0.0, dx * slope)
    if len(dx.shape) == 2:
        dx = tl.reshape(dx, (BLOCK,))
    dx = dx.to(out_ptr.dtype.element_ty)
    if WHOLE:
        tl.store(out_ptr + cols, dx)
    else:
        tl.store(out_ptr + cols, dx, mask=cols < columns)


@triton.jit(do_not_specialize=["e_max_stride", "coef_stride", "col0"])
def row_bwd_kernel(
    out_ptr,  # (n, columns)
    out_stride,
    src_ptr,  # (rows, columns): x, or e where e_max is given; may be out
    src_stride,
    index_ptr,  # (n,) or None
    e_max_ptr,  # (n, maxima of a row) or None
    e_max_stride,
    bias_ptr,  # (columns,) or None
    target_ptr,  # (n,)
    coef_ptr,  # (8, n), or (9, n) with SPREAD: the gradient of the mean of z for each token; these rows have no e_max
    coef_stride,
    col0,
    columns,
    spans,
    scale,
    softcap,
    inv_temperature,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    SPREAD: tl.constexpr,
    E_COLUMNS: tl.constexpr,  # number of columns that share one maximum of e; 0: a span, or all columns
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, _, begin, columns = _span_of(spans, columns, SPAN)
    target = tl.load(target_ptr + row)
    label = _local_label(target, col0 + begin, columns)
    coef_ptr += row
    step = coef_stride.to(tl.int64)
    g, k, h = tl.load(coef_ptr), tl.load(coef_ptr + step), tl.load(coef_ptr + 2 * step)
    out_ptr += row * out_stride + begin
    spread = 0.0
    if SPREAD:
        spread = tl.load(coef_ptr + 8 * step)
    if (target == SKIP) | ((g == 0) & (k == 0) & (h == 0) & (spread == 0)):
        for start in range(0, columns, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            tl.store(out_ptr + cols, tl.zeros((BLOCK,), out_ptr.dtype.element_ty), mask=cols < columns)
    else:
        m, l = tl.load(coef_ptr + 3 * step), tl.load(coef_ptr + 4 * step)
        entropy, logp = tl.load(coef_ptr + 5 * step), tl.load(coef_ptr + 6 * step)
        src_row = row
        if index_ptr is not None:
            src_row = tl.load(index_ptr + row)
        src_ptr += src_row * src_stride + begin
        if bias_ptr is not None:
            bias_ptr += begin
        top = m
        if e_max_ptr is not None:
            e_max_ptr += row * e_max_stride
            if E_COLUMNS:
                e_max_ptr += begin // E_COLUMNS
            else:
                top = tl.load(e_max_ptr)
        if h != 0:  # also true for NaN
            _store_gradients(
                out_ptr, src_ptr, e_max_ptr, bias_ptr, columns, g, k, h, m, l, entropy, spread, top, scale,
                softcap, inv_temperature, CAPPED, SCALED, E_COLUMNS, BLOCK, True, SPREAD,
            )  # fmt: skip
        else:
            _store_gradients(
                out_ptr, src_ptr, e_max_ptr, bias_ptr, columns, g, k, 0.0, m, l, entropy, spread, top, scale,
                softcap, inv_temperature, CAPPED, SCALED, E_COLUMNS, BLOCK, False, SPREAD,
            )  # fmt: skip
        # The label has the largest gradient. It is computed from logp, not from e and its slope, which are rounded.
        dx = label_gradient(g, k, h, logp, entropy)
        if SPREAD:
            dx = tl.where(logp == float("-inf"), dx, dx + spread)
        if CAPPED:
            dx = tl.where(dx == 0, 0.0, dx * tl.load(coef_ptr + 7 * step))
        if SCALED:
            dx = dx * scale * inv_temperature
        tl.debug_barrier()  # another thread has stored a value there before
        tl.store(out_ptr + label, dx.to(out_ptr.dtype.element_ty), mask=label >= 0)


def tile_fwd(x, bias, target, col0, head, want, part, first, label, e=None, in_place=False) -> None:
    """Computes the states of a tile of products x (n, C).

    part    (n, spans, 6) states of spans; (n, 6) if there is one span
    first   (n, spans), or (n,): the label's column if it is the first maximum of the span, -1 if the label is in the
            span but is not its first maximum, and the span's first column if the label is elsewhere
    label   (n, 2) logit and slope of the label
    e       (n, C) exp(z - m), or None; with in_place it is written over x, which must be float32
    Rows of x, part, first, label and e may be strided.
    Raises  ValueError for any other stride, for another number of spans, and for in_place=True unless x is float32
    """
    if in_place and x.dtype != torch.float32:
        raise ValueError(f"in_place=True needs x in torch.float32, got {x.dtype}")
    e = x if in_place else e
    _check_unit_stride(x=x, bias=bias, target=target, part=part, label=label, e=e)
    (n, columns), spans = x.shape, part[0, ..., 0].numel() if len(part) else 1
    if n and spans != spans_of(columns):
        raise ValueError(f"part must have {spans_of(columns)} states of {SPAN} columns, got {tuple(part.shape)}")
    if n == 0:
        return
    with on_device_of(x):
        row_fwd_kernel[(n * spans,)](
            x, x.stride(0), bias, target, part, part.stride(0), first, first.stride(0), label,
            label.stride(0), e, 0 if e is None else e.stride(0), col0, columns, spans, *head_arguments(head),
            WANT=want, GROUP=_neighbours(x), **_launch(LAUNCH, columns),
        )  # fmt: skip


def tile_bwd(out, src, index, e_max, bias, target, coef: Tensor, col0, head, e_columns=0) -> None:
    """Writes dL/dx of a tile into out (n, C). src holds the products (None: out itself), or exp(z - e_max).

    e_max is (n,), or (n, maxima) with one for each e_columns columns. Rows of out, src, coef and e_max may be strided.
    Raises  ValueError for any other stride, and for an index with src=None
    """
    if e_columns and SPAN % e_columns:
        raise ValueError(f"e_columns must divide {SPAN}, got {e_columns}")
    if src is None and index is not None:
        raise ValueError("index needs src: rows of out cannot be gathered from out itself")
    src = out if src is None else src
    _check_unit_stride(out=out, src=src, index=index, bias=bias, target=target, coef=coef)
    n, columns = out.shape
    if n == 0:
        return
    spans = spans_of(columns)
    with on_device_of(out):
        row_bwd_kernel[(n * spans,)](
            out, out.stride(0), src, src.stride(0), index, e_max, 0 if e_max is None else e_max.stride(0),
            bias, target, coef, coef.stride(0), col0, columns, spans, *head_arguments(head),
            SPREAD=len(coef) == 9, E_COLUMNS=e_columns, **_launch(BACKWARD, columns),
        )  # fmt: skip


def combine(part, first, label, target, want) -> formula.Rows:
    """formulas.logprobs.combine of float32 states on a GPU, in one launch."""
    floats = [part.new_empty(len(part)) for _ in range(9)]
    top1 = torch.empty(len(part), dtype=torch.bool, device=part.device)
    found = formula.Rows(*floats[:5], top1, *floats[5:])
    combine_into(found, part, first, label, target, want)
    return found


def spans_of(columns: int) -> int:
    return -(-columns // SPAN)


def _launch(table: tuple, columns: int) -> dict:
    block, num_warps = next((block, warps) for limit, block, warps in table if columns <= limit)
    return {"SPAN": SPAN, "BLOCK": block, "num_warps": num_warps, "num_stages": STAGES, **OPTIONS}


def _neighbours(x: Tensor) -> int:
    """How many adjacent elements of a row one thread loads at once. It adds them up before threads are combined."""
    aligned = x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    return 16 // x.element_size() if aligned else 1


def _check_unit_stride(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"{name} must have stride 1 in its last dimension, got strides {tuple(x.stride())}")

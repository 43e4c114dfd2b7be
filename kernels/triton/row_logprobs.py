"""Row kernels over a tile of logits: the state (m, R, T, Q) of each row forward, the gradient of the logits backward.

z = softcap(scale * (x + bias)) / temperature. The mathematics is in formulas/logprobs.py. One program walks SPAN
columns of a row, in blocks whose size depends on the number of columns alone: few rows fill a GPU too, and a row's bits
depend on no other row, nor on how many there are.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

from ..formulas import logprobs as formula
from ._combine import ENTROPY, MEAN, PARTS, SKIP, SQUARES, combine_into
from ._launch import OPTIONS, head_arguments, on_device_of
from ._tiles import block_state, combine_states, label_gradient, logit, shifted_exp, tanh_slope, token_gradient

TILE = None  # logits of any size are one launch
SPAN = 16384  # columns of a row that one program looks at; a whole number of blocks

# Columns up to: BLOCK, num_warps. Compiled for every target of bench/compile_gate.py, not yet run on a GPU.
LAUNCH = ((1024, 1024, 4), (8192, 2048, 8), (float("inf"), 4096, 8))


@triton.jit
def _span_of(spans, columns, SPAN: tl.constexpr):
    """Row of a program, its place among the row's spans, where that begins and how many columns it has."""
    program = tl.program_id(0)  # divided in 32 bits: a GPU has no instruction for 64
    place = (program % spans).to(tl.int64)
    begin = (place * SPAN).to(tl.int32)
    return (program // spans).to(tl.int64), place, begin, tl.minimum(columns - begin, SPAN)


@triton.jit
def _local_label(target, col0, columns):
    """Column of the label in this span, -1 where it is not here: SKIP and BAD are below any col0."""
    local = target - col0
    return tl.where((local >= 0) & (local < columns), local, -1).to(tl.int32)


@triton.jit
def _load_product(x_ptr, bias_ptr, cols, columns, scale):
    """y = scale * (x + bias); phantom columns are -inf."""
    y = tl.load(x_ptr + cols, mask=cols < columns, other=float("-inf")).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=cols < columns, other=0.0).to(tl.float32)
    return tl.where(cols < columns, y * scale, float("-inf"))


@triton.jit(do_not_specialize=["part_stride", "first_stride", "label_stride", "col0"])
def row_fwd_kernel(
    x_ptr,  # (n, columns)
    x_stride,
    bias_ptr,  # (columns,) or None
    target_ptr,  # (n,)
    part_ptr,  # (n, spans, 6)
    part_stride,
    first_ptr,  # (n, spans)
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
    WANT: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
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

    m = tl.full((), float("-inf"), tl.float32)
    r, t, q = tl.full((), 0, tl.float32), tl.full((), 0, tl.float32), tl.full((), 0, tl.float32)
    total, count = tl.full((), 0, tl.float32), tl.full((), 0, tl.int32)
    first = tl.full((), 0, tl.int32)
    for start in range(0, stop, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = logit(_load_product(x_ptr, bias_ptr, cols, columns, scale), softcap, inv_temperature, CAPPED)
        # one lane at most; taken from here, so that the label's z is bitwise the maximum where it is the maximum
        tl.store(label_ptr + tl.zeros_like(cols), z, mask=cols == label)
        block_m, block_r, block_t, block_q, index = block_state(z, ENTROPY & WANT, SQUARES & WANT)
        first = tl.where(block_m > m, start + index, first)
        m, r, t, q = combine_states(m, r, t, q, block_m, block_r, block_t, block_q)
        if MEAN & WANT:
            allowed = z != float("-inf")
            total += tl.sum(tl.where(allowed, z, 0.0), axis=0)
            count += tl.sum(allowed.to(tl.int32), axis=0)

    slope = 1.0
    if CAPPED:
        y = tl.load(x_ptr + label, mask=label >= 0, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + label, mask=label >= 0, other=0.0).to(tl.float32)
        slope = tanh_slope(y * scale / softcap)
    tl.store(label_ptr + 1, slope, mask=label >= 0)

    part_ptr += row * part_stride + place * PARTS
    tl.store(part_ptr, tl.where(read, m, 0.0))
    tl.store(part_ptr + 1, r)
    tl.store(part_ptr + 2, t)
    tl.store(part_ptr + 3, q)
    tl.store(part_ptr + 4, total)
    tl.store(part_ptr + 5, count.to(tl.float32))
    tl.store(first_ptr + row * first_stride + place, (col0 + first).to(tl.int64))

    if e_ptr is not None:
        # x is read once more, each block before it is written: e may lie over x, of which every warp has read the label
        tl.debug_barrier()
        e_ptr += row * e_stride + begin
        for start in range(0, stop, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z = logit(_load_product(x_ptr, bias_ptr, cols, columns, scale), softcap, inv_temperature, CAPPED)
            tl.store(e_ptr + cols, shifted_exp(z, m).to(e_ptr.dtype.element_ty), mask=cols < columns)


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
    coef_ptr,  # (8, n)
    coef_stride,
    col0,
    columns,
    spans,
    scale,
    softcap,
    inv_temperature,
    CAPPED: tl.constexpr,
    E_COLUMNS: tl.constexpr,  # columns under one maximum of e; 0: all of them
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
    if (target == SKIP) | ((g == 0) & (k == 0) & (h == 0)):
        for start in range(0, columns, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            tl.store(out_ptr + cols, tl.zeros((BLOCK,), out_ptr.dtype.element_ty), mask=cols < columns)
    else:
        m, l = tl.load(coef_ptr + 3 * step), tl.load(coef_ptr + 4 * step)
        entropy, logp = tl.load(coef_ptr + 5 * step), tl.load(coef_ptr + 6 * step)
        label_slope = tl.load(coef_ptr + 7 * step)
        dz_label = label_gradient(g, k, h, logp, entropy)
        src_row = row
        if index_ptr is not None:
            src_row = tl.load(index_ptr + row)
        src_ptr += src_row * src_stride + begin
        if bias_ptr is not None:
            bias_ptr += begin
        e_max = 0.0
        if e_max_ptr is not None:
            e_max_ptr += row * e_max_stride
            if E_COLUMNS:
                e_max_ptr += begin // E_COLUMNS
            e_max = tl.load(e_max_ptr)
        for start in range(0, columns, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            is_label = cols == label
            if e_max_ptr is None:
                y = _load_product(src_ptr, bias_ptr, cols, columns, scale)
                d = (logit(y, softcap, inv_temperature, CAPPED) - m) - l
                p = tl.exp(d)
            else:
                e = tl.load(src_ptr + cols, mask=cols < columns, other=0.0).to(tl.float32)
                top = e_max
                if E_COLUMNS:
                    top = tl.load(e_max_ptr + cols // E_COLUMNS, mask=cols < columns, other=0.0)
                shift = top - m - l
                log_e = e
                if (h != 0) | CAPPED:  # costs more than the rest of the block
                    log_e = tl.log(e)
                d = log_e + shift
                p = e * tl.exp(shift)
            dz = tl.where(is_label, dz_label, token_gradient(p, d, g, k, h, entropy))
            if CAPPED:
                if e_max_ptr is None:
                    slope = tanh_slope(y / softcap)
                else:
                    u = (log_e + top) / inv_temperature / softcap
                    slope = (1.0 - u) * (1.0 + u)
                # the label's does not come from e: a rounded one would weigh on the largest gradient
                slope = tl.where(is_label, label_slope, slope)
                dz = tl.where(dz == 0, 0.0, dz * slope)
            dx = dz * scale * inv_temperature
            tl.store(out_ptr + cols, dx.to(out_ptr.dtype.element_ty), mask=cols < columns)


def tile_fwd(x, bias, target, col0, head, want, part, first, label, e=None, in_place=False) -> None:
    """States of a tile of products x (n, C): part (n, spans, 6), first (n, spans), label (n, 2); exp(z - m) in e or x.

    A tile of one span may have part (n, 6) and first (n,). Rows of x, part, first, label and e may be strided. Raises
    ValueError for any other stride, for another number of spans, and for in_place=True unless x is float32.
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
            WANT=want, **_launch(columns),
        )  # fmt: skip


def tile_bwd(out, src, index, e_max, bias, target, coef: Tensor, col0, head, e_columns=0) -> None:
    """dL/dx of one tile into out (n, C), from raw products src (None: out itself) or exp(z - e_max).

    e_max is (n,), or (n, maxima), one for each e_columns columns. Rows of out, src, coef and e_max may be strided.
    Raises ValueError for any other stride, and for an index with src=None.
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
            E_COLUMNS=e_columns, **_launch(columns),
        )  # fmt: skip


def combine(part, first, label, target, want) -> formula.Rows:
    """formula.combine of float32 states on a GPU, in one launch."""
    floats = [part.new_empty(len(part)) for _ in range(8)]
    top1 = torch.empty(len(part), dtype=torch.bool, device=part.device)
    found = formula.Rows(*floats[:5], top1, *floats[5:])
    combine_into(found, part, first, label, target, want)
    return found


def spans_of(columns: int) -> int:
    return -(-columns // SPAN)


def _launch(columns: int) -> dict:
    block, num_warps = next((block, warps) for limit, block, warps in LAUNCH if columns <= limit)
    return {"SPAN": SPAN, "BLOCK": block, "num_warps": num_warps, **OPTIONS}


def _check_unit_stride(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"{name} must have stride 1 in its last dimension, got strides {tuple(x.stride())}")

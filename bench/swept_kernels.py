"""The Triton kernels that bench/sweep.py times: inputs, launches to try, exact answers, the same work in torch alone.

A kernel is swept once it has an entry in KERNELS. Nothing here takes a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple
from unittest import mock

import shapes
import torch
from finealign_kernels.kernels import linear_logprobs as heads
from finealign_kernels.kernels import row_logprobs as rows
from torch import Tensor

from finealign_kernels.formulas.logprobs import Head
from finealign_kernels.ops import _choose, _chunked

EXACT_ROWS = 16
PLAIN, SOFTCAP = Head(), Head(softcap=30.0)


class Kernel(NamedTuple):
    """What is swept. `shipped` is the launch in use for a sample."""

    sample: Callable  # (rows, size, dtype, device) -> the tensors that the others take
    launches: tuple
    shipped: Callable[[tuple], object]
    call: Callable[[tuple, object], object]  # of a sample and a launch
    error: Callable[[tuple], float]  # of what call wrote, relative to float64
    written: tuple[str, ...]  # fields of the sample that call fills
    bare: Callable[[tuple], object]  # the same bytes or products, by torch alone
    work: Callable[[tuple], float]  # bytes, or FLOPs
    table: str  # where its launch stands

    @property
    def unit(self) -> tuple[str, float]:
        return ("GB/s", 1e9) if self.table in ("LAUNCH", "BACKWARD") else ("TFLOP/s", 1e12)


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


# ---- rows of logits ------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """A tile of logits x, and room for what the kernels write."""

    x: Tensor  # (n, columns)
    target: Tensor  # (n,)
    coef: Tensor  # (8, n), as ops/_chunked.py hands it over: an upstream gradient of logp alone
    part: Tensor  # (n, spans, 6)
    first: Tensor  # (n, spans)
    label: Tensor  # (n, 2)
    dx: Tensor  # (n, columns)
    exact_lse: Tensor  # (n,) float64
    exact_dx: Tensor  # (n, columns) float64, of the first rows alone

    @property
    def shape(self) -> list[int]:
        return list(self.x.shape)


def tile(n: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """Logits of standard deviation 2, labels at random, normal upstream gradients."""
    random = torch.Generator(device).manual_seed(0)
    x = (2 * torch.randn(n, columns, generator=random, device=device)).to(dtype)
    target = torch.randint(columns, (n,), generator=random, device=device)
    upstream = torch.randn(n, generator=random, device=device)
    exact_lse = torch.cat([part.double().logsumexp(1) for part in x.split(256)])
    m = x.amax(1).float()
    logp = (x.gather(1, target[:, None])[:, 0].double() - exact_lse).float()
    zero, one = torch.zeros_like(upstream), torch.ones_like(upstream)
    coef = torch.stack([upstream, zero, zero, m, (exact_lse - m).float(), zero, logp, one])
    some = slice(0, EXACT_ROWS)
    share = (x[some].double() - exact_lse[some, None]).exp()
    share[torch.arange(len(share), device=device), target[some]] -= 1
    spans = rows.spans_of(columns)
    part, label = torch.empty(n, spans, 6, device=device), torch.empty(n, 2, device=device)
    first = torch.empty(n, spans, dtype=torch.int64, device=device)
    return Tile(x, target, coef, part, first, label, torch.empty_like(x), exact_lse, -upstream[some, None] * share)


@contextmanager
def row_launch(launch: tuple[int, int]) -> Iterator[None]:
    """The row kernels take this (BLOCK, num_warps) at any number of columns."""
    table = ((float("inf"), *launch),)
    with mock.patch.multiple(rows, LAUNCH=table, BACKWARD=table):
        yield


def shipped_row_launch(table: str, t: Tile) -> tuple[int, int]:
    chosen = rows._launch(getattr(rows, table), t.x.shape[1])
    return chosen["BLOCK"], chosen["num_warps"]


def row_fwd(t: Tile, launch) -> None:
    with row_launch(launch):
        rows.tile_fwd(t.x, None, t.target, 0, PLAIN, 0, t.part, t.first, t.label)


def row_bwd(t: Tile, launch) -> None:
    with row_launch(launch):
        rows.tile_bwd(t.dx, t.x, None, None, None, t.target, t.coef, 0, PLAIN)


def lse_error(t: Tile) -> float:
    part = t.part.double()
    return relative((part[..., 0] + part[..., 1].log1p()).logsumexp(1), t.exact_lse)


def dx_error(t: Tile) -> float:
    return relative(t.dx[:EXACT_ROWS], t.exact_dx)


def copy(t: Tile, passes: int) -> None:
    """As many bytes as are read (1 pass), or read and written (2)."""
    half = len(t.x) * passes // 2
    t.dx[:half].copy_(t.x[:half])


def row_kernel(table: str, call: Callable, error: Callable, written: tuple[str, ...], passes: int) -> Kernel:
    launches = tuple(itertools.product((1024, 2048, 4096, 8192, 16384), (4, 8, 16)))
    return Kernel(
        sample=tile,
        launches=launches,
        shipped=partial(shipped_row_launch, table),
        call=call,
        error=error,
        written=written,
        bare=lambda t: copy(t, passes),
        work=lambda t: passes * t.x.numel() * t.x.element_size(),
        table=table,
    )


# ---- the fused head ------------------------------------------------------------------------------------------------


class Products(NamedTuple):
    """A head and its rows, and room for what the kernels write. Backward is that of one chunk of the vocabulary."""

    hidden: Tensor  # (n, D)
    weight: Tensor  # (V, D)
    target: Tensor  # (n,)
    part: Tensor  # flat: six numbers a row and tile
    first: Tensor  # flat: one a row and tile
    label: Tensor  # (n, 2)
    e: Tensor  # flat: the first `room` rows
    room: int  # as many as workspace="auto" keeps
    chunk: Tensor  # (columns, D), the first of weight
    block: heads.Block  # all rows have a gradient
    given_dz: Tensor  # (n, columns), what dX and dW are made of
    dz: Tensor  # (n, columns)
    dx: Tensor  # (n, D) float32
    dw: Tensor  # (columns, D) float32
    some: Tensor  # (EXACT_ROWS,) rows whose answers are known
    exact_z: Tensor  # (EXACT_ROWS, V) float64

    @property
    def shape(self) -> list[int]:
        return [*self.hidden.shape, len(self.weight)]


CHUNK = _chunked.tile_of("cuda").columns
SMALLEST = 64  # columns of a tile: as many tiles as there is room for


def products(n: int, shape: shapes.Head, dtype: torch.dtype, device: torch.device) -> Products:
    """Logits of standard deviation 2, as bench/cases.py makes them."""
    random = torch.Generator(device).manual_seed(0)
    columns, tiles = min(shape.V, CHUNK), -(-shape.V // SMALLEST)

    def normal(*size):
        return torch.randn(size, generator=random, device=device)

    def empty(*size, dtype=torch.float32):
        return torch.empty(size, dtype=dtype, device=device)

    hidden, weight = normal(n, shape.D).to(dtype), empty(shape.V, shape.D, dtype=dtype)
    weight.normal_(generator=random).mul_(2 * shape.D**-0.5)  # in its own dtype: many processes make one at a time
    target = torch.randint(shape.V, (n,), generator=random, device=device)
    target[::2] %= columns  # half of the labels stand in the chunk
    lse, ones = torch.full((n,), torch.tensor(shape.V).log().item() + 2, device=device), torch.ones(n, device=device)
    coef = torch.stack([normal(n), 0 * ones, 0 * ones, 0 * ones, lse, 0 * ones, -lse, ones])
    block = heads.Block(0, target, coef, torch.arange(n, device=device), None, torch.tensor([0, n], device=device))
    some = torch.linspace(0, n - 1, min(n, EXACT_ROWS), device=device).long()
    wide = hidden[some].double()
    return Products(
        hidden=hidden,
        weight=weight,
        target=target,
        part=empty(n * tiles * heads.PARTS.value),
        first=empty(n * tiles, dtype=torch.int64),
        label=empty(n, 2),
        e=empty(min(n, shape.D) * shape.V, dtype=dtype),
        room=min(n, shape.D),
        chunk=weight[:columns],
        block=block,
        given_dz=normal(n, columns).to(dtype),
        dz=empty(n, columns, dtype=dtype),
        dx=empty(n, shape.D),
        dw=empty(columns, shape.D),
        some=some,
        exact_z=torch.cat([wide @ part.double().t() for part in weight.split(CHUNK)], 1),
    )


def states(t: Products, launch) -> tuple[Tensor, Tensor]:
    """What forward fills, in the shape that a launch gives it."""
    n, tiles = len(t.hidden), -(-len(t.weight) // heads.Config(*launch).columns)
    return t.part[: n * tiles * heads.PARTS.value].view(n, tiles, -1), t.first[: n * tiles].view(n, tiles)


def head_fwd(t: Products, launch, head=PLAIN, by=None) -> None:
    run, n = by or heads.linear_fwd, heads.Rows(len(t.hidden))
    arguments = *states(t, launch), t.label, t.e, t.room, CHUNK, heads.Config(*launch)
    run(t.hidden, t.weight, None, t.target, n, head, 0, *arguments)


def head_capped(t: Products, launch) -> None:
    head_fwd(t, launch, SOFTCAP, shipped_forward(t))


def shipped_forward(t: Products) -> Callable:
    by_tma = heads.supports_tma(t.weight, _choose.arch(t.hidden))
    return heads.linear_fwd_tma if by_tma else heads.linear_fwd


def head_bwd(t: Products, launch) -> None:
    run = heads.linear_bwd_tma if heads.supports_tma(t.weight, _choose.arch(t.hidden)) else heads.linear_bwd
    run(t.dz, t.hidden, t.chunk, None, t.block, None, None, 0, PLAIN, heads.Config(*launch))


def head_dx(t: Products, launch) -> None:
    heads.bounded_product(t.given_dz, t.chunk, t.dx, t.block, heads.Config(*launch), across=False, add=False)


def head_dw(t: Products, launch) -> None:
    heads.bounded_product(t.given_dz.t(), t.hidden, t.dw, t.block, heads.Config(*launch), across=True, add=False)


def forward_error(t: Products, launch, head=PLAIN) -> float:
    """Of log-sum-exp, the label's logit and exp(z - m) of the first chunk."""
    z = t.exact_z if not head.softcap else head.softcap * (t.exact_z / head.softcap).tanh()
    part = states(t, launch)[0][t.some].double()
    lse = (part[..., 0] + part[..., 1].log1p()).logsumexp(1)
    kept = t.some < t.room
    e = _chunked.e_slice(t.e, t.room, 0, len(t.chunk))[t.some[kept]]
    top = part[kept, :, 0].repeat_interleave(heads.Config(*launch).columns, 1)[:, : len(t.chunk)]
    return max(
        relative(lse, z.logsumexp(1)),
        relative(t.label[t.some, 0], z.gather(1, t.target[t.some, None])[:, 0]),
        relative(e, (z[kept, : len(t.chunk)] - top).exp()),
    )


def bwd_error(t: Products, launch) -> float:
    g, lse, logp = (t.block.coef[row, t.some].double() for row in (0, 4, 6))
    exact = -g[:, None] * (t.exact_z[:, : len(t.chunk)] - lse[:, None]).exp()
    here = (t.target[t.some] < len(t.chunk)).nonzero()[:, 0]
    exact[here, t.target[t.some][here]] = (-g * torch.expm1(logp))[here]
    return relative(t.dz[t.some], exact)


def products_dx_error(t: Products, launch) -> float:
    return relative(t.dx[t.some], t.given_dz[t.some].double() @ t.chunk.double())


def products_dw_error(t: Products, launch) -> float:
    some = torch.linspace(0, len(t.chunk) - 1, EXACT_ROWS, device=t.dw.device).long()
    return relative(t.dw[some], t.given_dz[:, some].double().t() @ t.hidden.double())


# Tiles worth trying. A block of every tile is a power of two, and divides a chunk of the vocabulary.
AREAS = ((128, 256), (256, 128), (128, 128), (64, 256), (128, 64))
HEAD_LAUNCHES = (
    *((m, n, 64, 8, stages, 32, 8) for (m, n), stages in itertools.product(AREAS, (3, 4))),
    *((m, n, 32, 8, 4, 32, 8) for m, n in AREAS[:3]),
    *((128, 256, 64, 8, 3, slice, group) for slice, group in ((16, 8), (64, 8), (32, 4), (32, 16))),
    *((128, 128, depth, 4, 3, 16, 8) for depth in (32, 64)),
)
BY_TMA_LAUNCHES = (  # and persistent ones whose loops are one. Under Triton 3.6 that spills in the loop at 128 x 256,
    *HEAD_LAUNCHES,  # and specialised warps are the same code (8 warps) or spill (4 warps): neither is swept
    *((128, 128, 64, 8, stages, 16, 8, 1) for stages in (3, 4)),
)
PRODUCT_LAUNCHES = tuple(dict.fromkeys((m, n, k, w, s, 32, g) for m, n, k, w, s, _, g in HEAD_LAUNCHES))


def shipped_tile(capped: bool, t: Products):
    return _shipped(t, lambda arch: heads.config(arch, t.hidden.dtype, capped))


def shipped_product(t: Products):
    return _shipped(t, lambda arch: heads.product_config(arch, t.hidden.dtype))


def _shipped(t: Products, of: Callable):
    arch = _choose.arch(t.hidden)
    return arch and numbers(of(arch))


def numbers(tile: heads.Config) -> tuple[int, ...]:
    """A tile as a launch: the seven that every kernel takes, and what stands behind them where it is set."""
    known = 9 if tile.specialize else 8 if tile.flatten else 7
    return tuple(map(int, tile[:known]))


def head_kernel(call, error, written, shipped, table, bare, whole: bool, launches=HEAD_LAUNCHES) -> Kernel:
    """whole: over all of the vocabulary, not one chunk."""

    def flops(t: Products) -> float:
        return 2.0 * t.hidden.numel() * len(t.weight if whole else t.chunk)

    return Kernel(products, launches, shipped, call, error, written, bare, flops, table)


def logits_of(weight: str) -> Callable:
    return lambda t: torch.mm(t.hidden, getattr(t, weight).t())


STATES, PLAIN_TILE, CAPPED_TILE = ("part", "label", "e"), partial(shipped_tile, False), partial(shipped_tile, True)
BY_TMA, CAPPED_ERROR = partial(head_fwd, by=heads.linear_fwd_tma), partial(forward_error, head=SOFTCAP)
KERNELS = {
    "row_fwd": row_kernel("LAUNCH", row_fwd, lambda t, launch: lse_error(t), ("part",), 1),
    "row_bwd": row_kernel("BACKWARD", row_bwd, lambda t, launch: dx_error(t), ("dx",), 2),
    "head_fwd": head_kernel(head_fwd, forward_error, STATES, PLAIN_TILE, "HALF", logits_of("weight"), True),
    "head_fwd_tma": head_kernel(
        BY_TMA, forward_error, STATES, PLAIN_TILE, "HALF", logits_of("weight"), True, BY_TMA_LAUNCHES
    ),
    "head_capped": head_kernel(head_capped, CAPPED_ERROR, STATES, CAPPED_TILE, "CAPPED", logits_of("weight"), True),
    "head_bwd": head_kernel(head_bwd, bwd_error, ("dz",), PLAIN_TILE, "HALF", logits_of("chunk"), False),
    "head_dx": head_kernel(
        head_dx, products_dx_error, ("dx",), shipped_product, "PRODUCT",
        lambda t: torch.mm(t.given_dz, t.chunk), False, PRODUCT_LAUNCHES,
    ),
    "head_dw": head_kernel(
        head_dw, products_dw_error, ("dw",), shipped_product, "PRODUCT",
        lambda t: torch.mm(t.given_dz.t(), t.hidden), False, PRODUCT_LAUNCHES,
    ),
}  # fmt: skip

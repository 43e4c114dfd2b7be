"""Which launch of a Triton kernel is fastest: every configuration worth trying, beside the one that ships.

    python bench/sweep.py --json sweep.json               every kernel, at the sizes of real models (GPU)
    python bench/sweep.py --kernel head_fwd --shape Llama-3-8B --dtype bfloat16
    python bench/sweep.py --best sweep.json               what was fastest, as the lines that the tables hold
    TRITON_INTERPRET=1 python bench/sweep.py --rows 2 --shape small --columns 3001
                                                          the same path under the interpreter: answers, no times

An answer is checked before it is timed. Times are those on the GPU, from a cold cache; the rate is that of the bytes or
the products nobody can leave out, and beside it stands its share of what a copy of those bytes, or torch.mm of those
products, reaches in the same rounds. Each launch compiles and answers once in a process of its own first, many at a
time: one that hangs or breaks the GPU's context takes no other along. A kernel is swept once it stands in KERNELS.

How a result becomes the default: the lines that --best prints go into LAUNCH of kernels/triton/row_logprobs.py and into
HALF, CAPPED, PRODUCT or FLOAT of kernels/triton/linear_logprobs.py, by hand, because a tile of HALF serves forward and
backward; TMA there loses a GPU on which head_fwd beats head_fwd_tma. Then bench/compile_gate.py has to pass.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple
from unittest import mock

import shapes
import torch
import triton
from finealign_kernels.kernels import linear_logprobs as heads
from finealign_kernels.kernels import row_logprobs as rows
from torch import Tensor

from finealign_kernels.formulas.logprobs import Head
from finealign_kernels.ops import _choose, _chunked
from finealign_kernels.testing.measure import medians, queued

COLUMNS = (49152, 128256, 151936, 256000)  # SmolLM2, Llama 3, Qwen 2.5, Gemma 2
SHAPES = {shape.model: shape for size in ("small", "models") for shape in shapes.HEAD[size]}
MODELS = ("Llama-3-8B", "Gemma-2-2B", "SmolLM2-135M")  # a deep, a wide and a shallow head
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
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
        return ("GB/s", 1e9) if self.table == "LAUNCH" else ("TFLOP/s", 1e12)


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
    with mock.patch.object(rows, "LAUNCH", ((float("inf"), *launch),)):
        yield


def shipped_row_launch(t: Tile) -> tuple[int, int]:
    chosen = rows._launch(t.x.shape[1])
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


def row_kernel(call: Callable, error: Callable, written: tuple[str, ...], passes: int) -> Kernel:
    launches = tuple(itertools.product((1024, 2048, 4096, 8192, 16384), (4, 8, 16)))
    return Kernel(
        sample=tile,
        launches=launches,
        shipped=shipped_row_launch,
        call=call,
        error=error,
        written=written,
        bare=lambda t: copy(t, passes),
        work=lambda t: passes * t.x.numel() * t.x.element_size(),
        table="LAUNCH",
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
    by_tma = heads.takes_tma(t.weight, _choose.arch(t.hidden))
    return heads.linear_fwd_tma if by_tma else heads.linear_fwd


def head_bwd(t: Products, launch) -> None:
    run = heads.linear_bwd_tma if heads.takes_tma(t.weight, _choose.arch(t.hidden)) else heads.linear_bwd
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
    "row_fwd": row_kernel(row_fwd, lambda t, launch: lse_error(t), ("part",), 1),
    "row_bwd": row_kernel(row_bwd, lambda t, launch: dx_error(t), ("dx",), 2),
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


# ---- the race ------------------------------------------------------------------------------------------------------


def sweep(name: str, t, rounds: int, launches: tuple | None = None, refused: dict | None = None) -> list[dict]:
    """A row for each launch that compiles and is right, and for the bare work; times on a GPU alone.

    launches: these alone. refused: launches not to be tried, and why.
    """
    kernel, device = KERNELS[name], t[0].device
    common = {"kernel": name, "shape": t.shape, "dtype": str(t[0].dtype).removeprefix("torch."), **machine(t[0])}
    shipped, calls, errors, failures = kernel.shipped(t), {}, {}, []
    for launch in dict.fromkeys((shipped, *kernel.launches) if launches is None else launches):
        if launch is None:  # nothing ships for this GPU
            continue
        row = {**common, "launch": launch, "shipped": launch == shipped}
        for field in kernel.written:
            getattr(t, field).fill_(torch.nan)
        try:
            if reason := (refused or {}).get(launch):
                raise RuntimeError(reason)
            kernel.call(t, launch)
            errors[launch] = kernel.error(t, launch)
        except Exception as problem:  # a launch that the compiler or the GPU turns down
            failures.append({**row, "failed": " ".join(f"{type(problem).__name__}: {problem}".split())[:200]})
            continue
        if not errors[launch] <= TOLERANCE[t[0].dtype]:
            failures.append({**row, "failed": f"wrong answer: {errors[launch]:.1e} off"})
            continue
        calls[launch] = partial(kernel.call, t, launch)
    calls["bare"] = partial(kernel.bare, t)
    times = medians(queued(calls, rounds, device))
    found = [
        {
            **common,
            "launch": launch,
            "shipped": launch == shipped,
            "error": errors.get(launch),
            "queued_s": times.get(launch),
            "rate": kernel.work(t) / times[launch] if times else None,
            "share_of_bare": times["bare"] / times[launch] if times else None,
        }
        for launch in calls
    ]
    return sorted(found, key=lambda row: row["queued_s"] or 0) + failures


def machine(x: Tensor) -> dict[str, str | None]:
    gpu = torch.cuda.get_device_name(x.device) if x.is_cuda else "none"
    return {"gpu": gpu, "arch": _choose.arch(x), "triton": triton.__version__}


AHEAD_PROCESSES = 6  # each holds a head of its own: more than these pass the memory of an 80 GB GPU
AHEAD_ROWS = 64  # as divisible as any number of rows that is timed: the same code is compiled


def compiled_ahead(name: str, size, dtype: str, t, only: tuple | None = None) -> dict:
    """Launches that did not compile or answer in a process of their own, and why. The others are in Triton's cache."""
    kernel = KERNELS[name]
    here = f"--{'columns' if kernel.sample is tile else 'shape'}={size}"
    launches = only or tuple(filter(None, dict.fromkeys((kernel.shipped(t), *kernel.launches))))

    def reason(launch) -> str | None:
        command = [sys.executable, __file__, f"--kernel={name}", f"--dtype={dtype}", here, f"--rows={AHEAD_ROWS}"]
        command += ["--rounds=1", f"--launch={','.join(map(str, launch))}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=90)
        except subprocess.TimeoutExpired:
            return "more than 90 s to compile and answer"
        return None if done.returncode == 0 else (done.stdout + done.stderr).strip().rpartition("\n")[2]

    with ThreadPoolExecutor(max(1, min(AHEAD_PROCESSES, (os.cpu_count() or 1) - 2))) as pool:
        reasons = dict(zip(launches, pool.map(reason, launches), strict=True))
    return {launch: why for launch, why in reasons.items() if why}


def named(launch) -> str:
    return launch if isinstance(launch, str) else "x".join(map(str, launch))


def table(found: list[dict]) -> str:
    first, unit = found[0], KERNELS[found[0]["kernel"]].unit
    text = [f"\n{first['kernel']}  {first['dtype']}  {' x '.join(map(str, first['shape']))}"]
    for row in found:
        ships = "  <- ships" if row["shipped"] else ""
        if "failed" in row:
            text.append(f"  {named(row['launch']):24} {row['failed']}{ships}")
            continue
        error = "" if row["error"] is None else f"{row['error']:.1e} off"
        time = "no time"
        if row["queued_s"]:
            time = f"{row['queued_s'] * 1e6:9.1f} us {row['rate'] / unit[1]:7.0f} {unit[0]} {row['share_of_bare']:6.2f}"
        text.append(f"  {named(row['launch']):24} {time}  {error}{ships}")
    return "\n".join(text)


def best(found: list[dict], most: int = 3) -> str:
    """Of each GPU, dtype and kernel the launches with the largest mean share of the bare work over all its shapes, as
    lines of the table that they belong in, and the one that ships."""
    groups = defaultdict(list)
    for row in found:
        groups[row["gpu"], row["arch"], row["triton"], row["dtype"], row["kernel"]].append(row)
    text = []
    for (gpu, arch, version, dtype, name), rows_of in groups.items():
        shares, shipped = defaultdict(list), set()
        for row in rows_of:
            if row["launch"] != "bare" and row.get("share_of_bare"):
                shares[tuple(row["launch"])].append(row["share_of_bare"])
                shipped |= {tuple(row["launch"])} if row["shipped"] else set()
        sizes = len({tuple(row["shape"]) for row in rows_of})
        means = {launch: geometric_mean(each) for launch, each in shares.items() if len(each) == sizes}
        ranked = sorted(means, key=means.get, reverse=True)
        where = "FLOAT" if dtype == "float32" and KERNELS[name].unit[0] == "TFLOP/s" else KERNELS[name].table
        text.append(f"\n{where}, by {name} in {dtype} at {sizes} sizes; {gpu}, Triton {version}")
        for launch in dict.fromkeys((*ranked[:most], *(one for one in ranked if one in shipped))):
            numbers = ", ".join(map(str, launch))
            line = f'(float("inf"), {numbers}),' if where == "LAUNCH" else f'"{arch}": Config({numbers}),'
            note = " <- ships" if launch in shipped else ""
            text.append(f"    {line}  # {means[launch]:.2f} of the bare work{note}")
        if not ranked:
            text.append("    no launch was timed at every size")
    return "\n".join(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="only this one; may be given again")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--columns", type=int, action="append", help="of a row kernel's tile")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="of a head kernel's products")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--launch", action="append", help="only this one, commas between its numbers; may be given again"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--best", type=Path, nargs="+", metavar="FILE", help="of these results, nothing is run")
    args = parser.parse_args(argv)
    if args.best:
        print(best([row for file in args.best for row in json.loads(file.read_text())]))
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    only = args.launch and tuple(tuple(map(int, launch.split(","))) for launch in args.launch)
    alone = bool(only) and len(only) == 1  # in a process of its own
    results, broken, refused = [], False, {}
    for make, dtype in itertools.product((tile, products), args.dtype or DTYPES):
        chosen = [name for name in args.kernel or KERNELS if KERNELS[name].sample is make]
        sizes = (args.columns or COLUMNS) if make is tile else (args.shape or MODELS)
        for size in sizes if chosen else ():
            t = make(args.rows, SHAPES.get(size, size), DTYPES[dtype], device)
            for name in chosen:
                if device.type == "cuda" and not alone and (name, dtype) not in refused:  # all sizes: same code
                    refused[name, dtype] = compiled_ahead(name, size, dtype, t, only)
                found = sweep(name, t, args.rounds, only, refused.get((name, dtype)))
                print(table(found), flush=True)
                broken |= any("failed" in row and (row["shipped"] or alone) for row in found)
                broken |= all("failed" in row for row in found if row["launch"] != "bare")
                results += found
                if args.json:
                    args.json.write_text(json.dumps(results, indent=1) + "\n")
            del t
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())

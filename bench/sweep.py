"""Which launch of a Triton kernel is fastest: every configuration worth trying, beside the one that ships.

    python bench/sweep.py --json sweep.json               all kernels, at the vocabularies of real models (GPU)
    TRITON_INTERPRET=1 python bench/sweep.py --rows 2     the same path under the interpreter: answers, no times

An answer is checked before it is timed. Times are those on the GPU, from a cold cache, the rate is that of the bytes
that have to move, and beside it stands its share of what a copy of those bytes reaches. A kernel is swept once it has
an entry in KERNELS.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from finealign_kernels.kernels import row_logprobs as rows
from torch import Tensor

from finealign_kernels.testing.measure import medians, queued

COLUMNS = (49152, 128256, 151936, 256000)  # SmolLM2, Llama 3, Qwen 2.5, Gemma 2
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
HEAD = (1.0, 0.0, 1.0)  # scale, softcap, 1 / temperature


class Tile(NamedTuple):
    """A tile of logits x, and room for what the kernels write."""

    x: Tensor  # (n, columns)
    target: Tensor  # (n,)
    coef: Tensor  # (8, n), as ops/_chunked.py hands it over: an upstream gradient of logp alone
    part: Tensor  # (n, 6)
    first: Tensor  # (n,)
    label: Tensor  # (n, 2)
    dx: Tensor  # (n, columns)
    exact_lse: Tensor  # (n,) float64
    exact_dx: Tensor  # (n, columns) float64, of the first rows alone


class Kernel(NamedTuple):
    """What is swept. A launch is whatever `using` understands; `shipped` is the one in use at a number of columns."""

    launches: tuple
    shipped: Callable[[int], object]
    using: Callable[[object], object]  # a context in which calls take that launch
    call: Callable[[Tile], object]
    error: Callable[[Tile], float]  # of what call wrote, relative to float64
    passes: int  # over the tile: 1 where it is read, 2 where it is written too


EXACT_ROWS = 16


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
    room = [torch.empty(n, width, device=device) for width in (6, 2)]
    first = torch.empty(n, dtype=torch.int64, device=device)
    return Tile(x, target, coef, room[0], first, room[1], torch.empty_like(x), exact_lse, -upstream[some, None] * share)


def row_fwd(t: Tile) -> None:
    rows.tile_fwd(t.x, None, t.target, 0, HEAD, 0, t.part, t.first, t.label)


def lse_error(t: Tile) -> float:
    return _distance(t.part[:, 0].double() + t.part[:, 1].double().log1p(), t.exact_lse)


def row_bwd(t: Tile) -> None:
    rows.tile_bwd(t.dx, t.x, None, None, None, t.target, t.coef, 0, HEAD)


def dx_error(t: Tile) -> float:
    return _distance(t.dx[:EXACT_ROWS].double(), t.exact_dx)


def _distance(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@contextmanager
def row_launch(launch: tuple[int, int]) -> Iterator[None]:
    """The row kernels take this (BLOCK, num_warps) at any number of columns."""
    with mock.patch.object(rows, "LAUNCH", ((float("inf"), *launch),)):
        yield


def shipped_row_launch(columns: int) -> tuple[int, int]:
    chosen = rows._launch(columns)
    return chosen["BLOCK"], chosen["num_warps"]


ROW_LAUNCHES = tuple(itertools.product((1024, 2048, 4096, 8192, 16384), (4, 8, 16)))
KERNELS = {
    "row_fwd": Kernel(ROW_LAUNCHES, shipped_row_launch, row_launch, row_fwd, lse_error, 1),
    "row_bwd": Kernel(ROW_LAUNCHES, shipped_row_launch, row_launch, row_bwd, dx_error, 2),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def sweep(name: str, t: Tile, rounds: int) -> list[dict]:
    """A row for each launch that compiles and is right, and for a copy of the same bytes; times on a GPU alone."""
    kernel, (n, columns) = KERNELS[name], t.x.shape
    common = {"kernel": name, "rows": n, "columns": columns, "dtype": str(t.x.dtype).removeprefix("torch.")}
    shipped, calls, errors, failures = kernel.shipped(columns), {}, {}, []
    for launch in dict.fromkeys((shipped, *kernel.launches)):
        for written in (t.part, t.dx):
            written.fill_(torch.nan)
        try:
            with kernel.using(launch):
                kernel.call(t)
            errors[launch] = kernel.error(t)
        except Exception as problem:  # a launch that the compiler or the GPU turns down
            failures.append({**common, "launch": launch, "failed": f"{type(problem).__name__}: {problem}"[:200]})
            continue
        if not errors[launch] <= TOLERANCE[t.x.dtype]:
            failures.append({**common, "launch": launch, "failed": f"wrong answer: {errors[launch]:.1e} off"})
            continue
        calls[launch] = lambda launch=launch: _call_with(kernel, launch, t)
    moved = kernel.passes * t.x.numel() * t.x.element_size()
    calls["copy"] = lambda: t.dx[: n * kernel.passes // 2].copy_(t.x[: n * kernel.passes // 2])
    times = medians(queued(calls, rounds, t.x.device))
    found = [
        {
            **common,
            "launch": launch,
            "shipped": launch == shipped,
            "error": errors.get(launch),
            "queued_s": times.get(launch),
            "bytes_per_s": moved / times[launch] if times else None,
            "share_of_copy": times["copy"] / times[launch] if times else None,
        }
        for launch in calls
    ]
    return sorted(found, key=lambda row: row["queued_s"] or 0) + failures


def _call_with(kernel: Kernel, launch, t: Tile) -> None:
    with kernel.using(launch):
        kernel.call(t)


def table(found: list[dict]) -> str:
    first = found[0]
    text = [f"\n{first['kernel']}  {first['dtype']}  {first['rows']} x {first['columns']}"]
    for row in found:
        launch = "x".join(map(str, row["launch"])) if isinstance(row["launch"], tuple) else row["launch"]
        if "failed" in row:
            text.append(f"  {launch:12} {row['failed']}")
            continue
        error = "" if row["error"] is None else f"{row['error']:.1e} off"
        time = "no time"
        if row["queued_s"]:
            time = f"{row['queued_s'] * 1e6:9.1f} us {row['bytes_per_s'] / 1e9:7.0f} GB/s {row['share_of_copy']:6.2f}"
        text.append(f"  {launch:12} {time}  {error}{'  <- ships' if row['shipped'] else ''}")
    return "\n".join(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="only this one; may be given again")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--columns", type=int, action="append")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results, broken = [], False
    for dtype, columns in itertools.product(args.dtype or DTYPES, args.columns or COLUMNS):
        t = tile(args.rows, columns, DTYPES[dtype], device)
        for name in args.kernel or KERNELS:
            found = sweep(name, t, args.rounds)
            print(table(found), flush=True)
            broken |= not any(row.get("shipped") for row in found)
            results += found
            if args.json:
                args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())

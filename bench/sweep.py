"""Which launch of a Triton kernel is fastest: every configuration worth trying, beside the one that ships.

    python bench/sweep.py --json sweep.json               every kernel, at the sizes of real models (GPU)
    python bench/sweep.py --kernel head_fwd --shape Llama-3-8B --dtype bfloat16
    python bench/sweep.py --best sweep.json               what was fastest, as the lines that the tables hold
    TRITON_INTERPRET=1 python bench/sweep.py --rows 2 --shape small --columns 3001
                                                          the same path under the interpreter: answers, no times

This file runs the launches, times and ranks them; bench/swept_kernels.py says which kernels and launches those are.

An answer is checked before it is timed. Times are those on the GPU, from a cold cache; the rate is that of the bytes or
the products nobody can leave out, and beside it is its share of what a copy of those bytes, or torch.mm of those
products, reaches in the same rounds. Each launch compiles and answers once in a process of its own first, many at a
time: one that hangs or breaks the GPU's context takes no other along.

How a result becomes the default: the lines that --best prints go into LAUNCH or BACKWARD of
kernels/triton/row_logprobs.py and into HALF, CAPPED, PRODUCT, FLOAT or FLOAT_PRODUCT of
kernels/triton/linear_logprobs.py, by hand, because a tile of HALF serves forward and backward; TMA there loses a GPU on
which head_fwd beats head_fwd_tma. Then bench/compile_gate.py has to pass.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import geometric_mean

import shapes
import torch
import triton
from swept_kernels import KERNELS, products, tile
from torch import Tensor

from finealign_kernels.ops import _choose
from finealign_kernels.testing.measure import medians, queued

COLUMNS = (49152, 128256, 151936, 256000)  # SmolLM2, Llama 3, Qwen 2.5, Gemma 2
SHAPES = {shape.model: shape for size in ("small", "models") for shape in shapes.HEAD[size]}
MODELS = ("Llama-3-8B", "Gemma-2-2B", "SmolLM2-135M")  # a deep, a wide and a shallow head
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


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
AHEAD_SECONDS = 45  # a launch compiles in ten or less; one that hangs leaves time for the others
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
            done = subprocess.run(command, capture_output=True, text=True, timeout=AHEAD_SECONDS)
        except subprocess.TimeoutExpired:
            return f"more than {AHEAD_SECONDS} s to compile and answer"
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
        where = KERNELS[name].table
        if dtype == "float32" and KERNELS[name].unit[0] == "TFLOP/s":
            where = "FLOAT_PRODUCT" if where == "PRODUCT" else "FLOAT"
        text.append(f"\n{where}, by {name} in {dtype} at {sizes} sizes; {gpu}, Triton {version}")
        for launch in dict.fromkeys((*ranked[:most], *(one for one in ranked if one in shipped))):
            numbers = ", ".join(map(str, launch))
            line = f'(float("inf"), {numbers}),' if where in ("LAUNCH", "BACKWARD") else f'"{arch}": Config({numbers}),'
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

"""Race the implementations of an op: answers checked first, then all timed in turn, one round after another.

    python bench/run.py head --device cpu                 the default shapes
    python bench/run.py --full --json bench.json          every suite, the large shapes (12 GiB) and all cases too
    python bench/run.py head --case active20 --dtype float32 --rounds 7

Times are medians; the ratio beside them is the median over the rounds of time / ours in the same round. Extra memory
is measured in a fresh process for each implementation, over the same process before the call and less the tensors
returned. GEMMs are the matrix products that torch ran, in units of one product of the op's shape.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch loads: its profiler counts the products, silently

import torch
from cases import SUITES, Line, Sample, Suite, WrongAnswer, dtype_name, rms_error, truth
from rivals import Rival

from finealign_kernels.testing.measure import interleaved, medians, peak_extra_mib, ratio

PRODUCTS = {"aten::mm": 1, "aten::bmm": 1, "aten::addmm": 2, "aten::addmm_": 2}  # where the right factor stands


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.peak_of:
        (line,) = lines(args)
        print(json.dumps(peak_of(line, args.peak_of)))
        return 0
    rows = []
    print(machine(args.device))
    for line in lines(args):
        print(f"\n{line}", flush=True)
        try:
            raced = race(line, args.rounds or line.suite.rounds, memory=args.memory)
        except WrongAnswer as wrong:
            print(f"wrong answer, nothing timed: {wrong}", file=sys.stderr)
            return 1
        print(table(line.suite, *raced), flush=True)
        rows += raced[0]
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def race(line: Line, rounds: int, *, memory: bool = True) -> tuple[list[dict], dict[str, list[float]], dict[str, str]]:
    """The rows of one line, the times of each round, why the absent are absent. Raises WrongAnswer before it times."""
    able, absent = line.available()
    x = line.sample()
    checks = checked(line, able, x)
    calls = {rival.name: lambda call=rival.call: call(x) for rival in able}
    times = interleaved(calls, rounds, warmup=0, device=line.device)
    middle = medians(times)
    peaks = fresh_peaks(line, [rival.name for rival in able if not rival.floor]) if memory else {}
    rows = [
        {
            "suite": line.suite.name,
            "case": line.case,
            "impl": rival.name,
            "device": line.device.type,
            "dtype": dtype_name(line.dtype),
            "shape": list(line.shape[1:]),
            "pass": "forward+backward",
            "median_s": middle[rival.name],
            "ratio_to_ours": ratio(times, rival.name, "ours"),
            "peak_extra_mib": peaks.get(rival.name),
            **checks[rival.name],
            "versions": versions(line.device),
        }
        for rival in able
    ]
    return rows, times, absent


def checked(line: Line, able: list[Rival], x: Sample) -> dict[str, dict[str, float | None]]:
    """Error and matrix products of each rival, which has now run once. Raises WrongAnswer."""
    exact = truth(line, x)
    unit = line.suite.gemm_flops and line.suite.gemm_flops(line.shape)
    checks = {}
    for rival in able:
        answers, flops = counted(lambda call=rival.call: call(x))
        error = rms_error(line, rival, answers, exact)
        checks[rival.name] = {"rms_error": error, "gemm_count": round(flops / unit, 2) if unit and flops else None}
    return checks


def counted(call: Callable) -> tuple[dict, int]:
    """What call() returns, and the FLOPs of the matrix products that torch ran in it, also inside other ops."""
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        result = call()
    flops = 0
    for event in profile.function_events:
        if event.name in PRODUCTS:
            right = PRODUCTS[event.name]
            left = event.input_shapes[right - 1]
            flops += 2 * prod(left) * event.input_shapes[right][-1]
    return result, flops


def fresh_peaks(line: Line, names: list[str]) -> dict[str, float | None]:
    """Extra memory of each, two at a time: half of it is imports, which keep one core busy."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(partial(fresh_peak, line), names), strict=True))


def fresh_peak(line: Line, name: str) -> float | None:
    """peak_of in a process of its own."""
    size = next(size for size, shapes in line.suite.shapes.items() if line.shape in shapes)
    command = [sys.executable, __file__, line.suite.name, "--peak-of", name, "--size", size, "--shape", line.shape[0]]
    command += ["--case", line.case, "--dtype", dtype_name(line.dtype), "--device", str(line.device)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def peak_of(line: Line, name: str) -> float | None:
    """Extra memory of one call, in this process. A small call goes before it: imports and threads are not the op's."""
    (rival,) = (rival for rival in line.suite.rivals if rival.name == name)
    rival.call(line.small().sample())
    x = line.sample()
    return peak_extra_mib(lambda: rival.call(x), device=line.device)


def table(suite: Suite, rows: list[dict], times: dict[str, list[float]], absent: dict[str, str]) -> str:
    rounds = len(times["ours"])
    title = f"{rows[0]['pass']}, {rounds} round{'s' * (rounds > 1)}"
    text = [f"{title:26}{'median':>10}{'/ ours':>9}{'extra MiB':>11}{'GEMMs':>7}{'RMS error':>11}"]
    for row in rows:
        text.append(
            f"{row['impl']:26}{seconds(row['median_s']):>10}{row['ratio_to_ours']:9.2f}"
            f"{cell(row['peak_extra_mib'], '.1f'):>11}{cell(row['gemm_count'], '.2f'):>7}"
            f"{cell(row['rms_error'], '.1e'):>11}"
        )
    text += [f"{name:26}skipped: {reason}" for name, reason in absent.items()]
    pairs = [(name, to) for name, to in suite.compare if name in times and to in times]
    if pairs:
        text.append("also: " + ",  ".join(f"{name} / {to} {ratio(times, name, to):.2f}" for name, to in pairs))
    return "\n".join(text)


def seconds(value: float) -> str:
    for unit, scale in (("s", 1), ("ms", 1e3)):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def cell(value: float | None, form: str) -> str:
    text = "-" if value is None else format(value, form)
    return "0.0" if text == "-0.0" else text


def versions(device: torch.device) -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": machine(device)}
    for name in ("torch", "finealign-kernels", "trl", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def lines(args: argparse.Namespace) -> list[Line]:
    """Every race asked for: the cases of more_cases with --full, or when a case or dtype is named."""
    chosen = []
    for suite in (SUITES[name] for name in args.suites or SUITES):
        for shape in suite.shapes[args.size]:
            for dtype, case in cases_of(suite, args):
                if args.shape in (None, shape[0]):
                    chosen.append(Line(suite, shape, case, dtype, args.device))
    return chosen


def cases_of(suite: Suite, args: argparse.Namespace) -> list[tuple[torch.dtype, str]]:
    every = args.size == "full" or args.case or args.dtype
    return [
        (dtype, case)
        for dtype, case in suite.cases + (suite.more_cases if every else ())
        if args.case in (None, case) and args.dtype in (None, dtype_name(dtype))
    ]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", help=f"of {', '.join(SUITES)}; all of them when none is named")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--case", help="only this case")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="only this dtype")
    parser.add_argument("--shape", help="only the shape of this name")
    parser.add_argument("--rounds", type=int, help="rounds of timing; each suite has its own default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--size", choices=["small", "default", "full"], default="default", help="which shapes")
    parser.add_argument(
        "--full",
        dest="size",
        action="store_const",
        const="full",
        default=argparse.SUPPRESS,
        help="as --size full: the large shapes too, all cases",
    )
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out the fresh processes")
    parser.add_argument("--peak-of", metavar="IMPL", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    unknown = set(args.suites) - set(SUITES)
    if unknown:
        parser.error(f"suites must be among {', '.join(SUITES)}, got {', '.join(sorted(unknown))}")
    if not lines(args):
        parser.error(f"no race has case {args.case}, dtype {args.dtype} and shape {args.shape} (size {args.size})")
    return args


if __name__ == "__main__":
    sys.exit(main())

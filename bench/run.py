"""Race the implementations of an op: answers checked first, then all timed in turn, one round after another.

    python bench/run.py head --device cpu                 the default shapes
    python bench/run.py --full --json bench.json          every suite, the large shapes (12 GiB) and all cases too
    python bench/run.py head --case active20 --dtype float32 --rounds 7
    python bench/run.py head --rival gemm3 --rival trl    these and ours alone
    python bench/run.py tp                                the vocabulary-parallel head on gloo ranks (bench/tp.py)
    python bench/run.py step                              whole steps of TRL's DPO on a real model (bench/step.py)
    python bench/run.py head --device cuda --size models --dtype bfloat16 --case grpo30 --case grpo30-compact

Times are medians; the ratio beside them is the median over the rounds of time / ours in the same round. Calls of some
microseconds are repeated for 20 ms in each of their turns, whoever's they are. On a GPU
"queued" is the time there alone, from a cold cache, while the host runs ahead, and the rate is that of the work nobody
can leave out (cases.Sample) in that time. Extra memory is measured over the same process before the call and less the
tensors returned, on a CPU in a fresh process for each implementation. GEMMs are the matrix products that torch ran, in
units of one product of the op's shape.

With --json each row is written as soon as the answer of its rival is checked, with the time of one call and no ratio;
the rows of a finished race replace those of its line. `rounds` tells them apart: 1 before, then as many as were timed.

Whoever answers wrong is not timed, and the exit status is 1; where ours does, nobody is.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch loads: its profiler counts the products, silently

import history
import torch
import tp
from cases import SUITES, Line, Sample, Suite, WrongAnswer, dtype_name, errors, truth
from rivals import Rival

from finealign_kernels.testing.measure import interleaved, medians, peak_extra_mib, queued, ratio

SIZES = ("small", "default", "full", "models", "sweep", "models-sweep")
PRODUCTS = {"aten::mm": 1, "aten::bmm": 1, "aten::addmm": 2, "aten::addmm_": 2}  # where the right factor stands


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["tp"]:  # ranks are processes: no race of this file
        return tp.main(given[1:])
    if given[:1] == ["step"]:  # three trainers, whole steps
        import step

        return step.main(given[1:])
    args = arguments(argv)
    if args.list:
        print(*SUITES, sep="\n")
        return 0
    if args.peak_of:
        (line,) = lines(args)
        print(json.dumps(peak_of(line, args.peak_of)))
        return 0
    rows, status = [], 0

    def save(early: list[dict]) -> None:
        """The rows of finished races, and those that a race has until now."""
        if args.json:
            write(args.json, rows + early)

    print(machine(args.device))
    if leaves_out_bfloat16(args):
        print("no bfloat16 races: this CPU has no bfloat16 instructions, they take minutes. --dtype bfloat16 runs them")
    mark = marker(args)
    for number, line in enumerate(lines(args)):
        if number < args.start:
            continue
        print(f"\n{line}", flush=True)
        try:
            rounds = args.rounds or line.suite.rounds
            given = {"memory": args.memory, "save": args.json and save, "at_most": args.at_most}
            found, times, absent = race(line, rounds, **given, mark=partial(mark, number))
        except WrongAnswer as wrong:
            save([])
            print(f"wrong answer, nothing timed: {wrong}", file=sys.stderr)
            status = 1
            continue
        except torch.OutOfMemoryError as full:
            print(f"nothing timed: {line} needs more memory: {full}", file=sys.stderr)
            status = 1
            continue
        if found:
            print(table(line.suite, found, times, absent), flush=True)
        else:
            print(*(f"{name} skipped: {reason}" for name, reason in absent.items()), sep="\n", flush=True)
        for reason in filter(None, (absent.wrong(name) for name in absent)):
            print(reason, file=sys.stderr)
            status = 1
        rows += found
        save([])
    if args.marks:
        faulthandler.cancel_dump_traceback_later()
        args.marks.unlink(missing_ok=True)
    if args.history:
        history.add(history.HISTORY, history.races(rows, *history.commit_of("HEAD")))
    return status


def marker(args: argparse.Namespace) -> Callable[[int, str], None]:
    """mark(race, rival) says who has its turn, for bench/apart.py, and lets it have so many seconds: then the process
    ends with the place where it waits."""

    def mark(number: int, name: str) -> None:
        if args.marks:
            args.marks.write_text(json.dumps([number, name]))
        if args.hangs:
            faulthandler.dump_traceback_later(args.hangs, exit=True)

    return mark


def write(file: Path, rows: list[dict]) -> None:
    """The rows as JSON, whole at any time: a run may be cut off. Without rows there is no file."""
    if not rows:
        file.unlink(missing_ok=True)
        return
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(rows, indent=1) + "\n")
    part.replace(file)


class Absent(dict):
    """Why those who are not timed are not, by name."""

    def wrong(self, name: str) -> str | None:
        return str(self[name]) if isinstance(self[name], WrongAnswer) else None


def race(
    line: Line,
    rounds: int,
    *,
    memory: bool = True,
    save: Callable | None = None,
    at_most: float | None = None,
    mark: Callable[[str], None] = lambda name: None,
) -> tuple[list[dict], dict[str, list[float]], Absent]:
    """The rows of one line, the times of each round, why the absent are absent.

    save is called with the rows so far, once for each rival that has answered right. Raises before it times in rounds,
    where the answer of ours is wrong or does not come. With at_most the rounds are as many as fit in so many seconds,
    but at least one, by how long the checks took. mark(rival) is called before a rival has its first turn, and with ""
    before what is nobody's alone.
    """
    able, reasons = line.available()
    mark("")
    x = line.sample()
    early = []

    def answered(rival: Rival, check: dict) -> None:
        call = {rival.name: lambda: rival.call(x)}
        once = medians(interleaved(call, 1, warmup=0, device=line.device))[rival.name]
        on_device = medians(queued(call, 1, line.device)).get(rival.name)
        early.append(row_of(line, x, rival.name, once, None, on_device, None, check, 1))
        save(early)

    start = time.perf_counter()
    checks, absent = checked(line, able, x, answered if save else None, mark)
    absent.update(reasons)
    mark("")
    if not checks:
        return [], {}, absent
    if at_most is not None:
        rounds = min(rounds, max(1, int(at_most / (time.perf_counter() - start))))
    calls = {rival.name: lambda call=rival.call: call(x) for rival in able if rival.name in checks}
    times = interleaved(calls, rounds, warmup=0, least=line.suite.least, device=line.device)
    middle, on_device = medians(times), medians(queued(calls, rounds, line.device))
    peaks = peaks_of(line, calls) if memory else {}
    rows = [
        row_of(
            line,
            x,
            name,
            middle[name],
            ratio(times, name, "ours") if "ours" in times else None,
            on_device.get(name),
            peaks.get(name),
            checks[name],
            rounds,
        )
        for name in calls
    ]
    return rows, times, absent


def row_of(
    line: Line,
    x: Sample,
    name: str,
    seconds: float,
    to_ours: float | None,
    on_device: float | None,
    peak: float | None,
    check: dict,
    rounds: int,
) -> dict:
    """What is written of one rival."""
    return {
        "suite": line.suite.name,
        "case": line.case,
        "impl": name,
        "device": line.device.type,
        "dtype": dtype_name(line.dtype),
        "shape": list(line.shape[1:]),
        "pass": line.suite.passes,
        "median_s": seconds,
        "ratio_to_ours": to_ours,
        "queued_s": on_device,
        "useful_flops": getattr(x, "useful_flops", None),
        "useful_bytes": getattr(x, "useful_bytes", None),
        "peak_extra_mib": peak,
        **check,
        "rounds": rounds,
        "versions": versions(line.device),
    }


def checked(
    line: Line,
    able: list[Rival],
    x: Sample,
    answered: Callable | None = None,
    mark: Callable[[str], None] = lambda name: None,
) -> tuple[dict[str, dict[str, float | None]], Absent]:
    """Errors and matrix products of each rival, which has now run once; and why others have none.

    answered(rival, errors and products) is called after each that is right.

    Raises what ours raises, WrongAnswer where its answer is wrong. A rival may fail: then that is its reason, unless it
    took the GPU's context along.
    """
    if line.device.type == "cuda":
        torch.cuda.empty_cache()  # what the line before left in pieces
    exact = truth(line, x)
    unit = line.suite.gemm_flops and line.suite.gemm_flops(line.shape)
    checks, absent = {}, Absent()
    for rival in able:
        mark(rival.name)
        try:
            answers, flops = counted(lambda call=rival.call: call(x))
            error = errors(line, rival, answers, exact)
        except Exception as problem:
            if rival.name.startswith("ours") or broken(line.device):
                raise
            wrong = isinstance(problem, WrongAnswer)
            absent[rival.name] = problem if wrong else " ".join(f"{type(problem).__name__}: {problem}".split())[:200]
            continue
        checks[rival.name] = {**error, "gemm_count": round(flops / unit, 2) if unit and flops else None}
        if answered:
            answered(rival, checks[rival.name])
    return checks, absent


def broken(device: torch.device) -> bool:
    """Whether the GPU's context is gone: after an illegal access every call in this process fails."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


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


def peaks_of(line: Line, calls: dict[str, Callable]) -> dict[str, float | None]:
    """Extra memory of each but the floors. On a CPU two processes at a time: half of it is imports, on one core."""
    floors = {rival.name for rival in line.suite.rivals if rival.floor}
    names = [name for name in calls if name not in floors]
    if line.device.type != "cpu":  # the allocator counts, so that no process is needed
        return {name: peak_extra_mib(calls[name], device=line.device) for name in names}
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(partial(fresh_peak, line), names), strict=True))


def fresh_peak(line: Line, name: str) -> float | None:
    """peak_of in a process of its own."""
    size = next(size for size in SIZES if line.shape in line.suite.shapes_of(size))
    command = [sys.executable, __file__, line.suite.name, "--peak-of", name, "--size", size, "--shape", line.shape[0]]
    command += ["--case", line.case, "--dtype", dtype_name(line.dtype), "--device", str(line.device)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def peak_of(line: Line, name: str) -> float | None:
    """Extra memory of one call, in this process. A small call goes before it: imports and threads are not the op's."""
    (rival,) = (rival for rival in line.suite.rivals if rival.name == name)
    rival.call(line.small().sample())
    x = line.sample()
    return peak_extra_mib(lambda: rival.call(x), device=line.device)


def table(suite: Suite, rows: list[dict], times: dict[str, list[float]], absent: Absent) -> str:
    rounds, on_gpu = rows[0]["rounds"], rows[0]["queued_s"] is not None
    title = f"{rows[0]['pass']}, {rounds} round{'s' * (rounds > 1)}"
    text = [f"{title:26}{'median':>10}{'/ ours':>9}{'extra MiB':>11}{'GEMMs':>7}{'RMS error':>11}{'gradients':>11}"]
    text[0] += f"{'queued':>10}{'rate':>14}" if on_gpu else ""
    for row in rows:
        text.append(
            f"{row['impl']:26}{seconds(row['median_s']):>10}{cell(row['ratio_to_ours'], '.2f'):>9}"
            f"{cell(row['peak_extra_mib'], '.1f'):>11}{cell(row['gemm_count'], '.2f'):>7}"
            f"{cell(row['rms_error'], '.1e'):>11}{cell(row['gradient_error'], '.1e'):>11}"
        )
        text[-1] += f"{seconds(row['queued_s']):>10}{rate(row):>14}" if on_gpu else ""
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


def rate(row: dict) -> str:
    """Useful work in the time on the GPU."""
    if row["useful_flops"]:
        return f"{row['useful_flops'] / row['queued_s'] / 1e12:.1f} TFLOP/s"
    return f"{row['useful_bytes'] / row['queued_s'] / 1e9:.0f} GB/s" if row["useful_bytes"] else "-"


def cell(value: float | None, form: str) -> str:
    text = "-" if value is None else format(value, form)
    return "0.0" if text == "-0.0" else text


def versions(device: torch.device) -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": machine(device)}
    for name in ("torch", "finealign-kernels", "trl", "liger-kernel", "cut-cross-entropy", "triton"):
        try:
            found[name] = torch.__version__ if name == "torch" else version(name)  # +cu130 stands in the first alone
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
        named = (*args.rival, "ours") if args.rival else [rival.name for rival in suite.rivals]
        raced = tuple(rival for rival in suite.rivals if rival.name in named and rival.name not in args.without)
        suite = dataclasses.replace(suite, rivals=raced)
        for shape in suite.shapes_of(args.size):
            for dtype, case in cases_of(suite, args):
                if suite.fits(shape, case) and (not args.shape or shape[0] in args.shape):
                    chosen.append(Line(suite, shape, case, dtype, args.device))
    return chosen


def cases_of(suite: Suite, args: argparse.Namespace) -> list[tuple[torch.dtype, str]]:
    every = args.size == "full" or args.case or args.dtype
    slow = torch.bfloat16 if leaves_out_bfloat16(args) else None
    return [
        (dtype, case)
        for dtype, case in suite.cases + (suite.more_cases if every else ())
        if (not args.case or case in args.case) and args.dtype in (None, dtype_name(dtype)) and dtype != slow
    ]


def leaves_out_bfloat16(args: argparse.Namespace) -> bool:
    """Whether the default races are those of float32 alone, because a CPU emulates bfloat16 products."""
    asked = args.dtype or args.case or args.size != "default"
    return not asked and args.device.type == "cpu" and not has_bfloat16()


def has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU has instructions for bfloat16 products; True where that cannot be found out."""
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.M)
    return flags is None or bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags[1].split()))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", help=f"of {', '.join(SUITES)}; all of them when none is named")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--case", action="append", help="only this case; may be given again for another")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="only this dtype")
    parser.add_argument("--shape", action="append", help="only the shape of this name; may be given again")
    parser.add_argument("--rival", action="append", metavar="NAME", help="only this one and ours; may be given again")
    parser.add_argument("--rounds", type=int, help="rounds of timing; each suite has its own default")
    parser.add_argument("--at-most", type=float, metavar="SECONDS", help="fewer rounds where a race would take longer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--history", action="store_true", help="add the ratios to bench/results/history.jsonl")
    parser.add_argument("--size", choices=SIZES, default="default", help="which shapes")
    parser.add_argument(
        "--full",
        dest="size",
        action="store_const",
        const="full",
        default=argparse.SUPPRESS,
        help="as --size full: the large shapes too, all cases",
    )
    parser.add_argument("--list", action="store_true", help="only the names of the suites")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out the fresh processes")
    parser.add_argument(
        "--without", action="append", default=[], metavar="NAME", help="not this one; may be given again"
    )
    parser.add_argument("--peak-of", metavar="IMPL", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)  # these three: bench/apart.py
    parser.add_argument("--marks", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--hangs", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    unknown = set(args.suites) - set(SUITES)
    if unknown:
        parser.error(f"suites must be among {', '.join(SUITES)}, got {', '.join(sorted(unknown))}")
    known = {rival.name for name in args.suites or SUITES for rival in SUITES[name].rivals}
    for option, named in (("--rival", args.rival or ()), ("--without", args.without)):
        if strangers := ", ".join(sorted(set(named) - known)):
            parser.error(f"{option} must be among {', '.join(sorted(known))}, got {strangers}")
    if "ours" in args.without:
        parser.error("--without must leave ours, which all are compared with, got ours")
    if not lines(args):
        named = [" or ".join(names or ["any"]) for names in (args.case, args.shape)]
        parser.error(f"no race has case {named[0]}, dtype {args.dtype} and shape {named[1]} (size {args.size})")
    return args


if __name__ == "__main__":
    sys.exit(main())

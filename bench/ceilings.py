"""What the GPU reaches at best, and where one call spends its time: python bench/ceilings.py [--profile] --json FILE

Ceilings are a copy and the matrix products that the head is made of: of a chunk of the vocabulary and of the whole one,
bfloat16 into bfloat16, into float32, and added to float32. --profile lists the kernels of one call of each
rival instead. On a CPU the shapes are small.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import rivals
import shapes
import torch
from cases import SUITES, Line

from finealign_kernels.testing.measure import interleaved, medians, queued


def ceilings(device: torch.device) -> Iterator[tuple[str, list[int], float, Callable]]:
    """Name, shape, work (FLOPs, or bytes read and written) and the call."""
    there = device.type == "cuda"
    size = 2**30 if there else 2**20
    source, target = (torch.ones(size, dtype=torch.bfloat16, device=device) for _ in range(2))
    yield "copy", [size], 4 * size, lambda: target.copy_(source)
    for n, d, v in ((4096, 4096, 16384), (8192, 4096, 128256)) if there else ((64, 64, 256),):
        x, w = (torch.randn(k, d, device=device, dtype=torch.bfloat16) for k in (n, v))
        total, flops = torch.zeros(n, v, device=device), 2 * n * d * v
        yield "mm bf16", [n, d, v], flops, lambda x=x, w=w: torch.mm(x, w.t())
        yield "mm float32", [n, d, v], flops, lambda x=x, w=w: torch.mm(x, w.t(), out_dtype=torch.float32)
        add = lambda x=x, w=w, t=total: torch.addmm(t, x, w.t(), out_dtype=torch.float32, out=t)  # noqa: E731
        yield "addmm float32", [n, d, v], flops, add


def measured(device: torch.device) -> Iterator[dict]:
    for name, shape, work, call in ceilings(device):
        row = {"ceiling": name, "shape": shape, "device": device.type}
        try:
            call()
            times = medians(queued({name: call}, 9, device) or interleaved({name: call}, 3))
            yield {**row, "median_s": times[name], "rate": work / times[name]}
        except (RuntimeError, NotImplementedError) as problem:  # torch has no such product on this device
            yield {**row, "failed": str(problem).splitlines()[0][:200]}


def profiled(device: torch.device, names: list[str], most: int = 25) -> Iterator[dict]:
    there = device.type == "cuda"
    shape = next(s for s in shapes.HEAD["models" if there else "small"] if s.model in ("Llama-3-8B", "small"))
    x = Line(SUITES["head"], shape, "dense", torch.bfloat16, device).sample()
    for rival in (rival for rival in rivals.HEAD if rival.name in names):
        try:
            if reason := rival.needs(torch.bfloat16, device):
                raise RuntimeError(reason)
            rival.call(x)
            with torch.profiler.profile() as profile:
                rival.call(x)
                if there:
                    torch.cuda.synchronize()
        except Exception as problem:  # of another library: the others are listed all the same
            yield {"profile": rival.name, "failed": str(problem)[:200]}
            continue
        time = "self_device_time_total" if there else "self_cpu_time_total"
        events = sorted(profile.key_averages(), key=lambda event: -getattr(event, time))
        for event in [event for event in events if getattr(event, time) > 0][:most]:
            spent = getattr(event, time) / 1e6
            yield {"profile": rival.name, "kernel": event.key[:120], "calls": event.count, "seconds": spent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--profile", nargs="*", metavar="RIVAL")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    found = []
    for row in measured(args.device) if args.profile is None else profiled(args.device, args.profile):
        found.append(row)
        print(*row.values(), sep="  ", flush=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Time and memory of callables, side by side. What tests, benches and `finealign demo` report comes from here."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch

MIB = 2**20


def interleaved(
    calls: dict[str, Callable],
    rounds: int,
    *,
    warmup: int = 1,
    least: float = 0.0,
    device: str | torch.device = "cpu",
) -> dict[str, list[float]]:
    """Seconds of each call in each round, {name: [one per round]}.

    In a round every call has its turn, and the first of a round is the second of the one before, so that a slow minute
    of the machine or a cache that a neighbour left warm falls on all alike. `warmup` rounds run first, untimed. A turn
    is one call; of a call that took less than `least` seconds in one more untimed round, the mean of as many as fill
    them. What a call returns is freed after its clock has stopped, or before the next of its turn.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    names, synchronize = list(calls), _synchronize(device)
    for name in names * warmup:
        calls[name]()

    def turn(name: str, count: int) -> float:
        result = None
        synchronize()
        start = time.perf_counter()
        for _ in range(count):
            result = None
            result = calls[name]()
        synchronize()
        seconds = (time.perf_counter() - start) / count
        del result
        return seconds

    counts = dict.fromkeys(names, 1)
    if least:
        counts = {name: max(1, round(least / turn(name, 1))) for name in names}
    times = {name: [] for name in names}
    for name in _turns(names, rounds):
        times[name].append(turn(name, counts[name]))
    return times


def queued(calls: dict[str, Callable], rounds: int, device: str | torch.device) -> dict[str, list[float]]:
    """Seconds that a GPU spends on each call in each round, as `interleaved` times them; empty on a CPU.

    Before each call the GPU overwrites its caches, which takes it half a millisecond: while it does, the host queues
    the call. What the host then adds is what it needs longer, and where the call itself waits for the GPU.
    """
    if torch.device(device).type != "cuda":
        return {}
    times = {name: [] for name in calls}
    with torch.cuda.device(device):
        cache = torch.empty(256 * MIB, dtype=torch.int8, device=device)
        for name in _turns(list(calls), rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(8):
                cache.zero_()
            start.record()
            result = calls[name]()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / 1e3)
            del result
    return times


def _turns(names: list[str], rounds: int) -> Iterator[str]:
    """All names in every round, which starts with the second of the round before."""
    for number in range(rounds):
        shift = number % len(names)
        yield from names[shift:] + names[:shift]


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """Median seconds of each call."""
    return {name: median(each) for name, each in times.items()}


def ratio(times: dict[str, list[float]], name: str, to: str) -> float:
    """Median over the rounds of t_name / t_to in the same round: what is slow about a round cancels."""
    return median(one / other for one, other in zip(times[name], times[to], strict=True))


def peak_extra_mib(fn: Callable, *, device: str | torch.device = "cpu") -> float | None:
    """Peak memory in MiB while fn() runs, over what was held before it and less the tensors it returns (and so made).

    CPU    peak resident set, which Linux can set back; None on other systems. A first call also counts the code and the
           thread pools that it touches: call fn once on something small before.
    CUDA   the caching allocator's peak.
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = fn()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    elif _reset_peak_resident():
        before = _status_bytes("VmRSS")
        result = fn()
        peak = _status_bytes("VmHWM")
    else:
        return None
    return (peak - before - _held_bytes(result)) / MIB


def _held_bytes(result) -> int:
    """Bytes of the storages behind the tensors in result, each once."""
    storages = {}
    todo = [result]
    while todo:
        one = todo.pop()
        if isinstance(one, torch.Tensor):
            storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, dict):
            todo += one.values()
        elif isinstance(one, (tuple, list)):
            todo += one
    return sum(storages.values())


def _synchronize(device: str | torch.device) -> Callable[[], None]:
    device = torch.device(device)
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


def _reset_peak_resident() -> bool:
    """Set VmHWM back to VmRSS; False where the system has no such thing or does not allow it."""
    if not sys.platform.startswith("linux"):
        return False
    _trim_heap()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    # some sandboxes take the write and ignore it
    return _status_bytes("VmHWM") - _status_bytes("VmRSS") < MIB


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(f"/proc/self/status has no {field}")


def _trim_heap() -> None:
    """Give freed heap back to the system: memory kept for reuse would hide what the next call takes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc; other C libraries have none
    if trim is not None:
        trim(0)

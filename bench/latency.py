"""What the waits for memory of the (N,)-sized CUDA ops add up to, by arithmetic: python bench/latency.py [RESULTS]

These ops move so few bytes that a GPU waits for loads, not for bandwidth. A kernel takes

    waves · (first + rounds · each) · 0.6 µs,  waves = ⌈blocks / (132 · blocks a multiprocessor)⌉,

`first` and `each` being loads that wait for one another before its rounds and in one of them (kernels/cuda), and an
op takes the sum of its kernels with 2 µs for each launch, but never less than its bytes at 3 TB/s. It is a model of an
H100, not a measurement. With RESULTS, the JSON of bench/gpu_session.sh, what was measured stands beside it.
"""

from __future__ import annotations

import argparse
import json
from math import ceil
from pathlib import Path
from typing import NamedTuple

LOAD, LAUNCH, MULTIPROCESSORS, BANDWIDTH = 0.6e-6, 2e-6, 132, 3e12
# of csrc/launch.h and kernels/cuda
CHUNK, PIECE, SPREAD, FEW, THREADS, WARPS, LANES, AHEAD = 1024, 4096, 4096, 256, 256, 8, 32, 8


class Kernel(NamedTuple):
    blocks: int
    per_sm: int  # blocks of a multiprocessor, by its launch bounds
    first: int
    each: int = 1
    rounds: int = 1

    def seconds(self) -> float:
        waves = ceil(self.blocks / (MULTIPROCESSORS * self.per_sm))
        return LAUNCH + waves * (self.first + self.rounds * self.each) * LOAD


def slots(count: int, length: int, size: int) -> int:
    """csrc/launch.h, of a padded batch."""
    return count * length // size + count if count <= FEW and length > size else 0


def gae(count: int, length: int) -> list[Kernel]:
    """Bounds, then rates; a round of 1024 tokens is read while the one before it is scanned."""
    pieces = slots(count, length, PIECE)
    if not pieces:
        return [Kernel(count, 2, 2, 1, ceil(length / (THREADS * 4)))]
    rounds, enter = PIECE // (THREADS * 4), ceil(ceil(length / PIECE) / LANES)
    return [
        Kernel(pieces, 2, 4, 1, rounds),
        Kernel(ceil(count / WARPS), 8, 2, 1, enter),
        Kernel(pieces, 2, 4, 1, rounds),
    ]


CHUNK_ROUNDS = CHUNK // (LANES * AHEAD)


def sums(count: int, length: int) -> list[Kernel]:
    """Of chunks by warps, eight tokens of a lane at a time; those of long rows apart, then a block adds them."""
    parts = slots(count, length, CHUNK)
    if not parts:
        return [Kernel(count, 2, 1, 1, ceil(length / (WARPS * CHUNK)) * CHUNK_ROUNDS)]
    return [Kernel(ceil(parts / WARPS), 2, 3, 1, CHUNK_ROUNDS), Kernel(count, 2, 2, 1, ceil(length / CHUNK / THREADS))]


def policy(count: int, length: int) -> list[Kernel]:
    """Averaged by response: rows; totals; terms of 256 tokens of a chunk, once their row is found; results."""
    chunks = ceil(count * length / CHUNK)
    totals = Kernel(1, 4, 1, 1, ceil(chunks / (LANES * AHEAD)))
    tokens = Kernel(chunks, 2, 1, 2, CHUNK // THREADS)
    return [*sums(count, length), Kernel(ceil(chunks / WARPS), 4, 1), totals, tokens, totals, Kernel(chunks * 4, 4, 2)]


def sequence(count: int, length: int) -> list[Kernel]:
    """Forward: sums. Backward: slope and divisor of the sequence, then its tokens, eight of a thread at a time."""
    pieces = slots(count, length, SPREAD)
    tokens = SPREAD if pieces else length
    return [*sums(count, length), Kernel(pieces or count, 4, 4 if pieces else 2, 1, ceil(tokens / (THREADS * AHEAD)))]


def segment(count: int, length: int) -> list[Kernel]:
    """segment_mean with a mask. Backward counts what the mask keeps again; a piece adds the counts of its segment."""
    pieces, parts = slots(count, length, SPREAD), ceil(length / CHUNK / THREADS)
    again, tokens = sums(count, length), ceil((SPREAD if pieces else length) / (THREADS * AHEAD))
    if not pieces:  # a block counts its segment and writes it
        return [*again, again[-1]._replace(rounds=again[-1].rounds + tokens)]
    return [*again, again[0], Kernel(pieces, 4, 5 + parts, 1, tokens)]


OPS = {  # bytes read and written a token
    "gae": (gae, 17),
    "policy_loss": (policy, 40),
    "sequence_loss": (sequence, 17),
    "segment_mean": (segment, 11),
}
SHAPES = {"gae": ((1024, 4096), (32, 32768), (1, 1 << 20))}
SHAPES |= dict.fromkeys(("policy_loss", "sequence_loss", "segment_mean"), ((64, 512), (32, 32768), (1, 1 << 20)))
RACES = {
    "gae": ("rl", "gae-large"),
    "policy_loss": ("policy", "sequence"),
    "sequence_loss": ("sequence", "mean"),
    "segment_mean": ("segments", "mean"),
}


def seconds(op: str, count: int, length: int) -> float:
    kernels, width = OPS[op]
    return max(sum(kernel.seconds() for kernel in kernels(count, length)), width * count * length / BANDWIDTH)


def measured(rows: list[dict], op: str, shape: tuple[int, int]) -> float | None:
    tokens = [shape[0], shape[0] * shape[1]]
    for row in rows:
        if (row.get("suite"), row.get("case")) == RACES[op] and row["impl"] == "ours" and row["shape"] == tokens:
            return row["queued_s"]
    return None


def table(rows: list[dict]) -> str:
    lines = ["| | tokens | launches | model, µs | measured, µs |", "|---|---|---|---|---|"]
    for op, shapes in SHAPES.items():
        for shape in shapes:
            found = measured(rows, op, shape)
            told = "not yet run on a GPU" if found is None else f"{found * 1e6:.0f}"
            launches = len(OPS[op][0](*shape))
            line = f"| `{op}` | {shape[0]} × {shape[1]} | {launches} | {seconds(op, *shape) * 1e6:.0f} | {told} |"
            lines.append(line)
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?")
    args = parser.parse_args(argv)
    print(table(json.loads(args.results.read_text()) if args.results else []), end="")


if __name__ == "__main__":
    main()

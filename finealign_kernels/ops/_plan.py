"""Bytes that a vocabulary-parallel head sends and holds on a rank, by the formulas that its code follows."""

from typing import NamedTuple

import torch

from . import _chunked, _parallel

WIDE = 4  # bytes of a float32: states, sums and dX
EXTRA = {"entropy": 0, "log_sum_sq_probs": 1, "mean_logits": 2, "is_top1": 1}  # numbers a row beside the four


class Plan(NamedTuple):
    """Of one forward and backward on one rank; bytes."""

    forward: list[tuple[str, int]]  # collectives: name, what this rank hands in
    backward: list[tuple[str, int]]
    wire: int  # sent by this rank where collectives are rings
    weight: int  # this rank's part of the head; its gradient is as large
    workspace: int  # E, kept between forward and backward
    buffers: int  # of tiles, states and float32 sums
    logits: int  # what is not kept: this rank's logits, once, in float32

    @property
    def memory(self) -> int:
        """Weight, gradient, workspace and buffers."""
        return 2 * self.weight + self.workspace + self.buffers


def plan(
    rows: int,
    depth: int,
    vocab: int,
    ranks: int,
    *,
    hidden_grad: str = "all_reduce",
    dtype: torch.dtype = torch.bfloat16,
    outputs: tuple[str, ...] = ("entropy",),
    device: str = "cuda",
) -> Plan:
    """A head (vocab, depth) over `ranks`, with workspace="auto", rows of the whole group and all read."""
    columns, item = -(-vocab // ranks), dtype.itemsize
    gather = [("allgather", rows // ranks * depth * item)] if hidden_grad == "reduce_scatter" else []
    numbers = _parallel.WIRE + sum(EXTRA[name] for name in outputs)
    forward = [*gather, ("allgather", rows * numbers * WIDE)]
    summed = {"none": [], "all_reduce": [("allreduce", rows * depth * WIDE)]}
    backward = summed.get(hidden_grad, [*gather, ("reduce_scatter", rows * depth * WIDE)])
    weight, tile = columns * depth * item, _chunked.tile_of(device)
    kept = _chunked.kept_rows(rows, columns, dtype, weight)
    chunks, width = -(-columns // tile.columns), min(columns, tile.columns)
    widened = device == "cpu" and item == 2  # a CPU multiplies halves in float32
    dz = min(rows, tile.gradient_rows(dtype)) * width * (WIDE if widened else item)
    copies = (rows + width) * depth * WIDE if widened else 0  # of hidden and of a tile of the weight
    z = min(rows, tile.rows) * width * WIDE
    states = rows * chunks * (6 * WIDE + 8)
    gathered = rows * depth * item if gather else 0
    return Plan(
        forward,
        backward,
        sum(sent(*call, ranks) for call in forward + backward),
        weight,
        kept * columns * item,
        dz + z + states + rows * depth * WIDE + width * depth * WIDE + gathered + copies,
        rows * columns * WIDE,
    )


def sent(name: str, given: int, ranks: int) -> int:
    """Bytes that a rank sends in a ring, of what it hands in."""
    steps = {"allgather": ranks - 1, "reduce_scatter": (ranks - 1) / ranks, "allreduce": 2 * (ranks - 1) / ranks}
    return round(given * steps[name])


HEADS = {"8B": (4096, 128256), "70B": (8192, 128256), "405B": (16384, 128256)}  # depth and vocabulary of Llama 3.1
ROWS = 8192  # of one tensor-parallel group in one call
TFLOPS, GBPS = 700, 450  # assumed: products of an H100 in bfloat16, one direction of its NVLink


def table() -> list[str]:
    """Rows of the table of docs/guides/many-gpus.md."""
    gib, mib, lines = 2**30, 2**20, []
    for name, (depth, vocab) in HEADS.items():
        for ranks in (1, 2, 4, 8, 16):
            found = plan(ROWS, depth, vocab, ranks, hidden_grad="reduce_scatter" if ranks > 1 else "none")
            products = 4 * 2 * ROWS * depth * -(-vocab // ranks) / (TFLOPS * 1e12)
            wire = found.wire / (GBPS * 1e9)
            bound = products / (products + wire)
            lines.append(
                f"| {name} | {ranks} | {found.weight / gib:.2f} | {found.memory / gib:.2f} | {found.logits / gib:.2f} "
                f"| {found.wire / mib:.0f} | {products * 1e3:.1f} | {wire * 1e3:.2f} | {bound:.0%} |"
            )
    return lines


def step_table() -> list[str]:
    """GiB that a rank sends for the gradient of a head over data-parallel ranks, by number of GPUs."""
    gib, lines = 2**30, []
    for gpus in (8, 64, 256, 1024):
        cells = []
        for depth, vocab in HEADS.values():
            for ranks in (1, 8):
                groups = gpus // ranks
                weight = plan(ROWS, depth, vocab, ranks).weight
                cells.append(f"{sent('allreduce', weight, groups) / gib:.2f}")
        lines.append(f"| {gpus} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print("\n".join([*table(), "", *step_table()]))

"""The vocabulary-parallel head on gloo ranks of this machine: python bench/run.py tp [--rows 2048] [--json FILE]

Time of a forward and backward and extra memory of a rank, with the gradients of hidden states and of this rank's slice
of the head. All run in the same processes, in turn; answers are compared first. On a GPU: not yet run.

    materialised  logits that are kept: the products, then Megatron's three all-reduces (maximum, sum, label's logit)
                  and a fourth for the entropy, in torch, each rank with its columns
    verl, trl     the torch head of verl and TRL's, which know no slices: the head is gathered, a rank takes its share
                  of the rows, and gradients are summed over ranks. TRL's entropy has no gradient: none is asked of it
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import rivals
import torch
import torch.distributed as dist
import torch.multiprocessing

import finealign_kernels as fk
from finealign_kernels.testing.measure import interleaved, medians, peak_extra_mib, ratio


class SumForward(torch.autograd.Function):
    """Sum over ranks; every rank has the whole upstream gradient."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, upstream):
        return upstream, None


class SumBackward(torch.autograd.Function):
    """hidden as it is; its gradient is the sum of the ranks'."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, upstream):
        upstream = upstream.contiguous().clone()
        dist.all_reduce(upstream, group=ctx.group)
        return upstream, None


def materialised(hidden, weight, labels, start, group):
    z = SumBackward.apply(hidden, group) @ weight.t()
    z = z.float()
    top = z.detach().amax(-1)
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    z = z - top[:, None]
    e = z.exp()
    total = SumForward.apply(e.sum(-1), group)
    weighted = SumForward.apply((e * z).sum(-1), group)
    here = (labels >= start) & (labels < start + weight.shape[0])
    picked = z.gather(1, torch.where(here, labels - start, 0)[:, None])[:, 0]
    label = SumForward.apply(torch.where(here, picked, 0), group)
    return label - total.log(), total.log() - weighted / total


class GatheredHead(torch.autograd.Function):
    """The ranks' slices one under the other; the gradient of a slice is the sum of the ranks'."""

    @staticmethod
    def forward(ctx, weight, start, group):
        ctx.start, ctx.columns, ctx.group = start, len(weight), group
        sizes = [torch.empty((), dtype=torch.long) for _ in range(dist.get_world_size(group))]
        dist.all_gather(sizes, torch.tensor(len(weight)), group=group)
        whole = weight.new_zeros(int(sum(sizes)), weight.shape[1])
        whole[start : start + len(weight)] = weight
        for rank, (slice_of, size) in enumerate(zip(whole.split([int(n) for n in sizes]), sizes, strict=True)):
            if size:
                dist.broadcast(slice_of, group_src=rank, group=group)
        return whole

    @staticmethod
    def backward(ctx, upstream):
        upstream = upstream.contiguous()
        dist.all_reduce(upstream, group=ctx.group)
        return upstream[ctx.start : ctx.start + ctx.columns].clone(), None, None


class AllRows(torch.autograd.Function):
    """Each rank's rows one under the other; a rank's gradient is that of its own."""

    @staticmethod
    def forward(ctx, x, rows, group):
        ctx.own = rows
        whole = x.new_zeros(rows.stop_of_all, *x.shape[1:])
        whole[rows.start : rows.stop] = x
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx, upstream):
        return upstream[ctx.own.start : ctx.own.stop], None, None


class Rows(NamedTuple):
    start: int
    stop: int
    stop_of_all: int


def gathered(kernel):
    """A head that knows no slices: kernel(hidden, weight, labels) -> log-probs, entropy, over a share of the rows."""

    def head(hidden, weight, labels, start, group):
        rank, ranks, count = dist.get_rank(group), dist.get_world_size(group), len(labels)
        own = Rows(rank * count // ranks, (rank + 1) * count // ranks, count)
        whole = GatheredHead.apply(weight, start, group)
        some = SumBackward.apply(hidden, group)[own.start : own.stop]
        found = kernel(some, whole, labels[own.start : own.stop])
        return tuple(AllRows.apply(x.float(), own, group) for x in found)

    return head


def verl(hidden, weight, labels):
    return rivals.oracle("verl_step").head.FusedLinearForPPOFunction.apply(hidden, weight, labels, 1.0, 512)


def trl(hidden, weight, labels):
    return rivals.trl_logprobs(hidden, weight, labels, ("entropy",))[:2]


def ours(hidden, weight, labels, start, group):
    out = fk.linear_logprobs(
        hidden, weight, labels, outputs=("entropy",), group=group, vocab_start=start, hidden_grad="all_reduce"
    )
    return out.logp, out.entropy


HEADS = {"ours": ours, "materialised": materialised, "verl": gathered(verl), "trl": gathered(trl)}
NEEDS = {"verl": rivals.loads("verl_step"), "trl": rivals.package("trl", "1.16")}
LOGGED = ("trl",)  # whose entropy has no gradient


def step(name, hidden, weight, *rest, entropy_weight=0.3):
    logp, entropy = HEADS[name](hidden, weight, *rest)
    total = logp.sum()
    if name not in LOGGED and entropy_weight:
        total = total + entropy_weight * entropy.sum()
    total.backward()
    found = logp.detach(), entropy.detach(), hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    return found


def work(rank: int, args: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=args.ranks)
    rng = torch.Generator().manual_seed(0)
    dtype = getattr(torch, args.dtype)
    hidden = torch.randn(args.rows, args.depth, generator=rng).to(dtype).requires_grad_()
    labels = torch.randint(args.vocab, (args.rows,), generator=rng)
    start = rank * -(-args.vocab // args.ranks)
    columns = min(-(-args.vocab // args.ranks), args.vocab - start)
    weight = torch.randn(columns, args.depth, generator=rng.manual_seed(1 + rank)) / args.depth**0.5
    given = hidden, weight.to(dtype).requires_grad_(), labels, start, dist.group.WORLD
    heads = [name for name in HEADS if name not in NEEDS or NEEDS[name](args.dtype, "cpu") is None]
    bound = 1e-4 if args.dtype == "float32" else 3e-2
    expected = {weight: step("ours", *given, entropy_weight=weight) for weight in (0.0, 0.3)}
    differences = {}
    for name in heads[1:]:
        right = expected[0.0 if name in LOGGED else 0.3]
        answers = zip(step(name, *given), right, strict=True)
        differences[name] = max(((a - b).float().norm() / b.float().norm()).item() for a, b in answers)
        if not differences[name] <= bound:
            raise RuntimeError(f"answers of {name} differ by {differences[name]:.1e}, bound {bound}: nothing timed")
    del expected, right
    peaks = {name: peak_extra_mib(lambda name=name: step(name, *given)) for name in heads}
    times = interleaved({name: lambda name=name: step(name, *given) for name in heads}, args.rounds)
    row = {
        "suite": "tp",
        "device": "cpu, gloo",
        **{name: getattr(args, name) for name in ("ranks", "rows", "depth", "vocab", "dtype", "rounds")},
        "seconds": medians(times),
        "peak_mib": peaks,
        "time_ratio": {name: ratio(times, name, "ours") for name in heads[1:]},
        "memory_ratio": {name: None if None in peaks.values() else peaks[name] / peaks["ours"] for name in heads[1:]},
        "difference": differences,
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(row))
    dist.destroy_process_group()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("ranks", 2), ("rows", 1024), ("depth", 256), ("vocab", 49152), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (args, folder), nprocs=args.ranks)
        rows = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(args.ranks)]
    for rank, row in enumerate(rows):
        shown = (f"{name} {time:.3f} s, {_mib(row['peak_mib'][name])}" for name, time in row["seconds"].items())
        print(f"rank {rank}: " + ", ".join(shown))
    for name in HEADS:
        if name in rows[0]["time_ratio"]:
            times = " ".join(f"{row['time_ratio'][name]:.2f}" for row in rows)
            memory = " ".join(
                "-" if row["memory_ratio"][name] is None else f"{row['memory_ratio'][name]:.2f}" for row in rows
            )
            print(f"{name} / ours, a rank: time {times}, extra memory {memory}")
        elif name in NEEDS:
            print(f"{name} skipped: {NEEDS[name](args.dtype, 'cpu')}")
    print("GPU: not yet run")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def _mib(peak: float | None) -> str:
    return "memory not measured" if peak is None else f"{peak:.0f} MiB"

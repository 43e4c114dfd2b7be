"""The vocabulary-parallel head on gloo ranks of this machine: python bench/run.py tp [--rows 2048] [--json FILE]

Time of a forward and backward and extra memory of a rank, against logits that are kept: the products, then Megatron's
three all-reduces (maximum, sum, label's logit) and a fourth for the entropy, in torch, each rank with its columns.
Answers are compared first. Both run in the same processes, in turn. On a GPU: not yet run.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

import finealign_kernels as fk
from finealign_kernels.testing.measure import interleaved, medians, peak_extra_mib, ratio

PARTS = (("logp", 1.0), ("entropy", 0.3))  # and their upstream gradients


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


def ours(hidden, weight, labels, start, group):
    out = fk.linear_logprobs(
        hidden, weight, labels, outputs=("entropy",), group=group, vocab_start=start, hidden_grad="all_reduce"
    )
    return out.logp, out.entropy


HEADS = {"ours": ours, "materialised": materialised}


def step(head, hidden, weight, *rest):
    logp, entropy = head(hidden, weight, *rest)
    (logp.sum() + 0.3 * entropy.sum()).backward()
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
    weight = torch.randn(columns, args.depth, generator=rng.manual_seed(rank)) / args.depth**0.5
    given = hidden, weight.to(dtype).requires_grad_(), labels, start, dist.group.WORLD
    answers = {name: step(head, *given) for name, head in HEADS.items()}
    worst = max(
        ((a - b).float().norm() / b.float().norm()).item()
        for a, b in zip(answers["ours"], answers["materialised"], strict=True)
    )
    bound = 1e-4 if args.dtype == "float32" else 3e-2
    if not worst <= bound:
        raise RuntimeError(f"answers differ by {worst:.1e}, bound {bound}: nothing timed")
    del answers
    peaks = {name: peak_extra_mib(lambda head=head: step(head, *given)) for name, head in HEADS.items()}
    times = interleaved({name: lambda head=head: step(head, *given) for name, head in HEADS.items()}, args.rounds)
    row = {
        "suite": "tp",
        "device": "cpu, gloo",
        **{name: getattr(args, name) for name in ("ranks", "rows", "depth", "vocab", "dtype", "rounds")},
        "seconds": medians(times),
        "peak_mib": peaks,
        "time_ratio": ratio(times, "materialised", "ours"),
        "memory_ratio": None if None in peaks.values() else peaks["materialised"] / peaks["ours"],
        "difference": worst,
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
        torch.multiprocessing.start_processes(work, (args, folder), nprocs=args.ranks, start_method="fork")
        rows = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(args.ranks)]
    for rank, row in enumerate(rows):
        print(
            f"rank {rank}: "
            + ", ".join(f"{name} {row['seconds'][name]:.3f} s, {_mib(row['peak_mib'][name])}" for name in HEADS)
        )
    times = " ".join(f"{row['time_ratio']:.2f}" for row in rows)
    memory = " ".join("-" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}" for row in rows)
    print(f"materialised / ours, a rank: time {times}, extra memory {memory}")
    print("GPU: not yet run")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def _mib(peak: float | None) -> str:
    return "memory not measured" if peak is None else f"{peak:.0f} MiB"

"""What is raced: one suite per op, each with its shapes, its cases, a maker of inputs and its rivals.

An op gets a bench by a suite here and its rivals in rivals.py. run.py and test_cases.py walk SUITES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from typing import NamedTuple

import rivals
import shapes
import torch
from rivals import Rival

# Relative RMS distance from float64 above which an answer is wrong. Error budgets are the tests' (standard S1, S2);
# this bound is so wide that every honest rival passes, and a lost factor or a row out of place does not.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


class WrongAnswer(Exception):
    """An implementation whose time says nothing."""


class Sample(SimpleNamespace):
    """Inputs of an op as attributes, the name of its output and the gradient that arrives there.

    useful_flops or useful_bytes, where it has them, is what nobody can leave out: the products of the rows that need
    them, each once; each input read and each result written once.
    """

    def answers(self, out: torch.Tensor) -> dict[str, torch.Tensor]:
        """The output, and the gradient of every input that wants one."""
        wanted = [name for name, value in vars(self).items() if getattr(value, "requires_grad", False)]
        grads = torch.autograd.grad(out, [getattr(self, name) for name in wanted], self.upstream.to(out.dtype))
        return {self.output: out.detach(), **{f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}}

    def replace(self, **changes) -> Sample:
        return Sample(**{**vars(self), **changes})

    def double(self) -> Sample:
        return Sample(**{name: _double(value) for name, value in vars(self).items()})


def _double(value):
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


@dataclass(frozen=True)
class Suite:
    name: str
    shapes: dict[str, tuple]  # small, default, full, ...
    cases: tuple[tuple[torch.dtype, str], ...]
    sample: Callable  # (shape, case, dtype, device) -> Sample
    rivals: tuple[Rival, ...]
    truth: Callable  # of sample.double()
    rounds: int
    more_cases: tuple[tuple[torch.dtype, str], ...] = ()  # with --full, or when asked for
    compare: tuple[tuple[str, str], ...] = ()  # ratios to print besides the one to ours
    gemm_flops: Callable | None = None  # shape -> FLOPs of one matrix product of the op
    fits: Callable = lambda shape, case: True  # whether a case is raced at a shape
    passes: str = "forward+backward"
    least: float = 0.0  # seconds of a turn: shorter calls are repeated in it

    def shapes_of(self, size: str) -> tuple:
        """Those of a size that only some suites have are its full ones elsewhere."""
        return self.shapes.get(size, self.shapes["full"])


@dataclass(frozen=True)
class Line:
    """One race: a suite at one shape, case and dtype."""

    suite: Suite
    shape: tuple
    case: str
    dtype: torch.dtype
    device: torch.device

    def sample(self) -> Sample:
        return self.suite.sample(self.shape, self.case, self.dtype, self.device)

    def small(self) -> Line:
        return Line(self.suite, self.suite.shapes["small"][0], self.case, self.dtype, self.device)

    def available(self) -> tuple[list[Rival], dict[str, str]]:
        """Those who can run here, and the reason of each who cannot."""
        racing = [rival for rival in self.suite.rivals if rival.cases is None or self.case in rival.cases]
        reasons = {rival.name: rival.needs(self.dtype, self.device) for rival in racing}
        able = [rival for rival in racing if reasons[rival.name] is None]
        return able, {name: reason for name, reason in reasons.items() if reason}

    def __str__(self) -> str:
        letters = [f"{name}={value}" for name, value in zip(self.shape._fields[1:], self.shape[1:], strict=True)]
        shape = f"{self.shape[0]} ({', '.join(letters)})"
        return f"{self.suite.name}  {self.case}  {dtype_name(self.dtype)}  {shape}  {self.device.type}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def truth(line: Line, x: Sample) -> dict[str, torch.Tensor]:
    """The answers of plain torch in float64, from the same rounded inputs."""
    return line.suite.truth(x.double())


def errors(line: Line, rival: Rival, answers: dict, exact: dict) -> dict[str, float | None]:
    """RMS error of the output (nats, for log-probs) and the worst of gradients and other outputs, relative; against
    float64.

    Raises WrongAnswer if any answer is off.
    """
    if rival.floor:
        return {"rms_error": None, "gradient_error": None}
    if set(answers) != set(exact):
        raise WrongAnswer(f"{line}: {rival.name} answers {sorted(answers)}, expected {sorted(exact)}")
    tolerance = max(TOLERANCE[line.dtype], rival.tolerance)
    relative = {}
    for name, value in exact.items():
        if answers[name].shape != value.shape:
            raise WrongAnswer(
                f"{line}: {name} of {rival.name} has shape {tuple(answers[name].shape)}, expected {tuple(value.shape)}"
            )
        relative[name] = float((answers[name] - value).norm() / value.norm())
        if not relative[name] <= tolerance:  # NaN is wrong too
            raise WrongAnswer(
                f"{line}: {name} of {rival.name} is {relative[name]:.1e} (relative RMS) from float64, "
                f"expected at most {tolerance:.0e}"
            )
    output, *gradients = exact
    rms = float((answers[output] - exact[output]).square().mean().sqrt())
    return {"rms_error": rms, "gradient_error": max((relative[name] for name in gradients), default=None)}


class Batch(NamedTuple):
    """Which rows of a head are read, and which of those have a gradient. In grpo it is one number a sequence."""

    prompt: float = 0.0  # the part of each sequence whose labels are IGNORED
    active: float = 1.0  # the part of the rows read whose gradient is not exactly 0
    grpo: bool = False
    frozen: bool = False  # no gradient of weight


SEQUENCES, GROUPS = 40, 10
BATCHES = {
    "dense": Batch(),
    "active20": Batch(active=0.2),
    "frozen": Batch(frozen=True),
    "prompt50": Batch(prompt=0.5),  # supervised or preference batches
    "grpo30": Batch(prompt=0.5, active=0.7, grpo=True),  # three groups of ten have equal rewards
    "pivots20": Batch(prompt=0.2, active=0.2),
}
COMPACT = "-compact"  # the batch of that kind as everybody gets it after leaving out what carries no gradient


def head(shape: shapes.Head, case: str, dtype: torch.dtype, device: torch.device) -> Sample:
    """N rows of 40 sequences, of the kind that BATCHES says.

    Logits have a standard deviation of 2, labels are drawn at random, upstream gradients are normal.
    """
    batch, random = BATCHES[case.removesuffix(COMPACT)], _generator(device)
    hidden = torch.randn(shape.N, shape.D, generator=random, device=device).to(dtype)
    weight = (torch.randn(shape.V, shape.D, generator=random, device=device) * 2 * shape.D**-0.5).to(dtype)
    upstream = torch.randn(shape.N, generator=random, device=device)
    read, upstream = _rows_with_gradient(batch, upstream, random)
    labels = torch.randint(shape.V, (shape.N,), generator=random, device=device)
    labels[~read] = rivals.IGNORED
    if case.endswith(COMPACT):
        needed = upstream != 0
        hidden, labels, upstream, read = hidden[needed], labels[needed], upstream[needed], read[needed]
    active = hidden[upstream != 0]
    bare = (lambda x: x.float()) if device.type == "cpu" else (lambda x: x)  # see rivals.head_gemms
    return Sample(
        output="logp",
        upstream=upstream,
        labels=labels,
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(not batch.frozen),
        floor=SimpleNamespace(
            hidden=bare(hidden.detach()[read]), weight=bare(weight.detach()), active=bare(active.detach())
        ),
        useful_flops=2 * shape.V * shape.D * (int(read.sum()) + len(active) * (1 if batch.frozen else 2)),
    )


def _rows_with_gradient(batch: Batch, upstream: torch.Tensor, random) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows are read, and the upstream gradient, exactly 0 where there is none."""
    n, device = len(upstream), upstream.device
    row = torch.arange(n, device=device)
    place = row * SEQUENCES % n / n  # in its sequence, 0 to 1
    read = place >= batch.prompt
    if batch.grpo:
        sequence, group = row * SEQUENCES // n, row * GROUPS // n
        upstream = upstream[:SEQUENCES][sequence]
        idle = group < round((1 - batch.active) * GROUPS)
    else:
        idle = torch.zeros_like(read)
        rows = read.nonzero()[:, 0]
        shuffled = rows[torch.randperm(len(rows), generator=random, device=device)]
        idle[shuffled[int(batch.active * len(rows)) :]] = True
    return read, upstream.masked_fill(idle | ~read, 0)


def loss(shape: shapes.Responses, case: str, dtype: torch.dtype, device: torch.device) -> Sample:
    """Pairs of responses, chosen first, half of whose tokens are the prompt; numbers as in `head`."""
    flat = head(shapes.Head(shape.model, shape.S * shape.T, shape.D, shape.V), "dense", dtype, device)
    labels = flat.labels.view(shape.S, shape.T)
    labels[:, : shape.T // 2] = rivals.IGNORED
    return Sample(
        output="loss",
        upstream=torch.ones((), device=device),
        labels=labels,
        hidden=flat.hidden.detach().view(shape.S, shape.T, shape.D).requires_grad_(),
        weight=flat.weight,
        useful_flops=3 * 2 * int((labels != rivals.IGNORED).sum()) * shape.D * shape.V,
    )


def logits(shape: shapes.Logits, case: str, dtype: torch.dtype, device: torch.device) -> Sample:
    random = _generator(device)
    return Sample(
        output="logp",
        upstream=torch.randn(shape.N, generator=random, device=device),
        labels=torch.randint(shape.V, (shape.N,), generator=random, device=device),
        logits=(2 * torch.randn(shape.N, shape.V, generator=random, device=device)).to(dtype).requires_grad_(),
        useful_bytes=3 * shape.N * shape.V * dtype.itemsize,  # read forward; read and written backward
    )


def scores(shape: shapes.Logits, case: str, dtype: torch.dtype, device: torch.device) -> Sample:
    x = logits(shape, case, dtype, device)
    return x.replace(logits=x.logits.detach(), useful_bytes=shape.N * shape.V * dtype.itemsize)


def segments(shape: shapes.Packed, case: str, dtype: torch.dtype, device: torch.device) -> Sample:
    """S segments that divide N tokens evenly, or else are cut at random places, none of them empty."""
    random = _generator(device)
    if shape.N % shape.S == 0:
        cuts = torch.arange(0, shape.N + 1, shape.N // shape.S, device=device)
    else:
        places = torch.randperm(shape.N - 1, generator=random, device=device)[: shape.S - 1] + 1
        cuts = torch.cat([places.new_tensor([0]), places.sort().values, places.new_tensor([shape.N])])
    source, target = (shape.S, shape.N) if case == "broadcast" else (shape.N, shape.S)
    return Sample(
        output="out",
        case=case,
        upstream=torch.randn(target, generator=random, device=device),
        values=torch.randn(source, generator=random, device=device).to(dtype).requires_grad_(),
        cu_seqlens=cuts.int(),
        lengths=cuts.diff(),
        segment=torch.repeat_interleave(torch.arange(shape.S, device=device), cuts.diff()),
    )


def sequence(shape: shapes.Packed, case: str, dtype: torch.dtype, device: torch.device) -> Sample:
    """S padded sequences of N / S tokens, of which a mask keeps about nine in ten. weight is that of the case.

    "dpo" is the loss of the batch with what a trainer logs of it, from log-probs that the head has masked already.
    """
    random = _generator(device)
    logp, ref_logp = (-torch.rand(shape.S, shape.N // shape.S, generator=random, device=device) for _ in range(2))
    mask = torch.rand(logp.shape, generator=random, device=device) < 0.9
    lengths = mask.sum(1, keepdim=True).clamp(min=1) if case == "mean" else 1
    return Sample(
        output="loss" if case == "dpo" else "losses",
        case=case,
        upstream=torch.randn(() if case == "dpo" else shape.S // 2, generator=random, device=device),
        logp=logp.to(dtype).requires_grad_(),
        ref_logp=ref_logp.to(dtype),
        mask=mask,
        weight=mask.to(dtype) / lengths,
    )


def policy(shape: shapes.Packed, case: str, dtype: torch.dtype, device: torch.device) -> Sample:
    """S padded responses of N / S tokens, of which a mask keeps about nine in ten; some ratios leave the clip.

    weight is the share of each token."""
    random = _generator(device)
    size = (shape.S, shape.N // shape.S)
    old_logp = -torch.rand(size, generator=random, device=device)
    # -|x|: no log-prob is above 0, and far from 0 the differences stay normal
    logp, ref_logp = (-(old_logp + 0.2 * torch.randn(size, generator=random, device=device)).abs() for _ in range(2))
    mask = torch.rand(size, generator=random, device=device) < 0.9
    share = 1 / mask.sum() if case == "token" else 1 / (shape.S * mask.sum(1, keepdim=True).clamp(min=1))
    return Sample(
        output="loss",
        case=case,
        upstream=torch.randn((), generator=random, device=device),
        logp=logp.to(dtype).requires_grad_(),
        old_logp=old_logp.to(dtype),
        ref_logp=ref_logp.to(dtype),
        mask=mask,
        weight=(mask * share).to(dtype),
        advantages=torch.randn(shape.S, generator=random, device=device) + 1,
    )


def reward(shape: shapes.Pairs, case: str, dtype: torch.dtype, device: torch.device) -> Sample:
    """Scores of P pairs, and in case "margin" a margin each."""
    random = _generator(device)
    chosen, rejected, margin = (torch.randn(shape.P, generator=random, device=device).to(dtype) for _ in range(3))
    return Sample(
        output="loss",
        case=case,
        upstream=torch.randn((), generator=random, device=device),
        chosen=chosen.requires_grad_(),
        rejected=rejected.requires_grad_(),
        margin=margin,
    )


def contrast(shape: shapes.Rows, case: str, dtype: torch.dtype, device: torch.device) -> Sample:
    """Two views of N representations, as far apart as at the start of a training."""
    random = _generator(device)
    first, noise = (torch.randn(shape.N, shape.D, generator=random, device=device) for _ in range(2))
    first, second = first.to(dtype), (first + 3 * noise).to(dtype)  # losses of 1 or so: near 0 eager has no digits left
    return Sample(
        output="loss",
        case=case,
        upstream=torch.randn((), generator=random, device=device),
        first=first.requires_grad_(),
        second=second.requires_grad_(),
    )


def rl(shape: shapes.Packed, case: str, dtype: torch.dtype, device: torch.device) -> Sample:
    """S responses of N / S tokens. Padded, each is valid up to a random length from half of that on; "packed" has no
    padding. advantages: eight rewarded segments each, as SegmentRewards and at their tokens."""
    random, (_, s, n) = _generator(device), shape
    width = n // s
    draw = [torch.randn(s, width, generator=random, device=device, dtype=dtype) for _ in range(2)]
    sample = Sample(output="advantages", case=case, rewards=draw[0], values=draw[1], mask=None, cu_seqlens=None)
    if case == "packed":
        cuts = torch.arange(0, n + 1, width, device=device)
        flat = sample.replace(rewards=draw[0].view(-1), values=draw[1].view(-1), cu_seqlens=cuts)
        return flat.replace(useful_bytes=n * 4 * dtype.itemsize)
    lengths = torch.randint(width // 2, width + 1, (s, 1), generator=random, device=device)
    sample.mask = torch.arange(width, device=device) < lengths
    sample.rewards = torch.where(sample.mask, sample.rewards, 0)
    if case != "advantages":
        return sample.replace(useful_bytes=n * (4 * dtype.itemsize + 1))
    sample.old_logp, sample.ref_logp = (
        torch.randn(s, width, generator=random, device=device, dtype=dtype) for _ in range(2)
    )
    each = torch.randn(s * 8, generator=random, device=device, dtype=dtype)
    ends = (lengths * torch.arange(1, 9, device=device) // 8 - 1).clamp(min=0).reshape(-1)
    bounds = torch.arange(0, 8 * s + 1, 8, device=device)
    sample.rewards = torch.zeros_like(sample.values)
    row = torch.arange(s, device=device).repeat_interleave(8)
    sample.rewards.index_put_((row, ends), each, accumulate=True)
    sample.segment = SimpleNamespace(reward=each, end=ends, cu_segments=bounds)
    return sample.replace(useful_bytes=n * (7 * dtype.itemsize + 1))  # old, ref, V, mask; r - β kl, kl, A, Ret


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


BOTH = (torch.float32, torch.bfloat16)
KINDS = ("prompt50", "grpo30", "pivots20")

TURN = 0.02  # of ops that take microseconds: neither a cold cache nor a sleeping thread is theirs

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            name="head",
            shapes=shapes.HEAD,
            cases=(*product([torch.float32], ["dense", "active20", "frozen"]), (torch.bfloat16, "dense")),
            more_cases=(
                *product([torch.bfloat16], ["active20", "frozen"]),
                *product(reversed(BOTH), KINDS + tuple(kind + COMPACT for kind in KINDS)),
            ),
            sample=head,
            rivals=rivals.HEAD,
            truth=rivals.head_truth,
            rounds=3,
            compare=(
                ("ours", "gemm3"),
                ("ours-no-workspace", "gemm4"),
                ("fused", "gemm3"),
                ("fused-no-workspace", "gemm4"),
                ("trl", "ours-no-workspace"),
                ("eager", "ours-no-workspace"),
            ),
            gemm_flops=lambda shape: 2 * shape.N * shape.V * shape.D,
        ),
        Suite(
            name="loss",
            shapes=shapes.LOSS,
            cases=tuple(product(BOTH, ["dpo"])),
            sample=loss,
            rivals=rivals.LOSS,
            truth=rivals.loss_eager,
            rounds=3,
            gemm_flops=lambda shape: 2 * shape.S * shape.T * shape.V * shape.D,
        ),
        Suite(
            name="token_logprobs",
            shapes=shapes.LOGITS,
            cases=tuple(product(BOTH, ["dense"])),
            sample=logits,
            rivals=rivals.LOGITS,
            truth=rivals.logits_eager,
            compare=(("ours", "copy"),),
            rounds=9,
        ),
        Suite(
            name="token_entropy",
            shapes=shapes.LOGITS,
            cases=tuple(product(BOTH, ["dense"])),
            sample=scores,
            rivals=rivals.SCORES,
            truth=rivals.scores_eager,
            compare=(("ours", "copy"),),
            rounds=9,
            passes="forward",
        ),
        Suite(
            name="segments",
            shapes=shapes.PACKED,
            cases=tuple(product([torch.float32], ["sum", "mean", "broadcast"])),
            sample=segments,
            rivals=rivals.SEGMENTS,
            truth=rivals.segments_eager,
            rounds=15,
            least=TURN,
        ),
        Suite(
            name="sequence",
            shapes=shapes.SEQUENCES,
            cases=tuple(product([torch.float32], ["sum", "mean", "dpo"])),
            sample=sequence,
            fits=lambda shape, case: case != "dpo" or shape.batch in shapes.DPO,
            rivals=rivals.SEQUENCE,
            truth=rivals.sequence_truth,
            rounds=15,
            least=TURN,
        ),
        Suite(
            name="policy",
            shapes=shapes.SEQUENCES,
            cases=tuple(product([torch.float32], ["token", "sequence"])),
            sample=policy,
            rivals=rivals.POLICY,
            truth=rivals.policy_eager,
            rounds=15,
            least=TURN,
        ),
        Suite(
            name="reward",
            shapes=shapes.REWARD,
            cases=tuple(product([torch.float32], ["plain", "margin"])),
            sample=reward,
            rivals=rivals.REWARD,
            truth=rivals.reward_eager,
            rounds=15,
            least=TURN,
        ),
        Suite(
            name="contrast",
            shapes=shapes.CONTRAST,
            cases=tuple(product([torch.float32], ["simcse"])),
            sample=contrast,
            rivals=rivals.CONTRAST,
            truth=rivals.contrast_eager,
            rounds=5,
            gemm_flops=lambda shape: 2 * shape.N * shape.N * shape.D,
        ),
        Suite(
            name="rl",
            shapes=shapes.RL,
            cases=tuple(product([torch.float32], ["gae", "gae-large", "packed", "advantages"])),
            sample=rl,
            rivals=rivals.RL,
            truth=rivals.rl_truth,
            rounds=9,
            least=TURN,
            compare=(("ours", "copy"),),
            fits=lambda shape, case: shape.batch == "small" or case in shapes.RL_CASES[shape.batch],
            passes="forward",
        ),
    )
}

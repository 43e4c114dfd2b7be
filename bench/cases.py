"""What is raced: one suite per op, each with its shapes, its cases, a maker of inputs and its rivals.

An op gets a bench by a suite here and its rivals in rivals.py. run.py and test_cases.py walk SUITES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace

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
    """Inputs of an op as attributes, the name of its output and the gradient that arrives there."""

    def answers(self, out: torch.Tensor) -> dict[str, torch.Tensor]:
        """The output, and the gradient of every input that wants one."""
        wanted = [name for name, value in vars(self).items() if getattr(value, "requires_grad", False)]
        grads = torch.autograd.grad(out, [getattr(self, name) for name in wanted], self.upstream.to(out.dtype))
        return {self.output: out.detach(), **{f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}}

    def double(self) -> Sample:
        return Sample(**{name: _double(value) for name, value in vars(self).items()})


def _double(value):
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


@dataclass(frozen=True)
class Suite:
    name: str
    shapes: dict[str, tuple]  # small, default, full
    cases: tuple[tuple[torch.dtype, str], ...]
    sample: Callable  # (shape, case, dtype, device) -> Sample
    rivals: tuple[Rival, ...]
    truth: Callable  # of sample.double()
    rounds: int
    more_cases: tuple[tuple[torch.dtype, str], ...] = ()  # with --full, or when asked for
    compare: tuple[tuple[str, str], ...] = ()  # ratios to print besides the one to ours
    gemm_flops: Callable | None = None  # shape -> FLOPs of one matrix product of the op


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
        reasons = {rival.name: rival.needs(self.dtype, self.device) for rival in self.suite.rivals}
        able = [rival for rival in self.suite.rivals if reasons[rival.name] is None]
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


def rms_error(line: Line, rival: Rival, answers: dict, exact: dict) -> float | None:
    """RMS error of the output against float64 (nats, for log-probs). Raises WrongAnswer if any answer is off."""
    if rival.floor:
        return None
    if set(answers) != set(exact):
        raise WrongAnswer(f"{line}: {rival.name} answers {sorted(answers)}, expected {sorted(exact)}")
    for name, value in exact.items():
        if answers[name].shape != value.shape:
            raise WrongAnswer(
                f"{line}: {name} of {rival.name} has shape {tuple(answers[name].shape)}, expected {tuple(value.shape)}"
            )
        error = float((answers[name] - value).norm() / value.norm())
        if not error <= TOLERANCE[line.dtype]:  # NaN is wrong too
            raise WrongAnswer(
                f"{line}: {name} of {rival.name} is {error:.1e} (relative RMS) from float64, "
                f"expected at most {TOLERANCE[line.dtype]:.0e}"
            )
    output = next(iter(exact))
    return float((answers[output] - exact[output]).square().mean().sqrt())


def head(shape: shapes.Head, case: str, dtype: torch.dtype, device: torch.device) -> Sample:
    """dense: every row has an upstream gradient. active20: 80 % of them are exactly 0. frozen: no gradient of weight.

    Logits have a standard deviation of 2, labels are drawn at random, upstream gradients are normal.
    """
    random = _generator(device)
    hidden = torch.randn(shape.N, shape.D, generator=random, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(shape.V, shape.D, generator=random, device=device) * 2 * shape.D**-0.5).to(dtype)
    upstream = torch.randn(shape.N, generator=random, device=device)
    active = torch.arange(shape.N, device=device)
    if case == "active20":
        idle = torch.randperm(shape.N, generator=random, device=device)[shape.N // 5 :]
        upstream[idle] = 0
        active = upstream.nonzero()[:, 0]
    return Sample(
        output="logp",
        upstream=upstream,
        labels=torch.randint(shape.V, (shape.N,), generator=random, device=device),
        hidden=hidden,
        weight=weight.requires_grad_(case != "frozen"),
        # what the bare products read; for float32 the inputs themselves
        floor=SimpleNamespace(
            hidden=hidden.detach().float(), weight=weight.detach().float(), active=hidden.detach().float()[active]
        ),
    )


def logits(shape: shapes.Logits, case: str, dtype: torch.dtype, device: torch.device) -> Sample:
    random = _generator(device)
    return Sample(
        output="logp",
        upstream=torch.randn(shape.N, generator=random, device=device),
        labels=torch.randint(shape.V, (shape.N,), generator=random, device=device),
        logits=(2 * torch.randn(shape.N, shape.V, generator=random, device=device)).to(dtype).requires_grad_(),
    )


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
    """S padded sequences of N / S tokens, of which a mask keeps about nine in ten. weight is that of the case."""
    random = _generator(device)
    logp, ref_logp = (-torch.rand(shape.S, shape.N // shape.S, generator=random, device=device) for _ in range(2))
    mask = torch.rand(logp.shape, generator=random, device=device) < 0.9
    lengths = mask.sum(1, keepdim=True).clamp(min=1) if case == "mean" else 1
    return Sample(
        output="losses",
        case=case,
        upstream=torch.randn(shape.S // 2, generator=random, device=device),
        logp=logp.to(dtype).requires_grad_(),
        ref_logp=ref_logp.to(dtype),
        mask=mask,
        weight=mask.to(dtype) / lengths,
    )


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


BOTH = (torch.float32, torch.bfloat16)

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            name="head",
            shapes=shapes.HEAD,
            cases=(*product([torch.float32], ["dense", "active20", "frozen"]), (torch.bfloat16, "dense")),
            more_cases=tuple(product([torch.bfloat16], ["active20", "frozen"])),
            sample=head,
            rivals=rivals.HEAD,
            truth=rivals.head_eager,
            rounds=3,
            compare=(
                ("ours", "gemm3"),
                ("ours-no-workspace", "gemm4"),
                ("trl", "ours-no-workspace"),
                ("eager", "ours-no-workspace"),
            ),
            gemm_flops=lambda shape: 2 * shape.N * shape.V * shape.D,
        ),
        Suite(
            name="token_logprobs",
            shapes=shapes.LOGITS,
            cases=tuple(product(BOTH, ["dense"])),
            sample=logits,
            rivals=rivals.LOGITS,
            truth=lambda x: rivals.LOGITS[0].call(x),
            rounds=9,
        ),
        Suite(
            name="segments",
            shapes=shapes.PACKED,
            cases=tuple(product([torch.float32], ["sum", "mean", "broadcast"])),
            sample=segments,
            rivals=rivals.SEGMENTS,
            truth=rivals.segments_eager,
            rounds=51,
        ),
        Suite(
            name="sequence",
            shapes=shapes.SEQUENCES,
            cases=tuple(product([torch.float32], ["sum", "mean"])),
            sample=sequence,
            rivals=rivals.SEQUENCE,
            truth=rivals.sequence_eager,
            rounds=51,
        ),
    )
}

"""What only a GPU can show: nothing waits for it, graphs replay, streams are kept, bits repeat, addresses pass 2^33.

Every op of OPS goes through the same checks. Those that need no GPU run on a CPU too, and device "meta" stands in where
a GPU is missing: it has no values, so whatever reads one on the host fails there.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from host_reads import NoReads
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

import finealign_kernels as fk
from finealign_kernels.losses.policy import POLICY
from finealign_kernels.losses.preference import PREFERENCE
from finealign_kernels.ops import _check, _choose, _native
from finealign_kernels.testing import measure

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
REAL = ["cpu", pytest.param("cuda", marks=[gpu, needs_gpu])]
S, T, V, D = 6, 37, 517, 24  # sequences, their padded width, a vocabulary that no tile divides, hidden size
GIB = 2**30


class Op(NamedTuple):
    """A function of tensors, given by name in its order. Those in `differentiable` get a gradient.

    lowered: its inputs that autocast rounds; none where the op itself has rounded them by then.
    """

    call: Callable
    names: tuple[str, ...]
    differentiable: tuple[str, ...] = ()
    meta: bool = True  # runs without values: what stands in for a GPU here
    missing: Callable[[str], str | None] = lambda device: None  # why it cannot run on a device
    lowered: tuple[str, ...] = ()


def tensors(device: str, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of every op: S sequences of different length padded to T, and the same tokens packed."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=random)

    lengths = torch.randint(1, T + 1, (S,), generator=random)
    mask = torch.arange(T) < lengths[:, None]
    values = {
        "hidden": normal(S, T, D),
        "weight": normal(V, D) / 3,
        "logits": normal(S, T, V),
        "labels": torch.randint(V, (S, T), generator=random),
        "mask": mask,
        "logp": -normal(S, T).abs(),
        "ref_logp": -normal(S, T).abs(),
        "token_weight": normal(S, T).abs(),
        "token_score": normal(S, T),
        "reward": normal(S, T),
        "value": normal(S, T),
        "packed": normal(S * T),
        "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)[:-1], torch.tensor([S * T])]),
        "per_sequence": normal(S),
        "target": torch.arange(S) % 2 == 0,
        "segment_reward": normal(3 * S),
        "end": torch.tensor([3, 9, 40] * S),
        "cu_segments": torch.arange(S + 1) * 3,
    }
    return {name: value.to(device) for name, value in values.items()}


def preference(name: str) -> Op:
    row = PREFERENCE[name]
    names = ("logp", "ref_logp", "mask", "token_weight") if row.reference else ("logp", "mask", "token_weight")

    average = "kept" if name == "orpo" else None

    def call(logp, *others):
        *ref_logp, mask, token_weight = others
        return fk.preference_loss(name, logp, *ref_logp, mask=mask, token_weight=token_weight, average=average).loss

    return Op(call, names, ("logp",))


def policy(name: str) -> Op:
    options = {"denominator": S * T} if POLICY[name].reduction == "token_global" else {}
    options |= {"max_length": T} if POLICY[name].reduction == "constant" else {}

    def call(logp, ref_logp, per_sequence, mask):
        old_logp = logp.detach() + 0.1 * torch.sin(ref_logp)
        return fk.policy_loss(name, logp, old_logp, per_sequence, ref_logp=ref_logp, mask=mask, **options).loss

    return Op(call, ("logp", "ref_logp", "per_sequence", "mask"), ("logp",))


def head(dtype: torch.dtype | None = None, **options) -> Op:
    def call(hidden, weight, labels, mask):
        hidden, weight = (x if dtype is None else x.to(dtype) for x in (hidden, weight))
        out = fk.linear_logprobs(hidden, weight, labels, mask=mask, outputs=("entropy",), compact="device", **options)
        return out.logp, out.entropy

    fused = options.get("backend") == _choose.FUSED or options.get("batch_invariant")
    missing = {"missing": fused_head_missing} if fused else {}
    lowered = ("hidden", "weight") if dtype is None else ()
    names = ("hidden", "weight", "labels", "mask")
    return Op(call, names, ("hidden", "weight"), meta=False, lowered=lowered, **missing)


def fused_head_missing(device: str) -> str | None:
    if device == "cpu":
        return "interpreted: tests/kernels/test_linear_logprobs_triton.py"
    return _choose.fused_reason(torch.float32, _choose.arch(torch.empty(0, device=device)), _choose.backends())


def _advantages(rewards, values, old_logp, ref_logp, token_score, mask):
    found = fk.advantages(
        rewards,
        values,
        old_logp=old_logp,
        ref_logp=ref_logp,
        kl_coef=0.1,
        mask=mask,
        gamma=0.99,
        whiten_rewards=True,
        token_score=token_score,
    )
    return tuple(found)


def _segment_advantages(reward, end, cu_segments, old_logp, ref_logp, token_score, mask):
    rewards = [fk.SegmentRewards(reward, end, cu_segments, weight) for weight in (1.0, 0.3)]
    options = dict(old_logp=old_logp, ref_logp=ref_logp, kl_coef=0.1, kl="k3", mask=mask, token_score=token_score)
    found = fk.advantages(rewards, whiten_advantages=False, gamma=0.9, **options)
    return tuple(x for x in found if x is not None)


def _logits(logits, labels, mask):
    out = fk.token_logprobs(logits, labels, mask=mask, outputs=("entropy",))
    return out.logp, out.entropy


OPS = {
    "linear_logprobs": head(workspace=0),
    "linear_logprobs with E": head(workspace="full"),
    "linear_logprobs in bfloat16": head(torch.bfloat16, workspace="full"),
    "linear_logprobs fused": head(backend=_choose.FUSED, workspace=0),
    "linear_logprobs fused in bfloat16, with E": head(torch.bfloat16, batch_invariant=True, workspace="full"),
    "token_logprobs": Op(_logits, ("logits", "labels", "mask"), ("logits",), meta=False),
    "segment_mean": Op(fk.segment_mean, ("packed", "cu_seqlens"), ("packed",)),
    "segment_sum": Op(lambda logp, mask: fk.segment_sum(logp, mask=mask), ("logp", "mask"), ("logp",)),
    "segment_broadcast": Op(
        lambda per_sequence, cu_seqlens: fk.segment_broadcast(per_sequence, cu_seqlens, total=S * T),
        ("per_sequence", "cu_seqlens"),
        ("per_sequence",),
    ),
    "segment_put_last": Op(
        lambda per_sequence, mask: fk.segment_put_last(per_sequence, mask=mask),
        ("per_sequence", "mask"),
        ("per_sequence",),
    ),
    "nll_loss": Op(
        lambda logp, mask, token_weight: fk.nll_loss(logp, mask=mask, token_weight=token_weight).loss,
        ("logp", "mask", "token_weight"),
        ("logp",),
    ),
    "kto": Op(
        lambda logp, ref_logp, mask, target: fk.kto(logp, ref_logp, target, mask=mask, z0=0.1).loss,
        ("logp", "ref_logp", "mask", "target"),
        ("logp",),
    ),
    "adaptive_mask": Op(
        lambda token_score, mask: fk.adaptive_mask(token_score, mask=mask).token_weight, ("token_score", "mask")
    ),
    "pivot_flags": Op(
        lambda token_score, mask: fk.pivot_flags(token_score, mask=mask, kind="threshold", threshold=0.5),
        ("token_score", "mask"),
    ),
    "gae": Op(
        lambda reward, value, mask: tuple(fk.gae(reward, value, mask=mask, gamma=0.9)), ("reward", "value", "mask")
    ),
    "discounted_returns": Op(
        lambda reward, mask: fk.discounted_returns(reward, mask=mask, gamma=0.9), ("reward", "mask")
    ),
    "kl_penalty": Op(
        lambda logp, ref_logp, mask: fk.kl_penalty(logp, ref_logp, mask=mask), ("logp", "ref_logp", "mask")
    ),
    "reverse_scan": Op(
        lambda packed, cu_seqlens: fk.reverse_scan(packed, 0.9, cu_seqlens), ("packed", "cu_seqlens"), ("packed",)
    ),
    "reverse_scan of decays": Op(
        lambda value, token_weight, mask: fk.reverse_scan(value, token_weight, mask=mask),
        ("value", "token_weight", "mask"),
        ("value", "token_weight"),
    ),
    "advantages": Op(_advantages, ("reward", "value", "logp", "ref_logp", "token_score", "mask")),
    "advantages of segments": Op(
        _segment_advantages, ("segment_reward", "end", "cu_segments", "logp", "ref_logp", "token_score", "mask")
    ),
    "whiten a packed batch": Op(lambda packed: fk.whiten(packed, mode="clamp"), ("packed",)),
    "whiten": Op(lambda reward, mask: fk.whiten(reward, mask=mask), ("reward", "mask")),
    "group_advantages": Op(lambda per_sequence: fk.group_advantages(per_sequence, 3), ("per_sequence",)),
    "value_loss": Op(
        lambda value, reward, token_score, mask: fk.value_loss(value, reward, token_score, mask=mask).loss,
        ("value", "reward", "token_score", "mask"),
        ("value",),
    ),
    "sampler_weights": Op(
        lambda logp, ref_logp, mask: fk.sampler_weights(logp, ref_logp, mask=mask, mode="token_truncate", high=2.0),
        ("logp", "ref_logp", "mask"),
    ),
    **{name: preference(name) for name in PREFERENCE},
    **{name: policy(name) for name in POLICY},
}
TWINS = {  # on a CPU
    "linear_logprobs fused": "linear_logprobs",
    "linear_logprobs fused in bfloat16, with E": "linear_logprobs in bfloat16",
}
DIFFERENTIABLE = [name for name, op in OPS.items() if op.differentiable]
ROWS = (set(PREFERENCE) | set(POLICY)) - {"dpo", "grpo"}  # traced on a GPU alone: a table's rows share their code
TRACED = [(name, "cpu") for name in DIFFERENTIABLE if name not in ROWS]
TRACED += [pytest.param(name, "cuda", marks=[gpu, needs_gpu]) for name in DIFFERENTIABLE]


class Run:
    """An op on a device: its inputs, of which some want a gradient, and what comes out."""

    def __init__(self, name: str, device: str, seed: int = 0):
        self.op = OPS[name]
        if reason := self.op.missing(device):
            pytest.skip(reason)
        source = tensors(device, seed)
        self.inputs = {key: source[key].requires_grad_(key in self.op.differentiable) for key in self.op.names}
        with torch.no_grad():
            out = [x for x in self.forward() if x.is_floating_point()]
        random = torch.Generator().manual_seed(seed + 100)
        self.upstream = [torch.randn(x.shape, generator=random).to(x) for x in out]

    def forward(self) -> tuple[Tensor, ...]:
        out = self.op.call(*self.inputs.values())
        return out if isinstance(out, tuple) else (out,)

    def __call__(self) -> list[Tensor]:
        """Outputs, then gradients."""
        out = self.forward()
        wanted = [self.inputs[name] for name in self.op.differentiable]
        floats = [x for x in out if x.is_floating_point()]
        grads = torch.autograd.grad(floats, wanted, self.upstream) if wanted else []
        return [*(x.detach() for x in out), *grads]

    def take(self, name: str, seed: int) -> None:
        """The values of another seed, in place."""
        source = tensors(str(next(iter(self.inputs.values())).device), seed)
        with torch.no_grad():
            for key in self.op.names:
                self.inputs[key].copy_(source[key])


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---- what needs no GPU ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", REAL)
@pytest.mark.parametrize("name", OPS)
def test_bits_repeat(name, device):
    run = Run(name, device)
    first = run()
    assert all(x.isfinite().all() for x in first if x.is_floating_point())
    for _ in range(20):
        assert equal(run(), first)


class NoWaits(NoReads):
    """Fails where the host would wait for the device: a value that is read, a size that depends on values, a copy."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(function, types, args, kwargs)
        name = function.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source, target = (args[1], args[0]) if name == "copy_" else (args[0], out)
            assert source.device == target.device, f"the host waits: a copy from {source.device} to {target.device}"
        return out


class Numbers(TorchFunctionMode):
    """Fails where numbers of the host become a tensor elsewhere, which is a copy that the host waits for."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            made = not isinstance(args[0] if function is torch.as_tensor else None, Tensor)
            assert out.device.type == "cpu" or not made, f"the host waits: numbers copied to {out.device}"
        return out


@contextmanager
def nothing_read():
    with NoWaits(), Numbers():
        yield


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.meta])
def test_nothing_is_read_on_the_host(name):
    run = Run(name, "meta")
    with nothing_read():
        run()


@pytest.mark.parametrize(
    "reads",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x + torch.tensor(2.0, device=x.device),
        lambda x: x + torch.as_tensor(2.0, device=x.device),
        lambda x: x.new_tensor([1.0, 2.0, 3.0]),
        lambda x: torch.ones(3).to(x.device),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
    ],
)
def test_a_read_on_the_host_is_seen(reads):
    x = torch.ones(3, device="meta")
    with nothing_read():
        x.add_(2.0).clone().new_ones(3)
    with nothing_read(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        reads(x)


@pytest.mark.parametrize("name, device", TRACED)
def test_compiles_in_one_graph(name, device):
    run = Run(name, device)
    torch._dynamo.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"  # on a CPU inductor takes a C++ compiler and minutes
    compiled = torch.compile(run.op.call, fullgraph=True, backend=backend)
    found, expected = compiled(*run.inputs.values()), run.forward()
    found = found if isinstance(found, tuple) else (found,)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)
    wanted = [run.inputs[key] for key in run.op.differentiable]
    grads = [torch.autograd.grad(out, wanted, run.upstream) for out in (found, expected)]
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compact", ["auto", "host", "device"])
@pytest.mark.parametrize("backend", ["auto", _choose.FUSED])
def test_a_head_is_traced_on_a_gpu(backend, compact, monkeypatch):
    """What stands before the ops asks a GPU things that a tracer must not: here of one that is not there."""
    monkeypatch.setattr(_choose, "triton_reason", lambda: None)
    monkeypatch.setattr(_choose, "arch", lambda x: "sm_90")

    class Head(torch.nn.Module):
        def forward(self, hidden, weight, labels):
            return fk.linear_logprobs(hidden, weight, labels, backend=backend, compact=compact).logp

    torch._dynamo.reset()
    with FakeTensorMode():
        hidden, weight = (torch.empty(size, D, device="cuda") for size in (T, V))
        labels = torch.zeros(T, dtype=torch.long, device="cuda")
        program = torch.export.export(Head(), (hidden, weight, labels), strict=True)  # one graph, or it raises
    graphs = [module.graph for module in program.graph_module.modules() if hasattr(module, "graph")]
    called = [node.target for graph in graphs for node in graph.nodes]
    assert torch.ops.finealign.linear_logprobs_fwd.default in called


@pytest.mark.parametrize("device", REAL)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_autocast_lowers_the_head_alone(name, device):
    run = Run(name, device)
    expected = run()
    with torch.autocast(device, torch.bfloat16):
        found = run()
    if run.op.lowered:
        lowered = {key: run.inputs[key].detach().bfloat16().requires_grad_() for key in run.op.lowered}
        out = run.op.call(*{**run.inputs, **lowered}.values())
        grads = torch.autograd.grad(out, list(lowered.values()), run.upstream)
        expected = [*(x.detach() for x in out), *(grad.float() for grad in grads)]
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    assert equal(found, expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="run there as they are")
def test_what_only_a_gpu_runs_holds_in_the_interpreter(monkeypatch):
    """A test of the fused head that is wrong itself shows here, not on the first GPU."""
    name = "linear_logprobs fused"
    if reason := _choose.fused_reason(torch.bfloat16, "interpreter", _choose.backends()):
        pytest.skip(reason)
    monkeypatch.setitem(OPS, name, OPS[name]._replace(missing=lambda device: None))
    test_autocast_lowers_the_head_alone(name, "cpu")
    test_sanitizer_runs_every_op(name, "cpu")


@pytest.mark.parametrize("device", REAL)
@pytest.mark.parametrize("name", OPS)
def test_sanitizer_runs_every_op(name, device):
    """Once forward and backward: what compute-sanitizer looks at (bench/gpu_session.sh)."""
    assert all(x.isfinite().all() for x in Run(name, device, seed=1)() if x.is_floating_point())


# ---- what needs one ------------------------------------------------------------------------------------------------


@gpu
@needs_gpu
@pytest.mark.parametrize("name", OPS)
def test_a_gpu_agrees_with_a_cpu(name):
    exact, found = Run(TWINS.get(name, name), "cpu")(), Run(name, "cuda")()
    bound = 3e-2 if "bfloat16" in name else 1e-4  # another order of additions; of products whose factors are rounded
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == b.dtype
        assert_close(a.cpu(), b, rtol=bound, atol=bound / 10)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_gpu_agrees_bit_for_bit_on_long_segments(dtype):
    """Blocks share pieces of the first; the last of 300 segments is long and each has a block of its own."""
    random = torch.Generator().manual_seed(0)
    for lengths in ([100_000, 0, 7, 5000, 1024, 1025], [3] * 299 + [20_000]):
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        x, v = (torch.randn(size, generator=random) for size in (int(cu_seqlens[-1]), len(lengths)))
        mask = torch.rand(x.shape, generator=random) < 0.8
        x = x.where(mask, torch.nan)
        given = [x.to(dtype), v.to(dtype), cu_seqlens, mask]
        found = {}
        for device in ("cpu", "cuda"):
            x_, v_, ends, kept = (y.to(device) for y in given)
            x_, v_ = x_.requires_grad_(), v_.requires_grad_()
            out = [op(x_, ends, mask=kept) for op in (fk.segment_sum, fk.segment_mean)]
            out += [op(v_, ends, mask=kept) for op in (fk.segment_broadcast, fk.segment_put_last)]
            found[device] = [*out, *torch.autograd.grad([y.sum() for y in out], (x_, v_))]
        assert equal([y.detach().cpu() for y in found["cuda"]], [y.detach() for y in found["cpu"]])


@pytest.mark.parametrize("device", REAL)
def test_packed_scans_of_any_length_are_those_of_the_reference(device):
    """A token, a warp's and a block's worth of them, and a long one, whose ends are read from both sides."""
    random = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 0, 31, 128, 1024, 1025, 100_000, 7, 0])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    x, values = (torch.randn(int(lengths.sum()), generator=random) for _ in range(2))
    mask = torch.rand(x.shape, generator=random) < 0.8
    x, values = (y.where(mask, torch.nan) for y in (x, values))
    decay = 0.5 + 0.5 * torch.rand(x.shape, generator=random)
    options = {"cu_seqlens": cu_seqlens, "mask": mask}
    doubles = {"cu_seqlens": cu_seqlens, "mask": mask, "backend": "reference"}
    exact = [fk.reverse_scan(x.double(), decay.double(), **doubles), *fk.gae(x.double(), values.double(), **doubles)]
    there = {name: value.to(device) for name, value in options.items()}
    x, values, decay = (y.to(device) for y in (x, values, decay))
    found = [fk.reverse_scan(x, decay, **there), *fk.gae(x, values, **there)]
    for a, b in zip(found, exact, strict=True):
        assert_close(a.cpu().double(), b, rtol=2e-6, atol=2e-6)


@gpu
@needs_gpu
@pytest.mark.parametrize("name", OPS)
def test_nothing_waits_for_the_gpu(name):
    run = Run(name, "cuda")
    run()  # compiles, allocates
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@gpu
@needs_gpu
@pytest.mark.parametrize("name", OPS)
def test_a_graph_replays_with_other_values(name):
    run = Run(name, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # capture wants a warm allocator and compiled kernels
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in (0, 1):
        run.take(name, seed)
        expected = run()
        for out in captured:
            out.fill_(0)
        graph.replay()
        torch.cuda.synchronize()
        assert equal(captured, expected)


@gpu
@needs_gpu
@pytest.mark.parametrize("first", ("captured", "run"))
def test_a_graph_replays_its_counts_of_wrong_labels(first):
    vocab = {"captured": 611, "run": 613}[first]  # nobody else's
    target = torch.tensor([0, _check.BAD, 1, _check.BAD], device="cuda")
    _check.note_errors(target, 607)
    if first == "run":
        _check.note_errors(torch.zeros_like(target), vocab)
    with pytest.raises(IndexError):
        fk.check_errors()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _check.note_errors(target, vocab)
    fk.check_errors()
    for count in (3, 1):
        for _ in range(count):
            graph.replay()
        torch.cuda.synchronize()
        with pytest.raises(IndexError, match=f"{2 * count} labels"):
            fk.check_errors()


@gpu
@needs_gpu
@pytest.mark.parametrize("name", OPS)
def test_work_is_queued_on_the_current_stream(name):
    """Inputs come late on another stream; a launch elsewhere would read what stood there before."""
    run, late = Run(name, "cuda"), tensors("cuda", seed=1)
    run.take(name, 1)
    expected = run()
    run.take(name, 0)
    torch.cuda.synchronize()
    spin = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(20):
            spin.zero_()
        for key in run.op.names:
            run.inputs[key].copy_(late[key])
    with torch.cuda.stream(stream):
        found = run()
    stream.synchronize()
    assert equal(found, expected)


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device")
@pytest.mark.parametrize("name", OPS)
def test_a_second_device_is_used_where_the_tensors_are(name):
    with torch.cuda.device(0):
        found, first = Run(name, "cuda:1")(), Run(name, "cuda:0")()
        assert torch.cuda.current_device() == 0
    assert all(x.device == torch.device("cuda:1") for x in found)
    for a, b in zip(found, first, strict=True):
        assert_close(a.cpu(), b.cpu())


def room(gib: int) -> str | None:
    """Why a test that holds so much cannot run here."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    return None if free >= gib * GIB else f"needs {gib} GiB of GPU memory, {free / GIB:.0f} are free"


def past(n: int, v: int, power: int) -> None:
    assert n * v > 2**power, "the shape does not reach where addresses go wrong"


@gpu
@pytest.mark.parametrize(
    "power, n, v", [(10, 96, 517), pytest.param(33, 65664, 131072, marks=needs_gpu)], ids=["small", "large"]
)
@pytest.mark.parametrize("device", REAL)
def test_logits_past_two_to_the_33(power, n, v, device):
    """The last rows of many are those of few, forward and, in place, backward."""
    if power == 33 and (device == "cpu" or (reason := room(60))):
        pytest.skip("takes a GPU" if device == "cpu" else reason)
    past(n, v, power)
    random = torch.Generator(device).manual_seed(0)
    logits = torch.empty(n, v, dtype=torch.bfloat16, device=device)
    for rows in logits.split(4096):
        rows.copy_(torch.randn(rows.shape, generator=random, device=device, dtype=torch.bfloat16))
    labels = torch.randint(v, (n,), generator=random, device=device)
    few = logits[-64:].clone().requires_grad_()
    expected = fk.token_logprobs(few, labels[-64:]).logp
    expected.sum().backward()
    found = fk.token_logprobs(logits.requires_grad_(), labels, inplace_backward=True).logp
    assert torch.equal(found[-64:], expected) and found.isfinite().all()
    (grad,) = torch.autograd.grad(found.sum(), logits)
    assert torch.equal(grad[-64:], few.grad)


@gpu
@pytest.mark.parametrize(
    "power, n, v", [(10, 96, 517), pytest.param(33, 65664, 131072, marks=needs_gpu)], ids=["small", "large"]
)
@pytest.mark.parametrize("device", REAL)
@pytest.mark.parametrize("workspace", ["full", 0])
@pytest.mark.parametrize("backend, compact", [("auto", "host"), (_choose.FUSED, "host"), (_choose.FUSED, "device")])
def test_a_head_past_two_to_the_33(power, n, v, workspace, backend, compact, device):
    """N·V past 2^33, with E kept (17 GiB) and without: the last rows are those of a call of their own."""
    if backend == _choose.FUSED and power == 33 and (reason := fused_head_missing(device)):
        pytest.skip(reason)
    if power == 33 and (device == "cpu" or (reason := room(60))):
        pytest.skip("takes a GPU" if device == "cpu" else reason)
    past(n, v, power)
    random = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16
    hidden = torch.randn(n, 64, generator=random, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(v, 64, generator=random, device=device) / 4).to(dtype).requires_grad_()
    labels = torch.randint(v, (n,), generator=random, device=device)
    upstream = torch.zeros(n, device=device)
    upstream[-64:] = torch.randn(64, generator=random, device=device)
    how = {"workspace": workspace, "backend": backend, "compact": compact}
    out = fk.linear_logprobs(hidden, weight, labels, **how).logp
    dhidden, dweight = torch.autograd.grad(out, (hidden, weight), upstream)
    few = hidden.detach()[-64:].requires_grad_()
    expected = fk.linear_logprobs(few, weight, labels[-64:], **how).logp
    exact = torch.autograd.grad(expected, (few, weight), upstream[-64:])
    assert_close(out[-64:], expected, rtol=1e-5, atol=1e-5)
    assert_close(dhidden[-64:], exact[0], rtol=2e-2, atol=1e-3)
    assert_close(dweight, exact[1], rtol=2e-2, atol=1e-3)
    assert not dhidden[:-64].any()


@gpu
@needs_gpu
def test_queued_times_are_those_of_the_gpu():
    """A copy runs at the speed of some memory, and what the host does meanwhile does not count."""
    x = torch.empty(GIB // 2, dtype=torch.int8, device="cuda")
    y = torch.empty_like(x)
    times = measure.medians(measure.queued({"copy": lambda: y.copy_(x), "none": lambda: None}, 5, "cuda"))
    assert 1e11 < GIB / times["copy"] < 2e13
    assert times["none"] < times["copy"] / 10


@gpu
@needs_gpu
@pytest.mark.skipif(not _native.available(), reason=str(_native.reason))
def test_the_gpu_half_of_the_extension_is_there():
    assert _native.cuda() is None

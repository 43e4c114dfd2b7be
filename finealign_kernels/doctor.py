"""`finealign doctor`: what this machine has, which backends run on it, and whether their results are right.

Every usable backend computes small cases, which are compared with float64. A check fails if the relative error (norm of
the difference divided by the norm of the truth) is above its bound, or if there is an exception.
"""

import json as jsonlib
import math
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch

from . import __version__
from .demo.heads import Tokens, library_loss, plain_loss
from .demo.options import LOSSES, Options, reads_reference
from .ops import _choose, _native, segments
from .ops.logprobs import linear_logprobs, token_logprobs
from .testing import samples

# bounds on relative errors: of what is kept in float32, and of gradients that are rounded to the input's dtype
BOUNDS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-5, 1e-2)}


class Check(NamedTuple):
    """One number that was compared with float64."""

    op: str
    backend: str
    device: str
    dtype: str
    quantity: str
    error: float
    bound: float
    note: str = ""  # the exception, if one was raised

    @property
    def passed(self):
        return self.error <= self.bound  # false for NaN


def run(json=False):
    """Prints what was found, as text or as one JSON object, and returns the exit status: 1 if a check failed."""
    found = {
        "versions": versions(),
        "extension": extension(),
        "devices": devices(),
        "backends": backends(),
    }
    checks = self_test()
    passed = all(check.passed for check in checks)
    if json:
        rows = [{**check._asdict(), "error": _finite(check.error), "passed": check.passed} for check in checks]
        print(jsonlib.dumps({**found, "checks": rows, "passed": passed}, indent=1))
    else:
        print("\n".join([*_text(found), *_lines(checks), _verdict(checks)]))
    return 0 if passed else 1


def versions():
    """Version of each package that matters, "not installed" where it is not."""
    known = {"finealign-kernels": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return known | {name: _version(name) for name in ("triton", "transformers", "trl", "peft")}


def extension():
    """Where the compiled ops of this process come from, and the GPUs they are compiled for."""
    if not _native.available():
        return {"file": f"none: {_native.reason}"}
    archs = _native.architectures()
    return {"file": _native.file(), "architectures": ";".join(archs) or "none: built without CUDA"}


def devices():
    """Device -> a description of it."""
    native = f"native kernels use {_native.instructions()}" if _native.available() else "no native kernels"
    capability = torch.backends.cpu.get_cpu_capability()
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads, torch uses {capability}, {native}"
    gpus = {f"cuda:{i}": _gpu(i) for i in range(torch.cuda.device_count())} if torch.cuda.is_available() else {}
    return {
        "cpu": cpu,
        **(gpus or {"cuda": "none: " + ("no device" if torch.version.cuda else "a CPU build of torch")}),
    }


def backends():
    """Backend of the row ops, or of the head alone -> "runs" or why not."""
    found = {name: reason or "runs" for name, reason in _choose.backends().items()}
    reason = _fused_reason("cuda" if torch.cuda.is_available() else "cpu", torch.float32)
    return found | {_choose.FUSED: reason or "runs by name and for batch_invariant=True; auto waits for a measurement"}


def self_test():
    """All checks of all backends that run here."""
    places = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    checks = []
    for device in places:
        for dtype in BOUNDS:
            for backend in _row_backends(device, dtype):
                checks += _guarded(_check_linear, "linear_logprobs", backend, device, dtype)
                checks += _guarded(_check_token, "token_logprobs", backend, device, dtype)
            if not _fused_reason(device, dtype):
                checks += _guarded(_check_linear, "linear_logprobs", _choose.FUSED, device, dtype)
        for backend in _segment_backends(device):
            checks += _guarded(_check_segments, "segments", backend, device, torch.float32)
        for name in LOSSES:
            checks += _guarded(_check_loss, name, "auto", device, torch.float32)
    return checks


# ---- the cases -----------------------------------------------------------------------------------------------------


def _check_linear(op, backend, device, dtype):
    x, mask = _rows(device, dtype)
    hidden, weight = x.hidden.requires_grad_(), x.weight.requires_grad_()
    found = linear_logprobs(hidden, weight, x.labels, mask=mask, outputs=("entropy",), backend=backend)
    truth, wide = _row_truth(lambda h, w: h @ w.T, (hidden, weight), x, mask)
    return _compare_rows(found, truth, x, {"dhidden": (hidden, wide[0]), "dweight": (weight, wide[1])})


def _check_token(op, backend, device, dtype):
    x, mask = _rows(device, dtype)
    logits = (x.hidden @ x.weight.T).requires_grad_()
    found = token_logprobs(logits, x.labels, mask=mask, outputs=("entropy",), backend=backend)
    truth, wide = _row_truth(lambda z: z, (logits,), x, mask)
    return _compare_rows(found, truth, x, {"dlogits": (logits, wide[0])})


def _rows(device, dtype):
    """Fewer rows than a vector has lanes, a vocabulary that no tile divides, a third of the rows not read."""
    x = samples.linear(13, 301, 24, dtype, device=device)
    return x, torch.arange(13, device=device) % 3 != 1


def _row_truth(project, inputs, x, mask):
    """logp, lse and entropy by plain torch in float64 from the same rounded inputs, and those inputs."""
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    logits = project(*wide)
    logp = logits.log_softmax(-1)
    rows = (logp.gather(-1, x.labels[:, None])[:, 0], logits.logsumexp(-1), -(logp.exp() * logp).sum(-1))
    return [torch.where(mask, row, 0.0) for row in rows], wide


def _compare_rows(found, truth, x, inputs):
    outputs = (found.logp, found.lse, found.entropy)
    torch.autograd.backward(outputs, list(x.upstream))
    torch.autograd.backward(truth, list(x.upstream.double()))
    values = dict(zip(("logp", "lse", "entropy"), zip(outputs, truth, strict=True), strict=True))
    return values, {name: (ours.grad, wide.grad) for name, (ours, wide) in inputs.items()}


def _check_segments(op, backend, device, dtype):
    """A segment of one token, a long one, an empty one."""
    cu_seqlens = torch.tensor([0, 1, 70, 70, 97], device=device)
    x = torch.randn(97, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    parts = [x[a:b].double() for a, b in cu_seqlens.cpu().unfold(0, 2, 1).tolist()]
    sums = torch.stack([part.sum() for part in parts])
    v, last = x[:4], torch.zeros(97, dtype=torch.float64, device=device)
    last[[0, 69, 96]] = v.double()[[0, 1, 3]]
    whole = {"total": 97, "backend": backend}
    values = {
        "sum": (segments.segment_sum(x, cu_seqlens, backend=backend), sums),
        "mean": (segments.segment_mean(x, cu_seqlens, backend=backend), sums / cu_seqlens.diff().clamp(min=1)),
        "broadcast": (
            segments.segment_broadcast(v, cu_seqlens, **whole),
            v.double().repeat_interleave(cu_seqlens.diff()),
        ),
        "put_last": (segments.segment_put_last(v, cu_seqlens, **whole), last),
    }
    return values, {}


def _check_loss(op, backend, device, dtype):
    """Four sequences of different length, weighted tokens: the library in float32, the plain formula in float64."""
    random = torch.Generator().manual_seed(0)
    logp, ref_logp = -torch.rand(2, 4, 9, generator=random).to(device)
    mask = (torch.arange(9) < torch.tensor([9, 4, 6, 1])[:, None]).to(device)
    token_weight = 0.5 + torch.rand(4, 9, generator=random).to(device)
    ours, truth = (_loss_of(op, logp.to(d), ref_logp.to(d), mask, token_weight.to(d)) for d in (dtype, torch.float64))
    return {"loss": (ours[0], truth[0])}, {"dlogp": (ours[1], truth[1])}


def _loss_of(name, logp, ref_logp, mask, token_weight):
    options, logp = Options(loss=name), logp.requires_grad_()
    tokens = Tokens(mask, token_weight, ref_logp if reads_reference(options) else None)
    exact = logp.dtype == torch.float64
    loss = plain_loss(options, logp, tokens) if exact else library_loss(options, logp, tokens).loss
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


# ---- helpers -------------------------------------------------------------------------------------------------------


def _guarded(case, op, backend, device, dtype):
    """Checks of one case; an exception is a failed check, not the end of the others."""
    where = (op, backend, device, str(dtype).removeprefix("torch."))
    try:
        values, gradients = case(op, backend, device, dtype)
    except Exception as error:  # noqa: BLE001
        return [Check(*where, "run", math.inf, 0.0, f"{type(error).__name__}: {error}")]
    bounds = zip((values, gradients), BOUNDS[dtype], strict=True)
    return [Check(*where, name, _relative(*pair), bound) for pairs, bound in bounds for name, pair in pairs.items()]


def _relative(value, truth):
    return ((value.double() - truth).norm() / truth.norm()).item()


def _row_backends(device, dtype):
    return [name for name in _choose.ROW_BACKENDS if _runs(name, device, dtype)]


def _fused_reason(device, dtype):
    return _choose.fused_reason(dtype, _choose.arch(torch.empty(0, device=device)), _choose.backends())


def _runs(backend, device, dtype):
    try:
        _choose.pick(backend, device, dtype, _choose.backends())
    except RuntimeError:
        return False
    return True


def _segment_backends(device):
    try:
        missing = _native.missing(torch.device(device))
    except RuntimeError:  # it must run, and cannot: its check says why
        missing = None
    return ["reference"] if missing else ["reference", "native"]


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpu(index):
    properties = torch.cuda.get_device_properties(index)
    found = f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory >> 20} MiB"
    archs = _native.architectures()
    arch = _native.serves(archs, properties.major, properties.minor)
    if arch:
        return f"{found}, native ops by {arch}"
    return f"{found}, no native ops" + (": not among the architectures above" if archs else "")


def _finite(error):
    return error if math.isfinite(error) else str(error)  # JSON has no inf


def _text(found):
    for title, facts in found.items():
        yield title
        width = max(map(len, facts))
        yield from (f"  {name:<{width}}  {fact}" for name, fact in facts.items())


def _lines(checks):
    """One line for each op, backend, device and dtype."""
    yield "self-test: relative error against float64"
    groups = {}
    for check in checks:
        groups.setdefault(check[:4], []).append(check)
    width = max((len(where[0]) for where in groups), default=0)
    for where, group in groups.items():
        mark = "ok   " if all(check.passed for check in group) else "WRONG"
        numbers = "  ".join(check.note or f"{check.quantity} {check.error:.1e}" for check in group)
        yield f"  {mark} {where[0]:<{width}} {where[1]:<12} {where[2]:<4} {where[3]:<8}  {numbers}"


def _verdict(checks):
    failed = [check for check in checks if not check.passed]
    if not failed:
        return f"all {len(checks)} checks are within their bounds"
    worst = [f"{c.op} {c.backend} {c.dtype} {c.quantity} ({c.error:.1e}, bound {c.bound:g})" for c in failed]
    return f"{len(failed)} of {len(checks)} checks failed: {', '.join(worst)}"

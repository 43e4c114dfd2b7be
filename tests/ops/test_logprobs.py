"""linear_logprobs and token_logprobs: golden values, derivatives, error budgets, limits, refusals."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from host_reads import reads
from torch.testing import assert_close

import finealign_kernels as fk
from finealign_kernels.formulas import logprobs as formula
from finealign_kernels.ops import _choose, _chunked
from finealign_kernels.testing import budgets, samples

ALL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
BACKENDS = ("torch", "native", "triton")
WORKSPACES = (0, "full")
HALVES = (torch.bfloat16, torch.float16)
TRITON = (
    (torch.float32, 0, "host"),
    (torch.float32, 9 * 203 * 4, "host"),
    (torch.bfloat16, 3 * 203 * 2, "host"),
    (torch.bfloat16, "full", "device"),
    (torch.float16, "full", "host"),
)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles small enough that little inputs cross every boundary: of rows, of columns, of the workspace."""
    monkeypatch.setattr(_chunked, "tile_of", lambda device: _chunked.Tile(4, 24))


@pytest.fixture
def nine_tiles(monkeypatch):
    """Three by three, with 21 rows and 203 columns, the last of each smaller: few launches for the slow interpreter."""
    monkeypatch.setattr(_chunked, "tile_of", lambda device: _chunked.Tile(8, 72))


def loss_of(out, upstream):
    dlogp, dlse, dentropy = upstream.to(out.logp.dtype)
    loss = (out.logp * dlogp).sum() + (out.lse * dlse).sum()
    return loss if out.entropy is None else loss + (out.entropy * dentropy).sum()


# ---- golden values -------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([[2, 0.5, -1], [0, 1, 3]], dtype=torch.float64)
LABELS = torch.tensor([0, 1])
G = torch.tensor([0.7, -0.2], dtype=torch.float64)
X = torch.tensor([[1, -0.5], [0.3, 2]], dtype=torch.float64)
W = torch.tensor([[0.5, 1], [-1, 0.2], [0.4, -0.6]], dtype=torch.float64)


def near(actual, expected, atol=1e-9):
    assert_close(torch.as_tensor(actual).double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


@pytest.mark.parametrize("name", ("reference", "torch"))
def test_golden_logits(name):
    z = LOGITS.clone().requires_grad_()
    out = fk.token_logprobs(z, LABELS, outputs=("entropy",), backend=name)
    near(out.lse.detach(), [2.2413112967, 3.1698460196])
    near(out.logp.detach(), [-0.2413112967, -2.1698460196])
    near(out.entropy.detach(), [0.6215846047, 0.5242666167])
    (dz,) = torch.autograd.grad((out.logp * G).sum(), z, retain_graph=True)
    near(dz, [[0.1500820758, -0.1227032745, -0.0273788013], [0.0084020132, -0.1771609601, 0.1687589469]])
    (dz,) = torch.autograd.grad(out.entropy.sum(), z)
    near(dz, [[-0.2987415831, 0.1962773309, 0.1024642522], [0.1111409657, 0.187917268, -0.2990582337]])


@pytest.mark.parametrize("name", ("reference", "torch"))
def test_golden_temperature(name):
    z = LOGITS.clone().requires_grad_()
    out = fk.token_logprobs(z, LABELS, temperature=0.7, backend=name)
    near(out.logp.detach(), [-0.1231755391, -2.9259190174])
    (dz,) = torch.autograd.grad((out.logp * G).sum(), z)
    near(dz, [[0.1158915467, -0.1037228665, -0.0121686802], [0.0036711386, -0.2703956012, 0.2667244626]])


@pytest.mark.parametrize("name", ("reference", "torch"))
def test_golden_projection(name):
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    out = fk.linear_logprobs(x, w, torch.tensor([2, 0]), backend=name)
    near(out.logp.detach(), [-0.5079520141, -0.1555431976])
    dx, dw = torch.autograd.grad((out.logp * G).sum(), (x, w))
    near(dx, [[0.076558848, -0.3903658996], [-0.033734381, -0.028465463]])
    near(dw, [[-0.2178090203, 0.0469630536], [-0.0630138826, 0.0788889224], [0.2808229029, -0.1258519761]])


@pytest.mark.parametrize("name", ("reference", "torch", "native", "triton"))
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_golden_head_options(name, workspace, usable):
    exact = name in ("reference", "torch")
    dtype, atol = (torch.float64, 1e-9) if exact else (torch.float32, 5e-7)
    usable(name, "cpu", dtype)
    x, w, b = (t.to(dtype).requires_grad_() for t in (X, W, torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)))
    out = fk.linear_logprobs(
        x,
        w,
        torch.tensor([2, 1]),
        bias=b,
        logit_scale=0.5,
        softcap=2.0,
        temperature=0.7,
        outputs=ALL,
        workspace=workspace,
        backend=name,
    )
    near(out.lse.detach(), [1.2513387558, 1.7577730308], atol)
    near(out.logp.detach(), [-0.551571149, -1.829186725], atol)
    near(out.entropy.detach(), [0.9309586803, 0.7460473284], atol)
    near(out.log_sum_sq_probs, [-0.8212775964, -0.5391298063], atol)
    near(out.mean_logits, [-0.0420071143, 0.2783521735], atol)
    assert out.is_top1.tolist() == [True, False]
    loss = loss_of(out, torch.tensor([[0.7, -0.2], [-0.4, 0.5], [0.3, 0.1]], dtype=torch.float64))
    dx, dw, db = torch.autograd.grad(loss, (x, w, b))
    near(dx, [[-0.0570627484, -0.2362705889], [0.2017719008, 0.2112490358]], atol)
    near(dw, [[-0.1479904142, 0.6252970701], [-0.0702235226, -0.072674044], [0.0181012658, 0.1168814919]], atol)
    near(db, [0.0315032157, -0.1053165755, 0.0591024227], atol)


@pytest.mark.parametrize("name", ("reference", "torch", "native"))
@pytest.mark.parametrize("workspace", (0, 3 * 203 * 2, "full", "auto"))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradient_of_a_float32_bias_beside_a_half_precision_head(small_tiles, name, workspace, dtype):
    """Its sum over rows is as near to float64 as float32 terms are, however the rows come back in backward."""
    s, b = samples.linear(37, 203, 16, dtype), torch.linspace(-1, 1, 203)
    x, w, mask = s.hidden, s.weight, torch.arange(37) % 5 > 0
    for compact, outputs in (("host", ()), ("device", ("entropy",))):
        options = dict(temperature=0.7, outputs=outputs, compact=compact)
        grads = []
        for kind, workspace_of, leaves in (
            ("reference", 0, (x.double(), w.double(), b.double())),
            (name, workspace, (x, w, b)),
        ):
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            out = fk.linear_logprobs(
                *leaves[:2], s.labels, bias=leaves[2], mask=mask, workspace=workspace_of, backend=kind, **options
            )
            grads.append(torch.autograd.grad(loss_of(out, s.upstream), leaves[2])[0])
        exact, found = grads
        assert found.dtype == torch.float32
        assert (found - exact).abs().max() <= 2e-6 * exact.abs().max()


# ---- derivatives ---------------------------------------------------------------------------------------------------


OPTIONS = dict(softcap=1.5, temperature=0.6, logit_scale=1.2)
PAIRWISE = (
    "0 plain host",
    "0 options device",
    "full plain device",
    "full options host",
    "3 plain host",
    "3 options device",
)


@pytest.mark.parametrize(
    "case",
    [
        case if case in PAIRWISE else pytest.param(case, marks=pytest.mark.slow)
        for case in map(" ".join, itertools.product(("0", "full", "3"), ("plain", "options"), ("host", "device")))
    ],
)
def test_gradcheck(small_tiles, case):
    """Rows kept, options and the way to count rows, every two of them together; all three with -m slow."""
    rows, kind, compact = case.split()
    workspace, options = "full" if rows == "full" else int(rows) * 53 * 8, OPTIONS if kind == "options" else {}
    torch.manual_seed(0)
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((6, 2), (53, 2), (53,)))
    labels = torch.randint(53, (6,))
    labels[4] = -100

    def call(x, w, b):
        out = fk.linear_logprobs(
            x, w, labels, bias=b, outputs=("entropy",), workspace=workspace, compact=compact, backend="torch", **options
        )
        return out[:3]

    assert torch.autograd.gradcheck(call, (x, w, b))


def test_reference_has_second_derivatives():
    x, w = (
        torch.randn(3, 2, dtype=torch.float64, requires_grad=True),
        torch.randn(5, 2, dtype=torch.float64, requires_grad=True),
    )
    labels = torch.tensor([0, 4, -100])

    def call(x, w):
        return fk.linear_logprobs(x, w, labels, outputs=("entropy",), backend="reference")[:3]

    assert torch.autograd.gradgradcheck(call, (x, w))


EVERY = [
    (backend, dtype, workspace, compact)
    for backend in BACKENDS
    for dtype in (torch.float32, *HALVES)
    for workspace in (0, "full", 9 * 203 * 4, 3 * 203 * 2)
    for compact in ("host", "device")
    # the interpreter is slow: Triton takes each dtype once and each kind of rows once
    if backend != "triton" or (dtype, workspace, compact) in TRITON
]


@pytest.mark.parametrize("backend, dtype, workspace, compact", EVERY)
def test_every_backend_agrees_with_float64(nine_tiles, backend, dtype, workspace, compact, usable):
    """Tails of rows and columns, masked rows, dropped rows, banned tokens, rows with and without E, every output."""
    usable(backend, "cpu", dtype)
    n, v, d = 21, 203, 16
    s = samples.linear(n, v, d, dtype, seed=3)
    bias = torch.randn(v)
    bias[5] = bias[77] = -torch.inf
    labels = torch.where((s.labels == 5) | (s.labels == 77), 6, s.labels)
    labels[3], labels[20] = -100, 5  # one is not read, one is banned
    mask = torch.ones(n, dtype=torch.bool)
    mask[7:10] = False
    upstream = s.upstream.clone()
    upstream[:, 12:14] = 0  # no gradient: dropped in backward
    upstream[:2, 15] = 0
    upstream[0, 20] = 0  # the log-prob of a banned label is -inf
    options = dict(bias=bias, mask=mask, temperature=0.8, softcap=9.0, logit_scale=1.1, outputs=ALL)

    def run(hidden, weight, **how):
        hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        b = bias.to(hidden.dtype if hidden.dtype == torch.float64 else torch.float32).requires_grad_()
        out = fk.linear_logprobs(hidden, weight, labels, **{**options, "bias": b, **how})
        finite = out._replace(logp=torch.where(labels == 5, 0, out.logp))
        return out, torch.autograd.grad(loss_of(finite, upstream), (hidden, weight, b))

    out, grads = run(s.hidden, s.weight, workspace=workspace, compact=compact, backend=backend)
    exact, exact_grads = run(s.hidden.double(), s.weight.double(), backend="reference")
    for field, actual, expected in zip(out._fields, out, exact, strict=True):
        if field == "is_top1":
            assert torch.equal(actual, expected)
        else:
            assert_close(actual.double(), expected, rtol=3e-6, atol=3e-6, msg=lambda m, field=field: f"{field}: {m}")
    eps = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for actual, expected, like in zip(grads, exact_grads, (s.hidden, s.weight, bias), strict=True):
        assert actual.dtype == like.dtype
        error = (actual.double() - expected).norm() / expected.norm()
        assert error <= eps, error
    assert grads[0][3].abs().max() == 0 and grads[0][8].abs().max() == 0 and grads[0][12].abs().max() == 0


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
def test_token_logprobs_agrees_with_float64(backend, dtype, usable):
    usable(backend, "cpu", dtype)
    torch.manual_seed(1)
    z = (torch.randn(13, 5003 if backend != "triton" else 515) * 3).to(dtype)
    z[:, 11] = -torch.inf
    labels = torch.randint(12, z.shape[1], (13,))
    labels[5] = -100
    z[5] = torch.nan  # is not read
    upstream = torch.randn(3, 13)
    upstream[:, 9] = 0

    def run(logits, **how):
        logits = logits.clone().requires_grad_()
        out = fk.token_logprobs(logits, labels, temperature=1.3, softcap=8.0, logit_scale=0.9, outputs=ALL, **how)
        return out, torch.autograd.grad(loss_of(out, upstream), logits)[0]

    out, grad = run(z, backend=backend)
    exact, exact_grad = run(z.double(), backend="reference")
    for actual, expected in zip(out[:5], exact[:5], strict=True):
        assert_close(actual.double(), expected, rtol=3e-6, atol=3e-6)
    assert torch.equal(out.is_top1, exact.is_top1)
    assert grad.dtype == dtype and grad[5].abs().max() == 0 and grad[9].abs().max() == 0
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    assert_close(grad.double(), torch.nan_to_num(exact_grad), rtol=tolerance, atol=tolerance / 10)


NARROW = """
import torch, finealign_kernels as fk
from finealign_kernels.ops import _native
print(_native.instructions())
for dtype, tolerance in ((torch.float32, 3e-6), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)):
    for v in (1, 5, 515, 2053):
        torch.manual_seed(v)
        logits, labels, upstream = (torch.randn(6, v) * 4).to(dtype), torch.randint(v, (6,)), torch.randn(3, 6)
        found = []
        for name in ("native", "reference"):
            z = (logits if name == "native" else logits.double()).requires_grad_()
            out = fk.token_logprobs(z, labels, softcap=9.0, temperature=0.7, outputs=("entropy",), backend=name)
            stats = torch.stack(out[:3])
            found.append((stats, torch.autograd.grad((stats * upstream.to(stats.dtype)).sum(), z)[0]))
        for actual, expected in zip(*found):
            bound = tolerance if actual.dtype == dtype else 3e-6
            torch.testing.assert_close(actual.double(), expected.double(), rtol=bound, atol=bound)
"""


@pytest.mark.parametrize("asked", ("baseline", "avx2", "avx512"))
def test_every_instruction_set_of_the_native_rows(asked, usable):
    usable("native")
    run = subprocess.run(
        [sys.executable, "-c", NARROW],
        capture_output=True,
        text=True,
        env={**os.environ, "FINEALIGN_CPU": asked},
        cwd="/",
    )
    assert run.returncode == 0, run.stderr[-2000:]
    chosen = run.stdout.split()[0]
    if asked == "baseline":
        assert chosen == "baseline"
    elif chosen != asked:
        pytest.skip(f"this processor has no {asked}: {chosen} was taken, and is right")


# ---- error budgets (S1 to S4) --------------------------------------------------------------------------------------

PICKS = {"logp": (1, 0, 0), "lse": (0, 1, 0), "entropy": (0, 0, 1), "together": (1, 1, 1)}


def exact_and_eager(s, upstream, dtype=None, **options):
    """Outputs and gradients of float64 from the same rounded inputs, and of eager PyTorch in their dtype."""
    results = []
    for kind in (torch.float64, dtype or s.hidden.dtype):
        hidden, weight = s.hidden.to(kind).requires_grad_(), s.weight.to(kind).requires_grad_()
        out = samples.eager(hidden, weight, s.labels, **options)
        loss = sum((o * u.to(o.dtype)).sum() for o, u in zip(out, upstream, strict=True))
        results.append(([o.detach() for o in out], torch.autograd.grad(loss, (hidden, weight))))
    return results


@pytest.mark.parametrize("backend", ("torch", "native"))
@pytest.mark.parametrize("spread", samples.SPREADS)
@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
def test_forward_error(backend, dtype, spread, usable):
    usable(backend)
    s = samples.linear(96, 8009, 64, dtype, spread=spread)
    # Near-uniform rows are log V however a half rounds their logits: there eager in float32 is the measure.
    wide = dtype == torch.float32 or spread == "uniform"
    (exact, _), (rounded, _) = exact_and_eager(s, s.upstream, torch.float32 if wide else dtype)
    out = fk.linear_logprobs(s.hidden, s.weight, s.labels, outputs=("entropy",), backend=backend)
    for actual, truth, theirs in zip((out.logp, out.lse, out.entropy), exact, rounded, strict=True):
        budgets.assert_within(actual, truth, theirs, rms_ratio=1.5 if wide else 0.05, max_ratio=2, ulps=1)


@pytest.mark.parametrize("backend", ("torch", "native"))
@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("spread", samples.SPREADS)
@pytest.mark.parametrize("pick", PICKS)
@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
def test_gradient_error(backend, dtype, spread, pick, workspace, usable):
    usable(backend)
    s = samples.linear(64, 4099, 48, dtype, spread=spread)
    upstream = s.upstream * torch.tensor(PICKS[pick])[:, None]
    (_, exact), (_, rounded) = exact_and_eager(s, upstream)
    hidden, weight = s.hidden.requires_grad_(), s.weight.requires_grad_()
    out = fk.linear_logprobs(hidden, weight, s.labels, outputs=("entropy",), workspace=workspace, backend=backend)
    actual = torch.autograd.grad(loss_of(out, upstream), (hidden, weight))
    twice = spread == "uniform" and dtype != torch.float32 and workspace == "full"  # E is rounded, then dZ
    for a, truth, theirs in zip(actual, exact, rounded, strict=True):
        wide = dtype == torch.float32
        budgets.assert_within(
            a, truth, theirs, rms_ratio=1.3 if twice else 1.05, max_ratio=3 if wide else 2, ulps=4 if wide else 1
        )


@pytest.mark.parametrize("backend", ("torch", "native"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_gradient_error_saturated_softcap(backend, dtype, usable):
    """Logits far beyond the cap: the slope 1 - tanh² comes from E there."""
    usable(backend)
    s = samples.linear(64, 2053, 48, dtype, spread="peaked", seed=5)
    (_, exact), (_, rounded) = exact_and_eager(s, s.upstream, softcap=6.0)
    for workspace in WORKSPACES:
        hidden, weight = s.hidden.clone().requires_grad_(), s.weight.clone().requires_grad_()
        out = fk.linear_logprobs(
            hidden, weight, s.labels, softcap=6.0, outputs=("entropy",), workspace=workspace, backend=backend
        )
        actual = torch.autograd.grad(loss_of(out, s.upstream), (hidden, weight))
        for a, truth, theirs in zip(actual, exact, rounded, strict=True):
            wide = dtype == torch.float32
            budgets.assert_within(a, truth, theirs, rms_ratio=1.05, max_ratio=3 if wide else 2, ulps=4 if wide else 1)


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("dtype", HALVES)
def test_no_signed_bias(dtype, workspace):
    s = samples.linear(256, 4099, 64, dtype, seed=9)
    (exact, exact_grads), _ = exact_and_eager(s, s.upstream * torch.tensor([1, 0, 0])[:, None])
    hidden, weight = s.hidden.requires_grad_(), s.weight.requires_grad_()
    out = fk.linear_logprobs(hidden, weight, s.labels, workspace=workspace)
    actual = torch.autograd.grad((out.logp * s.upstream[0]).sum(), (hidden, weight))
    for a, truth in zip((out.logp.detach(), *actual), (exact[0], *exact_grads), strict=True):
        budgets.assert_unbiased(a, truth)


@pytest.mark.parametrize("p", (0.9, 0.99, 0.999, 0.9999))
@pytest.mark.parametrize("v", (32, 131072))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", ("torch", "native"))
def test_confident_tokens(name, dtype, v, p, usable):
    usable(name)
    logits, labels = samples.confident(p, v, dtype)
    exact = logits.double().requires_grad_()
    truth = fk.token_logprobs(exact, labels, outputs=("entropy",), backend="reference")
    true_gradient = -torch.expm1(truth.logp.detach())
    z = logits.clone().requires_grad_()
    out = fk.token_logprobs(z, labels, outputs=("entropy",), backend=name)
    (dz,) = torch.autograd.grad(out.logp.sum(), z)
    at_label = dz.gather(1, labels[:, None])[:, 0].double()
    assert_close(at_label, true_gradient, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=0)
    assert_close(out.logp.double(), truth.logp.detach(), rtol=1e-4, atol=0)
    assert_close(out.entropy.double(), truth.entropy.detach(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ("torch", "native", "triton"))
def test_a_certain_token_keeps_its_gradient(name, usable):
    """1 - p = 1e-6 comes from expm1: as 1 - exp(logp) it would be 6 % off in float32."""
    usable(name)
    logits, labels = samples.confident(1 - 1e-6, 1024)
    z = logits.clone().requires_grad_()
    (dz,) = torch.autograd.grad(fk.token_logprobs(z, labels, backend=name).logp.sum(), z)
    truth = -torch.expm1(fk.token_logprobs(logits.double(), labels, backend="reference").logp)
    assert_close(dz.gather(1, labels[:, None])[:, 0].double(), truth, rtol=1e-4, atol=0)


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("name", ("torch", "native"))
def test_confident_tokens_through_the_head(name, workspace, usable):
    """p = .9999 over a flat tail of 131072 tokens, through the product, its tiles and E."""
    usable(name)
    v = 131072
    logits, labels = samples.confident(0.9999, v)
    hidden = torch.eye(4).requires_grad_()
    out = fk.linear_logprobs(hidden, logits.t(), labels, outputs=("entropy",), workspace=workspace, backend=name)
    truth = fk.token_logprobs(logits.double(), labels, outputs=("entropy",), backend="reference")
    assert_close(out.logp.double(), truth.logp, rtol=1e-4, atol=0)
    assert_close(out.entropy.double(), truth.entropy, rtol=1e-4, atol=0)
    (dx,) = torch.autograd.grad(out.logp.sum(), hidden)
    gap = logits.gather(1, labels[:, None])[:, 0].double()
    assert_close(dx.diagonal().double(), -torch.expm1(truth.logp) * gap, rtol=2e-3, atol=0)


# ---- repeats, layouts, splits (S6, S8, S9) -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_runs_repeat_bit_for_bit(dtype):
    s = samples.linear(70, 3001, 32, dtype)
    first = None
    for _ in range(20):
        hidden, weight = s.hidden.clone().requires_grad_(), s.weight.clone().requires_grad_()
        out = fk.linear_logprobs(hidden, weight, s.labels, outputs=("entropy",))
        now = [out.logp.detach(), *torch.autograd.grad(loss_of(out, s.upstream), (hidden, weight))]
        first = first or now
        assert all(torch.equal(a, b) for a, b in zip(first, now, strict=True))


@pytest.mark.parametrize("compact", ("host", "device"))
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_masked_rows_may_hold_anything(backend, compact, workspace, usable):
    usable(backend)
    s = samples.linear(24, 307, 16)
    mask = torch.ones(24, dtype=torch.bool)
    mask[::3] = False

    def run(hidden, upstream, mask):
        hidden, weight = hidden.clone().requires_grad_(), s.weight.clone().requires_grad_()
        out = fk.linear_logprobs(
            hidden, weight, s.labels, mask=mask, outputs=ALL, workspace=workspace, compact=compact, backend=backend
        )
        return out, torch.autograd.grad((out.logp, out.lse, out.entropy), (hidden, weight), tuple(upstream))

    dirty, dirty_up = s.hidden.clone(), s.upstream.clone()
    junk = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan]).repeat(2)  # of the eight masked rows
    dirty[~mask], dirty_up[:, ~mask] = junk[:, None], junk
    clean, (clean_dx, clean_dw) = run(s.hidden, s.upstream, mask)
    out, (dx, dw) = run(dirty, dirty_up, mask)
    for a, b in zip(out, clean, strict=True):
        assert torch.equal(a, b) and not a[~mask].any()
    assert torch.equal(dx, clean_dx) and not dx[~mask].any() and torch.equal(dw, clean_dw)
    # and the same rows alone: values the same to the bit, dW to 2 units in the last place
    weight = s.weight.clone().requires_grad_()
    alone = fk.linear_logprobs(s.hidden[mask], weight, s.labels[mask], outputs=ALL, backend=backend)
    grads = torch.autograd.grad((alone.logp, alone.lse, alone.entropy), weight, tuple(s.upstream[:, mask]))
    assert (grads[0] - dw).abs().max() <= 2 * budgets.ulp(dw.dtype, dw.abs().max().item())
    if compact == "host":
        assert torch.equal(alone.logp, out.logp[mask])
    else:  # a library product of another height may round otherwise
        assert_close(alone.logp, out.logp[mask], rtol=1e-6, atol=1e-6)


def test_a_nan_upstream_gradient_is_not_zero():
    s = samples.linear(4, 50, 8)
    hidden = s.hidden.requires_grad_()
    out = fk.linear_logprobs(hidden, s.weight, s.labels)
    (dx,) = torch.autograd.grad(out.logp, hidden, torch.tensor([0.0, torch.nan, 0.0, 1.0]))
    assert dx[1].isnan().all() and not dx[0].any() and dx[3].isfinite().all() and dx[3].any()


def test_padded_equals_packed():
    s = samples.linear(24, 500, 16)
    padded = fk.linear_logprobs(s.hidden.view(4, 6, 16), s.weight, s.labels.view(4, 6))
    assert padded.logp.shape == (4, 6)
    assert torch.equal(padded.logp.flatten(), fk.linear_logprobs(s.hidden, s.weight, s.labels).logp)


@pytest.mark.parametrize("cuts", ((0, 40), (0, 1, 40), (0, 13, 27, 40)))
def test_any_split_gives_the_same_gradient(cuts):
    s = samples.linear(40, 997, 24)
    total = 40.0

    def run(pieces):
        hidden, weight = s.hidden.clone().requires_grad_(), s.weight.clone().requires_grad_()
        for a, b in pieces:
            out = fk.linear_logprobs(hidden[a:b], weight, s.labels[a:b])
            ((out.logp * s.upstream[0, a:b]).sum() / total).backward()
        return hidden.grad, weight.grad

    for actual, whole in zip(run(list(zip(cuts, cuts[1:], strict=False))), run([(0, 40)]), strict=True):
        assert (actual - whole).norm() <= 1e-5 * whole.norm()


def test_strided_expanded_and_transposed_inputs(backend, usable):
    usable(backend)
    s = samples.linear(12, 203, 16)
    plain = fk.linear_logprobs(s.hidden, s.weight, s.labels, outputs=("entropy",), backend=backend)
    wide = torch.zeros(24, 32)
    wide[::2, ::2] = s.hidden
    out = fk.linear_logprobs(
        wide[::2, ::2],
        s.weight.t().contiguous().t(),
        s.labels.repeat(2)[::1][:12],
        outputs=("entropy",),
        backend=backend,
    )
    assert_close(out.logp, plain.logp)
    hidden = s.hidden[:1].expand(12, 16).requires_grad_()
    out = fk.linear_logprobs(hidden, s.weight, s.labels, backend=backend)
    assert_close(out.lse, plain.lse[:1].expand(12))
    logits = (s.hidden @ s.weight.t()).t().contiguous().t().requires_grad_()
    out = fk.token_logprobs(logits, s.labels, backend=backend)
    assert_close(out.logp, plain.logp)
    (grad,) = torch.autograd.grad(out.logp.sum(), logits)
    assert_close(grad.sum(-1), torch.zeros(12), atol=1e-6, rtol=0)


# ---- memory (S10, S11) ---------------------------------------------------------------------------------------------


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Sees every torch op: which ones ask the host for a value, and how large the tensors get."""

    def __init__(self):
        super().__init__()
        self.syncs, self.largest, self.made = [], 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if reads(func, args):
            self.syncs.append(func.overloadpacket.__name__)
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes() > self.largest:
                self.largest = t.untyped_storage().nbytes()
        return out


def run_layer(s, compact, workspace, budget_rows="torch", **options):
    """The chunked layer's own Python, under Watch: forward and backward."""
    target = s.labels.clone()
    target[::5] = formula.SKIP
    head = formula.Head()
    watch = Watch()
    with watch, torch.no_grad():
        out = _chunked.fwd(
            s.hidden, s.weight, None, target, head, formula.ENTROPY, workspace, compact == "device", budget_rows
        )
        logp, lse, entropy, _, _, _, m, l, label_slope, _, e, e_max = out
        coef = formula.Coef(*s.upstream, m, l, entropy, logp, label_slope)
        _chunked.bwd(
            coef,
            True,
            s.hidden,
            s.weight,
            None,
            target,
            e,
            e_max,
            head,
            (True, True, False),
            compact == "device",
            budget_rows,
        )
    return watch


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("workspace", (0, _chunked.FULL))
def test_no_host_sync_on_device_counts(dtype, workspace):
    s = samples.linear(40, 301, 16, dtype)
    assert run_layer(s, "device", workspace).syncs == []
    assert run_layer(s, "host", workspace).syncs != []  # the watch sees one where there is one


def test_memory_is_bounded_by_tiles(monkeypatch):
    monkeypatch.setattr(_chunked, "tile_of", lambda device: _chunked.Tile(64, 1024))
    s = samples.linear(512, 8192, 8)
    watch = run_layer(s, "host", 0)
    partials = 512 * 8 * formula.PARTS * 4
    tile = 64 * 1024 * 8  # int64 columns of the torch rows
    assert watch.largest <= max(s.hidden.nbytes, s.weight.nbytes, partials, tile), watch.largest
    assert watch.largest < s.hidden.shape[0] * s.weight.shape[0] * 4 // 16


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_workspace_is_kept_within(dtype):
    s = samples.linear(40, 1000, 8, dtype)
    for budget in (0, 1, 1000 * dtype.itemsize, 10_000, 10**9):
        out = _chunked.fwd(s.hidden, s.weight, None, s.labels, formula.Head(), 0, budget, False, "torch")
        assert out[-2].nbytes <= budget
    assert out[-2].nbytes == 40 * 1000 * dtype.itemsize


def saved_bytes(call):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        call()
    return sum(sizes)


def test_nothing_is_kept_where_no_gradient_is_wanted(monkeypatch):
    budgets_seen = []
    fwd = _chunked.fwd

    def watched(*args):
        budgets_seen.append(args[6])
        return fwd(*args)

    monkeypatch.setattr(_chunked, "fwd", watched)
    s = samples.linear(8, 1000, 8)
    weight = s.weight.clone().requires_grad_()
    fk.linear_logprobs(s.hidden, s.weight, s.labels, workspace="full")
    with torch.no_grad():
        fk.linear_logprobs(s.hidden, weight, s.labels, workspace="full")
    assert budgets_seen == [0, 0]
    kept = saved_bytes(lambda: fk.linear_logprobs(s.hidden, weight, s.labels, workspace="full"))
    assert budgets_seen[-1] == _chunked.FULL and kept >= 8 * 1000 * 4
    checkpointed = saved_bytes(
        lambda: torch.utils.checkpoint.checkpoint(
            lambda h: fk.linear_logprobs(h, weight, s.labels, workspace="full").logp,
            s.hidden.clone().requires_grad_(),
            use_reentrant=False,
        )
    )
    assert checkpointed <= s.hidden.nbytes + s.weight.nbytes


def test_activation_checkpoint_gives_the_same_gradient():
    s = samples.linear(8, 1000, 8)
    grads = []
    for checkpointed in (False, True):
        hidden, weight = s.hidden.clone().requires_grad_(), s.weight.clone().requires_grad_()

        def call(h, weight=weight):
            return fk.linear_logprobs(h, weight, s.labels, workspace="full").logp

        out = torch.utils.checkpoint.checkpoint(call, hidden, use_reentrant=False) if checkpointed else call(hidden)
        grads.append(torch.autograd.grad((out * s.upstream[0]).sum(), (hidden, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_memory_is_flat_over_many_steps():
    from finealign_kernels.testing import measure

    s = samples.linear(32, 2000, 8)
    hidden, weight = s.hidden.requires_grad_(), s.weight.requires_grad_()

    def steps(count):
        for _ in range(count):
            out = fk.linear_logprobs(hidden, weight, s.labels, workspace="full")
            torch.autograd.grad(out.logp.sum(), (hidden, weight))

    steps(50)
    extra = measure.peak_extra_mib(lambda: steps(300))
    if extra is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert extra < 300 * 32 * 2000 * 4 / 2**20 / 10, extra  # a tenth of what keeping every E would cost


# ---- autograd (S13) ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_a_second_backward_is_exact(workspace):
    s = samples.linear(20, 900, 16)
    hidden, weight = s.hidden.requires_grad_(), s.weight.requires_grad_()
    before = hidden.detach().clone(), weight.detach().clone()
    out = fk.linear_logprobs(hidden, weight, s.labels, outputs=("entropy",), workspace=workspace)
    first = torch.autograd.grad(loss_of(out, s.upstream), (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss_of(out, s.upstream), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(hidden.detach(), before[0]) and torch.equal(weight.detach(), before[1])


def test_double_backward_raises_by_name():
    s = samples.linear(6, 50, 8)
    hidden = s.hidden.requires_grad_()
    out = fk.linear_logprobs(hidden, s.weight, s.labels)
    (dx,) = torch.autograd.grad(out.logp.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprobs: double backward"):
        dx.sum().backward()
    logits = torch.randn(6, 50, requires_grad=True)
    (dz,) = torch.autograd.grad(fk.token_logprobs(logits, s.labels).logp.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="token_logprobs: double backward"):
        dz.sum().backward()


@pytest.mark.parametrize("frozen", ("hidden", "weight"))
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_frozen_inputs(frozen, workspace, monkeypatch):
    s = samples.linear(20, 900, 16)
    hidden, weight = s.hidden.clone().requires_grad_(), s.weight.clone().requires_grad_()
    out = fk.linear_logprobs(hidden, weight, s.labels, workspace=workspace)
    both = dict(zip(("hidden", "weight"), torch.autograd.grad(out.logp.sum(), (hidden, weight)), strict=True))
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    products = []
    real = _chunked.product
    monkeypatch.setattr(_chunked, "product", lambda *a, **k: products.append(1) or real(*a, **k))
    out = fk.linear_logprobs(hidden, weight, s.labels, workspace=workspace)
    live = weight if frozen == "hidden" else hidden
    (grad,) = torch.autograd.grad(out.logp.sum(), live)
    assert torch.equal(grad, both["weight" if frozen == "hidden" else "hidden"])
    assert len(products) == (2 if workspace == "full" else 3)  # no product for the frozen side


def test_inplace_backward_writes_over_the_logits(backend, usable):
    usable(backend)
    logits, labels = torch.randn(7, 300), torch.randint(300, (7,))
    labels[2] = -100
    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(fk.token_logprobs(leaf, labels, backend=backend).logp.sum(), leaf)
    leaf = logits.clone().requires_grad_()
    held = leaf * 1  # what a model's head returns
    out = fk.token_logprobs(held, labels, inplace_backward=True, backend=backend)
    out.logp.sum().backward(retain_graph=True)
    assert_close(leaf.grad, expected)
    assert torch.equal(held.detach(), leaf.grad)
    with pytest.raises(RuntimeError, match="inplace_backward"):
        out.logp.sum().backward()


@pytest.mark.parametrize("name", ("reference", "torch", "native"))
def test_autocast_casts_and_returns_input_dtypes(name, usable):
    usable(name)
    s = samples.linear(20, 900, 16)
    hidden, weight = s.hidden.requires_grad_(), s.weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fk.linear_logprobs(hidden, weight, s.labels, backend=name)
        loss = (out.logp * s.upstream[0]).sum()
    dx, dw = torch.autograd.grad(loss, (hidden, weight))
    half = fk.linear_logprobs(s.hidden.bfloat16(), s.weight.bfloat16(), s.labels, backend=name)
    assert torch.equal(out.logp, half.logp) and out.logp.dtype == torch.float32
    assert dx.dtype == dw.dtype == torch.float32


# ---- hygiene and torch.library (S16, S17) --------------------------------------------------------------------------


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_green_on_poisoned_memory(poisoned, nine_tiles, backend, workspace, dtype, usable):
    usable(backend)
    s = samples.linear(21, 203, 16, dtype)
    labels = s.labels.clone()
    labels[4] = -100
    hidden, weight = s.hidden.requires_grad_(), s.weight.requires_grad_()
    out = fk.linear_logprobs(hidden, weight, labels, outputs=ALL, workspace=workspace, backend=backend)
    upstream = s.upstream.clone()
    upstream[:, 9] = 0
    grads = torch.autograd.grad(loss_of(out, upstream), (hidden, weight))
    assert all(t.isfinite().all() for t in (*out[:5], *grads))
    logits = torch.randn(5, 70).requires_grad_()
    found = fk.token_logprobs(logits, labels[:5].clamp(max=69), outputs=ALL, backend=backend)
    assert all(t.isfinite().all() for t in (*found[:5], *torch.autograd.grad(found.logp.sum(), logits)))


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
def test_native_rows_stay_within_their_tile(dtype, usable):
    """Red zones around every buffer a row kernel writes."""
    usable("native")
    rows, columns, guard = 5, 37, 16
    names = dict(out=dtype, part=torch.float32, e=dtype)
    zones = {name: torch.full((rows, guard + columns + guard), 7.0, dtype=dt) for name, dt in names.items()}
    inner = {name: zone[:, guard : guard + columns] for name, zone in zones.items()}
    part = inner["part"][:, : formula.PARTS]
    x, target = torch.randn(rows, columns).to(dtype), torch.tensor([0, 36, formula.SKIP, formula.BAD, 100])
    first, label = torch.zeros(rows, dtype=torch.int64), torch.full((rows, 2), torch.nan)
    kernels = _choose.rows("native")
    kernels.tile_fwd(x, None, target, 0, formula.Head(), 7, part, first, label, inner["e"])
    coef = torch.stack(
        [torch.ones(rows)] * 3
        + [x.float().amax(-1), torch.ones(rows), torch.ones(rows), -torch.ones(rows), torch.ones(rows)]
    )
    kernels.tile_bwd(inner["out"], x, None, None, None, target, coef, 0, formula.Head())
    assert all((zones[n][:, :guard] == 7).all() and (zones[n][:, guard + columns :] == 7).all() for n in ("out", "e"))
    assert (zones["part"][:, guard + formula.PARTS :] == 7).all() and (inner["out"][2] == 0).all()


@pytest.mark.parametrize("name", ("torch", "native"))
@pytest.mark.parametrize("workspace", (0, 3 * 50 * 4))
def test_opcheck(name, workspace, usable):
    usable(name)
    s = samples.linear(6, 50, 8)
    head = (1.0, 0.0, 1.0)
    ops = torch.ops.finealign
    args = (s.hidden, s.weight, None, s.labels, *head, formula.ENTROPY, workspace, True, False, name)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.linear_logprobs_fwd.default, args, test_utils=checks)
    logp, lse, entropy, _, _, _, m, l, label_slope, allowed, e, e_max = ops.linear_logprobs_fwd(*args)
    state = (s.labels, logp, entropy, m, l, label_slope, allowed, e, e_max, *head, True, name, True, True, False)
    torch.library.opcheck(
        ops.linear_logprobs_bwd.default, (*s.upstream, None, s.hidden, s.weight, None, *state), test_utils=checks
    )
    logits = s.hidden @ s.weight.t()
    torch.library.opcheck(ops.token_logprobs_fwd.default, (logits, s.labels, *head, 7, name), test_utils=checks)
    token = (*s.upstream, s.upstream[0], s.labels, logp, entropy, m, l, label_slope, allowed, *head, name)
    torch.library.opcheck(ops.token_logprobs_bwd.default, (torch.empty_like(logits), logits, *token), test_utils=checks)
    torch.library.opcheck(ops.token_logprobs_bwd.default, (logits, None, *token), test_utils=checks)


@pytest.mark.parametrize("workspace", ("auto", 0, "full"))
def test_compiles_without_a_graph_break(workspace):
    def loss(hidden, weight, labels, mask):
        out = fk.linear_logprobs(hidden, weight, labels, mask=mask, outputs=("entropy",), workspace=workspace)
        return (2 * out.logp + out.entropy).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (12, 20, 33):
        s = samples.linear(n, 300, 16)
        inputs = s.hidden.requires_grad_(), s.weight.requires_grad_()
        mask = torch.arange(n) % 3 > 0
        actual, expected = (f(*inputs, s.labels, mask) for f in (compiled, loss))
        assert torch.equal(actual, expected)
        pairs = zip(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_opcheck_of_native_rows(usable):
    usable("native")
    x, target = torch.randn(4, 33), torch.tensor([0, 32, -2, 5])
    part, first, label = torch.zeros(4, formula.PARTS), torch.zeros(4, dtype=torch.int64), torch.zeros(4, 2)
    e = torch.empty(4, 33)
    args = (x, None, target, 0, 1.0, 0.0, 1.0, 7, part, first, label, e, False)
    torch.library.opcheck(torch.ops.finealign.row_tile_fwd.default, args, test_utils=("test_schema", "test_faketensor"))
    coef = torch.randn(8, 4)
    args = (torch.empty(4, 33), x, None, None, None, target, coef, 0, 1.0, 0.0, 1.0)
    torch.library.opcheck(torch.ops.finealign.row_tile_bwd.default, args, test_utils=("test_schema", "test_faketensor"))


# ---- limits (S15) --------------------------------------------------------------------------------------------------


def test_no_row_is_read(backend, usable):
    usable(backend)
    s = samples.linear(5, 40, 8)
    hidden, weight = torch.full_like(s.hidden, torch.nan).requires_grad_(), s.weight.requires_grad_()
    out = fk.linear_logprobs(hidden, weight, torch.full((5,), -100), outputs=ALL, backend=backend)
    assert all(not t.any() for t in out) and out.logp.requires_grad
    dx, dw = torch.autograd.grad((out.logp + out.entropy).sum(), (hidden, weight))
    assert not dx.any() and not dw.any() and dw.shape == weight.shape


@pytest.mark.parametrize("shape", ((0,), (0, 4), (3, 0)))
def test_empty_batches(backend, shape, usable):
    usable(backend)
    hidden, weight = torch.zeros(*shape, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    out = fk.linear_logprobs(hidden, weight, torch.zeros(shape, dtype=torch.long), outputs=ALL, backend=backend)
    assert out.logp.shape == shape
    dx, dw = torch.autograd.grad(out.logp.sum(), (hidden, weight))
    assert dx.shape == hidden.shape and dw.shape == weight.shape and not dw.any()
    logits = torch.zeros(*shape, 40, requires_grad=True)
    assert fk.token_logprobs(logits, torch.zeros(shape, dtype=torch.long), backend=backend).logp.shape == shape


def test_one_token_vocabulary(backend, usable):
    usable(backend)
    out = fk.token_logprobs(torch.tensor([[3.0], [-1e30]]), torch.tensor([0, 0]), outputs=ALL, backend=backend)
    assert out.logp.tolist() == [0, 0] and out.entropy.tolist() == [0, 0] and out.is_top1.all()


@pytest.mark.parametrize("softcap", (None, 5.0))
def test_banned_tokens_change_nothing(backend, softcap, usable):
    """Every output equals the one over the vocabulary without them, whole tiles of them included."""
    usable(backend)
    torch.manual_seed(2)
    hidden, weight, v = torch.randn(6, 8), torch.randn(200, 8), 200
    free = torch.rand(v) < 0.4
    free[48:120] = False
    free[:3] = True
    bias = torch.where(free, 0.0, -torch.inf)
    labels = torch.randint(int(free.sum()), (6,))
    options = dict(outputs=ALL, softcap=softcap, backend=backend)
    expected = fk.linear_logprobs(hidden, weight[free], labels, **options)
    actual = fk.linear_logprobs(hidden, weight, free.nonzero()[:, 0][labels], bias=bias, **options)
    for a, b in zip(actual[:5], expected[:5], strict=True):
        assert_close(a, b, rtol=2e-6, atol=2e-6)
    assert torch.equal(actual.is_top1, expected.is_top1)


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_a_banned_label_keeps_the_gradient_finite(backend, workspace, usable):
    usable(backend)
    s = samples.linear(4, 60, 8)
    bias = torch.zeros(60)
    bias[s.labels[1]] = -torch.inf
    hidden, weight = s.hidden.requires_grad_(), s.weight.requires_grad_()
    out = fk.linear_logprobs(
        hidden, weight, s.labels, bias=bias, outputs=("entropy",), softcap=3.0, workspace=workspace, backend=backend
    )
    assert out.logp[1] == -torch.inf and out.logp[0].isfinite()
    grads = torch.autograd.grad((out.logp, out.lse, out.entropy), (hidden, weight), tuple(s.upstream))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("logits", ([torch.inf, 0, 1], [-torch.inf] * 3, [torch.nan, 0, 1], [torch.nan] * 3))
def test_rows_that_are_no_distribution_are_nan(backend, logits, usable):
    usable(backend)
    rows = torch.tensor([logits, [0.0, 1.0, 2.0]])
    out = fk.token_logprobs(rows, torch.tensor([1, 1]), outputs=("entropy",), backend=backend)
    assert out.logp[0].isnan() and out.logp[1].isfinite() and out.entropy[1].isfinite()


@pytest.mark.parametrize("offset", (0.0, 1e3, -1e3, 3e4))
def test_a_common_offset_changes_nothing(backend, offset, usable):
    usable(backend)
    torch.manual_seed(0)
    logits = (torch.randn(4, 300) * 64).round() / 64  # exact at the offsets
    labels = torch.randint(300, (4,))
    plain = fk.token_logprobs(logits, labels, outputs=("entropy",), backend=backend)
    moved = fk.token_logprobs((logits * 4).round() / 4 + offset, labels, outputs=("entropy",), backend=backend)
    expected = fk.token_logprobs((logits * 4).round() / 4, labels, outputs=("entropy",), backend=backend)
    assert torch.equal(moved.logp, expected.logp) and torch.equal(moved.entropy, expected.entropy)
    assert not torch.equal(
        plain.logp, expected.logp
    )  # the rounding of the inputs is seen, so equality above means something


def test_rows_with_ties_take_the_first(backend, usable):
    usable(backend)
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0]]).repeat(2, 1)
    out = fk.token_logprobs(logits, torch.tensor([1, 2]), outputs=ALL, backend=backend)
    assert out.is_top1.tolist() == [True, False]
    assert_close(out.lse, torch.logsumexp(logits, -1))


# ---- refusals (S14) ------------------------------------------------------------------------------------------------

H, WEIGHT, Y = torch.randn(6, 8), torch.randn(40, 8), torch.zeros(6, dtype=torch.long)


def call(hidden=H, weight=WEIGHT, labels=Y, **options):
    return fk.linear_logprobs(hidden, weight, labels, **options)


REFUSALS = {
    "hidden width": (
        lambda: call(hidden=torch.randn(6, 9)),
        ValueError,
        r"hidden must have shape \(\.\.\., 8\).*got \(6, 9\)",
    ),
    "hidden type": (lambda: call(hidden=[1.0]), TypeError, "hidden must be a tensor, got a list"),
    "hidden dtype": (
        lambda: call(hidden=Y.view(6, 1).expand(6, 8)),
        TypeError,
        "hidden must have dtype .* got torch.int64",
    ),
    "weight dtype": (lambda: call(weight=WEIGHT.half()), TypeError, "weight must have the dtype of hidden.*float16"),
    "weight rank": (lambda: call(weight=WEIGHT[0]), ValueError, r"weight must have shape \(V, D\).*got \(8,\)"),
    "empty head": (lambda: call(weight=torch.empty(0)), ValueError, "weight must .*ZeRO-3"),
    "meta head": (lambda: call(weight=WEIGHT.to("meta")), ValueError, "weight must hold values, got a meta tensor"),
    "module head": (
        lambda: call(weight=torch.nn.Linear(8, 40)),
        TypeError,
        "weight must be the head's weight.*got Linear",
    ),
    "device": (lambda: call(hidden=H.to("meta")), ValueError, "weight must be on meta.*got cpu"),
    "labels shape": (lambda: call(labels=Y.view(3, 2)), ValueError, r"labels must have shape \(6,\), got \(3, 2\)"),
    "labels dtype": (
        lambda: call(labels=Y.float()),
        TypeError,
        "labels must have dtype int64 or int32, got torch.float32",
    ),
    "labels high": (lambda: call(labels=Y + 40), IndexError, r"labels\[0\] = 40 is outside \[0, 40\)"),
    "labels low": (lambda: call(labels=Y - 7), IndexError, r"labels\[0\] = -7 is outside \[0, 40\)"),
    "mask dtype": (
        lambda: call(mask=torch.ones(6)),
        TypeError,
        "mask must have dtype bool or int64 or int32 or uint8, got torch.float32",
    ),
    "mask shape": (
        lambda: call(mask=torch.ones(5, dtype=torch.bool)),
        ValueError,
        r"mask must have shape \(6,\), got \(5,\)",
    ),
    "bias shape": (lambda: call(bias=torch.zeros(8)), ValueError, r"bias must have shape \(40,\), got \(8,\)"),
    "temperature": (lambda: call(temperature=0), ValueError, "temperature must be a finite number > 0, got 0"),
    "temperature nan": (lambda: call(temperature=math.nan), ValueError, "temperature must be .* got nan"),
    "softcap": (lambda: call(softcap=-1.0), ValueError, "softcap must be a finite number > 0, got -1.0"),
    "scale": (lambda: call(logit_scale=math.inf), ValueError, "logit_scale must be a finite number, got inf"),
    "outputs": (lambda: call(outputs=("entropie",)), ValueError, "outputs must be .* got 'entropie'"),
    "workspace": (
        lambda: call(hidden=H.clone().requires_grad_(), workspace=-1),
        ValueError,
        "workspace must be .* got -1",
    ),
    "compact": (lambda: call(compact="never"), ValueError, "compact must be .* got 'never'"),
    "invariant": (lambda: call(batch_invariant=True, backend="native"), ValueError, "batch_invariant=True runs on"),
    "group": (lambda: call(group=object()), TypeError, "group must be None or a torch.distributed.ProcessGroup"),
    "backend": (lambda: call(backend="cuda"), ValueError, "backend must be .* got 'cuda'"),
    "float64 native": (
        lambda: call(H.double(), WEIGHT.double(), backend="native"),
        RuntimeError,
        "backend 'native' cannot run",
    ),
    "no logits": (lambda: fk.token_logprobs(torch.empty(6, 0), Y), ValueError, r"logits must have shape \(\.\.\., V\)"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case):
    call, kind, message = REFUSALS[case]
    with pytest.raises(kind, match=message):
        call()


def test_a_label_out_of_range_is_named_by_its_place():
    with pytest.raises(IndexError, match=r"labels\[1, 2\] = 41 is outside \[0, 40\)"):
        call(hidden=H.view(2, 3, 8), labels=torch.tensor([[0, 1, 2], [3, 4, 41]]))
    masked = torch.tensor([[True, True, True], [True, True, False]])
    out = call(hidden=H.view(2, 3, 8), labels=torch.tensor([[0, 1, 2], [3, 4, 41]]), mask=masked)
    assert out.logp[1, 2] == 0  # it is not read


@pytest.mark.parametrize("compact", ("device",))
def test_a_label_out_of_range_never_gives_a_number(backend, compact, usable):
    """Where values are not read on the host: NaN in that row alone, and an error word."""
    usable(backend)
    fk.check_errors()
    labels = torch.tensor([0, 40, 1, -3, 2, 3])
    out = call(labels=labels, compact=compact, outputs=ALL, backend=backend)
    wrong = torch.tensor([False, True, False, True, False, False])
    assert torch.equal(out.logp.isnan(), wrong) and torch.equal(out.entropy.isnan(), wrong)
    with pytest.raises(IndexError, match=r"2 labels on cpu were outside \[0, 40\)"):
        fk.check_errors()
    fk.check_errors()


BY_OTHER_PATHS = {
    "temperatures of rows": dict(temperature=torch.ones(6)),
    "an adapter": dict(adapter=(torch.ones(6, 1), torch.zeros(40, 1))),
    "a support": dict(support=torch.arange(40).repeat(6, 1)),
}


@pytest.mark.parametrize("what", BY_OTHER_PATHS)
def test_a_label_out_of_range_is_counted_on_every_path(what):
    fk.check_errors()
    out = call(labels=torch.tensor([0, 40, 1, -3, 2, 3]), compact="device", **BY_OTHER_PATHS[what])
    assert int(out.logp.isnan().sum()) == 2
    with pytest.raises(IndexError, match=r"2 labels on cpu were outside \[0, 40\)"):
        fk.check_errors()


def test_labels_are_counted_in_inference_mode_and_outside_of_it():
    """A count that is first made in inference mode, by a reference's log-probs say, is written by training, too."""
    labels = torch.tensor([0, 41, 1, -3, 2, 3])
    options = dict(weight=torch.randn(41, 8), compact="device")
    with torch.inference_mode():
        call(labels=labels, **options)
    call(labels=labels, **options)
    with pytest.raises(IndexError, match=r"4 labels on cpu were outside \[0, 41\)"):
        fk.check_errors()


def test_debug_mode_checks_at_once(monkeypatch):
    monkeypatch.setenv("FINEALIGN_DEBUG", "1")
    with pytest.raises(IndexError, match=r"labels\[2\] = 99"):
        call(labels=torch.tensor([0, 1, 99, 0, 0, 0]), compact="device")


def test_a_lora_wrapped_head_is_named():
    class LoraLinear(torch.nn.Linear):
        pass

    LoraLinear.__module__ = "peft.tuners.lora.layer"
    advice = "merge it, leave lm_head out of target_modules, or put it in modules_to_save, got LoraLinear"
    with pytest.raises(TypeError, match=advice) as refusal:  # the base weight alone is another model's head
        call(weight=LoraLinear(8, 40))
    assert "base weight" not in str(refusal.value)


@pytest.mark.parametrize("storage", [torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("state", ["quant_state", "SCB"])
def test_a_packed_head_is_called_packed_whatever_it_is_stored_as(state, storage):
    packed = torch.zeros(320, dtype=torch.uint8).view(storage)[:, None]
    setattr(packed, state, object())
    with pytest.raises(TypeError, match=r"^weight must hold the head's values \(V, D\), not packed ones"):
        call(weight=packed)
    setattr(packed, state, None)  # unpacked again: the refusal is another one
    with pytest.raises((TypeError, ValueError), match="must have (dtype|shape)"):
        call(weight=packed)


def test_int32_labels_and_a_sharded_head():
    assert torch.equal(call(labels=Y.int()).logp, call().logp)

    class Sharded(torch.Tensor):
        placements = ()

        def full_tensor(self):
            return self

    with pytest.raises(ValueError, match="weight must be a whole tensor"):
        call(weight=WEIGHT.as_subclass(Sharded))


# ---- the choice of backend -----------------------------------------------------------------------------------------

HERE = {"reference": None, "torch": None, "native": None, "triton": None}


@pytest.mark.parametrize(
    "device, dtype, missing, expected",
    [
        ("cpu", torch.float32, {}, "native"),
        ("cpu", torch.bfloat16, {}, "native"),
        ("cpu", torch.float64, {}, "torch"),
        ("cpu", torch.float32, {"native": "not built"}, "torch"),
        ("cuda", torch.bfloat16, {}, "triton"),
        ("cuda", torch.float64, {}, "torch"),
        ("cuda", torch.bfloat16, {"triton": "not installed"}, "torch"),
        ("mps", torch.float32, {"triton": "no GPU"}, "torch"),
    ],
)
def test_choice(device, dtype, missing, expected):
    assert _choose.pick("auto", device, dtype, {**HERE, **missing}) == expected


def test_a_backend_asked_for_by_name_runs_or_raises_with_its_reason():
    assert _choose.pick("torch", "cuda", torch.float64, HERE) == "torch"
    with pytest.raises(RuntimeError, match="'native' cannot run here: not built"):
        _choose.pick("native", "cpu", torch.float32, {**HERE, "native": "not built"})
    with pytest.raises(RuntimeError, match="run on a CPU, not on cuda"):
        _choose.pick("native", "cuda", torch.float32, HERE)


@pytest.mark.parametrize("total, step, cut", [(0, 4, 0), (10, 4, 0), (10, 4, 10), (10, 4, 6), (8, 4, 4), (3, 4, 1)])
def test_spans_cover_without_crossing(total, step, cut):
    found = _chunked.spans(total, step, cut)
    assert [i for a, b in found for i in range(a, b)] == list(range(total))
    assert all(b - a <= step and (b <= cut or a >= cut) for a, b in found)


@pytest.mark.parametrize("from_logits", (False, True))
@pytest.mark.parametrize(
    "option",
    ({"temperature": 1e-39}, {"softcap": 1e-39}, {"softcap": 1e39}, {"logit_scale": 1e39}, {"logit_scale": -1e39}),
)
def test_numbers_that_float32_does_not_hold_are_refused(option, from_logits):
    hidden, weight, labels = torch.ones(2, 4), torch.ones(5, 4), torch.tensor([0, 1])
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} must be a number that float32 holds"):
        if from_logits:
            fk.token_logprobs(hidden, labels, **option)
        else:
            fk.linear_logprobs(hidden, weight, labels, **option)


@pytest.mark.parametrize("option", ("beta", "shift", "weight of a class"))
def test_numbers_of_a_loss_that_float32_does_not_hold_are_refused(option):
    logp = torch.full((2, 3), -0.5)
    call = {
        "beta": lambda: fk.dpo(logp, logp, beta=1e-39),
        "shift": lambda: fk.dpo(logp, logp, shift=1e39),
        "weight of a class": lambda: fk.kto(logp, logp, torch.ones(2), desirable_weight=1e39),
    }[option]
    with pytest.raises(ValueError, match="must be a number that float32 holds"):
        call()

"""The fused head against float64 and against the chunked layer: compiled where there is a GPU, else interpreted."""

import itertools
import math

import pytest
import torch
from test_gpu import nothing_read
from torch.testing import assert_close

triton = pytest.importorskip("triton")

from finealign_kernels.kernels import linear_logprobs as kernels  # noqa: E402

import finealign_kernels as fk  # noqa: E402
from finealign_kernels.formulas import logprobs as formula  # noqa: E402
from finealign_kernels.ops import _choose, _chunked, _fused  # noqa: E402
from finealign_kernels.testing import budgets, samples  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
FUSED = "triton_fused"
ALL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = math.inf, math.nan
TILE = kernels.Config(16, 16, 16, 4, 1, 8, 2)
CHUNK = _chunked.Tile(8, 32)  # of the chunked layer: two tiles a chunk

MISSING = _choose.fused_reason(torch.float32, _choose.arch(torch.empty(0, device=DEVICE)), _choose.backends())
runs = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles small enough that little inputs cross every boundary."""
    monkeypatch.setattr(kernels, "config", lambda arch, dtype, capped: TILE)
    monkeypatch.setattr(_chunked, "tile_of", lambda device: CHUNK)


def linear(n, v, d, dtype=torch.float32, **options):
    return samples.linear(n, v, d, dtype, device=DEVICE, **options)


def loss_of(out, upstream):
    outputs = [x for x in (out.logp, out.lse, out.entropy) if x is not None]
    loss = sum((x * u.to(x.dtype)).sum() for x, u in zip(outputs, upstream, strict=False))
    if out.mean_logits is None:
        return loss
    return loss + (out.mean_logits * upstream[1].to(out.lse.dtype))[::3].sum()  # those rows do not use E


def assert_outputs(actual, expected, tolerance=3e-6):
    for field, a, b in zip(actual._fields, actual, expected, strict=True):
        if a is None:
            assert b is None
        elif a.dtype == torch.bool:
            assert torch.equal(a, b), field
        else:
            assert_close(
                a.double(), b.double(), rtol=tolerance, atol=tolerance, equal_nan=True,
                msg=lambda m, field=field: f"{field}: {m}",
            )  # fmt: skip


# ---- against float64 -----------------------------------------------------------------------------------------------

N, V, D = 21, 75, 24  # two row tiles, five column tiles in three chunks, one and a half steps: every one ragged
EVERY = [
    (torch.float32, 0, "host"),
    (torch.float32, 11 * V * 4, "device"),
    (torch.float32, "full", "host"),
    (torch.bfloat16, 0, "device"),
    (torch.bfloat16, 5 * V * 2, "host"),
    (torch.bfloat16, "full", "device"),
    (torch.float16, 11 * V * 2, "host"),
    (torch.float16, "full", "device"),
]


class Case:
    """Masked rows that hold NaN, dropped rows, banned tokens and a banned label, every output and option."""

    def __init__(self, dtype):
        s = linear(N, V, D, dtype, seed=3)
        self.hidden, self.weight, self.upstream = s.hidden.clone(), s.weight, s.upstream.clone()
        self.bias = torch.randn(V, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        self.bias[5] = self.bias[48:] = -INF  # the last two tiles are banned, their chunk too
        self.labels = s.labels % 48
        self.labels[self.labels == 5] = 6
        self.labels[3], self.labels[20] = -100, 5
        self.mask = torch.ones(N, dtype=torch.bool, device=DEVICE)
        self.mask[7:10] = False
        self.hidden[[3, 7, 8, 9]] = NAN
        self.upstream[:, 12:14] = 0  # no gradient: dropped in backward
        self.upstream[:2, 15] = 0
        self.upstream[0, 20] = 0  # the log-prob of a banned label is -inf

    def run(self, dtype=None, **how):
        hidden, weight, bias = (
            x.to(dtype or x.dtype).clone().requires_grad_() for x in (self.hidden, self.weight, self.bias)
        )
        options = dict(mask=self.mask, temperature=0.8, softcap=9.0, logit_scale=1.1, outputs=ALL)
        out = fk.linear_logprobs(hidden, weight, self.labels, bias=bias, **options, **how)
        finite = out._replace(logp=torch.where(self.labels == 5, 0, out.logp))
        return out, torch.autograd.grad(loss_of(finite, self.upstream), (hidden, weight, bias))


@runs
@pytest.mark.parametrize("dtype, workspace, compact", EVERY)
def test_agrees_with_float64(small_tiles, poisoned, dtype, workspace, compact):
    case = Case(dtype)
    out, grads = case.run(backend=FUSED, workspace=workspace, compact=compact)
    exact, exact_grads = case.run(torch.float64, backend="reference")
    assert_outputs(out, exact)
    bound = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for actual, expected, like in zip(grads, exact_grads, (case.hidden, case.weight, case.bias), strict=True):
        assert actual.dtype == like.dtype
        assert (actual.double() - expected).norm() <= bound * expected.norm()
    assert not grads[0][[3, 7, 8, 9, 12, 13]].any()


@runs
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_the_chunked_layer(small_tiles, dtype):
    case = Case(dtype)
    fused, fused_grads = case.run(backend=FUSED, workspace="full")
    chunked, grads = case.run(backend="torch", workspace="full")
    assert_outputs(fused, chunked)
    ulps = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for a, b in zip(fused_grads, grads, strict=True):
        assert (a.double() - b.double()).norm() <= ulps * b.double().norm()


@runs
@pytest.mark.parametrize(
    "n, v, d",
    [
        (1, 1, 1),  # one of everything
        (16, 32, 16),  # whole tiles, whole steps
        (17, 33, 17),  # one over
        (15, 31, 15),  # one under
        (3, 130, 40),  # many tiles, the last holds two columns
    ],
)
def test_shapes(small_tiles, n, v, d):
    s = linear(n, v, d)
    outs, grads = [], []
    for backend, dtype in ((FUSED, torch.float32), ("reference", torch.float64)):
        hidden, weight = s.hidden.to(dtype).requires_grad_(), s.weight.to(dtype).requires_grad_()
        outs.append(fk.linear_logprobs(hidden, weight, s.labels, outputs=ALL, backend=backend))
        grads.append(torch.autograd.grad(loss_of(outs[-1], s.upstream), (hidden, weight)))
    assert_outputs(*outs)
    for a, b in zip(*grads, strict=True):
        assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


WAYS = [(0, "host"), (0, "device"), ("full", "device"), (40, "device")]
SMALL = [
    (1, 5, 8),  # a row, less than a tile, half a step
    (5, 16, 3),  # one tile, less than a step that a product needs
    (1, 33, 20),  # a row of three tiles, of which the last holds a column
    (17, 7, 33),
]
PAIRWISE = [  # each two of dtype, workspace and compact together; all three with -m slow
    pytest.param(*case, marks=() if number % 2 == (number // 2) % 2 ^ (number // 4) % 2 else pytest.mark.slow)
    for number, case in enumerate(itertools.product(DTYPES, (0, "full"), ("host", "device")))
]
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of a gradient, relative


def against_float64(s, bound, outputs_within=1e-5, **options):
    """Outputs and gradients of the fused head beside those of the reference in float64 from the same inputs."""
    how = {name: options.pop(name) for name in ("workspace", "compact") if name in options}
    found = []
    for dtype, chosen in ((s.hidden.dtype, {"backend": FUSED, **how}), (torch.float64, {"backend": "reference"})):
        hidden, weight = (x.to(dtype).detach().requires_grad_() for x in (s.hidden, s.weight))
        out = fk.linear_logprobs(hidden, weight, s.labels, outputs=ALL, **options, **chosen)
        found.append((out, torch.autograd.grad(loss_of(out, s.upstream), (hidden, weight))))
    (out, grads), (exact, exact_grads) = found
    assert_outputs(out, exact, outputs_within)
    for actual, truth in zip(grads, exact_grads, strict=True):
        assert actual.dtype == s.hidden.dtype and (actual.double() - truth).norm() <= bound * truth.norm() + 1e-30


@runs
@pytest.mark.parametrize(
    "shape, dtype, way",
    [
        # each dtype with each shape, and with each way; all with -m slow
        pytest.param(shape, dtype, way, marks=() if (shape + way) % 4 == kind else pytest.mark.slow)
        for shape, (kind, dtype), way in itertools.product(range(4), enumerate(DTYPES), range(4))
    ],
)
def test_every_dtype_and_way_at_small_shapes(small_tiles, shape, dtype, way):
    n, v, d = SMALL[shape]
    workspace, compact = WAYS[way]
    against_float64(linear(n, v, d, dtype, seed=n), BOUNDS[dtype], workspace=workspace, compact=compact)


@runs
@pytest.mark.parametrize("dtype, workspace, compact", PAIRWISE)
def test_logits_of_thousands(small_tiles, dtype, workspace, compact):
    """exp(z) has no number there; what is lost is what float32 has not got of z."""
    s = linear(6, 40, 16, dtype, seed=4)
    s = s._replace(hidden=(s.hidden * 2000).to(dtype), weight=(s.weight * 4).to(dtype))
    assert (s.hidden.double() @ s.weight.double().t()).abs().max() > 5000
    against_float64(s, 2e-2, workspace=workspace, compact=compact)


@runs
@pytest.mark.parametrize("dtype, workspace, compact", PAIRWISE)
def test_a_common_offset_cancels(small_tiles, dtype, workspace, compact):
    """Every logit about -1000 or 1000: a maximum that starts at 0, or a sum before the difference, would show."""
    s = linear(6, 40, 16, dtype, seed=5)
    for offset in (-1000.0, 1000.0):
        bias = torch.full((40,), offset, device=DEVICE)
        against_float64(s, BOUNDS[dtype] * 4, 1e-4, workspace=workspace, compact=compact, bias=bias)


@runs
@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize(
    "options", [{}, {"outputs": ALL}, {"outputs": ALL, "softcap": 9.0}], ids=("bare", "all", "capped")
)
@pytest.mark.parametrize("kept", (False, True))
def test_a_logit_that_is_no_number_spoils_its_row_alone(small_tiles, poison, options, kept):
    """One NaN or +inf a row, at both ends of tiles and slices and in the last tile, which is ragged; E kept or not."""
    tokens = [0, 7, 8, 15, 16, 27, 31, 32, 39]
    clean, rows = len(tokens), range(len(tokens))
    s = linear(clean + 1, 40, 32)
    hidden, weight = s.hidden.clone(), s.weight.clone()
    # two columns a token: row i has NaN or +inf at its own token, -inf at those of other rows. Infinities, because a
    # product that overflows is no NaN where it is added without being rounded.
    weight[:, : 2 * clean], hidden[:, : 2 * clean] = 0.0, -1.0
    for row, token in zip(rows, tokens, strict=True):
        weight[token, 2 * row], weight[token, 2 * row + 1] = INF, INF
        hidden[row, 2 * row] = 1.0
        if poison is INF:
            hidden[row, 2 * row + 1] = 1.0
    labels = torch.full_like(s.labels, 20)
    hidden.requires_grad_(kept)
    out = fk.linear_logprobs(hidden, weight, labels, workspace="full", backend=FUSED, **options)
    logits = hidden.detach() @ weight.t()
    capped = poison is INF and "softcap" in options  # the softcap of infinity is a number
    wrong = logits.isnan() if poison is NAN else (logits == INF) & (not capped)
    assert wrong.sum(1).tolist() == [0 if capped else 1] * clean + [0]
    spoilt = wrong.any(1)
    truth = fk.linear_logprobs(hidden.double(), weight.double(), labels, backend="reference", **options)
    for name in ("logp", "lse", *options.get("outputs", ())[:2]):
        found, expected = getattr(out, name), getattr(truth, name)
        assert torch.equal(found.isnan(), spoilt), name
        assert_close(found[~spoilt].double(), expected[~spoilt], rtol=1e-5, atol=1e-5)


@runs
@pytest.mark.parametrize("token", [0, 17, 39])
def test_a_weight_that_is_no_number_spoils_every_row(small_tiles, token):
    s = linear(6, 40, 16)
    weight = s.weight.clone()
    weight[token, 3] = NAN
    out = fk.linear_logprobs(s.hidden, weight, s.labels, outputs=("entropy", "log_sum_sq_probs"), backend=FUSED)
    for name in ("logp", "lse", "entropy", "log_sum_sq_probs"):
        assert getattr(out, name).isnan().all(), name


@runs
@pytest.mark.parametrize("named", [(), *((name,) for name in ALL)])
def test_what_is_named_has_the_bits_it_has_among_all(small_tiles, named):
    s = linear(5, 40, 16)
    everything = fk.linear_logprobs(s.hidden, s.weight, s.labels, outputs=ALL, backend=FUSED)
    out = fk.linear_logprobs(s.hidden, s.weight, s.labels, outputs=named, backend=FUSED)
    for field, value in zip(out._fields, out, strict=True):
        assert value is None if field in set(ALL) - set(named) else torch.equal(value, getattr(everything, field))


PICKS = {"logp": (1, 0, 0), "lse": (0, 1, 0), "entropy": (0, 0, 1), "together": (1, 1, 1)}


@runs
@pytest.mark.parametrize(
    "dtype, spread, way",
    [
        # each dtype with each spread, and each of them with each way; all three together with -m slow. Uniform rows
        # always in every way: near-uniform ones are computed again though their E was kept
        pytest.param(*case, marks=() if spread == "uniform" or (kind + place) % 3 == number else pytest.mark.slow)
        for kind, dtype in enumerate(DTYPES)
        for place, spread in enumerate(samples.SPREADS)
        for number, way in enumerate(((0, "host"), ("full", "host"), ("full", "device")))
        for case in [(dtype, spread, way)]
    ],
)
def test_errors_are_within_eagers(dtype, spread, way):
    s = linear(24, 523, 48, dtype, spread=spread)
    picks = PICKS if dtype == torch.bfloat16 else {"together": PICKS["together"]}
    found = []
    for kind in (torch.float64, dtype):
        hidden, weight = s.hidden.to(kind).requires_grad_(), s.weight.to(kind).requires_grad_()
        out = samples.eager(hidden, weight, s.labels)
        grads = [
            torch.autograd.grad(
                sum((o * u * on).sum() for o, u, on in zip(out, s.upstream.to(out[0].dtype), pick, strict=True)),
                (hidden, weight), retain_graph=True,
            )
            for pick in picks.values()
        ]  # fmt: skip
        found.append(([o.detach() for o in out], grads))
    (exact, exact_grads), (rounded, rounded_grads) = found
    wide = dtype == torch.float32
    hidden, weight = s.hidden.requires_grad_(), s.weight.requires_grad_()
    workspace, compact = way
    how = dict(workspace=workspace, compact=compact, backend=FUSED)
    out = fk.linear_logprobs(hidden, weight, s.labels, outputs="entropy", **how)
    for actual, truth, theirs in zip((out.logp, out.lse, out.entropy), exact, rounded, strict=True):
        if wide or spread != "uniform":  # near-uniform rows are log V however a half rounds their logits
            budgets.assert_within(actual, truth, theirs, rms_ratio=1.5 if wide else 0.05, max_ratio=2, ulps=1)
    for pick, truths, others in zip(picks.values(), exact_grads, rounded_grads, strict=True):
        upstream = s.upstream * torch.tensor(pick, device=DEVICE)[:, None]
        grads = torch.autograd.grad(loss_of(out, upstream), (hidden, weight), retain_graph=True)
        twice = spread == "uniform" and not wide and workspace == "full"  # E is rounded, then dZ
        for actual, truth, theirs in zip(grads, truths, others, strict=True):
            budgets.assert_within(
                actual, truth, theirs, rms_ratio=1.3 if twice else 1.05, max_ratio=3 if wide else 2,
                ulps=4 if wide else 1,
            )  # fmt: skip


@runs
@pytest.mark.parametrize("workspace", (0, "full"))
def test_confident_tokens_keep_their_digits(workspace):
    v = 4096
    logits, labels = samples.confident(0.9999, v)
    hidden = torch.eye(4, device=DEVICE).requires_grad_()
    weight, labels = logits.t().to(DEVICE), labels.to(DEVICE)  # transposed: rows of stride 1
    out = fk.linear_logprobs(hidden, weight, labels, outputs=("entropy",), workspace=workspace, backend=FUSED)
    truth = fk.token_logprobs(logits.double().to(DEVICE), labels, outputs=("entropy",), backend="reference")
    assert_close(out.logp.double(), truth.logp, rtol=1e-4, atol=0)
    assert_close(out.entropy.double(), truth.entropy, rtol=1e-4, atol=0)
    (dx,) = torch.autograd.grad(out.logp.sum(), hidden)
    gap = logits.to(DEVICE).gather(1, labels[:, None])[:, 0].double()
    assert_close(dx.diagonal().double(), -torch.expm1(truth.logp) * gap, rtol=2e-3, atol=0)


@runs
@pytest.mark.parametrize("workspace", (0, "full"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saturated_softcap(dtype, workspace):
    s = linear(24, 300, 32, dtype, spread="peaked", seed=5)
    results, wide = [], dtype == torch.float32
    for kind in (torch.float64, dtype):
        hidden, weight = s.hidden.to(kind).requires_grad_(), s.weight.to(kind).requires_grad_()
        out = samples.eager(hidden, weight, s.labels, softcap=6.0)
        loss = sum((o * u).sum() for o, u in zip(out, s.upstream.to(out[0].dtype), strict=True))
        results.append(torch.autograd.grad(loss, (hidden, weight)))
    hidden, weight = s.hidden.requires_grad_(), s.weight.requires_grad_()
    out = fk.linear_logprobs(
        hidden, weight, s.labels, softcap=6.0, outputs="entropy", workspace=workspace, backend=FUSED
    )
    actual = torch.autograd.grad(loss_of(out, s.upstream), (hidden, weight))
    for a, truth, theirs in zip(actual, *results, strict=True):
        budgets.assert_within(a, truth, theirs, rms_ratio=1.05, max_ratio=3 if wide else 2, ulps=4 if wide else 1)


# ---- a row alone decides its bits ----------------------------------------------------------------------------------


def exact(n, v, d, dtype=torch.float32):
    """Inputs whose products and sums are exact in float32: the CPU library that the interpreter multiplies with may not
    treat a row alike at every place of a tile, and is not what is tested here."""
    s = linear(n, v, d)
    return s._replace(hidden=(s.hidden * 4).round().div(4).to(dtype), weight=(s.weight * 16).round().div(8).to(dtype))


def rows_of(s, index, **options):
    hidden = s.hidden[index].requires_grad_("workspace" in options)
    options = dict(outputs=ALL, softcap=8.0, temperature=0.7, batch_invariant=True, **options)
    return fk.linear_logprobs(hidden, s.weight, s.labels[index], **options)


def same_bits(actual, expected):
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@runs
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_outputs_depend_on_no_other_row(small_tiles, dtype):
    s = exact(64, 20, 24, dtype)
    whole = rows_of(s, torch.arange(64))
    for n in (1, 15, 17, 63):
        index = (torch.arange(n) + 37 * n) % 64
        assert same_bits(rows_of(s, index), [x[index] for x in whole]), n


SOME = (1, 2, 3, 15, 16, 17, 31, 32, 33, 48, 63, 64)  # about a tile of 16 rows, with each kind of room


@runs
@pytest.mark.parametrize("counts", [SOME, pytest.param(range(1, 65), marks=pytest.mark.slow)], ids=("some", "all"))
def test_a_tiles_states_depend_on_no_other_row(counts):
    """For these numbers of rows, from another place each time, with E and without."""
    s = exact(64, 20, 24, torch.bfloat16)
    head = formula.Head(1.0, 8.0, 1 / 0.7)

    def states(index, room):
        part, first, label = torch.zeros(len(index), 2, 6), torch.zeros(len(index), 2, dtype=torch.int64), None
        part, first, label = part.to(DEVICE), first.to(DEVICE), torch.zeros(len(index), 2, device=DEVICE)
        e = torch.zeros(room * 20, dtype=torch.bfloat16, device=DEVICE)
        rows, kept = kernels.Rows(len(index), index.to(DEVICE)), e if room else None
        state = part, first, label, kept
        kernels.linear_fwd(s.hidden, s.weight, None, s.labels, rows, head, 7, *state, room, 32, TILE)
        return part, first, label, e.view(room, 20)

    *whole, whole_e = states(torch.arange(64), 64)
    for n in counts:
        index, room = (torch.arange(n) + 37 * n) % 64, (n, 0, n // 2)[n % 3]
        *found, e = states(index, room)
        assert same_bits(found, [x[index] for x in whole]) and torch.equal(e, whole_e[index[:room]]), n


@runs
@pytest.mark.parametrize("workspace, compact", [(0, "device"), (9 * 20 * 2, "host"), ("full", "device")])
def test_places_masks_and_workspaces_keep_the_bits(small_tiles, compact, workspace):
    s = exact(64, 20, 24, torch.bfloat16)
    whole = rows_of(s, torch.arange(64))
    rng = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(64, generator=rng)
    mask = (torch.rand(64, generator=rng) < 0.6).to(DEVICE)
    out = rows_of(s, shuffled, mask=mask, workspace=workspace, compact=compact)
    kept = shuffled[mask.cpu()]
    assert same_bits([x[mask] for x in out], [x[kept] for x in whole])
    assert all(not x[~mask].any() for x in out)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="4096 rows by the shipped tiles want a GPU")
@pytest.mark.parametrize("n", (1, 2, 63, 64, 65, 255, 256, 257, 4096))
def test_the_bits_of_rows_with_shipped_tiles(n):
    s = linear(4096, 3000, 80, torch.bfloat16)
    whole = rows_of(s, torch.arange(4096))
    for start in {0, 1000, 4096 - n}:
        index = torch.arange(start, min(start + n, 4096))
        assert same_bits(rows_of(s, index), [x[index] for x in whole])


@runs
def test_runs_repeat_bit_for_bit(small_tiles):
    case = Case(torch.bfloat16)
    for compact in ("host", "device"):
        out, grads = case.run(backend=FUSED, compact=compact)
        again, again_grads = case.run(backend=FUSED, compact=compact)
        assert all(torch.equal(a, b) for a, b in zip((*again, *again_grads), (*out, *grads), strict=True))


# ---- what a kernel writes ------------------------------------------------------------------------------------------


GUARD = 32


def guarded(count, dtype):
    """A flat buffer of `count` cells with red zones around it, and a check of those."""
    whole = torch.full((count + 2 * GUARD,), 7, dtype=dtype, device=DEVICE)
    inner = whole[GUARD : GUARD + count]
    if dtype.is_floating_point:
        inner.fill_(NAN)

    def check():
        assert (whole[:GUARD] == 7).all() and (whole[GUARD + count :] == 7).all(), "wrote outside of its buffer"

    return inner, check


@runs
@pytest.mark.parametrize("live, room", [(21, 0), (21, 9), (17, 21), (0, 21), (1, 30)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_stays_within_its_buffers(small_tiles, dtype, live, room):
    s = linear(N, V, D, dtype)
    tiles = -(-V // TILE.columns)
    part, part_check = guarded(N * tiles * formula.PARTS, torch.float32)
    first, first_check = guarded(N * tiles, torch.int64)
    label, label_check = guarded(N * 2, torch.float32)
    e, e_check = guarded(room * V, dtype)
    index = torch.randperm(N, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    rows = kernels.Rows(N, index, torch.tensor(live, device=DEVICE))
    states = part.view(N, tiles, formula.PARTS), first.view(N, tiles), label.view(N, 2)
    head = formula.Head()
    kernels.linear_fwd(s.hidden, s.weight, None, s.labels, rows, head, 7, *states, e, room, CHUNK.columns, TILE)
    for check in (part_check, first_check, label_check, e_check):
        check()
    assert states[0][:live].isfinite().all() and states[0][live:].isnan().all(), "rows past the count were written"
    assert states[2][:live].isfinite().all() and states[2][live:].isnan().all()

    z = (s.hidden.double() @ s.weight.double().t())[index]
    for c0, c1 in _chunked.spans(V, CHUNK.columns):
        stored = _chunked.e_slice(e, room, c0, c1).double()
        for t in range(c0, c1, TILE.columns):
            tile = z[:, t : min(t + TILE.columns, V)]
            expected = (tile - tile.amax(-1, keepdim=True)).exp()[: min(live, room)]
            here = stored[: len(expected), t - c0 : t - c0 + tile.shape[1]]
            eps = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 6e-4}[dtype]
            assert_close(here, expected, rtol=eps, atol=1e-6)
            assert (here.amax(-1) == 1).all()
        assert stored[live:].isnan().all(), "rows past the count were written"


@runs
@pytest.mark.skipif(GPU, reason="another tile's product rounds as it likes on a GPU")
@pytest.mark.parametrize(
    "dtype, on_device",
    [
        (torch.bfloat16, False),
        (torch.bfloat16, True),
        (torch.float16, False),
        pytest.param(torch.float16, True, marks=pytest.mark.slow),
    ],
)
def test_copied_blocks_give_the_bits_of_pointers(small_tiles, monkeypatch, dtype, on_device):
    """The variant for sm_90 and later, more tiles than programs; rows that are not read hold NaN."""
    s = exact(40, 56, 24, dtype)
    s.hidden[3:9] = NAN
    target = s.labels.clone()
    target[3:9] = formula.SKIP
    found, launched = [], []
    plain = kernels.linear_bwd_tma
    monkeypatch.setattr(kernels, "linear_bwd_tma", lambda *a: launched.append(1) or plain(*a))
    for by_tma in (False, True):
        monkeypatch.setattr(kernels, "TMA", ("interpreter",) if by_tma else ())
        assert kernels.supports_tma(s.weight, "interpreter") == by_tma
        options = (formula.Head(1.1, 8.0, 0.7), 7, 11 * 56 * dtype.itemsize, on_device, FUSED)
        *rows, e, e_max = _fused.fwd(s.hidden, s.weight, None, target, *options)
        of = formula.Rows(*rows)
        upstream = *s.upstream, s.upstream[0]
        coef = formula.coefficients(*upstream, of.logp, of.entropy, of.m, of.l, of.label_slope, of.allowed)
        inputs = (coef, True, s.hidden, s.weight, None, target, e, e_max, options[0])
        dhidden, dweight, _ = _fused.bwd(*inputs, (True, True, False), on_device, FUSED)
        assert bool(launched) == by_tma
        found.append((*rows, e, e_max, dhidden, dweight))
    assert same_bits(*found) and found[0][0].any() and found[0][-2].any() and found[0][-1].any()


@runs
@pytest.mark.skipif(GPU, reason="another tile's product rounds as it likes on a GPU")
@pytest.mark.parametrize("on_device", (False, True))
def test_a_weight_that_moves_between_forward_and_backward(monkeypatch, on_device):
    """Its copy starts at other bytes and takes another kernel and tile: E has the same maxima, gradients their bits."""
    monkeypatch.setattr(kernels, "config", lambda arch, dtype, capped: TILE._replace(rows=128, depth=64, slice=16))
    monkeypatch.setattr(_chunked, "tile_of", lambda device: CHUNK)
    s = exact(40, 56, 24, torch.bfloat16)
    odd = torch.cat([s.weight.new_zeros(1), s.weight.flatten()])[1:].view_as(s.weight)
    tiles, found = [], []
    for name in ("linear_fwd", "linear_bwd"):
        plain = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, plain=plain: tiles.append(a[-1]) or plain(*a))
    monkeypatch.setattr(kernels, "TMA", ("interpreter",))
    for there, back in ((s.weight, s.weight), (odd, s.weight), (s.weight, odd), (odd, odd)):
        assert kernels.supports_tma(there, "interpreter") == (there is s.weight)
        options = (formula.Head(1.1, 8.0, 0.7), 7, 11 * 56 * 2, on_device, FUSED)
        *rows, e, e_max = _fused.fwd(s.hidden, there, None, s.labels, *options)
        of = formula.Rows(*rows)
        upstream = *s.upstream, s.upstream[0]
        coef = formula.coefficients(*upstream, of.logp, of.entropy, of.m, of.l, of.label_slope, of.allowed)
        inputs = (coef, True, s.hidden, back, None, s.labels, e, e_max, options[0])
        dhidden, dweight, _ = _fused.bwd(*inputs, (True, True, False), on_device, FUSED)
        found.append((*rows, e, e_max, dhidden, dweight))
    assert all(same_bits(found[0], other) for other in found[1:]) and found[0][-1].any()
    assert tiles and set(tiles) == {TILE._replace(rows=64, depth=32, slice=16)}


@pytest.mark.parametrize(
    "arch, weight, fits",
    [
        ("sm_90", torch.zeros(8, 64, dtype=torch.bfloat16), True),
        ("sm_80", torch.zeros(8, 64, dtype=torch.bfloat16), False),
        ("gfx942", torch.zeros(8, 64, dtype=torch.bfloat16), False),
        ("sm_100", torch.zeros(8, 60, dtype=torch.bfloat16), False),  # rows of 120 bytes
        ("sm_100", torch.zeros(8, 64), False),  # float32
        ("sm_120", torch.zeros(8, 64, dtype=torch.float16), True),
        ("sm_90", torch.zeros(64, 8).t(), False),  # no stride of 1
        ("sm_90", torch.zeros(8 * 64 + 1)[1:].view(8, 64), False),  # starts at 4 bytes
        ("sm_90", torch.zeros(1, 64).expand(8, 64), False),  # rows one over the other
    ],
)
def test_which_heads_are_copied_by_blocks(arch, weight, fits):
    assert kernels.supports_tma(weight, arch) == fits


# ---- limits --------------------------------------------------------------------------------------------------------


@runs
@pytest.mark.parametrize("compact", ("host", "device"))
def test_a_label_out_of_range_never_gives_a_number(small_tiles, compact):
    fk.check_errors()
    s = linear(6, 40, 16)
    labels = torch.tensor([0, 40, 1, -3, 2, 3], device=DEVICE)
    hidden = s.hidden.requires_grad_()
    if compact == "host" and not GPU:
        with pytest.raises(IndexError, match=r"labels\[1\] = 40 is outside \[0, 40\)"):
            fk.linear_logprobs(hidden, s.weight, labels, backend=FUSED)
        return
    out = fk.linear_logprobs(hidden, s.weight, labels, outputs=ALL, compact=compact, backend=FUSED)
    wrong = torch.tensor([False, True, False, True, False, False], device=DEVICE)
    assert all(torch.equal(x.isnan(), wrong) for x in out[:5]) and not out.is_top1[wrong].any()
    (dx,) = torch.autograd.grad(out.logp.sum(), hidden)
    assert torch.equal(dx.isnan().all(-1), wrong) and torch.equal(dx.isnan().any(-1), wrong)
    with pytest.raises(IndexError, match="2 labels"):
        fk.check_errors()


@runs
@pytest.mark.parametrize("poison", (NAN, INF))
def test_a_row_that_holds_no_number_is_nan_and_alone(small_tiles, poison):
    s = linear(20, 40, 16)
    clean = fk.linear_logprobs(s.hidden, s.weight, s.labels, outputs=ALL, backend=FUSED)
    dirty = s.hidden.clone()
    dirty[4, 3] = poison
    out = fk.linear_logprobs(dirty, s.weight, s.labels, outputs=ALL, backend=FUSED)
    others = torch.arange(20) != 4
    assert out.logp[4].isnan() and out.lse[4].isnan() and out.entropy[4].isnan()
    assert same_bits([x[others] for x in out], [x[others] for x in clean])


@runs
def test_labels_of_the_last_ragged_tile(small_tiles):
    s = linear(8, 40, 16)
    labels = torch.arange(32, 40, device=DEVICE)  # a tile holds 16 columns
    out = fk.linear_logprobs(s.hidden, s.weight, labels, outputs=ALL, softcap=9.0, backend=FUSED)
    exact = fk.linear_logprobs(
        s.hidden.double(), s.weight.double(), labels, outputs=ALL, softcap=9.0, backend="reference"
    )
    assert_outputs(out, exact)


@runs
def test_ties_take_the_first(small_tiles):
    """Equal maxima in one tile, and in two."""
    weight = torch.zeros(40, 16, device=DEVICE)
    weight[[3, 9, 20], 0] = 1.0
    hidden = torch.zeros(4, 16, device=DEVICE)
    hidden[:, 0] = 2.0
    labels = torch.tensor([3, 9, 20, 0], device=DEVICE)
    out = fk.linear_logprobs(hidden, weight, labels, outputs=ALL, backend=FUSED)
    assert out.is_top1.tolist() == [True, False, False, False]
    assert_outputs(out, fk.linear_logprobs(hidden.double(), weight.double(), labels, outputs=ALL, backend="reference"))


@runs
@pytest.mark.parametrize("compact", ("host", "device"))
@pytest.mark.parametrize("n", (0, 5))
def test_no_row_is_read(small_tiles, n, compact):
    hidden = torch.full((n, 16), NAN, device=DEVICE, requires_grad=True)
    weight = torch.randn(40, 16, device=DEVICE, requires_grad=True)
    labels = torch.full((n,), -100, device=DEVICE)
    out = fk.linear_logprobs(hidden, weight, labels, outputs=ALL, compact=compact, backend=FUSED)
    assert all(not x.any() for x in out) and out.logp.requires_grad
    dx, dw = torch.autograd.grad((out.logp + out.entropy).sum(), (hidden, weight))
    assert dx.shape == hidden.shape and not dx.any() and dw.shape == weight.shape and not dw.any()


@runs
@pytest.mark.parametrize("compact", ("host", "device"))
@pytest.mark.parametrize("workspace", (0, "full"))
def test_rows_without_a_gradient(small_tiles, compact, workspace):
    """No active row gives zeros; a NaN upstream keeps its row and reaches no other."""
    s = linear(20, 40, 16)
    hidden, weight = s.hidden.requires_grad_(), s.weight.requires_grad_()
    out = fk.linear_logprobs(hidden, weight, s.labels, workspace=workspace, compact=compact, backend=FUSED)
    zeros = torch.zeros(20, device=DEVICE)
    dx, dw = torch.autograd.grad(out.logp, (hidden, weight), zeros, retain_graph=True)
    assert not dx.any() and not dw.any()
    zeros[3], zeros[18] = NAN, 1.0
    (dx,) = torch.autograd.grad(out.logp, hidden, zeros)
    assert dx[3].isnan().all() and dx[18].isfinite().all() and dx[18].any()
    assert not dx[[i for i in range(20) if i not in (3, 18)]].any()


@runs
@pytest.mark.parametrize("compact", ("host", "device"))
@pytest.mark.parametrize("workspace", (0, 7 * V * 2, "full"))
def test_a_second_backward_is_exact(small_tiles, workspace, compact):
    s = linear(N, V, D, torch.bfloat16)
    hidden, weight = s.hidden.requires_grad_(), s.weight.requires_grad_()
    before = hidden.detach().clone(), weight.detach().clone()
    out = fk.linear_logprobs(
        hidden, weight, s.labels, outputs="entropy", workspace=workspace, compact=compact, backend=FUSED
    )
    first = torch.autograd.grad(loss_of(out, s.upstream), (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss_of(out, s.upstream), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(hidden.detach(), before[0]) and torch.equal(weight.detach(), before[1])


@runs
@pytest.mark.parametrize("frozen", ("hidden", "weight"))
@pytest.mark.parametrize("compact", ("host", "device"))
def test_frozen_inputs(small_tiles, frozen, compact):
    s = linear(9, 40, 16)
    inputs = {"hidden": s.hidden.requires_grad_(), "weight": s.weight.requires_grad_()}
    how = dict(compact=compact, backend=FUSED)
    both = torch.autograd.grad(fk.linear_logprobs(**inputs, labels=s.labels, **how).logp.sum(), list(inputs.values()))
    both = dict(zip(inputs, both, strict=True))
    inputs[frozen].requires_grad_(False)
    live = "weight" if frozen == "hidden" else "hidden"
    (grad,) = torch.autograd.grad(fk.linear_logprobs(**inputs, labels=s.labels, **how).logp.sum(), inputs[live])
    assert torch.equal(grad, both[live])


@runs
@pytest.mark.parametrize("compact", ("host", "device"))
def test_strided_expanded_and_transposed_inputs(small_tiles, compact):
    s = linear(12, 50, 24)
    wide = torch.zeros(24, 48, device=DEVICE)
    wide[::2, ::2] = s.hidden
    views = {"strided": wide[::2, ::2], "transposed": s.hidden.t().contiguous().t(), "one": s.hidden[:1].expand(12, 24)}
    for name, view in views.items():
        found = []
        for hidden, weight in ((view, s.weight.t().contiguous().t()), (view.contiguous(), s.weight)):
            hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
            out = fk.linear_logprobs(hidden, weight, s.labels, compact=compact, backend=FUSED)
            found.append((out.logp, *torch.autograd.grad(loss_of(out, s.upstream), (hidden, weight))))
        for a, b in zip(*found, strict=True):
            assert_close(a, b, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@runs
@pytest.mark.parametrize("workspace", (0, 3 * 50 * 4))
@pytest.mark.parametrize("on_device", (False, True))
def test_opcheck(small_tiles, workspace, on_device):
    s = linear(6, 50, 16)
    head, ops, checks = (1.0, 0.0, 1.0), torch.ops.finealign, ("test_schema", "test_faketensor")
    args = (s.hidden, s.weight, None, s.labels, *head, formula.ENTROPY, workspace, on_device, True, FUSED)
    torch.library.opcheck(ops.linear_logprobs_fwd.default, args, test_utils=checks)
    logp, lse, entropy, _, _, _, m, l, label_slope, allowed, e, e_max = ops.linear_logprobs_fwd(*args)
    state = (s.labels, logp, entropy, m, l, label_slope, allowed, e, e_max, *head, on_device, FUSED, True, True, False)
    args = (*s.upstream, s.upstream[0], s.hidden, s.weight, None, *state)
    torch.library.opcheck(ops.linear_logprobs_bwd.default, args, test_utils=checks)


@runs
def test_a_chunk_holds_whole_tiles():
    s = linear(2, 20, 16)
    with pytest.raises(ValueError, match="chunk must be a multiple of 16"):
        kernels.linear_fwd(
            s.hidden, s.weight, None, s.labels, kernels.Rows(2), formula.Head(), 0, None, None, None, None, 0, 24, TILE
        )


def test_every_shipped_tile_divides_a_chunk():
    tables = (kernels.HALF, kernels.CAPPED, kernels.FLOAT, kernels.PRODUCT, kernels.FLOAT_PRODUCT)
    for tile in (tile for table in tables for tile in table.values()):
        assert kernels.slim(tile).columns == tile.columns
    for arch, capped, want in itertools.product((*_choose.ARCHS, "interpreter"), (False, True), range(8)):
        tile = kernels.forward_config(arch, torch.bfloat16, capped, want)
        assert tile.columns == kernels.config(arch, torch.bfloat16, capped).columns  # of E, for backward
        assert all(_chunked.tile_of(device).columns % tile.columns == 0 for device in ("cpu", "cuda"))


@pytest.mark.parametrize(
    "warps, stages, columns, fit",
    [
        (8, 3, 256, 1),  # as shipped for sm_90
        (8, 3, 128, 1),  # its registers are those of two
        (4, 3, 128, 2),
        (4, 4, 128, 1),  # two would want 256 KB
        (4, 1, 16, 2),
    ],
)
def test_as_many_programs_as_a_multiprocessor_holds(warps, stages, columns, fit):
    tile = kernels.Config(128, columns, 64, warps, stages, 16, 8)
    assert kernels.resident(tile, 2, registers=65536, shared=228 * 1024) == fit


# ---- the choice ----------------------------------------------------------------------------------------------------

HERE = {"reference": None, "torch": None, "native": None, "triton": None}


@pytest.mark.parametrize("arch", _choose.ARCHS)
def test_auto_is_the_chunked_layer_until_measured(arch):
    assert _choose.pick_head("auto", "cuda", torch.bfloat16, HERE, arch) == "triton"
    assert _choose.pick_head("auto", "cuda", torch.bfloat16, HERE, arch, batch_invariant=True) == FUSED
    assert _choose.pick_head(FUSED, "cuda", torch.bfloat16, HERE, arch) == FUSED


def test_a_measured_gpu_takes_the_fused_layer(monkeypatch):
    monkeypatch.setattr(_choose, "FUSED_BY_DEFAULT", frozenset({"sm_90"}))
    assert _choose.pick_head("auto", "cuda", torch.bfloat16, HERE, "sm_90") == FUSED
    assert _choose.pick_head("auto", "cuda", torch.bfloat16, HERE, "sm_100") == "triton"
    assert _choose.pick_head("auto", "cuda", torch.float64, HERE, "sm_90") == "torch"
    assert _choose.pick_head("torch", "cuda", torch.bfloat16, HERE, "sm_90") == "torch"


@pytest.mark.parametrize(
    "dtype, missing, arch, why",
    [
        (torch.bfloat16, {"triton": "triton is not installed"}, "sm_90", "triton is not installed"),
        (torch.float64, {}, "sm_90", "no float64 kernels"),
        (torch.bfloat16, {}, None, "compiled for sm_80, sm_90"),
    ],
)
def test_the_fused_layer_runs_or_raises_with_its_reason(dtype, missing, arch, why):
    with pytest.raises(RuntimeError, match=f"backend 'triton_fused' cannot run here: .*{why}"):
        _choose.pick_head(FUSED, "cuda", dtype, {**HERE, **missing}, arch)
    with pytest.raises(RuntimeError, match=f"batch_invariant=True needs backend 'triton_fused', which cannot.*{why}"):
        _choose.pick_head("auto", "cuda", dtype, {**HERE, **missing}, arch, batch_invariant=True)


def test_an_interpreter_that_is_wrong_about_bfloat16_is_not_used(monkeypatch):
    builder = pytest.importorskip("triton.runtime.interpreter").InterpreterBuilder
    monkeypatch.setattr(builder, "bfloat16_is_right", False, raising=False)
    assert _choose.fused_reason(torch.float16, "interpreter", HERE) is None
    with pytest.raises(RuntimeError, match="interpreter multiplies bfloat16 as if"):
        _choose.pick_head(FUSED, "cpu", torch.bfloat16, HERE, "interpreter")


@pytest.mark.parametrize("name", ("reference", "torch", "native", "triton"))
def test_batch_invariance_is_promised_by_no_other_backend(name):
    with pytest.raises(ValueError, match=f"batch_invariant=True runs on backend 'auto' or 'triton_fused'.*{name}"):
        _choose.pick_head(name, "cuda", torch.bfloat16, HERE, "sm_90", batch_invariant=True)


@pytest.mark.parametrize(
    "capability, amd, line",
    [
        ((8, 0), "", "sm_80"),
        ((8, 6), "", "sm_120"),
        ((8, 9), "", "sm_120"),
        ((9, 0), "", "sm_90"),
        ((10, 0), "", "sm_100"),
        ((10, 3), "", "sm_100"),
        ((12, 0), "", "sm_120"),
        ((7, 5), "", None),
        ((11, 0), "", None),
        ((9, 4), "gfx942:sramecc+:xnack-", "gfx942"),
        ((9, 0), "gfx90a:sramecc+", None),
    ],
)
def test_which_line_serves_a_gpu(capability, amd, line):
    assert _choose.family(capability, amd) == line


def test_logits_that_exist_have_no_fused_backend():
    with pytest.raises(ValueError, match="backend must be .* got 'triton_fused'"):
        fk.token_logprobs(torch.randn(2, 5), torch.tensor([0, 1]), backend=FUSED)


def test_every_line_has_a_tile():
    for arch in (*_choose.ARCHS, "interpreter"):
        for dtype in DTYPES:
            assert all(isinstance(kernels.config(arch, dtype, capped), kernels.Config) for capped in (False, True))


@runs
def test_compiles_without_a_graph_break(small_tiles):
    def loss(hidden, weight, labels, mask):
        out = fk.linear_logprobs(hidden, weight, labels, mask=mask, batch_invariant=True, workspace="full")
        return out.logp.sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (4, 7):
        s = linear(n, 40, 16)
        inputs, mask = (s.hidden.requires_grad_(), s.weight.requires_grad_()), torch.arange(n, device=DEVICE) % 3 > 0
        actual, expected = (f(*inputs, s.labels, mask) for f in (compiled, loss))
        assert torch.equal(actual, expected)
        pairs = zip(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


# ---- backward by counts on the device ------------------------------------------------------------------------------


@runs
@pytest.mark.parametrize(
    "start, stored, live", [(0, 0, 21), (0, 5, 19), (0, 21, 21), (0, 3, 3), (0, 0, 0), (40, 45, 50)]
)
@pytest.mark.parametrize("softcap", (0.0, 9.0))
def test_backward_stops_at_the_count(small_tiles, start, stored, live, softcap):
    """Rows from E and rows by the product again in one tile; nothing past the count is read or written."""
    s, head = linear(N, CHUNK.columns, D, seed=2), formula.Head(1.0, softcap, 1.0)
    z = formula.logits((s.hidden.double() @ s.weight.double().t()), None, head)
    rows = formula.reference(s.hidden.double() @ s.weight.double().t(), None, s.labels, head)
    coef = formula.Coef(*s.upstream.double(), rows.m, rows.l, rows.entropy, rows.logp, rows.label_slope)
    x = s.hidden.double() @ s.weight.double().t()
    expected = formula.tile_gradient(x, None, None, s.labels, coef, 0, head)

    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    tops = torch.stack([z[:, :16].amax(-1), z[:, 16:].amax(-1)], 1)
    e = torch.cat([(z[:, :16] - tops[:, :1]).exp(), (z[:, 16:] - tops[:, 1:]).exp()], 1).float()
    here = min(max(live - start, 0), N)
    kept = min(max(stored - start, 0), N)
    hidden = s.hidden.clone()
    hidden[order[here:]] = NAN  # what is past the count is not read
    e[torch.arange(N), s.labels] = 0.25  # the label's gradient does not come from e, nor its slope
    e[order[kept:]] = NAN
    counts = torch.tensor([stored, live], device=DEVICE)
    ordered = coef.stacked()[:, order].float()
    block = kernels.Block(start, s.labels[order], ordered, order, order, counts)
    out, check = guarded(N * CHUNK.columns, torch.float32)
    dz = out.view(N, CHUNK.columns)
    kernels.linear_bwd(dz, hidden, s.weight, None, block, e, tops.float(), 0, head, TILE)
    check()
    assert_close(dz[:here].double(), expected[order[:here]], rtol=2e-5, atol=2e-6)
    assert dz[here:].isnan().all()

    dx, dw = torch.ones(N, D, device=DEVICE), torch.ones(CHUNK.columns, D, device=DEVICE)
    kernels.bounded_product(dz, s.weight, dx, block, TILE, across=False, add=True)
    kernels.bounded_product(dz.t(), hidden, dw, block, TILE, across=True, add=False)
    true_dx = torch.ones(N, D, dtype=torch.float64, device=DEVICE)
    true_dx[order[:here]] += expected[order[:here]] @ s.weight.double()
    assert_close(dx.double(), true_dx, rtol=1e-5, atol=1e-5)
    assert torch.equal(dx[order[here:]], torch.ones(N - here, D, device=DEVICE))
    assert_close(dw.double(), expected[order[:here]].t() @ s.hidden[order[:here]].double(), rtol=1e-5, atol=1e-5)
    again = torch.ones_like(dw)
    kernels.bounded_product(dz.t(), hidden, again, block, TILE, across=True, add=True)
    assert_close(again, dw + 1, rtol=1e-6, atol=1e-6)


@runs
def test_a_product_again_has_the_bits_it_had(small_tiles):
    """fp32, large logits: with another product's z, p = exp(z - lse) would be off by the difference of the two."""
    s = linear(24, 70, 48, spread="peaked")
    hidden, weight = s.hidden.requires_grad_(), s.weight.requires_grad_()
    grads = {}
    for compact in ("host", "device"):
        out = fk.linear_logprobs(hidden, weight, s.labels, workspace=0, compact=compact, backend=FUSED)
        grads[compact] = torch.autograd.grad(out.lse.sum(), hidden)[0]
    truth = torch.autograd.grad((s.hidden @ s.weight.t()).double().logsumexp(-1).sum(), hidden)[0]
    assert_close(grads["host"], grads["device"], rtol=1e-6, atol=1e-6)
    assert (grads["host"] - truth).norm() <= 1e-6 * truth.norm()


LAUNCHES = ("linear_fwd", "linear_fwd_tma", "combine", "linear_bwd", "linear_bwd_tma", "bounded_product")


@runs
@pytest.mark.parametrize("dtype, workspace", [(torch.float32, 0), (torch.bfloat16, _chunked.FULL)])
@pytest.mark.parametrize("by_tma", (False, True))
def test_no_count_is_read_on_the_host(small_tiles, monkeypatch, dtype, workspace, by_tma):
    """compact="device" can be captured in a graph: between the launches no value is read and no size depends on one."""
    s = linear(12, 40, 16, dtype)
    target = s.labels.clone()
    target[::5] = formula.SKIP
    launched = set()
    for name in LAUNCHES:  # the interpreter reads what a GPU does not
        monkeypatch.setattr(kernels, name, lambda *a, name=name, **k: launched.add(name))
    monkeypatch.setattr(kernels, "TMA", (_choose.arch(s.hidden),) if by_tma else ())

    def both_ways(on_device):
        options = (formula.Head(), formula.ENTROPY, workspace, on_device, FUSED)
        *_, e, e_max = _fused.fwd(s.hidden, s.weight, None, target, *options)
        coef = formula.Coef(*s.upstream, *(torch.ones(12, device=DEVICE) for _ in range(5)))
        inputs = (coef, True, s.hidden, s.weight, None, target, e, e_max)
        _fused.bwd(*inputs, formula.Head(), (True, True, True), on_device, FUSED)

    with nothing_read():
        both_ways(on_device=True)
    by_blocks = by_tma and dtype != torch.float32
    other = {"linear_fwd", "linear_bwd"} if by_blocks else {"linear_fwd_tma", "linear_bwd_tma"}
    assert launched == set(LAUNCHES) - other
    with nothing_read(), pytest.raises(AssertionError, match="the host reads: nonzero"):
        both_ways(on_device=False)


@runs
def test_a_call_reads_nothing_outside_of_its_ops(small_tiles):
    """Checks, targets and the autograd function, with rows left out and labels out of range."""
    s = linear(12, 40, 16)
    labels, mask = s.labels.clone(), torch.arange(12, device=DEVICE) % 3 > 0
    labels[1] = 40
    hidden, weight = s.hidden.requires_grad_(), s.weight.requires_grad_()
    with nothing_read():
        out = fk.linear_logprobs(hidden, weight, labels, mask=mask, compact="device", backend=FUSED)
        torch.autograd.grad(out.logp, (hidden, weight), s.upstream[0])
    with pytest.raises(IndexError, match="1 labels"):
        fk.check_errors()

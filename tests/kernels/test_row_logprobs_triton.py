"""The Triton row kernels against float64: compiled where there is a GPU, else under Triton's interpreter."""

import math
from typing import NamedTuple

import pytest
import torch
from torch.testing import assert_close

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

from finealign_kernels.kernels import _tiles  # noqa: E402
from finealign_kernels.kernels.row_logprobs import SPAN, combine, spans_of, tile_bwd, tile_fwd  # noqa: E402

from finealign_kernels.formulas import logprobs as formula  # noqa: E402

# numpy warns where a lane that is selected away holds inf - inf
pytestmark = pytest.mark.filterwarnings("ignore:(invalid|overflow|divide|underflow).*:RuntimeWarning")

SKIP, BAD = -2, -1
INF, NAN = math.inf, math.nan
COL0 = 50  # the tile is the vocabulary's columns 50, 51, ...; `rest` holds the 50 before
PLAIN = formula.Head()
FULL = formula.Head(0.5, 30.0, 1.25)  # scale, softcap, 1 / temperature; exact in float32
COLUMNS = [1, 5, 1000, 1025, 4099]  # one, few, ragged in one block, one over a block, blocks of 2048 with a ragged end
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL = 7
GUARD = 8  # cells of red zone at each end of a row, rows at each end of a tensor


def guarded(n, width, dtype):
    """A strided (n, width) view, poisoned, and a check that nothing around it was written."""
    poison = NAN if dtype.is_floating_point else -99
    buffer = torch.full((n + 2 * GUARD, width + 2 * GUARD), 7, dtype=dtype, device=DEVICE)
    view = buffer[GUARD : GUARD + n, GUARD : GUARD + width]
    view.fill_(poison)

    def check():
        around = buffer.clone()
        around[GUARD : GUARD + n, GUARD : GUARD + width] = 7
        assert (around == 7).all(), "wrote outside of the view"

    return view, check


class Tile(NamedTuple):
    x: torch.Tensor  # (n, C) raw products
    bias: torch.Tensor | None  # (C,)
    target: torch.Tensor  # (n,)
    rest: torch.Tensor  # (n, COL0) float64 logits of the vocabulary's other columns
    head: formula.Head


ORDINARY, TIES, BANNED, ALL_BANNED, SKIPPED, OUT_OF_RANGE, ELSEWHERE, LAST, ONLY_LABEL = range(9)


def tile(columns, dtype=torch.float32, head=PLAIN, with_bias=False, spread=3.0):
    """One row of each kind named above."""
    seed = torch.Generator().manual_seed(columns)
    x = (torch.randn(9, columns, generator=seed, dtype=torch.float64) * spread).to(dtype)
    target = COL0 + torch.tensor([columns // 2, columns - 1, 0, 0, 0, 0, -7, columns - 1, columns // 3])
    x[TIES] = x[TIES].clamp(max=2)
    x[TIES, [columns // 4, columns // 2, columns - 1]] = 8  # the label is the last of them
    x[BANNED, ::2] = -INF
    x[ALL_BANNED] = -INF
    x[SKIPPED] = NAN
    x[ONLY_LABEL] = -INF
    x[ONLY_LABEL, columns // 3] = 1.5
    target[SKIPPED], target[OUT_OF_RANGE] = SKIP, BAD
    bias = torch.randn(columns, generator=seed).to(DEVICE) if with_bias else None
    rest = torch.randn(9, COL0, generator=seed, dtype=torch.float64) * spread
    return Tile(x.to(DEVICE), bias, target.to(DEVICE), rest, head)


def before_softcap(t: Tile):
    return t.head[0] * (t.x.double().cpu() + (0 if t.bias is None else t.bias.double().cpu()))


def label_slope(t: Tile):
    """1 - tanh² at the label of each row, 1 where there is no softcap, NaN where the label is not in the tile."""
    y, softcap, local = before_softcap(t), t.head[1], t.target.cpu() - COL0
    slope = 1 - torch.tanh(y / softcap) ** 2 if softcap else torch.ones_like(y)
    here = (t.target.cpu() >= 0) & (local >= 0) & (local < y.shape[1])
    return torch.where(here, slope.gather(1, local.clamp(0, y.shape[1] - 1)[:, None])[:, 0], NAN)


def logits(t: Tile):
    _, softcap, inv_temperature = t.head.numbers
    y = before_softcap(t)
    capped = softcap * torch.tanh(y / softcap) if softcap else y
    return torch.where(y == -INF, y, capped) * inv_temperature


def forward(t: Tile, want=ALL, e_dtype=None, in_place=False):
    n, columns = t.x.shape
    part, part_check = guarded(n, 6, torch.float32)
    first, first_check = guarded(n, 1, torch.int64)
    e, e_check = guarded(n, columns, e_dtype) if e_dtype else (None, lambda: None)
    label = torch.full((n + 2, 4), NAN, device=DEVICE)  # red zones around (n, 2)
    tile_fwd(t.x, t.bias, t.target, COL0, t.head, want, part, first[:, 0], label[1:-1, 1:3], e, in_place)
    for check in (part_check, first_check, e_check):
        check()
    assert label[[0, -1]].isnan().all() and label[:, [0, 3]].isnan().all()
    return part.cpu(), first[:, 0].cpu(), label[1:-1, 1:3].cpu(), (t.x if in_place else e)


def expected_state(z, target):
    """part, first, z of the label and e of each row, straight from their definitions, float64."""
    n, columns = z.shape
    part, first = torch.zeros(n, 6, dtype=torch.float64), torch.full((n,), COL0)
    zlabel, e = torch.full((n,), NAN, dtype=torch.float64), torch.zeros_like(z)
    for i in range(n):
        if target[i] == SKIP:
            continue
        m, at = max((value, -j) for j, value in enumerate(z[i].tolist()))  # the first of equals
        e[i] = torch.where(z[i] == -INF, 0, (z[i] - m).exp())
        others = torch.cat([z[i, :-at], z[i, 1 - at :]])
        others = others[others != -INF]
        p = (others - m).exp()
        allowed = z[i][z[i] != -INF]
        sums = (p.sum(), ((others - m) * p).sum(), (p * p).sum(), allowed.sum(), len(allowed))
        part[i] = torch.tensor([m, *sums], dtype=torch.float64)
        if 0 <= target[i] - COL0 < columns:
            zlabel[i] = z[i, target[i] - COL0]
            first[i] = target[i] if COL0 - at == target[i] else -1
    return part, first, zlabel, e


def whole(part):
    """float64 states, whose sum of z stands in units of 2^24 on a GPU."""
    return part.cpu().double() * torch.tensor([1, 1, 1, 1, formula.UNIT, 1], dtype=torch.float64)


@pytest.mark.parametrize("head, with_bias", [(PLAIN, False), (FULL, True)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
def test_forward(columns, dtype, head, with_bias):
    t = tile(columns, dtype, head, with_bias)
    part, first, label, e = forward(t, e_dtype=torch.float32)
    part64, first64, zlabel64, e64 = expected_state(logits(t), t.target.cpu())
    assert_close(whole(part), part64, rtol=5e-6, atol=5e-6)
    assert torch.equal(first, first64)
    assert_close(label[:, 0].double(), zlabel64, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert_close(label[:, 1].double(), label_slope(t), rtol=1e-5, atol=1e-30, equal_nan=True)
    read = t.target.cpu() != SKIP
    assert_close(e.double().cpu()[read], e64[read], rtol=1e-5, atol=1e-30)


def test_a_negative_scale():
    t = tile(5, head=formula.Head(-2.0, 0.0, 1.0))
    t = t._replace(x=t.x[[ORDINARY, LAST]], target=t.target[[ORDINARY, LAST]])
    part, first, *_ = forward(t)
    part64, first64, *_ = expected_state(logits(t), t.target.cpu())
    assert_close(whole(part), part64, rtol=5e-6, atol=5e-6)
    assert torch.equal(first, first64)


@pytest.mark.parametrize("want", range(8))
def test_what_is_not_wanted_is_zero(want):
    t = tile(1025)
    part, everything = forward(t, want)[0], forward(t)[0]
    wanted = [True, True, bool(want & 1), bool(want & 2), bool(want & 4), bool(want & 4)]
    assert torch.equal(part, everything * torch.tensor(wanted)), "a wanted column must have the bits it has with all"


@pytest.mark.parametrize("e_dtype", DTYPES)
def test_e_is_one_at_every_maximum_and_rounds_to_nearest(e_dtype):
    t = tile(1025, torch.bfloat16, FULL, with_bias=True)
    stored, exact = (forward(t, e_dtype=dtype)[3].cpu() for dtype in (e_dtype, torch.float32))
    read = t.target.cpu() != SKIP
    assert torch.equal(stored[read], exact[read].to(e_dtype))
    t = tile(1025, e_dtype)
    assert (forward(t, e_dtype=e_dtype)[3][TIES, [256, 512, 1024]] == 1).all()


def test_the_labels_logit_is_bitwise_the_maximum_where_it_is_the_maximum():
    t = tile(1000, head=formula.Head(0.3, 7.0, 1 / 0.7), with_bias=True)  # nothing here is exact in float32
    t = t._replace(target=COL0 + logits(t).nan_to_num(-INF).argmax(-1).to(DEVICE))
    rows = [ORDINARY, BANNED, LAST, ONLY_LABEL]
    part, _, label, e = forward(t, e_dtype=torch.float32)
    assert torch.equal(part[rows, 0], label[rows, 0])
    assert (e.cpu()[rows].amax(-1) == 1).all()


@pytest.mark.parametrize("columns", [5, 1025, 4099])
def test_e_in_place(columns):
    t = tile(columns, head=FULL, with_bias=True)
    apart = forward(t, e_dtype=torch.float32)
    over, check = guarded(*t.x.shape, torch.float32)
    over.copy_(t.x)
    part, first, label, e = forward(t._replace(x=over), in_place=True)
    check()
    assert torch.equal(part, apart[0]) and torch.equal(first, apart[1])
    assert_close(label, apart[2], rtol=0, atol=0, equal_nan=True)
    read = t.target != SKIP
    assert torch.equal(e[read], apart[3][read])


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("others", ["ordinary", "banned"])
@pytest.mark.parametrize("at", [0, 1030])
def test_a_row_that_holds_nan_or_inf(poison, others, at):
    t = tile(1025 * 2)
    clean = forward(t)[0]
    row = {"ordinary": ORDINARY, "banned": ALL_BANNED}[others]
    t.x[row, at] = poison
    part = forward(t)[0]
    assert part[row, 1].isnan()
    rest = [i for i in range(len(part)) if i != row]
    assert torch.equal(part[rest], clean[rest])


def test_confident_rows_keep_their_digits():
    columns, p = 4096, torch.tensor([0.9, 0.99, 0.999, 0.9999, 0.99999], dtype=torch.float64)
    x = torch.zeros(len(p), columns)
    x[torch.arange(len(p)), [3, 2047, 2048, 4095, 0]] = (p / (1 - p) * (columns - 1)).log().float()
    part = forward(Tile(x.to(DEVICE), None, torch.full((len(p),), SKIP + 1, device=DEVICE), None, PLAIN))[0]
    r = x.double().exp().sum(-1) / x.double().amax(-1).exp() - 1
    t = -(columns - 1) * x.double().amax(-1) * (-x.double().amax(-1)).exp()
    assert_close(part[:, 1].double(), r, rtol=1e-5, atol=0)
    assert_close(part[:, 2].double(), t, rtol=1e-5, atol=0)


@pytest.mark.parametrize("offset", [1e3, -1e3])
def test_common_offset(offset):
    t = tile(1025)
    t = t._replace(x=(t.x * 1024).round() / 1024)  # sums with 1000 are then exact
    moved = t._replace(x=t.x + offset)
    part, first, *_ = forward(t)
    part_moved, first_moved, *_ = forward(moved)
    assert_close(part_moved[:, 1:4], part[:, 1:4], rtol=1e-6, atol=1e-7)
    assert torch.equal(first, first_moved)
    held = (t.target != SKIP).cpu()
    assert torch.equal(part_moved[held, 0], part[held, 0] + offset)


def test_a_row_depends_on_no_other_row():
    t = tile(4099, torch.bfloat16)
    together = forward(t, e_dtype=torch.bfloat16)
    assert torch.equal(forward(t)[0], together[0]), "two runs differ"
    for i in (ORDINARY, LAST):
        alone = forward(t._replace(x=t.x[i : i + 1], target=t.target[i : i + 1]), e_dtype=torch.bfloat16)
        assert torch.equal(alone[0][0], together[0][i]) and torch.equal(alone[3][0], together[3][i])


# ---- rows of several spans -----------------------------------------------------------------------------------------

LONG = (SPAN + 1, 2 * SPAN + 700)


def long_forward(t: Tile, e_dtype=None):
    """As forward, part (n, spans, 6) and first (n, spans)."""
    n, columns = t.x.shape
    spans = spans_of(columns)
    part, part_check = guarded(n, spans * 6, torch.float32)
    first, first_check = guarded(n, spans, torch.int64)
    e, e_check = guarded(n, columns, e_dtype) if e_dtype else (None, lambda: None)
    label = torch.full((n, 2), NAN, device=DEVICE)
    part = part.unflatten(1, (spans, 6))
    tile_fwd(t.x, t.bias, t.target, COL0, t.head, ALL, part, first, label, e)
    for check in (part_check, first_check, e_check):
        check()
    return part, first, label, e


@pytest.mark.parametrize("head, with_bias", [(PLAIN, False), (FULL, True)])
@pytest.mark.parametrize("columns", LONG)
def test_every_span_has_a_state_of_its_own(columns, head, with_bias):
    t = tile(columns, torch.bfloat16, head, with_bias)
    part, first, label, e = long_forward(t, torch.float32)
    for s, begin in enumerate(range(0, columns, SPAN)):
        here = slice(begin, begin + SPAN)
        target = t.target.cpu()
        target = target.where(target < COL0, (target - begin).clamp(min=0))
        part64, first64, zlabel64, e64 = expected_state(logits(t)[:, here], target)
        assert_close(whole(part[:, s]), part64, rtol=5e-6, atol=5e-6)
        assert torch.equal(first[:, s].cpu(), torch.where(first64 < 0, first64, first64 + begin))
        labelled = ~zlabel64.isnan()
        assert_close(label[:, 0].cpu().double()[labelled], zlabel64[labelled], rtol=1e-6, atol=1e-6)
        read = t.target.cpu() != SKIP
        assert_close(e[:, here].double().cpu()[read], e64[read], rtol=1e-5, atol=1e-30)
    assert_close(label[:, 1].cpu().double(), label_slope(t), rtol=1e-5, atol=1e-30, equal_nan=True)


def test_combine_is_its_formula():
    t = tile(LONG[-1], torch.bfloat16, FULL, with_bias=True)
    t.x[LAST, -1] = INF
    states = [x.contiguous() for x in long_forward(t)[:3]]
    part, first, label = (x.cpu().double() if x.is_floating_point() else x.cpu() for x in states)
    for want in range(8):
        found, exact = combine(*states, t.target, want), formula.combine(part, first, label, t.target.cpu(), want)
        for a, b in zip(found, exact, strict=True):
            assert_close(a.cpu().to(b.dtype), b, rtol=2e-6, atol=2e-6, equal_nan=True)


def test_combine_when_a_span_holds_nothing():
    """Banned tokens alone, before and after the maximum; a NaN behind them is seen."""
    t = tile(2 * SPAN + 5)
    t.x[:, :SPAN], t.x[LAST, SPAN : 2 * SPAN], t.x[TIES, 3] = -INF, -INF, NAN
    part, first, label, _ = long_forward(t)
    found = combine(part.contiguous(), first.contiguous(), label, t.target, ALL)
    lse = logits(t).logsumexp(-1)
    assert found.lse[TIES].isnan() and found.lse[ALL_BANNED].isnan()
    for row in (ORDINARY, BANNED, LAST):
        assert_close(found.lse[row].cpu().double(), lse[row], rtol=1e-6, atol=1e-6)


def test_spans_do_not_depend_on_the_number_of_rows():
    t = tile(LONG[-1], torch.bfloat16, FULL, with_bias=True)
    up = upstream(t)
    together, gradient = long_forward(t), backward(t, up.coef)
    for i in (ORDINARY, LAST):
        one = t._replace(x=t.x[i : i + 1], target=t.target[i : i + 1])
        for a, b in zip(long_forward(one)[:3], together, strict=False):
            assert_close(a[0], b[i], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(backward(one, up.coef[:, i : i + 1].contiguous())[0], gradient[i])


@pytest.mark.parametrize("columns", LONG)
def test_backward_of_several_spans(columns):
    t = tile(columns, torch.float32, FULL, with_bias=True)
    up = upstream(t)
    assert_gradient(backward(t, up.coef), up.dx)
    part, _, _, e = long_forward(t, torch.float32)
    out, check = guarded(*t.x.shape, torch.float32)
    tile_bwd(out, e, None, part[..., 0].contiguous(), t.bias, t.target, up.coef, COL0, t.head, SPAN)
    check()
    # a softcap's slope takes log e: of a tiny one it has fewer digits
    assert_gradient(out[[ORDINARY, TIES, ONLY_LABEL]], up.dx[[ORDINARY, TIES, ONLY_LABEL]], rtol=1e-4)


# ---- backward ------------------------------------------------------------------------------------------------------


class Upstream(NamedTuple):
    coef: torch.Tensor  # (8, n) float32: g, k, h, m, l, H, logp, 1 - tanh² at the label
    dx: torch.Tensor  # (n, C) float64, by autograd


def upstream(t: Tile, which="gkh"):
    """Random upstream gradients over rest + tile, and what autograd makes of them in float64."""
    n, columns = t.x.shape
    read = t.target.cpu() != SKIP
    x = torch.where(read[:, None], t.x.double().cpu(), 0).requires_grad_()
    scale, softcap, inv_temperature = t.head.numbers
    y = scale * (x + (0 if t.bias is None else t.bias.double().cpu()))
    allowed = y != -INF
    y = torch.where(allowed, y, 0.0)  # autograd through tanh(-inf) is NaN
    z = (softcap * torch.tanh(y / softcap) if softcap else y) * inv_temperature
    allowed = torch.cat([torch.ones_like(t.rest, dtype=torch.bool), allowed], 1)
    z = torch.where(allowed, torch.cat([t.rest, z], 1), -INF)
    lse = z.logsumexp(-1)
    d = torch.where(allowed, z - lse[:, None], 0.0)
    entropy = -(d * d.exp() * allowed).sum(-1)
    label = t.target.cpu()
    logp = z.gather(1, label.clamp(min=0)[:, None])[:, 0] - lse
    seed = torch.Generator().manual_seed(n + columns)
    g, k, h = torch.randn(3, n, generator=seed, dtype=torch.float64) * torch.tensor([[c in which] for c in "gkh"])
    has_label = (label >= 0) & (logp != -INF)
    loss = torch.where(has_label, g * logp, -g * lse) + k * lse + h * entropy
    (dx,) = torch.autograd.grad(torch.where(read, loss, 0).sum(), x)
    m = z.amax(-1)
    logp = torch.where(label == BAD, NAN, logp)
    rows = [g, k, h, m, lse - m, entropy, logp, label_slope(t).nan_to_num(1)]
    coef = torch.stack([row.detach() for row in rows]).float()
    coef[:, ~read] = NAN  # nothing of such a row may be looked at
    return Upstream(coef.to(DEVICE), torch.where(read[:, None], dx, 0))


def backward(t: Tile, coef, out_dtype=torch.float32, src=None, e_max=None, index=None):
    out, check = guarded(len(t.target), t.x.shape[1], out_dtype)
    tile_bwd(out, t.x if src is None else src, index, e_max, t.bias, t.target, coef, COL0, t.head)
    check()
    return out


def assert_gradient(actual, exact, rtol=2e-5):
    """Within rtol of the row's largest gradient too: near a zero of d + H float32 has no digits."""
    scale = exact.abs().amax(-1, keepdim=True)
    error = (actual.double().cpu() - exact).abs()
    bound = rtol * exact.abs() + 2e-6 * scale
    assert (error <= bound).all(), f"worst {(error / bound.clamp(min=1e-300)).max():.3g} of the bound"


@pytest.mark.parametrize("head, with_bias", [(PLAIN, False), (FULL, True)])
@pytest.mark.parametrize("columns, which", [*((c, "gkh") for c in COLUMNS), (1025, "g"), (1025, "k"), (1025, "h")])
def test_backward(columns, which, head, with_bias):
    t = tile(columns, torch.float32, head, with_bias)
    up = upstream(t, which)
    assert_gradient(backward(t, up.coef), up.dx)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_dtypes(dtype, out_dtype):
    t = tile(1025, dtype, FULL, with_bias=True)
    up = upstream(t)
    exact = backward(t, up.coef)
    assert_gradient(exact, up.dx)
    assert torch.equal(backward(t, up.coef, out_dtype), exact.to(out_dtype))


def test_backward_in_place():
    t = tile(4099, head=FULL, with_bias=True)
    up = upstream(t)
    apart = backward(t, up.coef)
    over, check = guarded(*t.x.shape, torch.float32)
    over.copy_(t.x)
    tile_bwd(over, None, None, None, t.bias, t.target, up.coef, COL0, t.head)
    check()
    assert torch.equal(over, apart)


def gradient_from_e(e, e_max, t: Tile, coef):
    """The contract's formulas in float64, from the rounded e."""
    g, k, h, m, l, entropy, logp, own_slope = (c[:, None] for c in coef.double().cpu())
    scale, softcap, inv_temperature = t.head.numbers
    e, e_max = e.double().cpu(), e_max.double().cpu()[:, None]
    p = e * (e_max - m - l).exp()
    d = e.log() + (e_max - m - l)
    dz = torch.where(p > 0, p * (k - g) - h * p * (d + entropy), 0)
    own = -g * torch.expm1(logp) + k * logp.exp() - h * logp.exp() * (logp + entropy)
    own = torch.where(logp == -INF, 0, own)
    is_label = torch.arange(e.shape[1]) + COL0 == t.target.cpu()[:, None]
    dz = torch.where(is_label, own, dz)
    if softcap:
        slope = 1 - ((e.log() + e_max) / inv_temperature / softcap) ** 2
        dz = torch.where(dz == 0, 0, dz * torch.where(is_label, own_slope, slope))
    return torch.where((t.target.cpu() != SKIP)[:, None], dz * scale * inv_temperature, 0)


@pytest.mark.parametrize("head, with_bias", [(PLAIN, False), (FULL, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_from_e(dtype, head, with_bias):
    t = tile(1025, torch.float32, head, with_bias)
    up = upstream(t)
    part, _, _, e = forward(t, e_dtype=dtype)
    parts = torch.stack([part[:, 0], part[:, 1]], 1).to(DEVICE)  # a strided e_max
    dx = backward(t._replace(bias=None), up.coef, src=e, e_max=parts[:, 0])
    assert_gradient(dx, gradient_from_e(e, part[:, 0], t, up.coef))
    if dtype == torch.float32:
        assert_gradient(dx, up.dx, rtol=5e-5)


def test_the_labels_softcap_does_not_come_from_e():
    t = tile(1025, head=formula.Head(1.0, 4.0, 1.0))
    up = upstream(t)
    part, _, _, e = forward(t, e_dtype=torch.bfloat16)
    dx = backward(t, up.coef, src=e, e_max=part[:, 0].to(DEVICE)).double().cpu()
    rows = torch.tensor([ORDINARY, LAST, ONLY_LABEL])
    at = (t.target.cpu() - COL0)[rows]
    assert_close(dx[rows, at], up.dx[rows, at], rtol=2e-5, atol=0)


def test_gathered_rows():
    t = tile(1025, torch.bfloat16)
    up = upstream(t)
    order = torch.tensor([LAST, ORDINARY, SKIPPED, TIES])
    picked = t._replace(target=t.target[order.to(DEVICE)])
    gathered = backward(picked, up.coef[:, order], src=t.x, index=order.to(DEVICE))
    assert torch.equal(gathered, backward(t, up.coef)[order.to(DEVICE)])


def test_rows_without_gradient_are_not_read():
    t = tile(1025)
    up = upstream(t)
    up.coef[:3, [ORDINARY, TIES]] = 0
    up.coef[3:, [ORDINARY, TIES]] = NAN
    t.x[[ORDINARY, TIES]] = NAN
    far = torch.arange(9)
    far[[ORDINARY, TIES, SKIPPED]] = 2**40  # reading there would be out of bounds
    dx = backward(t, up.coef, src=t.x, index=far.to(DEVICE) if GPU else None).cpu()
    assert (dx[[ORDINARY, TIES, SKIPPED]] == 0).all()
    assert (dx[LAST] != 0).all()


def test_a_nan_upstream_keeps_its_row():
    t = tile(1025)
    up = upstream(t)
    up.coef[0, ORDINARY], up.coef[1:3, ORDINARY] = NAN, 0
    dx = backward(t, up.coef)
    assert dx[ORDINARY].isnan().all()
    assert dx[LAST].isfinite().all()


def test_an_entropy_that_was_not_computed_is_not_looked_at():
    t = tile(1025)
    up = upstream(t, "gk")
    up.coef[5] = NAN
    assert_gradient(backward(t, up.coef), up.dx)


def test_confident_label_keeps_its_digits():
    t = tile(1000)
    t.x[ORDINARY], t.x[ORDINARY, 500], t.rest[ORDINARY] = 0, 25, -50  # 1 - p = 1.4e-8
    up = upstream(t, "g")
    dx = backward(t, up.coef)
    assert_close(dx[ORDINARY, 500].double().cpu(), up.dx[ORDINARY, 500], rtol=1e-5, atol=0)


def test_saturated_softcap_keeps_its_digits():
    t = tile(1000, head=formula.Head(1.0, 2.0, 1.0))
    t.x[ORDINARY, :10] = torch.linspace(4, 14, 10)  # 1 - tanh² down to 3e-6
    up = upstream(t)
    dx = backward(t, up.coef)
    assert_close(dx[ORDINARY, :10].double().cpu(), up.dx[ORDINARY, :10], rtol=2e-5, atol=0)


def test_no_rows():
    t = tile(5)
    t = t._replace(x=t.x[:0], target=t.target[:0])
    assert forward(t)[0].shape == (0, 6)
    assert backward(t, torch.empty(7, 0, device=DEVICE)).shape == (0, 5)


def test_refusals():
    t = tile(5, torch.bfloat16)
    up = upstream(t)
    with pytest.raises(ValueError, match=r"in_place=True needs x in torch.float32, got torch.bfloat16"):
        forward(t, in_place=True)
    with pytest.raises(ValueError, match=r"x must have stride 1 in its last dimension, got strides \(1, 9\)"):
        forward(t._replace(x=t.x.t().contiguous().t()))
    with pytest.raises(ValueError, match="target must have stride 1"):
        backward(t._replace(target=t.target.repeat_interleave(2)[::2]), up.coef)
    with pytest.raises(ValueError, match=r"part must have 2 states of 16384 columns, got \(9, 6\)"):
        forward(tile(SPAN + 1))
    with pytest.raises(ValueError, match="index needs src"):
        tile_bwd(t.x, None, torch.arange(9), None, None, t.target, up.coef, COL0, PLAIN)


# ---- the pieces ----------------------------------------------------------------------------------------------------


@triton.jit
def apply_kernel(x_ptr, out_ptr, n, F: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, F(tl.load(x_ptr + i, mask=i < n)), mask=i < n)


def symmetric(smallest, largest, count=20000):
    half = torch.logspace(math.log10(smallest), math.log10(largest), count)
    return torch.cat([-half, torch.zeros(1), half])


@pytest.mark.parametrize(
    "name, exact, x",
    [
        ("expm1", torch.expm1, symmetric(1e-30, 80)),
        ("log1p", torch.log1p, torch.cat([symmetric(1e-30, 0.99), torch.logspace(0, 38, 2000)])),
        ("tanh", torch.tanh, symmetric(1e-30, 1e4)),
        ("tanh_slope", lambda x: torch.cosh(x) ** -2, symmetric(1e-30, 20)),
    ],
)
def test_elementary_functions(name, exact, x):
    y = torch.empty_like(x, device=DEVICE)
    apply_kernel[(triton.cdiv(len(x), 4096),)](x.to(DEVICE), y, len(x), getattr(_tiles, name), BLOCK=4096)
    bound = 1e-5 if GPU and name in ("expm1", "tanh_slope") else 3e-7  # a GPU's exp loses a digit at large arguments
    assert_close(y.double().cpu(), exact(x.double()), rtol=bound, atol=0)


@pytest.mark.parametrize(
    "name, x, y",
    [
        ("expm1", [-INF, INF, NAN], [-1, INF, NAN]),
        ("log1p", [-1, INF, NAN], [-INF, INF, NAN]),
        ("tanh", [-INF, INF, NAN], [-1, 1, NAN]),
        ("tanh_slope", [-INF, INF, NAN], [0, 0, NAN]),
    ],
)
def test_elementary_functions_at_the_ends(name, x, y):
    out = torch.empty(3, device=DEVICE)
    apply_kernel[(1,)](torch.tensor(x, dtype=torch.float32, device=DEVICE), out, 3, getattr(_tiles, name), BLOCK=16)
    assert_close(out.cpu(), torch.tensor(y, dtype=torch.float32), rtol=0, atol=0, equal_nan=True)


# ---- the interpreter's bfloat16 ------------------------------------------------------------------------------------


@triton.jit
def round_kernel(x_ptr, out_ptr, back_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    rounded = tl.load(x_ptr + i).to(tl.bfloat16)
    tl.store(out_ptr + i, rounded)
    tl.store(back_ptr + i, rounded.to(tl.float32))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def add_kernel(x_ptr, out_ptr):
    x = tl.load(x_ptr)
    tl.store(out_ptr, x + x)


@triton.jit
def sum_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), axis=0))


@triton.jit
def from_int_kernel(x_ptr, out_ptr):
    tl.store(out_ptr, tl.load(x_ptr).to(tl.bfloat16))


def test_bfloat16_rounds_to_nearest_even():
    bits = torch.arange(2**14, dtype=torch.int64) * 262141 % 2**32
    x = bits.to(torch.int32).view(torch.float32)
    x[:6] = torch.tensor([INF, -INF, NAN, 1 + 2**-8, 1 + 3 * 2**-8, 1e-40])  # ties, a subnormal
    out, back = torch.empty_like(x, dtype=torch.bfloat16, device=DEVICE), torch.empty_like(x, device=DEVICE)
    round_kernel[(1,)](x.to(DEVICE), out, back, BLOCK=len(x))
    assert_close(out.cpu(), x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert_close(back.cpu(), x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


def test_bfloat16_dot():
    a, b = torch.randn(2, 16, 16, device=DEVICE).bfloat16()
    out = torch.empty(16, 16, device=DEVICE)
    dot_kernel[(1,)](a, b, out, SIZE=16)
    assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(GPU, reason="a GPU computes these as they should be")
def test_the_interpreter_refuses_other_bfloat16_arithmetic():
    x, out = torch.ones(16, dtype=torch.bfloat16), torch.empty(16, dtype=torch.bfloat16)
    for run in (
        lambda: add_kernel[(1,)](x, out),
        lambda: sum_kernel[(1,)](x, out, BLOCK=16),
        lambda: from_int_kernel[(1,)](torch.ones(1, dtype=torch.int32), out),
    ):
        with pytest.raises(Exception, match="bfloat16"):
            run()

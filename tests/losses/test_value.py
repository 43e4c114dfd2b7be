"""The critic's loss: golden values, its one-sided clip, an assembly by loops, invariances, refusals."""

import math

import pytest
import torch
from torch.testing import assert_close
from worked_examples import fixture_d, numbers, rows

import finealign_kernels as fk

F64 = torch.float64
D = fixture_d()
REDUCTIONS = ("token", "token_global", "sequence", "sequence_sum", "constant")


def run(values, old, returns, upstream=None, **options):
    values = values.clone().requires_grad_()
    out = fk.value_loss(values, old, returns, **options)
    return out, torch.autograd.grad(out.loss, values, upstream)[0]


def test_golden():
    """Sections 4.9 and 11.11; masked places hold NaN."""
    dirty = [torch.where(D.mask, x, torch.nan) for x in (D.values, D.old_values, D.returns)]
    out, grad = run(*dirty, mask=D.mask)
    assert_close(out.loss.item(), 2.358340562, rtol=0, atol=1e-9)
    expected = numbers("""
        0 -0.2552584103 -0.2418646368 0 -0.1864776747 -0.0675166827
        0.2804090947 0 0.2915232178 0.0908378602 0 0""")
    assert_close(grad, expected, rtol=0, atol=1e-9)
    each = numbers("""
        2.0753464794 3.2578428016 2.9249251259 1.1019557738 1.7386961576 0.2279251221
        3.9314630194 3.6633859713 4.2492893267 0.412575842 0 0""")
    assert_close(out.losses, each, rtol=0, atol=1e-9)
    assert_close(out.clip_fraction.item(), 0.3)
    out, grad = run(*dirty, mask=D.mask, reduction="sequence")
    assert_close(out.loss.item(), 2.4759802249, rtol=0, atol=1e-9)
    expected = numbers("""
        0 -0.2127153419 -0.201553864 0 -0.1553980622 -0.0562639022
        0.3505113684 0 0.3644040223 0.1135473252 0 0""")
    assert_close(grad, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "value, old, target, loss, slope, clipped",
    [
        (0.5, 0.0, 1.0, 0.5 * 0.5625, 0.0, True),  # moved towards the return, further than allowed
        (-0.5, 0.0, 1.0, 0.5 * 2.25, -1.5, False),  # moved away from it
        (0.1, 0.0, 1.0, 0.5 * 0.81, -0.9, False),
        (0.5, 0.0, 0.375, 0.5 * 0.015625, 0.125, False),  # as far above the return as the bound is below it
        (1.5, 0.0, 0.375, 0.5 * 1.265625, 1.125, False),  # past the return
    ],
)
def test_clips_act_on_one_side(value, old, target, loss, slope, clipped):
    out, grad = run(*(torch.tensor([[x]], dtype=F64) for x in (value, old, target)), clip=0.25)
    assert_close((out.loss.item(), grad.item()), (loss, slope), rtol=1e-12, atol=1e-12)
    assert out.clip_fraction.item() == clipped


def batch(dtype=F64):
    torch.manual_seed(3)
    values, old, returns, weight = torch.randn(4, 5, 7, dtype=F64).to(dtype)
    mask = torch.arange(7) < torch.tensor([7, 4, 1, 0, 6])[:, None]
    mask[0, 3] = False
    return values, old, returns, weight.abs(), mask


def by_hand(values, old, returns, weight, mask, *, clip, reduction, average, **options):
    near = old + (values - old).clamp(-clip, clip) if clip else values
    each = torch.maximum((values - returns).square(), (near - returns).square()) / 2
    items = torch.stack([(weight[b] * each[b])[mask[b]].sum() for b in range(len(values))])
    counts = torch.stack(
        [(weight if average == "kept" else mask.to(F64))[b][mask[b]].sum() for b in range(len(values))]
    )
    if reduction in ("token", "token_global"):
        return items.sum() / options.get("denominator", counts.sum())
    total = options.get("denominator", len(values) - (0 if options.get("count_empty", True) else 1))
    if reduction == "sequence":
        items = items / torch.where(counts == 0, 1, counts)
    return items.sum() / total / options.get("max_length", 1)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("average", ("all", "kept"))
@pytest.mark.parametrize("clip", (0.2, None))
def test_against_loops_and_autograd(reduction, average, clip):
    values, old, returns, weight, mask = batch()
    upstream = torch.tensor(-1.7, dtype=F64)
    needed = {"token_global": dict(denominator=13), "constant": dict(max_length=9)}.get(reduction, {})
    for more in (dict(), dict(denominator=7.0), dict(count_empty=False)):
        options = dict(clip=clip, reduction=reduction, average=average) | needed | more
        out, grad = run(values, old, returns, upstream, mask=mask, token_weight=weight, **options)
        leaf = values.clone().requires_grad_()
        expected = by_hand(leaf, old, returns, weight, mask, **options)
        assert_close(out.loss.detach(), expected.detach())
        assert_close(grad, torch.autograd.grad(expected, leaf, upstream)[0])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_padding_packing_and_splits_change_nothing(reduction):
    values, old, returns, weight, mask = batch()
    token = reduction in ("token", "token_global")
    options = dict(reduction=reduction, denominator=int(mask.sum()) if token else 5)
    options |= dict(max_length=9) if reduction == "constant" else {}
    out, grad = run(values, old, returns, mask=mask, token_weight=weight, **options)
    for junk in (torch.nan, torch.inf, -1e5):
        dirty = [torch.where(mask, x, junk) for x in (values, old, returns, weight)]
        again, dirty_grad = run(*dirty[:3], mask=mask, token_weight=dirty[3], **options)
        assert all(map(torch.equal, (again.losses, *again[2:], dirty_grad), (out.losses, *out[2:], grad)))
        assert torch.equal(again.loss, out.loss)
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    flat = [x[mask] for x in (values, old, returns, weight)]
    packed, flat_grad = run(*flat[:3], cu_seqlens=cu, token_weight=flat[3], **options)
    assert_close((packed.loss, packed.losses, flat_grad), (out.loss, out.losses[mask], grad[mask]))
    assert_close(packed.clip_fraction, out.clip_fraction)
    loss, total = 0, torch.zeros_like(grad)
    for pick in (torch.tensor([0, 3]), torch.tensor([1, 2, 4])):
        parts = (x[pick] for x in (values, old, returns))
        part, total[pick] = run(*parts, mask=mask[pick], token_weight=weight[pick], **options)
        loss = loss + part.loss
    assert_close((loss.detach(), total), (out.loss.detach(), grad))


def test_degenerate_batches():
    for shape in ((2, 3), (0, 3), (2, 0)):
        values = torch.full(shape, torch.nan).requires_grad_()
        mask = torch.zeros(shape, dtype=torch.bool)
        for reduction in ("token", "sequence"):
            out = fk.value_loss(values, values.detach(), values.detach(), mask=mask, reduction=reduction)
            (grad,) = torch.autograd.grad(out.loss, values)
            assert out.loss.item() == 0 and not grad.any() and out.clip_fraction == 0
    v = torch.tensor([[1.0, torch.nan]])
    assert fk.value_loss(v, torch.zeros(1, 2), torch.zeros(1, 2)).loss.isnan()
    assert fk.value_loss(torch.zeros(1, 2), torch.zeros(1, 2), v).loss.isnan()
    zero = rows([1.0, 0.0])
    out, grad = run(
        torch.tensor([[2.0, torch.inf]]).double(), None, torch.zeros(1, 2).double(), clip=None, token_weight=zero
    )
    assert_close((out.loss.item(), grad), (1.0, rows([1.0, 0.0])))  # what weighs nothing is not read


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_half_precision(dtype):
    values, old, returns, _, mask = batch(dtype)
    out, grad = run(values, old, returns, mask=mask)
    exact, truth = run(values.double(), old.double(), returns.double(), mask=mask)
    assert out.loss.dtype == torch.float32 and grad.dtype == dtype
    assert_close(out.loss.double(), exact.loss, rtol=1e-5, atol=0)
    assert_close(grad.double(), truth, rtol=torch.finfo(dtype).eps + 1e-6, atol=1e-6)


def test_a_second_backward_is_exact_and_a_double_one_refused():
    values = D.values.clone().requires_grad_()
    out = fk.value_loss(values, D.old_values, D.returns, mask=D.mask)
    assert out.loss.requires_grad and not any(x.requires_grad for x in out[1:])
    first, second = (torch.autograd.grad(out.loss, values, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (again,) = torch.autograd.grad(out.loss, values, create_graph=True)
    with pytest.raises(RuntimeError, match="value_loss: double backward is not implemented"):
        torch.autograd.grad(again.sum(), values)


def test_no_value_is_read_on_the_host():
    values = torch.zeros(3, 4, device="meta", requires_grad=True)
    mask = torch.ones(3, 4, dtype=torch.bool, device="meta")
    fk.value_loss(values, values, values, mask=mask, reduction="sequence", count_empty=False).loss.backward()
    assert values.grad.shape == (3, 4)


V = torch.zeros(2, 3)
REFUSALS = {
    "clip": (lambda: fk.value_loss(V, V, V, clip=0.0), ValueError, "clip must be a finite number > 0, got 0.0"),
    "clip nan": (lambda: fk.value_loss(V, V, V, clip=math.nan), ValueError, "clip must be .* got nan"),
    "no old": (lambda: fk.value_loss(V, None, V), ValueError, "old_values must be given for clip = 0.2"),
    "old shape": (lambda: fk.value_loss(V, V[:, :2], V), ValueError, r"old_values must have shape \(2, 3\)"),
    "returns": (lambda: fk.value_loss(V, V, None), TypeError, "returns must be a tensor, got None"),
    "int": (lambda: fk.value_loss(V, V, V.long()), TypeError, "returns must have dtype"),
    "reduction": (lambda: fk.value_loss(V, V, V, reduction="mean"), ValueError, "reduction must be one of"),
    "global": (lambda: fk.value_loss(V, V, V, reduction="token_global"), ValueError, "denominator must be the number"),
    "length": (lambda: fk.value_loss(V, V, V, reduction="constant"), ValueError, "max_length must be given"),
    "average": (lambda: fk.value_loss(V, V, V, average="segments"), ValueError, "average must be 'all' or 'kept'"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case):
    call, kind, message = REFUSALS[case]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("clip", (None, 0.2))
def test_an_error_whose_half_square_is_finite(clip):
    """½ x² is 2.6e38 and fits into float32, x² does not."""
    v = torch.tensor([[2.3e19]])
    out = fk.value_loss(v, torch.zeros(1, 1), torch.zeros(1, 1), clip=clip)
    assert_close(out.loss.double(), v.double().square().sum() / 2, rtol=1e-6, atol=0)

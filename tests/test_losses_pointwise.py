"""Losses of single responses: golden values, classes and their denominators, degenerate cases, refusals."""

import math

import pytest
import torch
from torch.testing import assert_close

import finealign_kernels as fk
from finealign_kernels.losses.preference import PREFERENCE, score_loss

F64 = torch.float64
POINTWISE = [name for name, row in PREFERENCE.items() if not row.pair]


def batch(width=7):
    torch.manual_seed(2)
    logp, ref = -torch.rand(5, width, dtype=F64) * 3, -torch.rand(5, width, dtype=F64) * 3
    mask = torch.arange(width) < torch.tensor([7, 1, 4, 3, 5])[:, None]
    return logp, ref, mask, torch.tensor([1.0, 0.0, 1.0, 0.3, 0.0], dtype=F64)


def call(name, logp, ref, target, **options):
    return fk.pointwise_loss(name, logp, ref if PREFERENCE[name].reference else None, target=target, **options)


def run(name, logp, ref, target, **options):
    logp = logp.clone().requires_grad_()
    out = call(name, logp, ref, target, **options)
    upstream = torch.arange(1, out.loss.numel() + 1, dtype=logp.dtype).view(out.loss.shape)
    return out, torch.autograd.grad(out.loss, logp, upstream)[0]


@pytest.mark.parametrize("name", POINTWISE)
@pytest.mark.parametrize("spread", (1e-3, 1.0, 30.0))
def test_slope_is_the_derivative(name, spread):
    torch.manual_seed(0)
    score = (torch.randn(64, dtype=F64) * spread).requires_grad_()
    target = (torch.rand(64, dtype=F64) * 3 - 1).clamp(0, 1)
    value, dscore = score_loss(name, score, beta=0.7, shift=0.3, target=target)
    (expected,) = torch.autograd.grad(value.sum(), score)
    assert_close(dscore, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", POINTWISE)
@pytest.mark.parametrize("average", (False, "kept", "all"))
def test_gradcheck_padding_and_packing(name, average):
    logp, ref, mask, target = batch()
    weight = torch.rand(logp.shape, dtype=F64)
    options = dict(average=average, reduction="none", positive_weight=0.7, other_weight=1.3)
    out, grad = run(name, logp, ref, target, mask=mask, token_weight=weight, **options)
    assert not grad[~mask].any() and grad[mask].all()

    def loss(logp):
        return call(name, logp, ref, target, mask=mask, token_weight=weight, **options).loss

    assert torch.autograd.gradcheck(loss, logp.clone().requires_grad_())
    dirty = [torch.where(mask, t, torch.nan) for t in (logp, ref, weight)]
    again, dirty_grad = run(name, dirty[0], dirty[1], target, mask=mask, token_weight=dirty[2], **options)
    assert torch.equal(again.losses, out.losses) and torch.equal(dirty_grad, grad)
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    packed, flat = run(name, logp[mask], ref[mask], target, cu_seqlens=cu, token_weight=weight[mask], **options)
    assert_close(packed.losses, out.losses, rtol=1e-13, atol=1e-14)
    assert_close(flat, grad[mask], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", POINTWISE)
def test_a_pair_is_a_positive_and_a_negative(name):
    logp, ref, mask, _ = batch()
    logp, ref, mask = logp[:4], ref[:4], mask[:4]
    target = torch.tensor([True, True, False, False])
    pairs = fk.preference_loss(name, logp, ref if PREFERENCE[name].reference else None, mask=mask)
    single = call(name, logp, ref, target, mask=mask)
    assert_close(pairs.loss, single.loss)
    assert_close(single.rewards, torch.cat([pairs.chosen_rewards, pairs.rejected_rewards]))


@pytest.mark.parametrize("name", POINTWISE)
def test_reductions_and_splits(name):
    logp, ref, mask, target = batch()
    out, grad = run(name, logp, ref, target, mask=mask)
    losses = out.losses
    positive = target == 1
    assert_close(out.loss.detach(), losses.mean())
    classes, class_grad = run(name, logp, ref, target, mask=mask, reduction="class_mean")
    assert_close(classes.loss.detach(), losses[positive].mean() + losses[~positive].mean())
    assert not classes.loss.isclose(out.loss)
    total, by_class = torch.zeros_like(grad), torch.zeros_like(grad)
    for pick in (torch.tensor([0, 3]), torch.tensor([1, 2, 4])):
        part = dict(mask=mask[pick])
        total[pick] += run(name, logp[pick], ref[pick], target[pick], denominator=5, **part)[1]
        counts = torch.tensor([2, 3])
        options = dict(reduction="class_mean", denominator=counts, **part)
        by_class[pick] += run(name, logp[pick], ref[pick], target[pick], **options)[1]
    assert_close(total, grad)
    assert_close(by_class, class_grad)


@pytest.mark.parametrize("name", POINTWISE)
@pytest.mark.parametrize("label", (0.0, 1.0))
def test_one_class_alone(name, label):
    logp, ref, mask, _ = batch()
    target = torch.full((5,), label, dtype=F64)
    out, grad = run(name, logp, ref, target, mask=mask, reduction="class_mean")
    assert_close(out.loss.detach(), out.losses.mean())
    assert grad.isfinite().all() and grad[mask].all()


@pytest.mark.parametrize("name", POINTWISE)
def test_no_response_and_empty_responses(name):
    logp = torch.zeros(0, 4, requires_grad=True)
    for reduction in ("mean", "class_mean"):
        out = call(name, logp, torch.zeros(0, 4), torch.zeros(0), reduction=reduction)
        assert out.loss == 0 and torch.autograd.grad(out.loss, logp)[0].shape == (0, 4)
    logp, ref, mask, target = batch()
    mask[1], mask[2] = False, False
    for reduction in ("mean", "class_mean"):
        out, grad = run(name, logp, ref, target, mask=mask, reduction=reduction)
        assert out.loss.isfinite() and not grad[1].any() and not grad[2].any() and grad[0].any()
    dropped, _ = run(name, logp, ref, target, mask=mask, drop_empty=True)
    assert_close(dropped.loss.detach(), out.losses[[0, 3, 4]].mean())


def test_nan_at_a_token_that_is_read_reaches_the_loss():
    logp, ref, mask, target = batch()
    logp[0, 0] = torch.nan
    assert call("kto", logp, ref, target, mask=mask, reduction="class_mean").loss.isnan()


# ---- KTO -----------------------------------------------------------------------------------------------------------


def test_kto():
    """The weights multiply a class; z0 lies inside beta, is a constant, and counts as 0 below 0."""
    logp, ref, mask, target = batch()
    desirable = target == 1
    h = torch.where(mask, logp - ref, 0).sum(1)
    z0 = torch.tensor(0.4, dtype=F64, requires_grad=True)
    sign = torch.where(desirable, 1.0, -1.0)
    share = torch.where(desirable, 1.5, 0.5)
    out = fk.kto(logp, ref, desirable, mask=mask, beta=0.3, z0=z0, desirable_weight=1.5, undesirable_weight=0.5)
    assert_close(out.losses, share * (1 - torch.sigmoid(sign * 0.3 * (h - 0.4))))
    assert not out.loss.requires_grad  # logp is a constant here, and z0 is one always
    assert_close(fk.kto(logp, ref, desirable, mask=mask, z0=-3.0).loss, fk.kto(logp, ref, desirable, mask=mask).loss)


def test_liger_has_kto_without_weights():
    kto_loss = pytest.importorskip("liger_kernel.chunked_loss.kto_loss", reason="the extra `bench` has Liger")
    logp, ref, mask, target = batch()
    total = [torch.where(mask, x, 0).sum(1) for x in (logp, ref)]
    call = kto_loss.LigerFusedLinearKTOFunction.preference_loss_fn
    expected = call(total[0], target == 1, torch.zeros(5, 1), total[1], beta=0.1, kl=0.4)[0]
    assert_close(fk.kto(logp, ref, target == 1, mask=mask, z0=0.4).loss, expected)


# ---- refusals ------------------------------------------------------------------------------------------------------

L, Z = torch.zeros(2, 3), torch.zeros(2)
REFUSALS = {
    "pair row": (lambda: fk.pointwise_loss("dpo", L, L, target=Z), ValueError, "name must be one of .*kto.* got 'dpo'"),
    "unknown": (lambda: fk.pointwise_loss("kot", L, L, target=Z), ValueError, "name must be one of"),
    "target shape": (lambda: fk.kto(L, L, torch.zeros(3)), ValueError, r"target must have shape \(2,\), got \(3,\)"),
    "target dtype": (lambda: fk.kto(L, L, Z.long()), TypeError, "target must have dtype bool or"),
    "reduction": (lambda: fk.kto(L, L, Z, reduction="token"), ValueError, "reduction must be one of .*class_mean"),
    "class counts": (
        lambda: fk.kto(L, L, Z, reduction="class_mean", denominator=torch.tensor(2.0)),
        ValueError,
        r"denominator must have shape \(2,\)",
    ),
    "weight": (lambda: fk.kto(L, L, Z, desirable_weight=math.nan), ValueError, "positive_weight must be a finite"),
    "no reference": (lambda: fk.pointwise_loss("kto", L, target=Z), ValueError, "ref_logp must be given for 'kto'"),
    "beta": (lambda: fk.kto(L, L, Z, beta=-1.0), ValueError, "beta must be a finite number > 0"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case):
    call, kind, message = REFUSALS[case]
    with pytest.raises(kind, match=message):
        call()

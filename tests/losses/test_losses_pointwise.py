"""Losses of single responses: golden values, classes and their denominators, degenerate cases, refusals."""

import math

import pytest
import torch
from torch.testing import assert_close

import finealign_kernels as fk
from finealign_kernels.losses.preference import PREFERENCE, score_loss

pytestmark = pytest.mark.usefixtures("route")

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
def test_a_nan_target_that_is_not_read_on_the_host_reaches_the_loss(name, monkeypatch):
    monkeypatch.setattr("finealign_kernels.losses.pointwise.reads_values", lambda x: False)  # as on a GPU
    logp, ref, mask, target = batch()
    target[3] = torch.nan
    losses = call(name, logp, ref, target, mask=mask).losses
    assert losses.isnan().tolist() == [False, False, False, True, False]


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


# ---- golden values -------------------------------------------------------------------------------------------------

# Fixture C of the specification: a demonstration, two others, beta = .5; the mask is its padding's
LOGP = torch.tensor([[-0.5, -1.0, -0.2, 0, 0], [-1.2, -0.3, -0.8, -0.6, -1.5], [-0.4, -0.9, 0, 0, 0]], dtype=F64)
REF = torch.tensor([[-0.7, -0.9, -0.4, 0, 0], [-1.0, -0.5, -0.6, -0.9, -1.1], [-0.6, -1.1, 0, 0, 0]], dtype=F64)
MASK = torch.arange(5) < torch.tensor([3, 5, 2])[:, None]
SCORE = torch.tensor([1.0, 0.2, 0.7], dtype=F64)

# name, average, c, batch mean, mean of classes, gradient of each token of each response under the batch mean
GOLDEN = [
    ("pdpo", False, 0, 0.680017655, 1.3305050064, [-0.0770950258, 0.0770950258, 0.0916389996]),
    ("pdpo", "kept", 0, 0.6970386615, 1.3797878162, [-0.027083478, 0.0164166854, 0.0437482656]),
    ("pdpo", "kept", 0.3, 0.7612098476, 1.4085058492, [-0.0229656901, 0.0189030968, 0.0498906383]),
    ("pdpo_soft", False, 0, 0.6433509883, None, [-0.0770950258, 0.0437616924, -0.0250276671]),
    ("pdpo_soft", "kept", 0, 0.6757053281, None, [-0.027083478, 0.0097500187, -0.0145850677]),
    ("pdpo_squared", False, 0, 0.365, 0.90875, [-0.2833333333, -0.1166666667, -0.1666666667]),
    ("pdpo_squared", "kept", 0, 0.4384666667, 1.10895, [-0.1055555556, -0.0153333333, -0.1]),
    ("pdpo_hybrid", "kept", 0, None, 0.874909648, [-0.027083478, -0.0153333333, -0.1]),
    ("pdpo_hybrid", "kept", 0.3, None, 0.5808321554, [-0.0229656901, 0.0046666667, -0.05]),
    ("ulma", False, 0, 1.0396986391, 2.4095479586, [-0.3333333333, 0.0770950258, 0.0916389996]),
    ("ulma", "kept", 0, 0.6631076677, 1.2779948349, [-0.1111111111, 0.0164166854, 0.0437482656]),
    ("ulma", "kept", 0.3, 0.7723046847, 1.4417903604, [-0.1111111111, 0.0189030968, 0.0498906383]),
    ("ulma_squared", "kept", 0, 0.3265222222, 0.7731166667, [-0.1111111111, -0.0153333333, -0.1]),
    ("ulma_squared", "kept", 0.3, 0.2205222222, 0.6141166667, [-0.1111111111, 0.0046666667, -0.05]),
    ("unlikelihood", "kept", 0, None, -0.1983333333, [-0.1111111111, 0.0666666667, 0.1666666667]),
]


@pytest.mark.parametrize("name, average, c, mean, class_mean, grads", GOLDEN)
def test_golden(name, average, c, mean, class_mean, grads):
    options = dict(mask=MASK, average=average, shift=-c, beta=0.5 if PREFERENCE[name].reference else 1.0)
    grads = torch.tensor(grads, dtype=F64)[:, None] * MASK
    # one of three is a positive: its class mean counts it 1, not 1/3; each of the two others 1/2
    by_class = grads * torch.tensor([3, 1.5, 1.5], dtype=F64)[:, None]
    for reduction, loss, expected in (("mean", mean, grads), ("class_mean", class_mean, by_class)):
        out, grad = run(name, LOGP, REF, SCORE, reduction=reduction, **options)
        assert_close(grad, expected, rtol=0, atol=1e-9)
        if loss is not None:
            assert_close(out.loss.item(), loss, rtol=0, atol=1e-9)


# ---- conventions that differ ---------------------------------------------------------------------------------------


def test_only_a_score_of_exactly_1_is_a_demonstration():
    near = torch.tensor([1 - 1e-9, 0.2, 0.7], dtype=F64)
    losses = call("ulma", LOGP, REF, near, mask=MASK).losses
    assert_close(losses[0], -torch.nn.functional.logsigmoid(-0.1 * (LOGP - REF).sum(1))[0])
    assert_close(call("ulma", LOGP, REF, SCORE, mask=MASK).losses[0].item(), 1.7)


def test_class_means_weigh_a_class_whatever_its_size():
    """One demonstration and seven others: the sum of two class means (the code) or one batch mean (1/8 each)."""
    pick = torch.tensor([0, 1, 2, 1, 2, 1, 2, 1])
    of = dict(mask=MASK[pick], average="kept")
    _, by_class = run("ulma", LOGP[pick], REF[pick], SCORE[pick], reduction="class_mean", **of)
    _, by_batch = run("ulma", LOGP[pick], REF[pick], SCORE[pick], **of)
    assert_close(by_class[0, 0].item(), -1 / 3)
    assert_close(by_batch[0, 0].item(), -1 / 24)
    assert_close(by_class[1] / by_batch[1], torch.full((5,), 8 / 7, dtype=F64))


def test_c_lies_outside_beta():
    h = torch.where(MASK, LOGP - REF, 0).sum(1)
    found = fk.pdpo(LOGP, REF, SCORE, mask=MASK, beta=0.5, c=0.3, kind="squared").losses
    assert_close(found, (SCORE - (0.5 * h + 0.3)).square())
    assert not found.isclose((SCORE - 0.5 * (h + 0.3)).square()).any()


def test_the_two_readings_of_a_score_have_their_own_minima():
    """(s - u)² is least at u = s, the cross-entropy at σ(u) = s, where it is -log σ at scores of 0 and 1."""
    s = torch.tensor([0.3, 0.8], dtype=F64)
    assert not score_loss("pdpo_squared", s, beta=1.0, target=s)[1].any()
    at = torch.logit(s)
    assert_close(score_loss("pdpo_soft", at, beta=1.0, target=s)[1], torch.zeros(2, dtype=F64), rtol=0, atol=1e-15)
    hard = torch.tensor([1.0, 0.0], dtype=F64)
    for soft, binary in zip(*(score_loss(n, at, beta=1.0, target=hard) for n in ("pdpo_soft", "pdpo")), strict=True):
        assert torch.equal(soft, binary)


def test_slopes_keep_their_digits_far_out():
    u = torch.tensor([800.0, -800.0])
    value, slope = score_loss("pdpo", u, beta=1.0, target=torch.tensor([1.0, 0.0]))
    assert value.tolist() == [0, 0] and slope.tolist() == [0, 0]
    value, slope = score_loss("pdpo", u, beta=1.0, target=torch.tensor([0.0, 1.0]))
    assert value.tolist() == [800, 800] and slope.tolist() == [1, -1]
    _, slope = score_loss("pdpo", torch.tensor([30.0]), beta=1.0, target=torch.tensor([1.0]))
    assert_close(slope.item(), -math.exp(-30), rtol=1e-6, atol=0)


def test_a_negative_without_tokens_contributes_its_offset():
    mask = MASK.clone()
    mask[0], mask[1] = False, False
    out, grad = run("ulma", LOGP, REF, SCORE, mask=mask, shift=-0.3, reduction="none")
    assert_close(out.losses[:2], torch.tensor([0.0, math.log1p(math.exp(0.3))], dtype=F64))
    assert not grad[:2].any()


def test_wrappers():
    kinds = {"binary": "pdpo", "soft": "pdpo_soft", "squared": "pdpo_squared", "hybrid": "pdpo_hybrid"}
    for kind, name in kinds.items():
        found = fk.pdpo(LOGP, REF, SCORE, mask=MASK, kind=kind, c=0.2).loss
        assert torch.equal(found, call(name, LOGP, REF, SCORE, mask=MASK, shift=-0.2).loss)
    for kind, name in {"binary": "ulma", "squared": "ulma_squared"}.items():
        found = fk.ulma(LOGP, REF, SCORE, mask=MASK, kind=kind, c=0.2).loss
        assert torch.equal(found, call(name, LOGP, REF, SCORE, mask=MASK, shift=-0.2).loss)
    assert torch.equal(
        fk.unlikelihood(LOGP, SCORE, mask=MASK).loss, call("unlikelihood", LOGP, None, SCORE, mask=MASK).loss
    )


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
    "pair row": (
        lambda: fk.pointwise_loss("dpo", L, L, target=Z),
        ValueError,
        "name must be a Row with pair=False or .*kto.* got 'dpo'",
    ),
    "unknown": (lambda: fk.pointwise_loss("kot", L, L, target=Z), ValueError, "name must be a Row or one of"),
    "target shape": (lambda: fk.kto(L, L, torch.zeros(3)), ValueError, r"target must have shape \(2,\), got \(3,\)"),
    "target dtype": (lambda: fk.kto(L, L, Z.long()), TypeError, "target must have dtype bool or"),
    "reduction": (lambda: fk.kto(L, L, Z, reduction="token"), ValueError, "reduction must be one of .*class_mean"),
    "class counts": (
        lambda: fk.kto(L, L, Z, reduction="class_mean", denominator=torch.tensor(2.0)),
        ValueError,
        r"denominator must have shape \(2,\)",
    ),
    "target nan": (lambda: fk.kto(L, L, Z * math.nan), ValueError, "target must be finite, got nan"),
    "target inf": (lambda: fk.ulma(L, L, Z - math.inf, kind="squared"), ValueError, "target must be finite, got -inf"),
    "z0 nan": (lambda: fk.kto(L, L, Z, z0=math.nan), ValueError, "z0 must be a finite number, got nan"),
    "z0": (lambda: fk.kto(L, L, Z, z0="0"), ValueError, "z0 must be a finite number, got '0'"),
    "c": (lambda: fk.pdpo(L, L, Z, c="0"), ValueError, "c must be a finite number, got '0'"),
    "c of ulma": (lambda: fk.ulma(L, L, Z, c=math.inf), ValueError, "c must be a finite number, got inf"),
    "kind": (lambda: fk.pdpo(L, L, Z, kind="mixed"), ValueError, "kind must be one of .*got 'mixed'"),
    "soft score": (
        lambda: fk.pdpo(L, L, torch.tensor([0.5, 1.2]), kind="soft"),
        ValueError,
        r"target must lie in \[0, 1\] for a soft label, got 1.2",
    ),
    "soft nan": (lambda: fk.pdpo(L, L, Z * math.nan, kind="soft"), ValueError, "target must be finite, got nan"),
    "unlikelihood's reference": (
        lambda: fk.pointwise_loss("unlikelihood", L, L, target=Z),
        ValueError,
        "ref_logp must be None",
    ),
    "weight": (lambda: fk.kto(L, L, Z, desirable_weight=math.nan), ValueError, "desirable_weight must be a finite"),
    "no reference": (lambda: fk.pointwise_loss("kto", L, target=Z), ValueError, "ref_logp must be given for 'kto'"),
    "beta": (lambda: fk.kto(L, L, Z, beta=-1.0), ValueError, "beta must be a finite number > 0"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case):
    call, kind, message = REFUSALS[case]
    with pytest.raises(kind, match=message):
        call()

"""What a row has beside its margin: hyper-parameters, NLL terms, segments; and where libraries differ."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

import finealign_kernels as fk
from finealign_kernels.formulas import margin
from finealign_kernels.losses.preference import PREFERENCE, preference_loss

F64 = torch.float64


def batch(pairs=3, width=7, seed=1):
    torch.manual_seed(seed)
    logp, ref = -torch.rand(2 * pairs, width, dtype=F64) * 3, -torch.rand(2 * pairs, width, dtype=F64) * 3
    mask = torch.arange(width) < torch.tensor([7, 1, 4, 3, 5, 2])[: 2 * pairs, None]
    return logp, ref, mask


def sums(x, mask):
    return torch.where(mask, x, 0).sum(1).chunk(2)


def means(x, mask):
    return (torch.where(mask, x, 0).sum(1) / mask.sum(1)).chunk(2)


# ---- formulas ------------------------------------------------------------------------------------------------------


def test_log_odds():
    a = torch.tensor([-1e-12, -0.1, -math.log(2), -5, -40], dtype=F64)
    expected = torch.tensor([-27.6310211159, -2.3521684610, -0.6931471806, -0.0067607494, -4.248354e-18], dtype=F64)
    assert_close(margin.log1mexp(a), expected, rtol=1e-6, atol=1e-10)
    value, slope = margin.log_odds(torch.tensor([0.0, -1e-9, -1e-6, -200.0]))
    assert value.isfinite().all() and slope[:2].tolist() == [0, 0] and slope[2] > 9e5 and slope[3] == 1


@pytest.mark.parametrize("phi, at_minus_infinity", [(margin.smoothed, -0.9), (margin.robust, -1.125)])
def test_smoothed_slopes_far_out(phi, at_minus_infinity):
    m = torch.tensor([-1e4, 1e4], dtype=F64)
    value, slope = phi(m, smoothing=0.1)
    assert value.isfinite().all()
    assert_close(slope, torch.tensor([at_minus_infinity, at_minus_infinity + 1], dtype=F64))


def test_cdpo_has_a_finite_minimum_and_robust_none():
    z = torch.tensor([math.log(0.9 / 0.1)], dtype=F64)
    assert_close(margin.smoothed(z, smoothing=0.1)[1], torch.zeros(1, dtype=F64), rtol=0, atol=1e-15)
    assert margin.robust(z + 1000, smoothing=0.1)[0] < -100


def test_hinge_is_flat_at_its_kink():
    assert margin.hinge(torch.tensor([0.5, 1.0, 2.0]))[1].tolist() == [-1, 0, 0]


# ---- the NLL term --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", (False, "kept", "all"))
@pytest.mark.parametrize("kind", ("token", "sequence"))
def test_the_nll_term_and_its_denominators(kind, average):
    logp, ref, mask = batch()
    weight = torch.rand(mask.shape, dtype=F64)
    seen = torch.where(mask, weight, 0)[:3]
    length = (mask[:3].to(F64) if average == "all" else seen).sum(1)
    total = -(seen * logp[:3]).sum(1)
    expected = (total / length).mean() if kind == "sequence" else total.sum() / length.sum()
    options = dict(mask=mask, token_weight=weight, average=average)
    plain = fk.dpo(logp, ref, **options)
    out = fk.dpo(logp, ref, nll=kind, nll_weight=0.3, **options)
    assert_close(out.nll, expected)
    assert_close(out.loss, plain.loss + 0.3 * expected)
    mixed = torch.tensor([0, 3, 1, 4, 2, 5])
    options = dict(mask=mask[mixed], token_weight=weight[mixed], average=average, pairs="interleaved")
    assert_close(fk.dpo(logp[mixed], ref[mixed], nll=kind, nll_weight=0.3, **options).loss, out.loss)


def test_shares_of_the_nll_add_up():
    logp, ref, mask = batch()
    each = fk.cpo(logp, mask=mask, reduction="none")
    whole = fk.cpo(logp, mask=mask, reduction="sum")
    assert_close(each.loss.sum(), whole.loss)
    assert_close(each.nll.sum(), whole.nll)
    assert_close(fk.cpo(logp, mask=mask, nll_denominator=100.0).nll, -logp[:3][mask[:3]].sum() / 100)


def test_the_two_nll_of_orpo_differ():
    """Token mean over all chosen tokens (Liger) or mean of each response's own mean (the row's)."""
    logp, _, mask = batch()
    rows, tokens = fk.orpo(logp, mask=mask), fk.orpo(logp, mask=mask, nll="token")
    assert_close(rows.losses, tokens.losses)
    assert_close(tokens.nll, -logp[:3][mask[:3]].mean())
    assert_close(rows.nll, -means(logp, mask)[0].mean())
    assert not rows.nll.isclose(tokens.nll)


def test_certain_and_empty_responses_under_orpo():
    for dtype in (torch.float32, F64):
        logp = torch.tensor([[0.0, 0.0], [-1.0, -2.0]], dtype=dtype, requires_grad=True)
        out = fk.orpo(logp)
        (grad,) = torch.autograd.grad(out.loss, logp)
        assert out.loss.isfinite() and grad.isfinite().all()
        assert_close(grad[0], torch.full((2,), -0.5, dtype=dtype))  # of the NLL alone


# ---- shifts of each pair, and segments -----------------------------------------------------------------------------


def test_a_shift_of_each_pair_lies_outside_beta():
    logp, ref, mask = batch()
    shift = torch.tensor([0.1, 0.0, 2.0], dtype=F64)
    chosen, rejected = sums(logp - ref, mask)
    expected = -logsigmoid(0.1 * (chosen - rejected) - shift)
    assert_close(fk.dpo(logp, ref, mask=mask, shift=shift).losses, expected)


def test_segment_means_with_holes_masks_and_weights():
    """Against the loop of the definition: ids -1, masked tokens, empty rows, weights of zero."""
    torch.manual_seed(3)
    ids = torch.tensor([[0, 0, -1, 0, 4, 4], [-1, -1, -1, -1, -1, -1], [-1, 1, 1, 2, -1, 3], [0, 1, 2, 3, 4, 5]])
    mask = torch.tensor([[1, 1, 1, 0, 1, 1], [1] * 6, [1, 1, 0, 0, 1, 1], [0] * 6], dtype=torch.bool)
    logp, ref = -torch.rand(4, 6, dtype=F64), -torch.rand(4, 6, dtype=F64)
    weight = torch.rand(4, 6, dtype=F64)
    weight[2, 5] = 0  # the only token of its segment
    scores = []
    for b in range(4):
        inside = [[t for t in range(6) if ids[b, t] == j and mask[b, t]] for j in range(6)]
        segments = [(weight[b, s], (logp - ref)[b, s]) for s in inside if weight[b, s].sum() != 0]
        found = [(w * x).sum() / w.sum() for w, x in segments]
        scores.append(sum(found) / len(found) if found else torch.zeros((), dtype=F64))
    h = torch.stack(scores)
    options = dict(mask=mask, token_weight=weight, average="segments", segment_ids=ids)
    assert_close(fk.dpo(logp, ref, **options).losses, -logsigmoid(0.1 * (h[:2] - h[2:])))
    cu = torch.tensor([0, 6, 12, 18, 24])
    flat = dict(mask=mask.view(-1), token_weight=weight.view(-1), average="segments", segment_ids=ids.view(-1))
    packed = fk.dpo(logp.view(-1), ref.view(-1), cu_seqlens=cu, **flat)
    assert_close(packed.losses, fk.dpo(logp, ref, **options).losses)


def test_one_segment_is_the_average():
    logp, ref, mask = batch()
    ids = torch.zeros(6, 7, dtype=torch.int32)
    one = fk.dpo(logp, ref, mask=mask, average="segments", segment_ids=ids).loss
    assert_close(one, fk.dpo(logp, ref, mask=mask, average="kept").loss)
    nll = fk.nll_loss(logp, mask=mask, average="segments", segment_ids=ids, reduction="mean").loss
    assert_close(nll, fk.nll_loss(logp, mask=mask, reduction="mean").loss)


# ---- oracles, and where conventions differ -------------------------------------------------------------------------


def liger(name, chosen, rejected, ref_chosen, ref_rejected, **options):
    dpo_loss = pytest.importorskip("liger_kernel.chunked_loss.dpo_loss", reason="the extra `bench` has Liger")
    full = torch.zeros(2 * len(chosen), 1)
    call = dpo_loss.LigerFusedLinearDPOFunction.preference_loss_fn
    return call(chosen, rejected, full, ref_chosen, ref_rejected, loss_type=name, **options)[0]


@pytest.mark.parametrize(
    "ours, theirs, options", [("dpo", "sigmoid", {}), ("slic", "hinge", {}), ("robust",) * 2 + ({"smoothing": 0.2},)]
)
def test_liger_agrees(ours, theirs, options):
    logp, ref, mask = batch()
    expected = liger(theirs, *sums(logp, mask), *sums(ref, mask), label_smoothing=options.get("smoothing", 0.0))
    assert_close(fk.preference_loss(ours, logp, ref, mask=mask, **options).loss, expected)


def test_liger_agrees_on_cpo_and_orpo():
    """Without the NLL term, which Liger takes over the batch's tokens in both."""
    cpo_loss = pytest.importorskip("liger_kernel.chunked_loss.cpo_loss", reason="the extra `bench` has Liger")
    from liger_kernel.chunked_loss.orpo_loss import LigerFusedLinearORPOFunction

    logp, _, mask = batch()
    full = torch.zeros(6, 1)
    expected = cpo_loss.LigerFusedLinearCPOFunction.preference_loss_fn(*sums(logp, mask), full)[0]
    assert_close(fk.cpo(logp, mask=mask).losses.mean(), expected)
    expected = LigerFusedLinearORPOFunction.preference_loss_fn(*means(logp, mask), full)[0]
    assert_close(fk.orpo(logp, mask=mask).losses.mean(), expected)


# ---- refusals ------------------------------------------------------------------------------------------------------

L = torch.zeros(2, 3)
IDS = torch.zeros(2, 3, dtype=torch.int64)
REFUSALS = {
    "cdpo smoothing": (lambda: fk.cdpo(L, L, smoothing=0.6), ValueError, r"smoothing must be in \[0, 0.5\], got 0.6"),
    "robust smoothing": (lambda: fk.robust(L, L, smoothing=0.5), ValueError, r"smoothing must be in \[0, 0.5\), got"),
    "negative smoothing": (lambda: fk.robust(L, L, smoothing=-0.1), ValueError, "smoothing must be in"),
    "smoothing nan": (lambda: fk.cdpo(L, L, smoothing=math.nan), ValueError, "smoothing must be a finite number"),
    "unknown hyper": (
        lambda: fk.dpo(L, L, smoothing=0.1),
        TypeError,
        "'dpo' takes no hyper-parameter, got 'smoothing'",
    ),
    "scale": (lambda: fk.orpo(L, odds_weight=-1.0), ValueError, "scale must be a finite number > 0"),
    "nll": (lambda: fk.orpo(L, nll="mean"), ValueError, "nll must be 'sequence' or 'token'"),
    "nll weight": (lambda: fk.cpo(L, alpha=math.inf), ValueError, "nll_weight must be a finite number"),
    "nll denominator": (lambda: fk.dpo(L, L, nll_denominator=3), ValueError, "nll_denominator must be None but for"),
    "nll denominator 0": (lambda: fk.cpo(L, nll_denominator=0), ValueError, "nll_denominator must be a finite"),
    "shift shape": (lambda: fk.dpo(L, L, shift=torch.zeros(2)), ValueError, r"shift must be .* got \(2,\)"),
    "no ids": (lambda: fk.dpo(L, L, average="segments"), ValueError, "segment_ids must be given"),
    "ids unused": (lambda: fk.dpo(L, L, segment_ids=IDS), ValueError, "segment_ids must be None"),
    "float ids": (lambda: fk.dpo(L, L, average="segments", segment_ids=L), TypeError, "segment_ids must have dtype"),
    "falling ids": (
        lambda: fk.dpo(L, L, average="segments", segment_ids=torch.tensor([[0, 1, 0], [0, 0, 0]])),
        ValueError,
        "segment_ids must not decrease",
    ),
    "huge ids": (lambda: fk.dpo(L, L, average="segments", segment_ids=IDS + 99), ValueError, "segment_ids must not"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case):
    call, kind, message = REFUSALS[case]
    with pytest.raises(kind, match=message):
        call()


def test_wrappers_pass_their_numbers_on():
    logp, ref, mask = batch()
    for wrapped, name, options in (
        (fk.slic(logp, ref, mask=mask), "slic", {}),
        (fk.cdpo(logp, ref, mask=mask, smoothing=0.3), "cdpo", {"smoothing": 0.3}),
        (fk.robust(logp, ref, mask=mask, smoothing=0.3), "robust", {"smoothing": 0.3}),
        (fk.cpo(logp, mask=mask, alpha=0.3), "cpo", {"nll_weight": 0.3}),
        (fk.orpo(logp, mask=mask, odds_weight=0.3), "orpo", {"scale": 0.3}),
    ):
        expected = preference_loss(name, logp, ref if PREFERENCE[name].reference else None, mask=mask, **options)
        assert torch.equal(wrapped.loss, expected.loss)

"""What a row has beside its margin: hyper-parameters, NLL terms, segments; and where libraries differ."""

import copy
import math
import pickle

import pytest
import test_losses
import test_losses_pointwise
import torch
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

import finealign_kernels as fk
from finealign_kernels.formulas import margin
from finealign_kernels.losses.preference import PREFERENCE, preference_loss
from finealign_kernels.losses.table import Row

F64 = torch.float64
pytestmark = pytest.mark.usefixtures("route")


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


# ---- further rows --------------------------------------------------------------------------------------------------

# Scores of three pairs (section 12), beta = .5, and references for the row that reads them apart
H = torch.tensor([0.3, -0.8, 1.5, -0.3, 0.4, 0.2], dtype=F64)
REFERENCE = torch.tensor([-2.0, -2.2, -3.7, -4.1, -2.5, -3.7], dtype=F64)
TENTH = dict(smoothing=0.1)
FURTHER = [  # row, options, loss, dL/dh of the chosen, of the rejected (None: minus the chosen's)
    ("exo_pair", TENTH, 0.4827628876, [-0.0772987195, -0.1066601501, -0.0581105871], None),
    (
        "nca_pair",
        {},
        1.4043370827,
        [-0.0323092053, -0.0663385817, 0.0031280081],
        [0.0385475129, 0.0458194998, 0.0437482656],
    ),
    (
        "bco_pair",
        {},
        1.3614452945,
        [-0.0770950258, -0.0997812767, -0.0534702168],
        [0.0770950258, 0.0916389996, 0.0874965312],
    ),
    ("sppo_hard", {}, 2.6233333333, [-0.4666666667, -1.2, 0.3333333333], [0.4666666667, 0.9333333333, 0.8]),
    (
        "apo_zero",
        {},
        0.9731541517,
        [-0.0414331678, -0.0400434576, -0.0363158323],
        [0.0414331678, 0.0412527621, 0.0415626734],
    ),
    (
        "apo_down",
        {},
        1.0107080704,
        [0.0006901158, 0.0019127509, -0.0012421201],
        [0.0407430519, 0.0381307067, 0.0375579524],
    ),
    (
        "apo_zero_unpaired",
        {},
        0.4865770758,
        [-0.0207165839, -0.0200217288, -0.0181579161],
        [0.0207165839, 0.0206263811, 0.0207813367],
    ),
    ("aot", TENTH, 0.6688937249, [-0.0542595805, -0.085106539, -0.0462567781], None),
    (
        "aot_unpaired",
        TENTH,
        0.6616305165,
        [-0.0645837673, -0.0770294168, -0.0443107348],
        [0.0770294168, 0.0443107348, 0.0645837673],
    ),
    ("discopop", {}, 0.7666318285, [-0.1218067411, -0.1075945195, -0.0870067936], None),
    (
        "offset",
        dict(shift=0.3),
        0.8225610702,
        [-0.0833333333, -0.1184915838, -0.0688970702],
        None,
    ),  # the first margin is 0
    (
        "dpo",
        dict(divergence="forward_kl"),
        0.7544774139,
        [-0.0524070655, -0.2541437476, -0.0158457857],
        [0.0954918993, 0.0765466258, 0.0581428886],
    ),
    (
        "dpo",
        dict(divergence="js"),
        0.6969916061,
        [-0.0328083651, -0.0668730666, -0.0136992833],
        [0.0442866606, 0.0388956224, 0.0338053113],
    ),
    (
        "dpo",
        dict(divergence="alpha"),
        0.7130916773,
        [-0.0610072943, -0.1646466248, -0.030982244],
        [0.0823512335, 0.0903599835, 0.0593477534],
    ),
]


def test_every_row_has_a_worked_example():
    worked = *test_losses.GOLDEN, *test_losses_pointwise.GOLDEN, *FURTHER
    assert {name for name, *_ in worked} == set(PREFERENCE)


@pytest.mark.parametrize("name, options, loss, up, down", FURTHER)
def test_golden_of_three_pairs(name, options, loss, up, down):
    logp = (H + REFERENCE)[:, None].requires_grad_()
    out = fk.preference_loss(name, logp, REFERENCE[:, None], beta=0.5, **options)
    (grad,) = torch.autograd.grad(out.loss, logp)
    assert_close(out.loss.item(), loss, rtol=0, atol=1e-9)
    expected = torch.tensor([*up, *(down or [-x for x in up])], dtype=F64)
    assert_close(grad[:, 0], expected, rtol=0, atol=1e-9)
    assert_close(torch.cat([out.chosen_rewards, out.rejected_rewards]), 0.5 * H)


@pytest.mark.parametrize(
    "name, theirs", [(n, n) for n in ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")]
)
def test_liger_agrees_on_single_rewards(name, theirs):
    logp, ref, mask = batch()
    assert_close(
        fk.preference_loss(name, logp, ref, mask=mask).loss, liger(theirs, *sums(logp, mask), *sums(ref, mask))
    )


def test_rows_that_are_each_other():
    logp, ref, mask = batch()
    call = fk.preference_loss
    dpo = fk.dpo(logp, ref, mask=mask).losses
    assert_close(call("offset", logp, ref, mask=mask, shift=0.4).losses, fk.dpo(logp, ref, mask=mask, shift=0.4).losses)
    assert_close(2 * call("pdpo", logp, ref, mask=mask).losses, call("bco_pair", logp, ref, mask=mask).losses)
    assert_close(
        2 * call("apo_zero_unpaired", logp, ref, mask=mask).losses, call("apo_zero", logp, ref, mask=mask).losses
    )
    assert_close(call("kto", logp, ref, mask=mask).losses, call("apo_zero_unpaired", logp, ref, mask=mask).losses)
    for pair in range(3):  # alone, a pair has nothing to be matched with
        one = torch.tensor([pair, pair + 3])
        for name in ("aot", "aot_unpaired"):
            assert_close(call(name, logp[one], ref[one], mask=mask[one]).losses, dpo[pair : pair + 1])


def test_matching_by_rank():
    """Against sorting, ties included; with references summed per response too."""
    logp, ref, mask = batch()
    mask = mask.clone()
    logp[1], ref[1], mask[1] = logp[0], ref[0], mask[0]
    logp[4], ref[4], mask[4] = logp[3], ref[3], mask[3]
    policy, reference, ratio = sums(logp, mask), sums(ref, mask), sums(logp - ref, mask)
    delta = (policy[0] - policy[1]).sort().values - (reference[0] - reference[1]).sort().values
    expected = -logsigmoid(0.1 * delta).mean()
    assert_close(fk.preference_loss("aot", logp, ref, mask=mask).loss, expected)
    assert_close(fk.preference_loss("aot", logp, torch.cat(reference), mask=mask).loss, expected)
    delta = ratio[0].sort().values - ratio[1].sort().values
    assert_close(fk.preference_loss("aot_unpaired", logp, ref, mask=mask).loss, -logsigmoid(0.1 * delta).mean())


def test_discopop_far_out():
    m = torch.tensor([-1e4, -800.0, 800.0, 1e4])
    value, slope = margin.discovered(m, tau=0.05)
    assert value.tolist() == [1e4, 800, 0, 0] and slope.tolist() == [-1, -1, 0, 0]


# ---- divergences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ("forward_kl", "js", "alpha"))
@pytest.mark.parametrize("name", ("dpo", "ipo", "slic", "robust", "exo_pair", "discopop"))
@pytest.mark.parametrize("average", (False, "kept"))
def test_divergences_transform_the_score(name, divergence, average):
    g = {
        "forward_kl": lambda h: 1 - (-h).exp(),
        "js": lambda h: math.log(2) + logsigmoid(h),
        "alpha": lambda h: ((-0.3 * h).exp() - 1) / -0.3,
    }[divergence]
    logp, ref, mask = batch()
    h = torch.cat((means if average else sums)(logp - ref, mask))
    alpha = {"alpha": 0.7} if divergence == "alpha" else {}
    logp.requires_grad_()
    out = fk.preference_loss(name, logp, ref, mask=mask, average=average, divergence=divergence, **alpha)
    expected = fk.preference_loss(name, g(h)[:, None], torch.zeros(6, 1, dtype=F64))
    assert_close(out.loss.detach(), expected.loss)

    def call(logp):
        return fk.preference_loss(
            name, logp, ref, mask=mask, average=average, divergence=divergence, reduction="none", **alpha
        ).loss

    assert torch.autograd.gradcheck(call, logp)


def test_where_the_average_stands():
    """TRL divides g(h) by the length; here h is averaged first."""
    logp, ref, mask = batch()
    g = math.log(2) + logsigmoid(torch.cat(sums(logp - ref, mask)))
    trl = (g / mask.sum(1)).chunk(2)
    found = fk.dpo(logp, ref, mask=mask, average="kept", divergence="js").loss
    assert not found.isclose(-logsigmoid(0.1 * (trl[0] - trl[1])).mean())
    g = (math.log(2) + logsigmoid(torch.cat(means(logp - ref, mask)))).chunk(2)
    assert_close(found, -logsigmoid(0.1 * (g[0] - g[1])).mean())


def test_divergences_stay_finite_where_the_score_is():
    h = torch.tensor([-1e4, -81.0, -79.0, 0.0, 1e4])
    value, slope = margin.forward_kl(h)
    assert value.isfinite().all() and slope[:2].tolist() == [0, 0] and slope[2] > 1e34 and slope[3:].tolist() == [1, 0]
    assert margin.forward_kl(torch.tensor([-torch.inf]))[0] == -torch.inf
    for alpha, limit in ((1.0, 1e-15), (1 + 1e-7, 1e-5)):
        assert_close(margin.alpha_divergence(H, alpha=alpha)[0], H, rtol=limit, atol=limit)


# ---- published weights ---------------------------------------------------------------------------------------------


def test_ld_weights():
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0]], dtype=torch.bool)
    weight = fk.ld_weights(torch.zeros(4, 5), mask=mask, alpha=0.25)
    seen = [weight[b][mask[b]].tolist() for b in range(4)]
    assert seen == [[1, 1, 0.25, 0.25], [1, 1], [1, 1], [1, 1, 0.25]]
    mixed = fk.ld_weights(torch.zeros(4, 5), mask=mask, alpha=0.25, pairs="interleaved")
    assert [mixed[b][mask[b]].tolist() for b in range(4)] == [[1, 1, 0.25, 0.25], [1, 1], [1, 1], [1, 1, 0.25]]
    cu = torch.tensor([0, 4, 6, 8, 11])
    assert fk.ld_weights(torch.zeros(11), cu_seqlens=cu, alpha=0.25).tolist() == sum(seen, [])
    pair = fk.ld_weights((torch.zeros(2, 5), torch.zeros(2, 5)), mask=(mask[:2], mask[2:]), alpha=0.25)
    assert torch.equal(torch.cat(pair), weight)


def test_ld_weights_give_the_sums_that_trl_has():
    logp, ref, mask = batch()
    place, shared = mask.cumsum(1), torch.minimum(*mask.sum(1).chunk(2)).repeat(2)[:, None]
    near, far = mask & (place <= shared), mask & (place > shared)
    logp_sums, ref_sums = ((x * near).sum(1) + 0.3 * (x * far).sum(1) for x in (logp, ref))
    expected = fk.dpo(logp_sums[:, None], ref_sums[:, None]).loss
    weight = fk.ld_weights(logp, mask=mask, alpha=0.3)
    assert_close(fk.dpo(logp, ref, mask=mask, token_weight=weight).loss, expected)


def test_wpo_weights():
    logp, ref, mask = batch()
    logp.requires_grad_()
    lssq = -torch.rand(mask.shape, dtype=F64)
    dirty = torch.where(mask, lssq, torch.nan)
    weight = fk.wpo_weights(logp, dirty, mask=mask)
    each = torch.cat(means((logp - lssq).detach(), mask)).exp()
    assert_close(weight, each[:3] * each[3:])
    out = fk.dpo(logp, ref, mask=mask, pair_weight=weight)
    plain = fk.dpo(logp, ref, mask=mask, reduction="none")
    assert_close(out.losses, weight * plain.losses)
    found = torch.autograd.grad(out.loss, logp)[0]
    assert_close(found, torch.autograd.grad(plain.loss, logp, weight / 3)[0])
    order = torch.tensor([0, 3, 1, 4, 2, 5])
    assert_close(fk.wpo_weights(logp[order], dirty[order], mask=mask[order], pairs="interleaved"), weight)


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
    "ours, theirs, options",
    [
        ("dpo", "sigmoid", {}),
        ("exo_pair",) * 2 + ({"smoothing": 0.2},),
        ("discopop",) * 2 + ({},),
        ("slic", "hinge", {}),
        ("robust",) * 2 + ({"smoothing": 0.2},),
    ],
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
    "exo smoothing": (
        lambda: fk.preference_loss("exo_pair", L, L, smoothing=0.0),
        ValueError,
        r"smoothing must be in \(0, 0.5\), got 0.0",
    ),
    "tau": (lambda: fk.preference_loss("discopop", L, L, tau=0.0), ValueError, "tau must be above 0"),
    "divergence": (lambda: fk.dpo(L, L, divergence="kl"), ValueError, "divergence must be one of .*got 'kl'"),
    "divergence of a row": (
        lambda: fk.preference_loss("bco_pair", L, L, divergence="js"),
        ValueError,
        "divergence must be 'reverse_kl' for 'bco_pair'",
    ),
    "divergence without reference": (lambda: fk.simpo(L, divergence="js"), ValueError, "divergence must be 'reverse_"),
    "alpha": (lambda: fk.dpo(L, L, divergence="alpha", alpha=math.inf), ValueError, "alpha must be a finite"),
    "pair weight": (lambda: fk.dpo(L, L, pair_weight=torch.ones(2)), ValueError, r"pair_weight must have shape \(1,\)"),
    "ld alpha": (lambda: fk.ld_weights(L, alpha=1.5), ValueError, r"alpha must be in \[0, 1\], got 1.5"),
    "ld odd": (lambda: fk.ld_weights(torch.zeros(3, 2)), ValueError, "logp must hold an even number"),
    "wpo pairs": (lambda: fk.wpo_weights(L, L, pairs="both"), ValueError, "pairs must be"),
    "wpo shape": (lambda: fk.wpo_weights(L, L[:, :2]), ValueError, "log_sum_sq_probs must have shape"),
    "scale": (lambda: fk.orpo(L, odds_weight=-1.0), ValueError, "odds_weight must be a finite number > 0"),
    "nll": (lambda: fk.orpo(L, nll="mean"), ValueError, "nll must be 'sequence' or 'token'"),
    "nll weight": (lambda: fk.cpo(L, alpha=math.inf), ValueError, "alpha must be a finite number"),
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


def own_phi(m):
    return -m, torch.full_like(m, -1)


@pytest.mark.parametrize("travel", (copy.deepcopy, lambda row: pickle.loads(pickle.dumps(row))), ids=("copy", "pickle"))
def test_rows_travel_to_other_processes(travel):
    """Those of the table by name, so that they stay rows that fused kernels know; one's own with their functions."""
    for name, row in PREFERENCE.items():
        assert travel(row) is row, name
    own = Row(own_phi, "-m", "", beta=0.5)
    assert travel(own) == own and travel(own).scale(0.5) == 1

"""Preference losses and NLL: golden values, slopes, invariances, degenerate cases, refusals."""

import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import finealign_kernels as fk
from finealign_kernels.formulas import margin
from finealign_kernels.losses.preference import PREFERENCE, Row, score_loss
from finealign_kernels.losses.table import Hyper, check_row

F64 = torch.float64
pytestmark = pytest.mark.usefixtures("route")


def row(*values):
    return torch.tensor([values], dtype=F64)


# Fixture B of the specification: one pair, 3 and 5 tokens, beta = .5
CHOSEN, REF_CHOSEN = row(-0.5, -1.0, -0.2), row(-0.7, -0.9, -0.4)
REJECTED, REF_REJECTED = row(-1.2, -0.3, -0.8, -0.6, -1.5), row(-1.0, -0.5, -0.6, -0.9, -1.1)

# name, options, loss, gradient of each chosen token, of each rejected token
GOLDEN = [
    ("dpo", dict(average=False), 0.5543552445, -0.2127787416, 0.2127787416),
    ("dpo", dict(average="kept"), 0.6539469673, -0.0800017766, 0.048001066),
    ("dpo", dict(average="all"), 0.6539469673, -0.0800017766, 0.048001066),
    ("ipo", dict(average=False), 0.16, -0.8, 0.8),
    ("ipo", dict(average="kept"), 0.7056, -0.56, 0.336),
    ("ipo_z", dict(average=False), 0.04, -0.2, 0.2),
    ("ipo_z", dict(average="kept"), 0.1764, -0.14, 0.084),
    ("simpo", dict(beta=2.0, shift=1.0), 0.8971358218, -0.3948427887, 0.2369056732),
    ("simpo", dict(beta=2.0, shift=1.0, average=False), 0.0122025846, -0.02425687, 0.02425687),
    ("slic", dict(average=False), 0.7, -0.5, 0.5),
    ("slic", dict(average="kept"), 0.92, -0.1666666667, 0.1),
    ("cdpo", dict(average=False), 0.5843552445, -0.1627787416, 0.1627787416),
    ("cdpo", dict(average="kept"), 0.6619469673, -0.06333511, 0.038001066),
    ("cdpo", dict(average=False, smoothing=0.0), 0.5543552445, -0.2127787416, 0.2127787416),
    ("robust", dict(average=False), 0.5168552445, -0.2752787416, 0.2752787416),
    ("robust", dict(average="kept"), 0.6439469673, -0.10083511, 0.060501066),
    ("robust", dict(average=False, smoothing=0.0), 0.5543552445, -0.2127787416, 0.2127787416),
    ("cpo", dict(beta=0.1), 1.1338988018, -0.3766240428, 0.0432907095),
    ("cpo", dict(beta=0.1, nll_weight=0.0), 0.5672321351, -0.0432907095, 0.0432907095),
    ("cpo", dict(beta=0.1, average="kept"), 1.2442698978, -0.3497389102, 0.0098433461),
    ("orpo", dict(beta=1.0), 0.6098677703, -0.3603643761, 0.0119886379),
    ("kto", dict(beta=0.1, shift=0.1 * 0.05), 0.4925006093, -0.0124980471, 0.0124961727),
    ("kto", dict(beta=0.1, shift=0.1 * 0.05, average="kept"), 0.4980000152, -0.0041666406, 0.0024999244),
]


def fixture_b(name, **options):
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    ref = (REF_CHOSEN, REF_REJECTED) if PREFERENCE[name].reference else None
    out = fk.preference_loss(name, (chosen, rejected), ref, **{"beta": 0.5, **options})
    return out, *torch.autograd.grad(out.loss, (chosen, rejected), allow_unused=True)


@pytest.mark.parametrize("name, options, loss, up, down", GOLDEN)
def test_golden(name, options, loss, up, down):
    out, dchosen, drejected = fixture_b(name, **options)
    assert_close(out.loss.item(), loss, rtol=0, atol=1e-9)
    assert_close(dchosen, torch.full_like(dchosen, up), rtol=0, atol=1e-9)
    assert_close(drejected, torch.full_like(drejected, down), rtol=0, atol=1e-9)


def test_golden_scores_and_parts():
    """What stands beside the losses in sections 2.1 to 2.9: h, Δ, the parts of a sum, log-odds, a minimum."""
    for average, h in ((False, (0.3, -0.3)), ("kept", (0.1, -0.06)), ("all", (0.1, -0.06))):
        out, *_ = fixture_b("dpo", average=average)
        assert_close(torch.cat([out.chosen_rewards, out.rejected_rewards]) / 0.5, torch.tensor(h, dtype=F64))
    ids = torch.tensor([[0, 0, 1]]), torch.tensor([[0, 1, 1, 1, 2]])
    out, *_ = fixture_b("dpo", average="segments", segment_ids=ids)
    assert_close(out.margins.item() / 0.5, 0.2916666667, rtol=0, atol=1e-9)
    out, *_ = fixture_b("cpo", beta=0.1, average="kept")
    assert_close(out.losses.item(), 0.6776032311, rtol=0, atol=1e-9)
    odds = [margin.log_odds(torch.tensor([s], dtype=F64))[0] for s in (-1.7 / 3, -0.88, -1.7, -4.4)]
    assert_close((odds[0] - odds[1]).item(), 0.6155342867, rtol=0, atol=1e-9)
    assert_close((odds[2] - odds[3]).item(), 2.8893755666, rtol=0, atol=1e-9)
    assert_close(fixture_b("orpo", beta=1.0)[0].losses.item(), 0.1 * math.log1p(math.exp(-0.6155342867)))
    lowest = margin.smoothed(torch.tensor(2.1972245773, dtype=F64), smoothing=0.1)[1]
    assert_close(lowest.item(), 0.0, rtol=0, atol=1e-10)


MASKED = [  # pivots of the specification's section 5.4 as token weights: loss, gradients
    (False, 0.5130152524, -0.2006561699, 0.2006561699),
    ("kept", 0.6132820581, -0.1146073792, 0.0764049195),
]


@pytest.mark.parametrize("average, loss, up, down", MASKED)
def test_golden_token_weights(average, loss, up, down):
    weights = row(1, 0, 1), row(0, 1, 1, 0, 1)
    out, dchosen, drejected = fixture_b("dpo", average=average, token_weight=weights)
    assert_close(out.loss.item(), loss, rtol=0, atol=1e-9)
    assert_close(dchosen, up * weights[0], rtol=0, atol=1e-9)
    assert_close(drejected, down * weights[1], rtol=0, atol=1e-9)


def test_golden_segment_balanced_weights():
    """Mean of segment means (section 2.9), as token weights 1 / (J |s_j|) or from the ids."""
    weights = row(0.25, 0.25, 0.5), row(1 / 3, 1 / 9, 1 / 9, 1 / 9, 1 / 3)
    ids = torch.tensor([[0, 0, 1]]), torch.tensor([[0, 1, 1, 1, 2]])
    expected = fixture_b("dpo", average=False, token_weight=weights)
    out, dchosen, drejected = fixture_b("dpo", average="segments", segment_ids=ids)
    assert_close(expected[0].loss, out.loss, rtol=1e-14, atol=0)
    assert_close(expected[1:], (dchosen, drejected), rtol=1e-13, atol=0)
    assert_close(out.loss.item(), 0.6228865816, rtol=0, atol=1e-9)
    assert_close(dchosen, row(-0.057950768, -0.057950768, -0.115901536), rtol=0, atol=1e-9)
    assert_close(drejected[0, :2], torch.tensor([0.0772676907, 0.0257558969], dtype=F64), rtol=0, atol=1e-9)


def test_golden_nll():
    """Adaptive SFT of section 5.4: the mask as weights, divided by the kept tokens or by all."""
    logp = CHOSEN.clone().requires_grad_()
    kept = fk.nll_loss(logp, token_weight=row(1, 0, 1))
    every = fk.nll_loss(logp, token_weight=row(1, 0, 1), average="all")
    assert_close(kept.loss.item(), 0.35)
    assert_close(every.loss.item(), 0.7 / 3)
    assert_close(torch.autograd.grad(kept.loss, logp)[0], row(-0.5, 0, -0.5))
    both = torch.cat([CHOSEN, row(-4.0, 0, 0)])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    assert_close(fk.nll_loss(both, mask=mask).loss.item(), 5.7 / 4)  # token mean
    assert_close(fk.nll_loss(both, mask=mask, reduction="mean").loss.item(), (1.7 / 3 + 4) / 2)  # sequence mean
    assert_close(fk.nll_loss(both, mask=mask, reduction="mean", average=False).loss.item(), 5.7 / 2)
    assert_close(fk.nll_loss(both, mask=mask, reduction="sum", average=False, denominator=10).loss.item(), 0.57)


def test_logged_numbers_are_detached():
    out, *_ = fixture_b("dpo", average=False)
    assert_close(out.chosen_rewards, torch.tensor([0.15], dtype=F64))
    assert_close(out.rejected_rewards, torch.tensor([-0.15], dtype=F64))
    assert_close(out.margins, torch.tensor([0.3], dtype=F64))
    assert out.accuracies.tolist() == [1.0]
    assert out.loss.requires_grad and not any(t.requires_grad for t in out[1:])


# ---- every row of the table ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PREFERENCE)
@pytest.mark.parametrize("spread", (1e-3, 1.0, 30.0))
def test_slope_is_the_derivative(name, spread):
    torch.manual_seed(0)
    score = torch.randn(64, dtype=F64) * spread
    score = (score if PREFERENCE[name].reference else -score.abs()).requires_grad_()
    value, dscore = score_loss(name, score, beta=0.7, shift=0.3)
    (expected,) = torch.autograd.grad(value.sum(), score)
    assert_close(dscore, expected, rtol=1e-12, atol=1e-14)


def batch(dtype=F64, pairs=3, width=7):
    torch.manual_seed(1)
    logp, ref = -torch.rand(2 * pairs, width, dtype=dtype) * 3, -torch.rand(2 * pairs, width, dtype=dtype) * 3
    lengths = torch.tensor([7, 1, 4, 3, 5, 2])[: 2 * pairs]
    mask = torch.arange(width) < lengths[:, None]
    weight = torch.rand(2 * pairs, width, dtype=dtype)
    return logp, ref, mask, weight


def run(name, logp, ref, **options):
    logp = logp.clone().requires_grad_()
    out = fk.preference_loss(name, logp, ref if PREFERENCE[name].reference else None, **options)
    upstream = torch.arange(1, out.loss.numel() + 1, dtype=logp.dtype).view(out.loss.shape)
    return out, torch.autograd.grad(out.loss, logp, upstream)[0]


@pytest.mark.parametrize("name", PREFERENCE)
@pytest.mark.parametrize("average", (False, "kept", "all"))
def test_gradcheck(name, average):
    logp, ref, mask, weight = batch()
    ref = ref if PREFERENCE[name].reference else None

    def call(logp):
        return fk.preference_loss(
            name, logp, ref, mask=mask, token_weight=weight, average=average, reduction="none"
        ).loss

    assert torch.autograd.gradcheck(call, logp.requires_grad_())


@pytest.mark.parametrize("name", PREFERENCE)
@pytest.mark.parametrize("average", (False, "kept", "all"))
def test_padding_packing_and_layout_change_nothing(name, average):
    logp, ref, mask, weight = batch()
    options = dict(average=average, reduction="none")
    out, grad = run(name, logp, ref, mask=mask, token_weight=weight, **options)
    assert not grad[~mask].any() and grad[mask].all()
    # NaN at masked places
    dirty = [torch.where(mask, t, torch.nan) for t in (logp, ref, weight)]
    again, dirty_grad = run(name, dirty[0], dirty[1], mask=mask, token_weight=dirty[2], **options)
    assert torch.equal(again.losses, out.losses) and torch.equal(dirty_grad, grad)
    # packed
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    packed, flat_grad = run(name, logp[mask], ref[mask], cu_seqlens=cu, token_weight=weight[mask], **options)
    assert_close(packed.losses, out.losses, rtol=1e-13, atol=1e-14)
    assert_close(flat_grad, grad[mask], rtol=1e-13, atol=1e-14)
    # interleaved pairs
    order = torch.tensor([0, 3, 1, 4, 2, 5])
    mixed, mixed_grad = run(
        name, logp[order], ref[order], mask=mask[order], token_weight=weight[order], pairs="interleaved", **options
    )
    assert torch.equal(mixed.losses, out.losses) and torch.equal(mixed_grad, grad[order])
    # chosen and rejected of different width
    narrow = [(t[:3], t[3:, :5]) for t in (logp, ref, mask, weight)]
    two = fk.preference_loss(
        name,
        narrow[0],
        narrow[1] if PREFERENCE[name].reference else None,
        mask=narrow[2],
        token_weight=narrow[3],
        **options,
    )
    assert_close(two.losses, out.losses, rtol=1e-13, atol=1e-14)
    # any order of the pairs
    turn = torch.tensor([2, 0, 1, 5, 3, 4])
    turned, _ = run(name, logp[turn], ref[turn], mask=mask[turn], token_weight=weight[turn], **options)
    assert torch.equal(turned.losses, out.losses[turn[:3]])


@pytest.mark.parametrize("name", [name for name, row in PREFERENCE.items() if not row.match])
def test_any_split_with_a_global_denominator(name):
    logp, ref, mask, _ = batch(torch.float32)
    whole, grad = run(name, logp, ref, mask=mask)
    total, more = torch.zeros_like(grad), {}
    if PREFERENCE[name].nll == "token":
        more = {"nll_denominator": mask[:3].sum()}  # chosen tokens of all ranks
    for pick in (torch.tensor([0, 3]), torch.tensor([1, 2, 4, 5])):
        _, part = run(name, logp[pick], ref[pick], mask=mask[pick], denominator=3, **more)
        total[pick] += part
    assert (total - grad).norm() <= 1e-5 * grad.norm()


@pytest.mark.parametrize("name", PREFERENCE)
def test_reductions(name):
    logp, ref, mask, _ = batch()
    losses = run(name, logp, ref, mask=mask)[0].losses
    more = {"nll_denominator": 3.0} if PREFERENCE[name].nll == "token" else {}
    for options, expected in (
        (dict(reduction="mean"), losses.mean()),
        (dict(reduction="sum"), losses.sum()),
        (dict(denominator=torch.tensor(7.0), **more), losses.sum() / 7),
        (dict(reduction="none"), losses),
    ):
        out, _ = run(name, logp, ref, mask=mask, **options)
        assert_close(out.loss.detach(), expected + out.nll)
        assert bool((out.nll != 0).all()) == bool(PREFERENCE[name].nll)


@pytest.mark.parametrize("name", PREFERENCE)
def test_a_second_backward_is_exact(name):
    logp, ref, mask, _ = batch()
    logp.requires_grad_()
    out = fk.preference_loss(name, logp, ref if PREFERENCE[name].reference else None, mask=mask)
    (first,) = torch.autograd.grad(out.loss, logp, retain_graph=True)
    (second,) = torch.autograd.grad(out.loss, logp)
    assert torch.equal(first, second)


# ---- a row of one's own --------------------------------------------------------------------------------------------


def test_a_loss_of_ones_own_is_one_row(monkeypatch):
    """What walks the table covers it without another line."""

    def exponential(m, *, rate):
        return (-rate * m).exp(), -rate * (-rate * m).exp()

    hyper = {"rate": Hyper(0.5, lambda r: r > 0, "be above 0")}
    monkeypatch.setitem(PREFERENCE, "mine", Row(exponential, "e^(-rate m)", "here", beta=0.3, hyper=hyper))
    test_slope_is_the_derivative("mine", 1.0)
    test_any_split_with_a_global_denominator("mine")
    test_no_pairs("mine")
    for average in (False, "kept", "all"):
        test_gradcheck("mine", average)
        test_padding_packing_and_layout_change_nothing("mine", average)
        test_empty_responses("mine", average)
    logp, ref, mask, _ = batch()
    chosen, rejected = torch.where(mask, logp - ref, 0).sum(1).chunk(2)
    out = fk.preference_loss("mine", logp, ref, mask=mask, rate=2.0)
    assert_close(out.loss, (-0.6 * (chosen - rejected)).exp().mean())


def test_a_row_in_place_of_a_name(route):
    """The same numbers as under its name; by the fused op where its formula is one of ours."""
    logp, ref, mask, weight = batch()
    options = dict(mask=mask, token_weight=weight, average="kept", beta=0.4, nll_weight=0.2)
    for name in ("robust", "orpo", "apo_down", "nca_pair", "kto"):
        references = ref if PREFERENCE[name].reference else None
        named, grad = run(name, logp, ref, **options)
        x = logp.clone().requires_grad_()
        own = fk.preference_loss(PREFERENCE[name]._replace(source="here"), x, references, **options)
        assert all(torch.equal(a, b) for a, b in zip(own, named, strict=True))
        assert torch.equal(torch.autograd.grad(own.loss, x)[0], grad)

    def steep(m, *, rate):
        return (-rate * m).exp(), -rate * (-rate * m).exp()

    mine = fk.Row(steep, "e^(-rate m)", "here", hyper={"rate": fk.Hyper(0.5, lambda r: r > 0, "be above 0")})
    chosen, rejected = torch.where(mask, logp - ref, 0).sum(1).chunk(2)
    out = fk.preference_loss(mine, logp, ref, mask=mask, beta=0.3, rate=2.0)
    assert_close(out.losses, (-0.6 * (chosen - rejected)).exp())
    single = mine._replace(pair=False, label="class")
    sign = torch.tensor([1, -1, 1, -1, 1, -1], dtype=F64)
    out = fk.pointwise_loss(single, logp, ref, target=sign == 1, mask=mask, beta=0.3)
    assert_close(out.losses, (-0.15 * sign * torch.where(mask, logp - ref, 0).sum(1)).exp())
    for call, message in (
        (lambda: fk.preference_loss(mine, logp, ref, rate=-1.0), "rate must be above 0, got -1.0"),
        (lambda: fk.preference_loss(mine, logp), r"ref_logp must be given for the row 'e\^\(-rate m\)'"),
        (lambda: fk.preference_loss(single, logp, ref, divergence="js"), "'reverse_kl' for the row"),
        (lambda: fk.pointwise_loss(mine, logp, ref, target=sign), "name must be a Row with pair=False"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


WRONG = {  # formulas of one's own, and what is said of them
    "sign": (
        lambda m: ((-m).exp(), (-m).exp()),
        "phi must return the derivative of its value, -109.947 at -4.7, got",
    ),
    "half": (
        lambda m: (m.square(), m),
        "phi must return the derivative of its value, -9.4 at -4.7, got the slope -4",
    ),
    "left": (lambda m: (m.square(), 2 * m.clamp(min=-3)), "-9.4 at -4.7, got the slope -6"),
    "no slope": (lambda m: m.square(), r"phi must return \(value, slope\).* got a Tensor"),
    "sum": (lambda m: (m.square().sum(), 2 * m), r"in the shape of the margin \(7,\), got \[\(\), \(7,\)\]"),
    "NaN": (lambda m: (m.square(), 2 * m * torch.nan), "got the slope nan"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_formula_of_ones_own_is_refused(case):
    logp = torch.zeros(2, 3)
    formula, message = WRONG[case]
    with torch.inference_mode(case == "sign"), pytest.raises(ValueError, match=message):
        fk.preference_loss(fk.Row(formula, "mine", "here"), logp, logp)
    with pytest.raises(ValueError, match=message.replace("phi", "transform")):
        fk.preference_loss(fk.Row(torch_hinge, "mine", "here", transform=formula), logp, logp)


HINGE = fk.Row(lambda m: torch_hinge(m), "mine", "here")
UNFIT = {  # columns that are unknown or do not go together, and what is said of them
    "label": (dict(label="clas"), r"Row.label must be one of \(None, 'class', 'soft', 'value'\), got 'clas'"),
    "match": (dict(match="chosen"), "Row.match must be one of .* got 'chosen'"),
    "nll": (dict(nll="tokens"), "Row.nll must be one of .* got 'tokens'"),
    "phi": (dict(phi="logistic"), "Row.phi must be a function, got 'logistic'"),
    "scale": (dict(scale=2.0), "Row.scale must be a function, got 2.0"),
    "positive": (dict(positive="ce", label="class"), "Row.positive must be a function or None, got 'ce'"),
    "unlabelled": (dict(pair=False), "Row.label must be given with pair=False, got None"),
    "unlabelled positive": (dict(positive="nll"), "Row.label must be given beside positive, got None"),
    "chosen": (
        dict(label="class", chosen=lambda m: torch_hinge(m)),
        "one of label, match and chosen, got label and ch",
    ),
    "matched": (dict(label="class", match="rejected"), "one of label, match and chosen, got label and match"),
    "transform": (dict(label="class", transform=lambda m: torch_hinge(m)), "Row.transform must be None beside label"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_row_whose_columns_do_not_go_together_is_refused(case):
    columns, message = UNFIT[case]
    logp = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=message):
        fk.preference_loss(HINGE._replace(**columns), logp, logp)


def test_rows_of_the_table_go_together():
    for row in PREFERENCE.values():
        check_row(row)


def torch_hinge(m):
    return (1 - m).clamp(min=0), torch.where(m < 1, -1.0, 0.0).to(m.dtype)


def test_a_wrong_row_of_the_table_is_seen(monkeypatch):
    wrong = Row(lambda m: (m.exp(), -m.exp()), "wrong slope", "here")
    monkeypatch.setitem(PREFERENCE, "wrong", wrong)
    with pytest.raises(AssertionError):
        test_slope_is_the_derivative("wrong", 1.0)


# ---- degenerate cases ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PREFERENCE)
@pytest.mark.parametrize("average", (False, "kept", "all"))
def test_empty_responses(name, average):
    logp, ref, mask, _ = batch()
    mask[0] = False  # a chosen response
    mask[2], mask[5] = False, False  # both of a pair
    out, grad = run(name, logp, ref, mask=mask, average=average)
    assert out.loss.isfinite() and out.chosen_rewards[0] == 0 and not grad[0].any() and grad[3][mask[3]].all()
    assert not grad[2].any() and not grad[5].any()
    if PREFERENCE[name].match:
        with pytest.raises(ValueError, match="drop_empty must be False"):
            run(name, logp, ref, mask=mask, average=average, drop_empty=True)
        return
    dropped, _ = run(name, logp, ref, mask=mask, average=average, drop_empty=True)
    assert_close(dropped.loss.detach(), out.losses[:2].mean() + dropped.nll)
    assert not out.loss.isclose(dropped.loss)


@pytest.mark.parametrize("average", (False, "kept", "all"))
def test_both_responses_empty_gives_the_loss_at_0(average):
    logp, mask = torch.full((2, 3), math.nan, dtype=F64, requires_grad=True), torch.zeros(2, 3, dtype=torch.bool)
    at_0 = {"dpo": math.log(2), "ipo": 25.0, "slic": 1.0, "simpo": math.log1p(math.exp(1.0)), "apo_zero": 1.0}
    for name, expected in at_0.items():
        ref = torch.zeros(2, 3, dtype=F64) if PREFERENCE[name].reference else None
        out = fk.preference_loss(name, logp, ref, mask=mask, average=average)
        assert_close(out.loss.item(), expected)
        assert not torch.autograd.grad(out.loss, logp)[0].any()


@pytest.mark.parametrize("name", PREFERENCE)
def test_one_token_each_has_one_average(name):
    torch.manual_seed(4)
    logp, ref = -torch.rand(4, 1, dtype=F64), -torch.rand(4, 1, dtype=F64)
    (summed, of_sum), *others = (run(name, logp, ref, average=average) for average in (False, "kept", "all"))
    for other, of_mean in others:
        assert_close(other.loss, summed.loss, rtol=1e-14, atol=0)
        assert_close(of_mean, of_sum, rtol=1e-14, atol=0)


def test_identical_responses_pull_each_side():
    """Δ = 0: what one side gets the other loses, so that parameters see nothing."""
    logp, ref = -torch.rand(1, 4, dtype=F64), -torch.rand(1, 4, dtype=F64)
    out, grad = run("dpo", logp.repeat(2, 1), ref.repeat(2, 1), beta=0.5)
    assert_close(out.loss.item(), math.log(2))
    assert_close(grad, torch.tensor([[-0.25], [0.25]], dtype=F64).expand(2, 4))


@pytest.mark.parametrize("name", PREFERENCE)
def test_no_pairs(name):
    logp = torch.zeros(0, 4, requires_grad=True)
    out = fk.preference_loss(name, logp, torch.zeros(0, 4) if PREFERENCE[name].reference else None)
    assert out.loss.item() == 0 and torch.autograd.grad(out.loss, logp)[0].shape == (0, 4)
    empty = torch.zeros(2, 0, requires_grad=True)
    out = fk.preference_loss(name, empty, torch.zeros(2, 0) if PREFERENCE[name].reference else None)
    assert out.loss.isfinite() and out.loss.requires_grad


@pytest.mark.parametrize("length", (1, 5, 300))
@pytest.mark.parametrize("average", (False, "kept", "all"))
def test_policy_equal_to_reference_gives_log_2(length, average):
    logp = -torch.rand(4, length)
    assert_close(fk.dpo(logp, logp, average=average).loss.item(), math.log(2))


@pytest.mark.parametrize("name", ("dpo", "simpo"))
@pytest.mark.parametrize("gap", (1e4, -1e4, 1000.0, -1000.0))
def test_huge_margins_stay_finite(name, gap):
    logp = torch.tensor([[gap], [0.0]], requires_grad=True)
    out = fk.preference_loss(name, logp, torch.zeros(2, 1) if name == "dpo" else None, beta=1.0, shift=0.0)
    (grad,) = torch.autograd.grad(out.loss, logp)
    assert out.loss.item() == max(-gap, 0) and grad.tolist() == ([[-1.0], [1.0]] if gap < 0 else [[0.0], [0.0]])


def test_an_infinite_log_prob_is_not_hidden():
    logp = torch.tensor([[-torch.inf], [-1.0]])
    assert fk.dpo(logp, torch.zeros(2, 1)).loss == torch.inf


def test_weights_of_zero_leave_the_loss_at_its_value_at_zero():
    logp = torch.randn(2, 4, requires_grad=True)
    out = fk.dpo(logp, torch.randn(2, 4), token_weight=torch.zeros(2, 4), average="kept")
    assert_close(out.loss.item(), math.log(2))
    assert not torch.autograd.grad(out.loss, logp)[0].any()


def test_summed_references_per_sequence():
    logp, ref, mask, _ = batch()
    per_token = fk.dpo(logp, ref, mask=mask).losses
    summed = fk.dpo(logp, torch.where(mask, ref, 0).sum(1), mask=mask).losses
    assert_close(summed, per_token)


def test_wrappers():
    logp, ref, mask, _ = batch()
    assert torch.equal(fk.ipo(logp, ref, mask=mask).loss, fk.preference_loss("ipo", logp, ref, mask=mask).loss)
    z = fk.ipo(logp, ref, mask=mask, scaling="z").loss
    assert_close(z, fk.ipo(logp, ref, mask=mask).loss * 0.1**2)  # two scalings, beta² apart
    assert torch.equal(
        fk.simpo(logp, mask=mask, gamma=0.5).loss, fk.preference_loss("simpo", logp, mask=mask, shift=0.5).loss
    )


def test_half_precision_log_probs():
    logp, ref, mask, weight = batch()
    exact = fk.dpo(logp.bfloat16().double(), ref.bfloat16().double(), mask=mask).loss
    assert_close(fk.dpo(logp.bfloat16(), ref.bfloat16(), mask=mask).loss.double(), exact, rtol=1e-2, atol=0)


# ---- oracles -------------------------------------------------------------------------------------------------------


def test_trl_averages_ipo_where_others_sum():
    """TRL's ipo is the averaged Δ-form; the row's default is the summed one."""
    logp, ref, mask, _ = batch()
    mean = (torch.where(mask, logp - ref, 0).sum(1) / mask.sum(1)).chunk(2)
    trl = ((mean[0] - mean[1]) - 1 / (2 * 0.1)).square().mean()
    assert_close(fk.ipo(logp, ref, mask=mask, average="kept", beta=0.1).loss, trl)
    assert not fk.ipo(logp, ref, mask=mask, beta=0.1).loss.isclose(trl)


# ---- refusals ------------------------------------------------------------------------------------------------------

L = torch.zeros(2, 3)
REFUSALS = {
    "name": (lambda: fk.preference_loss("dop", L, L), ValueError, "name must be a Row or one of .* got 'dop'"),
    "beta": (lambda: fk.dpo(L, L, beta=0.0), ValueError, "beta must be a finite number > 0, got 0.0"),
    "tiny beta": (lambda: fk.ipo(L, L, beta=1e-30), ValueError, "beta must be large enough for .* got 1e-30"),
    "vanishing beta": (lambda: fk.ipo(L, L, beta=1e-200), ValueError, "beta must be .* float32 holds.* got 1e-200"),
    "drop_empty": (lambda: fk.dpo(L, L, drop_empty="no"), ValueError, "drop_empty must be .* got 'no'"),
    "beta nan": (lambda: fk.dpo(L, L, beta=math.nan), ValueError, "beta must be .* got nan"),
    "shift": (lambda: fk.dpo(L, L, shift=math.inf), ValueError, "shift must be a finite number, got inf"),
    "no reference": (lambda: fk.preference_loss("dpo", L), ValueError, "ref_logp must be given for 'dpo'"),
    "reference": (lambda: fk.preference_loss("simpo", L, L), ValueError, "ref_logp must be None"),
    "odd": (lambda: fk.dpo(torch.zeros(3, 2), torch.zeros(3, 2)), ValueError, "even number of sequences.* got 3"),
    "pairs": (lambda: fk.dpo(L, L, pairs="both"), ValueError, "pairs must be .* got 'both'"),
    "pairs of a pair": (lambda: fk.dpo((L, L), (L, L), pairs="interleaved"), ValueError, "pairs must be 'halves'"),
    "average": (lambda: fk.dpo(L, L, average="mean"), ValueError, "average must be .* got 'mean'"),
    "average true": (lambda: fk.dpo(L, L, average=True), ValueError, "average must be .* got True"),
    "reduction": (lambda: fk.dpo(L, L, reduction="avg"), ValueError, "reduction must be .* got 'avg'"),
    "denominator": (lambda: fk.dpo(L, L, denominator=0), ValueError, "denominator must be .* got 0"),
    "denominator none": (lambda: fk.dpo(L, L, reduction="none", denominator=3), ValueError, "denominator must be None"),
    "int weights": (
        lambda: fk.dpo(L, L, token_weight=torch.ones(2, 3).long()),
        TypeError,
        "token_weight must have dtype",
    ),
    "weight shape": (
        lambda: fk.dpo(L, L, token_weight=torch.ones(2, 4)),
        ValueError,
        r"token_weight .* \(2, 3\), got \(2, 4\)",
    ),
    "ref shape": (lambda: fk.dpo(L, torch.zeros(2, 4)), ValueError, r"ref_logp must have shape \(2, 3\), got \(2, 4\)"),
    "mask": (lambda: fk.dpo(L, L, mask=torch.ones(2, 3)), TypeError, "mask must have dtype bool"),
    "int logp": (lambda: fk.dpo(L.long(), L), TypeError, "logp must have dtype"),
    "flat": (lambda: fk.dpo(L.view(-1), L.view(-1)), ValueError, r"logp must be \(B, T\)"),
    "cu_seqlens": (
        lambda: fk.dpo(L.view(-1), L.view(-1), cu_seqlens=torch.tensor([0, 4, 5])),
        ValueError,
        "cu_seqlens must end at the number of tokens 6",
    ),
    "summed reference": (
        lambda: fk.dpo(L, torch.zeros(2), token_weight=torch.ones(2, 3)),
        ValueError,
        "ref_logp must hold a log-prob per token",
    ),
    "summed reference average": (lambda: fk.dpo(L, torch.zeros(2), average="kept"), ValueError, "ref_logp must hold"),
    "scaling": (lambda: fk.ipo(L, L, scaling="beta"), ValueError, "scaling must be"),
    "nll average": (lambda: fk.nll_loss(L, average=False), ValueError, "average must be 'kept' or 'all' with"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case):
    call, kind, message = REFUSALS[case]
    with pytest.raises(kind, match=message):
        call()


def test_an_offset_below_0_is_refused_where_it_can_be_seen():
    logp = torch.zeros(4, 3)
    assert fk.preference_loss("offset", logp, logp, shift=torch.tensor([0.0, 0.3])).loss.isfinite()
    for shift in (-0.1, torch.tensor(-0.1), torch.tensor([0.3, -0.1]), torch.tensor([0.3, math.nan])):
        with pytest.raises(ValueError, match="shift must be at least 0, got (-0.1|nan)"):
            fk.preference_loss("offset", logp, logp, shift=shift)
    assert fk.preference_loss("dpo", logp, logp, shift=-0.1).loss.isfinite()


LOSSES_OF_TOKENS = {
    "dpo": lambda x: fk.dpo(x, torch.zeros(4, 3)).loss,
    "orpo": lambda x: fk.orpo(x).loss,
    "kto": lambda x: fk.kto(x, torch.zeros(4, 3), torch.tensor([True, False, True, False])).loss,
    "nll": lambda x: fk.nll_loss(x).loss,
    "segments": lambda x: fk.segment_sum(x.view(-1), torch.tensor([0, 5, 12])).sum(),
}


@pytest.mark.parametrize("name", LOSSES_OF_TOKENS)
def test_other_ways_to_a_gradient_are_refused_not_0(name):
    loss, logp = LOSSES_OF_TOKENS[name], -torch.rand(4, 3)
    with pytest.raises(RuntimeError, match="forward-mode derivatives are not implemented; use backward"):
        torch.func.jvp(loss, (logp,), (logp,))
    with pytest.raises(RuntimeError, match="forward-mode"), torch.autograd.forward_ad.dual_level():
        loss(torch.autograd.forward_ad.make_dual(logp, logp))
    with pytest.raises(RuntimeError, match="torch.func's gradients are not implemented; use backward"):
        torch.func.grad(loss)(logp)
    with torch.autograd.forward_ad.dual_level():  # of something else
        x = logp.clone().requires_grad_()
        assert torch.autograd.grad(loss(x), x)[0].any()


COMPILED = {
    "segments": lambda x: fk.dpo(x, x.detach() - 1, average="segments", segment_ids=torch.tensor([[0, 0, 1]] * 4)).loss,
    "soft": lambda x: fk.pdpo(x, x.detach() - 1, torch.tensor([0.2, 0.5, 1, 0]), kind="soft").loss,
    "kto": lambda x: fk.kto(x, x.detach() - 1, torch.tensor([0.2, 0.5, 1, 0]), drop_empty=True).loss,
    "nll": lambda x: fk.nll_loss(x, token_weight=-x.detach(), average="all", denominator=torch.tensor(3)).loss,
    "own": lambda x: fk.preference_loss(HINGE, x, x.detach() - 1, nll_weight=0.1).loss,
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_a_break(name):
    torch._dynamo.reset()
    loss, logp = COMPILED[name], (-torch.rand(4, 3)).requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(logp)
    assert_close(compiled, loss(logp))
    assert_close(*(torch.autograd.grad(value, logp)[0] for value in (compiled, loss(logp))))


def test_checkpoints_and_saved_tensor_hooks_change_nothing():
    logp, ref, mask, weight = batch()
    logp.requires_grad_()

    def loss(x):
        return fk.dpo(x, ref, mask=mask, token_weight=weight, average="kept", nll_weight=0.3).loss

    (expected,) = torch.autograd.grad(loss(logp), logp)
    for reentrant in (False, True):
        again = checkpoint(loss, logp, use_reentrant=reentrant)
        again.backward()
        assert torch.equal(logp.grad, expected)
        logp.grad = None
    with torch.autograd.graph.save_on_cpu():
        saved = loss(logp)
    assert torch.equal(torch.autograd.grad(saved, logp)[0], expected)


def test_tensors_changed_in_place_before_backward_are_noticed_or_harmless(route):
    logp, ref, mask, weight = batch()
    logp.requires_grad_()
    (expected,) = torch.autograd.grad(fk.dpo(logp, ref, mask=mask, token_weight=weight).loss, logp)
    loss = fk.dpo(logp, ref, mask=mask, token_weight=weight).loss
    weight.add_(1)
    if route == "fused":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    else:  # it keeps weights of its own
        assert torch.equal(torch.autograd.grad(loss, logp)[0], expected)


def test_a_second_derivative_is_refused_by_name(route):
    logp = torch.randn(4, 3, requires_grad=True)
    loss = fk.preference_loss("dpo", logp, torch.zeros(4, 3)).loss
    (grad,) = torch.autograd.grad(loss, logp, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        grad.square().sum().backward()

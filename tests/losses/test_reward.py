"""Reward models' losses: golden values of section 6.3, slopes against autograd, TRL and OpenRLHF, layouts, refusals."""

import math

import oracles
import pytest
import torch
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

import finealign_kernels as fk
from finealign_kernels.losses import reward as module
from finealign_kernels.losses.reward import REWARD, RewardRow

F64 = torch.float64


def vector(*values):
    return torch.tensor(values, dtype=F64)


CHOSEN, REJECTED = vector(1.4, 0.3, -0.2), vector(0.9, 0.35, 0.5)
STRENGTH, VOTE = vector(1.1, 0.025, -0.9), vector(0.7467558109, 0.506268108, 0.29231559)
PLAIN = 0.7652408937, (-0.1258468896, -0.1708324655, -0.2227292574)
GOLDEN = {
    "bradley_terry": ({}, *PLAIN),
    "log_exp": ({}, *PLAIN),
    "floored": ({}, 0.7652186554, (-0.1258448679, -0.1708289613, -0.2227225451)),
    "margin": ({}, 1.3973071644, (-0.2074864437, -0.2469249664, -0.2818449116)),
    "adaptive_margin": (dict(strength=STRENGTH), 0.7889923202, (-0.2152187687, -0.1729137386, -0.1500553342)),
    "smoothing": ({}, 0.7569075604, (-0.0925135563, -0.1374991322, -0.1893959241)),
    "flip": (dict(strength=STRENGTH), 0.5319075604, (-0.1258468896, -0.1708324655, 0.1106040759)),
    "flip_margin": (dict(strength=STRENGTH), 0.8556589869, (-0.2152187687, -0.1729137386, 0.1832779991)),
    "soft_label": (dict(strength=STRENGTH), 0.7419075604, (-0.1258468896, -0.1708324655, -0.1893959241)),
    "soft_label_margin": (dict(strength=STRENGTH), 0.7956589869, (-0.2152187687, -0.1729137386, -0.1167220009)),
    "soft_label_vote": (dict(label=VOTE), 0.6340930313, (-0.0414321599, -0.0062551682, 0.0131655459)),
}


@pytest.fixture(params=["fused", "composed"])
def route(request, monkeypatch):
    """The kernel, which a GPU takes, and torch's functions."""
    monkeypatch.setattr(module, "_in_one_launch", lambda device: request.param == "fused")


def run(name="bradley_terry", chosen=CHOSEN, rejected=REJECTED, **options):
    chosen, rejected = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    out = fk.reward_loss(name, (chosen, rejected), **options)
    return out, *torch.autograd.grad(out.loss.sum(), (chosen, rejected))


def test_every_row_has_a_worked_example():
    assert set(GOLDEN) == set(REWARD)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name, route):
    options, loss, slopes = GOLDEN[name]
    out, up, down = run(name, **options)
    assert_close(out.loss.item(), loss, rtol=0, atol=1e-9)
    assert_close(up, vector(*slopes), rtol=0, atol=1e-9)
    assert_close(down, -up, rtol=0, atol=0)
    assert out.accuracies.tolist() == [1, 0, 0] and not out.margins.requires_grad
    assert_close(out.margins, CHOSEN - REJECTED)


def plain(name, d, strength, label):
    """The losses in torch's own arithmetic, as section 6.3 writes them."""
    weak, s = strength < 0, torch.where(strength < 0, -1.0, 1.0).to(d.dtype)
    soft = 0.1 * weak.to(d.dtype)

    def mixed(m, e):
        return -(1 - e) * logsigmoid(m) - e * logsigmoid(-m)

    return {
        "bradley_terry": lambda: -logsigmoid(d),
        "log_exp": lambda: (1 + (-d).exp()).log(),
        "floored": lambda: -(d.sigmoid() + 1e-5).log(),
        "margin": lambda: -logsigmoid(d - 1),
        "adaptive_margin": lambda: -logsigmoid(d - strength),
        "smoothing": lambda: mixed(d, 0.1),
        "flip": lambda: -logsigmoid(s * d),
        "flip_margin": lambda: -logsigmoid(s * d - strength.abs()),
        "soft_label": lambda: mixed(d, soft),
        "soft_label_margin": lambda: mixed(d - strength, soft),
        "soft_label_vote": lambda: mixed(d, 1 - label),
    }[name]()


def batch(pairs=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4, pairs, dtype=F64, generator=g)
    return 3 * x[0], 3 * x[1], 2 * x[2], x[3].sigmoid()


def constants(name, strength, label):
    row = REWARD[name]
    options = dict(strength=strength) if row.reads(None, None) else {}
    return options | (dict(label=label) if row.smoothing == "label" else {})


@pytest.mark.parametrize("name", REWARD)
def test_slope_is_autograds(name, route):
    chosen, rejected, strength, label = batch()
    upstream = torch.randn(64, dtype=F64, generator=torch.Generator().manual_seed(1))
    leaves = [x.clone().requires_grad_() for x in (chosen, rejected)]
    exact = plain(name, leaves[0] - leaves[1], strength, label) + 0.3 * (leaves[0] + leaves[1]).square()
    wanted = torch.autograd.grad(exact, leaves, upstream)
    leaves = [x.clone().requires_grad_() for x in (chosen, rejected)]
    options = constants(name, strength, label)
    out = fk.reward_loss(name, tuple(leaves), reduction="none", centering=0.3, **options)
    assert_close(out.loss, exact.detach(), rtol=1e-12, atol=1e-14)
    for found, one in zip(torch.autograd.grad(out.loss, leaves, upstream), wanted, strict=True):
        assert_close(found, one, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", REWARD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_the_same_loss(name, dtype, route):
    chosen, rejected, strength, label = (x.to(dtype) for x in batch())
    exact = fk.reward_loss(
        name, (chosen.double(), rejected.double()), **constants(name, strength.double(), label.double())
    )
    out = fk.reward_loss(name, (chosen, rejected), **constants(name, strength, label))
    assert out.loss.dtype == torch.float32
    assert_close(out.loss.double(), exact.loss, rtol=1e-6, atol=1e-6)


def test_trl():
    """RewardTrainer.compute_loss, given the scores that its model would have had."""
    pytest.importorskip("trl")
    from collections import defaultdict
    from types import SimpleNamespace

    from trl import RewardTrainer

    chosen, rejected, margin, _ = (x.float() for x in batch())
    for with_margin, center in ((False, None), (True, None), (True, 0.01)):
        leaf = torch.cat([chosen, rejected])[:, None].requires_grad_()
        same = SimpleNamespace(gather_for_metrics=lambda x: x, gather=lambda x: x)
        trainer = SimpleNamespace(
            model=SimpleNamespace(training=False),
            args=SimpleNamespace(center_rewards_coefficient=center),
            accelerator=same,
            _metrics=defaultdict(lambda: defaultdict(list)),
            _total_train_tokens=0,
        )
        inputs = dict(attention_mask=torch.ones(1)) | (dict(margin=margin) if with_margin else {})
        loss = RewardTrainer.compute_loss(trainer, lambda leaf=leaf, **_: SimpleNamespace(logits=leaf), dict(inputs))
        (wanted,) = torch.autograd.grad(loss, leaf)
        ours = leaf.detach()[:, 0].requires_grad_()
        name = "adaptive_margin" if with_margin else "bradley_terry"
        out = fk.reward_loss(name, ours, centering=center or 0.0, **(dict(strength=margin) if with_margin else {}))
        assert_close(out.loss, loss.detach())
        assert_close(torch.autograd.grad(out.loss, ours)[0], wanted[:, 0])
        assert_close(out.accuracies.mean().item(), trainer._metrics["eval"]["accuracy"][0])
        assert_close(out.margins.mean().item(), trainer._metrics["eval"]["margin"][0])


def test_openrlhf():
    loss = oracles.oracle(oracles.openrlhf_loss)
    chosen, rejected, margin, _ = batch()
    for name, theirs, options in (
        ("bradley_terry", loss.PairWiseLoss()(chosen, rejected), {}),
        ("adaptive_margin", loss.PairWiseLoss()(chosen, rejected, margin), dict(strength=margin)),
        ("log_exp", loss.LogExpLoss()(chosen, rejected), {}),
    ):
        assert_close(fk.reward_loss(name, (chosen, rejected), **options).loss, theirs, rtol=1e-12, atol=0)
    far = torch.tensor([1000.0]), torch.tensor([0.0])
    assert loss.LogExpLoss()(*far[::-1]).isinf()  # theirs overflows where ours is 1000
    assert fk.reward_loss("log_exp", far[::-1]).loss.item() == 1000


def test_scale_and_clamp_of_the_margin(route):
    out = run("adaptive_margin", strength=STRENGTH, scale=0.5, clamp=0.3)[0]
    assert_close(out.losses, -logsigmoid(CHOSEN - REJECTED - vector(0.3, 0.0125, -0.3)))
    flipped = run("flip_margin", strength=STRENGTH, scale=0.5, clamp=0.3)[0]
    assert_close(flipped.losses[2], -logsigmoid(vector(0.7 - 0.3))[0])
    assert_close(run("margin", scale=4.0, clamp=2.0)[0].loss, run("bradley_terry", margin=2.0)[0].loss)


def test_arguments_take_the_place_of_the_rows(route):
    wrong = torch.tensor([False, False, True])
    assert_close(run("flip", flip=wrong)[0].loss, run("flip", strength=STRENGTH)[0].loss)
    both = run("bradley_terry", margin=STRENGTH, flip=wrong)[0]
    assert_close(both.loss, run("flip_margin", strength=STRENGTH)[0].loss)
    soft = run("bradley_terry", margin=STRENGTH, smoothing=0.1 * wrong.double())[0]
    assert_close(soft.loss, run("soft_label_margin", strength=STRENGTH)[0].loss)
    assert_close(run("smoothing", smoothing=1 - VOTE)[0].loss, run("soft_label_vote", label=VOTE)[0].loss)


def test_a_row_of_ones_own():
    own = RewardRow("exp(-d)", "a test", phi=lambda m: ((-m).exp(), -(-m).exp()))
    assert_close(run(own)[0].loss, (REJECTED - CHOSEN).exp().mean())
    with pytest.raises(ValueError, match="phi must return the derivative"):
        run(RewardRow("exp(-d)", "a wrong slope", phi=lambda m: ((-m).exp(), (-m).exp())))


def test_a_pair_of_weight_0_may_be_nan(route):
    dirty = torch.where(torch.tensor([False, True, False]), torch.nan, CHOSEN)
    weight = vector(2.0, 0.0, 0.5)
    out, up, down = run("bradley_terry", dirty, weight=weight, reduction="sum", centering=0.1)
    clean = run(centering=0.1)[0].losses
    assert_close(out.loss, (weight * clean).sum())
    assert up[1] == 0 and down[1] == 0 and up.isfinite().all() and out.margins[1] == 0


def test_nan_of_a_pair_that_counts_is_not_hidden(route):
    dirty = torch.where(torch.tensor([False, True, False]), torch.nan, CHOSEN)
    assert run("bradley_terry", dirty)[0].loss.isnan()


def test_a_pair_that_is_not_counted_has_no_gradient_whatever_its_score(route):
    for pairs in ("halves", "interleaved"):
        scores = torch.tensor([torch.nan, 1.0, 2.0, -1.0], requires_grad=True)
        losses = fk.reward_loss("bradley_terry", scores, pairs=pairs, reduction="none").loss
        (grad,) = torch.autograd.grad(losses, scores, torch.tensor([0.0, 1.0]))
        of = (1, 3) if pairs == "halves" else (2, 3)
        assert grad.isfinite().all() and {i for i in range(4) if grad[i] != 0} == set(of)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_infinities_are_refused_and_large_finite_numbers_are_not(bad):
    with pytest.raises(ValueError, match="strength must hold finite numbers"):
        run("adaptive_margin", strength=vector(1.0, bad, 1.0))
    with pytest.raises(ValueError, match=r"label must hold finite numbers in \[0, 1\]"):
        run("soft_label_vote", label=vector(1.0, bad, 0.5))
    assert run("adaptive_margin", strength=vector(-1e308, -1e308, 0.0))[0].loss.isfinite()


def test_no_pair_and_no_difference(route):
    out, up, _ = run("bradley_terry", CHOSEN[:0], REJECTED[:0])
    assert out.loss.item() == 0 and up.shape == (0,)
    assert_close(run("bradley_terry", CHOSEN, CHOSEN)[0].loss.item(), math.log(2))
    assert (run("smoothing", CHOSEN, CHOSEN, smoothing=0.5)[1] == 0).all()


def test_far_margins_keep_their_slope(route):
    far = vector(-1e4, 1e4, 0.0)
    out, up, _ = run("bradley_terry", far, torch.zeros_like(far), reduction="sum")
    assert_close(out.losses, vector(1e4, 0, math.log(2)))
    assert_close(up, vector(-1, 0, -0.5))
    assert run("floored", far, torch.zeros_like(far))[1][0] == 0  # what softplus is for


def test_layouts_of_pairs(route):
    whole, mixed = torch.cat([CHOSEN, REJECTED]), torch.stack([CHOSEN, REJECTED], 1).reshape(-1)
    weight, flip = vector(1, 0.5, 2), torch.tensor([False, True, False])
    expected, up, down = run(weight=weight, flip=flip, centering=0.2)
    for scores, pairs in ((whole, "halves"), (mixed, "interleaved")):
        scores = scores.clone().requires_grad_()
        out = fk.reward_loss("bradley_terry", scores, pairs=pairs, weight=weight, flip=flip, centering=0.2)
        assert_close(out.loss, expected.loss)
        grad = torch.autograd.grad(out.loss, scores)[0]
        assert_close(grad.sort()[0], torch.cat([up, down]).sort()[0])
    assert_close(grad[1::2], down)


def test_k_responses_drop_ties():
    quality, groups = torch.tensor([2, 1, 1, 3, 0, 5, 5]), torch.tensor([0, 4, 4, 5, 7])
    pairs = fk.ranked_pairs(quality, groups)
    found = list(zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True))
    assert found == [(0, 1), (0, 2), (3, 0), (3, 1), (3, 2)]
    assert pairs.prompt.tolist() == [0] * 5 and pairs.weight.tolist() == pytest.approx([0.2] * 5)
    scores = torch.randn(7, dtype=F64, requires_grad=True)
    out = fk.reward_loss("bradley_terry", scores, pairs=pairs)
    expected = torch.stack([-logsigmoid(scores[i] - scores[j]) for i, j in found]).mean()
    assert_close(out.loss, expected.detach())
    for one, other in zip(*(torch.autograd.grad(x, scores) for x in (out.loss, expected)), strict=True):
        assert_close(one, other)
    nothing = fk.ranked_pairs(torch.tensor([1.0, 1.0, torch.nan]), torch.tensor([0, 3]))
    assert len(nothing.chosen) == 0
    scores = torch.randn(3, requires_grad=True)
    out = fk.reward_loss("bradley_terry", scores, pairs=nothing)
    assert out.loss == 0 and not torch.autograd.grad(out.loss, scores)[0].any()


def tokens():
    """Token scores (4, 5) with left and right padding, a hole and NaN where they are not read."""
    x = torch.randn(4, 5, dtype=F64, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    return torch.where(mask, x, torch.nan), mask


def test_scores_are_picked_from_tokens(route):
    x, mask = tokens()
    last = torch.stack([x[0, 2], x[1, 4], x[2, 2], x[3, 4]])
    for pick, expected in (("last", last), ("mean", x.nanmean(1)), ("sum", x.nansum(1))):
        leaf = x.clone().requires_grad_()
        out = fk.reward_loss("bradley_terry", leaf, mask=mask, pick=pick)
        assert_close(out.loss, fk.reward_loss("bradley_terry", expected).loss)
        grad = torch.autograd.grad(out.loss, leaf)[0]
        assert grad.isfinite().all() and not grad[~mask].any()
        assert ((grad != 0) == (mask if pick != "last" else grad != 0)).all() and (grad != 0).sum() >= 4
        lengths = mask.sum(1)
        flat, ends = x[mask], torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        packed = fk.reward_loss("bradley_terry", flat, cu_seqlens=ends, pick=pick)
        assert_close(packed.loss, out.loss.detach())
        halves = (x[:2], x[2:, :5]), (mask[:2], mask[2:])
        assert_close(fk.reward_loss("bradley_terry", halves[0], mask=halves[1], pick=pick).loss, out.loss.detach())


def test_hidden_states_are_picked_before_the_head():
    x, mask = tokens()
    hidden = torch.randn(4, 5, 3, dtype=F64, generator=torch.Generator().manual_seed(3))
    head = vector(0.3, -1.0, 0.5)
    dirty = torch.where(mask[:, :, None], hidden, torch.nan)
    for pick in ("last", "mean", "sum"):
        every = fk.pick_scores(torch.where(mask, hidden @ head, torch.nan), mask=mask, pick=pick)
        leaf = dirty.clone().requires_grad_()
        picked = fk.pick_scores(leaf, mask=mask, pick=pick)
        assert picked.shape == (4, 3)
        assert_close((picked @ head).detach(), every)
        assert torch.autograd.grad((picked @ head).sum(), leaf)[0].isfinite().all()
        ends = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        assert_close(fk.pick_scores(hidden[mask], cu_seqlens=ends, pick=pick) @ head, every)
    empty = fk.pick_scores(x, mask=torch.zeros_like(mask))
    assert empty.tolist() == [0] * 4


def test_adaptive_reward_model():
    """Section 5.4: the mean over kept tokens of scores that the mask was made from."""
    x, m = vector(0.4, -0.2, 0.5), vector(0.3, -0.6, -0.4)
    scores = torch.stack([x, m]).requires_grad_()
    kept = torch.stack([x > 0, m < 0])
    out = fk.reward_loss("bradley_terry", scores, mask=torch.ones_like(kept), pick="mean", token_weight=kept.double())
    assert_close(out.margins, vector(0.45 + 0.5))
    slope = -torch.sigmoid(-vector(0.95)).item()
    expected = torch.tensor([[slope / 2, 0, slope / 2], [0, -slope / 2, -slope / 2]], dtype=F64)
    assert_close(torch.autograd.grad(out.loss, scores)[0], expected)


def test_compiles_in_one_graph():
    chosen, rejected, strength, _ = (x.float() for x in batch())
    chosen.requires_grad_()

    def loss(chosen, rejected, strength):
        return fk.reward_loss("flip_margin", (chosen, rejected), strength=strength, clamp=1.0).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(chosen, rejected, strength)
    assert_close(compiled, loss(chosen, rejected, strength))
    assert_close(*(torch.autograd.grad(x, chosen)[0] for x in (compiled, loss(chosen, rejected, strength))))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("bradley_terry", dict(margin=math.inf), "margin must"),
        ("bradley_terry", dict(margin=vector(0, math.inf, 0)), "margin must hold finite numbers"),
        ("bradley_terry", dict(smoothing=vector(0, 0, 1.5)), "smoothing must hold finite numbers in"),
        ("margin", dict(margin=3e38, scale=10.0), "scale must leave every margin a finite number, got 10.0"),
        ("margin", dict(margin=vector(0, 1e308, 0), scale=10.0), "scale must leave every margin a finite number"),
        ("adaptive_margin", dict(strength=vector(0, 1e308, 0), scale=10.0), "scale must leave every margin"),
        ("adaptive_margin", dict(strength=vector(0, -math.inf, 0)), "strength must hold finite numbers"),
        ("adaptive_margin", {}, "strength must be given"),
        ("bradley_terry", dict(strength=STRENGTH), "strength must be None"),
        ("soft_label_vote", {}, "label must be given"),
        ("flip", dict(label=VOTE, strength=STRENGTH), "label must be None"),
        ("floored", dict(smoothing=0.1), "smoothing must be None"),
        ("bt", {}, "name must be a RewardRow or one of"),
        ("margin", dict(scale=0.0), "scale must"),
        ("margin", dict(clamp=-1.0), "clamp must"),
        ("margin", dict(centering=-1.0), "centering must"),
        ("flip", dict(flip=torch.tensor([True])), "flip must have shape"),
        ("margin", dict(pairs="thirds"), "pairs must be one of"),
        ("margin", dict(mask=torch.ones(3).bool()), "mask must be None"),
    ],
)
def test_refusals(name, options, message):
    with pytest.raises(ValueError, match=message):
        run(name, **options)


def test_refusals_of_layouts():
    with pytest.raises(ValueError, match="even number"):
        fk.reward_loss("margin", CHOSEN)
    with pytest.raises(TypeError, match="takes"):
        fk.reward_loss("margin", (CHOSEN, REJECTED), floor=1e-4)
    with pytest.raises(ValueError, match="token_weight must be None"):
        fk.pick_scores(torch.ones(2, 3), mask=torch.ones(2, 3).bool(), token_weight=torch.ones(2, 3))

"""Infinite margins have their formulas' limits, a count does not decide a dtype, large numbers do not overflow."""

import math

import pytest
import torch
from torch.testing import assert_close

import finealign_kernels as fk
from finealign_kernels.formulas import margin

INF = torch.inf


# value and slope at inf, value and slope at -inf, worked out by hand
LIMITS = [
    ("dpo", {}, 0, 0, INF, -1),
    ("ipo_z", {}, INF, INF, INF, -INF),
    ("slic", {}, 0, 0, INF, -1),
    ("cdpo", {"smoothing": 0.1}, INF, 0.1, INF, -0.9),
    ("cdpo", {"smoothing": 0.0}, 0, 0, INF, -1),
    ("robust", {"smoothing": 0.1}, -INF, -0.125, INF, -1.125),
    ("robust", {"smoothing": 0.0}, 0, 0, INF, -1),
    ("exo_pair", {"smoothing": 0.1}, -math.log(0.9), 0, -math.log(0.1), 0),
    ("discopop", {}, 0, 0, INF, -1),
    ("discopop", {"tau": 1.0}, 0, 0, INF, -1),
    ("discopop", {"tau": 2.0}, 0, 0, INF, -INF),
    ("aot", {}, 0, 0, INF, -1),
    ("aot", {"smoothing": 0.1}, INF, 0.1, INF, -0.9),
    ("aot_unpaired", {}, 0, 0, INF, -1),
    ("aot_unpaired", {"smoothing": 0.1}, INF, 0.1, INF, -0.9),
    ("offset", {}, 0, 0, INF, -1),
]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name, hyper, limits", [(name, hyper, limits) for name, hyper, *limits in LIMITS])
def test_an_infinite_margin_has_the_limits_of_the_formula(name, hyper, limits, dtype, route):
    beta = 0.5
    for place, (value, slope) in ((3, limits[:2]), (1, limits[2:])):  # rejected, chosen: logp is -inf there
        x = -torch.rand(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
        x[place, 0] = -INF
        pair = x[1::2].clone().requires_grad_()
        out = fk.preference_loss(name, pair, x[1::2].nan_to_num(neginf=-1.0), beta=beta, **hyper)
        assert_close(out.losses, torch.full_like(out.losses, value))
        out.loss.backward()
        assert_close(pair.grad, torch.tensor([[1.0], [-1]], dtype=dtype).expand(2, 2) * (slope * beta))


@pytest.mark.parametrize("name", [name for name, row in fk.PREFERENCE.items() if row.pair])
def test_no_pair_is_nan_whose_margin_has_a_sign(name, route):
    """Also the rows of two margins; both sides, by log-probs of -inf and by sums that overflow."""
    row = fk.PREFERENCE[name]
    for least in (-INF, -3e38):
        for place in (0, 1):
            x = torch.full((2, 2), -0.5)
            ref = x.clone()
            x[place] = least
            given = (x.requires_grad_(), *((ref,) if row.reference else ()))
            out = fk.preference_loss(name, *given, average=False, nll_weight=0.0)
            assert not out.losses.isnan().any(), (least, place)
            out.loss.backward()
            assert not x.grad.isnan().any(), (least, place)


@pytest.mark.parametrize("phi, hyper", ((margin.discovered, {"tau": 2.0}), (margin.discovered, {"tau": 1.5})))
def test_a_slope_that_overflows_at_a_finite_margin_is_infinite(phi, hyper):
    value, slope = phi(torch.tensor([-1000.0]), **hyper)
    assert value.item() == INF and slope.item() == -INF
    x = torch.tensor([[-4000.0], [0.0]], requires_grad=True)
    out = fk.preference_loss("discopop", x, torch.zeros(2, 1), beta=1.0, **hyper)
    out.loss.backward()
    assert out.loss.item() == INF and x.grad.flatten().tolist() == [-INF, INF]


@pytest.mark.parametrize("divergence", ("forward_kl", "js", "alpha"))
@pytest.mark.parametrize("name", ("dpo", "slic", "exo_pair", "discopop", "cdpo"))
def test_a_flat_loss_of_a_divergence_has_no_gradient(name, divergence):
    """The rejected response is impossible: the margin is infinite, and where phi is flat no slope of g tilts it."""
    x = torch.tensor([[-0.5], [-INF]], requires_grad=True)
    hyper = {"smoothing": 0.0} if name == "cdpo" else {}
    out = fk.preference_loss(name, x, torch.full((2, 1), -0.5), divergence=divergence, **hyper)
    out.loss.backward()
    assert out.margins.item() == INF and not out.loss.isnan() and not x.grad.any()


def test_two_impossible_responses_have_no_margin():
    x = torch.full((2, 1), -INF)
    out = fk.dpo(x, torch.zeros(2, 1))
    assert out.loss.isnan() and out.margins.isnan() and out.accuracies.item() == 0
    assert fk.dpo(torch.full((4, 1), -INF), torch.zeros(4, 1), pair_weight=torch.zeros(2)).loss.item() == 0


@pytest.mark.parametrize("name", ("dpo", "simpo", "cpo", "exo_pair", "aot"))
def test_accuracies_where_both_rewards_overflow(name):
    """1e38 · 10 is beyond float32: the rewards are equal, the responses are not."""
    x = torch.tensor([[-1e38], [-2e38], [-2e38], [-1e38]])
    given = (x, torch.zeros(4, 1)) if fk.PREFERENCE[name].reference else (x,)
    out = fk.preference_loss(name, *given, beta=10.0, nll_weight=0.0)
    assert out.chosen_rewards.isinf().all() and out.rejected_rewards.isinf().all()
    assert out.accuracies.tolist() == [1, 0] and out.margins.tolist() == [INF, -INF]


@pytest.mark.parametrize("place", (0, 1))
def test_a_reference_of_minus_infinity_is_matched_by_its_rank(place):
    """aot: both sides' differences are sorted; the pair of the reference's infinite one may be another pair."""
    policy = torch.tensor([[-1.0], [-2], [-4], [-1.5]])  # differences 3, -0.5
    ref = torch.tensor([[-1.0], [-1], [-2], [-3]])  # 1, 2
    ref[place] = -INF  # the chosen response of a pair: the lowest difference, matched with -0.5
    x = policy.clone().requires_grad_()
    out = fk.preference_loss("aot", x, ref, beta=0.5)
    other = 2.0 if place == 0 else 1.0
    assert_close(out.losses, torch.tensor([math.log1p(math.exp(-0.5 * (3 - other))), 0.0]))
    out.loss.backward()
    push = -0.5 / (1 + math.exp(0.5 * (3 - other))) / 2
    assert_close(x.grad.flatten(), torch.tensor([push, 0, -push, 0]))


@pytest.mark.parametrize("name", [name for name in fk.REWARD if name != "soft_label_vote"])
def test_an_infinite_score_has_the_limits_of_its_loss(name):
    row = fk.REWARD[name]
    more = {"strength": torch.tensor([0.5])} if row.reads(None, None) else {}
    for scores, sign in (((INF, 0.0), 1), ((0.0, INF), -1)):
        x = torch.tensor(scores, requires_grad=True)
        out = fk.reward_loss(name, x, **more)
        out.loss.backward()
        assert not out.loss.isnan() and not x.grad.isnan().any() and out.accuracies.item() == (sign > 0)
        if row.smoothing == 0 and not row.weak and name != "floored":
            assert_close(out.loss, torch.tensor(0.0 if sign > 0 else INF))
            assert_close(x.grad, torch.tensor([0.0, 0.0] if sign > 0 else [-1.0, 1.0]))


@pytest.mark.parametrize("name", [name for name, row in fk.PREFERENCE.items() if not row.pair])
@pytest.mark.parametrize("target", (0.0, 0.3, 1.0))
def test_no_response_is_nan_whose_margin_has_a_sign(name, target, route):
    row = fk.PREFERENCE[name]
    for place in ("logp", "ref") if row.reference else ("logp",):
        x, ref = torch.full((1, 2), -0.5), torch.full((1, 2), -0.5)
        (x if place == "logp" else ref)[0, 0] = -INF
        given = (x.requires_grad_(), *((ref,) if row.reference else ()))
        out = fk.pointwise_loss(name, *given, target=torch.tensor([target]))
        out.loss.backward()
        assert not out.loss.isnan() and not x.grad.isnan().any()


def test_an_infinite_score_is_as_far_away_as_can_be():
    for cu_groups in (None, torch.tensor([0, 3])):
        scores = torch.tensor([0.0, 1.0, INF])
        scores = (scores if cu_groups is not None else scores[None]).requires_grad_()
        loss = fk.difference_loss(scores, cu_groups)
        loss.backward()
        near = 1 / (1 + math.exp(-1))
        assert_close(loss.item(), 2 / 9 * (near + 2))
        slope = 2 / 9 * near * (1 - near)
        assert_close(scores.grad.view(-1), torch.tensor([-slope, slope, 0.0]))


# ---- a count decides no dtype ---------------------------------------------------------------------------------------

X = -torch.rand(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
KIND, FLAT = torch.tensor([True, False, True, False]), X[:, 0]
COUNTED = {
    "dpo": lambda x, n: fk.dpo(x, x.detach() - 1, denominator=n),
    "dpo js": lambda x, n: fk.dpo(x, x.detach() - 1, divergence="js", denominator=n),
    "cpo": lambda x, n: fk.cpo(x, denominator=n, nll_denominator=n),
    "simpo nll": lambda x, n: fk.simpo(x, nll_weight=0.5, nll_denominator=n, reduction="none"),
    "kto": lambda x, n: fk.kto(x, x.detach() - 1, KIND, denominator=n),
    "kto class_mean": lambda x, n: fk.kto(
        x, x.detach() - 1, KIND, reduction="class_mean", denominator=torch.stack([torch.as_tensor(n)] * 2)
    ),
    "nll_loss": lambda x, n: fk.nll_loss(x, denominator=n),
    "nll_loss mean": lambda x, n: fk.nll_loss(x, reduction="mean", denominator=n),
    "policy_loss": lambda x, n: fk.policy_loss("ppo", x, x.detach(), x.detach(), denominator=n),
    "policy_loss max_length": lambda x, n: fk.policy_loss(
        "ppo", x, x.detach(), x.detach(), reduction="constant", max_length=n
    ),
    "value_loss": lambda x, n: fk.value_loss(x, x.detach(), x.detach() + 1, denominator=n),
    "reward_loss": lambda x, n: fk.reward_loss("bradley_terry", x[:, 0], denominator=n),
    "reward_loss floored": lambda x, n: fk.reward_loss("floored", x[:, 0], centering=0.1, denominator=n),
    "contrastive_loss": lambda x, n: fk.contrastive_loss("simcse", x, x.detach() + 1, denominator=n),
    "segment_class_loss": lambda x, n: fk.segment_class_loss(
        x[:, :, None] * torch.arange(3), torch.arange(5).expand(4, 5) % 3, denominator=n
    ),
}


@pytest.mark.parametrize("kind", (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", COUNTED)
def test_a_count_of_any_dtype_leaves_the_loss_its_own(name, dtype, kind):
    x = X.detach().to(dtype, copy=True).requires_grad_()
    plain, out = COUNTED[name](x, 3), COUNTED[name](x, torch.tensor(3, dtype=kind))
    wide = torch.promote_types(dtype, torch.float32)
    for one, other in zip(out, plain, strict=True):
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype
            assert_close(one, other, rtol=2e-7, atol=1e-9)
    assert out.loss.dtype == wide
    out.loss.sum().backward()
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("kind", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", ("dpo", "simpo", "orpo", "aot", "aot_unpaired", "nca_pair", "ulma", "pdpo_squared"))
def test_a_shift_of_any_dtype_leaves_the_loss_its_own(name, kind, route):
    x, row = X.clone().requires_grad_(), fk.PREFERENCE[name]
    shift = torch.tensor([0.5, 0.25], dtype=kind)
    given = (x, x.detach() - 1) if row.reference else (x,)
    if row.pair:
        out = fk.preference_loss(name, *given, shift=shift)
    else:
        out = fk.pointwise_loss(name, *given, target=KIND, shift=shift.repeat(2))
    assert out.loss.dtype == out.losses.dtype == torch.float32
    out.loss.backward()


# ---- sums of large numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ("reference", "torch", "native", "triton", "triton_fused"))
@pytest.mark.parametrize("size", (3e38, -3e38, 1.0))
def test_the_mean_of_large_logits_is_finite(backend, size, usable):
    rows = backend.removesuffix("_fused")  # of existing logits
    usable(rows)
    columns = 300
    z = torch.full((3, columns), size)
    z[1, ::2] = -size
    z[2, 5] = -INF
    z.requires_grad_()
    out = fk.token_logprobs(z, torch.tensor([0, 1, 2]), outputs="mean_logits", backend=rows)
    assert_close(out.mean_logits, torch.tensor([size, 0.0, size]))
    out.mean_logits.sum().backward()
    assert_close(z.grad[0], torch.full((columns,), 1 / columns))
    heads = fk.linear_logprobs(
        torch.tensor([[size / 2]]),
        torch.full((columns, 1), 2.0),
        torch.tensor([0]),
        outputs="mean_logits",
        backend=backend,
    )
    assert_close(heads.mean_logits, torch.tensor([size]))
    ulp = abs(size) * 2.0**-23  # a sum in another order
    assert_close(heads.mean_logp, torch.tensor([-math.log(columns)]), rtol=1e-5, atol=0 if size == 1 else ulp)


SIZES = (1.0, 1e100, 1e145, 1e150, 1e155, 1e200, 1e300)


@pytest.mark.parametrize("backend", ("reference", "native"))
@pytest.mark.parametrize("shift_mean", (True, False))
@pytest.mark.parametrize("mode", ("std", "clamp", "compat"))
def test_float64_values_of_any_size_are_whitened(mode, shift_mean, backend):
    x = torch.rand(4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64) - 0.4
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[1, 3:] = False
    options = dict(mode=mode, shift_mean=shift_mean, backend=backend)
    kept = x[mask]
    mean, std = kept.mean(), kept.std(unbiased=False)
    for size in SIZES:
        given = torch.where(mask, x * size, torch.nan)
        by = (std * size).sqrt() if mode == "compat" else std * size
        want = (given - mean * size) / by
        want = want if shift_mean else want + mean * size
        want = torch.where(mask, want, 0)
        assert_close(fk.whiten(given, mask=mask, **options), want, rtol=1e-7, atol=1e-300)


@pytest.mark.parametrize("backend", ("reference", "native"))
def test_sums_that_overflow_say_nan(backend):
    """A triple that ranks add up holds Σx², which float64 does not hold here."""
    x = torch.tensor([[1e200, -1e200, 3e199]], dtype=torch.float64)
    assert fk.whiten(x, sum_moments=lambda triple: triple, backend=backend).isnan().all()
    found = fk.advantages(x, backend=backend)
    assert found.advantages.isnan().all()
    assert not fk.whiten(x, backend=backend).isnan().any()

"""Inputs that once gave a wrong number without an error: counts of 0, weights of 0, constants."""

import warnings

import pytest
import torch
from torch.testing import assert_close

import finealign_kernels as fk
from finealign_kernels.ops import _layout, _warn

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
KIND = torch.tensor([True, False, True, False])


def log_probs(dtype=torch.float32, rows=4):
    return -torch.rand(rows, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


NONE, ZERO = torch.zeros(4, 5, dtype=torch.bool), torch.tensor(0)
BY_CLASS, BY_ROW = dict(reduction="class_mean", denominator=torch.tensor([0, 0])), dict(kl_coef=0, denominator=ZERO)
COUNTED = {
    "policy_loss": lambda x, m: fk.policy_loss("ppo", x, x.detach(), x.detach(), mask=m, denominator=ZERO),
    "policy_loss by row": lambda x, m: fk.policy_loss("grpo", x, x.detach(), x[:, 0].detach(), mask=m, **BY_ROW),
    "value_loss": lambda x, m: fk.value_loss(x, x.detach(), x.detach() + 1, mask=m, denominator=ZERO),
    "nll_loss": lambda x, m: fk.nll_loss(x, mask=m, denominator=ZERO),
    "nll_loss mean": lambda x, m: fk.nll_loss(x, mask=m, reduction="mean", denominator=ZERO),
    "dpo": lambda x, m: fk.dpo(x, x.detach(), mask=m, denominator=ZERO),
    "dpo js": lambda x, m: fk.dpo(x, x.detach(), mask=m, divergence="js", denominator=ZERO),
    "dpo drop_empty": lambda x, m: fk.dpo(x, x.detach(), mask=m, drop_empty=True, denominator=ZERO),
    "kto": lambda x, m: fk.kto(x, x.detach(), KIND, mask=m, denominator=ZERO),
    "kto class_mean": lambda x, m: fk.kto(x, x.detach(), KIND, mask=m, **BY_CLASS),
    "reward_loss": lambda x, m: fk.reward_loss("margin", x, mask=m, centering=0.1, denominator=ZERO),
    "reward_loss mean": lambda x, m: fk.reward_loss("floored", x, mask=m, pick="mean", denominator=ZERO),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", (NONE, ~NONE), ids=("no token", "tokens"))
@pytest.mark.parametrize("name", COUNTED)
def test_a_global_count_of_0_gives_0(name, mask, dtype):
    x = log_probs(dtype).requires_grad_()
    loss = COUNTED[name](x, mask).loss
    loss.backward()
    assert loss.item() == 0 and not x.grad.any()


@pytest.mark.parametrize("name", COUNTED)
def test_a_global_count_of_0_gives_0_beside_nan(name):
    x = log_probs()
    x[0] = torch.nan
    COUNTED[name](x.requires_grad_(), ~NONE).loss.backward()
    assert not x.grad.any()


@pytest.mark.parametrize("count", (-3.0, -1, torch.inf))
@pytest.mark.parametrize("name", COUNTED)
def test_a_count_that_would_reverse_a_loss_is_refused(name, count, monkeypatch):
    """A difference of counts taken the wrong way round, say: its loss would be trained upwards, without a word."""
    monkeypatch.setitem(globals(), "ZERO", torch.tensor(count))
    monkeypatch.setitem(BY_ROW, "denominator", torch.tensor(count))
    monkeypatch.setitem(BY_CLASS, "denominator", torch.tensor([2, count]))
    with pytest.raises(ValueError, match=f"denominator must hold a finite number of at least 0, got {count}"):
        COUNTED[name](log_probs().requires_grad_(), ~NONE)


@pytest.mark.parametrize("mask", (NONE, ~NONE), ids=("no token", "tokens"))
def test_a_global_count_of_0_of_an_nll_beside_a_preference(mask):
    out = fk.cpo(log_probs().requires_grad_(), mask=mask, nll_denominator=ZERO)
    assert out.nll.item() == 0 and out.loss.isfinite()


@pytest.mark.parametrize("name, more", (("cpo", {}), ("dpo", {"nll_weight": 0.5}), ("simpo", {"nll_weight": 0.5})))
def test_a_count_of_pairs_alone_is_refused_beside_an_nll_over_tokens(name, more):
    """One denominator would be the step's, the other this call's; an NLL over pairs follows the count of pairs."""
    x = log_probs()
    given = (x, x) if name == "dpo" else (x,)
    with pytest.raises(ValueError, match="nll_denominator must be given with a denominator of pairs"):
        fk.preference_loss(name, *given, denominator=4, **more)
    whole = fk.preference_loss(name, *given, **more)
    tokens = x[: len(x) // 2].numel()
    split = fk.preference_loss(name, *given, denominator=len(x) // 2, nll_denominator=tokens, **more)
    assert_close(split.loss, whole.loss)
    fk.orpo(x, denominator=4)
    fk.preference_loss(name, *given, denominator=4, **{**more, "nll_weight": 0.0})


@pytest.mark.parametrize("name", ("simpo", "orpo", "cpo"))
def test_margins_where_rewards_overflow(name):
    """Both rewards of a pair are beyond float32; their difference is not."""
    x = torch.tensor([[-3e38], [-3e38], [-2e38], [-3e38]])
    out = fk.preference_loss(name, x, beta=2.0)
    assert out.chosen_rewards.isinf().all() and out.margins[1] == 0 and out.accuracies[1] == 0
    assert not out.margins.isnan().any()


@pytest.mark.parametrize("desirable", (True, False))
def test_an_absent_class_adds_0(desirable):
    x, target = log_probs(), torch.full((4,), desirable)
    counts = torch.tensor([4, 0] if desirable else [0, 4])
    loss = fk.kto(x, x, target, reduction="class_mean", denominator=counts).loss
    assert_close(loss, torch.tensor(0.5))


@pytest.mark.parametrize("bad", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("options", ({}, {"divergence": "js"}, {"average": "all"}), ids=str)
def test_a_pair_of_weight_0_may_be_nan(options, bad):
    x, ref = log_probs(), log_probs() - 0.1
    weight = torch.tensor([1.0, 0.0])
    want = fk.dpo(x, ref, pair_weight=weight, **options).loss
    ref[1, 2] = bad
    x.requires_grad_()
    loss = fk.dpo(x, ref, pair_weight=weight, **options).loss
    loss.backward()
    assert_close(loss.detach(), want)
    assert x.grad.isfinite().all() and not x.grad[1::2].any()


@pytest.mark.parametrize("name", ("kto", "pdpo", "pdpo_squared"))
def test_a_class_of_weight_0_may_be_nan(name):
    x, ref = log_probs(), log_probs() - 0.1
    options = dict(target=KIND, other_weight=0.0)
    want = fk.pointwise_loss(name, x, ref, **options).loss
    ref[1, 2] = torch.nan
    assert_close(fk.pointwise_loss(name, x, ref, **options).loss, want)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_class_weights_do_not_pass_through_the_default_dtype(dtype):
    x = log_probs(dtype)
    call = lambda: fk.pointwise_loss("kto", x, x - 0.1, target=KIND, positive_weight=1.3, other_weight=0.7).losses  # noqa: E731
    plain = fk.pointwise_loss("kto", x, x - 0.1, target=KIND).losses
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        got = call()
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(got, torch.where(KIND, 1.3 * plain, 0.7 * plain))


# ---- a mask that keeps nothing --------------------------------------------------------------------------------------


@pytest.fixture
def unwarned(monkeypatch):
    monkeypatch.setattr("finealign_kernels.ops._warn._given", set())


READ = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 4 + [False], [False] + [True] * 4])
MASKS_OF_SCORES = {
    "tokens": lambda q: fk.adaptive_mask(q, mask=READ),
    "interleaved": lambda q: fk.adaptive_mask(q, mask=READ, side="interleaved"),
    "one side": lambda q: fk.adaptive_mask(q, mask=READ, side=1),
    "advantages": lambda q: fk.adaptive_mask(q, mask=READ, side=torch.tensor([1.0, -1, 0, 2])),
    "segments": lambda q: fk.adaptive_mask(
        q, mask=READ, pivots=fk.pivot_flags(q, mask=READ, kind="salience", percent=40.0)
    ),
    **{
        f"baseline {b}": lambda q, b=b: fk.adaptive_mask(
            q, mask=READ, baseline=b, quantile=0.5 if b == "quantile" else None
        )
        for b in ("batch", "row", "quantile")
    },
    "a pair": lambda q: fk.adaptive_mask((q[:2], q[2:]), mask=(READ[:2], READ[2:])),
    "flat": lambda q: fk.adaptive_mask(q.reshape(-1), mask=READ.view(-1), cu_seqlens=torch.arange(0, 21, 5)),
}


@pytest.mark.usefixtures("unwarned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MASKS_OF_SCORES)
def test_pivots_of_a_policy_that_is_its_reference_keep_nothing_and_say_so(name, dtype):
    policy = log_probs(dtype)
    q = fk.implicit_scores(policy, policy.clone(), mask=READ)
    with pytest.warns(UserWarning, match="adaptive_mask: the mask keeps none of 16 tokens") as seen:
        found = MASKS_OF_SCORES[name](q)
    assert seen[0].filename == __file__  # the line that has to change
    assert found.kept.item() == 0 and found.kept.shape == () and found.kept.dtype == torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        MASKS_OF_SCORES[name](q)


@pytest.mark.usefixtures("unwarned")
@pytest.mark.parametrize("name", MASKS_OF_SCORES)
def test_the_kept_fraction(name):
    q = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    q[0] = 1 + q[0].abs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = MASKS_OF_SCORES[name](q)
    weights = [w.reshape(-1) for w in (found.token_weight if name == "a pair" else [found.token_weight])]
    assert_close(found.kept, (torch.cat(weights) != 0).sum() / READ.sum())
    assert 0 < found.kept.item() < 1


@pytest.mark.usefixtures("unwarned")
def test_no_token_at_all_is_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shape in ((4, 5), (4, 0), (0, 5)):
            nothing = fk.adaptive_mask(torch.zeros(shape), mask=torch.zeros(shape, dtype=torch.bool))
            assert nothing.kept.item() == 0
        assert fk.adaptive_mask(torch.zeros(4, 5), soft=0.5).kept.item() == 1


@pytest.mark.usefixtures("unwarned")
@pytest.mark.parametrize("pivots", ("after_whitening", "before_whitening"))
@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_advantages_of_a_policy_that_is_its_reference_say_so_too(backend, pivots):
    policy, reward = log_probs(), log_probs() + 0.5
    q = fk.implicit_scores(policy, policy, mask=READ)
    options = dict(mask=READ, pivots=pivots, backend=backend)
    with pytest.warns(UserWarning, match="advantages: the mask keeps none of 16 tokens"):
        found = fk.advantages(reward, token_score=q, **options)
    assert not found.token_weight.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fk.advantages(reward, token_score=torch.randn(4, 5), **options)
        fk.advantages(reward, **options)


@pytest.mark.usefixtures("unwarned")
def test_the_warning_does_not_read_a_gpu(monkeypatch):
    monkeypatch.setattr("finealign_kernels.losses.pivots.reads_values", lambda x: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fk.adaptive_mask(torch.zeros(4, 5)).kept.item() == 0


def test_soft_targets_of_a_loss_of_hard_ones_warn_once(monkeypatch):
    monkeypatch.setattr("finealign_kernels.ops._warn._given", set())
    x, soft = log_probs(), torch.tensor([0.8, 1.0, 0.0, 1.0])
    with pytest.warns(UserWarning, match="target 0.8 counts as a negative"):
        fk.ulma(x, x, soft)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fk.ulma(x, x, soft)  # once
        monkeypatch.setattr("finealign_kernels.ops._warn._given", set())
        fk.pdpo(x, x, soft, kind="soft")
        fk.kto(x, x, KIND)


# ---- numbers that look like a mistake are warned of, once ----------------------------------------------------------

LOSSES = {
    "nll_loss": lambda logp, **o: fk.nll_loss(logp, **o),
    "preference_loss": lambda logp, **o: fk.preference_loss("dpo", logp, torch.zeros_like(logp), **o),
    "pointwise_loss": lambda logp, **o: fk.pointwise_loss(
        "kto", logp, torch.zeros_like(logp), target=torch.tensor([1.0, 0, 1, 0]), **o
    ),
    "policy_loss": lambda logp, **o: fk.policy_loss("ppo", logp, logp.detach(), torch.ones(4), **o),
}


@pytest.fixture
def fresh_warnings(monkeypatch):
    monkeypatch.setattr(_warn, "_given", set())
    monkeypatch.setattr(_layout, "_looks", {})


@pytest.mark.parametrize("name", LOSSES)
def test_tokens_that_look_like_a_mistake_are_warned_of_once(name, fresh_warnings):
    def said(logp, **options):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            LOSSES[name](logp, **options)
        return [str(w.message) for w in caught]

    good, mask = -torch.rand(4, 5) - 0.1, torch.ones(4, 5, dtype=torch.bool)
    mask[1:, 3:] = False
    garbage = torch.where(mask, good, 7.0)
    weight = torch.where(mask, 1.0, -1.0)
    assert said(good) == said(garbage, mask=mask) == said(good, mask=mask, token_weight=weight) == []
    (first,) = said(good + 2)
    assert first.startswith(f"{name}: logp has") and said(good + 2) == []
    padded = torch.where(mask, good, 0.0)
    (second,) = said(padded)
    assert "3 of 4 rows" in second and said(padded) == [] and said(padded, mask=mask) == []
    (third,) = said(good, token_weight=torch.full((4, 5), -0.5))
    assert "token_weight has -0.5" in third


def test_negative_weights_of_pairs_are_warned_of_once(fresh_warnings):
    x, bad, good = log_probs(), torch.tensor([1.0, -0.5]), torch.tensor([0.0, 2.0])
    for name, argument, loss in (
        ("preference_loss", "pair_weight", lambda w: fk.dpo(x, x, mask=~NONE, pair_weight=w)),
        ("reward_loss", "weight", lambda w: fk.reward_loss("margin", x[:, 0], weight=w)),
    ):
        with pytest.warns(UserWarning, match=f"^{name}: {argument} has -0.5; a negative weight reverses"):
            loss(bad)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss(bad)
            _warn._given.clear()
            loss(good)


def test_two_columns_of_scores_are_warned_of_once(fresh_warnings):
    """Chosen and rejected side by side would be two tokens of each response: another loss, without a word."""
    scores = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match=r"scores of shape \(B, 2\) without a mask .* scores.unbind\(1\)"):
        fk.reward_loss("bradley_terry", scores)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fk.reward_loss("bradley_terry", scores)
        _warn._given.clear()
        fk.reward_loss("bradley_terry", scores.unbind(1))
        fk.reward_loss("bradley_terry", scores, mask=torch.ones(4, 2, dtype=torch.bool))
        fk.reward_loss("bradley_terry", torch.randn(4, 3))


@pytest.mark.parametrize("name", LOSSES)
def test_a_weight_that_is_not_valid_is_left_to_the_refusal(name, fresh_warnings):
    good = -torch.rand(4, 5)
    for wrong in (
        torch.ones(4, 5, device="meta"),
        torch.ones(4, 5, dtype=torch.complex64),
        torch.ones(4, 5).to_sparse(),
    ):
        with pytest.raises((TypeError, ValueError), match="^token_weight must"):
            LOSSES[name](good, token_weight=wrong)
    with pytest.warns(UserWarning, match="token_weight has -1"):
        LOSSES[name](good, token_weight=torch.nn.Parameter(-torch.ones(4, 5)))


def test_tokens_are_looked_at_in_the_first_calls_alone(fresh_warnings):
    good = -torch.rand(2, 3)
    for _ in range(_layout.LOOKS):
        fk.nll_loss(good)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fk.nll_loss(good + 2)  # what is not looked at costs no time

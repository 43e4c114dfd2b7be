"""Inputs that once gave a wrong number without an error: counts of 0, weights of 0, constants."""

import pytest
import torch
from torch.testing import assert_close

import finealign_kernels as fk

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
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", (NONE, ~NONE), ids=("no token", "tokens"))
@pytest.mark.parametrize("name", COUNTED)
def test_a_global_count_of_0_gives_0(name, mask, dtype):
    x = log_probs(dtype).requires_grad_()
    loss = COUNTED[name](x, mask).loss
    loss.backward()
    assert loss.item() == 0 and not x.grad.any()


@pytest.mark.parametrize("mask", (NONE, ~NONE), ids=("no token", "tokens"))
def test_a_global_count_of_0_of_an_nll_beside_a_preference(mask):
    out = fk.cpo(log_probs().requires_grad_(), mask=mask, nll_denominator=ZERO)
    assert out.nll.item() == 0 and out.loss.isfinite()


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

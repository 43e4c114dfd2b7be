"""Estimators of the KL: which divergence each one's gradient has, by enumeration; far out; small differences."""

import pytest
import torch
from torch.testing import assert_close

from finealign_kernels.formulas import divergence

F64 = torch.float64
LOGITS = torch.tensor([0.2, -0.5, 0.9], dtype=F64)
REFERENCE = torch.tensor([0.0, 0.4, 0.1], dtype=F64).log_softmax(0)
OLD = torch.tensor([0.6, 0.1, 0.2], dtype=F64).log_softmax(0)
REVERSE, FORWARD = [-0.0537236148, -0.1822883964, 0.2360120112], [0.0068630606, -0.273278201, 0.2664151404]
ESTIMATORS = {  # name -> expectation of slope · ∇logp over tokens of π
    "k1": [0, 0, 0],
    "k2": REVERSE,
    "k3": FORWARD,
    "k3_k2grad": REVERSE,
    "k3_is": REVERSE,
}


def kl(p, q):
    return (p.exp() * (p - q)).sum()


def test_the_expected_gradients_are_those_of_the_two_divergences():
    for expected, loss in ((REVERSE, lambda p: kl(p, REFERENCE)), (FORWARD, lambda p: kl(REFERENCE, p))):
        logits = LOGITS.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(logits.log_softmax(0)), logits)
        assert_close(grad, torch.tensor(expected, dtype=F64), rtol=0, atol=1e-9)


def expectation(name, sampled_from):
    """Σ_y sampled_from(y) κ'(y) ∇ log π(y), and Σ_y sampled_from(y) κ(y)."""
    logp = LOGITS.log_softmax(0)
    more = (logp - sampled_from,) if name == "k3_is" else ()
    value, slope = getattr(divergence, name)(logp - REFERENCE, *more)
    jacobian = torch.eye(3, dtype=F64) - logp.exp()  # ∂ log π(y) / ∂ logit
    return sampled_from.exp() @ (slope[:, None] * jacobian), sampled_from.exp() @ value


@pytest.mark.parametrize("name", ESTIMATORS)
def test_golden_expectations(name):
    grad, value = expectation(name, LOGITS.log_softmax(0))
    assert_close(grad, torch.tensor(ESTIMATORS[name], dtype=F64), rtol=0, atol=1e-9)
    if name != "k2":  # which is biased
        assert_close(value, kl(LOGITS.log_softmax(0), REFERENCE))


def test_only_the_weighted_estimator_is_right_on_tokens_of_the_old_policy():
    grad, value = expectation("k3_is", OLD)
    assert_close(grad, torch.tensor(REVERSE, dtype=F64), rtol=0, atol=1e-9)
    assert_close(value, kl(LOGITS.log_softmax(0), REFERENCE))
    for name in ("k1", "k2", "k3", "k3_k2grad"):
        assert (expectation(name, OLD)[0] - torch.tensor(ESTIMATORS[name], dtype=F64)).abs().max() > 1e-2


def test_far_out():
    d = torch.tensor([1000.0, -1000.0, torch.inf, -torch.inf])
    bound = torch.tensor(20.0)
    for name in ("k3", "k3_k2grad"):
        value, slope = getattr(divergence, name)(d)
        assert_close(value[:2], torch.stack([torch.expm1(-bound) + bound, torch.expm1(bound) - bound]))
        assert value.isfinite().all() and not slope.any()
    value, slope = divergence.k3_is(d, d)
    assert value.isfinite().all() and not slope.any()
    # one clamp acts: the other factor alone would push a token below the reference further away
    near = torch.full((2,), 0.5, dtype=F64)
    far = torch.tensor([30.0, -30.0], dtype=F64)
    assert not divergence.k3_is(near, far)[1].any() and not divergence.k3_is(far, near)[1].any()
    assert divergence.k1(d)[0].isinf()[2:].all() and divergence.k2(d)[0].isinf()[2:].all()


def test_small_differences_keep_their_digits():
    """In float32, where e^-d - 1 + d in this order would be rounding alone."""
    d = torch.tensor([1e-3, -1e-3, 1e-2])
    exact = divergence.k3(d.double())
    for name in ("k3", "k3_k2grad"):
        assert_close(getattr(divergence, name)(d)[0].double(), exact[0], rtol=2e-4, atol=0)
    assert_close(divergence.k3(d)[1].double(), exact[1], rtol=1e-6, atol=0)
    naive = (-d).exp() - 1 + d
    assert ((naive.double() - exact[0]).abs() > 1e-2 * exact[0]).any()
    assert_close(divergence.k3_is(d, d)[1], d.exp() * d)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_nan_goes_through(name):
    d = torch.tensor([torch.nan])
    value, slope = getattr(divergence, name)(d, *((d,) if name == "k3_is" else ()))
    assert value.isnan() and (slope.isnan() or name == "k1")


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("name", ESTIMATORS)
def test_no_slope_pulls_more_than_the_exact_one(name, dtype):
    """Of any d and log-ratio: the sign is that of the exact slope, and its size bounds it."""
    d, log_ratio = torch.meshgrid(*2 * (torch.linspace(-60, 60, 97, dtype=dtype),), indexing="ij")
    slope = getattr(divergence, name)(d, *((log_ratio,) if name == "k3_is" else ()))[1].double()
    d, log_ratio = d.double(), log_ratio.double()
    exact = {
        "k1": torch.ones_like(d),
        "k2": d,
        "k3": -torch.expm1(-d),
        "k3_k2grad": d,
        "k3_is": log_ratio.exp() * d,
    }[name]
    assert (slope * exact >= 0).all() and (slope.abs() <= exact.abs() * (1 + 1e-5)).all()

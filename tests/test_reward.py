"""The reward model's loss: golden values of section 6.3, invariances, refusals."""

import math

import pytest
import torch
from torch.testing import assert_close

import finealign_kernels as fk


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


CHOSEN, REJECTED = vector(1.4, 0.3, -0.2), vector(0.9, 0.35, 0.5)
STRENGTH, VOTE = vector(1.1, 0.025, -0.9), vector(0.7467558109, 0.506268108, 0.29231559)
WRONG = STRENGTH < 0
GOLDEN = {
    "vanilla": ({}, 0.7652408937, (-0.1258468896, -0.1708324655, -0.2227292574)),
    "fixed margin": (dict(margin=1.0), 1.3973071644, (-0.2074864437, -0.2469249664, -0.2818449116)),
    "adaptive margin": (dict(margin=STRENGTH), 0.7889923202, (-0.2152187687, -0.1729137386, -0.1500553342)),
    "smoothing": (dict(smoothing=0.1), 0.7569075604, (-0.0925135563, -0.1374991322, -0.1893959241)),
    "flip": (dict(flip=WRONG), 0.5319075604, (-0.1258468896, -0.1708324655, 0.1106040759)),
    "flip + margin": (dict(flip=WRONG, margin=STRENGTH), 0.8556589869, (-0.2152187687, -0.1729137386, 0.1832779991)),
    "soft label + margin": (
        dict(smoothing=0.1 * WRONG.double(), margin=STRENGTH),
        0.7956589869,
        (-0.2152187687, -0.1729137386, -0.1167220009),
    ),
    "soft label by vote": (dict(smoothing=1 - VOTE), 0.6340930313, (-0.0414321599, -0.0062551682, 0.0131655459)),
}


def run(chosen=CHOSEN, rejected=REJECTED, **options):
    chosen, rejected = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    out = fk.reward_loss(chosen, rejected, **options)
    return out, *torch.autograd.grad(out.loss.sum(), (chosen, rejected))


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    options, loss, slopes = GOLDEN[name]
    out, up, down = run(**options)
    assert_close(out.loss.item(), loss, rtol=0, atol=1e-9)
    assert_close(up, vector(*slopes), rtol=0, atol=1e-9)
    assert_close(down, -up, rtol=0, atol=0)
    assert out.accuracies.tolist() == [1, 0, 0] and not out.margins.requires_grad


def test_a_pair_of_weight_0_may_be_nan():
    dirty = torch.where(torch.tensor([False, True, False]), torch.nan, CHOSEN)
    weight = vector(2.0, 0.0, 0.5)
    out, up, down = run(dirty, weight=weight, reduction="sum")
    assert_close(out.loss, (weight * run()[0].losses).sum())
    assert up[1] == 0 and down[1] == 0 and up.isfinite().all()


def test_no_pair_and_no_difference():
    out, up, _ = run(CHOSEN[:0], REJECTED[:0])
    assert out.loss.item() == 0 and up.shape == (0,)
    assert_close(run(CHOSEN, CHOSEN)[0].loss.item(), math.log(2))
    assert (run(CHOSEN, CHOSEN, smoothing=0.5)[1] == 0).all()


@pytest.mark.parametrize(
    "name, value", [("margin", math.inf), ("margin", vector(0, math.inf, 0)), ("smoothing", vector(0, 0, 1.5))]
)
def test_refusals(name, value):
    with pytest.raises(ValueError, match=f"{name} must"):
        run(**{name: value})

"""GAE, returns, whitening and group advantages beside verl's and OpenRLHF's own functions, and where they differ."""

import numpy as np
import oracles
import pytest
import torch
from torch.testing import assert_close

import finealign_kernels as fk

GAMMA, LAM = 0.9, 0.8


@pytest.fixture
def batch():
    """Responses with masked tokens inside and around; what the others multiply there is 0."""
    random = torch.Generator().manual_seed(5)
    mask = torch.rand(5, 23, generator=random) < 0.7
    mask[3] = False
    mask[4], mask[4, 7] = False, True
    rewards, values = (torch.randn(5, 23, generator=random, dtype=torch.float64) for _ in range(2))
    return torch.where(mask, rewards, 0), torch.where(mask, values, 0), mask


def close(ours, theirs, mask, tolerance=1e-12):
    """On valid tokens: elsewhere verl leaves what it carries, OpenRLHF what it steps."""
    assert_close(ours[mask], theirs[mask], rtol=tolerance, atol=tolerance)


COUNT = 1e-8  # which verl adds to the number of tokens


def test_gae_carries_masked_tokens_as_verl_does_and_whitens_by_a_sample(batch):
    core = oracles.oracle(oracles.verl_core)
    rewards, values, mask = batch
    whitened, returns = core.compute_gae_advantage_return(rewards, values, mask.double(), GAMMA, LAM)
    ours = fk.gae(rewards, values, mask=mask, gamma=GAMMA, lam=LAM)
    close(ours.returns, returns, mask)
    close(fk.whiten(ours.advantages, mask=mask, unbiased=True), whitened, mask, COUNT)
    made = fk.advantages(rewards, values, mask=mask, gamma=GAMMA, lam=LAM, unbiased=True)
    close(made.advantages, whitened, mask, COUNT)
    apart = (fk.whiten(ours.advantages, mask=mask) - whitened)[mask].abs().max() / whitened[mask].abs().max()
    n = mask.sum().item()
    assert apart.item() == pytest.approx((n / (n - 1)) ** 0.5 - 1, rel=1e-6)  # ours by the population


def test_gae_steps_through_masked_tokens_as_openrlhf_does(batch):
    theirs = oracles.oracle(oracles.openrlhf_gae)
    rewards, values, mask = batch
    advantages, returns = theirs(values, rewards, mask.double(), GAMMA, LAM)
    ours = fk.gae(rewards, values, mask=mask, gamma=GAMMA, lam=LAM, masked="zero")
    close(ours.advantages, advantages, mask)
    close(ours.returns, returns, mask)
    carried = fk.gae(rewards, values, mask=mask, gamma=GAMMA, lam=LAM)
    assert (carried.advantages - advantages)[mask].abs().max() > 0.1
    one = fk.gae(rewards, values, mask=mask, gamma=1.0, lam=1.0)  # where steps multiply by 1 they are nothing
    close(one.advantages, theirs(values, rewards, mask.double(), 1.0, 1.0)[0], mask)


def test_returns_carry_masked_tokens_as_verls_reinforce_plus_plus_does_since_0_9(batch):
    core = oracles.oracle(oracles.verl_core)
    rewards, _, mask = batch
    config = type("Config", (), {"gamma": GAMMA})()
    whitened, returns = core.compute_reinforce_plus_plus_outcome_advantage(rewards, mask.double(), config=config)
    ours = fk.discounted_returns(rewards, mask=mask, gamma=GAMMA)
    close(ours, returns, mask)
    close(fk.whiten(ours, mask=mask, unbiased=True), whitened, mask, COUNT)
    before = fk.discounted_returns(rewards, mask=mask, gamma=GAMMA, masked="restart")  # as it was up to 0.8
    assert (before - returns)[mask].abs().max() > 0.1


def test_whitening_clamps_the_variance_as_openrlhf_does(batch):
    utils = oracles.oracle(oracles.openrlhf_utils)
    rewards, _, mask = batch
    theirs = utils.masked_normalize(rewards.reshape(1, -1), mask.reshape(1, -1)).reshape(mask.shape)
    close(fk.whiten(rewards, mask=mask, mode="clamp"), theirs, mask)


@pytest.mark.parametrize("function, kind, eps", [("grpo", "group_std", 1e-6), ("rloo", "leave_one_out", 0.0)])
def test_groups_are_verls(function, kind, eps):
    core = oracles.oracle(oracles.verl_core)
    mask = torch.ones(8, 3)
    rewards = torch.zeros(8, 3, dtype=torch.float64)
    rewards[:, -1] = torch.tensor([1, 0, 0.5, 1, 0.2, 0.2, 0.3, 0.9])
    index = np.array(["a", "b", "a", "b", "a", "b", "b", "a"])
    theirs, _ = getattr(core, f"compute_{function}_outcome_advantage")(rewards, mask, index)
    groups = torch.tensor([0, 1, 0, 1, 0, 1, 1, 0])
    ours = fk.group_advantages(rewards.sum(1), groups, kind=kind, eps=eps)
    assert_close(ours, theirs[:, 0].double(), rtol=1e-6, atol=1e-7)


def test_a_group_of_one_is_no_reward_here_and_the_reward_in_verl():
    core = oracles.oracle(oracles.verl_core)
    rewards = torch.tensor([[0.7]], dtype=torch.float64)
    theirs, _ = core.compute_grpo_outcome_advantage(rewards, torch.ones(1, 1), np.array([0]))
    assert theirs.item() == pytest.approx(0.7, rel=1e-5)
    assert fk.group_advantages(rewards[0], 1).item() == 0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_penalty_is_verls(estimator, batch):
    core = oracles.oracle(oracles.verl_core)
    old, ref, mask = batch
    close(fk.kl_penalty(old, ref, estimator=estimator, mask=mask), core.kl_penalty(old, ref, estimator), mask)

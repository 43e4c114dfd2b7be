"""slime, SkyRL, prime-rl and NeMo-RL: the adapters against the trainers' own functions, by their own seams.

The sources are found as oracles.py says; tests of a trainer whose source is absent are skipped.
"""

import sys
import types

import oracles
import pytest
import torch
from torch.testing import assert_close

from finealign_kernels.integrations import _versions, slime


def graded(loss, leaf):
    return loss.detach().double(), torch.autograd.grad(loss, leaf)[0].double()


def installed(monkeypatch, **versions):
    monkeypatch.setattr(_versions, "version", versions.__getitem__)


# ---- slime ---------------------------------------------------------------------------------------------------------

PROMPTS, LENGTHS, WORDS = (2, 1, 3), (5, 7, 4), 11


@pytest.fixture
def slime_loss(monkeypatch):
    found = oracles.oracle(oracles.slime_loss)
    monkeypatch.setitem(sys.modules, slime.LOSS, found)
    utils = types.ModuleType("slime.backends.megatron_utils.cp_utils")
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    mpu = types.ModuleType("megatron.core")
    mpu.mpu = found.mpu
    monkeypatch.setitem(sys.modules, "megatron.core", mpu)
    installed(monkeypatch, slime="0.3.1")
    slime._slime.cache_clear()
    yield found
    slime._slime.cache_clear()


def slime_args(**given):
    options = dict(
        loss_type="custom_loss", custom_loss_function_path="finealign_kernels.integrations.slime.policy_loss",
        custom_advantage_function_path=None, advantage_estimator="grpo", calculate_per_token_loss=False,
        recompute_loss_function=False, allgather_cp=False, rollout_temperature=1.3, log_probs_chunk_size=-1,
        rollout_top_p=1.0, use_rollout_logprobs=False, use_opsm=False, use_tis=False, get_mismatch_metrics=False,
        custom_tis_function_path=None, tis_clip=1.1, tis_clip_low=0.8, eps_clip=0.05, eps_clip_high=0.1,
        eps_clip_c=None,
        entropy_coef=0.02, use_kl_loss=False, use_unbiased_kl=False, kl_loss_type="k3", kl_loss_coef=0.3, kl_coef=0.0,
        gamma=0.97, lambd=0.9, normalize_advantages=False, use_opd=False, rewards_normalization=True,
        grpo_std_normalization=True,
    )  # fmt: skip
    return types.SimpleNamespace(**options | given)


def slime_batch(dense):
    draw = torch.Generator().manual_seed(3)
    totals = [p + n for p, n in zip(PROMPTS, LENGTHS, strict=True)]
    tokens = [torch.randint(0, WORDS, (n,), generator=draw) for n in totals]
    logits = torch.randn(1, sum(totals) + 3, WORDS, generator=draw)
    base = torch.cat([logits[0, sum(totals[:s]) + p - 1 : sum(totals[: s + 1]) - 1].log_softmax(-1)
                      .gather(1, tokens[s][p:, None])[:, 0] for s, p in enumerate(PROMPTS)])  # fmt: skip

    def near(scale=0.15):
        return list((base + scale * torch.randn(len(base), generator=draw)).split(LENGTHS))

    masks = [torch.ones(n, dtype=torch.int) for n in LENGTHS]
    masks[1][2:4] = 0  # the output of a tool
    advantages = [torch.randn(n if dense else 1, generator=draw).expand(n) for n in LENGTHS]
    batch = dict(
        unconcat_tokens=tokens, total_lengths=totals, response_lengths=list(LENGTHS), loss_masks=masks,
        rollout_mask_sums=torch.tensor([9.0, 9.0, 4.0]), advantages=advantages, log_probs=near(),
        rollout_log_probs=near(0.3), ref_log_probs=near(0.3),
    )  # fmt: skip
    return batch, logits


def slime_step(slime_loss, args, dense=True):
    batch, logits = slime_batch(dense)
    logits.requires_grad_()
    loss, count, told = slime_loss.loss_function(args, batch, 4, 6, logits)
    return graded(loss, logits), count, dict(zip(told["keys"], told["values"][1:], strict=True))


SLIME = {
    "ppo": {},
    "dual clip, by tokens": dict(eps_clip_c=1.2, calculate_per_token_loss=True),
    "kl": dict(use_kl_loss=True, use_unbiased_kl=True, kl_loss_type="low_var_kl"),
    "cispo": dict(advantage_estimator="cispo"),
    "gspo": dict(advantage_estimator="gspo", eps_clip=0.003, eps_clip_high=0.004),
    "tis": dict(use_tis=True),
    "the sampler's log-probs": dict(use_rollout_logprobs=True),
}


@pytest.mark.parametrize("case", SLIME)
def test_losses_are_slimes(case, slime_loss):
    args = slime_args(**SLIME[case])
    dense = case != "gspo"  # see test_a_row_of_gspo
    ours = slime_step(slime_loss, args, dense)
    theirs = slime_step(slime_loss, types.SimpleNamespace(**vars(args) | {"loss_type": "policy_loss"}), dense)
    assert_close(ours[:2], theirs[:2], rtol=2e-5, atol=2e-6)
    for key, value in ours[2].items():
        if key != "pg_clipfrac" or args.calculate_per_token_loss:  # elsewhere a mean of other weights
            assert_close(value, theirs[2][key], rtol=2e-5, atol=2e-6, msg=key)


def test_icepop_of_slime_goes_through_its_path(slime_loss, monkeypatch):
    monkeypatch.setitem(sys.modules, "icepop", slime_loss)
    args = slime_args(use_tis=True, custom_tis_function_path="icepop.icepop_function")
    theirs = slime_step(slime_loss, types.SimpleNamespace(**vars(args) | {"loss_type": "policy_loss"}))
    assert_close(slime_step(slime_loss, args)[0], theirs[0], rtol=2e-5, atol=2e-6)


def test_a_row_of_gspo(slime_loss):
    """With advantages that differ in a row slime gives each token the row's mean; here each has its own."""
    args = slime_args(**SLIME["gspo"])
    ours = slime_step(slime_loss, args)[0]
    theirs = slime_step(slime_loss, types.SimpleNamespace(**vars(args) | {"loss_type": "policy_loss"}))[0]
    assert_close(ours[0], theirs[0], rtol=2e-5, atol=2e-6)
    assert not torch.allclose(ours[1], theirs[1], rtol=1e-2, atol=1e-4)


def test_other_losses_by_slimes_config_file(slime_loss):
    plain = slime_step(slime_loss, slime_args(finealign_loss="sapo"))[0][0]
    other = slime_step(slime_loss, slime_args(finealign_loss="sapo", finealign_options={"tau_pos": 3.0}))[0][0]
    assert plain.isfinite() and not torch.isclose(plain, other)
    with pytest.raises(ValueError, match="finealign_loss must be one of .* got 'gspo'"):
        slime_step(slime_loss, slime_args(finealign_loss="gspo"))
    with pytest.raises(ValueError, match="use_opsm must be off"):
        slime_step(slime_loss, slime_args(use_opsm=True))


def rollout(args, whole=False, **given):
    batch, _ = slime_batch(False)
    if whole:
        batch["loss_masks"] = [torch.ones_like(mask) for mask in batch["loss_masks"]]
    values = [0.3 * row for row in batch["rollout_log_probs"]]
    return batch | dict(rewards=[0.5, -1.0, 2.0], values=values) | given


@pytest.mark.parametrize("estimator", slime.ESTIMATORS)
def test_advantages_are_slimes(estimator, slime_loss):
    found = []
    for path in ("finealign_kernels.integrations.slime.advantages", None):
        args = slime_args(advantage_estimator=estimator, custom_advantage_function_path=path, kl_coef=0.1)
        data = rollout(args, whole=True)  # slime's own GAE and REINFORCE++ take masked tokens along
        slime_loss.compute_advantages_and_returns(args, data)
        found.append([torch.cat(data[key]) for key in ("advantages", "returns")])
    assert_close(*found, rtol=1e-5, atol=1e-6)


def sample(length, reward, group=0, **metadata):
    return types.SimpleNamespace(
        response_length=length, group_index=group, loss_mask=None, metadata=metadata,
        get_reward_value=lambda args: reward,
    )  # fmt: skip


def test_segments_and_weights_reach_slimes_advantages(slime_loss):
    ends = [[(1, 1.0), (4, -1.0)], [(6, 0.5)], [(0, 2.0), (3, 1.0)]]
    weights = [[1.0] * 5, [0.0, 2.0, 1.0, 1.0, 1.0, 1.0, 3.0], [1.0] * 4]
    group = [sample(n, 0.1, segment_rewards=e, token_weight=w) for n, e, w in zip(LENGTHS, ends, weights, strict=True)]
    path = "finealign_kernels.integrations.slime.advantages"
    args = slime_args(custom_advantage_function_path=path, advantage_estimator="reinforce_plus_plus")
    raw, rewards = slime.rewards(args, group)
    assert raw == [0.1] * 3 and [tuple(row.shape) for row in rewards] == [(n, 2) for n in LENGTHS]
    data = rollout(args, rewards=rewards)
    slime_loss.compute_advantages_and_returns(args, data)
    g = args.gamma
    assert_close(data["returns"][0], torch.tensor([g - g**4, 1 - g**3, -(g**2), -g, -1.0]))
    assert_close(data["advantages"][1], torch.tensor(weights[1]) * data["returns"][1])
    assert_close(torch.cat(data["rewards"]), torch.tensor([0.0, 0.5, 3.0]))  # slime logs what it has in lists

    args = slime_args(advantage_estimator="grpo")  # an advantage of each segment, from those of the others
    rows = slime.rewards(args, group)[1]
    assert_close(rows[0][:, 0], torch.tensor([-1.75] * 2 + [-1.5] * 3))  # 0 - (0.5 + 3) / 2, -1 - (0 + 1) / 2
    with pytest.raises(ValueError, match="normalize_advantages must be off"):
        args = slime_args(custom_advantage_function_path=path, normalize_advantages=True)
        slime_loss.compute_advantages_and_returns(args, rollout(args, rewards=rows))
    with pytest.raises(
        ValueError, match=r"segment_rewards\[0\] must hold tokens of the response \(5\), in order, got 5"
    ):
        slime.rewards(args, [sample(5, 0.1, segment_rewards=[(5, 1.0)])])
    with pytest.raises(ValueError, match="token_weight must hold 5 numbers of at least 0"):
        slime.rewards(args, [sample(5, 0.1, token_weight=[1.0])])


def test_rewards_of_groups_are_slimes():
    numbers = torch.tensor([[1.0, 0.0, 3.0], [2.0, 2.5, -1.0]])
    group = [sample(3, float(r), s) for s, row in enumerate(numbers) for r in row]
    rewards = torch.tensor(slime.rewards(slime_args(), group)[1]).view(2, 3)
    apart = numbers - numbers.mean(1, keepdim=True)
    assert_close(
        rewards, apart / (numbers.std(1, keepdim=True) + 1e-6)
    )  # _post_process_rewards of slime/ray/rollout.py
    assert slime.rewards(slime_args(advantage_estimator="ppo"), group)[1] == numbers.flatten().tolist()


def test_an_unknown_slime_is_refused(monkeypatch):
    installed(monkeypatch, slime="0.4.0")
    slime._slime.cache_clear()
    with pytest.raises(RuntimeError, match="slime must be of version 0.3, got 0.4.0"):
        slime.advantages(slime_args(), {})

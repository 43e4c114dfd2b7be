"""slime, SkyRL, prime-rl and NeMo-RL: the adapters against the trainers' own functions, by their own seams.

The sources are found as oracles.py says; tests of a trainer whose source is absent are skipped.
"""

import pickle
import sys
import types

import oracles
import pytest
import torch
from torch.testing import assert_close

import finealign_kernels as fk
from finealign_kernels.integrations import _versions, nemo_rl, prime_rl, skyrl, slime
from finealign_kernels.losses import policy
from finealign_kernels.testing import samples


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

    for estimator in ("reinforce_plus_plus_baseline", "grpo"):  # an advantage of each segment, from those of the others
        rows = slime.rewards(slime_args(advantage_estimator=estimator), group)[1]
        assert_close(rows[0][:, 0], torch.tensor([-1.75] * 2 + [-1.5] * 3))  # 0 - (0.5 + 3) / 2, -1 - (0 + 1) / 2
    with pytest.raises(ValueError, match="normalize_advantages must be off"):
        args = slime_args(custom_advantage_function_path=path, normalize_advantages=True)
        slime_loss.compute_advantages_and_returns(args, rollout(args, rewards=rows))


def test_wrong_fields_of_slimes_samples_are_refused():
    args = slime_args(advantage_estimator="grpo")
    with pytest.raises(
        ValueError, match=r"segment_rewards\[0\] must hold tokens of the response \(5\), in order, got 5"
    ):
        slime.rewards(args, [sample(5, 0.1, segment_rewards=[(5, 1.0)])])
    for token in (1.5, -1):
        with pytest.raises(ValueError, match=rf"segment_rewards\[0\] must hold tokens .* in order, got .*{token}"):
            slime.rewards(args, [sample(5, 0.1, segment_rewards=[(token, 1.0)])])
    for weight, got in (([1.0], r"shape \(1,\)"), ([1.0, 1.0, -2.0, 1.0, 1.0], "-2.0")):
        with pytest.raises(ValueError, match=f"token_weight must hold 5 numbers of at least 0, got {got}"):
            slime.rewards(args, [sample(5, 0.1, token_weight=weight)])
    with pytest.raises(ValueError, match="group_index must be set for every sample"):
        slime.rewards(args, [sample(5, 0.1, group=None)])


def test_two_segments_on_one_token_of_slime():
    """A sentence without a token of its own: rewards add up, and no token gets its advantage."""
    both = [sample(3, 0.0, segment_rewards=[(1, 1.0), (1, 0.5), (2, 2.0)]), sample(3, 0.0, segment_rewards=[(2, 1.0)])]
    args = slime_args(advantage_estimator="reinforce_plus_plus")
    assert_close(slime.rewards(args, both)[1][0][:, 0], torch.tensor([0.0, 1.5, 2.0]))
    assert_close(slime.rewards(slime_args(), both)[1][0][:, 0], torch.tensor([2.5, 2.5, 2.0]))  # 3.5 - 1; 2 - 0


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


# ---- SkyRL ---------------------------------------------------------------------------------------------------------

BATCH = samples.policy(rows=7, width=9, dtype=torch.float32, seed=5)


@pytest.fixture
def skyrl_utils(monkeypatch):
    found = oracles.oracle(oracles.skyrl_utils)
    monkeypatch.setitem(sys.modules, skyrl.UTILS, found)
    monkeypatch.setattr(found, "LOSSES_WITH_OLD_LOGPROBS", found.LOSSES_WITH_OLD_LOGPROBS)
    for registry in (found.PolicyLossRegistry, found.AdvantageEstimatorRegistry):
        monkeypatch.setattr(registry, "_functions", dict(registry._functions))
    installed(monkeypatch, skyrl="0.4.0")
    return found


def skyrl_config(**given):
    off = dict.fromkeys(
        ("tis_ratio_type", "sequence_mask_metric", "outlier_token_is_threshold_low", "outlier_token_is_threshold_high",
         "token_mask_is_threshold_low", "token_mask_is_threshold_high")
    )  # fmt: skip
    caps = dict(token_tis_ratio_clip_high=1.1, sequence_tis_ratio_clip_high=2.0, geo_mask_low=0.9, geo_mask_high=1.1)
    correction = off | caps | {key: given.pop(key) for key in list(given) if key in off}
    options = dict(
        policy_loss_type="regular", eps_clip_low=0.2, eps_clip_high=0.28, clip_ratio_c=1.5,
        loss_reduction="sequence_mean",
        sapo=types.SimpleNamespace(tau_pos=1.0, tau_neg=1.0625),
        cispo=types.SimpleNamespace(cispo_anchor="old", cispo_eps_clip_low=0.1, cispo_eps_clip_high=0.2),
    )  # fmt: skip
    return types.SimpleNamespace(**options | given, off_policy_correction=types.SimpleNamespace(**correction))


def skyrl_step(utils, name, config, mask):
    advantages = utils.apply_loss_reduction_to_advantages_minibatch(
        BATCH.dense, mask, config.loss_reduction, micro_batch_size=7, max_seq_len=9
    )
    logp = BATCH.logp.clone().requires_grad_()
    loss, told = utils.PolicyLossRegistry.get(name)(
        logp, BATCH.old_logp, advantages, config=config, loss_mask=mask, rollout_logprobs=BATCH.ref_logp
    )
    return graded(loss, logp), told


ANCHOR = types.SimpleNamespace(cispo_anchor="rollout", cispo_eps_clip_low=0.1, cispo_eps_clip_high=0.2)
SKYRL = {
    "ppo": ("regular", {}),
    "ppo_dual": ("dual_clip", dict(policy_loss_type="dual_clip")),
    "gspo_token": ("gspo", dict(eps_clip_low=0.01, eps_clip_high=0.02)),
    "cispo": ("cispo", {}),
    "cispo of the sampler": ("cispo", dict(cispo=ANCHOR)),
    "sapo": ("sapo", {}),
    "ppo, tokens corrected": ("regular", dict(tis_ratio_type="token")),
    "ppo, sequences corrected": ("regular", dict(tis_ratio_type="sequence", sequence_mask_metric="geometric")),
    "ppo, tokens out": ("regular", dict(token_mask_is_threshold_low=0.9, token_mask_is_threshold_high=1.1)),
    "ppo, token mean": ("regular", dict(loss_reduction="token_mean")),
}


@pytest.mark.parametrize("case", SKYRL)
def test_losses_are_skyrls(case, skyrl_utils):
    assert skyrl.register() == (*(f"finealign_{name}" for name in skyrl.LOSSES), "finealign_gae")
    own, options = SKYRL[case]
    ours = skyrl_step(
        skyrl_utils, f"finealign_{case.split()[0].strip(',')}", skyrl_config(**options), BATCH.mask.float()
    )
    theirs = skyrl_step(skyrl_utils, own, skyrl_config(**options), BATCH.mask.float())
    assert_close(ours[0], theirs[0], rtol=2e-5, atol=2e-6)
    for key in ours[1].keys() - ({"clip_ratio"} if own in ("sapo", "cispo") else set()):  # of both signs of A there
        assert ours[1][key] == pytest.approx(theirs[1][key], rel=1e-5), key


def test_a_float_mask_of_skyrl_is_a_token_weight(skyrl_utils):
    skyrl.register()
    mask = torch.where(BATCH.mask, BATCH.token_weight.float(), 0)
    ours = skyrl_step(skyrl_utils, "finealign_ppo", skyrl_config(), mask)[0]
    assert_close(ours, skyrl_step(skyrl_utils, "regular", skyrl_config(), mask)[0], rtol=2e-5, atol=2e-6)
    whole = skyrl_step(skyrl_utils, "finealign_ppo", skyrl_config(), BATCH.mask.float())[0]
    assert not torch.allclose(ours[1], whole[1], rtol=1e-2)


def test_asynchronous_training_of_skyrl_refuses_losses_of_old_logprobs(skyrl_utils, monkeypatch):
    late = types.SimpleNamespace(LOSSES_WITH_OLD_LOGPROBS=skyrl_utils.LOSSES_WITH_OLD_LOGPROBS)
    monkeypatch.setitem(sys.modules, skyrl.ASYNC, late)
    skyrl.register()
    for module in (skyrl_utils, late):
        found = module.LOSSES_WITH_OLD_LOGPROBS
        assert "finealign_ppo" in found and "regular" in found
        assert "finealign_ppo" in [loss.value for loss in found]  # as its message lists them


def test_the_score_function_in_skyrl(skyrl_utils):
    skyrl.register()
    loss, grad = skyrl_step(skyrl_utils, "finealign_reinforce", skyrl_config(), BATCH.mask.float())[0]
    scale = 1 / (7 * BATCH.mask.sum(1, keepdim=True).clamp(min=1))
    assert_close(grad, torch.where(BATCH.mask, -BATCH.dense * scale, 0).double(), rtol=2e-5, atol=2e-6)


def test_gae_is_skyrls(skyrl_utils):
    skyrl.register()
    full = torch.ones_like(BATCH.mask)
    given = dict(token_level_rewards=BATCH.dense, values=BATCH.entropy, response_mask=full.float(), gamma=0.97,
                 lambd=0.9, index=None, config=None, grpo_norm_by_std=True)  # fmt: skip
    ours, theirs = (skyrl_utils.AdvantageEstimatorRegistry.get(name)(**given) for name in ("finealign_gae", "gae"))
    assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    given["response_mask"] = BATCH.mask.float()
    other = BATCH.dense.masked_fill(~BATCH.mask, 9.0)  # what is masked carries nothing
    found = [skyrl_utils.AdvantageEstimatorRegistry.get("finealign_gae")(**given | {"token_level_rewards": rewards})
             for rewards in (BATCH.dense, other)]  # fmt: skip
    assert_close(*found)


def test_what_skyrl_cannot_do_is_refused(skyrl_utils, monkeypatch):
    skyrl.register()
    skyrl.register()  # a second time changes nothing
    assert pickle.loads(pickle.dumps(skyrl.ppo)).func is skyrl._loss  # SkyRL sends functions to its workers
    with pytest.raises(ValueError, match="tis_ratio_type must be None for cispo_anchor='rollout'"):
        config = skyrl_config(cispo=ANCHOR, tis_ratio_type="token")
        skyrl_step(skyrl_utils, "finealign_cispo", config, BATCH.mask.float())
    installed(monkeypatch, skyrl="0.5.0")
    with pytest.raises(RuntimeError, match="skyrl must be of version 0.4, got 0.5.0"):
        skyrl.register()


# ---- prime-rl ------------------------------------------------------------------------------------------------------


@pytest.fixture
def prime_loss(monkeypatch):
    found = oracles.oracle(oracles.prime_rl_loss)
    monkeypatch.setitem(sys.modules, prime_rl.LOSS, found)
    installed(monkeypatch, **{"prime-rl": "0.8.0"})
    prime_rl._prime_rl.cache_clear()
    yield found
    prime_rl._prime_rl.cache_clear()


def prime_step(module, config, weights=None):
    """Loss and gradient of two packed samples, as prime-rl's trainer computes them."""
    logp = BATCH.logp[:2].clone().requires_grad_()
    rows = [list(x[:2]) for x in (BATCH.old_logp, BATCH.ref_logp, BATCH.dense, BATCH.mask)]
    loss, told = module.compute_loss(
        list(logp), rows[0], rows[1], rows[2], rows[3], None if weights is None else list(weights[:2]), None, None,
        module.setup_rl_loss_fn(config), 11, 1, 1,
    )  # fmt: skip
    return graded(loss, logp), told


def custom(module, **kwargs):
    return module.CustomLossConfig(import_path="finealign_kernels.integrations.prime_rl.loss", kwargs=kwargs)


@pytest.mark.parametrize("weights", [None, BATCH.token_weight.float()], ids=["no weights", "weights"])
def test_a_ratio_without_bounds_is_prime_rls(weights, prime_loss):
    """Its default loss without its mask: -ρ A, and a squared log-ratio."""
    default = prime_loss.DefaultLossConfig(dppo_mask_high=2.0, dppo_mask_low=2.0, adv_tau=1.0, kl_tau=0.0)
    theirs = prime_step(prime_loss, default, weights)[0]
    ours, told = prime_step(prime_loss, custom(prime_loss, name="ppo", low=1.0, high=1e9), weights)
    assert_close(ours, theirs, rtol=2e-5, atol=2e-6)
    assert {key: tuple(value.shape) for key, value in told.items()} == dict.fromkeys(told, (2,))
    if weights is None:  # token weights leave this KL alone
        default.kl_tau = 0.3
        options = dict(low=1.0, high=1e9, kl_coef=0.6, kl="k2", reference="sampler")
        ours = prime_step(prime_loss, custom(prime_loss, name="ppo", **options))[0]
        assert_close(ours, prime_step(prime_loss, default)[0], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", prime_rl.LOSSES)
def test_losses_in_prime_rl(name, prime_loss):
    logp = BATCH.logp[:2].clone().requires_grad_()
    given = BATCH.old_logp[:2], BATCH.dense[:2]
    options = dict(mask=BATCH.mask[:2], token_weight=BATCH.token_weight[:2].float(), kl_coef=0.0)
    out = fk.policy_loss(name, logp, *given, reduction="token_global", denominator=11, **options)
    ours = prime_step(prime_loss, custom(prime_loss, name=name), BATCH.token_weight.float())[0]
    assert_close(ours, graded(out.loss, logp), rtol=2e-5, atol=2e-6)


def test_what_prime_rl_decides_is_refused(prime_loss, monkeypatch):
    with pytest.raises(ValueError, match="reduction must be left to prime-rl"):
        prime_step(prime_loss, custom(prime_loss, reduction="sequence"))
    with pytest.raises(ValueError, match="name must be one of"):
        prime_step(prime_loss, custom(prime_loss, name="gspo"))
    prime_rl._prime_rl.cache_clear()
    installed(monkeypatch, **{"prime-rl": "0.9.0"})
    with pytest.raises(RuntimeError, match="prime-rl must be of version 0.8, got 0.9.0"):
        prime_step(prime_loss, custom(prime_loss))


# ---- NeMo-RL -------------------------------------------------------------------------------------------------------


@pytest.fixture
def nemo_loss(monkeypatch):
    found = oracles.oracle(oracles.nemo_rl_loss)
    monkeypatch.setitem(sys.modules, nemo_rl.LOSS, found)
    interfaces = types.ModuleType("nemo_rl.algorithms.loss.interfaces")
    vars(interfaces).update(LossType=found.LossType, MetricNormalizer=found.MetricNormalizer)
    monkeypatch.setitem(sys.modules, interfaces.__name__, interfaces)
    monkeypatch.setitem(sys.modules, "nemo_rl", types.ModuleType("nemo_rl"))
    installed(monkeypatch, **{"nemo-rl": "0.6.0"})
    monkeypatch.delitem(vars(nemo_rl), "PolicyLossFn", raising=False)
    yield found
    vars(nemo_rl).pop("PolicyLossFn", None)


def nemo_step(module, make, dense=True, mask=None, **given):
    options = dict(reference_policy_kl_penalty=0.0) | given
    loss_fn = make(module.ClippedPGLossConfig(**options))
    zero = torch.zeros(7, 1)

    def late(x):  # a column in front: the first token is predicted by nothing
        return torch.cat([zero, x], 1)

    advantages = BATCH.dense if dense else BATCH.advantages[:, None].expand_as(BATCH.logp)
    data = dict(
        token_mask=late(BATCH.mask.float() if mask is None else mask), sample_mask=torch.tensor([1.0] * 6 + [0.0]),
        advantages=late(advantages), prev_logprobs=late(BATCH.old_logp), generation_logprobs=late(0.9 * BATCH.ref_logp),
        reference_policy_logprobs=late(BATCH.ref_logp), rewards=torch.tensor([1.0, 0.0] * 3 + [1.0]),
    )  # fmt: skip
    logp = BATCH.logp.clone().requires_grad_()
    loss, told = loss_fn(logp, data, torch.tensor(9.0), torch.tensor(47.0))
    return graded(loss, logp), told


SEQUENCES = dict(sequence_level_importance_ratios=True, token_level_loss=False)
CORRECTED = dict(use_importance_sampling_correction=True)
NEMO = {
    "ppo": dict(ratio_clip_max=0.28),
    "ppo, by responses": dict(token_level_loss=False),
    "dual clip": dict(ratio_clip_c=1.5),
    "cispo": dict(use_cispo=True, ratio_clip_min=0.1),
    "gspo": dict(SEQUENCES, ratio_clip_min=0.01, ratio_clip_max=0.02),
    "reinforce": dict(disable_ppo_ratio=True),
    "on policy": dict(force_on_policy_ratio=True),
    "kl": dict(reference_policy_kl_penalty=0.3, reference_policy_kl_type="k3", positive_example_nll_weight=0.1),
    "corrected": CORRECTED,
    "gspo, corrected": dict(SEQUENCES, **CORRECTED),
    "tis": dict(CORRECTED, truncated_importance_sampling_type="tis", truncated_importance_sampling_ratio=1.2),
    **{
        kind: dict(
            CORRECTED,
            truncated_importance_sampling_type=kind,
            truncated_importance_sampling_ratio=1.3,
            truncated_importance_sampling_ratio_min=0.7,
        )
        for kind in ("icepop", "seq-mask-tis")
    },
}


@pytest.mark.parametrize("case", NEMO)
def test_losses_are_nemo_rls(case, nemo_loss):
    dense = not case.startswith("gspo")  # NeMo-RL's gives each token the row's mean, as slime's
    ours = nemo_step(nemo_loss, lambda cfg: nemo_rl.PolicyLossFn(cfg), dense, **NEMO[case])
    theirs = nemo_step(nemo_loss, nemo_loss.ClippedPGLossFn, dense, **NEMO[case])
    assert_close(ours[0], theirs[0], rtol=3e-5, atol=3e-6)
    for key, value in theirs[1].items():
        assert ours[1][key] == pytest.approx(value, rel=1e-5, abs=1e-7), key


@pytest.mark.parametrize("by_token", [True, False])
def test_a_float_mask_of_nemo_rl_is_a_token_weight(by_token, nemo_loss):
    mask = torch.where(BATCH.mask, BATCH.token_weight.float(), 0)
    found = [nemo_step(nemo_loss, make, mask=mask, token_level_loss=by_token)[0]
             for make in (nemo_rl.PolicyLossFn, nemo_loss.ClippedPGLossFn)]  # fmt: skip
    assert_close(*found, rtol=3e-5, atol=3e-6)


def test_nemo_rl_finds_the_class(nemo_loss, monkeypatch):
    for path in nemo_rl.SEAMS:
        monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        sys.modules[path].ClippedPGLossFn = nemo_loss.ClippedPGLossFn
    nemo_rl.install()
    made = nemo_rl.PolicyLossFn(
        nemo_loss.ClippedPGLossConfig(finealign_loss="sapo", finealign_options={"tau_pos": 2.0})
    )
    assert all(sys.modules[path].ClippedPGLossFn is nemo_rl.PolicyLossFn for path in nemo_rl.SEAMS)
    assert made.name == "sapo" and made.options == {"tau_pos": 2.0}
    assert pickle.loads(pickle.dumps(made)).options == made.options  # workers get it so
    with pytest.raises(ValueError, match="finealign_loss must be one of"):
        nemo_rl.PolicyLossFn(nemo_loss.ClippedPGLossConfig(finealign_loss="gspo"))
    del sys.modules[nemo_rl.SEAMS[0]].ClippedPGLossFn
    with pytest.raises(RuntimeError, match="nemo_rl.algorithms.grpo must have ClippedPGLossFn, got none"):
        nemo_rl.install(nemo_rl.SEAMS[0])
    installed(monkeypatch, **{"nemo-rl": "0.7.0"})
    with pytest.raises(RuntimeError, match="nemo-rl must be of version 0.6, got 0.7.0"):
        nemo_rl.install()


# ---- names of KL estimators, docs/tables.md ------------------------------------------------------------------------

KL = {
    "slime": {"k1": "k1", "k2": "k2", "k3": "k3", "low_var_kl": "k3"},
    "skyrl": {"k1": "k1", "k2": "k2", "k3": "k3"},
    "nemo_rl": {"k3": "k3_k2grad"},
}


@pytest.mark.parametrize("trainer, theirs", [(trainer, name) for trainer, names in KL.items() for name in names])
def test_kl_estimators_by_their_names(trainer, theirs):
    logp, ref = BATCH.logp.clone().requires_grad_(), BATCH.ref_logp
    if trainer == "slime":
        value = oracles.oracle(oracles.slime_loss).compute_approx_kl(logp, ref, theirs)
    elif trainer == "skyrl":
        value = oracles.oracle(oracles.skyrl_utils).compute_approx_kl(logp, ref, kl_estimator_type=theirs)
    else:  # as its loss calls it
        on_policy = (logp - logp.detach()).exp()
        call = oracles.oracle(oracles.nemo_rl_loss).calculate_kl
        value = call(logp, ref, theirs, importance_sampling_weights=on_policy)
    (slope,) = torch.autograd.grad(value.sum(), logp)
    found = policy.KL[KL[trainer][theirs]](logp.detach() - ref, torch.zeros_like(ref))
    assert_close(found, (value.detach(), slope), rtol=2e-5, atol=2e-6)

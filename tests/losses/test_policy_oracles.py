"""Policy and value losses against the code of TRL, verl, OpenRLHF and Liger; the numbers where conventions differ.

verl and OpenRLHF are found as oracles.py says.
"""

from collections import defaultdict
from types import SimpleNamespace

import oracles
import pytest
import torch
from torch.testing import assert_close
from worked_examples import fixture_d, fixture_e

import finealign_kernels as fk
from finealign_kernels.testing import samples

F64 = torch.float64
BATCH = samples.policy(rows=7, width=9, dtype=F64, seed=5)
COUNT = int(BATCH.mask.sum())
TAU = 1.0625  # a float32: TRL rounds it to one
E = fixture_e()


def graded(loss, logp):
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


def ours(name, batch=BATCH, **options):
    logp = batch.logp.clone().requires_grad_()
    options = {"advantages": batch.advantages, "kl_coef": 0.0, **options}
    out = fk.policy_loss(name, logp, batch.old_logp, mask=batch.mask, **options)
    return out, *graded(out.loss, logp)


# ---- the rivals' own code ------------------------------------------------------------------------------------------


def trl(loss_type, batch=BATCH, *, row_ratio=False, low=0.2, high=0.2, delta=None, beta=0.0, weighted=True, **more):
    """Loss and gradient of GRPOTrainer._compute_loss, given the log-probs that its model would have had."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    logp = batch.logp.clone().requires_grad_()
    entropy_coef = more.get("entropy_coef", 0.0)
    stand_in = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **options: (logp, batch.entropy, None),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if row_ratio else "token",
        beta=beta,
        loss_type=loss_type,
        epsilon_low=low,
        epsilon_high=high,
        args=SimpleNamespace(
            use_bias_correction_kl=weighted,
            delta=delta,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=TAU,
            steps_per_generation=1,
        ),
        use_vllm="sampler_weight" in more,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        max_completion_length=more.get("max_length", 1),
        _entropy_bonus_enabled=entropy_coef != 0,
        use_adaptive_entropy=False,
        entropy_coef=entropy_coef,
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=False
        ),
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros(batch.mask.shape, dtype=torch.long)
    batched = dict(
        prompt_ids=ids,
        prompt_mask=ids,
        completion_ids=ids,
        completion_mask=batch.mask.to(F64),
        advantages=more.get("advantages", batch.advantages),
        old_per_token_logps=batch.old_logp,
        ref_per_token_logps=batch.ref_logp,
        num_items_in_batch=torch.tensor(more.get("denominator", 1)),
        importance_sampling_ratio=more.get("sampler_weight"),
    )
    loss = trainer._compute_loss(stand_in, SimpleNamespace(training=True), batched)
    return *graded(loss, logp), {key: value[0] for key, value in stand_in._metrics["train"].items()}


def trl_rloo(batch=BATCH):
    trainer = pytest.importorskip("trl.trainer.rloo_trainer").RLOOTrainer
    logp = batch.logp.clone().requires_grad_()
    stand_in = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **options: (logp, batch.entropy, None),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        epsilon_low=0.2,
        epsilon_high=0.2,
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros(batch.mask.shape, dtype=torch.long)
    mask = batch.mask.to(F64)
    batched = dict(prompt_ids=ids, prompt_mask=ids, completion_ids=ids, completion_mask=mask)
    batched |= dict(old_logps=(batch.old_logp * mask).sum(1), advantages=batch.advantages)
    return graded(trainer._compute_loss(stand_in, SimpleNamespace(training=True), batched), logp)


def verl(name, batch=BATCH, mode="token-mean", *, low=0.2, high=0.2, dual=1e9, weight=None, dense=None, **counts):
    """A policy loss of verl's registry; its dual clip is always on, so far out by default."""
    core = oracles.oracle(oracles.verl_core)

    class Config(core.ActorConfig):
        clip_ratio, clip_ratio_low, clip_ratio_high, tau_pos, tau_neg = 0.2, low, high, 1.0, TAU
        global_batch_info = counts

        def get(self, key, default=None):
            return {"clip_ratio_c": dual}.get(key, default)

    logp = batch.logp.clone().requires_grad_()
    advantages = batch.advantages[:, None].expand_as(logp) if dense is None else dense
    call = core.compute_policy_loss_reinforce if name == "reinforce" else core.POLICY_LOSS_REGISTRY[name]
    mask = batch.mask.to(F64)
    loss, _ = call(batch.old_logp, logp, advantages, mask, mode, Config(), weight)
    return graded(loss, logp)


def openrlhf(kind="ppo", batch=BATCH, *, token=True, sampler=None, dense=None, tokens=None, rows=None, **options):
    module = oracles.oracle(oracles.openrlhf_loss)
    logp = batch.logp.clone().requires_grad_()
    advantages = batch.advantages[:, None].expand_as(logp) if dense is None else dense
    loss = module.PolicyLoss(token_level_loss=token, policy_loss_type=kind, **options)
    mask = batch.mask.to(F64)
    counts = dict(batch_num_tokens=tokens, global_batch_size=rows)
    return graded(loss(logp, batch.old_logp, advantages, mask, sampler, **counts)[0], logp)


def liger(loss_type, batch=BATCH, *, row_ratio=False, **options):
    """Liger's loss of log-probs, the part of its chunked loss that it compiles."""
    module = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")
    logp, mask = batch.logp.clone().requires_grad_(), batch.mask.to(F64)
    level = "sequence" if row_ratio else "token"
    given = dict(beta=0.0, ref_per_token_logps=batch.ref_logp, old_per_token_logps=batch.old_logp) | options
    call = module.LigerFusedLinearGRPOFunction.ppo_loss_fn
    loss, _ = call(logp, mask, batch.advantages, mask, loss_type=loss_type, importance_sampling_level=level, **given)
    return graded(loss, logp)


# ---- agreement -----------------------------------------------------------------------------------------------------

SAME = dict(low=0.2, high=0.2)
GLOBAL = dict(denominator=COUNT + 9)
AGREE = {  # case: the row with its options, the rivals that have the same function
    "grpo": ("grpo", {}, [lambda: trl("grpo"), lambda: liger("grpo")]),
    "bnpo": ("bnpo", {}, [lambda: trl("bnpo"), lambda: liger("bnpo"), lambda: verl("vanilla"), lambda: openrlhf()]),
    "dual": (
        "ppo",
        dict(dual=1.5),
        [
            lambda: trl("bnpo", delta=1.5),
            lambda: liger("bnpo", delta=1.5),
            lambda: verl("vanilla", dual=1.5),
            lambda: openrlhf(dual_clip=1.5),
        ],
    ),
    "dense": (
        "ppo",
        dict(advantages=BATCH.dense),
        [
            lambda: trl("bnpo", advantages=BATCH.dense),
            lambda: verl("vanilla", dense=BATCH.dense),
            lambda: openrlhf(dense=BATCH.dense),
        ],
    ),
    "sequence": (
        "ppo",
        dict(reduction="sequence", count_empty=False),
        [lambda: verl("vanilla", mode="seq-mean-token-mean"), lambda: openrlhf(token=False)],
    ),
    "global rows": (
        "ppo",
        dict(reduction="sequence", denominator=11),
        [
            lambda: verl("vanilla", mode="seq-mean-token-mean", global_batch_size=11),
            lambda: openrlhf(token=False, rows=11),
        ],
    ),
    "sequence sum": (
        "ppo",
        dict(reduction="sequence_sum", count_empty=False),
        [lambda: verl("vanilla", mode="seq-mean-token-sum")],
    ),
    "dr_grpo": (
        "dr_grpo",
        dict(max_length=13),
        [lambda: trl("dr_grpo", max_length=13), lambda: liger("dr_grpo", max_completion_length=13)],
    ),
    "dapo": (
        "dapo",
        GLOBAL,
        [
            lambda: trl("dapo", high=0.28, **GLOBAL),
            lambda: liger("dapo", epsilon_high=0.28, num_items_in_batch=COUNT + 9),
            lambda: verl("vanilla", high=0.28, batch_num_tokens=COUNT + 9),
            lambda: openrlhf(clip_eps_high=0.28, tokens=COUNT + 9),
        ],
    ),
    "gspo": ("gspo", SAME, [lambda: trl("grpo", row_ratio=True), lambda: liger("grpo", row_ratio=True)]),
    "gspo, empty rows left out": (
        "gspo",
        SAME | dict(count_empty=False),
        [lambda: openrlhf("gspo"), lambda: verl("gspo", mode="seq-mean-token-mean")],
    ),
    "gspo_token": (
        "gspo_token",
        SAME | dict(count_empty=False, advantages=BATCH.dense),
        [lambda: verl("gspo", mode="seq-mean-token-mean", dense=BATCH.dense)],
    ),
    "cispo": (
        "cispo",
        dict(high=1.5, **GLOBAL),
        [
            lambda: trl("cispo", high=1.5, **GLOBAL),
            lambda: liger("cispo", epsilon_high=1.5, num_items_in_batch=COUNT + 9),
        ],
    ),
    "cispo, two bounds": ("cispo", dict(low=0.8, high=1.2, reduction="token"), [lambda: verl("cispo")]),
    "reinforce": (
        "reinforce",
        dict(reduction="token", advantages=BATCH.dense),
        [lambda: verl("reinforce", dense=BATCH.dense)],
    ),
    "sapo": ("sapo", dict(tau_neg=TAU), [lambda: trl("sapo"), lambda: liger("sapo", sapo_temperature_neg=TAU)]),
    "sapo, empty rows left out": ("sapo", dict(tau_neg=TAU, count_empty=False), [lambda: verl("sapo")]),
    "luspo": ("luspo", {}, [lambda: trl("luspo", row_ratio=True), lambda: liger("luspo", row_ratio=True)]),
    "kl weighted": (
        "grpo",
        dict(kl_coef=0.3, ref_logp=BATCH.ref_logp),
        [lambda: trl("grpo", beta=0.3), lambda: liger("grpo", beta=0.3, use_bias_correction_kl=True)],
    ),
    "kl k3": (
        "bnpo",
        dict(kl_coef=0.3, kl="k3", ref_logp=BATCH.ref_logp),
        [lambda: trl("bnpo", beta=0.3, weighted=False), lambda: liger("bnpo", beta=0.3)],
    ),
    "entropy": (
        "grpo",
        dict(entropy=BATCH.entropy, entropy_coef=0.1),
        [lambda: trl("grpo", entropy_coef=0.1)],
    ),
    "sampler weights": (
        "dapo",
        dict(sampler_weight=BATCH.token_weight, kl_coef=0.3, ref_logp=BATCH.ref_logp, **GLOBAL),
        [lambda: trl("dapo", high=0.28, beta=0.3, sampler_weight=BATCH.token_weight, **GLOBAL)],
    ),
    "sampler weights, token mean": (
        "ppo",
        dict(sampler_weight=BATCH.token_weight),
        [lambda: verl("vanilla", weight=BATCH.token_weight)],
    ),
}


@pytest.mark.parametrize("case, rival", [(case, i) for case, row in AGREE.items() for i in range(len(row[2]))])
def test_agrees(case, rival):
    name, options, rivals = AGREE[case]
    loss, grad = rivals[rival]()[:2]
    _, found, dlogp = ours(name, **options)
    assert_close((found, dlogp), (loss.double(), grad), rtol=1e-7, atol=1e-8)  # verl, OpenRLHF: 1e-8 on a length


def test_rloo_is_trls_but_for_empty_rows():
    loss, grad = trl_rloo()
    out, found, dlogp = ours("rloo")
    empty = ~BATCH.mask.any(1)
    assert empty.sum() == 1
    assert_close(dlogp, grad)
    assert_close(found, loss + BATCH.advantages[empty].sum() / 7)  # TRL: a product over no token, a ratio of 1
    fixture = samples.Policy(E.logp, E.old, E.ref, E.advantages, E.dense, E.weight, E.advantages, E.entropy, E.mask)
    assert_close(trl_rloo(fixture)[0].item(), 1.7331953907 + 0.175, rtol=0, atol=1e-9)


def test_trl_logs_the_same_numbers():
    out, *_ = ours("bnpo", kl_coef=0.3, ref_logp=BATCH.ref_logp, entropy=BATCH.entropy)
    logged = trl("bnpo", beta=0.3)[2]
    pairs = {"clip_ratio/low_mean": out.clip_fraction_low, "clip_ratio/high_mean": out.clip_fraction_high}
    for key, value in (pairs | {"kl": out.kl, "entropy": out.entropy}).items():
        assert_close(logged[key], value.item(), rtol=1e-6, atol=0)
    assert out.clip_fraction_low > 0 and out.clip_fraction_high > 0
    capped, *_ = ours("cispo", high=1.5, **GLOBAL)
    assert_close(
        trl("cispo", high=1.5, **GLOBAL)[2]["cispo_clip_ratio"], capped.clip_fraction_high.item(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("mode, options", [("clip", dict(low=0.5, high=2.0)), ("mask", dict(low=0.5, high=2.0))])
def test_openrlhf_corrects_for_the_sampler_alike(mode, options):
    sampler = BATCH.ref_logp
    kind = {"clip": "token_truncate", "mask": "token_mask"}[mode]
    weight = fk.sampler_weights(BATCH.old_logp, sampler, mode=kind, mask=BATCH.mask, **options)
    assert (weight == 0)[BATCH.mask].any() == (mode == "mask")
    settings = dict(is_correction_level="token", is_correction_mode=mode, is_correction_threshold=(0.5, 2.0))
    assert_close(ours("ppo", sampler_weight=weight)[1:], openrlhf(sampler=sampler, **settings))


@pytest.mark.parametrize("estimator", ("k1", "k2", "k3", "k3+"))
def test_verls_kl(estimator):
    core = oracles.oracle(oracles.verl_core)
    name = {"k3+": "k3_k2grad"}.get(estimator, estimator)
    logp = BATCH.logp.clone().requires_grad_()
    kappa = core.kl_penalty(logp, BATCH.ref_logp, estimator)
    loss = core.agg_loss(kappa, BATCH.mask.to(F64), "token-mean")
    out, found, dlogp = ours("ppo", kl=name, kl_coef=1.0, ref_logp=BATCH.ref_logp)
    _, policy, without = ours("ppo")
    assert_close((found - policy, dlogp - without), graded(loss, logp), rtol=1e-9, atol=1e-12)
    assert_close(out.kl, loss.detach(), rtol=1e-9, atol=1e-12)


def test_openrlhfs_unbiased_kl_is_the_weighted_one():
    """Its value is that of k3, its gradient w d as here, both in float32."""
    utils = oracles.oracle(oracles.openrlhf_utils)
    logp = BATCH.logp.clone().requires_grad_()
    options = dict(kl_estimator="k3", unbiased_gradient=True, log_probs_old=BATCH.old_logp)
    each = utils.compute_approx_kl(logp, BATCH.ref_logp, **options)
    _, grad = graded(utils.masked_mean(each, BATCH.mask), logp)
    weighted = ours("ppo", kl_coef=1.0, ref_logp=BATCH.ref_logp)
    assert_close(weighted[2] - ours("ppo")[2], grad, rtol=1e-5, atol=1e-7)
    assert_close(
        ours("ppo", kl="k3", ref_logp=BATCH.ref_logp)[0].kl, utils.masked_mean(each, BATCH.mask).detach().double()
    )


@pytest.mark.parametrize("token", (True, False))
@pytest.mark.parametrize("clip", (0.2, None))
def test_value_losses_agree(token, clip):
    values, old, returns = BATCH.logp, BATCH.old_logp, BATCH.ref_logp
    leaf, mask = values.clone().requires_grad_(), BATCH.mask.to(F64)
    reduction = dict(reduction="token") if token else dict(reduction="sequence", count_empty=False)
    found = fk.value_loss(leaf, old, returns, mask=BATCH.mask, clip=clip, **reduction)
    expected = graded(found.loss, leaf)
    theirs = oracles.oracle(oracles.openrlhf_loss).ValueLoss(clip_eps=clip, token_level_loss=token)
    assert_close(graded(theirs(leaf, old, returns, mask), leaf), expected, rtol=1e-7, atol=1e-9)
    core = oracles.oracle(oracles.verl_core)
    if clip is not None:
        mode = "token-mean" if token else "seq-mean-token-mean"
        loss, fraction = core.compute_value_loss(leaf, returns, old, mask, clip, mode)
        assert_close(graded(loss, leaf), expected, rtol=1e-7, atol=1e-9)
        assert_close(found.clip_fraction, fraction.double(), rtol=1e-6, atol=0)


def test_the_whole_head_agrees_with_ligers_chunked_loss():
    """hidden -> log-probs -> loss -> gradients, in float32."""
    liger_loss = pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    batch = samples.policy(rows=5, width=7, seed=6)
    head = samples.linear(35, 61, 16, seed=6)
    results = []
    for mine in (True, False):
        hidden, weight = head.hidden.clone().requires_grad_(), head.weight.clone().requires_grad_()
        labels = head.labels.view(5, 7)
        old = torch.log_softmax(head.hidden @ head.weight.t(), -1).gather(1, head.labels[:, None]).view(5, 7) + 0.2
        ref = old + batch.ref_logp - batch.old_logp
        if mine:
            logp = fk.linear_logprobs(hidden.view(5, 7, 16), weight, labels, mask=batch.mask).logp
            options = dict(mask=batch.mask, ref_logp=ref, kl_coef=0.3, kl="k3", denominator=23)
            loss = fk.policy_loss("dapo", logp, old, batch.advantages, **options).loss
        else:
            call = liger_loss(beta=0.3, compiled=False, epsilon_high=0.28, loss_type="dapo", chunk_size=2)
            given = (hidden.view(5, 7, 16), weight, labels, batch.mask.float(), batch.advantages)
            loss, _ = call(*given, ref_per_token_logps=ref, old_per_token_logps=old, num_items_in_batch=23)
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


# ---- where they differ ---------------------------------------------------------------------------------------------


def one(logp, old, advantage, ref=0.0, entropy=0.0, width=1):
    """A response of tokens that are all alike."""
    full = lambda x: torch.full((1, width), float(x), dtype=F64)  # noqa: E731
    a = torch.tensor([float(advantage)], dtype=F64)
    return samples.Policy(
        full(logp), full(old), full(ref), a, full(advantage), full(1), a, full(entropy), torch.ones(1, width).bool()
    )


def test_the_clamp_of_the_log_ratio():
    """Here, in verl and OpenRLHF e^20 and no gradient; in TRL and Liger inf, or NaN where it meets a 0."""
    far = one(1000.0, 0.0, -1.0)
    e20 = torch.tensor(20.0, dtype=F64).exp()
    for loss, grad in (ours("ppo", far)[1:], verl("vanilla", far), openrlhf(batch=far)):
        assert_close(loss.double(), e20)
        assert not grad.any()
    for loss, grad, *_ in (trl("bnpo", far), liger("bnpo", far)):
        assert loss == torch.inf and not grad.isfinite().any()
    nothing = one(1000.0, 0.0, 0.0)
    assert trl("bnpo", nothing)[0].isnan() and ours("ppo", nothing)[1] == 0


def test_the_dual_clip_is_always_on_in_verl():
    far = one(2.0, 0.0, -1.0)
    assert_close(ours("ppo", far)[1].item(), 7.38905609893065)
    assert verl("vanilla", far, dual=3.0)[0] == 3 == ours("ppo", far, dual=3.0)[1]
    assert_close(openrlhf(batch=far)[0].item(), 7.38905609893065)


def test_empty_rows():
    """TRL counts them, verl and OpenRLHF do not: 7 to 6 on this batch."""
    trl_loss, verl_loss = trl("grpo")[0], verl("vanilla", mode="seq-mean-token-mean")[0]
    assert_close(7 * trl_loss, 6 * verl_loss, rtol=1e-6, atol=0)
    assert_close(ours("grpo")[1], trl_loss)
    assert_close(ours("grpo", count_empty=False)[1], verl_loss, rtol=1e-7, atol=1e-9)


def test_what_is_called_gspo():
    """With an advantage per token TRL's and OpenRLHF's row ratio loses the credit; verl's token form keeps it."""
    dense = BATCH.dense
    row = openrlhf("gspo", dense=dense, clip_eps_low=0.9, clip_eps_high=0.9)[1]
    keeps = verl("gspo", mode="seq-mean-token-mean", dense=dense, low=0.9, high=0.9)[1]
    first = BATCH.mask[0]
    assert_close(row[0][first], row[0][first].mean().expand(int(first.sum())))
    assert keeps[0][first].std() > 0.01
    assert_close(row[0][first].mean(), keeps[0][first].mean(), rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="gspo_token"):
        ours("gspo", advantages=dense)
    # and verl bounds the row's log-ratio at 10 from above only
    far = one(12.0, 0.0, -1.0)
    assert_close(verl("gspo", far)[0].double().item(), 22026.465794806718)
    assert_close(ours("gspo_token", far)[1].item(), 162754.79141900392)


def test_the_bounds_of_cispo():
    """TRL and Liger cap the weight at epsilon_high itself, verl at 1 + it; here low and high are the bounds."""
    step = one(-1.0, -1.0, 1.0)  # ratio 1
    assert_close(trl("cispo", step, high=0.2)[1].item(), -0.2)
    assert_close(verl("cispo", step)[1].item(), -1.0)
    assert_close(ours("cispo", step, low=0.0, high=0.2, denominator=1)[2].item(), -0.2)
    assert_close(ours("cispo", step, low=0.8, high=1.2, denominator=1)[2].item(), -1.0)


def test_the_kl_as_a_loss():
    """TRL weighs k3 by the ratio of the loss, with a row ratio the row's; verl and OpenRLHF bound κ by 10."""
    _, loss, grad = ours("grpo", kl_coef=0.3, ref_logp=BATCH.ref_logp)
    assert_close((loss, grad), trl("grpo", beta=0.3)[:2])
    rowwise = trl("grpo", row_ratio=True, beta=0.3)[1]
    tokenwise = ours("gspo", kl_coef=0.3, ref_logp=BATCH.ref_logp, **SAME)[2]
    assert (rowwise - tokenwise).abs().max() > 1e-3
    far = one(-5.0, -5.0, 0.0, ref=0.0)  # d = -5: e^5 - 1 - 5
    out, _, grad = ours("ppo", far, kl_coef=1.0, kl="k3", ref_logp=far.ref_logp)
    assert_close((out.kl.item(), grad.item()), (142.4131591025766, -147.4131591025766))
    logp = far.logp.clone().requires_grad_()
    utils, core = oracles.oracle(oracles.openrlhf_utils), oracles.oracle(oracles.verl_core)
    for each in (
        core.kl_penalty(logp, far.ref_logp, "k3"),
        utils.compute_approx_kl(logp, far.ref_logp, kl_estimator="k3"),
    ):
        assert each.item() == 10 and not torch.autograd.grad(each.sum(), logp)[0].any()


def test_verls_constant_divides_by_the_length_alone():
    """Of its default, the width of the padded micro-batch: B times the value here, and less with more padding."""
    core = oracles.oracle(oracles.verl_core)
    each, mask = ours("ppo")[0].losses, BATCH.mask.to(F64)
    mode = "seq-mean-token-sum-norm"
    rows = int(BATCH.mask.any(1).sum())
    mean = ours("ppo", reduction="constant", max_length=9, denominator=rows)[1]
    assert_close(core.agg_loss(each, mask, mode), mean)
    wide = [torch.nn.functional.pad(x, (0, 9)) for x in (each, mask)]
    assert_close(core.agg_loss(*wide, mode), mean / 2)


def test_openrlhfs_sequence_mask_weighs_by_the_untruncated_ratio():
    """Rows whose geometric mean is inside the bounds keep e_t as it is; a sequence mode here has one weight per row."""
    sampler = BATCH.ref_logp
    settings = dict(is_correction_level="seq", is_correction_mode="mask", is_correction_threshold=(0.5, 2.0))
    loss, grad = openrlhf(sampler=sampler, **settings)
    apart = torch.where(BATCH.mask, BATCH.old_logp - sampler, 0)
    mean = (apart.sum(1) / BATCH.mask.sum(1).clamp(min=1)).exp()[:, None]
    weight = torch.where((mean >= 0.5) & (mean <= 2), apart.exp(), 0)
    module = oracles.oracle(oracles.openrlhf_loss)
    assert module.masked_mean(apart, BATCH.mask, dim=-1).isnan().sum() == 1  # its mean over no token
    kept = BATCH.mask.any(1)
    assert_close(ours("ppo", sampler_weight=weight)[2][kept], grad[kept])
    assert not ours("ppo", sampler_weight=weight)[2][~kept].any()
    row = fk.sampler_weights(BATCH.old_logp, sampler, mode="sequence_mask", low=0.5, high=2.0, mask=BATCH.mask)
    assert (row - weight).abs().max() > 0.1


def test_masked_places_enter_what_multiplies():
    """A NaN log-prob at a masked token: in TRL, OpenRLHF and Liger the whole loss, here nothing."""
    dirty = BATCH._replace(logp=torch.where(BATCH.mask, BATCH.logp, torch.nan))
    clean = ours("ppo")[1:]
    assert all(map(torch.equal, ours("ppo", dirty)[1:], clean))
    assert trl("bnpo", dirty)[0].isnan() and liger("bnpo", dirty)[0].isnan() and openrlhf(batch=dirty)[0].isnan()


def test_value_clip_of_the_fixture():
    """Fixture D by verl and OpenRLHF."""
    d = fixture_d()
    mask = d.mask.to(F64)
    core, module = oracles.oracle(oracles.verl_core), oracles.oracle(oracles.openrlhf_loss)
    for mode, token, expected in (("token-mean", True, 2.358340562), ("seq-mean-token-mean", False, 2.4759802249)):
        theirs = core.compute_value_loss(d.values, d.returns, d.old_values, mask, 0.2, mode)[0]
        others = module.ValueLoss(0.2, token)(d.values, d.old_values, d.returns, mask)
        assert_close((theirs.item(), others.item()), (expected, expected), rtol=0, atol=2e-8)

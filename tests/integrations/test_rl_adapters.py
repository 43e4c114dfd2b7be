"""The adapters of verl and OpenRLHF against their own losses, by their own seams; both are found as oracles.py says."""

import importlib
import importlib.metadata
import importlib.util
import logging
import sys
import types
from pathlib import Path

import oracles
import pytest
import tomllib
import torch
from torch.testing import assert_close

import finealign_kernels as fk
from finealign_kernels.integrations import _versions, openrlhf, verl
from finealign_kernels.testing import samples

F64 = torch.float64
BATCH = samples.policy(rows=7, width=9, dtype=F64, seed=5)
COUNTS = dict(dp_size=3, batch_num_tokens=47, global_batch_size=11, loss_scale_factor=13)


def graded(loss, leaf):
    return loss.detach().double(), torch.autograd.grad(loss, leaf)[0]


# ---- verl ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def core(monkeypatch):
    """verl's core_algos with a registry of its own for the test."""
    found = oracles.oracle(oracles.verl_core)
    monkeypatch.setattr(found, "POLICY_LOSS_REGISTRY", dict(found.POLICY_LOSS_REGISTRY))
    monkeypatch.setattr(found, "compute_gae_advantage_return", found.compute_gae_advantage_return)
    monkeypatch.setattr(_versions, "version", lambda name: "0.9.1")
    return found


def called(core, name, mode, counts=None, weight=None, call=None):
    """Loss, gradient and metrics, called as verl's ppo_loss calls it."""

    class Config(core.ActorConfig):
        clip_ratio, clip_ratio_low, clip_ratio_high, tau_pos, tau_neg = 0.2, None, 0.28, 1.0, 1.0625
        global_batch_info = counts or {}

        def get(self, key, default=None):
            return {"clip_ratio_c": 1.5}.get(key, default)

    logp = BATCH.logp.clone().requires_grad_()
    loss, metrics = (call or core.get_policy_loss_fn(name))(
        old_log_prob=BATCH.old_logp,
        log_prob=logp,
        advantages=BATCH.dense,
        response_mask=BATCH.mask,
        loss_agg_mode=mode,
        config=Config(),
        rollout_is_weights=weight,
    )
    return *graded(loss, logp), metrics


OWN = {"ppo": "vanilla", "gspo_token": "gspo", "cispo": "cispo", "sapo": "sapo"}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("counts", [None, COUNTS], ids=["own counts", "global counts"])
@pytest.mark.parametrize("mode", verl.MODES)
def test_losses_are_verls(name, counts, mode, core):
    assert f"finealign_{name}" in verl.register(core)
    for weight in (None, BATCH.token_weight):
        ours = called(core, f"finealign_{name}", mode, counts, weight)
        theirs = called(core, OWN[name], mode, counts, weight)
        assert_close(ours[:2], theirs[:2], rtol=1e-6, atol=1e-8)  # verl adds 1e-8 to a length
        if name == "ppo":
            for key, value in theirs[2].items():
                assert ours[2][key] == pytest.approx(value, rel=1e-6, abs=1e-8), key
        assert ours[2].keys() == theirs[2].keys()


def test_the_plain_policy_gradient_is_verls(core):
    verl.register(core)
    ours = called(core, "finealign_reinforce", "token-mean")
    theirs = called(core, None, "token-mean", call=lambda **given: core.compute_policy_loss_reinforce(
        given["old_log_prob"], given["log_prob"], given["advantages"], given["response_mask"].double(),
        given["loss_agg_mode"], given["config"], None,
    ))  # fmt: skip
    assert_close(ours[:2], theirs[:2], rtol=1e-6, atol=1e-8)


def test_what_verl_does_not_give_is_refused(core):
    verl.register(core)
    with pytest.raises(ValueError, match="loss_agg_mode must be one of .* got 'mean'"):
        called(core, "finealign_ppo", "mean")
    with pytest.raises(ValueError, match=r"config.global_batch_info\['batch_num_tokens'\] must be given where dp_size"):
        called(core, "finealign_ppo", "token-mean", {"dp_size": 2})


def test_gae_takes_verls_place_on_request(core, monkeypatch):
    stock = core.compute_gae_advantage_return
    verl.register(core)
    assert core.compute_gae_advantage_return is stock
    monkeypatch.setenv("FINEALIGN_VERL_GAE", "1")
    verl.register(core)
    given = (BATCH.dense, BATCH.entropy, BATCH.mask.double(), 0.97, 0.9)
    for ours, theirs in zip(core.compute_gae_advantage_return(*given), stock(*given), strict=True):
        assert_close(ours[BATCH.mask], theirs[BATCH.mask], rtol=1e-6, atol=1e-8)
        assert not ours[~BATCH.mask].any()


@pytest.mark.parametrize("name", OWN)
def test_weights_of_tokens_fold_into_advantages(name, core):
    """verl's own losses of w A are the losses here with w as token_weight; and a negative weight is refused."""
    weighted = verl.weigh_advantages(BATCH.dense, BATCH.token_weight)
    own = types.SimpleNamespace(**{**BATCH._asdict(), "dense": weighted})
    options = {"ppo": dict(low=0.2, high=0.28, dual=1.5), "gspo_token": dict(low=0.2, high=0.28)}
    options |= {"cispo": dict(low=0.8, high=1.28), "sapo": dict(tau_pos=1.0, tau_neg=1.0625)}

    def of_weighted(**given):
        return core.get_policy_loss_fn(OWN[name])(**{**given, "advantages": own.dense})

    theirs = called(core, None, "seq-mean-token-mean", call=of_weighted)
    logp = BATCH.logp.clone().requires_grad_()
    out = fk.policy_loss(
        name, logp, BATCH.old_logp, BATCH.dense, mask=BATCH.mask, token_weight=BATCH.token_weight, average="all",
        reduction="sequence", count_empty=False, kl_coef=0.0, **options[name],
    )  # fmt: skip
    assert_close(graded(out.loss, logp), theirs[:2], rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="token_weight must be at least 0"):
        verl.weigh_advantages(BATCH.dense, -BATCH.token_weight)


def test_the_entry_point_names_the_plugin():
    root = Path(__file__).resolve().parents[2]
    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]["verl.plugins"]
    assert declared == {"finealign": "finealign_kernels.integrations.verl_plugin"}
    found = importlib.metadata.EntryPoint("finealign", declared["finealign"], "verl.plugins")
    assert found.load().register_when_imported is verl.register_when_imported


def test_losses_are_registered_when_verl_imports_its_own(monkeypatch):
    """As a plugin loads: before verl's losses are imported."""
    oracles.oracle(oracles.verl_core)
    monkeypatch.setattr(_versions, "version", lambda name: "0.9.1")
    watching = len(sys.meta_path)
    verl.register_when_imported()
    assert len(sys.meta_path) == watching + 1
    core = oracles.verl_core.__wrapped__()  # imported anew
    assert len(sys.meta_path) == watching
    assert {f"finealign_{name}" for name in verl.LOSSES} <= core.POLICY_LOSS_REGISTRY.keys()


def test_a_module_that_was_only_looked_for_is_still_watched(tmp_path, monkeypatch):
    (tmp_path / "looked_for.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    watch = verl._Watch({"looked_for": seen.append})
    monkeypatch.setattr(sys, "meta_path", [watch, *sys.meta_path])
    assert importlib.util.find_spec("looked_for") and not seen
    assert seen == [importlib.import_module("looked_for")] and watch not in sys.meta_path
    del sys.modules["looked_for"]


@pytest.fixture
def step(core, monkeypatch):
    """verl's own step on a padded batch: its forward with the fused head, GAE, ppo_loss."""
    found = oracles.oracle(oracles.verl_step)
    monkeypatch.setattr(found.losses, "get_policy_loss_fn", core.get_policy_loss_fn)
    monkeypatch.setattr(found.head, "FusedLinearForPPO", found.head.FusedLinearForPPO)
    monkeypatch.setitem(sys.modules, found.head.__name__, found.head)
    return found


def one_step(step, core, loss_mode):
    """Loss, metrics, advantages and the gradients of a small Llama, from token ids, through verl's functions."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=2, vocab_size=61)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=2, **sizes))
    ids, prompt = torch.randint(0, 61, (4, 12)), 3
    mask = torch.ones(4, 9)
    mask[0, 6:], mask[2, 3:5] = 0, 0  # padding, and the output of a tool
    rewards, values, weight = torch.randn(4, 9) * mask, torch.randn(4, 9), torch.rand(4, 9) * 2
    noise = 0.2 * torch.randn(2, 4, 9)

    out = step.dense.forward_with_torch_backend(model, input_ids=ids, return_dict=True, temperature=0.8)
    logp, entropy = (x[:, prompt - 1 : -1] for x in (out.log_probs, out.entropy))
    advantages, returns = core.compute_gae_advantage_return(rewards, values, mask, 0.97, 0.9)

    class Config(core.ActorConfig):
        clip_ratio, clip_ratio_low, clip_ratio_high, loss_agg_mode, loss_scale_factor = (
            0.1,
            None,
            0.15,
            "token-mean",
            None,
        )
        use_kl_loss, kl_loss_type, kl_loss_coef, entropy_coeff = True, "low_var_kl", 0.1, 0.02
        global_batch_info, policy_loss = {}, {"loss_mode": loss_mode}

        def get(self, key, default=None):
            return default

    data = step.batch(
        response_mask=mask, old_log_probs=logp.detach() + noise[0], ref_log_prob=logp.detach() + noise[1],
        advantages=verl.weigh_advantages(advantages, weight), dp_size=2, batch_num_tokens=70, global_batch_size=9,
    )  # fmt: skip
    loss, metrics = step.losses.ppo_loss(Config(), {"log_probs": logp, "entropy": entropy}, data)
    loss.backward()
    metrics = {key: float(torch.as_tensor(value).detach()) for key, value in metrics.items()}
    return loss.detach(), metrics, (advantages * mask, returns * mask), [p.grad for p in model.parameters()]


def test_a_step_through_verls_own_functions(core, step, monkeypatch):
    """Head, GAE with values, token weights in the advantages and the loss: ours beside verl's, on one padded batch."""
    stock = one_step(step, core, "vanilla")
    for switch in ("FINEALIGN_VERL_GAE", "FINEALIGN_VERL_HEAD"):
        monkeypatch.setenv(switch, "1")
    verl.register(core)
    verl.patch_head(step.head)
    ours = one_step(step, core, "finealign_ppo")
    assert step.head.FusedLinearForPPO is verl.FusedLinearForPPO and ours[1].keys() == stock[1].keys()
    assert_close((ours[0], *ours[2:]), (stock[0], *stock[2:]), rtol=2e-4, atol=2e-6)
    for key, value in stock[1].items():
        assert ours[1][key] == pytest.approx(value, rel=2e-4, abs=1e-6), key


def test_both_heads_of_verl(step, monkeypatch):
    draw = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(2, 5, 8, generator=draw), 0.3 * torch.randn(31, 8, generator=draw)
    labels, push = torch.randint(0, 31, (2, 5), generator=draw), torch.randn(2, 2, 5, generator=draw)
    found = []
    heads = step.head.FusedLinearForPPO(), verl.FusedLinearForPPO(), verl.linear_cross_entropy
    for head in heads:
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logp, entropy = head(*leaves, labels.int(), 0.7)
        assert logp.shape == (labels.shape if isinstance(head, torch.nn.Module) else (10,))
        total = (logp.view(2, 5) * push[0] + entropy.view(2, 5) * push[1]).sum()
        found.append((logp.detach().view(2, 5), entropy.detach().view(2, 5), *torch.autograd.grad(total, leaves)))
    for other in found[1:]:
        assert_close(other, found[0], rtol=2e-5, atol=2e-6)
    monkeypatch.delattr(step.head, "FusedLinearForPPO")
    with pytest.raises(RuntimeError, match="torch_functional must have FusedLinearForPPO, got none"):
        verl.patch_head(step.head)


def test_a_plugin_that_fails_says_so(monkeypatch, caplog):
    """verl logs what a plugin raises at DEBUG, and nobody sees it."""

    def fails():
        raise OSError("no such kernel")

    monkeypatch.setattr(verl, "register_when_imported", fails)
    monkeypatch.delitem(sys.modules, "finealign_kernels.integrations.verl_plugin", raising=False)
    with caplog.at_level(logging.ERROR), pytest.raises(OSError, match="no such kernel"):
        importlib.import_module("finealign_kernels.integrations.verl_plugin")
    assert "finealign_kernels has registered no loss with verl" in caplog.text and "no such kernel" in caplog.text


def test_an_unknown_verl_is_told_loudly(monkeypatch, caplog):
    monkeypatch.setattr(_versions, "version", lambda name: "0.8.0")
    with caplog.at_level(logging.ERROR):
        verl.register_when_imported()
    assert "registered no loss with verl: verl must be of version 0.9, got 0.8.0" in caplog.text
    assert not any(isinstance(finder, verl._Watch) for finder in sys.meta_path)
    with pytest.raises(RuntimeError, match="verl must be of version 0.9, got 0.8.0"):
        verl.register()


# ---- OpenRLHF ------------------------------------------------------------------------------------------------------

MASK = BATCH.mask.double()
ROWS = BATCH.advantages[:, None].expand_as(BATCH.logp)
PLAIN, ENDED = dict(), dict(dp_size=2, batch_num_tokens=40.5, global_batch_size=9.5)
POLICY = {
    "ppo": ({}, BATCH.dense),
    "ppo, dual, sequence": (dict(dual_clip=1.5, token_level_loss=False), BATCH.dense),
    "gspo": (dict(policy_loss_type="gspo"), ROWS),
    "gspo, off policy": (dict(policy_loss_type="gspo", is_correction_level="token"), ROWS),
    **{
        f"{level}, {mode}, {gating}": (
            dict(
                is_correction_level=level,
                is_correction_mode=mode,
                is_correction_gating=gating,
                is_correction_threshold=(0.5, 2.0) if gating == "ratio" else (0.0, 0.1),
            ),
            BATCH.dense,
        )
        for level, mode, gating in (
            ("token", "mask", "ratio"),
            ("token", "clip", "ratio"),
            ("token", "mask", "binary_kl"),
            ("token", "mask", "tv"),
            ("seq", "mask", "ratio"),
            ("seq", "mask", "binary_kl"),
        )
    },
}


@pytest.mark.parametrize("counts", [PLAIN, ENDED], ids=["own counts", "global counts"])
@pytest.mark.parametrize("case", POLICY)
def test_policy_losses_are_openrlhfs(case, counts):
    options, advantages = POLICY[case]
    theirs = oracles.oracle(oracles.openrlhf_loss).PolicyLoss(**options)
    full = BATCH.mask.any(1)  # OpenRLHF's mean over no token is NaN
    inputs = [x[full] for x in (BATCH.old_logp, advantages, MASK, BATCH.ref_logp)]
    found = []
    for loss in (openrlhf.PolicyLoss(**options), theirs):
        logp = BATCH.logp[full].clone().requires_grad_()
        out = loss(logp, *inputs, **counts)
        found.append((*graded(out[0], logp), *out[1:]))
    ours, expected = found
    assert_close(ours[:2], expected[:2], rtol=1e-6, atol=1e-8)
    for one, other in zip(ours[2:], expected[2:], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_close(one.double(), other.double(), rtol=1e-6, atol=1e-8)


def test_advantages_that_differ_in_a_row_need_the_token_form():
    with pytest.raises(ValueError, match=r"advantages must be the same for all tokens of a row with 'gspo'"):
        openrlhf.PolicyLoss(policy_loss_type="gspo")(BATCH.logp, BATCH.old_logp, BATCH.dense, MASK)
    loss = openrlhf.PolicyLoss(policy_loss_type="gspo_token")(BATCH.logp, BATCH.old_logp, BATCH.dense, MASK)[0]
    options = dict(mask=BATCH.mask, low=0.2, high=0.2, count_empty=False)
    assert_close(loss, fk.policy_loss("gspo_token", BATCH.logp, BATCH.old_logp, BATCH.dense, **options).loss)


def test_wrong_options_are_refused():
    for options, message in (
        (dict(policy_loss_type="grpo"), "policy_loss_type must be"),
        (
            dict(is_correction_mode="clip", is_correction_level="seq"),
            "is_correction_mode must be 'mask' for a sequence",
        ),
        (dict(is_correction_level="token", is_correction_gating="tv"), "is_correction_threshold must start at 0"),
    ):
        with pytest.raises(ValueError, match=message):
            openrlhf.PolicyLoss(**options)


@pytest.mark.parametrize("counts", [PLAIN, ENDED], ids=["own counts", "global counts"])
@pytest.mark.parametrize("options", [{}, dict(clip_eps=0.2), dict(clip_eps=0.2, token_level_loss=False)], ids=str)
def test_value_losses_are_openrlhfs(options, counts):
    found = []
    for module in (openrlhf, oracles.oracle(oracles.openrlhf_loss)):
        values = BATCH.logp.clone().requires_grad_()
        found.append(
            graded(module.ValueLoss(**options)(values, BATCH.old_logp, BATCH.ref_logp, MASK, **counts), values)
        )
    assert_close(*found, rtol=1e-6, atol=1e-8)


def test_losses_of_pairs_are_openrlhfs():
    module = oracles.oracle(oracles.openrlhf_loss)
    sums = [x.sum(1) for x in (BATCH.logp, BATCH.dense, BATCH.old_logp, BATCH.ref_logp)]
    for options in (dict(beta=0.1), dict(beta=0.3, label_smoothing=0.1), dict(beta=0.5, ipo=True)):
        assert_close(openrlhf.DPOLoss(**options)(*sums), module.DPOLoss(**options)(*sums))
    chosen, rejected, margin = BATCH.logp[:, :1], BATCH.dense[:, :1], BATCH.token_weight[:, :1]
    assert_close(openrlhf.PairWiseLoss()(chosen, rejected), module.PairWiseLoss()(chosen, rejected))
    assert_close(openrlhf.PairWiseLoss()(chosen, rejected, margin), module.PairWiseLoss()(chosen, rejected, margin))
    assert_close(openrlhf.LogExpLoss()(chosen, rejected), module.LogExpLoss()(chosen, rejected))
    far = torch.tensor([[-800.0]]), torch.tensor([[800.0]])
    assert openrlhf.LogExpLoss()(*far) == 1600 and module.LogExpLoss()(*far).isinf()


def test_gae_is_openrlhfs():
    theirs = oracles.oracle(oracles.openrlhf_gae)
    given = BATCH.entropy, BATCH.dense, MASK, 0.97, 0.9
    for one, other in zip(openrlhf.get_advantages_and_returns(None, *given), theirs(*given), strict=True):
        assert_close(one[BATCH.mask], other[BATCH.mask])
        assert not one[~BATCH.mask].any()


def test_classes_go_where_trainers_look(monkeypatch):
    monkeypatch.setattr(_versions, "version", lambda name: "0.11.2")
    for path, names in openrlhf.SEAMS.items():
        for parent in (path.rsplit(".", i)[0] for i in range(path.count("."), -1, -1)):
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        for name in names:
            setattr(sys.modules[path], name, type(name, (), dict.fromkeys(openrlhf.METHODS)))
    openrlhf.install()
    for path, names in openrlhf.SEAMS.items():
        for name in names:
            if name == openrlhf.MAKER:
                made = getattr(sys.modules[path], name)
                assert made.get_advantages_and_returns is openrlhf.get_advantages_and_returns
            else:
                assert getattr(sys.modules[path], name) is getattr(openrlhf, name)
    del sys.modules["openrlhf.trainer.rm_trainer"].LogExpLoss
    with pytest.raises(RuntimeError, match="openrlhf.trainer.rm_trainer must have LogExpLoss, got none"):
        openrlhf.install("openrlhf.trainer.rm_trainer")
    monkeypatch.setattr(_versions, "version", lambda name: "0.12.0")
    with pytest.raises(RuntimeError, match="openrlhf must be of version 0.11, got 0.12.0"):
        openrlhf.install()


def test_seams_are_openrlhfs():
    """The names stand in the modules where `install` puts them."""
    try:
        root = oracles._package("openrlhf")
    except ImportError as error:
        pytest.skip(str(error))
    for path, names in openrlhf.SEAMS.items():
        file = root.joinpath(*path.split(".")[1:])
        source = (file.with_suffix(".py") if file.with_suffix(".py").exists() else file / "__init__.py").read_text()
        for name in (*names, *(openrlhf.METHODS if openrlhf.MAKER in names else ())):
            assert name in source, (path, name)

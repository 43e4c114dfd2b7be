"""FineGrainedDPOTrainer: TRL's own training where nothing is fine-grained, and another one where something is."""

import copy
import os
import subprocess
import sys
import warnings
from functools import partial

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import ranks
import torch

pytest.importorskip("trl", reason="TRL is not installed")

import transformers  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402
from trl_runs import BOUND, KINDS, ROWS, SHORT, STEPS, apart, model, run, tokenizer  # noqa: E402

import finealign_kernels as fk  # noqa: E402
from finealign_kernels.integrations import _trl_dpo  # noqa: E402
from finealign_kernels.integrations import trl as seam  # noqa: E402
from finealign_kernels.integrations.transformers import model_logprobs  # noqa: E402
from finealign_kernels.integrations.trl import FineGrainedDPOTrainer, patch_kernels  # noqa: E402
from finealign_kernels.ops import _warn  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def chat(row):
    said = [{"role": "user", "content": row["prompt"]}]
    return {"prompt": said} | {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}


def marked(row):
    """The rejected answer's second word is a fault."""
    start = row["rejected"].index(" ") + 1
    stop = (row["rejected"] + " ").index(" ", start)
    return row | {"chosen_spans": [], "rejected_spans": [{"start": start, "end": stop, "kind": "factual"}]}


def weighed(row, weight):
    """Every token of both answers and its end weighs that much."""
    return row | {f"{side}_token_weight": [weight] * (len(row[side]) + 1) for side in ("chosen", "rejected")}


def trained(cls, folder, *, rows=ROWS, kind="Llama", config=None, ref=True, tokens=None, **options):
    policy, reference = options.pop("model", None) or model(kind), model(kind) if ref else None
    arguments = partial(DPOConfig, **(SHORT | (config or {})))
    return run(cls, arguments, folder, rows, tokens=tokens, model=policy, ref_model=reference, **options)


# ---- equality with TRL's own loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_without_feedback_it_is_trls_training(kind, folder):
    stock = trained(DPOTrainer, folder, kind=kind)[1]
    with patch_kernels():
        ours = trained(FineGrainedDPOTrainer, folder, kind=kind)[1]
    assert apart(ours, stock) <= BOUND
    for one, other in zip(ours, stock, strict=True):
        figures = {key: value for key, value in other.items() if "time" not in key}
        assert one["tokens/kept"] == 1
        assert {key: one[key] for key in figures} == pytest.approx(figures, rel=1e-4, abs=1e-5)
    if kind != "Mixtral":  # its loss holds the experts' balance, too
        assert ours[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)


LOSSES = {
    "sigmoid_norm": {},
    "hinge": {},
    "ipo": {},
    "robust": dict(label_smoothing=0.1),
    "exo_pair": dict(label_smoothing=1e-3),
    "nca_pair": {},
    "bco_pair": {},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "aot": {},
    "aot_unpaired": {},
    "sigmoid": dict(f_divergence_type="js_divergence", ld_alpha=0.5, use_weighting=True, beta=0.3),
}


@pytest.mark.parametrize("loss", ["ipo", "robust", "sigmoid"])
def test_loss_types_of_trl(loss, folder):
    config = dict(max_steps=2, loss_type=[loss], gradient_accumulation_steps=2, per_device_train_batch_size=2)
    stock = trained(DPOTrainer, folder, config=config | LOSSES[loss])[1]
    ours = trained(FineGrainedDPOTrainer, folder, config=config | LOSSES[loss])[1]
    assert apart(ours, stock) <= BOUND


GIVEN = ("beta", "label_smoothing", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "use_weighting")


def test_every_loss_of_trl_and_its_gradient(folder):
    """Of a policy that is far from the reference, with one batch."""
    plain = dict(output_dir=str(folder), use_cpu=True, bf16=False)
    every = {loss: DPOConfig(**plain, loss_type=[loss], **more) for loss, more in LOSSES.items()}
    trainers = [trained(cls, folder, config=dict(max_steps=1))[0] for cls in (DPOTrainer, FineGrainedDPOTrainer)]
    policy = model(seed=1)
    outputs = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
    trl.trainer.utils.add_fused_lm_head(policy, outputs=outputs)
    batch = trainers[0].data_collator([trainers[0].train_dataset[i] for i in range(6)])
    for loss, args in every.items():
        found = []
        for trainer in trainers:
            for name in GIVEN:
                setattr(trainer, name, getattr(args, name))
            trainer.loss_types, trainer.args.discopop_tau = [loss], args.discopop_tau
            trainer._loss, trainer._loss_options = _trl_dpo._loss_of(args, None, None, None)
            policy.zero_grad()
            value = trainer.compute_loss(policy, dict(batch))
            value.backward()
            found.append((value.item(), torch.cat([p.grad.flatten() for p in policy.parameters()])))
        (one, done), (other, dother) = found
        assert abs(one - other) <= BOUND * abs(other) and (done - dother).norm() <= BOUND * dother.norm() > 0, loss


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_messages_and_truncation(mode, folder):
    config = dict(max_length=48, truncation_mode=mode)
    rows = [chat(row) for row in ROWS]
    stock = trained(DPOTrainer, folder, rows=rows, config=config)[1]
    spans = [row | {"chosen_spans": [], "rejected_spans": [{"start": 0, "end": 3}]} for row in rows]
    ours = trained(FineGrainedDPOTrainer, folder, rows=spans, config=config, span_weight=1.0)[1]
    assert apart(ours, stock) <= BOUND


def one_label_shifted(right):
    """TRL's function, where the last label of a batch is its neighbour's."""

    def shifted(hidden, weight, bias, labels, *rest):
        last, labels = labels.nonzero()[-1], labels.clone()  # 0: a position without a label
        labels[last] = labels[last - 1]
        return right(hidden, weight, bias, labels, *rest)

    return shifted


@pytest.mark.parametrize("plant", ["label", "weight"])
def test_a_planted_fault_is_seen(plant, folder, monkeypatch):
    """One label of a batch is its neighbour's; or one weight is 1.1."""
    stock = trained(DPOTrainer, folder)[1]
    loss = FineGrainedDPOTrainer.compute_loss

    def weighted(self, model, inputs, *rest, **more):
        weight = torch.ones_like(inputs["input_ids"], dtype=torch.float32)
        weight[0, int(inputs["completion_mask"][0].argmax())] = 1.1
        return loss(self, model, {**inputs, "token_weight": weight}, *rest, **more)

    with patch_kernels() as patched:
        if plant == "label":
            monkeypatch.setattr(patched, "apply", one_label_shifted(patched.apply))
        else:
            monkeypatch.setattr(FineGrainedDPOTrainer, "compute_loss", weighted)
        assert apart(trained(FineGrainedDPOTrainer, folder)[1], stock) > 10 * BOUND


@pytest.mark.slow  # a minute alone
@pytest.mark.parametrize("plant", [False, True], ids=["right", "one label shifted"])
def test_two_hundred_steps_drift_less_than_eagers_bfloat16(plant, folder, monkeypatch):
    """S5 of a whole training: what is the same to 1e-5 in five steps does not drift in two hundred.

    Parameters no further from TRL's own float32 training than TRL's own bfloat16 training is, and residuals of the loss
    to float64 log-probs that point no way. A batch with one wrong label of some forty drifts further.
    """
    config, residuals = dict(max_steps=200, per_device_train_batch_size=2), []

    class Watched(FineGrainedDPOTrainer):
        """Each loss less that of float64 log-probs of the same hidden states."""

        def compute_loss(self, model, inputs, *rest, **more):
            with torch.no_grad(), patch_kernels(backend="reference") as exact:
                wide = exact.apply
                exact.apply = lambda hidden, *given: wide(hidden.double(), *given)
                truth = super().compute_loss(model, dict(inputs), *rest, **more)
            loss = super().compute_loss(model, inputs, *rest, **more)
            residuals.append(loss.item() - truth.item())
            return loss

    def run(cls, **more):
        trainer, told = trained(cls, folder, config=config | more)
        flat = torch.cat([p.detach().float().flatten() for p in trainer.model.parameters()])
        return flat, torch.tensor([log["loss"] for log in told], dtype=torch.float64)

    (base, losses), (half, _) = run(DPOTrainer), run(DPOTrainer, bf16=True)
    with patch_kernels() as patched:
        if plant:
            monkeypatch.setattr(patched, "apply", one_label_shifted(patched.apply))
        ours, _ = run(Watched)
    assert losses[-20:].mean() < 0.5 * losses[:20].mean(), "nothing was learnt"
    drift, bound = (ours - base).norm().item(), (half - base).norm().item()
    residual = torch.tensor(residuals, dtype=torch.float64)
    error, rounding = residual.std() / len(residual) ** 0.5, torch.finfo(torch.float32).eps / 2 * losses.mean()
    print(f"drift {drift:.2e}, of bfloat16 {bound:.2e}; residual {residual.mean():.1e} +- {error:.1e}")
    fits = drift <= bound and residual.mean().abs() <= 2 * error + rounding
    assert fits != plant


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_weights_on_spans_lower_what_they_mark_further(seed, folder):
    """Mean log-prob of the marked tokens of rejected answers after the same steps, against weight 1, TRL's loss."""
    rows, found = [marked(row) for row in ROWS], {}
    policy = model(seed=seed)
    encode = partial(fk.feedback.encode, tokenizer())
    for weight in (1.0, 4.0):
        options = dict(rows=rows, average="kept", span_weight=weight, model=copy.deepcopy(policy))
        trainer, _ = trained(FineGrainedDPOTrainer, folder, config=dict(max_steps=10, learning_rate=1e-3), **options)
        logps = []
        for row in rows:
            encoded = encode(row["prompt"], row["rejected"])
            with torch.no_grad():
                (logp, *_), _ = model_logprobs(trainer.model, torch.tensor([encoded.input_ids]))
            ((first, stop),) = fk.feedback.token_spans(encoded.offsets, row["rejected"], row["rejected_spans"])
            logps.append(logp[0, encoded.response_start - 1 :][first:stop].mean())
        found[weight] = torch.stack(logps).mean().item()
    assert found[4.0] < found[1.0] - 0.05


# ---- references ----------------------------------------------------------------------------------------------------


def test_a_precomputed_reference_is_the_models(folder):
    rows = [marked(row) for row in ROWS]
    options = dict(rows=rows, average="kept", span_weight=3.0)
    with_model = trained(FineGrainedDPOTrainer, folder, **options)[1]
    for mode in ("keep_start", "keep_end"):
        config = dict(precompute_ref_log_probs=True, max_length=200, truncation_mode=mode)
        trainer, before = trained(FineGrainedDPOTrainer, folder, ref=False, config=config, **options)
        assert trainer.ref_model is None and apart(before, with_model) <= BOUND
    columns = [dict(row) for row in trainer.train_dataset]
    assert all(len(row["ref_chosen_token_logps"]) == len(row["chosen_ids"]) for row in columns)
    given = [
        row | {key: saved[key] for key in saved if key.startswith("ref_")}
        for row, saved in zip(rows, columns, strict=True)
    ]
    trainer, again = trained(FineGrainedDPOTrainer, folder, ref=False, **(options | {"rows": given}))
    assert trainer.ref_model is None and apart(again, with_model) <= BOUND


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_a_precomputed_reference_of_truncated_completions(mode, folder):
    rows = [chat(row) for row in ROWS]
    config = dict(max_length=40 if mode == "keep_start" else 16, truncation_mode=mode)  # both cut into completions
    with_model = trained(FineGrainedDPOTrainer, folder, rows=rows, config=config)[1]
    config["precompute_ref_log_probs"] = True
    assert apart(trained(FineGrainedDPOTrainer, folder, rows=rows, config=config, ref=False)[1], with_model) <= BOUND


def test_a_loss_without_reference_needs_none(folder):
    for loss in ("simpo", "orpo"):
        trainer, told = trained(FineGrainedDPOTrainer, folder, rows=[marked(row) for row in ROWS], ref=False, loss=loss)
        assert trainer.ref_model is None and all(log["grad_norm"] > 0 for log in told)
        trainer.evaluate(Dataset.from_list(ROWS))


def test_lora_takes_the_model_without_its_adapter(folder):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM")
    stock = trained(DPOTrainer, folder, ref=False, peft_config=config)[1]
    ours = trained(FineGrainedDPOTrainer, folder, ref=False, peft_config=config)[1]
    assert apart(ours, stock) <= BOUND
    weighted = trained(FineGrainedDPOTrainer, folder, ref=False, peft_config=config, rows=[marked(r) for r in ROWS])[1]
    assert weighted[0]["loss"] == pytest.approx(0.6931472, abs=1e-6) and apart(weighted, stock) > 10 * BOUND


def test_a_dataset_to_evaluate_brings_its_reference_too(folder):
    made = [ready(row, lambda side, ids: [1.0] * len(ids)) for row in ROWS]
    logps = {"ref_chosen_token_logps": "chosen_ids", "ref_rejected_token_logps": "rejected_ids"}
    given = [row | {key: [-5.0] * len(row[ids]) for key, ids in logps.items()} for row in made]
    trainer, _ = trained(FineGrainedDPOTrainer, folder, rows=given, ref=False, config=dict(max_steps=1))
    assert "eval_loss" in trainer.evaluate(Dataset.from_list(given))
    with pytest.raises(
        ValueError, match="the dataset must have ref_chosen_token_logps and .* a reference model be kept"
    ):
        trainer.evaluate(Dataset.from_list(made))
    with pytest.raises(ValueError, match="the eval dataset must have ref_chosen_token_logps and ref_rejected_token_l"):
        trained(FineGrainedDPOTrainer, folder, rows=given, ref=False, eval_dataset=Dataset.from_list(made))


def of_two_ranks(group, folder):
    config = dict(max_steps=3, per_device_train_batch_size=2)
    found = {}
    for cls in (DPOTrainer, FineGrainedDPOTrainer):
        found[cls.__name__] = trained(cls, folder, config=config)[1]
    options = dict(rows=[marked(row) for row in ROWS[:11]], span_weight=3.0)  # an odd number: one comes twice
    found["model"] = trained(FineGrainedDPOTrainer, folder, config=config, **options)[1]
    config["precompute_ref_log_probs"] = True
    trainer, found["columns"] = trained(FineGrainedDPOTrainer, folder, ref=False, config=config, **options)
    return found, [dict(row) for row in trainer.train_dataset]


def test_two_ranks_train_as_trls_do(folder):
    (found, rows), _ = ranks.fresh(2, of_two_ranks, str(folder))
    assert apart(found["FineGrainedDPOTrainer"], found["DPOTrainer"]) <= BOUND
    assert apart(found["columns"], found["model"]) <= BOUND
    for one, other in zip(found["FineGrainedDPOTrainer"], found["DPOTrainer"], strict=True):
        for key in ("rewards/margins", "logps/rejected", "num_tokens", "entropy"):
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5)
    options = dict(rows=[marked(row) for row in ROWS[:11]], config=dict(precompute_ref_log_probs=True, max_steps=1))
    alone = trained(FineGrainedDPOTrainer, folder, ref=False, **options)[0].train_dataset
    for row, other in zip(rows, alone, strict=True):
        assert row["ref_rejected_token_logps"] == pytest.approx(other["ref_rejected_token_logps"], abs=1e-5)


# ---- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["text", "messages", "special tokens"])
def test_weights_stand_on_the_marked_characters(form, folder):
    rows = [marked(row) for row in ROWS]
    tokens = tokenizer(form == "special tokens")
    if form == "messages":
        rows = [row | chat({**row, "rejected": f"\n {row['rejected']} "}) for row in rows]
        for row in rows:  # the template takes the white space around the text away
            row["rejected_spans"] = [{"start": s["start"] + 2, "end": s["end"] + 2} for s in row["rejected_spans"]]
    trainer, _ = trained(
        FineGrainedDPOTrainer, folder, rows=rows, tokens=tokens, config=dict(max_steps=1), span_weight=3.0
    )
    sides = zip(trainer.train_dataset, ROWS, strict=True)
    for row, source in sides:
        span = marked(source)["rejected_spans"][0]
        heavy = [i for i, w in zip(row["rejected_ids"], row["rejected_token_weight"], strict=True) if w == 3.0]
        assert tokens.decode(heavy) == source["rejected"][span["start"] : span["end"]]
        assert set(row["rejected_token_weight"]) == {1.0, 3.0} and set(row["chosen_token_weight"]) == {1.0}


def test_the_loss_is_the_one_of_the_library(folder):
    """One step by hand: average, divergence, NLL and weights of pairs reach preference_loss."""
    rows = [marked(row) | {"pair_weight": 0.5 + i / 12} for i, row in enumerate(ROWS[:4])]
    options = dict(nll_weight=0.3, beta=0.2)
    trainer, _ = trained(
        FineGrainedDPOTrainer,
        folder,
        rows=rows,
        loss="slic",
        average="kept",
        loss_options=options,
        config=dict(max_steps=1),
    )
    policy, ref = model(seed=1), model()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trl.trainer.utils.add_fused_lm_head(policy, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    found = trainer.compute_loss(policy, batch)
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:].bool()

    def logp(m):
        logits = m(ids, attention_mask=batch["attention_mask"]).logits[:, :-1]
        return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]

    expected = fk.slic(
        logp(policy),
        logp(ref),
        mask=mask,
        token_weight=batch["token_weight"][:, 1:],
        average="kept",
        pair_weight=torch.tensor([row["pair_weight"] for row in rows]),
        **options,
    ).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def ready(row, weights):
    """Tokens and weights of a row, made beforehand."""
    ids = {f"{side}_ids": tokenizer()(row[side]).input_ids + [1] for side in ("chosen", "rejected")}
    made = {"prompt_ids": tokenizer()(row["prompt"]).input_ids, **ids}
    return made | {f"{side}_token_weight": weights(side, made[f"{side}_ids"]) for side in ("chosen", "rejected")}


def test_ready_weights_and_tokens_are_the_spans(folder):
    by_spans = trained(FineGrainedDPOTrainer, folder, rows=[marked(row) for row in ROWS], span_weight=3.0)[1]
    rows = []
    for row in ROWS:
        span = marked(row)["rejected_spans"][0]
        heavy = range(span["start"], span["end"])  # a token a character
        rows.append(
            ready(row, lambda s, ids, h=heavy: [3.0 if s == "rejected" and t in h else 1.0 for t in range(len(ids))])
        )
    assert apart(trained(FineGrainedDPOTrainer, folder, rows=rows)[1], by_spans) <= BOUND
    texts = [row | {k: v for k, v in made.items() if "weight" in k} for row, made in zip(ROWS, rows, strict=True)]
    assert apart(trained(FineGrainedDPOTrainer, folder, rows=texts)[1], by_spans) <= BOUND
    stream = Dataset.from_list(texts).to_iterable_dataset()
    trained(FineGrainedDPOTrainer, folder, rows=stream)


def fault_logp(trained_model, rows):
    """Mean log-prob of the marked tokens, and of the other tokens of the rejected answers."""
    inside, outside = [], []
    for row in rows:
        prompt, answer = tokenizer()(row["prompt"]).input_ids, tokenizer()(row["rejected"]).input_ids
        ids = torch.tensor([prompt + answer])
        logp = trained_model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
        span = row["rejected_spans"][0]
        is_fault = torch.zeros(len(answer), dtype=torch.bool)
        is_fault[span["start"] : span["end"]] = True
        inside.append(logp[is_fault])
        outside.append(logp[~is_fault])
    return torch.cat(inside).mean().item(), torch.cat(outside).mean().item()


@pytest.mark.parametrize("seed", range(4))
def test_weights_lower_the_marked_tokens_more(seed, folder):
    rows, found = [marked(row) for row in ROWS], {}
    for weight in (1.0, 4.0):
        config = dict(max_steps=8, learning_rate=1e-3, seed=seed)
        start = model(seed=seed)
        trainer, _ = trained(FineGrainedDPOTrainer, folder, rows=rows, model=start, config=config, span_weight=weight)
        with torch.no_grad():
            found[weight] = fault_logp(trainer.model, rows)
    assert found[4.0][0] < found[1.0][0] - 0.05  # nats


def test_weights_of_zero_take_tokens_out(folder):
    """The answers' first tokens alone differ; with weight 0 there the loss stays at log 2 and trains nothing."""
    rows = [
        ready({"prompt": "a ", "chosen": "x" + ROWS[i]["chosen"], "rejected": "y" + ROWS[i]["chosen"]}, weights)
        for i, weights in enumerate([lambda side, ids: [1.0] + [0.0] * (len(ids) - 1)] * 12)
    ]
    told = trained(FineGrainedDPOTrainer, folder, rows=rows)[1]
    share = sum(2 for _ in rows) / sum(len(row["chosen_ids"]) * 2 for row in rows)
    assert told[0]["tokens/kept"] == pytest.approx(share, rel=0.2) and told[-1]["loss"] < 0.69
    none = [row | {k: [0.0] * len(v) for k, v in row.items() if "weight" in k} for row in rows]
    with pytest.warns(UserWarning, match="no completion token has kept a weight: nothing is trained"):
        told = trained(FineGrainedDPOTrainer, folder, rows=none)[1]
    assert all(log["tokens/kept"] == 0 and log["grad_norm"] == 0 for log in told)


# ---- pivots --------------------------------------------------------------------------------------------------------


def test_pivots_by_scores_of_the_data(folder):
    """Scores that agree with their side on every other token keep just these."""

    def scores(side, ids):
        right = 1.0 if side == "chosen" else -1.0
        return [right if t % 2 == 0 else -right for t in range(len(ids))]

    rows = [{k.replace("weight", "score"): v for k, v in ready(row, scores).items()} for row in ROWS]
    told = trained(FineGrainedDPOTrainer, folder, rows=rows, pivots={})[1]
    weights = [ready(row, lambda side, ids: [1.0 - t % 2 for t in range(len(ids))]) for row in ROWS]
    expected = trained(FineGrainedDPOTrainer, folder, rows=weights)[1]
    assert apart(told, expected) <= BOUND and 0.4 < told[0]["tokens/kept"] < 0.6


def test_implicit_pivots_start_when_the_policy_has_moved(folder):
    config = dict(max_steps=6)
    _, told = trained(FineGrainedDPOTrainer, folder, pivots=dict(baseline="row"), config=config)
    assert [log["tokens/kept"] for log in told[:3]] == [1, 1, 1] and {log["pivots/from_step"] for log in told} == {4}
    assert all(0 < log["tokens/kept"] < 1 for log in told[3:]) and all(log["grad_norm"] > 0 for log in told)
    _, segments = trained(
        FineGrainedDPOTrainer, folder, pivots=dict(kind="salience", percent=20.0, baseline=0.0), config=config
    )
    assert 0 < segments[-1]["tokens/kept"] < 1
    with pytest.warns(UserWarning, match="no completion token has kept a weight"):
        trained(FineGrainedDPOTrainer, folder, pivots={}, pivot_start=0.0, config=config)


def test_pivots_by_a_function(folder):
    seen = []

    def first_half(logp, ref_logp, mask):
        seen.append(ref_logp.shape)
        place = mask.cumsum(1)
        return (place <= place[:, -1:] / 2).float()

    _, told = trained(FineGrainedDPOTrainer, folder, pivots=first_half)
    assert len(seen) == STEPS and 0.3 < told[0]["tokens/kept"] < 0.6


# ---- evaluation, refusals ------------------------------------------------------------------------------------------


def test_evaluation_logs_the_same_figures(folder):
    rows = [marked(row) for row in ROWS]
    trainer, _ = trained(FineGrainedDPOTrainer, folder, rows=rows, eval_dataset=Dataset.from_list(rows))
    told = trainer.evaluate()
    assert {"eval_loss", "eval_rewards/margins", "eval_tokens/kept", "eval_logps/rejected"} <= told.keys()
    assert told["eval_loss"] < 0.6931


@pytest.mark.parametrize(
    "rows, options, message",
    [
        (ROWS, dict(loss="dpoo"), r"loss must be a Row or one of \('dpo',.*got 'dpoo'"),
        (ROWS, dict(loss="ipo", config=dict(loss_type=["hinge"])), r"args\.loss_type must be left at its default"),
        (ROWS, dict(config=dict(loss_type=["sigmoid", "sft"])), r"args\.loss_type must name one loss \(loss_options="),
        (ROWS, dict(pivots=3), r"pivots must be a mapping of arguments, a function or None, got int"),
        (ROWS, dict(pivots={}, loss="simpo", ref=False), r"pivots must be a function for 'simpo', which has no ref"),
        (ROWS, dict(pivot_start=2), r"pivot_start must be a finite number >= 0 and <= 1, got"),
        (
            [marked(row) | {"chosen_token_weight": [1.0]} for row in ROWS],
            {},
            r"the train dataset must have spans or token weights, not both",
        ),
        (
            [row | {"chosen_token_weight": [1.0]} for row in ROWS],
            {},
            r"the train dataset must have both columns chosen_token_weight and rejected_token_weight",
        ),
        (
            [row | {f"{side}_token_weight": [1.0] for side in ("chosen", "rejected")} for row in ROWS],
            {},
            r"chosen_token_weight must hold one number a token of chosen, \d+, got 1",
        ),
        (
            [row | {f"ref_{side}_token_logps": [1.0] for side in ("chosen", "rejected")} for row in ROWS],
            {},
            r"ref_model must be None where the dataset has ref_chosen_token_logps and ref_rejected_token_logps",
        ),
        (
            [row | {"chosen_spans": [{"start": 0, "end": 99}], "rejected_spans": []} for row in ROWS],
            {},
            r"spans\[0\]\.end must be at most \d+, the length of the text, got 99",
        ),
        (
            [
                {side: f"p {row[side]}" for side in ("chosen", "rejected")} | {"chosen_spans": [], "rejected_spans": []}
                for row in ROWS
            ],
            {},
            r"the train dataset must have a column prompt, beside spans",
        ),
        (
            [marked(ROWS[0]) | {"rejected_spans": [{"start": 0, "end": 500}]}],
            {},
            r"rejected_spans, in the row of prompt 'bee can ': spans\[0\]\.end must be at most 12",
        ),
        ([weighed(ROWS[0], 1.0) | {"chosen_token_weight": None}], {}, "chosen_token_weight must hold one number"),
        ([weighed(ROWS[0], float("nan"))], {}, "chosen_token_weight must hold finite numbers, got nan"),
        ([row | {"pair_weight": float("inf")} for row in ROWS], {}, "pair_weight must hold finite numbers, got inf"),
        ([row | {"pair_weight": None} for row in ROWS], {}, "pair_weight must hold finite numbers, got None"),
        (ROWS, dict(config=dict(max_length=3)), "the train dataset must hold a row .* got none"),
        (ROWS, dict(by_kind=["factual"]), "by_kind must be a mapping from kinds to weights, or None, got list"),
        (ROWS, dict(average="segments"), "average must be False, 'kept' or 'all': the trainer knows no segments"),
        (ROWS, dict(loss_options={"mask": 1}), "loss_options must leave out what the trainer gives .* 'mask'"),
        (ROWS, dict(loss_options={"nll_wieght": 1.0}), r"loss_options must .* \(did you mean 'nll_weight'"),
        (ROWS, dict(loss_options={"tau": 1.0}), "loss_options must name arguments of preference_loss, of .* got 'tau'"),
        (ROWS, dict(pivots={"kin": "sign"}), r"pivots: adaptive_mask\(\) got an unexpected keyword argument 'kin'"),
        (ROWS, dict(pivots={"kind": "sine"}), r"pivots: kind must be one of"),
        (ROWS, dict(pivots={"threshold": 1.0}), r"pivots: kind must be one of .*, got None"),
        (ROWS, dict(pivots={"side": 1}), "pivots must leave out what the trainer gives adaptive_mask, got 'side'"),
        (
            ROWS,
            dict(config=dict(f_divergence_type="js_divergence", loss_type=["sigmoid_norm"])),
            r"args\.f_divergence_type must be 'reverse_kl' with an average",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(rows, options, message, folder):
    with pytest.raises((ValueError, TypeError), match=message):
        trained(FineGrainedDPOTrainer, folder, rows=rows, **options)


@pytest.mark.parametrize(
    "rows, options, message",
    [
        ([row | {"chosen_span": []} for row in ROWS], {}, "'chosen_span' .* is not read; did you mean 'chosen_spans'"),
        (
            [row | {"spans": []} for row in ROWS],
            {},
            "'spans' of the train dataset is not read; the columns that are read",
        ),
        ([row | {"rejected_token_weights": [1.0]} for row in ROWS], {}, "did you mean 'rejected_token_weight'"),
        (
            [marked(row) for row in ROWS],
            dict(config=dict(max_length=12)),
            "rejected_token_weight: max_length = 12 cuts off every token of a row whose number is not 1",
        ),
        (
            [marked(row) for row in ROWS],
            dict(by_kind={"Fault": 3.0}),
            "by_kind has 'Fault', which is the kind of no span of the train dataset; the kinds there are ",
        ),
        (
            ROWS,
            dict(pivots={"baseline": 0.0}, pivot_start=1.0),
            "pivots are used from step 2 on, and the training has 1",
        ),
    ],
    ids=["span", "spans", "weights", "cut", "kind", "pivots"],
)
def test_feedback_that_is_lost_is_warned_of(rows, options, message, folder, monkeypatch):
    monkeypatch.setattr(_warn, "_given", set())
    config = dict(max_steps=1) | options.pop("config", {})
    with pytest.warns(UserWarning, match=message):
        trained(FineGrainedDPOTrainer, folder, rows=rows, config=config, **options)


def test_feedback_that_is_used_is_not_warned_of(folder, monkeypatch):
    """Also where a completion is cut behind its marked tokens, and of TRL's own columns."""
    monkeypatch.setattr(_warn, "_given", set())
    rows = [marked(row) | {"pair_weight": 1.0} for row in ROWS]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(FineGrainedDPOTrainer, folder, rows=rows, config=dict(max_steps=1, max_length=20))
    said = [str(one.message) for one in caught]
    assert not [one for one in said if "is not read" in one or "cuts off" in one or "pivots are" in one], said


def test_a_template_that_changes_the_text_is_refused(folder):
    tokens = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer().backend_tokenizer, eos_token="<eos>", pad_token="<pad>",
        chat_template="{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
    )  # fmt: skip
    rows = [chat(row) | {"chosen_spans": [], "rejected_spans": [{"start": 0, "end": 1}]} for row in ROWS]
    with pytest.raises(ValueError, match="the chat template must keep the text of the completion"):
        trained(FineGrainedDPOTrainer, folder, rows=rows, tokens=tokens)


def test_an_unknown_version_is_refused(monkeypatch):
    monkeypatch.setattr("finealign_kernels.integrations._versions.version", lambda package: "1.17.0")
    with pytest.raises(RuntimeError, match=r"trl must be of version 1\.16, got 1\.17\.0"):
        seam.FineGrainedDPOTrainer  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'FineGrainedTrainer'"):
        seam.FineGrainedTrainer  # noqa: B018


LAZY = """
import sys
import finealign_kernels.integrations.trl as seam
assert not {"trl", "transformers", "datasets"} & set(sys.modules)
sys.modules["trl"] = None  # importing it fails
try:
    seam.FineGrainedDPOTrainer
except ImportError as error:
    print(error)
"""


def test_without_trl_the_trainer_says_so():
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "FineGrainedDPOTrainer needs TRL" in done.stdout and "pip install 'finealign-kernels[trl]'" in done.stdout

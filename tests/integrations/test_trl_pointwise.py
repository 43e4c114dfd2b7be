"""PointwiseTrainer: TRL's KTO where nothing else is asked for, and losses of single responses that TRL has not."""

import os
from functools import partial

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

from test_trl_dpo import fault_logp  # noqa: E402
from trl import KTOConfig, KTOTrainer  # noqa: E402
from trl_runs import BOUND, ROWS, SHORT, apart, model, run, tokenizer  # noqa: E402

from finealign_kernels.integrations.trl import PointwiseTrainer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


SINGLE = [
    {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": i % 3 > 0}
    for i, row in enumerate(ROWS)
]


def trained(cls, folder, *, rows=SINGLE, kind="Llama", config=None, ref=True, **options):
    policy, reference = options.pop("model", None) or model(kind), model(kind) if ref else None
    arguments = partial(KTOConfig, **(SHORT | dict(train_sampling_strategy="sequential") | (config or {})))
    return run(cls, arguments, folder, rows, model=policy, ref_model=reference, **options)


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Mixtral"])
@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_without_more_it_is_trls_training(loss, kind, folder):
    config = dict(loss_type=loss, desirable_weight=1.5, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    stock = trained(KTOTrainer, folder, kind=kind, config=config)[1]
    ours = trained(PointwiseTrainer, folder, kind=kind, config=config)[1]
    assert apart(ours, stock) <= BOUND
    left_out = ("time", "margins", *(() if loss == "kto" else ("kl",)))  # a margin is that of the means beside it
    for one, other in zip(ours, stock, strict=True):
        figures = {key: value for key, value in other.items() if not any(x in key for x in left_out)}
        assert {key: one[key] for key in figures} == pytest.approx(figures, rel=1e-4, abs=1e-5)


def test_the_first_loss_of_pointwise_dpo_is_log_2(folder):
    for label in (bool, float):
        rows = [row | {"label": label(row["label"])} for row in SINGLE]
        told = trained(PointwiseTrainer, folder, rows=rows, loss="pdpo")[1]
        assert told[0]["loss"] == pytest.approx(0.6931472, abs=1e-6) and told[-1]["loss"] < told[0]["loss"]
    soft = [row | {"label": 0.25 + i / 24} for i, row in enumerate(SINGLE)]
    told = trained(PointwiseTrainer, folder, rows=soft, loss="pdpo_soft")[1]
    assert told[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "class_mean"])
def test_ulma_is_one_update_however_it_is_accumulated(reduction, folder):
    """Demonstrations and judged responses in one set; the classes are spread unevenly over the batches."""
    rows = [row | {"label": float(i in (0, 3, 4))} for i, row in enumerate(SINGLE[:8])]
    found = []
    for batch, accumulated in ((8, 1), (4, 2), (2, 4)):
        sizes = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated)
        options = dict(loss="ulma", average="kept", reduction=reduction)
        config = dict(max_steps=2, max_grad_norm=0.0, **sizes)
        found.append(trained(PointwiseTrainer, folder, rows=rows, config=config, **options)[1])
    for other in found[1:]:
        assert apart(other, found[0]) <= BOUND


def test_columns_of_the_reference_are_its_model(folder):
    with_model = trained(PointwiseTrainer, folder, loss="ulma", average="kept")[1]
    config = dict(precompute_ref_log_probs=True)
    before = trained(PointwiseTrainer, folder, loss="ulma", average="kept", config=config, ref=False)[1]
    assert apart(before, with_model) <= BOUND


def spanned(row, label):
    start = row["rejected"].index(" ") + 1
    stop = (row["rejected"] + " ").index(" ", start)
    return {
        "prompt": row["prompt"],
        "completion": row["rejected"],
        "label": label,
        "completion_spans": [{"start": start, "end": stop}],
    }


def test_a_fault_weighs_more_where_the_response_is_lowered(folder):
    rows = [spanned(row, i % 2 == 0) for i, row in enumerate(ROWS)]
    trainer, _ = trained(PointwiseTrainer, folder, rows=rows, loss="pdpo", span_weight=4.0, config=dict(max_steps=1))
    for row, source in zip(trainer.train_dataset, rows, strict=True):
        span, weight = source["completion_spans"][0], 0.25 if source["label"] else 4.0
        heavy = [i for i, w in zip(row["completion_ids"], row["completion_token_weight"], strict=True) if w == weight]
        assert tokenizer().decode(heavy) == source["completion"][span["start"] : span["end"]]
    found = {}
    bad = [spanned(row, False) for row in ROWS]
    for weight in (1.0, 4.0):
        config = dict(max_steps=8, learning_rate=1e-3)
        trainer, _ = trained(PointwiseTrainer, folder, rows=bad, loss="pdpo", span_weight=weight, config=config)
        marked = [row | {"rejected_spans": one["completion_spans"]} for row, one in zip(ROWS, bad, strict=True)]
        with torch.no_grad():
            found[weight] = fault_logp(trainer.model, marked)[0]
    assert found[4.0] < found[1.0] - 0.05  # nats


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(loss="dpo"), r"loss must be a Row or one of \('kto',.*got 'dpo'"),
        (dict(loss="ulma", reduction="sum"), r"reduction must be .*'mean'.*'class_mean'.*got 'sum'"),
        (
            dict(loss="kto", config=dict(precompute_ref_log_probs=True), ref=False),
            r"the reference must be a model or an adapter for 'kto'",
        ),
        (dict(loss="ulma", config=dict(loss_type="apo_zero_unpaired")), r"args\.loss_type must be left at its default"),
        (
            dict(loss="ulma", rows=[{k: v for k, v in row.items() if k != "label"} for row in SINGLE]),
            "the train dataset must have the columns prompt, completion, label, got prompt, completion",
        ),
        (
            dict(loss="ulma", rows=[{k: v for k, v in row.items() if k != "prompt"} for row in SINGLE]),
            "the train dataset must have the columns prompt, completion, label, got completion, label",
        ),
        (dict(loss="ulma", rows=[row | {"label": None} for row in SINGLE]), "label must hold finite numbers, got None"),
        (
            dict(loss="ulma", rows=[row | {"label": [1.0, float("nan")][i > 3]} for i, row in enumerate(SINGLE)]),
            "label must hold finite numbers, got nan",
        ),
        (
            dict(loss="ulma", loss_options={"other_wieght": 1}),
            "loss_options must name .* got 'other_w",
        ),
        (dict(loss="ulma", loss_options={"target": 1}), "loss_options must leave out what the trainer gives the loss"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message, folder):
    with pytest.raises((ValueError, TypeError), match=message):
        trained(PointwiseTrainer, folder, **options)

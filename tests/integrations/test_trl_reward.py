"""FineGrainedRewardTrainer: TRL's own training where nothing else is asked for, and every loss of a reward model."""

import os
from functools import partial

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from torch.testing import assert_close  # noqa: E402
from trl import RewardConfig, RewardTrainer  # noqa: E402
from trl_runs import BOUND, SHORT, run  # noqa: E402

import finealign_kernels as fk  # noqa: E402
from finealign_kernels.integrations.trl import FineGrainedRewardTrainer  # noqa: E402


def ids(seed, length):
    return torch.randint(2, 60, (length,), generator=torch.Generator().manual_seed(seed)).tolist() + [1]


ROWS = [
    {
        "chosen_ids": ids(i, 4 + i % 3),
        "rejected_ids": ids(100 + i, 3 + i % 4),
        "strength": 0.5 - 0.15 * i,
        "soft_label": 0.9 - 0.1 * i,
    }
    for i in range(8)
]


pytestmark = pytest.mark.usefixtures("one_thread")


def tokenizer():
    from tokenizers import Tokenizer, models

    vocab = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, 60)}}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<eos>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")


def model():
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, num_labels=1, pad_token_id=0)
    return transformers.LlamaForSequenceClassification(config)


def trained(cls, folder, *, rows=ROWS, config=None, **options):
    arguments = partial(RewardConfig, **(SHORT | dict(max_steps=3, learning_rate=1e-2, seed=3) | (config or {})))
    return run(cls, arguments, folder, rows, tokens=tokenizer(), model=options.pop("model", None) or model(), **options)


def same(ours, stock):
    for one, other in zip(ours, stock, strict=True):
        figures = {key: value for key, value in other.items() if key not in ("epoch", "learning_rate")}
        assert {key: one[key] for key in figures} == pytest.approx(figures, rel=BOUND, abs=1e-6)


@pytest.mark.parametrize("center", [None, 0.01])
@pytest.mark.parametrize("margin", [False, True])
def test_without_more_it_is_trls_training(margin, center, tmp_path):
    rows = [row | {"margin": 0.3 - 0.1 * i} for i, row in enumerate(ROWS)] if margin else ROWS
    config = dict(center_rewards_coefficient=center, gradient_accumulation_steps=2, optim="sgd", learning_rate=0.1)
    stock = trained(RewardTrainer, tmp_path, rows=rows, config=config)
    ours = trained(FineGrainedRewardTrainer, tmp_path, rows=rows, config=config)
    same(ours[1], stock[1])
    for one, other in zip(ours[0].model.parameters(), stock[0].model.parameters(), strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", fk.REWARD)
def test_every_loss_reads_its_columns(loss, tmp_path):
    config = dict(max_steps=1, per_device_train_batch_size=8)
    _, told = trained(FineGrainedRewardTrainer, tmp_path, loss=loss, config=config)
    row, start = fk.REWARD[loss], model().eval()
    options = {"strength": torch.tensor([x["strength"] for x in ROWS])} if row.reads(None, None) else {}
    options |= {"label": torch.tensor([x["soft_label"] for x in ROWS])} if row.smoothing == "label" else {}
    with torch.no_grad():
        scores = [
            torch.stack([start(torch.tensor([x[f"{side}_ids"]])).logits[0, 0] for x in ROWS])
            for side in ("chosen", "rejected")
        ]
    expected = fk.reward_loss(loss, tuple(scores), **options).loss.item()
    assert told[0]["loss"] == pytest.approx(expected, rel=1e-3, abs=1e-4)  # logged in four digits


def test_columns_by_name(tmp_path):
    rows = [row | {"wrong": i > 4, "trust": float(i != 2)} for i, row in enumerate(ROWS)]
    config = dict(max_steps=1, per_device_train_batch_size=8)
    columns = {"flip": "wrong", "weight": "trust"}
    _, told = trained(FineGrainedRewardTrainer, tmp_path, rows=rows, columns=columns, config=config)
    plain = trained(FineGrainedRewardTrainer, tmp_path, rows=rows, config=config)[1]
    assert told[0]["loss"] != plain[0]["loss"]
    for bad in (float("nan"), None, "a"):
        with pytest.raises(ValueError, match="the column 'trust' must hold finite numbers, got"):
            spoilt = [row | {"trust": bad} for row in rows]
            trained(FineGrainedRewardTrainer, tmp_path, rows=spoilt, columns=columns, config=config)
    with pytest.raises(ValueError, match="have the column 'missing'"):
        trained(FineGrainedRewardTrainer, tmp_path, columns={"strength": "missing"}, loss="flip")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(loss_options={"sclae": 2.0}), r"loss_options must name arguments .* got 'sclae' \(did you mean 'scale'"),
        (dict(loss_options=["scale"]), "loss_options must be a mapping from arguments of reward_loss, got list"),
        (dict(columns={"marign": "margin"}), r"columns must name arguments .* got 'marign' \(did you mean 'margin'"),
        (dict(columns={"mask": "margin"}), "columns must name arguments of reward_loss, of strength, .* got 'mask'"),
        (dict(contrast="simcse", contrast_options={"temprature": 1.0}), r"contrast_options must name .* 'temperature'"),
    ],
)
def test_options_that_no_loss_takes_are_refused_when_the_trainer_is_made(options, message, tmp_path):
    args = RewardConfig(output_dir=str(tmp_path), **SHORT)
    with pytest.raises((ValueError, TypeError), match=message):
        FineGrainedRewardTrainer(model(), args=args, train_dataset=Dataset.from_list(ROWS), **options)


@pytest.mark.parametrize("contrast", ["simcse", "swav"])
def test_contrast_enters_and_its_prototypes_learn(contrast, tmp_path):
    options = dict(contrast=contrast, contrast_weight=0.5, prototypes=4, dropout=0.2)
    options["contrast_options"] = dict(rows="differences")
    trainer, told = trained(FineGrainedRewardTrainer, tmp_path, loss="flip", **options)
    assert all(log["contrast"] > 0 and log["grad_norm"] > 0 for log in told)
    plain = trained(FineGrainedRewardTrainer, tmp_path, loss="flip")[1]
    assert told[0]["loss"] > plain[0]["loss"] + 0.1
    if contrast == "swav":
        assert trainer.model.contrast_prototypes.grad is not None or trainer.optimizer is not None
        held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
        assert any(p is trainer.model.contrast_prototypes for p in held)


def test_contrast_of_prototypes_in_half_precision(tmp_path):
    """Differences of two close halves are taken in float32, and prototypes go with them."""
    options = dict(contrast="swav", prototypes=4, dropout=0.2, contrast_options=dict(rows="differences"))
    config = dict(max_steps=1, bf16=True)
    _, told = trained(FineGrainedRewardTrainer, tmp_path, loss="bradley_terry", config=config, **options)
    assert told[0]["contrast"] > 0 and told[0]["grad_norm"] > 0


def test_metarm_steps_around_every_backward(tmp_path):
    shifted = torch.tensor([ids(i, 5) for i in range(6)])  # two prompts, three responses each
    batches = [{"input_ids": shifted, "attention_mask": torch.ones_like(shifted), "k": 3}]
    kept = {}

    class Watched(FineGrainedRewardTrainer):
        def compute_loss(self, model, *args, **options):
            kept["inside"] = model.score.weight.detach().clone()
            return super().compute_loss(model, *args, **options)

        def training_step(self, model, *args, **options):
            before = [p.detach().clone() for p in model.parameters()]
            out = super().training_step(model, *args, **options)
            assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
            assert (kept["inside"] != model.score.weight).any()
            return out

    told = trained(Watched, tmp_path, meta_eta=0.5, meta_batches=batches)[1]
    assert all(1 / 3 <= log["difference"] < 2 / 3 for log in told)  # (k - 1) / (2k) to (k - 1) / k
    plain = trained(FineGrainedRewardTrainer, tmp_path)[1]
    assert told[0]["loss"] != plain[0]["loss"]
    with pytest.raises(ValueError, match="given together"):
        trained(FineGrainedRewardTrainer, tmp_path, meta_eta=0.5)
    with pytest.raises(ValueError, match="meta_batches must hold a batch"):
        trained(FineGrainedRewardTrainer, tmp_path, meta_eta=0.5, meta_batches=[])


def test_evaluation_has_trls_metrics(tmp_path):
    config = dict(eval_strategy="steps", eval_steps=3)
    told = {}
    for cls in (RewardTrainer, FineGrainedRewardTrainer):
        trainer, _ = trained(cls, tmp_path, config=config, eval_dataset=Dataset.from_list(ROWS[:5]))
        told[cls] = next(log for log in trainer.state.log_history if "eval_loss" in log)
    stock = {key: value for key, value in told[RewardTrainer].items() if "per_second" not in key and "time" not in key}
    assert {key: told[FineGrainedRewardTrainer][key] for key in stock} == pytest.approx(stock, rel=1e-4, abs=1e-5)

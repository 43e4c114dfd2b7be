"""The code of the guides that starts a trainer runs as it stands, on a tiny model."""

import os
import re
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
RIGHT, WRONG = "The axis is tilted. Days are short.", "The sun is far. It is cold."
SPANS = {"chosen_spans": [], "rejected_spans": [{"start": 4, "end": 14}]}
ROWS = {  # trainer -> its config, and rows of its data
    "DPOTrainer": ("DPOConfig", [{"prompt": "Why? ", "chosen": RIGHT, "rejected": WRONG} | SPANS]),
    "PointwiseTrainer": (
        "KTOConfig",
        [{"prompt": "Why? ", "completion": text, "label": text == RIGHT} for text in (RIGHT, WRONG)],
    ),
    "GRPOTrainer": ("GRPOConfig", [{"prompt": "Why? "}]),
    "RewardTrainer": ("RewardConfig", [{"chosen": RIGHT, "rejected": WRONG, "strength": 0.5}]),
}


def blocks(page):
    return [code for code in BLOCK.findall((ROOT / "docs/guides" / page).read_text()) if ">>>" not in code]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A model and its tokenizer, from a folder: TRL loads the reference from there."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from tiny import load

    model, tokenizer = load()
    model.save_pretrained(tmp_path / "model")
    yield transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tokenizer
    sys.modules.pop("tiny", None)


@pytest.mark.parametrize("number", range(len(blocks("trl.md"))))
def test_blocks_of_the_trl_guide(number, tiny, tmp_path, monkeypatch, capsys):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    from datasets import Dataset
    from transformers import LlamaForSequenceClassification

    code, (model, tokenizer) = blocks("trl.md")[number], tiny
    config, rows = next(found for name, found in ROWS.items() if f"{name}(" in code)
    stock = "patch_kernels" in code  # TRL's own trainer refuses no column, and warns of spans
    rows = [{key: value for key, value in row.items() if not (stock and key in SPANS)} for row in rows]
    if config == "RewardConfig":
        model.config.num_labels = 1
        model = LlamaForSequenceClassification(model.config)
    small = dict(num_generations=2, max_completion_length=6) if config == "GRPOConfig" else {}
    args = getattr(trl, config)(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to="none", save_strategy="no",
        logging_steps=1, bf16=False, use_cpu=True, gradient_checkpointing=False, **small,
    )  # fmt: skip
    data = Dataset.from_list(rows * 4)
    space = dict(trl=trl, model=model, tokenizer=tokenizer, args=args, dataset=data, pairs=data, score=len)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    exec(code, space)
    assert "train_loss" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["verl-openrlhf.md", "more-trainers.md"])
def test_blocks_of_the_other_guides_say_what_is_missing(page):
    """Without the trainer the first line that needs it says so by name."""
    for code in blocks(page):
        package = re.search(r"finealign_kernels\.integrations\.(\w+) import", code)[1].replace("_", "-")
        with pytest.raises(ImportError, match=f"^{package} is not installed"):
            exec(code, {})

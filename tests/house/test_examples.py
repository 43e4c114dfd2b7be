"""The examples run, on the tiny model, and what they show is so."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(autouse=True)
def folder_of_examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    for name in [path.stem for path in EXAMPLES.glob("*.py")]:
        sys.modules.pop(name, None)


def mean(values):
    return sum(values) / len(values)


def test_every_example_has_a_test():
    tested = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f"import {path.stem}\n" in tested or path.stem == "tiny", path.name


def test_plain_loop():
    import plain_loop

    losses = plain_loop.main(["--steps", "4"])
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6) and losses[-1] < losses[0]


def test_trainer_ulma():
    import trainer_ulma

    losses = trainer_ulma.main(["--steps", "4"])
    assert losses[-1] < losses[0]


def test_dpo_spans():
    pytest.importorskip("trl", reason="TRL is not installed")
    import dpo_spans

    found = dpo_spans.main(["--steps", "4"])
    assert found[4.0] < found[1.0]  # marked faults become less likely where they weigh more


def test_grpo_sentences():
    pytest.importorskip("trl", reason="TRL is not installed")
    import grpo_sentences

    rewards = grpo_sentences.main(["--steps", "15"])
    assert mean(rewards[-5:]) > mean(rewards[:5])


def test_ppo_fine_grained(tmp_path):
    for name in ("accelerate", "peft"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    import ppo_fine_grained

    path = str(tmp_path / "state.pt")
    rewards = ppo_fine_grained.main(["--steps", "12"])
    assert mean(rewards[-4:]) > mean(rewards[:4])
    ppo_fine_grained.main(["--steps", "2", "--checkpoint", path])
    resumed = ppo_fine_grained.main(["--steps", "4", "--checkpoint", path])  # two more, the same ones
    assert resumed == pytest.approx(rewards[:4], rel=1e-5)


def test_reward_model():
    import reward_model

    losses = reward_model.main(["--steps", "12"])
    assert mean(losses[-4:]) < mean(losses[:4])


def test_verl_losses():
    import verl_losses

    rewards = verl_losses.main(["--steps", "12"])
    assert mean(rewards[-4:]) > mean(rewards[:4])


def test_openrlhf_losses():
    import openrlhf_losses

    rewards = openrlhf_losses.main(["--steps", "12"])
    assert mean(rewards[-4:]) > mean(rewards[:4])


def test_ddp_fsdp2():
    import ddp_fsdp2

    found = ddp_fsdp2.main()
    assert found.keys() == {"DDP", "FSDP2"} and max(found.values()) <= 1e-5

"""bench/studies: the world's truth, the statistics, and a short run of each study whose sign must hold."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from studies import __main__ as studies  # noqa: E402
from studies import fine_grained, pivots, real, reward, runs, world  # noqa: E402


def answer(topic, *content):
    ids = torch.full((1, world.PROMPT + world.LONGEST), world.END)
    body = [token for one in content for token in (one, world.STOP)]
    ids[0, : world.PROMPT + len(body)] = torch.tensor([world.BEGIN, world.TOPIC0 + topic, *body])
    return world.answers_of(ids)


FACT, OTHER = world.FACT0 + 2 * world.FACTS, world.FACT0
MIXED = answer(2, FACT, FACT, OTHER, world.FALSE0, world.FILLER0)


def test_the_truth_of_an_answer():
    assert [kind for kind, _ in world.kinds(MIXED)[0]] == ["fact", "repeat", "elsewhere", "false", "filler"]
    assert world.scores(MIXED).tolist() == [-2.0]
    assert world.marks(MIXED).sum() == -2 and world.marks(MIXED)[0, 1] == 1  # the first content token's column
    assert MIXED.lengths.tolist() == [11]  # ten tokens and the end token
    assert (MIXED.labels[0] != -100).sum() == 11


def test_an_answer_that_never_ends_is_read_whole():
    ids = torch.full((1, world.PROMPT + 4), FACT)
    assert world.answers_of(ids).lengths.tolist() == [4]


@pytest.mark.parametrize("density", ("answer", "sentence", "token"))
def test_rewards_of_every_density_add_up_to_the_score(density):
    found = world.write(20, torch.Generator().manual_seed(0))
    tokens = fine_grained.fk.token_rewards(fine_grained.rewards_of(found, density, {}), mask=found.mask)
    torch.testing.assert_close(tokens.sum(1), world.scores(found))
    assert density == "answer" or (tokens != 0).sum() > 40


def test_the_true_mask_keeps_what_agrees_with_its_side():
    both = world.answers_of(torch.cat([MIXED.ids, MIXED.ids]))
    kept = pivots.agreeing(both)
    columns = [column for _, column in world.kinds(MIXED)[0]]
    assert kept[0, columns].tolist() == [1, 0, 0, 0, 1] and kept[1, columns].tolist() == [0, 1, 1, 1, 1]


def test_intervals_are_students():
    mean, low, high = runs.interval([1.0, 2.0, 3.0, 4.0, 5.0])  # s = 1.5811, t = 2.776
    assert mean == 3 and (low, high) == pytest.approx((3 - 1.9630, 3 + 1.9630), abs=2e-3)
    assert runs.interval([1.0])[1:] == (float("-inf"), float("inf"))


def toy(value, seen=None):
    def run(arm, seed, quick):
        if seen is not None:
            seen.append((arm, seed))
        score = seed + value * (arm == "b")
        return {"score": score + 0.01 * seed * (arm == "b"), "curve": [{"x": 0, "y": score}, {"x": 1, "y": score}]}

    effect = runs.Effect("score", "b", "a", +1, quick=True)
    return runs.Study("toy", "b is more than a.", ("a", "b"), run, (effect,), ("x", "y"), "")


def test_effects_are_paired_by_seed_and_runs_resume(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    seen = []
    argv = ["toy", "--out", str(tmp_path)]
    assert runs.main({"toy": toy(0.5, seen)}, [*argv, "--seeds", "2"]) == 0
    assert runs.main({"toy": toy(0.5, seen)}, [*argv, "--seeds", "3"]) == 0
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    rows = [json.loads(line) for line in (tmp_path / "study-toy.jsonl").read_text().splitlines()]
    assert [(row["arm"], row["seed"]) for row in rows] == seen
    (found,) = runs.effects(toy(0.5), rows)
    assert found.mean == pytest.approx(0.51) and found.low > 0.4 and found.word == "as claimed"  # seeds differ by 1
    assert (tmp_path / "study-toy.svg").read_text().startswith("<?xml")
    assert "+0.51" in capsys.readouterr().out


@pytest.mark.parametrize("value, status", [(0.5, 0), (-0.5, 1)])
def test_quick_fails_where_the_sign_does_not_hold(value, status, tmp_path):
    assert runs.main({"toy": toy(value)}, ["toy", "--quick", "--out", str(tmp_path)]) == status
    assert not list(tmp_path.iterdir())


def test_an_unknown_study_is_refused(capsys):
    with pytest.raises(SystemExit):
        runs.main({"toy": toy(1)}, ["toi"])
    assert "got toi" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name, study in studies.STUDIES.items() if runs.quick_runs(study)])
def test_a_short_run_holds_its_sign(name, tmp_path):
    if name == "trainers":
        pytest.importorskip("trl")
    assert runs.main(studies.STUDIES, [name, "--quick", "--out", str(tmp_path)]) == 0


def test_a_study_that_lacks_its_data_says_so_and_the_next_one_runs(tmp_path, capsys):
    lacking = toy(0.5)._replace(name="lacking", needs=lambda: "its file is not at nowhere.json")
    silent = toy(0.5)._replace(name="silent", effects=())
    both = {"lacking": lacking, "silent": silent, "toy": toy(0.5)}
    assert runs.main(both, ["--quick", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert "lacking is left out: its file is not at nowhere.json" in told.err
    assert "silent is left out: no sign that must hold" in told.err and "## toy" in told.out


@pytest.mark.parametrize("named", [None, "nowhere.json"])
def test_studies_of_judgements_say_what_is_missing(named, monkeypatch):
    monkeypatch.setattr(real.qa, "FILE", named)
    assert real.qa.missing() == f"FINEALIGN_QA_FEEDBACK must name the dev_feedback.json of QA-Feedback, got {named!r}"


def test_strength_finds_planted_flips_and_flipping_helps():
    rows = [(reward.run("bradley_terry", seed, True), reward.run("flip", seed, True)) for seed in (1, 2, 3)]
    assert all(plain["found"] > 0.8 for plain, _ in rows)  # chance: a third
    assert all(plain["right"] > 0.75 for plain, _ in rows)  # chance: 0.3
    assert sum(flip["accuracy"] - plain["accuracy"] for plain, flip in rows) > 0

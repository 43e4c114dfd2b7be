"""The studies of bench/studies run, and show what they are there to show at a small size."""

import json
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parents[1] / "bench/studies"))
import reward  # noqa: E402


def test_strength_finds_planted_flips_and_flipping_helps():
    rows = [row for seed in (1, 2, 3) for row in reward.study(seed, 1500, losses=("bradley_terry", "flip"))]
    accuracy = {(row["loss"], row["seed"]): row["accuracy"] for row in rows}
    assert all(row["found"] > 0.8 for row in rows)  # chance: a third
    assert all(row["right"] > 0.75 for row in rows)  # chance: 0.3
    assert mean(accuracy["flip", seed] - accuracy["bradley_terry", seed] for seed in (1, 2, 3)) > 0


def test_quick_run_writes_its_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reward, "EPOCHS", 1)
    reward.main(["--quick", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 2 * len(reward.LOSSES) and {row["seed"] for row in rows} == {1, 2}
    assert "planted flips in the lowest third" in capsys.readouterr().out

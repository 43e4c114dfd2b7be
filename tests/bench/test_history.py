"""bench/history.py: what is kept of a race, and what is shown of it."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HISTORY = runpy.run_path(str(ROOT / "bench/history.py"))


def rows(eager, case="dense", machine="EPYC, 2 threads"):
    race = {"suite": "head", "case": case, "dtype": "float32", "shape": [8, 4], "pass": "forward"}
    race |= {"versions": {"machine": machine, "torch": "2.13.0"}}
    ours = {**race, "impl": "ours", "ratio_to_ours": 1.0, "peak_extra_mib": 7.4}
    return [{**race, "impl": "eager", "ratio_to_ours": eager, "peak_extra_mib": 70.0}, ours]


def test_a_race_is_a_row_and_a_second_run_replaces_it(tmp_path):
    file = tmp_path / "history.jsonl"
    new = HISTORY["races"](rows(1.25) + rows(None, "frozen")[:1], "abc1234", "2026-11-29")
    assert HISTORY["add"](file, new) == 1  # the race without ratios was cut off
    (row,) = map(json.loads, file.read_text().splitlines())
    assert row["ratios"] == {"eager": 1.25, "ours": 1.0} and row["ours_extra_mib"] == 7.4
    assert (row["commit"], row["device"], row["versions"]["torch"]) == ("abc1234", "EPYC, 2 threads", "2.13.0")
    HISTORY["add"](file, HISTORY["races"](rows(1.5), "abc1234", "2026-11-29"))
    assert [one["ratios"]["eager"] for one in HISTORY["read"](file)] == [1.5]
    HISTORY["add"](file, HISTORY["races"](rows(1.75), "def5678", "2026-11-30"))
    HISTORY["add"](file, HISTORY["races"](rows(9.0, machine="Xeon"), "def5678", "2026-11-30"))
    shown = HISTORY["tables"](HISTORY["read"](file))
    assert "| abc1234 | 2026-11-29 | 1.50 | 7 |\n| def5678 | 2026-11-30 | 1.75 | 7 |" in shown
    assert shown.count("| commit |") == 2  # a device has a table of its own


def test_rows_of_no_race_are_refused():
    with pytest.raises(ValueError, match=r"with ratio_to_ours, got suites \['tp'\]"):
        HISTORY["races"]([*rows(1.25), {"suite": "tp", "seconds": {"ours": 1.0}}], "abc1234", "2026-11-29")


def test_outside_of_git_there_is_no_commit(monkeypatch):
    def absent(*_):
        raise FileNotFoundError("git")

    monkeypatch.setitem(HISTORY["commit_of"].__globals__, "git", absent)
    commit, day = HISTORY["commit_of"]("HEAD")
    assert commit == "none" and len(day.split("-")) == 3
    with pytest.raises(FileNotFoundError):
        HISTORY["commit_of"]("abc1234")


def test_the_kept_history_has_whole_rows():
    found = HISTORY["read"](ROOT / "bench/results/history.jsonl")
    assert found and HISTORY["tables"](found)
    for row in found:
        assert row["ratios"]["ours"] == 1 and row["versions"]["torch"] and row["device"] and row["commit"]

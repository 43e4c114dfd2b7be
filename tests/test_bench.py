"""The bench itself: what is measured, what is written, and that a wrong answer is never timed."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from finealign_kernels.testing import measure

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import cases  # noqa: E402
import rivals  # noqa: E402
import run  # noqa: E402

FIELDS = ["suite", "case", "impl", "device", "dtype", "shape", "pass", "median_s", "ratio_to_ours"]
FIELDS += ["queued_s", "useful_flops", "useful_bytes", "peak_extra_mib"]
FIELDS += ["rms_error", "gradient_error", "gemm_count", "versions"]


def small(suite, case, dtype=torch.float32):
    suite = cases.SUITES[suite]
    return cases.Line(suite, suite.shapes["small"][0], case, dtype, torch.device("cpu"))


def raced_by(monkeypatch, *extra):
    """A head suite of eager, ours and the extra rivals, in place of the real one."""
    kept = [rival for rival in rivals.HEAD if rival.name in ("eager", "ours")]
    monkeypatch.setitem(cases.SUITES, "head", dataclasses.replace(cases.SUITES["head"], rivals=(*kept, *extra)))


# measure


def test_rounds_rotate_their_order_and_time_every_call():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = measure.interleaved(calls, 4, warmup=1)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(each) for name, each in times.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(second >= 0 for each in times.values() for second in each)


def test_ratio_is_the_median_of_the_ratios_within_a_round():
    times = {"ours": [1.0, 10.0, 2.0], "trl": [3.0, 20.0, 8.0]}
    assert measure.ratio(times, "trl", "ours") == 3.0  # of 3, 2, 4; the ratio of the medians would be 4
    assert measure.medians(times) == {"ours": 2.0, "trl": 8.0}


def test_a_cpu_has_no_queue():
    assert measure.queued({"a": lambda: 1 / 0}, 3, "cpu") == {}


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        measure.interleaved({"a": lambda: None}, 0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak resident set can be set back on Linux only")
def test_peak_counts_what_was_freed_and_not_what_is_returned():
    mib = 2**18  # float32 elements

    def call():
        scratch = torch.ones(64 * mib)
        kept = torch.ones(32 * mib)
        del scratch
        return {"kept": (kept, kept.view(32, mib))}  # one storage

    call()
    peaks = [measure.peak_extra_mib(call) for _ in range(2)]
    assert peaks == pytest.approx([64, 64], abs=4)
    assert measure.peak_extra_mib(lambda: None) == pytest.approx(0, abs=4)


# rows


def test_rows_have_the_fields_of_the_schema(tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert run.main(["head", "--size", "small", "--no-memory", "--rounds", "2", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert all(list(row) == FIELDS for row in rows)
    assert {(row["dtype"], row["case"]) for row in rows} == {
        ("float32", "dense"),
        ("float32", "active20"),
        ("float32", "frozen"),
        ("bfloat16", "dense"),
    }
    ours = [row for row in rows if row["impl"] == "ours"]
    assert [row["ratio_to_ours"] for row in ours] == [1.0] * 4
    for row in rows:
        assert row["shape"] == [96, 64, 3001] and row["pass"] == "forward+backward" and row["device"] == "cpu"
        assert row["median_s"] > 0 and row["versions"]["torch"] == torch.__version__
        assert (row["rms_error"] is None) == (row["gradient_error"] is None) == row["impl"].startswith("gemm")
        assert row["useful_flops"] <= 3 * 2 * 96 * 64 * 3001 and row["queued_s"] is row["useful_bytes"] is None
    printed = capsys.readouterr().out
    assert "head  active20  float32  small (N=96, D=64, V=3001)  cpu" in printed
    assert "ours / gemm3" in printed


@pytest.mark.parametrize("suite", ["loss", "token_logprobs", "segments"])
def test_every_suite_runs(suite, capsys):
    assert run.main([suite, "--size", "small", "--no-memory", "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    for dtype, case in cases.SUITES[suite].cases:
        assert f"{suite}  {case}  {cases.dtype_name(dtype)}  small" in printed


@pytest.mark.parametrize(
    "case, three, four",
    [
        ("dense", 3, 4),
        ("active20", 1 + 2 * 19 / 96, 1 + 3 * 19 / 96),
        ("frozen", 2, 3),
        ("prompt50", 3 * 48 / 96, 4 * 48 / 96),
        ("prompt50-compact", 3 * 48 / 96, 4 * 48 / 96),
        ("grpo30", (48 + 2 * 34) / 96, (48 + 3 * 34) / 96),
        ("grpo30-compact", 3 * 34 / 96, 4 * 34 / 96),
        ("pivots20", (72 + 2 * 14) / 96, (72 + 3 * 14) / 96),
        ("pivots20-compact", 3 * 14 / 96, 4 * 14 / 96),
    ],
)
def test_products_are_counted(case, three, four):
    """The floors run the products of the case, ours those of its floor; 19 of 96 rows are active in active20. What is
    useful are the three."""
    line = small("head", case)
    able = [rival for rival in line.suite.rivals if rival.name in ("gemm3", "gemm4", "ours", "ours-no-workspace")]
    x = line.sample()
    checks, absent = run.checked(line, able, x)
    assert not absent and x.useful_flops == round(three * 2 * 96 * 64 * 3001)
    counts = {name: check["gemm_count"] for name, check in checks.items()}
    assert counts == pytest.approx({"gemm3": three, "gemm4": four, "ours": three, "ours-no-workspace": four}, abs=0.006)


def test_peak_is_taken_in_a_process_of_its_own():
    peak = run.fresh_peak(small("head", "dense"), "ours")
    assert peak is None if not sys.platform.startswith("linux") else 0 <= peak < 64


# refusals


def ones_upstream(x):
    logp = rivals._label_logp(x.hidden @ x.weight.T, x.labels)
    grads = torch.autograd.grad(logp.sum(), (x.hidden, x.weight))
    return {"logp": logp.detach(), "dhidden": grads[0], "dweight": grads[1]}


def scaled(x):
    return {**rivals.head_eager(x), "dweight": 1.001 * rivals.head_eager(x)["dweight"]}


def one_nan(x):
    answers = rivals.head_eager(x)
    answers["logp"][0] = torch.nan
    return answers


def next_label(x):
    return rivals.head_eager(cases.Sample(**{**vars(x), "labels": x.labels.roll(1)}))


def no_weight_gradient(x):
    return {name: value for name, value in rivals.head_eager(x).items() if name != "dweight"}


@pytest.mark.parametrize("wrong", [ones_upstream, scaled, one_nan, next_label, no_weight_gradient])
def test_a_wrong_answer_is_not_timed(wrong, monkeypatch, tmp_path, capsys):
    """A rival's is left out and told, ours leaves nothing to compare with; the exit status tells of either."""
    file, argv = tmp_path / "bench.json", ["head", "--size", "small", "--no-memory", "--rounds", "1", "--case", "dense"]
    raced_by(monkeypatch, rivals.Rival("planted", wrong))
    assert run.main([*argv, "--dtype", "float32", "--json", str(file)]) == 1
    assert "planted" in capsys.readouterr().err
    assert {row["impl"] for row in json.loads(file.read_text())} == {"eager", "ours"}
    file.unlink()
    raced_by(monkeypatch, rivals.Rival("ours-planted", wrong))
    assert run.main([*argv, "--dtype", "float32", "--json", str(file)]) == 1
    assert "ours-planted" in capsys.readouterr().err and not file.exists()


def test_a_bound_of_its_own_is_for_that_rival_alone(monkeypatch):
    raced_by(monkeypatch, rivals.Rival("coarse", scaled, tolerance=0.01), rivals.Rival("planted", scaled))
    line = small("head", "dense")
    checks, absent = run.checked(line, line.available()[0], line.sample())
    assert list(absent) == ["planted"] and checks["coarse"]["gradient_error"] == pytest.approx(0.001, rel=0.01)


def test_a_rival_that_fails_is_left_out_with_its_reason(monkeypatch, capsys):
    def fails(x):
        raise RuntimeError("out of\nluck")

    raced_by(monkeypatch, rivals.Rival("failing", fails))
    argv = ["head", "--size", "small", "--no-memory", "--rounds", "1", "--case", "dense", "--dtype", "float32"]
    assert run.main(argv) == 0
    assert "skipped: RuntimeError: out of luck" in capsys.readouterr().out
    raced_by(monkeypatch, rivals.Rival("ours-failing", fails))
    with pytest.raises(RuntimeError, match="luck"):
        run.main(argv)


def test_a_rival_that_is_not_installed_is_skipped_with_its_reason(monkeypatch, capsys):
    def never(x):
        raise AssertionError("ran all the same")

    absent = rivals.Rival("absent", never, rivals.package("no-such-library", "1.0"))
    old = rivals.Rival("old", never, rivals.package("torch", "99.0"))
    raced_by(monkeypatch, absent, old)
    assert run.main(["head", "--size", "small", "--no-memory", "--rounds", "1", "--case", "dense"]) == 0
    printed = capsys.readouterr().out
    assert "skipped: no-such-library is not installed" in printed
    assert f"skipped: needs torch >= 99.0, found {torch.__version__}" in printed


def test_four_fifths_of_the_rows_have_an_upstream_gradient_of_exactly_zero():
    x = small("head", "active20").sample()
    assert int((x.upstream == 0).sum()) == 96 - 19
    torch.testing.assert_close(x.floor.active, x.hidden.detach()[x.upstream != 0], rtol=0, atol=0)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_compacted_rows_are_those_that_have_a_gradient(kind):
    x, left = small("head", kind).sample(), small("head", kind + cases.COMPACT).sample()
    needed = x.upstream != 0
    assert (x.labels[needed] >= 0).all() and 0 < needed.sum() < 96
    for name in ("hidden", "labels", "upstream"):
        torch.testing.assert_close(getattr(left, name), getattr(x, name)[needed], rtol=0, atol=0)
    torch.testing.assert_close(left.floor.hidden, left.floor.active, rtol=0, atol=0)
    assert x.weight.requires_grad and left.weight.requires_grad


def test_groups_without_advantage_have_no_gradient_and_a_sequence_has_one():
    x = small("head", "grpo30").sample()
    group, sequence = torch.arange(96) * 10 // 96, torch.arange(96) * 40 // 96
    read = x.labels != rivals.IGNORED
    assert [bool((x.upstream[group == g] == 0).all()) for g in range(10)] == [True] * 3 + [False] * 7
    for s in range(40):
        assert len(x.upstream[read & (sequence == s)].unique()) <= 1
    assert (x.upstream[~read] == 0).all()


@pytest.mark.parametrize("case", ["grpo30", "frozen"])
def test_the_truth_in_blocks_of_rows_is_that_of_the_whole(case, monkeypatch):
    line = small("head", case)
    x = line.sample()
    x.weight = x.weight.detach()[: 2**11].requires_grad_(x.weight.requires_grad)
    x.labels = x.labels.clamp(max=2**11 - 1)
    whole = rivals.head_eager(x.double())
    monkeypatch.setattr(rivals, "BLOCK", 2**16)  # 32 rows at a time
    blocks = cases.truth(line, x)
    assert set(blocks) == set(whole) and all(value.dtype == torch.float64 for value in blocks.values())
    for name, value in whole.items():
        torch.testing.assert_close(blocks[name], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "argv, named",
    [(["heads"], "got heads"), (["head", "--case", "sparse"], "no race has case sparse, dtype None and shape any")],
)
def test_what_cannot_be_run_is_named(argv, named, capsys):
    with pytest.raises(SystemExit):
        run.main(argv)
    assert named in capsys.readouterr().err

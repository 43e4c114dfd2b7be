"""The bench itself: what is measured, what is written, and that a wrong answer is never timed."""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from finealign_kernels.testing import measure

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import cases  # noqa: E402
import rivals  # noqa: E402
import run  # noqa: E402
import shapes  # noqa: E402

FIELDS = ["suite", "case", "impl", "device", "dtype", "shape", "pass", "median_s", "ratio_to_ours"]
FIELDS += ["queued_s", "useful_flops", "useful_bytes", "peak_extra_mib"]
FIELDS += ["rms_error", "gradient_error", "gemm_count", "rounds", "versions"]


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


def test_a_race_has_as_many_rounds_as_fit(monkeypatch):
    raced_by(monkeypatch)
    line = small("head", "dense")
    assert [len(run.race(line, 3, memory=False, at_most=most)[1]["ours"]) for most in (0.0, 1e6)] == [1, 3]


@pytest.mark.parametrize(
    "flags, known", [("avx512f avx512_bf16", True), ("avx512f", False), ("fphp bf16", True), ("amx_bf16", True)]
)
def test_bfloat16_races_need_instructions_for_it(flags, known, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"model name\t: x\nflags\t\t: fpu {flags} sse\n")
    assert run.has_bfloat16(cpuinfo) is known and run.has_bfloat16(tmp_path / "none")


def test_default_races_leave_out_bfloat16_only_where_nobody_asked(monkeypatch):
    monkeypatch.setattr(run, "has_bfloat16", lambda: False)
    dtypes = lambda *given: {line.dtype for line in run.lines(run.arguments(["head", *given]))}  # noqa: E731
    assert dtypes() == {torch.float32} and dtypes("--dtype", "bfloat16") == {torch.bfloat16}
    assert torch.bfloat16 in dtypes("--full") and torch.bfloat16 in dtypes("--case", "dense")


def test_a_short_call_is_repeated_in_its_turn():
    order = []
    calls = {"long": lambda: (order.append("l"), time.sleep(0.05)), "short": lambda: order.append("s")}
    times = measure.interleaved(calls, 2, warmup=0, least=0.01)
    assert order[:2] == ["l", "s"] and order.count("l") == 3  # the first of both is what says how often
    assert order.count("s") > 100 and order[2] == "l" and order[-1] == "l"
    assert all(second < 0.005 for second in times["short"]) and all(second >= 0.05 for second in times["long"])


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
        assert row["rounds"] == 2 and row["median_s"] > 0 and row["versions"]["torch"] == torch.__version__
        assert (row["rms_error"] is None) == (row["gradient_error"] is None) == row["impl"].startswith("gemm")
        assert row["useful_flops"] <= 3 * 2 * 96 * 64 * 3001 and row["queued_s"] is row["useful_bytes"] is None
    printed = capsys.readouterr().out
    assert "head  active20  float32  small (N=96, D=64, V=3001)  cpu" in printed
    assert "ours / gemm3" in printed


@pytest.mark.parametrize(
    "suite", ["loss", "token_logprobs", "token_entropy", "segments", "policy", "reward", "contrast", "rl"]
)
def test_every_suite_runs(suite, capsys):
    assert run.main([suite, "--size", "small", "--no-memory", "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    for dtype, case in cases.SUITES[suite].cases:
        assert f"{suite}  {case}  {cases.dtype_name(dtype)}  small" in printed


def test_an_entropy_that_is_off_is_no_answer():
    line = small("token_entropy", "dense")
    x = line.sample()
    exact = cases.truth(line, x)
    (ours,) = (rival for rival in line.suite.rivals if rival.name == "ours")
    found = cases.errors(line, ours, ours.call(x), exact)
    assert found["rms_error"] < 1e-5 and found["gradient_error"] < 1e-5 and not x.logits.requires_grad
    with pytest.raises(cases.WrongAnswer, match="entropy of ours"):
        cases.errors(line, ours, {**ours.call(x), "entropy": 1.001 * exact["entropy"]}, exact)


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


def test_a_row_is_saved_before_the_next_rival_runs(monkeypatch, tmp_path):
    """A run that is cut off in its last rival has left the rows of the others; a finished race replaces them."""
    file = tmp_path / "bench.json"
    argv = ["head", "--size", "small", "--no-memory", "--rounds", "2", "--case", "dense", "--dtype", "float32"]

    def cut_off(x):
        raise KeyboardInterrupt

    raced_by(monkeypatch, rivals.Rival("last", cut_off))
    with pytest.raises(KeyboardInterrupt):
        run.main([*argv, "--json", str(file)])
    rows = json.loads(file.read_text())
    assert [list(row) for row in rows] == [FIELDS] * 2
    assert [(row["impl"], row["rounds"], row["ratio_to_ours"]) for row in rows] == [
        ("eager", 1, None),
        ("ours", 1, None),
    ]
    raced_by(monkeypatch)
    assert run.main([*argv, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [(row["impl"], row["rounds"]) for row in rows] == [("eager", 2), ("ours", 2)]
    assert list(tmp_path.iterdir()) == [file]


def test_rivals_are_chosen_by_name(tmp_path, capsys):
    file = tmp_path / "bench.json"
    argv = ["head", "--size", "small", "--no-memory", "--rounds", "1", "--case", "dense", "--dtype", "float32"]
    assert run.main([*argv, "--rival", "gemm3", "--rival", "eager", "--json", str(file)]) == 0
    assert [row["impl"] for row in json.loads(file.read_text())] == ["eager", "gemm3", "ours"]
    with pytest.raises(SystemExit):
        run.main([*argv, "--rival", "gemm5"])
    assert "got gemm5" in capsys.readouterr().err


def test_trl_is_raced_where_datasets_is_missing():
    """As on a machine that has TRL alone: its backward imports a module that imports datasets."""
    pytest.importorskip("trl")
    code = "import sys; sys.modules['datasets'] = None; sys.path.insert(0, 'bench'); import run\n"
    code += "sys.exit(run.main(sys.argv[1:]))"
    argv = ["head", "--size", "small", "--no-memory", "--rounds", "1", "--case", "dense", "--dtype", "float32"]
    command = [sys.executable, "-c", code, *argv, "--rival", "trl"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^trl +[\d.]+ ", done.stdout, re.M), done.stdout


def test_on_a_gpu_trls_own_kernel_is_raced(monkeypatch):
    kernels = pytest.importorskip("trl.kernels.logprob_entropy")
    monkeypatch.setattr(kernels, "selective_log_softmax_and_entropy", lambda logits, labels: ("logp", "entropy"))
    there = cases.SimpleNamespace(logits=cases.SimpleNamespace(device=torch.device("cuda")), labels=None)
    there.answers = lambda out: out
    assert rivals.logits_trl(there) == "logp"
    assert rivals.scores_trl(there) == {"logp": "logp", "entropy": "entropy"}


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
    assert f"skipped: needs torch >= 99.0, found {version('torch')}" in printed


@pytest.mark.parametrize("others", [("eager",), ()], ids=["others", "nobody"])
def test_a_race_that_ours_cannot_run_times_the_others(others, monkeypatch, tmp_path, capsys):
    """Without the extension some ops have no kernel of ours."""
    away = rivals.Rival("ours", rivals.head_ours("full"), lambda dtype, device: "no kernel here")
    kept = [rival for rival in rivals.HEAD if rival.name in others]
    monkeypatch.setitem(cases.SUITES, "head", dataclasses.replace(cases.SUITES["head"], rivals=(*kept, away)))
    given = ["head", "--size", "small", "--dtype", "float32", "--case", "dense", "--no-memory", "--rounds", "1"]
    assert run.main([*given, "--json", str(tmp_path / "rows.json")]) == 0
    assert "no kernel here" in capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text()) if others else []
    assert [(row["impl"], row["ratio_to_ours"]) for row in rows] == [(name, None) for name in others]


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


# pictures


def raced_rows(device="cpu"):
    """Three sizes of a head and a copy, with round numbers."""
    common = {"suite": "head", "case": "dense", "device": device, "dtype": "float32"}
    rows = []
    for n in (256, 512, 1024):
        flops = 3 * 2 * n * 64 * 3001
        for impl, rate, memory in (("gemm3", 1e12, None), ("ours", 5e11, n / 10), ("eager", 2.5e11, n)):
            row = {"impl": impl, "shape": [n, 64, 3001], "median_s": flops / rate, "peak_extra_mib": memory}
            row |= {"queued_s": flops / rate if device == "cuda" else None, "useful_flops": flops}
            rows.append({**common, **row})
    copy = {"impl": "copy", "shape": [100, 3001], "median_s": 1e-3, "queued_s": None, "useful_bytes": 10**7}
    return [*rows, {**common, "suite": "token_logprobs", "peak_extra_mib": None, **copy}]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_pictures_are_drawn_from_rows(device, tmp_path):
    plots = pytest.importorskip("plots")
    drawn = [picture.name for picture in plots.draw(raced_rows(device), tmp_path)]
    key = f"head-dense-float32-{device}"
    assert drawn == [f"{key}-rows.svg", f"{key}-roofline.svg", f"floors-{device}.svg"]
    rows = (tmp_path / f"{key}-rows.svg").read_text()
    assert ("time on the GPU, ms" in rows) == (device == "cuda") and "extra memory, MiB" in rows and "eager" in rows
    again = [picture.read_bytes() for picture in plots.draw(raced_rows(device), tmp_path)]
    assert again == [(tmp_path / name).read_bytes() for name in drawn]


def test_what_is_drawn_is_a_multiple_of_the_floor_on_a_cpu_and_milliseconds_on_a_gpu():
    plots = pytest.importorskip("plots")
    rows, there = raced_rows(), raced_rows("cuda")
    floors = plots.floor_times([row for row in rows if row["suite"] == "head"])
    ours = next(row for row in rows if row["impl"] == "ours")
    assert plots.shown(ours, floors) == pytest.approx(2)
    assert plots.shown(there[1], {}) == pytest.approx(there[1]["queued_s"] * 1e3)
    assert plots.shown(ours, {}) is None
    assert plots.copy_bandwidth(rows) == {"cpu": pytest.approx(1e10)}
    assert plots.intensity(ours) == pytest.approx(3 * 2 * 256 * 64 * 3001 / (2 * (256 + 3001) * 64 * 4))
    assert [row["shape"][0] for row in plots.along(rows[:9], 0)] == [256] * 3 + [512] * 3 + [1024] * 3
    assert plots.along(rows[:9], 2) == []


# launches of the Triton kernels


@pytest.fixture
def sweep(usable):
    usable("triton")
    import sweep

    return sweep


swept_here = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted here, swept there")
SMALL_TILES = (32, 64, 32, 4, 1, 32, 2), (16, 128, 16, 4, 1, 128, 8)


def sample_of(sweep, kernel, n=3, columns=3001, dtype=torch.float32):
    if sweep.KERNELS[kernel].sample is sweep.tile:
        return sweep.tile(n, columns, dtype, torch.device("cpu"))
    return sweep.products(n, shapes.Head("small", n, 40, columns), dtype, torch.device("cpu"))


@swept_here
@pytest.mark.parametrize("kernel", ["row_fwd", "row_bwd", "head_fwd", "head_fwd_tma", "head_capped", "head_bwd"])
def test_a_sweep_checks_every_launch_and_times_none_without_a_gpu(kernel, sweep, monkeypatch):
    def call(t, launch):
        if launch == "refused":
            raise RuntimeError("out of shared\nmemory")
        swept.call(t, launch)

    swept = sweep.KERNELS[kernel]
    two = ((1024, 4), (2048, 8)) if swept.sample is sweep.tile else SMALL_TILES
    two = tuple((*tile, 1, 1) for tile in two) if kernel == "head_fwd_tma" else two
    planted = swept._replace(launches=(*two, "refused", (1, 1)), shipped=lambda t: two[1], call=call)
    monkeypatch.setitem(sweep.KERNELS, kernel, planted)
    x = sample_of(sweep, kernel) if swept.sample is sweep.tile else sample_of(sweep, kernel, 35, 333)
    found = sweep.sweep(kernel, x, 1, refused={(1, 1): "it hung"})
    assert [row["launch"] for row in found] == [two[1], two[0], "bare", "refused", (1, 1)]
    assert [row["shipped"] for row in found] == [True, False, False, False, False]
    assert all(row["queued_s"] is None for row in found[:3]) and all(row["error"] < 1e-6 for row in found[:2])
    assert [row["failed"] for row in found[3:]] == ["RuntimeError: out of shared memory", "RuntimeError: it hung"]
    first, *_ = sweep.table(found).partition("\n  bare")
    assert re.search(rf"  {sweep.named(two[1])} +no time  .* off  <- ships", first)
    assert sweep.sweep(kernel, x, 1, launches=two[:1])[0]["launch"] == two[0]


@swept_here
@pytest.mark.parametrize("kernel", ["head_dx", "head_dw"])
def test_products_of_a_gradient_are_swept(kernel, sweep, monkeypatch):
    monkeypatch.setitem(sweep.KERNELS, kernel, sweep.KERNELS[kernel]._replace(launches=SMALL_TILES))
    *right, bare = sweep.sweep(kernel, sample_of(sweep, kernel, 35, 333, torch.bfloat16), 1, launches=SMALL_TILES)
    assert [row["launch"] for row in right] == list(SMALL_TILES) and bare["launch"] == "bare"
    assert all(row["error"] < 1e-6 for row in right)


@swept_here
@pytest.mark.parametrize(
    "kernel, written, at",
    [
        ("row_fwd", "part", 0),
        ("row_bwd", "dx", 0),
        ("head_fwd", "part", 0),
        ("head_fwd", "label", 0),
        ("head_fwd", "e", 0),
        ("head_bwd", "dz", 0),
        ("head_dx", "dx", -1),
        ("head_dw", "dw", -1),
    ],
)
def test_a_sweep_times_no_wrong_answer(kernel, written, at, sweep, monkeypatch):
    def half(t, launch):
        whole.call(t, launch)
        getattr(t, written)[at] *= 1.5

    whole = sweep.KERNELS[kernel]
    x, launches = sample_of(sweep, kernel, 3, 257), ((1024, 4),) if whole.sample is sweep.tile else SMALL_TILES[:1]
    monkeypatch.setitem(sweep.KERNELS, kernel, whole._replace(call=half))
    found = sweep.sweep(kernel, x, 1, launches)
    assert [row["launch"] for row in found] == ["bare", launches[0]] and "wrong answer" in found[1]["failed"]
    forgets = whole._replace(call=lambda t, launch: None)
    monkeypatch.setitem(sweep.KERNELS, kernel, forgets)
    found = sweep.sweep(kernel, x, 1, launches)
    assert "wrong answer: nan" in found[1]["failed"]


def test_every_tile_that_is_swept_fits_a_chunk(sweep):
    import swept_kernels as swept

    for kernel in sweep.KERNELS.values():
        if kernel.sample is sweep.products:
            tiles = [swept.heads.Config(*launch) for launch in kernel.launches]
            assert all(swept.CHUNK % tile.columns == 0 and tile.columns >= swept.SMALLEST for tile in tiles)
            assert all(swept.heads.Config(*swept.numbers(tile)) == tile for tile in tiles)


def test_the_best_of_a_sweep_are_lines_of_the_tables(sweep, tmp_path, capsys):
    """A launch counts that was timed at every size: by its mean share of the bare work, in each table's own form."""
    common = {"gpu": "Some GPU", "arch": "sm_90", "triton": "3.6.0", "dtype": "bfloat16"}

    def timed(kernel, shape, launch, share, shipped=False):
        return {
            **common,
            "kernel": kernel,
            "shape": shape,
            "launch": launch,
            "shipped": shipped,
            "share_of_bare": share,
        }

    tiles = [[128, 256, 64, 8, 3, 32, 8], [128, 128, 64, 8, 3, 32, 8], [64, 256, 64, 8, 3, 32, 8]]
    rows = [timed("head_fwd", [4096, 4096, v], tiles[0], share, True) for v, share in ((49152, 0.9), (128256, 0.4))]
    rows += [timed("head_fwd", [4096, 4096, v], tiles[1], 0.7) for v in (49152, 128256)]
    rows += [
        timed("head_fwd", [4096, 4096, 49152], tiles[2], 0.99),
        timed("head_fwd", [4096, 4096, 49152], "bare", 1.0),
    ]
    rows += [{**common, "kernel": "row_fwd", "shape": [4, 9], "launch": [1024, 4], "shipped": False, "failed": "no"}]
    rows += [timed("row_fwd", [4, 9], [4096, 8], 0.8, True)]
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps(rows))
    assert sweep.main(["--best", str(file)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "",
        "HALF, by head_fwd in bfloat16 at 2 sizes; Some GPU, Triton 3.6.0",
        '    "sm_90": Config(128, 128, 64, 8, 3, 32, 8),  # 0.70 of the bare work',
        '    "sm_90": Config(128, 256, 64, 8, 3, 32, 8),  # 0.60 of the bare work <- ships',
        "",
        "LAUNCH, by row_fwd in bfloat16 at 1 sizes; Some GPU, Triton 3.6.0",
        '    (float("inf"), 4096, 8),  # 0.80 of the bare work <- ships',
    ]


@swept_here
def test_a_launch_that_fails_in_a_process_of_its_own_is_named(sweep, monkeypatch):
    """What a GPU's context would not survive happens elsewhere first: here with launches that no GPU could run."""
    kernel = sweep.KERNELS["row_fwd"]._replace(launches=((1000, 4), (1024, 4)), shipped=lambda t: None)
    monkeypatch.setitem(sweep.KERNELS, "row_fwd", kernel)
    monkeypatch.setattr(sweep, "AHEAD_ROWS", 2)
    reasons = sweep.compiled_ahead("row_fwd", 257, "float32", sample_of(sweep, "row_fwd", 2, 257))
    assert list(reasons) == [(1000, 4)] and "1000x4" in reasons[1000, 4]


@swept_here
def test_a_launch_that_hangs_costs_the_others_no_time(sweep, monkeypatch):
    """Each compiles and answers in a process of its own, which is ended."""
    monkeypatch.setattr(sweep, "AHEAD_SECONDS", 0.01)
    found = sweep.compiled_ahead("row_fwd", 257, "float32", sample_of(sweep, "row_fwd", 2, 257), ((1024, 4),))
    assert found == {(1024, 4): "more than 0.01 s to compile and answer"}


@swept_here
def test_a_process_of_a_sweep_holds_its_weight_in_the_weights_dtype(sweep, monkeypatch):
    """Several at a time have to fit a GPU: no copy of the whole weight in float32 or float64."""
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                largest = max(largest, x.untyped_storage().nbytes() if isinstance(x, torch.Tensor) else 0)
            return out

    monkeypatch.setattr(sys.modules["swept_kernels"], "CHUNK", 256)
    with Sizes():
        t = sweep.products(2, shapes.Head("small", 2, 512, 4096), torch.bfloat16, torch.device("cpu"))
    assert largest == t.weight.untyped_storage().nbytes() == 2 * 512 * 4096


# the call on a machine with a GPU: its steps by a python that only says what it was asked for


STUB = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
echo "$TORCHINDUCTOR_COMPILE_THREADS $HF_HUB_OFFLINE" >> "$CALLS.env"
[[ -n "${HANGS:-}" && "$*" == *$HANGS* ]] && trap '' INT TERM && exec sleep 60
[[ -n "${ABORTS:-}" && "$*" == *$ABORTS* ]] && kill -ABRT $$
case "$*" in
  *FAILS*) exit 3 ;;
  *get_device_capability*) echo 90 ;;
  *"-m pip"*bad.whl*) exit 1 ;;
  *"-m pip"*finealign_kernels-1.whl) mkdir -p "${STATE}/site/finealign_kernels" ;;
  *"import _C"*) [ -n "${NO_EXTENSION:-}" ] && exit 1 ;;
  *test_row_logprobs_triton*)
    [ -n "${KILLED:-}" ] && kill -9 "$(ps -o ppid= -p "$PPID")"
    [ -n "${SLOW:-}" ] && exit 124 ;; # as timeout does
  *test_gpu.py*nothing_waits*) [ -n "${BROKEN:-}" ] && exit 1 ;;
  "bench/gather.py"*) exec REAL "$@" ;;
esac
for word in "$@"; do
  [ "${before:-}" = --json ] && echo '[{"median_s": 1}]' > "$word"
  before=$word
done
exit 0
"""


@pytest.fixture
def session(tmp_path, monkeypatch):
    """session(**environment) -> exit status, what it printed, what python was asked for."""
    if not sys.platform.startswith("linux"):
        pytest.skip("a Linux machine's script")
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python3").write_text(STUB.replace("REAL", sys.executable))
    (folder / "python3").chmod(0o755)
    script = Path(__file__).parents[2] / "bench/gpu_session.sh"

    def call(**environment):
        calls = tmp_path / "calls"
        calls.write_text("")
        given = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls), "DEVICE": "cpu", "HOME": str(tmp_path)}
        given |= {"STATE": str(tmp_path / "state"), "OUT": str(tmp_path / "out"), **environment}
        done = subprocess.run(["bash", script], env=given, capture_output=True, text=True, timeout=100)
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()

    call.out, call.state, call.bin = tmp_path / "out", tmp_path / "state", folder
    return call


def test_a_call_on_a_gpu_machine_is_whole_and_goes_on_where_it_was_cut(session):
    status, told, calls = session()
    assert status == 0, told
    assert any("rl sequence policy segments --size small" in call for call in calls)
    first = [call for call in calls if call.startswith(("bench/ceilings.py", "bench/apart.py", "-m pytest"))]
    assert first[0].startswith("bench/ceilings.py") and "race_head_dense.json head" in first[1]
    rows = json.loads((session.out / "results.json").read_text())
    assert {"ceilings", "race_head_dense", "profile", "race_rest", "sweep_forward"} <= {row["step"] for row in rows}
    assert sorted(file.name for file in session.out.iterdir()) == ["results.json", "session.log", "state.tgz"]
    assert "===== ceilings.log" in (session.out / "session.log").read_text()
    # one pool of compilers a test process would be 16 for each of eight; nothing asks a network
    assert set((session.state.parent / "calls.env").read_text().splitlines()[3:]) == {"1 1"}
    status, told, calls = session()  # only the installation, which another machine may lack
    assert status == 0 and told.count("done before") == len(list(session.state.glob("*.done"))) - 1
    assert not any(call.startswith(("-m pytest", "bench/apart.py")) for call in calls)


SMI = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case "$*" in
  *-lms*) echo $$ > "$CALLS.pid"; exec sleep 60 ;; # writes clocks until it is killed
  *) echo 90000 ;; # MiB that a killed process has not given back
esac
"""
SANITIZER = """#!/usr/bin/env bash
while [ "$1" != python3 ]; do shift; done
exec "$@"
"""


def test_the_same_call_on_a_gpu(session):
    """Its branch, with stubs of the programs: real shapes, half precision, -m gpu, a clock log that ends with it."""
    for name, text in (("nvidia-smi", SMI), ("compute-sanitizer", SANITIZER), ("sleep", "#!/usr/bin/env bash\n")):
        (session.bin / name).write_text(text if name != "sleep" else text + '[ "$1" = 1 ] || exec /bin/sleep "$@"\n')
        (session.bin / name).chmod(0o755)
    status, told, calls = session(DEVICE="cuda", ABORTS="race_rest")
    assert status == 1 and "== 90000 MiB of the GPU's memory are in use" in told, told
    (rest,) = [call for call in calls if "race_rest" in call]
    assert "rl sequence policy segments --size models" in rest and "--shape 1 of a million" in rest
    (dense,) = [call for call in calls if "race_head_dense" in call]
    assert "--dtype bfloat16 --size models --no-memory --shape Llama-3-8B" in dense and "--device cuda" in dense
    assert all("-m gpu" in call for call in calls if "test_gpu.py" in call and "sanitizer" not in call)
    assert any("sanitizer and cuda" in call for call in calls) and len(list(session.state.glob("*.done"))) == 14
    with pytest.raises(ProcessLookupError):
        os.kill(int((session.state.parent / "calls.pid").read_text()), 0)


def test_nothing_is_tried_where_torch_finds_no_gpu(session):
    (session.bin / "python3").write_text("#!/usr/bin/env bash\nexit 1\n")
    status, told, _ = session(DEVICE="cuda")
    assert status == 100 and "after" not in told


def test_a_failed_step_is_counted_and_repeated_when_asked(session):
    status, told, calls = session(BROKEN="1")
    assert status == 1 and "FAILED (1)" in told and any("race_head_dense.json head" in call for call in calls)
    status, told, calls = session()
    assert status == 1 and "tests_gpu: FAILED before" in told and not any("nothing_waits" in call for call in calls)
    status, told, calls = session(RETRY="1")
    assert status == 0 and any("nothing_waits" in call for call in calls)


def test_a_step_out_of_time_is_tried_again_by_another_call(session):
    status, told, _ = session(SLOW="1")
    assert status == 1 and "FAILED (124)" in told and not (session.state / "tests_rows.failed").exists()
    status, told, calls = session()
    assert status == 0 and "tests_gpu: done before" in told and any("test_row_logprobs" in call for call in calls)


def test_steps_without_time_are_left_for_another_call(session):
    status, told, calls = session(BUDGET="0")
    assert status == told.count("left for another call") > 10 and "== install: left for another call" in told
    assert not any(call.startswith(("-m pytest", "-m pip", "bench/apart.py", "bench/ceilings.py")) for call in calls)


STEPS = {"race_head_dense.json head": "race_head_dense", "nothing_waits": "tests_gpu"}  # words of it, its name


@pytest.mark.parametrize("words, name", STEPS.items(), ids=STEPS.values())
def test_a_step_that_hangs_is_killed_and_costs_no_other(session, words, name):
    """It takes no signal but the last. The next call takes what had no turn first, and then this one again."""
    status, told, _ = session(**{"HANGS": words, f"LIMIT_{name}": "1", "GRACE": "0.1"})
    assert status == 1 and "FAILED (137)" in told and told.count("FAILED") == 1, told
    assert (session.state / f"{name}.late").exists() and "left for another" not in told
    steps = {row["step"] for row in json.loads((session.out / "results.json").read_text())}
    assert {"ceilings", "race_head_dense", "race_rest", "sweep_forward"} - {name} <= steps
    (session.state / "tests_rows.done").unlink()
    status, told, _ = session()
    assert status == 0 and told.index("== tests_rows, after") < told.index(f"== {name}, after")


@pytest.mark.parametrize("words, name", STEPS.items(), ids=STEPS.values())
def test_a_step_that_dies_costs_no_other(session, words, name):
    status, told, _ = session(ABORTS=words)
    assert status == 1 and "FAILED (134)" in told and told.count("FAILED") == 1 and f"{name}, after" in told
    assert len(list(session.state.glob("*.done"))) == len(re.findall("(?m)^== .*, after", told)) - 1


def test_what_an_earlier_try_has_measured_stays(session):
    session()
    (session.state / "race_rest.done").unlink()
    (session.state / "race_rest.json").write_text('[{"median_s": 7}]')
    session()
    rows = json.loads((session.out / "results.json").read_text())
    assert [row["median_s"] for row in rows if row["step"].startswith("race_rest")] == [7, 1]


def test_a_call_goes_on_without_an_extension_that_cannot_be_imported(session):
    status, told, calls = session(NO_EXTENSION="1")
    assert status == 0 and "on without it" in told and any("race_head_dense.json head" in call for call in calls)


def test_where_nothing_can_be_installed_a_copy_of_the_checkout_races(session):
    status, told, calls = session(BUILD="python3 FAILS", NO_EXTENSION="1")
    assert status == 1 and calls[0] == "FAILS" and "on with a copy of the checkout" in told
    assert any("race_head_dense.json head" in call for call in calls)
    site = session.state / "site"
    whole = "from finealign_kernels import kernels; import finealign_kernels as fk; print(fk.linear_logprobs, kernels)"
    done = subprocess.run(
        [sys.executable, "-c", whole],
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(site), "FINEALIGN_REQUIRE_NATIVE": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and str(site) in done.stdout, done.stderr


def test_a_wheel_that_does_not_fit_keeps_no_other_out(session, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("bad.whl", "finealign_kernels-1.whl", "trl-1.whl"):
        (wheels / name).touch()
    status, told, calls = session(WHEELS=str(wheels))
    assert status == 1 and f"on without {wheels}/bad.whl" in told and "copy of the checkout" not in told
    alone = [call.rpartition("/")[2] for call in calls if "-m pip" in call][1:]
    assert alone == ["bad.whl", "finealign_kernels-1.whl", "trl-1.whl"]
    (wheels / "bad.whl").unlink()
    status, told, _ = session(WHEELS=str(wheels), RETRY="1")
    assert status == 0 and "on without" not in told


def test_a_call_that_is_killed_leaves_the_rows_it_had(session):
    """Not even a trap runs: results are gathered after every step. What comes back are few files in one folder."""
    status, told, _ = session(KILLED="1")
    assert status == -9 and "== tests_rows" in told
    rows = json.loads((session.out / "results.json").read_text())
    assert {"ceilings", "race_head_dense", "race_rest", "sweep_forward"} <= {row["step"] for row in rows}
    assert sorted(file.name for file in session.out.iterdir()) == ["results.json", "session.log", "state.tgz"]


def test_the_guide_says_how_long_each_step_may_take():
    root = Path(__file__).parents[2]
    script, guide = ((root / path).read_text() for path in ("bench/gpu_session.sh", "docs/guides/gpus.md"))
    steps = re.findall(r"^ *(step|race|tests) (\w+) (\d+) ", script, re.M)
    bounds = [(name if kind == "step" else f"{kind}_{name}", int(seconds)) for kind, name, seconds in steps]
    assert re.findall(r"^\| `(\w+)` \| (\d+) \|", guide, re.M) == [(name, str(seconds)) for name, seconds in bounds]


# a race that a rival breaks goes on without it


BREAKS = """
import faulthandler, os, sys
sys.path.insert(0, BENCH)
import cases, dataclasses, rivals, run

later, armed = faulthandler.dump_traceback_later, []
faulthandler.dump_traceback_later = lambda seconds, exit: armed.append((seconds, exit))

def hangs(x):
    assert armed[-1] == (600.0, True)
    later(0.1, exit=armed[-1][1])
    while True:
        pass

kept = [rival for rival in rivals.HEAD if rival.name in ("eager", "ours")]
bad = [rivals.Rival("dies", lambda x: os.abort(), cases=("dense",)), rivals.Rival("hangs", hangs)]
if sys.argv.pop(1) == "ours":
    right = kept[1].call
    ours = lambda x: os.abort() if x.weight.requires_grad else right(x)
    kept, bad = [kept[0], rivals.Rival("ours", ours)], []
cases.SUITES["head"] = dataclasses.replace(cases.SUITES["head"], rivals=(kept[0], *bad, kept[1]))
sys.exit(run.main())
"""


@pytest.fixture
def apart(tmp_path, monkeypatch):
    """apart(planted) -> exit status and rows: the head's first three races, by a run.py with planted rivals."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    apart = importlib.import_module("apart")
    script = tmp_path / "breaks.py"
    script.write_text(BREAKS.replace("BENCH", repr(str(Path(__file__).parents[2] / "bench"))))

    def call(planted):
        monkeypatch.setattr(apart, "RUN", script)
        target = tmp_path / "rows.json"
        races = [planted, "head", "--size=small", "--dtype=float32", "--no-memory", "--rounds=2"]
        status = apart.main(["600", "--json", str(target), *races, "--case=dense", "--case=frozen"])
        assert [file.name for file in tmp_path.iterdir() if file.name.startswith("rows")] == ["rows.json"]
        return status, json.loads(target.read_text())

    return call


def test_a_race_goes_on_without_the_rival_that_broke_its_process(apart, capfd):
    status, rows = apart("rivals")
    assert status == 1
    raced = [(row["case"], row["impl"], row["rounds"]) for row in rows]
    assert raced == [(case, name, 2) for case in ("dense", "frozen") for name in ("eager", "ours")]
    told = capfd.readouterr().err
    assert "dies broke race 1 (exit status -6)" in told and "hangs broke race 1 (exit status 1)" in told
    assert "in hangs" in told  # where it waited


def test_where_ours_breaks_a_race_the_next_is_run(apart, capfd):
    status, rows = apart("ours")
    assert status == 1
    raced = [(row["case"], row["impl"], row["rounds"]) for row in rows]
    assert raced == [("dense", "eager", 1), ("frozen", "eager", 2), ("frozen", "ours", 2)]
    assert "ours broke race 1, which is left" in capfd.readouterr().err


def test_a_race_by_itself_is_as_run_says(tmp_path, monkeypatch, capfd):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    apart = importlib.import_module("apart")
    assert apart.main(["600", "--json", str(tmp_path / "rows.json"), "head", "--rival", "nobody"]) == 2
    assert "--rival must be among" in capfd.readouterr().err and apart.main(["600"]) == 2


# a test that breaks the GPU's context


CONTEXT = """
import sys
sys.path.insert(0, TESTS)
import gpu_context
from gpu_context import pytest_runtest_logfinish, pytest_runtest_makereport

hit = []
gpu_context.is_broken = lambda: bool(hit)
"""
CONTEXT_TESTS = """
import pytest, conftest

@pytest.mark.parametrize("n", range(4))
def test_one(n):
    if n == 0:
        conftest.hit.append(n)
    assert not conftest.hit
"""


@pytest.mark.parametrize("processes", [(), ("-n1",)], ids=["one process", "workers"])
def test_a_test_that_breaks_the_gpu_takes_no_other_along(processes, tmp_path):
    (tmp_path / "conftest.py").write_text(CONTEXT.replace("TESTS", repr(str(Path(__file__).parents[1]))))
    (tmp_path / "test_them.py").write_text(CONTEXT_TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *processes, "test_them.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and "FAILED test_them.py::test_one[0]" in done.stdout, done.stdout
    assert "FAILED test_them.py::test_one[1]" not in done.stdout
    assert "its context is broken" in done.stdout
    assert ("3 passed" in done.stdout) == bool(processes), done.stdout


def test_the_session_sweeps_the_launch_that_ships():
    """At the size of the races: the goal of the forward is that launch's."""
    heads = pytest.importorskip("finealign_kernels.kernels.linear_logprobs")
    script = (Path(__file__).parents[2] / "bench/gpu_session.sh").read_text()
    launches = [tuple(map(int, launch.split(","))) for launch in re.findall(r"--launch ([\d,]+)", script)]
    from swept_kernels import numbers

    assert {numbers(heads.config("sm_90", torch.bfloat16, False))} <= set(launches)
    (race,) = [shape for shape in shapes.HEAD["models"] if shape.model == "Llama-3-8B"]
    assert f"--rows {race.N} " in script


def test_every_word_that_the_session_chooses_tests_by_is_one_of_theirs():
    """A test that gets another name would be left out without a word."""
    root = Path(__file__).parents[2]
    script = (root / "bench/gpu_session.sh").read_text().replace("\\\n", " ")
    chosen = re.findall(r"(tests/kernels/test_\w+\.py)[^\n]*? -k (\"[^\"]+\"|\w+)", script)
    assert len(chosen) == 4
    for file, words in chosen:
        text = (root / file).read_text()
        names = re.findall(r"^def (test_\w+)|\"(\w[^\"]*)\"", text, re.M)  # and of what they are parametrized over
        for word in set(re.findall(r"\w+", words)) - {"and", "or", "cuda"}:
            assert any(word in test or parameter.startswith(word) for test, parameter in names), f"{word} in {file}"


def test_a_broken_context_is_seen(monkeypatch):
    gpu_context = importlib.import_module("gpu_context")
    assert not gpu_context.is_broken()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for error in (None, torch.AcceleratorError("an illegal memory access was encountered")):
        monkeypatch.setattr(torch.cuda, "synchronize", raises(error))
        assert gpu_context.is_broken() == run.broken(torch.device("cuda")) == (error is not None)


def raises(error):
    def call(*device):
        if error is not None:
            raise error

    return call


# latencies by arithmetic


@pytest.fixture
def latency(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    return importlib.import_module("latency")


def test_the_latency_model_knows_the_kernels_sizes(latency):
    root = Path(__file__).parents[2]
    files = [root / "csrc/launch.h", *sorted((root / "kernels/cuda").glob("*.cuh"))]
    said = dict(re.findall(r"constexpr (?:int|int64_t) k(\w+) = (\d+);", "".join(file.read_text() for file in files)))
    for name in ("CHUNK", "PIECE", "SPREAD", "FEW", "WARPS", "LANES", "AHEAD"):
        assert int(said[name.capitalize()]) == getattr(latency, name), name
    assert latency.THREADS == latency.WARPS * latency.LANES


def test_the_latency_model_counts_waves_and_rounds(latency):
    assert latency.Kernel(264, 2, 1, 2, 3).seconds() == pytest.approx(2e-6 + 7 * 0.6e-6)
    assert latency.Kernel(265, 2, 1, 2, 3).seconds() == pytest.approx(2e-6 + 14 * 0.6e-6)
    for op, shapes_ in latency.SHAPES.items():
        kernels, width = latency.OPS[op]
        for count, length in shapes_:
            assert latency.seconds(op, count, length) >= width * count * length / 3e12
            few = [kernel for kernel in kernels(count, length) if kernel.blocks < 32 and kernel.rounds > 8]
            assert not few, f"{op} {count} x {length}: {few} leaves a GPU idle"
    one_block = latency.Kernel(1, 2, 2, 1, 1024)  # a million tokens in rounds of 1024
    assert one_block.seconds() > 20 * latency.seconds("gae", 1, 1 << 20)
    row = {"suite": "rl", "case": "gae-large", "impl": "ours", "shape": [1024, 1024 * 4096], "queued_s": 3.1e-5}
    assert "| `gae` | 1024 × 4096 | 1 | 24 | 31 |" in latency.table([row]).splitlines()


@pytest.mark.parametrize("count, length", [(32, 32768), (1, 1 << 20)])
def test_few_long_sequences_fill_every_multiprocessor(count, length, latency):
    """What walks tokens does; what combines their sums waits for few loads instead."""
    for op, (kernels, _) in latency.OPS.items():
        found = kernels(count, length)
        walks = [kernel for kernel in found if kernel.blocks >= 0.95 * latency.MULTIPROCESSORS]
        assert walks, f"{op}: {found} leaves multiprocessors idle"
        combines = [kernel for kernel in found if kernel not in walks]
        assert all(kernel.first + kernel.rounds * kernel.each <= 12 for kernel in combines), (op, combines)


# goals as ratios to what the same run timed


@pytest.fixture
def goals(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    return importlib.import_module("goals")


def gpu_rows(slower=1.0):
    """A dense and a pivot race at two shapes, times of the GPU and of a call, a sweep, and rows of other steps."""
    common = {"suite": "head", "device": "cuda", "versions": {"machine": "Some GPU 80GB"}}
    rows = [{"ceiling": "copy", "median_s": 1.0}, {"profile": "ours", "kernel": "gemm", "seconds": 1.0}]
    for shape, scale in (([96, 64, 3001], 10.0), ([8192, 4096, 128256], 1.0)):
        for case, impl, seconds in (
            ("dense", "gemm3", 10),
            ("dense", "ours", 12 * slower),
            ("dense", "fused", 11 * slower),
            ("dense", "trl", 15),
            ("pivots20", "trl", 26),
            ("pivots20", "ours", 10),
        ):
            row = {"case": case, "impl": impl, "shape": shape, "queued_s": seconds * (scale if impl != "trl" else 1)}
            rows.append({**common, **row, "median_s": 99.0})
    common = {"kernel": "head_fwd_tma"}
    for launch, share, shipped in (([128], 0.7, False), ([256], 0.81, True), ("bare", 1.0, False)):
        rows.append({**common, "launch": launch, "share_of_bare": share, "shipped": shipped})
    return [*rows, {**common, "launch": [512], "failed": "no room"}]


def test_goals_are_ratios_of_one_run(goals):
    lines = goals.table([gpu_rows(), gpu_rows(slower=1.2)]).splitlines()
    assert lines[0] == "| | goal | estimate (H100) | Some GPU 80GB | Some GPU 80GB |"
    assert len(lines) == 2 + len(goals.GOALS)
    assert [line.split(" | ")[-2:] for line in lines[2:6]] == [
        ["0.81", "0.81 |"],  # the launch that ships
        ["1.10", "1.32, missed |"],  # the faster layer, at the larger shape, by the time on the GPU
        ["1.36", "1.14, missed |"],
        ["2.60", "2.60 |"],
    ]
    assert lines[6].endswith("| not timed | not timed |")
    assert goals.table([]).count("not yet run on a GPU") == len(goals.GOALS)


def test_of_several_tries_the_one_with_most_rounds_counts(goals):
    """A retry stands beside what it repeats; a race that broke has single rounds."""
    row = {"suite": "head", "case": "dense", "impl": "ours", "shape": [8, 4, 16]}
    tries = [(9.0, 3), (5.0, 3), (1.0, 1)]
    rows = [{**row, "queued_s": seconds, "rounds": rounds} for seconds, rounds in tries]
    assert goals.time_of(rows, "head", "dense", "ours") == 5.0
    assert goals.time_of([*rows, {**row, "impl": "fused", "queued_s": 4.0}], "head", "dense", "ours", "fused") == 4.0


def test_one_command_takes_results_into_the_pages(goals, tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "bench/results").mkdir(parents=True)
    page, results = tmp_path / "docs/status.md", tmp_path / "results.json"
    page.write_text("before\n<!-- goals -->\n" + goals.table([]) + "<!-- /goals -->\nbehind\n")
    results.write_text(json.dumps(gpu_rows()))
    for _ in range(2):  # the same again changes nothing
        goals.main([str(results), "--root", str(tmp_path)])
        assert page.read_text() == (
            "before\n<!-- goals -->\n" + goals.table([gpu_rows()]) + "<!-- /goals -->\nbehind\n"
        )
    (written,) = (tmp_path / "bench/results").rglob("*.json")
    assert written == tmp_path / "bench/results/gpu-some-gpu-80gb/session.json"
    page.write_text("no table")
    with pytest.raises(ValueError, match="has no <!-- goals -->"):
        goals.main([str(results), "--root", str(tmp_path)])


def test_results_of_a_dry_run_on_a_cpu_are_not_published(goals, tmp_path):
    (tmp_path / "bench/results").mkdir(parents=True)
    results = tmp_path / "results.json"
    results.write_text(json.dumps([{**row, "device": "cpu"} for row in gpu_rows()]))
    with pytest.raises(ValueError, match=r"results.json must hold races on a GPU alone, got devices \['cpu'\]"):
        goals.main([str(results), "--root", str(tmp_path)])
    assert not [*(tmp_path / "bench/results").iterdir()]


def test_the_vocabulary_parallel_head_races_on_gloo_ranks(tmp_path, capsys):
    """Answers are compared before anything is timed; rows of both ranks are written."""
    path = tmp_path / "tp.json"
    size = ["--rows", "40", "--depth", "16", "--vocab", "301", "--rounds", "1"]
    assert run.main(["tp", *size, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert [row["ranks"] for row in rows] == [2, 2] and "materialised" in rows[0]["difference"]
    for row in rows:  # which of verl's and TRL's heads race depends on what is installed
        assert set(row["seconds"]) == {"ours", *row["difference"]} and all(row["seconds"].values())
        assert all(0 <= value < 1e-5 for value in row["difference"].values()) and min(row["time_ratio"].values()) > 0
    assert "GPU: not yet run" in capsys.readouterr().out


def test_whole_steps_of_a_trainer_race(tmp_path, capsys):
    """Three ways of DPO in TRL; answers are compared before anything is timed."""
    pytest.importorskip("trl")
    path = tmp_path / "step.json"
    assert run.main(["step", "--model", "tiny", "--rounds", "1", "--batch", "2", "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())
    assert row["difference"] < 1e-4 and set(row["seconds"]) == {"stock", "patched", "fine-grained"}
    assert all(value > 0 for value in row["time_to_stock"].values()) and row["sequences"] == 4
    assert "GPU: not yet run" in capsys.readouterr().out


def test_whole_steps_that_differ_are_not_timed():
    import step

    right = {"stock": (0.6931472, 2.0), "patched": (0.6931472, 2.0), "fine-grained": (0.6931472, 1.0)}
    assert step.compare(right) == 0
    for wrong in ({"patched": (0.6931472, 2.001)}, {"fine-grained": (0.7, 1.0)}):
        with pytest.raises(RuntimeError, match="nothing timed"):
            step.compare(right | wrong)

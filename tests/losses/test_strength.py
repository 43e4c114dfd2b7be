"""Preference strength: golden values of section 6.2, streaming, selection; the command that writes columns."""

import json

import pytest
import torch
from torch.testing import assert_close

import finealign_kernels as fk
from finealign_kernels import report
from finealign_kernels.cli import main
from finealign_kernels.losses import reward
from finealign_kernels.losses import strength as module
from finealign_kernels.strength import columns_of

F64 = torch.float64
PAIRS = [[1.2, 0.8, 1.5, 0.9], [0.1, -0.2, 0.05, 0.15], [-1, -0.6, -1.3, -0.7]]  # of 4 models
D = torch.tensor(PAIRS, dtype=F64).T
GOLDEN = dict(
    mean=[1.1, 0.025, -0.9],
    std=[0.2738612788, 0.1346291202, 0.2738612788],
    vote=[1, 0.75, 0],
    soft=[0.7467558109, 0.506268108, 0.29231559],
)


def test_golden():
    found = fk.preference_strength(D)
    for name, values in GOLDEN.items():
        assert_close(getattr(found, name), torch.tensor(values, dtype=F64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", (1e-300, 1.0, 1e155, 1.5e308))
def test_differences_of_any_size(size):
    """Finite ones have a finite mean and deviation: neither a difference of two nor a square overflows in between."""
    d = torch.tensor([[1, 1, -1, 0.5], [-1, 1, -1, 0.25], [0.5, 1, 1, -1]], dtype=F64)
    found, expected = fk.preference_strength(d * size), fk.preference_strength(d)
    for name in ("mean", "std"):
        assert_close(getattr(found, name), getattr(expected, name) * size, rtol=1e-14, atol=1e-15 * size)
    assert_close(expected.std, d.std(0, unbiased=False), rtol=1e-14, atol=1e-15)


def test_models_are_let_go_one_by_one():
    """A generator sees each of its tensors freed before the one after the next is made."""
    import weakref

    alive, most = [], 0

    def models():
        nonlocal most
        for d in D:
            one = d.clone()
            alive.append(weakref.ref(one))
            most = max(most, sum(ref() is not None for ref in alive))
            yield one
            del one

    found = fk.preference_strength(models())
    assert_close(found, fk.preference_strength(D))
    assert most <= 2


def test_dtypes_and_few_models():
    assert fk.preference_strength(D.float()).mean.dtype == torch.float32
    assert fk.preference_strength(D.bfloat16()).std.dtype == torch.float32
    one = fk.preference_strength(D[:1])
    assert (one.std == 0).all() and one.vote.tolist() == [1, 1, 0]
    assert len(fk.preference_strength(D[:, :0]).mean) == 0
    far = fk.preference_strength(torch.tensor([[1e8], [1e8 + 1]], dtype=F64))
    assert_close(far.std.item(), 0.5)  # a sum of squares would have lost it


def test_selection():
    found = fk.preference_strength(torch.tensor([[0.3, -1.0, 0.0, -1.0, 2.0, -0.0]], dtype=F64))
    assert found.vote.tolist() == [1, 0, 0, 0, 1, 0]  # a difference of 0 is no vote
    assert found.weakest().tolist() == [False, True, False, True, False, False]
    assert found.weakest(20).nonzero()[:, 0].tolist() == [1]  # floor(1.2) of two equal ones: the first
    assert found.weakest(34).nonzero()[:, 0].tolist() == [1, 3]
    assert found.weakest(0).sum() == 0 and found.weakest(100).all()
    assert found.weight(34).tolist() == [1, 0, 1, 0, 1, 1]
    many = fk.preference_strength(torch.randn(3, 100))
    assert [int(many.weakest(p).sum()) for p in (7, 29, 57)] == [7, 29, 57]  # 0.57 * 100 < 57 in floats


def test_strength_is_what_the_losses_read():
    found = fk.preference_strength(D)
    scores = torch.tensor([1.4, 0.3, -0.2], dtype=F64), torch.tensor([0.9, 0.35, 0.5], dtype=F64)
    for name, options, loss in (
        ("adaptive_margin", dict(strength=found.mean), 0.7889923202),
        ("flip", dict(flip=found.weakest()), 0.5319075604),
        ("soft_label_vote", dict(label=found.soft), 0.6340930313),
    ):
        assert_close(fk.reward_loss(name, scores, **options).loss.item(), loss, rtol=0, atol=1e-9)
    assert reward.REWARD and module.Strength is fk.Strength


@pytest.mark.parametrize(
    "differences, message",
    [
        (D[0], r"differences must have shape \(M, N\)"),
        ([], "at least one model"),
        ([D[0], D[0, :2]], r"differences\[1\] must have shape"),
        (torch.tensor([[1.0, torch.inf]]), r"differences\[0\] must hold finite numbers"),
    ],
)
def test_refusals(differences, message):
    with pytest.raises(ValueError, match=message):
        fk.preference_strength(differences)


# the command


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_command_writes_columns_and_draws(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [dict(id=f"p{i}é", differences=d) for i, d in enumerate(PAIRS)])
    out, page = tmp_path / "out.jsonl", tmp_path / "page.html"
    assert main(["strength", source, "--out", str(out), "--report", str(page), "--scale", "0.5", "--clamp", "0.4"]) == 0
    rows = read(out)
    assert [row["id"] for row in rows] == ["p0é", "p1é", "p2é"] and rows[0]["differences"] == PAIRS[0]
    for column, name in (("strength", "mean"), ("strength_std", "std"), ("vote", "vote"), ("soft_label", "soft")):
        assert [row[column] for row in rows] == pytest.approx(GOLDEN[name], abs=1e-9)
    assert [row["margin"] for row in rows] == pytest.approx([0.4, 0.0125, -0.4])
    assert [row["flip"] for row in rows] == [False, False, True] and {row["weight"] for row in rows} == {1.0}
    assert "3 pairs, 4 models" in capsys.readouterr().out
    text = page.read_text()
    assert text.count('class="point"') == 3 and text.count('class="box"') == 40


def test_command_reads_a_file_a_model(tmp_path):
    """The same pairs as scores, two models in one file, two in files of their own."""
    first = [dict(prompt=i, chosen_scores=[d[0] + 1, d[1]], rejected_scores=[1, 0]) for i, d in enumerate(PAIRS)]
    more = [[dict(chosen_score=d[m], rejected_score=0) for d in PAIRS] for m in (2, 3)]
    names = [write(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate([first, *more])]
    out = tmp_path / "out.jsonl"
    assert main(["strength", *names, "--out", str(out), "--flip", "34", "--drop", "67"]) == 0
    rows = read(out)
    assert [row["strength"] for row in rows] == pytest.approx(GOLDEN["mean"], abs=1e-9)
    assert [row["prompt"] for row in rows] == [0, 1, 2]
    assert [row["flip"] for row in rows] == [False, False, True] and [row["weight"] for row in rows] == [1, 0, 0]


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_command_reads_and_writes_tables(tmp_path, ending):
    pytest.importorskip("datasets")
    source = write(tmp_path / "in.jsonl", [dict(text="a", differences=d) for d in PAIRS])
    table, out = tmp_path / f"t.{ending}", tmp_path / "out.jsonl"
    assert main(["strength", source, "--out", str(table)]) == 0
    assert main(["strength", str(table), "--out", str(out), "--difference", "strength"]) == 0
    rows = read(out)
    assert rows[0]["text"] == "a" and [row["strength"] for row in rows] == pytest.approx(GOLDEN["mean"], abs=1e-9)


@pytest.mark.parametrize(
    "rows, options, message",
    [
        ([dict(score=1)], [], "pair 1: expected chosen_score"),
        ([dict(difference=1), dict(difference=[1, 2])], [], "numbers of 2 models, the ones before it of 1"),
        ([dict(difference=float("nan"))], [], "must be a finite number"),
        ([dict(difference=True)], [], "must be a finite number"),
        ([dict(difference=10**400)], [], "must be a finite number of at most 3.4e+38 in size"),
        ([dict(chosen_score=1e308, rejected_score=-1e308)], [], "must be a finite number of at most 3.4e+38 in size"),
        ([dict(chosen_scores=[1, 2], rejected_scores=[1])], [], "2 chosen and 1 rejected scores"),
        ([], [], "holds no pair"),
        ([dict(difference=1)], ["--flip", "101"], "--flip must be a percentage"),
        ([dict(difference=1)], ["--clamp", "0"], "--clamp must be above 0"),
        ([[1]], [], "line 1: expected an object"),
    ],
)
def test_command_says_what_is_wrong(tmp_path, capsys, rows, options, message):
    assert main(["strength", write(tmp_path / "in.jsonl", rows), *options]) == 2
    assert message in capsys.readouterr().err


def test_command_refuses_files_that_do_not_match(tmp_path, capsys):
    one, two = (write(tmp_path / f"{n}.jsonl", [dict(difference=1)] * n) for n in (1, 2))
    assert main(["strength", one, two]) == 2 and "1.jsonl has fewer pairs" in capsys.readouterr().err
    assert main(["strength", one, "--out", one]) == 2 and "another file" in capsys.readouterr().err
    assert main(["strength", "missing.jsonl"]) == 2 and "no such file" in capsys.readouterr().err
    assert columns_of and read(tmp_path / "1.jsonl") == [dict(difference=1)]


def test_command_writes_over_nothing_it_reads_or_writes(tmp_path, capsys):
    one, page = write(tmp_path / "1.jsonl", [dict(difference=1, vote=7)]), str(tmp_path / "page.html")
    for options, message in (
        (["--report", one], "--report must be another file than the ones read"),
        (["--out", page, "--report", page], "--report must be another file than --out"),
        (["--out", str(tmp_path / "none" / "out.jsonl")], "--out must be a file in a directory that exists"),
        (["--report", str(tmp_path)], "--report must be a file in a directory that exists"),
    ):
        assert main(["strength", one, *options]) == 2 and message in capsys.readouterr().err
    assert read(tmp_path / "1.jsonl") == [dict(difference=1, vote=7)] and len(list(tmp_path.iterdir())) == 1
    assert main(["strength", one, "--out", page]) == 0
    assert "replaces the columns vote of the file" in capsys.readouterr().out


def test_command_reads_what_editors_write(tmp_path, capsys):
    """A byte order mark is no part of the first row; text that is not UTF-8 is refused with its line."""
    path, row = tmp_path / "in.jsonl", json.dumps(dict(difference=1, text="é"), ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + f"{row}\r\n{row}\r\n".encode())
    assert main(["strength", str(path)]) == 0 and "2 pairs, 1 models" in capsys.readouterr().out
    path.write_bytes(f"{row}\n".encode() + f"{row}\n".encode("latin-1"))
    assert main(["strength", str(path)]) == 2 and "line 2: not UTF-8" in capsys.readouterr().err


def test_distributions_of_one_value():
    page = report.distributions("t", [report.Histogram("h", [1.0, 1.0]), report.Scatter("s", [1.0], [0.0], "a", "b")])
    assert "1: 2</title>" in page or ": 2</title>" in page
    assert "NaN" not in page and "nan" not in page

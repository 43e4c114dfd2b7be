"""Examples in the README and in docs/ run, and their tables are made from the code and from bench/results."""

import doctest
import importlib.util
import re
from pathlib import Path

import pytest
import torch

import finealign_kernels as fk

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]


def generate():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs/generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = generate()


def with_examples():
    return [path for path in PAGES if ">>>" in path.read_text()]


@pytest.mark.parametrize("path", with_examples(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_examples(path):
    torch.manual_seed(0)
    result = doctest.testfile(str(path), module_relative=False)
    assert result.attempted > 2 and result.failed == 0


def test_the_guides_have_examples():
    assert len(with_examples()) >= 9


@pytest.mark.parametrize("name", GENERATE.TABLES)
def test_a_table_is_made_from_the_code(name):
    _, make = GENERATE.TABLES[name]
    assert GENERATE.written(name) == make(), "python docs/generate.py writes the tables"


def test_the_picture_is_made_from_the_sample():
    assert GENERATE.PICTURE.read_text() == GENERATE.picture()


def test_the_readme_counts_the_losses():
    assert GENERATE.COUNTS.findall(README.read_text()) == [GENERATE.counts()]


def test_figures_of_the_readme_are_those_of_the_bench():
    import json

    rows = json.loads((ROOT / "bench/results/cpu-amd-epyc-avx512-2-threads/head.json").read_text())
    seconds = {(row["case"], row["dtype"], row["impl"]): row["median_s"] for row in rows}
    text = README.read_text()

    def to_ours(case, dtype, impl):
        return seconds[case, dtype, impl] / seconds[case, dtype, "ours-default"]

    assert f"20 % of rows with a gradient | 1 | {to_ours('active20', 'float32', 'trl'):.1f} |" in text
    assert f"the same, all rows | 1 | {to_ours('dense', 'float32', 'trl'):.1f} |" in text
    eager = to_ours("dense", "float32", "eager"), to_ours("dense", "bfloat16", "eager")
    assert "Eager PyTorch takes {:.2f} × our time with all rows and {:.2f} × in bfloat16".format(*eager) in text


def test_links_between_pages_lead_to_files():
    for path in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", path.read_text()):
            if not target.startswith("https:"):
                assert (path.parent / target).exists(), f"{path.relative_to(ROOT)} links to {target}"


def test_every_public_name_is_documented():
    reference = (ROOT / "docs/api.md").read_text()
    for name in fk.__all__:
        assert len((getattr(fk, name).__doc__ or "").strip()) > 20, f"{name} has no docstring"
        if name.isupper() or name in ("integrations",):
            continue
        assert f"::: finealign_kernels.{name}\n" in reference, f"{name} is not in docs/api.md"


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    for path in sorted((ROOT / "docs").rglob("*.md")):
        assert f" {path.relative_to(ROOT / 'docs').as_posix()}\n" in menu, f"{path} is not in mkdocs.yml"


def test_equations_of_the_tables_are_latex():
    latex = GENERATE.latex
    assert latex("-log σ(u⁺) where s = 1, else a bad e^-m") == (
        r"\(- \log\, \sigma ( u^{+} )\) where \(s = 1\), else a bad \(e^{-m}\)"
    )
    assert (
        latex("max(-A ρ', floor), floor = 1e-5") == r"\(\max ( - A \rho', \text{floor} )\), \(\text{floor} = 10^{-5}\)"
    )
    for row in (*fk.PREFERENCE.values(), *fk.POLICY.values(), *fk.REWARD.values()):
        assert latex(row.equation).isascii(), f"{row.equation}: a letter that SYMBOLS of docs/generate.py lacks"

"""The README's examples run, and its table of losses is the code's. `python tests/test_readme.py` writes the table."""

import doctest
import re
from pathlib import Path

import torch

from finealign_kernels.losses.preference import PREFERENCE

README = Path(__file__).resolve().parent.parent / "README.md"
BETWEEN = re.compile(r"(?<=<!-- losses -->\n).*?(?=<!-- /losses -->)", re.S)


def losses_table() -> str:
    lines = [
        "| name | loss of a pair | average | beta | shift | source | derived here |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in PREFERENCE.items():
        reference = "" if row.reference else ", no reference"
        average = "sum" if row.average is False else f'"{row.average}"'
        cells = (
            f"`{name}`",
            f"{row.equation}{reference}",
            average,
            f"{row.beta:g}",
            f"{row.shift:g}",
            row.source,
            row.derived,
        )
        lines.append(f"| {' | '.join(cells)} |")
    words = (
        "Here Δ = h_chosen - h_rejected, h = Σ_t w_t (logp_t - ref_logp_t), m = beta Δ - shift, u = beta h - shift.\n"
    )
    return words + "Every row takes every average.\n\n" + "\n".join(lines) + "\n"


def test_examples():
    torch.manual_seed(0)
    result = doctest.testfile(str(README), module_relative=False)
    assert result.attempted > 15 and result.failed == 0


def test_the_table_of_losses_is_the_codes():
    assert BETWEEN.search(README.read_text())[0] == losses_table()


def test_every_public_name_is_documented():
    import finealign_kernels as fk

    text = README.read_text()
    for name in fk.__all__:
        documented = (getattr(fk, name).__doc__ or "").strip()
        assert len(documented) > 20, f"{name} has no docstring"
        if name.islower() and name not in ("check_errors",):
            assert name.split("_")[0] in text, f"{name} is not in the README"


if __name__ == "__main__":
    README.write_text(BETWEEN.sub(lambda _: losses_table(), README.read_text()))

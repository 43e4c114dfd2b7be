"""The README's examples run, its tables of losses are the code's. `python tests/test_readme.py` writes the tables."""

import doctest
import re
from pathlib import Path

import pytest
import torch

from finealign_kernels.losses.policy import POLICY
from finealign_kernels.losses.preference import PREFERENCE
from finealign_kernels.losses.reward import REWARD

README = Path(__file__).resolve().parent.parent / "README.md"


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


def policies_table() -> str:
    lines = ["| name | loss of a token | reduction | options | KL | source |", "|---|---|---|---|---|---|"]
    for name, row in POLICY.items():
        options = ", ".join(f"{key} {one.default:g}" for key, one in row.hyper.items() if one.default is not None)
        cells = (f"`{name}`", row.equation, f'"{row.reduction}"', options, f"{row.kl_coef:g}", row.source)
        lines.append(f"| {' | '.join(cells)} |")
    words = (
        "Here ρ = exp(logp - old_logp) of a token; s and P are the geometric mean and the product of the ρ of its\n"
        "response; sg stops the gradient; A is the advantage. KL is the default of `kl_coef`.\n\n"
    )
    return words + "\n".join(lines) + "\n"


def rewards_table() -> str:
    lines = ["| name | loss of a pair | reads | source |", "|---|---|---|---|"]
    for name, row in REWARD.items():
        reads = ["strength"] * row.reads(None, None) + ["label"] * (row.smoothing == "label") + [*row.hyper]
        cells = (f"`{name}`", row.equation.replace("|", "\\|"), ", ".join(reads), row.source)
        lines.append(f"| {' | '.join(cells)} |")
    words = "Here d = r_chosen - r_rejected and μ is the strength of the pair, see `preference_strength`.\n\n"
    return words + "\n".join(lines) + "\n"


TABLES = {"losses": losses_table, "policies": policies_table, "rewards": rewards_table}


def between(name: str) -> re.Pattern:
    return re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.S)


def test_examples():
    torch.manual_seed(0)
    result = doctest.testfile(str(README), module_relative=False)
    assert result.attempted > 15 and result.failed == 0


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_the_codes(name):
    assert between(name).search(README.read_text())[0] == TABLES[name]()


def test_every_public_name_is_documented():
    import finealign_kernels as fk

    text = README.read_text()
    for name in fk.__all__:
        documented = (getattr(fk, name).__doc__ or "").strip()
        assert len(documented) > 20, f"{name} has no docstring"
        if name.islower() and name not in ("check_errors",):
            assert name.split("_")[0] in text, f"{name} is not in the README"


if __name__ == "__main__":
    text = README.read_text()
    for name, table in TABLES.items():
        text = between(name).sub(lambda _, table=table: table(), text)
    README.write_text(text)

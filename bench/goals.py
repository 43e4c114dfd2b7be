"""Goals of the first GPU run as ratios to what the same run timed, and where its rows go.

    python bench/goals.py                        the table, from the GPU rows in bench/results
    python bench/goals.py RESULTS.json           the results of bench/gpu_session.sh: into a folder of bench/results
                                                 with the GPU's name, and into the table of docs/status.md
    python bench/goals.py RESULTS.json --root F  the same in another checkout, F

Times are those on the GPU. Estimates are arithmetic from instructions, bytes and FLOPs of an H100, not measurements.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BETWEEN = re.compile(r"(?<=<!-- goals -->\n).*?(?=<!-- /goals -->)", re.DOTALL)


def time_of(rows: list[dict], suite: str, case: str, *names: str) -> float | None:
    """Seconds of the fastest of these, None where none was timed. Of several shapes the one with most tokens counts; of
    several tries that with most rounds, and of those the last."""
    found = [row for row in rows if (row.get("suite"), row.get("case")) == (suite, case) and row["impl"] in names]
    if not found:
        return None
    most = max(size_of(row) for row in found)
    tries = sorted((row for row in found if size_of(row) == most), key=lambda row: row.get("rounds", 0))  # stable
    return min({row["impl"]: row["queued_s"] or row["median_s"] for row in tries}.values())


def size_of(row: dict) -> int:
    return row["shape"][0] * row["shape"][1]


def to(rows: list[dict], suite: str, case: str, of: tuple[str, ...], by: str) -> float | None:
    time, other = time_of(rows, suite, case, *of), time_of(rows, suite, case, by)
    return time / other if time and other else None


def share_of_bare(rows: list[dict]) -> float | None:
    """Of the forward's launches that were swept, the one that ships; else the best."""
    swept = [row for row in rows if str(row.get("kernel", "")).startswith("head_fwd") and row.get("share_of_bare")]
    swept = [row for row in swept if row["launch"] != "bare"]
    shipped = [row for row in swept if row.get("shipped")]
    return max((row["share_of_bare"] for row in shipped or swept), default=None)


class Goal(NamedTuple):
    what: str
    at_least: bool
    bound: float
    estimate: str
    found: Callable[[list[dict]], float | None]

    def __str__(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.bound:.2f}"

    def verdict(self, rows: list[dict]) -> str:
        ratio = self.found(rows)
        if ratio is None:
            return "not timed"
        met = ratio >= self.bound if self.at_least else ratio <= self.bound
        return f"{ratio:.2f}" if met else f"{ratio:.2f}, missed"


OURS = ("ours", "fused")
GOALS = (
    Goal("fused forward: rate / that of a bare GEMM of its shape", True, 0.80, "0.76 to 0.88", share_of_bare),
    Goal("forward + backward, full workspace: time / three bare GEMMs", False, 1.15, "1.14",
         lambda rows: to(rows, "head", "dense", OURS, "gemm3")),
    Goal("the same: TRL 1.16's time / ours", True, 1.30, "1.35",
         lambda rows: inverse(to(rows, "head", "dense", OURS, "trl"))),
    Goal("20 % pivots: TRL 1.16's time / ours", True, 2.50, "2.7",
         lambda rows: inverse(to(rows, "head", "pivots20", OURS, "trl"))),
    Goal("a frozen head: TRL 1.16's time / ours", True, 1.40, "1.42",
         lambda rows: inverse(to(rows, "head", "frozen", OURS, "trl"))),
    Goal("`token_logprobs` with entropy, forward: TRL 1.16's kernel's time / ours", True, 1.00, "1.1",
         lambda rows: inverse(to(rows, "token_entropy", "dense", ("ours",), "trl"))),
    Goal("row kernels, forward + backward: rate / a copy's", True, 0.80, "0.85 to 0.90",
         lambda rows: inverse(to(rows, "token_logprobs", "dense", ("ours",), "copy"))),
    Goal("GAE of 1024 × 4096: time / a copy of its bytes", False, 3.00, "1.3 to 1.5",
         lambda rows: to(rows, "rl", "gae-large", ("ours",), "copy")),
)  # fmt: skip


def inverse(ratio: float | None) -> float | None:
    return 1 / ratio if ratio else None


def name_of(rows: list[dict]) -> str:
    """Of the machine that timed the rows."""
    return next((row["versions"]["machine"] for row in rows if "versions" in row), "unknown")


def table(results: list[list[dict]]) -> str:
    """A column for each machine; one that says so where there is none."""
    names = [name_of(rows) for rows in results] or ["measured"]
    lines = [f"| | goal | estimate (H100) | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]
    for goal in GOALS:
        found = [goal.verdict(rows) for rows in results] or ["not yet run on a GPU"]
        lines.append(f"| {goal.what} | {goal} | {goal.estimate} | {' | '.join(found)} |")
    return "\n".join(lines) + "\n"


def published(root: Path) -> list[list[dict]]:
    return [json.loads(file.read_text()) for file in sorted((root / "bench/results").glob("gpu-*/session.json"))]


def take(results: Path, root: Path) -> Path:
    """Copies the rows into root's bench/results/gpu-NAME and makes the table of its docs/status.md anew."""
    rows = json.loads(results.read_text())
    devices = {row["device"] for row in rows if "versions" in row}
    if devices != {"cuda"}:
        raise ValueError(f"{results} must hold races on a GPU alone, got devices {sorted(devices)}")
    slug = re.sub(r"[^a-z0-9]+", "-", name_of(rows).lower()).strip("-")
    target = root / f"bench/results/gpu-{slug}/session.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(rows, indent=1) + "\n")
    page = root / "docs/status.md"
    text = page.read_text()
    if not BETWEEN.search(text):
        raise ValueError(f"{page} has no <!-- goals --> and <!-- /goals -->: the table has no place")
    page.write_text(BETWEEN.sub(lambda _: table(published(root)), text))
    return target


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?")
    parser.add_argument("--root", type=Path, default=ROOT)
    args = parser.parse_args(argv)
    if args.results:
        print(take(args.results, args.root))
    print(table(published(args.root)), end="")


if __name__ == "__main__":
    main()

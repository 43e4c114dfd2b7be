"""Ratios of races over commits.

    python bench/history.py add FILE.json ... [--commit C]     adds what run.py wrote as one row a race
    python bench/history.py table                              ratios over commits, a table for each device and race
    make bench                                                 races the head and adds its rows

bench/results/history.jsonl holds a row a race: commit, date, device, versions, the race (suite, case, dtype, shape),
the time of each implementation over that of ours, and ours' extra memory. A ratio below 1 is faster than this library.
Ratios of one run are comparable with those of another on the same device; times are not, and are not kept.
"""

import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path

HISTORY = Path(__file__).resolve().parent / "results/history.jsonl"
KEYS = ("suite", "case", "dtype", "shape", "pass")


def races(rows: list[dict], commit: str, day: str) -> list[dict]:
    """One row a race of what run.py wrote. A race that was cut off has no ratios, and no row."""
    others = {str(row.get("suite")) for row in rows if "ratio_to_ours" not in row}
    if others:
        raise ValueError(f"rows must be those of run.py's races, with ratio_to_ours, got suites {sorted(others)}")
    found = {}
    for row in rows:
        if row["ratio_to_ours"] is not None:
            found.setdefault(json.dumps([row[key] for key in KEYS]), []).append(row)
    return [
        {
            "commit": commit,
            "date": day,
            "device": group[0]["versions"]["machine"],
            **{key: group[0][key] for key in KEYS},
            "ratios": {row["impl"]: round(row["ratio_to_ours"], 3) for row in group},
            "ours_extra_mib": next((row["peak_extra_mib"] for row in group if row["impl"] == "ours"), None),
            "versions": group[0]["versions"],
        }
        for group in found.values()
    ]


def add(history: Path, new: list[dict]) -> int:
    """Appends rows; a race of the same commit and device is replaced. Returns the number of rows that stand there."""
    place = ("commit", "device", *KEYS)
    replaced = {json.dumps([row[key] for key in place]) for row in new}
    kept = [row for row in read(history) if json.dumps([row[key] for key in place]) not in replaced]
    history.write_text("".join(json.dumps(row) + "\n" for row in kept + new))
    return len(kept + new)


def read(history: Path) -> list[dict]:
    return [json.loads(line) for line in history.read_text().splitlines()] if history.exists() else []


def tables(rows: list[dict]) -> str:
    """Markdown: for each device and race, a line a commit and a column an implementation."""
    groups = {}
    for row in rows:
        shape = " × ".join(map(str, row["shape"]))
        title = f"{row['suite']} {row['case']}, {row['dtype']}, {shape}, {row['pass']}: {row['device']}"
        groups.setdefault(title, []).append(row)
    return "\n".join(f"{title}\n\n{table(group)}" for title, group in groups.items())


def table(rows: list[dict]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["ratios"] if name != "ours"))
    lines = [["commit", "date", *names, "our extra MiB"], ["---"] * (len(names) + 3)]
    for row in rows:
        ratios = [f"{row['ratios'][name]:.2f}" if name in row["ratios"] else "" for name in names]
        peak = "" if row["ours_extra_mib"] is None else f"{row['ours_extra_mib']:.0f}"
        lines.append([row["commit"], row["date"], *ratios, peak])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def commit_of(name: str) -> tuple[str, str]:
    """Short hash, with "+" where the checkout has changes, and date of a commit; "none" and today outside of git."""
    try:
        out = git("log", "-1", "--format=%h %ad", "--date=short", name).split()
    except (OSError, subprocess.CalledProcessError):
        if name != "HEAD":
            raise
        return "none", date.today().isoformat()
    dirty = name == "HEAD" and git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results")
    return out[0] + ("+" if dirty else ""), out[1]


def git(*arguments: str) -> str:
    command = ["git", "-C", str(HISTORY.parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("add", "table"))
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.json")
    parser.add_argument("--commit", default="HEAD", help="that was measured; default: the checkout's")
    parser.add_argument("--history", type=Path, default=HISTORY, help="default: bench/results/history.jsonl")
    args = parser.parse_args(argv)
    if args.action == "add":
        if not args.files:
            parser.error("add needs at least one FILE.json")
        rows = [row for file in args.files for row in json.loads(file.read_text())]
        print(f"{args.history}: {add(args.history, races(rows, *commit_of(args.commit)))} rows")
    else:
        print(tables(read(args.history)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

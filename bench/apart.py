"""Races that outlive a rival: bench/run.py in a process of its own, and once more without the one that broke it.

    python bench/apart.py SECONDS --json FILE [arguments of bench/run.py]

A kernel may wait for ever, or break the GPU's context and with it all that its process does afterwards. Then that
process ends (SECONDS are how long one call, checked or timed, may take), and another goes on from the race that broke:
without the rival that did it, or, where that was ours or nobody in particular, from the race behind it. FILE is written
as by run.py, and so are FILE's neighbours of the processes that ended, whose rows are moved into FILE at the end.

Exit status: as run.py, 1 where a process broke.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import history

RUN = Path(__file__).with_name("run.py")


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    if len(given) < 3 or given[1] != "--json":
        print(__doc__, file=sys.stderr)
        return 2
    seconds, _, target, *rest = given
    target, marks, start, without, worst = Path(target), Path(f"{target}.marks"), 0, [], 0
    parts = [target]
    try:
        while True:
            marks.unlink(missing_ok=True)
            command = [sys.executable, str(RUN), *rest, "--json", str(parts[-1]), "--hangs", seconds]
            command += ["--marks", str(marks), "--start", str(start)]
            command += [word for name in without for word in ("--without", name)]
            status = subprocess.run(command).returncode
            number, name = json.loads(marks.read_text()) if marks.exists() else (None, None)
            worst = worst or (0 if status == 0 else 1)
            if number is None:  # it raced to the end, or not at all
                return status if len(parts) == 1 else worst
            blame = f"{name} broke race {number + 1}"
            if name and name != "ours" and name not in without:
                start, without = number, [*without, name]
            else:
                start, blame = number + 1, f"{blame}, which is left"
            print(f"== {blame} (exit status {status}); on in another process", file=sys.stderr, flush=True)
            parts.append(target.with_name(f"{target.stem}.{len(parts) + 1}{target.suffix}"))
    finally:
        marks.unlink(missing_ok=True)
        gather(parts, target)


def gather(parts: list[Path], target: Path) -> None:
    """All rows into target, those of a finished race in place of those that an earlier process left of it."""
    rows = {}
    for part in parts:
        if part.exists():
            for row in json.loads(part.read_text()):
                rows[json.dumps([row[key] for key in (*history.KEYS, "impl")])] = row
    if rows:
        target.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
    for part in parts:
        if part != target:
            part.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())

"""What the studies share: arms and seeds to rows of JSON, resumable; effects with intervals, a table, a picture."""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# 97.5 % points of Student's t by degrees of freedom: two-sided intervals of 95 %
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 14: 2.145, 19: 2.093}


class Effect(NamedTuple):
    """A comparison of two arms by a number of their rows, paired by seed."""

    metric: str
    arm: str
    against: str
    sign: int  # the claim: +1, the arm has more of it; -1, less
    quick: bool = False  # --quick must show this sign


class Study(NamedTuple):
    name: str
    claim: str  # one sentence, with its paper
    arms: tuple[str, ...]
    run: Callable[[str, int, bool], dict]  # arm, seed, quick -> numbers, and "curve": a list of such
    effects: tuple[Effect, ...]
    axes: tuple[str, str]  # of the picture, names of a curve's numbers
    scale: str  # what the size of this study leaves open
    needs: Callable[[], str | None] = lambda: None  # why it cannot run here, or None


class Found(NamedTuple):
    effect: Effect
    mean: float
    low: float
    high: float
    seeds: int

    @property
    def word(self) -> str:
        """Does the interval leave out 0, and on which side."""
        if self.low * self.effect.sign > 0 and self.high * self.effect.sign > 0:
            return "as claimed"
        return "opposite" if self.low * self.effect.sign < 0 and self.high * self.effect.sign < 0 else "not shown"


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of paired differences; one alone has no interval."""
    n, mean = len(differences), statistics.fmean(differences)
    if n < 2:
        return mean, -math.inf, math.inf
    half = T95[max(df for df in T95 if df < n)] * statistics.stdev(differences) / math.sqrt(n)
    return mean, mean - half, mean + half


def effects(study: Study, rows: list[dict]) -> list[Found]:
    by = {(row["arm"], row["seed"]): row for row in rows}
    found = []
    for effect in study.effects:
        seeds = [s for arm, s in by if arm == effect.arm and (effect.against, s) in by]
        if seeds:
            differences = [by[effect.arm, s][effect.metric] - by[effect.against, s][effect.metric] for s in seeds]
            found.append(Found(effect, *interval(differences), len(seeds)))
    return found


def missing(study: Study, rows: list[dict], seeds: int) -> list[tuple[int, str]]:
    """Runs that have no row yet, all arms of a seed together."""
    done = {(row["seed"], row["arm"]) for row in rows}
    return [(seed, arm) for seed in range(seeds) for arm in study.arms if (seed, arm) not in done]


def quick_runs(study: Study) -> list[tuple[int, str]]:
    """One seed of the arms whose sign must hold."""
    arms = {arm for effect in study.effects if effect.quick for arm in (effect.arm, effect.against)}
    return [(0, arm) for arm in study.arms if arm in arms]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(study: Study, rows: list[dict]) -> str:
    numbers = [k for k, v in rows[0].items() if isinstance(v, float)]
    lines = ["| arm | seeds | " + " | ".join(numbers) + " |", "|" + "---|" * (len(numbers) + 2)]
    for arm in study.arms:
        own = [row for row in rows if row["arm"] == arm]
        if own:
            means = " | ".join(f"{statistics.fmean(row[k] for row in own):.3g}" for k in numbers)
            lines.append(f"| {arm} | {len(own)} | {means} |")
    lines += ["", "| effect | difference | 95 % interval | seeds | claim |", "|---|---|---|---|---|"]
    for f in effects(study, rows):
        name = f"{f.effect.metric}: {f.effect.arm} - {f.effect.against}"
        lines.append(f"| {name} | {f.mean:+.3g} | {f.low:+.3g} to {f.high:+.3g} | {f.seeds} | {f.word} |")
    return "\n".join(lines)


def page(study: Study, rows: list[dict]) -> str:
    """The study as a section of the documentation."""
    shown = f"![{study.name}: curves of the arms](results/studies/study-{study.name}.svg)"
    return f"## {study.name}\n\nClaim: {study.claim}\n\n{table(study, rows)}\n\n{shown}\n\n{study.scale}\n"


def picture(study: Study, rows: list[dict], path: Path) -> None:
    """Each arm's curve, or its one number where it has none: the mean over seeds with its interval."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "finealign"  # the same rows give the same file
    import matplotlib.pyplot as plt

    x_name, y_name = study.axes
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for arm in study.arms:
        own = [row for row in rows if row["arm"] == arm]
        points = list(zip(*(row.get("curve", [row]) for row in own), strict=True))
        x = [statistics.fmean(p[x_name] for p in point) if x_name else arm for point in points]
        y = [interval([p[y_name] for p in point]) for point in points]
        (line,) = axes.plot(x, [v[0] for v in y], marker="o", markersize=3, label=arm)
        if x_name and len(own) > 1:
            axes.fill_between(x, [v[1] for v in y], [v[2] for v in y], alpha=0.15, color=line.get_color())
        elif len(own) > 1:
            axes.vlines(x, [v[1] for v in y], [v[2] for v in y], color=line.get_color())
    axes.set_xlabel(x_name)
    axes.set_ylabel(y_name)
    axes.set_title(f"{study.name}: mean over seeds, 95 % interval", fontsize=10)
    if x_name:
        axes.legend(fontsize=8)
    else:
        axes.tick_params(axis="x", rotation=30)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(studies: dict[str, Study], argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.studies", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(studies)}; none: all")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, ... of each arm (default 5)")
    parser.add_argument(
        "--quick", action="store_true", help="two arms of a study, one seed, short; status 1 if a sign is not held"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("bench/results/studies"), help="folder of the rows and pictures"
    )
    args = parser.parse_args(argv)
    unknown = set(args.names) - set(studies)
    if unknown:
        parser.error(f"NAME must be one of {', '.join(studies)}, got {', '.join(sorted(unknown))}")
    failed = False
    for name in args.names or studies:
        study, path = studies[name], args.out / f"study-{name}.jsonl"
        left_out = "no sign that must hold" if args.quick and not quick_runs(study) else study.needs()
        if left_out:
            print(f"{name} is left out: {left_out}", file=sys.stderr)
            continue
        rows = [] if args.quick else read(path)
        for seed, arm in quick_runs(study) if args.quick else missing(study, rows, args.seeds):
            row = {"study": name, "arm": arm, "seed": seed, **study.run(arm, seed, args.quick)}
            rows.append(row)
            print(f"{name} {arm} seed {seed}", file=sys.stderr, flush=True)
            if not args.quick:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a") as file:  # saved at once: a run that is stopped goes on from here
                    file.write(json.dumps(row) + "\n")
        print(page(study, rows))
        if args.quick:
            wrong = [f for f in effects(study, rows) if f.effect.quick and f.mean * f.effect.sign <= 0]
            failed |= bool(wrong)
            for f in wrong:
                print(
                    f"{name}: {f.effect.metric} of {f.effect.arm} - {f.effect.against} is {f.mean:+.3g}",
                    file=sys.stderr,
                )
        else:
            picture(study, rows, path.with_suffix(".svg"))
    return int(failed)

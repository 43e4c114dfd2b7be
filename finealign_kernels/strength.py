"""`finealign strength`: computes strengths, labels and margins of pairs from the scores of several reward models.

Rows are pairs. The numbers of a row are one a model: a list in one file, or a file for each model, or both. Files are
read side by side and twice: first for the strengths, which are kept (a few numbers a pair), then to write the rows.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from reprlib import repr as brief
from typing import NamedTuple

import numpy as np
import torch

from . import report
from .losses.strength import Strength, preference_strength
from .ops._check import LARGEST

ROWS = 4096  # rows that are read at a time
POINTS = 3000  # largest number of points in the scatter plot
FIELDS = (("difference", "differences"), ("chosen_score", "chosen_scores"), ("rejected_score", "rejected_scores"))
TABLES = (".parquet", ".arrow")
COLUMNS = ("strength", "strength_std", "vote", "soft_label", "margin", "flip", "weight")


class UsageError(Exception):
    """A wrong option or file; the message says what to change."""


class Options(NamedTuple):
    files: tuple[str, ...]
    out: str | None = None
    report: str | None = None
    difference: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    flip: float | None = None  # percent; None: below 0
    drop: float | None = None  # percent; None: no pair
    scale: float = 1.0
    clamp: float | None = None


def run(options: Options, *, say=print) -> Strength:
    """Reads the files, writes columns and report, and returns the strengths."""
    for name, value in (("--flip", options.flip), ("--drop", options.drop)):
        if value is not None and not 0 <= value <= 100:
            raise UsageError(f"{name} must be a percentage in [0, 100], got {value:g}")
    if not (math.isfinite(options.scale) and options.scale > 0):
        raise UsageError(f"--scale must be above 0, got {options.scale:g}")
    if options.clamp is not None and not (math.isfinite(options.clamp) and options.clamp > 0):
        raise UsageError(f"--clamp must be above 0, got {options.clamp:g}")
    _check_written(options)
    strength, models = measure(options)
    columns = columns_of(strength, options)
    say(summary(strength, models, columns))
    if options.out:
        replaced = _written("--out", options.out, lambda name: write(name, rows(options.files[0]), columns))
        say(
            f"wrote {options.out}"
            + (f"; it replaces the columns {', '.join(replaced)} of the file" if replaced else "")
        )
    if options.report:
        _written("--report", options.report, lambda name: draw(name, strength, models, options))
        say(f"wrote {options.report}")
    return strength


def _check_written(options: Options) -> None:
    """Refuses an output whose folder does not exist, or that is another file of the call, before anything is read."""
    taken = {Path(name).resolve(): "the ones read" for name in options.files}
    for flag, name in (("--out", options.out), ("--report", options.report)):
        if not name:
            continue
        place = Path(name).resolve()
        if place in taken:
            raise UsageError(f"{flag} must be another file than {taken[place]}, got {name}")
        if place.is_dir() or not place.parent.is_dir():
            raise UsageError(f"{flag} must be a file in a directory that exists, got {name}")
        taken[place] = flag


def _written(flag: str, name: str, make):
    try:
        return make(name)
    except OSError as error:
        raise UsageError(f"{flag} cannot be written: {error}") from error


def measure(options: Options) -> tuple[Strength, int]:
    """Strengths of all pairs and the number of models, ROWS pairs at a time."""
    parts, block, models = [], [], None

    def close():
        if block:
            parts.append(preference_strength(torch.tensor(block, dtype=torch.float64).T))
            block.clear()

    readers = [rows(name) for name in options.files]
    for number, found in enumerate(_side_by_side(readers, options.files), 1):
        numbers = []
        for name, row in zip(options.files, found, strict=True):
            numbers += differences(row, options, f"{name}, pair {number}")
        if models is None:
            models = len(numbers)
        if len(numbers) != models:
            raise UsageError(f"pair {number} has numbers of {len(numbers)} models, the ones before it of {models}")
        block.append(numbers)
        if len(block) == ROWS:
            close()
    close()
    if not parts:
        raise UsageError(f"{options.files[0]} holds no pair")
    return Strength(*(torch.cat(field) for field in zip(*parts, strict=True))), models


def _side_by_side(readers, names) -> Iterator[list[dict]]:
    readers = [iter(reader) for reader in readers]
    while True:
        found = [next(reader, None) for reader in readers]
        if all(row is None for row in found):
            return
        if any(row is None for row in found):
            raise UsageError(f"{names[found.index(None)]} has fewer pairs than another file")
        yield found


def differences(row: dict, options: Options, place: str) -> list[float]:
    """The score differences of one pair in one file, one for each model."""
    d, chosen, rejected = (
        _numbers(row, (name,) if name else known, place)
        for name, known in zip((options.difference, options.chosen, options.rejected), FIELDS, strict=True)
    )
    if d is not None:
        return d
    if chosen is None or rejected is None:
        wanted = " and ".join(" or ".join(known) for known in FIELDS[1:])
        raise UsageError(
            f"{place}: expected {wanted}, or {' or '.join(FIELDS[0])}, found {', '.join(row) or 'nothing'}"
        )
    if len(chosen) != len(rejected):
        raise UsageError(f"{place}: {len(chosen)} chosen and {len(rejected)} rejected scores")
    return [one - other for one, other in zip(chosen, rejected, strict=True)]


def _numbers(row: dict, names: tuple[str, ...], place: str) -> list[float] | None:
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        each = list(value) if isinstance(value, (list, tuple)) else [value]
        for one in each:
            if isinstance(one, bool) or not isinstance(one, (int, float)) or not abs(one) <= LARGEST:
                expected = f"a finite number of at most {LARGEST:.2g} in size, or a list of them"
                raise UsageError(f"{place}: {name} must be {expected}, got {brief(value)}")
        if not each:
            raise UsageError(f"{place}: {name} is empty")
        return [float(one) for one in each]
    return None


def rows(name: str) -> Iterator[dict]:
    """The rows of a file: JSONL with the standard library, Parquet and Arrow with `datasets`."""
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"{name}: no such file")
    if path.suffix in TABLES:
        datasets = _datasets(name)
        try:
            yield from (
                datasets.Dataset.from_parquet(name) if path.suffix == ".parquet" else datasets.Dataset.from_file(name)
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise UsageError(f"{name}: {error}") from error
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")  # some editors put a byte order mark first
                row = json.loads(text) if text.strip() else None
            except UnicodeDecodeError as error:
                raise UsageError(f"{name}, line {number}: not UTF-8: {error}") from error
            except ValueError as error:  # of JSON, or a whole number of thousands of digits
                raise UsageError(f"{name}, line {number}: not JSON: {error}") from error
            if not text.strip():
                continue
            if not isinstance(row, dict):
                raise UsageError(f"{name}, line {number}: expected an object, got {text.strip()[:40]}")
            yield row


def _datasets(name: str):
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"{name}: Parquet and Arrow need the package datasets; JSONL does not") from error
    datasets.disable_progress_bars()
    return datasets


def columns_of(strength: Strength, options: Options) -> dict[str, list]:
    """The new columns, by name."""
    margin = options.scale * strength.mean
    if options.clamp is not None:
        margin = margin.clamp(-options.clamp, options.clamp)
    weight = torch.ones_like(margin) if options.drop is None else strength.weight(options.drop)
    flip = strength.weakest(options.flip)
    found = (strength.mean, strength.std, strength.vote, strength.soft, margin, flip, weight)
    return {name: column.tolist() for name, column in zip(COLUMNS, found, strict=True)}


def write(name: str, source: Iterator[dict], columns: dict[str, list]) -> list[str]:
    """Writes the rows with the new columns, in the format of the file's ending. Returns the replaced columns."""
    replaced = set()

    def found():
        for i, row in enumerate(source):
            replaced.update(columns.keys() & row.keys())
            yield row | {key: column[i] for key, column in columns.items()}

    if Path(name).suffix in TABLES:
        table = _datasets(name).Dataset.from_list(list(found()))
        if Path(name).suffix == ".parquet":
            table.to_parquet(name)
        else:
            import pyarrow

            with pyarrow.ipc.new_stream(name, table.data.schema) as stream:
                stream.write_table(table.data.table)
    else:
        with Path(name).open("w", encoding="utf-8") as lines:
            for row in found():
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    return sorted(replaced)


def summary(strength: Strength, models: int, columns: dict[str, list]) -> str:
    mean, count = strength.mean, len(strength.mean)
    low, middle, high = np.quantile(mean.numpy(), [0.1, 0.5, 0.9]).tolist()  # torch's stops at 2^24 numbers
    lines = [
        f"{count} pairs, {models} models",
        f"strength: mean {mean.mean().item():.4g}, 10 % below {low:.4g}, median {middle:.4g}, 10 % above {high:.4g}",
        f"below 0: {(mean < 0).sum().item() / count:.1%}; flipped: {sum(columns['flip']) / count:.1%}; "
        f"left out: {columns['weight'].count(0.0) / count:.1%}",
    ]
    return "\n".join(lines)


def draw(name: str, strength: Strength, models: int, options: Options) -> None:
    """The report: a histogram of the strength, and its standard deviation against its mean."""
    mean, std, count = strength.mean.tolist(), strength.std.tolist(), len(strength.mean)
    every = max(1, math.ceil(count / POINTS))
    points = report.Scatter(
        "standard deviation against mean", mean[::every], std[::every], "mean", "standard deviation"
    )
    shown = f" One point of {every} is drawn." if every > 1 else ""
    facts = {
        "pairs": count,
        "models": models,
        "mean": sum(mean) / count,
        "below 0": f"{sum(m < 0 for m in mean) / count:.1%}",
    }
    facts |= {"files": ", ".join(Path(one).name for one in options.files)}
    report.write(
        name,
        "Preference strength",
        [
            report.headline(
                "Preference strength",
                "If the strength is below 0, the models contradict the label; near 0 they see no difference.",
                facts,
            ),
            report.distributions(
                "Strength of the pairs",
                [report.Histogram("pairs by mean difference", mean, "mean difference"), points],
                note="Mean and standard deviation, over the models, of the chosen minus the rejected score." + shown,
            ),
        ],
    )

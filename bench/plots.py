"""Pictures of what run.py wrote. python bench/plots.py bench/results/DEVICE/*.json --out bench/results/DEVICE

For each machine, dtype and case of the head that was raced at several sizes:
    rows, vocabulary    time and extra memory against N and against V
    roofline            the rate of the work nobody can leave out against FLOPs per byte, under the rates that bare
                        matrix products and a copy reached in the same files
    floors              each op's time as a multiple of its floor: products for the head, a copy for row and token ops
Times are milliseconds on a GPU. On a CPU they are multiples of the floor of the same race: an absolute time of a CPU
says little about any other. Needs matplotlib (the extra `bench`).
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator  # noqa: E402

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
FLOORS = {"head": "gemm3", "loss": "gemm3"}  # of other suites: copy
FLOOR_NAMES = ("gemm3", "gemm4", "copy")
COLORS = {"ours": "C0", "ours-default": "C1", "ours-no-workspace": "C2", "eager": "C3", "torch": "C4", "trl": "C5"}
COLORS |= {"fused": "navy", "fused-device": "teal", "fused-no-workspace": "royalblue", "chunked-device": "olive"}
COLORS |= {"liger": "C6", "liger-compiled": "C6", "cce": "C8", "cce-exact": "C7", "compiled": "C9"}
FLOOR_STYLE = {"color": "black", "linestyle": "--", "linewidth": 1}
DASHES = {"gemm3": "--", "gemm4": ":", "copy": "-."}


class Key(NamedTuple):
    """Rows that stand in one picture."""

    device: str
    suite: str
    case: str
    dtype: str

    def __str__(self) -> str:
        return "-".join((self.suite, self.case, self.dtype, self.device))


def time_of(row: dict) -> float:
    """Seconds: those on the GPU where there is one."""
    return row["queued_s"] if row.get("queued_s") is not None else row["median_s"]


def by_key(rows: Iterable[dict]) -> dict[Key, list[dict]]:
    found = defaultdict(list)
    for row in rows:
        found[Key(row["device"], row["suite"], row["case"], row["dtype"])].append(row)
    return found


def along(rows: list[dict], axis: int) -> list[dict]:
    """The most rows whose shapes differ in one number alone, sorted by it; none where that is one shape."""
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row["shape"][:axis] + row["shape"][axis + 1 :])].append(row)
    best = max(groups.values(), key=lambda group: len({row["shape"][axis] for row in group}))
    several = len({row["shape"][axis] for row in best}) > 1
    return sorted(best, key=lambda row: row["shape"][axis]) if several else []


def floor_times(rows: list[dict]) -> dict[tuple, float]:
    """Seconds of the floor at each shape."""
    return {tuple(row["shape"]): time_of(row) for row in rows if row["impl"] == FLOORS.get(row["suite"], "copy")}


def shown(row: dict, floors: dict[tuple, float]) -> float | None:
    """What is drawn for a time: milliseconds on a GPU, multiples of the floor on a CPU, where there is one."""
    if row["device"] == "cuda":
        return time_of(row) * 1e3
    floor = floors.get(tuple(row["shape"]))
    return floor and time_of(row) / floor


def lines(axes, rows: list[dict], axis: int, value: Callable[[dict], float | None]) -> None:
    """One line for each implementation that has values."""
    for name in dict.fromkeys(row["impl"] for row in rows):
        points = [(row["shape"][axis], value(row)) for row in rows if row["impl"] == name]
        points = [(x, y) for x, y in points if y]
        if points:
            floor = FLOOR_STYLE | {"linestyle": DASHES.get(name)}
            style = floor if name in FLOOR_NAMES else {"color": COLORS.get(name), "marker": "o"}
            axes.plot(*zip(*points, strict=True), label=name, markersize=3, **style)
    axes.set_xscale("log")
    ticks = sorted({row["shape"][axis] for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks], rotation=30)
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def logarithmic(axis) -> None:
    """1, 2, 5, 10, ... in plain numbers."""
    axis.axes.set_yscale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.axes.minorticks_off()


def growth(key: Key, rows: list[dict], axis: int, letter: str, folder: Path) -> Path | None:
    """Time and memory along one axis of the shape (N, D, V)."""
    found, floors = along(rows, axis), floor_times(rows)
    if not found:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    lines(left, found, axis, lambda row: shown(row, floors))
    unit = "time on the GPU, ms" if key.device == "cuda" else "time / three bare products"
    left.set(xlabel=letter, ylabel=unit)
    if key.device == "cuda":
        logarithmic(left.yaxis)
    else:
        left.set_ylim(bottom=0)
    lines(right, found, axis, lambda row: row["peak_extra_mib"])
    right.set(xlabel=letter, ylabel="extra memory, MiB")
    logarithmic(right.yaxis)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    fixed = ", ".join(f"{n} = {x}" for n, x in zip("NDV", found[0]["shape"], strict=True) if n != letter)
    figure.suptitle(f"{key.suite}, {key.case}, {key.dtype}, {fixed}", fontsize=10)
    return save(figure, folder / f"{key}-{ {'N': 'rows', 'V': 'vocabulary'}[letter] }.svg")


def roofline(key: Key, rows: list[dict], bandwidth: float | None, folder: Path) -> Path | None:
    """Rates of one key's rows. The roofs are what the bare products and a copy reached."""
    rows = [row for row in rows if row.get("useful_flops")]
    products = [row["useful_flops"] / time_of(row) for row in rows if row["impl"] == FLOORS.get(key.suite)]
    if not products:
        return None
    top = max(products)
    scale, unit = (1e12, "TFLOP/s") if key.device == "cuda" else (top, "rate / that of bare products")
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    slowest = top / scale
    for name in dict.fromkeys(row["impl"] for row in rows):
        mine = [row for row in rows if row["impl"] == name]
        rates = [row["useful_flops"] / time_of(row) / scale for row in mine]
        slowest = min(slowest, *rates)
        style = {"color": "black", "marker": "_"} if name in FLOOR_NAMES else {"color": COLORS.get(name)}
        axes.scatter([intensity(row) for row in mine], rates, label=name, s=14, **style)
    axes.axhline(top / scale, **FLOOR_STYLE)
    if bandwidth:
        low, high = (f(map(intensity, rows)) for f in (min, max))
        low = min(low, top / bandwidth / 2)
        axes.plot([low, high], [low * bandwidth / scale, high * bandwidth / scale], **FLOOR_STYLE)
    axes.set(xscale="log", xlabel="useful FLOPs / byte of inputs and gradients", ylabel=unit)
    logarithmic(axes.yaxis)
    axes.set_ylim(slowest / 1.5, top / scale * 1.5)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    figure.suptitle(f"{key.suite}, {key.case}, {key.dtype}", fontsize=10)
    return save(figure, folder / f"{key}-roofline.svg")


def intensity(row: dict) -> float:
    """Useful FLOPs for each byte of hidden, weight and their gradients."""
    *rows, d, v = row["shape"]
    n = 1
    for size in rows:
        n *= size
    return row["useful_flops"] / (2 * (n + v) * d * BYTES[row["dtype"]])


def copy_bandwidth(rows: list[dict]) -> dict[str, float]:
    """Bytes a second, read and written, of the best copy on each device."""
    found = defaultdict(float)
    for row in rows:
        if row["impl"] == "copy" and row.get("useful_bytes"):
            found[row["device"]] = max(found[row["device"]], row["useful_bytes"] / time_of(row))
    return found


def over_floors(device: str, groups: dict[Key, list[dict]], folder: Path) -> Path | None:
    """A bar for each implementation at the largest shape of each key that has a floor."""
    bars = []
    for key, rows in groups.items():
        floors = floor_times(rows)
        if key.device == device and floors:
            largest = max(floors, key=lambda shape: floors[shape])
            chosen = [row for row in rows if tuple(row["shape"]) == largest and row["impl"] not in FLOOR_NAMES]
            race = f"{key.suite} {key.case} {key.dtype} {' x '.join(map(str, largest))}"
            bars += [(f"{race}: {row['impl']}", time_of(row) / floors[largest]) for row in chosen]
    if not bars:
        return None
    names, values = zip(*bars, strict=True)
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.17 * len(bars)), layout="constrained")
    axes.barh(names, values, color=[COLORS.get(name.rpartition(" ")[2], "gray") for name in names], height=0.7)
    axes.axvline(1, **FLOOR_STYLE)
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="time / floor")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    return save(figure, folder / f"floors-{device}.svg")


def save(figure, path: Path) -> Path:
    """An SVG whose bytes depend on the numbers alone."""
    with plt.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def draw(rows: list[dict], folder: Path) -> list[Path]:
    """Every picture that these rows are enough for."""
    groups, bandwidth = by_key(rows), copy_bandwidth(rows)
    pictures = []
    for key, mine in groups.items():
        if key.suite == "head":
            pictures += [growth(key, mine, 0, "N", folder), growth(key, mine, 2, "V", folder)]
        pictures.append(roofline(key, mine, bandwidth.get(key.device), folder))
    pictures += [over_floors(device, groups, folder) for device in dict.fromkeys(key.device for key in groups)]
    return [picture for picture in pictures if picture]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="what run.py --json wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    args = parser.parse_args(argv)
    rows = [row for file in args.files for row in json.loads(file.read_text()) if {"suite", "median_s"} <= row.keys()]
    args.out.mkdir(parents=True, exist_ok=True)
    for picture in draw(rows, args.out):
        print(picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

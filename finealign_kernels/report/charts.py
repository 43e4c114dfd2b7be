"""Curves over steps, bars of a quantity, histograms and scatters, as inline SVG and plain boxes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from .markup import join, number, section, tag

_WIDTH, _HEIGHT = 480, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 26
FEW_POINTS = 200  # up to so many points of a scatter are drawn larger
_COLOURS = 4


class Series(NamedTuple):
    """One curve: a value for each step. None and NaN leave a gap."""

    name: str
    values: Sequence[float | None]


class Chart(NamedTuple):
    """Curves on one axis. `log`: a logarithmic axis, with 0 at its lower end. `limit`: a dashed line at this value."""

    title: str
    series: Sequence[Series]
    log: bool = False
    limit: float | None = None


class Bars(NamedTuple):
    """Amounts of one unit as bars on one scale from 0, in the order of `amounts` (name -> amount)."""

    title: str
    unit: str
    amounts: dict[str, float]


class Histogram(NamedTuple):
    """How many of `values` (finite) lie in each of `bins` equal ranges; `unit` is the label of the axis."""

    title: str
    values: Sequence[float]
    unit: str = ""
    bins: int = 40


class Scatter(NamedTuple):
    """One point for each pair of finite numbers; `across` and `up` name the axes."""

    title: str
    x: Sequence[float]
    y: Sequence[float]
    across: str
    up: str


def curves(title, charts, *, note=None):
    """A section of line charts; step 1 is the first value of each series."""
    return section(title, tag("div", *map(_line_chart, charts), class_="grid"), note=note)


def bars(title, groups, *, note=None):
    """A section of horizontal bars, one figure for each `Bars`."""
    return section(title, tag("div", *map(_bar_chart, groups), class_="grid"), note=note)


def distributions(title, charts, *, note=None):
    """A section of histograms and scatters, in the order of `charts`."""
    drawn = [_histogram(chart) if isinstance(chart, Histogram) else _scatter(chart) for chart in charts]
    return section(title, tag("div", *drawn, class_="grid"), note=note)


def _histogram(chart):
    ticks = _ticks(chart.values)
    low, high = ticks[0], ticks[-1]
    counts = [0] * chart.bins
    for value in chart.values:
        counts[min(int((value - low) / (high - low) * chart.bins), chart.bins - 1)] += 1
    levels = _ticks([0, *counts], whole=True)
    x, y = _scale(low, high, _LEFT, _WIDTH - _RIGHT), _scale(levels[0], levels[-1], _HEIGHT - _BOTTOM, _TOP)
    width = (_WIDTH - _RIGHT - _LEFT) / chart.bins
    boxes = []
    for i, count in enumerate(counts):
        start, stop = (low + (high - low) * k / chart.bins for k in (i, i + 1))
        words = tag("title", f"{number(float(start))} to {number(float(stop))}: {count}")
        place = dict(x=f"{x(start) + 0.5:.1f}", y=f"{y(count):.1f}", width=f"{width - 1:.1f}")
        boxes.append(tag("rect", words, height=f"{_HEIGHT - _BOTTOM - y(count):.1f}", class_="box", **place))
    names = tag("span", tag("span", chart.unit), class_="names")
    return _axes_figure(chart.title, names, ticks, levels, x, y, tag("g", *boxes, class_="c0"))


def _scatter(chart):
    ticks, levels = _ticks(chart.x), _ticks(chart.y)
    x = _scale(ticks[0], ticks[-1], _LEFT, _WIDTH - _RIGHT)
    y = _scale(levels[0], levels[-1], _HEIGHT - _BOTTOM, _TOP)
    radius = 4 if len(chart.x) <= FEW_POINTS else 2
    points = [
        tag("circle", cx=f"{x(one):.1f}", cy=f"{y(other):.1f}", r=radius, class_="point")
        for one, other in zip(chart.x, chart.y, strict=True)
    ]
    names = tag(
        "span", tag("span", f"horizontal: {chart.across}"), tag("span", f"vertical: {chart.up}"), class_="names"
    )
    return _axes_figure(chart.title, names, ticks, levels, x, y, tag("g", *points, class_="c0"))


def _axes_figure(title, names, ticks, levels, x, y, drawn):
    """A figure with numbers at both axes."""
    drawing = tag(
        "svg",
        *(_gridline(y(level), number(float(level))) for level in levels),
        *(_step_label(x(tick), number(float(tick))) for tick in ticks),
        drawn,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=title,
    )
    return tag("figure", tag("figcaption", tag("h3", title), names), drawing)


def _bar_chart(group):
    top = max(group.amounts.values(), default=0.0) or 1.0
    rows = [
        tag(
            "div",
            tag("span", name),
            tag("span", tag("i", style=f"--w:{max(0.0, amount) / top:.2%}"), class_=f"track c{i % _COLOURS}"),
            tag("b", f"{number(amount)} {group.unit}"),
            class_="bar",
        )
        for i, (name, amount) in enumerate(group.amounts.items())
    ]
    return tag("figure", tag("figcaption", tag("h3", group.title)), *rows)


def _line_chart(chart):
    steps = max((len(series.values) for series in chart.series), default=0)
    axis = _log_axis(chart) if chart.log else _linear_axis(chart)
    x = _scale(1, max(steps, 2), _LEFT, _WIDTH - _RIGHT)
    y = _scale(axis[0], axis[-1], _HEIGHT - _BOTTOM, _TOP)
    place = (lambda v: y(max(math.log10(v), axis[0]) if v > 0 else axis[0])) if chart.log else y
    drawing = tag(
        "svg",
        *(_gridline(y(tick), f"1e{tick}" if chart.log else number(tick)) for tick in axis),
        *(_step_label(x(step), step) for step in _few(steps)),
        None if chart.limit is None else _limit_line(place(chart.limit)),
        *(_curve(series, i, x, place) for i, series in enumerate(chart.series)),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"{chart.title}, {steps} steps",
    )
    names = [tag("span", tag("i", class_=f"c{i % _COLOURS}"), s.name) for i, s in enumerate(chart.series)]
    if chart.limit is not None:
        names.append(tag("span", f"limit {number(chart.limit)} (dashed)"))
    return tag("figure", tag("figcaption", tag("h3", chart.title), tag("span", *names, class_="names")), drawing)


def _gridline(height, label):
    line = tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=f"{height:.1f}", y2=f"{height:.1f}", class_="rule")
    return join([line, tag("text", label, x=_LEFT - 8, y=f"{height + 4:.1f}", text_anchor="end")])


def _step_label(across, step):
    return tag("text", step, x=f"{across:.1f}", y=_HEIGHT - 6, text_anchor="middle")


def _limit_line(height):
    return tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=f"{height:.1f}", y2=f"{height:.1f}", class_="limit")


def _curve(series, i, x, place):
    points = [(x(step), place(v), v, step) for step, v in enumerate(series.values, 1) if _finite(v)]
    path = " ".join(f"{across:.1f},{height:.1f}" for across, height, _, _ in points)
    dots = [
        tag(
            "circle",
            tag("title", f"{series.name}, step {step}: {number(v)}"),
            cx=f"{across:.1f}",
            cy=f"{height:.1f}",
            r=4,
            class_="dot",
        )
        for across, height, v, step in points
    ]
    return tag("g", tag("polyline", points=path, class_="curve"), *dots, class_=f"c{i % _COLOURS}")


def _finite(value):
    return value is not None and math.isfinite(value)


def _values(chart):
    return [v for series in chart.series for v in series.values if _finite(v)] + (
        [] if chart.limit is None else [chart.limit]
    )


def _linear_axis(chart):
    return _ticks(_values(chart))


def _ticks(values, whole=False):
    """Three to six round ticks that enclose every value; whole numbers for counts, then two ticks or more."""
    values = values or [0.0, 1.0]
    low, high = min(values), max(values)
    if low == high == 0:  # a share or a count that stayed 0: its axis does not go below
        high = 1.0
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 2.5, 5, 10) if power * k >= rough * (1 - 1e-9))
    step = math.ceil(step) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * k for k in range(first, last + 1)]


def _log_axis(chart):
    """Whole decades that enclose every positive value, as exponents."""
    exponents = [math.log10(v) for v in _values(chart) if v > 0] or [-8.0]
    first, last = math.floor(min(exponents)), math.ceil(max(exponents))
    return list(range(first, max(last, first + 1) + 1))


def _scale(low, high, start, stop):
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def _few(steps):
    """The step numbers at the axis: all of them up to 12 steps, then only some."""
    every = max(1, math.ceil(steps / 12))
    return range(1, steps + 1, every)

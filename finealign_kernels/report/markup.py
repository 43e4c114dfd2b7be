"""HTML tags: a plain string is text and is escaped; only an `Html` string is inserted unchanged."""

import math
from html import escape

_VOID = frozenset({"meta", "link", "br"})


class Html(str):
    """A string that is already HTML."""


def html(content):
    """Html of a string, a number or None (nothing). Text is escaped, quotes too."""
    if isinstance(content, Html):
        return content
    return Html("" if content is None else escape(str(content)))


def join(contents, between=""):
    return Html(between.join(html(content) for content in contents))


def tag(name, /, *children, **attributes):
    """One element. An attribute of None is left out; `class_` is class, `_` is `-` elsewhere (`stroke_width`)."""
    shown = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    head = "".join(f' {key}="{html(value)}"' for key, value in shown.items())
    if name in _VOID:
        return Html(f"<{name}{head}>")
    return Html(f"<{name}{head}>{join(children)}</{name}>")


def section(title, *children, note=None):
    """A block of the page with a title; `note` explains in a few sentences how to read it."""
    return tag("section", tag("h2", title), note and tag("p", note, class_="note"), *children)


def number(value):
    """A float in four significant digits, its exponent without padding: 0.6931, 12.5, 3.1e-6. All else unchanged."""
    if not isinstance(value, float) or not math.isfinite(value):
        return value
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def signed(value):
    """A number with its sign and three decimals: +0.014, -2.500; what rounds to 0 is +0.000."""
    return f"{round(value, 3) + 0.0:+.3f}"

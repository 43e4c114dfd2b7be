"""The page: nothing is lost, nothing is loaded, no text becomes markup."""

import re
from html.parser import HTMLParser

import pytest

from finealign_kernels import report
from finealign_kernels.report import Bars, Chart, Example, Response, Series, Shade, Token
from finealign_kernels.report.charts import _linear_axis, _log_axis
from finealign_kernels.report.markup import Html, tag
from finealign_kernels.report.style import STYLE

HOSTILE = """<script>alert("1")</script>&'</style>"""


class Reader(HTMLParser):
    """Reads a page, sees that every element is closed, and keeps its text, tags and attributes."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.tags, self.attributes = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.attributes += [(name, key, value) for key, value in attributes]
        if name not in ("meta", "link", "br"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.text.append(data)


def sections(text):
    """Every section function, with `text` wherever a text may stand."""
    tokens = [Token(text, {text: -0.25, "weight": 2.0}, [text], text), Token("plain", {text: 0.125, "weight": 1.0})]
    return [
        report.headline(text, text, {text: text}, eyebrow=text),
        report.table(text, [text, text], [[text, text], [text, None]], note=text),
        report.curves(text, [Chart(text, [Series(text, [1.0, 2.0])])], note=text),
        report.bars(text, [Bars(text, text, {text: 1.0})], note=text),
        report.token_texts(
            text,
            [Example(text, text, [Response(text, tokens, text, [text, text])])],
            [Shade("weight", text, text), Shade(text, text, text, signed=True)],
            note=text,
        ),
    ]


def test_text_is_never_markup():
    hostile, plain = (Reader(report.page(text, sections(text))) for text in (HOSTILE, "§"))
    assert hostile.tags == plain.tags and "script" not in hostile.tags
    assert [(name, key) for name, key, _ in hostile.attributes] == [(name, key) for name, key, _ in plain.attributes]
    assert "".join(hostile.text).count(HOSTILE) == "".join(plain.text).count("§") > 30


def test_the_page_loads_nothing():
    reader = Reader(report.page("title", sections("text")))
    assert not {"script", "img", "iframe", "object", "form"} & set(reader.tags)
    assert {key for _, key, _ in reader.attributes}.isdisjoint({"src", "srcset", "onclick", "onload", "action"})
    assert [value for name, key, value in reader.attributes if key == "href"] == ["data:,"]
    assert not re.search(r"url\(|@import|https?:", report.page("title", sections("text")))


@pytest.mark.parametrize("part", range(5))
def test_sections_stand_alone(part):
    reader = Reader(report.page("title", [sections("text")[part]]))
    assert reader.tags.count("section") == (part != 0)


def test_empty_sections():
    empty = [
        report.table("t", ["a"], []),
        report.curves("c", [Chart("c", []), Chart("log", [Series("s", [])], log=True)]),
        report.bars("b", [Bars("b", "ms", {})]),
        report.token_texts("t", [], [Shade("weight", "", "")]),
        report.token_texts("t", [Example("e", "p", [Response("r", [])])], [Shade("weight", "", "", signed=True)]),
    ]
    assert Reader(report.page("title", empty)).tags.count("section") == 5


@pytest.mark.parametrize(
    "value, text",
    [(0.0, "0"), (0.69314718, "0.6931"), (12.5, "12.5"), (-1234.56, "-1235"), (3.1e-6, "3.1e-6"), (1e-4, "1e-4"),
     (2.5e7, "2.5e7"), (9.99e-4, "1e-3"), (float("nan"), float), (8, 8), ("text", "text"), (None, None)],
)  # fmt: skip
def test_number(value, text):
    found = report.number(value)
    assert type(found) is text if isinstance(text, type) else found == text


def test_numbers_reach_the_page():
    text = "".join(Reader(report.page("t", [
        report.headline("t", "s", {"beta": 0.125, "steps": 8}),
        report.table("t", ["", "a", "b"], [["row", 611.125, 2.5e-7]]),
        report.bars("b", [Bars("time", "ms", {"fused": 31.25, "eager": 62.5})]),
        report.curves("c", [Chart("loss", [Series("mean", [0.75, 0.5])], limit=0.625)]),
    ])).text)  # fmt: skip
    for expected in ("0.125", "8", "611.1", "2.5e-7", "31.25 ms", "62.5 ms", "mean, step 2: 0.5", "limit 0.625"):
        assert expected in text


def test_bars_share_a_scale():
    widths = re.findall(r"--w:([\d.]+)%", report.bars("b", [Bars("m", "MiB", {"a": 50.0, "b": 200.0, "c": 0.0})]))
    assert [float(width) for width in widths] == [25.0, 100.0, 0.0]


def heights(chart):
    return [float(height) for height in re.findall(r'cy="([\d.-]+)"', report.curves("c", [chart]))]


def test_the_axis_of_a_share_that_stayed_0_starts_at_0():
    assert ">-0.5<" not in report.curves("c", [Chart("c", [Series("s", [0.0, 0.0])])])
    assert ">-0.5<" in report.curves("c", [Chart("c", [Series("s", [-1.0, 1.0])])])


def test_curves_rise_with_their_values():
    low, middle, high = heights(Chart("c", [Series("s", [1.0, 1.5, 2.0])]))
    assert low - middle == pytest.approx(middle - high) and low > high
    low, middle, high = heights(Chart("c", [Series("s", [1e-8, 1e-6, 1e-4])], log=True))
    assert low - middle == pytest.approx(middle - high, abs=0.1) and low > high


def test_curves_leave_gaps_and_draw_zero_at_the_foot():
    assert len(heights(Chart("c", [Series("s", [1.0, None, float("nan"), float("inf"), 2.0])]))) == 2
    zero, small = heights(Chart("c", [Series("s", [0.0, 1e-7])], log=True))
    assert zero >= small


@pytest.mark.parametrize(
    "values", [[0.1, 0.9], [0.0, 0.0], [-5.0, 5.0], [0.693147, 0.693148], [1e9, 3e9], [7.0], [-1e-9, 2e-9]]
)
def test_a_linear_axis_encloses_its_values(values):
    axis = _linear_axis(Chart("c", [Series("s", values)]))
    slack = 1e-6 * (axis[-1] - axis[0])
    assert axis[0] <= min(values) + slack and axis[-1] >= max(values) - slack and 2 <= len(axis) <= 7


def test_a_log_axis_is_whole_decades():
    assert _log_axis(Chart("c", [Series("s", [3e-7, 2e-5])], limit=1e-4)) == [-7, -6, -5, -4]
    assert _log_axis(Chart("c", [Series("s", [0.0])])) == [-8, -7]


def tokens_of(page):
    return re.findall(r'<span class="(t[^"]*)"(?: style="--v:([\d.]+)")? title="([^"]*)">([^<]*)</span>', page)


def test_blue_is_more_and_red_is_less():
    for mode in re.findall(r":root \{(.*?)\}", STYLE, re.S):
        less, more = (
            list(map(int, re.search(rf"--{name}: (\d+ \d+ \d+)", mode)[1].split())) for name in ("less", "more")
        )
        assert less[0] > 2 * less[2] and more[2] > 2 * more[0]
    assert ".n { background: rgb(var(--less)" in STYLE and ".p { background: rgb(var(--more)" in STYLE


def test_tokens_are_coloured_by_sign_and_share():
    tokens = [Token("up", {"gradient": -0.5}), Token("down", {"gradient": 0.25}), Token("rest", {"gradient": 0.0})]
    page = report.token_texts(
        "t", [Example("e", "p", [Response("r", tokens)])], [Shade("gradient", "", "", signed=True)]
    )
    assert [(classes, share, text) for classes, share, _, text in tokens_of(page)] == [
        ("t n", "1.000", "up"), ("t p", "0.500", "down"), ("t", "", "rest")
    ]  # fmt: skip


def test_tokens_tell_their_numbers_and_spans():
    tokens = [Token(" a\n", {"weight": 2.0, "log-prob": -1.25}, ["factual", "repetition"], "factual: wrong town"),
              Token("b", {"weight": 1.0}, ["repetition"]), Token("c", {"weight": 1.0})]  # fmt: skip
    page = report.token_texts("t", [Example("e", "p", [Response("r", tokens)])], [Shade("weight", "", "")])
    first, second, third = tokens_of(page)
    assert "weight 2, log-prob -1.25" in first[2] and "factual: wrong town" in first[2] and first[3] == " a↵\n"
    assert "repetition" in second[2]
    assert [classes for classes, *_ in (first, second, third)] == ["t a k k0", "t a k k1", "t a"]
    assert 'class="t k k0">factual' in page and 'class="t k k1">repetition' in page  # the legend


def test_a_line_stands_before_a_token_that_starts_something():
    tokens = [Token("a", {"weight": 1.0}, starts=True), Token("b", {"weight": 0.0})]
    page = report.token_texts("t", [Example("e", "p", [Response("r", tokens)])], [Shade("weight", "", "")])
    assert [classes for classes, *_ in tokens_of(page)] == ["t a s", "t"] and ".s {" in STYLE


def luminance(rgb):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_ink_is_legible_on_the_strongest_shade(mode):
    block = re.findall(r":root \{(.*?)\}", STYLE, re.S)[mode]
    colour = {
        name: [int(code[i : i + 2], 16) for i in (0, 2, 4)] for name, code in re.findall(r"--(\w+): #(\w{6})", block)
    }
    shades = {name: list(map(int, triple.split())) for name, triple in re.findall(r"--(\w+): (\d+ \d+ \d+)", block)}
    opacity = float(re.search(r"--shade: ([\d.]+)", block)[1])
    mixed = {
        n: [opacity * a + (1 - opacity) * b for a, b in zip(rgb, colour["card"], strict=True)]
        for n, rgb in shades.items()
    }
    assert mixed.keys() == {"less", "more", "amount"}
    for ink, ground in [("ink", rgb) for rgb in mixed.values()] + [("soft", colour["paper"]), ("soft", colour["card"])]:
        low, high = sorted([luminance(colour[ink]), luminance(ground)])
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_write_is_utf8(tmp_path):
    path = report.write(tmp_path / "r.html", "naïve — 🙂", [report.headline("naïve — 🙂", "", {})])
    assert path.read_bytes().decode("utf-8").count("naïve — 🙂") == 2


def test_tag_escapes_all_but_html():
    assert (
        tag("p", "<", Html("<br>"), None, 3, class_='"', stroke_width=2)
        == '<p class="&quot;" stroke-width="2">&lt;<br>3</p>'
    )


@pytest.mark.parametrize("value, text", [(0.0136, "+0.014"), (-2.5, "-2.500"), (-0.0004, "+0.000"), (0.0, "+0.000")])
def test_a_score_that_rounds_to_0_has_no_minus(value, text):
    assert report.signed(value) == text


def test_counts_have_whole_ticks():
    values = [0.1 * i for i in range(11)]
    for drawn in (values[:2], values, values * 3):
        page = str(report.distributions("title", [report.Histogram("pairs", drawn, "strength", bins=2)]))
        levels = re.findall(r'text-anchor="end">([^<]+)<', page)
        assert len(levels) >= 2 and all(level == str(int(level)) for level in levels), levels

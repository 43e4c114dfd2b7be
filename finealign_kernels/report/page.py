"""The page: its frame, the headline and tables."""

from pathlib import Path

from .markup import Html, number, section, tag
from .style import STYLE

# Nothing is loaded and no script runs, whatever text a data file carries.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(title, sections):
    """A whole HTML document of `sections`, each the result of a section function. Loads nothing, runs no script."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    return Html(f"<!doctype html>\n{tag('html', head, tag('body', tag('main', *sections)), lang='en')}\n")


def write(path, title, sections):
    """Writes `page(title, sections)` to `path`, UTF-8, and returns the path."""
    path = Path(path)
    path.write_text(page(title, sections), encoding="utf-8")
    return path


def headline(title, sentence, facts, *, eyebrow="finealign report"):
    """The top of the page: what was run, a sentence that explains the result, and facts (name -> text or number)."""
    pairs = [tag("div", tag("dt", name), tag("dd", number(fact))) for name, fact in facts.items()]
    return tag(
        "header",
        tag("p", eyebrow, class_="eyebrow"),
        tag("h1", title),
        tag("p", sentence, class_="lead"),
        tag("dl", *pairs, class_="facts"),
    )


def table(title, columns, rows, *, note=None):
    """A section with one table. The first cell of a row names it; numbers get four significant digits."""
    head = tag("tr", *(tag("th", name, scope="col") for name in columns))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", number(cell)) for cell in row[1:])) for row in rows]
    grid = tag("table", tag("thead", head), tag("tbody", *body))
    return section(title, tag("div", grid, class_="scroll"), note=note)

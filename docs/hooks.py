"""What mkdocs.yml uses beside its plugins: equations become MathML, columns of docstrings become tables."""

import re
import textwrap
from html import escape

import griffe
from latex2mathml.converter import convert

CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.S | re.M)
EQUATION = re.compile(r"\$\$(.+?)\$\$|\\\((.+?)\\\)", re.S)


def on_page_markdown(markdown, **_):
    """$$...$$ as a block and \\(...\\) in a line, outside code: browsers draw MathML without a script."""
    parts = CODE.split(markdown)
    return "".join(part if i % 2 else EQUATION.sub(_mathml, part) for i, part in enumerate(parts))


def _mathml(found):
    block, line = found.groups()
    return convert(block.strip(), display="block") if block else convert(line.strip())


ROW = re.compile(r"(\S(?:.*?\S)?) {2,}(\S.*)")  # name  what it is


def columns(text: str) -> str:
    """A docstring's text behind its first paragraph, as Markdown and HTML.

    A paragraph of lines "name  what it is" becomes a table, where a line that is indented continues the one above it.
    Paragraphs that are indented as a whole (equations, examples) and those with >>> stay as they are.
    """
    return "\n\n".join(map(_paragraph, re.split(r"\n\s*\n", text.rstrip())))


def _paragraph(text: str) -> str:
    lines = text.strip("\n").split("\n")
    if lines[0].startswith("  ") or ">>>" in text:
        return "\n".join(("``` { .text .columns }", textwrap.dedent("\n".join(lines)), "```"))
    rows: list[tuple[str, str]] = []  # a line without a name has ""
    for line in lines:
        if line.startswith(" ") and rows:
            rows[-1] = rows[-1][0], f"{rows[-1][1]} {line.strip()}"
        elif (row := ROW.fullmatch(line)) and all(len(name.split()) <= 3 for name in row[1].split(", ")):
            rows.append(row.groups())
        elif rows and not rows[-1][0]:
            rows[-1] = "", f"{rows[-1][1]} {line}"
        else:
            rows.append(("", line))
    cells = "".join(
        f"<tr><td>{escape(name)}</td><td>{_html(what)}</td></tr>"
        if name
        else f'<tr><td colspan="2">{_html(what)}</td></tr>'
        for name, what in rows
    )
    return f'<table class="columns">{cells}</table>'


def _html(text: str) -> str:
    """Text of a table's cell, in which Markdown does nothing: `names` as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


class KeepColumns(griffe.Extension):
    """The first paragraph of a docstring is prose; the rest has equations and columns, which Markdown would join."""

    def on_instance(self, *, obj, **_):
        if obj.docstring is None and obj.is_attribute:
            self._comment(obj)
        if obj.is_attribute and "class-attribute" not in obj.labels:
            obj.value = None  # an expression of __init__, which is no default
        if obj.docstring is None:
            return
        first, _, rest = obj.docstring.value.partition("\n\n")
        first = first if "`" in first else re.sub(r"([\\*_\[\]<>#])", r"\\\1", first)
        obj.docstring.value = first + (f"\n\n{columns(rest)}" if rest.strip() else "")

    def _comment(self, attribute):
        """A field of a result is documented by the comment behind it, or by those in the lines above it."""
        line = attribute.lines[0] if attribute.lines else ""
        comment = re.search(r"\s#\s*(?:noqa\S*.*)?(.*)", line)
        if comment and comment[1]:
            attribute.docstring = griffe.Docstring(comment[1], parent=attribute)

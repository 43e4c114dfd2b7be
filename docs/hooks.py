"""What mkdocs.yml uses beside its plugins: equations become MathML, docstrings keep their columns."""

import re

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


class KeepColumns(griffe.Extension):
    """The first paragraph of a docstring is prose; the rest has equations and columns, which Markdown would join."""

    def on_instance(self, *, obj, **_):
        if obj.docstring is None and obj.is_attribute:
            self._comment(obj)
        if obj.docstring is None:
            return
        first, _, rest = obj.docstring.value.partition("\n\n")
        first = first if "`" in first else re.sub(r"([\\*_\[\]<>#])", r"\\\1", first)
        obj.docstring.value = first + (f"\n\n``` {{ .text .columns }}\n{rest.rstrip()}\n```" if rest.strip() else "")

    def _comment(self, attribute):
        """A field of a result is documented by the comment behind it, or by those in the lines above it."""
        line = attribute.lines[0] if attribute.lines else ""
        comment = re.search(r"\s#\s*(?:noqa\S*.*)?(.*)", line)
        if comment and comment[1]:
            attribute.docstring = griffe.Docstring(comment[1], parent=attribute)

"""The report: one self-contained HTML page from plain records.

A page is a list of sections; each section function returns HTML and knows nothing of the others:

    headline(title, sentence, facts)            what was run, how to read the result, facts as name -> text or number
    table(title, columns, rows)                 rows of text and numbers, the first cell names its row
    curves(title, [Chart(...), ...])            lines over steps, linear or in decades
    bars(title, [Bars(...), ...])               amounts of one unit, drawn from 0
    distributions(title, [Histogram(...), Scatter(...)])            counts by value, points of two values
    token_texts(title, [Example(...), ...], [Shade(...), ...])      text with each token coloured by numbers

    write("report.html", "DPO on a small model", [headline(...), table(...), curves(...)])

`number` and `signed` are how the page writes a float, for those who print the same figures.

Records are NamedTuples of strings and numbers: `Series`, `Chart`, `Bars`, `Histogram`, `Scatter`, `Token`, `Response`,
`Example`, `Shade`.
Every text is escaped. The page loads nothing and runs no script, follows the reader's light or dark setting, and
works at the width of a phone.
"""

from .charts import Bars, Chart, Histogram, Scatter, Series, bars, curves, distributions
from .markup import number, signed
from .page import headline, page, table, write
from .tokens import Example, Response, Shade, Token, token_texts

__all__ = [
    "Bars",
    "Chart",
    "Example",
    "Histogram",
    "Response",
    "Scatter",
    "Series",
    "Shade",
    "Token",
    "bars",
    "curves",
    "distributions",
    "headline",
    "number",
    "page",
    "signed",
    "table",
    "token_texts",
    "write",
]

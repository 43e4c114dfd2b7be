"""Text whose tokens are coloured by numbers."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .markup import number, section, tag

_UNDERLINES = 6


class Shade(NamedTuple):
    """A number that colours tokens: amounts by one colour from 0 on, signed numbers from red (-) to blue (+).

    A signed number must be positive where it is good or makes a token more likely (for example minus the gradient of a
    loss), so that a colour has the same meaning on every page.
    """

    name: str  # the key in Token.values
    low: str  # what the left end of the legend means
    high: str  # what the right end means
    signed: bool = False


class Token(NamedTuple):
    """A token: its text, numbers by name (those with a Shade colour it), the kinds of its spans, and a note.

    Numbers and note are in the hover text. The first kind decides the underline. `starts` draws a line before the
    token.
    """

    text: str
    values: Mapping[str, float]
    kinds: Sequence[str] = ()
    note: str = ""
    starts: bool = False


class Response(NamedTuple):
    """One answer: its name, its tokens, a short remark beside the name, and notes listed below it."""

    name: str
    tokens: Sequence[Token]
    remark: str = ""
    notes: Sequence[str] = ()


class Example(NamedTuple):
    """A prompt and its answers, which are shown side by side."""

    title: str
    prompt: str
    responses: Sequence[Response]


def token_texts(title, examples, shades, *, note=None):
    """A section of examples. Each answer is printed once for each shade; span kinds are underlined.

    Colours are comparable across the section: full colour is the largest absolute value shown in it.
    """
    tops = {shade.name: _largest(examples, shade.name) for shade in shades}
    kinds = _kinds(examples)
    blocks = [_example(example, shades, tops, kinds) for example in examples]
    return section(title, _keys(shades, tops, kinds), *blocks, note=note)


def _tokens(examples):
    return (token for example in examples for response in example.responses for token in response.tokens)


def _largest(examples, name):
    return max((abs(token.values.get(name, 0.0)) for token in _tokens(examples)), default=0.0)


def _kinds(examples):
    """The number of the underline of each span kind, in order of appearance."""
    seen = dict.fromkeys(kind for token in _tokens(examples) for kind in token.kinds)
    return {kind: i % _UNDERLINES for i, kind in enumerate(seen)}


def _keys(shades, tops, kinds):
    ramps = [
        tag(
            "span",
            tag("strong", shade.name),
            f"{number(-tops[shade.name] if shade.signed else 0.0)} {shade.low}",
            tag("i", class_="ramp two" if shade.signed else "ramp one"),
            f"{number(tops[shade.name])} {shade.high}",
        )
        for shade in shades
    ]
    underlines = [tag("span", tag("span", kind, class_=f"t k k{i}")) for kind, i in kinds.items()]
    return tag("div", *ramps, *underlines, class_="keys")


def _example(example, shades, tops, kinds):
    responses = [_response(response, shades, tops, kinds) for response in example.responses]
    return tag(
        "article",
        tag("h3", example.title),
        tag("p", example.prompt, class_="prompt"),
        tag("div", *responses, class_="responses"),
        class_="example",
    )


def _response(response, shades, tops, kinds):
    texts = []
    for shade in shades:
        texts.append(tag("p", f"by {shade.name}", class_="by"))
        tokens = [_token(token, shade, tops[shade.name], kinds) for token in response.tokens]
        texts.append(tag("p", *tokens, class_="text"))
    header = tag("header", tag("h3", response.name), tag("span", response.remark))
    notes = tag("ul", *(tag("li", note) for note in response.notes), class_="notes") if response.notes else None
    return tag("div", header, *texts, notes, class_="response")


def _token(token, shade, top, kinds):
    value = token.values.get(shade.name, 0.0)
    colour = None if value == 0 or top == 0 else "a" if not shade.signed else "n" if value < 0 else "p"
    underline = f"k k{kinds[token.kinds[0]]}" if token.kinds else None
    numbers = ", ".join(f"{name} {number(v)}" for name, v in token.values.items())
    return tag(
        "span",
        token.text.replace("\n", "↵\n"),
        class_=" ".join(filter(None, ["t", colour, underline, "s" if token.starts else None])),
        style=colour and f"--v:{abs(value) / top:.3f}",
        title=" · ".join(filter(None, [repr(token.text), numbers, token.note or ", ".join(token.kinds)])),
    )

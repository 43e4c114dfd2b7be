"""The records of fine-grained feedback. Each checks its fields when it is made; a ValueError names the wrong one."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from numbers import Integral, Real
from reprlib import repr as brief

LARGEST, SMALLEST = (2 - 2.0**-23) * 2.0**127, 2.0**-126  # normal numbers of float32


@dataclass(frozen=True)
class Span:
    """A part of a response that an annotator has marked: text[start:end].

    start, end  offsets in the response's text, in code points as Python's str counts them; end exclusive
    kind        the kind of judgement, for example "factual". Weights and rewards depend on it
    label       a comment of the annotator, or None
    score       the reward of the segment, negative for a fault. None: the reward of the kind is taken
    text        the covered text, or None. If given, it is compared with the response's text
    """

    start: int
    end: int
    kind: str
    label: str | None = None
    score: float | None = None
    text: str | None = None

    def __post_init__(self):
        _make_plain(self, "start", "end", "score")
        _require(_is_int(self.start) and self.start >= 0, "start", "an integer of at least 0", self.start)
        _require(_is_int(self.end) and self.end > self.start, "end", f"an integer above start ({self.start})", self.end)
        _require_text("kind", self.kind)
        if self.label is not None:
            _require_text("label", self.label)
        _require(self.score is None or _is_number(self.score), "score", "a finite number or null", self.score)
        _require(self.text is None or isinstance(self.text, str), "text", "a string or null", self.text)
        if self.text is not None:
            plain_text("text", self.text)


@dataclass(frozen=True)
class Response:
    """One answer to the prompt: its text, the marked spans, and a point-wise score in [0, 1] (1: a demonstration)."""

    text: str
    spans: tuple[Span, ...] = ()
    score: float | None = None

    def __post_init__(self):
        _make_plain(self, "score")
        _require_text("text", self.text)
        _hold(self, "spans", Span)
        _check_within(self.text, self.spans)
        in_range = self.score is None or (_is_number(self.score) and 0 <= self.score <= 1)
        _require(in_range, "score", "a number from 0 to 1, or null", self.score)


@dataclass(frozen=True)
class Preference:
    """responses[chosen] is better than responses[rejected]. strength is the number of votes for it, or None."""

    chosen: int
    rejected: int
    strength: float | None = None

    def __post_init__(self):
        _make_plain(self, "chosen", "rejected", "strength")
        _require(_is_int(self.chosen) and self.chosen >= 0, "chosen", "an integer of at least 0", self.chosen)
        _require(_is_int(self.rejected) and self.rejected >= 0, "rejected", "an integer of at least 0", self.rejected)
        _require(self.rejected != self.chosen, "rejected", "another response than chosen", self.rejected)
        positive = self.strength is None or (_is_number(self.strength) and self.strength > 0)
        _require(positive, "strength", "a finite number above 0, or null", self.strength)


@dataclass(frozen=True)
class Example:
    """A prompt, the responses to it, and the preferences between them."""

    id: str
    prompt: str
    responses: tuple[Response, ...]
    preferences: tuple[Preference, ...] = ()

    def __post_init__(self):
        _require_text("id", self.id)
        _require_text("prompt", self.prompt)
        _hold(self, "responses", Response)
        _hold(self, "preferences", Preference)
        _require(self.responses, "responses", "at least one response", self.responses)
        for i, preference in enumerate(self.preferences):
            for side in ("chosen", "rejected"):
                index = getattr(preference, side)
                expected = f"below {len(self.responses)}, the number of responses"
                _require(index < len(self.responses), f"preferences[{i}].{side}", expected, index)


UNITS = ("code points", "utf-16")


def to_spans(text, spans, *, unit="code points"):
    """The spans of a text as a tuple of Span, checked against the text.

    spans   a sequence, or an array (n, 2). Each item is a Span, a mapping with the fields of Span, or (start, end) or
            (start, end, kind). In a mapping, start and end are required, and None means left out. The kind is "fault"
            if none is given
    unit    what start and end count: "code points", as Python's str does, or "utf-16" code units, as JavaScript and
            label-studio do (a character above U+FFFF counts as two). The result counts code points
    Raises  ValueError that names the span, the field, what is expected and what was found

    If a span has a text of its own, it must be equal to the text that the span covers. This finds offsets in another
    unit, or in another version of the text.
    """
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {UNITS}, got {unit!r}")
    plain_text("text", text)
    found = []
    for i, span in enumerate(listed("spans", spans, "a sequence of spans")):
        record = span if isinstance(span, Span) else span_fields(span, f"spans[{i}]")
        if unit == "utf-16":
            record = to_json(record) if isinstance(record, Span) else dict(record)
            for name in ("start", "end"):
                record[name] = _from_utf16(text, record.get(name), f"spans[{i}].{name}")
        found.append(record if isinstance(record, Span) else from_json(Span, record, f"spans[{i}]."))
    _check_within(text, found)
    return tuple(found)


def span_fields(span, path):
    """The JSON object of a span given as a mapping, or as start, end and optionally a kind."""
    if isinstance(span, Mapping):
        return {"kind": "fault"} | {name: value for name, value in span.items() if value is not None}
    fits = isinstance(span, list | tuple) and len(span) in (2, 3)
    _require(fits, path, "a Span, a mapping with start and end, or (start, end) or (start, end, kind)", span)
    return {"kind": "fault"} | dict(zip(("start", "end", "kind"), span, strict=False))


def _from_utf16(text, offset, path):
    """An offset in UTF-16 code units as an offset in code points."""
    offset = _plain(offset)
    _require(_is_int(offset) and offset >= 0, path, "an integer of at least 0", offset)
    units = text.encode("utf-16-le")
    expected = f"at most {len(units) // 2}, the text's length in UTF-16 code units"
    _require(2 * offset <= len(units), path, expected, offset)
    try:
        return len(units[: 2 * offset].decode("utf-16-le"))
    except UnicodeDecodeError:
        raise ValueError(f"{path} must not lie inside a character of two code units, got {offset}") from None


def _check_within(text, spans):
    """Refuses spans that end outside the text, or whose own text differs from what they cover."""
    for i, span in enumerate(spans):
        expected = f"at most {len(text)}, the length of the text"
        _require(span.end <= len(text), f"spans[{i}].end", expected, span.end)
        covered = text[span.start : span.end]
        same = span.text is None or span.text == covered
        _require(same, f"spans[{i}].text", f"{brief(covered)}, what the span covers", span.text)


_ITEMS = {"responses": Response, "preferences": Preference, "spans": Span}


def from_json(cls, record, path=""):
    """The record of a JSON object. Errors name the field by its path, for example "responses[1].spans[0].end"."""
    known = [field.name for field in fields(cls)]
    if not isinstance(record, dict):
        what = f"{path.removesuffix('.')} must be" if path else "expected"
        raise ValueError(f"{what} a JSON object with {', '.join(known)}, got {brief(record)}")
    for name in record:
        _require(name in known, f"{path}{name}", f"left out or named one of {', '.join(known)}", record[name])
    for field in fields(cls):
        given = field.name in record or field.default is not MISSING
        _require(given, f"{path}{field.name}", "given", record)
    values = {name: _items(name, value, path) if name in _ITEMS else value for name, value in record.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{path}{error}") from None


def to_json(record):
    """The JSON object of a record. Fields that have their default value are left out."""
    if isinstance(record, tuple):
        return [to_json(item) for item in record]
    if not is_dataclass(record):
        return record
    values = [(field, getattr(record, field.name)) for field in fields(record)]
    return {field.name: to_json(value) for field, value in values if value != field.default}


def _items(name, value, path):
    _require(isinstance(value, list), f"{path}{name}", "a list", value)
    return tuple(from_json(_ITEMS[name], item, f"{path}{name}[{i}].") for i, item in enumerate(value))


def _hold(record, name, cls):
    """Turns the field, a list or a tuple, into a tuple; refuses items that are not records of cls."""
    items = getattr(record, name)
    fits = isinstance(items, list | tuple) and all(isinstance(item, cls) for item in items)
    _require(fits, name, f"a tuple of {cls.__name__}", items)
    object.__setattr__(record, name, tuple(items))


def _require(holds, field, expected, found):
    if not holds:
        raise ValueError(f"{field} must be {expected}, got {brief(found)}")


def _require_text(field, value):
    _require(isinstance(value, str) and value.strip(), field, "a string that is not blank", value)
    plain_text(field, value)


def plain_text(field, value):
    """The text, which may be blank; refuses other types and half of a surrogate pair."""
    _require(isinstance(value, str), field, "a string", value)
    halves = [i for i, char in enumerate(value) if "\ud800" <= char <= "\udfff"]  # no tokenizer and no file takes them
    if halves:
        raise ValueError(f"{field} must be valid Unicode, got half a surrogate pair at character {halves[0]}")
    return value


def listed(name, value, expected):
    """A sequence, array or tensor as a list; refuses a single item and a string."""
    value = value.tolist() if hasattr(value, "tolist") else value
    one = isinstance(value, str | bytes | Mapping | Span) or not isinstance(value, Iterable)
    _require(not one, name, expected, value)
    return list(value)


def range_of(name, value, most, expected):
    """(start, end) from a sequence of two whole numbers, 0 <= start <= end <= most; `expected` completes the error."""
    pair = tuple(map(_plain, value)) if isinstance(value, list | tuple) else ()
    fits = len(pair) == 2 and all(map(_is_int, pair)) and 0 <= pair[0] <= pair[1] <= most
    _require(fits, name, expected, value)
    return pair


def positive(name, value):
    """The value as a Python number. It must be above 0, and float32 must hold it and its inverse."""
    value = _plain(value)
    holds = _is_number(value) and value > 0 and SMALLEST <= value <= 1 / SMALLEST
    _require(holds, name, f"finite and above 0, between {SMALLEST:.2g} and {1 / SMALLEST:.2g}", value)
    return value


def finite(name, value):
    """The value as a Python number. It must be finite in float32."""
    value = _plain(value)
    _require(_is_number(value) and abs(value) <= LARGEST, name, f"a finite number, at most {LARGEST:.2g}", value)
    return value


def whole(name, value, least):
    """The value as a Python integer of at least `least`."""
    value = _plain(value)
    _require(_is_int(value) and value >= least, name, f"a whole number of at least {least}", value)
    return value


def flag(name, value):
    """The value as a Python bool."""
    value = _plain(value)
    _require(isinstance(value, bool), name, "True or False", value)
    return value


def _plain(value):
    """A number of numpy (also an array without dimensions) as a Python number; other values unchanged."""
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, int) else value


def _make_plain(record, *names):
    for name in names:
        object.__setattr__(record, name, _plain(getattr(record, name)))


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value):
    return (_is_int(value) or isinstance(value, float)) and abs(value) <= sys.float_info.max  # False for NaN

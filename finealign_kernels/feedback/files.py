"""Feedback files: reads and writes the package's JSONL, and reads the released JSON of QA-Feedback."""

import json
import os
from importlib import resources
from pathlib import Path
from reprlib import repr as brief

from .records import Example, Preference, Response, Span, from_json, listed, to_json


def read(path):
    """The examples of a file, as a list of Example.

    path     a JSONL file (one object a line), or the JSON list of QA-Feedback. The first character, "{" or "[", tells
             which of the two it is. Blank lines are skipped
    Raises   ValueError that names the file, the line or entry, the field, what is expected and what was found
    """
    text = _text(_path(path))
    if text.lstrip().startswith("["):
        return _gather(path, "entry", enumerate(_json(text, path)), qa_feedback_example)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return _gather(path, "line", lines, lambda line, _: from_json(Example, _json(line)))


def write(path, examples):
    """Writes the examples to `path` as JSONL in UTF-8. Raises ValueError if there are none, or if two share an id."""
    path = _path(path)
    examples = listed("examples", examples, "a sequence of Example")
    lines = [json.dumps(to_json(example), ensure_ascii=False) + "\n" for example in _distinct(path, examples)]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def _path(path):
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"path must be the name of a file, got {brief(path)}")
    return Path(path)


def sample():
    """The examples that come with the package, a list of Example: everyday topics with faults marked by hand.

    Some of the texts have characters outside ASCII.
    """
    with resources.as_file(resources.files(__package__) / "sample.jsonl") as path:
        return read(path)


def qa_feedback_example(entry, index=0):
    """One entry of QA-Feedback, `tasks/qa_feedback/data/*_feedback.json` of allenai/FineGrainedRLHF (arXiv:2306.01693).

    The prompt is the question followed by the passages. Responses 0 to 3 are the four predictions. Annotators marked
    errors in the first one only: they become its spans. Without errors its score is 1. (Missing information is not
    marked in the text and is not counted.) If there is a corrected prediction and it differs, it becomes response 4
    with score 1, preferred to response 0.

    The six comparisons become preferences; ties are left out. A comparison is a vote for one response, and each
    response is compared three times. The strength of a pair is the number of votes that the chosen response has more
    than the rejected one, 1 to 3. If comparisons contradict each other in a circle, there may be no such surplus; the
    strength is then None.
    """
    predictions = [_take(entry, f"prediction {k}", str) for k in range(1, 5)]
    feedback = _take(entry, "feedback", dict)
    errors = _take(feedback, "errors", list)
    spans = [_qa_span(error, f"feedback.errors[{i}].") for i, error in enumerate(errors)]
    responses = [Response(predictions[0], spans, score=None if spans else 1.0), *map(Response, predictions[1:])]
    preferences = _qa_preferences(_take(entry, "preference", list))
    corrected = _take(feedback, "corrected-prediction", str)
    if corrected.strip() and corrected != predictions[0]:
        responses.append(Response(corrected, score=1.0))
        preferences.append(Preference(4, 0))
    prompt = [_take(entry, "question", str), *map(_qa_passage, _take(entry, "passages", list))]
    return Example(f"qa-feedback-{index}", "\n\n".join(prompt), responses, preferences)


def _qa_span(error, path):
    values = [_take(error, name, kind, path) for name, kind in (("start", int), ("end", int), ("error type", str))]
    try:
        return Span(*values, label=error.get("explanation") or None)
    except ValueError as wrong:
        raise ValueError(f"{path}{wrong}") from None


def _qa_preferences(judgements):
    if len(judgements) != 6 or any(judgement not in (0, 1, 2) for judgement in judgements):
        raise ValueError(f"preference must be six judgements, each 0, 1 or 2, got {brief(judgements)}")
    judged = zip([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], judgements, strict=True)
    pairs = [pair if judgement == 1 else pair[::-1] for pair, judgement in judged if judgement != 0]
    votes = [sum(chosen == i for chosen, _ in pairs) for i in range(4)]
    return [Preference(i, j, strength=votes[i] - votes[j] if votes[i] > votes[j] else None) for i, j in pairs]


def _qa_passage(passage):
    """The title, then the sentences. The first passage of a page already begins with the title."""
    if not isinstance(passage, list) or not passage or not all(isinstance(part, str) for part in passage):
        raise ValueError(f"passages must be lists of strings, the title first, got {brief(passage)}")
    title, text = passage[0], " ".join(passage[1:])
    return text if text.startswith(title) else f"{title}\n\n{text}"


def _take(entry, name, kind, path=""):
    if not isinstance(entry, dict) or name not in entry:
        raise ValueError(f"{path}{name} must be given, as in QA-Feedback, got {brief(entry)}")
    if not isinstance(entry[name], kind):
        raise ValueError(f"{path}{name} must be of type {kind.__name__}, got {brief(entry[name])}")
    return entry[name]


def _gather(path, unit, numbered, make):
    examples = []
    for number, item in numbered:
        try:
            examples.append(make(item, number))
        except ValueError as error:
            raise ValueError(f"{path}, {unit} {number}: {error}") from None
    return _distinct(path, examples)


def _distinct(path, examples):
    """The examples as a list. Refuses an empty one, which would train on nothing, and an id that occurs twice."""
    examples, seen = list(examples), set()
    if not examples:
        raise ValueError(f"{path} must hold at least one example, got none")
    for example in examples:
        if not isinstance(example, Example):
            raise ValueError(f"{path}: examples must be Example, got {brief(example)}")
        if example.id in seen:
            raise ValueError(f"{path}: id must be different in every example, got {example.id!r} twice")
        seen.add(example.id)
    return examples


def _json(text, path=None):
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"expected JSON, got {brief(text)} (nested too deeply)") from None
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}: " if path else ""
        raise ValueError(f"{where}expected JSON, got {brief(text)} ({error.msg}, column {error.colno})") from None


def _text(path):
    try:
        return path.read_text(encoding="utf-8-sig")  # editors on Windows put a byte order mark in front
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8, got byte 0x{error.object[error.start]:02x} at {error.start}") from None

"""Feedback files: read and write the package's JSONL, and read QA-Feedback's JSON as it was released."""

import json
from importlib import resources
from pathlib import Path
from reprlib import repr as brief

from .records import Example, Preference, Response, Span, from_json, to_json


def read(path):
    """The examples of a file, a list of Example: JSONL (one object a line), or QA-Feedback's JSON list.

    Which of the two it is shows in the first character, "{" or "[". Blank lines are skipped.
    Raises  ValueError naming file, line (in a list: entry), field, what it should be and what it is.
    """
    text = _text(Path(path))
    if text.lstrip().startswith("["):
        return _gather(path, "entry", enumerate(_json(text, path)), qa_feedback_example)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return _gather(path, "line", lines, lambda line, _: from_json(Example, _json(line)))


def write(path, examples):
    """Writes the examples as JSONL, UTF-8. Raises ValueError where two share an id or there are none."""
    lines = [json.dumps(to_json(example), ensure_ascii=False) + "\n" for example in _distinct(path, examples)]
    Path(path).write_text("".join(lines), encoding="utf-8", newline="\n")


def sample():
    """The examples that come with the package: everyday topics, faults marked by hand, some text beyond ASCII."""
    with resources.as_file(resources.files(__package__) / "sample.jsonl") as path:
        return read(path)


def qa_feedback_example(entry, index=0):
    """One entry of QA-Feedback, `tasks/qa_feedback/data/*_feedback.json` of allenai/FineGrainedRLHF (arXiv:2306.01693).

    The prompt is the question, then the passages. Responses 0 to 3 are the four predictions. Annotators marked errors
    in the first only: they become its spans, and without any its score is 1 (missing information is no span and does
    not count). The corrected prediction, where there is one and it differs, is response 4: score 1, preferred to 0.

    The six judgements become preferences, ties left out. Each is a vote for one response, every response is judged
    three times, so a pair's strength is how many votes more the chosen one has, 1 to 3; judgements that run in a
    circle leave the chosen one with no more, and then it is None.
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
    """Title, then sentences; a page's first passage has the title in its first sentence already."""
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
    """The examples as a list, in which no id comes twice; a file without any would train on nothing, silently."""
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

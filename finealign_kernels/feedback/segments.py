"""Sentences and sub-sentences of a response, as character ranges, and the last token of each: where its reward goes."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from .records import Span, listed, range_of, whole
from .spans import core, token_cores

Range = tuple[int, int]

_END = re.compile(r"[.!?…]+[\"'”’»)\]]*(?=\s)|[。！？]+[”’」』）]*|[\r\n\u2028\u2029]+")
_ABBREVIATION = re.compile(r"(?<![\w'’])(?:[^\W\d_][\u0300-\u036f]*|Mrs?|Ms|Dr|Prof|St|Mt|vs|[Nn]os?|cf)\.$")
_BLANK = re.compile(r"[ \t\u00a0]*")
_LIST_NUMBER = re.compile(r"\s*\d+\.$")


def sentences(text: str) -> list[Range]:
    """The sentences of text, (start, end) in characters, end exclusive, without the white space between them.

    A sentence ends after a run of . ! ? … with the quotes and brackets that close behind it, where white space follows
    and then no lower-case letter; after 。！？ in any case; and at a line break. No end is seen in a decimal number, in
    a number that opens a line ("2. Then"), after a single letter (initials, "e.g.", "U.S.") and after Mr. Mrs. Ms. Dr.
    Prof. St. Mt. vs. no. nos. cf.

    It knows no other abbreviation ("approx. Two" is cut), does not cut where a sentence ends in a single letter
    ("vitamin C. Then", "in the U.S. Then"), and takes lines wrapped at a width for sentences. Where that matters, hand
    a better splitter to sub_sentences and segment_tokens; spaCy's, for one:
    [(s.start_char, s.end_char) for s in nlp(text).sents].
    """
    if not isinstance(text, str):
        raise ValueError(f"text must be a string, got {type(text).__name__}")
    found, start = [], 0
    for match in _END.finditer(text):
        if _ends(text, start, match):
            found.append((start, match.end()))
            start = match.end()
    return _trimmed(text, [*found, (start, len(text))])


def sub_sentences(text: str, *, least: int = 5, splitter: Callable[[str], Iterable[Range]] = sentences) -> list[Range]:
    """The sub-sentences of text, (start, end) in characters: sentences cut behind , ; ! ? into parts of some length.

    Words, split at white space, are 0 to N - 1. Behind a word i - 1 that ends in one of , ; ! ? with i + least < N

        a part opens at i                             where the present one has `least` words or more
        the present one joins the one before it,      where it has fewer and is not the sentence's first
        and a part opens at i
        nothing happens: it joins what follows        where it has fewer and is the first

    so the parts of a sentence that is cut have at least `least` words each, and one of 2 least words or fewer is whole.

    splitter  text -> (start, end) of its sentences, in order
    Source    arXiv:2306.01693, fgrlhf/reward_utils.py of its code.
    """
    least = whole("least", least, 1)
    parts = []
    for start, end in _trimmed(text, splitter(text)):
        words = [(start + word.start(), start + word.end()) for word in re.finditer(r"\S+", text[start:end])]
        opens = _opens([text[first:stop] for first, stop in words], least)
        for low, high in zip(opens, [*opens[1:], len(words)], strict=True):
            parts.append((words[low][0], words[high - 1][1]))
    return parts


def segment_tokens(offsets: Sequence[Range], text: str, segments: Iterable[Range]) -> list[int]:
    """The last token of each segment, an index into offsets: the place of the token in its response, counted from 0.

    What SegmentRewards calls end is a column of the batch. The two are one where no prompt stands in front of the
    response; `segment_rewards` makes columns of these indices by the batch's mask.

    That is the last token that shares a character with it that is not white space: ".\\n" belongs to the sentence that
    the "." ends, the last of the tokens of one character to that character's segment, an end-of-sequence token to none.
    A segment without such a token, because the response was cut off before it, gets the last token before it, or 0
    where there is none: token_rewards then sees a segment without tokens, or one that ends at the first token. None is
    ever in front of the response, so token_rewards may refuse such an end.

    offsets   (start, end) of each token in text, as a fast tokenizer gives them
    segments  (start, end) in text, in order; also Span or {"start": ..., "end": ...}
    Raises    ValueError if a segment is out of order or ends beyond the text.
    """
    tokens = token_cores(offsets, text)
    last, at, before = [], 0, 0
    for i, segment in enumerate(listed("segments", segments, "a sequence of (start, end)")):
        segment = _bounds(segment)
        if isinstance(segment, list | tuple) and (segment[0] < before or segment[1] > len(text)):
            expected = f"segments must be in order, without overlap, and end at most at {len(text)}"
            raise ValueError(f"{expected}, got {segment} after a segment that ends at {before}")
        segment = range_of(f"segments[{i}]", segment, len(text), "(start, end), whole numbers")
        start, end = core(text, *segment)
        before = segment[1]
        own = [t for t, (first, stop) in enumerate(tokens) if max(first, start) < min(stop, end)]
        at = max(at, own[-1]) if own else at
        last.append(at)
    return last


def _bounds(segment) -> Range:
    if isinstance(segment, Mapping):
        return segment["start"], segment["end"]
    return (segment.start, segment.end) if isinstance(segment, Span) else tuple(segment[:2])


def _ends(text: str, start: int, match: re.Match) -> bool:
    mark = match[0]
    if mark[0] in "。！？\r\n\u2028\u2029":
        return True
    following = _BLANK.match(text, match.end()).end()
    if text[following : following + 1].islower():
        return False
    dot = match.start() + 1
    short = _ABBREVIATION.search(text, max(start, dot - 16), dot) or _LIST_NUMBER.fullmatch(text, start, dot)
    return mark != "." or not short


def _trimmed(text: str, ranges: Iterable[Range]) -> list[Range]:
    """The ranges without the white space around them, blank ones dropped."""
    trimmed = [core(text, start, end) for start, end in ranges]
    return [(start, end) for start, end in trimmed if start < end]


def _opens(words: list[str], least: int) -> list[int]:
    """Indices of the words at which the parts of one sentence open."""
    opens = [0] if words else []
    for i in range(1, len(words)):
        if words[i - 1][-1] not in ",;!?" or i + least >= len(words):
            continue
        if i - opens[-1] >= least:
            opens.append(i)
        elif opens[-1] != 0:
            opens[-1] = i
    return opens

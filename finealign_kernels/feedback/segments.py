"""Sentences and sub-sentences of a response as character ranges, and the last token of each, which gets its reward."""

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

from .records import Span, listed, plain_text, range_of, whole
from .spans import token_ranges, trimmed

Range = tuple[int, int]

_END = re.compile(r"[.!?…]+[\"'”’»)\]]*(?=\s)|[。！？]+[”’」』）]*|[\r\n\u2028\u2029]+")
_ABBREVIATION = re.compile(r"(?<![\w'’])(?:[^\W\d_][\u0300-\u036f]*|Mrs?|Ms|Dr|Prof|St|Mt|vs|[Nn]os?|cf)\.$")
_BLANK = re.compile(r"[ \t\u00a0]*")
_LIST_NUMBER = re.compile(r"\s*\d+\.$")


def sentences(text: str) -> list[Range]:
    """The sentences of text: (start, end) in characters, end exclusive, without the white space between them.

    A sentence ends

        after . ! ? … and the quotes or brackets that follow, if white space comes next and then no lower-case letter
        after 。！？ always
        at a line break

    It does not end in a decimal number, after a number at the start of a line ("2. Then"), after a single letter
    (initials, "e.g.", "U.S."), or after Mr. Mrs. Ms. Dr. Prof. St. Mt. vs. no. nos. cf.

    Limits: other abbreviations end a sentence ("approx. Two" is cut). A single letter never does ("vitamin C. Then",
    "in the U.S. Then" are not cut). Each line of wrapped text becomes a sentence. If this matters, give sub_sentences
    and segment_tokens a better splitter, for example spaCy: [(s.start_char, s.end_char) for s in nlp(text).sents].
    """
    plain_text("text", text)
    found, start = [], 0
    for match in _END.finditer(text):
        if _ends(text, start, match):
            found.append((start, match.end()))
            start = match.end()
    return _trimmed_ranges(text, [*found, (start, len(text))])


def sub_sentences(text: str, *, least: int = 5, splitter: Callable[[str], Iterable[Range]] = sentences) -> list[Range]:
    """The sub-sentences of text, (start, end) in characters: each sentence cut after , ; ! ? into parts.

    The words of a sentence, split at white space, are numbered 0 to N - 1. If word i - 1 ends in , ; ! or ? and
    i + least < N, then

        the part so far has least words or more               a new part begins at word i
        it has fewer words, and is not the sentence's first   it is joined to the part before it, and a new part
                                                              begins at word i
        it has fewer words, and is the sentence's first       no cut is made

    Each part of a sentence that is cut therefore has at least `least` words. A sentence with 2 · least words or fewer
    is never cut.

    least     the smallest number of words in a part
    splitter  a function from text to the (start, end) of its sentences, in order
    Source    arXiv:2306.01693, fgrlhf/reward_utils.py of its code
    """
    least, parts = whole("least", least, 1), []
    for start, end in _trimmed_ranges(text, _split(plain_text("text", text), splitter)):
        words = [(start + word.start(), start + word.end()) for word in re.finditer(r"\S+", text[start:end])]
        opens = _opens([text[first:stop] for first, stop in words], least)
        for low, high in zip(opens, [*opens[1:], len(words)], strict=True):
            parts.append((words[low][0], words[high - 1][1]))
    return parts


def segment_tokens(offsets: Sequence[Range], text: str, segments: Iterable[Range]) -> list[int]:
    """The last token of each segment, as an index into offsets: token 0 is the first token of the response.

    These are not yet columns of a batch, which SegmentRewards.end needs: the two differ if a prompt stands before the
    response. `segment_rewards` computes the columns from the mask of the batch.

    The last token of a segment is the last one that shares with it a character other than white space. A token ".\\n"
    therefore belongs to the sentence that "." ends, and the end-of-sequence token belongs to no segment. If the
    response was cut off before a segment, the segment has no token: it gets the last token before it, or 0 if there is
    none.

    offsets   (start, end) of each token in text, as a fast tokenizer returns them
    segments  (start, end) in text, in order; also Span or {"start": ..., "end": ...}
    Returns   a list of as many indices as there are segments, in ascending order
    Raises    ValueError if a segment is out of order or ends outside the text
    """
    tokens = token_ranges(offsets, text)
    last, at, before = [], 0, 0
    for i, segment in enumerate(listed("segments", segments, "a sequence of (start, end)")):
        segment = range_of(f"segments[{i}]", _bounds(segment), sys.maxsize, "(start, end), whole numbers")
        if segment[0] < before or segment[1] > len(text):
            expected = f"segments must be in order, without overlap, and end at most at {len(text)}"
            raise ValueError(f"{expected}, got {segment} after a segment that ends at {before}")
        start, end = trimmed(text, *segment)
        before = segment[1]
        own = [t for t, (first, stop) in enumerate(tokens) if max(first, start) < min(stop, end)]
        at = max(at, own[-1]) if own else at
        last.append(at)
    return last


def _bounds(segment):
    """(start, end) of a segment in any of its forms; another form as it is."""
    if isinstance(segment, Mapping):
        return (segment["start"], segment["end"]) if {"start", "end"} <= segment.keys() else segment
    if isinstance(segment, Span):
        return segment.start, segment.end
    return tuple(segment[:2]) if isinstance(segment, list | tuple) or hasattr(segment, "tolist") else segment


def _split(text: str, splitter: Callable[[str], Iterable[Range]]) -> list[Range]:
    """The ranges that a splitter finds, checked."""
    if not callable(splitter):
        raise ValueError(f"splitter must be a function from text to ranges, got {type(splitter).__name__}")
    ranges = listed("what splitter returns", splitter(text), "a sequence of (start, end)")
    expected = f"(start, end) with 0 <= start <= end <= {len(text)}, the length of the text"
    return [range_of(f"splitter's range {i}", _bounds(one), len(text), expected) for i, one in enumerate(ranges)]


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


def _trimmed_ranges(text: str, ranges: Iterable[Range]) -> list[Range]:
    """The ranges without the white space around them; blank ones are dropped."""
    ranges = [trimmed(text, start, end) for start, end in ranges]
    return [(start, end) for start, end in ranges if start < end]


def _opens(words: list[str], least: int) -> list[int]:
    """Indices of the words at which the parts of a sentence begin."""
    opens = [0] if words else []
    for i in range(1, len(words)):
        if words[i - 1][-1] not in ",;!?" or i + least >= len(words):
            continue
        if i - opens[-1] >= least:
            opens.append(i)
        elif opens[-1] != 0:
            opens[-1] = i
    return opens

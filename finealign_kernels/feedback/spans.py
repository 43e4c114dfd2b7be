"""From character spans to tokens, by means of the offsets that a fast tokenizer returns."""

import difflib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from reprlib import repr as brief
from typing import NamedTuple

from .records import Response, Span, finite, flag, listed, plain_text, positive, range_of, to_spans

_OFFSETS = "a sequence of (start, end), one a token"
# Spellings of U+FFFD in vocabularies: the character, its UTF-8 bytes in the byte-level alphabet, and as fallback bytes
REPLACEMENT = ("\ufffd", "\u00ef\u00bf\u00bd", "<0xEF><0xBF><0xBD>")


class Encoded(NamedTuple):
    """A prompt and a response as tokens. input_ids[response_start + t] covers text[offsets[t][0]:offsets[t][1]]."""

    input_ids: list[int]
    response_start: int  # length of the prompt in tokens
    offsets: list[tuple[int, int]]  # one per response token; empty for the end-of-sequence token


def encode(tokenizer, prompt: str | Sequence[int], response: Response | str, *, eos=True) -> Encoded:
    """The tokens of a prompt followed by those of a response, and the offsets of the response's tokens in its text.

    Prompt and response are tokenized separately and then joined, so no token crosses the boundary. A prompt has the
    same tokens before every response. No space is added between the two, except by a tokenizer that starts every text
    with one ("▁").

    tokenizer  a fast tokenizer of transformers; only these return offsets
    prompt     text, or token ids (for example from a chat template), which are taken unchanged. Text gets the special
               tokens that the tokenizer adds at the front, but not those that it adds at the end
    response   text, or a Response, whose text is taken
    eos        True appends the tokenizer's end-of-sequence token, if it has one
    Returns    Encoded: input_ids, response_start and offsets
    Raises     ValueError if the tokenizer is not a fast one, if the prompt is neither text nor token ids, or if a text
               holds half of a surrogate pair
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer must be a fast one, which gives offsets, got {type(tokenizer).__name__}")
    prompt_ids = _prompt_ids(tokenizer, prompt)
    if not isinstance(response, str | Response):
        raise ValueError(f"response must be text or a Response, got {type(response).__name__}")
    text = plain_text("response", response) if isinstance(response, str) else response.text
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    response_ids, offsets = list(tokens["input_ids"]), [tuple(offset) for offset in tokens["offset_mapping"]]
    if flag("eos", eos) and tokenizer.eos_token_id is not None:
        response_ids.append(tokenizer.eos_token_id)
        offsets.append((len(text), len(text)))
    return Encoded(prompt_ids + response_ids, len(prompt_ids), offsets)


class Decoded(NamedTuple):
    """The text of generated tokens. Token t covers text[offsets[t][0]:offsets[t][1]]."""

    text: str
    offsets: list[tuple[int, int]]  # one per token; empty for special tokens


def decode(tokenizer, ids: Sequence[int]) -> Decoded:
    """The text of generated tokens, and the part of it that each token covers.

    Encoding the decoded text again is no way to get the offsets: a policy may generate other tokens than the tokenizer
    would choose for the same text. Here the tokens are decoded one after the other. If several tokens are needed for a
    character, or their bytes form no character, all of them get the range of what appears with the last one. A token
    that spells U+FFFD itself is complete. Special tokens have an empty range. Find segments in the returned text: where
    tokens form broken characters, tokenizer.decode may return a different text.

    tokenizer  a tokenizer of transformers
    ids        the token ids of one response; padding is allowed, because it is a special token
    Returns    Decoded: text and offsets
    """

    def text_of(first: int, stop: int) -> str:
        return tokenizer.decode(ids[first:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def spells_replacement(first: int, stop: int) -> bool:
        tokens = tokenizer.convert_ids_to_tokens(ids[first:stop])
        return "".join(token or "" for token in tokens).endswith(REPLACEMENT)  # None: an id of no token

    ids, special = _ids("ids", ids), set(tokenizer.all_special_ids)
    text, offsets = "", []
    # Decode from the last tokens that added text, not from t: a decoder may treat the first token of a text
    # differently.
    lead = 0
    for t in range(len(ids)):
        first, whole = len(offsets), text_of(lead, t + 1)
        partial = whole.endswith("\ufffd") and ids[t] not in special and not spells_replacement(first, t + 1)
        if partial and t + 1 < len(ids) and ids[t + 1] not in special:
            continue
        new = whole[len(text_of(lead, first)) :]
        offsets += [(len(text), len(text) + len(new))] * (t + 1 - first)
        text, lead = text + new, first if new else lead
    return Decoded(text, offsets)


def token_spans(offsets, text: str, spans: Sequence[Span]) -> list[tuple[int, int]]:
    """The tokens of each span, as a half-open range from its first token to its last.

    A token belongs to a span if the two share a character other than white space. So the token " foo" belongs to a span
    over "foo", and ".\\n" to a span over "."; " bar" does not belong to a span that ends in the space. If a character
    is split into several tokens, all of them belong to a span over it. Tokens between the first and the last are in the
    range, even those of white space. A span of white space, or one without tokens, gets (0, 0).

    offsets  (start, end) of each token in text
    spans    in characters of text, in any form that to_spans takes
    Raises   ValueError if a span or a token ends outside the text, for example if the offsets include the prompt
    """
    spans = to_spans(text, spans)
    tokens = token_ranges(offsets, text)
    return [_token_range(tokens, text, span) for span in spans]


def token_ranges(offsets, text):
    """The character range of each token without white space; refuses offsets that are not ranges of the text."""
    ranges = []
    plain_text("text", text)
    for i, offset in enumerate(listed("offsets", offsets, _OFFSETS)):
        expected = f"(start, end) with 0 <= start <= end <= {len(text)}, the length of the text"
        ranges.append(trimmed(text, *range_of(f"offsets[{i}]", offset, len(text), expected)))
    return ranges


def token_weights(
    offsets,
    text: str,
    spans: Sequence[Span],
    *,
    inside: float,
    outside: float = 1.0,
    by_kind: Mapping[str, float] | None = None,
) -> list[float]:
    """The weight of each token: in a span by_kind[kind], or `inside` if its kind is not there; `outside` elsewhere.

    Where spans overlap, the weight furthest from `outside` is taken; of two that are equally far, the larger one. The
    order of the spans therefore has no effect, and a second span never weakens the first. The end-of-sequence token
    is outside.

    offsets, text, spans  as in token_spans
    Returns  one weight for each token
    Raises   ValueError if a weight is not finite, or where token_spans does
    Warns    where no span is of a kind in by_kind, but some are of a kind that is spelled almost the same
    """
    by_kind, spans, offsets = _by_kind(by_kind, finite), to_spans(text, spans), listed("offsets", offsets, _OFFSETS)
    _warn_of_misspelled(by_kind, spans)
    return _weights(offsets, text, spans, finite("inside", inside), finite("outside", outside), by_kind)


def _weights(offsets, text, spans, inside, outside, by_kind) -> list[float]:
    """token_weights of arguments that are checked."""
    inside, outside = float(inside), float(outside)
    weights = [outside] * len(offsets)
    for span, (first, stop) in zip(spans, token_spans(offsets, text, spans), strict=True):
        weight = float(by_kind.get(span.kind, inside))
        for t in range(first, stop):
            weights[t] = max(weights[t], weight, key=lambda w: (abs(w - outside), w))
    return weights


def pair_weights(
    chosen: tuple,
    rejected: tuple,
    *,
    span_weight: float = 2.0,
    by_kind: Mapping[str, float] | None = None,
) -> tuple[list[float], list[float]]:
    """Token weights of a pair of responses for a preference loss, from the faults and the praise marked in them.

    With W = by_kind[kind], or span_weight if the kind is not there, a token weighs

                    in a fault    in praise    elsewhere
        chosen         1/W            W            1
        rejected        W            1/W           1

    A preference loss makes the tokens of the chosen response more likely and those of the rejected response less
    likely. A fault is a reason for the rejection, so its tokens are pushed down harder than the rest. A fault in the
    chosen response is pushed up less. Praise is treated the other way round. The weight also multiplies the reference's
    log-prob, so the margin of an untrained policy stays 0.

    A span with a score above 0 is praise; any other span is a fault. Where faults overlap, the weight furthest from 1
    is taken. A token in a fault and in praise gets the product of both weights.

    chosen, rejected  (offsets, text, spans) each: (start, end) of each token in text, and spans as to_spans takes them
    span_weight       W, above 0. With 1 all tokens weigh the same
    by_kind           W of each kind of span that has a weight of its own
    Returns  two lists, the weights of the chosen and of the rejected response, one weight for each token
    Raises   ValueError if a weight is not above 0, or where to_spans does
    """
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(side, tuple | list) or len(side) != 3:
            raise ValueError(f"{name} must be (offsets, text, spans), got {brief(side)}")
    options = {"span_weight": span_weight, "by_kind": by_kind}
    return response_weights(*chosen, raised=True, **options), response_weights(*rejected, raised=False, **options)


def response_weights(
    offsets,
    text: str,
    spans: Sequence[Span],
    *,
    raised: bool,
    span_weight: float = 2.0,
    by_kind: Mapping[str, float] | None = None,
) -> list[float]:
    """Token weights of one response, by the rule of pair_weights for the chosen (raised) or the rejected response."""
    span_weight, by_kind = positive("span_weight", span_weight), _by_kind(by_kind, positive)
    spans, side = to_spans(text, spans), 1.0 if flag("raised", raised) else -1.0
    offsets = listed("offsets", offsets, _OFFSETS)
    _warn_of_misspelled(by_kind, spans)
    praise = [span for span in spans if (span.score or 0.0) > 0]
    faults = [span for span in spans if span not in praise]
    found = []
    for marked, power in ((faults, -side), (praise, side)):
        powers = {kind: weight**power for kind, weight in by_kind.items()}
        found.append(_weights(offsets, text, marked, span_weight**power, 1.0, powers))
    return [a * b for a, b in zip(*found, strict=True)]


def token_segments(offsets, text: str, spans: Sequence[Span]) -> list[int]:
    """The segment of each token, counted from 0. A new segment begins where a span begins or after it has ended.

    All tokens of a segment lie in the same spans. A response without spans is one segment.
    """
    offsets = listed("offsets", offsets, _OFFSETS)
    edges = {edge for first, stop in token_spans(offsets, text, spans) for edge in (first, stop)} - {0}
    return [sum(edge <= t for edge in edges) for t in range(len(offsets))]


def _by_kind(by_kind, check):
    if not isinstance(by_kind, Mapping | type(None)):
        raise ValueError(f"by_kind must be a mapping from kinds to numbers, got {brief(by_kind)}")
    for kind in by_kind or {}:
        if not isinstance(kind, str):
            raise ValueError(f"by_kind must name kinds, which are text, got {brief(kind)}")
    return {kind: check(f"by_kind[{kind!r}]", weight) for kind, weight in (by_kind or {}).items()}


def _warn_of_misspelled(by_kind, spans):
    """A response need not have a span of each kind; where one kind is almost another, a span gets another weight."""
    kinds = {span.kind for span in spans}
    others = {kind.casefold(): kind for kind in kinds - by_kind.keys()}
    for kind in by_kind.keys() - kinds:
        for near in difflib.get_close_matches(kind.casefold(), others, n=1, cutoff=0.85):
            said = f"by_kind has {kind!r}, which is the kind of no span; there are spans of {others[near]!r}"
            warnings.warn(f"{said}, which get the weight of other kinds", UserWarning, stacklevel=3)


def _token_range(tokens, text, span):
    start, end = trimmed(text, span.start, span.end)
    # both ranges begin with a character other than white space, and so does their intersection
    shared = [t for t, (first, stop) in enumerate(tokens) if max(first, start) < min(stop, end)]
    return (shared[0], shared[-1] + 1) if shared else (0, 0)


def _ids(name, ids, expected="a sequence of the token ids of one response, each at least 0"):
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    whole = isinstance(ids, Iterable) and not isinstance(ids, str)
    found = [int(i) if isinstance(i, Integral) and not isinstance(i, bool) else -1 for i in ids] if whole else [-1]
    if min(found, default=0) < 0:
        got = brief(ids) if isinstance(ids, list | tuple | str) else type(ids).__name__
        raise ValueError(f"{name} must be {expected}, got {got}")
    return found


def trimmed(text, start, end):
    """The offsets of text[start:end] without the white space around it; empty if there is only white space."""
    part = text[start:end]
    return start + len(part) - len(part.lstrip()), start + len(part.rstrip())


def _prompt_ids(tokenizer, prompt):
    if not isinstance(prompt, str):  # a BatchEncoding, for example, iterates over its keys
        hint = "messages go through tokenizer.apply_chat_template(messages, return_dict=False) first"
        return _ids("prompt", prompt, f"text or a sequence of token ids ({hint})")
    tokens = tokenizer(plain_text("prompt", prompt), return_special_tokens_mask=True)
    ids, added = list(tokens["input_ids"]), list(tokens["special_tokens_mask"])
    while added and added[-1]:  # special tokens at the end, such as the end of sequence, would separate the response
        ids.pop()
        added.pop()
    return ids

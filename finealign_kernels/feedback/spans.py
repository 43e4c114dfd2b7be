"""From character spans to tokens, by the offsets that a fast tokenizer gives with its tokens."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from reprlib import repr as brief
from typing import NamedTuple

from .records import Response, Span, finite, flag, listed, positive, range_of, to_spans

_OFFSETS = "a sequence of (start, end), one a token"
# U+FFFD as a vocabulary writes it: the character, its UTF-8 bytes in the byte-level alphabet, and as fallback bytes
REPLACEMENT = ("\ufffd", "\u00ef\u00bf\u00bd", "<0xEF><0xBF><0xBD>")


class Encoded(NamedTuple):
    """A prompt and a response as tokens. input_ids[response_start + t] covers text[offsets[t][0]:offsets[t][1]]."""

    input_ids: list[int]
    response_start: int  # length of the prompt in tokens
    offsets: list[tuple[int, int]]  # one per response token; empty for the end-of-sequence token


def encode(tokenizer, prompt: str | Sequence[int], response: Response | str, *, eos=True) -> Encoded:
    """Tokens of the prompt, then of the response, with the response tokens' offsets in response.text.

    The two are tokenised apart and put one after the other, so no token straddles the boundary: a prompt keeps its
    tokens whatever the response is, and the tokens of two responses to it differ in the responses only. A space or line
    break between the two belongs to whichever text holds it; none is added, except by a tokenizer that starts every
    text with one ("▁").

    tokenizer  a fast tokenizer of transformers: only those know offsets
    prompt     text, which gets the special tokens the tokenizer puts in front (not those it puts behind), or token ids,
               from a chat template say, which are taken as they are
    response   text, or a Response, of which the text is read
    eos        the tokenizer's end-of-sequence token, if it has one, is the response's last
    Raises     ValueError if the tokenizer is not a fast one, or the prompt neither text nor token ids.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer must be a fast one, which gives offsets, got {type(tokenizer).__name__}")
    prompt_ids = _prompt_ids(tokenizer, prompt)
    if not isinstance(response, str | Response):
        raise ValueError(f"response must be text or a Response, got {type(response).__name__}")
    text = response if isinstance(response, str) else response.text
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    response_ids, offsets = list(tokens["input_ids"]), [tuple(offset) for offset in tokens["offset_mapping"]]
    if flag("eos", eos) and tokenizer.eos_token_id is not None:
        response_ids.append(tokenizer.eos_token_id)
        offsets.append((len(text), len(text)))
    return Encoded(prompt_ids + response_ids, len(prompt_ids), offsets)


class Decoded(NamedTuple):
    """The text of generated tokens. Token t stands for text[offsets[t][0]:offsets[t][1]]."""

    text: str
    offsets: list[tuple[int, int]]  # one per token; empty for special tokens


def decode(tokenizer, ids: Sequence[int]) -> Decoded:
    """The text that generated tokens stand for, and which part of it each token is.

    A policy's tokens need not be those that the tokenizer would make of their text, so offsets from encoding the text
    anew may be other tokens'. Here the tokens are decoded as they come. Tokens that make up a character, or bytes that
    are none, have the range of all that appears with the last of them. A token that ends in the character U+FFFD itself
    is whole. Special tokens stand for nothing. Segments are to be found in this text; where the tokens hold broken
    characters tokenizer.decode may give another.

    tokenizer  of transformers
    ids        token ids of one response, without padding (or with: it is a special token)
    """

    def said(first: int, stop: int) -> str:
        return tokenizer.decode(ids[first:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def spelled(first: int, stop: int) -> bool:
        tokens = tokenizer.convert_ids_to_tokens(ids[first:stop])
        return "".join(token or "" for token in tokens).endswith(REPLACEMENT)  # None: an id of no token

    ids, special = _ids("ids", ids), set(tokenizer.all_special_ids)
    text, offsets = "", []
    lead = 0  # where the last tokens that said something start: a decoder may treat the first of a text in its own way
    for t in range(len(ids)):
        first, whole = len(offsets), said(lead, t + 1)
        partial = whole.endswith("\ufffd") and ids[t] not in special and not spelled(first, t + 1)
        if partial and t + 1 < len(ids) and ids[t + 1] not in special:
            continue
        new = whole[len(said(lead, first)) :]
        offsets += [(len(text), len(text) + len(new))] * (t + 1 - first)
        text, lead = text + new, first if new else lead
    return Decoded(text, offsets)


def token_spans(offsets, text: str, spans: Sequence[Span]) -> list[tuple[int, int]]:
    """The tokens of each span: the half-open range from its first token to its last.

    A token is the span's if the two share a character that is not white space. So " foo" belongs to a span over "foo"
    whether its offset has the space or not, ".\\n" to one over ".", and all tokens of a character that is split into
    several to a span over the character; " bar" does not belong to a span that ends in the space. Tokens between
    the first and the last are in the range, white space too. A span of white space, or one that no token covers,
    gets (0, 0).

    offsets  (start, end) of each token in text    spans  within text, as to_spans takes them
    Raises   ValueError if a span or a token ends beyond the text: offsets of prompt and response together, say.
    """
    spans = to_spans(text, spans)
    tokens = token_cores(offsets, text)
    return [_token_range(tokens, text, span) for span in spans]


def token_cores(offsets, text):
    """The tokens' ranges without white space; refuses offsets that are not ranges of the text."""
    cores = []
    for i, offset in enumerate(listed("offsets", offsets, _OFFSETS)):
        expected = f"(start, end) with 0 <= start <= end <= {len(text)}, the length of the text"
        cores.append(core(text, *range_of(f"offsets[{i}]", offset, len(text), expected)))
    return cores


def token_weights(
    offsets,
    text: str,
    spans: Sequence[Span],
    *,
    inside: float,
    outside: float = 1.0,
    by_kind: Mapping[str, float] | None = None,
) -> list[float]:
    """The weight of each token: by_kind[kind] or else `inside` in a span, `outside` elsewhere.

    Where spans overlap, the weight furthest from `outside` holds, of two as far the larger. So the order of the spans
    does not matter, and a second judgement never weakens the first. The end-of-sequence token is outside.
    """
    by_kind, spans, offsets = _by_kind(by_kind, finite), to_spans(text, spans), listed("offsets", offsets, _OFFSETS)
    inside, outside = float(finite("inside", inside)), float(finite("outside", outside))
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

    With W = by_kind[kind] or else span_weight, a token weighs

                    in a fault    in praise    elsewhere
        chosen         1/W            W            1
        rejected        W            1/W           1

    The loss raises all of the chosen response and lowers all of the rejected one. A fault is the reason why a response
    is rejected, so it is lowered more than the rest; a fault in the chosen response is raised less; praise is the other
    way round. The weight also multiplies the reference's log-prob, so the margin of an untrained policy stays 0.

    A span of a score above 0 is praise, any other is a fault. Faults that overlap: the weight furthest from 1 holds;
    a token in a fault and in praise has the product of the two.

    chosen, rejected  (offsets, text, spans) each: (start, end) of each token in text, and spans as to_spans takes them
    span_weight       W, above 0; 1 weighs every token alike
    Returns one weight a token, as many as there are offsets, of each side.
    Raises  ValueError for a weight that is not above 0, and where to_spans does.
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
    """Token weights of one response, as pair_weights has them for the chosen (raised) or the rejected one of a pair."""
    span_weight, by_kind = positive("span_weight", span_weight), _by_kind(by_kind, positive)
    spans, side = to_spans(text, spans), 1.0 if flag("raised", raised) else -1.0
    offsets = listed("offsets", offsets, _OFFSETS)
    praise = [span for span in spans if (span.score or 0.0) > 0]
    faults = [span for span in spans if span not in praise]
    found = []
    for marked, power in ((faults, -side), (praise, side)):
        powers = {kind: weight**power for kind, weight in by_kind.items()}
        found.append(token_weights(offsets, text, marked, inside=span_weight**power, by_kind=powers))
    return [a * b for a, b in zip(*found, strict=True)]


def token_segments(offsets, text: str, spans: Sequence[Span]) -> list[int]:
    """The segment of each token, counted from 0: a new one starts where a span starts or has ended.

    All tokens of a segment lie in the same spans; a response without spans is one segment.
    """
    offsets = listed("offsets", offsets, _OFFSETS)
    edges = {edge for first, stop in token_spans(offsets, text, spans) for edge in (first, stop)} - {0}
    return [sum(edge <= t for edge in edges) for t in range(len(offsets))]


def _by_kind(by_kind, check):
    if not isinstance(by_kind, Mapping | type(None)):
        raise ValueError(f"by_kind must be a mapping from kinds to numbers, got {brief(by_kind)}")
    return {kind: check(f"by_kind[{kind!r}]", weight) for kind, weight in (by_kind or {}).items()}


def _token_range(tokens, text, span):
    start, end = core(text, span.start, span.end)
    # both cores start with a character that is not white space, and so does what they share
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


def core(text, start, end):
    """text[start:end] without the white space around it, as offsets; empty if there is nothing else."""
    part = text[start:end]
    return start + len(part) - len(part.lstrip()), start + len(part.rstrip())


def _prompt_ids(tokenizer, prompt):
    if not isinstance(prompt, str):  # items of a BatchEncoding, say, are its keys
        hint = "messages go through tokenizer.apply_chat_template(messages, return_dict=False) first"
        return _ids("prompt", prompt, f"text or a sequence of token ids ({hint})")
    tokens = tokenizer(prompt, return_special_tokens_mask=True)
    ids, added = list(tokens["input_ids"]), list(tokens["special_tokens_mask"])
    while added and added[-1]:  # a separator or an end of sequence behind the prompt would cut the response off
        ids.pop()
        added.pop()
    return ids

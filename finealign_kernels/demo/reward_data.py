"""Pairs of answers for a reward model, from data or with planted faults, and the hidden states of their segments."""

import random
from typing import NamedTuple

import torch

from .. import feedback
from ..feedback import Response, Span
from .data import Answer, encode_answer, prompt_of
from .options import UsageError

KINDS = ("irrelevant", "repetition", "incoherent")  # kinds of planted faults
MOST = 3  # largest number of faults in an answer
HELD = 1 / 3  # share of the prompts that are held out
TOGETHER = 16  # number of answers to a prompt in one forward pass


class Judged(NamedTuple):
    """Two answers to a prompt, chosen and rejected according to their label."""

    example: feedback.Example  # the prompt
    chosen: Response
    rejected: Response
    votes: float | None = None  # for the chosen one, if the data counts them
    planted: bool = False  # True if the label was flipped: the rejected answer is really the better one


class Read(NamedTuple):
    """An answer, its segments, and their hidden states."""

    answer: Answer
    segments: list[tuple[int, int]]  # tokens [first, stop) of the response
    hidden: torch.Tensor  # (segments, D), means over their tokens


class Pairs(NamedTuple):
    """P pairs with the segments of their 2 P answers: all chosen answers, then all rejected ones."""

    pairs: list[Judged]
    answers: list[Read]
    hidden: torch.Tensor  # (N, D) of all segments
    cu_seqlens: torch.Tensor  # (2 P + 1,) the segments of each answer
    planted: torch.Tensor  # (P,) bool

    def of(self, index):
        """Hidden states and cu_seqlens of the pairs with these indices."""
        picked = [*index, *(len(self.pairs) + i for i in index)]
        return joined([self.answers[i].hidden for i in picked])


def joined(hidden):
    """The rows of all parts one after the other, and cu_seqlens of the parts."""
    return torch.cat(hidden), torch.tensor([0, *map(len, hidden)]).cumsum(0)


def gather(pairs, answers):
    planted = torch.tensor([pair.planted for pair in pairs], dtype=torch.bool)
    return Pairs(pairs, answers, *joined([answer.hidden for answer in answers]), planted)


def standardised(*sets):
    """The sets with standardised hidden states: mean 0 and standard deviation 1 in the first set, clamped to ±5."""
    mean, std = sets[0].hidden.mean(0), sets[0].hidden.std(0) + 1e-6

    def scaled(x):
        answers = [one._replace(hidden=((one.hidden - mean) / std).clamp(-5, 5)) for one in x.answers]
        return gather(x.pairs, answers)

    return tuple(map(scaled, sets))


def read_judgements(options, examples):
    """Training pairs, and held-out pairs of other prompts: the judgements of --data, or pairs with planted faults.

    There are up to `options.reward` training pairs and half as many held-out ones. With planted faults, a share of
    `options.noise` of the training labels is flipped, and no held-out label.
    """
    draw = random.Random(options.seed)
    examples = [example for example in examples if example.preferences]
    if len(examples) < 3:
        raise UsageError(f"--data must hold judgements of three prompts or more for --reward, got {len(examples)}")
    draw.shuffle(examples)
    held = max(1, round(HELD * len(examples)))
    parts = examples[held:], examples[:held]
    counts = options.reward, max(1, options.reward // 2)
    if options.data:
        return tuple(_judged(part, count, draw) for part, count in zip(parts, counts, strict=True))
    train, judge = (planted(part, count, draw) for part, count in zip(parts, counts, strict=True))
    for i in draw.sample(range(len(train)), round(options.noise * len(train))):
        train[i] = flipped(train[i])
    return train, judge


def flipped(pair):
    return pair._replace(chosen=pair.rejected, rejected=pair.chosen, planted=not pair.planted)


def _judged(examples, count, draw):
    found = [
        Judged(example, example.responses[one.chosen], example.responses[one.rejected], one.strength)
        for example in examples
        for one in example.preferences
    ]
    draw.shuffle(found)
    return found[:count]


def planted(examples, count, draw):
    """Pairs of good answers with 0 to MOST planted faults each; the answer with fewer faults is the chosen one."""
    good = [(example, one.text) for example in examples for one in example.responses if not one.spans]
    pairs = []
    for _ in range(count):
        example, text = draw.choice(good)
        others = [sentence for other, words in good if other is not example for sentence in _sentences(words)]
        few, many = sorted(draw.sample(range(MOST + 1), 2))
        better, worse = (_with_faults(text, faults, others, draw) for faults in (few, many))
        pairs.append(Judged(example, better, worse))
    return pairs


def _with_faults(text, faults, others, draw):
    """The text with so many faults, each marked by a span."""
    parts = [(sentence, None) for sentence in _sentences(text)]
    kinds = draw.choices(KINDS, k=faults)
    for kind in sorted(kinds, key="repetition".__eq__):  # repetitions last, of sentences without another fault
        clean = [i for i, (_, fault) in enumerate(parts) if fault is None]
        if len(clean) == 1:
            kind = "repetition"
        i = draw.choice(clean)
        if kind == "repetition":
            parts.insert(draw.randrange(i + 1, len(parts) + 1), (parts[i][0], kind))
        elif kind == "irrelevant":
            parts[i] = draw.choice(others), kind
        else:
            words = parts[i][0].rstrip(".").split()
            draw.shuffle(words)
            parts[i] = " ".join(words) + ".", kind
    answer, spans = "", []
    for sentence, kind in parts:
        start = len(answer) + bool(answer)
        answer = f"{answer} {sentence}" if answer else sentence
        if kind:
            spans.append(Span(start, len(answer), kind))
    return Response(answer, tuple(spans))


def _sentences(text):
    return [text[start:end] for start, end in feedback.sentences(text)]


@torch.no_grad()
def read_pairs(options, body, tokenizer, pairs):
    """The pairs with the hidden states of their segments. Each answer runs once, after its prompt's cached states."""
    wanted = {}
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            wanted.setdefault(pair.example.id, (pair.example, {}))[1][response.text] = response
    read = {}
    for key, (example, responses) in wanted.items():
        found = list(responses.values())
        for low in range(0, len(found), TOGETHER):
            part = found[low : low + TOGETHER]
            for response, one in zip(part, _read(options, body, tokenizer, example, part), strict=True):
                read[key, response.text] = one
    sides = [[read[pair.example.id, getattr(pair, side).text] for pair in pairs] for side in ("chosen", "rejected")]
    return gather(pairs, [*sides[0], *sides[1]])


def _read(options, body, tokenizer, example, responses):
    prompt = prompt_of(tokenizer, example)
    answers = [encode_answer(options, tokenizer, prompt, response, ()) for response in responses]
    start = torch.tensor(answers[0].prompt_ids)[None]
    cache = body(input_ids=start, use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(answers))
    width = max(len(answer.response_ids) for answer in answers)
    rows = [answer.response_ids + [0] * (width - len(answer.response_ids)) for answer in answers]
    seen = [[1] * (start.shape[1] + len(a.response_ids)) + [0] * (width - len(a.response_ids)) for a in answers]
    inputs = dict(input_ids=torch.tensor(rows), attention_mask=torch.tensor(seen))
    hidden = body(**inputs, past_key_values=cache, use_cache=True).last_hidden_state.float()
    return [_segments(answer, own) for answer, own in zip(answers, hidden, strict=True)]


def _segments(answer, hidden):
    text = answer.response.text
    cut = [Span(start, end, "segment") for start, end in feedback.sub_sentences(text)]
    ranges = [(first, stop) for first, stop in feedback.token_spans(answer.offsets, text, cut) if stop]
    segments = ranges or [(0, len(answer.offsets))]
    return Read(answer, segments, torch.stack([hidden[first:stop].mean(0) for first, stop in segments]))

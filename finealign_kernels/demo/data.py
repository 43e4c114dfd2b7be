"""From a feedback file to padded batches of pairs, with token weights from the spans."""

import random
import textwrap
from typing import NamedTuple

import torch

from .. import feedback
from ..losses.pivots import AdaptiveMask
from ..ops.logprobs import linear_logprobs
from .masks import read_scores, scored_spans, span_scores
from .models import hidden_states
from .options import UsageError, reads_reference, scores_of


class Answer(NamedTuple):
    """A response as tokens, with a weight and a score for each response token."""

    response: feedback.Response
    prompt_ids: list[int]
    response_ids: list[int]
    offsets: list[tuple[int, int]]
    weights: list[float]
    scores: list[float]  # 0 without scored spans
    lost: tuple[int, int] = (0, 0)  # tokens cut off: at the start of the prompt, at the end of the response


class Pair(NamedTuple):
    """A prompt with the preferred answer and the other one."""

    name: str
    prompt: str
    chosen: Answer
    rejected: Answer


class Padded(NamedTuple):
    """Sequences of prompt and answer, padded on the right. Position t predicts token t + 1."""

    input_ids: torch.Tensor  # (S, T)
    attention_mask: torch.Tensor  # (S, T)
    labels: torch.Tensor  # (S, T-1)
    mask: torch.Tensor  # (S, T-1) bool, true where a response token is predicted
    token_weight: torch.Tensor  # (S, T-1)
    token_score: torch.Tensor  # (S, T-1)


class Batch(NamedTuple):
    """Pairs as padded sequences: all chosen, then all rejected."""

    pairs: list[Pair]
    answers: list[Answer]  # (S,)
    input_ids: torch.Tensor  # (S, T)
    attention_mask: torch.Tensor  # (S, T)
    labels: torch.Tensor  # (S, T-1)
    mask: torch.Tensor  # (S, T-1) bool, true where a response token is predicted
    token_weight: torch.Tensor  # (S, T-1), 0 where the adaptive mask drops a token
    ref_logp: torch.Tensor | None  # (S, T-1)
    start_logp: torch.Tensor | None  # (S, T-1), of the model before training; None if not needed
    span_weight: torch.Tensor  # (S, T-1), the weights from the spans alone
    token_score: torch.Tensor  # (S, T-1)
    pivots: torch.Tensor | None = None  # (S, T-1) bool
    adaptive: AdaptiveMask | None = None  # None without a mask


def read_examples(options):
    try:
        return feedback.read(options.data) if options.data else feedback.sample()
    except (OSError, ValueError) as error:
        raise UsageError(f"--data cannot be read: {error}") from None


def read_pairs(options, tokenizer, examples):
    """The first `options.pairs` preferences as tokens, after shuffling by the seed."""
    judged = [(example, preference) for example in examples for preference in example.preferences]
    if not judged:
        raise UsageError(f"--data must hold preferences to learn from, got {len(examples)} examples without any")
    random.Random(options.seed).shuffle(judged)
    scored = read_scores(options, examples)
    return [_pair(options, tokenizer, scored, *one) for one in judged[: options.pairs]]


def _pair(options, tokenizer, scored, example, preference):
    prompt = prompt_of(tokenizer, example)

    def answer(index):
        spans = scored_spans(options, scored, example, index)
        return encode_answer(options, tokenizer, prompt, example.responses[index], spans)

    answers = answer(preference.chosen), answer(preference.rejected)
    judged = ((one.offsets, one.response.text, one.response.spans) for one in answers)
    weights = feedback.pair_weights(*judged, span_weight=options.span_weight)
    chosen, rejected = (one._replace(weights=own) for one, own in zip(answers, weights, strict=True))
    name = f"{example.id}, answer {preference.chosen + 1} over {preference.rejected + 1}"
    return Pair(name=name, prompt=example.prompt, chosen=chosen, rejected=rejected)


def prompt_of(tokenizer, example):
    if not tokenizer.chat_template:
        return example.prompt + "\n"
    messages = [{"role": "user", "content": example.prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def encode_answer(options, tokenizer, prompt, response, scored):
    """An Answer with all weights 1, cut to --max-prompt and --max-response tokens."""
    encoded = feedback.encode(tokenizer, prompt, response)
    offsets = encoded.offsets[: options.max_response]
    start = encoded.response_start
    return Answer(
        response=response,
        prompt_ids=encoded.input_ids[:start][-options.max_prompt :],
        response_ids=encoded.input_ids[start:][: options.max_response],
        offsets=offsets,
        weights=[1.0] * len(offsets),
        scores=span_scores(offsets, response.text, scored),
        lost=(max(0, start - options.max_prompt), max(0, len(encoded.offsets) - options.max_response)),
    )


def cut_sentence(options, answers):
    """A sentence on what --max-prompt and --max-response cut off; empty if they cut nothing."""
    prompts, ends = (sum(answer.lost[i] > 0 for answer in answers) for i in (0, 1))
    parts = []
    if prompts:
        kept = f"its last {options.max_prompt} tokens (--max-prompt)"
        parts.append(f"The prompt is cut to {kept} for {prompts} of {len(answers)} answers.")
    if ends:
        part = f"{ends} of {len(answers)} answers are cut to their first {options.max_response} tokens (--max-response)"
        lost = sum(len(spans_beyond(answer)) for answer in answers)
        marked = sum(len(answer.response.spans) for answer in answers)
        parts.append(part + (f", which leaves out {lost} of {marked} marked spans." if lost else "."))
    return " ".join(parts)


def spans_beyond(answer):
    """The spans that have no token left in the answer."""
    spans = answer.response.spans
    ranges = feedback.token_spans(answer.offsets, answer.response.text, spans)
    return [span for span, (_, stop) in zip(spans, ranges, strict=True) if not stop]


def answers_of(pairs):
    return [answer for pair in pairs for answer in (pair.chosen, pair.rejected)]


def print_cuts(options, answers):
    sentence = cut_sentence(options, answers)
    if sentence:
        print(textwrap.fill(sentence, 100), flush=True)


def cut_facts(options):
    return {"tokens read": f"last {options.max_prompt} of a prompt, first {options.max_response} of an answer"}


def make_batch(options, model, pairs):
    """The pairs as one padded batch with the reference's log-probs. For `nll` it has the chosen answers only."""
    answers = [pair.chosen for pair in pairs]
    if options.loss != "nll":
        answers += [pair.rejected for pair in pairs]
    *rows, weight, score = pad(answers)
    batch = Batch(pairs, answers, *rows, weight, None, None, weight, score)
    if not (reads_reference(options) or scores_of(options) == "implicit" or options.compare):
        return batch
    logp = start_logp(model, batch)
    return batch._replace(ref_logp=logp if reads_reference(options) else None, start_logp=logp)


def pad(answers):
    sequences = [answer.prompt_ids + answer.response_ids for answer in answers]
    S, T = len(sequences), max(map(len, sequences))
    input_ids, attention_mask = torch.zeros(S, T, dtype=torch.int64), torch.zeros(S, T, dtype=torch.int64)
    mask, weight, score = torch.zeros(S, T - 1, dtype=torch.bool), torch.ones(S, T - 1), torch.zeros(S, T - 1)
    for s, (ids, answer) in enumerate(zip(sequences, answers, strict=True)):
        input_ids[s, : len(ids)], attention_mask[s, : len(ids)] = torch.tensor(ids), 1
        read = slice(response_start(answer), len(ids) - 1)
        mask[s, read], weight[s, read], score[s, read] = True, torch.tensor(answer.weights), torch.tensor(answer.scores)
    return Padded(input_ids, attention_mask, input_ids[:, 1:], mask, weight, score)


def response_start(answer):
    """The position that predicts the first response token, which is the prompt's last token."""
    return len(answer.prompt_ids) - 1


@torch.no_grad()
def start_logp(model, batch):
    """(S, T-1): log-probs of the model before training."""
    with model.frozen():
        return linear_logprobs(hidden_states(model, batch), model.weight, batch.labels, mask=batch.mask).logp


def spans_of_tokens(answer):
    """For each response token, the list of spans that it lies in."""
    spans = answer.response.spans
    ranges = feedback.token_spans(answer.offsets, answer.response.text, spans)
    found = [[] for _ in answer.offsets]
    for span, (first, stop) in zip(spans, ranges, strict=True):
        for t in range(first, stop):
            found[t].append(span)
    return found


def texts_of_tokens(tokenizer, answer):
    """The response's text cut into its tokens. Special tokens appear by name.

    If a character is split into several tokens, the first has the character and the others have "·".
    """
    texts, reached, special = [], 0, tokenizer.all_special_ids
    for token, (_, end) in zip(answer.response_ids, answer.offsets, strict=True):
        own = answer.response.text[reached:end]
        texts.append(own or (tokenizer.decode([token]) if token in special else "·"))
        reached = max(reached, end)
    return texts

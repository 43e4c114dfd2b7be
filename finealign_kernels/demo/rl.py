"""The run with --rl: updates of a policy loss with rewards on segments, on answers that are there already.

The answers to a prompt are taken as if the model had sampled them. Each span that marks a fault is a negative reward
at the segment's last token, of one of three kinds; how often an answer is preferred is the reward of the whole. PPO
makes token advantages of them (KL penalty, a small critic, GAE), GRPO compares the answers to one prompt. A token
whose own score contradicts its advantage is masked. Every update runs the loss head fused and in eager PyTorch.
"""

import random
from typing import NamedTuple

import torch

from .. import feedback
from ..losses.pivots import AdaptiveMask, adaptive_mask
from ..losses.value import value_loss
from ..ops.logprobs import linear_logprobs
from ..rl.advantages import advantages
from ..rl.groups import group_advantages
from ..rl.rewards import SegmentRewards, token_rewards
from .data import Answer, encode_answer, pad, prompt_of, read_examples, response_start, start_logp
from .heads import differences, refuse_difference, sizes
from .models import hidden_states, load_model
from .options import UsageError, lr_of
from .training import Last, backward, head_costs, run_heads

# Span kinds of the sample and of QA-Feedback, under the three sorts of fault of arXiv:2306.01693.
SORTS = {
    "relevance": ("irrelevant", "repetition", "redundant", "repetitive", "incoherent"),
    "factuality": ("factual", "reasoning", "wrong-grounding", "unverifiable"),
    "completeness": ("incomplete",),
}
PREFERRED = "preference"  # the reward of whole answers
UPDATES = 2  # of the policy for each time that log-probs, values and advantages are made: at the second its ratio moves
KL, LAM = 0.1, 0.95  # of PPO: coefficient of the penalty in the reward, GAE's λ
CRITIC_LR = 1e-3


class Rollout(NamedTuple):
    """The answers to a few prompts with what was said of them; what training makes of it comes last."""

    names: list[str]  # of each answer's prompt
    prompts: list[str]
    answers: list[Answer]
    group: torch.Tensor  # (S,) which prompt
    input_ids: torch.Tensor  # (S, T)
    attention_mask: torch.Tensor  # (S, T)
    labels: torch.Tensor  # (S, T-1)
    mask: torch.Tensor  # (S, T-1) bool
    rewards: dict[str, SegmentRewards]  # by sort of fault, and PREFERRED
    token_score: torch.Tensor  # (S, T-1) the spans' scores on every token they mark
    ref_logp: torch.Tensor | None  # (S, T-1)
    old_logp: torch.Tensor | None = None  # (S, T-1) of the policy that the updates start from
    values: torch.Tensor | None = None  # (S, T-1) of the critic then; None without one
    reward: torch.Tensor | None = None  # (S, T-1) with the KL penalty
    advantage: torch.Tensor | None = None  # (S, T-1)
    returns: torch.Tensor | None = None  # (S, T-1)
    token_weight: torch.Tensor | None = None  # (S, T-1) the pivot mask
    why: AdaptiveMask | None = None  # None without the mask

    @property
    def span_weight(self):
        """Token weights without the mask."""
        return torch.ones_like(self.token_score)


class Update(NamedTuple):
    """What is told about one update."""

    loss: float
    raised: float  # nats by which kept tokens of advantage > 0 have moved from the start, on average
    lowered: float  # the same for advantage < 0
    clipped: float  # share of tokens
    value_loss: float | None  # None without a critic
    differences: dict[str, float]
    seconds: dict[str, float]


class Critic(torch.nn.Module):
    """A value for each token from the policy's hidden state, which it does not train."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.out = torch.nn.LayerNorm(width), torch.nn.Linear(width, 1)
        torch.nn.init.zeros_(self.out.weight)
        torch.nn.init.zeros_(self.out.bias)

    def forward(self, hidden):
        return self.out(self.norm(hidden.detach()))[..., 0]


def run(options):
    """Trains, compares, prints a table, writes the report and returns its path.

    Raises  UsageError where an option, a file or a missing package stands in the way; DifferenceError.
    """
    from .rl_told import summary, write_report

    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    examples = read_examples(options)
    print("loading the model ...", flush=True)
    model = load_model(options, examples)
    rollouts = read_rollouts(options, model, examples)
    updates, last = train(options, model, rollouts)
    costs = head_costs(options, model, last, updates)
    print(summary(options, model, last.batch, updates, costs))
    path = write_report(options, model, updates, last, costs)
    print(f"report: {path}")
    return path


def read_rollouts(options, model, examples):
    """The first `options.pairs` prompts with two answers or more, `options.batch` of them a rollout."""
    able = [example for example in examples if len(example.responses) > 1]
    if not able:
        raise UsageError("--data must hold a prompt with two answers or more for --rl, got none")
    random.Random(options.seed).shuffle(able)
    able = able[: options.pairs]
    return [_rollout(options, model, able[i : i + options.batch]) for i in range(0, len(able), options.batch)]


def _rollout(options, model, examples):
    answers = [
        _answer(options, model.tokenizer, example, response) for example in examples for response in example.responses
    ]
    counts = torch.tensor([len(example.responses) for example in examples])
    rows = pad(answers)
    held = [example for example in examples for _ in example.responses]
    rollout = Rollout(
        names=[example.id for example in held],
        prompts=[example.prompt for example in held],
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
    """For each response, (times chosen - times rejected) / times judged; 0 for one that is in no preference."""
    won, judged = [0] * len(example.responses), [0] * len(example.responses)
    for preference in example.preferences:
        won[preference.chosen] += 1
        won[preference.rejected] -= 1
        judged[preference.chosen] += 1
        judged[preference.rejected] += 1
    return [w / max(1, n) for w, n in zip(won, judged, strict=True)]


def _rewards(answers, shares):
    """The rewards of each sort: spans at their last tokens, preferences at the answers' last."""
    found = {sort: segment_rewards([_marked(answer, sort) for answer in answers]) for sort in SORTS}
    ends = [response_start(answer) + len(answer.response_ids) - 1 for answer in answers]
    found[PREFERRED] = segment_rewards([[(end, share)] for end, share in zip(ends, shares, strict=True)])
    return found


def segment_rewards(rows):
    """SegmentRewards of (end, reward) for each sequence, in order of the ends."""
    flat = [each for row in rows for each in sorted(row)]
    counts = torch.tensor([0] + [len(row) for row in rows])
    return SegmentRewards(
        reward=torch.tensor([reward for _, reward in flat]),
        end=torch.tensor([end for end, _ in flat], dtype=torch.int64),
        cu_segments=counts.cumsum(0),
    )


def _marked(answer, sort):
    """(last row, score) of each span of a sort that a token of the answer shows; -1 for a span without a score."""
    spans = [span for span in answer.response.spans if sort_of(span) == sort]
    ranges = feedback.token_spans(answer.offsets, answer.response.text, spans)
    return [
        (response_start(answer) + stop - 1, -1.0 if span.score is None else span.score)
        for span, (_, stop) in zip(spans, ranges, strict=True)
        if stop
    ]


def sort_of(span):
    """A kind that is not known is a fault of relevance: said where it should not be."""
    return next((sort for sort, kinds in SORTS.items() if span.kind.lower() in kinds), "relevance")


def train(options, model, rollouts):
    """UPDATES updates on each rollout, over and over, until `options.steps`."""
    from tqdm import tqdm

    policy = torch.optim.AdamW(model.parameters, lr=lr_of(options), weight_decay=0.0)
    critic = Critic(model.weight.shape[1]) if options.rl == "ppo" else None
    values = torch.optim.Adam(critic.parameters(), lr=CRITIC_LR) if critic else None
    updates = []
    for number in tqdm(range(1, options.steps + 1), unit="update", desc=options.rl):
        turn, again = divmod(number - 1, UPDATES)
        if not again:
            rollout = rollouts[turn % len(rollouts)]
        hidden = hidden_states(model, rollout)
        if not again:
            rollout = judged(options, rollout, hidden.detach(), model.weight.detach(), critic)
        heads, seconds = run_heads(options, hidden, model.weight, rollout, number)
        fused = heads["fused"]
        compared = differences(fused, heads["eager"], sizes(fused.dlogp, hidden, model.weight))
        refuse_difference(number, compared)
        backward(hidden, model.weight, fused)
        policy.step()
        policy.zero_grad()
        value = _train_critic(critic, values, hidden, rollout) if critic else None
        updates.append(_update(fused, rollout, compared, seconds, value))
    return updates, Last(rollout, hidden.detach(), fused, heads.get("fused, unmasked"))


@torch.no_grad()
def judged(options, rollout, hidden, weight, critic):
    """The rollout with log-probs and values of the policy and critic as they are, advantages and pivot mask."""
    logp = linear_logprobs(hidden, weight, rollout.labels, mask=rollout.mask).logp
    sources = list(rollout.rewards.values())
    values = returns = None
    if critic:
        values = critic(hidden)
        penalty = {"old_logp": logp, "ref_logp": rollout.ref_logp, "kl_coef": KL}
        found = advantages(sources, values, mask=rollout.mask, lam=LAM, **penalty)
        reward, advantage, returns = found.rewards, found.advantages, found.returns
    else:
        reward = token_rewards(sources, mask=rollout.mask)
        of_answer = group_advantages(reward.sum(-1), rollout.group)
        advantage = torch.where(rollout.mask, of_answer[:, None], 0)
    rollout = rollout._replace(old_logp=logp, values=values, reward=reward, advantage=advantage, returns=returns)
    if not rollout.token_score.any():  # nothing is marked: no score to contradict an advantage
        return rollout._replace(token_weight=rollout.span_weight, why=None)
    why = adaptive_mask(rollout.token_score, mask=rollout.mask, side=advantage, baseline="batch")
    return rollout._replace(token_weight=why.token_weight, why=why)


def _update(head, rollout, compared, seconds, value):
    moved, kept = head.logp - rollout.ref_logp, rollout.mask & (rollout.token_weight > 0)
    clipped = head.metrics.clip_fraction_low + head.metrics.clip_fraction_high
    return Update(
        loss=head.loss.item(),
        raised=_mean(moved[kept & (rollout.advantage > 0)]),
        lowered=_mean(moved[kept & (rollout.advantage < 0)]),
        clipped=clipped.item(),
        value_loss=value,
        differences=compared,
        seconds=seconds,
    )


def _mean(x):
    return x.mean().item() if len(x) else 0.0


def _train_critic(critic, optimizer, hidden, rollout):
    loss = value_loss(critic(hidden), rollout.values, rollout.returns, mask=rollout.mask).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()

"""The run with --rl: updates of a policy loss with rewards of segments, on the answers of the data.

The answers to a prompt are used as if the model had sampled them. A span that marks a fault is a negative reward at its
last token, from one of three reward models by kind of fault. How often an answer is preferred is the reward of the
whole answer. PPO computes token advantages (KL penalty, a small critic, GAE). GRPO compares the answers to one prompt.
A token is masked if its own score contradicts its advantage. Each update runs the loss head fused and in eager PyTorch.
"""

from typing import NamedTuple

import torch

from ..losses.pivots import adaptive_mask
from ..losses.value import value_loss
from ..ops.logprobs import linear_logprobs
from ..rl.advantages import advantages
from ..rl.groups import group_advantages
from ..rl.rewards import token_rewards
from .data import print_cuts, read_examples
from .heads import backward, differences, refuse_difference, sizes
from .models import hidden_states, load_model
from .options import lr_of
from .rl_rollouts import KL, LAM, UPDATES, read_rollouts
from .rl_summary import summary, write_report
from .training import Last, head_costs, run_heads

CRITIC_LR = 1e-3


class Update(NamedTuple):
    """The figures of one update."""

    loss: float
    raised: float  # mean change of the log-probs of kept tokens with advantage > 0 since the start, nats
    lowered: float  # the same for advantage < 0
    clipped: float  # share of tokens whose ratio is clipped
    value_loss: float | None  # None without a critic
    differences: dict[str, float]
    seconds: dict[str, float]


class Critic(torch.nn.Module):
    """A value for each token from the policy's hidden states, which get no gradient from it."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.out = torch.nn.LayerNorm(width), torch.nn.Linear(width, 1)
        torch.nn.init.zeros_(self.out.weight)
        torch.nn.init.zeros_(self.out.bias)

    def forward(self, hidden):
        return self.out(self.norm(hidden.detach()))[..., 0]


def run(options):
    """Trains, compares, prints a table, writes the report and returns its path.

    Raises  UsageError for a wrong option, an unreadable file or a missing package; DifferenceError
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    examples = read_examples(options)
    print("loading the model ...", flush=True)
    model = load_model(options, examples)
    rollouts = read_rollouts(options, model, examples)
    print_cuts(options, [answer for rollout in rollouts for answer in rollout.answers])
    updates, last = train(options, model, rollouts)
    costs = head_costs(options, model, last, updates)
    print(summary(options, model, last.batch, updates, costs))
    path = write_report(options, model, updates, last, costs)
    print(f"report: {path}")
    return path


def train(options, model, rollouts):
    """`options.steps` updates: UPDATES on each rollout, then on the next one, again and again."""
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
    """The rollout with log-probs and values of the present policy and critic, with advantages and the pivot mask."""
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
    if not rollout.token_score.any():  # no token is marked, so no score contradicts an advantage
        return rollout._replace(token_weight=rollout.span_weight, adaptive=None)
    adaptive = adaptive_mask(rollout.token_score, mask=rollout.mask, side=advantage, baseline="batch")
    return rollout._replace(token_weight=adaptive.token_weight, adaptive=adaptive)


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

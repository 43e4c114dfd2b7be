"""Length averaging (arXiv:2406.19188): preferences whose winners are longer by chance, summed against averaged scores.

The better of two answers wins. In most pairs fillers, which are worth nothing, are put into the winner, so that length
goes with preference without being a reason for it. Each arm is trained from the same base on the same pairs, judged
along the way, and read off where it has moved as far from the base as the others: at one KL.
"""

import torch

import finealign_kernels as fk

from . import world
from .runs import Effect, Study

KL = 4.0  # nats an answer, where the arms are compared
BETA = {False: 0.1, "kept": 1.0}  # an average of about ten tokens moves a tenth as much as their sum
LR = 3e-4
ARMS = {  # row, average, rate of learning
    "dpo summed": ("dpo", False, LR),
    "dpo averaged": ("dpo", "kept", LR),
    "ipo summed": ("ipo", False, LR),
    "ipo averaged": ("ipo", "kept", LR),
    "dpo summed, slow": ("dpo", False, LR / 3),
    "dpo averaged, slow": ("dpo", "kept", LR / 3),
}


def lengthened(answers: world.Answers, more: torch.Tensor, generator: torch.Generator) -> world.Answers:
    """Four filler sentences before the end of the answers that have room for them, of those in `more`."""
    ids = answers.ids.clone()
    for i in more.nonzero()[:, 0].tolist():
        end = world.PROMPT + int(answers.lengths[i]) - 1
        if end + 9 <= ids.shape[1]:
            filler = world.FILLER0 + torch.randint(4, (4,), generator=generator)
            ids[i, end : end + 8] = torch.stack([filler, torch.full_like(filler, world.STOP)], 1).reshape(-1)
    return world.answers_of(ids)


def pairs(n: int, generator: torch.Generator) -> world.Answers:
    """n winners, then n losers to the same prompts; 70 % of the winners lengthened."""
    first, second = (world.write(2 * n, generator, sentences=(1, 4)) for _ in range(2))
    same = torch.cat([first.ids[:, : world.PROMPT], second.ids[:, world.PROMPT :]], 1)
    second = world.answers_of(same)
    a, b = world.scores(first), world.scores(second)
    kept = (a != b).nonzero()[:n, 0]
    wins = (a > b)[kept, None]
    winners = torch.where(wins, first.ids[kept], second.ids[kept])
    losers = torch.where(wins, second.ids[kept], first.ids[kept])
    more = torch.rand(len(kept), generator=generator) < 0.7
    winners = lengthened(world.answers_of(winners), more, generator).ids
    return world.answers_of(torch.cat([winners, losers]))


def at(curve: list[dict], kl: float, metric: str) -> float:
    """A metric where the curve first reaches a KL, between its points; the last point where it does not."""
    for before, after in zip(curve, curve[1:], strict=False):
        if after["kl"] >= kl:
            share = (kl - before["kl"]) / (after["kl"] - before["kl"]) if after["kl"] > before["kl"] else 1.0
            return before[metric] + min(max(share, 0.0), 1.0) * (after[metric] - before[metric])
    return curve[-1][metric]


def run(arm: str, seed: int, quick: bool) -> dict:
    name, average, lr = ARMS[arm]
    generator = torch.Generator().manual_seed(seed)
    data = pairs(256 if quick else 1024, generator)
    n = len(data.ids) // 2
    policy, reference = world.start(seed), world.start(seed)
    frozen = world.frozen_logp(reference, data)
    curve = []

    def loss_of(step):
        rows = torch.randint(n, (32,), generator=generator)
        rows = torch.cat([rows, rows + n])
        batch = data[rows]
        options = dict(mask=batch.mask, average=average, beta=BETA[average])
        return fk.preference_loss(name, world.logp(policy, batch), frozen[rows], **options).loss

    def each(step):
        if step % 5 == 0:
            curve.append(world.judge(policy, reference, seed, 64 if quick else 256))

    world.train(policy, 30 if quick else 60, loss_of, lr, each)
    reached = max(point["kl"] for point in curve)
    found = {metric: at(curve, KL, metric) for metric in ("length", "score", "filler", "fact")}
    return {**found, "largest KL": reached, "curve": curve}


STUDY = Study(
    "avg",
    "Where winners are longer by chance, summed log-likelihoods make answers longer than averaged ones, at the same "
    f"distance from the base ({KL:g} nats an answer) ([arXiv:2406.19188](https://arxiv.org/abs/2406.19188)).",
    tuple(ARMS),
    run,
    (
        Effect("length", "dpo averaged", "dpo summed", -1),
        Effect("filler", "dpo averaged", "dpo summed", -1, quick=True),
        Effect("score", "dpo averaged", "dpo summed", +1),
        Effect("length", "ipo averaged", "ipo summed", -1),
        Effect("filler", "ipo averaged", "ipo summed", -1),
        Effect("length", "dpo averaged, slow", "dpo summed, slow", -1),
        Effect("filler", "dpo averaged, slow", "dpo summed, slow", -1),
    ),
    ("kl", "length"),
    "Scale: a model of 60 thousand parameters, answers of a dozen tokens and a length bias that was planted: fillers. "
    "Whether the trade-off is as large for a language model with learned preferences is left open.",
)

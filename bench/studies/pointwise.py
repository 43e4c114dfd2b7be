"""Point-wise preferences (arXiv:2312.02554): answers with a label each, unbalanced, instead of pairs.

One in four answers is good (a true score of 1 or more). The arms see the same answers: binary labels, continuous ones
σ(score), good answers as demonstrations (ULMA), pairs made from the labels (DPO), good answers alone (SFT).

Two more settings: `slow` learns at a third of the rate, since some arms run far from their base; `demonstrations` adds
256 answers that hold facts alone, as demonstrations are written to be good: ULMA and SFT take them as positives.
"""

import torch

import finealign_kernels as fk

from . import world
from .runs import Effect, Study

LOSSES = ("pdpo", "pdpo_soft", "ulma", "dpo on pairs", "unlikelihood", "sft on positives")
ARMS = (
    *LOSSES,
    *(f"{name}, slow" for name in LOSSES[:4]),
    *(f"{name}, demonstrations" for name in ("pdpo", "ulma", "sft on positives")),
)


def labelled(n: int, generator: torch.Generator) -> tuple[world.Answers, torch.Tensor]:
    """n answers of the teacher with their scores, one in four of them good."""
    pool = world.write(4 * n, generator)
    scores = world.scores(pool)
    good, bad = (scores >= 1).nonzero()[:, 0], (scores < 1).nonzero()[:, 0]
    rows = torch.cat([good[: n // 4], bad[: n - n // 4]])
    rows = rows[torch.randperm(len(rows), generator=generator)]
    return pool[rows], scores[rows]


def run(arm: str, seed: int, quick: bool) -> dict:
    generator = torch.Generator().manual_seed(seed)
    arm, _, setting = arm.partition(", ")
    data, scores = labelled(256 if quick else 1024, generator)
    if setting == "demonstrations":
        shown = world.write(256, generator, habits={"fact": 1.0}, sentences=(1, 3))
        data = world.Answers(torch.cat([data.ids, shown.ids]), torch.cat([data.mask, shown.mask]))
        scores = torch.cat([scores, torch.ones(256)])  # good by declaration: nobody judged them
    good, bad = (scores >= 1).nonzero()[:, 0], (scores < 1).nonzero()[:, 0]
    policy, reference = world.start(seed), world.start(seed)
    frozen = world.frozen_logp(reference, data)
    curve = []

    def some(rows, n):
        return rows[torch.randint(len(rows), (n,), generator=generator)]

    def loss_of(step):
        if arm == "dpo on pairs":  # of answers to other prompts too: point-wise data has no others
            rows = torch.cat([some(good, 32), some(bad, 32)])
            batch = data[rows]
            return fk.preference_loss("dpo", world.logp(policy, batch), frozen[rows], mask=batch.mask, beta=0.1).loss
        rows = some(good, 64) if arm == "sft on positives" else some(torch.arange(len(scores)), 64)
        batch = data[rows]
        now = world.logp(policy, batch)
        if arm == "sft on positives":
            return fk.nll_loss(now, mask=batch.mask).loss
        target = scores[rows].sigmoid() if arm == "pdpo_soft" else (scores[rows] >= 1).float()
        if arm == "unlikelihood":
            return fk.pointwise_loss(arm, now, target=target, mask=batch.mask).loss
        return fk.pointwise_loss(arm, now, frozen[rows], target=target, mask=batch.mask, beta=0.1).loss

    def each(step):
        if step % 20 == 0:
            curve.append(world.judge(policy, reference, seed, 64 if quick else 256))

    world.train(policy, 60 if quick else 200, loss_of, 1e-4 if setting == "slow" else 3e-4, each)
    best = max(curve, key=lambda point: point["score"])
    return {
        "score": curve[-1]["score"],
        "best score": best["score"],
        "kl": curve[-1]["kl"],
        "fact": curve[-1]["fact"],
        "curve": curve,
    }


STUDY = Study(
    "pointwise",
    "From labels of single answers ULMA learns more than point-wise DPO, DPO on pairs made from them, unlikelihood and "
    "SFT on the positives ([arXiv:2312.02554](https://arxiv.org/abs/2312.02554)).",
    ARMS,
    run,
    (
        Effect("score", "pdpo_soft", "sft on positives", +1, quick=True),
        Effect("score", "ulma", "sft on positives", +1),
        Effect("score", "ulma", "unlikelihood", +1),
        Effect("score", "ulma", "pdpo", +1),
        Effect("score", "ulma", "dpo on pairs", +1),
        Effect("score", "pdpo_soft", "pdpo", +1),
        Effect("best score", "ulma", "sft on positives", +1),
        Effect("best score", "ulma", "pdpo", +1),
        Effect("best score", "ulma", "dpo on pairs", +1),
        Effect("best score", "pdpo_soft", "ulma", +1),
        Effect("score", "ulma, slow", "pdpo, slow", +1),
        Effect("score", "ulma, slow", "dpo on pairs, slow", +1),
        Effect("score", "pdpo_soft, slow", "pdpo, slow", +1),
        Effect("score", "ulma, demonstrations", "ulma", +1),
        Effect("score", "ulma, demonstrations", "sft on positives, demonstrations", +1),
        Effect("score", "ulma, demonstrations", "pdpo, demonstrations", +1),
    ),
    ("kl", "score"),
    "`best score` is the best of a run, `score` its last. Scale: a model of 60 thousand parameters, one rate of "
    "learning and one β for all arms, labels by a known rule. "
    "People label with more noise: which loss is best there is open.",
)

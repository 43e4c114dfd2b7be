"""Pivot tokens (arXiv:2411.00809): pairs with a fault in the chosen and a good part in the rejected answer.

Pairs are answers whose scores differ, so that nearly all have such conflicts: the better one has faults, the worse one
facts. `full` trains on all tokens, `masked` on those whose true worth agrees with their side, `adaptive` on those that
an adaptive mask keeps by the scores of a model trained on the pairs before (log π / π_ref of `full`). The preferences
are about half of the topics; forgetting is what the others' answers lose in likelihood.

More settings say where an adaptive mask loses: `adaptive other` scores with a model trained on other pairs, which have
no conflict; `adaptive other ends` keeps stops and end tokens, whatever their score; `adaptive true` scores with the
true worth, so that only the rule of the mask is left: it drops tokens of score 0, which `masked` keeps. `right` is the
share of facts and faults that a mask keeps or drops as `masked` does.
"""

import torch

import finealign_kernels as fk

from . import world
from .runs import Effect, Study

ARMS = (
    *("dpo full", "dpo masked", "dpo adaptive", "dpo adaptive other", "dpo adaptive other ends", "dpo adaptive true"),
    *("sft full", "sft masked", "ppo full", "ppo adaptive", "ppo adaptive other"),
)
SOME = world.TOPICS // 2  # topics of the preferences
STEPS, LR = 100, 1e-4


def conflicting(n: int, generator: torch.Generator) -> world.Answers:
    """n chosen, then n rejected answers to the same prompts: the chosen with a fault, the rejected with a fact."""
    first, second = (world.write(3 * n, generator, sentences=(3, 6), topics=SOME) for _ in range(2))
    second = world.answers_of(torch.cat([first.ids[:, : world.PROMPT], second.ids[:, world.PROMPT :]], 1))
    a, b = world.scores(first), world.scores(second)
    chosen = world.answers_of(torch.where((a > b)[:, None], first.ids, second.ids))
    rejected = world.answers_of(torch.where((a > b)[:, None], second.ids, first.ids))
    conflict = (world.marks(chosen) < 0).any(1) & (world.marks(rejected) > 0).any(1)
    kept = (conflict & (a != b)).nonzero()[:n, 0]
    return world.answers_of(torch.cat([chosen.ids[kept], rejected.ids[kept]]))


def unconflicting(n: int, generator: torch.Generator) -> world.Answers:
    """n chosen answers without a fault, then n rejected ones without a fact, to the same prompts."""
    good = world.write(n, generator, habits={"fact": 0.7, "filler": 0.3}, topics=SOME)
    bad = world.write(n, generator, habits={"elsewhere": 0.35, "false": 0.35, "filler": 0.3}, topics=SOME)
    bad = torch.cat([good.ids[:, : world.PROMPT], bad.ids[:, world.PROMPT :]], 1)
    return world.answers_of(torch.cat([good.ids, bad]))


def agreeing(answers: world.Answers) -> torch.Tensor:
    """Weights of the true mask: a chosen token is kept unless it is a fault, a rejected one unless it is a fact."""
    worth, n = world.marks(answers), len(answers.ids) // 2
    side = torch.ones(2 * n, 1)
    side[n:] = -1
    return (worth * side >= 0).float()


def trained(row: str, policy, data, frozen, weight, generator, steps: int, each=None) -> None:
    n = len(data.ids) // 2

    def loss_of(step):
        rows = torch.randint(n, (32,), generator=generator)
        if row == "sft":
            batch = data[rows]
            return fk.nll_loss(world.logp(policy, batch), mask=batch.mask, token_weight=weight[rows]).loss
        rows = torch.cat([rows, rows + n])
        batch = data[rows]
        options = dict(mask=batch.mask, token_weight=weight[rows], beta=0.1)
        return fk.preference_loss("dpo", world.logp(policy, batch), frozen[rows], **options).loss

    world.train(policy, steps, loss_of, LR, each)


def ppo(policy, reference, scorer, seed: int, steps: int, each) -> None:
    """PPO on the answers' scores, without a critic; with a scorer, a token against its advantage is left out."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=LR)
    for step in range(steps):
        each(step)
        batch = world.sample(policy, 64, generator, torch.randint(SOME, (64,), generator=generator))
        old, ref = world.frozen_logp(policy, batch), world.frozen_logp(reference, batch)
        last = batch.mask.long().cumsum(1).argmax(1)
        rewards = fk.SegmentRewards(world.scores(batch), last, torch.arange(65))
        score = None
        if scorer:
            score = fk.implicit_scores(world.frozen_logp(scorer, batch), ref, mask=batch.mask)
        options = dict(old_logp=old, ref_logp=ref, kl_coef=0.02, mask=batch.mask, token_score=score)
        made = fk.advantages(rewards, **options)
        for _ in range(2):
            now = world.logp(policy, batch)
            weight = made.token_weight if scorer else None
            loss = fk.policy_loss("ppo", now, old, made.advantages, mask=batch.mask, token_weight=weight).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
    each(steps)


def run(arm: str, seed: int, quick: bool) -> dict:
    row, kind = arm.split(maxsplit=1)
    generator = torch.Generator().manual_seed(seed)
    data = conflicting(256 if quick else 768, generator)
    held_out = world.write(256, generator)
    held_out = held_out[held_out.ids[:, 1] - world.TOPIC0 >= SOME]
    policy, reference = world.start(seed), world.start(seed)
    frozen, steps = world.frozen_logp(reference, data), 40 if quick else STEPS
    curve = []

    def each(step):
        if step % 20 == 0:
            n = 128 if quick else 256
            topics = torch.arange(n) % SOME
            curve.append({"step": step, **world.judge(policy, reference, seed, n, topics)})

    scorer = None
    if kind in ("adaptive", "adaptive other", "adaptive other ends"):
        scorer, pairs, judged = world.start(seed), data, frozen
        if kind != "adaptive":
            pairs = unconflicting(len(data.ids) // 2, torch.Generator().manual_seed(seed + 55))
            judged = world.frozen_logp(reference, pairs)
        draw = torch.Generator().manual_seed(seed + 77)
        trained("dpo", scorer, pairs, judged, torch.ones_like(judged), draw, steps)
    weight = torch.ones_like(frozen)
    if kind == "masked":
        weight = agreeing(data)
    elif kind == "adaptive true":
        weight = fk.adaptive_mask(world.marks(data), mask=data.mask).token_weight
    elif scorer:
        q = fk.implicit_scores(world.frozen_logp(scorer, data), frozen, mask=data.mask)
        weight = fk.adaptive_mask(q, mask=data.mask).token_weight
        if kind == "adaptive other ends":
            weight = torch.where(data.ids[:, 1:] <= world.STOP, 1.0, weight)  # END, BEGIN, STOP
    if row == "ppo":
        ppo(policy, reference, scorer, seed, steps, each)
    else:
        trained(row, policy, data, frozen, weight, generator, steps, each)
    nll = fk.nll_loss(world.frozen_logp(policy, held_out), mask=held_out.mask).loss
    before = fk.nll_loss(world.frozen_logp(reference, held_out), mask=held_out.mask).loss
    last = curve[-1]
    faults = last["elsewhere"] + last["false"] + last["repeat"]
    named = {name: last[name] for name in ("score", "fact", "kl")}
    worth = world.marks(data) != 0
    right = (weight == agreeing(data))[worth].double().mean()
    return {**named, "faults": faults, "forgotten": float(nll - before), "right": float(right), "curve": curve}


STUDY = Study(
    "pivots",
    "Where chosen answers hold faults and rejected ones good parts, training on the tokens that agree with their side "
    "gives better answers and forgets less than training on all of them "
    "([arXiv:2411.00809](https://arxiv.org/abs/2411.00809)).",
    ARMS,
    run,
    (
        Effect("score", "dpo masked", "dpo full", +1, quick=True),
        Effect("score", "dpo adaptive", "dpo full", +1),
        Effect("score", "dpo adaptive other", "dpo full", +1),
        Effect("score", "dpo adaptive other ends", "dpo full", +1),
        Effect("score", "dpo adaptive true", "dpo full", +1),
        Effect("right", "dpo adaptive other", "dpo adaptive", +1),
        Effect("forgotten", "dpo masked", "dpo full", -1),
        Effect("forgotten", "dpo adaptive", "dpo full", -1),
        Effect("score", "sft masked", "sft full", +1),
        Effect("score", "ppo adaptive", "ppo full", +1),
        Effect("score", "ppo adaptive other", "ppo full", +1),
        Effect("forgotten", "ppo adaptive", "ppo full", -1),
    ),
    ("step", "score"),
    "Scale: a model of 60 thousand parameters and one fault or more in every chosen answer. `masked` knows the truth, "
    "which nobody has; `adaptive` is what can be used. `forgotten` is in nats a token, on answers to the topics that "
    "the preferences leave out. Long answers with rare conflicts are left open.",
)

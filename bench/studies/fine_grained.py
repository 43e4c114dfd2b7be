"""Fine-Grained RLHF (arXiv:2306.01693): the same judgement as one number, by sentence, and by several models.

PPO with a critic from one base. The rewards of an answer add up to its true score in every arm; what differs is where
they stand: at the last token, at the end of each sentence, or at the content tokens, by a model for each sort of fault.
Two further arms weigh one of the models three times as much.
"""

import torch

import finealign_kernels as fk

from . import world
from .runs import Effect, Study

SORTS = {"completeness": ("fact",), "relevance": ("elsewhere", "repeat"), "factuality": ("false",)}
ARMS = {  # how dense, weights of the models
    "one number": ("answer", {}),
    "sentences": ("sentence", {}),
    "models": ("token", {}),
    "models, relevance x 3": ("token", {"relevance": 3.0}),
    "models, factuality x 3": ("token", {"factuality": 3.0}),
}
BATCH, EPOCHS, KL = 64, 2, 0.02


class Critic(torch.nn.Module):
    """Values of the tokens, from a model of its own."""

    def __init__(self, seed: int):
        super().__init__()
        self.body = world.make(seed + 500, layers=1).model
        self.head = torch.nn.Linear(self.body.config.hidden_size, 1)

    def forward(self, answers: world.Answers) -> torch.Tensor:
        return self.head(self.body(answers.ids).last_hidden_state)[:, :-1, 0]


def rewards_of(answers: world.Answers, density: str, weights: dict[str, float]) -> list[fk.SegmentRewards]:
    """What the judges say, as one model's segments or three models'."""
    rows = world.kinds(answers)
    if density == "answer":
        last = answers.mask.long().cumsum(1).argmax(1)
        return [fk.SegmentRewards(world.scores(answers), last, torch.arange(len(rows) + 1))]
    models = {"all": world.KINDS} if density == "sentence" else SORTS
    later = int(density == "sentence")  # the stop behind the content token
    found = []
    for name, sort in models.items():
        segments = [[(world.WORTH[kind], column + later) for kind, column in row if kind in sort] for row in rows]
        flat = [segment for row in segments for segment in row]
        reward = torch.tensor([worth for worth, _ in flat], dtype=torch.float32)
        end = torch.tensor([column for _, column in flat], dtype=torch.int64)
        sizes = torch.tensor([0, *(len(row) for row in segments)]).cumsum(0)
        found.append(fk.SegmentRewards(reward, end, sizes, weight=weights.get(name, 1.0)))
    return found


def run(arm: str, seed: int, quick: bool) -> dict:
    density, weights = ARMS[arm]
    generator = torch.Generator().manual_seed(seed)
    policy, reference, critic = world.start(seed), world.start(seed), Critic(seed)
    optimizer = torch.optim.Adam(
        [{"params": policy.parameters(), "lr": 3e-4}, {"params": critic.parameters(), "lr": 3e-3}]
    )
    curve = []
    steps = 10 if quick else 40
    for step in range(steps + 1):
        if step % 5 == 0:
            curve.append({"step": step, **world.judge(policy, reference, seed, 128 if quick else 256)})
        if step == steps:
            break
        batch = world.sample(policy, BATCH, generator)
        old, ref = world.frozen_logp(policy, batch), world.frozen_logp(reference, batch)
        with torch.no_grad():
            values = critic(batch)
        made = fk.advantages(
            rewards_of(batch, density, weights), values, old_logp=old, ref_logp=ref, kl_coef=KL, mask=batch.mask
        )
        for _ in range(EPOCHS):
            now, options = world.logp(policy, batch), dict(mask=batch.mask)
            loss = fk.policy_loss("ppo", now, old, made.advantages, **options).loss
            loss = loss + fk.value_loss(critic(batch), values, made.returns, **options).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*policy.parameters(), *critic.parameters()], 1.0)
            optimizer.step()
    last = curve[-1]
    area = sum(point["score"] for point in curve) / len(curve)
    named = {name: float(last[name]) for name in ("score", "fact", "elsewhere", "repeat", "false", "length", "kl")}
    return {**named, "mean score": area, "curve": curve}


STUDY = Study(
    "fine_grained",
    "The same judgement helps PPO more, the denser it stands: as sentence rewards and as several models' rewards "
    "instead of one number; and the weights of the models bend the policy "
    "([arXiv:2306.01693](https://arxiv.org/abs/2306.01693)).",
    tuple(ARMS),
    run,
    (
        Effect("mean score", "sentences", "one number", +1),
        Effect("mean score", "models", "one number", +1, quick=True),
        Effect("score", "sentences", "one number", +1),
        Effect("score", "models", "one number", +1),
        Effect("elsewhere", "models, relevance x 3", "models", -1),
        Effect("false", "models, factuality x 3", "models", -1),
    ),
    ("step", "score"),
    "Scale: a model of 60 thousand parameters, 40 updates of 64 answers, rewards by rule where the paper trains reward "
    "models. How much of the gain is left with learned, noisy rewards is left open.",
)

"""Reward models (arXiv:2401.06080): preference strength finds planted label noise, and what losses make of it.

Pairs have features of both responses; a fixed random network scores them, and the larger score is chosen. Then 30 % of
the labels are flipped. Five small reward models (same data, other seeds and orders) give each pair its strength; a new
model is trained with each loss and judged on held-out pairs with the right labels. Of a run:

    accuracy    of held-out pairs
    found       share of the planted flips among the third of lowest strength (the same for all losses of a seed)
    right       share of the pairs that are flipped by "flip" which had been planted

Nothing here is tuned per loss: one learning rate, one number of epochs.
"""

from functools import cache
from typing import NamedTuple

import torch

import finealign_kernels as fk

from .runs import Effect, Study

NOISE, MODELS, EPOCHS, RATE, WIDTH = 0.3, 5, 6, 3e-3, 12
LOSSES = ("clean labels", "bradley_terry", "smoothing", "adaptive_margin", "flip", "flip_margin", "soft_label", "drop")


class Data(NamedTuple):
    chosen: torch.Tensor  # (N, D)
    rejected: torch.Tensor
    planted: torch.Tensor  # (N,) bool: the label is wrong


def network(width: int, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(width, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))


@torch.no_grad()
def pairs(count: int, width: int, seed: int, noise: float) -> Data:
    """Pairs labelled by the network of seed 10^6 + seed / 10, `noise` of the labels flipped."""
    draw = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, count, width, generator=draw)
    teacher = network(width, 10**6 + seed // 10)
    better = (teacher(one) > teacher(other))[:, 0]
    planted = torch.zeros(count, dtype=torch.bool)
    planted[torch.randperm(count, generator=draw)[: round(noise * count)]] = True
    first = (better != planted)[:, None]
    return Data(torch.where(first, one, other), torch.where(first, other, one), planted)


def train(data: Data, seed: int, name: str = "bradley_terry", **constants: torch.Tensor) -> torch.nn.Module:
    """A reward model trained with a loss; constants of each pair are tensors (N,)."""
    model = network(data.chosen.shape[1], seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(data.chosen), generator=draw).split(64):
            scores = model(data.chosen[batch])[:, 0], model(data.rejected[batch])[:, 0]
            loss = fk.reward_loss(name, scores, **{key: value[batch] for key, value in constants.items()}).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@torch.no_grad()
def differences(model: torch.nn.Module, data: Data) -> torch.Tensor:
    return (model(data.chosen) - model(data.rejected))[:, 0]


@cache
def strength_of(seed: int, count: int) -> tuple[Data, fk.Strength]:
    """The noisy pairs of a seed, and the strength that small models give them."""
    data = pairs(count, WIDTH, 10 * seed, NOISE)
    return data, fk.preference_strength(differences(train(data, 100 * seed + k), data) for k in range(MODELS))


def run(arm: str, seed: int, quick: bool) -> dict:
    count = 1500 if quick else 3000
    (data, strength), held = strength_of(seed, count), pairs(2000, WIDTH, 10 * seed + 1, 0.0)
    weakest = strength.weakest(100 * NOISE)
    name, own, constants = {
        "clean labels": ("bradley_terry", pairs(count, WIDTH, 10 * seed, 0.0), {}),
        "bradley_terry": ("bradley_terry", data, {}),
        "smoothing": ("smoothing", data, {}),
        "adaptive_margin": ("adaptive_margin", data, dict(strength=strength.mean)),
        "flip": ("flip", data, dict(flip=weakest)),
        "flip_margin": ("flip_margin", data, dict(flip=weakest, strength=strength.mean)),
        "soft_label": ("soft_label_vote", data, dict(label=strength.soft)),
        "drop": ("bradley_terry", data, dict(weight=strength.weight(100 * NOISE))),
    }[arm]
    scored = differences(train(own, 100 * seed + 50, name, **constants), held) > 0
    return {
        "accuracy": scored.double().mean().item(),
        "found": strength.weakest(100 / 3)[data.planted].double().mean().item(),
        "right": data.planted[weakest].double().mean().item(),
    }


STUDY = Study(
    "reward",
    "With 30 % of the labels flipped, preference strength finds the flips; flipping the weakest pairs, a margin or "
    "soft labels raise held-out accuracy ([arXiv:2401.06080](https://arxiv.org/abs/2401.06080)).",
    LOSSES,
    run,
    (
        Effect("accuracy", "flip", "bradley_terry", +1, quick=True),
        Effect("accuracy", "flip_margin", "bradley_terry", +1),
        Effect("accuracy", "soft_label", "bradley_terry", +1),
        Effect("accuracy", "adaptive_margin", "bradley_terry", +1),
        Effect("accuracy", "smoothing", "bradley_terry", +1),
        Effect("accuracy", "drop", "bradley_terry", +1),
        Effect("accuracy", "flip", "clean labels", -1),
    ),
    ("", "accuracy"),
    "Scale: networks of 32 units on synthetic features, noise that is independent of the pair. It says nothing of the "
    "size of an effect on real judgements, whose noise is not; contrast and MetaRM are not in this study.",
)

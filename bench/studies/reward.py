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
AWAY, NEAR = 2.0, 0.5  # how far the policy has moved, and how far its responses to a prompt lie apart
LOSSES = ("clean labels", "bradley_terry", "smoothing", "adaptive_margin", "flip", "flip_margin", "soft_label", "drop")


class Data(NamedTuple):
    chosen: torch.Tensor  # (N, D)
    rejected: torch.Tensor
    planted: torch.Tensor  # (N,) bool: the label is wrong


def network(width: int, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(width, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))


def teacher_of(width: int, seed: int) -> torch.nn.Module:
    """What decides which response is better, the same for all sets of a run."""
    return network(width, 10**6 + seed // 10)


@torch.no_grad()
def pairs(count: int, width: int, seed: int, noise: float) -> Data:
    """Pairs labelled by the network of seed 10^6 + seed / 10, `noise` of the labels flipped."""
    draw = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, count, width, generator=draw)
    teacher = teacher_of(width, seed)
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
    "size of an effect on real judgements, whose noise is not; contrast and MetaRM are in the study `shift`.",
)


class Reward(torch.nn.Module):
    """A reward model whose hidden layer is the representation that contrast keeps apart."""

    def __init__(self, width: int):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(width, 32), torch.nn.Tanh(), torch.nn.Dropout(0.0))
        self.out = torch.nn.Linear(32, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inner = self.inner(x)
        return self.out(inner)[..., 0], inner


class Way(NamedTuple):
    """What is added to Bradley-Terry."""

    contrast: str | None = None
    rows: str = "responses"
    weight: float = 1.0  # of the contrastive loss
    prototypes: int = 0
    eta: float | None = None  # of MetaRM
    noise: float = NOISE


WAYS = {
    "clean labels": Way(noise=0.0),
    "bradley_terry": Way(),
    "simcse": Way("simcse"),
    "simcse, differences": Way("simcse", "differences"),
    "swav": Way("swav", weight=0.1, prototypes=50),
    "swav, differences": Way("swav", "differences", weight=0.5, prototypes=20),
    "meta, η = 0.1": Way(eta=0.1),
    "meta, η = 1": Way(eta=1.0),
    "simcse, weight 0.1": Way("simcse", weight=0.1),
}


@torch.no_grad()
def shifted_responses(prompts: int, k: int, width: int, seed: int, draw: torch.Generator) -> torch.Tensor:
    """(prompts, k, width): responses of a policy that has moved: around another place, and close to each other."""
    away = torch.nn.functional.normalize(torch.randn(width, generator=torch.Generator().manual_seed(seed)), dim=0)
    base = torch.randn(prompts, 1, width, generator=draw) + AWAY * away
    return base + NEAR * torch.randn(prompts, k, width, generator=draw)


@torch.no_grad()
def shifted_pairs(count: int, width: int, seed: int) -> Data:
    """As pairs(...) without noise, of the same teacher, where the policy has moved to."""
    draw = torch.Generator().manual_seed(seed)
    one, other = shifted_responses(count, 2, width, seed // 10, draw).unbind(1)
    better = teacher_of(width, seed)(one) > teacher_of(width, seed)(other)
    return Data(torch.where(better, one, other), torch.where(better, other, one), torch.zeros(count, dtype=torch.bool))


def train_way(way: Way, data: Data, seed: int) -> Reward:
    """A reward model of the pairs, by Bradley-Terry with what the way adds."""
    torch.manual_seed(seed)
    width = data.chosen.shape[1]
    model, draw = Reward(width), torch.Generator().manual_seed(seed)
    prototypes = torch.nn.Parameter(torch.randn(way.prototypes, 32)) if way.prototypes else None
    trained = [*model.parameters(), *([] if prototypes is None else [prototypes])]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.1)
    meta = None if way.eta is None else fk.MetaRM(model.parameters(), eta=way.eta)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(data.chosen), generator=draw).split(64):
            x = torch.cat([data.chosen[batch], data.rejected[batch]])
            optimizer.zero_grad()
            if meta is None:
                loss_of(way, model, x, prototypes).backward()
            else:
                unlabelled = shifted_responses(16, 4, width, seed // 1000, draw)
                with meta.ascend(fk.difference_loss(model(unlabelled)[0])):
                    loss_of(way, model, x, prototypes).backward()
            optimizer.step()
    return model.eval()


def loss_of(way: Way, model: Reward, x: torch.Tensor, prototypes: torch.Tensor | None) -> torch.Tensor:
    """Bradley-Terry of halves; with contrast its mean over two dropout views, and that of their hidden layers."""
    if way.contrast is None:
        return fk.reward_loss("bradley_terry", model(x)[0]).loss
    views = fk.dropout_views(model, x, p=0.05)
    options = {} if prototypes is None else {"prototypes": prototypes}
    contrast = fk.contrastive_loss(way.contrast, *(inner for _, inner in views), rows=way.rows, **options).loss
    return sum(fk.reward_loss("bradley_terry", scores).loss for scores, _ in views) / 2 + way.weight * contrast


def run_shifted(arm: str, seed: int, quick: bool) -> dict:
    count = 1500 if quick else 3000
    return judged(train_way(WAYS[arm], pairs(count, WIDTH, 10 * seed, WAYS[arm].noise), 1000 * seed + 60), seed)


@torch.no_grad()
def judged(model: Reward, seed: int) -> dict:
    """Accuracy on held-out pairs with right labels, in all and in fifths of the teacher's difference."""
    row, curves = {}, {}
    sets = {"inside": pairs(4000, WIDTH, 10 * seed + 1, 0.0), "outside": shifted_pairs(4000, WIDTH, 10 * seed + 2)}
    for name, held in sets.items():
        teacher = teacher_of(WIDTH, 10 * seed)
        right = (model(held.chosen)[0] > model(held.rejected)[0]).double()
        order = (teacher(held.chosen) - teacher(held.rejected))[:, 0].argsort()
        curves[name] = [right[part].mean().item() for part in order.tensor_split(5)]
        row |= {name: right.mean().item(), f"{name}, weakest": curves[name][0], f"{name}, strongest": curves[name][-1]}
    row["curve"] = [{"fifth of strength": i + 1, "accuracy outside": a} for i, a in enumerate(curves["outside"])]
    return row


SHIFT = Study(
    "shift",
    "A contrastive term beside the loss and MetaRM keep a reward model right where the policy has moved away from the "
    "pairs it was trained on ([arXiv:2401.06080](https://arxiv.org/abs/2401.06080)).",
    tuple(WAYS),
    run_shifted,
    (
        Effect("outside", "bradley_terry", "clean labels", -1, quick=True),
        Effect("outside", "simcse", "bradley_terry", +1),
        Effect("outside", "simcse, weight 0.1", "bradley_terry", +1),
        Effect("outside", "simcse, differences", "bradley_terry", +1),
        Effect("outside", "swav", "bradley_terry", +1),
        Effect("outside", "swav, differences", "bradley_terry", +1),
        Effect("outside", "meta, η = 0.1", "bradley_terry", +1),
        Effect("outside", "meta, η = 1", "bradley_terry", +1),
        Effect("outside, weakest", "simcse", "bradley_terry", +1),
        Effect("outside, weakest", "meta, η = 0.1", "bradley_terry", +1),
        Effect("inside", "simcse", "bradley_terry", +1),
        Effect("inside", "swav, differences", "bradley_terry", +1),
        Effect("inside", "meta, η = 0.1", "bradley_terry", +1),
        Effect("inside", "meta, η = 1", "meta, η = 0.1", -1),
    ),
    ("fifth of strength", "accuracy outside"),
    "Scale: networks of 32 units, 30 % of the labels flipped, a shift that was planted: responses around another "
    "place and close to each other. Inside and outside are held-out pairs with right labels; weakest and strongest are "
    "fifths of the true difference. Two weights of SimCSE and two sizes of MetaRM's step were tried. Whether the terms "
    "do more for a language model, whose representations have more room, is left open.",
)

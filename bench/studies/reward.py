"""Planted label noise: does preference strength find it, and what do flips, margins and soft labels make of it?

    python bench/studies/reward.py --json rows.json        five seeds, half a minute of one core
    python bench/studies/reward.py --quick                 two seeds, fewer pairs: for tests

Pairs have features of both responses; a fixed random network scores them, and the larger score is chosen. Then 30 % of
the labels are flipped. Five small reward models (same data, other seeds and orders) give each pair its strength; a new
model is trained with each loss and judged on held-out pairs with the right labels. A row is one loss with one seed:

    accuracy    of held-out pairs
    found       share of the planted flips among the third of lowest strength (the same for all losses of a seed)
    right       share of the pairs that are flipped by "flip" which had been planted

Nothing here is tuned per loss: one learning rate, one number of epochs. It is a synthetic task, and says nothing of the
size of an effect on real judgements.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch

import finealign_kernels as fk

NOISE, MODELS, EPOCHS, RATE = 0.3, 5, 6, 3e-3
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


def study(seed: int, count: int, width: int = 12, losses: tuple[str, ...] = LOSSES) -> list[dict]:
    """The rows of one seed."""
    data, held = pairs(count, width, 10 * seed, NOISE), pairs(2000, width, 10 * seed + 1, 0.0)
    strength = fk.preference_strength(differences(train(data, 100 * seed + k), data) for k in range(MODELS))
    found = strength.weakest(100 / 3)[data.planted].double().mean().item()
    weakest = strength.weakest(100 * NOISE)
    right = data.planted[weakest].double().mean().item()
    mean_ = strength.mean
    clean = pairs(count, width, 10 * seed, 0.0)
    settings = {
        "clean labels": ("bradley_terry", clean, {}),
        "bradley_terry": ("bradley_terry", data, {}),
        "smoothing": ("smoothing", data, {}),
        "adaptive_margin": ("adaptive_margin", data, dict(strength=mean_)),
        "flip": ("flip", data, dict(flip=weakest)),
        "flip_margin": ("flip_margin", data, dict(flip=weakest, strength=mean_)),
        "soft_label": ("soft_label_vote", data, dict(label=strength.soft)),
        "drop": ("bradley_terry", data, dict(weight=strength.weight(100 * NOISE))),
    }
    rows = []
    for loss in losses:
        name, own, constants = settings[loss]
        accuracy = (differences(train(own, 100 * seed + 50, name, **constants), held) > 0).double().mean().item()
        rows.append(
            dict(study="reward", seed=seed, pairs=count, loss=loss, accuracy=accuracy, found=found, right=right)
        )
    return rows


def summary(rows: list[dict]) -> str:
    """Mean and standard error over the seeds, and the paired difference from training on the labels as they are."""
    seeds = sorted({row["seed"] for row in rows})
    of = {(row["loss"], row["seed"]): row for row in rows}

    def spread(values):
        return f"{mean(values):.3f} ± {stdev(values) / len(values) ** 0.5:.3f}"

    lines = [
        f"{len(seeds)} seeds; mean ± standard error",
        f"{'loss':16} {'held-out accuracy':18} against bradley_terry",
    ]
    for loss in LOSSES:
        own = [of[loss, seed]["accuracy"] for seed in seeds]
        gain = [of[loss, seed]["accuracy"] - of["bradley_terry", seed]["accuracy"] for seed in seeds]
        lines.append(f"{loss:16} {spread(own):18} {'' if loss == 'bradley_terry' else spread(gain)}")
    for key, words in (("found", "planted flips in the lowest third"), ("right", "planted among those flipped")):
        lines.append(f"{words}: {spread([of['flip', seed][key] for seed in seeds])}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two seeds of 600 pairs")
    parser.add_argument("--seeds", type=int, help="default: 5, with --quick 2")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    options = parser.parse_args(argv)
    seeds = options.seeds or (2 if options.quick else 5)
    if seeds < 2:
        parser.error("--seeds must be 2 or more: a spread needs them")
    rows = []
    for seed in range(1, seeds + 1):
        rows += study(seed, 600 if options.quick else 3000)
    print(summary(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    sys.exit(0 if main() else 1)

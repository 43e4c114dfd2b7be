"""Fixtures of the specification whose numbers several test files hold."""

from typing import NamedTuple

import torch
from torch import Tensor

F64 = torch.float64


def rows(*values) -> Tensor:
    """(B, T) float64 of rows that may be shorter, filled up with 0."""
    width = max(map(len, values))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in values], dtype=F64)


def numbers(text: str) -> Tensor:
    """`rows` of a table in text, one line a row."""
    return rows(*([float(x) for x in line.split()] for line in text.split("\n") if line.strip()))


class FixtureE(NamedTuple):
    """Four responses: six tokens, four with a hole between them, one, none."""

    logp: Tensor
    old: Tensor
    ref: Tensor
    sampler: Tensor
    advantages: Tensor  # (4,)
    dense: Tensor
    weight: Tensor
    entropy: Tensor
    mask: Tensor


def fixture_e() -> FixtureE:
    old = rows([-1.2, -0.4, -2.0, -0.7, -0.3, -1.5], [-0.9, -2.5, 0, -0.2, -1.1], [-0.8], [])
    moved = rows([0.1, 0.3, -0.35, -0.02, 0.24, 0.05], [0.15, -0.4, 0, 0.9, 1.3], [0.08], [])
    return FixtureE(
        logp=old + moved,
        old=old,
        ref=rows([-1.0, -0.5, -2.3, -0.7, -0.4, -1.2], [-1.0, -2.2, 0, -0.6, -0.9], [-0.5], []),
        sampler=rows([-1.25, -0.45, -2.9, -0.7, -0.28, -1.5], [-0.9, -2.4, 0, -0.95, -1.1], [-0.8], []),
        advantages=torch.tensor([0.8, -1.2, 0.5, -0.7], dtype=F64),
        dense=rows([0.8, -0.4, 0.2, 1.0, 0, -0.6], [-1.2, 0.5, 0, -0.9, 0.4], [0.5], []),
        weight=rows([1, 0.5, 0, 1, 0.25, 1], [1, 0, 0, 0.5, 1], [1], []),
        entropy=rows([1.2, 0.3, 2.0, 0.8, 0.1, 1.0], [0.5, 1.5, 0, 0.2, 0.9], [0.7], []),
        mask=rows([1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1], [1], []).bool(),
    )


class FixtureD(NamedTuple):
    """Two responses, six and four tokens, of the fine-grained pipeline; advantages and returns as corrected."""

    logp: Tensor
    old: Tensor
    values: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    scores: Tensor  # q
    mask: Tensor


def fixture_d() -> FixtureD:
    old = rows([-0.9, -0.4, -1.3, -0.6, -0.8, -0.2], [-0.5, -1.1, -0.7, -0.3])
    old_values = rows([0.1, 0.05, 0.2, -0.1, 0, 0.3], [-0.05, 0.1, -0.2, 0.15])
    return FixtureD(
        logp=old + rows([0.05, -0.3, 0.1, 0.25, -0.02, 0], [0.3, -0.05, -0.4, 0.1]),
        old=old,
        values=old_values + rows([0.5, -0.1, 0.05, 0.3, -0.25, 0.1], [0.15, -0.5, 0.02, 0.25]),
        old_values=old_values,
        advantages=numbers("""
            0.9340625971 1.0333311943 1.0407384449 0.6791492526 0.6469691723 0.2597758826
            -1.3216556455 -1.4381950707 -1.4328599851 -0.4013158426"""),
        returns=numbers("""
            2.3373249517 2.502584103 2.6686463677 1.5845576943 1.6147767467 1.075166827
            -2.7040909469 -2.8068010534 -3.0952321783 -0.5083786017"""),
        scores=rows([0.4, -0.2, 0.1, 0.3, -0.5, 0.2], [-0.6, -0.1, 0.2, -0.3]),
        mask=rows([1, 1, 1, 1, 1, 1], [1, 1, 1, 1]).bool(),
    )

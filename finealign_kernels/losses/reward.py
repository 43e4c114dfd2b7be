"""The loss of a reward model on pairs of scores: margins, noisy labels, soft labels."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..formulas import margin as formula
from ..ops._check import check_number, check_tensor, fail, reads_values
from .reduce import reduce


class RewardLoss(NamedTuple):
    """loss carries the gradient; everything else is detached. (P,) over pairs."""

    loss: Tensor  # () or (P,) with reduction="none"
    losses: Tensor
    margins: Tensor  # chosen - rejected, as given; 0 for a pair of weight 0
    accuracies: Tensor  # 1 where the chosen score is the larger one


def reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: float | Tensor = 0.0,
    smoothing: float | Tensor = 0.0,
    flip: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> RewardLoss:
    """Mean of -(1-ε) log σ(m) - ε log σ(-m), m = s (chosen - rejected) - margin, ε the smoothing.

    chosen, rejected  (P,) float, scores of the two responses
    margin     a finite number or (P,), inside the sigmoid. With flip its absolute value is taken for every pair
    smoothing  a number or (P,) in [0, 1]: how likely the label is wrong. 1 - p makes p a soft label
    flip       (P,) bool: pairs whose label is taken as wrong, s = -1; None: none, s = 1
    weight     (P,) float, multiplies the loss of each pair; scores of a pair of weight 0 may be NaN
    reduction  "mean" over pairs, "sum" or "none"; denominator: a number or tensor to divide the sum by instead

    margin, smoothing and weight are constants. Returns RewardLoss; no pair at all gives 0, connected to the graph.
    Raises  ValueError, TypeError naming argument, expectation and finding.
    Source  arXiv:2401.06080 eq. 2, 5 and 6, whose margin is read as inside the sigmoid; the margin of a flipped pair,
            soft labels and weights are derived.
    """
    check_tensor("chosen", chosen)
    if chosen.dim() != 1:
        fail("chosen", "have shape (P,)", tuple(chosen.shape))
    check_tensor("rejected", rejected, shape=chosen.shape, like=chosen)
    dtype = torch.promote_types(chosen.dtype, torch.float32)
    margin = _constant("margin", margin, chosen, dtype)
    smoothing = _constant("smoothing", smoothing, chosen, dtype, least=0, most=1)
    d = chosen.to(dtype) - rejected.to(dtype)
    if weight is not None:
        weight = _constant("weight", weight, chosen, dtype)
        kept = weight != 0
        d = torch.where(kept, chosen.to(dtype), 0) - torch.where(kept, rejected.to(dtype), 0)
    m = d
    if flip is not None:
        check_tensor("flip", flip, dtypes=(torch.bool,), shape=chosen.shape, like=chosen)
        m, margin = torch.where(flip, -d, d), abs(margin)
    losses, _ = formula.smoothed(m - margin, smoothing=smoothing)
    if weight is not None:
        losses = weight * losses
    loss = reduce(losses, reduction, denominator)
    d = d.detach()
    return RewardLoss(loss, losses.detach(), d, (d > 0).to(dtype))


def _constant(name: str, x, like: Tensor, dtype, *, least=None, most=None):
    """A finite number, or (P,) of them, detached. Values on a GPU are not read: that would be a host sync."""
    if not isinstance(x, Tensor):
        check_number(name, x, least=least, most=most)
        return x
    check_tensor(name, x, shape=like.shape, like=like)
    x = x.detach().to(dtype)
    if reads_values(x):
        good = x.isfinite()
        good = good if least is None else good & (x >= least) & (x <= most)
        if not bool(good.all()):
            bounds = "" if least is None else f" in [{least}, {most}]"
            fail(name, f"hold finite numbers{bounds}", x[~good][0].item())
    return x

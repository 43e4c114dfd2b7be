"""The loss of a segment classifier: classes at the separator tokens that stand for the segments, nowhere else."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops._check import check_tensor, fail
from ..ops.logprobs import token_logprobs
from .reduce import reduce


class SegmentClassLoss(NamedTuple):
    """loss carries the gradient; the others are detached."""

    loss: Tensor  # ()
    losses: Tensor  # in the shape of labels, 0 where no segment is judged
    accuracy: Tensor  # () share of the segments whose class has the largest logit; 0 without a segment


def segment_class_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> SegmentClassLoss:
    """-(1/|S|) Σ_{s in S} log softmax(o_s)[label_s], S the separators that have a label.

    logits     (B, T, C), or packed (N, C); float. What stands at other tokens is not looked at, it may be NaN
    labels     (B, T) or (N,) int: the class of the segment at its separator, ignore_index at every other token
    mask       bool, as labels: separators that count; those of segments without a judgement may be left out
    reduction  "mean" over the segments or "sum"; denominator: divides the sum instead (the count of a whole step, say)

    No separator at all gives 0, connected to the graph. The gradient is (softmax - onehot)/|S| at separators, exact 0
    elsewhere.
    Raises  ValueError, TypeError, IndexError for a class out of range. Source: the code of arXiv:2306.01693
            (reward_modeling/), whose classifiers have three classes.
    """
    check_tensor("labels", labels, dtypes=(torch.int32, torch.int64))
    if reduction == "none":
        fail("reduction", "be 'mean' or 'sum'", repr(reduction))
    found = token_logprobs(logits, labels, mask=mask, ignore_index=ignore_index, outputs=("is_top1",))
    judged = labels != ignore_index
    if mask is not None:
        judged = judged & (mask != 0)
    losses = -found.logp.reshape(-1)
    flat = judged.reshape(-1)
    loss = reduce(losses, reduction, denominator, flat)
    right = (found.is_top1.reshape(-1) & flat).sum().to(losses.dtype) / flat.sum().clamp(min=1)
    return SegmentClassLoss(loss, losses.detach().view(labels.shape), right)

"""Warnings about input that is allowed but most likely a mistake. Each is given once in a process."""

import sys
import warnings
from pathlib import Path

from torch import Tensor
from torch.utils import _contextlib

PACKAGE = str(Path(__file__).resolve().parent.parent)
DECORATORS = _contextlib.__file__  # torch.no_grad() on a function of ours stands between it and its caller

_given: set[str] = set()  # what has been warned about


def warn_once(about: str, message: str) -> None:
    """A UserWarning at the line outside the package that called into it, the first time that `about` comes up."""
    if about in _given:
        return
    _given.add(about)
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith((PACKAGE, DECORATORS)):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def warned(about: str) -> bool:
    return about in _given


def warn_of_empty_mask(name: str, token_weight: Tensor, mask: Tensor | None, baseline: object) -> None:
    """A mask that keeps none of the tokens that there are, so that nothing is trained. Reads values."""
    if name in _given or bool(token_weight.any()):
        return
    many = token_weight.numel() if mask is None else int(mask.sum())
    if many:
        level = baseline if isinstance(baseline, str | int | float) else "given"
        warn_once(
            name,
            f"{name}: the mask keeps none of {many} tokens, so loss and gradient are 0. A score at the baseline "
            f"({level}) is dropped; implicit_scores are 0 until the policy has moved from its reference, so start the "
            "mask some steps later",
        )

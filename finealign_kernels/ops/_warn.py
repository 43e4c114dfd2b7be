"""Warnings about what is allowed and most likely a mistake: each is given once in a process."""

import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

PACKAGE = str(Path(__file__).resolve().parent.parent)

LOOKS = 64  # calls of a function whose tokens are looked at: a mistake in the data shows in the first steps

_given: set[str] = set()  # what has been warned about
_looks: dict[str, int] = {}  # calls of each function so far


def warn_once(about: str, message: str) -> None:
    """A UserWarning at the line outside the package that called into it, the first time that `about` comes up."""
    if about in _given:
        return
    _given.add(about)
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
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


def warn_of_tokens(name: str, tokens, token_weight) -> None:
    """What tokens of a loss look like if something has been mixed up. Reads values, in the first calls on a CPU.

    tokens: Layout's Tokens of logp; token_weight as the caller gave it: a tensor, a pair of them, or None.
    """
    if _looks.get(name, 0) >= LOOKS or tokens.whole.device.type != "cpu" or torch.compiler.is_compiling():
        return
    _looks[name] = _looks.get(name, 0) + 1
    logp, mask = tokens.x.detach(), tokens.mask
    if logp.numel() == 0:
        return
    top = float((logp if mask is None else torch.where(mask, logp, -1)).max())
    if top > 0.01:
        said = f"{name}: logp has {top:.3g}; the logarithm of a probability is at most 0. Are these logits or rewards?"
        warn_once(f"{name} logp", said)
    if mask is None and tokens.ends is None:
        tail = logp.view(tokens.whole.shape)[:, -2:]
        padded = int((tail == 0).all(1).sum()) if tail.shape[1] == 2 else 0
        if padded:
            said = f"{name}: {padded} of {len(tail)} rows of logp end in zeros and there is no mask: are they padding?"
            warn_once(f"{name} mask", said)
    parts = (
        token_weight if type(token_weight) in (tuple, list) else (getattr(token_weight, "token_weight", token_weight),)
    )
    if parts and all(type(part) is Tensor and part.layout == torch.strided for part in parts):
        weight = torch.cat([part.detach().reshape(-1) for part in parts])
        if weight.shape != logp.shape:
            return  # the loss says so
        lowest = float((weight if mask is None else torch.where(mask, weight, 0)).min())
        if lowest < 0:
            said = f"{name}: token_weight has {lowest:.3g}; a negative weight turns the loss of its token around"
            warn_once(f"{name} token_weight", said)

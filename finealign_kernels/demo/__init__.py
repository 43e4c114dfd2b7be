"""`finealign demo`: a few optimiser steps of a fine-grained preference loss on a small language model, on a CPU.

Every step runs the loss head twice on the same hidden states, fused and in eager PyTorch, compares loss and gradients,
and trains with the fused ones. A difference above LIMIT ends the run. With token scores, only tokens or segments whose
score agrees with their answer's side carry the gradient. `run(Options(model="tiny", loss="ipo"))` is what
the command does.
"""

from .heads import LIMIT, DifferenceError
from .options import AVERAGES, KEEPS, LOSSES, PIVOTS, TRAINERS, Options, UsageError
from .training import run

__all__ = [
    "AVERAGES",
    "KEEPS",
    "LIMIT",
    "LOSSES",
    "PIVOTS",
    "TRAINERS",
    "DifferenceError",
    "Options",
    "UsageError",
    "run",
]

"""`finealign demo`: a few optimiser steps of a fine-grained preference loss on a small language model, on a CPU.

Every step runs the loss head twice on the same hidden states, fused and in eager PyTorch, compares loss and gradients,
and trains with the fused ones. A difference above LIMIT ends the run. With token scores, only tokens or segments whose
score agrees with their answer's side carry the gradient. `run(Options(model="tiny", loss="ipo"))` is what
the command does.
"""

from . import reward, rl, trainer, training
from .heads import LIMIT, DifferenceError
from .options import AVERAGES, KEEPS, LOSSES, PIVOTS, POLICIES, TRAINERS, Options, UsageError, check

__all__ = [
    "AVERAGES",
    "KEEPS",
    "LIMIT",
    "LOSSES",
    "PIVOTS",
    "POLICIES",
    "TRAINERS",
    "DifferenceError",
    "Options",
    "UsageError",
    "run",
]


def run(options):
    """Trains, compares, prints a table, writes the report and returns its path.

    Raises  UsageError where an option, a file or a missing package stands in the way; DifferenceError.
    """
    check(options)
    way = reward if options.reward is not None else trainer if options.trainer else rl if options.rl else training
    return way.run(options)

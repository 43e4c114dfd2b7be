"""`finealign demo`: a few optimizer steps of a fine-grained preference loss on a small language model, on a CPU.

Each step computes loss and gradients twice on the same hidden states: by the fused loss head and in eager PyTorch. The
two are compared, and the fused gradients train the model. A relative difference above LIMIT ends the run with an error.
With token scores, only tokens or segments whose score agrees with their side (chosen or rejected) have a gradient.

`run(Options(model="tiny", loss="ipo"))` does the same from Python.
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

    Raises  UsageError for a wrong option, an unreadable file or a missing package; DifferenceError
    """
    check(options)
    job = reward if options.reward is not None else trainer if options.trainer else rl if options.rl else training
    return job.run(options)

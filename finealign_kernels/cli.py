"""The `finealign` command. Frameworks are imported by the subcommand that needs them."""

import argparse
import os
import sys

from . import __version__


def main(argv=None):
    """Runs one subcommand. Exit status: 0, 1 for a failed check or a closed output pipe, 2 for a usage error."""
    try:
        status = _main(argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # "finealign doctor | head" closes the pipe; Python would flush once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _main(argv):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="finealign", description="Fused kernels for fine-grained alignment losses.")
    parser.add_argument("--version", action="version", version=f"finealign {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (help_line, add_options, _) in COMMANDS.items():
        command = commands.add_parser(name, help=help_line, description=help_line)
        if name in argv[:1]:  # the options of demo import torch, which `finealign --help` does not need
            add_options(command)
    if not argv:
        parser.print_help()
        return 2
    options = vars(parser.parse_args(argv))
    return COMMANDS[options.pop("command")][2](options)


def _demo_options(parser):
    from .demo import AVERAGES, KEEPS, LOSSES, PIVOTS, POLICIES, TRAINERS, Options

    default = Options()
    add = parser.add_argument
    add("--model", metavar="DIR", help='directory of a model (may hold a .gguf), or "tiny"; default: SmolLM2-135M')
    add("--data", metavar="FILE", help="feedback as JSONL, or QA-Feedback's JSON; default: the shipped sample")
    add("--loss", choices=LOSSES, default=default.loss, help="default: %(default)s")
    add("--average", choices=AVERAGES, default=default.average, help="average of log-probs; default: the loss's own")
    add("--beta", type=float, metavar="X", help="default: the loss's own")
    add("--span-weight", type=float, default=default.span_weight, metavar="W", help=_SPAN_WEIGHT)
    add(
        "--pivots",
        choices=PIVOTS,
        help="find pivots; train only segments whose score agrees with the answer's side",
    )
    add("--keep", choices=KEEPS, default=default.keep, help="train whole segments or only pivots; default: %(default)s")
    add("--scores", metavar="implicit|spans|FILE", help=_SCORES)
    add("--threshold", type=float, metavar="X", help="with --pivots threshold, in standard deviations; default: 1")
    add("--percent", type=float, metavar="P", help="with --pivots salience: share of an answer's tokens; default: 20")
    add("--baseline", metavar="B", help="a number, batch, row, or quantile:P; a score above it is good; default: batch")
    add("--steps", type=int, default=default.steps, metavar="N", help="optimizer steps; default: %(default)s")
    add("--batch", type=int, default=default.batch, metavar="N", help="pairs a step; default: %(default)s")
    add("--pairs", type=int, default=default.pairs, metavar="N", help="pairs to learn from; default: %(default)s")
    add("--no-compare", dest="compare", action="store_false", help="skip the second training, with all weights 1")
    add("--trainer", choices=TRAINERS, help="compare whole steps of TRL's DPOTrainer with and without the patch")
    add("--rl", choices=POLICIES, nargs="?", const="ppo", help=_RL)
    add("--reward", type=int, nargs="?", const=160, metavar="PAIRS", help=_REWARD)
    add("--noise", type=float, default=default.noise, metavar="X", help=_NOISE)
    training = parser.add_mutually_exclusive_group()
    training.add_argument("--full", dest="lora", action="store_false", help="train all parameters (the default)")
    training.add_argument("--lora", dest="lora", action="store_true", help="train LoRA adapters, the head is frozen")
    parser.set_defaults(lora=default.lora)
    add("--lr", type=float, metavar="X", help="learning rate; default: 5e-6, with --lora 2e-4")
    add(
        "--max-prompt",
        type=int,
        default=default.max_prompt,
        metavar="N",
        help="keep the last N tokens of a prompt; default: %(default)s",
    )
    add(
        "--max-response",
        type=int,
        default=default.max_response,
        metavar="N",
        help="keep the first N tokens of an answer; default: %(default)s",
    )
    add("--seed", type=int, default=default.seed, metavar="N", help="default: %(default)s")
    add("--threads", type=int, metavar="N", help="default: torch's own choice")
    add("--report", default=default.report, metavar="FILE", help="default: %(default)s")


_SPAN_WEIGHT = (
    "weight of a marked fault in the rejected answer; in the chosen answer it is 1/W, and praise is treated the other "
    "way round. With 1, spans have no effect; default: %(default)s"
)


_RL = (
    "train with a policy loss, as if the model had sampled the answers: spans are rewards of segments, preferences are "
    "rewards of whole answers; --batch and --pairs then count prompts; without a value: ppo"
)


_REWARD = (
    "train small reward models by several losses, and test them on held-out prompts. The pairs have planted faults and "
    "partly flipped labels, or are the preferences of --data; without a value: 160 pairs"
)


_NOISE = "with --reward: share of the planted pairs whose label is flipped; default: %(default)s"


_SCORES = (
    "token scores that decide which tokens are trained: implicit (from the policy itself, after half of the steps), "
    "spans (the scores of the data's spans), or a feedback file with the same answers; default: implicit with "
    "--pivots, otherwise all tokens are trained"
)


def _demo(options):
    from . import demo

    try:
        demo.run(demo.Options(**options))
    except demo.UsageError as error:
        return _complain("demo", error, 2)
    except demo.DifferenceError as error:
        return _complain("demo", error, 1)
    return 0


def _doctor_options(parser):
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _doctor(options):
    from . import doctor

    return doctor.run(**options)


def _strength_options(parser):
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help=_SCORE_FILES)
    add("--out", metavar="FILE", help="the first file's rows with the new columns; .jsonl, .parquet or .arrow")
    add("--report", metavar="FILE", help="HTML with a histogram and the standard deviation over the mean")
    add("--difference", metavar="FIELD", help="default: difference or differences")
    add("--chosen", metavar="FIELD", help="default: chosen_score or chosen_scores")
    add("--rejected", metavar="FIELD", help="default: rejected_score or rejected_scores")
    add("--flip", type=float, metavar="P", help="flip the P %% of lowest strength; default: those below 0")
    add("--drop", type=float, metavar="P", help="weight 0 for the P %% of lowest strength; default: none")
    add("--scale", type=float, default=1.0, metavar="X", help="margin = scale * strength; default: %(default)s")
    add("--clamp", type=float, metavar="X", help="clamp margins to [-X, X]")


_SCORE_FILES = (
    "JSON Lines, or Parquet or Arrow if the package datasets is installed. A row is a pair with the scores of its "
    "chosen and rejected response, or their difference: a number, or a list with one number for each model. Several "
    "files have the scores of other models for the same pairs"
)


def _strength(options):
    from . import strength

    try:
        strength.run(strength.Options(**{**options, "files": tuple(options["files"])}))
    except strength.UsageError as error:
        return _complain("strength", error, 2)
    return 0


def _complain(command, error, status):
    print(f"finealign {command}: {error}", file=sys.stderr)
    return status


COMMANDS = {
    "demo": (
        "train a small model with a preference or policy loss, and compare each step with eager PyTorch",
        _demo_options,
        _demo,
    ),
    "strength": (
        "compute strengths, labels and margins of preference pairs from the scores of several reward models",
        _strength_options,
        _strength,
    ),
    "doctor": ("list the backends of this machine and compare them with float64", _doctor_options, _doctor),
}

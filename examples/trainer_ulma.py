"""transformers.Trainer with ULMA, demonstrations and judged responses in one set: python examples/trainer_ulma.py

The reference's log-probs are computed once, before training. The class means are those of the whole step, however the
responses are spread over micro-batches and ranks.
"""

import argparse
import tempfile

import torch
from tiny import load
from transformers import Trainer, TrainingArguments

import finealign_kernels as fk
from finealign_kernels import feedback
from finealign_kernels.integrations.transformers import StepCountsMixin, model_logprobs


def responses(tokenizer):
    """The shipped sample as tokens; a score of 1 is a demonstration."""
    for example in feedback.sample():
        for response in example.responses:
            encoded = feedback.encode(tokenizer, example.prompt + "\n", response)
            yield {"ids": encoded.input_ids, "start": encoded.response_start, "target": float(response.score == 1.0)}


def collate(rows):
    length = max(len(row["ids"]) for row in rows)
    batch = {
        "input_ids": torch.tensor([row["ids"] + [0] * (length - len(row["ids"])) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row["ids"]) + [0] * (length - len(row["ids"])) for row in rows]),
        "target": torch.tensor([row["target"] for row in rows]),
    }
    place, start = torch.arange(length), torch.tensor([row["start"] for row in rows])
    read = (place >= start[:, None]) & batch["attention_mask"].bool()
    batch["labels"] = batch["input_ids"].masked_fill(~read, -100)
    if "ref_logp" in rows[0]:
        batch["ref_logp"] = torch.stack(
            [torch.nn.functional.pad(r["ref_logp"], (0, length - len(r["ids"]))) for r in rows]
        )
    return batch


class UlmaTrainer(StepCountsMixin, Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        scores, mask = model_logprobs(model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
        classes = self.counts(inputs).denominator("classes")
        options = dict(average="kept", reduction="class_mean", denominator=classes)
        return fk.ulma(scores.logp, inputs["ref_logp"], inputs["target"], mask=mask, **options).loss


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a causal LM of transformers; without it a tiny one")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args(argv)
    model, tokenizer = load(options.model)
    rows = list(responses(tokenizer))
    with torch.no_grad():
        for row in rows:
            batch = collate([row])
            row["ref_logp"] = model_logprobs(model, batch["input_ids"], labels=batch["labels"]).scores.logp[0]
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=options.steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        learning_rate=1e-3,
        logging_steps=1,
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = UlmaTrainer(model, arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


if __name__ == "__main__":
    main()

"""Counts of a whole step: one update however its responses are spread over micro-batches and ranks."""

import os

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import ranks
import torch

import finealign_kernels as fk
from finealign_kernels.integrations.steps import StepCountsMixin, step_counts
from finealign_kernels.integrations.transformers import model_logprobs

BOUND = 1e-5  # relative, of an update


pytestmark = pytest.mark.usefixtures("one_thread")


def test_counts_of_a_worked_example():
    masks = [torch.tensor([[0, 1, 1], [0, 0, 0]]), torch.tensor([[True, True, True]])]
    counts = step_counts(masks, [torch.tensor([1.0, 0.3]), torch.tensor([True])])
    assert [x.item() for x in counts[:5]] == [5, 3, 2, 2, 1] and counts.world == 1
    assert counts.denominator("classes").tolist() == [2, 1] and counts.denominator("pairs") == 1.5
    assert counts._replace(world=2).denominator("tokens") == 2.5
    assert [x.item() for x in step_counts(masks[0])[:5]] == [2, 2, 1, 0, 0]
    assert step_counts([]).tokens == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.ones(3, dtype=torch.bool),), r"masks must have shape \(B, T\) each, got \(3,\)"),
        ((torch.ones(2, 3),), r"masks must have dtype bool or .* got torch.float32"),
        (([torch.ones(2, 3).bool()], []), r"targets must be as many as there are masks, 1, got 0"),
        (([torch.ones(2, 3).bool()], [torch.ones(3)]), r"targets must have shape \(2,\), as the mask beside it"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        step_counts(*arguments)


def test_an_unknown_count_is_refused():
    with pytest.raises(ValueError, match="of must be one of .*tokens.*, got 'token'"):
        step_counts(torch.ones(1, 2).bool()).denominator("token")


# ---- one step of eight responses -----------------------------------------------------------------------------------


def rows():
    """Eight responses of 1 to 9 tokens, three of them demonstrations."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 60, (8, 12), generator=generator)
    length = torch.tensor([9, 1, 4, 2, 7, 3, 5, 1])
    place = torch.arange(12)
    there = place < 3 + length[:, None]
    labels = ids.masked_fill(~there | (place < 3), -100)
    ref = torch.randn(8, 11, generator=generator) - 4
    target = torch.tensor([1.0, 0, 0, 1, 0, 0, 1, 0])
    columns = dict(input_ids=ids, attention_mask=there.long(), labels=labels, ref_logp=ref, target=target)
    return [{key: column[i] for key, column in columns.items()} for i in range(8)]


def collate(examples):
    return {key: torch.stack([row[key] for row in examples]) for key in examples[0]}


def tiny():
    import transformers

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=60)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, initializer_range=0.2))


LOSSES = {
    "ulma": lambda logp, mask, batch, count: (
        fk.ulma(
            logp,
            batch["ref_logp"],
            batch["target"],
            mask=mask,
            average="kept",
            reduction="class_mean",
            denominator=count("classes"),
        ).loss
    ),
    "nll": lambda logp, mask, batch, count: fk.nll_loss(logp, mask=mask, denominator=count("tokens")).loss,
    "pdpo": lambda logp, mask, batch, count: (
        fk.pdpo(logp, batch["ref_logp"], batch["target"], mask=mask, denominator=count("responses")).loss
    ),
}


def trained(loss, folder, *, batch, accumulated, wrong=None, ranks=1):
    """The model after one step of SGD over the eight rows, by transformers.Trainer."""
    import transformers

    class Counting(StepCountsMixin, transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            scores, mask = model_logprobs(model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
            counts = self.counts(inputs)
            if wrong == "own counts":
                counts = step_counts(mask, inputs["target"])
            return LOSSES[loss](scores.logp, mask, inputs, counts.denominator)

    if wrong == "own counts":
        Counting.loss_is_scaled_for_ga = False  # a mean of means
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulated,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Counting(tiny(), arguments, train_dataset=rows(), data_collator=collate)
    trainer.train()
    return trainer


def update(model):
    start = tiny()
    return torch.cat([(p - q).detach().flatten() for p, q in zip(model.parameters(), start.parameters(), strict=True)])


def apart(one, other):
    return ((one - other).norm() / other.norm()).item()


def by_hand(loss):
    """The same step without a Trainer: all rows at once."""
    model, batch = tiny(), collate(rows())
    scores, mask = model_logprobs(model, batch["input_ids"], batch["attention_mask"], batch["labels"])
    LOSSES[loss](scores.logp, mask, batch, step_counts(mask, batch["target"]).denominator).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= p.grad
    return update(model)


@pytest.mark.parametrize("loss", LOSSES)
def test_accumulation_leaves_the_update_as_it_is(loss, tmp_path):
    pytest.importorskip("transformers")
    expected = by_hand(loss)
    for batch, accumulated in ((8, 1), (4, 2), (2, 4)):
        trainer = trained(loss, tmp_path, batch=batch, accumulated=accumulated)
        assert apart(update(trainer.model), expected) <= BOUND, (batch, accumulated)
    if loss != "pdpo":  # a mean over as many responses in each micro-batch is the mean over all
        wrong = trained(loss, tmp_path, batch=2, accumulated=4, wrong="own counts")
        assert apart(update(wrong.model), expected) > 0.05


def test_evaluation_counts_its_own_batches(tmp_path):
    pytest.importorskip("transformers")
    trainer = trained("nll", tmp_path, batch=8, accumulated=1)
    batch = collate(rows()[:2])
    trainer.model.eval()
    assert trainer.counts(batch).tokens == 10
    trainer.model.train()
    assert trainer.counts(batch).tokens == 32
    with pytest.raises(ValueError, match="the batch must have labels or completion_mask, or counted be overridden"):
        trainer.counted({"input_ids": batch["input_ids"]})


# ---- ranks ---------------------------------------------------------------------------------------------------------


def rank_step(group, folder):
    """One rank's share: the Trainer under DDP, then a loop by hand with unequal micro-batches, then without / world."""
    rank, found = group.rank(), {}
    for loss in ("ulma", "nll"):
        trainer = trained(loss, folder, batch=2, accumulated=2)
        found["trainer", loss] = update(trainer.accelerator.unwrap_model(trainer.model))
    for loss in LOSSES:
        for divided in (True, False):
            model = tiny()
            parallel = torch.nn.parallel.DistributedDataParallel(model)
            mine = rows()[:3] if rank == 0 else rows()[3:]
            step = [collate(part) for part in ([mine[:1], mine[1:]] if rank == 0 else [mine[:4], mine[4:]])]
            counts = step_counts((b["labels"][:, 1:] != -100 for b in step), [b["target"] for b in step])
            counts = counts if divided else counts._replace(world=1)
            for i, batch in enumerate(step):
                with parallel.no_sync() if i + 1 < len(step) else torch.enable_grad():
                    out = parallel(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
                    labels = batch["labels"][:, 1:]
                    mask = labels != -100
                    logp = fk.token_logprobs(out, labels, mask=mask).logp
                    LOSSES[loss](logp, mask, batch, counts.denominator).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= p.grad
            found["loop", loss, divided] = update(model)
    return found


def test_ranks_leave_the_update_as_it_is(tmp_path):
    pytest.importorskip("transformers")
    found, _ = ranks.fresh(2, rank_step, str(tmp_path))
    expected = {loss: by_hand(loss) for loss in LOSSES}
    for loss in ("ulma", "nll"):
        assert apart(found["trainer", loss], expected[loss]) <= BOUND
    for loss in LOSSES:
        assert apart(found["loop", loss, True], expected[loss]) <= BOUND
        assert apart(2 * found["loop", loss, False], expected[loss]) <= BOUND  # without / world it is half

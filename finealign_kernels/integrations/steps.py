"""What a whole optimizer step counts, over its micro-batches and ranks: the denominators of losses.

A mean over the items of a step is not the mean of its micro-batches' means where these hold different numbers of
tokens or of a class. So each micro-batch gives Σ loss / D with one D for the whole step. Where gradients of W ranks
are averaged (DDP, FSDP and DeepSpeed do that) the step's gradient is

    (1/W) Σ_ranks Σ_micro-batches Σ_items ∂loss / D       and has to be       Σ_all items ∂loss / count

so D = count / W: what `StepCounts.denominator` returns. Where a reducer sums over ranks, D is the count itself.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops._check import check_one_of, check_tensor, fail

INTEGERS = (torch.bool, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


class StepCounts(NamedTuple):
    """Counts of a whole step, over micro-batches and ranks; () float64 tensors."""

    tokens: Tensor  # tokens that the mask keeps
    responses: Tensor  # rows, with tokens or without: what reduction="mean" divides by
    filled: Tensor  # rows that have a token: the same with drop_empty=True
    positives: Tensor  # rows with target 1; 0 where no targets were given
    others: Tensor  # the other rows
    world: int  # ranks

    def denominator(self, of: str) -> Tensor:
        """The count divided by the number of ranks, for a loss whose gradients the ranks average.

        of  "tokens", "responses", "filled", "pairs" (half of responses), or "classes": (2,), positives and others, as
            reduction="class_mean" takes it. A count of 0 gives a loss of 0
        """
        check_one_of("of", of, ("tokens", "responses", "filled", "pairs", "classes"))
        if of == "classes":
            count = torch.stack([self.positives, self.others])
        else:
            count = self.responses / 2 if of == "pairs" else getattr(self, of)
        return (count / self.world).float()


def step_counts(
    masks: Tensor | Iterable[Tensor],
    targets: Tensor | Iterable[Tensor] | None = None,
    *,
    group=None,
    ranks: bool = True,
) -> StepCounts:
    """Counts of all micro-batches of one optimizer step, on all ranks: one collective of five numbers.

    masks    (B, T) bool or integers, which tokens the loss reads, of each micro-batch of this rank; or one tensor
    targets  (B,) of each micro-batch, exactly 1 for a positive response; None where no loss has classes
    group    process group; None: all ranks
    ranks    False: this rank's micro-batches alone

    Every rank of the group has to call it, also one without a micro-batch left. The losses take
    counts.denominator("tokens") and so on as their `denominator`:

        counts = step_counts(batch["mask"] for batch in step)
        for batch in step:
            loss = fk.nll_loss(logp, mask=batch["mask"], denominator=counts.denominator("tokens")).loss
            loss.backward()                                # not divided by the number of micro-batches
        optimizer.step()

    Raises  ValueError, TypeError naming argument, expectation and finding.
    """
    masks = [masks] if isinstance(masks, Tensor) else list(masks)
    targets = [targets] if isinstance(targets, Tensor) else None if targets is None else list(targets)
    if targets is not None and len(targets) != len(masks):
        fail("targets", f"be as many as there are masks, {len(masks)}", len(targets))
    device = masks[0].device if masks else None
    found = torch.zeros(5, dtype=torch.float64, device=device)
    for i, mask in enumerate(masks):
        check_tensor("masks", mask, dtypes=INTEGERS)
        if mask.dim() != 2:
            fail("masks", "have shape (B, T) each", tuple(mask.shape))
        kept = mask != 0
        sums = [kept.sum(), torch.tensor(len(mask), device=device), kept.any(1).sum()]
        if targets is None:
            sums += [torch.zeros_like(sums[0])] * 2
        else:
            target = targets[i]
            if target.shape != (len(mask),):
                fail("targets", f"have shape ({len(mask)},), as the mask beside it", tuple(target.shape))
            positive = (target == 1).sum().to(kept.device)
            sums += [positive, len(mask) - positive]
        found += torch.stack(sums)
    world = 1
    if ranks and dist.is_available() and dist.is_initialized():
        world = dist.get_world_size(group)
        if found.device.type == "cpu" and "nccl" in dist.get_backend(group):
            found = found.cuda()
        dist.all_reduce(found, group=group)
    return StepCounts(*found.unbind(), world)


class StepCountsMixin:
    """In front of transformers.Trainer: `self.counts(inputs)` in compute_loss makes 1 × 8, 2 × 4 and 4 × 2 one step.

        class UlmaTrainer(StepCountsMixin, Trainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                scores, mask = model_logprobs(model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
                counts = self.counts(inputs)
                out = fk.ulma(scores.logp, inputs["ref_logp"], inputs["target"], mask=mask, average="kept",
                              reduction="class_mean", denominator=counts.denominator("classes"))
                return out.loss

    The counts are those of the whole step: of all batches that are accumulated and of all ranks. The Trainer then must
    not divide by the number of batches: `loss_is_scaled_for_ga = True` tells it so. In evaluation they are the
    batch's own, on its rank.

    It reads a batch's `labels` (-100 where there is none) or `completion_mask`, shifted by one token, and its `target`
    or `label`; override `counted` for other batches.
    """

    # Trainer is not to divide the loss by the number of batches
    loss_is_scaled_for_ga = True
    _step_counts: StepCounts | None = None

    def counted(self, batch: Mapping) -> tuple[Tensor, Tensor | None]:
        """The mask (B, T - 1) of the tokens that the loss reads, and the targets (B,) or None, of a batch."""
        target = batch.get("target", batch.get("label"))
        if "labels" in batch:
            return batch["labels"][:, 1:] != -100, target
        if "completion_mask" in batch:
            return batch["completion_mask"][:, 1:] != 0, target
        fail("the batch", "have labels or completion_mask, or counted be overridden", ", ".join(sorted(batch)))

    def counts(self, inputs: Mapping) -> StepCounts:
        """Counts of the whole step in training, of the batch alone elsewhere."""
        if self.model.training and self._step_counts is not None:
            return self._step_counts
        return _counts_of([self.counted(inputs)], ranks=False)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = _counts_of([self.counted(batch) for batch in samples])
        self._step_counts = StepCounts(*(x.to(device) for x in counts[:5]), counts.world)
        return samples, items


def _counts_of(batches: list[tuple[Tensor, Tensor | None]], **options) -> StepCounts:
    targets = [target for _, target in batches]
    return step_counts(
        [mask for mask, _ in batches], None if not targets or any(x is None for x in targets) else targets, **options
    )

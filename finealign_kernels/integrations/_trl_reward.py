"""FineGrainedRewardTrainer: TRL's RewardTrainer with every row of REWARD, contrast and MetaRM."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from trl import RewardTrainer

from ..losses.contrastive import CONTRAST, contrastive_loss, set_dropout
from ..losses.pairs import pick_scores
from ..losses.reward import REWARD, RewardRow, reward_loss
from ..metarm import MetaRM, difference_loss
from ..ops._check import check_integer, check_number, check_one_of, fail
from ._trl_data import check_finite, check_keys, check_options

PER_PAIR = ("strength", "margin", "smoothing", "flip", "label", "weight")  # arguments of reward_loss


class FineGrainedRewardTrainer(RewardTrainer):
    """TRL's RewardTrainer for every row of REWARD, with numbers of each pair, contrast and MetaRM.

        trainer = FineGrainedRewardTrainer(model, RewardConfig(...), train_dataset=pairs, loss="flip_margin")

    loss           a name of REWARD, or a RewardRow
    loss_options   further arguments of reward_loss, the same for all pairs: scale, clamp, smoothing
    columns        argument of reward_loss -> column of the data set with a number a pair. Default: {"strength":
                   "strength"} and {"label": "soft_label"} where the loss reads them (the columns that `finealign
                   strength` writes), and the column "margin" as TRL takes it, where there is one
    contrast       None, or a name of CONTRAST: two passes under dropout masks, the reward loss is the mean of both, and
                   contrast_weight times contrastive_loss of the last tokens' hidden states is added while training
    contrast_options   arguments of contrastive_loss: rows, temperature, epsilon, iterations
    prototypes     how many, of "swav"; they are trained with the model
    dropout        the probability that contrast sets for the whole training, in place of the config's
    meta_eta       η of MetaRM: an inner step before each backward pass, on the next of meta_batches
    meta_batches   iterable of dictionaries: input_ids and attention_mask (m k, T), the k responses to a prompt one
                   after the other, and "k". It is begun anew when it ends

    The loss of a batch is the mean over its pairs, as TRL's, and so are the metrics; "contrast" and "difference" are
    logged besides. args.center_rewards_coefficient is reward_loss's centering.
    Raises  RuntimeError for a TRL that is not known here; ValueError for what does not fit together, and for a column
            that the data set lacks.
    """

    def __init__(
        self,
        *args: Any,
        loss: str | RewardRow = "bradley_terry",
        loss_options: Mapping[str, float] | None = None,
        columns: Mapping[str, str] | None = None,
        contrast: str | None = None,
        contrast_weight: float = 1.0,
        contrast_options: Mapping[str, Any] | None = None,
        prototypes: int = 50,
        dropout: float = 0.05,
        meta_eta: float | None = None,
        meta_batches: Iterable[Mapping[str, Any]] | None = None,
        **options: Any,
    ):
        if not isinstance(loss, RewardRow):
            check_one_of("loss", loss, tuple(REWARD))
        check_one_of("contrast", contrast, (None, *CONTRAST))
        check_number("contrast_weight", contrast_weight, positive=True)
        prototypes = check_integer("prototypes", prototypes, "be a whole number of at least 1", least=1)
        dropout = check_number("dropout", dropout, least=0, most=1)
        meta_eta = meta_eta if meta_eta is None else check_number("meta_eta", meta_eta, positive=True)
        if (meta_eta is None) != (meta_batches is None):
            fail("meta_eta and meta_batches", "be given together", "one of them")
        row = loss if isinstance(loss, RewardRow) else REWARD[loss]
        check_options("loss_options", loss_options or {}, reward_loss, row.hyper)
        check_keys("columns", columns or {}, PER_PAIR, "reward_loss")
        check_options("contrast_options", contrast_options or {}, contrastive_loss, without=("prototypes",))
        self.loss, self.loss_options = loss, dict(loss_options or {})
        self.columns = _columns_of(row) if columns is None else dict(columns)
        self.takes_margin = columns is None and row.margin != "strength"
        self.contrast, self.contrast_weight = contrast, contrast_weight
        self.contrast_options = dict(contrast_options or {})
        super().__init__(*args, **options)
        for data in (self.train_dataset, self.eval_dataset):
            _check_columns(data, self.columns.values())
        self.data_collator = _Columns(self.data_collator, tuple(self.columns.values()))
        if contrast is not None:
            set_dropout(self.model, dropout)
        if contrast == "swav":
            where = next(self.model.parameters())
            start = torch.randn(prototypes, self.model.config.hidden_size, dtype=torch.float32, device=where.device)
            self.model.contrast_prototypes = nn.Parameter(start)
        self.meta_eta, self.meta = meta_eta, None  # made at the first step: sharding replaces parameters before it
        self.meta_batches, self._meta_iterator = meta_batches, iter(())

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in self.columns.values() if name not in self._signature_columns]

    def training_step(self, model, inputs, *args, **options):
        if self.meta_eta is None:
            return super().training_step(model, inputs, *args, **options)
        batch = self._prepare_inputs(dict(self._next_meta_batch()))
        k = batch.pop("k")
        model.train()
        inner = model.module if self.is_deepspeed_enabled else model  # its engine reduces any gradient of its output
        with self.compute_loss_context_manager():
            objective = difference_loss(inner(**batch, use_cache=False).logits.float().view(-1, k))
        self._metrics["train"]["difference"].append(objective.item())
        if self.meta is None:
            group = torch.distributed.group.WORLD if self.is_deepspeed_enabled else None
            self.meta = MetaRM(model.parameters(), eta=self.meta_eta, group=group)
        with self.meta.ascend(objective):
            return super().training_step(model, inputs, *args, **options)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        inputs = dict(inputs)
        mask = inputs["attention_mask"]
        constants = {argument: inputs.pop(column) for argument, column in self.columns.items()}
        margin = inputs.pop("margin", None)
        if margin is not None and self.takes_margin and "margin" not in constants:
            constants["margin"] = margin
        inputs["use_cache"] = False
        twice = self.contrast is not None and mode == "train"
        if twice:
            inputs["output_hidden_states"] = True
        views = [model(**inputs) for _ in range(2 if twice else 1)]
        outputs, found = views[0], []
        options = {"centering": self.args.center_rewards_coefficient or 0.0, **self.loss_options}
        for view in views:
            scores = view.logits.squeeze(-1)
            fitting = {name: _like(x, scores) for name, x in constants.items()}
            found.append(reward_loss(self.loss, scores, **fitting, **options))
        loss = sum(out.loss for out in found) / len(found)
        if twice:
            last = [pick_scores(view.hidden_states[-1], mask=mask.bool()) for view in views]
            extra = dict(self.contrast_options)
            if self.contrast == "swav":
                wide = torch.promote_types(last[0].dtype, torch.float32)
                extra["prototypes"] = self.model.contrast_prototypes.to(wide)
            contrast = contrastive_loss(self.contrast, *last, **extra).loss
            loss = loss + self.contrast_weight * contrast
            self._metrics[mode]["contrast"].append(contrast.item())
        self._log_scores(mode, outputs.logits.detach(), found[0], mask)
        return (loss, outputs) if return_outputs else loss

    def _log_scores(self, mode: str, scores: Tensor, found, mask: Tensor) -> None:
        """TRL's metrics."""
        gather, metrics = self.accelerator.gather_for_metrics, self._metrics[mode]
        if mode == "train":
            self._total_train_tokens += gather(mask.sum()).sum().item() // self._tp_size
        metrics["num_tokens"] = [self._total_train_tokens]
        every = self.accelerator.gather(scores)
        for name, value in (("min", every.min()), ("mean", every.mean()), ("max", every.max())):
            metrics[f"{name}_reward"].append(value.item())
        metrics["accuracy"].append(gather(found.accuracies.mean()).mean().item())
        metrics["margin"].append(gather(found.margins.mean()).mean().item())

    def _next_meta_batch(self) -> Mapping[str, Any]:
        batch = next(self._meta_iterator, None)
        if batch is None:
            self._meta_iterator = iter(self.meta_batches)
            batch = next(self._meta_iterator, None)
        if batch is None:
            fail("meta_batches", "hold a batch, each time it is begun", "none")
        return batch


class _Columns:
    """A collator that adds numbers of each pair to what TRL's makes."""

    def __init__(self, collator, columns: tuple[str, ...]):
        self.collator, self.columns = collator, columns

    def __call__(self, examples):
        batch = self.collator(examples)
        for name in self.columns:
            values = [example[name] for example in examples]
            for value in values:
                check_finite(f"the column {name!r}", value)
            kind = torch.bool if all(isinstance(value, bool) for value in values) else torch.float32
            batch[name] = torch.tensor(values, dtype=kind)
        return batch


def _columns_of(row: RewardRow) -> dict[str, str]:
    needed = {"strength": "strength"} if row.reads(None, None) else {}
    return needed | ({"label": "soft_label"} if row.smoothing == "label" else {})


def _check_columns(data, wanted) -> None:
    """A streamed data set without known columns is not looked at."""
    sets = list(data.values()) if isinstance(data, dict) else [data]
    for one in sets:
        names = getattr(one, "column_names", None)
        missing = [name for name in wanted if names is not None and name not in names]
        if missing:
            fail("the data set", f"have the column {missing[0]!r}, which the loss reads", ", ".join(names))


def _like(x: Tensor, scores: Tensor) -> Tensor:
    return x if x.dtype == torch.bool else x.to(scores.dtype if scores.dtype == torch.float64 else torch.float32)

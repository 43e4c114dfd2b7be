"""PointwiseTrainer: losses of single responses with a label, on TRL's KTOTrainer."""

import copy
from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor
from trl import KTOConfig, KTOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from ..losses.pointwise import pointwise_loss
from ..losses.table import PREFERENCE, Row, describe
from ..ops._check import check_one_of, fail
from ._trl_common import FineGrained, Pivots, token_sums
from ._trl_data import Columns
from .steps import StepCountsMixin


class PointwiseTrainer(FineGrained, StepCountsMixin, KTOTrainer):
    """TRL's KTOTrainer for any loss of single responses: KTO, point-wise DPO, ULMA, unlikelihood; weights, pivots.

        trainer = PointwiseTrainer(model, args=KTOConfig(...), train_dataset=dataset, processing_class=tokenizer,
                                   loss="ulma", average="kept", reduction="class_mean")

    Columns of the dataset: prompt, completion (text or messages), and label: True or 1 for a response to be reinforced,
    which for "ulma" is a demonstration to imitate; False or 0 for the others; a number in [0, 1] for "pdpo_soft", any
    number for "pdpo_squared", "pdpo_hybrid" and "ulma_squared". Optional:

        completion_spans                marked parts, as FineGrainedDPOTrainer has them: in a response of label 0.5 or
                                        more a fault weighs less and praise more, in the others the other way round
        completion_token_weight, completion_token_score, ref_completion_token_logps     one number a token

    loss          name of a row of PREFERENCE with pair=False, or a Row; None: args.loss_type
    reduction     "mean" over responses, or "class_mean", the mean over positives plus the mean over the others: of the
                  whole step, over accumulated batches and ranks, whatever their sizes
    average, loss_options, span_weight, by_kind, pivots, pivot_start   as FineGrainedDPOTrainer has them

    Of args it reads beta, desirable_weight, undesirable_weight and loss_type. "kto" estimates z0 on each batch, as TRL
    does, from prompts and responses that do not belong together: args.train_sampling_strategy must be "sequential",
    and the reference a model or the adapter switched off. It logs what TRL logs, and tokens/kept.

    Raises  RuntimeError for a TRL that is not known here; ValueError naming what does not go together.
    """

    columns = Columns(("completion",))
    function = staticmethod(pointwise_loss)
    gives = (*FineGrained.gives, "target", "reduction", "denominator", "positive_weight", "other_weight")

    def __init__(
        self,
        model,
        ref_model=None,
        args: KTOConfig | None = None,
        *more,
        loss: str | Row | None = None,
        reduction: str = "mean",
        average: bool | str | None = None,
        loss_options: Mapping | None = None,
        span_weight: float = 2.0,
        by_kind: Mapping[str, float] | None = None,
        pivots: Pivots | None = None,
        pivot_start: float | None = None,
        **rest,
    ):
        args = KTOConfig() if args is None else copy.copy(args)
        dataset = rest.get("train_dataset", more[1] if len(more) > 1 else None)
        loss, self._loss_options = _loss_of(args, loss, average, loss_options)
        check_one_of("reduction", reduction, ("mean", "class_mean"))
        self._reduction = reduction
        self._take_options(loss, span_weight, by_kind, pivots, pivot_start)
        if loss == "kto" and (args.precompute_ref_log_probs or self._given_reference(dataset)):
            fail("the reference", "be a model or an adapter for 'kto', whose z0 needs other completions", "columns")
        self._take_reference(args, ref_model, dataset)
        super().__init__(model, ref_model, args, *more, **rest)
        self._settle(DataCollatorForUnpairedPreference)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        options = dict(self._loss_options)
        z0 = self._z0(model, inputs) if self.calculate_KL else None
        if z0 is not None:
            options["shift"] = options.get("beta", self._row.beta) * z0
        outputs, logp, ref_logp, mask = self._scored(model, inputs)
        target = inputs["label"].to(logp.dtype)
        weight = self._token_weights(inputs, logp, ref_logp, mask, 2 * target - 1)
        if weight is not None:
            options["token_weight"] = weight
        counts = self.counts(inputs)
        out = pointwise_loss(
            self._loss,
            logp,
            ref_logp,
            target=target,
            mask=mask,
            reduction=self._reduction,
            denominator=counts.denominator("classes" if self._reduction == "class_mean" else "responses"),
            positive_weight=self.desirable_weight,
            other_weight=self.undesirable_weight,
            **options,
        )
        loss = out.loss
        if self.aux_loss_enabled:
            batches = self.current_gradient_accumulation_steps if self.model.training else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / batches
        self._record(self._figures(inputs, outputs, out, mask, weight, target, z0))
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**self._for_the_model(inputs))

    @torch.no_grad()
    def _z0(self, model, inputs: Mapping) -> Tensor:
        """KTO's z0: the mean of h over prompts and responses that do not belong together, at least 0."""
        kwargs = {name: inputs[f"KL_{name}"] for name in ("input_ids", "attention_mask")} | {"use_cache": False}
        mask = inputs["KL_completion_mask"]
        labels = kwargs["input_ids"].masked_fill(mask == 0, -100)
        logp = model(**kwargs, labels=labels, fused_lm_head=True).log_probs
        ratio = (logp - self._reference_logps(self.ref_model, kwargs, labels))[:, -mask.shape[1] + 1 :]
        h = ratio.sum(1)
        if self._loss_options["average"]:
            h = h / mask[:, 1:].sum(1).clamp(min=1)
        return self.accelerator.reduce(h.mean(), "mean").clamp(min=0)

    @torch.no_grad()
    def _figures(self, inputs: Mapping, outputs, out, mask, weight, target: Tensor, z0) -> dict:
        """Sums and counts of what is logged."""
        logp, logits = (getattr(outputs, name)[:, -mask.shape[1] :] for name in ("log_probs", "mean_logits"))
        sums, one = token_sums(outputs, mask, weight, inputs), torch.ones((), device=mask.device)
        for name, inside in (("chosen", target >= 0.5), ("rejected", target < 0.5)):
            read = mask & inside[:, None]
            sums |= {
                f"logits/{name}": (torch.where(read, logits, 0).sum(), read.sum()),
                f"logps/{name}": (torch.where(read, logp, 0).sum(), inside.sum()),
                f"rewards/{name}": (torch.where(inside, out.rewards, 0).sum(), inside.sum()),
            }
        if z0 is not None:
            sums["kl"] = (z0, one)
        return sums | ({"aux_loss": (outputs.aux_loss, one)} if self.aux_loss_enabled else {})


def _loss_of(args: KTOConfig, loss, average, options: Mapping | None) -> tuple[str | Row, dict]:
    """The row, and the arguments of pointwise_loss, of the trainer's arguments and TRL's."""
    default = {field.name: field.default for field in fields(KTOConfig)}
    options = {"average": average, **(options or {})}
    if loss is None:
        loss = args.loss_type
        options.setdefault("beta", args.beta)
    elif args.loss_type not in (default["loss_type"], loss):
        fail("args.loss_type", "be left at its default where a loss is given", repr(args.loss_type))
    elif args.beta != default["beta"]:
        options.setdefault("beta", args.beta)
    names = tuple(name for name, row in PREFERENCE.items() if not row.pair)
    if not isinstance(loss, Row) and loss not in names:
        fail("loss", f"be a Row or one of {names}", repr(loss))
    if isinstance(loss, Row) and loss.pair:
        fail("loss", "have pair=False", describe(loss))
    args.loss_type = "kto" if loss == "kto" else "apo_zero_unpaired"  # TRL makes batches for z0 with "kto" alone
    return loss, options

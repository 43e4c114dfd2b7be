"""FineGrainedDPOTrainer: TRL's DPOTrainer with weights on tokens, and every preference loss of this library."""

import copy
import warnings
from collections import defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import fields

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset as MapDataset
from datasets import IterableDataset, concatenate_datasets
from torch import Tensor
from torch.utils.data import DataLoader
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from ..losses.pivots import adaptive_mask, implicit_scores, pivot_flags
from ..losses.preference import preference_loss
from ..losses.table import PREFERENCE, Row, told
from ..losses.weights import ld_weights, wpo_weights
from ..ops._check import check_number, fail
from . import _trl_data as data

LOSS_TYPES = {  # of DPOConfig -> row, average
    "sigmoid": ("dpo", None),
    "sigmoid_norm": ("dpo", "all"),
    "hinge": ("slic", None),
    "ipo": ("ipo", "all"),
    **{name: (name, None) for name in ("robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero")},
    **{name: (name, None) for name in ("apo_down", "discopop", "aot", "aot_unpaired")},
}
DIVERGENCES = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "js_divergence": "js",
    "alpha_divergence": "alpha",
}
FLAGS = ("kind", "threshold", "unit", "percent")  # of pivots: where segments start
OURS = ("token_weight", "token_score", "ref_logp", "pair_weight")  # of a batch: not for the model
NOT_FOR_THE_MODEL = ("completion_mask", *OURS)


class FineGrainedDPOTrainer(DPOTrainer):
    """TRL's DPOTrainer for feedback on tokens: any preference loss of `PREFERENCE`, every average, weights, pivots.

        trainer = FineGrainedDPOTrainer(model, args=DPOConfig(...), train_dataset=dataset, processing_class=tokenizer)
        trainer.train()

    Columns of the dataset, beside TRL's prompt, chosen and rejected (text or messages), all optional:

        chosen_spans, rejected_spans    marked parts: mappings with start and end in characters of the completion's
                                        text (of its last message), and kind, score, text as feedback.to_spans has
                                        them. They become weights by feedback.pair_weights
        chosen_token_weight, rejected_token_weight   or one weight a completion token, as TRL makes the tokens: with
                                        the template's or the end-of-sequence token
        chosen_token_score, rejected_token_score     scores for pivots, one a token
        ref_chosen_token_logps, ref_rejected_token_logps   log-probs of the reference, one a token: no reference model
        pair_weight                     a number that multiplies the pair's loss

    A dataset that has prompt_ids, chosen_ids and rejected_ids is taken as tokens. Template, truncation, padding, the
    model and its reference (a model, the adapter switched off, precompute_ref_log_probs) are TRL's. With no column and
    no argument of these, the training is TRL's, too.

    loss          name in PREFERENCE or a Row; None: the one of args.loss_type, with its average
    average       False, "kept", "all" or "segments", as in preference_loss; None: as the loss has it
    loss_options  other arguments of preference_loss (nll_weight, shift, smoothing, ...). beta there, else args.beta if
                  it is not TRL's default of 0.1, else the row's own
    span_weight, by_kind   how much a span weighs: feedback.pair_weights
    pivots        arguments of adaptive_mask (and of pivot_flags, with a kind) by name: the tokens whose score agrees
                  with their side keep their weight, the others get 0. Or a function (logp, ref_logp, mask) -> weights.
                  Without columns of scores a token's is logp - ref_logp, which is 0 until the policy has moved
    pivot_start   share of the training before such pivots are used, 0.5 where the scores are the policy's own

    Of args it reads loss_type, beta, label_smoothing, discopop_tau, f_divergence_type, ld_alpha and use_weighting as
    TRL does. It logs what TRL logs (rewards with the weights in them) and tokens/kept, the share of completion
    tokens whose weight is not 0.

    Raises  RuntimeError for a TRL that is not known here; ValueError naming what does not go together.
    """

    def __init__(
        self,
        model,
        ref_model=None,
        args: DPOConfig | None = None,
        *more,
        loss: str | Row | None = None,
        average: bool | str | None = None,
        loss_options: Mapping | None = None,
        span_weight: float = 2.0,
        by_kind: Mapping[str, float] | None = None,
        pivots: data.Pivots | None = None,
        pivot_start: float | None = None,
        **rest,
    ):
        args = DPOConfig() if args is None else copy.copy(args)
        self._loss, self._loss_options = _loss_of(args, loss, average, loss_options)
        self._row = PREFERENCE[self._loss] if isinstance(self._loss, str) else self._loss
        self._span_options = {"span_weight": span_weight, "by_kind": dict(by_kind or {})}
        if pivots is not None and not callable(pivots) and not isinstance(pivots, Mapping):
            fail("pivots", "be a mapping of arguments, a function or None", type(pivots).__name__, TypeError)
        if pivots is not None and not self._row.reference and not callable(pivots):
            fail("pivots", f"be a function for {told(self._loss)}, which has no reference", "a mapping")
        if pivot_start is not None:
            check_number("pivot_start", pivot_start, least=0, most=1)
        self._pivots, self._pivot_start = pivots, pivot_start
        self._sums = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._seen, self._told_nothing_kept = 0, False
        given = self._given_reference(rest.get("train_dataset", more[1] if len(more) > 1 else None))
        if given and ref_model is not None:
            fail("ref_model", f"be None where the dataset has {' and '.join(data.REFERENCE)}", "a model")
        if given or not self._row.reference:
            args.precompute_ref_log_probs = True  # TRL then loads no reference model
        super().__init__(model, ref_model, args, *more, **rest)
        if not self._row.reference:
            self.precompute_ref_logps = False
        if isinstance(self.data_collator, data.DataCollatorForPreference):
            self.data_collator = data.Collator(self.data_collator)
        if self._is_vision_dataset and (pivots is not None or self._row is not PREFERENCE["dpo"]):
            fail("the train dataset", "be of text, for losses other than 'dpo' and for pivots", "images")

    @staticmethod
    def _given_reference(dataset) -> bool:
        """Does the dataset bring the reference's log-probs."""
        return dataset is not None and data.REFERENCE[0] in next(iter(dataset))

    # ---- data --------------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if "prompt_ids" not in next(iter(dataset)):
            if any(x in next(iter(dataset)) for x in data.SPANS) and "prompt" not in next(iter(dataset)):
                fail(f"the {dataset_name} dataset", "have a column prompt, beside spans", "none")
            dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        options = {} if isinstance(dataset, IterableDataset) else {"num_proc": args.dataset_num_proc}
        return data.add_token_weights(dataset, processing_class, self._span_options, dataset_name, **options)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        ours = (*data.PER_TOKEN, *data.PER_PAIR)
        self._signature_columns += [column for column in ours if column not in self._signature_columns]

    def _precompute_ref_logps(self, dataset, name: str, batch_size: int):
        """The dataset with ref_chosen_token_logps and ref_rejected_token_logps, one number a completion token."""
        if not self._row.reference or self._given_reference(dataset):
            return dataset
        if isinstance(dataset, IterableDataset):
            fail("precompute_ref_log_probs", "be False with an IterableDataset", True)
        if self.ref_model is None and self.is_deepspeed_enabled:
            fail("ref_model", "be given with precompute_ref_log_probs under DeepSpeed", None)
        collate = self.data_collator.pairs if isinstance(self.data_collator, data.Collator) else self.data_collator
        loader = self.accelerator.prepare(DataLoader(dataset, batch_size=batch_size, collate_fn=collate))
        found = []
        for batch in loader:
            inputs = {k: v for k, v in batch.items() if k not in NOT_FOR_THE_MODEL}
            mask = batch["completion_mask"]
            labels = batch["input_ids"].masked_fill(mask == 0, -100)
            logp = self._reference_logps(self.ref_model or self.model, {**inputs, "use_cache": False}, labels)
            logp = torch.nn.functional.pad(logp[:, -mask.shape[1] + 1 :], (1, 0))  # position t scores token t
            for side in zip(logp.float().chunk(2), mask.chunk(2), strict=True):
                found.append(self.accelerator.gather_for_metrics(self.accelerator.pad_across_processes(side, dim=1)))
        columns = {}
        for i, (side, column) in enumerate(zip(data.SIDES, data.REFERENCE, strict=True)):
            many, start = [len(ids) for ids in dataset[f"{side}_ids"]], 0
            columns[column] = []
            for logp, mask in found[i::2]:
                stop = start + len(logp)
                columns[column] += data.per_token(logp, mask, many[start:stop], self.args.truncation_mode)
                start = stop
        return concatenate_datasets([dataset, MapDataset.from_dict(columns)], axis=1)

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        completion = inputs["completion_mask"]
        mask = completion[:, 1:].bool()
        many = mask.shape[1]
        kwargs = {k: v for k, v in inputs.items() if k not in NOT_FOR_THE_MODEL} | {"use_cache": False}
        labels = inputs["input_ids"].masked_fill(completion == 0, -100)
        aux = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = model(**kwargs, **aux, labels=labels, fused_lm_head=True)
        logp = outputs.log_probs[:, -many:]
        ref_logp = None
        if self._row.reference:
            if "ref_logp" in inputs:
                ref_logp = inputs["ref_logp"][:, 1:].to(logp.dtype)
            elif self.precompute_ref_logps:
                fail("the dataset", f"have {' and '.join(data.REFERENCE)}, or a reference model be kept", "neither")
            else:
                ref_logp = self._reference_logps(self.ref_model, kwargs, labels)[:, -many:]
        options = {}
        weight = self._token_weights(inputs, logp.detach(), ref_logp, mask)
        if weight is not None:
            options["token_weight"] = weight
        pair_weight = inputs.get("pair_weight")
        if self.use_weighting:
            wpo = wpo_weights(logp, outputs.log_sum_sq_probs[:, -many:], mask=mask)
            pair_weight = wpo if pair_weight is None else wpo * pair_weight
        if pair_weight is not None:
            options["pair_weight"] = pair_weight.to(logp.dtype)
        out = preference_loss(self._loss, logp, ref_logp, mask=mask, **options, **self._loss_options)
        loss = out.loss
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        self._record(inputs, outputs, out, mask, weight)
        return (loss, self._plain_outputs(model, kwargs)) if return_outputs else loss

    def _plain_outputs(self, model, kwargs):
        with torch.no_grad():
            return model(**kwargs)

    def _reference_logps(self, model, kwargs: Mapping, labels: Tensor) -> Tensor:
        """(2B, T-1): log-probs of the labels by the reference, a model or this one without its adapter."""
        adapter = nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            model, unwrapped = self.model, self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None)
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), checkpointing, adapter, self.accelerator.autocast():
            return model(**kwargs, labels=labels, fused_lm_head=True).log_probs

    def _token_weights(self, inputs: Mapping, logp: Tensor, ref_logp, mask: Tensor) -> Tensor | None:
        """(2B, T-1), or None where every token weighs 1: weights of the data, LD-DPO's, and the mask of pivots."""
        factors = []
        if "token_weight" in inputs:
            factors.append(inputs["token_weight"][:, 1:])
        if self.ld_alpha is not None:
            factors.append(ld_weights(logp, mask=mask, alpha=self.ld_alpha))
        if self._pivots is not None and self._pivots_count(inputs):
            factors.append(self._pivot_weights(inputs, logp, ref_logp, mask))
        weight = None
        for factor in factors:
            weight = factor if weight is None else weight * factor
        return None if weight is None else weight.to(logp.dtype)

    def _pivots_count(self, inputs: Mapping) -> bool:
        """Is the training as far as pivots are used from."""
        own = "token_score" not in inputs and not callable(self._pivots)
        start = self._pivot_start if self._pivot_start is not None else 0.5 if own else 0.0
        return self.state.global_step >= start * self.state.max_steps

    def _pivot_weights(self, inputs: Mapping, logp: Tensor, ref_logp, mask: Tensor) -> Tensor:
        if callable(self._pivots):
            return self._pivots(logp, ref_logp, mask)
        given = inputs.get("token_score")
        score = implicit_scores(logp, ref_logp, mask=mask) if given is None else given[:, 1:]
        options = dict(self._pivots)
        flags = {key: options.pop(key) for key in FLAGS if key in options}
        if flags:
            shared = {k: options[k] for k in ("baseline", "quantile") if k in options and flags["kind"] != "threshold"}
            options["pivots"] = pivot_flags(score, mask=mask, **flags, **shared)
        return adaptive_mask(score, mask=mask, side="halves", **options).token_weight

    # ---- what is logged ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _record(self, inputs: Mapping, outputs, out, mask: Tensor, weight: Tensor | None) -> None:
        """Sums and counts over the ranks in one collective; they are divided, and read on the host, when logged."""
        many = mask.shape[1]
        logp, entropy, logits, top1 = (
            getattr(outputs, name)[:, -many:] for name in ("log_probs", "entropy", "mean_logits", "is_top1")
        )
        tokens, pairs = mask.sum(), torch.tensor(len(mask) // 2, device=mask.device)
        chosen, rejected = mask.chunk(2)
        kept = tokens if weight is None else (mask & (weight != 0)).sum()
        sums = {
            "entropy": ((entropy * mask).sum(), tokens),
            "logits/chosen": ((logits * mask).chunk(2)[0].sum(), chosen.sum()),
            "logits/rejected": ((logits * mask).chunk(2)[1].sum(), rejected.sum()),
            "mean_token_accuracy": ((top1 & mask).chunk(2)[0].sum(), chosen.sum()),
            "rewards/chosen": (out.chosen_rewards.sum(), pairs),
            "rewards/rejected": (out.rejected_rewards.sum(), pairs),
            "rewards/accuracies": (out.accuracies.sum(), pairs),
            "rewards/margins": (out.margins.sum(), pairs),
            "logps/chosen": ((logp * mask).chunk(2)[0].sum(), pairs),
            "logps/rejected": ((logp * mask).chunk(2)[1].sum(), pairs),
            "tokens/kept": (kept, tokens),
            "num_tokens": (inputs["attention_mask"].sum(), pairs),
        }
        if self.aux_loss_enabled:
            sums["aux_loss"] = (outputs.aux_loss, torch.ones_like(pairs))
        table = torch.stack([torch.stack([x.double() for x in both]) for both in sums.values()])
        mode = "train" if self.model.training else "eval"
        for key, both in zip(sums, self.accelerator.reduce(table, "sum"), strict=True):
            self._sums[mode][key].append(both)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        prefix = "eval_" if mode == "eval" else ""
        for key, found in self._sums[mode].items():
            sums, counts = torch.stack(found).cpu().unbind(1)
            if key != "num_tokens":
                logs[prefix + key] = (sums / counts.clamp(min=1)).mean().item()
                continue
            if mode == "train":
                self._seen += int(sums.sum()) // self._tp_size
            logs[prefix + key] = self._seen
        self._sums[mode].clear()
        if logs.get("tokens/kept") == 0 and not self._told_nothing_kept:
            self._told_nothing_kept = True
            warnings.warn(
                "no completion token has kept a weight: nothing is trained. Scores that are all alike, such as "
                "logp - ref_logp of a policy that has not moved, keep no token (see pivot_start)",
                stacklevel=2,
            )
        super().log(logs, start_time)


def _loss_of(args: DPOConfig, loss, average, options: Mapping | None) -> tuple[str | Row, dict]:
    """The row, and the arguments of preference_loss, of the trainer's arguments and TRL's."""
    options = dict(options or {})
    default = {field.name: field.default for field in fields(DPOConfig)}
    types = list(args.loss_type)
    if len(types) != 1 or "sft" in types:
        wanted = "name one loss (loss_options={'nll_weight': ...} adds the NLL of the chosen completions)"
        fail("args.loss_type", wanted, types)
    (kind,) = types
    if loss is None:
        if kind not in LOSS_TYPES:
            fail("args.loss_type", f"be one of {tuple(LOSS_TYPES)}", repr(kind))
        loss, own = LOSS_TYPES[kind]
        average = own if average is None else average
        if kind in ("robust", "exo_pair", "aot", "aot_unpaired"):
            options.setdefault("smoothing", args.label_smoothing)
        if kind == "discopop":
            options.setdefault("tau", args.discopop_tau)
        options.setdefault("beta", args.beta)
    else:
        if kind != "sigmoid":
            fail("args.loss_type", "be left at its default where a loss is given", repr(kind))
        if not isinstance(loss, Row) and loss not in PREFERENCE:
            fail("loss", f"be a Row or one of {tuple(PREFERENCE)}", repr(loss))
        if args.beta != default["beta"]:
            options.setdefault("beta", args.beta)
    row = PREFERENCE[loss] if isinstance(loss, str) else loss
    if args.f_divergence_type != "reverse_kl":
        if average or (average is None and row.average):
            fail("args.f_divergence_type", "be 'reverse_kl' with an average, which TRL takes after it", "another")
        options.setdefault("divergence", DIVERGENCES[args.f_divergence_type])
        options.setdefault("alpha", args.f_alpha_divergence_coef)
    return loss, {"average": average, **options}

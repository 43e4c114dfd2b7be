"""What the trainers of pairs and of single responses share: columns of numbers a token, reference, weights, metrics."""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset as MapDataset
from datasets import IterableDataset, concatenate_datasets
from torch import Tensor
from torch.utils.data import DataLoader
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from ..losses.pivots import adaptive_mask, implicit_scores, pivot_flags
from ..losses.table import PREFERENCE, Row, describe
from ..ops._check import check_number, fail
from ..ops._warn import warn_once
from . import _trl_data as data

FLAGS = ("kind", "threshold", "unit", "percent")  # of pivots: where segments start
OURS = ("token_weight", "token_score", "ref_logp", "pair_weight", "label")  # of a batch: not for the model

Pivots = Mapping | Callable[[Tensor, Tensor | None, Tensor], Tensor]


class FineGrained:
    """In front of TRL's DPOTrainer or KTOTrainer; `columns` names what a dataset may have beside TRL's columns."""

    columns: data.Columns
    function: Callable  # the loss that takes loss_options
    reads_weights = True  # so patch_kernels does not warn of them
    gives = ("logp", "ref_logp", "mask", "cu_seqlens", "token_weight", "segment_ids", "pairs", "pair_weight")

    def _take_options(self, loss: str | Row, span_weight, by_kind, pivots, pivot_start) -> None:
        self._loss = loss
        self._row = PREFERENCE[loss] if isinstance(loss, str) else loss
        for name in self._loss_options:
            if name in self.gives:
                fail("loss_options", "leave out what the trainer gives the loss", repr(name))
        data.check_options("loss_options", self._loss_options, self.function, self._row.hyper)
        if self._loss_options.get("average") == "segments":
            fail("average", "be False, 'kept' or 'all': the trainer knows no segments", "'segments'")
        if by_kind is not None and not isinstance(by_kind, Mapping):
            fail("by_kind", "be a mapping from kinds to weights, or None", type(by_kind).__name__, TypeError)
        self._span_options = {"span_weight": span_weight, "by_kind": dict(by_kind or {})}
        if pivots is not None and not callable(pivots) and not isinstance(pivots, Mapping):
            fail("pivots", "be a mapping of arguments, a function or None", type(pivots).__name__, TypeError)
        if pivots is not None and not self._row.reference and not callable(pivots):
            fail("pivots", f"be a function for {describe(loss)}, which has no reference", "a mapping")
        check_pivots(pivots)
        if pivot_start is not None:
            check_number("pivot_start", pivot_start, least=0, most=1)
        self._pivots, self._pivot_start, self._pivots_from = pivots, pivot_start, None
        self._sums = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._seen, self._told_nothing_kept = 0, False

    def _take_reference(self, args, ref_model, dataset) -> None:
        """With a reference in the dataset, or a loss that has none, TRL is to load no model for it."""
        given = self._given_reference(dataset)
        self._brought = given
        if given and ref_model is not None:
            fail("ref_model", f"be None where the dataset has {' and '.join(self.columns.reference)}", "a model")
        if given or not self._row.reference:
            args.precompute_ref_log_probs = True

    def _given_reference(self, dataset) -> bool:
        """Does the dataset bring the reference's log-probs."""
        return dataset is not None and self.columns.reference[0] in data.first_row(dataset, "train")

    def _settle(self, collator: type) -> None:
        """After TRL's __init__."""
        if not self._row.reference or self._brought:
            self.precompute_ref_logps = False
        if isinstance(self.data_collator, collator):
            self.data_collator = data.Collator(self.data_collator, self.columns)

    # ---- data --------------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        first = data.first_row(dataset, dataset_name)
        if "prompt_ids" not in first:
            if any(x in first for x in self.columns.spans) and "prompt" not in first:
                fail(f"the {dataset_name} dataset", "have a column prompt, beside spans", "none")
            needed = ("prompt", "completion", "label") if len(self.columns.sides) == 1 else self.columns.sides
            if not set(needed) <= first.keys() and not {"chosen", "rejected"} <= first.keys():
                fail(f"the {dataset_name} dataset", f"have the columns {', '.join(needed)}", ", ".join(first))
            for column in set(self.columns.labels) & first.keys():  # before TRL counts them
                data.check_finite(column, first[column])
            dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        options = {} if isinstance(dataset, IterableDataset) else {"num_proc": args.dataset_num_proc}
        named = (self.columns, processing_class, self._span_options, dataset_name)
        return data.add_token_weights(dataset, *named, **options)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        ours = (*self.columns.per_token, *self.columns.per_row)
        self._signature_columns += [column for column in ours if column not in self._signature_columns]

    def _precompute_ref_logps(self, dataset, name: str, batch_size: int):
        """The dataset with the reference's log-probs, one number a completion token."""
        if not self._row.reference or self._given_reference(dataset):
            return dataset
        if self._brought:
            wanted = f"have {' and '.join(self.columns.reference)}, as the train dataset has"
            fail(f"the {name} dataset", wanted, ", ".join(dataset.column_names))
        if isinstance(dataset, IterableDataset):
            fail("precompute_ref_log_probs", "be False with an IterableDataset", True)
        if self.ref_model is None and self.is_deepspeed_enabled:
            fail("ref_model", "be given with precompute_ref_log_probs under DeepSpeed", None)
        collate = self.data_collator.stock if isinstance(self.data_collator, data.Collator) else self.data_collator
        loader = self.accelerator.prepare(DataLoader(dataset, batch_size=batch_size, collate_fn=collate))
        sides, found = self.columns.sides, []
        for batch in loader:
            mask = batch["completion_mask"]
            labels = batch["input_ids"].masked_fill(mask == 0, -100)
            logp = self._reference_logps(self.ref_model or self.model, self._for_the_model(batch), labels)
            logp = torch.nn.functional.pad(logp[:, -mask.shape[1] + 1 :], (1, 0))  # position t scores token t
            for side in zip(logp.float().chunk(len(sides)), mask.chunk(len(sides)), strict=True):
                found.append(self.accelerator.gather_for_metrics(self.accelerator.pad_across_processes(side, dim=1)))
        mode, columns = getattr(self.args, "truncation_mode", "keep_start"), {}
        for i, (side, column) in enumerate(zip(sides, self.columns.reference, strict=True)):
            many, start = [len(ids) for ids in dataset[f"{side}_ids"]], 0
            columns[column] = []
            for logp, mask in found[i :: len(sides)]:
                stop = start + len(logp)
                columns[column] += data.per_token(logp, mask, many[start:stop], mode)
                start = stop
        return concatenate_datasets([dataset, MapDataset.from_dict(columns)], axis=1)

    # ---- the model ---------------------------------------------------------------------------------------------------

    def _for_the_model(self, inputs: Mapping) -> dict:
        left_out = {"completion_mask", *OURS}
        inside = {k: v for k, v in inputs.items() if k not in left_out and not k.startswith("KL_")}
        return inside | {"use_cache": False}

    def _scored(self, model, inputs: Mapping):
        """TRL's outputs of the policy, its log-probs and the reference's (None without one), and the mask, (S, T-1)."""
        completion = inputs["completion_mask"]
        mask = completion[:, 1:].bool()
        many, kwargs = mask.shape[1], self._for_the_model(inputs)
        labels = inputs["input_ids"].masked_fill(completion == 0, -100)
        aux = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = model(**kwargs, **aux, labels=labels, fused_lm_head=True)
        logp, ref_logp = outputs.log_probs[:, -many:], None
        if self._row.reference:
            if "ref_logp" in inputs:
                ref_logp = inputs["ref_logp"][:, 1:].to(logp.dtype)
            elif self.precompute_ref_logps or (self.ref_model is None and not is_peft_model(self.model)):
                wanted = f"have {' and '.join(self.columns.reference)}, or a reference model be kept"
                fail("the dataset", wanted, "neither")
            else:
                ref_logp = self._reference_logps(self.ref_model, kwargs, labels)[:, -many:]
        return outputs, logp, ref_logp, mask

    def _reference_logps(self, model, kwargs: Mapping, labels: Tensor) -> Tensor:
        """(S, T-1): log-probs of the labels by the reference, a model or this one without its adapter."""
        adapter = nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            model, unwrapped = self.model, self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None)
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), checkpointing, adapter, self.accelerator.autocast():
            return model(**kwargs, labels=labels, fused_lm_head=True).log_probs

    # ---- weights -----------------------------------------------------------------------------------------------------

    def _token_weights(self, inputs: Mapping, logp: Tensor, ref_logp, mask: Tensor, side, *more: Tensor):
        """(S, T-1), or None where every token weighs 1: weights of the data, others, and the mask of pivots."""
        factors = [inputs["token_weight"][:, 1:]] if "token_weight" in inputs else []
        factors += more
        if self._pivots is not None and self._pivots_count(inputs):
            factors.append(self._pivot_weights(inputs, logp.detach(), ref_logp, mask, side))
        weight = None
        for factor in factors:
            weight = factor if weight is None else weight * factor
        return None if weight is None else weight.to(logp.dtype)

    def _pivots_count(self, inputs: Mapping) -> bool:
        """Is the training as far as pivots are used from."""
        own = "token_score" not in inputs and not callable(self._pivots)
        start = self._pivot_start if self._pivot_start is not None else 0.5 if own else 0.0
        self._pivots_from = math.ceil(start * self.state.max_steps) + 1
        if self._pivots_from > self.state.max_steps > 0:
            said = f"pivots are used from step {self._pivots_from} on, and the training has {self.state.max_steps}"
            warn_once("trl pivots", f"{said}: they change nothing (see pivot_start)")
        return self.state.global_step + 1 >= self._pivots_from

    def _pivot_weights(self, inputs: Mapping, logp: Tensor, ref_logp, mask: Tensor, side) -> Tensor:
        if callable(self._pivots):
            return self._pivots(logp, ref_logp, mask)
        given = inputs.get("token_score")
        score = implicit_scores(logp, ref_logp, mask=mask) if given is None else given[:, 1:]
        return weights_of(self._pivots, score, mask, side)

    # ---- what is logged ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _record(self, sums: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Sums and counts over the ranks in one collective; they are divided, and read on the host, when logged."""
        table = torch.stack([torch.stack([x.double() for x in both]) for both in sums.values()])
        mode = "train" if self.model.training else "eval"
        for key, both in zip(sums, self.accelerator.reduce(table, "sum"), strict=True):
            self._sums[mode][key].append(both)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        prefix = "eval_" if mode == "eval" else ""
        for key, found in self._sums[mode].items():
            sums, counts = torch.stack(found).cpu().unbind(1)
            if key == "num_tokens":
                if mode == "train":
                    self._seen += int(sums.sum()) // self._tp_size
                logs[prefix + key] = self._seen
            elif bool((counts > 0).any()):  # of the micro-batches that have any
                logs[prefix + key] = (sums / counts)[counts > 0].mean().item()
        self._sums[mode].clear()
        if self._pivots_from is not None and "tokens/kept" in logs:
            logs["pivots/from_step"] = self._pivots_from
        both = [logs.get(f"{prefix}rewards/{side}") for side in ("chosen", "rejected")]
        if None not in both:
            logs.setdefault(f"{prefix}rewards/margins", both[0] - both[1])
        if logs.get("tokens/kept") == 0 and not self._told_nothing_kept:
            self._told_nothing_kept = True
            warnings.warn(
                "no completion token has kept a weight: nothing is trained. Scores that are all alike, such as "
                "logp - ref_logp of a policy that has not moved, keep no token (see pivot_start)",
                stacklevel=2,
            )
        super().log(logs, start_time)


def weights_of(pivots: Mapping, score: Tensor, mask: Tensor, side) -> Tensor:
    """The weights of adaptive_mask, between pivots where the options have a kind of them."""
    options = dict(pivots)
    flags = {key: options.pop(key) for key in FLAGS if key in options}
    if flags:
        kind = flags.get("kind")
        shared = {k: options[k] for k in ("baseline", "quantile") if k in options and kind != "threshold"}
        options["pivots"] = pivot_flags(score, mask=mask, **{"kind": kind} | flags, **shared)
    return adaptive_mask(score, mask=mask, side=side, **options).token_weight


def check_pivots(pivots, of: Callable | None = None) -> None:
    """Options that are wrong are refused when the trainer is made, not at the step that pivots are used from."""
    if not isinstance(pivots, Mapping):
        return
    own = next((name for name in pivots if name in ("token_score", "mask", "cu_seqlens", "side", "pivots")), None)
    if own is not None:
        fail("pivots", "leave out what the trainer gives adaptive_mask", repr(own))
    options = {k: 0.0 if isinstance(x, Tensor) and k == "baseline" else x for k, x in pivots.items()}
    score, none = torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.bool)
    try:
        weights_of(options, score, none, "halves") if of is None else of(score, mask=none, **options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"pivots: {error}") from None


def token_sums(outputs, mask: Tensor, weight: Tensor | None, inputs: Mapping) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums and counts of tokens that every trainer logs."""
    tokens = mask.sum()
    kept = tokens if weight is None else (mask & (weight != 0)).sum()
    entropy = outputs.entropy[:, -mask.shape[1] :]
    return {
        "entropy": ((entropy * mask).sum(), tokens),
        "tokens/kept": (kept, tokens),
        "num_tokens": (inputs["attention_mask"].sum(), torch.ones_like(tokens)),
    }

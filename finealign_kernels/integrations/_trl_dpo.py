"""FineGrainedDPOTrainer: TRL's DPOTrainer with weights on tokens, and every preference loss of this library."""

import copy
from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from ..losses.preference import preference_loss
from ..losses.table import PREFERENCE, Row
from ..losses.weights import ld_weights, wpo_weights
from ..ops._check import fail
from ._trl_common import FineGrained, Pivots, token_sums
from ._trl_data import Columns

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


class FineGrainedDPOTrainer(FineGrained, DPOTrainer):
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
    average       False, "kept" or "all", as in preference_loss; None: as the loss has it
    loss_options  other arguments of preference_loss (nll_weight, shift, smoothing, ...). beta there, else args.beta if
                  it is not TRL's default of 0.1, else the row's own
    span_weight, by_kind   how much a span weighs: feedback.pair_weights
    pivots        arguments of adaptive_mask (and of pivot_flags, with a kind) by name: the tokens whose score agrees
                  with their side keep their weight, the others get 0. Or a function (logp, ref_logp, mask) -> weights.
                  Without columns of scores a token's is logp - ref_logp, which is 0 until the policy has moved
    pivot_start   share of the training before such pivots are used, 0.5 where the scores are the policy's own

    Of args it reads loss_type, beta, label_smoothing, discopop_tau, f_divergence_type, ld_alpha and use_weighting as
    TRL does. It logs what TRL logs (rewards with the weights in them), tokens/kept, the share of completion tokens
    whose weight is not 0, and with pivots pivots/from_step, the first step that they are used in.

    Raises  RuntimeError for a TRL that is not known here; ValueError naming what does not go together.
    """

    columns = Columns(("chosen", "rejected"), ("pair_weight",))
    function = staticmethod(preference_loss)

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
        pivots: Pivots | None = None,
        pivot_start: float | None = None,
        **rest,
    ):
        args = DPOConfig() if args is None else copy.copy(args)
        loss, self._loss_options = _loss_of(args, loss, average, loss_options)
        self._take_options(loss, span_weight, by_kind, pivots, pivot_start)
        self._take_reference(args, ref_model, rest.get("train_dataset", more[1] if len(more) > 1 else None))
        super().__init__(model, ref_model, args, *more, **rest)
        self._settle(DataCollatorForPreference)
        if self._is_vision_dataset and (pivots is not None or self._row is not PREFERENCE["dpo"]):
            fail("the train dataset", "be of text, for losses other than 'dpo' and for pivots", "images")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs, logp, ref_logp, mask = self._scored(model, inputs)
        lengths = [] if self.ld_alpha is None else [ld_weights(logp.detach(), mask=mask, alpha=self.ld_alpha)]
        weight = self._token_weights(inputs, logp, ref_logp, mask, "halves", *lengths)
        options = {} if weight is None else {"token_weight": weight}
        pair_weight = inputs.get("pair_weight")
        if self.use_weighting:
            wpo = wpo_weights(logp, outputs.log_sum_sq_probs[:, -mask.shape[1] :], mask=mask)
            pair_weight = wpo if pair_weight is None else wpo * pair_weight
        if pair_weight is not None:
            options["pair_weight"] = pair_weight.to(logp.dtype)
        out = preference_loss(self._loss, logp, ref_logp, mask=mask, **options, **self._loss_options)
        loss = out.loss
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        self._record(self._figures(inputs, outputs, out, mask, weight))
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**self._for_the_model(inputs))

    @torch.no_grad()
    def _figures(self, inputs: Mapping, outputs, out, mask: Tensor, weight: Tensor | None) -> dict:
        """Sums and counts of what is logged."""
        logp, logits, top1 = (
            getattr(outputs, name)[:, -mask.shape[1] :] for name in ("log_probs", "mean_logits", "is_top1")
        )
        pairs, (chosen, rejected) = torch.tensor(len(mask) // 2, device=mask.device), mask.chunk(2)
        sums = token_sums(outputs, mask, weight, inputs) | {
            "logits/chosen": ((logits * mask).chunk(2)[0].sum(), chosen.sum()),
            "logits/rejected": ((logits * mask).chunk(2)[1].sum(), rejected.sum()),
            "mean_token_accuracy": ((top1 & mask).chunk(2)[0].sum(), chosen.sum()),
            "rewards/chosen": (out.chosen_rewards.sum(), pairs),
            "rewards/rejected": (out.rejected_rewards.sum(), pairs),
            "rewards/accuracies": (out.accuracies.sum(), pairs),
            "rewards/margins": (out.margins.sum(), pairs),
            "logps/chosen": ((logp * mask).chunk(2)[0].sum(), pairs),
            "logps/rejected": ((logp * mask).chunk(2)[1].sum(), pairs),
        }
        return sums | ({"aux_loss": (outputs.aux_loss, torch.ones_like(pairs))} if self.aux_loss_enabled else {})


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

"""FineGrainedGRPOTrainer: TRL's GRPOTrainer with rewards of segments, advantages of tokens and pivots."""

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from reprlib import repr as brief
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer

from ..feedback import decode, segment_tokens, sentences, token_spans
from ..losses.pivots import adaptive_mask
from ..ops._check import check_one_of, check_tensor, fail
from ..rl.gae import gae
from ..rl.groups import decoupled_advantages, turn_advantages
from ..rl.whitening import whiten
from ._trl_common import check_pivots

KINDS = ("return_to_go", "outcome", "decoupled", "gae")
RATES = ("gamma", "lam")  # of gae
READ = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")  # by a value function
Pivots = Mapping | Callable[[Tensor, Tensor, Tensor], Tensor]
Values = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Segment(NamedTuple):
    """A judged part of a completion's text, in characters."""

    start: int
    end: int
    reward: float


class Dense:
    """A reward function whose answers are kept: TRL gets the sum of a completion's segments, the trainer each."""

    def __init__(self, function: Callable):
        self.function, self.answers = function, None
        functools.update_wrapper(self, function)

    def __call__(self, **given):
        answers = plain(self.function(**given))
        if not isinstance(answers, Sequence) or isinstance(answers, str):
            fail(self.__name__, "return a list, one answer a completion", repr(answers))
        self.answers = list(answers)
        return [self._total(answer) for answer in self.answers]

    def _total(self, answer) -> float | None:
        if answer is None:
            return None
        if isinstance(answer, int | float):
            return self._finite(answer)
        if not isinstance(answer, Sequence) or isinstance(answer, str):
            fail(self.__name__, "return a number or a list for each completion", repr(answer))
        return float(sum(self.reward(part) for part in answer))

    def _finite(self, value):
        if math.isinf(value):
            fail(self.__name__, "return finite numbers, or NaN or None for no judgement", value)
        return value

    def reward(self, part) -> float:
        value = part.get("score") if isinstance(part, Mapping) else part[2:3] if isinstance(part, Sequence) else part
        value = value[0] if isinstance(value, list | tuple) and value else value
        if not isinstance(value, int | float) or (isinstance(part, Mapping) and not {"start", "end"} <= part.keys()):
            wanted = "return numbers, (start, end, reward) or mappings with start, end and score"
            fail(self.__name__, wanted, repr(part))
        return float(self._finite(value))


def plain(answer):
    """Python's numbers and lists for those of numpy and torch, however deep they lie."""
    if hasattr(answer, "tolist"):
        return answer.tolist()
    if isinstance(answer, Mapping):
        return {key: plain(value) for key, value in answer.items()}
    return [plain(one) for one in answer] if isinstance(answer, list | tuple) else answer


class FineGrainedGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer for rewards of segments: what a part of a completion earned moves the tokens of that part.

        def judge(completions, **_):
            return [[1.0, -0.5], ...]                     # a number for each sentence of each completion

        trainer = FineGrainedGRPOTrainer(model, reward_funcs=judge, args=GRPOConfig(...), train_dataset=dataset)

    A reward function returns for each completion a number, which is the reward of the whole of it, or a list: of one
    number for each segment that `segments` cuts its text into; of (start, end, reward) in characters of its text; or of
    mappings with start, end and score. None means no judgement; a completion that no function judges, and one that
    args.mask_truncated_completions masks, is left out. Functions of all kinds can be combined. TRL logs the sums.

    segments    text -> (start, end) of its segments, in order; feedback.sentences
    advantages  "return_to_go" and "outcome": turn_advantages of the segments, against the other completions of the
                prompt, on all ranks, summed over the reward functions with args.reward_weights. A segment's tokens have
                its advantage, tokens behind the last segment 0. "decoupled": decoupled_advantages of the completions'
                sums, one number a completion. "gae": by a value function, against what was expected at each token:
                A_t = Σ_k (γλ)^k (r_t+k + γ V_t+k+1 - V_t+k), r a segment's reward at its last token, summed over the
                reward functions, whitened over the batch of all ranks; also where every function returns numbers
    values      of "gae": (prompt_ids, prompt_mask, completion_ids, completion_mask) -> (B, T) float, V of each token of
                the completion: the expected return before it is chosen. Called without gradient, and not trained here
    gae         gamma and lam of "gae" by name; 1 and 0.95
    pivots      arguments of adaptive_mask by name: tokens whose score, the reward of their segment, agrees with the
                sign of their advantage keep it, the others get 0; from the first step on. Or a function
                (rewards, advantages, mask) -> weights, (B, T) each

    Where every function returns numbers, the advantages are TRL's own. With args.importance_sampling_level "sequence"
    the loss of advantages that differ between tokens is that of "gspo_token"; TRL's would give every token their mean.
    All else is TRL's: generation, KL, loss_type, metrics, and tokens/kept, the share of tokens with an advantage.

    Raises  RuntimeError for a TRL that is not known here; ValueError naming what a reward function returned.
    """

    def __init__(
        self,
        model,
        reward_funcs,
        args: GRPOConfig | None = None,
        *more,
        segments: Callable[[str], list[tuple[int, int]]] = sentences,
        advantages: str = "return_to_go",
        pivots: Pivots | None = None,
        values: Values | None = None,
        gae: Mapping[str, float] | None = None,
        **rest,
    ):
        check_one_of("advantages", advantages, KINDS)
        if (advantages == "gae") != callable(values):
            fail("values", "be a function with advantages='gae' and None else", type(values).__name__, TypeError)
        if not isinstance(gae or {}, Mapping) or not set(gae or {}) <= set(RATES):
            fail("gae", f"be a mapping of {' and '.join(RATES)}", repr(gae))
        if gae and advantages != "gae":
            fail("gae", "be left out without advantages='gae'", repr(gae))
        if pivots is not None and not callable(pivots) and not isinstance(pivots, Mapping):
            fail("pivots", "be a mapping of arguments, a function or None", type(pivots).__name__, TypeError)
        check_pivots(pivots, adaptive_mask)
        if not callable(segments):
            fail("segments", "be a function from a text to its segments", type(segments).__name__, TypeError)
        self._segments, self._kind, self._pivots = segments, advantages, pivots
        self._values, self._rates = values, dict(gae or {})
        functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        self._dense = [Dense(f) if _is_plain(f) else None for f in functions]
        functions = [dense or f for dense, f in zip(self._dense, functions, strict=True)]
        super().__init__(model, functions, None if args is None else copy.copy(args), *more, **rest)
        self._token_level = self.importance_sampling_level == "sequence"
        self._rescored = None

    # ---- advantages of tokens ----------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        answers = [dense.answers if dense else None for dense in self._dense]
        is_dense = any(not (one is None or isinstance(one, int | float)) for many in answers if many for one in many)
        if self._kind != "gae" and not any(gather_object([is_dense])):
            return out
        if None in answers:
            what = "be functions, where one returns segments or values are given"
            fail("reward_funcs", what, "a model or an async function")
        mask = out["completion_mask"].bool()
        if "tool_mask" in out:
            mask = mask & out["tool_mask"].bool()
        models = [self._placed(out, many, dense) for many, dense in zip(answers, self._dense, strict=True)]
        groups = self.num_generations if self.model.training else self.num_generations_eval
        weights = self.reward_weights.tolist()
        if self._kind == "decoupled":
            given = [[sum(x.reward for x in one) for one in model] for model in models]
            every = torch.tensor(gather_object(list(zip(*given, strict=True))), device=mask.device).T
            rows = self._mine(decoupled_advantages(every, groups, weights=weights), len(mask))
            advantages = torch.where(mask, rows[:, None], 0)
        elif self._kind == "gae":
            advantages = self._by_values(out, models, weights, mask)
        else:
            advantages = sum(
                weight * self._of_segments(model, mask, groups) for weight, model in zip(weights, models, strict=True)
            )
        kept = torch.where(advantages != 0, 1.0, 0.0)
        if self._pivots is not None:
            rewards = _total(
                w * self._spread(model, [x.reward for one in model for x in one], mask)
                for w, model in zip(weights, models, strict=True)
            )
            kept = kept * self._pivot_weights(rewards, advantages, mask)
            advantages = advantages * kept
        sums = self.accelerator.reduce(torch.stack([((kept != 0) & mask).sum(), mask.sum()]), "sum")
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["tokens/kept"].append((sums[0] / sums[1].clamp(min=1)).item())
        return {**out, "advantages": advantages}

    def _placed(self, out: Mapping, answers: list, dense: Dense) -> list[list["OnTokens"]]:
        """The segments of each completion on its tokens; NaN where there is no judgement, or TRL masked all tokens."""
        found = []
        for ids, there, answer in zip(out["completion_ids"], out["completion_mask"].bool(), answers, strict=True):
            ids = ids[there].tolist()
            answer = answer if ids else None  # args.mask_truncated_completions
            if answer is None or isinstance(answer, int | float):
                found.append([OnTokens(float("nan") if answer is None else float(answer), 0, len(ids))])
                continue
            text, offsets = decode(self._tokenizer, ids)
            parts = self._parts(answer, text, dense)
            try:
                found.append(_on_tokens(offsets, text, parts))
            except ValueError as error:  # segments beyond the text, or out of order
                raise ValueError(f"{dense.__name__}, of the completion {brief(text)}: {error}") from None
        return found

    def _parts(self, answer: list, text: str, dense: Dense) -> list[Segment]:
        numbers = [isinstance(part, int | float) for part in answer]
        if any(numbers) and not all(numbers):
            fail(dense.__name__, "return numbers or segments for a completion, not both", repr(answer))
        if not all(numbers):
            at = [(part["start"], part["end"]) if isinstance(part, Mapping) else part[:2] for part in answer]
            return [Segment(*ends, dense.reward(part)) for ends, part in zip(at, answer, strict=True)]
        cuts = list(self._segments(text))
        if len(cuts) != len(answer):
            wanted = f"return {len(cuts)} numbers for a completion of {len(cuts)} segments"
            fail(dense.__name__, wanted, len(answer))
        return [Segment(start, end, float(r)) for (start, end), r in zip(cuts, answer, strict=True)]

    def _of_segments(self, model: list[list["OnTokens"]], mask: Tensor, groups: int) -> Tensor:
        """(B, T): the advantages of one reward function's segments, of completions of all ranks against each other."""
        every = gather_object([[part.reward for part in one] for one in model])
        cu_turns = torch.tensor([0, *(len(one) for one in every)]).cumsum(0)
        rewards = torch.tensor([reward for one in every for reward in one], dtype=torch.float32)
        found = turn_advantages(rewards, cu_turns, groups, kind=self._kind)
        mine = self._mine(torch.arange(len(every)), len(mask))
        first, stop = cu_turns[mine[0]], cu_turns[mine[-1] + 1]
        return self._spread(model, found[first:stop].tolist(), mask)

    def _by_values(self, out: Mapping, models: list, weights: list[float], mask: Tensor) -> Tensor:
        """(B, T): whitened GAE of the rewards at the ends of segments; 0 in a completion without a judgement."""
        rewards = _total(weight * self._at_ends(model, mask) for weight, model in zip(weights, models, strict=True))
        judged = mask & ~rewards.isnan().any(1, keepdim=True)
        with torch.no_grad():
            values = self._values(*(out[name] for name in READ))
        check_tensor("values", values, shape=mask.shape, like=mask)
        if not bool(values[judged].isfinite().all()):
            fail("values", "be finite at the tokens of completions", values[judged & ~values.isfinite()][0].item())
        found = gae(torch.where(judged, rewards, 0), values.float(), mask=judged, **self._rates).advantages
        return whiten(found, mask=judged, sum_moments=lambda moments: self.accelerator.reduce(moments, "sum"))

    @staticmethod
    def _at_ends(model: list[list["OnTokens"]], mask: Tensor) -> Tensor:
        """(B, T): a segment's reward at its last token in the mask; of one without a token at the last before it."""
        placed = torch.zeros(mask.shape)
        for row, there, parts in zip(placed, mask.cpu(), model, strict=True):
            kept = there.nonzero()[:, 0]
            for part in parts if len(kept) else ():
                row[kept[max(int((kept < part.stop).sum()) - 1, 0)]] += part.reward
        return placed.to(mask.device)

    @staticmethod
    def _spread(model: list[list["OnTokens"]], values: list[float], mask: Tensor) -> Tensor:
        """(B, T): the value of each segment at all of its tokens, 0 elsewhere."""
        spread, values = torch.zeros(mask.shape), iter(values)
        for row, parts in zip(spread, model, strict=True):
            for part, value in zip(parts, values, strict=False):
                row[part.start : part.stop] = value
        return torch.where(mask, spread.to(mask.device), 0)

    def _mine(self, every: Tensor, rows: int) -> Tensor:
        start = self.accelerator.process_index * rows
        return every[start : start + rows]

    def _pivot_weights(self, rewards: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        if callable(self._pivots):
            return self._pivots(rewards, advantages, mask)
        return adaptive_mask(rewards, mask=mask, side=advantages, **self._pivots).token_weight

    # ---- ratios of sequences with advantages of tokens ---------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self._token_level:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        by_token = inputs["advantages"].dim() == 2
        self.importance_sampling_level = "token" if by_token else "sequence"
        inputs = dict(inputs)
        self._rescored = inputs if by_token else None
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self._rescored = None

    def _get_per_token_logps_and_entropies(self, *args, **options):
        """Under gspo_token the old log-prob is logp - mean_t (logp_t - old_t), detached: each token's ratio is s_i."""
        found = super()._get_per_token_logps_and_entropies(*args, **options)
        if self._rescored is not None and "old_per_token_logps" in self._rescored:
            inputs, logp = self._rescored, found[0].detach()
            mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
            ratio = (logp - inputs["old_per_token_logps"]) * mask
            mean = ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
            inputs["old_per_token_logps"] = logp - mean
        return found


class OnTokens(NamedTuple):
    """A segment's tokens in a completion, stop excluded; none where it is cut off, or within another's token."""

    reward: float
    start: int
    stop: int


def _on_tokens(offsets: list, text: str, parts: list[Segment]) -> list[OnTokens]:
    """A segment has the tokens up to its last, from its own first, or from where the segment ends that it adjoins."""
    found, stop, end = [], 0, 0
    ranges = [(part.start, part.end) for part in parts]
    lasts, spans = segment_tokens(offsets, text, ranges), token_spans(offsets, text, ranges)
    for part, last, (first, _) in zip(parts, lasts, spans, strict=True):
        gap = text[end : part.start].strip()
        start = max(stop, first) if gap else stop
        stop, end = max(stop, last + 1), part.end
        found.append(OnTokens(part.reward, start, stop))
    return found


def _total(rewards: Iterable[Tensor]) -> Tensor:
    """The sum over reward functions of those that are a number, as TRL's; NaN where none is."""
    every = torch.stack(list(rewards))
    return torch.where(every.isnan().all(0), float("nan"), every.nansum(0))


def _is_plain(function) -> bool:
    """Is it a function that is called with the completions, at once."""
    return callable(function) and not isinstance(function, nn.Module) and not inspect.iscoroutinefunction(function)

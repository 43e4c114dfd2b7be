"""From text to segment rewards with a token classifier of transformers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..feedback.records import plain_text
from ..feedback.segments import Range, segment_tokens, sub_sentences
from ..feedback.spans import encode
from ..formulas.rewards import SegmentRewards
from ..ops._check import check_bool, check_integer, check_number, check_one_of, fail, number
from ..ops._warn import warn_once


class Judgement(NamedTuple):
    """What the model says of the segments of one text. Segments beyond max_length are missing at the end."""

    segments: list[Range]  # characters of the text
    logits: Tensor  # (L, C) float32
    reward: Tensor  # (L,) float32


class SegmentRewardModel:
    """A token classifier whose logits at separator tokens judge the segments of a response.

    A response is cut into segments; the input is  prompt <sep> segment <sep> segment ...  with the separator in front
    of each segment ("open": a model that sees the whole input), or behind it ("close": a causal one). A segment's
    reward is that of the class with the largest logit, among those named in `rewards` alone.

        factual = SegmentRewardModel(model, tokenizer, {0: 0.5, 1: -0.5}, split=sentences)
        loss = segment_class_loss(model(**inputs).logits, labels)            # inputs, labels = factual.batch(...)
        models = [factual(prompts, texts, offsets), ...]                     # SegmentRewards
        out = advantages(models, ...)

    model       of transformers, for token classification: its output has logits (B, T, C)
    tokenizer   its own, a fast one; it need not be the policy's
    rewards     class -> reward, two classes or more
    split       text -> (start, end) of its segments, in order: sub_sentences (the default), sentences, ...
    separator   token id; default: the tokenizer's separator, else its end of sequence
    placed      "open" or "close"
    soft        the mean of the rewards under the softmax of the named classes, instead of the largest
    weight      of this model's rewards among others'
    max_length  tokens of the input, at most as many as the model's config and the tokenizer say that they take; a
                segment whose separator lies beyond has no reward: it counts 0, and a warning says so once

    Source: arXiv:2306.01693 and its code (open, hard, two of three classes compared); close and soft are derived.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        rewards: Mapping[int, float],
        *,
        split: Callable[[str], Iterable[Range]] = sub_sentences,
        separator: int | None = None,
        placed: str = "open",
        soft: bool = False,
        weight: float = 1.0,
        max_length: int = 2048,
        batch_size: int = 16,
    ):
        check_one_of("placed", placed, ("open", "close"))
        soft = check_bool("soft", soft)
        if not getattr(tokenizer, "is_fast", False):
            fail("tokenizer", "be a fast one of transformers, which gives offsets", f"a {type(tokenizer).__name__}")
        if not isinstance(rewards, Mapping) or len(rewards) < 2:
            fail("rewards", "name two classes or more, {class: reward}", rewards)
        for label, reward in rewards.items():
            check_integer("rewards", label, "name classes by whole numbers of at least 0", least=0)
            check_number(f"rewards[{label}]", reward)
        if separator is None:
            separator = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        if separator is None:
            fail("separator", "be given for a tokenizer without separator and end of sequence", None)
        separator = check_integer("separator", separator, f"be a token id below {len(tokenizer)}", least=0)
        if separator >= len(tokenizer):
            fail("separator", f"be a token id below {len(tokenizer)}", separator)
        for name, value in (("max_length", max_length), ("batch_size", batch_size)):
            check_integer(name, value, "be a whole number of at least 1", least=1)
        takes = getattr(getattr(model, "config", None), "max_position_embeddings", None) or max_length
        self.model, self.tokenizer, self.rewards, self.split = model, tokenizer, dict(rewards), split
        self.separator, self.placed, self.soft = separator, placed, soft
        self.weight, self.batch_size = check_number("weight", weight), batch_size
        self.max_length = min(max_length, takes, tokenizer.model_max_length)  # tokens of prompt and response

    def encode(self, prompt: str, text: str, segments: Sequence[Range]) -> tuple[list[int], list[int]]:
        """Token ids of the input, and the place of each segment's separator; what is beyond max_length is cut off."""
        ids, places = list(encode(self.tokenizer, prompt, "", eos=False).input_ids), []
        for start, end in segments:
            words = self.tokenizer(text[start:end], add_special_tokens=False)["input_ids"]
            ids += [self.separator, *words] if self.placed == "open" else [*words, self.separator]
            places.append(len(ids) - (len(words) + 1 if self.placed == "open" else 1))
        return ids[: self.max_length], [place for place in places if place < self.max_length]

    def batch(
        self, prompts: Sequence[str], texts: Sequence[str], classes: Sequence[Sequence[int]]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What a step of training needs: the model's inputs, and labels (B, T), a class at each separator, else -100.

        classes  of the segments of each text, as many as `split` finds; -100: not judged
        """
        check_as_many(prompts=prompts, texts=texts, classes=classes)
        rows, labels, lost, many = [], [], 0, 0
        for prompt, text, given in zip(prompts, texts, classes, strict=True):
            segments = list(self.split(text))
            if len(given) != len(segments):
                fail("classes", f"hold {len(segments)} classes for {text[:40]!r}", len(given))
            ids, places = self.encode(prompt, text, segments)
            lost, many = lost + len(segments) - len(places), many + len(segments)
            row = [-100] * len(ids)
            for place, one in zip(places, given, strict=False):
                row[place] = one
            rows.append(ids)
            labels.append(row)
        self._warn_of_lost("have no label", lost, many)
        return self._padded(rows), _stacked(labels, -100, self._device())

    @torch.no_grad()
    def judge(self, prompts: Sequence[str], texts: Sequence[str]) -> list[Judgement]:
        """The judgement of each text; a text without segments has an empty one."""
        check_as_many(prompts=prompts, texts=texts)
        named, training = list(self.rewards), self.model.training
        value = torch.tensor([self.rewards[one] for one in named], dtype=torch.float32)
        found, many = [], 0
        self.model.eval()
        try:
            for low in range(0, len(texts), self.batch_size):
                part = slice(low, low + self.batch_size)
                cut = [list(self.split(text)) for text in texts[part]]
                coded = [self.encode(*both) for both in zip(prompts[part], texts[part], cut, strict=True)]
                logits = self.model(**self._padded([ids for ids, _ in coded])).logits
                if logits.dim() != 3:
                    fail("model", "give logits (B, T, C), one row a token", tuple(logits.shape))
                for row, (_, places), segments in zip(logits, coded, cut, strict=True):
                    own = row[torch.tensor(places, dtype=torch.int64, device=row.device)].float().cpu()
                    if max(named) >= own.shape[1]:
                        fail("rewards", f"name classes in [0, {own.shape[1]})", named)
                    scores, many = own[:, named], many + len(segments)
                    reward = scores.softmax(1) @ value if self.soft else value[scores.argmax(1)]
                    reward = torch.where(scores.isnan().any(1), torch.nan, reward)  # argmax takes NaN for a class
                    found.append(Judgement(segments[: len(places)], own, reward))
        finally:
            self.model.train(training)
        self._warn_of_lost("have no reward", many - sum(len(one.segments) for one in found), many)
        return found

    def __call__(
        self,
        prompts: Sequence[str],
        texts: Sequence[str],
        offsets: Sequence[Sequence[Range]],
        *,
        first: int | Sequence[int] = 0,
    ) -> SegmentRewards:
        """Rewards of the segments of S responses, each at its last token: what token_rewards and advantages take.

        texts    the responses
        offsets  (start, end) in the text of each token of the policy, as feedback.decode gives them
        first    the column at which a response's tokens start in the policy's batch, one for all or one each

        Returns SegmentRewards on the CPU; a segment whose logits are NaN has a reward of NaN.
        """
        check_as_many(prompts=prompts, texts=texts, offsets=offsets)
        first = first.tolist() if isinstance(first, Tensor) else first
        starts = [first] * len(texts) if number(first) is not None else list(first)
        if len(starts) != len(texts):
            fail("first", f"be a column, or {len(texts)} of them", f"{len(starts)} of them")
        starts = [check_integer("first", start, "hold columns of at least 0", least=0) for start in starts]
        rewards, ends, bounds = [torch.empty(0)], [], [0]
        for text, own, judged, start in zip(texts, offsets, self.judge(prompts, texts), starts, strict=True):
            ends += [start + t for t in segment_tokens(own, text, judged.segments)]
            rewards.append(judged.reward)
            bounds.append(len(ends))
        end, cu_segments = (torch.tensor(x, dtype=torch.int64) for x in (ends, bounds))
        return SegmentRewards(torch.cat(rewards), end, cu_segments, weight=self.weight)

    def _warn_of_lost(self, what: str, lost: int, many: int) -> None:
        if lost:
            where = f"their separators lie beyond max_length, {self.max_length} tokens of prompt and response"
            warn_once(f"SegmentRewardModel {what}", f"SegmentRewardModel: {lost} of {many} segments {what}: {where}")

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _padded(self, rows: list[list[int]]) -> dict[str, Tensor]:
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.separator
        device = self._device()
        mask = _stacked([[1] * len(row) for row in rows], 0, device)
        return dict(input_ids=_stacked(rows, pad, device), attention_mask=mask)


def check_as_many(**lists) -> None:
    """Lists of one thing a response each: as many, and no string, whose characters would be taken for texts."""
    for name, value in lists.items():
        if isinstance(value, str):
            fail(name, "be a list, one a response", "a str", TypeError)
        if name == "texts":
            for i, text in enumerate(value):
                plain_text(f"texts[{i}]", text)
    counts = [len(value) for value in lists.values()]
    if len(set(counts)) > 1:
        fail(" and ".join(lists), "be as many", " and ".join(map(str, counts)))


def _stacked(rows: list[list[int]], fill: int, device: torch.device) -> Tensor:
    """(B, T) int64, right-padded; a column at least."""
    width = max([1, *map(len, rows)])
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.int64, device=device)

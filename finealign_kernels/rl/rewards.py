"""From the rewards of segments, by one or more reward models, to a reward for each token."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..feedback.segments import Range, segment_tokens, sentences
from ..formulas import rewards as formula
from ..formulas.rewards import PLACEMENTS, SegmentRewards
from ..formulas.segments import segment_ids, summed_in
from ..ops._check import check_flags, check_number, check_tensor, fail, reads_values
from ..ops._layout import Tokens, check_cu_seqlens, flatten, unflatten

INDICES = (torch.int32, torch.int64)


class SegmentEnds(NamedTuple):
    """Where M segments lie: fields of SegmentRewards, int64."""

    end: Tensor  # (M,)
    cu_segments: Tensor  # (S + 1,)
    start: Tensor  # (M,)


def token_rewards(
    models: SegmentRewards | Sequence[SegmentRewards],
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    placement: str = "end",
    on_collision: str = "add",
    on_empty: str = "previous",
) -> Tensor:
    """r_t = Σ_k w_k Σ_j 1[t = T_kj] R_kj, the rewards of segments j by models k at their last tokens T_kj, and denser.

        "end"      R_j at the last token of segment j           Σ_t r_t = Σ_j R_j
        "all"      R_j at each of its tokens                    an advantage: as a reward it would grow with the length
        "split"    R_j / n_j at each of its n_j tokens          Σ_t r_t = Σ_j R_j
        "rtg"      Σ_{i≥j} R_i at each token of j               the return to go, an advantage of segments
        "rtg_all"  Σ_{u≥t} r_u of "all"

    models        one SegmentRewards or several, each with segments of its own; their token rewards add up
    mask          (B, T) bool, the response tokens; flat (N,) with cu_seqlens
    cu_seqlens    (S + 1,), for flat tokens; without mask all tokens count, and N is cu_seqlens[-1] (on a CPU only)
    on_collision  where two segments of one model come to the same token: "add", or "overwrite": the later one stays
    on_empty      a segment without tokens in mask: "previous" gives its reward to the last token of the nearest earlier
                  segment that has some, or else to the first token of its sequence; "drop" gives it to none

    An end beyond the response is moved to the response's last token, an end where mask is false to the last token
    before it. An end in front of the response's first token is an error on a CPU: most likely it is an index into the
    response, where a column of the mask is meant. On a GPU it is not read, and its segment has no tokens. Rewards of a
    response without tokens go nowhere. Where a model has scored only the first segments of a response (its input was
    cut), leave the others out: what is missing counts 0.

    Returns  token rewards in the shape of mask, or (N,): float32, float64 if a reward is. 0 where mask is false and for
             tokens of no segment. Differentiable in the rewards.
    Raises   ValueError, TypeError naming model, argument, expectation and finding. Values are checked on a CPU (rewards
             that are not finite, ends that decrease or lie in front of the response); on a GPU a NaN reaches its tokens
             and an end that decreases makes one. FINEALIGN_DEBUG=1 checks everywhere.
    Source   arXiv:2306.01693 and its code ("end", on_collision="overwrite", on_empty="previous"); the rest derived.
    """
    for name, value, known in (
        ("placement", placement, PLACEMENTS),
        ("on_collision", on_collision, ("add", "overwrite")),
        ("on_empty", on_empty, ("previous", "drop")),
    ):
        if value not in known:
            fail(name, f"be one of {known}", repr(value))
    tokens = layout_of(mask, cu_seqlens)
    models = [models] if isinstance(models, SegmentRewards) else models
    if not isinstance(models, Sequence):
        fail("models", "be SegmentRewards or a sequence of them", type(models).__name__, TypeError)
    models = [check_model(f"models[{k}]", model, tokens) for k, model in enumerate(models)]
    result = torch.float64 if any(model.reward.dtype == torch.float64 for model in models) else torch.float32
    total = torch.zeros_like(tokens.x, dtype=summed_in(tokens.x))
    for model in models:
        wide = model._replace(reward=torch.where(_misplaced(model), torch.nan, model.reward.to(total.dtype)))
        options = dict(placement=placement, overwrite=on_collision == "overwrite", drop=on_empty == "drop")
        total = total + model.weight * formula.token_rewards(wide, tokens.mask, tokens.cu_seqlens, **options)
    return unflatten(total.to(result), tokens.shapes)


def segment_ends(segment_ids: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> SegmentEnds:
    """Where the segments of numbered tokens lie, for SegmentRewards(reward, at.end, at.cu_segments, start=at.start).

    segment_ids  (B, T), or flat (N,) with cu_seqlens; int: the segment of each token, in each sequence 0, 1, 2, ...
                 without a gap (pivot_segments gives them); -1 for a token of no segment
    mask         bool: the response tokens; ids at other tokens are ignored

    It has as many segments as there are: on a GPU this is read, a host sync.
    Raises  ValueError, TypeError; values are checked on a CPU.
    """
    check_tensor("segment_ids", segment_ids, dtypes=INDICES)
    tokens = flatten(segment_ids.double(), mask, cu_seqlens, name="segment_ids")
    inside = tokens.x >= 0 if tokens.mask is None else (tokens.x >= 0) & tokens.mask
    at, lengths = inside.nonzero()[:, 0], tokens.cu_seqlens.long()
    row = _rows(tokens)[at]
    number = torch.stack([row, segment_ids.reshape(-1)[at].long()])  # of the tokens in segments
    opens = torch.ones_like(at, dtype=torch.bool)
    opens[1:] = (number[:, 1:] != number[:, :-1]).any(0)
    if reads_values(at):
        _check_numbers(number, opens, at - lengths[row])
    closes = torch.ones_like(opens)
    closes[:-1] = opens[1:]
    place = at - lengths[row]
    cu_segments = torch.searchsorted(row[opens], torch.arange(tokens.segments + 1, device=at.device))
    return SegmentEnds(place[closes], cu_segments, place[opens])


def segment_rewards(
    rewards: Sequence[Sequence[float]] | Tensor,
    texts: Sequence[str],
    offsets: Sequence[Sequence[Range]],
    segments: Sequence[Iterable[Range]] | Callable[[str], Iterable[Range]] = sentences,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    weight: float = 1.0,
) -> SegmentRewards:
    """SegmentRewards from the texts of the responses: each segment ends at the column of its last token.

        end_j = the column of response token i in its row of the mask, i = segment_tokens(offsets, text, segments)[j]

    rewards   for each response a number for each of its segments; or (M,) float, the segments of response 0 first
    texts     the responses
    offsets   of each response: (start, end) in its text of each token that mask keeps, in their order (feedback.decode,
              feedback.encode). Empty ranges behind those, of padding, are left out
    segments  of each response: (start, end) in its text, in order; or the function that cuts a text
              (feedback.sentences, feedback.sub_sentences)
    mask, cu_seqlens   as in token_rewards: where the response tokens are, prompts left out
    weight    w_k of this reward model

    A segment without tokens ends at the last token before it, or at the response's first. Returns SegmentRewards on the
    device of mask (whose values are read: a host sync on a GPU); its rewards are float32 where they were numbers.
    Raises  ValueError, TypeError naming argument, expectation and finding.
    """
    tokens = layout_of(mask, cu_seqlens)
    if tokens.x.device.type == "meta":
        fail("mask", "hold values", "a meta tensor")
    lists = dict(texts=texts, offsets=offsets)
    if not callable(segments):
        lists["segments"] = segments
    if not isinstance(rewards, Tensor):
        lists["rewards"] = rewards
    for name, value in lists.items():
        if not isinstance(value, Sequence):
            fail(name, "be a sequence", f"a {type(value).__name__}", TypeError)
        if isinstance(value, str) or len(value) != tokens.segments:
            found = "a string" if isinstance(value, str) else len(value)
            fail(name, f"hold one entry for each of the {tokens.segments} responses", found)
    bounds, end, counts = tokens.cu_seqlens.tolist(), [], [0]
    for s, text in enumerate(texts):
        columns = _mask_of(tokens, bounds[s], bounds[s + 1])
        many = len(columns)
        if len(offsets[s]) < many or any(a != b for a, b in offsets[s][many:]):
            fail(f"offsets[{s}]", f"hold one range for each of the {many} tokens that mask keeps", len(offsets[s]))
        cut = list(segments(text) if callable(segments) else segments[s])
        if not isinstance(rewards, Tensor) and len(rewards[s]) != len(cut):
            fail(f"rewards[{s}]", f"hold one number for each of the {len(cut)} segments", len(rewards[s]))
        found = segment_tokens(offsets[s][:many], text, cut)
        end += [columns[i] if columns else 0 for i in found]
        counts.append(counts[-1] + len(cut))
    device = tokens.x.device
    if not isinstance(rewards, Tensor):
        numbers = [check_number(f"rewards[{s}]", value) for s, row in enumerate(rewards) for value in row]
        rewards = torch.tensor(numbers, dtype=torch.float32, device=device)
    check_tensor("rewards", rewards, shape=(len(end),), like=tokens.x)
    places = torch.tensor(end, dtype=torch.int64, device=device)
    return SegmentRewards(rewards, places, torch.tensor(counts, device=device), check_number("weight", weight))


def _mask_of(tokens: Tokens, first: int, stop: int) -> list[int]:
    """The columns of a sequence that mask keeps."""
    if tokens.mask is None:
        return list(range(stop - first))
    return tokens.mask[first:stop].nonzero()[:, 0].tolist()


def layout_of(mask: Tensor | None, cu_seqlens: Tensor | None) -> Tokens:
    """The layout of tokens of which the mask alone is known."""
    if mask is None:
        if cu_seqlens is not None:
            check_tensor("cu_seqlens", cu_seqlens, dtypes=INDICES)
        if cu_seqlens is None or cu_seqlens.device.type != "cpu":
            fail(
                "mask",
                "be given: it says how many tokens there are" + (" on a GPU" if cu_seqlens is not None else ""),
                None,
            )
        check_cu_seqlens(cu_seqlens, None, cu_seqlens)
        mask = torch.ones(int(cu_seqlens[-1]), dtype=torch.bool)
    mask = check_flags("mask", mask)
    return flatten(torch.zeros((), device=mask.device).expand(mask.shape), mask, cu_seqlens, name="mask")


def check_model(name: str, model: SegmentRewards, tokens: Tokens) -> SegmentRewards:
    """The model, its weight a Python number."""
    if not isinstance(model, SegmentRewards):
        fail(name, "be SegmentRewards", f"a {type(model).__name__}", TypeError)
    check_tensor(f"{name}.reward", model.reward, like=tokens.x)
    if model.reward.dim() != 1:
        fail(f"{name}.reward", "have shape (M,), a number a segment", tuple(model.reward.shape))
    for field in ("end",) if model.start is None else ("end", "start"):
        check_tensor(f"{name}.{field}", getattr(model, field), dtypes=INDICES, shape=model.reward.shape, like=tokens.x)
    model = model._replace(weight=check_number(f"{name}.weight", model.weight))
    check_tensor(f"{name}.cu_segments", model.cu_segments, dtypes=INDICES, like=tokens.x)
    if model.cu_segments.shape != (tokens.segments + 1,):
        expected = f"have shape ({tokens.segments + 1},), the bounds of the segments of {tokens.segments} sequences"
        fail(f"{name}.cu_segments", expected, tuple(model.cu_segments.shape))
    many = model.reward.shape[0]
    check_cu_seqlens(model.cu_segments, many, tokens.x, name=f"{name}.cu_segments", of="rewards")
    if reads_values(model.reward):
        row = segment_ids(model.cu_segments, many)
        _refuse(f"{name}.reward", "be a finite number", ~model.reward.detach().isfinite(), model.reward, model, row)
        _refuse(f"{name}.end", "be at least 0", model.end < 0, model.end, model, row)
        _refuse(f"{name}.end", "not decrease in a sequence", _falls(model), model.end, model, row)
        _refuse_in_front(name, model, tokens, row)
        if model.start is not None:
            _refuse(
                f"{name}.start", "be at least 0 and after the end before it", _overlaps(model), model.start, model, row
            )
    return model


def _refuse(name: str, expected: str, wrong: Tensor, value: Tensor, model: SegmentRewards, row: Tensor) -> None:
    if wrong.any():
        j = int(wrong.nonzero()[0])
        s = int(row[j])
        place = f"segment {j - int(model.cu_segments[s])} of sequence {s}"
        fail(name, expected, f"{value[j].item()} for {place}")


def _refuse_in_front(name: str, model: SegmentRewards, tokens: Tokens, row: Tensor) -> None:
    """Refuses ends before the first token of their response, which are mostly indices into it instead of columns."""
    if tokens.mask is None or not len(row) or not len(tokens.mask):
        return
    first, stop = (bounds.long()[row] for bounds in (tokens.cu_seqlens[:-1], tokens.cu_seqlens[1:]))
    place = torch.minimum(first + model.end, (stop - 1).clamp(min=0))
    if tokens.mask[place].all():  # no end is on a prompt or on padding
        return
    kept = torch.cat([first.new_zeros(1), tokens.mask.cumsum(0)])  # tokens before each place
    wrong = (kept[torch.maximum(place + 1, first)] == kept[first]) & (kept[stop] > kept[first])
    if wrong.any():
        j = int(wrong.nonzero()[0])
        opens = int(torch.searchsorted(kept, kept[first[j]] + 1)) - 1 - int(first[j])
        expected = f"not lie in front of its response's first token, which is at {opens}: it is a column of the batch, "
        expected += "not an index into the response (segment_rewards makes columns)"
        place = f"segment {j - int(model.cu_segments[row[j]])} of sequence {int(row[j])}"
        fail(f"{name}.end", expected, f"{int(model.end[j])} for {place}")


def _misplaced(model: SegmentRewards) -> Tensor:
    """(M,) bool: segments with an invalid end or start; all False where values are checked."""
    return (model.end < 0) | _falls(model) | (False if model.start is None else _overlaps(model))


def _falls(model: SegmentRewards) -> Tensor:
    return _inner(model) & (model.end < model.end.roll(1))


def _overlaps(model: SegmentRewards) -> Tensor:
    return (model.start < 0) | (_inner(model) & (model.start <= model.end.roll(1)))


def _inner(model: SegmentRewards) -> Tensor:
    """(M,): segments that are not the first of their sequence."""
    row = segment_ids(model.cu_segments, model.end.shape[0])
    return torch.arange(len(row), device=row.device) > model.cu_segments.long()[row]


def _rows(tokens: Tokens) -> Tensor:
    return segment_ids(tokens.cu_seqlens, tokens.x.shape[0])


def _check_numbers(number: Tensor, opens: Tensor, place: Tensor) -> None:
    """number (2, n): sequence and segment of each token that is in one."""
    row, segment = number
    before = torch.where(row == row.roll(1), segment.roll(1), -1)
    before[:1] = -1
    wrong = (opens & (segment != before + 1)).nonzero()[:, 0]
    if len(wrong):
        at = int(wrong[0])
        where = f"{int(segment[at])} after {int(before[at])} at token {int(place[at])} of sequence {int(row[at])}"
        fail("segment_ids", "count the segments of a sequence 0, 1, 2, ...", where)

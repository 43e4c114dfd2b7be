"""From scores of tokens to scores of responses, and from responses to pairs."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..formulas.segments import segment_ids
from ..ops._check import FLOATS, check_one_of, check_tensor, fail, reads_values
from ..ops._layout import TokenTensor, check_cu_seqlens, flatten, flatten_like
from ..ops._once import refuse_transforms
from ..ops._warn import warn_once
from .reduce import sequence_scores, sequence_weights

PICKS = ("last", "mean", "sum")


class RankedPairs(NamedTuple):
    """P pairs of responses to the same prompt, better and worse, as indices (P,) int64 into the responses."""

    chosen: Tensor
    rejected: Tensor
    prompt: Tensor  # (P,) int64: which prompt
    weight: Tensor  # (P,) float32: 1 / pairs of its prompt, so that with denominator = prompts each prompt counts once


def ranked_pairs(quality: Tensor, cu_groups: Tensor) -> RankedPairs:
    """All pairs of responses to one prompt whose quality differs, the better one as chosen; ties are dropped.

    quality    (S,) number, larger is better: a rank from below, a rating, votes; NaN: the response is in no pair
    cu_groups  (G + 1,) int: the responses to prompt g are cu_groups[g] to cu_groups[g + 1]

    In order of the first response, then of the second. How many pairs there are is read: on a GPU a host sync.
    Raises  ValueError, TypeError. Source: arXiv:2203.02155 (all pairs of k); ties: the code of arXiv:2306.01693.
    """
    check_tensor("quality", quality, dtypes=(*FLOATS, torch.int32, torch.int64))
    if quality.dim() != 1:
        fail("quality", "have shape (S,)", tuple(quality.shape))
    check_cu_seqlens(cu_groups, quality.shape[0], quality, name="cu_groups", of="responses")
    first, second, prompt = all_pairs(cu_groups, quality.shape[0])
    up, down = quality[first] > quality[second], quality[first] < quality[second]
    kept = up | down
    chosen, rejected = torch.where(up, first, second)[kept], torch.where(up, second, first)[kept]
    prompt = prompt[kept]
    counts = torch.zeros(cu_groups.shape[0] - 1, dtype=torch.int64, device=quality.device)
    counts = counts.index_add(0, prompt, torch.ones_like(prompt))
    return RankedPairs(chosen, rejected, prompt, 1 / counts[prompt].float())


def all_pairs(cu_groups: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """(i, j, group), int64 each: every i < j inside a group."""
    group = segment_ids(cu_groups, total)
    place = torch.arange(total, device=cu_groups.device)
    after = cu_groups.long()[1:][group] - place - 1  # partners that follow in the group
    first = place.repeat_interleave(after)
    start = after.cumsum(0) - after
    second = first + 1 + torch.arange(len(first), device=first.device) - start[first]
    return first, second, group[first]


def pick_scores(
    x: TokenTensor,
    *,
    mask: TokenTensor | None = None,
    cu_seqlens: Tensor | None = None,
    pick: str = "last",
    token_weight: TokenTensor | None = None,
) -> Tensor:
    """One score a response from the scores of its tokens; or one vector from its tokens' hidden states.

        "last"  that of the last token which mask keeps
        "mean"  Σ w_t x_t / Σ w_t, 0 where Σ w_t = 0        "sum"  Σ w_t x_t

    x             (S,) or a pair of (P,) without mask and cu_seqlens: scores of responses, returned as (S,).
                  (B, T) or a pair of them with mask, (N,) with cu_seqlens: token scores.
                  (B, T, D), or (N, D) with cu_seqlens: hidden states. A linear head then scores S rows, not all tokens
    mask          bool, the tokens of the response: left or right padding, holes
    token_weight  as mask, float, a constant: of "mean" and "sum", for example a pivot mask

    Returns (S,), or (S, D). A response without a token has 0 and no gradient. Rows that are not picked are ignored.
    """
    check_one_of("pick", pick, PICKS)
    parts = tuple(x) if isinstance(x, (tuple, list)) else (x,)
    if not parts:
        fail("scores", "be a tensor or a pair of them", "0 of them", TypeError)
    for part in parts:
        check_tensor("scores", part)
    if cu_seqlens is None and all(part.dim() == 1 for part in parts):
        return _plain(parts, mask, token_weight)
    if pick == "last" and token_weight is not None:
        fail("token_weight", "be None with pick='last'", "a tensor")
    deep = len(parts) == 1 and parts[0].dim() == (3 if cu_seqlens is None else 2)
    bare = mask is None and cu_seqlens is None and len(parts) == 1
    if bare and parts[0].shape[1:] == (2,) and not torch.compiler.is_compiling():
        said = "scores of shape (B, 2) without a mask are taken as two tokens of each of B responses"
        warn_once("pick_scores", f"{said}. Scores of chosen and rejected responses go in as a pair: scores.unbind(1)")
    layout = parts[0][..., 0] if deep else x
    tokens = flatten(layout, mask, cu_seqlens, name="scores")
    values = parts[0].reshape(-1, parts[0].shape[-1]) if deep else tokens.x
    if pick == "last":
        return _last(values, tokens)
    weight = None if token_weight is None else flatten_like(token_weight, tokens, "token_weight").detach()
    weight = sequence_weights(weight, tokens, "kept" if pick == "mean" else False)
    if not deep:
        return sequence_scores(values, weight, tokens)
    refuse_transforms("scores", values)
    rows = segment_ids(tokens.cu_seqlens, values.shape[0])
    each = weight[:, None] * torch.where(weight[:, None] != 0, values, 0)
    return each.new_zeros(tokens.segments, values.shape[1]).index_add(0, rows, each)


def _plain(parts, mask, token_weight) -> Tensor:
    if len(parts) == 1:
        _refuse_tokens(mask, token_weight)
        return parts[0]
    return torch.cat(plain_pair(parts, mask, token_weight))


def _refuse_tokens(mask, token_weight) -> None:
    for name, given in (("mask", mask), ("token_weight", token_weight)):
        if given is not None:
            fail(name, "be None for one score a response", "a tensor")


def _last(values: Tensor, tokens) -> Tensor:
    """values (N,) or (N, D) at the last kept token of each sequence, 0 for one without."""
    bounds = tokens.cu_seqlens.long()
    if tokens.mask is None:
        last, some = bounds[1:] - 1, bounds[1:] > bounds[:-1]
    else:
        kept = torch.nn.functional.pad(tokens.mask.cumsum(0), (1, 0))  # before each place
        some = kept[bounds[1:]] > kept[bounds[:-1]]
        last = torch.searchsorted(kept, kept[bounds[1:]]) - 1
    if not values.shape[0]:
        return values.new_zeros(tokens.segments, *values.shape[1:]) + values.sum()
    picked = values[last.clamp(min=0)]
    return torch.where(some if values.dim() == 1 else some[:, None], picked, 0)


def plain_pair(scores, mask=None, token_weight=None) -> tuple[Tensor, Tensor]:
    """(P,) and (P,), as they were given: one score a response."""
    _refuse_tokens(mask, token_weight)
    if len(scores) != 2:
        fail("scores", "be a tensor or a pair of them", f"{len(scores)} of them", TypeError)
    check_tensor("scores", scores[0])
    check_tensor("scores", scores[1], shape=scores[0].shape, like=scores[0])
    for x in scores:
        refuse_transforms("scores", x)
    dtype = torch.promote_types(scores[0].dtype, scores[1].dtype)
    return scores[0].to(dtype), scores[1].to(dtype)


def score_pairs(scores: Tensor, pairs: str | RankedPairs) -> tuple[Tensor, Tensor]:
    """Scores (P,) of the chosen and of the rejected responses."""
    refuse_transforms("scores", scores)
    if scores.dim() != 1:
        fail("scores", "be one number a response (S,)", tuple(scores.shape))
    if isinstance(pairs, RankedPairs):
        check_tensor("pairs.chosen", pairs.chosen, dtypes=(torch.int64,))
        for name, index in (("pairs.chosen", pairs.chosen), ("pairs.rejected", pairs.rejected)):
            check_tensor(name, index, dtypes=(torch.int64,), shape=pairs.chosen.shape, like=scores)
            if reads_values(index) and len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(scores):
                fail(name, f"hold indices in [0, {len(scores)})", int(index.max()))
        return scores[pairs.chosen], scores[pairs.rejected]
    check_one_of("pairs", pairs, ("halves", "interleaved"))
    if scores.shape[0] % 2:
        fail("scores", "be those of pairs, an even number", scores.shape[0])
    if pairs == "interleaved":
        return scores[0::2], scores[1::2]
    return scores[: len(scores) // 2], scores[len(scores) // 2 :]

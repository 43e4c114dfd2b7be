"""From tokens to sequences and from items to a batch: the two averages, each under its own word."""

import torch
from torch import Tensor

from ..formulas import segments as formula
from ..ops._check import check_number, check_one_of, check_plain, check_tensor, fail, number, reads_values
from ..ops._layout import Tokens, flatten_like
from ..ops._once import once
from ..ops.segments import segment_broadcast, segment_sum
from ..ops.sequence_loss import over_count

AVERAGES = (False, "kept", "all", "segments")
REDUCTIONS = ("mean", "sum", "none")
TOKEN_REDUCTIONS = ("token", "token_global", "sequence", "sequence_sum", "constant")


def check_average(average, segment_ids=None) -> None:
    check_one_of("average", average, AVERAGES)
    if (average == "segments") != (segment_ids is not None):
        wanted = "be given with average='segments'" if segment_ids is None else "be None but for average='segments'"
        fail("segment_ids", wanted, "None" if segment_ids is None else f"average={average!r}")


def sequence_weights(token_weight: Tensor | None, tokens: Tokens, average, segment_ids=None) -> Tensor:
    """w (N,), the weight of each token in its sequence's score Σ_t w_t x_t; 0 where the mask is false.

    average False       w_t = token_weight_t
    average "kept"      w_t = token_weight_t / Σ token_weight over the sequence's mask (0 where that is 0)
    average "all"       w_t = token_weight_t / max(1, number of the sequence's mask tokens)
    average "segments"  w_t = token_weight_t / (J Σ token_weight over its segment), J the sequence's segments in which
                        that sum is not 0: the mean of segment means. 0 for a token of no segment
    """
    ones = torch.ones_like(tokens.x, dtype=torch.promote_types(tokens.x.dtype, torch.float32))
    weight = ones if token_weight is None else token_weight.to(ones.dtype)
    weight = weight if tokens.mask is None else torch.where(tokens.mask, weight, 0)
    if average is False:
        return weight
    if average == "segments":
        return _balanced(weight, tokens, segment_ids)
    total = segment_sum(weight if average == "kept" else ones, tokens.cu_seqlens, mask=tokens.mask)
    total = torch.where(total == 0, 1, total)
    return weight / segment_broadcast(total, tokens.cu_seqlens, total=tokens.x.shape[0])


def _balanced(weight: Tensor, tokens: Tokens, segment_ids) -> Tensor:
    """Weights (N,) of the mean of segment means; segment_ids (N,) do not decrease in a sequence, -1 is no segment."""
    ids, total = flatten_like(segment_ids, tokens, "segment_ids", (torch.int32, torch.int64)).long(), weight.shape[0]
    inside = ids >= 0 if tokens.mask is None else (ids >= 0) & tokens.mask
    # one number per (sequence, segment) that grows along the batch; a token of none takes the one before it
    first = torch.bucketize(torch.arange(total, device=ids.device), tokens.cu_seqlens[1:], right=True) * (total + 1)
    own = torch.where(inside, first + ids.clamp(max=total - 1) + 1, first)
    key = own.cummax(0).values if total else own
    if reads_values(ids) and bool((inside & ((key != own) | (ids >= total))).any()):
        fail("segment_ids", f"not decrease in a sequence and lie in [-1, {total})", "ids that do not")
    starts = torch.ones_like(inside)
    starts[1:] = key[1:] != key[:-1]
    run = starts.cumsum(0) - 1
    ends = torch.searchsorted(run, torch.arange(total + 1, device=run.device))
    weight = torch.where(inside, weight, 0)
    sums = segment_sum(weight, ends)[run]
    segments = segment_sum((starts & (sums != 0)).to(weight.dtype), tokens.cu_seqlens)
    share = segment_broadcast(segments, tokens.cu_seqlens, total=total) * sums
    return weight / torch.where(share == 0, 1, share)


def sequence_scores(x: Tensor, weight: Tensor, tokens: Tokens) -> Tensor:
    """Σ_t w_t x_t of each sequence (S,). By selection: where the mask is false or w_t is 0, x may be NaN."""
    return segment_sum(weight * torch.where(weight != 0, x, 0), tokens.cu_seqlens)


def has_tokens(tokens: Tokens) -> Tensor:
    """(S,) bool: whether a sequence has a token that the mask keeps."""
    return segment_sum(torch.ones_like(tokens.x), tokens.cu_seqlens, mask=tokens.mask) > 0


def reduce(items: Tensor, reduction: str, denominator, counted: Tensor | None = None, given: bool = True) -> Tensor:
    """Batch loss of items (S,): "mean", "sum" or "none"; a denominator divides the sum in place of the number of items.

    given: denominator is the caller's, whose values are checked, and not a count made here.
    counted (S,) bool leaves items out of numerator and denominator. No item at all, and a denominator that is a tensor
    of 0 (the whole step has none), give 0, connected to the graph.
    """
    if reduction not in REDUCTIONS:
        fail("reduction", f"be one of {REDUCTIONS}", repr(reduction))
    if counted is not None:
        items = torch.where(counted, items, 0)
    if reduction == "none":
        if denominator is not None:
            fail("denominator", "be None with reduction='none'", repr(denominator))
        return items
    total = items.sum()
    if denominator is not None:
        return over_count(total, check_denominator(denominator, given=given))
    if reduction == "sum":
        return total
    return total / (counted.sum().clamp(min=1) if counted is not None else max(1, items.numel()))


def plain_denominator(reduction: str, denominator, items: int, given: bool = True) -> float | Tensor | None:
    """What `reduce` divides the sum of all items by, where it divides one sum at all."""
    if reduction not in ("mean", "sum"):
        return None
    if denominator is not None:
        return check_denominator(denominator, given=given)
    return 1 if reduction == "sum" else max(1, items)


def check_token_reduction(reduction: str, average: str, denominator, max_length) -> None:
    """What `token_shares` needs, before any tensor is read."""
    if reduction not in TOKEN_REDUCTIONS:
        fail("reduction", f"be one of {TOKEN_REDUCTIONS}", repr(reduction))
    if average not in ("all", "kept"):
        fail("average", "be 'all' or 'kept'", repr(average))
    if reduction == "token_global" and denominator is None:
        fail("denominator", "be the number of tokens of the whole step for 'token_global' ('token' counts them)", None)
    if (reduction == "constant") != (max_length is not None):
        wanted = "be given with reduction='constant'" if max_length is None else "be None but for reduction='constant'"
        fail("max_length", wanted, repr(max_length))


def token_shares(
    tokens: Tokens, reduction: str, weight: Tensor | None = None, *, denominator=None, max_length=None, count_empty=True
) -> Tensor:
    """c (N,), the share of each token in a batch's loss Σ c_t ℓ_t; 0 where the mask is false.

    "token", "token_global"  1 / Σ weight of the batch
    "sequence"               1 / (B Σ weight of the sequence)
    "sequence_sum"           1 / B
    "constant"               1 / (B max_length)

    weight (N,) counts tokens, 0 where the mask is false; None: every mask token is one. A sum of 0 counts as 1.
    B is the number of sequences; without count_empty, of those that have a token. denominator replaces the batch's
    Σ weight, or B.
    """
    if weight is None:
        weight = read(torch.ones_like(tokens.x), tokens)
    if reduction in ("token", "token_global"):
        total = one_for_none(weight.sum()) if denominator is None else check_denominator(denominator)
        return _one_over(total, tokens)
    if denominator is not None:
        rows = check_denominator(denominator)
    else:
        rows = max(1, tokens.segments) if count_empty else has_tokens(tokens).sum().clamp(min=1)
    if reduction == "sequence_sum":
        return _one_over(rows, tokens)
    if reduction == "constant":
        return _one_over(rows * check_denominator(max_length, "max_length"), tokens)
    lengths = one_for_none(segment_sum(weight, tokens.cu_seqlens))
    each = rows * lengths
    each = torch.where(each == 0, 0, 1 / each)  # a whole step of none
    return segment_broadcast(each, tokens.cu_seqlens, total=tokens.x.shape[0], mask=tokens.mask)


def _one_over(total, tokens: Tokens) -> Tensor:
    """(N,): 1 / total where the mask is true, 0 elsewhere, even if total is NaN."""
    dtype = wide_of(tokens)
    if isinstance(total, Tensor):
        total = total.to(dtype)
        share = torch.where(total == 0, 0, 1 / total)  # a whole step of none
    else:
        share = torch.full((), 1 / total, dtype=dtype, device=tokens.x.device)
    return share.expand(tokens.x.shape) if tokens.mask is None else torch.where(tokens.mask, share, 0)


def one_for_none(total: Tensor) -> Tensor:
    return torch.where(total == 0, 1, total)


def check_denominator(denominator, name: str = "denominator", given: bool = True):
    """A number > 0, or a tensor with one element: a global count, say; 0 gives a loss of 0, NaN goes through.

    One on a GPU is not read. On a CPU a negative one, which would reverse the loss, is refused, and an infinite one.
    """
    if isinstance(denominator, Tensor):
        check_plain(name, denominator)
        if denominator.numel() != 1:
            fail(name, "hold one number", f"shape {tuple(denominator.shape)}")
        if given and reads_values(denominator):
            value = denominator.item()
            if value < 0 or value == float("inf"):
                fail(name, "hold a finite number of at least 0", value)
        return denominator.detach().reshape(())
    count = number(denominator)
    if count is None or not 0 < count < float("inf"):
        fail(name, "be a finite number > 0 or a tensor with one element", repr(denominator))
    return check_number(name, count, positive=True)


def wide_of(tokens: Tokens) -> torch.dtype:
    """float32, or float64 for float64: what sums and losses are taken in."""
    return torch.promote_types(tokens.x.dtype, torch.float32)


def read(x: Tensor, tokens: Tokens) -> Tensor:
    """(N,) as a constant, in the dtype of the sums; 0 where the mask is False, even if x is NaN there."""
    x = x.detach().to(wide_of(tokens))
    return x if tokens.mask is None else torch.where(tokens.mask, x, 0)


def per_token(name: str, x, tokens: Tokens) -> Tensor:
    """`read` of one number per token, or of one per sequence: (S,) or (S, 1)."""
    check_plain(name, x)
    rows, shape = tokens.segments, tuple(x.shape) if isinstance(x, Tensor) else None
    if shape not in ((rows,), (rows, 1)) or shape == tokens.shapes[0] == (rows, 1):
        return read(flatten_like(x, tokens, name), tokens)
    check_tensor(name, x, like=tokens.x)
    each = x.detach().reshape(-1).to(wide_of(tokens))
    if shape == tokens.shapes[0]:
        each = _if_single(name, each, tokens)
    return segment_broadcast(each, tokens.cu_seqlens, total=tokens.x.shape[0], mask=tokens.mask)


def _if_single(name: str, x: Tensor, tokens: Tokens) -> Tensor:
    """x of a flat batch with as many sequences as tokens: one number each is clear only where each has one token."""
    single = (tokens.cu_seqlens == torch.arange(len(x) + 1, device=x.device)).all()
    if reads_values(x) and not bool(single):
        fail(name, f"have shape ({len(x)}, 1) where tokens and sequences are as many", tuple(x.shape))
    return torch.where(single, x, torch.nan)


def same_in_rows(name: str, x: Tensor, tokens: Tokens, of: str) -> Tensor:
    """x (N,), which must not change inside a sequence: refused on a CPU, on a GPU such a sequence gets NaN."""
    rows = formula.segment_ids(tokens.cu_seqlens, x.shape[0])
    ends = []
    for how, none in (("amax", -torch.inf), ("amin", torch.inf)):
        seen = x if tokens.mask is None else torch.where(tokens.mask, x, none)
        ends.append(seen.new_full((tokens.segments,), none).scatter_reduce(0, rows, seen, how))
    changes = ends[0] > ends[1]
    if reads_values(x) and bool(changes.any()):
        fail(name, f"be one number per sequence for {of}", f"several in sequence {int(changes.nonzero()[0])}")
    return torch.where(changes[rows], torch.nan, x)


def weigh(weight: Tensor, x: Tensor) -> Tensor:
    """weight · x, and 0 where the weight is 0, even if x is NaN there."""
    return torch.where(weight != 0, weight * x, 0)


def mean_of_tokens(x: Tensor, tokens: Tokens) -> Tensor:
    """() over the tokens that the mask keeps, 0 where it keeps none. x is 0 (or False) elsewhere."""
    count = max(1, x.numel()) if tokens.mask is None else tokens.mask.sum().clamp(min=1)
    return x.sum(dtype=wide_of(tokens)) / count


class FromTokens(torch.autograd.Function):
    """A batch's loss () whose gradients are known: dx and dy (N,), with respect to x and, where it is given, y."""

    @staticmethod
    def forward(ctx, name, x, y, loss, dx, dy):
        ctx.name = name
        ctx.save_for_backward(x, y, dx, dy)
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        x, y, dx, dy = ctx.saved_tensors
        grads = tuple(
            None if d is None else torch.where(d != 0, d * upstream, 0).to(of.dtype) for of, d in ((x, dx), (y, dy))
        )
        grads = once(ctx.name, grads, (x, y, upstream), instead="use torch's own arithmetic")
        return None, *grads, None, None, None

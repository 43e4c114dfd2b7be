"""Sequences split over ranks (context parallelism): which tokens a rank holds, and their numbers from all ranks.

Numbers of tokens are small beside hidden states: 4 bytes each. So a scan, a pivot or a loss over whole sequences needs
no form of its own over ranks: log-probs, rewards and masks are gathered, every rank computes the same thing, and keeps
its own tokens of it.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from . import _parallel, segments
from ._check import FLOATS, check_flags, check_integer, check_one_of, check_tensor, fail
from ._layout import check_cu_seqlens
from .ranks import NUMBERS, gather_rows

LAYOUTS = ("contiguous", "zigzag")


class ContextShard:
    """The tokens of a batch whose sequences are split over the ranks of a group.

        "contiguous"  a sequence is cut in R chunks, rank r holds chunk r
        "zigzag"      in 2 R chunks, rank r holds chunks r and 2R - 1 - r: causal attention is shared evenly

    tokens  what is cut. T: the rows of a padded batch (B, T); a rank holds (B, n). cu_seqlens (S + 1,) int32 or int64:
            every sequence of a packed batch (N,); a rank holds (n,), those of sequence 0 first, as in Megatron-Core
            and Transformer Engine. Where the packed batch is cut as a whole: torch.tensor([0, N])
    group   torch.distributed.ProcessGroup, None: all ranks
    layout  "contiguous" or "zigzag"

    Chunks have ceil(length / chunks) tokens; where that does not divide, the last ones are shorter or empty. A rank
    without tokens takes part in every collective. The constructor reads cu_seqlens on the host, once for a batch.

        shard = ContextShard(T, group, layout="zigzag")
        labels = shard.next(input_ids)                             # (B, n): the next token may live on another rank
        logp = linear_logprobs(hidden, weight, labels).logp        # (B, n), of the rank's own tokens
        logp, mask = shard.gather(logp, labels != -100)            # (B, T), on every rank
        loss = preference_loss("simpo", logp, mask=mask).loss      # the same on every rank
        advantages = shard.local(gae(*shard.gather(rewards, values), mask=mask).advantages)         # (B, n)

    Gradients: every rank computes the same loss, so that the gradient of a rank's tokens is its part of the whole one's
    and needs no collective. Gradients of parameters add up over the ranks; where DDP or FSDP average over these ranks
    too, multiply the loss by their number.
    """

    def __init__(self, tokens: int | Tensor, group=None, *, layout: str = "contiguous"):
        check_one_of("layout", layout, LAYOUTS)
        _parallel.check_group(group)
        self.group, self.layout = group, layout
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.packed = isinstance(tokens, Tensor)  # whether sequences are packed, rather than padded
        if self.packed:
            check_cu_seqlens(tokens, None, tokens, name="tokens")
            bounds = tokens.long()
        else:
            tokens = check_integer("tokens", tokens, "be the length T of the rows, or cu_seqlens (S + 1,)", least=0)
            bounds = torch.tensor([0, tokens])
        self.bounds = bounds  # cu_seqlens of what is cut
        self.total = int(bounds[-1])  # T, or the N tokens of a packed batch
        place = torch.arange(self.total, device=bounds.device)
        sequence = torch.searchsorted(bounds, place, right=True) - 1
        chunks = self.ranks if layout == "contiguous" else 2 * self.ranks
        size = ((bounds.diff() + chunks - 1) // chunks)[sequence]
        chunk = (place - bounds[sequence]) // size
        owner = chunk if layout == "contiguous" else torch.minimum(chunk, 2 * self.ranks - 1 - chunk)
        self._order = torch.argsort(owner, stable=True)  # places of rank 0's tokens, of rank 1's, and so on
        self._back = torch.argsort(self._order)
        self.sizes = torch.bincount(owner, minlength=self.ranks).tolist()  # tokens of each rank
        first = sum(self.sizes[: self.rank])
        self.index = self._order[first : first + self.sizes[self.rank]]  # (n,): places of this rank's tokens, ascending
        self._heads = self._chunk_heads(owner)

    def _chunk_heads(self, owner: Tensor) -> tuple[Tensor, int, Tensor]:
        """Which of this rank's tokens another may need, most of them on a rank, and where each token's next one is.

        The next one is at (n,), an index of this rank's n tokens followed by what all ranks hand in.
        """
        cut = torch.ones_like(owner, dtype=torch.bool)
        cut[1:] = owner[1:] != owner[:-1]
        handed = cut[self._order]  # in the order of ranks
        count = [int(part.sum()) for part in handed.split(self.sizes)]
        most = max(count)
        n, after = len(self.index), self.index + 1
        slot = torch.zeros_like(owner)  # of each place, in what was handed in
        heads = self._order[handed]
        rank_of = owner[heads]
        starts = torch.tensor([0, *count], device=owner.device).cumsum(0)
        slot[heads] = n + rank_of * most + torch.arange(len(heads), device=owner.device) - starts[rank_of]
        inside = after < self.total
        after = torch.where(inside, after, 0)
        mine = inside & (owner[after] == self.rank) if self.total else inside
        here = torch.arange(n, device=owner.device) + 1
        source = torch.where(mine, here, slot[after] if self.total else here)
        own = cut[self.index].nonzero()[:, 0]
        return own, most, source

    # ---- tokens of a rank and of all -------------------------------------------------------------------------------

    def local(self, x: Tensor) -> Tensor:
        """This rank's tokens (B, n, ...) of whole sequences (B, T, ...), or (n, ...) of (N, ...). Differentiable."""
        self._check("x", x, self.total, "whole")
        return x.index_select(self._dim, self._at(x, self.index))

    def gather(self, *x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Whole sequences (B, T, ...) from the tokens (B, n, ...) of all ranks; (N, ...) from (n, ...).

        One all-gather for all of x, of their bytes a token; one tensor for one. Differentiable in floats, where every
        rank computes the same loss from what it gets.
        """
        if not x:
            fail("x", "hold a tensor", "none")
        for k, one in enumerate(x):
            self._check(f"x[{k}]", one, len(self.index), "this rank's", like=x[0] if k else None)
            if not self.packed and one.shape[0] != x[0].shape[0]:
                fail(f"x[{k}]", f"have {x[0].shape[0]} rows, as x[0]", tuple(one.shape))
        found = _Gather.apply(self, *x)
        return found[0] if len(x) == 1 else found

    def next(self, x: Tensor, fill: float = -100, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """x of the token that follows, fill at the last token of a sequence: labels of input_ids.

        x           (B, n) or (n,), numbers of this rank's tokens. One all-gather of the first token of every chunk
        cu_seqlens  (S + 1,): where sequences end, in places of the whole batch; None: as they are cut
        """
        self._check("x", x, len(self.index), "this rank's")
        own, most, source = (self._at(x, h) if isinstance(h, Tensor) else h for h in self._heads)
        flat = x.detach().movedim(self._dim, 0)
        handed = flat.new_zeros(most, *flat.shape[1:])
        handed[: len(own)] = flat[own]
        pool = torch.cat([flat, _parallel.all_gather(handed, self.group).flatten(0, 1)])
        last = self._at(x, self._ends(cu_seqlens)) - 1
        kept = ~torch.isin(self._at(x, self.index), last)
        after = pool[torch.where(kept, source.clamp(max=len(pool) - 1), 0)] if len(source) else flat
        return torch.where(kept.view(-1, *[1] * (flat.dim() - 1)), after, fill).to(x.dtype).movedim(0, self._dim)

    # ---- sums of sequences -----------------------------------------------------------------------------------------

    def segment_sum(self, x: Tensor, cu_seqlens: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        """The sum of each whole sequence from this rank's tokens. One all-gather of 16 bytes a sequence and rank.

        x           (B, n), or (n,); float
        cu_seqlens  (S + 1,), of a packed batch: its sequences, in places of the whole batch; None: as they are cut
        mask        bool, as x

        Returns (S,) float32 (float64), the same on all ranks: sums in float64, added in the order of the ranks.
        """
        total, _ = self._sums(x, cu_seqlens, mask)
        return total.to(_result(x))

    def segment_mean(self, x: Tensor, cu_seqlens: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        """The mean of each whole sequence over the tokens that mask keeps, 0 where it keeps none. As segment_sum."""
        total, count = self._sums(x, cu_seqlens, mask)
        return (total / count.clamp(min=1)).to(_result(x))

    def _sums(self, x: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(S,) float64 each: sums over all ranks, and how many tokens they are of."""
        self._check("x", x, len(self.index), "this rank's", dtypes=FLOATS)
        if x.dim() != 2 - self.packed:
            fail("x", "have shape (n,)" if self.packed else "have shape (B, n)", tuple(x.shape))
        kept = (
            torch.ones_like(x, dtype=torch.bool) if mask is None else check_flags("mask", mask, shape=x.shape, like=x)
        )
        if self.packed:
            ends = torch.searchsorted(self.index, self._ends(cu_seqlens))
            own = self._at(x, ends)
        elif cu_seqlens is not None:
            fail("cu_seqlens", "be None for a padded batch", "a tensor")
        else:
            own = torch.arange(len(x) + 1, device=x.device) * x.shape[1]
        options = dict(mask=kept.reshape(-1))
        total = segments.segment_sum(x.reshape(-1).double(), own, **options)
        count = segments.segment_sum(kept.reshape(-1).double(), own)
        return _Sum.apply(self, total, count)

    def _ends(self, cu_seqlens: Tensor | None) -> Tensor:
        if cu_seqlens is None:
            return self.bounds
        check_cu_seqlens(cu_seqlens, self.total, cu_seqlens)
        return self._at(self.bounds, cu_seqlens).long()

    # ---- small things ----------------------------------------------------------------------------------------------

    @property
    def _dim(self) -> int:
        return 0 if self.packed else 1

    def _check(self, name, x, length, whose, *, dtypes=NUMBERS, like=None) -> None:
        check_tensor(name, x, dtypes=dtypes, like=like)
        if x.dim() <= self._dim or x.shape[self._dim] != length:
            tokens = f"({length}, ...)" if self.packed else f"(B, {length}, ...)"
            fail(name, f"have shape {tokens}, {whose} tokens", tuple(x.shape))

    @staticmethod
    def _at(x: Tensor, index: Tensor) -> Tensor:
        return index if index.device == x.device else index.to(x.device)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shard, *x):
        ctx.shard = shard
        got = gather_rows(tuple(one.movedim(shard._dim, 0) for one in x), shard.sizes, shard.group)
        back = shard._at(got[0], shard._back)
        whole = [one[back].movedim(0, shard._dim) for one in got]
        ctx.mark_non_differentiable(*(y for y in whole if not y.dtype.is_floating_point))
        ctx.set_materialize_grads(False)
        return tuple(whole)

    @staticmethod
    def backward(ctx, *grads):
        shard = ctx.shard
        own = (None if g is None else g.index_select(shard._dim, shard._at(g, shard.index)) for g in grads)
        return None, *own


class _Sum(torch.autograd.Function):
    """Sums of the ranks' parts, in their order. The loss is one on all ranks: a part has the gradient of the sum."""

    @staticmethod
    def forward(ctx, shard, total, count):
        parts = _parallel.all_gather(torch.stack([total, count]), shard.group)
        whole = parts[0].clone()
        for part in parts[1:]:
            whole += part
        ctx.mark_non_differentiable(whole[1])
        return whole[0], whole[1]

    @staticmethod
    def backward(ctx, dtotal, _):
        return None, dtotal, None


def _result(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32

"""InfoNCE row block by row block: neither the (N, M) similarities nor their softmax are ever kept.

    S_ij = cos(query_i, key_j) / temperature       loss_i = logsumexp_j S_ij - S_io,  o = start + i, the row's own key

A block of queries meets all keys, so that its rows are complete: their softmax and both gradients follow at once, three
matrix products in all, as many as without blocks. Gradients are made in forward and handed out in the first backward; a
second one makes them anew.
"""

import torch
from torch import Tensor

from ..formulas.contrast import FLOOR, norm
from ._once import once, refuse_transforms

BLOCK = 2**22  # similarities at a time: 16 MiB in float32


def info_nce(queries: Tensor, keys: Tensor, *, temperature: float, start: int = 0, mirrored: bool = False):
    """Σ losses (), losses (N,), hits (N,): whether the row's own key is the nearest.

    queries   (N, D), keys (M, D) of the same dtype; keys[start + i] is the other view of queries[i]
    mirrored  of rows x and -x alike, of which queries and keys hold one each: a row's keys are all keys and their
              negatives. losses are those of x, equal to those of -x; the sum counts both

    losses and hits are detached. Sums are float32, float64 for float64. A zero row has no gradient.
    """
    refuse_transforms("queries", queries)
    refuse_transforms("keys", keys)
    grad = torch.is_grad_enabled()
    needs = grad and queries.requires_grad, grad and keys.requires_grad
    return _InfoNCE.apply(queries, keys, temperature, start, mirrored, needs)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, keys, temperature, start, mirrored, needs):
        losses, hits, ctx.grads = _blocks(queries, keys, temperature, start, mirrored, needs)
        ctx.save_for_backward(queries, keys)
        ctx.numbers = temperature, start, mirrored, needs
        ctx.mark_non_differentiable(losses, hits)
        return losses.sum() * (2 if mirrored else 1), losses, hits

    @staticmethod
    def backward(ctx, upstream, *_):
        queries, keys = ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            grads = _blocks(queries, keys, *ctx.numbers)[2]
        grads = tuple(
            None if d is None else d.mul_(upstream.detach()).to(x.dtype)
            for d, x in zip(grads, (queries, keys), strict=True)
        )
        grads = once("contrastive_loss", grads, (queries, keys, upstream), instead="use formulas.contrast")
        return *grads, None, None, None, None


def _blocks(queries, keys, temperature, start, mirrored, needs):
    """losses, hits, and the gradients of Σ losses that are needed, in the dtype of the sums."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(keys.device.type, enabled=False):  # sums are those of `wide`
        keys = keys.detach().to(wide)
        queries = queries.detach()
        (n, width), m = queries.shape, keys.shape[0]
        key_scale, key_live = _lengths(keys)
        columns = key_scale / temperature
        losses, hits = (torch.empty(n, dtype=wide, device=keys.device) for _ in range(2))
        dqueries = torch.empty(n, width, dtype=wide, device=keys.device) if needs[0] else None
        dkeys = torch.zeros(m, width, dtype=wide, device=keys.device) if needs[1] else None
        rows = max(1, min(n, BLOCK // max(1, m)))
        for low in range(0, n, rows):
            high = min(low + rows, n)
            block = queries[low:high].to(wide)
            scale, live = _lengths(block)
            block = block * scale[:, None]
            similar = (block @ keys.T).mul_(columns)
            own = torch.arange(start + low, start + high, device=keys.device)[:, None]
            losses[low:high], hits[low:high] = _softmax(similar, own, mirrored)  # similar is d loss / d similar now
            if not any(needs):
                continue
            similar.mul_(columns)
            if mirrored:
                similar.mul_(2)
            if needs[1]:
                dkeys.addmm_(similar.T, block)
            if needs[0]:
                push = similar @ keys
                push.addcmul_((push * block).sum(1, keepdim=True), block, value=-1).mul_(scale[:, None])
                dqueries[low:high] = push.mul_(live[:, None])
        if needs[1]:
            for low in range(0, m, rows):  # across the key alone: its length does not count
                part, push = keys[low : low + rows] * key_scale[low : low + rows, None], dkeys[low : low + rows]
                push.addcmul_((push * part).sum(1, keepdim=True), part, value=-1).mul_(key_live[low : low + rows, None])
    return losses, hits, (dqueries, dkeys)


def _softmax(similar: Tensor, own: Tensor, mirrored: bool) -> tuple[Tensor, Tensor]:
    """Loss and hit of each row; similar (b, M) becomes softmax less 1 at the row's own key, mirrored keys subtracted.

    Everything is relative to the own key, whose e^0 stands apart: a loss near 0 keeps its digits.
    """
    mine = similar.gather(1, own)
    minus = -similar - mine if mirrored else None
    similar.sub_(mine).scatter_(1, own, -torch.inf)
    top = similar.amax(1, keepdim=True).clamp(min=0)
    if mirrored:
        top = torch.maximum(top, minus.amax(1, keepdim=True))
        minus.sub_(top).exp_()
    similar.sub_(top).exp_()
    others = similar.sum(1, keepdim=True)
    if mirrored:
        others = others + minus.sum(1, keepdim=True)
        similar.sub_(minus)
    total = others + (-top).exp()
    losses = torch.where(top == 0, others.log1p(), top + total.log())
    similar.div_(total)
    pull = -others / total if not mirrored else similar.gather(1, own) - others / total
    similar.scatter_(1, own, pull)
    return losses[:, 0], (top == 0)[:, 0].to(losses.dtype)


def _lengths(x: Tensor) -> tuple[Tensor, Tensor]:
    """1 / length of each row (N,), floored, and 1 where the row is no zero row."""
    length = norm(x)[:, 0]
    return 1 / length.clamp(min=FLOOR), (length >= FLOOR).to(x.dtype)

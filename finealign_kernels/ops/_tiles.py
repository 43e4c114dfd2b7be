"""The passes over logits that exist, tile by tile, of every row backend."""

import torch
from torch import Tensor

from ..formulas import logprobs as formula
from ..formulas.logprobs import Coef, Head
from . import _choose, _chunked


def states(logits: Tensor, target: Tensor, head: Head, want: int, rows: str) -> tuple[Tensor, Tensor, Tensor]:
    """States of a row's spans (N, spans, PARTS), their first maxima (N, spans), the label's logit and slope (N, 2)."""
    kernels, dtype, x = _choose.rows(rows), _chunked.wide(logits.dtype), _unit_stride(logits)
    n, vocab = x.shape
    span = kernels.SPAN or vocab
    part = torch.zeros(n, -(-vocab // span), formula.PARTS, dtype=dtype, device=x.device)
    first = torch.zeros(n, part.shape[1], dtype=torch.int64, device=x.device)
    label = torch.full((n, 2), torch.nan, dtype=dtype, device=x.device)
    for r, c0, c1 in _spans(x, _bounded(kernels.TILE, head, vocab)):
        states = slice(c0 // span, -(-c1 // span))
        state = part[r, states].squeeze(1), first[r, states].squeeze(1), label[r]
        kernels.tile_fwd(_banned(x[r, c0:c1], head.rows(r), c0), None, target[r], c0, head.rows(r), want, *state)
    return part, first, label


def gradient(out: Tensor, logits: Tensor | None, coef: Coef, target: Tensor, head: Head, rows: str) -> None:
    coef, kernels = coef.stacked(), _choose.rows(rows)
    to, source = _unit_stride(out), None if logits is None else _unit_stride(logits)
    for r, c0, c1 in _spans(to, _bounded(kernels.TILE, head, to.shape[1])):
        tile = None if source is None else _banned(source[r, c0:c1], head.rows(r), c0)
        if source is None:
            _chunked.ban(to[r, c0:c1], head.rows(r), c0)
        kernels.tile_bwd(to[r, c0:c1], tile, None, None, None, target[r], coef[:, r].contiguous(), c0, head.rows(r))
    if to is not out:
        out.copy_(to)


def _spans(logits: Tensor, tile) -> list[tuple[slice, int, int]]:
    """The tiles of existing logits: whole rows, or bounded ones where the row kernel makes wide copies."""
    n, vocab = logits.shape
    height, width = tile or (max(n, 1), vocab)
    return [(slice(r0, r1), c0, c1) for c0, c1 in _chunked.spans(vocab, width) for r0, r1 in _chunked.spans(n, height)]


def _bounded(tile: tuple[int, int] | None, head: Head, vocab: int) -> tuple[int, int] | None:
    """The tile, of bounded height where its logits are copied."""
    return (_chunked.tile_of("cpu").rows, vocab) if tile is None and head.support is not None else tile


def _banned(logits: Tensor, head: Head, col0: int) -> Tensor:
    """A tile of logits, -inf outside of the rows' support."""
    if head.support is None:
        return logits
    return logits.masked_fill(formula.outside(head.support, col0, logits.shape[1]), -torch.inf)


def _unit_stride(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()

"""What the token weights changed: the same training with all weights 1, and how far log-probs moved in each."""

from typing import NamedTuple

import torch

from ..ops.logprobs import linear_logprobs
from .data import spans_of_tokens
from .heads import backward, fused_head, leaves
from .models import hidden_states
from .options import lr_of, scores_of


class Effect(NamedTuple):
    """Tokens of one sort, and the mean change of their log-probs in training, in nats."""

    name: str
    tokens: int
    weighted: float
    plain: float  # with all weights 1


def compares(options, batches):
    """Whether the second training says something: weights differ from 1, and no mask changes them on the way."""
    weighted = any((batch.span_weight != 1).any() for batch in batches)
    return options.compare and scores_of(options) is None and weighted


def start_of(model):
    """A copy of the trained parameters."""
    return [parameter.detach().clone() for parameter in model.parameters]


def effects(options, model, batches, start):
    """Effect of each sort of token. The model has had the weighted training, and has had the plain one afterwards."""
    weighted = _moves(model, batches)
    with torch.no_grad():
        for parameter, first in zip(model.parameters, start, strict=True):
            parameter.copy_(first)
    _train_plain(options, model, [_unweighted(batch) for batch in batches])
    plain = _moves(model, batches)
    found = []
    for name, of in _sorts(options, batches):
        if of.any():
            found.append(Effect(name, int(of.sum()), weighted[of].mean().item(), plain[of].mean().item()))
    return found


@torch.no_grad()
def _moves(model, batches):
    """Change of each response token's log-prob since the start, of all batches in a row."""
    moved = []
    for batch in batches:
        logp = linear_logprobs(hidden_states(model, batch), model.weight, batch.labels, mask=batch.mask).logp
        moved.append((logp - batch.start_logp)[batch.mask])
    return torch.cat(moved)


def _unweighted(batch):
    ones = torch.ones_like(batch.span_weight)
    return batch._replace(token_weight=ones, span_weight=ones)


def _train_plain(options, model, batches):
    optimizer = torch.optim.AdamW(model.parameters, lr=lr_of(options), weight_decay=0.0)
    for number in range(options.steps):
        batch = batches[number % len(batches)]
        hidden = hidden_states(model, batch)
        backward(hidden, model.weight, fused_head(options, *leaves(hidden, model.weight), batch))
        optimizer.step()
        optimizer.zero_grad()


def _sorts(options, batches):
    """Name and, of all batches in a row, which response tokens are of that sort."""
    parts = [sorts_of(options, batch) for batch in batches]
    return [
        (name, torch.cat([dict(part)[name][batch.mask] for part, batch in zip(parts, batches, strict=True)]))
        for name, _ in parts[0]
    ]


def sorts_of(options, batch):
    """Tokens by their answer's side and by whether a span marks them: name, (S, T-1) bool."""
    marked, half = torch.zeros_like(batch.mask), len(batch.pairs)
    for s, answer in enumerate(batch.answers):
        marked[s, batch.mask[s]] = torch.tensor([len(spans) > 0 for spans in spans_of_tokens(answer)])
    side = torch.arange(len(batch.answers))[:, None] < half
    chosen = [("chosen, marked", batch.mask & side & marked), ("chosen, not marked", batch.mask & side & ~marked)]
    if options.loss == "nll":
        return chosen
    others = batch.mask & ~side
    return [*chosen, ("rejected, marked", others & marked), ("rejected, not marked", others & ~marked)]

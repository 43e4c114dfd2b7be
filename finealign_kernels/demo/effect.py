"""What the token weights changed: a second training with all weights 1, and how far log-probs moved in each."""

from typing import NamedTuple

import torch

from ..ops.logprobs import linear_logprobs
from .data import spans_of_tokens
from .heads import backward, fused_head, leaves
from .models import hidden_states
from .options import lr_of, scores_of


class Effect(NamedTuple):
    """A group of tokens, and the mean change of their log-probs during training, in nats."""

    name: str
    tokens: int
    weighted: float
    plain: float  # with all weights 1


def compares(options, batches):
    """True if a second training is useful: some weights are not 1, and no mask changes them during training."""
    weighted = any((batch.span_weight != 1).any() for batch in batches)
    return options.compare and scores_of(options) is None and weighted


def copy_parameters(model):
    """A copy of the parameters that are trained."""
    return [parameter.detach().clone() for parameter in model.parameters]


def effects(options, model, batches, start):
    """The Effect on each group of tokens.

    start: the parameters before training. The model comes with the weighted training done, and is left with the plain
    one.
    """
    weighted = _changes(model, batches)
    with torch.no_grad():
        for parameter, first in zip(model.parameters, start, strict=True):
            parameter.copy_(first)
    _train_plain(options, model, [_unweighted(batch) for batch in batches])
    plain = _changes(model, batches)
    found = []
    for name, member in _groups(options, batches):
        if member.any():
            change = weighted[member].mean().item(), plain[member].mean().item()
            found.append(Effect(name, int(member.sum()), *change))
    return found


@torch.no_grad()
def _changes(model, batches):
    """The change of each response token's log-prob since the start, of all batches one after the other."""
    moved = []
    for batch in batches:
        logp = linear_logprobs(hidden_states(model, batch), model.weight, batch.labels, mask=batch.mask).logp
        moved.append((logp - batch.start_logp)[batch.mask])
    return torch.cat(moved)


def _unweighted(batch):
    ones = torch.ones_like(batch.span_weight)
    return batch._replace(token_weight=ones, span_weight=ones)


def _train_plain(options, model, batches):
    from tqdm import tqdm

    optimizer = torch.optim.AdamW(model.parameters, lr=lr_of(options), weight_decay=0.0)
    for number in tqdm(range(options.steps), unit="step", desc=f"{options.loss} with all weights 1, to compare"):
        batch = batches[number % len(batches)]
        hidden = hidden_states(model, batch)
        backward(hidden, model.weight, fused_head(options, *leaves(hidden, model.weight), batch))
        optimizer.step()
        optimizer.zero_grad()


def _groups(options, batches):
    """The name of each group, and which response tokens of all batches, one after the other, are in it."""
    parts = [token_groups(options, batch) for batch in batches]
    return [
        (name, torch.cat([dict(part)[name][batch.mask] for part, batch in zip(parts, batches, strict=True)]))
        for name, _ in parts[0]
    ]


def token_groups(options, batch):
    """Groups of tokens by side (chosen, rejected) and by whether a span marks them: (name, (S, T-1) bool) each."""
    marked, half = torch.zeros_like(batch.mask), len(batch.pairs)
    for s, answer in enumerate(batch.answers):
        marked[s, batch.mask[s]] = torch.tensor([len(spans) > 0 for spans in spans_of_tokens(answer)])
    side = torch.arange(len(batch.answers))[:, None] < half
    chosen = [("chosen, marked", batch.mask & side & marked), ("chosen, not marked", batch.mask & side & ~marked)]
    if options.loss == "nll":
        return chosen
    others = batch.mask & ~side
    return [*chosen, ("rejected, marked", others & marked), ("rejected, not marked", others & ~marked)]

"""Contrastive losses beside a reward model's: two dropout views of the same responses, or of the pairs' differences."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..formulas import contrast as formula
from ..ops._check import check_integer, check_number, check_one_of, check_tensor, fail
from ..ops.contrast import info_nce
from ..ops.sequence_loss import over_count
from .reduce import check_denominator


class ContrastRow(NamedTuple):
    """One loss of the table."""

    equation: str
    source: str
    temperature: float


CONTRAST: dict[str, ContrastRow] = {
    "simcse": ContrastRow(
        "logsumexp_j S_ij - S_ii, S_ij = cos(h_i, h'_j) / τ", "arXiv:2104.08821; arXiv:2401.06080 eq. 9", 0.05
    ),
    "swav": ContrastRow(
        "-Σ_k q_k log p'_k - Σ_k q'_k log p_k, p = softmax(h·c / τ), q = Sinkhorn(h·c / ε)",
        "arXiv:2006.09882; arXiv:2401.06080 eq. 7-8",
        0.1,
    ),
}


class ContrastiveLoss(NamedTuple):
    """loss carries the gradient; the others are detached."""

    loss: Tensor  # ()
    losses: Tensor  # (N,) of this rank's rows
    accuracies: Tensor  # (N,) 1 where the other view is the nearest (simcse), or both views prefer one prototype (swav)


def contrastive_loss(
    name: str,
    first: Tensor,
    second: Tensor,
    *,
    rows: str = "responses",
    pairs: str = "halves",
    temperature: float | None = None,
    prototypes: Tensor | None = None,
    epsilon: float = 0.05,
    iterations: int = 3,
    group: "dist.ProcessGroup | None" = None,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> ContrastiveLoss:
    """The mean over rows i of a contrast between two views h and h' of the same responses:

        "simcse"  logsumexp_j S_ij - S_ii,  S_ij = cos(h_i, h'_j) / τ                                       τ = 0.05
        "swav"    -Σ_k q_ik log p'_ik - Σ_k q'_ik log p_ik,  p = softmax(h·c / τ),  q = Sinkhorn(h·c / ε)    τ = 0.1

    first, second  (N, D) float, representations of the same responses, for example under two dropout masks
    rows           "responses": each is a row. "differences": of P = N/2 pairs, chosen less rejected and its negative
    pairs          how pairs lie, for "differences": "halves" or "interleaved"
    temperature    τ; default: as above
    prototypes     (K, D), of "swav": c, taken as unit vectors; they have a gradient, the codes q have none.
                   In the dtype of first, or float32 beside half precision
    epsilon, iterations   of Sinkhorn, in logarithms
    group          a process group: keys (simcse) and Sinkhorn's sums (swav) are those of all its ranks. The loss is
                   this rank's share, its sum over ranks that of one rank with all rows: a framework that averages
                   gradients needs it times the number of ranks. Gradients cross ranks
    reduction      "mean": over all rows, of all ranks; or "sum". denominator: divides the sum instead

    "simcse" never holds the (N, N) similarities: a block of rows at a time, three matrix products forward and backward.
    A zero row (a pair whose responses are equal) has cosine 0 with every row and no gradient. N = 1, or K = 1, gives 0.
    Returns ContrastiveLoss, float32 (float64 for float64). Add beta_cl · loss to the reward model's loss; the paper's
    are 1 (simcse), 0.1 (swav, K = 50) and 0.5 (swav on differences, K = 20).
    Raises  ValueError, TypeError naming argument, expectation and finding.
    """
    check_one_of("name", name, tuple(CONTRAST))
    check_one_of("rows", rows, ("responses", "differences"))
    check_one_of("pairs", pairs, ("halves", "interleaved"))
    check_one_of("reduction", reduction, ("mean", "sum"))
    temperature = CONTRAST[name].temperature if temperature is None else temperature
    temperature = check_number("temperature", temperature, positive=True)
    if group is not None and not hasattr(group, "rank"):
        fail("group", "be a process group or None", f"a {type(group).__name__}")
    check_tensor("first", first)
    if first.dim() != 2:
        fail("first", "have shape (N, D)", tuple(first.shape))
    check_tensor("second", second, dtypes=(first.dtype,), shape=first.shape, like=first)
    if (name == "swav") == (prototypes is None):
        missing = prototypes is None
        fail("prototypes", f"be {'given' if missing else 'None'} for {name!r}", None if missing else "a tensor")
    mirrored, allowed = rows == "differences", {first.dtype, torch.promote_types(first.dtype, torch.float32)}
    if mirrored:
        first, second = (_differences(x, pairs) for x in (first, second))
    sizes, rank = _sizes(first, group)
    if name == "simcse":
        keys = second if group is None else _Gather.apply(second, group, sizes, rank)
        total, losses, hits = info_nce(first, keys, temperature=temperature, start=sum(sizes[:rank]), mirrored=mirrored)
    else:
        epsilon = check_number("epsilon", epsilon, positive=True)
        iterations = check_integer("iterations", iterations, "be a whole number of at least 1", least=1)
        check_tensor("prototypes", prototypes, dtypes=tuple(allowed), like=first)
        if prototypes.dim() != 2 or prototypes.shape[1] != first.shape[1] or not len(prototypes):
            fail("prototypes", f"have shape (K, {first.shape[1]})", tuple(prototypes.shape))
        options = dict(temperature=temperature, epsilon=epsilon, iterations=iterations)
        losses, hits = _swav(first, second, prototypes, mirrored, _over_ranks(group), **options)
        total, losses = losses.sum(), losses.detach()
    if mirrored and name == "simcse":
        losses, hits = torch.cat([losses, losses]), torch.cat([hits, hits])
    if mirrored and pairs == "interleaved":
        losses, hits = (x.view(2, -1).T.reshape(-1) for x in (losses, hits))
    if denominator is None:
        denominator = 1 if reduction == "sum" else max(1, sum(sizes) * (2 if mirrored else 1))
    return ContrastiveLoss(over_count(total, check_denominator(denominator)), losses, hits)


def _differences(x: Tensor, pairs: str) -> Tensor:
    if x.shape[0] % 2:
        fail("first", "hold pairs, an even number of rows, for rows='differences'", x.shape[0])
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # two close halves would lose their difference
    chosen, rejected = wide.chunk(2) if pairs == "halves" else (wide[0::2], wide[1::2])
    return chosen - rejected


def _swav(first, second, prototypes, mirrored, over_ranks, *, temperature, epsilon, iterations):
    wide = torch.promote_types(first.dtype, torch.float32)
    centers = formula.unit(prototypes.to(wide))
    with torch.autocast(first.device.type, enabled=False):
        views = [formula.unit(x.to(wide)) @ centers.T for x in (first, second)]
    if mirrored:
        views = [torch.cat([scores, -scores]) for scores in views]
    sinkhorn = dict(epsilon=epsilon, iterations=iterations, over_ranks=over_ranks)
    codes = tuple(formula.sinkhorn(scores.detach(), **sinkhorn) for scores in views)
    losses = formula.swapped(*views, codes, temperature=temperature)
    same = views[0].detach().argmax(1) == views[1].detach().argmax(1) if len(first) else losses.detach() > 0
    return losses, same.to(losses.dtype)


def _sizes(x: Tensor, group) -> tuple[list[int], int]:
    """Rows of each rank, and which rank this one is."""
    if group is None:
        return [x.shape[0]], 0
    own = torch.tensor([x.shape[0]], device=x.device)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    return [int(one) for one in torch.cat(found).tolist()], dist.get_rank(group)


def _over_ranks(group) -> Callable[[Tensor], Tensor]:
    def everywhere(lse: Tensor) -> Tensor:
        found = [torch.empty_like(lse) for _ in range(dist.get_world_size(group))]
        dist.all_gather(found, lse.contiguous(), group=group)
        return torch.stack(found).logsumexp(0)

    return (lambda lse: lse) if group is None else everywhere


class _Gather(torch.autograd.Function):
    """Rows of all ranks, in order; backward is the sum over ranks of the gradients that this rank's rows got."""

    @staticmethod
    def forward(ctx, x, group, sizes, rank):
        ctx.group, ctx.sizes, ctx.rank = group, sizes, rank
        padded = x.new_zeros(max(sizes), x.shape[1])
        padded[: x.shape[0]] = x
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded, group=group)
        return torch.cat([one[:size] for one, size in zip(found, sizes, strict=True)])

    @staticmethod
    def backward(ctx, upstream):
        total = upstream.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        first = sum(ctx.sizes[: ctx.rank])
        return total[first : first + ctx.sizes[ctx.rank]], None, None, None


def set_dropout(model: torch.nn.Module, p: float) -> list[tuple[torch.nn.Module, str, float]]:
    """Sets the probability of every dropout of the model; returns (module, name, value before) of each.

    These are nn.Dropout and its kin, and modules with a float `attention_dropout`, as those of transformers have.
    """
    p = check_number("p", p, least=0, most=1)
    drops = [module for module in model.modules() if isinstance(module, torch.nn.modules.dropout._DropoutNd)]
    drops = [(module, "p", module.p) for module in drops]
    for module in model.modules():
        value = getattr(module, "attention_dropout", None)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            drops.append((module, "attention_dropout", value))
    if not drops:
        fail("model", "have a dropout: both views would be the same", type(model).__name__)
    for module, name, _ in drops:
        setattr(module, name, p)
    return drops


def dropout_views(model: torch.nn.Module, *inputs, p: float = 0.05, **more):
    """What two passes of the model return under two dropout masks of probability p: two views of the same inputs.

    Sets the probability of every nn.Dropout and of every module's `attention_dropout`, and puts modes and probabilities
    back, also when a pass raises. Gradient checkpointing, which runs a pass again in backward, must be off.
    Raises ValueError for a model without dropout. Source: arXiv:2104.08821; p = 0.05 is that of arXiv:2401.06080.
    """
    p = check_number("p", p, above=0, most=1)
    modes, drops = [(module, module.training) for module in model.modules()], []
    try:
        drops = set_dropout(model, p)
        model.train()
        return model(*inputs, **more), model(*inputs, **more)
    finally:
        for module, name, value in drops:
            setattr(module, name, value)
        for module, training in modes:
            module.training = training

"""A vocabulary that is split over ranks: each rank holds some columns of the head, or of the logits, and has all rows.

fwd    the state (m, R, T, label's logit) of a row over this rank's columns; one all-gather of those 16 bytes a row;
       then every rank combines all states in the order of the ranks, so that results are the same to the bit.
bwd    from the statistics of the whole row, which every rank has: no collective but the sum of dX, if asked for.

Which collectives run, and their shapes, depend on the number of rows, the outputs and hidden_grad alone: not on masks,
labels, compaction, the size of a shard or what needs a gradient.
"""

import sys
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..formulas import logprobs as formula
from . import _choose, _chunked, _tiles
from ._check import fail, note_errors
from ._once import once

FOREIGN = 2**30  # a label's column on a rank that does not hold it: beyond all columns, in 32 bits too
HIDDEN_GRADS = ("none", "all_reduce", "reduce_scatter")
WIRE = 4  # numbers a row and rank in the all-gather


class Shard(NamedTuple):
    """This rank's part of the vocabulary."""

    group: object  # torch.distributed.ProcessGroup; None: one rank that holds all
    start: int  # id of its first column
    columns: int  # that it holds of the true vocabulary; those behind are padding
    vocab: int | None  # true size of the whole, None: what the ranks hold together
    hidden_grad: str

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def bound(self) -> int:
        """Labels must be below it. Without a true size, `exchange` finds labels that no rank holds."""
        return FOREIGN if self.vocab is None else self.vocab

    @property
    def gathers(self) -> bool:
        """Whether each rank passes its own rows of hidden."""
        return self.hidden_grad == "reduce_scatter"

    def local_head(self, head: formula.Head) -> formula.Head:
        """The head whose support is counted by this rank's columns."""
        return head if head.support is None else head._replace(support=head.support - self.start)

    def local(self, target: Tensor) -> Tensor:
        """Targets by this rank's columns: SKIP and BAD stay, a label of another rank is FOREIGN."""
        here = (target >= self.start) & (target < self.start + self.columns)
        return torch.where(target < 0, target, torch.where(here, target - self.start, FOREIGN))


def shard_of(columns: int, group, vocab_start, vocab_size, hidden_grad: str | None = None) -> Shard | None:
    """The shard of a rank that holds so many columns; None without a group. Raises naming the argument."""
    hidden_grad = "none" if hidden_grad is None else hidden_grad
    if hidden_grad not in HIDDEN_GRADS:
        fail("hidden_grad", f"be None or one of {HIDDEN_GRADS}", repr(hidden_grad))
    for name, value in (("vocab_start", vocab_start), ("vocab_size", vocab_size)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            fail(name, "be None or an integer >= 0", repr(value))
    if vocab_size == 0:
        fail("vocab_size", "be at least 1", 0)
    if group is None:
        if vocab_start:
            fail("vocab_start", "be None or 0 without a group", vocab_start)
        if hidden_grad != "none":
            fail("hidden_grad", "be 'none' without a group", repr(hidden_grad))
        if vocab_size is not None and vocab_size > columns:
            fail("vocab_size", f"be at most {columns}, the columns that there are", vocab_size)
        return None
    check_group(group)
    start = dist.get_rank(group) * columns if vocab_start is None else vocab_start
    true = columns if vocab_size is None else min(columns, max(vocab_size - start, 0))
    return Shard(group, start, true, vocab_size, hidden_grad)


def alone(columns: int) -> Shard:
    """One rank with the whole vocabulary: no collective."""
    return Shard(None, 0, columns, columns, "none")


def check_group(group, name: str = "group") -> None:
    if group is None or not dist.is_available():
        if not dist.is_available() or not dist.is_initialized():
            fail("torch.distributed", f"be initialised for {name}", "no process group", RuntimeError)
    elif not isinstance(group, dist.ProcessGroup):
        fail(name, "be None or a torch.distributed.ProcessGroup that this rank belongs to", f"{group!r}", TypeError)


def whole_or_shard(weight, bias, group, vocab_start, hidden_grad):
    """weight, bias, group, vocab_start of a head that is a DTensor; of another, what was given.

    Without hidden_grad it is gathered, and its gradient is the mean over the ranks of the mesh, as FSDP2's gradients
    are. With hidden_grad it stays where it is: sharded over the vocabulary, it brings its own group.
    """
    if not is_dtensor(weight):
        return weight, bias, group, vocab_start
    from torch.distributed.tensor import Partial

    _refuse_group("head", group, vocab_start)
    if hidden_grad is None:
        parts = [whole(x) for x in (weight, bias)]
        return *parts, None, None
    cut, group, start = _cut("weight", weight, 0)
    sums = [p if i == cut else Partial("avg") for i, p in enumerate(weight.placements)]
    local = weight.to_local(grad_placements=sums)
    if is_dtensor(bias):
        bias = bias.to_local(grad_placements=sums)
    elif bias is not None:
        bias = bias[start : start + local.shape[0]]
    return local, bias, group, start


def logits_or_shard(logits, group, vocab_start):
    """logits, group, vocab_start of logits that are a DTensor sharded over the vocabulary; else what was given."""
    if not is_dtensor(logits) or logits.dim() == 0:
        return logits, group, vocab_start
    _refuse_group("of logits", group, vocab_start)
    _, group, start = _cut("logits", logits, logits.dim() - 1)
    return logits.to_local(), group, start


def _refuse_group(what: str, group, vocab_start) -> None:
    for name, value in (("group", group), ("vocab_start", vocab_start)):
        if value is not None:
            fail(name, f"be None for a DTensor {what}, which says it itself", f"{value!r}")


def _cut(name: str, x, dim: int) -> tuple[int, object, int]:
    """The dimension of its mesh over which a DTensor's vocabulary, dim, is cut, its group and this rank's first id."""
    from torch.distributed.tensor import Shard

    cut = [i for i, p in enumerate(x.placements) if type(p) is Shard and p.dim % x.dim() == dim]
    if len(cut) != 1 or not all(p.is_replicate() for i, p in enumerate(x.placements) if i not in cut):
        fail(name, "be sharded over the vocabulary on one dimension of its mesh", f"{x.placements}")
    group, vocab = x.device_mesh.get_group(cut[0]), x.shape[dim]
    step = -(-vocab // dist.get_world_size(group))  # as torch.chunk cuts
    return cut[0], group, min(dist.get_rank(group) * step, vocab)


def is_dtensor(x: object) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # not imported here: it takes its time
    return module is not None and isinstance(x, module.DTensor)


def whole(x: Tensor | None) -> Tensor | None:
    """A DTensor gathered; backward takes the mean of the ranks' gradients, on every dimension of its mesh."""
    if not is_dtensor(x):
        return x
    from torch.distributed.tensor import Partial

    return x.full_tensor(grad_placements=[Partial("avg")] * x.device_mesh.ndim)


def rows_of(hidden: Tensor, shard: Shard | None) -> tuple[int, ...]:
    """Shape of the labels of hidden (..., D): with reduce_scatter of all ranks' hidden, one behind the other."""
    shape = tuple(hidden.shape[:-1])
    if shard is None or not shard.gathers:
        return shape
    if not shape:
        fail("hidden", "have shape (n, ..., D) with hidden_grad='reduce_scatter'", tuple(hidden.shape))
    return shard.ranks * shape[0], *shape[1:]


def refuse_reference(shard: Shard | None) -> None:
    if shard is not None:
        fail("backend", "not be 'reference' with a group: it has no vocabulary-parallel form", "'reference'")


# ---- collectives ---------------------------------------------------------------------------------------------------


def all_gather(x: Tensor, group) -> Tensor:
    """(ranks, *x.shape), in the order of the ranks."""
    ranks = dist.get_world_size(group)
    if torch.compiler.is_compiling():
        return torch.ops.finealign.all_gather(x, ranks, (dist.group.WORLD if group is None else group).group_name)
    out = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    gather(out, x.contiguous(), group=group)
    return out.view(ranks, *x.shape)


class Summing:
    """Takes this rank's part of dX, sums what hidden_grad asks for while other work goes on, in float32 (float64)."""

    def __init__(self, shard: Shard):
        self.shard, self.out, self.work = shard, None, None

    def __call__(self, dx: Tensor) -> None:
        self.out, group = dx, self.shard.group
        if self.shard.hidden_grad == "all_reduce":
            self.work = dist.all_reduce(dx, group=group, async_op=True)
        elif self.shard.gathers:
            self.out = dx.new_empty(dx.shape[0] // self.shard.ranks, *dx.shape[1:])  # this rank's rows of the sum
            reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
            self.work = reduce(self.out, dx, group=group, async_op=True)

    def result(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.out


# ---- states of shards to rows --------------------------------------------------------------------------------------


def empty_state(n: int, dtype: torch.dtype, device) -> formula.State:
    """Of a shard without columns."""
    part = torch.zeros(n, formula.PARTS, dtype=dtype, device=device)
    part[:, 0] = -torch.inf
    label = torch.full((n, 2), torch.nan, dtype=dtype, device=device)
    return formula.State(part, torch.zeros(n, dtype=torch.int64, device=device), label)


def exchange(state: formula.State, target: Tensor, want: int, top: bool, shard: Shard) -> formula.Rows:
    """Rows of the whole vocabulary from this rank's states and everyone's. The one collective of a forward.

    m, R, T and the label's logit travel, 16 bytes a row in float32; with log_sum_sq_probs also Q, with mean_logits the
    sum and number of logits, with is_top1 the id of the first maximum, 4 bytes each.
    """
    bits = torch.int64 if state.part.dtype == torch.float64 else torch.int32
    m, r, t, q, total, count = state.part.unbind(1)
    wire = [m, r, t, state.label[:, 0]]
    wire += [q] if want & formula.SQUARES else []
    wire += [total, count] if want & formula.MEAN else []
    wire += [(state.first + shard.start).to(bits).view(m.dtype)] if top else []
    wire = torch.stack(wire, 1)
    got = list(
        (wire[None] if shard.group is None else all_gather(wire, shard.group)).permute(2, 1, 0).unbind(0)
    )  # (n, ranks) each
    labels = got.pop(3)
    first = got.pop().contiguous().view(bits).long() if top else torch.zeros_like(labels, dtype=torch.int64)
    zeros = torch.zeros_like(labels)
    q = got.pop(3) if want & formula.SQUARES else zeros
    total, count = got[3:] if want & formula.MEAN else (zeros, zeros)
    part = torch.stack([*got[:3], q, total, count], -1)

    owners = (~labels.isnan()).sum(1)
    logit = torch.where(owners == 1, torch.where(labels.isnan(), 0, labels).sum(1), torch.nan)
    slope = torch.where(state.label[:, 1].isnan(), 0, state.label[:, 1])
    lost = (target >= 0) & (owners != 1) & ~part[..., :2].isnan().any(-1).any(-1)
    target = _without_lost(target, lost, owners, shard)
    return formula.combine(part, first, torch.stack([logit, slope], 1), target, want)


def _without_lost(target: Tensor, lost: Tensor, owners: Tensor, shard: Shard) -> Tensor:
    """Targets with BAD for a label that not exactly one rank holds. A CPU raises: on all ranks, which see the same."""
    if target.device.type == "cpu" and bool(lost.any()):
        row = int(lost.nonzero()[0])
        held = (
            f"rank {dist.get_rank(shard.group)} of {shard.ranks} holds [{shard.start}, {shard.start + shard.columns})"
        )
        what = "no rank's shard" if owners[row] == 0 else f"the shards of {int(owners[row])} ranks"
        raise IndexError(f"labels: {int(target[row])} of row {row} is in {what}; {held}: give vocab_start, vocab_size")
    target = torch.where(lost, formula.BAD, target)
    note_errors(target, shard.bound)  # on a CPU, too, where values may not have been read: compact="device", a compiler
    return target


# ---- the head ------------------------------------------------------------------------------------------------------


def linear(hidden, weight, bias, target, head, want, workspace, on_device, rows, top: bool, shard: Shard, low=None):
    """Rows (N,) each of hidden (N, D), or (N / ranks, D) where the shard gathers; weight (columns, D) of this rank.

    low: (u, b), a low-rank part of the head, where one rank holds all. A compiler leaves it out of its graph.
    """
    options = target, head, want, workspace, on_device, rows, top, shard
    if low is None or not torch.compiler.is_compiling():
        return _Linear.apply(hidden, weight, bias, *(low or (None, None)), *options)
    return _eager(hidden, weight, bias, *low, *options)


@torch._disable_dynamo  # torch.compiler.disable would import the compiler with this package
def _eager(*args):
    return _Linear.apply(*args)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, u, b, target, head, want, workspace, on_device, rows, top, shard):
        options = want, workspace, on_device, rows, top
        if torch.compiler.is_compiling():
            found = torch.ops.finealign.parallel_linear_fwd(
                hidden, weight, bias, target, *_plain(head), *options, *_named(shard)
            )
        else:
            found = _linear_fwd(hidden, weight, bias, target, head, *options, shard, **_low(u, b))
        logp, lse, entropy, squares, mean, top1, m, l, label_slope, allowed, local, e, e_max = found
        *numbers, row_inv_temperature, support = _plain(shard.local_head(head))
        state = local, logp, entropy, m, l, label_slope, allowed, e, e_max
        ctx.save_for_backward(hidden, weight, bias, u, b, *state, row_inv_temperature, support)
        ctx.options = numbers, on_device, rows, shard
        ctx.mark_non_differentiable(squares, top1)
        ctx.set_materialize_grads(False)
        return logp, lse, entropy, squares, mean, top1

    @staticmethod
    def backward(ctx, dlogp, dlse, dentropy, _, dmean, *__):
        hidden, weight, bias, u, b, *state, row_inv_temperature, support = ctx.saved_tensors
        numbers, on_device, rows, shard = ctx.options
        needs = tuple(bool(need) for need in ctx.needs_input_grad[: 3 if u is None else 5])
        with torch.no_grad():
            given = dlogp, dlse, dentropy, dmean, hidden, weight, bias, *state
            if torch.compiler.is_compiling():
                options = *numbers, row_inv_temperature, support, on_device, rows
                grads = torch.ops.finealign.parallel_linear_bwd(*given, *options, *_named(shard), *needs)
            else:
                head = _head(*numbers, row_inv_temperature, support)
                grads = _linear_bwd(*given, head, on_device, rows, shard, needs, **_low(u, b))
            grads = tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))
        sources = (dlogp, dlse, dentropy, dmean, hidden, weight, bias, u, b)
        instead = "without a group, use backend='reference'"
        return *once("linear_logprobs", grads, sources, instead), *[None] * (13 - len(needs))


def _low(u: Tensor | None, b: Tensor | None) -> dict:
    """The low-rank part as an argument, where there is one: not every layer takes it."""
    return {} if u is None else {"low": _chunked.Low(u, b)}


def _linear_fwd(hidden, weight, bias, target, head, want, workspace, on_device, rows, top, shard, static=False, **low):
    """Rows, this rank's targets, E and its maxima."""
    x = all_gather(hidden, shard.group).flatten(0, 1) if shard.gathers else hidden
    local, head = shard.local(target), shard.local_head(head)
    if shard.columns:
        fwd = _choose.layer(rows).fwd
        options = want, workspace, on_device, rows, static
        *state, e, e_max = fwd(x, weight, bias, local, head, *options, shard=True, **low)
        state = formula.State(*state)
    else:
        state = empty_state(x.shape[0], _chunked.wide(x.dtype), x.device)
        e, e_max = x.new_empty(0), x.new_empty(0, 0, dtype=_chunked.wide(x.dtype))
    return [*exchange(state, target, want, top, shard), local, e, e_max]


def _linear_bwd(dlogp, dlse, dentropy, dmean, hidden, weight, bias, local, *saved, **low):
    """Gradients of hidden, weight and bias; None where none is needed. The head is that of this rank's columns."""
    *state, e, e_max, head, on_device, rows, shard, needs = saved
    x = all_gather(hidden, shard.group).flatten(0, 1) if shard.gathers else hidden
    coef, summing = formula.coefficients(dlogp, dlse, dentropy, dmean, *state), Summing(shard)
    if shard.columns:
        bwd, curved = _choose.layer(rows).bwd, dentropy is not None
        inputs = x, weight, bias, local, e, e_max
        grads = bwd(coef, curved, *inputs, head, needs, on_device, rows, shard=summing, **low)
    else:
        if needs[0]:
            summing(x.new_zeros(x.shape, dtype=_chunked.wide(x.dtype)))
        grads = None, *(None if b is None else torch.zeros_like(b) for b in (weight, bias))
    return summing.result().to(hidden.dtype) if needs[0] else None, *grads[1:]


# ---- logits that exist ---------------------------------------------------------------------------------------------


def token(logits, target, head, want, inplace, rows, top: bool, shard: Shard):
    """Rows (N,) each of this rank's logits (N, columns and padding)."""
    return _Token.apply(logits, target, head, want, inplace, rows, top, shard)


class _Token(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, head, want, inplace, rows, top, shard):
        if torch.compiler.is_compiling():
            options = *_plain(head), want, rows, top
            found = torch.ops.finealign.parallel_token_fwd(logits, target, *options, *_named(shard))
        else:
            found = _token_fwd(logits, target, head, want, rows, top, shard)
        logp, lse, entropy, squares, mean, top1, m, l, label_slope, allowed, local = found
        *numbers, row_inv_temperature, support = _plain(shard.local_head(head))
        ctx.save_for_backward(logits, local, logp, entropy, m, l, label_slope, allowed, row_inv_temperature, support)
        ctx.options = numbers, rows
        ctx.columns, ctx.inplace, ctx.spent = shard.columns, inplace, False
        ctx.mark_non_differentiable(squares, top1)
        ctx.set_materialize_grads(False)
        return logp, lse, entropy, squares, mean, top1

    @staticmethod
    def backward(ctx, dlogp, dlse, dentropy, _, dmean, *__):
        if ctx.spent:
            raise RuntimeError(
                "token_logprobs: inplace_backward=True wrote the gradient over the logits; backward runs once"
            )
        logits, *state, row_inv_temperature, support = ctx.saved_tensors
        numbers, rows = ctx.options
        with torch.no_grad():
            grad = logits if ctx.inplace else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
            source = None if ctx.inplace else logits
            given = grad, source, dlogp, dlse, dentropy, dmean, *state
            if torch.compiler.is_compiling():
                torch.ops.finealign.parallel_token_bwd(
                    *given, *numbers, row_inv_temperature, support, rows, ctx.columns
                )
            else:
                _token_bwd(*given, _head(*numbers, row_inv_temperature, support), rows, ctx.columns)
            ctx.spent = ctx.inplace
        (grad,) = once("token_logprobs", (grad,), (dlogp, dlse, dentropy, dmean, logits))
        return grad, *[None] * 7


def _token_fwd(logits, target, head, want, rows, top, shard):
    """Rows, and this rank's targets."""
    local, head, x = shard.local(target), shard.local_head(head), logits[:, : shard.columns]
    if shard.columns:
        part, first, label = _tiles.states(x, local, head, want, rows)
        state = formula.State(*formula.merge(part, first, want), label)
    else:
        state = empty_state(x.shape[0], _chunked.wide(x.dtype), x.device)
    return [*exchange(state, target, want, top, shard), local]


def _token_bwd(out, logits, dlogp, dlse, dentropy, dmean, local, *saved):
    """The gradient of this rank's logits into out; logits None: over the logits themselves."""
    *state, head, rows, columns = saved
    if columns:
        coef = formula.coefficients(dlogp, dlse, dentropy, dmean, *state)
        source = None if logits is None else logits[:, :columns]
        _tiles.gradient(out[:, :columns], source, coef, local, head, rows)
    out[:, columns:] = 0


# ---- the same as ops, for a compiler: a graph holds each as one node, its collectives inside -------------------------


def _plain(head: formula.Head) -> tuple[float, float, float, Tensor | None, Tensor | None]:
    """scale, softcap, the inverse temperature as a number or as (N,), and the support."""
    row_inv_temperature = head.inv_temperature if isinstance(head.inv_temperature, Tensor) else None
    return *head[:2], head.inv_temperature if row_inv_temperature is None else 1.0, row_inv_temperature, head.support


def _head(
    scale: float, softcap: float, inv_temperature: float, row_inv_temperature: Tensor | None, support: Tensor | None
) -> formula.Head:
    inv_temperature = inv_temperature if row_inv_temperature is None else row_inv_temperature
    return formula.Head(scale, softcap, inv_temperature, support)


def _named(shard: Shard) -> tuple[str, int, int, int, str]:
    """A shard in words and numbers; -1 for a size that is not known."""
    group = "" if shard.group is None else shard.group.group_name
    return group, shard.start, shard.columns, -1 if shard.vocab is None else shard.vocab, shard.hidden_grad


def _shard(group: str, start: int, columns: int, vocab: int, hidden_grad: str) -> Shard:
    group = dist.distributed_c10d._resolve_process_group(group) if group else None
    return Shard(group, start, columns, None if vocab < 0 else vocab, hidden_grad)


def _stats(like: Tensor, n: int) -> list[Tensor]:
    """Rows (n,) and this rank's targets, of no values."""
    return [*_chunked.blank_stats(like, n), like.new_empty(n, dtype=torch.int64)]


@torch.library.custom_op("finealign::all_gather", mutates_args=())
def _all_gather_op(x: Tensor, ranks: int, group: str) -> Tensor:
    return all_gather(x, dist.distributed_c10d._resolve_process_group(group))


@_all_gather_op.register_fake
def _(x, ranks, group):
    return x.new_empty(ranks, *x.shape)


@torch.library.custom_op("finealign::parallel_linear_fwd", mutates_args=())
def _linear_fwd_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: float,
    softcap: float,
    inv_temperature: float,
    row_inv_temperature: Tensor | None,
    support: Tensor | None,
    want: int,
    workspace: int,
    on_device: bool,
    rows: str,
    top: bool,
    group: str,
    start: int,
    columns: int,
    vocab: int,
    hidden_grad: str,
) -> list[Tensor]:
    shard = _shard(group, start, columns, vocab, hidden_grad)
    head = _head(scale, softcap, inv_temperature, row_inv_temperature, support)
    options = want, workspace, on_device, rows, top
    return _apart(_linear_fwd(hidden, weight, bias, target, head, *options, shard, static=True))


@_linear_fwd_op.register_fake
def _(
    hidden,
    weight,
    bias,
    target,
    scale,
    softcap,
    inv_temperature,
    row_inv_temperature,
    support,
    want,
    workspace,
    _,
    rows,
    *__,
):
    n, vocab, wide = target.shape[0], weight.shape[0], _chunked.wide(hidden.dtype)
    head = _head(scale, softcap, inv_temperature, row_inv_temperature, support)
    room = _chunked.kept_rows(n, vocab, hidden.dtype, workspace) if vocab else 0
    maxima = _choose.layer(rows).maxima(hidden, vocab, head) if vocab else 0
    e, e_max = hidden.new_empty(room * vocab), hidden.new_empty((room, maxima), dtype=wide)
    return [*_stats(hidden, n), e, e_max]


@torch.library.custom_op("finealign::parallel_linear_bwd", mutates_args=())
def _linear_bwd_op(
    dlogp: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    dmean: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    local: Tensor,
    logp: Tensor,
    entropy: Tensor,
    m: Tensor,
    l: Tensor,
    label_slope: Tensor,
    allowed: Tensor,
    e: Tensor,
    e_max: Tensor,
    scale: float,
    softcap: float,
    inv_temperature: float,
    row_inv_temperature: Tensor | None,
    support: Tensor | None,
    on_device: bool,
    rows: str,
    group: str,
    start: int,
    columns: int,
    vocab: int,
    hidden_grad: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> list[Tensor]:
    shard = _shard(group, start, columns, vocab, hidden_grad)
    head = _head(scale, softcap, inv_temperature, row_inv_temperature, support)
    needs, saved = (need_hidden, need_weight, need_bias), (local, logp, entropy, m, l, label_slope, allowed, e, e_max)
    grads = _linear_bwd(dlogp, dlse, dentropy, dmean, hidden, weight, bias, *saved, head, on_device, rows, shard, needs)
    wanted = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return _apart([hidden.new_empty(0) if grad is None else grad for grad in wanted])


@_linear_bwd_op.register_fake
def _(dlogp, dlse, dentropy, dmean, hidden, weight, bias, *rest):
    empty = hidden.new_empty(0)
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else empty.clone()
        for x, need in zip((hidden, weight, bias), rest[-3:], strict=True)
    ]


@torch.library.custom_op("finealign::parallel_token_fwd", mutates_args=())
def _token_fwd_op(
    logits: Tensor,
    target: Tensor,
    scale: float,
    softcap: float,
    inv_temperature: float,
    row_inv_temperature: Tensor | None,
    support: Tensor | None,
    want: int,
    rows: str,
    top: bool,
    group: str,
    start: int,
    columns: int,
    vocab: int,
    hidden_grad: str,
) -> list[Tensor]:
    shard = _shard(group, start, columns, vocab, hidden_grad)
    head = _head(scale, softcap, inv_temperature, row_inv_temperature, support)
    return _apart(_token_fwd(logits, target, head, want, rows, top, shard))


@_token_fwd_op.register_fake
def _(logits, target, *_):
    return _stats(logits, target.shape[0])


@torch.library.custom_op("finealign::parallel_token_bwd", mutates_args=("out",))
def _token_bwd_op(
    out: Tensor,
    logits: Tensor | None,
    dlogp: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    dmean: Tensor | None,
    local: Tensor,
    logp: Tensor,
    entropy: Tensor,
    m: Tensor,
    l: Tensor,
    label_slope: Tensor,
    allowed: Tensor,
    scale: float,
    softcap: float,
    inv_temperature: float,
    row_inv_temperature: Tensor | None,
    support: Tensor | None,
    rows: str,
    columns: int,
) -> None:
    state, head = (
        (local, logp, entropy, m, l, label_slope, allowed),
        _head(scale, softcap, inv_temperature, row_inv_temperature, support),
    )
    _token_bwd(out, logits, dlogp, dlse, dentropy, dmean, *state, head, rows, columns)


@_token_bwd_op.register_fake
def _(out, *_):
    return None


def _apart(found: list[Tensor]) -> list[Tensor]:
    """Results of an op: none of them shares memory with another."""
    seen, out = set(), []
    for x in found:
        key = x.untyped_storage().data_ptr() if x.numel() else None
        out.append(x.clone(memory_format=torch.contiguous_format) if key in seen else x.contiguous())
        seen.update({key} - {None})
    return out

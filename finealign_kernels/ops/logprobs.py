"""Log-probabilities of labels, from hidden states and an LM head or from logits that exist."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..formulas import logprobs as formula
from ..formulas.logprobs import Head
from . import _choose, _chunked, _parallel, _tiles
from ._adapter import check_adapter
from ._check import (
    OUTPUTS,
    capturing,
    check_bool,
    check_flags,
    check_head,
    check_head_options,
    check_integer,
    check_outputs,
    check_support,
    check_tensor,
    fail,
    inverse_temperature,
    note_errors,
    targets,
)
from ._once import once

WANT = {"entropy": formula.ENTROPY, "log_sum_sq_probs": formula.SQUARES, "mean_logits": formula.MEAN, "is_top1": 0}


class LogProbs(NamedTuple):
    """Statistics of each row, in the shape of labels; float32 nats (float64 for float64 input)."""

    logp: Tensor  # log-probability of the label; differentiable
    lse: Tensor  # log Σ e^z; differentiable
    entropy: Tensor | None  # lse - Σ p z; differentiable
    log_sum_sq_probs: Tensor | None  # log Σ p²
    mean_logits: Tensor | None  # mean of z over the tokens that are not banned; differentiable
    is_top1: Tensor | None  # bool: the label is the first argmax

    @property
    def mean_logp(self) -> Tensor:
        """Mean log-probability of the tokens that are not banned, mean_logits - lse: what label smoothing pulls to."""
        if self.mean_logits is None:
            fail("outputs", "hold 'mean_logits' for mean_logp", "outputs without it")
        return self.mean_logits - self.lse


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    support: Tensor | None = None,
    outputs: Iterable[str] = (),
    workspace: str | int = "auto",
    compact: str = "auto",
    batch_invariant: bool = False,
    group=None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    hidden_grad: str | None = None,
    backend: str = "auto",
) -> LogProbs:
    """Log-probability of each label under softmax(z); the (N, V) logits are never kept.

        z = softcap(logit_scale · (hidden @ weightᵀ + u @ bᵀ + bias)) / temperature,  softcap(y) = c tanh(y / c)

    hidden       (..., D) float; row n predicts labels[n]: the caller has already shifted
    weight       (V, D), same dtype and device as hidden (under autocast both are cast to its dtype)
    labels       (...) int32 or int64
    bias         (V,) float; -inf takes an id out of the vocabulary (padded heads)
    adapter      (u, b), u (..., R) and b (V, R): the low-rank part of a head with LoRA, beside its base weight
    mask         (...) bool: True where a row is computed. Where it is False, or the label is ignore_index, every output
                 is 0, hidden may be NaN, and gradients that arrive at the outputs are ignored
    temperature  > 0; a constant tensor in the shape of labels gives each row a number of its own
    softcap      > 0, None: no soft cap. logit_scale is any finite number
    support      (..., K) int: the token ids that each row's softmax is over (top-k, top-p); negative ids fill up a row
    outputs      further outputs to compute: "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"
    workspace    memory budget, in bytes, for softmax numerators saved for backward: a number, 0, "full" (all rows), or
                 "auto" (as many bytes as weight has). Rows that fit are not computed twice
    compact      how rows without a label or a gradient are left out: "host" reads their number on the host, "device"
                 computes them too, "auto" is "host" unless a CUDA graph is being captured
    batch_invariant  True: a row's outputs have the same bits whatever else is in the batch. "triton_fused", or raises
    group        the ranks that the vocabulary is split over; weight and bias are then this rank's part
    vocab_start  id of this rank's first column; None: its rank · V_local
    vocab_size   true size of the vocabulary: columns behind it are padding; None: all columns count
    hidden_grad  under a group: "none" (hidden's gradient is this rank's part of it), "all_reduce", "reduce_scatter"
    backend      "auto", "reference" (any order of derivative), "torch", "native", "triton", "triton_fused"

    docs/guides/log-probs.md says more of each argument: "Arguments in detail".

    Returns LogProbs, each (...). Differentiable once, in hidden, weight, bias and adapter; the gradient of an input
    comes back in its dtype, accumulated in float32. Results repeat bit for bit.
    Raises  TypeError, ValueError naming argument, expectation and finding; IndexError for a label outside [0, V), or of
            its row's support, on a CPU (elsewhere the row is NaN and check_errors() raises), or that not exactly one
            rank holds; RuntimeError for a backend that cannot run here.
    Source: the order of operations is that of TRL's fused head; that logits need not be kept, arXiv:2411.09009.
    """
    weight, bias, group, vocab_start = _parallel.whole_or_shard(weight, bias, group, vocab_start, hidden_grad)
    defined = backend == "reference"  # by torch alone, which has every derivative and transform
    check_head("weight", weight, empty=group is not None, transforms=defined)
    check_tensor("hidden", hidden, transforms=defined)
    if adapter is None:
        check_adapter(weight, trains=torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad))
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        fail("hidden", f"have shape (..., {weight.shape[1]}), as weight is {tuple(weight.shape)}", tuple(hidden.shape))
    if hidden.device != weight.device:
        fail("weight", f"be on {hidden.device}, as hidden is", weight.device)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden, weight = (x.to(torch.get_autocast_dtype(device)) for x in (hidden, weight))
    if hidden.dtype != weight.dtype:
        fail("weight", f"have the dtype of hidden, {hidden.dtype}", weight.dtype, TypeError)
    shard = _parallel.shard_of(weight.shape[0], group, vocab_start, vocab_size, hidden_grad)
    mask = _check_rows(labels, _parallel.rows_of(hidden, shard), mask, hidden)
    wider = False  # whether the gradient of bias needs more digits than E in half precision has
    if bias is not None:
        check_tensor("bias", bias, shape=weight.shape[:1], like=hidden, transforms=defined)
        wider = bias.requires_grad and bias.dtype.itemsize > hidden.dtype.itemsize == 2
        bias = bias.to(_chunked.wide(hidden.dtype)).contiguous()  # kernels step from entry to entry
    low = _low_rank(adapter, hidden, weight, group, batch_invariant, backend)
    columns = vocab_size if shard is None else shard.columns
    if columns is not None and columns < weight.shape[0]:  # the others are padding
        weight, bias = weight[:columns], None if bias is None else bias[:columns]
        low = None if low is None else (low[0], low[1][:columns])
    vocab = weight.shape[0] if shard is None else shard.bound
    outputs, budget = check_outputs(outputs), _bytes(workspace, weight)
    check_head_options(temperature, softcap, logit_scale)
    batch_invariant = check_bool("batch_invariant", batch_invariant)
    if compact not in ("auto", "host", "device"):
        fail("compact", "be 'auto', 'host' or 'device'", repr(compact))
    on_device = compact == "device" or (compact == "auto" and capturing(hidden))
    inv_temperature = inverse_temperature(
        temperature, labels, _chunked.wide(hidden.dtype), _choose.FUSED if batch_invariant else backend
    )
    by_torch = isinstance(inv_temperature, Tensor) and backend == "auto"
    name = _choose.choose_head("torch" if by_torch else backend, hidden, batch_invariant)
    if support is not None and name == _choose.FUSED:
        if backend == "auto" and not batch_invariant:
            name = _choose.choose("auto", hidden)
        else:
            fail("support", f"be None with backend {name!r}, which batch_invariant=True needs", "a tensor")

    x = hidden.reshape(-1, hidden.shape[-1])
    target = targets(labels, mask, ignore_index, vocab, defer=compact == "device")
    support, target = check_support(support, labels, target, logit_scale, vocab, defer=compact == "device")
    head = Head(float(logit_scale), float(softcap or 0.0), inv_temperature, support)
    with torch.autocast(device, enabled=False):  # the operands have their dtype by now
        if name == "reference":
            _parallel.refuse_reference(shard)
            products = _project(x, weight, target)
            products = products if low is None else products + _project(*low, target).to(products.dtype)
            found = formula.reference(products, bias, target, head)
        else:
            inputs = [t for t in (hidden, weight, bias, *(low or ())) if t is not None]
            keep = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)  # unknown inside apply
            options = head, _want(outputs), budget if keep and not wider else 0, on_device, name
            if head.by_row or low is not None:
                shard = shard or _parallel.alone(weight.shape[0])
            if shard is None:
                found = _LinearLogprobs.apply(x, weight, bias, target, *options)
            else:
                found = _parallel.linear(x, weight, bias, target, *options, "is_top1" in outputs, shard, low)
    return _shaped(found, labels.shape, outputs)


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    support: Tensor | None = None,
    outputs: Iterable[str] = (),
    inplace_backward: bool = False,
    group=None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> LogProbs:
    """Log-probability of each label from given logits: softmax(z), z = softcap(logit_scale · logits) / temperature.

    logits            (..., V) float, row n predicts labels[n]; rows that are masked out may hold NaN
    inplace_backward  True writes the gradient over the logits: no second (N, V) tensor, and a second backward raises
    group             the vocabulary is split over ranks: logits (..., V_local) are this rank's columns, and so is their
                      gradient. A DTensor of logits that is sharded over the vocabulary (a tensor-parallel head that
                      keeps its output so) brings its own group; labels are plain tensors, the same on all its ranks
    the others        as in linear_logprobs

    Returns LogProbs, each (...), float32 (float64 for float64 logits), differentiable once in logits.
    Raises  as linear_logprobs. Source: the selective log-softmax, differentiated by hand in formulas/logprobs.py.
    """
    logits, group, vocab_start = _parallel.logits_or_shard(logits, group, vocab_start)
    check_tensor("logits", logits, transforms=backend == "reference")
    if logits.dim() < 1 or (logits.shape[-1] == 0 and group is None):
        fail("logits", "have shape (..., V) with V >= 1", tuple(logits.shape))
    shard = _parallel.shard_of(logits.shape[-1], group, vocab_start, vocab_size)
    logits = logits if shard is not None or vocab_size is None else logits[..., :vocab_size]
    mask = _check_rows(labels, logits.shape[:-1], mask, logits)
    outputs = check_outputs(outputs)
    check_head_options(temperature, softcap, logit_scale)
    inplace_backward = check_bool("inplace_backward", inplace_backward)
    inv_temperature = inverse_temperature(temperature, labels, _chunked.wide(logits.dtype), backend)
    name = _choose.choose("torch" if isinstance(inv_temperature, Tensor) and backend == "auto" else backend, logits)
    x = logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])
    vocab = logits.shape[-1] if shard is None else shard.bound
    target = targets(labels, mask, ignore_index, vocab, defer=False)
    support, target = check_support(support, labels, target, logit_scale, vocab, defer=False)
    head = Head(float(logit_scale), float(softcap or 0.0), inv_temperature, support)
    if name == "reference":
        _parallel.refuse_reference(shard)
        found = formula.reference(x.to(_chunked.wide(x.dtype)), None, target, head)
    elif shard is None and not head.by_row:
        found = _TokenLogprobs.apply(x, target, head, _want(outputs), inplace_backward, name)
    else:
        shard = shard or _parallel.alone(logits.shape[-1])
        options = head, _want(outputs), inplace_backward, name
        found = _parallel.token(x, target, *options, "is_top1" in outputs, shard)
    return _shaped(found, labels.shape, outputs)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, head, want, workspace, on_device, rows):
        static = torch.compiler.is_compiling()
        out = torch.ops.finealign.linear_logprobs_fwd(
            hidden, weight, bias, target, *head.numbers, want, workspace, on_device, static, rows
        )
        logp, lse, entropy, squares, mean, top1, m, l, label_slope, allowed, e, e_max = out
        ctx.save_for_backward(hidden, weight, bias, target, logp, entropy, m, l, label_slope, allowed, e, e_max)
        ctx.options = (*head.numbers, on_device, rows)
        ctx.mark_non_differentiable(squares, top1)
        ctx.set_materialize_grads(False)
        return logp, lse, entropy, squares, mean, top1

    @staticmethod
    def backward(ctx, dlogp, dlse, dentropy, _, dmean, *__):
        saved = ctx.saved_tensors
        needs = [bool(need) for need in ctx.needs_input_grad[:3]]
        with torch.no_grad():
            grads = torch.ops.finealign.linear_logprobs_bwd(dlogp, dlse, dentropy, dmean, *saved, *ctx.options, *needs)
        grads = tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))
        sources = (dlogp, dlse, dentropy, dmean, *saved[:3])
        return *once("linear_logprobs", grads, sources), None, None, None, None, None, None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, head, want, inplace, rows):
        out = torch.ops.finealign.token_logprobs_fwd(logits, target, *head.numbers, want, rows)
        logp, lse, entropy, squares, mean, top1, m, l, label_slope, allowed = out
        ctx.save_for_backward(logits, target, logp, entropy, m, l, label_slope, allowed)
        ctx.options = (*head.numbers, rows)
        ctx.inplace, ctx.spent = inplace, False
        ctx.mark_non_differentiable(squares, top1)
        ctx.set_materialize_grads(False)
        return logp, lse, entropy, squares, mean, top1

    @staticmethod
    def backward(ctx, dlogp, dlse, dentropy, _, dmean, *__):
        if ctx.spent:
            raise RuntimeError(
                "token_logprobs: inplace_backward=True wrote the gradient over the logits; backward runs once"
            )
        saved = ctx.saved_tensors
        with torch.no_grad():
            logits, *state = saved
            grad = logits if ctx.inplace else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
            source = None if ctx.inplace else logits
            torch.ops.finealign.token_logprobs_bwd(grad, source, dlogp, dlse, dentropy, dmean, *state, *ctx.options)
            ctx.spent = ctx.inplace
        (grad,) = once("token_logprobs", (grad,), (dlogp, dlse, dentropy, dmean, saved[0]))
        return grad, None, None, None, None, None


# ---- arguments and results -----------------------------------------------------------------------------------------


def _check_rows(labels, shape, mask, like) -> Tensor | None:
    """The mask as bool."""
    check_tensor("labels", labels, dtypes=(torch.int64, torch.int32), shape=shape, like=like)
    return None if mask is None else check_flags("mask", mask, shape=shape, like=like)


def _low_rank(adapter, hidden, weight, group, batch_invariant, backend) -> tuple[Tensor, Tensor] | None:
    """(u (N, R), b (V, R)) of adapter, in one dtype."""
    if adapter is None:
        return None
    if not isinstance(adapter, tuple | list) or len(adapter) != 2:
        fail("adapter", "be a tuple (u, b) of u (..., R) and b (V, R)", type(adapter).__name__, TypeError)
    u, b = (_parallel.whole(x) for x in adapter)
    check_tensor("adapter[0]", u, like=hidden)
    rank = u.shape[-1] if u.dim() else 0
    if rank == 0 or u.shape[:-1] != hidden.shape[:-1]:
        fail("adapter[0]", f"have shape (..., R) as hidden {tuple(hidden.shape)}, R >= 1", tuple(u.shape))
    check_tensor("adapter[1]", b, shape=(weight.shape[0], rank), like=hidden)
    if group is not None:
        fail("adapter", "be None with a group: it has no vocabulary-parallel form", "an adapter")
    if batch_invariant or backend == _choose.FUSED:
        option = "batch_invariant=True" if batch_invariant else f"backend={backend!r}"
        fail("adapter", f"be None with {option}: the fused kernel has one product", "an adapter")
    u = u.reshape(-1, rank)
    wide = _chunked.wide(hidden.dtype)
    dtype = wide if wide == torch.float64 or u.dtype != b.dtype or u.dtype == torch.float64 else u.dtype
    return u.to(dtype), b.to(dtype)


def _want(outputs) -> int:
    return sum(WANT[name] for name in set(outputs))


def _bytes(workspace, weight: Tensor) -> int:
    if workspace == "auto":
        return weight.numel() * weight.element_size()
    if workspace == "full":
        return _chunked.FULL
    return check_integer("workspace", workspace, "be 'auto', 'full' or a number of bytes >= 0", least=0)


def _project(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """(N, V) products in float32 (float64); rows that are not read are products of zeros."""
    dtype = _chunked.wide(x.dtype)
    return torch.where((target != formula.SKIP)[:, None], x, 0).to(dtype) @ weight.to(dtype).t()


def _shaped(found, shape, outputs) -> LogProbs:
    logp, lse, *rest = (x.reshape(shape) for x in found[:6])
    return LogProbs(logp, lse, *(x if name in outputs else None for name, x in zip(OUTPUTS, rest, strict=True)))


# ---- the ops that the autograd functions call ----------------------------------------------------------------------


@torch.library.custom_op("finealign::linear_logprobs_fwd", mutates_args=())
def _linear_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: float,
    softcap: float,
    inv_temperature: float,
    want: int,
    workspace: int,
    on_device: bool,
    static: bool,
    rows: str,
) -> list[Tensor]:
    if on_device or hidden.device.type != "cpu":
        note_errors(target, weight.shape[0])
    head = Head(scale, softcap, inv_temperature)
    fwd = _choose.layer(rows).fwd
    return list(fwd(hidden, weight, bias, target, head, want, workspace, on_device, rows, static))


@_linear_fwd.register_fake
def _(hidden, weight, bias, target, scale, softcap, inv_temperature, want, workspace, on_device, static, rows):
    n, vocab = hidden.shape[0], weight.shape[0]
    maxima = _choose.layer(rows).maxima(hidden, vocab, Head(scale, softcap, inv_temperature))
    if workspace == 0 or on_device or static:
        room = _chunked.kept_rows(n, vocab, hidden.dtype, workspace)
    else:
        room = torch.library.get_ctx().new_dynamic_size()
    e = hidden.new_empty(room * vocab)
    e_max = hidden.new_empty((room, maxima), dtype=_chunked.wide(hidden.dtype))
    return [*_chunked.blank_stats(hidden, n), e, e_max]


@torch.library.custom_op("finealign::linear_logprobs_bwd", mutates_args=())
def _linear_bwd(
    dlogp: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    dmean: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
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
    on_device: bool,
    rows: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> list[Tensor]:
    coef = formula.coefficients(dlogp, dlse, dentropy, dmean, logp, entropy, m, l, label_slope, allowed)
    needs = (need_hidden, need_weight, need_bias)
    head = Head(scale, softcap, inv_temperature)
    curved = dentropy is not None
    bwd = _choose.layer(rows).bwd
    grads = bwd(coef, curved, hidden, weight, bias, target, e, e_max, head, needs, on_device, rows)
    return [hidden.new_empty(0) if grad is None else grad for grad in grads]


@_linear_bwd.register_fake
def _(dlogp, dlse, dentropy, dmean, hidden, weight, bias, target, *rest):
    need_hidden, need_weight, need_bias = rest[-3:]
    dhidden = hidden.new_empty(hidden.shape) if need_hidden else hidden.new_empty(0)
    dweight = weight.new_empty(weight.shape) if need_weight else hidden.new_empty(0)
    dbias = weight.new_empty(weight.shape[0], dtype=bias.dtype) if need_bias else hidden.new_empty(0)
    return [dhidden, dweight, dbias]


@torch.library.custom_op("finealign::token_logprobs_fwd", mutates_args=())
def _token_fwd(
    logits: Tensor, target: Tensor, scale: float, softcap: float, inv_temperature: float, want: int, rows: str
) -> list[Tensor]:
    if logits.device.type != "cpu":
        note_errors(target, logits.shape[1])
    states = _tiles.states(logits, target, Head(scale, softcap, inv_temperature), want, rows)
    return list(_choose.rows(rows).combine(*states, target, want))


@_token_fwd.register_fake
def _(logits, target, scale, softcap, inv_temperature, want, rows):
    return _chunked.blank_stats(logits, logits.shape[0])


@torch.library.custom_op("finealign::token_logprobs_bwd", mutates_args=("out",))
def _token_bwd(
    out: Tensor,
    logits: Tensor | None,
    dlogp: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    dmean: Tensor | None,
    target: Tensor,
    logp: Tensor,
    entropy: Tensor,
    m: Tensor,
    l: Tensor,
    label_slope: Tensor,
    allowed: Tensor,
    scale: float,
    softcap: float,
    inv_temperature: float,
    rows: str,
) -> None:
    """The gradient of the logits into out; logits None: over the logits themselves."""
    coef = formula.coefficients(dlogp, dlse, dentropy, dmean, logp, entropy, m, l, label_slope, allowed)
    _tiles.gradient(out, logits, coef, target, Head(scale, softcap, inv_temperature), rows)


@_token_bwd.register_fake
def _(out, logits, *rest):
    return None

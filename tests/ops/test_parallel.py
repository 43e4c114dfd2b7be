"""Vocabulary split over ranks: linear_logprobs and token_logprobs with a group against float64 of one rank."""

import threading
from pathlib import Path
from types import FunctionType
from typing import NamedTuple

import pytest
import ranks
import torch
from torch.testing import assert_close

import finealign_kernels as fk
from finealign_kernels.ops import _choose, _chunked, _plan
from finealign_kernels.testing import budgets, samples

ALL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
N, V, D = 24, 203, 16


class Case(NamedTuple):
    """A head, its rows and upstream gradients; shards: (start, columns, padding columns behind) of each rank."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    upstream: torch.Tensor
    shards: tuple
    options: dict


CUTS = {  # by number of ranks: even with padding, uneven, with empty shards
    1: [((0, 203, 5),)],
    2: [((0, 102, 0), (102, 101, 1)), ((0, 7, 0), (7, 196, 0)), ((0, 203, 0), (203, 0, 0))],
    3: [
        ((0, 68, 0), (68, 68, 0), (136, 67, 1)),
        ((0, 0, 0), (0, 150, 0), (150, 53, 9)),
        ((0, 200, 0), (200, 3, 0), (203, 0, 8)),
    ],
    4: [((0, 51, 0), (51, 51, 0), (102, 51, 0), (153, 50, 1)), ((0, 1, 0), (1, 99, 0), (100, 0, 0), (100, 103, 2))],
}
ROWS = [(count, shards) for count, each in CUTS.items() for shards in each]


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(_chunked, "tile_of", lambda device: _chunked.Tile(4, 24))


def case(shards, dtype=torch.float32, *, labels="all", spread="ordinary", **options) -> Case:
    s = samples.linear(N, V, D, dtype, seed=3, spread=spread)
    at = s.labels.clone()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if labels == "edges":  # first and last column of every shard
        edges = [e for start, columns, _ in shards if columns for e in (start, start + columns - 1)]
        at = torch.tensor(edges).repeat(N)[:N]
    elif labels != "all":  # all in one rank's shard
        start, columns, _ = shards[labels]
        at = start + at % columns
    bias = torch.randn(V, generator=torch.Generator().manual_seed(1), dtype=wide)
    bias[5] = bias[77] = -torch.inf
    at = torch.where((at == 5) | (at == 77), 6, at)
    at[3] = -100
    mask = torch.ones(N, dtype=torch.bool)
    mask[7:10] = False
    upstream = s.upstream.clone()
    upstream[:, 12:14] = 0  # no gradient: dropped in backward
    upstream[:2, 15] = 0  # of the entropy alone
    return Case(
        s.hidden,
        s.weight,
        bias,
        at,
        mask,
        upstream,
        shards,
        {"softcap": 9.0, "temperature": 0.8, "logit_scale": 1.1, **options},
    )


def loss_of(out, upstream):
    dlogp, dlse, dentropy = upstream.to(out.logp.dtype)
    loss = (out.logp * dlogp).sum() + (out.lse * dlse).sum()
    if out.mean_logits is not None:  # not in every row: those with a gradient of the mean do not use E
        loss = loss + (out.mean_logits * dlse)[::3].sum()
    return loss if out.entropy is None else loss + (out.entropy * dentropy).sum()


def piece(c: Case, rank: int):
    """This rank's weight and bias; what stands in the padding must never be seen."""
    start, columns, padding = c.shards[rank]
    weight = torch.cat([c.weight[start : start + columns], torch.full((padding, D), torch.nan, dtype=c.weight.dtype)])
    bias = torch.cat([c.bias[start : start + columns], torch.full((padding,), 7.0, dtype=c.bias.dtype)])
    return weight, bias


def run(group, c: Case, how: dict):
    """Outputs and gradients of this rank."""
    rank = torch.distributed.get_rank(group)
    weight, bias = (x.requires_grad_() for x in piece(c, rank))
    hidden = c.hidden.clone()
    if how.get("hidden_grad") == "reduce_scatter":
        hidden = hidden.chunk(len(c.shards))[rank].clone()
    hidden.requires_grad_()
    out = fk.linear_logprobs(
        hidden,
        weight,
        c.labels,
        bias=bias,
        mask=c.mask,
        group=group,
        vocab_start=c.shards[rank][0],
        vocab_size=V,
        **{"outputs": ALL, **c.options, **how},
    )
    grads = torch.autograd.grad(loss_of(out, c.upstream), (hidden, weight, bias))
    return [x if x is None else x.detach() for x in out], [g.clone() for g in grads]


def whole(c: Case, dtype=torch.float64, **how):
    """The same of one rank."""
    hidden, weight, bias = (x.to(dtype).requires_grad_() for x in (c.hidden, c.weight, c.bias))
    b = bias if dtype == torch.float64 else bias.float()
    out = fk.linear_logprobs(hidden, weight, c.labels, bias=b, mask=c.mask, **{"outputs": ALL, **c.options, **how})
    return out, torch.autograd.grad(loss_of(out, c.upstream), (hidden, weight, bias))


def joined(c: Case, found) -> tuple:
    """dX, dW and dbias of the whole from those of the ranks; padding has none."""
    real = [columns for _, columns, _ in c.shards]
    for (_, dw, db), columns in zip((grads for _, grads in found), real, strict=True):
        assert not dw[columns:].any() and not db[columns:].any()
    dw = torch.cat([grads[1][:columns] for (_, grads), columns in zip(found, real, strict=True)])
    db = torch.cat([grads[2][:columns] for (_, grads), columns in zip(found, real, strict=True)])
    return [grads[0] for _, grads in found], dw, db


def check(c: Case, found, hidden_grad: str, tolerance=3e-6, rounding=0.0):
    exact, (dx, dw, db) = whole(c, backend="reference")
    for outs, _ in found:
        for name, actual, expected, first in zip(exact._fields, outs, exact, found[0][0], strict=True):
            assert torch.equal(actual, first), f"{name} differs between ranks"
            if name == "is_top1":
                assert torch.equal(actual, expected)
            else:
                assert_close(
                    actual.double(), expected, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
                )
    dxs, our_dw, our_db = joined(c, found)
    if hidden_grad == "none":
        dxs = [sum(x.double() for x in dxs)]
    elif hidden_grad == "reduce_scatter":
        dxs = [torch.cat(dxs)]
    for ours, theirs, what in [*((x, dx, "dX") for x in dxs), (our_dw, dw, "dW"), (our_db, db, "dbias")]:
        scale = theirs.abs().max().item()
        assert_close(
            ours.double(),
            theirs,
            rtol=rounding,
            atol=(tolerance + rounding) * scale,
            msg=lambda m, what=what: f"{what}: {m}",
        )


@pytest.mark.parametrize("count, shards", ROWS)
@pytest.mark.parametrize("hidden_grad", ("none", "all_reduce", "reduce_scatter"))
def test_the_ranks_together_are_one(small_tiles, count, shards, hidden_grad):
    """Even, uneven and empty shards, padding, banned tokens, rows that are not read, dropped rows, every output."""
    c = case(shards)
    how = {"hidden_grad": hidden_grad, "backend": "native", "workspace": 9 * 60 * 4}
    check(c, ranks.threads(count, run, c, how), hidden_grad)


@pytest.mark.parametrize("labels", ("edges", 0, 1, 2, 3))
def test_labels_anywhere(small_tiles, labels):
    """At both ends of every shard, or all on one rank: the others have no label of their own."""
    c = case(CUTS[4][0], labels=labels)
    check(c, ranks.threads(4, run, c, {"backend": "torch", "hidden_grad": "all_reduce"}), "all_reduce")


KINDS = [
    (backend, dtype, workspace, compact)
    for backend in ("torch", "native")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for workspace, compact in ((0, "host"), ("full", "device"), (5 * 60 * 4, "host"), (5 * 60 * 4, "device"))
    if backend == "torch" or dtype != torch.float64
]


def check_layer(c: Case, dtype, how):
    found = ranks.threads(len(c.shards), run, c, {"hidden_grad": "all_reduce", **how})
    half = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 0.0)
    check(c, found, "all_reduce", 1e-11 if dtype == torch.float64 else 4e-6, 2 * half)


@pytest.mark.parametrize("backend, dtype, workspace, compact", KINDS)
def test_every_layer(small_tiles, backend, dtype, workspace, compact, usable):
    usable(backend, "cpu", dtype)
    c = case(CUTS[3][0], dtype)
    check_layer(c, dtype, {"backend": backend, "workspace": workspace, "compact": compact})


class Locked:
    """A module whose functions run one at a time, as Triton's interpreter must."""

    lock = threading.RLock()

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        found = getattr(self.module, name)
        if not isinstance(found, FunctionType):
            return found

        def call(*args, **kwargs):
            with self.lock:
                return found(*args, **kwargs)

        return call


@pytest.mark.parametrize("backend, workspace, compact", [("triton", 0, "host"), ("triton_fused", "full", "device")])
def test_triton_layers(backend, workspace, compact, usable, monkeypatch):
    usable("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    rows, fused = _choose.rows, _choose.fused
    monkeypatch.setattr(_choose, "rows", lambda name: Locked(rows(name)))
    monkeypatch.setattr(_choose, "fused", lambda: Locked(fused()))
    c = case(CUTS[2][0])
    check_layer(c, torch.float32, {"backend": backend, "workspace": workspace, "compact": compact})


@pytest.mark.parametrize("spread", samples.SPREADS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_error_budgets(dtype, spread):
    """Two ranks against float64, measured by eager PyTorch's error as one rank is, dX rounded once after the sum."""
    s = samples.linear(64, 4099, 48, dtype, spread=spread)

    def eager(dtype):
        hidden, weight = s.hidden.to(dtype).requires_grad_(), s.weight.to(dtype).requires_grad_()
        out = samples.eager(hidden, weight, s.labels)
        loss = sum((x * g.to(x.dtype)).sum() for x, g in zip(out, s.upstream, strict=True))
        return out, torch.autograd.grad(loss, (hidden, weight))

    def ours(group):
        rank = torch.distributed.get_rank(group)
        start = (0, 2050)[rank]
        hidden, weight = (
            s.hidden.clone().requires_grad_(),
            s.weight[start : (2050, 4099)[rank]].clone().requires_grad_(),
        )
        out = fk.linear_logprobs(
            hidden, weight, s.labels, outputs=("entropy",), group=group, vocab_start=start, hidden_grad="all_reduce"
        )
        return [x.detach() for x in out[:3]], torch.autograd.grad(loss_of(out, s.upstream), (hidden, weight))

    (exact, exact_grads), (_, rounded_grads) = eager(torch.float64), eager(dtype)
    wide = dtype == torch.float32
    as_wide = wide or spread == "uniform"  # near-uniform rows are log V however a half rounds their logits
    (rounded, _) = eager(torch.float32 if as_wide else dtype)
    (outs, (dx, dw0)), (_, (_, dw1)) = ranks.threads(2, ours)
    for actual, truth, theirs in zip(outs, exact, rounded, strict=True):
        budgets.assert_within(actual, truth, theirs, rms_ratio=1.5 if as_wide else 0.05, max_ratio=2, ulps=1)
    for actual, truth, theirs in zip((dx, torch.cat([dw0, dw1])), exact_grads, rounded_grads, strict=True):
        bounds = dict(rms_ratio=1.05, max_ratio=3 if wide else 2, ulps=4 if wide else 1)
        if spread == "uniform" and not wide:  # E is rounded, then dZ
            bounds["rms_ratio"] = 1.3
        budgets.assert_within(actual, truth, theirs, **bounds)


# ---- collectives ---------------------------------------------------------------------------------------------------


def counted(group, c: Case, how: dict, frozen=()):
    """Collectives of forward and of backward on this rank."""
    rank = torch.distributed.get_rank(group)
    weight, bias = piece(c, rank)
    weight.requires_grad_(rank not in frozen)
    hidden = c.hidden if how["hidden_grad"] != "reduce_scatter" else c.hidden.chunk(len(c.shards))[rank]
    hidden = hidden.clone().requires_grad_()
    with ranks.Traffic() as forward:
        out = fk.linear_logprobs(
            hidden, weight, c.labels, bias=bias, mask=c.mask, group=group, vocab_start=c.shards[rank][0], vocab_size=V,
            outputs=how.get("outputs", ("entropy",)), hidden_grad=how["hidden_grad"],
        )  # fmt: skip
    with ranks.Traffic() as backward:
        loss_of(out, c.upstream).backward()
    return forward.calls, backward.calls


BACK = {
    "none": [],
    "all_reduce": [("allreduce", N * D * 4)],
    "reduce_scatter": [("allgather", N // 4 * D * 4), ("reduce_scatter", N * D * 4)],
}


@pytest.mark.parametrize("hidden_grad", BACK)
@pytest.mark.parametrize("masked", ("none", "some", "all"))
def test_16_bytes_a_row_forward_and_dx_backward(hidden_grad, masked):
    """Whatever is masked, frozen, empty or without gradient: the same collectives of the same size on every rank."""
    c = case(CUTS[4][1])
    c = c._replace(mask={"none": torch.ones_like(c.mask), "some": c.mask, "all": torch.zeros_like(c.mask)}[masked])
    gather = [("allgather", N // 4 * D * 4)] if hidden_grad == "reduce_scatter" else []
    for forward, backward in ranks.threads(4, counted, c, {"hidden_grad": hidden_grad}, (1, 2)):
        assert forward == [*gather, ("allgather", 16 * N)]
        assert backward == BACK[hidden_grad]


@pytest.mark.parametrize("hidden_grad", ("all_reduce", "reduce_scatter"))
def test_dx_is_on_its_way_while_dw_is_computed(hidden_grad, monkeypatch):
    """The last product of dW comes after the collective has begun."""
    events, product = threading.local(), _chunked.product

    def noted(a, b, out, accumulate=False):
        events.seen.append("product")
        product(a, b, out, accumulate)

    monkeypatch.setattr(_chunked, "product", noted)
    c = case(CUTS[2][0])

    def order(group):
        events.seen = []
        hidden = c.hidden.chunk(2)[torch.distributed.get_rank(group)] if hidden_grad == "reduce_scatter" else c.hidden
        hidden, weight = (
            hidden.clone().requires_grad_(),
            piece(c, torch.distributed.get_rank(group))[0].requires_grad_(),
        )
        out = fk.linear_logprobs(
            hidden, weight, c.labels, group=group, vocab_start=c.shards[torch.distributed.get_rank(group)][0],
            vocab_size=V, hidden_grad=hidden_grad,
        )  # fmt: skip
        with ranks.Traffic() as traffic:
            traffic.note = lambda name, inputs: events.seen.append(name)
            out.logp.sum().backward()
        return events.seen

    for seen in ranks.threads(2, order):
        assert seen[-1] == "product" and seen.count("product") >= 2, seen
        assert any("reduce" in name for name in seen[:-1])


def test_further_outputs_travel_with_the_same_collective():
    c = case(CUTS[2][0])
    for forward, _ in ranks.threads(2, counted, c, {"hidden_grad": "none", "outputs": ALL}):
        assert forward == [("allgather", (16 + 4 + 8 + 4) * N)]


def test_half_a_batch_of_bfloat16_moves_float32_sums():
    c = case(CUTS[2][0], torch.bfloat16)
    for forward, backward in ranks.threads(2, counted, c, {"hidden_grad": "reduce_scatter"}):
        assert forward == [("allgather", N // 2 * D * 2), ("allgather", 16 * N)]
        assert backward == [("allgather", N // 2 * D * 2), ("reduce_scatter", N * D * 4)]


@pytest.mark.parametrize("hidden_grad", ("none", "all_reduce", "reduce_scatter"))
def test_no_rows(hidden_grad):
    def empty(group):
        hidden, weight = torch.zeros(0, D, requires_grad=True), torch.randn(5, D, requires_grad=True)
        out = fk.linear_logprobs(hidden, weight, torch.zeros(0, dtype=torch.long), group=group, hidden_grad=hidden_grad)
        out.logp.sum().backward()
        return out.logp.shape, hidden.grad.shape, weight.grad

    for logp, dx, dw in ranks.threads(2, empty):
        assert logp == (0,) and dx == (0, D) and not dw.any()


# ---- gradients -----------------------------------------------------------------------------------------------------


def test_a_second_backward_is_the_first(small_tiles):
    c = case(CUTS[2][1])

    def twice(group):
        rank = torch.distributed.get_rank(group)
        weight, bias = (x.requires_grad_() for x in piece(c, rank))
        hidden = c.hidden.clone().requires_grad_()
        options = dict(group=group, vocab_start=c.shards[rank][0], vocab_size=V, hidden_grad="all_reduce")
        out = fk.linear_logprobs(hidden, weight, c.labels, bias=bias, mask=c.mask, outputs=("entropy",), **options)
        loss, inputs = loss_of(out, c.upstream), (hidden, weight, bias)
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        second = torch.autograd.grad(loss, inputs, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(second[0].sum(), hidden)
        return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    assert all(ranks.threads(2, twice))


def test_a_frozen_head_has_no_gradient_and_hidden_keeps_its_own(small_tiles):
    c = case(CUTS[2][0])

    def frozen(group):
        rank = torch.distributed.get_rank(group)
        weight, bias = piece(c, rank)
        hidden = c.hidden.clone().requires_grad_()
        options = dict(group=group, vocab_start=c.shards[rank][0], vocab_size=V, hidden_grad="all_reduce", **c.options)
        out = fk.linear_logprobs(hidden, weight, c.labels, bias=bias, mask=c.mask, outputs=("entropy",), **options)
        loss_of(out, c.upstream).backward()
        assert weight.grad is None
        return hidden.grad

    _, (dx, *_) = whole(c, backend="reference", outputs=("entropy",))
    for ours in ranks.threads(2, frozen):
        assert_close(ours.double(), dx, rtol=0, atol=3e-6 * dx.abs().max().item())


def test_the_outputs_without_a_gradient_of_the_entropy(small_tiles):
    c = case(CUTS[3][1])
    found = ranks.threads(3, run, c, {"outputs": (), "hidden_grad": "all_reduce"})
    _, (dx, *_) = whole(c, backend="reference", outputs=())
    for outs, (ours, *_) in found:
        assert all(x is None for x in outs[2:])
        assert_close(ours.double(), dx, rtol=0, atol=3e-6 * dx.abs().max().item())


def test_shapes_of_sequence_parallelism(small_tiles):
    """hidden (S/ranks, B, D) with labels (S, B)."""
    c = case(CUTS[2][0])

    def sequences(group):
        rank = torch.distributed.get_rank(group)
        weight, bias = (x.requires_grad_() for x in piece(c, rank))
        hidden = c.hidden.view(6, 4, D)[rank * 3 : rank * 3 + 3].clone().requires_grad_()
        options = dict(group=group, vocab_start=c.shards[rank][0], vocab_size=V, hidden_grad="reduce_scatter")
        labels, mask = c.labels.view(6, 4), c.mask.view(6, 4)
        out = fk.linear_logprobs(
            hidden, weight, labels, bias=bias, mask=mask, outputs=("entropy",), **options, **c.options
        )
        assert out.logp.shape == (6, 4)
        flat = out._replace(logp=out.logp.flatten(), lse=out.lse.flatten(), entropy=out.entropy.flatten())
        loss_of(flat, c.upstream).backward()
        return flat.logp.detach(), hidden.grad

    exact, (dx, *_) = whole(c, backend="reference", outputs=("entropy",))
    (logp, dx0), (_, dx1) = ranks.threads(2, sequences)
    assert_close(logp.double(), exact.logp.detach(), rtol=3e-6, atol=3e-6)
    assert_close(torch.cat([dx0, dx1]).flatten(0, 1).double(), dx, rtol=0, atol=3e-6 * dx.abs().max().item())


def test_a_confident_token_keeps_its_digits():
    """1 - p of 1e-9 on the owner, a flat tail on the other rank."""
    logits, labels = samples.confident(1 - 1e-9, 64)

    def score(group):
        rank = torch.distributed.get_rank(group)
        mine = logits[:, rank * 32 : rank * 32 + 32].clone().requires_grad_()
        out = fk.token_logprobs(mine, labels, group=group)
        (grad,) = torch.autograd.grad(out.logp.sum(), mine)
        return out.logp.detach(), grad

    exact = torch.log_softmax(logits.double(), -1).gather(1, labels[:, None])[:, 0]
    found = ranks.threads(2, score)
    for logp, _ in found:
        assert_close(logp.double(), exact, rtol=1e-6, atol=0)
    grad = torch.cat([g for _, g in found], 1).double().gather(1, labels[:, None])[:, 0]
    assert_close(grad, -torch.expm1(exact), rtol=1e-6, atol=0)


# ---- sharded logits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, shards", [(2, CUTS[2][0]), (3, CUTS[3][1]), (4, CUTS[4][1])])
@pytest.mark.parametrize("backend, inplace", [("torch", False), ("native", False), ("native", True)])
def test_sharded_logits(count, shards, backend, inplace, usable):
    usable(backend)
    c = case(shards)
    logits = c.hidden @ c.weight.t() + c.bias

    def score(group):
        rank = torch.distributed.get_rank(group)
        start, columns, padding = shards[rank]
        mine = torch.cat([logits[:, start : start + columns], torch.full((N, padding), torch.nan)], 1).requires_grad_()
        with ranks.Traffic() as traffic:
            out = fk.token_logprobs(
                mine * 1, c.labels, mask=c.mask, outputs=ALL, group=group, vocab_start=start, vocab_size=V,
                inplace_backward=inplace, backend=backend, **c.options,
            )  # fmt: skip
            (grad,) = torch.autograd.grad(loss_of(out, c.upstream), mine)
        assert traffic.calls == [("allgather", 32 * N)]
        assert not grad[:, columns:].any()
        return [x.detach() for x in out], grad[:, :columns]

    x = logits.double().requires_grad_()
    exact = fk.token_logprobs(x, c.labels, mask=c.mask, outputs=ALL, backend="reference", **c.options)
    (dx,) = torch.autograd.grad(loss_of(exact, c.upstream), x)
    found = ranks.threads(count, score)
    for outs, _ in found:
        for actual, expected, first in zip(outs, exact, found[0][0], strict=True):
            assert torch.equal(actual, first)
            assert_close(actual.to(expected.dtype), expected, rtol=3e-6, atol=3e-6)
    assert_close(torch.cat([g for _, g in found], 1).double(), dx, rtol=0, atol=3e-6 * dx.abs().max().item())


def test_the_true_size_without_a_group():
    """Padding columns of a whole head, or of whole logits, are no tokens."""
    s = samples.linear(N, V, D)
    padded = torch.cat([s.weight, torch.full((5, D), torch.nan)]).requires_grad_()
    out = fk.linear_logprobs(s.hidden, padded, s.labels, vocab_size=V)
    plain = fk.linear_logprobs(s.hidden, s.weight, s.labels)
    assert torch.equal(out.logp, plain.logp)
    out.logp.sum().backward()
    assert not padded.grad[V:].any() and padded.grad[:V].isfinite().all()
    with torch.no_grad():
        logits = s.hidden @ padded.t()
        assert_close(fk.token_logprobs(logits, s.labels, vocab_size=V).logp, plain.logp)
    with pytest.raises(IndexError, match=r"outside \[0, 203\)"):
        fk.linear_logprobs(s.hidden, padded, torch.full((N,), 204), vocab_size=V)


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_a_label_that_no_rank_or_two_ranks_hold_is_an_error_on_all_ranks():
    s = samples.linear(N, 100, D)

    def scores(group, start, size, label):
        labels = torch.full((N,), label)
        weight = s.weight.chunk(2)[torch.distributed.get_rank(group)]
        with pytest.raises(IndexError) as error:
            fk.linear_logprobs(s.hidden, weight, labels, group=group, vocab_start=start, vocab_size=size)
        return str(error.value)

    for message in ranks.threads(2, scores, None, 100, 100):
        assert "labels[0] = 100 is outside [0, 100)" in message
    for rank, message in enumerate(ranks.threads(2, scores, None, None, 100)):
        span = ("[0, 50)", "[50, 100)")[rank]
        assert f"labels: 100 of row 0 is in no rank's shard; rank {rank} of 2 holds {span}" in message
    for message in ranks.threads(2, scores, 0, 100, 7):
        assert "is in the shards of 2 ranks" in message


def test_arguments_are_refused_by_name():
    s = samples.linear(4, 10, 8)
    refused = [
        (dict(hidden_grad="sum"), ValueError, "hidden_grad must be None or one of"),
        (dict(hidden_grad="all_reduce"), ValueError, "hidden_grad must be 'none' without a group"),
        (dict(vocab_start=5), ValueError, "vocab_start must be None or 0 without a group"),
        (dict(vocab_size=11), ValueError, "vocab_size must be at most 10"),
        (dict(vocab_size=0), ValueError, "vocab_size must be at least 1"),
        (dict(vocab_size=2.0), ValueError, "vocab_size must be None or an integer"),
        (dict(group="tp"), TypeError, "group must be None or a torch.distributed.ProcessGroup"),
    ]
    for options, kind, message in refused:
        with pytest.raises(kind, match=message):
            fk.linear_logprobs(s.hidden, s.weight, s.labels, **options)

    def grouped(group):
        with pytest.raises(ValueError, match="backend must not be 'reference' with a group"):
            fk.linear_logprobs(s.hidden, s.weight, s.labels, group=group, backend="reference")
        with pytest.raises(ValueError, match=r"labels must have shape \(8,\)"):
            fk.linear_logprobs(s.hidden, s.weight, s.labels, group=group, hidden_grad="reduce_scatter")

    ranks.threads(2, grouped)


# ---- real processes ------------------------------------------------------------------------------------------------


def _spawned(group, shards, hidden_grad):
    c = case(shards)
    found = run(group, c, {"hidden_grad": hidden_grad})
    forward, backward = counted(group, c, {"hidden_grad": hidden_grad})
    return *found, [list(call) for call in forward], [list(call) for call in backward]


def _compiled(group):
    """Whether outputs and gradients of the same functions, eager and as one graph, have the same bits."""
    c, rank = case(CUTS[2][1]), torch.distributed.get_rank(group)
    weight, bias = (x.requires_grad_() for x in piece(c, rank))
    temperatures = torch.linspace(0.5, 2, N)
    kept = (c.labels.clamp(min=0)[:, None] + torch.arange(0, 100, 9)) % V  # by the sampler
    options = dict(group=group, vocab_start=c.shards[rank][0], vocab_size=V, mask=c.mask, outputs=ALL)

    def head(hidden_grad, temperature):
        def score(hidden, weight, bias):
            how = dict(bias=bias, hidden_grad=hidden_grad, temperature=temperature, softcap=9.0)
            how["support"] = None if temperature is not temperatures else kept
            out = fk.linear_logprobs(hidden * 2, weight, c.labels, **how, **options)
            return loss_of(out, c.upstream), *(x * 1 for x in out)

        hidden = c.hidden.chunk(2)[rank].clone() if hidden_grad == "reduce_scatter" else c.hidden.clone()
        return score, (hidden.requires_grad_(), weight, bias)

    def logits(inplace, temperature):
        def score(logits):
            out = fk.token_logprobs(logits * 2, c.labels, inplace_backward=inplace, temperature=temperature, **options)
            return loss_of(out, c.upstream), *(x * 1 for x in out)

        with torch.no_grad():
            mine = c.hidden @ weight.t() + bias
        return score, (mine.requires_grad_(),)

    same = []
    cases = (
        head("reduce_scatter", 0.8),
        head("all_reduce", temperatures),
        logits(False, 0.8),
        logits(True, temperatures),
    )
    for function, inputs in cases:
        torch._dynamo.reset()
        found = []
        for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            loss, *rest = run(*inputs)
            found.append([loss.detach(), *(x.detach() for x in rest), *torch.autograd.grad(loss, inputs)])
        same.append([torch.equal(a, b) for a, b in zip(*found, strict=True)])
    return same


def test_compiles_without_a_graph_break():
    """Head and logits over ranks are one graph with what stands around them, its bits those of eager."""
    for same in ranks.processes(2, _compiled):
        assert all(all(each) for each in same), same


def test_gloo_processes():
    """Three processes over gloo do what threads do, byte for byte."""
    c = case(CUTS[3][0])
    found = ranks.processes(3, _spawned, c.shards, "reduce_scatter")
    check(c, [(outs, grads) for outs, grads, *_ in found], "reduce_scatter")
    for *_, forward, backward in found:
        assert forward == [["allgather", N // 3 * D * 4], ["allgather", 16 * N]]
        assert backward == [["allgather", N // 3 * D * 4], ["reduce_scatter", N * D * 4]]


# ---- what it moves, by formula -------------------------------------------------------------------------------------


KINDS_OF_PLANS = [
    (hidden_grad, dtype, outputs)
    for hidden_grad in ("none", "all_reduce", "reduce_scatter")
    for dtype in (torch.float32, torch.bfloat16)
    for outputs in (("entropy",), ALL)
]


def _moved(group):
    kinds = KINDS_OF_PLANS
    return [counted(group, case(CUTS[2][0], t), {"hidden_grad": h, "outputs": outputs}) for h, t, outputs in kinds]


def test_the_plan_counts_what_gloo_moves():
    for found in ranks.processes(2, _moved):
        for (hidden_grad, dtype, outputs), moved in zip(KINDS_OF_PLANS, found, strict=True):
            planned = _plan.plan(N, D, V, 2, hidden_grad=hidden_grad, dtype=dtype, outputs=outputs)
            assert moved == (planned.forward, planned.backward)


def test_the_page_on_many_gpus_has_the_numbers_of_the_plan():
    page = (Path(__file__).parents[2] / "docs/guides/many-gpus.md").read_text()
    for line in [*_plan.table(), *_plan.step_table()]:
        assert line in page

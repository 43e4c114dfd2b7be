"""Sequences split over ranks: labels, sums, scans, pivots and losses have the numbers of whole sequences."""

import pytest
import ranks
import torch
from torch.testing import assert_close

import finealign_kernels as fk
from finealign_kernels.testing import samples

pytestmark = pytest.mark.usefixtures("one_thread")

B, T = 4, 22
CU = torch.tensor([0, 5, 5, 6, 19, 21, 40])  # sequences shorter than the chunks are many, and one without tokens
STREAM = torch.tensor([0, 40])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cut(group, kind, layout):
    """The shard, shape of a whole batch, what ops take as cu_seqlens, and what next and segment sums take."""
    if kind == "padded":
        return fk.ContextShard(T, group, layout=layout), (B, T), None, None
    if kind == "packed":
        return fk.ContextShard(CU, group, layout=layout), (40,), CU, None
    return fk.ContextShard(STREAM, group, layout=layout), (40,), CU, CU


def whole_next(ids, cu):
    """Labels of whole sequences."""
    out = torch.full_like(ids, -100)
    if cu is None:
        out[:, :-1] = ids[:, 1:]
        return out
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        out[start : end - 1] = ids[start + 1 : end] if end > start else out[start:start]
    return out


def the_same_numbers(group, kind, layout):
    shard, shape, cu, ends = cut(group, kind, layout)
    x, values, weight = (random(*shape, seed=k) for k in range(3))
    mask = random(*shape, seed=3) > -0.7
    ids = torch.randint(9, shape, generator=torch.Generator().manual_seed(4))

    # what goes over comes back, whatever its dtype, in one collective
    given = x, x.bfloat16(), ids, mask, torch.stack([x, values], -1).double()
    with ranks.Traffic() as traffic:
        back = shard.gather(*(shard.local(one) for one in given))
    assert [name for name, _ in traffic.calls] == ["allgather"]
    for one, other in zip(back, given, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)

    # labels: the next token may live on another rank
    with ranks.Traffic() as traffic:
        labels = shard.next(shard.local(ids), cu_seqlens=ends)
    assert [name for name, _ in traffic.calls] == ["allgather"]
    first_tokens = {"padded": 2 * B, "packed": 2 * len(CU), "stream": 2}[kind]  # of at most two chunks a sequence
    assert traffic.calls[0][1] <= 8 * first_tokens
    assert torch.equal(labels, shard.local(whole_next(ids, cu)))

    # sums of whole sequences, and gradients of a rank's tokens
    dirty = torch.where(mask, x, torch.nan)
    for ours, theirs in ((shard.segment_sum, fk.segment_sum), (shard.segment_mean, fk.segment_mean)):
        mine, all_of_it = shard.local(dirty).requires_grad_(), dirty.clone().requires_grad_()
        found = ours(mine, ends, mask=shard.local(mask))
        exact = theirs(all_of_it, cu, mask=mask)
        assert_close(found, exact, rtol=2e-7, atol=1e-7)
        (found**2).sum().backward()
        (exact**2).sum().backward()
        assert_close(mine.grad, shard.local(all_of_it.grad), rtol=1e-6, atol=1e-6)
    assert_close(ours(shard.local(x.double()), ends), theirs(x.double(), cu), rtol=1e-14, atol=1e-14)

    # scans, whitening, pivots and averages: to the bit
    r, v, m = shard.gather(*(shard.local(one) for one in (x, values, mask)))
    options = dict(mask=mask, cu_seqlens=cu)
    with_ours = dict(mask=m, cu_seqlens=cu)
    for function in (
        lambda x, v, o: fk.gae(x, v, gamma=0.9, **o).advantages,
        lambda x, v, o: fk.discounted_returns(x, gamma=0.97, **o),
        lambda x, v, o: fk.whiten(x, **o),
        lambda x, v, o: fk.pivot_flags(x, kind="threshold", threshold=0.5, **o),
        lambda x, v, o: fk.pivot_flags(x, kind="salience", percent=20.0, **o),
        lambda x, v, o: fk.adaptive_mask(x, side=1, baseline="row", **o).token_weight,
    ):
        assert torch.equal(shard.local(function(r, v, with_ours)), shard.local(function(x, values, options)))
    mine, all_of_it = shard.local(x).requires_grad_(), x.clone().requires_grad_()
    (fk.reverse_scan(shard.gather(mine), 0.9, cu) * weight).sum().backward()
    (fk.reverse_scan(all_of_it, 0.9, cu) * weight).sum().backward()
    assert torch.equal(mine.grad, shard.local(all_of_it.grad))

    # from hidden states to a loss of whole sequences
    s = samples.linear(x.numel(), 31, 8)
    hidden = s.hidden.view(*shape, 8)

    def loss_of(logp, mask):
        return fk.preference_loss("simpo", logp, mask=mask, cu_seqlens=cu).loss

    def step(hidden, labels, gather):
        hidden, head = hidden.clone().requires_grad_(), s.weight.clone().requires_grad_()
        logp = fk.linear_logprobs(hidden, head, labels).logp
        loss = loss_of(*gather(logp, labels != -100))
        loss.backward()
        return loss.detach(), hidden.grad, head.grad

    loss, dx, dw = step(shard.local(hidden), labels, shard.gather)
    exact, exact_dx, exact_dw = step(hidden, whole_next(ids, cu), lambda *x: x)
    assert_close(loss, exact, rtol=1e-5, atol=0)
    assert_close(dx, shard.local(exact_dx), rtol=1e-5, atol=1e-7)
    assert_close(fk.sum_over_ranks(dw, group=group).float(), exact_dw, rtol=1e-5, atol=1e-7)
    return shard.index, found.detach()


def every_cut(group):
    return {
        (kind, layout): the_same_numbers(group, kind, layout)
        for kind in ("padded", "packed", "stream")
        for layout in ("contiguous", "zigzag")
    }


@pytest.mark.parametrize("count", (1, 2, 4))
def test_the_numbers_of_whole_sequences(count):
    found = ranks.processes(count, every_cut)
    for key in found[0]:
        together = torch.cat([rank[key][0] for rank in found]).sort().values
        assert torch.equal(together, torch.arange(len(together)))  # every token on one rank
        assert all(torch.equal(rank[key][1], found[0][key][1]) for rank in found)  # sums to the bit


def one_graph(group):
    """Loss of whole sequences from a rank's tokens, and the step's count, eager and compiled."""
    shard = fk.ContextShard(CU, group, layout="zigzag")
    x = shard.local(random(40)).requires_grad_()

    def step(x):
        whole, kept = shard.gather(x * 2, x > -1)
        scores = fk.segment_mean(whole, CU, mask=kept) + shard.segment_sum(x)
        return (scores**2).sum() / fk.sum_over_ranks((x > 0).sum(), group=group)

    losses = [run(x) for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager"))]
    return [(loss.detach(), *torch.autograd.grad(loss, x)) for loss in losses]


def test_compiles_without_a_graph_break():
    for eager, compiled in ranks.processes(2, one_graph):
        assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def test_layouts_are_those_of_the_engines():
    """Zigzag of a padded batch as Megatron-Core and torch cut it, of a packed one as Transformer Engine does."""

    def places(group):
        rows = fk.ContextShard(16, group, layout="zigzag").index.tolist()
        packed = fk.ContextShard(torch.tensor([0, 4, 12]), group, layout="zigzag").index.tolist()
        return rows, packed, fk.ContextShard(10, group).index.tolist(), fk.ContextShard(1, group).sizes

    one, two = ranks.threads(2, places)
    assert one == ([0, 1, 2, 3, 12, 13, 14, 15], [0, 3, 4, 5, 10, 11], [0, 1, 2, 3, 4], [1, 0])
    assert two == ([4, 5, 6, 7, 8, 9, 10, 11], [1, 2, 6, 7, 8, 9], [5, 6, 7, 8, 9], [1, 0])


def test_a_rank_without_tokens_takes_part():
    """Rows of two tokens over four ranks, and a batch without rows."""

    def empty(group):
        shard = fk.ContextShard(2, group)
        x = shard.local(torch.tensor([[1.0, 2.0], [3.0, 5.0]])).requires_grad_()
        total = shard.segment_sum(x)
        (total.sum() + shard.gather(x).square().sum()).backward()
        labels = shard.next(shard.local(torch.tensor([[7, 8], [9, 6]])))
        none = shard.gather(torch.zeros(0, len(shard.index)))
        return total.tolist(), x.grad.flatten().tolist(), labels.flatten().tolist(), list(none.shape)

    first, second, *others = ranks.threads(4, empty)
    assert first == ([3, 8], [3, 7], [8, 6], [0, 2])
    assert second == ([3, 8], [5, 11], [-100, -100], [0, 2])
    assert others == [([3, 8], [], [], [0, 2])] * 2


def test_one_row_and_one_token():
    """A batch of one row lies in memory as a column; a tensor of one element may have any stride."""

    def one_row(group):
        shard = fk.ContextShard(5, group)
        whole = random(1, 5), random(1, 5).double() > 0, random(1, 5, 2).bfloat16(), random(1, 5, seed=1).double()
        back = shard.gather(*(shard.local(one) for one in whole))
        strided = torch.arange(12.0).view(4, 3)[:1, 1]
        shard = fk.ContextShard(torch.tensor([0, 2]), group)
        return (*zip(back, whole, strict=True), (shard.gather(strided), torch.tensor([1.0, 1.0])))

    for rank in ranks.threads(2, one_row):
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in rank)


def test_refusals():
    def refused(group):
        shard = fk.ContextShard(6, group)
        for wrong, message in (
            (lambda: fk.ContextShard(6, group, layout="striped"), "layout must be one of"),
            (lambda: fk.ContextShard(-1, group), "tokens must be the length T of the rows, or cu_seqlens"),
            (lambda: fk.ContextShard(torch.tensor([1, 2]), group), "tokens must start at 0"),
            (lambda: shard.gather(), "x must hold a tensor"),
            (lambda: shard.gather(torch.zeros(2, 6)), r"x\[0\] must have shape \(B, 3, ...\), this rank's tokens"),
            (lambda: shard.gather(torch.zeros(2, 3), torch.zeros(1, 3)), r"x\[1\] must have 2 rows, as x\[0\]"),
            (lambda: shard.local(torch.zeros(2, 3)), r"x must have shape \(B, 6, ...\), whole tokens"),
            (lambda: shard.next(torch.zeros(3)), "x must have shape"),
            (lambda: shard.segment_sum(torch.zeros(2, 3, 1)), r"x must have shape \(B, n\)"),
            (lambda: shard.segment_sum(torch.zeros(2, 3), CU), "cu_seqlens must be None for a padded batch"),
            (
                lambda: fk.ContextShard(STREAM, group).segment_sum(torch.zeros(20), torch.tensor([0, 5])),
                "cu_seqlens must end at the number of tokens 40",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                wrong()
        with pytest.raises(TypeError, match="group must be None or a torch.distributed.ProcessGroup"):
            fk.ContextShard(6, "cp")

    ranks.threads(2, refused)

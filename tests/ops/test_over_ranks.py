"""Counts, moments and groups of a step over ranks with uneven rows, one of them without any: one rank's numbers."""

import pytest
import ranks
import torch
from torch.testing import assert_close

import finealign_kernels as fk
from finealign_kernels.ops.ranks import rows_of_all
from finealign_kernels.testing import samples

PARTS = {2: ((0, 7), (7, 7)), 4: ((0, 1), (1, 1), (1, 6), (6, 7))}  # responses of each rank


def mine(group, *x):
    rows = slice(*PARTS[torch.distributed.get_world_size(group)][torch.distributed.get_rank(group)])
    return [one[rows] for one in x]


def batch():
    p = samples.policy(7, 9, seed=2)
    return p.logp, p.old_logp, p.advantages, p.mask, p.token_weight


@pytest.mark.parametrize("count", PARTS)
@pytest.mark.parametrize("reduction", ("token_global", "sequence"))
def test_policy_loss_and_gradient_of_the_whole_step(count, reduction):
    logp, old, advantages, mask, weight = batch()

    def step(group):
        x, o, a, m, w = mine(group, logp, old, advantages, mask, weight)
        x = x.clone().requires_grad_()
        with ranks.Traffic() as traffic:
            tokens, responses = fk.sum_over_ranks(m.sum(), torch.tensor(len(x)), group=group)
        assert traffic.calls == [("allreduce", 16)]
        by = tokens if reduction == "token_global" else responses
        loss = fk.policy_loss("ppo", x, o, a, mask=m, token_weight=w, reduction=reduction, denominator=by).loss
        loss.backward()
        return fk.sum_over_ranks(loss, group=group), x.grad

    whole = logp.clone().requires_grad_()
    count_all = mask.sum() if reduction == "token_global" else len(mask)
    exact = fk.policy_loss(
        "ppo", whole, old, advantages, mask=mask, token_weight=weight, reduction=reduction, denominator=count_all
    ).loss
    exact.backward()
    found = ranks.threads(count, step)
    for loss, _ in found:
        assert_close(loss.float(), exact.detach(), rtol=1e-5, atol=1e-7)
    assert_close(torch.cat([grad for _, grad in found]), whole.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("count", PARTS)
def test_a_head_trained_on_all_ranks_has_the_gradient_of_one(count):
    """The sum over data-parallel ranks of the gradients of one head; a rank without rows gives zeros."""
    rows, width, v, d = 7, 5, 31, 8
    s = samples.linear(rows * width, v, d)
    hidden, labels = s.hidden.view(rows, width, d), s.labels.view(rows, width)
    mask = torch.rand(rows, width, generator=torch.Generator().manual_seed(0)) < 0.7

    def loss_of(hidden, labels, mask, weight, tokens):
        logp = fk.linear_logprobs(hidden, weight, labels, mask=mask).logp
        return fk.nll_loss(logp, mask=mask, reduction="mean", denominator=tokens).loss

    def step(group):
        h, y, m = mine(group, hidden, labels, mask)
        weight = s.weight.clone().requires_grad_()
        loss = loss_of(h, y, m, weight, fk.sum_over_ranks(m.sum(), group=group))
        loss.backward()
        return fk.sum_over_ranks(loss, weight.grad, group=group)

    weight = s.weight.clone().requires_grad_()
    exact = loss_of(hidden, labels, mask, weight, mask.sum())
    exact.backward()
    for loss, grad in ranks.threads(count, step):
        assert_close(loss.float(), exact.detach(), rtol=1e-5, atol=0)
        assert_close(grad.float(), weight.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("count", PARTS)
def test_whitening_by_the_moments_of_all_ranks(count):
    x, _, _, mask, _ = batch()

    def step(group):
        y, m = mine(group, x, mask)
        return fk.whiten(y, mask=m, sum_moments=lambda triple: fk.sum_over_ranks(triple, group=group))

    assert_close(torch.cat(ranks.threads(count, step)), fk.whiten(x, mask=mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", PARTS)
@pytest.mark.parametrize("kind", ("group_mean", "group_std", "batch_std", "leave_one_out"))
def test_groups_split_over_ranks(count, kind):
    rewards = torch.tensor([1.0, 0.0, torch.nan, 2.5, 1.0, -3.0, 0.5])
    keys = torch.tensor([11, 40, 11, 40, 11, 40, 7])
    models = torch.stack([rewards, rewards.flip(0) * 2])

    def step(group):
        r, k = mine(group, rewards, keys)
        (m,) = mine(group, models.t())
        with ranks.Traffic() as traffic:
            one = fk.group_advantages(r, k, kind=kind, process_group=group)
        assert [name for name, _ in traffic.calls] == ["allgather"] * 2
        return one, fk.decoupled_advantages(m.t(), k, weights=(1.0, 0.5), process_group=group)

    found = ranks.threads(count, step)
    assert torch.equal(torch.cat([one for one, _ in found]), fk.group_advantages(rewards, keys, kind=kind))
    exact = fk.decoupled_advantages(models, keys, weights=(1.0, 0.5))
    assert torch.equal(torch.cat([two for _, two in found]), exact)


@pytest.mark.parametrize("count", PARTS)
@pytest.mark.parametrize("kind", ("return_to_go", "outcome"))
def test_turns_of_groups_split_over_ranks(count, kind):
    """Responses of 0 to 3 turns, whole on their rank; of a rank without responses nothing is missing."""
    turns = torch.tensor([2, 0, 3, 1, 2, 1, 3])
    ends = torch.cat([torch.zeros(1, dtype=torch.long), turns.cumsum(0)])
    keys = torch.tensor([11, 40, 11, 40, 11, 40, 7])
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(0))
    rewards[4] = torch.nan

    def step(group):
        start, stop = PARTS[count][torch.distributed.get_rank(group)]
        cu, own = ends[start : stop + 1] - ends[start], rewards[ends[start] : ends[stop]]
        with ranks.Traffic() as traffic:
            found = fk.turn_advantages(own, cu, keys[start:stop], kind=kind, process_group=group)
        assert [name for name, _ in traffic.calls] == ["allgather"] * 4
        return found

    assert torch.equal(torch.cat(ranks.threads(count, step)), fk.turn_advantages(rewards, ends, keys, kind=kind))


@pytest.mark.parametrize("rows", (0, 1, 2))
def test_rows_of_any_number_and_dtype(rows):
    """Also a single one among all ranks, whose bytes lie next to those of other tensors."""

    def work(group):
        n = rows if torch.distributed.get_rank(group) == 1 else 0
        x = torch.arange(n) > 0, torch.arange(n).float(), torch.arange(3 * n).view(n, 3), torch.arange(n).double()
        return rows_of_all(group, *x)[0]

    found = ranks.threads(2, work)
    k = torch.arange(rows)
    for flags, floats, wide, doubles in found:
        assert flags.dtype == torch.bool and torch.equal(flags, k > 0)
        assert torch.equal(floats, k.float()) and torch.equal(doubles, k.double())
        assert torch.equal(wide, torch.arange(3 * rows).view(rows, 3))


def test_one_model_and_rewards_of_any_stride():
    """Rewards of one model, transposed, are contiguous with the strides of a column; so is a single one of a column."""
    rewards, keys = torch.randn(7, 3, generator=torch.Generator().manual_seed(3)), torch.tensor([4, 9, 4, 4, 9, 4, 9])

    def step(group):
        table, k = mine(group, rewards, keys)
        cu_turns, options = torch.arange(len(k) + 1), dict(process_group=group)
        return (
            fk.decoupled_advantages(table[:, 1][None], k, **options),
            fk.group_advantages(table[:, 1], k, **options),
            fk.turn_advantages(table[:, 1], cu_turns, k, **options),
        )

    found = ranks.threads(4, step)
    column = rewards[:, 1].contiguous()
    exact = (
        fk.decoupled_advantages(column[None], keys),
        fk.group_advantages(column, keys),
        fk.turn_advantages(column, torch.arange(8), keys),
    )
    for ours, theirs in zip(zip(*found, strict=True), exact, strict=True):
        assert torch.equal(torch.cat(ours), theirs)


def test_refusals():
    with pytest.raises(ValueError, match="x must hold a tensor"):
        fk.sum_over_ranks()
    with pytest.raises(RuntimeError, match="torch.distributed must be initialised"):
        fk.sum_over_ranks(torch.ones(1))

    def refused(group):
        with pytest.raises(ValueError, match=r"groups must be \(S,\) int with process_group"):
            fk.group_advantages(torch.ones(4), 2, process_group=group)
        with pytest.raises(ValueError, match=r"groups must be \(S,\) int with process_group"):
            fk.turn_advantages(torch.ones(4), torch.arange(5), 2, process_group=group)
        with pytest.raises(TypeError, match="group must be None or a torch.distributed.ProcessGroup"):
            fk.sum_over_ranks(torch.ones(1), group="dp")
        with pytest.raises(TypeError, match=r"x\[1\] must be a tensor"):
            fk.sum_over_ranks(torch.ones(1), 3.0, group=group)
        return fk.sum_over_ranks(torch.tensor([1, 2]))  # of the default group

    assert [x.tolist() for x in ranks.threads(2, refused)] == [[2, 4]] * 2

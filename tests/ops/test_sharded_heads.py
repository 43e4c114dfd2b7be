"""Heads that are DTensors: gathered from FSDP2 with the right gradient, or vocabulary-parallel where they lie."""

import pytest
import ranks
import torch
from torch.testing import assert_close

import finealign_kernels as fk
from finealign_kernels.testing import samples

N, V, D = 12, 37, 8


def mesh_of(count):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (count,))


def head(group):
    """A head that is an FSDP2 unit of its own, each rank with rows of its own: whole gradients, and hidden's."""
    from torch.distributed.fsdp import fully_shard

    rank, count = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    s = samples.linear(N, V, D, seed=1)
    linear = torch.nn.Linear(D, V)
    with torch.no_grad():
        linear.weight.copy_(s.weight)
        linear.bias.copy_(torch.linspace(-1, 1, V))
    fully_shard(linear, mesh=mesh_of(count))
    hidden = s.hidden.chunk(count)[rank].clone().requires_grad_()
    labels = s.labels.chunk(count)[rank]
    out = fk.linear_logprobs(hidden, linear.weight, labels, bias=linear.bias, outputs=("entropy",))
    (out.logp.sum() + 0.3 * out.entropy.sum()).backward()
    return out.logp.detach(), hidden.grad, linear.weight.grad.full_tensor(), linear.bias.grad.full_tensor()


def one_rank():
    s = samples.linear(N, V, D, seed=1)
    given = s.hidden.double(), s.weight.double(), torch.linspace(-1, 1, V).double()
    hidden, weight, bias = (x.requires_grad_() for x in given)
    out = fk.linear_logprobs(hidden, weight, s.labels, bias=bias, outputs=("entropy",), backend="reference")
    (out.logp.sum() + 0.3 * out.entropy.sum()).backward()
    return out.logp.detach(), hidden.grad, weight.grad, bias.grad


def close(actual, expected, tolerance=1e-6):
    assert (actual.double() - expected).norm() <= tolerance * expected.norm()


def test_a_head_of_fsdp2_has_the_mean_gradient_of_all_ranks():
    found = ranks.processes(2, head)
    logp, dx, dw, db = one_rank()
    close(torch.cat([rank[0] for rank in found]), logp)
    close(torch.cat([rank[1] for rank in found]), dx)
    for rank in found:
        close(rank[2], dw / 2)
        close(rank[3], db / 2)


def parallel(group, hidden_grad, plain_bias):
    from torch.distributed.tensor import Shard, distribute_tensor

    rank, count = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    s, mesh = samples.linear(N, V, D, seed=1), mesh_of(count)
    weight = distribute_tensor(s.weight, mesh, [Shard(0)]).requires_grad_()
    bias = torch.linspace(-1, 1, V)
    bias = bias.requires_grad_() if plain_bias else distribute_tensor(bias, mesh, [Shard(0)]).requires_grad_()
    hidden = s.hidden.chunk(count)[rank] if hidden_grad == "reduce_scatter" else s.hidden
    hidden = hidden.clone().requires_grad_()
    options = dict(bias=bias, outputs=("entropy",), hidden_grad=hidden_grad)
    out = fk.linear_logprobs(hidden, weight, s.labels, **options)
    (out.logp.sum() + 0.3 * out.entropy.sum()).backward()
    db = bias.grad if plain_bias else bias.grad.full_tensor()
    return out.logp.detach(), hidden.grad, weight.grad.full_tensor(), db


@pytest.mark.parametrize("count, hidden_grad", [(2, "all_reduce"), (3, "all_reduce"), (4, "reduce_scatter")])
def test_a_head_sharded_over_the_vocabulary_brings_its_group(count, hidden_grad):
    """Also 37 columns over 4 ranks, 10, 10, 10 and 7."""
    found = ranks.processes(count, parallel, hidden_grad, False)
    logp, dx, dw, db = one_rank()
    for rank in found:
        close(rank[0], logp)
        close(rank[2], dw)
        close(rank[3], db)
        assert torch.equal(rank[0], found[0][0])
    dxs = torch.cat([rank[1] for rank in found]) if hidden_grad == "reduce_scatter" else found[-1][1]
    close(dxs, dx)


def test_a_plain_bias_is_cut_like_the_head():
    found = ranks.processes(2, parallel, "all_reduce", True)
    _, _, _, db = one_rank()
    close(found[0][3] + found[1][3], db)


def loss_parallel(group, columns):
    """Logits of a tensor-parallel head that keeps its output sharded over the vocabulary: (2, N / 2, columns)."""
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    s, mesh = samples.linear(N, columns, D, seed=1), mesh_of(torch.distributed.get_world_size(group))
    linear = torch.nn.Linear(D, columns)
    with torch.no_grad():
        linear.weight.copy_(s.weight)
        linear.bias.copy_(torch.linspace(-1, 1, columns))
    parallelize_module(linear, mesh, ColwiseParallel(output_layouts=Shard(-1), use_local_output=False))
    hidden = s.hidden.view(2, N // 2, D).clone().requires_grad_()
    out = fk.token_logprobs(linear(hidden), s.labels.view(2, -1), outputs=("entropy",))
    (out.logp.sum() + 0.3 * out.entropy.sum()).backward()
    logits = distribute_tensor(torch.zeros(N, columns), mesh, [Shard(1)])
    with pytest.raises(ValueError, match="vocab_start must be None for a DTensor of logits"):
        fk.token_logprobs(logits, s.labels, vocab_start=0)
    with pytest.raises(ValueError, match="logits must be sharded over the vocabulary on one dimension of its mesh"):
        fk.token_logprobs(distribute_tensor(torch.zeros(N, columns), mesh, [Shard(0)]), s.labels)
    grads = linear.weight.grad.full_tensor(), linear.bias.grad.full_tensor()
    return out.logp.detach().flatten(), hidden.grad.flatten(0, 1), *grads


@pytest.mark.parametrize("count", (2, 4))
def test_logits_sharded_over_the_vocabulary_bring_their_group(count):
    """37 columns over 2 ranks, 19 and 18, and over 4, 10, 10, 10 and 7."""
    exact = one_rank()
    for rank in ranks.processes(count, loss_parallel, V):
        for ours, theirs in zip(rank, exact, strict=True):
            close(ours, theirs)


def refusals(group):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    s, mesh = samples.linear(N, V, D), mesh_of(2)
    for placement in (Shard(1), Replicate()):
        with pytest.raises(ValueError, match="weight must be sharded over the vocabulary"):
            fk.linear_logprobs(s.hidden, distribute_tensor(s.weight, mesh, [placement]), s.labels, hidden_grad="none")
    weight = distribute_tensor(s.weight, mesh, [Shard(0)])
    with pytest.raises(ValueError, match="group must be None for a DTensor head"):
        fk.linear_logprobs(s.hidden, weight, s.labels, group=group)
    assert_close(
        fk.linear_logprobs(s.hidden, weight, s.labels).logp, fk.linear_logprobs(s.hidden, s.weight, s.labels).logp
    )
    return torch.ones(1)


def test_refusals():
    ranks.processes(2, refusals)

"""A whole step under DDP and FSDP2 with uneven ranks, one of them without rows: loss and gradients of one rank."""

import pytest
import ranks
import torch
from test_over_ranks import PARTS
from torch.testing import assert_close

import finealign_kernels as fk
from finealign_kernels.integrations.steps import step_counts

pytestmark = pytest.mark.usefixtures("one_thread")

V, D, ROWS, T = 31, 8, 7, 6


class Policy(torch.nn.Module):
    """Embedding, layer and head; log-probs of the next token."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer = torch.nn.Embedding(V, D), torch.nn.Linear(D, D)
        self.head = torch.nn.Linear(D, V, bias=False)

    def forward(self, ids, mask):
        hidden = self.layer(self.embed(ids[:, :-1])).tanh()
        return fk.linear_logprobs(hidden, self.head.weight, ids[:, 1:], mask=mask).logp


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (ROWS, T + 1), generator=generator)
    mask = torch.rand(ROWS, T, generator=generator) < 0.8
    rewards = torch.randn(ROWS, generator=generator)
    old = -3 + 0.1 * torch.randn(ROWS, T, generator=generator)
    return ids, mask, rewards, torch.tensor([11, 40, 11, 40, 11, 40, 7]), old


def step(model, ids, mask, rewards, keys, old, group=None):
    """PPO on whitened advantages against the group, and an NLL, both divided by the tokens of the step."""
    counts = step_counts(mask, group=group, ranks=group is not None)
    advantages = fk.group_advantages(rewards, keys, kind="group_mean", process_group=group)
    spread = fk.segment_broadcast(advantages, mask=mask)
    moments = None if group is None else lambda triple: fk.sum_over_ranks(triple, group=group)
    spread = fk.whiten(spread, mask=mask, sum_moments=moments)
    logp = model(ids, mask)
    how = dict(mask=mask, denominator=counts.denominator("tokens"))
    loss = fk.policy_loss("ppo", logp, old, spread, reduction="token_global", **how).loss
    loss = loss + 0.1 * fk.nll_loss(logp, **how).loss
    loss.backward()
    return loss.detach() / counts.world


def on_a_rank(group, way):
    world, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    model = Policy()
    if way == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for part in (model.layer, *([model.head] if way == "fsdp2, the head a unit" else [])):
            fully_shard(part, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    rows = slice(*PARTS[world][rank])
    loss = fk.sum_over_ranks(step(wrapped, *(x[rows] for x in batch()), group), group=group)
    grads = [p.grad.full_tensor() if way != "ddp" else p.grad for p in model.parameters()]
    return [loss, *grads]


@pytest.mark.parametrize("count", PARTS)
@pytest.mark.parametrize("way", ("ddp", "fsdp2", "fsdp2, the head a unit"))
def test_uneven_ranks_and_an_empty_one_are_one_rank(count, way):
    model = Policy()
    exact = step(model, *batch())
    for loss, *grads in ranks.processes(count, on_a_rank, way):
        assert_close(loss.float(), exact, rtol=1e-5, atol=0)
        for grad, p in zip(grads, model.parameters(), strict=True):
            assert (grad - p.grad).norm() <= 1e-5 * p.grad.norm()

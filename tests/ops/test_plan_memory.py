"""The memory of a vocabulary-parallel head: what its formulas say beside what torch's allocator hands out on a rank."""

import pytest
import ranks
import torch

import finealign_kernels as fk
from finealign_kernels.ops import _chunked, _plan

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, D, V = 512, 64, 16384
TILE = _chunked.Tile(128, 2048)


def peak_of(function) -> int:
    """Most bytes that the CPU's allocator holds at a time while it runs, over what was held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).cumsum(0)
    return int(held.max())


def peak(group, dtype, hidden_grad):
    rank, world = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    torch.manual_seed(0)
    hidden, labels = torch.randn(ROWS, D).to(dtype), torch.randint(V, (ROWS,))
    hidden = (hidden.chunk(world)[rank].clone() if hidden_grad == "reduce_scatter" else hidden).requires_grad_()
    weight = (torch.randn(V // world, D) / 8).to(dtype).requires_grad_()

    def step():
        out = fk.linear_logprobs(hidden, weight, labels, outputs=("entropy",), group=group, hidden_grad=hidden_grad)
        (out.logp.sum() + out.entropy.sum()).backward()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_chunked, "tile_of", lambda device: TILE)
        step()
        hidden.grad = weight.grad = None
        planned = _plan.plan(ROWS, D, V, world, hidden_grad=hidden_grad, dtype=dtype, device="cpu")
        return peak_of(step), planned.memory - planned.weight, planned.logits


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("hidden_grad", ("none", "all_reduce", "reduce_scatter"))
def test_the_peak_of_a_rank_is_within_the_plan(dtype, hidden_grad):
    """Gradient of the weight, workspace and buffers; all that a step allocates beside is numbers of rows."""
    for found, planned, logits in ranks.processes(2, peak, dtype, hidden_grad):
        assert 0.5 * planned <= found <= planned + 100 * ROWS
        assert found < logits

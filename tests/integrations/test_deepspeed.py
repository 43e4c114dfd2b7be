"""ZeRO-3 by DeepSpeed itself, where it is installed: TRL's fused head, patched, in two gloo processes on a CPU.

DeepSpeed installs for a CPU with DS_BUILD_OPS=0 pip install --no-deps deepspeed py-cpuinfo hjson ninja msgpack einops.
Where it is not installed, test_trl.py holds the same contract to a stand-in for its gathered parameters.
"""

import os
import sys
from contextlib import nullcontext

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported

import pytest
import ranks
import torch

pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

import test_trl as common  # noqa: E402

from finealign_kernels.integrations.trl import patch_kernels  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def model():
    found = common.model("Qwen2")
    common.utils.add_fused_lm_head(found, outputs=("log_probs", "entropy"))
    return found


def both_ways(group):
    """Whole gradients of one DPO step, stock and patched; the head is empty outside of forward and backward."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # it would be compiled here
    rank = torch.distributed.get_rank(group)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    deepspeed.init_distributed("gloo")
    found = {}
    for way in ("stock", "patched"):
        scored = model()
        sharding = {"stage": 3, "stage3_param_persistence_threshold": 0}
        config = dict(train_micro_batch_size_per_gpu=4, zero_allow_untested_optimizer=True, zero_optimization=sharding)
        optimizer = torch.optim.SGD(scored.parameters(), lr=0.1)
        engine, *_ = deepspeed.initialize(model=scored, optimizer=optimizer, config=config)
        assert scored.lm_head.weight.shape == (0,)
        with patch_kernels() if way == "patched" else nullcontext():
            engine.backward(common.step_of_dpo(engine, rank))
        assert scored.lm_head.weight.shape == (0,)
        found[way] = {name: safe_get_full_grad(p).clone() for name, p in scored.named_parameters()}
    return found


def test_zero3_in_forward_and_backward():
    alone = model()
    (sum(common.step_of_dpo(alone, rank) for rank in (0, 1)) / 2).backward()
    for found in ranks.fresh(2, both_ways):
        for way in ("stock", "patched"):
            for name, p in alone.named_parameters():
                assert (found[way][name] - p.grad).norm() <= 1e-6 * p.grad.norm(), (way, name)

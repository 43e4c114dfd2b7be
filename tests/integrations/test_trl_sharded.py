"""Training runs of TRL's DPOTrainer under FSDP2, the trained head a unit of its own, beside one process.

Accelerate shards no model on CPU ranks: each of the two gloo processes says to it that its ranks are GPUs. All else is
what Accelerate, FSDP2 and the Trainer do on GPUs.
"""

from contextlib import nullcontext

import pytest
import ranks
import torch

pytest.importorskip("trl", reason="TRL is not installed")

import test_trl as common  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402

from finealign_kernels.integrations.trl import patch_kernels  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = common.DATA["DPO"][:8]


class Head(torch.nn.Linear):
    """The name by which Accelerate's policy makes the head a unit of its own."""


class Trainer(trl.DPOTrainer):
    """Keeps the gradients of every step, whole, before the optimizer takes them."""

    seen = ()

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        grads = {name: p.grad for name, p in self.model.named_parameters()}
        whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for name, g in grads.items()}
        self.seen = (*self.seen, whole)
        return loss


def trained(folder, world):
    """Gradients of two steps over eight pairs, and the kinds of FSDP's units."""
    model = common.model("Qwen2")
    model.lm_head.__class__ = Head
    sharded = dict(
        fsdp=True, fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer", "Head"]}
    )
    options = dict(
        max_steps=2, per_device_train_batch_size=4 // world, optim="sgd", max_grad_norm=0.0, learning_rate=0.1
    )
    args = trl.DPOConfig(output_dir=str(folder), **(common.SHORT | options), **(sharded if world > 1 else {}))
    if world > 1:
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = Trainer(
        model=model,
        ref_model=common.model("Qwen2"),
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=common.tokenizer(),
    )
    trainer.train()
    return trainer.seen, {type(module).__name__ for module in trainer.model.modules()}


def both_ways(group, folder):
    found = {}
    for way in ("stock", "patched"):
        with patch_kernels() if way == "patched" else nullcontext():
            found[way], units = trained(folder, group.size())
        assert {"FSDPHead", "FSDPQwen2DecoderLayer", "FSDPQwen2ForCausalLM"} <= units
    return found


def apart(ours, exact, *names):
    """Relative, of the named gradients together."""
    ours, exact = (torch.cat([step[name].flatten() for name in names]) for step in (ours, exact))
    return ((ours - exact).norm() / exact.norm()).item()


def test_dpo_under_fsdp2_with_a_trained_head_of_its_own_unit(tmp_path):
    exact, _ = trained(tmp_path, 1)
    for rank, found in enumerate(ranks.fresh(2, both_ways, str(tmp_path))):
        for ours, truth, bound in zip(found["patched"], exact, (1e-6, 1e-5), strict=True):
            assert apart(ours, truth, "lm_head.weight") <= bound
            assert apart(ours, truth, *truth) <= bound  # of the second step: of models that rounding has set apart
        stock, truth = found["stock"][0], exact[0]
        told = [f"{way} {apart(found[way][0], truth, 'lm_head.weight'):.1e}" for way in ("stock", "patched")]
        print(f"rank {rank}, relative error of the head's gradient: {', '.join(told)}")
        assert apart(stock, truth, "lm_head.weight") > 0.5  # each rank keeps the gradient of its own rows
        assert apart(stock, truth, *(name for name in truth if name != "lm_head.weight")) <= 1e-6

"""One step of two ranks is the step of one process, with DDP and with FSDP2: python examples/ddp_fsdp2.py

The ranks hold different numbers of responses and tokens, in different numbers of micro-batches. With the counts of the
whole step the gradients that DDP and FSDP2 average are those of one process that has all responses.
"""

import tempfile

import torch
import torch.distributed as dist
from tiny import load
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from trainer_ulma import collate, responses

import finealign_kernels as fk
from finealign_kernels.integrations.transformers import model_logprobs, step_counts


def shard(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


WAYS = {"DDP": DistributedDataParallel, "FSDP2": shard}


def gradients(wrap, batches):
    """Gradients of one step over the micro-batches of this rank: supervised learning, a mean over all tokens."""
    model, _ = load()
    wrapped = wrap(model)
    counts = step_counts(batch["labels"][:, 1:] != -100 for batch in batches)  # one collective
    for i, batch in enumerate(batches):
        last = i + 1 == len(batches)  # one reduction a step
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.require_backward_grad_sync = last
        elif wrap is shard:
            wrapped.set_requires_gradient_sync(last)
        scores, mask = model_logprobs(wrapped, batch["input_ids"], batch["attention_mask"], batch["labels"])
        # both divide the sum over ranks by their number, and so is the count: `denominator`
        fk.nll_loss(scores.logp, mask=mask, denominator=counts.denominator("tokens")).loss.backward()
    grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
    return torch.cat([grad.flatten() for grad in grads])


def data():
    """The micro-batches of rank 0 and of rank 1: FSDP2 gathers weights in each, so both have two."""
    rows = list(responses(load()[1]))[:7]
    return [[collate(rows[:1]), collate(rows[1:2])], [collate(rows[2:6]), collate(rows[6:])]]


def rank(index, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=index, world_size=2)
    found = {name: gradients(wrap, data()[index]) for name, wrap in WAYS.items()}
    if index == 0:
        torch.save(found, f"{folder}/gradients.pt")
    dist.destroy_process_group()


def main():
    folder = tempfile.mkdtemp()
    torch.multiprocessing.spawn(rank, args=(folder,), nprocs=2)
    alone = gradients(lambda model: model, [batch for batches in data() for batch in batches])
    found = torch.load(f"{folder}/gradients.pt").items()
    differences = {name: ((grad - alone).norm() / alone.norm()).item() for name, grad in found}
    for name, difference in differences.items():
        print(f"{name} on two ranks against one process: relative difference of the gradient {difference:.1e}")
    return differences


if __name__ == "__main__":
    main()

"""One step of two ranks is the step of one process: python examples/ddp_counts.py

The ranks hold different numbers of responses and tokens, in different numbers of micro-batches. With the counts of the
whole step the gradients that DDP averages are those of one process that has all responses.
"""

import tempfile

import torch
import torch.distributed as dist
from tiny import load
from torch.nn.parallel import DistributedDataParallel
from trainer_ulma import collate, responses

import finealign_kernels as fk
from finealign_kernels.integrations.transformers import model_logprobs, step_counts


def gradients(wrap, batches):
    """Gradients of one step over the micro-batches of this rank: supervised learning, a mean over all tokens."""
    model, _ = load()
    wrapped = wrap(model)
    counts = step_counts(batch["labels"][:, 1:] != -100 for batch in batches)  # one collective
    for i, batch in enumerate(batches):
        last = i + 1 == len(batches)
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.require_backward_grad_sync = last  # one reduction a step; accelerate does so, too
        scores, mask = model_logprobs(wrapped, batch["input_ids"], batch["attention_mask"], batch["labels"])
        # DDP divides the sum over ranks by their number, and so is the count: `denominator`
        fk.nll_loss(scores.logp, mask=mask, denominator=counts.denominator("tokens")).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def data():
    rows = list(responses(load()[1]))[:7]
    return [[collate(rows[:1]), collate(rows[1:2])], [collate(rows[2:])]]  # of rank 0 and of rank 1


def rank(index, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=index, world_size=2)
    found = gradients(DistributedDataParallel, data()[index])
    if index == 0:
        torch.save(found, f"{folder}/gradients.pt")
    dist.destroy_process_group()


def main(start_method="spawn"):
    folder = tempfile.mkdtemp()
    torch.multiprocessing.start_processes(rank, args=(folder,), nprocs=2, start_method=start_method)
    found = torch.load(f"{folder}/gradients.pt")
    alone = gradients(lambda model: model, [batch for batches in data() for batch in batches])
    difference = ((found - alone).norm() / alone.norm()).item()
    print(f"two ranks against one process: relative difference of the gradient {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()

"""Who computes each op: plain torch, the libraries that offer it, bare matrix products as the floor, and ours.

A rival is a function of a sample (cases.py) that runs the op forward and backward and returns its answers by name.
Where it cannot run, its row of the table says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F

import finealign_kernels as fk
from finealign_kernels.formulas import margin
from finealign_kernels.ops._layout import flatten
from finealign_kernels.ops.sequence_loss import missing, sequence_loss


@dataclass(frozen=True)
class Rival:
    name: str
    call: Callable  # sample -> {name: tensor}
    needs: Callable[[torch.dtype, torch.device], str | None] = lambda dtype, device: None  # why it is unavailable
    floor: bool = False  # only the matrix products: no answer to check


def package(name: str, at_least: str) -> Callable[[torch.dtype, torch.device], str | None]:
    """A need: the package is installed, from this version on."""

    def why_unavailable(dtype, device):
        try:
            found = version(name)
        except PackageNotFoundError:
            return f"{name} is not installed"
        old = [int(part) for part in found.split(".")[:2]] < [int(part) for part in at_least.split(".")[:2]]
        return f"needs {name} >= {at_least}, found {found}" if old else None

    return why_unavailable


# linear_logprobs


def head_eager(x):
    """Logits in the dtype of the inputs, then a float32 log_softmax and gather (float64 for float64)."""
    logits = x.hidden @ x.weight.T
    return x.answers(_label_logp(logits, x.labels))


def _label_logp(logits, labels):
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(wide).log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def head_torch(x):
    """The chunked path; options=None would be eager again. On a CPU in chunks of 512 rows: left alone it takes 16 (at
    the default shape) and half as long again or more."""
    chunks = {"batch_chunk_size": 512, "chunking_method": None} if x.hidden.device.type == "cpu" else {}
    options = torch.nn.LinearCrossEntropyOptions(**chunks)
    return x.answers(-F.linear_cross_entropy(x.hidden, x.weight, x.labels, reduction="none", options=options))


def _has_linear_cross_entropy(dtype, device):
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch {torch.__version__} has no chunked linear_cross_entropy"


def head_trl(x):
    """As its trainers call it: no bias, temperature 1, vocabulary chunks of 32768, no further outputs."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    logp, *_ = ChunkedLogProbFunction.apply(x.hidden, x.weight, None, x.labels, 1.0, 32768, None, 1.0, ())
    return x.answers(logp)


def head_gemms(recompute: bool) -> Callable:
    """Only the products: logits, logits once more (recompute), dX and dW, for the rows and the inputs that need them.

    Plain torch.mm, each allocating its result, with the (N, V) logits whole. bfloat16 on a CPU: the products are
    float32 (of copies made beforehand), because logits must not be rounded and torch has no bfloat16 -> float32
    product there.
    """

    def call(x):
        hidden, weight, active = x.floor.hidden, x.floor.weight, x.floor.active
        logits = torch.mm(hidden, weight.T)[: len(active)]
        if recompute:
            del logits
            logits = torch.mm(active, weight.T)
        torch.mm(logits, weight)
        if x.weight.requires_grad:
            torch.mm(logits.T, active)
        return {}

    return call


def _float32_is_the_floor(dtype, device):
    if device.type == "cpu" or dtype == torch.float32:
        return None
    return f"its float32 products are no floor for {dtype} on {device.type}"


def head_ours(workspace) -> Callable:
    return lambda x: x.answers(fk.linear_logprobs(x.hidden, x.weight, x.labels, workspace=workspace).logp)


HEAD = (
    Rival("eager", head_eager),
    Rival("torch", head_torch, _has_linear_cross_entropy),
    Rival("trl", head_trl, package("trl", "1.16")),
    Rival("gemm3", head_gemms(recompute=False), _float32_is_the_floor, floor=True),
    Rival("gemm4", head_gemms(recompute=True), _float32_is_the_floor, floor=True),
    Rival("ours", head_ours("full")),
    Rival("ours-default", head_ours("auto")),
    Rival("ours-no-workspace", head_ours(0)),
)


# token_logprobs


def logits_trl(x):
    from trl.trainer.utils import selective_log_softmax

    return x.answers(selective_log_softmax(x.logits, x.labels))


LOGITS = (
    Rival("eager", lambda x: x.answers(_label_logp(x.logits, x.labels))),
    Rival("trl", logits_trl, package("trl", "1.16")),
    Rival("ours", lambda x: x.answers(fk.token_logprobs(x.logits, x.labels).logp)),
)


# segments: the torch baselines are given the segment of each token, which ours reads from cu_seqlens


def segments_eager(x):
    if x.case == "broadcast":
        return x.answers(x.values[x.segment])
    total = x.values.new_zeros(len(x.lengths)).index_add(0, x.segment, x.values)
    return x.answers(total / x.lengths if x.case == "mean" else total)


def segments_torch(x):
    """The library's own segment_reduce; the broadcast is repeat_interleave."""
    if x.case == "broadcast":
        return x.answers(torch.repeat_interleave(x.values, x.lengths, output_size=len(x.segment)))
    return x.answers(torch.segment_reduce(x.values, x.case, lengths=x.lengths))


def segments_ours(x):
    op = {"sum": fk.segment_sum, "mean": fk.segment_mean, "broadcast": fk.segment_broadcast}[x.case]
    return x.answers(op(x.values, x.cu_seqlens))


SEGMENTS = (Rival("eager", segments_eager), Rival("torch", segments_torch), Rival("ours", segments_ours))


# sequence_loss: -log σ(beta (h_chosen - h_rejected)) of padded pairs (S, T); nobody loops over sequences


def _pair_losses(score):
    chosen, rejected = score.chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected))


def sequence_eager(x):
    """Selected by the mask, summed, divided by its lengths where the case averages."""
    score = torch.where(x.mask, x.logp - x.ref_logp, 0).sum(1)
    return x.answers(_pair_losses(score / x.mask.sum(1).clamp(min=1) if x.case == "mean" else score))


def sequence_product(x):
    """The fewest torch ops: an inner product with weights made beforehand. A NaN at a masked place would spread."""
    return x.answers(_pair_losses(torch.linalg.vecdot(x.logp - x.ref_logp, x.weight)))


def sequence_ours(x):
    average = "kept" if x.case == "mean" else False
    return x.answers(sequence_loss(flatten(x.logp, x.mask), x.ref_logp, beta=0.1, average=average).losses)


def _has_sequence_kernel(dtype, device):
    return missing(margin.logistic, device)


SEQUENCE = (
    Rival("eager", sequence_eager),
    Rival("product", sequence_product),
    Rival("ours", sequence_ours, _has_sequence_kernel),
)

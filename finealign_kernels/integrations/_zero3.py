"""A head that ZeRO-3 shards: parameters are empty but while they are gathered, in forward and again in backward."""

from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor


def is_sharded(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_status")


def gather(*parameters: Tensor | None) -> AbstractContextManager:
    """DeepSpeed's context, for the parameters that are not gathered now."""
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    absent = [p for p in parameters if p is not None and p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    return deepspeed.zero.GatheredParameters(absent)


@contextmanager
def regathered(weight: Tensor, bias: Tensor | None = None):
    """The weight (V, D), gathered, for a forward with it; what this saves for backward is gathered when it is read."""
    with gather(weight, bias), saved_as_shards(gather, weight, bias, weight):
        yield weight


def saved_as_shards(gather, weight: Tensor, bias: Tensor | None, head: Tensor) -> AbstractContextManager:
    """A context that saves a ZeRO-3 parameter, not its gathered values, and gathers again when backward reads it.

    gather          context of the parameter, gathered
    weight, bias    parameters that are held gathered in forward only; empty outside
    head            weight in the dtype of the products
    """

    def pack(x: Tensor):
        return (weight, x.dtype) if x is head else (bias, x.dtype) if x is bias else x

    def unpack(saved):
        if isinstance(saved, Tensor):
            return saved
        parameter, dtype = saved
        with gather(parameter):
            return parameter.detach().to(dtype, copy=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

"""Calls of torch in which the host waits for a GPU: a value that is read, a size that depends on values."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique_dim",
    "unique_consecutive",
    "_unique2",
}


def reads(func, args) -> bool:
    """Whether the host waits in this call, as a TorchDispatchMode sees it.

    An index of bools becomes one of numbers, and how many there are is read.
    """
    name = func.overloadpacket.__name__
    indices = args[1] if name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return name in READS or any(i is not None and i.dtype == torch.bool for i in indices)


class NoReads(TorchDispatchMode):
    """Fails in a call that `reads`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not reads(func, args), f"the host reads: {func.overloadpacket.__name__}"
        return func(*args, **(kwargs or {}))

"""How kernels are launched: on which device, and with which options."""

from contextlib import nullcontext

import torch
from torch import Tensor

# No fused multiply-add: z then has the same bits in every pass over a row, and exp(z - m) is exactly 1 at the maximum.
OPTIONS = {"enable_fp_fusion": False}


def head_arguments(head) -> tuple:
    """The kernel arguments scale, softcap, inv_temperature, CAPPED and SCALED of a formulas.Head."""
    scale, softcap, inv_temperature = head.numbers
    return scale, softcap, inv_temperature, bool(softcap), scale != 1 or inv_temperature != 1


def on_device_of(x: Tensor):
    """Makes the tensor's device the current one, because Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()

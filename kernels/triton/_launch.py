"""How kernels are launched: on whose device, with which options."""

from contextlib import nullcontext

import torch
from torch import Tensor

# A product and the sum after it round apart: the z of one pass is bit for bit that of the next, so e is 1 at a maximum.
OPTIONS = {"enable_fp_fusion": False}


def head_arguments(head) -> tuple:
    """scale, softcap, inv_temperature, CAPPED and SCALED of formulas.Head."""
    scale, softcap, inv_temperature = head.numbers
    return scale, softcap, inv_temperature, bool(softcap), scale != 1 or inv_temperature != 1


def on_device_of(x: Tensor):
    """Triton launches on the current device: make it that of the tensor."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()

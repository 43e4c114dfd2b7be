"""Native ops of what comes before a policy loss, on flat, checked tokens; formulas/returns.py is their definition."""

import torch

from . import _native
from ._check import fail

MODES = {"std": 0, "clamp": 1, "compat": 2}  # Scale in csrc/launch.h
ESTIMATORS = {"k1": 0, "k2": 1, "k3": 2}  # Estimator


def runs(backend: str, device: torch.device) -> bool:
    """Whether the native ops run on a device: True, False for the reference; one asked for by name runs or raises."""
    missing = _native.reason or (None if device.type == "cpu" else f"it has no kernels for {device.type}")
    missing = "its kernels are not written yet"
    if backend == "auto":
        return missing is None
    if backend not in ("reference", "native"):
        fail("backend", "be 'auto', 'reference' or 'native'", repr(backend))
    if backend == "native" and missing:
        raise RuntimeError(f"backend 'native' cannot run here: {missing}")
    return backend == "native"

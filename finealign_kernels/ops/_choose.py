"""Which backend runs. `pick` is a pure function of names, so the choice is tested without any device."""

import importlib
import importlib.util
import os

import torch

from . import _native

ROW_BACKENDS = ("reference", "torch", "native", "triton")  # of linear_logprobs and token_logprobs


def backends() -> dict[str, str | None]:
    """Name of each backend of the row ops -> None where it can run on this machine, else the reason why not."""
    return {"reference": None, "torch": None, "native": _native.reason, "triton": triton_reason()}


def triton_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "no GPU for Triton to compile for (TRITON_INTERPRET=1 interprets its kernels, for tests)"


def pick(backend: str, device: str, dtype: torch.dtype, missing: dict[str, str | None]) -> str:
    """The row backend for a device type and dtype. One asked for by name runs, or raises with its reason."""
    reasons = {
        "reference": None,
        "torch": None,
        "native": missing["native"]
        or (f"its row kernels run on a CPU, not on {device}" if device != "cpu" else None)
        or ("it has no float64 kernels" if dtype == torch.float64 else None),
        "triton": missing["triton"] or ("it has no float64 kernels" if dtype == torch.float64 else None),
    }
    if backend == "auto":
        first = "native" if device == "cpu" else "triton"
        return "torch" if reasons[first] else first
    if backend not in reasons:
        raise ValueError(f"backend must be 'auto' or one of {ROW_BACKENDS}, got {backend!r}")
    if reasons[backend]:
        raise RuntimeError(f"backend {backend!r} cannot run here: {reasons[backend]}")
    return backend


def choose(backend: str, x: torch.Tensor) -> str:
    return pick(backend, x.device.type, x.dtype, backends())


def rows(name: str):
    """The module of a row backend: tile_fwd and tile_bwd."""
    if name == "triton":
        return importlib.import_module("finealign_kernels.kernels.row_logprobs")
    return importlib.import_module(f"finealign_kernels.ops._rows_{name}")

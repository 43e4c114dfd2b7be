"""Which backend runs. `pick` is a pure function of names, so the choice is tested without any device."""

import importlib
import importlib.util
import os

import torch

from . import _native

HAS_TRITON = importlib.util.find_spec("triton") is not None  # here, as torch.compile does not trace the search
ROW_BACKENDS = ("reference", "torch", "native", "triton")  # of linear_logprobs and token_logprobs
FUSED = "triton_fused"  # of linear_logprobs alone: the fused layer
HEAD_BACKENDS = (*ROW_BACKENDS, FUSED)

# GPUs whose "auto" is the fused layer: those on which it was measured to be the faster one. It was measured on none.
# On sm_100 and gfx942 Triton's products are known to reach 60 to 75 % of the library's: there the chunked one may stay.
FUSED_BY_DEFAULT: frozenset[str] = frozenset()
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")  # GPUs for which the fused layer is compiled


def backends() -> dict[str, str | None]:
    """Name of each backend of the row ops -> None where it can run on this machine, else the reason why not."""
    return {"reference": None, "torch": None, "native": _native.reason, "triton": triton_reason()}


def triton_reason() -> str | None:
    if not HAS_TRITON:
        return "triton is not installed"
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "no GPU for Triton to compile for (TRITON_INTERPRET=1 interprets its kernels, for tests)"


def pick(
    backend: str, device: str, dtype: torch.dtype, missing: dict[str, str | None], known: tuple = ROW_BACKENDS
) -> str:
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
    if not isinstance(backend, str) or backend not in reasons:
        raise ValueError(f"backend must be 'auto' or one of {known}, got {backend!r}")
    if reasons[backend]:
        raise RuntimeError(f"backend {backend!r} cannot run here: {reasons[backend]}")
    return backend


def fused_reason(dtype: torch.dtype, arch: str | None, missing: dict[str, str | None]) -> str | None:
    """Why the fused layer cannot run, None where it can."""
    if missing["triton"]:
        return missing["triton"]
    if dtype == torch.float64:
        return "it has no float64 kernels"
    if arch is None:
        return f"its tiles are compiled for {', '.join(ARCHS)} and their kin"
    if arch == "interpreter" and dtype == torch.bfloat16 and not _interprets_bfloat16():
        return "Triton's interpreter multiplies bfloat16 as if it were integers"
    return None


def _interprets_bfloat16() -> bool:
    """Whether the interpreter has been patched for bfloat16, as the tests do; False while a graph is traced."""
    if torch.compiler.is_compiling():
        return False
    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    return getattr(builder, "bfloat16_is_right", False)


def pick_head(
    backend: str,
    device: str,
    dtype: torch.dtype,
    missing: dict[str, str | None],
    arch: str | None = None,
    batch_invariant: bool = False,
) -> str:
    """The backend of linear_logprobs. batch_invariant takes the fused layer, whose log-probs depend on no other row."""
    if batch_invariant and backend not in ("auto", FUSED):
        raise ValueError(f"batch_invariant=True runs on backend 'auto' or {FUSED!r} only, got {backend!r}")
    reason = fused_reason(dtype, arch, missing)
    if backend == FUSED or batch_invariant:
        if reason:
            asked = f"batch_invariant=True needs backend {FUSED!r}, which" if batch_invariant else f"backend {FUSED!r}"
            raise RuntimeError(f"{asked} cannot run here: {reason}")
        return FUSED
    if backend == "auto" and arch in FUSED_BY_DEFAULT and not reason:
        return FUSED
    return pick(backend, device, dtype, missing, HEAD_BACKENDS)


def family(capability: tuple[int, int] | None, amd: str = "") -> str | None:
    """The line of ARCHS that serves a GPU: of the same instructions, and of no more shared memory than it has."""
    if amd:
        return "gfx942" if amd.split(":")[0] in ("gfx942", "gfx950") else None
    major, minor = capability
    if major == 8:
        return "sm_80" if minor in (0, 7) else "sm_120"  # 8.6 and 8.9 have 99 KB, as 12.x
    return {9: "sm_90", 10: "sm_100", 12: "sm_120"}.get(major)


def arch(x: torch.Tensor) -> str | None:
    """The line of ARCHS for a tensor's device; "interpreter" where Triton interprets; None where there is none."""
    if x.device.type != "cuda":
        return "interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else None
    properties = torch.cuda.get_device_properties(x.device)
    return family((properties.major, properties.minor), properties.gcnArchName if torch.version.hip else "")


def choose_head(backend: str, x: torch.Tensor, batch_invariant: bool) -> str:
    return pick_head(backend, x.device.type, x.dtype, backends(), arch(x), batch_invariant)


def layer(name: str):
    """The module that runs a backend of linear_logprobs: fwd and bwd."""
    return importlib.import_module(f".{'_fused' if name == FUSED else '_chunked'}", __package__)


def fused():
    """The kernels of the fused layer."""
    return importlib.import_module("..kernels.linear_logprobs", __package__)


def choose(backend: str, x: torch.Tensor) -> str:
    return pick(backend, x.device.type, x.dtype, backends())


def rows(name: str):
    """The module of a row backend: tile_fwd, tile_bwd, combine, and the TILE and SPAN of logits that exist."""
    if name == "triton":
        return importlib.import_module("..kernels.row_logprobs", __package__)
    return importlib.import_module(f"._rows_{name}", __package__)

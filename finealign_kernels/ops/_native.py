"""The optional compiled extension: loaded once, or the reason why it is not there."""

import importlib
import os

import torch  # noqa: F401  first: it loads the libtorch that the extension names

reason: str | None = None  # why there is no extension, None where there is one

if os.environ.get("FINEALIGN_DISABLE_NATIVE"):
    reason = "FINEALIGN_DISABLE_NATIVE is set"
else:
    try:  # not "from .. import _C": that would take any attribute of that name
        importlib.import_module(".._C", __package__)
    except ImportError as error:
        reason = f"the extension is not built or does not load ({error})"

if reason and os.environ.get("FINEALIGN_REQUIRE_NATIVE"):
    raise ImportError(f"FINEALIGN_REQUIRE_NATIVE is set, but {reason}")


def available() -> bool:
    return reason is None


def cuda() -> str | None:
    """None where the extension's CUDA ops can run under this torch, else the reason why not."""
    if reason:
        return reason
    return ("the extension was built without CUDA", "this torch is a CPU build", None)[
        torch.ops.finealign._cuda_state()
    ]


def instructions() -> str:
    """The instruction set that the CPU kernels chose on this machine."""
    return {0: "baseline", 2: "avx2", 5: "avx512"}[torch.ops.finealign._cpu_state()]

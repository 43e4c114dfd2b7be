"""The optional compiled extension: loaded once, or the reason why it is not there.

A process can register an op once; a second registration would abort it. A second copy of the package (one installed and
one from a model hub, for example) therefore uses the loaded extension if its own file is the same to the byte. If it is
not, that copy runs without the extension, and says why.
"""

import filecmp
import functools
import importlib
import importlib.util
import os
import re
import warnings
from pathlib import Path

import torch  # first: it loads the libtorch that the extension names

from . import _sources
from ._warn import warn_once

CPU = ("baseline", "avx2", "avx512")  # what FINEALIGN_CPU may ask for
reason: str | None = None  # why there is no extension, None where there is one
registers = False  # did this copy of the package load it: it also says how its ops are traced


def _refused(file: str) -> str | None:
    """Why the extension in a file must not be loaded beside one that is; None where that is the same build."""
    loaded = getattr(torch.ops.finealign, "loaded_from", None)
    if loaded is None:
        return (
            f"another copy of this package has registered its ops, from a file that it does not name; {file} stays out"
        )
    if os.path.exists(loaded) and filecmp.cmp(loaded, file, shallow=False):
        return None
    return f"another build is loaded in this process, {loaded}; {file} stays out"


def _outdated(compiled_from: str | None) -> str | None:
    """Why the extension of this copy must not be used; None where it is compiled from the checkout's sources, or where
    there are no sources beside the package.
    """
    now = _sources.digest(Path(__file__).parents[2])
    if now is None or now == compiled_from:
        return None
    return "csrc/ or kernels/cuda/ has changed since the extension was compiled: run make setup, or pip install -e ."


if os.environ.get("FINEALIGN_CPU") not in (None, "", *CPU):
    raise ImportError(f"FINEALIGN_CPU must be one of {', '.join(CPU)}, got {os.environ['FINEALIGN_CPU']!r}")

if os.environ.get("FINEALIGN_DISABLE_NATIVE"):
    reason = "FINEALIGN_DISABLE_NATIVE is set"
else:
    try:  # not "from .. import _C": that would take any attribute of that name
        _spec = importlib.util.find_spec(".._C", __package__)
        if _spec is not None and hasattr(torch.ops.finealign, "_cpu_state"):
            reason = _refused(_spec.origin)
        else:
            _module = importlib.import_module(".._C", __package__)
            torch.ops.finealign.loaded_from = _module.__file__
            torch.ops.finealign.compiled_for = getattr(_module, "architectures", "")
            reason = _outdated(getattr(_module, "sources", None))
            registers = reason is None
            if reason:
                warn_once("extension", f"the extension is not used: {reason}")
    except ImportError as error:
        reason = f"the extension is not built or does not load ({error})"

if reason and os.environ.get("FINEALIGN_REQUIRE_NATIVE"):
    raise ImportError(f"FINEALIGN_REQUIRE_NATIVE is set, but {reason}")


def _warn_of_narrower(asked: str) -> None:
    """Warns where FINEALIGN_CPU asks for more than the processor has: it can only select less."""
    have = instructions()
    if CPU.index(asked) > CPU.index(have):
        warnings.warn(f"FINEALIGN_CPU={asked}, but the CPU kernels run {have}: the processor has no more", stacklevel=2)


def available() -> bool:
    return reason is None


def cuda(device: torch.device | None = None) -> str | None:
    """None where the extension's CUDA ops can run under this torch, and on this GPU, else the reason why not."""
    if _without_cuda or device is None:
        return _without_cuda
    unserved = _unserved(device.index)
    if unserved and os.environ.get("FINEALIGN_REQUIRE_NATIVE"):
        raise RuntimeError(f"FINEALIGN_REQUIRE_NATIVE is set, but {unserved}")
    return unserved


# torch.compiler.assume_constant_result, which would import the compiler with this package: a trace asks here
cuda._dynamo_marked_constant = True


@functools.cache
def _unserved(index: int | None) -> str | None:
    """Why the code that the extension holds does not run on a GPU; None where there is none to ask, as in a trace."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    if serves(architectures(), properties.major, properties.minor):
        return None
    found = f"sm_{properties.major}{properties.minor}"
    return f"the extension is compiled for {', '.join(architectures())}, which {found} does not run"


def missing(device: torch.device) -> str | None:
    """Why the extension's ops cannot run on a device; None where they can."""
    if device.type == "cuda":
        return cuda(device)
    return reason if device.type == "cpu" else f"it has no kernel for {device.type}"


def file() -> str | None:
    """The file whose ops run in this process, None where there is no extension. It may belong to another copy."""
    return None if reason else torch.ops.finealign.loaded_from


def architectures() -> list[str]:
    """The GPUs that the extension is compiled for, as FINEALIGN_ARCHS names them; empty where it has no CUDA code."""
    return [] if reason else [arch for arch in torch.ops.finealign.compiled_for.split(";") if arch]


def serves(archs: list[str], major: int, minor: int) -> str | None:
    """The entry of archs whose code runs on a GPU of this compute capability, None where there is none.

    Machine code runs on its own major version from its minor version on; with the suffix "a" on exactly its own
    version, with "f" on its family, which is taken as the same rule as without a suffix. "+PTX" also runs on every
    later GPU, whose driver compiles it. (CUDA C++ Programming Guide, "Compute Capabilities"; NVIDIA's blog on family-
    specific architecture features.)
    """
    for arch in archs:
        number, suffix, ptx = re.fullmatch(r"(\d+)([af]?)(\+PTX)?", arch).groups()
        version = int(number[:-1]), int(number[-1])
        same = version == (major, minor) if suffix == "a" else version[0] == major and version[1] <= minor
        if same or (ptx and not suffix and version <= (major, minor)):
            return arch
    return None


def instructions() -> str:
    """The instruction set that the CPU kernels chose on this machine."""
    return {0: "baseline", 2: "avx2", 5: "avx512"}[torch.ops.finealign._cpu_state()]


def fake(name: str):
    """Registers how an op of the extension is traced, once in a process."""
    return torch.library.register_fake(f"finealign::{name}") if registers else lambda function: function


if reason is None and os.environ.get("FINEALIGN_CPU"):
    _warn_of_narrower(os.environ["FINEALIGN_CPU"])

# asked once, because a graph being traced cannot ask
_without_cuda = (
    reason
    or (("the extension was built without CUDA", "this torch is a CPU build", None)[torch.ops.finealign._cuda_state()])
)

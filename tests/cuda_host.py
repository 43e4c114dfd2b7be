"""Device code of kernels/cuda built for the CPU by tests/emu: libraries that tests call, and mutants of them."""

import ctypes
import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from finealign_kernels.ops import _native

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "kernels" / "cuda"
CXX = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
NVCC = shutil.which("nvcc") or next(iter(map(str, Path("/usr/local").glob("cuda*/bin/nvcc"))), None)
ARCHS = ("80", "90a", "100f", "120")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # DType in csrc/launch.h
ORDERS = {"forward": 0, "backward": 1, "random": 2}
PAD = 64  # elements of red zone on both sides of every buffer


def cuda_headers() -> str | None:
    """The folder of cuda_bf16.h: beside nvcc (which may be a wrapper: it says where it lives), or inside Triton."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    if NVCC:
        said = subprocess.run([NVCC, "--dryrun", "-c", "none.cu"], capture_output=True, text=True)
        homes += re.findall(r"TOP=(\S+)", said.stdout + said.stderr)
    folders = [Path(home) / "include" for home in (*homes, "/usr/local/cuda")]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        folders.append(Path(triton.origin).parent / "backends/nvidia/include")
    return next((str(folder) for folder in folders if (folder / "cuda_bf16.h").is_file()), None)


HEADERS = cuda_headers()
missing = (
    ("no C++ compiler" if not CXX else None)
    or ("no CUDA headers (cuda_bf16.h)" if not HEADERS else None)
    or _native.reason  # the CPU kernels say what is right
)
on_host = pytest.mark.skipif(missing is not None, reason=str(missing))
with_nvcc = pytest.mark.skipif(not NVCC, reason="no nvcc")


# a fortified longjmp takes a change of fibers for an error
FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-U_FORTIFY_SOURCE",
    "-ffp-contract=off",
    "-Wno-unknown-pragmas",
    "-isystem",
    HEADERS,
]


# A library runs for many tests, a mutant for one, most of whose time is its build.
OFTEN, ONCE = "-O1", "-O0"


class Builds:
    """Libraries in a folder that all processes of a test run share: each is built once."""

    def __init__(self, folder: Path):
        self.folder, self.loaded = folder, {}
        folder.mkdir(exist_ok=True)

    def once(self, out: Path, command: list) -> Path:
        """command makes out, where no process has yet."""
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not out.exists():
                subprocess.run([*command, "-o", self.folder / "part"], check=True)
                (self.folder / "part").rename(out)
        return out

    def shim(self, level: str) -> Path:
        """The folder of the shim as a precompiled header, which halves the time of every build after it."""
        folder = self.folder / level
        folder.mkdir(exist_ok=True)
        command = [CXX, *FLAGS, level, "-w", "-x", "c++-header", ROOT / "tests/emu/cuda_host_shim.h"]
        return self.once(folder / "cuda_host_shim.h.gch", command).parent

    def command(self, name: str, level: str, *before: Path) -> list:
        """tests/emu/NAME.cpp, with the .cuh files of `before` in place of those of kernels/cuda."""
        places = (self.shim(level), *before, CUDA, ROOT / "csrc", ROOT / "tests/emu")
        include = [word for place in places for word in ("-I", place)]
        return [CXX, *FLAGS, level, *include, "-shared", ROOT / f"tests/emu/{name}.cpp"]

    def __call__(self, name: str) -> ctypes.CDLL:
        if name not in self.loaded:
            self.loaded[name] = ctypes.CDLL(str(self.once(self.folder / f"{name}.so", self.command(name, OFTEN))))
        return self.loaded[name]

    def mutant(self, name: str, folder: Path, old: str, new: str, file: str | None = None) -> ctypes.CDLL:
        """NAME with old replaced by new in kernels/cuda/FILE.cuh (NAME), where it stands once; built in `folder`."""
        for header in CUDA.glob("*.cuh"):  # all of them: they include one another
            shutil.copy(header, folder)
        place = folder / f"{file or name}.cuh"
        source = place.read_text()
        assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {place.name}"
        place.write_text(source.replace(old, new))
        subprocess.run([*self.command(name, ONCE, folder), "-o", folder / "mutant.so"], check=True)
        return ctypes.CDLL(str(folder / "mutant.so"))


class Zoned:
    """A tensor with a red zone on both sides."""

    def __init__(self, values: torch.Tensor, pad: float):
        self.whole = torch.full((values.numel() + 2 * PAD,), pad, dtype=values.dtype)
        self.inner = self.whole[PAD:-PAD]
        self.inner.copy_(values)
        self.pad = self.whole[0].clone()

    @property
    def pointer(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.inner.data_ptr())

    def zones_untouched(self) -> bool:
        zones = torch.cat([self.whole[:PAD], self.whole[-PAD:]])
        return torch.equal(zones, self.pad.expand_as(zones))


class DeviceFailure(Exception):
    """A deadlock or an illegal shuffle."""

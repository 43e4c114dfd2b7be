"""Builds the optional extension finealign_kernels._C: one file on LibTorch's stable ABI and Python's limited API.

It runs on torch >= 2.10 and Python >= 3.10, with a CPU or a CUDA build of torch. Environment:

FINEALIGN_NATIVE         auto (default) | require | off    the extension as a whole
FINEALIGN_CUDA           auto (default) | require | off    its CUDA half, which needs nvcc, but no GPU
FINEALIGN_ARCHS          the GPUs to compile for, "80;90a;100f;120+PTX" where it is not set
FINEALIGN_TORCH          torch's folder, if it is not in this environment; any 2.10+ will do
FINEALIGN_VERSION_LOCAL  for example cu130

The CUDA half takes minutes to compile: "auto" does so where nvcc is found and a GPU is seen or FINEALIGN_ARCHS is set.
"""

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = "0.1.0"
OLDEST_TORCH = (2, 10)
OLDEST_PYTHON = (3, 10)
DEFAULT_ARCHS = "80;90a;100f;120+PTX"
WIDE = {  # files compiled for one instruction set; a file beside them asks the processor before it calls into them
    "_wide": "-mavx2",  # no fused multiply-add: as the baseline rounds
    "_avx2": "-mavx2 -mfma",
    "_avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma",
}


class Plan(NamedTuple):
    cxx: str
    torch: Path
    nvcc: Path | None


def say(message):
    print(f"finealign_kernels: {message}", file=sys.stderr, flush=True)


def mode(name):
    value = os.environ.get(name, "auto").lower()
    if value not in ("auto", "require", "off"):
        raise SystemExit(f"{name} must be auto, require or off, got {value!r}")
    return value


def find_torch():
    """torch's folder, without importing it: in an isolated build sys.path is the builder's, sysconfig the target's."""
    named = os.environ.get("FINEALIGN_TORCH")
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    if "VIRTUAL_ENV" in os.environ:  # "python -m build" and uv build in a venv of their own
        folders += Path(os.environ["VIRTUAL_ENV"]).glob("lib/python3*/site-packages")
    for torch in [Path(named)] if named else [Path(folder or ".") / "torch" for folder in folders]:
        header, library = torch / "include/torch/csrc/stable/library.h", torch / "lib/libtorch_cpu.so"
        if header.is_file() and library.exists():
            version = re.search(r"__version__ = '(\d+)\.(\d+)", (torch / "version.py").read_text())
            if tuple(map(int, version.groups())) >= OLDEST_TORCH:
                return torch
    return None


def find_nvcc():
    homes = [os.path.join(os.environ[name], "bin/nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    for nvcc in (os.environ.get("CUDACXX"), *homes, shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if nvcc and os.access(nvcc, os.X_OK):
            return Path(nvcc)
    return None


def sees_gpu():
    """True where the NVIDIA driver lists a GPU. torch is not imported for it: it may not be in this environment."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return any(Path("/dev").glob("nvidia[0-9]*"))
    try:
        found = subprocess.run([smi, "--list-gpus"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return found.returncode == 0 and "GPU" in found.stdout


def arch_list():
    """The GPUs to compile for: ["90a", "120+PTX"] for "sm_90a, 12.0+PTX"."""
    archs = re.split(r"[;,\s]+", os.environ.get("FINEALIGN_ARCHS", DEFAULT_ARCHS))
    return [arch.removeprefix("sm_").replace(".", "") for arch in archs if arch]


def gencode(archs):
    """["90a", "120+PTX"] -> nvcc's -gencode options."""
    options = []
    for arch in archs:
        number = arch.removesuffix("+PTX")
        options.append(f"-gencode arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            options.append(f"-gencode arch=compute_{number},code=compute_{number}")
    return " ".join(options)


def check_environment():
    """Values that would be ignored, or end a build after minutes in an error of nvcc."""
    archs = os.environ.get("FINEALIGN_ARCHS", DEFAULT_ARCHS)
    for arch in filter(None, re.split(r"[;,\s]+", archs)):
        if not re.fullmatch(r"(sm_)?(\d{2,3}|\d{1,2}\.\d)[af]?(\+PTX)?", arch):
            raise SystemExit(f"FINEALIGN_ARCHS must name GPUs as {DEFAULT_ARCHS!r} does, got {arch!r} in {archs!r}")
    if not re.search(r"\d", archs):
        raise SystemExit(f"FINEALIGN_ARCHS must name a GPU, as {DEFAULT_ARCHS!r} does, or be left out, got {archs!r}")
    cpu = os.environ.get("FINEALIGN_CPU", "")
    if cpu not in ("", "baseline", "avx2", "avx512"):
        raise SystemExit(f"FINEALIGN_CPU must be one of baseline, avx2, avx512, got {cpu!r}")


def plan():
    """Decided before setup(), so that a wheel without native code gets the honest tag py3-none-any."""
    native, cuda = mode("FINEALIGN_NATIVE"), mode("FINEALIGN_CUDA")
    check_environment()
    if native == "off":
        say("FINEALIGN_NATIVE=off: no extension; the torch and Triton paths serve every op")
        return None
    cxx = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    torch = find_torch()
    missing = None
    if not sys.platform.startswith("linux"):
        missing = f"the extension is built on Linux only, this is {sys.platform}"
    elif not cxx:
        missing = "no C++ compiler found"
    elif not torch:
        missing = "torch >= 2.10 not found in this environment: install torch first"
    if missing:
        if native == "require":
            raise SystemExit(f"finealign_kernels: FINEALIGN_NATIVE=require, but {missing}")
        say(f"NO native extension: {missing}. The torch and Triton paths serve every op.")
        return None
    nvcc = None if cuda == "off" else find_nvcc()
    if nvcc is None and cuda == "require":
        raise SystemExit("finealign_kernels: FINEALIGN_CUDA=require, but no nvcc found")
    wanted = cuda == "require" or "FINEALIGN_ARCHS" in os.environ
    if cuda == "off":
        half = "CPU only, by FINEALIGN_CUDA=off"
    elif nvcc is None:
        half = "CPU only: no nvcc found"
    elif wanted or sees_gpu():
        half = f"CUDA by {nvcc}"
    else:
        nvcc, half = None, "CPU only: no GPU seen. FINEALIGN_CUDA=require compiles the CUDA half without one"
    say(f"native extension: {cxx}, torch headers in {torch}, {half}")
    return Plan(cxx, torch, nvcc)


class NinjaBuild(build_ext):
    def build_extension(self, ext):
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        tmp = Path(self.build_temp).resolve() / "native"
        tmp.mkdir(parents=True, exist_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        (tmp / "build.ninja").write_text(ninja_file(PLAN, out))
        ninja = shutil.which("ninja")
        if ninja is None:
            from ninja import BIN_DIR

            ninja = os.path.join(BIN_DIR, "ninja")
        subprocess.run([ninja, "-C", str(tmp)] + (["-v"] if os.environ.get("VERBOSE") else []), check=True)


def ninja_file(plan, out):
    include = f"-I{ROOT}/csrc -I{ROOT}/kernels/cuda"
    defines = f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"
    defines += f" -DPy_LIMITED_API=0x{OLDEST_PYTHON[0]:02x}{OLDEST_PYTHON[1]:02x}0000"
    digest = runpy.run_path(str(ROOT / "finealign_kernels/ops/_sources.py"))["digest"]
    defines += f" '-DFINEALIGN_SOURCES=\"{digest(ROOT)}\"'"
    if plan.nvcc:
        defines += f" -DFINEALIGN_CUDA '-DFINEALIGN_ARCHS=\"{';'.join(arch_list())}\"'"
    torch_include = f"-isystem {plan.torch}/include -isystem {sysconfig.get_path('include')}"
    lines = [
        "ninja_required_version = 1.3",
        "cxxflags = -std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wno-psabi -ffp-contract=fast "
        f"-fno-trapping-math {include}",  # nobody reads floating-point exceptions, and loops with them stay scalar
        "rule cxx",
        f"  command = {plan.cxx} -MMD -MF $out.d $cxxflags $extra -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    objects = ["bindings.o"]
    lines += [f"build bindings.o: cxx {ROOT}/csrc/bindings.cpp", f"  extra = {defines} {torch_include}"]
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        objects.append(f"cpu_{source.stem}.o")
        lines.append(f"build {objects[-1]}: cxx {source}")
        if platform.machine() in ("x86_64", "AMD64"):
            lines += [f"  extra = {flags}" for suffix, flags in WIDE.items() if source.stem.endswith(suffix)]
    link_flags = ["-s", "--exclude-libs=ALL"]
    if plan.nvcc:
        lines += [
            f"cuflags = -std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden -Xfatbin -compress-all "
            f"-Xptxas -warn-spills {gencode(arch_list())} {include}",
            "rule cu",
            f"  command = {plan.nvcc} -MD -MF $out.d $cuflags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            objects.append(f"cuda_{source.stem}.o")
            lines.append(f"build {objects[-1]}: cu {source}")
        # nvcc links, because it knows where its static runtime lies; -nodlink keeps an empty cubin out
        flags = " ".join(f"-Xlinker {flag}" for flag in link_flags)
        link = f"{plan.nvcc} -shared -nodlink -cudart static -o $out $in -L{plan.torch}/lib -ltorch_cpu {flags}"
    else:
        flags = " ".join(f"-Wl,{flag}" for flag in link_flags)
        link = f"{plan.cxx} -shared -o $out $in -L{plan.torch}/lib -ltorch_cpu {flags}"
    lines += ["rule link", f"  command = {link}", f"build {out}: link {' '.join(objects)}", f"default {out}", ""]
    return "\n".join(lines)


PLAN = plan()
local = os.environ.get("FINEALIGN_VERSION_LOCAL", "")
setup(
    version=VERSION + (f"+{local}" if local else ""),
    ext_modules=[Extension("finealign_kernels._C", [], py_limited_api=True)] if PLAN else [],
    cmdclass={"build_ext": NinjaBuild} if PLAN else {},
    options={"bdist_wheel": {"py_limited_api": "cp{}{}".format(*OLDEST_PYTHON)}} if PLAN else {},
)

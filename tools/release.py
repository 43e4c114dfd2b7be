"""Builds and audits a release: python tools/release.py [--dry] [STEP ...]

    versions    setup.py, __init__.py, CITATION.cff and CHANGELOG.md agree; nothing is uncommitted
    sdist       the source archive, and what must and must not be in it
    wheels      from the unpacked source archive: pure Python; native for CPUs; native and CUDA (FINEALIGN_ARCHS)
    audit       of every wheel in the folder: contents, tags, torch's stable ABI, Python's limited API, GPUs, twine
    test        each native wheel in fresh environments: `finealign doctor` and tests, without the checkout

All steps run where none is named. They need a C++ compiler, torch >= 2.10, nvcc and the extra `release`, but no GPU.
Nothing is uploaded. --dry goes on where a tool, an nvcc, a Python or a torch is missing, and lists at the end what was
not done; without it that is an error. A finding of an audit is always one.
"""

import argparse
import email
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("versions", "sdist", "wheels", "audit", "test")
ENVIRONMENTS = ("3.10=2.10.*", "3.11=2.13.*", "3.12=newest", "3.13=newest")
ABI_TAG = "cp310-abi3"
# What every Linux machine has, and libtorch, which torch has loaded before. No CUDA library: its runtime is linked in.
LIBRARIES = r"(libtorch_cpu|libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|ld-linux-[\w-]+)\.so(\.\d+)?"
TOOLCHAIN = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__cxa_finalize"}
COMMON = r"_Z(T[ISV]|NK?)?St|__bss_start$|_edata$|_end$"  # inline parts of the C++ library, and the linker's marks
FATBIN, CUBIN, PTX = 0xBA55ED50, 2, 1


# ---- audits: each returns what is wrong, as sentences ----------------------------------------------------------------


def audit_versions(root: Path) -> list[str]:
    """One version in the four places that state it, and a dated section of the changelog."""
    places = {
        "setup.py": r'^VERSION = "(.+)"',
        "finealign_kernels/__init__.py": r'^__version__ = "(.+)"',
        "CITATION.cff": r'^version: "?([^"\n]+)"?',
    }
    found = {}
    for name, pattern in places.items():
        match = re.search(pattern, (root / name).read_text(), re.M)
        found[name] = match[1] if match else "none"
    version = found["setup.py"]
    problems = [f"{name} has version {other}, setup.py {version}" for name, other in found.items() if other != version]
    if not re.search(rf"^## {re.escape(version)} \W*\d{{4}}-\d\d-\d\d", (root / "CHANGELOG.md").read_text(), re.M):
        problems.append(f"CHANGELOG.md has no section '## {version} (YEAR-MONTH-DAY)'")
    return problems


def audit_sdist(names: list[str]) -> list[str]:
    """What a build needs is in the source archive, and nothing compiled is."""
    inside = {name.split("/", 1)[1] for name in names if "/" in name}
    needed = (
        "setup.py pyproject.toml LICENSE README.md conftest.py csrc/bindings.cpp csrc/launch.h kernels/cuda/scan.cuh "
        "csrc/cuda/scan.cu csrc/cpu/scan.cpp kernels/triton/__init__.py finealign_kernels/feedback/sample.jsonl "
        "finealign_kernels/py.typed tests/conftest.py"
    )
    problems = [f"{name} is missing" for name in needed.split() if name not in inside]
    return problems + [f"{name} is compiled" for name in sorted(inside) if name.endswith((".so", ".pyc", ".o"))]


def audit_contents(wheel: Path) -> list[str]:
    """The file's name, its WHEEL metadata and its contents say the same: pure, or native with Python's limited API."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (header,) = (name for name in names if name.endswith(".dist-info/WHEEL"))
        metadata = email.message_from_bytes(archive.read(header))
    tag = "-".join(wheel.stem.split("-")[-3:])
    python, abi, platform = tag.split("-")
    expanded = {f"{python}-{abi}-{one}" for one in platform.split(".")}
    compiled = [name for name in names if name.endswith(".so")]
    pure = metadata["Root-Is-Purelib"] == "true"
    problems = []
    if set(metadata.get_all("Tag")) != expanded:
        problems.append(f"the file is named {tag}, its metadata says {', '.join(metadata.get_all('Tag'))}")
    if compiled and (f"{python}-{abi}" != ABI_TAG or pure):
        problems.append(f"compiled code needs the tag {ABI_TAG} and Root-Is-Purelib: false, got {tag}, {pure}")
    if compiled and compiled != ["finealign_kernels/_C.abi3.so"]:
        problems.append(f"compiled files must be finealign_kernels/_C.abi3.so alone, got {', '.join(compiled)}")
    if not compiled and tag != "py3-none-any":
        problems.append(f"a wheel without compiled code needs the tag py3-none-any, got {tag}")
    wanted = ("finealign_kernels/kernels/__init__.py", "finealign_kernels/py.typed")
    problems += [f"{name} is missing" for name in wanted if name not in names]
    return problems + [
        f"{name} does not belong in it" for name in names if re.match(r"(tests|bench|kernels|csrc)/", name)
    ]


def audit_symbols(listing: str) -> list[str]:
    """The dynamic part of an extension, as `readelf -W --dyn-syms --dynamic` prints it.

    What is taken from torch must be of its C interface (aoti_torch_..., torch_...), which torch keeps between versions;
    a C++ name, such as at::Tensor's, changes with the version. Only PyInit__C is given to others.
    """
    problems = []
    for library in re.findall(r"\(NEEDED\).*\[(.+)\]", listing):
        if not re.fullmatch(LIBRARIES, library):
            problems.append(f"needs the library {library}")
    row = r"^ *\d+: [0-9a-f]+ +\S+ +\S+ +(LOCAL|GLOBAL|WEAK|UNIQUE) +\S+ +(\S+) ([^\s@]+)(@\S+)?"
    for bind, section, name, version in re.findall(row, listing, re.M):
        if section == "UND":
            python = re.fullmatch(r"_?Py[A-Z]?\w+", name)
            if not (version or python or name in TOOLCHAIN or re.fullmatch(r"(aoti_)?torch_\w+", name)):
                problems.append(f"takes {name}, which is not of torch's C interface")
        elif bind != "LOCAL" and name != "PyInit__C" and not re.match(COMMON, name):
            problems.append(f"gives {name} to others; only PyInit__C may be visible")
    return problems


def gpu_code(extension: bytes) -> set[str]:
    """The GPUs that a file's fat binaries hold code for: {"80", "120", "120+PTX"}; suffixes a and f are not in them."""
    found, at = set(), 0
    while (at := extension.find(struct.pack("<I", FATBIN), at)) >= 0:
        _, header, size = struct.unpack_from("<HHQ", extension, at + 4)
        entry, end = at + header, at + header + size
        at += 4
        if header != 16 or end > len(extension):
            continue  # four bytes that happen to be equal
        while entry + 32 <= end:
            kind, _, header, size = struct.unpack_from("<HHIQ", extension, entry)
            (arch,) = struct.unpack_from("<I", extension, entry + 28)
            if kind in (CUBIN, PTX):
                found.add(f"{arch}+PTX" if kind == PTX else str(arch))
            entry += header + size
    return found


def audit_gpu_code(extension: bytes, archs: str) -> list[str]:
    """The fat binaries hold code for exactly the GPUs that FINEALIGN_ARCHS names."""
    wanted = set()
    for arch in filter(None, re.split(r"[;,\s]+", archs)):  # as setup.py reads them: sm_90a and 9.0a are 90a, too
        number = re.match(r"\d+", arch.removeprefix("sm_").replace(".", ""))[0]
        wanted |= {number, f"{number}+PTX"} if arch.endswith("+PTX") else {number}
    found = gpu_code(extension)
    problems = [f"no code for GPU {arch}, which FINEALIGN_ARCHS={archs} names" for arch in sorted(wanted - found)]
    return problems + [
        f"code for GPU {arch}, which FINEALIGN_ARCHS={archs} does not name" for arch in sorted(found - wanted)
    ]


# ---- steps -----------------------------------------------------------------------------------------------------------


class Release:
    def __init__(self, options):
        self.options = options
        self.dist = options.folder.resolve()
        self.findings, self.omitted = [], []

    def run(self) -> int:
        self.dist.mkdir(parents=True, exist_ok=True)
        for step in self.options.steps or STEPS:
            print(f"== {step}", flush=True)
            getattr(self, step)()
        for title, lines in (("not done", self.omitted), ("wrong", self.findings)):
            print(f"== {title}: {len(lines) or 'nothing'}", *lines, sep="\n   ")
        if self.findings or (self.omitted and not self.options.dry):
            return 1
        if not self.omitted:
            command = f"twine upload {self.dist.name}/*"
            print(f"once the commit is tagged: {command}, but the CUDA wheel to an index of its own")
        return 0

    def versions(self):
        self.wrong("versions", audit_versions(ROOT), only_dry=True)
        changed = shell("git", "-C", ROOT, "status", "--porcelain", check=False).stdout
        self.wrong("checkout", [f"uncommitted: {line}" for line in changed.splitlines()], only_dry=True)

    def sdist(self):
        shell(sys.executable, "setup.py", "-q", "sdist", "-d", self.dist, cwd=ROOT, FINEALIGN_NATIVE="off")
        with tarfile.open(self.archive()) as archive:
            self.wrong(self.archive().name, audit_sdist(archive.getnames()))

    def wheels(self):
        local = self.options.local
        kinds = {
            "pure": {"FINEALIGN_NATIVE": "off"},
            "cpu": {"FINEALIGN_NATIVE": "require", "FINEALIGN_CUDA": "off"},
            "cuda": {"FINEALIGN_NATIVE": "require", "FINEALIGN_CUDA": "require", "FINEALIGN_VERSION_LOCAL": local},
        }
        with tempfile.TemporaryDirectory() as folder, tarfile.open(self.archive()) as archive:
            archive.extractall(folder)
            (source,) = Path(folder).iterdir()
            for kind in self.options.kinds:
                built = Path(folder, kind)
                arguments = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", built, source)
                done = shell(sys.executable, *arguments, check=False, **kinds[kind])
                if done.returncode:
                    self.omit(f"the {kind} wheel: {done.stderr.strip()[-300:]}")
                    continue
                (wheel,) = built.glob("*.whl")
                self.repair(wheel) if kind != "pure" else shutil.copy(wheel, self.dist)
                shutil.rmtree(source / "build", ignore_errors=True)

    def repair(self, wheel):
        """Gives the wheel its manylinux tag. libtorch stays out of it: torch brings that."""
        auditwheel = self.tool("auditwheel")
        if not auditwheel:
            shutil.copy(wheel, self.dist)
            return
        done = shell(auditwheel, "repair", "--exclude", "libtorch_cpu.so", "-w", self.dist, wheel, check=False)
        if done.returncode:
            self.wrong(wheel.name, [f"auditwheel repair: {done.stderr.strip()[-300:]}"])

    def audit(self):
        wheels = sorted(self.dist.glob("*.whl"))
        if not wheels:
            self.wrong(self.dist.name, ["no wheel to audit"])
        for wheel in wheels:
            self.wrong(wheel.name, audit_contents(wheel))
            with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
                if "finealign_kernels/_C.abi3.so" in archive.namelist():
                    extension = Path(archive.extract("finealign_kernels/_C.abi3.so", folder))
                    self.audit_extension(wheel, extension)
        twine = self.tool("twine")
        if twine:
            done = shell(twine, "check", "--strict", *self.dist.glob("*.whl"), *self.dist.glob("*.tar.gz"), check=False)
            print(done.stdout.strip())
            self.wrong("twine check", [done.stdout.strip()[-300:]] if done.returncode else [])

    def audit_extension(self, wheel, extension):
        listing = shell("readelf", "-W", "--dyn-syms", "--dynamic", extension).stdout
        self.wrong(wheel.name, audit_symbols(listing))
        archs = self.options.archs if "+" in wheel.name.split("-")[1] else ""
        code = extension.read_bytes()
        self.wrong(wheel.name, audit_gpu_code(code, archs))
        gpus = ", ".join(sorted(gpu_code(code))) or "none"
        print(f"   {wheel.name}: {wheel.stat().st_size >> 10} KiB, GPUs {gpus}")
        if "manylinux" not in wheel.name:
            self.wrong(wheel.name, ["no manylinux tag: auditwheel repair has not run"])
        abi3audit = self.tool("abi3audit")
        if abi3audit:
            done = shell(abi3audit, "-v", "--strict", "--assume-minimum-abi3", "3.10", extension, check=False)
            said = " ".join((done.stdout + done.stderr).split())
            print("   abi3audit:", said[-120:])
            self.wrong(wheel.name, [f"abi3audit: {said[-300:]}"] if done.returncode else [])
        auditwheel = self.tool("auditwheel")
        if auditwheel:
            shown = " ".join(shell(auditwheel, "show", wheel, check=False).stdout.split())
            print("  ", re.sub(r"^.*?(is consistent|constrains)", r"auditwheel: \1", shown)[:200])

    def test(self):
        wheels = [wheel for wheel in sorted(self.dist.glob("*.whl")) if "abi3" in wheel.name]
        if not wheels:
            self.omit("tests of installed wheels: there is no native wheel")
        for wheel in wheels:
            for python in self.options.reuse:
                self.test_in(wheel, Path(python), f"{python} as it is")
            for environment in self.options.environments if not self.options.reuse else ():
                self.test_fresh(wheel, *environment.split("="))

    def test_fresh(self, wheel, python, torch):
        """A new environment with that Python and torch; --torch-index names where CPU builds are."""
        name = f"{wheel.name} with Python {python}, torch {torch}"
        found = shutil.which(f"python{python}")
        if not found:
            self.omit(f"{name}: there is no python{python} on PATH")
            return
        with tempfile.TemporaryDirectory() as folder:
            shell(found, "-m", "venv", folder)
            inside = Path(folder, "bin/python")
            index = ["--index-url", self.options.torch_index] if self.options.torch_index else []
            wanted = "torch" if torch == "newest" else f"torch=={torch}"
            for packages in ([*index, wanted], ["pytest", "numpy"]):
                done = shell(inside, "-m", "pip", "install", "-q", *packages, check=False)
                if done.returncode:
                    self.omit(f"{name}: {done.stderr.strip()[-200:]}")
                    return
            self.test_in(wheel, inside, name)

    def test_in(self, wheel, python, name):
        """The wheel alone is put in front of an environment's packages, so that what is there stays as it is."""
        with tempfile.TemporaryDirectory() as folder:
            packages, tree = Path(folder, "packages"), Path(folder, "tree")
            arguments = ("-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", packages, wheel)
            oldest = ("--ignore-requires-python", "--python-version", "3.10", "--only-binary=:all:")
            shell(sys.executable, *arguments, *oldest)
            shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
            for file in ("conftest.py", "pyproject.toml"):
                shutil.copy(ROOT / file, tree)
            env = {"PYTHONPATH": str(packages), "FINEALIGN_REQUIRE_NATIVE": "1"}
            doctor = shell(python, "-m", "finealign_kernels", "doctor", check=False, cwd=tree, **env)
            loaded = re.search(r"^  file +(.+)$", doctor.stdout, re.M)
            lines = (doctor.stdout + doctor.stderr).strip().splitlines()
            version = re.findall(r"^  (?:python|torch) +(\S+)$", doctor.stdout, re.M)[:2]
            print(f"   {wheel.name}, {name} {version}: {lines[-1] if lines else 'no output'}", flush=True)
            if doctor.returncode or not loaded or not loaded[1].startswith(str(packages)):
                self.wrong(name, [f"{wheel.name}: doctor failed, or loaded another file: {' '.join(lines[-3:])}"])
                return
            tests = shell(python, "-m", "pytest", "-q", "-x", *self.options.tests, check=False, cwd=tree, **env)
            last = tests.stdout.strip().splitlines()[-1:] or [tests.stderr[-300:]]
            print("   tests:", last[0], flush=True)
            self.wrong(name, [f"{wheel.name}: {tests.stdout.strip()[-600:]}"] if tests.returncode else [])

    def archive(self) -> Path:
        found = sorted(self.dist.glob("*.tar.gz"))
        if len(found) != 1:
            raise SystemExit(f"{self.dist} must hold one source archive (step sdist writes it), found {len(found)}")
        return found[0]

    def tool(self, name):
        """A program of this Python's environment, or of PATH."""
        path = Path(sys.executable).with_name(name)
        found = str(path) if path.exists() else shutil.which(name)
        if not found:
            self.omit(f"{name}: not installed")
        return found

    def wrong(self, where, problems, only_dry=False):
        lines = [f"{where}: {problem}" for problem in problems]
        target = self.omitted if only_dry and self.options.dry else self.findings
        target += [line for line in lines if line not in target]

    def omit(self, line):
        if line not in self.omitted:
            self.omitted.append(line)


def shell(*command, check=True, cwd=None, **env):
    done = subprocess.run(list(map(str, command)), cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    if check and done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}; default: all")
    add("--dry", action="store_true", help="what cannot be done here is listed, not an error")
    add("--folder", type=Path, default=ROOT / "dist", help="of the archive and the wheels; default: dist")
    add("--kinds", nargs="+", choices=("pure", "cpu", "cuda"), default=("pure", "cpu", "cuda"), help="wheels to build")
    add("--archs", default=os.environ.get("FINEALIGN_ARCHS") or default_archs(), help="default: %(default)s")
    add("--local", default="cu130", help="version suffix of the CUDA wheel; default: %(default)s")
    add("--environments", nargs="+", metavar="PYTHON=TORCH", default=ENVIRONMENTS, help="default: %(default)s")
    add("--torch-index", metavar="URL", help="package index that torch is taken from in fresh environments")
    add(
        "--reuse",
        nargs="+",
        metavar="PYTHON",
        default=(),
        help="environments with torch and pytest, in place of fresh ones",
    )
    add("--tests", nargs="+", default=("tests/ops", "tests/losses", "tests/rl"), help="default: %(default)s")
    options = parser.parse_args(argv)
    for step in options.steps:
        if step not in STEPS:
            parser.error(f"STEP must be one of {', '.join(STEPS)}, got {step!r}")
    for environment in options.environments:
        if not re.fullmatch(r"\d+\.\d+=[^=]+", environment):
            parser.error(f"--environments must be PYTHON=TORCH, such as 3.10=2.10.*, got {environment!r}")
    os.environ["FINEALIGN_ARCHS"] = options.archs
    return Release(options).run()


def default_archs() -> str:
    return re.search(r'^DEFAULT_ARCHS = "(.+)"', (ROOT / "setup.py").read_text(), re.M)[1]


if __name__ == "__main__":
    sys.exit(main())

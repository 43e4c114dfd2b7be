"""tools/release.py: its audits find what is planted, and pass what this checkout has built."""

import runpy
import shutil
import struct
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from finealign_kernels import doctor
from finealign_kernels.formulas import margin, surrogate
from finealign_kernels.ops import _native, advantages, policy_loss, segments, sequence_loss

ROOT = Path(__file__).resolve().parents[2]
RELEASE = runpy.run_path(str(ROOT / "tools/release.py"))

GOOD = """
 0x0000000000000001 (NEEDED)             Shared library: [libtorch_cpu.so]
 0x0000000000000001 (NEEDED)             Shared library: [libstdc++.so.6]
     1: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND _Py_Dealloc
     2: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND aoti_torch_get_dim
     3: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND memmove@GLIBC_2.2.5 (2)
     4: 0000000000000000     0 NOTYPE  WEAK   DEFAULT  UND __gmon_start__
     5: 0000000000003f00    77 FUNC    GLOBAL DEFAULT   12 PyInit__C
     6: 0000000000004000    12 FUNC    WEAK   DEFAULT   12 _ZNSt19bad_optional_accessD0Ev
"""


def test_symbols_of_the_stable_abi_pass():
    assert RELEASE["audit_symbols"](GOOD) == []


@pytest.mark.parametrize(
    "row, word",
    [
        ("7: 0 0 FUNC    GLOBAL DEFAULT  UND _ZNK2at6Tensor3dimEv", "takes _ZNK2at6Tensor3dimEv"),  # at::Tensor::dim
        ("7: 0 0 FUNC    GLOBAL DEFAULT  UND _ZN3c105ErrorC1E", "takes _ZN3c105ErrorC1E"),
        ("7: 0 0 FUNC    GLOBAL DEFAULT  UND cudaLaunchKernel", "takes cudaLaunchKernel"),
        ("7: 00 9 FUNC    GLOBAL DEFAULT   12 _ZN9finealign6launchEv", "gives _ZN9finealign6launchEv"),
        (" 0x01 (NEEDED)             Shared library: [libcudart.so.13]", "needs the library libcudart.so.13"),
        (" 0x01 (NEEDED)             Shared library: [libc10.so]", "needs the library libc10.so"),
        (" 0x01 (NEEDED)             Shared library: [libpython3.11.so.1.0]", "needs the library libpython3.11.so.1.0"),
    ],
)
def test_a_wrong_symbol_is_found(row, word):
    (problem,) = RELEASE["audit_symbols"](f"{GOOD}     {row}\n")
    assert problem.startswith(word)


@pytest.mark.skipif(not _native.available() or not shutil.which("readelf"), reason="no extension, or no readelf")
def test_the_extension_of_this_process_passes():
    command = ["readelf", "-W", "--dyn-syms", "--dynamic", _native.file()]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "aoti_torch_get_dim" in listing and RELEASE["audit_symbols"](listing) == []
    archs = ";".join(_native.architectures())
    assert RELEASE["audit_gpu_code"](Path(_native.file()).read_bytes(), archs) == []


def wheel(
    folder, tag="cp310-abi3-manylinux_2_28_x86_64", written=None, files=("finealign_kernels/_C.abi3.so",), pure=0
):
    path = folder / f"finealign_kernels-0.1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("finealign_kernels/kernels/__init__.py", "finealign_kernels/py.typed", *files):
            archive.writestr(name, "")
        purelib = "true" if pure else "false"
        archive.writestr(
            "finealign_kernels-0.1.0.dist-info/WHEEL",
            f"Wheel-Version: 1.0\nRoot-Is-Purelib: {purelib}\nTag: {written or tag}\n",
        )
    return path


def test_wheels_that_say_what_they_hold_pass(tmp_path):
    assert RELEASE["audit_contents"](wheel(tmp_path)) == []
    assert RELEASE["audit_contents"](wheel(tmp_path, "py3-none-any", files=(), pure=1)) == []


@pytest.mark.parametrize(
    "options, word",
    [
        ({"tag": "cp311-cp311-linux_x86_64"}, "needs the tag cp310-abi3"),
        ({"tag": "py3-none-any", "pure": 1}, "needs the tag cp310-abi3"),
        ({"written": "py3-none-any"}, "its metadata says py3-none-any"),
        ({"files": ()}, "needs the tag py3-none-any"),
        ({"files": ("finealign_kernels/_C.cpython-311.so",)}, "must be finealign_kernels/_C.abi3.so alone"),
        ({"files": ("finealign_kernels/_C.abi3.so", "kernels/__init__.py")}, "kernels/__init__.py does not belong"),
    ],
)  # fmt: skip
def test_a_wrong_wheel_is_found(tmp_path, options, word):
    assert any(word in problem for problem in RELEASE["audit_contents"](wheel(tmp_path, **options)))


def fat_binary(*entries):
    """A fat binary: 16 bytes of header, then per entry 64 bytes of header (kind, size, architecture) and its code."""
    body = b"".join(
        struct.pack("<HHIQ12xI32x", kind, 0, 64, len(code), arch) + code for kind, arch, code in entries
    )  # fmt: skip
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_gpus_without_code_and_code_without_gpu_are_found():
    code = b"\x7fELF" * 4 + fat_binary((2, 80, b"c" * 24), (2, 90, b"c" * 8)) + b"\0" * 8 + fat_binary((1, 120, b"p"))
    assert RELEASE["gpu_code"](code) == {"80", "90", "120+PTX"}
    audit = RELEASE["audit_gpu_code"]
    assert audit(code + fat_binary((2, 120, b"")), "80;90a;120+PTX") == []
    assert audit(code, "80;90a;120+PTX") == ["no code for GPU 120, which FINEALIGN_ARCHS=80;90a;120+PTX names"]
    assert audit(code, "sm_80, 9.0a 120+PTX") == [
        "no code for GPU 120, which FINEALIGN_ARCHS=sm_80, 9.0a 120+PTX names"
    ]
    assert audit(fat_binary((2, 80, b"")), "") == ["code for GPU 80, which FINEALIGN_ARCHS= does not name"]


def test_sdist_and_versions(tmp_path):
    names = [f"finealign_kernels-0.1.0/{name}" for name in ("setup.py", "finealign_kernels/_C.abi3.so")]
    problems = RELEASE["audit_sdist"](names)
    assert "csrc/bindings.cpp is missing" in problems and "finealign_kernels/_C.abi3.so is compiled" in problems
    (tmp_path / "finealign_kernels").mkdir()
    (tmp_path / "setup.py").write_text('VERSION = "1.2.0"\n')
    (tmp_path / "finealign_kernels/__init__.py").write_text('__version__ = "1.2.0"\n')
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.1.0\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.0 (2027-01-02)\n")
    assert RELEASE["audit_versions"](tmp_path) == ["CITATION.cff has version 1.1.0, setup.py 1.2.0"]
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.0 (unreleased)\n")
    assert len(RELEASE["audit_versions"](tmp_path)) == 2


def test_a_wrong_environment_is_refused(capsys):
    with pytest.raises(SystemExit):
        RELEASE["main"](["test", "--environments", "3.10"])
    assert "--environments must be PYTHON=TORCH, such as 3.10=2.10.*, got '3.10'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "archs, gpu, served",
    [
        (["80", "90a"], (8, 0), "80"),
        (["80", "90a"], (8, 9), "80"),
        (["80", "90a"], (9, 0), "90a"),
        (["80", "90a"], (10, 0), None),
        (["90a"], (9, 1), None),
        (["86"], (8, 0), None),
        (["100f"], (10, 3), "100f"),
        (["80+PTX"], (12, 0), "80+PTX"),
        (["120+PTX"], (9, 0), None),
        ([], (9, 0), None),
    ],
)
def test_which_code_serves_a_gpu(archs, gpu, served):
    assert _native.serves(archs, *gpu) == served


DEVICE = torch.device("cuda", 0)
ASKED = {
    "sequence": lambda: sequence_loss.missing(margin.logistic, DEVICE),
    "policy": lambda: policy_loss.missing(surrogate.clipped, "k3", DEVICE),
    "advantages": lambda: advantages.runs("auto", DEVICE),
    "segments": lambda: segments._backend("auto", DEVICE),
}


def test_ops_leave_a_gpu_alone_that_the_extension_holds_no_code_for(monkeypatch):
    """Its first launch would raise "no kernel image is available"; the torch path serves it."""
    properties = SimpleNamespace(major=7, minor=5)
    monkeypatch.setattr(_native, "_without_cuda", None)
    monkeypatch.setattr(_native, "_unserved", _native._unserved.__wrapped__)
    monkeypatch.setattr(_native, "architectures", lambda: ["80", "90a"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.delenv("FINEALIGN_REQUIRE_NATIVE", raising=False)
    why = "the extension is compiled for 80, 90a, which sm_75 does not run"
    assert [asked() for asked in ASKED.values()] == [why, why, False, "reference"]
    with monkeypatch.context() as strict, pytest.raises(RuntimeError, match=f"REQUIRE_NATIVE is set, but {why}"):
        strict.setenv("FINEALIGN_REQUIRE_NATIVE", "1")
        strict.setattr(torch.cuda, "current_device", lambda: 0)
        assert doctor._segment_backends("cuda") == ["reference", "native"]  # of which the check fails
        segments._backend("auto", DEVICE)
    properties.major, properties.minor = 9, 0
    assert [asked() for asked in ASKED.values()] == [None, None, True, "native"]


@pytest.mark.parametrize("name", ASKED)
def test_a_traced_graph_can_ask_for_a_gpu(name, monkeypatch):
    monkeypatch.setattr(_native, "_without_cuda", None)
    monkeypatch.delenv("FINEALIGN_REQUIRE_NATIVE", raising=False)
    answers = []
    for why in ("no code", None):
        monkeypatch.setattr(_native, "_unserved", lambda index, why=why: why)
        torch._dynamo.reset()
        asked = torch.compile(lambda x: (x + 1, ASKED[name]()), fullgraph=True, backend="eager")
        answers.append(asked(torch.ones(1))[1])
    assert answers == {"advantages": [False, True], "segments": ["reference", "native"]}.get(name, ["no code", None])

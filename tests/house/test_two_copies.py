"""Two copies of the package in one process, and the layout of Hugging Face's kernels."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import finealign_kernels

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(finealign_kernels.__file__).parent
LAYOUT = runpy.run_path(str(ROOT / "tools/hub_layout.py"))

WORKS = """
def check(fk):
    h, w = torch.randn(5, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    out = fk.linear_logprobs(h, w, torch.arange(5), outputs=("entropy",))
    torch.testing.assert_close(out.logp, (h @ w.T).log_softmax(1)[range(5), range(5)])
    fk.simpo(out.logp[:4].view(2, 2)).loss.backward()
    assert h.grad.isfinite().all() and w.grad.any()
    assert fk.segment_sum(torch.ones(4), torch.tensor([0, 1, 4])).tolist() == [1, 3]
"""
TWO = f"""
import sys, torch
sys.path[:0] = sys.argv[1:]
import finealign_kernels as one, another_name as two
{WORKS}
check(one), check(two), check(one)
torch.compile(lambda x: two.segment_sum(x, torch.tensor([0, 1, 4])), backend="aot_eager")(torch.ones(4))
from finealign_kernels.ops import _native as first
from another_name.ops import _native as second
assert first.reason is None, first.reason
print(second.reason)
"""


def run(code, *args, **env):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=300, cwd="/",
        env={**os.environ, "FINEALIGN_REQUIRE_NATIVE": "", **env},
    )  # fmt: skip


def copy(folder, name):
    """The package, compiled extension and all, as folder/name."""
    if not any(PACKAGE.glob("_C*.so")):
        pytest.skip("the extension is not built")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, folder / name, ignore=ignored)
    if not (folder / name / "kernels").exists():
        shutil.copytree(ROOT / "kernels/triton", folder / name / "kernels", ignore=ignored)


@pytest.fixture
def copies(tmp_path):
    copy(tmp_path, "another_name")
    return tmp_path


def test_a_second_copy_uses_the_extension_of_the_first(copies):
    found = run(TWO, copies, PACKAGE.parent)
    assert found.returncode == 0, (found.returncode, found.stderr[-2000:])
    assert found.stdout.split() == ["None"]


def test_another_build_stays_out_by_name(copies):
    (file,) = (copies / "another_name").glob("_C*.so")
    file.write_bytes(file.read_bytes() + b"\0")
    found = run(TWO, copies, PACKAGE.parent)
    assert found.returncode == 0, (found.returncode, found.stderr[-2000:])
    assert "another build is loaded in this process" in found.stdout and str(file) in found.stdout
    required = run(TWO, copies, PACKAGE.parent, FINEALIGN_REQUIRE_NATIVE="1")
    assert required.returncode == 1 and "but another build is loaded in this process" in required.stderr


HUB = f"""
import importlib.util, json, sys, torch
from pathlib import Path
{WORKS}
folder = Path(sys.argv[1])
try:
    import kernels
    kernels.get_local_kernel
except (ImportError, AttributeError):
    kernels = None
if kernels:
    fk = kernels.get_local_kernel(folder)
else:  # as kernels' importer does: by file, under the id
    variant = folder / "build/torch-cpu"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    fk = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fk)
check(fk)
sys.path.insert(0, sys.argv[2])
import finealign_kernels
check(finealign_kernels), check(fk)
print(fk.__name__, Path(fk.__file__).is_relative_to(folder))
"""


def test_the_layout_of_hugging_face_loads_beside_an_installed_copy(tmp_path):
    unique = LAYOUT["write"](tmp_path)
    for backend in ("cpu", "cuda"):
        variant = tmp_path / "build" / f"torch-{backend}"
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["id"] == unique and metadata["backend"] == {"type": backend} and metadata["version"] == 1
        assert (variant / "kernels/linear_logprobs.py").exists() and (variant / "feedback").is_dir()
        assert not [*variant.rglob("*.so"), *variant.rglob("__pycache__")]
    found = run(HUB, tmp_path, PACKAGE.parent)
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.split()[-1] == "True"
    with pytest.raises(FileExistsError, match="torch-cpu exists"):
        LAYOUT["write"](tmp_path)


OWN = f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]  # not the installed one
sys.path.insert(0, sys.argv[1])
import torch
import finealign_kernels
from finealign_kernels.ops import _native
assert _native.__file__.startswith(sys.argv[1])
{WORKS}
check(finealign_kernels)
print(_native.reason)
"""


def test_an_extension_of_other_sources_is_not_used(tmp_path):
    """As after a git pull: an op may have changed what it means, and not its signature."""
    copy(tmp_path, "finealign_kernels")
    assert run(OWN, tmp_path, PYTHONPATH="").stdout == "None\n"  # no sources beside it, as in a wheel
    for folder in ("csrc", "kernels/cuda"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "csrc/.launch.h.swp").write_text("an editor's")
    same = run(OWN, tmp_path, PYTHONPATH="")
    assert same.stdout == "None\n" and "extension" not in same.stderr, same.stderr
    with open(tmp_path / "kernels/cuda/scan.cuh", "a") as file:
        file.write("// changed\n")
    old = run(OWN, tmp_path, PYTHONPATH="")
    assert "has changed since the extension was compiled: run make setup" in old.stdout, old.stderr
    assert "the extension is not used: csrc/" in old.stderr
    required = run(OWN, tmp_path, PYTHONPATH="", FINEALIGN_REQUIRE_NATIVE="1")
    assert required.returncode and "FINEALIGN_REQUIRE_NATIVE is set, but csrc/" in required.stderr

"""Backends and devices that tests run over, Triton's interpreter put right, and poisoned allocations."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch

from finealign_kernels.ops import _choose

HERE = Path(__file__).parent
sys.path.append(str(HERE))  # oracles, ranks, worked_examples
sys.path.extend(str(folder) for folder in HERE.iterdir() if folder.is_dir())  # what test files take from each other

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    runpy.run_path(str(Path(__file__).with_name("triton_interpreter.py")))["install"]()

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture
def one_thread():
    """Torch with one thread: sums have one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def usable():
    """usable(name, device, dtype): the row backend's name, or a skip with the reason why it cannot run."""

    def check(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> str:
        try:
            return _choose.pick(name, device, dtype, _choose.backends())
        except RuntimeError as error:
            pytest.skip(str(error))

    return check


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def poisoned(monkeypatch):
    """torch.empty and its kin hold NaN: what a kernel forgets to write shows."""

    def poison(function):
        def filled(*args, **kwargs):
            out = function(*args, **kwargs)
            return out.fill_(torch.nan) if out.is_floating_point() and out.device.type != "meta" else out

        return filled

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poison(getattr(torch.Tensor, name)))


@pytest.fixture
def unread(monkeypatch):
    """Values of SegmentRewards are not read, as on a GPU: an end in front of the response is then no error."""
    monkeypatch.setattr("finealign_kernels.rl.rewards.reads_values", lambda x: False)


@pytest.fixture(params=("fused", "composed"))
def route(request, monkeypatch):
    """Losses by the fused op where it can run, and as the composition of small ops that it is held to."""
    if request.param == "composed":
        monkeypatch.setattr("finealign_kernels.losses.policy.is_fused", lambda *given: False)
        for module in ("preference", "pointwise"):
            monkeypatch.setattr(f"finealign_kernels.losses.{module}.is_fused", lambda row, device: False)
        monkeypatch.setattr("finealign_kernels.losses.nll.missing", lambda phi, device: "composed")
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the trainings of a file write to."""
    return tmp_path_factory.mktemp("runs")

"""Tests behind one that broke the GPU's context: in a new process, or not at all.

After an illegal access every CUDA call of the process fails, and tests that are right would fail with it.
"""

import os
import sys

import pytest

_broken = []


def is_broken() -> bool:
    torch = sys.modules.get("torch")
    try:
        if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.failed and is_broken():
        report.sections.append(("GPU", "its context is broken: the next tests need another process"))
        _broken.append(item)
    return report


def pytest_runtest_logfinish():
    """The report has been sent. An xdist worker is replaced by another."""
    if _broken and hasattr(_broken[0].config, "workerinput"):
        os._exit(1)
    elif _broken:
        pytest.exit("the GPU's context is broken, and every test behind this one would fail", returncode=1)

"""The cases of run.py under pytest-benchmark: `pytest bench --benchmark-only`; small shapes unless --size says else."""

import pytest
import torch
from cases import SUITES, Line, errors, truth


def pytest_generate_tests(metafunc):
    size, device = metafunc.config.getoption("size"), torch.device(metafunc.config.getoption("device"))
    lines = [
        Line(suite, shape, case, dtype, device)
        for suite in SUITES.values()
        for shape in suite.shapes[size]
        for dtype, case in suite.cases + suite.more_cases
        if suite.fits(shape, case)
    ]
    races = [
        (line, rival)
        for line in lines
        for rival in line.suite.rivals
        if rival.cases is None or line.case in rival.cases
    ]
    metafunc.parametrize("line, rival", races, ids=[f"{line}  {rival.name}" for line, rival in races])


def test_case(benchmark, line, rival):
    reason = rival.needs(line.dtype, line.device)
    if reason:
        pytest.skip(reason)
    x = line.sample()
    errors(line, rival, rival.call(x), truth(line, x))  # a wrong answer is not timed
    benchmark.group = str(line)
    benchmark.name = rival.name
    benchmark(_synchronized, rival.call, x, line.device)


def _synchronized(call, x, device):
    call(x)
    if device.type == "cuda":
        torch.cuda.synchronize(device)

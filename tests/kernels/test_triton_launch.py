"""The library's own launches, bound, specialised and compiled by Triton as on a GPU: see triton_launches.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("triton_launches.py")
ABSENT = {
    "sm_80": {"linear_fwd_tma_kernel", "linear_bwd_tma_kernel"},
    "sm_90": {"linear_fwd_kernel", "linear_bwd_kernel"},
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="launched for real in the other tests")
@pytest.mark.parametrize("arch", ABSENT)
def test_every_launch_compiles_and_no_number_of_rows_compiles_another(arch):
    """Few rows, one and none among them, take what many compiled: no step waits for a compiler but the first."""
    done = subprocess.run([sys.executable, SCRIPT, arch], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert {name for name, count in found["many"].items() if count == 0} == ABSENT[arch]
    assert found["few"] == found["many"]

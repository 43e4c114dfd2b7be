"""Launches as Triton binds, specialises and compiles them for a GPU that need not be there: nothing is run.

    python tests/kernels/triton_launches.py sm_90    how many variants of each kernel few and many rows compile, as JSON

A process of its own: elsewhere in the tests Triton interprets. What comes out of an op here is not its result.
"""

import contextlib
import importlib
import json
import os
import sys

os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
from triton import runtime  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

import finealign_kernels as fk  # noqa: E402
from finealign_kernels.ops import _choose, _chunked  # noqa: E402

KERNELS = ("linear_logprobs", "row_logprobs", "_combine")
MANY, FEW = (100,), (0, 1, 2, 15, 16, 33, 64)  # rows
V, D = 1040, 64


class Driver:
    """What Triton asks of one before a launch."""

    def __init__(self, arch: str):
        self.target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only() -> None:
    run = runtime.JITFunction.run

    def bound(self, *args, grid, warmup, **options):
        assert all(isinstance(size, int) and size > 0 for size in grid), f"{self.__name__}: a grid of {grid}"
        return run(self, *args, grid=grid, warmup=True, **options)

    runtime.JITFunction.run = bound


def small(kernels) -> None:
    """Tiles that compile in a second; chunks and blocks of them so that there are several."""
    tile = kernels.Config(32, 64, 32, 4, 2, 32, 4)
    kernels.config = lambda arch, dtype, capped: tile
    kernels.product_config = lambda arch, dtype: tile
    _chunked.tile_of = lambda device: _chunked.Tile(40, 512)


def variants() -> dict[str, int]:
    """Compiled kernels of each name."""
    found = {}
    for module in KERNELS:
        for name, value in vars(importlib.import_module(f"finealign_kernels.kernels.{module}")).items():
            if isinstance(value, runtime.JITFunction) and name.endswith("_kernel"):
                found[name] = len(value.device_caches[0][0])
    return found


def call(n: int, backend: str, compact: str, workspace, masked: bool, capped: bool) -> None:
    """Forward and backward of a head; the chunked layer's products are the library's, float32 for its kernels."""
    dtype = torch.bfloat16 if backend == _choose.FUSED else torch.float32
    hidden, weight = (torch.randn(size, D).to(dtype).requires_grad_() for size in (n, V))
    mask = torch.arange(n) % 3 > 0 if masked else None
    options = {"softcap": 30.0, "outputs": ("entropy",)} if capped else {}
    how = {"backend": backend, "compact": compact, "workspace": workspace}
    out = fk.linear_logprobs(hidden, weight, torch.arange(n), mask=mask, **how, **options)
    out.logp.backward(torch.arange(n) % 2.0)


def token_call(n: int, columns: int) -> None:
    logits = torch.randn(n, columns, requires_grad=True)
    fk.token_logprobs(logits, torch.arange(n), backend="triton").logp.backward(torch.ones(n))


def calls(rows) -> None:
    for n in rows:
        for masked in (False, True):
            call(n, "triton", "host", "full", masked, False)
            for compact, workspace in (("host", 0), ("device", "full"), ("device", 7 * V * 2)):
                call(n, _choose.FUSED, compact, workspace, masked, capped=compact == "device")
        token_call(n, 40000)


def main(arch: str) -> None:
    runtime.driver.set_active(Driver(arch))
    compile_only()
    _choose.triton_reason = lambda: None
    _choose.arch = lambda x: arch
    small(_choose.fused())
    with contextlib.redirect_stdout(sys.stderr):
        calls(MANY)
        many = variants()
        calls(FEW)
    print(json.dumps({"many": many, "few": variants()}))


if __name__ == "__main__":
    main(sys.argv[1])

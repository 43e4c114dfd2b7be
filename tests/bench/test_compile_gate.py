"""Every rule of bench/compile_gate.py trips on a kernel that breaks it, and on no other."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GATE = ROOT / "bench/compile_gate.py"

TRITON = """
import triton
import triton.language as tl
from compile_gate import Case, Pace


@triton.jit
def clean(x_ptr, y_ptr, stride, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cell = tl.arange(0, 16)[:, None] * 64 + tl.arange(0, 64)[None, :]  # a bounded product
    tl.store(y_ptr + row * 1024 + cell, tl.load(y_ptr + row * stride + cell))
    for start in range(0, n, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        tl.store(y_ptr + row * stride + cols, tl.load(x_ptr + row * stride + cols, mask=cols < n), mask=cols < n)


@triton.jit
def narrow_row(x_ptr, y_ptr, stride, n, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.store(y_ptr + cols, tl.load(x_ptr + tl.program_id(0) * stride + cols))


@triton.jit
def narrow_widened_late(x_ptr, y_ptr, stride, n, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.store(y_ptr + cols, tl.load(x_ptr + (tl.program_id(0) * stride).to(tl.int64) * 4 + cols))


@triton.jit
def narrow_constant(x_ptr, y_ptr, stride, n, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + cols, tl.load(x_ptr + cols, mask=cols < n), mask=cols < n)


@triton.jit
def narrow_branch(x_ptr, y_ptr, stride, n, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    at = tl.load(y_ptr).to(tl.int32)
    if at > 0:
        at = at * stride
    else:
        at += 1
    tl.store(y_ptr + cols, tl.load(x_ptr + at + cols))


@triton.jit
def narrow_loop(x_ptr, y_ptr, stride, n, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    at = tl.load(y_ptr).to(tl.int32)
    for _ in range(0, n):
        tl.store(y_ptr + cols, tl.load(x_ptr + at + cols))
        at += stride * n


@triton.jit
def narrow_while(x_ptr, y_ptr, stride, n, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    at = tl.load(y_ptr).to(tl.int32)
    while at < n:
        tl.store(y_ptr + cols, tl.load(x_ptr + at + cols))
        at = at * stride


@triton.jit
def atomic(x_ptr, y_ptr, stride, n, BLOCK: tl.constexpr):
    tl.atomic_add(y_ptr + tl.arange(0, BLOCK), 1.0)


@triton.jit
def spilling(x_ptr, y_ptr, stride, n, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols)
    tl.store(y_ptr + cols, x - tl.max(x, axis=0))


@triton.jit
def sharing(x_ptr, y_ptr, stride, n, BLOCK: tl.constexpr):
    cell = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, n):
        total = tl.dot(tl.load(x_ptr + k + cell), tl.load(y_ptr + k + cell), total, input_precision="ieee")
    tl.store(y_ptr + cell, total)


@triton.jit
def crowding(x_ptr, y_ptr, stride, n, BLOCK: tl.constexpr):
    at = tl.arange(0, 64)[:, None] * 16 + tl.arange(0, 16)[None, :]
    total = tl.zeros((64, 128), tl.float32)
    for k in range(0, n):  # as many sums a thread as it has registers
        right = tl.load(y_ptr + k + tl.arange(0, 16)[:, None] * 128 + tl.arange(0, 128)[None, :])
        total = tl.dot(tl.load(x_ptr + k + at), right, total, input_precision="ieee")
    tl.store(y_ptr + tl.arange(0, 64)[:, None] * 128 + tl.arange(0, 128)[None, :], total)


@triton.jit
def rounding(x_ptr, y_ptr, stride, n, BLOCK: tl.constexpr):
    cell = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(y_ptr + cell, tl.dot(tl.load(x_ptr + cell), tl.load(x_ptr + cell)))


@triton.jit
def summing(x_ptr, y_ptr, stride, n, BLOCK: tl.constexpr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), axis=0))


@triton.jit
def slow(x_ptr, y_ptr, stride, n, BLOCK: tl.constexpr):
    for start in range(0, n, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + cols)
        for _ in tl.static_range(24):
            x = tl.abs(x - 1.0)
        tl.store(y_ptr + cols, x)


@triton.jit
def slow_tile(x_ptr, y_ptr, stride, n, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    at = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, n):
        x = tl.load(x_ptr + at)
        total = tl.dot(x, x, total, input_precision="ieee")
        x_ptr += 4096
    for _ in tl.static_range(24):
        total = tl.abs(total - 1.0)
    if n > 0:  # never mind what else is not always run
        total = tl.exp(total)
    tl.store(y_ptr + at, total)


@triton.jit
def piecewise(x_ptr, y_ptr, stride, n, BLOCK: tl.constexpr):
    for start in range(0, n, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        tl.store(y_ptr + cols, tl.load(x_ptr + tl.minimum(cols, n - 1)).to(tl.float32))


@triton.jit
def multiplying(x_ptr, y_ptr, stride, n, BLOCK: tl.constexpr):
    cell = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in range(0, n):
        x = tl.load(x_ptr + cell)
        total = tl.dot(x, x, total, input_precision="ieee")
        x_ptr += 4096
    tl.store(y_ptr + cell, total)


@triton.jit
def refused(x_ptr, y_ptr, stride, n, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 3)


def case(kernel, block=128, targets=("sm_90", "gfx942"), spill=0, name=None, num_warps=4, same="", **options):
    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "stride": "i32", "n": "i32"}
    options |= {"num_warps": num_warps}
    name = name or kernel.__name__
    return Case(name, kernel, signature, {"BLOCK": block}, options, targets=targets, spill=spill, same=same)


def fast(kernel, pace=None, x="*bf16", name=None, block=128, **options):
    found = case(kernel, block, ("sm_90",), name=name, **options)
    tile = {"BLOCK_M": block, "BLOCK_N": block} if "BLOCK_M" in kernel.arg_names else {}
    signature = found.signature | {"x_ptr": x}
    return found._replace(
        signature=signature, constexprs=found.constexprs | tile, pace=pace, wide=True, aligned=("n", "stride")
    )


def cases():
    simple = (clean, narrow_row, narrow_widened_late, narrow_constant, narrow_branch, narrow_loop, narrow_while, atomic)
    many = {"block": 16384, "num_warps": 1}
    return [
        *map(case, simple),
        case(spilling, **many),
        case(spilling, targets=("sm_90",), spill=10**6, name="allowed", **many),
        case(crowding, targets=("sm_90",), spill=10**6, num_warps=1),
        case(sharing, block=64, targets=("sm_120",), num_stages=5),
        case(rounding, block=32, targets=("sm_90",)),
        *(case(summing, targets=("sm_90",), same="sum", name=f"summing {warps}", num_warps=warps) for warps in (4, 8)),
        case(refused),
        fast(slow, Pace(20, size=4), x="*fp32", block=1024),
        fast(slow, Pace(40, size=4), x="*fp32", block=1024, name="steady"),
        fast(slow, Pace(40, size=4, registers=8), x="*fp32", block=1024, name="greedy"),
        fast(slow_tile, Pace(20), block=64),
        fast(slow_tile, Pace(80), block=64, name="steady_tile"),
        fast(piecewise),
        fast(multiplying, block=64, name="quick"),
        fast(multiplying, block=64, num_stages=1, name="waiting"),
        fast(multiplying, block=32, name="single"),
    ]
"""

CUDA = """
#include <cstdint>
extern "C" {
__global__ void clean(const float* x, float* y, int stride) {
  __shared__ float cell[256];
  cell[threadIdx.x * 2 % 256] = x[blockIdx.x * static_cast<int64_t>(stride) + threadIdx.x * 3];
  __syncthreads();
  y[static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x] = cell[threadIdx.x % 7];
  y[static_cast<unsigned>(stride) * 128 % 4096] = 0;  // its low bits are right, whatever left the 32
}
__global__ void narrow(const float* x, float* y, int stride) { y[threadIdx.x] = x[blockIdx.x * stride + threadIdx.x]; }
__global__ void narrow_index(float* y) { y[blockIdx.x * blockDim.x + threadIdx.x] = 0; }
__global__ void narrow_remainder(float* y, int stride, int n) { y[stride * 128 % n] = 0; }
__global__ void narrow_loop(const float* x, float* y, int n, int stride) {
  int at = threadIdx.x;
  for (int i = 0; i < n; ++i) {
    y[threadIdx.x] += x[at];
    at = at * stride + 1;
  }
}
__global__ void atomic(float* y) { atomicAdd(y, 1.0f); }
__global__ void __launch_bounds__(1024) spilling(const float* x, float* y) {
  float kept[128];
#pragma unroll
  for (int i = 0; i < 128; ++i) kept[i] = x[threadIdx.x + 1024 * i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 128; ++i) y[threadIdx.x + 1024 * i] = kept[i] * kept[(i + 64) % 128];
}
}
"""

BREAKS = {
    "atomic": "atomics",
    "spilling": "spills",
    "crowding": "spills",
    "sharing": "shared",
    "refused": "compiles",
    "rounding": "precision",
    "slow": "instructions",
    "slow_tile": "instructions",
    "greedy": "registers",
    "piecewise": "widths",
    "waiting": "pipelined",
    "single": "wgmma",
    "8": "invariance",  # of summing, beside that of 4 warps
}


def broken_rules(*arguments):
    """{kernel: the rules it breaks}, and the exit status."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, GATE, *arguments], capture_output=True, text=True, env=environment)
    assert "compiled in" in done.stdout, done.stderr
    found, name = {}, None
    for line in done.stdout.splitlines()[1:-1]:
        if rule := re.match(r" +BROKEN (\w+)", line):
            found[name].add(rule[1])
        elif row := re.match(r"(\S.*?) +(sm_\d+|gfx\d+) ", line):
            name = row[1].split()[-1]
            found.setdefault(name, set())
    return found, done.returncode


def expected(names):
    return {name: {"addresses" if name.startswith("narrow") else BREAKS[name]} for name in names}


def test_triton_rules_trip(tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "planted.py").write_text(TRITON)
    found, status = broken_rules("--kernels", tmp_path / "planted.py")
    for kept in ("clean", "allowed", "4", "steady", "steady_tile", "quick"):
        assert found.pop(kept) == set(), kept
    assert found == expected(found)
    assert len(found) == 19 and status == 1


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_cuda_rules_trip(tmp_path):
    (tmp_path / "planted.cu").write_text(CUDA)
    (tmp_path / "wrong.cu").write_text("__global__ void refused() { no such thing; }")
    found, status = broken_rules("--cuda", tmp_path / "planted.cu", tmp_path / "wrong.cu")
    assert found.pop("clean") == set()
    assert found.pop("wrong.cu") == {"compiles"}
    assert found == expected(found)
    assert len(found) == 6 and status == 1


def test_a_clean_file_passes(tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "planted.py").write_text(TRITON + "\n\ndef cases():\n    return [case(clean)]\n")
    assert broken_rules("--kernels", tmp_path / "planted.py") == ({"clean": set()}, 0)


LISTING = """
        /*0000*/  MOV R2, c[0x0][0x28] ;
        /*0010*/  HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0020*/  STL.64 [R1], {handed} ;
        /*0030*/  @P0 BRA 0x10 ;
        /*0040*/  LDL R9, [R1+0x8] ;
        /*0050*/  EXIT ;
"""


def test_a_zero_that_a_call_is_handed_is_no_spill():
    """ptxas adds such a call to each copy by a descriptor for sm_120, under Triton 3.6 alone."""
    spills = runpy.run_path(str(GATE))["spills"]
    assert spills(LISTING.format(handed="RZ")) == (4, 0)
    assert spills(LISTING.format(handed="R2")) == spills(LISTING.format(handed="R12")) == (12, 8)


PTX = """
$L__BB0_1:
    {store}.b32 [%r1], %r2;
$L__BB0_2:
    {fence};
    @%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {{%r3, %r4}}], [%r5];
    @%p2 bra 	$L__BB0_2;
    @%p3 bra {back};
    st.global.b32 [%rd2], %r2;
    ret;
"""


@pytest.mark.parametrize(
    "store, fence, back, breaks",
    [
        ("st.shared", "bar.sync 0", "$L__BB0_1", True),
        ("stmatrix.sync.aligned.m8n8.x4.shared", "bar.sync 0", "$L__BB0_1", True),
        ("st.shared", "fence.proxy.async.shared::cta", "$L__BB0_1", False),
        ("st.shared", "bar.sync 0", "$L__BB0_2", False),  # written once, before a barrier
        ("st.global", "bar.sync 0", "$L__BB0_1", False),
    ],
)
def test_copies_by_descriptors_are_fenced_from_stores(store, fence, back, breaks):
    assert runpy.run_path(str(GATE))["unfenced"](PTX.format(store=store, fence=fence, back=back)) == breaks


def test_two_runs_side_by_side(tmp_path):
    before = [{"case": "row", "target": "sm_90", "registers": 105, "instructions": 44.8, "whole": None}]
    after = [before[0] | {"registers": 60, "instructions": 15.3}, {"case": "new", "target": "sm_90", "registers": 8}]
    for name, rows in (("a", before), ("b", after)):
        (tmp_path / name).write_text(json.dumps(rows))
    command = [sys.executable, GATE, "--compare", tmp_path / "a", tmp_path / "b"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert table[2:] == [
        "| row | sm_90 | 105 -> 60 | - | - | - | 44.8 -> 15.3 | - |",
        "| new | sm_90 | 8 | - | - | - | - | - |",
    ]


def test_every_kernel_has_a_case():
    pytest.importorskip("triton")
    named = {case.kernel.fn.__name__ for case in runpy.run_path(str(GATE))["cases"]()}
    written = {
        name
        for file in (ROOT / "kernels/triton").glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M)
    }
    assert named == written


def test_heads_are_compiled_as_real_ones_are():
    """Triton compiles other code where V is a multiple of 16, which that of every model is."""
    pytest.importorskip("triton")
    real = runpy.run_path(str(ROOT / "bench/shapes.py"))["HEAD"]["models"]
    assert all(shape.V % 16 == 0 for shape in real)
    forward = [case for case in runpy.run_path(str(GATE))["cases"]() if case.name.startswith("linear_fwd")]
    for target in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942"):
        judged = {case.pace and case.pace.instructions for case in forward if target in case.targets and case.pace}
        assert {"vocab" in case.aligned for case in forward if target in case.targets and case.pace} == {True}, target
        assert 22 in judged, target

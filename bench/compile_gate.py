"""Compiles every Triton kernel and csrc/cuda/*.cu for GPUs that need not be there, and reads what came out.

    python bench/compile_gate.py                     the table; exit status 1 where a rule is broken
    python bench/compile_gate.py --full              more dtypes and options of the fused head, some minutes more
    python bench/compile_gate.py --json FILE         the rows into a file
    python bench/compile_gate.py --compare A.json B.json    two of them as a table in Markdown; compiles nothing
    python bench/compile_gate.py --kernels FILE.py   the cases() of another file instead
    python bench/compile_gate.py --cuda FILE.cu ...  these files instead

Rules, for each kernel and GPU:
    compiles    no compiler turns it down
    spills      no register spilled in a loop of products; elsewhere no more bytes (stores and loads) than the case
                allows, by default none. Read from the machine code that is shipped; AMD's is counted as a whole
    shared      no more shared memory than a block may have on that GPU
    atomics     none, so that every run repeats
    precision   no product of float32 by tf32 or its like: a Triton dot says input_precision="ieee"
    invariance  cases of one name in `same` add up alike: sums in one layout, so that a row has one result however many
                rows there are, whichever are left out, and whatever is stored beside it
    instructions  on sm_90 no more instructions an element than the case allows: of a row kernel in the loops that load,
                of a tile of the head on the shortest way past its loop of products (few tiles hold a label, or are the
                last)
    registers   on sm_90 no more than the case allows
    widths      no load or store of global memory below 4 bytes in a loop; in a loop of products none below 8
    pipelined   a loop of products copies while it multiplies (cp.async or a descriptor), or waits for every load
    wgmma       on sm_90 bfloat16 is multiplied by warp groups
    fences      where a loop copies blocks by descriptors into shared memory that it also writes itself, a proxy fence
                orders the two. Read from PTX
    addresses   no product of two 32-bit integers that may leave 32 bits reaches an address. Read from Triton's IR,
                where nothing is optimised away yet, and from PTX for .cu files. What has a bound: constants, thread
                ids, tl.arange, and what is made of them. An index that a loop counts up is no product.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import multiprocessing
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
INT_MAX = 2**31 - 1


class Target(NamedTuple):
    name: str
    backend: str
    arch: int | str
    warp: int
    shared: int  # bytes that one block may have


TARGETS = (
    Target("sm_80", "cuda", 80, 32, 163 * 1024),
    Target("sm_90", "cuda", 90, 32, 227 * 1024),
    Target("sm_100", "cuda", 100, 32, 227 * 1024),
    Target("sm_120", "cuda", 120, 32, 99 * 1024),
    Target("gfx942", "hip", "gfx942", 64, 64 * 1024),
)
CUDA_ARCHS = {"80": "sm_80", "90a": "sm_90", "100f": "sm_100", "120": "sm_120"}  # nvcc's name: ours


class Pace(NamedTuple):
    """What a kernel may take on sm_90, where instructions and not memory would bound it."""

    instructions: float  # an element
    size: int = 0  # bytes of an element that a loop loads; 0: a tile of products
    branches: bool = False  # one of the loops runs, and the dearest counts; else all of them do
    registers: int = 255


class Case(NamedTuple):
    """One way in which a Triton kernel is launched."""

    name: str
    kernel: Any  # a triton.JITFunction
    signature: dict[str, str]  # type of every argument that is no constexpr
    constexprs: dict[str, Any]  # None for a pointer that is not given
    options: dict[str, Any]  # num_warps and so on
    aligned: tuple[str, ...] = ()  # arguments divisible by 16: pointers always are
    spill: int = 0  # bytes allowed outside of loops of products
    same: str = ""  # cases whose sums have the same layouts
    pace: Pace | None = None
    wide: bool = False  # rows are aligned: rules widths, pipelined and wgmma hold
    targets: tuple[str, ...] = tuple(target.name for target in TARGETS)


class Row(NamedTuple):
    """One line of the table."""

    case: str
    target: str
    registers: int | None = None
    spill: int | None = None  # bytes stored and loaded on NVIDIA, registers on AMD
    shared: int | None = None
    blocks: int | None = None  # that fit a multiprocessor of sm_90
    instructions: float | None = None  # an element, as Pace says
    whole: float | None = None  # of a tile: all that is written down, also for those that hold a label or are the last
    broken: tuple[str, ...] = ()
    same: str = ""
    sums: tuple[str, ...] = ()  # layouts of products and sums, in their order


# ---- what we ship --------------------------------------------------------------------------------------------------


def cases(full: bool = False) -> list[Case]:
    return [*row_cases(), *head_cases(full)]


# Bytes that a row kernel may spill: the assembler gives some registers away for one more block at a time, and it is
# memory that bounds these.
ROW_SPILL = 64


def row_cases() -> list[Case]:
    """Every launch of both tables with all options on; on the largest other dtypes, the fewest options, odd sizes."""
    from finealign_kernels.kernels import row_logprobs as rows

    largest, longest = rows.LAUNCH[-1], rows.BACKWARD[-1]  # forward, backward
    found = [_row_fwd(rows, launch, "bf16") for launch in rows.LAUNCH]
    found += [_row_fwd(rows, largest, dtype) for dtype in ("fp32", "fp16")]
    found += [_row_fwd(rows, largest, "bf16", full=False), _row_fwd(rows, largest, "bf16", aligned=False)]
    found += [_row_bwd(rows, launch, "bf16", from_e=False) for launch in rows.BACKWARD]
    found += [_row_bwd(rows, longest, dtype, from_e=True) for dtype in ("bf16", "fp32", "fp16")]
    found += [_row_bwd(rows, longest, "bf16", from_e, full=False) for from_e in (False, True)]
    found += [_row_bwd(rows, longest, "bf16", from_e=False, aligned=False)]
    found += [_row_bwd(rows, longest, "bf16", from_e=True, e_columns=128)]
    found += [_only(_row_bwd(rows, longest, "bf16", from_e=True, full=False, e_columns=256), "bare")]
    bare = _row_fwd(rows, largest, "bf16", full=False)
    found += [_only(bare, "bare, entropy,", WANT=1)]
    kept = _row_fwd(rows, largest, "fp32", full=False)
    kept = kept._replace(constexprs={name: value for name, value in kept.constexprs.items() if name != "e_ptr"})
    found += [_only(kept._replace(signature=kept.signature | {"e_ptr": "*bf16"}), "bare, E in bf16,")]
    return found


ROW = Pace(20, registers=64)


def _only(case: Case, named: str, **constexprs) -> Case:
    """A bare case for sm_90 alone, where its pace is judged."""
    name = case.name.replace("bare", named)
    return case._replace(name=name, constexprs=case.constexprs | constexprs, targets=("sm_90",))


def _row_fwd(rows, launch, dtype: str, full=True, aligned=True) -> Case:
    _, block, num_warps = launch
    signature = {"x_ptr": f"*{dtype}", "target_ptr": "*i64", "part_ptr": "*fp32", "first_ptr": "*i64"}
    signature |= {"label_ptr": "*fp32", "bias_ptr": "*fp32", "e_ptr": f"*{dtype}"}
    strides = ("x_stride", "part_stride", "first_stride", "label_stride", "e_stride")
    signature |= dict.fromkeys((*strides, "col0", "columns", "spans"), "i32")
    signature |= dict.fromkeys(("scale", "softcap", "inv_temperature"), "fp32")
    constexprs = {"CAPPED": full, "SCALED": full, "WANT": 7 if full else 0, "SPAN": rows.SPAN, "BLOCK": block}
    constexprs["GROUP"] = 16 // _torch_dtype(dtype).itemsize if aligned else 1
    constexprs |= {"spans": 1} if launch[0] <= rows.SPAN else {}
    constexprs |= {} if full else {"bias_ptr": None, "e_ptr": None}
    return Case(
        f"row_fwd {dtype} {'full' if full else 'bare'}{'' if aligned else ' odd'} {block}",
        rows.row_fwd_kernel,
        signature,
        constexprs,
        {"num_warps": num_warps, "num_stages": rows.STAGES, **rows.OPTIONS},
        aligned=("x_stride", "e_stride", "columns") if aligned else (),
        spill=ROW_SPILL,
        pace=None if full else ROW._replace(size=_torch_dtype(dtype).itemsize),
        wide=aligned,
    )


def _row_bwd(rows, launch, dtype: str, from_e: bool, full=True, aligned=True, e_columns=0) -> Case:
    _, block, num_warps = launch
    signature = {"out_ptr": f"*{dtype}", "src_ptr": f"*{dtype}", "index_ptr": "*i64", "e_max_ptr": "*fp32"}
    signature |= {"bias_ptr": "*fp32", "target_ptr": "*i64", "coef_ptr": "*fp32"}
    strides = ("out_stride", "src_stride", "e_max_stride", "coef_stride")
    signature |= dict.fromkeys((*strides, "col0", "columns", "spans"), "i32")
    signature |= dict.fromkeys(("scale", "softcap", "inv_temperature"), "fp32")
    absent = ("bias_ptr",) if from_e else ("e_max_ptr",) if full else ("e_max_ptr", "bias_ptr")
    constexprs = {
        "CAPPED": full,
        "SCALED": full,
        "SPREAD": full and not from_e,
        "E_COLUMNS": e_columns,
        "SPAN": rows.SPAN,
        "BLOCK": block,
    }
    constexprs |= dict.fromkeys(absent if full else (*absent, "index_ptr"))
    constexprs |= {"spans": 1} if launch[0] <= rows.SPAN else {}
    return Case(
        f"row_bwd {dtype} {f'from e of {e_columns} ' if e_columns else 'from e ' if from_e else ''}"
        f"{'full' if full else 'bare'}{'' if aligned else ' odd'} {block}",
        rows.row_bwd_kernel,
        signature,
        constexprs,
        {"num_warps": num_warps, "num_stages": rows.STAGES, **rows.OPTIONS},
        aligned=("out_stride", "src_stride", "columns") if aligned else (),
        spill=ROW_SPILL,
        pace=None if full else ROW._replace(size=_torch_dtype(dtype).itemsize, branches=True),
        wide=aligned,
    )


# Bytes that a tile of the fused head may spill outside of its loop of products, once a tile: an instruction for every
# four of them, beside the thousands of the loop, and another version of Triton moves them by dozens.
REST = 256


def head_cases(full: bool) -> list[Case]:
    """The tiles of every GPU: with all options on, and the plain head; the rest with full=True. The rows of an odd
    head do not lie at multiples of 16 bytes: it takes pointers where others take descriptors."""
    from finealign_kernels.kernels import linear_logprobs as head

    found = []
    for target in TARGETS:
        forward, backward = partial(_head_fwd, head, target.name), partial(_head_bwd, head, target.name)
        found += [forward(dtype, capped=True) for dtype in ("bf16", "fp32")]
        plain, bare = (forward("bf16", capped=False, e=e) for e in (True, False))
        alike = [plain]
        if full or target.name == "sm_90":
            alike += [_every_row(bare)]
        if full:
            alike += [bare, _every_row(plain)]
        found += [case._replace(same="plain head") for case in alike]
        found += [backward("bf16", capped) for capped in (False, True)]
        found += [_bounded(head, target.name, "bf16", across) for across in (False, True)]
        if full or target.name in head.TMA:
            found += [way("bf16", capped, aligned=False) for way in (forward, backward) for capped in (False, True)]
        if full:
            found += [forward("fp16", capped) for capped in (False, True)]
            found += [forward("bf16", capped=False, whole=False)]
            found += [way("bf16", capped=False, rich=True) for way in (forward, backward)]
            found += [backward(dtype, capped=True) for dtype in ("fp16", "fp32")]
            found += [way("fp32", capped=True, aligned=False) for way in (forward, backward)]
            found += [
                _bounded(head, target.name, dtype, across) for dtype in ("fp16", "fp32") for across in (False, True)
            ]
    combined = [_combine(tiles, want) for tiles, want in ((16, 7), (512, 7), (2048, 0))]
    return combined + [case._replace(spill=REST) for case in found]


def _head_fwd(
    head, target: str, dtype: str, capped: bool, aligned=True, e=True, whole=True, rich: bool | None = None
) -> Case:
    """rich: a scale, a bias, and every output; by default with a softcap."""
    rich = capped if rich is None else rich
    want = 7 if rich else 1
    tile = head.forward_config(target, _torch_dtype(dtype), capped, want)
    tile = tile if aligned else head.slim(tile)
    signature = dict.fromkeys(("x_ptr", "w_ptr", "e_ptr"), f"*{dtype}")
    signature |= dict.fromkeys(("target_ptr", "index_ptr", "count_ptr", "first_ptr"), "*i64")
    signature |= dict.fromkeys(("bias_ptr", "part_ptr", "label_ptr"), "*fp32")
    signature |= dict.fromkeys(("x_stride_n", "w_stride_v", "room", "chunk", "n", "vocab", "depth"), "i32")
    signature |= dict.fromkeys(("scale", "softcap", "inv_temperature"), "fp32")
    constexprs = {
        "x_stride_d": 1,
        "w_stride_d": 1,
        "CAPPED": capped,
        "SCALED": rich,
        "WANT": want,
        "SUMS": head.sums_of(tile, _torch_dtype(dtype), target),
        **_blocks(tile, aligned),
    }
    constexprs |= {} if rich else {"bias_ptr": None}
    constexprs |= {} if e else {"e_ptr": None}
    case = Case(
        f"linear_fwd {dtype} {_kind(capped, rich)}{'' if e else ' without e'}{'' if aligned else ' odd'}"
        f"{'' if whole else ' of any vocabulary'} {tile.rows} x {tile.columns} x {tile.depth}",
        head.linear_fwd_kernel,
        signature,
        constexprs,
        {"num_warps": tile.warps, "num_stages": tile.stages, **head.OPTIONS},
        # the V of most heads is a multiple of 16
        aligned=("x_stride_n", "w_stride_v", "depth", "chunk", *["vocab"] * whole) if aligned else (),
        targets=(target,),
        pace=Pace(22 if e else 18) if aligned and not rich and whole else None,
        wide=aligned and whole,
    )
    return _by_blocks(head, case, tile) if aligned and dtype != "fp32" and target in head.TMA else case


def _kind(capped: bool, rich: bool) -> str:
    return "full" if capped else "rich" if rich else "plain"


def _every_row(case: Case) -> Case:
    """The same tile where no row is left out."""
    constexprs = case.constexprs | dict.fromkeys(("index_ptr", "count_ptr"))
    return case._replace(name=case.name.replace(" plain", " plain, every row,"), constexprs=constexprs)


def _by_blocks(head, case: Case, tile) -> Case:
    """The same tile by descriptors of hidden and weight."""
    c = case.constexprs
    strides = ("x_stride_n", "x_stride_d", "w_stride_v", "w_stride_d")
    constexprs = {name: value for name, value in c.items() if name not in strides}
    dtype, backward = case.signature["x_ptr"][1:], case.kernel is head.linear_bwd_kernel
    constexprs |= {} if backward else {"FLATTEN": tile.flatten, "SPECIALIZE": tile.specialize}
    gone = (*strides, "x_ptr", "w_ptr", *(["index_ptr"] if backward else []))
    signature = {name: kind for name, kind in case.signature.items() if name not in gone}
    signature["x"] = f"tensordesc<{dtype}[{c['BLOCK_M']},{c['BLOCK_K']}]>"
    signature["w"] = f"tensordesc<{dtype}[{c['BLOCK_N']},{c['BLOCK_K']}]>"
    aligned = tuple(name for name in case.aligned if name not in strides)
    kernel = head.linear_bwd_tma_kernel if backward else head.linear_fwd_tma_kernel
    name = re.sub("linear_[fb]wd", r"\g<0>_tma", case.name)
    return case._replace(name=name, kernel=kernel, signature=signature, constexprs=constexprs, aligned=aligned)


def _head_bwd(head, target: str, dtype: str, capped: bool, aligned=True, rich: bool | None = None) -> Case:
    """rich: a scale, a bias, a gradient of every z, counts on the device, rows from E; by default with a softcap."""
    rich = capped if rich is None else rich
    tile = head.config(target, _torch_dtype(dtype), capped)
    tile = tile if aligned else head.slim(tile)
    signature = dict.fromkeys(("out_ptr", "x_ptr", "w_ptr", "e_ptr"), f"*{dtype}")
    signature |= dict.fromkeys(("target_ptr", "index_ptr", "place_ptr", "counts_ptr"), "*i64")
    signature |= dict.fromkeys(("bias_ptr", "coef_ptr", "e_max_ptr"), "*fp32")
    strides = ("out_stride", "x_stride_n", "w_stride_v", "coef_stride", "e_max_stride")
    sizes = ("stored", "count", "start", "height", "col0", "columns", "depth")
    signature |= dict.fromkeys((*strides, *sizes), "i32") | dict.fromkeys(
        ("scale", "softcap", "inv_temperature"), "fp32"
    )
    constexprs = {"x_stride_d": 1, "w_stride_d": 1, "CAPPED": capped, "SCALED": rich, "SPREAD": rich}
    constexprs |= _blocks(tile, aligned)
    constexprs |= {} if rich else dict.fromkeys(("bias_ptr", "e_ptr", "place_ptr", "e_max_ptr", "counts_ptr"))
    case = Case(
        f"linear_bwd {dtype} {_kind(capped, rich)}{'' if aligned else ' odd'}"
        f" {tile.rows} x {tile.columns} x {tile.depth}",
        head.linear_bwd_kernel,
        signature,
        constexprs,
        {"num_warps": tile.warps, "num_stages": tile.stages, **head.OPTIONS},
        aligned=("out_stride", "x_stride_n", "w_stride_v", "columns", "depth") if aligned else (),
        targets=(target,),
        wide=aligned,
    )
    return _by_blocks(head, case, tile) if aligned and dtype != "fp32" and target in head.TMA else case


def _bounded(head, target: str, dtype: str, across: bool) -> Case:
    """dX = dZ W, or across dW = dZᵀ X."""
    tile = head.product_config(target, _torch_dtype(dtype))
    signature = dict.fromkeys(("a_ptr", "b_ptr"), f"*{dtype}") | dict.fromkeys(("index_ptr", "counts_ptr"), "*i64")
    signature |= {"out_ptr": "*fp32"}
    strides = ("a_stride_k" if across else "a_stride_m", "b_stride_k", "out_stride")
    signature |= dict.fromkeys((*strides, "start", "height", "rows", "inner", "columns"), "i32")
    constexprs = {"a_stride_m" if across else "a_stride_k": 1, "b_stride_n": 1, "ACROSS": across, "ADD": True}
    blocks = {name: value for name, value in _blocks(tile, True).items() if name not in ("EVEN", "SLICE")}
    return Case(
        f"bounded_product {dtype} {'dw' if across else 'dx'} {tile.rows} x {tile.columns} x {tile.depth}",
        head.bounded_product_kernel,
        signature,
        constexprs | blocks,
        {"num_warps": tile.warps, "num_stages": tile.stages, **head.OPTIONS},
        aligned=(*strides, "rows", "inner", "columns"),
        targets=(target,),
        wide=True,
    )


def _combine(tiles: int, want: int) -> Case:
    from finealign_kernels.kernels import _combine as states

    signature = dict.fromkeys(("target_ptr", "index_ptr", "count_ptr", "first_ptr"), "*i64") | {"top1_ptr": "*i8"}
    floats = ("part", "label", "logp", "lse", "entropy", "squares", "mean", "m", "l", "slope", "allowed")
    signature |= {f"{name}_ptr": "*fp32" for name in floats} | {"tiles": "i32"}
    constexprs = {"WANT": want, "BLOCK": tiles}
    options = {"num_warps": states.warps(tiles), **states.OPTIONS}
    return Case(f"combine {tiles}", states.combine_kernel, signature, constexprs, options)


def _blocks(tile, even: bool) -> dict[str, Any]:
    blocks = {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth}
    return {"EVEN": even, **blocks, "SLICE": tile.slice, "GROUP": tile.group}


def _torch_dtype(name: str):
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


# ---- products that reach an address --------------------------------------------------------------------------------


class Flow:
    """Where the integers of one function come from, and how large they may be. A name may have several origins."""

    def __init__(self):
        self.origins: dict[str, list[tuple[str, tuple]]] = {}

    def add(self, name: str, kind: str, *operands) -> None:
        """kind: "at most" (a number), "sum", "least", "product" (32-bit), "high" (half of it), "wide" (product)."""
        self.origins.setdefault(name, []).append((kind, operands))

    def bound(self, name: str, above: frozenset = frozenset()) -> int:
        """The largest magnitude of a value; that of a 32-bit integer where nothing is known. `above`: who is asking."""
        if re.fullmatch(r"-?\d+", name):
            return abs(int(name))
        if name in above or name not in self.origins:
            return INT_MAX
        return max(self._bound(kind, operands, above | {name}) for kind, operands in self.origins[name])

    def _bound(self, kind: str, operands: tuple, above: frozenset) -> int:
        if kind == "at most":
            return operands[0]
        bounds = [self.bound(operand, above) for operand in operands]
        if kind == "least":  # of a mask, a remainder, a minimum: a negative one bounds nothing
            return min(INT_MAX if one.startswith("-") else bound for one, bound in zip(operands, bounds, strict=True))
        if kind == "sum":
            return sum(bounds)
        return bounds[0] * bounds[1] >> (32 if kind == "high" else 0)

    def narrow_product(self, name: str) -> str | None:
        """A product among the origins of a value that may leave 32 bits."""
        seen, todo = set(), [name]
        while todo:
            one = todo.pop()
            if one in seen:
                continue
            seen.add(one)
            for kind, operands in self.origins.get(one, ()):
                if kind == "product" and self.bound(operands[0]) * self.bound(operands[1]) > INT_MAX:
                    return one
                todo += operands if kind != "at most" else ()
        return None


class Region(NamedTuple):
    """An operation of Triton's IR that holds blocks: what a yield in them feeds."""

    results: list[str]
    carried: list[str]  # block arguments of a loop
    passed: list[str]  # what scf.condition hands to the second block of a while


VALUE = r"%[\w$.-]+(?:#\d+)?"


class TritonFlow(Flow):
    """The flow of a kernel in the text of Triton's IR."""

    def __init__(self, text: str):
        super().__init__()
        self.scopes: list[dict[str, str]] = [{}]  # a name may come again in a sibling block
        self.regions: list[Region] = []
        self.offsets: list[str] = []  # what is added to pointers
        self.number = itertools.count()
        for line in text.splitlines():
            self._read(re.sub(r"\s*\bloc\((?:[^()]|\([^()]*\))*\)", "", line).strip())

    def _read(self, line: str) -> None:
        closes, opens = line.startswith("}"), line.endswith("{")
        if closes:
            self.scopes.pop()
        if closes and opens:  # else, do: another block of the same operation
            self.scopes.append({})
        elif closes:
            self.regions.pop()
        else:
            result, _, operation = line.partition(" = ") if line.startswith("%") else ("", "", line)
            opcode = re.split(r"[ (]", operation.replace('"', ""), maxsplit=1)[0]
            operands = [self._look_up(value) for value in re.findall(VALUE, operation)]
            if opens:
                self._open(result, opcode, operands, operation)
            elif result:
                self._origin(self._define(result), opcode, operands, operation)
            else:
                self._hand_over(opcode, operands, operation)

    def _define(self, name: str) -> str:
        self.scopes[-1][name] = f"{name}@{next(self.number)}"
        return self.scopes[-1][name]

    def _look_up(self, name: str) -> str:
        base, _, index = name.partition("#")
        known = next((scope[base] for scope in reversed(self.scopes) if base in scope), base)
        return f"{known}#{index}" if index else known

    def _open(self, result: str, opcode: str, operands: list[str], operation: str) -> None:
        """A loop, a branch, a reduction: block arguments come from initial values, a counter from its limits."""
        base, _, count = result.partition(":")
        carried = [(name, self._look_up(source)) for name, source in re.findall(rf"({VALUE}) = ({VALUE})", operation)]
        limits = [self._look_up(limit) for limit in re.findall(rf" to ({VALUE})", operation)]
        name = self._define(base) if base else ""
        results = [f"{name}#{i}" for i in range(int(count))] if count else [name] * bool(name)
        if not opcode.startswith("scf."):
            self.add(name, "sum", *operands)
        self.scopes.append({})
        arguments = [self._define(argument) for argument, _ in carried]
        self._feed(arguments, [source for _, source in carried])
        if opcode == "scf.for":
            self.add(arguments.pop(0), "sum", *limits)
        self.regions.append(Region(results, arguments, []))

    def _hand_over(self, opcode: str, operands: list[str], operation: str) -> None:
        region = self.regions[-1] if self.regions else None
        if opcode == "scf.yield":
            self._feed(region.results, operands)
            self._feed(region.carried, operands)
        elif opcode == "scf.condition":
            self._feed(region.results, operands[1:])
            region.passed.extend(operands[1:])
        elif opcode.startswith("^"):
            arguments = [self._define(argument) for argument in re.findall(rf"({VALUE}):", operation)]
            self._feed(arguments, region.passed)

    def _feed(self, targets: list[str], sources: list[str]) -> None:
        for target, source in zip(targets, sources, strict=False):
            self.add(target, "sum", source)

    def _origin(self, name: str, opcode: str, operands: list[str], text: str) -> None:
        product = "product" if re.search(r"\b(tensor<[\dx]+x)?i32>?$", text) else "wide"
        if opcode == "tt.addptr":
            self.offsets.append(operands[1])
        elif opcode == "arith.constant":
            if value := re.match(r"arith.constant (?:dense<)?(-?\d+)>? :", text):
                self.add(name, "at most", abs(int(value[1])))
        elif opcode == "tt.make_range":
            self.add(name, "at most", int(re.search(r"end = (\d+)", text)[1]))
        elif opcode == "arith.muli":
            self.add(name, product, *operands)
        elif opcode == "arith.shli":
            self.add(f"2^{operands[1]}", "at most", 1 << min(self.bound(operands[1]), 31))
            self.add(name, product, operands[0], f"2^{operands[1]}")
        elif opcode in ("arith.remsi", "arith.remui"):
            self.add(name, "least", *operands)
        elif opcode not in ("tt.load", "arith.cmpi", "arith.cmpf", "tt.get_program_id", "tt.get_num_programs"):
            self.add(name, "sum", *operands)


def ttir_products(text: str) -> list[str]:
    """Pointer offsets in Triton's IR that hold a 32-bit product, "offset <- product" each."""
    flow = TritonFlow(text)
    products = [(offset, flow.narrow_product(offset)) for offset in flow.offsets]
    return [re.sub(r"@\d+", "", f"{offset} <- {product}") for offset, product in products if product]


def ptx_products(text: str) -> list[str]:
    """Global addresses in the PTX of one function that hold a 32-bit product, "instruction <- product" each."""
    flow, addresses = Flow(), []
    for line in text.splitlines():
        instruction = re.match(r"\s*(?:@!?%\w+ )?\s*([a-z][\w.:]*)\s+(.*);", line)
        if not instruction:
            continue
        opcode, arguments = instruction.groups()
        if re.match(r"(ld|st|atom|red|cp|prefetch)\b", opcode):
            if not re.search(r"\.(shared|param|const|local)(?!.*global)", opcode):
                addresses += [(f"{opcode} {arguments}", name) for name in re.findall(r"\[(%\w+)", arguments)]
        elif not re.match(r"(setp|bra|call|ret|bar|membar|fence)\b", opcode):
            _ptx_origin(flow, opcode, re.findall(r"%[\w.]+|-?\b\d+\b", arguments))
    products = [(instruction, flow.narrow_product(name)) for instruction, name in addresses]
    return [f"{instruction} <- {product}" for instruction, product in products if product]


SPECIAL = {"%tid": 1023, "%ntid": 1024, "%laneid": 31, "%warpid": 31}


def _ptx_origin(flow: Flow, opcode: str, values: list[str]) -> None:
    if not values:
        return
    (name, *operands), narrow = values, opcode.endswith("32")
    kind, _, rest = opcode.partition(".")
    for operand in operands:
        if operand.partition(".")[0] in SPECIAL:
            flow.add(operand, "at most", SPECIAL[operand.partition(".")[0]])
    if kind in ("mul", "mad") and re.match(r"(lo|hi|wide)\b", rest):
        half = rest.partition(".")[0]
        product = "high" if half == "hi" else "product" if half == "lo" and narrow else "wide"
        flow.add(f"{name}*", product, *operands[:2])
        flow.add(name, "sum", f"{name}*", *operands[2:])
    elif kind == "shl":
        flow.add(f"{name}*", "at most", 1 << min(flow.bound(operands[1]), 31))
        flow.add(name, "product" if narrow else "wide", operands[0], f"{name}*")
    elif kind in ("shr", "div"):
        flow.add(name, "sum", operands[0])
    elif kind == "and" and re.fullmatch(r"\d+", operands[-1]):  # low bits are right, whatever a product has above them
        flow.add(name, "at most", int(operands[-1]))
    elif kind in ("and", "rem", "min"):
        flow.add(name, "least", *operands)
    else:
        flow.add(name, "sum", *operands)


# ---- compiling -----------------------------------------------------------------------------------------------------


def atomics(assembly: str) -> list[str]:
    """Atomic operations in PTX or in Triton's IR."""
    return sorted(set(re.findall(r"(?<![\w.])(?:atom|red)\.[\w.:]+|\btt\.atomic_\w+", assembly)))


def unfenced(ptx: str) -> bool:
    """Whether a loop copies by a descriptor into shared memory and stores there itself, and no proxy fence is in it."""
    lines = ptx.splitlines()
    labels = {line.partition(":")[0].strip(): i for i, line in enumerate(lines) if re.match(r"\s*\$\w+:", line)}
    for end, line in enumerate(lines):
        to = re.search(r"\bbra(?:\.uni)?\s+(\$\w+)", line)
        start = labels.get(to[1], end) if to else end
        body = "\n".join(lines[start:end])
        stores = re.search(r"\bst(matrix\S*|\S*)\.shared", body)
        if stores and "cp.async.bulk.tensor" in body and "fence.proxy.async" not in body:
            return True
    return False


def layouts(text: str) -> tuple[str, ...]:
    """Types of what is summed in Triton's GPU IR, names of layouts replaced by what they stand for."""
    names = dict(re.findall(r"^(#\w+) = (.*)$", text, re.M))
    summed = re.findall(r"tt\.reduce\.return[^\n]*\n\s*\}\) : \(([^\n]*?)\) ->", text)
    summed += re.findall(r"(?:tt\.dot|warp_group_dot|tc_gen5_mma) [^\n]* -> (tensor<[^\n]*>)", text)

    def spelled(layout: str) -> str:
        return re.sub(r"#\w+(?![\w.])", lambda name: spelled(names.get(name[0], "?")), layout)

    return tuple(map(spelled, summed))


# ---- machine code of NVIDIA ----------------------------------------------------------------------------------------

WIDTHS = {"8": 1, "16": 2, "": 4, "64": 8, "128": 16}  # bytes of a load or a store, by its suffix
PRODUCT = r"\w*MMA|FFMA"
GLOBAL, LOCAL = ("LDG", "STG", "LDGSTS"), ("LDL", "STL")


class Instruction(NamedTuple):
    at: int  # its address
    guard: str  # the predicate under which it runs
    opcode: str
    operands: str

    def kind(self) -> str:
        return self.opcode.partition(".")[0]

    def width(self) -> int:
        """Bytes that a thread loads or stores by it."""
        return WIDTHS[next(iter(re.findall(r"\.[US]?(8|16|64|128)\b", self.opcode)), "")]

    def hands_over(self) -> bool:
        """Whether it stores zero to local memory."""
        return self.kind() == "STL" and bool(re.search(r", *RZ\b", self.operands))

    def target(self) -> int | None:
        to = re.search(r"\b0x([0-9a-f]+)", self.operands)
        return int(to[1], 16) if self.kind() == "BRA" and to else None


Loop = tuple[int, int]  # places of its first and its last instruction in the code


def instructions(listing: str) -> list[Instruction]:
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?\w+) )?\s*([A-Z][\w.]*)([^;]*);", listing)
    return [Instruction(int(at, 16), *rest) for at, *rest in found if rest[1] != "NOP"]


def loops(code: list[Instruction]) -> list[Loop]:
    ends = max((i for i, one in enumerate(code) if one.kind() == "EXIT"), default=len(code))
    place = {one.at: i for i, one in enumerate(code)}
    found = {}
    for i, one in enumerate(code[:ends]):  # behind it waits that took long, which jump back to where they were
        if (to := one.target()) is not None and to <= one.at:
            found[place[to]] = i
    return list(found.items())


def product_loops(code: list[Instruction]) -> list[Loop]:
    """The innermost ones that multiply."""
    multiplies = [(a, b) for a, b in loops(code) if any(re.match(PRODUCT, one.opcode) for one in code[a : b + 1])]
    return [(a, b) for a, b in multiplies if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in multiplies)]


def spills(listing: str) -> tuple[int, int]:
    """Bytes that NVIDIA's machine code stores to and loads from local memory: all, and those in loops of products.

    A zero that is stored there was in no register: it is the argument of a call. Triton 3.6 copies by descriptors to an
    address in a cluster, and ptxas for sm_120 adds a call for those of another block, of which there are none.
    """
    code = instructions(listing)
    moved = [(i, one.width()) for i, one in enumerate(code) if one.kind() in LOCAL and not one.hands_over()]
    inner = product_loops(code)
    return sum(width for _, width in moved), sum(width for i, width in moved if any(a <= i <= b for a, b in inner))


def shortest(code: list[Instruction], start: int) -> dict[int, int]:
    """How many instructions run at least from one place to each that can be reached, that one's own not counted."""
    place, far, ahead = {one.at: i for i, one in enumerate(code)}, {start: 0}, [(0, start)]
    while ahead:
        steps, i = heapq.heappop(ahead)
        one, to = code[i], code[i].target()
        perhaps = bool(one.guard) or bool(re.match(r"\s*!?U?P\d", one.operands)) or ".ANY" in one.opcode
        follow = [] if one.kind() == "EXIT" and not perhaps else [i + 1]
        if to is not None:
            follow = [place[to], *(follow if perhaps else [])]
        for j in follow:
            if j < len(code) and steps + 1 < far.get(j, steps + 2):
                far[j] = steps + 1
                heapq.heappush(ahead, (steps + 1, j))
    return far


def beside_products(code: list[Instruction]) -> int:
    """Instructions that a tile takes at least outside of its loop of products, whose one round is not counted."""
    start, end = max(product_loops(code), key=lambda loop: loop[1] - loop[0])
    behind = shortest(code, end + 1)
    if start in behind:  # persistent: from one tile to the next
        return behind[start]
    return shortest(code, 0)[start] + min(
        behind[i] for i, one in enumerate(code) if one.kind() == "EXIT" and i in behind
    )


def an_element(code: list[Instruction], pace: Pace, elements: float) -> tuple[float, float | None]:
    """Instructions a thread and element: as Pace says, and of a tile all that is written down."""
    if not pace.size:
        inside = sum(b - a + 1 for a, b in product_loops(code))
        return beside_products(code) / elements, (len(code) - inside) / elements
    costs = []
    for a, b in loops(code):
        loaded = sum(one.width() for one in code[a : b + 1] if one.kind() == "LDG")
        if loaded:
            costs.append((b - a + 1) / (loaded / pace.size))
    return (max if pace.branches else sum)(costs), None


def too_slow(case: Case, target: Target, code: list[Instruction], pace: float | None, registers: int) -> list[str]:
    """Rules about speed that a Triton case breaks."""
    broken, limit = [], case.pace
    if pace is not None and pace > limit.instructions:
        broken.append(f"instructions: {pace:.1f} an element, allowed {limit.instructions}")
    if pace is not None and registers > limit.registers:
        broken.append(f"registers: {registers}, allowed {limit.registers}")
    if not case.wide:
        return broken
    if limit is not None and not limit.size:  # a tile's E has a loop of its own in no kernel
        narrow = [one.opcode for one in code if one.kind() in GLOBAL and one.width() < 4]
        broken += [f"widths: {len(narrow)} x {narrow[0]}"] if narrow else []
    inner = [(a, b) for a, b in product_loops(code) if any("MMA" in one.kind() for one in code[a : b + 1])]
    for a, b in loops(code):
        least = 8 if (a, b) in inner else 4
        if any((a, b) != (c, d) and a <= c and d <= b for c, d in inner):
            continue
        narrow = [one.opcode for one in code[a : b + 1] if one.kind() in GLOBAL and one.width() < least]
        if narrow:
            broken.append(f"widths: {len(narrow)} x {narrow[0]} in a loop")
    everything = {one.kind() for one in code}
    if inner and not everything & {"LDGSTS", "UTMALDG"}:
        broken.append("pipelined: no copy runs beside the products")
    if target.name == "sm_90" and inner and "HMMA" in everything:
        broken.append("wgmma: products by single warps")
    return broken


def blocks_of(registers: int, shared: int, warps: int) -> int:
    """Blocks that fit a multiprocessor of sm_90."""
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    return min(32, 64 // warps, by_registers, 228 * 1024 // (shared + 1024))


def disassembled(cubin: bytes) -> str:
    """Resources and machine code of one kernel, by Triton's own cuobjdump."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def ptxas(exe: Path | str, ptx: str, arch: str) -> dict[str, tuple[int, int, int]]:
    """Registers, spilled bytes and static shared memory of each kernel in a PTX text."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [exe, "-v", "--gpu-name", arch, file.name, "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    kernels = {}
    for name, text in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", log, re.S):
        shared = re.search(r"(\d+) bytes smem", text)
        spill = sum(map(int, re.findall(r"(\d+) bytes spill", text)))
        kernels[name] = int(re.search(r"Used (\d+) registers", text)[1]), spill, int(shared[1]) if shared else 0
    return kernels


def compile_case(case: Case, target: Target) -> Row:
    """One Triton case for one GPU, against every rule."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    aligned = [name for name, kind in case.signature.items() if kind.startswith("*") or name in case.aligned]
    source = ASTSource(
        fn=case.kernel,
        signature={name: "constexpr" if name in case.constexprs else case.signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name not in case.constexprs},
    )
    gpu = GPUTarget(target.backend, target.arch, target.warp)
    in_products, blocks, pace, slow = 0, None, (None, None), []
    try:
        compiled = triton.compile(source, target=gpu, options=case.options)
        if target.backend == "hip":
            counts = {
                name: int(re.search(rf"\.{name}: +(\d+)", compiled.asm["amdgcn"])[1])
                for name in ("vgpr_count", "vgpr_spill_count")  # scalar ones spill to vector registers, not to memory
            }
            registers, spill = counts["vgpr_count"], counts["vgpr_spill_count"]
        else:
            listing = disassembled(compiled.asm["cubin"])
            registers = int(re.search(r"REG:(\d+)", listing)[1])
            spill, in_products = spills(listing)
            code = instructions(listing)
            if target.name == "sm_90":
                blocks = blocks_of(registers, compiled.metadata.shared, case.options["num_warps"])
                if case.pace:
                    c, threads = case.constexprs, 32 * case.options["num_warps"]
                    pace = an_element(code, case.pace, c.get("BLOCK_M", 0) * c.get("BLOCK_N", 0) / threads)
            slow = too_slow(case, target, code, pace[0], registers)
    except Exception as error:
        return Row(case.name, target.name, broken=(f"compiles: {type(error).__name__}: {_line(str(error))}",))
    row = Row(case.name, target.name, registers, spill, compiled.metadata.shared, blocks, *pace, same=case.same)
    row = row._replace(broken=tuple(slow))
    row = row._replace(sums=layouts(compiled.asm["ttgir"])) if case.same else row
    ir = compiled.asm["ttir"]
    rounded = sorted(set(re.findall(r"inputPrecision = (?!ieee)(\w+)", ir)))
    row = row._replace(broken=(*row.broken, f"precision: {', '.join(rounded)}")) if rounded else row
    if unfenced(compiled.asm.get("ptx", "")):
        row = row._replace(broken=(*row.broken, "fences: none between copies by descriptors and stores"))
    if in_products:
        row = row._replace(broken=(*row.broken, f"spills: {in_products} in a loop of products"))
    return judge(row, case.spill + in_products, target, atomics(ir + compiled.asm.get("ptx", "")), ttir_products(ir))


def compile_cuda(file: Path, arch: str) -> list[Row]:
    """One .cu file for one GPU by nvcc and its ptxas: a row for each kernel."""
    target = next(target for target in TARGETS if target.name == CUDA_ARCHS[arch])
    nvcc = shutil.which("nvcc")
    include = [f"-I{ROOT}/csrc", f"-I{ROOT}/kernels/cuda"]
    with tempfile.NamedTemporaryFile(suffix=".ptx") as out:
        command = [nvcc, "-std=c++17", "-O3", "-ptx", f"-arch=compute_{arch}", *include, str(file), "-o", out.name]
        try:
            subprocess.run(command, capture_output=True, text=True, check=True)
            ptx = Path(out.name).read_text()
            kernels = ptxas(shutil.which("ptxas"), ptx, f"sm_{arch}")
        except subprocess.CalledProcessError as error:
            return [Row(file.name, target.name, broken=(f"compiles: {_line(error.stderr)}",))]
    rows = []
    functions = dict(re.findall(r"\.entry (\w+)(.*?)(?=\.entry |\Z)", ptx, re.S))
    for name, (registers, spill, shared) in kernels.items():
        row = Row(f"{file.name} {_plain(name)}", target.name, registers, spill, shared)
        rows.append(judge(row, 0, target, atomics(functions[name]), ptx_products(functions[name])))
    return rows


def _line(message: str) -> str:
    return " ".join(message.split())[:200]


def _plain(mangled: str) -> str:
    """`kernel<types>` out of a mangled name; the mangled name where binutils are missing."""
    if not shutil.which("c++filt"):
        return mangled
    full = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    return re.search(r"(\w+(?:<[^(]*>)?)\((?!anonymous)|\Z", full)[1] or mangled


def judge(row: Row, spill: int, target: Target, atomic: list[str], products: list[str]) -> Row:
    """The row with the rules it breaks."""
    broken = [*row.broken]
    if row.spill > spill:
        broken.append(f"spills: {row.spill}, allowed {spill}")
    if row.shared > target.shared:
        broken.append(f"shared: {row.shared} bytes, {target.name} has {target.shared}")
    if atomic:
        broken.append(f"atomics: {', '.join(atomic)}")
    if products:
        broken.append(f"addresses: {products[0]}" + (f" and {len(products) - 1} more" if len(products) > 1 else ""))
    return row._replace(broken=tuple(broken))


# ---- the table -----------------------------------------------------------------------------------------------------


def check(triton_cases: list[Case], cuda_files: list[Path]) -> Iterator[Row]:
    """All rows in their order, each as soon as it is there, compiled in as many processes as there are cores."""
    targets = {target.name: target for target in TARGETS}
    work = [(compile_cuda, (file, arch)) for file in cuda_files for arch in CUDA_ARCHS]
    work += [(compile_case, (case, targets[name])) for case in triton_cases for name in case.targets]
    _work[:] = work  # a kernel does not pickle: the processes inherit it
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        first = {}
        for result in pool.imap(_run, range(len(work))):
            for row in result if isinstance(result, list) else [result]:
                known = first.setdefault((row.same, row.target), row)
                if known.sums != row.sums:
                    row = row._replace(broken=(*row.broken, f"invariance: its sums are not those of {known.case}"))
                yield row


_work: list = []


def _run(number: int):
    function, arguments = _work[number]
    return function(*arguments)


COMPARED = ("registers", "blocks", "spill", "shared", "instructions", "whole")


def saved(rows: list[Row]) -> list[dict]:
    import triton

    common = {"triton": triton.__version__}
    return [{**common, **row._asdict(), "sums": None, "broken": list(row.broken)} for row in rows]


def comparison(before: list[dict], after: list[dict]) -> str:
    """Rows of two runs side by side, "before -> after" where they differ; a case that was not there has no before."""
    known = {(row["case"], row["target"]): row for row in before}
    heads = ("kernel", "GPU", "registers", "blocks an SM", "bytes spilled", "shared", "an element", "all of a tile")
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]

    def spelled(number) -> str:
        return "-" if number is None else f"{number:.1f}" if isinstance(number, float) else str(number)

    for row in after:
        old = known.get((row["case"], row["target"]), {})
        cells = [row["case"], row["target"]]
        for name in COMPARED:
            pair = [spelled(one.get(name)) for one in (old, row)]
            cells.append(pair[1] if pair[0] in (pair[1], "-") else " -> ".join(pair))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="more dtypes and options of the fused head")
    parser.add_argument("--kernels", type=Path, help="a Python file with a function cases()")
    parser.add_argument("--cuda", type=Path, nargs="+", help=".cu files")
    parser.add_argument("--json", type=Path, help="where the rows go")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"), help="two such files as a table")
    options = parser.parse_args()
    if options.compare:
        print(comparison(*(json.loads(path.read_text()) for path in options.compare)))
        return 0
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels do not compile
    start = time.monotonic()
    everything = options.kernels is None and options.cuda is None
    found = (
        runpy.run_path(str(options.kernels))["cases"]()
        if options.kernels
        else cases(options.full)
        if everything
        else []
    )
    files = sorted((ROOT / "csrc/cuda").glob("*.cu")) if everything else options.cuda or []
    if files and not (shutil.which("nvcc") and shutil.which("ptxas")):
        print(f"no nvcc here: {len(files)} .cu files are not compiled")
        files = []
    width = max((len(case.name) for case in found), default=40)
    if found:
        import triton

        print(f"Triton {triton.__version__}")
    heads = ("registers", "spill", "shared", "blocks", "an element", "whole")
    print(f"{'kernel':{width}} {'GPU':7}", *(f"{head:>{len(head) + 1}}" for head in heads), flush=True)
    rows = []
    for row in check(found, files):
        rows.append(row)
        numbers = (row.registers, row.spill, row.shared, row.blocks, row.instructions, row.whole)
        spelled = ("-" if n is None else f"{n:.1f}" if isinstance(n, float) else n for n in numbers)
        print(
            f"{row.case:{width}} {row.target:7}",
            *(f"{number:>{len(head) + 1}}" for number, head in zip(spelled, heads, strict=True)),
            *(f"\n    BROKEN {rule}" for rule in row.broken),
            flush=True,
        )
    broken = sum(bool(row.broken) for row in rows)
    if options.json:
        options.json.write_text("[\n" + ",\n".join(map(json.dumps, saved(rows))) + "\n]\n")
    print(f"{len(rows)} compiled in {time.monotonic() - start:.0f} s, {broken} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    # cases() of another file says `from compile_gate import Case`: this module, not a second one
    sys.modules["compile_gate"] = sys.modules["__main__"]
    sys.exit(main())

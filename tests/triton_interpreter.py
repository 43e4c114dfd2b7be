"""Makes bfloat16, and the larger of a number and a NaN, right in Triton's interpreter, for machines without a GPU.

The interpreter holds bfloat16 as uint16 bits: it truncates where a GPU rounds to nearest even, and computes on the bits
as on integers. With install() conversions to and from float32 and the operands of tl.dot are right, bits are moved as
before, and whatever else meets a bfloat16 raises. tl.maximum drops a NaN as a GPU does. Triton 3.6 to 3.9.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

CONVERTS = {"create_fp_ext", "create_fp_trunc", "create_fp_to_fp", "create_dot"}
MOVES = {
    *("create_load", "create_masked_load", "create_tensor_pointer_load", "create_descriptor_load"),
    *("create_store", "create_masked_store", "create_tensor_pointer_store", "create_descriptor_store"),
    *("create_descriptor_gather", "create_descriptor_scatter", "create_gather", "create_bitcast", "create_select"),
    *("create_splat", "create_unsplat", "create_broadcast", "create_expand_dims", "create_reshape", "create_trans"),
    *("create_cat", "create_join", "create_split", "create_print"),
}


def install() -> None:
    """Patch the interpreter of this process, once."""
    if getattr(InterpreterBuilder, "bfloat16_is_right", False):
        return
    InterpreterBuilder.bfloat16_is_right = True
    InterpreterBuilder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    for name, method in list(vars(InterpreterBuilder).items()):
        if name.startswith("create_") and name not in MOVES | CONVERTS:
            setattr(InterpreterBuilder, name, _refusing(name, method))
    InterpreterBuilder.cast_impl = _converting(InterpreterBuilder.cast_impl)
    InterpreterBuilder.create_fp_to_fp = _converting(InterpreterBuilder.create_fp_to_fp)
    InterpreterBuilder.create_dot = _widening(InterpreterBuilder.create_dot)
    for ops in (interpreter.ReduceOps, interpreter.ScanOps):
        ops.apply = _refusing(ops.__name__, ops.apply)


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits to float32: exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits, to nearest, ties to even; a NaN stays one."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (u + (0x7FFF + ((u >> 16) & 1))) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def _is_bf16(x) -> bool:
    handle = getattr(x, "handle", x)
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _refusing(name, method):
    def checked(self, *args, **kwargs):
        flat = [x for arg in args for x in (arg if isinstance(arg, tuple) else (arg,))]
        if any(map(_is_bf16, flat)):
            raise TypeError(f"{name} got a bfloat16, which Triton's interpreter computes as an integer: widen it first")
        return method(self, *args, **kwargs)

    return checked


def _converting(method):
    def convert(self, src, dst_type, *rest):
        source, target = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 not in (source, target) or source == target:
            return method(self, src, dst_type, *rest)
        if source == tl.bfloat16 and target == tl.float32:
            return TensorHandle(widen(src.data), target)
        if source == tl.float32 and target == tl.bfloat16:
            return TensorHandle(narrow(src.data), target)
        raise TypeError(f"bfloat16 converts to and from float32 only, got {source} to {target}")

    return convert


def _widening(method):
    def dot(self, a, b, *rest):
        a, b = (TensorHandle(widen(x.data), tl.float32) if _is_bf16(x) else x for x in (a, b))
        return method(self, a, b, *rest)

    return dot

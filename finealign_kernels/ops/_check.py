"""Checks of arguments. Every error names the argument, what is expected and what was found."""

import os
import secrets
from collections.abc import Iterable
from difflib import get_close_matches

import numpy as np
import torch
from torch import Tensor

from ..formulas.logprobs import BAD, SKIP
from ._adapter import ADVICE, has_adapter
from ._once import is_transformed, refuse_transforms

LARGEST, SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny  # of the numbers that float32 holds
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FLAGS = (torch.bool, torch.int64, torch.int32, torch.uint8)  # of a mask; integers in it are 0 and 1
PLAIN = (Tensor, torch.nn.Parameter)
PACKED = ("quant_state", "SCB")  # what a tensor of bitsandbytes, of 4 or 8 bits, is unpacked by
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

# rows with a wrong label, counted on a device whose values are not read on the host, for each size of a vocabulary
_words: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}  # a count (1,), and where it is: [0]
_captured: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}  # first made in a capture: a count, and MARK (1,)
MARK = secrets.randbits(62)  # of this process: memory that nobody wrote to does not hold it


def fail(name: str, expected: str, got: object, kind: type[Exception] = ValueError):
    raise kind(f"{name} must {expected}, got {got}")


def nearest(name: object, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the known name that is spelled most like it, or nothing."""
    near = get_close_matches(str(name), list(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def check_tensor(
    name: str, x: object, *, dtypes=FLOATS, shape=None, like: Tensor | None = None, transforms: bool = False
) -> None:
    """transforms: whether x may be a tensor of a torch.func transform."""
    if not isinstance(x, Tensor):
        fail(name, "be a tensor", _describe(x), TypeError)
    check_plain(name, x, transforms)
    if x.dtype not in dtypes:
        fail(name, f"have dtype {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}", x.dtype, TypeError)
    if shape is not None and tuple(x.shape) != tuple(shape):
        fail(name, f"have shape {tuple(shape)}", tuple(x.shape))
    if like is not None and x.device != like.device:
        fail(name, f"be on {like.device}", x.device)


def is_plain(x: object) -> bool:
    return type(x) in PLAIN and x.layout is torch.strided and not x.is_nested and not is_transformed(x)


def check_plain(name: str, x: object, transforms: bool = False) -> None:
    """Refuses tensors whose values are elsewhere or in another form: DTensor, quantized, nested, sparse ones, and those
    of torch.func's transforms. What is no tensor passes."""
    if not isinstance(x, Tensor) or is_plain(x):
        return
    if not transforms:
        refuse_transforms(name, x)
    if hasattr(x, "placements") and hasattr(x, "full_tensor"):
        expected = "be a plain tensor: its full_tensor(), or its to_local() where a rank has its own rows"
        fail(name, expected, f"a {type(x).__name__}", TypeError)
    if hasattr(type(x), "__tensor_flatten__"):
        fail(name, "be a plain tensor", f"a {type(x).__name__}", TypeError)
    if x.layout is not torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else f"a tensor of layout {x.layout}"
        fail(name, "be a dense tensor", kind, TypeError)


def number(value: object) -> int | float | None:
    """A number as Python's, also NumPy's (a scalar, an array without dimensions); None for anything else."""
    if type(value) is float or type(value) is int:
        return value
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, (float, np.floating)) else None


def check_integer(name: str, value: object, expected: str, least: int | None = None) -> int:
    """An integer that int64 holds. `expected` completes the error message."""
    found = number(value)
    if not isinstance(found, int) or (least is not None and found < least) or abs(found) >= 2**63:
        fail(name, expected, _describe(value))
    return found


def check_number(name: str, value: object, positive: bool = False, *, above=None, least=None, most=None) -> int | float:
    """A finite number in a range: value > above (0 with positive), value >= least, value <= most; as Python's.

    float32 must hold it too, since losses and logits are computed there: at most 3.4e38 in size, and at least 1.2e-38
    where it must be positive, so that neither it nor its inverse overflows or vanishes.
    """
    above = 0 if positive else above
    given, value = value, number(value)
    good = value is not None and abs(value) < float("inf")
    good = good and (above is None or value > above) and (least is None or value >= least)
    if good and (abs(value) > LARGEST or (above == 0 and value < SMALLEST)):
        fail(
            name,
            f"be a number that float32 holds, at most {LARGEST:.2g} and, if positive, at least {SMALLEST:.2g}",
            value,
        )
    if not good or (most is not None and value > most):
        bounds = [f"{word} {bound}" for word, bound in ((">", above), (">=", least), ("<=", most)) if bound is not None]
        fail(name, " ".join(["be a finite number", " and ".join(bounds)]).strip(), _describe(given))
    return value if abs(value) < 2**63 else float(value)  # torch takes no larger integers


def check_flags(name: str, x: object, *, shape=None, like: Tensor | None = None) -> Tensor:
    """A mask as bool. Integers must be 0 or 1: others raise an error on a CPU, and count as 1 on a GPU."""
    check_tensor(name, x, dtypes=FLAGS, shape=shape, like=like)
    return as_flags(name, x)


def as_flags(name: str, x: Tensor) -> Tensor:
    """check_flags of a tensor whose dtype is one of FLAGS."""
    if x.dtype == torch.bool:
        return x
    if reads_values(x) and x.numel():
        low, high = (int(bound) for bound in x.aminmax())
        if low < 0 or high > 1:
            fail(name, "hold 0 and 1 alone where it is no bool", low if low < 0 else high)
    return x != 0


def reads_values(x: Tensor) -> bool:
    """Whether values of x are checked: always on a CPU, elsewhere with FINEALIGN_DEBUG=1 only (it is a host sync)."""
    on_host = x.device.type == "cpu" or os.environ.get("FINEALIGN_DEBUG") == "1"
    return on_host and not torch.compiler.is_compiling()


def check_one_of(name: str, value: object, known: tuple) -> None:
    """A name, or one of None, False and True; 0 is not False."""
    if not any(value is one or isinstance(value, str) and value == one for one in known):
        fail(name, f"be one of {known}", repr(value))


def check_callable(name: str, value: object) -> None:
    if value is not None and not callable(value):
        fail(name, "be a function or None", _describe(value), TypeError)


def check_bool(name: str, value: object) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        fail(name, "be True or False", _describe(value))
    return bool(value)


def check_head(name: str, x: object, empty: bool = False, transforms: bool = False) -> None:
    """The LM head as a plain, whole tensor; empty: or a rank's part of it, which may have no row."""
    if isinstance(x, torch.nn.Module):
        hint = f"; {ADVICE}" if has_adapter(x) or "lora" in type(x).__module__.lower() else ""
        fail(name, f"be the head's weight (V, D), not its module{hint}", type(x).__name__, TypeError)
    if isinstance(x, Tensor) and any(getattr(x, state, None) is not None for state in PACKED):
        fail(name, "hold the head's values (V, D), not packed ones: dequantize it", f"a packed {_kind(x)}", TypeError)
    if hasattr(x, "placements") and hasattr(x, "full_tensor"):
        fail(name, "be a whole tensor (gather it: full_tensor(grad_placements=[Partial('avg')]))", "a sharded DTensor")
    check_tensor(name, x, transforms=transforms)
    if x.device.type == "meta":
        fail(name, "hold values", "a meta tensor")
    if x.dim() != 2 or (x.numel() == 0 and not (empty and x.shape[1])):
        hint = ": a ZeRO-3 shard? gather it first" if x.numel() == 0 else ""
        fail(name, "have shape (V, D), not empty", f"{tuple(x.shape)}{hint}")


def check_head_options(temperature, softcap, logit_scale) -> None:
    if not isinstance(temperature, Tensor) or temperature.dim() == 0:
        check_number("temperature", temperature, positive=True)
    if softcap is not None:
        check_number("softcap", softcap, positive=True)
    check_number("logit_scale", logit_scale)


def inverse_temperature(temperature: float | Tensor, labels: Tensor, dtype: torch.dtype, backend: str):
    """1 / temperature: a float, or (N,) of dtype for one number a row, which the torch backends take."""
    if not isinstance(temperature, Tensor) or temperature.dim() == 0:
        return 1.0 / float(temperature)
    check_tensor("temperature", temperature, shape=labels.shape, like=labels)
    if backend not in ("auto", "torch", "reference"):
        fail("temperature", f"be one number with backend {backend!r}; 'auto' and 'torch' take one a row", "a tensor")
    flat = temperature.detach().reshape(-1).to(dtype)
    if reads_values(flat) and not bool(((flat > 0) & flat.isfinite()).all()):
        fail("temperature", "be finite and > 0 in every row", "one that is not")
    return 1 / flat


def check_support(
    support: Tensor | None, labels: Tensor, target: Tensor, logit_scale: float, vocab: int, defer: bool
) -> tuple[Tensor | None, Tensor]:
    """(N, K) or None, and targets (N,) with BAD for a label that is not in its row's support.

    As labels are, they are checked at once on a CPU, where a wrong one raises IndexError; elsewhere its row is NaN.
    """
    if support is None:
        return None, target
    check_tensor("support", support, dtypes=(torch.int64, torch.int32), like=labels)
    if support.dim() != labels.dim() + 1 or support.shape[:-1] != labels.shape:
        fail("support", f"have shape {(*labels.shape, 'K')}, as labels has {tuple(labels.shape)}", tuple(support.shape))
    if number(logit_scale) <= 0:
        fail("logit_scale", "be > 0 with a support", logit_scale)
    ids = support.reshape(target.shape[0], support.shape[-1])
    lost = (target >= 0) & (ids != target[:, None]).all(-1)
    at_once = os.environ.get("FINEALIGN_DEBUG") == "1" or (labels.device.type == "cpu" and not defer)
    if at_once and not torch.compiler.is_compiling():
        read = target != SKIP
        if bool((wrong := read & (ids >= vocab).any(-1)).any()):
            n = int(wrong.nonzero()[0])
            raise IndexError(f"support must hold ids below {vocab}, got {int(ids[n].max())} in row {n}")
        if bool(lost.any()):
            n = int(lost.nonzero()[0])
            raise IndexError(f"support must hold the label of its row, got row {n} without its label {int(target[n])}")
    return ids, torch.where(lost, BAD, target)


def check_outputs(outputs: object) -> tuple[str, ...]:
    """Names of outputs; a single name may be a plain string."""
    several = isinstance(outputs, Iterable) and not isinstance(outputs, (str, Tensor))
    names = tuple(outputs) if several else (outputs,)
    for name in names:
        if not isinstance(name, str) or name not in OUTPUTS:
            fail("outputs", f"be a tuple of names out of {OUTPUTS}", repr(name))
    return names


def targets(labels: Tensor, mask: Tensor | None, ignore_index: int, vocab: int, defer: bool) -> Tensor:
    """(N,) int64: the label of a row that is read, SKIP for one that is not, BAD for one out of range.

    Values on a CPU are checked at once and raise IndexError. On another device (or with defer) the row becomes BAD, its
    outputs NaN, and an error word is set that check_errors() reads; FINEALIGN_DEBUG=1 checks at once everywhere.
    """
    flat = labels.reshape(-1).long()
    read = flat != check_integer("ignore_index", ignore_index, "be an integer")
    if mask is not None:
        read = read & mask.reshape(-1)
    outside = flat != flat.clamp(0, vocab - 1)
    at_once = os.environ.get("FINEALIGN_DEBUG") == "1" or (labels.device.type == "cpu" and not defer)
    if at_once and not torch.compiler.is_compiling() and bool((wrong := read & outside).any()):
        n = int(wrong.nonzero()[0])
        at = ", ".join(str(int(i)) for i in torch.unravel_index(torch.tensor(n), labels.shape))
        raise IndexError(f"labels[{at}] = {int(flat[n])} is outside [0, {vocab})")
    return torch.where(read, torch.where(outside, BAD, flat), SKIP)


def capturing(x: Tensor) -> bool:
    """Whether calls on x are recorded into a CUDA graph: the host may read nothing then."""
    return x.device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def note_errors(target: Tensor, vocab: int) -> None:
    """Adds the number of rows whose label is out of range to the device's error word, without reading it. The addition
    is atomic, so several streams lose no count.

    A word that is set to 0 while a graph is captured would be set to 0 by each replay, and earlier counts be lost. So a
    capture does not initialise the word: it counts as 0 until MARK is written beside it.
    """
    key = target.device, vocab
    captured = key not in _words and capturing(target)
    words, make = (_captured, torch.empty) if captured else (_words, torch.zeros)
    if key not in words:
        with torch.inference_mode(False):  # one made in inference mode could not be written outside of it
            words[key] = make(2, 1, dtype=torch.int64, device=target.device).unbind()
    word, at = words[key]
    if captured:
        word.mul_(at == MARK)
        at.fill_(MARK)
        at = torch.zeros_like(at)
    word.index_add_(0, at, (target == BAD).sum()[None])


def check_errors() -> None:
    """Raises IndexError if a label was out of range since the last call, on any device, replays of graphs included.
    It is a host sync."""
    words = [(key, word) for key, (word, _) in _words.items()]
    words += [(key, word) for key, (word, mark) in _captured.items() if int(mark) == MARK]
    for (device, vocab), word in words:
        count = int(word)
        if count:
            word.zero_()
            where = f"outside [0, {vocab}), or of the support of their rows"
            raise IndexError(f"{count} labels on {device} were {where}; those rows are NaN")


def _kind(x: Tensor) -> str:
    return f"{type(x).__name__} {tuple(x.shape)} stored as {str(x.dtype).removeprefix('torch.')}"


def _describe(x: object) -> str:
    return repr(x) if isinstance(x, (int, float, str, type(None), bool)) else f"a {type(x).__name__}"

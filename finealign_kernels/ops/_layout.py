"""Layouts of a batch of tokens: padded, flat, or a pair of padded ones. Kernels see flat tokens only."""

import torch
from torch import Tensor

from . import _native
from ._check import FLAGS, FLOATS, as_flags, check_tensor, fail, is_plain, reads_values
from ._once import refuse_transforms
from ._warn import warn_once, warned

TokenTensor = Tensor | tuple[Tensor, Tensor]
INTEGERS = (torch.int32, torch.int64)
MANY = 4096  # from this number of bounds on the native check is faster
LOOKS = 64  # calls of each loss that look for mistakes in the values of its tokens; later calls save that time

_looks: dict[str, int] = {}  # calls of each loss so far


class Tokens:
    """A batch of S sequences and N tokens, sequence s at [cu_seqlens[s], cu_seqlens[s + 1]).

    Flat, or one padded batch as it was given: the flat view and cu_seqlens are then computed lazily.
    """

    def __init__(self, whole: Tensor, mask: Tensor | None, ends: Tensor | None, shapes: tuple[torch.Size, ...]):
        self.whole = whole  # (N,), or (B, T) where ends is None
        self.whole_mask = mask  # in the shape of whole, bool: True where a token is read
        self.ends = ends  # (S + 1,) int32 or int64, or None: the rows of whole are the sequences
        self.shapes = shapes  # as the caller has them: one, or two for a pair
        self._flat = self._flat_mask = self._cu_seqlens = None

    @property
    def x(self) -> Tensor:
        """(N,)."""
        if self._flat is None:
            self._flat = self.whole if self.whole.dim() == 1 else self.whole.reshape(-1)
        return self._flat

    @property
    def mask(self) -> Tensor | None:
        """(N,) bool."""
        if self._flat_mask is None and self.whole_mask is not None:
            self._flat_mask = self.whole_mask if self.whole_mask.dim() == 1 else self.whole_mask.reshape(-1)
        return self._flat_mask

    @property
    def cu_seqlens(self) -> Tensor:
        """(S + 1,)."""
        if self.ends is not None:
            return self.ends
        if self._cu_seqlens is None:
            self._cu_seqlens = padded_cu_seqlens(self.shapes, self.whole.device)
        return self._cu_seqlens

    @property
    def segments(self) -> int:
        return self.whole.shape[0] if self.ends is None else self.ends.shape[0] - 1

    def with_x(self, x: Tensor, mask: Tensor | None = None) -> "Tokens":
        """The same batch of other tokens (N,), and under another mask (N,) where one is given."""
        return Tokens(x, self.mask if mask is None else mask, self.cu_seqlens, self.shapes)

    def widened(self) -> "Tokens":
        """The same tokens in float32 where they are of half precision."""
        whole = self.whole.to(torch.promote_types(self.whole.dtype, torch.float32))
        return self if whole is self.whole else Tokens(whole, self.whole_mask, self.ends, self.shapes)


def flatten(
    x: TokenTensor, mask: TokenTensor | None = None, cu_seqlens: Tensor | None = None, *, name: str = "x"
) -> Tokens:
    """Tokens of (B, T); of (N,) with cu_seqlens; of a pair (B, T1), (B, T2), the first one's before the second's.

    mask has the shapes of x. Padding, which a mask takes out, stays where it is. Raises ValueError or TypeError.
    """
    parts = _parts(name, x)
    if cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens, dtypes=INTEGERS)
    for part in parts:
        check_tensor(name, part, dtypes=FLOATS, like=parts[0])
        refuse_transforms(name, part)
    if len(parts) > 1 and parts[0].dtype != parts[1].dtype:
        fail(name, "be a pair of one dtype", f"{parts[0].dtype} and {parts[1].dtype}", TypeError)
    shapes = tuple(part.shape for part in parts)
    if len(parts) > 1 and all(len(shape) == 2 for shape in shapes) and shapes[0][0] != shapes[1][0]:
        fail(name, "be a pair with as many rows each", f"{shapes[0][0]} and {shapes[1][0]} rows")
    if cu_seqlens is None:
        if any(len(shape) != 2 for shape in shapes):
            found = " and ".join(str(tuple(s)) for s in shapes)
            hint = ": a number a sequence, sums say, goes in as (B, 1), x[:, None]" if len(shapes[0]) == 1 else ""
            fail(name, "be (B, T) where cu_seqlens is not given", found + hint)
        whole = parts[0] if len(parts) == 1 else _cat([part.reshape(-1) for part in parts])
        ends = None if len(parts) == 1 else padded_cu_seqlens(shapes, whole.device)
    else:
        if len(parts) > 1 or len(shapes[0]) != 1:
            fail(name, "be flat (N,) where cu_seqlens is given", " and ".join(str(tuple(s)) for s in shapes))
        whole, ends = parts[0], cu_seqlens
        check_cu_seqlens(cu_seqlens, whole.shape[0], whole)
    tokens = Tokens(whole, None, ends, shapes)
    if mask is not None:
        tokens.whole_mask = as_flags("mask", whole_like(mask, tokens, "mask", FLAGS))
    return tokens


def warn_of_tokens(name: str, tokens: Tokens, token_weight: TokenTensor | None) -> None:
    """Warns once if the values of a loss's tokens look like a mistake; the first LOOKS calls of the loss `name` check.

    It warns of log-probs above 0, of rows that end in zeros without a mask, and of negative weights. tokens holds logp;
    token_weight is what the caller gave. A token_weight that is not valid is left to the loss, which refuses it.
    """
    if _looks.get(name, 0) >= LOOKS or not reads_values(tokens.whole) or not tokens.whole.numel():
        return
    _looks[name] = _looks.get(name, 0) + 1
    logp, mask = tokens.x.detach(), tokens.mask
    top = float((logp if mask is None else torch.where(mask, logp, -1)).max())
    if top > 0.01:
        said = f"{name}: logp has {top:.3g}; the logarithm of a probability is at most 0. Are these logits or rewards?"
        warn_once(f"{name} logp", said)
    if mask is None and tokens.ends is None and tokens.whole.shape[1] > 1:
        padded = int((tokens.whole.detach()[:, -2:] == 0).all(1).sum())
        if padded:
            rows = len(tokens.whole)
            said = f"{name}: {padded} of {rows} rows of logp end in zeros and there is no mask: are they padding?"
            warn_once(f"{name} mask", said)
    if token_weight is None:
        return
    parts = _parts("token_weight", token_weight)
    if any(not is_plain(part) or part.dtype not in FLOATS or part.device != logp.device for part in parts):
        return
    weight = _cat([part.detach().reshape(-1) for part in parts])
    if weight.shape == logp.shape:
        lowest = float((weight if mask is None else torch.where(mask, weight, 0)).min())
        if lowest < 0:
            said = f"{name}: token_weight has {lowest:.3g}; a negative weight reverses the loss of its token"
            warn_once(f"{name} token_weight", said)


def warn_of_pairs(name: str, argument: str, weight: Tensor) -> None:
    """Warns once if a weight of the pairs (P,) of a loss `name` is negative."""
    about = f"{name} {argument}"
    if not reads_values(weight) or warned(about) or not weight.numel():
        return
    lowest = float(weight.detach().min())
    if lowest < 0:
        warn_once(about, f"{name}: {argument} has {lowest:.3g}; a negative weight reverses the loss of its pair")


def whole_like(y: TokenTensor, tokens: Tokens, name: str, dtypes=FLOATS) -> Tensor:
    """Another tensor of the same batch, of the same shapes, as tokens.whole is: (N,), or (B, T)."""
    whole = tokens.whole
    usual = is_plain(y) and y.shape == whole.shape and y.dtype in dtypes and y.device == whole.device
    return y if usual and len(tokens.shapes) == 1 else flatten_like(y, tokens, name, dtypes).view(whole.shape)


def flatten_like(y: TokenTensor, tokens: Tokens, name: str, dtypes=FLOATS) -> Tensor:
    """(N,): another tensor of the same batch, of the same shapes."""
    parts = _parts(name, y)
    if len(parts) != len(tokens.shapes):
        fail(name, "be a pair of tensors" if len(tokens.shapes) > 1 else "be one tensor", len(parts), TypeError)
    for part, shape in zip(parts, tokens.shapes, strict=True):
        check_tensor(name, part, dtypes=dtypes, shape=shape, like=tokens.x)
    return _cat([part if part.dim() == 1 else part.reshape(-1) for part in parts])


def unflatten(y: Tensor, shapes: tuple[torch.Size, ...]) -> TokenTensor:
    """(N,) -> the shapes that flatten was given."""
    if len(shapes) == 1:
        return y if len(shapes[0]) == 1 else y.view(*shapes[0])
    parts = y.split([shape.numel() for shape in shapes])
    parts = tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))
    return parts


def padded_cu_seqlens(shapes: tuple[torch.Size, ...], device: torch.device) -> Tensor:
    """(S + 1,) int64: every row of every (B, T) is a segment."""
    if len(shapes) == 1 and shapes[0][1] > 0:  # one launch for the usual case
        rows, width = shapes[0]
        return torch.arange(0, rows * width + 1, width, device=device)
    ends, total = [torch.zeros(1, dtype=torch.int64, device=device)], 0
    for rows, width in shapes:
        ends.append(torch.arange(1, rows + 1, device=device) * width + total)
        total += rows * width
    return torch.cat(ends)


def check_cu_seqlens(
    cu_seqlens: Tensor, total: int | None, like: Tensor, *, name: str = "cu_seqlens", of: str = "tokens"
) -> None:
    """Shape and dtype always; the values at once on a CPU, on a GPU only with FINEALIGN_DEBUG=1 (it is a host sync)."""
    check_tensor(name, cu_seqlens, dtypes=INTEGERS, like=like)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        fail(name, "have shape (S + 1,)", tuple(cu_seqlens.shape))
    if not reads_values(cu_seqlens) or (len(cu_seqlens) > MANY and _fits(cu_seqlens, total)):
        return
    ends = cu_seqlens.cpu().numpy()  # a tenth of what as many torch calls take
    if ends[0] != 0:
        fail(name, "start at 0", f"{name}[0] = {ends[0]}")
    falls = ends[1:] < ends[:-1]
    if falls.any():
        s = int(falls.argmax()) + 1
        fail(name, "not decrease", f"{name}[{s}] = {ends[s]} after {ends[s - 1]}")
    if total is not None and ends[-1] != total:
        fail(name, f"end at the number of {of} {total}", f"{name}[{len(ends) - 1}] = {ends[-1]}")


def _fits(cu_seqlens: Tensor, total: int | None) -> bool:
    """Whether the native check, on all threads, finds nothing wrong; False where there is no extension."""
    if total is None or cu_seqlens.device.type != "cpu" or not _native.available():
        return False
    return torch.ops.finealign._cu_seqlens_fit(cu_seqlens.contiguous(), total)


def _parts(name: str, x: TokenTensor) -> tuple[Tensor, ...]:
    if hasattr(x, "_fields"):  # a result handed over whole: AdaptiveMask as token_weight, LogProbs as logp
        if name in x._fields:
            return _parts(name, getattr(x, name))
        if len(x) != 2:
            fields = ", ".join(x._fields)
            fail(name, "be a tensor or a pair of them", f"{type(x).__name__} with the fields {fields}", TypeError)
    parts = tuple(x) if isinstance(x, (tuple, list)) else (x,)
    if len(parts) > 2 or not parts:
        fail(name, "be a tensor or a pair of them", f"{len(parts)} of them", TypeError)
    return parts


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)

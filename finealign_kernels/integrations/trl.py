"""TRL: `patch_kernels` replaces the chunked head of its trainers; trainers of our own take fine-grained feedback.

FineGrainedDPOTrainer      DPOTrainer with weights on tokens, pivots, and every preference loss
PointwiseTrainer           KTOTrainer for any loss of single responses: point-wise DPO, ULMA, KTO
FineGrainedGRPOTrainer     GRPOTrainer for rewards of segments, advantages of tokens, pivots
FineGrainedRewardTrainer   RewardTrainer for every loss of a reward model, numbers of pairs, contrast and MetaRM
"""

import functools
import inspect
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops._check import OUTPUTS, fail
from ..ops.logprobs import linear_logprobs
from ._versions import check_version
from ._zero3 import is_sharded, saved_as_shards

TRAINERS = {  # name -> module, imported at its first use: it imports TRL
    "FineGrainedDPOTrainer": "_trl_dpo",
    "FineGrainedRewardTrainer": "_trl_reward",
    "PointwiseTrainer": "_trl_pointwise",
    "FineGrainedGRPOTrainer": "_trl_grpo",
}
VERSIONS = ("1.16",)  # of TRL, that this adapter was written for and tested with
SEAM = "trl.trainer.utils._ChunkedLogProbFunction"
TAKES = (  # what its forward is called with, by position
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)

WEIGHTED = ("token_weight", "token_weights", "spans")  # how columns end that hold weights of tokens
INSTEAD = {"DPO": "FineGrainedDPOTrainer", "KTO": "PointwiseTrainer"}


class Elsewhere:
    """Replaces DTensor in TRL's module, so that linear_logprobs gets heads of FSDP2 as they are. It gathers them, and
    their gradient is the mean over ranks. TRL's full_tensor() leaves each rank with the gradient of its own rows."""


_patches: list["Patch"] = []  # those in force; the last one serves
_stock: list[type] = []  # TRL's own function and its DTensor, while there are patches
_loaders: list = []  # Trainer.get_train_dataloader, the stock one and ours, while there are patches
_warned: set[tuple[str, str]] = set()  # trainer, column


def __getattr__(name: str):
    if name in TRAINERS:
        check_trl(name)
        return getattr(import_module(f".{TRAINERS[name]}", __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Outputs(NamedTuple):
    """What TRL unpacks, (N,) float32 each; None where it was not asked for. The first two carry gradients."""

    log_probs: Tensor
    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None
    mean_logits: Tensor | None
    is_top1: Tensor | None  # bool


def patch_kernels(*, workspace: str | int = "auto", backend: str = "auto") -> "Patch":
    """Puts `linear_logprobs` under TRL's SFT, DPO, KTO, GRPO, RLOO and AsyncGRPO trainers, in this process.

    They all score labels through one function, which is replaced. Trainers that exist already use the replacement, too.
    Loss, metrics and options stay TRL's. What differs: gradients of a head that autocast narrows are rounded to
    the narrow dtype once, as eager PyTorch's are; a label outside the vocabulary raises IndexError on a CPU.
    Heads of ZeRO-3 are gathered as TRL gathers them; those of FSDP2 with the mean of the ranks' gradients, also where
    the head is a unit of its own, whose gradient TRL 1.16 does not add up over ranks.

    workspace, backend   as in linear_logprobs; TRL's chunk_size has no meaning here

    A warning names, once, each column with token weights (`token_weight`, `rejected_spans`, ...) that a trainer drops:
    TRL's own trainers ignore them, FineGrainedDPOTrainer and PointwiseTrainer read them.

    Returns a handle: `with patch_kernels(): ...`, or handle.undo(). If it is called more than once, the most recent
    call wins. TRL's function is restored after all of them are undone, in any order.
    Raises  ImportError without TRL; RuntimeError naming version, or signature, for a TRL that is not known here.
    """
    utils = _known()
    if not _patches:
        _stock.extend([utils._ChunkedLogProbFunction, utils.DTensor])
        utils.DTensor = Elsewhere
        _watch_columns()
    patch = Patch(utils, workspace, backend)
    _patches.append(patch)
    utils._ChunkedLogProbFunction = patch
    return patch


class Patch:
    """An active patch: it replaces TRL's autograd function until undo() is called."""

    def __init__(self, utils, workspace: str | int, backend: str):
        self._utils, self._options = utils, {"workspace": workspace, "backend": backend}

    def undo(self) -> None:
        """Takes this patch away; a second time does nothing."""
        if self not in _patches:
            return
        _refuse_strangers(self._utils)
        _patches.remove(self)
        if not _patches:
            self._utils.DTensor = _stock.pop()
        self._utils._ChunkedLogProbFunction = _patches[-1] if _patches else _stock.pop()
        if not _patches:
            _stop_watching()

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_) -> None:
        self.undo()

    def apply(
        self,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D), whole: TRL has gathered it, for the forward; or FSDP2's shards
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,); on a CPU also the positions without a label, as 0: TRL zeroes their outputs
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Iterable[str] = OUTPUTS,
    ) -> Outputs:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        head = weight.to(dtype)
        with _regathered(self._utils, weight, bias, head):
            found = linear_logprobs(
                hidden.to(dtype),
                head,
                targets,
                bias=bias,
                temperature=temperature,
                softcap=final_logit_softcapping,
                logit_scale=logit_scale,
                outputs=[name for name in outputs if name != "log_probs"],
                **self._options,
            )
        entropy, squares, mean = (None if x is None else x.float() for x in found[2:5])
        mean = None if mean is None else mean.detach()  # a figure of TRL's logs
        return Outputs(found.logp.float(), entropy, squares, mean, found.is_top1)


def _regathered(utils, weight: Tensor, bias: Tensor | None, head: Tensor):
    """TRL holds a ZeRO-3 head gathered in forward only."""
    if not is_sharded(weight):
        return nullcontext()
    return saved_as_shards(utils.maybe_gather_lm_head_ctx, weight, bias, head)


def check_trl(who: str) -> None:
    """Raises ImportError where TRL cannot be imported, RuntimeError for a version that is not known here."""
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{who} needs TRL ({error}); pip install 'finealign-kernels[trl]'") from error
    check_version("trl", VERSIONS)


def _known():
    """trl.trainer.utils, if this is a TRL whose function can be replaced."""
    check_trl("patch_kernels")
    from trl.trainer import utils

    if _patches:
        _refuse_strangers(utils)
        return utils
    current = getattr(utils, "_ChunkedLogProbFunction", None)
    takes = tuple(inspect.signature(current.forward).parameters)[1:] if hasattr(current, "forward") else None
    if takes != TAKES:
        got = f"({', '.join(takes)})" if takes else repr(current)
        fail(SEAM, f"take ({', '.join(TAKES)})", got, RuntimeError)
    return utils


def _refuse_strangers(utils) -> None:
    found = utils._ChunkedLogProbFunction
    if found is not _patches[-1]:
        fail(SEAM, "be what patch_kernels put there last", repr(found), RuntimeError)


# ---- columns that are dropped --------------------------------------------------------------------------------------


def _watch_columns() -> None:
    """From now on a trainer that makes its training batches is asked for columns that do not get into them."""
    from transformers import Trainer

    stock = Trainer.get_train_dataloader

    @functools.wraps(stock)
    def get_train_dataloader(self, *args, **options):
        _warn_of_dropped(self)
        return stock(self, *args, **options)

    _loaders.extend((stock, get_train_dataloader))
    Trainer.get_train_dataloader = get_train_dataloader


def _stop_watching() -> None:
    from transformers import Trainer

    stock, ours = _loaders
    _loaders.clear()
    if Trainer.get_train_dataloader is ours:  # otherwise other code has replaced it since
        Trainer.get_train_dataloader = stock


def _warn_of_dropped(trainer) -> None:
    """Names weights of tokens that do not reach the loss: columns removed, or not read by TRL's collator."""
    columns = getattr(trainer.train_dataset, "column_names", None) or ()
    weighted = [c for c in columns if any(c == end or c.endswith(f"_{end}") for end in WEIGHTED)]
    if not weighted or getattr(trainer, "reads_weights", False):
        return
    if trainer.args.remove_unused_columns:
        trainer._set_signature_columns_if_needed()
        dropped = [c for c in weighted if c not in trainer._signature_columns]
    else:
        dropped = weighted if type(trainer.data_collator).__module__.startswith("trl.") else []
    name = type(trainer).__name__
    new = [c for c in dropped if (name, c) not in _warned]
    _warned.update((name, c) for c in new)
    if new:
        instead = next((ours for stock, ours in INSTEAD.items() if stock in name), None)
        advice = f"; {__name__}.{instead} reads such columns" if instead else ""
        message = f"{name} drops the column {' and '.join(new)} of its dataset: every token weighs 1{advice}"
        warnings.warn(message, stacklevel=3)

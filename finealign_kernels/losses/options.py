"""Keyword arguments that the short forms (`dpo`, `kto`, ...) pass on to `preference_loss` and `pointwise_loss`.

The typed dictionaries are for editors and type checkers, `short_form` is for `help` and `inspect.signature`. Adding an
argument to a long form means adding its line here, too; `tests/house/test_house.py` compares the two.
"""

import functools
import inspect
from collections.abc import Callable
from typing import TypedDict, TypeVar

from torch import Tensor

from ..ops._layout import TokenTensor

F = TypeVar("F", bound=Callable)


class SequenceOptions(TypedDict, total=False):
    """Arguments that losses of pairs and losses of single responses have in common."""

    mask: TokenTensor | None  # as logp, bool: True for the tokens that count
    cu_seqlens: Tensor | None  # (S + 1,) int32 or int64: where each sequence starts and ends in flat tokens
    token_weight: TokenTensor | None  # as logp, float: weight of each token, 1 where not given
    segment_ids: TokenTensor | None  # as logp, int: segment of each token, for average="segments"
    average: bool | str | None  # False, "kept", "all" or "segments"; None: as the loss is defined
    beta: float | None  # None: the default of the loss
    shift: float | Tensor | None  # subtracted from the margin, outside beta
    reduction: str  # "mean", "sum" or "none"; losses of single responses have "class_mean", too
    denominator: float | Tensor | None  # divides the sum in place of the number of items
    drop_empty: bool  # leave out items without a token


class PreferenceOptions(SequenceOptions, total=False):
    """Keyword arguments of `preference_loss`."""

    scale: float | None  # multiplies phi
    nll: str | None  # "sequence" or "token": how the NLL of the chosen responses is averaged
    nll_weight: float | None  # weight of that NLL
    nll_denominator: float | Tensor | None  # divides the sum of the NLL over tokens
    divergence: str  # "reverse_kl", "forward_kl", "js" or "alpha"
    alpha: float  # of the alpha-divergence
    pair_weight: Tensor | None  # (P,) float: weight of each pair
    pairs: str  # "halves" or "interleaved"


class PointwiseOptions(SequenceOptions, total=False):
    """Keyword arguments of `pointwise_loss` beside target."""

    positive_weight: float  # multiplies losses of responses with target 1
    other_weight: float  # multiplies losses of the other responses


def few_positions(function: F, fixed: tuple[str, ...] = (), of: Callable | None = None) -> F:
    """Decorator: four sums of responses in TRL's order are taken as two pairs; other arguments by position beyond those
    that there are raise an error that says how sums go in. So do keywords that the function sets itself, which the long
    form `of` takes."""
    taken = [p for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    names = [p.name for p in taken]

    @functools.wraps(function)
    def wrapped(*given, **options):
        if len(given) == len(names) + 2 and _are_sums(names, given[-4:], options):
            first, second = (Sums(x[:, None] for x in pair) for pair in (given[-4:-2], given[-2:]))
            given = (*given[:-4], first, second)
        if len(given) > len(names):
            raise TypeError(_too_many(function.__name__, names, len(given)))
        for name in fixed:
            if name in options:
                raise TypeError(_set_here(function, name, of))
        return function(*given, **options)

    return wrapped


class Sums(tuple):
    """A pair (P, 1) of log-probs of whole responses, chosen and rejected: no number of tokens is known."""


def _are_sums(names: list[str], given: tuple, options: dict) -> bool:
    """TRL's and OpenRLHF's order: chosen and rejected of the policy, then of the reference, (P,) each."""
    tokens = any(options.get(name) is not None for name in ("mask", "cu_seqlens", "token_weight", "segment_ids"))
    sums = all(isinstance(x, Tensor) and x.dim() == 1 and x.shape == given[0].shape for x in given)
    return names[-2:] == ["logp", "ref_logp"] and "target" not in options and sums and not tokens


def _set_here(function: Callable, name: str, of: Callable) -> str:
    kinds = inspect.signature(function).parameters.values()
    own = [p.name for p in kinds if p.kind is p.KEYWORD_ONLY]
    by = f", by {', '.join(own)}" if own else ""
    return f"{function.__name__} sets {name} itself{by}; {of.__name__} takes it"


def _too_many(name: str, names: list[str], count: int) -> str:
    """TRL's and OpenRLHF's order is four sums: chosen and rejected of the policy, then of the reference."""
    pairs = {"logp": "(chosen[:, None], rejected[:, None])", "ref_logp": "(ref_chosen[:, None], ref_rejected[:, None])"}
    text = f"{name} takes {', '.join(names)} by position, got {count} arguments"
    if "target" in names or name == "pointwise_loss":
        return text
    return f"{text}; sums of whole responses go in as pairs, {name}({', '.join(pairs.get(n, n) for n in names)})"


def short_form(of: Callable, *fixed: str) -> Callable[[F], F]:
    """Decorator that shows the keyword arguments of the long form `of` in the signature of a short form.

    The short form ends with **options and passes them on. `fixed` names the arguments that it sets itself.
    """

    def wrap(function: F) -> F:
        shown, function = inspect.signature(function), few_positions(function, fixed, of)
        own = [p for p in shown.parameters.values() if p.kind is not p.VAR_KEYWORD]
        hidden = {p.name for p in own}.union(fixed)
        passed = [p for p in inspect.signature(of).parameters.values() if p.kind is p.KEYWORD_ONLY]
        function.__signature__ = shown.replace(parameters=[*own, *(p for p in passed if p.name not in hidden)])
        return function

    return wrap

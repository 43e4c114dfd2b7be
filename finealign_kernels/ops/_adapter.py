"""Finds a head's adapter (LoRA): `weight` of its module is the base weight, whose log-probs are not the model's."""

import gc
import sys
import weakref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ._warn import warn_once, warned

ADVICE = "give LoRA's factors as adapter=, merge it, leave lm_head out of target_modules, or put it in modules_to_save"

_found = WeakIdKeyDictionary()  # parameter -> (requires_grad when it was looked for, the wrapper of its module or None)


def has_adapter(module: nn.Module) -> bool:
    """Whether a module is an adapter: it wraps another layer, as PEFT does, or has low-rank factors of its own."""
    names = [*module._modules, *module._parameters]
    return "base_layer" in module._modules or any(name.lower().startswith("lora") for name in names)


def check_adapter(weight: Tensor, trains: bool) -> None:
    """Refuses the base weight of a head whose adapter is active, where the call trains: log-probs and gradient are not
    the model's. Without a gradient it may be meant, as a reference without the adapter: a warning, once.

    A tensor does not know its module. Where PEFT is imported, all modules are searched, once for a parameter.
    """
    if "peft" not in sys.modules or not isinstance(weight, nn.Parameter) or torch.compiler.is_compiling():
        return
    if warned("adapter") and not trains:
        return
    known = _found.get(weight)
    if known is None or known[0] != weight.requires_grad:
        wrapper = _wrapper_of(weight)
        known = _found[weight] = (weight.requires_grad, None if wrapper is None else weakref.ref(wrapper))
    wrapper = None if known[1] is None else known[1]()
    if wrapper is None or not _is_active(wrapper):
        return
    found = f"the base weight of a {type(wrapper).__name__} whose adapter is active"
    wrong = "the log-probs are not the model's and the adapter gets no gradient"
    if trains:
        raise TypeError(f"weight must be all of the head, got {found}: {wrong}; {ADVICE}")
    warn_once("adapter", f"weight is {found}: {wrong}; {ADVICE}")


def _wrapper_of(weight: nn.Parameter) -> nn.Module | None:
    """The adapter around the layers that hold the weight; None if one of them, a tied head say, has none."""
    modules = [x for x in gc.get_objects() if issubclass(type(x), nn.Module) and "_modules" in x.__dict__]
    owners = [m for m in modules if not isinstance(m, nn.Embedding) and m._parameters.get("weight") is weight]
    wrappers = [next((w for w in modules if has_adapter(w) and _holds(w, owner)), None) for owner in owners]
    return wrappers[0] if wrappers and None not in wrappers else None


def _holds(wrapper: nn.Module, owner: nn.Module) -> bool:
    return wrapper is owner or any(child is owner for child in wrapper._modules.values())


def _is_active(wrapper: nn.Module) -> bool:
    """Whether the adapter changes the output: it is selected, not switched off, and not merged into the base weight."""
    if getattr(wrapper, "disable_adapters", False) or getattr(wrapper, "merged", False):
        return False
    names, lora = getattr(wrapper, "active_adapters", None), wrapper._modules.get("lora_A")
    return names is None or lora is None or any(name in lora for name in names)

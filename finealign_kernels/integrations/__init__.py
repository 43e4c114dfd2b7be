"""Seams into trainers: one thin file each, which imports its framework lazily."""

from importlib import import_module
from importlib.util import find_spec


def __getattr__(name: str):
    """Imports a module of this package at its first use."""
    if name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")

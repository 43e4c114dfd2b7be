"""The entry point "verl.plugins": verl imports this module, and the losses of `verl` are registered with it."""

from .verl import register_when_imported

register_when_imported()

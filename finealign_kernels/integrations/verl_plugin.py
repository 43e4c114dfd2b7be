"""The entry point "verl.plugins": verl imports this module, and the losses of `verl` are registered with it."""

import logging

try:
    from .verl import register_when_imported

    register_when_imported()
except Exception:
    # verl hides what a plugin raises
    logging.getLogger(__name__).exception("finealign_kernels has registered no loss with verl")
    raise

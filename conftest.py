"""Keeps the checkout off sys.path (`python -m pytest` would put it first, and an installed wheel would go untested),
and turns Triton's interpreter on before any kernel module is imported, where there is no GPU to compile for."""

import os
import sys
from pathlib import Path

import torch

_root = str(Path(__file__).resolve().parent)
sys.path[:] = [folder for folder in sys.path if str(Path(folder or ".").resolve()) != _root]

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

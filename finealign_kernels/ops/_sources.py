"""A digest of the C++ and CUDA sources. setup.py compiles it into the extension; imports from a checkout compare it."""

import hashlib
from pathlib import Path

FOLDERS = "csrc", "kernels/cuda"
SUFFIXES = ".cpp", ".h", ".cu", ".cuh"


def digest(root: Path) -> str | None:
    """Of the names and bytes of all sources in FOLDERS below root; None where these folders are not there."""
    if not all((root / folder).is_dir() for folder in FOLDERS):
        return None
    whole = hashlib.sha256()
    found = (path for folder in FOLDERS for path in (root / folder).rglob("[!.]*") if path.suffix in SUFFIXES)
    for path in sorted(found):
        whole.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
        whole.update(path.read_bytes())
    return whole.hexdigest()[:16]

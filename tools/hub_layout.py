"""Writes the package as Hugging Face's `kernels` loads it: python tools/hub_layout.py FOLDER

    FOLDER/build/torch-cpu, FOLDER/build/torch-cuda    the package, and metadata.json

Both variants are without compiled code, the same files: torch and Triton on any machine. An installed copy may stand
beside them in a process. kernels >= 0.17 reads the folder with get_local_kernel(Path(FOLDER)), once it is a repository
of the Hub with get_kernel("ORGANISATION/finealign-kernels", version=1, trust_remote_code=True).
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("cpu", "cuda")


def sources() -> dict[str, Path]:
    """Path inside the package -> file; no compiled code."""
    found = {}
    for folder, below in ((ROOT / "finealign_kernels", ""), (ROOT / "kernels/triton", "kernels/")):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix not in (".so", ".pyd", ".pyc"):
                found[below + path.relative_to(folder).as_posix()] = path
    return found


def write(folder: Path) -> str:
    """Writes both variants into a folder and returns the id that names the module in a process."""
    files = sources()
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(name.encode() + b"\0" + path.read_bytes())
    unique = f"finealign_kernels_{digest.hexdigest()[:12]}"
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        if variant.exists():
            raise FileExistsError(f"{variant} exists; name an empty folder")
        for name, path in files.items():
            (variant / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, variant / name)
        metadata = {
            "name": "finealign-kernels",
            "id": unique,
            "version": 1,
            "license": "Apache-2.0",
            "backend": {"type": backend},
            "python-depends": [],
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    return unique


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(write(parser.parse_args().folder))

"""Two processes over gloo, for tests of what crosses ranks."""

import os
import subprocess
import sys

import torch


def run(file: str, function: str, folder, ranks: int = 2) -> list:
    """What `function(rank)` of the test file returns in each of the processes, in which torch.distributed is set up."""
    code = "import sys; sys.path[:0] = sys.argv[1:3]; import ranks; ranks.enter(*sys.argv[3:])"
    where, name = os.path.split(file)
    arguments = [sys.executable, "-c", code, os.path.dirname(__file__), where]
    arguments += [os.path.splitext(name)[0], function, str(folder), str(ranks)]
    options = dict(stderr=subprocess.PIPE, cwd=folder)  # not the checkout: an installed package would go untested
    started = [subprocess.Popen([*arguments, str(rank)], **options) for rank in range(ranks)]
    try:
        for process in started:
            _, told = process.communicate(timeout=300)
            assert process.returncode == 0, told.decode()[-3000:]
    finally:
        for process in started:
            process.kill()
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(ranks)]


def enter(module: str, function: str, folder: str, ranks: str, rank: str) -> None:
    import importlib

    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", int(ranks))
    torch.distributed.init_process_group("gloo", store=store, rank=int(rank), world_size=int(ranks))
    torch.save(getattr(importlib.import_module(module), function)(int(rank)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()

"""Ranks of one machine, for tests: threads of this process or gloo processes, and the bytes they move."""

import faulthandler
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.testing._internal.distributed import multi_threaded_pg
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).parent
PATIENCE = 120  # seconds after which ranks are taken to wait for each other


def threads(ranks: int, function, *args) -> list:
    """[function(group, *args) of each rank], each in a thread of its own; the first error is raised."""
    isolate = getattr(torch._C._distributed_c10d, "_set_thread_isolation_mode", lambda on: None)
    isolate(True)
    multi_threaded_pg.ProcessLocalGroup.reset()  # of an error of the last call
    multi_threaded_pg._install_threaded_pg()
    store, results, errors = dist.HashStore(), [None] * ranks, queue.Queue()

    def work(rank):
        try:
            dist.init_process_group(backend="threaded", rank=rank, world_size=ranks, store=store)
            results[rank] = function(dist.group.WORLD, *args)
        except BaseException as error:
            errors.put((rank, error))
            multi_threaded_pg.ProcessLocalGroup.exception_handle(error)  # the others stop waiting

    try:
        workers = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(ranks)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(PATIENCE)
            assert not worker.is_alive(), "a rank waits for one that does not come"
        if not errors.empty():
            raise errors.get()[1]
        return results
    finally:
        multi_threaded_pg._uninstall_threaded_pg()
        isolate(False)


def processes(ranks: int, function, *args) -> list:
    """The same in processes that gloo connects, forked from this one: nothing is imported anew.

    A fork has no thread but its own. What waits for a thread of this process waits for ever: trainers, which start
    threads of their own, train in `fresh` processes.
    """
    for module in ("torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp"):
        importlib.import_module(module)  # what ranks would each import anew
    with tempfile.TemporaryDirectory() as folder:
        given = ranks, folder, function, args
        torch.multiprocessing.start_processes(_process, given, nprocs=ranks, start_method="fork")
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(ranks)]


def fresh(ranks: int, function, *args) -> list:
    """The same in interpreters of their own. function stands in a module of the tests; args are strings or numbers."""
    name = function.__module__.split(".")[-1], function.__name__
    places = [str(HERE), *(str(folder) for folder in HERE.iterdir() if folder.is_dir())]
    command = "import sys, json; sys.path[:0] = json.loads(sys.argv[1]); import ranks; ranks._start(*sys.argv[2:])"
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    env["WORLD_SIZE"] = env["LOCAL_WORLD_SIZE"] = str(ranks)
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(ranks):
            given = json.dumps(places), str(rank), str(ranks), folder, *name, json.dumps(args)
            env["RANK"] = env["LOCAL_RANK"] = str(rank)
            quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            started.append(subprocess.Popen([sys.executable, "-c", command, *given], env=env, **quiet))
        try:
            for process in started:
                _, told = process.communicate(timeout=PATIENCE + 60)
                assert process.returncode == 0, told.decode()[-3000:]
        finally:
            for process in started:
                process.kill()
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(ranks)]


def _start(rank: str, ranks: str, folder: str, module: str, name: str, args: str) -> None:
    _process(int(rank), int(ranks), folder, getattr(importlib.import_module(module), name), json.loads(args))


def _process(rank, ranks, folder, function, args):
    faulthandler.register(signal.SIGALRM, chain=True)  # a rank that waits for ever says where, and ends
    signal.alarm(PATIENCE)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.save(function(dist.group.WORLD, *args), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


_here = threading.local()  # the Traffic that counts in this thread


class Traffic(TorchDispatchMode):
    """Collectives while it is on: (name, bytes that this rank hands in) each. gloo's come by the dispatcher."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __enter__(self):
        _here.traffic = self
        return super().__enter__()

    def __exit__(self, *error):
        _here.traffic = None
        return super().__exit__(*error)

    def note(self, name: str, inputs) -> None:
        flat = torch.utils._pytree.tree_leaves(inputs)
        moved = sum(x.numel() * x.element_size() for x in flat if isinstance(x, torch.Tensor))
        self.calls.append((name.strip("_").removesuffix("_base"), moved))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if name.startswith("c10d."):
            self.note(name.split(".")[1], args[0] if "allreduce" in name else args[1])  # else the output comes first
        return function(*args, **(kwargs or {}))


def _counted(name: str):
    """A collective of the threads' group, which is of Python and passes the dispatcher by."""
    method = getattr(multi_threaded_pg.ProcessLocalGroup, name)

    def call(self, *args, **kwargs):
        if getattr(_here, "traffic", None) is not None:
            _here.traffic.note(name, args[0] if name == "allreduce" else args[1])
        return method(self, *args, **kwargs)

    return call


for _name in ("allreduce", "allgather", "_allgather_base", "reduce_scatter", "_reduce_scatter_base", "alltoall_base"):
    setattr(multi_threaded_pg.ProcessLocalGroup, _name, _counted(_name))

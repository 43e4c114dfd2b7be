"""The trainers' own loss code, without what their packages pull in: ray, deepspeed, megatron, omegaconf, tensordict.

    pip install --no-deps --ignore-requires-python --target DIR verl==0.9.1 openrlhf==0.11.2 skyrl==0.4.0
    FINEALIGN_ORACLES=DIR pytest

What has no release goes into DIR from its repository: slime/ of THUDM/slime at 624b824a8 (0.3.1), src/prime_rl/ of
PrimeIntellect-ai/prime-rl at 559b44772 (0.8.0), nemo_rl/ of NVIDIA-NeMo/RL at 7ea279abf. SkyRL wants Python 3.12: its
files are read all the same.

Each function returns the module, or raises ImportError with the reason; `oracle` skips a test with that reason.
"""

import ast
import importlib
import importlib.util
import os
import sys
import textwrap
import types
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import pytest
import torch

FOREIGN = ("omegaconf", "tensordict", "deepspeed", "megatron", "ray", "loguru", "jaxtyping", "beartype")
TYPES = ("Float", "Integer", "Int", "Bool")
OURS = ("verl", "openrlhf", "slime", "skyrl", "prime_rl", "nemo_rl")


@cache
def verl_core():
    """verl.trainer.ppo.core_algos: compute_gae_advantage_return, agg_loss, compute_value_loss, kl_penalty, ..."""
    root = _package("verl")
    with _stand_ins("verl"):
        _module("omegaconf", DictConfig=type("DictConfig", (dict,), {}))
        _module("tensordict", TensorDict=type("TensorDict", (dict,), {}))
        for name in ("verl", "verl.utils", "verl.trainer", "verl.workers"):
            _module(name).__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        _module("verl.trainer.config", AlgoConfig=type("AlgoConfig", (), {}))
        _module("verl.workers.config", ActorConfig=type("ActorConfig", (), {}))
        groups = importlib.import_module("verl.utils.groupwise")
        sys.modules["verl.utils"].__dict__.update(
            as_torch_index=groups.as_torch_index, group_mean_std=groups.group_mean_std
        )
        return importlib.import_module("verl.trainer.ppo.core_algos")


@cache
def verl_step():
    """verl's ppo_loss, its forward of a transformers model with the fused head, and its head's module.

    A batch is a dict here, already padded: what TensorDict and padding do to it is left out.
    """
    root, core = _package("verl"), verl_core()
    batch = type("TensorDict", (dict,), {"select": lambda self, *_: self, "to_padded_tensor": lambda self: self})
    with _stand_ins("verl"):
        _module("tensordict", TensorDict=batch)
        packages = ("", ".utils", ".utils.experimental", ".utils.dataset", ".workers", ".workers.utils", ".models")
        for name in (*packages, ".models.transformers", ".trainer", ".trainer.ppo"):
            _module(f"verl{name}").__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules["verl.trainer.ppo.core_algos"] = core
        sys.modules["verl.utils"].tensordict_utils = None
        _module("verl.utils.dataset.dataset_utils", DatasetPadMode=None)
        means = types.SimpleNamespace(SUM="sum", MEAN="mean")
        kept = type("Metric", (), {"from_dict": staticmethod(lambda found, aggregation: found)})
        _module("verl.utils.metric", AggregationType=means, Metric=kept)
        kept.__new__ = lambda cls, value, aggregation: value
        _module("verl.utils.torch_functional", masked_mean=None, masked_sum=None)
        _module("verl.workers.config", ActorConfig=None, CriticConfig=None)
        _module("verl.workers.utils.padding", no_padding_2_padding=lambda value, data: value)
        names = ("workers.utils.losses", "models.transformers.dense_common", "utils.experimental.torch_functional")
        modules = [importlib.import_module(f"verl.{name}") for name in names]
        return types.SimpleNamespace(losses=modules[0], dense=modules[1], head=modules[2], batch=batch)


@cache
def openrlhf_loss():
    """openrlhf.models.loss: PolicyLoss, ValueLoss, aggregate_loss; its utils are `openrlhf_utils()`."""
    return _openrlhf("loss")


@cache
def openrlhf_utils():
    """openrlhf.models.utils: compute_approx_kl, masked_normalize, masked_mean, ..."""
    return _openrlhf("utils")


@cache
def openrlhf_gae():
    """get_advantages_and_returns(values, rewards, action_mask, gamma, lambd) of OpenRLHF's experience maker."""
    path = _package("openrlhf").joinpath("trainer", "ppo_utils", "experience_maker.py")
    return _method(path, "get_advantages_and_returns")


@cache
def openrlhf_returns():
    """get_cumulative_returns(rewards, action_mask, gamma) of OpenRLHF's experience maker."""
    path = _package("openrlhf").joinpath("trainer", "ppo_utils", "experience_maker.py")
    return _method(path, "get_cumulative_returns")


@cache
def slime_loss():
    """slime.backends.megatron_utils.loss, on one rank: loss_function, compute_advantages_and_returns, ..."""
    root = _package("slime")
    with _stand_ins("slime"), _uncompiled():
        one_rank = dict(
            get_context_parallel_world_size=1,
            get_context_parallel_rank=0,
            get_context_parallel_group=None,
            get_data_parallel_world_size=1,
            get_tensor_model_parallel_group=None,
            is_pipeline_last_stage=True,
        )
        mpu = types.SimpleNamespace(**{name: lambda *_, value=value, **__: value for name, value in one_rank.items()})
        _module("megatron").__path__ = []
        _module("megatron.core", mpu=mpu).__path__ = []
        for name in ("slime", "slime.utils", "slime.backends", "slime.backends.megatron_utils"):
            _module(name).__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        _module("slime.utils.distributed_utils", distributed_masked_whiten=None)
        _module("slime.utils.misc", load_function=_load)
        _module("slime.utils.types", RolloutBatch=dict)
        return importlib.import_module("slime.backends.megatron_utils.loss")


@cache
def prime_rl_loss():
    """prime_rl.trainer.rl.loss: LossInputs, setup_rl_loss_fn, compute_loss, ..."""
    root = _package("prime_rl")
    with _stand_ins("prime_rl"), _uncompiled():
        _module("beartype", beartype=None)
        _jaxtyping()
        for name in ("prime_rl", "prime_rl.trainer", "prime_rl.trainer.rl"):
            _module(name).__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        configs = ("CustomLossConfig", "DefaultLossConfig", "IPOLossConfig", "LossConfig")
        made = {name: type(name, (types.SimpleNamespace,), {}) for name in configs}
        _module("prime_rl.configs").__path__ = []
        _module("prime_rl.configs.trainer", **made)
        _module("prime_rl.utils").__path__ = []
        _module("prime_rl.utils.utils", import_object=_load)
        return importlib.import_module("prime_rl.trainer.rl.loss")


@cache
def nemo_rl_loss():
    """nemo_rl.algorithms.loss.loss_functions: ClippedPGLossFn and its config."""
    root = _package("nemo_rl")
    with _stand_ins("nemo_rl"):
        for name in ("nemo_rl", "nemo_rl.algorithms", "nemo_rl.algorithms.loss"):
            _module(name).__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        cut = _functions(root / "algorithms" / "utils.py", ("calculate_kl", "masked_mean"))
        _module("nemo_rl.algorithms.utils", **cut)
        source = (root / "algorithms" / "loss" / "loss_functions.py").read_text()
        for node in ast.parse(source).body:  # what its other losses want
            module = node.module if isinstance(node, ast.ImportFrom) else ""
            if module.startswith("nemo_rl") and not module.endswith(("algorithms.utils", "loss.interfaces")):
                _module(module, **{name.name: _Any for name in node.names})
        _module("nemo_rl.distributed.batched_data_dict", BatchedDataDict=_Any)
        return importlib.import_module("nemo_rl.algorithms.loss.loss_functions")


class _Any(dict):
    """Stands for a class that appears in annotations."""


@cache
def skyrl_utils():
    """skyrl.backends.skyrl_train.utils.ppo_utils, without Ray: its registries, losses and estimators."""
    root = _package("skyrl")
    with _stand_ins("skyrl"):
        _module("omegaconf", DictConfig=type("DictConfig", (dict,), {}))
        _module("ray", remote=lambda cls: cls, is_initialized=lambda: False)
        _module("loguru", logger=types.SimpleNamespace(warning=print, info=print, error=print))
        _jaxtyping()
        packages = ("", ".backends", ".backends.skyrl_train", ".backends.skyrl_train.utils", ".train")
        for name in packages:
            _module(f"skyrl{name}").__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        _module("skyrl.train.config", AlgorithmConfig=type("AlgorithmConfig", (), {}))
        return importlib.import_module("skyrl.backends.skyrl_train.utils.ppo_utils")


def oracle(load):
    """What `load` returns; skips the test with its reason where it cannot."""
    try:
        return load()
    except ImportError as error:
        pytest.skip(str(error))


def _openrlhf(name: str):
    root = _package("openrlhf")
    with _stand_ins("openrlhf"):
        _module("deepspeed")
        for package in ("openrlhf", "openrlhf.models"):
            _module(package).__path__ = [str(root.joinpath(*package.split(".")[1:]))]
        return importlib.import_module(f"openrlhf.models.{name}")


def _package(name: str) -> Path:
    """The folder of a package, in FINEALIGN_ORACLES or where packages are installed; nothing of it is run."""
    folder = Path(os.environ.get("FINEALIGN_ORACLES", ""), name)
    if "FINEALIGN_ORACLES" in os.environ and folder.is_dir():
        return folder
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{name} is not installed, nor does FINEALIGN_ORACLES name a folder that holds it")
    return Path(spec.submodule_search_locations[0])


@contextmanager
def _stand_ins(package: str):
    """What is imported inside leaves no trace in sys.modules: neither stand-ins nor modules of the package."""
    before = dict(sys.modules)
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise ImportError(f"{package} needs more than its loss code: {error}") from error
    finally:
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] in (package, *FOREIGN):
                del sys.modules[name]
        sys.modules.update({n: m for n, m in before.items() if n.split(".")[0] == package})


def _module(name: str, **attributes) -> types.ModuleType:
    if name in sys.modules and not name.startswith(OURS):
        return sys.modules[name]
    module = sys.modules[name] = types.ModuleType(name)
    module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
    module.__dict__.update(attributes)
    return module


@contextmanager
def _uncompiled():
    """torch.compile leaves functions as they stand."""
    before, torch.compile = torch.compile, lambda *function, **_: function[0] if function else lambda f: f
    try:
        yield
    finally:
        torch.compile = before


def _jaxtyping() -> None:
    annotations = {name: type(name, (), {"__class_getitem__": classmethod(lambda *_: object)}) for name in TYPES}
    _module("jaxtyping", jaxtyped=lambda **_: lambda function: function, **annotations)


def _functions(path: Path, names: tuple[str, ...]) -> dict:
    """Functions of a file that need nothing but torch."""
    source, found = path.read_text(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name in names:
            code = "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])
            exec("from __future__ import annotations\n" + code, {"torch": torch}, found)
    if not found.keys() >= set(names):
        raise ImportError(f"{path.name} has not all of {names}: another version?")
    return {name: found[name] for name in names}


def _load(path: str):
    """The function of a dotted path."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _method(path: Path, name: str):
    """A method that reads nothing of its object, as a function of its other arguments."""
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            space = {"torch": torch}
            code = textwrap.dedent("\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno]))
            exec("from __future__ import annotations\n" + code, space)
            return partial(space[name], None)
    raise ImportError(f"openrlhf has no {name}: another version?")

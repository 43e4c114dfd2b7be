"""What stands around a call and is no argument of it: every public function gives the same bits, gradients included.

The default dtype and device, autocast, threads, checkpointing, hooks on saved tensors, an input that changes before
backward. The calls are those of tests/mistakes/test_ordinary_mistakes.py.
"""

import contextlib
import runpy
import threading
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import finealign_kernels as fk

CALLS = runpy.run_path(str(Path(__file__).with_name("test_ordinary_mistakes.py")))["CALLS"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def tensors(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [x for part in result for x in tensors(part)] if isinstance(result, (tuple, list)) else []


def floats(name):
    return [key for key, x in CALLS[name].items() if isinstance(x, torch.Tensor) and x.is_floating_point()]


def outcome(name, around=contextlib.nullcontext, wrap=lambda f, given: f(given), only=None, before_backward=None):
    """Outputs of a call, and the gradients of what is differentiable in it, by argument."""
    leaves = {key: CALLS[name][key].clone().requires_grad_() for key in floats(name) if only in (None, key)}
    given = {**CALLS[name], **{key: leaf * 1 for key, leaf in leaves.items()}}  # which may be changed in place
    with around():
        found = tensors(wrap(lambda given: getattr(fk, name)(**given), given))
    value = sum((i + 1) * x.double().sum() for i, x in enumerate(found) if x.requires_grad)
    outputs = [x.detach() for x in found]
    if not isinstance(value, torch.Tensor):
        return outputs, {}
    if before_backward is not None:
        before_backward(given)
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return outputs, {key: grad for key, grad in zip(leaves, grads, strict=True) if grad is not None}


def same(found, wanted):
    for one, other in zip(found[0], wanted[0], strict=True):
        assert one.dtype == other.dtype and one.device == other.device
        assert torch.equal(one.nan_to_num(9e9), other.nan_to_num(9e9))
    assert found[1].keys() == wanted[1].keys()
    for key, grad in found[1].items():
        assert torch.equal(grad, wanted[1][key]), key


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


AROUND = {
    "float64 by default": lambda: default_dtype(torch.float64),
    "float16 by default": lambda: default_dtype(torch.float16),
    "meta by default": lambda: torch.device("meta"),
    "bfloat16 autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
    "saved tensors are copies": lambda: torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", CALLS)
def test_surroundings_change_nothing(name, around):
    if (name, around) == ("linear_logprobs", "bfloat16 autocast"):
        return  # the one function that autocast narrows
    same(outcome(name, AROUND[around]), outcome(name))


@pytest.mark.parametrize("rows", ("responses", "differences"))
def test_the_other_contrastive_loss_under_autocast(rows):
    first, second = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(3)).requires_grad_()
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = fk.contrastive_loss("simcse", first, second, rows=rows, temperature=0.05).loss
        found.append((loss, *torch.autograd.grad(loss, (first, second))))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("name", CALLS)
def test_an_activation_checkpoint_changes_nothing(name):
    same(outcome(name, wrap=lambda f, given: checkpoint(f, given, use_reentrant=False)), outcome(name))


@pytest.mark.parametrize("name", CALLS)
def test_a_gradient_of_one_argument_is_that_among_all(name):
    _, grads = outcome(name)
    for key in grads:
        _, alone = outcome(name, only=key)
        assert torch.equal(alone[key], grads[key]), key


@pytest.mark.parametrize("name", CALLS)
def test_an_input_that_changes_before_backward_is_seen_or_does_not_matter(name):
    """torch raises where what is saved has changed; a copy that was made before gives the gradients as they were."""
    _, wanted = outcome(name)
    for key in floats(name):

        def change(given, key=key):
            with torch.no_grad():
                given[key].mul_(0).add_(0.37)

        try:
            _, grads = outcome(name, before_backward=change)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error), key
            continue
        for other, grad in grads.items():
            assert torch.equal(grad, wanted[other]), (key, other)


def test_threads_do_not_disturb_each_other():
    wanted, wrong = {name: outcome(name) for name in CALLS}, []

    def work(names):
        try:
            for name in names:
                same(outcome(name), wanted[name])
        except BaseException as error:
            wrong.append((name, error))

    names = list(CALLS)
    threads = [threading.Thread(target=work, args=(names[i:] + names[:i],)) for i in (0, 1, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong


def test_an_op_under_autocast_is_as_near_as_without():
    first, second, third = torch.randn(3, 64, 16, generator=torch.Generator().manual_seed(4))
    with torch.autocast("cpu", torch.bfloat16):
        loss = fk.contrastive_loss("swav", first, second, prototypes=third[:8], epsilon=0.5).loss
    views = first.double(), second.double()
    wide = fk.contrastive_loss("swav", *views, prototypes=third[:8].double(), epsilon=0.5)
    assert_close(loss.double(), wide.loss, rtol=1e-6, atol=0)

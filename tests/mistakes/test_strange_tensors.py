"""Tensors as they may come: strides, garbage under the mask, gradients on constants, inference mode, sparse, meta.

Every tensor argument of every public function, by the full calls of tests/mistakes/test_ordinary_mistakes.py.
"""

import runpy
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import finealign_kernels as fk

CALLS = runpy.run_path(str(Path(__file__).with_name("test_ordinary_mistakes.py")))["CALLS"]
TENSORS = [
    (name, key) for name, call in CALLS.items() for key, value in call.items() if isinstance(value, torch.Tensor)
]
FLOATS = [(name, key) for name, key in TENSORS if CALLS[name][key].is_floating_point()]
MASKED = [
    (name, key)
    for name, key in FLOATS
    if isinstance(CALLS[name].get("mask"), torch.Tensor)
    and CALLS[name]["mask"].shape == CALLS[name][key].shape
    and not CALLS[name]["mask"].all()
]


def call(name, **others):
    return tensors(getattr(fk, name)(**{**CALLS[name], **others}))


def tensors(result):
    if isinstance(result, torch.Tensor):
        return [result.detach()]
    return [x for part in result for x in tensors(part)] if isinstance(result, (tuple, list)) else []


def same(found, wanted):
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, rtol=1e-6, atol=1e-7, equal_nan=True)


def layouts(x):
    """x again, with other strides: every second entry, each row apart, columns first, backwards in memory, offset."""
    other = ~x if x.dtype == torch.bool else x + 3
    yield torch.stack([x, other], -1)[..., 0]
    yield torch.stack([other, x], 0)[1]
    yield torch.cat([x, other], -1)[..., : x.shape[-1]]
    if x.dim() > 1:
        yield x.transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.parametrize("name,key", TENSORS)
def test_strides_do_not_matter(name, key):
    wanted = call(name)
    for x in layouts(CALLS[name][key]):
        same(call(name, **{key: x}), wanted)


@pytest.mark.parametrize("name,key", FLOATS)
def test_a_number_that_is_expanded_is_that_many_numbers(name, key):
    x = CALLS[name][key]
    one = x.reshape(-1)[0].expand(x.shape)
    same(call(name, **{key: one}), call(name, **{key: one.clone(memory_format=torch.contiguous_format)}))


@pytest.mark.parametrize("name,key", FLOATS)
def test_gradients_asked_of_any_argument_change_no_value(name, key):
    wanted = call(name)
    same(call(name, **{key: CALLS[name][key].clone().requires_grad_()}), wanted)
    with torch.inference_mode():
        same(call(name, **{key: CALLS[name][key].clone()}), wanted)


@pytest.mark.parametrize("garbage", (torch.nan, torch.inf, -torch.inf, 3e38))
@pytest.mark.parametrize("name,key", MASKED)
def test_what_stands_under_the_mask_does_not_matter(name, key, garbage):
    x = torch.where(CALLS[name]["mask"].bool(), CALLS[name][key], garbage)
    same(call(name, **{key: x}), call(name))


@pytest.mark.parametrize("name,key", [(name, key) for name, key in FLOATS if CALLS[name][key].dim() == 2])
def test_a_sparse_tensor_is_refused_by_name(name, key):
    with pytest.raises((TypeError, ValueError), match=f"^({key}|scores).* must be a dense tensor"):
        call(name, **{key: CALLS[name][key].to_sparse()})


SIZES = {
    "no column": lambda x: x[:, :0] if x.shape == (4, 5) else x,
    "one column": lambda x: x[:, :1] if x.shape == (4, 5) else x,
    "no row": lambda x: x[:0] if x.shape in ((4, 5), (4,)) else x,
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "name",
    [  # losses whose arguments are all of one size: the others have sizes of their own for each argument
        name
        for name, call in CALLS.items()
        if (name.endswith("_loss") or "ref_logp" in call) and not {"first", "cu_groups", "logits"} & call.keys()
    ],
)
def test_empty_batches_have_finite_losses_and_gradients(name, size):
    given = {k: SIZES[size](v) if isinstance(v, torch.Tensor) else v for k, v in CALLS[name].items()}
    if "pair_weight" in given and size == "no row":
        given["pair_weight"] = given["pair_weight"][:0]
    leaves = {k: v.clone().requires_grad_() for k, v in given.items() if k in ("logp", "values")}
    result = getattr(fk, name)(**given | leaves)
    assert all(x.isfinite().all() for x in tensors(result))
    if hasattr(result, "loss") and leaves:
        result.loss.backward()
        assert all(x.grad.isfinite().all() for x in leaves.values())


@pytest.mark.parametrize("backend", ("auto", "torch", "reference"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_a_bias_of_any_strides_has_its_log_probs_and_gradients(dtype, backend):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator).to(dtype) for n in (6, 11))
    labels, upstream = torch.arange(6), torch.rand(6, generator=generator)
    bias = torch.randn(11, generator=generator, dtype=torch.promote_types(dtype, torch.float32))

    def step(b):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        out = fk.linear_logprobs(*leaves, labels, bias=b, backend=backend).logp
        return [out.detach(), *torch.autograd.grad((out * upstream).sum(), [*leaves, b])]

    wanted = step(bias.clone().requires_grad_())
    for strided in layouts(bias):
        assert all(torch.equal(one, other) for one, other in zip(step(strided.requires_grad_()), wanted, strict=True))

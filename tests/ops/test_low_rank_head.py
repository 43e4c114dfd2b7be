"""linear_logprobs(adapter=(u, b)): a low-rank part of the head, against the merged head in float64."""

import pytest
import torch

import finealign_kernels as fk

N, D, V, R = 11, 16, 4200, 3  # more columns than a chunk has
BACKENDS = ("reference", "torch", "native")


def inputs(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    make = {"hidden": (N, D), "weight": (V, D), "a": (R, D), "b": (V, R)}
    found = {name: (torch.randn(shape, generator=g) * 0.5).to(dtype) for name, shape in make.items()}
    labels = torch.randint(V, (N,), generator=g)
    labels[4] = -100
    return found, labels, torch.randn(N, generator=g)


def merged(found, labels, upstream, **options):
    """Gradients in float64 of the head W + s B A, which is never made by the op."""
    leaves = {name: x.double().requires_grad_(name != "weight") for name, x in found.items()}
    head = leaves["weight"] + 0.7 * leaves["b"] @ leaves["a"]
    out = fk.linear_logprobs(leaves["hidden"], head, labels, outputs="entropy", backend="reference", **options)
    ((out.logp + 0.3 * out.entropy) * upstream).sum().backward()
    return out, {name: x.grad for name, x in leaves.items() if name != "weight"}


def low_rank(found, labels, upstream, **options):
    leaves = {name: x.clone().requires_grad_(name != "weight") for name, x in found.items()}
    u = 0.7 * leaves["hidden"] @ leaves["a"].t()
    out = fk.linear_logprobs(
        leaves["hidden"], leaves["weight"], labels, adapter=(u, leaves["b"]), outputs="entropy", **options
    )
    ((out.logp + 0.3 * out.entropy) * upstream).sum().backward()
    assert leaves["weight"].grad is None
    return out, {name: x.grad for name, x in leaves.items() if name != "weight"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace", ["full", 0])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 2.0, "logit_scale": 1.3, "temperature": 0.8}], ids=["plain", "odd"]
)
def test_against_the_merged_head(backend, workspace, options):
    data = inputs()
    want, grads = merged(*data, **options)
    got, found = low_rank(*data, backend=backend, workspace=workspace, **options)
    for field in ("logp", "entropy"):
        torch.testing.assert_close(getattr(got, field).double(), getattr(want, field), rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        assert (found[name] - grad).norm() <= 1e-5 * grad.norm(), name


@pytest.mark.parametrize("compact", ["host", "device"])
def test_rows_that_are_not_read_are_not_looked_at(compact):
    found, labels, upstream = inputs()
    whole, grads = low_rank(found, labels, upstream)
    u = (0.7 * found["hidden"] @ found["a"].t()).index_fill(0, torch.tensor([4]), torch.nan).requires_grad_()
    b = found["b"].clone().requires_grad_()
    out = fk.linear_logprobs(
        found["hidden"], found["weight"], labels, adapter=(u, b), outputs="entropy", compact=compact
    )
    ((out.logp + 0.3 * out.entropy) * upstream).sum().backward()
    torch.testing.assert_close(out.logp, whole.logp)
    torch.testing.assert_close(b.grad, grads["b"])
    assert not u.grad[4].any()


def test_half_precision_is_within_what_float32_products_of_its_operands_give():
    """S1: operands in bfloat16, all sums in float32; the adapter may be float32 beside them, as PEFT keeps it."""
    found, labels, upstream = inputs(torch.bfloat16)
    want, grads = merged(found, labels, upstream)
    u = 0.7 * found["hidden"].float() @ found["a"].float().t()
    leaves = [u.requires_grad_(), found["b"].float().requires_grad_(), found["hidden"].clone().requires_grad_()]
    out = fk.linear_logprobs(leaves[2], found["weight"], labels, adapter=tuple(leaves[:2]), outputs="entropy")
    ((out.logp + 0.3 * out.entropy) * upstream).sum().backward()
    torch.testing.assert_close(out.logp.double(), want.logp, rtol=2e-6, atol=2e-6)
    assert (leaves[1].grad - grads["b"]).norm() <= 1e-2 * grads["b"].norm()
    assert leaves[2].grad.dtype == torch.bfloat16 and leaves[1].grad.dtype == torch.float32


def test_several_adapters_are_one_of_more_columns():
    found, labels, _ = inputs()
    h, w, b = found["hidden"], found["weight"], found["b"]
    parts = [(h @ found["a"].t(), b), (2 * h @ found["a"].t(), b.flip(0))]
    both = tuple(torch.cat(x, 1) for x in zip(*parts, strict=True))
    got = fk.linear_logprobs(h, w, labels, adapter=both).logp
    want = fk.linear_logprobs(h, w + sum((s * y @ found["a"]) for s, y in ((1, b), (2, b.flip(0)))), labels).logp
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_one_temperature_a_row_and_a_padded_vocabulary():
    found, labels, upstream = inputs()
    labels = labels.clamp(max=V - 100)
    temperature = torch.linspace(0.5, 2, N)
    want, grads = merged(found, labels, upstream, temperature=temperature.double(), vocab_size=V - 50)
    got, ours = low_rank(found, labels, upstream, temperature=temperature, vocab_size=V - 50)
    torch.testing.assert_close(got.logp.double(), want.logp, rtol=1e-5, atol=1e-5)
    assert (ours["b"] - grads["b"]).norm() <= 1e-5 * grads["b"].norm() and not ours["b"][V - 50 :].any()


def test_what_does_not_fit_is_refused():
    found, labels, _ = inputs()
    h, w, b = found["hidden"], found["weight"], found["b"]
    u = h @ found["a"].t()
    for adapter, kind, says in (
        (u, TypeError, r"adapter must be a tuple \(u, b\).*got Tensor"),
        ((u[:3], b), ValueError, r"adapter\[0\] must have shape \(\.\.\., R\) as hidden"),
        ((u, b.t()), ValueError, r"adapter\[1\] must have shape \(4200, 3\), got \(3, 4200\)"),
        ((u.long(), b), TypeError, r"adapter\[0\] must have dtype"),
    ):
        with pytest.raises(kind, match=says):
            fk.linear_logprobs(h, w, labels, adapter=adapter)
    with pytest.raises(ValueError, match="adapter must be None with backend='triton_fused'"):
        fk.linear_logprobs(h, w, labels, adapter=(u, b), backend="triton_fused")
    with pytest.raises(ValueError, match="adapter must be None with batch_invariant=True"):
        fk.linear_logprobs(h, w, labels, adapter=(u, b), batch_invariant=True)
    leaf = b.clone().requires_grad_()
    loss = fk.linear_logprobs(h, w, labels, adapter=(u, leaf)).logp.sum()
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        grad.sum().backward()

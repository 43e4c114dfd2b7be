"""reverse_scan and its derivatives: by hand, against a loop over time in float64, packed and padded, beside NaN."""

import pytest
import torch
from torch import inf, nan, tensor
from torch.testing import assert_close

from finealign_kernels.ops import _native
from finealign_kernels.ops.scan import reverse_scan

F64 = torch.float64
native_only = pytest.mark.skipif(not _native.available(), reason=str(_native.reason))


@pytest.fixture(params=["reference", pytest.param("native", marks=native_only)])
def backend(request):
    return request.param


def by_loop(x, decay, cu_seqlens, mask):
    """float64, a token after another, from the right: on Python's numbers, which are float64 too."""
    out = [0.0] * len(x)
    x, decay, ends, mask = x.tolist(), decay.tolist(), cu_seqlens.tolist(), mask.tolist()
    for start, stop in zip(ends, ends[1:], strict=False):
        y = 0.0
        for t in reversed(range(start, stop)):
            if mask[t]:
                out[t] = y = x[t] + decay[t] * y
    return tensor(out, dtype=F64)


LENGTHS = {
    "short": [0, 1, 2, 7, 8, 9, 0, 31, 33, 0],
    "tiles": [511, 512, 513, 0, 1023, 1025, 3],
    "cut": [32_767, 32_768, 32_769, 68_000, 1, 0],
    "ones": [1] * 300,
    "none": [],
    "empty": [0, 0],
}


def batch(lengths, dtype=F64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    cu_seqlens = tensor([0, *lengths]).cumsum(0)
    n = int(cu_seqlens[-1])
    mask = torch.rand(n, generator=rng) < 0.7
    x = torch.where(mask, torch.randn(n, generator=rng, dtype=F64), nan).to(dtype)
    decay = torch.where(mask, torch.rand(n, generator=rng, dtype=F64) * 2 - 1, nan).to(dtype)
    return x, decay, cu_seqlens, mask


def test_by_hand(backend):
    x = tensor([1.0, 2, 3, 4, 5])
    cu_seqlens = tensor([0, 3, 3, 5])
    assert reverse_scan(x, 0.5, cu_seqlens, backend=backend).tolist() == [2.75, 3.5, 3, 6.5, 5]
    assert reverse_scan(x[None], 1, backend=backend).tolist() == [[15, 14, 12, 9, 5]]
    assert reverse_scan(x, tensor([0.5, 7, 2]), cu_seqlens, backend=backend).tolist() == [2.75, 3.5, 3, 14, 5]
    each = tensor([2.0, 1, nan, -1, 9])  # the last of a sequence has no effect, a NaN there has its own
    assert reverse_scan(x[:2], each[:2], tensor([0, 2]), backend=backend).tolist() == [5, 2]
    mask = tensor([True, False, True, True, True])
    held = torch.where(mask, x, nan)
    assert reverse_scan(held, 0.5, cu_seqlens, mask=mask, backend=backend).tolist() == [2.5, 0, 3, 6.5, 5]
    assert reverse_scan(held, torch.where(mask, 2.0, nan), cu_seqlens, mask=mask, backend=backend)[0] == 7


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LENGTHS)
def test_against_a_loop(backend, name, masked):
    x, decay, cu_seqlens, mask = batch(LENGTHS[name])
    if not masked:
        x, decay, mask = x.nan_to_num(0.3), decay.nan_to_num(0.9), torch.ones_like(mask)
    rates = torch.linspace(-1, 1, len(LENGTHS[name]), dtype=F64)
    for given, each in (
        (decay, decay),
        (rates, rates.repeat_interleave(cu_seqlens.diff())),
        (0.999, torch.full_like(x, 0.999)),
    ):
        expected = by_loop(x, each, cu_seqlens, mask)
        for index in (torch.int32, torch.int64):
            found = reverse_scan(x, given, cu_seqlens.to(index), mask=mask if masked else None, backend=backend)
            assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_rounded_once(backend, dtype):
    x, decay, cu_seqlens, mask = batch(LENGTHS["tiles"], dtype)
    found = reverse_scan(x, decay, cu_seqlens, mask=mask, backend=backend)
    assert found.dtype == torch.float32
    assert_close(found.double(), by_loop(x, decay, cu_seqlens, mask), rtol=2**-24, atol=1e-12)
    assert reverse_scan(x, decay.double(), cu_seqlens, mask=mask, backend=backend).dtype == F64


@pytest.mark.parametrize("name", ["short", "cut"])
def test_gradients_are_the_transpose(backend, name):
    """<g, J x> = <Jᵀ g, x>, and the gradient in a from a loop under autograd where it is short."""
    x, decay, cu_seqlens, mask = batch(LENGTHS[name])
    x.requires_grad_(), decay.requires_grad_()
    y = reverse_scan(x, decay, cu_seqlens, mask=mask, backend=backend)
    g = torch.where(mask, torch.randn(len(x), dtype=F64), nan)  # upstream NaN at masked places is not looked at
    dx, da = torch.autograd.grad(y, (x, decay), g, retain_graph=True)
    again = torch.autograd.grad(y, (x, decay), g)
    assert torch.equal(dx, again[0]) and torch.equal(da, again[1])
    kept = torch.where(mask, x.detach(), 0)
    assert_close((y.detach() * g.nan_to_num()).sum(), (dx * kept).sum(), rtol=1e-11, atol=1e-9)
    assert not dx[~mask].any() and not da[~mask].any() and da.isfinite().all()
    if name == "short":
        a = decay.detach().requires_grad_()
        total = 0
        for s in range(len(cu_seqlens) - 1):
            later = torch.zeros((), dtype=F64)
            for t in reversed(range(int(cu_seqlens[s]), int(cu_seqlens[s + 1]))):
                if mask[t]:
                    later = x.detach()[t] + a[t] * later
                    total = total + g[t] * later
        (expected,) = torch.autograd.grad(total, a)
        assert_close(da, torch.where(mask, expected, 0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_derivatives_of_every_order(backend, masked):
    x, decay, cu_seqlens, mask = batch([3, 0, 1, 9])
    mask = mask if masked else None
    x, decay = (t.nan_to_num(0.4).requires_grad_() for t in (x, decay))
    rates = torch.rand(4, dtype=F64, requires_grad=True)
    for second in (decay, rates):
        call = lambda x, a: reverse_scan(x, a, cu_seqlens, mask=mask, backend=backend)  # noqa: E731
        assert torch.autograd.gradcheck(call, (x, second))
        assert torch.autograd.gradgradcheck(call, (x, second))
    scalar = lambda x: reverse_scan(x, 0.7, cu_seqlens, mask=mask, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(scalar, (x,)) and torch.autograd.gradgradcheck(scalar, (x,))


def test_padding_packing_and_strides_do_not_matter(backend):
    lengths = [700, 1, 0, 513, 64]
    x, decay, cu_seqlens, mask = batch(lengths, torch.float32)
    flat = reverse_scan(x, decay, cu_seqlens, mask=mask, backend=backend)

    def padded(values, fill):
        out = torch.full((len(lengths), 900), fill, dtype=values.dtype)
        for s, length in enumerate(lengths):
            out[s, :length] = values[cu_seqlens[s] : cu_seqlens[s + 1]]
        return out

    wide = [padded(x, nan), padded(decay, nan), padded(mask, False)]
    for a, b, m in (wide, [t.t().contiguous().t() for t in wide]):
        found = reverse_scan(a, b, mask=m, backend=backend)
        tolerance = 0 if backend == "native" else 1e-6
        assert_close(found, padded(flat, 0.0), rtol=tolerance, atol=tolerance)


def test_a_nan_stays_in_its_sequence(backend):
    x = torch.ones(3, 20_000)
    x[1, 9000] = nan
    found = reverse_scan(x, 0.9, backend=backend)
    assert found[1, :9001].isnan().all() and found[[0, 2]].isfinite().all() and found[1, 9001:].isfinite().all()


@pytest.mark.parametrize("junk", [nan, inf, -1e300])
def test_the_decay_of_the_last_token_has_no_effect(backend, junk):
    x, decay, cu_seqlens, _ = batch([1, 9, 600, 40_000])
    x, decay = x.nan_to_num(0.5), decay.nan_to_num(0.5)
    clean = reverse_scan(x, decay, cu_seqlens, backend=backend)
    decay[cu_seqlens[1:] - 1] = junk
    assert torch.equal(reverse_scan(x, decay, cu_seqlens, backend=backend), clean)


@native_only
@pytest.mark.parametrize("name", ["tiles", "cut", "ones"])
def test_bits_do_not_depend_on_threads(name):
    x, decay, cu_seqlens, mask = batch(LENGTHS[name] * 5, torch.float32)
    x.requires_grad_(), decay.requires_grad_()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = reverse_scan(x, decay, cu_seqlens, mask=mask, backend="native")
            found.append((y, *torch.autograd.grad(y.sum(), (x, decay))))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


@native_only
def test_decays_above_one_whose_product_overflows():
    x = torch.zeros(20_000, dtype=F64)
    x[:100] = 1
    found = reverse_scan(x[None], 2.0, backend="native")
    assert_close(found[0, :3], 2.0 ** (100 - torch.arange(3, dtype=F64)) - 1) and not found[0, 100:].any()


@native_only
def test_opcheck_and_compile():
    x, decay, cu_seqlens, mask = batch([3, 0, 9])
    x, decay = x.nan_to_num(0.4), decay.nan_to_num(0.4)  # it compares results, and NaN is not NaN
    op = torch.ops.finealign.reverse_scan.default
    for forward in (False, True):
        for m in (None, mask):
            torch.library.opcheck(op, (x, decay, None, m, cu_seqlens, forward))
            torch.library.opcheck(op, (x, None, torch.ones(3, dtype=F64), m, cu_seqlens, forward))
    loss = lambda x, a, cu: reverse_scan(x, a, cu).square().sum()  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([3, 0, 5], [7, 1, 2, 9]):
        x, decay, cu_seqlens, _ = batch(lengths)
        x, decay = (t.nan_to_num(0.4).requires_grad_() for t in (x, decay))
        grads = [torch.autograd.grad(f(x, decay, cu_seqlens), (x, decay)) for f in (loss, compiled)]
        assert_close(*grads)


X, CU = torch.zeros(5), tensor([0, 3, 5])


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (lambda: reverse_scan(X, 0.5), ValueError, r"x must be \(B, T\) where cu_seqlens is not given, got \(5,\)"),
        (lambda: reverse_scan(X.long(), 0.5, CU), TypeError, "x must have dtype float32 or .*, got torch.int64"),
        (lambda: reverse_scan(X, "0.5", CU), ValueError, "decay must be a finite number, got '?0.5'?"),
        (lambda: reverse_scan(X, nan, CU), ValueError, "decay must be a finite number, got nan"),
        (lambda: reverse_scan(X, X[:3], CU), ValueError, r"decay must have shape \(5,\), got \(3,\)"),
        (lambda: reverse_scan(X, X[:2].int(), CU), TypeError, "decay must have dtype float32 or .*, got torch.int32"),
        (lambda: reverse_scan(X, 1, tensor([0, 4])), ValueError, "cu_seqlens must end at the number of tokens 5"),
        (lambda: reverse_scan(X, 1, CU, backend="cuda"), ValueError, "backend must be 'auto', 'reference' or 'native'"),
    ],
)
def test_refusals(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@native_only
@pytest.mark.parametrize("ends", [[1, 5], [0, 4, 2, 5], [0, 4], [0, 1 << 40, 5], [0, -3, 5], [0]])
def test_the_op_itself_refuses_bad_cu_seqlens(ends):
    rates = torch.ones(1, dtype=F64)
    with pytest.raises(RuntimeError, match="cu_seqlens must"):
        torch.ops.finealign.reverse_scan(X, None, rates, None, tensor(ends), False)
    with pytest.raises(RuntimeError, match="cu_seqlens must"):
        torch.ops.finealign.advantages(
            tensor(ends), None, X, *[None] * 4, False, False, None, None, 0, 0.0, False, None, 0, False, None, rates,
            rates, None, False, None, 0.0, False, False, 5, torch.float32,
        )  # fmt: skip

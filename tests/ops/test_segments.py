import pytest
import torch
from torch import nan
from torch.testing import assert_close

from finealign_kernels.ops import _native
from finealign_kernels.ops.segments import (
    LAST,
    MEAN,
    SUM,
    segment_broadcast,
    segment_mean,
    segment_put_last,
    segment_sum,
)

native_only = pytest.mark.skipif(not _native.available(), reason=str(_native.reason))
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HALVES = [torch.bfloat16, torch.float16]
REDUCES, SPREADS = [segment_sum, segment_mean], [segment_broadcast, segment_put_last]


@pytest.fixture(params=["reference", pytest.param("native", marks=native_only)])
def backend(request):
    return request.param


def batch(lengths, dtype=torch.float32, seed=0):
    """x (N,), mask (N,) with NaN at what it leaves out, cu_seqlens (S + 1,)."""
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    x = torch.randn(int(cu_seqlens[-1]), generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.rand(x.shape[0], generator=generator) < 0.6
    return x, mask, cu_seqlens


def by_loop(name, source, cu_seqlens, mask=None):
    """float64, one segment after the other."""
    total, source = int(cu_seqlens[-1]), source.double()
    mask = torch.ones(total, dtype=torch.bool) if mask is None else mask
    scores, tokens = torch.zeros(cu_seqlens.shape[0] - 1, dtype=torch.float64), torch.zeros(total, dtype=torch.float64)
    for s in range(scores.shape[0]):
        kept = [t for t in range(int(cu_seqlens[s]), int(cu_seqlens[s + 1])) if mask[t]]
        if name in ("sum", "mean"):
            scores[s] = source[kept].sum() / (max(1, len(kept)) if name == "mean" else 1)
        else:
            tokens[kept if name == "broadcast" else kept[-1:]] = source[s]
    return scores if name in ("sum", "mean") else tokens


# ---- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_by_hand(backend, dtype, index):
    """Segments of 3, 0 and 2 tokens."""
    x, v = torch.tensor([1, 2, 3, 4, 6], dtype=dtype), torch.tensor([1, 2, 3], dtype=dtype)
    cu_seqlens = torch.tensor([0, 3, 3, 5], dtype=index)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for op, source, expected in (
        (segment_sum, x, torch.tensor([6, 0, 10], dtype=wide)),
        (segment_mean, x, torch.tensor([2, 0, 5], dtype=wide)),
        (segment_broadcast, v, torch.tensor([1, 1, 1, 3, 3], dtype=dtype)),
        (segment_put_last, v, torch.tensor([0, 0, 1, 0, 3], dtype=dtype)),
    ):
        assert_close(op(source, cu_seqlens, backend=backend), expected, rtol=0, atol=0)


def test_by_hand_with_a_mask(backend):
    """What the mask leaves out is not looked at: it holds NaN."""
    x, v = torch.tensor([1, nan, 3, 4, nan, nan]), torch.tensor([1.0, 2.0, 3.0, nan])
    mask, cu_seqlens = torch.tensor([True, False, True, True, False, False]), torch.tensor([0, 3, 3, 5, 6])
    for op, source, expected in (
        (segment_sum, x, torch.tensor([4.0, 0, 4, 0])),
        (segment_mean, x, torch.tensor([2.0, 0, 4, 0])),
        (segment_broadcast, v, torch.tensor([1.0, 0, 1, 3, 0, 0])),
        (segment_put_last, v, torch.tensor([0.0, 0, 1, 3, 0, 0])),
    ):
        assert_close(op(source, cu_seqlens, mask=mask, backend=backend), expected, rtol=0, atol=0)


def test_padded_by_hand(backend):
    x = torch.tensor([[1.0, 2, 3], [4, nan, nan]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    v = torch.tensor([5.0, 7.0])
    assert segment_sum(x, mask=mask, backend=backend).tolist() == [6, 4]
    assert segment_mean(x, mask=mask, backend=backend).tolist() == [2, 4]
    assert segment_mean(x[:1], backend=backend).tolist() == [2]
    assert segment_broadcast(v, mask=mask, backend=backend).tolist() == [[5, 5, 5], [7, 0, 0]]
    assert segment_put_last(v, mask=mask, backend=backend).tolist() == [[0, 0, 5], [7, 0, 0]]


# Around the 32 lanes, the chunk of 1024 tokens and the block of 32768 in which a sum is done; empty segments.
LENGTHS = {
    "short": [0, 1, 2, 31, 32, 33, 0, 63, 65, 0],
    "chunks": [1023, 1024, 1025, 0, 2047, 2048, 2049, 7],
    "long": [40_000, 0, 3, 70_001],
    "ones": [1] * 3000,
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LENGTHS)
def test_against_a_loop_in_float64(backend, name, dtype, masked):
    x, mask, cu_seqlens = batch(LENGTHS[name], dtype)
    mask = mask if masked else None
    size = by_loop("sum", x.abs(), cu_seqlens, mask)
    eps = 0 if dtype == torch.float64 else 2**-24  # the result is rounded once; additions are float64
    for op, word in ((segment_sum, "sum"), (segment_mean, "mean")):
        exact, actual = by_loop(word, x, cu_seqlens, mask), op(x, cu_seqlens, mask=mask, backend=backend)
        assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert ((actual.double() - exact).abs() <= eps * exact.abs() + 1e-13 * size).all()
    v = torch.randn(len(LENGTHS[name]), dtype=torch.float64).to(dtype)
    for op, word in ((segment_broadcast, "broadcast"), (segment_put_last, "put_last")):
        exact = by_loop(word, v, cu_seqlens, mask).to(dtype)
        assert torch.equal(op(v, cu_seqlens, mask=mask, backend=backend), exact)


def test_sums_and_means_are_rounded_once(backend):
    x = torch.full((100_000,), 1000.1)
    assert segment_sum(x[None], backend=backend) == (x[0].double() * 100_000).float()
    assert segment_mean(x[None], backend=backend) == x[0]


@native_only
def test_native_bits_are_a_matter_of_the_segment_alone():
    """The same whatever stands before it, how it is padded, how many threads there are. In float64, where the order of
    the additions shows."""
    threads = torch.get_num_threads()
    try:
        for length in (1, 31, 32, 700, 1024, 1500, 40_000):
            x = torch.randn(length, dtype=torch.float64)
            alone = [op(x[None]) for op in REDUCES]
            for before, padding in ((1, 0), (0, 5), (333, 1024), (70_000, 3)):
                whole = torch.full((before + length + padding,), nan, dtype=torch.float64)
                whole[before : before + length] = x
                cu_seqlens = torch.tensor([0, before, whole.shape[0]])
                for count in (1, 2):
                    torch.set_num_threads(count)
                    for op, expected in zip(REDUCES, alone, strict=True):
                        assert torch.equal(op(whole, cu_seqlens, mask=~whole.isnan())[1:], expected)
    finally:
        torch.set_num_threads(threads)


def test_packed_equals_padded(backend):
    lengths = torch.tensor([3, 0, 7, 5])
    mask = torch.arange(8) < lengths[:, None]
    padded = torch.where(mask, torch.randn(4, 8), nan)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    for op in REDUCES:
        assert torch.equal(op(padded, mask=mask, backend=backend), op(padded[mask], cu_seqlens, backend=backend))
    v = torch.randn(4)
    for op in SPREADS:
        out = op(v, mask=mask, backend=backend)
        assert torch.equal(out[mask], op(v, cu_seqlens, backend=backend)) and not out[~mask].any()


@native_only
@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_is_read_and_written_right(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    assert_close(segment_sum(every[:, None]), every.float(), rtol=0, atol=0, equal_nan=True)
    # Floats between two halves, on them, and halfway: ties go to even.
    v = torch.cat(
        [every.float(), every.float() * 1.0001, (every[1:].float() + every[:-1].float()) / 2, torch.randn(99)]
    )
    v = torch.cat([v, torch.tensor([65519.99, 65520, 1e30, -1e30, 2**-25, 2**-25 * 1.01, 3.4e38, torch.inf])])
    cu_seqlens = torch.arange(v.shape[0] + 1)
    out = torch.ops.finealign.segment_spread(v, None, cu_seqlens, SUM, v.shape[0], dtype)
    assert_close(out, v.to(dtype), rtol=0, atol=0, equal_nan=True)


# ---- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_twice(backend, masked):
    x, mask, cu_seqlens = batch([2, 0, 3, 1], torch.float64)
    v, options = torch.randn(4, dtype=torch.float64), dict(mask=mask if masked else None, backend=backend)
    for ops, source in ((REDUCES, x), (SPREADS, v)):
        for op in ops:
            source = source.clone().requires_grad_()
            call = lambda source, op=op: op(source, cu_seqlens, **options)  # noqa: E731
            assert torch.autograd.gradcheck(call, source) and torch.autograd.gradgradcheck(call, source)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_by_hand(backend, dtype):
    """Segments of 2, 0 and 1 tokens, and one whose last token is masked."""
    cu_seqlens, mask = torch.tensor([0, 2, 2, 3, 5]), torch.tensor([True, True, True, True, False])
    up = torch.tensor([3.0, 5, 7, 9], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    x = torch.tensor([1, 2, 3, 4, nan], dtype=dtype, requires_grad=True)
    options = dict(mask=mask, backend=backend)
    for op, expected in ((segment_sum, [3, 3, 7, 9, 0]), (segment_mean, [1.5, 1.5, 7, 9, 0])):
        (dx,) = torch.autograd.grad(op(x, cu_seqlens, **options), x, up)
        assert dx.dtype == dtype and dx.tolist() == expected
    v = torch.ones(4, dtype=dtype, requires_grad=True)
    up = torch.tensor([1, 2, 3, 4, nan], dtype=dtype)  # not looked at where the mask is false
    for op, expected in ((segment_broadcast, [3, 0, 3, 4]), (segment_put_last, [2, 0, 3, 4])):
        (dv,) = torch.autograd.grad(op(v, cu_seqlens, **options), v, up)
        assert dv.dtype == dtype and dv.tolist() == expected


def test_half_gradients_are_summed_wide(backend):
    v = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    (dv,) = torch.autograd.grad(
        segment_broadcast(v, torch.tensor([0, 1000]), backend=backend), v, torch.ones(1000, dtype=torch.bfloat16)
    )
    assert dv.item() == 1000  # in bfloat16 the count would stick at 256


def test_a_second_backward_repeats_the_first(backend):
    x, mask, cu_seqlens = batch([5, 0, 40])
    x.requires_grad_()
    for op in REDUCES:
        y = op(x, cu_seqlens, mask=mask, backend=backend)
        first, second = (torch.autograd.grad((y * y).sum(), x, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second) and first[mask].any()


def test_inputs_of_any_stride_and_left_alone(backend):
    x, mask, cu_seqlens = batch([5, 0, 40])
    wide_x, wide_mask, wide_cu = (
        t.repeat_interleave(2).requires_grad_(t.is_floating_point()) for t in (x, mask, cu_seqlens)
    )
    for op in REDUCES:
        expected = op(x, cu_seqlens, mask=mask, backend=backend)
        strided = op(wide_x[::2], wide_cu[::2], mask=wide_mask[::2], backend=backend)
        assert torch.equal(strided, expected)
        (dx,) = torch.autograd.grad(strided, wide_x, torch.ones(1).expand(3))
        assert not dx[1::2].any() and torch.equal(dx[::2] != 0, mask)
        assert torch.equal(
            op(x[:15].view(3, 5).t(), backend=backend), op(x[:15].view(3, 5).t().contiguous(), backend=backend)
        )
    for op in SPREADS:
        v = torch.randn(())
        assert torch.equal(op(v.expand(3), cu_seqlens, backend=backend), op(v.repeat(3), cu_seqlens, backend=backend))
    assert torch.equal(x, batch([5, 0, 40])[0])


# ---- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_nothing_padded(backend, shape):
    x, mask = torch.zeros(shape, requires_grad=True), torch.ones(shape, dtype=torch.bool)
    for op in REDUCES:
        y = op(x, mask=mask, backend=backend)
        assert torch.equal(y, torch.zeros(shape[0]))
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert dx.shape == shape
    for op in SPREADS:
        assert op(torch.ones(shape[0]), mask=mask, backend=backend).shape == shape


@pytest.mark.parametrize("segments", [0, 1, 3])
def test_no_token(backend, segments):
    cu_seqlens = torch.zeros(segments + 1, dtype=torch.int32)
    for op in REDUCES:
        assert torch.equal(op(torch.zeros(0), cu_seqlens, backend=backend), torch.zeros(segments))
    for op in SPREADS:
        v = torch.ones(segments, requires_grad=True)
        (dv,) = torch.autograd.grad(op(v, cu_seqlens, backend=backend).sum(), v)
        assert torch.equal(dv, torch.zeros(segments))


def test_all_masked_is_zero_and_connected(backend):
    x = torch.full((6,), nan, requires_grad=True)
    mask, cu_seqlens = torch.zeros(6, dtype=torch.bool), torch.tensor([0, 4, 6])
    for op in REDUCES:
        y = op(x, cu_seqlens, mask=mask, backend=backend)
        (dx,) = torch.autograd.grad(y, x, torch.tensor([1.0, 2.0]))
        assert not y.any() and not dx.any()


def test_infinity_and_nan_stay_in_their_segment(backend):
    x = torch.tensor([1.0, 2.0, nan, torch.inf, 5.0])
    assert_close(
        segment_sum(x, torch.tensor([0, 2, 3, 4, 5]), backend=backend),
        torch.tensor([3.0, nan, torch.inf, 5.0]),
        equal_nan=True,
    )


@native_only
def test_everything_is_written():
    """Allocations of torch, in C++ too, hold NaN while deterministic mode fills them."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for lengths in LENGTHS.values():
            x, mask, cu_seqlens = batch(lengths)
            v = torch.ones(len(lengths))
            for over in (SUM, MEAN, LAST):
                for m in (None, mask):
                    assert not torch.ops.finealign.segment_reduce(x, m, cu_seqlens, over).isnan().any()
                    out = torch.ops.finealign.segment_spread(v, m, cu_seqlens, over, x.shape[0], x.dtype)
                    assert not out.isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


# ---- refusals ------------------------------------------------------------------------------------------------------

X, MASK, CU = torch.zeros(5), torch.ones(5, dtype=torch.bool), torch.tensor([0, 3, 5])


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (
            lambda: segment_sum(X, torch.tensor([1, 5])),
            ValueError,
            r"cu_seqlens must start at 0, got cu_seqlens\[0\] = 1",
        ),
        (
            lambda: segment_sum(X, torch.tensor([0, 4, 2, 5])),
            ValueError,
            r"cu_seqlens must not decrease, got cu_seqlens\[2\] = 2 after 4",
        ),
        (
            lambda: segment_mean(X, torch.tensor([0, 4])),
            ValueError,
            r"cu_seqlens must end at the number of tokens 5, got cu_seqlens\[1\] = 4",
        ),
        (lambda: segment_sum(X, torch.tensor([0])), ValueError, "end at the number of tokens 5"),
        (lambda: segment_sum(X, torch.tensor([], dtype=torch.int64)), ValueError, r"shape \(S \+ 1,\), got \(0,\)"),
        (lambda: segment_sum(X, CU.float()), TypeError, "cu_seqlens must have dtype int32 or int64, got torch.float32"),
        (lambda: segment_sum(X, [0, 5]), TypeError, "cu_seqlens must be a tensor, got a list"),
        (lambda: segment_sum(X, CU.to("meta")), ValueError, "cu_seqlens must be on cpu, got meta"),
        (lambda: segment_sum(X), ValueError, r"x must be \(B, T\) where cu_seqlens is not given, got \(5,\)"),
        (
            lambda: segment_sum(X[None], CU),
            ValueError,
            r"x must be flat \(N,\) where cu_seqlens is given, got \(1, 5\)",
        ),
        (lambda: segment_sum(X.long(), CU), TypeError, "x must have dtype float32 or .*, got torch.int64"),
        (lambda: segment_sum(X, CU, mask=MASK.float()), TypeError, "mask must have dtype bool or"),
        (lambda: segment_sum(X, CU, mask=MASK[:4]), ValueError, r"mask must have shape \(5,\), got \(4,\)"),
        (lambda: segment_sum(X, CU, backend="triton"), ValueError, "backend must be 'auto', 'reference' or 'native'"),
        (
            lambda: segment_broadcast(X[:2], torch.tensor([0, 3, 2])),
            ValueError,
            r"not decrease, got cu_seqlens\[2\] = 2",
        ),
        (lambda: segment_broadcast(X[:2], CU, total=6), ValueError, r"number of tokens 6, got cu_seqlens\[2\] = 5"),
        (lambda: segment_broadcast(X, CU), ValueError, r"v must have shape \(2,\), got \(5,\)"),
        (
            lambda: segment_broadcast(X[:2]),
            ValueError,
            r"mask must be \(S, T\) where cu_seqlens is not given, got None",
        ),
        (lambda: segment_put_last(X[:2], mask=MASK), ValueError, r"mask must be \(S, T\) .*, got \(5,\)"),
        (
            lambda: segment_put_last(X[:2], CU, mask=MASK[None]),
            ValueError,
            r"mask must have shape \(5,\), got \(1, 5\)",
        ),
        (lambda: segment_put_last(X[:2].int(), CU), TypeError, "v must have dtype float32"),
    ],
)
def test_refusals(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_native_by_name_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(_native, "reason", "the extension is not built")
    with pytest.raises(RuntimeError, match="'native' cannot run here: the extension is not built"):
        segment_sum(X, CU, backend="native")
    assert segment_sum(X, CU).tolist() == [0, 0]


@native_only
@pytest.mark.parametrize("ends", [[1, 5], [0, 4, 2, 5], [0, 4], [0, 1 << 40, 5], [0, -3, 5], [0]])
def test_the_op_itself_refuses_bad_cu_seqlens(ends):
    """A compiled graph skips the checks in Python; the op must not read or write out of bounds."""
    cu_seqlens = torch.tensor(ends)
    with pytest.raises(RuntimeError, match="cu_seqlens must"):
        torch.ops.finealign.segment_reduce(X, None, cu_seqlens, SUM)
    with pytest.raises(RuntimeError, match="cu_seqlens must"):
        torch.ops.finealign.segment_spread(torch.ones(len(ends) - 1), None, cu_seqlens, SUM, 5, torch.float32)


# ---- torch.library -------------------------------------------------------------------------------------------------


@native_only
@pytest.mark.parametrize("over", [SUM, MEAN, LAST])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, over):
    x, mask, cu_seqlens = batch([3, 0, 5], dtype)
    v = torch.ones(3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for m in (None, mask):
        torch.library.opcheck(torch.ops.finealign.segment_reduce.default, (x, m, cu_seqlens, over))
        torch.library.opcheck(torch.ops.finealign.segment_spread.default, (v, m, cu_seqlens, over, 8, dtype))


@native_only
def test_compiles_without_a_break():
    x, mask, cu_seqlens = batch([3, 0, 5])
    x.requires_grad_()

    def loss(x, cu_seqlens, mask):
        mean = segment_mean(x, cu_seqlens, mask=mask)
        return (
            segment_broadcast(mean, cu_seqlens, mask=mask) * segment_put_last(mean, cu_seqlens, total=x.shape[0])
        ).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([3, 0, 5], [7, 1, 2, 9]):
        x, mask, cu_seqlens = batch(lengths)
        x.requires_grad_()
        values = [f(x, cu_seqlens, mask) for f in (loss, compiled)]
        assert_close(values[0], values[1])
        assert_close(*(torch.autograd.grad(value, x)[0] for value in values))


# ---- on a GPU ------------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LENGTHS)
def test_gpu_bits_are_the_cpus(name, dtype):
    x, mask, cu_seqlens = batch(LENGTHS[name], dtype)
    v = torch.randn(len(LENGTHS[name]), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for m in (None, mask):
        for over in (SUM, MEAN, LAST):
            for op, args in (
                ("reduce", (x, m, cu_seqlens, over)),
                ("spread", (v, m, cu_seqlens, over, x.shape[0], dtype)),
            ):
                op = getattr(torch.ops.finealign, f"segment_{op}")
                there = op(*(a.cuda() if isinstance(a, torch.Tensor) else a for a in args))
                assert torch.equal(there.cpu(), op(*args))


@gpu
@pytest.mark.gpu
def test_gpu_graph_stream_and_no_sync():
    x, mask, cu_seqlens = (t.cuda() for t in batch(LENGTHS["chunks"]))
    expected = segment_mean(x, cu_seqlens, mask=mask)
    graph, out = torch.cuda.CUDAGraph(), None
    with torch.cuda.graph(graph):  # captures on a stream of its own; a launch elsewhere or a sync would fail
        out = segment_broadcast(segment_mean(x, cu_seqlens, mask=mask), cu_seqlens, total=x.shape[0])
    graph.replay()
    assert torch.equal(out, segment_broadcast(expected, cu_seqlens, total=x.shape[0]))


@gpu
@pytest.mark.gpu
def test_gpu_refusals(monkeypatch):
    cu_seqlens = torch.tensor([0, 3, 4]).cuda()
    assert segment_sum(X.cuda(), cu_seqlens).isnan().tolist() == [False, True]
    with pytest.raises(ValueError, match="total must be given"):
        segment_broadcast(X[:2].cuda(), cu_seqlens)
    with pytest.raises(ValueError, match="cu_seqlens must be on cuda:0, got cpu"):
        segment_sum(X.cuda(), CU)
    monkeypatch.setenv("FINEALIGN_DEBUG", "1")
    with pytest.raises(ValueError, match="cu_seqlens must end at"):
        segment_sum(X.cuda(), cu_seqlens)

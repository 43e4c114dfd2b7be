"""Device code of kernels/cuda: run on the CPU in several thread orders (tests/emu), compiled for every GPU named."""

import ctypes
import itertools
import math
import re
import subprocess

import pytest
import torch
from cuda_host import ARCHS, CUDA, DTYPES, NVCC, ORDERS, ROOT, DeviceFailure, Zoned, on_host, with_nvcc

SUM, MEAN, LAST = OVER = (0, 1, 2)


def run(lib, which, source, mask, cu_seqlens, total, over, dtype, each=1, order=0, pad=float("nan")):
    """One launch on the host: reduce (total,) -> (S,) or spread (S,) -> (total,), every buffer between red zones."""
    count, wide = cu_seqlens.shape[0] - 1, torch.float64 if dtype == torch.float64 else torch.float32
    source, ends = Zoned(source, pad), Zoned(cu_seqlens, 1 << 20)
    mask = None if mask is None else Zoned(mask.to(torch.uint8), 1)
    shape, out_dtype = (count, wide) if which == "reduce" else (total, dtype)
    out = Zoned(torch.full((shape,), -77.0, dtype=out_dtype), -99.0)
    code = getattr(lib, f"emu_segment_{which}")(
        source.pointer,
        DTYPES[dtype],
        mask and mask.pointer,
        ends.pointer,
        ctypes.c_bool(cu_seqlens.dtype == torch.int64),
        ctypes.c_int64(count),
        ctypes.c_int64(total),
        over,
        out.pointer,
        each,
        order,
        ctypes.c_uint(7),
    )
    if code:
        raise DeviceFailure
    assert out.zones_untouched()
    return out.inner


def expected(which, source, mask, cu_seqlens, total, over, dtype):
    """The bits of the native CPU kernels, which test_segments.py holds to float64."""
    if which == "reduce":
        return torch.ops.finealign.segment_reduce(source, mask, cu_seqlens, over)
    return torch.ops.finealign.segment_spread(source, mask, cu_seqlens, over, total, dtype)


# Lengths around a warp, a chunk (1024) and a round of a block's warps (8192); empty segments at both ends and inside.
BATCHES = {
    "none": [],
    "empty": [0, 0],
    "mixed": [0, 1, 31, 32, 33, 0, 257, 1023, 1024, 1025, 2049, 0, 5003, 2, 0],
    "rounds": [4096, 8192, 8193, 7],
    "long": [100_000],
}


def batch(lengths, dtype, masked, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    total = int(cu_seqlens[-1])
    x = torch.randn(total, generator=generator, dtype=torch.float64).mul(3).to(dtype)
    mask = None
    if masked:
        mask = torch.rand(total, generator=generator) < 0.7
        mask[total - min(total, 2) :] = len(lengths) < 2  # in "mixed" a whole segment
        x[~mask] = torch.nan
    return x, mask, cu_seqlens, total


def check(lib, name, dtype):
    """Every launch equal to what is expected, whatever the thread order, the index type and the segments per block;
    0 of them: long ones are cut into pieces that blocks share."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for masked, over in itertools.product((False, True), OVER):
        x, mask, cu_seqlens, total = batch(BATCHES[name], dtype, masked)
        v = torch.linspace(-3, 3, cu_seqlens.shape[0] - 1, dtype=wide)
        for which, source in (("reduce", x), ("spread", v)):
            exact = expected(which, source, mask, cu_seqlens, total, over, dtype)
            for (walk, order), whole in itertools.product(ORDERS.items(), (True, False)):
                ends, each = (cu_seqlens.int(), 11) if walk == "backward" else (cu_seqlens, 1)
                actual = run(lib, which, source, mask, ends, total, over, dtype, each if whole else 0, order)
                assert torch.equal(actual, exact), (which, masked, over, walk, whole)


@pytest.fixture
def lib(host):
    return host("segments")


@on_host
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_segments_on_the_host(lib, name, dtype):
    check(lib, name, dtype)


def check_bad_cu_seqlens(lib):
    batches = [(ends, 1) for ends in ([1, 4, 8], [0, 4, 7], [-3, 4, 8], [0, 4, 60], [0, 6, 3, 8], [0, 60, 8])]
    # one of the last has a long segment that is valid, the other a slot far outside
    for ends, scale in (*batches, ([1, 4, 8], 700), ([0, -300, 8], 700)):
        cu_seqlens, total = torch.tensor(ends) * scale, 8 * scale
        count = len(ends) - 1
        bad = torch.tensor([a < 0 or a > b or b > 8 for a, b in zip(ends, ends[1:], strict=False)])
        bad[0] |= ends[0] != 0
        bad[-1] |= ends[-1] != 8
        for over, each, mask in itertools.product(OVER, (0, 1), (None, torch.ones(total, dtype=torch.bool))):
            rest = (mask, cu_seqlens, total, over, torch.float32, each)
            y = run(lib, "reduce", torch.ones(total), *rest, pad=5.0)
            assert torch.equal(y.isnan(), bad)
            x = run(lib, "spread", torch.ones(count), *rest, pad=5.0)
            assert not (x == -77).any() and x.isnan().any() == (bad.any() and ends != [0, 6, 3, 8])


@on_host
def test_bad_cu_seqlens_give_nan_and_touch_nothing_else(lib):
    check_bad_cu_seqlens(lib)


# ---- sequence losses ------------------------------------------------------------------------------------------------

SIDES = [  # pairs, form, phi, first: every function of the margin and every form
    *((pairs, 0, phi, 0) for pairs, phi in ((1, 0), (2, 1), (0, 2), (1, 3), (2, 4), (0, 5), (0, 6), (1, 7), (1, 8))),
    (1, 1, 5, 9),
    (2, 2, 0, 10),
    (0, 2, 1, 0),
]
LAYOUTS = {
    "ragged": [0, 1, 31, 32, 33, 0, 1023, 1024, 1025, 4096, 7, 0],
    "rounds": [8192, 8193, 7, 9000],
    "long": [100_000, 3],
    "padded": 37,
    "ones": 1,
}


def sequences(layout, dtype, seed=0):
    """logp, ref_logp, mask, token_weight of a batch, with NaN at what is left out, and cu_seqlens, None if padded."""
    generator = torch.Generator().manual_seed(seed)
    lengths = LAYOUTS[layout]
    padded = isinstance(lengths, int)
    shape = (10, lengths) if padded else (sum(lengths),)
    logp, ref, weight = (-torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(shape, generator=generator) < 0.8
    weight = torch.where(torch.rand(shape, generator=generator) < 0.2, 0, -weight)
    for left_out in (logp, ref, weight):
        left_out[~mask] = torch.nan
    logp[weight == 0] = torch.nan
    cu_seqlens = None if padded else torch.tensor([0, *lengths]).cumsum(0)
    wide = torch.promote_types(dtype, torch.float32)
    return logp.to(dtype), ref.to(dtype), mask, weight.to(wide), cu_seqlens


def forward_on_host(lib, x, ref, ref_sum, mask, weight, ends, average, pairs, form, phi, first, beta, scale, shift,
                    shifts, hyper, hypers, sign, each=1, order=0):  # fmt: skip
    """sequence_loss_fwd with every buffer between red zones."""
    count = x.shape[0] if ends is None else ends.shape[0] - 1
    wide = torch.promote_types(x.dtype, torch.float32)
    inputs = [
        t if t is None else Zoned(t.reshape(-1).to(torch.uint8) if t.dtype == torch.bool else t.reshape(-1), pad)
        for t, pad in ((x, torch.nan), (ref, torch.nan), (ref_sum, torch.nan), (mask, 1), (weight, torch.nan),
                       (ends, 1 << 20), (shifts, torch.nan), (hypers, torch.nan), (sign, torch.nan))
    ]  # fmt: skip
    x_, ref_, ref_sum_, mask_, weight_, ends_, shifts_, hypers_, sign_ = (t and t.pointer for t in inputs)
    sizes = (count // 2 if pairs else count, count, count, count if average else 0)
    outs = [Zoned(torch.full((size,), -77.0, dtype=wide), -99.0) for size in sizes]
    double = ctypes.c_double
    code = lib.emu_sequence_forward(
        x_, ref_, ref_sum_, mask_, weight_, ends_, ctypes.c_bool(ends is None or ends.dtype == torch.int64),
        ctypes.c_int64(count), ctypes.c_int64(x.numel()), DTYPES[x.dtype], average, pairs, form, phi, first,
        double(beta), double(scale), double(shift), shifts_, double(hyper), hypers_, sign_,
        *(out.pointer for out in outs[:3]), outs[3].pointer if average else None, each, order, ctypes.c_uint(7),
    )  # fmt: skip
    if code:
        raise DeviceFailure
    assert all(out.zones_untouched() for out in outs)
    return [out.inner for out in outs]


def backward_on_host(lib, upstream, slope, denominator, mask, weight, ends, pairs, size, dtype, each=1, order=0):
    """sequence_loss_bwd, the same."""
    count = slope.shape[0]
    total = size if ends is not None else count * size
    flat = [t if t is None else Zoned(t.reshape(-1), torch.nan) for t in (upstream, slope, denominator, weight)]
    upstream_, slope_, denominator_, weight_ = (t and t.pointer for t in flat)
    mask_, ends_ = mask is not None and Zoned(mask.reshape(-1).to(torch.uint8), 1), ends is not None and Zoned(ends, 99)
    out = Zoned(torch.full((total,), -77.0, dtype=dtype), -99.0)
    code = lib.emu_sequence_backward(
        upstream_, ctypes.c_int64(1), slope_, denominator_, mask_.pointer if mask_ else None, weight_,
        ends_.pointer if ends_ else None, ctypes.c_bool(ends is None or ends.dtype == torch.int64),
        ctypes.c_int64(count), ctypes.c_int64(total), DTYPES[dtype], pairs, out.pointer, each, order, ctypes.c_uint(7),
    )  # fmt: skip
    if code:
        raise DeviceFailure
    assert out.zones_untouched()
    return out.inner


def numbers_of(case, count):
    """beta, scale, shift, shifts, hyper, hypers, sign that suit a case of SIDES."""
    pairs, form, phi, _ = case
    items = count // 2 if pairs else count
    each = torch.linspace(-0.5, 0.5, items, dtype=torch.float64) if form == 0 else None
    hypers = torch.linspace(0.1, 0.4, items, dtype=torch.float64) if phi in (1, 3) else None
    sign = None if pairs else torch.where(torch.arange(items) % 3 == 0, 1.0, -1.0).double()
    return 0.7, 1.5, 0.2, each, 0.3, hypers, sign


def check_sequences(lib, layout, dtype, cases=SIDES):
    """Bits of the native CPU kernels, which test_sequence_loss.py holds to float64."""
    x, ref, mask, weight, ends = sequences(layout, dtype)
    count = x.shape[0] if ends is None else ends.shape[0] - 1
    whole = (x.nan_to_num(), ref.nan_to_num())
    for n, case in enumerate(cases):
        average, order, each = n % 3, n % 3, (0, 3, 8, 1)[n % 4]
        rest = (average, *case, *numbers_of(case, count))
        ends_ = ends.int() if ends is not None and n % 2 else ends
        sums = torch.linspace(-1, 1, count, dtype=weight.dtype)
        for inputs in (
            (x, ref, None, mask, weight),
            (x.where(mask, torch.nan).where(weight.isnan(), whole[0]).where(mask, torch.nan), None, sums, mask, None),
            (*whole, None, None, None),
        ):
            exact = torch.ops.finealign.sequence_loss_fwd(*inputs, ends_, *rest)
            actual = forward_on_host(lib, *inputs, ends_, *rest, each=each, order=order)
            assert all(torch.equal(a, b) for a, b in zip(actual, exact, strict=True)), (case, average, order)
            assert not exact[0].isnan().any()
            upstream = torch.linspace(-1, 2, exact[0].shape[0], dtype=weight.dtype)
            upstream[:1] = 0
            size = x.shape[-1] if ends is None else x.shape[0]
            given = (upstream, exact[2], exact[3] if average else None, inputs[3], inputs[4], ends_, case[0], size)
            dlogp = torch.ops.finealign.sequence_loss_bwd(*given, dtype)
            assert torch.equal(backward_on_host(lib, *given, dtype, each=each, order=order), dlogp.reshape(-1)), case


def check_bad_bounds_of_sequences(lib):
    wrong = ([1, 4, 8], [0, 4, 7], [-3, 4, 8], [0, 4, 60], [0, 60, 8])
    for ends, each in itertools.product(wrong, (0, 1)):
        cu_seqlens = torch.tensor(ends)
        bad = torch.tensor([a < 0 or a > b or b > 8 for a, b in zip(ends, ends[1:], strict=False)])
        bad[0] |= ends[0] != 0
        bad[-1] |= ends[-1] != 8
        numbers = (1, 0, 0, 0, 0, 1.0, 1.0, 0.0, None, 0.0, None, None)
        losses, score, slope, _ = forward_on_host(
            lib, torch.ones(8), None, None, None, None, cu_seqlens, *numbers, each=each
        )
        assert torch.equal(losses.isnan(), bad) and torch.equal(score.isnan(), bad)
        dlogp = backward_on_host(
            lib, torch.ones(2), torch.ones(2), None, None, None, cu_seqlens, 0, 8, torch.float32, each
        )
        assert not (dlogp == -77).any() and dlogp.isnan().any()


@pytest.fixture
def sequence_lib(host):
    return host("sequence_loss")


@on_host
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sequence_losses_on_the_host(sequence_lib, layout, dtype):
    check_sequences(sequence_lib, layout, dtype, SIDES if layout in ("ragged", "ones") else SIDES[::4])


@on_host
def test_sequences_of_bad_cu_seqlens_give_nan_and_touch_nothing_else(sequence_lib):
    check_bad_bounds_of_sequences(sequence_lib)


# ---- policy losses -------------------------------------------------------------------------------------------------

POLICIES = [  # psi, ratio, estimator, share, kept, count_empty, by row, options
    (0, 0, 4, 0, True, True, False, {}),
    (1, 0, 0, 1, True, False, False, {"dual": 1.5}),
    (2, 0, 1, 2, False, False, True, {"denominator": 3.0}),
    (3, 0, 2, 1, False, True, True, {"max_length": torch.tensor(9.0, dtype=torch.float64)}),
    (0, 1, 3, 1, True, True, True, {"entropy_denominator": 4.0, "dual": 1.2}),
    (0, 2, 4, 1, False, True, True, {"denominator": torch.tensor(5.0, dtype=torch.float64), "by_token": False}),
    (0, 1, 4, 0, True, True, False, {"kl_coef": 0.0, "entropy_coef": 0.0}),
]
BARE = (0, 0, 0, 0, False, True, False, {"bare": True})
POLICY_LAYOUTS = {**LAYOUTS, "many": [1, 0] * 40}  # rows of one chunk that its lanes have to walk


def policy_arguments(layout, dtype, case, seed=0):
    """Arguments of policy_loss_fwd, with NaN where the mask is false."""
    psi, ratio, estimator, share, kept, count_empty, by_row, more = case
    generator = torch.Generator().manual_seed(seed)
    lengths, wide = POLICY_LAYOUTS[layout], torch.promote_types(dtype, torch.float32)
    shape = (10, lengths) if isinstance(lengths, int) else (sum(lengths),)
    ends = None if isinstance(lengths, int) else torch.tensor([0, *lengths]).cumsum(0)
    count = shape[0] if ends is None else len(lengths)
    draw = torch.randn((7, *shape), generator=generator, dtype=torch.float64)
    mask = torch.rand(shape, generator=generator) < 0.8
    draw[:2] *= 0.4
    draw[4][draw[4].abs() < 0.1] = 0
    draw[5:] = draw[5:].abs() * (draw[5:] > -1)
    draw[:, ~mask] = torch.nan
    tokens, numbers = [x.to(dtype) for x in draw[:4]], [x.to(wide) for x in draw[4:]]
    if "bare" in more:
        tokens, numbers, mask = [tokens[0].nan_to_num(), None, None, None], [numbers[0].nan_to_num(), None, None], None
    if by_row:
        numbers[0], numbers[2] = torch.linspace(-2, 2, count, dtype=wide), torch.linspace(0, 2, count, dtype=wide)
    options = [more.get("kl_coef", 0.1), 0.0 if "bare" in more else more.get("entropy_coef", 0.05)]
    given = [more.get(name) for name in ("denominator", "max_length", "entropy_denominator")]
    given = [(0.0, x) if isinstance(x, torch.Tensor) else (x or 0.0, None) for x in given]
    bounds = (0.8, 1.2, more.get("dual", math.inf), 0.8, 1.2)
    return (
        *tokens, *numbers, mask, ends, by_row, by_row, psi, ratio, *bounds, estimator, *options, share, kept,
        count_empty, *given[0], *given[1], more.get("by_token", True), *given[2],
    )  # fmt: skip


def policy_on_host(lib, arguments, each=1, order=0):
    """policy_loss_fwd with every buffer between red zones, and its room full of NaN."""
    (x, old, ref, entropy, advantage, weight, sampler, mask, ends, advantage_by_row, sampler_by_row, psi, ratio,
     *bounds, estimator, kl_coef, entropy_coef, share, kept, count_empty, denominator, denominator_at, longest,
     longest_at, by_token, of_entropy, of_entropy_at) = arguments  # fmt: skip
    wide, total = torch.promote_types(x.dtype, torch.float32), x.numel()
    count = x.shape[0] if ends is None else ends.shape[0] - 1
    chunks, moves = -(-total // 1024), entropy is not None and entropy_coef != 0
    slots = total // 1024 + count
    tensors = (ends, mask, x, old, ref, entropy, advantage, weight, sampler, denominator_at, longest_at, of_entropy_at)
    flat = [
        t if t is None else t.reshape(-1).to(torch.uint8) if t.dtype == torch.bool else t.reshape(-1) for t in tensors
    ]
    pads = (1 << 20, 1, *[torch.nan] * 10)
    inputs = [None if t is None else Zoned(t, pad) for t, pad in zip(flat, pads, strict=True)]
    sizes = (1, 8, total, total, total if moves else 0)
    outs = [Zoned(torch.full((size,), -77.0, dtype=wide), -99.0) for size in sizes]
    room = [
        Zoned(torch.full((n,), torch.nan, dtype=torch.float64), -99.0) for n in (3 * count, 9 * chunks, 4, 3 * slots)
    ]
    pointers = [t and t.pointer for t in inputs] + [t.pointer for t in outs] + [t.pointer for t in room]
    if not moves:
        pointers[16] = None
    integers = (
        ends is not None and ends.dtype == torch.int64, count, total, total // count if ends is None and count else 0,
        DTYPES[x.dtype], advantage_by_row, sampler_by_row and sampler is not None, psi, ratio, estimator, share,
        kept and weight is not None, count_empty, by_token,
    )  # fmt: skip
    numbers = (*bounds, kl_coef, entropy_coef, denominator, longest, of_entropy)
    code = lib.emu_policy_forward(
        (ctypes.c_void_p * 21)(*pointers),
        (ctypes.c_int64 * 14)(*integers),
        (ctypes.c_double * 10)(*numbers),
        ctypes.c_int64(each),
        order,
        ctypes.c_uint(7),
    )
    if code:
        raise DeviceFailure
    assert all(buffer.zones_untouched() for buffer in (*outs, *room))
    return [out.inner for out in outs]


def policy_backward_on_host(lib, upstream, d, dtype, blocks, order):
    source, up, out = (
        Zoned(d, torch.nan),
        Zoned(upstream.reshape(1), torch.nan),
        Zoned(torch.zeros_like(d).to(dtype), -99.0),
    )
    code = lib.emu_policy_backward(
        up.pointer,
        source.pointer,
        out.pointer,
        DTYPES[dtype],
        ctypes.c_int64(d.numel()),
        blocks,
        order,
        ctypes.c_uint(7),
    )
    if code:
        raise DeviceFailure
    assert out.zones_untouched()
    return out.inner


def check_policies(lib, layout, dtype, cases=(*POLICIES, BARE)):
    """Bits of the native CPU kernels, which test_policy_loss.py holds to float64."""
    for n, case in enumerate(cases):
        order, each = n % 3, (0, 3, 8, 1)[n % 4]
        arguments = policy_arguments(layout, dtype, case, n)
        exact = torch.ops.finealign.policy_loss_fwd(*arguments)
        actual = policy_on_host(lib, arguments, each, order)
        for place, (a, b) in enumerate(zip(actual, exact, strict=True)):
            assert torch.equal(a, b.reshape(-1)), (case, place, a, b)
        assert not any(x.isnan().any() for x in exact)
        upstream = torch.tensor(-1.7, dtype=exact[0].dtype)
        expected = torch.ops.finealign.policy_loss_bwd(upstream, exact[3], dtype).reshape(-1)
        blocks = max(1, -(-expected.numel() // 256) - n % 2)  # all at once, or one walks on
        assert torch.equal(policy_backward_on_host(lib, upstream, exact[3].reshape(-1), dtype, blocks, order), expected)


def check_bad_bounds_of_policies(lib):
    """The loss and the gradients of all tokens are NaN, whichever bound is wrong."""
    for ends in ([1, 4, 8], [0, 4, 7], [-3, 4, 8], [0, 4, 60], [0, 60, 8], [0, 6, 3, 8], [0, 4, 8]):
        cu_seqlens = torch.tensor(ends)
        bad = ends != [0, 4, 8]
        for case in (POLICIES[0], POLICIES[4]):
            arguments = list(policy_arguments("padded", torch.float32, case))
            each = torch.ones(len(ends) - 1)
            arguments[:7] = [x if x is None else torch.full((8,), 0.5) for x in arguments[:7]]
            if case[6]:
                arguments[4], arguments[6] = each, each
            arguments[7:9] = None, cu_seqlens
            loss, _, losses, dlogp, dentropy = policy_on_host(lib, arguments, each=len(ends) % 2)
            assert loss.isnan().all() == bad
            assert dlogp.isnan().all() == dentropy.isnan().all() == bad and not (losses == -77).any()


@pytest.fixture
def policy_lib(host):
    return host("policy_loss")


@on_host
@pytest.mark.parametrize("layout", POLICY_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_policy_losses_on_the_host(policy_lib, layout, dtype):
    check_policies(policy_lib, layout, dtype)


@on_host
def test_policies_of_bad_cu_seqlens_are_nan(policy_lib):
    check_bad_bounds_of_policies(policy_lib)


# ---- for GPUs -----------------------------------------------------------------------------------------------


# The others are compiled by bench/compile_gate.py, which holds them to more rules, in each run of CI.
COMPILED = [arch if arch == "90a" else pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHS]


@with_nvcc
@pytest.mark.parametrize("arch", COMPILED)
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ids=lambda path: path.stem)
def test_compiles_without_spills_or_atomics(source, arch, tmp_path):
    ptx, flags = tmp_path / "code.ptx", ["-std=c++17", "-O3", "-I", ROOT / "csrc", "-I", CUDA]
    subprocess.run([NVCC, *flags, f"-arch=compute_{arch}", "-ptx", source, "-o", ptx], check=True)
    assembled = subprocess.run(
        [NVCC, f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin", ptx, "-o", tmp_path / "code.cubin"],
        check=True,
        capture_output=True,
        text=True,
    )
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", assembled.stderr)]
    assert spills and not any(spills), assembled.stderr
    assert not re.findall(r"^\s*(?:@\S+\s+)?(?:atom|red)\.\S+", ptx.read_text(), re.M)

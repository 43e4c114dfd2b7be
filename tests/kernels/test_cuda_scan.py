"""kernels/cuda/scan.cuh run on the CPU (tests/emu), against the native CPU ops that test_scan.py holds to float64."""

import ctypes

import pytest
import test_cuda_host
import torch
from cuda_host import DTYPES, ORDERS, DeviceFailure, Zoned, on_host
from torch.testing import assert_close

F32, F64 = torch.float32, torch.float64
pytestmark = on_host
# around a lane's 4 tokens, a warp's 128, a block's 1024, a piece's 4096
BATCHES = {**test_cuda_host.BATCHES, "long": [20_011]}
Pointer, Int = ctypes.c_void_p, ctypes.c_int64


class Fields(ctypes.Structure):
    """A struct of csrc/launch.h: what is not named is 0."""

    def __init__(self, **fields):
        unknown = set(fields) - {name for name, _ in self._fields_}
        assert not unknown, unknown
        super().__init__(**fields)


class Segments(Fields):
    _fields_ = [("cu_seqlens", Pointer), ("wide", ctypes.c_bool), ("count", Int), ("total", Int), ("mask", Pointer)]
    _fields_ += [("width", Int)]


class Scan(Fields):
    _fields_ = [("segments", Segments), ("longest", Int), ("forward", ctypes.c_bool), ("dtype", ctypes.c_int32)]
    _fields_ += [("x", Pointer), ("decay", Pointer), ("rates", Pointer), ("rate_stride", Int), ("out", Pointer)]


class SegmentRewards(Fields):
    _fields_ = [("models", Int), ("reward", Pointer), ("end", Pointer), ("start", Pointer), ("bounds", Pointer)]
    _fields_ += [("overwrite", ctypes.c_bool), ("drop", ctypes.c_bool)]


class Whitening(Fields):
    _fields_ = [("moments", Pointer), ("scale", ctypes.c_int32), ("unbiased", ctypes.c_bool), ("shift", ctypes.c_bool)]


class Advantages(Fields):
    _fields_ = [("segments", Segments), ("longest", Int), ("dtype", ctypes.c_int32), ("rewards", Pointer)]
    _fields_ += [("segment_rewards", SegmentRewards), ("old_logp", Pointer), ("ref_logp", Pointer)]
    _fields_ += [("estimator", ctypes.c_int32), ("kl_coef", ctypes.c_double), ("shaped", Pointer), ("kl", Pointer)]
    _fields_ += [("reward_moments", Pointer), ("whiten_rewards", Whitening), ("values", Pointer), ("gamma", Pointer)]
    _fields_ += [("lam", Pointer), ("bootstrap", Pointer), ("gamma_stride", Int), ("lam_stride", Int)]
    _fields_ += [("zero", ctypes.c_bool), ("advantages", Pointer), ("returns", Pointer)]
    _fields_ += [("pivots_first", ctypes.c_bool), ("advantage_moments", Pointer), ("whiten_advantages", Whitening)]
    _fields_ += [("whitened", Pointer), ("score", Pointer), ("baseline", ctypes.c_double), ("token_weight", Pointer)]


class How(Fields):
    _fields_ = [("each", ctypes.c_int), ("order", ctypes.c_int), ("seed", ctypes.c_uint)]


class Batch:
    """Tokens between red zones, NaN where the mask leaves them out."""

    def __init__(self, lengths, dtype, masked, index=torch.int64, seed=0):
        self.random = torch.Generator().manual_seed(seed)
        self.dtype, self.given, self.outs = dtype, [], []
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(index)
        self.count, self.total = len(lengths), int(self.cu_seqlens[-1])
        self.mask = None
        if masked:
            self.mask = torch.rand(self.total, generator=self.random) < 0.7
            self.mask[: self.total // 5] = True  # whole spans without a hole
            self.mask[self.total - min(self.total, 140) :] = len(lengths) < 2  # and whole ones of holes

    def tokens(self, scale=1.0):
        x = (scale * torch.randn(self.total, generator=self.random, dtype=F64)).to(self.dtype)
        return x if self.mask is None else x.where(self.mask, torch.nan)

    def numbers(self, low, high, size=None):
        size = self.count if size is None else size
        return low + (high - low) * torch.rand(size, generator=self.random, dtype=F64)

    def at(self, x, pad=float("nan")):
        """Pointer to a copy of x."""
        if x is None:
            return None
        self.given.append(Zoned(x, pad))
        return self.given[-1].pointer

    def out(self, size=None, dtype=None):
        size, dtype = self.total if size is None else size, dtype or self.dtype
        self.outs.append(Zoned(torch.full((size,), -77.0, dtype=dtype), -99.0))
        return self.outs[-1]

    def segments(self):
        mask = None if self.mask is None else self.mask.to(torch.uint8)
        ends = self.at(self.cu_seqlens, 1 << 20)
        return Segments(
            cu_seqlens=ends,
            wide=self.cu_seqlens.dtype == torch.int64,
            count=self.count,
            total=self.total,
            mask=self.at(mask, 1),
        )

    def run(self, function, *arguments, each=1, order=0):
        if function(*arguments, How(each=each, order=order, seed=7)):
            raise DeviceFailure
        assert all(zone.zones_untouched() for zone in self.outs)


@pytest.fixture
def lib(host):
    lib = host("scan")
    sizes = [lib.emu_size(which) for which in range(4)]
    assert sizes == [ctypes.sizeof(one) for one in (Segments, Scan, Advantages, How)], "launch.h has other fields"
    return lib


def near(found, exact, dtype):
    """float64 arithmetic in another order: the last place of a float32, or about as exact as float64 gets."""
    assert_close(found, exact, rtol=1.3e-7 if dtype == F32 else 1e-12, atol=1e-11, equal_nan=True)


def launches(batch):
    """Whole sequences, and pieces of them: each 0."""
    for each, order in ((1, "forward"), (11, "backward"), (0, "backward"), (0, "random")):
        yield {"each": each, "order": ORDERS[order]}


def check_scan(lib, name, dtype):
    for masked in (False, True):
        for forward in (False, True):
            for decays in ("tokens", "sequences", "one"):
                batch = Batch(BATCHES[name], dtype, masked, torch.int32 if forward else torch.int64)
                x, decay, rates = batch.tokens(), None, None
                if decays == "tokens":
                    decay = batch.numbers(0.5, 1.05, batch.total).to(dtype)
                    decay = decay if batch.mask is None else decay.where(batch.mask, torch.nan)
                else:
                    rates = batch.numbers(0.5, 1, batch.count if decays == "sequences" else 1)
                exact = torch.ops.finealign.reverse_scan(x, decay, rates, batch.mask, batch.cu_seqlens, forward)
                found = []
                for launch in launches(batch):
                    out = batch.out()
                    op = Scan(
                        segments=batch.segments(),
                        forward=forward,
                        dtype=DTYPES[dtype],
                        x=batch.at(x),
                        decay=batch.at(decay),
                        rates=batch.at(rates),
                        rate_stride=0 if decays == "one" else 1,
                        out=out.pointer,
                    )
                    batch.run(lib.emu_scan, ctypes.byref(op), **launch)
                    found.append(out.inner)
                near(found[0], exact, dtype)
                assert all(torch.equal(y, found[0]) for y in found), (masked, forward, decays)


def gae_op(batch, rewards, values, gamma, lam, bootstrap, zero, moments, out, returns):
    return Advantages(
        segments=batch.segments(),
        dtype=DTYPES[batch.dtype],
        rewards=batch.at(rewards),
        values=batch.at(values),
        gamma=batch.at(gamma),
        lam=batch.at(lam),
        gamma_stride=int(gamma.numel() > 1),
        lam_stride=int(lam.numel() > 1),
        bootstrap=batch.at(bootstrap),
        zero=zero,
        whiten_rewards=Whitening(moments=batch.at(moments), unbiased=True, shift=False),
        advantages=out.pointer,
        returns=returns.pointer,
    )


def cpu_advantages(batch, rewards, **given):
    """The native CPU op, by the names of its schema."""
    defaults = dict(cu_seqlens=batch.cu_seqlens, mask=batch.mask, rewards=rewards, model_reward=None, model_end=None)
    defaults |= dict(model_start=None, model_bounds=None, overwrite=False, drop=False, old_logp=None, ref_logp=None)
    defaults |= dict(estimator=0, kl_coef=0.0, wants_reward_moments=False, reward_moments=None, scale=0, unbiased=False)
    defaults |= dict(values=None, gamma=None, lam=None, bootstrap=None, zero=False, score=None, baseline=0.0)
    defaults |= dict(pivots_first=False, wants_advantage_moments=False, total=batch.total, dtype=batch.dtype)
    return torch.ops.finealign.advantages(**{**defaults, **given})


def check_gae(lib, name, dtype):
    for masked, zero, plain in ((False, False, True), (True, False, False), (True, True, False), (True, True, True)):
        batch = Batch(BATCHES[name], dtype, masked)
        rewards, values = batch.tokens(), None if plain and zero else batch.tokens()
        gamma = batch.numbers(0.8, 1, 1 if plain else None)
        lam = batch.numbers(0.8, 1, None if plain else 1)
        bootstrap = None if plain else batch.numbers(-1, 1)
        moments = None if plain else torch.tensor([100.0, 20.0, 400.0, 0.2, 396.0], dtype=F64)
        exact = cpu_advantages(
            batch,
            rewards,
            values=values,
            gamma=gamma,
            lam=lam,
            bootstrap=bootstrap,
            zero=zero,
            reward_moments=moments,
            unbiased=True,
        )[3:5]
        found = []
        for launch in launches(batch):
            out, returns = batch.out(), batch.out()
            op = gae_op(batch, rewards, values, gamma, lam, bootstrap, zero, moments, out, returns)
            batch.run(lib.emu_gae, ctypes.byref(op), **launch)
            found.append((out.inner, returns.inner))
        for i in range(2):
            near(found[0][i], exact[i], dtype)
            assert all(torch.equal(pair[i], found[0][i]) for pair in found), (masked, zero, plain)


def check_tokens(lib, total, dtype):
    """KL and shaped rewards; moments; whitened, with pivots before and after."""
    for masked in (False, True):
        batch = Batch([total], dtype, masked)
        rewards, old, ref, score = (batch.tokens() for _ in range(4))
        for order in ORDERS.values():
            for estimator in range(3):
                exact = cpu_advantages(batch, rewards, old_logp=old, ref_logp=ref, estimator=estimator, kl_coef=0.3)
                shaped, kl = batch.out(), batch.out()
                op = Advantages(segments=batch.segments(), dtype=DTYPES[dtype], rewards=batch.at(rewards))
                op.old_logp, op.ref_logp, op.estimator, op.kl_coef = batch.at(old), batch.at(ref), estimator, 0.3
                op.shaped, op.kl = shaped.pointer, kl.pointer
                batch.run(lib.emu_tokens, ctypes.byref(op), False, order=order)
                near(shaped.inner, exact[0], dtype)
                near(kl.inner, exact[1], dtype)
            kept = (torch.rand(total, generator=batch.random) < 0.4).float()
            for weight in (None, kept):
                mask = batch.mask if weight is None else weight != 0
                x = rewards if batch.mask is None else rewards.nan_to_num(0)
                triple, parts = batch.out(5, F64), batch.out(5 * (-(-total // 8192)), F64)
                op = Advantages(segments=batch.segments(), dtype=DTYPES[dtype], advantages=batch.at(x))
                op.advantage_moments, op.pivots_first = triple.pointer, weight is not None
                op.token_weight = batch.at(weight)
                batch.run(lib.emu_moments, ctypes.byref(op), parts.pointer, order=order)
                exact = torch.ops.finealign.moments(x, mask)
                assert_close(triple.inner, exact, rtol=1e-12, atol=1e-9)
                if dtype == F64:
                    check_far_moments(lib, batch, op, weight, parts, order)
                    op.advantages, op.advantage_moments = batch.at(x), triple.pointer
                for scale in range(3):
                    out = batch.out()
                    op.whitened, op.whiten_advantages = out.pointer, Whitening(scale=scale, unbiased=True, shift=True)
                    op.whiten_advantages.moments = triple.pointer
                    batch.run(lib.emu_tokens, ctypes.byref(op), True, order=order)
                    again = x.clone()
                    torch.ops.finealign.whiten_(again, batch.mask, triple.inner, scale, True, weight, None, 0.0)
                    near(out.inner, again, dtype)
            out, weight = batch.out(), batch.out(dtype=F32)
            op = Advantages(segments=batch.segments(), dtype=DTYPES[dtype], advantages=batch.at(x))
            op.score, op.baseline, op.token_weight = batch.at(score), 0.1, weight.pointer
            op.whitened = out.pointer
            op.whiten_advantages = Whitening(moments=triple.pointer, shift=True)
            batch.run(lib.emu_tokens, ctypes.byref(op), True, order=order)
            again = x.clone()
            exact = torch.ops.finealign.whiten_(again, batch.mask, triple.inner, 0, False, None, score, 0.1)
            near(out.inner, again, dtype)
            assert torch.equal(weight.inner, exact)
            check_pivots(lib, batch, x, order)


def check_far_moments(lib, batch, op, weight, parts, order):
    """Σ (x - μ)² of values at 1e6, as near as the rounding of μ allows."""
    far, found = batch.tokens().nan_to_num(0) + 1e6, batch.out(5, F64)
    op.advantages, op.advantage_moments = batch.at(far), found.pointer
    batch.run(lib.emu_moments, ctypes.byref(op), parts.pointer, order=order)
    kept = far[weight != 0] if weight is not None else far if batch.mask is None else far[batch.mask]
    assert found.inner[0] == len(kept)
    if len(kept):
        away = (kept - kept.mean()).square().sum() - (kept - kept.mean()).sum() ** 2 / len(kept)
        assert_close(found.inner[4], away, rtol=2.0**-53 * 1e6, atol=1e-9)


def check_pivots(lib, batch, x, order):
    """Of advantages as they are, some of them 0; scores of masked tokens say nothing, NaN nowhere."""
    x, q = x.clone(), torch.randn(batch.total, generator=batch.random, dtype=F64).to(batch.dtype)
    x[::3], q[::5] = 0, torch.nan
    weight = batch.out(dtype=F32)
    op = Advantages(segments=batch.segments(), dtype=DTYPES[batch.dtype], advantages=batch.at(x), score=batch.at(q))
    op.baseline, op.token_weight = 0.1, weight.pointer
    batch.run(lib.emu_tokens, ctypes.byref(op), True, order=order)
    keep = ((x >= 0) & (q > 0.1)) | ((x < 0) & (q < 0.1))
    assert torch.equal(weight.inner, (keep if batch.mask is None else keep & batch.mask).float())


def check_bad_cu_seqlens(lib, each=1):
    for ends in ([1, 4, 8], [0, 4, 7], [-3, 4, 8], [0, 4, 60], [0, 6, 3, 8], [0, 60, 8]):
        batch = Batch([8], F32, False)
        x = torch.ones(8)
        batch.cu_seqlens, batch.count = torch.tensor(ends), len(ends) - 1
        for forward in (False, True):
            out = batch.out()
            rates = torch.ones(1, dtype=F64)
            op = Scan(segments=batch.segments(), forward=forward, x=batch.at(x), rates=batch.at(rates), out=out.pointer)
            batch.run(lib.emu_scan, ctypes.byref(op), each=each)
            assert out.inner.isnan().any() == (ends != [0, 6, 3, 8]) and not (out.inner == -77).any(), ends
        out, returns = batch.out(), batch.out()
        one = torch.ones(1, dtype=F64)
        op = gae_op(batch, x, x, one, one, None, False, None, out, returns)
        batch.run(lib.emu_gae, ctypes.byref(op), each=each)
        for y in (out.inner, returns.inner):  # the one that ends before it starts holds no token
            assert y.isnan().any() == (ends != [0, 6, 3, 8]) and not (y == -77).any(), ends


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_scans_on_the_host(lib, name, dtype):
    check_scan(lib, name, dtype)


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_gae_on_the_host(lib, name, dtype):
    check_gae(lib, name, dtype)


def test_a_hundred_thousand_tokens_on_the_host(lib):
    """One way and the other: 35 pieces, more than a warp has lanes, the last of them ragged."""
    batch = Batch([140_000, 1], F32, True)
    x, values, rates = batch.tokens(), batch.tokens(), torch.tensor([0.999], dtype=F64)
    for forward in (False, True):
        out = batch.out()
        op = Scan(segments=batch.segments(), forward=forward, x=batch.at(x), rates=batch.at(rates), out=out.pointer)
        batch.run(lib.emu_scan, ctypes.byref(op), each=0, order=ORDERS["random"])
        exact = torch.ops.finealign.reverse_scan(x, None, rates, batch.mask, batch.cu_seqlens, forward)
        near(out.inner, exact, F32)
    out, returns = batch.out(), batch.out()
    op = gae_op(batch, x, values, rates, rates, None, False, None, out, returns)
    batch.run(lib.emu_gae, ctypes.byref(op), each=0, order=ORDERS["random"])
    exact = cpu_advantages(batch, x, values=values, gamma=rates, lam=rates)[3:5]
    near(out.inner, exact[0], F32)
    near(returns.inner, exact[1], F32)


@pytest.mark.parametrize("total", [1, 300, 20_001])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_token_kernels_on_the_host(lib, total, dtype):
    check_tokens(lib, total, dtype)


@pytest.mark.parametrize("each", [0, 1])
def test_bad_cu_seqlens_give_nan_and_touch_nothing_else(lib, each):
    check_bad_cu_seqlens(lib, each)


def check_bits(lib, forward, tokens):
    """Alone, behind others, with masked padding up to what a block or several walk: the same bits, in float64."""
    random = torch.Generator().manual_seed(0)
    x, decay = (torch.rand(tokens, generator=random, dtype=F64) for _ in range(2))
    decay = 1 - decay / 10_000  # what enters a piece still counts at its other end

    def scan(lengths, before, each):
        batch = Batch(lengths, F64, False)
        batch.mask = torch.zeros(batch.total, dtype=torch.bool)
        batch.mask[before : before + tokens] = True
        batch.mask[:before] = True
        values, rates = torch.full((2, batch.total), torch.nan, dtype=F64)
        values[:before], rates[:before] = 1.0, 0.5
        values[before : before + tokens], rates[before : before + tokens] = x, decay
        out = batch.out()
        op = Scan(segments=batch.segments(), forward=forward, x=batch.at(values), decay=batch.at(rates))
        op.dtype, op.out = DTYPES[F64], out.pointer
        batch.run(lib.emu_scan, ctypes.byref(op), each=each)
        return out.inner[before : before + tokens]

    alone = scan([tokens], 0, 1)
    for lengths, before, each in (
        ([tokens], 0, 0),
        ([3, tokens], 3, 1),
        ([tokens, 50], 0, 0),
        ([tokens + 400], 0, 1),
        ([2, tokens + 4000], 2, 0),
    ):
        assert torch.equal(scan(lengths, before, each), alone), (lengths, each)


@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("tokens", [700, 8_300])
def test_bits_depend_on_the_sequence_alone(lib, forward, tokens):
    check_bits(lib, forward, tokens)


def check_far_values(lib, zero, kept):
    """Few tokens with mask in four pieces: bits are those of one block, numbers the CPU's."""
    batch = Batch([12_500, 7], F32, False)
    batch.mask = torch.zeros(batch.total, dtype=torch.bool)
    batch.mask[kept] = True
    rewards, values, bootstrap = batch.tokens(), batch.tokens(), torch.tensor([2.0, 3.0], dtype=F64)
    rate = torch.tensor([0.99], dtype=F64)
    found = []
    for each in (0, 1):
        out, returns = batch.out(), batch.out()
        op = gae_op(batch, rewards, values, rate, rate, bootstrap, zero, None, out, returns)
        batch.run(lib.emu_gae, ctypes.byref(op), each=each)
        found.append((out.inner, returns.inner))
    exact = cpu_advantages(batch, rewards, values=values, gamma=rate, lam=rate, bootstrap=bootstrap, zero=zero)[3:5]
    for split, whole, on_cpu in zip(*found, exact, strict=True):
        assert torch.equal(split, whole)
        near(split, on_cpu, F32)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("kept", [[], [0], [5000], [5000, 12_300], [4096, 8191]])
def test_gae_finds_the_next_value_in_a_piece_further_on(lib, zero, kept):
    check_far_values(lib, zero, kept)


def test_nothing_comes_from_another_sequence_or_from_further_right(lib):
    """NaN and inf reach their own sequence alone, and there only what comes after them."""
    batch = Batch([300, 300, 300], F32, False)
    x = torch.ones(900)
    x[450], x[460] = torch.nan, torch.inf
    out = batch.out()
    op = Scan(segments=batch.segments(), x=batch.at(x), rates=batch.at(torch.full((1,), 0.9, dtype=F64)))
    op.out = out.pointer
    batch.run(lib.emu_scan, ctypes.byref(op))
    assert out.inner[300:451].isnan().all() and out.inner[451:461].isinf().all()
    assert out.inner[:300].isfinite().all() and out.inner[461:].isfinite().all()

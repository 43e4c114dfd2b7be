"""`advantages`: the worked pipeline of the specification, fused against composed, and what must not matter."""

import pytest
import torch
from torch import nan, tensor
from torch.testing import assert_close

from finealign_kernels.ops import _native
from finealign_kernels.ops import advantages as native
from finealign_kernels.rl.advantages import advantages
from finealign_kernels.rl.gae import discounted_returns, gae, kl_penalty
from finealign_kernels.rl.rewards import SegmentRewards, token_rewards
from finealign_kernels.rl.whitening import moments, whiten
from finealign_kernels.testing import samples
from finealign_kernels.testing.budgets import assert_within

F64 = torch.float64
CLOSE = {"rtol": 0, "atol": 5e-10}  # goldens have ten decimals
native_only = pytest.mark.skipif(not _native.available(), reason=str(_native.reason))


@pytest.fixture(params=["reference", pytest.param("native", marks=native_only)])
def backend(request):
    return request.param


def rows(*values):
    return tensor(values, dtype=F64)


# ---- fixture D -----------------------------------------------------------------------------------------------------

MASK = tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()
OLD = rows([-0.9, -0.4, -1.3, -0.6, -0.8, -0.2], [-0.5, -1.1, -0.7, -0.3, nan, nan])
REF = rows([-1.0, -0.5, -1.1, -0.6, -0.9, -0.3], [-0.6, -1.0, -0.9, -0.4, nan, nan])
V = rows([0.10, 0.05, 0.20, -0.10, 0, 0.30], [-0.05, 0.10, -0.20, 0.15, nan, nan])
Q = rows([0.4, -0.2, 0.1, 0.3, -0.5, 0.2], [-0.6, -0.1, 0.2, -0.3, nan, nan])
RAW = rows([0, 0, 0.3, 0, 0.2, 0.36], [0, 0, -0.8, -0.15, nan, nan])


def models(dtype=F64):
    def model(reward, end, cu, weight):
        return SegmentRewards(tensor(reward, dtype=dtype) / weight, tensor(end), tensor(cu), weight)

    return [
        model([0.3, -0.3, -0.3], [2, 4, 2], [0, 2, 3], 0.3),  # sub-sentences
        model([0.5, -0.5], [4, 2], [0, 1, 2], 0.5),  # sentences
        model(
            [0.36, -0.15], [5, 9], [0, 1, 2], 1.0
        ),  # the whole; an end beyond the response is moved to its last token
    ]


PEN = [[-0.03, -0.03, 0.36, 0, 0.17, 0.33], [-0.03, 0.03, -0.86, -0.18, 0, 0]]
CORRECTED = {
    "advantages": [
        [0.9340625971, 1.0333311943, 1.0407384449, 0.6791492526, 0.6469691723, 0.2597758826],
        [-1.3216556455, -1.4381950707, -1.4328599851, -0.4013158426, 0, 0],
    ],
    "returns": [
        [2.3373249517, 2.502584103, 2.6686463677, 1.5845576943, 1.6147767467, 1.075166827],
        [-2.7040909469, -2.8068010534, -3.0952321783, -0.5083786017, 0, 0],
    ],
}
RELEASED = {
    "advantages": [
        [1.0046293648, 1.142989258, 1.0958907887, 0.8177055215, 0.7507278194, 0.1988009871],
        [-1.4425793914, -1.6257604212, -1.4868048211, -0.4555991058, 0, 0],
    ],
    "returns": [
        [1.2799720982, 1.3810996728, 1.4796550145, 0.8757991518, 0.9026408295, 0.5997828656],
        [-1.5430620821, -1.5931468328, -1.7413685803, -0.2650044656, 0.0356662094, 0.0182903638],
    ],
}
FIXTURE = {"old_logp": OLD, "ref_logp": REF, "kl_coef": 0.3, "gamma": 1, "lam": 0.95}


@pytest.mark.parametrize("given", ["tokens", "segments"])
def test_the_whole_pipeline(backend, given):
    rewards = RAW if given == "tokens" else models()
    found = advantages(rewards, V, mask=MASK, whiten_rewards=True, backend=backend, **FIXTURE)
    assert_close(found.rewards, rows(*PEN), **CLOSE)
    assert_close(found.kl, kl_penalty(OLD, REF, mask=MASK), rtol=0, atol=1e-15)
    for name, expected in CORRECTED.items():
        assert_close(getattr(found, name), rows(*expected), **CLOSE)
    n, total, squares = found.reward_moments.tolist()
    assert n == 10 and total / n == pytest.approx(-0.024) and squares / n - (total / n) ** 2 == pytest.approx(0.103724)
    assert found.advantage_moments[0] == 10 and found.token_weight is None


@pytest.mark.parametrize("given", ["tokens", "segments"])
def test_as_released(given):
    """Whitening by the root of the std, and padding that counts as reward."""
    rewards = RAW if given == "tokens" else models()
    wide = [
        torch.nn.functional.pad(x, (0, 2), value=nan) for x in (V, OLD, REF)
    ]  # beyond the longest response: nothing
    mask = torch.nn.functional.pad(MASK, (0, 2))
    if given == "tokens":
        rewards = torch.nn.functional.pad(rewards, (0, 2), value=nan)
    options = FIXTURE | {"old_logp": wide[1], "ref_logp": wide[2], "whiten_rewards": True}
    found = advantages(rewards, wide[0], mask=mask, compat=True, **options)
    assert_close(found.rewards[:, :6], rows(*PEN), **CLOSE)
    for name, expected in RELEASED.items():
        value = getattr(found, name)
        assert_close(value[:, :6], rows(*expected), **CLOSE)
        assert not value[:, 6:].any()


def test_by_how_much_each_step_of_the_released_code_differs():
    """The root of the std, and the leak by itself: it is there only with whitened rewards, and only in short rows."""
    corrected = advantages(RAW, V, mask=MASK, whiten_rewards=True, **FIXTURE)
    released = advantages(RAW, V, mask=MASK, whiten_rewards=True, compat=True, **FIXTURE)
    masked = advantages(RAW, V, mask=MASK, whiten_rewards=True, whitening="compat", **FIXTURE)
    same = advantages(RAW, V, mask=MASK, whitening="compat", **FIXTURE)  # nothing to leak without whitened rewards
    assert_close(same.returns, advantages(RAW, V, mask=MASK, compat=True, **FIXTURE).returns, rtol=0, atol=1e-14)
    leak = (released.returns - masked.returns)[1]
    # -0.024 (1 - 1/√0.322..) = 0.01829 at each padded token, carried back by λ = .95
    fake = 0.0182903638
    tail = fake * (1 + 0.95)
    assert_close(leak[3].item(), 0.95 * tail, rtol=0, atol=1e-9)
    assert_close(leak[4:], tensor([tail, fake], dtype=F64), **CLOSE)
    assert (released.returns - masked.returns)[0].abs().max() < 1e-14  # the longest row has no padding
    ratio = (corrected.advantages[0, 0] - corrected.advantages[0, 5]) / (
        masked.advantages[0, 0] - masked.advantages[0, 5]
    )
    assert 0.5 < ratio < 0.99, "whitening by √std leaves another scale"


@pytest.mark.parametrize("lam, expected", [(0.95, 0.5799188656), (1, 0.7)])
def test_without_whitening(backend, lam, expected):
    options = FIXTURE | {"lam": lam}
    found = advantages(models(), V, mask=MASK, whiten_advantages=False, backend=backend, **options)
    plain = gae(rows(*PEN), V, mask=MASK, gamma=1, lam=lam, backend=backend)
    assert_close(found.advantages, plain.advantages, rtol=0, atol=1e-14)
    assert_close(found.advantages[0, 0].item(), expected, rtol=0, atol=5e-10)
    assert found.reward_moments is None and found.advantage_moments is None


# ---- pivots --------------------------------------------------------------------------------------------------------


def test_pivots_by_the_whitened_advantage(backend):
    found = advantages(models(), V, mask=MASK, whiten_rewards=True, token_score=Q, backend=backend, **FIXTURE)
    assert found.token_weight.tolist() == [[1, 0, 1, 1, 0, 1], [1, 1, 0, 1, 0, 0]]
    assert found.token_weight.dtype == torch.float32
    assert_close(found.advantages, rows(*CORRECTED["advantages"]), **CLOSE)  # over all tokens


@pytest.mark.parametrize(
    "pivots, score, expected",
    [
        ("after_whitening", [1, 9, -1, 1], [0.5773502679, 0, -0.4123930485, 1.2371791456]),
        ("before_whitening", [1, 9, 1, 1], [0.1622214204, 0, -1.2977713629, 1.1355499425]),
    ],
)
def test_pivots_before_or_after_whitening(backend, pivots, score, expected):
    """A = [2, -1, .5, 3]: over all of them .5 becomes negative; over the pivots 1011 alone the scale is another."""
    options = {"token_score": tensor([score], dtype=F64), "pivots": pivots, "backend": backend}
    found = advantages(rows([2, -1, 0.5, 3]), gamma=0, **options)
    assert found.token_weight.tolist() == [[1, 0, 1, 1]]
    assert_close(found.advantages * found.token_weight, rows(expected), **CLOSE)
    all_of_them = pivots == "after_whitening"
    assert found.advantage_moments.tolist() == ([4, 4.5, 14.25] if all_of_them else [3, 5.5, 13.25])
    assert (found.advantages[0, 1] == 0) != all_of_them


@pytest.mark.parametrize("whitens", [False, True])
@pytest.mark.parametrize("pivots", ["after_whitening", "before_whitening"])
def test_scores_at_the_baseline_and_nan_are_not_kept(backend, pivots, whitens):
    reward = tensor([[1.0, 1, 1, 1, -1, -1, -1, -1]])
    score = tensor([[2.0, 0.5, 0.0, nan, 2.0, 0.5, 0.0, nan]])
    found = advantages(
        reward,
        gamma=0,
        token_score=score,
        baseline=0.5,
        pivots=pivots,
        whiten_advantages=whitens,
        backend=backend,
    )
    assert found.token_weight.tolist() == [[1, 0, 0, 0, 0, 0, 1, 0]]


def test_an_advantage_of_zero_counts_as_positive(backend):
    found = advantages(torch.zeros(1, 2), token_score=tensor([[1.0, -1]]), whiten_advantages=False, backend=backend)
    assert found.token_weight.tolist() == [[1, 0]]


# ---- fused against composed ----------------------------------------------------------------------------------------

LENGTHS = {
    "short": [5, 0, 1, 17, 8, 33, 2, 0],
    "tiles": [511, 513, 0, 1025, 40],
    "cut": [32_768, 32_769, 80_000, 3],
    "ones": [1] * 200,
}
OPTIONS = {
    "plain": {"whiten_advantages": False},
    "kl": {"kl_coef": 0.1, "whiten_advantages": False},
    "k2": {"kl_coef": 0.1, "kl": "k2", "whiten_rewards": True, "whitening": "clamp"},
    "k3": {"kl_coef": -0.1, "kl": "k3", "unbiased": True},
    "all": {"kl_coef": 0.05, "whiten_rewards": True, "score": True},
    "zero": {"masked": "zero", "whiten_rewards": True, "whitening": "compat", "boot": True},
    "before": {"kl_coef": 0.05, "score": True, "pivots": "before_whitening", "baseline": 0.25, "boot": True},
    "critic-free": {"kl_coef": 0.05, "free": True, "score": True},
    "critic-free-zero": {"free": True, "masked": "zero", "whiten_rewards": True},
    "overwrite": {"on_collision": "overwrite", "on_empty": "drop"},
}


def batch(lengths, dtype=F64, seed=0):
    """Flat tokens with holes, NaN at them, and what three reward models make of them."""
    rng = torch.Generator().manual_seed(seed)
    cu_seqlens = tensor([0, *lengths]).cumsum(0)
    n = int(cu_seqlens[-1])
    mask = torch.rand(n, generator=rng) < 0.8
    if n > 1000:
        mask |= torch.rand(n // 700 + 1, generator=rng).repeat_interleave(700)[:n] < 0.5
        mask &= torch.rand(n // 300 + 1, generator=rng).repeat_interleave(300)[:n] < 0.8
    assert n / 4 < mask.sum() < n
    draw = [torch.randn(n, generator=rng, dtype=F64).to(dtype) for _ in range(5)]
    r, v, old, ref, q = (torch.where(mask, x, nan) for x in draw)
    boot = torch.randn(len(lengths), generator=rng, dtype=F64)
    return r, v, old, ref, q, mask, cu_seqlens, boot


def call(name, sample, lengths, backend, given="tokens", **more):
    r, v, old, ref, q, mask, cu_seqlens, boot = sample
    options = {"gamma": 0.98, "lam": 0.9} | OPTIONS[name] | more
    values = None if options.pop("free", False) else v
    score = q if options.pop("score", False) else None
    boot = boot if options.pop("boot", False) else None
    if "kl_coef" in options:
        options |= {"old_logp": old, "ref_logp": ref}
    rewards = r if given == "tokens" else samples.segment_rewards(lengths, dtype=r.dtype, seed=3)
    return advantages(
        rewards,
        values,
        mask=mask,
        cu_seqlens=cu_seqlens,
        bootstrap=boot,
        token_score=score,
        backend=backend,
        **options,
    )


@pytest.mark.usefixtures("unread")
@native_only
@pytest.mark.parametrize("given", ["tokens", "segments"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", LENGTHS)
def test_fused_is_composed_in_float64(name, options, given):
    sample = batch(LENGTHS[name])
    exact, found = (call(options, sample, LENGTHS[name], b, given) for b in ("reference", "native"))
    for field, one, other in zip(exact._fields, found, exact, strict=True):
        if other is None:
            assert one is None, field
        else:
            assert_close(one, other, rtol=1e-11, atol=1e-11, msg=lambda text, field=field: f"{field}: {text}")


@native_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", ["all", "before", "k3", "zero", "critic-free"])
def test_fused_keeps_the_budget_in_narrow_dtypes(options, dtype):
    """The truth starts from the same rounded inputs; eager is the same torch ops in float32."""
    sample = batch(LENGTHS["tiles"], dtype)
    wide = [x.double() if x.is_floating_point() else x for x in sample]
    exact, found, composed = (
        call(options, s, LENGTHS["tiles"], b)
        for s, b in ((wide, "reference"), (sample, "native"), (sample, "reference"))
    )
    for field in ("advantages", "returns", "rewards"):
        one, other, eager = (getattr(x, field) for x in (found, exact, composed))
        assert one.dtype == torch.float32
        assert_within(one, other, eager, rms_ratio=1.5, max_ratio=2, ulps=1)
        assert not one[~sample[5]].any()


@pytest.mark.usefixtures("unread")
@native_only
@pytest.mark.parametrize("name", LENGTHS)
def test_one_launch_is_the_small_native_ops(name):
    """Without whitening the fused launch and gae of its own rewards agree bit for bit."""
    sample = batch(LENGTHS[name], torch.float32)
    found = call("kl", sample, LENGTHS[name], "native", "segments")
    r, v, *_, mask, cu_seqlens, _ = sample
    alone = gae(found.rewards, v, mask=mask, cu_seqlens=cu_seqlens, gamma=0.98, lam=0.9, backend="native")
    assert torch.equal(found.advantages, alone.advantages) and torch.equal(found.returns, alone.returns)
    placed = token_rewards(samples.segment_rewards(LENGTHS[name], seed=3), mask=mask, cu_seqlens=cu_seqlens)
    plain = call("plain", sample, LENGTHS[name], "native", "segments")
    assert_close(plain.rewards, placed, rtol=2**-23, atol=1e-7)


# ---- what must not matter ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unread")
def test_padded_is_packed(backend):
    lengths = LENGTHS["short"]
    sample = batch(lengths)
    flat = call("all", sample, lengths, backend, "segments")
    *tokens, mask, cu_seqlens, _ = sample

    def padded(x, fill):
        out = torch.full((len(lengths), 40), fill, dtype=x.dtype)
        for s, length in enumerate(lengths):
            out[s, :length] = x[cu_seqlens[s] : cu_seqlens[s + 1]]
        return out

    _, v, old, ref, q = (padded(x, nan) for x in tokens)
    found = advantages(
        samples.segment_rewards(lengths, dtype=F64, seed=3),
        v,
        old_logp=old,
        ref_logp=ref,
        kl_coef=0.05,
        mask=padded(mask, False),
        gamma=0.98,
        lam=0.9,
        whiten_rewards=True,
        token_score=q,
        backend=backend,
    )
    for field in ("advantages", "returns", "rewards", "kl", "token_weight"):
        assert_close(getattr(found, field), padded(getattr(flat, field), 0.0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", ["all", "before"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_sum_their_moments_are_one_rank(backend, ranks, options):
    """Each rank runs until it asks for a sum, and again with the sum of what all asked for."""
    lengths = [40] * 12
    r, v, old, ref, q, mask, _, boot = batch(lengths)
    whole = call(options, (r, v, old, ref, q, mask, tensor([0, *lengths]).cumsum(0), boot), lengths, backend)
    each = len(lengths) // ranks
    parts = []
    for rank in range(ranks):
        tokens = slice(rank * each * 40, (rank + 1) * each * 40)
        cu_seqlens = tensor([0, *[40] * each]).cumsum(0)
        parts.append(
            (*(x[tokens] for x in (r, v, old, ref, q, mask)), cu_seqlens, boot[rank * each : (rank + 1) * each])
        )

    def run(part, known):
        """The part's result and triples, where the first sums over ranks are known."""
        asked = []

        def reduce(triple):
            asked.append(triple)
            return known[len(asked) - 1] if len(asked) <= len(known) else triple

        return call(options, part, [40] * each, backend, sum_moments=reduce), asked

    known = []
    while True:
        runs = [run(part, known) for part in parts]
        if len(known) == len(runs[0][1]):
            break
        known.append(sum(asked[len(known)] for _, asked in runs))
    assert len(known) == (2 if options == "all" else 1)
    found = [result for result, _ in runs]
    assert_close(torch.cat([f.advantages for f in found]), whole.advantages, rtol=1e-11, atol=1e-11)
    assert torch.equal(torch.cat([f.token_weight for f in found]), whole.token_weight)
    assert_close(found[0].advantage_moments, whole.advantage_moments, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("unread")
@native_only
@pytest.mark.parametrize("options", ["all", "before", "zero", "plain"])
def test_bits_do_not_depend_on_threads(options):
    lengths = LENGTHS["cut"] + LENGTHS["tiles"] * 8
    sample, before, found = batch(lengths, torch.float32), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(call(options, sample, lengths, "native", "segments"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert (one is None and two is None) or torch.equal(one, two)


@pytest.mark.usefixtures("unread")
@native_only
@pytest.mark.parametrize("options", ["all", "plain"])
def test_everything_is_written(options, poisoned):
    found = call(options, batch(LENGTHS["tiles"]), LENGTHS["tiles"], "native", "segments")
    assert all(x is None or x.isfinite().all() for x in found)


def test_inputs_are_not_written(backend):
    sample = batch(LENGTHS["short"])
    before = [x.clone() for x in sample]
    call("all", sample, LENGTHS["short"], backend)
    call("plain", sample, LENGTHS["short"], backend)
    for one, other in zip(sample, before, strict=True):
        assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_a_nan_at_a_valid_token_reaches_the_value(backend):
    r, v, old, ref, q, mask, cu_seqlens, boot = batch([20, 20])
    at = int(mask.nonzero()[0])
    for bad in (r, v, old):
        bad[at] = nan
        found = call("kl", (r, v, old, ref, q, mask, cu_seqlens, boot), [20, 20], backend)
        assert found.advantages[at].isnan() and found.advantages[20:].isfinite().all()
        found = call("all", (r, v, old, ref, q, mask, cu_seqlens, boot), [20, 20], backend)
        assert found.advantages[mask].isnan().all() and not found.advantages[~mask].any()
        bad[at] = 0


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (3, 4)])
def test_nothing_there(backend, shape):
    """No sequences, no tokens, or none that the mask keeps."""
    x, mask = torch.full(shape, nan), torch.zeros(shape, dtype=torch.bool)
    none = SegmentRewards(
        torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(shape[0] + 1, dtype=torch.int32)
    )
    for rewards in (x, none):
        found = advantages(
            rewards,
            x,
            old_logp=x,
            ref_logp=x,
            kl_coef=0.1,
            mask=mask,
            whiten_rewards=True,
            token_score=x,
            backend=backend,
        )
        for value in found[:5]:
            assert value.shape == shape and not value.any()
        assert found.advantage_moments.tolist() == found.reward_moments.tolist() == [0, 0, 0]


def test_one_valid_token(backend):
    x = tensor([[nan, 2.0, nan]])
    mask = tensor([[False, True, False]])
    boot = tensor([10.0])
    found = advantages(x, x / 4, mask=mask, gamma=0.5, bootstrap=boot, whiten_advantages=False, backend=backend)
    assert found.advantages.tolist() == [[0, 6.5, 0]] and found.returns.tolist() == [[0, 7, 0]]
    found = advantages(x, x / 4, mask=mask, gamma=0.5, bootstrap=boot, backend=backend)
    assert found.advantages.tolist() == [[0, 0, 0]] and found.returns.tolist() == [[0, 7, 0]]


def test_critic_free(backend):
    r, _, old, ref, _, mask, cu_seqlens, _ = batch(LENGTHS["tiles"])
    options = {"mask": mask, "cu_seqlens": cu_seqlens, "backend": backend}
    found = advantages(r, gamma=0.9, whiten_advantages=False, **options)
    assert_close(found.advantages, discounted_returns(r, gamma=0.9, **options), rtol=0, atol=1e-13)
    assert torch.equal(found.advantages, found.returns)
    whitened = advantages(r, gamma=0.9, **options)
    assert_close(whitened.advantages, whiten(found.returns, mask=mask), rtol=1e-12, atol=1e-12)
    assert torch.equal(whitened.returns, found.returns)
    assert_close(whitened.advantage_moments, moments(found.returns, mask), rtol=1e-12, atol=1e-12)


# ---- torch.library -------------------------------------------------------------------------------------------------


@native_only
def test_opcheck():
    cu_seqlens, rate = tensor([0, 3, 3, 8]), torch.full((1,), 0.9, dtype=F64)
    mask = tensor([1, 1, 0, 1, 1, 1, 0, 1]).bool()
    r, v, old, ref, q = torch.randn(5, 8).unbind()
    known = torch.ops.finealign.moments(r, None)
    m = [x.to(t) for x, t in ((torch.ones(2), F64), (tensor([1, 2]), torch.int64))]
    bounds = tensor([[0, 1, 1, 2]])
    options = (True, known, 0, False, v, rate, rate, None, False, q, 0.5, True, True, 8, torch.float32)
    op = torch.ops.finealign.advantages.default
    torch.library.opcheck(op, (cu_seqlens, mask, r, None, None, None, None, False, False, old, ref, 0, 0.1, *options))
    torch.library.opcheck(op, (cu_seqlens, None, None, *m, None, bounds, False, False, old, ref, 2, 0.1, *options))
    none = (False, None, 0, False, None, None, None, None, False, None, 0.0, False, False, 8, torch.float32)
    torch.library.opcheck(op, (cu_seqlens, mask, r, *[None] * 4, False, False, old, ref, 0, 0.1, *none))
    torch.library.opcheck(torch.ops.finealign.moments.default, (r, mask))
    torch.library.opcheck(torch.ops.finealign.whiten.default, (r, mask, known, 0, False, True))
    torch.library.opcheck(torch.ops.finealign.whiten_.default, (r, mask, known, 0, False, None, q, 0.0))
    torch.library.opcheck(torch.ops.finealign.whiten_.default, (r, None, known, 1, True, mask.float(), None, 0.0))


@native_only
@pytest.mark.parametrize("bounds", [[[0, 1, 1, 3]], [[0, 2, 1, 2]], [[-1, 1, 1, 2]], [[0, 1, 2]]])
def test_the_op_itself_refuses_bad_bounds(bounds):
    two = torch.ones(2, dtype=F64), tensor([1, 2])
    args = (
        False,
        False,
        None,
        None,
        0,
        0.0,
        False,
        None,
        0,
        False,
        None,
        None,
        None,
        None,
        False,
        None,
        0.0,
        False,
        False,
    )
    with pytest.raises(RuntimeError, match="model_bounds must"):
        torch.ops.finealign.advantages(
            tensor([0, 3, 3, 8]), None, None, *two, None, tensor(bounds), *args, 8, torch.float32
        )


@native_only
def test_compiles_without_a_break():
    def steps(rewards, v, old, ref, mask, cu_seqlens):
        found = advantages(rewards, v, old_logp=old, ref_logp=ref, kl_coef=0.1, mask=mask, cu_seqlens=cu_seqlens)
        return found.advantages, found.returns

    compiled = torch.compile(steps, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([5, 0, 3], [7, 1, 2, 9]):
        r, v, old, ref, _, mask, cu_seqlens, _ = batch(lengths)
        expected, found = (f(r, v, old, ref, mask, cu_seqlens) for f in (steps, compiled))
        assert_close(found, expected)


# ---- refusals ------------------------------------------------------------------------------------------------------

X = torch.zeros(2, 3)
ONE = SegmentRewards(torch.ones(2), tensor([1, 2]), tensor([0, 1, 2]))


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (lambda: advantages(X, X[:1]), ValueError, r"values must have shape \(2, 3\), got \(1, 3\)"),
        (lambda: advantages(X, kl_coef=0.1), TypeError, "old_logp and ref_logp must be given where kl_coef is not 0"),
        (lambda: advantages(X, old_logp=X), TypeError, "old_logp and ref_logp must be given together"),
        (lambda: advantages(X, kl="k5"), ValueError, "kl must be one of .*, got 'k5'"),
        (lambda: advantages(X, whitening="no"), ValueError, "whitening must be one of .*, got 'no'"),
        (lambda: advantages(X, masked="restart"), ValueError, "masked must be one of .*, got 'restart'"),
        (lambda: advantages(X, pivots="first"), ValueError, "pivots must be one of .*, got 'first'"),
        (lambda: advantages(X, kl_coef=nan), ValueError, "kl_coef must be a finite number, got nan"),
        (lambda: advantages(X, baseline=nan), ValueError, "baseline must be a finite number, got nan"),
        (lambda: advantages(X, bootstrap=X[:, 0]), TypeError, "bootstrap must be None without values"),
        (lambda: advantages(X, X, gamma=2), ValueError, r"gamma must be in \[0, 1\], got 2"),
        (lambda: advantages(X, X, token_score=X[0]), ValueError, r"token_score must have shape \(2, 3\), got \(3,\)"),
        (lambda: advantages(ONE, X), ValueError, "mask must be given"),
        (lambda: advantages([], X, mask=X > 0), TypeError, "rewards must be a tensor, SegmentRewards or a sequence"),
        (lambda: advantages("r", X, mask=X > 0), TypeError, r"rewards\[0\] must be SegmentRewards, got a str"),
        (lambda: advantages([ONE, X], X, mask=X > 0), TypeError, r"rewards\[1\] must be SegmentRewards, got a Tensor"),
        (
            lambda: advantages(ONE, X[:1], mask=X[:1] > 0),
            ValueError,
            r"rewards\[0\].cu_segments must have shape \(2,\)",
        ),
        (lambda: advantages(ONE, on_collision="sum", mask=X > 0), ValueError, "on_collision must be one of"),
        (lambda: advantages(ONE, on_empty="sum", mask=X > 0), ValueError, "on_empty must be one of"),
        (lambda: advantages(X, compat=True), ValueError, "compat must come with values"),
        (
            lambda: advantages(X[0], X[0], cu_seqlens=tensor([0, 3]), compat=True),
            ValueError,
            "compat must be False for flat tokens",
        ),
        (lambda: advantages(X, sum_moments=lambda m: m.float()), TypeError, "sum_moments must return"),
    ],
)
def test_refusals(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_native_by_name_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(_native, "reason", "the extension is not built")
    with pytest.raises(RuntimeError, match="'native' cannot run here: the extension is not built"):
        advantages(X, backend="native")
    assert advantages(X).advantages.shape == X.shape
    assert not native.runs("auto", torch.device("cpu"))

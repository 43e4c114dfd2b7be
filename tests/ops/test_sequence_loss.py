"""The fused sequence loss against the composition of the small ops, golden values, gradients, limits, planted bugs."""

import math

import pytest
import torch
from torch import nan
from torch.testing import assert_close

from finealign_kernels.formulas import margin
from finealign_kernels.losses.preference import PREFERENCE, FromScores, response_scores, score_loss
from finealign_kernels.losses.reduce import sequence_weights
from finealign_kernels.losses.table import fused_functions, is_fused
from finealign_kernels.ops import _native
from finealign_kernels.ops._layout import flatten, flatten_like
from finealign_kernels.ops.sequence_loss import CODES, batch_loss, missing, sequence_loss
from finealign_kernels.testing.budgets import assert_within

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.reason))

F64 = torch.float64
DTYPES = [torch.float32, torch.bfloat16, torch.float16, F64]
AVERAGES = (False, "kept", "all")
HYPER = {
    margin.squared: {"center": 0.5},
    margin.smoothed: {"smoothing": 0.1},
    margin.robust: {"smoothing": 0.2},
    margin.exo: {"smoothing": 0.01},
    margin.discovered: {"tau": 0.05},
}
PHIS = list(CODES)
FUSED = [name for name, row in PREFERENCE.items() if is_fused(row, torch.device("cpu"))]
VALUES = [name for name in FUSED if PREFERENCE[name].label == "value"]  # of a pair, the two sides have two shifts
ROWS = [name for name in FUSED if name not in VALUES]


def composed(
    tokens, ref_logp, *, phi, beta, average, pairs, shift=0.0, scale=1.0, sign=None, token_weight=None, **hyper
):
    """losses, score and slope as the small ops say, in the dtype of the tokens."""
    flat = None if token_weight is None else flatten_like(token_weight, tokens, "token_weight")
    weight = sequence_weights(flat, tokens, average)
    score = response_scores(tokens, ref_logp, weight, whole=token_weight is None and average is False)
    h = score.detach()
    if pairs:
        halves = (h[0::2], h[1::2]) if pairs == "interleaved" else h.chunk(2)
        value, each = phi(beta * (halves[0] - halves[1]) - shift, **hyper)
        slope = torch.stack([each, -each], dim=-1 if pairs == "interleaved" else 0).reshape(-1)
        ordered = torch.cat([score[0::2], score[1::2]]) if pairs == "interleaved" else score
        losses = FromScores.apply(ordered, scale * value, torch.cat([each, -each]) * beta * scale)
    else:
        sign = 1 if sign is None else sign
        value, each = phi(sign * (beta * h - shift), **hyper)
        slope = sign * each
        losses = FromScores.apply(score, scale * value, slope * beta * scale)
    return losses, h, beta * scale * slope


# Around the 32 lanes, the chunk of 1024 tokens and the block of 32768; empty sequences.
LENGTHS = {
    "short": [0, 1, 2, 31, 32, 33, 0, 63, 65, 1],
    "few": [3, 0, 1, 4, 2, 5, 16, 17, 15, 0] * 1100,
    "chunks": [1023, 1024, 1025, 0, 2047, 2048],
    "long": [40_000, 3],
    "ones": [1] * 2000,
}


def batch(lengths, dtype=F64, seed=0):
    """logp, ref_logp, token_weight, mask (N,), with NaN where the mask is false or the weight 0, and cu_seqlens."""
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    total = int(cu_seqlens[-1])
    logp, ref, weight = (-torch.rand(total, generator=generator, dtype=F64) for _ in range(3))
    mask = torch.rand(total, generator=generator) < 0.8
    weight = torch.where(torch.rand(total, generator=generator) < 0.2, 0, -weight)
    for each in (logp, ref):
        each[~mask] = nan
    weight[~mask] = nan
    return *(t.to(dtype) for t in (logp, ref, weight)), mask, cu_seqlens


def both(tokens, ref, upstream, **options):
    """(losses, score, slope, dlogp) of the fused op and of the composition."""
    x = tokens.x.detach().clone().requires_grad_()
    for call in (sequence_loss, composed):
        losses, score, slope = call(tokens.with_x(x), ref, **options)
        (dlogp,) = torch.autograd.grad(losses, x, upstream.to(losses.dtype))
        yield losses.detach(), score, slope, dlogp


# ---- against the composition ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("name", LENGTHS)
def test_equals_the_composition(name, average, weighted):
    logp, ref, weight, mask, cu_seqlens = batch(LENGTHS[name])
    upstream = torch.randn(len(LENGTHS[name]) // 2, dtype=F64)
    if weighted:  # a weight of 0 is a mask
        logp[weight == 0], ref[weight == 0] = nan, nan
    tokens = flatten(logp, mask, cu_seqlens)
    options = dict(phi=margin.logistic, beta=0.7, shift=0.3, scale=1.5, average=average)
    for pairs in ("halves", "interleaved"):
        for without in (False, True):
            ours, exact = both(
                tokens,
                None if without else ref,
                upstream,
                pairs=pairs,
                token_weight=weight if weighted else None,
                **options,
            )
            for actual, expected in zip(ours, exact, strict=True):
                assert_close(actual, expected, rtol=1e-12, atol=1e-13)
            assert not ours[3][~mask].any() and not (weighted and ours[3][weight == 0].any())


@pytest.mark.parametrize("phi", PHIS, ids=lambda phi: phi.__name__)
def test_every_function_of_the_margin(phi):
    """At margins from 1e-3 to 1e4, kinks included; of pairs, and of sequences with a sign and a shift each."""
    m = torch.cat([torch.randn(60, dtype=F64) * 10.0**p for p in (-3, 0, 1, 4)] + [torch.tensor([0.0, 1, -1, 2])])
    tokens = flatten(m, None, torch.arange(m.shape[0] + 1))
    sign = torch.where(torch.rand(m.shape[0]) < 0.5, 1.0, -1.0)
    shift, upstream = torch.randn(m.shape[0], dtype=F64), torch.randn(m.shape[0], dtype=F64)
    hyper = HYPER.get(phi, {})
    for options, up in (
        (dict(pairs="halves"), upstream[::2]),
        (dict(pairs="interleaved", shift=shift[::2]), upstream[::2]),
        (dict(pairs=None), upstream),
        (dict(pairs=None, sign=sign, shift=shift), upstream),
    ):
        ours, exact = both(tokens, None, up, phi=phi, beta=1.0, average=False, **options, **hyper)
        for actual, expected in zip(ours, exact, strict=True):
            assert_close(actual, expected, rtol=1e-11, atol=1e-300)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("average", AVERAGES)
def test_every_row_of_pairs(name, average):
    """A row's own numbers, against score_loss."""
    row = PREFERENCE[name]
    logp, ref, weight, mask, cu_seqlens = batch([3, 40, 0, 1, 7, 5, 0, 2])
    tokens, hyper = flatten(logp, mask, cu_seqlens), {key: wanted.default for key, wanted in row.hyper.items()}
    options, functions = dict(beta=row.beta, shift=row.shift + 0.2), fused_functions(row)
    if row.label:
        functions.setdefault("positive", functions["phi"])
    scale, choice = row.scale(row.beta), dict(average=average, token_weight=weight)
    ours = sequence_loss(tokens, ref, scale=scale, **choice, **options, **functions, **hyper)
    value, slope = score_loss(name, ours.score, **options, **hyper)
    assert_close(ours.losses, value, rtol=1e-12, atol=1e-14)
    assert_close(ours.slope, slope, rtol=1e-12, atol=1e-14)
    order = torch.arange(8).view(2, 4).t().reshape(-1)  # the same pairs interleaved, of a token each
    each = flatten(ours.score[order].view(8, 1))
    there = sequence_loss(each, pairs="interleaved", scale=scale, **options, **functions, **hyper)
    assert_close(there.losses, value, rtol=1e-12, atol=1e-14)
    assert_close(there.slope, slope[order], rtol=1e-12, atol=1e-14)


def test_which_rows_are_fused():
    """Functions of one margin each; not a transform of the score, a match across the batch, a demonstration's NLL."""
    composed = {"orpo", "ulma", "ulma_squared", "aot", "aot_unpaired"}
    assert {name for name in PREFERENCE} - set(ROWS + VALUES) == composed
    assert VALUES == ["pdpo_squared", "pdpo_hybrid"]


@pytest.mark.parametrize("phi", (margin.squared, margin.smoothed))
def test_a_constant_for_each_sequence(phi):
    """Targets: (s - u)², and the cross entropy of a soft label, -s log σ(u) - (1-s) log σ(-u)."""
    logp, ref, _, mask, cu_seqlens = batch([3, 4, 5])
    tokens, s = flatten(logp, mask, cu_seqlens), torch.tensor([0.0, 0.3, 1.0], dtype=F64)
    hyper = {"center": s} if phi is margin.squared else {"smoothing": 1 - s}
    out = sequence_loss(tokens, ref, phi=phi, beta=0.5, shift=-0.3, pairs=None, **hyper)
    u = 0.5 * out.score + 0.3
    if phi is margin.squared:
        value, slope = (s - u).square(), u - s
    else:
        value, slope = (
            torch.nn.functional.binary_cross_entropy_with_logits(u, s, reduction="none"),
            0.5 * (u.sigmoid() - s),
        )
    assert_close(out.losses, value)
    assert_close(out.slope, slope)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_no_further_from_float64_than_the_composition(dtype, average):
    logp, ref, weight, mask, cu_seqlens = batch([700, 1, 40, 2000, 33, 512] * 100, dtype)
    tokens, options = (
        flatten(logp, mask, cu_seqlens),
        dict(phi=margin.logistic, beta=0.1, average=average, pairs="halves"),
    )
    ours, rounded = both(tokens, ref, torch.ones(300), token_weight=weight, **options)
    wide = flatten(logp.double(), mask, cu_seqlens)
    (exact, _) = both(wide, ref.double(), torch.ones(300), token_weight=weight.double(), **options)
    for actual, truth, theirs in zip(ours, exact, rounded, strict=True):
        assert actual.dtype == theirs.dtype
        assert_within(actual, truth, theirs.double(), rms_ratio=1.2, max_ratio=2, ulps=1)


def test_padded_equals_packed_and_two_widths():
    generator = torch.Generator().manual_seed(2)
    logp, ref, weight = (torch.rand(6, 40, generator=generator, dtype=F64) for _ in range(3))
    mask = torch.arange(40) < torch.tensor([40, 3, 0, 25, 17, 1])[:, None]
    options = dict(beta=0.5, average="kept")
    padded = sequence_loss(flatten(logp, mask), ref, token_weight=weight, **options)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int32), mask.sum(1).cumsum(0).int()])
    packed = sequence_loss(flatten(logp[mask], None, cu_seqlens), ref[mask], token_weight=weight[mask], **options)
    two = [(t[:3], t[3:, :30]) for t in (logp, mask, ref, weight)]
    narrow = sequence_loss(flatten(two[0], two[1]), two[2], token_weight=two[3], **options)
    for other in (packed, narrow):
        assert all(torch.equal(a, b) for a, b in zip(padded, other, strict=True))


def test_summed_references():
    logp, ref, _, mask, cu_seqlens = batch([5, 3, 0, 40])
    tokens = flatten(logp, mask, cu_seqlens)
    each = sequence_loss(tokens, ref, beta=0.5)
    sums = torch.stack([part.nansum() for part in ref.tensor_split(cu_seqlens[1:-1])])
    assert_close(sequence_loss(tokens, sums, beta=0.5), each, rtol=1e-13, atol=1e-14)


def test_mixed_dtypes_are_read_in_the_wider_one():
    logp, ref, weight, mask, cu_seqlens = batch([5, 3, 0, 40])
    half = flatten(logp.bfloat16().requires_grad_(), mask, cu_seqlens)
    out = sequence_loss(half, ref.float(), beta=0.5, token_weight=weight.half(), average="kept")
    exact = sequence_loss(
        flatten(logp.bfloat16().float(), mask, cu_seqlens),
        ref.float(),
        beta=0.5,
        token_weight=weight.half(),
        average="kept",
    )
    assert out.losses.dtype == torch.float32 and torch.equal(out.losses, exact.losses)
    (dlogp,) = torch.autograd.grad(out.losses.sum(), half.x)
    assert dlogp.dtype == torch.bfloat16 and dlogp.any()


# ---- golden --------------------------------------------------------------------------------------------------------

LOGP = torch.tensor([-0.5, -1.0, -0.2, -1.2, -0.3, -0.8, -0.6, -1.5], dtype=F64)  # fixture B of the specification
REF = torch.tensor([-0.7, -0.9, -0.4, -1.0, -0.5, -0.6, -0.9, -1.1], dtype=F64)
ENDS = torch.tensor([0, 3, 8])
GOLDEN = [  # phi, options, loss, gradient of a chosen and of a rejected token; beta = .5
    (margin.logistic, dict(), 0.5543552445, -0.2127787416, 0.2127787416),
    (margin.logistic, dict(average="kept"), 0.6539469673, -0.0800017766, 0.048001066),
    (margin.squared, dict(scale=4.0), 0.16, -0.8, 0.8),
    (margin.squared, dict(average="all"), 0.1764, -0.14, 0.084),
    (margin.hinge, dict(), 0.7, -0.5, 0.5),
    (margin.hinge, dict(average="kept"), 0.92, -0.1666666667, 0.1),
    (margin.smoothed, dict(smoothing=0.1), 0.5843552445, -0.1627787416, 0.1627787416),
    (margin.smoothed, dict(smoothing=0.1, average="kept"), 0.6619469673, -0.06333511, 0.038001066),
    (margin.robust, dict(smoothing=0.1), 0.5168552445, -0.2752787416, 0.2752787416),
    (margin.robust, dict(smoothing=0.1, average="all"), 0.6439469673, -0.10083511, 0.060501066),
]


@pytest.mark.parametrize("phi, options, loss, up, down", GOLDEN)
def test_golden_pairs(phi, options, loss, up, down):
    logp = LOGP.clone().requires_grad_()
    out = sequence_loss(flatten(logp, None, ENDS), REF, phi=phi, beta=0.5, **options)
    assert_close(out.losses.item(), loss, rtol=0, atol=1e-9)
    (dlogp,) = torch.autograd.grad(out.losses.sum(), logp)
    assert_close(dlogp, torch.tensor([up] * 3 + [down] * 5, dtype=F64), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "average, loss, up, down",
    [(False, 0.4925006093, -0.0124980471, 0.0124961727), ("kept", 0.4980000152, -0.0041666406, 0.0024999244)],
)
def test_golden_kto(average, loss, up, down):
    """A desirable and an undesirable sample, beta = .1, z₀ = .05."""
    logp, sign = LOGP.clone().requires_grad_(), torch.tensor([1, -1])
    out = sequence_loss(
        flatten(logp, None, ENDS),
        REF,
        phi=margin.bounded,
        beta=0.1,
        shift=0.005,
        sign=sign,
        pairs=None,
        average=average,
    )
    assert_close(out.losses.mean().item(), loss, rtol=0, atol=1e-9)
    (dlogp,) = torch.autograd.grad(out.losses.mean(), logp)
    assert_close(dlogp, torch.tensor([up] * 3 + [down] * 5, dtype=F64), rtol=0, atol=1e-9)


# ---- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", ("halves", "interleaved", None))
@pytest.mark.parametrize("average", AVERAGES)
def test_gradcheck(average, pairs):
    logp, ref, weight, mask, cu_seqlens = batch([3, 0, 5, 2])
    logp = torch.where(mask, logp, 0).requires_grad_()
    options = dict(beta=0.7, shift=0.2, average=average, token_weight=weight, pairs=pairs)
    assert torch.autograd.gradcheck(lambda x: sequence_loss(flatten(x, mask, cu_seqlens), ref, **options).losses, logp)


def test_any_upstream_and_a_second_backward():
    logp, ref, _, mask, cu_seqlens = batch([3, 6, 5, 2])
    tokens = flatten(logp.requires_grad_(), mask, cu_seqlens)
    losses = sequence_loss(tokens, ref, beta=0.7).losses
    first, second = (torch.autograd.grad(losses.sum(), logp, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first[mask].all()
    (dlogp,) = torch.autograd.grad(losses, logp, torch.tensor([2.0, 0.0], dtype=F64))
    of_first = torch.tensor([3, 0, 5, 0]).repeat_interleave(torch.tensor([3, 6, 5, 2])) > 0
    assert_close(dlogp, torch.where(of_first, 2 * first, 0), rtol=1e-15, atol=0)


@pytest.mark.parametrize("denominator", (3, 0.7, torch.tensor(5), torch.tensor(0.3, dtype=F64)), ids=repr)
def test_batch_loss_is_the_sum_over_a_denominator(denominator):
    logp, ref, weight, mask, cu_seqlens = batch([3, 6, 5, 2], torch.float32)
    tokens = flatten(logp.requires_grad_(), mask, cu_seqlens)
    options = dict(beta=0.7, token_weight=weight, average="kept")
    each = sequence_loss(tokens, ref, **options)
    out = batch_loss(tokens, ref, denominator=denominator, **options)
    expected = (each.losses.sum() / denominator).to(torch.float32)  # a count of float64 widens nothing
    assert torch.equal(out.loss, expected) and all(torch.equal(a, b) for a, b in zip(out[1:], each, strict=True))
    assert out.loss.requires_grad and not any(x.requires_grad for x in out[1:])
    upstream = torch.tensor(-1.7, dtype=expected.dtype)
    first, second = (torch.autograd.grad(out.loss, logp, upstream, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, torch.autograd.grad(expected, logp, upstream)[0]) and torch.equal(first, second)
    (dlogp,) = torch.autograd.grad(out.loss, logp, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="sequence_loss: double backward"):
        torch.autograd.grad(dlogp.sum(), logp)
    with torch.no_grad():
        alone = batch_loss(tokens, ref, denominator=denominator, **options)
    assert torch.equal(alone.loss, expected) and not alone.loss.requires_grad


def test_upstream_of_zero_gives_zero_whatever_the_slope():
    logp = torch.tensor([-torch.inf, -torch.inf, -1.0, -1.0], requires_grad=True)
    losses = sequence_loss(
        flatten(logp, None, torch.arange(5)), None, beta=1.0, phi=margin.logistic, pairs="interleaved"
    ).losses
    assert losses[0].isnan() and losses[1].item() == pytest.approx(math.log(2))
    (dlogp,) = torch.autograd.grad(losses, logp, torch.tensor([0.0, 1.0]))
    assert dlogp.tolist() == [0, 0, -0.5, 0.5]


def test_an_infinite_log_prob_is_not_hidden():
    logp = torch.tensor([-torch.inf, -1.0], requires_grad=True)
    assert sequence_loss(flatten(logp, None, torch.arange(3)), None, beta=1.0).losses.item() == torch.inf


def test_double_backward_is_refused_by_name():
    logp = torch.randn(4, requires_grad=True)
    losses = sequence_loss(flatten(logp, None, torch.arange(5)), None, beta=1.0).losses
    (dlogp,) = torch.autograd.grad(losses.sum(), logp, create_graph=True)
    with pytest.raises(RuntimeError, match="sequence_loss: double backward"):
        torch.autograd.grad(dlogp.sum(), logp)


def test_constants_get_no_gradient_and_what_is_logged_is_detached():
    logp, ref, weight, shift = (torch.rand(4, requires_grad=True) for _ in range(4))
    tokens = flatten(logp, None, torch.arange(5))
    out = sequence_loss(tokens, ref, token_weight=weight, beta=1.0, shift=shift, pairs=None)
    grads = torch.autograd.grad(out.losses.sum(), (logp, ref, weight, shift), allow_unused=True)
    assert grads[0].all() and grads[1:] == (None, None, None)
    assert not out.score.requires_grad and not out.slope.requires_grad
    with torch.no_grad():
        assert not sequence_loss(tokens, ref, beta=1.0).losses.requires_grad


# ---- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", AVERAGES)
def test_empty_and_fully_masked_sequences(average):
    logp = torch.tensor([-1.0, -2.0, nan, nan], requires_grad=True)
    mask, cu_seqlens = torch.tensor([True, True, False, False]), torch.tensor([0, 2, 2, 2, 4])
    out = sequence_loss(flatten(logp, mask, cu_seqlens), None, beta=1.0, average=average)
    h = -1.5 if average else -3.0
    assert out.score.tolist() == [h, 0, 0, 0] and out.losses[1].item() == pytest.approx(math.log(2))
    (dlogp,) = torch.autograd.grad(out.losses.sum(), logp)
    assert dlogp[:2].all() and not dlogp[2:].any()


@pytest.mark.parametrize("segments, tokens", [(0, 0), (2, 0)])
def test_no_token(segments, tokens):
    logp = torch.zeros(tokens, requires_grad=True)
    out = sequence_loss(flatten(logp, None, torch.zeros(segments + 1, dtype=torch.int32)), None, beta=1.0)
    assert out.losses.shape == (segments // 2,) and torch.autograd.grad(out.losses.sum(), logp)[0].shape == (tokens,)


@pytest.mark.parametrize("gap", (1e4, -1e4))
def test_huge_margins_stay_finite(gap):
    logp = torch.tensor([gap, 0.0], requires_grad=True)
    losses = sequence_loss(flatten(logp, None, torch.arange(3)), None, beta=1.0).losses
    (dlogp,) = torch.autograd.grad(losses.sum(), logp)
    assert losses.item() == max(-gap, 0) and dlogp.tolist() == ([-1.0, 1.0] if gap < 0 else [0.0, 0.0])


def test_bits_are_a_matter_of_the_sequence_alone():
    """The same whatever stands before it, how it is padded, how many threads there are."""
    threads, options = torch.get_num_threads(), dict(beta=0.1, average="kept", pairs=None)
    try:
        for length in (1, 31, 700, 1024, 1500, 40_000):
            logp, ref, weight = torch.randn(3, length, dtype=F64)
            alone = sequence_loss(flatten(logp[None]), ref[None], token_weight=weight[None], **options)
            for before, padding in ((1, 0), (333, 1024), (70_000, 3)):
                whole = torch.full((3, before + length + padding), nan, dtype=F64)
                whole[:, before : before + length] = torch.stack([logp, ref, weight])
                tokens = flatten(whole[0], ~whole[0].isnan(), torch.tensor([0, before, whole.shape[1]]))
                for count in (1, 2):
                    torch.set_num_threads(count)
                    out = sequence_loss(tokens, whole[1], token_weight=whole[2], **options)
                    assert all(torch.equal(a[1:], b) for a, b in zip(out, alone, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ("few", "ones", "long"))
def test_bits_do_not_depend_on_threads(name):
    logp, ref, weight, mask, cu_seqlens = batch(LENGTHS[name] * (40 if name == "ones" else 1))
    upstream, threads, seen = torch.randn((len(cu_seqlens) - 1) // 2, dtype=F64), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            ours, _ = both(
                flatten(logp, mask, cu_seqlens), ref, upstream, phi=margin.logistic, beta=0.1, average="kept",
                pairs="interleaved", token_weight=weight,
            )  # fmt: skip
            seen.append(ours)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


def test_everything_is_written():
    """Allocations of torch, in C++ too, hold NaN while deterministic mode fills them."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for lengths in LENGTHS.values():
            logp, ref, weight, mask, cu_seqlens = batch(lengths, torch.float32)
            for pairs in ("halves", "interleaved", None):
                for w in (None, weight):
                    x = logp.clone().requires_grad_()
                    out = sequence_loss(flatten(x, mask, cu_seqlens), ref, beta=0.1, pairs=pairs, token_weight=w)
                    assert not any(t.isnan().any() for t in out)
                    assert not torch.autograd.grad(out.losses.sum(), x)[0].isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


def test_inputs_of_any_stride_and_left_alone():
    logp, ref, weight, mask, cu_seqlens = (t.repeat_interleave(2)[::2] for t in batch([5, 0, 40, 3]))
    before = [t.clone() for t in (logp, ref, weight)]
    x = logp.detach().requires_grad_()
    out = sequence_loss(flatten(x, mask, cu_seqlens), ref, beta=0.5, token_weight=weight)
    (dlogp,) = torch.autograd.grad(out.losses.sum(), x)  # an upstream of stride 0
    dense = logp.contiguous().requires_grad_()
    again = sequence_loss(
        flatten(dense, mask.contiguous(), cu_seqlens.contiguous()),
        ref.contiguous(),
        beta=0.5,
        token_weight=weight.contiguous(),
    )
    assert torch.equal(out.losses, again.losses)
    assert torch.equal(dlogp, torch.autograd.grad(again.losses, dense, torch.ones(2, dtype=F64))[0])
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip((logp, ref, weight), before, strict=True))


# ---- torch.library -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairs", (0, 1))
def test_opcheck(dtype, pairs):
    logp, ref, weight, mask, cu_seqlens = batch([3, 0, 5, 1], dtype)
    wide = torch.promote_types(dtype, torch.float32)
    each = torch.ones(2 if pairs else 4, dtype=F64)
    sign = None if pairs else each
    whole = logp.nan_to_num(), ref.nan_to_num()  # outputs are compared, and NaN is unequal to itself
    for m, w, x in ((None, None, whole), (mask, weight.to(wide), (logp, ref))):
        arguments = (*x, None, m, w, cu_seqlens, 1, pairs, 0, 0, 0, 0.1, 1.0, 0.0, each, 0.0, None, sign)
        torch.library.opcheck(torch.ops.finealign.sequence_loss_fwd.default, arguments)
        arguments = (
            each.to(wide),
            torch.ones(4, dtype=wide),
            torch.ones(4, dtype=wide),
            m,
            w,
            cu_seqlens,
            pairs,
            9,
            dtype,
        )
        torch.library.opcheck(torch.ops.finealign.sequence_loss_bwd.default, arguments)


def test_compiles_without_a_break():
    logp, ref, weight, mask, cu_seqlens = batch([3, 0, 5, 4], torch.float32)
    logp.requires_grad_()

    def loss(logp, ref, mask, cu_seqlens, weight):
        tokens = flatten(logp, mask, cu_seqlens)
        return sequence_loss(tokens, ref, beta=0.1, average="kept", token_weight=weight).losses.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    values = [f(logp, ref, mask, cu_seqlens, weight) for f in (loss, compiled)]
    assert_close(values[0], values[1])
    assert_close(*(torch.autograd.grad(value, logp)[0] for value in values))


# ---- on a GPU ------------------------------------------------------------------------------------------------------

gpu = pytest.mark.skipif(_native.cuda() is not None or not torch.cuda.is_available(), reason="no CUDA device")


def on_gpu(tokens):
    mask = None if tokens.mask is None else tokens.mask.cuda()
    return flatten(tokens.x.cuda(), mask, tokens.cu_seqlens.cuda())


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("phi", PHIS, ids=lambda phi: phi.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_bits_are_the_cpus(dtype, phi):
    for average, (name, lengths) in zip((*AVERAGES, "kept"), LENGTHS.items(), strict=True):
        logp, ref, weight, mask, cu_seqlens = batch(lengths, dtype)
        tokens, upstream = flatten(logp, mask, cu_seqlens), torch.randn(len(lengths) // 2)
        options = dict(phi=phi, beta=0.7, shift=0.2, average=average, **HYPER.get(phi, {}))
        here, _ = both(tokens, ref, upstream, token_weight=weight, **options)
        x = tokens.x.cuda().requires_grad_()
        out = sequence_loss(on_gpu(tokens).with_x(x), ref.cuda(), token_weight=weight.cuda(), **options)
        (dlogp,) = torch.autograd.grad(out.losses, x, upstream.to(out.losses).cuda())
        for actual, expected in zip((out.losses, out.score, out.slope, dlogp), here, strict=True):
            assert torch.equal(actual.detach().cpu(), expected), name


@gpu
@pytest.mark.gpu
def test_gpu_graph_and_no_sync():
    logp, ref, weight, mask, cu_seqlens = (t.cuda() for t in batch(LENGTHS["chunks"]))
    tokens = flatten(logp, mask, cu_seqlens)
    expected = sequence_loss(tokens, ref, token_weight=weight, beta=0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # captures on a stream of its own; a launch elsewhere or a sync would fail
        out = sequence_loss(tokens, ref, token_weight=weight, beta=0.1)
    graph.replay()
    assert torch.equal(out.losses, expected.losses)


# ---- refusals ------------------------------------------------------------------------------------------------------

T = flatten(torch.zeros(2, 3))
REFUSALS = {
    "phi": (lambda: sequence_loss(T, phi=margin.log_odds, beta=1.0), RuntimeError, "no kernel for 'log_odds'"),
    "pairs": (lambda: sequence_loss(T, beta=1.0, pairs="both"), ValueError, "pairs must be .* got 'both'"),
    "average": (lambda: sequence_loss(T, beta=1.0, average="mean"), ValueError, "average must be .* got 'mean'"),
    "average 0": (lambda: sequence_loss(T, beta=1.0, average=0), ValueError, "average must be .* got 0"),
    "odd": (lambda: sequence_loss(flatten(torch.zeros(3, 2)), beta=1.0), ValueError, "even number .* got 3"),
    "sign": (lambda: sequence_loss(T, beta=1.0, sign=torch.ones(2)), ValueError, "sign must be None for pairs"),
    "chosen": (
        lambda: sequence_loss(T, beta=1.0, pairs=None, chosen=margin.rising),
        ValueError,
        "chosen must be None wit",
    ),
    "two": (
        lambda: sequence_loss(T, beta=1.0, positive=margin.rising, chosen=margin.rising),
        ValueError,
        "chosen must be None beside positive, got rising",
    ),
    "positive": (
        lambda: sequence_loss(T, beta=1.0, positive=margin.squared),
        ValueError,
        "positive must be phi or take",
    ),
    "hyper": (lambda: sequence_loss(T, beta=1.0, center=1.0), TypeError, "hyper must be nothing for 'logistic'"),
    "no hyper": (lambda: sequence_loss(T, phi=margin.smoothed, beta=1.0), TypeError, "smoothing must be given"),
    "shift": (lambda: sequence_loss(T, beta=1.0, shift=torch.ones(3)), ValueError, r"shift must have shape \(1,\)"),
    "ref_logp": (lambda: sequence_loss(T, torch.zeros(3, 3), beta=1.0), ValueError, "ref_logp must have shape"),
    "summed": (lambda: sequence_loss(T, torch.zeros(2), beta=1.0, average="all"), ValueError, "ref_logp must hold"),
    "weight": (lambda: sequence_loss(T, beta=1.0, token_weight=torch.ones(6)), ValueError, "token_weight must have"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case):
    call, kind, message = REFUSALS[case]
    with pytest.raises(kind, match=message):
        call()


def test_what_is_missing_is_said():
    assert missing(margin.logistic, torch.device("cpu")) is None
    assert missing(margin.logistic, torch.device("mps")) == "it has no kernel for mps"
    assert "log_odds" in missing(margin.log_odds, torch.device("cpu"))


def test_the_extension_checks_what_it_reads_by():
    logp, ends = torch.zeros(6), torch.tensor([0, 3, 7])
    with pytest.raises(RuntimeError, match="cu_seqlens must end at 6, got 7"):
        torch.ops.finealign.sequence_loss_fwd(
            logp, None, None, None, None, ends, 0, 1, 0, 0, 0, 1.0, 1.0, 0.0, None, 0.0, None, None
        )
    one = torch.ones(2)
    with pytest.raises(RuntimeError, match="cu_seqlens must end at 6, got 7"):
        torch.ops.finealign.sequence_loss_bwd(one[:1], one, one, None, None, ends, 1, 6, torch.float32)

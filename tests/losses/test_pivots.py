"""Pivots, adaptive masks, masked losses and best-of-N: goldens, a plain loop as oracle, invariances, refusals."""

import math

import pytest
import torch
from host_reads import NoReads
from torch.testing import assert_close

import finealign_kernels as fk

F64 = torch.float64
NAN, INF = torch.nan, torch.inf


def row(*values, dtype=F64):
    return torch.tensor([values], dtype=dtype)


# Section 5.3 of the specification: token scores of a chosen and a rejected response
SCORES = row(0.8, -0.3, 0.1), row(0.5, -0.6, -0.02, 0.2, -0.9)
KINDS = {
    "threshold": dict(kind="threshold", threshold=0.75),
    "threshold in std": dict(kind="threshold", threshold=1.5, unit="std"),
    "sign": dict(kind="sign"),
    "sign over the row": dict(kind="sign", baseline="row"),
    "salience": dict(kind="salience", percent=40),
    "salience over a quantile": dict(kind="salience", percent=34, baseline="quantile", quantile=0.3),
}

# ---- goldens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "baseline, chosen, rejected", [(0.0, [1, 0, 1], [0, 1, 1, 0, 1]), ("batch", [1, 0, 1], [0, 1, 0, 0, 1])]
)
def test_golden_token_mask(baseline, chosen, rejected):
    found = fk.adaptive_mask(SCORES, baseline=baseline)
    assert [part.tolist() for part in found.token_weight] == [[chosen], [rejected]]
    assert_close(found.baseline[0][0, 0].item(), -0.0275 if baseline == "batch" else 0.0)
    assert all(part.dtype == torch.float32 for part in found.token_weight) and found.segment is None


@pytest.mark.parametrize(
    "name, flags, segments",
    [
        ("threshold", [1, 1, 0, 0, 1], [0, 1, 1, 1, 2]),
        ("sign", [1, 1, 0, 1, 1], [0, 1, 1, 2, 3]),
        ("salience", [1, 1, 0, 0, 1], [0, 1, 1, 1, 2]),
    ],
)
def test_golden_pivots(name, flags, segments):
    found = fk.pivot_flags(SCORES[1], **KINDS[name])
    assert found.int().tolist() == [flags] and found.dtype == torch.bool
    assert fk.pivot_segments(found).tolist() == [segments]


def test_golden_segment_mask():
    """Token 3 scores .2 and is carried along by its segment."""
    pivots = fk.pivot_flags(SCORES[1], kind="threshold", threshold=0.75)
    found = fk.adaptive_mask(SCORES[1], side=-1, pivots=pivots)
    assert found.token_weight.tolist() == [[0, 1, 1, 1, 1]] and found.segment.tolist() == [[0, 1, 1, 1, 2]]
    assert_close(found.score, row(0.5, -0.14, -0.14, -0.14, -0.9, dtype=torch.float32))
    summed = fk.adaptive_mask(SCORES[1], side=-1, pivots=pivots, segment_score="sum")
    assert_close(summed.score[0, 1].item(), -0.42, rtol=0, atol=1e-6)
    last = fk.adaptive_mask(SCORES[1], side=-1, pivots=pivots, segment_score="last")
    assert_close(last.score[0, 1:4], torch.full((3,), 0.2))
    assert last.token_weight.tolist() == [[0, 0, 0, 0, 1]]


CHOSEN, REF_CHOSEN = row(-0.5, -1.0, -0.2), row(-0.7, -0.9, -0.4)
REJECTED, REF_REJECTED = row(-1.2, -0.3, -0.8, -0.6, -1.5), row(-1.0, -0.5, -0.6, -0.9, -1.1)


@pytest.mark.parametrize(
    "baseline, average, loss, up, down",
    [
        (0.0, False, 0.5130152524, -0.2006561699, 0.2006561699),
        (0.0, "kept", 0.6132820581, -0.1146073792, 0.0764049195),
        ("batch", False, 0.5543552445, -0.2127787416, 0.2127787416),
        ("batch", "kept", 0.6209570478, -0.1156425387, 0.1156425387),
    ],
)
def test_golden_masked_dpo(baseline, average, loss, up, down):
    weight = fk.adaptive_mask(SCORES, baseline=baseline).token_weight
    logp = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    out = fk.dpo(logp, (REF_CHOSEN, REF_REJECTED), token_weight=weight, average=average, beta=0.5)
    assert_close(out.loss.item(), loss, rtol=0, atol=1e-9)
    for grad, slope, one in zip(torch.autograd.grad(out.loss, logp), (up, down), weight, strict=True):
        assert_close(grad, slope * one.double(), rtol=0, atol=1e-9)


def test_golden_masked_sft():
    weight = fk.adaptive_mask(SCORES[0], side=1).token_weight
    assert_close(fk.nll_loss(CHOSEN, token_weight=weight).loss.item(), 0.35)
    every = fk.nll_loss(CHOSEN, token_weight=weight, average="all").loss
    assert_close(every.item(), 0.2333333333, rtol=0, atol=1e-9)


def test_golden_masked_reward_model():
    """R = Σ M q / Σ M, L = -log σ(R⁺ - R⁻): SimPO's form on scores; the mask itself gets no gradient."""
    scores = tuple(part.clone().requires_grad_() for part in SCORES)
    weight = fk.adaptive_mask(scores).token_weight
    assert not any(part.requires_grad for part in weight)
    out = fk.simpo(scores, token_weight=weight, beta=1.0, gamma=0.0)
    assert_close(out.loss.item(), 0.3251016394, rtol=0, atol=1e-9)
    assert_close(out.chosen_rewards.item(), 0.45)
    assert_close(out.rejected_rewards.item(), -0.5066666667, rtol=0, atol=1e-9)
    up, down = torch.autograd.grad(out.loss, scores)
    pull = 1 / (1 + math.exp(out.margins.item()))
    assert_close(up, -pull * weight[0].double() / 2, rtol=1e-9, atol=0)
    assert_close(down, pull * weight[1].double() / 3, rtol=1e-9, atol=0)


# Section 4.9: whitened advantages of fixture D, their losses per token, and the token scores of section 5.4
MASK_D = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
ADVANTAGES = torch.tensor(
    [
        [0.9340625971, 1.0333311943, 1.0407384449, 0.6791492526, 0.6469691723, 0.2597758826],
        [-1.3216556455, -1.4381950707, -1.4328599851, -0.4013158426, NAN, NAN],
    ],
    dtype=F64,
)
TOKEN_LOSS = torch.tensor(
    [
        [-0.9819530106, -0.7655105768, -1.1501938627, -0.8149791031, -0.6341583243, -0.2597758826],
        [1.7840485137, 1.3680534694, 1.1462879881, 0.4435225982, 0, 0],
    ],
    dtype=F64,
)
Q_D = torch.tensor([[0.4, -0.2, 0.1, 0.3, -0.5, 0.2], [-0.6, -0.1, 0.2, -0.3, NAN, INF]])


def masked_policy_loss(weight):
    """Over kept tokens per row, over those of the batch, and over all tokens."""
    kept = (weight * TOKEN_LOSS).sum(1)
    return [(kept / weight.sum(1)).mean(), kept.sum() / weight.sum(), kept.sum() / MASK_D.sum()]


def test_golden_masked_advantages():
    """Section 5.4: A >= 0 with q > b, A < 0 with q < b."""
    weight = fk.adaptive_mask(Q_D, mask=MASK_D, side=ADVANTAGES).token_weight
    assert weight.tolist() == [[1, 0, 1, 1, 0, 1], [1, 1, 0, 1, 0, 0]]
    expected = [0.1984080312, 0.0555318175, 0.0388722722]
    assert_close(torch.stack(masked_policy_loss(weight)), torch.tensor(expected, dtype=F64), rtol=0, atol=1e-9)


def test_golden_masked_segments_of_advantages():
    """Section 11.7: a segment's side is that of its mean advantage."""
    ids = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 1, 1, -1, 5]], dtype=torch.int32)
    for layout in ({"segment_ids": ids}, {"pivots": torch.tensor([[1, 0, 0, 1, 0, 1], [1, 0, 1, 0, 0, 1]]).bool()}):
        found = fk.adaptive_mask(Q_D, mask=MASK_D, side=ADVANTAGES, baseline=-0.06, **layout)
        assert found.token_weight.tolist() == [[1, 1, 1, 0, 0, 1], [1, 1, 0, 0, 0, 0]]
        score = torch.tensor([[0.1, 0.1, 0.1, -0.1, -0.1, 0.2], [-0.35, -0.35, -0.05, -0.05, 0, 0]])
        assert_close(found.score, score)
        expected = [0.3933463292, -0.0008885583, -0.000533135]
        got = torch.stack(masked_policy_loss(found.token_weight))
        assert_close(got, torch.tensor(expected, dtype=F64), rtol=0, atol=1e-9)
    cu_segments = torch.tensor([0, 3, 5, 6, 8, 10])
    mean = fk.segment_mean(ADVANTAGES[MASK_D], cu_segments)
    expected = [1.0027107455, 0.6630592124, 0.2597758826, -1.3799253581, -0.9170879138]
    assert_close(mean, torch.tensor(expected, dtype=mean.dtype), rtol=0, atol=1e-9)
    score = fk.segment_mean(Q_D[MASK_D], cu_segments)
    assert_close(score, torch.tensor([0.1, -0.1, 0.2, -0.35, -0.05], dtype=score.dtype), rtol=0, atol=1e-7)


def test_masking_before_whitening_and_after_it():
    """Section 5.4: over the kept tokens, or over all of them."""
    advantage, score = row(2, -1, 0.5, 3), row(1, 1, 1, 1)
    whitened = fk.whiten(advantage)
    raw_mask = fk.adaptive_mask(score, side=advantage).token_weight != 0
    before = fk.whiten(advantage, mask=raw_mask)
    assert_close(before, row(0.1622214204, 0, -1.2977713629, 1.1355499425), rtol=0, atol=1e-9)
    after = torch.where(raw_mask, whitened, 0)
    assert_close(after, row(0.5773502679, 0, -0.4123930485, 1.2371791456), rtol=0, atol=1e-9)
    # whitening has turned the sign of the third, so the mask of what enters the loss drops it
    assert fk.adaptive_mask(score, side=whitened).token_weight.tolist() == [[1, 0, 0, 1]]


def test_scores():
    found = fk.implicit_scores((CHOSEN, REJECTED), (REF_CHOSEN, REF_REJECTED), beta=0.5)
    assert_close(found[0], row(0.1, -0.05, 0.1))
    assert_close(found[1][0, 0].item(), -0.1)
    mask = torch.tensor([[0, 1, 0, 1]], dtype=torch.bool)
    prefix = row(NAN, 0.5, INF, 0.25)
    assert_close(fk.prefix_scores(prefix, mask=mask), row(0, 0.5, 0, -0.25))
    assert_close(fk.prefix_scores(prefix, mask=mask, start=0.1), row(0, 0.4, 0, -0.25))
    flat = fk.prefix_scores(
        torch.tensor([1.0, 3, 2, 5]), cu_seqlens=torch.tensor([0, 2, 4]), start=torch.tensor([1.0, -1])
    )
    assert flat.tolist() == [0, 2, 3, 3]


def test_nothing_carries_gradient():
    x, mask = torch.randn(2, 3, requires_grad=True), torch.ones(2, 3, dtype=torch.bool)
    found = fk.adaptive_mask(x, mask=mask, soft=1.0, baseline=x.mean())
    for y in (fk.implicit_scores(x, x.exp(), mask=mask), fk.prefix_scores(x, mask=mask, start=x.mean()), *found[:3]):
        assert not y.requires_grad


# ---- against a plain loop ------------------------------------------------------------------------------------------


def batch(seed=0, rows=6, width=11):
    """Scores on a grid coarse enough for ties, with holes in the mask and NaN where it is false."""
    rng = torch.Generator().manual_seed(seed)
    q = torch.randint(-4, 5, (rows, width), generator=rng) / 8
    mask = torch.rand(rows, width, generator=rng) < 0.7
    mask[1] = False  # no response token
    mask[3] = torch.arange(width) == 4  # one token
    return torch.where(mask, q, NAN), mask


def plain_flags(q, mask, *, kind, threshold=None, unit="score", percent=None, baseline=0.0, quantile=None):
    pool = q[mask].double()
    flags = torch.zeros_like(mask)
    tau = None if threshold is None else threshold * (pool.std(correction=0).item() if unit == "std" else 1)
    for r in range(len(q)):
        at = mask[r].nonzero()[:, 0].tolist()
        b = plain_baseline(q, mask, baseline, quantile, r)
        size = sorted(at, key=lambda t: (-abs(q[r, t].item() - b), t))  # noqa: B023
        for k, t in enumerate(at):
            now, earlier = q[r, t].item() - b, q[r, at[k - 1]].item() - b
            if kind == "threshold":
                flags[r, t] = k == 0 or abs(now - earlier) > tau
            elif kind == "sign":
                flags[r, t] = k == 0 or now * earlier < 0
            else:
                flags[r, t] = k == 0 or t in size[: max(1, math.ceil(percent * len(at) / 100))]
    return flags


def plain_baseline(q, mask, baseline, quantile, r):
    pool = q[mask].double()
    if baseline == "row":
        return q[r][mask[r]].double().mean().float().item() if mask[r].any() else 0.0
    if baseline == "quantile":
        return pool.quantile(quantile).item()
    return pool.mean().float().item() if baseline == "batch" else baseline


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", KINDS)
def test_flags_are_those_of_a_loop(name, seed):
    q, mask = batch(seed)
    assert torch.equal(fk.pivot_flags(q, mask=mask, **KINDS[name]), plain_flags(q, mask, **KINDS[name]))


BASELINES = [dict(), dict(baseline="batch"), dict(baseline="row"), dict(baseline="quantile", quantile=0.35)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", BASELINES)
@pytest.mark.parametrize("segment_score", ("mean", "sum", "last", None))
def test_masks_are_those_of_a_loop(options, segment_score, seed):
    q, mask = batch(seed)
    flags = fk.pivot_flags(q, mask=mask, kind="sign") if segment_score else None
    found = fk.adaptive_mask(q, mask=mask, pivots=flags, segment_score=segment_score or "mean", **options)
    segment = fk.pivot_segments(flags, mask=mask) if segment_score else torch.arange(q.shape[1]).expand_as(q)
    form = {"mean": lambda x: x.mean(), "sum": lambda x: x.sum(), "last": lambda x: x[-1]}[segment_score or "mean"]
    for r in range(len(q)):
        b = plain_baseline(q, mask, options.get("baseline", 0.0), options.get("quantile"), r)
        for t in range(q.shape[1]):
            if not mask[r, t]:
                assert found.token_weight[r, t] == 0 and (segment_score is None or segment[r, t] == -1)
                continue
            value = form(q[r][mask[r] & (segment[r] == segment[r, t])].double()).float().item()
            assert_close(found.score[r, t].item(), value)
            assert found.token_weight[r, t] == (value > b if r < 3 else value < b), (r, t, value, b)
    if segment_score:
        assert torch.equal(found.segment, segment)


@pytest.mark.parametrize("side", ("halves", "interleaved", 1, -1, "tensor"))
def test_sides(side):
    q, mask = batch()
    advantage = torch.tensor([0.0, -2, 3, -0.1, NAN, 1])
    signs = {
        "halves": [1, 1, 1, -1, -1, -1],
        "interleaved": [1, -1] * 3,
        1: [1] * 6,
        -1: [-1] * 6,
        "tensor": [1, -1, 1, -1, 0, 1],
    }[side]
    found = fk.adaptive_mask(q, mask=mask, side=advantage if side == "tensor" else side).token_weight
    assert torch.equal(found, (torch.where(mask, q, 0) * torch.tensor(signs)[:, None] > 0).float())


def test_the_side_of_each_token():
    q, mask = batch()
    rng = torch.Generator().manual_seed(5)
    advantage = torch.randint(-2, 3, q.shape, generator=rng) / 2
    advantage[0, :3] = NAN
    given = torch.where(mask, advantage, INF)
    weight = fk.adaptive_mask(q, mask=mask, side=given, baseline=0.125).token_weight
    kept = mask & (((advantage >= 0) & (q > 0.125)) | ((advantage < 0) & (q < 0.125)))
    assert torch.equal(weight, kept.float()) and weight.any() and not weight[0, :3].any()
    halves = fk.adaptive_mask((q[:3], q[3:]), mask=(mask[:3], mask[3:]), side=(given[:3], given[3:]), baseline=0.125)
    assert torch.equal(torch.cat(halves.token_weight), weight)
    bounds = torch.arange(0, q.numel() + 1, q.shape[1])
    flat = dict(mask=mask.flatten(), cu_seqlens=bounds, side=given.flatten(), baseline=0.125)
    assert torch.equal(fk.adaptive_mask(q.flatten(), **flat).token_weight, weight.flatten())
    soft = fk.adaptive_mask(q, mask=mask, side=given, soft=0.25).token_weight
    expected = (torch.where(advantage >= 0, 1, -1) * q / 0.25).sigmoid()
    assert_close(soft, torch.where(mask & ~advantage.isnan(), expected, 0))


@pytest.mark.parametrize("segment_score", ("mean", "sum", "last"))
def test_segments_against_a_plain_loop(segment_score):
    """Sides of tokens and segments by number, some tokens of none."""
    form = {"mean": torch.mean, "sum": torch.sum, "last": lambda x: x[-1]}[segment_score]
    for seed in range(8):
        q, mask = batch(seed)
        rng = torch.Generator().manual_seed(seed)
        advantage = torch.where(mask, torch.randn(q.shape, generator=rng), NAN)
        ids = torch.randint(0, 2, q.shape, generator=rng).cumsum(1)
        ids[torch.rand(q.shape, generator=rng) < 0.2] = -1
        found = fk.adaptive_mask(q, mask=mask, side=advantage, segment_ids=ids, segment_score=segment_score)
        for r in range(len(q)):
            numbers = ids[r][mask[r] & (ids[r] >= 0)].unique().tolist()
            for t in range(q.shape[1]):
                if not mask[r, t] or ids[r, t] < 0:
                    assert found.token_weight[r, t] == 0 and found.segment[r, t] == -1
                    continue
                own = mask[r] & (ids[r] == ids[r, t])
                value, above = form(q[r][own].double()).float(), advantage[r][own].mean() >= 0
                assert found.segment[r, t] == numbers.index(ids[r, t])
                assert found.token_weight[r, t] == (value > 0 if above else value < 0)


def test_one_token_a_segment_is_the_token_form():
    q, mask = batch()
    advantage = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    tokens = fk.adaptive_mask(q, mask=mask, side=advantage, baseline="batch")
    each = torch.arange(q.shape[1]).expand(q.shape)
    segments = fk.adaptive_mask(q, mask=mask, side=advantage, baseline="batch", segment_ids=each)
    assert torch.equal(segments.token_weight, tokens.token_weight)


def test_degenerate_advantages(monkeypatch):
    """Section 5.5, where the advantages are the side."""
    monkeypatch.delenv("FINEALIGN_DEBUG", raising=False)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    advantage = torch.tensor([[0.0, -0.0, -1, NAN], [-2, 0, 0, 0], [1, 1, 1, 1]])
    constant = torch.full((3, 4), 0.5)
    assert not fk.adaptive_mask(constant, mask=mask, side=advantage, baseline="batch").token_weight.any()
    found = fk.adaptive_mask(constant, mask=mask, side=advantage, pivots=torch.zeros_like(mask))
    assert not found.token_weight.any()  # means -1/3 and -2 are below 0, the score .5 is not
    assert found.segment.tolist() == [[0, 0, 0, -1], [0, -1, -1, -1], [-1] * 4]
    up = fk.adaptive_mask(constant, mask=mask, side=advantage)
    assert up.token_weight.tolist() == [[1, 1, 0, 0], [0] * 4, [0] * 4]
    unknown = torch.where(torch.arange(4) == 1, NAN, 1.0).expand(3, 4)
    whole = fk.adaptive_mask(constant, mask=mask, side=unknown, pivots=torch.zeros_like(mask))
    assert whole.token_weight.tolist() == [[0] * 4, [1, 0, 0, 0], [0] * 4]
    one = {"side": row(1, -5, 1), "segment_ids": torch.zeros(1, 3, dtype=torch.int64)}
    found = fk.adaptive_mask(row(1, NAN, 1), **one)  # a token without a score has an advantage all the same
    assert not found.token_weight.any() and found.score.tolist() == [[1, 0, 1]]
    none = fk.adaptive_mask(torch.zeros(0, 4), side=torch.zeros(0, 4), segment_ids=torch.zeros(0, 4, dtype=torch.int64))
    assert none.token_weight.shape == (0, 4)


def test_soft_masks():
    q, mask = batch()
    found = fk.adaptive_mask(q, mask=mask, soft=0.5, baseline="batch")
    signs = torch.tensor([1.0, 1, 1, -1, -1, -1])[:, None]
    assert_close(found.token_weight[mask], (signs * (q - found.baseline) / 0.5).sigmoid()[mask])
    assert not found.token_weight[~mask].any()
    unknown = torch.tensor([1.0, -1, 1, -1, NAN, 1])
    assert not fk.adaptive_mask(q, mask=mask, side=unknown, soft=0.5).token_weight[4].any()
    hard = fk.adaptive_mask(q, mask=mask, baseline="batch").token_weight
    assert_close(fk.adaptive_mask(q, mask=mask, soft=1e-6, baseline="batch").token_weight, hard)


# ---- invariances ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("options", BASELINES)
def test_padding_packing_and_order_change_nothing(name, options):
    q, mask = batch()

    def both(q, **layout):
        flags = fk.pivot_flags(q, **layout, **KINDS[name])
        return flags, *fk.adaptive_mask(q, **layout, pivots=flags, **options)[:4]

    flags, *padded = both(q, mask=mask)
    # packed, without masked tokens
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    for one, other in zip((flags, *padded), both(q[mask], cu_seqlens=cu.int()), strict=True):
        assert torch.equal(one[mask], other)
    # more padding, with anything in it
    wide = [torch.nn.functional.pad(q, (2, 3), value=INF), torch.nn.functional.pad(mask, (2, 3))]
    for one, other in zip((flags, *padded), both(wide[0], mask=wide[1]), strict=True):
        assert torch.equal(one[mask], other[wide[1]])
    # another order of the rows
    turn = torch.tensor([2, 0, 1, 5, 3, 4])
    for one, other in zip((flags, *padded), both(q[turn], mask=mask[turn]), strict=True):
        assert torch.equal(one[turn][mask[turn]], other[mask[turn]])
    # chosen and rejected apart
    two = both((q[:3], q[3:]), mask=(mask[:3], mask[3:]))
    for one, other in zip((flags, *padded), two, strict=True):
        assert torch.equal(one[mask], torch.cat(other)[mask])


def test_pivots_outside_the_mask_are_none():
    q, mask = batch()
    flags = fk.pivot_flags(q, mask=mask, kind="sign")
    assert torch.equal(fk.pivot_segments(flags | ~mask, mask=mask), fk.pivot_segments(flags, mask=mask))
    for one, other in zip(
        fk.adaptive_mask(q, mask=mask, pivots=flags | ~mask),
        fk.adaptive_mask(q, mask=mask, pivots=flags),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_a_batch_mean_over_all_ranks_is_the_callers():
    q, mask = batch()
    whole = fk.adaptive_mask(q, mask=mask, baseline="batch", side=1)
    mean = q[mask].mean()
    for half in (slice(0, 3), slice(3, 6)):
        part = fk.adaptive_mask(q[half], mask=mask[half], baseline=mean, side=1)
        assert torch.equal(part.token_weight, whole.token_weight[half])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, F64))
def test_comparisons_are_in_float32(dtype):
    q, mask = batch()
    q = torch.where(mask, q / 3, 0).to(dtype)
    for name in KINDS:
        expected = fk.pivot_flags(q.float(), mask=mask, **KINDS[name])
        assert torch.equal(fk.pivot_flags(q, mask=mask, **KINDS[name]), expected)
    found = fk.adaptive_mask(q, mask=mask, baseline="batch")
    assert torch.equal(found.token_weight, fk.adaptive_mask(q.float(), mask=mask, baseline="batch").token_weight)


def test_thin_differences_make_a_pivot():
    """(q - b) times its neighbour underflows to 0."""
    assert fk.pivot_flags(row(1e-30, -1e-30, 1e-30, dtype=torch.float32), kind="sign").all()


def test_percentages_lose_no_digit():
    q = torch.arange(1000, 0, -1.0)[None]
    for percent, many in ((0.1, 1), (29.3, 293), (7, 70), (100, 1000), (0.05, 1), (0.11, 2)):
        assert fk.pivot_flags(q, kind="salience", percent=percent).sum() == many
    assert fk.pivot_flags(q.flip(1), kind="salience", percent=1e-9)[0].nonzero()[:, 0].tolist() == [0, 999]


def test_nothing_is_read_on_the_host(monkeypatch):
    monkeypatch.setattr("finealign_kernels.losses.pivots.reads_values", lambda x: False)  # as on a GPU
    q, mask = batch()
    with NoReads(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        q.sum().item()
    with NoReads():
        for name in KINDS:
            flags = fk.pivot_flags(q, mask=mask, **KINDS[name])
        for options in BASELINES:
            for segment_score in ("mean", "sum", "last"):
                fk.adaptive_mask(q, mask=mask, pivots=flags, segment_score=segment_score, **options)
        fk.adaptive_mask(q, mask=mask, side=q, segment_ids=mask.long().cumsum(1))
        fk.pivot_segments(flags, mask=mask)
        fk.best_of_n(q, mask=mask)


def test_compiles_without_a_break():
    def call(q, mask):
        flags = fk.pivot_flags(q, mask=mask, kind="salience", percent=30, baseline="row")
        return fk.adaptive_mask(q, mask=mask, pivots=flags, baseline="batch").token_weight

    q, mask = batch()
    assert torch.equal(torch.compile(call, fullgraph=True, backend="eager")(q, mask), call(q, mask))


# ---- degenerate cases ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_no_tokens(name):
    for shape in ((0, 4), (2, 0)):
        flags = fk.pivot_flags(torch.zeros(shape), **KINDS[name])
        assert flags.shape == shape
        for options in BASELINES:
            assert fk.adaptive_mask(torch.zeros(shape), pivots=flags, **options).token_weight.shape == shape
    none = torch.zeros(2, 3, dtype=torch.bool)
    flags = fk.pivot_flags(torch.full((2, 3), NAN), mask=none, **KINDS[name])
    assert not flags.any() and (fk.pivot_segments(flags, mask=none) == -1).all()
    for options in BASELINES:
        found = fk.adaptive_mask(torch.full((2, 3), NAN), mask=none, pivots=flags, **options)
        assert not found.token_weight.any() and found.baseline.isfinite().all()


@pytest.mark.parametrize("value", (0.1, -7e3, 1 / 3))
def test_constant_scores(value):
    q = torch.full((2, 37), value, dtype=F64)
    for kind in ("threshold", "threshold in std", "sign"):
        flags = fk.pivot_flags(q, **KINDS[kind])
        assert flags.sum(1).tolist() == [1, 1] and flags[:, 0].all()
    assert fk.pivot_flags(q, kind="salience", percent=10)[:, :4].all()  # ties to the lower index
    for pivots in (None, flags):
        for options in BASELINES[1:]:
            assert not fk.adaptive_mask(q, pivots=pivots, **options).token_weight.any()


def test_one_token():
    flags = fk.pivot_flags(torch.tensor([[0.5], [-0.5]]), kind="sign")
    assert flags.all() and not fk.pivot_segments(flags).any()
    assert fk.adaptive_mask(torch.tensor([[0.5], [-0.5]]), pivots=flags).token_weight.all()


def test_a_response_without_kept_tokens():
    """That side has h = 0 and no gradient, the other is trained; with none at all the loss stands at 0."""
    logp = torch.randn(2, 3, requires_grad=True)
    weight = fk.adaptive_mask(row(-1.0, -2, -3, dtype=torch.float32).expand(2, 3)).token_weight
    for average in (False, "kept", "all"):
        out = fk.dpo(logp, torch.zeros(2, 3), token_weight=weight, average=average)
        (grad,) = torch.autograd.grad(out.loss, logp)
        assert out.chosen_rewards == 0 and not grad[0].any() and grad[1].all()
    weight = fk.adaptive_mask(torch.zeros(2, 3)).token_weight
    out = fk.dpo(logp, torch.zeros(2, 3), token_weight=weight, average="kept")
    assert_close(out.loss.item(), math.log(2))
    assert not torch.autograd.grad(out.loss, logp)[0].any()


def test_a_nan_score_is_not_kept_and_makes_no_pivot(monkeypatch):
    monkeypatch.delenv("FINEALIGN_DEBUG", raising=False)
    q = row(1.0, NAN, 1.5, -1.0, NAN, -2.0, dtype=torch.float32)
    clean = row(1.0, 1.5, -1.0, -2.0, dtype=torch.float32)
    held = ~q.isnan()
    for kind in KINDS.values():
        flags = fk.pivot_flags(q, **kind)
        assert not flags[~held].any() and torch.equal(flags[held], fk.pivot_flags(clean, **kind)[0])
        for options in BASELINES:
            for soft in (None, 0.3):
                found = fk.adaptive_mask(q, side=1, pivots=flags, soft=soft, **options)
                expected = fk.adaptive_mask(clean, side=1, pivots=flags[held][None], soft=soft, **options)
                assert not found.token_weight[~held].any()
                assert torch.equal(found.token_weight[held], expected.token_weight[0])
    assert fk.pivot_flags(row(NAN, 1.0), kind="sign").tolist() == [[True, False]]
    monkeypatch.setenv("FINEALIGN_DEBUG", "1")
    for call in (lambda: fk.pivot_flags(q, kind="sign"), lambda: fk.adaptive_mask(q, side=1)):
        with pytest.raises(ValueError, match="token_score must hold numbers where mask is true, got NaN at .* 1"):
            call()
    fk.adaptive_mask(q, mask=held, side=1)  # outside the mask it may stand


def test_infinite_scores():
    q = row(INF, 1.0, -INF, dtype=torch.float32)
    assert fk.adaptive_mask(q, side=1).token_weight.tolist() == [[1, 1, 0]]
    assert fk.adaptive_mask(q, side=1, soft=1.0).token_weight[0, 0] == 1
    assert fk.pivot_flags(q, kind="threshold", threshold=5.0).all()
    assert fk.pivot_flags(q, kind="salience", percent=66).tolist() == [[True, False, True]]


# ---- best of N -----------------------------------------------------------------------------------------------------


def test_best_of_n():
    reward = torch.tensor([[1.0, 3, 2], [2, 2, 1], [NAN, -INF, NAN], [NAN, NAN, NAN], [0, NAN, -1], [-INF, INF, 5]])
    expected = [[0, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0]]
    assert fk.best_of_n(reward).int().tolist() == expected
    mask = torch.ones(6, 3, dtype=torch.bool)
    mask[0, 1] = False
    assert fk.best_of_n(reward, mask=mask)[0].tolist() == [False, False, True]
    ragged = fk.best_of_n(torch.tensor([1.0, 3, 2, 5, 5]), cu_seqlens=torch.tensor([0, 3, 3, 5]))
    assert ragged.tolist() == [False, True, False, True, False]
    assert fk.best_of_n(torch.zeros(2, 0)).shape == (2, 0)


def test_rejection_sampling_trains_the_best_response():
    """Best of three by reward, then the tokens above the baseline: NLL of those alone."""
    torch.manual_seed(0)
    logp, score = -torch.rand(6, 4), torch.randn(6, 4)
    best = fk.best_of_n(torch.tensor([[0.1, 0.9, 0.2], [0.5, 0.1, 0.4]])).reshape(-1)
    assert best.nonzero()[:, 0].tolist() == [1, 3]
    logp.requires_grad_()
    weight = fk.adaptive_mask(score[best], side=1).token_weight
    loss = fk.nll_loss(logp[best], token_weight=weight).loss
    keep = best[:, None] & (score > 0)
    assert_close(loss, -logp[keep].mean())
    assert_close(torch.autograd.grad(loss, logp)[0], keep / -keep.sum())


# ---- refusals ------------------------------------------------------------------------------------------------------

Q = torch.zeros(2, 3)
REFUSALS = {
    "kind": (lambda: fk.pivot_flags(Q, kind="step"), "kind must be one of .* got 'step'"),
    "no threshold": (lambda: fk.pivot_flags(Q, kind="threshold"), "threshold must be given with kind='threshold'"),
    "threshold": (lambda: fk.pivot_flags(Q, kind="threshold", threshold=-1), "threshold must be .* >= 0, got -1"),
    "idle threshold": (lambda: fk.pivot_flags(Q, kind="sign", threshold=1), "threshold must be None without kind="),
    "percent": (lambda: fk.pivot_flags(Q, kind="salience", percent=0), "percent must be .* > 0 and <= 100, got 0"),
    "percent nan": (lambda: fk.pivot_flags(Q, kind="salience", percent=NAN), "percent must be .* got nan"),
    "idle percent": (lambda: fk.pivot_flags(Q, kind="sign", percent=5), "percent must be None without"),
    "unit": (lambda: fk.pivot_flags(Q, kind="threshold", threshold=1, unit="sigma"), "unit must be .* got 'sigma'"),
    "idle baseline": (
        lambda: fk.pivot_flags(Q, kind="threshold", threshold=1, baseline="batch"),
        "baseline must be left out with kind='threshold'",
    ),
    "baseline": (lambda: fk.adaptive_mask(Q, baseline="mean"), "baseline must be .* got 'mean'"),
    "baseline nan": (lambda: fk.adaptive_mask(Q, baseline=NAN), "baseline must be a finite number, got nan"),
    "baseline shape": (lambda: fk.adaptive_mask(Q, baseline=torch.zeros(3)), r"baseline must .* \(2,\), got \(3,\)"),
    "quantile": (lambda: fk.adaptive_mask(Q, baseline="quantile"), "quantile must be given with baseline='quantile'"),
    "quantile range": (
        lambda: fk.adaptive_mask(Q, baseline="quantile", quantile=1.5),
        "quantile must be .* >= 0 and <= 1, got 1.5",
    ),
    "idle quantile": (lambda: fk.adaptive_mask(Q, quantile=0.5), "quantile must be None without"),
    "side": (lambda: fk.adaptive_mask(Q, side="chosen"), "side must be .* got 'chosen'"),
    "side 0": (lambda: fk.adaptive_mask(Q, side=0), "side must be .* got 0"),
    "side shape": (
        lambda: fk.adaptive_mask(Q, side=torch.ones(3)),
        r"side must have shape \(2,\) or \(2, 3\), got \(3,\)",
    ),
    "side of tokens": (lambda: fk.adaptive_mask(Q, side=Q.t()), r"side must have shape \(2,\) or .* got \(3, 2\)"),
    "side of which": (
        lambda: fk.adaptive_mask(Q[0], cu_seqlens=torch.tensor([0, 2, 2, 3]), side=torch.ones(3)),
        "side must be of tokens or of sequences, not of as many as there are of both",
    ),
    "pivots and ids": (
        lambda: fk.adaptive_mask(Q, pivots=Q == 0, segment_ids=torch.zeros(2, 3, dtype=torch.int64)),
        "segment_ids must be None where pivots are given",
    ),
    "ids fall": (
        lambda: fk.adaptive_mask(Q, segment_ids=torch.tensor([[0, 1, 1], [1, -1, 0]])),
        "segment_ids must not decrease in a sequence, got 0 after 1 at flat index 5",
    ),
    "odd": (lambda: fk.adaptive_mask(torch.zeros(3, 2)), "token_score must hold an even number of .* got 3"),
    "soft": (lambda: fk.adaptive_mask(Q, soft=0.0), "soft must be a finite number > 0, got 0.0"),
    "segment score": (lambda: fk.adaptive_mask(Q, segment_score="max"), "segment_score must be .* got 'max'"),
    "pivots shape": (
        lambda: fk.adaptive_mask(Q, pivots=torch.ones(2, 4, dtype=torch.bool)),
        r"pivots must have shape \(2, 3\), got \(2, 4\)",
    ),
    "flat": (lambda: fk.pivot_flags(Q[0], kind="sign"), r"token_score must be \(B, T\)"),
    "beta": (lambda: fk.implicit_scores(Q, Q, beta=0), "beta must be a finite number > 0, got 0"),
    "start": (lambda: fk.prefix_scores(Q, start=torch.zeros(3)), "start must hold one number or have shape"),
    "reward": (lambda: fk.best_of_n(torch.zeros(4)), r"reward must be \(B, T\)"),
}
TYPES = {
    "int scores": (lambda: fk.pivot_flags(Q.long(), kind="sign"), "token_score must have dtype"),
    "float pivots": (lambda: fk.adaptive_mask(Q, pivots=Q), "pivots must have dtype bool"),
    "float flags": (lambda: fk.pivot_segments(Q), "pivots must have dtype bool"),
    "float ids": (lambda: fk.adaptive_mask(Q, segment_ids=Q), "segment_ids must have dtype int32 or int64"),
    "int side": (lambda: fk.adaptive_mask(Q, side=Q.long()), "side must have dtype"),
    "side of a pair": (lambda: fk.adaptive_mask((Q, Q), side=(Q,)), "side must be a pair of tensors"),
    "float mask": (lambda: fk.adaptive_mask(Q, mask=Q), "mask must have dtype bool"),
    "list": (lambda: fk.best_of_n([1.0, 2.0]), "reward must be a tensor, got a list"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case):
    with pytest.raises(ValueError, match=REFUSALS[case][1]):
        REFUSALS[case][0]()


@pytest.mark.parametrize("case", TYPES)
def test_refusal_of_types(case):
    with pytest.raises(TypeError, match=TYPES[case][1]):
        TYPES[case][0]()

"""Token rewards: goldens, a plain loop as oracle, invariances, gradients, refusals."""

import math

import pytest
import torch
from host_reads import NoReads
from torch.testing import assert_close

import finealign_kernels as fk
from finealign_kernels.formulas.rewards import PLACEMENTS, to_go
from finealign_kernels.testing import samples

F64, NAN, INF = torch.float64, torch.nan, torch.inf


def segments(reward, end, cu_segments=None, *, dtype=F64, start=None, weight=1.0):
    cu_segments = torch.tensor([0, len(end)] if cu_segments is None else cu_segments)
    start = None if start is None else torch.tensor(start, dtype=torch.int64)
    end = torch.tensor(end, dtype=torch.int64)
    return fk.SegmentRewards(torch.tensor(reward, dtype=dtype), end, cu_segments, weight, start)


def placed(models, n, **options):
    """On one sequence of n tokens."""
    return fk.token_rewards(models, cu_seqlens=torch.tensor([0, n]), **options)


def expect(found, values):
    assert_close(found, torch.tensor(values, dtype=found.dtype), rtol=0, atol=1e-12)


# ---- goldens -------------------------------------------------------------------------------------------------------

DENSE = {
    "end": [0, 0, 0.3, 0, 0.2, 0.36],
    "all": [0.3, 0.3, 0.3, 0.2, 0.2, 0.36],
    "split": [0.1, 0.1, 0.1, 0.1, 0.1, 0.36],
    "rtg": [0.86, 0.86, 0.86, 0.56, 0.56, 0.36],
    "rtg_all": [1.66, 1.36, 1.06, 0.76, 0.56, 0.36],
}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_golden_placements(placement):
    """Section 4.8 of the specification."""
    expect(placed(segments([0.3, 0.2, 0.36], [2, 4, 5]), 6, placement=placement), DENSE[placement])


def test_golden_collisions():
    """Section 11.12: ends beyond a response of 5 tokens, and a sequence reward on its last."""
    expect(placed(segments([0.3, -0.3, 0.5], [1, 3, 6]), 5), [0, 0.3, 0, -0.3, 0.5])
    beyond, sequence = segments([0.3, -0.3, 0.5], [1, 6, 7]), segments([0.2], [4])
    expect(placed(beyond, 5), [0, 0.3, 0, 0, 0.2])
    expect(placed(beyond, 5, on_collision="overwrite"), [0, 0.3, 0, 0, 0.5])
    expect(placed([beyond, sequence], 5, on_collision="overwrite"), [0, 0.3, 0, 0, 0.7])


def test_golden_fixture_d():
    """Section 4.9: three densities of two responses, the second one padded."""
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    sub_sentence = segments([0.3, -0.3, -0.3], [2, 4, 2], [0, 2, 3])
    sentence = segments([1.0, -1.0], [4, 2], [0, 1, 2], weight=0.5)
    sequence = segments([0.36, -0.15], [5, 5], [0, 1, 2])
    found = fk.token_rewards([sub_sentence, sentence, sequence], mask=mask)
    expect(found, [[0, 0, 0.3, 0, 0.2, 0.36], [0, 0, -0.8, -0.15, 0, 0]])


def test_golden_drop_of_toxicity():
    """Section 4.1: what each sentence adds to the score of the prefix, at its last token; the sum telescopes."""
    toxicity = torch.tensor([0.10, 0.10, 0.40, 0.25], dtype=F64)
    model = segments([0, 0, 0], [1, 3, 4])._replace(reward=toxicity[:-1] - toxicity[1:])
    found = placed(model, 5)
    expect(found, [0, 0, 0, -0.3, 0.15])
    assert_close(found.sum(), toxicity[0] - toxicity[-1])


# ---- degenerate cases by hand --------------------------------------------------------------------------------------


def holes(*kept):
    return torch.tensor([kept], dtype=torch.bool)


@pytest.mark.parametrize("empty", ("previous", "drop"))
def test_an_end_on_a_masked_token_moves_back(empty):
    mask = holes(1, 1, 0, 0, 1, 0)
    expect(fk.token_rewards(segments([1, 2], [2, 5]), mask=mask, on_empty=empty), [[0, 1, 0, 0, 2, 0]])


@pytest.mark.usefixtures("unread")
def test_a_segment_without_tokens():
    mask = holes(0, 0, 1, 1, 0, 1)
    model = segments([1, 2, 4, 8, 16], [0, 1, 3, 4, 5])  # tokens: none, none, 2 and 3, none, 5
    found = {name: fk.token_rewards(model, mask=mask, placement=name) for name in PLACEMENTS}
    expect(found["end"], [[0, 0, 3, 12, 0, 16]])
    expect(found["all"], [[0, 0, 7, 12, 0, 16]])
    expect(found["split"], [[0, 0, 5, 10, 0, 16]])
    expect(found["rtg"], [[0, 0, 31, 31, 0, 16]])
    expect(found["rtg_all"], [[0, 0, 35, 28, 0, 16]])
    dropped = {name: fk.token_rewards(model, mask=mask, placement=name, on_empty="drop") for name in PLACEMENTS}
    expect(dropped["end"], [[0, 0, 0, 4, 0, 16]])
    expect(dropped["all"], [[0, 0, 4, 4, 0, 16]])
    expect(dropped["rtg"], [[0, 0, 20, 20, 0, 16]])
    later = {name: fk.token_rewards(model, mask=mask, placement=name, on_collision="overwrite") for name in PLACEMENTS}
    expect(later["end"], [[0, 0, 2, 8, 0, 16]])
    expect(later["all"], [[0, 0, 4, 8, 0, 16]])
    expect(later["split"], [[0, 0, 2, 8, 0, 16]])
    expect(later["rtg"], [[0, 0, 26, 26, 0, 16]])


def test_missing_scores_count_nothing():
    """A reward model whose input was cut gives fewer scores than there are segments."""
    model = segments([1.0, 2.0], [1, 3])
    for name in PLACEMENTS:
        expect(placed(model, 6, placement=name)[4:], [0, 0])


def test_a_response_without_tokens_receives_nothing():
    mask = torch.tensor([[0, 0, 0], [1, 1, 0], [0, 0, 0]], dtype=torch.bool)
    model = segments([1, 2, 4, 8], [0, 2, 1, 2], [0, 2, 3, 4])
    for name in PLACEMENTS:
        found = fk.token_rewards(model, mask=mask, placement=name)
        assert not found[[0, 2]].any() and found[1, 1] != 0
    assert fk.token_rewards(model, mask=mask[:, :0]).shape == (3, 0)


def test_batches_of_nothing():
    none = segments([], [], [0])
    assert fk.token_rewards(none, mask=torch.ones(0, 4, dtype=torch.bool)).shape == (0, 4)
    assert fk.token_rewards(none, cu_seqlens=torch.tensor([0])).shape == (0,)
    unscored = segments([], [], [0, 0, 0], dtype=torch.float32)
    for name in PLACEMENTS:
        found = fk.token_rewards(unscored, mask=torch.ones(2, 3, dtype=torch.bool), placement=name)
        assert found.dtype == torch.float32 and not found.any()
    assert not fk.token_rewards([], mask=torch.ones(2, 3, dtype=torch.bool)).any()


def test_one_segment_is_the_sequence():
    for name, value in {"end": [0, 0, 6], "all": [6, 6, 6], "split": [2, 2, 2], "rtg": [6, 6, 6]}.items():
        expect(placed(segments([6], [2]), 3, placement=name), value)


def test_tokens_between_segments():
    model = segments([1, 2], [2, 5], start=[1, 5])
    expect(placed(model, 7), [0, 0, 1, 0, 0, 2, 0])
    expect(placed(model, 7, placement="all"), [0, 1, 1, 0, 0, 2, 0])
    expect(placed(model, 7, placement="rtg"), [0, 3, 3, 0, 0, 2, 0])


# ---- against a plain loop ------------------------------------------------------------------------------------------


def plain(model, spans, mask, *, placement, on_collision, on_empty):
    """One model on flat tokens; spans (start, stop) of each sequence."""
    out, keep = torch.zeros(len(mask), dtype=F64), mask.tolist()
    for s, (first, stop) in enumerate(spans):
        kept = [t for t in range(first, stop) if keep[t]]
        received, owned, after = [], [], -1
        for j in range(int(model.cu_segments[s]), int(model.cu_segments[s + 1])):
            low = max(after + 1, 0 if model.start is None else int(model.start[j]))
            after = int(model.end[j])
            own = [t for t in kept if first + low <= t <= first + after]
            earlier = next((own[-1] for own in reversed(owned) if own), kept[0] if kept else None)
            received.append(own[-1] if own else earlier if on_empty == "previous" else None)
            owned.append(own)
        rewards = model.reward[int(model.cu_segments[s]) :].double().tolist()
        at_end = {}
        for reward, at in zip(rewards, received, strict=False):
            if at is not None:
                at_end[at] = reward + (at_end.get(at, 0) if on_collision == "add" else 0)
        row = {}
        for reward, own, at in zip(rewards, owned, received, strict=False):
            if placement == "end" or (not own and placement in ("all", "split", "rtg_all")):
                given = [] if at is None else [(at, reward)]
            elif placement == "rtg":
                given = [(t, sum(r for u, r in at_end.items() if u >= own[0])) for t in own if own]
            else:
                given = [(t, reward / len(own) if placement == "split" else reward) for t in own]
            for t, value in given:
                row[t] = value + (row.get(t, 0) if on_collision == "add" else 0)
        if placement == "rtg_all":
            row = {t: sum(value for u, value in row.items() if u >= t) for t in kept}
        for t, value in row.items():
            out[t] = value
    return model.weight * out


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("on_empty", ("previous", "drop"))
@pytest.mark.parametrize("on_collision", ("add", "overwrite"))
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_against_a_plain_loop(placement, on_collision, on_empty):
    rules = dict(placement=placement, on_collision=on_collision, on_empty=on_empty)
    for seed in range(12):
        rng = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, 12, (9,), generator=rng).tolist()
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        mask = torch.rand(sum(lengths), generator=rng) < (0.4, 0.8, 1.0)[seed % 3]
        models = samples.segment_rewards(lengths, dtype=F64, seed=seed)
        found = fk.token_rewards(models, mask=mask, cu_seqlens=cu_seqlens, **rules)
        spans = list(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True))
        assert_close(found, sum(plain(model, spans, mask, **rules) for model in models), rtol=1e-12, atol=1e-12)


def test_the_samples_hold_the_odd_cases():
    """What the test above is worth."""
    lengths = [7] * 40
    for k, model in enumerate(samples.segment_rewards(lengths, models=2, seed=1)):
        counts = model.cu_segments.diff()
        inner = torch.ones(len(model.end), dtype=torch.bool)
        inner[model.cu_segments[:-1][counts > 0]] = False
        assert (counts == 0).any() and (counts > 3).any()
        assert (model.end > 7).any() and (model.end == 0).any() and (model.end.diff()[inner[1:]] == 0).any()
        assert (model.start is not None) == (k == 1)


# ---- invariances ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_padded_packed_and_permuted_agree(placement):
    models = samples.segment_rewards([8] * 6, dtype=F64, seed=3)
    mask = torch.rand(6, 8, generator=torch.Generator().manual_seed(0)) < 0.7
    whole = fk.token_rewards(models, mask=mask, placement=placement)
    bounds = torch.arange(0, 49, 8, dtype=torch.int32)
    flat = fk.token_rewards(models, mask=mask.flatten(), cu_seqlens=bounds, placement=placement)
    assert torch.equal(flat.view(6, 8), whole)
    for s in range(6):  # a sequence alone, with padding on its left that moves every place by two
        alone = []
        for model in models:
            own = slice(int(model.cu_segments[s]), int(model.cu_segments[s + 1]))
            start = None if model.start is None else model.start[own] + 2
            bounds = torch.tensor([0, len(model.end[own])])
            alone.append(
                model._replace(reward=model.reward[own], end=model.end[own] + 2, cu_segments=bounds, start=start)
            )
        wider = torch.cat([torch.zeros(1, 2, dtype=torch.bool), mask[s : s + 1]], 1)
        assert torch.equal(fk.token_rewards(alone, mask=wider, placement=placement)[0, 2:], whole[s])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, F64))
def test_dtypes_and_layouts(dtype):
    models = samples.segment_rewards([9] * 4, dtype=dtype, index=torch.int32, seed=5)
    mask = torch.ones(9, 4, dtype=torch.bool).t()
    found = fk.token_rewards(models, mask=mask)
    wide = [model._replace(reward=model.reward.double(), end=model.end.long()) for model in models]
    exact = fk.token_rewards(wide, mask=mask)
    assert found.dtype == (F64 if dtype == F64 else torch.float32)
    assert torch.equal(found, exact.to(found.dtype))
    strided = [model._replace(reward=torch.stack([model.reward, model.reward], 1)[:, 0]) for model in models]
    assert torch.equal(fk.token_rewards(strided, mask=mask), found)


@pytest.mark.usefixtures("unread")
def test_the_sum_is_kept():
    """What end and split place is the sum of the rewards, whatever the segments, where every response has a token."""
    mask = torch.rand(20, 7, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[:, 3] = True
    for model in samples.segment_rewards([7] * 20, models=3, dtype=F64, seed=7):
        total = model.weight * fk.segment_sum(model.reward, model.cu_segments)
        for name in ("end", "split"):
            assert_close(fk.token_rewards(model, mask=mask, placement=name).sum(1), total)


def test_sums_stay_in_their_sequence():
    """NaN and infinity in one sequence are its own; formulas are called, as on a GPU, where no value is read."""
    x = torch.tensor([1, NAN, 2, 3, INF, 4, 5], dtype=F64)
    limit = torch.tensor([2, 2, 4, 4, 5, 7, 7])
    assert_close(to_go(x, limit), torch.tensor([NAN, NAN, 5, 3, INF, 9, 5], dtype=F64), equal_nan=True)
    x.requires_grad_()
    grad = torch.autograd.grad(to_go(x, limit)[2:4].sum(), x)[0]
    expect(grad, [0, 0, 1, 2, 0, 0, 0])


def test_nothing_is_read_on_the_host(monkeypatch):
    for module in ("rewards", "groups"):  # as on a GPU
        monkeypatch.setattr(f"finealign_kernels.rl.{module}.reads_values", lambda x: False)
    models = samples.segment_rewards([8] * 6, seed=3)
    mask = torch.rand(6, 8, generator=torch.Generator().manual_seed(0)) < 0.7
    with NoReads(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        mask.any().item()
    with NoReads():
        for placement in PLACEMENTS:
            for on_collision in ("add", "overwrite"):
                fk.token_rewards(models, mask=mask, placement=placement, on_collision=on_collision)
        advantage = fk.turn_advantages(models[0].reward, models[0].cu_segments, 3)
        fk.turn_advantages(models[0].reward, models[0].cu_segments, 3, kind="outcome")
        for kind in ("group_mean", "group_std", "batch_std", "leave_one_out"):
            fk.group_advantages(advantage, torch.arange(len(advantage)) % 5, kind=kind)
        fk.decoupled_advantages([advantage, advantage], torch.arange(len(advantage)) % 5)


@pytest.mark.usefixtures("unread")
def test_compiles_without_a_break():
    def call(mask, reward, turns):
        model = turns._replace(reward=fk.turn_advantages(reward, turns.cu_segments, 3))
        return [fk.token_rewards([model, turns], mask=mask, placement=placement) for placement in PLACEMENTS]

    turns = samples.segment_rewards([8] * 6, models=2, seed=3)[1]
    mask = torch.rand(6, 8, generator=torch.Generator().manual_seed(0)) < 0.7
    compiled = torch.compile(call, fullgraph=True, backend="eager")(mask, turns.reward, turns)
    for one, other in zip(compiled, call(mask, turns.reward, turns), strict=True):
        assert torch.equal(one, other)


# ---- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("on_collision", ("add", "overwrite"))
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradients(placement, on_collision):
    models = samples.segment_rewards([6] * 5, models=2, dtype=F64, seed=11)
    mask = torch.rand(5, 6, generator=torch.Generator().manual_seed(4)) < 0.7

    def rewards(*values):
        given = [model._replace(reward=value) for model, value in zip(models, values, strict=True)]
        return fk.token_rewards(given, mask=mask, placement=placement, on_collision=on_collision)

    values = [model.reward.requires_grad_() for model in models]
    assert torch.autograd.gradcheck(rewards, values)


def test_gradient_of_end_is_gathered():
    """dL/dR_j = w dL/dr at its last token: section 4.1."""
    model = segments([0.3, -0.3, 0.5], [1, 3, 6], weight=2.0)
    reward = model.reward.requires_grad_()
    upstream = torch.tensor([1.0, 2, 4, 8, 16], dtype=F64)
    placed(model, 5).backward(upstream)
    expect(reward.grad, [4, 16, 32])


# ---- ids to ends ---------------------------------------------------------------------------------------------------


def test_ends_of_numbered_tokens():
    ids = torch.tensor([[0, 0, 0, 1, 1, 2], [-1, 0, -1, 1, -1, 7], [3, 3, 3, 3, 3, 3]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    at = fk.segment_ends(ids, mask=mask)
    assert at.end.tolist() == [2, 4, 5, 1, 3] and at.start.tolist() == [0, 3, 5, 1, 3]
    assert at.cu_segments.tolist() == [0, 3, 5, 5]
    reward = torch.tensor([0.3, 0.2, 0.36, 1, 2], dtype=F64)
    model = fk.SegmentRewards(reward, at.end, at.cu_segments, start=at.start)
    found = fk.token_rewards(model, mask=mask, placement="all")
    expect(found, [DENSE["all"], [0, 1, 0, 2, 0, 0], [0] * 6])
    flat = fk.segment_ends(ids[:2].flatten().int(), mask=mask[:2].flatten(), cu_seqlens=torch.tensor([0, 6, 12]))
    assert all(torch.equal(a, b) for a, b in zip(flat, (at.end, at.cu_segments[:3], at.start), strict=True))


def test_ends_of_pivot_segments():
    rng = torch.Generator().manual_seed(1)
    mask, pivots = torch.rand(5, 9, generator=rng) < 0.8, torch.rand(5, 9, generator=rng) < 0.3
    ids = fk.pivot_segments(pivots, mask=mask)
    at = fk.segment_ends(ids, mask=mask)
    number = at.cu_segments.diff().tolist()
    assert number == (ids.amax(1) + 1).tolist()
    reward = torch.cat([torch.arange(n) for n in number]).double()
    found = fk.token_rewards(fk.SegmentRewards(reward, at.end, at.cu_segments), mask=mask, placement="all")
    assert torch.equal(found, torch.where(mask, ids, 0).double())


@pytest.mark.parametrize(
    "ids, said", [([0, 2], "2 after 0 at token 1"), ([1, 1], "1 after -1"), ([0, 1, 0], "0 after 1")]
)
def test_numbers_with_a_gap_are_refused(ids, said):
    with pytest.raises(ValueError, match=f"segment_ids must count .* got {said}"):
        fk.segment_ends(torch.tensor([ids]))


# ---- refusals ------------------------------------------------------------------------------------------------------

MASK = torch.ones(2, 4, dtype=torch.bool)
GOOD = segments([1, 2, 3], [0, 2, 3], [0, 2, 3])
REFUSALS = {
    "nan": (
        segments([1, 2, NAN], [0, 2, 3], [0, 2, 3]),
        r"models\[0\].reward must be a finite number, got nan for segment 0 of",
    ),
    "falls": (
        segments([1, 2], [2, 1], [0, 2, 2]),
        r"end must not decrease in a sequence, got 1 for segment 1 of sequence 0",
    ),
    "negative": (segments([1], [-1], [0, 0, 1]), "end must be at least 0, got -1 for segment 0 of sequence 1"),
    "overlap": (
        segments([1, 2], [1, 3], [0, 2, 2], start=[0, 1]),
        "start must be at least 0 and after the end before it",
    ),
    "start": (segments([1], [1], [0, 1, 1], start=[-1]), "start must be at least 0"),
    "first": (GOOD._replace(cu_segments=torch.tensor([1, 2, 3])), r"cu_segments must start at 0, got .*\[0\] = 1"),
    "bounds": (GOOD._replace(cu_segments=torch.tensor([0, 4, 3])), "cu_segments must not decrease"),
    "fewer": (GOOD._replace(cu_segments=torch.tensor([0, 1, 2])), "cu_segments must end at the number of rewards 3"),
    "sequences": (segments([1, 2, 3], [0, 2, 3], [0, 1, 2, 3]), r"cu_segments must have shape \(3,\), .* got \(4,\)"),
    "too many rewards": (GOOD._replace(reward=torch.ones(4)), r"models\[0\].end must have shape \(4,\), got \(3,\)"),
    "matrix": (GOOD._replace(reward=torch.ones(3, 1)), r"reward must have shape \(M,\)"),
    "weight": (GOOD._replace(weight=INF), "weight must be a finite number, got inf"),
}
TYPES = {
    "tuple": ((torch.ones(3), torch.ones(3)), r"models\[0\] must be SegmentRewards, got a Tensor"),
    "int rewards": (GOOD._replace(reward=torch.ones(3, dtype=torch.int64)), r"models\[0\].reward must have dtype"),
    "float ends": (GOOD._replace(end=torch.ones(3)), r"models\[0\].end must have dtype int32 or int64"),
    "float bounds": (GOOD._replace(cu_segments=torch.ones(3)), r"models\[0\].cu_segments must have dtype"),
    "list": (GOOD._replace(end=[0, 2, 3]), r"models\[0\].end must be a tensor, got a list"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case):
    model, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        fk.token_rewards(model, mask=MASK)
    with pytest.raises(ValueError, match=r"models\[1\]"):
        fk.token_rewards([GOOD, model], mask=MASK)


@pytest.mark.parametrize("case", TYPES)
def test_refusal_of_types(case):
    model, message = TYPES[case]
    with pytest.raises(TypeError, match=message):
        fk.token_rewards(model, mask=MASK)


def test_refusal_of_options_and_layouts():
    for option in ("placement", "on_collision", "on_empty"):
        with pytest.raises(ValueError, match=f"{option} must be one of .* got 'first'"):
            fk.token_rewards(GOOD, mask=MASK, **{option: "first"})
    with pytest.raises(TypeError, match="cu_seqlens must be a tensor, got a list"):
        fk.token_rewards(GOOD, cu_seqlens=[0, 5])
    with pytest.raises(ValueError, match="mask must be given"):
        fk.token_rewards(GOOD)
    with pytest.raises(TypeError, match="mask must have dtype bool"):
        fk.token_rewards(GOOD, mask=MASK.float())
    with pytest.raises(ValueError, match="cu_seqlens must not decrease"):
        fk.token_rewards(GOOD, cu_seqlens=torch.tensor([0, 5, 4]))


PROMPT = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 1], [0, 1, 1, 1, 1, 1, 1, 0]], dtype=torch.bool)
COLUMNS, INDICES = segments([1, 2, 3], [4, 7, 2], [0, 2, 3]), segments([1, 2, 3], [1, 4, 2], [0, 2, 3])
IN_FRONT = (
    "end must not lie in front of its response's first token, which is at 3: it is a column .* got 1 for segment 0"
)


@pytest.mark.parametrize("index", (torch.int32, torch.int64), ids=str)
@pytest.mark.parametrize("on_empty", ("previous", "drop"))
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("flat", (False, True), ids=("padded", "flat"))
def test_an_index_into_the_response_is_no_column(flat, placement, on_empty, index):
    layout = dict(mask=PROMPT.view(-1), cu_seqlens=torch.tensor([0, 8, 16])) if flat else dict(mask=PROMPT)
    columns, indices = (m._replace(end=m.end.to(index)) for m in (COLUMNS, INDICES))
    options = dict(placement=placement, on_empty=on_empty, **layout)
    assert fk.token_rewards(columns, **options).isfinite().all()
    for wrong in (indices, indices._replace(start=torch.tensor([0, 4, 2]))):
        with pytest.raises(ValueError, match=r"models\[0\]." + IN_FRONT):
            fk.token_rewards(wrong, **options)
    with pytest.raises(ValueError, match=r"models\[1\]." + IN_FRONT):
        fk.token_rewards([columns, indices], **options)


@pytest.mark.parametrize("backend", ("reference", "auto"))
def test_an_index_into_the_response_makes_no_advantages(backend):
    with pytest.raises(ValueError, match=r"rewards\[0\]." + IN_FRONT):
        fk.advantages(INDICES, torch.zeros(2, 8), mask=PROMPT, backend=backend)


def test_ends_that_are_not_in_front():
    """At the first token, on padding behind the response, anywhere in a response without tokens, without a prompt."""
    none = torch.zeros(1, 8, dtype=torch.bool)
    for mask, end in ((PROMPT[:1], 3), (PROMPT[:1], 6), (PROMPT[:1], 99), (none, 0), (none, 9), (~none, 0)):
        fk.token_rewards(segments([1.0], [end]), mask=mask)
    empty = torch.tensor([0, 0, 8, 8])
    fk.token_rewards(segments([1.0, 2.0, 3.0], [0, 3, 0], [0, 1, 2, 3]), mask=PROMPT[0], cu_seqlens=empty)
    with pytest.raises(ValueError, match="got 2 for segment 0 of sequence 1"):
        fk.token_rewards(segments([1.0, 2.0, 3.0], [0, 2, 0], [0, 1, 2, 3]), mask=PROMPT[0], cu_seqlens=empty)


# ---- from texts ----------------------------------------------------------------------------------------------------

TEXT = "One two. Three! Four"
OFFSETS = [(0, 3), (3, 7), (7, 8), (8, 14), (14, 15), (15, 20), (20, 20)]  # the last one ends the sequence
CUT = [(0, 8), (9, 15), (16, 20)]


@pytest.mark.parametrize("prompt", (0, 2, 5))
@pytest.mark.parametrize("behind", (0, 3))
def test_segment_rewards_have_columns(prompt, behind):
    mask = torch.zeros(2, prompt + 8 + behind, dtype=torch.bool)
    mask[0, prompt : prompt + 7] = mask[1, 1 : 1 + 7] = True
    given = [[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]
    found = fk.segment_rewards(given, [TEXT, TEXT], [OFFSETS, OFFSETS], mask=mask, weight=0.5)
    columns = [prompt + 2, prompt + 4, prompt + 5, 3, 5, 6]
    assert found.end.tolist() == columns and found.cu_segments.tolist() == [0, 3, 6]
    assert found.reward.tolist() == [1, 2, 4, 8, 16, 32] and found.weight == 0.5 and found.start is None
    rewards = fk.token_rewards(found, mask=mask)
    assert rewards.nonzero()[:, 1].tolist() == columns and (rewards.sum(1) == torch.tensor([3.5, 28.0])).all()
    flat = fk.segment_rewards(given, [TEXT] * 2, [OFFSETS] * 2, [CUT] * 2, mask=mask.view(-1), cu_seqlens=bounds(mask))
    assert torch.equal(flat.end, found.end)


def bounds(mask):
    return torch.arange(0, mask.numel() + 1, mask.shape[1])


def test_segment_rewards_step_over_holes_and_cut_responses():
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0, 1, 1], [0, 0, 0, 1, 1, 0, 0, 0, 0, 0], [0] * 10], dtype=torch.bool)
    offsets = [OFFSETS, OFFSETS[:2], []]  # a tool's output in the response; cut after two tokens; nothing
    reward = torch.arange(9.0, dtype=F64).requires_grad_()
    found = fk.segment_rewards(reward, [TEXT] * 3, offsets, fk.feedback.sentences, mask=mask)
    assert found.end.tolist() == [4, 6, 8, 4, 4, 4, 0, 0, 0] and found.reward is reward
    fk.token_rewards(found, mask=mask).sum().backward()
    assert reward.grad.tolist() == [1] * 6 + [0] * 3
    padded = OFFSETS + [(20, 20)] * 3  # ids decoded with their padding
    assert fk.segment_rewards([[1.0, 2, 4]], [TEXT], [padded], mask=mask[:1]).end.tolist() == [4, 6, 8]


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(texts=[TEXT]), r"texts must hold one entry for each of the 2 responses, got 1"),
        (dict(texts=TEXT), r"texts must hold one entry for each of the 2 responses, got a string"),
        (dict(rewards=[[1.0, 2.0, 3.0]]), "rewards must hold one entry"),
        (
            dict(rewards=[[1.0, 2.0], [1.0, 2.0, 3.0]]),
            r"rewards\[0\] must hold one number for each of the 3 segments, got 2",
        ),
        (dict(rewards=[[1.0, 2.0, NAN], [1.0, 2.0, 3.0]]), r"rewards\[0\] must be a finite number"),
        (dict(rewards=torch.ones(5)), r"rewards must have shape \(6,\), got \(5,\)"),
        (dict(offsets=[OFFSETS[:6], OFFSETS]), r"offsets\[0\] must hold one range for each of the 7 tokens .* got 6"),
        (dict(offsets=[OFFSETS, [*OFFSETS, (19, 20)]]), r"offsets\[1\] must hold one range .* got 8"),
        (dict(segments=[CUT]), "segments must hold one entry"),
        (dict(segments=[CUT, CUT[::-1]]), "segments must be in order"),
        (dict(weight=INF), "weight must be a finite number"),
    ],
)
def test_refusals_of_texts(changed, message):
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[:, 2:] = True
    given = dict(
        rewards=[[1.0, 2.0, 3.0]] * 2, texts=[TEXT] * 2, offsets=[[*OFFSETS[:6], (15, 20)], OFFSETS], mask=mask
    )
    with pytest.raises(ValueError, match=message):
        fk.segment_rewards(**given | changed)


def test_where_values_are_not_read_a_misplaced_segment_is_nan(monkeypatch):
    """As on a GPU: the bad segment's token becomes NaN, the other sequences stay as they are."""
    monkeypatch.setattr("finealign_kernels.rl.rewards.reads_values", lambda x: False)
    for bad in (segments([1, 2, 3], [2, 1, 3], [0, 2, 3]), segments([1, 2, 3], [-1, 2, 3], [0, 2, 3])):
        found = fk.token_rewards(bad, mask=MASK)
        assert found[0].isnan().any() and found[1].tolist() == [0, 0, 0, 3]
    nan = fk.token_rewards(segments([1, NAN, 3], [0, 2, 3], [0, 2, 3]), mask=MASK)
    assert math.isnan(nan[0, 2]) and nan[0, 0] == 1 and nan[1].tolist() == [0, 0, 0, 3]

"""Group and turn advantages: goldens, exact expectations by enumeration, plain loops, degenerate groups, refusals."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

import finealign_kernels as fk
from finealign_kernels.formulas.groups import KINDS

F64, NAN = torch.float64, torch.nan
TWO_GROUPS = torch.tensor([1, 0, 0.5, 1, 0.2, 0.2, 0.2, 0.2], dtype=F64)


def expect(found, values, atol=1e-9):
    assert_close(found, torch.tensor(values, dtype=found.dtype), rtol=0, atol=atol)


# ---- goldens of section 11.8 ---------------------------------------------------------------------------------------

GOLDEN = {
    "group_mean": [0.375, -0.625, -0.125, 0.375],
    "group_std": [0.7831858496, -1.3053097494, -0.2610619499, 0.7831858496],
    "leave_one_out": [0.5, -0.8333333333, -0.1666666667, 0.5],
    "batch_std": [0.9685724551, -1.6142874252, -0.322857485, 0.9685724551],
}


@pytest.mark.parametrize("kind", KINDS)
def test_golden_groups(kind):
    found = fk.group_advantages(TWO_GROUPS, 4, kind=kind)
    expect(found[:4], GOLDEN[kind])
    assert found[4:].tolist() == [0, 0, 0, 0]
    ids = torch.tensor([7, -3, 7, 7, -3, 7, -3, -3])
    mixed = torch.where(ids == 7, torch.tensor([1, 0, 0, 0.5, 0, 1, 0, 0], dtype=F64), 0.2)
    found = fk.group_advantages(mixed, ids, kind=kind)
    expect(found[ids == 7], GOLDEN[kind])
    assert not found[ids == -3].any()


def test_golden_eps_of_verl():
    found = fk.group_advantages(TWO_GROUPS, 4, kind="group_std", eps=1e-6)
    expect(found[:4], [0.7833478154, -1.3055796924, -0.2611159385, 0.7833478154])


def test_golden_decoupled():
    models = torch.tensor([[1, 0, 0.5, 1], [0, 1, 1, 1]], dtype=F64)
    golden = [0.0390800223, -1.2372121834, -0.0130266741, 1.2111588352]
    expect(fk.decoupled_advantages(models, 4, weights=[1, 0.5]), golden)
    expect(fk.decoupled_advantages(list(models), torch.zeros(4, dtype=torch.int32), weights=(1.0, 0.5)), golden)


# ---- exact expectations, section 11.9 ------------------------------------------------------------------------------

STAY, EARN = 1 / (1 + math.exp(-0.3)), 1 / (1 + math.exp(0.4))  # σ(θ_0), σ(θ_1)
EPISODES = [  # probability, rewards of its turns, ∇ log π of the action of each turn with respect to (θ_0, θ_1)
    (1 - STAY, [0.5], [(-STAY, 0)]),
    (STAY * EARN, [0.3, 1.0], [(1 - STAY, 0), (0, 1 - EARN)]),
    (STAY * (1 - EARN), [0.3, 0.0], [(1 - STAY, 0), (0, -EARN)]),
]
TRUE = [
    sum(p * sum(rewards) * sum(g[i] for g in scores) for p, rewards, scores in EPISODES) for i in range(2)
]  # E[G ∇ log π]


def expected_gradient(advantages, rows):
    """E[1/n Σ_i Σ_k A_ik ∇ log π] over every outcome of a prompt's rows."""
    total = torch.zeros(2, dtype=F64)
    for episodes in itertools.product(EPISODES, repeat=rows):
        p = math.prod(episode[0] for episode in episodes)
        rewards = [episode[1] for episode in episodes]
        scores = torch.tensor([score for episode in episodes for score in episode[2]], dtype=F64)
        total += p * (advantages(rewards)[:, None] * scores).sum(0) / rows
    return total


def ours(**options):
    def advantages(rewards):
        cu_turns = torch.tensor([0, *map(len, rewards)]).cumsum(0)
        return fk.turn_advantages(torch.tensor(sum(rewards, []), dtype=F64), cu_turns, len(rewards), **options)

    return advantages


def per_turn_index(others_only):
    """The biased construction: each turn against the rows that reached it."""

    def advantages(rewards):
        result = []
        for i, row in enumerate(rewards):
            gains = []
            for j, reward in enumerate(row):
                reached = [r[j] for m, r in enumerate(rewards) if len(r) > j and not (others_only and m == i)]
                gains.append(reward - (sum(reached) / len(reached) if reached else 0))
            result += [sum(gains[k:]) for k in range(len(row))]
        return torch.tensor(result, dtype=F64)

    return advantages


def test_the_true_gradient():
    expect(torch.tensor(TRUE, dtype=F64), [0.0492124747, 0.1380159875])


@pytest.mark.parametrize("rows", (2, 3))
@pytest.mark.parametrize("kind", ("return_to_go", "outcome"))
def test_the_expected_gradient_is_the_true_one(kind, rows):
    expect(expected_gradient(ours(kind=kind), rows), TRUE, atol=1e-12)
    shrunk = [(rows - 1) / rows * g for g in TRUE]
    expect(expected_gradient(ours(kind=kind, baseline="group_mean"), rows), shrunk, atol=1e-12)


def test_a_baseline_per_turn_index_is_biased():
    """It teaches the policy to stop although going on pays."""
    expect(expected_gradient(per_turn_index(True), 2), [-0.0071427127, 0.1380159875])
    expect(expected_gradient(per_turn_index(False), 2), [-0.0244458312, 0.0396411256])
    assert TRUE[0] > 0.04


# ---- against plain loops -------------------------------------------------------------------------------------------


def draw(seed, rows=15, keys=4, missing=0.15):
    rng = torch.Generator().manual_seed(seed)
    rewards = torch.randn(rows, generator=rng, dtype=F64)
    rewards[torch.rand(rows, generator=rng) < missing] = NAN
    return rewards, torch.randint(-keys, keys, (rows,), generator=rng) * 10**15


@pytest.mark.parametrize("kind", KINDS)
def test_groups_against_a_plain_loop(kind):
    for seed in range(10):
        rewards, ids = draw(seed)
        found = fk.group_advantages(rewards, ids, kind=kind, eps=1e-3)
        everything = rewards[~rewards.isnan()]
        for i, reward in enumerate(rewards):
            group = rewards[(ids == ids[i]) & ~rewards.isnan()]
            if reward.isnan() or len(group) == 1:
                assert found[i] == 0
                continue
            others = (group.sum() - reward) / (len(group) - 1)
            expected = {
                "group_mean": lambda: reward - group.mean(),  # noqa: B023
                "group_std": lambda: (reward - group.mean()) / (group.std() + 1e-3),  # noqa: B023
                "batch_std": lambda: (reward - group.mean()) / (everything.std() + 1e-3),  # noqa: B023
                "leave_one_out": lambda: reward - others,  # noqa: B023
            }[kind]()
            assert_close(found[i], expected, rtol=1e-12, atol=1e-12)


def test_decoupled_against_a_plain_loop():
    for seed in range(6):
        (a, ids), (b, _) = draw(seed), draw(seed + 100)
        found = fk.decoupled_advantages([a, b], ids, weights=[2, -0.5], eps=1e-3)
        x = 2 * fk.group_advantages(a, ids, eps=1e-3) - 0.5 * fk.group_advantages(b, ids, eps=1e-3)
        there = ~(a.isnan() & b.isnan())
        expected = torch.where(there, (x - x[there].mean()) / (x[there].std() + 1e-3), 0)
        assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("baseline", ("leave_one_out", "group_mean"))
@pytest.mark.parametrize("kind", ("return_to_go", "outcome"))
def test_turns_against_a_plain_loop(kind, baseline):
    for seed in range(10):
        rng = torch.Generator().manual_seed(seed)
        counts = torch.randint(0, 5, (12,), generator=rng)
        cu_turns = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        rewards = torch.randn(int(cu_turns[-1]), generator=rng, dtype=F64)
        rewards[torch.rand(len(rewards), generator=rng) < 0.05] = NAN
        ids = torch.randint(0, 4, (12,), generator=rng)
        rows = [rewards[cu_turns[s] : cu_turns[s + 1]].tolist() for s in range(12)]
        found = fk.turn_advantages(rewards, cu_turns, ids, kind=kind, baseline=baseline)
        expected = []
        for i, row in enumerate(rows):
            group = [r for m, r in enumerate(rows) if ids[m] == ids[i] and not math.isnan(sum(r))]
            others = [r for m, r in enumerate(rows) if ids[m] == ids[i] and m != i and not math.isnan(sum(r))]
            among = others if baseline == "leave_one_out" else group
            for k in range(len(row)):
                at = k if kind == "return_to_go" else 0
                alone = math.isnan(sum(row)) or not others
                expected.append(0 if alone else sum(row[at:]) - sum(sum(r[at:]) for r in among) / len(among))
        expect(found, expected, atol=1e-12)


def test_one_turn_each_is_the_group():
    rewards, ids = draw(3)
    cu_turns = torch.arange(len(rewards) + 1, dtype=torch.int32)
    for kind, baseline in itertools.product(("return_to_go", "outcome"), ("leave_one_out", "group_mean")):
        found = fk.turn_advantages(rewards, cu_turns, ids, kind=kind, baseline=baseline)
        assert_close(found, fk.group_advantages(rewards, ids, kind=baseline), rtol=1e-12, atol=1e-13)


def test_turns_spread_over_tokens():
    turns = fk.SegmentRewards(
        torch.tensor([0.5, 0.3, 1.0]), torch.tensor([2, 1, 4]), torch.tensor([0, 1, 3]), start=torch.tensor([0, 0, 3])
    )
    advantage = fk.turn_advantages(turns.reward, turns.cu_segments, 2)
    expect(advantage, [-0.8, 0.8, 1.0], atol=1e-6)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 1, 1]], dtype=torch.bool)
    found = fk.token_rewards(turns._replace(reward=advantage), mask=mask, placement="all", on_empty="drop")
    expect(found, [[-0.8, -0.8, -0.8, 0, 0], [0.8, 0.8, 0, 1, 1]], atol=1e-6)


# ---- degenerate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", (0.0, 1e-4))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (torch.float32, F64, torch.bfloat16))
def test_equal_rewards_are_exactly_zero(kind, eps, dtype):
    """0.1 three times has a mean above it in float64; a thousand and one of them in float32."""
    for n in (1, 3, 1001):
        assert fk.group_advantages(torch.full((n,), 0.1, dtype=dtype), n, kind=kind, eps=eps).tolist() == [0] * n
    turns = torch.tensor([0.1, 0.2, 0.7] * 7, dtype=dtype)
    for way in ("return_to_go", "outcome"):
        assert not fk.turn_advantages(turns, torch.arange(0, 22, 3), 7, kind=way).any()
    assert not fk.decoupled_advantages(turns.expand(2, 21) * 0 + 0.1, 7, eps=eps).any()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_leaves_its_group(kind):
    rewards = torch.tensor([1.0, NAN, 0, 5, 6, 7, NAN, NAN, NAN, 3, NAN, NAN])
    found = fk.group_advantages(rewards, 3, kind=kind)
    assert found[[1, 6, 7, 8, 9, 10, 11]].tolist() == [0] * 7
    without = fk.group_advantages(rewards[~rewards.isnan()], torch.tensor([0, 0, 1, 1, 1, 2]), kind=kind)
    assert torch.equal(found[~rewards.isnan()], without)


IN_GROUPS = {
    **{kind: lambda r, kind=kind: fk.group_advantages(r, 3, kind=kind) for kind in KINDS},
    "decoupled": lambda r: fk.decoupled_advantages(torch.stack([r, r * 2]), 3),
    "return_to_go": lambda r: fk.turn_advantages(r, torch.arange(0, 13, 2), 3),
    "outcome": lambda r: fk.turn_advantages(r, torch.arange(0, 13, 2), 3, kind="outcome"),
}


@pytest.mark.parametrize("bad", (math.inf, -math.inf))
@pytest.mark.parametrize("dtype", (torch.float32, F64, torch.bfloat16))
@pytest.mark.parametrize("name", IN_GROUPS)
def test_an_infinite_reward(name, dtype, bad, monkeypatch):
    """Refused where values are read; elsewhere what a NaN is, and no NaN comes of it."""
    rewards = torch.linspace(0, 1, 12, dtype=dtype)
    rewards[4] = NAN
    as_nan = IN_GROUPS[name](rewards)
    rewards[4] = bad
    with pytest.raises(ValueError, match=rf"rewards must be finite, .* got rewards\[.*4\] = {bad}"):
        IN_GROUPS[name](rewards)
    monkeypatch.setattr("finealign_kernels.rl.groups.reads_values", lambda x: False)
    found = IN_GROUPS[name](rewards)
    assert found.isfinite().all() and torch.equal(found, as_nan)


@pytest.mark.parametrize("size", (1e-300, 1e-200, 1e-155, 1e120, 1e155, 1e200, 8e307))
@pytest.mark.parametrize("kind", KINDS)
def test_float64_rewards_of_any_size(kind, size):
    """As of rewards times another power of ten, eps apart; beside them a group of other rewards, and a NaN."""
    r = torch.tensor([1, -1, 0.5, NAN, 0.25, 1, 2, 4], dtype=F64)
    groups, other = torch.tensor([5, 5, 5, 5, 5, 2, 2, 2]), 1e-100 if size < 1 else 1e100
    r = torch.where((groups == 2) & (size < 1), r * 1e-320, r)
    found = fk.group_advantages(torch.where(groups == 5, r * size, r), groups, kind=kind, eps=0.0)
    expected = fk.group_advantages(torch.where(groups == 5, r * other, r), groups, kind=kind, eps=0.0)
    back = size / other if kind in ("group_mean", "leave_one_out") else 1.0
    assert_close(found[:5], expected[:5] * back, rtol=1e-12, atol=0)
    if kind != "batch_std":
        assert torch.equal(found[5:], expected[5:])


def test_a_large_offset_costs_no_digits():
    rewards = torch.tensor([1, 0, 0.5, 1], dtype=F64)
    for kind in KINDS:
        assert_close(
            fk.group_advantages(rewards + 2**40, 4, kind=kind),
            fk.group_advantages(rewards, 4, kind=kind),
            rtol=1e-12,
            atol=0,
        )


def test_nothing_at_all():
    for kind in KINDS:
        assert fk.group_advantages(torch.zeros(0), 4, kind=kind).shape == (0,)
    assert fk.decoupled_advantages(torch.zeros(2, 0), 4).shape == (0,)
    none = fk.turn_advantages(torch.zeros(0), torch.zeros(5, dtype=torch.int64), 2)
    assert none.shape == (0,) and none.dtype == torch.float32


def test_results_are_constants_of_their_dtype():
    for dtype in (torch.float32, torch.float16, torch.bfloat16, F64):
        rewards = torch.rand(6, dtype=dtype, requires_grad=True)
        found = (
            fk.group_advantages(rewards, 3),
            fk.decoupled_advantages([rewards, rewards], 3),
            fk.turn_advantages(rewards, torch.tensor([0, 1, 3, 3, 6]), 2),
        )
        wanted = F64 if dtype == F64 else torch.float32
        assert all(x.dtype == wanted and not x.requires_grad for x in found)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_rows_does_not_matter(kind):
    rewards, ids = draw(8)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    there = fk.group_advantages(rewards[order], ids[order], kind=kind)
    assert_close(there, fk.group_advantages(rewards, ids, kind=kind)[order], rtol=1e-12, atol=1e-14)


# ---- refusals ------------------------------------------------------------------------------------------------------

R, CU = torch.zeros(6), torch.tensor([0, 2, 4, 6])
REFUSALS = {
    "kind": (lambda: fk.group_advantages(R, 3, kind="rloo"), "kind must be one of .* got 'rloo'"),
    "turn kind": (lambda: fk.turn_advantages(R, CU, 3, kind="per_turn"), "kind must be one of .* got 'per_turn'"),
    "baseline": (lambda: fk.turn_advantages(R, CU, 3, baseline="group_std"), "baseline must be one of"),
    "size": (lambda: fk.group_advantages(R, 4), "groups must .* divides 6, got 4"),
    "size 0": (lambda: fk.group_advantages(R, 0), "groups must .* got 0"),
    "turn size": (lambda: fk.turn_advantages(R, CU, 2), "groups must .* divides 3, got 2"),
    "ids": (lambda: fk.group_advantages(R, torch.zeros(5, dtype=torch.int64)), r"groups must have shape \(6,\)"),
    "eps": (lambda: fk.group_advantages(R, 3, eps=-1e-4), "eps must be a finite number >= 0, got -0.0001"),
    "matrix": (lambda: fk.group_advantages(R.view(2, 3), 3), r"rewards must have shape \(S,\), got \(2, 3\)"),
    "row": (lambda: fk.decoupled_advantages(R, 3), r"rewards must have shape \(K, S\)"),
    "no model": (lambda: fk.decoupled_advantages([], 3), "rewards must hold a model"),
    "unequal": (lambda: fk.decoupled_advantages([R, R[:3]], 3), r"rewards\[1\] must have shape \(6,\)"),
    "weights": (
        lambda: fk.decoupled_advantages([R, R], 3, weights=[1]),
        "weights must hold 2 numbers, one a model, got 1",
    ),
    "weight": (lambda: fk.decoupled_advantages([R], 3, weights=[NAN]), r"weights\[0\] must be a finite number"),
    "turns": (lambda: fk.turn_advantages(R, CU[:3], 2), "cu_turns must end at the number of rewards 6"),
}
TYPES = {
    "int rewards": (lambda: fk.group_advantages(R.long(), 3), "rewards must have dtype"),
    "float ids": (lambda: fk.group_advantages(R, R), "groups must have dtype int32 or int64"),
    "list": (lambda: fk.group_advantages([1.0], 1), "rewards must be a tensor, got a list"),
    "float turns": (lambda: fk.turn_advantages(R, CU.float(), 3), "cu_turns must have dtype"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case):
    with pytest.raises(ValueError, match=REFUSALS[case][1]):
        REFUSALS[case][0]()


@pytest.mark.parametrize("case", TYPES)
def test_refusal_of_types(case):
    with pytest.raises(TypeError, match=TYPES[case][1]):
        TYPES[case][0]()

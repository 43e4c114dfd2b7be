"""GAE, discounted returns, the KL penalty and whitening: worked examples, a loop over time in float64, odd batches."""

import math
import os
import random
import subprocess
import sys
from fractions import Fraction

import oracles
import pytest
import torch
from torch import inf, nan, tensor
from torch.testing import assert_close

from finealign_kernels.formulas import returns as formula
from finealign_kernels.ops import advantages as native
from finealign_kernels.rl.advantages import advantages
from finealign_kernels.rl.gae import discounted_returns, gae, kl_penalty
from finealign_kernels.rl.whitening import moments, whiten

F64 = torch.float64
HERE = torch.device("cpu")
CLOSE = {"rtol": 0, "atol": 5e-10}  # goldens have ten decimals


def _reason():
    try:
        native.runs("native", HERE)
    except RuntimeError as error:
        return str(error)
    return None


native_only = pytest.mark.skipif(_reason() is not None, reason=str(_reason()))


@pytest.fixture(params=["reference", pytest.param("native", marks=native_only)])
def backend(request):
    return request.param


def rows(*values):
    return tensor(values, dtype=F64)


# ---- fixtures of the specification ---------------------------------------------------------------------------------

# D: two responses, one padded
MASK_D = tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()
OLD_D = rows([-0.9, -0.4, -1.3, -0.6, -0.8, -0.2], [-0.5, -1.1, -0.7, -0.3, nan, nan])
REF_D = rows([-1.0, -0.5, -1.1, -0.6, -0.9, -0.3], [-0.6, -1.0, -0.9, -0.4, nan, nan])
V_D = rows([0.10, 0.05, 0.20, -0.10, 0, 0.30], [-0.05, 0.10, -0.20, 0.15, nan, nan])
PEN_D = rows([-0.03, -0.03, 0.36, 0, 0.17, 0.33], [-0.03, 0.03, -0.86, -0.18, nan, nan])

# F: holes, leading masked tokens, one token, none; what is masked is junk
MASK_F = tensor([[1, 1, 0, 0, 1, 1, 0], [0, 1, 1, 1, 0, 1, 0], [0, 0, 1, 0, 0, 0, 0], [0] * 7]).bool()
R_F = rows([0.1, 0, 9, 9, 0.2, 1.0, 9], [9, -0.1, 0, 0.3, 9, 0.5, 9], [9, 9, 0.7, 9, 9, 9, 9], [9] * 7)
V_F = rows([0.3, 0.2, 9, 9, -0.1, 0.4, 9], [9, 0.1, 0.25, -0.2, 9, 0.6, 9], [9, 9, 0.5, 9, 9, 9, 9], [9] * 7)
BOOT_F = tensor([0.4, 0, 0.9, 0.5], dtype=F64)
NONE = [0.0] * 7


@pytest.mark.parametrize(
    "masked, boot, advantages, returns",
    [
        (
            "carry",
            None,
            [[0.3372928, 0.49624, 0, 0, 1.092, 0.6, 0], [0, 0.2172112, 0.26696, 0.968, 0, -0.1, 0]],
            [[0.6372928, 0.69624, 0, 0, 0.992, 1, 0], [0, 0.3172112, 0.51696, 0.768, 0, 0.5, 0]],
        ),
        (
            "zero",
            None,
            [[0.0958701875, 0.160930816, 0, 0, 1.092, 0.6, 0], [0, 0.149280064, 0.1726112, 0.83696, 0, -0.1, 0]],
            [[0.3958701875, 0.360930816, 0, 0, 0.992, 1, 0], [0, 0.249280064, 0.4226112, 0.63696, 0, 0.5, 0]],
        ),
        (
            "carry",
            BOOT_F,
            [[0.47166208, 0.682864, 0, 0, 1.3512, 0.96, 0], [0, 0.2172112, 0.26696, 0.968, 0, -0.1, 0]],
            None,
        ),
        (
            "zero",
            BOOT_F,
            [[0.1655272223, 0.2576766976, 0, 0, 1.3512, 0.96, 0], [0, 0.149280064, 0.1726112, 0.83696, 0, -0.1, 0]],
            None,
        ),
    ],
)
@pytest.mark.parametrize("junk", [9.0, nan, inf])
def test_gae_with_holes(backend, masked, boot, advantages, returns, junk):
    r, v = (torch.where(MASK_F, x, junk) for x in (R_F, V_F))
    found = gae(r, v, mask=MASK_F, gamma=0.9, lam=0.8, bootstrap=boot, masked=masked, backend=backend)
    third = [0, 0, 0.2 if boot is None else 1.01, 0, 0, 0, 0]
    assert_close(found.advantages, rows(*advantages, third, NONE), **CLOSE)
    if returns:
        assert_close(found.returns, rows(*returns, [0, 0, 0.7, 0, 0, 0, 0], NONE), **CLOSE)
    assert_close(found.returns, torch.where(MASK_F, found.advantages + v, 0), rtol=0, atol=1e-15)


def test_gae_with_rates_of_each_sequence(backend):
    gamma, lam = tensor([0.9, 1, 0.5, 0.9], dtype=F64), tensor([0.8, 0.95, 0.5, 0.8], dtype=F64)
    found = gae(R_F, V_F, mask=MASK_F, gamma=gamma, lam=lam, bootstrap=BOOT_F, backend=backend)
    expected = rows(
        [0.47166208, 0.682864, 0, 0, 1.3512, 0.96, 0],
        [0, 0.5295125, 0.50475, 1.005, 0, -0.1, 0],
        [0, 0, 0.65, 0, 0, 0, 0],
        NONE,
    )
    assert_close(found.advantages, expected, **CLOSE)


@pytest.mark.parametrize(
    "masked, expected",
    [
        ("carry", [[0.991, 0.99, 0, 0, 1.1, 1, 0], [0, 0.5075, 0.675, 0.75, 0, 0.5, 0]]),
        ("zero", [[0.82171, 0.8019, 0, 0, 1.1, 1, 0], [0, 0.47105, 0.6345, 0.705, 0, 0.5, 0]]),
        ("restart", [[0.1, 0, 0, 0, 1.1, 1, 0], [0, 0.143, 0.27, 0.3, 0, 0.5, 0]]),
    ],
)
def test_discounted_returns(backend, masked, expected):
    # row 1 of restart: 0.3 at the token before the hole; rows 0 to 2 stand in the specification with γ = .9
    r = torch.where(MASK_F, R_F, nan)
    found = discounted_returns(r, gamma=0.9, masked=masked, mask=MASK_F, backend=backend)
    assert_close(found, rows(*expected, [0, 0, 0.7, 0, 0, 0, 0], NONE), **CLOSE)


@pytest.mark.parametrize(
    "gamma, lam, expected",
    [
        (
            1,
            0.95,
            [
                [0.5799188656, 0.6946514375, 0.60489625, 0.573575, 0.4985, 0.03],
                [-0.87970875, -1.052325, -0.8235, -0.33, 0, 0],
            ],
        ),
        (1, 1, [[0.7, 0.78, 0.66, 0.6, 0.5, 0.03], [-0.99, -1.11, -0.84, -0.33, 0, 0]]),
        (
            0.9,
            0.8,
            [
                [0.1846625193, 0.3745312768, 0.38129344, 0.432352, 0.4616, 0.03],
                [-0.46533184, -0.799072, -0.7626, -0.33, 0, 0],
            ],
        ),
    ],
)
def test_gae_of_a_padded_batch(backend, gamma, lam, expected):
    found = gae(PEN_D, V_D, mask=MASK_D, gamma=gamma, lam=lam, backend=backend)
    assert_close(found.advantages, rows(*expected), **CLOSE)


def test_segments_as_actions(backend):
    segment = tensor([[0, 0, 0, 1, 1, 2], [-1, 3, 3, -1, 7, 7]])
    raw = rows([0, 0, 0.3, 0, 0.2, 0.36], [5, -0.5, 0.25, 5, nan, nan])
    kl = kl_penalty(OLD_D, REF_D, mask=MASK_D)
    r = torch.where(MASK_D, raw - 0.3 * kl, nan)
    r[1] = raw[1]
    found = gae(r, V_D, mask=MASK_D, gamma=1, lam=0.95, segment_ids=segment, backend=backend)
    first = [0.668575, 0.668575, 0.668575, 0.5985, 0.5985, 0.03]
    # row 1: one segment (3) of two tokens, rewards -.5 + .25, V .1 at its first; the others are of none, or masked
    assert_close(found.advantages, rows(first, [0, -0.35, -0.35, 0, 0, 0]), **CLOSE)
    value = rows([0.1, 0.1, 0.1, -0.1, -0.1, 0.3], [0, 0.1, 0.1, 0, 0, 0])
    assert_close(found.returns, found.advantages + value, rtol=0, atol=1e-15)


def test_a_segment_of_one_token_is_the_token(backend):
    """Actions of one token each are tokens; one action of all is the sequence, γ and λ without a say."""
    each = torch.arange(7).expand(4, 7)
    plain = gae(R_F, V_F, mask=MASK_F, gamma=0.9, lam=0.8, bootstrap=BOOT_F, backend=backend)
    found = gae(R_F, V_F, mask=MASK_F, gamma=0.9, lam=0.8, bootstrap=BOOT_F, segment_ids=each, backend=backend)
    assert_close(found.advantages, plain.advantages, rtol=0, atol=1e-14)
    whole = gae(R_F, V_F, mask=MASK_F, gamma=0.9, lam=0.8, segment_ids=torch.zeros_like(each), backend=backend)
    assert_close(whole.advantages[0], torch.where(MASK_F[0], 1.3 - 0.3, 0).to(F64))


# ---- KL ------------------------------------------------------------------------------------------------------------


def test_kl_penalty():
    k1 = [[0.1, 0.1, -0.2, 0, 0.1, 0.1], [0.1, -0.1, 0.2, 0.1, 0, 0]]
    assert_close(kl_penalty(OLD_D, REF_D, mask=MASK_D), rows(*k1), **CLOSE)
    means = [kl_penalty(OLD_D[1:], REF_D[1:], estimator=k, mask=MASK_D[1:])[0, :4].mean() for k in ("k1", "k2", "k3")]
    assert_close(torch.stack(means), tensor([0.075, 0.00875, 0.0083941268], dtype=F64), **CLOSE)
    small = kl_penalty(tensor([[1e-9]], dtype=F64), torch.zeros(1, 1, dtype=F64), estimator="k3")
    assert_close(small, tensor([[5e-19]], dtype=F64), rtol=1e-6, atol=1e-24)  # not e^-d - 1 + d, digit by digit


# ---- whitening -----------------------------------------------------------------------------------------------------

ROOT = [-1.0690449642, -0.2672612411, 1.3363062053]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, ROOT),
        ({"shift_mean": False}, [x + 7 / 3 for x in ROOT]),
        ({"mode": "compat"}, [-1.1938983536, -0.2984745884, 1.492372942]),
        ({"unbiased": True}, [-0.8728715591, -0.2182178898, 1.0910894488]),
        ({"unbiased": True, "shift_mean": False}, [1.4604617743, 2.1151154436, 3.4244227822]),
        ({"mode": "clamp"}, [-1.0690449676, -0.2672612419, 1.3363062096]),
    ],
)
def test_whiten(backend, options, expected):
    x, mask = tensor([1, 2, nan, 4, inf], dtype=F64), tensor([True, True, False, True, False])
    found = whiten(x, mask=mask, backend=backend, **options)
    assert_close(found, tensor([*expected[:2], 0, expected[2], 0], dtype=F64), **CLOSE)
    assert_close(whiten(x[mask], backend=backend, **options), tensor(expected, dtype=F64), **CLOSE)


def test_whiten_the_advantages_of_rows_with_holes(backend):
    a = gae(R_F, V_F, mask=MASK_F, gamma=0.9, lam=0.8).advantages
    expected = rows(
        [-0.3027085226, 0.1128418218, 0, 0, 1.6703922111, 0.3841111726, 0],
        [0, -0.6166489396, -0.4865860572, 1.3462075591, 0, -1.4459634757, 0],
        [0, 0, -0.6616457693, 0, 0, 0, 0],
        NONE,
    )
    assert_close(whiten(a, mask=MASK_F, unbiased=True, backend=backend), expected, **CLOSE)


@pytest.mark.parametrize("mode", ["std", "clamp", "compat"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_where_there_is_nothing_to_whiten(backend, mode, unbiased, dtype):
    options = {"mode": mode, "unbiased": unbiased, "backend": backend}
    for many in (1, 2, 3, 777, 10_000):
        x = torch.full((many,), 0.1, dtype=dtype)
        assert not whiten(x, **options).any()
        assert_close(whiten(x, shift_mean=False, **options).double(), x.double(), rtol=1e-6, atol=0)
    none = torch.zeros(3, dtype=torch.bool)
    for shift in (False, True):
        assert not whiten(torch.full((3,), nan, dtype=dtype), mask=none, shift_mean=shift, **options).any()
        assert whiten(torch.zeros(0, dtype=dtype), shift_mean=shift, **options).shape == (0,)
        assert whiten(tensor([1.0, nan, 2.0]).to(dtype), shift_mean=shift, **options).isnan().all()
        assert whiten(tensor([1.0, -inf, 2.0]).to(dtype), shift_mean=shift, **options).isnan().all()


def test_two_values_become_one_each_way(backend):
    assert_close(whiten(tensor([3.0, 5.0]), backend=backend), tensor([-1.0, 1.0]), rtol=1e-6, atol=0)


def test_a_large_offset_keeps_its_variance(backend):
    """float32 moments give a variance of -262144 here."""
    x = 1e6 + torch.arange(4096, dtype=torch.float32) % 2
    assert_close(whiten(x, backend=backend), 2 * (x - 1e6) - 1, rtol=0, atol=1e-6)


def whitened_exactly(x, mask, by=0.5):
    """(x - μ) (v + 1e-8)^-½ in fractions, and with by=0.25 the released code's."""
    kept = [Fraction(value) for value in x[mask].tolist()]
    mean = sum(kept) / len(kept)
    v = float(sum((value - mean) ** 2 for value in kept) / len(kept))
    scale = (v + 1e-8) ** -0.5 if by == 0.5 else (v**0.5 + 1e-8) ** -0.5
    return tensor([float(value - mean) * scale for value in kept], dtype=F64)


@pytest.mark.parametrize("many", [5, 700, 9001])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6, 1e8, 1e12])
def test_a_mean_far_from_0_costs_no_digits(backend, offset, many):
    """As near as x - fl(μ) is; Σx²/n - μ² is 1e-4 off at 1e6."""
    x, mask = torch.randn(many, dtype=F64) + offset, torch.rand(many) < 0.8
    mask[1] = mask[-2] = True
    expected = whitened_exactly(x, mask)
    off = 1e-14 + 2.0**-52 * offset
    for values in (x, torch.where(mask, x, nan)):
        assert_close(whiten(values, mask=mask, backend=backend)[mask], expected, rtol=1e-13, atol=off)
    flat = {"mask": mask[None], "gamma": 0.0, "backend": backend}
    found = advantages(x[None], whiten_rewards=True, **flat)  # keeps the mean, which the second whitening takes off
    assert_close(found.advantages[mask[None]], expected, rtol=1e-7, atol=1e-7 + 4 * off)
    found = advantages(x[None], whitening="compat", **flat).advantages[mask[None]]
    assert_close(found, whitened_exactly(x, mask, 0.25), rtol=1e-13, atol=off)
    narrow = (x - offset + min(offset, 1e6)).float()
    expected = whitened_exactly(narrow, mask)
    assert_close(whiten(narrow, mask=mask, backend=backend)[mask].double(), expected, rtol=1.2e-7, atol=1e-9)


@pytest.mark.parametrize("place", [0, 1, 650])
def test_one_value_far_from_the_others(backend, place):
    x = torch.randn(700, dtype=F64)
    x[place] = 1e7
    found, expected = whiten(x, backend=backend), whitened_exactly(x, torch.ones(700, dtype=torch.bool))
    assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [0.1, -1e10 / 3, 1e-200])
def test_one_float64_value_is_constant_and_two_neighbours_are_not(backend, value):
    for many in (2, 3, 777, 10_000):
        x = torch.full((many,), value, dtype=F64)
        assert not whiten(x, backend=backend).any()
    near = tensor([1e10, 1e10 * (1 + 2.0**-40)], dtype=F64)  # 2^-46 of Σx² would call them one
    assert_close(whiten(near, backend=backend), tensor([-1.0, 1.0], dtype=F64), rtol=0, atol=1e-3)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_moments_of_ranks_add_up(backend, ranks):
    x, mask = torch.randn(8, 33) * 3 + 5, torch.rand(8, 33) < 0.7
    parts = list(zip(x.chunk(ranks), mask.chunk(ranks), strict=True))
    total = sum(moments(*part, backend=backend) for part in parts)
    assert total.dtype == F64 and total.shape == (3,)
    found = [whiten(x, mask=m, sum_moments=lambda own: total, backend=backend) for x, m in parts]
    assert_close(torch.cat(found), whiten(x, mask=mask, backend=backend), rtol=0, atol=1e-6)
    assert_close(total[0].item(), float(mask.sum()))


# ---- against a loop over time --------------------------------------------------------------------------------------


def by_loop(r, v, mask, cu_seqlens, gamma, lam, boot, masked):
    """float64, a token after another, from the right."""
    advantages, returns = torch.zeros_like(r), torch.zeros_like(r)
    for s in range(len(cu_seqlens) - 1):
        a, ahead, seen = 0.0, boot[s].item(), False
        g, gl = gamma[s].item(), gamma[s].item() * lam[s].item()
        for t in reversed(range(int(cu_seqlens[s]), int(cu_seqlens[s + 1]))):
            if mask[t]:
                a = r[t].item() + g * ahead - v[t].item() + gl * a
                advantages[t], returns[t] = a, a + v[t].item()
                ahead, seen = v[t].item(), True
            elif seen and masked == "zero":
                a, ahead = g * ahead + gl * a, 0.0
    return advantages, returns


LENGTHS = {
    "short": [0, 1, 2, 7, 8, 9, 0, 31, 33, 0],
    "tiles": [511, 512, 513, 0, 1023, 1025, 3],
    "cut": [32_767, 32_768, 32_769, 80_001, 1],
    "ones": [1] * 300,
    "none": [],
    "empty": [0, 0],
}


def packed(lengths, dtype=F64, seed=0, kept=0.7):
    rng = torch.Generator().manual_seed(seed)
    cu_seqlens = tensor([0, *lengths]).cumsum(0)
    n = int(cu_seqlens[-1])
    mask = torch.rand(n, generator=rng) < kept
    if n > 1000:
        mask |= torch.rand(n // 700 + 1, generator=rng).repeat_interleave(700)[:n] < 0.5  # long runs without a hole
        mask &= torch.rand(n // 900 + 1, generator=rng).repeat_interleave(900)[:n] < 0.8  # and long holes
    assert n == 0 or n / 4 < mask.sum() < n
    r, v = (torch.where(mask, torch.randn(n, generator=rng, dtype=F64).to(dtype), nan) for _ in range(2))
    gamma, lam, boot = (torch.rand(len(lengths), generator=rng, dtype=F64) for _ in range(3))
    return r, v, mask, cu_seqlens, 1 - gamma * 0.02, 1 - lam * 0.1, boot


@pytest.mark.parametrize("masked", ["carry", "zero"])
@pytest.mark.parametrize("name", LENGTHS)
def test_gae_against_a_loop(backend, name, masked):
    r, v, mask, cu_seqlens, gamma, lam, boot = packed(LENGTHS[name])
    exact = by_loop(r, v, mask, cu_seqlens, gamma, lam, boot, masked)
    options = {"mask": mask, "cu_seqlens": cu_seqlens, "masked": masked, "backend": backend}
    for index in (torch.int32, torch.int64):
        options["cu_seqlens"] = cu_seqlens.to(index)
        found = gae(r, v, gamma=gamma, lam=lam, bootstrap=boot, **options)
        for one, other in zip(found, exact, strict=True):
            assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masked", ["carry", "zero", "restart"])
@pytest.mark.parametrize("name", LENGTHS)
def test_discounted_returns_against_a_loop(backend, name, masked):
    r, _, mask, cu_seqlens, gamma, _, boot = packed(LENGTHS[name])
    cuts = cu_seqlens
    if masked == "restart":  # every masked token an end
        cuts = torch.cat([cu_seqlens, (~mask).nonzero()[:, 0]]).sort().values
    rates = torch.full((len(cuts) - 1,), 0.97, dtype=F64)
    zeros = torch.zeros_like(rates)
    convention = "zero" if masked == "zero" else "carry"
    exact = by_loop(r, torch.zeros_like(r), mask, cuts, rates, rates**0, zeros, convention)[0]
    found = discounted_returns(r, gamma=0.97, masked=masked, mask=mask, cu_seqlens=cu_seqlens, backend=backend)
    assert_close(found, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_rounded_once(backend, dtype):
    r, v, mask, cu_seqlens, gamma, lam, boot = packed(LENGTHS["tiles"], dtype)
    exact = by_loop(r.double(), v.double(), mask, cu_seqlens, gamma, lam, boot, "carry")
    options = {"gamma": gamma, "lam": lam, "bootstrap": boot, "mask": mask, "cu_seqlens": cu_seqlens}
    found = gae(r, v, backend=backend, **options)
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.float32
        assert_close(one.double(), other, rtol=2**-24, atol=1e-12)
    mixed = gae(r.double(), v, backend=backend, **options)
    assert mixed.returns.dtype == F64
    assert_close(mixed.advantages, exact[0], rtol=1e-12, atol=1e-12)


# ---- against the trainers' own code --------------------------------------------------------------------------------


def rollout(rows=5, width=40, holes=True):
    rng = torch.Generator().manual_seed(1)
    r, v = (torch.randn(rows, width, generator=rng, dtype=F64) for _ in range(2))
    mask = torch.arange(width) < torch.randint(2, width + 1, (rows, 1), generator=rng)
    if holes:
        mask &= torch.rand(rows, width, generator=rng) < 0.7
        mask[:, 0] = True
    return r, v, mask


def test_carry_is_verls_rule(backend):
    r, v, mask = rollout()
    core = oracles.oracle(oracles.verl_core)
    advantages, returns = core.compute_gae_advantage_return(r, v, mask.to(F64), 0.97, 0.9)
    found = gae(r, v, mask=mask, gamma=0.97, lam=0.9, backend=backend)
    assert_close(found.returns, torch.where(mask, returns, 0), rtol=0, atol=1e-12)
    whitened = whiten(found.advantages, mask=mask, unbiased=True, backend=backend)
    assert_close(whitened, torch.where(mask, advantages, 0), rtol=0, atol=1e-8)  # it adds 1e-8 to the count


def test_zero_is_openrlhfs_rule(backend):
    r, v, mask = rollout()
    advantages, returns = oracles.oracle(oracles.openrlhf_gae)(v, r, mask, 0.97, 0.9)
    found = gae(r, v, mask=mask, gamma=0.97, lam=0.9, masked="zero", backend=backend)
    assert_close(found.advantages, torch.where(mask, advantages, 0), rtol=0, atol=1e-12)
    assert_close(found.returns, torch.where(mask, returns, 0), rtol=0, atol=1e-12)
    expected = oracles.oracle(oracles.openrlhf_returns)(r, mask, 0.97)
    found = discounted_returns(r, gamma=0.97, masked="zero", mask=mask, backend=backend)
    assert_close(found, torch.where(mask, expected, 0), rtol=0, atol=1e-12)


# ---- what must not matter ------------------------------------------------------------------------------------------


def test_padding_packing_order_and_strides_do_not_matter(backend):
    lengths = [700, 1, 0, 513, 64]
    r, v, mask, cu_seqlens, gamma, lam, boot = packed(lengths, torch.float32)
    options = {"masked": "carry", "backend": backend}
    flat = gae(r, v, mask=mask, cu_seqlens=cu_seqlens, gamma=gamma, lam=lam, bootstrap=boot, **options)
    parts = list(range(len(lengths)))
    random.Random(0).shuffle(parts)

    def padded(x, fill, width=1000):
        out = torch.full((len(parts), width), fill, dtype=x.dtype)
        for row, s in enumerate(parts):
            out[row, : lengths[s]] = x[cu_seqlens[s] : cu_seqlens[s + 1]]
        return out

    order = tensor(parts)
    args = padded(r, nan), padded(v, nan)
    found = gae(*args, mask=padded(mask, False), gamma=gamma[order], lam=lam[order], bootstrap=boot[order], **options)
    strided = gae(
        *(x.t().contiguous().t() for x in args),
        mask=padded(mask, False).t().contiguous().t(),
        gamma=gamma[order],
        lam=lam[order],
        bootstrap=boot[order],
        **options,
    )
    for one, other, third in zip(found, flat, strided, strict=True):
        if backend == "native":
            assert torch.equal(one, padded(other, 0.0)) and torch.equal(one, third)
        else:  # doubling adds up in an order that depends on the place
            assert_close(one, padded(other, 0.0), rtol=2**-22, atol=1e-7)
            assert_close(one, third, rtol=0, atol=0)


def test_a_nan_reaches_what_it_should_and_nothing_else(backend):
    r, v, mask, cu_seqlens, *_ = packed([600, 600, 600])
    mask[:] = True
    r, v = (torch.nan_to_num(x, nan=0.5) for x in (r, v))
    for bad in (r, v):
        bad[900] = nan
        found = gae(r, v, mask=mask, cu_seqlens=cu_seqlens, backend=backend)
        assert found.advantages[600:901].isnan().all()
        assert found.advantages[:600].isfinite().all() and found.advantages[901:].isfinite().all()
        bad[900] = 0.5


SHORT = [1, 1, 1, 2, 0, 3, 8, 9, 1, 0, 5, 7, 64, 1, 4, 600, 2, 2, 6] + [1] * 700 + [3, 8] * 90


def short_ones(dtype):
    cu_seqlens = tensor([0, *SHORT]).cumsum(0)
    rng = torch.Generator().manual_seed(1)
    r, v = (torch.randn(int(cu_seqlens[-1]), generator=rng, dtype=F64).to(dtype) for _ in range(2))
    return r, v, cu_seqlens, torch.rand(len(SHORT), generator=rng, dtype=F64)


@pytest.mark.parametrize("boots", [False, True])
def test_short_sequences_without_a_mask(backend, boots):
    r, v, cu_seqlens, boot = short_ones(F64)
    gamma, lam = (torch.full((len(SHORT),), rate, dtype=F64) for rate in (0.9, 0.8))
    boot = boot if boots else torch.zeros_like(boot)
    valid = torch.ones_like(r, dtype=torch.bool)
    exact = by_loop(r, v, valid, cu_seqlens, gamma, lam, boot, "carry")
    options = {"cu_seqlens": cu_seqlens, "bootstrap": boot if boots else None, "backend": backend}
    for rates in ((0.9, 0.8), (gamma, lam)):
        found = gae(r, v, gamma=rates[0], lam=rates[1], **options)
        for one, other in zip(found, exact, strict=True):
            assert_close(one, other, rtol=1e-12, atol=1e-12)
    togo = by_loop(r, torch.zeros_like(r), valid, cu_seqlens, gamma, gamma**0, boot * 0, "carry")[0]
    assert_close(discounted_returns(r, gamma=0.9, cu_seqlens=cu_seqlens, backend=backend), togo, rtol=1e-12, atol=1e-12)


@native_only
@pytest.mark.parametrize("bad", [nan, inf, -inf, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_short_sequences_keep_to_themselves(dtype, bad):
    """Bit for bit what each is alone, and where the others are all masked."""
    r, v, cu_seqlens, boot = short_ones(dtype)
    options = {"gamma": 0.9, "lam": 0.8, "backend": "native"}
    clean = gae(r, v, cu_seqlens=cu_seqlens, bootstrap=boot, **options)
    masked = gae(r, v, mask=torch.ones_like(r, dtype=torch.bool), cu_seqlens=cu_seqlens, bootstrap=boot, **options)
    assert all(torch.equal(*pair) for pair in zip(clean, masked, strict=True))
    for s in (0, 3, 6, 7, 10, 15, 18, 19, 800):
        own = slice(int(cu_seqlens[s]), int(cu_seqlens[s + 1]))
        alone = gae(r[None, own], v[None, own], bootstrap=boot[s : s + 1], **options)
        assert all(torch.equal(one[own], other[0]) for one, other in zip(clean, alone, strict=True))
        for x in (r, v):
            kept, x[own] = x[own].clone(), bad
            found = gae(r, v, cu_seqlens=cu_seqlens, bootstrap=boot, **options)
            for one, other in zip(found, clean, strict=True):
                assert torch.equal(one[: own.start], other[: own.start])
                assert torch.equal(one[own.stop :], other[own.stop :])
                assert one[own].isfinite().all() == math.isfinite(bad)
            x[own] = kept


PRINTS = """
import hashlib, torch
from finealign_kernels import gae, reverse_scan
torch.manual_seed(0)
for dtype in (torch.float32, torch.float64):
    r, v = torch.randn(2, 40, 1111, dtype=dtype)
    mask = torch.rand(40, 1111) < 0.9
    cuts = torch.arange(0, r.numel() + 1, 4)
    made = *gae(r, v, gamma=0.99), *gae(r, v, mask=mask), *gae(r.view(-1), v.view(-1), cu_seqlens=cuts)
    made += reverse_scan(r, 0.97), reverse_scan(r, v.sigmoid(), mask=mask)
    print(*(hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in made))
"""


@native_only
def test_every_instruction_set_rounds_alike():
    def printed(cpu):
        run = [sys.executable, "-c", PRINTS]
        env = {**os.environ, "FINEALIGN_CPU": cpu}
        return subprocess.run(run, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout

    assert len(printed("").split()) == 16 and printed("") == printed("baseline")


def test_identities(backend):
    """γ = λ = 1: rewards to go less the value. λ = 0: δ. One token: r - V."""
    r, v = torch.randn(3, 50, dtype=F64), torch.randn(3, 50, dtype=F64)
    togo = r.flip(1).cumsum(1).flip(1)
    assert_close(gae(r, v, gamma=1, lam=1, backend=backend).advantages, togo - v)
    assert_close(gae(r, v, gamma=1, lam=1, backend=backend).returns, togo)
    assert_close(discounted_returns(r, gamma=1, backend=backend), togo)
    delta = r - v + 0.9 * torch.cat([v[:, 1:], torch.zeros(3, 1, dtype=F64)], 1)
    assert_close(gae(r, v, gamma=0.9, lam=0, backend=backend).advantages, delta)
    assert_close(gae(r[:, :1], v[:, :1], backend=backend).advantages, r[:, :1] - v[:, :1])
    assert torch.equal(discounted_returns(r, gamma=0, backend=backend), r)


def test_results_are_constants(backend):
    r, v = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    kl = kl_penalty(r, v)
    for out in (*gae(r, v, backend=backend), discounted_returns(r, backend=backend), whiten(r, backend=backend), kl):
        assert not out.requires_grad


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_an_estimator_of_zero_is_zero(estimator):
    x = torch.randn(2, 3)
    assert not kl_penalty(x, x, estimator=estimator).any()
    assert math.isnan(kl_penalty(x * nan, x, estimator=estimator)[0, 0])


# ---- refusals ------------------------------------------------------------------------------------------------------

X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (lambda: gae(X, X[:1]), ValueError, r"values must have shape \(2, 3\), got \(1, 3\)"),
        (lambda: gae(X, [1.0]), TypeError, "values must be a tensor|be one tensor"),
        (lambda: gae(X.long(), X), TypeError, "rewards must have dtype float32 or .*, got torch.int64"),
        (lambda: gae(X[0], X[0]), ValueError, r"rewards must be \(B, T\) where cu_seqlens is not given, got \(3,\)"),
        (lambda: gae(X, X, gamma=1.01), ValueError, r"gamma must be in \[0, 1\], got 1.01"),
        (lambda: gae(X, X, lam=-0.1), ValueError, r"lam must be in \[0, 1\], got -0.1"),
        (lambda: gae(X, X, lam=nan), ValueError, "lam must be a finite number, got nan"),
        (lambda: gae(X, X, gamma=tensor([1.0, 2.0])), ValueError, r"gamma must be in \[0, 1\], got gamma\[1\] = 2.0"),
        (lambda: gae(X, X, gamma=tensor([1.0])), ValueError, r"gamma must have shape \(2,\), got \(1,\)"),
        (lambda: gae(X, X, bootstrap=X[0]), ValueError, r"bootstrap must have shape \(2,\), got \(3,\)"),
        (lambda: gae(X, X, masked="restart"), ValueError, r"masked must be one of \('carry', 'zero'\), got 'restart'"),
        (lambda: gae(X, X, segment_ids=X), TypeError, "segment_ids must have dtype int32 or int64, got torch.float32"),
        (
            lambda: gae(X, X, masked="zero", segment_ids=X.long()),
            ValueError,
            "masked must be 'carry' where segments are the actions, got 'zero'",
        ),
        (lambda: gae(X, X, mask=X), TypeError, "mask must have dtype bool or"),
        (lambda: gae(X, X, backend="triton"), ValueError, "backend must be 'auto', 'reference' or 'native'"),
        (lambda: discounted_returns(X, masked="no"), ValueError, "masked must be one of .*'restart'.*, got 'no'"),
        (lambda: kl_penalty(X, X, estimator="k4"), ValueError, r"estimator must be one of .*, got 'k4'"),
        (lambda: kl_penalty(X, X, estimator=["k1"]), ValueError, r"estimator must be one of .*, got \['k1'\]"),
        (lambda: kl_penalty(X, X[:, :2]), ValueError, r"ref_logp must have shape \(2, 3\), got \(2, 2\)"),
        (lambda: whiten(X, mode="var"), ValueError, "mode must be one of .*, got 'var'"),
        (lambda: whiten(X, sum_moments=lambda m: m[:2]), TypeError, r"sum_moments must return .*, got \(2,\)"),
        (lambda: whiten(X, sum_moments=lambda m: None), TypeError, "sum_moments must return .*, got NoneType"),
        (
            lambda: gae(X[0], X[0], cu_seqlens=tensor([0, 2])),
            ValueError,
            "cu_seqlens must end at the number of tokens 3, got",
        ),
    ],
)
def test_refusals(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_the_reference_stays_on_its_device_and_reads_nothing_back():
    """On a device without values (meta) any read of a value on the host would raise."""
    r, mask, cu_seqlens = torch.zeros(12), torch.ones(12).bool(), tensor([0, 5, 12])
    r, mask, cu_seqlens = (x.to("meta") for x in (r, mask, cu_seqlens))
    g = torch.ones((), device="meta")
    for masked in ("carry", "zero"):
        assert formula.gae(r, r, cu_seqlens, mask, gamma=g, lam=g, masked=masked)[0].shape == (12,)
    for masked in ("carry", "zero", "restart"):
        assert formula.discounted_returns(r, cu_seqlens, mask, gamma=g, masked=masked).shape == (12,)
    assert formula.whiten(r, formula.moments(r, mask), mask).shape == (12,)

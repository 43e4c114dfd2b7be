"""Policy losses: golden values, slopes, an assembly by loops, invariances, degenerate cases, refusals."""

import math

import pytest
import torch
from torch.testing import assert_close
from worked_examples import fixture_d, fixture_e, numbers, rows

import finealign_kernels as fk
from finealign_kernels.formulas import surrogate
from finealign_kernels.losses.policy import KL, POLICY, PolicyRow, policy_loss, token_loss
from finealign_kernels.losses.table import Hyper
from finealign_kernels.testing import samples

pytestmark = pytest.mark.usefixtures("route")  # by the fused op, and as the composition of small ones

F64 = torch.float64
E = fixture_e()
DENSE, W = E.dense, E.weight
REDUCTIONS = ("token", "token_global", "sequence", "sequence_sum", "constant")
TRUNCATED = fk.sampler_weights(E.old, E.sampler, mode="token_truncate", high=2.0, mask=E.mask)

GOLDEN = {  # case: row, options, loss, gradients of rows 0 to 2 of fixture E; row 3 has none
    "ppo": (
        "ppo",
        {},
        0.3794703882,
        """
        -0.0803760668 0 -0.0512500429 -0.0712871762 0 -0.0764560797
        0.1267455538 0 0 0.2683203394 0.4002869092 0
        -0.0492403213""",
    ),
    "bnpo": (
        "bnpo",
        {},
        0.3794703882,
        """
        -0.0803760668 0 -0.0512500429 -0.0712871762 0 -0.0764560797
        0.1267455538 0 0 0.2683203394 0.4002869092 0
        -0.0492403213""",
    ),
    "grpo": (
        "grpo",
        dict(kl_coef=0),
        0.2633498756,
        """
        -0.0368390306 0 -0.023489603 -0.0326732891 0 -0.0350423699
        0.0871375682 0 0 0.1844702333 0.2751972501 0
        -0.1354108835""",
    ),
    "grpo, empty rows not counted": (
        "grpo",
        dict(kl_coef=0, count_empty=False),
        0.3511331674,
        """
        -0.0491187075 0 -0.0313194707 -0.0435643855 0 -0.0467231598
        0.1161834243 0 0 0.2459603111 0.3669296668 0
        -0.1805478446""",
    ),
    "dr_grpo, L_max=8": (
        "dr_grpo",
        dict(max_length=8),
        0.1304429459,
        """
        -0.027629273 0 -0.0176172022 -0.0245049668 0 -0.0262817774
        0.0435687841 0 0 0.0922351167 0.137598625 0
        -0.0169263604""",
    ),
    "dapo, ε_h=.28, N=20": (
        "dapo",
        dict(denominator=20),
        0.2026587475,
        """
        -0.0442068367 0 -0.0281875236 -0.0392079469 -0.050849966 -0.0420508439
        0.0697100546 0 0 0.1475761867 0.2201578001 0
        -0.0270821767""",
    ),
    "ppo, dual=3": (
        "ppo",
        dict(dual=3),
        0.3064562063,
        """
        -0.0803760668 0 -0.0512500429 -0.0712871762 0 -0.0764560797
        0.1267455538 0 0 0.2683203394 0 0
        -0.0492403213""",
    ),
    "ppo, dense A": (
        "ppo",
        dict(advantages=DENSE),
        0.1287703172,
        """
        -0.0803760668 0.0490857748 -0.0128125107 -0.0891089703 0 0.0573420598
        0.1267455538 -0.030469093 0 0.2012402545 0 0
        -0.0492403213""",
    ),
    "gspo, ε=.2": (
        "gspo",
        dict(low=0.2, high=0.2),
        0.1421050383,
        """
        -0.0351593727 -0.0351593727 -0.0351593727 -0.0351593727 -0.0351593727 -0.0351593727
        0.1221180395 0.1221180395 0 0.1221180395 0.1221180395 0
        -0.1354108835""",
    ),
    "gspo, ε=3e-4/4e-4": (
        "gspo",
        {},
        0.1633421578,
        """
        0 0 0 0 0 0
        0.1221180395 0.1221180395 0 0.1221180395 0.1221180395 0
        0""",
    ),
    "gspo_token, dense A, ε=.2": (
        "gspo_token",
        dict(low=0.2, high=0.2, advantages=DENSE),
        -0.0331535302,
        """
        -0.0351593727 0.0175796863 -0.0087898432 -0.0439492158 0 0.0263695295
        0.1221180395 0 0 0.0915885296 0 0
        -0.1354108835""",
    ),
    "cispo, [0, 2], N=20": (
        "cispo",
        dict(high=2, denominator=20),
        0.1711030177,
        """
        -0.0442068367 -0.0539943523 -0.0281875236 -0.0392079469 -0.050849966 -0.0420508439
        0.0697100546 0.0402192028 0 0.12 0.12 0
        -0.0270821767""",
    ),
    "cispo, [.8, 1.2], token": (
        "cispo",
        dict(low=0.8, high=1.2, reduction="token"),
        0.2064138038,
        """
        -0.0803760668 -0.0872727273 -0.0581818182 -0.0712871762 -0.0872727273 -0.0764560797
        0.1267455538 0.0872727273 0 0.1309090909 0.1309090909 0
        -0.0492403213""",
    ),
    "reinforce, token, dense A": (
        "reinforce",
        dict(reduction="token", advantages=DENSE),
        0.2381818182,
        """
        -0.0727272727 0.0363636364 -0.0181818182 -0.0909090909 0 0.0545454545
        0.1090909091 -0.0454545455 0 0.0818181818 -0.0363636364 0
        -0.0454545455""",
    ),
    "rloo, sequence ratio": (
        "rloo",
        {},
        1.7331953907,
        """
        0 0 0 0 0 0
        2.1086062742 2.1086062742 0 2.1086062742 2.1086062742 0
        -0.1354108835""",
    ),
    "sapo, τ=1/1.05": (
        "sapo",
        {},
        0.1019718816,
        """
        -0.0367373497 -0.0436460333 -0.0229848288 -0.0326700866 -0.0416049848 -0.0350193508
        0.0865115624 0.0487975025 0 0.1077812206 0.0593392818 0
        -0.1351763273""",
    ),
    "luspo": (
        "luspo",
        {},
        0.5527403316,
        """
        -0.2109562361 -0.2109562361 -0.2109562361 -0.2109562361 -0.2109562361 -0.2109562361
        0.4884721578 0.4884721578 0 0.4884721578 0.4884721578 0
        -0.1354108835""",
    ),
    "ppo, weights, all": (
        "ppo",
        dict(token_weight=W),
        0.3183784432,
        """
        -0.0803760668 0 0 -0.0712871762 0 -0.0764560797
        0.1267455538 0 0 0.1341601697 0.4002869092 0
        -0.0492403213""",
    ),
    "ppo, weights, kept": (
        "ppo",
        dict(token_weight=W, average="kept"),
        0.4830569483,
        """
        -0.1219498944 0 0 -0.1081598536 0 -0.1160023279
        0.1923035988 0 0 0.2035533609 0.6073318622 0
        -0.0747094529""",
    ),
    "grpo, weights, kept": (
        "grpo",
        dict(token_weight=W, average="kept", kl_coef=0),
        0.3766135091,
        """
        -0.058942449 0 0 -0.0522772626 0 -0.0560677918
        0.1394201091 0 0 0.1475761867 0.4403156001 0
        -0.1354108835""",
    ),
    "ppo, sampler weights": (
        "ppo",
        dict(sampler_weight=TRUNCATED),
        0.5813681649,
        """
        -0.0844970358 0 -0.1025000858 -0.0712871762 0 -0.0764560797
        0.1267455538 0 0 0.5366406788 0.4002869092 0
        -0.0492403213""",
    ),
}
KL_GOLDEN = {  # K = Σ m κ / Σ m, and its gradients
    "k1": (
        0.1863636364,
        """
        0.0909090909 0.0909090909 0.0909090909 0.0909090909 0.0909090909 0.0909090909
        0.0909090909 0.0909090909 0 0.0909090909 0.0909090909 0
        0.0909090909""",
    ),
    "k2": (
        0.1750863636,
        """
        -0.0090909091 0.0363636364 -0.0045454545 -0.0018181818 0.0309090909 -0.0227272727
        0.0227272727 -0.0636363636 0 0.1181818182 0.1 0
        -0.02""",
    ),
    "k3": (
        0.1397083853,
        """
        -0.0095609926 0.0299709049 -0.0046610088 -0.0018364855 0.0262026979 -0.0258204924
        0.0201090197 -0.092159337 0 0.0661334734 0.0606480833 0
        -0.0223706119""",
    ),
    "k3_k2grad": (
        0.1397083853,
        """
        -0.0090909091 0.0363636364 -0.0045454545 -0.0018181818 0.0309090909 -0.0227272727
        0.0227272727 -0.0636363636 0 0.1181818182 0.1 0
        -0.02""",
    ),
    "k3_is": (
        0.3156246665,
        """
        -0.0100470083 0.0490857748 -0.0032031277 -0.0017821794 0.0392931556 -0.0238925249
        0.0264053237 -0.0426567302 0 0.2906803677 0.3669296668 0
        -0.0216657414""",
    ),
}


def example(name, advantages=E.advantages, **options):
    """A row on fixture E, masked places holding NaN."""
    logp, old = (torch.where(E.mask, x, torch.nan) for x in (E.logp, E.old))
    if advantages.dim() == 2:
        advantages = torch.where(E.mask, advantages, torch.nan)
    if "token_weight" in options:
        options["token_weight"] = torch.where(E.mask, options["token_weight"], torch.nan)
    logp.requires_grad_()
    out = policy_loss(name, logp, old, advantages, mask=E.mask, **options)
    return out, torch.autograd.grad(out.loss, logp, retain_graph=True)[0]


def test_every_row_has_a_worked_example():
    assert {row for row, *_ in GOLDEN.values()} == set(POLICY)


@pytest.mark.parametrize("case", GOLDEN)
def test_golden(case):
    name, options, loss, grads = GOLDEN[case]
    out, grad = example(name, **options)
    assert_close(out.loss.item(), loss, rtol=0, atol=1e-9)
    assert_close(grad, torch.cat([numbers(grads), torch.zeros(1, 6, dtype=F64)]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kl", KL_GOLDEN)
def test_golden_kl(kl):
    value, grads = KL_GOLDEN[kl]
    ref = torch.where(E.mask, E.ref, torch.nan)
    out, grad = example("ppo", ref_logp=ref, kl_coef=0.5, kl=kl)
    plain, without = example("ppo", ref_logp=ref, kl=kl)
    assert_close(out.kl.item(), value, rtol=0, atol=1e-9)
    assert torch.equal(out.kl, plain.kl)
    assert_close(out.loss, plain.loss + 0.5 * out.kl)
    expected = torch.cat([numbers(grads), torch.zeros(1, 6, dtype=F64)])
    assert_close((grad - without) / 0.5, expected, rtol=0, atol=1e-9)


def test_golden_entropy():
    entropy = torch.where(E.mask, E.entropy, torch.nan).requires_grad_()
    for reduction, value, share in (("token", 0.8363636364, E.mask / 11), ("policy", 0.59375, None)):
        out, _ = example("gspo", entropy=entropy, entropy_coef=0.3, entropy_reduction=reduction)
        (grad,) = torch.autograd.grad(out.loss, entropy)
        assert_close(out.entropy.item(), value, rtol=0, atol=1e-9)
        assert_close(out.loss.detach(), out.policy - 0.3 * out.entropy)
        share = E.mask / (4 * E.mask.sum(1, keepdim=True).clamp(min=1)) if share is None else share
        assert_close(grad, -0.3 * share.to(F64))


SAMPLER = [  # mode, low, high, rows 0 and 1 (row 2 is 1 0 0 0 0 0)
    (
        "token_truncate",
        None,
        2,
        "1.0512710964 1.0512710964 2 1 0.9801986733 1\n 1 0.904837418 0 2 1 0",
    ),
    ("token_mask", 0.5, 2, "1.0512710964 1.0512710964 0 1 0.9801986733 1\n 1 0.904837418 0 0 1 0"),
    ("sequence_truncate", None, 2, "2 2 2 2 2 2\n 1.915540829 1.915540829 0 1.915540829 1.915540829 0"),
    (
        "sequence_mask",
        None,
        3,
        "2.6644562419 2.6644562419 2.6644562419 2.6644562419 2.6644562419 2.6644562419\n"
        "1.915540829 1.915540829 0 1.915540829 1.915540829 0",
    ),
    ("sequence_mask", None, 2, "0 0 0 0 0 0\n 1.915540829 1.915540829 0 1.915540829 1.915540829 0"),
]


@pytest.mark.parametrize("mode, low, high, expected", SAMPLER)
def test_golden_sampler_weights(mode, low, high, expected):
    old, sampler = (torch.where(E.mask, x, torch.nan) for x in (E.old, E.sampler))
    found = fk.sampler_weights(old.requires_grad_(), sampler, mode=mode, low=low, high=high, mask=E.mask)
    assert_close(found, torch.cat([numbers(expected), rows([1, 0, 0, 0, 0, 0], [])]), rtol=0, atol=1e-9)
    assert not found.requires_grad
    cu = torch.tensor([0, 6, 10, 11, 11])
    packed = fk.sampler_weights(E.old[E.mask], E.sampler[E.mask], mode=mode, low=low, high=high, cu_seqlens=cu)
    assert_close(packed, found[E.mask])


def test_golden_of_the_fine_grained_pipeline():
    """Sections 4.9 and 5.4: token and sequence mean, and pivots as weights under three denominators."""
    d = fixture_d()
    pivots = torch.where(d.advantages >= 0, d.scores > 0, d.scores < 0).to(F64)
    assert torch.equal(torch.where(d.mask, pivots, 0), rows([1, 0, 1, 1, 0, 1], [1, 1, 0, 1]))
    segments = rows([1, 1, 1, 0, 0, 1], [1, 1])  # section 11.7
    cases = [
        (dict(), 0.0135341809),
        (dict(reduction="sequence"), 0.2088581745),
        (dict(token_weight=pivots, reduction="sequence", average="kept"), 0.1984080312),
        (dict(token_weight=pivots, average="kept"), 0.0555318175),
        (dict(token_weight=pivots), 0.0388722722),
        (dict(token_weight=segments, reduction="sequence", average="kept"), 0.3933463292),
        (dict(token_weight=segments, average="kept"), -0.0008885583),
        (dict(token_weight=segments), -0.000533135),
    ]
    grads = [
        """-0.0981953011 -0.0765510577 -0.1150193863 0 -0.0634158324 -0.0259775883
        0.1784048514 0.1368053469 0 0.0443522598 0 0""",
        """-0.0818294175 -0.0637925481 -0.0958494886 0 -0.052846527 -0.0216479902
        0.2230060642 0.1710066837 0 0.0554403248 0 0""",
        """-0.1227441263 0 -0.1437742328 0 0 -0.0324719853
        0.2973414189 0.2280089116 0 0.073920433 0 0""",
        """-0.1402790015 0 -0.164313409 0 0 -0.0371108404
        0.2548640734 0.1954362099 0 0.0633603712 0 0""",
        """-0.0981953011 0 -0.1150193863 0 0 -0.0259775883
        0.1784048514 0.1368053469 0 0.0443522598 0 0""",
    ]
    for place, (options, loss) in enumerate(cases):
        logp = d.logp.clone().requires_grad_()
        out = policy_loss("ppo", logp, d.old, d.advantages, mask=d.mask, **options)
        assert_close(out.loss.item(), loss, rtol=0, atol=2e-9)  # the advantages are rounded to 10 decimals
        if place < len(grads):
            (grad,) = torch.autograd.grad(out.loss, logp)
            assert_close(grad, numbers(grads[place]), rtol=0, atol=2e-9)


def test_golden_of_each_token_of_the_fine_grained_pipeline():
    """Section 4.9: ratios, losses and which of them are clipped."""
    d = fixture_d()
    log_ratio = torch.where(d.mask, d.logp - d.old, 0)
    ratio = numbers("""
        1.0512710964 0.7408182207 1.1051709181 1.2840254167 0.9801986733 1
        1.3498588076 0.9512294245 0.670320046 1.1051709181 0 0""")
    each = numbers("""
        -0.9819530106 -0.7655105768 -1.1501938627 -0.8149791031 -0.6341583243 -0.2597758826
        1.7840485137 1.3680534694 1.1462879881 0.4435225982 0 0""")
    value, slope = token_loss("ppo", log_ratio, d.advantages, d.logp)
    assert_close(torch.where(d.mask, log_ratio.exp(), 0), ratio, rtol=0, atol=1e-9)
    assert_close(value, each, rtol=0, atol=2e-9)  # the advantages are rounded to 10 decimals
    assert torch.equal((slope == 0) & d.mask, rows([0, 0, 0, 1, 0, 0], [0, 0, 1]).bool())
    out = policy_loss("ppo", torch.where(d.mask, d.logp, torch.nan), d.old, d.advantages, mask=d.mask)
    assert_close(out.ratio.item(), ratio.sum().item() / 10, rtol=0, atol=1e-9)
    found = out.clip_fraction_high.item(), out.clip_fraction_low.item()  # one good token went up, one bad token down
    assert_close(found, (0.1, 0.1), check_dtype=False)


def test_golden_weights_of_micro_batches():
    """Section 4.7: the released code weighs token means by mean lengths, and so counts the global mean twice here."""
    lengths = torch.tensor([2, 4, 6, 8])
    mask = torch.arange(8) < lengths[:, None]
    rng = torch.Generator().manual_seed(0)
    old, logp, advantages = (torch.randn(4, 8, generator=rng, dtype=F64) for _ in range(3))

    def loss(part, **options):
        return policy_loss("ppo", logp[part], old[part], advantages[part], mask=mask[part], **options).loss

    parts = slice(0, 2), slice(2, 4)
    weights = torch.stack([lengths[part].double().mean() for part in parts]) / lengths.double().mean()
    assert_close(weights, torch.tensor([0.6, 1.4], dtype=F64))
    whole = loss(slice(0, 4))
    released = sum(weight * loss(part) for weight, part in zip(weights, parts, strict=True))
    assert_close(released, 2 * whole)
    corrected = [loss(part, reduction="token_global", denominator=int(lengths.sum())) for part in parts]
    assert_close(sum(corrected), whole)


ONE_SIDED = [  # A, ρ, dual, loss, gradient
    (0.5, 1.35, None, -0.6, 0),
    (0.5, 0.70, None, -0.35, -0.35),
    (-0.5, 1.35, None, 0.675, 0.675),
    (-0.5, 0.70, None, 0.4, 0),
    (-0.5, 3.5, 3.0, 1.5, 0),
    (-0.5, 2.5, 3.0, 1.25, 1.25),
    (0.5, 3.5, 3.0, -0.6, 0),
]


@pytest.mark.parametrize("advantage, ratio, dual, loss, slope", ONE_SIDED)
def test_clips_act_on_one_side(advantage, ratio, dual, loss, slope):
    x, a = torch.tensor([ratio], dtype=F64).log(), torch.tensor([advantage], dtype=F64)
    value, push = token_loss("ppo", x, a, x, dual=dual)
    assert_close((value.item(), push.item()), (loss, float(slope)))


def test_the_dual_bound_leaves_good_tokens_alone():
    x, a = torch.tensor([2.5], dtype=F64).log(), torch.tensor([0.5], dtype=F64)
    value, slope = token_loss("ppo", x, a, x, high=3.0, dual=2.0)
    assert_close((value, slope), (-2.5 * a, -2.5 * a))


def test_on_the_boundary_of_the_clip_the_slope_is_the_unclipped_one():
    x, a = torch.zeros(2, dtype=F64), torch.tensor([1.0, -1.0], dtype=F64)
    value, slope = token_loss("ppo", x, a, x, low=0.0, high=0.0)
    assert value.tolist() == [-1, 1] and slope.tolist() == [-1, 1]


# ---- every row of the table ----------------------------------------------------------------------------------------


def assert_slopes(slope, expected, largest):
    """To 1e-10, beside what autograd itself loses where large terms cancel: a few roundings of the largest."""
    error = (slope - expected).abs()
    assert (error <= 1e-10 * expected.abs() + 8 * torch.finfo(F64).eps * (1 + largest.abs())).all(), error.max()


@pytest.mark.parametrize("name", POLICY)
@pytest.mark.parametrize("spread", (1e-3, 0.3, 3.0, 30.0))
def test_slope_is_the_derivative(name, spread):
    torch.manual_seed(0)
    log_ratio = (torch.randn(256, dtype=F64) * spread).requires_grad_()
    advantage, old = torch.randn(256, dtype=F64), -torch.rand(256, dtype=F64)
    for hyper in ({}, {"dual": 3.0}) if "dual" in POLICY[name].hyper else ({},):
        value, slope = token_loss(name, log_ratio, advantage, old + log_ratio, **hyper)
        (expected,) = torch.autograd.grad(value.sum(), log_ratio)
        assert_slopes(slope, expected, surrogate.bounded_ratio(log_ratio) * advantage)
        assert slope.count_nonzero() > 20


@pytest.mark.parametrize("kl", KL)
@pytest.mark.parametrize("spread", (1e-3, 1.0, 30.0))
def test_slope_of_the_kl_is_the_derivative(kl, spread):
    torch.manual_seed(1)
    d = (torch.randn(256, dtype=F64) * spread).requires_grad_()
    moved = torch.randn(256, dtype=F64) * spread
    value, slope = KL[kl](d, d + moved)  # logp moves both
    (expected,) = torch.autograd.grad(value.sum(), d)
    if kl == "k3_k2grad":
        expected = torch.where(d.abs() > 20, 0, d.detach())
    if kl == "k3_is":  # a constant beyond either bound: the slope of ρ alone would push a token away from the reference
        expected = torch.where((d.abs() > 20) | ((d + moved).abs() > 20), 0, expected)
    assert_slopes(slope, expected, surrogate.bounded_ratio(d + moved) * surrogate.bounded_ratio(-d))


def options_of(name, batch, **options):
    """What the row's reduction asks for beside the batch."""
    reduction = options.get("reduction", POLICY[name].reduction)
    if reduction == "token_global":
        options.setdefault("denominator", 37)
    if reduction == "constant":
        options.setdefault("max_length", batch.logp.shape[1] + 3)
    if options.get("denominator") is not None and reduction not in ("token", "token_global"):
        options.setdefault("entropy_denominator", 13)
    return options


def inputs(name, batch, rich=True):
    """Everything that a row may be given."""
    given = dict(mask=batch.mask, ref_logp=batch.ref_logp, sampler_weight=batch.sampler_weight, entropy=batch.entropy)
    given |= dict(advantages=batch.advantages if POLICY[name].whole else batch.dense)
    if not POLICY[name].whole:
        given |= dict(token_weight=batch.token_weight, average="kept")
        given |= dict(sampler_weight=batch.sampler_weight[:, None] * (0.5 + batch.token_weight))
    return {**given, **dict(kl_coef=0.1, entropy_coef=0.05)}


def run(name, logp, old, upstream=None, **options):
    logp, entropy = logp.clone().requires_grad_(), options["entropy"].clone().requires_grad_()
    out = policy_loss(name, logp, old, **{**options, "entropy": entropy})
    return out, *torch.autograd.grad(out.loss, (logp, entropy), upstream)


def by_hand(name, logp, old, *, advantages, mask, ref_logp, sampler_weight, entropy, kl_coef, entropy_coef, **options):
    """The loss as loops over rows and autograd of psi's value."""
    row, hyper = POLICY[name], {key: options[key] for key in POLICY[name].hyper if key in options}
    reduction, average = options.get("reduction", row.reduction), options.get("average", "all")
    weight = options.get("token_weight", torch.ones_like(logp))
    each, kl, counts, lengths = [], [], [], []
    for b in range(len(logp)):
        at = mask[b]
        lp, n = logp[b][at], int(at.sum())
        x = lp - old[b][at]
        if row.ratio != "token":
            x = x.sum() / (max(1, n) if row.ratio == "mean" else 1)
            x = (x if row.whole else x.detach() + lp - lp.detach()).expand(n)
        a, omega = (v[b].expand(n) if v.dim() == 1 else v[b][at] for v in (advantages, sampler_weight))
        value, _ = token_loss(name, x, a, lp, **hyper)
        each.append((omega * weight[b][at] * value).sum())
        kl.append(KL[options.get("kl", "k3_is")](lp - ref_logp[b][at], lp - old[b][at])[0].sum())
        counts.append(weight[b][at].sum() if average == "kept" else torch.tensor(float(n)))
        lengths.append(float(n))
    each, kl, counts, lengths = torch.stack(each), torch.stack(kl), torch.stack(counts), torch.tensor(lengths)

    def reduced(items, counts):
        if reduction == "token":
            return items.sum() / options.get("denominator", counts.sum())
        if reduction == "token_global":
            return items.sum() / options["denominator"]
        empty = 0 if options.get("count_empty", True) else int((lengths == 0).sum())
        total = options.get("denominator", len(items) - empty)
        if reduction == "sequence":
            items = items / torch.where(counts == 0, 1, counts)
        return items.sum() / total / options.get("max_length", 1)

    count = options.get("denominator") if reduction in ("token", "token_global") else None
    mean = entropy[mask].sum() / options.get("entropy_denominator", count or lengths.sum())
    return reduced(each, counts) + kl_coef * reduced(kl, lengths) - entropy_coef * mean


@pytest.mark.parametrize("name", POLICY)
@pytest.mark.parametrize("average", ("all", "kept"))
def test_against_loops_and_autograd(name, average):
    batch = samples.policy(dtype=F64)
    upstream = torch.tensor(-1.7, dtype=F64)
    reductions = [POLICY[name].reduction] if POLICY[name].whole else REDUCTIONS
    for reduction in reductions:
        for more in (dict(), dict(denominator=5.0), dict(count_empty=False)):
            given = inputs(name, batch)
            if not POLICY[name].whole:
                given["average"] = average
            given |= options_of(name, batch, reduction=reduction, **more)
            out, dlogp, dentropy = run(name, batch.logp, batch.old_logp, upstream, **given)
            logp, entropy = batch.logp.clone().requires_grad_(), batch.entropy.clone().requires_grad_()
            expected = by_hand(name, logp, batch.old_logp, **{**given, "entropy": entropy})
            grads = torch.autograd.grad(expected, (logp, entropy), upstream)
            assert_close(out.loss.detach(), expected.detach(), rtol=1e-10, atol=1e-12)
            assert_close((dlogp, dentropy), grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kl", [kl for kl in KL if kl != "k3_k2grad"])  # its slope is not its value's
def test_the_kl_against_loops_and_autograd(kl):
    batch = samples.policy(dtype=F64, seed=4)
    given = inputs("ppo", batch) | dict(kl=kl, kl_coef=0.7)
    out, dlogp, _ = run("ppo", batch.logp, batch.old_logp, **given)
    logp = batch.logp.clone().requires_grad_()
    expected = by_hand("ppo", logp, batch.old_logp, **given)
    assert_close(out.loss.detach(), expected.detach(), rtol=1e-10, atol=1e-12)
    assert_close(dlogp, torch.autograd.grad(expected, logp)[0], rtol=1e-10, atol=1e-12)


TOKENS = ("ref_logp", "token_weight", "entropy", "mask")  # what is shaped like logp whatever the row


def tokenwise(given, change):
    """The batch with every tensor of its tokens changed."""
    return {
        key: change(x) if isinstance(x, torch.Tensor) and (key in TOKENS or x.dim() == 2) else x
        for key, x in given.items()
    }


@pytest.mark.parametrize("name", POLICY)
def test_padding_packing_and_order_change_nothing(name):
    batch = samples.policy(dtype=F64)
    logp, old, mask = batch.logp, batch.old_logp, batch.mask
    given = inputs(name, batch) | options_of(name, batch)
    out, dlogp, dentropy = run(name, logp, old, **given)
    assert not dlogp[~mask].any() and not dentropy[~mask].any() and not out.losses[~mask].any()

    def same(other, turn=lambda x: x, exact=False):
        again, again_dlogp, again_dentropy = other
        found = (again.loss.detach(), again.losses, *again[2:], again_dlogp, again_dentropy)
        wanted = (out.loss.detach(), turn(out.losses), *out[2:], turn(dlogp), turn(dentropy))
        for one, two in zip(found, wanted, strict=True):
            assert torch.equal(one, two) if exact else torch.allclose(one, two, rtol=1e-12, atol=1e-14)

    for junk in (torch.nan, torch.inf, -1e5):
        dirty = lambda x: x if x.dtype == torch.bool else torch.where(mask, x, junk)  # noqa: B023, E731
        same(run(name, dirty(logp), dirty(old), **tokenwise(given, dirty)), exact=True)
    wide = lambda x: torch.nn.functional.pad(x, (2, 3), value=False if x.dtype == torch.bool else torch.nan)  # noqa: E731
    padded = run(name, wide(logp), wide(old), **tokenwise(given, wide))
    same((padded[0]._replace(losses=padded[0].losses[:, 2:-3]), *(x[:, 2:-3] for x in padded[1:])))
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    flat = tokenwise(given, lambda x: x[mask]) | dict(cu_seqlens=cu, mask=None)
    same(run(name, logp[mask], old[mask], **flat), lambda x: x[mask])
    order = torch.randperm(len(logp))
    mixed = {k: x[order] if isinstance(x, torch.Tensor) else x for k, x in given.items()}
    same(run(name, logp[order], old[order], **mixed), lambda x: x[order])
    strided = lambda x: x.t().contiguous().t()  # noqa: E731
    assert not strided(logp).is_contiguous()
    same(run(name, strided(logp), strided(old), **tokenwise(given, strided)), exact=True)


REDUCED = [(n, r) for n, row in POLICY.items() for r in ((row.reduction,) if row.whole else REDUCTIONS)]


@pytest.mark.parametrize("name, reduction", REDUCED)
def test_any_split_with_a_global_denominator(name, reduction):
    batch = samples.policy(rows=7, seed=2)
    given, tokens = inputs(name, batch) | dict(average="all", reduction=reduction), int(batch.mask.sum())
    counts = dict(denominator=tokens) if reduction in ("token", "token_global") else dict(denominator=7)
    counts |= {} if reduction == "token" else dict(entropy_denominator=tokens)  # of "token" it follows
    given |= options_of(name, batch, reduction=reduction, **counts)
    out, dlogp, dentropy = run(name, batch.logp, batch.old_logp, **given)
    loss, parts = 0.0, (torch.zeros_like(dlogp), torch.zeros_like(dentropy))
    for pick in (torch.tensor([0, 3]), torch.tensor([1, 4, 5]), torch.tensor([2, 6])):
        picked = {k: x[pick] if isinstance(x, torch.Tensor) else x for k, x in given.items()}
        part, *grads = run(name, batch.logp[pick], batch.old_logp[pick], **picked)
        loss = loss + part.loss.item()
        for total, grad in zip(parts, grads, strict=True):
            total[pick] += grad
    assert abs(loss - out.loss.item()) <= 1e-5 * (1 + abs(out.loss.item()))
    for total, grad in zip(parts, (dlogp, dentropy), strict=True):
        assert (total - grad).norm() <= 1e-5 * grad.norm()
    if reduction in ("token", "sequence") and not POLICY[name].whole:
        whole, _, _ = run(
            name, batch.logp, batch.old_logp, **{**given, "denominator": None, "entropy_denominator": None}
        )
        assert_close(whole.loss, out.loss)  # the global count of one call is its own


@pytest.mark.parametrize("name", POLICY)
def test_no_advantage_no_loss(name):
    """An exact 0, also where the ratio is e^20 or a log-prob -inf."""
    log_ratio = torch.tensor([0.0, 20.0, 1000.0, -1000.0, torch.inf, -torch.inf])
    logp = torch.tensor([-1.0, -2.0, -3.0, -torch.inf, -4.0, -torch.inf])
    for advantage in (torch.zeros(6), -torch.zeros(6)):
        value, slope = token_loss(name, log_ratio, advantage, logp)
        assert value.tolist() == [0] * 6 and slope.tolist() == [0] * 6
        value, slope = token_loss(name, torch.full((6,), torch.nan), advantage, torch.full((6,), torch.nan))
        assert value.isnan().all()  # a NaN is no ratio


@pytest.mark.parametrize("name", [name for name, row in POLICY.items() if row.bounds or row.psi is surrogate.soft_gate])
@pytest.mark.parametrize("dtype", (torch.float32, F64))
def test_log_ratios_far_out(name, dtype):
    log_ratio = torch.tensor([1000.0, -1000.0, torch.inf, -torch.inf] * 2, dtype=dtype)
    advantage = torch.tensor([1.0] * 4 + [-1.0] * 4, dtype=dtype)
    value, slope = token_loss(name, log_ratio, advantage, torch.full_like(log_ratio, -1.5))
    assert value.isfinite().all()
    if POLICY[name].psi is not surrogate.capped:  # whose weight is a constant, never the way the gradient takes
        assert not slope.any()
    if POLICY[name].psi is surrogate.clipped:
        row = POLICY[name].hyper
        high, low = -1 - row["high"].default, 1 - row["low"].default
        expected = torch.tensor([high, -math.exp(-20), math.exp(20), low], dtype=dtype)
        assert_close(value[[0, 1, 4, 5]], expected)
    torch.testing.assert_close(surrogate.bounded_ratio(log_ratio[:2]).log(), torch.tensor([20.0, -20.0], dtype=dtype))


@pytest.mark.parametrize("name", POLICY)
def test_a_nan_that_is_read_reaches_the_value(name):
    batch = samples.policy(dtype=F64)
    given = inputs(name, batch) | options_of(name, batch)
    for key in ("logp", "old_logp", "advantages", "ref_logp", "token_weight", "sampler_weight", "entropy"):
        if key == "token_weight" and POLICY[name].whole:
            continue
        if key == "old_logp" and POLICY[name].psi is surrogate.score_function:  # it has no ratio
            continue
        here = {"logp": batch.logp.clone(), "old_logp": batch.old_logp, **given}
        if key != "ref_logp":  # no other term is the one that it reaches
            here |= dict(kl_coef=0.0, ref_logp=None)
        here[key] = here[key].clone()
        here[key][0 if here[key].dim() == 1 else (0, 0)] = torch.nan
        here["logp"].requires_grad_()
        out = policy_loss(name, **here)
        (dlogp,) = torch.autograd.grad(out.loss, here["logp"])
        assert out.loss.isnan(), key
        assert not out.losses[~batch.mask].any() and not dlogp[~batch.mask].any(), key
    logp = batch.logp.clone()
    logp[0, 0] = torch.nan
    alone = given | dict(kl_coef=0.0, ref_logp=None)
    assert policy_loss(name, logp, **alone).loss.isnan()  # without old_logp the ratio is 1, but for this one


@pytest.mark.parametrize("name", POLICY)
def test_empty_batches(name):
    for shape in ((3, 4), (0, 4), (3, 0)):
        logp = torch.full(shape, torch.nan).requires_grad_()
        entropy = torch.full(shape, torch.inf).requires_grad_()
        given = dict(mask=torch.zeros(shape, dtype=torch.bool), ref_logp=torch.zeros(shape), entropy=entropy)
        advantages = torch.ones(shape[0])
        for more in (dict(), dict(count_empty=False)):
            options = options_of(name, samples.policy(), entropy_coef=0.1, kl_coef=0.1, **given, **more)
            out = policy_loss(name, logp, None, advantages, **options)
            grads = torch.autograd.grad(out.loss, (logp, entropy))
            assert out.loss.item() == 0 and not grads[0].any() and not grads[1].any()
            assert not any(x.any() for x in out[1:])


@pytest.mark.parametrize("name", [name for name, row in POLICY.items() if not row.whole])
def test_weights_of_zero(name):
    batch = samples.policy()
    given = inputs(name, batch) | options_of(name, batch) | dict(kl_coef=0.0, entropy_coef=0.0)
    logp = batch.logp.clone()
    logp[0, 0] = -torch.inf  # dropped, and so out of the value
    for key in ("token_weight", "sampler_weight"):
        given[key] = torch.zeros_like(logp)
        lp = logp.clone().requires_grad_()
        out = policy_loss(name, lp, batch.old_logp, **{**given, "ref_logp": None})
        (dlogp,) = torch.autograd.grad(out.loss, lp)
        assert out.loss.item() == 0 and not dlogp.any()


@pytest.mark.parametrize("name", POLICY)
def test_the_first_step_after_sampling(name):
    """Without old_logp the ratio is 1 and the gradient that of -A logp, but for what the reduction shares out."""
    batch = samples.policy(dtype=F64)
    given = options_of(name, batch, mask=batch.mask, advantages=batch.advantages, kl_coef=0.0, entropy=batch.entropy)
    out, dlogp, _ = run_without_entropy(name, batch.logp, None, **given)
    same, again, _ = run_without_entropy(name, batch.logp, batch.logp, **given)
    assert_close((out.loss.detach(), dlogp), (same.loss.detach(), again))
    assert out.ratio == 1 and out.old_kl == 0 and out.clip_fraction_low == out.clip_fraction_high == 0
    assert torch.equal(dlogp.sign(), torch.where(batch.mask, -batch.advantages.sign()[:, None], 0))


def run_without_entropy(name, logp, old, **options):
    logp = logp.clone().requires_grad_()
    out = policy_loss(name, logp, old, **options)
    return out, *torch.autograd.grad(out.loss, logp), None


@pytest.mark.parametrize("name", POLICY)
def test_a_second_backward_is_exact_and_a_double_one_refused(name):
    batch = samples.policy(dtype=F64)
    given = options_of(name, batch, mask=batch.mask, advantages=batch.advantages, ref_logp=batch.ref_logp)
    logp = batch.logp.clone().requires_grad_()
    loss = policy_loss(name, logp, batch.old_logp, **given).loss
    (first,) = torch.autograd.grad(loss, logp, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logp, retain_graph=True)
    assert torch.equal(first, second)
    (scaled,) = torch.autograd.grad(loss, logp, torch.tensor(-2.0, dtype=F64), retain_graph=True)
    assert torch.equal(scaled, -2 * first)
    (again,) = torch.autograd.grad(loss, logp, create_graph=True)
    assert torch.equal(again, first)
    with pytest.raises(RuntimeError, match="policy_loss: double backward is not implemented"):
        torch.autograd.grad(again.sum(), logp)


@pytest.mark.parametrize("name", POLICY)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_half_precision(name, dtype):
    """As exact as float32 arithmetic on the rounded inputs; the gradient comes back in the dtype of logp."""
    batch = samples.policy(dtype=dtype)
    exact = samples.Policy(*(x if x.dtype == torch.bool else x.double() for x in batch))
    out, dlogp, dentropy = run(name, batch.logp, batch.old_logp, **inputs(name, batch) | options_of(name, batch))
    truth, grad, _ = run(name, exact.logp, exact.old_logp, **inputs(name, exact) | options_of(name, exact))
    assert out.loss.dtype == out.losses.dtype == torch.float32 and dlogp.dtype == dentropy.dtype == dtype
    if POLICY[name].whole:  # (S,) sampler weights are the same numbers in both
        assert_close(out.loss.double(), truth.loss, rtol=2e-5, atol=2e-6)
        assert_close(dlogp.double(), grad, rtol=2 * torch.finfo(dtype).eps + 1e-5, atol=1e-6)
    else:  # those of tokens were multiplied in the dtype
        assert_close(out.loss.double(), truth.loss, rtol=20 * torch.finfo(dtype).eps, atol=20 * torch.finfo(dtype).eps)


# ---- a row of one's own --------------------------------------------------------------------------------------------


def test_a_loss_of_ones_own_is_one_row(monkeypatch):
    """What walks the table covers it without another line."""

    def squared(log_ratio, advantage, logp, *, pull):
        near = log_ratio.clamp(-20, 20)
        slope = torch.where(surrogate.is_beyond(log_ratio), 0, pull * near - advantage)
        return pull * near.square() / 2 - advantage * near, torch.where(advantage == 0, 0, slope)

    hyper = {"pull": Hyper(0.5, lambda pull: pull > 0, "be above 0")}
    monkeypatch.setitem(POLICY, "mine", PolicyRow(squared, "pull r²/2 - A r", "here", "sequence", hyper))
    test_slope_is_the_derivative("mine", 0.3)
    test_padding_packing_and_order_change_nothing("mine")
    test_empty_batches("mine")
    test_weights_of_zero("mine")
    test_no_advantage_no_loss("mine")
    test_a_nan_that_is_read_reaches_the_value("mine")
    test_a_second_backward_is_exact_and_a_double_one_refused("mine")
    test_half_precision("mine", torch.bfloat16)
    for average in ("all", "kept"):
        test_against_loops_and_autograd("mine", average)
    for reduction in REDUCTIONS:
        test_any_split_with_a_global_denominator("mine", reduction)
    out, _ = example("mine", pull=2.0)
    x = torch.where(E.mask, E.logp - E.old, 0)
    each = (x.square() - E.advantages[:, None] * x).sum(1) / E.mask.sum(1).clamp(min=1)
    assert_close(out.loss.detach(), each.mean())

    wrong = PolicyRow(lambda x, a, logp: (a * x.exp(), -a * x.exp()), "wrong slope", "here", "token")
    monkeypatch.setitem(POLICY, "wrong", wrong)
    with pytest.raises(AssertionError):
        test_slope_is_the_derivative("wrong", 0.3)
    with pytest.raises(AssertionError):
        test_against_loops_and_autograd("wrong", "all")


# ---- rows that are each other --------------------------------------------------------------------------------------


def test_gspo_token_is_gspo_where_the_advantage_is_the_rows():
    out, grad = example("gspo", low=0.2, high=0.2)
    tokens, token_grad = example("gspo_token", low=0.2, high=0.2)
    assert_close((out.loss, grad), (tokens.loss, token_grad))
    dense = E.advantages[:, None].expand(4, 6)
    again, again_grad = example("gspo_token", low=0.2, high=0.2, advantages=dense)
    assert_close((again.loss, again_grad), (out.loss, grad))


def test_a_dense_advantage_keeps_its_credit_in_gspo_token_alone():
    """The refused form gives all tokens of a row the mean of their gradients."""
    refused = numbers("""
        -0.0073248693 -0.0073248693 -0.0073248693 -0.0073248693 -0.0073248693 -0.0073248693
        0.0534266423 0.0534266423 0 0.0534266423 0.0534266423 0
        -0.1354108835""")
    _, grad = example("gspo_token", low=0.2, high=0.2, advantages=DENSE)
    assert_close(
        torch.where(E.mask, grad.sum(1, keepdim=True) / E.mask.sum(1, keepdim=True).clamp(min=1), 0)[:3],
        refused,
        rtol=0,
        atol=1e-9,
    )


def test_one_token_has_one_ratio():
    logp, old, a = torch.tensor([[-1.0]]), torch.tensor([[-1.15]]), torch.tensor([0.7])
    bounds = dict(low=0.2, high=0.2)
    values = [policy_loss(name, logp, old, a, **bounds).loss for name in ("ppo", "gspo", "gspo_token", "rloo", "luspo")]
    assert_close(values, [values[0]] * 5)


def test_advantages_per_response_and_per_token():
    one, grad = example("ppo")
    for same in (E.advantages[:, None], E.advantages[:, None].expand(4, 6).clone()):
        out, again = example("ppo", advantages=same)
        assert torch.equal(out.loss, one.loss) and torch.equal(again, grad)
    flat = torch.randn(4)
    cu, single = torch.tensor([0, 3, 4, 4, 4]), torch.arange(5)
    with pytest.raises(ValueError, match=r"advantages must have shape \(4, 1\) where tokens and sequences are as many"):
        policy_loss("ppo", flat, None, torch.randn(4), cu_seqlens=cu)
    a = torch.randn(4)
    assert_close(policy_loss("ppo", flat, None, a, cu_seqlens=single).loss, -a.mean())
    assert_close(policy_loss("ppo", flat, None, a[:, None], cu_seqlens=cu).loss, -(3 * a[0] + a[1]) / 4)


# ---- what is logged ------------------------------------------------------------------------------------------------


def test_logged_numbers():
    out, _ = example("ppo", ref_logp=E.ref, kl_coef=0.3, entropy=E.entropy, entropy_coef=0.1, dual=3.0)
    ratio = (E.logp - E.old).exp()
    a = E.advantages[:, None].expand(4, 6)
    for found, expected in (
        (out.ratio, ratio),
        (out.old_kl, E.old - E.logp),
        (out.clip_fraction_low, (a < 0) & (ratio < 0.8)),
        (out.clip_fraction_high, (a > 0) & (ratio > 1.2)),
        (out.clip_fraction_dual, (a < 0) & (ratio > 3)),
    ):
        assert_close(found, expected[E.mask].to(F64).mean())
    assert [round(float(x) * 11) for x in out[-3:]] == [1, 2, 1]
    assert_close(out.loss.detach(), out.policy + 0.3 * out.kl - 0.1 * out.entropy)
    assert out.loss.requires_grad and not any(x.requires_grad for x in out[1:])
    assert out.losses.shape == E.logp.shape
    row, _ = example("gspo")
    means = torch.stack([(E.logp - E.old)[b][E.mask[b]].mean() for b in range(3)]).exp()
    assert_close(row.ratio, (6 * means[0] + 4 * means[1] + means[2]) / 11)
    capped, _ = example("cispo", low=0.8, high=1.2, reduction="token")
    assert [round(float(x) * 11) for x in capped[-3:]] == [1, 2, 0]
    assert not any(example("sapo")[0][-3:])


# ---- sampler weights -----------------------------------------------------------------------------------------------


def test_a_number_that_the_sampler_did_not_give():
    sampler = E.sampler.clone()
    sampler[0, 2] = torch.nan
    options = dict(mask=E.mask, high=3.0)
    assert fk.sampler_weights(E.old, sampler, mode="token_truncate", **options)[0].isnan().tolist()[1:4] == [0, 1, 0]
    assert fk.sampler_weights(E.old, sampler, mode="sequence_mask", **options)[0].isnan().all()
    one = fk.sampler_weights(E.old, sampler, mode="token_truncate", on_missing="one", **options)
    assert one[0, 2] == 1 and one.isfinite().all()
    row = fk.sampler_weights(E.old, sampler, mode="sequence_truncate", on_missing="one", **options)
    left = (E.old - E.sampler)[0, [0, 1, 3, 4, 5]].sum().exp()
    assert_close(row[0], left.expand(6))
    old = E.old.clone()
    old[0, 2] = torch.nan  # the trainer's own NaN is not the sampler's
    assert fk.sampler_weights(old, sampler, mode="token_truncate", on_missing="one", **options)[0, 2].isnan()


def test_sampler_weights_far_out_and_their_bounds():
    apart = torch.tensor([[1000.0, -1000.0, torch.inf, -torch.inf]])
    found = fk.sampler_weights(apart, torch.zeros(1, 4), mode="token_truncate", low=0.0)
    assert_close(found, torch.tensor([[20.0, -20.0, 20.0, -20.0]]).exp())
    e = torch.tensor([[0.5, 2.0, 1.0]]).log()
    kept = fk.sampler_weights(e, torch.zeros(1, 3), mode="token_mask", low=0.75)
    assert_close(kept, torch.tensor([[0.0, 2.0, 1.0]]))
    assert_close(
        fk.sampler_weights(e, torch.zeros(1, 3), mode="token_mask", low=1.0, high=1.0), torch.tensor([[0.0, 0, 1]])
    )


@pytest.mark.parametrize("layout", ["padded", "flat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("gate", "mode", "low", "high"),
    [
        ("geometric", "sequence_mask", 0.9, 1.05),
        ("geometric", "sequence_mask", 0.9, None),
        ("binary_kl", "token_mask", None, 0.01),
        ("binary_kl", "sequence_mask", None, 0.02),
        ("tv", "token_mask", None, 0.06),
        ("tv", "sequence_mask", None, 0.08),
    ],
)
def test_gates_of_the_sampler_weight_by_hand(gate, mode, low, high, dtype, layout):
    generator = torch.Generator().manual_seed(4)
    old = -torch.rand(6, 5, generator=generator, dtype=F64) - 0.1
    sampler = (
        old + torch.randn(6, 5, generator=generator, dtype=F64) * torch.tensor([0.03, 0.5, 0.1, 1, 0.2, 0.3])[:, None]
    )
    mask = torch.rand(6, 5, generator=generator) < 0.8
    mask[5] = False
    old, sampler = old.to(dtype), sampler.clamp(max=-0.01).to(dtype)
    a, b = old.double(), sampler.double()
    p, q = b.exp(), a.exp()
    each = {
        "geometric": a - b,
        "binary_kl": p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log(),
        "tv": (p - q).abs(),
    }
    statistic = each[gate]
    if mode == "sequence_mask":
        mean = torch.where(mask, statistic, 0).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        statistic = mean.expand(6, 5)
    statistic = statistic.exp() if gate == "geometric" else statistic
    inside = (statistic >= (0 if low is None else low)) & (statistic <= (9 if high is None else high))
    expected = torch.where(mask & inside, (a - b).exp(), 0)
    assert 0 < (expected[mask] == 0).sum() < mask.sum()  # the gate shuts and opens
    old, sampler = (torch.where(mask, x, torch.nan) for x in (old, sampler))
    options = dict(mode=mode, gate=gate, low=low, high=high)
    if layout == "padded":
        found = fk.sampler_weights(old, sampler, mask=mask, **options)
    else:
        cu = torch.cat([torch.zeros(1, dtype=torch.long), mask.sum(1).cumsum(0)])
        found, expected = fk.sampler_weights(old[mask], sampler[mask], cu_seqlens=cu, **options), expected[mask]
    assert_close(found, expected.to(found.dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gate", ["binary_kl", "tv", "geometric"])
def test_gates_at_certain_tokens_and_missing_numbers(gate):
    old, mask = torch.tensor([[0.0, -30.0, -1.0]]), torch.ones(1, 3, dtype=torch.bool)
    options = dict(mode="sequence_mask", gate=gate, high=1.5, mask=mask)
    same = fk.sampler_weights(old, old, **options)
    assert_close(same, torch.ones(1, 3))
    sampler = torch.tensor([[0.0, torch.nan, -1.0]])
    assert fk.sampler_weights(old, sampler, **options).isnan().all()
    assert_close(fk.sampler_weights(old, sampler, on_missing="one", **options), same)


@pytest.mark.parametrize(("gate", "bound"), [("binary_kl", 0.3), ("tv", 0.3), ("geometric", 2.0)])
def test_a_gate_takes_the_mean_over_the_tokens_of_the_mask(gate, bound):
    old, sampler = torch.tensor([[-0.1, -0.5, -0.5]]), torch.tensor([[-1.0, -0.5, -0.5]])  # tv 0.54, KL 0.46, ratio 2.5
    mask = torch.tensor([[True, False, False]])
    options = dict(mode="sequence_mask", gate=gate, high=bound)
    assert fk.sampler_weights(old, sampler, mask=mask, **options)[0, 0] == 0
    assert fk.sampler_weights(old, sampler, mask=mask | True, **options)[0, 0] > 2


def test_the_sampler_weight_leaves_kl_and_entropy_alone():
    zero = torch.zeros(4, 6, dtype=F64)
    options = dict(ref_logp=E.ref, kl_coef=0.3, entropy=E.entropy, entropy_coef=0.1)
    out, grad = example("ppo", sampler_weight=zero, **options)
    same, same_grad = example("ppo", token_weight=zero, average="kept", **options)
    plain, _ = example("ppo", **options)
    assert out.policy == 0 and torch.equal(out.kl, plain.kl) and torch.equal(out.entropy, plain.entropy)
    assert_close((out.loss, grad), (same.loss, same_grad))


def test_row_ratios_take_one_sampler_weight_per_row():
    weight = fk.sampler_weights(E.old, E.sampler, mode="sequence_truncate", high=2.0, mask=E.mask)
    rowwise = torch.tensor([2.0, weight[1, 0], 1.0, 1.0], dtype=F64)
    for name in ("gspo", "rloo", "luspo"):
        tokens, grad = example(name, sampler_weight=torch.where(E.mask, weight, torch.nan))
        each, again = example(name, sampler_weight=rowwise)
        assert_close((tokens.loss, grad), (each.loss, again))
    with pytest.raises(ValueError, match="sampler_weight must be one number per sequence for 'gspo'.*gspo_token"):
        example("gspo", sampler_weight=TRUNCATED)


# ---- without looking -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICY)
def test_no_value_is_read_on_the_host(name):
    """On a device without values every read fails; what is wrong there becomes NaN instead of a refusal."""
    batch = samples.policy(device="meta")
    given = inputs(name, batch) | options_of(name, batch, denominator=torch.tensor(11, device="meta"))
    if POLICY[name].whole:
        given["sampler_weight"] = batch.token_weight
    out, dlogp, dentropy = run(name, batch.logp, batch.old_logp, **given)
    assert out.loss.shape == () and dlogp.shape == dentropy.shape == batch.logp.shape
    flat = dict(cu_seqlens=torch.zeros(5, dtype=torch.int32, device="meta"), advantages=torch.zeros(4, device="meta"))
    policy_loss(name, torch.zeros(4, device="meta"), **options_of(name, batch, **flat), kl_coef=0.0)
    weight = fk.sampler_weights(batch.logp, batch.old_logp, mode="sequence_mask", high=2.0, mask=batch.mask)
    assert weight.shape == batch.logp.shape


def test_what_is_wrong_on_a_gpu_becomes_nan(monkeypatch):
    monkeypatch.setattr("finealign_kernels.losses.reduce.reads_values", lambda x: False)
    out, grad = example("gspo", sampler_weight=TRUNCATED)
    assert out.loss.isnan() and grad[0].isnan().all() and grad[2].isfinite().all()
    cu = torch.tensor([0, 3, 4, 4, 4])
    assert policy_loss("ppo", torch.randn(4), None, torch.randn(4), cu_seqlens=cu).loss.isnan()


@pytest.mark.parametrize("name", ("ppo", "gspo", "cispo"))
def test_a_traced_graph_has_no_breaks(name):
    batch = samples.policy()
    given = inputs(name, batch) | options_of(name, batch)
    expected, grad, _ = run(name, batch.logp, batch.old_logp, **given)
    logp = batch.logp.clone().requires_grad_()

    def call(logp):
        return policy_loss(name, logp, batch.old_logp, **given).loss

    loss = torch.compile(call, backend="aot_eager", fullgraph=True)(logp)
    assert_close((loss.detach(), torch.autograd.grad(loss, logp)[0]), (expected.loss.detach(), grad))


# ---- refusals ------------------------------------------------------------------------------------------------------

L, A = torch.zeros(2, 3), torch.zeros(2)
REFUSALS = {
    "name": (lambda: policy_loss("pro", L, L, A), ValueError, "name must be one of .* got 'pro'"),
    "advantages": (lambda: policy_loss("ppo", L, L), TypeError, "advantages must be a tensor, got None"),
    "advantage shape": (lambda: policy_loss("ppo", L, L, torch.zeros(3)), ValueError, "advantages must have shape"),
    "int advantages": (lambda: policy_loss("ppo", L, L, A.long()), TypeError, "advantages must have dtype"),
    "old shape": (lambda: policy_loss("ppo", L, L[:, :2], A), ValueError, r"old_logp must have shape \(2, 3\)"),
    "mask": (lambda: policy_loss("ppo", L, L, A, mask=L), TypeError, "mask must have dtype bool"),
    "int weight": (lambda: policy_loss("ppo", L, L, A, token_weight=L.long()), TypeError, "token_weight must have"),
    "low": (lambda: policy_loss("ppo", L, L, A, low=1.1), ValueError, r"low must be in \[0, 1\], got 1.1"),
    "low negative": (lambda: policy_loss("ppo", L, L, A, low=-0.1), ValueError, "low must be in"),
    "high": (lambda: policy_loss("ppo", L, L, A, high=-0.1), ValueError, "high must be 0 or above"),
    "dual": (lambda: policy_loss("ppo", L, L, A, dual=1.0), ValueError, "dual must be above 1, got 1.0"),
    "dual of another": (lambda: policy_loss("cispo", L, L, A, dual=3.0, denominator=1), TypeError, "'cispo' takes"),
    "bounds": (
        lambda: policy_loss("cispo", L, L, A, low=2.0, high=1.0),
        ValueError,
        "low must not be above high = 1.0",
    ),
    "tau": (lambda: policy_loss("sapo", L, L, A, tau_pos=0.0), ValueError, "tau_pos must be above 0"),
    "nan": (lambda: policy_loss("ppo", L, L, A, low=math.nan), ValueError, "low must be a finite number, got nan"),
    "global": (lambda: policy_loss("dapo", L, L, A), ValueError, "denominator must be the number of tokens"),
    "denominator": (lambda: policy_loss("dapo", L, L, A, denominator=0), ValueError, "denominator must be .* got 0"),
    "length": (lambda: policy_loss("dr_grpo", L, L, A), ValueError, "max_length must be given"),
    "length 0": (lambda: policy_loss("dr_grpo", L, L, A, max_length=0), ValueError, "max_length must be .* got 0"),
    "length of another": (lambda: policy_loss("ppo", L, L, A, max_length=3), ValueError, "max_length must be None"),
    "reduction": (lambda: policy_loss("ppo", L, L, A, reduction="mean"), ValueError, "reduction must be one of"),
    "average": (lambda: policy_loss("ppo", L, L, A, average=False), ValueError, "average must be 'all' or 'kept'"),
    "no reference": (lambda: policy_loss("grpo", L, L, A), ValueError, "ref_logp must be given for kl_coef = 0.04"),
    "kl": (lambda: policy_loss("ppo", L, L, A, kl="k4"), ValueError, "kl must be one of"),
    "an entropy by the step's count alone": (
        lambda: policy_loss("ppo", L, L, A, entropy=L, entropy_coef=0.1, entropy_denominator=5),
        ValueError,
        "denominator must be given beside entropy_denominator",
    ),
    "responses of the step beside an entropy by tokens": (
        lambda: policy_loss("grpo", L, L, A, kl_coef=0, entropy=L, entropy_coef=0.1, denominator=5),
        ValueError,
        "entropy_denominator must be given beside denominator, which counts responses for 'sequence'",
    ),
    "no entropy": (lambda: policy_loss("ppo", L, L, A, entropy_coef=0.1), ValueError, "entropy must be given"),
    "entropy reduction": (
        lambda: policy_loss("ppo", L, L, A, entropy=L, entropy_reduction="mean"),
        ValueError,
        "entropy_reduction must be 'token' or 'policy'",
    ),
    "gspo dense": (lambda: policy_loss("gspo", L, L, L), ValueError, r"advantages must have shape \(2,\).*gspo_token"),
    "rloo weights": (lambda: policy_loss("rloo", L, L, A, token_weight=L), ValueError, "token_weight.*gspo_token"),
    "luspo reduction": (
        lambda: policy_loss("luspo", L, L, A, reduction="sequence"),
        ValueError,
        "reduction must be 'sequence_sum' for 'luspo'",
    ),
    "mode": (lambda: fk.sampler_weights(L, L, mode="token", high=2), ValueError, "mode must be one of"),
    "gate": (lambda: fk.sampler_weights(L, L, mode="token_mask", high=2, gate="kl"), ValueError, "gate must be one of"),
    "gate of a truncation": (
        lambda: fk.sampler_weights(L, L, mode="token_truncate", high=2, gate="tv"),
        ValueError,
        "mode must be 'token_mask' or 'sequence_mask' with gate='tv'",
    ),
    "gate of a sequence": (
        lambda: fk.sampler_weights(L, L, mode="token_mask", high=2, gate="geometric"),
        ValueError,
        "mode must be 'sequence_mask' with gate='geometric'",
    ),
    "gate from below": (
        lambda: fk.sampler_weights(L, L, mode="token_mask", low=0.1, gate="binary_kl"),
        ValueError,
        "low must be None with gate='binary_kl'",
    ),
    "no bound": (lambda: fk.sampler_weights(L, L, mode="token_truncate"), ValueError, "high must be given, or low"),
    "bound below 0": (
        lambda: fk.sampler_weights(L, L, mode="token_mask", high=-1.0),
        ValueError,
        "high must be a finite number > 0",
    ),
    "low below 0": (
        lambda: fk.sampler_weights(L, L, mode="token_mask", low=-0.5),
        ValueError,
        "low must be a finite number >= 0",
    ),
    "sampler bounds": (
        lambda: fk.sampler_weights(L, L, mode="token_mask", low=2.0, high=1.0),
        ValueError,
        "low must not be above high",
    ),
    "missing": (
        lambda: fk.sampler_weights(L, L, mode="token_mask", high=1.0, on_missing="zero"),
        ValueError,
        "on_missing must be",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case):
    call, kind, message = REFUSALS[case]
    with pytest.raises(kind, match=message):
        call()

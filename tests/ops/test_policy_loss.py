"""The fused policy loss against the composition of the small ops: layouts, functions, far-out numbers, planted NaN."""

import math

import pytest
import torch
from torch import inf, nan
from torch.testing import assert_close

from finealign_kernels.formulas import surrogate
from finealign_kernels.losses import policy
from finealign_kernels.losses.policy import KL, POLICY, policy_loss, token_loss
from finealign_kernels.ops import _native
from finealign_kernels.ops._layout import flatten
from finealign_kernels.ops.policy_loss import CODES, ESTIMATORS, Reduction, missing
from finealign_kernels.ops.policy_loss import policy_loss as fused
from finealign_kernels.testing.budgets import assert_within

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.reason))

F64 = torch.float64
DTYPES = [torch.float32, torch.bfloat16, torch.float16, F64]
# Around the 32 lanes, the steps of 128 tokens, the chunk of 1024, a thread's share of 4096; empty rows.
LENGTHS = {
    "short": [0, 1, 2, 31, 32, 33, 0, 63, 65, 1, 127, 130],
    "chunks": [1023, 1024, 1025, 0, 2047, 2048],
    "long": [40_000, 3, 0, 0],
    "ones": [1] * 2000,
    "none": [0, 0],
}
REDUCTIONS = {
    "token": {},
    "token_global": {"denominator": 37},
    "sequence": {},
    "sequence_sum": {},
    "constant": {"max_length": 50.0},
}


def batch(lengths, dtype=F64, seed=0):
    """Everything that a policy loss may be given, packed, with NaN where the mask is false."""
    random = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    total, rows = int(cu_seqlens[-1]), len(lengths)

    def uniform(size):
        return torch.rand(size, generator=random, dtype=F64)

    def normal(size):
        return torch.randn(size, generator=random, dtype=F64)

    mask = uniform(total) < 0.8
    old = -2 * uniform(total)
    tokens = dict(
        logp=old + 0.3 * normal(total),
        old_logp=old,
        ref_logp=old + 0.3 * normal(total),
        entropy=2 * uniform(total),
        dense=torch.where(uniform(total) < 0.1, 0, normal(total)),
        token_weight=torch.where(uniform(total) < 0.2, 0, uniform(total)),
        token_sampler=2 * uniform(total),
    )
    tokens = {name: torch.where(mask, x, nan).to(dtype) for name, x in tokens.items()}
    each = dict(advantages=normal(rows)[:, None].to(dtype), sampler_weight=2 * uniform(rows)[:, None].to(dtype))
    return dict(**tokens, **each, mask=mask, cu_seqlens=cu_seqlens)


def given(name, batch, rich):
    """Arguments of policy_loss; rich: numbers by token and weights, else by row."""
    keys = ("old_logp", "ref_logp", "entropy", "mask", "cu_seqlens")
    whole = POLICY[name].whole
    options = {key: batch[key] for key in keys} | dict(kl_coef=0.1, entropy_coef=0.05)
    options["advantages"] = batch["dense"] if rich and not whole else batch["advantages"]
    options["sampler_weight"] = batch["token_sampler"] if rich and not whole else batch["sampler_weight"]
    if rich and not whole:
        options |= dict(token_weight=batch["token_weight"], average="kept")
    return options


def both(monkeypatch, name, logp, upstream=1.7, **options):
    """All results and gradients of the fused op and of the composition."""
    found = []
    for is_fused in (policy.is_fused, lambda *given: False):
        with monkeypatch.context() as patch:
            patch.setattr(policy, "is_fused", is_fused)
            x = logp.clone().requires_grad_()
            entropy = options.get("entropy")
            entropy = None if entropy is None else entropy.clone().requires_grad_()
            out = policy_loss(name, x, **{**options, "entropy": entropy})
            sources = (x, entropy) if options.get("entropy_coef") else (x,)
            grads = torch.autograd.grad(out.loss, sources, torch.full_like(out.loss, upstream))
            found.append((out.loss.detach(), *out[1:], *grads))
    return found


@pytest.fixture
def fuses(monkeypatch):
    """Fails where the fused op is not the one that runs."""

    def refuse(*given):
        raise AssertionError("composed")

    monkeypatch.setattr(policy, "_composed", refuse)


def test_which_rows_are_fused(fuses):
    """All of them, but where a value decides what an argument means."""
    x, a = torch.zeros(2, 3), torch.zeros(2)
    for name, row in POLICY.items():
        options = dict(REDUCTIONS[row.reduction], kl_coef=0.0)
        policy_loss(name, x, x, a, sampler_weight=a, **options)
        if row.whole:
            with pytest.raises(AssertionError, match="composed"):
                policy_loss(name, x, x, a, sampler_weight=x, **options)
        else:
            policy_loss(name, x, x, x, token_weight=x, sampler_weight=x, **options)
    with pytest.raises(AssertionError, match="composed"):
        policy_loss("ppo", a, a, a, cu_seqlens=torch.arange(3))  # of a row, or of a token
    policy_loss("ppo", a, a, a[:, None], cu_seqlens=torch.arange(3))


# ---- against the composition ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rich", (False, True))
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", LENGTHS)
def test_equals_the_composition(monkeypatch, layout, reduction, rich):
    sample = batch(LENGTHS[layout])
    options = given("ppo", sample, rich) | dict(reduction=reduction, **REDUCTIONS[reduction])
    for more in (
        dict(count_empty=False, entropy_reduction="policy"),
        dict(denominator=torch.tensor(7), entropy_denominator=torch.tensor(13.0)),
        dict(kl_coef=0.0, entropy_coef=0.0, dual=1.5),
        dict(old_logp=None, ref_logp=None, entropy=None, kl_coef=0.0, entropy_coef=0.0),
    ):
        ours, exact = both(monkeypatch, "ppo", sample["logp"], **{**options, **more})
        for actual, expected in zip(ours, exact, strict=True):
            assert_close(actual, expected, rtol=1e-11, atol=1e-14)
        assert not ours[1][~sample["mask"]].any() and not ours[-1][~sample["mask"]].any()


@pytest.mark.parametrize("rich", (False, True))
@pytest.mark.parametrize("layout", LENGTHS)
@pytest.mark.parametrize("name", POLICY)
def test_every_row(monkeypatch, name, layout, rich):
    sample = batch(LENGTHS[layout], seed=1)
    options = given(name, sample, rich) | REDUCTIONS[POLICY[name].reduction]
    ours, exact = both(monkeypatch, name, sample["logp"], **options)
    for actual, expected in zip(ours, exact, strict=True):
        assert_close(actual, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ("ppo", "gspo", "gspo_token", "rloo"))
@pytest.mark.parametrize("kl", KL)
def test_every_estimator(monkeypatch, name, kl):
    sample = batch(LENGTHS["short"], seed=2)
    ours, exact = both(monkeypatch, name, sample["logp"], **given(name, sample, True), kl=kl)
    for actual, expected in zip(ours, exact, strict=True):
        assert_close(actual, expected, rtol=1e-10, atol=1e-13)
    assert ours[3] != 0


@pytest.mark.parametrize("name", POLICY)
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_no_further_from_float64_than_the_composition(monkeypatch, name, dtype):
    sample = batch([700, 1, 40, 2000, 33, 512] * 10, dtype)
    exact_sample = {k: x.double() if x.is_floating_point() else x for k, x in sample.items()}
    reduced = REDUCTIONS[POLICY[name].reduction]
    ours, rounded = both(monkeypatch, name, sample["logp"], **given(name, sample, True), **reduced)
    exact, _ = both(monkeypatch, name, exact_sample["logp"], **given(name, exact_sample, True), **reduced)
    for place, (actual, truth, theirs) in enumerate(zip(ours, exact, rounded, strict=True)):
        assert actual.dtype == theirs.dtype and actual.shape == theirs.shape
        if actual.dim():
            assert_within(actual, truth, theirs.double(), rms_ratio=1.05, max_ratio=1.05, ulps=1)
        else:
            assert_close(actual, truth.to(actual.dtype), rtol=1e-6, atol=1e-7, msg=lambda m: f"{place}: {m}")  # noqa: B023


def test_padded_equals_packed_and_two_widths():
    random = torch.Generator().manual_seed(3)
    logp, old, ref, weight = (torch.rand(6, 40, generator=random, dtype=F64) for _ in range(4))
    mask = torch.arange(40) < torch.tensor([40, 3, 0, 25, 17, 1])[:, None]
    options, a = dict(kl_coef=0.1, reduction="sequence", average="kept"), torch.randn(6, generator=random, dtype=F64)
    padded = policy_loss("ppo", logp, old, a, mask=mask, ref_logp=ref, token_weight=weight, **options)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int32), mask.sum(1).cumsum(0).int()])
    flat = [t[mask] for t in (logp, old, ref, weight)]
    packed = policy_loss(
        "ppo", *flat[:2], a[:, None], cu_seqlens=cu_seqlens, ref_logp=flat[2], token_weight=flat[3], **options
    )
    two = [(t[:3], t[3:, :30]) for t in (logp, old, ref, weight, mask)]
    narrow = policy_loss("ppo", *two[:2], a, mask=two[4], ref_logp=two[2], token_weight=two[3], **options)
    assert [x.shape for x in narrow.losses] == [(3, 40), (3, 30)]
    for other in (packed, narrow):
        assert_close((padded.loss, *padded[2:]), (other.loss, *other[2:]), rtol=1e-13, atol=1e-15)


def test_mixed_dtypes_are_read_as_they_are():
    sample = batch(LENGTHS["short"])
    half, rest = sample["logp"].bfloat16(), given("ppo", sample, False)
    rest = {k: x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for k, x in rest.items()}
    rest["sampler_weight"] = rest["sampler_weight"].half()
    x = half.clone().requires_grad_()
    out, wide = policy_loss("ppo", x, **rest), policy_loss("ppo", half.float(), **rest)
    assert out.losses.dtype == torch.float32 and torch.equal(out.loss.detach(), wide.loss)
    (dlogp,) = torch.autograd.grad(out.loss, x)
    assert dlogp.dtype == torch.bfloat16 and dlogp.any()


# ---- functions at every kind of number -----------------------------------------------------------------------------

EDGES = [0.0, 1e-9, -1e-9, 0.2, -0.3, 1.0, -1.0, 5.0, -5.0, 19.99, -19.99, 20.0, 20.01, 1000.0, -1000.0, inf, -inf, nan]


def points(advantages):
    """log-ratios by advantages, one token each; old_logp is whole, so that the difference is the log-ratio."""
    log_ratio = torch.tensor(EDGES, dtype=F64)[:, None].expand(len(EDGES), len(advantages)).reshape(-1)
    return log_ratio, torch.tensor(advantages, dtype=F64).expand(len(EDGES), len(advantages)).reshape(-1)


@pytest.mark.parametrize("name", ("ppo", "cispo", "reinforce", "sapo"))
@pytest.mark.parametrize("dual", (None, 1.25))
def test_every_function_everywhere(name, dual):
    log_ratio, advantage = points([0.0, -0.0, 1.3, -0.7, 1e6, -1e6, inf, -inf, nan])
    hyper = {"dual": dual} if "dual" in POLICY[name].hyper else {}
    value, slope = token_loss(name, log_ratio, advantage, log_ratio, **hyper)
    for at in range(len(log_ratio)):  # one a batch, so that each has its own loss
        x = log_ratio[at : at + 1, None].clone().requires_grad_()
        out = policy_loss(name, x, torch.zeros_like(x), advantage[at : at + 1, None], denominator=1, **hyper)
        (grad,) = torch.autograd.grad(out.loss, x)
        found, wanted = (out.losses.item(), grad.item()), (value[at].item(), slope[at].item())
        for one, two in zip(found, wanted, strict=True):
            assert one == pytest.approx(two, rel=1e-13, abs=1e-300, nan_ok=True), (EDGES[at // 9], advantage[at])
        if advantage[at] == 0 and log_ratio[at] == log_ratio[at]:
            assert found == (0, 0)


@pytest.mark.parametrize("kl", KL)
def test_every_estimator_everywhere(kl):
    moved, d = points([0.0, 1e-7, -1e-4, 0.3, -0.4, 3.0, -2.0, 20.0, 21.0, -30.0, 1000.0, -1000.0, inf, -inf, nan])
    value, slope = KL[kl](d, moved)
    for at in range(len(d)):
        x = torch.zeros(1, 1, dtype=F64, requires_grad=True)
        old, ref = -moved[at].view(1, 1), -d[at].view(1, 1)
        out = policy_loss("ppo", x, old, torch.zeros(1, dtype=F64), ref_logp=ref, kl=kl, kl_coef=1.0)
        if moved[at].isnan():
            assert out.loss.isnan()
            continue
        (grad,) = torch.autograd.grad(out.loss, x)
        for one, two in ((out.kl.item(), value[at].item()), (grad.item(), slope[at].item())):
            # e^-d - 1 + d cancels, and the ratio multiplies what is lost
            lost = 4e-16 * min(20, abs(d[at].item())) * math.exp(min(20, max(0, moved[at].item())))
            assert one == pytest.approx(two, rel=1e-12, abs=lost, nan_ok=True), (moved[at], d[at])


@pytest.mark.parametrize("place", (0, 100, 1030))
def test_a_nan_at_a_valid_place_reaches_the_value_and_its_own_gradient(place):
    sample = batch([1100, 60])
    sample["mask"][place] = True
    numbers = {
        k: x.nan_to_num() for k, x in sample.items() if x.is_floating_point()
    }  # masked places are read by nobody
    numbers["token_weight"][place] = numbers["token_sampler"][place] = 0.5  # one of 0 would leave it out
    for name in ("logp", "old_logp", "ref_logp", "entropy", "dense", "token_weight", "token_sampler"):
        dirty = {**sample, **{k: x.clone() for k, x in numbers.items()}}
        dirty[name][place] = nan
        x = dirty["logp"].clone().requires_grad_()
        out = policy_loss("ppo", x, **given("ppo", dirty, True))
        assert out.loss.isnan(), name
        (dlogp,) = torch.autograd.grad(out.loss, x)
        if name not in ("token_weight", "entropy"):  # a weight is in every share
            assert torch.equal(dlogp.isnan().nonzero(), torch.tensor([[place]])), name
        assert not dlogp[~sample["mask"]].any()


# ---- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("ppo", "gspo", "rloo", "sapo"))
def test_gradcheck(name):
    sample = batch([3, 0, 5, 2])
    x = torch.where(sample["mask"], sample["logp"], 0).requires_grad_()
    entropy = sample["entropy"].nan_to_num().requires_grad_()
    options = given(name, sample, True)

    def loss(x, entropy):
        return policy_loss(name, x, **{**options, "entropy": entropy}).loss

    assert torch.autograd.gradcheck(loss, (x, entropy))


def test_any_upstream_a_second_backward_and_no_upstream():
    sample = batch([3, 6, 5, 2])
    x, options = sample["logp"].clone().requires_grad_(), given("ppo", sample, True)
    loss = policy_loss("ppo", x, **options).loss
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (scaled,) = torch.autograd.grad(loss * -3.5, x)
    assert_close(scaled, -3.5 * first, rtol=1e-15, atol=0)
    loss = policy_loss("ppo", x, **options).loss
    loss /= 4  # a user's micro-batches
    assert_close(torch.autograd.grad(loss, x)[0], first / 4, rtol=1e-15, atol=0)


def test_only_what_wants_a_gradient_gets_one():
    sample = batch([3, 6, 5, 2], torch.float32)
    leaves = ("old_logp", "ref_logp", "entropy", "advantages", "sampler_weight")
    options = given("ppo", sample, False)
    for name in leaves:
        options[name] = options[name].clone().requires_grad_()
    x = sample["logp"].clone().requires_grad_()
    out = policy_loss("ppo", x, **options)
    grads = torch.autograd.grad(out.loss, (x, *(options[name] for name in leaves)), allow_unused=True)
    assert [grad is not None for grad in grads] == [True, False, False, True, False, False]
    assert not any(value.requires_grad for value in out[1:])
    frozen = policy_loss("ppo", x.detach(), **options)  # the entropy alone
    (again,) = torch.autograd.grad(frozen.loss, options["entropy"])
    assert torch.equal(again, grads[3]) and torch.equal(frozen.loss, out.loss)
    with torch.no_grad():
        assert not policy_loss("ppo", x, **options).loss.requires_grad
    without = policy_loss("ppo", x, **{**options, "entropy_coef": 0.0})
    assert torch.autograd.grad(without.loss, options["entropy"], allow_unused=True)[0] is None


def test_a_derivative_that_is_not_there_is_refused():
    sample = batch([3, 6, 5, 2])
    options = given("ppo", sample, False)
    with torch.autograd.forward_ad.dual_level():
        for name in ("logp", "entropy"):
            duals = {name: torch.autograd.forward_ad.make_dual(sample[name], torch.ones_like(sample[name]))}
            x = duals.get("logp", sample["logp"])
            with pytest.raises(RuntimeError, match="forward-mode derivatives are not implemented"):
                policy_loss("ppo", x, **{**options, "entropy": duals.get("entropy", options["entropy"])})


# ---- layout alone --------------------------------------------------------------------------------------------------


def test_bits_are_a_matter_of_the_layout_alone():
    """The same with any number of threads."""
    threads, sample = torch.get_num_threads(), batch(LENGTHS["long"], torch.float32)
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for name in ("ppo", "gspo_token"):
                x = sample["logp"].clone().requires_grad_()
                out = policy_loss(name, x, **given(name, sample, True))
                found.append((name, *out, *torch.autograd.grad(out.loss, x)))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(found, found[2:], strict=False):
        assert one[0] == two[0] and all(torch.equal(a, b) for a, b in zip(one[1:], two[1:], strict=True))


def test_everything_is_written():
    """Allocations of torch, in C++ too, hold NaN while deterministic mode fills them."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for lengths in LENGTHS.values():
            sample = batch(lengths, torch.float32)
            for name in ("ppo", "rloo"):
                x = sample["logp"].clone().requires_grad_()
                options = given(name, sample, True)
                options["entropy"] = options["entropy"].clone().requires_grad_()
                out = policy_loss(name, x, **options)
                grads = torch.autograd.grad(out.loss, (x, options["entropy"]))
                assert not any(t.isnan().any() for t in (*out, *grads))
    finally:
        torch.use_deterministic_algorithms(False)


# ---- torch.library -------------------------------------------------------------------------------------------------


def arguments(sample, ends, psi=0, ratio=0, entropy_coef=0.1, share=0):
    wide = torch.promote_types(sample["logp"].dtype, torch.float32)
    numbers = [sample[k].to(wide) for k in ("dense", "token_weight", "token_sampler")]
    tokens = [sample[k] for k in ("logp", "old_logp", "ref_logp", "entropy")]
    rest = (False, False, psi, ratio, 0.8, 1.2, inf, 0.8, 1.2, 4, 0.1, entropy_coef, share, True, False)
    at = torch.tensor(3.0, dtype=F64)
    return (*tokens, *numbers, sample["mask"], ends, *rest, 0.0, None, 0.0, None, True, 0.0, at)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    sample = batch([3, 0, 5, 1], dtype)
    sample = {k: x.nan_to_num() if x.is_floating_point() else x for k, x in sample.items()}
    for more in (dict(), dict(psi=3, ratio=1, entropy_coef=0.0, share=1)):
        torch.library.opcheck(
            torch.ops.finealign.policy_loss_fwd.default, arguments(sample, sample["cu_seqlens"], **more)
        )
    wide = torch.promote_types(dtype, torch.float32)
    given = (torch.tensor(0.5, dtype=wide), torch.randn(3, 4, dtype=wide), dtype)
    torch.library.opcheck(torch.ops.finealign.policy_loss_bwd.default, given)


@pytest.mark.parametrize("name", ("ppo", "gspo_token"))
def test_compiles_without_a_break(name):
    sample = batch([3, 0, 5, 4], torch.float32)
    x = sample["logp"].requires_grad_()
    options = given(name, sample, True)

    def loss(x):
        out = policy_loss(name, x, **options)
        return out.loss, out.ratio

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    one, two = loss(x), compiled(x)
    assert_close(one, two)
    assert_close(*(torch.autograd.grad(found[0], x)[0] for found in (one, two)))


# ---- on a GPU ------------------------------------------------------------------------------------------------------

gpu = pytest.mark.skipif(_native.cuda() is not None or not torch.cuda.is_available(), reason="no CUDA device")


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("layout", LENGTHS)
@pytest.mark.parametrize("name", POLICY)
def test_gpu_bits_are_the_cpus(fuses, name, layout):
    for dtype, rich in ((torch.float32, True), (torch.bfloat16, False), (F64, True)):
        found = []
        for device in ("cpu", "cuda"):
            sample = {k: x.to(device) for k, x in batch(LENGTHS[layout], dtype).items()}
            x, options = sample["logp"].requires_grad_(), given(name, sample, rich) | REDUCTIONS[POLICY[name].reduction]
            out = policy_loss(name, x, **options)
            found.append([t.detach().cpu() for t in (*out, *torch.autograd.grad(out.loss, x))])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), dtype


@gpu
@pytest.mark.gpu
def test_gpu_graph_and_no_sync(fuses):
    sample = {k: x.cuda() for k, x in batch(LENGTHS["chunks"]).items()}
    options = given("ppo", sample, True) | dict(denominator=torch.tensor(900.0, device="cuda"))
    expected = policy_loss("ppo", sample["logp"], **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # captures on a stream of its own; a launch elsewhere or a sync would fail
        out = policy_loss("ppo", sample["logp"], **options)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_what_is_missing_is_said():
    cpu = torch.device("cpu")
    assert all(missing(psi, kl, cpu) is None for psi in CODES for kl in ESTIMATORS)
    assert missing(surrogate.clipped, "k3", torch.device("mps")) == "it has no kernel for mps"
    assert "clipped_square" in missing(surrogate.clipped_square, "k3", cpu)
    assert "k9" in missing(surrogate.clipped, "k9", cpu)
    assert set(ESTIMATORS) == set(KL)
    reduction = Reduction("token", "all", None, None, True)
    with pytest.raises(RuntimeError, match="policy_loss cannot run: it has no kernel for 'clipped_square'"):
        fused(
            flatten(torch.zeros(1, 2)),
            None,
            torch.zeros(1),
            psi=surrogate.clipped_square,
            hyper={},
            reduction=reduction,
        )


def test_the_extension_checks_what_it_reads_by():
    sample = batch([3, 3], torch.float32)
    forward = torch.ops.finealign.policy_loss_fwd.default
    with pytest.raises(RuntimeError, match="cu_seqlens must end at 6, got 7"):
        forward(*arguments(sample, torch.tensor([0, 3, 7])))
    for place, name in ((1, "old_logp"), (3, "entropy"), (4, "advantages"), (5, "token_weight")):
        wrong = list(arguments(sample, sample["cu_seqlens"]))
        wrong[place] = wrong[place][:5]
        with pytest.raises(RuntimeError, match=f"{name} must have 6 elements"):
            forward(*wrong)
    wrong = list(arguments(sample, sample["cu_seqlens"], psi=4))
    with pytest.raises(RuntimeError, match="psi must be 0 to 3, got 4"):
        forward(*wrong)
    with pytest.raises(RuntimeError, match="upstream must be one number"):
        torch.ops.finealign.policy_loss_bwd(torch.ones(2), torch.ones(3), torch.float32)

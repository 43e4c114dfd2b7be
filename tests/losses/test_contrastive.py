"""Contrastive losses: golden values of sections 6.4 and 14, gradients, blocks, memory, ranks, dropout views."""

import sys

import pytest
import ranks
import torch
from torch.testing import assert_close

import finealign_kernels as fk
from finealign_kernels.formulas import contrast as formula
from finealign_kernels.losses.contrastive import CONTRAST
from finealign_kernels.ops import contrast as op
from finealign_kernels.testing.budgets import assert_within
from finealign_kernels.testing.measure import peak_extra_mib

F64 = torch.float64
S = torch.tensor([[1, 0.2], [0.1, 0.9], [-0.5, 0.7], [0.8, -0.6]], dtype=F64)
T = torch.tensor([[0.9, 0.3], [0.2, 1], [-0.4, 0.8], [0.7, -0.7]], dtype=F64)
C = torch.nn.functional.normalize(torch.tensor([[1, 0], [0, 1], [-1, -1]], dtype=F64))
SWAV = dict(prototypes=C, epsilon=0.5)


def close(found, *values):
    assert_close(found, torch.tensor(values, dtype=F64).view_as(found), rtol=0, atol=1e-9)


def graded(name, first, second, **options):
    leaves = [x.clone().requires_grad_() for x in (first, second)]
    out = fk.contrastive_loss(name, *leaves, **options)
    return out, *torch.autograd.grad(out.loss, leaves)


def random(n, d, dtype=F64, seed=0):
    g = torch.Generator().manual_seed(seed)
    first = torch.randn(n, d, dtype=F64, generator=g)
    return [x.to(dtype) for x in (first, first + 0.3 * torch.randn(n, d, dtype=F64, generator=g))]


def test_simcse_golden():
    assert_close(fk.contrastive_loss("simcse", S, T).loss.item(), 0.01133365506678, rtol=0, atol=1e-13)
    out, ds, dt = graded("simcse", S, T, temperature=0.5)
    close(out.loss.detach(), 0.5571758191)
    close(out.losses, 0.5847904481, 0.734936273, 0.4952688291, 0.413707726)
    close(ds[0], 0.004994443, -0.0249722152)
    close(
        dt,
        [-0.0004499985, 0.0013499955],
        [-0.0046777521, 0.0009355504],
        [0.150914511, 0.0754572555],
        [0.0578208381, 0.0578208381],
    )
    assert out.accuracies.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("pairs", ["halves", "interleaved"])
def test_differences_golden(pairs):
    order = torch.tensor([0, 2, 1, 3]) if pairs == "halves" else torch.arange(4)
    out, ds, dt = graded("simcse", S[order], T[order], temperature=0.5, rows="differences", pairs=pairs)
    close(out.loss.detach(), 0.7032509473)
    rows = [0.6830857659, 0.6830857659, 0.7234161287, 0.7234161287]
    assert_close(out.losses, torch.tensor(rows, dtype=F64)[order], rtol=0, atol=1e-9)
    # the rows written out
    leaves = [x.clone().requires_grad_() for x in (S, T)]
    written = [torch.cat([x[0::2] - x[1::2], x[1::2] - x[0::2]]) for x in leaves]
    exact = formula.info_nce(*written, temperature=0.5).mean()
    for found, one in zip((ds, dt), torch.autograd.grad(exact, leaves), strict=True):
        assert_close(found, one[order], rtol=1e-12, atol=1e-14)


def test_swav_golden():
    out, ds, _ = graded("swav", S, T, **SWAV)
    close(out.loss.detach(), 9.2271575328)
    close(out.losses, 6.9513894444, 8.4359823699, 11.4812253956, 10.0400329215)
    close(ds[0], 0.0636321352, -0.3181606758)
    codes = formula.sinkhorn(formula.unit(S) @ C.T, epsilon=0.5, iterations=3)
    close(codes[0], 0.7170337558, 0.1407070098, 0.1422592344)
    close(codes[3], 0.4565406762, 0.0261582269, 0.5173010968)
    close(
        formula.sinkhorn(formula.unit(T) @ C.T, epsilon=0.5, iterations=3)[2], 0.0483577898, 0.5214671066, 0.4301751036
    )


def test_prototypes_learn_and_codes_do_not():
    prototypes = (3 * C).requires_grad_()
    out = fk.contrastive_loss("swav", S, T, prototypes=prototypes, epsilon=0.5)
    close(out.loss.detach(), 9.2271575328)
    leaf = C.clone().requires_grad_()
    views = [formula.unit(x) @ formula.unit(leaf).T for x in (S, T)]
    codes = [formula.sinkhorn(x.detach(), epsilon=0.5, iterations=3) for x in views]
    (exact,) = torch.autograd.grad(formula.swapped(*views, codes, temperature=0.1).mean(), leaf)
    assert_close(torch.autograd.grad(out.loss, prototypes)[0], exact / 3, rtol=1e-12, atol=1e-14)


def test_swav_of_differences():
    out, ds, _ = graded("swav", S, T, rows="differences", pairs="interleaved", **SWAV)
    leaves = [x.clone().requires_grad_() for x in (S, T)]
    written = [torch.stack([x[0::2] - x[1::2], x[1::2] - x[0::2]], 1).reshape(4, 2) for x in leaves]
    exact = fk.contrastive_loss("swav", *written, **SWAV)
    assert_close(out.loss, exact.loss)
    assert_close(ds, torch.autograd.grad(exact.loss, leaves)[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rows", ["responses", "differences"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_swav_of_half_precision_takes_prototypes_of_either_dtype(dtype, rows):
    halves = [x.to(dtype) for x in (S, T, C)]
    exact = fk.contrastive_loss("swav", *halves[:2], rows=rows, prototypes=halves[2].float(), epsilon=0.5)
    wide = fk.contrastive_loss(
        "swav", *(x.double() for x in halves[:2]), rows=rows, prototypes=halves[2].double(), epsilon=0.5
    )
    assert_close(exact.loss, wide.loss.float(), rtol=1e-5, atol=1e-5)
    own = halves[2].clone().requires_grad_()
    out = fk.contrastive_loss("swav", *halves[:2], rows=rows, prototypes=own, epsilon=0.5)
    assert_close(out.loss.detach(), exact.loss, rtol=0, atol=0)
    assert torch.autograd.grad(out.loss, own)[0].dtype == dtype
    with pytest.raises(TypeError, match="prototypes must have dtype"):
        fk.contrastive_loss("swav", *halves[:2], rows=rows, prototypes=C, epsilon=0.5)


@pytest.mark.parametrize("block", [1, 40, 97, 2**22])
@pytest.mark.parametrize("rows", ["responses", "differences"])
def test_blocks_are_the_whole(block, rows, monkeypatch):
    first, second = random(22, 5)
    monkeypatch.setattr(op, "BLOCK", block)
    leaves = [x.clone().requires_grad_() for x in (first, second)]
    written = leaves
    if rows == "differences":
        written = [torch.cat([x[:11] - x[11:], x[11:] - x[:11]]) for x in leaves]
    exact = formula.info_nce(*written, temperature=0.2)
    wanted = torch.autograd.grad(1.7 * exact.mean(), leaves)
    ours = [x.clone().requires_grad_() for x in (first, second)]
    out = fk.contrastive_loss("simcse", *ours, temperature=0.2, rows=rows)
    assert_close(out.losses, exact.detach(), rtol=1e-12, atol=1e-14)
    for _ in range(2):  # the second backward makes its gradients anew
        found = torch.autograd.grad(1.7 * out.loss, ours, retain_graph=True)
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other, rtol=1e-12, atol=1e-14)
    (alone,) = torch.autograd.grad(
        fk.contrastive_loss("simcse", first, ours[1], temperature=0.2, rows=rows).loss, ours[1]
    )
    assert_close(alone * 1.7, wanted[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_within_that_of_eager(dtype):
    """float32 against float64, eager's own error as the measure (standard S2)."""
    first, second = random(96, 48, dtype, seed=3)

    def eager(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (first, second)]
        losses = formula.info_nce(*leaves, temperature=0.05)
        return losses.detach(), *torch.autograd.grad(losses.mean(), leaves)

    out, *grads = graded("simcse", first, second)
    for found, exact, rounded in zip((out.losses, *grads), eager(F64), eager(torch.float32), strict=True):
        rounded = rounded if found.dtype == torch.float32 else exact.to(dtype)
        assert_within(found, exact, rounded, rms_ratio=1.5, max_ratio=2, ulps=2)


def test_a_certain_row_keeps_its_digits():
    """The loss of rows far apart is e^-40, which log-sum-exp less similarity would round to 0 in float32."""
    x = torch.eye(3)
    out = fk.contrastive_loss("simcse", x, x, temperature=0.025)
    assert_close(out.losses, torch.full((3,), 2 * torch.tensor(-40.0, dtype=F64).exp().item()), rtol=1e-5, atol=0)
    leaf = torch.tensor([[1.0, 0.1, 0], [0, 1, 0.1], [0.1, 0, 1]]).requires_grad_()
    assert torch.autograd.grad(fk.contrastive_loss("simcse", leaf, x, temperature=0.025).loss, leaf)[0].any()


def test_degenerate_rows():
    for name, options in (("simcse", {}), ("swav", SWAV)):
        one, d1, d2 = graded(name, S[:1], T[:1], **options)
        none = graded(name, S[:0], T[:0], **options)[0]
        assert none.loss == 0 and (name == "swav" or (one.loss == 0 and not d1.any() and not d2.any()))
        zero = S.clone()
        zero[1] = 0
        out, ds, dt = graded(name, zero, T, **options)
        assert out.loss.isfinite() and ds.isfinite().all() and not ds[1].any() and dt[1].isfinite().all()
        same = torch.cat([S[:2], S[:1], T[1:2]])  # the first pair's responses are equal
        out, ds, _ = graded(name, same, same.flip(1), rows="differences", **options)
        assert out.loss.isfinite() and ds.isfinite().all() and not ds[0].any() and not ds[2].any()
    single, ds, _ = graded("swav", S, T, prototypes=C[:1])
    assert single.loss == 0 and not ds.any()
    small = fk.contrastive_loss("swav", S, T, prototypes=C, epsilon=1e-4)
    assert small.loss.isfinite()


def test_infinite_logits_are_not_hidden():
    dirty = S.clone()
    dirty[2, 0] = torch.nan
    assert fk.contrastive_loss("simcse", dirty, T).losses.isnan().tolist() == [False, False, True, False]
    assert fk.contrastive_loss("simcse", S, dirty).loss.isnan()


@pytest.mark.parametrize(("dtype", "large"), [(torch.float32, 1e20), (torch.float64, 1e160)])
@pytest.mark.parametrize(("name", "options"), [("simcse", {}), ("swav", SWAV)])
def test_a_norm_that_overflows_is_not_hidden(name, options, dtype, large):
    """Finite rows whose squares overflow: divided by an infinite norm they would be zero rows, with a usual loss."""
    first, second = S.to(dtype), T.to(dtype)
    options = options | {key: x.to(dtype) for key, x in options.items() if key == "prototypes"}
    huge = first.clone()
    huge[1] *= large
    assert fk.contrastive_loss(name, first, second, **options).loss.isfinite()
    out, ds, _ = graded(name, huge, second, **options)
    assert out.loss.isnan() and ds[1].isnan().any()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory():
    """No (N, N) matrix: at most an eighth of what the plain loss takes, small version of the bench."""
    first, second = random(3072, 64, torch.float32)

    def plain():
        leaves = [x.detach().requires_grad_() for x in (first, second)]
        return torch.autograd.grad(formula.info_nce(*leaves, temperature=0.05).mean(), leaves)

    def ours():
        return graded("simcse", first, second)

    fk.contrastive_loss("simcse", first[:8], second[:8])
    taken = [peak_extra_mib(plain), peak_extra_mib(ours)]
    if None in taken:
        pytest.skip("the peak resident set cannot be set back here")
    assert taken[0] > 100  # 36 MiB a matrix
    assert taken[1] <= taken[0] / 2, taken  # blocks of 16 MiB; an eighth from N = 8192 on
    op_block, op.BLOCK = op.BLOCK, 2**19
    try:
        assert peak_extra_mib(ours) <= taken[0] / 8
    finally:
        op.BLOCK = op_block


SIZES = [(2, 2), (1, 3)]  # rows of the two ranks


def shares(group):
    """This rank's losses and gradients."""
    rank, found = group.rank(), {}
    for sizes in SIZES:
        low = sum(sizes[:rank])
        rows = slice(low, low + sizes[rank])
        for name, options in (("simcse", dict(temperature=0.5)), ("swav", SWAV)):
            for kind in ("responses", "differences") if sizes == (2, 2) else ("responses",):
                options = dict(rows=kind, pairs="interleaved", group=group, **options)
                out, *grads = graded(name, S[rows], T[rows], **options)
                options = {key: options[key] for key in options.keys() - {"rows", "pairs", "group"}}
                found[sizes, name, kind] = (out.loss.detach(), out.losses, *grads)
    return found


def test_ranks_share_one_loss():
    parts = ranks.processes(2, shares)
    assert len(parts[0]) == 6
    for key in parts[0]:
        _, name, kind = key
        options = dict(temperature=0.5) if name == "simcse" else SWAV
        out, *grads = graded(name, S, T, rows=kind, pairs="interleaved", **options)
        loss, losses, ds, dt = zip(*(part[key] for part in parts), strict=True)
        assert_close(sum(loss), out.loss.detach(), rtol=1e-12, atol=0)
        assert_close(torch.cat(losses), out.losses, rtol=1e-12, atol=1e-14)
        for found, exact in zip((ds, dt), grads, strict=True):
            assert_close(torch.cat(found), exact, rtol=1e-12, atol=1e-14)
    golden = torch.stack([part[(2, 2), "simcse", "responses"][0] for part in parts])
    close(golden, 0.3299316803, 0.2272441388)


def test_dropout_views():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.0), torch.nn.Linear(8, 3)).eval()
    x = torch.randn(16, 4)
    first, second = fk.dropout_views(model, x, p=0.5)
    assert (first != second).any() and torch.equal(model(x), model(x))
    assert model[1].p == 0.0 and not any(module.training for module in model.modules())
    with pytest.raises(RuntimeError):
        fk.dropout_views(model, x[:, :3], p=0.5)
    assert model[1].p == 0.0 and not model.training
    with pytest.raises(ValueError, match="have a dropout"):
        fk.dropout_views(torch.nn.Linear(4, 4), x)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("byol", {}, "name must be one of"),
        ("swav", {}, "prototypes must be given"),
        ("simcse", dict(prototypes=C), "prototypes must be None"),
        ("swav", dict(prototypes=C[:, :1]), r"prototypes must have shape \(K, 2\)"),
        ("swav", dict(prototypes=C, iterations=0), "iterations must be a whole number"),
        ("simcse", dict(temperature=0.0), "temperature must be"),
        ("simcse", dict(rows="pairs"), "rows must be one of"),
        ("simcse", dict(reduction="none"), "reduction must be one of"),
        ("simcse", dict(second=T[:2]), "second must have shape"),
    ],
)
def test_refusals(name, change, message):
    arguments = dict(first=S, second=T) | change
    with pytest.raises(ValueError, match=message):
        fk.contrastive_loss(name, **arguments)
    with pytest.raises(ValueError, match="even number of rows"):
        fk.contrastive_loss("simcse", S[:3], T[:3], rows="differences")
    assert all(row.source for row in CONTRAST.values())

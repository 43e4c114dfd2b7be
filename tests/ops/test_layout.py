import pytest
import torch

import finealign_kernels as fk
from finealign_kernels.ops._layout import check_cu_seqlens, flatten, flatten_like, unflatten


def test_padded():
    x, mask = torch.arange(6.0).view(2, 3), torch.tensor([[True, True, False], [True, False, False]])
    tokens = flatten(x, mask)
    assert tokens.x.tolist() == [0, 1, 2, 3, 4, 5] and tokens.cu_seqlens.tolist() == [0, 3, 6] and tokens.segments == 2
    assert tokens.mask.tolist() == [True, True, False, True, False, False]
    assert torch.equal(unflatten(tokens.x, tokens.shapes), x)


def test_flat():
    x, cu_seqlens = torch.arange(5.0), torch.tensor([0, 2, 5], dtype=torch.int32)
    tokens = flatten(x, None, cu_seqlens)
    assert tokens.x is not None and tokens.mask is None and torch.equal(tokens.cu_seqlens, cu_seqlens)
    assert torch.equal(unflatten(tokens.x, tokens.shapes), x)


def test_a_pair_of_different_widths():
    chosen, rejected = torch.arange(4.0).view(2, 2), torch.arange(4.0, 10).view(2, 3)
    mask = torch.ones(2, 2, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool)
    tokens = flatten((chosen, rejected), mask)
    assert (
        tokens.x.tolist() == list(range(10)) and tokens.cu_seqlens.tolist() == [0, 2, 4, 7, 10] and tokens.segments == 4
    )
    assert tokens.mask.tolist() == [True] * 4 + [False] * 6
    again = unflatten(tokens.x, tokens.shapes)
    assert torch.equal(again[0], chosen) and torch.equal(again[1], rejected)
    assert torch.equal(flatten_like((chosen, rejected), tokens, "ref_logp"), tokens.x)


UNEQUAL = torch.full((1, 3), -0.5), torch.full((3, 3), -0.25)  # one chosen response, three rejected
TAKES_PAIRS = {
    "preference": lambda pair: fk.dpo(pair, pair),
    "without a reference": lambda pair: fk.simpo(pair),
    "another divergence": lambda pair: fk.dpo(pair, pair, divergence="js"),
    "segments": lambda pair: fk.dpo(pair, pair, average="segments", segment_ids=tuple(x.long() * 0 for x in pair)),
    "nll": lambda pair: fk.nll_loss(pair),
    "points": lambda pair: fk.unlikelihood(pair, torch.ones(4)),
    "wpo_weights": lambda pair: fk.wpo_weights(pair, pair),
    "ld_weights": lambda pair: fk.ld_weights(pair),
    "adaptive_mask": lambda pair: fk.adaptive_mask(pair),
}


@pytest.mark.parametrize("name", TAKES_PAIRS)
def test_a_pair_of_unequal_rows_is_refused(name):
    with pytest.raises(ValueError, match="must be a pair with as many rows each, got 1 and 3 rows"):
        TAKES_PAIRS[name](UNEQUAL)


def test_gradients_come_back_in_shape():
    pair = torch.randn(2, 2, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    tokens = flatten(pair)
    d1, d2 = torch.autograd.grad((tokens.x * torch.arange(10.0)).sum(), pair)
    assert d1.tolist() == [[0, 1], [2, 3]] and d2.tolist() == [[4, 5, 6], [7, 8, 9]]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty(shape):
    tokens = flatten(torch.zeros(shape))
    assert tokens.cu_seqlens.tolist() == [0] * (shape[0] + 1) and tokens.x.shape == (0,)


X, CU = torch.zeros(2, 3), torch.tensor([0, 6])


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (lambda: flatten((X, X, X)), TypeError, "logp must be a tensor or a pair of them, got 3 of them"),
        (
            lambda: flatten((X, X.double())),
            TypeError,
            "logp must be a pair of one dtype, got torch.float32 and torch.float64",
        ),
        (lambda: flatten((X, X), None, CU), ValueError, r"logp must be flat \(N,\) where cu_seqlens is given"),
        (
            lambda: flatten((X, X[0])),
            ValueError,
            r"logp must be \(B, T\) where cu_seqlens is not given, got \(2, 3\) and \(3,\)",
        ),
        (lambda: flatten(X, (X > 0, X > 0)), TypeError, "mask must be one tensor, got 2"),
        (lambda: flatten((X, X), X > 0), TypeError, "mask must be a pair of tensors, got 1"),
        (lambda: flatten((X, X), (X > 0, X[:1] > 0)), ValueError, r"mask must have shape \(2, 3\), got \(1, 3\)"),
        (
            lambda: flatten_like(X.t(), flatten(X), "ref_logp"),
            ValueError,
            r"ref_logp must have shape \(2, 3\), got \(3, 2\)",
        ),
    ],
)
def test_refusals(call, kind, message):
    with pytest.raises(kind, match=message.replace("logp must", "(x|logp|ref_logp) must")):
        call()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "at, value, message",
    [
        (0, 1, "start at 0"),
        (70_000, 3, r"not decrease, got cu_seqlens\[70000\]"),
        (-1, 100_001, "end at the number of tokens 100000"),
    ],
)
def test_many_bounds_are_checked_as_a_few_are(dtype, at, value, message):
    good = torch.arange(100_001, dtype=dtype)
    check_cu_seqlens(good, 100_000, good)
    bad = good.clone()
    bad[at] = value
    with pytest.raises(ValueError, match=message):
        check_cu_seqlens(bad, 100_000, bad)

"""One temperature a row: the numbers of a call for each row with its own, and over ranks."""

import pytest
import ranks
import torch
from torch.testing import assert_close

import finealign_kernels as fk
from finealign_kernels.ops import _chunked
from finealign_kernels.testing import samples

N, V, D = 14, 101, 8
ALL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
OPTIONS = [{}, dict(softcap=4.0, logit_scale=1.3)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(_chunked, "tile_of", lambda device: _chunked.Tile(4, 24))


def given(dtype=torch.float64):
    s = samples.linear(N, V, D, dtype, seed=4)
    temperatures = torch.linspace(0.3, 2.0, N, dtype=torch.float64)
    bias = torch.linspace(-1, 1, V, dtype=torch.float64)
    mask = torch.ones(N, dtype=torch.bool)
    mask[3] = False
    upstream = s.upstream.double()
    upstream[:, 6] = 0  # dropped in backward
    return s, temperatures, bias, mask, upstream


def loss_of(out, upstream):
    return sum((x * g).sum() for x, g in zip(out[:3], upstream.to(out.logp.dtype), strict=True))


def one_by_one(options):
    """A call for each row, by the definition."""
    s, temperatures, bias, mask, upstream = given()
    x, w, b = (t.clone().requires_grad_() for t in (s.hidden, s.weight, bias))
    rows = []
    for n in range(N):
        call = dict(bias=b, mask=mask[n : n + 1], temperature=float(temperatures[n]), outputs=ALL, backend="reference")
        rows.append(fk.linear_logprobs(x[n : n + 1], w, s.labels[n : n + 1], **call, **options))
    out = fk.LogProbs(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
    return out, torch.autograd.grad(loss_of(out, upstream), (x, w, b))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "backend, workspace, compact",
    [
        ("reference", 0, "host"),
        ("torch", 0, "host"),
        ("torch", "full", "host"),
        ("torch", 5 * V * 8, "device"),
        ("auto", "auto", "auto"),
    ],
)
def test_the_head(options, backend, workspace, compact):
    s, temperatures, bias, mask, upstream = given()
    x, w, b = (t.clone().requires_grad_() for t in (s.hidden, s.weight, bias))
    call = dict(
        bias=b, mask=mask, temperature=temperatures, outputs=ALL, backend=backend, workspace=workspace, compact=compact
    )
    out = fk.linear_logprobs(x, w, s.labels, **call, **options)
    grads = torch.autograd.grad(loss_of(out, upstream), (x, w, b))
    exact, exact_grads = one_by_one(options)
    for ours, theirs in zip((*out, *grads), (*exact, *exact_grads), strict=True):
        assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend, inplace", [("reference", False), ("torch", False), ("auto", True)])
def test_logits_that_exist(options, backend, inplace):
    s, temperatures, bias, mask, upstream = given()
    x, w = (t.clone().requires_grad_() for t in (s.hidden, s.weight))
    call = dict(
        mask=mask.view(2, 7),
        temperature=temperatures.view(2, 7),
        outputs=ALL,
        backend=backend,
        inplace_backward=inplace,
    )
    out = fk.token_logprobs((x @ w.t() + bias).view(2, 7, V), s.labels.view(2, 7), **call, **options)
    flat = fk.LogProbs(*(part.flatten() for part in out))
    grads = torch.autograd.grad(loss_of(flat, upstream), (x, w))
    exact, exact_grads = one_by_one(options)
    for ours, theirs in zip((*flat, *grads), (*exact, *exact_grads[:2]), strict=True):
        assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", OPTIONS)
def test_over_ranks(options):
    s, temperatures, bias, mask, upstream = given()

    def score(group):
        span = (slice(0, 60), slice(60, V))[torch.distributed.get_rank(group)]
        x, w, b = (t.clone().requires_grad_() for t in (s.hidden, s.weight[span], bias[span]))
        call = dict(bias=b, mask=mask, temperature=temperatures, outputs=ALL, group=group, vocab_start=span.start)
        out = fk.linear_logprobs(x, w, s.labels, hidden_grad="all_reduce", **call, **options)
        return [part.detach() for part in out], torch.autograd.grad(loss_of(out, upstream), (x, w, b))

    exact, (dx, dw, db) = one_by_one(options)
    found = ranks.threads(2, score)
    for out, grads in found:
        for ours, theirs in zip((*out, grads[0]), (*exact, dx), strict=True):
            assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert_close(torch.cat([grads[1] for _, grads in found]), dw, rtol=1e-9, atol=1e-11)
    assert_close(torch.cat([grads[2] for _, grads in found]), db, rtol=1e-9, atol=1e-11)


def test_bfloat16_and_equal_temperatures():
    """Equal temperatures are one temperature, to the bit of torch's row operations."""
    s, *_ = given(torch.bfloat16)
    one = fk.linear_logprobs(s.hidden, s.weight, s.labels, temperature=0.7, backend="torch")
    each = fk.linear_logprobs(s.hidden, s.weight, s.labels, temperature=torch.full((N,), 0.7))
    assert_close(one.logp, each.logp, rtol=1e-6, atol=1e-6)


def test_refusals():
    s, temperatures, *_ = given()
    with pytest.raises(ValueError, match=r"temperature must have shape \(14,\)"):
        fk.linear_logprobs(s.hidden, s.weight, s.labels, temperature=temperatures[:5])
    with pytest.raises(ValueError, match="temperature must be finite and > 0 in every row"):
        fk.linear_logprobs(s.hidden, s.weight, s.labels, temperature=temperatures - 1)
    with pytest.raises(ValueError, match="temperature must be one number with backend 'native'"):
        fk.linear_logprobs(s.hidden.float(), s.weight.float(), s.labels, temperature=temperatures, backend="native")

"""The softmax over a sampler's kept vocabulary (top-k, top-p), against float64 over each row's tokens alone."""

import pytest
import ranks
import torch
from head_layers import head_layers
from torch.testing import assert_close

import finealign_kernels as fk
from finealign_kernels.formulas.logprobs import Coef
from finealign_kernels.ops import _chunked
from finealign_kernels.testing import samples

N, V, D, K = 13, 203, 16, 9
F64 = torch.float64
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
LAYERS = head_layers(V)
TOLERANCE = {F64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(_chunked, "tile_of", lambda device: _chunked.Tile(4, 64))


def case(dtype):
    """Rows of K ids, some shorter, one with its label alone, one with an id twice, one that is not read."""
    s = samples.linear(N, V, D, dtype)
    random = torch.Generator().manual_seed(2)
    support = torch.randint(V, (N, K), generator=random)
    support[:, 4], support[:, 6] = s.labels, -1
    support[2] = torch.where(torch.arange(K) == 3, s.labels[2], -100)
    support[5, 0], support[11] = support[5, 1], V + 7
    bias = torch.randn(V, generator=random, dtype=F64)
    banned = next(int(i) for i in support[1] if i not in (-1, s.labels[1]) and i not in s.labels)
    bias[banned] = -torch.inf  # in the support of its row, and out of the vocabulary
    return s, support, bias.to(torch.promote_types(dtype, torch.float32)), torch.arange(N) != 11


def loss_of(out, upstream, mask):
    dlogp, dlse, dentropy = upstream.to(out[0].dtype)
    rows = out[0] * dlogp + out[1] * dlse + out[2] * dentropy + out[3] * dlogp.roll(1)
    return torch.where(mask, rows, 0).sum()


def row_by_row(z, labels, support, mask):
    """logp, lse, entropy, mean of z, log Σ p² and whether the label is the first maximum, of each row's ids alone."""
    found = []
    for n in range(len(z)):
        if not mask[n]:
            found.append([z[n, 0] * 0] * 6)
            continue
        ids = sorted({int(i) for i in support[n] if i >= 0 and z[n, i] != -torch.inf})
        kept = z[n, ids]
        logp = kept.log_softmax(0)
        mine = logp[ids.index(int(labels[n]))]
        top = torch.tensor(float(ids[int(kept.argmax())] == labels[n]))
        found.append([mine, kept.logsumexp(0), -(logp.exp() * logp).sum(), kept.mean(), (2 * logp).logsumexp(0), top])
    return [torch.stack(list(column)) for column in zip(*found, strict=True)]


def near(actual, expected, dtype):
    for a, b in zip(actual, expected, strict=True):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error <= TOLERANCE[dtype], error


@pytest.mark.parametrize("name, dtype, workspace, compact", LAYERS)
@pytest.mark.parametrize("softcap, temperature", ((None, 1.0), (3.0, 0.7), (None, "rows")))
def test_head(usable, name, dtype, workspace, compact, softcap, temperature):
    backend, (s, support, bias, mask) = usable(name, "cpu", dtype), case(dtype)
    if temperature == "rows":
        if name not in ("reference", "torch"):
            pytest.skip("one temperature for all rows")
        temperature = torch.linspace(0.5, 2, N, dtype=F64)
    inputs = [t.clone().requires_grad_() for t in (s.hidden, s.weight, bias)]
    how = dict(workspace=workspace, compact=compact, backend=backend, outputs=OUTPUTS)
    out = fk.linear_logprobs(
        inputs[0],
        inputs[1],
        s.labels,
        bias=inputs[2],
        mask=mask,
        softcap=softcap,
        temperature=temperature,
        support=support.int() if compact == "device" else support,
        **how,
    )
    grads = torch.autograd.grad(loss_of((out.logp, out.lse, out.entropy, out.mean_logits), s.upstream, mask), inputs)

    exact = [t.detach().double().requires_grad_() for t in inputs]
    z = exact[0] @ exact[1].t() + exact[2]
    z = z if softcap is None else torch.where(z == -torch.inf, z, softcap * torch.tanh(z / softcap))
    z = z / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    *found, squares, top = row_by_row(z, s.labels, support, mask)
    near((out.logp, out.lse, out.entropy, out.mean_logits, out.log_sum_sq_probs), (*found, squares), dtype)
    assert torch.equal(out.is_top1, top.bool())
    near(grads, torch.autograd.grad(loss_of(found, s.upstream, mask), exact), dtype)
    unseen = torch.ones(V, dtype=torch.bool)
    unseen[[int(i) for i in support[mask].flatten() if i >= 0]] = False
    assert not grads[1][unseen].any() and not grads[2][unseen].any()


@pytest.mark.parametrize("name", ("reference", "torch", "native", "triton"))
@pytest.mark.parametrize("dtype", (F64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("inplace", (False, True))
def test_logits_that_exist(usable, name, dtype, inplace):
    backend, (s, support, _, mask) = usable(name, "cpu", dtype), case(dtype)
    if inplace and name == "reference":
        pytest.skip("it has no backward of its own")
    logits = (s.hidden @ s.weight.t()).detach()
    given = logits.clone()
    exact, x = logits.double().requires_grad_(), logits.requires_grad_()
    out = fk.token_logprobs(
        x.clone() if inplace else x,
        s.labels,
        mask=mask,
        support=support,
        outputs=OUTPUTS,
        inplace_backward=inplace,
        backend=backend,
    )
    (dx,) = torch.autograd.grad(loss_of((out.logp, out.lse, out.entropy, out.mean_logits), s.upstream, mask), x)
    *found, _, _ = row_by_row(exact, s.labels, support, mask)
    near((out.logp, out.lse, out.entropy, out.mean_logits), found, dtype)
    near((dx,), torch.autograd.grad(loss_of(found, s.upstream, mask), exact), dtype)
    assert torch.equal(x.detach(), given)


def on_a_rank(group, s, support, mask, backend):
    at = torch.distributed.get_rank(group)
    start, stop = ((0, 77), (77, V))[at]
    x, w = s.hidden.clone().requires_grad_(), s.weight[start:stop].clone().requires_grad_()
    out = fk.linear_logprobs(
        x,
        w,
        s.labels,
        mask=mask,
        support=support,
        outputs=OUTPUTS,
        group=group,
        vocab_start=start,
        hidden_grad="all_reduce",
        backend=backend,
    )
    loss = loss_of((out.logp, out.lse, out.entropy, out.mean_logits), s.upstream, mask)
    return out.logp.detach(), *(g.clone() for g in torch.autograd.grad(loss, (x, w)))


@pytest.mark.parametrize("backend", ("torch", "native"))
def test_over_ranks(usable, backend):
    """The ids are those of the whole vocabulary, on every rank."""
    usable(backend)
    s, support, _, mask = case(torch.float32)
    found = ranks.threads(2, on_a_rank, s, support, mask, backend)
    exact = [t.double().requires_grad_() for t in (s.hidden, s.weight)]
    want = row_by_row(exact[0] @ exact[1].t(), s.labels, support, mask)
    dx, dw = torch.autograd.grad(loss_of(want[:4], s.upstream, mask), exact)
    near((found[0][0], found[1][0], found[0][1], found[1][1]), (want[0], want[0], dx, dx), torch.float32)
    near((torch.cat([found[0][2], found[1][2]]),), (dw,), torch.float32)


def test_all_ids_are_no_restriction():
    s = samples.linear(N, V, D)
    every = torch.arange(V).flip(0).expand(N, V)
    plain = fk.linear_logprobs(s.hidden, s.weight, s.labels, outputs=OUTPUTS)
    for a, b in zip(
        fk.linear_logprobs(s.hidden, s.weight, s.labels, support=every, outputs=OUTPUTS), plain, strict=True
    ):
        assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_the_ratio_of_policies_over_one_set():
    """Two policies over the set that was sampled from: Σ over the set of p_old · ratio is 1, over all ids it is not."""
    s = samples.linear(4, V, D)
    other, top = s.weight + 0.1 * torch.randn_like(s.weight), (s.hidden @ s.weight.t()).topk(K).indices
    hidden, ids, support = s.hidden.repeat_interleave(K, 0), top.flatten(), top.repeat_interleave(K, 0)
    old, new = (fk.linear_logprobs(hidden, w, ids, support=support).logp for w in (s.weight, other))
    assert_close((old.exp() * (new - old).exp()).view(4, K).sum(1), torch.ones(4), rtol=1e-5, atol=1e-5)
    old, new = (fk.linear_logprobs(hidden, w, ids).logp for w in (s.weight, other))
    assert ((old.exp() * (new - old).exp()).view(4, K).sum(1) < 0.99).all()


def test_padded_batches():
    s, support, _, mask = case(torch.float32)
    flat = fk.linear_logprobs(s.hidden[:12], s.weight, s.labels[:12], mask=mask[:12], support=support[:12]).logp
    shaped = [t[:12].view(3, 4, *t.shape[1:]) for t in (s.hidden, s.labels, mask, support)]
    hidden, labels, mask, support = shaped
    assert torch.equal(fk.linear_logprobs(hidden, s.weight, labels, mask=mask, support=support).logp, flat.view(3, 4))


def call(**changes):
    s, support, _, mask = case(torch.float32)
    given = dict(hidden=s.hidden, weight=s.weight, labels=s.labels, mask=mask, support=support)
    return fk.linear_logprobs(**{**given, **changes})


SUPPORT = case(torch.float32)[1]
REFUSED = {
    "shape": (dict(support=SUPPORT[:, 0]), ValueError, r"support must have shape \(13, 'K'\)"),
    "rows": (dict(support=SUPPORT[:5]), ValueError, r"support must have shape \(13, 'K'\)"),
    "dtype": (dict(support=SUPPORT.float()), TypeError, "support must have dtype int64 or int32"),
    "bool": (dict(support=torch.ones(N, V, dtype=torch.bool)), TypeError, "support must have dtype int64 or int32"),
    "label": (
        dict(support=SUPPORT.clamp(max=V - 1).roll(1, 0)),
        IndexError,
        "support must hold the label of its row, got row 0 without",
    ),
    "none": (dict(support=SUPPORT[:, :0]), IndexError, "support must hold the label of its row, got row 0 without"),
    "id": (
        dict(mask=None, support=SUPPORT.clamp(min=0)),
        IndexError,
        "support must hold ids below 203, got 210 in row 11",
    ),
    "scale": (dict(logit_scale=-1.0), ValueError, "logit_scale must be > 0 with a support"),
    "fused": (dict(backend="triton_fused"), (ValueError, RuntimeError), "support must be None with|cannot run here"),
    "invariant": (dict(batch_invariant=True), (ValueError, RuntimeError), "support must be None with|cannot run here"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what):
    changes, kind, words = REFUSED[what]
    with pytest.raises(kind, match=words):
        call(**changes)


def test_a_label_outside_is_nan_where_values_are_not_read():
    """As on a GPU: counts stay on the device, check_errors raises."""
    s, support, _, mask = case(torch.float32)
    good = call(compact="device").logp
    support[3] = (s.labels[3] + 1) % V
    fk.check_errors()
    found = call(support=support, compact="device").logp
    assert found[3].isnan() and torch.equal(found[torch.arange(N) != 3], good[torch.arange(N) != 3])
    with pytest.raises(IndexError, match="1 labels on cpu were outside"):
        fk.check_errors()


def test_rows_of_an_entropy_gradient_are_near_uniform_in_their_support():
    s, support, _, _ = case(torch.bfloat16)
    coef = torch.zeros(8, N)
    coef[2], coef[5] = 1, torch.tensor(2.0).log()  # entropy gradient; entropy log 2
    rows = _chunked.near_uniform(Coef(*coef), None, V, support)
    assert rows[2] and not rows[0]  # one id; and eight of them
    assert not _chunked.near_uniform(Coef(*coef), None, V).any()


# ---- rows without a token -------------------------------------------------------------------------------------------

ALL = ("entropy", "log_sum_sq_probs", "mean_logits")


DEAD = [(by, *layer) for by in ("bias", "support") for layer in LAYERS]
DEAD += [("logits", backend, dtype, 0, "host") for backend, dtype in {layer[:2]: 0 for layer in LAYERS}]


@pytest.mark.parametrize(
    "by, backend, dtype, workspace, compact", [*DEAD, ("bias", "triton_fused", torch.float32, "full", "device")]
)
def test_a_row_without_a_token_is_nan_with_a_gradient_of_0(by, backend, dtype, workspace, compact, usable, monkeypatch):
    """Every logit is -inf, or every one of the row's support: one rule. Other rows are what they are without it."""
    if backend == "triton_fused":
        monkeypatch.setattr(_chunked, "tile_of", lambda device: _chunked.Tile(4, 128))
    usable(backend.removesuffix("_fused"), dtype=dtype)
    s = samples.linear(5, 150, D, dtype)
    bias = torch.zeros(150, dtype=torch.promote_types(dtype, torch.float32))
    support, dead = None, torch.arange(5) == (-1 if by == "bias" else 2)
    if by == "support":
        support, bias[70:80] = torch.randint(70, (5, 9), generator=torch.Generator().manual_seed(0)), -torch.inf
        labels = support[:, 3].clone()
        support[2], labels[2] = torch.arange(70, 79), 73
    elif by == "bias":
        bias[:], labels, dead = -torch.inf, s.labels % 150, torch.ones(5, dtype=torch.bool)
    if by == "logits":
        z = (s.hidden @ s.weight.T).float().to(dtype)
        z[2], labels = -torch.inf, s.labels % 150
        call = lambda x: fk.token_logprobs(x, labels, outputs=ALL, backend=backend)  # noqa: E731
        given = [z]
    else:
        options = dict(bias=bias, support=support, outputs=ALL, backend=backend, compact=compact, workspace=workspace)
        call = lambda h, w: fk.linear_logprobs(h, w, labels, **options)  # noqa: E731
        given = [s.hidden, s.weight]
    given = [x.detach().clone().requires_grad_() for x in given]
    out = call(*given)
    floats = [x for x in out if x is not None and x.is_floating_point()]
    assert all(x[dead].isnan().all() and x[~dead].isfinite().all() for x in floats)
    sum(x.sum() for x in floats if x.requires_grad).backward()
    assert all(x.grad.isfinite().all() for x in given) and not given[0].grad[dead].any()
    grads = [x.grad.clone() for x in given]
    for x in given:
        x.grad = None
    floats = [x for x in call(*given) if x is not None and x.requires_grad]
    sum(torch.where(dead, 0, x).sum() for x in floats).backward()
    for one, x in zip(grads, given, strict=True):
        assert_close(one, x.grad, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])

"""The mean of the logits with its gradient, and the smoothed NLL that is made of it, against torch's cross_entropy."""

import pytest
import torch
import torch.nn.functional as F
from head_layers import head_layers
from torch.testing import assert_close

import finealign_kernels as fk
from finealign_kernels.ops import _chunked
from finealign_kernels.testing import samples

N, V, D = 13, 203, 16
MEAN = ("mean_logits",)
F64 = torch.float64
LAYERS = [*head_layers(V), ("triton_fused", torch.float32, 7 * V * 4, "device")]
TOLERANCE = {F64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 6e-3, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(_chunked, "tile_of", lambda device: _chunked.Tile(4, 128))


@pytest.fixture
def layer_of(usable):
    def check(name, dtype):
        return name if name == "triton_fused" and usable("triton") else usable(name, "cpu", dtype)

    return check


def logits_of(x, w, b, *, softcap=None, temperature=1.0):
    """(N, V) in float64; a banned token is -inf."""
    y = x.double() @ w.double().t() + (0 if b is None else b.double())
    z = y if softcap is None else torch.where(y == -torch.inf, y, softcap * torch.tanh(y / softcap))
    return z / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)


def near(actual, expected, dtype):
    for a, b in zip(actual, expected, strict=True):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error <= TOLERANCE[dtype], error


@pytest.mark.parametrize("name, dtype, workspace, compact", LAYERS)
@pytest.mark.parametrize("epsilon", (0.1, 1.0))
def test_smoothed_nll_is_the_cross_entropy_of_torch(layer_of, name, dtype, workspace, compact, epsilon):
    backend, s = layer_of(name, dtype), samples.linear(N, V, D, dtype)
    labels = s.labels.clone()
    labels[[2, 9]] = -100
    x, w = (t.clone().requires_grad_() for t in (s.hidden, s.weight))
    out = fk.linear_logprobs(x, w, labels, outputs=MEAN, workspace=workspace, compact=compact, backend=backend)
    rows = dict(mask=(labels != -100)[None], label_smoothing=epsilon)
    loss = fk.nll_loss(out.logp[None], mean_logp=out.mean_logp[None], **rows).loss
    grads = torch.autograd.grad(loss, (x, w))
    exact = [t.double().requires_grad_() for t in (s.hidden, s.weight)]
    expected = F.cross_entropy(exact[0] @ exact[1].t(), labels, label_smoothing=epsilon)
    near((loss, *grads), (expected, *torch.autograd.grad(expected, exact)), dtype)


@pytest.mark.parametrize("name, dtype, workspace, compact", LAYERS)
@pytest.mark.parametrize("softcap, temperature", ((None, 1.0), (3.0, 0.7), (3.0, "rows")))
def test_gradient_of_the_mean(layer_of, name, dtype, workspace, compact, softcap, temperature):
    """Beside that of every other output: banned tokens, a softcap that saturates, rows without some gradient."""
    backend, s = layer_of(name, dtype), samples.linear(N, V, D, dtype, spread="peaked")
    bias = torch.randn(V, generator=torch.Generator().manual_seed(1), dtype=F64)
    bias[3] = bias[90:100] = -torch.inf
    labels = torch.where(bias[s.labels] == -torch.inf, 4, s.labels)
    if temperature == "rows":
        if name not in ("reference", "torch"):
            pytest.skip("one temperature for all rows")
        temperature = torch.linspace(0.5, 2, N, dtype=F64)
    b = bias.to(torch.promote_types(dtype, torch.float32))
    dlogp, dlse, dentropy = s.upstream.double()
    dmean = dlse.roll(1)
    dmean[4:7] = dlogp[6:8] = dlse[6:9] = dentropy[5:9] = 0  # row 6 has none, 7 and 8 that of the mean alone or none
    mask = torch.arange(N) != 11

    def loss_of(logp, lse, entropy, mean):
        rows = logp * dlogp + lse * dlse + entropy * dentropy + mean * dmean
        return torch.where(mask, rows, 0).sum()

    inputs = [t.clone().requires_grad_() for t in (s.hidden, s.weight, b)]
    options = dict(mask=mask, softcap=softcap, temperature=temperature, outputs=("entropy", *MEAN))
    how = dict(workspace=workspace, compact=compact, backend=backend)
    out = fk.linear_logprobs(inputs[0], inputs[1], labels, bias=inputs[2], **options, **how)
    grads = torch.autograd.grad(loss_of(out.logp, out.lse, out.entropy, out.mean_logits), inputs)

    exact = [t.detach().double().requires_grad_() for t in inputs]
    z = logits_of(*exact, softcap=softcap, temperature=temperature)
    kept = z != -torch.inf
    z = z.masked_fill(~kept, -1e30)
    logp = z.log_softmax(-1)
    entropy = -(logp.exp() * logp.masked_fill(~kept, 0)).sum(-1)
    mean = z.masked_fill(~kept, 0).sum(-1) / kept.sum(-1)
    found = logp.gather(1, labels[:, None])[:, 0], z.logsumexp(-1), entropy, mean
    near(grads, torch.autograd.grad(loss_of(*found), exact), dtype)
    assert_close(out.mean_logits.double(), torch.where(mask, mean, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ("reference", "torch", "native", "triton"))
@pytest.mark.parametrize("dtype", (F64, torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("inplace", (False, True))
def test_logits_that_exist(usable, name, dtype, inplace):
    """Each row bans tokens of its own; some logits are so low that their probability is 0, and not banned."""
    backend, s = usable(name, "cpu", dtype), samples.linear(N, V, D, F64)
    if inplace and name == "reference":
        pytest.skip("it has no backward of its own")
    z = (s.hidden @ s.weight.t()).to(dtype)
    z[torch.arange(N), (s.labels + 1 + torch.arange(N)) % V] = -torch.inf
    z[:, -5:] = torch.where(z[:, -5:] == -torch.inf, z[:, -5:], -500)
    z[torch.arange(N), s.labels] = 1.0
    exact, z = z.double().requires_grad_(), z.requires_grad_()
    out = fk.token_logprobs(z.clone(), s.labels, outputs=MEAN, inplace_backward=inplace, backend=backend)
    (dz,) = torch.autograd.grad((out.mean_logp * s.upstream[0]).sum(), z)
    kept = exact != -torch.inf
    mean = exact.masked_fill(~kept, 0).sum(-1) / kept.sum(-1) - exact.logsumexp(-1)
    (expected,) = torch.autograd.grad((mean * s.upstream[0]).sum(), exact)
    near((dz,), (expected,), dtype)
    assert not dz[~kept].any()


def test_mean_is_differentiable_to_the_second_order():
    s = samples.linear(5, 7, 3, F64)

    def mean(x, w):
        options = dict(outputs=MEAN, softcap=2.0, backend="reference")
        return fk.linear_logprobs(x, w, s.labels % 7, **options).mean_logp

    inputs = s.hidden.requires_grad_(), s.weight.requires_grad_()
    assert torch.autograd.gradcheck(mean, inputs) and torch.autograd.gradgradcheck(mean, inputs)


def test_double_backward_through_the_mean_is_refused():
    s = samples.linear(5, 7, 3)
    mean = fk.linear_logprobs(s.hidden.requires_grad_(), s.weight, s.labels % 7, outputs=MEAN).mean_logits
    (dx,) = torch.autograd.grad(mean.square().sum(), s.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprobs"):
        dx.sum().backward()


def test_compiled():
    def loss(x, w, labels):
        out = fk.linear_logprobs(x, w, labels, outputs=MEAN)
        return fk.nll_loss(out.logp[None], label_smoothing=0.1, mean_logp=out.mean_logp[None]).loss

    s = samples.linear(12, 60, 8)
    inputs = s.hidden.requires_grad_(), s.weight.requires_grad_()
    torch._dynamo.reset()
    found = [f(*inputs, s.labels) for f in (torch.compile(loss, backend="aot_eager"), loss)]
    grads = [torch.autograd.grad(x, inputs) for x in found]
    assert torch.equal(*found) and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


LOGP, SPREAD = torch.tensor([[-1.0, -2.0], [-0.5, -4.0]]), torch.tensor([[-3.0, -4.0], [-5.0, -2.0]])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, F64), ids=str)
@pytest.mark.parametrize("reduction, average", (("token", "kept"), ("token", "all"), ("mean", "kept"), ("sum", False)))
def test_smoothing_of_every_reduction(route, dtype, reduction, average):
    """(1 - ε) of the NLL and ε of the mean's: the loss is linear in its tokens."""
    logp, spread, weight = LOGP.to(dtype), SPREAD.to(dtype), torch.tensor([[1.0, 0.5], [0.0, 2.0]])
    options = dict(token_weight=weight, reduction=reduction, average=average, denominator=None)
    smoothed = fk.nll_loss(logp, label_smoothing=0.2, mean_logp=spread, **options)
    parts = [fk.nll_loss(x.to(smoothed.loss.dtype), **options) for x in (logp, spread)]
    assert_close(smoothed.loss, 0.8 * parts[0].loss + 0.2 * parts[1].loss)
    assert_close(smoothed.losses, 0.8 * parts[0].losses + 0.2 * parts[1].losses)


def test_a_pair_is_smoothed_part_by_part():
    found = fk.nll_loss((LOGP, LOGP[:, :1]), label_smoothing=0.2, mean_logp=(SPREAD, SPREAD[:, :1])).loss
    x = 0.8 * LOGP + 0.2 * SPREAD
    assert_close(found, fk.nll_loss((x, x[:, :1])).loss)


def test_smoothing_1_does_not_read_the_label():
    logp = torch.where(LOGP < -3, torch.nan, LOGP)
    assert_close(fk.nll_loss(logp, label_smoothing=1.0, mean_logp=SPREAD).loss, -SPREAD.mean())


@pytest.mark.parametrize(
    "options, words",
    (
        (dict(label_smoothing=0.1), "mean_logp must be given where label_smoothing > 0"),
        (dict(label_smoothing=1.5, mean_logp=SPREAD), "label_smoothing must be a finite number >= 0 and <= 1"),
        (dict(label_smoothing=-0.1, mean_logp=SPREAD), "label_smoothing must be a finite number >= 0 and <= 1"),
        (dict(label_smoothing=0.1, mean_logp=SPREAD[:1]), r"mean_logp must have shape \(2, 2\)"),
    ),
)
def test_refusals(options, words):
    with pytest.raises(ValueError, match=words):
        fk.nll_loss(LOGP, **options)


def test_mean_logp_needs_the_mean():
    s = samples.linear(3, 5, 2)
    with pytest.raises(ValueError, match="outputs must hold 'mean_logits'"):
        _ = fk.linear_logprobs(s.hidden, s.weight, s.labels).mean_logp

"""Two hundred optimizer steps: what a bound per step cannot see, a small error that always points the same way."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import finealign_kernels as fk

STEPS, PAIRS, TOKENS, V, D = 200, 2, 16, 509, 32


class Run(NamedTuple):
    parameters: Tensor  # all of them after the last step, flat, float32
    losses: Tensor  # (STEPS,) float64
    residuals: Tensor  # (STEPS,) each step's loss less the float64 loss of the same rounded hidden states and head


def logp_exact(hidden, head, labels):
    return F.log_softmax(hidden.double() @ head.double().T, -1).gather(-1, labels[..., None])[..., 0]


def logp_float32(hidden, head, labels):
    return logp_eager(hidden.float(), head.float(), labels)


def logp_eager(hidden, head, labels):
    return F.log_softmax((hidden @ head.T).float(), -1).gather(-1, labels[..., None])[..., 0]


def logp_fused(hidden, head, labels):
    return fk.linear_logprobs(hidden, head, labels).logp


def nll(logp, ref_logp, mask):
    return fk.nll_loss(logp, mask=mask).loss


def dpo(logp, ref_logp, mask):
    return fk.dpo(logp, ref_logp, mask=mask, beta=0.5).loss


def batches(seed):
    """Tokens of a chain that mostly goes round the vocabulary, so that there is something to learn; half are jumps."""
    random = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        jumps = torch.rand(2 * PAIRS, TOKENS + 1, generator=random) < 0.5
        jumps[:PAIRS] &= torch.rand(PAIRS, TOKENS + 1, generator=random) < 0.5  # chosen: fewer of them
        strides = torch.where(jumps, torch.randint(V, jumps.shape, generator=random), 7)
        mask = torch.rand(2 * PAIRS, TOKENS, generator=random) < 0.9
        yield strides.cumsum(1) % V, mask


def train(logp_of, loss_of, lr, dtype, seed=0):
    random = torch.Generator().manual_seed(1000 + seed)
    embedding, inner, head = (
        (scale * torch.randn(size, generator=random)).requires_grad_()
        for scale, size in ((1.0, (V, D)), (D**-0.5, (D, D)), (D**-0.5, (V, D)))
    )
    first = [p.detach().clone() for p in (embedding, inner, head)]
    optimizer = torch.optim.SGD([embedding, inner, head], lr=lr, momentum=0.9)

    def hidden_of(tokens, embedding, inner):
        x = embedding[tokens[:, :-1]]
        return (x + torch.tanh(x @ inner)).to(dtype)

    losses, residuals = [], []
    for tokens, mask in batches(seed):
        labels = tokens[:, 1:]
        hidden = hidden_of(tokens, embedding, inner)
        ref_logp = logp_exact(hidden_of(tokens, *first[:2]), first[2].to(dtype), labels).float()
        loss = loss_of(logp_of(hidden, head.to(dtype), labels), ref_logp, mask)
        with torch.no_grad():
            truth = loss_of(logp_exact(hidden, head.to(dtype), labels), ref_logp.double(), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
        residuals.append(loss.detach().double() - truth)
    parameters = torch.cat([p.detach().flatten() for p in (embedding, inner, head)])
    return Run(parameters, torch.stack(losses), torch.stack(residuals))


RATES = {nll: 0.1, dpo: 0.01}


@pytest.fixture(scope="module", params=RATES, ids=lambda loss_of: loss_of.__name__)
def runs(request):
    """How to train in bfloat16, and what float32 logits of the same inputs and eager bfloat16 come to."""
    loss_of = request.param

    def run(logp_of):
        return train(logp_of, loss_of, RATES[loss_of], torch.bfloat16)

    return run, run(logp_float32), run(logp_eager)


def drift(run, base):
    return (run.parameters - base.parameters).norm().item()


def test_two_hundred_steps_drift_less_than_eagers(runs):
    run, base, eager = runs
    fused = run(logp_fused)
    assert base.losses[-20:].mean() < base.losses[:20].mean() * 0.9, "nothing was learnt"
    assert 0 < drift(fused, base) <= drift(eager, base)
    residual = fused.residuals
    error = residual.std() / STEPS**0.5
    rounding = torch.finfo(torch.float32).eps / 2 * fused.losses.mean()  # of the loss itself, a float32 number
    assert residual.mean().abs() <= 2 * error + rounding


@pytest.mark.parametrize("gain", (0.98, 1.02))
def test_a_gradient_that_is_always_too_large_or_small_breaks_the_bound(runs, gain):
    run, base, eager = runs

    def biased(hidden, head, labels):
        logp = logp_fused(hidden, head, labels)
        return gain * logp + (1 - gain) * logp.detach()

    assert drift(run(biased), base) > drift(eager, base)

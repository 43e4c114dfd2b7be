"""MetaRM: the worked example of section 6.5, what it must not be, and that parameters come back bit for bit."""

import pytest
import ranks
import torch
from torch.testing import assert_close

import finealign_kernels as fk
from finealign_kernels.metarm import difference_loss

F64 = torch.float64
FEATURES = torch.tensor([[1, 1], [0.5, -0.5], [0, 0.2]], dtype=F64)  # of k = 3 responses
PAIR = torch.tensor([[1, 0], [0, 1]], dtype=F64)  # chosen, rejected
ETA, ALPHA = 0.5, 0.1


def start():
    return torch.tensor([0.5, -0.2], dtype=F64, requires_grad=True)


def close(found, *values):
    assert_close(found.detach(), torch.tensor(values, dtype=F64).view_as(found), rtol=0, atol=1e-9)


def step(theta, *, create_graph=False):
    objective = difference_loss((FEATURES @ theta)[None])
    with fk.MetaRM([theta], eta=ETA).ascend(objective):
        inside = theta.detach().clone()
        loss = fk.reward_loss("bradley_terry", PAIR @ theta).loss
        loss.backward()
    return inside, loss


def test_worked_example():
    theta = start()
    r = (FEATURES @ theta).detach().requires_grad_()
    close(r, 0.3, 0.35, -0.04)
    j = difference_loss(r[None])
    close(j, 0.376215693)
    close(torch.autograd.grad(j, r)[0], -0.0015404132, 0.1090163238, -0.1074759106)
    inside, loss = step(theta)
    close(inside, 0.5264838744, -0.2387718786)
    close(loss, 0.3820019455)
    close(theta.grad, -0.3175062746, 0.3175062746)
    torch.optim.SGD([theta], lr=ALPHA).step()
    close(theta, 0.5317506275, -0.2317506275)


def test_what_it_is_not():
    """Stepping from θ', differentiating through the inner step, and descending: three other results."""
    inside, _ = step(start())
    theta = start()
    step(theta)
    close(inside - ALPHA * theta.grad, 0.5582345018, -0.270522506)
    theta = start()
    (push,) = torch.autograd.grad(difference_loss((FEATURES @ theta)[None]), theta, create_graph=True)
    second = fk.reward_loss("bradley_terry", PAIR @ (theta + ETA * push)).loss
    (grad,) = torch.autograd.grad(second, theta)
    close(grad, -0.316346612, 0.3160329708)
    close(theta - ALPHA * grad, 0.5316346612, -0.2316032971)
    theta = start()
    with fk.MetaRM([theta], eta=ETA).ascend(-difference_loss((FEATURES @ theta)[None])):
        fk.reward_loss("bradley_terry", PAIR @ theta).loss.backward()
    theta_down = theta.detach() - ALPHA * theta.grad
    theta = start()
    fk.reward_loss("bradley_terry", PAIR @ theta).loss.backward()
    plain = theta.detach() - ALPHA * theta.grad
    close(plain, 0.5331812228, -0.2331812228)
    results = [torch.tensor([0.5317506275, -0.2317506275], dtype=F64), inside - ALPHA * theta.grad, theta_down, plain]
    for i, one in enumerate(results):
        assert all((one - other).abs().max() > 1e-4 for other in results[i + 1 :])


def test_difference_loss_of_few_and_equal_scores():
    equal = torch.ones(2, 3, dtype=F64, requires_grad=True)
    j = difference_loss(equal)
    close(j, 1 / 3)
    assert not torch.autograd.grad(j, equal)[0].any()
    for shape in ((4, 1), (0, 3)):
        r = torch.randn(shape, requires_grad=True)
        j = difference_loss(r)
        assert j == 0 and not torch.autograd.grad(j, r)[0].any()
    r = torch.randn(6, 5, dtype=F64, requires_grad=True)
    flat = difference_loss(r.view(-1), torch.arange(0, 31, 5))
    assert_close(flat, difference_loss(r))
    uneven = difference_loss(r.view(-1)[:4], torch.tensor([0, 1, 1, 4]))
    assert_close(uneven, (0 + 0 + difference_loss(r.view(-1)[None, 1:4])) / 3)
    far = difference_loss(torch.tensor([[0.0, 1e4, -1e4]]))
    assert_close(far.item(), 2 / 3)


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1))


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_come_back_bit_for_bit(error, dtype):
    model = small_model().to(dtype)
    model[0].bias.requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    x = torch.randn(2, 3, 4).to(dtype)
    meta = fk.MetaRM(model.parameters(), eta=0.3)

    def body():
        with meta.ascend(difference_loss(model(x)[..., 0])):
            moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
            assert moved[0] and not moved[1] and moved[2]
            if error:
                raise error

    if error:
        with pytest.raises(error):
            body()
    else:
        body()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_gathered_gradients_are_kept():
    model, x = small_model(), torch.randn(2, 3, 4)
    model(x).sum().backward()
    kept = [p.grad.clone() for p in model.parameters()]
    meta = fk.MetaRM(model.parameters(), eta=0.3)
    with meta.ascend(difference_loss(model(x)[..., 0])):
        assert all(torch.equal(p.grad, one) for p, one in zip(model.parameters(), kept, strict=True))
        model(x).sum().backward()
    assert all((p.grad != one).any() for p, one in zip(model.parameters(), kept, strict=True) if one.any())

    def fails(objective):
        objective.backward()
        raise RuntimeError("out of memory")

    kept = [p.grad.clone() for p in model.parameters()]
    with (
        pytest.raises(RuntimeError, match="memory"),
        fk.MetaRM(model.parameters(), eta=1.0, backward=fails).ascend(difference_loss(model(x)[..., 0])),
    ):
        raise AssertionError("not reached")
    assert all(torch.equal(p.grad, one) for p, one in zip(model.parameters(), kept, strict=True))


def test_a_late_backward_is_refused():
    model, x = small_model(), torch.randn(2, 3, 4)
    with fk.MetaRM(model.parameters(), eta=0.3).ascend(difference_loss(model(x)[..., 0])):
        loss = model(x).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_refusals():
    theta = start()
    with pytest.raises(ValueError, match="eta must"):
        fk.MetaRM([theta], eta=0.0)
    with pytest.raises(ValueError, match="parameters must"):
        fk.MetaRM([theta.detach()], eta=1.0)
    for objective in (theta, theta.detach().sum()):
        with pytest.raises(ValueError, match="objective must"), fk.MetaRM([theta], eta=1.0).ascend(objective):
            raise AssertionError("not reached")
    other = start()
    with pytest.raises(ValueError, match="leave a gradient"), fk.MetaRM([theta], eta=1.0).ascend(other.sum()):
        raise AssertionError("not reached")
    with pytest.raises(ValueError, match=r"scores must be \(m, k\)"):
        difference_loss(theta)


def sharded(rank):
    """One MetaRM step of a model under FSDP2, each rank its own rows; then of the whole model on all rows."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(1)
    x = torch.randn(2, 4, 3, 4)  # (rank, prompt, response, feature)
    model, found = small_model(), {}
    for way in ("whole", "sharded"):
        if way == "sharded":
            for layer in (model[0], model[2]):
                fully_shard(layer)
            fully_shard(model)
        rows = x.flatten(0, 1) if way == "whole" else x[rank]
        before = [p.detach().clone() for p in model.parameters()]
        with fk.MetaRM(model.parameters(), eta=0.3).ascend(difference_loss(model(rows)[..., 0])):
            fk.reward_loss("bradley_terry", model(rows)[:, :2, 0].T.reshape(-1)).loss.backward()
        same = [torch.equal(*map(_local, both)) for both in zip(model.parameters(), before, strict=True)]
        found[way] = all(same), [_whole(p.grad) for p in model.parameters()]
        model.zero_grad()
    return found


def _local(x):
    return x.to_local() if hasattr(x, "to_local") else x


def _whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def test_sharded_parameters(tmp_path):
    for found in ranks.run(__file__, "sharded", tmp_path):
        assert found["whole"][0] and found["sharded"][0]
        for one, other in zip(found["whole"][1], found["sharded"][1], strict=True):
            assert_close(other, one, rtol=1e-5, atol=1e-7)

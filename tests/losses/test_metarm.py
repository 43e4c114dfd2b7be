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
    meta = fk.MetaRM(model.parameters(), eta=30.0)  # so far that what is subtracted again would not be what it was

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


def test_a_parameter_that_is_given_twice_moves_once():
    """The lists of two models that share one, say."""
    theta, moved = start(), []
    for parameters in ([theta], [theta, theta]):
        with fk.MetaRM(parameters, eta=ETA).ascend(difference_loss((FEATURES @ theta)[None])):
            moved.append(theta.detach().clone())
    assert_close(moved[1], moved[0], rtol=0, atol=0)
    assert_close(theta, start(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "parameters, found",
    [
        (start(), "iterable of tensors, got a Tensor"),
        (None, "got a NoneType"),
        ([("a", start())], "tensors, got a tuple"),
    ],
)
def test_what_are_no_parameters(parameters, found):
    with pytest.raises(TypeError, match=f"parameters must .*{found}"):
        fk.MetaRM(parameters, eta=ETA)


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


def sharded(group):
    """One MetaRM step of a model under FSDP2, each rank its own rows; then of the whole model on all rows."""
    rank = group.rank()
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


def test_sharded_parameters():
    for found in ranks.processes(2, sharded):
        assert found["whole"][0] and found["sharded"][0]
        for one, other in zip(found["whole"][1], found["sharded"][1], strict=True):
            assert_close(other, one, rtol=1e-5, atol=1e-7)


def replicated(group):
    """One MetaRM step of a model under DistributedDataParallel, each rank its own rows."""
    rank = group.rank()
    torch.manual_seed(1)
    x = torch.randn(2, 4, 3, 4)
    model = torch.nn.parallel.DistributedDataParallel(small_model())
    before = [p.detach().clone() for p in model.parameters()]
    with fk.MetaRM(model.parameters(), eta=0.3).ascend(difference_loss(model(x[rank])[..., 0])):
        fk.reward_loss("bradley_terry", model(x[rank])[:, :2, 0].T.reshape(-1)).loss.backward()
    same = [torch.equal(*both) for both in zip(model.parameters(), before, strict=True)]
    return all(same), [p.grad for p in model.parameters()]


def test_replicated_parameters():
    """The mean over ranks of what each rank's rows give is what all rows give, and all ranks have it."""
    wanted = whole_step()
    for same, grads in ranks.processes(2, replicated):
        assert same
        for one, other in zip(wanted, grads, strict=True):
            assert_close(other, one, rtol=1e-5, atol=1e-7)


def whole_step():
    """Gradients of one MetaRM step on the rows of both ranks."""
    torch.manual_seed(1)
    rows = torch.randn(2, 4, 3, 4).flatten(0, 1)
    model = small_model()
    with fk.MetaRM(model.parameters(), eta=0.3).ascend(difference_loss(model(rows)[..., 0])):
        fk.reward_loss("bradley_terry", model(rows)[:, :2, 0].T.reshape(-1)).loss.backward()
    return [p.grad for p in model.parameters()]


class Partitioned:
    """ZeRO-3's contract: `ds_tensor` holds this rank's part of a padded flat parameter, `ds_shape` its shape. The
    parameter itself is empty but in a pass of the model, or, where it is small, kept whole, too."""

    def __init__(self, model, rank, kept=()):
        self.model, self.kept = model, kept
        for p in model.parameters():
            part = -(-p.numel() // 2)
            flat = torch.nn.functional.pad(p.detach().flatten(), (0, 2 * part - p.numel()))
            p.ds_shape, p.ds_tensor = p.shape, flat[rank * part : (rank + 1) * part].clone()
        self.release()

    def release(self):
        for name, p in self.model.named_parameters():
            if name not in self.kept:
                p.data = torch.empty(0)

    def __call__(self, x):
        for name, p in self.model.named_parameters():
            if name not in self.kept:  # those are not gathered again
                parts = [torch.empty_like(p.ds_tensor) for _ in range(2)]
                torch.distributed.all_gather(parts, p.ds_tensor)
                p.data = torch.cat(parts)[: p.ds_shape.numel()].view(p.ds_shape)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
            out = self.model(x)
        self.release()
        return out


def partitioned(group):
    """Both ranks' steps under the contract of ZeRO-3, with and without parameters that are kept whole; one raises."""
    rank = group.rank()
    torch.manual_seed(1)
    x, found = torch.randn(2, 4, 3, 4)[rank], {}
    for way, kept in (("all", ()), ("some", ("0.bias", "2.bias")), ("raises", ())):
        model = Partitioned(small_model(), rank, kept)
        parameters = list(model.model.parameters())
        values = [[p.ds_tensor.clone(), p.detach().clone()] for p in parameters]
        meta, grads = fk.MetaRM(parameters, eta=0.3, group=group), None
        try:
            with meta.ascend(difference_loss(model(x)[..., 0])):
                pairs = zip(parameters[:3], values, strict=False)  # the last, a shift of all scores, has no gradient
                moved = all(
                    (p.ds_tensor != part).any() and (p != own).any() == (own.numel() > 0) for p, (part, own) in pairs
                )
                loss = fk.reward_loss("bradley_terry", model(x)[:, :2, 0].T.reshape(-1)).loss
                grads = torch.autograd.grad(loss, parameters)
                for grad in grads:
                    torch.distributed.all_reduce(grad)
                    grad /= 2
                if way == "raises":
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        now = [[p.ds_tensor, p] for p in parameters]
        same = all(
            torch.equal(a, b) for one, other in zip(now, values, strict=True) for a, b in zip(one, other, strict=True)
        )
        found[way] = moved and same and all(p.grad is None for p in parameters), grads
    return found


def test_partitioned_parameters():
    wanted = whole_step()
    for found in ranks.processes(2, partitioned):
        for right, grads in found.values():
            assert right
            for one, other in zip(wanted, grads, strict=True):
                assert_close(other, one, rtol=1e-5, atol=1e-7)


def deepspeed_steps(group):
    """Two steps of DeepSpeed's engine by stage: largest difference of the parameters, and whether they came back."""
    rank = group.rank()
    import importlib

    import deepspeed

    # a kernel for ranks on one machine, which would be compiled here
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    torch.manual_seed(1)
    x, found = torch.randn(2, 4, 3, 4), {}
    rows = {"whole": x.flatten(0, 1), **{stage: x[rank] for stage in (1, 2, 3)}}
    for way, own in rows.items():
        model = small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        if way != "whole":
            zero = dict(stage=way, stage3_param_persistence_threshold=8)  # a bias of one number is kept whole
            config = dict(train_batch_size=2, zero_allow_untested_optimizer=True, zero_optimization=zero)
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
            meta = fk.MetaRM(model.parameters(), eta=0.3, group=group)
        run, same = model if way == "whole" else engine, True
        for _ in range(2):
            held = [getattr(p, "ds_tensor", p).detach() for p in model.parameters()]
            before = [x.clone() for x in held]
            meta = fk.MetaRM(model.parameters(), eta=0.3) if way == "whole" else meta
            with meta.ascend(difference_loss(model(own)[..., 0])):  # not the engine: its hooks take any gradient
                loss = fk.reward_loss("bradley_terry", run(own)[:, :2, 0].T.reshape(-1)).loss
                loss.backward() if way == "whole" else engine.backward(loss)
            same = same and all(map(torch.equal, held, before))
            optimizer.step() if way == "whole" else engine.step()
            optimizer.zero_grad() if way == "whole" else None
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=way == 3):
            found[way] = same, [p.detach().clone() for p in model.parameters()]
    return found


def test_deepspeed():
    pytest.importorskip("deepspeed", reason="ZeRO itself needs deepspeed")
    for found in ranks.fresh(2, deepspeed_steps):
        for stage in (1, 2, 3):
            assert found[stage][0]
            for one, other in zip(found["whole"][1], found[stage][1], strict=True):
                assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_partitioned_parameters_need_a_group():
    theta = start()
    theta.ds_tensor = theta.detach().clone()
    with pytest.raises(ValueError, match="group must be the process group"):
        fk.MetaRM([theta], eta=1.0)
    with pytest.raises(TypeError, match="group must be None or a torch.distributed.ProcessGroup"):
        fk.MetaRM([start()], eta=1.0, group="world")

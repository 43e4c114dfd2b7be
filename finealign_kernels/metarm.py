"""MetaRM: a reward model that still tells the responses of a shifted policy apart, arXiv:2401.06080 section 3.

    J(θ) = (1/m) Σ_x (2/k²) Σ_{i<j} σ(|r_θ(x, s_i) - r_θ(x, s_j)|)      difference loss over k responses a prompt
    θ' = θ + η ∇J(θ)                                                    inner step: it ascends
    θ  ← θ - α ∇L(θ')                                                   outer step: taken at θ', applied to θ

First order: nothing is differentiated through the inner step.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from .losses.pairs import all_pairs
from .ops._check import check_number, check_tensor, fail
from .ops._layout import check_cu_seqlens
from .ops._parallel import check_group


def difference_loss(scores: Tensor, cu_groups: Tensor | None = None) -> Tensor:
    """J, the mean over prompts of (2/k²) Σ_{i<j} σ(|r_i - r_j|): larger where responses to one prompt are told apart.

    scores     (m, k) float, k responses a prompt; or (S,) with cu_groups
    cu_groups  (m + 1,) int: the responses to prompt x are cu_groups[x] to cu_groups[x + 1]

    An infinite score has σ = 1 beside any other one; two infinite scores of one sign, or a NaN, give NaN.
    () float32 (float64 for float64), in [(k-1)/(2k), (k-1)/k); equal scores have no gradient. One response a prompt, or
    no prompt at all, gives 0, connected to the graph. Ascend on it, as MetaRM does; it is not to be minimised.
    Raises  ValueError, TypeError. Source: arXiv:2401.06080 eq. 15.
    """
    check_tensor("scores", scores)
    if scores.dim() != (2 if cu_groups is None else 1):
        fail("scores", "be (m, k)" if cu_groups is None else "be (S,) beside cu_groups", tuple(scores.shape))
    r = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if cu_groups is None:
        m, k = r.shape
        i, j = torch.triu_indices(k, k, 1, device=r.device)
        return (r[:, i] - r[:, j]).abs().sigmoid().sum() * (2 / (max(1, m) * max(1, k) ** 2)) + r[:0].sum()
    check_cu_seqlens(cu_groups, r.shape[0], r, name="cu_groups", of="responses")
    i, j, group = all_pairs(cu_groups, r.shape[0])
    share = 2 / cu_groups.diff().to(r.dtype).square()[group]
    return (share * (r[i] - r[j]).abs().sigmoid()).sum() / max(1, cu_groups.shape[0] - 1) + r[:0].sum()


class MetaRM:
    """The inner step as a context manager, for any loop.

        meta = MetaRM(model.parameters(), eta=0.01)
        with meta.ascend(difference_loss(model(shifted).view(m, k))):       # the parameters are θ' inside
            reward_loss("bradley_terry", model(pairs)).loss.backward()
        optimizer.step()                                                    # and θ again: bit for bit

    parameters  the tensors that move, each once: those of the model that have a gradient. Sharded ones (FSDP2's
                DTensors, flat shards, ZeRO-3's partitions) move shard by shard; a copy of each is kept inside
    eta         η > 0
    backward    how the objective is differentiated, for frameworks that want their own (accelerator.backward): it must
                leave gradients in .grad. Default: objective.backward()
    group       for DeepSpeed's ZeRO, which keeps gradients elsewhere: the process group of the ranks that share the
                model. The objective is then differentiated by torch.autograd.grad and the mean over the ranks taken
                here, so that ZeRO sees nothing of it. Every rank holds the whole gradient for that time. Parameters
                that ZeRO-3 has partitioned need it. Make the objective with engine.module: the engine's own hooks
                take any gradient of its output for a training step's
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        eta: float,
        backward: Callable[[Tensor], None] | None = None,
        group: "dist.ProcessGroup | None" = None,
    ):
        if isinstance(parameters, Tensor) or not isinstance(parameters, Iterable):
            fail("parameters", "be an iterable of tensors", f"a {type(parameters).__name__}", TypeError)
        parameters = list(parameters)
        other = next((p for p in parameters if not isinstance(p, Tensor)), None)
        if other is not None:
            fail("parameters", "hold tensors", f"a {type(other).__name__}", TypeError)
        each = {id(p): p for p in parameters if p.requires_grad}  # one that is shared moves once
        self.parameters = list(each.values())  # those that move, each once
        check_number("eta", eta, positive=True)
        if not self.parameters:
            fail("parameters", "hold one that requires a gradient", "none")
        if group is not None:
            check_group(group)
            if backward is not None:
                fail("backward", "be None beside group", "a function")
        if group is None and any(map(_partitioned, self.parameters)):
            fail("group", "be the process group of ZeRO-3's partitions", None)
        self.eta, self.backward, self.group = eta, backward or Tensor.backward, group

    @contextmanager
    def ascend(self, objective: Tensor) -> Iterator[None]:
        """θ' = θ + η ∇objective inside; θ again behind it, also when the body raises.

        objective  (), made from the parameters as they are. Gradients gathered so far (.grad) are put aside for its
                   backward pass and put back. Parameters it does not depend on stay

        What is computed inside must be differentiated inside: behind it autograd refuses, since the parameters changed.
        Raises  ValueError if the objective is no scalar, or if no parameter gets a gradient from it (not looked at
                with group, where one rank's objective may depend on none).
        """
        check_tensor("objective", objective)
        if objective.dim() or not objective.requires_grad:
            got = tuple(objective.shape) if objective.dim() else "one without gradient"
            fail("objective", "be one number with a gradient", got)
        pushes = self._by_backward(objective) if self.group is None else self._by_grad(objective)
        moved = [(p, push) for p, push in zip(self.parameters, pushes, strict=True) if push is not None]
        if not moved:
            expected = "leave a gradient in .grad of some parameter (ZeRO keeps gradients elsewhere: give group)"
            fail("objective", expected, "none")
        pushes.clear()
        with torch.no_grad():
            held = [pair for p, push in moved for pair in self._held(p, push)]
            places, before = [x for x, _ in held], [x.clone() for x, _ in held]
            try:
                for x, push in held:
                    x.add_(push.to(x.dtype), alpha=self.eta)
                moved.clear()
                held.clear()
                del push
                with torch.enable_grad():
                    yield
            finally:
                for x, old in zip(places, before, strict=True):
                    x.copy_(old)

    def _by_backward(self, objective: Tensor) -> list[Tensor | None]:
        """Gradients as the framework's hooks leave them in .grad; what was there before is put back."""
        kept, pushes = [p.grad for p in self.parameters], []
        try:
            for p in self.parameters:
                p.grad = None
            self.backward(objective)
            pushes = [p.grad for p in self.parameters]
        finally:
            for p, grad in zip(self.parameters, kept, strict=True):
                p.grad = grad
        return pushes

    def _by_grad(self, objective: Tensor) -> list[Tensor]:
        """Gradients by no hook at all, their mean over the ranks; 0 where a rank's objective does not depend on one."""
        found = list(torch.autograd.grad(objective, self.parameters, allow_unused=True))
        for i, p in enumerate(self.parameters):
            if found[i] is None:
                found[i] = torch.zeros(getattr(p, "ds_shape", p.shape), dtype=p.dtype, device=objective.device)
            found[i] = found[i].contiguous()
            dist.all_reduce(found[i], group=self.group)
            found[i] /= dist.get_world_size(self.group)
        return found

    def _held(self, p: Tensor, push: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The tensors that hold the values of a parameter on this rank, each with its part of the gradient."""
        if not _partitioned(p):
            return [(p.detach(), push)]
        part = p.ds_tensor.detach().view(-1)
        start = dist.get_rank(self.group) * part.numel()
        own = push.flatten()[start : start + part.numel()]  # the last rank's part is padded
        held = [(part[: own.numel()], own)]
        return held + [(p.data, push)] if p.data.numel() == push.numel() else held  # a small one is kept whole, too


def _partitioned(p: Tensor) -> bool:
    """Whether ZeRO-3 holds the parameter in parts: the values of this rank are in `ds_tensor`, p is empty."""
    return hasattr(p, "ds_tensor")

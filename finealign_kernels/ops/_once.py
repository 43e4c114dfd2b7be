"""Raises a clear error for double backward, forward-mode AD and torch.func transforms, which are not supported."""

import torch
from torch.autograd import forward_ad


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, instead, count, *tensors):
        ctx.name, ctx.instead = name, instead
        return tuple(x.clone() for x in tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(f"{ctx.name}: double backward is not implemented; {ctx.instead} for second derivatives")


def is_transformed(x: torch.Tensor) -> bool:
    """Does x belong to a transform of torch.func, or carry a tangent."""
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active():  # as a rule
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(x):  # what was made inside one is wrapped, too
        return x.is_floating_point() or torch._C._functorch.is_batchedtensor(x)
    return _has_tangent(x)


def refuse_transforms(name: str, x: torch.Tensor) -> None:
    """Raises where a gradient is asked for in another way than backward: an op of ours would give a silent 0. Raises
    under vmap, too, which knows no op of ours."""
    if torch.compiler.is_compiling():
        return
    if _has_tangent(x):
        raise RuntimeError(f"{name}: forward-mode derivatives are not implemented; use backward or torch.autograd.grad")
    if torch._C._functorch.is_batchedtensor(x):
        raise RuntimeError(f"{name}: torch.func's vmap is not implemented; use one batch, or a loop")
    under = x.requires_grad and torch.is_grad_enabled() and torch._C._are_functorch_transforms_active()
    if under or torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise RuntimeError(f"{name}: torch.func's gradients are not implemented; use backward or torch.autograd.grad")


def _has_tangent(x: torch.Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def once(name: str, grads: tuple, sources: tuple, instead: str = "use backend='reference'") -> tuple:
    """Gradients as they are; under create_graph, gradients that raise by name when they are differentiated again."""
    if not torch.is_grad_enabled():
        return grads
    real = [i for i, grad in enumerate(grads) if grad is not None]
    tensors = [grads[i] for i in real]
    out = list(grads)
    refusing = _Refuse.apply(name, instead, len(real), *tensors, *(s for s in sources if s is not None))
    for i, grad in zip(real, refusing, strict=True):
        out[i] = grad
    return tuple(out)

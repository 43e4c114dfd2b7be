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


def refuse_transforms(name: str, x: torch.Tensor) -> None:
    """Raises where a gradient is asked for in another way than backward: an op of ours would give a silent 0."""
    if torch.compiler.is_compiling():
        return
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(f"{name}: forward-mode derivatives are not implemented; use backward or torch.autograd.grad")
    if x.requires_grad and torch.is_grad_enabled() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"{name}: torch.func's gradients are not implemented; use backward or torch.autograd.grad")


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

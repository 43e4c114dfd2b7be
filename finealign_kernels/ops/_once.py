"""Gradients that can be taken once."""

import torch


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, instead, count, *tensors):
        ctx.name, ctx.instead = name, instead
        return tuple(x.clone() for x in tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(f"{ctx.name}: double backward is not implemented; {ctx.instead} for second derivatives")


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

"""Gradients that can be taken once."""

import torch


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, count, *tensors):
        ctx.name = name
        return tuple(x.clone() for x in tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            f"{ctx.name}: double backward is not implemented; use backend='reference' for second derivatives"
        )


def once(name: str, grads: tuple, sources: tuple) -> tuple:
    """Gradients as they are; under create_graph, gradients that raise by name when they are differentiated again."""
    if not torch.is_grad_enabled():
        return grads
    real = [i for i, grad in enumerate(grads) if grad is not None]
    tensors = [grads[i] for i in real]
    out = list(grads)
    for i, grad in zip(
        real, _Refuse.apply(name, len(real), *tensors, *(s for s in sources if s is not None)), strict=True
    ):
        out[i] = grad
    return tuple(out)

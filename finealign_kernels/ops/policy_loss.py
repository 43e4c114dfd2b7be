"""Policy losses of tokens in one launch, with the gradient; losses/policy.py says which.

    L = Σ_t c_t w_t ω_t psi(r_t, A_t) + β Σ_t c'_t κ_t - η Σ_t c''_t H_t,    r_t = logp_t - old_logp_t
    backward: dlogp = upstream · dL/dlogp, which the forward launch has stored

It computes in one launch what the formulas and reductions compute one after the other. All of it is float64, in an
order that depends on the layout of the batch alone; each result is rounded once.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..formulas import surrogate
from . import _native
from ._check import check_plain, check_tensor
from ._layout import Tokens, TokenTensor, whole_like
from ._once import once, refuse_transforms

RATIOS = {"token": 0, "mean": 1, "sum": 2}  # RatioOf in csrc/launch.h
SHARES = {"token": 0, "token_global": 0, "sequence": 1, "sequence_sum": 2, "constant": 2}  # ShareOf
ESTIMATORS = {"k1": 0, "k2": 1, "k3": 2, "k3_k2grad": 3, "k3_is": 4}  # Estimator


class Code(NamedTuple):
    """A function of log-ratio and advantage that the kernels know."""

    number: int  # Psi in csrc/launch.h
    numbers: Callable[..., tuple[float, float]]  # of its hyper-parameters: the two that the kernel takes


CODES: dict[Callable, Code] = {
    surrogate.clipped: Code(0, lambda *, low, high, dual=None: (1 - low, 1 + high)),
    surrogate.capped: Code(1, lambda *, low, high: (low, high)),
    surrogate.score_function: Code(2, lambda: (0.0, 0.0)),
    surrogate.soft_gate: Code(3, lambda *, tau_pos, tau_neg: (tau_pos, tau_neg)),
}


class Reduction(NamedTuple):
    """What tokens are divided by; as losses/reduce.py has it, checked there."""

    name: str
    average: str
    denominator: float | Tensor | None
    max_length: float | Tensor | None
    count_empty: bool


class PolicyTerms(NamedTuple):
    """loss carries the gradient; the others are detached. float32; float64 for float64 tokens."""

    loss: Tensor  # ()
    losses: Tensor  # of each token, as flatten has them
    numbers: Tensor  # (8,) policy, kl, entropy; means of ratio, old_kl and the low, high and dual clip fractions


def missing(psi: Callable, kl: str, device: torch.device) -> str | None:
    """Why policy_loss cannot run a psi and an estimator on a device; None where it can."""
    if psi not in CODES:
        return f"it has no kernel for {getattr(psi, '__name__', psi)!r}"
    if kl not in ESTIMATORS:
        return f"it has no kernel for {kl!r}"
    return _native.missing(device)


def policy_loss(
    tokens: Tokens,
    old_logp: TokenTensor | None,
    advantages: TokenTensor,
    *,
    psi: Callable,
    hyper: dict[str, float | None],
    ratio: str = "token",
    bounds: tuple[float, float] = (0.0, torch.inf),
    reduction: Reduction,
    ref_logp: TokenTensor | None = None,
    kl: str = "k3_is",
    kl_coef: float = 0.0,
    entropy: TokenTensor | None = None,
    entropy_coef: float = 0.0,
    entropy_by_token: bool = True,
    entropy_denominator: float | Tensor | None = None,
    token_weight: TokenTensor | None = None,
    sampler_weight: TokenTensor | None = None,
) -> PolicyTerms:
    """Loss of a batch of tokens, its terms, and what is logged of it.

    tokens         log-probs of flatten(logp, mask, cu_seqlens), nats; differentiable once, any number of times over
    psi, hyper     a function of formulas/surrogate.py that CODES names, and its hyper-parameters
    ratio          psi reads the log-ratio of the "token", or the "mean" or the "sum" of its row's
    bounds         where the ratio is clipped, for the clip fractions
    reduction      of the policy loss and the KL, checked
    kl             an estimator that ESTIMATORS names
    advantages, sampler_weight  in the shapes of the tokens, or one a row, (S,) or (S, 1)
    the others     in the shapes of the tokens; only entropy has a gradient

    Values at masked tokens are ignored.
    Raises  ValueError, TypeError; RuntimeError with the reason where there is no kernel.
    """
    reason = missing(psi, kl, tokens.whole.device)
    if reason:
        raise RuntimeError(f"policy_loss cannot run: {reason}")
    code, (below, above) = CODES[psi], bounds
    given = [None if x is None else whole_like(x, tokens, name) for name, x in _named(old_logp, ref_logp, entropy)]
    entropies = given[2]
    if entropies is not None:
        refuse_transforms("policy_loss", entropies)
    advantage, advantage_by_row = _by_row("advantages", advantages, tokens)
    sampler, sampler_by_row = _by_row("sampler_weight", sampler_weight, tokens)
    weight = None if token_weight is None else whole_like(token_weight, tokens, "token_weight")
    x = tokens.whole
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    dtype = x.dtype if all(y is None or y.dtype == x.dtype for y in given) else wide
    mask, ends, device = tokens.whole_mask, tokens.ends, x.device
    inputs = (
        *(_dense(y, dtype) for y in (x, *given)),
        *(_dense(y, wide) for y in (advantage, weight, sampler)),
        mask if mask is None else mask.contiguous(),
        ends if ends is None else ends.contiguous(),
        advantage_by_row,
        sampler_by_row,
        code.number,
        RATIOS[ratio],
        *code.numbers(**hyper),
        hyper.get("dual") or torch.inf,
        below,
        above,
        ESTIMATORS[kl],
        kl_coef,
        entropy_coef,
        SHARES[reduction.name],
        reduction.average == "kept",
        reduction.count_empty,
        *_number(reduction.denominator, device),
        *_number(reduction.max_length, device),
        entropy_by_token,
        *_number(entropy_denominator, device),
    )
    if torch.is_grad_enabled() and (x.requires_grad or (entropies is not None and entropies.requires_grad)):
        return PolicyTerms(*_FromTokens.apply(x, entropies if entropy_coef else None, inputs))
    loss, numbers, losses, *_ = forward(*inputs)
    return PolicyTerms(loss, losses, numbers)


class _FromTokens(torch.autograd.Function):
    """The loss of a batch. The forward launch stores its gradients; backward multiplies them by the upstream one."""

    @staticmethod
    def forward(ctx, x, entropy, inputs):
        loss, numbers, losses, dlogp, dentropy = forward(*inputs)
        ctx.save_for_backward(x, entropy, dlogp, dentropy)  # x and entropy are not read
        ctx.mark_non_differentiable(losses, numbers)
        ctx.set_materialize_grads(False)
        return loss, losses, numbers

    @staticmethod
    def backward(ctx, upstream, _losses, _numbers):
        if upstream is None:
            return None, None, None
        x, entropy, dlogp, dentropy = ctx.saved_tensors
        up, (of_x, of_entropy, _) = upstream.detach(), ctx.needs_input_grad
        grads = (
            backward(up, dlogp, x.dtype) if of_x else None,
            backward(up, dentropy, entropy.dtype) if of_entropy else None,
        )
        return *once("policy_loss", grads, (x, entropy, upstream), instead="use torch's own arithmetic"), None


def _named(old_logp, ref_logp, entropy):
    return ("old_logp", old_logp), ("ref_logp", ref_logp), ("entropy", entropy)


def _by_row(name: str, x, tokens: Tokens) -> tuple[Tensor | None, bool]:
    """One number a token, in the shape of tokens.whole, or one a row; which of the two."""
    if x is None and name != "advantages":
        return None, False
    check_plain(name, x)
    rows, shape = tokens.segments, tuple(x.shape) if isinstance(x, Tensor) else None
    if shape not in ((rows,), (rows, 1)) or shape == tokens.shapes[0]:
        return whole_like(x, tokens, name), False
    check_tensor(name, x, like=tokens.whole)
    return x, True


def _dense(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As the kernels read it: a constant, contiguous."""
    if x is None:
        return None
    x = x.detach()
    return x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()


def _number(value: float | Tensor | None, device: torch.device) -> tuple[float, Tensor | None]:
    """A number for the kernels, 0 for none; or a tensor that holds it, which is not read here."""
    if isinstance(value, Tensor):
        value = value.detach().to(device=device, dtype=torch.float64)
        return 0.0, torch.where(value == 0, torch.inf, value)  # a whole step of none: shares of 0
    return float(value or 0), None


if _native.available():
    forward = torch.ops.finealign.policy_loss_fwd.default
    backward = torch.ops.finealign.policy_loss_bwd.default

    @_native.fake("policy_loss_fwd")
    def _(logp, old_logp, ref_logp, entropy, *options):
        entropy_coef = options[16]  # the rest is read by no result
        wide = torch.promote_types(logp.dtype, torch.float32)
        losses, dlogp = (torch.empty_like(logp, dtype=wide) for _ in range(2))
        moves_entropy = entropy is not None and entropy_coef != 0
        dentropy = torch.empty_like(dlogp) if moves_entropy else logp.new_empty(0, dtype=wide)
        return logp.new_empty((), dtype=wide), logp.new_empty(8, dtype=wide), losses, dlogp, dentropy

    @_native.fake("policy_loss_bwd")
    def _(upstream, d, dtype):
        return torch.empty_like(d, dtype=dtype)

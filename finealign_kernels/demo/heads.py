"""The loss head from hidden states to gradients, twice: fused, and in eager PyTorch as the reference."""

from typing import NamedTuple

import torch

from ..losses.nll import nll_loss
from ..losses.policy import policy_loss
from ..losses.preference import PREFERENCE, preference_loss, score_loss
from ..ops.logprobs import linear_logprobs
from .options import average_of, beta_of

LIMIT = 1e-4  # relative, float32; the error of eager PyTorch itself on confident tokens reaches 5e-5
LEAST_LOSS = 0.1  # nats
TINY = torch.finfo(torch.float32).tiny
NOISE = 64 * torch.finfo(torch.float32).eps  # rounding of a sum, relative to the size of its terms


class DifferenceError(Exception):
    """The results of the fused head and of eager PyTorch differ by more than LIMIT."""


class Tokens(NamedTuple):
    """The arguments of a loss besides the log-probs. A Batch has the same fields."""

    mask: torch.Tensor  # (S, T) bool
    token_weight: torch.Tensor  # (S, T)
    ref_logp: torch.Tensor | None  # (S, T)


class Head(NamedTuple):
    """The result of a loss head: the loss and its gradients. dweight is None for a frozen head."""

    loss: torch.Tensor
    dhidden: torch.Tensor  # (S, T-1, D)
    dweight: torch.Tensor | None  # (V, D)
    logp: torch.Tensor | None = None  # (S, T-1)
    dlogp: torch.Tensor | None = None  # (S, T-1)
    metrics: object = None  # what the loss returned


def leaves(hidden, weight):
    """Hidden states and weight as leaf tensors, detached from the model, for a head to differentiate."""
    return hidden.detach().requires_grad_(), weight.detach().requires_grad_(weight.requires_grad)


def fused_head(options, hidden, weight, batch):
    """The head of this library: log-probs of the masked-in rows directly from hidden states, then the loss."""
    logp = linear_logprobs(hidden, weight, batch.labels, mask=batch.mask).logp
    output = library_loss(options, logp, batch)
    dhidden, dweight, dlogp = _gradients(output.loss, hidden, weight, logp)
    return Head(output.loss.detach(), dhidden, dweight, logp.detach(), dlogp, output)


def eager_head(options, hidden, weight, batch, *, all_rows=False):
    """The same in plain PyTorch: logits of the masked-in rows (or of all rows), log-softmax, the label's column."""
    rows = torch.ones_like(batch.mask) if all_rows else batch.mask
    logits = hidden[rows] @ weight.T
    picked = logits.log_softmax(-1).gather(-1, batch.labels[rows][:, None])[:, 0]
    loss = plain_loss(options, picked.new_zeros(rows.shape).masked_scatter(rows, picked), batch)
    return Head(loss.detach(), *_gradients(loss, hidden, weight))


def _gradients(loss, hidden, weight, *others):
    """Gradients of the loss, None for a frozen weight."""
    frozen = not weight.requires_grad
    gradients = torch.autograd.grad(loss, [hidden, *others] if frozen else [hidden, weight, *others])
    return (gradients[0], None, *gradients[1:]) if frozen else gradients


def backward(hidden, weight, head):
    """Backpropagates the head's gradients to all parameters. The gradient of a tied head goes to the embedding too."""
    if head.dweight is None:
        hidden.backward(head.dhidden)
    else:
        torch.autograd.backward([hidden, weight], [head.dhidden, head.dweight])


def library_loss(options, logp, tokens):
    """The loss from this library: a PreferenceLoss, an NLLLoss or a PolicyLoss."""
    if options.rl:
        counted = {"mask": tokens.mask, "token_weight": tokens.token_weight, "average": "kept", "kl_coef": 0.0}
        return policy_loss(options.rl, logp, tokens.old_logp, tokens.advantage, **counted)
    counted = {"mask": tokens.mask, "token_weight": tokens.token_weight, "average": average_of(options)}
    if options.loss == "nll":
        return nll_loss(logp, reduction="mean", **counted)
    hyper = HYPER.get(options.loss, {})
    return preference_loss(options.loss, logp, tokens.ref_logp, beta=options.beta, **counted, **hyper)


# DiscoPOP changes within tau nats. Its default of 0.05 magnifies the rounding of log-probs, of either head, up to
# LIMIT.
HYPER = {"discopop": {"tau": 1.0}}


def plain_loss(options, logp, tokens):
    """The mean loss in plain PyTorch. Autograd differentiates the formula; our slopes and kernels are not used.

    A loss that matches pairs by rank across the batch is computed by the library instead.
    """
    if options.rl:
        return _plain_policy_loss(options, logp, tokens)
    row = None if options.loss == "nll" else PREFERENCE[options.loss]
    if row is not None and row.match:
        return library_loss(options, logp, tokens).loss
    weight = torch.where(tokens.mask, tokens.token_weight, 0.0)
    total = (weight * torch.where(tokens.mask, logp, 0.0)).sum(-1)
    score = total
    if tokens.ref_logp is not None:
        score = total - (weight * torch.where(tokens.mask, tokens.ref_logp, 0.0)).sum(-1)
    average = average_of(options)
    length = (tokens.mask if average == "all" else weight).sum(-1)
    policy = _ratio(total, length) if average else total
    score = _ratio(score, length) if average else score
    if row is None:
        return -score.mean()
    numbers = {"beta": beta_of(options), "shift": row.shift, **HYPER.get(options.loss, {})}
    loss = score_loss(options.loss, score, policy=policy, **numbers)[0].mean()
    total, length = total.chunk(2)[0], length.chunk(2)[0]  # of the chosen answers
    if row.nll == "token":
        return loss - _ratio(total.sum(), length.sum())
    return loss - _ratio(total, length).mean() if row.nll == "sequence" else loss


def _plain_policy_loss(options, logp, tokens):
    """The clipped surrogate of arXiv:1707.06347 eq. 7: the mean over tokens, or for GRPO over the means of answers."""
    weight = torch.where(tokens.mask, tokens.token_weight, 0.0)
    ratio = torch.where(tokens.mask, logp - tokens.old_logp, 0.0).exp()
    gain = torch.minimum(ratio * tokens.advantage, ratio.clamp(0.8, 1.2) * tokens.advantage)
    total, length = (weight * gain).sum(-1), weight.sum(-1)
    return -_ratio(total, length).mean() if options.rl == "grpo" else -_ratio(total.sum(), length.sum())


def _ratio(total, length):
    """total / length, and 0 where the length is 0."""
    return total / torch.where(length == 0, 1, length)


class Sizes(NamedTuple):
    """Norms of the terms that add up to the gradients. If the terms cancel, the rounding error has this scale."""

    dhidden: float
    dweight: float


def sizes(dlogp, hidden, weight):
    """Sizes of dhidden_n = Σ_v dz_nv w_v and of dweight_v = Σ_n dz_nv h_n, with dz_nv = dlogp_n (1[v = label] - p_v).

    They are ‖dlogp‖ times the root mean square norm of a row of weight, and (Σ_n dlogp_n² ‖h_n‖²)^½. The factor
    1 - p is taken as 1, because its rounding error does not shrink when 1 and p cancel.
    """
    row = weight.detach().norm() / len(weight) ** 0.5
    return Sizes((dlogp.norm() * row).item(), (dlogp[..., None] * hidden.detach()).norm().item())


def differences(fused, eager, of):
    """Relative difference of the loss and of each gradient: norm of the difference divided by the eager norm.

    of: the Sizes of the terms of the gradients. If the terms cancel, as for two equal answers, the eager norm is almost
    0 and only rounding remains. The divisor is therefore never smaller than the size at which LIMIT is above this
    rounding. A loss with negative items (unlikelihood) may pass through 0, so its divisor is at least LEAST_LOSS.
    """
    items = getattr(fused.metrics, "losses", fused.loss)
    found = {
        "loss": _relative(fused.loss, eager.loss, LEAST_LOSS if (items < 0).any() else 0.0),
        "hidden gradient": _relative(fused.dhidden, eager.dhidden, of.dhidden * NOISE / LIMIT),
    }
    if fused.dweight is not None:
        found["head gradient"] = _relative(fused.dweight, eager.dweight, of.dweight * NOISE / LIMIT)
    return found


def _relative(value, expected, least=0.0):
    error, scale = (value - expected).norm().item(), expected.norm().item()
    return 0.0 if error == 0 else error / max(scale, least, TINY)


def refuse_difference(step, differences):
    """Raises DifferenceError naming the step and the first figure above LIMIT."""
    for name, difference in differences.items():
        if not difference <= LIMIT:  # also refuses NaN
            raise DifferenceError(
                f"step {step}: the {name} of the fused head differs from eager PyTorch's by {difference:.2g} relative, "
                f"the limit is {LIMIT:g}"
            )

"""Who computes each op: plain torch, the libraries that offer it, bare matrix products as the floor, and ours.

A rival is a function of a sample (cases.py) that runs the op forward and backward and returns its answers by name.
Where it cannot run, its row of the table says why.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F

import finealign_kernels as fk
from finealign_kernels.formulas import margin
from finealign_kernels.ops import _choose
from finealign_kernels.ops._layout import flatten
from finealign_kernels.ops.sequence_loss import missing, sequence_loss


@dataclass(frozen=True)
class Rival:
    name: str
    call: Callable  # sample -> {name: tensor}
    needs: Callable[[torch.dtype, torch.device], str | None] = lambda dtype, device: None  # why it is unavailable
    floor: bool = False  # only the matrix products, or the bytes moved: no answer to check
    tolerance: float = 0  # where it is built to be less exact than cases.TOLERANCE asks
    cases: tuple[str, ...] | None = None  # those that it computes; None: all of its suite


def package(name: str, at_least: str) -> Callable[[torch.dtype, torch.device], str | None]:
    """A need: the package is installed, from this version on."""

    def why_unavailable(dtype, device):
        try:
            found = version(name)
        except PackageNotFoundError:
            return f"{name} is not installed"
        old = [int(part) for part in found.split(".")[:2]] < [int(part) for part in at_least.split(".")[:2]]
        return f"needs {name} >= {at_least}, found {found}" if old else None

    return why_unavailable


def both(*needs: Callable) -> Callable[[torch.dtype, torch.device], str | None]:
    """Every need; the first that is not met tells why."""
    return lambda dtype, device: next(filter(None, (need(dtype, device) for need in needs)), None)


def a_gpu(dtype, device):
    return None if device.type == "cuda" else f"runs on a GPU only, not on {device.type}"


# linear_logprobs. A label of IGNORED marks a row that nobody has to read.

IGNORED = -100
BLOCK = 2**28  # logits that head_truth makes at a time: 2 GiB in float64


def head_eager(x):
    """Logits in the dtype of the inputs, then a float32 log_softmax and gather (float64 for float64)."""
    return x.answers(_head_logp(x.hidden, x.weight, x.labels))


def _head_logp(hidden, weight, labels):
    return _label_logp(hidden @ weight.T, labels)


def _label_logp(logits, labels):
    wide = torch.promote_types(logits.dtype, torch.float32)
    logp = logits.to(wide).log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    return logp.where(labels != IGNORED, 0)


def head_truth(x):
    """Eager, BLOCK logits at a time."""
    rows = max(1, BLOCK // len(x.weight))
    total, parts = torch.zeros_like(x.weight), []
    for start in range(0, len(x.hidden), rows):
        some = slice(start, start + rows)
        part = x.replace(hidden=x.hidden.detach()[some].requires_grad_(), labels=x.labels[some])
        parts.append(head_eager(part.replace(upstream=x.upstream[some])))
        total += parts[-1].pop("dweight", 0)
    answers = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return answers | ({"dweight": total} if x.weight.requires_grad else {})


def head_compiled(x):
    """Eager under torch.compile; its first call, which compiles, is the one that is checked."""
    return x.answers(_compiled(_head_logp)(x.hidden, x.weight, x.labels))


@cache
def _compiled(function):
    return torch.compile(function)  # for its first shape, then for any


def head_torch(x):
    """The chunked path; options=None would be eager again. On a CPU in chunks of 512 rows: left alone it takes 16 (at
    the default shape) and half as long again or more."""
    chunks = {"batch_chunk_size": 512, "chunking_method": None} if x.hidden.device.type == "cpu" else {}
    options = torch.nn.LinearCrossEntropyOptions(**chunks)
    return x.answers(-F.linear_cross_entropy(x.hidden, x.weight, x.labels, reduction="none", options=options))


def _has_linear_cross_entropy(dtype, device):
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch {torch.__version__} has no chunked linear_cross_entropy"


@cache
def _trl_without_datasets() -> None:
    """Where `datasets` is missing, a stub of trl.trainer.utils, which imports it.

    TRL's backward takes one function from that module. It gathers a weight that ZeRO-3 has split; here none is.
    """
    if importlib.util.find_spec("datasets") is None:
        stub = ModuleType("trl.trainer.utils")
        stub.maybe_gather_lm_head_ctx = lambda *args, **kwargs: nullcontext()
        sys.modules[stub.__name__] = stub


def trl_logprobs(hidden, weight, labels, outputs=()):
    """TRL's head as its trainers call it: no bias, temperature 1, vocabulary chunks of 32768."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    _trl_without_datasets()
    return ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32768, None, 1.0, outputs)


def head_trl(x):
    """Without further outputs."""

    def logp(hidden, labels):
        return trl_logprobs(hidden, x.weight, labels)[0]

    if x.hidden.device.type == "cpu":  # its trainers score every row there
        return x.answers(logp(x.hidden, x.labels.clamp(min=0)).where(x.labels != IGNORED, 0))
    read = x.labels != IGNORED
    found = logp(x.hidden[read], x.labels[read])
    return x.answers(found.new_zeros(len(read)).masked_scatter(read, found))


def head_liger(x):
    """With one loss a token, as any loss of tokens or sequences needs: Liger then recomputes the logits in backward."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as fused

    return x.answers(-fused.apply(x.hidden, x.weight, x.labels, None, None, IGNORED, 0.0, 0.0, "none")[0])


def head_cce(filter_eps: str | None) -> Callable:
    def call(x):
        from cut_cross_entropy import linear_cross_entropy

        loss = linear_cross_entropy(x.hidden, x.weight, x.labels, reduction="none", filter_eps=filter_eps)
        return x.answers(-loss)

    return call


def _sixteen_bits(dtype, device):
    return None if dtype.itemsize == 2 else f"made for 16-bit inputs, not for {dtype}"


def head_gemms(recompute: bool) -> Callable:
    """Only the products: logits, logits once more (recompute), dX and dW, for the rows and the inputs that need them.

    Plain torch.mm, each allocating its result, with the (N, V) logits whole. bfloat16 on a CPU: the products are
    float32 (of copies made beforehand), because logits must not be rounded and torch has no bfloat16 -> float32
    product there. bfloat16 on a GPU: logits are rounded to bfloat16, the least that a library can be asked for.
    """

    def call(x):
        hidden, weight, active = x.floor.hidden, x.floor.weight, x.floor.active
        logits = torch.mm(hidden, weight.T)[: len(active)]
        if recompute:
            del logits
            logits = torch.mm(active, weight.T)
        torch.mm(logits, weight)
        if x.weight.requires_grad:
            torch.mm(logits.T, active)
        return {}

    return call


def head_ours(workspace, **how) -> Callable:
    return lambda x: x.answers(fk.linear_logprobs(x.hidden, x.weight, x.labels, workspace=workspace, **how).logp)


def _has_fused_head(dtype, device):
    return _choose.fused_reason(dtype, _choose.arch(torch.empty(0, device=device)), _choose.backends())


HEAD = (
    Rival("eager", head_eager),
    Rival("torch", head_torch, _has_linear_cross_entropy),
    Rival("trl", head_trl, package("trl", "1.16")),
    Rival("compiled", head_compiled, a_gpu),
    Rival("liger", head_liger, both(a_gpu, package("liger-kernel", "0.8"))),
    Rival("cce-exact", head_cce(None), both(a_gpu, _sixteen_bits, package("cut-cross-entropy", "25.1"))),
    # drops what a gradient's softmax holds below 2^-12: how far that is from exact is in its row
    Rival("cce", head_cce("high"), both(a_gpu, _sixteen_bits, package("cut-cross-entropy", "25.1")), tolerance=0.3),
    Rival("gemm3", head_gemms(recompute=False), floor=True),
    Rival("gemm4", head_gemms(recompute=True), floor=True),
    Rival("ours", head_ours("full")),
    Rival("ours-default", head_ours("auto")),
    Rival("ours-no-workspace", head_ours(0)),
    # what may become ours: the layer, and where its rows are counted, that GPUs find faster
    Rival("chunked-device", head_ours("full", compact="device"), a_gpu),
    Rival("fused", head_ours("full", backend=_choose.FUSED), both(a_gpu, _has_fused_head)),
    Rival("fused-device", head_ours("full", backend=_choose.FUSED, compact="device"), both(a_gpu, _has_fused_head)),
    Rival("fused-no-workspace", head_ours(0, backend=_choose.FUSED), both(a_gpu, _has_fused_head)),
)


# loss: from hidden states to one preference loss, whose sequences have no reference here: Liger takes its hidden states
# and its head, not its log-probs


def _dpo(logp):
    chosen, rejected = logp.sum(1).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def loss_eager(x):
    return x.answers(_dpo(_head_logp(x.hidden.flatten(0, 1), x.weight, x.labels.flatten()).view_as(x.labels)))


def loss_liger(compiled: bool) -> Callable:
    """One response at a time, its default."""

    def call(x):
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        fused = LigerFusedLinearDPOLoss(compiled=compiled, use_ref_model=False)
        loss, *_ = fused(x.weight, x.hidden, x.labels)
        return x.answers(loss)

    return call


def loss_ours(x):
    logp = fk.linear_logprobs(x.hidden, x.weight, x.labels).logp
    return x.answers(fk.dpo(logp, x.hidden.new_zeros(len(logp), dtype=logp.dtype), mask=x.labels != IGNORED).loss)


LOSS = (
    Rival("eager", loss_eager),
    Rival("liger", loss_liger(compiled=False), package("liger-kernel", "0.8")),
    Rival("liger-compiled", loss_liger(compiled=True), both(a_gpu, package("liger-kernel", "0.8"))),
    Rival("ours", loss_ours),
)


# token_logprobs


def logits_trl(x):
    """On a GPU its Triton kernel, which writes the entropy too; elsewhere its torch function."""
    if x.logits.device.type == "cuda":
        from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

        return x.answers(selective_log_softmax_and_entropy(x.logits, x.labels)[0])
    from trl.trainer.utils import selective_log_softmax

    return x.answers(selective_log_softmax(x.logits, x.labels))


def logits_eager(x):
    return x.answers(_label_logp(x.logits, x.labels))


def logits_compiled(x):
    return x.answers(_compiled(_label_logp)(x.logits, x.labels))


def logits_copy(x):
    """As many bytes as the op must move: the logits are read forward, read and written backward."""
    half = len(x.logits) // 2 * x.logits.shape[1]
    flat = x.logits.detach().flatten()
    flat.clone()
    flat[:half].clone()
    return {}


LOGITS = (
    Rival("eager", logits_eager),
    Rival("trl", logits_trl, package("trl", "1.16")),
    Rival("compiled", logits_compiled, a_gpu),
    Rival("copy", logits_copy, floor=True),
    Rival("ours", lambda x: x.answers(fk.token_logprobs(x.logits, x.labels).logp)),
)


# token_logprobs with the entropy, forward alone, as policies are logged and scored


def scores_eager(x):
    logp = x.logits.to(torch.promote_types(x.logits.dtype, torch.float32)).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return {"logp": logp.gather(-1, x.labels[:, None])[:, 0], "entropy": entropy}


def scores_trl(x):
    """As logits_trl."""
    if x.logits.device.type == "cuda":
        from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

        return dict(zip(("logp", "entropy"), selective_log_softmax_and_entropy(x.logits, x.labels), strict=True))
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    return {"logp": selective_log_softmax(x.logits, x.labels), "entropy": entropy_from_logits(x.logits)}


def scores_copy(x):
    """As many bytes as the op must move: half of the logits are read and written."""
    x.logits[: len(x.logits) // 2].clone()
    return {}


def scores_ours(x):
    found = fk.token_logprobs(x.logits, x.labels, outputs=("entropy",))
    return {"logp": found.logp, "entropy": found.entropy}


SCORES = (
    Rival("eager", scores_eager),
    Rival("trl", scores_trl, package("trl", "1.16")),
    Rival("copy", scores_copy, floor=True),
    Rival("ours", scores_ours),
)


# segments: the torch baselines are given the segment of each token, which ours reads from cu_seqlens


def segments_eager(x):
    if x.case == "broadcast":
        return x.answers(x.values[x.segment])
    total = x.values.new_zeros(len(x.lengths)).index_add(0, x.segment, x.values)
    return x.answers(total / x.lengths if x.case == "mean" else total)


def segments_torch(x):
    """The library's own segment_reduce; the broadcast is repeat_interleave."""
    if x.case == "broadcast":
        return x.answers(torch.repeat_interleave(x.values, x.lengths, output_size=len(x.segment)))
    return x.answers(torch.segment_reduce(x.values, x.case, lengths=x.lengths))


def segments_ours(x):
    op = {"sum": fk.segment_sum, "mean": fk.segment_mean, "broadcast": fk.segment_broadcast}[x.case]
    return x.answers(op(x.values, x.cu_seqlens))


SEGMENTS = (Rival("eager", segments_eager), Rival("torch", segments_torch), Rival("ours", segments_ours))


# sequence_loss: -log σ(beta (h_chosen - h_rejected)) of padded pairs (S, T); nobody loops over sequences. In case "dpo"
# its mean, with rewards, margins and accuracies: ours is the public call.


def _pair_losses(score):
    chosen, rejected = score.chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected))


def sequence_eager(x):
    """Selected by the mask, summed, divided by its lengths where the case averages."""
    score = torch.where(x.mask, x.logp - x.ref_logp, 0).sum(1)
    return x.answers(_pair_losses(score / x.mask.sum(1).clamp(min=1) if x.case == "mean" else score))


def sequence_truth(x):
    return sequence_trl(x) if x.case == "dpo" else sequence_eager(x)


def sequence_product(x):
    """The fewest torch ops: an inner product with weights made beforehand. A NaN at a masked place would spread."""
    return x.answers(_pair_losses(torch.linalg.vecdot(x.logp - x.ref_logp, x.weight)))


def sequence_trl(x):
    """TRL's arithmetic, and what it logs."""
    scores = (of.sum(1).chunk(2) for of in (x.logp, x.ref_logp))
    chosen, rejected = (of - ref for of, ref in zip(*scores, strict=True))
    loss = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
    rewards = 0.1 * chosen.detach(), 0.1 * rejected.detach()
    _ = (rewards[0] > rewards[1]).float(), rewards[0] - rewards[1]
    return x.answers(loss)


def sequence_ours(x):
    if x.case == "dpo":
        return x.answers(fk.dpo(x.logp, x.ref_logp).loss)
    average = "kept" if x.case == "mean" else False
    return x.answers(sequence_loss(flatten(x.logp, x.mask), x.ref_logp, beta=0.1, average=average).losses)


def _has_sequence_kernel(dtype, device):
    return missing(margin.logistic, device)


SEQUENCE = (
    Rival("eager", sequence_eager, cases=("sum", "mean")),
    Rival("product", sequence_product, cases=("sum", "mean")),
    Rival("trl", sequence_trl, cases=("dpo",)),
    Rival("ours", sequence_ours, _has_sequence_kernel),
)


# policy_loss: a clipped loss with a weighted KL of padded responses (S, T); nobody loops over sequences


def policy_eager(x):
    """As TRL writes it, but selected by the mask; nothing is logged."""
    log_ratio = torch.where(x.mask, x.logp - x.old_logp, 0)
    to_reference = torch.where(x.mask, x.logp - x.ref_logp, 0)
    ratio, advantage = log_ratio.exp(), x.advantages[:, None]
    each = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    each = torch.where(x.mask, each + 0.04 * ratio * (torch.expm1(-to_reference) + to_reference), 0)
    if x.case == "token":
        return x.answers(each.sum() / x.mask.sum().clamp(min=1))
    return x.answers((each.sum(1) / x.mask.sum(1).clamp(min=1)).mean())


def policy_product(x):
    """The fewest torch ops: an inner product with shares made beforehand. A NaN at a masked place would spread."""
    ratio, to_reference = (x.logp - x.old_logp).exp(), x.logp - x.ref_logp
    held = torch.minimum(ratio * x.advantages[:, None], ratio.clamp(0.8, 1.2) * x.advantages[:, None])
    each = 0.04 * ratio * (torch.expm1(-to_reference) + to_reference) - held
    return x.answers(torch.linalg.vecdot(each.view(-1), x.weight.view(-1)))


def policy_ours(x):
    options = dict(mask=x.mask, ref_logp=x.ref_logp, reduction=x.case)
    return x.answers(fk.policy_loss("grpo", x.logp, x.old_logp, x.advantages, **options).loss)


POLICY = (Rival("eager", policy_eager), Rival("product", policy_product), Rival("ours", policy_ours))


# reward_loss: Bradley-Terry with a margin a pair; ours gives margins and accuracies besides


def reward_eager(x):
    margin = x.margin if x.case == "margin" else 0
    return x.answers(-F.logsigmoid(x.chosen - x.rejected - margin).mean())


def reward_ours(x):
    name, options = ("adaptive_margin", {"strength": x.margin}) if x.case == "margin" else ("bradley_terry", {})
    return x.answers(fk.reward_loss(name, (x.chosen, x.rejected), **options).loss)


REWARD = (Rival("eager", reward_eager), Rival("ours", reward_ours))


# contrastive_loss, SimCSE


def contrast_eager(x):
    first, second = (F.normalize(one, dim=1) for one in (x.first, x.second))
    labels = torch.arange(len(first), device=first.device)
    return x.answers(F.cross_entropy(first @ second.T / 0.05, labels))


def contrast_ours(x):
    return x.answers(fk.contrastive_loss("simcse", x.first, x.second).loss)


CONTRAST = (Rival("eager", contrast_eager), Rival("ours", contrast_ours))


# GAE and all of `advantages`, γ = .99, λ = .95; answers count at the tokens of the mask, where the rivals agree


GAMMA, LAM, KL_COEF = 0.99, 0.95, 0.05


def _answers(x, advantages, returns):
    if x.mask is not None:
        advantages, returns = (torch.where(x.mask, y, 0) for y in (advantages, returns))
    return {"advantages": advantages, "returns": returns}


def rl_truth(x):
    """float64: the torch reference; over a million packed tokens the native op, which its tests hold to that."""
    return rl_ours(x, "auto" if x.case == "packed" and x.rewards.numel() > 10**6 else "reference")


def rl_ours(x, backend="auto"):
    options = {"mask": x.mask, "gamma": GAMMA, "lam": LAM, "backend": backend}
    if x.case == "advantages":
        s = x.segment
        models = fk.SegmentRewards(s.reward.to(x.values.dtype), s.end, s.cu_segments)
        log_probs = {"old_logp": x.old_logp, "ref_logp": x.ref_logp, "kl_coef": KL_COEF}
        found = fk.advantages(models, x.values, whiten_rewards=True, **log_probs, **options)
    else:
        found = fk.gae(x.rewards, x.values, cu_seqlens=x.cu_seqlens, **options)
    return {"advantages": found.advantages, "returns": found.returns}


def rl_composed(x):
    """The small ops one after another; the rewards stand at their tokens already."""
    rewards = x.rewards - KL_COEF * fk.kl_penalty(x.old_logp, x.ref_logp, mask=x.mask)
    rewards = fk.whiten(rewards, mask=x.mask, shift_mean=False)
    found = fk.gae(rewards, x.values, mask=x.mask, gamma=GAMMA, lam=LAM)
    return {"advantages": fk.whiten(found.advantages, mask=x.mask), "returns": found.returns}


def rl_loop(x):
    """A dozen torch ops for every place of the longest response, as trainers have it; masked tokens carry (verl)."""
    ahead, advantage, out = 0, 0, []
    for t in reversed(range(x.rewards.shape[1])):
        valid = x.mask[:, t]
        delta = x.rewards[:, t] + GAMMA * ahead - x.values[:, t]
        advantage = torch.where(valid, delta + GAMMA * LAM * advantage, advantage)
        ahead = torch.where(valid, x.values[:, t], ahead)
        out.append(advantage)
    advantages = torch.stack(out[::-1], 1)
    return _answers(x, advantages, advantages + x.values)


def rl_verl(x):
    """Its advantages come whitened; its returns are not."""
    core, mask = oracle("verl_core"), x.mask.to(x.values.dtype)
    _, returns = core.compute_gae_advantage_return(x.rewards, x.values, mask, GAMMA, LAM)
    return _answers(x, returns - x.values, returns)


def rl_openrlhf(x):
    return _answers(x, *oracle("openrlhf_gae")(x.values, x.rewards, x.mask, GAMMA, LAM))


def rl_torch(x):
    """No loop over time, and no holes: log2(T) doublings of a padded batch; whitened by masked sums."""
    rewards, values, mask = x.rewards, torch.where(x.mask, x.values, 0), x.mask
    if x.case == "advantages":
        rewards = rewards - KL_COEF * torch.where(mask, x.old_logp - x.ref_logp, 0)
        rewards = _masked_whiten(rewards, mask, keep_mean=True)
    advantages = torch.where(mask, rewards + GAMMA * F.pad(values[:, 1:], (0, 1)) - values, 0)
    step, decay = 1, GAMMA * LAM
    while step < rewards.shape[1]:
        advantages = advantages + decay**step * F.pad(advantages[:, step:], (0, step))
        step *= 2
    returns = advantages + values
    return _answers(x, _masked_whiten(advantages, mask) if x.case == "advantages" else advantages, returns)


def _masked_whiten(x, mask, keep_mean=False):
    count = mask.sum()
    mean = torch.where(mask, x, 0).sum() / count
    away = torch.where(mask, x - mean, 0)
    away = away * (away.square().sum() / count + 1e-8).rsqrt()
    return torch.where(mask, away + mean, 0) if keep_mean else away


def rl_copy(x):
    """As many bytes as have to be read and written, into new tensors as any answer is: all held until the last is made,
    because one freed before would lend the next its warm memory."""
    vectors = (x.old_logp, x.ref_logp, x.values, x.rewards) if x.case == "advantages" else (x.rewards, x.values)
    copies = [vector.clone() for vector in (vectors if x.mask is None else (*vectors, x.mask))]
    del copies
    return {}


@cache
def oracle(name: str):
    """A trainer's own code, loaded without what its package pulls in."""
    spec = importlib.util.spec_from_file_location("oracles", Path(__file__).parents[1] / "tests" / "oracles.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)()


def loads(name: str) -> Callable[[torch.dtype, torch.device], str | None]:
    """A need: that code is there."""

    def why_unavailable(dtype, device):
        try:
            oracle(name)
        except ImportError as error:
            return str(error)

    return why_unavailable


RL = (
    Rival("loop", rl_loop, cases=("gae",)),
    Rival("verl", rl_verl, loads("verl_core"), cases=("gae",)),
    Rival("openrlhf", rl_openrlhf, loads("openrlhf_gae"), cases=("gae",)),
    Rival("torch", rl_torch, cases=("gae", "gae-large", "advantages")),
    Rival("copy", rl_copy, floor=True),
    Rival("ours-composed", rl_composed, cases=("advantages",)),
    Rival("ours", rl_ours),
)

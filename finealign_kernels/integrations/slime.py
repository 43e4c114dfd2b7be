"""slime 0.3: policy losses, advantages, rewards of segments and sampler weights of this library, by slime's own paths.

    --loss-type custom_loss
    --custom-loss-function-path       finealign_kernels.integrations.slime.policy_loss
    --custom-advantage-function-path  finealign_kernels.integrations.slime.advantages
    --custom-reward-post-process-path finealign_kernels.integrations.slime.rewards
    --custom-tis-function-path        finealign_kernels.integrations.slime.tis       (with --use-tis)

Each path works without the others. The loss follows --advantage-estimator; the file of --custom-config-path chooses
another, and its numbers:

    finealign_loss: sapo
    finealign_options: {tau_pos: 1.0, tau_neg: 1.05}

    slime's --advantage-estimator    here
    grpo, ppo, reinforce_plus_plus*  "ppo": low = eps_clip, high = eps_clip_high, dual = eps_clip_c, which is off
    gspo                             "gspo_token". The same where a response has one advantage; where its tokens have
                                     their own, slime gives each token the mean of the response's
    cispo                            "cispo" with bounds 1 - eps_clip and 1 + eps_clip_high
    --kl-loss-type k1, k2, k3        slime's own functions are called, as for the entropy and the log-probs

slime casts masks to integers and hands over no token weights: a weight w >= 0 goes into the advantages (`rewards` and
`advantages` do it), which is exact for every loss here, all homogeneous in the advantage.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from ..formulas.rewards import SegmentRewards
from ..losses.policy import policy_loss as _policy_loss
from ..losses.sampler import sampler_weights
from ..ops._check import check_integer, check_number, check_one_of, fail
from ..rl.gae import discounted_returns, gae
from ..rl.groups import group_advantages, turn_advantages
from ..rl.rewards import token_rewards
from ._token_losses import LOSSES
from ._versions import check_version

VERSIONS = ("0.3",)  # of slime, that this adapter was written for and tested with
LOSS = "slime.backends.megatron_utils.loss"
GROUPED = ("grpo", "gspo", "cispo")  # estimators whose rewards are advantages already
BASELINED = (*GROUPED, "reinforce_plus_plus_baseline")  # less those of the group, at every token of a response
ESTIMATORS = (*BASELINED, "ppo", "reinforce_plus_plus")


@cache
def _slime():
    check_version("slime", VERSIONS)
    return importlib.import_module(LOSS)


def policy_loss(args, batch: dict, logits: Tensor, sum_of_sample_mean: Callable) -> tuple[Tensor, dict]:
    """The policy loss of a micro-batch, with slime's own log-probs, entropy, KL and reducer; (loss, metrics).

    The reducer is linear, R(x) = Σ_t c_t x_t, so its c_t are the token weights of `policy_loss`, which then sums. With
    context parallelism each rank has its own tokens and every loss but gspo_token, whose ratio is a row's, runs.
    Metrics are slime's; "pg_clipfrac" is a mean over the tokens of the micro-batch.

    Raises  ValueError for a loss or an option not known here; RuntimeError for another version of slime.
    """
    slime = _slime()
    name = getattr(args, "finealign_loss", None)
    if name is None:
        name = {"gspo": "gspo_token", "cispo": "cispo"}.get(args.advantage_estimator, "ppo")
    check_one_of("finealign_loss", name, LOSSES)
    if args.use_opsm:
        fail("use_opsm", "be off: its mask is not part of these losses", args.use_opsm)
    places = {key: batch[key] for key in ("unconcat_tokens", "total_lengths", "response_lengths")}
    _, found = slime.get_log_probs_and_entropy(
        logits, args=args, with_entropy=True, **places, **slime.get_rollout_top_p_logprob_kwargs(args, batch)
    )
    lengths = [len(row) for row in found["log_probs"]]
    if name == "gspo_token" and lengths != list(batch["response_lengths"]):
        fail("context_parallel_size", "be 1 for 'gspo_token', whose ratio is that of a whole response", "more")
    logp, entropy = torch.cat(found["log_probs"]), torch.cat(found["entropy"])
    before = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch.get("log_probs")
    old = torch.cat(before) if before else logp.detach()

    correction, reduce, of_policy, of_correction = _correction(
        slime, args, batch, found["log_probs"], sum_of_sample_mean
    )
    out = _policy_loss(
        name,
        logp,
        old,
        torch.cat(batch["advantages"]),
        mask=_shares(sum_of_sample_mean, logp) != 0,
        cu_seqlens=_cumulated(lengths, logp.device),
        token_weight=_shares(of_policy, logp),
        reduction="token_global",
        denominator=1,
        sampler_weight=correction,
        kl_coef=0.0,
        **_options(name, args),
    )
    entropy_term = reduce(entropy)
    loss = out.loss - args.entropy_coef * entropy_term
    metrics = {
        "pg_loss": out.policy,
        "entropy_loss": entropy_term,
        "pg_clipfrac": (out.clip_fraction_low + out.clip_fraction_high) * reduce(torch.ones_like(logp)),
        "ppo_kl": reduce(old - logp.detach()),
    }
    if args.use_kl_loss:
        ratio = torch.exp(logp - old) if args.use_unbiased_kl else None
        to = torch.cat(batch["ref_log_probs"])
        kl = reduce(slime.compute_approx_kl(logp, to, kl_loss_type=args.kl_loss_type, importance_ratio=ratio))
        loss, metrics["kl_loss"] = loss + args.kl_loss_coef * kl, kl
    if logp.numel() == 0:
        loss = loss + logits[:0].sum()
    if correction is not None:
        metrics["ois"] = sum_of_sample_mean(torch.exp(logp - old))
    return loss, {key: value.detach() for key, value in ({"loss": loss} | metrics).items()} | of_correction


def _correction(slime, args, batch: dict, log_probs: list, reduce: Callable) -> tuple:
    """Sampler weights by slime's path, the reducers after it of the entropy and of the policy loss, and metrics."""
    masks, spans = batch["loss_masks"], (batch["total_lengths"], batch["response_lengths"])
    weight, whole, of_correction = None, reduce, {}
    if args.use_tis or args.get_mismatch_metrics:
        correct = slime.load_function(args.custom_tis_function_path) if args.custom_tis_function_path else tis
        trained = batch.get("log_probs") or [row.detach() for row in log_probs]
        weight, masks, of_correction = correct(  # it is linear in pg_loss: of ones, the weights come back
            args=args,
            pg_loss=torch.ones_like(torch.cat(trained)),
            train_log_probs=trained,
            rollout_log_probs=batch["rollout_log_probs"],
            loss_masks=masks,
            total_lengths=spans[0],
            response_lengths=spans[1],
        )
        reduce = slime.get_sum_of_sample_mean(*spans, masks, batch["rollout_mask_sums"], args.calculate_per_token_loss)
    path = getattr(args, "custom_pg_loss_reducer_function_path", None)
    of_policy = slime.load_function(path)(*spans, masks, args.calculate_per_token_loss) if path else reduce
    return weight, reduce, of_policy, {key: whole(value).detach() for key, value in of_correction.items()}


def _shares(reduce: Callable, like: Tensor) -> Tensor:
    """(N,): the c_t of a linear reducer."""
    with torch.enable_grad():
        probe = torch.ones_like(like, requires_grad=True)
        return torch.autograd.grad(reduce(probe), probe)[0]


def _options(name: str, args) -> dict:
    low, high = args.eps_clip, args.eps_clip if args.eps_clip_high is None else args.eps_clip_high
    options = {
        "ppo": {"low": low, "high": high, "dual": args.eps_clip_c},
        "gspo_token": {"low": low, "high": high, "dual": args.eps_clip_c},
        "cispo": {"low": max(1 - low, 0.0), "high": 1 + high},
    }.get(name, {})
    return options | (getattr(args, "finealign_options", None) or {})


def _cumulated(lengths: Sequence[int], device) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0)


def tis(
    args, *, pg_loss: Tensor, train_log_probs: list, rollout_log_probs: list, loss_masks: list, **_
) -> tuple[Tensor, list, dict]:
    """slime's truncated importance sampling by `sampler_weights`: clamp(π_train / π_rollout, tis_clip_low, tis_clip).

    Returns  (pg_loss times the weights, loss_masks, metrics), as slime's own.
    """
    train, rollout = torch.cat(train_log_probs), torch.cat(rollout_log_probs)
    span = _cumulated([len(train)], train.device)
    weight = sampler_weights(
        train, rollout, cu_seqlens=span, mode="token_truncate", low=args.tis_clip_low, high=args.tis_clip
    )
    raw = (train - rollout).exp().detach()
    metrics = {"tis": raw, "tis_clipfrac": (raw != weight).float(), "tis_abs": (raw - 1).abs()}
    return pg_loss * weight, loss_masks, metrics


def rewards(args, samples: Sequence) -> tuple[list, list]:
    """For --custom-reward-post-process-path: (raw rewards, rewards), those of tokens where a sample has them.

    In `sample.metadata`, all optional, counted in tokens of the response:
        "segment_rewards"  [(token, reward), ...] in order: the last token of each segment, and its reward; tokens as
                           feedback.segment_tokens counts them
        "token_weight"     response_length numbers of at least 0

    Estimators with a baseline of the group (grpo, gspo, cispo, reinforce_plus_plus_baseline) take advantages here: of
    one number a sample by `group_advantages`, as slime's own function makes them (args.rewards_normalization,
    args.grpo_std_normalization), of segments by `turn_advantages` with the other samples of the same group_index.
    Other estimators take rewards.

    A sample with token fields gives a tensor (response_length, 2), its rewards and weights; `advantages` reads it.
    """
    raw = [float(sample.get_reward_value(args)) for sample in samples]
    fields = [sample.metadata or {} for sample in samples]
    cut = ["segment_rewards" in field for field in fields]
    if any(cut) and not all(cut):
        fail("segment_rewards", "be given for every sample, or for none", f"{sum(cut)} of {len(cut)}")
    baselined = args.advantage_estimator in BASELINED
    if any(cut):
        models = [field["segment_rewards"] for field in fields]
        rows = _of_segments(models, samples, _groups(samples) if baselined else None)
    elif baselined and args.rewards_normalization:
        scaled = args.advantage_estimator in GROUPED and args.grpo_std_normalization
        kind = "group_std" if scaled else "group_mean"
        rows = group_advantages(torch.tensor(raw), _groups(samples), kind=kind, eps=1e-6).tolist()
    else:
        rows = list(raw)
    if not any(cut) and not any("token_weight" in field for field in fields):
        return raw, rows
    return raw, [_pair(args, row, field, sample) for row, field, sample in zip(rows, fields, samples, strict=True)]


def _groups(samples: Sequence) -> Tensor:
    keys = [sample.group_index for sample in samples]
    if None in keys:
        fail("group_index", "be set for every sample, whose reward is compared in its group", None)
    return torch.tensor(keys)


def _of_segments(models: list, samples: Sequence, groups: Tensor | None) -> list[Tensor]:
    """(T,) of each sample: rewards at the ends of segments, or the advantage of its segment at each token."""
    for s, row in enumerate(models):
        last = 0
        for token, reward in row:
            check_number(f"segment_rewards[{s}]", reward)
            wanted = f"hold tokens of the response ({samples[s].response_length}), in order"
            if not last <= check_integer(f"segment_rewards[{s}]", token, wanted) < samples[s].response_length:
                fail(f"segment_rewards[{s}]", wanted, token)
            last = token
    counts = _cumulated([len(row) for row in models], "cpu")
    ends = torch.tensor([token for row in models for token, _ in row], dtype=torch.int64)
    numbers = torch.tensor([reward for row in models for _, reward in row], dtype=torch.float32)
    placed = {"placement": "end"}
    if groups is not None:
        numbers, placed = turn_advantages(numbers, counts, groups), {"placement": "all", "on_empty": "drop"}
    lengths = [sample.response_length for sample in samples]
    flat = token_rewards(SegmentRewards(numbers, ends, counts), cu_seqlens=_cumulated(lengths, "cpu"), **placed)
    return list(flat.split(lengths))


def _pair(args, row: float | Tensor, field: dict, sample) -> Tensor:
    """(T, 2): rewards and weights of the tokens of a sample."""
    length = sample.response_length
    weight = torch.tensor(field.get("token_weight", [1.0] * length), dtype=torch.float32)
    if weight.shape != (length,):
        fail("token_weight", f"hold {length} numbers of at least 0", f"shape {tuple(weight.shape)}")
    if not bool((weight >= 0).all()):
        fail("token_weight", f"hold {length} numbers of at least 0", weight[~(weight >= 0)][0].item())
    if not isinstance(row, Tensor):
        everywhere = args.advantage_estimator in BASELINED
        row = torch.full((length,), row) if everywhere else _at_the_end(row, sample.loss_mask, length)
    return torch.stack([row, weight], 1)


def _at_the_end(reward: float, mask, length: int) -> Tensor:
    kept = [t for t in range(length) if mask is None or mask[t]]
    row = torch.zeros(length)
    if kept:
        row[kept[-1]] = reward
    return row


@torch.no_grad()
def advantages(args, rollout_data: dict) -> None:
    """For --custom-advantage-function-path: sets "advantages" and "returns" in rollout_data, lists of (T,) a response.

        ppo                           GAE of r - kl_coef kl with the critic's values, over the tokens of the mask
        reinforce_plus_plus           discounted sums of r - kl_coef kl, as slime's own
        reinforce_plus_plus_baseline  r - kl_coef kl
        grpo, gspo, cispo             r

    r is slime's number of a response, or the (T, 2) of `rewards`; a reward of one number stands at the last token of
    the mask (ppo, reinforce_plus_plus) or at every token. Weights multiply the advantages, not the returns.
    slime's critic trains on returns that it computes by itself from one number a response: token fields of `rewards`
    are for methods without a critic.

    Raises  ValueError with context parallelism, and for weights where slime whitens the advantages afterwards.
    """
    _slime()
    check_one_of("advantage_estimator", args.advantage_estimator, ESTIMATORS)
    kl, masks = rollout_data["kl"], rollout_data["loss_masks"]
    lengths = [len(row) for row in kl]
    if lengths != [len(mask) for mask in masks]:
        fail("context_parallel_size", "be 1: advantages are computed over whole responses", "more")
    device = kl[0].device
    given = [row.to(device) if isinstance(row, Tensor) else row for row in rollout_data["rewards"]]
    dense = [isinstance(row, Tensor) and row.dim() == 2 for row in given]
    everywhere = args.advantage_estimator in BASELINED
    rows = []
    for row, of_tokens, mask in zip(given, dense, masks, strict=True):
        if of_tokens:
            rows.append(row[:, 0])
        elif everywhere:
            rows.append(torch.full((len(mask),), float(row), device=device))
        else:
            last = mask.nonzero()[-1:, 0]
            rows.append(torch.zeros(len(mask), device=device).index_fill_(0, last, float(row)))
    layout = {"mask": torch.cat(masks).bool(), "cu_seqlens": _cumulated(lengths, device)}
    reward = torch.cat(rows).float()
    if args.advantage_estimator not in GROUPED:
        reward = reward - args.kl_coef * torch.cat(kl)
    if args.advantage_estimator == "ppo":
        values = torch.cat([value.flatten() for value in rollout_data["values"]]).float()
        advantage, returns = gae(reward, values, gamma=args.gamma, lam=args.lambd, **layout)
    elif args.advantage_estimator == "reinforce_plus_plus":
        advantage = returns = discounted_returns(reward, gamma=args.gamma, masked="zero", **layout)
    else:
        advantage = returns = reward
    if any(dense):
        if args.normalize_advantages:
            fail("normalize_advantages", "be off with rewards of tokens, whose weights it would whiten", True)
        pairs = zip(given, dense, lengths, strict=True)
        weight = [row[:, 1] if of_tokens else torch.ones(n, device=device) for row, of_tokens, n in pairs]
        advantage = advantage * torch.cat(weight)
        rollout_data["rewards"] = [row.sum().reshape(1) for row in rows]  # slime logs their mean
    rollout_data["advantages"] = list(advantage.split(lengths))
    rollout_data["returns"] = list(returns.split(lengths))

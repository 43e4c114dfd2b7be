"""Advantages of responses, or of their turns, against the other responses to the same prompt: no critic is needed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..formulas import groups as formula
from ..formulas.segments import summed_in
from ..ops import _parallel
from ..ops._check import _describe, check_integer, check_number, check_plain, check_tensor, fail, reads_values
from ..ops._layout import check_cu_seqlens
from ..ops.ranks import rows_of_all

TURN_KINDS = ("return_to_go", "outcome")
BASELINES = ("leave_one_out", "group_mean")


def group_advantages(
    rewards: Tensor, groups: int | Tensor, *, kind: str = "group_std", eps: float = 1e-4, process_group=None
) -> Tensor:
    """A_i of S responses, one number each, from the rewards of the responses to the same prompt.

        "group_mean"     R_i - mean_g                                   Dr. GRPO
        "group_std"      (R_i - mean_g) / (std_g + eps)                 GRPO
        "batch_std"      (R_i - mean_g) / (std of all rewards + eps)
        "leave_one_out"  R_i - mean of the others of the group          RLOO

    Only "leave_one_out" leaves the policy gradient unbiased: its baseline does not depend on the response itself.
    "group_mean" shrinks the gradient by exactly (n - 1) / n and keeps its direction. Dividing by a deviation gives
    prompts another weight, a large one where their rewards agree, and so trains another objective.

    rewards  (S,) float
    groups   how many responses in a row share a prompt, a divisor of S; or (S,) int, equal for the same prompt
    eps      >= 0, added to a deviation; deviations have n - 1
    process_group  ranks over which the responses are spread (torch.distributed.ProcessGroup): S may differ and be 0,
             a prompt's responses may lie on several of them, groups is (S,) int with keys that mean the same on all.
             Rewards and keys are gathered, 16 bytes each, and each rank gets what one rank with all rows computes

    Returns  (S,) float32 (float64 for float64), detached. Exactly 0 in a group of one or of equal rewards. A NaN reward
             leaves the statistics and has advantage 0. An infinite one is refused on a CPU; on a GPU, where values are
             not read, it counts as NaN.
    Raises   ValueError, TypeError naming argument, expectation and finding.
    Source   arXiv:2402.03300 (GRPO), 2503.20783 (Dr. GRPO), 2402.14740 (RLOO).
    """
    _check_one_of("kind", kind, formula.KINDS)
    eps = check_number("eps", eps, least=0)
    wide = _rewards("rewards", rewards, 1)
    wide, keys, own = _everywhere(wide, groups, process_group)
    return formula.group_advantages(wide, keys, kind=kind, eps=eps)[own].to(_result(rewards))


def decoupled_advantages(
    rewards: Tensor | Sequence[Tensor],
    groups: int | Tensor,
    *,
    weights: Sequence[float] | None = None,
    eps: float = 1e-4,
    process_group=None,
) -> Tensor:
    """A_i = (x_i - mean) / (std + eps) over the batch, x = Σ_k w_k group_std(R_k): each reward model is scaled alone.

    So a model whose rewards vary little still counts beside one whose rewards vary much. Not unbiased, as group_std.

    rewards  (K, S), or K tensors (S,): the rewards of K models
    groups, process_group   as in group_advantages
    weights  K numbers w_k, 1 where left out

    Returns  (S,) float32 (float64 for float64), detached. A model's NaN counts 0 for its row; a row without any reward
             that is a number leaves the batch's statistics and has advantage 0. Infinite ones: as group_advantages.
    Raises   ValueError, TypeError.
    Source   GDPO, arXiv:2601.05242.
    """
    eps = check_number("eps", eps, least=0)
    if not isinstance(rewards, Tensor):
        if isinstance(rewards, (tuple, list)) and not rewards:
            fail("rewards", "hold a model", "none")
        if not isinstance(rewards, (tuple, list)):
            fail("rewards", "be (K, S), or a sequence of K tensors (S,)", _describe(rewards), TypeError)
        check_tensor("rewards[0]", rewards[0])
        for k, model in enumerate(rewards):
            check_tensor(f"rewards[{k}]", model, shape=rewards[0].shape, like=rewards[0])
        rewards = torch.stack(list(rewards))
    wide = _rewards("rewards", rewards, 2)
    check_plain("weights", weights)
    if weights is not None and not hasattr(weights, "__len__"):
        fail("weights", "be a sequence of numbers, one a model", _describe(weights), TypeError)
    weights = [1.0] * len(wide) if weights is None else list(weights)
    if len(weights) != len(wide):
        fail("weights", f"hold {len(wide)} numbers, one a model", len(weights))
    weights = [check_number(f"weights[{k}]", weight) for k, weight in enumerate(weights)]
    rows, keys, own = _everywhere(wide.t(), groups, process_group)
    return formula.decoupled_advantages(rows.t(), keys, weights, eps=eps)[own].to(_result(rewards))


def turn_advantages(
    rewards: Tensor,
    cu_turns: Tensor,
    groups: int | Tensor,
    *,
    kind: str = "return_to_go",
    baseline: str = "leave_one_out",
    process_group=None,
) -> Tensor:
    """A_ik of turn (or segment) k of response i, from the turns of the other responses to the same prompt.

        "return_to_go"  G_ik - mean over the others of G_lk,  G_ik = Σ_{j≥k} r_ij, and 0 for a response that had stopped
        "outcome"       G_i0 - mean over the others of G_l0,  the same for all turns of a response

    With baseline="leave_one_out" both are unbiased: a mean over a fixed number of other responses, those that stopped
    counted with 0, does not depend on what this one does. "return_to_go" often has less variance. "group_mean", over
    all of the group, shrinks the gradient by exactly (n - 1) / n. There is no baseline over those responses only that
    reached turn k: how many terms are subtracted would then depend on when the response itself stops, and where later
    turns earn on average it would learn to stop early. No deviation is divided by, for the reason in group_advantages.

    rewards   (M,) float, the turns of response 0 first, in order
    cu_turns  (S + 1,) int32 or int64: the turns of response s are cu_turns[s] to cu_turns[s + 1]
    groups    as in group_advantages: how many responses in a row share a prompt, or (S,) int
    process_group  as in group_advantages: ranks over which the responses are spread, each with all turns of its own

    Returns   (M,) float32 (float64 for float64), detached. Each token of a turn gets its turn's:
              token_rewards(turns._replace(reward=A, weight=1.0), mask=mask, placement="all", on_empty="drop")
              A response with a NaN reward leaves the statistics and has advantage 0; so has a group of one.
              Infinite ones: as group_advantages.
    Raises    ValueError, TypeError naming argument, expectation and finding.
    Source    derived; the biased construction is that of verl-project/verl issue 7244.
    """
    _check_one_of("kind", kind, TURN_KINDS)
    _check_one_of("baseline", baseline, BASELINES)
    wide = _rewards("rewards", rewards, 1)
    check_cu_seqlens(cu_turns, len(wide), wide, name="cu_turns", of="rewards")
    counts, keys, _ = _everywhere(cu_turns.long().diff(), groups, process_group)
    own = slice(None)
    if process_group is not None:
        (wide,), own = rows_of_all(process_group, wide)
        cu_turns = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return formula.turn_advantages(wide, cu_turns, keys, kind=kind, baseline=baseline)[own].to(_result(rewards))


def _rewards(name: str, rewards: Tensor, dims: int) -> Tensor:
    check_tensor(name, rewards)
    if rewards.dim() != dims:
        fail(name, f"have shape {('(S,)', '(K, S)')[dims - 1]}", tuple(rewards.shape))
    wide, infinite = rewards.detach().to(summed_in(rewards)), rewards.detach().isinf()
    if not reads_values(wide):
        return torch.where(infinite, torch.nan, wide)
    if infinite.any():
        at = ", ".join(str(int(i)) for i in infinite.nonzero()[0])
        fail(name, "be finite, or NaN for a response that leaves the statistics", f"{name}[{at}] = {wide[infinite][0]}")
    return wide


def _everywhere(rows: Tensor, groups: int | Tensor, process_group) -> tuple[Tensor, Tensor, slice]:
    """Rows (S, ...) and keys (S,) of all ranks of a group, and which rows are this rank's; without one, its own."""
    if process_group is None:
        return rows, _keys(groups, rows), slice(None)
    _parallel.check_group(process_group, "process_group")
    if not isinstance(groups, Tensor):
        fail("groups", "be (S,) int with process_group: keys that mean the same on all ranks", _describe(groups))
    (rows, keys), own = rows_of_all(process_group, rows, _keys(groups, rows))
    return rows, keys, own


def _result(rewards: Tensor) -> torch.dtype:
    return torch.float64 if rewards.dtype == torch.float64 else torch.float32


def _keys(groups: int | Tensor, rewards: Tensor, rows: int | None = None) -> Tensor:
    """(S,) int64, the same for the rows of a group."""
    rows = len(rewards) if rows is None else rows
    if isinstance(groups, Tensor):
        check_tensor("groups", groups, dtypes=(torch.int32, torch.int64), shape=(rows,), like=rewards)
        return groups.long()
    expected = f"be (S,) int, or a number of responses that divides {rows}"
    count = check_integer("groups", groups, expected, least=1)
    if rows % count:
        fail("groups", expected, count)
    return torch.arange(rows, device=rewards.device) // count


def _check_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        fail(name, f"be one of {known}", repr(value))

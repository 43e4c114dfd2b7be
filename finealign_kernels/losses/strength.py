"""Preference strength: how sure several reward models are of a pair, and what follows for its label."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops._check import check_number, check_plain, check_tensor, fail, reads_values


class Strength(NamedTuple):
    """Of N pairs by M models. float32; float64 for float64 differences. `mean` is reward_loss's strength and margin."""

    mean: Tensor  # (N,) μ: below 0 the models think the label wrong
    std: Tensor  # (N,) σ, of the population: divided by M
    vote: Tensor  # (N,) share of models whose difference is above 0
    soft: Tensor  # (N,) mean σ(d), in (0, 1): reward_loss's label

    def weakest(self, percent: float | None = None) -> Tensor:
        """(N,) bool: the floor(percent N / 100) pairs of lowest mean, ties by index; None: those of mean below 0.

        reward_loss's flip. Source: arXiv:2401.06080, which flips 10 or 20 %.
        """
        check_tensor("mean", self.mean)
        if percent is None:
            return self.mean < 0
        percent = check_number("percent", percent, least=0, most=100)
        chosen = torch.zeros_like(self.mean, dtype=torch.bool)
        count = int(percent * len(self.mean) / 100 + 1e-9)  # 7 % of 100 is 7.000000000000001
        chosen[self.mean.argsort(stable=True)[:count]] = True
        return chosen

    def weight(self, percent: float | None = None) -> Tensor:
        """(N,): 0 for the weakest pairs, 1 for the others: reward_loss's weight, where they are to be left out."""
        return (~self.weakest(percent)).to(self.mean.dtype)


def preference_strength(differences: Tensor | Iterable[Tensor]) -> Strength:
    """Mean, standard deviation, vote share and soft probability of reward differences d = r_chosen - r_rejected.

        μ = (1/M) Σ d_m     σ = sqrt((1/M) Σ (d_m - μ)²)     (1/M) Σ 1[d_m > 0]     (1/M) Σ sigmoid(d_m)

    differences  (M, N) float, or an iterable of M tensors (N,), a generator for one: a model's differences are let go
                 before the next ones are made, so that M N numbers never are in memory. Sums are float64

    Nothing is centred or scaled: a shift of a model's scores cancels in d, their scale does not. M = 1 gives σ = 0.
    Raises  ValueError, TypeError; a value that is not finite is refused on a CPU.
    Source  arXiv:2401.06080 section 2.2 (mean, standard deviation; M = 10); vote and soft are derived.
    """
    check_plain("differences", differences)
    if isinstance(differences, Tensor) and differences.dim() != 2:
        fail("differences", "have shape (M, N)", tuple(differences.shape))
    if not isinstance(differences, (Tensor, Iterable)) or isinstance(differences, str):
        fail("differences", "be (M, N), or tensors (N,)", f"a {type(differences).__name__}", TypeError)
    count, first, dtype = 0, None, torch.float32
    for d in differences:
        name = f"differences[{count}]"
        check_tensor(name, d, shape=None if first is None else first.shape, like=first)
        if d.dim() != 1:
            fail(name, "have shape (N,)", tuple(d.shape))
        if reads_values(d) and not bool(d.isfinite().all()):
            fail(name, "hold finite numbers", d[~d.isfinite()][0].item())
        dtype = torch.promote_types(dtype, d.dtype)
        d = d.detach().double()
        if first is None:
            first, mean, spread, vote, soft = d, *(torch.zeros_like(d) for _ in range(4))
        count += 1
        # Welford's update of μ and σ: sums of squares would lose a small σ beside a large μ, and overflow
        half = d / 2 - mean / 2
        mean = mean + half / count * 2
        spread = torch.hypot(spread * ((count - 1) / count) ** 0.5, half * (2 * (count - 1) ** 0.5 / count))
        vote = vote + (d > 0)
        soft = soft + d.sigmoid()
    if first is None:
        fail("differences", "hold those of at least one model", "none")
    found = mean, spread, vote / count, soft / count
    return Strength(*(x.to(dtype) for x in found))

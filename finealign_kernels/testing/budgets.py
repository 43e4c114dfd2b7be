"""Error budgets that come from data: how far eager PyTorch in the same dtype is from float64."""

import torch
from torch import Tensor


def rms(error: Tensor) -> float:
    return error.double().square().mean().sqrt().item()


def ulp(dtype: torch.dtype, magnitude: float) -> float:
    """Distance of neighbouring numbers of dtype at a magnitude."""
    return torch.finfo(dtype).eps * 2.0 ** int(torch.tensor(max(magnitude, torch.finfo(dtype).tiny)).log2().floor())


def assert_within(
    actual: Tensor,
    exact: Tensor,
    rounded: Tensor,
    *,
    rms_ratio: float,
    max_ratio: float,
    ulps: float,
) -> None:
    """RMS error of actual at most rms_ratio times that of rounded, largest error max_ratio times its largest plus ulps.

    exact is float64; an ulp is of actual's dtype at the largest exact value.
    """
    assert actual.shape == exact.shape == rounded.shape, (actual.shape, exact.shape, rounded.shape)
    assert exact.dtype == torch.float64 and actual.isfinite().all(), "a number is not finite"
    ours, theirs = actual.double() - exact, rounded.double() - exact
    assert rms(ours) <= rms_ratio * rms(theirs), f"rms error {rms(ours):.3e}, eager's is {rms(theirs):.3e}"
    one = ulp(actual.dtype, exact.abs().max().item())
    top, bound = ours.abs().max().item(), max_ratio * theirs.abs().max().item() + ulps * one
    assert top <= bound, f"largest error {top:.3e}, bound {bound:.3e}"


def assert_unbiased(actual: Tensor, exact: Tensor, *, gain: float = 1e-3, sigmas: float = 4.0) -> None:
    """No signed bias: mean error within sigmas standard errors of 0, best-fit gain within `gain` of 1."""
    error = (actual.double() - exact).flatten()
    assert error.mean().abs() <= sigmas * error.std() / error.numel() ** 0.5 + 1e-300, "the mean error is not noise"
    fit = (actual.double() * exact).sum() / exact.square().sum()
    assert (fit - 1).abs() <= gain, f"best-fit gain {fit.item()}"

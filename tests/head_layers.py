"""The ways of the head that a test of one option runs over."""

import torch


def head_layers(vocabulary: int) -> list[tuple[str, torch.dtype, int | str, str]]:
    """(backend, dtype, workspace, compact): each backend, each workspace (none, seven rows, all) and both ways to count
    rows, in a dtype that the backend has. Not their product: options of the head do not look at them together."""
    rows = 7 * vocabulary
    return [
        ("reference", torch.float64, 0, "host"),
        ("torch", torch.float64, rows * 8, "host"),
        ("torch", torch.bfloat16, "full", "device"),
        ("native", torch.float32, 0, "device"),
        ("native", torch.float32, rows * 4, "host"),
        ("native", torch.bfloat16, "full", "host"),
        ("triton", torch.float32, rows * 4, "host"),
    ]

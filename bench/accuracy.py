"""How far from float64: eager PyTorch's error beside ours. python bench/accuracy.py [--json FILE]

The RMS error of log-prob, entropy and gradients on ordinary rows, and the largest relative error of confident tokens
(probability p over a flat tail of V = 131072), where a sum that holds the maximum loses the rest.
"""

import argparse
import json

import torch

import finealign_kernels as fk
from finealign_kernels.testing import budgets, samples


def ordinary(dtype: torch.dtype) -> list[dict]:
    """RMS error over rows of a head (N, D, V) = (256, 64, 32768), workspace full."""
    s = samples.linear(256, 32768, 64, dtype)
    results = {}
    for name in ("exact", "eager", "ours"):
        kind = torch.float64 if name == "exact" else dtype
        hidden, weight = s.hidden.to(kind).requires_grad_(), s.weight.to(kind).requires_grad_()
        if name == "ours":
            out = fk.linear_logprobs(hidden, weight, s.labels, outputs=("entropy",), workspace="full")
            logp, entropy = out.logp, out.entropy
        else:
            logp, _, entropy = samples.eager(hidden, weight, s.labels)
        grads = torch.autograd.grad((logp * s.upstream[0].to(logp.dtype)).sum(), (hidden, weight), retain_graph=True)
        found = (logp.detach(), entropy.detach(), *grads)
        results[name] = dict(zip(("logp", "entropy", "dhidden", "dweight"), found, strict=True))
    rows = []
    for quantity, exact in results["exact"].items():
        eager, ours = (budgets.rms(results[name][quantity].double() - exact) for name in ("eager", "ours"))
        rows.append(_row("ordinary", quantity, dtype, eager, ours))
    return rows


def confident(dtype: torch.dtype, p: float, v: int = 131072) -> list[dict]:
    """Largest relative error of log-prob, entropy and the label's gradient."""
    logits, labels = samples.confident(p, v, dtype)
    results = {}
    for name in ("exact", "eager", "ours"):
        z = logits.to(torch.float64 if name == "exact" else dtype).requires_grad_()
        if name == "eager":
            logp_all = torch.log_softmax(z.float(), -1)
            logp, entropy = logp_all.gather(1, labels[:, None])[:, 0], -(logp_all.exp() * logp_all).sum(-1)
        else:
            backend = "reference" if name == "exact" else "auto"
            out = fk.token_logprobs(z, labels, outputs=("entropy",), backend=backend)
            logp, entropy = out.logp, out.entropy
        (dz,) = torch.autograd.grad(logp.sum(), z)
        label = dz.gather(1, labels[:, None])[:, 0]
        results[name] = {"logp": logp.detach(), "entropy": entropy.detach(), "label gradient": label}
    results["exact"]["label gradient"] = -torch.expm1(results["exact"]["logp"])
    rows = []
    for quantity, exact in results["exact"].items():
        eager, ours = (((results[n][quantity].double() - exact) / exact).abs().max().item() for n in ("eager", "ours"))
        rows.append(_row(f"p = {p}", quantity, dtype, eager, ours))
    return rows


def _row(case, quantity, dtype, eager, ours) -> dict:
    name = str(dtype).removeprefix("torch.")
    return {"suite": "accuracy", "case": case, "quantity": quantity, "dtype": name, "eager": eager, "ours": ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    rows = [row for dtype in (torch.float32, torch.bfloat16, torch.float16) for row in ordinary(dtype)]
    for dtype in (torch.float32, torch.bfloat16):
        rows += [row for p in (0.9, 0.99, 0.999, 0.9999) for row in confident(dtype, p)]
    print(
        f"torch {torch.__version__}\nordinary rows: RMS error; confident tokens, V = 131072: largest relative error\n"
    )
    print(f"{'case':12} {'dtype':9} {'quantity':15} {'eager':>9} {'ours':>9} {'ours / eager':>13}")
    for r in rows:
        ratio = r["ours"] / r["eager"] if r["eager"] else float("nan")
        print(f"{r['case']:12} {r['dtype']:9} {r['quantity']:15} {r['eager']:9.1e} {r['ours']:9.1e} {ratio:13.1e}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()

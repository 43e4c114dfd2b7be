"""The table of preference losses: one row a loss. `preference` and `pointwise` put them together."""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor

from ..formulas import margin
from ..ops._check import LARGEST, check_bool, check_number, check_one_of, fail, nearest, number
from ..ops.sequence_loss import CODES, missing

Formula = Callable[..., tuple[Tensor, Tensor]]


class Hyper(NamedTuple):
    """A number that phi takes beside the margin."""

    default: float
    holds: Callable[[float], bool]
    expected: str  # completes "must ..."


def _one(beta: float) -> float:
    return 1.0


class Row(NamedTuple):
    """One loss: a row of the table, or one of your own, passed in place of a name.

    phi(m, **hyper) gives value and slope = d value / d m, elementwise, in the dtype of m (float32 or float64). Given in
    place of a name, its slope is compared with autograd in float64 once, at a few margins.
    """

    phi: Formula  # margin -> value, slope
    equation: str  # with m = beta Δ - shift, Δ = h_chosen - h_rejected, u = beta h - shift
    source: str
    beta: float = 0.1
    shift: float = 0.0
    average: bool | str = False  # the length average it is defined with
    reference: bool = True  # reads ref_logp
    scale: Callable[[float], float] = _one  # of beta; multiplies phi
    derived: str = "averaged form"  # what is not in the source
    pair: bool = True  # needs pairs; otherwise each response is a sample of its own
    hyper: dict[str, Hyper] = {}  # noqa: RUF012, read only
    transform: Formula | None = None  # what the score becomes before the margin
    nll: str | None = None  # the denominator of its NLL term over chosen responses: "sequence" or "token"
    label: str | None = None  # how a row without a margin of two reads its target s: see `score_loss`
    positive: Formula | str | None = None  # what a response with s = 1 gets in place of phi; "nll": its own -logp
    chosen: Formula | None = None  # of the chosen response's u, added to phi
    match: str | None = None  # re-matched by rank across the batch: pairs' "reference", or the "rejected"
    least_shift: float | None = None  # a shift below it is refused, where it can be seen without a host sync

    def __reduce__(self):
        """A row of the table is pickled and copied by its name, since its lambdas have none."""
        name = next((name for name, row in PREFERENCE.items() if row is self), None)
        return (Row, tuple(self)) if name is None else (_named, (name,))


def _named(name: str) -> Row:
    return PREFERENCE[name]


_square = partial(margin.squared, center=0.0)

PREFERENCE: dict[str, Row] = {
    "dpo": Row(margin.logistic, "-log σ(m)", "arXiv:2305.18290 eq. 7; averaged: arXiv:2406.19188"),
    "ipo": Row(
        margin.squared,
        "(Δ - 1/(2 beta))² = (m - ½)² / beta²",
        "arXiv:2310.12036 eq. 17",
        scale=lambda beta: beta**-2,
    ),
    "ipo_z": Row(margin.squared, "(m - ½)²", "arXiv:2402.05749, the squared f", derived="scaling of IPO by beta²"),
    "slic": Row(margin.hinge, "max(0, 1 - m)", "arXiv:2305.10425; with a reference: arXiv:2402.05749"),
    "cdpo": Row(
        margin.smoothed,
        "-(1-ε) log σ(m) - ε log σ(-m), ε = smoothing",
        "E. Mitchell's note on DPO with noisy labels",
        hyper={"smoothing": Hyper(0.1, lambda e: 0 <= e <= 0.5, "be in [0, 0.5]")},
    ),
    "robust": Row(
        margin.robust,
        "(-(1-ε) log σ(m) + ε log σ(-m)) / (1-2ε), ε = smoothing",
        "arXiv:2403.00409",
        hyper={"smoothing": Hyper(0.1, lambda e: 0 <= e < 0.5, "be in [0, 0.5)")},
    ),
    "simpo": Row(
        margin.logistic,
        "-log σ(m), h = mean logp",
        "arXiv:2405.14734 eq. 6",
        beta=2.0,
        shift=1.0,
        average="kept",
        reference=False,
        derived="summed form",
    ),
    "cpo": Row(
        margin.logistic, "-log σ(m) + NLL of the chosen tokens", "arXiv:2401.08417", reference=False, nll="token"
    ),
    "orpo": Row(
        margin.logistic,
        "-λ log σ(m) + NLL of the chosen, h = log-odds of mean logp, λ = scale = 0.1",
        "arXiv:2403.07691",
        beta=1.0,
        average="kept",
        reference=False,
        scale=lambda beta: 0.1,
        transform=margin.log_odds,
        nll="sequence",
        derived="summed form",
    ),
    "kto": Row(
        margin.bounded,
        "1 - σ(u) desirable, 1 - σ(-u) not; shift = beta z₀",
        "arXiv:2402.01306",
        pair=False,
        label="class",
    ),
    "pdpo": Row(
        margin.logistic,
        "-log σ(u) where s = 1, else -log σ(-u); shift = -c",
        "arXiv:2312.02554; averaged: its code",
        pair=False,
        label="class",
        derived="",
    ),
    "pdpo_soft": Row(
        margin.logistic,
        "-s log σ(u) - (1-s) log σ(-u), s in [0, 1]; shift = -c",
        "arXiv:2312.02554, binary form",
        pair=False,
        label="soft",
        derived="soft labels",
    ),
    "pdpo_squared": Row(
        _square,
        "(s - u)²; shift = -c",
        "arXiv:2312.02554, its code",
        pair=False,
        label="value",
        derived="used for s = 1 too",
    ),
    "pdpo_hybrid": Row(
        _square,
        "-log σ(u) where s = 1, else (s - u)²; shift = -c",
        "arXiv:2312.02554, its code",
        pair=False,
        label="value",
        positive=margin.logistic,
        derived="",
    ),
    "ulma": Row(
        margin.logistic,
        "-Σ w logp where s = 1, else -log σ(-u); shift = -c",
        "arXiv:2312.02554; averaged: its code",
        pair=False,
        label="class",
        positive="nll",
        derived="",
    ),
    "ulma_squared": Row(
        _square,
        "-Σ w logp where s = 1, else (s - u)²; shift = -c",
        "arXiv:2312.02554, its code",
        pair=False,
        label="value",
        positive="nll",
        derived="",
    ),
    "unlikelihood": Row(
        margin.linear,
        "-Σ w logp where s = 1, else Σ w logp",
        "arXiv:2312.02554, its code",
        beta=1.0,
        average="kept",
        reference=False,
        pair=False,
        label="class",
        derived="summed form",
    ),
    "exo_pair": Row(
        margin.exo,
        "σ(m) (log σ(m) - log(1-ε)) + σ(-m) (log σ(-m) - log ε), ε = smoothing",
        "arXiv:2402.00856 eq. 16",
        hyper={"smoothing": Hyper(1e-3, lambda e: 0 < e < 0.5, "be in (0, 0.5)")},
    ),
    "nca_pair": Row(
        margin.logistic,
        "-log σ(u⁺) - ½ log σ(-u⁺) - ½ log σ(-u⁻)",
        "arXiv:2402.05369",
        label="class",
        positive=margin.anchored,
    ),
    "bco_pair": Row(
        margin.logistic,
        "-log σ(u⁺) - log σ(-u⁻); shift = δ",
        "arXiv:2404.04656, whose δ is a running mean",
        label="class",
        scale=lambda beta: 2.0,
    ),
    "sppo_hard": Row(
        margin.squared,
        "(h⁺ - 1/(2 beta))² + (h⁻ + 1/(2 beta))²",
        "arXiv:2405.00675 eq. 4.7, P = 1 or 0",
        label="class",
        scale=lambda beta: 2 * beta**-2,
    ),
    "apo_zero": Row(
        margin.bounded, "1 - σ(u⁺) + σ(u⁻)", "arXiv:2408.06266 eq. 7", label="class", scale=lambda beta: 2.0
    ),
    "apo_down": Row(margin.bounded, "σ(u⁺) + 1 - σ(m)", "arXiv:2408.06266 eq. 8", chosen=margin.rising),
    "apo_zero_unpaired": Row(
        margin.bounded,
        "1 - σ(u) desirable, 1 - σ(-u) not",
        "arXiv:2408.06266 eq. 7",
        pair=False,
        label="class",
        derived="averaged form; one response at a time",
    ),
    "discopop": Row(
        margin.discovered,
        "-σ(-m/τ) log σ(m) + σ(m/τ) e^-m, τ = tau",
        "arXiv:2406.08414 eq. 5",
        hyper={"tau": Hyper(0.05, lambda tau: tau > 0, "be above 0")},
    ),
    "aot": Row(
        margin.smoothed,
        "-(1-ε) log σ(m) - ε log σ(-m), differences of policy and reference matched by rank",
        "arXiv:2406.05882",
        hyper={"smoothing": Hyper(0.0, lambda e: 0 <= e <= 0.5, "be in [0, 0.5]")},
        match="reference",
    ),
    "aot_unpaired": Row(
        margin.smoothed,
        "-(1-ε) log σ(m) - ε log σ(-m), chosen and rejected matched by rank",
        "arXiv:2406.05882",
        hyper={"smoothing": Hyper(0.0, lambda e: 0 <= e <= 0.5, "be in [0, 0.5]")},
        match="rejected",
    ),
    "offset": Row(margin.logistic, "-log σ(m), shift = δ ≥ 0 of each pair", "arXiv:2402.10571", least_shift=0.0),
}

DIVERGENCE: dict[str, Formula | None] = {
    "reverse_kl": None,
    "forward_kl": margin.forward_kl,
    "js": margin.jensen_shannon,
    "alpha": margin.alpha_divergence,
}


def fused_functions(row: Row) -> dict | None:
    """phi, chosen and positive of ops.sequence_loss with phi's constant, for the row; None where it is no such row."""
    if row.transform or row.match or row.positive == "nll":
        return None
    phi, constant = (row.phi.func, row.phi.keywords) if isinstance(row.phi, partial) else (row.phi, {})
    functions = dict(phi=phi, **constant)
    if row.chosen:
        functions["chosen"] = row.chosen
    if row.positive:
        functions["positive"] = row.positive
    return functions


def is_fused(row: Row, device: torch.device) -> bool:
    """Whether ops.sequence_loss can run the row: each of its functions has one margin and is known to the kernels."""
    functions = fused_functions(row)
    return functions is not None and not any(missing(f, device) for f in functions.values() if callable(f))


def check_row(row: Row) -> None:
    """Refuses a row whose columns are unknown, or do not go together."""
    check_one_of("Row.label", row.label, (None, "class", "soft", "value"))
    check_one_of("Row.match", row.match, (None, "reference", "rejected"))
    check_one_of("Row.nll", row.nll, (None, "sequence", "token"))
    for part in ("phi", "scale", "transform", "positive", "chosen"):
        value, needed = getattr(row, part), part in ("phi", "scale")
        if not callable(value) and (needed or value is not None) and not (part == "positive" and value == "nll"):
            fail(f"Row.{part}", "be a function" if needed else "be a function or None", repr(value))
    check_bool("Row.reference", row.reference)
    check_bool("Row.pair", row.pair)
    if row.least_shift is not None:
        check_number("Row.least_shift", row.least_shift)
    check_hyper("Row", row.hyper)
    if row.label is None and (row.positive or not row.pair):
        fail("Row.label", "be given " + ("beside positive" if row.positive else "with pair=False"), None)
    beside = [part for part in ("label", "match", "chosen") if getattr(row, part)]
    if len(beside) > 1:
        fail("Row", "have one of label, match and chosen", " and ".join(beside))
    if row.label and row.transform:
        fail("Row.transform", "be None beside label", repr(row.transform))


def check_hyper(kind: str, hyper: dict) -> None:
    """Refuses hyper-parameters of a row of one's own that are no Hyper of a number."""
    if not isinstance(hyper, Mapping):
        fail(f"{kind}.hyper", "map names to Hyper", f"a {type(hyper).__name__}", TypeError)
    for key, one in hyper.items():
        if not isinstance(one, Hyper):
            fail(f"{kind}.hyper[{key!r}]", "be a Hyper", f"a {type(one).__name__}", TypeError)
        check_number(f"{kind}.hyper[{key!r}].default", one.default)


def scale_of(row: Row, beta: float) -> float:
    """What multiplies phi; a beta is refused that is so small that float32 does not hold the scale."""
    try:
        given = row.scale(beta)
    except (OverflowError, ZeroDivisionError):
        given = float("inf")
    scale = number(given)
    if scale is None:
        fail("Row.scale", "return a number", f"a {type(given).__name__}", TypeError)
    if not abs(scale) <= LARGEST:
        fail("beta", f"be large enough for the scale of {row.equation!r}", beta)
    return scale


def row_of(name: str | Row, hyper: dict, of: Callable | None = None) -> tuple[Row, dict]:
    """The row of a name, or a row of the caller's own, and its hyper-parameters: those given to `of`, else its own."""
    if isinstance(name, Row):
        check_row(name)
        hyper = hyper_of(name, name.hyper, hyper, of)
        if not torch.compiler.is_compiling():
            _check_formula("phi", name.phi, tuple(hyper.items()))
            for part in ("transform", "positive", "chosen"):
                if callable(getattr(name, part)):
                    _check_formula(part, getattr(name, part), ())
        return name, hyper
    if not isinstance(name, str) or name not in PREFERENCE:
        fail("name", f"be a Row or one of {tuple(PREFERENCE)}", repr(name))
    row = PREFERENCE[name]
    return row, hyper_of(name, row.hyper, hyper, of)


@lru_cache(64)
def _check_formula(part: str, formula: Formula, hyper: tuple) -> None:
    """Refuses a formula of the caller's own whose slope is not the derivative of its value, as autograd takes it."""
    if formula in CODES:
        return
    with torch.inference_mode(False), torch.enable_grad():
        m = torch.tensor([-4.7, -2.3, -0.7, -0.1, 0.2, 0.9, 3.1], dtype=torch.float64, device="cpu", requires_grad=True)
        found = formula(m, **dict(hyper))
        pair = isinstance(found, tuple) and len(found) == 2 and all(isinstance(x, Tensor) for x in found)
        if not pair or not found[0].shape == found[1].shape == m.shape:
            got = [tuple(x.shape) for x in found] if pair else f"a {type(found).__name__}"
            fail(part, f"return (value, slope), each in the shape of the margin {tuple(m.shape)}", got)
        if not found[0].requires_grad:  # nothing to compare with
            return
        (exact,) = torch.autograd.grad(found[0].sum(), m)
    wrong = ~torch.isclose(found[1].double(), exact, rtol=1e-5, atol=1e-8) & exact.isfinite()
    if wrong.any():
        i = int(wrong.nonzero()[0])
        fail(part, f"return the derivative of its value, {exact[i]:g} at {m[i]:g}", f"the slope {found[1][i]:g}")


def describe(name: str | Row) -> str:
    """A row in a message."""
    return f"the row {name.equation!r}" if isinstance(name, Row) else repr(name)


def hyper_of(name: str | Row, takes: dict[str, Hyper], given: dict, of: Callable | None = None) -> dict:
    """The hyper-parameters of a row: those given, checked, else its own. of: the function that they were given to."""
    found = {}
    for key, value in given.items():
        if key not in takes:
            known = (
                [] if of is None else [p.name for p in signature(of).parameters.values() if p.kind is p.KEYWORD_ONLY]
            )
            hint = nearest(key, [*takes, *known])
            rest = f"; the other keywords are {', '.join(known)}" if known else ""
            raise TypeError(f"{describe(name)} takes {tuple(takes) or 'no hyper-parameter'}, got {key!r}{hint}{rest}")
        found[key] = value = check_number(key, value)
        if not takes[key].holds(value):
            fail(key, takes[key].expected, repr(value))
    return {key: found.get(key, number(wanted.default)) for key, wanted in takes.items()}


def score_transform(name: str | Row, row: Row, divergence: str, alpha: float) -> Formula | None:
    """What a row's score becomes before the margin: the row's own, or g(h) of an f-divergence from the reference."""
    check_one_of("divergence", divergence, tuple(DIVERGENCE))
    alpha = check_number("alpha", alpha)
    if divergence == "reverse_kl":
        return row.transform
    if not row.reference or row.label or row.chosen or row.match:
        fail(
            "divergence",
            f"be 'reverse_kl' for {describe(name)}, no function of a difference of log-ratios",
            repr(divergence),
        )
    return partial(DIVERGENCE[divergence], **({"alpha": alpha} if divergence == "alpha" else {}))

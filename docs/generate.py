"""`python docs/generate.py` writes the tables of the documentation and the picture from the code and bench/results.

A table stands between <!-- name --> and <!-- /name --> on its page; tests/house/test_readme.py compares it with this.
"""

import ast
import importlib.util
import json
import re
import sys
from html import escape
from pathlib import Path

from finealign_kernels import POLICY, PREFERENCE, REWARD, feedback

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results"

IMPLEMENTATIONS = {  # name in bench/results -> name on the page
    "ours": 'this library, `workspace="full"`',
    "ours-default": "this library, default",
    "ours-no-workspace": "this library, `workspace=0`",
    "gemm3": "three bare GEMMs",
    "gemm4": "four bare GEMMs",
    "eager": "eager PyTorch",
    "torch": "`torch` linear_cross_entropy, 512-row chunks",
    "trl": "TRL 1.16",
}
RACES = {  # (case, dtype) -> column
    ("dense", "float32"): "float32 dense",
    ("active20", "float32"): "20 % of rows with a gradient",
    ("frozen", "float32"): "frozen head",
    ("dense", "bfloat16"): "bfloat16 dense",
}


def table(columns, rows) -> str:
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join(lines + [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]) + "\n"


def linked(source: str) -> str:
    """Numbers of arXiv become links."""
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", source)


def cell(text: str) -> str:
    """A bar inside a formula would end the cell."""
    return text.replace("|", "\\|")


GREEK = dict(σ="sigma", β="beta", Δ="Delta", δ="delta", ε="epsilon", λ="lambda", μ="mu", ρ="rho", τ="tau", Σ="sum")
UPRIGHT = "shift scale smoothing margin label floor low high tau tau_pos tau_neg soft_label"
SYMBOLS = {
    **{letter: rf"\{name}" for letter, name in GREEK.items()},
    "≥": r"\ge",
    "½": r"\tfrac{1}{2}",
    "²": "^{2}",
    "⁺": "^{+}",
    "⁻": "^{-}",
    "₀": "_{0}",
    "|": r"\vert",
    **{name: rf"\{name}" for name in ("beta", "max", "min")},
    "log": r"\log\,",
    **{name: rf"\operatorname{{{name}}}" for name in ("clip", "clamp", "sg")},
    **{name: rf"\text{{{name}}}" for name in UPRIGHT.split(" ")},
    "logp": r"\log\,\pi",
}
TOKENS = re.compile(r"\d+\.\d+|1e(?P<exponent>-?\d+)|[A-Za-z][\w'-]*[A-Za-z]|e\^(?P<power>-?\w)|\s+|.")


def latex(equation: str) -> str:
    """A row's equation, which is written for a terminal, for the page: formulas as LaTeX, the words between as text.

    Formulas end at words, and at commas and semicolons outside brackets, where a browser may break the line.
    """
    pieces, formula, depth = [], [], 0

    def end():
        found = re.sub(r" ([_^'])", r"\1", " ".join(formula))
        pieces.extend([rf"\({found}\)"] if found else [])
        formula.clear()

    for token in TOKENS.finditer(equation):
        text, power, exponent = token[0], token["power"], token["exponent"]
        depth += (text in "([") - (text in ")]")
        word = (len(text) > 1 or text == "a") and text[0].isalpha() and text not in SYMBOLS and not power
        if word or (text in ",;:" and not depth):
            end()
            pieces.append(text)
        elif not text.isspace():
            formula.append(f"e^{{{power}}}" if power else f"10^{{{exponent}}}" if exponent else SYMBOLS.get(text, text))
    end()
    return re.sub(r" ([,;:])", r"\1", " ".join(pieces))


def losses() -> str:
    rows = []
    for name, row in PREFERENCE.items():
        reference = "" if row.reference else ", no reference"
        average = "sum" if row.average is False else f'"{row.average}"'
        numbers = f"{row.beta:g}", f"{row.shift:g}"
        rows.append(
            (f"`{name}`", latex(row.equation) + reference, average, *numbers, cell(linked(row.source)), row.derived)
        )
    return table(("name", "loss of a pair", "average", "beta", "shift", "source", "derived here"), rows)


def policies() -> str:
    rows = []
    for name, row in POLICY.items():
        options = ", ".join(f"{key} {one.default:g}" for key, one in row.hyper.items() if one.default is not None)
        reduction = f'"{row.reduction}"'
        rows.append((f"`{name}`", latex(row.equation), reduction, options, f"{row.kl_coef:g}", linked(row.source)))
    return table(("name", "loss of a token", "reduction", "options", "KL", "source"), rows)


def rewards() -> str:
    rows = []
    for name, row in REWARD.items():
        reads = [
            key for key, needed in (("strength", row.reads(None, None)), ("label", row.smoothing == "label")) if needed
        ]
        rows.append((f"`{name}`", latex(row.equation), ", ".join([*reads, *row.hyper]), linked(row.source)))
    return table(("name", "loss of a pair", "needs", "source"), rows)


def studies() -> str:
    """The studies that have rows: claim, means of the arms, effects with intervals, picture."""
    sys.path.insert(0, str(ROOT / "bench"))
    from studies import runs
    from studies.__main__ import STUDIES

    rows = {name: runs.read(RESULTS / f"studies/study-{name}.jsonl") for name in STUDIES}
    return "\n".join(runs.page(study, rows[name]) for name, study in STUDIES.items() if rows[name])


def head() -> str:
    """The races of the loss head: time as a ratio to ours with the full workspace, and extra memory."""
    found = json.loads((RESULTS / "cpu-amd-epyc-avx512-2-threads/head.json").read_text())
    by = {(row["case"], row["dtype"], row["impl"]): row for row in found}
    rows = []
    for impl, shown in IMPLEMENTATIONS.items():
        ratios = [f"{by[case, dtype, impl]['ratio_to_ours']:.2f}" for case, dtype in RACES]
        peak = by["dense", "float32", impl]["peak_extra_mib"]
        rows.append((shown, *ratios, "-" if peak is None else f"{peak:.0f}"))
    return table(("", *RACES.values(), "extra MiB, float32 dense"), rows)


def history() -> str:
    """Races that were run at two commits or more on one device: the first and the last ratios."""
    races = {}
    for line in (RESULTS / "history.jsonl").read_text().splitlines():
        row = json.loads(line)
        shape = " × ".join(map(str, row["shape"]))
        races.setdefault((f"{row['suite']} {row['case']}, {row['dtype']}, {shape}", row["device"]), []).append(row)
    rows = []
    for (race, device), runs in races.items():
        first, last = runs[0], runs[-1]
        both = [name for name in first["ratios"] if name in last["ratios"] and name != "ours"]
        ratios = ", ".join(f"{name} {first['ratios'][name]:.2f} → {last['ratios'][name]:.2f}" for name in both)
        if first["commit"] != last["commit"] and both:
            rows.append((race, device, f"{first['commit']} → {last['commit']}", ratios))
    return table(("race", "device", "commits", "time / ours, first → last"), rows)


def accuracy() -> str:
    """RMS error against float64, eager beside ours."""
    found = json.loads((RESULTS / "cpu-unnamed/accuracy.json").read_text())
    rows = [(row["case"], row["dtype"], row["quantity"], f"{row['eager']:.1e}", f"{row['ours']:.1e}") for row in found]
    return table(("rows", "dtype", "quantity", "eager PyTorch", "this library"), rows)


JOBS = (  # job, lines before the seams were there, example, the functions and classes in it that do the job
    ("`transformers.Trainer`, ULMA, counts of the whole step", 36, "trainer_ulma.py", ("UlmaTrainer",)),
    ("TRL DPO, span weights, averaged by length", 41, "dpo_spans.py", ("main",)),
    ("TRL GRPO, rewards of parts, pivots", 21, "grpo_sentences.py", ("main",)),
    ("PPO, two reward models, critic, LoRA", 25, "ppo_fine_grained.py", ("judge", "main")),
    ("reward model with margins", 6, "reward_model.py", ("main",)),
    ("verl: loss", 25, "verl 0.9", None),
    ("OpenRLHF: losses, GAE", 30, "OpenRLHF 0.11", None),
    ("DDP, FSDP2: one step over ranks", 4, "ddp_fsdp2.py", ("gradients",)),
)


def glue() -> str:
    """Lines of this library in each job: those before were counted in scripts written by hand for version 0.1.0."""
    rows = []
    for job, before, where, places in JOBS:
        lines = lines_of_block(where) if places is None else lines_of_glue(ROOT / "examples" / where, places)
        shown = "its config or entry script" if places is None else f"[`{where}`]({where})"
        rows.append((job, shown, before, lines))
    return table(("job", "example", "lines of glue, by hand", "lines now"), rows)


def lines_of_block(heading: str) -> int:
    """Lines of the first block of code under a heading of the guide."""
    page = (ROOT / "docs/guides/verl-openrlhf.md").read_text().split(f"## {heading}\n")[1]
    return len([line for line in page.split("```")[1].splitlines()[1:] if line.strip()])


def lines_of_glue(path: Path, places: tuple[str, ...]) -> int:
    """Lines of imports of this library, and of statements in `places` that use them; feedback.sample is data.

    Of a class that derives from one of this library's all lines count.
    """
    tree, names, lines = ast.parse(path.read_text()), set(), set()
    for node in tree.body:
        modules = (
            [node.module] if isinstance(node, ast.ImportFrom) else [one.name for one in getattr(node, "names", ())]
        )
        if isinstance(node, (ast.Import, ast.ImportFrom)) and any(m.startswith("finealign_kernels") for m in modules):
            names |= {one.asname or one.name for one in node.names}
            lines |= set(range(node.lineno, node.end_lineno + 1))

    def visit(node):
        body = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
        head = [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.stmt)]
        found = [name.id for part in head for name in ast.walk(part) if isinstance(name, ast.Name)]
        data = "feedback.sample" in ast.unparse(node) and not body
        if names & set(found) and not data:
            whole = not body or isinstance(node, ast.ClassDef)
            last = node.end_lineno if whole else max(node.lineno, body[0].lineno - 1)
            lines.update(range(node.lineno, last + 1))
        for child in body:
            visit(child)

    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in places:
            visit(node)
    return len(lines)


LESS, MORE = "214 74 60", "47 118 200"  # the colours of the demo's report: blue is more likely, red is less
CHARACTER, LINE = 7.83, 30  # of the picture's font


def picture() -> str:
    """Words of a pair of the sample, shaded by the weight with which DPO makes them more or less likely."""
    example = next(one for one in feedback.sample() if one.id == "highest-mountain")
    pair = example.responses[:2]
    words = [[found.span() for found in re.finditer(r"\S+", response.text)] for response in pair]
    weights = feedback.pair_weights(*((at, one.text, one.spans) for at, one in zip(words, pair, strict=True)))
    drawn, y = [], 16
    for side, (response, at, weight) in enumerate(zip(pair, words, weights, strict=True)):
        label = ("chosen: every token becomes more likely", "rejected: less likely, its marked faults twice as much")
        drawn.append(f'<text x="0" y="{y}" class="l">{label[side]}</text>')
        x, y = 0.0, y + 10
        for (start, stop), w in zip(at, weight, strict=True):
            width = (stop - start) * CHARACTER + 6
            if x + width > 830:
                x, y = 0.0, y + LINE
            shade = f"rgb({(MORE, LESS)[side]} / {0.28 * w:.2f})"
            drawn.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="22" rx="3" fill="{shade}"/>')
            drawn.append(f'<text x="{x + 3:.1f}" y="{y + 16}">{escape(response.text[start:stop])}</text>')
            if w != 1:
                drawn.append(f'<text x="{x + width / 2:.1f}" y="{y + 33}" class="w">{w:g}</text>')
            x += width + 3
        y += 62
    style = "text{font:13px ui-monospace,Menlo,Consolas,monospace;fill:#1c2126}.l{font-family:sans-serif;fill:#59626c}"
    style += ".w{font-size:10px;text-anchor:middle;fill:#59626c}"
    box = f'xmlns="http://www.w3.org/2000/svg" viewBox="-12 -8 860 {y - 20}" role="img"'
    ground = f'<rect x="-12" y="-8" width="860" height="{y - 20}" rx="8" fill="#ffffff"/>'
    return f"<svg {box}>\n<style>{style}</style>\n{ground}\n" + "\n".join(drawn) + "\n</svg>\n"


PICTURE = ROOT / "docs/images/tokens.svg"


def bench(name: str):
    """The module bench/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"bench/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def goals() -> str:
    """Of the first GPU run, by bench/goals.py."""
    module = bench("goals")
    return module.table(module.published(ROOT))


def latency() -> str:
    """Of the (N,)-sized ops on a GPU, by bench/latency.py; beside what the last GPU in bench/results took."""
    return bench("latency").table((bench("goals").published(ROOT) or [[]])[-1])


TABLES = {  # name of a table -> its page, and what makes it
    "losses": ("tables.md", losses),
    "policies": ("tables.md", policies),
    "rewards": ("tables.md", rewards),
    "studies": ("studies.md", studies),
    "head": ("performance.md", head),
    "history": ("performance.md", history),
    "accuracy": ("accuracy.md", accuracy),
    "glue": ("../examples/README.md", glue),
    "goals": ("status.md", goals),
    "latency": ("performance.md", latency),
}


def between(name: str) -> re.Pattern:
    return re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.S)


def written(name: str) -> str:
    """The table as it stands on its page."""
    page, _ = TABLES[name]
    found = between(name).findall((ROOT / "docs" / page).read_text())
    if len(found) != 1:
        raise ValueError(
            f"docs/{page} must have one table between <!-- {name} --> and <!-- /{name} -->, got {len(found)}"
        )
    return found[0]


COUNTS = re.compile(r"\d+ preference and point-wise losses, \d+ policy losses, \d+ reward-model losses")


def counts() -> str:
    """What the README says of the number of losses."""
    numbers = len(PREFERENCE), len(POLICY), len(REWARD)
    return "{} preference and point-wise losses, {} policy losses, {} reward-model losses".format(*numbers)


def main():
    readme = ROOT / "README.md"
    readme.write_text(COUNTS.sub(counts(), readme.read_text()))
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(picture())
    for name, (page, make) in TABLES.items():
        path = ROOT / "docs" / page
        path.write_text(between(name).sub(lambda _, make=make: make(), path.read_text()))


if __name__ == "__main__":
    main()

"""The terminal table and the HTML report of a run on preferences, and the parts that other runs use too."""

import math
import textwrap
from importlib.metadata import version
from pathlib import Path

import torch

from .. import __version__, report
from .data import cut_facts, spans_beyond, spans_of_tokens, texts_of_tokens
from .effect import token_groups
from .heads import LIMIT
from .options import average_of, beta_of, lr_of, percent_of, scores_of, threshold_of, warmup_of

AVERAGE_WORDS = {False: "summed", "kept": "averaged by the sum of weights", "all": "averaged by the number of tokens"}


def largest(steps):
    """The largest difference over all steps, by name."""
    return {name: max(step.differences[name] for step in steps) for name in steps[0].differences}


def table(steps, costs):
    """Columns and rows of the table of the loss head, for the terminal and for the page."""
    rows = [
        ["time (ms)", *(cost.ms for cost in costs.values())],
        ["peak extra memory (MiB)", *(cost.mib for cost in costs.values())],
    ]
    others = [None] * (len(costs) - 1)
    rows += [[f"{name}, relative difference", value, *others] for name, value in largest(steps).items()]
    return ["", *costs], rows


def summary(options, model, batch, steps, costs, effects):
    """The table of the loss head and the sentences that explain it, for the terminal."""
    body = text_table(*table(steps, costs))
    sentence = textwrap.fill(f"{_sentence(options, steps, effects)} {head_sentence(steps, costs)}", 100)
    mask = mask_sentence(options)
    sentence += f"\n{mask}" if mask else ""
    return f"\nloss head, forward and backward: {rows_read(model, batch)}\n{body}\n\n{sentence}\n"


def mask_sentence(options):
    """A sentence that says from which step on the mask acts; None without a mask."""
    if scores_of(options) is None:
        return None
    first = warmup_of(options) + 1
    reason = ": implicit scores are 0 until the policy has moved" if first > 1 else ""
    return f"The mask acts from step {first} on{reason}."


def text_table(columns, rows):
    """The table as text for the terminal. None becomes a dash."""
    texts = [["-" if cell is None else str(report.number(cell)) for cell in line] for line in [columns, *rows]]
    width = max(len(line[0]) for line in texts)
    return "\n".join(line[0].ljust(width) + "".join(f"{cell:>17}" for cell in line[1:]) for line in texts)


def rows_read(model, batch):
    read, total = int(batch.mask.sum()), batch.mask.numel()
    kept = "" if batch.adaptive is None else f" and {_kept(batch)} of them kept ({batch.adaptive.kept.item():.0%})"
    return f"{read} of {total} rows are of responses{kept}, vocabulary {len(model.weight)}"


def _kept(batch):
    return int((batch.adaptive.token_weight > 0).sum())


def write_report(options, model, steps, last, costs, effects):
    """Writes the page, feedback first and kernels last, and returns its path."""
    title = f"{options.loss.upper()} on {Path(model.name).name}, {options.steps} steps"
    sections = [
        report.headline(title, _sentence(options, steps, effects), _facts(options, model)),
        _tokens_section(options, model, last),
        _effect_section(options, effects) if effects else None,
        None if last.unmasked is None else _mass_section(options, last),
        _curves_section(steps),
        head_section(model, last.batch, steps, costs),
        bars_section(costs),
    ]
    return report.write(options.report, title, sections)


def _sentence(options, steps, effects):
    """The result, for a reader who sees such a page for the first time."""
    first, final = steps[0], steps[-1]
    text = f"In {options.steps} steps the loss went from {first.loss:.3g} to {final.loss:.3g}"
    if final.margin is not None:
        text += (
            f" and the margin from {first.margin:.3g} to {final.margin:.3g}. The margin says how much more than its "
            f"reference the model prefers the chosen answer; it is above 0 for {final.accuracy:.0%} of the last step's "
            "pairs, which are training pairs"
        )
    marked = next((one for one in effects or () if one.name == "rejected, marked"), None)
    if marked is not None:
        text += (
            f". The log-probs of tokens marked in rejected answers moved by {marked.weighted:+.3g} nats on average. "
            f"With all weights 1, the same training moves them by {marked.plain:+.3g}"
        )
    return text + "."


def _effect_section(options, effects):
    """A table of how far the tokens of each group moved, with the weights and without."""
    moves = [(one.weighted, one.plain, one.weighted - one.plain) for one in effects]
    cells = same_decimals([move for row in moves for move in row])
    rows = [[one.name, one.tokens, *cells[3 * i : 3 * i + 3]] for i, one in enumerate(effects)]
    columns = ["tokens", "number", f"with weight {options.span_weight:.3g}", "with all weights 1", "difference"]
    note = (
        "Change of a token's log-probability from the start to the end of training, in nats: the mean over all tokens "
        "of the group in all training answers. Below 0 is less likely. The column with all weights 1 is a second "
        f"training from the same start, with the same steps: plain {options.loss.upper()}. The difference is the "
        "effect of the marked spans. It is measured on training answers and says nothing about other answers."
    )
    return report.table("Before and after, with the weights and without", columns, rows, note=note)


def same_decimals(values):
    """Numbers of a column as text with the same number of decimals, which gives the largest three digits."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    decimals = min(8, max(0, 2 - math.floor(math.log10(largest)))) if largest else 1
    return [f"{value:+.{decimals}f}" for value in values]


def head_sentence(steps, costs):
    """How the fused head compares with the others."""
    difference = max(largest(steps).values())
    text = (
        "At every step the fused loss head gave the same loss and gradients as plain PyTorch; the largest relative "
        f"difference is {report.number(difference)}. It took {costs['fused'].ms / costs['eager'].ms:.2f} × the time"
    )
    if costs["fused"].mib is not None and costs["eager"].mib:
        text += f" and {costs['fused'].mib / costs['eager'].mib:.2f} × the extra memory"
    text += " of plain PyTorch on the same rows"
    if "fused, unmasked" in costs:
        text += f", and {costs['fused'].ms / costs['fused, unmasked'].ms:.2f} × the time of the same loss without mask"
    return text + "."


def _facts(options, model):
    beta = {} if options.loss == "nll" else {"beta": beta_of(options)}
    return {
        "loss": options.loss,
        **beta,
        "log-probs": AVERAGE_WORDS.get(average_of(options), average_of(options)),
        "weight of a fault": f"{options.span_weight:.3g} rejected, {1 / options.span_weight:.3g} chosen",
        **_mask_facts(options),
        "learning rate": lr_of(options),
        "pairs a step": options.batch,
        **head_facts(options, model),
    }


def head_facts(options, model):
    """Facts about the model, the data and the versions."""
    trained = sum(parameter.numel() for parameter in model.parameters)
    return {
        "model": model.name,
        "training": "LoRA, head frozen" if options.lora else "all parameters",
        "trained parameters": f"{trained:,}",
        "data": Path(options.data).name if options.data else "shipped sample",
        **cut_facts(options),
        "seed": options.seed,
        "threads": torch.get_num_threads(),
        "finealign-kernels": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def _mask_facts(options):
    if scores_of(options) is None:
        return {}
    own = {
        None: "none, token by token",
        "threshold": f"where the score changes by more than {threshold_of(options):.3g} standard deviations",
        "sign": "where the score crosses the baseline",
        "salience": f"the {percent_of(options):.3g} % of tokens with scores furthest from the baseline",
    }
    source = scores_of(options) if scores_of(options) in ("implicit", "spans") else Path(options.scores).name
    return {
        "token scores": f"{source}, masked from step {warmup_of(options) + 1}",
        "pivots": own[options.pivots],
        **({} if options.pivots is None else {"masked by": options.keep}),
        "baseline": options.baseline or "batch",
    }


def head_section(model, batch, steps, costs):
    note = f"{head_sentence(steps, costs)} " + (
        f"The table shows head and loss, forward and backward, on the same hidden states. {rows_read(model, batch)}; "
        "prompts and padding are masked and not multiplied by the head. Eager PyTorch gets the same rows, so these "
        "two columns compare kernels. The column of all rows shows what it costs to compute prompts and padding too. "
        "Time is the median over the steps (all rows: one run). Memory is the peak on the last step's tensors, beyond "
        "inputs and gradients. A difference is a norm divided by the eager norm, the largest of all steps; a "
        f"difference above {report.number(LIMIT)} would have ended the run with an error."
    )
    if batch.adaptive is not None:
        note += (
            " Times are of the steps with the mask. Tokens that the mask drops have no gradient and are left out of "
            "the fused backward pass. The time to compute token scores is not included."
        )
    return report.table("Loss head, fused against eager PyTorch", *table(steps, costs), note=note)


def _curves_section(steps):
    charts = [report.Chart("loss", [report.Series("mean of the step's pairs", [step.loss for step in steps])])]
    if steps[0].margin is not None:
        charts += [
            report.Chart("margin, chosen over rejected", [report.Series("mean", [step.margin for step in steps])]),
            report.Chart("pairs ranked right, %", [report.Series("accuracy", [100 * s.accuracy for s in steps])]),
        ]
    differences = [report.Series(name, [s.differences[name] for s in steps]) for name in steps[0].differences]
    charts.append(report.Chart("relative difference, fused to eager", differences, log=True, limit=LIMIT))
    note = (
        "Each step takes the next pairs of a small set, again and again, so two neighbouring steps differ in their "
        "pairs too. For a loss with a reference, policy and reference are the same before the first update, and all "
        "margins are 0."
    )
    return report.curves("Step by step", charts, note=note)


def bars_section(costs):
    known = {name: cost.mib for name, cost in costs.items() if cost.mib is not None}
    groups = [report.Bars("time, forward and backward", "ms", {name: cost.ms for name, cost in costs.items()})]
    if known:
        groups.append(report.Bars("peak extra memory", "MiB", known))
    return report.bars("What the loss head costs", groups)


def _mass_section(options, last):
    """A table of the tokens that the mask keeps, by group, and their share of Σ |d loss / d logp|."""
    batch = last.batch
    before, after = last.unmasked.dlogp.abs(), last.head.dlogp.abs()
    totals = [max(mass.sum().item(), torch.finfo(mass.dtype).tiny) for mass in (before, after)]
    rows = [
        [
            name,
            int(of.sum()),
            int((batch.adaptive.token_weight[of] > 0).sum()),
            *(f"{mass[of].sum().item() / total:.1%}" for mass, total in zip((before, after), totals, strict=True)),
        ]
        for name, of in token_groups(options, batch)
    ]
    columns = ["tokens of the last step", "number", "kept", "gradient without mask", "with mask"]
    note = (
        "Gradient is the sum of |d loss / d log-prob| over the tokens of a row, as a share of the sum over all tokens. "
        "In a chosen answer the mask keeps tokens that score above the baseline, in a rejected one those that score "
        f"below it. The sum over all tokens with the mask is {totals[1] / totals[0]:.0%} of the sum without it."
    )
    return report.table("How the mask moved the gradient", columns, rows, note=note)


def _tokens_section(options, model, last):
    masked = last.batch.adaptive is not None
    shades = [
        report.Shade("weight", "", "counts most"),
        report.Shade("push", "less likely", "more likely", signed=True),
    ]
    shown = "twice, coloured by the weight of its tokens"
    if masked:
        shades.insert(0, report.Shade("score", "bad", "good", signed=True))
        shown = "three times, coloured by the score of its tokens, by their weight after the mask"
    weight = f"{options.span_weight:.3g}"
    note = (
        f"The answers of the last step, each shown {shown}, and by the push of the loss on each token. The push is "
        "minus the gradient of the loss with respect to the token's log-probability: blue makes the token more "
        "likely, red less likely, and pale tokens hardly change. The loss makes the chosen answer more likely and the "
        f"rejected one less likely. A token of weight {weight} is pushed {weight} times as hard as one of weight 1. A "
        "marked fault is a reason for the rejection, so it is pushed down harder than the rest of its answer; a fault "
        "in a chosen answer is pushed up less. Faults are underlined and listed below each answer. Hover over a token "
        "for its numbers."
    )
    if hasattr(last.head.metrics, "chosen_rewards"):
        note += " The reward of an answer is the implicit one: beta times its score."
    if masked:
        note += (
            " In the first colouring, blue is a good score and red a bad one. A line before a token marks a pivot, at "
            "which a segment starts. The hover text says why a token is kept (which score was compared with the "
            "baseline), and what its push would be without the mask."
        )
    return report.token_texts(
        "Feedback, weights, and what the loss does", _shown_examples(options, model, last), shades, note=note
    )


def _shown_examples(options, model, last, most=4):
    """Up to `most` pairs of the last batch; for `nll` only the chosen answers."""
    batch = last.batch
    half = len(batch.pairs)
    sides = ["chosen"] if options.loss == "nll" else ["chosen", "rejected"]
    return [
        report.Example(
            pair.name,
            pair.prompt,
            [_shown_response(model, last, i + k * half, side) for k, side in enumerate(sides)],
        )
        for i, pair in enumerate(batch.pairs[:most])
    ]


def _shown_response(model, last, s, side):
    answer, read = last.batch.answers[s], last.batch.mask[s]
    numbers = {"weight": last.batch.token_weight, "push": -last.head.dlogp, "log-prob": last.head.logp}
    if last.batch.adaptive is not None:
        numbers.update({"score": last.batch.token_score, "push without mask": -last.unmasked.dlogp})
    numbers = {name: values[s][read].tolist() for name, values in numbers.items()}
    reasons, starts = _reasons(last.batch, s)
    spans = spans_of_tokens(answer)
    tokens = [
        report.Token(
            text,
            {name: values[t] for name, values in numbers.items()},
            [span.kind for span in spans[t]],
            "; ".join([*reasons[t], *(f"{span.kind}: {span.label}" if span.label else span.kind for span in spans[t])]),
            starts[t],
        )
        for t, text in enumerate(texts_of_tokens(model.tokenizer, answer))
    ]
    rewards = getattr(last.head.metrics, f"{side}_rewards", None)
    remark = "" if rewards is None else f"reward {report.signed(rewards[s % len(last.batch.pairs)].item())}"
    return report.Response(side, tokens, remark, faults_of(answer))


def faults_of(answer):
    """One line for each span: its kind, the covered text, the annotator's comment, and whether it is cut off."""
    beyond = spans_beyond(answer)
    return [
        f"{span.kind}: “{answer.response.text[span.start : span.end]}”"
        + (f" ({span.label})" if span.label else "")
        + (", behind the last token that is kept" if span in beyond else "")
        for span in answer.response.spans
    ]


def _reasons(batch, s):
    """For each response token: the reason why it is kept or dropped, and whether a segment starts there."""
    read, adaptive = batch.mask[s], batch.adaptive
    if adaptive is None:
        return [[] for _ in range(int(read.sum()))], [False] * int(read.sum())
    weight, score, level = (x[s][read].tolist() for x in adaptive[:3])
    segments = [None] * len(weight) if adaptive.segment is None else adaptive.segment[s][read].tolist()
    starts = [False] * len(weight) if batch.pivots is None else batch.pivots[s][read].tolist()
    reasons = []
    for kept, value, base, segment, pivot in zip(weight, score, level, segments, starts, strict=True):
        order = "above" if value > base else "below" if value < base else "at"
        what = f"segment {segment}" if segment is not None else "pivot" if pivot else "token"
        verdict = "kept" if kept else "dropped"
        reasons.append([f"{verdict}: {what} scores {report.number(value)}, {order} {report.number(base)}"])
    return reasons, starts

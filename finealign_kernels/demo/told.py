"""What the demo tells: a table in the terminal and the report."""

import textwrap
from importlib.metadata import version
from pathlib import Path

import torch

from .. import __version__, feedback, report
from .heads import LIMIT
from .options import average_of, beta_of, lr_of, percent_of, scores_of, threshold_of, warmup_of

AVERAGE_WORDS = {False: "summed", "kept": "averaged, by weight", "all": "averaged, by tokens"}


def largest(steps):
    """Largest difference over the steps, by name."""
    return {name: max(step.differences[name] for step in steps) for name in steps[0].differences}


def table(steps, costs):
    """Columns and rows of the loss head's table, for the terminal and for the page."""
    rows = [
        ["time (ms)", *(cost.ms for cost in costs.values())],
        ["peak extra memory (MiB)", *(cost.mib for cost in costs.values())],
    ]
    others = [None] * (len(costs) - 1)
    rows += [[f"{name}, relative difference", value, *others] for name, value in largest(steps).items()]
    return ["", *costs], rows


def summary(options, model, batch, steps, costs):
    """The loss head's table and the sentence that reads it, for the terminal."""
    body = text_table(*table(steps, costs))
    sentence = textwrap.fill(_sentence(options, steps, costs), 100)
    return f"\nloss head, forward and backward: {rows_read(model, batch)}\n{body}\n\n{sentence}\n"


def text_table(columns, rows):
    """The table for the terminal; None is a dash."""
    texts = [["-" if cell is None else str(report.number(cell)) for cell in line] for line in [columns, *rows]]
    width = max(len(line[0]) for line in texts)
    return "\n".join(line[0].ljust(width) + "".join(f"{cell:>17}" for cell in line[1:]) for line in texts)


def rows_read(model, batch):
    read, total = int(batch.mask.sum()), batch.mask.numel()
    kept = "" if batch.why is None else f" and {_kept(batch)} of them kept"
    return f"{read} response rows of {total} are read{kept}, vocabulary {len(model.weight)}"


def _kept(batch):
    return int((batch.why.token_weight > 0).sum())


def write_report(options, model, steps, last, costs):
    """Writes the page and returns its path."""
    title = f"{options.loss.upper()} on {Path(model.name).name}, {options.steps} steps"
    sections = [
        report.headline(title, _sentence(options, steps, costs), _facts(options, model)),
        head_section(model, last.batch, steps, costs),
        _curves_section(steps),
        bars_section(costs),
        None if last.unmasked is None else _mass_section(options, last),
        _tokens_section(options, model, last),
    ]
    return report.write(options.report, title, sections)


def _sentence(options, steps, costs):
    """What came out, for a reader who sees such a page for the first time."""
    first, final = steps[0], steps[-1]
    text = f"In {options.steps} steps the loss went from {first.loss:.3g} to {final.loss:.3g}"
    if final.margin is not None:
        text += (
            f" and the margin by which the model prefers the better answer from {first.margin:.3g} to "
            f"{final.margin:.3g} (it ranks {final.accuracy:.0%} of the last step's pairs right)"
        )
    return f"{text}. {head_sentence(steps, costs)}"


def head_sentence(steps, costs):
    """How the fused head compared with the others."""
    difference = max(largest(steps).values())
    text = (
        "At every step the fused loss head gave the loss and gradients of plain PyTorch; the largest relative "
        f"difference is {report.number(difference)}. Beside plain PyTorch on the same rows it took "
        f"{costs['fused'].ms / costs['eager'].ms:.2f}x the time"
    )
    if costs["fused"].mib is not None and costs["eager"].mib:
        text += f" and {costs['fused'].mib / costs['eager'].mib:.2f}x the extra memory"
    if "fused, unmasked" in costs:
        text += (
            f"; beside the same loss without its mask {costs['fused'].ms / costs['fused, unmasked'].ms:.2f}x the time"
        )
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
    """What is trained, on what, with which versions."""
    trained = sum(parameter.numel() for parameter in model.parameters)
    return {
        "model": model.name,
        "training": "LoRA, head frozen" if options.lora else "all parameters",
        "trained parameters": f"{trained:,}",
        "data": Path(options.data).name if options.data else "shipped sample",
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
        "threshold": f"a step above {threshold_of(options):.3g} standard deviations",
        "sign": "where the score crosses the baseline",
        "salience": f"the {percent_of(options):.3g} % furthest from the baseline",
    }
    source = scores_of(options) if scores_of(options) in ("implicit", "spans") else Path(options.scores).name
    trained = f", masked from step {warmup_of(options) + 1}" if warmup_of(options) else ""
    return {
        "token scores": source + trained,
        "pivots": own[options.pivots],
        **({} if options.pivots is None else {"masked by": options.keep}),
        "baseline": options.baseline or "batch",
    }


def head_section(model, batch, steps, costs):
    note = (
        f"Head and loss, forward and backward, on the same hidden states; {rows_read(model, batch)}. Prompts and "
        "padding are masked and never projected. Eager PyTorch gets the same rows, so those two columns compare "
        "kernels; on all rows it shows what leaving rows out saves. Time: median of the steps (all rows: one run). "
        "Memory: peak on the last step's tensors, over inputs and gradients. Differences: largest of all steps, as "
        f"norms relative to eager's; one above {report.number(LIMIT)} would have ended the run with an error."
    )
    if batch.why is not None:
        note += (
            " Time is that of the masked steps. Rows that the mask drops have no gradient and are left out of the "
            "fused backward; without the mask the same loss reads the same rows. What scores the tokens is not in it."
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
        "Each step reads the next pairs of a small set, over and over, so neighbours differ by their pairs too. With a "
        "reference, policy and reference are one before the first update, and every margin is 0."
    )
    return report.curves("Step by step", charts, note=note)


def bars_section(costs):
    known = {name: cost.mib for name, cost in costs.items() if cost.mib is not None}
    groups = [report.Bars("time, forward and backward", "ms", {name: cost.ms for name, cost in costs.items()})]
    if known:
        groups.append(report.Bars("peak extra memory", "MiB", known))
    return report.bars("What the loss head costs", groups)


def _mass_section(options, last):
    """A table: tokens that the mask keeps, by sort, and their share of Σ |d loss / d logp| without it and with it."""
    batch = last.batch
    before, after = last.unmasked.dlogp.abs(), last.head.dlogp.abs()
    totals = [max(mass.sum().item(), torch.finfo(mass.dtype).tiny) for mass in (before, after)]
    rows = [
        [
            name,
            int(of.sum()),
            int((batch.why.token_weight[of] > 0).sum()),
            *(f"{mass[of].sum().item() / total:.1%}" for mass, total in zip((before, after), totals, strict=True)),
        ]
        for name, of in _sorts(options, batch)
    ]
    columns = ["tokens of the last step", "number", "kept", "gradient without mask", "with mask"]
    note = (
        "Gradient: sum of |d loss / d log-prob| over the tokens, as a share of the whole. A chosen answer keeps what "
        "scores above the baseline, a rejected one what scores below it. In all, the mask leaves "
        f"{report.number(totals[1] / totals[0])} of the sum without it."
    )
    return report.table("How the mask moved the gradient", columns, rows, note=note)


def _sorts(options, batch):
    """Tokens by their answer's side and by whether a span marks them: name, (S, T-1) bool."""
    marked, half = torch.zeros_like(batch.mask), len(batch.pairs)
    for s, answer in enumerate(batch.answers):
        marked[s, batch.mask[s]] = torch.tensor([len(spans) > 0 for spans in spans_of_tokens(answer)])
    side = torch.arange(len(batch.answers))[:, None] < half
    chosen = [("chosen, marked", batch.mask & side & marked), ("chosen, not marked", batch.mask & side & ~marked)]
    if options.loss == "nll":
        return chosen
    others = batch.mask & ~side
    return [*chosen, ("rejected, marked", others & marked), ("rejected, not marked", others & ~marked)]


def _tokens_section(options, model, last):
    masked = last.batch.why is not None
    shades = [
        report.Shade("weight", "", "counts most"),
        report.Shade("gradient", "raises the token", "lowers it", signed=True),
    ]
    shown = "twice: by the weight of its tokens"
    if masked:
        shades.insert(0, report.Shade("score", "bad", "good", signed=True))
        shown = "three times: by the score of its tokens, by their weight after the mask"
    note = (
        f"The last step's answers, each shown {shown}, and by the gradient of the loss with "
        "respect to each token's log-probability. Blue tokens become likelier in this step, red ones less likely, pale "
        "ones are left alone. Marked faults are underlined; hover over a token for its numbers."
    )
    if masked:
        note += (
            " A line before a token is a pivot: a segment starts there. The hover text says why a token is kept: what "
            "was compared with the baseline, and the gradient it would have had without the mask."
        )
    return report.token_texts("Where the gradient goes", _shown_examples(options, model, last), shades, note=note)


def _shown_examples(options, model, last, most=4):
    """Up to `most` pairs of the last batch; for `nll` the chosen answers alone."""
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
    numbers = {"weight": last.batch.token_weight, "gradient": last.head.dlogp, "log-prob": last.head.logp}
    if last.batch.why is not None:
        numbers.update({"score": last.batch.token_score, "gradient without mask": last.unmasked.dlogp})
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
    remark = "" if rewards is None else f"reward {rewards[s % len(last.batch.pairs)].item():+.3f}"
    return report.Response(side, tokens, remark)


def _reasons(batch, s):
    """Of each response token: why it is kept or dropped, as texts, and whether a segment starts there."""
    read, why = batch.mask[s], batch.why
    if why is None:
        return [[] for _ in range(int(read.sum()))], [False] * int(read.sum())
    weight, score, level = (x[s][read].tolist() for x in why[:3])
    segments = [None] * len(weight) if why.segment is None else why.segment[s][read].tolist()
    starts = [False] * len(weight) if batch.pivots is None else batch.pivots[s][read].tolist()
    reasons = []
    for kept, value, base, segment, pivot in zip(weight, score, level, segments, starts, strict=True):
        order = "above" if value > base else "below" if value < base else "at"
        what = f"segment {segment}" if segment is not None else "pivot" if pivot else "token"
        verdict = "kept" if kept else "dropped"
        reasons.append([f"{verdict}: {what} scores {report.number(value)}, {order} {report.number(base)}"])
    return reasons, starts


def spans_of_tokens(answer):
    """The spans over each response token."""
    spans = answer.response.spans
    ranges = feedback.token_spans(answer.offsets, answer.response.text, spans)
    held = [[] for _ in answer.offsets]
    for span, (first, stop) in zip(spans, ranges, strict=True):
        for t in range(first, stop):
            held[t].append(span)
    return held


def texts_of_tokens(tokenizer, answer):
    """The response cut at its tokens, nothing lost; special tokens by name, the rest of a split character as ·."""
    texts, reached, special = [], 0, tokenizer.all_special_ids
    for token, (_, end) in zip(answer.response_ids, answer.offsets, strict=True):
        own = answer.response.text[reached:end]
        texts.append(own or (tokenizer.decode([token]) if token in special else "·"))
        reached = max(reached, end)
    return texts

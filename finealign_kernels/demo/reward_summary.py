"""The terminal table and the HTML report of a run with --reward."""

import textwrap
from importlib.metadata import version
from pathlib import Path

import torch

from .. import __version__, report
from .data import cut_facts, spans_of_tokens, texts_of_tokens
from .models import name_of
from .summary import faults_of, text_table

SHADES = [report.Shade("segment score", "worse than the mean", "better", signed=True)]
PARTS = 5  # parts of the held-out pairs, by strength
DRAWN = ("right labels", "as labelled", "flip", "flip, margin", "soft labels")  # at most four of these have a curve
SHOWN = 4  # number of pairs in the report


def parts_by(values, count):
    """Indices of the pairs in `count` parts of about the same size, sorted by ascending value."""
    return values.argsort(stable=True).tensor_split(min(count, len(values)))


def accuracies(result):
    """The accuracy of each seed (SEEDS,), by arm."""
    return {name: right.float().mean(1) for name, right in result.right.items()}


def table(result):
    """Columns and rows: held-out accuracy of each arm, smallest and largest of its seeds, and by strength."""
    parts = parts_by(result.sure, PARTS)
    rows = []
    for name, each in accuracies(result).items():
        by_part = [_percent(result.right[name][:, part].float().mean()) for part in parts]
        spread = f"{100 * each.min():.1f} to {100 * each.max():.1f}"
        rows.append([name, _percent(each.mean()), spread, *by_part])
    numbers = [str(1 + part) for part in range(len(parts))]  # with fewer than PARTS pairs, each part is one pair
    names = ["weakest fifth", *numbers[1:-1], "strongest"] if len(parts) == PARTS else numbers
    return ["loss", "accuracy, %", "seeds", *names], rows


def _percent(share):
    """With one decimal in every row, so that a column can be compared."""
    return f"{100 * share.item():.1f}"


def flip_precision(result):
    """Share of wrong labels among the pairs that "flip" flips; None if unknown, or if it flips none."""
    picked = result.train.planted[result.weakest]
    return picked.float().mean().item() if result.train.planted.any() and len(picked) else None


def lowest_is_marked(result):
    """For held-out answers with marked and unmarked segments: how often the segment of lowest score is a marked one.

    Returns (share of such answers, the share expected by chance, their number), or None if there are none.
    """
    bounds, hits, chances = result.held.cu_seqlens.tolist(), [], []
    for answer, start, stop in zip(result.held.answers, bounds, bounds[1:], strict=False):
        marks = spans_of_tokens(answer.answer)
        bad = [any(_is_fault(span) for t in range(*ends) for span in marks[t]) for ends in answer.segments]
        if any(bad) and not all(bad):
            hits.append(bad[int(result.scores[start:stop].argmin())])
            chances.append(sum(bad) / len(bad))
    return (sum(hits) / len(hits), sum(chances) / len(chances), len(hits)) if hits else None


def _is_fault(span):
    return span.score is None or span.score <= 0


def summary(options, result):
    """The table of the arms and a sentence that explains it, for the terminal."""
    sentence = textwrap.fill(_sentence(options, result), 100)
    return f"\naccuracy on held-out pairs, and by strength\n{text_table(*table(result))}\n\n{sentence}\n"


def _sentence(options, result):
    mean = {name: 100 * each.double().mean().item() for name, each in accuracies(result).items()}
    named = ", ".join(f"{value:.1f}% with “{name}”" for name, value in mean.items() if name != "as labelled")
    what = "judgements" if options.data else "pairs"
    text = (
        f"Trained on the labels as they are, heads rank {mean['as labelled']:.1f}% of held-out {what} right; {named}."
    )
    share, marked = flip_precision(result), lowest_is_marked(result)
    if share is not None:
        text += f" Of the {int(result.weakest.sum())} weakest pairs {share:.0%} had flipped labels"
        text += f" ({result.train.planted.float().mean().item():.0%} of all have)."
    if marked is not None:
        text += (
            f" In {marked[0]:.0%} of {marked[2]} held-out answers with a marked fault, the segment with the lowest "
            f"score is a marked one; by chance it would be {marked[1]:.0%}."
        )
    return text


def write_report(options, tokenizer, result):
    """Writes the page and returns its path."""
    title = f"Reward models on {Path(name_of(options)).name}, {len(result.train.pairs)} pairs"
    sections = [
        report.headline(title, _sentence(options, result), _facts(options, result)),
        _tokens_section(tokenizer, result),
        _arms_section(options, result),
        _curves_section(options, result),
        _strength_section(options, result),
        _votes_section(result),
    ]
    return report.write(options.report, title, sections)


def _facts(options, result):
    return {
        "model": name_of(options),
        "body": "first half of its layers, frozen",
        "pairs to train on": len(result.train.pairs),
        "held-out pairs": len(result.held.pairs),
        "flipped labels": f"{result.train.planted.float().mean().item():.0%}" if not options.data else "not known",
        "flipped by “flip”": f"{int(result.weakest.sum())} weakest",
        "data": Path(options.data).name if options.data else "faults planted in the shipped sample",
        **cut_facts(options),
        "seed": options.seed,
        "threads": torch.get_num_threads(),
        "finealign-kernels": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def _arms_section(options, result):
    truth = "the judgements as they are" if options.data else "the right labels"
    note = (
        f"Share of held-out pairs in which the better answer (by {truth}) has the higher score: the mean over the "
        "seeds, the smallest and largest of them, and the mean in each fifth of the pairs by strength. The prompts of "
        "these pairs were not trained on. Strength is the absolute mean difference of the scores of several models, "
        f"trained on the labels as they are. There are only {len(result.held.pairs)} such pairs, so a difference of a "
        "few points may be chance."
    )
    return report.table("Losses, judged by held-out pairs", *table(result), note=note)


def _curves_section(options, result):
    parts = parts_by(result.sure, PARTS)
    drawn = [name for name in DRAWN if name in result.right and not (options.data and name == "right labels")][:4]
    series = [
        report.Series(name, [100 * result.right[name][:, part].float().mean().item() for part in parts])
        for name in drawn
    ]
    charts = [report.Chart("held-out pairs ranked right, %, by fifth of strength (1: weakest)", series)]
    tenths = parts_by(result.strength.mean, 10)
    if result.train.planted.any():
        values = [100 * result.train.planted[part].float().mean().item() for part in tenths]
        title = "flipped labels, %, by tenth of strength (1: lowest)"
        charts.append(report.Chart(title, [report.Series("pairs trained on", values)]))
    agreed = [100 * result.strength.vote[part].mean().item() for part in tenths]
    charts.append(
        report.Chart(
            "models that agree with the label, %, by tenth of strength (1: lowest)",
            [report.Series("pairs trained on", agreed)],
        )
    )
    note = (
        "The first chart shows held-out pairs. Where the models are unsure, every loss is right in about half of the "
        "pairs. The other charts show training pairs. A low strength means that the models contradict a label although "
        "they were trained on it."
    )
    return report.curves("By strength", charts, note=note)


def _strength_section(options, result):
    mean, std = result.strength.mean, result.strength.std
    charts = [report.Histogram("pairs by mean difference", mean.tolist(), "mean difference", bins=24)]
    if result.train.planted.any():
        own = mean[result.train.planted].tolist()
        charts.append(report.Histogram("pairs with a flipped label", own, "mean difference", bins=24))
    charts.append(
        report.Scatter(
            "standard deviation against mean", mean.tolist(), std.tolist(), "mean difference", "standard deviation"
        )
    )
    note = (
        "Training pairs: the score of the chosen answer minus that of the rejected one, as mean and standard deviation "
        f"over the models. The mean is below 0 for {int((mean < 0).sum())} of {len(mean)} pairs."
    )
    return report.distributions("Preference strength", charts, note=note)


def _votes_section(result):
    """A table of accuracy by the number of votes in the data; None if the data counts no votes."""
    votes = [pair.votes for pair in result.held.pairs]
    known = sorted({vote for vote in votes if vote is not None})
    if not known:
        return None
    rows = []
    for name, right in result.right.items():
        share = [_percent(right[:, [v == vote for v in votes]].float().mean()) for vote in known]
        rows.append([name, *share])
    counts = [f"{vote:g} ({sum(v == vote for v in votes)} pairs)" for vote in known]
    note = "Held-out pairs, by how many votes more the chosen answer had. More votes mean that people agreed more."
    return report.table("Ranked right, %, by votes", ["loss", *counts], rows, note=note)


def _tokens_section(tokenizer, result):
    note = (
        "Held-out pairs. The colour of a segment is its score minus the mean of all held-out segments: blue raises "
        "the score of the answer, red lowers it. The score of an answer is the mean over its segments. The model was "
        "trained on which answer was preferred; it never saw which segment was wrong. Faults marked in the data are "
        "underlined and listed. A line before a token marks the start of a segment. Scores are from the first model "
        "of the arm “flip, margin”."
    )
    examples = [_example(tokenizer, result, i) for i in range(min(SHOWN, len(result.held.pairs)))]
    return report.token_texts("The score of each segment", examples, SHADES, note=note)


def _example(tokenizer, result, i):
    pair, count = result.held.pairs[i], len(result.held.pairs)
    responses = [_response(tokenizer, result, i + k * count, side) for k, side in enumerate(("chosen", "rejected"))]
    return report.Example(pair.example.id, pair.example.prompt, responses)


def _response(tokenizer, result, s, side):
    read, level = result.held.answers[s], result.scores.mean()
    start, stop = result.held.cu_seqlens[s : s + 2].tolist()
    own = (result.scores[start:stop] - level).tolist()
    values, starts = [0.0] * len(read.answer.offsets), [False] * len(read.answer.offsets)
    for score, (first, end) in zip(own, read.segments, strict=True):
        starts[first] = first > 0
        for t in range(first, end):
            values[t] = score
    spans = spans_of_tokens(read.answer)
    tokens = [
        report.Token(
            text,
            {"segment score": values[t]},
            [span.kind for span in spans[t]],
            "; ".join(span.kind for span in spans[t]),
            starts[t],
        )
        for t, text in enumerate(texts_of_tokens(tokenizer, read.answer))
    ]
    return report.Response(side, tokens, f"score {report.signed(sum(own) / len(own))}", faults_of(read.answer))

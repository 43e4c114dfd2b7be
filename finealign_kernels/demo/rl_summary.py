"""The terminal table and the HTML report of a run with --rl."""

import textwrap
from pathlib import Path

import torch

from .. import report
from .data import spans_of_tokens, texts_of_tokens
from .options import lr_of
from .rl_rollouts import KL, LAM, SORTS, UPDATES
from .summary import (
    bars_section,
    faults_of,
    head_facts,
    head_section,
    head_sentence,
    rows_read,
    table,
    text_table,
)

SHADES = [
    report.Shade("reward", "a fault, or worse than the start", "preferred", signed=True),
    report.Shade("advantage", "to suppress", "to reinforce", signed=True),
    report.Shade("mask", "left out", "trained"),
    report.Shade("push", "less likely", "more likely", signed=True),
]
SHOWN = 2  # number of prompts in the report


def summary(options, model, rollout, updates, costs):
    """The table of the loss head and a sentence that explains it, for the terminal."""
    body = text_table(*table(updates, costs))
    sentence = textwrap.fill(f"{_sentence(options, updates)} {head_sentence(updates, costs)}", 100)
    sentence += "" if rollout.adaptive is None else "\nThe pivot mask acts from update 1 on."
    return f"\nloss head, forward and backward: {rows_read(model, rollout)}\n{body}\n\n{sentence}\n"


def write_report(options, model, updates, last, costs):
    """Writes the page and returns its path."""
    title = f"{options.rl.upper()} on {Path(model.name).name}, {options.steps} updates"
    sections = [
        report.headline(title, _sentence(options, updates), _facts(options, model, last.batch)),
        _tokens_section(model, last),
        _rewards_section(last.batch),
        _curves_section(updates),
        head_section(model, last.batch, updates, costs),
        bars_section(costs),
    ]
    return report.write(options.report, title, sections)


def _sentence(options, updates):
    final = updates[-1]
    return (
        f"In {options.steps} updates the log-probs of tokens to reinforce moved by {final.raised:+.3g} nats "
        f"since the start, and those of tokens to suppress by {final.lowered:+.3g} (means over the last answers). "
        "A token is to be reinforced if its advantage is above 0, and to be suppressed if it is below 0."
    )


def _facts(options, model, rollout):
    own = {
        "ppo": {"advantages": f"GAE, λ = {LAM}, whitened", "KL penalty in the reward": KL, "critic": "linear, from 0"},
        "grpo": {"advantages": "among the answers to one prompt, in standard deviations"},
    }
    return {
        "policy loss": options.rl,
        **own[options.rl],
        "pivot mask": "none: no answer is marked"
        if rollout.adaptive is None
        else "signs of advantage and token score agree, from update 1 on",
        "updates on the same advantages": UPDATES,
        "prompts a step": options.batch,
        "learning rate": lr_of(options),
        **head_facts(options, model),
    }


def _rewards_section(rollout):
    """A table of the rewards of each sort in the last answers."""
    rows = [
        [sort, len(found.reward), found.reward.sum().item(), ", ".join(SORTS.get(sort, ["whole answers"]))]
        for sort, found in rollout.rewards.items()
    ]
    note = (
        "A span that marks a fault is a reward at its last token: its score, or -1 if it has none. The reward of a "
        "whole answer is at its last token: the share of comparisons that it won minus the share that it lost. Each "
        "sort is a reward model with segments of its own. Rewards at the same token add up."
    )
    return report.table("Rewards of the last answers", ["sort", "segments", "sum", "kinds of span"], rows, note=note)


def _curves_section(updates):
    charts = [
        report.Chart("policy loss", [report.Series("mean of the kept tokens", [one.loss for one in updates])]),
        report.Chart(
            "change of log-probs since the start, nats",
            [
                report.Series("to reinforce", [one.raised for one in updates]),
                report.Series("to suppress", [one.lowered for one in updates]),
            ],
        ),
        report.Chart("clipped ratios, %", [report.Series("tokens", [100 * one.clipped for one in updates])]),
    ]
    if updates[0].value_loss is not None:
        charts.append(report.Chart("value loss", [report.Series("critic", [one.value_loss for one in updates])]))
    note = (
        f"Every {UPDATES} updates take the next answers and compute their advantages with the policy at that time. In "
        "the first of these updates all ratios are therefore 1, and the loss is minus the mean advantage of the kept "
        "tokens."
    )
    return report.curves("Update by update", charts, note=note)


def _tokens_section(model, last):
    rollout = last.batch
    note = (
        "Answers to the last prompts. Blue is good or more likely, red is bad or less likely. A reward is at the last "
        "token of its segment. The advantage of a token is computed from the rewards at it and after it. The mask "
        "keeps a token to reinforce if its own score is above the mean of the batch, and a token to suppress if it is "
        "below. The push is minus the gradient of the loss with respect to the log-probability of the token: above 0 "
        "makes it more likely."
    )
    groups = range(min(SHOWN, int(rollout.group.max()) + 1))
    examples = [
        _example(model, last, [s for s, g in enumerate(rollout.group.tolist()) if g == group]) for group in groups
    ]
    return report.token_texts("From rewards to advantages", examples, SHADES, note=note)


def _example(model, last, sequences):
    responses = [_response(model, last, s, f"answer {i + 1}") for i, s in enumerate(sequences)]
    return report.Example(last.batch.names[sequences[0]], last.batch.prompts[sequences[0]], responses)


def _response(model, last, s, name):
    rollout = last.batch
    answer, read = rollout.answers[s], rollout.mask[s]
    numbers = {
        "reward": rollout.reward,
        "advantage": rollout.advantage,
        "mask": rollout.token_weight,
        "push": -last.head.dlogp,
        "log-prob": last.head.logp,
    }
    numbers = {name: values[s][read].tolist() for name, values in numbers.items()}
    spans = spans_of_tokens(answer)
    tokens = [
        report.Token(
            text,
            {name: values[t] for name, values in numbers.items()},
            [span.kind for span in spans[t]],
            "; ".join(f"{span.kind}: {span.label}" if span.label else span.kind for span in spans[t]),
        )
        for t, text in enumerate(texts_of_tokens(model.tokenizer, answer))
    ]
    total = torch.where(read, rollout.reward[s], 0).sum().item()
    return report.Response(name, tokens, f"reward {report.signed(total)}", faults_of(answer))

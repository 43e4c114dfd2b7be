"""Which tokens of a batch have a gradient: scores from the policy, the spans or a file, then pivots and a mask."""

import torch

from .. import feedback
from ..losses.pivots import adaptive_mask, implicit_scores, pivot_flags
from ..ops.logprobs import linear_logprobs
from .options import UsageError, baseline_of, beta_of, percent_of, scores_of, threshold_of


def read_scores(options, examples):
    """The examples whose spans give the token scores, by id; None if token scores do not come from spans."""
    if scores_of(options) in (None, "implicit"):
        return None
    if options.scores == "spans":
        return {example.id: example for example in examples}
    try:
        found = feedback.read(options.scores)
    except (OSError, ValueError) as error:
        raise UsageError(f"--scores must be implicit, spans or a feedback file: {error}") from None
    return {example.id: example for example in found}


def scored_spans(options, scored, example, index):
    """The scored spans of one response, from the result of `read_scores`."""
    if scored is None:
        return ()
    found = scored.get(example.id)
    text = example.responses[index].text
    if found is None or index >= len(found.responses) or found.responses[index].text != text:
        raise UsageError(
            f"--scores {options.scores} must hold the responses of --data, got another or none as response {index} of "
            f"{example.id!r}"
        )
    return found.responses[index].spans


def span_scores(offsets, text, spans):
    """The score of each token: the sum of the scores of its spans. A span without a score counts -1."""
    scores = [0.0] * len(offsets)
    for span, (first, stop) in zip(spans, feedback.token_spans(offsets, text, spans), strict=True):
        for t in range(first, stop):
            scores[t] += -1.0 if span.score is None else span.score
    return scores


def masked(options, model, hidden, batch):
    """The batch with its adaptive mask multiplied into token_weight, and with the scores and pivots behind it."""
    score = batch.token_score
    if scores_of(options) == "implicit":
        with torch.no_grad():
            logp = linear_logprobs(hidden, model.weight, batch.labels, mask=batch.mask).logp
        beta = 1.0 if options.loss == "nll" else beta_of(options)
        score = implicit_scores(logp, batch.start_logp, mask=batch.mask, beta=beta)
    pivots = None if options.pivots is None else pivot_flags(score, mask=batch.mask, **_kind(options))
    side = 1 if options.loss == "nll" else "halves"
    segments = pivots if options.keep == "segments" else None
    adaptive = adaptive_mask(score, mask=batch.mask, side=side, pivots=segments, **baseline_of(options))
    if options.keep == "pivots":
        weight = adaptive.token_weight * pivots
        adaptive = adaptive._replace(token_weight=weight, kept=(weight != 0).sum() / batch.mask.sum().clamp(min=1))
    weight = batch.span_weight * adaptive.token_weight
    return batch._replace(token_weight=weight, token_score=score, pivots=pivots, adaptive=adaptive)


def unmasked(batch):
    """The same batch without its mask."""
    return batch._replace(token_weight=batch.span_weight, adaptive=None)


def _kind(options):
    own = {
        "threshold": {"threshold": threshold_of(options), "unit": "std"},
        "sign": baseline_of(options),
        "salience": {"percent": percent_of(options), **baseline_of(options)},
    }
    return {"kind": options.pivots, **own[options.pivots]}

"""Fine-grained feedback as data: files of judged responses, and the way from character spans to tokens.

A feedback file is JSONL in UTF-8: one JSON object a line, an `Example`. (Line breaks and `//` below are for reading.)

    {"id": "seasons-1",
     "prompt": "Why is it colder in winter?",
     "responses": [                                    // one or more
       {"text": "Because the Earth is further from the Sun. The days are shorter, too.",
        "spans": [{"start": 8, "end": 41,              // characters of text, end exclusive
                   "kind": "factual",                  // any word; weights and rewards are chosen by it
                   "label": "the tilt of the axis is the cause",                     // optional, for readers
                   "score": -1.0,                      // optional, reward of the segment
                   "text": "the Earth is further from the Sun"}],           // optional, compared with the response
        "score": 0.2},                                 // optional, 0 to 1; 1 is a demonstration
       {"text": "The Earth's axis is tilted, so in winter the Sun stands low.", "score": 1.0}],
     "preferences": [                                  // optional
       {"chosen": 1, "rejected": 0,                    // indices into responses
        "strength": 3}]}                               // optional, votes for it

Offsets count code points, as Python's str does: "é" may be one or two, most emoji are one, not two as in JavaScript;
`to_spans(text, spans, unit="utf-16")` converts those of a tool that counts as JavaScript does (label-studio).
Optional fields may be left out or null, lists may be empty; a field that is not named here is an error.

Each training task takes what it needs from the same file: preference losses the pairs and, by way of `token_weights`,
the spans; reinforcement learning the spans as segment rewards, by kind; reward models the pairs with their strength;
point-wise losses the scores.

    example = read("feedback.jsonl")[0]
    response = example.responses[0]
    encoded = encode(tokenizer, example.prompt, response)
    weights = token_weights(encoded.offsets, response.text, response.spans, inside=2.0, by_kind={"repetition": 1.5})

`pair_weights` has the rule for both responses of a pair: faults weigh more in the rejected one, less in the chosen one.

Where a policy's own responses are judged, sentence by sentence, each reward stands at its segment's last token:

    text, offsets = decode(tokenizer, generated_ids)
    end = segment_tokens(offsets, text, sub_sentences(text))  # indices into the response

`finealign_kernels.segment_rewards` makes SegmentRewards of a batch of such texts: columns, by the batch's mask.

`read` takes QA-Feedback's JSON list as well (arXiv:2306.01693), see `files.qa_feedback_example`. `sample` is a small
file of that schema that comes with the package; its kinds are factual, reasoning, irrelevant, repetition, incomplete,
and its strengths, out of three votes, were set by hand.
"""

from .files import read, sample, write
from .records import Example, Preference, Response, Span, to_spans
from .segments import segment_tokens, sentences, sub_sentences
from .spans import (
    Decoded,
    Encoded,
    decode,
    encode,
    pair_weights,
    response_weights,
    token_segments,
    token_spans,
    token_weights,
)

__all__ = [
    "Decoded",
    "Encoded",
    "Example",
    "Preference",
    "Response",
    "Span",
    "decode",
    "encode",
    "pair_weights",
    "read",
    "response_weights",
    "sample",
    "segment_tokens",
    "sentences",
    "sub_sentences",
    "to_spans",
    "token_segments",
    "token_spans",
    "token_weights",
    "write",
]

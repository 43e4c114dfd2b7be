"""Fine-grained feedback as data: files of annotated responses, and functions from character spans to tokens.

A feedback file is JSONL in UTF-8. Each line is a JSON object, read as an `Example`. (The line breaks and `//` comments
below are for the reader only.)

    {"id": "seasons-1",
     "prompt": "Why is it colder in winter?",
     "responses": [                                    // one or more
       {"text": "Because the Earth is further from the Sun. The days are shorter, too.",
        "spans": [{"start": 8, "end": 41,              // characters of text, end exclusive
                   "kind": "factual",                  // any word; weights and rewards depend on it
                   "label": "the tilt of the axis is the cause",                     // optional comment
                   "score": -1.0,                      // optional, the reward of this segment
                   "text": "the Earth is further from the Sun"}],           // optional, compared with the response
        "score": 0.2},                                 // optional, 0 to 1; 1 means a demonstration
       {"text": "The Earth's axis is tilted, so in winter the Sun stands low.", "score": 1.0}],
     "preferences": [                                  // optional
       {"chosen": 1, "rejected": 0,                    // indices into responses
        "strength": 3}]}                               // optional, number of votes for it

Offsets count code points, as Python's str does: most emoji are one, and "é" is one or two. JavaScript and tools written
in it (label-studio) count UTF-16 code units, of which most emoji are two; `to_spans(text, spans, unit="utf-16")`
converts their offsets. Optional fields may be left out or null, and lists may be empty. Any other field is an error.

All training tasks read the same file. Preference losses use the pairs, and the spans as token weights. Reinforcement
learning uses the spans as segment rewards. Reward models use the pairs and their strength. Point-wise losses use
the scores.

    example = read("feedback.jsonl")[0]
    response = example.responses[0]
    encoded = encode(tokenizer, example.prompt, response)
    weights = token_weights(encoded.offsets, response.text, response.spans, inside=2.0, by_kind={"repetition": 1.5})

`pair_weights` gives the weights of both responses of a pair: a fault weighs more in the rejected one and less in the
chosen one.

If a reward model judges the policy's own responses sentence by sentence, each reward is placed at the last token of its
sentence:

    text, offsets = decode(tokenizer, generated_ids)
    end = segment_tokens(offsets, text, sub_sentences(text))  # indices into the response

`finealign_kernels.segment_rewards` does this for a batch of texts and gives columns of the batch.

`read` also reads the JSON list of QA-Feedback (arXiv:2306.01693), see `files.qa_feedback_example`. `sample` returns a
small feedback file that comes with the package. Its kinds are factual, reasoning, irrelevant, repetition and
incomplete; its strengths (votes out of three) were set by hand.
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

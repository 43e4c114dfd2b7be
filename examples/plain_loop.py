"""From marked text to an optimizer step, without a trainer: python examples/plain_loop.py [--model NAME] [--steps N]"""

import argparse

import torch
from tiny import load

import finealign_kernels as fk
from finealign_kernels import feedback
from finealign_kernels.integrations.transformers import model_logprobs


def encoded_pairs(tokenizer):
    """Tokens and token weights of each pair of the shipped sample: a fault weighs 2 rejected, ½ chosen."""
    for example in feedback.sample():
        for preference in example.preferences:
            sides = [example.responses[i] for i in (preference.chosen, preference.rejected)]
            encoded = [feedback.encode(tokenizer, example.prompt + "\n", side) for side in sides]
            judged = [(e.offsets, side.text, side.spans) for e, side in zip(encoded, sides, strict=True)]
            yield list(zip(encoded, feedback.pair_weights(*judged, span_weight=2.0), strict=True))


def batch_of(pairs):
    """Padded tensors, all chosen responses, then all rejected ones. Column t of mask and weight is token t + 1."""
    rows = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    length = max(len(encoded.input_ids) for encoded, _ in rows)
    ids, there = torch.zeros(len(rows), length, dtype=torch.int64), torch.zeros(len(rows), length, dtype=torch.int64)
    labels, weight = torch.full_like(ids, -100), torch.ones(len(rows), length - 1)
    for r, (encoded, weights) in enumerate(rows):
        tokens, start, stop = torch.tensor(encoded.input_ids), encoded.response_start, len(encoded.input_ids)
        ids[r, :stop], there[r, :stop], labels[r, start:stop] = tokens, 1, tokens[start:]
        weight[r, start - 1 : stop - 1] = torch.tensor(weights)
    return ids, there, labels, weight


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a causal LM of transformers; without it a tiny one")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args(argv)
    (model, tokenizer), (reference, _) = load(options.model), load(options.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pairs, losses = list(encoded_pairs(tokenizer)), []
    for step in range(options.steps):
        ids, there, labels, weight = batch_of([pairs[(4 * step + i) % len(pairs)] for i in range(4)])
        with torch.no_grad():
            ref_logp = model_logprobs(reference, ids, there, labels).scores.logp
        scores, mask = model_logprobs(model, ids, there, labels)
        out = fk.dpo(scores.logp, ref_logp, mask=mask, token_weight=weight, average="kept")
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
        print(f"step {step + 1}: loss {losses[-1]:.4f}, margin {out.margins.mean().item():+.4f}")
    return losses


if __name__ == "__main__":
    main()

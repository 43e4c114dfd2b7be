"""A reward model from pairs with the strength of each preference: python examples/reward_model.py [--model NAME]

The scores of chosen and rejected responses should be as far apart as more judges agreed: the votes are a margin.
"""

import argparse

import torch
from tiny import load

import finealign_kernels as fk
from finealign_kernels import feedback


def pairs(tokenizer):
    """The shipped sample as tokens: chosen, rejected, and how many of three judges preferred it."""
    for example in feedback.sample():
        for preference in example.preferences:
            sides = [example.responses[i] for i in (preference.chosen, preference.rejected)]
            yield [feedback.encode(tokenizer, example.prompt, side).input_ids for side in sides], preference.strength


class Scored(torch.nn.Module):
    """A number a response: a linear head on the last token."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.head = backbone, torch.nn.Linear(backbone.config.hidden_size, 1)

    def forward(self, rows):
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        there = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        hidden = self.backbone(input_ids=ids, attention_mask=there).last_hidden_state
        return self.head(hidden[torch.arange(len(rows)), lengths - 1])[:, 0]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a causal LM of transformers; without it a tiny one")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(argv)
    model, tokenizer = load(options.model)
    scorer, losses = Scored(model.base_model), []
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=1e-3)
    data = list(pairs(tokenizer))
    for step in range(options.steps):
        batch = [data[(6 * step + i) % len(data)] for i in range(6)]
        strength = torch.tensor([float(votes or 0) for _, votes in batch])
        scores = scorer([sides[0] for sides, _ in batch]), scorer([sides[1] for sides, _ in batch])
        out = fk.reward_loss("adaptive_margin", scores, strength=strength, scale=0.2)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
        print(f"step {step + 1}: loss {losses[-1]:.4f}, {out.accuracies.mean().item():.0%} of the pairs right")
    return losses


if __name__ == "__main__":
    main()

"""PPO with two reward models of different density, KL penalty, critic and GAE: python examples/ppo_fine_grained.py

The dense model judges every eight tokens, the other one the whole response. `accelerate launch` spreads it over ranks:
advantages are whitened over all of them. --checkpoint FILE resumes where FILE stopped, and is written after each step.
"""

import argparse
import os

import torch
from accelerate import Accelerator
from tiny import load
from torch import nn

import finealign_kernels as fk
from finealign_kernels import feedback
from finealign_kernels.integrations.transformers import model_logprobs

LENGTH = 24  # tokens of a response


class Critic(nn.Module):
    """A value of each position, on a backbone of its own."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(backbone.config.hidden_size, 1)

    def forward(self, ids):
        return self.head(self.backbone(input_ids=ids).last_hidden_state)[..., 0]


def judge(tokenizer, responses, mask):
    """Rewards of both models: the share of letters in every eight tokens, and of blanks in all of the response."""
    dense, ends, count, whole, last = [], [], [0], [], []
    for ids, there in zip(responses.tolist(), mask.tolist(), strict=True):
        ids = ids[: sum(there)]
        for start in range(0, len(ids), 8):
            text = tokenizer.decode(ids[start : start + 8], skip_special_tokens=True)
            dense.append(sum(c.isascii() and c.isalpha() for c in text) / 8)
            ends.append(min(start + 8, len(ids)) - 1)
        count.append(len(dense))
        whole.append(tokenizer.decode(ids, skip_special_tokens=True).count(" ") / LENGTH)
        last.append(len(ids) - 1)
    rows = torch.arange(len(mask) + 1)
    return [
        fk.SegmentRewards(torch.tensor(dense), torch.tensor(ends), torch.tensor(count), weight=1.0),
        fk.SegmentRewards(torch.tensor(whole), torch.tensor(last), rows, weight=0.5),
    ]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a causal LM of transformers; without it a tiny one")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--checkpoint", help="file to resume from, if it is there, and to write")
    options = parser.parse_args(argv)
    accelerator, (policy, tokenizer) = Accelerator(cpu=not torch.cuda.is_available()), load(options.model)
    reference, critic = load(options.model)[0].eval(), Critic(load(options.model)[0].base_model)
    optimizers = [torch.optim.AdamW(policy.parameters(), lr=1e-3), torch.optim.AdamW(critic.parameters(), lr=1e-3)]
    state, rewards = [policy, critic, *optimizers], []
    if options.checkpoint and os.path.exists(options.checkpoint):
        saved = torch.load(options.checkpoint)
        for part, values in zip(state, saved["parts"], strict=True):
            part.load_state_dict(values)
        rewards = saved["rewards"]
    policy, critic, *optimizers = accelerator.prepare(policy, critic, *optimizers)
    reference.to(accelerator.device)
    prompts = [tokenizer(example.prompt[-16:]).input_ids[-16:] for example in feedback.sample()]
    for step in range(len(rewards), options.steps):
        torch.manual_seed(1000 * step + accelerator.process_index)
        prompt = torch.tensor([prompts[(8 * step + i) % len(prompts)] for i in range(8)], device=accelerator.device)
        ids = accelerator.unwrap_model(policy).generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=LENGTH, min_new_tokens=LENGTH
        )
        start, mask = prompt.shape[1], torch.ones_like(ids[:, prompt.shape[1] :], dtype=torch.bool)
        labels = ids.masked_fill(torch.arange(ids.shape[1], device=ids.device) < start, -100)

        def scores(model, ids=ids, labels=labels, start=start):
            return model_logprobs(model, ids, labels=labels).scores.logp[:, start - 1 :]

        with torch.no_grad():
            old, ref, values = scores(policy), scores(reference), critic(ids)[:, start - 1 : -1]
        models = judge(tokenizer, ids[:, start:], mask)
        found = fk.advantages(
            models, values, old_logp=old, ref_logp=ref, kl_coef=0.02, mask=mask, sum_moments=accelerator.reduce
        )
        for _ in range(2):
            accelerator.backward(fk.policy_loss("ppo", scores(policy), old, found.advantages, mask=mask).loss)
            accelerator.backward(fk.value_loss(critic(ids)[:, start - 1 : -1], values, found.returns, mask=mask).loss)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        rewards.append(sum((m.weight * m.reward.sum()).item() for m in models) / len(mask))
        accelerator.print(f"step {step + 1}: reward {rewards[-1]:.3f}, KL {found.kl.sum(1).mean():.3f}")
        if options.checkpoint and accelerator.is_main_process:
            parts = [accelerator.unwrap_model(policy), accelerator.unwrap_model(critic), *optimizers]
            torch.save({"parts": [part.state_dict() for part in parts], "rewards": rewards}, options.checkpoint)
    return rewards


if __name__ == "__main__":
    main()

"""PPO with two reward models of different density, KL penalty, critic and GAE: python examples/ppo_fine_grained.py

The dense model judges every eight characters, the other one the whole response. `accelerate launch` spreads it over
ranks: advantages are whitened over all of them. The policy has LoRA adapters, and the reference is the model without
them. --checkpoint FILE resumes where FILE stopped, and is written after each step.
"""

import argparse
import os

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from tiny import Critic, load

import finealign_kernels as fk
from finealign_kernels import feedback
from finealign_kernels.integrations.transformers import model_logprobs

LENGTH = 24  # tokens of a response


def judge(tokenizer, responses, mask):
    """Rewards of both models: the share of letters in every eight characters, and of blanks in all of the response."""
    texts, offsets = zip(*(feedback.decode(tokenizer, ids) for ids in responses.tolist()), strict=True)
    cut = [[(i, min(i + 8, len(text))) for i in range(0, len(text), 8)] for text in texts]
    parts = [[text[a:b] for a, b in row] for text, row in zip(texts, cut, strict=True)]
    letters = [[sum(c.isascii() and c.isalpha() for c in part) / 8 for part in row] for row in parts]
    blanks, whole = [[text.count(" ") / LENGTH] for text in texts], [[(0, len(text))] for text in texts]
    dense = fk.segment_rewards(letters, texts, offsets, cut, mask=mask)
    return [dense, fk.segment_rewards(blanks, texts, offsets, whole, mask=mask, weight=0.5)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a causal LM of transformers; without it a tiny one")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--checkpoint", help="file to resume from, if it is there, and to write")
    options = parser.parse_args(argv)
    accelerator, (policy, tokenizer) = Accelerator(cpu=not torch.cuda.is_available()), load(options.model)
    policy = get_peft_model(policy, LoraConfig(r=8, target_modules="all-linear"))
    critic = Critic(load(options.model)[0].base_model)
    groups = {"params": policy.parameters(), "lr": 5e-3}, {"params": critic.parameters()}
    optimizer, rewards = torch.optim.AdamW(groups, lr=1e-3), []
    if options.checkpoint and os.path.exists(options.checkpoint):
        saved = torch.load(options.checkpoint)
        for part, values in zip((policy, critic, optimizer), saved["parts"], strict=True):
            part.load_state_dict(values)
        rewards = saved["rewards"]
    policy, critic, optimizer = accelerator.prepare(policy, critic, optimizer)
    prompts = [tokenizer(example.prompt[-16:]).input_ids[-16:] for example in feedback.sample()]
    sampling = dict(do_sample=True, max_new_tokens=LENGTH, min_new_tokens=LENGTH)
    for step in range(len(rewards), options.steps):
        torch.manual_seed(1000 * step + accelerator.process_index)
        prompt = torch.tensor([prompts[(8 * step + i) % len(prompts)] for i in range(8)], device=accelerator.device)
        bare = accelerator.unwrap_model(policy)
        ids = bare.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **sampling)
        start, mask = prompt.shape[1], torch.ones_like(ids[:, prompt.shape[1] :], dtype=torch.bool)
        labels = ids.masked_fill(torch.arange(ids.shape[1], device=ids.device) < start, -100)

        def scores(model, ids=ids, labels=labels, start=start):
            return model_logprobs(model, ids, labels=labels).scores.logp[:, start - 1 :]

        with torch.no_grad():
            old, values = scores(policy), critic(ids)[:, start - 1 : -1]
            with bare.disable_adapter():
                ref = scores(bare)
        models = judge(tokenizer, ids[:, start:], mask)
        shaped = dict(old_logp=old, ref_logp=ref, kl_coef=0.02, mask=mask, sum_moments=accelerator.reduce)
        found = fk.advantages(models, values, **shaped)
        for _ in range(2):
            accelerator.backward(fk.policy_loss("ppo", scores(policy), old, found.advantages, mask=mask).loss)
            accelerator.backward(fk.value_loss(critic(ids)[:, start - 1 : -1], values, found.returns, mask=mask).loss)
            optimizer.step()
            optimizer.zero_grad()
        rewards.append(sum((m.weight * m.reward.sum()).item() for m in models) / len(mask))
        accelerator.print(f"step {step + 1}: reward {rewards[-1]:.3f}, KL {found.kl.sum(1).mean():.3f}")
        if options.checkpoint and accelerator.is_main_process:
            parts = [bare, accelerator.unwrap_model(critic), optimizer]
            torch.save({"parts": [part.state_dict() for part in parts], "rewards": rewards}, options.checkpoint)
    return rewards


if __name__ == "__main__":
    main()

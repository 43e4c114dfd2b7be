"""OpenRLHF's losses and GAE by this library, called as OpenRLHF calls them: python examples/openrlhf_losses.py

An OpenRLHF run calls finealign_kernels.integrations.openrlhf.install() in its entry script and in each Ray worker, and
its trainers then find these classes. Here they train a policy and its critic without OpenRLHF.
"""

import argparse

import torch
from tiny import load
from verl_losses import sampled

from finealign_kernels.integrations import openrlhf
from finealign_kernels.integrations.transformers import model_logprobs
from finealign_kernels.integrations.verl import weigh_advantages


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a causal LM of transformers; without it a tiny one")
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args(argv)
    (model, tokenizer), found = load(options.model), []
    critic = torch.nn.Linear(model.config.hidden_size, 1)
    optimizer = torch.optim.AdamW([*model.parameters(), *critic.parameters()], lr=1e-3)
    actor_loss = openrlhf.PolicyLoss(clip_eps_high=0.28, is_correction_level="token", is_correction_gating="ratio")
    critic_loss = openrlhf.ValueLoss(clip_eps=0.2)
    for step in range(options.steps):
        ids, rewards = sampled(model, tokenizer, step)
        mask, weight = torch.ones_like(rewards), torch.ones_like(rewards)
        weight[:, ::2] = 0.5  # of the tokens, at least 0: it goes into the normalised advantages
        prompt = torch.arange(ids.shape[1]) < ids.shape[1] - rewards.shape[1]
        labels = ids.masked_fill(prompt, -100)
        counts = dict(dp_size=1, batch_num_tokens=mask.sum().item(), global_batch_size=len(ids))  # get_loss_batch_info
        old = None
        for _ in range(2):
            logp = model_logprobs(model, ids, labels=labels).scores.logp[:, -rewards.shape[1] :]
            with torch.no_grad():
                hidden = model.base_model(input_ids=ids).last_hidden_state[:, -rewards.shape[1] - 1 : -1]
            values = critic(hidden)[..., 0]
            if old is None:
                old, old_values = logp.detach(), values.detach()
                advantages, returns = openrlhf.get_advantages_and_returns(None, old_values, rewards, mask, 1.0, 0.95)
                advantages = weigh_advantages((advantages - advantages.mean()) / advantages.std(), weight)
            given = dict(action_mask=mask, rollout_log_probs=old, **counts)
            loss, clip_ratio, kl, _, _ = actor_loss(logp, old, advantages, **given)
            (loss + critic_loss(values, old_values, returns, action_mask=mask, **counts)).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(rewards.sum(1).mean().item())
        print(f"step {step + 1}: reward {found[-1]:.2f}, KL {kl.item():+.4f}, clipped {clip_ratio.item():.0%}")
    return found


if __name__ == "__main__":
    main()

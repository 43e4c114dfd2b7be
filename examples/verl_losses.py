"""The parts that a verl run takes from here, called as verl calls them: python examples/verl_losses.py [--model NAME]

A verl run needs no code: loss_mode=finealign_ppo after pip install, FINEALIGN_VERL_GAE=1, FINEALIGN_VERL_HEAD=1.
Where verl is installed the loss comes out of its registry here, too.
"""

import argparse
from types import SimpleNamespace

import torch
from tiny import load

from finealign_kernels import feedback
from finealign_kernels.integrations import verl

LENGTH = 24  # tokens of a response


def sampled(model, tokenizer, step):
    """Token ids of 8 responses to prompts of 16 tokens, and a reward for each token: 1 for a letter."""
    torch.manual_seed(step)
    prompts = [tokenizer(example.prompt[-16:]).input_ids[-16:] for example in feedback.sample()]
    prompt = torch.tensor([prompts[(8 * step + i) % len(prompts)] for i in range(8)])
    options = dict(do_sample=True, max_new_tokens=LENGTH, min_new_tokens=LENGTH)
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    said = [[tokenizer.decode([token]) for token in row] for row in ids[:, 16:].tolist()]
    return ids, torch.tensor([[float(text.isascii() and text.isalpha()) for text in row] for row in said])


def loss_function(name):
    try:
        from verl.trainer.ppo.core_algos import get_policy_loss_fn
    except ImportError:
        return verl.loss_of(name.removeprefix("finealign_"))
    return get_policy_loss_fn(name)


class Config(SimpleNamespace):
    """The fields of verl's ActorConfig that the loss uses."""

    def get(self, key, default=None):
        return getattr(self, key, default)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a causal LM of transformers; without it a tiny one")
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args(argv)
    (model, tokenizer), head, found = load(options.model), verl.FusedLinearForPPO(), []
    critic = torch.nn.Linear(model.config.hidden_size, 1)
    optimizer = torch.optim.AdamW([*model.parameters(), *critic.parameters()], lr=1e-3)
    config = Config(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=0.28, clip_ratio_c=3.0, global_batch_info={})
    policy_loss = loss_function("finealign_ppo")
    for step in range(options.steps):
        ids, rewards = sampled(model, tokenizer, step)
        mask, weight, old = torch.ones_like(rewards), torch.ones_like(rewards), None
        weight[:, ::2] = 0.5  # of the tokens, at least 0: it goes into the advantages
        for _ in range(2):
            hidden = model.base_model(input_ids=ids).last_hidden_state[:, 15:-1]
            logp, entropy = head(hidden, model.get_output_embeddings().weight, ids[:, 16:], temperature=1.0)
            values = critic(hidden.detach())[..., 0]
            if old is None:
                old = logp.detach()
                advantages, returns = verl.gae_advantage_return(rewards, values.detach(), mask, gamma=1.0, lam=0.95)
                advantages = verl.weigh_advantages(advantages, weight)
            batch = dict(old_log_prob=old, log_prob=logp, advantages=advantages, response_mask=mask)
            loss, metrics = policy_loss(**batch, loss_agg_mode="token-mean", config=config, rollout_is_weights=None)
            (loss - 0.001 * entropy.mean() + (values - returns).square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(rewards.sum(1).mean().item())
        print(f"step {step + 1}: reward {found[-1]:.2f}, KL {metrics['actor/ppo_kl']:+.4f}")
    return found


if __name__ == "__main__":
    main()

"""What tests of TRL's trainers share: a tokenizer of bytes, small models, sentences, a short training and its logs."""

import os
from functools import lru_cache

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

import transformers  # noqa: E402
from datasets import Dataset, IterableDataset  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors  # noqa: E402

BOUND = 1e-5  # relative, of loss and gradient norm at every step
STEPS = 5


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@lru_cache
def tokenizer(opens=False):
    """One token a byte; opens: every text starts with a special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    if opens:
        bytes_only.post_processor = processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    special = dict(eos_token="<eos>", pad_token="<pad>", bos_token="<eos>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_only, chat_template=TEMPLATE, **special)


KINDS = {
    "Llama": dict(tie_word_embeddings=True),
    "Qwen2": dict(tie_word_embeddings=False),
    "Qwen3": dict(head_dim=16),
    "Gemma2": dict(head_dim=16, final_logit_softcapping=2.0, attn_implementation="eager"),
    "Granite": dict(logits_scaling=2.0),
    "Cohere": dict(logit_scale=0.5),
    "Mixtral": dict(num_local_experts=2, output_router_logits=True, router_aux_loss_coef=0.01),
}


def model(kind="Llama", seed=0, **sizes):
    """A causal model with random weights; sizes: other fields of its config."""
    torch.manual_seed(seed)
    usual = dict(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        initializer_range=0.1,
    )
    config = getattr(transformers, f"{kind}Config")(**(usual | KINDS[kind] | sizes))
    return getattr(transformers, f"{kind}ForCausalLM")(config)


WORDS = ["a", "bee", "can", "do", "each", "fine", "good", "hive", "in", "jar"]


def sentence(i, length):
    return " ".join(WORDS[(i * k + k) % len(WORDS)] for k in range(1, length + 1))


ROWS = [
    {"prompt": sentence(i, 2) + " ", "chosen": sentence(i + 3, 4), "rejected": sentence(i, 2 + i % 3)}
    for i in range(12)
]


SHORT = dict(
    max_steps=STEPS,
    per_device_train_batch_size=4,
    learning_rate=1e-4,
    lr_scheduler_type="constant",
    logging_steps=1,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    seed=0,
)


def run(cls, config, folder, rows, *, tokens=None, **given):
    """A trainer after its training, and what it logged at each step; config(output_dir=...) makes its arguments."""
    trainer = cls(
        args=config(output_dir=str(folder)),
        train_dataset=rows if isinstance(rows, IterableDataset) else Dataset.from_list(rows),
        processing_class=tokens or tokenizer(),
        **given,
    )
    trainer.train()
    return trainer, logs(trainer)


def logs(trainer):
    return [log for log in trainer.state.log_history if "grad_norm" in log]


def apart(ours, stock):
    """Largest relative difference of loss and gradient norm over the steps."""
    pairs = list(zip(ours, stock, strict=True))
    assert len(pairs) >= 2
    return max(abs(one[key] - other[key]) / abs(other[key]) for one, other in pairs for key in ("loss", "grad_norm"))

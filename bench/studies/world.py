"""The world of the studies: answers whose quality is known, and a small language model that writes them.

A prompt names a topic. An answer is a few sentences of one content token and a stop, then the end token:

    fact       of the topic, not said before      +1
    repeat     of a fact that was said            -1
    elsewhere  a fact of another topic            -1
    false      a token that is never true         -1
    filler     a token that says nothing           0

Score is the sum. The base model is trained on answers in which all kinds occur, so that there is something to improve.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import finealign_kernels as fk
from finealign_kernels.integrations.transformers import model_logprobs

TOPICS, FACTS = 8, 3
END, BEGIN, STOP = 0, 1, 2
TOPIC0 = 3
FACT0 = TOPIC0 + TOPICS
FALSE0 = FACT0 + TOPICS * FACTS
FILLER0 = FALSE0 + 4
VOCAB = FILLER0 + 4
KINDS = ("fact", "repeat", "elsewhere", "false", "filler")
WORTH = {"fact": 1.0, "repeat": -1.0, "elsewhere": -1.0, "false": -1.0, "filler": 0.0}
PROMPT = 2  # tokens
LONGEST = 24  # tokens of an answer


class Answers(NamedTuple):
    """Prompts with answers, padded with END behind the first one."""

    ids: Tensor  # (S, PROMPT + T)
    mask: Tensor  # (S, PROMPT + T - 1) bool: the answer's tokens, as columns of log-probs

    @property
    def labels(self) -> Tensor:
        scored = torch.cat([self.mask.new_zeros(len(self.mask), 1), self.mask], 1)
        return torch.where(scored, self.ids, -100)

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(1)

    def __getitem__(self, rows) -> "Answers":
        return Answers(self.ids[rows], self.mask[rows])


def answers_of(ids: Tensor) -> Answers:
    """Answers with everything behind the first end token blanked."""
    body = ids[:, PROMPT:]
    body = torch.where((body == END).cumsum(1) > 0, END, body)
    read = (body == END).cumsum(1) <= 1  # up to and with the first end token
    before = read.new_zeros(len(ids), PROMPT - 1)
    return Answers(torch.cat([ids[:, :PROMPT], body], 1), torch.cat([before, read], 1))


def kinds(answers: Answers) -> list[list[tuple[str, int]]]:
    """For each answer its content tokens' kinds and columns of log-probs, in order."""
    found = []
    for ids, mask in zip(answers.ids.tolist(), answers.mask.tolist(), strict=True):
        topic, said, row = ids[1] - TOPIC0, set(), []
        for column, read in enumerate(mask):
            token = ids[column + 1]
            if not read or token < FACT0:
                continue
            if token >= FILLER0:
                kind = "filler"
            elif token >= FALSE0:
                kind = "false"
            elif (token - FACT0) // FACTS != topic:
                kind = "elsewhere"
            else:
                kind = "repeat" if token in said else "fact"
                said.add(token)
            row.append((kind, column))
        found.append(row)
    return found


def scores(answers: Answers) -> Tensor:
    """(S,) the true quality."""
    return torch.tensor([sum(WORTH[kind] for kind, _ in row) for row in kinds(answers)], dtype=torch.float32)


def rates(answers: Answers) -> dict[str, float]:
    """Content tokens of each kind an answer."""
    rows = kinds(answers)
    return {name: sum(kind == name for row in rows for kind, _ in row) / len(rows) for name in KINDS}


def marks(answers: Answers) -> Tensor:
    """(S, columns) each token's worth: the fine-grained feedback that a perfect judge would give."""
    worth = torch.zeros(answers.mask.shape)
    for i, row in enumerate(kinds(answers)):
        for kind, column in row:
            worth[i, column] = WORTH[kind]
    return worth


# ---- answers that are written by rule ------------------------------------------------------------------------------

HABITS = {"fact": 0.4, "elsewhere": 0.15, "false": 0.15, "filler": 0.3}  # of the base model's teacher


def write(n: int, generator: torch.Generator, *, habits=HABITS, sentences=(2, 6), topics: int = TOPICS) -> Answers:
    """n answers to prompts of random topics."""
    names, chance = list(habits), torch.tensor(list(habits.values()))

    def pick(count):
        return int(torch.randint(count, (), generator=generator))

    ids = torch.full((n, PROMPT + LONGEST), END)
    for i in range(n):
        topic = pick(topics)
        content = []
        for _ in range(sentences[0] + pick(sentences[1] - sentences[0] + 1)):
            kind = names[int(torch.multinomial(chance, 1, generator=generator))]
            if kind == "fact":
                token = FACT0 + topic * FACTS + pick(FACTS)
            elif kind == "elsewhere":
                token = FACT0 + ((topic + 1 + pick(TOPICS - 1)) % TOPICS) * FACTS + pick(FACTS)
            else:
                token = (FALSE0 if kind == "false" else FILLER0) + pick(4)
            content += [token, STOP]
        ids[i, : PROMPT + len(content) + 1] = torch.tensor([BEGIN, TOPIC0 + topic, *content, END])
    return answers_of(ids)


# ---- the model -----------------------------------------------------------------------------------------------------


def make(seed: int, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4)
    special = dict(bos_token_id=BEGIN, eos_token_id=END, pad_token_id=END, max_position_embeddings=64)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=False, **sizes, **special))


def logp(model, answers: Answers) -> Tensor:
    """(S, columns) of the tokens; 0 where no token of the answer stands."""
    return model_logprobs(model, answers.ids, labels=answers.labels).scores.logp


def frozen_logp(model, answers: Answers) -> Tensor:
    with torch.no_grad():
        return logp(model, answers)


@torch.no_grad()
def sample(model, n: int, generator: torch.Generator, topics: Tensor | None = None) -> Answers:
    """n answers of the model, to random topics or to those given."""
    topics = torch.randint(TOPICS, (n,), generator=generator) if topics is None else topics
    ids = torch.stack([torch.full_like(topics, BEGIN), topics + TOPIC0], 1)
    step, past = ids, None
    ended = torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(LONGEST):
        out = model(step, past_key_values=past, use_cache=True)
        past = out.past_key_values
        step = torch.multinomial(out.logits[:, -1].softmax(-1), 1, generator=generator)
        step = torch.where(ended[:, None], END, step)
        ended |= step[:, 0] == END
        ids = torch.cat([ids, step], 1)
        if ended.all():
            break
    pad = ids.new_full((len(ids), PROMPT + LONGEST - ids.shape[1]), END)
    return answers_of(torch.cat([ids, pad], 1))


def train(model, steps: int, loss_of, lr: float = 1e-3, each=None) -> None:
    """`loss_of(step)` gives the loss of a step; `each(step)` is called before each step and after the last."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        if each:
            each(step)
        optimizer.zero_grad()
        loss_of(step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    if each:
        each(steps)


@cache
def base(seed: int, steps: int = 300):
    """The state of a base model: what the teacher's habits make of it. Made once a seed and process."""
    generator = torch.Generator().manual_seed(seed)
    model, pool = make(seed), write(2048, generator)

    def loss_of(step):
        batch = pool[torch.randint(len(pool.ids), (64,), generator=generator)]
        return fk.nll_loss(logp(model, batch), mask=batch.mask).loss

    train(model, steps, loss_of, lr=3e-3)
    return model.state_dict()


def start(seed: int):
    """A fresh copy of the base model of a seed."""
    model = make(seed)
    model.load_state_dict(base(seed))
    return model


def judge(model, reference, seed: int, n: int = 256, topics: Tensor | None = None) -> dict[str, float]:
    """What a model writes: score, length in tokens, KL from the reference (nats an answer), kinds an answer."""
    found = sample(model, n, torch.Generator().manual_seed(10_000 + seed), topics)
    kl = (frozen_logp(model, found) - frozen_logp(reference, found)).sum(1)
    return {
        "score": float(scores(found).mean()),
        "length": float(found.lengths.float().mean()),
        "kl": float(kl.mean()),
        **rates(found),
    }

"""The run with --reward: small reward models, trained by several losses on pairs whose labels are partly wrong.

The body is the first half of the model's layers, frozen. The vector of a segment is the mean of the hidden states of
its tokens. A head of two layers computes the score of a segment from it, and the score of an answer is the mean over
its segments. MODELS such heads measure the strength of each pair. Then each arm of the comparison trains new heads,
whose accuracy is measured on held-out pairs of other prompts.
"""

from typing import NamedTuple

import torch

from ..losses.contrastive import contrastive_loss, dropout_views
from ..losses.pairs import pick_scores
from ..losses.reward import reward_loss
from ..losses.strength import Strength, preference_strength
from .data import print_cuts, read_examples
from .models import load_causal
from .options import UsageError
from .reward_data import Pairs, read_judgements, read_pairs, standardised
from .reward_summary import summary, write_report

MODELS, SEEDS = 5, 3  # number of heads that measure strength; number of heads of each arm
EPOCHS, BATCH, LR, WIDTH = 4, 16, 1e-3, 32
CLAMP, DROPOUT, CONTRAST = 1.0, 0.05, 1.0  # bound of margins; dropout of the two views; weight of the contrastive loss


class Arm(NamedTuple):
    """One arm of the comparison: a row of REWARD, with or without a contrastive term."""

    loss: str = "bradley_terry"
    contrast: bool = False


ARMS = {
    "right labels": Arm("flip"),  # only if the flipped labels are known
    "as labelled": Arm(),
    "margin": Arm("adaptive_margin"),
    "flip": Arm("flip"),
    "flip, margin": Arm("flip_margin"),
    "soft labels": Arm("soft_label_vote"),
    "contrast": Arm(contrast=True),
}
SHOWN = "flip, margin"  # the arm whose scores colour the segments in the report


class Result(NamedTuple):
    """The result of a run, as tensors over pairs."""

    train: Pairs
    held: Pairs
    strength: Strength  # of the training pairs
    sure: torch.Tensor  # (held,) absolute strength of the held-out pairs
    weakest: torch.Tensor  # (train,) bool: the pairs that "flip" flips
    right: dict[str, torch.Tensor]  # arm -> (SEEDS, held) bool
    scores: torch.Tensor  # (segments of held,) from the first head of SHOWN


class Head(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Dropout(0.0), torch.nn.Linear(width, WIDTH), torch.nn.Tanh())
        self.out = torch.nn.Linear(WIDTH, 1)

    def forward(self, hidden):
        """Scores (N,) and representations (N, WIDTH) of segments."""
        inner = self.inner(hidden)
        return self.out(inner)[:, 0], inner


def run(options):
    """Trains, evaluates, prints a table, writes the report and returns its path.

    Raises  UsageError for a wrong option, an unreadable file or a missing package
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    examples = read_examples(options)
    judgements = read_judgements(options, examples)
    print("loading the model ...", flush=True)
    causal, tokenizer = load_causal(options, examples)
    body = half(causal.base_model)
    print(f"reading {len(judgements[0])} pairs to train on and {len(judgements[1])} held-out ones ...", flush=True)
    pairs = [read_pairs(options, body, tokenizer, part) for part in judgements]
    print_cuts(options, [one.answer for part in pairs for one in part.answers])
    pairs = standardised(*pairs)
    print("training reward heads ...", flush=True)
    result = train_all(options, *pairs)
    print(summary(options, result))
    path = write_report(options, tokenizer, result)
    print(f"report: {path}")
    return path


def half(body):
    """The body with the first half of its layers. The later layers add little here.

    Raises  UsageError if the body has no list of layers
    """
    for path, layers in body.named_modules():
        if isinstance(layers, torch.nn.ModuleList):  # the outermost list; lists of experts are inside of layers
            owner, _, name = path.rpartition(".")
            setattr(body.get_submodule(owner), name, layers[: (len(layers) + 1) // 2])
            return body
    raise UsageError(f"--model must have a list of layers for --reward, got {type(body).__name__}")


def train_all(options, train, held):
    """Measures strength with MODELS heads, then trains SEEDS heads of each arm and evaluates them."""
    first = 100 * options.seed
    models = [train_head(train, first + k, ARMS["as labelled"]) for k in range(MODELS)]
    strength = preference_strength(differences(model, train) for model in models)
    sure = preference_strength(differences(model, held) for model in models).mean.abs()
    weakest = strength.weakest(None if options.data else 100 * options.noise)
    right = {}
    for name, arm in ARMS.items():
        if name == "right labels" and options.data:
            continue
        constants = constants_of(arm, strength, train.planted if name == "right labels" else weakest)
        heads = [train_head(train, first + MODELS + k, arm, **constants) for k in range(SEEDS)]
        right[name] = torch.stack([differences(head, held) > 0 for head in heads])
        if name == SHOWN:
            scores = segment_scores(heads[0], held)
    return Result(train, held, strength, sure, weakest, right, scores)


def constants_of(arm, strength, flip):
    """The arguments of an arm's loss that have one number for each pair."""
    return {
        "bradley_terry": {},
        "adaptive_margin": {"strength": strength.mean},
        "flip": {"flip": flip},
        "flip_margin": {"flip": flip, "strength": strength.mean},
        "soft_label_vote": {"label": strength.soft},
    }[arm.loss]


def train_head(data, seed, arm, **constants):
    """A head trained with the loss of an arm; constants: its arguments, tensors (P,)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = Head(data.hidden.shape[1])
        optimizer = torch.optim.AdamW(head.parameters(), lr=LR, weight_decay=0.1)
        for _ in range(EPOCHS):
            for index in torch.randperm(len(data.pairs)).split(BATCH):
                hidden, cu_seqlens = data.of(index.tolist())
                of_batch = {name: x[index] for name, x in constants.items()}
                loss_of(head, arm, hidden, cu_seqlens, of_batch).backward()
                optimizer.step()
                optimizer.zero_grad()
    return head.eval()


def loss_of(head, arm, hidden, cu_seqlens, constants):
    """The reward loss of a batch. With contrast: its mean over two dropout views, plus SimCSE on the answers' means."""
    options = dict(cu_seqlens=cu_seqlens, pick="mean", clamp=CLAMP, **constants)
    if not arm.contrast:
        return reward_loss(arm.loss, head(hidden)[0], **options).loss
    views = dropout_views(head, hidden, p=DROPOUT)
    loss = sum(reward_loss(arm.loss, scores, **options).loss for scores, _ in views) / 2
    means = (pick_scores(inner, cu_seqlens=cu_seqlens, pick="mean") for _, inner in views)
    return loss + CONTRAST * contrastive_loss("simcse", *means).loss


@torch.no_grad()
def segment_scores(head, data):
    return head(data.hidden)[0]


def differences(head, data):
    """(P,) the score of the chosen answer minus that of the rejected one."""
    chosen, rejected = pick_scores(segment_scores(head, data), cu_seqlens=data.cu_seqlens, pick="mean").chunk(2)
    return chosen - rejected

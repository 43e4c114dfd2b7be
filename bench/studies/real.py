"""One confirmation of each study on human judgements (QA-Feedback) with SmolLM2-135M; see qa.py.

avg        pairs that people judged; summed or averaged log-likelihood
span       an answer and its correction; what is rejected is the whole answer, its marked spans, or what an adaptive
           mask finds by a model that was trained on the same pairs before
pointwise  first answers and corrections with a label each: 1 - the share of tokens in a span of a fault
reward     pairs that people judged, 30 % of them flipped, on the model's hidden states
segments   faults by sentence: a classifier that learned from a label a sentence, a sub-sentence, or an answer
"""

import torch
from torch import Tensor

import finealign_kernels as fk
from finealign_kernels import feedback

from . import qa, reward, world
from .runs import Effect, Study

STEPS, PAIRS, LR, BETA = 40, 3, 1e-4, 0.1
WIDTH = 32  # principal components that a reward model reads


def judged_pairs(questions: list[int]) -> list[tuple[qa.Answer, qa.Answer]]:
    """(chosen, rejected) of the comparisons that people made, ties left out."""
    found = qa.corpus()
    return [
        (found.answers[question][one.chosen], found.answers[question][one.rejected])
        for question in questions
        for one in found.examples[question].preferences
        if qa.CORRECTED not in (one.chosen, one.rejected)
    ]


def corrections(questions: list[int]) -> list[tuple[qa.Answer, qa.Answer]]:
    """(correction, answer with spans of faults) of the questions that have both."""
    answers = qa.corpus().answers
    return [
        (answers[question][qa.CORRECTED], answers[question][0])
        for question in questions
        if qa.CORRECTED in answers[question] and answers[question][0].response.spans
    ]


def train(seed: int, items: list, loss_of) -> qa.Tail:
    """The last layers trained with loss_of(policy's tail, some of the items)."""
    draw = torch.Generator().manual_seed(seed)
    tail = qa.Tail(qa.corpus().causal).requires_grad_(True)
    size = min(PAIRS, len(items))

    def step(_):
        return loss_of(tail, [items[i] for i in torch.randperm(len(items), generator=draw)[:size].tolist()])

    world.train(tail, STEPS, step, LR)
    return tail


def dpo(tail: qa.Tail, pairs: list, average: bool | str = False, beta: float = BETA, weight_of=None) -> Tensor:
    """The loss of pairs; weight_of(answer, is it the chosen one) gives weights of its tokens."""
    answers = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    now, cu_seqlens = qa.logp(tail, answers)
    weight = None
    if weight_of:
        weight = torch.cat([weight_of(answer, i < len(pairs)) for i, answer in enumerate(answers)])
    options = dict(cu_seqlens=cu_seqlens, average=average, beta=beta, token_weight=weight)
    return fk.preference_loss("dpo", now, qa.before(answers), **options).loss


def mean(values) -> float:
    return float(torch.tensor([float(value) for value in values]).mean())


def run_avg(arm: str, seed: int, quick: bool) -> dict:
    learned, held = (judged_pairs(some) for some in qa.split(seed))
    length = mean(len(answer.offsets) for pair in learned for answer in pair)
    average, beta = {"summed": (False, BETA), "averaged": ("all", BETA * length)}[arm]
    tail = train(seed, learned, lambda tail, pairs: dpo(tail, pairs, average, beta))
    answers = list({answer.key: answer for pair in held for answer in pair}.values())
    changes = dict(zip((answer.key for answer in answers), qa.moved(tail, answers), strict=True))
    score = {key: change.mean() if average else change.sum() for key, change in changes.items()}
    sides = [(score[chosen.key], score[rejected.key]) for chosen, rejected in held]
    lengths = [(len(chosen.ids), len(rejected.ids)) for chosen, rejected in held]
    uneven = [(s, n) for s, n in zip(sides, lengths, strict=True) if n[0] != n[1]]
    return {
        "accuracy": mean(a > b for a, b in sides),
        "longer wins": mean((s[0] > s[1]) == (n[0] > n[1]) for s, n in uneven),
        "people": mean(n[0] > n[1] for _, n in uneven),
        "end": mean(change[-1] for change in changes.values()),
        "moved": mean(change.sum().abs() for change in changes.values()),
    }


def run_span(arm: str, seed: int, quick: bool) -> dict:
    learned, held = (corrections(some) for some in qa.split(seed))

    def spans(answer, is_chosen):
        inside = answer.tokens(answer.response.spans)
        return torch.ones(len(inside)) if is_chosen else inside.float()

    if arm == "adaptive":
        scorer = train(seed + 1000, learned, dpo)
        answers = [answer for pair in learned for answer in pair]
        scores = dict(zip((answer.key for answer in answers), qa.moved(scorer, answers), strict=True))

        def weight_of(answer, is_chosen):
            q = scores[answer.key]
            return fk.adaptive_mask(q, cu_seqlens=torch.tensor([0, len(q)]), side=1 if is_chosen else -1).token_weight
    else:
        weight_of = {"full": None, "spans": spans}[arm]
    tail = train(seed, learned, lambda tail, pairs: dpo(tail, pairs, weight_of=weight_of))
    right, wrong = (qa.moved(tail, [pair[side] for pair in held]) for side in (0, 1))
    inside = [answer.tokens(answer.response.spans) for _, answer in held]
    marked = torch.cat([change[at] for change, at in zip(wrong, inside, strict=True)])
    rest = torch.cat([change[~at] for change, at in zip(wrong, inside, strict=True)])
    return {
        "marked": float(marked.mean()),
        "rest": float(rest.mean()),
        "apart": float(rest.mean() - marked.mean()),
        "corrected": float(torch.cat(right).mean()),
    }


def run_pointwise(arm: str, seed: int, quick: bool) -> dict:
    answers = qa.corpus().answers
    learned, held = qa.split(seed)
    items = [answers[question][i] for question in learned for i in (0, qa.CORRECTED) if i in answers[question]]
    label = {a.key: 1 - float(a.tokens(a.response.spans).float().mean()) for a in items}
    if arm == "sft on positives":
        items = [answer for answer in items if label[answer.key] == 1]

    def loss_of(tail, some):
        now, cu_seqlens = qa.logp(tail, some)
        if arm == "sft on positives":
            return fk.nll_loss(now, cu_seqlens=cu_seqlens).loss
        target = torch.tensor([label[answer.key] for answer in some])
        target = target if arm == "pdpo_soft" else (target == 1).float()
        options = dict(target=target, cu_seqlens=cu_seqlens, beta=BETA)
        return fk.pointwise_loss(arm, now, qa.before(some), **options).loss

    tail = train(seed, items, loss_of)
    pairs = corrections(held)
    right, wrong = (qa.moved(tail, [pair[side] for pair in pairs]) for side in (0, 1))
    return {
        "ranked": mean(a.mean() > b.mean() for a, b in zip(right, wrong, strict=True)),
        "corrected": mean(a.mean() for a in right),
        "faulty": mean(b.mean() for b in wrong),
    }


def features(pairs: list[tuple[qa.Answer, qa.Answer]]) -> tuple[Tensor, Tensor]:
    """(N, D) of the chosen and of the rejected answers: their mean hidden states."""
    made = {answer.key: qa.final(answer).mean(0) for pair in pairs for answer in pair}
    return tuple(torch.stack([made[pair[side].key] for pair in pairs]) for side in (0, 1))


def run_reward(arm: str, seed: int, quick: bool) -> dict:
    learned, held = (features(judged_pairs(some)) for some in qa.split(seed))
    shift = torch.cat(learned).mean(0)
    _, spread, along = torch.linalg.svd(torch.cat(learned) - shift, full_matrices=False)
    base = along[:WIDTH].T / spread[:WIDTH] * len(shift) ** 0.5  # principal components: fewer numbers than pairs
    (chosen, rejected), test = (tuple((x - shift) @ base for x in pair) for pair in (learned, held))
    planted = torch.zeros(len(chosen), dtype=torch.bool)
    draw = torch.Generator().manual_seed(seed)
    planted[torch.randperm(len(chosen), generator=draw)[: round(reward.NOISE * len(chosen))]] = True
    if arm == "as judged":
        planted[:] = False
    at = planted[:, None]
    data = reward.Data(torch.where(at, rejected, chosen), torch.where(at, chosen, rejected), planted)
    models = (reward.train(data, 100 * seed + k) for k in range(reward.MODELS))
    strength = fk.preference_strength(reward.differences(model, data) for model in models)
    weakest = strength.weakest(100 * reward.NOISE)
    name, constants = {
        "as judged": ("bradley_terry", {}),
        "bradley_terry": ("bradley_terry", {}),
        "flip": ("flip", dict(flip=weakest)),
        "soft_label": ("soft_label_vote", dict(label=strength.soft)),
        "adaptive_margin": ("adaptive_margin", dict(strength=strength.mean)),
    }[arm]
    model = reward.train(data, 100 * seed + 50, name, **constants)
    none = torch.zeros(len(test[0]), dtype=torch.bool)
    return {
        "accuracy": mean(reward.differences(model, reward.Data(*test, none)) > 0),
        "found": mean(strength.weakest(100 / 3)[planted]) if planted.any() else 0.0,
    }


def sentence_rows(questions: list[int], cut, whole: bool) -> tuple[Tensor, Tensor]:
    """Hidden states at the last tokens of segments of first answers, and their labels: 1, a fault is in it."""
    states, labels = [], []
    for question in questions:
        answer = qa.corpus().answers[question][0]
        text, hidden = answer.response.text, qa.final(answer)
        faults = answer.tokens(answer.response.spans)
        first = 0
        for last in feedback.segment_tokens(answer.offsets, text, [(0, len(text))] if whole else cut(text)):
            states.append(hidden[last])
            labels.append(bool(faults[first : last + 1].any()))
            first = last + 1
    return torch.stack(states), torch.tensor(labels).long()


def run_segments(arm: str, seed: int, quick: bool) -> dict:
    cut = feedback.sub_sentences if arm == "sub-sentences" else feedback.sentences
    learned, held = qa.split(seed)
    states, labels = sentence_rows(learned, cut, whole=arm == "answers")
    shift, scale = states.mean(0), states.std(0)
    torch.manual_seed(seed)
    head = torch.nn.Linear(states.shape[1], 2)
    rows = (states - shift) / scale

    def loss_of(_):
        return fk.segment_class_loss(head(rows), labels).loss + 0.01 * head.weight.square().sum()

    world.train(head, 300, loss_of, 1e-3)
    states, labels = sentence_rows(held, feedback.sentences, whole=False)
    with torch.no_grad():
        found = head((states - shift) / scale).diff(dim=1)[:, 0]
    wins = (found[labels == 1][:, None] > found[labels == 0]).double()
    return {"auc": float(wins.mean()), "share": float(labels.double().mean())}


CORPUS = "QA-Feedback with SmolLM2-135M: 120 questions to learn from and 40 held out, drawn by the seed. "
LAST_LAYER = CORPUS + "The last layer is trained. "

STUDIES = (
    Study(
        "real-avg",
        "On people's judgements, too, averaged log-likelihoods prefer the longer answer less often than summed ones "
        "([arXiv:2406.19188](https://arxiv.org/abs/2406.19188)).",
        ("summed", "averaged"),
        run_avg,
        (
            Effect("longer wins", "averaged", "summed", -1),
            Effect("end", "averaged", "summed", +1),
            Effect("accuracy", "averaged", "summed", +1),
        ),
        ("", "longer wins"),
        LAST_LAYER
        + "`longer wins` is how often a held-out pair's longer answer has the higher implicit score, `people` how "
        "often it was chosen; `end` is by how much the end token's log-prob moved, `moved` by how much an answer's "
        "did. Nothing was generated: lengths of generations are open.",
        needs=qa.missing,
    ),
    Study(
        "real-span",
        "Where people marked faults, weights on the marked spans push down the faults of held-out answers more than "
        "the rest of them, and more so than whole answers do "
        "([arXiv:2306.01693](https://arxiv.org/abs/2306.01693), [arXiv:2411.00809](https://arxiv.org/abs/2411.00809)).",
        ("full", "spans", "adaptive"),
        run_span,
        (
            Effect("apart", "spans", "full", +1),
            Effect("apart", "adaptive", "full", +1),
            Effect("rest", "spans", "full", +1),
            Effect("corrected", "spans", "full", +1),
        ),
        ("", "apart"),
        LAST_LAYER
        + "Numbers are mean changes of a token's log-prob on held-out questions: in marked spans, in the rest of "
        "the same answers, in their corrections; `apart` is rest - marked.",
        needs=qa.missing,
    ),
    Study(
        "real-pointwise",
        "From people's marks as labels of single answers, ULMA and soft labels rank corrections above faulty answers "
        "more often than point-wise DPO and SFT do ([arXiv:2312.02554](https://arxiv.org/abs/2312.02554)).",
        ("pdpo", "pdpo_soft", "ulma", "sft on positives"),
        run_pointwise,
        (
            Effect("ranked", "ulma", "pdpo", +1),
            Effect("ranked", "ulma", "sft on positives", +1),
            Effect("ranked", "pdpo_soft", "pdpo", +1),
            Effect("corrected", "ulma", "pdpo", +1),
            Effect("faulty", "ulma", "sft on positives", -1),
        ),
        ("", "ranked"),
        LAST_LAYER + "`ranked` is how often a held-out correction gained more log-prob a token than the answer that it "
        "corrects; the other numbers are those gains.",
        needs=qa.missing,
    ),
    Study(
        "real-reward",
        "With 30 % of people's judgements flipped, preference strength finds the flips, and flipping the weakest pairs "
        "raises held-out accuracy ([arXiv:2401.06080](https://arxiv.org/abs/2401.06080)).",
        ("as judged", "bradley_terry", "flip", "soft_label", "adaptive_margin"),
        run_reward,
        (
            Effect("accuracy", "flip", "bradley_terry", +1),
            Effect("accuracy", "soft_label", "bradley_terry", +1),
            Effect("accuracy", "adaptive_margin", "bradley_terry", +1),
            Effect("accuracy", "bradley_terry", "as judged", -1),
        ),
        ("", "accuracy"),
        CORPUS + "The language model is not trained: reward models are networks of 32 units on 32 principal components "
        "of the answers' mean hidden states. Accuracy is against people's own judgements, which disagree among "
        "themselves.",
        needs=qa.missing,
    ),
    Study(
        "real-segments",
        "A classifier that learns from faults by sentence finds faulty sentences better than one that learns from a "
        "label an answer ([arXiv:2306.01693](https://arxiv.org/abs/2306.01693)).",
        ("answers", "sentences", "sub-sentences"),
        run_segments,
        (Effect("auc", "sentences", "answers", +1), Effect("auc", "sub-sentences", "answers", +1)),
        ("", "auc"),
        CORPUS + "Only a linear head on its hidden states is trained. `auc` is how often a held-out sentence "
        "with a fault is scored above one without, `share` how many have one. Whether PPO gains by it is open: a "
        "policy that generates is beyond two cores.",
        needs=qa.missing,
    ),
)

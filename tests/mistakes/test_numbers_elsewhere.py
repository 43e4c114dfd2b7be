"""Numbers in rows, in feedback and of objects: numpy's are numbers, others are refused by name where they are given."""

import numpy as np
import pytest
import torch

import finealign_kernels as fk
from finealign_kernels import feedback

X = -torch.rand(2, 3, generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 3, dtype=torch.bool)
OFFSETS, TEXT, SPANS = [(0, 3), (3, 7)], "abcdefg", [(0, 3)]
PAIR = ((OFFSETS, TEXT, SPANS),) * 2
STRENGTH = fk.preference_strength(torch.rand(3, 4, generator=torch.Generator().manual_seed(0)))
NET = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.1))
ENDS = torch.tensor([0, 1, 2])


def of_row(**columns):
    return fk.preference_loss(fk.PREFERENCE["cdpo"]._replace(**columns), X, X - 1)


def of_reward(**columns):
    return fk.reward_loss(fk.REWARD["margin"]._replace(**columns), X[:, 0])


# call, the name in its refusal, a value that it takes
NUMBERS = {
    "inside": (lambda v: feedback.token_weights(OFFSETS, TEXT, SPANS, inside=v), "inside", 2.0),
    "outside": (lambda v: feedback.token_weights(OFFSETS, TEXT, SPANS, inside=2.0, outside=v), "outside", 2.0),
    "kind": (lambda v: feedback.token_weights(OFFSETS, TEXT, SPANS, inside=2.0, by_kind={"a": v}), "by_kind", 2.0),
    "pair": (lambda v: feedback.pair_weights(*PAIR, span_weight=v), "span_weight", 2.0),
    "kind of a pair": (lambda v: feedback.pair_weights(*PAIR, by_kind={"a": v}), "by_kind", 2.0),
    "response": (lambda v: feedback.response_weights(*PAIR[0], raised=True, span_weight=v), "span_weight", 2.0),
    "sub_sentences": (lambda v: feedback.sub_sentences(TEXT, least=v), "least", 5),
    "MetaRM": (lambda v: fk.MetaRM(NET.parameters(), eta=v), "eta", 0.5),
    "weakest": (lambda v: STRENGTH.weakest(v), "percent", 50.0),
    "dropout_views": (lambda v: fk.dropout_views(NET, X[:, :2], p=v), "p", 0.5),
    "Row.beta": (lambda v: of_row(beta=v), "beta", 0.5),
    "Row.shift": (lambda v: of_row(shift=v), "shift", 0.5),
    "Row.least_shift": (lambda v: of_row(least_shift=v), "Row.least_shift", -0.5),
    "Row.scale": (lambda v: of_row(scale=lambda beta: v), "Row.scale|beta", 0.5),
    "Row.hyper": (lambda v: of_row(hyper={"smoothing": fk.Hyper(v, lambda e: True, "be")}), "Row.hyper", 0.25),
    "RewardRow.margin": (lambda v: of_reward(margin=v), "RewardRow.margin", 0.5),
    "RewardRow.smoothing": (lambda v: of_reward(smoothing=v), "RewardRow.smoothing", 0.5),
    "SegmentRewards.weight": (
        lambda v: fk.token_rewards(fk.SegmentRewards(X[0, :2], ENDS[:2], ENDS, weight=v), mask=MASK),
        "models",
        0.5,
    ),
    "weights of rewards": (
        lambda v: fk.decoupled_advantages(X.expand(2, 3)[:, :2], groups=2, weights=(v, 1.0)),
        "weights",
        0.5,
    ),
}
FLAGS = {
    "raised": (lambda v: feedback.response_weights(*PAIR[0], raised=v), "raised"),
    "Row.reference": (lambda v: of_row(reference=v), "Row.reference"),
    "Row.pair": (lambda v: of_row(pair=v), "Row.pair"),
    "RewardRow.flip": (lambda v: of_reward(flip=v), "RewardRow.flip"),
    "RewardRow.weak": (lambda v: of_reward(weak=v), "RewardRow.weak"),
}
MAY_BE_NONE = ("weakest", "Row.least_shift")


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_numpy_are_numbers_elsewhere(name):
    call, _, value = NUMBERS[name]
    for kind in (np.float32, np.float64) if isinstance(value, float) else (np.int64, np.int32):
        call(kind(value))
        call(np.array(value, kind))


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_refused_by_name_elsewhere(name):
    call, names, value = NUMBERS[name]
    wrong = ["x", True, [1.0], object(), 2 + 0j, *([] if name in MAY_BE_NONE else [None])]
    wrong += [1e39, float("nan"), float("inf"), 10**400] if isinstance(value, float) else [2.5, 0]
    for one in wrong:
        with pytest.raises((TypeError, ValueError), match=rf"^({names})\b.* (must|return) .*, got "):
            call(one)


@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_refused_by_name_elsewhere(name):
    call, key = FLAGS[name]
    for one in ("x", 1, 0.0, None, [True], object()):
        with pytest.raises((TypeError, ValueError), match=f"^{key} must be True or False, got "):
            call(one)


@pytest.mark.parametrize("hyper", ([], {"smoothing": 0.1}, "smoothing"))
def test_hyper_parameters_of_another_type(hyper):
    with pytest.raises(TypeError, match=r"^Row.hyper\b.* must "):
        of_row(hyper=hyper)


def test_whole_numbers_beyond_int64():
    logits, labels = torch.zeros(2, 3), torch.tensor([0, 1])
    for call in (
        lambda v: fk.token_logprobs(logits, labels, ignore_index=v),
        lambda v: fk.linear_logprobs(logits, logits, labels, ignore_index=v),
        lambda v: fk.segment_class_loss(logits, labels, ignore_index=v),
    ):
        with pytest.raises(ValueError, match="^ignore_index must "):
            call(2**63)
    with pytest.raises(ValueError, match="^iterations must "):
        fk.contrastive_loss("swav", logits, logits, prototypes=logits, iterations=10**400)

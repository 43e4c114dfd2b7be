"""Fine-grained reward models: golden values of section 4.10, transformers' own loss, and from text to advantages."""

import warnings

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import finealign_kernels as fk
from finealign_kernels import feedback
from finealign_kernels.ops import _warn

F64 = torch.float64
LOGITS = torch.tensor([[0.1, 1, -0.5], [0, -0.3, 0.8]], dtype=F64)
WORDS = ["the", "sun", "is", "star", "and", "it", "has", "planets", "glow", "wrong", "a", ",", "."]


def test_golden():
    """Other tokens are not looked at."""
    logits = torch.full((1, 5, 3), torch.nan, dtype=F64)
    logits[0, [1, 3]] = LOGITS
    logits.requires_grad_()
    out = fk.segment_class_loss(logits, torch.tensor([[-100, 1, -100, 2, -100]]))
    assert_close(out.loss.item(), 0.5331222107, rtol=0, atol=1e-9)
    grad = torch.autograd.grad(out.loss, logits)[0]
    golden = [[0.1247375912, -0.1931950327, 0.0684574415], [0.126060193, 0.0933876879, -0.2194478809]]
    assert_close(grad[0, [1, 3]], torch.tensor(golden, dtype=F64), rtol=0, atol=1e-9)
    assert not grad[0, [0, 2, 4]].any() and out.accuracy == 1


def test_no_separator_and_a_mask():
    logits = LOGITS.clone().requires_grad_()
    out = fk.segment_class_loss(logits, torch.tensor([-100, -100]))
    assert out.loss == 0 and out.accuracy == 0 and not torch.autograd.grad(out.loss, logits)[0].any()
    labels = torch.tensor([1, 2])
    one = fk.segment_class_loss(logits, labels, mask=torch.tensor([False, True]))
    assert_close(one.loss, -LOGITS[1].log_softmax(0)[2])
    half = fk.segment_class_loss(logits, labels, reduction="sum", denominator=4)
    assert_close(half.loss, fk.segment_class_loss(logits, labels).loss / 2)
    with pytest.raises(IndexError):
        fk.segment_class_loss(logits, torch.tensor([1, 3]))
    with pytest.raises(ValueError, match="reduction must be"):
        fk.segment_class_loss(logits, labels, reduction="none")


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[SEP]", "[EOS]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = dict(pad_token="[PAD]", unk_token="[UNK]", sep_token="[SEP]", eos_token="[EOS]")
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def classifier(kind="Bert"):
    import transformers

    torch.manual_seed(0)
    shape = dict(vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    config = getattr(transformers, f"{kind}Config")(**shape, num_labels=3, max_position_embeddings=64)
    return getattr(transformers, f"{kind}ForTokenClassification")(config)


def texts(count, seed):
    """Two or three sentences each; class 1 for one in which "wrong" stands, else 0."""
    draw = torch.Generator().manual_seed(seed)
    found, classes = [], []
    for _ in range(count):
        parts, given = [], []
        for _ in range(int(torch.randint(2, 4, (), generator=draw))):
            words = [WORDS[i] for i in torch.randint(0, 9, (4,), generator=draw).tolist()]
            given.append(int(torch.rand((), generator=draw) < 0.5))
            if given[-1]:
                words[int(torch.randint(0, 4, (), generator=draw))] = "wrong"
            parts.append(" ".join(words).capitalize() + ".")
        found.append(" ".join(parts))
        classes.append(given)
    return found, classes


def build(**options):
    words = tokenizer()
    words.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Lowercase()
    model = options.pop("model", None) or classifier()
    given = dict(split=feedback.sentences, weight=0.5) | options
    return fk.SegmentRewardModel(model, words, {0: 0.3, 1: -0.3}, **given)


def test_a_trained_model_finds_the_segments_and_rewards_their_last_tokens():
    judge = build(model=classifier("Llama"), placed="close")
    optimizer = torch.optim.AdamW(judge.model.parameters(), lr=5e-3)
    for step in range(60):
        some, classes = texts(16, seed=step)
        inputs, labels = judge.batch(["the star"] * 16, some, classes)
        out = judge.model(**inputs, labels=labels)
        loss = fk.segment_class_loss(out.logits, labels).loss
        assert_close(loss, out.loss)  # transformers' own
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held, classes = texts(40, seed=1000)
    found = judge.judge(["the star"] * 40, held)
    named = torch.tensor([one for given in classes for one in given])
    right = (torch.cat([x.reward for x in found]) < 0) == (named == 1)
    assert right.double().mean() > 0.95
    assert judge.model.training

    policy = tokenizer()
    coded = [policy(text, return_offsets_mapping=True, add_special_tokens=False) for text in held[:4]]
    offsets = [[tuple(pair) for pair in one["offset_mapping"]] for one in coded]
    rewards = judge(["the star"] * 4, held[:4], offsets)
    width = max(map(len, offsets)) + 2
    mask = torch.zeros(4, width, dtype=torch.bool)
    for row, own in zip(mask, offsets, strict=True):
        row[: len(own)] = True
    placed = fk.token_rewards(rewards, mask=mask)
    for row, own, text, x in zip(placed, offsets, held, found, strict=False):
        dots = [t for t, (start, end) in enumerate(own) if text[start:end] == "."]
        assert row.nonzero()[:, 0].tolist() == dots  # sentences end in them
        assert_close(row[dots], 0.5 * x.reward)
    shifted = judge(["the star"] * 4, held[:4], offsets, first=[0, 1, 2, 0])
    assert_close(shifted.end - rewards.end, torch.tensor([0, 1, 2, 0]).repeat_interleave(rewards.cu_segments.diff()))
    values = torch.zeros(4, width)
    out = fk.advantages(rewards, values=values, mask=mask, gamma=1.0, lam=1.0)
    assert_close(out.returns[:, 0], torch.stack([0.5 * x.reward.sum() for x in found[:4]]))


def test_separators_stand_where_they_should():
    text = "The sun is a star. It has planets."
    judge = build(max_length=12)
    ids, places = judge.encode("the star", text, feedback.sentences(text))
    words = judge.tokenizer.convert_ids_to_tokens(ids)
    assert words == ["the", "star", "[SEP]", "the", "sun", "is", "a", "star", ".", "[SEP]", "it", "has"] and places == [
        2,
        9,
    ]
    judge = build(placed="close", max_length=12)
    ids, places = judge.encode("the star", text, feedback.sentences(text))
    words = judge.tokenizer.convert_ids_to_tokens(ids)
    assert words == [
        "the",
        "star",
        "the",
        "sun",
        "is",
        "a",
        "star",
        ".",
        "[SEP]",
        "it",
        "has",
        "planets",
    ] and places == [8]
    (found,) = judge.judge(["the star"], [text])  # the second segment is cut off: no reward, it counts 0
    assert found.segments == [(0, 18)] and found.reward.shape == (1,)
    rewards = judge(["the star"], [text], [[(0, 3), (17, 18), (33, 34)]])
    assert rewards.end.tolist() == [1] and rewards.cu_segments.tolist() == [0, 1]


def test_a_causal_model_and_soft_rewards():
    judge = build(model=classifier("Llama"), placed="close", soft=True, batch_size=2)
    some, _ = texts(5, seed=7)
    found = judge.judge(["sun"] * 5, [*some[:4], ""])
    assert found[4].segments == [] and found[4].reward.shape == (0,)
    for one in found:
        likely = one.logits[:, :2].softmax(1)
        assert_close(one.reward, 0.3 * likely[:, 0] - 0.3 * likely[:, 1])
    alone = judge.judge(["sun"], some[1:2])[0]
    assert_close(alone.logits, found[1].logits)  # padding does not count
    assert len(judge([], [], []).reward) == 0


def test_segments_beyond_the_length_are_warned_of_once():
    """Also where model or tokenizer take less than max_length; the warning is at the caller's line."""
    text = "The sun is a star. It has planets."
    for options, kept in ((dict(max_length=9), 1), (dict(max_length=2048), 0)):
        judge = build(**options)
        prompt = "the star " * (1 if kept else 40)
        _warn._given.clear()
        with pytest.warns(
            UserWarning, match=f"{2 - kept} of 2 segments have no reward: .* {judge.max_length} tokens"
        ) as caught:
            (found,) = judge.judge([prompt], [text])
        assert caught[0].filename == __file__ and len(found.segments) == kept and judge.max_length in (9, 64)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            judge.judge([prompt], [text])
        with pytest.warns(UserWarning, match=f"{2 - kept} of 2 segments have no label"):
            _, labels = judge.batch([prompt], [text], [[0, 1]])
        assert int((labels >= 0).sum()) == kept
    words = tokenizer()
    words.model_max_length = 7
    assert fk.SegmentRewardModel(classifier(), words, {0: 0.3, 1: -0.3}).max_length == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build().judge(["the star"], [text])


def test_logits_of_nan_are_no_class():
    judge = build()
    with torch.no_grad():
        judge.model.classifier.bias[1] = torch.nan  # argmax would take it for class 1
    for soft in (False, True):
        judge.soft = soft
        assert judge.judge(["the"], ["The sun. The star."])[0].reward.isnan().all()
    judge.rewards = {0: 0.3, 2: -0.3}  # the class of NaN is not read
    assert not judge.judge(["the"], ["The sun."])[0].reward.isnan().any()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(weight=float("nan")), "weight must be a finite number"),
        (dict(max_length=0), "max_length must be a whole number"),
        (dict(batch_size=2.5), "batch_size must be a whole number"),
        (dict(separator="[SEP]"), "separator must be a token id below"),
        (dict(separator=2000), "separator must be a token id below"),
    ],
)
def test_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_arguments_are_refused_by_name():
    judge, one = build(), [[(0, 3), (4, 7)]]
    for rewards in ([0.3, -0.3], {"0": 0.3, "1": -0.3}, {-1: 0.3, 0: 0.1}):
        with pytest.raises(ValueError, match="rewards must name"):
            fk.SegmentRewardModel(judge.model, judge.tokenizer, rewards)
    with pytest.raises(ValueError, match="tokenizer must be a fast one"):
        fk.SegmentRewardModel(judge.model, object(), judge.rewards)
    with pytest.raises(TypeError, match="texts must be a list, one a response, got a str"):
        judge.judge(["the"], "sun")
    with pytest.raises(ValueError, match="prompts and texts must be as many, got 1 and 2"):
        judge.judge(["the"], ["sun", "star"])
    with pytest.raises(ValueError, match="prompts and texts and classes must be as many"):
        judge.batch(["the"], ["sun"], [[0], [1]])
    for first, message in (([0, 1], "2 of them"), (-1, "got -1"), ([0.5], "got 0.5")):
        with pytest.raises(ValueError, match=f"first must .*{message}"):
            judge(["the"], ["the sun"], one, first=first)
    for first in (2, np.int64(2), [2], torch.tensor([2])):
        assert judge(["the"], ["the sun"], one, first=first).end.tolist() == [3]
    import transformers

    whole = transformers.BertForSequenceClassification(judge.model.config)
    with pytest.raises(ValueError, match=r"model must give logits \(B, T, C\)"):
        fk.SegmentRewardModel(whole, judge.tokenizer, judge.rewards).judge(["the"], ["sun"])


def test_refusals():
    with pytest.raises(ValueError, match="rewards must name two classes"):
        fk.SegmentRewardModel(classifier(), tokenizer(), {0: 1.0})
    with pytest.raises(ValueError, match="placed must be one of"):
        build(placed="middle")
    with pytest.raises(ValueError, match="classes must hold 2"):
        build().batch(["sun"], ["The sun. The star."], [[1]])
    wrong = fk.SegmentRewardModel(classifier(), tokenizer(), {0: 1.0, 3: -1.0})
    with pytest.raises(ValueError, match=r"rewards must name classes in \[0, 3\)"):
        wrong.judge(["sun"], ["The sun."])

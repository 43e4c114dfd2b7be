"""Sentences, sub-sentences and their last tokens: worked examples, the released rule, real tokenizers, random texts."""

import json
import random
import runpy
from pathlib import Path

import pytest
import torch

import finealign_kernels as fk
import finealign_kernels.feedback as fb
from finealign_kernels.feedback import Response

FEEDBACK = runpy.run_path(str(Path(__file__).with_name("test_feedback.py")))
QA_FEEDBACK, TEXTS, TOKENIZERS = FEEDBACK["QA_FEEDBACK"], FEEDBACK["TEXTS"], FEEDBACK["TOKENIZERS"]


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    pytest.importorskip("transformers", reason="segments are laid on tokenizers of transformers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield TOKENIZERS[request.param]()


def said(text, ranges):
    return [text[start:end] for start, end in ranges]


# ---------------------------------------------------------------------------------------------------------- sentences

SENTENCES = [
    ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
    ("  Spaces  around.   And  between. ", ["Spaces  around.", "And  between."]),
    ('He said "stop." Then he left (twice!). Why?!', ['He said "stop."', "Then he left (twice!).", "Why?!"]),
    ("“Stop!” he said. ‘No.’ She went.", ["“Stop!” he said.", "‘No.’", "She went."]),
    ("It costs 3.50 at shop.com, v1.2.3. Fine.", ["It costs 3.50 at shop.com, v1.2.3.", "Fine."]),
    ("Wait... what? Well… Yes… no.", ["Wait... what?", "Well…", "Yes… no."]),
    ("Dr. Who met Mr. T. J. Smith, e.g. at No. 5. Then", ["Dr. Who met Mr. T. J. Smith, e.g. at No. 5.", "Then"]),
    ("I can't. Then I won’t. End", ["I can't.", "Then I won’t.", "End"]),
    ("1. First. 2. not a line\n2. Second\n- Third", ["1. First.", "2. not a line", "2. Second", "- Third"]),
    ("It was 1999. Then came 2000.", ["It was 1999.", "Then came 2000."]),
    ("A heading\n\nA line\r\nAnother\u2028Last", ["A heading", "A line", "Another", "Last"]),
    ("日本語。次の文！「はい。」終わり", ["日本語。", "次の文！", "「はい。」", "終わり"]),
    ("Ünï. Çedilla. état. Ende", ["Ünï.", "Çedilla. état.", "Ende"]),
    ("e\u0301. Next 👩\u200d🌾! 🍑. End", ["e\u0301. Next 👩\u200d🌾!", "🍑.", "End"]),
    ("... !? \n . ", ["...", "!?", "."]),
    ("vitamin C. Then", ["vitamin C. Then"]),  # what it does not know
    ("approx. Two", ["approx.", "Two"]),
    ("", []),
    (" \n\t\u3000 ", []),
]


@pytest.mark.parametrize("text, expected", SENTENCES)
def test_sentences(text, expected):
    assert said(text, fb.sentences(text)) == expected


def test_sentences_are_a_partition_of_what_is_visible():
    rng = random.Random(0)
    pieces = [
        "Word",
        "word",
        " ",
        "  ",
        ". ",
        ".",
        "! ",
        "?”",
        "…",
        "\n",
        "\n\n",
        "。",
        "3.5",
        "Dr. ",
        "é",
        "e\u0301",
        "👩\u200d🌾",
        "\u00a0",
    ]
    for _ in range(500):
        text = "".join(rng.choices(pieces, k=rng.randrange(30)))
        ranges = fb.sentences(text)
        assert all(part == part.strip() != "" for part in said(text, ranges))
        assert all(a[1] <= b[0] for a, b in zip(ranges, ranges[1:], strict=False))
        inside = {c for start, end in ranges for c in range(start, end)}
        assert all(c in inside or text[c].isspace() for c in range(len(text)))


def test_a_long_text_takes_no_longer_than_its_length():
    """Candidates that are no ends, one after another: what stands before each is not read again from the start."""
    text = "a. " * 200_000
    assert fb.sentences(text) == [(0, len(text) - 1)]


@FEEDBACK["needs_qa_feedback"]
def test_sentences_of_real_passages():
    """The passages come cut into sentences; those that hold a line break are left out."""
    found = right = there = 0
    for entry in json.loads(QA_FEEDBACK.read_text()):
        for passage in entry["passages"]:
            parts = [part.strip() for part in passage[1:] if part.strip() and "\n" not in part]
            text, ends = " ".join(parts), set()
            for part in parts[:-1]:
                ends.add(len(part) + (max(ends) + 1 if ends else 0))
            cut = {end for _, end in fb.sentences(text)} - {len(text)}
            found, right, there = found + len(cut), right + len(cut & ends), there + len(ends)
    assert there > 8000 and right / found > 0.99 and right / there > 0.97


# ------------------------------------------------------------------------------------------------------ sub-sentences


def words(count, endings, mark=","):
    return " ".join(f"w{i}" + (mark if i in endings else "") for i in range(count))


def openings(text, **options):
    """The number of the word at which each part opens."""
    return [int(part.split()[0].strip(",;!?")[1:]) for part in said(text, fb.sub_sentences(text, **options))]


def one_sentence(text):
    return [(0, len(text))]


@pytest.mark.parametrize("mark", ",;!?")
def test_golden_sub_sentences(mark):
    """Section 4.2 of the specification."""
    whole = dict(splitter=one_sentence)
    assert openings(words(33, [6, 12, 15, 24], mark), **whole) == [0, 7, 16, 25]
    assert openings(words(27, [6, 9, 12], mark), **whole) == [0, 13]
    assert openings(words(33, [6, 12, 15, 24], "."), **whole) == [0]
    for count in range(1, 11):
        assert openings(words(count, range(count), mark), **whole) == [0]
    assert openings(words(11, [4], mark), **whole) == [0, 5]
    assert fb.sub_sentences("", **whole) == fb.sub_sentences(" \n ", **whole) == []


def released_rule(words, m=5):
    """Section 4.2 word for word, with a list of parts that are joined."""
    parts = [[]]
    for i, word in enumerate(words):
        cut = i > 0 and words[i - 1][-1] in ",;!?" and i + m < len(words)
        if cut and len(parts[-1]) >= m:
            parts.append([])
        elif cut and len(parts) > 1:
            short = parts.pop()
            parts[-1] += short
            parts.append([])
        parts[-1].append(word)
    return [part for part in parts if part]


def test_sub_sentences_against_another_way_to_say_the_rule():
    rng = random.Random(1)
    for _ in range(3000):
        count, m = rng.randrange(60), rng.randrange(1, 8)
        drawn = [f"w{i}" + (rng.choice(",;!?") if rng.random() < 0.3 else "") for i in range(count)]
        text = rng.choice([" ", "  ", "\n", "\u00a0\t"]).join(drawn)
        found = fb.sub_sentences(text, least=m, splitter=one_sentence)
        assert [part.split() for part in said(text, found)] == released_rule(drawn, m)
        if len(found) > 1:
            assert min(len(part.split()) for part in said(text, found)) >= m


def test_sub_sentences_stay_in_their_sentence():
    text = f"{words(14, [6])}. Short, one. {words(12, [5]).capitalize()}"
    assert [len(part.split()) for part in said(text, fb.sub_sentences(text))] == [7, 7, 2, 6, 6]
    blank = fb.sub_sentences("a b", splitter=lambda text: [(0, 1), (1, 2), (2, 3)])
    assert blank == [(0, 1), (2, 3)]


# -------------------------------------------------------------------------------------------------------- last tokens

WORKED = [  # text, offsets, segments, last tokens
    ("Yes.\nNo", [(0, 3), (3, 5), (5, 7)], [(0, 4), (5, 7)], [1, 2]),  # ".\n" is one token over a boundary
    ("A b. C d.", [(0, 1), (1, 3), (3, 4), (4, 6), (6, 8), (8, 9)], [(0, 4), (5, 9)], [2, 5]),  # tokens open at spaces
    (
        "A b. C d.",
        [(0, 1), (1, 3), (3, 4), (4, 6), (6, 8), (8, 9), (9, 9)],
        [(0, 4), (5, 9)],
        [2, 5],
    ),  # and end of text
    ("a。b", [(0, 1), (1, 3)], [(0, 2), (2, 3)], [1, 1]),  # a token with both
    ("a日b", [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)], [(0, 2), (2, 3)], [3, 4]),  # a character of three tokens
    ("a b c", [(0, 1), (1, 3)], [(0, 1), (2, 3), (4, 5)], [0, 1, 1]),  # cut off before the last
    ("a b c", [], [(0, 1), (2, 5)], [0, 0]),
    ("a b", [(2, 3)], [(0, 1), (2, 3)], [0, 0]),  # no token yet
    ("a b", [(0, 1), (1, 2), (2, 3)], [(0, 2), (2, 3)], [0, 2]),  # a token of white space
    ("a b", [(0, 1), (1, 3)], [], []),
]


@pytest.mark.parametrize("text, offsets, segments, last", WORKED)
def test_last_tokens_of_worked_examples(text, offsets, segments, last):
    assert fb.segment_tokens(offsets, text, segments) == last


@pytest.mark.parametrize("segments", ([(2, 3), (0, 1)], [(0, 2), (1, 3)], [(0, 4)]))
def test_segments_out_of_order_are_refused(segments):
    with pytest.raises(ValueError, match="segments must be in order, without overlap, and end at most at 3, got"):
        fb.segment_tokens([(0, 1), (1, 3)], "a b", segments)


def random_text(rng):
    pieces = [
        "The tall ship",
        " sailed,",
        " so;",
        " 3.5 knots",
        ". ",
        ".\n",
        "! ",
        "?\n\n",
        " and",
        " 日本語。",
        "e\u0301té ",
        "👩\u200d🌾",
        " 🍑",
        "  ",
        "\t",
        " it’s",
        ".",
        " (yes)",
        "\u00a0",
    ]
    return "".join(rng.choices(pieces, k=rng.randrange(1, 40)))


def visible(text, start, end):
    return {c for c in range(start, end) if not text[c].isspace()}


@pytest.mark.parametrize("split", (fb.sentences, fb.sub_sentences))
def test_every_last_token_is_right(tokenizer, split):
    """The segment's token with no later one of the segment's; nothing of a later segment before it; cut off or not."""
    rng = random.Random(2)
    for text in TEXTS + [random_text(rng) for _ in range(60)]:
        whole = fb.encode(tokenizer, "Question?", Response(text)).offsets
        segments = split(text)
        for offsets in (whole, whole[: rng.randrange(len(whole) + 1)]):
            last = fb.segment_tokens(offsets, text, segments)
            assert len(last) == len(segments) and last == sorted(last)
            covers = [visible(text, *offset) for offset in offsets]
            for j, segment in enumerate(segments):
                own = [t for t, cover in enumerate(covers) if cover & visible(text, *segment)]
                assert last[j] == (own[-1] if own else last[j - 1] if j else 0)


@pytest.mark.parametrize("tokenizer", ["byte-level", "smollm2"], indirect=True)  # lossless ones
def test_the_text_up_to_a_last_token_holds_the_segment(tokenizer):
    """By decoding, which knows no offsets: with the token the segment is whole, without it is not."""
    rng = random.Random(3)
    for text in TEXTS + [random_text(rng) for _ in range(60)]:
        encoded = fb.encode(tokenizer, "Question?", Response(text), eos=False)
        ids = encoded.input_ids[encoded.response_start :]
        segments = fb.sub_sentences(text)
        for (_, end), t in zip(segments, fb.segment_tokens(encoded.offsets, text, segments), strict=True):
            with_it, without = tokenizer.decode(ids[: t + 1]), tokenizer.decode(ids[:t])
            assert with_it.startswith(text[:end]) and not without.startswith(text[:end]), (text, end)


# ---------------------------------------------------------------------------------------------------- generated tokens


def test_generated_tokens_are_their_text(tokenizer):
    """Tokens drawn at random, which no text would be cut into, bytes that are no character among them."""
    check_generated(tokenizer)


def test_generated_tokens_of_sentencepiece_are_their_text():
    """Decoders that drop the first space, and one that makes characters of bytes, as Llama 2 has it."""
    decoders = pytest.importorskip("tokenizers").decoders
    unigram, llama = TOKENIZERS["unigram"](), TOKENIZERS["byte-fallback"]()
    unigram.backend_tokenizer.decoder = decoders.Metaspace()
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    llama.backend_tokenizer.decoder = decoders.Sequence(parts)
    check_generated(unigram)
    for text in ["the lamb. The 日", "a 👩\u200d🌾\u3000b. é"]:
        ids = llama(text, add_special_tokens=False)["input_ids"]
        assert fb.decode(llama, ids).text == text


def check_generated(tokenizer):
    rng = random.Random(4)
    for _ in range(40):
        ids = [rng.randrange(min(len(tokenizer), 2000)) for _ in range(rng.randrange(30))]
        found = fb.decode(tokenizer, ids)
        assert found.text == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert len(found.offsets) == len(ids)
        flat = [0, *(edge for offset in dict.fromkeys(found.offsets) for edge in offset), len(found.text)]
        assert flat == sorted(flat) and all(a == b for a, b in zip(flat[::2], flat[1::2], strict=True))
        for token, (start, end) in zip(ids, found.offsets, strict=True):
            assert token not in tokenizer.all_special_ids or start == end


@pytest.mark.parametrize("tokenizer", ["byte-level", "smollm2"], indirect=True)  # lossless ones
def test_generated_tokens_of_a_text_have_its_last_tokens(tokenizer):
    rng = random.Random(5)
    for text in TEXTS + [random_text(rng) + "." for _ in range(40)]:
        encoded = fb.encode(tokenizer, "Question?", Response(text))
        found = fb.decode(tokenizer, encoded.input_ids[encoded.response_start :])
        assert found.text == text
        segments = fb.sub_sentences(text)
        last = fb.segment_tokens(encoded.offsets, text, segments)
        assert fb.segment_tokens(found.offsets, text, segments) == last


def test_generated_tokens_by_hand():
    tokenizer = TOKENIZERS["byte-level"]()
    eos = tokenizer.eos_token_id
    a, *parts = tokenizer.convert_tokens_to_ids(["a", "æ", "Ĺ", "¥"])  # then the three bytes of 日
    assert fb.decode(tokenizer, [a, *parts, a, eos]) == ("a日a", [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3), (3, 3)])
    cut = fb.decode(tokenizer, [a, *parts[:2], eos, a, eos, eos])
    assert cut == ("a\ufffda", [(0, 1), (1, 2), (1, 2), (2, 2), (2, 3), (3, 3), (3, 3)])
    assert fb.decode(tokenizer, [a, parts[0]]) == ("a\ufffd", [(0, 1), (1, 2)])
    assert fb.decode(tokenizer, [eos]) == ("", [(0, 0)]) and fb.decode(tokenizer, []) == ("", [])


def test_a_replacement_character_of_the_text_is_a_whole_one():
    """U+FFFD itself, beside the one that a decoder writes for a part of a character."""
    tokenizer = TOKENIZERS["byte-level"]()
    a, x, y, z, part = tokenizer.convert_tokens_to_ids(["a", "\u00ef", "\u00bf", "\u00bd", "\u00e6"])
    bad = [x, y, z]
    ranges = [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)]
    assert fb.decode(tokenizer, [a, *bad, a]) == ("a\ufffda", ranges)
    assert fb.decode(tokenizer, [*bad, *bad]) == ("\ufffd\ufffd", [(0, 1)] * 3 + [(1, 2)] * 3)
    assert fb.decode(tokenizer, [*bad, part, a]) == ("\ufffd\ufffda", [(0, 1)] * 3 + [(1, 3)] * 2)
    tokenizer.add_tokens(["\ufffd"])
    one = tokenizer.convert_tokens_to_ids("\ufffd")
    assert fb.decode(tokenizer, [a, one, a]) == ("a\ufffda", [(0, 1), (1, 2), (2, 3)])


def test_from_text_to_token_rewards(tokenizer):
    """The last sentence's reward stands before the end-of-sequence token, the sequence's on it."""
    text = "One sentence here. And another!\nThe last"
    offsets = fb.encode(tokenizer, "Question?", Response(text)).offsets
    end = torch.tensor(fb.segment_tokens(offsets, text, fb.sentences(text)))
    n = len(offsets)
    model = fk.SegmentRewards(torch.tensor([0.5, -0.5, 0.25]), end, torch.tensor([0, 3]))
    found = fk.token_rewards(model, cu_seqlens=torch.tensor([0, n]))
    places = found.nonzero()[:, 0].tolist()
    assert places == end.tolist() and found[places].tolist() == [0.5, -0.5, 0.25]
    assert places[-1] == n - (2 if tokenizer.eos_token_id is not None else 1)
    cut = offsets[: places[1]]  # in the middle of the second sentence
    end = torch.tensor(fb.segment_tokens(cut, text, fb.sentences(text)))
    found = fk.token_rewards(model._replace(end=end), cu_seqlens=torch.tensor([0, len(cut)]))
    assert found[places[0]] == 0.5 and found[-1] == -0.25 and found.count_nonzero() == 2

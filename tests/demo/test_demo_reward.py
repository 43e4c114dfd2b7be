"""finealign demo --reward on the tiny model: planted pairs, hidden states of segments, the arms, the page."""

import random

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the demo needs transformers")

from finealign_kernels import demo, feedback  # noqa: E402
from finealign_kernels.cli import main  # noqa: E402
from finealign_kernels.demo import models, reward, reward_data, reward_summary  # noqa: E402

TINY = ["demo", "--model", "tiny", "--threads", "1"]
pytestmark = pytest.mark.usefixtures("one_thread")


def options(**changed):
    return demo.Options(model="tiny", reward=20)._replace(**changed)


def faults(response):
    return len(response.spans)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return models.load_causal(options(), feedback.sample())


def learnable(count, draw, planted=0):
    """Pairs of answers of two segments whose truth is the first feature; the first `planted` labels are flipped."""
    example = feedback.sample()[0]
    pairs, answers = [], []
    for side in range(2):
        for i in range(count):
            hidden = torch.randn(2, 6, generator=draw)
            better = (side == 0) != (i < planted)
            hidden[:, 0] += 3.0 if better else -3.0
            answers.append(reward_data.Read(None, [(0, 1), (1, 2)], hidden))
    pairs = [reward_data.Judged(example, *example.responses[:2], planted=i < planted) for i in range(count)]
    return reward_data.gather(pairs, answers)


def test_end_to_end(tmp_path, capsys):
    path = tmp_path / "report.html"
    assert main([*TINY, "--reward", "12", "--report", str(path)]) == 0
    output, page = capsys.readouterr().out, path.read_text(encoding="utf-8")
    assert str(path) in output and "strongest" in output and "had flipped labels" in output
    for name in reward.ARMS:
        assert name in output and f">{name}</th>" in page
    for text in ("Reward models on tiny, 12 pairs", "flipped labels, %", "by segment score", "Preference strength"):
        assert text in page
    assert "Ranked right, %, by votes" not in page


def test_judgements_of_a_file_stay_as_they_are(tmp_path, capsys):
    data, path = tmp_path / "sample.jsonl", tmp_path / "report.html"
    feedback.write(data, feedback.sample()[:9])
    assert main([*TINY, "--reward", "--max-prompt", "3", "--data", str(data), "--report", str(path)]) == 0
    page = path.read_text(encoding="utf-8")
    assert "right labels" not in page and "Ranked right, %, by votes" in page and "not known" in page
    output = capsys.readouterr().out
    assert "had flipped labels" not in output and "last 3 of a prompt, first 80 of an answer" in page
    assert "The prompt is cut to its last 3 tokens (--max-prompt)" in output
    train, held = reward_data.read_judgements(options(data=str(data)), feedback.sample()[:9])
    assert not any(pair.planted for pair in [*train, *held])
    real = {
        (e.id, e.responses[p.chosen], e.responses[p.rejected], p.strength)
        for e in feedback.sample()
        for p in e.preferences
    }
    assert {(pair.example.id, pair.chosen, pair.rejected, pair.votes) for pair in [*train, *held]} <= real


def test_planted_pairs_choose_the_answer_with_fewer_faults_and_turn_the_share_of_labels():
    train, held = reward_data.read_judgements(options(reward=60, noise=0.25), feedback.sample())
    assert len(train) == 60 and len(held) == 30 and sum(pair.planted for pair in train) == 15
    for pair in [*train, *held]:
        better, worse = (pair.rejected, pair.chosen) if pair.planted else (pair.chosen, pair.rejected)
        assert faults(better) < faults(worse) <= reward_data.MOST
    assert not any(pair.planted for pair in held)
    assert not {pair.example.id for pair in train} & {pair.example.id for pair in held}
    again, _ = reward_data.read_judgements(options(reward=60, noise=0.25), feedback.sample())
    other, _ = reward_data.read_judgements(options(reward=60, noise=0.25, seed=1), feedback.sample())
    assert again == train and other != train


def test_each_kind_of_fault_is_what_its_span_says():
    examples = feedback.sample()
    sentences = {text for e in examples for r in e.responses if not r.spans for text in reward_data._sentences(r.text)}
    seen = set()
    for pair in reward_data.planted(examples, 80, random.Random(0)):
        own = reward_data._sentences(next(r.text for r in pair.example.responses if not r.spans))
        for response in (pair.chosen, pair.rejected):
            for span in response.spans:
                text = response.text[span.start : span.end]
                seen.add(span.kind)
                if span.kind == "irrelevant":
                    assert text in sentences and text not in own
                elif span.kind == "repetition":
                    assert text in response.text[: span.start]
                else:
                    assert any(sorted(text.rstrip(".").split()) == sorted(s.rstrip(".").split()) for s in own)
    assert seen == set(reward_data.KINDS)


def test_hidden_states_are_those_of_the_whole_sequence(tiny):
    causal, tokenizer = tiny
    example = feedback.sample()[0]
    pairs = [reward_data.Judged(example, *example.responses[1:3]), reward_data.Judged(example, *example.responses[:2])]
    found = reward_data.read_pairs(options(), causal.base_model, tokenizer, pairs)
    assert found.cu_seqlens.tolist()[-1] == len(found.hidden) and len(found.answers) == 4
    for read in found.answers:
        ids = torch.tensor([read.answer.prompt_ids + read.answer.response_ids])
        with torch.no_grad():
            whole = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state[
                0, len(read.answer.prompt_ids) :
            ]
        cut = feedback.sub_sentences(read.answer.response.text)
        assert len(read.segments) == len(cut)
        for (first, stop), hidden, (start, end) in zip(read.segments, read.hidden, cut, strict=True):
            torch.testing.assert_close(hidden, whole[first:stop].mean(0), rtol=1e-4, atol=1e-5)
            assert read.answer.offsets[first][0] <= start and end <= read.answer.offsets[stop - 1][1]
    hidden, cu_seqlens = found.of([1])
    expected = [found.answers[1].hidden, found.answers[3].hidden]
    assert torch.equal(hidden, torch.cat(expected)) and cu_seqlens.tolist()[1] == len(expected[0])


def test_half_of_the_layers(tiny):
    layers = list(tiny[0].base_model.layers)
    assert len(reward.half(tiny[0].base_model).layers) == len(layers) // 2
    tiny[0].base_model.layers = torch.nn.ModuleList(layers)


def test_half_of_layers_of_another_name():
    config = transformers.GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=20, bos_token_id=0, eos_token_id=0)
    body = reward.half(transformers.GPT2LMHeadModel(config).base_model)
    assert len(body.h) == 2 and body(input_ids=torch.tensor([[1, 2]])).last_hidden_state.shape == (1, 2, 8)
    with pytest.raises(demo.UsageError, match="--model must have a list of layers for --reward, got Linear"):
        reward.half(torch.nn.Linear(2, 2))


def test_arms_learn_what_can_be_learned_and_flips_undo_planted_labels():
    draw = torch.Generator().manual_seed(0)
    train, held = learnable(120, draw, planted=36), learnable(60, draw)
    result = reward.train_all(options(noise=0.3), train, held)
    accuracy = {name: each.mean().item() for name, each in reward_summary.accuracies(result).items()}
    assert accuracy["right labels"] > 0.95 and set(accuracy) == set(reward.ARMS)
    assert reward_summary.flip_precision(result) > 0.9 and int(result.weakest.sum()) == 36
    assert all(right.shape == (reward.SEEDS, 60) for right in result.right.values())
    mean = result.strength.mean
    assert mean[~result.train.planted].mean() > 0 > mean[result.train.planted].mean()
    # a flip of the right pairs is training on right labels: the same head, whatever order the pairs come in
    flipped = train._replace(
        answers=train.answers[120:156] + train.answers[36:120] + train.answers[:36] + train.answers[156:]
    )
    one = reward.train_head(train, 7, reward.Arm("flip"), flip=train.planted)
    other = reward.train_head(flipped, 7, reward.Arm())
    torch.testing.assert_close(reward.differences(one, held), reward.differences(other, held), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pairs, names", [(6, ["weakest fifth", "2", "3", "4", "strongest"]), (2, ["1", "2"])])
def test_parts_are_numbered_from_the_weakest(pairs, names):
    right = torch.tensor([[True] * (pairs - 1) + [False]])  # of the strongest pair alone a head is wrong
    result = reward.Result(None, None, None, torch.arange(pairs), None, {"flip": right}, None)
    columns, (row,) = reward_summary.table(result)
    assert columns[3:] == names and row[3] == "100.0" and row[-1] == "0.0"


def test_contrast_adds_to_the_loss_of_both_views():
    draw = torch.Generator().manual_seed(1)
    data = learnable(8, draw)
    head = reward.Head(6)
    hidden, cu_seqlens = data.of(range(8))
    plain = reward.loss_of(head, reward.Arm(), hidden, cu_seqlens, {})
    torch.manual_seed(0)
    with_contrast = reward.loss_of(head, reward.Arm(contrast=True), hidden, cu_seqlens, {})
    assert with_contrast > plain + 0.01 and all(m.p == 0 for m in head.modules() if isinstance(m, torch.nn.Dropout))


def test_lowest_segments_are_compared_with_marks_by_hand():
    text = "It is so here. It was so there. It may be so."
    marks = ((15, 31),), (), ((0, 14), (15, 31), (32, 45))
    answers = []
    for own in marks:
        spans = tuple(feedback.Span(*one, "irrelevant") for one in own)
        offsets = [(0, 14), (15, 31), (32, 45)]
        answer = reward_data.Answer(feedback.Response(text, spans), [0], [1, 2, 3], offsets, [1.0] * 3, [0.0] * 3)
        answers.append(reward_data.Read(answer, [(0, 1), (1, 2), (2, 3)], torch.zeros(3, 2)))
    held = reward_data.gather([], [answers[0], answers[0], answers[1], answers[2]])
    scores = torch.tensor([0.1, -0.4, 0.2, -0.9, 0.0, 0.1, 1.0, 2.0, 3.0, 1.0, 2.0, 3.0])
    result = reward.Result(None, held, None, None, None, {}, scores)
    assert reward_summary.lowest_is_marked(result) == (0.5, pytest.approx(1 / 3), 2)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--reward", "3"], "--reward"),
        (["--reward", "--rl"], "--rl"),
        (["--reward", "--loss", "ipo"], "--loss"),
        (["--reward", "--steps", "3"], "--steps"),
        (["--reward", "--no-compare"], "--no-compare"),
        (["--reward", "--noise", "0.5"], "--noise"),
        (["--noise", "0.2"], "--noise"),
        (["--reward", "--noise", "0.2", "--data", "x.jsonl"], "--noise"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(arguments, named, capsys):
    assert main([*TINY, *arguments]) == 2
    assert named in capsys.readouterr().err


def test_data_without_judgements_is_refused(tmp_path, capsys):
    path = tmp_path / "one.jsonl"
    feedback.write(path, [feedback.Example("e", "p", (feedback.Response("only one"),))])
    assert main([*TINY, "--reward", "--data", str(path)]) == 2
    assert "judgements of three prompts" in capsys.readouterr().err

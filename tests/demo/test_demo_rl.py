"""finealign demo --rl on the tiny model: rewards from spans and preferences, what training makes of them, the page."""

import pytest
import torch

pytest.importorskip("transformers", reason="the demo needs transformers")

import finealign_kernels as fk  # noqa: E402
from finealign_kernels import demo, feedback  # noqa: E402
from finealign_kernels.cli import main  # noqa: E402
from finealign_kernels.demo import heads, models, rl, rl_rollouts  # noqa: E402

TINY = ["demo", "--model", "tiny", "--steps", "2", "--batch", "2", "--pairs", "3", "--threads", "1"]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def options(**changed):
    return demo.Options(model="tiny", rl="ppo", steps=4, batch=2, pairs=4)._replace(**changed)


def prepared(chosen, examples=None):
    examples = feedback.sample() if examples is None else examples
    torch.manual_seed(chosen.seed)
    model = models.load_model(chosen, examples)
    return model, rl_rollouts.read_rollouts(chosen, model, examples)


def an_example(**changed):
    spans = (feedback.Span(9, 17, "factual", score=-0.5), feedback.Span(9, 17, "Wrong-Grounding"))
    spans = (*spans, feedback.Span(19, 26, "repetition"))
    responses = (feedback.Response("It is so because it is."), feedback.Response("It is so otherwise, or so.", spans))
    return feedback.Example("e", "Why?", responses, (feedback.Preference(0, 1),))


@pytest.mark.parametrize("policy", demo.POLICIES)
@pytest.mark.parametrize("way", ["--full", "--lora"])
def test_end_to_end(policy, way, tmp_path, capsys):
    if way == "--lora":
        pytest.importorskip("peft")
    path = tmp_path / "report.html"
    assert main([*TINY, "--rl", policy, way, "--report", str(path)]) == 0
    output, page = capsys.readouterr().out, path.read_text(encoding="utf-8")
    assert str(path) in output and "to reinforce" in output and "fused, unmasked" in output
    for text in (f"{policy.upper()} on tiny, 2 updates", "Rewards of the last answers", "by advantage", "by mask"):
        assert text in page
    assert ("value loss" in page) == (policy == "ppo")


def test_without_a_value_it_is_ppo(tmp_path, capsys):
    path = tmp_path / "report.html"
    assert main([*TINY, "--max-prompt", "3", "--report", str(path), "--rl"]) == 0
    page = path.read_text(encoding="utf-8")
    assert "PPO on tiny" in page and "last 3 of a prompt, first 80 of an answer" in page
    assert "The prompt is cut to its last 3 tokens (--max-prompt)" in capsys.readouterr().out


@pytest.mark.parametrize("policy", demo.POLICIES)
def test_every_update_agrees_with_eager_and_the_ratio_moves_at_the_second(policy):
    chosen = options(rl=policy, lr=1e-3)
    model, rollouts = prepared(chosen)
    updates, last = rl.train(chosen, model, rollouts)
    assert all(0 <= value <= 1e-5 for update in updates for value in update.differences.values())
    assert last.head.metrics.ratio != 1 and updates[-1].raised > 0 > updates[-1].lowered
    kept = last.batch.token_weight.bool() & last.batch.mask
    assert last.head.dlogp[~kept].eq(0).all() and last.head.dlogp[kept].ne(0).float().mean() > 0.5


def test_the_loss_of_the_heads_is_that_of_the_formula():
    """By hand, one answer of two tokens and one of one, PPO over kept tokens and GRPO over answers."""
    mask = torch.tensor([[True, True], [True, False]])
    logp, old = torch.tensor([[-1.0, -2.0], [-0.5, 9.0]]), torch.tensor([[-1.5, -2.0], [-0.4, 9.0]])
    tokens = rl_rollouts.Rollout(*[None] * 12)._replace(
        mask=mask,
        old_logp=old,
        advantage=torch.tensor([[2.0, -1.0], [-3.0, 0.0]]),
        token_weight=torch.tensor([[1.0, 1.0], [1.0, 1.0]]),
    )
    first, second, third = -1.2 * 2, 1.0, 3 * 2.718281828459045**-0.1
    for policy, expected in (("ppo", (first + second + third) / 3), ("grpo", ((first + second) / 2 + third) / 2)):
        chosen = options(rl=policy)
        assert heads.plain_loss(chosen, logp, tokens).item() == pytest.approx(expected, rel=1e-6)
        assert heads.library_loss(chosen, logp, tokens).loss.item() == pytest.approx(expected, rel=1e-6)


def test_spans_are_rewards_at_their_last_tokens_and_preferences_at_the_answers():
    example = an_example()
    chosen = options(batch=1, pairs=1)
    model, (rollout,) = prepared(chosen, [example])
    answers = rollout.answers
    assert rollout.group.tolist() == [0, 0] and set(rollout.rewards) == {*rl_rollouts.SORTS, rl_rollouts.PREFERRED}
    factual, relevance = rollout.rewards["factuality"], rollout.rewards["relevance"]
    assert sorted(factual.reward.tolist()) == [-1.0, -0.5] and factual.cu_segments.tolist() == [0, 0, 2]
    assert relevance.reward.tolist() == [-1.0] and len(rollout.rewards["completeness"].reward) == 0
    for found, end in ((factual, 17), (relevance, 26)):
        for place in found.end.tolist():
            t = place - (len(answers[1].prompt_ids) - 1)
            assert rollout.labels[1, place] == answers[1].response_ids[t] and answers[1].offsets[t][1] >= end
            assert answers[1].offsets[t][0] < end
    preferred = rollout.rewards[rl_rollouts.PREFERRED]
    assert preferred.reward.tolist() == [1.0, -1.0]
    assert preferred.end.tolist() == [int(row.nonzero()[-1]) for row in rollout.mask]


def test_judgements_become_shares():
    responses = tuple(feedback.Response(text) for text in "abcd")
    judged = [feedback.Preference(0, 1), feedback.Preference(0, 2), feedback.Preference(2, 0)]
    assert rl_rollouts.preferred(feedback.Example("e", "p", responses, tuple(judged))) == [1 / 3, -1.0, 0.0, 0.0]


def test_grpo_compares_the_answers_to_one_prompt():
    chosen = options(rl="grpo")
    model, (rollout, *_) = prepared(chosen)
    hidden = models.hidden_states(model, rollout).detach()
    found = rl.judged(chosen, rollout, hidden, model.weight.detach(), None)
    total = fk.token_rewards(list(rollout.rewards.values()), mask=rollout.mask).sum(-1)
    for group in rollout.group.unique():
        of = rollout.group == group
        mean, std = total[of].mean(), total[of].std()
        for s in of.nonzero()[:, 0]:
            expected = ((total[s] - mean) / (std + 1e-4)).expand(int(rollout.mask[s].sum()))
            torch.testing.assert_close(found.advantage[s][rollout.mask[s]], expected)
    assert found.advantage[~rollout.mask].eq(0).all()


def test_ppo_keeps_tokens_whose_score_agrees_with_their_advantage():
    chosen = options()
    model, (rollout, *_) = prepared(chosen)
    critic = rl.Critic(model.weight.shape[1])
    hidden = models.hidden_states(model, rollout).detach()
    found = rl.judged(chosen, rollout, hidden, model.weight.detach(), critic)
    assert found.values.eq(0).all()  # before its first step
    score, baseline = rollout.token_score, rollout.token_score[rollout.mask].mean()
    good, bad = (found.advantage >= 0) & (score > baseline), (found.advantage < 0) & (score < baseline)
    assert torch.equal(found.token_weight.bool(), (good | bad) & rollout.mask)
    assert found.advantage[rollout.mask].mean().abs() < 1e-5  # whitened


def test_without_marks_there_is_no_mask():
    responses = (feedback.Response("Yes, it is so."), feedback.Response("No, it is not."))
    example = feedback.Example("e", "Is it?", responses, (feedback.Preference(0, 1),))
    chosen = options(batch=1, pairs=1, steps=2)
    model, rollouts = prepared(chosen, [example])
    updates, last = rl.train(chosen, model, rollouts)
    assert last.unmasked is None and last.batch.adaptive is None and last.batch.token_weight.eq(1).all()


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--rl", "reinforce"], "--rl"),
        (["--rl", "--loss", "ipo"], "--loss"),
        (["--rl", "--pivots", "sign"], "--pivots"),
        (["--rl", "--trainer", "trl"], "--trainer"),
        (["--rl", "--span-weight", "3"], "--span-weight"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(arguments, named, capsys):
    try:
        status = main(["demo", "--model", "tiny", *arguments])
    except SystemExit as left:  # argparse's own
        status = left.code
    assert status == 2 and named in capsys.readouterr().err


def test_data_without_a_choice_is_refused(tmp_path, capsys):
    path = tmp_path / "one.jsonl"
    feedback.write(path, [feedback.Example("e", "p", (feedback.Response("only one"),))])
    assert main([*TINY, "--rl", "--data", str(path)]) == 2
    assert "two answers" in capsys.readouterr().err

"""FineGrainedGRPOTrainer: TRL's GRPO for numbers, and rewards of segments on the tokens that earned them."""

import os
from functools import partial
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl_runs import SHORT, model, run, sentence, tokenizer  # noqa: E402

import finealign_kernels as fk  # noqa: E402
from finealign_kernels.integrations import _trl_grpo  # noqa: E402
from finealign_kernels.integrations.trl import FineGrainedGRPOTrainer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


PROMPTS = [{"prompt": sentence(i, 2) + " "} for i in range(12)]
GENERATED = dict(num_generations=4, max_completion_length=12, temperature=1.0, per_device_train_batch_size=4)


def trained(cls, folder, rewards, *, config=None, watch=None, **options):
    class Watched(cls):
        def _generate_and_score_completions(self, inputs):
            found = super()._generate_and_score_completions(inputs)
            if watch is not None:
                watch.append(found)
            return found

    arguments = partial(GRPOConfig, **(SHORT | GENERATED | dict(max_steps=3, beta=0.0) | (config or {})))
    return run(Watched, arguments, folder, PROMPTS, model=model(), reward_funcs=rewards, **options)


def length(completions, **_):
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


def halves(text):
    """Two segments, whatever the text."""
    middle = max(1, len(text) // 2)
    return [(0, middle), (middle, len(text))] if len(text) > 1 else [(0, len(text))] if text else []


def by_half(completions, **_):
    return [[sum(map(ord, text[s:e])) % 5 / 5 - 0.4 for s, e in halves(text)] for text in completions]


def test_numbers_give_trls_training(folder):
    stock = trained(GRPOTrainer, folder, length)[1]
    assert apart_of_sums(trained(FineGrainedGRPOTrainer, folder, length)[1], stock) <= 1e-5


def apart_of_sums(ours, stock):
    """As apart, the losses relative to the size of their terms: they are sums of advantages that cancel."""
    pairs = list(zip(ours, stock, strict=True))
    losses = max(abs(one["loss"] - other["loss"]) for one, other in pairs)
    return max(losses, max(abs(one["grad_norm"] / other["grad_norm"] - 1) for one, other in pairs))


def offsets_of(ids):
    """The tokenizer has one token a byte, and what is sampled is bytes: positions of characters by decoding."""
    return fk.feedback.decode(tokenizer(), ids)


def test_numbers_of_numpy_and_torch_are_numbers():
    """As TRL takes them: each answer, the list of them, and the parts of an answer."""
    cuts = [[(0, 2, 0.5), (2, 3, -1.0)], [{"start": 0, "end": 1, "score": 0.25}], [0.5, 1.0], 0.5, None, float("nan")]
    wanted = [-0.5, 0.25, 1.5, 0.5, None, pytest.approx(float("nan"), nan_ok=True)]
    assert _trl_grpo.Dense(lambda: cuts)() == wanted
    for number in (np.float32, np.float64, torch.tensor):
        given = [
            [(np.int64(0), 2, number(0.5)), (2, 3, number(-1.0))],
            [{"start": np.int64(0), "end": 1, "score": number(0.25)}],
            (np.array if number is not torch.tensor else torch.tensor)([0.5, 1.0]),
            number(0.5),
            None,
            number(float("nan")),
        ]
        dense = _trl_grpo.Dense(lambda given=given: given)
        assert dense() == wanted and dense.answers[3] == 0.5 and dense.answers[2] == [0.5, 1.0]
    for every in (np.array([0.5, 0.25]), torch.tensor([0.5, 0.25]), np.array([[0.25, 0.25], [0.0, 0.25]])):
        assert _trl_grpo.Dense(lambda every=every: every)() == [0.5, 0.25]


@pytest.mark.parametrize("form", ["numbers", "ranges", "mappings"])
@pytest.mark.parametrize("kind", ["return_to_go", "outcome"])
def test_advantages_are_the_turns(form, kind, folder):
    """Each token has the advantage of its segment, against the other completions of its prompt."""

    def rewards(completions, **_):
        numbers = by_half(completions)
        if form == "numbers":
            return numbers
        cuts = [list(zip(halves(text), row, strict=True)) for text, row in zip(completions, numbers, strict=True)]
        if form == "ranges":
            return [[(s, e, r) for (s, e), r in one] for one in cuts]
        return [[{"start": s, "end": e, "score": r} for (s, e), r in one] for one in cuts]

    seen = []
    trainer, told = trained(
        FineGrainedGRPOTrainer, folder, rewards, segments=halves, advantages=kind, watch=seen, config=dict(max_steps=1)
    )
    assert "tokens/kept" in told[0]
    for out in seen:
        mask = out["completion_mask"].bool()
        texts = [offsets_of(ids[m].tolist()) for ids, m in zip(out["completion_ids"], mask, strict=True)]
        numbers = by_half([text for text, _ in texts])
        to_go = [[sum(row[k if kind == "return_to_go" else 0 :]) for k in range(3)] for row in numbers]
        for i, (text, offsets) in enumerate(texts):
            others = [j for j in range(4 * (i // 4), 4 * (i // 4) + 4) if j != i]
            ends = fk.feedback.segment_tokens(offsets, text, halves(text))
            expected, start = [0.0] * int(mask[i].sum()), 0
            for k, end in enumerate(ends):
                own = to_go[i][k] - sum(to_go[j][k] for j in others) / 3
                for t in range(start, end + 1):
                    expected[t] = own
                start = end + 1
            assert out["advantages"][i][mask[i]].tolist() == pytest.approx(expected, abs=1e-5)
            assert not out["advantages"][i][~mask[i]].any()


def test_functions_of_both_sorts_and_their_weights(folder):
    seen, options = [], dict(segments=halves, config=dict(max_steps=1, reward_weights=[0.5, 2.0]))
    trained(FineGrainedGRPOTrainer, folder, [length, by_half], watch=seen, **options)
    for out in seen:
        mask = out["completion_mask"].bool()
        texts = [offsets_of(ids[m].tolist())[0] for ids, m in zip(out["completion_ids"], mask, strict=True)]
        first = 0.5 * torch.tensor(length(texts)) + 2.0 * torch.tensor([sum(row) for row in by_half(texts)])
        expected = fk.group_advantages(first, 4, kind="leave_one_out")
        torch.testing.assert_close(out["advantages"][:, 0], expected, rtol=1e-5, atol=1e-5)  # return to go of token 0


def test_a_completion_without_a_judgement_is_left_out(folder):
    """None, of the first completion of each prompt: no advantage, and no part in the others' baseline."""

    def judge(completions, **_):
        return [None if i % 4 == 0 else parts for i, parts in enumerate(by_half(completions))]

    seen = []
    trained(FineGrainedGRPOTrainer, folder, judge, segments=halves, watch=seen, config=dict(max_steps=1))
    out, mask = seen[0], seen[0]["completion_mask"].bool()
    texts = [offsets_of(ids[m].tolist())[0] for ids, m in zip(out["completion_ids"], mask, strict=True)]
    sums = torch.tensor([float("nan"), *(sum(row) for row in by_half(texts)[1:])])
    assert not out["advantages"][0].any()
    expected = fk.group_advantages(sums, 4, kind="leave_one_out")
    torch.testing.assert_close(out["advantages"][:, 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_group_spread_over_ranks(rank, monkeypatch):
    """Two completions on each of two ranks: the advantages are those of the four, this rank's half of them."""
    rewards = [[[0.5, -1.0], [0.2]], [[1.0, 0.0], [-0.3, 0.7]]]
    trainer = object.__new__(FineGrainedGRPOTrainer)
    trainer._kind, trainer.accelerator = "return_to_go", SimpleNamespace(process_index=rank)
    monkeypatch.setattr(_trl_grpo, "gather_object", lambda mine: rewards[0] + rewards[1])
    model = [[_trl_grpo.OnTokens(r, 2 * k, 2 * k + 2) for k, r in enumerate(row)] for row in rewards[rank]]
    found = trainer._of_segments(model, torch.ones(2, 5, dtype=torch.bool), 4)
    flat = torch.tensor([r for row in rewards[0] + rewards[1] for r in row])
    whole = fk.turn_advantages(flat, torch.tensor([0, 2, 3, 5, 7]), 4).split([2, 1, 2, 2])
    for row, expected in zip(found, whole[2 * rank : 2 * rank + 2], strict=True):
        assert row.tolist() == pytest.approx(
            [*expected.repeat_interleave(2).tolist(), *[0.0] * (5 - 2 * len(expected))]
        )


def test_decoupled_advantages(folder):
    seen, options = [], dict(segments=halves, advantages="decoupled", config=dict(max_steps=1))
    trained(FineGrainedGRPOTrainer, folder, [length, by_half], watch=seen, **options)
    out, mask = seen[0], seen[0]["completion_mask"].bool()
    texts = [offsets_of(ids[m].tolist())[0] for ids, m in zip(out["completion_ids"], mask, strict=True)]
    both = torch.tensor([length(texts), [sum(row) for row in by_half(texts)]])
    torch.testing.assert_close(out["advantages"][:, 0], fk.decoupled_advantages(both, 4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rewards", [by_half, length], ids=["segments", "numbers"])
def test_advantages_by_a_value_function(rewards, folder):
    """Whitened GAE of the rewards where segments end, by the definition: a loop over tokens from the last."""
    gamma, lam, asked = 0.9, 0.8, []

    def values(prompt_ids, prompt_mask, completion_ids, completion_mask):
        asked.append(torch.is_grad_enabled())
        assert prompt_ids.shape == prompt_mask.shape and completion_ids.shape == completion_mask.shape
        return torch.sin(completion_ids.float())

    seen, options = [], dict(advantages="gae", values=values, gae=dict(gamma=gamma, lam=lam))
    trained(FineGrainedGRPOTrainer, folder, rewards, segments=halves, watch=seen, config=dict(max_steps=1), **options)
    out, mask = seen[0], seen[0]["completion_mask"].bool()
    expected = torch.zeros(mask.shape, dtype=torch.float64)
    for i, ids in enumerate(out["completion_ids"]):
        text, offsets = offsets_of(ids[mask[i]].tolist())
        earned = by_half([text])[0] if rewards is by_half else length([text])
        ends = (
            fk.feedback.segment_tokens(offsets, text, halves(text)) if rewards is by_half else [int(mask[i].sum()) - 1]
        )
        v, after, ahead = torch.sin(ids.double()), 0.0, 0.0
        for t in reversed(range(int(mask[i].sum()))):
            reward = sum(r for r, end in zip(earned, ends, strict=True) if end == t)
            ahead = reward - v[t] + gamma * after + gamma * lam * ahead
            expected[i, t], after = ahead, v[t]
    kept = expected[mask]
    expected[mask] = (kept - kept.mean()) / kept.std(correction=0)
    torch.testing.assert_close(out["advantages"].double(), expected, rtol=1e-4, atol=1e-4)
    assert asked and not any(asked)


def test_a_judgement_of_one_function_alone_counts(folder):
    """As in TRL: None of one function leaves the reward of the other, also in the scores of pivots."""
    nan, mask = float("nan"), torch.ones(2, 4, dtype=torch.bool)
    trainer = object.__new__(FineGrainedGRPOTrainer)
    trainer.accelerator = SimpleNamespace(reduce=lambda moments, how: moments)
    trainer._rates, trainer._values = {}, lambda *_: torch.zeros(2, 4)
    given, found = dict.fromkeys(_trl_grpo.READ), {}
    for name, (one, two) in {"none": (nan, 3.0), "zero": (0.0, 3.0), "neither": (nan, nan)}.items():
        models = [[[_trl_grpo.OnTokens(r, 0, 4)], [_trl_grpo.OnTokens(1.0, 0, 4)]] for r in (one, two)]
        found[name] = trainer._by_values(given, models, [1.0, 1.0], mask)
    assert torch.equal(found["none"], found["zero"]) and found["none"][0].all()
    assert not found["neither"][0].any() and found["neither"][1].all()

    def silent(completions, **_):
        return [None] * len(completions)

    scores, options = [], dict(segments=halves, config=dict(max_steps=1))
    trained(FineGrainedGRPOTrainer, folder, [silent, by_half], pivots=lambda r, a, m: scores.append(r) or m, **options)
    assert scores[0].any() and not scores[0].isnan().any()


def test_a_reward_behind_the_last_token_of_the_policy():
    """A completion that ends with the answer of a tool, whose tokens are not the policy's."""
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1]]).bool()
    parts = [_trl_grpo.OnTokens(3.0, 0, 4)], [_trl_grpo.OnTokens(2.0, 0, 1), _trl_grpo.OnTokens(1.0, 1, 3)]
    placed = FineGrainedGRPOTrainer._at_ends(list(parts), mask)
    assert placed.tolist() == [[0, 3, 0, 0], [0, 3, 0, 0]]


def test_completions_that_are_cut_off_are_left_out(folder):
    """args.mask_truncated_completions: TRL masks every token of them, and their segments are not looked for."""
    seen, options = [], dict(segments=halves, config=dict(max_steps=1, mask_truncated_completions=True))
    trained(FineGrainedGRPOTrainer, folder, by_half, watch=seen, **options)
    cut = ~seen[0]["completion_mask"].any(1)
    assert cut.any() and not seen[0]["advantages"][cut].any()


def test_pivots_keep_what_agrees(folder):
    seen = []
    _, told = trained(FineGrainedGRPOTrainer, folder, by_half, segments=halves, pivots={}, watch=seen)
    assert all(0 < log["tokens/kept"] < 1 for log in told)
    _, told = trained(
        FineGrainedGRPOTrainer, folder, by_half, segments=halves, pivots=lambda r, a, m: torch.zeros_like(a)
    )
    assert all(log["tokens/kept"] == 0 and log["grad_norm"] == 0 for log in told)


def test_ratios_of_sequences_are_gspo_token(folder):
    """The gradient of one loss, against policy_loss by hand, where the policy has moved since the rollout."""
    config = dict(importance_sampling_level="sequence", num_iterations=2, max_steps=2, loss_type="grpo", epsilon=0.2)
    seen = []
    trainer, _ = trained(FineGrainedGRPOTrainer, folder, by_half, segments=halves, watch=seen, config=config)
    inputs = {key: value for key, value in seen[0].items() if value is not None}
    inputs["old_per_token_logps"] = inputs["old_per_token_logps"] + 0.01 * torch.randn(
        inputs["old_per_token_logps"].shape, generator=torch.Generator().manual_seed(0)
    )
    policy = trainer.model
    policy.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(policy, inputs).backward()
    ours = torch.cat([p.grad.flatten() for p in policy.parameters()])
    policy.zero_grad()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    there = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    many = inputs["completion_ids"].shape[1]
    logits = policy(ids, attention_mask=there).logits[:, -many - 1 : -1]
    logp = logits.log_softmax(-1).gather(2, inputs["completion_ids"][..., None])[..., 0]
    options = dict(mask=inputs["completion_mask"].bool(), low=0.2, high=0.2)
    fk.policy_loss("gspo_token", logp, inputs["old_per_token_logps"], inputs["advantages"], **options).loss.backward()
    by_hand = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert (ours - by_hand).norm() <= 1e-4 * by_hand.norm() and by_hand.norm() > 0


def test_the_rewarded_half_becomes_likelier(folder):
    """A reward for one letter in the first half alone raises it there."""

    def letter(completions, **_):
        return [[float(text[: len(text) // 2].count("e")), 0.0][: len(halves(text))] for text in completions]

    config = dict(max_steps=20, learning_rate=3e-3, per_device_train_batch_size=8, num_generations=8)
    _, told = trained(FineGrainedGRPOTrainer, folder, letter, segments=halves, config=config)
    early, late = (sum(log["reward"] for log in part) / 5 for part in (told[:5], told[-5:]))
    assert late > early


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_segments_move_what_their_sum_does_not_tell(seed, folder):
    """Even letters cost in the second half what the first half is given for them: the sum is 0, and trains nothing."""
    texts = [tokenizer().decode([i]) for i in range(258)]
    even = [i for i, text in enumerate(texts) if len(text) == 1 and ord(text) < 128 and ord(text) % 2 == 0]
    probes = torch.randint(2, 258, (16, 30), generator=torch.Generator().manual_seed(seed))

    def judge(completion_ids, **_):
        rows = []
        for ids in completion_ids:
            cost = float(sum(i in even for i in ids[len(ids) // 2 :]))
            segments = len(halves(offsets_of(ids)[0]))
            rows.append([cost, -cost] if segments == 2 else [0.0] * segments)
        return rows

    def totals(completion_ids, **_):
        return [float(sum(row)) for row in judge(completion_ids)]

    def marked(policy):
        with torch.no_grad():
            return policy(probes).logits.log_softmax(-1)[..., even].logsumexp(-1).mean().item()

    config = dict(max_steps=12, learning_rate=3e-3, per_device_train_batch_size=16, num_generations=8, seed=seed)
    start, found = marked(model()), {}
    for rewards in (judge, totals):
        trainer, _ = trained(FineGrainedGRPOTrainer, folder, rewards, segments=halves, config=config)
        found[rewards.__name__] = marked(trainer.model) - start
    assert found["judge"] < -0.05 and abs(found["totals"]) < 1e-6


@pytest.mark.parametrize(
    "rewards, options, message",
    [
        (lambda completions, **_: [[1.0] * 9] * len(completions), {}, r"return \d+ numbers for a completion of \d"),
        (lambda completions, **_: [["a"]] * len(completions), {}, r"return numbers, \(start, end, reward\) or .*'a'"),
        (lambda completions, **_: ["a"] * len(completions), {}, r"return a number or a list for each completion"),
        (lambda completions, **_: None, {}, r"<lambda> must return a list, one answer a completion, got None"),
        (lambda completions, **_: [float("inf")] * 4, {}, r"<lambda> must return finite numbers, .* got inf"),
        (
            lambda completions, **_: [[(0, 1, -float("inf"))]] * 4,
            {},
            r"<lambda> must return finite numbers, .* got -inf",
        ),
        (
            lambda completions, **_: [[(0, 99, 1.0)]] * 4,
            {},
            r"<lambda>, of the completion .*: segments must be in order",
        ),
        (
            lambda completions, **_: [[1.0, (0, 3, 1.0)]] * 4,
            {},
            r"<lambda> must return numbers or segments .* not both",
        ),
        (
            length,
            dict(advantages="gae", values=lambda p, q, ids, mask: ids / 0),
            r"values must be finite at the tokens of completions",
        ),
        (length, dict(pivots={"kind": "sign"}), r"pivots: adaptive_mask\(\) got an unexpected keyword argument 'kind'"),
        (length, dict(segments=None), r"segments must be a function from a text to its segments, got NoneType"),
        (
            length,
            dict(advantages="gae"),
            r"values must be a function with advantages='gae' and None else, got NoneType",
        ),
        (length, dict(values=length), r"values must be a function with advantages='gae' and None else, got function"),
        (length, dict(gae={"lambda": 1}), r"gae must be a mapping of gamma and lam, got \{'lambda': 1\}"),
        (length, dict(gae=0.9), r"gae must be a mapping of gamma and lam, got 0.9"),
        (length, dict(gae={"lam": 0.9}), r"gae must be left out without advantages='gae', got \{'lam': 0.9\}"),
        (length, dict(advantages="turn"), r"advantages must be .*'return_to_go'.*got 'turn'"),
        (length, dict(pivots=1), r"pivots must be a mapping of arguments, a function or None, got int"),
    ],
)
def test_what_does_not_fit_is_refused(rewards, options, message, folder):
    with pytest.raises((ValueError, TypeError), match=message):
        trained(FineGrainedGRPOTrainer, folder, rewards, **({"segments": halves} | options))

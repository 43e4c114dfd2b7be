"""What an ordinary mistake says: keywords that exist, how sums go in, results handed over whole, environment values."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import finealign_kernels as fk
from finealign_kernels.ops import _native

ROOT = Path(__file__).resolve().parents[2]
generator = torch.Generator().manual_seed(0)
X, REF, SCORE = -torch.rand(4, 5, generator=generator), -torch.rand(4, 5), torch.randn(4, 5, generator=generator)
MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 4 + [False], [True] * 5])
KIND = torch.tensor([True, False, True, False])
SUM = X.sum(1)
LONG = {
    "preference_loss": lambda **k: fk.preference_loss("dpo", X, REF, **k),
    "dpo": lambda **k: fk.dpo(X, REF, **k),
    "cpo": lambda **k: fk.cpo(X, **k),
    "pointwise_loss": lambda **k: fk.pointwise_loss("kto", X, REF, target=KIND, **k),
    "kto": lambda **k: fk.kto(X, REF, KIND, **k),
    "policy_loss": lambda **k: fk.policy_loss("ppo", X, REF, SCORE, **k),
    "reward_loss": lambda **k: fk.reward_loss("bradley_terry", (SUM, SUM), **k),
}


@pytest.mark.parametrize("name", LONG)
def test_a_keyword_that_does_not_exist_lists_those_that_do(name):
    with pytest.raises(TypeError, match="got 'length_normalized'.*the other keywords are .*denominator") as error:
        LONG[name](length_normalized=True)
    assert ("mask, cu_seqlens" in str(error.value)) and "hyper" not in str(error.value).split("keywords")[1]
    with pytest.raises(TypeError, match="did you mean 'denominator'"):
        LONG[name](denominater=3)


def test_the_rows_own_hyper_parameters_are_listed():
    with pytest.raises(
        TypeError, match=r"'sapo' takes \('tau_pos', 'tau_neg'\), got 'tau' \(did you mean 'tau_pos'\?\)"
    ):
        fk.policy_loss("sapo", X, REF, SCORE, tau=1.0)
    with pytest.raises(
        TypeError, match=r"'cdpo' takes \('smoothing',\), got 'label_smoothing' \(did you mean 'smoothing'"
    ):
        fk.preference_loss("cdpo", X, REF, label_smoothing=0.1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fk.kto(X, REF, KIND, positive_weight=2.0), "kto sets positive_weight itself, by z0, desirable_weight"),
        (lambda: fk.kto(X, REF, KIND, shift=0.1), "kto sets shift itself, by z0, .*; pointwise_loss takes it"),
        (lambda: fk.pdpo(X, REF, KIND, shift=0.1), "pdpo sets shift itself, by kind, c; pointwise_loss takes it"),
        (lambda: fk.simpo(X, shift=0.1), "simpo sets shift itself, by .*; preference_loss takes it"),
    ],
)
def test_a_keyword_that_a_short_form_sets_itself(call, message):
    with pytest.raises(TypeError, match=message):
        call()


FOUR = ("dpo", "ipo", "slic", "cdpo", "robust")
SUMS = SUM[:2], SUM[2:], REF.sum(1)[:2], REF.sum(1)[2:]  # chosen, rejected, the reference's


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_four_sums_in_the_order_of_other_libraries(name, dtype):
    """Loss and gradient are those of the tokens."""
    options = {} if name not in ("cdpo", "robust") else {"smoothing": 0.1}
    sums, x = [s.to(dtype).requires_grad_() for s in SUMS], torch.cat(SUMS[:2]).to(dtype).requires_grad_()
    want = getattr(fk, name)(x[:, None], torch.cat(SUMS[2:]).to(dtype)[:, None], **options)
    expected = torch.autograd.grad(want.loss, x)[0].chunk(2)
    for found in (getattr(fk, name)(*sums, **options), fk.preference_loss(name, *sums, **options)):
        torch.testing.assert_close(found.losses, want.losses)
        torch.testing.assert_close(torch.autograd.grad(found.loss, sums[:2]), expected)
    if dtype == torch.float32:
        torch.testing.assert_close(want.losses, getattr(fk, name)(X, REF, **options).losses)


def test_four_sums_where_tokens_are_counted():
    with pytest.raises(
        ValueError, match="logp must hold log-probs of tokens for 'dpo' with average='kept', which count"
    ):
        fk.dpo(*SUMS, average="kept")
    with pytest.raises(ValueError, match="logp must hold log-probs of tokens for 'dpo' with an NLL, which count them"):
        fk.dpo(*SUMS, nll_weight=0.1)
    with pytest.raises(ValueError, match="'simpo' has no reference, got sums of responses"):
        fk.preference_loss("simpo", *SUMS)


@pytest.mark.parametrize("given", ((X[:2], X[2:], REF[:2], REF[2:]), (*SUMS[:3], SUMS[3][:1]), (*SUMS[:3], 1.0)))
def test_what_four_sums_are_not(given):
    call = r"\(chosen\[:, None\], rejected\[:, None\]\), \(ref_chosen\[:, None\], ref_rejected\[:, None\]\)"
    with pytest.raises(TypeError, match=rf"dpo takes logp, ref_logp by position, got 4 arguments; .*, dpo\({call}\)"):
        fk.dpo(*given)
    with pytest.raises(TypeError, match=rf"got 5 arguments; .* preference_loss\(name, {call}\)"):
        fk.preference_loss("dpo", *given)
    with pytest.raises(TypeError, match="by position, got 4 arguments"):
        fk.dpo(*SUMS, mask=MASK)


@pytest.mark.parametrize("name", ("simpo", "cpo", "orpo"))
def test_two_sums(name):
    with pytest.raises(TypeError, match=rf"got 2 arguments; .*, {name}\(\(chosen\[:, None\], rejected\[:, None\]\)\)"):
        getattr(fk, name)(SUM[:2], SUM[2:])


def test_other_forms_do_not_speak_of_pairs():
    with pytest.raises(TypeError, match="^kto takes logp, ref_logp, target by position, got 4 arguments$"):
        fk.kto(X, REF, KIND, X)
    with pytest.raises(TypeError, match="^pointwise_loss takes name, logp, ref_logp by position, got 4 arguments$"):
        fk.pointwise_loss("kto", X, REF, KIND)


@pytest.mark.parametrize("call", [lambda: fk.dpo(SUM, SUM), lambda: fk.nll_loss(SUM), lambda: fk.simpo((SUM, SUM))])
def test_a_number_a_sequence_is_a_column(call):
    with pytest.raises(
        ValueError, match=r"be \(B, T\) where .* got \(4,\).*: a number a sequence, sums say, goes in as"
    ):
        call()


WEIGHTED = {
    "dpo": lambda w: fk.dpo(X, REF, mask=MASK, token_weight=w),
    "dpo, averaged": lambda w: fk.dpo(X, REF, mask=MASK, token_weight=w, average="kept"),
    "dpo, js": lambda w: fk.dpo(X, REF, mask=MASK, token_weight=w, divergence="js"),
    "cpo": lambda w: fk.cpo(X, mask=MASK, token_weight=w),
    "kto": lambda w: fk.kto(X, REF, KIND, mask=MASK, token_weight=w),
    "pdpo_squared": lambda w: fk.pointwise_loss(
        "pdpo_squared", X, REF, target=SUM.sigmoid(), mask=MASK, token_weight=w
    ),
    "nll_loss": lambda w: fk.nll_loss(X, mask=MASK, token_weight=w),
    "ppo": lambda w: fk.policy_loss("ppo", X, REF, SCORE, mask=MASK, token_weight=w, average="kept"),
    "value_loss": lambda w: fk.value_loss(X, REF, SCORE, mask=MASK, token_weight=w),
}


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("name", WEIGHTED)
def test_an_adaptive_mask_handed_over_whole_is_its_weights(name):
    made = fk.adaptive_mask(SCORE, mask=MASK)
    assert torch.equal(WEIGHTED[name](made).loss, WEIGHTED[name](made.token_weight).loss)


def test_other_results_handed_over_whole():
    pair = fk.adaptive_mask((SCORE[:2], SCORE[2:, :3]))
    given = (X[:2], X[2:, :3]), (REF[:2], REF[2:, :3])
    assert torch.equal(fk.dpo(*given, token_weight=pair).loss, fk.dpo(*given, token_weight=pair.token_weight).loss)
    made = fk.advantages(SCORE, X, mask=MASK)
    whole = fk.policy_loss("ppo", X, REF, made, mask=MASK).loss
    assert torch.equal(whole, fk.policy_loss("ppo", X, REF, made.advantages, mask=MASK).loss)
    out = fk.token_logprobs(torch.randn(4, 5, 7), torch.ones(4, 5, dtype=torch.int64))
    assert torch.equal(fk.dpo(out, REF).loss, fk.dpo(out.logp, REF).loss)
    with pytest.raises(TypeError, match="advantages must be .*, got LogProbs with the fields logp, lse"):
        fk.policy_loss("ppo", X, REF, out)


def test_segments_in_other_forms():
    text, offsets = "One. Two.", [(0, 3), (3, 4), (4, 8), (8, 9)]
    forms = [
        [(0, 4), (5, 9)],
        [[0, 4], [5, 9]],
        [{"start": 0, "end": 4}, {"start": 5, "end": 9}],
        [fk.feedback.Span(0, 4, "x"), fk.feedback.Span(5, 9, "x")],
    ]
    for segments in forms:
        assert fk.feedback.segment_tokens(offsets, text, segments) == [1, 3]
    for spans in (
        [(0, 4)],
        [{"start": 0, "end": 4}],
        [{"start": 0, "end": 4, "kind": "x"}],
        [fk.feedback.Span(0, 4, "x")],
    ):
        assert fk.feedback.token_weights(offsets, text, spans, inside=2.0) == [2, 2, 1, 1]


def build(**env):
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | env, timeout=120)
    return done.returncode, done.stderr


@pytest.mark.parametrize("archs", ("hopper", "90a;H100", "sm_90x", "9", "90a+ptx", ";", ""))
def test_archs_that_are_none_end_a_build_at_once(archs):
    code, said = build(FINEALIGN_ARCHS=archs)
    assert code == 1 and said.splitlines()[-1].startswith("FINEALIGN_ARCHS must name") and repr(archs) in said


def test_archs_and_cpu_of_a_build():
    assert build(FINEALIGN_ARCHS="80;90a,100f 12.0+PTX;sm_89", FINEALIGN_CPU="avx2")[0] == 0
    code, said = build(FINEALIGN_CPU="foo")
    assert code == 1 and "FINEALIGN_CPU must be one of baseline, avx2, avx512, got 'foo'" in said


def test_the_cpu_that_is_asked_for_exists():
    command = [sys.executable, "-c", "import finealign_kernels"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"FINEALIGN_CPU": "foo"}, cwd="/")
    assert done.returncode == 1 and "FINEALIGN_CPU must be one of baseline, avx2, avx512, got 'foo'" in done.stderr


def test_a_cpu_that_the_processor_is_not(monkeypatch, recwarn):
    monkeypatch.setattr(_native, "instructions", lambda: "avx2")
    _native._warn_of_narrower("avx2")
    _native._warn_of_narrower("baseline")
    assert not recwarn
    with pytest.warns(UserWarning, match="FINEALIGN_CPU=avx512, but the CPU kernels run avx2"):
        _native._warn_of_narrower("avx512")

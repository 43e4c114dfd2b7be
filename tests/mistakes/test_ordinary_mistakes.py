"""What users hand over by mistake, or in another library's types, to every public function: taken, or refused by name.

CALLS holds one full call of each public function; the tests put other values in the place of its arguments.
"""

import inspect
import re

import numpy as np
import pytest
import torch

import finealign_kernels as fk

generator = torch.Generator().manual_seed(0)
MASK = torch.tensor(
    [[True] * 5, [True, True, True, False, False], [True] * 4 + [False], [True, False, True, True, True]]
)
ENDS = torch.tensor([0, 2, 4])  # of 4 segments of 2 prompts


def rand(*shape):
    return torch.rand(*shape, generator=generator)


X, REF, SCORE = -rand(4, 5), -rand(4, 5), rand(4, 5) - 0.5
WEIGHT, IDS = rand(4, 5), torch.arange(5).expand(4, 5) // 2
KIND, SIDES = torch.tensor([True, False, True, False]), torch.tensor([1.0, -1, 1, -1])
LOGP = dict(logp=X, mask=MASK, token_weight=WEIGHT, denominator=3.0)
WITH_REF = LOGP | dict(ref_logp=REF, beta=0.5)
SCORES = dict(token_score=SCORE, mask=MASK)
ROWS = dict(
    labels=torch.tensor([1, 0, 2, 3]), mask=KIND, temperature=0.5, softcap=20.0, logit_scale=2.0, ignore_index=-100
) | dict(support=torch.arange(4).expand(4, 4))
SEGMENTS = fk.SegmentRewards(rand(4), torch.tensor([1, 2, 0, 4]), ENDS, weight=0.5)

CALLS = {
    "adaptive_mask": SCORES | dict(side=1, baseline=0.25, soft=0.5, pivots=MASK),
    "advantages": dict(rewards=SEGMENTS, mask=MASK[:2], values=X[:2], old_logp=X[:2], ref_logp=REF[:2])
    | dict(kl_coef=0.5, gamma=0.75, lam=0.5, token_score=SCORE[:2], baseline=0.25, bootstrap=rand(2)),
    "best_of_n": dict(reward=SCORE, mask=MASK),
    "cdpo": WITH_REF | dict(smoothing=0.25, shift=0.5),
    "contrastive_loss": dict(
        name="swav", first=X, second=REF, prototypes=SCORE, temperature=0.5, epsilon=0.25, iterations=2
    )
    | dict(denominator=3.0),
    "cpo": LOGP | dict(alpha=0.5, beta=0.5, nll_denominator=3.0),
    "decoupled_advantages": dict(rewards=SCORE[:2, :4], groups=2, weights=(0.5, 2.0), eps=0.25),
    "difference_loss": dict(scores=SCORE[0, :4], cu_groups=ENDS),
    "discounted_returns": dict(rewards=SCORE, mask=MASK, gamma=0.5),
    "dpo": WITH_REF | dict(scale=0.5, nll_weight=0.5, nll_denominator=4.0, pair_weight=rand(2)),
    "gae": dict(rewards=SCORE, values=X, mask=MASK, gamma=0.5, lam=0.75, segment_ids=IDS),
    "group_advantages": dict(rewards=SCORE[0, :4], groups=2, eps=0.25),
    "implicit_scores": dict(logp=X, ref_logp=REF, mask=MASK, beta=0.5),
    "ipo": WITH_REF,
    "kl_penalty": dict(old_logp=X, ref_logp=REF, mask=MASK),
    "kto": WITH_REF | dict(target=KIND, z0=0.25, desirable_weight=0.5, undesirable_weight=2.0),
    "ld_weights": dict(logp=X, mask=MASK, alpha=0.25),
    "linear_logprobs": ROWS | dict(hidden=rand(4, 3), weight=rand(6, 3), bias=rand(6), workspace=64, outputs="entropy"),
    "moments": dict(x=SCORE, mask=MASK),
    "nll_loss": LOGP | dict(label_smoothing=0.25, mean_logp=REF),
    "orpo": LOGP | dict(odds_weight=0.5),
    "pdpo": WITH_REF | dict(target=KIND, c=0.25),
    "pivot_flags": SCORES | dict(kind="salience", percent=50.0, baseline="quantile", quantile=0.25),
    "pivot_segments": dict(pivots=KIND.expand(4, 4), mask=MASK[:, :4]),
    "pointwise_loss": WITH_REF | dict(name="kto", target=KIND, positive_weight=0.5, other_weight=2.0, shift=0.5),
    "policy_loss": LOGP
    | dict(name="ppo", old_logp=REF, advantages=SCORE, ref_logp=REF, low=0.25, high=0.5, dual=2.0, kl_coef=0.5)
    | dict(entropy=WEIGHT, entropy_coef=0.5, entropy_denominator=4.0, sampler_weight=WEIGHT)
    | dict(reduction="constant", max_length=8.0),
    "preference_loss": WITH_REF | dict(name="dpo", divergence="alpha", alpha=0.25, segment_ids=IDS, average="segments"),
    "preference_strength": dict(differences=SCORE),
    "prefix_scores": dict(prefix_reward=SCORE, mask=MASK, start=0.5),
    "reverse_scan": dict(x=SCORE, decay=0.5, mask=MASK),
    "pick_scores": dict(x=SCORE, mask=MASK, pick="mean", token_weight=WEIGHT),
    "ranked_pairs": dict(quality=SCORE[0, :4], cu_groups=ENDS),
    "reward_loss": dict(name="bradley_terry", scores=(X[0], X[1]), margin=0.5, smoothing=0.25, flip=MASK[1])
    | dict(weight=WEIGHT[0], denominator=3.0, scale=0.5, clamp=2.0, centering=0.25),
    "robust": WITH_REF | dict(smoothing=0.25),
    "sampler_weights": dict(old_logp=X, sampler_logp=REF, mode="token_mask", low=0.5, high=2.0, mask=MASK),
    "segment_broadcast": dict(v=SCORE[0, :4], mask=MASK),
    "segment_class_loss": dict(logits=rand(4, 5, 3), labels=IDS, mask=MASK, denominator=3.0, ignore_index=-100),
    "segment_ends": dict(segment_ids=IDS, mask=MASK.new_ones(4, 5)),
    "segment_mean": dict(x=SCORE, mask=MASK),
    "segment_put_last": dict(v=SCORE[0, :2], cu_seqlens=ENDS, total=4),
    "segment_rewards": dict(rewards=[[0.5], [2.0]], texts=["a", "b"], offsets=[[(0, 1)]] * 2, segments=[[(0, 1)]] * 2)
    | dict(mask=torch.eye(2, dtype=torch.bool), weight=0.5),
    "segment_sum": dict(x=SCORE, mask=MASK),
    "simpo": LOGP | dict(gamma=0.5),
    "slic": WITH_REF,
    "token_logprobs": ROWS | dict(logits=rand(4, 6)),
    "token_rewards": dict(models=SEGMENTS, mask=MASK[:2]),
    "turn_advantages": dict(rewards=SCORE[0, :4], cu_turns=ENDS, groups=2),
    "ulma": WITH_REF | dict(target=KIND, c=0.25),
    "unlikelihood": LOGP | dict(target=KIND, beta=0.5),
    "value_loss": dict(
        values=X, old_values=REF, returns=SCORE, mask=MASK, clip=0.25, denominator=3.0, token_weight=WEIGHT
    ),
    "whiten": dict(x=SCORE, mask=MASK),
    "wpo_weights": dict(logp=X, log_sum_sq_probs=REF, mask=MASK),
}


ELSEWHERE = {"check_errors", "dropout_views", "sum_over_ranks"}  # of no numbers, or of any: tested beside them


def call(name, /, **others):
    return getattr(fk, name)(**{**CALLS[name], **others})


def bits(result):
    """Every tensor of a result."""
    return [x for x in (result if isinstance(result, tuple) else [result]) if isinstance(x, torch.Tensor)]


def same(found, wanted):
    for one, other in zip(bits(found), bits(wanted), strict=True):
        assert (not isinstance(one, torch.Tensor) and one == other) or (
            one.dtype == other.dtype and torch.equal(one, other)
        )


def test_every_public_function_has_its_call():
    functions = {name for name in fk.__all__ if inspect.isfunction(getattr(fk, name))}
    assert functions - ELSEWHERE == set(CALLS)


# ---- numbers that numpy made, masks of integers ---------------------------------------------------------------------

NUMBERS = [(name, key) for name, call in CALLS.items() for key, value in call.items() if type(value) in (int, float)]
MASKS = [
    (name, key)
    for name, call in CALLS.items()
    for key, value in call.items()
    if isinstance(value, torch.Tensor) and value.dtype == torch.bool and key != "target"
]


@pytest.mark.parametrize("name,key", NUMBERS)
def test_numbers_of_numpy_are_numbers(name, key):
    value, wanted = CALLS[name][key], call(name)
    kinds = (np.float64, np.float32, np.float16, lambda x: np.array(x, np.float32), lambda x: np.array(x))
    if isinstance(value, int):
        kinds = (np.int64, np.int32, np.int16, lambda x: np.array(x))
    for kind in kinds:
        same(call(name, **{key: kind(value)}), wanted)
    for wrong in (np.bool_(True), np.array([value]), np.array("1"), True):
        with pytest.raises((TypeError, ValueError), match=f"^{key}\\b.* must "):
            call(name, **{key: wrong})


@pytest.mark.parametrize("name,key", [(name, key) for name, key in NUMBERS if type(CALLS[name][key]) is float])
def test_a_whole_number_that_int64_does_not_hold_is_a_number(name, key):
    try:
        wanted = call(name, **{key: 2.0**70})
    except ValueError as error:
        with pytest.raises(ValueError, match=f"^{re.escape(str(error).split(',')[0])}"):
            call(name, **{key: 2**70})
    else:
        same(call(name, **{key: 2**70}), wanted)


def test_numbers_of_numpy_inside_arguments():
    half = np.float32(0.5)
    same(call("advantages", rewards=SEGMENTS._replace(weight=half)), call("advantages"))
    same(call("token_rewards", models=SEGMENTS._replace(weight=half)), call("token_rewards"))
    same(call("decoupled_advantages", weights=np.array([0.5, 2], np.float32)), call("decoupled_advantages"))
    own = fk.Row(lambda m: (-m, torch.full_like(m, -1)), "-m", "", beta=half, shift=np.int64(2))
    plain = own._replace(beta=0.5, shift=2)
    same(fk.preference_loss(own, X, REF), fk.preference_loss(plain, X, REF))


@pytest.mark.parametrize("dtype", (torch.int64, torch.int32, torch.uint8), ids=str)
@pytest.mark.parametrize("name,key", MASKS)
def test_integers_0_and_1_are_a_mask(name, key, dtype):
    mask = CALLS[name][key]
    same(call(name, **{key: mask.to(dtype)}), call(name))
    wrong = mask.to(dtype)
    wrong.view(-1)[0] = 2
    with pytest.raises(ValueError, match=f"^{key} must hold 0 and 1 alone where it is no bool, got 2"):
        call(name, **{key: wrong})
    if dtype.is_signed:
        wrong.view(-1)[0] = -100
        with pytest.raises(ValueError, match="got -100"):
            call(name, **{key: wrong})
    with pytest.raises(TypeError, match=f"^{key} must have dtype bool or int64 or int32 or uint8"):
        call(name, **{key: mask.float()})


def test_integers_are_a_mask_of_flat_tokens_and_of_pairs():
    flat = dict(logp=X.reshape(-1), ref_logp=REF.reshape(-1), cu_seqlens=torch.arange(0, 21, 5))
    same(fk.dpo(mask=MASK.view(-1).int(), **flat), fk.dpo(mask=MASK.view(-1), **flat))
    pair = dict(logp=(X[:2], X[2:, :4]), ref_logp=(REF[:2], REF[2:, :4]))
    masks = MASK[:2], MASK[2:, :4]
    for given in (tuple(m.long() for m in masks), (masks[0].long(), masks[1])):
        same(fk.dpo(mask=given, **pair), fk.dpo(mask=masks, **pair))
    with pytest.raises(ValueError, match="^mask must hold 0 and 1 alone"):
        fk.dpo(mask=(masks[0].long(), masks[1].long() + 1), **pair)


# ---- options of another type ----------------------------------------------------------------------------------------


class Thing:
    """Of no type that anything here takes."""


WRONG = (Thing(), "things", 5, 2.5, True, None, ["things"], (), {"a": 1}, X.new_ones(2, 2, 2), b"x", lambda x: x)
ALSO = {("pick_scores", "x"): "scores", ("simpo", "gamma"): "shift"}  # names that an argument has in its refusals


def takes(value, parameter) -> bool:
    """May the function take the value, by the annotation of its parameter."""
    kinds = str(parameter.annotation)
    if value is None:
        return "None" in kinds or parameter.default is None
    if isinstance(value, torch.Tensor):
        return "Tensor" in kinds or "Iterable" in kinds
    if isinstance(value, bool):
        return "bool" in kinds
    if isinstance(value, (int, float)):
        return "float" in kinds or (isinstance(value, int) and "int" in kinds)
    if isinstance(value, (list, tuple)):
        return ("Iterable" in kinds or "Sequence" in kinds) and not value
    return inspect.isfunction(value) and "Callable" in kinds


OPTIONS = [
    (name, parameter.name)
    for name in CALLS
    for parameter in inspect.signature(getattr(fk, name)).parameters.values()
    if parameter.kind is not parameter.VAR_KEYWORD
]


@pytest.mark.parametrize("name,key", OPTIONS)
def test_what_is_of_another_type_is_refused_by_name(name, key):
    parameter = inspect.signature(getattr(fk, name)).parameters[key]
    for value in WRONG:
        if inspect.isfunction(value) and takes(value, parameter):  # what a function of the caller's does is its own
            continue
        try:
            call(name, **{key: value})
        except (TypeError, ValueError) as error:
            said, names = str(error), {key, ALSO.get((name, key), key)}
            assert " must " in said and ", got " in said, (value, said)
            assert takes(value, parameter) or any(one in said.split(" must ")[0] for one in names), (value, said)
        except RuntimeError as error:  # of a backend that cannot run here
            assert value is True and key == "batch_invariant" and "cannot run here" in str(error), (value, error)
        else:
            assert takes(value, parameter), value


# ---- tensors whose values are elsewhere, or in another form ----------------------------------------------------------


class Sharded(torch.Tensor):
    """Looks as DTensor does."""

    placements = ()

    def full_tensor(self):
        return self.as_subclass(torch.Tensor)


class Packed(torch.Tensor):
    """Looks as torchao's tensors do."""

    def __tensor_flatten__(self):
        return [], None


TENSORS = [
    (name, key) for name, call in CALLS.items() for key, value in call.items() if isinstance(value, torch.Tensor)
]


@pytest.mark.parametrize("name,key", TENSORS)
def test_tensors_that_are_not_plain_are_refused_by_name(name, key):
    names = "|".join({key, ALSO.get((name, key), key)})
    value = CALLS[name][key]
    nested = torch.nested.nested_tensor([value.flatten(), value.flatten()[:1]])
    for wrong in (value.as_subclass(Sharded), value.as_subclass(Packed), value.to_sparse(), nested):
        with pytest.raises((TypeError, ValueError), match=rf"^({names})(\[0\])? must be a (plain|whole|dense)"):
            call(name, **{key: wrong})


@pytest.mark.parametrize("name,key", [(name, key) for name, call in CALLS.items() for key in call])
def test_numbers_given_as_tensors_are_plain_too(name, key):
    if type(CALLS[name][key]) not in (int, float):
        return
    one = torch.tensor(CALLS[name][key])
    for wrong in (one.as_subclass(Sharded), one.as_subclass(Packed), one.to_sparse()):
        with pytest.raises((TypeError, ValueError), match=" must "):
            call(name, **{key: wrong})


def test_tensors_inside_arguments_are_plain_too():
    for field in ("reward", "end", "cu_segments"):
        model = SEGMENTS._replace(**{field: getattr(SEGMENTS, field).as_subclass(Sharded)})
        for name, key in (("token_rewards", "models"), ("advantages", "rewards")):
            with pytest.raises(TypeError, match=rf"^{key}\[0\].{field} must be a plain tensor"):
                call(name, **{key: model})
    with pytest.raises(TypeError, match="^logp must be a plain tensor"):
        fk.simpo((X[:2], X[2:].as_subclass(Sharded)))
    same(call("dpo", logp=torch.nn.Parameter(X)), call("dpo"))


# ---- derivatives and transforms that are not there -----------------------------------------------------------------


def total(out):
    return sum(x.sum() for x in bits(out) if x.is_floating_point())


def ways(function, x):
    """Each transform of torch.func, and a tangent of one's own."""
    ones, forward = torch.ones_like(x), torch.autograd.forward_ad
    yield lambda: torch.func.grad(function)(x)
    yield lambda: torch.func.vjp(function, x)
    yield lambda: torch.func.jvp(function, (x,), (ones,))
    yield lambda: torch.vmap(function)(torch.stack([x, x]))

    def dual():
        with forward.dual_level():
            function(forward.make_dual(x, ones))

    yield dual


@pytest.mark.parametrize("name,key", [(name, key) for name, key in TENSORS if CALLS[name][key].is_floating_point()])
def test_transforms_are_refused_by_name(name, key):
    names = "|".join({key, ALSO.get((name, key), key)})
    for way in ways(lambda x: total(call(name, **{key: x})), CALLS[name][key].clone()):
        with pytest.raises(RuntimeError, match=rf"^({names})(\[0\])?: .* not implemented; use "):
            way()


@pytest.mark.parametrize(
    "name,key", (("linear_logprobs", "hidden"), ("linear_logprobs", "weight"), ("token_logprobs", "logits"))
)
def test_the_reference_has_every_derivative(name, key):
    given = CALLS[name][key].double()
    options = {k: v.double() for k, v in CALLS[name].items() if k in ("hidden", "weight", "bias")} | {
        "backend": "reference"
    }

    def function(x):
        return total(call(name, **{**options, key: x})[:2])

    x = given.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(function(x), x)
    torch.testing.assert_close(torch.func.grad(function)(given), wanted)
    tangent = torch.func.jvp(function, (given,), (torch.ones_like(given),))[1]
    torch.testing.assert_close(tangent, wanted.sum())
    batch = torch.stack([given, 2 * given])
    torch.testing.assert_close(torch.vmap(function)(batch), torch.stack([function(one) for one in batch]))


# ---- half precision: widened before anything is subtracted or summed ------------------------------------------------

HALVES = (torch.bfloat16, torch.float16)


def rounded(value, dtype, wide):
    """Float tensors of an argument in a half precision, or as wide as float32 with the same values."""
    if isinstance(value, fk.SegmentRewards):
        return value._replace(reward=rounded(value.reward, dtype, wide))
    if isinstance(value, tuple):
        return tuple(rounded(one, dtype, wide) for one in value)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.to(dtype).float() if wide else value.to(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_half_precision_gives_what_its_float32_values_give(name, dtype, route):
    found, wanted = (
        call(name, **{key: rounded(value, dtype, wide) for key, value in CALLS[name].items()}) for wide in (False, True)
    )
    for one, other in zip(bits(found), bits(wanted), strict=True):
        assert one.dtype in (other.dtype, dtype) and torch.equal(one, other.to(one.dtype))


OWN = {
    "pairs": fk.Row(lambda m: (m.sigmoid(), m.sigmoid() * (1 - m.sigmoid())), "σ(m)", ""),
    "points": fk.Row(lambda m: (m.sigmoid(), m.sigmoid() * (1 - m.sigmoid())), "σ(u)", "", pair=False, label="class"),
}


def loss_of(name, row, x, ref, **options):
    """The loss of a row and its gradient in float32."""
    x = x.requires_grad_()
    loss = fk.pointwise_loss if not row.pair else fk.preference_loss
    options |= {} if row.pair else dict(target=KIND if row.label != "soft" else SCORE[0, :4].abs())
    out = loss(name, x, *((ref,) if row.reference else ()), **options)
    out.loss.backward()
    return [*out, x.grad]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", [*fk.PREFERENCE, *OWN])
def test_rows_of_half_precision(name, dtype, route):
    row = fk.PREFERENCE.get(name) or OWN[name]
    given = OWN.get(name, name)
    x, ref = rounded(8 * X, dtype, False), rounded(8 * REF, dtype, False)
    kinds = [dict(average=average) for average in (False, "kept", "all")] + [dict(average="segments", segment_ids=IDS)]
    kinds += [dict(token_weight=rounded(WEIGHT, dtype, True))]
    if row.pair and row.reference and not (row.chosen or row.match or row.label):
        kinds += [dict(divergence=divergence) for divergence in ("forward_kl", "js", "alpha")]
    for options in kinds:
        found = loss_of(given, row, x.clone(), ref, mask=MASK, **options)
        wanted = loss_of(given, row, x.float(), ref.float(), mask=MASK, **options)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other.to(one.dtype), rtol=0, atol=0, equal_nan=True)
    if row.reference:  # sums of whole responses
        sums = rounded(8 * REF.sum(1), dtype, False)
        for one, other in zip(
            loss_of(given, row, x.clone(), sums), loss_of(given, row, x.float(), sums.float()), strict=True
        ):
            torch.testing.assert_close(one, other.to(one.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", fk.POLICY)
def test_policies_of_half_precision(name, dtype, route):
    row, grads = fk.POLICY[name], []
    advantage = SIDES[:, None] if row.whole else SCORE
    options = dict(denominator=3.0) if row.reduction == "token_global" else {}
    options |= dict(max_length=8.0) if row.reduction == "constant" else {}
    for kl in ("k1", "k2", "k3", "k3_k2grad", "k3_is"):
        for wide in (False, True):
            x, old, ref, entropy = (rounded(value, dtype, wide) for value in (X, REF, SCORE, WEIGHT))
            x.requires_grad_()
            more = dict(ref_logp=ref, kl=kl, kl_coef=0.25, entropy=entropy, entropy_coef=0.5)
            out = fk.policy_loss(name, x, old, rounded(advantage, dtype, wide), mask=MASK, **more, **options)
            out.loss.backward()
            grads.append([*out, x.grad])
        for one, other in zip(*grads[-2:], strict=True):
            torch.testing.assert_close(one, other.to(one.dtype), rtol=0, atol=0)


def test_a_z0_of_half_precision():
    z0 = torch.tensor(1.7, dtype=torch.bfloat16)
    same(fk.kto(X, REF, KIND, z0=z0), fk.kto(X, REF, KIND, z0=z0.float()))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ("bradley_terry", "floored"))
def test_reward_scores_of_half_precision(name, dtype):
    found = []
    for wide in (False, True):
        x = rounded(8 * X, dtype, wide).requires_grad_()
        out = fk.reward_loss(name, x.view(-1), centering=0.3)
        out.loss.backward()
        found.append([*out, x.grad])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other.to(one.dtype))

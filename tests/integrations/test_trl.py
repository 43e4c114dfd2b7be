"""TRL's trainers with linear_logprobs under them: the same function, the same training, and a way back."""

import os
import queue
import subprocess
import sys
import warnings
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

import numpy as np  # noqa: E402
import ranks  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
import trl_runs  # noqa: E402
from datasets import Dataset  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from trl.experimental import async_grpo  # noqa: E402
from trl.experimental.async_grpo import async_grpo_trainer  # noqa: E402
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample  # noqa: E402
from trl.kernels import ChunkedLogProbFunction as Stock  # noqa: E402
from trl.trainer import utils  # noqa: E402
from trl_runs import BOUND, SHORT, STEPS, run, sentence, tokenizer  # noqa: E402
from trl_runs import logs as logs_of

from finealign_kernels.cli import main  # noqa: E402
from finealign_kernels.integrations import trl as seam  # noqa: E402
from finealign_kernels.integrations.trl import patch_kernels  # noqa: E402
from finealign_kernels.ops.logprobs import linear_logprobs  # noqa: E402
from finealign_kernels.testing.budgets import assert_within  # noqa: E402

ALL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture(autouse=True)
def stock_again_afterwards(one_thread):
    yield
    assert utils._ChunkedLogProbFunction is Stock


# ---- the function itself -------------------------------------------------------------------------------------------

N, V, D = 23, 517, 32  # TRL's chunk_size of 128 gives it four chunks and a tail


def head(dtype, bias):
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    tensors = [draw(N, D), draw(V, D) / 4, draw(V) if bias else None]
    tensors = [None if x is None else x.to(dtype) for x in tensors]
    return tensors, torch.randint(V, (N,), generator=generator), (draw(N), draw(N))


def called(apply, tensors, targets, grads, options, outputs=ALL):
    """The five outputs, then the gradients of hidden, weight and bias under random upstream gradients."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    found = apply(*leaves, targets, options["temperature"], 128, options["cap"], options["scale"], outputs)
    loss = (found[0] * grads[0]).sum() + ((found[1] * grads[1]).sum() if "entropy" in outputs else 0)
    loss.backward()
    return found, [None if x is None else x.grad for x in leaves]


def exactly(hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs):
    """The formula in float64."""
    options = dict(temperature=temperature, softcap=softcap, logit_scale=scale, backend="reference")
    found = linear_logprobs(hidden, weight, targets, bias=bias, outputs=ALL[1:], **options)
    return found.logp, *found[2:]


OPTIONS = {
    "plain": dict(temperature=1.0, cap=None, scale=1.0),
    "temperature": dict(temperature=0.7, cap=None, scale=1.0),
    "every option": dict(temperature=1.3, cap=2.0, scale=0.5),  # any other order of the three gives another result
}
close = partial(assert_within, rms_ratio=1.25, max_ratio=2.0, ulps=4)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_outputs_and_gradients_are_trls(dtype, options, bias):
    tensors, targets, grads = head(dtype, bias)
    with patch_kernels() as patched:
        ours, dours = called(patched.apply, tensors, targets, grads, OPTIONS[options])
    theirs, dtheirs = called(Stock.apply, tensors, targets, grads, OPTIONS[options])
    wide = [None if x is None else x.double() for x in tensors]
    exact, dexact = called(exactly, wide, targets, grads, OPTIONS[options])
    for name, one, other, truth in zip(ALL, ours, theirs, exact, strict=True):
        assert one.shape == other.shape == (N,) and one.dtype == other.dtype, name
        assert one.requires_grad == other.requires_grad == (name in ALL[:2])
        if name == "is_top1":
            assert dtype != torch.float32 or torch.equal(one, other)
        else:
            close(one, truth, other)
    # In float32 the order of a product's sums decides: TRL adds the products of chunks, eager PyTorch and this library
    # take one product over the vocabulary, and how far the two are apart depends on the processor.
    eager = called(exactly, tensors, targets, grads, OPTIONS[options])[1] if dtype == torch.float32 else dtheirs
    for one, other, truth, rounded in zip(dours, dtheirs, dexact, eager, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype == dtype
            close(one, truth, rounded)


@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "mean_logits"), ("log_probs", "entropy", "is_top1")])
def test_outputs_not_asked_for_are_none(outputs):
    tensors, targets, grads = head(torch.float32, bias=False)
    with patch_kernels() as patched:
        ours, dours = called(patched.apply, tensors, targets, grads, OPTIONS["plain"], outputs)
    theirs, dtheirs = called(Stock.apply, tensors, targets, grads, OPTIONS["plain"], outputs)
    assert [x is None for x in ours] == [x is None for x in theirs] == [name not in outputs for name in ALL]
    for one, other in zip([*ours, *dours], [*theirs, *dtheirs], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["narrow head", "autocast"])
def test_a_head_of_another_dtype(way):
    """cast_lm_head_to_fp32 brings float32 hidden states to a narrow head; autocast narrows both."""
    tensors, targets, grads = head(torch.float32, bias=False)
    if way == "narrow head":
        tensors[1] = tensors[1].bfloat16()
    with patch_kernels() as patched, torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        ours, dours = called(patched.apply, tensors, targets, grads, OPTIONS["plain"])
        theirs, dtheirs = called(Stock.apply, tensors, targets, grads, OPTIONS["plain"])
    tolerance = 2.0**-7 if way == "autocast" else 1e-5  # autocast rounds each product of the two differently
    for one, other in zip([*ours, *dours[:2]], [*theirs, *dtheirs[:2]], strict=True):
        assert one.dtype == other.dtype
        if one.dtype != torch.bool:
            assert (one.double() - other.double()).norm() <= tolerance * other.double().norm()


def test_no_row_at_all_keeps_the_graph():
    """An all-masked micro-batch on a GPU: TRL scores no row and still runs backward."""
    (hidden, weight, bias), targets, _ = head(torch.float32, bias=True)
    with patch_kernels() as patched:
        found, gradients = called(patched.apply, (hidden[:0], weight, bias), targets[:0], (0, 0), OPTIONS["plain"])
    assert found.log_probs.shape == (0,) and gradients[0].shape == (0, D)
    assert all(x.eq(0).all() for x in gradients[1:])


# ---- ZeRO-3: the head is whole only inside TRL's gather ------------------------------------------------------------


def shard(parameter):
    """A parameter as ZeRO-3 leaves it: empty, its values held elsewhere."""
    parameter.whole, parameter.ds_status = parameter.data, "NOT_AVAILABLE"
    parameter.data = parameter.data.new_empty(0)


@contextmanager
def gathered(*parameters):
    """What deepspeed.zero.GatheredParameters does, without the ranks; the values are gone afterwards."""
    parameters = [p for p in parameters if p is not None and p.ds_status == "NOT_AVAILABLE"]
    for p in parameters:
        p.data, p.ds_status = p.whole.clone(), "AVAILABLE"
    yield
    for p in parameters:
        p.data.fill_(torch.nan)
        p.data, p.ds_status = p.data.new_empty(0), "NOT_AVAILABLE"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # of the head; hidden is float32
@pytest.mark.parametrize("function", ["stock", "patched"])
def test_a_zero3_head_is_gathered_again_in_backward(function, dtype, monkeypatch):
    (hidden, weight, bias), targets, grads = head(torch.float32, bias=True)
    weight = weight.to(dtype)
    _, expected = called(Stock.apply, (hidden, weight, bias), targets, grads, OPTIONS["every option"])
    entered = []

    @contextmanager
    def gather(*parameters):
        entered.append(parameters)
        with gathered(*parameters):
            yield

    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", gather)
    hidden.requires_grad_()
    weight, bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    shard(weight), shard(bias)
    with patch_kernels() if function == "patched" else nullcontext():
        with utils.maybe_gather_lm_head_ctx(weight, bias):
            found = utils._ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 1.3, 128, 2.0, 0.5, ALL)
        assert weight.numel() == bias.numel() == 0 and len(entered) == 1
        loss = found[0] @ grads[0] + found[1] @ grads[1]
        actual = torch.autograd.grad(loss, [hidden, weight, bias])
    assert len(entered) > 1 and weight.numel() == 0
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


# ---- patching and undoing ------------------------------------------------------------------------------------------


def test_undo_restores_and_may_be_repeated():
    patched = patch_kernels()
    assert utils._ChunkedLogProbFunction is patched
    patched.undo()
    patched.undo()
    assert utils._ChunkedLogProbFunction is Stock
    with pytest.raises(KeyError), patch_kernels():
        raise KeyError
    assert utils._ChunkedLogProbFunction is Stock


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_patches_nest_and_end_in_any_order(order):
    patches = [patch_kernels(workspace=budget) for budget in (0, "auto", "full")]
    in_force = list(patches)
    for i in order:
        assert utils._ChunkedLogProbFunction is in_force[-1]
        patches[i].undo()
        in_force.remove(patches[i])
    assert utils._ChunkedLogProbFunction is Stock


def test_what_another_put_there_is_not_thrown_away(monkeypatch):
    patched = patch_kernels()
    with monkeypatch.context() as other:
        other.setattr(utils, "_ChunkedLogProbFunction", print)
        for act in (patched.undo, patch_kernels):
            with pytest.raises(RuntimeError, match="must be what patch_kernels put there last, got <built-in function"):
                act()
        assert utils._ChunkedLogProbFunction is print
    patched.undo()


def test_an_unknown_version_is_refused(monkeypatch):
    monkeypatch.setattr("finealign_kernels.integrations._versions.version", lambda package: "1.17.0")
    with pytest.raises(RuntimeError, match=r"trl must be of version 1\.16, got 1\.17\.0"):
        patch_kernels()


def changed(ctx, hidden, weight, targets, temperature):
    """What TRL's function took some versions ago."""


@pytest.mark.parametrize(
    "found, told",
    [(type("Other", (), {"forward": staticmethod(changed)}), r"got \(hidden, weight, targets, temperature\)"),
     (print, "got <built-in function print>"), (None, "got None")],
)  # fmt: skip
def test_an_unknown_function_is_refused(found, told, monkeypatch):
    with monkeypatch.context() as other:
        other.setattr(utils, "_ChunkedLogProbFunction", found)
        with pytest.raises(RuntimeError, match=rf"_ChunkedLogProbFunction must take \(hidden, weight, bias.*{told}"):
            patch_kernels()
        other.delattr(utils, "_ChunkedLogProbFunction")
        with pytest.raises(RuntimeError, match="got None"):
            patch_kernels()


LAZY = """
import sys
import finealign_kernels.integrations.trl as seam
assert not {"trl", "transformers"} & set(sys.modules)
sys.modules["trl"] = None  # importing it fails
try:
    seam.patch_kernels()
except ImportError as error:
    print(error)
"""


def test_trl_is_imported_by_the_call_alone():
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "patch_kernels needs TRL" in done.stdout and "pip install 'finealign-kernels[trl]'" in done.stdout


# ---- columns that a trainer drops -----------------------------------------------------------------------------------


def train_once(name, folder, rows, **more):
    """One step of a TRL trainer; what it warned of."""
    trainer = getattr(trl, f"{name}Trainer")(
        model=model("Llama"),
        args=getattr(trl, f"{name}Config")(output_dir=str(folder), **(SHORT | dict(max_steps=1) | more)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        **({"ref_model": model("Llama")} if name in ("DPO", "KTO") else {}),
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.train()
    return [str(w.message) for w in told if "drops the column" in str(w.message)]


@pytest.mark.parametrize(
    "name, columns, instead",
    [
        ("DPO", {"chosen_token_weight": [1.0], "rejected_spans": [[0, 1]]}, "FineGrainedDPOTrainer"),
        ("KTO", {"token_weight": [1.0]}, "PointwiseTrainer"),
        ("SFT", {"token_weights": [1.0]}, None),
    ],
)
def test_a_dropped_column_of_weights_is_named_once(name, columns, instead, folder, monkeypatch):
    monkeypatch.setattr(seam, "_warned", set())
    rows = [row | columns for row in DATA[name]]
    assert train_once(name, folder, rows) == []  # nothing is in force
    with patch_kernels():
        (told,) = train_once(name, folder, rows)
        assert train_once(name, folder, rows) == []
        assert train_once(name, folder, DATA[name]) == []
    assert told.startswith(
        f"{name}Trainer drops the column {' and '.join(columns)} of its dataset: every token weighs 1"
    )
    assert (f"{instead} reads such columns" in told) if instead else ("reads such" not in told)
    assert transformers.Trainer.get_train_dataloader.__module__ == "transformers.trainer"


def test_weights_that_are_read_are_not_warned_of(folder, monkeypatch):
    monkeypatch.setattr(seam, "_warned", set())
    rows = [row | {"chosen_spans": [{"start": 0, "end": 1}], "rejected_spans": []} for row in DATA["DPO"]]
    monkeypatch.setattr(trl, "DPOTrainer", seam.FineGrainedDPOTrainer)
    with patch_kernels():
        assert train_once("DPO", folder, rows) == []


# ---- training ------------------------------------------------------------------------------------------------------

SIZES = dict(hidden_size=32, intermediate_size=64, max_position_embeddings=128)


def model(kind):
    """Of width 32; Gemma2's logits are capped, Llama's head is tied."""
    return trl_runs.model(kind, **SIZES, **(dict(head_dim=8) if kind == "Gemma2" else {}))


def rewards(completions, **_):
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


PROMPTS = [{"prompt": sentence(i, 2) + " "} for i in range(12)]
DATA = {
    "SFT": [{**row, "completion": sentence(i + 3, 3 + i % 3)} for i, row in enumerate(PROMPTS)],
    "DPO": [{**row, "chosen": sentence(i + 3, 4), "rejected": sentence(i, 2 + i % 3)} for i, row in enumerate(PROMPTS)],
    "KTO": [{**row, "completion": sentence(i, 3), "label": i % 2 == 0} for i, row in enumerate(PROMPTS)],
    "GRPO": PROMPTS,
    "RLOO": PROMPTS,
}
SAMPLED = dict(num_generations=2, max_completion_length=8, temperature=0.8)
ARGUMENTS = {
    "SFT": {},
    "DPO": dict(use_weighting=True),  # WPO's weights read log_sum_sq_probs
    "KTO": {},
    "GRPO": dict(**SAMPLED, num_iterations=2, top_entropy_quantile=0.5),
    "RLOO": dict(**SAMPLED, num_iterations=2, beta=0.0),
}


def logs(name, kind, folder):
    """What the trainer logs at each step."""
    given = dict(reward_funcs=rewards) if name in ("GRPO", "RLOO") else {}
    if name in ("DPO", "KTO"):
        given["ref_model"] = model(kind)
    arguments = partial(getattr(trl, f"{name}Config"), **(SHORT | ARGUMENTS[name]))
    _, told = run(getattr(trl, f"{name}Trainer"), arguments, folder, DATA[name], model=model(kind), **given)
    assert len(told) == STEPS
    return told


def differences(name, ours, stock):
    """Largest difference over the steps, of the loss and of the gradient norm, relative.

    The policy losses are sums of advantages that cancel: theirs is relative to the size of the terms, 1.
    """
    floor = 1.0 if name in ("GRPO", "RLOO") else 0.0
    pairs = list(zip(ours, stock, strict=True))
    return [
        max(abs(one[key] - other[key]) / max(abs(other[key]), floor if key == "loss" else 0.0) for one, other in pairs)
        for key in ("loss", "grad_norm")
    ]


@lru_cache
def stock_logs(name, kind, folder):
    return logs(name, kind, folder)


@pytest.mark.parametrize("kind", ["Qwen2", "Llama", "Gemma2"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_training_is_the_same(name, kind, folder, monkeypatch):
    stock, scored = stock_logs(name, kind, folder), []
    with patch_kernels() as patched:
        right = patched.apply
        monkeypatch.setattr(patched, "apply", lambda *args: scored.append(args[3].numel()) or right(*args))
        ours = logs(name, kind, folder)
    assert len(scored) >= STEPS
    assert max(differences(name, ours, stock)) <= BOUND
    for one, other in zip(ours, stock, strict=True):
        assert one.keys() == other.keys()
        figures = {key: value for key, value in other.items() if "time" not in key}
        assert {key: one[key] for key in figures} == pytest.approx(figures, rel=1e-4, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_shifted_labels_break_the_bound(name, folder, monkeypatch):
    with patch_kernels() as patched:
        right = patched.apply
        monkeypatch.setattr(patched, "apply", lambda h, w, b, labels, *rest: right(h, w, b, labels.roll(1), *rest))
        wrong = logs(name, "Qwen2", folder)
    assert max(differences(name, wrong, stock_logs(name, "Qwen2", folder))) > 100 * BOUND


# ---- AsyncGRPO: its trainer in this process, with rollouts made beforehand ------------------------------------------


class PlainAttention:
    """What TRL asks of FlashAttention 3 over packed sequences, in torch."""

    @staticmethod
    def flash_attn_varlen_func(query, key, value, ends_q, ends_k, max_q, max_k, *, softmax_scale, causal, **options):
        assert causal and options == {"window_size": (-1, -1)}
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        out = []
        for q, k, v in zip(
            *(split(x, ends) for x, ends in ((query, ends_q), (key, ends_k), (value, ends_k))), strict=True
        ):
            scores = softmax_scale * torch.einsum("qhd,khd->hqk", q, k)
            later = torch.ones(len(q), len(k), dtype=torch.bool).triu(1 + len(k) - len(q))
            out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), v))
        return torch.cat(out)


def split(x, ends):
    return x.tensor_split(ends[1:-1].long())


class Rollouts:
    """A worker whose rollouts are there from the start, and a transfer of weights to nobody."""

    def __init__(self):
        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()
        random = np.random.default_rng(0)
        for i in range(8 * (STEPS + 1)):  # the next step's are fetched ahead
            length = 9 + i % 5
            self.rollout_buffer.put(
                RolloutSample(
                    prompt=[],
                    completion=[],
                    input_ids=np.concatenate([np.arange(4) + 10 * (i // 2 % 5), random.integers(2, 258, length - 4)]),
                    completion_mask=np.arange(length) >= 4,
                    old_log_probs=random.normal(-5.5, 0.5, length),
                    advantage=float(random.normal()),
                    model_version=0,
                    group_id=i // 2,
                    metrics={},
                )
            )

    def nothing(self, *_):
        pass

    def check_health(self, stale_after_s):
        raise RuntimeError("the trainer asks for more rollouts than there are")

    start = stop = update_model_version = nothing
    init_weight_transfer = pause = resume = destroy = nothing

    def send_weights(self, iterator):
        assert sum(1 for _ in iterator)


def async_logs(kind, folder):
    """What AsyncGRPOTrainer logs at each step; it loads its model from a folder."""
    path = folder / f"async-{kind}"
    model(kind).save_pretrained(path)
    trainer = async_grpo.AsyncGRPOTrainer(
        str(path),
        args=async_grpo.AsyncGRPOConfig(
            output_dir=str(folder),
            **SHORT,
            gradient_accumulation_steps=2,
            temperature=0.8,
            token_budget=0,
            max_staleness=STEPS,
        ),
        train_dataset=Dataset.from_list(PROMPTS),
        processing_class=tokenizer(),
        rollout_worker=(rollouts := Rollouts()),
        weight_transfer=rollouts,
    )
    trainer.train()
    told = logs_of(trainer)
    assert len(told) == STEPS
    return told


@pytest.mark.parametrize("kind", ["Qwen2", "Llama"])
def test_asynchronous_training_is_the_same(kind, folder, monkeypatch):
    monkeypatch.setattr("trl.experimental.async_grpo.packing._flash_attn", lambda: PlainAttention)
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: None)  # it asks a GPU
    stock, scored = async_logs(kind, folder), []
    with patch_kernels() as patched:
        right = patched.apply
        monkeypatch.setattr(patched, "apply", lambda *args: scored.append(args[3].numel()) or right(*args))
        ours = async_logs(kind, folder)
        monkeypatch.setattr(patched, "apply", lambda h, w, b, labels, *rest: right(h, w, b, labels.roll(1), *rest))
        wrong = async_logs(kind, folder)
    assert len(scored) == 2 * STEPS
    assert max(differences("GRPO", ours, stock)) <= BOUND < 0.01 * max(differences("GRPO", wrong, stock))
    assert all(log["entropy"] > 0 and log["kl"] != 0 for log in stock)
    for one, other in zip(ours, stock, strict=True):
        figures = {key: value for key, value in other.items() if not key.startswith("perf") and "time" not in key}
        assert {key: one[key] for key in figures} == pytest.approx(figures, rel=1e-4, abs=1e-5, nan_ok=True)


# ---- FSDP2: two processes, each with half of every parameter ---------------------------------------------------------


def step_of_dpo(scored, rank):
    """The gradient-carrying loss of one DPO step: log-probs of two pairs by TRL's fused head."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(2, 258, (4, 12), generator=generator)
    reference = torch.randn(4, generator=generator)
    labels = ids.masked_fill(torch.arange(12) < 4, -100)
    out = scored(input_ids=ids, labels=labels, fused_lm_head=True)
    chosen, rejected = (out.log_probs.sum(1) - reference).chunk(2)
    return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean() + 0.01 * out.entropy.mean()


WAYS_TO_SHARD = [  # kind, which unit holds the head, is that one sharded again before backward; Llama's head is tied
    ("Qwen2", "root", False),
    ("Qwen2", "root", True),
    ("Qwen2", "head", True),
    ("Llama", "root", True),
]


def sharded_steps(group):
    """Loss and whole gradients of one step, stock and patched, for each way of cutting the model into units."""
    rank, found = group.rank(), {}
    for kind, unit, again in WAYS_TO_SHARD:
        for way in ("stock", "patched"):
            scored = model(kind)
            utils.add_fused_lm_head(scored, outputs=("log_probs", "entropy"))
            for layer in [*scored.model.layers, *([scored.lm_head] if unit == "head" else [])]:
                fully_shard(layer)
            fully_shard(scored, reshard_after_forward=again)
            with patch_kernels() if way == "patched" else nullcontext() as patched:
                if patched:
                    right, calls = patched.apply, []
                    patched.apply = lambda *args, right=right, calls=calls: calls.append(type(args[1])) or right(*args)
                loss = step_of_dpo(scored, rank)
                loss.backward()
                assert not patched or len(calls) == 1
            whole = {name: p.grad.full_tensor() for name, p in scored.named_parameters()}
            found[kind, unit, again, way] = loss.item(), whole
    return found


def test_fsdp2_gradients_are_trls_and_those_of_one_process():
    found, _ = ranks.fresh(2, sharded_steps)
    for kind, unit, again in WAYS_TO_SHARD:
        alone = model(kind)
        utils.add_fused_lm_head(alone, outputs=("log_probs", "entropy"))
        losses = [step_of_dpo(alone, rank) for rank in (0, 1)]
        (sum(losses) / 2).backward()
        (stock, theirs), (patched, ours) = (found[kind, unit, again, way] for way in ("stock", "patched"))
        assert abs(patched - stock) <= BOUND * abs(stock) and abs(patched - losses[0].item()) <= BOUND * abs(stock)
        for name, p in alone.named_parameters():
            assert (ours[name] - p.grad).norm() <= BOUND * p.grad.norm(), (kind, unit, again, name)
            if (
                unit == "head" and name == "lm_head.weight"
            ):  # TRL gathers a head of its own unit without a sum over ranks
                assert (theirs[name] - p.grad).norm() > 0.1 * p.grad.norm()
            else:
                assert (ours[name] - theirs[name]).norm() <= BOUND * theirs[name].norm(), (kind, unit, again, name)


# ---- finealign demo --trainer trl ----------------------------------------------------------------------------------

DEMO = ["demo", "--trainer", "trl", "--model", "tiny", "--steps", "2", "--batch", "2", "--pairs", "3", "--threads", "1"]


def test_the_demo_trains_stock_against_patched(tmp_path, capsys):
    path = tmp_path / "report.html"
    assert main([*DEMO, "--report", str(path)]) == 0
    output, page = capsys.readouterr().out, path.read_text(encoding="utf-8")
    for text in ("patched", "stock", "peak extra memory", "gradient norm, relative difference"):
        assert text in output and text in page
    assert "DPO in TRL on tiny, 2 steps" in page


def test_a_wrong_patch_ends_the_demo_with_status_1(tmp_path, capsys, monkeypatch):
    right = seam.Patch.apply
    wrong = lambda patch, h, w, b, labels, *rest: right(patch, h, w, b, labels.roll(1), *rest)  # noqa: E731
    monkeypatch.setattr(seam.Patch, "apply", wrong)
    assert main([*DEMO, "--report", str(tmp_path / "r.html")]) == 1
    assert "step 1: the gradient norm of TRL patched differs from stock" in capsys.readouterr().err


@pytest.mark.parametrize("more", [("--loss", "ipo"), ("--average", "kept"), ("--pivots", "sign"), ("--lora",)])
def test_what_trl_would_not_read_is_refused(more, capsys):
    assert main([*DEMO, *more]) == 2
    assert f"{more[0]} cannot be" in capsys.readouterr().err


def test_the_demo_says_where_trl_comes_from(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    assert main(DEMO) == 2
    assert "pip install 'finealign-kernels[trl]'" in capsys.readouterr().err

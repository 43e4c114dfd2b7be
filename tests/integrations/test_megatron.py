"""The processor of Megatron-Core's GPTModel, in the real model on two gloo ranks.

FINEALIGN_MEGATRON names folders with megatron-core inside, separated by ":", such as those of
`pip install --no-deps --target FOLDER megatron-core==0.16.1`.
"""

import importlib
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import ranks
import torch
from torch.testing import assert_close

from finealign_kernels.integrations.megatron import output_processor

FOLDERS = [Path(x) for x in os.environ.get("FINEALIGN_MEGATRON", "").split(":") if x and Path(x).is_dir()]
PADDED, TRUE, S, B, D = 64, 60, 8, 2, 32


def megatron(folder: Path):
    """Megatron-Core on a CPU: what asks for a GPU is answered here. Only in a process of its own."""
    sys.path.insert(0, str(folder))
    torch.cuda.current_device = lambda: torch.device("cpu")
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random.CudaRNGStatesTracker.fork = lambda self, name=None: nullcontext()
    norm = importlib.import_module("megatron.core.transformer.torch_norm").WrappedTorchNorm
    norm.__new__ = staticmethod(lambda cls, config, hidden_size, eps=1e-5, **_: LayerNorm(hidden_size, eps=eps))
    return importlib.import_module("megatron.core")


class LayerNorm(torch.nn.LayerNorm):
    """torch's norm, which Megatron refuses with sequence parallelism: there its gradient is a rank's own."""


def gpt(ranks: int, tied: bool, sequence_parallel: bool):
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=D,
        num_attention_heads=4,
        use_cpu_initialization=True,
        tensor_model_parallel_size=ranks,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        sequence_parallel=sequence_parallel,
    )
    torch.manual_seed(0)
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=PADDED,
        max_sequence_length=S,
        share_embeddings_and_output_weights=tied,
        parallel_output=True,
    )
    return model


def compared(group, folder: str, tied: bool, sequence_parallel: bool):
    """Loss and gradients of the stock model and of the processor; log-probs and entropy with the padding left out."""
    megatron(Path(folder))
    model = gpt(torch.distributed.get_world_size(group), tied, sequence_parallel)
    rng = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(TRUE, (B, S), generator=rng) for _ in range(2))
    given = ids, torch.arange(S).expand(B, S), torch.ones(1, 1, S, S).triu(1).bool()
    upstream = torch.randn(B, S, generator=rng)

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    stock = model(*given, labels=labels)
    stock_grads = gradients((stock * upstream).sum())
    layer = model.output_layer
    official = "output_processor" in type(model).forward.__code__.co_varnames

    def score(**options):
        process = output_processor(**options)
        if official:
            return model(*given, labels=labels, output_processor=process)
        hook = {}
        kept = layer.forward

        def forward(hidden, weight=None, **_):  # older versions: in place of the output layer
            hook["out"] = process(hidden, layer, weight, labels)
            return kept(hidden, weight=weight)

        layer.forward = forward
        try:
            model(*given, labels=labels)
        finally:
            layer.forward = kept
        return hook["out"]

    ours = score()
    grads = gradients((-ours.logp * upstream).sum())
    true = score(vocab_size=TRUE)
    return {
        "loss": (stock.detach(), -ours.logp.detach()),
        "true": (true.logp.detach(), true.entropy.detach()),
        "entropy": ours.entropy.detach(),
        "names": sorted(stock_grads) == sorted(grads),
        "grads": [(stock_grads[name], grads[name]) for name in stock_grads],
        "official": official,
    }


@pytest.mark.parametrize("tied, sequence_parallel", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("folder", FOLDERS or [None])
def test_in_the_real_model(folder, tied, sequence_parallel):
    if folder is None:
        pytest.skip("FINEALIGN_MEGATRON names no folder with megatron-core inside")
    found = ranks.processes(2, compared, str(folder), tied, sequence_parallel)
    for rank in found:
        assert_close(*rank["loss"], rtol=1e-5, atol=1e-6)
        assert rank["names"]
        for theirs, ours in rank["grads"]:
            assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert (rank["true"][0] > -rank["loss"][1]).all()  # fewer tokens share the probability
    assert torch.equal(found[0]["loss"][1], found[1]["loss"][1])


class Layer(torch.nn.Module):
    """What the processor reads of a ColumnParallelLinear."""

    def __init__(self, weight, group, sequence_parallel):
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(weight.clone()), None
        self.tp_group, self.sequence_parallel = group, sequence_parallel


@pytest.mark.parametrize("sequence_parallel", (False, True))
def test_layouts_options_and_the_scale_of_logits(sequence_parallel):
    """(S, B) inside, (B, S) outside; masked rows are 0; options of one call; MuP's scale; tied weights."""
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(S, B, D, generator=rng), torch.randn(PADDED, D, generator=rng)
    labels, mask = torch.randint(TRUE, (B, S), generator=rng), torch.rand(B, S, generator=rng) < 0.7
    upstream = torch.randn(B, S, generator=rng)

    def score(group):
        rank = torch.distributed.get_rank(group)
        mine = weight.chunk(2)[rank]
        layer = Layer(mine, group, sequence_parallel)
        tied = torch.nn.Parameter(mine.clone())
        layer.weight = None
        x = hidden.chunk(2)[rank] if sequence_parallel else hidden
        x = x.clone().requires_grad_()
        process = output_processor(vocab_size=TRUE)
        out = process(
            x,
            layer,
            tied,
            labels,
            mask.float(),
            scale_logits=lambda z: z * 0.5,
            context={"temperature": 0.7},
            config=None,
        )
        (out.logp * upstream).sum().backward()
        return out.logp.detach(), out.entropy.detach(), x.grad, tied.grad

    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logp = (x @ w[:TRUE].t() * 0.5 / 0.7).log_softmax(-1)
    entropy = torch.where(mask, -(logp.exp() * logp).sum(-1).t(), 0)
    picked = torch.where(mask, logp.gather(2, labels.t()[..., None])[..., 0].t(), 0)
    (picked * upstream).sum().backward()
    found = ranks.threads(2, score)
    for ours, ours_entropy, dx, _ in found:
        assert_close(ours.double(), picked.detach(), rtol=1e-5, atol=1e-5)
        assert_close(ours_entropy.double(), entropy.detach(), rtol=1e-5, atol=1e-5)
        if not sequence_parallel:
            assert_close(dx.double(), x.grad, rtol=1e-5, atol=1e-5)
    if sequence_parallel:
        assert_close(torch.cat([dx for _, _, dx, _ in found]).double(), x.grad, rtol=1e-5, atol=1e-5)
    assert_close(torch.cat([dw for *_, dw in found]).double(), w.grad, rtol=1e-5, atol=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match="labels must be given"):
        output_processor()(torch.zeros(S, B, D), Layer(torch.zeros(4, D), None, False))
    with pytest.raises(ValueError, match="output_processor_context must hold names"):
        output_processor()(
            torch.zeros(S, B, D), Layer(torch.zeros(4, D), None, False), labels=torch.zeros(B, S), context={"heat": 1}
        )

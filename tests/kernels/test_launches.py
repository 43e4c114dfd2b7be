"""How many kernels a call of the loss head launches on a GPU, and how often the host waits: counted without one.

The library's own Python runs on a CPU with a GPU's tiles; its products and row kernels are counted, not computed. A
call of torch counts once, also a sort, which is several kernels.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
from host_reads import reads
from torch.utils._python_dispatch import TorchDispatchMode

import finealign_kernels as fk
from finealign_kernels.formulas import logprobs as formula
from finealign_kernels.ops import _check, _choose, _chunked
from finealign_kernels.ops import logprobs as op
from finealign_kernels.testing import samples

N, CHUNKS, DEPTH = 64, 8, 8
TILE = _chunked.Tile(32, 16, gradient=2 * N * 16)  # as on a GPU with N = 8192: two blocks forward, one backward
VOCAB = CHUNKS * TILE.columns  # Llama-3-8B's head is 8 chunks too
# what makes memory without writing to it, or a number on the host: no kernel runs
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "scalar_tensor"}
OPS = {"linear_logprobs_fwd": op._linear_fwd, "linear_logprobs_bwd": op._linear_bwd}


class Count(TorchDispatchMode):
    """Calls of torch that launch a kernel, and those that wait for one. Looks into the library's ops."""

    def __init__(self):
        super().__init__()
        self.launches, self.waits = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "finealign":
            with self:
                return OPS[name]._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if reads(func, args):
            self.waits.append(name)
        leaves = torch.utils._pytree.tree_leaves
        old, new = (
            {x.untyped_storage().data_ptr() for x in leaves(t) if isinstance(x, torch.Tensor)}
            for t in ([args, kwargs], out)
        )
        if name not in FREE and (func._schema.is_mutable or not new <= old):  # else it is a view
            self.launches.append(name)
        return out


@pytest.fixture
def watch(monkeypatch):
    """A count, and a head that believes to be on a GPU."""
    count = Count()

    def kernel(name, result=lambda *a, **k: None):
        def launch(*args, **kwargs):
            count.launches.append(name)
            return result(*args, **kwargs)

        return launch

    def states(part, first, label, target, want):
        floats = [part.new_empty(len(part)) for _ in range(9)]
        return formula.Rows(*floats[:5], torch.empty(len(part), dtype=torch.bool), *floats[5:])

    rows = SimpleNamespace(
        tile_fwd=kernel("row_fwd"), tile_bwd=kernel("row_bwd"), combine=kernel("combine", states), TILE=None, SPAN=None
    )
    real = op.targets

    def targets(labels, mask, ignore_index, vocab, defer):
        target = real(labels, mask, ignore_index, vocab, defer=True)
        _check.note_errors(target, vocab)
        return target

    def on_host(*counts, read=_chunked.on_host):
        count.waits.append("on_host")
        return read(*counts)

    monkeypatch.setattr(_choose, "rows", lambda name: rows)
    monkeypatch.setattr(_chunked, "tile_of", lambda device: TILE)
    monkeypatch.setattr(_chunked, "compute_dtype", lambda x: x.dtype)
    monkeypatch.setattr(_chunked, "product", kernel("product"))
    monkeypatch.setattr(_chunked, "on_host", on_host)
    monkeypatch.setattr(op, "targets", targets)
    _check.note_errors(torch.zeros(1, dtype=torch.int64), VOCAB)  # the word is made once a process
    return count


def head(grad=True):
    hidden = torch.zeros(N, DEPTH, dtype=torch.bfloat16, requires_grad=grad)
    weight = torch.zeros(VOCAB, DEPTH, dtype=torch.bfloat16, requires_grad=grad)
    return hidden, weight, torch.arange(N) % VOCAB


def run(count, hidden, weight, labels, upstream, **options):
    """(launches, waits) of forward, then of backward."""
    with count:
        out = fk.linear_logprobs(hidden, weight, labels, **options)
        ahead = len(count.launches), len(count.waits)
        torch.autograd.backward(out.logp, upstream)
    return ahead, (len(count.launches) - ahead[0], len(count.waits) - ahead[1])


def test_a_dense_step_launches_few_kernels_and_waits_once_a_direction(watch):
    forward, backward = run(watch, *head(), torch.ones(N), workspace="full")
    own = {name: watch.launches.count(name) for name in ("product", "row_fwd", "row_bwd", "combine")}
    # forward: a product and a row kernel for each of 8 chunks x 2 blocks; backward: one block
    assert own == {"product": 16 + 2 * CHUNKS, "row_fwd": 16, "row_bwd": CHUNKS, "combine": 1}
    assert forward[0] + backward[0] < 90, watch.launches
    assert (forward[1], backward[1]) == (1, 1), watch.waits


@pytest.mark.parametrize("workspace", (0, 2**9, "full"))
@pytest.mark.parametrize("left_out", (False, True))
def test_rows_left_out_cost_no_launch_a_tile(watch, workspace, left_out):
    """Pivots: labels that are ignored and rows without gradient. Each direction gathers its rows once."""
    hidden, weight, labels = head()
    upstream = torch.ones(N)
    if left_out:
        labels[::5], upstream[::3] = -100, 0.0
    forward, backward = run(watch, hidden, weight, labels, upstream, workspace=workspace)
    assert (forward[1], backward[1]) == (1, 1), watch.waits
    assert watch.launches.count("index_select") == (2 if left_out else 0)
    own = ("product", "row_fwd", "row_bwd", "combine")
    others = [name for name in watch.launches if name not in own]
    assert len(others) < 70, others


def test_the_count_sees_a_copy_and_a_wait():
    with Count() as count:
        x = torch.zeros(4)
        x.clone()
        x.view(2, 2).t()
        x.nonzero()
        float(x.sum())
    assert count.launches == ["zeros", "clone", "nonzero", "sum"]
    assert count.waits == ["nonzero", "_local_scalar_dense"]


# ---- the blocks of a GPU's backward give the numbers of the others -------------------------------------------------


def wide_product(a, b, out, accumulate=False):
    """A GPU's product of halves: summed in float32, rounded when it is written."""
    found = a.float() @ b.float()
    out.copy_(out + found if accumulate else found)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("workspace", (0, 3000, "full"))
@pytest.mark.parametrize("left_out", (False, True))
@pytest.mark.parametrize("gradient", (0, 20, 10**6))  # rows of a block: the tile's, some, all
def test_blocks_of_any_size(monkeypatch, dtype, workspace, left_out, gradient):
    sample = samples.linear(50, 130, 16, dtype)
    labels, upstream = sample.labels.clone(), torch.linspace(-1, 1, 50)
    if left_out:
        labels[::5], upstream[::3] = -100, 0.0

    def gradients(backend, dtype):
        tensors = [x.to(dtype, copy=True).requires_grad_() for x in (sample.hidden, sample.weight)]
        out = fk.linear_logprobs(*tensors, labels, workspace=workspace, outputs="entropy", backend=backend)
        return torch.autograd.grad((out.logp * upstream).sum() + 0.1 * (out.entropy * upstream).sum(), tensors)

    tile = _chunked.Tile(8, 64, gradient=gradient * 64 * dtype.itemsize)
    assert tile.gradient_rows(dtype) == max(8, gradient)
    exact = gradients("reference", torch.float64)
    monkeypatch.setattr(_chunked, "tile_of", lambda device: tile)
    monkeypatch.setattr(_chunked, "compute_dtype", lambda x: x.dtype)
    monkeypatch.setattr(_chunked, "product", wide_product)
    for found, expected in zip(gradients("torch", dtype), exact, strict=True):
        error = (found.double() - expected).norm() / expected.norm()
        # E, dZ and the result are rounded to bfloat16 once each; a sum of blocks in it would be 2.6e-3 to 4e-3 off
        assert error < (1e-6 if dtype == torch.float32 else 2.5e-3)


def test_labels_out_of_range_are_counted_by_an_atomic_addition():
    """Two streams that meet at the error word would lose a count to one that is read, added to and written."""
    with Count() as count:
        _check.note_errors(torch.full((1,), _check.BAD), VOCAB)
    with pytest.raises(IndexError, match="1 labels"):
        _check.check_errors()
    assert "index_add_" in count.launches and "add_" not in count.launches


class Graph(TorchDispatchMode):
    """A CUDA graph on a CPU: what is called is kept, and replay() does it again in the memory of the capture, which
    holds anything before: a capture runs nothing."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.calls, self.patch = [], monkeypatch

    def __enter__(self):
        self.patch.setattr(_check, "capturing", lambda x: True)
        return super().__enter__()

    def __exit__(self, *failure):
        super().__exit__(*failure)
        self.patch.setattr(_check, "capturing", lambda x: False)
        for memory in itertools.chain(*_check._captured.values()):
            memory.fill_(7)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args, kwargs or {}, func(*args, **(kwargs or {}))))
        return self.calls[-1][-1]

    @property
    def names(self):
        return [func._schema.name.removeprefix("aten::") for func, *_ in self.calls]

    @torch.inference_mode()  # it may write to tensors of either kind
    def replay(self):
        for func, args, kwargs, out in self.calls:
            if func._schema.name != "aten::empty":
                again = func(*args, **kwargs)
                if isinstance(again, torch.Tensor) and again is not out:
                    out.copy_(again)


@pytest.fixture
def words(monkeypatch):
    for name in ("_words", "_captured"):
        monkeypatch.setattr(_check, name, {})
    return torch.tensor([0, _check.BAD, 1, _check.BAD])  # two labels out of range


@pytest.mark.parametrize("inference", (False, True))
def test_a_word_first_made_in_a_capture_counts_in_every_replay(words, monkeypatch, inference):
    graphs = [Graph(monkeypatch), Graph(monkeypatch)]
    for graph in graphs:
        with torch.inference_mode(inference), graph:
            _check.note_errors(words, VOCAB)
    fk.check_errors()  # nothing has run
    for graph in (graphs[1], *graphs):  # the one that made the memory is not the first
        graph.replay()
    _check.note_errors(words, VOCAB)  # in front of a replay's count, and beside it
    with pytest.raises(IndexError, match="2 labels"):
        fk.check_errors()
    with pytest.raises(IndexError, match="6 labels"):
        fk.check_errors()
    fk.check_errors()
    graphs[0].replay()
    with pytest.raises(IndexError, match="2 labels"):
        fk.check_errors()


def test_a_graph_takes_the_word_that_was_there(words, monkeypatch):
    _check.note_errors(words, VOCAB)
    with Graph(monkeypatch) as graph:
        _check.note_errors(words, VOCAB)
    assert not _check._captured and not {"empty", "fill_", "zeros"} & set(graph.names)
    with pytest.raises(IndexError, match="4 labels"):
        fk.check_errors()  # the capture itself ran on this CPU
    for _ in range(3):
        graph.replay()
    with pytest.raises(IndexError, match="6 labels"):
        fk.check_errors()

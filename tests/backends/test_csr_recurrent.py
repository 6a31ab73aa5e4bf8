"""torch's LSTM and GRU, storing only their non-zeros, against the masked backend and against torch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import dst
from dst import kernels, methods
from dst.allocation import PerLayer, Uniform
from dst.backends import auto, timing
from dst.errors import ConfigurationError
from dst.metrics import count_operations
from dst.nn import RecurrentWeight, SparseGRU, SparseLSTM, SparseRecurrent
from tests.backends.runs import (
    DENSITY,
    EVERY,
    OPTIMIZERS,
    STEPS,
    Run,
    assert_same,
    check_accumulates_as_masked,
    check_continues_with,
    check_copy_becomes_dense,
    check_resumes,
    check_trains_as_masked,
    sparse_layers,
)
from tests.sampling import rotated


class Recurrent(nn.Module):
    """Inputs as five vectors for a recurrent module, and a head on all outputs."""

    def __init__(self, recurrent: nn.Module, size: int) -> None:
        super().__init__()
        self.register_buffer("stem", torch.randn(6, 12))
        self.recurrent = recurrent
        self.head = nn.Linear(size, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x.view(-1, 5, 6) @ self.stem)[0].mean(1))


def lstm() -> nn.Module:
    return Recurrent(nn.LSTM(12, 16, batch_first=True), 16)


def gru() -> nn.Module:
    return Recurrent(nn.GRU(12, 16, 2, batch_first=True), 16)


def both_ways() -> nn.Module:
    return Recurrent(nn.LSTM(12, 10, 2, bias=False, batch_first=True, bidirectional=True), 20)


@pytest.mark.parametrize(
    ("name", "optimizer", "net"),
    rotated(
        ["rigl", "rigl_with_step", "rigl_no_regrowth", "rigl_rescaled", "rigl_by_magnitude", "set", "gradient_drop"],
        OPTIMIZERS,
        [lstm, gru, both_ways],
        each=2,
    ),
)
def test_trains_as_a_masked_one(name, optimizer, net):
    csr = check_trains_as_masked(name, optimizer, net)
    assert isinstance(csr.model.recurrent, SparseRecurrent)


def test_accumulated_gradients():
    check_accumulates_as_masked(gru)


@pytest.mark.parametrize(("optimizer", "net"), [("sgd", lstm), ("adamw", gru)])
def test_a_resumed_run_is_identical(optimizer, net):
    check_resumes(optimizer, net)


@pytest.mark.parametrize(("before", "after"), [("masked", "csr"), ("csr", "masked")])
@pytest.mark.parametrize(("optimizer", "net"), [("sgd", both_ways), ("adamw", gru)])
def test_a_run_continues_with_the_other_backend(before, after, optimizer, net):
    check_continues_with(before, after, optimizer, net)


@pytest.mark.parametrize("net", [lstm, both_ways])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_become_dense_again(net, again):
    model = check_copy_becomes_dense(net, again)
    assert not any(isinstance(m, (RecurrentWeight, SparseRecurrent)) for m in model.modules())


# -- the modules ----------------------------------------------------------------------------------------------------


def pair(kind: type[nn.RNNBase], dtype: torch.dtype = torch.float64, **options) -> tuple[nn.RNNBase, SparseRecurrent]:
    """A sparse recurrent module, and a dense one with the same weights."""
    torch.manual_seed(0)
    model = nn.Sequential(kind(6, 8, dtype=dtype, **options))
    sparse = dst.prepare(model, methods.rigl(0.4, backend="csr", allocation=Uniform()))[0]
    assert isinstance(sparse, SparseLSTM if kind is nn.LSTM else SparseGRU)
    return dst.to_dense(nn.Sequential(copy.deepcopy(sparse)))[0], sparse


def flat(result) -> list[Tensor]:
    y, last = result
    return [y, *last] if isinstance(last, tuple) else [y, last]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"batch_first": True},
        {"bidirectional": True},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
    ],
)
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("batch", [None, 1, 3])
@pytest.mark.parametrize("starts", [False, True])
def test_same_results_and_gradients_as_the_dense_module(kind, options, steps, batch, starts):
    modules = pair(kind, **options)
    shape = (steps, 6) if batch is None else (batch, steps, 6) if options.get("batch_first") else (steps, batch, 6)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True)]
    if starts:
        layers = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
        first = (layers, 8) if batch is None else (layers, batch, 8)
        inputs += [torch.randn(first, dtype=torch.float64, requires_grad=True) for _ in range(1 + (kind is nn.LSTM))]
    found = []
    for module in modules:
        hx = [] if not starts else [tuple(inputs[1:]) if kind is nn.LSTM else inputs[1]]
        result = flat(module(inputs[0], *hx))
        loss = sum((y * torch.arange(1.0, y.numel() + 1).view_as(y).cos()).sum() for y in result)
        loss.backward()
        found.append([*result, *(x.grad for x in inputs)])
        for x in inputs:
            x.grad = None
    torch.testing.assert_close(found[1], found[0])
    dense, sparse = modules
    for name, parameter in dense.named_parameters():
        mine = getattr(sparse, name)
        if isinstance(mine, RecurrentWeight):
            torch.testing.assert_close(mine.values.grad, mine.from_dense(parameter.grad))
        else:
            torch.testing.assert_close(mine.grad, parameter.grad)
    with torch.no_grad():
        torch.testing.assert_close(flat(sparse(inputs[0]))[0], flat(dense(inputs[0]))[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_operators_of_torch_compute_the_same(kind, monkeypatch):
    _, sparse = pair(kind, num_layers=2, bidirectional=True)
    x = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)

    def run():
        sparse.zero_grad()
        x.grad = None
        y = sparse(x)[0]
        y.square().sum().backward()
        return [y, x.grad, *(p.grad for p in sparse.parameters())]

    expected = run()
    monkeypatch.setattr(RecurrentWeight, "products", lambda self: None)
    torch.testing.assert_close(run(), expected)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_sixteen_bits_autocast_and_the_fallback(kind, monkeypatch):
    dense, sparse = pair(kind, torch.float32)
    x = torch.randn(4, 3, 6)
    expected = dense(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(sparse(x)[0].float(), expected, rtol=0.05, atol=0.05)
    half = copy.deepcopy(sparse).bfloat16()
    half(x.bfloat16())[0].float().sum().backward()
    torch.testing.assert_close(half(x.bfloat16())[0].float(), expected, rtol=0.05, atol=0.05)
    assert half.weight_hh_l0.values.grad.dtype == torch.bfloat16
    slow = kernels.TorchKernels()
    for module in sparse.modules():
        if isinstance(module, RecurrentWeight):
            module._engine = slow
            module.set_pattern(module.positions())
    torch.testing.assert_close(sparse(x)[0], expected)


def test_dropout_acts_between_layers_in_training():
    dense, sparse = pair(nn.GRU, num_layers=2, dropout=0.5)
    x = torch.randn(4, 2, 6, dtype=torch.float64)
    results = []
    for module in (dense, sparse):
        torch.manual_seed(3)
        results.append(module(x)[0])
    torch.testing.assert_close(results[1], results[0])
    assert torch.equal(sparse.eval()(x)[0], sparse(x)[0])


def test_a_change_of_the_pattern_between_the_passes():
    _, sparse = pair(nn.LSTM)
    y = sparse(torch.randn(3, 2, 6, dtype=torch.float64))[0]
    expected = torch.autograd.grad(y.sum(), sparse.weight_hh_l0.values, retain_graph=True)[0]
    other = sparse.weight_hh_l0
    pattern = other.pattern
    other._set_pattern(other._new_pattern(torch.arange(other.nnz)))
    assert torch.equal(torch.autograd.grad(y.sum(), other.values, retain_graph=True)[0], expected)
    other._set_pattern(pattern)
    other.values.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_operations_are_counted_by_the_non_zeros(kind):
    _, sparse = pair(kind)
    model = nn.Sequential(sparse)
    counted = count_operations(model, torch.zeros(5, 3, 6, dtype=torch.float64), batch_size=3)
    assert counted.macs == {f"0.{n}.values": m.nnz * 5 for n, m in sparse.named_children()}
    assert counted.warnings() == []
    with FlopCounterMode(display=False) as counter:
        sparse(torch.zeros(5, 3, 6, dtype=torch.float64))
    assert counter.get_total_flops() == sum(2 * 15 * m.nnz for m in sparse.children())


def test_refuses_what_does_not_fit():
    _, sparse = pair(nn.LSTM)
    x = torch.randn(4, 2, 6, dtype=torch.float64)
    with pytest.raises(ConfigurationError, match="takes no PackedSequence: keep the module masked"):
        sparse(pack_padded_sequence(x, torch.tensor([4, 2])))
    with pytest.raises(ValueError, match="the last of size 6"):
        sparse(x[..., :5])
    with pytest.raises(ValueError, match="a first state is"):
        sparse(x, (x.new_zeros(1, 3, 8), x.new_zeros(1, 3, 8)))
    with pytest.raises(ValueError, match="one step or more"):
        sparse(x[:0])
    with pytest.raises(ConfigurationError, match="do not fit"):
        SparseGRU(6, 8, {"weight_ih_l0": sparse.weight_ih_l0})


# -- which modules --------------------------------------------------------------------------------------------------


class Derived(nn.LSTM):
    pass


def test_the_dry_run_tells_what_stays_masked():
    tied = nn.GRU(6, 6)
    tied.weight_ih_l0 = (shared := nn.GRU(6, 6)).weight_ih_l0
    model = nn.ModuleDict(
        {
            "plain": nn.LSTM(6, 8),
            "projected": nn.LSTM(6, 8, proj_size=4),
            "derived": Derived(6, 8),
            "rnn": nn.RNN(6, 8),
            "cell": nn.LSTMCell(6, 8),
            "tied": tied,
            "shared": shared,
        }
    )
    method = methods.rigl(0.2, allocation=Uniform(), backend="csr")
    rows = {row.name: (row.storage, row.note) for row in dst.plan(model, method).rows}
    assert rows["plain.weight_ih_l0"] == rows["plain.weight_hh_l0"] == rows["tied.weight_hh_l0"] == ("csr", "")
    assert rows["projected.weight_hr_l0"] == ("masked", "an LSTM with proj_size is not supported by csr")
    assert rows["derived.weight_hh_l0"] == ("masked", "Derived has no csr kernel")
    assert rows["rnn.weight_hh_l0"] == ("masked", "RNN has no csr kernel")
    assert rows["cell.weight_hh"] == ("masked", "LSTMCell has no csr kernel")
    assert rows["tied.weight_ih_l0"] == ("masked", "tied weights")
    prepared = dst.prepare(model, method)
    assert isinstance(prepared["plain"], SparseLSTM)
    assert type(prepared["projected"]) is nn.LSTM
    assert prepared["tied"].weight_ih_l0 is prepared["shared"].weight_ih_l0
    again = {row.name: row.storage for row in dst.plan(prepared, method).rows}
    assert again == {name: storage for name, (storage, _) in rows.items()}


@pytest.mark.parametrize("dense", ["recurrent.weight_ih_l0", "recurrent.weight_hh_l0"])
def test_a_weight_that_keeps_all_its_weights_stays_dense(dense):
    densities = {dense: 1.0, "*": 0.3}
    sizes = {n: p.numel() for n, p in lstm().named_parameters() if "weight" in n}
    density = sum(size * densities.get(n, 0.3) for n, size in sizes.items()) / sum(sizes.values())

    def run(backend):
        return methods.rigl(density, update_every=EVERY, stop=1.0, allocation=PerLayer(densities), backend=backend)

    masked, csr = (Run(run(backend), net=lstm) for backend in ("masked", "csr"))
    assert isinstance(csr.model.get_parameter(dense), nn.Parameter)
    assert_same(masked.train(STEPS), csr.train(STEPS))
    weights = dst.dense_state_dict(csr.model)
    assert list(weights) == list(masked.model.state_dict())
    dst.to_dense(csr.model).load_state_dict(weights)


def test_selectors_choose_the_same_layers_before_and_after():
    method = methods.rigl(0.2, backend="csr")
    for include in (["recurrent"], [nn.GRU], ["recurrent.weight_*"]):
        model = dst.prepare(gru(), method, include=include)
        assert isinstance(model.recurrent, SparseGRU)
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        sparsifier = dst.Sparsifier(model, sgd, method, total_steps=4, include=include)
        assert list(sparsifier.masks) == [f"recurrent.weight_{x}_l{i}" for i in (0, 1) for x in ("ih", "hh")]


def test_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.LSTM(6, 8))
    first, second = (dst.prepare(copy.deepcopy(model), methods.rigl(0.2, backend="csr")) for _ in range(2))
    x = torch.randn(3, 2, 6)
    assert torch.equal(first(x)[0], second(x)[0])


def test_auto_measures_a_layer_and_restores_its_choice(monkeypatch):
    cases = []
    monkeypatch.setattr(timing, "measure", lambda case: (cases.append(case), timing.Timing(2, 1))[1])
    method = methods.rigl(DENSITY, allocation=Uniform(), backend="auto")
    model = dst.prepare(lstm(), method, example=torch.randn(8, 30))
    assert (cases[0].kind, cases[0].inputs, cases[0].outputs, cases[0].batch_size) == (nn.LSTM, 12, 16, 8)
    assert str(cases[0]) == "8 sequences of 5 steps"
    monkeypatch.undo()
    measured = timing.measure(cases[0])
    assert measured.masked > 0
    assert measured.sparse > 0
    fresh = lstm()
    auto.restore_modules(0, fresh, model.state_dict(), "")
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(4, 30)
    torch.testing.assert_close(fresh(x), model(x))
    dense = dst.to_dense(copy.deepcopy(model)).state_dict()
    auto.restore_modules(0, fresh, dense, "")
    fresh.load_state_dict(dense)
    assert type(fresh.recurrent) is nn.LSTM
    torch.testing.assert_close(fresh(x), model(x))


def test_auto_keeps_a_recurrent_module_masked_where_csr_is_not_faster(monkeypatch):
    monkeypatch.setattr(timing, "measure", lambda case: timing.Timing(1, 1))
    model = dst.prepare(gru(), methods.rigl(DENSITY, allocation=Uniform(), backend="auto"))
    assert sparse_layers(model) == []

"""Memory: predictions by hand and against allocated bytes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dst
from dst.errors import ConfigurationError
from dst.metrics import PeakMemory, memory, predict_memory
from dst.metrics.memory import activation_bytes, resident_bytes
from tests import small


def test_masked_by_hand():
    model = nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20), nn.Linear(20, 4, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    found = predict_memory(model, torch.zeros(8, 10), {"0.weight": 30, "2.weight": 80}, optimizer=optimizer)
    parameters = 200 + 20 + 40 + 80
    assert found.weights == 4 * (parameters + 40) + 8  # running statistics, and a counter of batches
    assert found.topology == 200 * (1 + 1 + 4) + 80 * 2  # no bits where all weights are active
    assert found.gradients == found.optimizer_state == 4 * parameters
    assert found.total == sum(vars(found).values())
    still = predict_memory(model, torch.zeros(8, 10), {"0.weight": 30}, optimizer=optimizer, dynamic=False)
    assert still.topology == 200 * 5
    idle = predict_memory(model, torch.zeros(8, 10), {"0.weight": 30})
    assert (idle.topology, idle.gradients, idle.optimizer_state) == (0, 0, 0)


def test_stored_non_zeros_by_hand():
    model = nn.Linear(100, 10).double()
    batch = torch.zeros(8, 100, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters())
    found = predict_memory(model, batch, {"weight": 50}, backend="csr", optimizer=optimizer)
    assert found.gradients == 8 * 60
    assert found.weights == 8 * (2 * 50 + 10)
    assert found.topology == 50 * (2 + 2 + 4) + 4 * (11 + 101) + 1000 // 8
    assert found.optimizer_state == 2 * 8 * 60 + 2 * 4  # two moments, and a step of four bytes for each parameter
    wide = nn.Linear(70_000, 2, bias=False, device="meta")
    wide = predict_memory(wide, torch.zeros(1, 70_000, device="meta"), {"weight": 50}, backend="csr")
    assert wide.topology == 50 * (4 + 4 + 4) + 4 * (3 + 70_001)
    dense = predict_memory(model, batch, {}, optimizer=optimizer)
    assert found.total < dense.total < predict_memory(model, batch, {"weight": 50}, optimizer=optimizer).total


def held_by(sparsifier, model, optimizer):
    """Bytes of everything a training holds between steps, each memory once, but for activations."""
    state = [v for p in optimizer.state.values() for v in p.values() if isinstance(v, torch.Tensor)]
    found = [*model.parameters(), *model.buffers(), *state, *(p.grad for p in model.parameters())]
    for storage in sparsifier._training.storages:
        if storage.backend == "csr":
            for module in storage._modules.values():
                pattern = vars(module.pattern).values()
                found += [module.row_major(module.values), *(t for t in pattern if isinstance(t, torch.Tensor))]
            found += [explored.bits for explored in storage._explored.values()]
        else:
            found += [*storage._masks.values(), *storage._union.values(), *storage._bits._tensors.values()]
            found += [] if storage.backend == "masked" else [*storage._weights.values()]
    return sum({t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in found}.values())


def linear_layers():
    return nn.Sequential(nn.Linear(64, 48, bias=False), nn.Linear(48, 32, bias=False), nn.Linear(32, 10))


def convolutions():
    """Kernels of several sizes on images of 64 values."""
    return nn.Sequential(
        nn.Unflatten(1, (4, 4, 4)), nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 24, (5, 3), stride=2, padding=2),
        nn.Conv2d(24, 16, 1, bias=False), nn.Flatten(), nn.Linear(16 * 2 * 3, 10),
    )  # fmt: skip


@pytest.mark.parametrize("build", [linear_layers, convolutions])
@pytest.mark.parametrize("backend", ["masked", "latent", "csr"])
def test_prediction_equals_what_a_training_holds(backend, build):
    torch.manual_seed(0)
    model = build()
    twin = copy.deepcopy(model)
    method = (
        dst.methods.top_kast(0.1) if backend == "latent" else dst.methods.rigl(0.1, update_every=2, backend=backend)
    )
    model = dst.prepare(model, method)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=8)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(16, 64)).square().mean().backward()
        sparsifier.before_step()
        optimizer.step()
    active = {row["name"]: row["nonzero"] for row in sparsifier.layer_table()}
    homes = sparsifier.backends
    assert set(homes.values()) == {backend}
    trained = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    predicted = predict_memory(twin, torch.zeros(16, 64), active, backend=homes, optimizer=trained)
    assert predicted.total - predicted.activations == held_by(sparsifier, model, optimizer)
    if backend == "csr":
        # From the prepared model itself; what a sparse layer keeps for its backward pass is its input, as a dense one.
        assert predict_memory(model, torch.zeros(16, 64), {}, optimizer=optimizer) == predicted
        inference = predict_memory(twin, torch.zeros(16, 64), active, backend=homes)
        assert predict_memory(model, torch.zeros(16, 64), {}) == inference


def test_backends_may_differ_within_a_model():
    model = nn.Sequential(nn.Linear(100, 50, bias=False), nn.Linear(50, 40, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    mixed = predict_memory(
        model, (100,), {"0.weight": 500, "1.weight": 200}, backend={"0.weight": "csr"}, optimizer=optimizer
    )
    assert mixed.gradients == 4 * (500 + 2000)
    assert mixed.weights == 4 * (2 * 500 + 2000)


@pytest.mark.parametrize("name", small.OPTIMIZERS)
def test_optimizer_state_equals_that_of_a_real_step(name):
    model = small.Small()
    optimizer = small.OPTIMIZERS[name](model.parameters())
    predicted = predict_memory(model, torch.zeros(2, 2, 6, 6), {}, optimizer=optimizer).optimizer_state
    assert not optimizer.state or name == "adagrad"  # which makes its state at once
    small.backward(model, optimizer, 0)
    optimizer.step()
    tensors = [t for p in model.parameters() for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)]
    real = sum(t.numel() * t.element_size() for t in tensors)
    if name == "odd":  # its rows and its flat copy are neither per weight nor of one size
        assert 0 < predicted < real
    else:
        assert predicted == real


def test_optimizers_with_own_attributes_are_stepped():
    class Scaled(torch.optim.SGD):
        def __init__(self, params, scale):
            super().__init__(params, 0.1, momentum=0.9)
            self.scale = scale

        def step(self, closure=None):
            self.param_groups[0]["lr"] = 0.1 * self.scale
            return super().step(closure)

    model = nn.Linear(3, 2, bias=False)
    optimizer = Scaled(model.parameters(), 3)
    assert predict_memory(model, (3,), {}, optimizer=optimizer).optimizer_state == 4 * 6
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_predicting_disturbs_neither_optimizer_nor_sparsifier_nor_scheduler():
    model = small.Small()
    optimizer = small.OPTIMIZERS["adamw"](model.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    sparsifier = dst.Sparsifier(model, optimizer, dst.methods.rigl(0.3, update_every=4), total_steps=12)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    predicted = predict_memory(model, small.batch(0)[0], {"hidden.weight": 10}, optimizer=optimizer)
    assert predicted.optimizer_state == 2 * predicted.gradients + 4 * len(list(model.parameters()))
    assert sparsifier.step == 0
    assert not optimizer.state
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    small.train(model, optimizer, sparsifier, 2)
    scheduler.step()
    assert sparsifier.step == 2


def test_activations_by_hand():
    model = nn.Sequential(nn.Linear(10, 20, bias=False), nn.ReLU(), nn.Linear(20, 4, bias=False))
    batch = torch.zeros(8, 10)
    # The input for the first layer's weights; the rectified features for ReLU and the second layer, once.
    assert activation_bytes(model, batch) == 4 * 8 * (10 + 20)
    assert activation_bytes(model.to("meta"), batch) == 4 * 8 * (10 + 20)
    assert activation_bytes(model, batch, training=False) == 4 * 8 * (20 + 20)
    assert activation_bytes(model, torch.zeros(16, 10)) == 2 * activation_bytes(model, batch)


def test_activations_equal_what_is_freed_with_the_graph():
    model = small.Small()
    images = small.batch(0)[0]
    held: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    predicted = activation_bytes(model, images)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(images)
    assert predicted == sum(held.values())
    assert output.requires_grad


def test_measured_peak_sees_memory_that_is_freed_again():
    with PeakMemory() as measured:
        block = torch.ones(2**24)  # 64 MiB
        del block
    assert measured.source.startswith("resident memory")
    assert measured.increase > 50 * 2**20
    assert measured.peak >= measured.before > 0
    if measured.source == "resident memory":
        with PeakMemory() as nothing:
            pass
        assert nothing.increase < 50 * 2**20


def test_measured_increase_fits_the_prediction():
    model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(2)])
    batch = torch.randn(4096, 1024)

    def step():
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        with PeakMemory() as measured:
            model(batch).sum().backward()
            optimizer.step()
        return optimizer, measured

    optimizer, measured = step()
    predicted = predict_memory(model, batch, {}, optimizer=optimizer)
    if measured.source == "resident memory":
        new = predicted.gradients + predicted.optimizer_state + predicted.activations
        assert 0.5 * new < measured.increase < 2.5 * new


def test_systems_without_a_memory_report(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    assert resident_bytes() > 2**20
    with PeakMemory() as measured:
        pass
    assert measured.source == "resident memory, peak since the process began"
    assert measured.peak > 2**20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"other": 1}, "masked"), "no parameter other"),
        (({"weight": 7}, "masked"), "6 weights; 7"),
        (({}, "dense"), "backend='dense' is unknown"),
        (({"weight": 1}, {"weight": "dense"}), "backend='dense' is unknown"),
    ],
)
def test_refuses(arguments, message):
    active, backend = arguments
    with pytest.raises(ConfigurationError, match=message):
        predict_memory(nn.Linear(2, 3), (2,), active, backend=backend)

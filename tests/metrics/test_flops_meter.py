"""Training FLOPs: every step at the density it ran with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dst
from dst.errors import ConfigurationError, StateError
from dst.metrics import FlopsMeter, count_operations
from tests import small


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 20, bias=False), nn.Linear(20, 10, bias=False))


def operations():
    return count_operations(network(), (10,))


def test_kinds_of_steps_by_hand():
    meter = FlopsMeter(operations(), backend="csr", samples_per_step=4)
    meter.add("dense", {"0.weight": 1}, 2)
    meter.add("sparse", {"0.weight": 50, "1.weight": 20}, 5)
    meter.add("dense_gradient", {"0.weight": 50, "1.weight": 20})
    macs = 2 * 3 * 400 + 5 * 3 * 70 + (2 * 70 + 400)
    total = meter.total("macs")
    assert total.theoretical == total.executed == 4 * macs
    assert total.dense == 4 * 8 * 3 * 400
    assert total.ratio == macs / (8 * 3 * 400)
    assert meter.layers("flops")["1.weight"].theoretical == 4 * 2 * (2 * 600 + 5 * 60 + 40 + 200)
    # RigL's convention adds one operation per output and pass, whatever the density.
    assert meter.total("rigl").theoretical == 4 * (2 * macs + 8 * 3 * 30)
    assert meter.steps == 8


def test_masked_backend_executes_the_dense_network_and_stored_layers_alone_are_skipped():
    for backend, stored, executed in (("masked", None, 400), ("csr", ["1.weight"], 220), ("csr", None, 70)):
        meter = FlopsMeter(operations(), backend=backend, stored=stored)
        meter.add("sparse", {"0.weight": 50, "1.weight": 20}, 3)
        assert meter.total("macs").executed == 9 * executed
        assert meter.total("macs").theoretical == 9 * 70


def test_long_sums_are_exact():
    meter = FlopsMeter(operations())
    for _ in range(3):
        meter.add("sparse", {"0.weight": 7}, 10**15)
    assert meter.state_dict()["theoretical"]["0.weight"] == 63 * 10**15


class Gradual:
    """Stands in for a sparsifier whose density falls at every update."""

    def __init__(self) -> None:
        self.step_counts = {"dense": 0, "sparse": 0, "dense_gradient": 0}
        self.active = [200, 200]

    def layer_table(self):
        return [{"name": f"{i}.weight", "nonzero": n} for i, n in enumerate(self.active)]


def test_changing_density_is_counted_as_it_ran():
    run, meter = Gradual(), FlopsMeter(operations())
    meter.observe(run)
    expected = 0
    for step in range(10):
        run.step_counts["sparse"] += 1
        expected += 3 * sum(run.active)  # the forward pass comes before the update
        if step % 3 == 2:
            run.active = [n - 60 for n in run.active]
            meter.observe(run)
    meter.observe(run)
    assert meter.total("macs").theoretical == expected
    assert expected == 3 * 2 * (3 * 200 + 3 * 140 + 3 * 80 + 20)


@pytest.mark.parametrize("every_step", [True, False])
def test_follows_a_sparsifier_through_its_dense_phase(every_step):
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = dst.methods.static(0.25, sparsify_at=4)
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=10)
    meter = FlopsMeter(count_operations(model, (10,)))
    meter.observe(sparsifier)
    for step in range(10):
        model(torch.randn(3, 10)).square().sum().backward()
        sparsifier.before_step()
        optimizer.step()
        if every_step or step == 4:
            meter.observe(sparsifier)
    meter.observe(sparsifier)
    # The mask of step 4 is made after its forward and backward pass.
    assert meter.total("macs").theoretical == 3 * (5 * 400 + 5 * 100)


def test_real_updates_need_the_dense_gradient():
    torch.manual_seed(0)
    model = small.Small()
    optimizer = small.OPTIMIZERS["sgd"](model.parameters())
    sparsifier = dst.Sparsifier(model, optimizer, dst.methods.rigl(0.3, update_every=4), total_steps=12)
    counted = count_operations(model, (2, 6, 6))
    assert counted.warnings() == []
    meter = FlopsMeter(counted)
    meter.observe(sparsifier)
    small.train(model, optimizer, sparsifier, 12)
    meter.observe(sparsifier)
    assert meter.steps == 12
    active = {row["name"]: row["nonzero"] for row in sparsifier.layer_table()}
    by_label = {w.label: w for w in counted.weights}
    updates = sparsifier.updates
    assert updates >= 2
    for name, flops in meter.layers("macs").items():
        if name in by_label:
            w = by_label[name]
            positions, n = w.macs / w.weights, active[name]
            assert flops.theoretical == positions * ((12 - updates) * 3 * n + updates * (2 * n + w.weights))
    assert meter.layers("macs")["attention: q·k"].theoretical == 12 * 3 * 16 * 16 * 8


def test_state_survives_and_gaps_are_refused():
    run, meter = Gradual(), FlopsMeter(operations())
    meter.observe(run)
    run.step_counts["sparse"] = 5
    meter.observe(run)
    other = FlopsMeter(operations())
    with pytest.raises(StateError, match="5 steps ran and the meter knows of 0"):
        other.observe(run)
    other.load_state_dict(meter.state_dict())
    run.step_counts["dense"] = 2
    for m in (meter, other):
        m.observe(run)
    assert meter.state_dict() == other.state_dict()
    run.step_counts["sparse"] = 1
    with pytest.raises(StateError, match="went back in time"):
        other.observe(run)
    elsewhere = FlopsMeter(count_operations(nn.Linear(3, 2), (3,)))
    with pytest.raises(StateError, match=r"other layers: 0\.weight, 1\.weight, weight differ"):
        elsewhere.load_state_dict(meter.state_dict())
    with pytest.raises(StateError, match="not the state"):
        elsewhere.load_state_dict({})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.add("sprase", {}), "unknown kind of step 'sprase'"),
        (lambda m: m.add("sparse", {}, -1), "must not be negative"),
        (lambda m: m.add("sparse", {"x": 1}), "x has active weights"),
        (lambda m: m.add("sparse", {"0.weight": 201}), "200 weights; 201"),
        (lambda m: FlopsMeter(m.operations, samples_per_step=0), "samples_per_step"),
        (lambda m: FlopsMeter(m.operations, backend="gpu"), "backend='gpu'"),
    ],
)
def test_refuses_bad_numbers(call, message):
    with pytest.raises(ConfigurationError, match=message):
        call(FlopsMeter(operations()))

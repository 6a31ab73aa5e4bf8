"""AC/DC (Peste et al. 2021, https://arxiv.org/abs/2106.12379, Algorithm 1), phase by phase."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dst
from dst import methods
from dst.allocation import Uniform
from dst.errors import ConfigurationError
from dst.schedules import Alternating
from dst.topology.optimizer_state import per_weight_state
from tests.small import random_gradients


def phases(schedule, steps, final=0.1):
    return "".join("D" if schedule(step, steps, final) == 1 else "s" for step in range(steps))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Alternating(3, 2, 14), "DD" + "sssDDDsssDDD" + "ssssss"),
        (Alternating(3, 2, 15), "DD" + "sssDDDsssDDD" + "ssssss"),
        (Alternating(3, 2, 12), "DD" + "sssDDDsssD" + "ssssssss"),  # the last dense phase is cut short
        (Alternating(0.2, 0.1, 0.75), "DD" + "ssssDDDDssss" + "D" + "sssss"),
    ],
)
def test_phases_by_hand(schedule, expected):
    assert phases(schedule, 20) == expected


def test_the_authors_epochs():
    """100 epochs on ImageNet: dense for 10, then 5 and 5; here the last dense phase is no longer than the others."""
    method = methods.ac_dc(0.1)
    assert method.schedule is not None
    expected = "D" * 10 + ("s" * 5 + "D" * 5) * 7 + "s" * 20
    assert phases(method.schedule, 100) == expected


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_training_agrees_with_a_loop(scope):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    allocation = Uniform() if scope == "layer" else None
    method = methods.ac_dc(0.2, phase=3, start=2, stop=14, allocation=allocation)
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=20)
    expected, reference = "DD" + "sssDDDsssDDD" + "ssssss", "D"
    names = ["0.weight", "1.weight"]
    masks = {n: torch.ones_like(model.get_parameter(n), dtype=torch.bool) for n in names}
    for step, phase in enumerate(expected):
        random_gradients(model, step)
        weights = {n: model.get_parameter(n).detach().clone() for n in names}
        if phase != reference:
            if phase == "D":
                masks = {n: torch.ones_like(m) for n, m in masks.items()}
            elif scope == "layer":
                masks = {n: w.abs() > w.abs().flatten().kthvalue(w.numel() * 4 // 5).values for n, w in weights.items()}
            else:
                threshold = torch.cat([w.abs().flatten() for w in weights.values()]).kthvalue(400).values
                masks = {n: w.abs() > threshold for n, w in weights.items()}
        old = sparsifier.masks
        sparsifier.before_step()
        for n in names:
            assert torch.equal(sparsifier.masks[n], masks[n]), (step, n)
            changed = masks[n] ^ old[n]
            parameter = model.get_parameter(n)
            assert not parameter.detach()[changed].any()  # grown weights start at zero, without momentum
            assert torch.equal(parameter.detach()[~changed], weights[n][~changed])
            for _, value in per_weight_state(optimizer, parameter):
                assert not value[changed].any()
        optimizer.step()
        assert sparsifier.active == (500 if phase == "D" else 100)
        reference = phase
    assert sparsifier.step_counts == {
        "dense": 9,
        "sparse": 11,
        "dense_gradient": 0,
    }  # a phase begins after a backward pass
    work = sparsifier.work
    assert sum(work["dense"].values()) == 9 * 500
    assert sum(work["sparse"].values()) == 11 * 100


def test_csr_is_refused():
    with pytest.raises(ConfigurationError, match="changes the number of a layer's connections"):
        methods.ac_dc(0.1, backend="csr")

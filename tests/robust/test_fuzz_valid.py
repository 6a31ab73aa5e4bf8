"""All settings within their documented ranges are accepted and train with exact budgets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dst
from dst import Method, methods
from dst.allocation import ER, ERK, Global, PerLayer, Uniform
from dst.init import Magnitude, Random, Snip
from dst.schedules import Constant, Cosine, InversePower, Linear
from dst.scores import Gradient, Momentum, SignedMagnitude
from dst.scores import Magnitude as MagnitudeScore
from dst.scores import Random as RandomScore
from dst.types import resolve_steps
from tests.small import OPTIMIZERS, Small, backward

STEPS = 6

densities = st.floats(0.1, 1.0) | st.sampled_from([0.1, 0.25, 1.0])
updates_every = st.integers(1, STEPS) | st.floats(0.01, 1.0)
durations = st.integers(0, STEPS + 1) | st.floats(0.0, 1.0)
scores = st.sampled_from([MagnitudeScore(), SignedMagnitude(), Gradient(), Momentum(0.5), RandomScore()])
inits = st.sampled_from([Random(), Magnitude(), Snip()])
fractions = st.builds(
    lambda kind, initial: kind(initial), st.sampled_from([Constant, Cosine, Linear, InversePower]), st.floats(0, 1)
)
SELECTIONS: list[dict[str, Any]] = [
    {},
    {"include": ["hidden*", "head.weight"]},
    {"include": [nn.Linear]},
    {"include": ["*"], "exclude": [nn.Conv2d]},
    {"exclude": ["conv"]},
    {"exclude": ["attention.in_proj_weight[[]k[]]", nn.Conv2d]},
    {"include": ["attention.in_proj_weight"]},
]


def allocations(density: float) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.just(Uniform()),
        st.builds(ERK, power=st.floats(0.1, 3.0)),
        st.just(ER()),
        st.just(Global()),
        st.just(PerLayer({"*": density})),
    )


@st.composite
def valid(draw: Callable[[Any], Any]) -> Method:
    density = draw(densities)
    allocation = draw(allocations(density))
    name = draw(st.sampled_from(["dense", "static", "sparse_from_scratch", "set_", "rigl", "rigl", "set_"]))
    if name == "dense":
        return methods.dense()
    if name == "static":
        init = draw(inits)
        made_at = draw(st.integers(0, STEPS - 1) | st.floats(0, 0.9))
        return methods.static(density, init=init, sparsify_at=made_at, allocation=allocation)
    if name == "sparse_from_scratch":
        return methods.sparse_from_scratch(density, allocation=allocation, rescale_init=draw(st.booleans()))
    return getattr(methods, name)(
        density,
        update_every=draw(updates_every),
        start=draw(durations),
        stop=draw(durations),
        fraction=draw(fractions),
        allocation=allocation,
        init=draw(inits),
        drop=draw(scores),
        grow=draw(scores),
        replace_step=draw(st.booleans()),
        regrow_dropped=draw(st.booleans()),
        rescale_init=draw(st.booleans()),
    )


@settings(max_examples=50, deadline=None)
@given(valid(), st.sampled_from(SELECTIONS), st.sampled_from(sorted(OPTIMIZERS)), st.integers(0, 2**31))
def test_valid_settings_train_with_exact_budgets(
    method: Method, selection: dict[str, Any], optimizer: str, seed: int
) -> None:
    torch.manual_seed(0)
    model = Small()
    made = OPTIMIZERS[optimizer](model.parameters())
    sparsifier = dst.Sparsifier(model, made, method, total_steps=STEPS, seed=seed, **selection)
    total = sum(layer.weights for layer in sparsifier.layers)
    budget: list[int] | None = None
    fired = 0
    for step in range(STEPS):
        was_sparse = sparsifier.is_sparse
        backward(model, made, step)
        sparsifier.before_step()
        fired += was_sparse and method.clock.fires(step, STEPS)
        made.step()
        assert sparsifier.updates == fired
        counted = [int(layer.part(sparsifier.masks[layer.parameter]).sum()) for layer in sparsifier.layers]
        assert counted == [row["nonzero"] for row in sparsifier.layer_table()]
        for name, mask in sparsifier.masks.items():
            weight = model.get_parameter(name)
            assert weight[~mask].eq(0).all()
            assert weight.isfinite().all()
        if sparsifier.is_sparse:
            budget = budget or counted
            assert counted == budget
            assert min(counted) >= 1
    assert budget is not None
    assert resolve_steps(method.sparsify_at, STEPS) < STEPS
    # Rounded up once, over the network; in every layer, where its density is given.
    slack = len(budget) - 1 if isinstance(method.allocation, (Uniform, PerLayer)) else 0
    least = math.ceil(method.density * total - 1e-6)
    assert least <= sum(budget) <= least + slack, (least, budget)

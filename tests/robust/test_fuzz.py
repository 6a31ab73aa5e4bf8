"""Every accepted configuration trains with exact budgets; every other raises an error with a message."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dst
from dst import methods
from dst.allocation import ER, ERK, Global, PerLayer, Uniform
from dst.errors import ConfigurationError
from dst.init import Magnitude, Random, Snip
from dst.schedules import Constant, Cosine, InversePower, Linear
from dst.scores import Gradient, Momentum, SignedMagnitude
from dst.scores import Magnitude as MagnitudeScore
from dst.scores import Random as RandomScore
from tests.small import OPTIMIZERS, Small, backward

STEPS = 3

densities = st.one_of(st.floats(-0.5, 1.5), st.floats(0, 0.05), st.sampled_from([1, 0, 1.0, 0.5]))
durations = st.one_of(st.integers(-1, 5), st.floats(-0.1, 1.1))
shares = st.one_of(st.floats(0, 1), st.floats(-1, 2))
scores = st.sampled_from([MagnitudeScore(), SignedMagnitude(), Gradient(), Momentum(0.5), RandomScore()])
inits = st.sampled_from([Random(), Magnitude(), Snip()])


@st.composite
def allocations(draw):
    kind = draw(st.sampled_from([Uniform, ER, ERK, Global, PerLayer]))
    if kind is Uniform:
        return Uniform(dense_first=draw(st.booleans()))
    if kind is ERK:
        return ERK(power=draw(st.floats(0.1, 3)))
    if kind is PerLayer:
        return PerLayer({"*": draw(densities)})
    return kind()


@st.composite
def made_methods(draw):
    name = draw(st.sampled_from(["dense", "static", "sparse_from_scratch", "set_", "rigl"]))
    arguments = {"density": draw(densities)}
    if name != "dense" and draw(st.booleans()):
        arguments["allocation"] = draw(allocations())
    if name == "static":
        arguments |= {"init": draw(inits), "sparsify_at": draw(durations)}
    if name == "sparse_from_scratch":
        arguments["rescale_init"] = draw(st.booleans())
    if name in ("set_", "rigl"):
        fraction = draw(st.sampled_from([Constant, Cosine, Linear, InversePower]))
        arguments |= {
            "update_every": draw(durations),
            "start": draw(durations),
            "stop": draw(durations),
            "fraction": fraction(draw(shares)),
            "init": draw(inits),
            "drop": draw(scores),
            "grow": draw(scores),
            **{knob: draw(st.booleans()) for knob in ("replace_step", "regrow_dropped", "rescale_init")},
        }
    return getattr(methods, name)(**arguments)


selectors = st.lists(
    st.sampled_from(
        ["conv*", "*.weight", "hidden.weight", "head", nn.Linear, nn.MultiheadAttention, "nothing", "*[q]"]
    ),
    max_size=2,
)


@settings(max_examples=150, deadline=None)
@given(
    st.data(),
    st.one_of(st.none(), selectors),
    st.one_of(st.none(), selectors),
    st.sampled_from(sorted(OPTIMIZERS)),
    st.integers(0, 2**31),
)
def test_what_is_accepted_trains_with_exact_budgets(data, include, exclude, optimizer, seed):
    torch.manual_seed(0)
    model = Small()
    try:
        method = data.draw(made_methods())
        made = OPTIMIZERS[optimizer](model.parameters())
        sparsifier = dst.Sparsifier(model, made, method, total_steps=STEPS, include=include, exclude=exclude, seed=seed)
    except ConfigurationError:
        return
    total = sum(layer.weights for layer in sparsifier.layers)
    budget = None
    for step in range(STEPS):
        backward(model, made, step)
        sparsifier.before_step()
        made.step()
        counted = {n: int(m.sum()) for n, m in sparsifier.masks.items()}
        by_table: dict[str, int] = dict.fromkeys(counted, 0)
        for layer, row in zip(sparsifier.layers, sparsifier.layer_table(), strict=True):
            by_table[layer.parameter] += row["nonzero"]
        outside = {
            n: m.numel() - sum(x.weights for x in sparsifier.layers if x.parameter == n)
            for n, m in sparsifier.masks.items()
        }
        assert counted == {n: by_table[n] + outside[n] for n in counted}
        for name, mask in sparsifier.masks.items():
            assert model.get_parameter(name)[~mask].eq(0).all()
        if sparsifier.is_sparse:
            if budget is None:
                budget = by_table
            assert by_table == budget  # nnz is what it was, layer by layer, for ever
            first = sparsifier.layers[0].weights if getattr(method.allocation, "dense_first", False) else 0
            assert abs(sparsifier.active - method.density * total) <= len(sparsifier.layers) + first
    assert sparsifier.step == STEPS
    assert sparsifier.is_sparse

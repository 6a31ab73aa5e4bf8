"""Methods: compositions that are checked when they are made."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import io
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import dst
from dst import Method, methods
from dst.allocation import ER, ERK, Global, PerLayer, Uniform
from dst.errors import ConfigurationError
from dst.init import FromFile, Grasp, Magnitude, Random, Snip, Synflow
from dst.method import LotterySchedule, spec_differences
from dst.schedules import Constant, Cosine, Every, Never
from dst.scores import Gradient, SignedMagnitude
from dst.scores import Magnitude as MagnitudeScore
from dst.scores import Random as RandomScore
from tests.methods_list import METHODS


@pytest.mark.parametrize("name", methods.__all__)
def test_every_method_takes_its_density_first(name):
    method = getattr(methods, name)(0.25)
    assert isinstance(method, Method)
    assert method.density == (1.0 if name in ("dense", "small_dense") else 0.25)
    assert method.target_density == (1.0 if name == "dense" else 0.25)
    assert method.name == name.rstrip("_")
    assert method == getattr(methods, name)(density=0.25)


@pytest.mark.parametrize("name", methods.__all__)
def test_help_describes_every_parameter_of_a_method_once(name):
    method = getattr(methods, name)
    described = re.findall(r"^    (\w+): \S", inspect.getdoc(method).partition("\nArgs:\n")[2], re.MULTILINE)
    assert [parameter for parameter in described if parameter != "ConfigurationError"] == list(
        inspect.signature(method).parameters
    )


@pytest.mark.parametrize("name", methods.__all__)
def test_none_in_the_place_of_a_piece_is_the_default(name):
    method = getattr(methods, name)
    parameters = inspect.signature(method).parameters.values()
    pieces = [p.name for p in parameters if dataclasses.is_dataclass(p.default)]
    assert method(**dict.fromkeys(pieces)) == method()


def test_published_compositions():
    rigl = methods.rigl(0.2)
    assert (rigl.drop, rigl.grow, rigl.clock) == (MagnitudeScore(), Gradient(), Every(100, 0, 0.75))
    assert (rigl.fraction, rigl.allocation, rigl.init) == (Cosine(0.3), ERK(), Random())
    assert rigl.replace_step
    assert rigl.regrow_dropped
    assert rigl.sparsify_at == 0
    set_ = methods.set_(0.2)
    assert (set_.drop, set_.grow, set_.clock) == (SignedMagnitude(), RandomScore(), Every(100, 0, 1.0))
    assert (set_.fraction, set_.allocation, set_.init) == (Constant(0.3), ERK(), Random())
    assert not set_.replace_step
    static = methods.static(0.2)
    assert (static.init, static.sparsify_at, static.allocation) == (Magnitude(), 0.25, Global())
    assert isinstance(static.clock, Never)
    assert methods.static(0.2, init=Snip()).sparsify_at == 0
    assert methods.static(0.2, init=FromFile("x")).sparsify_at == 0
    assert methods.static(0.2, init=Magnitude(), sparsify_at=0).sparsify_at == 0
    scratch = methods.sparse_from_scratch(0.2)
    assert (scratch.init, scratch.allocation, scratch.rescale_init) == (Random(), ERK(), True)
    for make, init in ((methods.snip, Snip()), (methods.grasp, Grasp(200.0)), (methods.synflow, Synflow(100))):
        method = make(0.2)
        assert (method.init, method.allocation, method.sparsify_at, method.is_dynamic) == (init, Global(), 0, False)
        assert make(0.2, allocation=ER()).allocation == ER()
    lottery = methods.lottery_ticket_rewind(0.2)
    assert (lottery.lottery, lottery.allocation) == (LotterySchedule(0.2, 0), Global())


def test_every_setting_reaches_its_field():
    settings = {
        "update_every": 7,
        "start": 3,
        "stop": 0.5,
        "fraction": Constant(0.1),
        "allocation": ER(),
        "init": Magnitude(),
        "drop": Gradient(),
        "grow": SignedMagnitude(),
        "regrow_dropped": False,
        "rescale_init": True,
    }
    for make, replaces in ((methods.rigl, False), (methods.set_, True)):
        method = make(0.2, replace_step=replaces, **settings)
        assert method.clock == Every(7, 3, 0.5)
        assert method.replace_step is replaces
        for name in set(settings) - {"update_every", "start", "stop"}:
            assert getattr(method, name) == settings[name], name
    lottery = methods.lottery_ticket_rewind(0.2, prune_fraction=0.5, rewind_to=3, rewind="none", allocation=Uniform())
    assert (lottery.lottery, lottery.allocation) == (LotterySchedule(0.5, 3, "none"), Uniform())
    assert methods.sparse_from_scratch(0.2, rescale_init=False, allocation=ER()).allocation == ER()
    assert not methods.sparse_from_scratch(0.2, rescale_init=False).rescale_init


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: methods.rigl(0), r"density=0 must lie in \(0, 1\]"),
        (lambda: methods.rigl(-0.1), "density=-0.1"),
        (lambda: methods.rigl(1.1), "density=1.1"),
        (lambda: methods.rigl(math.nan), "density=nan"),
        (lambda: methods.rigl("0.1"), "density='0.1' is not a number"),
        (lambda: methods.rigl(True), "density=True is not a number"),
        (lambda: methods.rigl(backend="csrr"), "backend='csrr' is unknown; choose from masked"),
        (lambda: methods.rigl(update_every=0), "update_every=0"),
        (lambda: methods.rigl(stop=2.5), "stop=2.5"),
        (lambda: methods.static(sparsify_at=-1), "sparsify_at=-1"),
        (lambda: methods.lottery_ticket_rewind(prune_fraction=0.0), "prune_fraction=0.0"),
        (lambda: methods.lottery_ticket_rewind(prune_fraction=1.0), "prune_fraction=1.0"),
        (lambda: methods.lottery_ticket_rewind(rewind="lr"), "rewind='lr' is unknown; choose from weights, learning_r"),
        (lambda: methods.lottery_ticket_rewind(rewind_to=1.0), "rewind_to=1.0"),
        (lambda: methods.lottery_ticket_rewind(rewind_to=-1), "rewind_to=-1"),
        (lambda: Method("mine", 0.1, clock=Every(), grow=Gradient()), "mine: .*needs a drop score"),
        (lambda: Method("mine", 0.1, clock=Every(), drop=Gradient()), "mine: .*needs a grow score"),
        (lambda: Method("mine", 0.1, rescale_init=True, sparsify_at=0.1), "mine: rescale_init"),
        (lambda: replace(methods.rigl(), lottery=LotterySchedule()), "rigl: lottery levels have fixed masks"),
    ],
)
def test_what_cannot_work_is_refused_by_name(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_methods_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        methods.rigl().density = 0.5


@pytest.mark.parametrize("name", METHODS)
def test_a_spec_is_plain_and_tells_methods_apart(name):
    spec = METHODS[name]().spec()
    buffer = io.BytesIO()
    torch.save(spec, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert spec_differences(loaded, METHODS[name]().spec()) == []
    others = [other for other in METHODS if other != name]
    assert all(spec_differences(loaded, METHODS[other]().spec()) for other in others)


def test_a_spec_names_public_paths():
    """Checkpoints store these paths, and YAML files name them: they do not follow a class to another module."""
    targets = set()

    def collect(value):
        if isinstance(value, dict):
            targets.update([value["_target_"]] if "_target_" in value else [])
            for inner in value.values():
                collect(inner)

    for method in [make() for make in METHODS.values()] + [getattr(methods, name)(0.5) for name in methods.__all__]:
        collect(method.spec())
    collect(methods.cht(temperature=0.5).spec())
    assert {"dst.method.Method", "dst.method.LotterySchedule", "dst.method.Narrow"} <= targets
    assert {"dst.relaxations.Movement", "dst.patterns.NM", "dst.scores.Soft", "dst.init.Random"} <= targets
    for target in targets:
        module, _, name = target.rpartition(".")
        assert module in ("dst.method", *(f"dst.{piece}" for piece in dst.__all__)), target
        assert getattr(importlib.import_module(module), name).__name__ == name


def test_a_spec_of_numbers_from_numpy_is_plain_too():
    (density,) = np.linspace(0.1, 0.2, 1)
    buffer = io.BytesIO()
    torch.save(methods.rigl(density, fraction=Constant(density), start=density).spec(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert spec_differences(loaded, methods.rigl(0.1, fraction=Constant(0.1), start=0.1).spec()) == []


def test_differences_are_named():
    here = methods.rigl(0.2, update_every=50, fraction=Constant(0.1)).spec()
    lines = spec_differences(methods.rigl(0.1).spec(), here)
    assert lines == [
        "density: 0.1 in the checkpoint, 0.2 here",
        "clock.every: 100 in the checkpoint, 50 here",
        "fraction: Cosine in the checkpoint, Constant here",
    ]
    table = methods.rigl(0.1, allocation=PerLayer({"a": 0.1, "b": 0.2})).spec()
    other = methods.rigl(0.1, allocation=PerLayer({"a": 0.1, "b": 0.3})).spec()
    assert spec_differences(table, other) == ["allocation.densities_by_name.b: 0.2 in the checkpoint, 0.3 here"]


def test_the_path_of_a_mask_file_is_no_part_of_the_method():
    here, there = (methods.static(0.1, init=FromFile(p)).spec() for p in ("a", "b"))
    assert spec_differences(here, there) == []
    assert spec_differences(here, methods.static(0.1, init=Snip()).spec())


def test_prepare_returns_the_model_for_the_masked_backend():
    model = torch.nn.Linear(2, 2)
    assert dst.prepare(model, methods.rigl()) is model

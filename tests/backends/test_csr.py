"""The csr backend against the masked one: the same topology, weights and optimizer state."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dst
from dst import methods, scores
from dst.allocation import Uniform
from dst.errors import ConfigurationError, StateError
from dst.init import FromFile, Snip
from dst.nn import SparseLinear
from dst.schedules import Constant, Every
from tests.backends.runs import (
    CLAIMED,
    DENSITY,
    EVERY,
    OPTIMIZERS,
    STEPS,
    Mixed,
    Net,
    Run,
    assert_same,
    batch,
    saved,
    sparse_layers,
)
from tests.sampling import rotated

# -- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "optimizer"), rotated(CLAIMED, OPTIMIZERS))
def test_same_topology_and_weights_as_masked(name, optimizer):
    masked, csr = (Run(CLAIMED[name](backend), optimizer) for backend in ("masked", "csr"))
    assert bool(sparse_layers(csr.model)) == (name != "dense")
    assert_same(masked, csr)
    for _ in range(4):
        before = csr.sparsifier.masks
        masked.train(STEPS // 4)
        csr.train(STEPS // 4)
        assert_same(masked, csr)
    a, b = masked.sparsifier, csr.sparsifier
    assert a.updates == b.updates == (0 if not a.method.is_dynamic else STEPS // EVERY)
    assert any((before[n] != m).any() for n, m in b.masks.items()) == a.method.is_dynamic
    assert a.layer_table() == b.layer_table()
    assert a.step_counts == b.step_counts
    assert a.last_update == b.last_update
    assert a.exploration_rate == b.exploration_rate
    assert a.density == b.density


@pytest.mark.parametrize(("name", "optimizer"), rotated(["rigl", "rigl_with_step", "set"], OPTIMIZERS))
def test_accumulated_gradients(name, optimizer):
    masked, csr = (Run(CLAIMED[name](backend), optimizer).train(STEPS // 2, 4) for backend in ("masked", "csr"))
    assert_same(masked, csr)


@pytest.mark.parametrize(
    ("name", "optimizer"),
    rotated(["rigl", "rigl_with_step", "rigl_rescaled", "rigl_by_magnitude", "set"], OPTIMIZERS),
)
def test_mixed_models(name, optimizer):
    masked, csr = (Run(CLAIMED[name](backend), optimizer, net=Mixed) for backend in ("masked", "csr"))
    assert {"attention.in_proj", "hidden"} <= set(sparse_layers(csr.model))
    assert "tied_a" not in sparse_layers(csr.model)
    assert_same(masked, csr)
    masked.train(STEPS // 2)
    csr.train(STEPS // 2)
    assert_same(masked, csr)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_train(dtype):
    run = Run(CLAIMED["rigl_with_step"]("csr"), dtype=dtype).train(10)
    assert run.sparsifier.updates == 5
    assert all(torch.isfinite(w).all() for w in run.weights().values())
    assert run.model.first.values.dtype == dtype


def test_two_optimizers():
    def build(backend):
        run = Run(CLAIMED["rigl"](backend))
        hidden = [*run.model.first.parameters(), *run.model.second.parameters()]
        run.optimizers = [
            torch.optim.SGD(hidden, 0.05, momentum=0.9),
            torch.optim.AdamW(run.model.head.parameters(), 0.01),
        ]
        run.sparsifier.finalize()
        run.sparsifier = dst.Sparsifier(run.model, run.optimizers, run.sparsifier.method, total_steps=STEPS)
        for step in range(12):
            for optimizer in run.optimizers:
                optimizer.zero_grad()
                x, y = batch(step)
                functional.cross_entropy(run.model(x), y).backward()
                run.sparsifier.before_step(optimizer)
                optimizer.step()
        return run

    assert_same(build("masked"), build("csr"))


def test_ties_of_dead_inputs_are_spread_and_not_in_the_first_rows():
    """Weights of a dead input have no gradient. If too few others are free, they are grown at random."""

    def grown(backend):
        torch.manual_seed(0)
        method = methods.rigl(0.3, update_every=1, fraction=Constant(0.9), regrow_dropped=False, backend=backend)
        model = dst.prepare(nn.Linear(20, 60, dtype=torch.float64), method)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=10)
        x = torch.randn(4, 20, dtype=torch.float64)
        x[:, 2:] = 0
        model(x).square().sum().backward()
        before = sparsifier.masks["weight"]
        sparsifier.before_step()
        return sparsifier.masks["weight"] & ~before

    masked, csr = grown("masked"), grown("csr")
    assert torch.equal(masked, csr)
    assert csr[:, 2:].any(1).float().mean() > 0.9


@pytest.mark.parametrize("name", ["rigl_with_step", "set"])
def test_bits_do_not_depend_on_the_number_of_threads(name):
    """Nor on their scheduling: two runs with two threads agree too."""

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(0)
            method = methods.rigl(
                0.1, update_every=2, stop=1.0, replace_step=False, allocation=Uniform(), backend="csr"
            )
            if name == "set":
                method = methods.set_(0.1, update_every=2, allocation=Uniform(), backend="csr")
            model = nn.Sequential(nn.Linear(300, 257), nn.ReLU(), nn.Linear(257, 129), nn.ReLU(), nn.Linear(129, 10))
            model = dst.prepare(model, method)
            optimizer = torch.optim.AdamW(model.parameters(), 0.01)
            sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=44)
            generator = torch.Generator().manual_seed(5)
            for _ in range(6):
                x, y = torch.randn(70, 300, generator=generator), torch.randint(10, (70,), generator=generator)
                optimizer.zero_grad()
                functional.cross_entropy(model(x), y).backward()
                sparsifier.before_step()
                optimizer.step()
            assert sparsifier.updates == 3
            return model.state_dict()
        finally:
            torch.set_num_threads(before)

    one, two, again = run(1), run(2), run(2)
    for key, tensor in one.items():
        assert torch.equal(tensor, two[key]), key
        assert torch.equal(two[key], again[key]), key


# -- averages, gradients that are missing or not finite --------------------------------------------------------------


def test_an_averaged_model_follows_the_topology():
    def build(backend):
        run = Run(CLAIMED["rigl"](backend))
        average = torch.optim.swa_utils.AveragedModel(run.model)
        run.sparsifier.track_average(average)
        for _ in range(10):
            run.train(1)
            average.update_parameters(run.model)
        run.average = average
        return run

    masked, csr = build("masked"), build("csr")
    for name in ("first", "second"):
        module, dense = getattr(csr.average.module, name), getattr(masked.average.module, name)
        assert torch.equal(module.mask(), csr.sparsifier.masks[f"{name}.weight"])
        torch.testing.assert_close(module.dense_weight(), dense.weight, rtol=0, atol=1e-9)
    with pytest.raises(ConfigurationError, match=r"first\.weight.*after dst\.prepare"):
        csr.sparsifier.track_average(Net())


def test_a_gradient_that_is_not_finite_skips_the_update():
    run = Run(methods.rigl(DENSITY, update_every=1, backend="csr"))
    masks = run.sparsifier.masks
    run.optimizer.zero_grad()
    x, y = batch(0)
    x[0, 1] = float("inf")
    functional.cross_entropy(run.model(x), y).backward()
    run.sparsifier.before_step()
    assert (run.sparsifier.updates, run.sparsifier.skipped) == (0, 1)
    assert all(torch.equal(masks[n], m) for n, m in run.sparsifier.masks.items())


def test_an_attempt_without_a_step_leaves_nothing():
    """A step that a gradient scaler skipped is repeated, and grows by its own gradient alone."""
    masked, csr = (Run(CLAIMED["rigl"](b)).train(3) for b in ("masked", "csr"))
    for run in (masked, csr):
        run.optimizer.zero_grad()
        x, y = batch(77)
        functional.cross_entropy(run.model(x), y).backward()
        if run is csr:
            assert len(run.model.first.collected) == 0
    for run in (masked, csr):
        run.train(1)  # announces an update at the next step
        run.optimizer.zero_grad()
        functional.cross_entropy(run.model(batch(88)[0]), batch(88)[1]).backward()
        run.train(1)  # zero_grad discards what was collected
    assert_same(masked, csr)


def test_a_layer_without_gradient_keeps_its_connections(caplog):
    run = Run(methods.rigl(DENSITY, update_every=1, backend="csr"))
    masks = run.sparsifier.masks
    run.model.second(torch.randn(3, 40, dtype=torch.float64)).sum().backward()
    run.sparsifier.before_step()
    assert torch.equal(run.sparsifier.masks["first.weight"], masks["first.weight"])
    assert not torch.equal(run.sparsifier.masks["second.weight"], masks["second.weight"])
    assert "first.weight had no gradient" in caplog.text


# -- memory ---------------------------------------------------------------------------------------------------------


def large_tensors(size: int) -> dict[int, str]:
    """All tensors of at least ``size`` entries in memory, by id."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    return {id(t): f"{type(t).__name__} {tuple(t.shape)}" for t in tensors if t.numel() >= size}


def test_nothing_dense_is_held_between_updates():
    method = methods.rigl(0.02, update_every=3, stop=1.0, backend="csr")
    model = dst.prepare(nn.Sequential(nn.Linear(307, 311), nn.ReLU(), nn.Linear(311, 3)), method)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=9)
    weights = 307 * 311
    known = large_tensors(weights // 2)  # of other tests
    for step in range(9):
        optimizer.zero_grad()
        model(torch.randn(8, 307)).square().sum().backward()
        assert len(model[0].collected) == (step % 3 == 0)
        sparsifier.before_step()
        optimizer.step()
        assert len(model[0].collected) == 0
        assert [kind for key, kind in large_tensors(weights // 2).items() if key not in known] == []
    assert sparsifier.updates == 3
    saved = [sparsifier.state_dict(), optimizer.state_dict(), model.state_dict()]
    held: list[Tensor] = []

    def collect(value):
        if isinstance(value, Tensor):
            held.append(value)
        elif isinstance(value, dict):
            for v in value.values():
                collect(v)

    collect(dict(enumerate(saved)))
    assert max(t.numel() for t in held) < weights // 5


# -- resume and conversion -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "optimizer", "order"),
    rotated(
        [n for n in CLAIMED if n != "dense"],
        OPTIMIZERS,
        [("model", "optimizer", "dst"), ("dst", "optimizer", "model"), ("optimizer", "dst", "model")],
    ),
)
def test_a_resume_is_bitwise_exact(name, optimizer, order):
    whole = Run(CLAIMED[name]("csr"), optimizer).train(7)
    state = saved(whole)
    whole.train(8)
    again = Run(CLAIMED[name]("csr"), optimizer)
    parts = {"model": again.model, "optimizer": again.optimizer, "dst": again.sparsifier}
    for part in order:
        parts[part].load_state_dict(state[part])
    again.train(8)
    assert_same(whole, again, tolerance=0)
    assert whole.sparsifier.exploration_rate == again.sparsifier.exploration_rate


def test_a_resume_in_the_middle_of_an_accumulated_step():
    def half_step(run: Run, half: int) -> None:
        x, y = (t.chunk(2)[half] for t in batch(run.sparsifier.step))
        functional.cross_entropy(run.model(x), y).backward()

    method = CLAIMED["rigl"]("csr")
    whole = Run(method).train(6)
    whole.optimizer.zero_grad()
    half_step(whole, 0)
    state = saved(whole)
    gradients = [p.grad.clone() for p in whole.model.parameters()]
    again = Run(method)
    again.model.load_state_dict(state["model"])
    again.optimizer.load_state_dict(state["optimizer"])
    again.sparsifier.load_state_dict(state["dst"])
    for parameter, gradient in zip(again.model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    for run in (whole, again):
        half_step(run, 1)
        assert len(run.model.first.collected) == 2
        run.sparsifier.before_step()
        run.optimizer.step()
    assert_same(whole, again, tolerance=0)


def test_weights_loaded_before_the_sparsifier_exists():
    method = CLAIMED["rigl_rescaled"]("csr")
    whole = Run(method).train(7)
    state = saved(whole)
    whole.train(8)
    again = Run(method)
    again.sparsifier.finalize()
    again.model.load_state_dict(state["model"])
    again.sparsifier = dst.Sparsifier(again.model, again.optimizer, method, total_steps=STEPS)
    again.optimizer.load_state_dict(state["optimizer"])
    again.sparsifier.load_state_dict(state["dst"])
    assert_same(whole, again.train(8), tolerance=0)


def test_states_of_another_budget_are_refused():
    run, other = Run(CLAIMED["rigl"]("csr")), Run(methods.rigl(0.3, update_every=EVERY, stop=1.0, backend="csr"))
    with pytest.raises(StateError, match=r"density: 0\.3 in the checkpoint, 0\.2 here"):
        run.sparsifier.load_state_dict(other.sparsifier.state_dict())
    state = run.sparsifier.state_dict()
    state["masks"]["first.weight"] = state["masks"]["first.weight"][:-1]
    with pytest.raises(StateError, match=r"195 connections in first\.weight.*prepared with 196"):
        run.sparsifier.load_state_dict(state)
    state["masks"]["first.weight"] = torch.tensor([3, 2])
    with pytest.raises(StateError, match=r"first\.weight"):
        run.sparsifier.load_state_dict(state)


# -- the first connections --------------------------------------------------------------------------------------------


def test_masks_from_a_file(tmp_path):
    source = Run(CLAIMED["rigl"]("masked")).train(9)
    dst.save_masks(source.sparsifier.masks, tmp_path / "masks.pt")
    density = source.sparsifier.density
    masked, csr = (
        Run(methods.static(density, init=FromFile(str(tmp_path / "masks.pt")), backend=b)) for b in ("masked", "csr")
    )
    assert all(torch.equal(m, csr.sparsifier.masks[n]) for n, m in source.sparsifier.masks.items())
    assert_same(masked.train(10), csr.train(10))
    dst.save_masks(csr.sparsifier.masks, tmp_path / "again.pt")
    assert dst.load_masks(tmp_path / "again.pt").keys() == source.sparsifier.masks.keys()
    with pytest.raises(StateError, match=r"lacks .*'conv\.weight'"):
        dst.prepare(Mixed(), csr.sparsifier.method)


def test_prepare_changes_nothing_else():
    torch.manual_seed(0)
    net = Net()
    net.second.bias.requires_grad_(False)
    calls = []
    net.first.register_forward_hook(lambda *_: calls.append("first"))
    before = copy.deepcopy(net.state_dict())
    assert dst.prepare(net, methods.rigl(0.1)) is net
    assert sparse_layers(net) == []
    method = methods.rigl(0.1, backend="csr")
    assert dst.prepare(net.eval(), method, exclude=["head*"]) is net
    assert sparse_layers(net) == ["first", "second"]
    assert not net.training
    assert not net.second.training
    assert not net.second.bias.requires_grad
    assert torch.equal(net.head.weight, before["head.weight"])
    assert torch.equal(net.first.bias, before["first.bias"])
    mask = net.first.mask()
    assert torch.equal(net.first.dense_weight(), before["first.weight"] * mask)
    net(torch.zeros(1, 30))
    assert calls == ["first"]
    patterns = [net.first.pattern, net.second.pattern]
    assert dst.prepare(net, method) is net  # prepared before
    assert [net.first.pattern, net.second.pattern] == patterns
    assert sparse_layers(net) == ["first", "second"]


def test_layers_on_the_meta_device_are_built_from_nothing():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(5000, 4000), nn.ReLU(), nn.Linear(4000, 3000))
    net = dst.prepare(net, methods.rigl(0.001, backend="csr"))
    assert all(p.device.type == "cpu" for p in net.parameters())
    assert net[0].values.abs().max() > 0
    assert net(torch.randn(2, 5000)).shape == (2, 3000)
    with torch.device("meta"):
        net = nn.Linear(50, 40)
    with pytest.raises(ConfigurationError, match="meta device"):
        dst.prepare(net, methods.static(0.1, sparsify_at=0, backend="csr"))


def test_a_shared_module_is_swapped_everywhere():
    shared = nn.Linear(8, 8)
    net = dst.prepare(nn.Sequential(shared, nn.ReLU(), shared), methods.rigl(0.2, backend="csr"))
    assert isinstance(net[0], SparseLinear)
    assert net[0] is net[2]


def test_encoder_layers_are_not_fused_in_evaluation():
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    method = methods.rigl(0.5, backend="csr")
    net = dst.prepare(net, method).eval()
    assert "linear1" in sparse_layers(net)
    dst.Sparsifier(net, torch.optim.SGD(net.parameters(), 0.1), method, total_steps=3)
    with torch.no_grad():
        assert net(torch.randn(1, 3, 8)).shape == (1, 3, 8)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: methods.static(0.1, backend="csr"), "dense until sparsify_at=0.25"),
        (lambda: methods.static(0.1, init=Snip(), backend="csr"), "Snip, needs the gradient of every weight"),
        (lambda: methods.lottery_ticket_rewind(0.1, backend="csr"), "first level is dense"),
        (lambda: methods.rigl(0.1, grow=scores.Momentum(), backend="csr"), "Momentum watches every weight"),
        (lambda: methods.rigl(0.1, drop=scores.Random(), backend="csr"), "Random is no drop score"),
        (lambda: methods.rigl(0.1, grow=scores.Magnitude(), backend="csr"), "not by Magnitude"),
        (lambda: methods.rigl(0.1, backend="cuda"), "choose from masked, csr, auto"),
    ],
)
def test_methods_that_need_inactive_weights_are_refused(make, reason):
    with pytest.raises(ConfigurationError, match=reason):
        make()


def test_a_users_score_is_accepted_if_it_declares_support():
    class Mine(scores.Magnitude):
        pass

    class Grown(scores.Random):
        def __call__(self, view):
            return view.weight

    assert methods.rigl(0.1, drop=Mine(), backend="csr").backend == "csr"
    with pytest.raises(ConfigurationError, match="not by Grown"):
        methods.rigl(0.1, grow=Grown(), backend="csr")


def build(model: nn.Module, method: dst.Method, **options) -> dst.Sparsifier:
    return dst.Sparsifier(model, torch.optim.SGD(model.parameters(), 0.1), method, total_steps=9, **options)


def test_a_model_that_does_not_fit_the_method_is_refused():
    rigl = methods.rigl(0.2, backend="csr")
    with pytest.raises(ConfigurationError, match=r"first\.weight has ordinary weights.*dst\.prepare"):
        build(Net(), rigl)
    with pytest.raises(ConfigurationError, match=r'first\.weight is a SparseLinear.*backend="csr"'):
        build(dst.prepare(Net(), rigl), methods.rigl(0.2))
    with pytest.raises(ConfigurationError, match=r"prepared with \d+ connections, and the method gives it 306"):
        build(dst.prepare(Net(), rigl), methods.rigl(0.3, backend="csr"))
    uniform = methods.rigl(0.2, allocation=Uniform(), backend="csr")
    with pytest.raises(ConfigurationError, match=r"head\.weight has ordinary weights"):
        build(dst.prepare(Net(), uniform, exclude=["head*"]), uniform)
    with pytest.raises(ConfigurationError, match=r"first\.weight stores only its non-zeros.*excluded"):
        build(dst.prepare(Net(), rigl), rigl, exclude=["first*"])
    with pytest.raises(ConfigurationError, match=r"prepare\(seed=1\), and this is seed=0"):
        build(dst.prepare(Net(), rigl, seed=1), rigl)
    assert build(dst.prepare(Net(), rigl, include=[nn.Linear]), rigl, include=[nn.Linear]).active


def test_another_seed_gives_another_topology_and_the_same_one_the_same():
    a, b, c = (Run(CLAIMED["rigl"]("csr"), seed=s).sparsifier.masks["first.weight"] for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_clock_and_masks_are_those_of_the_dense_names():
    run = Run(methods.rigl(DENSITY, update_every=1, backend="csr"))
    assert list(run.sparsifier.masks) == ["first.weight", "second.weight", "head.weight"]
    assert [row["name"] for row in run.sparsifier.layer_table()] == ["first.weight", "second.weight", "head.weight"]
    assert run.sparsifier.masks["first.weight"].shape == (40, 30)
    assert run.sparsifier.mask_of(run.model.first.values) is None
    assert run.sparsifier.needs_dense_gradient(run.model.first.values)
    assert isinstance(run.sparsifier.method.clock, Every)
    run.sparsifier.finalize()
    assert not run.model.first.is_collecting


def test_the_dry_run_tells_the_storage_of_each_weight():
    method = methods.rigl(DENSITY, backend="csr")
    rows = {row.name: row for row in dst.plan(Mixed(), methods.rigl(DENSITY, allocation=Uniform(), backend="csr")).rows}
    assert {name: (row.storage, row.note) for name, row in rows.items()} == {
        "hidden.weight": ("csr", ""),
        "head.weight": ("csr", ""),
        "tied_a.weight": ("masked", "tied weights"),
        "conv.weight": ("csr", ""),
        **{f"attention.in_proj_weight[{p}]": ("csr", "") for p in "qkv"},
        "attention.out_proj.weight": ("csr", ""),
    }
    assert {row.storage for row in dst.plan(Mixed(), methods.rigl(0.1, allocation=Uniform())).rows} == {"masked"}
    assert "storage" in str(dst.plan(Mixed(), method))
    rows = {row.name: row for row in dst.plan(Net(), methods.rigl(0.5, backend="csr")).rows}
    assert (rows["head.weight"].storage, rows["head.weight"].note) == ("dense", "stays dense")
    prepared = dst.prepare(Net(), method)
    assert {row.storage for row in dst.plan(prepared, method).rows} == {"csr"}

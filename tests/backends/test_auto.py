"""``backend="auto"`` chooses masked or csr for each layer, here by invented times."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dst
from dst import methods
from dst.allocation import Global, Uniform
from dst.backends import auto, timing
from dst.backends.auto import Chooser
from dst.backends.timing import Case, Timing
from dst.errors import ConfigurationError, StateError
from dst.init import Magnitude, Snip
from dst.lightning import SparseTraining
from dst.nn import FeatureMajorLinear, SparseConv2d, SparseLinear
from tests.backends.runs import Mixed, Net, batch, sparse_layers


@pytest.fixture
def times(monkeypatch):
    """Puts a function from case to ratio in the place of the measurement; returns the cases that were asked for."""

    def pretend(ratio: Callable[[Case], float]) -> list[Case]:
        cases: list[Case] = []

        def measure(case: Case) -> Timing:
            cases.append(case)
            return Timing(ratio(case), 1.0)

        monkeypatch.setattr(timing, "measure", measure)
        return cases

    return pretend


def rigl(**options) -> dst.Method:
    return methods.rigl(0.2, **{"update_every": 2, "stop": 1.0, "allocation": Uniform(), "backend": "auto"} | options)


def train(model: nn.Module, method: dst.Method, steps: int, state: dict | None = None) -> dst.Sparsifier:
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=44)
    if state is not None:
        optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        sparsifier.load_state_dict(state["dst"])
    for step in range(sparsifier.step, sparsifier.step + steps):
        optimizer.zero_grad()
        x, y = batch(step)
        nn.functional.cross_entropy(model(x), y).backward()
        sparsifier.before_step()
        optimizer.step()
    sparsifier.saved = copy.deepcopy(  # type: ignore[attr-defined]
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "dst": sparsifier.state_dict()}
    )
    return sparsifier


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().double()


def test_layers_that_are_faster_sparse_become_sparse(times, capsys):
    cases = times(lambda case: 3.14 if case.outputs == 25 else 0.5)
    model = dst.prepare(net(), rigl(), batch_size=32)
    assert sparse_layers(model) == ["second"]
    assert Case(nn.Linear, 40, 25, 200, 32, torch.float64) in cases
    assert len(cases) == 3
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "backend=auto: first.weight masked (0.5 × masked speed, measured on 32 rows)",
        "backend=auto: second.weight csr (3.1 × masked speed, measured on 32 rows)",
        "backend=auto: head.weight masked (0.5 × masked speed, measured on 32 rows)",
    ]
    # What is decided stays, whatever times are now.
    times(lambda case: 9.0)
    assert sparse_layers(dst.prepare(model, rigl())) == ["second"]
    assert capsys.readouterr().err == ""


def test_a_tie_stays_masked_and_is_said_in_the_log_where_there_is_one(times, caplog, capsys):
    times(lambda case: 1.0)
    caplog.set_level(logging.INFO, logger="dst.backends.auto")
    model = dst.prepare(net(), rigl())
    assert sparse_layers(model) == []
    assert [r.message.split(" (")[0] for r in caplog.records] == [
        f"backend=auto: {name}.weight masked" for name in ("first", "second", "head")
    ]
    assert capsys.readouterr().err == ""
    times(lambda case: 9.0)
    assert sparse_layers(dst.prepare(model, rigl())) == []


def test_layers_are_measured_on_the_shapes_that_they_see(times):
    cases = times(lambda case: 2.0)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, stride=2, padding=1), nn.Dropout(), nn.Conv2d(8, 8, 1), nn.Flatten(2), nn.Linear(20, 12)
    ).train()
    state = torch.get_rng_state()
    dst.prepare(model, rigl(), example=torch.zeros(5, 2, 8, 10))
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert model[1].training
    assert [(c.kind, c.batch_size, c.image) for c in cases] == [
        (nn.Conv2d, 5, (8, 10)),
        (nn.Conv2d, 5, (4, 5)),
        (nn.Linear, 40, None),
    ]
    assert cases[0].geometry == ((3, 3), (2, 2), (1, 1), (1, 1))
    with pytest.raises(ConfigurationError, match="cannot be called with the example"):
        dst.prepare(nn.Sequential(nn.Linear(4, 3)), rigl(), example=torch.zeros(5, 7))


def test_equal_layers_are_measured_once(times):
    cases = times(lambda case: 2.0)
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(4)), nn.Linear(20, 5))
    dst.prepare(model, rigl())
    assert [(c.inputs, c.outputs) for c in cases] == [(20, 20), (20, 5)]
    assert all(c.batch_size == timing.BATCH_SIZE for c in cases)


@pytest.mark.parametrize("fast", [(), (25,), (40, 4), (40, 25, 4)])
def test_whatever_is_chosen_the_training_is_that_of_masks(times, fast):
    times(lambda case: 2.0 if case.outputs in fast else 0.5)
    model, reference = dst.prepare(net(), rigl()), net()
    assert len(sparse_layers(model)) == len(fast)
    a, b = train(model, rigl(), 20), train(reference, rigl(backend="masked"), 20)
    assert a.updates == b.updates == 10
    assert a.layer_table() == b.layer_table()
    assert all(torch.equal(mask, a.masks[name]) for name, mask in b.masks.items())
    weights = dst.dense_state_dict(model)
    for name, weight in reference.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-9)


def test_methods_that_need_inactive_weights_stay_masked_and_train(times, capsys):
    times(lambda case: 9.0)
    for method, reason in (
        (methods.static(0.2, backend="auto"), "dense until sparsify_at=0.25"),
        (methods.rigl(0.2, init=Snip(), backend="auto"), "Snip, needs the gradient of every weight"),
    ):
        model = dst.prepare(net(), method)
        assert sparse_layers(model) == []
        assert reason in capsys.readouterr().err
        assert reason in {row.note for row in dst.plan(model, method).rows}.pop()
        assert train(model, method, 3).step == 3


def test_a_resume_keeps_what_was_chosen_whatever_times_are_now(times):
    times(lambda case: 2.0 if case.outputs == 25 else 0.5)
    model = dst.prepare(net(), rigl())
    whole = train(model, rigl(), 7)
    saved = whole.saved
    whole_end = train(copy.deepcopy(model), rigl(), 6, saved)
    cases = times(lambda case: 0.5 if case.outputs == 25 else 2.0)
    again = dst.prepare(net(), rigl(), state=saved["dst"])
    assert cases == []
    assert sparse_layers(again) == ["second"]
    again.load_state_dict(saved["model"])
    resumed = train(again, rigl(), 6, saved)
    for name, tensor in whole_end.saved["model"].items():
        assert torch.equal(tensor, resumed.saved["model"][name]), name
    assert all(torch.equal(mask, resumed.masks[name]) for name, mask in whole_end.masks.items())
    with pytest.raises(StateError, match=r"no mask of first\.weight"):
        dst.prepare(net(), rigl(), state={"masks": {}})


def test_a_layer_that_saves_next_to_nothing_stays_masked():
    layer = dst.topology.layers.find_layers(nn.Linear(3, 4))[0][0]
    small, large = (Chooser(measure=lambda case, t=t: Timing(2 * t, t)) for t in (9e-5, 2e-4))
    note = "2 × masked speed, measured on 128 rows"
    assert small([layer], nn.Linear(3, 4), 2) == ("masked", f"{note}, saving less than 0.1 ms")
    assert large([layer], nn.Linear(3, 4), 2) == ("csr", note)


def test_the_first_process_decides(monkeypatch):
    monkeypatch.setattr(auto, "rank", lambda group: 1)
    monkeypatch.setattr(auto, "from_first", lambda values, group: [5.0, 1.0])
    chooser = Chooser(measure=lambda case: pytest.fail("measured on the second process"))
    layer = dst.topology.layers.find_layers(nn.Linear(3, 4))[0][0]
    assert chooser([layer], nn.Linear(3, 4), 2) == ("csr", "5 × masked speed, measured on 128 rows")


def test_the_plan_shows_what_was_measured_and_changes_nothing(times):
    cases = times(lambda case: 2.5 if case.kind is nn.Conv2d or case.inputs == 24 else 0.25)
    with torch.device("meta"):
        model = nn.ModuleDict({"mixed": Mixed(), "point": nn.Conv2d(8, 16, 1)})
    rows = {row.name: (row.storage, row.note) for row in dst.plan(model, rigl(), batch_size=7).rows}
    assert rows["point.weight"] == ("csr", "2.5 × masked speed, measured on 7 images of 16×16")
    assert rows["mixed.head.weight"] == ("csr", "2.5 × masked speed, measured on 7 rows")
    assert rows["mixed.hidden.weight"] == ("masked", "0.25 × masked speed, measured on 7 rows")
    assert rows["mixed.conv.weight"][0] == "csr"
    assert rows["mixed.tied_a.weight"][0] == "masked"
    assert len(cases) == 5
    assert sparse_layers(model) == []
    scored = methods.rigl(0.2, init=Magnitude(), allocation=Global(), backend="auto")
    assert {r.storage for r in dst.plan(net(), scored).rows} == {"auto"}
    prepared = dst.prepare(net(), rigl(), batch_size=7)
    times(lambda case: 9.0)
    assert [(r.name, r.storage) for r in dst.plan(prepared, rigl()).rows] == [
        ("first.weight", "masked"),
        ("second.weight", "masked"),
        ("head.weight", "masked"),
    ]


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_real_measurement_times_both_and_leaves_no_trace(kind, dtype, monkeypatch):
    monkeypatch.setattr(timing, "_SWEEP", 16)
    seen = []
    step = timing._Step.__call__

    def spy(self, x, gradient):
        seen.append((type(self._module), tuple(x.shape), x.dtype, getattr(self._module, "nnz", None)))
        return step(self, x, gradient)

    monkeypatch.setattr(timing._Step, "__call__", spy)
    state = torch.random.get_rng_state()
    geometry = ((3, 3), (2, 1), (1, 0), (1, 1)) if kind is nn.Conv2d else None
    image = (9, 8) if kind is nn.Conv2d else None
    found = timing.measure(Case(kind, 12, 10, 17, 5, dtype, image, geometry))
    assert torch.equal(state, torch.random.get_rng_state())
    assert found.masked > 0
    assert found.sparse > 0
    shape = (5, 12) if kind is nn.Linear else (5, 12, 9, 8)
    sparse = SparseLinear if kind is nn.Linear else SparseConv2d
    assert set(seen) == {(kind, shape, dtype, None), (sparse, shape, dtype, 17)}


def test_layers_larger_than_can_be_held_are_measured_in_part(monkeypatch):
    monkeypatch.setattr(timing, "_SWEEP", 16)
    monkeypatch.setattr(timing, "_WEIGHTS", 300)
    seen = set()

    def spy(self, x, gradient):
        seen.add((*x.shape, *gradient.shape, getattr(self._module, "nnz", None)))
        return 1.0

    monkeypatch.setattr(timing._Step, "__call__", spy)
    assert timing.measure(Case(nn.Linear, 100, 1200, 5000, 2, torch.float32)).ratio == 1
    assert seen == {(2, 5, 2, 60, None), (2, 5, 2, 60, 12)}


# -- Lightning ------------------------------------------------------------------------------------------------------


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)


class Data(lightning.LightningDataModule):
    batch_size = 16

    def train_dataloader(self):
        parts = [batch(i) for i in range(6)]
        return DataLoader(TensorDataset(*(torch.cat(p) for p in zip(*parts, strict=True))), self.batch_size)


def fit(epochs: int, ckpt=None, others=()) -> tuple[lightning.Trainer, Module, dst.Sparsifier]:
    sparse = SparseTraining(rigl(), total_steps=12)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[sparse, *others],
    )
    module = Module()
    trainer.fit(module, datamodule=Data(), ckpt_path=ckpt, weights_only=True)
    assert sparse.sparsifier is not None
    return trainer, module, sparse.sparsifier


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("before", [(25,), (40, 4), ()])
def test_a_fit_resumed_from_a_checkpoint_keeps_its_layers(times, before, tmp_path):
    cases = times(lambda case: 2.0 if case.outputs in before else 0.5)
    trainer, module, _ = fit(1)
    assert len(sparse_layers(module)) == len(before)
    assert {case.batch_size for case in cases} == {16}
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    _, whole, a = fit(2)
    times(lambda case: 0.5 if case.outputs in before else 2.0)
    _, resumed, b = fit(2, tmp_path / "a.ckpt")
    assert sparse_layers(resumed) == sparse_layers(whole)
    assert a.updates == b.updates > 2
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert not resumed._load_state_dict_pre_hooks


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_averaged_weights_follow_what_is_resumed(times, tmp_path):
    times(lambda case: 2.0 if case.outputs == 25 else 0.5)
    trainer, *_ = fit(1, others=[EMAWeightAveraging(decay=0.5)])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    times(lambda case: 0.5 if case.outputs == 25 else 2.0)
    _, resumed, sparsifier = fit(2, tmp_path / "a.ckpt", others=[EMAWeightAveraging(decay=0.5)])
    assert sparse_layers(resumed) == ["net.second"]
    assert sparsifier.updates > 2
    masks = sparsifier.masks
    assert torch.equal(resumed.net.second.mask(), masks["net.second.weight"])
    assert not resumed.net.first.weight[~masks["net.first.weight"]].any()


def test_a_trainer_elsewhere_stays_masked(times, monkeypatch, capsys):
    times(lambda case: 9.0)
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    monkeypatch.setattr(type(trainer.strategy), "root_device", torch.device("meta"))
    module = Module()
    SparseTraining(rigl()).setup(trainer, module, "fit")
    assert sparse_layers(module) == []
    assert "all layers masked" in capsys.readouterr().err


def test_dense_layers_next_to_sparse_ones_stay_as_they_are(times):
    times(lambda case: 2.0 if case.outputs == 25 else 0.5)
    assert type(dst.prepare(net(), rigl()).head) is nn.Linear
    # A model that was pickled when they were swapped becomes an ordinary one.
    old = net()
    old.head = FeatureMajorLinear.from_linear(old.head)
    assert type(dst.prepare(old, rigl()).head) is nn.Linear

"""The callback with Lightning modules that do not know of it."""

from __future__ import annotations

import csv
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import dst
from dst import ConfigurationError, StateError, methods
from dst.allocation import Uniform
from dst.init import Snip
from dst.lightning import SparseTraining
from dst.schedules import Constant
from tests.sampling import rotated


class Plain(lightning.LightningModule):
    """A module that knows nothing of sparsity."""

    def __init__(self, batch_size: int = 8, samples: int = 64) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 4))
        generator = torch.Generator().manual_seed(1)
        self.data = TensorDataset(
            torch.randn(samples, 12, generator=generator), torch.randint(4, (samples,), generator=generator)
        )
        self.batch_size = batch_size

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.network(batch[0]), batch[1]), prog_bar=True)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.data, self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.data, 64)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=0.01)


class Watch(Callback):
    """Checks after every batch that the weights are as sparse as the callback says."""

    def __init__(self, sparse: SparseTraining) -> None:
        self.sparse = sparse
        self.masks: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        masks = self.sparse.sparsifier.masks
        for name, mask in masks.items():
            assert not module.get_parameter(name)[~mask].any()
        self.masks.append(masks)


def trainer_of(*callbacks: Callback, **options: Any) -> lightning.Trainer:
    settings = {"max_epochs": 3, "logger": False, "enable_checkpointing": False} | options
    return lightning.Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )


def rigl(**options: Any) -> dst.Method:
    return methods.rigl(0.25, allocation=Uniform(), **{"update_every": 4, "fraction": Constant(0.3), **options})


def fit(sparse: SparseTraining, module: lightning.LightningModule | None = None, *others: Callback, **options: Any):
    torch.manual_seed(0)
    module = module or Plain()
    trainer = trainer_of(sparse, *others, **options)
    trainer.fit(module)
    return trainer, module


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_masks_hold_throughout_a_fit(precision):
    sparse = SparseTraining(rigl())
    assert sparse.sparsifier is None
    watch = Watch(sparse)
    module = Plain()
    if precision in ("bf16-true", "64-true"):
        kind = torch.bfloat16 if precision == "bf16-true" else torch.float64
        module.data = TensorDataset(module.data.tensors[0].to(kind), module.data.tensors[1])
    fit(sparse, module, watch, precision=precision)
    sparsifier = sparse.sparsifier
    assert len(watch.masks) == sparsifier.step == 24
    assert sparsifier.total_steps == 24
    assert sparsifier.updates == 5  # steps 0, 4, 8, 12, 16
    for masks in watch.masks:
        assert [int(mask.sum()) for mask in masks.values()] == [72, 24]
    moved = [
        step
        for step in range(1, 24)
        if any(not torch.equal(watch.masks[step][n], watch.masks[step - 1][n]) for n in watch.masks[0])
    ]
    assert moved == [4, 8, 12, 16]
    assert list(module.state_dict()) == list(Plain().state_dict())  # an ordinary checkpoint


def test_the_callback_does_what_a_plain_loop_does():
    sparse = SparseTraining(rigl(), seed=3)
    _, module = fit(sparse)
    torch.manual_seed(0)
    other = Plain()
    optimizer = other.configure_optimizers()
    sparsifier = dst.Sparsifier(other, optimizer, rigl(), total_steps=24, seed=3)
    for _ in range(3):
        for inputs, labels in other.train_dataloader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(other.network(inputs), labels).backward()
            sparsifier.before_step()
            optimizer.step()
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name))
    for name, mask in sparse.sparsifier.masks.items():
        assert torch.equal(mask, sparsifier.masks[name])


def test_settings_reach_the_sparsifier():
    sparse = SparseTraining(rigl(), total_steps=100, include=["network.*"], exclude=["network.2"], seed=9)
    fit(sparse)
    assert list(sparse.sparsifier.masks) == ["network.0.weight"]
    assert (sparse.sparsifier.total_steps, sparse.sparsifier.seed) == (100, 9)


@pytest.mark.parametrize(
    ("method", "stop"),
    rotated(
        [
            rigl(),
            methods.static(0.25, allocation=Uniform()),
            methods.static(0.25, init=Snip(), allocation=Uniform()),
            methods.set_(0.25, update_every=3, allocation=Uniform()),
        ],
        [3, 8, 13],
    ),
)
def test_a_fit_resumes_from_its_checkpoint_to_the_bit(tmp_path, method, stop):
    torch.manual_seed(0)
    whole = SparseTraining(method)
    _, expected = fit(whole, Resumable())

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == stop:
                trainer.save_checkpoint(tmp_path / "last.ckpt")
                raise RuntimeError("power cut")

    torch.manual_seed(0)
    interrupted = SparseTraining(method)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(interrupted, Resumable(), Stop())
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["SparseTraining"]
    assert state["steps"] == [stop]
    torch.manual_seed(77)
    module = Resumable()
    resumed = SparseTraining(method)
    watch = Watch(resumed)
    trainer_of(resumed, watch).fit(module, ckpt_path=tmp_path / "last.ckpt")
    assert len(watch.masks) == 24 - stop
    assert resumed.sparsifier.step == 24
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, module.get_parameter(name)), name
    for name, mask in whole.sparsifier.masks.items():
        assert torch.equal(mask, resumed.sparsifier.masks[name])
    assert resumed.sparsifier.step_counts == whole.sparsifier.step_counts
    assert resumed.sparsifier.exploration_rate == whole.sparsifier.exploration_rate


class Stateful(DataLoader):
    """A loader that goes on in the middle of an epoch, as Lightning lets loaders do."""

    first = read = 0

    def __iter__(self):
        first, self.first = self.first % len(self), 0
        for number, batch in enumerate(list(super().__iter__())[first:], start=first):
            self.read = number + 1
            yield batch

    def state_dict(self):
        return {"read": self.read}

    def load_state_dict(self, state):
        self.first = state["read"]


class Resumable(Plain):
    def train_dataloader(self) -> DataLoader:
        return Stateful(self.data, self.batch_size)


def test_a_checkpoint_of_another_method_is_refused(tmp_path):
    trainer, _ = fit(SparseTraining(rigl()))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(StateError, match=r"density: 0\.25 in the checkpoint, 0\.5 here"):
        trainer_of(SparseTraining(methods.rigl(0.5, allocation=Uniform())), max_epochs=4).fit(
            Plain(), ckpt_path=tmp_path / "last.ckpt"
        )


def test_saved_checkpoints_hold_masks_that_fit_their_weights(tmp_path):
    sparse = SparseTraining(rigl())
    saver = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, every_n_train_steps=1)
    fit(sparse, None, saver, enable_checkpointing=True)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 24
    for file in files:
        checkpoint = torch.load(file, weights_only=True)
        state = checkpoint["callbacks"]["SparseTraining"]
        assert state["steps"] == [checkpoint["global_step"]]
        for name, mask in state["masks"].items():
            assert not checkpoint["state_dict"][name][~mask].any()


class Stream(IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            yield torch.randn(12, generator=generator), 1


class Streaming(Plain):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(Stream(), 1)


@pytest.mark.parametrize(
    ("make", "options"),
    [(Plain, {"max_epochs": -1}), (Streaming, {"max_epochs": 2}), (Streaming, {"max_epochs": -1})],
    ids=["endless", "iterable", "iterable endless"],
)
def test_total_steps_are_asked_for_where_the_trainer_cannot_tell(make, options):
    with pytest.raises(ConfigurationError, match=r"SparseTraining\(total_steps=\.\.\.\)"):
        fit(SparseTraining(rigl()), make(), **options)


def test_total_steps_that_are_given_are_used():
    sparse = SparseTraining(rigl(), total_steps=8)
    fit(sparse, Streaming(), max_epochs=2, limit_val_batches=0)
    assert (sparse.sparsifier.total_steps, sparse.sparsifier.step, sparse.sparsifier.updates) == (8, 10, 2)
    sparse = SparseTraining(rigl())
    fit(sparse, Streaming(), max_epochs=-1, max_steps=6, limit_val_batches=0)
    assert (sparse.sparsifier.total_steps, sparse.sparsifier.step) == (6, 6)


def test_updates_see_the_accumulated_gradient():
    """Eight batches of 8 accumulated by 4 are two batches of 32: the same masks and weights."""
    results = []
    for batch_size, accumulate in ((8, 4), (32, 1)):
        torch.manual_seed(0)
        sparse = SparseTraining(rigl(update_every=1))
        _, module = fit(sparse, Plain(batch_size), accumulate_grad_batches=accumulate)
        assert (sparse.sparsifier.step, sparse.sparsifier.total_steps) == (6, 6)
        assert sparse.sparsifier.updates == 4  # 75% of 6 steps are 4
        results.append((sparse.sparsifier.masks, module.network[0].weight.detach()))
    assert all(torch.equal(results[0][0][name], results[1][0][name]) for name in results[0][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_clipping_sees_masked_gradients():
    norms = []

    class Clipping(Plain):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            grads = {n: p.grad for n, p in self.named_parameters() if p.grad is not None}
            for name, mask in sparse.sparsifier.masks.items():
                if name in grads:
                    assert not grads[name][~mask].any()
                    assert grads[name].any()
            norms.append(len(grads))
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    sparse = SparseTraining(rigl())
    fit(sparse, Clipping(), gradient_clip_val=0.1)
    assert norms == [4] * 24  # all four parameters, at the five updates too


def read_metrics(folder):
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


def test_topology_is_logged_at_every_update(tmp_path):
    sparse = SparseTraining(rigl(update_every=5))
    fit(sparse, None, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    rows = [row for row in read_metrics(tmp_path) if row.get("density")]
    assert [int(row["step"]) for row in rows] == [0, 1, 6, 11, 16]
    assert [float(row["topology/updates"]) for row in rows] == [0, 1, 2, 3, 4]
    assert {float(row["density"]) for row in rows} == {0.25}
    assert [float(row["topology/drop_fraction"]) for row in rows] == [0, 0.3, 0.3, 0.3, 0.3]
    churn = [float(row["topology/churn"]) for row in rows]
    assert churn[0] == 0
    assert all(0 < c <= 0.3 for c in churn[1:])
    explored = [float(row["topology/exploration_rate"]) for row in rows]
    assert explored == sorted(explored)
    assert explored[0] == 0.25 < explored[-1] == sparse.sparsifier.exploration_rate
    assert any(row.get("loss") for row in read_metrics(tmp_path))


def test_the_moment_a_dense_phase_ends_is_logged(tmp_path):
    fit(SparseTraining(methods.static(0.25, allocation=Uniform())), None, logger=CSVLogger(tmp_path))
    rows = [(int(row["step"]), float(row["density"])) for row in read_metrics(tmp_path) if row.get("density")]
    assert rows == [(0, 1.0), (7, 0.25)]


def test_the_progress_bar_shows_density_and_updates():
    shown = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, *args):
            shown.append(dict(trainer.progress_bar_metrics))

    sparse = SparseTraining(rigl())
    trainer, _ = fit(sparse, None, Look())
    assert all(metrics["density"] == 0.25 for metrics in shown)
    assert [metrics["updates"] for metrics in shown] == [1 + min(step // 4, 4) for step in range(24)]
    assert {"loss", "val_loss"} <= shown[-1].keys()
    assert trainer.progress_bar_metrics["updates"] == 5


class Alternating(Plain):
    """Three optimizers by hand: one holds no sparse weight, and one steps at every second batch only."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        biases = [p for p in self.parameters() if p.ndim == 1]
        often, seldom = [p for p in self.parameters() if p.ndim == 2]
        return torch.optim.Adam(biases, 0.01), torch.optim.AdamW([often], 0.01), torch.optim.AdamW([seldom], 0.01)

    def training_step(self, batch: Any, index: int) -> None:
        loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers()[: 2 + index % 2]:
            optimizer.step()


def test_manual_optimization_with_several_optimizers():
    sparse = SparseTraining(rigl())
    watch = Watch(sparse)
    fit(sparse, Alternating(), watch)
    assert len(watch.masks) == 24
    assert sparse.sparsifier.state_dict()["steps"] == [24, 12]
    assert sparse.sparsifier.updates == 5 + 3  # each at its own steps: 0, 4, 8, 12, 16 and 0, 4, 8


def test_a_callback_may_be_used_for_one_fit_after_another():
    sparse = SparseTraining(rigl())
    _, module = fit(sparse)
    first = sparse.sparsifier
    fit(sparse, module)
    assert sparse.sparsifier is not first
    assert (first.step, sparse.sparsifier.step) == (24, 24)


def test_after_the_fit_the_optimizer_is_free():
    sparse = SparseTraining(rigl())
    trainer, module = fit(sparse)
    (optimizer,) = trainer.optimizers
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert sparse.sparsifier.step == 24


def test_validation_without_a_fit_needs_no_sparsifier():
    sparse = SparseTraining(rigl())
    trainer_of(sparse).validate(Plain(), verbose=False)
    assert sparse.sparsifier is None
    assert sparse.state_dict() == {}


def test_a_method_of_several_fits_is_refused():
    with pytest.raises(ConfigurationError, match="run_lottery"):
        fit(SparseTraining(methods.lottery_ticket_rewind(0.25)))

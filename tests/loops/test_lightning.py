"""``SparseTraining`` in existing trainers and modules, with other callbacks and hooks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import dst
from dst.checkpoints import load_checkpoint
from dst.lightning import SparseTraining
from tests.checks import check_inactive_are_zero, differences
from tests.methods_list import METHODS
from tests.resume.fits import BATCHES, Data, Fit, Interrupted, Module, Rows, StopAt
from tests.sampling import rotated

# What Lightning says of these trainers and modules, sparse or not.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:UserWarning")
    for message in (
        "The dirpath has changed",
        "Using ModelCheckpoint with manual optimization",
        "`training_step` returned `None`",
        "SWA is currently only supported every epoch",
        "Be aware that when using `ckpt_path`",
        "Swapping scheduler",
    )
]

STEPS = 24


def trainer(callbacks: list[Callback], **options: Any) -> lightning.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": STEPS // BATCHES,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return lightning.Trainer(callbacks=callbacks, **settings | options)


def masks_of(sparse: SparseTraining) -> dict[str, Tensor]:
    assert sparse.sparsifier is not None
    return sparse.sparsifier.masks


class Watch(Callback):
    """Checks after every batch, and in every validation, that inactive weights are zero."""

    def __init__(self, sparse: SparseTraining) -> None:
        self.sparse = sparse
        self.seen = 0
        self.validated = 0

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, *args: Any) -> None:
        check_inactive_are_zero(pl_module, masks_of(self.sparse))
        self.seen += 1

    def on_validation_batch_start(self, trainer: Any, pl_module: nn.Module, *args: Any) -> None:
        check_inactive_are_zero(pl_module, masks_of(self.sparse))
        self.validated += 1


@pytest.mark.parametrize(("name", "algorithm"), rotated(["rigl", "set", "snip"], ["norm", "value"]))
def test_clipping_of_either_kind(name: str, algorithm: str) -> None:
    """Trains through updates that replace a step, and clips masked gradients to what was asked for."""
    largest = []

    class Clipping(Module):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            for n, mask in masks_of(sparse).items():
                assert self.get_parameter(n).grad[~mask].eq(0).all()
            super().configure_gradient_clipping(optimizer, *args, **kwargs)
            gradients = torch.cat([p.grad.flatten() for p in self.parameters()])
            largest.append(float(gradients.norm() if algorithm == "norm" else gradients.abs().max()))

    sparse = SparseTraining(METHODS[name]())
    watch = Watch(sparse)
    options = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": algorithm}
    trainer([sparse, watch], **options).fit(Clipping(), datamodule=Data())
    assert watch.seen == len(largest) == STEPS
    assert 0.009 < max(largest) <= 0.01 + 1e-6


@pytest.mark.parametrize(("name", "accumulate"), rotated(["rigl", "momentum_growth", "static_at_step"], [1, 3]))
def test_fp16_overflows_do_not_advance_the_clock(name: str, accumulate: int) -> None:
    """Lightning counts a step that the scaler leaves out; the topology's clock must not."""
    overflows = {2, 4, 5, 11}  # optimizer steps by Lightning's count

    class Overflowing(Module):
        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            loss = super().training_step(batch, index)
            return loss * float("inf") if self.trainer.global_step in overflows else loss

    class Still(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            self.before = copy.deepcopy(sparse.state_dict()) if sparse.sparsifier else {}
            self.weights = [p.detach().clone() for p in module.parameters()]

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            assert all(p.isfinite().all() for p in module.parameters())
            check_inactive_are_zero(module, masks_of(sparse))
            if trainer.global_step - 1 in overflows and not trainer.fit_loop._should_accumulate():
                self.before["skipped"] = sparse.state_dict()["skipped"]
                assert not list(differences(self.before, sparse.state_dict()))
                assert all(torch.equal(a, b) for a, b in zip(self.weights, module.parameters(), strict=True))

    module, sparse = Overflowing(), SparseTraining(METHODS[name]())
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
    made = trainer([sparse, Still()], plugins=[plugin], accumulate_grad_batches=accumulate)
    made.fit(module, datamodule=Data(accumulate))
    assert sparse.sparsifier is not None
    assert made.global_step == STEPS
    assert sparse.sparsifier.step == STEPS - len(overflows)
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() == 2.0**4
    if name == "rigl":
        assert sparse.sparsifier.updates == 5  # at steps 0, 4, 8, 12, 16 of its own clock


@pytest.mark.parametrize(
    ("name", "precision"), rotated(["rigl", "momentum_growth", "static"], ["bf16-mixed", "bf16-true", "64-true"])
)
def test_other_precisions(name: str, precision: Any) -> None:
    sparse = SparseTraining(METHODS[name]())
    watch = Watch(sparse)
    module = Module()
    trainer([sparse, watch], precision=precision).fit(module, datamodule=Data())
    assert watch.seen == STEPS
    assert sparse.sparsifier is not None
    assert sparse.sparsifier.step == STEPS
    assert 0.29 < sparse.sparsifier.density < 0.32
    # The module's own numbers of active weights, not those that the sparsifier believes in.
    assert sum(int(m.sum()) for m in masks_of(sparse).values()) == sparse.sparsifier.active


class Adversaries(lightning.LightningModule):
    """Two networks and two optimizers, stepped by hand; the discriminator twice as often."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 36))
        self.discriminator = nn.Sequential(nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        one, two = self.optimizers()
        real = batch[0].flatten(1)
        noise = torch.randn(len(real), 4, generator=torch.Generator().manual_seed(index + 100 * self.current_epoch))
        self.toggle_optimizer(two)
        fake = self.generator(noise).detach()
        loss = self.discriminator(fake).square().mean() + (1 - self.discriminator(real)).square().mean()
        two.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(two, gradient_clip_val=1.0, gradient_clip_algorithm="value")
        two.step()
        self.untoggle_optimizer(two)
        if index % 2 == 0:
            self.toggle_optimizer(one)
            loss = (1 - self.discriminator(self.generator(noise))).square().mean()
            one.zero_grad()
            self.manual_backward(loss)
            one.step()
            self.untoggle_optimizer(one)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("fooled", self.discriminator(batch[0].flatten(1)).mean())

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.AdamW(self.generator.parameters(), 0.01),
            torch.optim.SGD(self.discriminator.parameters(), 0.05, momentum=0.9),
        ]


@pytest.mark.parametrize("name", ["rigl", "set", "momentum_growth"])
def test_adversaries_with_an_optimizer_each(name: str, tmp_path: Path) -> None:
    sparse = SparseTraining(METHODS[name](), total_steps=STEPS)
    module = Adversaries()
    saver = {"every_n_train_steps": 9}
    whole = Fit(sparse, tmp_path, module=module, callbacks=[sparse, watch := Watch(sparse)], saver=saver)
    assert watch.seen == STEPS
    state = sparse.state_dict()
    assert state["steps"] == [STEPS // 2, STEPS]
    first = {n: m for n, m in masks_of(sparse).items() if n.startswith("generator")}
    assert len(first) == 2
    check_inactive_are_zero(module, masks_of(sparse))
    # Interrupted and resumed, both clocks go on.
    resumed = SparseTraining(METHODS[name](), total_steps=STEPS)
    paths = sorted(tmp_path.glob("step=*.ckpt"), key=lambda p: int(p.stem[5:]))
    fit = Fit(resumed, tmp_path / "b", module=Adversaries(), resume=paths[len(paths) // 2], saver=saver)
    found = list(differences(whole.outcome(), fit.outcome()))
    assert not found, found


def test_one_of_two_networks_stays_dense() -> None:
    """The sparsifier ignores an optimizer without sparse weights."""
    sparse = SparseTraining(METHODS["rigl"](), total_steps=STEPS, include=["generator*"])
    module = Adversaries()
    trainer([sparse, Watch(sparse)]).fit(module, datamodule=Data())
    assert set(masks_of(sparse)) == {"generator.0.weight", "generator.2.weight"}
    assert sparse.state_dict()["steps"] == [STEPS // 2]
    assert module.discriminator[0].weight.ne(0).all()


class ThirdParty(Module):
    """Does everything by its own hooks: manual optimization with accumulation, schedule, clipping, norms logged."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.norms: list[float] = []
        self.save_hyperparameters()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(functional.cross_entropy(self(batch[0]), batch[1]) / 2)
        if index % 2 == 1:
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            self.lr_schedulers().step()
            self.log_dict({"lr": optimizer.param_groups[0]["lr"], "loss": 1.0}, prog_bar=True)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.norms.append(float(torch.stack([p.grad.norm() for p in self.parameters()]).norm()))


def test_a_module_that_does_everything_itself(tmp_path: Path) -> None:
    def fit(folder: Path, resume: Path | None = None, stop: Callback | None = None) -> tuple[Fit, SparseTraining]:
        sparse = SparseTraining(METHODS["rigl"](), total_steps=STEPS // 2)
        callbacks = [sparse, Watch(sparse), *([stop] if stop else [])]
        return Fit(sparse, folder, module=ThirdParty(), callbacks=callbacks, resume=resume), sparse

    whole, sparse = fit(tmp_path)
    module = whole.module
    assert isinstance(module, ThirdParty)
    assert sparse.sparsifier is not None
    assert sparse.sparsifier.step == len(module.norms) == STEPS // 2
    assert sparse.sparsifier.updates == 3
    assert min(module.norms) > 0  # at updates too
    assert whole.trainer.callback_metrics["lr"] < 0.05
    # Gradients accumulate over checkpoints: the one of step 4 is taken as its second micro-batch ends.
    resumed, _ = fit(tmp_path / "b", tmp_path / "step=4.ckpt")
    found = list(differences(whole.outcome(), resumed.outcome()))
    assert not found, found


def test_a_plain_loops_result_with_another_modules_logging() -> None:
    """Own ``optimizer_step`` (a warm-up), own backward, own zero_grad: the clock counts optimizer steps."""

    class Own(Module):
        def optimizer_step(self, epoch: int, index: int, optimizer: Any, closure: Any = None) -> None:
            for group in optimizer.param_groups:
                group["lr"] = 0.001 * (1 + self.trainer.global_step)
            optimizer.step(closure=closure)

        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            loss.backward()

        def optimizer_zero_grad(self, epoch: int, index: int, optimizer: Any) -> None:
            optimizer.zero_grad(set_to_none=False)

    sparse = SparseTraining(METHODS["rigl"]())
    watch = Watch(sparse)
    trainer([sparse, watch]).fit(Own(), datamodule=Data())
    assert sparse.sparsifier is not None
    assert watch.seen == sparse.sparsifier.step == STEPS
    assert sparse.sparsifier.updates == 5


def test_a_step_without_a_loss_is_left_out() -> None:
    class Sometimes(Module):
        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Any:
            return None if index == 2 else super().training_step(batch, index)

    sparse = SparseTraining(METHODS["rigl"]())
    watch = Watch(sparse)
    trainer([sparse, watch]).fit(Sometimes(), datamodule=Data())
    assert watch.seen == STEPS
    assert sparse.sparsifier is not None
    assert sparse.sparsifier.updates >= 4


def test_lbfgs_is_refused() -> None:
    class Second(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(dst.ConfigurationError, match="LBFGS evaluates the loss several times"):
        trainer([SparseTraining(METHODS["rigl"]())]).fit(Second(), datamodule=Data())


# -- averaged weights ---------------------------------------------------------------------------------------------


class Averages(Callback):
    """Looks at the weights that are validated, and at what is saved."""

    def __init__(self, sparse: SparseTraining) -> None:
        self.sparse = sparse
        self.validated: list[Tensor] = []

    def on_validation_batch_start(self, trainer: Any, pl_module: nn.Module, *args: Any) -> None:
        check_inactive_are_zero(pl_module, masks_of(self.sparse))
        self.validated.append(pl_module.get_parameter("hidden.weight").detach().clone())


@pytest.mark.parametrize(("name", "first"), rotated(["rigl", "set", "static_at_step", "snip"], ["sparse", "average"]))
def test_exponential_averages_are_masked_when_validated_and_saved(name: str, first: str, tmp_path: Path) -> None:
    sparse, average = SparseTraining(METHODS[name]()), EMAWeightAveraging(decay=0.9)
    look = Averages(sparse)
    order: list[Callback] = [sparse, average] if first == "sparse" else [average, sparse]
    fit = Fit(sparse, tmp_path, callbacks=[*order, look], saver={"every_n_train_steps": 3, "save_last": False})
    assert len(look.validated) == 2 * STEPS // BATCHES
    trained = masks_of(sparse)
    # What was validated is the average, not the model.
    assert average._average_model is not None
    assert not torch.equal(
        look.validated[-1], load_checkpoint(tmp_path / "step=24.ckpt")["current_model_state"]["hidden.weight"]
    )
    for step in (9, 15, 24):
        checkpoint = load_checkpoint(tmp_path / f"step={step}.ckpt")
        (state,) = (s for k, s in checkpoint["callbacks"].items() if k.startswith("SparseTraining"))
        for n, mask in state["masks"].items():
            assert checkpoint["state_dict"][n][~mask].eq(0).all()  # the average
            assert checkpoint["current_model_state"][n][~mask].eq(0).all()
        assert list(differences(checkpoint["state_dict"], checkpoint["current_model_state"]))
    check_inactive_are_zero(fit.module, trained)  # and the averages have become the model's weights
    assert torch.equal(fit.module.get_parameter("hidden.weight"), look.validated[-1])


@pytest.mark.parametrize(("name", "first"), rotated(["rigl", "set"], ["sparse", "average"]))
def test_stochastic_averages_are_masked(name: str, first: str) -> None:
    sparse, average = SparseTraining(METHODS[name]()), StochasticWeightAveraging(0.01, swa_epoch_start=1)
    order: list[Callback] = [sparse, average] if first == "sparse" else [average, sparse]
    module = Module()
    watch = Watch(sparse)
    trainer([*order, watch], max_epochs=4).fit(module, datamodule=Data())
    assert average._average_model is not None
    check_inactive_are_zero(average._average_model, masks_of(sparse))
    check_inactive_are_zero(module, masks_of(sparse))
    assert torch.equal(module.hidden.weight, average._average_model.hidden.weight)
    assert watch.seen >= STEPS


# -- more than one call -------------------------------------------------------------------------------------------


def test_the_same_trainer_fits_twice() -> None:
    """The second call continues: connections, clock and optimizer hooks are those of one training."""
    sparse = SparseTraining(METHODS["rigl"](), total_steps=STEPS)
    module = Module()
    made = trainer([sparse, Watch(sparse)], max_epochs=2)
    made.fit(module, datamodule=Data())
    between = masks_of(sparse)
    assert sparse.sparsifier is not None
    assert (sparse.sparsifier.step, sparse.sparsifier.updates) == (12, 3)
    made.fit_loop.max_epochs = 4
    made.fit(module, datamodule=Data())
    assert (sparse.sparsifier.step, sparse.sparsifier.updates) == (24, 5)
    assert sparse.sparsifier.last_update is not None
    assert sparse.sparsifier.last_update.step == 16
    check_inactive_are_zero(module, masks_of(sparse))
    assert any(not torch.equal(m, between[n]) for n, m in masks_of(sparse).items())


def test_another_trainer_keeps_the_connections_and_restarts_the_schedule() -> None:
    sparse = SparseTraining(METHODS["set"]())
    module = Module()
    trainer([sparse]).fit(module, datamodule=Data())
    left = masks_of(sparse)
    seen = []

    class First(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            if not seen:
                seen.append((masks_of(sparse), sparse.state_dict()["steps"], module.hidden.weight.detach().clone()))

    logger = Rows()
    before = module.hidden.weight.detach().clone()
    trainer([sparse, First()], logger=logger).fit(module, datamodule=Data())
    masks, steps, weight = seen[0]
    assert steps == [0]
    assert all(torch.equal(m, left[n]) for n, m in masks.items())
    assert torch.equal(weight, before)
    assert sparse.sparsifier is not None
    assert sparse.sparsifier.step == STEPS
    assert "density" in logger.rows[0][1]  # the new logger is told where it begins


def test_another_module_begins_anew() -> None:
    sparse = SparseTraining(METHODS["set"]())
    trainer([sparse]).fit(Module(), datamodule=Data())
    one = masks_of(sparse)
    fresh = SparseTraining(METHODS["set"]())
    trainer([fresh]).fit(Module(), datamodule=Data())
    trainer([sparse]).fit(Module(), datamodule=Data())
    assert all(torch.equal(m, masks_of(fresh)[n]) and torch.equal(m, one[n]) for n, m in masks_of(sparse).items())


def test_a_fit_that_failed_leaves_a_callback_that_can_fit_again() -> None:
    sparse = SparseTraining(METHODS["rigl"]())
    module = Module()
    with pytest.raises(Interrupted):
        trainer([sparse, StopAt(7)]).fit(module, datamodule=Data())
    watch = Watch(sparse)
    trainer([sparse, watch]).fit(module, datamodule=Data())
    assert watch.seen == STEPS
    assert sparse.sparsifier is not None
    assert sparse.sparsifier.step == STEPS


def test_validating_and_testing_alone_change_nothing(tmp_path: Path) -> None:
    Fit(SparseTraining(METHODS["rigl"]()), tmp_path)
    module = Module()
    module.test_step = module.validation_step  # type: ignore[method-assign]
    before = copy.deepcopy(module.state_dict())
    sparse = SparseTraining(METHODS["rigl"]())
    made = trainer([sparse])
    loader = Data().val_dataloader()
    made.validate(module, loader, verbose=False)
    made.test(module, loader, verbose=False)
    assert sparse.sparsifier is None
    assert not list(differences(before, module.state_dict()))
    made.validate(module, loader, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    saved = load_checkpoint(tmp_path / "last.ckpt")
    assert not list(differences(dict(saved["state_dict"]), dict(module.state_dict())))
    # A fit after that is a new one, on the weights and connections that were loaded.
    made.fit(module, datamodule=Data())
    assert sparse.sparsifier is not None
    assert sparse.sparsifier.step == STEPS
    assert sparse.sparsifier.updates > 5
    check_inactive_are_zero(module, masks_of(sparse))


def test_validation_within_a_fit_sees_sparse_weights() -> None:
    sparse = SparseTraining(METHODS["rigl"]())
    watch = Watch(sparse)
    trainer([watch, sparse], val_check_interval=2).fit(Module(), datamodule=Data())
    assert watch.validated == 2 * STEPS // 2


# -- finders ------------------------------------------------------------------------------------------------------


class Findable(Module):
    """Has a learning rate and a batch size to be found."""

    def __init__(self) -> None:
        super().__init__()
        self.lr = 0.05
        self.batch_size = 6

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        data = TensorDataset(
            torch.randn(72, 1, 6, 6, generator=generator), torch.randint(3, (72,), generator=generator)
        )
        return DataLoader(data, batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return Data().val_dataloader()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


def reference(lr: float, batch_size: int) -> dict[str, Any]:
    """A fit of the same module without a finder, with what it found."""
    module, sparse = Findable(), SparseTraining(METHODS["rigl"]())
    module.lr, module.batch_size = lr, batch_size
    trainer([sparse]).fit(module)
    return {"weights": module.state_dict(), "state": sparse.state_dict()}


@pytest.mark.parametrize(("what", "how"), [("lr", "tuner"), ("lr", "callback"), ("batch size", "callback")])
def test_finders_leave_no_trace(what: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They train and restore the model before the fit; the fit is the same as one without them."""
    monkeypatch.chdir(tmp_path)  # finders keep a checkpoint for the moment
    sparse = SparseTraining(METHODS["rigl"]())
    module = Findable()
    if what == "lr":
        finder: Callback = LearningRateFinder(num_training_steps=40, update_attr=True)
    else:
        finder = BatchSizeFinder("power", steps_per_trial=1, init_val=6, max_trials=2, batch_arg_name="batch_size")
    made = trainer([sparse, finder] if how == "callback" else [sparse], default_root_dir=tmp_path)
    if how == "tuner":
        Tuner(made).lr_find(module, num_training=40)
    made.fit(module)
    assert module.lr != 0.05 or what != "lr"
    assert module.batch_size == (6 if what == "lr" else 12)
    found = list(
        differences(
            reference(module.lr, module.batch_size), {"weights": module.state_dict(), "state": sparse.state_dict()}
        )
    )
    assert not found, found

"""Several optimizers under Lightning: each has its own number of steps, and every network reaches its density."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import dst
from dst.lightning import SparseTraining

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")

METHODS: dict[str, Callable[[], dst.Method]] = {
    "gmp": lambda: dst.methods.gmp(0.1, update_every=5),
    "granet": lambda: dst.methods.granet(0.1, update_every=5),
    "static": lambda: dst.methods.static(0.1, sparsify_at=0.6),
    "rigl": lambda: dst.methods.rigl(0.1, update_every=5, stop=1.0),
}


class Gan(lightning.LightningModule):
    """A generator and a discriminator; the generator steps at every ``every``-th batch."""

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 6))
        self.discriminator = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 1))
        self.automatic_optimization = False
        self.every = every

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(net.parameters(), 1e-3) for net in (self.discriminator, self.generator)]

    def training_step(self, batch: list[Tensor], index: int) -> None:
        discriminator, generator = self.optimizers()
        fake = self.generator(torch.randn(8, 4))
        real, fooled = self.discriminator(batch[0]), self.discriminator(fake.detach())
        self._step(discriminator, cross_entropy(real, real * 0 + 1) + cross_entropy(fooled, fooled * 0))
        if (index + 1) % self.every == 0:
            judged = self.discriminator(self.generator(torch.randn(8, 4)))
            self._step(generator, cross_entropy(judged, judged * 0 + 1))

    def _step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def fit(method: dst.Method, every: int = 1, batches: int = 50, **settings: Any) -> tuple[Gan, SparseTraining]:
    total = settings.pop("total_steps", None)
    module, sparse = Gan(every), SparseTraining(method, total_steps=total)
    trainer = lightning.Trainer(
        accelerator="cpu", callbacks=[sparse], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **settings,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(8 * batches, 6)), 8))
    return module, sparse


def densities(module: Gan) -> list[float]:
    return [
        sum(int(p.count_nonzero()) for p in net.parameters() if p.ndim == 2)
        / sum(p.numel() for p in net.parameters() if p.ndim == 2)
        for net in (module.generator, module.discriminator)
    ]


def check(module: Gan, sparse: SparseTraining, steps: list[int]) -> None:
    sparsifier = sparse.sparsifier
    assert sparsifier is not None
    assert sparsifier.steps == steps
    assert sparsifier.shortfall is None
    assert sparsifier.density == pytest.approx(0.1, abs=0.005)
    assert all(density < 0.25 for density in densities(module))  # neither network is left dense
    if sparsifier.method.name == "rigl":
        assert sparsifier.drop_fraction < 0.02  # the cosine has ended


@pytest.mark.parametrize("name", METHODS)
def test_two_optimizers_share_max_steps(name: str) -> None:
    check(*fit(METHODS[name](), max_steps=200), [100, 100])


@pytest.mark.parametrize("name", METHODS)
def test_one_that_steps_five_times_as_often(name: str) -> None:
    check(*fit(METHODS[name](), every=5, batches=40, max_epochs=5), [200, 40])
    if name == "gmp":
        check(*fit(METHODS[name](), every=5, batches=40, max_steps=120), [100, 20])


def test_lengths_that_are_given() -> None:
    module, sparse = fit(METHODS["gmp"](), every=5, batches=20, max_epochs=5, total_steps=[100, 20])
    check(module, sparse, [100, 20])
    assert sparse.sparsifier is not None
    assert [s.total for s in sparse.sparsifier._training.steppers] == [100, 20]


def test_lengths_in_a_users_loop() -> None:
    nets = [nn.Linear(20, 20), nn.Linear(20, 20)]
    model = nn.ModuleList(nets)
    first, second = (torch.optim.SGD(net.parameters(), 0.01) for net in nets)
    method = dst.methods.gmp(0.2, update_every=2)
    sparsifier = dst.Sparsifier(model, [first, second], method, total_steps={second: 10, first: 40})
    for step in range(40):
        for optimizer, net in ((first, nets[0]), (second, nets[1])):
            if optimizer is first or step % 4 == 3:
                net(torch.randn(4, 20)).square().mean().backward()
                sparsifier.before_step(optimizer)
                optimizer.step()
                optimizer.zero_grad()
    assert sparsifier.shortfall is None
    assert sparsifier.active == 160
    with pytest.raises(dst.ConfigurationError, match="3 numbers for 2 optimizers"):
        dst.Sparsifier(nn.ModuleList(nets), [first, second], method, total_steps=[1, 2, 3])
    with pytest.raises(dst.ConfigurationError, match="no steps for optimizer 1"):
        dst.Sparsifier(nn.ModuleList(nets), [first, second], method, total_steps={first: 3})


def test_a_resume_uses_the_measured_lengths() -> None:
    _, sparse = fit(METHODS["gmp"](), every=5, batches=20, max_epochs=5)
    assert sparse.sparsifier is not None
    state = sparse.state_dict()
    assert state["total_steps"] == [100, 20]
    again = SparseTraining(METHODS["gmp"]())
    again.load_state_dict(state)
    assert again.state_dict()["total_steps"] == [100, 20]


# -- training that ends too early ----------------------------------------------------------------------------------


class Plain(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 20)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def plain_fit(module: Plain, callbacks: list[Any], tmp_path: Any = None, resume: Any = None, **settings: Any) -> None:
    trainer = lightning.Trainer(
        accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **settings,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(40, 20)), 4), ckpt_path=resume)
    if tmp_path is not None:
        trainer.save_checkpoint(tmp_path / "dense.ckpt")


@pytest.mark.parametrize("method", [dst.methods.gmp(0.1, update_every=3), dst.methods.static(0.1, sparsify_at=0.5)])
def test_a_dense_checkpoint_leaves_the_steps_that_are_left(method: dst.Method, tmp_path: Any) -> None:
    plain_fit(Plain(), [], tmp_path, max_epochs=6)
    sparse = SparseTraining(method)
    plain_fit(Plain(), [sparse], resume=tmp_path / "dense.ckpt", max_epochs=10)
    assert sparse.sparsifier is not None
    assert (sparse.sparsifier.step, sparse.sparsifier.total_steps) == (40, 40)
    assert sparse.sparsifier.active == 40


class Stop(lightning.pytorch.callbacks.Callback):
    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= 10


def test_training_that_ends_before_its_mask_says_so(caplog: pytest.LogCaptureFixture) -> None:
    sparse = SparseTraining(dst.methods.static(0.1, sparsify_at=0.5))
    with caplog.at_level(logging.WARNING):
        plain_fit(Plain(), [sparse, Stop()], max_epochs=10)
    assert caplog.text.count("ended at density 1, target 0.1: 10 of 100 planned optimizer steps") == 1


def test_an_exception_is_not_the_end_of_training(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Linear(20, 20)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    sparsifier = dst.Sparsifier(net, optimizer, dst.methods.gmp(0.1, update_every=2), total_steps=40)
    net(torch.randn(4, 20)).sum().backward()
    sparsifier.before_step()
    optimizer.step()
    caplog.set_level(logging.WARNING)
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sparsifier.finalize()
    assert "ended at density" not in caplog.text


def test_a_resume_of_what_began_dense_ends_as_if_it_had_not_stopped(tmp_path: Any) -> None:
    plain_fit(Plain(), [], tmp_path, max_epochs=2)
    method = dst.methods.gmp(0.1, update_every=3)
    half, whole, again = (SparseTraining(method) for _ in range(3))
    plain_fit(Plain(), [whole], resume=tmp_path / "dense.ckpt", max_epochs=6)

    class Save(lightning.pytorch.callbacks.Callback):
        def on_train_epoch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
            if trainer.current_epoch == 3:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    plain_fit(Plain(), [half, Save()], resume=tmp_path / "dense.ckpt", max_epochs=6)
    plain_fit(Plain(), [again], resume=tmp_path / "half.ckpt", max_epochs=6)
    assert again.sparsifier is not None
    assert whole.sparsifier is not None
    assert (again.sparsifier.step, again.sparsifier.total_steps) == (40, 40)
    assert [row["nonzero"] for row in again.sparsifier.layer_table()] == [40]
    assert again.sparsifier.step_counts == whole.sparsifier.step_counts


def test_the_first_of_two_limits_counts() -> None:
    check(*fit(METHODS["gmp"](), batches=25, max_epochs=2, max_steps=1000), [50, 50])
    check(*fit(METHODS["gmp"](), batches=25, max_epochs=20, max_steps=100), [50, 50])


def test_a_loop_that_ends_before_its_budget_settles_says_so(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Linear(20, 20)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    sparsifier = dst.Sparsifier(net, optimizer, dst.methods.gmp(0.1, update_every=2), total_steps=40)
    for _ in range(20):
        net(torch.randn(4, 20)).sum().backward()
        sparsifier.before_step()
        optimizer.step()
    with caplog.at_level(logging.WARNING):
        sparsifier.finalize()
        sparsifier.finalize()
    assert [r.message[:27] for r in caplog.records] == [
        "ended at density 0.1" + r.message[20:27] for r in caplog.records
    ]
    assert len(caplog.records) == 1
    assert "target 0.1: 20 of 40" in caplog.text

"""Fits of a small module with Lightning, and the comparison of a resumed fit with an uninterrupted one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from torch import Tensor, nn
from torch.nn import functional

from dst.data.loader import TensorLoader
from dst.lightning import SparseTraining
from tests import small
from tests.checks import differences
from tests.methods_list import TOTAL_STEPS

warnings.filterwarnings("ignore", message=".*does not have many workers.*")

BATCHES = 6  # optimizer steps of an epoch

SELDOM = {"every_n_train_steps": 9}
"""Settings of a saver for fits whose checkpoints a test hardly reads: writing one takes as long as a step."""


class Interrupted(Exception):
    """Raised to stop a run."""


class Rows(Logger):
    """A logger that keeps its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "rows"

    @property
    def version(self) -> str:
        return "0"

    @property
    @rank_zero_experiment
    def experiment(self) -> None:
        return None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Odd(small.Odd):
    """The odd optimizer under Lightning, which computes gradients within the step."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = closure() if closure is not None else None
        super().step()
        return loss


OPTIMIZERS = {**small.OPTIMIZERS, "odd": Odd}


class Module(lightning.LightningModule):
    """Convolution, normalisation and linear layers on (N, 1, 6, 6) images, with a schedule."""

    def __init__(self, optimizer: str = "sgd", width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(96, width)
        self.head = nn.Linear(width, 3)
        self.optimizer = optimizer

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.hidden(self.norm(self.conv(images)).relu().flatten(1)).relu())

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("val_loss", functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.optimizer](self.parameters())
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Data(lightning.LightningDataModule):
    """Loaders with a state; ``accumulate`` micro-batches make an optimizer step."""

    def __init__(self, accumulate: int = 1) -> None:
        super().__init__()
        self.micro = 12 // accumulate

    def _loader(self, seed: int, batch_size: int, shuffle: bool) -> TensorLoader:
        generator = torch.Generator().manual_seed(seed)
        return TensorLoader(
            torch.randint(256, (12 * BATCHES, 1, 6, 6), generator=generator, dtype=torch.uint8),
            torch.randint(3, (12 * BATCHES,), generator=generator),
            batch_size=batch_size,
            scale=torch.tensor([1 / 64]),
            shift=torch.tensor([-2.0]),
            shuffle=shuffle,
        )

    def train_dataloader(self) -> TensorLoader:
        return self._loader(1, self.micro, True)

    def val_dataloader(self) -> TensorLoader:
        return self._loader(2, 36, False)


class StopAt(Callback):
    """Raises at the beginning of a micro-batch, counted over the whole training."""

    def __init__(self, number: int, how: Callable[[], None] | None = None) -> None:
        self.left = number
        self.how = how

    def on_train_batch_start(self, *args: Any) -> None:
        if self.left == 0:
            if self.how is not None:
                self.how()
            raise Interrupted
        self.left -= 1


class SaveAt(Callback):
    """Saves a checkpoint at the end of one micro-batch, then stops."""

    def __init__(self, number: int, path: Path) -> None:
        self.stop = StopAt(number)
        self.path = path

    def on_train_batch_start(self, trainer: lightning.Trainer, *args: Any) -> None:
        self.stop.on_train_batch_start()

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        if self.stop.left == 0:
            trainer.save_checkpoint(self.path)


class Fit:
    """One call of ``Trainer.fit``, until it ends or is stopped."""

    def __init__(
        self,
        sparse: SparseTraining,
        folder: Path,
        *,
        module: lightning.LightningModule | None = None,
        callbacks: list[Callback] | None = None,
        optimizer: str = "sgd",
        accumulate: int = 1,
        resume: Path | None = None,
        steps: int = TOTAL_STEPS,
        saver: dict[str, Any] | None = None,
        **trainer: Any,
    ) -> None:
        self.rows = Rows()
        self.sparse = sparse
        self.module = Module(optimizer) if module is None else module
        options = {"every_n_train_steps": 1, "save_top_k": -1, "save_last": True, "filename": "{step}", **(saver or {})}
        self.trainer = lightning.Trainer(
            max_epochs=steps // BATCHES,
            accelerator="cpu",
            logger=self.rows,
            log_every_n_steps=1,
            accumulate_grad_batches=accumulate,
            callbacks=[*([sparse] if callbacks is None else callbacks), ModelCheckpoint(folder, **options)],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **trainer,
        )
        try:
            self.trainer.fit(self.module, datamodule=Data(accumulate), ckpt_path=resume)
            self.finished = True
        except Interrupted:
            self.finished = False

    def outcome(self) -> dict[str, Any]:
        """The final weights, optimizers, schedules, topology and metrics."""
        assert self.sparse.sparsifier is not None
        return {
            "model": copy.deepcopy(self.module.state_dict()),
            "optimizers": [o.state_dict() for o in self.trainer.optimizers],
            "schedulers": [c.scheduler.state_dict() for c in self.trainer.lr_scheduler_configs],
            "topology": self.sparse.sparsifier.state_dict(),
            "metrics": dict(self.trainer.callback_metrics),
            "step": self.trainer.global_step,
        }


def check_same(whole: Fit, resumed: Fit) -> None:
    """Assert that the resumed run ends as the whole one does, and logs the same rows from there on."""
    assert whole.finished
    assert resumed.finished
    found = list(differences(whole.outcome(), resumed.outcome()))
    assert not found, found
    tail = whole.rows.rows[-len(resumed.rows.rows) :]
    found = list(differences(tail, resumed.rows.rows))
    assert not found, found


def check_rows(whole: Fit, interrupted: Fit, resumed: Fit) -> None:
    """Assert that the interrupted and the resumed run together log exactly the rows of the whole run."""

    def rows(*fits: Fit) -> set[str]:
        return {repr((step, sorted(row.items()))) for fit in fits for step, row in fit.rows.rows}

    assert rows(whole) == rows(interrupted, resumed)

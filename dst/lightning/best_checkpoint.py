"""The checkpoint of the best validation accuracy. The test split never selects weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint

from dst.checkpoints import load_checkpoint
from dst.lightning.callback import SparseTraining

SELECTIONS = ("last", "validation")

_TOLERANCE = 0.01


class BestCheckpoint(ModelCheckpoint):
    """Keeps the checkpoint of the best validation accuracy, the earliest among equals.

    Only weights at the target density count, with a tolerance of 1%. Otherwise a method that prunes gradually, or that has
    dense phases, would keep weights that are denser than requested.

    Args:
        folder: The folder of ``best.ckpt``.
        sparse: The callback that trains sparsely.

    Attributes:
        layers: ``Sparsifier.layer_table()`` of the checkpoint; empty if there is none yet.
        step: Optimizer steps taken at the checkpoint.
    """

    def __init__(self, folder: Path, sparse: SparseTraining) -> None:
        super().__init__(
            folder,
            filename="best",
            monitor="val/accuracy",
            mode="max",
            save_top_k=1,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )
        self._sparse, self._path = sparse, folder / "best.ckpt"
        self.layers: list[dict[str, Any]] = []
        self.step = 0

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save a checkpoint if the accuracy is the best so far and the density is reached."""
        sparsifier = self._sparse.sparsifier
        if sparsifier is not None and sparsifier.density <= self._sparse.method.density * (1 + _TOLERANCE):
            super().on_validation_end(trainer, pl_module)

    def _save_checkpoint(self, trainer: lightning.Trainer, filepath: str) -> None:
        assert self._sparse.sparsifier is not None
        self.layers, self.step = self._sparse.sparsifier.layer_table(), self._sparse.sparsifier.step
        super()._save_checkpoint(trainer, filepath)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of ``ModelCheckpoint`` with the layers and the step of the checkpoint."""
        return {**super().state_dict(), "layers": self.layers, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`'s result."""
        super().load_state_dict(state_dict)
        self.layers, self.step = state_dict["layers"], state_dict["step"]

    def load_weights(self, module: lightning.LightningModule) -> bool:
        """Load the checkpoint's weights into the module. Returns False if there is no checkpoint."""
        if not self.layers:
            return False
        module.load_state_dict(load_checkpoint(self._path)["state_dict"])
        return True

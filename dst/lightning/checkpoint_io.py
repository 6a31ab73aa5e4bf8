"""Lightning's plugin for checkpoint files, by ``dst.checkpoints``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from dst.checkpoints import load_checkpoint, save_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Reads and writes local checkpoints by ``dst.checkpoints``; others as Lightning does.

    Lightning's own writes a temporary file elsewhere and copies it, where that is another file system, onto the old one.
    ``SparseTraining`` puts this in its place; no other plugin is replaced.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint in one move.

        Args:
            checkpoint: What to save.
            path: The file, local or remote.
            storage_options: Not used, and refused by Lightning.
        """
        if storage_options is None and "://" not in str(path):
            save_atomically(checkpoint, path)
        else:
            super().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Args:
            path: The file, local or remote.
            map_location: As ``torch.load`` has it; the CPU by default.
            weights_only: ``False`` lets Lightning execute what the file brings: only for files of your own.

        Raises:
            StateError: A local file that is missing, damaged, or holds more than plain values and tensors.
        """
        if weights_only is not False and "://" not in str(path):
            return load_checkpoint(path)
        return super().load_checkpoint(path, map_location or torch.device("cpu"), weights_only)  # type: ignore[arg-type]

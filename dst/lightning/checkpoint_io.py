"""Lightning's plugin for checkpoint files, with the functions of ``dst.checkpoints``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from dst.checkpoints import load_checkpoint, save_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Reads and writes local checkpoints with ``dst.checkpoints``, and remote ones as Lightning does.

    Lightning's own plugin writes a temporary file elsewhere. On another file system, it then copies that file over the old
    one, which is not atomic. ``SparseTraining`` replaces Lightning's own plugin with this one, and no other.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint atomically.

        Args:
            checkpoint: What to save.
            path: The file, local or remote.
            storage_options: Not supported.
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
            map_location: As in ``torch.load``; the CPU by default. Ignored for local files, unless ``weights_only=False``.
            weights_only: ``False`` lets the file execute code: use it for files that you trust only.

        Raises:
            StateError: A local file that is missing or damaged, or that holds more than plain values and tensors.
        """
        if weights_only is not False and "://" not in str(path):
            return load_checkpoint(path)
        return super().load_checkpoint(path, map_location or torch.device("cpu"), weights_only)  # type: ignore[arg-type]

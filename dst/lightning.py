"""The Lightning callback: a thin adapter over a ``Sparsifier``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from dst.backends import prepare
from dst.errors import ConfigurationError
from dst.layers import Selector
from dst.method import Method
from dst.sparsifier import Sparsifier


class SparseTraining(Callback):
    """Trains a ``LightningModule`` sparsely; nothing else in the trainer or the module has to change.

    ```python
    trainer = lightning.Trainer(callbacks=[dst.lightning.SparseTraining(dst.methods.rigl(density=0.1))])
    ```

    The callback owns a ``Sparsifier`` from the start of ``fit`` on (``callback.sparsifier``). Topology updates see the
    gradient accumulated over micro-batches, reduced over ranks, unscaled and unclipped; clipping sees the masked gradient.
    Masks and clock are part of Lightning's checkpoints. ``density``, ``topology/churn``, ``topology/exploration_rate`` and
    ``topology/drop_fraction`` go to the trainer's loggers at every update, density and updates to its progress bar.

    Args:
        method: What to do; see ``dst.methods``.
        total_steps: Optimizer steps of the whole training, where the trainer cannot tell: iterable data with only
            ``max_epochs``, or no end at all. By default the trainer's estimate.
        include: Restrict what is sparse, by name, pattern or module type.
        exclude: Keep dense what these select.
        seed: Seeds every random choice.

    Attributes:
        sparsifier: The ``Sparsifier``, from the start of ``fit`` on; ``None`` before.
    """

    def __init__(
        self,
        method: Method,
        *,
        total_steps: int | None = None,
        include: Iterable[Selector] | None = None,
        exclude: Iterable[Selector] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.method = method
        self.total_steps = total_steps
        self.include = None if include is None else list(include)
        self.exclude = None if exclude is None else list(exclude)
        self.seed = seed
        self.sparsifier: Sparsifier | None = None
        self._pending_state: dict[str, Any] | None = None
        self._logged_updates = -1

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Swap modules where the backend stores only non-zeros; optimizers do not exist yet."""
        prepare(pl_module, self.method)

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Build the ``Sparsifier``: optimizers exist, and a checkpoint's weights are loaded."""
        if self.sparsifier is not None:
            self.sparsifier.finalize()
        self.sparsifier = Sparsifier(
            pl_module,
            trainer.optimizers,
            self.method,
            total_steps=self._total_steps(trainer),
            include=self.include,
            exclude=self.exclude,
            seed=self.seed,
        )
        self._logged_updates = -1
        if self._pending_state is not None:
            self.sparsifier.load_state_dict(self._pending_state)
            self._pending_state = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Clear state of inactive weights: optimizer states of a checkpoint are loaded by now."""
        assert self.sparsifier is not None
        self.sparsifier.mask_optimizer_state()
        self._log(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: Optimizer
    ) -> None:
        """Rewire where an update is due, and mask the gradients."""
        assert self.sparsifier is not None
        self.sparsifier.before_step(optimizer)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log an update that happened at this batch."""
        assert self.sparsifier is not None
        if self.sparsifier.updates + self.sparsifier.is_sparse != self._logged_updates:
            self._log(trainer, pl_module)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Detach from the optimizers; masks stay readable."""
        assert self.sparsifier is not None
        self.sparsifier.finalize()

    def state_dict(self) -> dict[str, Any]:
        """The sparsifier's state, for Lightning's checkpoint."""
        return {} if self.sparsifier is None else self.sparsifier.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until ``on_fit_start``, when the optimizers exist."""
        self._pending_state = state_dict or None

    def _total_steps(self, trainer: lightning.Trainer) -> int:
        if self.total_steps is not None:
            return self.total_steps
        estimate = trainer.estimated_stepping_batches
        if estimate == float("inf") or estimate < 1:
            raise ConfigurationError(
                f"the trainer cannot tell how many optimizer steps training takes (its estimate is {estimate}): "
                "pass SparseTraining(total_steps=...), or set max_steps"
            )
        return int(estimate)

    def _log(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Send the topology's scalars to the loggers and the progress bar."""
        sparsifier = self.sparsifier
        assert sparsifier is not None
        self._logged_updates = sparsifier.updates + sparsifier.is_sparse
        scalars = {
            "density": sparsifier.density,
            "topology/churn": sparsifier.churn,
            "topology/exploration_rate": sparsifier.exploration_rate,
            "topology/drop_fraction": sparsifier.drop_fraction,
            "topology/updates": float(sparsifier.updates),
        }
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=sparsifier.step)
        shown = {"density": sparsifier.density, "updates": float(sparsifier.updates)}
        trainer.progress_bar_metrics.update(shown)

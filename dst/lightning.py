"""The Lightning callback: a thin adapter over a ``Sparsifier``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dst.backends import prepare
from dst.distributed import SparseAllReduce
from dst.errors import ConfigurationError
from dst.layers import Selector
from dst.method import Method
from dst.sparsifier import Sparsifier

_REFUSED_STRATEGIES = {
    "DeepSpeedStrategy": "steps flat copies of the weights, on which no mask can be kept; use ddp or ModelParallelStrategy",
    "FSDPStrategy": "flattens weights, whose layers cannot be told apart; use ModelParallelStrategy (FSDP2) or ddp",
}


class SparseTraining(Callback):
    """Trains a ``LightningModule`` sparsely; nothing else in the trainer or the module has to change.

    ```python
    trainer = lightning.Trainer(callbacks=[dst.lightning.SparseTraining(dst.methods.rigl(density=0.1))])
    ```

    The callback owns a ``Sparsifier`` from the start of training on (``callback.sparsifier``). Topology updates see the
    gradient accumulated over micro-batches, reduced over ranks, unscaled and unclipped; clipping sees the masked gradient.
    Averaged weights (``WeightAveraging``, ``StochasticWeightAveraging``) are kept on the same connections. A second ``fit`` of
    the same module goes on with its connections. Masks and clock are part of Lightning's checkpoints. ``density``, ``topology/churn``, ``topology/exploration_rate`` and
    ``topology/drop_fraction`` go to the trainer's loggers at every update, density and updates to its progress bar.

    Args:
        method: What to do; see ``dst.methods``.
        total_steps: Optimizer steps of the whole training, where the trainer cannot tell: iterable data with only
            ``max_epochs``, or no end at all. By default the trainer's estimate.
        include: Restrict what is sparse, by name, pattern or module type.
        exclude: Keep dense what these select.
        seed: Seeds every random choice.
        compress_gradients: Under DDP, send active gradients alone between processes; see
            ``dst.distributed.SparseAllReduce``.

    Attributes:
        sparsifier: The ``Sparsifier``, from the start of training on; ``None`` before.
        communication: The communication hook, where gradients are compressed; it counts the bytes.
    """

    def __init__(
        self,
        method: Method,
        *,
        total_steps: int | None = None,
        include: Iterable[Selector] | None = None,
        exclude: Iterable[Selector] | None = None,
        seed: int = 0,
        compress_gradients: bool = False,
    ) -> None:
        super().__init__()
        self.method = method
        self.total_steps = total_steps
        self.include = None if include is None else list(include)
        self.exclude = None if exclude is None else list(exclude)
        self.seed = seed
        self.compress_gradients = compress_gradients
        self.sparsifier: Sparsifier | None = None
        self.communication: SparseAllReduce | None = None
        self._pending_state: dict[str, Any] | None = None
        self._fitted: lightning.LightningModule | None = None
        self._logged_updates = -1

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Refuse what cannot work, and swap modules where the backend stores only non-zeros; no optimizers exist yet."""
        strategy = type(trainer.strategy).__name__
        if strategy in _REFUSED_STRATEGIES:
            raise ConfigurationError(f"{strategy} {_REFUSED_STRATEGIES[strategy]}")
        if self.method.backend != "masked":
            device = trainer.strategy.root_device
            if device.type != "cpu" or strategy == "ModelParallelStrategy":
                raise ConfigurationError(
                    f'backend="{self.method.backend}" computes on the CPU and with whole layers, and the trainer uses {device} '
                    f'and {strategy}: pass accelerator="cpu" and no model parallelism, or use backend="masked"'
                )
            # Lightning would call it after this hook; layers built there must exist before they are swapped.
            pl_module.configure_model()
        prepare(pl_module, self.method, seed=self.seed, include=self.include, exclude=self.exclude)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Build the ``Sparsifier``: a checkpoint's weights and optimizer states are loaded by now.

        Not earlier, because callbacks such as the learning-rate finder train and restore the model in ``on_fit_start``.
        """
        sparsifier = self._build(trainer, pl_module)
        sparsifier.mask_optimizer_state()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            average = getattr(callback, "_average_model", None)
            if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)) and average is not None:
                sparsifier.track_average(average)
        if self.compress_gradients:
            self.communication = self._compress(trainer, sparsifier)
        self._log(trainer, pl_module)

    def _build(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> Sparsifier:
        """A sparsifier for this fit: from a checkpoint, from the fit before of the same module, or new."""
        state, previous = self._pending_state, self.sparsifier
        if previous is not None:
            previous.finalize()
            if state is None and self._fitted is pl_module:
                state = previous.state_dict()
                if trainer.global_step == 0:  # another trainer: the schedules begin again, on the connections there are
                    state["steps"] = [0] * len(state["steps"])
        self.sparsifier = Sparsifier(
            pl_module,
            trainer.optimizers,
            self.method,
            total_steps=self._total_steps(trainer),
            include=self.include,
            exclude=self.exclude,
            seed=self.seed,
        )
        if state is not None:
            self.sparsifier.load_state_dict(state)
        self._pending_state, self._fitted, self._logged_updates = None, pl_module, -1
        return self.sparsifier

    def _compress(self, trainer: lightning.Trainer, sparsifier: Sparsifier) -> SparseAllReduce | None:
        wrapped = trainer.strategy.model
        if not isinstance(wrapped, DistributedDataParallel):
            raise ConfigurationError(
                f"compress_gradients needs DistributedDataParallel, and the strategy is {type(trainer.strategy).__name__}; "
                "use strategy=ddp, or leave it off"
            )
        hook = SparseAllReduce(sparsifier)
        wrapped.register_comm_hook(hook, SparseAllReduce.reduce)
        return hook

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
        if self._pending_state is not None and trainer.optimizers:
            self._build(trainer, pl_module)  # a finished run was resumed: nothing was trained, and nothing is lost
        if self.sparsifier is not None:
            self.sparsifier.finalize()

    def state_dict(self) -> dict[str, Any]:
        """The sparsifier's state, for Lightning's checkpoint."""
        if self._pending_state is not None:
            return self._pending_state
        return {} if self.sparsifier is None else self.sparsifier.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until ``on_train_start``, when the optimizers exist."""
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

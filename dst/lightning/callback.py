"""The Lightning callback, an adapter over a ``Sparsifier``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import lightning
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dst.backends import auto, prepare
from dst.engine.gradient_compression import SparseAllReduce
from dst.engine.sparsifier import Sparsifier
from dst.errors import ConfigurationError
from dst.lightning.checkpoint_io import AtomicCheckpointIO
from dst.method import Method, check_method
from dst.topology.layers import Selector

_GRADIENTS = "dst_accumulated_gradients"
_SHARES_AFTER = 0.1  # share of training over which the steps of several optimizers are counted

_REFUSED_STRATEGIES = {
    "DeepSpeedStrategy": "updates flat copies of the weights, which no mask can cover; use ddp or ModelParallelStrategy",
    "FSDPStrategy": "flattens weights, so layers cannot be separated; use ModelParallelStrategy (FSDP2) or ddp",
}


class SparseTraining(Callback):
    """Trains a ``LightningModule`` sparsely, without changes to the module or the trainer.

    ```python
    trainer = lightning.Trainer(callbacks=[dst.lightning.SparseTraining(dst.methods.rigl(density=0.1))])
    ```

    The callback creates a ``Sparsifier`` at the start of training (``callback.sparsifier``).

    - Topology updates use the gradient accumulated over micro-batches, reduced over ranks, unscaled and unclipped. Clipping
      sees the masked gradient.
    - Averaged weights (``WeightAveraging``, ``StochasticWeightAveraging``) have the same masks.
    - A second ``fit`` of the same module continues with its topology.
    - Lightning's checkpoints contain the masks and the clock.
    - The trainer's loggers get ``density``, ``topology/churn``, ``topology/exploration_rate``, ``topology/drop_fraction`` and
      ``topology/updates`` at each update. The progress bar shows density and updates.

    Args:
        method: The method; see ``dst.methods``.
        total_steps: Optimizer steps of the whole training, or one number for each optimizer. Needed if the trainer has no
            estimate: iterable data with only ``max_epochs``, or no end at all. The default is the trainer's estimate. With
            several optimizers, the callback measures their shares of the steps over the first tenth of training and splits
            the estimate accordingly (Lightning's ``max_steps`` counts the steps of all optimizers).
        include: The layers that may be sparse, by name, pattern or module type; all by default.
        exclude: Layers that stay dense.
        seed: Seed of all random choices.
        compress_gradients: Under DDP, send only the gradients of active weights between processes; see
            ``dst.engine.gradient_compression.SparseAllReduce``.
        example: A batch of inputs that ``backend="auto"`` measures with, see ``dst.prepare``; by default the module's
            ``example_input_array``.

    Attributes:
        sparsifier: The ``Sparsifier``; ``None`` before the start of training.
        communication: The communication hook of compressed gradients, which counts the bytes; ``None`` without.

    Raises:
        ConfigurationError: A method that needs another driver, such as ``run_lottery``.
    """

    def __init__(
        self,
        method: Method,
        *,
        total_steps: int | Sequence[int] | None = None,
        include: Iterable[Selector] | None = None,
        exclude: Iterable[Selector] | None = None,
        seed: int = 0,
        compress_gradients: bool = False,
        example: Any = None,
    ) -> None:
        super().__init__()
        check_method(method)
        self.method = method
        self.total_steps = total_steps
        self.include = None if include is None else list(include)
        self.exclude = None if exclude is None else list(exclude)
        self.seed = seed
        self.compress_gradients = compress_gradients
        self.example = example
        self.sparsifier: Sparsifier | None = None
        self.communication: SparseAllReduce | None = None
        self._pending_state: dict[str, Any] | None = None
        self._fitted: lightning.LightningModule | None = None
        self._logged_updates = -1
        self._accumulated = False
        self._pending_gradients: dict[str, Tensor] = {}
        self._following: RemovableHandle | None = None
        self._counted: tuple[float, list[int]] = (0.0, [0])  # progress in [0, 1], and the steps of each optimizer then
        self._dense_steps = 0  # the trainer's steps before sparse training began
        self._shares_known = True  # False until the optimizers' shares of the trainer's steps are measured

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Refuse strategies that are not supported, and swap modules for the csr backend before optimizers exist."""
        strategy = type(trainer.strategy).__name__
        if strategy in _REFUSED_STRATEGIES:
            raise ConfigurationError(f"{strategy} {_REFUSED_STRATEGIES[strategy]}")
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if self.method.backend in ("csr", "auto"):
            device = trainer.strategy.root_device
            if device.type != "cpu" or strategy == "ModelParallelStrategy":
                found = f"needs the CPU and whole layers, and the trainer uses {device} and {strategy}"
                if self.method.backend == "auto":
                    auto.report(f"backend=auto: all layers masked (csr {found})")
                    return
                raise ConfigurationError(
                    f'backend="{self.method.backend}" {found}: pass accelerator="cpu" and no model parallelism, or use '
                    'backend="masked"'
                )
            # Layers must exist before they are swapped. Lightning calls this method after the hook, in these contexts.
            plugin = trainer.precision_plugin
            with trainer.strategy.tensor_init_context(), plugin.module_init_context():
                pl_module.configure_model()
        batch_size = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
        prepare(
            pl_module,
            self.method,
            seed=self.seed,
            include=self.include,
            exclude=self.exclude,
            batch_size=batch_size if isinstance(batch_size, int) else None,
            example=pl_module.example_input_array if self.example is None else self.example,
        )
        if self.method.backend in ("csr", "auto"):
            # Lightning loads a checkpoint's weights after this hook and before it creates optimizers.
            self._following = pl_module.register_load_state_dict_pre_hook(partial(auto.restore_modules, self.seed))

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Remove the hook on loading weights from the module."""
        if self._following is not None:
            self._following.remove()
            self._following = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Build the ``Sparsifier``, after a checkpoint's weights and optimizer states are loaded.

        It cannot be built in ``on_fit_start``, where callbacks such as the learning-rate finder train and restore the model.
        """
        resumed = self._pending_state is not None
        sparsifier = self._build(trainer, pl_module)
        if not resumed:  # the optimizer's state may come from a dense run
            sparsifier.mask_optimizer_state()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            average = getattr(callback, "_average_model", None)
            if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)) and average is not None:
                sparsifier.track_average(average)
        if self.compress_gradients:
            self.communication = self._compress(trainer, sparsifier)
        self._accumulated = bool(self._pending_gradients)
        for name, parameter in pl_module.named_parameters():
            if name in self._pending_gradients:
                parameter.grad = self._pending_gradients[name].to(parameter.device)
        self._pending_gradients = {}
        self._log_if_new(trainer)

    def _build(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> Sparsifier:
        """Build the sparsifier of this fit: from a checkpoint, from the last fit of the same module, or new."""
        state, previous = self._pending_state, self.sparsifier
        # The steps of a dense checkpoint do not count, neither now nor after a resume.
        self._dense_steps = trainer.global_step if state is None else int(state.get("dense_steps", 0))
        if trainer.global_step == 0:
            self._dense_steps = 0
        if previous is not None:
            previous.finalize(ended=False)
            if state is None and self._fitted is pl_module:
                state = previous.state_dict()
        if state is not None and trainer.global_step == 0:
            # Another trainer, or a checkpoint that was only validated: schedules start again with the present topology.
            count = len(state.get("steps", []))
            state = {**state, "steps": [0] * count, "updated_at": [-1] * count, "logged_updates": -1}
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
        several = len(self.sparsifier.steps) > 1 and self.total_steps is None
        self._shares_known, self._counted = not several, (0.0, [0])
        if state is not None:
            if several and isinstance(saved := state.get("total_steps"), list) and any(state.get("steps", [])):
                self.sparsifier.set_total_steps(saved)
                self._shares_known = True
            self.sparsifier.load_state_dict(state)
            self._logged_updates = state.get("logged_updates", -1)
        self._pending_state, self._fitted = None, pl_module
        return self.sparsifier

    def _compress(self, trainer: lightning.Trainer, sparsifier: Sparsifier) -> SparseAllReduce | None:
        wrapped = trainer.strategy.model
        if not isinstance(wrapped, DistributedDataParallel):
            raise ConfigurationError(
                f"compress_gradients needs DistributedDataParallel, but the strategy is {type(trainer.strategy).__name__}; "
                "use strategy=ddp, or leave it off"
            )
        hook = SparseAllReduce(sparsifier)
        wrapped.register_comm_hook(hook, SparseAllReduce.reduce)
        return hook

    def on_before_backward(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: Tensor
    ) -> None:
        """Pass the loss to an init that needs its graph."""
        if self.sparsifier is not None:
            self.sparsifier.before_backward(loss)

    def on_after_backward(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Record that there are gradients that no step has used."""
        self._accumulated = True

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: Optimizer
    ) -> None:
        """Update the topology if an update is due, and mask the gradients."""
        assert self.sparsifier is not None
        self._accumulated = False
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
        if not self._shares_known:
            self._measure_shares(trainer)
        self._log_if_new(trainer)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Detach from the optimizers. Masks stay readable. Warns if training ended before its density was reached."""
        if self._pending_state is not None and trainer.optimizers:
            self._build(trainer, pl_module)  # a finished run was resumed, and nothing was trained
        if self.sparsifier is not None:
            self.sparsifier.finalize()

    def state_dict(self) -> dict[str, Any]:
        """Return the sparsifier's state, for Lightning's checkpoint."""
        if self._pending_state is not None:
            return self._pending_state
        if self.sparsifier is None:
            return {}
        ours = {"logged_updates": self._logged_updates, "dense_steps": self._dense_steps}
        return {**self.sparsifier.state_dict(), **ours}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until ``on_train_start``, when the optimizers exist."""
        self._pending_state = state_dict or None

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save accumulated gradients; without them the next step would miss micro-batches."""
        if not self._accumulated:
            return
        if trainer.world_size > 1:
            rank_zero_warn(
                "a checkpoint within gradient accumulation lacks the gradients of other processes, so a resume from it is "
                "not exact; save after optimizer steps (ModelCheckpoint(every_n_train_steps=...))"
            )
            return
        named = pl_module.named_parameters()
        checkpoint[_GRADIENTS] = {name: p.grad.clone() for name, p in named if p.grad is not None}

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep accumulated gradients until ``on_train_start``."""
        self._pending_gradients = checkpoint.get(_GRADIENTS, {})

    def _measure_shares(self, trainer: lightning.Trainer) -> None:
        """After a tenth of training, derive each optimizer's total steps from the steps that it has taken."""
        sparsifier = self.sparsifier
        assert sparsifier is not None
        # Training ends at the first of two limits: max_steps, over all optimizers, and max_epochs.
        progress = 0.0
        if trainer.max_steps != -1:
            progress = (trainer.global_step - self._dense_steps) / max(1, trainer.max_steps - self._dense_steps)
        if trainer.max_epochs not in (None, -1):
            batches = float(trainer.num_training_batches) * (trainer.max_epochs or 0)
            progress = max(progress, (trainer.fit_loop.total_batch_idx + 1) / batches)
        # When the optimizer with the fewest steps has just stepped, a whole number of rounds is over.
        if min(sparsifier.steps) > min(self._counted[1], default=0):
            self._counted = (progress, sparsifier.steps)
        if progress >= _SHARES_AFTER and all(self._counted[1]):
            at, steps = self._counted
            sparsifier.set_total_steps([max(step + 1, int(step / at + 1e-6)) for step in steps])
            self._shares_known = True

    def _total_steps(self, trainer: lightning.Trainer) -> int | Sequence[int]:
        if self.total_steps is not None:
            return self.total_steps
        estimate = trainer.estimated_stepping_batches
        if estimate == float("inf") or estimate < 1:
            raise ConfigurationError(
                f"the trainer cannot estimate how many optimizer steps training takes (it returns {estimate}): "
                "pass SparseTraining(total_steps=...), or set max_steps"
            )
        left = int(estimate) - self._dense_steps
        if left < 1:
            return int(estimate)  # training is over
        # Under manual optimization max_steps counts the steps of every optimizer.
        shared = len(trainer.optimizers) if trainer.max_steps == estimate else 1
        return max(1, left // shared)

    def _log_if_new(self, trainer: lightning.Trainer) -> None:
        """Send the scalars of the topology to the loggers, once for each new mask, and to the progress bar."""
        sparsifier = self.sparsifier
        assert sparsifier is not None
        shown = {"density": sparsifier.density, "updates": float(sparsifier.updates)}
        trainer.progress_bar_metrics.update(shown)
        if sparsifier.mask_version == self._logged_updates:
            return
        self._logged_updates = sparsifier.mask_version
        scalars = {
            "density": sparsifier.density,
            "topology/churn": sparsifier.churn,
            "topology/exploration_rate": sparsifier.exploration_rate,
            "topology/drop_fraction": sparsifier.drop_fraction,
            "topology/updates": float(sparsifier.updates),
        }
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=sparsifier.step)

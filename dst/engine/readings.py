"""Read-only properties of a training: masks, steps, densities, counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dst.engine.state import Update
from dst.engine.training import Training
from dst.method import Method
from dst.topology.layers import SparseLayer


class Readings:
    """The read-only half of a ``Sparsifier``.

    Args:
        training: The training that is read.
    """

    def __init__(self, training: Training) -> None:
        self._training = training

    @property
    def method(self) -> Method:
        """The method."""
        return self._training.method

    @property
    def seed(self) -> int:
        """What seeds every random choice."""
        return self._training.seed

    @property
    def layers(self) -> Sequence[SparseLayer]:
        """The sparse layers."""
        return self._training.layers

    @property
    def masks(self) -> dict[str, Tensor]:
        """Name of the dense parameter to bool tensor of its shape, True where active. Do not change it in place.

        Masks of DTensor parameters are DTensors of the same layout. The csr backend builds its masks at every call.
        """
        return self._training.storages.masks()

    @property
    def step(self) -> int:
        """Optimizer steps taken (of the first optimizer, where there are several)."""
        return self._training.steppers[0].step

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training (of the first optimizer, where there are several)."""
        return self._training.steppers[0].total

    @property
    def steps(self) -> list[int]:
        """Optimizer steps taken, of each optimizer that holds sparse weights."""
        return [stepper.step for stepper in self._training.steppers]

    @property
    def shortfall(self) -> str | None:
        """How training would miss its target density if it ended now; ``None`` if it would not."""
        target = self.method.density
        if target == 1 or self._training.state.set_density is not None or not any(self.steps):
            return None
        reached = self._training.state.sparsified and all(stepper.has_settled for stepper in self._training.steppers)
        if reached or abs(self.density - target) <= 0.01 * target:
            return None
        taken = ", ".join(f"{stepper.step:,} of {stepper.total:,}" for stepper in self._training.steppers)
        return (
            f"ended at density {self.density:.4g}, target {target:.4g}: {taken} planned optimizer steps were taken; "
            "train to the end, or pass the total_steps that are taken"
        )

    @property
    def updates(self) -> int:
        """Topology updates made."""
        return self._training.state.updates

    @property
    def skipped(self) -> int:
        """Updates skipped because a gradient was not finite."""
        return self._training.state.skipped

    @property
    def step_counts(self) -> dict[str, int]:
        """Optimizer steps by what they cost.

        ``dense``, ``sparse``, or ``dense_gradient`` (sparse, but with the dense gradient computed on purpose).
        """
        return dict(self._training.state.step_counts)

    @property
    def work(self) -> dict[str, dict[str, int]]:
        """Active weights, summed over the optimizer steps of each kind: kind to layer label to number.

        ``dst.metrics.FlopsMeter.add_work`` turns it into the FLOPs of the whole training. A step counts the weights that
        were active in its forward and backward passes, before an update.
        """
        labels = [layer.label for layer in self.layers]
        return {kind: dict(zip(labels, active, strict=True)) for kind, active in self._training.state.work.items()}

    @property
    def backends(self) -> dict[str, str]:
        """Layer label to backend: ``masked``, ``latent`` or ``csr``."""
        return {layer.label: self._training.storages.backend(layer) for layer in self.layers}

    @property
    def is_sparse(self) -> bool:
        """Whether the mask has been made (False in the dense phase of methods that have one)."""
        return self._training.state.sparsified

    @property
    def mask_version(self) -> int:
        """A counter of changes to the masks: 0 before the first mask."""
        return self._training.state.updates + self._training.state.settings + self._training.state.sparsified

    @property
    def active(self) -> int:
        """Active weights over all sparse layers."""
        return sum(self._training.counts(self.layers))

    @property
    def density(self) -> float:
        """Realised density over all sparse layers, in (0, 1]."""
        return self.active / sum(layer.weights for layer in self.layers)

    @property
    def last_update(self) -> Update | None:
        """The last topology update; ``None`` before the first."""
        return self._training.state.last_update

    @property
    def churn(self) -> float:
        """Share of the active connections that the last update made new."""
        return self._training.state.last_update.churn if self._training.state.last_update else 0.0

    @property
    def drop_fraction(self) -> float:
        """The drop fraction of the last update."""
        return self._training.state.last_update.fraction if self._training.state.last_update else 0.0

    @property
    def exploration_rate(self) -> float:
        """ITOP rate: share of the sparse layers' weights that have ever been active since the first mask.

        abs(union of masks) / weights (Liu et al. 2021, https://arxiv.org/abs/2102.02887). Fully dense
        layers are left out; the rate is 1 if all layers are dense.
        """
        partial = [layer for layer in self.layers if self._training.storages.active(layer) < layer.weights]
        explored = sum(self._training.storages.explored(layer) for layer in partial)
        return explored / sum(layer.weights for layer in partial) if partial else 1.0

    def layer_table(self) -> list[dict[str, Any]]:
        """One dict per sparse layer: ``name``, ``shape``, ``weights``, ``nonzero`` (active weights), ``density``."""
        return [
            {
                "name": layer.label,
                "shape": list(layer.shape),
                "weights": layer.weights,
                "nonzero": active,
                "density": active / layer.weights,
            }
            for layer, active in zip(self.layers, self._training.counts(self.layers), strict=True)
        ]

    def mask_of(self, parameter: nn.Parameter) -> Tensor | None:
        """The mask of a parameter that holds inactive weights (its local part's, for a DTensor), ``None`` for others."""
        return self._training.storages.mask_of(parameter)

    def needs_dense_gradient(self, parameter: nn.Parameter) -> bool:
        """Whether the step to come reads the gradient of this parameter's inactive weights.

        True in dense phases, at updates that read the gradient or are followed by a step, and always for scores that watch
        every step.
        """
        return next(s for s in self._training.steppers if any(p is parameter for p in s.parameters)).reads_inactive(
            self._training.state.sparsified
        )

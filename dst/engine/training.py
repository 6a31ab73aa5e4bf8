"""One sparse training: its parts, and what every module of the engine asks of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed import ProcessGroup

from dst.backends.storage import is_finite
from dst.backends.storages import Storages
from dst.engine.state import TrainingState
from dst.engine.steps import OptimizerSteps
from dst.engine.warmup import WarmUp
from dst.errors import ConfigurationError
from dst.method import Method
from dst.pieces.protocols import LayerView, Score
from dst.topology.layers import SparseLayer
from dst.topology.seeding import folded_generator
from dst.topology.sharding import all_agree, local

logger = logging.getLogger("dst.engine.sparsifier")


@dataclass
class Training:
    """The parts of a sparse training. A ``Sparsifier`` owns one and passes it to the functions of the engine.

    Attributes:
        method: The method.
        seed: Seeds every random choice.
        layers: All sparse layers.
        storages: Their weights and masks.
        steppers: The steps of every optimizer that holds sparse parameters.
        group: The processes that train together; ``None`` for all.
        state: Counters, budgets, buffers.
        warming: Warm-up of newly grown weights, if the method has one.
        warned: Warnings already logged.
    """

    method: Method
    seed: int
    layers: Sequence[SparseLayer]
    storages: Storages
    steppers: list[OptimizerSteps]
    group: ProcessGroup | None
    state: TrainingState
    warming: WarmUp | None = None
    warned: set[str] = field(default_factory=set)

    def steps_of(self, optimizer: torch.optim.Optimizer) -> OptimizerSteps:
        """The steps of an optimizer."""
        return next(s for s in self.steppers if s.optimizer is optimizer)

    def layers_of(self, stepper: OptimizerSteps) -> list[SparseLayer]:
        """The layers that an optimizer moves."""
        return [self.layers[index] for index in stepper.layers]

    def counts(self, layers: Iterable[SparseLayer]) -> list[int]:
        """Active weights of each of the layers."""
        return [self.storages.active(layer) for layer in layers]

    def density_at(self, stepper: OptimizerSteps) -> float:
        """The density of the network at the optimizer's coming step."""
        if self.state.set_density is not None:
            return self.state.set_density
        return self.method.density_at(stepper.step, stepper.total)

    def view(self, layer: SparseLayer, role: str, step: int, score: Score) -> LayerView:
        """A layer as a score sees it in its role."""
        return self.storages.view(
            layer,
            folded_generator(self.seed, role, step, layer.label),
            gradient=score.needs_gradient,
            buffer=self.state.buffers.get((role, layer.label)),
        )

    def expect_gradients(self, steppers: Iterable[OptimizerSteps] | None = None) -> None:
        """Announce to the storages whether the coming step of the optimizers reads dense gradients."""
        for stepper in self.steppers if steppers is None else steppers:
            expected = self.method.density < 1 and stepper.reads_inactive(self.state.sparsified)
            self.storages.expect_dense_gradient(stepper.parameters, expected)

    def gradients_are_usable(self, stepper: OptimizerSteps, every_layer: bool = False) -> bool:
        """Whether all of the optimizer's gradients are finite, on all processes.

        Gradients of dense weights count too: a gradient scaler skips the step for any of them.

        Args:
            stepper: The optimizer's steps.
            every_layer: Whether every layer must have a gradient.

        Raises:
            ConfigurationError: A layer has none.
        """
        if every_layer and (missing := [p for p in stepper.parameters if p.grad is None]):
            raise ConfigurationError(
                f"{self.name_of(missing[0])} has no gradient, and {type(self.method.init).__name__} needs one; "
                "exclude it, or let it take part in the loss"
            )
        finite = all(is_finite(local(gradient)) for gradient in stepper.gradients())
        finite = finite and self.storages.collected_is_finite(stepper.parameters)
        finite = all_agree(finite, self.group)
        if not finite:
            self.warn_once("gradients are not finite where the topology needs them; the update is left out")
        return finite

    def check_agreement(self, step: int) -> None:
        """Raise ``StateError`` where the replicated masks of the processes differ."""
        self.storages.check_agreement(step, self.group)

    def name_of(self, parameter: nn.Parameter) -> str:
        """The dense name of a sparse parameter."""
        name = self.storages.name_of(parameter)
        assert name is not None
        return name

    def warn_once(self, message: str) -> None:
        """Log a warning once."""
        if message not in self.warned:
            self.warned.add(message)
            logger.warning(message)

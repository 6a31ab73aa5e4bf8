"""Building a training from a model, optimizers and a method, with every check that can be made before the first step."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from dst.backends import open_storages
from dst.engine.optimizers import as_optimizers, totals_of
from dst.engine.state import TrainingState
from dst.engine.steps import OptimizerSteps, assign
from dst.engine.training import Training
from dst.engine.warmup import WarmUp, check_whole
from dst.errors import ConfigurationError
from dst.method import Method, check_method
from dst.pieces.init import FromFile
from dst.pieces.protocols import waits_for_batch
from dst.planning.first_mask import layer_counts
from dst.topology.layers import SparseLayer

logger = logging.getLogger("dst.engine.sparsifier")


def assemble(
    model: nn.Module,
    layers: Sequence[SparseLayer],
    optimizer: Optimizer | Sequence[Optimizer],
    method: Method,
    *,
    total_steps: int | Sequence[int] | Mapping[Optimizer, int],
    seed: int,
    group: ProcessGroup | None,
) -> Training:
    """Give every layer a storage and an optimizer.

    Args:
        model: The model, unwrapped.
        layers: Its sparse layers.
        optimizer: As in ``dst.Sparsifier``.
        method: The method.
        total_steps: As in ``dst.Sparsifier``.
        seed: Seeds every random choice.
        group: The processes that train together.

    Returns:
        The training before its first mask.

    Raises:
        ConfigurationError: A combination that cannot be trained; the message says what to change.
    """
    optimizers = as_optimizers(optimizer)
    totals = totals_of(total_steps, optimizers)
    storages = open_storages(model, layers, method, seed=seed, group=group)
    steppers = assign(method, optimizers, totals, layers, storages.parameters)
    state = TrainingState(
        sparsified=method.density == 1,
        budgets={layer.label: layer.weights for layer in layers},
        amount=method.amount.initial_state if method.amount is not None else 0.0,
    )
    if method.grown_warmup or method.perturb is not None:
        check_whole(storages.parameters, "grown_warmup" if method.grown_warmup else "perturb")
    warming = WarmUp(method.grown_warmup) if method.grown_warmup else None
    if not isinstance(method.init, FromFile):
        for density in {method.density, _lowest_density(method, steppers)}:
            layer_counts(method, layers, density)
    _check_steps(method, steppers)
    return Training(method, seed, layers, storages, steppers, group, state, warming)


def check_trainable(method: Method) -> None:
    """Raise ``ConfigurationError`` for what one fit cannot train; warn of a method that makes nothing sparse."""
    check_method(method)
    if method.lottery is not None:
        raise ConfigurationError(
            f"{method.name} consists of several fits, and a Sparsifier serves one: "
            "use dst.lightning.lottery_levels.run_lottery, or dst.lottery in a loop of your own"
        )
    if method.narrow is not None and method.narrow.width_factor is None:
        logger.warning(
            "%s makes nothing sparse: the model is trained dense, with the widths that it has; for a narrower one use "
            "python train.py, or build it with the width_factor that dst.models.narrow finds",
            method.name,
        )


def _check_steps(method: Method, steppers: Sequence[OptimizerSteps]) -> None:
    """Refuse a mask that would never be made, and warn of updates that never happen."""
    for stepper in steppers:
        if stepper.mask_step >= stepper.total and method.density < 1:
            raise ConfigurationError(
                f"sparsify_at={method.sparsify_at} is not before the end of training at step {stepper.total}: "
                "the mask would never be made"
            )
    if waits_for_batch(method.init) and len(steppers) > 1:
        raise ConfigurationError(
            f"{type(method.init).__name__} needs every layer's gradient at one step, and the layers belong to "
            f"{len(steppers)} optimizers; use another init, or one optimizer"
        )
    for stepper in steppers if method.is_dynamic and method.density < 1 else []:
        if not stepper.ever_updates:
            logger.warning(
                "%s never updates the topology: no update falls within %d steps (%s); lower update_every or start",
                method.name,
                stepper.total,
                method.clock,
            )


def _lowest_density(method: Method, steppers: Sequence[OptimizerSteps]) -> float:
    """The lowest density of the method's schedule, sampled at a thousand steps."""
    total = max(stepper.total for stepper in steppers)
    return min(method.density_at(step, total) for step in range(0, total, max(1, total // 1000)))

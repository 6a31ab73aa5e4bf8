"""What a step does with gradients beside masking them: observers read them, perturbations add to them."""

from __future__ import annotations

import torch

from dst.engine.steps import OptimizerSteps
from dst.engine.training import Training
from dst.errors import ConfigurationError
from dst.topology.seeding import folded_generator


def refuse_sparse_gradients(training: Training, stepper: OptimizerSteps) -> None:
    """Raise ``ConfigurationError`` for a gradient that is a sparse tensor."""
    for parameter in stepper.parameters:
        gradient = parameter.grad
        if gradient is not None and gradient.layout != torch.strided:
            raise ConfigurationError(
                f"{training.name_of(parameter)} has a sparse gradient; build its module with sparse=False"
            )


def observe(training: Training, stepper: OptimizerSteps) -> bool:
    """Show weights and dense gradients to the observers.

    Returns:
        Whether an observer reads gradients.
    """
    observers = training.method.observers
    if not observers or not stepper.may_update:
        return False
    reads = any(score.needs_gradient for score in observers.values())
    usable = not reads or training.gradients_are_usable(stepper)
    for layer in training.layers_of(stepper):
        for role, score in observers.items():
            view = training.view(layer, role, stepper.step, score)
            if not score.needs_gradient or (usable and view.gradient is not None):
                training.state.buffers[role, layer.label] = score.observe(view.buffer, view)
    return reads


def perturb(training: Training, stepper: OptimizerSteps) -> None:
    """Add the method's perturbation to the gradients of active weights."""
    perturbation = training.method.perturb
    if perturbation is None:
        return
    rates = {id(p): group["lr"] for group in stepper.optimizer.param_groups for p in group["params"]}
    for layer in training.layers_of(stepper):
        parameter = training.storages.parameters[layer.parameter]
        if parameter.grad is not None:
            view = training.storages.view(
                layer,
                folded_generator(training.seed, "perturb", stepper.step, layer.label),
                buffer=training.state.buffers.get(("drop", layer.label)),
            )
            added = perturbation(view, float(rates[id(parameter)])).masked_fill(~view.mask, 0)
            layer.part(parameter.grad).add_(added.to(parameter.grad.dtype))

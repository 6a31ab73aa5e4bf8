"""A topology update from end to end: plan it, let every layer select, then let every layer apply.

The data goes down once and comes back once. ``plan_update`` turns facts of the layers into numbers, ``decide`` turns a
layer's numbers and scores into positions, ``apply`` changes weights, masks and optimizer state.
"""

from __future__ import annotations

from collections.abc import Mapping

from dst.backends.storage import Scoring
from dst.engine.state import Update
from dst.engine.steps import OptimizerSteps
from dst.engine.training import Training
from dst.errors import ConfigurationError, StateError
from dst.pieces.protocols import LayerView, Score
from dst.pieces.scores import Magnitude, Random
from dst.planning.first_mask import layer_counts
from dst.planning.update import LayerFacts, Moment, UpdatePlan, can_score, plan_update
from dst.topology.layers import SparseLayer
from dst.topology.seeding import folded_generator


def update_topology(training: Training, stepper: OptimizerSteps) -> bool:
    """Make the update that is due at an optimizer's coming step.

    Args:
        training: The training.
        stepper: The optimizer's steps; its layers are updated.

    Returns:
        Whether it was made. It is left out where a gradient is not finite.
    """
    method, state, step = training.method, training.state, stepper.step
    if not training.gradients_are_usable(stepper):
        state.skipped += 1
        return False
    stop = stepper.stop_step
    # Where a moving budget settles after the clock's last update, weights are only dropped or grown to meet it.
    replaces = stepper.fires
    fraction = method.fraction(step, stop) if replaces else 0.0
    surplus = None
    if method.surplus is not None and replaces:
        surplus = 0.0 if step >= (stepper.settles_at or 0) else method.surplus(step, stop)
    density, is_set = training.density_at(stepper), state.set_density is not None
    moment = Moment(step, training.seed, density, fraction if replaces else None, surplus, is_set)
    grown = rewire(training, stepper, moment, method.scores(), born=step + method.replace_step)
    training.check_agreement(step)
    state.updates += 1
    stepper.updated_at = step
    active = sum(training.counts(training.layers_of(stepper)))
    state.last_update = Update(step, fraction, grown / max(1, active))
    return True


def set_density(training: Training, density: float) -> None:
    """Prune or grow to another density at once; see ``dst.Sparsifier.set_density``.

    Args:
        training: The training.
        density: The density over all sparse layers, in (0, 1].

    Raises:
        ConfigurationError: A density out of range, one that cannot hold, or prepared layers.
        StateError: There is no mask yet.
    """
    method, state, steppers = training.method, training.state, training.steppers
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise ConfigurationError(f"density={density!r} must lie in (0, 1]: the share of weights that are kept")
    if training.storages.any_prepared:
        raise ConfigurationError(
            f'backend="{method.backend}" stores a fixed number of connections; use backend="masked" to change it'
        )
    if not state.sparsified:
        raise StateError(f"training is dense until step {steppers[0].mask_step}; set the density after it")
    layer_counts(method, training.layers, density)
    state.set_density, state.splits = float(density), {}
    state.settings += 1
    step = steppers[0].step
    scores: dict[str, Score] = {"drop": Magnitude(), "grow": Random()}
    for role, score in method.scores().items():
        if all(can_score(score, training.view(layer, role, step, score)) for layer in training.layers):
            scores[role] = score
    for stepper in steppers:
        moment = Moment(step, training.seed, state.set_density, None, is_set=True)
        rewire(training, stepper, moment, scores, born=stepper.step)
    training.check_agreement(step)


def rewire(
    training: Training, stepper: OptimizerSteps, moment: Moment, scores: Mapping[str, Score], *, born: int
) -> int:
    """Plan an update of the optimizer's layers, select in all of them, then change them.

    Args:
        training: The training.
        stepper: The optimizer's steps.
        moment: When, and at which density.
        scores: The scores by role.
        born: The step that first moves the grown weights.

    Returns:
        How many weights were grown.
    """
    plan = _plan(training, stepper, moment, scores)
    # All layers select before any changes: a score may look at layers that share a parameter.
    selected = [
        (update.layer, training.storages.decide(update, _scoring(training, update.layer, moment.step, scores)))
        for update in plan.layers
    ]
    grown = 0
    for layer, rewiring in selected:
        if rewiring is None:
            training.warn_once(f"{layer.parameter} had no gradient at a topology update and keeps its connections")
            continue
        training.storages.apply(layer, rewiring, stepper.optimizer)
        if training.warming is not None:
            training.warming.follow(layer, rewiring, born)
        grown += rewiring.grown.numel()
    return grown


def _plan(training: Training, stepper: OptimizerSteps, moment: Moment, scores: Mapping[str, Score]) -> UpdatePlan:
    """Plan the update, and keep the budgets that it decides."""
    method, state = training.method, training.state
    moves = method.schedule is not None or state.set_density is not None
    number = training.steppers.index(stepper)
    split, users = state.splits.get(moment.density, ((), set[int]()))
    plan = plan_update(
        method,
        moment,
        layer_facts(training, moment.step),
        stepper.layers,
        scores,
        moves=moves and moment.density != stepper.budget_density,
        split=split if users and number not in users else None,
        amount_state=state.amount,
    )
    state.budgets |= plan.budgets
    state.amount = plan.amount_state
    if plan.split is not None:
        stepper.budget_density = moment.density
        if len(training.steppers) > 1:
            # Other optimizers reach the same densities, perhaps later: the last split and the final one are kept.
            users = {number} if number in users else {*users, number}
            kept = {d: held for d, held in state.splits.items() if d == method.density}
            state.splits = {**kept, moment.density: (plan.split, users)}
    return plan


def layer_facts(training: Training, step: int) -> list[LayerFacts]:
    """What a plan may know of every layer at a step."""

    def facts(layer: SparseLayer) -> LayerFacts:
        def view(role: str, gradient: bool) -> LayerView:
            return training.storages.view(
                layer,
                folded_generator(training.seed, role, step, layer.label),
                gradient=gradient,
                # Redistribution measures layers by the grow score's running mean, where that keeps one.
                buffer=training.state.buffers.get(("grow" if role == "redistribute" else role, layer.label)),
            )

        return LayerFacts(layer, training.storages.active(layer), training.state.budgets[layer.label], view)

    return [facts(layer) for layer in training.layers]


def _scoring(training: Training, layer: SparseLayer, step: int, scores: Mapping[str, Score]) -> Scoring:
    buffers = {role: buffer for (role, label), buffer in training.state.buffers.items() if label == layer.label}
    return Scoring(scores, buffers, lambda role: folded_generator(training.seed, role, step, layer.label))

"""Plans a topology update: pure functions from a method and facts of the layers to counts.

``plan_update`` decides how many weights each layer drops and grows. It changes nothing: the engine keeps the new budgets,
and the storages select and apply. The facts of a layer are its counts and, on request, its views. A plan needs no model.

In order: the layers' budgets follow the network's density, each layer's drop and growth follow from its budget, budget may
move between layers, changes are rounded to the pattern, and weights that lie on no path are dropped in addition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dst.method import Method
from dst.pieces.allocation import network_budget
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import LayerStat, LayerView, Pattern, Score
from dst.pieces.scores import Magnitude
from dst.planning.budget import Change, leave_none_empty, only_shrinking, plan_change, scaled
from dst.planning.first_mask import layer_counts
from dst.topology.chains import incomplete, sequences
from dst.topology.layers import SparseLayer
from dst.topology.seeding import folded_generator
from dst.topology.selection import top_indices


@dataclass(frozen=True)
class LayerFacts:
    """What the plan may read of a layer.

    Attributes:
        layer: Its name and shape.
        active: Its active weights.
        budget: Its budget at the last update.
        view: From a role (``"drop"``, ``"redistribute"``) and whether the gradient is read to the layer's view.
    """

    layer: SparseLayer
    active: int
    budget: int
    view: Callable[[str, bool], LayerView]


@dataclass(frozen=True)
class LayerUpdate:
    """What an update does to one layer.

    Attributes:
        layer: The layer.
        drop: Weights to drop.
        grow: Weights to grow.
        pattern: Which weights are active together.
        regrow_dropped: As in ``dst.topology.rewiring.rewire``.
        forced_drops: Sorted positions of active weights that are dropped before any other, int64, or ``None``.
    """

    layer: SparseLayer
    drop: int
    grow: int
    pattern: Pattern
    regrow_dropped: bool
    forced_drops: Tensor | None = None


@dataclass(frozen=True)
class UpdatePlan:
    """A planned update.

    Attributes:
        layers: The layers that change.
        budgets: Label of each updated layer to its budget, before rounding to the pattern.
        split: The budgets of all layers at the update's density, in their order, if the network's budget moved.
        amount_state: The state of the method's ``amount``.
    """

    layers: tuple[LayerUpdate, ...]
    budgets: Mapping[str, int]
    split: tuple[int, ...] | None
    amount_state: float


@dataclass(frozen=True)
class Moment:
    """The step and the density of an update.

    Attributes:
        step: The optimizer step, which seeds ties.
        seed: The run's seed.
        density: The network's density, in (0, 1].
        fraction: Share of the active weights to replace, in [0, 1]; ``None`` to meet budgets without replacing.
        surplus: Share of the budget to hold beyond it instead of replacing, or ``None``.
        is_set: Whether a user set the density, instead of the method's schedule.
    """

    step: int
    seed: int
    density: float
    fraction: float | None
    surplus: float | None = None
    is_set: bool = False


def plan_update(
    method: Method,
    moment: Moment,
    facts: Sequence[LayerFacts],
    mine: Sequence[int],
    scores: Mapping[str, Score],
    *,
    moves: bool = False,
    split: Sequence[int] | None = None,
    amount_state: float = 0.0,
) -> UpdatePlan:
    """Decide how many weights an update drops and grows in each layer.

    Args:
        method: The method.
        moment: Step and density.
        facts: All sparse layers.
        mine: Indices of the layers that are updated; budgets cover all.
        scores: The scores by role; without ``"grow"``, weights are only dropped.
        moves: Whether the network's budget has moved since the facts' budgets were split.
        split: The budgets of all layers at the update's density, if they were split before, for the layers of another
            optimizer.
        amount_state: What ``amount`` returned at the last update.

    Returns:
        The plan. ``active - drop + grow`` meets each layer's budget, up to its pattern.
    """
    pattern = method.pattern_at(moment.density)
    if moves and split is None:
        split = moved_budgets(method, moment, facts)
    budgets = [fact.budget for fact in facts] if split is None or not moves else list(split)
    # If budget moves between layers, a layer that has become full may give some back.
    gives = method.redistribute is not None and moment.fraction is not None and moment.density < 1
    chosen = [
        i
        for i in mine
        if (gives and pattern.unsupported_reason(facts[i].layer) is None)
        or not facts[i].active == budgets[i] == facts[i].layer.weights
    ]
    here = [replace(facts[i], budget=budgets[i]) for i in chosen]
    amounts: Sequence[int | None] = [None] * len(here)
    if method.amount is not None and moment.fraction is not None:
        views = [fact.view("drop", scores["drop"].needs_gradient) for fact in here]
        amounts, amount_state = method.amount.counts(views, [scores["drop"](view) for view in views], amount_state)
    changes = [
        plan_change(
            fact.active,
            fact.budget,
            fact.layer.weights,
            fraction=moment.fraction or 0.0,
            grows="grow" in scores,
            surplus=moment.surplus if moment.fraction is not None else None,
            amount=amount,
        )
        for fact, amount in zip(here, amounts, strict=True)
    ]
    if method.redistribute is not None and moment.fraction is not None:
        changes = redistributed(method, here, changes)
        for i, fact, change in zip(chosen, here, changes, strict=True):
            budgets[i] = fact.active - change.drop + change.grow
    if pattern.is_grouped:
        changes = [in_whole_groups(pattern, fact, change) for fact, change in zip(here, changes, strict=True)]
    forced: Mapping[str, Tensor] = {}
    if method.chain_removal and moment.fraction is not None:
        drops = {fact.layer.label: change.drop for fact, change in zip(here, changes, strict=True)}
        forced = drops_off_every_path(method, moment, facts, drops)
    updates = (
        _layer_update(method, pattern, fact.layer, change, forced.get(fact.layer.label))
        for fact, change in zip(here, changes, strict=True)
    )
    return UpdatePlan(
        tuple(update for update in updates if update.drop + update.grow),
        {facts[i].layer.label: budgets[i] for i in mine},
        tuple(split) if moves and split is not None else None,
        amount_state,
    )


def _layer_update(
    method: Method, pattern: Pattern, layer: SparseLayer, change: Change, forced: Tensor | None
) -> LayerUpdate:
    more = 0 if forced is None else forced.numel()
    return LayerUpdate(
        layer,
        change.drop + more,
        change.grow + more,
        pattern if pattern.unsupported_reason(layer) is None else Unstructured(),
        method.regrow_dropped or change.grow == 0,
        forced,
    )


def moved_budgets(method: Method, moment: Moment, facts: Sequence[LayerFacts]) -> list[int]:
    """The layers' budgets at another density of the network.

    Args:
        method: The method.
        moment: The density to move to.
        facts: All sparse layers.

    Returns:
        Active weights per layer.
    """
    density, layers = moment.density, [fact.layer for fact in facts]
    pattern = method.pattern_at(density)
    if density == 1 or not pattern.is_free:
        return _known(layer_counts(method, layers, density))
    free = [fact for fact in facts if pattern.unsupported_reason(fact.layer) is None]
    active = [fact.active for fact in free]
    wanted = network_budget([fact.layer.shape for fact in free], density)
    if method.allocation.needs_scores and wanted < sum(active):
        return _known(layer_counts(method, layers, density, [survival(method, fact) for fact in facts]))
    if method.allocation.needs_scores or method.redistribute is not None:
        # Growth has no network-wide threshold, and redistributed budget stays where it is. Layers scale in proportion.
        shares = scaled(active, wanted, [fact.layer.weights for fact in free])
        fitted = {x.layer.label: pattern.fit(x.layer, share) for x, share in zip(free, shares, strict=True)}
        return [fitted.get(layer.label, layer.weights) for layer in layers]
    counts = _known(layer_counts(method, layers, density))
    if method.grow is None and not moment.is_set and not pattern.is_grouped:
        # Rounding may raise a layer's share by one weight while the network's falls.
        counts = only_shrinking([fact.active for fact in facts], counts)
    return counts


def _known(counts: list[int] | None) -> list[int]:
    assert counts is not None  # only an allocation by scores has no counts before there are scores
    return counts


def redistributed(method: Method, facts: Sequence[LayerFacts], changes: Sequence[Change]) -> list[Change]:
    """The changes with their growth split over the layers as the method's redistribution says."""
    redistribute = method.redistribute
    assert redistribute is not None

    def strength(fact: LayerFacts) -> float:
        return redistribute.measure(fact.view("redistribute", True)) if redistribute.needs_gradient else 0.0

    stats = [
        LayerStat(fact.layer.weights, fact.active - change.drop, strength(fact))
        for fact, change in zip(facts, changes, strict=True)
    ]
    grown = redistribute.grow_counts(stats, sum(change.grow for change in changes))
    return leave_none_empty(stats, [Change(c.drop, g) for c, g in zip(changes, grown, strict=True)])


def in_whole_groups(pattern: Pattern, fact: LayerFacts, change: Change) -> Change:
    """The change rounded to whole groups."""
    layer, kept = fact.layer, fact.active - change.drop
    target = layer.weights if pattern.unsupported_reason(layer) else pattern.fit(layer, kept + change.grow)
    return Change(change.drop + max(0, kept - target), max(0, target - kept))


def survival(method: Method, fact: LayerFacts) -> Tensor:
    """Drop scores, lowest where inactive; magnitudes if the method's score cannot be computed now."""
    drop: Score = method.drop or Magnitude()
    view = fact.view("drop", drop.needs_gradient)
    if not can_score(drop, view):
        drop = Magnitude()
    scores = drop(view)
    return scores.masked_fill(~view.mask, torch.finfo(scores.dtype).min)


def can_score(score: Score, view: LayerView) -> bool:
    """Whether the view has what the score reads."""
    if score.observes:
        return view.buffer is not None
    return view.gradient is not None or not score.needs_gradient


def drops_off_every_path(
    method: Method, moment: Moment, facts: Sequence[LayerFacts], drops: Mapping[str, int]
) -> dict[str, Tensor]:
    """Weights that lie on no path from input to output after the planned drop.

    Args:
        method: Its drop score ranks the weights.
        moment: Seeds ties.
        facts: All sparse layers.
        drops: Label of each layer that may change to the number of weights it drops.

    Returns:
        Label to sorted positions, int64.
    """
    known = {fact.layer.label: fact for fact in facts}
    found = {}
    for run in sequences([fact.layer for fact in facts]):
        masks = []
        for layer in run:
            fact = known[layer.label]
            active = fact.view("drop", False).mask.reshape(-1)
            positions = active.nonzero().squeeze(1)
            kept = torch.zeros_like(active)
            ties = folded_generator(moment.seed, "ties", moment.step, layer.label)
            scores = survival(method, fact).reshape(-1)[positions]
            kept[positions[top_indices(scores, positions.numel() - drops.get(layer.label, 0), ties)]] = True
            masks.append(kept.view(layer.shape).movedim(layer.output_dim, 0))
        for layer, broken in zip(run, incomplete(masks), strict=True):
            if layer.label in drops:
                found[layer.label] = broken.movedim(0, layer.output_dim).reshape(-1).nonzero().squeeze(1)
    return found

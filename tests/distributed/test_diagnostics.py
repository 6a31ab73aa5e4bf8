"""Diagnostics over processes: replicated values stay as they are, divided values are reduced."""

from __future__ import annotations

from typing import Any

import torch

from dst import metrics
from dst.errors import ConfigurationError
from tests.distributed.processes import run

LOSSES = [[1.0, 1.0, 5.0, 1.0], [3.0, 3.0, 3.0, 3.0]]


def masks(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"a": torch.rand(6, 8, generator=generator) < 0.3, "b": torch.rand(4, 6, generator=generator) < 0.3}


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(50 + step)
    return {name: torch.randn(mask.shape, generator=generator) for name, mask in masks(step).items()}


def updated(steps: range, losses: list[float]) -> dict[str, Any]:
    """Every diagnostic's value after these steps."""
    chosen: dict[str, Any] = {
        "density": metrics.MaskDensity(),
        "churn": metrics.MaskChurn(),
        "jaccard": metrics.MaskOverlap(),
        "nm": metrics.NMConformance(1, 4),
        "dead": metrics.DeadUnits("inputs"),
        "effective": metrics.EffectiveDensity(),
        "collapsed": metrics.CollapsedLayers(),
        "explored": metrics.ExplorationRate({"a": (6, 8), "b": (4, 6)}),
        "norms": metrics.GradientNorms(),
        "degrees": metrics.InDegreeHistogram(8),
        "spikes": metrics.LossSpikes(window=1),
    }
    for step in steps:
        now, next_ = masks(step), masks(step + 1)
        for name in ("density", "nm", "dead", "collapsed", "explored"):
            chosen[name].update(now)
        chosen["churn"].update(now, next_)
        chosen["jaccard"].update(now, next_)
        chosen["effective"].update(list(now.values()))
        chosen["norms"].update(gradients(step), now)
        chosen["degrees"].update(now["a"])
    for step, loss in enumerate(losses):
        chosen["spikes"].update(loss, updated=step == 1)
    return {name: metric.compute() for name, metric in chosen.items()}


def replicated(rank: int, world: int) -> dict[str, Any]:
    return updated(range(3), LOSSES[rank])


def divided(rank: int, world: int) -> dict[str, Any]:
    return updated(range(2 * rank, 2 * rank + 2), LOSSES[rank])


def uneven(rank: int, world: int) -> Any:
    return updated(range(3), LOSSES[rank][: 3 + rank])["spikes"]


def flat(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    norms = values.pop("norms")
    return {**values, "norms": torch.stack([norms["active"], norms["inactive"]])}


def test_what_is_the_same_on_all_processes_stays_and_losses_are_averaged():
    alone = flat(updated(range(3), [2.0, 2.0, 4.0, 2.0]))
    for values in run(replicated, 2):
        values = flat(values)
        assert values.keys() == alone.keys()
        for name, value in values.items():
            torch.testing.assert_close(value, alone[name], msg=name)
        assert values["spikes"] == 1


def test_what_processes_saw_apart_is_joined():
    alone = flat(updated(range(4), [2.0, 2.0, 4.0, 2.0]))
    own = flat(updated(range(2), [2.0, 2.0, 4.0, 2.0]))
    first, second = (flat(values) for values in run(divided, 2))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], msg=name)
        torch.testing.assert_close(value, alone[name], msg=name)
    different = {name for name in own if not torch.equal(own[name], alone[name])}
    assert different >= {"density", "churn", "jaccard", "nm", "dead", "effective", "explored", "norms", "degrees"}


def test_processes_that_took_different_numbers_of_steps_are_refused():
    for error in run(uneven, 2):
        assert isinstance(error, ConfigurationError)
        assert "different numbers of steps" in str(error)

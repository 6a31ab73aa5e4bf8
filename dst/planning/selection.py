"""Which weights an update of a layer drops and grows, as a pure function of scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dst.pieces.protocols import AfterDropScore, LayerView, Score, as_sampler
from dst.planning.update import LayerUpdate
from dst.topology.rewiring import Rewiring, fill_at_, rewire
from dst.topology.selection import best_free


def select(
    update: LayerUpdate, scores: Mapping[str, Score], views: Mapping[str, LayerView], ties: torch.Generator
) -> Rewiring:
    """Select what a layer drops and grows, within its pattern.

    Args:
        update: How many.
        scores: ``"drop"``, and ``"grow"`` where ``update.grow`` is not 0.
        views: The layer at its dense shape, as each of the scores sees it; their masks are the same.
        ties: CPU generator that breaks ties.

    Returns:
        The positions; nothing is changed.
    """
    layer, mask = update.layer, views["drop"].mask
    drop_scores = scores["drop"](views["drop"])
    if update.forced_drops is not None:
        drop_scores = fill_at_(drop_scores.clone(), update.forced_drops.to(mask.device), -math.inf)
    if update.pattern.is_grouped:
        # Where nothing is to grow, scopes that have lost more than others get back the best of their own.
        lowest = torch.finfo(drop_scores.dtype).min
        return update.pattern.rewire(
            layer,
            mask,
            drop_scores,
            scores["grow"](views["grow"]) if update.grow else drop_scores.masked_fill(~mask, lowest),
            update.drop,
            update.grow,
            regrow_dropped=update.regrow_dropped,
            generator=ties,
        )
    active = mask.reshape(-1).nonzero().squeeze(1)

    def choose(count: int, excluded: Tensor) -> Tensor:
        if count == 0:
            return excluded[:0]
        return grow_positions(update, scores["grow"], views["grow"], count, excluded, ties)

    return rewire(
        active,
        drop_scores.take(active),
        layer.weights,
        update.drop,
        update.grow,
        choose,
        regrow_dropped=update.regrow_dropped,
        generator=ties,
    )


def grow_positions(
    update: LayerUpdate, grow: Score, view: LayerView, count: int, excluded: Tensor, ties: torch.Generator
) -> Tensor:
    """Sorted positions of ``count`` weights to grow, none of them excluded."""
    sampler = as_sampler(grow)
    if sampler is not None:
        return sampler.sample(update.layer.weights, excluded, count, view.generator)
    if isinstance(grow, AfterDropScore) and grow.after_drop and update.regrow_dropped:
        # The excluded weights are those that the drop kept.
        view = replace(view, mask=fill_at_(torch.zeros_like(view.mask), excluded, 1))
    return best_free(grow(view), count, excluded, ties)

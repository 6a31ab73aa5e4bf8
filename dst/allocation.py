"""Allocations: how a budget is split over layers."""

from dst.pieces.allocation import ER, ERK, Global, PerLayer, Shape, Uniform, network_budget, planned_counts

__all__ = ["ER", "ERK", "Global", "PerLayer", "Shape", "Uniform", "network_budget", "planned_counts"]

"""Layers, masks and positions: what a topology is, without a method or a training."""

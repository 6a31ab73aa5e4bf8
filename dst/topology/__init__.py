"""Sparse layers, masks and positions. Nothing here knows a method or a training loop."""

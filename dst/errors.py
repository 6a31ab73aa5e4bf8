"""Exceptions that name the offender and the remedy."""

from __future__ import annotations


class ConfigurationError(ValueError):
    """A setting, a model or a combination of them that dst cannot train; the message says what to change."""


class DataError(ConfigurationError):
    """A data set that is missing, incomplete or damaged; the message names the file and where it belongs."""


class StateError(RuntimeError):
    """A saved state that does not belong to this model, method or version, or that is damaged."""

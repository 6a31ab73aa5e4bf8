"""Exceptions. Their messages say what is wrong and how to fix it."""

from __future__ import annotations


class ConfigurationError(ValueError):
    """A setting, a model, or a combination of them is not supported. The message says what to change."""


class DataError(ConfigurationError):
    """A data set is missing, incomplete or damaged. The message names the file and where it belongs."""


class StateError(RuntimeError):
    """A saved state is damaged, or belongs to another model, method or version."""

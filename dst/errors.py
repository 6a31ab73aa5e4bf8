"""Exceptions. Their messages say what is wrong and how to fix it."""

from __future__ import annotations


class ConfigurationError(ValueError):
    """A setting, a model, or a combination of them is not supported. The message says what to change."""


class DataError(ConfigurationError):
    """A data set is missing, incomplete or damaged. The message names the file and where it belongs."""


class StateError(RuntimeError):
    """A saved state is damaged, or belongs to another model, method or version."""


def missing_package(what: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """Say which package ``what`` needs, and the remedy.

    Args:
        what: The public name that was asked for.
        error: The error of the import that failed.

    Returns:
        The error to raise; ``error`` itself if the missing module is part of dst.
    """
    package = (error.name or "dst").partition(".")[0]
    if package == "dst":
        return error
    return ModuleNotFoundError(
        f"{what} needs {package}, which is not installed; reinstalling dst installs its dependencies", name=error.name
    )

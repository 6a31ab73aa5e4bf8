"""Objects from nodes of the configuration, and errors that name the setting they come from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from dst.errors import ConfigurationError


def make(node: DictConfig, **arguments: Any) -> Any:
    """Instantiate a node of the configuration.

    Args:
        node: The node, with its class or function in ``_target_``.
        **arguments: Further arguments. They are passed on as they are: Hydra itself would copy objects.

    Returns:
        The object; ``None`` without a ``_target_``; the factory if the node has ``_partial_: true``.

    Raises:
        ConfigurationError: The class refuses its arguments; names the node.
    """
    if node.get("_target_") is None:
        return None
    factory = factory_of(node)
    with naming(str(node._get_full_key(None))):
        return factory if node.get("_partial_") else factory(**arguments)


def factory_of(node: DictConfig) -> Any:
    """Return a ``functools.partial`` of the node's class or function and its settings."""
    return instantiate(node, _partial_=True, _convert_="all")


@contextmanager
def naming(setting: str) -> Iterator[None]:
    """Turn any error raised within into a ``ConfigurationError`` that names the setting."""
    try:
        yield
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(f"{setting}: {error}") from error

"""Checks of a configuration that no single class can make: values, and settings that do not go together."""

from __future__ import annotations

import inspect
import math
from typing import Any

from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from omegaconf import DictConfig

from dst.cli.objects import factory_of
from dst.data.module import Task
from dst.errors import ConfigurationError
from dst.lightning.best_checkpoint import SELECTIONS
from dst.method import Method


def check_values(cfg: DictConfig) -> None:
    """Refuse values that are out of range, that train nothing, or that train nothing but NaN."""
    if not 0 < cfg.density <= 1:
        raise ConfigurationError(f"density={cfg.density} must lie in (0, 1]: the share of weights that are kept")
    if not 0 <= cfg.seed < 2**32:
        raise ConfigurationError(f"seed={cfg.seed} must lie in [0, 2**32)")
    for name in ("max_epochs", "max_steps", "limit_train_batches"):
        if (value := cfg.trainer.get(name)) is not None and value == 0:
            raise ConfigurationError(f"trainer.{name}={value}: nothing would be trained; leave it out, or raise it")
    for setting, number in cfg.optimizer.items():
        if isinstance(number, float) and not math.isfinite(number):
            raise ConfigurationError(
                f"optimizer.{setting}={number} is not finite: no weight would be after the first step"
            )


def check_backend(cfg: DictConfig, method: Method) -> None:
    """Refuse a backend for a method that takes none."""
    if cfg.backend not in ("masked", "auto") and "backend" not in cfg.sparsity:
        raise ConfigurationError(
            f"{method.name} stores {method.backend} weights and does not support backend={cfg.backend}: leave it out"
        )


def check_selection(cfg: DictConfig, method: Method, datamodule: Any) -> None:
    """Refuse ``select=validation`` without validation samples, or for a method that tests its last weights."""
    if cfg.select not in SELECTIONS:
        raise ConfigurationError(f"select={cfg.select} is unknown; choose from {', '.join(SELECTIONS)}")
    if cfg.select == "last":
        return
    if method.lottery is not None:
        raise ConfigurationError(f"{method.name} rewinds and trains to the end, level by level: use select=last")
    if not getattr(datamodule, "validation", 1) or not cfg.trainer.limit_val_batches:
        raise ConfigurationError(
            f"select={cfg.select} needs samples that are held out of training: set data.validation above 0, such as "
            "data.validation=0.1, and leave trainer.limit_val_batches at 1.0"
        )


def check_match(cfg: DictConfig, task: Task) -> None:
    """Refuse a model for other data, such as a model of text for images."""
    parameters = inspect.signature(factory_of(cfg.model).func).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    if missing := [name for name in task.arguments if name not in parameters]:
        raise ConfigurationError(
            f"the model {cfg.model._target_} is not made for {cfg.data._target_}, which describes its task by "
            f"{' and '.join(task.arguments)}: it takes no {' and no '.join(missing)}; choose another model= or data="
        )


def check_launcher(launcher: Any) -> None:
    """Refuse, within a sweep, a strategy that starts the command again for every device."""
    if isinstance(launcher, _SubprocessScriptLauncher):
        raise ConfigurationError(
            "this strategy starts the command once more for every device, which in a sweep would repeat the "
            "sweep: use trainer.strategy=ddp_fork or ddp_spawn, trainer.devices=1, or separate commands"
        )

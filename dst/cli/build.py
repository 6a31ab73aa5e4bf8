"""Building what a configuration describes: method, data, module. Nothing is written but downloads of the data."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning
import torch
from hydra.utils import to_absolute_path
from omegaconf import DictConfig

from dst.cli.checks import check_backend, check_match, check_selection, check_values
from dst.cli.objects import factory_of, make, naming
from dst.data.module import Task, image_task
from dst.method import Method
from dst.metrics.conventions import convention_of
from dst.metrics.counting import Operations, count_operations
from dst.models.classifier import Classifier
from dst.models.narrowing import build_on_meta, check_takes_width_factor, narrow
from dst.planning.first_mask import layer_counts
from dst.topology.layers import SparseLayer, find_layers


@dataclass(frozen=True)
class FullSize:
    """The dense network of full size that a narrower one is compared with: its layers and operations."""

    layers: Sequence[SparseLayer]
    operations: Operations


@dataclass(frozen=True)
class Parts:
    """What a configuration describes, built and checked.

    Attributes:
        method: The method.
        datamodule: The Lightning data module.
        module: The Lightning module, not trained.
        layers: The weights that the method makes sparse.
        operations: Operations of one sample's forward pass.
        example: A sample's shape, or a batch; see `dst.data.Task`.
        full_size: The network of full size if the method narrows the module, else ``None``.
    """

    method: Method
    datamodule: Any
    module: Classifier
    layers: Sequence[SparseLayer]
    operations: Operations
    example: Sequence[int] | torch.Tensor
    full_size: FullSize | None = None


def build(cfg: DictConfig) -> Parts:
    """Build and check everything but the trainer.

    Args:
        cfg: The composed ``conf/train.yaml``.

    Returns:
        The parts of the run.

    Raises:
        ConfigurationError: A setting, or a combination of settings, that cannot be trained; data that is missing.
    """
    check_values(cfg)
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    method = make(cfg.sparsity)
    check_backend(cfg, method)
    datamodule = _read_data(cfg.data)
    convention_of(cfg.convention)
    check_selection(cfg, method, datamodule)
    task = _task(datamodule)
    optimizer, scheduler = make(cfg.optimizer), make(cfg.scheduler)
    check_match(cfg, task)

    def make_module(**settings: Any) -> Classifier:
        return task.module(make(cfg.model, **task.arguments, **settings), optimizer, scheduler)

    full_size = None
    if method.narrow is None:
        module = make_module()
    else:
        method, module, full_size = _narrow(cfg, method, make_module, task)
    with naming("optimizer, scheduler"):
        trial = optimizer(module.parameters())
        if scheduler is not None:
            scheduler(trial, 100)
    layers, _ = find_layers(module, cfg.include, cfg.exclude)
    layer_counts(method, layers, method.density)  # a budget that cannot be met fails here, not late in training
    with naming("model"):
        operations = count_operations(module, task.example)
    return Parts(method, datamodule, module, layers, operations, task.example, full_size)


def _read_data(node: DictConfig) -> Any:
    """The data module, with its data in memory on the first process of each machine."""
    places = {key: to_absolute_path(node[key]) for key in ("root", "path") if node.get(key) is not None}
    datamodule = make(node, **places)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # the other processes find the files that this one downloaded
        datamodule.prepare_data()
        datamodule.setup("fit")
    return datamodule


def _task(datamodule: Any) -> Task:
    """The task of the data; data modules with an image shape and classes only are image classification."""
    task = getattr(datamodule, "task", None)
    return task if isinstance(task, Task) else image_task(datamodule.input_shape, datamodule.num_classes)


def _narrow(
    cfg: DictConfig, method: Method, make_module: Callable[..., Classifier], task: Task
) -> tuple[Method, Classifier, FullSize]:
    """Build the module as narrow as the method asks, and record the width factor in the method."""
    assert method.narrow is not None
    model = factory_of(cfg.model)
    check_takes_width_factor(model.func)
    width = cfg.model.get("width_factor", 1.0)  # of full size

    def of_width(width_factor: float) -> Classifier:
        return make_module(width_factor=width * width_factor)

    of_width.__name__ = model.func.__name__  # error messages show it
    found = narrow(
        of_width,
        method.narrow.density,
        method.narrow.match,
        example=task.example,
        include=cfg.include,
        exclude=cfg.exclude,
    )
    whole = build_on_meta(of_width, 1.0)
    layers, _ = find_layers(whole, cfg.include, cfg.exclude)
    method = replace(method, narrow=replace(method.narrow, width_factor=found.width_factor))
    return method, of_width(found.width_factor), FullSize(layers, count_operations(whole, task.example))

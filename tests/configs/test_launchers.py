"""Launcher presets for sweeps compose, and set only settings that the launchers have."""

from __future__ import annotations

import inspect

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class

from dst.cli import main as cli


def launcher(*overrides):
    cli.register_schema()
    with initialize_config_dir(str(cli.config_dir()), version_base="1.3"):
        return compose("train", list(overrides), return_hydra_config=True).hydra.launcher


@pytest.mark.parametrize(
    ("preset", "target", "settings"),
    [
        ("workers", "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher", {"n_jobs": 2}),
        (
            "slurm",
            "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
            {"timeout_min": 240, "cpus_per_task": 4, "mem_gb": 16, "array_parallelism": 16},
        ),
    ],
)
def test_presets_set_what_their_launchers_take(preset, target, settings):
    composed = launcher(f"hydra/launcher={preset}")
    assert composed._target_ == target
    assert {name: composed[name] for name in settings} == settings
    constructor = inspect.signature(get_class(target).__init__).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in constructor.values()):
        assert set(composed) - {"_target_"} <= set(constructor)


def test_presets_take_overrides():
    assert launcher("hydra/launcher=workers", "hydra.launcher.n_jobs=7").n_jobs == 7
    assert launcher("hydra/launcher=slurm", "hydra.launcher.partition=long").partition == "long"


def test_the_ray_preset_composes_without_ray():
    composed = launcher("hydra/launcher=ray_cluster", "hydra.launcher.ray.remote.num_cpus=4")
    assert composed._target_ == "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher"
    assert set(composed) == {"_target_", "ray"}
    assert composed.ray == {"init": {"address": "auto"}, "remote": {"num_cpus": 4, "max_calls": 1}}

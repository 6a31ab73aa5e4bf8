"""The short version of experiments/method_grid: every method is in the sweep, and a few run by it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dst.cli.main import config_dir, register_schema
from dst.cli.train import run

REPOSITORY = Path(__file__).parents[2]
ROOTS = [os.environ.get("DST_DATA_ROOT"), REPOSITORY / "data", REPOSITORY.parent / "shared" / "data"]
ROOT = next((Path(r) for r in ROOTS if r and (Path(r) / "fashion-mnist").is_dir()), None)


def test_the_sweep_has_every_method() -> None:
    grid = OmegaConf.load(config_dir() / "experiment" / "method_grid.yaml")
    swept = {name.strip() for name in str(grid.hydra.sweeper.params.sparsity).split(",")}
    assert swept == {path.stem for path in (config_dir() / "sparsity").glob("*.yaml")}


@pytest.mark.skipif(ROOT is None, reason="Fashion-MNIST is not here: set DST_DATA_ROOT to the folder that holds it")
def test_methods_of_every_kind_run_by_it(tmp_path: Path) -> None:
    register_schema()
    found = {}
    for method in ("small_dense", "synflow", "snfs", "ac_dc"):
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            cfg = compose(
                "train",
                [
                    "experiment=method_grid",
                    f"sparsity={method}",
                    "density=0.1",
                    f"data.root={ROOT}",
                    "trainer.max_epochs=1",
                    "trainer.limit_train_batches=40",
                    "report=false",
                ],
            )
        found[method] = run(cfg, tmp_path / method)
    for method, summary in found.items():
        assert summary.steps == 40
        assert summary.test.accuracy > 0.5
        if method != "small_dense":
            assert summary.density.realised == pytest.approx(0.1, abs=1e-5)
    cost = {method: summary.flops.training_ratio for method, summary in found.items()}
    assert 0.09 < cost["small_dense"] < 0.11
    # SynFlow is sparse but for its first step, AC/DC dense in turns, SNFS reads dense gradients.
    assert cost["synflow"] < cost["snfs"] < cost["ac_dc"] < 1

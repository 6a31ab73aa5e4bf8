"""Checkpoints, run folders and method specs written by version 0.1.0, before its modules moved, still load."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf

from dst.checkpoints import load_checkpoint
from dst.cli.train import run
from dst.lightning import SparseTraining
from dst.report import write_report
from dst.report.compare import compare, read_runs
from dst.report.inspection import inspect_checkpoint
from tests.methods_list import METHODS
from tests.resume.fits import Fit

FILES = Path(__file__).parent / "files"
FITS = [path.stem for path in sorted(FILES.glob("*.ckpt"))]
RUNS = ["run_masked", "run_csr"]

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")


def _targets(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from [value["_target_"]] if "_target_" in value else []
        for item in value.values():
            yield from _targets(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _targets(item)


def _saved_method(checkpoint: dict[str, Any]) -> dict[str, Any]:
    states = [s for s in checkpoint["callbacks"].values() if isinstance(s, dict) and "method" in s]
    assert len(states) == 1
    return states[0]["method"]


@pytest.mark.parametrize("name", FITS)
def test_a_fit_resumes_from_its_checkpoint_exactly(name: str, tmp_path: Path) -> None:
    method = METHODS[name.removesuffix("_csr")]()
    if name.endswith("_csr"):
        method = dataclasses.replace(method, backend="csr")
    fit = Fit(SparseTraining(method), tmp_path, resume=FILES / f"{name}.ckpt")
    end = torch.load(FILES / f"{name}.end.pt", weights_only=True)
    assert fit.finished
    assert fit.sparse.sparsifier is not None
    for parameter, mask in fit.sparse.sparsifier.masks.items():
        assert torch.equal(mask, end["masks"][parameter]), parameter
    weights = fit.module.state_dict()
    assert weights.keys() == end["model"].keys()
    for key, value in end["model"].items():
        # Other processors sum in another order.
        torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", FITS)
def test_the_names_in_a_saved_method_are_classes(name: str) -> None:
    spec = _saved_method(load_checkpoint(FILES / f"{name}.ckpt"))
    targets = set(_targets(spec))
    assert len(targets) >= 5
    for target in targets:
        assert get_class(target).__name__ == target.rpartition(".")[2]


@pytest.mark.parametrize("folder", RUNS)
def test_a_run_folder_is_read_by_every_command(folder: str, tmp_path: Path) -> None:
    path = FILES / folder
    inspected = inspect_checkpoint(path / "checkpoints" / "step=80.ckpt")
    summary = json.loads((path / "summary.json").read_text())
    assert sum(layer.active for layer in inspected.layers) == sum(
        row["nonzero"] for row in summary["density"]["layers"]
    )
    page = write_report(path, tmp_path / "report.html").read_text()
    assert "rigl" in page
    assert compare(read_runs([path])).groups[0].label.startswith("rigl")


@pytest.mark.parametrize("folder", RUNS)
def test_a_finished_run_is_resumed_by_its_own_config(folder: str, tmp_path: Path) -> None:
    copy = tmp_path / folder
    shutil.copytree(FILES / folder, copy)
    config = OmegaConf.load(copy / ".hydra" / "config.yaml")
    before = json.loads((copy / "summary.json").read_text())
    OmegaConf.update(config, "resume", "last")
    summary = run(config, copy)
    assert summary.test.accuracy == pytest.approx(before["test"]["accuracy"], abs=0.02)
    assert summary.density.realised == before["density"]["realised"]

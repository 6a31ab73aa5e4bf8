"""Fits under the csr backend resume exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dst import Method, methods
from dst.lightning import SparseTraining
from dst.nn import SparseLinear
from tests.checks import differences
from tests.methods_list import DENSITY
from tests.resume.fits import SELDOM, Fit, SaveAt, check_same
from tests.sampling import rotated

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")

METHODS: dict[str, Callable[[], Method]] = {
    "rigl": lambda: methods.rigl(DENSITY, update_every=4, backend="csr"),
    "rigl_with_step": lambda: methods.rigl(DENSITY, update_every=4, replace_step=False, backend="csr"),
    "rigl_rescaled": lambda: methods.rigl(DENSITY, update_every=4, rescale_init=True, backend="csr"),
    "set": lambda: methods.set_(DENSITY, update_every=4, backend="csr"),
    "sparse_from_scratch": lambda: methods.sparse_from_scratch(DENSITY, backend="csr"),
    "static": lambda: methods.static(DENSITY, sparsify_at=0, backend="csr"),
}


@pytest.mark.parametrize(("name", "optimizer", "step"), rotated(METHODS, ["sgd", "adamw"], [3, 4, 5, 13]))
def test_a_fit_resumes_to_the_bit(name: str, optimizer: str, step: int, tmp_path: Path) -> None:
    def fit(folder: Path, resume: Path | None = None) -> Fit:
        saver = {"every_n_train_steps": step}
        return Fit(SparseTraining(METHODS[name]()), folder, optimizer=optimizer, resume=resume, saver=saver)

    whole = fit(tmp_path)
    assert isinstance(whole.module.hidden, SparseLinear)
    checkpoint = tmp_path / f"step={step}.ckpt"
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert "hidden.values" in state
    assert "hidden.weight" not in state
    check_same(whole, fit(tmp_path / "b", checkpoint))


@pytest.mark.parametrize(("micro", "name"), rotated([12, 13, 14], ["rigl", "rigl_with_step"]))
def test_a_checkpoint_within_the_accumulated_step_of_an_update(micro: int, name: str, tmp_path: Path) -> None:
    options = {"accumulate": 3, "saver": SELDOM}
    whole = Fit(SparseTraining(METHODS[name]()), tmp_path / "whole", **options)
    sparse = SparseTraining(METHODS[name]())
    middle = tmp_path / "middle.ckpt"
    assert not Fit(sparse, tmp_path, callbacks=[sparse, SaveAt(micro, middle)], **options).finished
    resumed = Fit(SparseTraining(METHODS[name]()), tmp_path, resume=middle, **options)
    found = list(differences(whole.outcome(), resumed.outcome()))
    assert not found, found

"""Interrupted lottery levels resume, and finished levels are not repeated."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lightning
import pytest
from lightning.pytorch.callbacks import Callback

import dst
from dst.checkpoints import load_checkpoint
from dst.lightning.lottery_levels import LotteryResult, run_lottery
from tests.checks import differences
from tests.resume.fits import BATCHES, Data, Interrupted, Module, Rows, StopAt
from tests.sampling import rotated

LEVELS = 3  # densities 1, 0.5, 0.3


def run(
    folder: Path,
    accumulate: int = 1,
    stop: Callback | None = None,
    stop_level: int = -1,
    rewind: str = "weights",
    prune_fraction: float | None = 0.5,
) -> LotteryResult:
    """Three levels of two epochs; ``stop`` takes part in ``stop_level`` alone."""
    method = dst.methods.lottery_ticket_rewind(0.3, prune_fraction=prune_fraction, rewind_to=4, rewind=rewind)

    def make(level: int, callbacks: list[Callback], place: Path) -> lightning.Trainer:
        return lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=Rows(),
            log_every_n_steps=1,
            accumulate_grad_batches=accumulate,
            callbacks=[*callbacks, *([stop] if stop is not None and level == stop_level else [])],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )

    return run_lottery(method, make, Module("adamw"), Data(accumulate), folder=folder)


def outcome(result: LotteryResult, folder: Path) -> dict[str, Any]:
    module = result.trainer.lightning_module
    count = len(result.levels)
    final = load_checkpoint(folder / f"level_{count - 1:02d}" / "final.ckpt")
    masks = {level: dst.load_masks(folder / f"level_{level:02d}" / "masks.pt") for level in range(1, count)}
    return {
        "model": module.state_dict() if module is not None else final["state_dict"],
        "final": final["state_dict"],
        "optimizers": final["optimizer_states"],
        "masks": masks,
        "levels": [vars(level) for level in result.levels],
        "snapshot": load_checkpoint(folder / "snapshot.ckpt")["state_dict"],
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Outcomes of uninterrupted runs."""

    @cache
    def of(**settings: Any) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("whole")
        found = outcome(run(folder, **settings), folder)
        assert not list(folder.glob("*/start.ckpt"))
        return found

    return of


@pytest.mark.parametrize(
    ("level", "batch", "accumulate"),
    [
        (0, 2, 1),  # before the snapshot and any checkpoint
        (0, 9, 1),  # after the snapshot
        (1, 0, 1),  # at the beginning of a level: the one before is finished
        (1, 4, 1),  # within a level, after its first checkpoint
        (2, 10, 3),  # in the middle of gradient accumulation
    ],
)
def test_an_interrupted_lottery_resumes(
    undisturbed: Callable[..., dict[str, Any]], level: int, batch: int, accumulate: int, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        run(tmp_path / "halted", accumulate, StopAt(batch), level)
    finished = {p: p.stat().st_mtime_ns for p in (tmp_path / "halted").glob("*/level.json")}
    assert len(finished) == level
    resumed = run(tmp_path / "halted", accumulate)
    assert {p: p.stat().st_mtime_ns for p in finished} == finished
    found = list(differences(undisturbed(accumulate=accumulate), outcome(resumed, tmp_path / "halted")))
    assert not found, found
    assert [x.steps for x in resumed.levels] == [2 * BATCHES, *[2 * BATCHES - 4] * (LEVELS - 1)]


@pytest.mark.parametrize(
    ("where", "batch"),
    rotated(
        [("learning_rate", 0.5, 2), ("none", 0.5, 2), ("none", 0.5, 0), ("learning_rate", None, 1)],
        [1, 7],  # before and after the level's first checkpoint
    ),
)
def test_so_it_does_where_trained_weights_are_kept(
    undisturbed: Callable[..., dict[str, Any]], where: tuple[str, float | None, int], batch: int, tmp_path: Path
) -> None:
    rewind, prune_fraction, level = where
    settings: dict[str, Any] = {"rewind": rewind, "prune_fraction": prune_fraction}
    whole = undisturbed(**settings)
    assert len(whole["levels"]) == (2 if prune_fraction is None else LEVELS)
    with pytest.raises(Interrupted):
        run(tmp_path / "halted", 1, StopAt(batch), level, **settings)
    resumed = run(tmp_path / "halted", **settings)
    found = list(differences(whole, outcome(resumed, tmp_path / "halted")))
    assert not found, found
    assert not list(tmp_path.glob("*/*/start.ckpt"))


def test_a_level_that_is_interrupted_as_it_ends_resumes(
    undisturbed: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training is over and the level's record is not yet written."""

    def halt(*args: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr("dst.lightning.lottery_levels.write_atomically", halt)
        with pytest.raises(Interrupted):
            run(tmp_path / "halted")
    resumed = run(tmp_path / "halted")
    found = list(differences(undisturbed(accumulate=1), outcome(resumed, tmp_path / "halted")))
    assert not found, found


def test_a_finished_lottery_is_read_and_not_run(tmp_path: Path) -> None:
    whole = run(tmp_path)
    again = run(tmp_path, stop=StopAt(0), stop_level=LEVELS - 1)
    assert again.levels == whole.levels

"""What an earlier process left in a run's folder: the checkpoint to resume from, and a summary that is complete."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import to_absolute_path

from dst.checkpoints import latest_readable, load_checkpoint
from dst.errors import ConfigurationError, DataError, StateError
from dst.lightning.callback import SparseTraining
from dst.lightning.spent import Spent
from dst.method import Method, check_same
from dst.report.summary import Summary

LAST, PREVIOUS = "last", "previous"


def resume_point(resume: str | None, folder: Path, method: Method) -> Path | None:
    """Find the checkpoint to resume from.

    Args:
        resume: ``"last"``, ``"previous"`` (the newest readable checkpoint before the last), a path, or ``None``.
        folder: The run's folder.
        method: The method of this run.

    Returns:
        The checkpoint; ``None`` for a new run, and for lottery tickets, whose levels find their own checkpoints.

    Raises:
        ConfigurationError: No such checkpoint, one that cannot be read, or a folder that holds an earlier run.
        StateError: The checkpoint belongs to another method.
    """
    checkpoints = folder / "checkpoints"
    if resume is None:
        if checkpoints.exists() and any(checkpoints.iterdir()):
            raise ConfigurationError(
                f"{folder} holds an earlier run: resume it with resume={LAST}, or choose another hydra.run.dir"
            )
        return None
    if method.lottery is not None:
        if resume != LAST or not checkpoints.is_dir():
            raise ConfigurationError(
                f"{method.name} resumes level by level: use resume={LAST} with hydra.run.dir=<the run's folder>"
            )
        return None
    path = _find(resume, checkpoints)
    _check_method(path, method)
    return path


def _find(resume: str, checkpoints: Path) -> Path:
    last = checkpoints / f"{LAST}.ckpt"
    if resume == PREVIOUS:
        try:
            return latest_readable(checkpoints, skip=last)
        except StateError as error:
            raise ConfigurationError(
                f"resume={PREVIOUS}: no readable checkpoint before the last one in {checkpoints}"
            ) from error
    path = last if resume == LAST else Path(to_absolute_path(resume))
    if not path.is_file():
        advice = "name the run's folder by hydra.run.dir=FOLDER" if resume == LAST else "check the path"
        raise ConfigurationError(f"resume={resume}: there is no checkpoint {path}; {advice}")
    return path


def _check_method(path: Path, method: Method) -> None:
    """Refuse the checkpoint of another method before its weights are loaded: of another width, they would not fit."""
    state = load_fit(path).get("callbacks", {}).get(SparseTraining.__qualname__)
    if isinstance(state, Mapping) and isinstance(state.get("method"), Mapping):
        check_same(state["method"], method)


def load_fit(path: Path) -> dict[str, Any]:
    """Read a checkpoint that a Lightning fit has written.

    Raises:
        ConfigurationError: It cannot be read, or it is another kind of file; says what to do instead.
    """
    try:
        checkpoint = load_checkpoint(path)
        if "global_step" not in checkpoint:
            raise StateError(f"{path} is not a checkpoint of a training run")
    except StateError as error:
        remedy = f"; resume={PREVIOUS} takes the one before it" if path.stem == LAST else ""
        raise ConfigurationError(f"{error}{remedy}") from error
    return checkpoint


def level_seconds(level: Path) -> float:
    """Return the seconds of training of a lottery level that an earlier process finished; 0 if they are unknown."""
    path = level / f"{LAST}.ckpt"
    state = load_fit(path).get("callbacks", {}).get(Spent.__qualname__, {}) if path.is_file() else {}
    return float(state.get("seconds", 0.0))


def finished_summary(folder: Path, steps: int) -> Summary | None:
    """Return the summary of a run that an earlier process finished after ``steps`` steps, or ``None``."""
    try:
        summary = Summary.read(folder)
    except DataError:
        return None
    return summary if summary.steps == steps else None

"""Files of a run. Writing replaces a file in one move; reading a checkpoint executes nothing in it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dst.errors import StateError


def save_atomically(value: Any, path: str | os.PathLike[str]) -> None:
    """Write a file with ``torch.save``. At any moment the file is the old one or the new one, and complete.

    The new content is written under another name in the same folder, synchronised with the disk, and moved into place. A
    process that is killed in between may leave the unfinished file behind. Its name ends in ``.part``, and nothing reads it.

    Args:
        value: Anything that ``torch.save`` accepts.
        path: The file; missing folders are created.
    """
    with _replacing(Path(path)) as file:
        torch.save(value, file)


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file as `save_atomically` writes a checkpoint.

    Args:
        path: The file; missing folders are created.
        text: Its new content, written as UTF-8.
    """
    with _replacing(Path(path)) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint of Lightning's or of your own loop, onto the CPU.

    Args:
        path: The file.

    Returns:
        What was saved: a dict of plain values and tensors.

    Raises:
        StateError: No such file, one that is cut off or damaged, or one that holds more than plain values and tensors;
            nothing in it is executed.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise StateError(f"no checkpoint at {path}") from None
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise StateError(
            f"{path} cannot be read: {reason_of(error)}. "
            f"dst.checkpoints.latest_readable({str(Path(path).parent)!r}) finds the newest one that can be read"
        ) from error
    if not isinstance(checkpoint, dict):
        raise StateError(f"{path} is not a checkpoint: it holds a {type(checkpoint).__name__}, not a dict")
    return checkpoint


def reason_of(error: Exception) -> str:
    """What is wrong with a file that torch.load refused; without torch's advice to let it execute the file."""
    if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
        return "it holds more than plain values and tensors, which would have to be executed"
    reason = "it is no checkpoint (torch.save did not write it), or it is cut off or damaged"
    return f"{reason} ({str(error).splitlines()[0]})" if isinstance(error, (OSError, RuntimeError)) else reason


def latest_readable(folder: str | os.PathLike[str], pattern: str = "*.ckpt") -> Path:
    """The newest checkpoint of a folder that can be read: the one before, where the last was cut off.

    Args:
        folder: Where the checkpoints are.
        pattern: Which files are.

    Returns:
        The path of the most recently written one that ``load_checkpoint`` accepts.

    Raises:
        StateError: None can be read; the message lists what is wrong with each.
    """
    errors: list[str] = []
    for path in sorted(Path(folder).glob(pattern), key=lambda p: (p.stat().st_mtime_ns, p.name), reverse=True):
        try:
            load_checkpoint(path)
        except StateError as error:
            errors.append(str(error))
        else:
            return path
    raise StateError("\n".join([f"no checkpoint in {folder} can be read ({len(errors)} match {pattern})", *errors]))

"""Reading and writing the files of a run. Writes are atomic; loading a checkpoint executes no code from it."""

from __future__ import annotations

import math
import os
import pickle
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dst.errors import StateError


def save_atomically(value: Any, path: str | os.PathLike[str]) -> None:
    """Write a file with ``torch.save``, atomically: readers see the old file or the new one, never a part of it.

    The content is written to a temporary file in the same folder, flushed to disk, and moved into place. A process that
    is killed in between may leave the temporary file behind. Its name ends in ``.part``, and nothing reads it.

    Args:
        value: Anything that ``torch.save`` accepts.
        path: The file; missing folders are created.
    """
    with replacing(path) as file:
        torch.save(value, file)


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, atomically; see `save_atomically`.

    Args:
        path: The file; missing folders are created.
        text: The content, written as UTF-8.
    """
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def json_ready(value: Any) -> Any:
    """Replace infinities and NaN, which JSON does not support, by None.

    Args:
        value: A plain value. Mappings and lists are converted recursively.

    Returns:
        The converted value.
    """
    if isinstance(value, Mapping):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a new file that replaces ``path`` at the end of the ``with`` block.

    If the block raises, ``path`` is not changed and the new content is discarded.

    Args:
        path: The file; missing folders are created.

    Yields:
        The new file, open for writing bytes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A random name, because processes on several machines may write the same file.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a checkpoint of Lightning or of a plain loop, onto the CPU.

    Args:
        path: The file.

    Returns:
        The saved dict of plain values and tensors.

    Raises:
        StateError: The file does not exist, is cut off or damaged, or holds more than plain values and tensors.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise StateError(f"no checkpoint at {path}") from None
    except Exception as error:  # torch.load raises many types for a damaged file
        raise StateError(
            f"{path} cannot be read: {reason_of(error)}. "
            f"dst.checkpoints.latest_readable({str(Path(path).parent)!r}) finds the newest checkpoint that can be read"
        ) from error
    if not isinstance(checkpoint, dict):
        raise StateError(f"{path} is not a checkpoint: it holds a {type(checkpoint).__name__}, not a dict")
    return checkpoint


def reason_of(error: Exception) -> str:
    """Why torch.load refused a file, without its advice to set ``weights_only=False``."""
    if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
        return "it holds more than plain values and tensors, and loading it would execute code"
    reason = "it is not a file of torch.save, or it is cut off or damaged"
    return f"{reason} ({str(error).splitlines()[0]})" if isinstance(error, (OSError, RuntimeError)) else reason


def latest_readable(
    folder: str | os.PathLike[str], pattern: str = "*.ckpt", *, skip: str | os.PathLike[str] | None = None
) -> Path:
    """The newest checkpoint of a folder that can be read. Skips files that are cut off or damaged.

    Args:
        folder: The folder.
        pattern: Glob pattern of the checkpoint files.
        skip: A checkpoint to skip, such as the last one. If it is a link, its target is skipped as well.

    Returns:
        Path of the newest file that ``load_checkpoint`` accepts.

    Raises:
        StateError: No checkpoint can be read. The message lists the reason for each file.
    """
    errors: list[str] = []
    paths = [path for path in Path(folder).glob(pattern) if skip is None or path.resolve() != Path(skip).resolve()]
    for path in sorted(paths, key=lambda p: (p.stat().st_mtime_ns, p.name), reverse=True):
        try:
            load_checkpoint(path)
        except StateError as error:
            errors.append(str(error))
        else:
            return path
    raise StateError("\n".join([f"no checkpoint in {folder} can be read ({len(errors)} match {pattern})", *errors]))

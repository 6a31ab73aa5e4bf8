"""Reader of CIFAR-10 and CIFAR-100 in their published formats, from a folder or from the archive."""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dst.errors import DataError

Split = Literal["train", "test"]
_PIXELS = 3 * 32 * 32


def read_cifar(path: str | Path, split: Split, classes: Literal[10, 100]) -> tuple[Tensor, Tensor]:
    """Read one split of CIFAR, in its binary or its Python version.

    https://www.cs.toronto.edu/~kriz/cifar.html describes both versions. The names of the files tell them apart.

    Args:
        path: The extracted folder, or the ``.tar.gz`` archive.
        split: ``"train"`` or ``"test"``.
        classes: 10, or 100 (fine labels).

    Returns:
        uint8 images ``(N, 3, 32, 32)`` and int64 labels ``(N,)`` in ``range(classes)``.

    Raises:
        DataError: Files are missing or damaged, or a pickle holds anything but arrays and plain values.
    """
    path = Path(path)
    stems = _stems(split, classes)
    wanted = {f"{stem}.bin" for stem in stems} | set(stems)
    files = _files_in_folder(path, wanted) if path.is_dir() else _files_in_archive(path, wanted)
    for suffix, parse in ((".bin", parse_binary), ("", parse_pickle)):
        names = [stem + suffix for stem in stems]
        if all(name in files for name in names):
            parts = [parse(files[name], classes, f"{path}/{name}") for name in names]
            images, labels = (torch.cat(column) for column in zip(*parts, strict=True))
            return images, labels
    raise DataError(
        f"{path} is not a complete CIFAR-{classes}: the {split} split needs {', '.join(stems)}, all "
        f"with or all without .bin; found {', '.join(sorted(files)) or 'none of them'}."
    )


def parse_binary(content: bytes, classes: int, name: str) -> tuple[Tensor, Tensor]:
    """Parse records of label bytes (one; coarse and fine for CIFAR-100) and 3072 pixels, channels first.

    Returns:
        uint8 ``(N, 3, 32, 32)`` and int64 ``(N,)``.

    Raises:
        DataError: The content is not a whole number of records, or a label is out of range; names ``name``.
    """
    header = 1 if classes == 10 else 2
    if not content or len(content) % (header + _PIXELS):
        raise DataError(
            f"{name} is damaged: {len(content)} bytes are not whole records of {header + _PIXELS}. Fetch it again."
        )
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, header + _PIXELS)
    return _checked(records[:, header:].clone(), records[:, header - 1].long(), classes, name)


def parse_pickle(content: bytes, classes: int, name: str) -> tuple[Tensor, Tensor]:
    """Parse a pickled dict of ``data`` (uint8, ``(N, 3072)``) and ``labels`` or ``fine_labels``.

    The pickle can call nothing but the four stand-ins for NumPy's functions below.

    Returns:
        uint8 ``(N, 3, 32, 32)`` and int64 ``(N,)``.

    Raises:
        DataError: The pickle is damaged, asks for another object, or lacks these entries; names ``name``.
    """
    try:
        # The published files come from Python 2, whose strings are bytes: latin-1 maps them one to one.
        content_dict = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
        data = content_dict["data"].pixels()
        labels = torch.tensor(content_dict["labels" if classes == 10 else "fine_labels"], dtype=torch.int64)
        if labels.shape != (len(data),):
            raise ValueError(f"{len(data)} images, labels of shape {tuple(labels.shape)}")
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"{name} is not a CIFAR-{classes} file: {error!r}. Fetch it again.") from error
    return _checked(data, labels, classes, name)


def _stems(split: Split, classes: int) -> list[str]:
    if classes == 100:
        return [split]
    return [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]


def _checked(data: Tensor, labels: Tensor, classes: int, name: str) -> tuple[Tensor, Tensor]:
    if not len(labels) or labels.min() < 0 or labels.max() >= classes:
        raise DataError(f"{name} is damaged: it has no labels, or some outside 0..{classes - 1}. Fetch it again.")
    return data.view(-1, 3, 32, 32), labels


def _files_in_folder(path: Path, wanted: set[str]) -> dict[str, bytes]:
    try:
        return {name: (path / name).read_bytes() for name in wanted if (path / name).is_file()}
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error}.") from error


def _files_in_archive(path: Path, wanted: set[str]) -> dict[str, bytes]:
    files = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = member.name.rsplit("/", 1)[-1]
                stream = archive.extractfile(member) if member.isfile() and name in wanted else None
                if stream is not None:
                    files[name] = stream.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"Cannot read the archive {path}: {error}. Fetch it again.") from error
    return files


class _Dtype:
    """Stand-in for ``numpy.dtype`` that keeps its code."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code = code

    def __setstate__(self, _: Any) -> None:
        pass


class _Array:
    """Stand-in for ``numpy.ndarray`` that keeps its state."""

    def __init__(self, *_: Any) -> None:
        self.state: Sequence[Any] = ()

    def __setstate__(self, state: Sequence[Any]) -> None:
        self.state = state

    def pixels(self) -> Tensor:
        """Return the array as uint8 ``(N, 3072)``; anything else raises."""
        _, shape, dtype, fortran, raw = self.state
        if dtype.code != "u1" or len(shape) != 2 or shape[1] != _PIXELS:
            raise ValueError(f"data of shape {shape} and dtype {dtype.code}, not uint8 (N, {_PIXELS})")
        order: Literal["C", "F"] = "F" if fortran else "C"
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        return torch.from_numpy(np.frombuffer(raw, np.uint8).reshape(shape, order=order).copy())


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _encode(text: str, _: str = "latin1") -> bytes:
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Resolves the names in a pickled array to stand-ins, and refuses all other names."""

    _STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _encode,  # how Python 3 writes bytes in protocol 2
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs") from None

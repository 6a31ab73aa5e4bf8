"""Reader of the IDX format of MNIST and similar data sets."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from dst.errors import DataError

_UINT8 = 0x08


def read_idx(path: str | Path) -> Tensor:
    """Read an IDX file of unsigned bytes, plain or gzipped. The content tells which, not the name.

    The format is two zero bytes, the type code, the number of dimensions, each dimension as a big-endian uint32, then the
    data (http://yann.lecun.com/exdb/mnist/).

    Args:
        path: The file.

    Returns:
        uint8 tensor of the file's shape.

    Raises:
        DataError: The file cannot be read, is not IDX, holds another type, or is truncated or too long.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"Cannot read {path}: {error}. Fetch it again.") from error
    if len(content) < 4 or content[:2] != b"\0\0":
        raise DataError(f"{path} is not an IDX file: it does not begin with two zero bytes. Fetch it again.")
    kind, dimensions = content[2:4]
    if kind != _UINT8:
        raise DataError(f"{path} holds IDX type 0x{kind:02x}; only unsigned bytes (0x08) are read here.")
    start = 4 + 4 * dimensions
    if not dimensions or len(content) < start:
        raise DataError(f"{path} is damaged: the IDX header of {dimensions} dimensions is cut off. Fetch it again.")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise DataError(
            f"{path} is damaged: its header announces {math.prod(shape)} bytes, {len(content) - start} "
            "follow. Fetch it again."
        )
    if not math.prod(shape):
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)

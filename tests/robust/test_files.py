"""Untrusted files: nothing in them is executed, and crafted files raise an error."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dst
from dst.checkpoints import latest_readable, load_checkpoint
from dst.init import FromFile
from dst.lightning import SparseTraining
from dst.lightning.checkpoint_io import AtomicCheckpointIO
from tests.methods_list import METHODS
from tests.resume.fits import Fit


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def as_torch_file(value: Any, path: Path) -> None:
    torch.save(value, path)


def as_legacy_file(value: Any, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def as_bare_pickle(value: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


def as_swapped_pickle(value: Any, path: Path) -> None:
    """A genuine file, of which the pickled part alone was replaced."""
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, buffer)
    with zipfile.ZipFile(buffer) as genuine, zipfile.ZipFile(path, "w") as crafted:
        for item in genuine.infolist():
            data = pickle.dumps(value, 2) if item.filename.endswith("data.pkl") else genuine.read(item)
            crafted.writestr(item.filename, data)


READERS: dict[str, Callable[[Path], Any]] = {
    "checkpoint": load_checkpoint,
    "latest": lambda path: latest_readable(path.parent, path.name),
    "plugin": lambda path: AtomicCheckpointIO().load_checkpoint(path),
    "masks": dst.load_masks,
    "init": lambda path: dst.Sparsifier(
        model := nn.Linear(4, 4),
        torch.optim.SGD(model.parameters(), 0.1),
        dst.methods.static(0.5, init=FromFile(str(path))),
        total_steps=5,
    ),
    "trainer": lambda path: Fit(SparseTraining(METHODS["rigl"]()), path.parent, resume=path),
}


@pytest.mark.parametrize("write", [as_torch_file, as_legacy_file, as_bare_pickle, as_swapped_pickle])
@pytest.mark.parametrize("reader", READERS)
def test_a_crafted_file_is_refused_and_not_executed(
    reader: str, write: Callable[[Any, Path], None], tmp_path: Path
) -> None:
    marker, path = tmp_path / "executed", tmp_path / "crafted.ckpt"
    write({"state_dict": {"weight": torch.ones(2)}, "global_step": Payload(marker)}, path)
    with pytest.raises(dst.StateError, match=r"crafted\.ckpt"):
        READERS[reader](path)
    assert not marker.exists()


@pytest.mark.parametrize("write", [as_torch_file, as_legacy_file, as_bare_pickle, as_swapped_pickle])
def test_the_crafted_file_would_do_harm(write: Callable[[Any, Path], None], tmp_path: Path) -> None:
    """Read without ``weights_only``, each of them creates its file: otherwise the test above would prove nothing."""
    marker, path = tmp_path / "executed", tmp_path / "crafted.ckpt"
    write({"step": Payload(marker)}, path)
    if write is as_bare_pickle:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()


def test_a_crafted_state_within_a_readable_file_is_refused(tmp_path: Path) -> None:
    """Plain values of a wrong kind raise an error that names them, and nothing is loaded."""
    Fit(SparseTraining(METHODS["rigl"]()), tmp_path, steps=6)
    checkpoint = load_checkpoint(tmp_path / "last.ckpt")
    (key,) = (k for k in checkpoint["callbacks"] if k.startswith("SparseTraining"))
    for damage in (
        {"masks": {}},
        {"masks": [1, 2]},
        {"steps": ["many"]},
        {"buffers": {"grow/hidden.weight": "text"}},
        {"format": None},
        {"method": None},
    ):
        state = {**checkpoint["callbacks"][key], **damage}
        torch.save({**checkpoint, "callbacks": {**checkpoint["callbacks"], key: state}}, tmp_path / "crafted.ckpt")
        with pytest.raises(dst.StateError):
            Fit(SparseTraining(METHODS["rigl"]()), tmp_path, resume=tmp_path / "crafted.ckpt")

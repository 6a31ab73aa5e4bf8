"""Masks in files."""

from __future__ import annotations

import pickle

import pytest
import torch

from dst import load_masks, save_masks
from dst.errors import StateError
from tests.checks import equal


@pytest.fixture
def masks():
    return {"a.weight": torch.rand(5, 4) < 0.5, "b.weight": torch.rand(3, 2, 2, 2) < 0.1}


def test_masks_return_as_they_were(tmp_path, masks):
    path = tmp_path / "deeper" / "masks.pt"
    save_masks(masks, path)
    assert equal(load_masks(path), masks)
    assert equal(load_masks(str(path)), masks)


def test_a_file_is_replaced_in_one_move(tmp_path, masks, monkeypatch):
    path = tmp_path / "masks.pt"
    save_masks(masks, path)

    def fails(content, target):
        write = target.write if hasattr(target, "write") else target.write_bytes
        write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="disk full"):
        save_masks({"a.weight": torch.ones(1, 1)}, path)
    assert equal(load_masks(path), masks)


def test_no_file_is_left_behind(tmp_path, masks):
    save_masks(masks, tmp_path / "masks.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["masks.pt"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(StateError, match=r"no mask file at .*nothing\.pt"):
        load_masks(tmp_path / "nothing.pt")


class Dangerous:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the file was executed')",))


def truncated(path):
    save_masks({"a": torch.ones(100, 100)}, path)
    path.write_bytes(path.read_bytes()[:-600])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.write_bytes(b""),
        lambda p: p.write_text("not a mask file"),
        lambda p: p.write_bytes(bytes(range(256)) * 10),
        lambda p: p.write_bytes(pickle.dumps(Dangerous())),
        lambda p: torch.save(Dangerous(), p),
        truncated,
        lambda p: torch.save([torch.ones(2, 2).bool()], p),
        lambda p: torch.save({"a": torch.ones(2, 2)}, p),
        lambda p: torch.save({"a": [True, False]}, p),
        lambda p: torch.save({1: torch.ones(2, 2).bool()}, p),
    ],
    ids=[
        "empty",
        "text",
        "bytes",
        "pickle",
        "pickle in zip",
        "truncated",
        "list",
        "floats",
        "no tensor",
        "number as name",
    ],
)
def test_a_file_that_holds_no_masks_is_refused_and_not_executed(tmp_path, write):
    path = tmp_path / "masks.pt"
    write(path)
    with pytest.raises(StateError, match=r"masks\.pt"):
        load_masks(path)

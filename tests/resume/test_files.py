"""Checkpoint files are complete at any moment, and damaged files are detected."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

import dst
from dst.checkpoints import latest_readable, load_checkpoint, replacing, save_atomically
from dst.lightning import SparseTraining
from dst.lightning.checkpoint_io import AtomicCheckpointIO
from tests.distributed.processes import exit_code_of
from tests.methods_list import METHODS
from tests.resume.fits import Fit
from tests.resume.killed import each_in_a_fork

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")


class Unsaveable:
    """Fails when most of the file has been written."""

    def __reduce__(self) -> Any:
        raise OSError("no space left on device")


@pytest.mark.parametrize("save", [save_atomically, lambda v, p: AtomicCheckpointIO().save_checkpoint(v, p)])
def test_a_write_that_fails_leaves_the_old_file(save: Any, tmp_path: Path) -> None:
    path = tmp_path / "sub" / "last.ckpt"
    save({"weights": torch.ones(1000)}, path)
    before = path.read_bytes()
    with pytest.raises(OSError, match="no space"):
        save({"weights": torch.zeros(1000), "bad": Unsaveable()}, path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failure_after_the_writing_leaves_the_old_file(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is on the disk before it replaces the old one."""
    path = tmp_path / "last.ckpt"
    save_atomically({"weights": torch.ones(1000)}, path)
    calls: list[str] = []

    def fail(*args: Any) -> None:
        calls.append(function)
        raise OSError("pulled the plug")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="plug"):
        save_atomically({"weights": torch.zeros(1000)}, path)
    monkeypatch.undo()
    assert calls == [function]
    assert load_checkpoint(path)["weights"].eq(1).all()


def test_a_process_killed_while_it_writes_leaves_a_whole_file(tmp_path: Path) -> None:
    functions = ["fsync", "replace"]
    assert exit_code_of(each_in_a_fork, tmp_path, functions) == 0
    for function in functions:
        folder = tmp_path / function
        path = folder / "last.ckpt"
        assert int((tmp_path / f"{function}.code").read_text()) == -signal.SIGKILL
        assert len(list(folder.glob(".*.part"))) == 1, "it was not killed while it wrote: the test says nothing"
        assert load_checkpoint(path)["attempt"] == 1
        assert latest_readable(folder) == path


def test_sparse_training_writes_its_trainers_checkpoints_atomically(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = Fit(SparseTraining(METHODS["rigl"]()), tmp_path, steps=6)
    assert type(fit.trainer.strategy.checkpoint_io) is AtomicCheckpointIO
    before = (tmp_path / "last.ckpt").read_bytes()

    def fail(*args: Any) -> None:
        raise OSError("pulled the plug")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="plug"):
        fit.trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_a_checkpoint_plugin_of_the_users_stays(tmp_path: Path) -> None:
    class Own(TorchCheckpointIO):
        pass

    fit = Fit(SparseTraining(METHODS["rigl"]()), tmp_path, steps=6, plugins=[Own()])
    assert type(fit.trainer.strategy.checkpoint_io) is Own


def test_files_elsewhere_are_left_to_lightning() -> None:
    io = AtomicCheckpointIO()
    io.save_checkpoint({"value": torch.ones(2)}, "memory://folder/a.ckpt")
    assert io.load_checkpoint("memory://folder/a.ckpt", weights_only=True)["value"].eq(1).all()


def test_the_checkpoint_before_is_used_when_the_last_is_cut_off(tmp_path: Path) -> None:
    Fit(SparseTraining(METHODS["set"]()), tmp_path / "run", steps=6, saver={"save_last": False})
    folder = tmp_path / "run"
    for step in range(1, 7):
        os.utime(folder / f"step={step}.ckpt", (1000 + step, 1000 + step))
    assert latest_readable(folder) == folder / "step=6.ckpt"
    for step in (6, 5):
        path = folder / f"step={step}.ckpt"
        path.write_bytes(path.read_bytes()[:-100])
        os.utime(path, (1000 + step, 1000 + step))
    assert latest_readable(folder) == folder / "step=4.ckpt"
    resumed = Fit(SparseTraining(METHODS["set"]()), tmp_path / "b", steps=6, resume=latest_readable(folder))
    assert resumed.trainer.global_step == 6
    for path in folder.iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(dst.StateError, match=r"(?s)no checkpoint in .*6 match.*step=6\.ckpt cannot be read"):
        latest_readable(folder)


def test_a_checkpoint_may_be_skipped_with_all_links_to_it(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_atomically({"step": step}, tmp_path / f"step={step}.ckpt")
        os.utime(tmp_path / f"step={step}.ckpt", (1000 + step, 1000 + step))
    (tmp_path / "last.ckpt").symlink_to("step=3.ckpt")
    assert latest_readable(tmp_path, skip=tmp_path / "last.ckpt") == tmp_path / "step=2.ckpt"
    (tmp_path / "step=3.ckpt").unlink()
    assert latest_readable(tmp_path, skip=tmp_path / "last.ckpt") == tmp_path / "step=2.ckpt"


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with replacing(path) as first:
        with replacing(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
        first.write(b"first")
    assert path.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(dst.StateError, match=r"no checkpoint at .*nowhere\.ckpt"):
        load_checkpoint(tmp_path / "nowhere.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(dst.StateError, match="holds a list, not a dict"):
        load_checkpoint(tmp_path / "list.ckpt")
    with pytest.raises(dst.StateError, match=r"no checkpoint in .* \(1 match"):
        latest_readable(tmp_path)
    with pytest.raises(dst.StateError, match="cannot be read"):
        load_checkpoint(tmp_path)


def test_lightning_is_asked_for_plain_values_alone(tmp_path: Path) -> None:
    """A checkpoint of a Lightning trainer loads with ``weights_only=True``."""
    Fit(SparseTraining(METHODS["watching_twice"]()), tmp_path, steps=6, optimizer="odd")
    checkpoint = load_checkpoint(tmp_path / "last.ckpt")
    assert checkpoint["global_step"] == 6
    assert lightning.__version__ == checkpoint["pytorch-lightning_version"]

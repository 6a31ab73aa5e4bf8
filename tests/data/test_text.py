"""Text: vocabulary, windows, order, position, splits, and invalid files."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lightning import Callback, LightningModule, Trainer

import dst.data.loader
from dst.data import Text, TextLoader
from dst.data.text import Vocabulary, code_points, read_text, standard_library
from dst.errors import ConfigurationError, DataError, StateError


def write(tmp_path, text, name="text.txt"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def alphabet(length):
    """A text that never repeats, so that a window tells where it lies."""
    return "".join(chr(0x4E00 + i) for i in range(length))


# --- vocabulary --------------------------------------------------------------------------------------------------


def test_vocabulary_by_hand():
    vocabulary = Vocabulary(code_points("banana\n"))
    assert len(vocabulary) == 5  # unknown, newline, a, b, n
    ids = vocabulary.encode(code_points("bé\nan\U0001f600"))
    assert ids.tolist() == [3, 0, 1, 2, 4, 0]
    assert ids.dtype == torch.int32
    assert vocabulary.decode(ids) == "b\ufffd\nan\ufffd"


def test_the_vocabulary_is_that_of_the_training_part(tmp_path):
    data = Text(write(tmp_path, "ab" * 40 + "bc" * 5 + "ad" * 5), context=4, batch_size=2)
    data.setup()
    assert data.task.arguments == {"vocab_size": 3, "context": 4}
    (inputs, targets), *_ = data.test_dataloader()
    assert data.vocabulary.decode(inputs[0]) == "a\ufffda\ufffd"
    assert data.vocabulary.decode(targets[0]) == "\ufffda\ufffda"
    (inputs, _), *_ = data.val_dataloader()
    assert data.vocabulary.decode(inputs[0]) == "b\ufffdb\ufffd"


# --- windows -----------------------------------------------------------------------------------------------------


def test_windows_lie_side_by_side_and_targets_come_next():
    loader = TextLoader(torch.arange(14, dtype=torch.int32), context=4, batch_size=2)
    batches = list(loader)
    assert [inputs.tolist() for inputs, _ in batches] == [[[0, 1, 2, 3], [4, 5, 6, 7]], [[8, 9, 10, 11]]]
    assert [targets.tolist() for _, targets in batches] == [[[1, 2, 3, 4], [5, 6, 7, 8]], [[9, 10, 11, 12]]]
    assert {tensor.dtype for batch in batches for tensor in batch} == {torch.int64}
    # 13 characters have room for three windows and the last one's target, 12 have not.
    assert [TextLoader(torch.arange(n), context=4, batch_size=1).samples for n in (12, 13)] == [2, 3]


def training(length=40, **options):
    return TextLoader(
        torch.arange(length), **{"context": 4, "batch_size": 2, "shuffle": True, "shift": True, **options}
    )


def starts(batches):
    result = []
    for inputs, targets in batches:
        assert torch.equal(inputs, inputs[:, :1] + torch.arange(inputs.shape[1]))
        assert torch.equal(targets, inputs + 1)
        result.append(inputs[:, 0].tolist())
    return result


def test_order_and_offset_are_functions_of_seed_and_epoch():
    first = training(seed=3)
    epochs = [starts(first) for _ in range(12)]
    offsets = {min(min(batch) for batch in epoch) % 4 for epoch in epochs}
    assert offsets == {0, 1, 2, 3}
    for epoch in (0, 5, 11):
        again = training(seed=3)
        again.set_epoch(epoch)
        assert starts(again) == epochs[epoch]
    assert len({str(epoch) for epoch in epochs}) == 12
    assert starts(training(seed=4)) != epochs[0]
    for epoch in epochs:  # nine windows, each once, all within the text
        flat = sorted(start for batch in epoch for start in batch)
        assert [b - a for a, b in pairwise(flat)] == [4] * 8
        assert flat[-1] + 4 <= 39


@pytest.mark.parametrize("taken", range(6))
def test_state_continues_after_the_last_batch(taken):
    whole = training()
    expected = starts(whole) + starts(whole)
    stopped = training()
    batches = iter(stopped)
    for _ in range(taken):
        next(batches)
    resumed = training()
    resumed.load_state_dict(stopped.state_dict())
    assert (starts(resumed) + starts(resumed))[: len(expected) - taken] == expected[taken:]


def test_state_of_other_windows_is_refused_within_an_epoch():
    stopped = training()
    next(iter(stopped))
    other = training(64, context=7)
    assert other.samples == stopped.samples - 1
    with pytest.raises(StateError, match="context 4 -> 7"):
        other.load_state_dict(stopped.state_dict())


def test_processes_share_the_batches_of_one(monkeypatch):
    def epoch(rank, world, batch_size):
        monkeypatch.setattr(dst.data.loader, "processes", lambda: (rank, world))
        return starts(training(42, batch_size=batch_size, shard=True, drop_last=True))

    whole = epoch(0, 1, 4)
    shards = [epoch(rank, 2, 2) for rank in range(2)]
    assert [[a[0], b[0], a[1], b[1]] for a, b in zip(*shards, strict=True)] == whole


# --- the data module ---------------------------------------------------------------------------------------------


def test_parts_follow_each_other(tmp_path):
    text = alphabet(1000)
    data = Text(write(tmp_path, text), context=10, batch_size=4, validation=0.2, test=0.1)
    data.setup()
    # Characters that only the later parts have are unknown: their places are told by the windows' number.
    assert [len(data._parts[part]) for part in ("train", "val", "test")] == [700, 200, 100]
    assert data.vocabulary.decode(data._parts["train"]) == text[:700]
    assert not data._parts["val"].any()
    inputs = torch.cat([inputs for inputs, _ in data.train_dataloader()])
    assert len(inputs.unique()) == len(inputs.flatten()) == 680
    assert sum(len(inputs) for inputs, _ in data.val_dataloader()) == 19
    assert sum(len(inputs) for inputs, _ in data.test_dataloader()) == 9


def test_without_validation(tmp_path):
    data = Text(write(tmp_path, "abc" * 100), context=10, batch_size=4, validation=0)
    data.setup("fit")
    assert data.val_dataloader() == []


def test_max_chars_cuts_the_text(tmp_path):
    data = Text(write(tmp_path, alphabet(1000)), context=10, batch_size=1, max_chars=300)
    assert len(data.vocabulary) == 240 + 1


def test_the_standard_library_is_the_default():
    data = Text(max_chars=30_000, batch_size=8)
    data.setup()
    assert len(data.train_dataloader()) == (24_000 - 64) // 64 // 8
    assert len(data.vocabulary) > 50
    text = data.vocabulary.decode(data._parts["train"])
    assert text == standard_library(24_000)
    assert "from __future__ import" in text


def test_the_standard_librarys_own_modules_are_taken_in_order_of_name(tmp_path):
    for name, text in [("calendar", "C\n"), ("abc", "A\r\nA\n"), ("sitecustomize", "S\n"), ("bdb", "B\n")]:
        (tmp_path / f"{name}.py").write_bytes(text.encode())
    (tmp_path / "abc.txt").write_text("T")
    assert standard_library(1000, tmp_path) == "A\nA\nB\nC\n"
    assert standard_library(5, tmp_path) == "A\nA\nB"
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no sources of Python's standard library.*data\.path"):
        standard_library(5, tmp_path / "empty")


def test_files_that_do_not_do(tmp_path):
    with pytest.raises(DataError, match=r"Cannot read .*missing\.txt.*data\.path"):
        Text(tmp_path / "missing.txt").setup()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"Cannot read .*binary as UTF-8"):
        read_text(tmp_path / "binary")
    with pytest.raises(DataError, match=r"100 characters, 10 of them for val, where a context of 40 needs 41"):
        Text(write(tmp_path, alphabet(100)), test=0.05, max_chars=100, validation=0.1, context=40).setup()
    with pytest.raises(DataError, match="0 characters"):
        Text(write(tmp_path, "", "empty.txt")).setup()
    data = Text(write(tmp_path, alphabet(1000)), context=10, batch_size=100)
    data.setup()
    with pytest.raises(ConfigurationError, match="79 samples do not make one batch of 100"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"eval_batch_size": 0}, "eval_batch_size=0"),
        ({"max_chars": 0}, "max_chars=0"),
        ({"test": 0}, "test above 0"),
        ({"validation": 0.6, "test": 0.4}, "below 1 together"),
        ({"validation": -0.1}, "validation=-0.1"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ConfigurationError, match=message):
        Text(**options)


# --- Lightning ---------------------------------------------------------------------------------------------------


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, index):
        self.seen.append(batch[0][:, 0].tolist())
        return self.layer(batch[0][:, :1].float()).sum()

    def validation_step(self, batch, index):
        assert len(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Save(Callback):
    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.parametrize("at", [3, 5, 7])
def test_resumed_training_sees_the_same_windows(tmp_path, at):
    path = write(tmp_path, alphabet(150))

    def fit(resume=None):
        trainer = Trainer(
            accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[Save(tmp_path)], max_epochs=3,
        )  # fmt: skip
        module = Recorder()
        data = Text(path, context=5, batch_size=4)  # 23 windows: five batches an epoch
        trainer.fit(module, datamodule=data, ckpt_path=resume)
        return module.seen

    whole = fit()
    assert len(whole) == 15
    kept = (tmp_path / f"{at}.ckpt").rename(tmp_path / "kept.ckpt")
    assert fit(kept) == whole[at:]

"""What is recorded of a topology during training."""

from __future__ import annotations

import csv
import json
import logging

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from dst import ConfigurationError, methods
from dst.allocation import Uniform
from dst.data.loader import TensorLoader
from dst.lightning import SparseTraining
from dst.lightning.recorder import LOOK_EVERY, Recorder
from dst.metrics.recorded import degree_histogram, input_picture, is_disconnecting
from dst.metrics.training import loss_spikes
from dst.report.topology_file import TOPOLOGY_FILE, read_rows
from dst.topology.layers import SparseLayer
from tests.sampling import rotated


class Images(lightning.LightningModule):
    """Sixteen pixels, eight hidden units, four classes."""

    def __init__(self, convolution: bool = False) -> None:
        super().__init__()
        first = nn.Conv2d(1, 8, 3) if convolution else nn.Identity()
        hidden = 8 * 2 * 2 if convolution else 16
        self.network = nn.Sequential(first, nn.Flatten(), nn.Linear(hidden, 8), nn.ReLU(), nn.Linear(8, 4))
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randint(256, (64, 1, 4, 4), generator=generator, dtype=torch.uint8)
        self.labels = torch.randint(4, (64,), generator=generator)

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def train_dataloader(self):
        half = torch.tensor([127.5])  # one channel
        return TensorLoader(self.images, self.labels, batch_size=8, scale=1 / half, shift=torch.tensor([-1.0]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class Cut(Exception):
    """Stands for any end of a process."""


class CutAt(Callback):
    def __init__(self, batches):
        self.left = batches

    def on_train_batch_start(self, *args):
        self.left -= 1
        if self.left < 0:
            raise Cut


class Losses(Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, *args):
        self.losses.append(float(outputs["loss"]))


def fit(folder, *others, method=None, resume=None, epochs=8, module=None, recorder=None, **options):
    torch.manual_seed(0)
    sparse = SparseTraining(method or methods.rigl(0.25, allocation=Uniform(), update_every=12))
    recorder = recorder or Recorder(folder, input_shape=(1, 4, 4))
    trainer = lightning.Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=epochs,
        callbacks=[sparse, recorder, *others],
        **({"logger": False, "enable_checkpointing": any(isinstance(x, ModelCheckpoint) for x in others)} | options),
    )
    trainer.fit(module or Images(), ckpt_path=resume, weights_only=True)
    return sparse.sparsifier


def of(rows, event):
    return [row for row in rows if row["event"] == event]


def test_every_mask_and_epoch_has_a_row(tmp_path):
    losses = Losses()
    sparsifier = fit(tmp_path, losses)
    rows = read_rows(tmp_path / TOPOLOGY_FILE)
    (layers,) = of(rows, "layers")
    assert layers["names"] == ["network.2.weight", "network.4.weight"]
    assert (layers["shapes"], layers["weights"]) == ([[8, 16], [4, 8]], [128, 32])
    masks = of(rows, "mask")
    assert [row["step"] for row in masks] == [0, 1, 13, 25, 37]  # the first mask; updates at steps 0, 12, 24, 36 of 64
    assert [row["updates"] for row in masks] == [0, 1, 2, 3, 4]
    assert all(row["active"] == [32, 8] and row["density"] == 0.25 for row in masks)
    assert [row["step"] for row in of(rows, "epoch")] == list(range(8, 65, 8))
    assert masks[-1]["churn"] == sparsifier.churn > 0
    explored = [row["exploration_rate"] for row in masks]
    assert explored == sorted(explored)
    assert explored[-1] == sparsifier.exploration_rate
    assert [row["loss"] for row in of(rows, "epoch")] == pytest.approx(losses.losses[7::8])
    spikes = loss_spikes(losses.losses, [12, 24, 36])
    assert [row["spike"] for row in of(rows, "loss")] == pytest.approx(spikes.tolist())
    assert [row["update"] for row in of(rows, "loss")] == [13, 25, 37]
    assert [row["step"] for row in of(rows, "loss")] == [23, 35, 47]


def test_a_step_of_several_batches_has_their_mean_loss(tmp_path):
    losses = Losses()
    fit(tmp_path, losses, accumulate_grad_batches=2)
    recorded = [row["loss"] for row in of(read_rows(tmp_path / TOPOLOGY_FILE), "epoch")]
    # Lightning hands out each batch's loss divided by two: what it adds to the gradient.
    expected = [a + b for a, b in zip(losses.losses[6::8], losses.losses[7::8], strict=True)]
    assert recorded == pytest.approx(expected)


def test_the_end_holds_what_the_final_masks_look_like(tmp_path):
    sparsifier = fit(tmp_path)
    first, second = sparsifier.masks.values()
    (end,) = of(read_rows(tmp_path / TOPOLOGY_FILE), "end")
    assert end["dead_inputs"] == [int((first.sum(0) == 0).sum()), int((second.sum(0) == 0).sum())]
    assert end["dead_outputs"] == [int((first.sum(1) == 0).sum()), int((second.sum(1) == 0).sum())]
    assert end["input"] == {"kind": "pixels", "counts": first.sum(0).view(4, 4).tolist()}
    for mask, histogram in zip((first, second), end["in_degrees"], strict=True):
        degrees = mask.sum(1)
        assert histogram["width"] == 1
        expected = [int((degrees == k + histogram["first"]).sum()) for k in range(len(histogram["counts"]))]
        assert histogram["counts"] == expected
        assert sum(expected) == len(mask)


@pytest.mark.parametrize(("cut", "accumulate"), rotated([(30, None), (45, 6)], [1, 2]))
def test_a_resumed_recording_is_that_of_an_uninterrupted_run(tmp_path, cut, accumulate):
    at, every = cut
    options = {"accumulate_grad_batches": accumulate, "method": methods.set_(0.25, update_every=11)}

    def saver(folder):
        return ModelCheckpoint(
            folder, filename="last", every_n_train_steps=every, save_on_train_epoch_end=every is None,
            enable_version_counter=False,
        )  # fmt: skip

    fit(tmp_path / "whole", saver(tmp_path / "whole"), **options)
    with pytest.raises(Cut):
        fit(tmp_path / "cut", CutAt(at), saver(tmp_path / "cut"), **options)
    recorded = (tmp_path / "cut" / TOPOLOGY_FILE).read_text()
    (tmp_path / "cut" / TOPOLOGY_FILE).write_text(recorded + '{"event": "ma')  # power went while a row was written
    fit(tmp_path / "cut", saver(tmp_path / "cut"), resume=tmp_path / "cut" / "last.ckpt", **options)
    whole = read_rows(tmp_path / "whole" / TOPOLOGY_FILE)
    assert of(whole, "loss")
    assert read_rows(tmp_path / "cut" / TOPOLOGY_FILE) == whole


def test_going_on_after_the_end_leaves_one_end(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
    fit(tmp_path, saver, epochs=2, method=methods.static(0.25))
    fit(tmp_path, saver, epochs=4, method=methods.static(0.25), resume=tmp_path / "last.ckpt")
    rows = read_rows(tmp_path / TOPOLOGY_FILE)
    assert [row["step"] for row in of(rows, "end")] == [32]
    assert [row["step"] for row in of(rows, "epoch")] == [8, 16, 24, 32]


def test_fits_of_several_levels_share_a_file(tmp_path):
    for level in (0, 1):
        fit(tmp_path, epochs=1, recorder=Recorder(tmp_path, level=level))
    saver = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
    fit(tmp_path, saver, epochs=2, recorder=Recorder(tmp_path, level=1))  # began anew
    rows = read_rows(tmp_path / TOPOLOGY_FILE)
    assert [(row["level"], row["step"]) for row in of(rows, "end")] == [(0, 8), (1, 16)]
    fit(tmp_path, saver, epochs=3, recorder=Recorder(tmp_path, level=1), resume=tmp_path / "last.ckpt")
    rows = read_rows(tmp_path / TOPOLOGY_FILE)
    epochs = [(row["level"], row["step"]) for row in of(rows, "epoch")]
    assert epochs == [(0, 8), (1, 8), (1, 16), (1, 24)]


def test_masks_are_looked_at_no_more_than_once_in_a_hundred_steps(tmp_path, monkeypatch):
    looks = []
    original = Recorder._look

    def look(self, trainer, sparsifier, due=False):
        before = self._looked_at
        original(self, trainer, sparsifier, due)
        if self._looked_at != before:
            looks.append(sparsifier.step)

    monkeypatch.setattr(Recorder, "_look", look)
    fit(tmp_path, method=methods.set_(0.25, update_every=1, stop=1.0), epochs=30)
    # Updates replace no step here: the mask is new at every step but the last.
    assert looks == [0, 100, 200, 240]
    assert LOOK_EVERY == 100
    rows = read_rows(tmp_path / TOPOLOGY_FILE)
    recorded = [row["step"] for row in of(rows, "mask")]
    assert [row["step"] for row in of(rows, "mask") if "dead_inputs" in row] == [0, 100, 200]
    assert recorded[:5] == [0, 1, 2, 10, 20]
    assert recorded[-1] == 240
    # The epoch at step 8 also knows what the updates since step 2, which have no row, explored.
    assert of(rows, "epoch")[0]["exploration_rate"] > of(rows, "mask")[2]["exploration_rate"]


def test_loggers_get_every_layer(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    targets = [
        CSVLogger(tmp_path, name="", version="", flush_logs_every_n_steps=1),
        TensorBoardLogger(tmp_path, name="board", version=""),
    ]
    fit(tmp_path, logger=targets, log_every_n_steps=1)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        columns = {name for name in next(csv.reader(file)) if name.startswith(("layers/", "topology/", "density"))}
    names = ("network.2.weight", "network.4.weight")
    expected = {f"layers/{key}/{name}" for key in ("density", "dead_inputs", "dead_outputs") for name in names}
    assert columns >= expected | {"topology/loss_spike", "topology/churn", "density"}
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert set(board.Tags()["scalars"]) >= columns
    images = board.Images("masks/input")
    assert [image.step for image in images] == [0, 64]
    assert (images[0].width, images[0].height) == (4, 4)


def test_a_layer_about_to_disconnect_is_named_once(tmp_path, caplog):
    module = Images()
    module.network[2] = nn.Linear(16, 60)
    module.network[4] = nn.Linear(60, 4)
    with caplog.at_level(logging.WARNING, "dst.recording"):
        fit(tmp_path, module=module, method=methods.set_(0.003, allocation=Uniform(), update_every=1))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert messages[0].startswith("network.2.weight is about to disconnect: ")
    assert "of its 60 outputs have a connection at step 0" in messages[0]
    assert messages[1].startswith("network.4.weight is about to disconnect: 1 of its 4 outputs")


def test_a_healthy_network_gets_no_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "dst.recording"):
        fit(tmp_path, method=methods.static(0.5))
    assert not caplog.records


def test_effective_density_is_measured_when_asked_for(tmp_path, caplog):
    recorder = Recorder(tmp_path, input_shape=(1, 4, 4), effective_density=True)
    sparsifier = fit(tmp_path, recorder=recorder)
    first, second = sparsifier.masks.values()
    rows = of(read_rows(tmp_path / TOPOLOGY_FILE), "epoch")
    assert ["effective" in row for row in rows] == [True, True, False, True, True, False, False, False]
    through = (second & first.any(1)).sum().item() / 32
    into = (first & second.any(0)[:, None]).sum().item() / 128
    assert rows[4]["effective"] == [into, through]
    assert not any("effective" in row for row in of(read_rows(tmp_path / TOPOLOGY_FILE), "mask"))


def test_effective_density_needs_a_sample_and_dense_weights(tmp_path):
    with pytest.raises(ConfigurationError, match="input_shape"):
        Recorder(tmp_path, effective_density=True)
    recorder = Recorder(tmp_path, input_shape=(1, 4, 4), effective_density=True)
    with pytest.raises(ConfigurationError, match="backend='csr'"):
        fit(tmp_path, recorder=recorder, method=methods.set_(0.25, backend="csr"))


def test_stored_non_zeros_are_recorded_too(tmp_path):
    sparsifier = fit(tmp_path, method=methods.set_(0.25, backend="csr", update_every=12))
    (end,) = of(read_rows(tmp_path / TOPOLOGY_FILE), "end")
    assert end["input"]["counts"] == sparsifier.masks["network.2.weight"].sum(0).view(4, 4).tolist()


def test_a_recorder_alone_says_what_it_needs(tmp_path):
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=1, callbacks=[Recorder(tmp_path)],
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="SparseTraining first"):
        trainer.fit(Images())


def test_a_diverged_loss_is_recorded_as_unknown(tmp_path):
    module = Images()
    module.training_step = lambda batch, *_: module(batch[0]).sum() * float("nan")
    fit(tmp_path, module=module, method=methods.set_(0.25, update_every=12))
    text = (tmp_path / TOPOLOGY_FILE).read_text()
    assert "NaN" not in text
    assert {json.loads(line).get("loss") for line in text.splitlines()} == {None}


def test_histograms_of_many_degrees_are_binned():
    mask = torch.ones(100, 100, dtype=torch.bool).tril()  # degrees 1 to 100
    assert degree_histogram(mask, bins=10) == {"first": 1, "width": 10, "counts": [10] * 10}
    assert degree_histogram(mask.T, output_dim=1, bins=3) == {"first": 1, "width": 34, "counts": [34, 34, 32]}
    assert degree_histogram(torch.ones(3, 5, dtype=torch.bool)) == {"first": 5, "width": 1, "counts": [3]}


def test_pictures_of_inputs():
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, 0] = mask[1, 0] = mask[0, 7] = True  # pixel (0, 0) of channel 0, pixel (0, 1) of channel 1
    layer = SparseLayer("w", "w", "Linear", (2, 12))
    assert input_picture(layer, mask, (2, 2, 3)) == {"kind": "pixels", "counts": [[2, 1, 0], [0, 0, 0]]}
    assert input_picture(layer, mask, (2, 2, 4)) is None
    assert input_picture(layer, mask, (12,)) is None
    kernel = torch.zeros(4, 3, 2, 2, dtype=torch.bool)
    kernel[:, 0, 0, 1] = kernel[1, 2, 1, 1] = True
    layer = SparseLayer("w", "w", "Conv2d", (4, 3, 2, 2))
    assert input_picture(layer, kernel, (3, 9, 9)) == {"kind": "kernel", "counts": [[0, 4], [0, 1]]}
    assert input_picture(layer, kernel, (1, 9, 9)) is None


@pytest.mark.parametrize(
    ("units", "dead", "answer"), [(100, 94, False), (100, 95, True), (10, 8, False), (10, 9, True), (1, 0, False)]
)
def test_few_live_units_are_a_danger(units, dead, answer):
    assert is_disconnecting(SparseLayer("w", "w", "Linear", (units, 7)), dead, outputs=True) is answer
    assert is_disconnecting(SparseLayer("w", "w", "Linear", (7, units)), dead, outputs=False) is answer
    transposed = SparseLayer("w", "w", "ConvTranspose2d", (7, units, 3, 3), output_dim=1)
    assert is_disconnecting(transposed, dead, outputs=True) is answer

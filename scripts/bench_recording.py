"""Measure what recording adds to training: the time in the recorder's hooks as a share of the fit.

The share is measured within one run and in CPU time, because the difference between two runs is smaller than the noise. The time
of the logger (here ``metrics.csv``) is included.

    python scripts/bench_recording.py                 # LeNet-300-100 on digits: a very short step
    python scripts/bench_recording.py --width 1000 --batch 128
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import dst
from dst.data.loader import TensorLoader
from dst.lightning import SparseTraining
from dst.lightning.recorder import Recorder
from dst.models import MLP


class Timed(Recorder):
    """A recorder that sums the time of its hooks."""

    seconds = 0.0
    last = 0.0

    def _timed(self, hook: str, *args: Any) -> None:
        start = time.process_time()
        getattr(Recorder, hook)(self, *args)
        self.last = time.process_time() - start
        self.seconds += self.last

    def on_train_batch_end(self, *args: Any) -> None:
        """See `Recorder`."""
        self._timed("on_train_batch_end", *args)

    def on_train_epoch_end(self, *args: Any) -> None:
        """See `Recorder`."""
        self._timed("on_train_epoch_end", *args)

    def on_train_end(self, *args: Any) -> None:
        """See `Recorder`."""
        self._timed("on_train_end", *args)


class Module(lightning.LightningModule):
    """An MLP on random images."""

    def __init__(self, width: int, depth: int, pixels: int, batch: int, batches: int) -> None:
        super().__init__()
        self.model = MLP((1, pixels, pixels), 10, width=width, depth=depth)
        self.images = torch.randint(256, (batch * batches, 1, pixels, pixels), dtype=torch.uint8)
        self.labels = torch.randint(10, (batch * batches,))
        self.batch = batch

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        return self.model(images)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def train_dataloader(self) -> TensorLoader:
        """Return batches that are cheap to load."""
        scale, shift = torch.tensor([1 / 128]), torch.tensor([-1.0])
        return TensorLoader(self.images, self.labels, batch_size=self.batch, scale=scale, shift=shift)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


def main() -> None:
    """Run the benchmark and print the share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=200)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--pixels", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=45, help="in an epoch")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--update-every", type=int, default=100)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        recorder = Timed(folder, input_shape=(1, args.pixels, args.pixels))
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=args.epochs, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, logger=CSVLogger(folder, flush_logs_every_n_steps=1),
            callbacks=[SparseTraining(dst.methods.rigl(0.1, update_every=args.update_every)), recorder],
        )  # fmt: skip
        began = time.process_time()
        trainer.fit(Module(args.width, args.depth, args.pixels, args.batch, args.batches))
        seconds = time.process_time() - began
    steps = args.epochs * args.batches
    running = recorder.seconds - recorder.last
    rest = seconds - recorder.seconds
    print(f"{steps:,} steps of {1e3 * rest / steps:.3f} ms, an update every {args.update_every}, one thread")
    print(f"recording: {1e6 * running / steps:.1f} us a step, {100 * running / rest:.2f}% of it")
    print(f"at the end, once: {1e3 * recorder.last:.1f} ms")


if __name__ == "__main__":
    main()

"""Two processes under Lightning see the same samples as one. The test is here because these tests share their processes."""

from __future__ import annotations

import io
import os
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from dst.data import Digits
from tests.distributed.processes import run


class ShardRecorder(LightningModule):
    """Remembers every batch that was trained on."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
        self.folder = folder
        self.shares: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        self.shares.append(images)
        return torch.nn.functional.cross_entropy(self.layer(images.flatten(1)), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        assert len(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_end(self) -> None:
        torch.save(self.shares, self.folder / f"{self.trainer.world_size}-{self.global_rank}.pt")


def see_shares(rank: int, world: int, folder: Path) -> None:
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(world))
    try:
        trainer = Trainer(
            accelerator="cpu",
            devices=world,
            strategy="ddp" if world > 1 else "auto",
            max_epochs=2,
            limit_train_batches=3,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(ShardRecorder(folder), datamodule=Digits(batch_size=128 // world))
    finally:
        for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)


def test_two_processes_see_what_one_sees(tmp_path: Path) -> None:
    see_shares(0, 1, tmp_path)
    assert run(see_shares, 2, tmp_path) == [None, None]
    whole, *shares = (torch.load(io.BytesIO((tmp_path / f"{n}.pt").read_bytes())) for n in ("1-0", "2-0", "2-1"))
    assert len(whole) == 6
    for together, *parts in zip(whole, *shares, strict=True):
        assert torch.equal(torch.stack(parts, 1).flatten(0, 1), together)

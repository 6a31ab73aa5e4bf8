"""The base class of image data modules: splitting, normalisation, batches; and the training loaders for Lightning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning import LightningDataModule, Trainer
from torch import Tensor

from dst.data.augment import crop_and_flip
from dst.data.loader import Batch, Loader, TensorLoader, stratified_split
from dst.errors import ConfigurationError, DataError
from dst.models.classifier import Classifier

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Task:
    """The task that data define for a model.

    Attributes:
        arguments: Keyword arguments of the model.
        example: The shape of a sample, or a batch; see `dst.metrics.layer_macs`.
        module: The class of the Lightning module, which is built from the model, optimizer and scheduler.
    """

    arguments: Mapping[str, Any]
    example: Sequence[int] | Tensor
    module: type[Classifier]


class ImageDataModule(LightningDataModule, ABC):
    """An image-classification data set in memory.

    Batches are float32 images ``(B, C, H, W)``, normalised by the mean and standard deviation of the training set, and int64
    labels ``(B,)``. Training batches are divided among the processes (see :class:`~dst.data.loader.TensorLoader`). In
    evaluation, each process reads the whole split: metrics are exact with and without synchronisation, and no sample is
    padded or left out.

    Args:
        root: Folder of the data sets.
        batch_size: Training samples per step and process.
        eval_batch_size: Samples per batch in validation and test.
        validation: Share of the training split that is held out, in [0, 1), the same for each class.
        download: Download missing files.
        augment: Augment training images; by default if the data set has an augmentation.
        seed: Seed of the held-out samples, the order and the augmentation.
        drop_last: Leave out training samples that do not fill a batch; they differ from epoch to epoch.

    Raises:
        ConfigurationError: A value is out of range.
    """

    folder: ClassVar[str]
    input_shape: ClassVar[tuple[int, int, int]]
    num_classes: ClassVar[int]
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]
    white: ClassVar[int] = 255
    augmentable: ClassVar[bool] = False

    def __init__(
        self,
        root: str | Path = "data",
        *,
        batch_size: int = 128,
        eval_batch_size: int = 1000,
        validation: float = 0.1,
        download: bool = True,
        augment: bool | None = None,
        seed: int = 0,
        drop_last: bool = True,
    ) -> None:
        super().__init__()
        if min(batch_size, eval_batch_size) < 1:
            raise ConfigurationError(
                f"batch_size ({batch_size}) and eval_batch_size ({eval_batch_size}) must be at least 1."
            )
        if not 0 <= validation < 1:
            raise ConfigurationError(f"validation is a share of the training split, in [0, 1); got {validation}.")
        if seed < 0:
            raise ConfigurationError(f"The data seed must be at least 0; got {seed}.")
        if augment and not self.augmentable:
            raise ConfigurationError(f"{type(self).__name__} has no augmentation; set augment to false.")
        self.root = Path(root)
        self.batch_size, self.eval_batch_size, self.validation = batch_size, eval_batch_size, validation
        self.download, self.seed, self.drop_last = download, seed, drop_last
        self.augment = self.augmentable if augment is None else augment
        self._data: dict[Split, tuple[Tensor, Tensor]] = {}

    @property
    def task(self) -> Task:
        """Image classification."""
        return image_task(self.input_shape, self.num_classes)

    @abstractmethod
    def locate(self, *, download: bool) -> Path | None:
        """Return the place of the data set, downloaded if missing and ``download``; ``None`` if it needs no files.

        Raises:
            DataError: The data set is missing; names the addresses of the files and the folder to put them in.
        """

    @abstractmethod
    def read(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return uint8 images ``(N, C, H, W)`` in ``0..white`` and int64 labels ``(N,)``.

        Raises:
            DataError: The files are missing or damaged.
        """

    def prepare_data(self) -> None:
        """Download missing files, if allowed. Lightning calls this in one process per machine."""
        self.locate(download=self.download)

    def setup(self, stage: str | None = None) -> None:
        """Read the training split (``"fit"``, ``"validate"``), the test split (``"test"``) or both (None)."""
        if stage != "test":
            self._split("train")
            if stage == "fit" and self.trainer is not None and not len(self._parts()[1]):
                # Otherwise Lightning runs a validation without batches, and warns.
                self.trainer.limit_val_batches = 0
        if stage not in ("fit", "validate"):
            self._split("test")

    def train_dataloader(self) -> TensorLoader:
        """Return the training loader; it shuffles unless Lightning's ``overfit_batches`` is set."""
        return FitLoader(
            **self._tensors("train"),
            trainer=self.trainer,
            indices=self._parts()[0],
            batch_size=self.batch_size,
            shuffle=not getattr(self.trainer, "overfit_batches", 0),
            drop_last=self.drop_last,
            shard=True,
            seed=self.seed,
            augment=crop_and_flip if self.augment else None,
        )

    def val_dataloader(self) -> TensorLoader | list[TensorLoader]:
        """Return the loader of the held-out samples; an empty list if there are none."""
        held_out = self._parts()[1]
        if not len(held_out):
            return []
        return TensorLoader(**self._tensors("train"), indices=held_out, batch_size=self.eval_batch_size)

    def test_dataloader(self) -> TensorLoader:
        """Return the loader of the test split."""
        return TensorLoader(**self._tensors("test"), batch_size=self.eval_batch_size)

    def _parts(self) -> tuple[Tensor, Tensor]:
        return stratified_split(self._split("train")[1], self.validation, self.seed)

    def _tensors(self, split: Split) -> dict[str, Any]:
        images, labels = self._split(split)
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return {"images": images, "labels": labels, "scale": 1 / (self.white * std), "shift": -mean / std}

    def _split(self, split: Split) -> tuple[Tensor, Tensor]:
        if split not in self._data:
            images, labels = self.read(split)
            classes = int(labels.max()) + 1 if len(labels) else 0
            if images.shape != (len(labels), *self.input_shape) or not 0 < classes <= self.num_classes:
                raise DataError(
                    f"The {split} split of {self.folder} in {self.locate(download=False)} does not belong there: "
                    f"images of shape {tuple(images.shape)}, {len(labels)} labels of {classes} classes; images of "
                    f"shape {self.input_shape}, as many labels and {self.num_classes} classes were expected."
                )
            self._data[split] = images, labels
        return self._data[split]


def image_task(input_shape: Sequence[int], num_classes: int) -> Task:
    """Return the task of classifying images ``(C, H, W)``."""
    return Task({"input_shape": input_shape, "num_classes": num_classes}, input_shape, Classifier)


class LightningLoader(Loader):
    """Mixin of training loaders that corrects the counts of Lightning's loops after a resume; precedes a `Loader`.

    The loops count epochs and batches as ready, started, processed and completed. At the start of an epoch, as many epochs
    are completed as processed. While it runs, one more is ready and started. After certain resumes (Lightning 2.6) the counts
    differ. The loader restores them, which changes nothing if they are right.
    """

    def __init__(self, *, trainer: Trainer | None, **options: Any) -> None:
        self._loops: Any = trainer.fit_loop if trainer is not None else None
        self._entered = False  # whether the loops read it, and not other code
        super().__init__(**options)

    def set_epoch(self, epoch: int) -> None:
        """Move to the beginning of an epoch. Lightning calls this on entering it."""
        if self._loops is not None:
            # With max_steps, after a resume from the end of an epoch, Lightning ends that epoch again and leaves out the
            # next one. Without max_steps it continues with the next one. The corrected counts make it do so always.
            for count in self._epochs():
                if count.completed < count.processed:
                    count.completed = count.processed
                    self._loops._restarting = self._loops.epoch_loop.restarting = False
                    self._loops.reset_restart_stage()
            epoch = self._loops.epoch_progress.current.processed
            self._entered = True
        super().set_epoch(epoch)
        self._take_pending_position(epoch)

    def _take_pending_position(self, epoch: int) -> None:
        """Load a checkpoint's position that Lightning has read but not passed on.

        Lightning passes the position on when it sets up the loaders. If ``configure_optimizers`` asks for the number of steps,
        it sets them up before it reads the checkpoint's loops.
        """
        if self._loops is None:
            return
        pending, self._loops._combined_loader_states_to_load = self._loops._combined_loader_states_to_load, []
        if len(pending) == 1 and pending[0].get("epoch") == epoch and 0 < pending[0]["batch"] < len(self):
            self.load_state_dict(pending[0])

    def __iter__(self) -> Iterator[Batch]:
        if self._entered:
            # After a resume from the last batch of an epoch, Lightning does not count the next one as started. A second
            # resume, from within the next one, would then start it again.
            for count in self._epochs():
                if count.ready == count.processed:
                    count.ready, count.started = count.ready + 1, count.started + 1
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return the position. A batch whose step has failed counts as unread."""
        state = super().state_dict()
        if self._loops is not None:
            batches = self._loops.epoch_loop.batch_progress.current
            state["batch"] = max(state["batch"] - (batches.ready - batches.processed), 0)
        return state

    def _epochs(self) -> tuple[Any, Any]:
        return self._loops.epoch_progress.current, self._loops.epoch_progress.total


class FitLoader(LightningLoader, TensorLoader):
    """The training loader of images."""

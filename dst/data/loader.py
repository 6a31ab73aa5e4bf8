"""Loaders of tensors in memory, whose order is a pure function of the seed and the epoch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dst.errors import ConfigurationError, StateError

Batch = tuple[Tensor, Tensor]
Augment = Callable[[Tensor, Tensor], Tensor]

_ORDER, _AUGMENT, _SPLIT, _OFFSET = range(4)  # independent random streams of one seed


def generator(seed: int, *key: int) -> torch.Generator:
    """Return a CPU generator that depends on ``seed`` and ``key`` only."""
    generator = torch.Generator()
    return generator.manual_seed(int(np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)[0]))


def epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """Return the order of the samples in an epoch: a permutation of ``range(samples)``, int64."""
    return torch.randperm(samples, generator=generator(seed, _ORDER, epoch))


def stratified_split(labels: Tensor, fraction: float, seed: int) -> Batch:
    """Split sample indices in two parts, with the same share of each class.

    Args:
        labels: int64 ``(N,)``.
        fraction: Share of the samples in the second part, in [0, 1).
        seed: Seed of the choice of samples.

    Returns:
        Sorted int64 indices ``(N - K,)`` and ``(K,)`` with ``K = round(fraction * N)``. The second part's share of each class
        is exact to less than one sample.
    """
    samples = len(labels)
    taken = round(fraction * samples)
    shuffled = torch.randperm(samples, generator=generator(seed, _SPLIT))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    # K marks, spread evenly over the samples sorted by class. Integer arithmetic keeps the total exact.
    marks = torch.arange(samples + 1) * taken // samples
    chosen = marks[1:] > marks[:-1]
    return by_class[~chosen].sort().values, by_class[chosen].sort().values


def processes() -> tuple[int, int]:
    """Return this process's rank and the number of processes; ``(0, 1)`` outside ``torch.distributed``."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class Loader(ABC):
    """Batches of samples in memory. The subclass defines the content of a batch.

    The order of an epoch depends on ``(seed, epoch)`` only, and all other randomness on ``(seed, epoch, batch)``. A position is
    therefore two integers, and a resume is exact. With ``shard`` and ``W`` processes, rank ``r`` reads every ``W``-th
    sample, from the ``r``-th on, of each global batch of ``batch_size * W`` samples. Together, the processes see what one
    process with that global batch sees, augmentation included.

    Iteration starts at the beginning of ``epoch``, or of the next epoch if this one was read to its end. The first iteration
    after :meth:`load_state_dict` starts after the last batch read. A plain loop over epochs needs nothing else. Lightning
    sets the epoch through ``sampler``, and saves and restores the position with its checkpoints.

    Args:
        samples: Number of samples.
        indices: The samples to visit, int64 ``(M,)``; all by default.
        batch_size: Samples per batch and process.
        shuffle: Visit the samples in random order.
        drop_last: Drop samples that do not fill a (global) batch. Otherwise, drop only those that would give the processes
            unequal batches.
        shard: Read the share of this process instead of all samples.
        seed: Seed of all randomness, at least 0.

    Raises:
        ConfigurationError: The samples do not make one batch.
    """

    #: Lightning reads this as well as ``sampler``.
    batch_sampler = None

    def __init__(
        self,
        *,
        samples: int,
        batch_size: int,
        indices: Tensor | None = None,
        shuffle: bool = False,
        drop_last: bool = False,
        shard: bool = False,
        seed: int = 0,
    ) -> None:
        self.batch_size = batch_size
        self.epoch = 0
        self.samples = samples if indices is None else len(indices)  #: samples to visit, before any are dropped
        self._indices = indices
        self._shuffle, self._drop_last, self._shard, self._seed = shuffle, drop_last, shard, seed
        self._read = 0  # batches read in this epoch
        self._resuming = False
        if not len(self):
            world = self._processes()[1]
            needed = f"one batch of {batch_size}" + (f" in each of {world} processes" if world > 1 else "")
            raise ConfigurationError(
                f"{self.samples} samples do not make {needed}: lower the batch size"
                + (", hold fewer out for validation or set drop_last to false." if drop_last else ".")
            )

    @abstractmethod
    def _batch(self, chunk: Tensor, epoch: int, number: int) -> Batch:
        """Return this process's share of a batch.

        Args:
            chunk: The samples of the global batch, int64.
            epoch: The epoch.
            number: The index of the batch in the epoch.
        """

    @property
    def sampler(self) -> Loader:
        """The object whose ``set_epoch`` Lightning calls: the loader itself."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Move to the beginning of ``epoch``. If it is the present epoch, keep the position."""
        if epoch != self.epoch:
            self.epoch, self._read, self._resuming = epoch, 0, False

    def __len__(self) -> int:
        chunk = self.batch_size * self._processes()[1]
        return -(-self._usable() // chunk)

    def __iter__(self) -> Iterator[Batch]:
        # Being a generator, this runs when the first batch is read. Lightning makes iterators before it sets the epoch,
        # and some that it never reads.
        if self._read >= len(self):
            self.epoch, self._read = self.epoch + 1, 0
        elif not self._resuming:
            self._read = 0
        self._resuming = False
        epoch, first = self.epoch, self._read
        order = epoch_order(self.samples, self._seed, epoch) if self._shuffle else torch.arange(self.samples)
        order = order[: self._usable()] if self._indices is None else self._indices[order[: self._usable()]]
        chunks = order.split(self.batch_size * self._processes()[1])
        for number in range(first, len(chunks)):
            batch = self._batch(chunks[number], epoch, number)
            self._read = number + 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position (the epoch and its batches read) and the settings that it depends on."""
        return {"epoch": self.epoch, "batch": self._read, **self._meaning()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch read.

        Raises:
            StateError: The position is within an epoch that the present settings divide into other batches.
        """
        changed = [f"{k} {state[k]} -> {v}" for k, v in self._meaning().items() if state[k] != v]
        if changed and state["batch"]:
            raise StateError(
                f"Cannot resume within an epoch whose batches have changed ({', '.join(changed)}): restore "
                "these data settings, or resume from a checkpoint taken between epochs."
            )
        self.epoch, self._read, self._resuming = state["epoch"], state["batch"], True

    def _processes(self) -> tuple[int, int]:
        return processes() if self._shard else (0, 1)

    def _usable(self) -> int:
        world = self._processes()[1]
        unit = world * (self.batch_size if self._drop_last else 1)
        return self.samples - self.samples % unit

    def _meaning(self) -> dict[str, int]:
        return {
            "seed": self._seed,
            "samples": self.samples,
            "global_batch": self.batch_size * self._processes()[1],
        }


class TensorLoader(Loader):
    """Batches of images and labels, each from one indexed read; see `Loader`.

    Args:
        images: uint8 ``(N, C, H, W)``; not copied.
        labels: int64 ``(N,)``.
        scale: float ``(C,)``; a batch is ``image * scale + shift``.
        shift: float ``(C,)``.
        augment: Maps a uint8 batch ``(B, C, H, W)`` and random numbers ``(B, 3)``, uniform in [0, 1), to a uint8 batch of the
            same shape.
        **options: Arguments of `Loader` except ``samples``.

    Raises:
        ConfigurationError: The samples do not make one batch.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        scale: Tensor,
        shift: Tensor,
        augment: Augment | None = None,
        **options: Any,
    ) -> None:
        self._images, self._labels = images, labels
        self._scale, self._shift = scale.view(-1, 1, 1), shift.view(-1, 1, 1)
        self._augment = augment
        super().__init__(samples=len(labels), **options)

    def _batch(self, chunk: Tensor, epoch: int, number: int) -> Batch:
        rank, world = self._processes()
        mine = chunk[rank::world]
        images = self._images.index_select(0, mine)
        if self._augment is not None:
            # Drawn for the global batch: a sample's numbers do not depend on the number of processes.
            uniform = torch.rand(len(chunk), 3, generator=generator(self._seed, _AUGMENT, epoch, number))
            images = self._augment(images, uniform[rank::world])
        return images.float().mul_(self._scale).add_(self._shift), self._labels.index_select(0, mine)

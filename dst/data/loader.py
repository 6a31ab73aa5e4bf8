"""Loaders over tensors held in memory, whose order is a pure function of the seed and the epoch."""

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
    """Return a CPU generator that depends on ``seed`` and ``key`` alone."""
    generator = torch.Generator()
    return generator.manual_seed(int(np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)[0]))


def epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """Return the permutation of ``range(samples)`` (int64) in which epoch ``epoch`` visits the samples."""
    return torch.randperm(samples, generator=generator(seed, _ORDER, epoch))


def stratified_split(labels: Tensor, fraction: float, seed: int) -> Batch:
    """Split sample indices in two, taking the same share of every class.

    Args:
        labels: int64 ``(N,)``.
        fraction: share of the samples in the second part, in [0, 1).
        seed: chooses which samples are taken.

    Returns:
        Sorted int64 indices ``(N - K,)`` and ``(K,)`` with ``K = round(fraction * N)``; the second part's
        share of every class is exact to less than one sample.
    """
    samples = len(labels)
    taken = round(fraction * samples)
    shuffled = torch.randperm(samples, generator=generator(seed, _SPLIT))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    # K marks spread evenly over samples that lie class by class: integer arithmetic keeps the total exact.
    marks = torch.arange(samples + 1) * taken // samples
    chosen = marks[1:] > marks[:-1]
    return by_class[~chosen].sort().values, by_class[chosen].sort().values


def processes() -> tuple[int, int]:
    """Return this process's rank and the number of processes; ``(0, 1)`` outside ``torch.distributed``."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class Loader(ABC):
    """Batches of samples that lie in memory; what a batch holds is up to the subclass.

    The order of an epoch depends on ``(seed, epoch)`` alone and any other randomness on ``(seed, epoch, batch)``, so
    that a position is two integers and resuming is exact. With ``shard`` and ``W`` processes, step ``i`` of
    rank ``r`` holds every ``W``-th sample, from the ``r``-th on, of the ``i``-th global batch of
    ``batch_size * W`` samples: together the processes see what one process with that global batch sees,
    augmentation included.

    Iterating starts at the beginning of ``epoch``, or of the next one after an epoch was read to its end; the
    first iteration after :meth:`load_state_dict` starts behind the last batch read. A plain loop over epochs
    needs nothing else; Lightning sets the epoch through ``sampler``, saves the position in its checkpoints
    and restores it.

    Args:
        samples: number of samples there are.
        indices: int64 ``(M,)``, the samples to visit; all when None.
        batch_size: samples per batch and process.
        shuffle: visit the samples in random order.
        drop_last: drop samples that do not fill a (global) batch. Otherwise only those are dropped which
            would give the processes unequal batches.
        shard: read this process's share, rather than everything in every process.
        seed: of everything random, at least 0.

    Raises:
        ConfigurationError: if the samples do not make one batch.
    """

    #: Lightning reads this beside ``sampler``.
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
        self.samples = samples if indices is None else len(indices)  #: to visit, before any are dropped
        self._indices = indices
        self._shuffle, self._drop_last, self._shard, self._seed = shuffle, drop_last, shard, seed
        self._read = 0  # batches of this epoch that were handed out
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
            chunk: int64, the samples of the global batch.
            epoch: the epoch.
            number: the batch's place in it.
        """

    @property
    def sampler(self) -> Loader:
        """The object whose ``set_epoch`` Lightning calls: the loader itself."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Move to the beginning of ``epoch``; the position within the present epoch is kept."""
        if epoch != self.epoch:
            self.epoch, self._read, self._resuming = epoch, 0, False

    def __len__(self) -> int:
        chunk = self.batch_size * self._processes()[1]
        return -(-self._usable() // chunk)

    def __iter__(self) -> Iterator[Batch]:
        # A generator does nothing before its first batch is asked for. Lightning makes iterators before it
        # has set the epoch, and some that it never reads.
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
        """Return the position, epoch and batches read of it, with the settings that give it its meaning."""
        return {"epoch": self.epoch, "batch": self._read, **self._meaning()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the last batch read.

        Raises:
            StateError: if the state stands within an epoch that other settings divide otherwise.
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
    """Batches of images and labels, each made by one indexed read; see `Loader`.

    Args:
        images: uint8 ``(N, C, H, W)``; they are not copied.
        labels: int64 ``(N,)``.
        scale: float ``(C,)``; a batch is ``image * scale + shift``.
        shift: float ``(C,)``.
        augment: maps a uint8 batch ``(B, C, H, W)`` and random numbers ``(B, 3)``, uniform in [0, 1), to a
            uint8 batch of the same shape.
        **options: what `Loader` takes beside ``samples``.

    Raises:
        ConfigurationError: if the samples do not make one batch.
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
            # Drawn for the global batch, so that a sample's numbers do not depend on the number of processes.
            uniform = torch.rand(len(chunk), 3, generator=generator(self._seed, _AUGMENT, epoch, number))
            images = self._augment(images, uniform[rank::world])
        return images.float().mul_(self._scale).add_(self._shift), self._labels.index_select(0, mine)

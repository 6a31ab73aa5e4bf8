"""Text as sequences of characters, from a local file or Python's standard library."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor

from dst.data.loader import _OFFSET, Batch, Loader, generator
from dst.data.module import LightningLoader, Task
from dst.errors import ConfigurationError, DataError
from dst.models.classifier import LanguageModel

Part = Literal["train", "val", "test"]

UNKNOWN = 0
"""Id of all characters that are not in the training part."""


def standard_library(max_chars: int, folder: str | Path | None = None) -> str:
    """Return sources of Python's standard library: its top-level modules in alphabetical order.

    The text depends on the version of Python only: files that some installations lack are left out.

    Args:
        max_chars: Number of characters after which the text is cut.
        folder: The library's folder; that of the running interpreter by default.

    Raises:
        DataError: The folder holds no sources.
    """
    folder = Path(sysconfig.get_paths()["stdlib"] if folder is None else folder)
    parts: list[str] = []
    length = 0
    for path in sorted(folder.glob("*.py"), key=lambda path: path.name):
        if path.stem in sys.stdlib_module_names and length < max_chars:
            parts.append(read_text(path))
            length += len(parts[-1])
    if not parts:
        raise DataError(f"{folder} holds no sources of Python's standard library: name a text by data.path=FILE")
    return "".join(parts)[:max_chars]


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file; line ends become newlines.

    Raises:
        DataError: The file is missing or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read {path} as UTF-8 text: {error}. Name a text file by data.path=FILE.") from error


def code_points(text: str) -> Tensor:
    """Return the Unicode code points of a text, int64 ``(len(text),)``."""
    return torch.from_numpy(np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int64))


class Vocabulary:
    """The characters of a text, numbered from 1 in the order of their code points. 0 is any other character.

    Args:
        text: Code points with all known characters, int64 ``(M,)``.
    """

    def __init__(self, text: Tensor) -> None:
        self.characters = text.unique()

    def __len__(self) -> int:
        return len(self.characters) + 1

    def encode(self, text: Tensor) -> Tensor:
        """Return the ids, int32 ``(M,)`` in ``range(len(self))``, of int64 code points ``(M,)``."""
        place = torch.searchsorted(self.characters, text).clamp(max=len(self.characters) - 1)
        return torch.where(self.characters[place] == text, place + 1, UNKNOWN).to(torch.int32)

    def decode(self, ids: Tensor) -> str:
        """Return the text of ids ``(M,)``, with U+FFFD for unknown characters."""
        known = "".join(map(chr, self.characters.tolist()))
        return "".join("\N{REPLACEMENT CHARACTER}" if i == UNKNOWN else known[i - 1] for i in ids.tolist())


class TextLoader(Loader):
    """Batches of inputs and targets, both int64 ``(B, context)``. The targets are the next characters.

    Samples are adjacent windows without overlap. With ``shift``, the first window of an epoch starts at an offset below
    ``context`` that depends on ``(seed, epoch)``, so a character has different positions in its windows.

    Args:
        ids: Integers ``(M,)``; not copied.
        context: Characters of a window.
        shift: Start at another offset in each epoch.
        **options: Arguments of `Loader` except ``samples``.

    Raises:
        ConfigurationError: The windows do not make one batch.
    """

    def __init__(self, ids: Tensor, *, context: int, shift: bool = False, **options: Any) -> None:
        self._ids, self._context, self._shift = ids, context, shift
        # The last window needs a target after it, at every offset of the first one.
        room = len(ids) - 1 - (context - 1 if shift else 0)
        super().__init__(samples=max(room // context, 0), **options)

    def _batch(self, chunk: Tensor, epoch: int, number: int) -> Batch:
        rank, world = self._processes()
        offset = 0
        if self._shift:
            offset = int(torch.randint(self._context, (), generator=generator(self._seed, _OFFSET, epoch)))
        starts = chunk[rank::world] * self._context + offset
        windows = self._ids[starts[:, None] + torch.arange(self._context + 1)].long()
        return windows[:, :-1], windows[:, 1:]

    def _meaning(self) -> dict[str, int]:
        return {**super()._meaning(), "context": self._context, "shift": int(self._shift)}


class TextFitLoader(LightningLoader, TextLoader):
    """The training loader of text."""


class Text(LightningDataModule):
    """Characters of a text, for prediction of the next character.

    The text is split by position: first the training part, then validation, then test. The vocabulary is that of the training
    part, with one id for all other characters. Training windows are shuffled, start at another offset in each epoch, and
    are divided among the processes (see :class:`~dst.data.loader.Loader`). In evaluation, each process reads the whole part
    in order.

    Args:
        path: A UTF-8 text file; ``None`` for sources of Python's standard library (`standard_library`), which depend on the
            version of Python.
        context: Characters of a sequence, at least 1.
        max_chars: Number of characters after which the text is cut. By default all of a file, and a million of the standard
            library.
        batch_size: Training sequences per step and process.
        eval_batch_size: Sequences per batch in validation and test.
        validation: Share of the text, in [0, 1).
        test: Share of the text, in (0, 1).
        seed: Seed of the order and the offsets.
        drop_last: Leave out training sequences that do not fill a batch; they differ from epoch to epoch.

    Raises:
        ConfigurationError: A value is out of range.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        context: int = 64,
        max_chars: int | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 256,
        validation: float = 0.1,
        test: float = 0.1,
        seed: int = 0,
        drop_last: bool = True,
    ) -> None:
        super().__init__()
        sizes = {"context": context, "batch_size": batch_size, "eval_batch_size": eval_batch_size}
        for name, size in [*sizes.items(), *([] if max_chars is None else [("max_chars", max_chars)])]:
            if size < 1:
                raise ConfigurationError(f"{name}={size} must be at least 1.")
        if not 0 <= validation < 1 or not 0 < test < 1 or validation + test >= 1:
            raise ConfigurationError(
                f"validation={validation} and test={test} are shares of the text: below 1 together, and test above 0."
            )
        if seed < 0:
            raise ConfigurationError(f"The data seed must be at least 0; got {seed}.")
        self.path = None if path is None else Path(path)
        self.context, self.max_chars = context, max_chars
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.validation, self.test = validation, test
        self.seed, self.drop_last = seed, drop_last
        self._vocabulary: Vocabulary | None = None
        self._parts: dict[Part, Tensor] = {}

    @property
    def task(self) -> Task:
        """Prediction of the next character; reads the text."""
        arguments = {"vocab_size": len(self.vocabulary), "context": self.context}
        return Task(arguments, torch.zeros(1, self.context, dtype=torch.int64), LanguageModel)

    @property
    def vocabulary(self) -> Vocabulary:
        """The characters of the training part; reads the text."""
        self._read()
        assert self._vocabulary is not None
        return self._vocabulary

    def setup(self, stage: str | None = None) -> None:
        """Read and split the text.

        Raises:
            DataError: The text cannot be read, or a part is too short for one sequence.
        """
        self._read()
        if stage == "fit" and self.trainer is not None and not self.validation:
            # Otherwise Lightning runs a validation without batches, and warns.
            self.trainer.limit_val_batches = 0

    def train_dataloader(self) -> TextLoader:
        """Return the training loader; it shuffles unless Lightning's ``overfit_batches`` is set."""
        self._read()
        overfit = bool(getattr(self.trainer, "overfit_batches", 0))
        return TextFitLoader(
            ids=self._parts["train"],
            trainer=self.trainer,
            context=self.context,
            batch_size=self.batch_size,
            shuffle=not overfit,
            shift=not overfit,
            drop_last=self.drop_last,
            shard=True,
            seed=self.seed,
        )

    def val_dataloader(self) -> TextLoader | list[TextLoader]:
        """Return the loader of the validation part; an empty list if there is none."""
        return self._evaluation("val") if self.validation else []

    def test_dataloader(self) -> TextLoader:
        """Return the loader of the test part."""
        return self._evaluation("test")

    def _evaluation(self, part: Part) -> TextLoader:
        self._read()
        return TextLoader(self._parts[part], context=self.context, batch_size=self.eval_batch_size)

    def _read(self) -> None:
        if self._parts:
            return
        if self.path is None:
            text = standard_library(1_000_000 if self.max_chars is None else self.max_chars)
        else:
            text = read_text(self.path)[: self.max_chars]
        points = code_points(text)
        held_out = [int(share * len(points)) for share in (self.validation, self.test)]
        parts = dict(zip(("train", "val", "test"), points.split([len(points) - sum(held_out), *held_out]), strict=True))
        for name, part in parts.items():
            # A training window may begin at any offset below the context.
            needed = 2 * self.context if name == "train" else self.context + 1
            if len(part) < needed and (name != "val" or self.validation):
                raise DataError(
                    f"{self.path or 'The text'} has {len(points)} characters, {len(part)} of them for {name}, where "
                    f"a context of {self.context} needs {needed}: take a longer text or a shorter context."
                )
        self._vocabulary = Vocabulary(parts["train"])
        self._parts = {name: self._vocabulary.encode(part) for name, part in parts.items()}  # type: ignore[misc]

"""The progress bar of a run: one bar over all optimizer steps, on standard error.

Lightning's ``RichProgressBar`` shows one bar for each epoch, in batches, and nothing readable without a terminal.
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from dst.report.summary import number

_REFRESH, _LINES, _BAR = 0.25, 5.0, 20


class Progress(ProgressBar):
    """One bar over all optimizer steps of a fit, with density, updates, accuracy and the time left.

    If standard error is not a terminal, prints a line every five seconds and one at the end.

    Args:
        title: Text before the bar.
    """

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._total: int | None = None
        self._began = (0.0, 0)
        self._due = 0.0
        self._room = 0

    def disable(self) -> None:
        """Show nothing: Lightning calls this on all processes but the first."""
        self.title = ""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Open the bar at the present step."""
        estimate = trainer.estimated_stepping_batches
        self._total = int(estimate) if math.isfinite(estimate) else None
        self._began = (time.monotonic(), trainer.global_step)
        console = Console(stderr=True)
        if not self.title:
            self._due = math.inf
        elif console.is_terminal:
            self._room = console.width - len(self.title) - _BAR - 2 * len(str(self._total)) - 25
            self._bar = Bar(
                TextColumn("{task.description}"), BarColumn(_BAR), MofNCompleteColumn(),
                TextColumn("{task.fields[shown]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
                console=console, auto_refresh=False,
            )  # fmt: skip
            self._task = self._bar.add_task(self.title, total=self._total, completed=trainer.global_step, shown="")
            self._bar.start()
            self._due = time.monotonic() + _REFRESH
        else:
            self._due = time.monotonic() + _LINES

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        """Advance by the optimizer's steps."""
        now = time.monotonic()
        if now < self._due:
            return
        if self._bar is not None:
            self._due = now + _REFRESH
            self._advance(self._bar, trainer)
        else:
            self._due = now + _LINES
            print(self._line(trainer, now), file=sys.stderr, flush=True)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Leave the finished bar on the screen."""
        if self._bar is not None:
            self._advance(self._bar, trainer)
        elif self.title:
            print(self._line(trainer, time.monotonic()), file=sys.stderr, flush=True)
        self._close()

    def on_exception(self, *args: Any) -> None:
        """Leave the bar above the error message."""
        self._close()

    def _advance(self, bar: Bar, trainer: lightning.Trainer) -> None:
        bar.update(self._task, completed=trainer.global_step, shown=_figures(trainer, self._room))
        bar.refresh()

    def _line(self, trainer: lightning.Trainer, now: float) -> str:
        began, first = self._began
        done, total = trainer.global_step, self._total
        place = f"step {done:,}" if total is None else f"{done / total:.0%}, step {done:,} of {total:,}"
        parts = [f"{self.title}: {place}", _figures(trainer)]
        if total is not None and first < done < total:
            left = (total - done) * (now - began) / (done - first)
            parts.append(f"{time.strftime('%H:%M:%S', time.gmtime(left))} left")
        return ", ".join(part for part in parts if part)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _figures(trainer: lightning.Trainer, room: float = math.inf) -> str:
    """Return as many of the trainer's metrics as fit."""
    text = ""
    for name, value in trainer.progress_bar_metrics.items():
        longer = f"{text}, {name} {number(float(value))}".removeprefix(", ")
        if len(longer) > room:
            break
        text = longer
    return text

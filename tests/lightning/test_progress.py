"""The progress bar, on a terminal and in a log."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from dst.lightning import progress
from dst.lightning.progress import Progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(progress.time, "monotonic", found)
    return found


def trainer_at(step, total=1000.0):
    shown = {"density": 0.1, "updates": 3.0}
    return SimpleNamespace(global_step=step, estimated_stepping_batches=total, progress_bar_metrics=shown)


def test_a_log_gets_a_line_every_five_seconds_and_one_at_the_end(clock, capsys):
    bar = Progress("rigl")
    bar.on_train_start(trainer_at(200), None)  # resumed
    for i in range(1, 13):
        clock.now += 1
        bar.on_train_batch_end(trainer_at(200 + 10 * i))
    bar.on_train_end(trainer_at(1000), None)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "rigl: 25%, step 250 of 1,000, density 0.1, updates 3, 00:01:15 left",  # 50 steps in 5 s
        "rigl: 30%, step 300 of 1,000, density 0.1, updates 3, 00:01:10 left",
        "rigl: 100%, step 1,000 of 1,000, density 0.1, updates 3",
    ]


def test_a_training_without_end_has_no_time_left(clock, capsys):
    bar = Progress("rigl")
    bar.on_train_start(trainer_at(0, float("inf")), None)
    clock.now += 6
    bar.on_train_batch_end(trainer_at(7, float("inf")))
    assert capsys.readouterr().err == "rigl: step 7, density 0.1, updates 3\n"


def test_other_processes_show_nothing(clock, capsys):
    bar = Progress("rigl")
    bar.disable()
    bar.on_train_start(trainer_at(0), None)
    clock.now += 60
    bar.on_train_batch_end(trainer_at(10))
    bar.on_train_end(trainer_at(20), None)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("width", "figures"), [(120, "density 0.1, updates 3, val/accuracy 0.9"), (80, "density 0.1, updates 3"), (60, "")]
)
def test_figures_give_way_to_the_bar(monkeypatch, clock, width, figures):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=screen, force_terminal=True, width=width))
    bar = Progress("rigl")
    trainer = trainer_at(0)
    trainer.progress_bar_metrics["val/accuracy"] = 0.9
    bar.on_train_start(trainer, None)
    screen.truncate(0)
    clock.now += 1
    bar.on_train_batch_end(trainer)
    drawn = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]|[\r\n\0]", "", screen.getvalue())
    bar.on_exception()
    assert drawn.startswith("rigl ━━━━━━━━━━━━━━━━━━━━ ")
    assert "…" not in drawn
    assert "left" in drawn
    found = [part for part in ("density 0.1", "updates 3", "val/accuracy 0.9") if part in drawn]
    assert ", ".join(found) == figures


def test_a_terminal_gets_one_bar_on_standard_error(monkeypatch, clock, capsys):
    screen, asked = io.StringIO(), []

    def console(**settings):
        asked.append(settings)
        return Console(file=screen, force_terminal=True, width=120)

    monkeypatch.setattr(progress, "Console", console)
    bar = Progress("rigl")
    bar.on_train_start(trainer_at(0), None)
    clock.now += 1
    bar.on_train_batch_end(trainer_at(500))
    half = screen.getvalue()
    bar.on_exception()
    assert asked == [{"stderr": True}]
    assert "500/1000" in half
    assert "density 0.1, updates 3" in half
    assert "left" in half
    assert screen.getvalue().endswith("\x1b[?25h") or "\x1b[?25h" in screen.getvalue()  # the cursor is back
    assert capsys.readouterr() == ("", "")

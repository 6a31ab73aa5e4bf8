"""Loss spikes after topology updates of the character GPT under AdamW, with and without warm-up of grown weights."""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

import dst
from dst.data import Text
from dst.metrics import loss_spikes
from dst.models import GPT
from dst.models.classifier import cosine
from dst.schedules import Cosine
from dst.tables import csv_table


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        grown_warmup: Steps over which grown weights come to move in full.
        seed: Of weights, masks, data order and updates.
        density: Share of the weights that are kept.
        lr: AdamW's learning rate; a cosine to zero follows a linear rise over the first 5%.
        update_every: Steps from update to update, until three quarters of training.
        fraction: Share of the connections that the first update replaces; a cosine to zero follows.
        replace_step: Whether an update takes the place of the optimizer's step.
        regrow_dropped: Whether what was just dropped may grow again at once.
        steps: Optimizer steps.
        width: Features of a token; two blocks of four heads.
    """

    grown_warmup: int
    seed: int
    density: float = 0.1
    lr: float = 1e-3
    update_every: int = 40
    fraction: float = 0.3
    replace_step: bool = True
    regrow_dropped: bool = True
    steps: int = 600
    width: int = 64


@dataclass(frozen=True)
class Result:
    """What a run gave. Rises are means over updates, those in the first tenth of training left out.

    Attributes:
        rise: Mean of the ``WINDOW`` losses after an update over the mean of the ``WINDOW`` before it, minus 1. The losses are
            those of a fixed sample of training windows: from batch to batch they differ by more than an update changes.
        peak: The same of the largest of the losses after an update (``dst.metrics.loss_spikes``).
        midway: As ``rise``, half-way between updates: what the falling loss alone gives.
        batch_rise: As ``rise``, of the losses that were trained on.
        test_loss: Nats per character of the test part.
        test_accuracy: Share of its characters that are predicted.
        seconds: Wall time.
    """

    rise: float
    peak: float
    midway: float
    batch_rise: float
    test_loss: float
    test_accuracy: float
    seconds: float


WINDOW = 5


def rise(losses: Sequence[float], updates: Sequence[int]) -> float:
    """Mean over updates u of mean(losses behind u) / mean(losses up to u) - 1: step u's loss is from before its update."""
    return statistics.fmean(
        statistics.fmean(losses[u + 1 : u + 1 + WINDOW]) / statistics.fmean(losses[u + 1 - WINDOW : u + 1]) - 1
        for u in updates
    )


def train(setting: Setting) -> Result:
    """Train one GPT on the sources of Python's standard library."""
    began = time.perf_counter()
    losses, probes, updates, test_loss, test_accuracy = run(setting)
    # At first the loss falls too steeply to show anything else.
    late = [u for u in updates if u >= setting.steps // 10]
    return Result(
        rise(probes, late),
        float(loss_spikes(probes, late, WINDOW).mean()),
        rise(probes, [u + setting.update_every // 2 for u in late]),
        rise(losses, late),
        test_loss,
        test_accuracy,
        time.perf_counter() - began,
    )


def run(setting: Setting) -> tuple[list[float], list[float], list[int], float, float]:
    """Train.

    Returns:
        Every step's loss; that of the fixed sample around updates and half-way between them, NaN elsewhere; the steps of
        updates; test loss and accuracy.
    """
    if setting.update_every % 2 or setting.update_every < 4 * WINDOW:
        raise dst.ConfigurationError(f"update_every={setting.update_every} must be even, and at least {4 * WINDOW}")
    torch.manual_seed(setting.seed)
    data = Text(context=64, batch_size=32, validation=0, seed=setting.seed)
    model = GPT(**data.task.arguments, width=setting.width, depth=2, heads=4)
    optimizer = torch.optim.AdamW(model.parameters(), setting.lr)
    schedule = cosine(optimizer, setting.steps, warmup=0.05)
    method = dst.methods.rigl(
        setting.density,
        update_every=setting.update_every,
        fraction=Cosine(setting.fraction),
        replace_step=setting.replace_step,
        regrow_dropped=setting.regrow_dropped,
        grown_warmup=setting.grown_warmup,
    )
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=setting.steps, seed=setting.seed)
    loader = data.train_dataloader()
    sample = [torch.cat(tensors) for tensors in zip(*islice(data.train_dataloader(), 2), strict=True)]
    half = setting.update_every // 2
    losses: list[float] = []
    probes: list[float] = []
    updates: list[int] = []
    while len(losses) < setting.steps:
        for inputs, targets in loader:
            if len(losses) == setting.steps:
                break
            near = min(len(losses) % half, half - len(losses) % half) <= WINDOW
            with torch.no_grad():
                probes.append(cross_entropy(model, *sample).item() if near else math.nan)
            optimizer.zero_grad()
            loss = cross_entropy(model, inputs, targets)
            loss.backward()
            done = sparsifier.updates
            sparsifier.before_step()
            if sparsifier.updates > done:
                updates.append(len(losses))
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    sparsifier.finalize()
    return losses, probes, updates, *evaluate(model, data)


def cross_entropy(model: GPT, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean loss in nats per character."""
    return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(model: GPT, data: Text) -> tuple[float, float]:
    """Mean loss and accuracy over the test part."""
    model.eval()
    loss = correct = count = 0.0
    for inputs, targets in data.test_dataloader():
        logits = model(inputs)
        loss += float(functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        correct += int((logits.argmax(-1) == targets).sum())
        count += targets.numel()
    return loss / count, correct / count


def main() -> None:
    """Train every combination of warm-ups and seeds; add their rows to a CSV file, finished ones left out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "runs.csv")
    parser.add_argument("--grown-warmup", type=int, nargs="+", default=[0, 20])
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    for field in fields(Setting)[2:]:
        name = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            parser.add_argument(name, type=type(field.default), default=field.default)
    given = vars(parser.parse_args())
    output, warmups, seeds = given.pop("output"), given.pop("grown_warmup"), given.pop("seed")
    torch.set_num_threads(1)
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = list(csv.DictReader(output.open(newline=""))) if output.exists() else []
    for seed in seeds:
        for warmup in warmups:
            setting = asdict(Setting(warmup, seed, **given))
            if any(all(row[name] == str(value) for name, value in setting.items()) for row in rows):
                continue
            row = {**setting, **{k: f"{v:.5g}" for k, v in asdict(train(Setting(**setting))).items()}}
            rows.append({name: str(value) for name, value in row.items()})
            print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
            output.write_text(csv_table([list(row), *(old.values() for old in rows)]), encoding="utf-8")


if __name__ == "__main__":
    main()

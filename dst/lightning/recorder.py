"""Recording how a topology moves during training, a row at every update and epoch, for reports and loggers."""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from dst.checkpoints import json_ready, write_atomically
from dst.engine.sparsifier import Sparsifier
from dst.errors import ConfigurationError
from dst.lightning.callback import SparseTraining
from dst.metrics.health import effective_masks
from dst.metrics.recorded import (
    LEAST_ACTIVE,
    DeadCounts,
    dead_units,
    degree_histogram,
    input_picture,
    is_disconnecting,
    whole_masks,
)
from dst.metrics.training import loss_spikes
from dst.report.topology_file import TOPOLOGY_FILE, read_rows
from dst.topology.sharding import whole

logger = logging.getLogger(__name__)


LOOK_EVERY = 100
"""Masks are looked at once in so many optimizer steps at most, which bounds the cost where every step rewires."""

RECORD_EVERY = 10
"""Updates are recorded once in so many steps at most, on average: where every step rewires, every tenth is."""

WINDOW = 10
"""Steps before and after an update whose losses are compared."""

_PICTURES = 10


class Recorder(Callback):
    """Writes ``topology.jsonl``, sends layers' figures to the loggers, and warns of layers about to disconnect.

    ```python
    trainer = lightning.Trainer(callbacks=[dst.lightning.SparseTraining(method), dst.lightning.recorder.Recorder("runs/1")])
    ```

    Every line of the file is a JSON object with an ``event``:

    - ``layers``: ``names``, ``shapes`` and ``weights``, to which the lists of other rows refer.
    - ``mask`` (the first mask, or an update) and ``epoch``: ``step`` (optimizer steps taken), ``epoch``, ``density``,
      ``updates``, ``churn``, ``exploration_rate``, ``drop_fraction``, ``loss`` of the last step, ``active`` weights by layer
      and, where the masks were looked at, ``dead_inputs`` and ``dead_outputs`` by layer.
    - ``loss``: ``before``, ``after`` and ``spike`` of an ``update`` (the steps taken by then), as
      `dst.metrics.loss_spikes` defines them, over 10 steps.
    - ``end``: ``in_degrees`` by layer (see `degree_histogram`) and ``input`` (see `input_picture`).

    Updates that are less than ten steps apart are not all recorded. Masks are looked at when they have changed, at most
    once in 100 steps, and at the end. The recording of a resumed run is that of an uninterrupted one; where a checkpoint
    was saved at an epoch's last batch but before its end, Lightning does not end that epoch again, and its row is missing.
    Where several processes train, losses are the first's.

    Args:
        folder: Where the file goes.
        input_shape: Of one sample, for the picture of what the first layer looks at; None for none.
        level: Number of the fit where a run has several; rows of other fits stay.
        effective_density: Measure at every epoch whose masks are new which connections lie on a path from input to output.
            Costs two passes of the model in double precision, so it is off by default; needs ``input_shape``.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        input_shape: Sequence[int] | None = None,
        level: int | None = None,
        effective_density: bool = False,
    ) -> None:
        super().__init__()
        if effective_density and input_shape is None:
            raise ConfigurationError("effective_density=True needs input_shape: the model is run on a sample")
        self.path = Path(folder) / TOPOLOGY_FILE
        self.input_shape = None if input_shape is None else tuple(input_shape)
        self.level = level
        self.effective_density = effective_density
        self._sparsifier: Sparsifier
        self._clear()

    def _clear(self) -> None:
        self._rows = 0
        self._seen = -1  # the masks last recorded: updates by then, and one for the first
        self._masks = 0  # rows for masks
        self._epoch_step = -1
        self._explored = (-2, 0.0)
        self._dead: DeadCounts | None = None
        self._looked_at = (-1, -1)  # masks seen by then, and the step
        self._effective_at = -1
        self._step = -1
        self._batches: list[Tensor] = []
        self._before: deque[Tensor] = deque(maxlen=WINDOW)
        self._update: int | None = None
        self._update_before: list[Tensor] = []
        self._after: list[Tensor] = []
        self._pictures = -1
        self._warned: set[str] = set()

    # -- Lightning's hooks ----------------------------------------------------------------------------------------

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Drop what an interrupted run recorded behind its checkpoint, and record the first mask."""
        sparsifier = self._sparsifier = _sparsifier(trainer)
        if self.effective_density and sparsifier.method.backend != "masked":
            raise ConfigurationError(
                f"effective_density=True runs the model on dense weights, which backend={sparsifier.method.backend!r} "
                "does not keep: leave it off, or use backend=masked"
            )
        self._step = sparsifier.step
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._trim()
        if self._rows == 0:
            table = sparsifier.layer_table()
            columns = {"names": "name", "shapes": "shape", "weights": "weights"}
            self._write(trainer, "layers", {plural: [row[key] for row in table] for plural, key in columns.items()})
        if sparsifier.mask_version != self._seen:
            self._record_mask(trainer, sparsifier)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Keep the loss, and record an update that happened at this batch."""
        loss = _loss(outputs)
        if loss is not None:
            self._batches.append(loss)
        sparsifier, step = self._sparsifier, self._sparsifier.step
        if step == self._step:
            return
        self._step = step
        if self._batches:
            self._add_loss(trainer)
        if sparsifier.mask_version != self._seen and RECORD_EVERY * (self._masks - 2) <= step:
            self._record_mask(trainer, sparsifier)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Record the epoch."""
        sparsifier = self._sparsifier
        if self._epoch_step == sparsifier.step:
            return  # a resume from the end of an epoch makes Lightning end it once more
        self._epoch_step = sparsifier.step
        self._look(trainer, sparsifier)
        row = self._row(trainer, sparsifier)
        if self.effective_density and sparsifier.is_sparse and self._effective_at != sparsifier.mask_version:
            self._effective_at = sparsifier.mask_version
            row["effective"] = self._effective(trainer, pl_module, sparsifier)
        self._write(trainer, "epoch", row)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Record what the final masks look like."""
        sparsifier = self._sparsifier
        self._look(trainer, sparsifier, due=True)
        histograms, picture = [], None
        for i, (layer, mask) in enumerate(whole_masks(sparsifier)):
            histograms.append(degree_histogram(mask, layer.output_dim))
            if i == 0 and self.input_shape is not None:
                picture = input_picture(layer, mask, self.input_shape)
        row = {**self._row(trainer, sparsifier), "in_degrees": histograms, "input": picture}
        self._write(trainer, "end", row)

    def state_dict(self) -> dict[str, Any]:
        """How far the recording is, for Lightning's checkpoint."""
        dead = self._dead
        return {
            "rows": self._rows,
            "seen": self._seen,
            "masks": self._masks,
            "epoch_step": self._epoch_step,
            "dead": None if dead is None else [dead.inputs, dead.outputs],
            "looked_at": list(self._looked_at),
            "effective_at": self._effective_at,
            "batches": _floats(self._batches),
            "before": _floats(self._before),
            "update": self._update,
            "update_before": _floats(self._update_before),
            "after": _floats(self._after),
            "pictures": self._pictures,
            "warned": sorted(self._warned),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._clear()
        if not state_dict:
            return
        for name in ("rows", "seen", "masks", "epoch_step", "effective_at", "update", "pictures"):
            setattr(self, f"_{name}", state_dict[name])
        self._dead = None if state_dict["dead"] is None else DeadCounts(*state_dict["dead"])
        self._looked_at = (state_dict["looked_at"][0], state_dict["looked_at"][1])
        self._batches, self._update_before, self._after = (
            _tensors(state_dict[name]) for name in ("batches", "update_before", "after")
        )
        self._before.extend(_tensors(state_dict["before"]))
        self._warned = set(state_dict["warned"])

    # -- rows -----------------------------------------------------------------------------------------------------

    def _record_mask(self, trainer: lightning.Trainer, sparsifier: Sparsifier) -> None:
        """A row for new masks."""
        self._masks += 1
        self._seen = sparsifier.mask_version
        self._look(trainer, sparsifier)
        self._write(trainer, "mask", self._row(trainer, sparsifier))
        last = sparsifier.last_update
        if last is not None and last.step == sparsifier.step - 1:
            self._close_window(trainer)
            self._update, self._update_before, self._after = sparsifier.step, list(self._before), []

    def _row(self, trainer: lightning.Trainer, sparsifier: Sparsifier) -> dict[str, Any]:
        masks = sparsifier.mask_version
        if self._explored[0] != masks:  # counting takes longer than all the rest
            self._explored = (masks, sparsifier.exploration_rate)
        row: dict[str, Any] = {
            "step": sparsifier.step,
            "epoch": trainer.current_epoch,
            "density": sparsifier.density,
            "updates": sparsifier.updates,
            "churn": sparsifier.churn,
            "exploration_rate": self._explored[1],
            "drop_fraction": sparsifier.drop_fraction,
            "loss": json_ready(float(self._before[-1])) if self._before else None,
            "active": [layer["nonzero"] for layer in sparsifier.layer_table()],
        }
        if self._dead is not None and self._looked_at[0] == masks:
            row |= {"dead_inputs": self._dead.inputs, "dead_outputs": self._dead.outputs}
        return row

    def _add_loss(self, trainer: lightning.Trainer) -> None:
        """Take the losses of the batches of one step."""
        loss = self._batches[0] if len(self._batches) == 1 else torch.stack(self._batches).mean()
        self._batches.clear()
        if trainer.accumulate_grad_batches > 1:
            loss = loss * trainer.accumulate_grad_batches  # by which Lightning divides a batch's loss
        self._before.append(loss)
        if self._update is not None:
            self._after.append(loss)
            if len(self._after) == WINDOW:
                self._close_window(trainer)

    def _close_window(self, trainer: lightning.Trainer) -> None:
        """Write how the loss fared around the last update, if enough of it is known."""
        update, before, after = self._update, _floats(self._update_before), _floats(self._after)
        self._update = None
        spike = loss_spikes([*before, *after], [len(before) - 1], WINDOW) if before else torch.zeros(0)
        if update is None or not len(spike):
            return
        row = {
            "step": self._step,
            "update": update,
            "before": json_ready(sum(before) / len(before)),
            "after": json_ready(max(after)),
            "spike": json_ready(float(spike[0])),
        }
        self._write(trainer, "loss", row)
        if row["spike"] is not None:
            self._log(trainer, {"topology/loss_spike": row["spike"]}, self._step)

    def _write(self, trainer: lightning.Trainer, event: str, row: Mapping[str, Any]) -> None:
        self._rows += 1
        if not trainer.is_global_zero:
            return
        level = {} if self.level is None else {"level": self.level}
        line = json.dumps({"event": event, **level, **row}, separators=(",", ":"), allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _trim(self) -> None:
        if not self.path.exists():
            return
        rows = read_rows(self.path)
        ours = [row for row in rows if row.get("level") == self.level][: self._rows]
        others = [row for row in rows if row.get("level") != self.level] if self.level is not None else []
        lines = [json.dumps(row, separators=(",", ":")) + "\n" for row in (*others, *ours)]
        write_atomically(self.path, "".join(lines))

    # -- looking at masks -----------------------------------------------------------------------------------------

    def _look(self, trainer: lightning.Trainer, sparsifier: Sparsifier, due: bool = False) -> None:
        """Count dead units, send layers' figures to the loggers and warn, where masks are new and it is time."""
        (masks, step), now = self._looked_at, sparsifier.mask_version
        due = due or step < 0 or sparsifier.step - step >= LOOK_EVERY
        if not sparsifier.is_sparse or masks == now or not due:
            return
        self._dead = dead_units(sparsifier)
        self._looked_at = (now, sparsifier.step)
        figures = {}
        table = zip(sparsifier.layer_table(), self._dead.inputs, self._dead.outputs, strict=True)
        for row, inputs, outputs in table:
            figures[f"layers/density/{row['name']}"] = row["density"]
            figures[f"layers/dead_inputs/{row['name']}"] = float(inputs)
            figures[f"layers/dead_outputs/{row['name']}"] = float(outputs)
        self._log(trainer, figures, sparsifier.step)
        self._warn(sparsifier)
        # A tenth of the training lies between two pictures at least; the look at the end begins the last one.
        tenth = _PICTURES * sparsifier.step // sparsifier.total_steps
        if tenth > self._pictures:
            self._pictures = tenth
            self._log_picture(trainer, sparsifier)

    def _warn(self, sparsifier: Sparsifier) -> None:
        assert self._dead is not None
        for layer, inputs, outputs in zip(sparsifier.layers, self._dead.inputs, self._dead.outputs, strict=True):
            if layer.label in self._warned:
                continue
            for dead, side in ((outputs, "outputs"), (inputs, "inputs")):
                if is_disconnecting(layer, dead, side == "outputs"):
                    units = layer.shape[layer.output_dim if side == "outputs" else 1 - layer.output_dim]
                    self._warned.add(layer.label)
                    logger.warning(
                        "%s is about to disconnect: %d of its %d %s have a connection at step %d; raise the density, or "
                        "leave the layer dense (exclude)",
                        layer.label, units - dead, units, side, sparsifier.step,
                    )  # fmt: skip
                    break

    def _effective(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, sparsifier: Sparsifier
    ) -> list[float]:
        """Each layer's share of weights on a path from input to output."""
        assert self.input_shape is not None
        masks = {name: whole(mask) for name, mask in sparsifier.masks.items()}
        found = effective_masks(module, masks, self.input_shape)
        shares = [int(x.part(found[x.parameter]).sum()) / x.weights for x in sparsifier.layers]
        for layer, row, share in zip(sparsifier.layers, sparsifier.layer_table(), shares, strict=True):
            if share <= LEAST_ACTIVE * row["density"] and layer.label not in self._warned:
                self._warned.add(layer.label)
                logger.warning(
                    "%s is about to disconnect: of its density %.4g, %.4g lies on a path from input to output at step %d",
                    layer.label, row["density"], share, sparsifier.step,
                )  # fmt: skip
        named = zip(sparsifier.layers, shares, strict=True)
        self._log(trainer, {f"layers/effective_density/{x.label}": share for x, share in named}, sparsifier.step)
        return shares

    # -- loggers --------------------------------------------------------------------------------------------------

    def _log(self, trainer: lightning.Trainer, figures: Mapping[str, float], step: int) -> None:
        for target in trainer.loggers:
            target.log_metrics(dict(figures), step=step)

    def _log_picture(self, trainer: lightning.Trainer, sparsifier: Sparsifier) -> None:
        """Send what the first layer looks at to loggers that take images."""
        targets = [x for x in trainer.loggers if isinstance(x, (TensorBoardLogger, WandbLogger))]
        if not targets or self.input_shape is None:
            return
        layer, mask = next(whole_masks(sparsifier))
        picture = input_picture(layer, mask, self.input_shape)
        if picture is None or not trainer.is_global_zero:
            return
        counts = torch.tensor(picture["counts"], dtype=torch.float32)
        grey = (counts / counts.max().clamp(min=1) * 255).to(torch.uint8).numpy()
        for target in targets:
            if isinstance(target, WandbLogger):
                target.log_image("masks/input", [grey], step=sparsifier.step)
            else:
                target.experiment.add_image("masks/input", grey, sparsifier.step, dataformats="HW")


def _sparsifier(trainer: lightning.Trainer) -> Sparsifier:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SparseTraining) and callback.sparsifier is not None:
            return callback.sparsifier
    raise ConfigurationError("Recorder records what SparseTraining does: give the trainer both, SparseTraining first")


def _loss(outputs: Any) -> Tensor | None:
    """The loss in what a training step returned, if there is one."""
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        return None
    return loss.detach() if loss.requires_grad else loss


def _floats(losses: Sequence[Tensor] | deque[Tensor]) -> list[float]:
    return torch.stack([x.reshape(()).float() for x in losses]).tolist() if losses else []


def _tensors(losses: Sequence[float]) -> list[Tensor]:
    return [torch.tensor(loss) for loss in losses]

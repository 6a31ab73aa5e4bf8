"""Recording of the topology during training: one row for each update and epoch, for reports and loggers."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from dst.checkpoints import write_atomically
from dst.engine.sparsifier import Sparsifier
from dst.errors import ConfigurationError
from dst.lightning.callback import SparseTraining
from dst.lightning.loss_window import LossWindow, loss_of
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
from dst.report.topology_file import TOPOLOGY_FILE, read_rows
from dst.topology.sharding import whole

logger = logging.getLogger(__name__)


LOOK_EVERY = 100
"""Optimizer steps between two examinations of the masks, at least: bounds the cost if every step updates the topology."""

RECORD_EVERY = 10
"""Optimizer steps for each recorded update, on average and at least."""

_PICTURES = 10  # of the first layer's inputs, in the whole training


class Recorder(Callback):
    """Writes ``topology.jsonl``, logs figures of each layer, and warns of layers that are about to disconnect.

    ```python
    trainer = lightning.Trainer(callbacks=[dst.lightning.SparseTraining(method), dst.lightning.recorder.Recorder("runs/1")])
    ```

    Each line of the file is a JSON object with an ``event``:

    - ``layers``: ``names``, ``shapes`` and ``weights`` of the layers, in the order of the lists in other rows.
    - ``mask`` (the first mask, or an update) and ``epoch``: ``step`` (optimizer steps taken), ``epoch``, ``density``,
      ``updates``, ``churn``, ``exploration_rate``, ``drop_fraction``, ``loss`` of the last step, ``active`` weights by layer
      and, if the masks were examined, ``dead_inputs`` and ``dead_outputs`` by layer.
    - ``loss``: the losses ``before`` and ``after`` an ``update`` (given as the steps taken) and their ``spike``, over 10
      steps, as `dst.metrics.loss_spikes` defines it.
    - ``end``: ``in_degrees`` by layer (see `degree_histogram`) and ``input`` (see `input_picture`).

    Not every update is recorded if they are less than ten steps apart. Masks are examined when they have changed, at most
    once in 100 steps, and at the end. A resumed run records what an uninterrupted one would, with one exception: if the
    checkpoint was saved at an epoch's last batch but before the epoch's end, Lightning does not end that epoch again, and
    its row is missing. In a run of several processes, losses are those of rank 0.

    Args:
        folder: The folder of the file.
        input_shape: Shape of one sample, for the picture of the first layer's inputs; ``None`` for no picture.
        level: Number of the fit, for a run of several; rows of other fits stay.
        effective_density: Measure, at the end of each epoch with new masks, which connections lie on a path from input to
            output. Costs two passes of the model in double precision; needs ``input_shape``.

    Raises:
        ConfigurationError: ``effective_density`` without ``input_shape``.
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
        self._seen = -1  # version of the masks last recorded
        self._masks = 0  # rows of masks
        self._epoch_step = -1
        self._explored = (-2, 0.0)
        self._dead: DeadCounts | None = None
        self._looked_at = (-1, -1)  # version of the masks last examined, and the step
        self._effective_at = -1
        self._step = -1
        self._losses = LossWindow()
        self._pictures = -1
        self._warned: set[str] = set()

    # -- Lightning's hooks ----------------------------------------------------------------------------------------

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Drop rows that an interrupted run recorded after its checkpoint, and record the first mask."""
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
        loss = loss_of(outputs)
        if loss is not None:
            self._losses.add_batch(loss)
        sparsifier, step = self._sparsifier, self._sparsifier.step
        if step == self._step:
            return
        self._step = step
        self._losses.end_step(trainer.accumulate_grad_batches)
        if self._losses.is_full:
            self._close_window(trainer)
        if sparsifier.mask_version != self._seen and RECORD_EVERY * (self._masks - 2) <= step:
            self._record_mask(trainer, sparsifier)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Record the epoch."""
        sparsifier = self._sparsifier
        if self._epoch_step == sparsifier.step:
            return  # after a resume from the end of an epoch, Lightning ends it again
        self._epoch_step = sparsifier.step
        self._look(trainer, sparsifier)
        row = self._row(trainer, sparsifier)
        if self.effective_density and sparsifier.is_sparse and self._effective_at != sparsifier.mask_version:
            self._effective_at = sparsifier.mask_version
            row["effective"] = self._effective(trainer, pl_module, sparsifier)
        self._write(trainer, "epoch", row)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Record the final masks."""
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
        """Return the state of the recording, for Lightning's checkpoint."""
        dead = self._dead
        return {
            "rows": self._rows,
            "seen": self._seen,
            "masks": self._masks,
            "epoch_step": self._epoch_step,
            "dead": None if dead is None else [dead.inputs, dead.outputs],
            "looked_at": list(self._looked_at),
            "effective_at": self._effective_at,
            **self._losses.state_dict(),
            "pictures": self._pictures,
            "warned": sorted(self._warned),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._clear()
        if not state_dict:
            return
        for name in ("rows", "seen", "masks", "epoch_step", "effective_at", "pictures"):
            setattr(self, f"_{name}", state_dict[name])
        self._dead = None if state_dict["dead"] is None else DeadCounts(*state_dict["dead"])
        self._looked_at = (state_dict["looked_at"][0], state_dict["looked_at"][1])
        self._losses.load_state_dict(state_dict)
        self._warned = set(state_dict["warned"])

    # -- rows -----------------------------------------------------------------------------------------------------

    def _record_mask(self, trainer: lightning.Trainer, sparsifier: Sparsifier) -> None:
        """Write a row for new masks, and compare the losses around the update."""
        self._masks += 1
        self._seen = sparsifier.mask_version
        self._look(trainer, sparsifier)
        self._write(trainer, "mask", self._row(trainer, sparsifier))
        last = sparsifier.last_update
        if last is not None and last.step == sparsifier.step - 1:
            self._close_window(trainer)
            self._losses.open(sparsifier.step)

    def _row(self, trainer: lightning.Trainer, sparsifier: Sparsifier) -> dict[str, Any]:
        masks = sparsifier.mask_version
        if self._explored[0] != masks:  # counting takes longer than the rest of the row
            self._explored = (masks, sparsifier.exploration_rate)
        row: dict[str, Any] = {
            "step": sparsifier.step,
            "epoch": trainer.current_epoch,
            "density": sparsifier.density,
            "updates": sparsifier.updates,
            "churn": sparsifier.churn,
            "exploration_rate": self._explored[1],
            "drop_fraction": sparsifier.drop_fraction,
            "loss": self._losses.last,
            "active": [layer["nonzero"] for layer in sparsifier.layer_table()],
        }
        if self._dead is not None and self._looked_at[0] == masks:
            row |= {"dead_inputs": self._dead.inputs, "dead_outputs": self._dead.outputs}
        return row

    def _close_window(self, trainer: lightning.Trainer) -> None:
        """Write the losses around the last update, if enough of them are known."""
        found = self._losses.close()
        if found is None:
            return
        self._write(trainer, "loss", {"step": self._step, **found})
        if found["spike"] is not None:
            self._log(trainer, {"topology/loss_spike": found["spike"]}, self._step)

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

    # -- examining masks ------------------------------------------------------------------------------------------

    def _look(self, trainer: lightning.Trainer, sparsifier: Sparsifier, due: bool = False) -> None:
        """Count dead units, log figures of each layer and warn, if the masks are new and an examination is due."""
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
        # One picture for each tenth of training, at most; the examination at the end makes the last one.
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
        """Return each layer's share of weights that lie on a path from input to output."""
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
        """Send the picture of the first layer's inputs to loggers that take images."""
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
    raise ConfigurationError(
        "Recorder records the masks of SparseTraining: give the trainer both, SparseTraining first"
    )

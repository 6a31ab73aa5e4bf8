"""Lightning modules for classification of images and of the next token, and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, cast

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torchmetrics import Metric

from dst.errors import ConfigurationError
from dst.nn import auxiliary_losses

OptimizerFactory: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory: TypeAlias = Callable[[Optimizer, int], LRScheduler]


class LossAndAccuracy(Metric):
    """Mean cross-entropy and accuracy over labels, in a few small tensor operations per batch."""

    full_state_update = False
    loss: Tensor
    correct: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("loss", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: its mean loss (scalar), logits (…, classes) and int labels (…)."""
        self.loss += loss.detach().float() * labels.numel()
        self.correct += (logits.detach().argmax(-1) == labels).sum()
        self.count += labels.numel()

    def compute(self) -> dict[str, Tensor]:
        """Return ``loss`` and ``accuracy``, scalars."""
        return {"loss": self.loss / self.count, "accuracy": self.correct / self.count}


class Classifier(LightningModule):
    """A model trained by cross-entropy.

    Logs ``train/loss`` and ``train/accuracy`` as means over each epoch, and likewise ``val/…`` and ``test/…``. Auxiliary losses
    of the model's modules (see `dst.nn.auxiliary_losses`) are added to the training loss, but not to the logged loss.

    Args:
        model: Maps inputs, such as images (N, C, H, W), to logits (…, classes) for labels (…), such as (N,).
        optimizer: Builds the optimizer from the parameters.
        scheduler: Builds the learning-rate schedule from the optimizer and the number of optimizer steps. It advances at
            each step. ``None`` for a constant learning rate.
    """

    def __init__(
        self, model: nn.Module, optimizer: OptimizerFactory, scheduler: SchedulerFactory | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.metrics = nn.ModuleDict({f"{split}_": LossAndAccuracy() for split in ("train", "val", "test")})

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the model's logits."""
        return self.model(inputs)

    def configure_optimizers(self) -> Any:
        """Build the optimizer and the learning-rate schedule.

        Raises:
            ConfigurationError: The schedule needs the number of steps, and the trainer has no estimate.
        """
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is None:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps) or steps < 1:
            raise ConfigurationError(
                "the learning-rate schedule needs the number of steps: set trainer.max_epochs or "
                "trainer.max_steps, or scheduler=constant"
            )
        schedule = self.scheduler(optimizer, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Return the batch's mean loss plus auxiliary losses of the model's modules."""
        loss = self._loss("train", batch)
        return sum(auxiliary_losses(self.model), loss)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Measure a batch."""
        self._loss("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Measure a batch."""
        self._loss("test", batch)

    def on_train_epoch_end(self) -> None:
        """Log the epoch's means."""
        self._log("train")

    def on_validation_epoch_end(self) -> None:
        """Log the split's means."""
        self._log("val")

    def on_test_epoch_end(self) -> None:
        """Log the split's means."""
        self._log("test")

    def _loss(self, split: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        logits = self.model(inputs)
        loss = functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        self._metric(split).update(loss, logits, labels)
        return loss

    def _metric(self, split: str) -> LossAndAccuracy:
        return cast(LossAndAccuracy, self.metrics[f"{split}_"])  # ModuleDict has an attribute "train" of its own

    def _log(self, split: str) -> None:
        metric = self._metric(split)
        if not metric.update_called:
            return  # with max_steps, after a resume from the end of an epoch, Lightning ends it again
        values = metric.compute()
        metric.reset()
        # Lightning's own step counts batches, with one too many after such a resume.
        self.log_dict({"step": float(self.trainer.global_step), "epoch": float(self.current_epoch)})
        self.log(f"{split}/loss", values["loss"])
        self.log(f"{split}/accuracy", values["accuracy"], prog_bar=True)
        for name, value in self.more_metrics(values["loss"]).items():
            self.log(f"{split}/{name}", value)

    def more_metrics(self, loss: Tensor) -> dict[str, Tensor]:
        """Return further metrics to log for a split, from its mean loss in nats."""
        return {}


class LanguageModel(Classifier):
    """A model of text, trained to predict every next token.

    A `Classifier` for tokens (N, T) and logits (N, T, vocabulary). Loss and accuracy are means over tokens. Also logs
    ``bits_per_character``, the loss to base 2, for vocabularies of characters.
    """

    def more_metrics(self, loss: Tensor) -> dict[str, Tensor]:
        """Return bits per character, ``loss / ln 2``."""
        return {"bits_per_character": loss / math.log(2)}


def cosine(optimizer: Optimizer, total_steps: int, *, warmup: float = 0.0, final: float = 0.0) -> LambdaLR:
    """Decay the learning rate along half a cosine to ``final`` times its value (Loshchilov & Hutter 2017, no restarts).

    Args:
        optimizer: The optimizer.
        total_steps: Steps of the whole training, >= 1.
        warmup: Share of the steps, in [0, 1), over which the learning rate first rises linearly.
        final: Factor at the last step, in [0, 1].

    Raises:
        ConfigurationError: A value out of range.
    """
    if not 0 <= warmup < 1 or not 0 <= final <= 1:
        raise ConfigurationError(f"cosine: warmup={warmup} must lie in [0, 1) and final={final} in [0, 1]")
    rising = round(warmup * total_steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        progress = min(1.0, (step - rising) / max(1, total_steps - rising))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def step(
    optimizer: Optimizer, total_steps: int, *, milestones: Sequence[float] = (0.5, 0.75), gamma: float = 0.1
) -> LambdaLR:
    """Multiply the learning rate by ``gamma`` at each milestone.

    Args:
        optimizer: The optimizer.
        total_steps: Steps of the whole training.
        milestones: Shares of the steps, in [0, 1].
        gamma: The factor, > 0.

    Raises:
        ConfigurationError: A value out of range.
    """
    if gamma <= 0 or not all(0 <= share <= 1 for share in milestones):
        raise ConfigurationError(
            f"step: milestones={list(milestones)} are shares of the steps, in [0, 1], and gamma={gamma} is positive"
        )
    steps = [round(share * total_steps) for share in milestones]
    return LambdaLR(optimizer, lambda now: gamma ** sum(now >= milestone for milestone in steps))

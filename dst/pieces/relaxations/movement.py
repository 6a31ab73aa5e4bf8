"""Movement scores, hard and soft."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dst.errors import ConfigurationError
from dst.pieces.relaxations.adam import Adam
from dst.pieces.relaxations.relaxation import (
    LatentLayer,
    MaskFollowing,
    check_at_least_zero,
    where_active,
    wide_dtype,
)


@dataclass(frozen=True)
class Movement(Adam, MaskFollowing):
    """Movement pruning (Sanh et al. 2020, https://arxiv.org/abs/2005.07683): scores S with dL/dS = dL/dW' ⊙ W.

    The score of a weight rises as the weight moves away from zero. Hard variant: the engine's mask holds the best scores
    (equation 3). Soft variant, with a threshold: a weight is active where sigmoid(S) exceeds the threshold, and sigmoid(S) is
    penalised (section 4.2). Adam updates the scores, as in the authors' code. Inactive latent weights get no gradient.

    Attributes:
        learning_rate: Learning rate of the scores, > 0; the authors use 1e-2.
        threshold: Threshold on sigmoid(S), in (0, 0.5), for the soft variant; ``None`` for the hard one.
        penalty: λ, times the mean of sigmoid(S) of each layer, >= 0.
    """

    threshold: float | None = None
    penalty: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_zero(self.penalty, "penalty")
        if self.threshold is not None and not 0 < self.threshold < 0.5:
            raise ConfigurationError(
                f"threshold={self.threshold} must lie in (0, 0.5): scores start at 0, where the sigmoid is 0.5"
            )

    @property
    def until_mask(self) -> bool:
        """True for the soft variant."""
        return self.threshold is not None

    def learned(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """``score``: S, initially zero, float32 or wider; and Adam's state."""
        score = torch.zeros_like(weight, dtype=wide_dtype(weight))
        return {"score": score, **self.moments(score)}

    def _active(self, layer: LatentLayer) -> Tensor:
        if self.threshold is None:
            return layer.mask
        return layer.learned["score"] > math.log(self.threshold / (1 - self.threshold))

    def effective(self, layer: LatentLayer, training: bool) -> Tensor:
        """The active weights, zero elsewhere."""
        return where_active(self._active(layer), layer.weight)

    def importance(self, layer: LatentLayer) -> Tensor:
        """S."""
        return layer.learned["score"]

    def backward(self, layer: LatentLayer, gradient: Tensor, rate: float) -> Tensor:
        """The gradient of active weights; scores take their step, by the gradient of all weights."""
        active, score = self._active(layer), layer.learned["score"]
        toward = gradient.to(score.dtype) * layer.weight
        if self.penalty:
            toward = toward + self.penalty / score.numel() * score.sigmoid() * (1 - score.sigmoid())
        self.move(score, toward, layer.learned)
        return where_active(active, gradient)

    def expected(self, layer: LatentLayer) -> float:
        """Number of active weights."""
        return float(self._active(layer).sum())

    def shift(self, layer: LatentLayer, pressure: float) -> None:
        """Subtract from S."""
        layer.learned["score"].sub_(pressure)

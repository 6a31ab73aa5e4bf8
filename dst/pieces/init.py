"""Inits: how the first mask is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dst.errors import ConfigurationError
from dst.pieces import scores
from dst.pieces.protocols import LayerView, Sampler, Score


class _Ranked:
    """An init that takes the best weights by a score of ``dst.scores``, which needs no gradient."""

    needs_gradient: ClassVar[bool] = False
    score: ClassVar[Score]

    def scores(self, view: LayerView) -> Tensor:
        """Return the score of every position; float, of the layer's shape."""
        return self.score(view)


@dataclass(frozen=True)
class Random(_Ranked, Sampler):
    """Uniformly random weights; see ``dst.scores.Random``."""

    score: ClassVar[scores.Random] = scores.Random()

    def sample(self, size: int, excluded: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Draw positions directly, with memory in proportion to their number; see ``Sampler``."""
        return self.score.sample(size, excluded, count, generator)


@dataclass(frozen=True)
class Magnitude(_Ranked):
    """The weights of largest magnitude, as initialised, trained or loaded; see ``dst.scores.Magnitude``."""

    score: ClassVar[Score] = scores.Magnitude()


@dataclass(frozen=True)
class Importance(_Ranked):
    """The latent weights of largest importance, by the relaxation; see ``dst.scores.Importance``."""

    score: ClassVar[Score] = scores.Importance()


@dataclass(frozen=True)
class Snip:
    """Connection sensitivity abs(g · w) (Lee et al. 2019, equation 6, https://arxiv.org/abs/1810.02340).

    The gradient is the one of the first step, over all its micro-batches. That step makes the mask and does not change the
    weights.

    Deviation: the authors divide by the sum over the network, which does not change the ranking.
    """

    needs_gradient: ClassVar[bool] = True

    def scores(self, view: LayerView) -> Tensor:
        """abs(gradient · weight), of the layer's shape."""
        assert view.gradient is not None
        return (view.gradient * view.weight).abs()


@dataclass(frozen=True)
class Grasp:
    """Gradient signal preservation (Wang et al. 2020, equation 8, https://arxiv.org/abs/2002.07376).

    Removing a weight changes the squared norm of the gradient by about ``-2 · w · (H g)``, where g is the gradient of the
    loss and H its Hessian, both with respect to the sparse weights. The weights whose removal would lower it most are kept:
    the score is ``w · (H g)``, the negative of the paper's.

    The score is measured on the first micro-batch of the first step; H g is averaged over processes. That step makes the
    mask and does not change the weights. It needs ``sparsifier.before_backward(loss)``, which the Lightning callback calls.

    As in the authors' code, a temperature divides the logits; otherwise the curvature of a saturated softmax hides the
    network's. In the step that makes the mask, the outermost module with all sparse weights returns its floating-point
    outputs divided by the temperature, so the loss of that step is smaller.

    Deviations: the authors take 10 to 25 samples of each class; here the scores use the user's batch. They reinitialise
    linear layers for the scores (Xavier); here the layers stay as they are. They divide by the sum over the network, which
    does not change the ranking.

    Attributes:
        temperature: Divisor of the model's outputs, > 0; use 1 if they are not logits.
    """

    needs_gradient: ClassVar[bool] = True  # the gradients show whether the loss was finite

    temperature: float = 200.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ConfigurationError(f"temperature={self.temperature} must be positive; 1 leaves outputs unchanged")

    @property
    def output_scale(self) -> float:
        """1 / temperature."""
        return 1 / self.temperature

    def scores(self, view: LayerView) -> Tensor:
        """Not used: all layers are scored at once."""
        raise TypeError("GraSP scores all layers at once: use loss_scores")

    def loss_scores(
        self,
        loss: Tensor,
        weights: Sequence[Tensor],
        average: Callable[[Sequence[Tensor]], list[Tensor]],
    ) -> list[Tensor]:
        """``w · (H g)`` for every weight; see ``LossInit``."""
        gradients = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
        # H is the mean of the processes' Hessians and g that of their gradients, so the direction is averaged first.
        directions = average([g.detach() for g in gradients])
        curved = [(g, v) for g, v in zip(gradients, directions, strict=True) if g.requires_grad]
        if not curved:  # a linear loss
            return [torch.zeros_like(w) for w in weights]
        outputs, vectors = zip(*curved, strict=True)
        products = torch.autograd.grad(outputs, weights, vectors, retain_graph=True, materialize_grads=True)
        return [w.detach() * h for w, h in zip(weights, average([h.detach() for h in products]), strict=True)]


@dataclass(frozen=True)
class Synflow:
    """Iterative synaptic flow (Tanaka et al. 2020, algorithm 1, https://arxiv.org/abs/2006.05467).

    The score is ``abs(w · dR/dw)``, where R is the sum of the outputs on an input of ones with the absolute values of all
    parameters: the flow through a connection along all paths. It needs no data. Weights are pruned in n small steps, each
    with the scores of the remaining network, so that no layer is emptied. The density after step k is ``density ** (k / n)``.

    The first training step records the model's call; it makes the mask and does not change the weights. The call is repeated
    in float64 and evaluation mode. Inputs that are not floating-point (token ids, masks) stay as they are. With several
    processes, the scores of the first one decide.

    Deviations: the authors take absolute values of running statistics too; here buffers stay as they are, which makes no
    difference before training. They compute in float32. A pruned weight never returns in a later step; in their code it can
    if scores tie at zero. Scores below 1e-12 of a layer's sum are rounding errors and count as zero.

    Attributes:
        iterations: n, number of pruning steps, >= 1; with 1, the scores of the dense network decide.
    """

    needs_gradient: ClassVar[bool] = False

    iterations: int = 100

    def __post_init__(self) -> None:
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 1:
            raise ConfigurationError(f"iterations={self.iterations!r} must be a positive number of pruning steps")

    def scores(self, view: LayerView) -> Tensor:
        """Not used: all layers are scored at once."""
        raise TypeError("SynFlow scores all layers at once: use call_scores")

    def call_scores(
        self,
        output: Callable[[Sequence[Tensor]], Tensor],
        weights: Sequence[Tensor],
        select: Callable[[Sequence[Tensor], float], list[Tensor]],
    ) -> list[Tensor]:
        """Scores of the last pruning step, of which the largest is 1; -1 where pruned before. See ``CallInit``.

        Raises:
            ConfigurationError: The scores are not finite, or all zero.
        """
        magnitudes = [w.abs() for w in weights]
        masks = [torch.ones_like(w, dtype=torch.bool) for w in weights]
        for k in range(1, self.iterations + 1):
            flows = _flows(output, [w * m for w, m in zip(magnitudes, masks, strict=True)])
            # Scaled by the largest, because a selection in float32 has a smaller range than float64.
            largest = max((f.max() for f in flows), default=torch.zeros(()))
            if not 0 < largest < torch.inf:
                raise ConfigurationError(
                    f"SynFlow's scores are {'all zero' if largest == 0 else 'not finite'} at pruning step {k}: no path "
                    "from the inputs to the outputs is sensitive to its weights (normalisation without running "
                    "statistics removes the scale of its inputs); use another init"
                )
            # Paths that cancel, for example in a softmax of equal numbers, leave rounding errors in arbitrary order.
            error = 1e-12 * max(f.sum() for f in flows)
            flows = [
                torch.where(f > error, f / largest, 0).masked_fill(~m, -1) for f, m in zip(flows, masks, strict=True)
            ]
            if k < self.iterations:
                masks = select(flows, k / self.iterations)
        return flows


def _flows(output: Callable[[Sequence[Tensor]], Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """``abs(w · dR/dw)`` for every weight."""
    leaves = [w.detach().requires_grad_() for w in weights]
    with torch.enable_grad():
        gradients = torch.autograd.grad(output(leaves), leaves, materialize_grads=True)
    return [(w * g).abs() for w, g in zip(weights, gradients, strict=True)]


@dataclass(frozen=True)
class FromFile:
    """The masks of a file written by ``dst.save_masks``.

    The file's densities are used; they must agree with the method's.

    Attributes:
        path: The file. It is not compared at a resume, so the file may move.
    """

    needs_gradient: ClassVar[bool] = False

    path: str = field(compare=False)

    def scores(self, view: LayerView) -> Tensor:
        """Not used: the file holds the masks themselves."""
        raise TypeError("masks of a file are not scored")

"""Which connections exist in the first mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dst.errors import ConfigurationError
from dst.pieces import scores
from dst.pieces.protocols import LayerView


@dataclass(frozen=True)
class Random:
    """Uniformly random connections."""

    @property
    def needs_gradient(self) -> bool:
        """Never."""
        return False

    def scores(self, view: LayerView) -> Tensor:
        """Uniform random numbers of the layer's shape."""
        return scores.Random()(view)

    def sample(self, size: int, excluded: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Draw the first connections directly, with memory in proportion to their number."""
        return scores.Random().sample(size, excluded, count, generator)


@dataclass(frozen=True)
class Magnitude:
    """The largest weights of the moment, as they were initialised, trained or loaded."""

    @property
    def needs_gradient(self) -> bool:
        """Never."""
        return False

    def scores(self, view: LayerView) -> Tensor:
        """abs(weight), of the layer's shape."""
        return view.weight.abs()


@dataclass(frozen=True)
class Importance:
    """What the method's relaxation ranks latent weights by: their magnitude, or a learned score (``dst.relaxations``)."""

    @property
    def needs_gradient(self) -> bool:
        """Never."""
        return False

    def scores(self, view: LayerView) -> Tensor:
        """Float, of the layer's shape."""
        return scores.Importance()(view)


@dataclass(frozen=True)
class Snip:
    """Connection sensitivity abs(g · w) (Lee et al. 2019, equation 6, https://arxiv.org/abs/1810.02340).

    The gradient is the first step's, over all its micro-batches; that step changes the mask and not the weights.

    Deviation: the authors divide by the sum over the network, which changes no ranking.
    """

    @property
    def needs_gradient(self) -> bool:
        """Always."""
        return True

    def scores(self, view: LayerView) -> Tensor:
        """abs(gradient · weight), of the layer's shape."""
        assert view.gradient is not None
        return (view.gradient * view.weight).abs()


@dataclass(frozen=True)
class Grasp:
    """Gradient signal preservation (Wang et al. 2020, equation 8, https://arxiv.org/abs/2002.07376).

    Removing a weight changes the squared norm of the gradient by about ``-2 · w · (H g)``, where g is the gradient of the
    loss and H its Hessian, both of the sparse weights. Those whose removal would lower it most are kept: the score, higher
    is better, is ``w · (H g)``, the paper's with the sign turned.

    It is measured on the first micro-batch of the first step, and H g is that of all processes' losses together. The step
    changes the mask and not the weights. Needs ``sparsifier.before_backward(loss)``, which the Lightning callback calls.

    As in the authors' code, logits are divided by a temperature, without which the curvature of a saturated softmax hides
    that of the network. In the step that makes the mask, the outermost module that holds all sparse weights returns its
    floating-point outputs divided by it: that step's loss is a smaller one.

    Deviations: the authors take ten to 25 samples of each class, here it is the user's batch; they draw linear layers anew
    for the scores (Xavier), here they are the network's; they divide by the sum over the network, which changes no
    ranking.

    Attributes:
        temperature: What outputs are divided by, > 0; 1 where they are no logits.
    """

    temperature: float = 200.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ConfigurationError(f"temperature={self.temperature} must be positive; 1 leaves outputs as they are")

    @property
    def output_scale(self) -> float:
        """1 / temperature."""
        return 1 / self.temperature

    @property
    def needs_gradient(self) -> bool:
        """Always: that the step's gradients are finite says that the loss was."""
        return True

    def scores(self, view: LayerView) -> Tensor:
        """Not used: the network is scored as a whole."""
        raise TypeError("GraSP scores the network as a whole, by loss_scores")

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
        if not curved:  # a loss without curvature, such as a sum of outputs of one layer
            return [torch.zeros_like(w) for w in weights]
        outputs, vectors = zip(*curved, strict=True)
        products = torch.autograd.grad(outputs, weights, vectors, retain_graph=True, materialize_grads=True)
        return [w.detach() * h for w, h in zip(weights, average([h.detach() for h in products]), strict=True)]


@dataclass(frozen=True)
class Synflow:
    """Iterative synaptic flow (Tanaka et al. 2020, algorithm 1, https://arxiv.org/abs/2006.05467).

    The score is ``abs(w · dR/dw)``, where R is the sum of the outputs on an input of ones with all parameters at their
    absolute values: the flow through a connection along all paths. It needs no data. Pruning in many small steps, with
    scores of what is left, is what keeps layers from being emptied: after step k of n the density is
    ``density ** (k / n)``.

    The model's call is seen in the first step, which changes the mask and not the weights, and repeated in float64 and
    evaluation mode. Inputs that are no floating-point numbers (token ids, masks) stay as they are; under several processes
    the first one's scores count.

    Deviations: the authors take running statistics at their absolute values too; here buffers stay as they are, which
    makes no difference before training. They compute in float32. What was pruned at one step never comes back at a later
    one; in their code it can where scores tie at zero. Scores below 1e-12 of a layer's sum count as zero, since they are
    rounding errors.

    Attributes:
        iterations: n, the number of pruning steps, >= 1. With one, the scores of the dense network decide.
    """

    iterations: int = 100

    def __post_init__(self) -> None:
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 1:
            raise ConfigurationError(f"iterations={self.iterations!r} must be a positive number of pruning steps")

    @property
    def needs_gradient(self) -> bool:
        """Never: the model's call is all."""
        return False

    def scores(self, view: LayerView) -> Tensor:
        """Not used: the network is scored as a whole."""
        raise TypeError("SynFlow scores the network as a whole, by call_scores")

    def call_scores(
        self,
        output: Callable[[Sequence[Tensor]], Tensor],
        weights: Sequence[Tensor],
        select: Callable[[Sequence[Tensor], float], list[Tensor]],
    ) -> list[Tensor]:
        """Scores of the last pruning step, the largest being 1; negative where pruned before. See ``CallInit``.

        Raises:
            ConfigurationError: Scores that are not finite, or zero everywhere.
        """
        magnitudes = [w.abs() for w in weights]
        masks = [torch.ones_like(w, dtype=torch.bool) for w in weights]
        for k in range(1, self.iterations + 1):
            flows = _flows(output, [w * m for w, m in zip(magnitudes, masks, strict=True)])
            # In units of the largest, as float64 reaches where the float32 of a selection does not.
            largest = max((f.max() for f in flows), default=torch.zeros(()))
            if not 0 < largest < torch.inf:
                raise ConfigurationError(
                    f"SynFlow's scores are {'all zero' if largest == 0 else 'not finite'} at pruning step {k}: no path "
                    "leads from the inputs to the outputs that is sensitive to its weights (normalisation without "
                    "running statistics takes away the scale of what it sees); use another init"
                )
            # Paths that cancel (through a softmax of equal numbers, say) leave rounding errors, in no order to rely on.
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
    """The masks of a file written by ``dst.save_masks``; its densities are used, and must agree with the method's.

    Attributes:
        path: The file. Where it lies is no part of the method, so a moved file does not prevent a resume.
    """

    path: str = field(compare=False)

    @property
    def needs_gradient(self) -> bool:
        """Never."""
        return False

    def scores(self, view: LayerView) -> Tensor:
        """Not used: the file holds the masks themselves."""
        raise TypeError("masks read from a file are not scored")

"""What a forward pass sees of latent weights, and how its gradient reaches them.

A relaxation is a frozen dataclass of pure functions of one layer (``LatentLayer``); ``dst.backends.latent`` owns the tensors
and calls them. Between optimizer steps the parameter holds ``effective`` weights, so its gradient is that of the effective
weights; as a step begins, ``backward`` turns it into the gradient of the latent ones, which the optimizer then moves.

Two kinds: under ``StraightThrough`` and hard ``Movement`` the engine's mask says what is active, and the relaxation what
happens to the rest. ``LearnedThreshold``, ``HardConcrete`` and soft ``Movement`` learn how much is active: they act while
training counts as dense, and end when the first mask is made (``until_mask``), from where on training is masked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dst.errors import ConfigurationError
from dst.topology.counts import count_active
from dst.topology.selection import select_top


@dataclass(frozen=True)
class LatentLayer:
    """One layer of latent weights; all tensors but scalars have its shape, and are views to be changed in place.

    Attributes:
        weight: The latent weights.
        mask: Bool, the engine's mask; all True until there is one.
        learned: What the relaxation keeps beside them, by name, as its ``learned`` made it.
        noise: Logits of uniform random numbers, for relaxations that sample; the same throughout one optimizer step.
    """

    weight: Tensor
    mask: Tensor
    learned: Mapping[str, Tensor] = field(default_factory=dict)
    noise: Tensor | None = None


class Relaxation(Protocol):
    """Weights that training moves, and weights that the network computes with."""

    @property
    def until_mask(self) -> bool:
        """Whether the relaxation ends as the first mask is made, and learns how many weights are active until then."""

    @property
    def samples(self) -> bool:
        """Whether effective weights are random in training and not in evaluation."""

    def learned(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Tensors to keep beside a layer's latent weights, at their first values."""

    def effective(self, layer: LatentLayer, training: bool) -> Tensor:
        """The weights to compute with."""

    def importance(self, layer: LatentLayer) -> Tensor:
        """What ranks the weights for a mask; higher is better."""

    def trained(self, layer: LatentLayer) -> Tensor | None:
        """Where the gradient of the effective weights is read (bool), ``None`` for everywhere."""

    def frozen(self, layer: LatentLayer) -> Tensor | None:
        """Where latent weights stay as they are whatever the optimizer does (bool), ``None`` for nowhere."""

    def backward(self, layer: LatentLayer, gradient: Tensor, rate: float) -> Tensor:
        """The gradient of the latent weights, given that of the effective ones; updates what is learned.

        Args:
            layer: The layer.
            gradient: Of the effective weights.
            rate: The optimizer's learning rate.
        """

    def select(self, layer: LatentLayer, density: float, generator: torch.Generator) -> None:
        """Follow a new mask of the engine.

        Args:
            layer: The layer.
            density: The method's.
            generator: For ties.
        """

    def expected(self, layer: LatentLayer) -> float:
        """How many weights are active, where that is learned."""

    def shift(self, layer: LatentLayer, pressure: float) -> None:
        """Make activity rarer (``pressure`` > 0) or more frequent, where it is learned."""


def pressure(density: float, progress: float, target: float, steps: int) -> float:
    """How hard to push a learned density at one step: proportional to the log of what it is over what it should be.

    It should be target + (1 − target)·(1 − progress)³, the schedule of Zhu & Gupta 2017
    (https://arxiv.org/abs/1710.01878). Papers that learn densities tune a penalty until the result is what was wanted;
    this closes the loop instead.

    Args:
        density: The network's present density, in [0, 1].
        progress: Share of the learning phase that is over, in [0, 1].
        target: The density at its end.
        steps: Its length, >= 1.

    Returns:
        A number of either sign, to be added to a threshold on a logarithmic scale.
    """
    wanted = target + (1 - target) * (1 - min(1.0, progress)) ** 3
    # The log of a density falls up to ten times as fast as the threshold's rises: gains above 0.1 would oscillate.
    gain = min(0.1, 50 / steps)
    return gain * math.log(max(density, 1e-6) / wanted)


class _Fixed:
    """A relaxation whose density is not its own business, and that keeps and samples nothing."""

    @property
    def until_mask(self) -> bool:
        return False

    @property
    def samples(self) -> bool:
        return False

    def learned(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def trained(self, layer: LatentLayer) -> Tensor | None:
        return None

    def frozen(self, layer: LatentLayer) -> Tensor | None:
        return None

    def select(self, layer: LatentLayer, density: float, generator: torch.Generator) -> None:
        pass

    def expected(self, layer: LatentLayer) -> float:
        return float(layer.mask.sum())

    def shift(self, layer: LatentLayer, pressure: float) -> None:
        pass


class _Learned(_Fixed):
    """A relaxation that learns how many weights are active."""

    @property
    def until_mask(self) -> bool:
        return True


@dataclass(frozen=True)
class StraightThrough(_Fixed):
    """Inactive weights live on out of sight: the gradient of weight ⊙ mask is taken for the weight's.

    Top-KAST (Jayakumar et al. 2021, https://arxiv.org/abs/2106.03517) moves the best weights of a wider density only, and
    shrinks the active and the others of these at different rates; SR-STE (Zhou et al. 2021,
    https://arxiv.org/abs/2102.04010, equation 9) moves all, and shrinks the inactive: g + λ·(1 − m) ⊙ w.

    Attributes:
        backward_density: Density, over all sparse layers, of the weights that are moved, at least the method's; each
            layer has as many times its active weights as the network has. ``None`` moves all.
        active_decay: Added to the gradient of active weights, times the weight; >= 0.
        inactive_decay: Added to the gradient of inactive weights that are moved, times the weight; >= 0.
    """

    backward_density: float | None = None
    active_decay: float = 0.0
    inactive_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.backward_density is not None and not 0 < self.backward_density <= 1:
            raise ConfigurationError(f"backward_density={self.backward_density} must lie in (0, 1]")
        for name in ("active_decay", "inactive_decay"):
            _check_at_least_zero(getattr(self, name), name)

    def learned(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The set of weights that are moved, where it is not all."""
        return {} if self.backward_density is None else {"moved": torch.ones_like(weight, dtype=torch.bool)}

    def effective(self, layer: LatentLayer, training: bool) -> Tensor:
        """Zero where the mask is."""
        return _where(layer.mask, layer.weight)

    def importance(self, layer: LatentLayer) -> Tensor:
        """abs(weight)."""
        return layer.weight.abs()

    def trained(self, layer: LatentLayer) -> Tensor | None:
        """The set that is moved."""
        return layer.learned.get("moved")

    def frozen(self, layer: LatentLayer) -> Tensor | None:
        """Everything else: neither momentum nor the optimizer's weight decay touches it."""
        return None if self.backward_density is None else ~layer.learned["moved"]

    def backward(self, layer: LatentLayer, gradient: Tensor, rate: float) -> Tensor:
        """The same gradient where weights are moved, and the decay."""
        if not self.active_decay and not self.inactive_decay:
            return gradient
        decay = torch.where(layer.mask, self.active_decay, self.inactive_decay).to(gradient.dtype)
        result = gradient + decay * layer.weight
        return result if self.backward_density is None else _where(layer.learned["moved"], result)

    def select(self, layer: LatentLayer, density: float, generator: torch.Generator) -> None:
        """The active weights and, of the others, those of largest magnitude."""
        if self.backward_density is None:
            return
        active, size = int(layer.mask.sum()), layer.mask.numel()
        wanted = count_active(size, min(1.0, active / size * self.backward_density / density))
        others = select_top(layer.weight.abs(), max(0, wanted - active), ~layer.mask, generator)
        layer.learned["moved"].copy_(layer.mask | others)


@dataclass(frozen=True)
class LearnedThreshold(_Learned):
    """STR: sign(w) · relu(abs(w) − g(s)), one s per layer (Kusupati et al. 2020, https://arxiv.org/abs/2002.03231).

    g is the sigmoid. s is moved by plain gradient descent at the optimizer's learning rate, with weight decay towards 0:
    towards a threshold of 0.5, which is what makes networks sparse.

    Attributes:
        initial: s at the start. The authors' is between -200 and -12800, found for each density and training length.
        decay: Weight decay of s, >= 0.
    """

    initial: float = -8.0
    decay: float = 1e-4

    def __post_init__(self) -> None:
        _check_at_least_zero(self.decay, "decay of the threshold")

    def learned(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """s, float32 or wider."""
        return {"threshold": torch.full((), self.initial, dtype=_wide(weight), device=weight.device)}

    def effective(self, layer: LatentLayer, training: bool) -> Tensor:
        """Soft thresholding."""
        return layer.weight.sign() * self.importance(layer).relu()

    def importance(self, layer: LatentLayer) -> Tensor:
        """abs(w) − g(s): the effective magnitude where there is one, and how far the others are from having one."""
        return layer.weight.abs() - layer.learned["threshold"].sigmoid().to(layer.weight.dtype)

    def trained(self, layer: LatentLayer) -> Tensor | None:
        """The weights above the threshold."""
        return self.importance(layer) > 0

    def backward(self, layer: LatentLayer, gradient: Tensor, rate: float) -> Tensor:
        """The same gradient above the threshold, zero below; s takes its step."""
        above = _where(self.importance(layer) > 0, gradient)
        threshold = layer.learned["threshold"]
        slope = threshold.sigmoid() * (1 - threshold.sigmoid())
        step = -slope * (above * layer.weight.sign()).sum(dtype=threshold.dtype) + self.decay * threshold
        threshold.sub_(rate * step)
        return above

    def expected(self, layer: LatentLayer) -> float:
        """Weights above the threshold."""
        return float((self.importance(layer) > 0).sum())

    def shift(self, layer: LatentLayer, pressure: float) -> None:
        """Add to s; a small threshold is exp(s), so that the scale is logarithmic."""
        layer.learned["threshold"].add_(pressure)


@dataclass(frozen=True)
class _Adam:
    """Steps of Adam (Kingma & Ba 2015, https://arxiv.org/abs/1412.6980) for what is learned beside the weights.

    Attributes:
        learning_rate: Constant, > 0.
    """

    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ConfigurationError(f"learning_rate={self.learning_rate} must be positive")

    @staticmethod
    def moments(values: Tensor) -> dict[str, Tensor]:
        zeros = torch.zeros_like(values)
        return {"mean": zeros, "square": zeros.clone(), "steps": torch.zeros((), dtype=torch.int64)}

    def move(self, values: Tensor, gradient: Tensor, kept: Mapping[str, Tensor]) -> None:
        """One step, in place, with the paper's β₁ = 0.9, β₂ = 0.999 and ε = 1e-8."""
        gradient = gradient.to(values.dtype)
        kept["steps"].add_(1)
        steps = int(kept["steps"])
        mean = kept["mean"].lerp_(gradient, 0.1)
        square = kept["square"].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        scale = (square / (1 - 0.999**steps)).sqrt_().add_(1e-8)
        values.addcdiv_(mean, scale, value=-self.learning_rate / (1 - 0.9**steps))


@dataclass(frozen=True)
class Movement(_Adam, _Learned):
    """Movement pruning (Sanh et al. 2020, https://arxiv.org/abs/2005.07683): scores S with dL/dS = dL/dW' ⊙ W.

    Weights that move away from zero gain score. Hard: the engine's mask holds the best scores (equation 3). Soft, with a
    threshold: active is where sigmoid(S) exceeds it, and sigmoid(S) is penalised (section 4.2). Scores are moved by
    Adam, as in the authors' code; latent weights that are inactive get no gradient.

    Attributes:
        learning_rate: Of the scores; the authors' is 1e-2.
        threshold: On sigmoid(S), in (0, 1), for the soft variant; ``None`` for the hard one.
        penalty: λ ≥ 0, times the mean of sigmoid(S) of each layer.
    """

    threshold: float | None = None
    penalty: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least_zero(self.penalty, "penalty")
        if self.threshold is not None and not 0 < self.threshold < 0.5:
            raise ConfigurationError(
                f"threshold={self.threshold} must lie in (0, 0.5): scores start at 0, where the sigmoid is 0.5"
            )

    @property
    def until_mask(self) -> bool:
        """For the soft variant."""
        return self.threshold is not None

    def learned(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Scores of zero and their moments, float32 or wider."""
        score = torch.zeros_like(weight, dtype=_wide(weight))
        return {"score": score, **self.moments(score)}

    def _active(self, layer: LatentLayer) -> Tensor:
        if self.threshold is None:
            return layer.mask
        return layer.learned["score"] > math.log(self.threshold / (1 - self.threshold))

    def effective(self, layer: LatentLayer, training: bool) -> Tensor:
        """The weights that are active."""
        return _where(self._active(layer), layer.weight)

    def importance(self, layer: LatentLayer) -> Tensor:
        """S."""
        return layer.learned["score"]

    def backward(self, layer: LatentLayer, gradient: Tensor, rate: float) -> Tensor:
        """The gradient of active weights; scores take their step by the gradient of all."""
        active, score = self._active(layer), layer.learned["score"]
        toward = gradient.to(score.dtype) * layer.weight
        if self.penalty:
            toward = toward + self.penalty / score.numel() * score.sigmoid() * (1 - score.sigmoid())
        self.move(score, toward, layer.learned)
        return _where(active, gradient)

    def expected(self, layer: LatentLayer) -> float:
        """Weights above the threshold."""
        return float(self._active(layer).sum())

    def shift(self, layer: LatentLayer, pressure: float) -> None:
        """Subtract from S."""
        layer.learned["score"].sub_(pressure)


@dataclass(frozen=True)
class HardConcrete(_Adam, _Learned):
    """L0 regularisation by stochastic gates (Louizos et al. 2018, https://arxiv.org/abs/1712.01312).

    One gate per weight. In training z = min(1, max(0, s·(ζ − γ) + γ)) with s = sigmoid((logit(u) + log α) / β) and u
    uniform (equations 10 and 11); in evaluation s = sigmoid(log α) (equation 13). The penalty is λ times
    sigmoid(log α − β·log(−γ/ζ)), the probability that z is not zero (equation 12). log α is moved by Adam, as in the
    authors' code.

    Attributes:
        learning_rate: Of log α.
        penalty: λ ≥ 0, times the expected density of each layer: the authors' λ times the number of weights.
        beta: β, the temperature, > 0.
        gamma: γ < 0, the lower end of the stretched interval.
        zeta: ζ > 1, the upper end.
        initial: log α at the start, around which it is normal with standard deviation 0.01.
    """

    penalty: float = 0.0
    beta: float = 2 / 3
    gamma: float = -0.1
    zeta: float = 1.1
    initial: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least_zero(self.penalty, "penalty")
        if not (self.beta > 0 and self.gamma < 0 and self.zeta > 1):
            raise ConfigurationError(
                f"beta={self.beta}, gamma={self.gamma}, zeta={self.zeta}: gates need beta > 0, gamma < 0 and zeta > 1"
            )

    @property
    def samples(self) -> bool:
        """Always."""
        return True

    def learned(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The gates' log α and its moments, float32 or wider."""
        spread = 0.01 * torch.randn(weight.shape, generator=generator)
        gate = torch.empty_like(weight, dtype=_wide(weight)).copy_(self.initial + spread)
        return {"gate": gate, **self.moments(gate)}

    def _stretched(self, layer: LatentLayer, training: bool) -> tuple[Tensor, Tensor]:
        """s, and s stretched from γ to ζ."""
        gate = layer.learned["gate"]
        if training:
            assert layer.noise is not None
            s = ((layer.noise + gate) / self.beta).sigmoid()
        else:
            s = gate.sigmoid()
        return s, s * (self.zeta - self.gamma) + self.gamma

    def effective(self, layer: LatentLayer, training: bool) -> Tensor:
        """The weights times their gates."""
        stretched = self._stretched(layer, training)[1]
        return _where(stretched > 0, layer.weight * stretched.clamp(0, 1).to(layer.weight.dtype))

    def importance(self, layer: LatentLayer) -> Tensor:
        """The gates' log α."""
        return layer.learned["gate"]

    def trained(self, layer: LatentLayer) -> Tensor | None:
        """Where this step's gate is open."""
        return self._stretched(layer, True)[1] > 0

    def backward(self, layer: LatentLayer, gradient: Tensor, rate: float) -> Tensor:
        """The gradient times z for the weights; log α takes its step by g · w · dz/dlog α and the penalty."""
        gate = layer.learned["gate"]
        s, stretched = self._stretched(layer, True)
        inside = (stretched > 0) & (stretched < 1)
        slope = _where(inside, s * (1 - s) * ((self.zeta - self.gamma) / self.beta))
        toward = gradient.to(gate.dtype) * layer.weight * slope
        if self.penalty:
            open_ = self._probability(gate)
            toward = toward + self.penalty / gate.numel() * open_ * (1 - open_)
        self.move(gate, toward, layer.learned)
        return _where(stretched > 0, gradient * stretched.clamp(0, 1).to(gradient.dtype))

    def _probability(self, gate: Tensor) -> Tensor:
        """That a sampled gate is not zero."""
        return (gate - self.beta * math.log(-self.gamma / self.zeta)).sigmoid()

    def expected(self, layer: LatentLayer) -> float:
        """The sum of the gates' probabilities of being open."""
        return float(self._probability(layer.learned["gate"]).sum())

    def shift(self, layer: LatentLayer, pressure: float) -> None:
        """Subtract from log α."""
        layer.learned["gate"].sub_(pressure)


def _where(mask: Tensor, values: Tensor) -> Tensor:
    """Values where True, exact zeros elsewhere, whatever was there."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _check_at_least_zero(value: float, name: str) -> None:
    if not 0 <= value < math.inf:
        raise ConfigurationError(f"{name}={value} must be at least 0")

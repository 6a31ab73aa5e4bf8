"""SRigL: RigL with constant fan-in."""

from __future__ import annotations

from dst.method import Method
from dst.methods.shared import compose, documented
from dst.pieces import init as inits
from dst.pieces import scores
from dst.pieces.allocation import ERK
from dst.pieces.durations import Duration
from dst.pieces.patterns import FanIn
from dst.pieces.protocols import Allocation, Fraction, Init, Pattern, Score
from dst.pieces.schedules import Cosine


@documented
def srigl(
    density: float = 0.1,
    *,
    update_every: Duration = 100,
    start: Duration = 0,
    stop: Duration = 0.75,
    fraction: Fraction = Cosine(0.3),
    allocation: Allocation = ERK(),
    init: Init = inits.Random(),
    drop: Score = scores.Magnitude(),
    grow: Score = scores.Gradient(),
    replace_step: bool = True,
    regrow_dropped: bool = True,
    rescale_init: bool = False,
    pattern: Pattern = FanIn(ablate=0.3),
    backend: str = "masked",
) -> Method:
    """SRigL: RigL with constant fan-in, and with ablation of outputs that have few salient weights.

    Lasby et al. 2024 (https://arxiv.org/abs/2305.02299). Every output has the same number of inputs. The smallest
    weights of the layer are dropped; outputs with fewer than γ_sal · fan-in salient connections are ablated (γ_sal =
    0.3 by default). The other outputs grow, by gradient, to the fan-in that uses up the layer's budget.

    Deviations: see ``dst.patterns.FanIn``; ties as in ``dst.methods.rigl``. The authors scale initial weights to the
    active fan-in ("sparse initialisation"): pass ``rescale_init=True``.
    """
    return compose("srigl", **locals())

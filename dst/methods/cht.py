"""Cannistraci-Hebb training: growth by topology, without gradients."""

from __future__ import annotations

from dst.method import Method
from dst.pieces import init as inits
from dst.pieces import scores
from dst.pieces.allocation import Uniform
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Fraction, Init, Pattern, Score
from dst.pieces.schedules import Constant, Every


def cht(
    density: float = 0.1,
    *,
    update_every: Duration = 100,
    start: Duration = 0,
    stop: Duration = 1.0,
    fraction: Fraction | None = None,
    allocation: Allocation | None = None,
    init: Init | None = None,
    drop: Score | None = None,
    grow: Score | None = None,
    chain_removal: bool = True,
    temperature: float = 0.0,
    replace_step: bool = True,
    regrow_dropped: bool = True,
    rescale_init: bool = False,
    pattern: Pattern | None = None,
    backend: str = "masked",
) -> Method:
    """Cannistraci-Hebb training: new connections are predicted from the topology alone, without any gradient.

    CHT (Zhang et al. 2024, https://openreview.net/forum?id=iayEcORsGd) drops the smallest weights, removes connections that
    lie on no path any more ("chain removal"), and grows those that the network automaton CH3-L3 predicts. Its soft rule
    CHTs (Zhang et al. 2025, https://arxiv.org/abs/2501.19107) draws what is kept and grown by the scores instead of
    taking the best: ``temperature`` > 0.

    Deviations: the authors initialise by correlated or small-world topologies, here masks are random; they update once
    per epoch (pass ``update_every=`` the steps of one) and stop a layer whose topology has settled; their chain removal
    makes one pass over pairs of layers, here it repeats until no connection is left without a path. Exponents of drawing
    are one temperature, which stays constant. Convolutions: see ``dst.scores.CH3L3``.

    Args:
        density: Target density, in (0, 1].
        update_every: Steps between updates.
        start: First step that may update.
        stop: First step that may not.
        fraction: Share of the connections replaced, ζ; ``Constant(0.3)`` by default.
        allocation: How the budget is split; uniform by default.
        init: First mask; random by default.
        drop: Drop score; magnitude by default, ``Soft(Magnitude(), temperature)`` where it is drawn.
        grow: Grow score; CH3-L3 by default, ``Soft(CH3L3(), temperature)`` where it is drawn.
        chain_removal: Whether connections on no path are replaced too; not with patterns that group them.
        temperature: Of drawing, >= 0; 0 takes the best, as CHT does.
        replace_step: Whether an update takes the place of a step, as in the authors' code.
        regrow_dropped: Whether just-dropped connections are candidates for growth, as in the authors' code.
        rescale_init: Scale initial weights to the active fan-in.
        pattern: Which weights live and die together; every weight for itself by default.
        backend: Where weights live.
    """
    if drop is None:
        drop = scores.Soft(scores.Magnitude(), temperature) if temperature else scores.Magnitude()
    if grow is None:
        grow = scores.Soft(scores.CH3L3(), temperature) if temperature else scores.CH3L3()
    return Method(
        name="cht",
        density=density,
        allocation=allocation if allocation is not None else Uniform(),
        init=init if init is not None else inits.Random(),
        drop=drop,
        grow=grow,
        clock=Every(update_every, start, stop),
        fraction=fraction if fraction is not None else Constant(0.3),
        replace_step=replace_step,
        regrow_dropped=regrow_dropped,
        rescale_init=rescale_init,
        chain_removal=chain_removal,
        pattern=pattern if pattern is not None else Unstructured(),
        backend=backend,
    )

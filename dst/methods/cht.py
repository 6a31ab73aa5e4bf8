"""Cannistraci-Hebb training: growth by topology, without gradients."""

from __future__ import annotations

from dst.method import Method
from dst.methods.shared import documented
from dst.pieces import init as inits
from dst.pieces import scores
from dst.pieces.allocation import Uniform
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Fraction, Init, Pattern, Score
from dst.pieces.schedules import Constant, Every


@documented
def cht(
    density: float = 0.1,
    *,
    update_every: Duration = 100,
    start: Duration = 0,
    stop: Duration = 1.0,
    fraction: Fraction = Constant(0.3),
    allocation: Allocation = Uniform(),
    init: Init = inits.Random(),
    drop: Score | None = None,
    grow: Score | None = None,
    chain_removal: bool = True,
    temperature: float = 0.0,
    replace_step: bool = True,
    regrow_dropped: bool = True,
    rescale_init: bool = False,
    pattern: Pattern = Unstructured(),
    backend: str = "masked",
) -> Method:
    """Cannistraci-Hebb training: predicts new connections from the topology alone, without any gradient.

    CHT (Zhang et al. 2024, https://openreview.net/forum?id=iayEcORsGd) drops the smallest weights, removes connections
    that no longer lie on a path ("chain removal"), and grows those that the network automaton CH3-L3 predicts. Its soft
    rule CHTs (Zhang et al. 2025, https://arxiv.org/abs/2501.19107) samples kept and grown connections by their scores
    instead of taking the best: ``temperature`` > 0.

    Deviations: the authors initialise by correlated or small-world topologies; here masks are random. They update once
    per epoch (pass ``update_every=`` the steps of one) and stop updating a layer whose topology has settled. Their
    chain removal makes one pass over pairs of layers; here it repeats until every connection lies on a path. All
    sampling uses one temperature, which stays constant. For convolutions see ``dst.scores.CH3L3``.

    Args:
        drop: Drop score; ``None`` for magnitude, or ``Soft(Magnitude(), temperature)`` if ``temperature`` > 0.
        grow: Grow score; ``None`` for CH3-L3, or ``Soft(CH3L3(), temperature)`` if ``temperature`` > 0.
        chain_removal: Whether to replace connections on no path too; unstructured patterns only.
        temperature: Sampling temperature, >= 0; 0 takes the best, as CHT does.
    """
    if drop is None:
        drop = scores.Soft(scores.Magnitude(), temperature) if temperature else scores.Magnitude()
    if grow is None:
        grow = scores.Soft(scores.CH3L3(), temperature) if temperature else scores.CH3L3()
    return Method(
        name="cht",
        density=density,
        allocation=allocation,
        init=init,
        drop=drop,
        grow=grow,
        clock=Every(update_every, start, stop),
        fraction=fraction,
        replace_step=replace_step,
        regrow_dropped=regrow_dropped,
        rescale_init=rescale_init,
        chain_removal=chain_removal,
        pattern=pattern,
        backend=backend,
    )

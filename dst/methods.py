"""The published methods, each as one composition.

Every function returns a frozen ``dst.Method``. Durations (``update_every``, ``start``, ``stop``, …) are optimizer steps
when they are ints and fractions of the total steps when they are floats.
"""

from __future__ import annotations

from dst import init as inits
from dst import scores
from dst.allocation import ERK, Global
from dst.method import LotterySchedule, Method
from dst.schedules import Constant, Cosine, Every
from dst.types import Allocation, Duration, Fraction, Init, Score

__all__ = ["dense", "lottery_ticket_rewind", "rigl", "set_", "sparse_from_scratch", "static"]


def dense(density: float = 1.0, *, backend: str = "masked") -> Method:
    """No sparsity: the baseline, under the same measurements as every other method.

    Args:
        density: Accepted so that sweeps can pass one to every method; the network keeps all its weights.
        backend: Where weights live.
    """
    return Method(name="dense", density=1.0, backend=backend)


def static(
    density: float = 0.1,
    *,
    init: Init | None = None,
    sparsify_at: Duration | None = None,
    allocation: Allocation | None = None,
    backend: str = "masked",
) -> Method:
    """A mask that is fixed once and never changes.

    By default the network trains dense for a quarter of the steps, is pruned once by global magnitude, and goes on
    (one-shot magnitude pruning; Han et al. 2015, https://arxiv.org/abs/1506.02626, prune at the end of training
    instead). ``init=Snip()`` prunes at the first batch (Lee et al. 2019, https://arxiv.org/abs/1810.02340), and
    ``init=FromFile(path)`` takes a mask that exists.

    Args:
        density: Target density, in (0, 1].
        init: What the mask is made from.
        sparsify_at: When it is made: 0.25 by default for magnitude, the start for everything else.
        allocation: How the budget is split; by default one global threshold.
        backend: Where weights live.
    """
    init = init if init is not None else inits.Magnitude()
    if sparsify_at is None:
        sparsify_at = 0.25 if isinstance(init, inits.Magnitude) else 0
    return Method(
        name="static",
        density=density,
        init=init,
        sparsify_at=sparsify_at,
        allocation=allocation if allocation is not None else Global(),
        backend=backend,
    )


def sparse_from_scratch(
    density: float = 0.1,
    *,
    allocation: Allocation | None = None,
    rescale_init: bool = True,
    backend: str = "masked",
) -> Method:
    """A random mask, fixed from step 0, with a sparse-aware initialisation.

    The baseline that every dynamic method has to beat ("Static" in Evci et al. 2020; Liu et al. 2022,
    https://arxiv.org/abs/2202.02643).

    Args:
        density: Target density, in (0, 1].
        allocation: How the budget is split; ERK by default.
        rescale_init: Scale initial weights to the active fan-in (Evci et al. 2022, https://arxiv.org/abs/2010.03533).
        backend: Where weights live.
    """
    return Method(
        name="sparse_from_scratch",
        density=density,
        allocation=allocation if allocation is not None else ERK(),
        rescale_init=rescale_init,
        backend=backend,
    )


def set_(
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
    replace_step: bool = False,
    regrow_dropped: bool = True,
    rescale_init: bool = False,
    backend: str = "masked",
) -> Method:
    """Sparse evolutionary training (Mocanu et al. 2018, https://arxiv.org/abs/1707.04780).

    Drops the weights nearest zero of each sign, grows as many at random. The fraction ζ = 0.3 is constant and updates
    go on to the end, as published.

    Deviations: the authors update once per epoch (pass ``update_every=`` the steps of one), after the last step of it,
    and give grown connections small random weights; here they start at zero, as RigL's code has it for SET. The authors
    allocate by ER; ERK is the same for fully connected layers.

    Args:
        density: Target density, in (0, 1].
        update_every: Steps between updates.
        start: First step that may update.
        stop: First step that may not.
        fraction: Share of the connections replaced; ``Constant(0.3)`` by default.
        allocation: How the budget is split; ERK by default.
        init: First mask; random by default.
        drop: Drop score; magnitude per sign by default.
        grow: Grow score; random by default.
        replace_step: Whether an update takes the place of a step.
        regrow_dropped: Whether just-dropped connections are candidates for growth.
        rescale_init: Scale initial weights to the active fan-in.
        backend: Where weights live.
    """
    return Method(
        name="set",
        density=density,
        allocation=allocation if allocation is not None else ERK(),
        init=init if init is not None else inits.Random(),
        drop=drop if drop is not None else scores.SignedMagnitude(),
        grow=grow if grow is not None else scores.Random(),
        clock=Every(update_every, start, stop),
        fraction=fraction if fraction is not None else Constant(0.3),
        replace_step=replace_step,
        regrow_dropped=regrow_dropped,
        rescale_init=rescale_init,
        backend=backend,
    )


def rigl(
    density: float = 0.1,
    *,
    update_every: Duration = 100,
    start: Duration = 0,
    stop: Duration = 0.75,
    fraction: Fraction | None = None,
    allocation: Allocation | None = None,
    init: Init | None = None,
    drop: Score | None = None,
    grow: Score | None = None,
    replace_step: bool = True,
    regrow_dropped: bool = True,
    rescale_init: bool = False,
    backend: str = "masked",
) -> Method:
    """RigL, the rigged lottery (Evci et al. 2020, https://arxiv.org/abs/1911.11134, Algorithm 1).

    Every ΔT steps the weights of smallest magnitude are dropped and those with the largest dense gradient are grown, at
    zero. The defaults are the authors' code's: ERK, ΔT = 100, cosine from α = 0.3 to the end of updates at 75% of
    training, the update replacing the optimizer's step, and a just-dropped connection free to regrow with its value.

    Deviation: ties are broken by seeded random choice, where the authors add noise of standard deviation 1e-5 to the
    drop scores.

    Args:
        density: Target density, in (0, 1].
        update_every: ΔT, steps between updates.
        start: First step that may update.
        stop: First step that may not.
        fraction: Share of the connections replaced; ``Cosine(0.3)`` by default.
        allocation: How the budget is split; ERK by default.
        init: First mask; random by default.
        drop: Drop score; magnitude by default.
        grow: Grow score; gradient by default.
        replace_step: Whether an update takes the place of a step.
        regrow_dropped: Whether just-dropped connections are candidates for growth.
        rescale_init: Scale initial weights to the active fan-in.
        backend: Where weights live.
    """
    return Method(
        name="rigl",
        density=density,
        allocation=allocation if allocation is not None else ERK(),
        init=init if init is not None else inits.Random(),
        drop=drop if drop is not None else scores.Magnitude(),
        grow=grow if grow is not None else scores.Gradient(),
        clock=Every(update_every, start, stop),
        fraction=fraction if fraction is not None else Cosine(0.3),
        replace_step=replace_step,
        regrow_dropped=regrow_dropped,
        rescale_init=rescale_init,
        backend=backend,
    )


def lottery_ticket_rewind(
    density: float = 0.1,
    *,
    prune_fraction: float = 0.2,
    rewind_to: Duration = 0,
    allocation: Allocation | None = None,
    backend: str = "masked",
) -> Method:
    """Lottery tickets: iterative magnitude pruning with rewinding.

    Frankle & Carbin 2019 (https://arxiv.org/abs/1803.03635), with rewinding to an early step as in Frankle et al. 2020
    (https://arxiv.org/abs/1912.05671). Level 0 is dense; after every level 20% of the remaining weights go, by global
    magnitude, and training starts again from the snapshot of step k. The last level has exactly the density asked for.
    Each level is a fresh fit: use ``python train.py sparsity=lottery_ticket_rewind``, ``dst.lottery_run.run_lottery`` with
    a Lightning module, or the functions of ``dst.lottery`` in a loop of your own.

    Args:
        density: Density of the last level, in (0, 1].
        prune_fraction: Share of the remaining weights removed after each level.
        rewind_to: Step k of the dense level that later levels start from.
        allocation: How a level's budget is split; by default one global threshold.
        backend: Where weights live.
    """
    return Method(
        name="lottery_ticket_rewind",
        density=density,
        init=inits.Magnitude(),
        allocation=allocation if allocation is not None else Global(),
        lottery=LotterySchedule(prune_fraction, rewind_to),
        backend=backend,
    )

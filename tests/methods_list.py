"""One list of methods that the training, resume and parity suites run over: add a method here and all pick it up.

Settings suit a training of ``TOTAL_STEPS`` steps on a small network at density 0.3, with several topology updates.
"""

from __future__ import annotations

from collections.abc import Callable

from dst import Method, methods
from dst.allocation import ER, Global, Uniform
from dst.init import Magnitude, Snip
from dst.patterns import NM, Block, FanIn, Neuron
from dst.schedules import Constant, InversePower, Linear
from dst.scores import Gradient, Momentum, Random

TOTAL_STEPS = 24
DENSITY = 0.3

METHODS: dict[str, Callable[[], Method]] = {
    "dense": methods.dense,
    "static": lambda: methods.static(DENSITY),
    "static_at_step": lambda: methods.static(DENSITY, sparsify_at=5, allocation=Uniform()),
    "static_from_start": lambda: methods.static(DENSITY, init=Magnitude(), sparsify_at=0),
    "snip": lambda: methods.static(DENSITY, init=Snip()),
    "sparse_from_scratch": lambda: methods.sparse_from_scratch(DENSITY),
    "set": lambda: methods.set_(DENSITY, update_every=4),
    "set_replacing_steps": lambda: methods.set_(DENSITY, update_every=4, replace_step=True, allocation=ER()),
    "set_no_regrowth": lambda: methods.set_(DENSITY, update_every=3, regrow_dropped=False, fraction=Constant(0.5)),
    "rigl": lambda: methods.rigl(DENSITY, update_every=4),
    "rigl_with_step": lambda: methods.rigl(DENSITY, update_every=4, replace_step=False, fraction=InversePower(0.5)),
    "rigl_no_regrowth": lambda: methods.rigl(DENSITY, update_every=3, regrow_dropped=False, stop=1.0),
    "rigl_global_start": lambda: methods.rigl(
        DENSITY, update_every=0.125, start=2, allocation=Global(), init=Magnitude(), rescale_init=True
    ),
    "rigl_snip": lambda: methods.rigl(DENSITY, update_every=4, init=Snip(), allocation=Global()),
    "rigl_block": lambda: methods.rigl_block(DENSITY, update_every=4, pattern=Block(2, 2)),
    "rigl_neurons": lambda: methods.rigl(DENSITY, update_every=4, pattern=Neuron(), regrow_dropped=False),
    "rigl_fan_in": lambda: methods.rigl(DENSITY, update_every=4, pattern=FanIn(), replace_step=False),
    "rigl_nm": lambda: methods.rigl(DENSITY, update_every=4, pattern=NM()),
    "static_global_blocks": lambda: methods.static(DENSITY, sparsify_at=5, pattern=Block(2, 4)),
    "srigl": lambda: methods.srigl(DENSITY, update_every=4),
    "dynadiag": lambda: methods.dynadiag(DENSITY, update_every=4),
    "cht": lambda: methods.cht(DENSITY, update_every=4),
    "cht_soft": lambda: methods.cht(DENSITY, update_every=4, temperature=0.5, chain_removal=False),
    "momentum_growth": lambda: methods.rigl(DENSITY, update_every=4, grow=Momentum(0.8), fraction=Linear(0.5)),
    "watching_twice": lambda: methods.set_(
        DENSITY, update_every=5, drop=Momentum(0.5), grow=Momentum(0.9), replace_step=False
    ),
    "gradient_drop": lambda: methods.set_(DENSITY, update_every=4, drop=Gradient(), grow=Random()),
}
"""Name to factory of a method that one ``Sparsifier`` can train."""

DYNAMIC = [name for name, make in METHODS.items() if make().is_dynamic]
"""Names of the methods whose topology is updated."""

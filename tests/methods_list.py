"""One list of methods that the training, resume and parity suites run over: add a method here and all pick it up.

Settings suit a training of ``TOTAL_STEPS`` steps on a small network at density 0.3, with several topology updates.
"""

from __future__ import annotations

from collections.abc import Callable

from dst import Method, methods
from dst.allocation import ER, ERK, Global, Uniform
from dst.amounts import BelowThreshold
from dst.init import Magnitude, Snip
from dst.schedules import Constant, Cosine, InversePower, Linear, Stepwise
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
    "momentum_growth": lambda: methods.rigl(DENSITY, update_every=4, grow=Momentum(0.8), fraction=Linear(0.5)),
    "watching_twice": lambda: methods.set_(
        DENSITY, update_every=5, drop=Momentum(0.5), grow=Momentum(0.9), replace_step=False
    ),
    "gradient_drop": lambda: methods.set_(DENSITY, update_every=4, drop=Gradient(), grow=Random()),
    "grown_warmup": lambda: methods.rigl(DENSITY, update_every=4, grown_warmup=3),
    "grown_warmup_with_step": lambda: methods.set_(DENSITY, update_every=3, grown_warmup=5, fraction=Constant(0.5)),
    "snfs": lambda: methods.snfs(DENSITY, update_every=4),
    "snfs_by_gradient": lambda: methods.snfs(
        DENSITY, update_every=4, stop=0.75, grow=Gradient(), replace_step=True, regrow_dropped=False
    ),
    "deep_r": lambda: methods.deep_r(DENSITY, l1=1e-3, temperature=1e-5),
    "deep_r_every_few": lambda: methods.deep_r(DENSITY, temperature=1e-6, update_every=5, allocation=Uniform()),
    "dsr": lambda: methods.dsr(DENSITY, update_every=4, amount=BelowThreshold(0.05, target=0.2)),
    "rigl_itop": lambda: methods.rigl_itop(DENSITY, update_every=0.125),
    "mest": lambda: methods.mest(DENSITY, update_every=4, fraction=Cosine(0.4)),
    "mest_soft_bound": lambda: methods.mest(DENSITY, update_every=4, surplus=Constant(0.3)),
    "mest_soft_bound_to_the_end": lambda: methods.mest(DENSITY, update_every=3, stop=1.0, surplus=Cosine(0.4)),
    "granet": lambda: methods.granet(DENSITY, update_every=4),
    "granet_sparse_start": lambda: methods.granet(DENSITY, update_every=3, initial_density=0.6, rescale_init=True),
    "granet_growing": lambda: methods.granet(
        DENSITY, update_every=3, schedule=Stepwise(((4, 0.2), (10, 0.5)), initial=0.25, stop=16), grown_warmup=2
    ),
    "ac_dc": lambda: methods.ac_dc(DENSITY, phase=4, start=3),
    "gmp": lambda: methods.gmp(DENSITY, update_every=4),
    "gmp_global": lambda: methods.gmp(DENSITY, update_every=3, start=2, allocation=Global()),
    "gmp_erk": lambda: methods.gmp(DENSITY, update_every=1, stop=1.0, initial_density=0.8, allocation=ERK()),
}
"""Name to factory of a method that one ``Sparsifier`` can train."""

DYNAMIC = [name for name, make in METHODS.items() if make().is_dynamic]
"""Names of the methods whose topology is updated."""

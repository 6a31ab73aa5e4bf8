"""One list of methods that the training, resume and parity suites run over: add a method here and all pick it up.

Settings suit a training of ``TOTAL_STEPS`` steps on a small network at density 0.3, with several topology updates.
"""

from __future__ import annotations

from collections.abc import Callable

from dst import Method, methods
from dst.allocation import ER, ERK, Global, Uniform
from dst.amounts import BelowThreshold
from dst.init import Magnitude, Snip, Synflow
from dst.patterns import NM, Block, FanIn, Neuron, Unstructured
from dst.schedules import Constant, Cosine, InversePower, Linear, Stepwise
from dst.scores import Gradient, Momentum, Random
from dst.types import CallInit, LossInit

TOTAL_STEPS = 24
DENSITY = 0.3

METHODS: dict[str, Callable[[], Method]] = {
    "dense": methods.dense,
    "small_dense": lambda: methods.small_dense(DENSITY),
    "static": lambda: methods.static(DENSITY),
    "static_at_step": lambda: methods.static(DENSITY, sparsify_at=5, allocation=Uniform()),
    "static_from_start": lambda: methods.static(DENSITY, init=Magnitude(), sparsify_at=0),
    "static_snip": lambda: methods.static(DENSITY, init=Snip(), sparsify_at=2),
    "snip": lambda: methods.snip(DENSITY),
    "grasp": lambda: methods.grasp(DENSITY),
    "synflow": lambda: methods.synflow(DENSITY, iterations=10),
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
    "rigl_synflow": lambda: methods.rigl(DENSITY, update_every=4, init=Synflow(5)),
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
    "top_kast": lambda: methods.top_kast(DENSITY, backward_density=0.5, decay=0.01),
    "top_kast_at_times": lambda: methods.top_kast(DENSITY, update_every=5, stop=0.75, allocation=ER(), init=Snip()),
    "sr_ste": lambda: methods.sr_ste(DENSITY, decay=0.05, pattern=Unstructured()),
    "sr_ste_nm": lambda: methods.sr_ste(0.25, decay=0.05),
    "str": lambda: methods.str_(DENSITY, stop=0.5, initial=-3.0),
    "movement": lambda: methods.movement(DENSITY, start=3),
    "movement_soft": lambda: methods.movement(DENSITY, soft=True, stop=0.5, learning_rate=0.2),
    "l0": lambda: methods.l0(DENSITY, stop=0.5, learning_rate=0.1),
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

LATENT = [name for name, make in METHODS.items() if make().relaxation is not None]
"""Names of the methods that keep latent weights."""

NEEDS_CALL = [name for name, make in METHODS.items() if isinstance(make().init, (LossInit, CallInit))]
"""Names of the methods whose first mask needs a forward pass of the model, and not gradients alone."""

DYNAMIC = [name for name, make in METHODS.items() if make().is_dynamic]
"""Names of the methods whose topology is updated."""

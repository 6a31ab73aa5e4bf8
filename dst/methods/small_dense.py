"""A narrower dense network."""

from __future__ import annotations

from dst.method import Method, Narrow
from dst.methods.shared import documented


@documented
def small_dense(density: float = 0.1, *, match: str = "parameters", backend: str = "masked") -> Method:
    """A dense network, narrower in all layers, that matches a sparse one of full size: the baseline "Small-Dense".

    Evci et al. 2020 (https://arxiv.org/abs/1911.11134), section 4. A sparse network is worth its zeros only if it beats
    this.

    A method does not build models. ``python train.py sparsity=small_dense`` does, by `dst.models.narrow`, and reports
    density and FLOPs relative to the full-size network. A ``Sparsifier`` with this method trains the model that it gets,
    and logs a warning.

    Args:
        density: Share of the full-size model that the narrow one has, in (0, 1].
        match: What ``density`` is a share of: ``"parameters"``, the weights that would be sparse, or ``"flops"``, the
            cost of inference.
    """
    return Method(name="small_dense", density=1.0, narrow=Narrow(density, match), backend=backend)

"""A narrower dense network."""

from __future__ import annotations

from dst.method import Method, Narrow


def small_dense(density: float = 0.1, *, match: str = "parameters", backend: str = "masked") -> Method:
    """A dense network, narrower in all layers, that matches a sparse one of full size: the baseline "Small-Dense".

    Evci et al. 2020 (https://arxiv.org/abs/1911.11134), section 4. What a sparse network has to beat to be worth its zeros.

    A method does not build models. ``python train.py sparsity=small_dense`` does, by `dst.models.narrow`, and reports density
    and FLOPs relative to the full-size network; a ``Sparsifier`` given this method trains the model that it is given, and
    says so.

    Args:
        density: Share of the full-size model that the narrow one has, in (0, 1].
        match: Share of what: ``"parameters"``, the weights that would be sparse, or ``"flops"``, what they cost in inference.
        backend: Where weights live.
    """
    return Method(name="small_dense", density=1.0, narrow=Narrow(density, match), backend=backend)

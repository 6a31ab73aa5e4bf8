"""Which settings of a method work together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dst.errors import ConfigurationError
from dst.method.non_zeros import needs_inactive_weights
from dst.pieces import init as inits
from dst.pieces import schedules, scores
from dst.pieces.durations import check_duration
from dst.pieces.relaxations import Relaxation, StraightThrough

if TYPE_CHECKING:
    from dst.method.composition import Method

BACKENDS = ("masked", "csr", "auto", "latent")


def check(method: Method) -> None:
    """Raise ``ConfigurationError`` for a value out of range, or settings that contradict each other or have no effect."""
    _check_values(method)
    _check_updates(method)
    _check_pattern(method)
    _check_first_mask(method)
    _check_kinds_of_training(method)
    _check_backend(method)


def _check_values(method: Method) -> None:
    if isinstance(method.density, bool) or not isinstance(method.density, (int, float)):
        raise ConfigurationError(f"density={method.density!r} is not a number")
    if not 0 < method.density <= 1:
        raise ConfigurationError(f"density={method.density} must lie in (0, 1]: the share of weights that are kept")
    check_duration(method.sparsify_at, "sparsify_at")
    if method.backend not in BACKENDS:
        raise ConfigurationError(f"backend={method.backend!r} is unknown; choose from {', '.join(BACKENDS)}")
    if isinstance(method.grown_warmup, bool) or not isinstance(method.grown_warmup, int):
        raise ConfigurationError(f"{method.name}: grown_warmup={method.grown_warmup!r} must be a whole number of steps")
    if method.grown_warmup < 0:
        raise ConfigurationError(f"{method.name}: grown_warmup={method.grown_warmup} must not be negative")


def _check_updates(method: Method) -> None:
    """Refuse updates without scores, and pieces that have no effect or contradict each other."""
    name = method.name
    if method.is_dynamic and method.drop is None:
        raise ConfigurationError(f"{name}: a topology that is updated needs a drop score")
    if method.is_dynamic and method.grow is None and method.schedule is None:
        raise ConfigurationError(
            f"{name}: a topology that is updated needs a grow score, or a density schedule that only prunes"
        )
    at_updates: dict[str, object] = {
        "schedule": method.schedule,
        "redistribute": method.redistribute,
        "amount": method.amount,
        "surplus": method.surplus,
        "chain_removal": method.chain_removal or None,
    }
    for setting, piece in at_updates.items():
        if piece is not None and not method.is_dynamic:
            raise ConfigurationError(f"{name}: {setting} acts at topology updates, and the clock never fires")
        if piece is not None and setting != "schedule" and method.grow is None:
            raise ConfigurationError(f"{name}: {setting} needs a grow score")
    if method.surplus is not None and (method.redistribute is not None or method.amount is not None):
        raise ConfigurationError(f"{name}: surplus does not combine with redistribute or amount")


def _check_pattern(method: Method) -> None:
    """Refuse pieces that select single weights, or change a density that the pattern determines."""
    name, resolved = method.name, method.pattern.for_density(method.density)  # refuses densities of other patterns
    if not resolved.is_grouped:
        return
    pattern = type(method.pattern).__name__
    if method.chain_removal:
        raise ConfigurationError(f"{name}: chain_removal drops single connections, which {pattern} cannot")
    if method.lottery is not None:
        raise ConfigurationError(
            f"{name}: lottery levels prune single weights, which {pattern} cannot; use pattern=Unstructured()"
        )
    if resolved.is_free:
        return
    for setting, piece in (("redistribute", method.redistribute), ("surplus", method.surplus)):
        if piece is not None:
            raise ConfigurationError(f"{name}: {pattern} fixes every layer's density, and {setting} changes it")
    if method.schedule is not None and not isinstance(method.schedule, schedules.Alternating):
        raise ConfigurationError(
            f"{name}: {pattern} has one density, and {type(method.schedule).__name__} runs through others"
        )


def _check_first_mask(method: Method) -> None:
    name = method.name
    if method.first_allocation is not None and method.schedule is None:
        raise ConfigurationError(f"{name}: first_allocation differs from allocation only with a schedule")
    if method.rescale_init and method.sparsify_at != 0:
        raise ConfigurationError(f"{name}: rescale_init needs a mask from step 0, not at {method.sparsify_at}")


def _check_kinds_of_training(method: Method) -> None:
    """Refuse settings that lottery levels, narrow networks or relaxations exclude."""
    name, relaxation = method.name, method.relaxation
    if method.lottery is not None and method.is_dynamic:
        raise ConfigurationError(f"{name}: lottery levels have fixed masks; use clock=Never()")
    if method.narrow is not None and (
        method.density != 1 or method.is_dynamic or method.lottery or relaxation is not None
    ):
        raise ConfigurationError(
            f"{name}: narrow is for dense networks: use density=1, whose share is narrow's, and neither clock, lottery "
            "nor relaxation"
        )
    if relaxation is not None:
        _check_relaxation(method, relaxation)
    elif any(isinstance(x, (inits.Importance, scores.Importance)) for x in (method.init, method.drop, method.grow)):
        raise ConfigurationError(f"{name}: Importance ranks latent weights; set a relaxation, or use another score")
    elif method.backend == "latent":
        raise ConfigurationError(f'{name}: backend="latent" needs a relaxation, which computes effective weights')


def _check_relaxation(method: Method, relaxation: Relaxation) -> None:
    name, kind = method.name, type(relaxation).__name__
    if method.backend == "csr":
        raise ConfigurationError(
            f'{name}: backend="csr" stores only non-zeros, and {kind} keeps inactive weights; use backend="masked" '
            "(latent weights beside ordinary parameters)"
        )
    if method.lottery is not None or method.rescale_init:
        other = "lottery levels" if method.lottery is not None else "rescale_init"
        raise ConfigurationError(f"{name}: {other} and {kind} do not combine: {kind} trains inactive weights too")
    if relaxation.until_mask and (method.is_dynamic or method.sparsify_at == 0):
        raise ConfigurationError(
            f"{name}: {kind} learns what is active until sparsify_at, which must be above 0, and leaves a fixed "
            "mask; use clock=Never()"
        )
    if method.is_dynamic and method.replace_step:
        raise ConfigurationError(
            f"{name}: {kind} updates the topology after the step and cannot replace it; use replace_step=False"
        )
    if isinstance(relaxation, StraightThrough) and (relaxation.backward_density or 1) < method.density:
        raise ConfigurationError(
            f"{name}: backward_density={relaxation.backward_density} must be at least density={method.density:g}: "
            "active weights are always trained"
        )


def _check_backend(method: Method) -> None:
    if method.backend == "csr" and method.density < 1 and (reason := needs_inactive_weights(method)):
        raise ConfigurationError(
            f'{method.name}: backend="csr" stores only non-zeros, and {reason}; use backend="masked"'
        )

"""``Sparsifier``: the one object that owns state — masks, step, seed, score buffers, union of masks."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dst.backends import Scoring, open_storages
from dst.backends.servable import unsupported_reasons
from dst.backends.storage import is_finite
from dst.engine import coverage
from dst.engine.first_batch import FirstBatch
from dst.engine.first_mask import choose_first_mask
from dst.engine.optimizers import as_optimizers, totals_of, unwrap_optimizer
from dst.engine.saved_state import STATE_FORMAT, Expected, check_state
from dst.engine.state import TrainingState, Update
from dst.engine.steps import OptimizerSteps, PreparedStep, assign, fingerprint, load_steps, state_of_steps
from dst.engine.update import apply_plan
from dst.engine.warmup import WarmUp, check_whole
from dst.errors import ConfigurationError, StateError
from dst.method import Method, check_method
from dst.pieces import init as inits
from dst.pieces.protocols import CallInit, LayerView, LossInit, Observer, Perturbation, Score, waits_for_batch
from dst.pieces.scores import Magnitude, Random
from dst.planning.first_mask import layer_counts, masks_on_the_way
from dst.planning.update import LayerFacts, Moment, can_score, plan_update
from dst.topology.layers import Selector, SparseLayer, find_layers
from dst.topology.optimizer_state import per_weight_state
from dst.topology.seeding import folded_generator
from dst.topology.sharding import all_agree, local
from dst.topology.wrapping import unwrap

logger = logging.getLogger(__name__)

_Place: TypeAlias = tuple[int, int, str | None]
"""Numbers of an optimizer and of its parameter, and the name of a tensor in the optimizer's state of it."""
_REBUILT = (
    "this sparsifier belongs to another optimizer: build the Sparsifier after its optimizer, a new one where the optimizer "
    "was built anew (new.load_state_dict(old.state_dict()) goes on with its masks), and copy model, optimizer and "
    "sparsifier together"
)


class Sparsifier:
    """Trains a model sparsely: owns its masks and moves them as the method says.

    ```python
    sparsifier = dst.Sparsifier(model, optimizer, dst.methods.rigl(density=0.1), total_steps=10_000)
    loss.backward()
    sparsifier.before_step()
    optimizer.step()
    ```

    Inactive weights are exactly zero after construction (from the step that makes the mask, where the method trains dense
    first) and after every optimizer step. Optimizer state at connections that come or go is cleared, for any optimizer.

    Args:
        model: The model; its parameters stay ordinary parameters.
        optimizer: The optimizer, or several. Each counts its own steps, and moves its own parameters' connections.
        method: What to do; see ``dst.methods``.
        total_steps: Optimizer steps of the whole training, >= 1: durations given as fractions refer to it. Where several
            optimizers step unequally often, one number for each, in their order, or a mapping from optimizer to number.
        include: Restrict what is sparse, by name, pattern or module type; see ``dst.topology.layers.find_layers``.
        exclude: Keep dense what these select.
        seed: Seeds every random choice; the same on all ranks.
        process_group: The processes that train this model together, by default all. Their masks are compared at every
            update; ones that differ stop the training.

    Raises:
        ConfigurationError: A model, optimizer or combination that cannot be trained; the message says what to change.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        method: Method,
        *,
        total_steps: int | Sequence[int] | Mapping[Optimizer, int],
        include: Iterable[Selector] | None = None,
        exclude: Iterable[Selector] | None = None,
        seed: int = 0,
        process_group: ProcessGroup | None = None,
    ) -> None:
        check_method(method)
        model, optimizers = unwrap(model), as_optimizers(optimizer)
        totals = totals_of(total_steps, optimizers)
        if method.lottery is not None:
            raise ConfigurationError(
                f"{method.name} consists of several fits, and a Sparsifier serves one: "
                "use dst.lightning.lottery_levels.run_lottery, or dst.lottery in a loop of your own"
            )
        if method.narrow is not None and method.narrow.width_factor is None:
            logger.warning(
                "%s makes nothing sparse: the model is trained dense, with the widths that it has; for a narrower one use "
                "python train.py, or build it with the width_factor that dst.models.narrow finds",
                method.name,
            )
        self.method = method
        self.seed = seed
        self.layers, self.dense_weights = find_layers(model, include, exclude)
        self._storages = open_storages(model, self.layers, method, seed=seed, group=process_group)
        self._before_first_step: list[str] = []  # what is said once it is clear that no saved state is loaded
        self._frozen = [
            (d.name, model.get_parameter(d.name)) for d in self.dense_weights if d.reason == coverage.FROZEN
        ]
        if (share := coverage.left_dense(self.layers, self.dense_weights)) is not None and method.density < 1:
            logger.warning(share)
        self._unsupported = unsupported_reasons(model, self.layers) if method.backend == "csr" else {}
        self._steppers = assign(method, optimizers, totals, self.layers, self._storages.parameters)
        _check_free(optimizers)
        self._group = process_group
        self._state = TrainingState(
            sparsified=method.density == 1,
            budgets={layer.label: layer.weights for layer in self.layers},
            amount=method.amount.initial_state if method.amount is not None else 0.0,
        )
        self._warned: set[str] = set()
        self._originals: list[tuple[_Place, Tensor, Tensor, int]] = []  # what the first mask cut, as it was
        if method.grown_warmup or method.perturb is not None:
            check_whole(self._storages.parameters, "grown_warmup" if method.grown_warmup else "perturb")
        self._warming = WarmUp(method.grown_warmup) if method.grown_warmup else None
        if not isinstance(method.init, inits.FromFile):
            for density in {method.density, self._lowest_density()}:
                layer_counts(method, self.layers, density)
        for stepper in self._steppers:
            if stepper.mask_step >= stepper.total and method.density < 1:
                raise ConfigurationError(
                    f"sparsify_at={method.sparsify_at} is not before the end of training at step {stepper.total}: "
                    "the mask would never be made"
                )
        if waits_for_batch(method.init) and len(self._steppers) > 1:
            raise ConfigurationError(
                f"{type(method.init).__name__} needs every layer's gradient at one step, and the layers belong to "
                f"{len(self._steppers)} optimizers; use another init, or one optimizer"
            )
        self._first_batch: FirstBatch | None = None
        if not self._state.sparsified and isinstance(method.init, (LossInit, CallInit)):
            self._first_batch = FirstBatch(model, self.layers, method.init, self._mask_is_due, process_group)
            self._first_batch.watch()
        self._warn_of_what_will_not_happen()
        makes_mask = not self._state.sparsified and self._steppers[0].mask_step == 0
        if makes_mask and not waits_for_batch(method.init):
            if not self._storages.any_prepared:
                nothing = torch.Generator()
                found = coverage.sparse_before(method, self.layers, lambda x: self._storages.view(x, nothing).weight)
                self._before_first_step += [found] if found is not None else []
            originals = [(place, t, t.clone()) for place, t in self._cut_by_first_mask()]
            self._sparsify(0)
            self._originals = [(place, t, as_it_was, t._version) for place, t, as_it_was in originals]
        self._expect_gradients()
        self._hooks: list[RemovableHandle] = []
        self._hook()

    def _hook(self) -> None:
        """Be called at the optimizers' steps."""
        self._hooks = [s.optimizer.register_step_post_hook(self._after_step) for s in self._steppers]
        self._hooks += [s.optimizer.register_step_pre_hook(self._on_step) for s in self._steppers]

    def _warn_of_what_will_not_happen(self) -> None:
        """Warn where a setting has no effect on this model or training."""
        method = self.method
        if method.is_dynamic and method.density < 1:
            for stepper in self._steppers:
                if not stepper.ever_updates:
                    logger.warning(
                        "%s never updates the topology: no update falls within %d steps (%s); lower update_every or start",
                        method.name,
                        stepper.total,
                        method.clock,
                    )
        if method.backend == "csr" and not self._storages.any_prepared:
            reasons = sorted({reason or "dst.prepare was not called" for reason in self._unsupported.values()})
            logger.warning(
                'backend="csr" stores no layer of this model as non-zeros alone, all are masked (%s)',
                "; ".join(reasons),
            )

    # -- what users look at ---------------------------------------------------------------------------------------

    @property
    def masks(self) -> dict[str, Tensor]:
        """Name of the dense parameter to bool tensor of its shape, True where active. Not to be changed in place.

        Masks of DTensor parameters are DTensors of the same layout. Where only non-zeros are stored, masks are built at
        every call.
        """
        return self._storages.masks()

    @property
    def step(self) -> int:
        """Optimizer steps taken (of the first optimizer, where there are several)."""
        return self._steppers[0].step

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training (of the first optimizer, where there are several)."""
        return self._steppers[0].total

    def set_total_steps(self, total_steps: int | Sequence[int]) -> None:
        """Say anew how long the training is: schedules go on over the new length.

        Args:
            total_steps: Optimizer steps of the whole training, or one number for each optimizer that holds sparse weights.

        Raises:
            ConfigurationError: Not a positive number, or not one for each optimizer.
        """
        optimizers = [stepper.optimizer for stepper in self._steppers]
        for stepper, total in zip(self._steppers, totals_of(total_steps, optimizers), strict=True):
            stepper.total = total
        self._expect_gradients()

    @property
    def steps(self) -> list[int]:
        """Optimizer steps taken, of each optimizer that holds sparse weights."""
        return [stepper.step for stepper in self._steppers]

    @property
    def shortfall(self) -> str | None:
        """What the training has not reached, in words, were it to end now; ``None`` where it ends as it was planned."""
        target = self.method.density
        if target == 1 or self._state.set_density is not None or not any(self.steps):
            return None
        reached = self._state.sparsified and all(stepper.has_settled for stepper in self._steppers)
        if reached or abs(self.density - target) <= 0.01 * target:
            return None
        taken = ", ".join(f"{stepper.step:,} of {stepper.total:,}" for stepper in self._steppers)
        return (
            f"ended at density {self.density:.4g}, target {target:.4g}: {taken} planned optimizer steps were taken; "
            "train to the end, or pass the total_steps that are taken"
        )

    @property
    def updates(self) -> int:
        """Topology updates made."""
        return self._state.updates

    @property
    def skipped(self) -> int:
        """Updates that were due and left out because a gradient was not finite."""
        return self._state.skipped

    @property
    def step_counts(self) -> dict[str, int]:
        """Optimizer steps by what they cost.

        ``dense``, ``sparse``, or ``dense_gradient`` (sparse, but with the dense gradient computed on purpose).
        """
        return dict(self._state.step_counts)

    @property
    def work(self) -> dict[str, dict[str, int]]:
        """Active weights, summed over the optimizer steps of each kind: kind to layer label to number.

        What FLOPs of a whole training are made of, whatever its density did (``dst.metrics.FlopsMeter.add_work``). A step
        counts with the connections that it began with: its forward and backward passes precede an update.
        """
        labels = [layer.label for layer in self.layers]
        return {kind: dict(zip(labels, active, strict=True)) for kind, active in self._state.work.items()}

    @property
    def backends(self) -> dict[str, str]:
        """Layer label to where its weights live: ``masked``, ``latent`` or ``csr``."""
        return {layer.label: self._storages.backend(layer) for layer in self.layers}

    @property
    def is_sparse(self) -> bool:
        """Whether the mask has been made (False in the dense phase of methods that have one)."""
        return self._state.sparsified

    @property
    def mask_version(self) -> int:
        """A number that is new whenever the masks may be: 0 before the first, then one more with every change of them."""
        return self._state.updates + self._state.settings + self._state.sparsified

    @property
    def active(self) -> int:
        """Active weights over all sparse layers."""
        return sum(map(self._active, self.layers))

    def _active(self, layer: SparseLayer) -> int:
        return self._storages.active(layer)

    @property
    def density(self) -> float:
        """Realised density over all sparse layers, in (0, 1]."""
        return self.active / sum(layer.weights for layer in self.layers)

    @property
    def last_update(self) -> Update | None:
        """What the last topology update did; ``None`` before the first."""
        return self._state.last_update

    @property
    def churn(self) -> float:
        """Share of the active connections that the last update made new."""
        return self._state.last_update.churn if self._state.last_update else 0.0

    @property
    def drop_fraction(self) -> float:
        """The drop fraction of the last update."""
        return self._state.last_update.fraction if self._state.last_update else 0.0

    @property
    def exploration_rate(self) -> float:
        """ITOP rate: share of the sparse layers' weights that have ever been active since the first mask.

        abs(union of masks) / weights (Liu et al. 2021, https://arxiv.org/abs/2102.02887). Layers that are wholly dense
        are in neither term; it is 1 where all layers are.
        """
        partial = [layer for layer in self.layers if self._active(layer) < layer.weights]
        explored = sum(self._storages.explored(layer) for layer in partial)
        return explored / sum(layer.weights for layer in partial) if partial else 1.0

    def layer_table(self) -> list[dict[str, Any]]:
        """One dict per sparse layer: ``name``, ``shape``, ``weights``, ``nonzero`` (active weights), ``density``."""
        return [
            {
                "name": layer.label,
                "shape": list(layer.shape),
                "weights": layer.weights,
                "nonzero": active,
                "density": active / layer.weights,
            }
            for layer, active in ((layer, self._active(layer)) for layer in self.layers)
        ]

    def mask_of(self, parameter: nn.Parameter) -> Tensor | None:
        """The mask of a parameter that holds inactive weights (its local part's, for a DTensor), ``None`` for others."""
        return self._storages.mask_of(parameter)

    def needs_dense_gradient(self, parameter: nn.Parameter) -> bool:
        """Whether the step to come reads the gradient of this parameter's inactive weights.

        True in dense phases, at updates that read the gradient or are followed by a step, and always for scores that watch
        every step.
        """
        return next(s for s in self._steppers if any(p is parameter for p in s.parameters)).reads_inactive(
            self._state.sparsified
        )

    def _expect_gradients(self, steppers: Iterable[OptimizerSteps] | None = None) -> None:
        """Tell the storages what the coming step of the optimizers (by default all) needs to see."""
        for stepper in self._steppers if steppers is None else steppers:
            expected = self.method.density < 1 and stepper.reads_inactive(self._state.sparsified)
            self._storages.expect_dense_gradient(stepper.parameters, expected)

    # -- the training loop ----------------------------------------------------------------------------------------

    def before_backward(self, loss: Tensor) -> None:
        """Call before ``loss.backward()`` where the method's init needs the loss's graph (GraSP); else without effect.

        The first mask is made from the first loss of its step: with gradient accumulation, that of the first micro-batch.
        No ``.grad`` is touched, and the graph stays for ``backward()``.

        Args:
            loss: The loss that ``backward()`` is called on; scaled or not makes no difference.

        Raises:
            ConfigurationError: A loss without graph, or one that cannot be differentiated twice.
        """
        if self._first_batch is None or not isinstance(self.method.init, LossInit) or not self._mask_is_due():
            return
        if not any(role == "init" for role, _ in self._state.buffers):
            scores = self._first_batch.scores_of_loss(loss)
            self._state.buffers.update({("init", label): score for label, score in scores.items()})

    def _mask_is_due(self) -> bool:
        """Whether the step to come makes the first mask."""
        return not self._state.sparsified and self._steppers[0].step >= self._steppers[0].mask_step

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer | None = None) -> None:
        """Call between ``backward()`` and ``optimizer.step()``, after unscaling and before clipping.

        Observes the dense gradient, makes the first mask or updates the topology where one is due, and masks the
        gradients. Where an update takes the place of the step, all gradients of that optimizer are set to ``None`` as the step
        begins, or behind its closure; until then clipping and logging find them as at any other step.

        Args:
            optimizer: The one about to step, where there are several; by default all. One that holds no sparse parameter
                is passed over.

        Raises:
            ConfigurationError: A gradient that is a sparse tensor.
        """
        optimizer = None if optimizer is None else unwrap_optimizer(optimizer)
        chosen = [s for s in self._steppers if optimizer is None or s.optimizer is optimizer]
        if optimizer is not None and not chosen:
            self._refuse_stranger(optimizer)
        self._say_what_has_changed()
        for stepper in chosen:
            waits, moves = self._check_waiting(stepper)
            active = [self._active(self.layers[i]) for i in stepper.layers]
            kind, replaced = self._prepare(stepper, active)
            self._storages.mask_gradients(stepper.parameters)
            if self.method.perturb is not None and self._state.sparsified and not replaced:
                self._perturb(stepper, self.method.perturb)
            # What was kept for this step is used; should it not be taken, the next attempt begins anew.
            self._expect_gradients([stepper])
            seen = fingerprint(stepper.parameters) if waits else None
            stepper.prepared = PreparedStep(kind, replaced, active, seen, moves)

    def _say_what_has_changed(self) -> None:
        """Warn of what was done to the model, now that training begins or goes on."""
        for message in self._before_first_step:
            self._warn_once(message)
        self._before_first_step = []
        if self._frozen and (names := coverage.thawed(self._frozen)):
            self._warn_once(
                f"{', '.join(names)} began to train after the sparsifier was built, and stay dense: unfreeze them before, or "
                "finalize() it and build another"
            )
            self._frozen = [(name, p) for name, p in self._frozen if name not in names]

    def _refuse_stranger(self, optimizer: Optimizer) -> None:
        """Raise where an optimizer that this sparsifier was not given holds what it keeps sparse."""
        held = {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
        if name := next((name for name, p in self._storages.parameters.items() if id(p) in held), None):
            raise StateError(f"before_step() was given a {type(optimizer).__name__} that holds {name}, and {_REBUILT}")

    def _check_waiting(self, stepper: OptimizerSteps) -> tuple[bool, int]:
        """See ``OptimizerSteps.waits``; raises where something else takes the steps.

        A step that is left out (by a gradient scaler, or while gradients accumulate) moves no weight. Weights that move
        twice in a row without one belong to another optimizer.
        """
        waits, moves = stepper.waits() if self._hooks else (False, 0)
        if moves == 2:
            name = self._name(stepper.parameters[0])
            raise StateError(
                f"before_step() is called again and again, {name} and others move, and the "
                f"{type(stepper.optimizer).__name__} of this sparsifier never steps: {_REBUILT}"
            )
        return waits, moves

    def _prepare(self, stepper: OptimizerSteps, active: Sequence[int]) -> tuple[str, bool]:
        """Do what is due before a step; returns its kind and whether an update or a first mask takes its place.

        ``active`` counts the active weights of the optimizer's layers before it.
        """
        for index in stepper.layers:
            gradient = self._storages.parameters[self.layers[index].parameter].grad
            if gradient is not None and gradient.layout != torch.strided:
                raise ConfigurationError(
                    f"{self.layers[index].parameter} has a sparse gradient; build its module with sparse=False"
                )
        if not self._state.sparsified and stepper.step >= stepper.mask_step:
            if waits_for_batch(self.method.init):
                usable = self._gradients_are_usable(stepper, every_layer=self.method.init.needs_gradient)
                given = self._scores_of_first_batch() if usable else None
                # What a batch that cannot be used has left is for nothing; the next one is measured anew.
                self._state.buffers = {key: buffer for key, buffer in self._state.buffers.items() if key[0] != "init"}
                if not usable or (given is not None and not all(is_finite(score) for score in given.values())):
                    return "dense", False
                self._sparsify(stepper.step, given)
                return "dense", True
            self._sparsify(stepper.step)
        if not self._state.sparsified:
            return "dense", False
        observing = self._observe(stepper)
        reads = observing or stepper.moves_inactive
        if not self.method.updates_after_step and stepper.is_due:
            self._update(stepper)
        updated = stepper.updated_at == stepper.step
        reads = reads or (updated and self.method.reads_gradient)
        replaced = updated and self.method.replace_step
        if all(n == self.layers[i].weights for i, n in zip(stepper.layers, active, strict=True)):
            return "dense", replaced
        return "dense_gradient" if reads else "sparse", replaced

    def _on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Step pre-hook: take the gradients away where an update replaces the step.

        A closure computes them within the step, and in Lightning prepares and clips them too: it is then followed up.
        """
        stepper = next(s for s in self._steppers if s.optimizer is optimizer)
        stepper.is_stepping = True
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._begin(stepper)
            return None

        def followed_up() -> Any:
            result = closure()
            self._begin(stepper)
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": followed_up}
        return (args[0], followed_up, *args[2:]), kwargs

    def _begin(self, stepper: OptimizerSteps) -> None:
        """Gradients and topology are those of the step, and the optimizer is about to use them."""
        if stepper.prepared is not None and stepper.prepared.replaced:
            stepper.drop_gradients()
        self._storages.begin_step(stepper.optimizer, stepper.parameters)
        if self._warming is not None:
            self._warming.begin(stepper.parameters, self._storages.name_of)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Step post-hook: weights that are inactive are zero again, and the clock advances."""
        stepper = next(s for s in self._steppers if s.optimizer is optimizer)
        if self._warming is not None and stepper.is_stepping:
            self._warming.end(self._storages.parameters, stepper.step)
        self._storages.end_step(stepper.parameters, stepper.step + stepper.is_stepping, stepper.mask_step)
        self._originals = []
        if not stepper.is_stepping:
            return  # the step of a class within that of its subclass has told already
        stepper.is_stepping = False
        prepared, stepper.prepared = stepper.prepared, None
        if prepared is None:
            raise StateError(
                "optimizer.step() ran without sparsifier.before_step(): call it between backward() and step(), "
                "or finalize() the sparsifier when sparse training is over"
            )
        if self._state.sparsified and self.method.updates_after_step and stepper.is_due:
            self._update(stepper)  # the mask of the next forward pass is that of the weights it will see
        self._state.step_counts[prepared.kind] += 1
        work = self._state.work.setdefault(prepared.kind, [0] * len(self.layers))
        for index, active in zip(stepper.layers, prepared.active, strict=True):
            work[index] += active
        stepper.step += 1
        self._expect_gradients([stepper])

    def finalize(self, *, ended: bool = True) -> None:
        """End sparse training: inactive weights are zero, and the optimizers' hooks are removed.

        A warning tells where training ended before its budget was reached (``shortfall``).

        Args:
            ended: Whether this is the end of training; no warning is due where it goes on, or has failed.
        """
        if ended and sys.exc_info()[0] is None and self._hooks and (shortfall := self.shortfall) is not None:
            self._warn_once(shortfall)
        self._storages.release()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._first_batch is not None:
            self._first_batch.close()

    @torch.no_grad()
    def mask_optimizer_state(self) -> None:
        """Clear per-weight optimizer state at inactive positions, as after loading an optimizer from a dense run."""
        for stepper in self._steppers:
            self._storages.mask_optimizer_state(stepper.optimizer)

    def _cut_by_first_mask(self) -> Iterator[tuple[_Place, Tensor]]:
        """The weights and per-weight optimizer states that making the first mask changes, and where they are."""
        for i, stepper in enumerate(self._steppers):
            for k, parameter in enumerate(stepper.parameters):
                if self.method.rescale_init or not self._storages.is_prepared(self._name(parameter)):
                    yield (i, k, None), local(parameter.detach())
                    for key, value in per_weight_state(stepper.optimizer, parameter):
                        yield (i, k, key), local(value)

    # -- the first mask -------------------------------------------------------------------------------------------

    def _sparsify(self, step: int, given: Mapping[str, Tensor] | None = None) -> None:
        """Make the first mask, from the weights, gradients or file of this moment, or from the scores that are given."""
        first = choose_first_mask(
            self.method,
            self.layers,
            self._storages,
            seed=self.seed,
            step=step,
            total_steps=self.total_steps,
            given=given,
            unsupported=self._unsupported,
        )
        self._storages.set_mask(first)
        if self.method.rescale_init:
            for layer in self.layers:
                self._storages.rescale(layer)
        self.mask_optimizer_state()
        self._check_agreement(step)
        self._state.budgets = {layer.label: self._active(layer) for layer in self.layers}
        self._state.sparsified = True
        self._watch_first_batch()
        if self.method.is_dynamic:
            self._storages.explore()

    def _watch_first_batch(self) -> None:
        """Watch the model's calls exactly as long as there is no mask."""
        if self._first_batch is not None:
            self._first_batch.close() if self._state.sparsified else self._first_batch.watch()

    def _scores_of_first_batch(self) -> dict[str, Tensor] | None:
        """Layer label to scores, where the init scores the network as a whole, else ``None``."""
        if self._first_batch is None:
            return None
        if isinstance(self.method.init, CallInit):
            return self._first_batch.scores_of_call(
                lambda scores, progress: masks_on_the_way(self.method, self.layers, scores, progress, seed=self.seed)
            )
        scores = {label: buffer for (role, label), buffer in self._state.buffers.items() if role == "init"}
        if not scores:
            raise StateError(
                f"{type(self.method.init).__name__} needs the loss with its graph: call "
                "sparsifier.before_backward(loss) before loss.backward()"
            )
        return scores

    # -- topology updates -----------------------------------------------------------------------------------------

    def _update(self, stepper: OptimizerSteps) -> bool:
        """Rewire the optimizer's layers; False if the update had to be left out."""
        if not self._gradients_are_usable(stepper):
            self._state.skipped += 1
            return False
        step, method = stepper.step, self.method
        stop = method.clock.stop_step(stepper.total)
        # Where a moving budget settles after the clock's last update, connections only go or come to meet it.
        replaces = method.clock.fires(step, stepper.total)
        fraction = method.fraction(step, stop) if replaces else 0.0
        surplus = None
        if method.surplus is not None and replaces:
            surplus = 0.0 if step >= (stepper.settles_at or 0) else method.surplus(step, stop)
        is_set = self._state.set_density is not None
        moment = Moment(step, self.seed, self._density_at(stepper), fraction if replaces else None, surplus, is_set)
        grown = self._rewire(stepper, moment, method.scores(), born=step + method.replace_step)
        self._check_agreement(step)
        self._state.updates += 1
        active = sum(self._active(self.layers[i]) for i in stepper.layers)
        stepper.updated_at = step
        self._state.last_update = Update(step, fraction, grown / max(1, active))
        return True

    def _rewire(self, stepper: OptimizerSteps, moment: Moment, scores: Mapping[str, Score], *, born: int) -> int:
        """Plan an update of the optimizer's layers, decide all rewirings, then apply them; returns how many grew.

        ``born`` is the step that first moves what grows.
        """
        moves = self.method.schedule is not None or self._state.set_density is not None
        number = self._steppers.index(stepper)
        split, users = self._state.splits.get(moment.density, ((), set[int]()))
        plan = plan_update(
            self.method,
            moment,
            [self._facts(layer, moment.step) for layer in self.layers],
            stepper.layers,
            scores,
            moves=moves and moment.density != stepper.budget_density,
            split=split if users and number not in users else None,
            amount_state=self._state.amount,
        )
        self._state.budgets |= plan.budgets
        self._state.amount = plan.amount_state
        if plan.split is not None:
            stepper.budget_density = moment.density
            if len(self._steppers) > 1:
                # Others come to the same densities, later perhaps: the last one and the final one are kept for them.
                users = {number} if number in users else {*users, number}
                kept = {d: held for d, held in self._state.splits.items() if d == self.method.density}
                self._state.splits = {**kept, moment.density: (plan.split, users)}
        rewirings = apply_plan(
            plan, self._storages, stepper.optimizer, lambda layer: self._scoring(layer, moment.step, scores)
        )
        for update in plan.layers:
            rewiring = rewirings.get(update.layer.label)
            if rewiring is None:
                self._warn_once(
                    f"{update.layer.parameter} had no gradient at a topology update and keeps its connections"
                )
            elif self._warming is not None:
                self._warming.follow(update.layer, rewiring, born)
        return sum(rewiring.grown.numel() for rewiring in rewirings.values())

    def _facts(self, layer: SparseLayer, step: int) -> LayerFacts:
        def view(role: str, gradient: bool) -> LayerView:
            return self._storages.view(
                layer,
                self._generator(step, layer, role),
                gradient=gradient,
                # Layers are measured by the growth score's own mean, where it keeps one.
                buffer=self._state.buffers.get(("grow" if role == "redistribute" else role, layer.label)),
            )

        return LayerFacts(layer, self._active(layer), self._state.budgets[layer.label], view)

    def _scoring(self, layer: SparseLayer, step: int, scores: Mapping[str, Score]) -> Scoring:
        buffers = {role: buffer for (role, label), buffer in self._state.buffers.items() if label == layer.label}
        return Scoring(scores, buffers, partial(self._generator, step, layer))

    def _density_at(self, stepper: OptimizerSteps) -> float:
        if self._state.set_density is not None:
            return self._state.set_density
        return self.method.density_at(stepper.step, stepper.total)

    def _lowest_density(self) -> float:
        """The lowest that the method's schedule comes to, as far as a thousand looks at it tell."""
        total = max(stepper.total for stepper in self._steppers)
        return min(self.method.density_at(step, total) for step in range(0, total, max(1, total // 1000)))

    def _view(self, layer: SparseLayer, role: str, step: int, score: Score) -> LayerView:
        return self._storages.view(
            layer,
            folded_generator(self.seed, role, step, layer.label),
            gradient=score.needs_gradient,
            buffer=self._state.buffers.get((role, layer.label)),
        )

    def _generator(self, step: int, layer: SparseLayer, role: str) -> torch.Generator:
        return folded_generator(self.seed, role, step, layer.label)

    def _perturb(self, stepper: OptimizerSteps, perturb: Perturbation) -> None:
        """Add what the method adds to the gradients of active weights."""
        rates = {id(p): group["lr"] for group in stepper.optimizer.param_groups for p in group["params"]}
        for index in stepper.layers:
            layer = self.layers[index]
            parameter = self._storages.parameters[layer.parameter]
            if parameter.grad is not None:
                view = self._storages.view(
                    layer,
                    self._generator(stepper.step, layer, "perturb"),
                    buffer=self._state.buffers.get(("drop", layer.label)),
                )
                added = perturb(view, float(rates[id(parameter)])).masked_fill(~view.mask, 0)
                layer.part(parameter.grad).add_(added.to(parameter.grad.dtype))

    @torch.no_grad()
    def set_density(self, density: float) -> None:
        """Prune or grow to another density, now and for good: the method's schedule of densities no longer counts.

        Connections go by the method's drop score and come by its grow score where these need no gradient or one is
        there, by magnitude and at random otherwise. Weights and optimizer state of those that stay are untouched; those
        that come start at zero. Call it between steps.

        Args:
            density: The new density over all sparse layers, in (0, 1].

        Raises:
            ConfigurationError: A density out of range, one that cannot hold, or a backend that stores a fixed number of
                connections.
            StateError: Training is in the method's dense phase.
        """
        if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
            raise ConfigurationError(f"density={density!r} must lie in (0, 1]: the share of weights that are kept")
        if self._storages.any_prepared:
            raise ConfigurationError(
                f'backend="{self.method.backend}" stores a fixed number of connections; use backend="masked" to change it'
            )
        if not self._state.sparsified:
            raise StateError(f"training is dense until step {self._steppers[0].mask_step}; set the density after it")
        layer_counts(self.method, self.layers, density)
        self._state.set_density = float(density)
        self._state.settings += 1
        step = self.step
        self._state.splits = {}
        chosen: dict[str, Score] = {"drop": Magnitude(), "grow": Random()}
        for role, score in self.method.scores().items():
            if all(can_score(score, self._view(layer, role, step, score)) for layer in self.layers):
                chosen[role] = score
        for stepper in self._steppers:
            moment = Moment(step, self.seed, self._state.set_density, None, is_set=True)
            self._rewire(stepper, moment, chosen, born=stepper.step)
        self._check_agreement(step)

    @torch.no_grad()
    def track_average(self, model: nn.Module) -> None:
        """Keep an averaged copy of the model (EMA, SWA) on the same connections.

        An average over topologies has a weight wherever a connection once was. From here on connections that are dropped
        are zero in the copy too, so that it is as sparse as the model whenever it is used or saved.

        Args:
            model: A copy of the model with the same parameter names; ``torch.optim.swa_utils.AveragedModel`` is looked
                through.

        Raises:
            ConfigurationError: The copy lacks a sparse parameter.
        """
        self._storages.track_average(unwrap(model))

    def _check_agreement(self, step: int) -> None:
        """Compare the replicated masks of all processes."""
        self._storages.check_agreement(step, self._group)

    def _observe(self, stepper: OptimizerSteps) -> bool:
        """Show this step's weights and dense gradients to the scores that watch; whether any of them reads gradients."""
        observers = {role: cast(Observer, s) for role, s in self.method.scores().items() if s.observes}
        if not observers or not stepper.may_update:
            return False
        reads = any(score.needs_gradient for score in observers.values())
        usable = not reads or self._gradients_are_usable(stepper)
        for index in stepper.layers:
            layer = self.layers[index]
            for role, score in observers.items():
                key = (role, layer.label)
                view = self._view(layer, role, stepper.step, score)
                if not score.needs_gradient or (usable and view.gradient is not None):
                    self._state.buffers[key] = score.observe(view.buffer, view)
        return reads

    def _gradients_are_usable(self, stepper: OptimizerSteps, every_layer: bool = False) -> bool:
        """Whether all of the optimizer's gradients are finite, and its layers' present where ``every_layer``.

        Those of dense weights count too: a gradient scaler leaves the step out for any of them.
        """
        if every_layer and (missing := [p for p in stepper.parameters if p.grad is None]):
            raise ConfigurationError(
                f"{self._name(missing[0])} has no gradient, and {type(self.method.init).__name__} needs one; "
                "exclude it, or let it take part in the loss"
            )
        finite = all(is_finite(local(gradient)) for gradient in stepper.gradients())
        finite = finite and self._storages.collected_is_finite(stepper.parameters)
        finite = all_agree(finite, self._group)
        if not finite:
            self._warn_once("gradients are not finite where the topology needs them; the update is left out")
        return finite

    # -- saving and loading ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resume needs, as plain values and tensors (loadable with ``weights_only=True``)."""
        return {
            "format": STATE_FORMAT,
            "method": self.method.spec(),
            "seed": self.seed,
            **state_of_steps(self._steppers),
            **self._state.save(),
            "warming": {} if self._warming is None else self._warming.state(),
            "layers": self.layer_table(),
            **self._storages.state(),
            "collected": self._storages.collected_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; the model's weights may have been loaded before or after construction.

        Masks come from the state, never from which weights are non-zero: a connection grown at zero is active.

        Args:
            state: What ``state_dict`` returned.

        Raises:
            StateError: The state is of another method, density, model or format; nothing is changed then.
        """
        check_state(state, self._expected())
        for _, tensor, original, version in self._originals:
            # Loaded before construction, weights and momentum were cut by a first mask that is now replaced: undo that.
            if tensor._version == version:
                tensor.copy_(original)
        self._originals, self._before_first_step = [], []
        devices = {layer.label: self._storages.parameter(layer).device for layer in self.layers}
        self._state = TrainingState.load(state, devices)
        self._watch_first_batch()
        self._storages.load(state, int(state["steps"][0]))
        self._check_agreement(int(state["steps"][0]))
        load_steps(self._steppers, state)
        if self._warming is not None:
            layers = {layer.label: layer for layer in self.layers}
            self._warming.load(state["warming"], layers, self._storages.parameters)
        self._expect_gradients()
        self._storages.load_collected(state["collected"])

    # -- copies ---------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> Sparsifier:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        if self._group is not None:
            memo[id(self._group)] = self._group  # processes are not copied
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        """All but what ties it to the objects of this process: hooks, and what counts tensors' versions."""
        current = dict(self._cut_by_first_mask()) if self._originals else {}
        return {
            **self.__dict__,
            "_hooks": bool(self._hooks),
            "_originals": [
                (place, as_it_was)
                for place, t, as_it_was, version in self._originals
                if t._version == version and place in current and current[place].data_ptr() == t.data_ptr()
            ],
            "collected": self._storages.collected_state(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take part in the steps of the copied optimizers, which keep no hooks when they are copied."""
        collected = state.pop("collected")
        self.__dict__.update(state, _hooks=[])
        current = dict(self._cut_by_first_mask())
        self._originals = [(p, current[p], as_it_was, current[p]._version) for p, as_it_was in state["_originals"]]
        if state["_hooks"]:
            self._hook()
            self._expect_gradients()
            self._storages.load_collected(collected)

    def _expected(self) -> Expected:
        return Expected(
            self.method,
            self.seed,
            self._steppers,
            self.layers,
            self._storages,
        )

    # -- small helpers --------------------------------------------------------------------------------------------

    def _name(self, parameter: nn.Parameter) -> str:
        name = self._storages.name_of(parameter)
        assert name is not None
        return name

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)

    def __repr__(self) -> str:
        return (
            f"Sparsifier({self.method.name}, density={self.density:.4g} of {len(self.layers)} layers, "
            f"step={self.step}, updates={self.updates})"
        )


def _check_free(optimizers: Iterable[Optimizer]) -> None:
    """Refuse an optimizer whose steps another sparsifier follows."""
    for optimizer in optimizers:
        for hook in optimizer._optimizer_step_post_hooks.values():
            other = getattr(hook, "__self__", None)
            if isinstance(other, Sparsifier):
                raise ConfigurationError(
                    f"{type(optimizer).__name__} trains for another sparsifier already, {other!r}: finalize() that one "
                    "first, or build a new optimizer"
                )

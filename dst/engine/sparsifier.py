"""``Sparsifier``: the training-loop protocol. It runs what is due before and after each optimizer step."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dst.backends.auto import is_chosen_by_layer
from dst.backends.csr_support import unsupported_reasons
from dst.engine import coverage
from dst.engine.assembly import assemble, check_trainable
from dst.engine.first_mask import FirstMask
from dst.engine.gradients import observe, perturb, refuse_sparse_gradients
from dst.engine.optimizers import as_optimizers, totals_of, unwrap_optimizer
from dst.engine.readings import Readings
from dst.engine.saved_state import check_state, load_training, save_training
from dst.engine.steps import OptimizerSteps, PreparedStep, fingerprint
from dst.engine.update import set_density, update_topology
from dst.errors import ConfigurationError, StateError
from dst.method import Method
from dst.pieces.protocols import waits_for_batch
from dst.topology.layers import Selector, find_layers
from dst.topology.wrapping import unwrap

_REBUILT = (
    "this sparsifier belongs to another optimizer: build the Sparsifier after its optimizer, a new one where the optimizer "
    "was built anew (new.load_state_dict(old.state_dict()) goes on with its masks), and copy model, optimizer and "
    "sparsifier together"
)


class Sparsifier(Readings):
    """Trains a model sparsely: owns its masks and updates them by a method.

    ```python
    sparsifier = dst.Sparsifier(model, optimizer, dst.methods.rigl(density=0.1), total_steps=10_000)
    loss.backward()
    sparsifier.before_step()
    optimizer.step()
    ```

    Inactive weights are exactly zero after construction and after every optimizer step. Methods that train dense first make
    the mask later. Optimizer state of weights that are grown or dropped is cleared, for any optimizer.

    Args:
        model: The model; its parameters stay ordinary parameters.
        optimizer: The optimizer, or several. Each counts its own steps, and its steps update its own layers.
        method: The method; see ``dst.methods``.
        total_steps: Optimizer steps of the whole training, >= 1. Durations given as fractions refer to it. Several optimizers
            may have one number each, in their order, or a mapping from optimizer to number.
        include: Restrict what is sparse, by name, pattern or module type; see ``dst.topology.layers.find_layers``.
        exclude: Keep dense what these select.
        seed: Seeds every random choice; the same on all ranks.
        process_group: The processes that train this model together, by default all. Masks are compared at every update;
            a difference stops the training.

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
        check_trainable(method)
        model = unwrap(model)
        layers, self.dense_weights = find_layers(model, include, exclude)
        super().__init__(
            assemble(model, layers, optimizer, method, total_steps=total_steps, seed=seed, group=process_group)
        )
        training = self._training
        _check_free(as_optimizers(optimizer))
        self._frozen = [
            (d.name, model.get_parameter(d.name)) for d in self.dense_weights if d.reason == coverage.FROZEN
        ]
        if (share := coverage.left_dense(layers, self.dense_weights)) is not None and method.density < 1:
            training.warn_once(share)
        by_rule = method.backend == "csr" and not is_chosen_by_layer(model)
        unsupported = unsupported_reasons(model, layers) if by_rule else {}
        if method.backend == "csr" and not training.storages.any_prepared:
            training.warn_once(coverage.nothing_prepared(unsupported))
        self._first_mask = FirstMask(training, model, unsupported)
        self._before_first_step: list[str] = []  # warnings that a saved state makes void
        makes_mask = not training.state.sparsified and training.steppers[0].mask_step == 0
        if makes_mask and not waits_for_batch(method.init):
            if not training.storages.any_prepared:
                found = coverage.sparse_before(method, layers, training.storages.weight)
                self._before_first_step += [found] if found is not None else []
            self._first_mask.make_at_construction()
        training.expect_gradients()
        self._hooks: list[RemovableHandle] = []
        self._hook()

    def _hook(self) -> None:
        """Be called at the optimizers' steps."""
        optimizers = [stepper.optimizer for stepper in self._training.steppers]
        self._hooks = [optimizer.register_step_post_hook(self._after_step) for optimizer in optimizers]
        self._hooks += [optimizer.register_step_pre_hook(self._on_step) for optimizer in optimizers]

    # -- the training loop ----------------------------------------------------------------------------------------

    def before_backward(self, loss: Tensor) -> None:
        """Call before ``loss.backward()`` if the method's init needs the graph of the loss (GraSP). No effect otherwise.

        The first mask is made from the first loss of its step; with gradient accumulation, from the first micro-batch.
        ``.grad`` is not touched. The graph is kept for ``backward()``.

        Args:
            loss: The loss that ``backward()`` is called on, scaled or not.

        Raises:
            ConfigurationError: A loss without graph, or one that cannot be differentiated twice.
        """
        self._first_mask.score_loss(loss)

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer | None = None) -> None:
        """Call between ``backward()`` and ``optimizer.step()``, after unscaling and before clipping.

        Observes the dense gradient, makes the first mask or updates the topology if one is due, and masks the gradients.
        If an update replaces the step, all gradients of that optimizer are set to ``None`` when the step begins, or after
        its closure. Clipping and logging see them until then.

        Args:
            optimizer: The optimizer about to step, if there are several; by default all. One without sparse parameters is
                ignored.

        Raises:
            ConfigurationError: A gradient that is a sparse tensor.
        """
        training = self._training
        optimizer = None if optimizer is None else unwrap_optimizer(optimizer)
        chosen = [s for s in training.steppers if optimizer is None or s.optimizer is optimizer]
        if optimizer is not None and not chosen:
            self._refuse_stranger(optimizer)
        self._warn_of_changes()
        for stepper in chosen:
            waits, moves = self._check_waiting(stepper)
            active = training.counts(training.layers_of(stepper))
            kind, replaced = self._prepare(stepper, active)
            training.storages.mask_gradients(stepper.parameters)
            if training.state.sparsified and not replaced:
                perturb(training, stepper)
            # Gradients that were kept for this step are used; if it is not taken, the next attempt begins anew.
            training.expect_gradients([stepper])
            seen = fingerprint(stepper.parameters) if waits else None
            stepper.prepared = PreparedStep(kind, replaced, active, seen, moves)

    def _warn_of_changes(self) -> None:
        """Warn of what the user did to the model since construction."""
        for message in self._before_first_step:
            self._training.warn_once(message)
        self._before_first_step = []
        if self._frozen and (names := coverage.thawed(self._frozen)):
            self._training.warn_once(
                f"{', '.join(names)} began to train after the sparsifier was built, and stay dense: unfreeze them before, or "
                "finalize() it and build another"
            )
            self._frozen = [(name, p) for name, p in self._frozen if name not in names]

    def _refuse_stranger(self, optimizer: Optimizer) -> None:
        """Raise for an unknown optimizer that holds sparse parameters."""
        held = {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
        if name := next((name for name, p in self._training.storages.parameters.items() if id(p) in held), None):
            raise StateError(f"before_step() was given a {type(optimizer).__name__} that holds {name}, and {_REBUILT}")

    def _check_waiting(self, stepper: OptimizerSteps) -> tuple[bool, int]:
        """See ``OptimizerSteps.waits``; raises where another optimizer moves the weights.

        A step that is left out (by a gradient scaler, or while gradients accumulate) moves no weight. Weights that move
        twice in a row without a step of this optimizer are moved by another one.
        """
        waits, moves = stepper.waits() if self._hooks else (False, 0)
        if moves == 2:
            name = self._training.name_of(stepper.parameters[0])
            raise StateError(
                f"before_step() is called again and again, {name} and others move, and the "
                f"{type(stepper.optimizer).__name__} of this sparsifier never steps: {_REBUILT}"
            )
        return waits, moves

    def _prepare(self, stepper: OptimizerSteps, active: Sequence[int]) -> tuple[str, bool]:
        """Make the first mask or update the topology, if due.

        Args:
            stepper: The optimizer's steps.
            active: Active weights of its layers before the step.

        Returns:
            The step's kind, and whether an update or a first mask takes its place.
        """
        training, method = self._training, self.method
        refuse_sparse_gradients(training, stepper)
        if self._first_mask.make_if_due(stepper):
            return "dense", True
        if not training.state.sparsified:
            return "dense", False
        reads = observe(training, stepper) or stepper.moves_inactive
        if not method.updates_after_step and stepper.is_due:
            update_topology(training, stepper)
        updated = stepper.updated_at == stepper.step
        reads = reads or (updated and method.reads_gradient)
        replaced = updated and method.replace_step
        if all(n == layer.weights for layer, n in zip(training.layers_of(stepper), active, strict=True)):
            return "dense", replaced
        return "dense_gradient" if reads else "sparse", replaced

    def _on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Step pre-hook: remove the gradients if an update replaces the step.

        A closure computes gradients within the step, and in Lightning also calls ``before_step``. It is wrapped then.
        """
        stepper = self._training.steps_of(optimizer)
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
        """The optimizer is about to use the gradients."""
        if stepper.prepared is not None and stepper.prepared.replaced:
            stepper.drop_gradients()
        self._training.storages.begin_step(stepper.optimizer, stepper.parameters)
        if self._training.warming is not None:
            self._training.warming.begin(stepper.parameters, self._training.storages.name_of)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Step post-hook: set inactive weights to zero and advance the clock."""
        training = self._training
        stepper = training.steps_of(optimizer)
        if training.warming is not None and stepper.is_stepping:
            training.warming.end(training.storages.parameters, stepper.step)
        training.storages.end_step(stepper.parameters, stepper.step + stepper.is_stepping, stepper.mask_step)
        self._first_mask.forget_originals()
        if not stepper.is_stepping:
            return  # a class and its subclass both call their hooks: the inner step has been counted
        stepper.is_stepping = False
        prepared, stepper.prepared = stepper.prepared, None
        if prepared is None:
            raise StateError(
                "optimizer.step() ran without sparsifier.before_step(): call it between backward() and step(), "
                "or finalize() the sparsifier when sparse training is over"
            )
        if training.state.sparsified and self.method.updates_after_step and stepper.is_due:
            update_topology(training, stepper)  # the next forward pass sees the mask of its own weights
        training.state.count(prepared.kind, stepper.layers, prepared.active, len(training.layers))
        stepper.step += 1
        training.expect_gradients([stepper])

    def finalize(self, *, ended: bool = True) -> None:
        """End sparse training: set inactive weights to zero and remove the optimizers' hooks.

        Warns if training ends before the budget is reached (``shortfall``).

        Args:
            ended: Whether this is the end of training. There is no warning where it goes on, or after an error.
        """
        if ended and sys.exc_info()[0] is None and self._hooks and (shortfall := self.shortfall) is not None:
            self._training.warn_once(shortfall)
        self._training.storages.release()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._first_mask.close()

    @torch.no_grad()
    def mask_optimizer_state(self) -> None:
        """Clear per-weight optimizer state at inactive positions, as after loading an optimizer from a dense run."""
        for stepper in self._training.steppers:
            self._training.storages.mask_optimizer_state(stepper.optimizer)

    def set_total_steps(self, total_steps: int | Sequence[int]) -> None:
        """Change the length of the training; schedules continue over the new length.

        Args:
            total_steps: Optimizer steps of the whole training, or one number for each optimizer that holds sparse weights.

        Raises:
            ConfigurationError: The number is not positive, or there is not one for each optimizer.
        """
        steppers = self._training.steppers
        for stepper, total in zip(steppers, totals_of(total_steps, [s.optimizer for s in steppers]), strict=True):
            stepper.total = total
        self._training.expect_gradients()

    @torch.no_grad()
    def set_density(self, density: float) -> None:
        """Prune or grow to another density now. It replaces the method's density schedule.

        Weights are dropped and grown by the method's scores. A score that needs a gradient that is not there is replaced:
        dropping by magnitude, growth at random. Kept weights and their optimizer state are untouched; grown weights start
        at zero. Call it between steps.

        Args:
            density: The new density over all sparse layers, in (0, 1].

        Raises:
            ConfigurationError: The density is out of range or infeasible, or a backend stores a fixed number of weights.
            StateError: The method's dense phase is not over.
        """
        set_density(self._training, density)

    @torch.no_grad()
    def track_average(self, model: nn.Module) -> None:
        """Keep an averaged copy of the model (EMA, SWA) on the same connections.

        An average over topologies has non-zeros wherever a weight was once active. From now on, dropped weights are set to
        zero in the copy too, so it is as sparse as the model whenever it is used or saved.

        Args:
            model: A copy of the model with the same parameter names, or a ``torch.optim.swa_utils.AveragedModel``.

        Raises:
            ConfigurationError: The copy lacks a sparse parameter.
        """
        self._training.storages.track_average(unwrap(model))

    # -- saving, loading and copies ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume, as plain values and tensors (loadable with ``weights_only=True``)."""
        return save_training(self._training, self.layer_table())

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state. The model's weights may be loaded before or after construction.

        Masks come from the state, not from non-zero weights: a weight grown at zero is active.

        Args:
            state: What ``state_dict`` returned.

        Raises:
            StateError: The state belongs to another method, density, model or format. Nothing is changed.
        """
        check_state(state, self._training)
        self._first_mask.restore_originals()
        self._before_first_step = []
        load_training(self._training, state)
        self._first_mask.watch()

    def __deepcopy__(self, memo: dict[int, Any]) -> Sparsifier:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        if (group := self._training.group) is not None:
            memo[id(group)] = group  # processes are not copied
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        """Everything but hooks; gradients that storages collect are saved as tensors."""
        return {
            **self.__dict__,
            "_hooks": bool(self._hooks),
            "collected": self._training.storages.collected_state(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Register hooks on the copied optimizers, which lose theirs when they are copied."""
        collected = state.pop("collected")
        self.__dict__.update(state, _hooks=[])
        self._first_mask.attach_to_copy()
        if state["_hooks"]:
            self._hook()
            self._training.expect_gradients()
            self._training.storages.load_collected(collected)

    def __repr__(self) -> str:
        return (
            f"Sparsifier({self.method.name}, density={self.density:.4g} of {len(self.layers)} layers, "
            f"step={self.step}, updates={self.updates})"
        )


def _check_free(optimizers: Iterable[Optimizer]) -> None:
    """Raise for an optimizer that belongs to another sparsifier."""
    for optimizer in optimizers:
        for hook in optimizer._optimizer_step_post_hooks.values():
            other = getattr(hook, "__self__", None)
            if isinstance(other, Sparsifier):
                raise ConfigurationError(
                    f"{type(optimizer).__name__} trains for another sparsifier already, {other!r}: finalize() that one "
                    "first, or build a new optimizer"
                )

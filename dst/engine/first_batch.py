"""Inits that need a batch: the graph of the loss before its backward pass, or the model's call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from dst.errors import ConfigurationError, StateError
from dst.pieces.protocols import CallInit, LossInit
from dst.topology.evaluation import evaluation_mode
from dst.topology.layers import SparseLayer
from dst.topology.sharding import is_sharded, mean_over_processes, of_first_process
from dst.topology.wrapping import drop_hooks

Select = Callable[[Mapping[str, Tensor], float], Mapping[str, Tensor]]
"""From scores by layer label, and progress in [0, 1], to masks by layer label."""


class _Hook:
    """A hook of a watcher. A copy of the model calls the same watcher; an unpickled model calls none."""

    def __init__(self, hook: Callable[..., Any] | None = None) -> None:
        self._hook = hook

    def __call__(self, *args: Any) -> Any:
        return None if self._hook is None else self._hook(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return self

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


@dataclass(frozen=True)
class _Call:
    """A module and the inputs that it was called with, ones for every floating-point number."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class FirstBatch:
    """Watches the model until its first mask is made.

    Modules that hold all sparse weights get hooks. For a ``CallInit``, the outermost module that is called records its
    inputs. For a ``LossInit``, its outputs are scaled by ``output_scale``, and attention uses the math backend: fused
    kernels have no second derivative.

    Args:
        model: The model, unwrapped.
        layers: Its sparse layers.
        init: What will score them.
        due: Whether the step to come makes the first mask.
        group: The processes that train together.

    Raises:
        ConfigurationError: A parameter is sharded over processes.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[SparseLayer],
        init: LossInit | CallInit,
        due: Callable[[], bool],
        group: ProcessGroup | None = None,
    ) -> None:
        self._init, self._layers, self._due, self._group = init, layers, due, group
        self._name = type(init).__name__
        named = dict(model.named_parameters())
        self._weights = {layer.parameter: named[layer.parameter] for layer in layers}
        if sharded := [name for name, weight in self._weights.items() if is_sharded(weight)]:
            raise ConfigurationError(
                f"{self._name} scores the network as a whole, and {sharded[0]} is spread over processes: use "
                "DistributedDataParallel, or another init"
            )
        held = {id(weight) for weight in self._weights.values()}
        self._modules = [m for m in model.modules() if held <= {id(p) for p in m.parameters()}]
        self._call: _Call | None = None
        self._hooks: list[RemovableHandle] = []

    def watch(self) -> None:
        """Register the hooks, unless they are."""
        if self._hooks:
            return
        within: list[nn.Module] = []  # the outermost module, while it runs in plain kernels
        plain = ExitStack()

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if within or not torch.is_grad_enabled() or not self._due():
                return
            if isinstance(self._init, LossInit):
                within.append(module)
                plain.enter_context(sdpa_kernel(SDPBackend.MATH))
            elif self._call is None:
                self._call = _Call(module, *tree_map(_ones, (args, kwargs)))

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            if not within or within[0] is not module:
                return None
            within.clear()
            plain.close()
            assert isinstance(self._init, LossInit)
            scale = self._init.output_scale
            return tree_map(lambda x: x * scale if isinstance(x, Tensor) and x.is_floating_point() else x, output)

        for module in self._modules:
            self._hooks.append(module.register_forward_pre_hook(_Hook(before), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(_Hook(after), always_call=True))

    def close(self) -> None:
        """Remove the hooks and forget the recorded call."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._call = [], None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hooks": bool(self._hooks)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Watch the modules of the copy; its hooks were the original's."""
        self.__dict__.update(state, _hooks=[])
        for module in self._modules:
            drop_hooks(module, lambda hook: isinstance(hook, _Hook))
        if state["_hooks"]:
            self.watch()

    def scores_of_loss(self, loss: Tensor) -> dict[str, Tensor]:
        """Layer label to scores, by a ``LossInit``; the loss keeps its graph.

        Raises:
            ConfigurationError: A loss without graph, or one that cannot be differentiated twice.
        """
        assert isinstance(self._init, LossInit)
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise ConfigurationError(
                "before_backward() takes the loss that backward() is then called on, with its graph"
            )
        try:
            with torch.enable_grad():
                scores = self._init.loss_scores(loss, list(self._weights.values()), self._mean)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ConfigurationError(
                f"{self._name} needs second derivatives of the loss, which are not available ({str(error).splitlines()[0]}). "
                "Attention outside the model's call needs torch.nn.attention.sdpa_kernel(SDPBackend.MATH), recurrent "
                "layers on a GPU torch.backends.cudnn.flags(enabled=False), checkpointing use_reentrant=False; compiled "
                "models have none. Do so for the first step, or use another init"
            ) from error
        return self._by_layer(scores)

    def scores_of_call(self, select: Select) -> dict[str, Tensor]:
        """Layer label to scores, by a ``CallInit``.

        Args:
            select: Makes masks on the way.

        Raises:
            StateError: The model was not called.
            ConfigurationError: A call that cannot be repeated in float64.
        """
        assert isinstance(self._init, CallInit)
        if self._call is None:
            raise StateError(
                f"{self._name} repeats the model's call, and there was none in this step that went through one module "
                "with all sparse weights: call such a module, sparsify only weights of one (include=), or use another init"
            )
        call = self._call
        names = {id(parameter): name for name, parameter in call.module.named_parameters()}
        sparse = [names[id(weight)] for weight in self._weights.values()]
        others = {n: p.detach().double().abs() for n, p in call.module.named_parameters() if n not in sparse}

        def select_parameters(scores: Sequence[Tensor], progress: float) -> list[Tensor]:
            chosen = select(self._by_layer(scores), progress)
            masks = [torch.ones_like(score, dtype=torch.bool) for score in scores]
            by_name = dict(zip(self._weights, masks, strict=True))
            for layer in self._layers:
                layer.part(by_name[layer.parameter]).copy_(chosen[layer.label])
            return masks

        weights = [weight.detach().double() for weight in self._weights.values()]
        with _evaluating(call.module, weights[0].device):
            try:
                one = _one_sample(call, others, dict(zip(sparse, weights, strict=True)))
                scores = self._init.call_scores(
                    lambda values: _total(one, others | dict(zip(sparse, values, strict=True))),
                    weights,
                    select_parameters,
                )
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise ConfigurationError(
                    f"{self._name} calls the model in float64 and evaluation mode with inputs of ones, and that failed "
                    f"({str(error).splitlines()[0]}): let the model take its dtype from its inputs and parameters, or "
                    "use another init"
                ) from error
        return self._by_layer(of_first_process(scores, self._group))

    def _mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return mean_over_processes(tensors, self._group)

    def _by_layer(self, scores: Sequence[Tensor]) -> dict[str, Tensor]:
        by_name = dict(zip(self._weights, scores, strict=True))
        return {layer.label: layer.part(by_name[layer.parameter]) for layer in self._layers}


def _ones(leaf: Any) -> Any:
    """Replace a floating-point tensor by float64 ones; return anything else unchanged."""
    floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return torch.ones(leaf.shape, dtype=torch.float64, device=leaf.device) if floating else leaf


def _total(call: _Call, parameters: Mapping[str, Tensor]) -> Tensor:
    """The sum of all floating-point outputs; the module's buffers are copied, so they do not change."""
    buffers = {
        n: b.to(torch.float64 if b.is_floating_point() else b.dtype, copy=True) for n, b in call.module.named_buffers()
    }
    result = functional_call(call.module, {**parameters, **buffers}, call.args, dict(call.kwargs))
    totals = [leaf.sum() for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not any(total.requires_grad for total in totals):
        raise RuntimeError(f"{type(call.module).__name__} returned no tensor that depends on its weights")
    return torch.stack([total.double() for total in totals]).sum()


def _one_sample(call: _Call, others: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> _Call:
    """The call with its first sample only, if that gives the same gradients up to a factor; else the call itself.

    All samples are ones, so one sample is enough if the first dimension is the batch. Gradients of both calls are compared
    to check that it is.
    """
    inputs = (call.args, dict(call.kwargs))
    if len(sizes := {x.shape[0] for x in filter(_is_batch, tree_leaves(inputs))}) != 1 or (count := sizes.pop()) < 2:
        return call
    first = _Call(call.module, *tree_map(lambda x: x[:1] if _is_batch(x) else x, inputs))

    def gradients(of: _Call) -> tuple[Tensor, ...]:
        values = [w.abs().requires_grad_() for w in weights.values()]
        with torch.enable_grad():
            total = _total(of, {**others, **dict(zip(weights, values, strict=True))})
        return torch.autograd.grad(total, values, materialize_grads=True)

    whole = gradients(call)
    try:
        part = gradients(first)
    except (RuntimeError, ValueError, IndexError, AssertionError):  # modules check shapes in various ways
        return call
    alike = all(torch.allclose(a, b * count, rtol=1e-9, atol=0) for a, b in zip(whole, part, strict=True))
    return first if alike else call


def _is_batch(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0


@contextmanager
def _evaluating(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode, full precision and a forked random state; all are restored afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.autocast(device.type, enabled=False), evaluation_mode(module):
        yield

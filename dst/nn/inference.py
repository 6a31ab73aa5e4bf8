"""Fast inference: chains of linear layers in one call of the kernels, other models with fused operations."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dst.errors import ConfigurationError
from dst.kernels import ChainLayer, Kernels
from dst.nn.chain import Chain, NotAChain
from dst.nn.fusion import Untraceable, fuse
from dst.nn.passes import is_autocast, is_grad_enabled
from dst.nn.sparse_linear import SparseLinear
from dst.nn.watched import Watched, WatchedChain, readable, unchanged, watch


class InferenceChain(nn.Module):
    """A chain of linear layers that is evaluated in one call; see `optimize_for_inference`.

    Attributes:
        model: The original model. Its parameters are shared.

    Shape:
        - Input: As for ``model``. ``(batch, in_features)`` takes the fast path, as do more dimensions if the model
          flattens them.
        - Output: As for ``model``: ``(batch, out_features)`` with feature-major strides.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = False
        self._trace()

    def _trace(self) -> None:
        chain = Chain(self.model)
        self._layers, self._flattens = chain.layers, chain.flattens
        self._dropouts, self._places = chain.dropouts, chain.places
        self._hooks = [*chain.hooks, self._forward_hooks, self._forward_pre_hooks]
        self._prepared: WatchedChain | None = None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Apply the model."""
        if not (args or kwargs):
            y = self._run(x)
            if y is not None:
                return y
        return super().__call__(x, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the model module by module."""
        return self.model(*args, **kwargs)

    def _run(self, x: Tensor) -> Tensor | None:
        """Apply the model in one call. Return None if the result could differ from the model's."""
        if is_grad_enabled() or is_autocast() or self.training:
            return None
        prepared = self._prepared
        if prepared is None or not unchanged(prepared.watched) or (self._dropouts and not self._drops_nothing()):
            prepared = self._prepared = self._prepare()
            if prepared is None:
                return None
        return prepared.chain.run(x.flatten(1) if self._flattens and x.dim() > 2 else x)

    def _drops_nothing(self) -> bool:
        return not any(dropout.training for dropout in self._dropouts)

    def _is_plain(self) -> bool:
        """Whether the modules are still the traced ones, without hooks and with dropout off."""
        # Modules compare by identity.
        same = all([*children.values()] == expected for children, expected in self._places)
        return same and not any(self._hooks) and self._drops_nothing()

    def _prepare(self) -> WatchedChain | None:
        """Prepare the chain with its current weights. None if the kernels cannot compute it."""
        watched: list[Watched] = []
        layers: list[ChainLayer] = []
        for module, relu in self._layers:
            if isinstance(module, SparseLinear):
                prepared = module.chain_layer()
                if prepared is None:
                    return None
                layer, key = prepared
                watched += watch(module, "values", key), watch(module, "bias")
                layers.append(layer._replace(relu=layer.relu or relu))
            else:
                dense = _dense_layer(module, relu)
                if dense is None:
                    return None
                watched += watch(module, "weight"), watch(module, "bias")
                layers.append(dense)
        if not self._is_plain() or len({layer.values.dtype for layer in layers}) > 1:
            return None
        if any(a.rows != b.columns for a, b in pairwise(layers)):
            return None
        # A chain has a sparse layer, and `chain_layer` has checked that its engine is the compiled one.
        kernels = next(m._engine for m, _ in self._layers if isinstance(m, SparseLinear))
        return WatchedChain(kernels.chain(layers), watched) if isinstance(kernels, Kernels) else None

    def train(self, mode: bool = True) -> InferenceChain:
        """Set training or evaluation mode; see ``nn.Module.train``."""
        self._prepared = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        # The copy is traced again, to refer to its own modules.
        derived = ("_prepared", "_layers", "_flattens", "_dropouts", "_places", "_hooks")
        return {key: value for key, value in self.__dict__.items() if key not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._trace()


class InferenceModel(nn.Module):
    """A snapshot of a model with fused operations; see `optimize_for_inference`.

    Attributes:
        module: Computes the model. Its parameters are copies and need no gradient.
        folded: Names of the batch normalisations that are folded into the layer before them.
        relus: Names of the sparse layers that compute the ReLU after them.
        unfused: Why nothing is fused, or None.

    Shape:
        - Input: As for the model.
        - Output: As for the model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        busy = [name or type(module).__name__ for name, module in model.named_modules() if module.training]
        if busy:
            raise ConfigurationError(f"{busy[0]} is in training mode; call model.eval() before optimize_for_inference")
        if not any(isinstance(module, SparseLinear) for module in model.modules()):
            raise ConfigurationError("the model has no sparse layer to optimize")
        # Tensors created in inference mode have no version counter, which detects outdated row-order copies.
        with torch.inference_mode(False):
            module = copy.deepcopy(model)
            module = nn.Sequential(module).eval() if isinstance(module, SparseLinear) else module
            self.module: nn.Module = module
            self.folded: list[str] = []
            self.relus: list[str] = []
            self.unfused: str | None = None
            try:
                self.module, self.folded, self.relus = fuse(module)
            except Untraceable as error:
                self.unfused = str(error)
            self.requires_grad_(False)
            for layer in self.modules():
                if isinstance(layer, SparseLinear):
                    layer.chain_layer()  # makes the row-order copy, which the layer keeps
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the model.

        Raises:
            ConfigurationError: Gradients are enabled.
        """
        if is_grad_enabled():
            raise ConfigurationError(
                "a model optimized for inference has no gradients; call it under torch.inference_mode() or torch.no_grad()"
            )
        return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> InferenceModel:
        """Set evaluation mode.

        Raises:
            ConfigurationError: ``mode`` is True.
        """
        if mode:
            raise ConfigurationError("a model optimized for inference cannot train; train the original model")
        return super().train(False)

    def extra_repr(self) -> str:
        """Show what is fused in ``print(model)``."""
        fused = f"folded={len(self.folded)}, relus={len(self.relus)}"
        return fused if self.unfused is None else f"{fused}, unfused={self.unfused!r}"


def optimize_for_inference(model: nn.Module) -> InferenceChain | InferenceModel:
    """Prepare a model with sparse layers for fast evaluation. Results equal those of the model up to rounding.

    **A chain of linear layers** is evaluated in one call of the kernels. With small batches this removes call overhead,
    not arithmetic. A chain consists of `SparseLinear`, ``nn.Linear``, ReLU (module, function or method), dropout (the
    identity in evaluation) and an initial flatten. The model may be an ``nn.Sequential`` or any module that ``torch.fx`` can
    trace. The result shares the model's parameters: optimizer steps, ``load_state_dict`` and topology updates take effect at
    the next call. It falls back to the model if one call could give another result: with gradients enabled, in training
    mode, under autocast, with 16-bit weights, with forward hooks, with a replaced layer, or without compiled kernels.
    Hooks and replaced layers are detected at the first call after ``eval`` or after a change of the weights: checking at
    every call would cost as much as a layer. Call `SparseLinear.refresh` after writing through ``values.data``.

    **Any other model** becomes a snapshot: later changes of the model, its weights included, have no effect on it. Batch
    normalisation is folded into the `SparseConv2d`, `SparseLinear`, ``nn.Conv2d`` or ``nn.Linear`` before it, and ReLU into
    the sparse layer before it, where the layer is called once, nothing else reads its output, and neither has hooks. Batch
    normalisation of 16-bit layers or without running statistics stays. A linear layer with folded batch normalisation takes
    ``(batch, features)`` only. ``torch.fx`` traces the model once, so Python code that does not depend on the
    inputs runs at that time only. A model that cannot be traced or whose ``forward`` has optional arguments computes module
    by module, as before; a warning and ``InferenceModel.unfused`` give the reason. Transformers without batch normalisation and
    ReLU gain nothing.

    The result may be called from several threads at once.

    Args:
        model: The model, in evaluation mode. It is not changed.

    Returns:
        A module to call in place of the model, under ``torch.inference_mode()`` or ``torch.no_grad()``. An `InferenceModel`
        raises with gradients enabled, and when it is set to training mode.

    Raises:
        ConfigurationError: The model is in training mode or has no sparse layer, or sizes of a chain do not fit.
    """
    if model.training:
        raise ConfigurationError("the model is in training mode; call model.eval() before optimize_for_inference")
    try:
        return InferenceChain(model)
    except NotAChain:
        fused = InferenceModel(model)
    if fused.unfused is not None:
        warnings.warn(f"nothing is fused in {type(model).__name__}: {fused.unfused}", stacklevel=2)
    return fused


def _dense_layer(module: nn.Linear, relu: bool) -> ChainLayer | None:
    """Return a dense layer of the chain. None if the kernels cannot read its parameters."""
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    if weight is None or weight.dim() != 2 or not readable(weight, tuple(weight.shape)):
        return None
    if bias is not None and not (readable(bias, weight.shape[:1]) and bias.dtype is weight.dtype):
        return None
    shift = None if bias is None else bias.detach()
    return ChainLayer(weight.shape[0], weight.shape[1], None, weight.detach(), shift, relu)

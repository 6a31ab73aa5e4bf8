"""Fast inference: a chain of sparse and dense linear layers in one call of the kernels."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from dst.errors import ConfigurationError
from dst.kernels import ChainLayer, Kernels
from dst.nn.chain import Chain
from dst.nn.sparse_linear import SparseLinear, is_autocast, is_grad_enabled
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


def optimize_for_inference(model: nn.Module) -> InferenceChain:
    """Evaluate a model that is a chain of linear layers in one call of the kernels.

    A chain consists of `SparseLinear`, ``nn.Linear``, ReLU (module, function or method), dropout (the identity in
    evaluation) and an initial flatten. The model may be an ``nn.Sequential`` or any module that ``torch.fx`` can trace.
    Results equal those of the model up to rounding. With small batches this removes call overhead, not arithmetic.

    The result shares the model's parameters: optimizer steps, ``load_state_dict`` and topology updates take effect at the
    next call. It falls back to the model where one call could give another result: with gradients enabled, in training
    mode, under autocast, with 16-bit weights, with forward hooks, with a replaced layer, or without compiled kernels.
    Hooks and replaced layers are detected at the first call after ``eval`` or after a change of the weights: checking at
    every call would cost as much as a layer. Call `SparseLinear.refresh` after writing through ``values.data``.

    The result may be called from several threads at once.

    Args:
        model: The model, in evaluation mode. It is not changed.

    Returns:
        A module to call in place of the model, under ``torch.inference_mode()`` or ``torch.no_grad()``.

    Raises:
        ConfigurationError: The model is in training mode, is not a chain, or has no sparse layer.
    """
    if model.training:
        raise ConfigurationError("the model is in training mode; call model.eval() before optimize_for_inference")
    return InferenceChain(model)


def _dense_layer(module: nn.Linear, relu: bool) -> ChainLayer | None:
    """Return a dense layer of the chain. None if the kernels cannot read its parameters."""
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    if weight is None or weight.dim() != 2 or not readable(weight, tuple(weight.shape)):
        return None
    if bias is not None and not (readable(bias, weight.shape[:1]) and bias.dtype is weight.dtype):
        return None
    shift = None if bias is None else bias.detach()
    return ChainLayer(weight.shape[0], weight.shape[1], None, weight.detach(), shift, relu)

"""Modules: layers that store only non-zeros, sparse activations, mixtures of experts."""

from __future__ import annotations

from dst.nn.activations import ActivationFactory, KWinners, TopKReLU, k_winners, relu, top_k_relu, updated_duty_cycle
from dst.nn.feature_major import FeatureMajorLinear
from dst.nn.inference import InferenceChain, InferenceModel, optimize_for_inference
from dst.nn.moe import FeedForward, SwitchFeedForward, auxiliary_losses, load_balancing_loss
from dst.nn.sparse_attention import PackedProjection, SparseMultiheadAttention
from dst.nn.sparse_conv import SparseConv2d
from dst.nn.sparse_conv1d import SparseConv1D
from dst.nn.sparse_linear import SparseLinear
from dst.nn.sparse_recurrent import RecurrentWeight, SparseGRU, SparseLSTM, SparseRecurrent
from dst.nn.topology_change import remap

__all__ = [
    "ActivationFactory",
    "FeatureMajorLinear",
    "FeedForward",
    "InferenceChain",
    "InferenceModel",
    "KWinners",
    "PackedProjection",
    "RecurrentWeight",
    "SparseConv1D",
    "SparseConv2d",
    "SparseGRU",
    "SparseLSTM",
    "SparseLinear",
    "SparseMultiheadAttention",
    "SparseRecurrent",
    "SwitchFeedForward",
    "TopKReLU",
    "auxiliary_losses",
    "k_winners",
    "load_balancing_loss",
    "optimize_for_inference",
    "relu",
    "remap",
    "top_k_relu",
    "updated_duty_cycle",
]

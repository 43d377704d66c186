"""The layers with weights, bound to the kernels that run them.

Where a call takes `add_to`, the float32 residual stream [T, M], it adds its result there and returns it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.core.spec import DecoderSpec
from holdfast.kernels.interface import Kernels

PackedMatrix = Any
"""A matrix in the form of the backend that packed it."""


@dataclass(frozen=True, slots=True)
class Linear:
    """x [T, K] → [T, N], with whatever activation its weight was packed with."""

    kernels: Kernels[Any]
    weight: PackedMatrix

    def __call__(self, x: Tensor, *, add_to: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        return self.kernels.linear(x, self.weight, add_to=add_to, dtype=dtype)


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """Over the last dim; to the model's dtype unless the call says otherwise."""

    kernels: Kernels[Any]
    weight: Tensor
    eps: float
    dtype: torch.dtype

    def __call__(self, x: Tensor, *, add_to: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.eps, dtype or self.dtype, add_to=add_to)


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Like `RMSNorm`."""

    kernels: Kernels[Any]
    weight: Tensor
    bias: Tensor
    eps: float
    dtype: torch.dtype

    def __call__(self, x: Tensor, *, add_to: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        return self.kernels.layer_norm(x, self.weight, self.bias, self.eps, dtype or self.dtype, add_to=add_to)


@dataclass(frozen=True, slots=True)
class Weights:
    """A decoder's weights in memory, handed out as layers."""

    spec: DecoderSpec
    kernels: Kernels[Any]
    dtype: torch.dtype
    """The model's: of everything but the residual stream, the norms and the logits."""
    device: torch.device
    packed: Mapping[str, PackedMatrix]
    """By the names of `models.parameters.packings`; "head" may be the very object that "embed" is."""
    norms: Mapping[str, Tensor]
    """float32, by the names of `models.parameters.parameters`."""

    def linear(self, name: str) -> Linear:
        return Linear(self.kernels, self.packed[name])

    def norm(self, name: str) -> RMSNorm | LayerNorm:
        """The model's kind of norm."""
        weight, eps = self.norms[f"{name}.weight"], self.spec.norm_eps
        if self.spec.norm == "rms":
            return RMSNorm(self.kernels, weight, eps, self.dtype)
        return LayerNorm(self.kernels, weight, self.norms[f"{name}.bias"], eps, self.dtype)

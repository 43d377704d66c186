"""The two kinds of layer with weights, bound to the kernels that run them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.core.spec import DecoderSpec
from holdfast.kernels.interface import Kernels


@dataclass(frozen=True, slots=True)
class Linear:
    """x [T, in] → [T, out]."""

    kernels: Kernels
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernels.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """Over the last dim; from the residual stream's float32 (or `dtype`) to `dtype`, the model's."""

    kernels: Kernels
    weight: Tensor
    eps: float
    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.eps, self.dtype)


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Like `RMSNorm`."""

    kernels: Kernels
    weight: Tensor
    bias: Tensor
    eps: float
    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernels.layer_norm(x, self.weight, self.bias, self.eps, self.dtype)


@dataclass(frozen=True, slots=True)
class Weights:
    """A decoder's parameters by name (`models.parameters`), handed out as layers."""

    tensors: Mapping[str, Tensor]
    spec: DecoderSpec
    kernels: Kernels

    @property
    def dtype(self) -> torch.dtype:
        """The model's: that of every parameter but the norms."""
        return self.tensors["embed.weight"].dtype

    def linear(self, name: str) -> Linear:
        return Linear(self.kernels, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def norm(self, name: str) -> RMSNorm | LayerNorm:
        """The model's kind of norm."""
        if self.spec.norm == "rms":
            return self.rms_norm(name)
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return LayerNorm(self.kernels, weight, bias, self.spec.norm_eps, self.dtype)

    def rms_norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.kernels, self.tensors[f"{name}.weight"], self.spec.norm_eps, self.dtype)

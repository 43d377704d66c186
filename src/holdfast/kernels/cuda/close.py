"""The GPU backend that trades exactness for cuBLAS."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from holdfast.kernels.cuda.kernels import CudaKernels
from holdfast.kernels.cuda.linear import ACTIVATIONS, DeviceMatrix
from holdfast.kernels.reference import activate

NAMES = {number: name for name, number in ACTIVATIONS.items()}


class CloseCudaKernels(CudaKernels):
    """`CudaKernels` whose dense products are torch's: faster, but their order of summation changes with the number of
    rows, so the same request may get other tokens in other company."""

    name = "cuda-close"
    exact = False

    def __init__(self, dtype: torch.dtype = torch.bfloat16, *, num_stages: int = 3) -> None:
        super().__init__(dtype, sharded=False, num_stages=num_stages)

    def linear(
        self, x: Tensor, weight: DeviceMatrix, *, add_to: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        matrix = weight.codes.codes
        rounded = add_to is None and (dtype or x.dtype) != x.dtype  # scores of experts and tokens would tie
        if weight.codes.format != 0 or matrix.dtype != x.dtype or rounded:
            return super().linear(x, weight, add_to=add_to, dtype=dtype)
        bias = None if weight.bias is None else weight.bias.to(x.dtype)
        y = functional.linear(x, matrix, bias)
        if weight.gated:
            y = activate(y[:, : weight.rows], NAMES[weight.activation]) * y[:, weight.rows :]
        else:
            y = activate(y, NAMES[weight.activation])
        return y.to(dtype or x.dtype) if add_to is None else add_to.add_(y)

"""Loading a checkpoint into kernels that remember what they were given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from holdfast.core.spec import ModelInfo
from holdfast.kernels.interface import Matrix
from holdfast.kernels.reference import ReferenceKernels, StackedMatrix
from holdfast.models.layers import Weights
from holdfast.models.load import load_weights


class Recorder(ReferenceKernels):
    """Remembers what every packed matrix was made of."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[int, tuple[list[Matrix], list[torch.Tensor], dict[str, Any]]] = {}

    def pack(self, parts: Sequence[Matrix], biases: Sequence[torch.Tensor] = (), **options: Any) -> StackedMatrix:
        packed = super().pack(parts, biases, **options)
        self.calls[id(packed)] = (list(parts), list(biases), options)
        return packed


def load(
    info: ModelInfo, kernels: ReferenceKernels, dtype: torch.dtype = torch.float32, progress: Any = lambda fraction: 0
) -> Weights:
    return load_weights(info, kernels, dtype, torch.device("cpu"), progress)

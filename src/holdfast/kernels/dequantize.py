"""Quantized matrices in numbers."""

from __future__ import annotations

import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from holdfast.kernels.interface import FP8_GROUP, Matrix, Quantized


def numbers_of(part: Matrix, dtype: torch.dtype) -> Tensor:
    """A matrix [N, K] where it lies, in `dtype` if it was quantized."""
    if not isinstance(part, Quantized):
        return part
    if part.scales is not None:
        scales = part.scales.repeat_interleave(FP8_GROUP, dim=1)[:, : part.shape[1]]
        return (part.blocks.view(torch.float8_e4m3fn).float() * scales).to(dtype)
    numbers = dequantize(part.blocks.cpu().numpy(), GGMLQuantizationType[part.format])
    return torch.from_numpy(numbers).to(part.blocks.device, dtype)

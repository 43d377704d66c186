"""The CPU kernels in all their builds, and random matrices with their exact values."""

from __future__ import annotations

from typing import NamedTuple

import gguf
import pytest
import torch
from torch import Tensor

from holdfast.kernels.cpu.kernels import CpuKernels
from holdfast.kernels.interface import Matrix, Quantized
from support.builds import builds

FLOAT_EPS, BFLOAT16_EPS = 2.0**-24, 2.0**-8
"""What rounding to float32 or bfloat16 changes of a number at most."""
STEPS = {8: 127, 16: 127 * 256}
FORMATS = ("float32", "bfloat16", "Q8_0", "Q4_0", "Q4_1")
HELD = [(kind, bits) for kind in FORMATS for bits in STEPS if kind.startswith("Q") or bits == 8]
"""(a format of weights, the bits that rows are rounded to for it)"""


class Build(NamedTuple):
    """One instruction set's build, and the size of the team that runs it."""

    isa: str
    threads: int

    def __str__(self) -> str:
        return f"{self.isa}-{self.threads}"

    def kernels(self, dtype: torch.dtype = torch.bfloat16, *, bits: int = 8) -> CpuKernels:
        """`bits`: that quantized products round rows to."""
        return CpuKernels(dtype, self.threads, activation_bits=bits, isa=self.isa)


ISAS = builds()
every_build = pytest.mark.parametrize("build", [Build(isa, n) for isa in ISAS for n in (1, 2)], ids=str)
every_isa = pytest.mark.parametrize("isa", ISAS)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(kind: str, rows: int, columns: int, random_: torch.Generator) -> tuple[Matrix, Tensor]:
    """A random matrix as the kernels are given it, and its exact values in float64."""
    numbers = torch.randn(rows, columns, generator=random_)
    if kind in ("float32", "bfloat16"):
        numbers = numbers.to(getattr(torch, kind))
        return numbers, numbers.double()
    if kind == "FP8":
        scales = (torch.rand(rows, -(-columns // 128), generator=random_) + 0.1) / 50
        part = Quantized(kind, (numbers * 50).to(torch.float8_e4m3fn).view(torch.uint8), scales)
        codes = part.blocks.view(torch.float8_e4m3fn).double()
        return part, codes * scales.double().repeat_interleave(128, dim=1)[:, :columns]
    quantization = gguf.GGMLQuantizationType[kind]
    blocks = gguf.quants.quantize(numbers.numpy(), quantization)
    exact = torch.from_numpy(gguf.quants.dequantize(blocks, quantization)).double()
    return Quantized(kind, torch.from_numpy(blocks)), exact


def in_steps(x: Tensor, bits: int = 8) -> Tensor:
    """x [T, K] as quantized products see it, in float64: every group of 32 rounded to as many steps, up to its
    largest number and down, as there are in 8 bits, or in two digits of 8 bits."""
    groups = x.float().view(x.shape[0], -1, 32)
    largest = groups.abs().amax(dim=-1, keepdim=True)
    steps = torch.full_like(largest, STEPS[bits])  # a tensor: `127.0 / largest` would be rounded twice
    codes = torch.where(largest > 0, groups * (steps / largest), 0.0).round()
    return (codes.double() * (largest / steps).double()).view(x.shape)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """`torch.equal` in which a NaN equals itself and 0 is not -0."""
    integers = {4: torch.int32, 2: torch.int16}[left.element_size()]
    return left.dtype == right.dtype and torch.equal(
        left.contiguous().view(integers), right.contiguous().view(integers)
    )

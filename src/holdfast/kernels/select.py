"""Which backend serves a device.

| backend | devices | dtypes | quantized matrices | promises |
|---|---|---|---|---|
| `cpu-avx512bf16`, `cpu-avx512`, `cpu-avx2`, `cpu-portable` | CPUs | float32, bfloat16 | held as they are | exact |
| `reference` | all that torch runs on | all | dequantized | close |

exact: a request's bits depend on nothing but the request. That holds within one backend: another instruction set
sums in another order. Held as they are: Q8_0, Q4_0 and Q4_1, in a bfloat16 model.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from holdfast.kernels.cpu.kernels import CpuKernels
from holdfast.kernels.interface import Kernels
from holdfast.kernels.reference import ReferenceKernels

log = logging.getLogger(__name__)


def select_kernels(
    device: str,
    dtype: torch.dtype = torch.float32,
    threads: int = 1,
    *,
    pinned: bool = False,
    activation_bits: int = 16,
) -> Kernels[Any]:
    """The backend for a torch device type ("cpu", "cuda") and the model's dtype; the rest is for CPUs: `CpuKernels`.

    Raises `ConfigError` for an instruction set asked for by the environment that this processor lacks, and for
    threads that cannot be had.
    """
    if device != "cpu":
        return ReferenceKernels(dtype)
    if dtype not in (torch.float32, torch.bfloat16):
        log.warning("the CPU kernels take float32 and bfloat16: %s runs on torch's, slower and not exact", dtype)
        return ReferenceKernels(dtype)
    try:
        return CpuKernels(dtype, threads, pinned=pinned, activation_bits=activation_bits)
    except OSError as error:
        log.warning("%s; torch's kernels are used, slower and not exact", error)
        return ReferenceKernels(dtype)

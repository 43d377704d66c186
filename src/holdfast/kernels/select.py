"""Which backend serves a device.

| backend | devices | dtypes | quantized matrices | promises |
|---|---|---|---|---|
| `cpu-avx512bf16`, `cpu-avx512`, `cpu-avx2`, `cpu-portable` | CPUs | float32, bfloat16 | held as they are | exact |
| `cuda` | NVIDIA GPUs, compute capability 8.0 and later | all | held as they are, FP8 too | exact |
| `cuda-close` | the same, with `--exactness off` | all | the same | close |
| `cuda-flashinfer` | the same, with `--attention-backend flashinfer` | all | the same | close |
| `reference` | all that torch runs on | all | dequantized | close |

exact: a request's bits depend on nothing but the request. That holds within one backend: another instruction set or
GPU sums in another order. Held as they are: Q8_0, Q4_0 and Q4_1, in a model that is not float32; others become
numbers, and so does a matrix that is cut within a group of numbers that share a scale: 128 columns in FP8, 32 else.
What cuts it are its virtual shards or, with `--exactness batch` or `off` on a GPU, the plan. In FP8 that is `down` of
many models: Qwen3-30B-A3B's has shards of 96 columns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from holdfast.core.errors import ConfigError
from holdfast.kernels.cpu.kernels import CpuKernels
from holdfast.kernels.cpu.memory import WeightMemory
from holdfast.kernels.interface import Kernels
from holdfast.kernels.reference import ReferenceKernels

log = logging.getLogger(__name__)

Exactness = Literal["plan", "batch", "off"]
"""`--exactness`."""
AttentionBackend = Literal["triton", "flashinfer"]
"""`--attention-backend`."""


def select_kernels(
    device: str,
    dtype: torch.dtype = torch.float32,
    threads: int = 1,
    *,
    pinned: bool = False,
    activation_bits: int = 16,
    exactness: Exactness = "plan",
    attention: AttentionBackend = "triton",
    memory: WeightMemory | None = None,
) -> Kernels[Any]:
    """The backend for a torch device type ("cpu", "cuda") and the model's dtype. `exactness` and `attention` are for
    GPUs, the rest for CPUs: `CpuKernels`.

    Raises `ConfigError` for an instruction set asked for by the environment that this processor lacks, for threads
    that cannot be had, and for FlashInfer where it is not to be had.
    """
    wrapper = _flashinfer(device, exactness) if attention == "flashinfer" else None
    if device != "cpu":
        return _for_gpu(dtype, exactness, wrapper)
    if dtype not in (torch.float32, torch.bfloat16):
        log.warning("the CPU kernels take float32 and bfloat16: %s runs on torch's, slower and not exact", dtype)
        return ReferenceKernels(dtype)
    try:
        return CpuKernels(dtype, threads, pinned=pinned, activation_bits=activation_bits, memory=memory)
    except OSError as error:
        log.warning("%s; torch's kernels are used, slower and not exact", error)
        return ReferenceKernels(dtype)


def _flashinfer(device: str, exactness: Exactness) -> Callable[..., Any]:
    """Its wrapper for prompts. Raises `ConfigError`."""
    if device == "cpu":
        raise ConfigError("--attention-backend flashinfer: works on GPUs only")
    if exactness != "off":
        raise ConfigError("--attention-backend flashinfer: needs --exactness off, for its sums change with the batch")
    try:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise ConfigError(
            f"--attention-backend flashinfer: FlashInfer cannot be imported ({error}); "
            "pip install 'holdfast[flashinfer]' installs it"
        ) from error
    wrapper: Callable[..., Any] = BatchPrefillWithPagedKVCacheWrapper
    return wrapper


def import_kernels(device: str) -> None:
    """All that `select_kernels` may need for `--device`, so that it need not wait for it. Touches no device."""
    if device != "cpu" and Path("/dev/nvidiactl").exists() and find_spec("triton") is not None:
        import_module("holdfast.kernels.cuda.kernels")


def _for_gpu(dtype: torch.dtype, exactness: Exactness, flashinfer: Callable[..., Any] | None) -> Kernels[Any]:
    capability = torch.cuda.get_device_capability()
    if find_spec("triton") is None or capability < (8, 0):
        why = "triton is not installed" if capability >= (8, 0) else f"the GPU's compute capability is {capability}"
        if flashinfer is not None:
            raise ConfigError(f"--attention-backend flashinfer: needs triton and compute capability 8.0, and {why}")
        log.warning(
            "our kernels for GPUs need triton and compute capability 8.0, and %s; torch's are used, slower", why
        )
        return ReferenceKernels(dtype)
    # triton is imported with the first of these: a machine without GPUs need not have it
    from holdfast.kernels.cuda.close import CloseCudaKernels  # noqa: PLC0415
    from holdfast.kernels.cuda.flash import FlashInferKernels  # noqa: PLC0415
    from holdfast.kernels.cuda.kernels import CudaKernels  # noqa: PLC0415

    little_shared_memory = capability in {(8, 6), (8, 9)} or capability[0] == 12  # 99 KB: GPUs for desks
    num_stages = 2 if little_shared_memory else 3
    if flashinfer is not None:
        return FlashInferKernels(flashinfer, dtype, num_stages=num_stages)
    if exactness == "off":
        return CloseCudaKernels(dtype, num_stages=num_stages)
    return CudaKernels(dtype, sharded=exactness == "plan", num_stages=num_stages)

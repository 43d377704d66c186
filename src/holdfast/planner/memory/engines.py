"""What serving engines take of a device's memory beside weights and KV cache: data, each figure with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

GIB = 1 << 30

CUDA_CONTEXT = 500_000_000
"""A rule: a CUDA context with the code of torch's kernels is some 0.4 to 0.6 GB on cards from Ampere to Hopper."""
LINKED_COMMUNICATOR = int(1.79 * GIB)
"""Of NCCL over NVLink, with the buffers of a custom all-reduce: what vLLM held outside of torch on H100s with two
ranks (3.58 GiB) more than with one (1.79 GiB); github.com/vllm-project/vllm/pull/10511. It grows with the channels,
not with the ranks (github.com/NVIDIA/nccl/issues/864, where one communicator is said to take 1.6 GB)."""
PCIE_COMMUNICATOR = int(0.20 * GIB)
"""Of NCCL over PCIe, which has few channels: all that vLLM held outside of torch on RTX 3090s with 16 ranks;
github.com/vllm-project/vllm/pull/14447."""


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """How one engine uses a device. Bytes are per rank."""

    name: str
    utilization: float = 1.0
    """Of the device's memory, what it takes in all."""
    kv_fraction: float = 1.0
    """Of what is then left, what becomes KV cache."""
    reserve: int = 0
    """Device context, code of kernels, workspace of libraries."""
    communicator: int = 0
    """For the all-reduces of a stage's ranks, when their links are NVLink."""
    slow_communicator: int = 0
    """The same over PCIe or a network; and, whatever the links, for what passes between stages."""
    bytes_per_logit: int = 10
    """Of each row and word: 16-bit logits, float32 ones, float32 probabilities."""
    frees_windows: bool = True
    """Whether keys and values that no later token sees are given back."""


PLAIN = EngineMemory("plain", bytes_per_logit=4)
"""A device of which all is memory: the arithmetic of textbooks."""

ENGINES: Mapping[str, EngineMemory] = MappingProxyType(
    {
        "plain": PLAIN,
        # --gpu-memory-utilization is 0.9 unless said; docs.vllm.ai, engine arguments. Its own measurement calls
        # what it holds beside torch and context 0.16 GiB (github.com/vllm-project/vllm/pull/12126).
        "vllm": EngineMemory(
            "vllm",
            utilization=0.9,
            reserve=CUDA_CONTEXT + int(0.16 * GIB),
            communicator=LINKED_COMMUNICATOR,
            slow_communicator=PCIE_COMMUNICATOR,
        ),
        # free_gpu_memory_fraction: 0.9 of what is free once the engine is loaded; TensorRT-LLM, memory usage.
        "tensorrt-llm": EngineMemory(
            "tensorrt-llm",
            kv_fraction=0.9,
            reserve=CUDA_CONTEXT + int(0.16 * GIB),
            communicator=LINKED_COMMUNICATOR,
            slow_communicator=PCIE_COMMUNICATOR,
        ),
        # Ours on GPUs: core.config.CacheConfig.gpu_memory_utilization; keys and values out of a window stay.
        "holdfast": EngineMemory(
            "holdfast",
            utilization=0.9,
            reserve=CUDA_CONTEXT + int(0.16 * GIB),
            communicator=LINKED_COMMUNICATOR,
            slow_communicator=PCIE_COMMUNICATOR,
            frees_windows=False,
        ),
    }
)

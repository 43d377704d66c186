"""Bring one device up: kernels, weights, and as many KV blocks as its memory allows."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from holdfast.cache.pages import KVPages, bytes_per_block
from holdfast.core.config import DeviceConfig, ServeConfig
from holdfast.core.errors import ConfigError
from holdfast.core.request import SamplingParams
from holdfast.core.spec import ModelInfo
from holdfast.core.wire import NewRequest, Step
from holdfast.hardware.host import available_memory, usable_cores
from holdfast.kernels.interface import Capturing
from holdfast.kernels.select import select_kernels
from holdfast.models.load import load_decoder
from holdfast.worker.batch import Requests
from holdfast.worker.runner import Runner
from holdfast.worker.sampler import Sampler

CPU_CACHE_LIMIT = 4_000_000_000
CPU_CACHE_SHARE = 0.4


def start_runner(
    config: ServeConfig, model: ModelInfo, progress: Callable[[str, float | None], None], replica: int = 0
) -> Runner:
    """Load `model` on the device of a replica. `progress(text, fraction)` tells the user how far it is.

    Raises `ConfigError` when the device or its memory is not there, `ModelError` when the checkpoint is bad.
    """
    device = pick_device(config.device, replica)
    if device.type == "cpu" and config.device.data_parallel_size > 1:
        os.sched_setaffinity(0, _share_of_cores(replica, config.device.data_parallel_size))
    dtype = pick_dtype(config.model.dtype, model, device)
    threads, pinned = _num_threads(config.device), config.device.pin_cpu_threads
    if device.type == "cpu":
        torch.set_num_threads(threads)
    bits = {"int8": 8, "int16": 16}[config.model.quantized_activations]
    exactness = config.device.exactness
    kernels = select_kernels(device.type, dtype, threads, pinned=pinned, activation_bits=bits, exactness=exactness)
    if model.spec.head_dim > kernels.max_head_dim:
        raise ConfigError(
            f"heads of {model.spec.head_dim} numbers: {kernels.name} kernels take {kernels.max_head_dim}"
        )
    decoder = load_decoder(
        model,
        kernels,
        dtype,
        device,
        progress=lambda fraction: progress("loading weights", fraction),
        max_positions=longest_request(config, model),
    )
    runner = Runner(
        decoder,
        _pages(config, model, dtype, device, num_blocks=1),
        Sampler(kernels, model.eos_token_ids),
        device,
        config.scheduler.max_num_batched_tokens,
        runs_ahead=device.type == "cuda" and config.scheduler.runs_ahead(device.type),
    )
    num_blocks = _num_blocks(config, model, dtype, device, runner)
    runner.use_pages(_pages(config, model, dtype, device, num_blocks))
    if isinstance(runner.forward, Capturing) and not config.device.enforce_eager:
        requests, size = config.scheduler.max_num_seqs, config.cache.block_size
        length = min(longest_request(config, model), num_blocks * size)
        runner.forward.capture(requests, length, size, lambda done: progress("capturing graphs", done))
    tokens = num_blocks * config.cache.block_size
    place = kernels.name if device.type == "cpu" else device.type
    progress(f"{place}, {str(dtype).removeprefix('torch.')}, KV cache of {tokens:,} tokens", None)
    return runner


def longest_request(config: ServeConfig, model: ModelInfo) -> int:
    """Tokens a request can have at most: `--max-model-len`, or what the model allows."""
    return min(config.model.max_model_len or model.spec.max_positions, model.spec.max_positions)


def _num_threads(config: DeviceConfig) -> int:
    """`--cpu-threads`, or as many as there are cores for us. Raises `ConfigError` for more than the machine has, or,
    when each gets a core of its own, than this process may use."""
    wanted, there, ours = config.cpu_threads, os.cpu_count() or 1, len(os.sched_getaffinity(0))
    if wanted is not None and wanted > there:
        raise ConfigError(f"--cpu-threads {wanted}: must be at most {there}, what this machine has")
    if config.pin_cpu_threads and (wanted or 0) > ours:
        raise ConfigError(f"--cpu-threads {wanted} with --pin-cpu-threads: must be at most {ours}")
    return wanted or usable_cores()


def _share_of_cores(replica: int, num_replicas: int) -> set[int]:
    """Of the cores this process may use; those that are too few are shared by all."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < num_replicas:
        return set(cores)
    return set(cores[len(cores) * replica // num_replicas : len(cores) * (replica + 1) // num_replicas])


def pick_device(config: DeviceConfig, replica: int = 0) -> torch.device:
    """The torch device for `--device`; a GPU that is asked for must be there, and one for every replica."""
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError("--device cuda: torch finds no CUDA device on this machine")
    if not available or config.device == "cpu":
        return torch.device("cpu")
    count, replicas = torch.cuda.device_count(), config.data_parallel_size
    if replicas > count and not config.allow_shared_gpu:
        raise ConfigError(f"--data-parallel-size {replicas}: there are {count} GPUs; --allow-shared-gpu shares them")
    device = torch.device("cuda", replica % count)
    torch.cuda.set_device(device)
    return device


def pick_dtype(wanted: str, model: ModelInfo, device: torch.device) -> torch.dtype:
    """The torch dtype for `--dtype`. CPUs have no fast float16, so `auto` turns it into bfloat16 there."""
    name = model.dtype if wanted == "auto" else wanted
    if wanted == "auto" and name == "float16" and device.type == "cpu":
        name = "bfloat16"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _num_blocks(
    config: ServeConfig, model: ModelInfo, dtype: torch.dtype, device: torch.device, runner: Runner
) -> int:
    spec, cache = model.spec, config.cache
    per_block = bytes_per_block(spec.num_layers, spec.num_kv_heads, spec.head_dim, cache.block_size, dtype)
    longest = longest_request(config, model)
    enough = config.scheduler.max_num_seqs * -(-longest // cache.block_size)
    free = _free_cuda_memory(config, model, device, runner) if device.type == "cuda" else available_memory()
    if cache.kv_cache_memory_bytes is not None:
        budget = cache.kv_cache_memory_bytes
        if budget > free:
            raise ConfigError(f"--kv-cache-memory-bytes {budget}: only {free} bytes are free on {device.type}")
    elif device.type == "cuda":
        budget = free
    else:
        budget = min(CPU_CACHE_LIMIT, int(CPU_CACHE_SHARE * free)) // config.device.data_parallel_size
    if budget < per_block:
        raise ConfigError(f"the KV cache gets {max(budget, 0)} bytes on {device.type}, a block needs {per_block}")
    return min(enough, budget // per_block)


def _free_cuda_memory(config: ServeConfig, model: ModelInfo, device: torch.device, runner: Runner) -> int:
    """Bytes left for the KV cache: `--gpu-memory-utilization` of the card, less what others hold, less the weights
    and the peak workspace of the largest step, measured by running one."""
    torch.cuda.reset_peak_memory_stats(device)
    runner.run(largest_step(config, longest_request(config, model)))
    for tokens in (1, 2, 17, 33, 65):  # kernels are compiled for a few numbers of rows: now, not when a request waits
        runner.run(largest_step(config, min(longest_request(config, model), tokens), tokens, max_num_seqs=1))
    runner.requests = Requests()
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    sharing = -(-config.device.data_parallel_size // torch.cuda.device_count())
    if sharing > 1:  # what the others hold is theirs, and still growing
        return min(int(total * config.cache.gpu_memory_utilization) // sharing - peak, free)
    others = total - free - torch.cuda.memory_reserved(device)
    return int(total * config.cache.gpu_memory_utilization) - others - peak


def largest_step(
    config: ServeConfig, max_positions: int, num_tokens: int | None = None, max_num_seqs: int | None = None
) -> Step:
    """As many tokens, and as many requests that sample, as a step can have (or as said); each prompt at most
    `max_positions` long, all of them written into block 0: right for memory, worthless as text."""
    num_tokens = num_tokens or config.scheduler.max_num_batched_tokens
    params = SamplingParams(seed=0, max_tokens=1, top_p=0.5)
    lengths: list[int] = []
    for left in range(max_num_seqs or config.scheduler.max_num_seqs, 0, -1):
        length = min(num_tokens - sum(lengths) - (left - 1), max_positions)  # the others take one token at least
        lengths.append(length)
    requests = [
        NewRequest(str(i), [0] * length, length, params, [0] * -(-length // config.cache.block_size), 0)
        for i, length in enumerate(lengths)
    ]
    return Step(0, requests, [], lengths, [])


def _pages(
    config: ServeConfig, model: ModelInfo, dtype: torch.dtype, device: torch.device, num_blocks: int
) -> KVPages:
    spec = model.spec
    return KVPages.allocate(
        num_layers=spec.num_layers,
        num_blocks=num_blocks,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        block_size=config.cache.block_size,
        dtype=dtype,
        device=device,
    )

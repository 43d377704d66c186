"""Bring one device up: kernels, weights, and as many KV blocks as its memory allows."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from holdfast.cache.pages import bytes_per_block
from holdfast.core.config import DeviceConfig, ServeConfig
from holdfast.core.errors import ConfigError
from holdfast.core.plan import Place, Plan, places
from holdfast.core.spec import ModelInfo
from holdfast.hardware.host import available_memory, usable_cores
from holdfast.kernels.cpu.kernels import CpuKernels
from holdfast.kernels.interface import Capturing, Kernels
from holdfast.kernels.select import select_kernels
from holdfast.models.load import Held, load_decoder
from holdfast.parallel.collectives import Collectives
from holdfast.parallel.cuts import make_plan
from holdfast.parallel.distributed import DistributedCollectives, FileStore
from holdfast.parallel.segment import Moves, attach, layout_of
from holdfast.parallel.shared import SharedCollectives
from holdfast.parallel.weights import SharedWeights
from holdfast.worker.batch import Requests
from holdfast.worker.runner import Runner
from holdfast.worker.sampler import Sampler
from holdfast.worker.trial import longest_decode, trial_steps

PACE_VARIABLE = "HOLDFAST_STAGE_PACE"
"""Microseconds that a pipeline's stage takes beside its work, per step and per token, as in 2000,50. For measuring
the pipeline where there are fewer cores than stages."""
Progress = Callable[[str, float | None], None]
"""Told what is being done, and how much of it is (None: no share of anything)."""
CPU_CACHE_LIMIT = 4_000_000_000
CPU_CACHE_SHARE = 0.4
START_TIMEOUT = 600.0
"""Seconds that an exchange may take until a rank that shares no memory stands: others may be compiling kernels."""


@dataclass(frozen=True, slots=True)
class Post:
    """What one worker is there for. `memory`: the descriptor of what it shares with its engine and the other ranks
    of its replica; `weights`: of what it shares with the ranks at its place in other replicas. `meeting`: the path of
    a file through which ranks that do not share memory find each other."""

    plan: Plan
    replica: int
    place: Place
    memory: int | None = None
    weights: int | None = None
    meeting: str = ""
    again: bool = False
    """In the place of one that died: the other replicas have their memory already."""

    @classmethod
    def alone(cls, model: ModelInfo) -> Post:
        """All of the model on one device."""
        plan = make_plan(model.spec)
        return cls(plan, 0, places(plan.replicas[0])[0])

    @property
    def number(self) -> int:
        """Counting the ranks of all replicas of this machine."""
        before = self.plan.devices_here[: self.replica]
        return sum(len(devices) for devices in before) + self.place.shard.rank

    @property
    def device(self) -> int:
        """Number of its GPU on this machine."""
        return self.plan.device_of(self.replica, self.place.shard.rank)

    def shares_device(self, count: int) -> bool:
        """Whether, of `count` GPUs, one is that of several ranks of this replica."""
        ranks = [shard.rank for stage in self.place.replica.stages for shard in stage.ranks]
        return len({self.plan.device_of(self.replica, rank) % count for rank in ranks}) < len(ranks)

    def sharing(self, count: int) -> int:
        """How many ranks, of all replicas, have the GPU of this one, of `count`."""
        return sum(device % count == self.device % count for some in self.plan.devices_here for device in some)

    @property
    def num_ranks(self) -> int:
        """Of all replicas of this machine."""
        return sum(len(devices) for devices in self.plan.devices_here)


def start_runner(
    config: ServeConfig,
    model: ModelInfo,
    progress: Progress,
    post: Post | None = None,
    held: Held | None = None,
) -> Runner:
    """Load `model`, or the share of it that belongs to a post, on its device. `progress(text, fraction)` tells the
    user how far it is. `held`: what of it is in memory already.

    Raises `ConfigError` when the device or its memory is not there, `ModelError` when the checkpoint is bad.
    """
    post = post or Post.alone(model)
    device = pick_device(config.device, post)
    dtype = pick_dtype(config.model.dtype, model, device)
    shared = None if post.weights is None else SharedWeights(post.weights, post.replica, len(post.plan.replicas))
    kernels = _kernels(config, model, device, dtype, post, shared)
    layout = layout_of(post.place.replica, model.spec, config.scheduler)
    memory = None if post.memory is None else attach(post.memory, layout)
    moves = None if memory is None else Moves(memory, layout, post.place)
    if moves is not None and isinstance(kernels, CpuKernels):
        kernels.executor.moves = moves.address
    collectives = _join_replica(config, model, kernels, device, post, memory)
    decoder = load_decoder(
        model,
        kernels,
        dtype,
        device,
        progress=lambda fraction: progress("loading weights", fraction),
        max_positions=longest_request(config, model),
        place=post.place,
        collectives=collectives,
        in_order=shared is not None,
        held=held,
    )
    if shared is not None:
        shared.wait_for_others()
    runner = Runner(
        decoder,
        decoder.allocate_pages(1, config.cache.block_size),
        Sampler(kernels, model.eos_token_ids),
        device,
        config.scheduler.max_num_batched_tokens,
        runs_ahead=device.type == "cuda" and config.scheduler.runs_ahead(device.type),
        moved=(lambda: None) if moves is None else moves.count,
    )
    num_blocks = _give_pages(config, model, runner, post, progress)
    if isinstance(collectives, DistributedCollectives):
        collectives.set_timeout(config.device.collective_timeout)
    tokens = num_blocks * config.cache.block_size
    place = kernels.name if device.type == "cpu" else device.type
    progress(f"{place}, {str(dtype).removeprefix('torch.')}, KV cache of {tokens:,} tokens", None)
    return runner


def _kernels(  # noqa: PLR0917
    config: ServeConfig,
    model: ModelInfo,
    device: torch.device,
    dtype: torch.dtype,
    post: Post,
    shared: SharedWeights | None,
) -> Kernels[Any]:
    """The backend, with this rank's share of the cores. Raises `ConfigError`."""
    most, crowded = max(1, usable_cores() // post.num_ranks), len(os.sched_getaffinity(0)) < post.num_ranks
    if device.type == "cpu" and post.num_ranks > 1:
        os.sched_setaffinity(0, _share_of_cores(post.number, post.num_ranks))
    threads = _num_threads(config.device, most)
    pinned = config.device.pin_cpu_threads and not crowded  # ranks that share their cores would all take the first
    if device.type == "cpu":
        torch.set_num_threads(threads)
    bits = {"int8": 8, "int16": 16}[config.model.quantized_activations]
    kernels = select_kernels(
        device.type,
        dtype,
        threads,
        pinned=pinned,
        activation_bits=bits,
        exactness=config.device.exactness,
        attention=config.device.attention_backend,
        memory=shared,
    )
    if not isinstance(kernels, CpuKernels):
        _refuse_what_only_cpus_do(config, post, kernels)
    if model.spec.head_dim > kernels.max_head_dim:
        raise ConfigError(
            f"heads of {model.spec.head_dim} numbers: {kernels.name} kernels take {kernels.max_head_dim}"
        )
    return kernels


def _give_pages(config: ServeConfig, model: ModelInfo, runner: Runner, post: Post, progress: Progress) -> int:
    """All the KV blocks there is memory for, their number; and graphs, where steps of decodes have them."""
    decoder = runner.decoder
    num_blocks = _num_blocks(config, model, runner, post, progress)
    together = _graph_collectives(decoder.collectives)
    if together is not None:  # graphs are made for as long a context everywhere
        num_blocks = together.least(num_blocks)
    runner.use_pages(decoder.allocate_pages(num_blocks, config.cache.block_size))
    if isinstance(runner.forward, Capturing) and _captures(config, runner):
        requests, size = config.scheduler.max_num_seqs, config.cache.block_size
        length = min(longest_request(config, model), num_blocks * size)
        agree = None if together is None else together.all_say
        runner.forward.capture(requests, length, size, lambda done: progress("capturing graphs", done), agree)
    return num_blocks


def _join_replica(  # noqa: PLR0917
    config: ServeConfig,
    model: ModelInfo,
    kernels: Kernels[Any],
    device: torch.device,
    post: Post,
    memory: mmap.mmap | None,
) -> Collectives | None:
    """The way to the other ranks; None where there are none."""
    if post.place.is_alone:
        return None
    timeout = config.device.collective_timeout
    if not isinstance(kernels, CpuKernels):
        timeout = max(timeout, START_TIMEOUT)  # until it stands
        store = FileStore(post.meeting, post.place.replica.num_ranks)
        by_host = device.type == "cuda" and post.shares_device(torch.cuda.device_count())
        return DistributedCollectives(kernels, model.spec, post.place, device, store, timeout, by_host=by_host)
    assert memory is not None, "ranks share memory"
    layout = layout_of(post.place.replica, model.spec, config.scheduler)
    return SharedCollectives(kernels, model.spec, post.place, layout, memory, timeout, _pace())


def _captures(config: ServeConfig, runner: Runner) -> bool:
    """Whether its steps of decodes are to be graphs."""
    collectives = runner.decoder.collectives
    possible = collectives is None or _graph_collectives(collectives) is not None
    return isinstance(runner.forward, Capturing) and possible and not config.device.enforce_eager


def _graph_collectives(collectives: Collectives | None) -> DistributedCollectives | None:
    """These, where what they exchange is captured with the steps."""
    if isinstance(collectives, DistributedCollectives) and collectives.can_be_captured:
        return collectives
    return None


def _refuse_what_only_cpus_do(config: ServeConfig, post: Post, kernels: Kernels[Any]) -> None:
    """Raises `ConfigError`."""
    if post.plan.shard_weights:
        raise ConfigError(f"--shard-weights: works with the cpu kernels only, not with {kernels.name}")
    if config.device.enable_eplb:
        raise ConfigError(
            f"--enable-eplb: works with the cpu kernels only so far, not with {kernels.name}; placements in a plan do"
        )


def _pace() -> tuple[int, int] | None:
    """`HOLDFAST_STAGE_PACE` in nanoseconds. Raises `ConfigError`."""
    text = os.environ.get(PACE_VARIABLE)
    if not text:
        return None
    try:
        step, token = (int(float(part) * 1000) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{PACE_VARIABLE}={text}: must be two numbers of microseconds, as in 2000,50") from None
    return step, token


def longest_request(config: ServeConfig, model: ModelInfo) -> int:
    """Tokens a request can have at most: `--max-model-len`, or what the model allows."""
    return min(config.model.max_model_len or model.spec.max_positions, model.spec.max_positions)


def _num_threads(config: DeviceConfig, most: int) -> int:
    """`--cpu-threads`, or `most`, as many as there are cores for us. Raises `ConfigError` for more than the
    machine has, or, when each gets a core of its own, than this process may use."""
    wanted, there, ours = config.cpu_threads, os.cpu_count() or 1, len(os.sched_getaffinity(0))
    if wanted is not None and wanted > there:
        raise ConfigError(f"--cpu-threads {wanted}: must be at most {there}, what this machine has")
    if config.pin_cpu_threads and (wanted or 0) > ours:
        raise ConfigError(f"--cpu-threads {wanted} with --pin-cpu-threads: must be at most {ours}")
    return wanted or most


def _share_of_cores(number: int, num_ranks: int) -> set[int]:
    """Of the cores this process may use; those that are too few are shared by all."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < num_ranks:
        return set(cores)
    return set(cores[len(cores) * number // num_ranks : len(cores) * (number + 1) // num_ranks])


def pick_device(config: DeviceConfig, post: Post) -> torch.device:
    """The torch device for `--device`; a GPU that is asked for must be there, and be no other rank's unless they are
    to share it. Raises `ConfigError`."""
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError("--device cuda: torch finds no CUDA device on this machine")
    if not available or config.device == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if (sharing := post.sharing(count)) > 1 and not config.allow_shared_gpu:
        raise ConfigError(
            f"{sharing} of {post.num_ranks} ranks have GPU {post.device % count} of {count}: "
            "only --allow-shared-gpu lets them share it"
        )
    device = torch.device("cuda", post.device % count)
    torch.cuda.set_device(device)
    return device


def pick_dtype(wanted: str, model: ModelInfo, device: torch.device) -> torch.dtype:
    """The torch dtype for `--dtype`. CPUs have no fast float16, so `auto` turns it into bfloat16 there."""
    name = model.dtype if wanted == "auto" else wanted
    if wanted == "auto" and name == "float16" and device.type == "cpu":
        name = "bfloat16"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _num_blocks(config: ServeConfig, model: ModelInfo, runner: Runner, post: Post, progress: Progress) -> int:
    spec, cache, device = model.spec, config.cache, runner.device
    (first, last), (first_head, last_head) = post.place.layers, post.place.shard.kv_heads
    per_block = bytes_per_block(
        last - first, last_head - first_head, spec.head_dim, cache.block_size, runner.decoder.dtype
    )
    longest = longest_request(config, model)
    enough = config.scheduler.max_num_seqs * -(-longest // cache.block_size)
    on_gpu = device.type == "cuda"
    free = _free_cuda_memory(config, model, runner, post, progress) if on_gpu else available_memory()
    if device.type == "cpu" and not post.place.is_alone:  # what is exchanged lies in memory as well
        free = max(free - layout_of(post.place.replica, spec, config.scheduler).num_bytes, 0)
    if cache.kv_cache_memory_bytes is not None:
        budget, sharing = cache.kv_cache_memory_bytes, 1
        if device.type == "cpu":
            sharing = post.place.replica.num_ranks if post.again else post.num_ranks
        if budget * sharing > free:
            each = f" for {sharing} ranks" if sharing > 1 else ""
            raise ConfigError(f"--kv-cache-memory-bytes {budget}: only {free} bytes are free on {device.type}{each}")
    elif device.type == "cuda":
        budget = free
    else:
        budget = min(CPU_CACHE_LIMIT, int(CPU_CACHE_SHARE * free)) // post.num_ranks
    if budget < per_block:
        raise ConfigError(f"the KV cache gets {max(budget, 0)} bytes on {device.type}, a block needs {per_block}")
    return min(enough, budget // per_block)


def _free_cuda_memory(config: ServeConfig, model: ModelInfo, runner: Runner, post: Post, progress: Progress) -> int:
    """Bytes left for the KV cache: `--gpu-memory-utilization` of the card, less what others hold, less the weights
    and the peak workspace of a step, measured by running some; no more than is free beside that workspace. Graphs
    hold a workspace of their own, of the largest decode."""
    device, peaks = runner.device, []
    decode = longest_decode(config, longest_request(config, model))
    steps = [decode, *trial_steps(config, longest_request(config, model))]
    for done, step in enumerate(steps, 1):
        torch.cuda.reset_peak_memory_stats(device)
        runner.run(step)
        peaks.append(torch.cuda.max_memory_allocated(device))
        progress("compiling kernels and measuring memory", done / len(steps))
    runner.requests = Requests()
    held, peak = torch.cuda.memory_allocated(device), max(peaks)
    workspace, graphs = peak - held, max(peaks[0] - held, 0) if _captures(config, runner) else 0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    ours, sharing = int(total * config.cache.gpu_memory_utilization), post.sharing(torch.cuda.device_count())
    if sharing > 1:  # what the others hold is theirs, and still growing
        return min(ours // sharing - peak, free - workspace) - graphs
    others = total - free - torch.cuda.memory_reserved(device)
    return min(ours - others - peak, free - workspace) - graphs

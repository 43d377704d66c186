"""The configuration of `holdfast serve`: one frozen tree, every field with a default, a unit and a meaning.

The CLI flags are generated from this tree (`--max-model-len` from `max_model_len`, one help panel per section);
names are vLLM's where vLLM has the thing. `check()` refuses what cannot work, by flag name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import msgspec

from holdfast.core.errors import ConfigError
from holdfast.core.machines import MachinesConfig
from holdfast.core.options import MOST, option

LOGIT_ROWS = 64
"""Prompt positions whose logits are held at once for prompt logprobs: 64 · 150k vocabulary · 4 bytes = 38 MB."""

SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What a model or the user may recommend for requests that do not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Model"""

    served_model_name: str | None = option(None, "Name in the API. Default: the last part of MODEL, without .gguf.")
    tokenizer: str | None = option(None, "Folder with tokenizer.json, or a .gguf. Default: MODEL itself.")
    chat_template: str | None = option(None, "Jinja file (or the template itself) used instead of the model's own.")
    revision: str | None = option(None, "Branch, tag or commit, when MODEL is a hub id.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = option(
        "auto",
        "Type of weights, activations and KV cache. auto: as the checkpoint; for float16 on CPU, bfloat16.",
    )
    quantized_activations: Literal["int8", "int16"] = option(
        "int16",
        "What activations are rounded to, in groups of 32, where they meet int8 or int4 weights of a GGUF file on "
        "CPU. int16 is as good as unrounded; int8 is what llama.cpp does, faster where many tokens share a step.",
    )
    max_model_len: int | None = option(
        None,
        "Tokens one request may hold, prompt and output. Default: the model's limit, or what the cache holds.",
    )
    override_generation_config: str | None = option(
        None,
        "Sampling defaults for requests that name none, instead of the model's own, as JSON: "
        '\'{"temperature": 0.7, "top_p": 0.9}\'. Known: ' + ", ".join(SAMPLING_DEFAULTS) + ".",
    )
    max_logprobs: int = option(20, "Most alternatives a request may ask for per token.")
    seed: int | None = option(
        None, "Seed of the seeds given to requests that name none. Default: from the operating system."
    )

    def sampling_overrides(self) -> dict[str, float]:
        """`--override-generation-config`, parsed; the gateway knows the ranges. Raises `ConfigError`."""
        flag = f"--override-generation-config {self.override_generation_config}"
        try:
            given = msgspec.json.decode(self.override_generation_config or "{}", type=dict[str, float])
        except msgspec.DecodeError as error:
            raise ConfigError(f"{flag}: {error}") from error
        if not set(given) <= set(SAMPLING_DEFAULTS):
            raise ConfigError(f"{flag}: known are {', '.join(SAMPLING_DEFAULTS)}")
        return given


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig:
    """Device"""

    device: Literal["auto", "cpu", "cuda"] = option("auto", "Where the model runs. auto: cuda if there is one.")
    cpu_threads: int | None = option(None, "Threads of the worker on CPU. Default: the cores this process may use.")
    pin_cpu_threads: bool = option(
        False,
        "Keep each of these threads on a core of its own, of those that taskset allows. Of use where cores are "
        "plenty; where the gateway has to share them, the system places threads better.",
    )
    tensor_parallel_size: int | None = option(
        None,
        "Ranks that share each layer: a GPU each, or processes that each have their share of this machine's cores. "
        "Default, when no size and no plan is given: as the planner finds best for this machine's GPUs; else 1.",
    )
    pipeline_parallel_size: int | None = option(
        None, "Stages: groups of layers on ranks of their own. Default: as --tensor-parallel-size."
    )
    pipeline_layers: str | None = option(
        None, "Layers of each stage, as in 12,10,8. Default: as even as whole layers allow."
    )
    pipeline_batching: Literal["asynchronous", "synchronous", "hybrid"] = option(
        "asynchronous",
        "How requests share a pipeline. asynchronous: every microbatch is made anew when the first stage is free; "
        "hybrid: a request stays in one lane of as many as steps are in flight; synchronous: requests join and leave "
        "only when the pipeline is empty.",
    )
    expert_parallel_size: int | None = option(
        None,
        "Groups of a stage's ranks that share out the experts; within a group each expert is cut. Default: one "
        "group, or one per rank where experts are too small to be cut.",
    )
    enable_eplb: bool = option(
        False,
        "Measure how often each expert is chosen, and move experts between ranks, while serving, to spread it. On "
        "CPUs.",
    )
    num_redundant_experts: int = option(
        0, "With --enable-eplb: so many extra copies of experts, of each layer, for those that are chosen most."
    )
    eplb_step_interval: int = option(1000, "With --enable-eplb: steps between two looks at the load.")
    plan: str | None = option(
        None, "JSON file that says which rank holds what, instead of the sizes; docs/plans.md describes it."
    )
    collective_timeout: float = option(
        60.0,
        "Seconds that a rank waits for another in one exchange, and that a step may stand still at most, before the "
        "replica is given up.",
    )
    data_parallel_size: int | None = option(
        None,
        "Copies of the model, each on a GPU (or, on CPU, a share of the cores) of its own. A request goes to the one "
        "that knows how it begins, or to one that is less busy; when one dies the others go on. Default: as "
        "--tensor-parallel-size.",
    )
    shard_weights: bool = option(
        False,
        "Let the copies of the model hold its weights once between them, each an equal share of every matrix, "
        "instead of once each. On CPUs.",
    )
    allow_shared_gpu: bool = option(
        False,
        "Let ranks share GPUs, and their memory, when there are more of them than GPUs. Those of one copy of the "
        "model then exchange numbers by way of the host.",
    )

    exactness: Literal["plan", "batch", "off"] = option(
        "plan",
        "What changes no token, on a GPU. plan: neither company in a batch nor how the model is cut over devices; "
        "batch: company alone; off: either may, by the last bits, and products are cuBLAS's. On CPU always plan.",
    )
    attention_backend: Literal["triton", "flashinfer"] = option(
        "triton",
        "Who computes the attention of prompts on a GPU. flashinfer: that library, with --exactness off, for heads "
        "of 64, 128 or 256 in 16 bits without ALiBi; all else, and decodes, are our own kernels'.",
    )
    enforce_eager: bool = option(
        False, "Launch a GPU's kernels one by one instead of replaying steps of decodes as CUDA graphs."
    )

    def layers_of_stages(self) -> tuple[int, ...]:
        """`--pipeline-layers`, parsed. Raises `ConfigError`."""
        if self.pipeline_layers is None:
            return ()
        try:
            return tuple(int(part) for part in self.pipeline_layers.split(","))
        except ValueError:
            text = f"--pipeline-layers {self.pipeline_layers}: must be numbers with commas between, as in 12,10,8"
            raise ConfigError(text) from None

    @property
    def says_no_sizes(self) -> bool:
        """Neither a plan nor anything that one would say: how to cut the model is left open."""
        sizes = (self.tensor_parallel_size, self.pipeline_parallel_size, self.data_parallel_size)
        others = (self.plan, self.pipeline_layers, self.expert_parallel_size)
        return all(value is None for value in (*sizes, *others)) and not self.shard_weights

    def check_plan_alone(self) -> None:
        """A plan says all that the sizes say: together they contradict each other."""
        if self.plan is None:
            return
        default = DeviceConfig()
        for name in (
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "data_parallel_size",
            "expert_parallel_size",
            "pipeline_layers",
            "pipeline_batching",
            "shard_weights",
        ):
            if getattr(self, name) != getattr(default, name):
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"--plan {self.plan}: says what {flag} would say; give one of them")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """KV cache"""

    block_size: int = option(16, "Tokens per block.")
    kv_cache_dtype: Literal["auto"] = option(
        "auto", "Type of cached keys and values. Only auto (as --dtype) works yet."
    )
    kv_cache_memory_bytes: int | None = option(
        None,
        "Memory for the KV cache of each rank in bytes; 512M, 4G and the like are understood (SI). "
        "Default on CPU: what --max-num-seqs full requests need, at most 4G and 40 % of the free memory; "
        "on cuda: from --gpu-memory-utilization.",
        bytes=True,
    )
    gpu_memory_utilization: float = option(
        0.9, "Share of a GPU's memory for weights, workspace and KV cache together, in (0, 1]."
    )
    enable_prefix_caching: bool = option(True, "Keep finished blocks and reuse them for equal prefixes.")
    checkpoint_memory_bytes: int | None = option(
        None,
        "Memory of this machine for copies of finished blocks: requests go on from them after a loss, and prefixes "
        "that the KV cache had no room for come back from them; 0: none. Default: at most 4G and 20 % of the free "
        "memory, taken as it is filled; none without prefix caching.",
        bytes=True,
    )
    checkpoint_disk: str | None = option(
        None,
        "Folder on a disk for copies of these blocks: prefixes that had no room in memory come back from it, and it "
        "outlives the service. It belongs to one service, model and machine. Needs --checkpoint-disk-bytes.",
    )
    checkpoint_disk_bytes: int | None = option(
        None, "Most that --checkpoint-disk takes; the oldest blocks make way.", bytes=True
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Scheduler"""

    max_num_seqs: int = option(128, "Requests that run at once.")
    max_num_batched_tokens: int = option(512, "Tokens computed in one step; longer prompts are prefilled in chunks.")
    max_queued_seqs: int = option(
        1024,
        "Requests that may live (run or wait) beyond --max-num-seqs; further ones get 429 with Retry-After.",
    )
    priority_aging_steps: int = option(
        256, "Steps of waiting that make up for one level of priority, so that nothing starves."
    )
    async_scheduling: bool | None = option(
        None,
        "Prepare the next step while the device runs this one; a request that ends unforeseen has then been "
        "computed once too often. By default on GPUs only.",
    )

    def runs_ahead(self, device_type: str) -> bool:
        """Whether two steps may be in flight on a device of this type."""
        return device_type == "cuda" if self.async_scheduling is None else self.async_scheduling


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Server"""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "Port to listen on; 0: any free one.")
    api_key: tuple[str, ...] = option(
        (), "Key clients must send as a bearer token, on every path but /health; may be repeated."
    )
    max_body_bytes: int = option(
        16_000_000, "Largest request body; 16M and the like are understood (SI).", bytes=True
    )
    shutdown_timeout: float = option(30.0, "Seconds that live requests get to finish after SIGTERM or Ctrl-C.")
    startup_timeout: float = option(600.0, "Seconds that loading may take before the start is given up.")
    max_restarts: int = option(
        3,
        "Times in a row that a replica, or the gateway, is started again after one of its processes died; after "
        "that, a replica goes on without the rank that does not live. Its requests go on in other replicas, or "
        "wait. A minute of service begins the count anew.",
    )
    spare_workers: int = option(
        0,
        "Worker processes that are started beforehand and wait, without a device: one takes the place of a worker "
        "that died at once, where a new process would have to import for a second or more first.",
    )
    regrow_interval: float = option(
        300.0,
        "Seconds after which a replica that had to go on with fewer ranks is started with all of them again; twice "
        "as many whenever that fails; 0: never.",
    )
    leak_window: float = option(
        60.0,
        "Seconds through which a worker's memory must have grown, beyond what it is to have, before that is taken "
        "for a leak and its replica is started anew; 0: never.",
    )
    check_weights_interval: float = option(
        0.0,
        "Seconds between two looks at whether the weights in memory are still what was loaded, as holdfast check "
        "does it; 0: never.",
    )
    token_log_dir: str | None = option(
        None,
        "Folder for the log of accepted requests and their tokens. When all of the service was killed, the next one "
        "with this folder finishes them. Default: a private folder that goes with the service.",
    )
    token_log_sync: Literal["os", "disk"] = option(
        "os", "What a token in the log survives: os: the death of any process; disk: a loss of power, too (slower)."
    )
    resume_window: float = option(
        120.0,
        "Seconds that a request with stream_options.resumable, or one of an earlier gateway, is kept for its client "
        "to come back for.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = option("info", "Least level that is logged.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Everything `holdfast serve` can be told, beside MODEL itself."""

    model: ModelConfig = ModelConfig()
    device: DeviceConfig = DeviceConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    server: ServerConfig = ServerConfig()
    machines: MachinesConfig = field(default=MachinesConfig())

    def check(self) -> None:
        """Raise `ConfigError` for a value out of range, naming the flag, the value and the range."""
        for flag, value, least in (
            ("--max-model-len", self.model.max_model_len, 2),
            ("--max-logprobs", self.model.max_logprobs, 0),
            ("--cpu-threads", self.device.cpu_threads, 1),
            ("--data-parallel-size", self.device.data_parallel_size, 1),
            ("--tensor-parallel-size", self.device.tensor_parallel_size, 1),
            ("--pipeline-parallel-size", self.device.pipeline_parallel_size, 1),
            ("--expert-parallel-size", self.device.expert_parallel_size, 1),
            ("--num-redundant-experts", self.device.num_redundant_experts, 0),
            ("--eplb-step-interval", self.device.eplb_step_interval, 1),
            ("--block-size", self.cache.block_size, 1),
            ("--kv-cache-memory-bytes", self.cache.kv_cache_memory_bytes, 1),
            ("--checkpoint-memory-bytes", self.cache.checkpoint_memory_bytes, 0),
            ("--checkpoint-disk-bytes", self.cache.checkpoint_disk_bytes, 1),
            ("--max-num-seqs", self.scheduler.max_num_seqs, 1),
            ("--max-num-batched-tokens", self.scheduler.max_num_batched_tokens, 1),
            ("--max-queued-seqs", self.scheduler.max_queued_seqs, 0),
            ("--priority-aging-steps", self.scheduler.priority_aging_steps, 1),
            ("--port", self.server.port, 0),
            ("--max-body-bytes", self.server.max_body_bytes, 1),
            ("--shutdown-timeout", self.server.shutdown_timeout, 0),
            ("--startup-timeout", self.server.startup_timeout, 0),
            ("--max-restarts", self.server.max_restarts, 0),
            ("--resume-window", self.server.resume_window, 0),
            ("--spare-workers", self.server.spare_workers, 0),
            ("--regrow-interval", self.server.regrow_interval, 0),
            ("--check-weights-interval", self.server.check_weights_interval, 0),
            ("--leak-window", self.server.leak_window, 0),
        ):
            if value is not None and not least <= value <= MOST:
                raise ConfigError(f"{flag} {value}: must be at least {least} and at most {MOST:.0e}")
        self.model.sampling_overrides()
        if not all(key.isascii() and key.isprintable() and key.strip() == key != "" for key in self.server.api_key):
            raise ConfigError("--api-key: must be printable ASCII, not empty, without spaces around it")
        for flag, value, most in (
            ("--port", self.server.port, 65535),
            ("--data-parallel-size", self.device.data_parallel_size, 64),
            ("--tensor-parallel-size", self.device.tensor_parallel_size, 64),
            ("--pipeline-parallel-size", self.device.pipeline_parallel_size, 64),
            ("--block-size", self.cache.block_size, 4096),
            ("--spare-workers", self.server.spare_workers, 64),
            ("--max-num-batched-tokens", self.scheduler.max_num_batched_tokens, 1 << 20),
        ):
            if value is not None and value > most:
                raise ConfigError(f"{flag} {value}: must be at most {most}")
        if (self.cache.checkpoint_disk is None) != (self.cache.checkpoint_disk_bytes is None):
            given, other = "--checkpoint-disk", "--checkpoint-disk-bytes"
            if self.cache.checkpoint_disk is None:
                given, other = other, given
            raise ConfigError(f"{given}: needs {other}")
        if not 0.0 < self.cache.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"--gpu-memory-utilization {self.cache.gpu_memory_utilization}: must be above 0 and at most 1"
            )
        if self.scheduler.max_num_batched_tokens < self.scheduler.max_num_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens {self.scheduler.max_num_batched_tokens}: must be at least --max-num-seqs "
                f"({self.scheduler.max_num_seqs}), so that every running request can take one token per step"
            )
        if not 0.1 <= self.device.collective_timeout <= 1e6:
            raise ConfigError(
                f"--collective-timeout {self.device.collective_timeout}: must be at least 0.1 and at most 1e6"
            )
        self.device.layers_of_stages()
        self.device.check_plan_alone()
        self.machines.check(None if self.device.plan is not None else self.device.data_parallel_size or 1)
        for name in ("num_redundant_experts", "eplb_step_interval"):
            if getattr(self.device, name) != getattr(DeviceConfig(), name) and not self.device.enable_eplb:
                raise ConfigError(f"--{name.replace('_', '-')}: works with --enable-eplb")

"""Which plan is served, and whether this machine can hold it: found out before any process starts."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from holdfast.cache.disk import least_bytes
from holdfast.cache.store import StoreLayout
from holdfast.core import lifecycle
from holdfast.core.config import ServeConfig
from holdfast.core.errors import ConfigError
from holdfast.core.plan import Place, Plan, places, read_plan
from holdfast.core.spec import ModelInfo
from holdfast.hardware.cluster import Cluster
from holdfast.hardware.detect import this_machine
from holdfast.hardware.host import available_memory
from holdfast.models.parameters import expert_bytes, weight_bytes
from holdfast.parallel.cuts import check_plan, make_plan
from holdfast.parallel.placement import groups_of
from holdfast.planner import emit
from holdfast.planner.goal import Goal
from holdfast.planner.runnable import Runtime
from holdfast.planner.search import search
from holdfast.planner.shapes.shape import shape_of_spec

log = logging.getLogger(__name__)

STORE_LIMIT = 4_000_000_000
STORE_SHARE = 0.2
"""Of the free memory: the checkpoint store's, at most."""


def plan_of(config: ServeConfig, model: ModelInfo) -> Plan:
    """The plan of `--plan`, the one that the sizes ask for, or, where nothing is asked for, the planner's for the
    devices of this machine; every rank with its device. Raises `ConfigError`, which names what is wrong."""
    device = config.device
    if device.plan is not None:
        plan = read_plan(device.plan)
        check_plan(plan, model.spec, f"--plan {device.plan}")
    elif device.says_no_sizes:
        plan = planned(config, model, this_machine() if device.device != "cpu" else None)
    else:
        plan = make_plan(
            model.spec,
            tensor=device.tensor_parallel_size or 1,
            pipeline=device.pipeline_parallel_size or 1,
            data=device.data_parallel_size or 1,
            expert=device.expert_parallel_size,
            layers=device.layers_of_stages(),
            pipeline_batching=device.pipeline_batching,
            shard_weights=device.shard_weights,
        )
    return msgspec.structs.replace(plan, devices=plan.devices or plan.devices_in_order)


def shared_out(config: ServeConfig, plan: Plan) -> Plan:
    """The plan with devices for those replicas alone that are to be on this machine. Raises `ConfigError`."""
    local, count = config.machines.data_parallel_size_local, len(plan.replicas)
    if local is None or local == count:
        return plan
    if local > count:
        raise ConfigError(f"--data-parallel-size-local {local}: the plan has {count} replicas")
    if plan.shard_weights:
        raise ConfigError("--shard-weights: replicas on several machines cannot hold weights together")
    devices = tuple(some if number < local else () for number, some in enumerate(plan.devices))
    return msgspec.structs.replace(plan, devices=devices)


def planned(config: ServeConfig, model: ModelInfo, machine: Cluster | None) -> Plan:
    """The planner's choice for the GPUs of a machine: as many tokens per second as it can have, with `--max-num-seqs`
    requests at once of a quarter of `--max-model-len`. One rank where there are no two GPUs: a CPU's has all cores.

    Raises `ConfigError` when the model does not fit them.
    """
    gpus = [device for device in machine.devices if device.name != "cpu"] if machine else []
    if machine is None or len(gpus) < 2:
        return make_plan(model.spec, pipeline_batching=config.device.pipeline_batching)
    longest = min(config.model.max_model_len or model.spec.max_positions, model.spec.max_positions)
    quarter = max(longest // 4, 1)
    goal = Goal(
        input_len=max(quarter * 3 // 4, 1),
        output_len=max(quarter // 4, 1),
        concurrency=config.scheduler.max_num_seqs,
        context=longest,
    )
    found = search(shape_of_spec(model.spec), machine, goal, runtime=Runtime(model.spec))
    best = found.best_that_runs
    if best is None:
        how = "however it is cut" if found.best.served is None else f"as far as it runs ({found.refuses(found.best)})"
        raise ConfigError(
            f"the model does not fit the {len(gpus)} GPUs of this machine with {longest} tokens of context, {how}; "
            f"holdfast plan MODEL --context {longest} tells what it would take"
        )
    log.info(
        "the planner chose %s of %d plans: %.0f tokens/s expected; holdfast plan MODEL says why",
        best.candidate.name,
        len(found.ranking),
        best.throughput,
    )
    return emit.plan_of(model.spec, best)


def check_flags(config: ServeConfig, model: ModelInfo, plan: Plan) -> None:
    """That they suit the plan: weights can be checked, and there is something for `--enable-eplb` to do. Raises
    `ConfigError`."""
    if config.server.check_weights_interval and plan.shard_weights:
        raise ConfigError("--check-weights-interval: weights that replicas hold together cannot be checked yet")
    if config.device.attention_backend == "flashinfer" and config.device.device == "cpu":
        raise ConfigError("--attention-backend flashinfer: needs a GPU, and --device is cpu")
    redundant = config.device.num_redundant_experts
    if config.device.enable_eplb and plan.shard_weights:
        raise ConfigError("--enable-eplb: experts that replicas hold together (--shard-weights) cannot move yet")
    if not config.device.enable_eplb:
        return
    if model.spec.moe is None:
        raise ConfigError("--enable-eplb: the model has no experts")
    groups = max(len(groups_of(stage)) for replica in plan.replicas for stage in replica.stages)
    if groups == 1:
        raise ConfigError("--enable-eplb: no ranks share out experts that could move (--expert-parallel-size)")
    if redundant > (most := (groups - 1) * model.spec.moe.num_experts):
        raise ConfigError(
            f"--num-redundant-experts {redundant}: must be at most {most}, when each of {groups} groups has all"
        )


def with_checkpoint_memory(config: ServeConfig, model: ModelInfo) -> ServeConfig:
    """The configuration with the size of the checkpoint store filled in. Raises `ConfigError` for one that is of no
    use."""
    given, cached = config.cache.checkpoint_memory_bytes, config.cache.enable_prefix_caching
    if given and not cached:
        raise ConfigError("--checkpoint-memory-bytes: works with prefix caching only")
    size = min(STORE_LIMIT, int(STORE_SHARE * available_memory())) if given is None else given
    config = replace(config, cache=replace(config.cache, checkpoint_memory_bytes=size if cached else 0))
    layout = StoreLayout.of(config, model)
    if given and not layout.num_slots:
        needed = replace(layout, num_slots=1).num_bytes
        raise ConfigError(f"--checkpoint-memory-bytes {given}: a block needs {needed}")
    if not layout.num_slots:
        config = replace(config, cache=replace(config.cache, checkpoint_memory_bytes=0))
    if config.cache.checkpoint_disk is not None and not config.cache.checkpoint_memory_bytes:
        raise ConfigError("--checkpoint-disk: works with blocks in memory only (--checkpoint-memory-bytes)")
    _check_disk(config, least_bytes(layout))
    return config


def _check_disk(config: ServeConfig, least: int) -> None:
    """That `--checkpoint-disk` is a folder, or can be one, of a disk that is large enough. Raises `ConfigError`."""
    folder, size = config.cache.checkpoint_disk, config.cache.checkpoint_disk_bytes
    if folder is None or size is None:
        return
    if not folder:
        raise ConfigError("--checkpoint-disk: must name a folder")
    if size < least:
        raise ConfigError(f"--checkpoint-disk-bytes {size}: must be at least {least} for this model")
    there = next(parent for parent in (Path(folder).absolute(), *Path(folder).absolute().parents) if parent.exists())
    if size > (whole := shutil.disk_usage(there).total):
        raise ConfigError(f"--checkpoint-disk-bytes {size}: the disk of {folder} has {whole} in all")


def impact_of(plan: Plan, process: str, kind: lifecycle.LossKind, detected: float) -> lifecycle.Loss:
    """What goes with a process of a replica (`members.replica_processes`). `detected`: seconds since 1970."""
    role, _, where = process.partition(" ")
    if role != "worker":
        return lifecycle.Loss(process, kind, None, [], [], detected)
    replica, stage, index = map(int, where.split("."))
    stage_plan = plan.replicas[replica].stages[stage]
    ranks = [f"worker {replica}.{stage}.{other}" for other in range(len(stage_plan.ranks))]
    has_experts = bool(stage_plan.ranks[index].experts)
    group = next(group for group in groups_of(stage_plan) if index in group) if has_experts else range(0)
    return lifecycle.Loss(process, kind, stage, ranks, [ranks[other] for other in group], detected)


def seats(left: Sequence[Place], there: Sequence[Place]) -> list[int]:
    """Which of the places that are `there` ranks take that have left theirs, so that as many as can be find their
    layers again, and of these their own share of them. In the same order: stages stay beside those they were beside.
    """
    best: list[tuple[int, list[int]]] = [(0, [])] * (len(there) + 1)
    """Of the ranks so far, over the first so many places: how well they sit, and where."""
    for rank, old in enumerate(left):
        row: list[tuple[int, list[int]]] = [(-1, [])] * (len(there) + 1)
        for seat in range(rank, len(there)):
            well, before = best[seat]
            here = (well + _fit(old, there[seat]), [*before, seat])
            row[seat + 1] = max(row[seat], here, key=lambda each: each[0])
        best = row
    return best[-1][1]


def _fit(old: Place, new: Place) -> int:
    layers = max(0, min(old.layers[1], new.layers[1]) - max(old.layers[0], new.layers[0]))
    same = msgspec.structs.replace(old.shard, rank=0) == msgspec.structs.replace(new.shard, rank=0)
    return layers * (2 if same else 1)


def check_memory(config: ServeConfig, model: ModelInfo, plan: Plan) -> None:
    """That the weights of all ranks fit this machine, where they are to be on its CPUs: better said now than by the
    system, which kills. What stays quantized is bounded by the size of its files. Raises `ConfigError`."""
    if config.device.device == "cuda" or (config.device.device == "auto" and Path("/dev/nvidiactl").exists()):
        return
    name = model.dtype if config.model.dtype == "auto" else config.model.dtype
    replicas = [plan.replicas[number] for number in plan.here]
    everywhere = [place for replica in replicas for place in places(replica)]
    itemsize, copies = 4 if name == "float32" else 2, replicas[:1] if plan.shard_weights else replicas
    needed = sum(weight_bytes(model.spec, itemsize, place) for replica in copies for place in places(replica))
    extra = config.device.num_redundant_experts * expert_bytes(model.spec, itemsize) * len(copies)
    path = Path(model.path)
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    needed = extra + min(needed, len(copies) * sum(file.stat().st_size for file in files))
    if needed > (free := available_memory()):
        raise ConfigError(
            f"the weights of {len(everywhere)} ranks take {needed / 1e9:.3f} GB at least, "
            f"{free / 1e9:.3f} GB of memory are free"
        )

"""Bringing a device up: the step that measures its memory, and what the machine gives."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from test_shards import spec

from holdfast.cluster import plans
from holdfast.core.config import DeviceConfig, ModelConfig, SchedulerConfig, ServeConfig
from holdfast.core.errors import ConfigError
from holdfast.core.plan import places
from holdfast.core.spec import RopeSpec
from holdfast.hardware import host
from holdfast.kernels.reference import ReferenceKernels
from holdfast.kernels.select import select_kernels
from holdfast.models.inspect import inspect_model
from holdfast.models.rope import rope_table
from holdfast.parallel.cuts import make_plan
from holdfast.worker import start
from holdfast.worker.start import Post, longest_request, pick_device, start_runner
from holdfast.worker.trial import largest_step, trial_steps
from support.checkpoints import random_model, save
from support.local import LocalEngine
from support.tiny import tiny_model


@pytest.mark.parametrize(
    ("max_num_seqs", "max_num_batched_tokens", "max_positions"),
    [(1, 1, 1), (4, 4, 64), (4, 512, 64), (128, 512, 1024)],
)
def test_the_largest_step_fills_both_limits_it_can(max_num_seqs, max_num_batched_tokens, max_positions):
    scheduler = SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
    step = largest_step(ServeConfig(scheduler=scheduler), max_positions)
    assert len(step.new) == max_num_seqs
    assert min(step.num_tokens) >= 1
    assert max(step.num_tokens) <= max_positions
    assert sum(step.num_tokens) == min(max_num_batched_tokens, max_num_seqs * max_positions)


def test_the_largest_step_runs_on_a_model_shorter_than_it(tmp_path: Path):
    """Positions beyond the rope table would poison a GPU."""
    engine = LocalEngine(tiny_model(tmp_path), num_blocks=4, max_num_batched_tokens=2048)
    step = largest_step(ServeConfig(scheduler=SchedulerConfig(max_num_batched_tokens=2048)), 1024)
    assert len(engine.runner.run(step).sampled) == 128


def test_the_steps_tried_at_the_start_of_a_gpu(tmp_path: Path):
    """Numbers of rows whose kernels would be compiled while a request waits; memory that only a long context takes;
    positions that the model does not have."""
    engine = LocalEngine(tiny_model(tmp_path), num_blocks=4, max_num_batched_tokens=300)
    config = ServeConfig(scheduler=SchedulerConfig(max_num_seqs=20, max_num_batched_tokens=300))
    steps = list(trial_steps(config, 200))
    assert [len(request.token_ids) for request in steps[1].new] == [200] + [1] * 19
    for step in steps:
        assert sum(step.num_tokens) <= 300
        assert max(len(request.token_ids) for request in step.new) <= 200
        assert len(engine.runner.run(step).sampled) == len(step.new) <= 20
    for rows in (1, 16, 32, 64, 128, 256):  # up to so many share a compiled kernel
        assert any(rows / 2 < sum(step.num_tokens) <= rows and len(step.new) == 1 for step in steps), rows
    assert any(len(step.new) == 17 for step in steps), "logits of more than 16 rows"


def test_more_threads_than_the_machine_has_are_refused(tmp_path: Path):
    """The OpenMP runtime ends the process when it cannot make them."""
    config = ServeConfig(device=DeviceConfig(device="cpu", cpu_threads=100_000))
    with pytest.raises(ConfigError, match="--cpu-threads 100000: must be at most"):
        start_runner(config, inspect_model(tiny_model(tmp_path)), lambda text, fraction: None)


def test_heads_that_the_kernels_cannot_hold_are_refused(tmp_path: Path):
    """An assertion without words in the middle of the first step."""
    path = save(random_model(model_type="llama", head_dim=576), tmp_path)
    config = ServeConfig(device=DeviceConfig(device="cpu"), model=ModelConfig(dtype="bfloat16"))
    with pytest.raises(ConfigError, match=r"heads of 576 numbers: cpu-.* kernels take 512"):
        start_runner(config, inspect_model(path), lambda text, fraction: None)


@pytest.mark.parametrize(("wanted", "longest"), [(None, 1024), (50, 50), (5000, 1024)])
def test_no_more_positions_than_are_served(wanted: int | None, longest: int, tmp_path: Path):
    config = ServeConfig(model=ModelConfig(max_model_len=wanted))
    assert longest_request(config, inspect_model(tiny_model(tmp_path))) == longest


def test_the_rope_table_of_a_short_service_is_the_start_of_the_long_one(tmp_path: Path):
    """Else --max-model-len would change what a model says."""
    rope = RopeSpec(theta=500.0, rotary_dim=10)
    long = rope_table(rope, 70_000, torch.device("cpu"))
    for length in (1, 7, 64, 1000, 40_961):
        assert torch.equal(rope_table(rope, length, torch.device("cpu")), long[:length])


def test_container_limits_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host, "_CGROUP", tmp_path)
    unlimited = host.available_memory()
    cores = host.usable_cores()
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 200000\nactive_file 300000\ninactive_file 400000\n")
    assert host.usable_cores() == min(2, cores)
    assert host.available_memory() == 800_000, "page cache is not used up"
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert host.usable_cores() == cores
    assert host.available_memory() == pytest.approx(unlimited, rel=0.2)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Before any process starts; those of all ranks count."""
    info = inspect_model(tiny_model(tmp_path))
    monkeypatch.setattr(plans, "available_memory", lambda: 100_000)
    with pytest.raises(ConfigError, match=r"the weights of 3 ranks take 0\.\d+ GB at least, 0\.000 GB of memory are"):
        plans.check_memory(ServeConfig(), info, make_plan(info.spec, pipeline=3))


@pytest.mark.parametrize(
    ("cores", "ranks", "threads"), [(16, 8, 2), (8, 4, 2), (6, 3, 2), (2, 4, 1), (2, 2, 1), (5, 2, 2), (2, 1, 2)]
)
def test_ranks_share_the_cores(cores: int, ranks: int, threads: int, monkeypatch: pytest.MonkeyPatch):
    """No rank has another's, unless there are too few for all."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(start, "usable_cores", lambda: cores)
    most = max(1, start.usable_cores() // ranks)
    assert start._num_threads(ServeConfig().device, most) == threads
    shares = [start._share_of_cores(number, ranks) for number in range(ranks)]
    if cores >= ranks:
        assert sum(map(len, shares)) == len(set().union(*shares)) == cores


def test_ranks_of_a_replica_that_share_a_gpu_are_known():
    """NCCL refuses them; copies of the model that share one exchange nothing."""
    plan = make_plan(spec(), tensor=2, data=2)
    plan = msgspec.structs.replace(plan, devices=plan.devices_in_order)
    posts = [Post(plan, replica, place) for replica in (0, 1) for place in places(plan.replicas[replica])]
    assert [post.device for post in posts] == [0, 1, 2, 3]
    assert all(post.shares_device(1) for post in posts)
    assert not any(post.shares_device(2) or post.shares_device(4) for post in posts)


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        (((0, 1), (2, 3)), None),
        (((0, 0), (2, 3)), "2 of 4 ranks have GPU 0 of 4"),
        (((0, 1), (2, 4)), "2 of 4 ranks have GPU 0 of 4"),
        (((1, 0), (2, 1)), "2 of 4 ranks have GPU 1 of 4"),
        (((3, 0), (1, 2)), None),
    ],
)
def test_gpus_are_shared_by_those_who_ask_for_it(devices, said: str | None, monkeypatch: pytest.MonkeyPatch):
    """Ranks of one replica or of two; a machine with GPUs to spare has none to share in silence."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    plan = msgspec.structs.replace(make_plan(spec(), tensor=2, data=2), devices=devices)
    post = Post(plan, 0, places(plan.replicas[0])[0])
    allowed = DeviceConfig(device="cuda", allow_shared_gpu=True)
    assert pick_device(allowed, post) == torch.device("cuda", devices[0][0])
    assert post.sharing(4) == (1 if said is None else 2)
    if said is None:
        assert pick_device(DeviceConfig(device="cuda"), post) == torch.device("cuda", devices[0][0])
        return
    with pytest.raises(ConfigError, match=f"{said}: only --allow-shared-gpu"):
        pick_device(DeviceConfig(device="cuda"), post)


def test_flashinfer_is_not_dropped_on_a_gpu_that_our_kernels_do_not_run_on(monkeypatch: pytest.MonkeyPatch):
    library = SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=object)
    monkeypatch.setitem(sys.modules, "flashinfer", library)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert isinstance(select_kernels("cuda"), ReferenceKernels)
    with pytest.raises(ConfigError, match=r"--attention-backend flashinfer: needs .* capability is \(7, 5\)"):
        select_kernels("cuda", exactness="off", attention="flashinfer")

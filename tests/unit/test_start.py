"""Bringing a device up: the step that measures its memory, and what the machine gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.core.config import SchedulerConfig, ServeConfig
from holdfast.hardware import host
from holdfast.worker.start import largest_step
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
    engine = LocalEngine(tiny_model(tmp_path), num_blocks=4)
    step = largest_step(ServeConfig(scheduler=SchedulerConfig(max_num_batched_tokens=2048)), 1024)
    assert len(engine.runner.run(step).sampled) == 128


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

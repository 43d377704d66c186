"""Checksums of what a rank holds: every byte counts, whatever the backend, and experts may come and go."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from holdfast.core.errors import ConfigError
from holdfast.core.plan import places
from holdfast.kernels.reference import ReferenceKernels
from holdfast.kernels.select import select_kernels
from holdfast.models.inspect import inspect_model
from holdfast.models.load import load_weights
from holdfast.parallel.cuts import make_plan
from holdfast.worker import weights as module
from holdfast.worker.faults import flip
from holdfast.worker.weights import WeightCheck, held_in, slices
from support.checkpoints import random_model, save
from support.tiny import tiny_model


@contextmanager
def checking(weights: object) -> Iterator[tuple[SimpleNamespace, WeightCheck]]:
    runner = SimpleNamespace(decoder=SimpleNamespace(weights=weights))
    check = WeightCheck(runner, "0.0.0")
    try:
        yield runner, check
    finally:
        check.close()


def report(check: WeightCheck) -> tuple[int, list[str]]:
    check.ask("k")
    assert select.select([check.fd], [], [], 20)[0], "not in time"
    found = check.report()
    assert (found.key, found.rank) == ("k", "0.0.0")
    return found.num_bytes, found.wrong


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_byte_counts(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of matrices and norms, at the edges of slices too; what was changed stays wrong until it is put right."""
    monkeypatch.setattr(module, "SLICE_BYTES", 1000)
    info = inspect_model(tiny_model(tmp_path))
    kernels = select_kernels("cpu") if backend == "cpu" else ReferenceKernels(torch.float32)
    weights = load_weights(info, kernels, torch.float32, torch.device("cpu"), lambda _: None)
    with checking(weights) as (_, check):
        num_bytes, wrong = report(check)
        assert wrong == []
        names = held_in(weights)
        assert num_bytes == sum(len(data) for held in names.values() for data in slices(held))
        assert num_bytes > 4 * info.spec.vocab_size * info.spec.hidden_size, "more than the embeddings"
        for name, held in names.items():
            data = list(slices(held))[-1]
            data[-1] ^= 1
            assert report(check) == (num_bytes, [name])
            assert report(check)[1] == [name]
            data[-1] ^= 1
        assert report(check) == (num_bytes, [])


def test_experts_that_come_are_learnt(tmp_path: Path):
    model = random_model(model_type="mixtral", num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    info = inspect_model(save(model, tmp_path))
    place = places(make_plan(info.spec).replicas[0])[0]

    def loaded() -> object:
        return load_weights(
            info, ReferenceKernels(torch.float32), torch.float32, torch.device("cpu"), lambda _: None, place
        )

    with checking(loaded()) as (runner, check):
        assert report(check)[1] == []
        other = loaded()
        name = next(name for name in other.packed if ".experts." in name)
        next(slices(other.packed[name]))[0] ^= 1  # a stand-in for another rank's expert
        runner.decoder.weights = other
        check.learn()
        assert report(check)[1] == [], "it is another matrix, not the one that was there"
        next(slices(other.packed[name]))[0] ^= 1
        assert report(check)[1] == [name]


def test_it_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In the middle of a walk: the process waits for its thread."""
    monkeypatch.setattr(module, "IDLENESS", 1e6)
    info = inspect_model(tiny_model(tmp_path))
    weights = load_weights(info, ReferenceKernels(torch.float32), torch.float32, torch.device("cpu"), lambda _: None)
    with checking(weights) as (_, check):
        check.ask("k")
    assert not check._thread.is_alive()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(check.fd)


def test_a_byte_on_a_gpu_is_not_changed_in_a_copy_only(tmp_path: Path):
    info = inspect_model(tiny_model(tmp_path))
    weights = load_weights(info, select_kernels("cpu"), torch.float32, torch.device("cpu"), lambda _: None)
    with pytest.raises(ConfigError, match="HOLDFAST_FAULTS: flip works on CPUs only, not on cuda"):
        flip(replace(weights, device=torch.device("cuda")))

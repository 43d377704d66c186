"""A rank that changes its place keeps the matrices it has: the same as if it had read all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from holdfast.core.plan import Place, places
from holdfast.core.spec import ModelInfo
from holdfast.kernels.cpu.kernels import CpuKernels
from holdfast.models.inspect import inspect_model
from holdfast.models.layers import Pieces, Weights
from holdfast.models.load import Held, load_weights
from holdfast.parallel.cuts import make_plan
from support.builds import builds
from support.checkpoints import random_model, save

pytestmark = pytest.mark.skipif(not builds(), reason="Holdfast was installed without a C compiler")
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128},
    "tied": {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64, "tie_word_embeddings": True},
    "experts": {"model_type": "mixtral", "num_local_experts": 4, "sliding_window": None, "num_hidden_layers": 2},
}
MOVES = {
    "TP4 to TP3": ({"tensor": 4}, 2, {"tensor": 3}, 1),
    "TP2 to one": ({"tensor": 2}, 1, {}, 0),
    "PP2 to one": ({"pipeline": 2}, 1, {}, 0),
    "one to PP2": ({}, 0, {"pipeline": 2}, 1),
    "the same": ({"tensor": 2, "pipeline": 2}, 3, {"tensor": 2, "pipeline": 2}, 3),
}


@pytest.fixture(scope="module", params=MODELS)
def info(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelInfo:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    model = random_model(**MODELS[request.param], **heads)
    return inspect_model(save(model, tmp_path_factory.mktemp("model")))


def load(info: ModelInfo, place: Place, held: Held | None = None) -> Weights:
    kernels, progress = CpuKernels(torch.bfloat16, threads=1), lambda fraction: None
    return load_weights(info, kernels, torch.bfloat16, torch.device("cpu"), progress, place, held=held)


def contents(matrix: Any) -> list[np.ndarray]:
    """Every byte of it."""
    if isinstance(matrix, Pieces):
        biases = [] if matrix.bias is None else [matrix.bias.numpy()]
        return [part for piece in matrix.packed for part in contents(piece)] + biases
    return [part for part in (matrix.memory, matrix.bias, matrix.shards) if part is not None]


@pytest.mark.parametrize("move", MOVES)
def test_what_is_kept_and_what_is_read_make_the_same_weights(info: ModelInfo, move: str):
    before, left, after, taken = MOVES[move]
    old = places(make_plan(info.spec, **before).replicas[0])[left]
    new = places(make_plan(info.spec, **after).replicas[0])[taken]
    weights = load(info, old)
    held = Held.of(weights).at(info.spec, new)
    fresh, moved = load(info, new), load(info, new, held)
    assert moved.packed.keys() == fresh.packed.keys()
    assert moved.norms.keys() == fresh.norms.keys()
    for name, matrix in fresh.packed.items():
        for one, other in zip(contents(matrix), contents(moved.packed[name]), strict=True):
            assert np.array_equal(one, other), name
    for name, norm in fresh.norms.items():
        assert torch.equal(norm, moved.norms[name])
    kept = {name for name in moved.packed if moved.packed[name] is weights.packed.get(name)}
    assert kept == held.packed.keys() & moved.packed.keys(), "nothing is read that is here"
    if move == "the same":
        assert kept == weights.packed.keys()
        assert held.nbytes == Held.of(fresh).nbytes
    if "PP" in move:
        layers = range(max(old.layers[0], new.layers[0]), min(old.layers[1], new.layers[1]))
        assert {f"layers.{index}.attn.qkv" for index in layers} <= kept


def test_a_head_that_repeats_the_embeddings_counts_once(tmp_path: Path):
    model = random_model(model_type="llama", num_hidden_layers=1)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    info = inspect_model(save(model, tmp_path))
    weights = load(info, places(make_plan(info.spec).replicas[0])[0])
    assert weights.packed["head"] is weights.packed["embed"]
    held = Held.of(weights)
    apart = Held(held.packings, {**held.packed, "head": load(info, weights.place).packed["embed"]}, held.norms)
    assert apart.nbytes - held.nbytes == weights.packed["embed"].nbytes

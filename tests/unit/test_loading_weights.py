"""What reaches the kernels from a checkpoint: the right rows in the right form, one matrix at a time."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from holdfast.core.spec import ModelInfo
from holdfast.kernels.interface import Matrix, Quantized
from holdfast.kernels.reference import ReferenceKernels, StackedMatrix
from holdfast.models import checkpoint as checkpoint_module
from holdfast.models.checkpoint import Checkpoint
from holdfast.models.inspect import inspect_model, source_finder
from holdfast.models.parameters import Packing, packings
from support.checkpoints import random_model, save, stored_weights
from support.gguf_twin import write_twin
from support.loading import Recorder, load

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
QUANTIZED: dict[str, dict[str, Any]] = {
    "rows of heads permuted": {"model_type": "llama", **SIZES},
    "one expert of a stack": {"model_type": "mixtral", "num_local_experts": 3, "sliding_window": None, **SIZES},
    "q, k and v split": {
        "model_type": "falcon",
        "hidden_size": 64,
        "num_attention_heads": 8,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
    },
    "learned positions": {"model_type": "gpt2", "hidden_size": 64, "num_attention_heads": 2},
}


def numbers(matrix: Matrix) -> torch.Tensor:
    if isinstance(matrix, torch.Tensor):
        return matrix
    quantization = gguf.GGMLQuantizationType[matrix.format]
    return torch.from_numpy(gguf.quants.dequantize(matrix.blocks.numpy(), quantization))


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """What quantizing makes of a matrix, row by row."""
    quantization = gguf.GGMLQuantizationType[kind]
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), quantization), quantization))


def twins(config: dict[str, Any], folder: Path, kind: str, **exceptions: str) -> tuple[ModelInfo, ModelInfo]:
    """A random model in safetensors, and its GGUF with matrices of type `kind`."""
    model = random_model(**config)
    save(model, folder)
    path = write_twin(model.config, folder, folder / "twin.gguf", kind=kind, exceptions=exceptions)
    return inspect_model(str(folder)), inspect_model(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("config", QUANTIZED.values(), ids=QUANTIZED.keys())
def test_quantized_matrices_stay_so_row_for_row(
    config: dict[str, Any], kind: str, dtype: torch.dtype, tmp_path: Path
):
    """Against the checkpoint that the file was made of, whose rows come another way: the very same numbers, whatever
    dtype the rest is to have."""
    exact, twin = twins(config, tmp_path, kind)
    originals, kernels = stored_weights(exact), Recorder()
    weights = load(twin, kernels, dtype)
    for name, packing in packings(twin.spec).items():
        parts, biases, _ = kernels.calls[id(weights.packed[name])]
        for part, module in zip(parts, packing.modules, strict=True):
            assert isinstance(part, Quantized), f"{module} was blown up"
            assert part.format == kind
            assert part.blocks.is_contiguous()
            assert torch.equal(numbers(part), rounded(originals[f"{module}.weight"], kind)), module
        for bias, module in zip(biases, packing.modules, strict=False):
            assert torch.equal(bias, originals[f"{module}.bias"].to(dtype)), module


def test_matrices_of_several_types_are_packed_in_the_models_dtype(tmp_path: Path):
    """A mixture of formats cannot be stacked; what kernels know no quantized form of comes in numbers too."""
    exact, twin = twins(
        QUANTIZED["rows of heads permuted"], tmp_path, "Q8_0", attn_v="Q4_1", ffn_up="Q5_0", output="F16"
    )
    originals, kernels = stored_weights(exact), Recorder()
    weights = load(twin, kernels, torch.bfloat16)
    kinds = {"attn.v": "Q4_1", "mlp.up": "Q5_0", "head": "F16", "attn.o": "F16"}
    for name, packing in packings(twin.spec).items():
        parts, _, _ = kernels.calls[id(weights.packed[name])]
        mixed = name.endswith((".qkv", ".up", ".o")) or name == "head"
        for part, module in zip(parts, packing.modules, strict=True):
            [kind, *_] = [kind for end, kind in kinds.items() if module.endswith(end)] or ["Q8_0"]
            expected = rounded(originals[f"{module}.weight"], kind)
            assert isinstance(part, Quantized) != mixed, name
            assert torch.equal(numbers(part), expected.bfloat16() if mixed else expected), module


def test_no_shard_cuts_a_group_of_quantized_numbers(tmp_path: Path):
    """Heads of 16: two to a scale. The shards are the contract, so the matrix is blown up."""
    config = {"model_type": "bloom", "hidden_size": 64, "num_attention_heads": 4}
    _, twin = twins(config, tmp_path, "Q8_0")
    kernels = Recorder()
    kernels.sharded = True
    weights = load(twin, kernels)
    for name in ("qkv", "o"):
        [*parts], _, options = kernels.calls[id(weights.packed[f"layers.0.attn.{name}"])]
        assert [isinstance(part, Quantized) for part in parts] == [name == "qkv"] * len(parts)
        assert options["shards"] == (() if name == "qkv" else (16, 32, 48, 64))


@pytest.mark.parametrize("change", [{"transpose": True}, {"plus_one": True}], ids=str)
def test_what_changes_more_than_rows_is_dequantised(
    change: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """No family of GGUF files asks for it today; bytes taken for numbers would be noise."""
    exact, twin = twins(QUANTIZED["learned positions"], tmp_path, "Q8_0")
    name = "layers.0.attn.o.weight"
    weight = rounded(stored_weights(exact)[name], "Q8_0")

    def finder(info: ModelInfo, stored: Any) -> Any:
        find = source_finder(info, stored)
        return lambda parameter: replace(find(parameter), **change if parameter == name else {})

    monkeypatch.setattr(checkpoint_module, "source_finder", finder)
    changed = Checkpoint(twin)
    assert changed.format([name]) is None
    assert changed.format(["layers.1.attn.o.weight"]) == "Q8_0"
    expected = weight.T if "transpose" in change else weight + 1.0
    got = changed.dense(name, torch.float32)
    assert got.is_contiguous()
    assert torch.equal(got, expected)


def test_rows_are_dequantised_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """So that a large table is never there in float32 as a whole; pieces of any size give the same."""
    _, twin = twins(QUANTIZED["one expert of a stack"], tmp_path, "Q5_1")
    whole = stored_weights(twin)
    for count in (1, 1000):
        monkeypatch.setattr(checkpoint_module, "_NUMBERS_AT_ONCE", count)
        for name, tensor in stored_weights(twin).items():
            assert torch.equal(tensor, whole[name]), name


def test_parts_biases_and_options_arrive_in_order(tmp_path: Path):
    folder = save(
        random_model(model_type="llama", attention_bias=True, mlp_bias=True, num_key_value_heads=2), tmp_path
    )
    info, kernels = inspect_model(folder), Recorder()
    weights = load(info, kernels)
    stored = stored_weights(info)
    for name, packing in packings(info.spec).items():
        parts, biases, options = kernels.calls[id(weights.packed[name])]
        for got, kind in ((parts, "weight"), (biases, "bias")):
            expected = [stored[f"{m}.{kind}"] for m in packing.modules if f"{m}.{kind}" in stored]
            assert len(got) == len(expected)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), name
        assert Packing(packing.modules, **options) == packing
    assert weights.norms.keys() == {name for name in stored if "norm" in name}


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_head_that_repeats_the_embeddings_is_packed_once(kind: str, tmp_path: Path):
    model = random_model(model_type="llama", tie_word_embeddings=False, **SIZES)
    model.lm_head.weight.data = model.model.embed_tokens.weight.data.clone()
    save(model, tmp_path)
    info = inspect_model(write_twin(model.config, tmp_path, tmp_path / "twin.gguf", kind=kind))
    assert not info.spec.tie_embeddings
    kernels = Recorder()
    weights = load(info, kernels)
    assert weights.packed["head"] is weights.packed["embed"]
    assert len(kernels.calls) == len(packings(info.spec)) - 1


@pytest.mark.parametrize(("kind", "head_kind"), [("Q4_0", "Q8_0"), ("F32", "F16")])
def test_a_head_of_another_type_is_no_repetition(kind: str, head_kind: str, tmp_path: Path):
    """Equal before they were stored, not after."""
    model = random_model(model_type="llama", tie_word_embeddings=False, **SIZES)
    model.lm_head.weight.data = model.model.embed_tokens.weight.data.clone()
    save(model, tmp_path)
    exceptions = {"output.weight": head_kind}
    twin = write_twin(model.config, tmp_path, tmp_path / "twin.gguf", kind=kind, exceptions=exceptions)
    kernels = Recorder()
    weights = load(inspect_model(twin), kernels)
    [head], _, _ = kernels.calls[id(weights.packed["head"])]
    assert torch.equal(numbers(head), rounded(model.lm_head.weight.detach(), head_kind).float())


# --- one at a time ---------------------------------------------------------------------------------


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})


class Watcher(ReferenceKernels):
    """How many bytes of the tensors given to `pack` are in memory at once."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.given: list[weakref.ref[torch.Tensor]] = []
        self.peak = self.largest = self.total = 0

    def pack(self, parts: Sequence[Matrix], biases: Sequence[torch.Tensor] = (), **options: Any) -> StackedMatrix:
        tensors = [part if isinstance(part, torch.Tensor) else part.blocks for part in parts]
        with self.lock:
            self.given += [weakref.ref(tensor) for tensor in tensors]
            alive = sum(tensor.nbytes for ref in self.given if (tensor := ref()) is not None)
            size = sum(tensor.nbytes for tensor in tensors)
            self.peak = max(self.peak, alive)
            self.largest = max(self.largest, size)
            self.total += size
        return super().pack(parts, biases, **options)


@pytest.mark.usefixtures("two_threads")
def test_a_matrix_is_let_go_once_it_is_packed(tmp_path: Path):
    """Else a packing backend would need the memory of two copies. Two threads hold two packings at most."""
    folder = save(random_model(model_type="llama", num_hidden_layers=12, num_key_value_heads=2), tmp_path)
    kernels = Watcher()
    gc.disable()  # what only a collection frees is not let go
    try:
        load(inspect_model(folder), kernels, torch.bfloat16)
    finally:
        gc.enable()
    assert kernels.total > 10 * kernels.largest
    assert kernels.peak <= 2 * kernels.largest


def test_progress_rises_to_one(tmp_path: Path):
    seen: list[float] = []
    folder = save(random_model(model_type="mixtral", num_local_experts=3, num_key_value_heads=2), tmp_path)
    load(inspect_model(folder), ReferenceKernels(), progress=seen.append)
    assert seen == sorted(seen)
    assert 0 < seen[0] < 0.5
    assert seen[-1] == 1.0
    assert len(seen) > 3 * (2 + 1 + 3 * 2)


@pytest.mark.usefixtures("two_threads")
def test_of_two_errors_the_first_in_order_is_raised(tmp_path: Path):
    """Not the first in time: the same fault must be told in the same words."""
    late_one_failed = threading.Event()

    class Failing(ReferenceKernels):
        def pack(self, parts: Sequence[Matrix], biases: Sequence[torch.Tensor] = (), **options: Any) -> StackedMatrix:
            if len(parts) == 3:  # q, k and v, while the embeddings wait
                late_one_failed.set()
                raise MemoryError("layer 0")
            assert late_one_failed.wait(30)
            raise MemoryError("embeddings")

    folder = save(random_model(model_type="llama", num_key_value_heads=2), tmp_path)
    with pytest.raises(MemoryError, match="embeddings"):
        load(inspect_model(folder), Failing())

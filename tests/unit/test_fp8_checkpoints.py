"""Checkpoints with matrices of 8-bit numbers and scales for blocks of 128 x 128."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast.core.errors import ModelError
from holdfast.core.plan import places
from holdfast.kernels.dequantize import numbers_of
from holdfast.kernels.interface import Quantized
from holdfast.models.inspect import inspect_model
from holdfast.models.load import load_weights
from holdfast.models.parameters import packings
from holdfast.parallel.cuts import make_plan
from support.checkpoints import random_model, save, stored_weights
from support.cpu import generator
from support.loading import Recorder, load

FP8_NAME = "model.layers.0.self_attn.q_proj.weight"


def fp8_twin(folder: Path, exact: Path) -> str:
    """The checkpoint in `exact` with its MLP and attention matrices in fp8; the scales go into `exact`'s numbers."""
    folder.mkdir()
    numbers, stored = load_file(exact / "model.safetensors"), {}
    for name, tensor in numbers.items():
        stored[name] = tensor
        if not name.endswith("_proj.weight"):
            continue
        scales = torch.rand(*(-(-size // 128) for size in tensor.shape), generator=generator(len(name))) + 0.5
        spread = scales.repeat_interleave(128, 0)[: tensor.shape[0]].repeat_interleave(128, 1)[:, : tensor.shape[1]]
        stored[name] = (tensor / spread).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scales
        numbers[name] = stored[name].float() * spread
    save_file(numbers, exact / "model.safetensors")
    save_file(stored, folder / "model.safetensors")
    config = json.loads((exact / "config.json").read_text())
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return str(folder)


@pytest.mark.parametrize("sharded", [True, False])
def test_fp8_matrices_are_read_with_their_scales(sharded: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A scale of another block, of columns for rows, or none; matrices that are stacked, and no whole blocks. Those
    whose shards end within a block are widened, and the log says so, but only for kernels that have shards."""
    exact = tmp_path / "exact"
    exact.mkdir()
    sizes = {"hidden_size": 192, "intermediate_size": 320, "num_key_value_heads": 2}
    save(random_model(model_type="qwen3_moe", moe_intermediate_size=136, head_dim=48, **sizes), exact)
    twin = inspect_model(fp8_twin(tmp_path / "fp8", exact))
    kernels = Recorder()
    kernels.sharded = sharded
    weights = load(twin, kernels, torch.bfloat16)
    originals = stored_weights(inspect_model(str(exact)))
    for name, packing in packings(twin.spec).items():
        for part, module in zip(kernels.calls[id(weights.packed[name])][0], packing.modules, strict=True):
            is_quantized = name.endswith((".qkv", ".up")) or (not sharded and name.endswith((".o", ".down")))
            assert isinstance(part, Quantized) == is_quantized, name
            found = numbers_of(part, torch.float32)
            expected = originals[f"{module}.weight"]
            assert torch.equal(found, expected if isinstance(part, Quantized) else expected.bfloat16()), module
    assert ("quantized matrices are held in bfloat16" in caplog.text) == sharded


@pytest.mark.parametrize(("columns", "stays"), [(512, True), (320, False)])
def test_fp8_without_shards_is_widened_where_a_plan_cuts_a_block(columns: int, stays: bool, tmp_path: Path):
    exact = tmp_path / "exact"
    exact.mkdir()
    save(random_model(model_type="llama", intermediate_size=columns), exact)
    info = inspect_model(fp8_twin(tmp_path / "fp8", exact))
    for place in places(make_plan(info.spec, tensor=2).replicas[0]):
        kernels = Recorder()
        kernels.sharded = False
        weights = load_weights(info, kernels, torch.bfloat16, torch.device("cpu"), lambda _: None, place)
        pieces = weights.packed["layers.0.mlp.down"].packed
        assert [isinstance(kernels.calls[id(piece)][0][0], Quantized) for piece in pieces] == [stays] * len(pieces)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda stored: stored.pop(FP8_NAME + "_scale_inv"), r"its scales .* \(1, 1\) are not there"),
        (lambda stored: stored.update({FP8_NAME + "_scale_inv": torch.ones(2, 1)}), "are not there"),
        (lambda stored: stored.update({"model.norm.weight": torch.ones(48).to(torch.float8_e4m3fn)}), "for matrices"),
    ],
)
def test_fp8_without_fitting_scales_is_refused(change, said: str, tmp_path: Path):
    exact = tmp_path / "exact"
    exact.mkdir()
    save(random_model(model_type="llama"), exact)
    path = fp8_twin(tmp_path / "fp8", exact)
    stored = load_file(Path(path, "model.safetensors"))
    change(stored)
    save_file(stored, Path(path, "model.safetensors"))
    with pytest.raises(ModelError, match=said):
        inspect_model(path)


def test_a_head_with_scales_of_its_own_is_no_copy_of_the_embeddings(tmp_path: Path):
    """The same bytes, other numbers."""
    exact = tmp_path / "exact"
    exact.mkdir()
    save(random_model(model_type="llama"), exact)
    path = Path(fp8_twin(tmp_path / "fp8", exact), "model.safetensors")
    stored = load_file(path)
    codes = stored["lm_head.weight"].to(torch.float8_e4m3fn)
    for name, scale in (("lm_head.weight", 0.5), ("model.embed_tokens.weight", 2.0)):
        stored |= {name: codes.clone(), f"{name}_scale_inv": torch.full((1, 1), scale)}
    save_file(stored, path)
    weights = load(inspect_model(str(path.parent)), Recorder(), torch.bfloat16)
    assert torch.equal(weights.packed["head"].rows * 4, weights.packed["embed"].rows)


def test_other_kinds_of_fp8_are_refused(tmp_path: Path):
    exact = tmp_path / "exact"
    exact.mkdir()
    save(random_model(model_type="llama"), exact)
    path = Path(fp8_twin(tmp_path / "fp8", exact), "config.json")
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ModelError, match=r"only weight_block_size \[128, 128\] is supported"):
        inspect_model(str(path.parent))

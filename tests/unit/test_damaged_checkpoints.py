"""Checkpoints and configs as they should not be: each is a `ModelError` that names the place, never a traceback."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast.core.errors import ModelError
from holdfast.kernels.select import select_kernels
from holdfast.models.hub import resolve_model
from holdfast.models.inspect import inspect_model
from holdfast.models.load import load_decoder
from support.checkpoints import oracle_logits, random_model, run_chunks, save


def llama(folder: Path, **config: Any) -> str:
    return save(random_model(model_type="llama", num_key_value_heads=2, **config), folder)


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_eos_ids_outside_the_vocabulary_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """One of them and `min_tokens` failed every request in the step."""
    llama(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 99999, -1]}')
    assert inspect_model(str(tmp_path)).eos_token_ids == (2,)
    assert "eos token ids [99999, -1] are left out" in caplog.text


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_stored_head_wins_over_the_claim_that_it_is_tied(model_type: str, tmp_path: Path):
    model = random_model(model_type=model_type, tie_word_embeddings=False)
    save(model, tmp_path)
    change(tmp_path, tie_word_embeddings=True)
    decoder = load_decoder(inspect_model(str(tmp_path)), select_kernels("cpu"), torch.float32, "cpu")
    tokens = list(range(20))
    torch.testing.assert_close(run_chunks(decoder, tokens, [20]), oracle_logits(model, tokens), atol=1e-4, rtol=0)


def test_a_stored_copy_of_the_embeddings_is_not_held_twice(tmp_path: Path):
    llama(tmp_path, tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    decoder = load_decoder(inspect_model(str(tmp_path)), select_kernels("cpu"), torch.float32, "cpu")
    assert decoder.head.weight is decoder.embed.table


def test_rope_tables_are_as_long_as_what_is_served(tmp_path: Path):
    """A model of a million positions served at a thousand must not pay for the million."""
    info = inspect_model(llama(tmp_path, max_position_embeddings=1_000_000))
    decoder = load_decoder(info, select_kernels("cpu"), torch.float32, "cpu", max_positions=50)
    table = decoder.blocks[0].attention.heads.rope
    assert table is not None
    assert table.shape[0] == 50


@pytest.mark.parametrize(
    "values",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"rope_parameters": [1]},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": float("nan")}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": "x"}},
        {"num_hidden_layers": 1_000_000_000},
        {"num_hidden_layers": 0},
        {"num_attention_heads": 100, "head_dim": None},
        {"hidden_size": "48"},
        {"max_position_embeddings": float("inf")},
        {"rms_norm_eps": float("nan")},
        {"vocab_size": 98},
    ],
    ids=str,
)
def test_odd_llama_configs(values: dict[str, Any], tmp_path: Path):
    llama(tmp_path)
    change(tmp_path, **values)
    with pytest.raises(ModelError):
        inspect_model(str(tmp_path))


@pytest.mark.parametrize(
    ("model_type", "base", "values"),
    [
        ("gpt2", {}, {"n_head": 1000}),
        ("gpt2", {}, {"n_layer": 1_000_000_000}),
        ("bloom", {}, {"n_head": 1000}),
        ("opt", {"ffn_dim": 56, "word_embed_proj_dim": 48}, {"num_attention_heads": 1000}),
        ("falcon", {"hidden_size": 64, "num_attention_heads": 8}, {"num_attention_heads": 1000}),
        ("gemma3_text", {"head_dim": 8, "num_key_value_heads": 2}, {"query_pre_attn_scalar": 0}),
        ("gemma3_text", {"head_dim": 8, "num_key_value_heads": 2}, {"layer_types": 3}),
        ("gemma3_text", {"head_dim": 8, "num_key_value_heads": 2}, {"rope_parameters": 3}),
        ("qwen2", {"num_key_value_heads": 2}, {"use_sliding_window": True, "sliding_window": 4, "layer_types": 3}),
        ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 3}, {"num_local_experts": 100_000_000}),
        (
            "qwen3_moe",
            {
                "num_key_value_heads": 2,
                "head_dim": 8,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 24,
            },
            {"mlp_only_layers": 3},
        ),
    ],
    ids=str,
)
def test_odd_configs_of_other_families(model_type: str, base: dict[str, Any], values: dict[str, Any], tmp_path: Path):
    save(random_model(model_type=model_type, **base), tmp_path)
    inspect_model(str(tmp_path))
    change(tmp_path, **values)
    with pytest.raises(ModelError):
        inspect_model(str(tmp_path))


def rewrite_header(file: Path, header: bytes, length: int | None = None) -> None:
    data = file.read_bytes()
    (old,) = struct.unpack("<Q", data[:8])
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data[8 + old :])


def header_of(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])


@pytest.mark.parametrize(
    "fault", ["huge header", "nested", "infinite shape", "negative offset", "trailing bytes", "gap"]
)
def test_damaged_safetensors(fault: str, tmp_path: Path):
    llama(tmp_path)
    file = tmp_path / "model.safetensors"
    header = header_of(file)
    name = "model.norm.weight"
    if fault == "huge header":
        rewrite_header(file, b"{}", length=40_000_000_000)
        with file.open("ab") as grown:
            grown.truncate(50_000_000_000)  # sparse: takes no disk
    elif fault == "nested":
        rewrite_header(file, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    elif fault == "infinite shape":
        text = json.dumps(header | {name: header[name] | {"shape": [float("inf")]}})
        rewrite_header(file, text.encode())
    elif fault == "negative offset":
        start, end = header[name]["data_offsets"]
        rewrite_header(file, json.dumps(header | {name: header[name] | {"data_offsets": [start - end, 0]}}).encode())
    elif fault == "trailing bytes":
        file.write_bytes(file.read_bytes() + b"\0" * 64)
    else:
        end = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
        size = header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
        rewrite_header(
            file, json.dumps(header | {name: header[name] | {"data_offsets": [end + 8, end + 8 + size]}}).encode()
        )
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        inspect_model(str(tmp_path))


@pytest.mark.parametrize("shard", ["", ".", "x" * 300, "../outside.safetensors", 3, None], ids=str)
def test_bad_shard_names(shard: Any, tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    llama(folder)
    names = [name for name in header_of(folder / "model.safetensors") if name != "__metadata__"]
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    with pytest.raises(ModelError):
        inspect_model(str(folder))


def test_shards_may_lie_in_a_folder_of_their_own(tmp_path: Path):
    llama(tmp_path)
    names = [name for name in header_of(tmp_path / "model.safetensors") if name != "__metadata__"]
    (tmp_path / "weights").mkdir()
    (tmp_path / "model.safetensors").rename(tmp_path / "weights" / "one.safetensors")
    index = {"weight_map": dict.fromkeys(names, "weights/one.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    info = inspect_model(str(tmp_path))
    load_decoder(info, select_kernels("cpu"), torch.float32, "cpu")


def test_a_folder_where_the_weights_should_be(tmp_path: Path):
    llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ModelError):
        inspect_model(str(tmp_path))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": ' * 50_000, "\udcff", "[]", ""], ids=["[", "{", "bytes", "list", "empty"]
)
def test_a_config_that_is_no_object(text: str, tmp_path: Path):
    llama(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=r"config\.json"):
        inspect_model(str(tmp_path))


@pytest.mark.parametrize("name", ["", "x" * 300, "x" * 300 + "/" + "y" * 300])
def test_names_that_are_no_model(name: str):
    with pytest.raises(ModelError):
        resolve_model(name, None)

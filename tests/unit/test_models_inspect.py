"""A checkpoint is refused before serving, by name, for whatever is wrong with it; a good one is read right."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast.core.errors import ModelError
from holdfast.models.config import hf_config
from holdfast.models.families import FAMILIES
from holdfast.models.inspect import inspect_model
from support.checkpoints import random_model, save

SHARED_CONFIGS = Path(__file__).parents[2].parent / "shared" / "data" / "configs"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A saved checkpoint of a family, made once; tests copy it."""
    made: dict[str, Path] = {}
    extra = {
        "llama": {"num_key_value_heads": 2},
        "mistral": {"num_key_value_heads": 2},
        "opt": {"ffn_dim": 56, "word_embed_proj_dim": 48},
        "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8},
    }

    def folder(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp(model_type)
            save(random_model(model_type=model_type, **extra.get(model_type, {})), made[model_type])
        return made[model_type]

    return folder


@pytest.fixture
def copy(saved: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    def make(model_type: str) -> Path:
        for file in saved(model_type).iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path

    return make


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# --- configs ---------------------------------------------------------------------------------------

BAD_CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": "mamba"}, "model_type 'mamba' is not supported"),
    ("llama", {"model_type": "absent"}, "model_type is missing"),
    ("llama", {"hidden_size": "absent"}, "hidden_size is missing"),
    ("llama", {"hidden_size": "48"}, "hidden_size '48' has the wrong type"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers 0: must be at least 1"),
    ("llama", {"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu' is not supported"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ("llama", {"text_config": {}}, "text_config: multimodal"),
    ("llama", {"num_key_value_heads": 4}, "6 query heads cannot share 4 KV heads"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope' is not supported"),
    ("llama", {"rope_parameters": "absent", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
    ("opt", {"word_embed_proj_dim": 24}, "word_embed_proj_dim 24 is not supported"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine False"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm True"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    ("gemma3_text", {"layer_types": ["chunked_attention"] * 3}, "layer_types .*chunked_attention"),
]


@pytest.mark.parametrize(("model_type", "values", "message"), BAD_CONFIGS, ids=[bad[2] for bad in BAD_CONFIGS])
def test_unsupported_config_is_refused_by_name(
    copy: Callable[[str], Path], model_type: str, values: dict[str, Any], message: str
):
    folder = copy(model_type)
    change_config(folder, **values)
    with pytest.raises(ModelError, match=message) as error:
        inspect_model(str(folder))
    assert "config.json" in str(error.value) or str(folder) in str(error.value)


def test_damaged_config_is_refused(copy: Callable[[str], Path]):
    folder = copy("llama")
    (folder / "config.json").write_text('{"model_type": "llama"')
    with pytest.raises(ModelError, match=r"config\.json: cannot be read as JSON"):
        inspect_model(str(folder))
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="is not a JSON object"):
        inspect_model(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        inspect_model(str(folder))


def test_no_such_path_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match="neither a folder"):
        inspect_model(str(tmp_path / "nothing"))


OLD_SPELLINGS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float32"},
    ),
    (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 2e5, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 3e3},
            },
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        {
            "rope_theta": 2e5,
            "rope_local_base_freq": 3e3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "layer_types": "absent",
            "sliding_window_pattern": 2,
        },
    ),
    (
        "bloom",
        {"hidden_size": 48, "n_layer": 3, "n_head": 6},
        {"hidden_size": "absent", "n_embed": 48, "n_layer": "absent", "num_hidden_layers": 3},
    ),
]


@pytest.mark.parametrize(("model_type", "new", "old"), OLD_SPELLINGS, ids=[case[0] for case in OLD_SPELLINGS])
def test_both_spellings_give_one_spec(
    copy: Callable[[str], Path], model_type: str, new: dict[str, Any], old: dict[str, Any]
):
    """transformers 4 and 5 write the same model differently."""
    folder = copy(model_type)
    change_config(folder, **new)
    modern = inspect_model(str(folder))
    change_config(folder, **{"rope_parameters": "absent", "dtype": "absent"} | old)
    assert inspect_model(str(folder)) == modern


def test_eos_dtype_and_sampling_defaults(copy: Callable[[str], Path]):
    folder = copy("llama")
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [7, 2], "temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True})
    )
    change_tensors(folder, lambda tensors: tensors.update({name: t.half() for name, t in tensors.items()}))
    info = inspect_model(str(folder))
    assert info.eos_token_ids == (7, 2)
    assert info.sampling_defaults == {"temperature": 0.6, "top_p": 0.95, "top_k": 20.0}
    assert info.dtype == "float16"
    (folder / "generation_config.json").unlink()
    change_config(folder, eos_token_id=5)
    assert inspect_model(str(folder)).eos_token_ids == (5,)
    change_config(folder, eos_token_id=None)
    assert inspect_model(str(folder)).eos_token_ids == ()


def test_yarn_extends_the_stated_length():
    """Qwen tells its users to add YaRN to the config and leave max_position_embeddings alone."""
    values = {
        "vocab_size": 10,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
        "max_position_embeddings": 32768,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    }
    assert FAMILIES["qwen2"].spec(hf_config("config.json", values)).max_positions == 131072


def test_mistral_that_does_not_mention_the_window_has_one(copy: Callable[[str], Path]):
    folder = copy("mistral")
    change_config(folder, sliding_window="absent")
    assert {layer.window for layer in inspect_model(str(folder)).spec.layers} == {4096}
    change_config(folder, sliding_window=None)
    assert {layer.window for layer in inspect_model(str(folder)).spec.layers} == {None}


def real_configs() -> list[Path]:
    return sorted(SHARED_CONFIGS.glob("*.json"))


@pytest.mark.skipif(not SHARED_CONFIGS.exists(), reason="the shared test data is absent")
def test_configs_of_real_models():
    """Each of 66 is understood or refused with a reason; those of our families, unquantized, are understood."""
    understood = {}
    for path in real_configs():
        try:
            config = hf_config(str(path), json.loads(path.read_text()))
            understood[path.stem] = config.choice("model_type", FAMILIES).spec(config)
        except ModelError as error:
            assert path.name in str(error)  # noqa: PT017 - most are refused, each must say which
    wanted = ("Meta-Llama-3.1-405B", "Qwen3-8B", "Qwen3-235B-A22B", "Mixtral-8x22B-v0.1", "BLOOM-176B", "OPT-175B")
    assert set(wanted) <= set(understood)
    # scales for blocks of 128 x 128; the Llama's are told of in a file of its own, and show in the tensors
    assert {"Llama-3.1-70B-Instruct-FP8", "Qwen3-32B-FP8", "Qwen3-235B-A22B-FP8"} <= set(understood)
    llama = understood["Meta-Llama-3.1-405B"]
    assert (llama.num_layers, llama.num_kv_heads, llama.ropes[0].scaling) == (126, 8, "llama3")
    qwen = understood["Qwen3-235B-A22B"]
    assert qwen.moe is not None
    assert (qwen.head_dim, qwen.moe.num_experts, qwen.moe.experts_per_token) == (128, 128, 8)


# --- tensors ---------------------------------------------------------------------------------------

Q = "model.layers.1.self_attn.q_proj.weight"


def test_missing_tensor_is_named(copy: Callable[[str], Path]):
    folder = copy("llama")
    change_tensors(folder, lambda tensors: tensors.pop(Q))
    with pytest.raises(ModelError, match=f"tensor {Q} is missing"):
        inspect_model(str(folder))


def test_extra_tensor_is_named(copy: Callable[[str], Path]):
    """A bias the config does not speak of would otherwise be left out of every answer in silence."""
    folder = copy("llama")
    bias = "model.layers.1.self_attn.q_proj.bias"
    change_tensors(folder, lambda tensors: tensors.update({bias: torch.zeros(48)}))
    with pytest.raises(ModelError, match=f"tensor {bias} has no place"):
        inspect_model(str(folder))


def test_wrong_shape_is_named_with_both_shapes(copy: Callable[[str], Path]):
    folder = copy("llama")
    change_tensors(folder, lambda tensors: tensors.update({Q: torch.zeros(47, 48)}))
    with pytest.raises(ModelError, match=rf"tensor {Q} has shape \(47, 48\), the config says \(48, 48\)"):
        inspect_model(str(folder))


def test_other_dtypes_are_refused(copy: Callable[[str], Path]):
    folder = copy("llama")
    change_tensors(folder, lambda tensors: tensors.update({Q: torch.zeros(48, 48, dtype=torch.int8)}))
    with pytest.raises(ModelError, match=f"tensor {Q} has dtype I8"):
        inspect_model(str(folder))


def test_leftovers_of_older_checkpoints_are_ignored(copy: Callable[[str], Path]):
    folder = copy("llama")
    leftovers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    change_tensors(folder, lambda tensors: tensors.update(leftovers))
    inspect_model(str(folder))


def test_causal_masks_are_ignored_and_a_stored_head_is_not(copy: Callable[[str], Path]):
    folder = copy("gpt2")
    leftovers = {
        "transformer.h.0.attn.bias": torch.zeros(1, 1, 64, 64),
        "transformer.h.0.attn.masked_bias": torch.zeros(()),
        "lm_head.weight": torch.zeros(97, 48),
    }
    assert inspect_model(str(folder)).spec.tie_embeddings
    change_tensors(folder, lambda tensors: tensors.update(leftovers))
    assert not inspect_model(str(folder)).spec.tie_embeddings
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(96, 48)}))
    with pytest.raises(ModelError, match=r"tensor lm_head\.weight has shape \(96, 48\)"):
        inspect_model(str(folder))


def test_truncated_file_is_refused_wherever_it_ends(copy: Callable[[str], Path]):
    folder = copy("llama")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    for length in (0, 5, 8, 8 + header // 2, 8 + header, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"model\.safetensors: truncated"):
            inspect_model(str(folder))


BAD_OFFSETS = b'{"a": {"shape": [1], "dtype": "F32", "data_offsets": [0]}}'


def test_damaged_header_is_refused(copy: Callable[[str], Path]):
    folder = copy("llama")
    path = folder / "model.safetensors"
    for header in (b"{" + b" " * 15, b"[1, 2, 3]       ", b'{"a": {"x": 1}} ', b"\xff" * 16, BAD_OFFSETS):
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))
        with pytest.raises(ModelError, match="damaged safetensors header"):
            inspect_model(str(folder))


def test_shards(saved: Callable[[str], Path], tmp_path: Path):
    """An index whose shard is gone, or that places a tensor where it is not."""
    save(random_model(model_type="llama", num_key_value_heads=2), tmp_path, max_shard_size="50KB")
    inspect_model(str(tmp_path))
    index = tmp_path / "model.safetensors.index.json"
    original = json.loads(index.read_text())
    shards = sorted(set(original["weight_map"].values()))
    moved = original["weight_map"] | {Q: next(s for s in shards if s != original["weight_map"][Q])}
    index.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(ModelError, match=f"places tensor {Q} in"):
        inspect_model(str(tmp_path))
    index.write_text(json.dumps(original))
    (tmp_path / shards[0]).unlink()
    with pytest.raises(ModelError, match=f"names {shards[0]}, which is not in"):
        inspect_model(str(tmp_path))
    index.write_text("{}")
    with pytest.raises(ModelError, match="weight_map is missing"):
        inspect_model(str(tmp_path))
    index.unlink()
    with pytest.raises(ModelError, match=r"has neither model\.safetensors nor"):
        inspect_model(str(tmp_path))


def test_inspecting_needs_neither_torch_nor_numpy(saved: Callable[[str], Path]):
    """The supervisor inspects before it starts anything; torch alone takes longer than the rest of the start."""
    code = (
        "import sys; from holdfast.models.inspect import inspect_model; "
        "from holdfast.models.hub import resolve_model; "
        "inspect_model(resolve_model(sys.argv[1])); print({'torch', 'numpy', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, saved("llama")], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "set()"

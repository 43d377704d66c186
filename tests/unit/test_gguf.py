"""GGUF files: what is read from a header, what is refused, and that weights come out as they went in."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from holdfast.core.errors import ModelError
from holdfast.kernels.select import select_kernels
from holdfast.models.config import gguf_config
from holdfast.models.families import FAMILIES
from holdfast.models.gguf_file import TENSOR_TYPES, read_gguf, read_gguf_metadata
from holdfast.models.inspect import inspect_model
from holdfast.models.load import load_decoder
from holdfast.models.parameters import parameters
from support.checkpoints import oracle_logits, random_model, run_chunks, save, stored_weights
from support.gguf_twin import write_twin

ROPE = {"rope_type": "default", "rope_theta": 300.0}
TWINS: dict[str, dict[str, Any]] = {
    "llama, grouped": {"model_type": "llama", "num_key_value_heads": 2, "rope_parameters": ROPE},
    "llama, biases, tied": {
        "model_type": "llama",
        "num_key_value_heads": 1,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "llama, llama3 rope": {
        "model_type": "llama",
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "head_dim": 12, "sliding_window": None},
    "mixtral": {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 5, "sliding_window": None},
    "qwen2, yarn rope": {
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
    },
    "gemma3, linear rope": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "query_pre_attn_scalar": 10,
        "sliding_window": 6,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "gpt2": {"model_type": "gpt2"},
    "bloom": {"model_type": "bloom"},
    "falcon 7b": {"model_type": "falcon", "multi_query": True},
    "falcon 40b": {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2},
}


@pytest.mark.parametrize("config", TWINS.values(), ids=TWINS.keys())
def test_twin_of_a_checkpoint_gives_equal_logits(config: dict[str, Any], tmp_path: Path):
    """A wrong name, a permutation left in, metadata misread: each changes the logits."""
    model = random_model(**config)
    save(model, tmp_path)
    info = inspect_model(write_twin(model.config, tmp_path, tmp_path / "twin.gguf"))
    assert info.dtype == "float32"
    assert info.eos_token_ids == (2,)
    decoder = load_decoder(info, select_kernels("cpu"), torch.float32, "cpu")
    tokens = [(7 * index) % 97 for index in range(40)]
    ours = run_chunks(decoder, tokens, [11, 1, 28])
    torch.testing.assert_close(ours, oracle_logits(model, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_every_type_that_can_be_written_loads(kind: str, tmp_path: Path):
    """Quantized weights come back near the originals, also where rows are un-permuted or one expert is taken."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = random_model(model_type="mixtral", num_local_experts=3, **sizes)
    folder = save(model, tmp_path)
    twin = write_twin(model.config, tmp_path, tmp_path / "twin.gguf", kind=kind)
    exact, stored = stored_weights(inspect_model(folder)), stored_weights(inspect_model(twin))
    assert stored.keys() == exact.keys()
    bits = {"F32": 30, "F16": 10, "BF16": 7, "Q8_0": 7}.get(kind, int(kind[1]) - 1 if kind[0] == "Q" else 0)
    for name, tensor in stored.items():
        torch.testing.assert_close(tensor, exact[name], atol=4 * 0.15 * 2.0**-bits, rtol=2.0**-bits)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_load_row_by_row(kind: str, tmp_path: Path):
    """`gguf` cannot write these, so the blocks are random bytes; the whole-tensor dequantisation is the reference."""
    quant = gguf.GGMLQuantizationType[kind]
    path, tensors = _k_quant_llama(tmp_path / "k.gguf", quant)
    weights = stored_weights(inspect_model(path))
    whole = torch.from_numpy(gguf.quants.dequantize(tensors["blk.0.attn_q.weight"], quant))
    permuted = whole.reshape(2, 64, 2, 256).transpose(1, 2).reshape(256, 256)  # back to half-split rows
    assert torch.equal(weights["layers.0.attn.q.weight"], permuted)
    down = torch.from_numpy(gguf.quants.dequantize(tensors["blk.0.ffn_down.weight"], quant))
    assert torch.equal(weights["layers.0.mlp.down.weight"], down)


def _k_quant_llama(path: Path, quant: gguf.GGMLQuantizationType) -> tuple[str, dict[str, np.ndarray]]:
    hidden, columns, vocab = 256, 512, 16
    shapes = {
        "token_embd.weight": (vocab, hidden),
        "blk.0.attn_q.weight": (hidden, hidden),
        "blk.0.attn_k.weight": (hidden, hidden),
        "blk.0.attn_v.weight": (hidden, hidden),
        "blk.0.attn_output.weight": (hidden, hidden),
        "blk.0.ffn_gate.weight": (columns, hidden),
        "blk.0.ffn_up.weight": (columns, hidden),
        "blk.0.ffn_down.weight": (hidden, columns),
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(columns)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    _, block_bytes = gguf.GGML_QUANT_SIZES[quant]
    scales = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[quant.name]  # where a block's float16 scales lie
    rng = np.random.default_rng(0)
    tensors = {}
    for name, (rows, row) in shapes.items():
        blocks = rng.integers(0, 256, (rows, row // 256, block_bytes), dtype=np.uint8)
        for at in scales:
            blocks[..., at : at + 2] = np.array([0.01], np.float16).view(np.uint8)
        tensors[name] = blocks.reshape(rows, -1)
        writer.add_tensor(name, tensors[name], raw_dtype=quant)
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        writer.add_tensor(name, np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path), tensors


def _small(path: Path, **extra: np.ndarray) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("text", "grün")
    writer.add_uint32("number", 7)
    writer.add_int64("negative", -(2**40))
    writer.add_float64("real", 0.1)
    writer.add_bool("flag", True)
    writer.add_array("words", ["a", "", "ß"])
    writer.add_array("numbers", [1, 2, 3])
    for name, data in {"t": np.ones((2, 3), np.float32), **extra}.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_of_every_kind(tmp_path: Path):
    metadata = read_gguf_metadata(str(_small(tmp_path / "small.gguf")))
    assert metadata == {
        "general.architecture": "llama",
        "text": "grün",
        "number": 7,
        "negative": -(2**40),
        "real": 0.1,
        "flag": True,
        "words": ["a", "", "ß"],
        "numbers": [1, 2, 3],
    }


def test_directory_gives_torch_shapes_and_where_the_bytes_are(tmp_path: Path):
    wanted = np.arange(10, dtype=np.float32).reshape(5, 2)
    header = read_gguf(str(_small(tmp_path / "small.gguf", second=wanted)))
    tensor = header.tensors["second"]
    assert tensor.shape == (5, 2)
    raw = Path(header.path).read_bytes()[tensor.offset : tensor.offset + tensor.num_bytes]
    assert np.array_equal(np.frombuffer(raw, np.float32).reshape(5, 2), wanted)


def test_type_table_agrees_with_the_package():
    for number, (name, block, num_bytes) in TENSOR_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name == name
        assert gguf.GGML_QUANT_SIZES[kind] == (block, num_bytes)


def test_other_files_are_refused(tmp_path: Path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ModelError, match="not a GGUF file"):
        read_gguf(str(path))
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="not a GGUF file"):
        read_gguf(str(path))
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(ModelError, match="version 1 "):
        read_gguf(str(path))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path):
    """No cut may end in anything but a ModelError: not in the middle of a string, a number or a tensor."""
    whole = _small(tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in range(24, len(whole) - 8):  # the writer pads the end
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"truncated"):
            read_gguf(str(cut))


def test_a_part_of_a_split_file_is_refused(tmp_path: Path):
    path = tmp_path / "m-00001-of-00002.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="split over 2 files"):
        inspect_model(str(path))


@pytest.mark.parametrize("count", ["two", 3.5], ids=str)
def test_a_count_of_parts_that_is_no_number(count: Any, tmp_path: Path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_key_value("split.count", count, gguf.GGUFValueType.get_type(count))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"split\.count"):
        read_gguf(str(path))


def test_a_tensor_that_is_not_aligned_is_refused_by_name(tmp_path: Path):
    """torch cannot see floats at an odd address: the worker would fall over it."""
    path = _small(tmp_path / "small.gguf", second=np.ones(100, np.float32))
    data = path.read_bytes()
    at = data.index(b"second" + struct.pack("<IQ", 1, 100)) + 6 + 4 + 8 + 4  # name, dims, type
    path.write_bytes(data[:at] + struct.pack("<Q", 33) + data[at + 8 :])
    with pytest.raises(ModelError, match="tensor second: offset 33 is no multiple of 32"):
        read_gguf(str(path))


@pytest.mark.parametrize("alignment", [0, 1, 4])
def test_an_alignment_that_aligns_nothing_is_refused(alignment: int, tmp_path: Path):
    path = _small(tmp_path / "small.gguf")
    data = path.read_bytes()
    pair = struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, alignment)
    (count,) = struct.unpack_from("<Q", data, 16)
    path.write_bytes(data[:16] + struct.pack("<Q", count + 1) + pair + data[24:])
    with pytest.raises(ModelError, match=rf"general\.alignment {alignment}: must be"):
        read_gguf(str(path))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)], ids=str)
def test_a_tensor_of_nothing_is_refused(shape: tuple[int, ...], tmp_path: Path):
    path = tmp_path / "m.gguf"
    entry = (
        struct.pack("<Q", 1) + b"t" + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + struct.pack("<IQ", 0, 0)
    )
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + entry + bytes(64))
    with pytest.raises(ModelError, match="tensor t has shape"):
        read_gguf(str(path))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention.scale", 0.5, r"llama\.attention\.scale 0\.5 is not supported"),
        ("rope.scale_linear", 4.0, r"llama\.rope\.scale_linear 4\.0 is not supported"),
        ("attention.head_count_kv", [], "num_key_value_heads"),
        ("rope.dimension_count", 64, "partial_rotary_factor 0.5 is not supported"),
    ],
)
def test_metadata_that_would_change_the_answers_is_refused(key: str, value: Any, message: str, tmp_path: Path):
    path, _ = _k_quant_llama(tmp_path / "k.gguf", gguf.GGMLQuantizationType.Q4_K)
    header = read_gguf(path)
    header.metadata[f"llama.{key}"] = value
    with pytest.raises(ModelError, match=message):
        FAMILIES["llama"].spec(gguf_config(header))


def test_unknown_tensor_type_is_refused_by_name(tmp_path: Path):
    path = _small(tmp_path / "small.gguf")
    data = path.read_bytes()
    entry = data.index(struct.pack("<Q", 1) + b"t" + struct.pack("<I", 2))
    at = entry + 8 + 1 + 4 + 16  # name, number of dims, dims
    path.write_bytes(data[:at] + struct.pack("<I", 16) + data[at + 4 :])  # IQ2_XXS
    with pytest.raises(ModelError, match="tensor t has the unsupported type 16"):
        read_gguf(str(path))


def test_unknown_architecture_is_refused(tmp_path: Path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"general\.architecture 'mamba' is not supported"):
        inspect_model(str(path))


def test_end_of_turn_counts_as_end(tmp_path: Path):
    """Chat models end a turn with another token than a text; both must stop a request."""
    path, _ = _k_quant_llama(tmp_path / "k.gguf", gguf.GGMLQuantizationType.Q4_K)
    data = Path(path).read_bytes()
    pairs = b"".join(
        struct.pack("<Q", len(key)) + key + struct.pack("<II", 4, value)
        for key, value in ((b"tokenizer.ggml.eos_token_id", 5), (b"tokenizer.ggml.eot_token_id", 9))
    )
    count = struct.unpack_from("<Q", data, 16)[0] + 2
    start = 24
    body = data[:16] + struct.pack("<Q", count) + pairs + data[start:]
    header = read_gguf(path)
    first = min(tensor.offset for tensor in header.tensors.values())
    padding = -len(pairs) % 32  # data begin at a multiple of 32 behind the header
    body = body[: first + len(pairs)] + bytes(padding) + body[first + len(pairs) :]
    Path(path).write_bytes(body)
    assert inspect_model(path).eos_token_ids == (5, 9)
    Path(path).write_bytes(body.replace(struct.pack("<II", 4, 9), struct.pack("<II", 4, 16)))
    assert inspect_model(path).eos_token_ids == (5,), "the vocabulary has 16 tokens"


def test_every_parameter_of_the_demo_model_is_found():
    """The real thing: SmolLM2 as published."""
    from support.service import demo_model  # noqa: PLC0415

    info = inspect_model(demo_model())
    assert info.spec.num_layers == 30
    assert info.spec.tie_embeddings
    assert len(parameters(info.spec)) == 1 + 30 * 9 + 1
    assert info.eos_token_ids == (2,)

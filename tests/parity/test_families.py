"""Every family against transformers: logits of tiny random checkpoints, in float32, at every position."""

from __future__ import annotations

import random
from itertools import cycle, repeat
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from holdfast.kernels.select import select_kernels
from holdfast.models.inspect import inspect_model
from holdfast.models.load import load_decoder
from support.checkpoints import oracle_logits, random_model, run_chunks, run_interleaved, save
from support.service import demo_model


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small only lose by sharing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5}
FALCON: dict[str, Any] = {"model_type": "falcon", "hidden_size": 64, "num_attention_heads": 8}

CASES: dict[str, dict[str, Any]] = {
    "llama, grouped queries, llama3 rope": {
        "model_type": "llama",
        "num_key_value_heads": 2,
        "rope_parameters": LLAMA3,
        "tie_word_embeddings": False,
    },
    "llama, multi-query, odd heads, biases, yarn rope, tied": {
        "model_type": "llama",
        "hidden_size": 40,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": YARN,
        "tie_word_embeddings": True,
    },
    "llama, linear rope": {"model_type": "llama", "num_key_value_heads": 3, "rope_parameters": LINEAR},
    "llama, yarn with a stated temperature, untruncated": {
        "model_type": "llama",
        "rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 0.5, "truncate": False},
    },
    "mistral, window, wide heads": {
        "model_type": "mistral",
        "num_key_value_heads": 2,
        "head_dim": 12,
        "sliding_window": 7,
    },
    "mistral, no window": {"model_type": "mistral", "num_key_value_heads": 3, "sliding_window": None},
    "qwen2, upper layers windowed": {
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen2, tied": {"model_type": "qwen2", "num_key_value_heads": 3, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
    "qwen3, biases": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 8, "attention_bias": True},
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "query_pre_attn_scalar": 24,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    },
    "gemma3, one KV head, soft-cap": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 9,
        "final_logit_softcapping": 3.0,
    },
    "gpt2": {"model_type": "gpt2", "n_inner": 72},
    "gpt2, untied": {"model_type": "gpt2", "tie_word_embeddings": False, "activation_function": "gelu"},
    "opt": {"model_type": "opt", "ffn_dim": 56, "word_embed_proj_dim": 48},
    "opt, norms after": {
        "model_type": "opt",
        "ffn_dim": 56,
        "word_embed_proj_dim": 48,
        "do_layer_norm_before": False,
    },
    "opt, no biases": {
        "model_type": "opt",
        "ffn_dim": 56,
        "word_embed_proj_dim": 48,
        "enable_bias": False,
        "activation_function": "gelu",
    },
    "bloom, heads not a power of two": {"model_type": "bloom"},
    "falcon 7b: multi-query": FALCON | {"multi_query": True},
    "falcon 40b: grouped, two norms": FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon 11b: grouped, one norm": FALCON
    | {"new_decoder_architecture": True, "num_kv_heads": 4, "num_ln_in_parallel_attn": 1},
    "falcon rw: alibi, in sequence, biases": FALCON
    | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    "falcon, parallel, not multi-query": FALCON | {"multi_query": False, "bias": True, "ffn_hidden_size": 80},
    "mixtral": {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 5, "num_experts_per_tok": 2},
    "mixtral, window": {
        "model_type": "mixtral",
        "num_key_value_heads": 3,
        "num_local_experts": 4,
        "num_experts_per_tok": 3,
        "sliding_window": 6,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
    },
    "qwen3_moe, some layers dense": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 5,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "norm_topk_prob": False,
    },
}


def needs_cuda() -> pytest.MarkDecorator:
    return pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda()])])
@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_logits_equal_transformers(config: dict[str, Any], device: str, tmp_path: Path):
    """Shows a mistake in any mapping, switch or mask, also one that only chunking, decoding or company brings out."""
    model = random_model(**config)
    info = inspect_model(save(model, tmp_path))
    decoder = load_decoder(info, select_kernels(device), torch.float32, device)
    dice = random.Random(1)
    requests = [[dice.randrange(97) for _ in range(length)] for length in (41, 3, 23, 17)]
    expected = [oracle_logits(model, tokens) for tokens in requests]
    assert expected[0].std() > 0.3, "logits too small for the tolerance to mean anything"

    tokens = requests[0]
    for name, chunks in (("at once", [64]), ("chunks", cycle((1, 7, 2, 16))), ("one by one", repeat(1))):
        worst = (run_chunks(decoder, tokens, chunks).cpu() - expected[0]).abs().max()
        assert worst < 1e-4, f"prefilled {name}: off by {worst}"
    for ours, theirs in zip(run_interleaved(decoder, requests), expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=1e-4, rtol=0)


def test_sharded_checkpoint(tmp_path: Path):
    """Tensors spread over several files by an index."""
    model = random_model(model_type="llama", num_key_value_heads=2)
    folder = save(model, tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    decoder = load_decoder(inspect_model(folder), select_kernels("cpu"), torch.float32, "cpu")
    tokens = list(range(20))
    torch.testing.assert_close(run_chunks(decoder, tokens, [20]), oracle_logits(model, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("model_type", ["gpt2", "bloom", "opt", "llama"])
def test_checkpoint_of_the_headless_model(model_type: str, tmp_path: Path):
    """Many published GPT-2, BLOOM and OPT files lack the prefix that the model with a head gives its tensors."""
    extra = {"ffn_dim": 56, "word_embed_proj_dim": 48} if model_type == "opt" else {}
    model = random_model(model_type=model_type, tie_word_embeddings=True, **extra)
    model.base_model.save_pretrained(tmp_path)
    decoder = load_decoder(inspect_model(str(tmp_path)), select_kernels("cpu"), torch.float32, "cpu")
    tokens = list(range(20))
    torch.testing.assert_close(run_chunks(decoder, tokens, [20]), oracle_logits(model, tokens), atol=1e-4, rtol=0)


def test_the_demo_model_equals_transformers():
    """SmolLM2's quantized weights, read and un-permuted here by another path, in transformers' Llama."""
    path = demo_model()
    info = inspect_model(path)
    decoder = load_decoder(info, select_kernels("cpu"), torch.float32, "cpu")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e5},
            tie_word_embeddings=True,
        )
    ).eval()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = stored[names.get_name(name, try_suffixes=(".weight",))]
            weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            if "q_proj" in name or "k_proj" in name:
                weight = weight.view(-1, 32, 2, 576).transpose(1, 2).reshape(parameter.shape)
            parameter.copy_(weight)
    prompt = [504, 3575, 282, 4649, 314]  # The capital of France is
    story = prompt + random.Random(0).sample(range(49152), 95)
    expected = oracle_logits(model, story)
    torch.testing.assert_close(run_chunks(decoder, story, [60, 1, 39]), expected, atol=5e-4, rtol=0)
    assert expected[4].argmax() == 7042  # Paris

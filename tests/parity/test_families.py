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
from support.cases import CASES
from support.checkpoints import oracle_logits, random_model, run_chunks, run_interleaved, save
from support.service import demo_model


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

"""stories260K, a real model of 260,032 parameters, from llama2.c's format into a Hugging Face folder."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, processors


def convert(model: Path, tokenizer: Path, folder: Path) -> None:
    """Write config.json, model.safetensors and tokenizer.json into `folder`."""
    data = model.read_bytes()
    hidden, mlp, layers, heads, kv_heads, vocab, positions = struct.unpack("7i", data[:28])
    head_dim, kv_size = hidden // heads, hidden // heads * kv_heads
    values, at = np.frombuffer(data, dtype=np.float32, offset=28), 0

    def take(*shape: int) -> np.ndarray:
        nonlocal at
        at += int(np.prod(shape))
        return values[at - int(np.prod(shape)) : at].reshape(shape)

    def halves(rows: np.ndarray) -> np.ndarray:
        """llama2.c rotates neighbouring dims, Hugging Face's layout the two halves of a head."""
        pairs = rows.reshape(-1, head_dim // 2, 2, hidden)
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)

    tensors = {"model.embed_tokens.weight": take(vocab, hidden)}
    stacked = {
        "input_layernorm": take(layers, hidden),
        "self_attn.q_proj": take(layers, hidden, hidden),
        "self_attn.k_proj": take(layers, kv_size, hidden),
        "self_attn.v_proj": take(layers, kv_size, hidden),
        "self_attn.o_proj": take(layers, hidden, hidden),
        "post_attention_layernorm": take(layers, hidden),
        "mlp.gate_proj": take(layers, mlp, hidden),
        "mlp.down_proj": take(layers, hidden, mlp),
        "mlp.up_proj": take(layers, mlp, hidden),
    }
    tensors["model.norm.weight"] = take(hidden)
    for name, stack in stacked.items():
        for layer, tensor in enumerate(stack):
            rotated = name.endswith(("q_proj", "k_proj"))
            tensors[f"model.layers.{layer}.{name}.weight"] = halves(tensor) if rotated else tensor
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    _tokenizer(tokenizer.read_bytes(), vocab).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


def _tokenizer(data: bytes, vocab: int) -> Tokenizer:
    """SentencePiece BPE: of two neighbours the pair with the best score merges first."""
    scores: dict[str, float] = {}
    at = 4
    for index in range(vocab):
        score, length = struct.unpack_from("fi", data, at)
        piece = data[at + 8 : at + 8 + length].decode().replace(" ", "▁")
        at += 8 + length
        piece = {0: "<unk>", 1: "<s>", 2: "</s>"}.get(index, piece)
        scores[piece] = score
    assert len(scores) == vocab
    merges = sorted(
        (
            (piece[:cut], piece[cut:])
            for piece in scores
            for cut in range(1, len(piece))
            if piece[:cut] in scores and piece[cut:] in scores
        ),
        key=lambda pair: -scores["".join(pair)],
    )
    ids = {piece: index for index, piece in enumerate(scores)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer

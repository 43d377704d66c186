"""The models that are measured, made on this machine: the same numbers in each layout that a peer reads.

- Llama-3.2-1B's shape with random weights in bf16, as a Hugging Face folder and as GGUF.
- SmolLM2-135M-Instruct, from the demo model's Q4_1 GGUF: a bf16 folder, a BF16 and a Q8_0 GGUF.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file

from .work import Model, all_models, demo_file


@dataclass(frozen=True)
class Shape:
    """A Llama decoder with tied embeddings, as both layouts' headers describe it."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    rope_base: float
    norm_eps: float
    max_positions: int
    bos: int
    eos: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face name → shape."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            shapes |= {
                f"model.layers.{layer}.{name}.weight": shape
                for name, shape in {
                    "input_layernorm": (self.hidden,),
                    "self_attn.q_proj": (q, self.hidden),
                    "self_attn.k_proj": (kv, self.hidden),
                    "self_attn.v_proj": (kv, self.hidden),
                    "self_attn.o_proj": (self.hidden, q),
                    "post_attention_layernorm": (self.hidden,),
                    "mlp.gate_proj": (self.mlp, self.hidden),
                    "mlp.up_proj": (self.mlp, self.hidden),
                    "mlp.down_proj": (self.hidden, self.mlp),
                }.items()
            }
        return shapes | {"model.norm.weight": (self.hidden,)}

    def config(self) -> dict[str, object]:
        """`config.json`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.mlp,
            "vocab_size": self.vocab,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_base,
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": self.bos,
            "eos_token_id": self.eos,
            "torch_dtype": "bfloat16",
        }


LLAMA_1B = Shape(2048, 16, 32, 8, 64, 8192, 128256, 5e5, 1e-5, 4096, 128000, 128001)
SMOLLM2 = Shape(576, 30, 9, 3, 64, 1536, 49152, 1e5, 1e-5, 8192, 1, 2)
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` → `blk.3.attn_q.weight`."""
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        layer, _, part = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{GGUF_NAMES[part]}.weight"
    return f"{GGUF_NAMES[stem]}.weight"


def swap_rope_halves(rows: torch.Tensor, num_heads: int, *, to_gguf: bool) -> torch.Tensor:
    """Reorder a head's rows between Hugging Face's halves (0…31 with 32…63) and GGUF's pairs (0 with 1, 2 with 3)."""
    half = rows.shape[0] // num_heads // 2
    order = (2, half) if to_gguf else (half, 2)
    return rows.reshape(num_heads, *order, -1).transpose(1, 2).reshape(rows.shape).contiguous()


def _rope_heads(name: str, shape: Shape) -> int | None:
    """The heads of a matrix that is rotated, else None."""
    return {"q_proj": shape.heads, "k_proj": shape.kv_heads}.get(name.split(".")[-2])


def random_tensors(shape: Shape) -> dict[str, torch.Tensor]:
    """bf16, normal with the deviation that keeps the residual stream's size; norms are 1. The same on every run."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, dims in shape.tensors().items():
        if len(dims) == 1:
            tensors[name] = torch.ones(dims, dtype=torch.bfloat16)
        else:
            deviation = 1 / math.sqrt(dims[1])
            tensors[name] = (torch.randn(dims, generator=generator) * deviation).bfloat16()
    return tensors


def demo_tensors() -> dict[str, torch.Tensor]:
    """The demo model dequantized to bf16, under Hugging Face's names and in its order of rows."""
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(demo_file()).tensors}
    tensors = {}
    for name, dims in SMOLLM2.tensors().items():
        tensor = stored[gguf_name(name)]
        values = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type))).reshape(dims)
        if heads := _rope_heads(name, SMOLLM2):
            values = swap_rope_halves(values, heads, to_gguf=False)
        tensors[name] = values.bfloat16()
    return tensors


def write_folder(folder: Path, shape: Shape, tensors: dict[str, torch.Tensor], tokenizer: dict[str, object]) -> None:
    """A Hugging Face folder; complete or not there at all."""
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
    (unfinished / "config.json").write_text(json.dumps(shape.config(), indent=1))
    (unfinished / "tokenizer.json").write_text(json.dumps(tokenizer))
    unfinished.rename(folder)


def any_tokenizer(vocab_size: int) -> dict[str, object]:
    """A byte-level BPE `tokenizer.json` that can spell anything; what is left of the vocabulary are made-up words."""
    letters = sorted(_byte_letters())
    words = letters + [f"Ġw{number}" for number in range(vocab_size - len(letters))]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {word: index for index, word in enumerate(words)}, "merges": []},
    }


def _byte_letters() -> Iterator[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = 0
    for byte in range(256):
        yield chr(byte) if byte in shown else chr(256 + hidden)
        hidden += byte not in shown


def write_gguf(
    path: Path, shape: Shape, tensors: dict[str, torch.Tensor], kind: Kind, like: Path | None = None
) -> None:
    """A GGUF of the "llama" architecture, matrices as `kind`, with the vocabulary of `like` or none (sizes only)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if kind == Kind.BF16 else gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_context_length(shape.max_positions)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.mlp)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.vocab)
    if like:
        for key, field in gguf.GGUFReader(like).fields.items():
            if key.startswith("tokenizer."):
                item = field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(key, field.contents(), field.types[0], item)
    else:
        writer.add_tokenizer_model("none")
    for name, tensor in tensors.items():
        heads = _rope_heads(name, shape)
        rows = swap_rope_halves(tensor, heads, to_gguf=True) if heads else tensor
        if rows.dim() == 1:
            writer.add_tensor(gguf_name(name), rows.float().numpy())
        elif kind == Kind.BF16:
            writer.add_tensor(gguf_name(name), rows.view(torch.uint8).numpy(), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(rows.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(path)


def _make_llama_1b(model: Model) -> None:
    assert model.folder
    tensors = random_tensors(LLAMA_1B)
    write_folder(model.folder, LLAMA_1B, tensors, any_tokenizer(LLAMA_1B.vocab))
    write_gguf(model.gguf, LLAMA_1B, tensors, Kind.BF16)


def _make_smollm2_bf16(model: Model) -> None:
    assert model.folder
    tensors = demo_tensors()
    write_folder(model.folder, SMOLLM2, tensors, any_tokenizer(SMOLLM2.vocab))
    write_gguf(model.gguf, SMOLLM2, tensors, Kind.BF16, like=demo_file())


def _make_smollm2_q8_0(model: Model) -> None:
    write_gguf(model.gguf, SMOLLM2, demo_tensors(), Kind.Q8_0, like=demo_file())


MAKERS: dict[str, Callable[[Model], None]] = {
    "llama-1b": _make_llama_1b,
    "smollm2-bf16": _make_smollm2_bf16,
    "smollm2-q8_0": _make_smollm2_q8_0,
}


def make(model: Model) -> None:
    """Make the checkpoint's files, unless they are there."""
    wanted = [path for path in (model.gguf, model.folder) if path]
    if all(path.exists() for path in wanted):
        return
    print(f"==> making {model.title} (once only)", file=sys.stderr)
    for path in wanted:  # a half-made pair is made again
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    MAKERS[model.name](model)


if __name__ == "__main__":
    for model in all_models().values():
        make(model)

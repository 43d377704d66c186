"""A model small enough that processes and sockets are what a test measures: random weights, bytes for tokens."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from support.checkpoints import random_model, save


def byte_tokenizer(folder: Path) -> int:
    """Writes tokenizer.json: 256 bytes, <s>, </s> and two more; returns how many tokens that is."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return len(vocabulary)


def tiny_model(folder: Path) -> str:
    """A Llama of 48 hidden dims, 3 layers and 260 tokens, with its tokenizer."""
    model = random_model(
        model_type="llama", vocab_size=byte_tokenizer(folder), num_key_value_heads=2, max_position_embeddings=1024
    )
    return save(model, folder)

"""A small real tokenizer for the gateway's tests: byte-level BPE with the 256 bytes and a few words."""

from __future__ import annotations

import random
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from holdfast.gateway.chat import ChatTemplate
from holdfast.gateway.openai import ServedModel
from holdfast.gateway.tokenizer import Tokenizer, byte_level_alphabet, load_tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(folder: Path) -> Tokenizer:
    """Ids 0 … 255 are the bytes, 256 and 257 `he` and `hel`; 258 <|im_start|> and 259 <|im_end|> are special."""
    alphabet = sorted(byte_level_alphabet().items(), key=lambda item: item[1])
    vocabulary = {char: byte for char, byte in alphabet} | {"he": 256, "hel": 257}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("h", "e"), ("he", "l")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(str(folder))


def served_model(tokenizer: Tokenizer, *, max_model_len: int = 64, **sampling_defaults: float) -> ServedModel:
    return ServedModel(
        name="tiny",
        tokenizer=tokenizer,
        chat_template=ChatTemplate(CHATML, {}),
        max_model_len=max_model_len,
        vocab_size=260,
        sampling_defaults=sampling_defaults,
        max_logprobs=5,
        max_sequences=8,
        seeds=random.Random(0),
        created=0,
    )

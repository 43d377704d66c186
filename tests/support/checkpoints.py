"""Tiny random checkpoints made with transformers, and a driver that feeds a decoder in any order."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from holdfast.core.spec import ModelInfo
from holdfast.kernels.interface import BatchLayout
from holdfast.models.checkpoint import Checkpoint
from holdfast.models.decoder import Decoder
from holdfast.models.parameters import parameters

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def random_model(seed: int = 0, **config: Any) -> PreTrainedModel:
    """A model of `SMALL` shape unless `config` says otherwise. Nothing in it is left at 0 or 1: transformers starts
    norms and biases there, which hides a forgotten one."""
    torch.manual_seed(seed)
    # the default attention: transformers' "eager" one adds Falcon's ALiBi twice
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMALL | config)).float().eval()
    for name, parameter in model.named_parameters():
        spread = 0.3 if parameter.dim() == 1 else 0.15
        start = 1.0 if "norm" in name or ".ln_" in name else 0.0
        with torch.no_grad():
            parameter.normal_(start if name.endswith("weight") and parameter.dim() == 1 else 0.0, spread)
    return model


def save(model: PreTrainedModel, folder: Path, **options: Any) -> str:
    model.save_pretrained(folder, **options)
    return str(folder)


def stored_weights(info: ModelInfo) -> dict[str, Tensor]:
    """Every parameter in float32, by our name, as the checkpoint has it."""
    checkpoint = Checkpoint(info)
    return {name: checkpoint.dense(name, torch.float32) for name in parameters(info.spec)}


@torch.inference_mode()
def oracle_logits(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """transformers' logits at every position: float32 [len(tokens), V]."""
    return model(torch.tensor([tokens])).logits[0].float()


class Driver:
    """Runs requests through a decoder in steps of any make-up, their blocks scattered over the cache."""

    def __init__(
        self, decoder: Decoder, requests: Sequence[Sequence[int]], block_size: int = 4, seed: int = 0
    ) -> None:
        widths = [-(-len(tokens) // block_size) for tokens in requests]
        blocks = list(range(1, sum(widths) + 1))
        random.Random(seed).shuffle(blocks)
        self.tables = [[blocks.pop() for _ in range(width)] for width in widths]
        self.decoder = decoder
        self.requests = requests
        self.block_size = block_size
        self.computed = [0] * len(requests)
        self.logits: list[list[Tensor]] = [[] for _ in requests]
        self.pages = decoder.allocate_pages(sum(widths) + 1, block_size)

    def step(self, parts: Sequence[tuple[int, int]]) -> None:
        """Compute the next `n` tokens of request `i`, for each (i, n)."""
        device = self.decoder.device
        token_ids, positions, slots = [], [], []
        for index, count in parts:
            for position in range(self.computed[index], self.computed[index] + count):
                token_ids.append(self.requests[index][position])
                positions.append(position)
                block = self.tables[index][position // self.block_size]
                slots.append(block * self.block_size + position % self.block_size)
            self.computed[index] += count
        widest = max(len(self.tables[index]) for index, _ in parts)
        tables = [self.tables[index] + [0] * (widest - len(self.tables[index])) for index, _ in parts]
        batch = BatchLayout(
            query_lens=tuple(count for _, count in parts),
            context_lens=tuple(self.computed[index] for index, _ in parts),
            positions=torch.tensor(positions, device=device),
            slots=torch.tensor(slots, device=device),
            block_tables=torch.tensor(tables, dtype=torch.int32, device=device),
        )
        hidden = self.decoder.forward(torch.tensor(token_ids, device=device), batch, self.pages)
        if not self.decoder.place.is_last:
            return
        for (index, _), rows in zip(parts, self.decoder.logits(hidden).split(batch.query_lens), strict=True):
            self.logits[index].append(rows)

    def result(self) -> list[Tensor]:
        """Logits of every request at every position, where the last stage is; all must have been computed."""
        assert self.computed == [len(tokens) for tokens in self.requests]
        return [torch.cat(parts) for parts in self.logits] if self.decoder.place.is_last else []


def run_chunks(decoder: Decoder, tokens: Sequence[int], chunks: Iterable[int], block_size: int = 4) -> Tensor:
    """Logits of one request, prefilled in chunks of these lengths; the last one may be cut short."""
    driver = Driver(decoder, [tokens], block_size)
    for chunk in chunks:
        driver.step([(0, min(chunk, len(tokens) - driver.computed[0]))])
        if driver.computed[0] == len(tokens):
            break
    return driver.result()[0]


def run_interleaved(
    decoder: Decoder,
    requests: Sequence[Sequence[int]],
    seed: int = 0,
    block_size: int = 4,
    chunks: Sequence[int] = (1, 1, 2, 5, 11),
) -> list[Tensor]:
    """Logits of several requests in mixed steps: each step takes some of them, in any order, and of each one of
    `chunks` tokens."""
    driver = Driver(decoder, requests, block_size, seed)
    dice = random.Random(seed)
    while left := [i for i, tokens in enumerate(requests) if driver.computed[i] < len(tokens)]:
        chosen = dice.sample(left, dice.randint(1, len(left)))
        driver.step([(i, min(dice.choice(chunks), len(requests[i]) - driver.computed[i])) for i in chosen])
    return driver.result()

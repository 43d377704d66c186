"""What a step costs beside its arithmetic: the engine's loop, messages, the workers' Python. Measured on a replica
like those that serve, of a model so small that it has next to nothing to compute."""

from __future__ import annotations

import json
import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from holdfast.cluster.driven import DrivenReplica
from holdfast.core.config import ModelConfig, ServeConfig
from holdfast.core.spec import ModelInfo
from holdfast.hardware.host import usable_cores
from holdfast.hardware.profile import Turn
from holdfast.models.config import hf_config
from holdfast.models.families.registry import FAMILIES
from holdfast.models.inspect import inspect_model
from holdfast.models.parameters import locate, parameters
from holdfast.parallel.cuts import make_plan

REQUESTS = (1, 4, 16, 64)
PROMPTS = (64, 512)
CONTEXT, STEPS, SKIPPED = 32, 40, 8
"""Tokens of a prompt, tokens that follow, and of these those in which requests are still being let in."""


def turns(tensor: int, pipeline: int, rounds: int) -> Iterator[Turn]:
    """Of a replica cut so, each the fastest of `rounds` rounds, and of decodes the median within a round."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder), tensor, pipeline)
        plan = make_plan(model.spec, tensor=tensor, pipeline=pipeline)
        ranks = plan.replicas[0].num_ranks
        how = {"ranks": ranks, "threads": max(1, usable_cores() // ranks), "stages": pipeline}
        with DrivenReplica(model, plan, ServeConfig(model=ModelConfig(max_model_len=1024))) as replica:
            for requests in REQUESTS:
                seconds = min(decode_seconds(replica, requests, CONTEXT) for _ in range(rounds + 1))
                yield Turn(**how, requests=requests, tokens=1, seconds=seconds)
            for tokens in PROMPTS:
                seconds = min(prompt_seconds(replica, tokens) for _ in range(rounds + 1))
                yield Turn(**how, requests=1, tokens=tokens, seconds=seconds)


def decode_seconds(replica: DrivenReplica, requests: int, context: int, vocabulary: int = 256) -> float:
    """Between a token of a request and its next, in the median, with so many requests."""
    came = replica.run([_prompt(context, vocabulary) for _ in range(requests)], STEPS)
    return statistics.median(
        after - before
        for times in came
        for before, after in zip(times[SKIPPED:-2], times[SKIPPED + 1 : -1], strict=True)
    )


def prompt_seconds(replica: DrivenReplica, tokens: int, vocabulary: int = 256) -> float:
    """From a prompt that nobody has seen to its first token."""
    return replica.run([_prompt(tokens, vocabulary)], 1)[0][0]


def _prompt(length: int, vocabulary: int) -> list[int]:
    return random.choices(range(vocabulary), k=length)


def write_model(folder: Path, num_heads: int, num_layers: int) -> ModelInfo:
    """The smallest Llama that can be cut so."""
    sizes = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 32 * num_heads,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    config, family = {"model_type": "llama", **sizes}, FAMILIES["llama"]
    (folder / "config.json").write_text(json.dumps(config))
    spec = family.spec(hf_config("config.json", config))
    names = family.hf_names(spec)
    wanted = parameters(spec).items()
    save_file(
        {locate(names, name).name: torch.randn(parameter.shape) / 8 for name, parameter in wanted},
        folder / "model.safetensors",
    )
    return inspect_model(str(folder))

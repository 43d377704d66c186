"""What a step costs beside its arithmetic: the engine's loop, messages, the workers' Python. Measured on a replica
like those that serve, of a model so small that it has next to nothing to compute."""

from __future__ import annotations

import json
import random
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from holdfast.cluster.driven import DrivenReplica
from holdfast.core.config import ModelConfig, ServeConfig
from holdfast.core.spec import DecoderSpec, ModelInfo
from holdfast.hardware.host import usable_cores
from holdfast.hardware.profile import Turn
from holdfast.models.config import hf_config
from holdfast.models.families.registry import FAMILIES
from holdfast.models.inspect import inspect_model
from holdfast.models.parameters import locate, parameters
from holdfast.parallel.cuts import make_plan

REQUESTS = (1, 4, 16, 64)
PROMPTS = (64, 512)
LLAMA = {"model_type": "llama", "vocab_size": 256, "max_position_embeddings": 2048, "tie_word_embeddings": False}
COLD = {
    **LLAMA,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
}
"""57 MB of weights in bfloat16. Between two steps of a model that fills the caches the code and the data of Python,
sockets and scheduler come from memory, which costs as much again as what they do."""
CONTEXT, STEPS, SKIPPED = 32, 40, 8
"""Tokens of a prompt, tokens that follow, and of these those in which requests are still being let in."""


def turns(tensor: int, pipeline: int, rounds: int) -> Iterator[Turn]:
    """Of a replica cut so, each the fastest of `rounds` rounds, and of decodes the median within a round."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder), empty(tensor, pipeline))
        ranks, threads = tensor * pipeline, max(1, usable_cores() // (tensor * pipeline))

        def turn(requests: int, tokens: int, seconds: Iterable[float], *, cold: bool = False) -> Turn:
            return Turn(
                ranks=ranks,
                threads=threads,
                stages=pipeline,
                requests=requests,
                tokens=tokens,
                cold=cold,
                seconds=min(seconds),
            )

        with _replica(model, tensor, pipeline) as replica:
            for requests in REQUESTS:
                yield turn(requests, 1, (decode_seconds(replica, requests, CONTEXT) for _ in range(rounds + 1)))
            for tokens in PROMPTS:
                yield turn(1, tokens, (prompt_seconds(replica, tokens) for _ in range(rounds + 1)))
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder), COLD)
        with _replica(model, tensor, pipeline) as replica:
            yield turn(1, 1, (decode_seconds(replica, 1, CONTEXT) for _ in range(rounds + 1)), cold=True)


def cold_model() -> DecoderSpec:
    """What `COLD` is to the runtime."""
    return FAMILIES["llama"].spec(hf_config("config.json", COLD))


def _replica(model: ModelInfo, tensor: int, pipeline: int) -> DrivenReplica:
    plan = make_plan(model.spec, tensor=tensor, pipeline=pipeline)
    return DrivenReplica(model, plan, ServeConfig(model=ModelConfig(max_model_len=1024)))


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


def empty(num_heads: int, num_layers: int) -> Mapping[str, object]:
    """The config of the smallest Llama that can be cut so."""
    return {
        **LLAMA,
        "hidden_size": 32,
        "intermediate_size": 32 * num_heads,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "head_dim": 16,
    }


def write_model(folder: Path, config: Mapping[str, object]) -> ModelInfo:
    """Random weights in bfloat16."""
    (folder / "config.json").write_text(json.dumps(config))
    family = FAMILIES["llama"]
    spec = family.spec(hf_config("config.json", config))
    names = family.hf_names(spec)
    wanted = parameters(spec).items()
    tensors = {locate(names, name).name: torch.randn(each.shape, dtype=torch.bfloat16) / 8 for name, each in wanted}
    save_file(tensors, folder / "model.safetensors")
    return inspect_model(str(folder))

"""A model cut over processes, served: the same answers as from one, logprobs too, under a load that preempts."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import msgspec
import pytest

from holdfast.core.plan import Plan
from holdfast.models.inspect import inspect_model
from holdfast.operate.plan import run as write_plan
from holdfast.parallel.cuts import make_plan
from holdfast.planner.config import OutputConfig, PlanConfig, WhatConfig, WhereConfig
from support.builds import builds
from support.checkpoints import random_model, save
from support.crowd import Answers, ask
from support.service import Service
from support.skewed import EXPERTS, SHAPE
from support.tiny import byte_tokenizer

pytestmark = pytest.mark.skipif(not builds(), reason="Holdfast was installed without a C compiler")

LLAMA = {
    "model_type": "llama",
    "hidden_size": 144,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "max_position_embeddings": 1024,
}
MIXTRAL = {"model_type": "mixtral", **SHAPE, **EXPERTS, "max_position_embeddings": 1024}
FLAGS = ("--served-model-name", "m", "--max-model-len", "512", "--max-num-batched-tokens", "128")


def write(config: dict[str, object], folder: Path) -> str:
    size = byte_tokenizer(folder)
    return save(random_model(**config, vocab_size=size), folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        "llama": write(LLAMA, tmp_path_factory.mktemp("llama")),
        "mixtral": write(MIXTRAL, tmp_path_factory.mktemp("mixtral")),
    }


def answers(model: str, log: Path, *flags: str) -> tuple[Answers, dict[str, float]]:
    service = Service(model, *FLAGS, *flags, log=log).wait_ready()
    try:
        return asyncio.run(ask(service.url)), service.metrics()
    finally:
        assert service.stop() == 0, service.text()[-3000:]
        assert not service.living_children()


@pytest.fixture(scope="module")
def alone(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answers]:
    """From one process with memory enough."""
    folder = tmp_path_factory.mktemp("alone")
    return {name: answers(path, folder / name)[0] for name, path in models.items()}


TP, PP, DP, EP, LAYERS, MODE = (
    "--tensor-parallel-size",
    "--pipeline-parallel-size",
    "--data-parallel-size",
    "--expert-parallel-size",
    "--pipeline-layers",
    "--pipeline-batching",
)
PLANS = {
    "TP2": ("llama", 5, 2, (TP, "2")),
    "TP4, one KV head shared": ("llama", 5, 1, (TP, "4")),
    "PP2, asynchronous": ("llama", 3, 3, (PP, "2")),
    "PP3, hybrid": ("llama", 3, 3, (PP, "3", LAYERS, "1,3,1", MODE, "hybrid")),
    "PP5, synchronous": ("llama", 1, 3, (PP, "5", MODE, "synchronous")),
    "TP2 x PP2 x DP2": ("llama", 3, 2, (TP, "2", PP, "2", DP, "2")),
    "TP2 x DP2, weights held together": ("llama", 5, 2, (TP, "2", DP, "2", "--shard-weights")),
    "EP4": ("mixtral", 4, 1, (TP, "4", EP, "4")),
    "EP2 x TP2 x PP2": ("mixtral", 2, 1, (TP, "4", EP, "2", PP, "2", MODE, "hybrid")),
}
"""The model, most layers and KV heads of a rank, the flags."""
HEAD_DIM = {"llama": 16, "mixtral": 8}
BLOCKS = 34


@pytest.mark.parametrize("name", PLANS)
def test_served_answers_of_plans(models: dict[str, str], alone: dict[str, Answers], name: str, tmp_path: Path):
    model, layers, heads, flags = PLANS[name]
    memory = BLOCKS * 2 * layers * heads * HEAD_DIM[model] * 16 * 4
    found, metrics = answers(models[model], tmp_path / "log", *flags, "--kv-cache-memory-bytes", str(memory))
    assert found == alone[model]
    assert metrics["holdfast:num_preemptions_total"] > 0, "the load was to preempt"


def test_an_uneven_plan_from_a_file(models: dict[str, str], alone: dict[str, Answers], tmp_path: Path):
    """Stages of unequal degrees, and a second replica that is cut otherwise; a plan that is written is read as the
    same."""
    spec = inspect_model(models["llama"]).spec
    (uneven,) = make_plan(spec, tensor=(1, 3), pipeline=2, layers=(2, 3)).replicas
    plan = Plan((uneven, *make_plan(spec, tensor=2).replicas))
    file = tmp_path / "plan.json"
    file.write_bytes(msgspec.json.format(msgspec.json.encode(plan)))
    found, _ = answers(models["llama"], tmp_path / "log", "--plan", str(file))
    assert found == alone["llama"]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "cut"), [("llama", (TP, "2", PP, "2")), ("mixtral", (TP, "2", EP, "2"))])
def test_ranks_without_our_kernels_meet_by_gloo(
    models: dict[str, str], model: str, cut: tuple[str, ...], tmp_path: Path
):
    """float16 runs on torch's kernels, which promise no exactness: the same requests end, and most with the same
    text."""
    found = []
    for index, flags in enumerate(((), cut)):
        service = Service(models[model], *FLAGS, "--dtype", "float16", *flags, log=tmp_path / str(index)).wait_ready()
        try:
            found.append(asyncio.run(ask(service.url)))
        finally:
            assert service.stop() == 0, service.text()[-3000:]
    one, several = ([choice["text"] for choices in answers for choice in choices] for answers in found)
    assert sum(x == y for x, y in zip(one, several, strict=True)) > len(one) / 2


def test_experts_that_move_without_our_kernels_are_refused(models: dict[str, str], tmp_path: Path):
    flags = ("--dtype", "float16", TP, "2", EP, "2", "--enable-eplb")
    service = Service(models["mixtral"], *flags, log=tmp_path / "log")
    assert service.wait_end() == 2
    assert "--enable-eplb: works with the cpu kernels only so far" in service.text()


@pytest.mark.parametrize("victim", ["1.0"])
def test_a_rank_that_stands_still_is_noticed(models: dict[str, str], victim: str, tmp_path: Path):
    """A stopped process neither ends nor answers: it is killed, and its replica comes back and goes on with what it
    was at."""
    flags = ("--pipeline-parallel-size", "2", "--collective-timeout", "1.5")
    service = Service(models["llama"], *FLAGS, *flags, log=tmp_path / "log").wait_ready()
    try:
        calm = asyncio.run(ask(service.url))
        stopped = service.child(f"holdfast worker 0.{victim}")
        stopped.send_signal(signal.SIGSTOP)
        assert asyncio.run(ask(service.url)) == calm
        assert not stopped.is_running()
    finally:
        assert service.stop() == 0, service.text()[-3000:]
        assert not service.living_children()


def broken(plan: dict[str, object]) -> dict[str, str]:
    """What is wrong → the plan as text."""
    text = json.dumps(plan)

    def change(old: str, new: str) -> str:
        assert old in text, text
        return text.replace(old, new, 1)

    return {
        "rank 0 is there 2 times": change('"rank": 1', '"rank": 0'),
        "layers end at 4: the model has 5": change('"layers": [0, 5]', '"layers": [0, 4]'),
        "Object contains unknown field `colour`": change('"rank": 0', '"colour": 3, "rank": 0'),
        "Input data was truncated": text[: len(text) // 2],
        "more than one KV head's must be whole": change('"query_heads": [0, 6]', '"query_heads": [0, 4]').replace(
            "[6, 9]", "[4, 9]"
        ),
        "kv_heads (0, 1): its query heads read (0, 2)": change('"kv_heads": [0, 2]', '"kv_heads": [0, 1]'),
        "must begin at": change('"mlp_shards": [4, 8]', '"mlp_shards": [5, 8]'),
        "65 replicas: must be at least 1 and at most 64": msgspec.json.encode(
            {**plan, "replicas": plan["replicas"] * 65}
        ).decode(),
        "has experts, the model has none": change('"experts": []', '"experts": [1]'),
    }


def test_bad_plans_are_refused_by_name(models: dict[str, str], tmp_path: Path):
    plan = make_plan(inspect_model(models["llama"]).spec, tensor=2)
    for index, (complaint, text) in enumerate(broken(msgspec.to_builtins(plan)).items()):
        file = tmp_path / f"{index}.json"
        file.write_text(text)
        service = Service(models["llama"], "--plan", str(file), log=tmp_path / f"{index}.log")
        assert service.wait_end() == 2
        assert complaint in service.text().replace("\n", " "), (complaint, service.text())


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--tensor-parallel-size", "9"), "--tensor-parallel-size 9: must be at least 1 and at most 8"),
        (("--pipeline-parallel-size", "6"), "--pipeline-parallel-size 6: the model has 5 layers"),
        (("--pipeline-parallel-size", "2", "--pipeline-layers", "2,2"), "--pipeline-layers 2,2: must be 2 numbers"),
        (("--pipeline-layers", ""), "must be numbers with commas between"),
        (("--pipeline-layers", "2;3"), "must be numbers with commas between"),
        (("--expert-parallel-size", "2"), "--expert-parallel-size 2: the model has no experts"),
        (("--plan", "/nowhere.json"), "--plan /nowhere.json: cannot be read"),
        (("--shard-weights",), "shard_weights: needs several replicas (--data-parallel-size), all cut alike"),
        (("--shard-weights", DP, "2", "--dtype", "float16"), "--shard-weights: works with the cpu kernels only"),
        (("--plan", "x", "--tensor-parallel-size", "2"), "says what --tensor-parallel-size would say"),
    ],
)
def test_bad_degrees_are_refused_by_name(
    models: dict[str, str], flags: tuple[str, ...], complaint: str, tmp_path: Path
):
    service = Service(models["llama"], *flags, log=tmp_path / "log")
    assert service.wait_end() == 2
    assert complaint in " ".join(service.text().split()), service.text()


@pytest.mark.parametrize(("model", "gpus"), [("llama", "2xL4"), ("mixtral", "1xL4,1xT4")])
def test_what_the_planner_writes_is_served(
    models: dict[str, str], alone: dict[str, Answers], model: str, gpus: str, tmp_path: Path
):
    """On GPUs that are not there, so with CPUs in their place: the file itself is what is taken or refused."""
    file = tmp_path / "plan.json"
    config = PlanConfig(
        where=WhereConfig(gpus=gpus),
        what=WhatConfig(objective="memory", input_len=64, output_len=16, concurrency=4),
        out=OutputConfig(output=str(file)),
    )
    assert write_plan(models[model], config) == 0
    assert json.loads(file.read_text())["devices"]
    found, _ = answers(models[model], tmp_path / "log", "--plan", str(file))
    assert found == alone[model]

"""Exactness of plans (docs/architecture.md, contract 1): however a model is cut, its logits are the same bits."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import msgspec
import pytest
import torch

from holdfast.core.plan import ExpertPlacement, Plan, ReplicaPlan, places
from holdfast.core.spec import DecoderSpec
from holdfast.models.inspect import inspect_model
from holdfast.parallel.cuts import check_plan, make_plan, max_degree
from holdfast.parallel.placement import groups_of
from support.builds import builds
from support.cases import CASES, QUANTIZED
from support.checkpoints import random_model, run_interleaved, save
from support.gguf_twin import write_twin
from support.ranks import logits_of, ranks_of

pytestmark = pytest.mark.skipif(not builds(), reason="Holdfast was installed without a C compiler")

EIGHT = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
}
SIXTEEN_EXPERTS = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
}
NINE_HEADS = {
    "model_type": "llama",
    "hidden_size": 144,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "tie_word_embeddings": True,
}
CONFIGS = CASES | QUANTIZED | {"eight": EIGHT, "experts": SIXTEEN_EXPERTS, "nine": NINE_HEADS}
REQUESTS = [[random.Random(i).randrange(3, 97) for _ in range(length)] for i, length in enumerate((1, 5, 17, 40))]

Models = Callable[[str, str], str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Models:
    @cache
    def write(name: str, held: str) -> str:
        folder = tmp_path_factory.mktemp("model")
        random_weights = random_model(**CONFIGS[name])
        path = save(random_weights, folder)
        return write_twin(random_weights.config, folder, folder / "twin.gguf", kind=held) if "Q" in held else path

    return write


def check(path: str, dtype: torch.dtype, make: Callable[[DecoderSpec], Plan]) -> None:
    """Every rank of the last stage has the logits of a single rank, bit for bit."""
    info = inspect_model(path)

    def run(decoder: Any) -> list[torch.Tensor]:
        return run_interleaved(decoder, REQUESTS, seed=3)

    (alone,) = logits_of(info, make_plan(info.spec).replicas[0], dtype, run)
    replica = make(info.spec).replicas[0]
    together = logits_of(info, replica, dtype, run)
    assert len(together) == len(replica.stages[-1].ranks)
    for logits in together:
        for one, other in zip(alone, logits, strict=True):
            assert one.isfinite().all()
            assert torch.equal(one.view(torch.int32), other.view(torch.int32))


PLANS = {
    "TP2": {"tensor": 2},
    "TP3": {"tensor": 3},
    "TP4": {"tensor": 4},
    "TP8": {"tensor": 8},
    "PP2": {"pipeline": 2},
    "PP3, uneven": {"pipeline": 3, "layers": (1, 3, 1)},
    "PP5": {"pipeline": 5},
    "2 then 1": {"pipeline": 2, "tensor": (2, 1)},
    "1 then 3": {"pipeline": 2, "tensor": (1, 3)},
    "TP2 x PP3": {"pipeline": 3, "tensor": 2},
    "TP4 x PP2": {"pipeline": 2, "tensor": 4},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["nine", "eight"])
@pytest.mark.parametrize("plan", PLANS)
def test_logits_of_dense_plans(model: Models, name: str, plan: str, dtype: str):
    check(model(name, ""), getattr(torch, dtype), lambda spec: make_plan(spec, **PLANS[plan]))


EXPERT_PLANS = {
    "EP2": {"tensor": 2, "expert": 2},
    "EP4": {"tensor": 4, "expert": 4},
    "EP8": {"tensor": 8, "expert": 8},
    "experts cut in two": {"tensor": 2},
    "experts cut in three": {"tensor": 3},
    "EP2 x TP2": {"tensor": 4, "expert": 2},
    "EP2 x TP4": {"tensor": 8, "expert": 2},
    "EP2 x PP2": {"tensor": 2, "expert": 2, "pipeline": 2},
    "EP3 x PP3": {"tensor": 3, "expert": 3, "pipeline": 3},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("plan", EXPERT_PLANS)
def test_logits_of_expert_plans(model: Models, plan: str, dtype: str):
    check(model("experts", ""), getattr(torch, dtype), lambda spec: make_plan(spec, **EXPERT_PLANS[plan]))


@pytest.mark.parametrize("plan", [{"tensor": 4, "expert": 4}, {"tensor": 4, "expert": 2, "pipeline": 2}])
def test_logits_of_experts_held_more_than_once(model: Models, plan: dict[str, int]):
    """Each layer has its own owners, each expert up to as many as there are groups, who take its rows by turns."""

    def make(spec: DecoderSpec) -> Plan:
        even = make_plan(spec, **plan)
        dice, stages = random.Random(1), []
        for stage in even.replicas[0].stages:
            groups = range(len(groups_of(stage)))
            placements = [
                ExpertPlacement(layer, tuple(tuple(dice.choices(groups, k=2 ** (e % 5))) for e in range(16)))
                for layer in range(*stage.layers)
            ]
            stages.append(msgspec.structs.replace(stage, placements=tuple(placements)))
        placed = Plan((ReplicaPlan(tuple(stages)),))
        check_plan(placed, spec, "the plan")
        return placed

    check(model("experts", ""), torch.bfloat16, make)


@pytest.mark.parametrize("name", CASES)
def test_logits_of_every_family(model: Models, name: str):
    def make(spec: DecoderSpec) -> Plan:
        degree = min(max_degree(spec), 3)
        return make_plan(spec, tensor=(degree, max(1, degree - 1)), pipeline=2)

    check(model(name, ""), torch.bfloat16, make)


@pytest.mark.parametrize(("name", "held"), list(product(QUANTIZED, ("Q8_0", "Q4_0", "Q4_1"))))
def test_logits_of_quantized_models(model: Models, name: str, held: str):
    def make(spec: DecoderSpec) -> Plan:
        return make_plan(spec, tensor=min(max_degree(spec), 2), pipeline=2)

    check(model(name, held), torch.bfloat16, make)


@pytest.mark.parametrize("plan", ["TP2", "TP4", "PP3, uneven", "1 then 3"])
def test_pages_take_what_the_shards_say(model: Models, plan: str):
    """Keys and values of a rank's own layers and KV heads; of a KV head that several ranks read, in each."""
    info = inspect_model(model("nine", ""))
    replica = make_plan(info.spec, **PLANS[plan]).replicas[0]
    with ranks_of(info, replica, torch.bfloat16) as ranks:
        found = []
        for decoder in ranks.decoders:
            pages = decoder.allocate_pages(10, 16)
            found.append(sum(tensor.nbytes for tensor in (*pages.k, *pages.v)))
    token = 2 * info.spec.head_dim * 2  # bytes of keys and values, of a layer and head
    expected = [
        (last - first) * (shard.kv_heads[1] - shard.kv_heads[0]) * token * 10 * 16
        for first, last, shard in ((*place.layers, place.shard) for place in places(replica))
    ]
    assert found == expected

"""Models cut over ranks on the Triton kernels: the bits of one rank, however experts are shared out.

Processes with a share of the model each, which exchange by Gloo; through Triton's interpreter, which knows one grid
at a time, so that threads would not do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("for Triton's interpreter", allow_module_level=True)

from holdfast.core.plan import ExpertPlacement, Plan, ReplicaPlan, places
from holdfast.kernels.cuda.kernels import CudaKernels
from holdfast.models.inspect import inspect_model
from holdfast.models.load import load_decoder
from holdfast.parallel.cuts import check_plan, make_plan
from holdfast.parallel.distributed import DistributedCollectives, FileStore
from support.checkpoints import random_model, run_interleaved, save
from support.interpreted import sum_in_one_order

MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
REQUESTS = [[5, 61, 17, 8, 90], [7, 7, 12], [50]]
MOST = 4
held: list[DistributedCollectives] = []
"""Of a child: who leaves early closes what the others still read from."""


def logits_of(path: str, replica: ReplicaPlan, rank: int, meeting: str) -> list[np.ndarray]:
    """What one rank makes of the requests; nothing, where the last stage is another's."""
    sum_in_one_order()
    torch.set_num_threads(1)
    info, place = inspect_model(path), places(replica)[rank]
    kernels, collectives = CudaKernels(torch.bfloat16), None
    if not place.is_alone:
        store = FileStore(meeting, replica.num_ranks)
        collectives = DistributedCollectives(kernels, info.spec, place, torch.device("cpu"), store, 250.0)
        held.append(collectives)
    decoder = load_decoder(info, kernels, torch.bfloat16, "cpu", place=place, collectives=collectives)
    return [logits.numpy() for logits in run_interleaved(decoder, REQUESTS, seed=3)]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Executor]:
    """Processes, as many as a plan has ranks at most."""
    with ProcessPoolExecutor(MOST, get_context("spawn")) as pool:
        yield pool


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(random_model(**MIXTRAL), tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def alone(model: str) -> list[np.ndarray]:
    return logits_of(model, make_plan(inspect_model(model).spec).replicas[0], 0, "")


def check(ranks: Executor, model: str, alone: list[np.ndarray], replica: ReplicaPlan, meeting: Path) -> None:
    asked = [ranks.submit(logits_of, model, replica, rank, str(meeting)) for rank in range(replica.num_ranks)]
    found = [logits for each in asked if (logits := each.result())]
    assert len(found) == len(replica.stages[-1].ranks)
    for logits in found:
        for one, other in zip(alone, logits, strict=True):
            assert np.isfinite(one).all()
            assert np.array_equal(one.view(np.int32), other.view(np.int32))


PLANS = {
    "EP2": {"tensor": 2, "expert": 2},
    "EP4": {"tensor": 4, "expert": 4},
    "experts cut in two": {"tensor": 2},
    "EP2 x TP2": {"tensor": 4, "expert": 2},
    "EP2 x PP2": {"tensor": 2, "expert": 2, "pipeline": 2},
}


@pytest.mark.parametrize(
    "plan", [pytest.param(name, marks=[] if name in {"EP2", "EP2 x TP2"} else [pytest.mark.slow]) for name in PLANS]
)
def test_logits_of_expert_plans(ranks: Executor, model: str, alone: list[np.ndarray], plan: str, tmp_path: Path):
    replica = make_plan(inspect_model(model).spec, **PLANS[plan]).replicas[0]
    check(ranks, model, alone, replica, tmp_path / "meeting")


@pytest.mark.slow
def test_logits_of_experts_held_more_than_once(ranks: Executor, model: str, alone: list[np.ndarray], tmp_path: Path):
    """Rows that several ranks could compute, taken by turns."""
    spec = inspect_model(model).spec
    (stage,) = make_plan(spec, tensor=2, expert=2).replicas[0].stages
    owners = ((0, 1), (0,), (1,), (1, 1, 0, 1), (1, 0), (0,), (0, 1), (1,))
    placements = tuple(ExpertPlacement(layer, owners) for layer in range(*stage.layers))
    replica = ReplicaPlan((msgspec.structs.replace(stage, placements=placements),))
    check_plan(Plan((replica,)), spec, "the plan")
    check(ranks, model, alone, replica, tmp_path / "meeting")

"""What the planner counts of a model, against what the runtime loads."""

from __future__ import annotations

import math
from typing import Any

import pytest
from transformers import AutoConfig

from holdfast.models.config import hf_config
from holdfast.models.families import FAMILIES
from holdfast.models.parameters import parameters
from holdfast.planner.shapes.configs import shape_of_config
from holdfast.planner.shapes.shape import shape_of_spec
from support.cases import CASES
from support.checkpoints import SMALL


@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_a_shape_counts_every_parameter_that_the_runtime_loads(config: dict[str, Any]):
    values = AutoConfig.for_model(**SMALL | config).to_dict()
    spec = FAMILIES[config["model_type"]].spec(hf_config("config.json", values))
    loaded = sum(math.prod(parameter.shape) for parameter in parameters(spec).values())
    assert shape_of_spec(spec).params == loaded
    assert shape_of_config(values).params == loaded


def test_equal_layers_are_one_object_and_kinds_count_them():
    shape = shape_of_config({**SMALL, **CASES["qwen3_moe, some layers dense"]})
    dense, routed = shape.layers[0], shape.layers[1]
    assert [layer is routed for layer in shape.layers] == [False, True, False, False, False]
    assert shape.kinds == ((dense, 4), (routed, 1))


def test_active_parameters_are_those_of_the_chosen_experts_and_the_head():
    shape = shape_of_config({**SMALL, **CASES["qwen3_moe"]})
    one_expert = 3 * SMALL["hidden_size"] * 20
    idle = 3 * (7 - 3) * one_expert
    assert shape.params - shape.active_params == idle + SMALL["vocab_size"] * SMALL["hidden_size"]


def test_a_full_window_keeps_no_more():
    shape = shape_of_config({**SMALL, **CASES["mistral, window, wide heads"]})
    per_token = 3 * 2 * 2 * 12
    assert [shape.kv_numbers(context) for context in (0, 6, 7, 1000)] == [
        0,
        6 * per_token,
        7 * per_token,
        7 * per_token,
    ]

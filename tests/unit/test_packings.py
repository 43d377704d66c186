"""Which matrices are packed together, and where the columns of the row-parallel ones are cut."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from holdfast.core.spec import DecoderSpec
from holdfast.models.config import hf_config
from holdfast.models.families import FAMILIES
from holdfast.models.parameters import packings, parameters
from holdfast.parallel.shards import MLP_SHARDS, attention_shards, mlp_shards
from support.cases import CASES
from support.checkpoints import SMALL


def spec_of(config: dict[str, Any]) -> DecoderSpec:
    values = AutoConfig.for_model(**SMALL | config).to_dict()
    return FAMILIES[config["model_type"]].spec(hf_config("config.json", values))


@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_every_matrix_and_bias_is_packed_once(config: dict[str, Any]):
    """One forgotten would be missed at the first step only; one packed twice is memory lost."""
    spec = spec_of(config)
    modules = [module for packing in packings(spec).values() for module in packing.modules]
    assert len(modules) == len(set(modules))
    packed = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    wanted = parameters(spec)
    assert {name for name, parameter in wanted.items() if not parameter.norm} == packed & wanted.keys()
    assert {f"{module}.weight" for module in modules} <= wanted.keys()


@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_parts_of_a_packing_fit_and_shards_end_where_the_matrix_does(config: dict[str, Any]):
    spec = spec_of(config)
    wanted = parameters(spec)
    for name, packing in packings(spec).items():
        [columns] = {wanted[f"{module}.weight"].shape[1] for module in packing.modules}
        assert len({f"{module}.bias" in wanted for module in packing.modules}) == 1, "biases for all parts or none"
        assert packing.shards == tuple(sorted(set(packing.shards)))
        assert packing.shards == () or packing.shards[-1] == columns
        assert packing.shards == () or name.endswith((".attn.o", ".down"))
        assert packing.gated == (len(packing.modules) == 2)


def test_the_packings_of_a_layer():
    """The order of the parts is the kernels': q, k, v, and gate before up."""
    packs = packings(spec_of({"model_type": "llama", "num_key_value_heads": 2, "intermediate_size": 64}))
    assert packs["layers.1.attn.qkv"].modules == ("layers.1.attn.q", "layers.1.attn.k", "layers.1.attn.v")
    assert packs["layers.1.attn.o"].shards == (8, 16, 24, 32, 40, 48)
    up, down = packs["layers.1.mlp.up"], packs["layers.1.mlp.down"]
    assert (up.modules, up.activation, up.gated) == (("layers.1.mlp.gate", "layers.1.mlp.up"), "silu", True)
    assert (down.activation, down.gated, down.shards) == (None, False, (32, 64))


def test_a_plain_mlp_has_its_activation_in_its_only_part():
    up = packings(spec_of({"model_type": "gpt2"}))["layers.0.mlp.up"]
    assert (up.modules, up.activation, up.gated, up.shards) == (("layers.0.mlp.up",), "gelu_tanh", False, ())


def test_experts_are_cut_like_any_mlp():
    config = {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 5, "intermediate_size": 512}
    packs = packings(spec_of(config))
    assert packs["layers.0.moe.experts.4.down"].shards == tuple(range(64, 513, 64))


@pytest.mark.parametrize(
    ("columns", "ends"),
    [
        (8192, tuple(range(1024, 8193, 1024))),
        (1536, tuple(range(192, 1537, 192))),  # 48 units of 32, 6 each
        (96, (32, 64, 96)),  # three units: five shards would be empty
        (288, (32, 64, 96, 128, 160, 192, 224, 288)),  # nine units: the last shard has two
        (56, (7, 14, 21, 28, 35, 42, 49, 56)),  # no multiple of 32: single columns
        (4097, (512, 1024, 1536, 2048, 2560, 3072, 3584, 4097)),
        (3, (1, 2, 3)),
        (32, ()),
        (1, ()),
    ],
)
def test_where_mlp_columns_are_cut(columns: int, ends: tuple[int, ...]):
    assert mlp_shards(columns) == ends


@given(st.integers(1, 100_000))
def test_mlp_shards_are_few_even_and_complete(columns: int):
    ends = mlp_shards(columns)
    unit = 32 if columns % 32 == 0 else 1
    if not ends:
        assert columns // unit == 1, "only what cannot be cut stays whole"
        return
    widths = [end - start for start, end in zip((0, *ends), ends, strict=False)]
    assert sum(widths) == columns
    assert 2 <= len(ends) <= MLP_SHARDS
    assert len(ends) == min(MLP_SHARDS, columns // unit)
    assert all(width > 0 and width % unit == 0 for width in widths)
    assert max(widths) - min(widths) <= unit


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "ends"),
    [
        (6, 6, 8, (8, 16, 24, 32, 40, 48)),
        (6, 3, 8, (8, 16, 24, 32, 40, 48)),  # half a KV head's query heads each
        (6, 1, 64, (64, 128, 192, 256, 320, 384)),
        (8, 2, 16, (32, 64, 96, 128)),  # two heads of 16 share the scales of quantized columns
        (16, 8, 64, tuple(range(128, 1025, 128))),  # KV heads enough: theirs stay together
        (1, 1, 64, ()),
    ],
)
def test_where_the_attention_output_is_cut(heads: int, kv_heads: int, head_dim: int, ends: tuple[int, ...]):
    config = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    assert attention_shards(spec_of({"model_type": "llama", **config})) == ends

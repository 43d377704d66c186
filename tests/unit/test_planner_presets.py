"""Models by name: their shapes, and what is done with a name that is misspelt."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from holdfast.core.errors import ConfigError, ModelError
from holdfast.planner.shapes import load as planner_model
from holdfast.planner.shapes.load import load_shape
from holdfast.planner.shapes.presets import find_model, preset_names
from support.data import data

MEASURED = Path(__file__).parents[2].parent / "shared" / "data" / "measured_serving.csv"

# As the hub counts the published checkpoints, towers included; GPT and Megatron as their papers print them.
PARAMS = {
    "BLOOM-560M": 559_214_592,
    "BLOOM-7B1": 7_069_016_064,
    "CodeLlama-34B": 33_743_970_304,
    "DeepSeek-V2": 235_741_434_880,
    "DeepSeek-V2-Lite": 15_706_484_224,
    "GPT-2": 124_439_808,
    "GPT-2 XL": 1_557_611_200,
    "GPT-3 175B": 174_600_000_000,
    "Gemma-2-2B": 2_614_341_888,
    "Gemma-2-9B": 9_241_705_984,
    "Gemma-2-27B": 27_227_128_320,
    "Gemma-3-1B": 999_885_952,
    "Gemma-3-4B": 4_300_079_472,
    "Gemma-3-12B": 12_187_325_040,
    "Gemma-3-27B": 27_432_406_640,
    "Llama-1-7B": 6_738_415_616,
    "Llama-1-30B": 32_528_943_616,
    "Llama-1-65B": 65_285_660_672,
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-13B": 13_015_864_320,
    "Llama-2-70B": 68_976_648_192,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.2-11B-Vision": 10_670_220_835,
    "Llama-3.2-90B-Vision": 88_593_355_323,
    "Llama-4-Scout": 108_641_793_536,
    "Llama-4-Maverick": 401_583_781_376,
    "Megatron-22B": 22_000_000_000,
    "Megatron-530B": 529_600_000_000,
    "Megatron-1T": 1_008_000_000_000,
    "Mistral-7B": 7_241_732_096,
    "Mistral-Large": 122_610_069_504,
    "Mistral-Nemo": 12_247_782_400,
    "Mistral-Small-24B": 23_572_403_200,
    "Mixtral-8x7B": 46_702_792_704,
    "Mixtral-8x22B": 140_620_634_112,
    "Mixtral-8x22B-Instruct": 140_630_071_296,
    "OPT-350M": 331_196_416,
    "OPT-6.7B": 6_658_473_984,
    "Phi-3-mini": 3_821_079_552,
    "Phi-4": 14_659_507_200,
    "Phi-4-mini": 3_836_021_760,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-14B": 14_768_307_200,
    "SmolLM2-135M": 134_515_008,
    "TinyLlama-1.1B": 1_100_048_384,
    "Yi-34B": 34_388_917_248,
}


@pytest.mark.parametrize("name", PARAMS)
def test_presets_have_the_published_size(name: str):
    shape = find_model(name)
    printed = PARAMS[name] % 100_000_000 == 0
    assert shape.params + shape.tower_params == pytest.approx(PARAMS[name], rel=4e-3 if printed else 0)


def test_presets_are_what_the_published_configs_say():
    """Every config that a preset is known for, by its file's name; towers are in some of the presets only."""
    compared = 0
    for path in sorted(data("configs").glob("*.json")):
        try:
            preset = find_model(path.stem)
        except ConfigError:
            continue
        published = load_shape(str(path))
        for name in ("hidden", "vocab", "num_layers", "tied", "params", "active_params", "max_context"):
            assert getattr(preset, name) == getattr(published, name), (path.stem, name)
        for context in (1, 10_000):
            assert preset.kv_numbers(context) == published.kv_numbers(context), path.stem
        compared += 1
    assert compared >= 24


def test_every_preset_is_a_shape():
    for name in preset_names():
        shape = find_model(name)
        assert shape.name == name
        assert shape.active_params <= shape.params
        assert shape.kv_numbers_per_token() > 0
        assert shape.max_context >= 1024


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "Llama-3.1-8B"),
        ("Meta-Llama-3-8B", "Llama-3-8B"),
        ("llama2_70b", "Llama-2-70B"),
        ("llama1_30b", "Llama-1-30B"),
        ("meta-llama/Llama-2-7b-chat-hf", "Llama-2-7B"),
        ("GPT-3 175B", "GPT-3 175B"),
        ("gpt3-175b", "GPT-3 175B"),
        ("GPT-175B", "GPT-175B"),
        ("turing-530B", "Megatron-530B"),
        ("Mistral-Nemo", "Mistral-Nemo"),
        ("mistralai/Mistral-Nemo-Instruct-2407", "Mistral-Nemo"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "Mistral-7B-v0.3"),
        ("mistralai/Mixtral-8x7B-v0.1", "Mixtral-8x7B"),
        ("Qwen/Qwen3-235B-A22B-Instruct-2507", "Qwen3-235B-A22B"),
        ("google/gemma-3-4b-it", "Gemma-3-4B"),
        ("openai/gpt-oss-20b", "gpt-oss-20b"),
        ("deepseek-ai/DeepSeek-R1", "DeepSeek-R1"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "Llama-3.3-70B"),
        ("lmsys/vicuna-13b-v1.5", "Llama-2-13B"),
    ],
)
def test_names_are_found_however_they_are_spelt(spelling: str, name: str):
    assert find_model(spelling).name == name


def test_fp8_in_a_name_means_weights_of_8_bits():
    assert find_model("RedHatAI/Llama-4-Scout-17B-16E-Instruct-FP8-dynamic").expert_bits == 8
    assert find_model("nvidia/Llama-3.1-8B-Instruct-FP8").weight_bits == 8
    assert find_model("Llama-3.1-8B").weight_bits == 16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Llama-3.1-9B", "near: .*Llama-3.1-8B"),
        ("Mixtral-8x23B", "near: .*Mixtral-8x22B"),
        ("", "no model of this name is known"),
        ("agents-a1", "no model of this name is known .a path"),
        ("/models/Llama-3.1-8B", "no such file or folder"),
        ("./Llama-3.1-8B", "no such file or folder"),
    ],
)
def test_unknown_names_are_refused_with_those_near(name: str, message: str):
    with pytest.raises(ConfigError, match=message):
        find_model(name)


@pytest.mark.skipif(not MEASURED.exists(), reason=f"{MEASURED} is not there")
def test_every_measured_model_has_a_shape():
    with MEASURED.open(newline="") as file:
        names = {row["model"] for row in csv.DictReader(file)} - {"", "agents-a1"}
    for name in names:
        assert find_model(name).params > 0, name


CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}


def test_a_file_and_its_folder_have_one_shape(tmp_path: Path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shape = load_shape(str(folder))
    assert shape == load_shape(str(folder / "config.json"))
    assert (shape.name, shape.num_layers, shape.weight_bits) == ("tiny", 3, 16)
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    assert load_shape(str(folder)).weight_bits == 8


def test_a_preset_wins_over_the_hub_and_a_path_over_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Planning a well-known model must need no network."""
    asked = []

    def fetch(name: str, files: list[str]) -> str:
        asked.append(name)
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        return str(tmp_path)

    monkeypatch.setattr(planner_model, "resolve_model", fetch)
    monkeypatch.chdir(tmp_path)
    assert load_shape("Qwen/Qwen3-8B").params == 8_190_735_360
    assert load_shape("someone/something").num_layers == 3
    assert asked == ["someone/something"]
    (tmp_path / "Qwen3-8B").mkdir()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_shape("Qwen3-8B")


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_damaged_config_is_refused(text: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        load_shape(str(tmp_path))


def test_shapes_need_neither_torch_nor_numpy():
    """A plan for a machine elsewhere is made in a moment, on any machine."""
    code = "import sys, holdfast.planner.shapes.load; sys.exit(len({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

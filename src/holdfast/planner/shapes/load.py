"""From what the user calls a model to its shape."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

from holdfast.core.errors import ConfigError, ModelError, UserError
from holdfast.core.spec import DecoderSpec
from holdfast.models.gguf_file import TENSOR_TYPES, read_gguf
from holdfast.models.hub import CONFIG_FILES, resolve_model
from holdfast.models.inspect import inspect_model
from holdfast.models.safetensors_file import read_json
from holdfast.planner.runnable import Runtime
from holdfast.planner.shapes.configs import shape_of_config, spec_of_config
from holdfast.planner.shapes.presets import find_model, preset_config
from holdfast.planner.shapes.shape import ModelShape, shape_of_spec


def load_shape(model: str) -> ModelShape:
    """The shape of `model`: a config.json, a folder that has one, a .gguf file, a name that
    `presets.find_model` knows, or a hub id "org/name", of which the config alone is downloaded.

    Raises `ModelError` for a config that is damaged, or of an architecture that is not supported, and `ConfigError`,
    with near matches, for a name that is none of these.
    """
    path = Path(os.path.expanduser(model))
    if model and path.exists():
        return _shape_of_path(path)
    try:
        return find_model(model)
    except ConfigError:
        if "/" not in model and not model.endswith((".json", ".gguf")):
            raise
    return _shape_of_folder(Path(resolve_model(model, files=CONFIG_FILES)), model)


def load_spec(model: str) -> DecoderSpec:
    """The decoder of what `load_shape` takes, for the runtime. Raises `ModelError` where it does not serve it."""
    path = Path(os.path.expanduser(model))
    if path.suffix == ".gguf" and path.exists():
        return inspect_model(str(path)).spec
    if path.is_dir():
        path /= "config.json"
    if path.exists():
        return spec_of_config(read_json(path), str(path))
    try:
        known, config = preset_config(model)
    except ConfigError:
        folder = Path(resolve_model(model, files=CONFIG_FILES))
        known, config = model, read_json(folder / "config.json")
    return spec_of_config(config, known)


def runtime_of(model: str) -> Runtime:
    """What the runtime serves of what `load_shape` takes."""
    try:
        return Runtime(load_spec(model))
    except UserError as error:
        return Runtime(None, str(error))


def _shape_of_path(path: Path) -> ModelShape:
    if path.is_dir():
        return _shape_of_folder(path, path.absolute().name)
    if path.suffix == ".gguf":
        return _shape_of_gguf(path)
    name = path.absolute().parent.name if path.name == "config.json" else path.stem
    return shape_of_config(read_json(path), name)


def _shape_of_folder(folder: Path, name: str) -> ModelShape:
    path = folder / "config.json"
    if not path.exists():
        raise ModelError(f"{folder}: has no config.json")
    config = read_json(path)
    apart = folder / "hf_quant_config.json"  # where ModelOpt writes how it has quantized, unless into the config
    if "quantization_config" not in config and apart.exists():
        config["quantization_config"] = read_json(apart).get("quantization")
    return shape_of_config(config, name)


def _shape_of_gguf(path: Path) -> ModelShape:
    """With the average bits of the layers' matrices, which may differ from one to another."""
    shape = shape_of_spec(inspect_model(str(path)).spec, path.stem)
    numbers = stored = 0.0
    for tensor_name, tensor in read_gguf(str(path)).tensors.items():
        if tensor_name.startswith("blk.") and len(tensor.shape) > 1:
            _, block, size = next(kind for kind in TENSOR_TYPES.values() if kind[0] == tensor.type)
            numbers += math.prod(tensor.shape)
            stored += math.prod(tensor.shape) * 8 * size / block
    bits = stored / numbers if numbers else 16.0
    return replace(shape, weight_bits=bits, expert_bits=bits)

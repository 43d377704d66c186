"""Models by name, without their files: presets.toml, with forgiving spelling."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import resources
from typing import Any

from holdfast.core.errors import ConfigError
from holdfast.planner.shapes.configs import shape_of_config
from holdfast.planner.shapes.shape import ModelShape

_SAME_SHAPE = re.compile(
    r"instruct|chat|base|hf|it|pt|meta|dynamic|thinking|preview|static|pertensor|1m|4k|bf16|fp16|fp8|v0\.\d|v1|v1\.0|2[4-6]\d\d"
)
"""Words of a name that say nothing of a model's shape: how it was tuned, stored or dated."""


@cache
def _presets() -> Mapping[str, tuple[str, Mapping[str, Any]]]:
    """Spelling without its signs → (name, config)."""
    text = resources.files("holdfast.planner.shapes").joinpath("presets.toml").read_text(encoding="utf-8")
    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for group in tomllib.loads(text).values():
        for spellings, values in group["models"].items():
            config = group["config"] | dict(zip(group["columns"], values, strict=True))
            names = spellings.split(" = ")
            found |= {_key(name): (names[0], config) for name in names}
    return found


def preset_names() -> list[str]:
    """Every model that has a preset, by its first name."""
    return sorted({name for name, _ in _presets().values()})


def find_model(name: str) -> ModelShape:
    """The shape of a published model by its name; see `preset_config`. "FP8" in the name means weights of 8 bits."""
    known, config = preset_config(name)
    shape = shape_of_config(config, known)
    return replace(shape, weight_bits=8, expert_bits=8) if "fp8" in _words(name.rpartition("/")[2]) else shape


def preset_config(name: str) -> tuple[str, Mapping[str, Any]]:
    """A published model's first name and config, by a name as "Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct",
    "gpt3 175b".

    An organisation before a slash, upper case, signs between the words and words that say nothing of the shape are
    not looked at. Raises `ConfigError` with near matches.
    """
    organisation, _, bare = name.rpartition("/")
    if "/" in organisation or (organisation in {"", ".", "..", "~"} and "/" in name):
        raise ConfigError(f"MODEL {name!r}: no such file or folder")
    words = _words(bare)
    plain = "".join(word for word in words if not _SAME_SHAPE.fullmatch(word))
    presets = _presets()
    for key in ("".join(words), "".join(word for word in words if word != "fp8"), plain):
        if key in presets:
            return presets[key]
    near = difflib.get_close_matches(plain, presets, n=5, cutoff=0.6)
    names = list(dict.fromkeys(presets[key][0] for key in near))
    hint = (
        f"near: {', '.join(names)}" if names else "a path of a config.json or a hub id of the form org/name works too"
    )
    raise ConfigError(f"MODEL {name!r}: no model of this name is known ({hint})")


def _words(name: str) -> list[str]:
    return [word.strip(".") for word in re.split(r"[^a-z0-9.]+", name.lower()) if word.strip(".")]


def _key(name: str) -> str:
    return "".join(_words(name))

"""From what the user calls a model to a place on this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from holdfast.core.errors import ModelError

_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.txt"]
CONFIG_FILES = ["config.json", "hf_quant_config.json"]
"""What says how a model is shaped and stored."""
_NOT_FILES = ["original/*", "onnx/*"]
"""Copies of the weights in other formats, in sub-folders of some repositories."""


def resolve_model(model: str, revision: str | None = None, files: Sequence[str] = _FILES) -> str:
    """An absolute local path: `model` itself if it exists, else the snapshot of the hub id "org/name",
    downloaded unless it is cached; `files` are patterns of what is wanted of it.

    Raises `ModelError`, saying what was tried, when it is neither or cannot be fetched.
    """
    if not model:
        raise ModelError(f"MODEL {model!r}: must be a folder, a .gguf file or a hub id of the form org/name")
    path = os.path.expanduser(model)
    if os.path.exists(path):
        return str(Path(path).absolute())
    if model.count("/") != 1 or model.startswith((".", "/", "~")) or model.endswith(("/", ".gguf")):
        raise ModelError(f"{model}: no such file or folder, and not a hub id of the form org/name")

    from huggingface_hub import errors, snapshot_download  # noqa: PLC0415 - 0.1 s, and most starts are local

    try:
        folder = snapshot_download(model, revision=revision, allow_patterns=list(files), ignore_patterns=_NOT_FILES)
    except (errors.HFValidationError, errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        at = f" at revision {revision}" if revision else ""
        raise ModelError(
            f"{model}: no such file or folder here, and not to be had from the hub{at}: {error}"
        ) from error
    return str(Path(folder).absolute())

"""What the user calls a model becomes a local path, or an error that says what was tried."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from holdfast.core.errors import ModelError
from holdfast.models.hub import resolve_model


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name") == str(tmp_path / "org" / "name")  # a folder wins over a hub id
    (tmp_path / "m.gguf").touch()
    assert resolve_model("m.gguf") == str(tmp_path / "m.gguf")


@pytest.mark.parametrize("model", ["nothing", "./nothing", "/no/where", "a/b/c", "org/nothing.gguf", "org/"])
def test_what_cannot_be_a_hub_id_is_not_looked_up(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="no such file or folder, and not a hub id"):
        resolve_model(model)


def test_hub_offline_and_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A fresh machine without a network: the reason reaches the user."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="not to be had from the hub at revision main"):
        resolve_model("some-org/some-model", "main")


def test_bad_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="not to be had from the hub"):
        resolve_model("org/na me")


def test_cached_snapshot_is_found_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A hub cache laid out as huggingface_hub lays it out, with one snapshot in it."""
    commit = "0" * 40
    repo = tmp_path / "models--org--name"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "snapshots" / commit / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name") == str(repo / "snapshots" / commit)

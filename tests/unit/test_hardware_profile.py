"""A machine's profile survives its file, and what is none is refused with the field at fault."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from holdfast.core.errors import ConfigError
from holdfast.hardware.catalogue import find_link
from holdfast.hardware.cluster import Cluster, Node, cluster_of, usual_topology
from holdfast.hardware.detect import cpu_device
from holdfast.hardware.profile import (
    Product,
    Profile,
    Reading,
    default_path,
    read_profile,
    with_profile,
    write_profile,
)

PROFILE = Profile(
    machine="here",
    processor="some",
    kernels="cpu-avx2",
    cores=2,
    memory_bytes=10**10,
    holdfast="0",
    measured_at="2026-01-01T00:00:00+00:00",
    load=0.1,
    readings=(
        Reading(ranks=1, threads=2, seconds=0.5, num_bytes=10**10),
        Reading(ranks=2, threads=1, seconds=0.4, num_bytes=10**10),
    ),
    products=(
        Product(ranks=1, threads=2, seconds=2e-3, format="bfloat16", rows=100, inputs=1000, outputs=1000),
        Product(ranks=2, threads=1, seconds=2e-3, format="bfloat16", rows=100, inputs=1000, outputs=1000),
    ),
    attentions=(),
    exchanges=(),
)


def test_a_profile_is_kept_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "profile.json"
    write_profile(PROFILE, path)
    write_profile(PROFILE, path)
    assert read_profile(path) == PROFILE
    assert [file.name for file in path.parent.iterdir()] == ["profile.json"]


def test_rates_are_of_all_ranks_together() -> None:
    assert PROFILE.memory_bandwidth == pytest.approx(25e9)
    assert PROFILE.flops("bfloat16") == pytest.approx(2 * 100 * 1e6 * 2 / 2e-3)
    assert PROFILE.flops("Q8_0") == 0.0


def test_what_was_measured_is_preferred_to_what_is_assumed() -> None:
    """For the CPUs that were measured; GPUs, and another number of cores, are as they are."""
    cores = PROFILE.cores
    assumed = cpu_device(cores, 10**9, frozenset())
    node = Node("here", (assumed,), usual_topology((assumed,)))
    cluster = Cluster((node,), find_link("wan"), (assumed.source,))
    (device,) = with_profile(cluster, PROFILE).devices
    assert device.memory_bandwidth == PROFILE.memory_bandwidth != assumed.memory_bandwidth
    assert device.flops["bf16"] == PROFILE.flops("bfloat16")
    assert PROFILE.measured_at in with_profile(cluster, PROFILE).assumptions[0]
    assert with_profile(cluster, msgspec.structs.replace(PROFILE, cores=cores + 1)) is cluster
    gpus = cluster_of("2xH100")
    assert with_profile(gpus, PROFILE) is gpus


def test_the_default_path_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_path() == Path("/somewhere/holdfast/profile.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('"cores": 2', '"cores": "two"'), r"Expected `int`, got `str` - at `\$\.cores`"),
        (('"cores": 2', '"corse": 2'), "unknown field `corse`"),
        (('"seconds": 0.5', '"seconds": 0'), "must have seconds above 0"),
        (('"seconds": 0.5', '"seconds": -1'), "must have seconds above 0"),
        (("{", ""), "Expected `object`"),
    ],
)
def test_what_is_no_profile_is_refused(change: tuple[str, str], said: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    write_profile(PROFILE, path)
    path.write_text(path.read_text().replace(*change, 1))
    with pytest.raises(ConfigError, match=said):
        read_profile(path)


def test_a_profile_that_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.json: No such file"):
        read_profile(tmp_path / "nothing.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_profile(PROFILE, tmp_path / "file" / "profile.json")

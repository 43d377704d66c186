"""`holdfast probe` in processes of its own: all ranks come together, and when one fails none is left."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from holdfast.core.errors import StartupError
from holdfast.hardware.host import usable_cores
from holdfast.hardware.profile import read_profile
from holdfast.probe import run as probing
from holdfast.probe import turns as whole_steps
from holdfast.probe.config import MeasureConfig, ProbeConfig
from holdfast.probe.together import ROWS
from support.builds import builds

pytestmark = pytest.mark.skipif(not builds(), reason="Holdfast was installed without a C compiler")


@pytest.mark.slow
def test_a_profile_is_measured_shown_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probing, "SIZES", (256,))
    monkeypatch.setattr(whole_steps, "REQUESTS", (1, 2))
    monkeypatch.setattr(whole_steps, "PROMPTS", (20,))
    monkeypatch.setattr(whole_steps, "STEPS", 12)
    monkeypatch.setattr(whole_steps, "COLD", whole_steps.empty(2, 2))
    if usable_cores() < 2:
        pytest.skip("two ranks need two cores")
    path = tmp_path / "profile.json"
    measure = MeasureConfig(output=str(path), max_ranks=2, pool_bytes=10**6, rounds=1)
    assert probing.run(ProbeConfig(measure=measure)) == 0
    profile = read_profile(path)
    half = usable_cores() // 2
    assert {(p.ranks, p.threads) for p in profile.products} == {(1, usable_cores()), (2, half), (1, half)}
    assert {(w.ranks, w.threads) for w in profile.row_works} == {(1, usable_cores()), (2, half), (1, half)}
    sizes = len(ROWS)
    assert [e.operation for e in profile.exchanges] == [
        operation for operation in ("all_reduce", "all_gather", "send") for _ in range(sizes)
    ]
    assert {(t.ranks, t.stages) for t in profile.turns} == {(1, 1), (2, 1), (2, 2)}
    assert "memory read at" in capsys.readouterr().out


def test_a_rank_that_fails_says_why_and_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "SIZES", (0,))
    with pytest.raises(StartupError, match=r"the probe failed: \w+Error"):
        probing.measure(MeasureConfig(max_ranks=1, pool_bytes=10**6, rounds=1))
    assert not [child for child in psutil.Process().children() if "holdfast.probe.rank" in child.cmdline()]

"""A replica without supervisor and gateway does what it is asked, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from holdfast.cluster.driven import DrivenReplica
from holdfast.core.config import ServeConfig
from holdfast.core.errors import ConfigError, StartupError
from holdfast.models.inspect import inspect_model
from holdfast.parallel.cuts import make_plan
from support.tiny import tiny_model


@pytest.mark.parametrize("cut", [{}, {"tensor": 2}, {"pipeline": 2}], ids=["alone", "two ranks", "two stages"])
def test_every_token_of_every_request_has_its_time(cut: dict[str, int], tmp_path: Path) -> None:
    model = inspect_model(tiny_model(tmp_path))
    with DrivenReplica(model, make_plan(model.spec, **cut), ServeConfig()) as replica:
        for count in (1, 3):
            came = replica.run([[5, 6, 7 + index] for index in range(count)], 6)
            assert [len(times) for times in came] == [6] * count
            assert all(times == sorted(times) and times[0] > 0 for times in came)
    assert not [child for child in psutil.Process().children() if "holdfast.cluster" in " ".join(child.cmdline())]


def test_a_process_that_dies_is_an_error_at_once(tmp_path: Path) -> None:
    model = inspect_model(tiny_model(tmp_path))
    with DrivenReplica(model, make_plan(model.spec), ServeConfig()) as replica:
        [worker] = [child for child in psutil.Process().children() if "worker" in " ".join(child.cmdline())]
        worker.kill()
        with pytest.raises(StartupError, match=r"worker 0\.0\.0 ended: killed by SIGKILL"):
            replica.run([[5, 6, 7]], 500)


def test_what_cannot_be_served_is_an_error(tmp_path: Path) -> None:
    model = inspect_model(tiny_model(tmp_path))
    with pytest.raises(ConfigError, match="a plan of 2 replicas: one can be driven"):
        DrivenReplica(model, make_plan(model.spec, data=2), ServeConfig())
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with (
        pytest.raises(StartupError, match="failed"),
        DrivenReplica(model, make_plan(model.spec), ServeConfig()),
    ):
        pass

"""Points in the code at which `holdfast chaos` holds a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.core.points import VARIABLE, Points

REACH = """
import sys
from holdfast.core.points import Points
points = Points(sys.argv[1])
for point in sys.argv[2:]:
    points.reach(point)
    print(point, flush=True)
"""


def start(folder: Path, name: str, *points: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", REACH, name, *points]
    return subprocess.Popen(command, env=os.environ | {VARIABLE: str(folder)}, stdout=subprocess.PIPE, text=True)


def test_a_process_is_held_at_the_point_asked_for_until_it_is_let_go(tmp_path: Path):
    (tmp_path / "worker-at-sampled").touch()
    process = start(tmp_path, "worker 0.0.1", "decode", "sampled")
    assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
    assert [file.name for file in tmp_path.iterdir()] == [f"held-{process.pid}-worker 0.0.1"]
    assert os.read(process.stdout.fileno(), 100) == b"decode\n", "not further"
    process.send_signal(signal.SIGCONT)
    assert process.communicate()[0] == "sampled\n"
    assert process.returncode == 0


def test_it_can_be_killed_there(tmp_path: Path):
    (tmp_path / "gateway-at-logged").touch()
    process = start(tmp_path, "gateway", "logged")
    os.waitpid(process.pid, os.WUNTRACED)
    process.kill()
    assert process.communicate()[0] == ""
    assert process.returncode == -signal.SIGKILL


def test_one_process_is_held_and_nobody_of_another_role(tmp_path: Path):
    (tmp_path / "worker-at-sampled").touch()
    assert start(tmp_path, "engine 0", "sampled").communicate()[0] == "sampled\n"
    first = start(tmp_path, "worker 0.0.0", "sampled")
    os.waitpid(first.pid, os.WUNTRACED)
    assert start(tmp_path, "worker 0.0.1", "sampled").communicate()[0] == "sampled\n"
    first.kill()
    first.communicate()


def test_without_the_variable_no_file_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "worker-at-sampled").touch()
    Points("worker 0.0.0").reach("sampled")
    assert (tmp_path / "worker-at-sampled").exists()

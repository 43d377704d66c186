"""What is shown of a run, whatever a server's messages hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from holdfast.bench import serve
from holdfast.bench.config import BenchConfig, ReportConfig, TargetConfig
from holdfast.bench.load import Run
from holdfast.bench.measure import Outcome
from holdfast.bench.plot import write_plot
from holdfast.bench.report import print_report, summary_of
from holdfast.core.errors import ConfigError

FINE = Outcome(0, 0.0, 2, ttft=0.1, e2el=0.2, chunk_gaps=[0.1], output_tokens=2)


def run_of(*outcomes: Outcome, model: str = "m") -> Run:
    return Run(model, list(outcomes), len(outcomes), 1.0, 0.1, interrupted=False)


def test_brackets_are_shown_as_they_came() -> None:
    """rich takes [type=missing] for a colour and fails on [/INST]."""
    config = BenchConfig(target=TargetConfig(base_url="http://[::1]:8000"))
    run = run_of(FINE, Outcome(1, 0.0, 2, error="body [type=missing] [/INST]"), model="a[/b]")
    console = Console(width=120)
    with console.capture() as shown:
        print_report(run, summary_of(run, config), config, console)
    assert "1 failed: body [type=missing] [/INST]" in shown.get()
    assert "a[/b] at http://[::1]:8000" in shown.get()


@pytest.mark.parametrize(
    "outcomes", [(), (FINE,), (Outcome(0, 0.0, 2, e2el=0.1, error="x"),)], ids=["nothing", "one", "only failures"]
)
def test_any_run_can_be_drawn(outcomes: tuple[Outcome, ...], tmp_path: Path) -> None:
    """Ctrl-C may leave nothing to draw; a name with $ is no formula."""
    config, run = BenchConfig(), run_of(*outcomes, model="a$b_{$")
    write_plot(str(tmp_path / "out.png"), run, summary_of(run, config), config)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_that_cannot_be_written_does_not_lose_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    config = BenchConfig(report=ReportConfig(json=str(folder / "out.json")))

    def measured(*_: object) -> Run:
        folder.rmdir()  # gone while the measurement ran
        return run_of(FINE)

    monkeypatch.setattr("holdfast.bench.load.measure", measured)
    with pytest.raises(ConfigError, match=r"--json/--plot: .*out\.json"):
        serve.run(config)
    assert "Requests ok" in capsys.readouterr().out

"""The command line: frozen flags, the way from flags to the configuration tree, help and errors."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest
import typer
from typer.testing import CliRunner

from holdfast import __version__
from holdfast.cli.flags import format_bytes, parse_bytes, with_flags
from holdfast.cli.help import PanelHelp
from holdfast.cli.main import app
from holdfast.core.config import ModelConfig, ServeConfig, ServerConfig
from holdfast.core.errors import ConfigError
from holdfast.core.options import option

SERVE_FLAGS = [
    "--served-model-name",
    "--tokenizer",
    "--chat-template",
    "--revision",
    "--dtype",
    "--quantized-activations",
    "--max-model-len",
    "--override-generation-config",
    "--max-logprobs",
    "--seed",
    "--device",
    "--cpu-threads",
    "--pin-cpu-threads",
    "--no-pin-cpu-threads",
    "--tensor-parallel-size",
    "--pipeline-parallel-size",
    "--pipeline-layers",
    "--pipeline-batching",
    "--expert-parallel-size",
    "--enable-eplb",
    "--no-enable-eplb",
    "--num-redundant-experts",
    "--eplb-step-interval",
    "--plan",
    "--collective-timeout",
    "--data-parallel-size",
    "--shard-weights",
    "--no-shard-weights",
    "--allow-shared-gpu",
    "--no-allow-shared-gpu",
    "--exactness",
    "--attention-backend",
    "--enforce-eager",
    "--no-enforce-eager",
    "--block-size",
    "--kv-cache-dtype",
    "--kv-cache-memory-bytes",
    "--gpu-memory-utilization",
    "--enable-prefix-caching",
    "--no-enable-prefix-caching",
    "--checkpoint-memory-bytes",
    "--checkpoint-disk",
    "--checkpoint-disk-bytes",
    "--max-num-seqs",
    "--max-num-batched-tokens",
    "--max-queued-seqs",
    "--priority-aging-steps",
    "--async-scheduling",
    "--no-async-scheduling",
    "--host",
    "--port",
    "--api-key",
    "--max-body-bytes",
    "--shutdown-timeout",
    "--startup-timeout",
    "--max-restarts",
    "--spare-workers",
    "--regrow-interval",
    "--leak-window",
    "--check-weights-interval",
    "--token-log-dir",
    "--token-log-sync",
    "--resume-window",
    "--log-level",
    "--data-parallel-size-local",
    "--headless",
    "--no-headless",
    "--data-parallel-address",
    "--data-parallel-rpc-port",
    "--node-key-file",
    "--heartbeat-interval",
]

CHAOS_FLAGS = [
    *("--kills", "--faults", "--phase", "--seed", "--pair-percent", "--machines"),
    *("--streams", "--requests", "--max-tokens", "--json", "--plot"),
]


TOPO_FLAGS = ["--file", "--gpu", "--json", "--no-json"]
PREDICT_FLAGS = ["--rows", "--output", "--json", "--no-json"]
PROBE_FLAGS = ["--output", "--max-ranks", "--pool-bytes", "--rounds"]


def flags_of(*path: str) -> list[str]:
    command = typer.main.get_command(app)
    for name in path:
        command = command.commands[name]
    options = [p for p in command.params if p.param_type_name == "option"]
    return [flag for p in options for flag in (*p.opts, *p.secondary_opts)]


def holdfast(*arguments: str, columns: int = 80) -> subprocess.CompletedProcess[str]:
    """The real command, as its own process."""
    return subprocess.run(
        [sys.executable, "-m", "holdfast.cli.main", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": str(columns), "TERM": "dumb"},
    )


def test_flags_are_frozen() -> None:
    """Guards against a flag that vanishes or changes its name unnoticed: scripts in the world depend on it."""
    assert flags_of("serve") == SERVE_FLAGS
    assert flags_of("chaos") == CHAOS_FLAGS


PLAN_FLAGS = [
    "--cluster",
    "--gpus",
    "--objective",
    "--ttft",
    "--tpot",
    "--input-len",
    "--output-len",
    "--context",
    "--concurrency",
    "--weight-bits",
    "--kv-cache-dtype",
    "--engine",
    "--output",
    "-o",
    "--json",
    "--no-json",
    "--explain",
    "--no-explain",
    "--html",
]


def test_the_flags_of_plan_are_frozen() -> None:
    assert flags_of("plan") == PLAN_FLAGS


def test_the_flags_of_topo_probe_and_predict_are_frozen() -> None:
    assert flags_of("topo") == TOPO_FLAGS
    assert flags_of("predict") == PREDICT_FLAGS
    assert flags_of("probe") == PROBE_FLAGS


@dataclass(frozen=True, kw_only=True)
class _First:
    """First panel"""

    max_things: int | None = option(None, "Things at most.")
    mode: Literal["auto", "cpu"] = option("auto", "How.")
    limit_bytes: int = option(16_000_000, "Room.", bytes=True)


@dataclass(frozen=True, kw_only=True)
class _Second:
    """Second panel"""

    api_key: tuple[str, ...] = option((), "Keys.")
    wanted: bool = option(True, "Whether.")
    share: float = option(0.5, "How much.")


@dataclass(frozen=True, kw_only=True)
class _Tree:
    first: _First = _First()
    second: _Second = _Second()


def parse(*arguments: str) -> tuple[str, _Tree]:
    """What a command made from `_Tree` is called with."""
    little = typer.Typer()
    seen: list[tuple[str, _Tree]] = []

    @little.command(cls=PanelHelp)
    @with_flags(_Tree)
    def run(name: str, config: _Tree) -> None:
        seen.append((name, config))

    result = CliRunner().invoke(little, arguments)
    if result.exit_code:
        raise ValueError(result.output)
    return seen[0]


def test_without_flags_the_tree_has_its_defaults() -> None:
    assert parse("x") == ("x", _Tree())


def test_flags_fill_the_tree() -> None:
    flags = "--max-things 3 --mode cpu --limit-bytes 1GiB --api-key a --api-key b --no-wanted --share 0.25"
    assert parse(*flags.split(), "x") == (
        "x",
        _Tree(
            first=_First(max_things=3, mode="cpu", limit_bytes=2**30),
            second=_Second(api_key=("a", "b"), wanted=False, share=0.25),
        ),
    )


@pytest.mark.parametrize("wrong", ["--mode gpu", "--max-things three", "--limit-bytes 3Q", "--nonsense 1"])
def test_a_wrong_flag_is_refused_and_named(wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong.split(maxsplit=1)[0]):
        parse("x", *wrong.split())


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("65536", 65536),
        ("512M", 512_000_000),
        ("4g", 4 * 10**9),
        ("4GB", 4 * 10**9),
        ("4GiB", 4 * 2**30),
        ("1.5Gi", 3 * 2**29),
        ("0.1GB", 10**8),
        (" 2 TB ", 2 * 10**12),
    ],
)
def test_bytes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "M", "-1", "1e9", "4 gigs", "1.M"])
def test_what_is_not_a_number_of_bytes(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="not a number of bytes"):
        parse_bytes(text)


@pytest.mark.parametrize("count", [0, 1, 999, 1000, 1024, 16_000_000, 4 * 10**9, 2**30, 3 * 10**12])
def test_formatted_bytes_parse_back(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == count


@pytest.mark.parametrize("columns", [80, 120])
def test_help_of_serve_shows_every_flag_whole_under_its_section(columns: int) -> None:
    result = holdfast("serve", "--help", columns=columns)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    panels = [match[1] for line in lines if (match := re.match(r"╭─ (.*?) ─+╮", line))]
    assert panels == ["Arguments", *(type(s.default).__doc__ for s in fields(ServeConfig)), "Options"]
    for section in fields(ServeConfig):
        for field in fields(type(section.default)):
            assert field.name.replace("_", "-") in result.stdout
    assert "[default: 16M]" in result.stdout
    assert "[default: on]" in result.stdout


def test_version() -> None:
    assert holdfast("--version").stdout == f"holdfast {__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"]])
def test_help_needs_no_heavy_import(arguments: list[str]) -> None:
    """Guards the time a help text takes: what costs seconds is imported by the command that needs it."""
    code = (
        "import sys; from holdfast.cli.main import app; app(sys.argv[1:], standalone_mode=False); "
        "heavy = {'torch', 'numpy', 'fastapi', 'httpx', 'matplotlib', 'zmq', 'transformers'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 0, result.stderr


def test_what_the_user_did_wrong_is_one_line_and_exit_2() -> None:
    result = holdfast("serve", "somewhere", "--port", "-1")
    assert result.returncode == 2
    assert result.stderr == "holdfast: --port -1: must be at least 0 and at most 1e+15\n"


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["serve", "x", "--startup-timeout", "inf"], "--startup-timeout inf"),
        (["serve", "x", "--startup-timeout", "1e300"], "--startup-timeout 1e+300"),
        (["serve", "x", "--shutdown-timeout", "nan"], "--shutdown-timeout nan"),
        (["serve", ""], "MODEL ''"),
        (["serve", "x" * 300], "no such file or folder"),
        (["predict"], "--rows"),
        (["predict", "--rows", "nowhere.csv"], "--rows nowhere.csv: No such file"),
        (["bench", "serve", "--base-url", "http://[::1"], "--base-url http://[::1"),
        (["bench", "serve", "--api-key", "schlüssel"], "--api-key"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_odd_values_are_one_line_and_exit_2(arguments: list[str], flag: str) -> None:
    result = holdfast(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert flag in result.stderr
    assert result.stderr.startswith("holdfast: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gpus", "8xFoo"], "--gpus: GPU 'Foo' is not known"),
        (["--gpus", "1xH100", "--context", "512"], "--context 512: must be at least 1280"),
        (["--gpus", "1xH100", "--context", "1000000"], "--context 1000000: Llama-3.1-8B knows 131072"),
        (
            ["--gpus", "1xH100", "--input-len", "200000"],
            "--input-len 200000 and --output-len 256: Llama-3.1-8B knows",
        ),
        (["--cluster", "FILE", "--objective", "cost"], "--objective cost: node node1 of --cluster has no price"),
    ],
)
def test_plan_names_the_flag_of_what_it_refuses(flags: list[str], said: str, tmp_path: Path) -> None:
    """Guards against a message that leaves the user to guess, and against prices that only some nodes have, with
    which those without would always be the cheapest."""
    file = tmp_path / "cluster.yaml"
    file.write_text("nodes:\n  - gpus: 1xH100\n    price_per_hour: 2\n  - gpus: 1xH100\n", encoding="utf-8")
    command = ["plan", "Llama-3.1-8B", *(str(file) if flag == "FILE" else flag for flag in flags)]
    with pytest.raises(ConfigError) as refused:
        typer.main.get_command(app)(command, standalone_mode=False)
    assert str(refused.value).startswith(said)


def test_commands_that_do_not_exist_are_not_offered() -> None:
    assert set(typer.main.get_command(app).commands) == {
        "serve",
        "plan",
        "drain",
        "check",
        "topo",
        "probe",
        "predict",
        "bench",
        "chaos",
    }
    assert holdfast("plan").returncode == 2


def test_serve_takes_exactly_the_fields_of_the_tree() -> None:
    """Guards against a field without a flag, which no user could ever set."""
    names = {f.name for s in fields(ServeConfig) for f in fields(type(s.default))}
    assert {
        flag[2:].replace("-", "_") for flag in SERVE_FLAGS if not flag.startswith(("--no-", "-h", "--help"))
    } == names


@pytest.mark.parametrize(("module", "flags"), [("httpx", []), ("matplotlib", ["--plot", "out.png"])])
def test_bench_says_which_extra_is_missing(module: str, flags: list[str]) -> None:
    code = f"import sys; sys.modules[{module!r}] = None; from holdfast.cli.main import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "bench", "serve", *flags],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("holdfast: ")
    assert f"needs {module}: pip install 'holdfast[bench]'" in result.stderr


@pytest.mark.parametrize(
    "given",
    [
        "{",
        "[]",
        '{"temprature": 1}',
        '{"temperature": "hot"}',
        '{"top_p": true}',
        '{"top_p": NaN}',
        '{"top_p": null}',
    ],
)
def test_generation_overrides_are_checked(given):
    config = ServeConfig(model=ModelConfig(override_generation_config=given))
    with pytest.raises(ConfigError, match="--override-generation-config"):
        config.check()


def test_generation_overrides_are_read():
    model = ModelConfig(override_generation_config='{"temperature": 0, "top_k": 3}')
    ServeConfig(model=model).check()
    assert model.sampling_overrides() == {"temperature": 0, "top_k": 3}


@pytest.mark.parametrize("key", ["", " ", "schlüssel", " padded"])
def test_keys_that_everybody_or_nobody_has_are_refused(key):
    """An unset shell variable makes an empty key, which an empty bearer token would match."""
    with pytest.raises(ConfigError, match="--api-key"):
        ServeConfig(server=ServerConfig(api_key=("good", key))).check()

"""The `holdfast` command. It only reads flags and calls the room that does the work, imported when needed."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from holdfast import __version__
from holdfast.bench.config import BenchConfig
from holdfast.chaos.config import ChaosConfig
from holdfast.cli.flags import with_flags
from holdfast.cli.help import PanelHelp
from holdfast.core.config import ServeConfig
from holdfast.core.errors import HoldfastError, UserError
from holdfast.hardware.config import TopoConfig
from holdfast.operate.config import CheckConfig, DrainConfig
from holdfast.planner.config import PlanConfig, PredictConfig
from holdfast.probe.config import ProbeConfig

app = typer.Typer(
    help="Serve large language models over many devices: plan it, run the plan, lose nothing.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"holdfast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Serve large language models over many devices: plan it, run the plan, lose nothing."""


@app.command(cls=PanelHelp)
@with_flags(ServeConfig)
def serve(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face folder, a .gguf file, or a hub id like Qwen/Qwen3-0.6B.",
            show_default=False,
        ),
    ],
    config: ServeConfig,
) -> None:
    """Serve MODEL behind the OpenAI API.

    It listens on http://127.0.0.1:8000 once it says so; Ctrl-C lets live requests finish and stops it.
    BYTES are written 65536, 512M, 4GB (powers of 1000) or 4GiB (powers of 1024).
    """
    config.check()
    from holdfast.cluster.supervisor import serve as supervise  # noqa: PLC0415 — keeps --help fast

    raise typer.Exit(supervise(model, config))


@app.command(cls=PanelHelp)
@with_flags(ChaosConfig)
def chaos(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for serve.", show_default=False)],
    config: ChaosConfig,
    flags: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- FLAGS]", help="Flags of serve, after --.", show_default=False),
    ] = None,
) -> None:
    """Serve MODEL under load, let its processes die, and hold every reply against an undisturbed one.

    holdfast chaos MODEL --kills 100 -- --tensor-parallel-size 2 --data-parallel-size 2

    Exit code 0 when every request ended as it would have and no process is left; else 1.
    """
    config.check()
    from holdfast.chaos.run import run  # noqa: PLC0415 — keeps --help fast

    raise typer.Exit(run(model, config, flags or []))


ServiceUrl = Annotated[
    str, typer.Argument(metavar="URL", help="Of the service, as http://127.0.0.1:8000.", show_default=False)
]


@app.command(cls=PanelHelp)
@with_flags(DrainConfig)
def drain(
    url: ServiceUrl,
    config: DrainConfig,
) -> None:
    """Start the replicas of a running service anew, one after another, while it serves on.

    No request is lost: those of a replica go on in the others, or wait for it. One that went on with fewer ranks has
    all of them again.
    """
    config.check()
    from holdfast.operate.drain import run  # noqa: PLC0415 — keeps --help fast

    raise typer.Exit(run(url, config))


@app.command(cls=PanelHelp)
@with_flags(CheckConfig)
def check(
    url: ServiceUrl,
    config: CheckConfig,
) -> None:
    """Compare the weights that a running service has in memory with what it loaded, while it serves on.

    A replica with a rank whose weights have changed is started anew. Exit code 0 when none have, else 1.
    """
    config.check()
    from holdfast.operate.check import run  # noqa: PLC0415 — keeps --help fast

    raise typer.Exit(run(url, config))


@app.command(cls=PanelHelp)
@with_flags(PlanConfig)
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A config.json, a folder, a .gguf file, a published model's name or a hub id.",
            show_default=False,
        ),
    ],
    config: PlanConfig,
) -> None:
    """How to lay MODEL over GPUs, and why: memory of each rank, communication, times, and what beat each other plan.

    holdfast plan Llama-3.1-70B --gpus 8xA100-80GB --tpot 50

    No GPU and no weights are needed. Exit code 1 when no plan fits or keeps the limits.
    """
    config.check()
    from holdfast.operate.plan import run  # noqa: PLC0415 — keeps --help fast

    raise typer.Exit(run(model, config))


@app.command(cls=PanelHelp)
@with_flags(TopoConfig)
def topo(config: TopoConfig) -> None:
    """Draw which devices are joined by fast links, the slow edges between them, and good groups of devices.

    It warns where tensor-parallel groups of consecutive devices would cross slow edges, and names a better order.
    """
    config.check()
    from holdfast.hardware.report import run  # noqa: PLC0415 — keeps --help fast

    raise typer.Exit(run(config))


@app.command(cls=PanelHelp)
@with_flags(ProbeConfig)
def probe(config: ProbeConfig) -> None:
    """Measure this machine: matrix products, attention, memory, and what passes between ranks, each in processes like
    those that serve. The profile is kept for the planner. CPUs only so far.
    """
    config.check()
    from holdfast.probe.run import run  # noqa: PLC0415 — keeps --help fast

    raise typer.Exit(run(config))


@app.command(cls=PanelHelp)
@with_flags(PredictConfig)
def predict(config: PredictConfig) -> None:
    """Hold the planner against measurements.

    Every row of a CSV file comes back with what the planner says to it, the band in which nine of ten measurements
    lie, and the error where the row has a value; what cannot be predicted, with a note that says why. A summary goes
    to stderr.
    """
    config.check()
    from holdfast.operate.predict import run  # noqa: PLC0415 — keeps --help fast

    raise typer.Exit(run(config))


bench = typer.Typer(help="Measure a server.", no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(bench, name="bench")


@bench.command("serve", cls=PanelHelp)
@with_flags(BenchConfig)
def bench_serve(config: BenchConfig) -> None:
    """Drive any OpenAI-compatible server and report its latencies and throughput.

    Exit code 0; 1 if a request failed; 2 if nothing could be measured. Ctrl-C shows what was measured so far, and
    the exit code is 130.
    """
    from holdfast.bench.serve import run  # noqa: PLC0415 — keeps --help fast

    raise typer.Exit(run(config))


def main() -> None:
    """Run the command line. What the user did wrong is one line on stderr and exit code 2; what the machine did
    wrong is said in full, and exit code 1."""
    try:
        app(prog_name="holdfast")
    except HoldfastError as error:
        print(f"holdfast: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)


if __name__ == "__main__":
    main()

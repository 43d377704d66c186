"""How `--help` of a command looks: a panel per section, no name ever cut short, at 80 columns and wider."""

from __future__ import annotations

from typing import Any

import typer.core
from rich.console import Console, Group
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table


class PanelHelp(typer.core.TyperCommand):
    """A command whose help is one rich panel per section: flag and value left, meaning and default right.

    Typer's own help gives names, negations and types a column each and cuts long names at 80 columns.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help to standard output; `formatter` (plain text) is not used."""
        params: list[Any] = self.get_params(ctx)
        arguments = [param.metavar for param in params if param.param_type_name == "argument"]
        panels: dict[str, Table] = {}
        for param in params:
            title = getattr(param, "rich_help_panel", None) or _default_panel(param)
            if title not in panels:
                panels[title] = Table.grid(padding=(0, 2))
                panels[title].add_column(width=_NAME_COLUMNS, overflow="fold")
                panels[title].add_column(ratio=1)
            panels[title].add_row(_name(param), _meaning(param))
        console = Console(highlight=False)
        usage = escape(" ".join([ctx.command_path, *arguments, "[OPTIONS]"]))
        console.print(f"\n [yellow]Usage:[/] {usage}\n")
        console.print(Padding(escape(self.help or ""), (0, 1)), "")
        shown = (Panel(table, title=escape(name), title_align="left") for name, table in panels.items())
        console.print(Group(*shown))


_NAME_COLUMNS = 32


def _default_panel(param: Any) -> str:
    return "Arguments" if param.param_type_name == "argument" else "Options"


def _name(param: Any) -> str:
    """`--port INT`, `--[no-]ignore-eos`, `MODEL`, as rich markup."""
    if param.param_type_name == "argument":
        return f"[bold cyan]{escape(param.metavar)}[/]"
    longest = max(param.opts, key=len)
    if param.secondary_opts:
        return f"[bold cyan]{escape('--[no-]' + longest[2:])}[/]"
    others = "".join(f", {name}" for name in param.opts if name != longest)
    value = f" [yellow]{escape(param.metavar)}[/]" if param.metavar else ""
    return f"[bold cyan]{longest}{others}[/]{value}"


def _meaning(param: Any) -> str:
    """The help text and, unless it is empty or an on-off switch of the command itself, the default."""
    text = escape(param.help or "")
    default = param.default
    if not getattr(param, "show_default", False) or default is None or callable(default):
        return text
    if isinstance(default, bool):
        default = "on" if default else "off"
    return f"{text} [dim]\\[default: {escape(str(default))}][/]"

"""Command-line flags made from a configuration tree: a help panel per section, a flag per field.

A tree is a frozen dataclass whose fields are sections (`core.config.ServeConfig`); a section is a frozen
dataclass whose fields carry a default and, by `core.config.option`, a help text. `max_model_len` becomes
`--max-model-len`; a bool `--x/--no-x`; a tuple a flag that may be repeated; a Literal its choices; a field
marked `bytes` takes 512M.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typer

T = TypeVar("T")

_UNITS: dict[str, int] = {"": 1} | {
    letter + suffix: base**power
    for power, letter in enumerate("KMGT", start=1)
    for suffix, base in (("", 1000), ("B", 1000), ("I", 1024), ("IB", 1024))
}


def parse_bytes(text: str) -> int:
    """A number of bytes, written 65536, 512M, 1.5GB (powers of 1000) or 4GiB (powers of 1024), in any case.

    Raises `typer.BadParameter` for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", text.strip().upper())
    if match is None or match[2] not in _UNITS:
        raise typer.BadParameter(f"{text!r} is not a number of bytes; write 65536, 512M, 4GB or 4GiB")
    return int(Fraction(match[1]) * _UNITS[match[2]])


def format_bytes(count: int) -> str:
    """The shortest exact SI form: 16000000 → 16M."""
    for letter in "TGMK":
        if count and count % _UNITS[letter] == 0:
            return f"{count // _UNITS[letter]}{letter}"
    return str(count)


def with_flags(tree: type[Any]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Decorate a command that takes `config`: typer sees a flag per field of `tree`, the command a tree."""

    def decorate(command: Callable[..., T]) -> Callable[..., T]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "config"]
        parameters = [*own, *_parameters(tree)]

        @functools.wraps(command)
        def run(**values: Any) -> T:
            arguments = {p.name: values.pop(p.name) for p in own}
            return command(**arguments, config=_build(tree, values))

        # typer reads the signature, and must not look through `wraps` at the command's own
        del run.__wrapped__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _sections(tree: type[Any]) -> Iterator[tuple[str, type[Any]]]:
    for section in dataclasses.fields(tree):
        yield section.name, type(section.default)


def _parameters(tree: type[Any]) -> list[inspect.Parameter]:
    """One keyword parameter per field of every section."""
    parameters = []
    for _, section in _sections(tree):
        hints = get_type_hints(section)
        for field in dataclasses.fields(section):
            annotation, default = _flag(field, hints[field.name], panel=section.__doc__ or section.__name__)
            parameters.append(
                inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            )
    names = [p.name for p in parameters]
    assert len(names) == len(set(names)), "two sections have a field of the same name"
    return parameters


def _flag(field: dataclasses.Field[Any], hint: Any, panel: str) -> tuple[Any, Any]:
    """The annotation and the default that typer shall see for one field."""
    dashed = "--" + field.name.replace("_", "-")
    declaration = f"{dashed}/--no-{dashed[2:]}" if hint in (bool, bool | None) else dashed
    extra: dict[str, Any] = {"help": field.metadata["help"], "rich_help_panel": panel}
    default: Any = field.default
    if field.metadata.get("bytes"):
        extra["parser"] = parse_bytes
        default = None if default is None else format_bytes(default)
    elif get_origin(hint) is tuple:
        hint, default = list[get_args(hint)[0]], list(default)  # type: ignore[misc]
    extra["show_default"] = default not in (None, [])
    extra["metavar"] = field.metadata.get("metavar", "BYTES" if "parser" in extra else _metavar(hint))
    short = [field.metadata["short"]] if "short" in field.metadata else []
    return Annotated[hint, typer.Option(declaration, *short, **extra)], default


def _metavar(hint: Any) -> str | None:
    """How a value of this type is written in the help: INT, TEXT, auto|cpu|cuda; None for a switch."""
    if get_origin(hint) is Literal:
        return "|".join(get_args(hint))
    if get_origin(hint) in (Union, types.UnionType, list):
        return _metavar(get_args(hint)[0])
    return {int: "INT", float: "FLOAT", str: "TEXT", bool: None}[hint]


def _build(tree: type[T], values: Mapping[str, Any]) -> T:
    """The tree from flat flag values."""
    sections = {}
    for name, section in _sections(tree):
        given = {field.name: values[field.name] for field in dataclasses.fields(section)}
        sections[name] = section(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    return tree(**sections)

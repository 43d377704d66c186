"""Cluster files: YAML, checked field by field. docs/planning.md describes them."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from holdfast.core.errors import ConfigError
from holdfast.hardware.catalogue import Device, Link, find_link
from holdfast.hardware.cluster import (
    MOST_DEVICES,
    USUAL_NETWORK,
    Cluster,
    Node,
    gpu_counts,
    node_of,
    usual_nics,
)
from holdfast.hardware.topology import parse_topology

NUMBER = (int, float)
Number = TypeVar("Number", int, float)
CLUSTER = {"nodes": (list,), "network": (str, dict), "between_sites": (str, dict)}
NODE = {
    "name": (str,),
    "count": (int,),
    "gpus": (str, list),
    "topology": (str,),
    "link": (str, dict),
    "network": (str, dict),
    "nics": (int,),
    "memory_gb": NUMBER,
    "site": (str,),
    "price_per_hour": NUMBER,
}
LINK = {"kind": (str,), "bandwidth_gb": NUMBER, "latency_us": NUMBER}
LINK_KINDS = ("nvlink", "pcie", "infiniband", "roce", "ethernet", "wan")
WORDS: dict[tuple[type, ...], str] = {
    (int,): "a whole number",
    NUMBER: "a number",
    (str,): "text",
    (list,): "a list",
    (str, list): "text or a list",
    (str, dict): "text or a mapping",
}


def read_cluster(path: str) -> Cluster:
    """The cluster that a file describes. Raises ConfigError, with the field, its value and what is allowed."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cluster file {path}: {_reason(error)}") from error
    return parse_cluster(text, path, Path(path).parent)


def parse_cluster(text: str, source: str = "the cluster", folder: Path = Path()) -> Cluster:
    """The cluster that YAML describes; names of topology files are looked up in `folder`. Raises ConfigError."""
    try:
        _no_key_twice(yaml.compose(text, Loader=yaml.SafeLoader), set())
        tree = yaml.safe_load(text)
    except RecursionError as error:
        raise ConfigError(f"{source}: not YAML: it is nested too deeply") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or "it is no text"
        line = f" line {mark.line + 1}:" if mark else ""
        raise ConfigError(f"{source}:{line} not YAML: {problem}") from error
    try:
        return _cluster(_mapping(tree, "", CLUSTER), folder)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _no_key_twice(node: yaml.Node | None, seen: set[int]) -> None:
    """Of two values of one key YAML drops one by silence. `seen` nodes: an anchor may stand in many places."""
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.MarkedYAMLError(problem=f"{key} is given twice", problem_mark=node.start_mark)
    for child in node.value:
        for part in child if isinstance(child, tuple) else (child,):
            _no_key_twice(part, seen)


def _cluster(fields: dict[str, Any], folder: Path) -> Cluster:
    entries = fields.get("nodes")
    if not entries:
        raise ConfigError("nodes: a list of at least one node is needed")
    between_nodes = _link(fields["network"], "network") if "network" in fields else None
    nodes: list[Node] = []
    assumptions: list[str] = []
    for number, entry in enumerate(entries):
        where = f"nodes[{number}]"
        told = _mapping(entry, where, NODE)
        count = _within(told.get("count", 1), f"{where}.count", 1, MOST_DEVICES)
        node = _node(told, where, folder, between_nodes)
        if sum(len(node.devices) for node in nodes) + count * len(node.devices) > MOST_DEVICES:
            raise ConfigError(f"{where}: more than {MOST_DEVICES:,} devices")
        name, first = (told["name"], 0) if "name" in told else ("node", len(nodes))
        alone = count == 1 and "name" in told
        nodes += [replace(node, name=name if alone else f"{name}{first + i}") for i in range(count)]
        if "nics" not in told and not node.topology.nics:
            assumptions.append(f"{where}: {node.nics} network cards")
    _unlike(node.name for node in nodes)
    if len(nodes) > 1:
        nodes, said = _networked(nodes)
        assumptions += said
    else:
        assumptions = []
    sites = fields.get("between_sites")
    between_sites = _link(sites, "between_sites") if sites is not None else find_link("wan")
    if sites is None and len({node.site for node in nodes}) > 1:
        assumptions.append(f"between sites: {between_sites.source}")
    return Cluster(tuple(nodes), between_sites, tuple(assumptions))


def _node(told: Mapping[str, Any], where: str, folder: Path, network: Link | None) -> Node:
    devices = _devices(told.get("gpus"), f"{where}.gpus")
    if "topology" in told and "link" in told:
        raise ConfigError(f"{where}: topology and link both say how the devices are joined; give one of them")
    link = _link(told["link"], f"{where}.link") if "link" in told else None
    topology = None
    if "topology" in told:
        path = folder / told["topology"]
        try:
            topology = parse_topology(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}.topology: {path}: {_reason(error)}") from error
    try:
        node = node_of("", devices, topology, link)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if "network" in told:
        network = _link(told["network"], f"{where}.network")
    cards = len(topology.nics) if topology and topology.nics else usual_nics(devices)
    price, memory = told.get("price_per_hour"), told.get("memory_gb")
    return replace(
        node,
        network=network,
        nics=_within(told.get("nics", cards), f"{where}.nics", 1, 64),
        memory_bytes=None if memory is None else round(_within(memory, f"{where}.memory_gb", 1, 1e6) * 1e9),
        site=told.get("site", ""),
        price_per_hour=None if price is None else _within(price, f"{where}.price_per_hour", 0, 1e9),
    )


def _networked(nodes: list[Node]) -> tuple[list[Node], list[str]]:
    """Nodes that were told no network have the usual one of their time, and that is said."""
    found, said = [], []
    for node in nodes:
        name = USUAL_NETWORK.get(node.devices[0].pcie.name)
        if node.network is None and name:
            found.append(replace(node, network=find_link(name)))
            said.append(f"network of nodes with {node.devices[0].name}: {name}")
        else:
            found.append(node)
    return found, list(dict.fromkeys(said))


def _devices(gpus: object, where: str) -> tuple[Device, ...]:
    parts = [part for part in (gpus if isinstance(gpus, list) else [gpus]) if isinstance(part, str) and part.strip()]
    if not parts or (isinstance(gpus, list) and len(parts) < len(gpus)):
        raise ConfigError(f"{where}: needed, as 8xH100 or a list of such, not {gpus!r}")
    found: list[Device] = []
    for part in parts:
        try:
            counts = gpu_counts(part)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        for nodes, count, device in counts:
            if nodes is not None:
                raise ConfigError(
                    f"{where}: {part!r} names several nodes; say {where.rpartition('.')[0]}.count instead"
                )
            found += [device] * count
    return tuple(found)


def _link(value: object, where: str) -> Link:
    """A link of the catalogue by its name, or one described."""
    if isinstance(value, str):
        try:
            return find_link(value)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
    fields = _mapping(value, where, LINK)
    missing = [name for name in LINK if name not in fields]
    if missing:
        raise ConfigError(f"{where}.{missing[0]}: needed, or the name of a link instead of a mapping")
    if fields["kind"] not in LINK_KINDS:
        raise ConfigError(f"{where}.kind: {fields['kind']!r} is none of {', '.join(LINK_KINDS)}")
    return Link(
        name=fields["kind"],
        kind=fields["kind"],
        bandwidth=_within(fields["bandwidth_gb"], f"{where}.bandwidth_gb", 1e-3, 1e5) * 1e9,
        latency=_within(fields["latency_us"], f"{where}.latency_us", 0, 1e7) / 1e6,
        source="the cluster file",
    )


def _mapping(value: object, where: str, allowed: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    """The fields of a mapping, none unknown and each of an allowed type."""
    dot = f"{where}." if where else ""
    if not isinstance(value, dict):
        got = "nothing" if value is None else _short(value)
        raise ConfigError(f"{where or 'the file'}: a mapping with {', '.join(allowed)} is needed, not {got}")
    for name, field in value.items():
        if name not in allowed:
            near = difflib.get_close_matches(str(name), allowed, n=1)
            hint = f"; {near[0]} is near" if near else ""
            raise ConfigError(f"{dot}{name}: no such field{hint}; the fields are {', '.join(allowed)}")
        if not isinstance(field, allowed[name]) or isinstance(field, bool):
            raise ConfigError(f"{dot}{name}: {WORDS[allowed[name]]} is needed, not {_short(field)}")
    return value


def _within(value: Number, where: str, least: float, most: float) -> Number:
    if not least <= value <= most:
        raise ConfigError(f"{where}: {value!r} is not within {least:,g} to {most:,g}")
    return value


def _unlike(names: Iterable[str]) -> None:
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ConfigError(f"two nodes are named {name!r}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "…"


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not text in UTF-8"

"""What Holdfast's own engine runs of what a search finds. The rest is shown all the same, with the reason."""

from __future__ import annotations

from dataclasses import dataclass, field

from holdfast.core.errors import ConfigError
from holdfast.core.plan import Plan
from holdfast.core.spec import DecoderSpec
from holdfast.hardware.cluster import Cluster
from holdfast.parallel.cuts import make_plan
from holdfast.planner.candidates import Candidate
from holdfast.planner.goal import Goal

KV_FORMATS_KEPT = ("bfloat16", "float32")
"""Of cached keys and values, those that the engine has."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """The engine, as far as a search asks it. `spec`: the decoder that it makes of the model; None: it does not serve
    it, for the reason `unserved`."""

    spec: DecoderSpec | None
    unserved: str = ""
    known: dict[tuple[object, ...], str] = field(default_factory=dict)
    """Ways to cut the model that were asked about so far, and what is wrong with each."""

    def refuses_all(self, goal: Goal) -> str:
        """Why it runs no plan at all for this goal, in half a sentence; "": it runs some."""
        if self.spec is None:
            return self.unserved
        if goal.kv_format not in KV_FORMATS_KEPT:
            return f"it keeps no keys and values in {goal.kv_format} so far, only in {' or '.join(KV_FORMATS_KEPT)}"
        return ""

    def refuses(self, goal: Goal, candidate: Candidate) -> str:
        """Why it does not run this one, in half a sentence; "": it does."""
        if said := self.refuses_all(goal):
            return said
        assert self.spec is not None
        if len(nodes := nodes_of(candidate)) > 1:
            return f"it runs plans of one node so far, this one has {len(nodes)}"
        if candidate.shared_experts:
            return "replicas do not share out experts so far"
        on_gpus = any(group.device.name != "cpu" for groups in candidate.replicas for group in groups)
        if on_gpus and candidate.shard_weights:
            return "replicas hold weights together on CPUs only so far"
        cut = (candidate.degrees, candidate.layers, len(candidate.replicas), candidate.expert_parallel)
        if cut not in self.known:
            try:
                cut_of(self.spec, candidate)
                self.known[cut] = ""
            except ConfigError as error:
                self.known[cut] = str(error)
        return self.known[cut]


def nodes_of(candidate: Candidate) -> set[int]:
    """Numbers of the nodes that it uses."""
    return {node for groups in candidate.replicas for group in groups for node, _ in group.places}


def cut_of(spec: DecoderSpec, candidate: Candidate) -> Plan:
    """The plan, without devices and estimates. Raises `ConfigError` where the model cannot be cut so."""
    degrees = candidate.degrees
    return make_plan(
        spec,
        tensor=degrees,
        pipeline=len(degrees),
        data=len(candidate.replicas),
        expert=degrees[0] if candidate.expert_parallel else None,
        layers=candidate.layers if len(degrees) > 1 else (),
        shard_weights=candidate.shard_weights,
    )


def one_node_of(cluster: Cluster) -> list[tuple[int, Cluster]]:
    """Nodes that differ in more than their name, each as a cluster of its own: (its number, that)."""
    found: dict[tuple[object, ...], tuple[int, Cluster]] = {}
    for number, node in enumerate(cluster.nodes):
        kind = (node.devices, id(node.topology), node.link, node.price_per_hour)
        found.setdefault(kind, (number, Cluster((node,), cluster.between_sites, cluster.assumptions)))
    return list(found.values())

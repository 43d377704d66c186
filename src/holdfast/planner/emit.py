"""From what the search found to the Plan that the runtime runs."""

from __future__ import annotations

import msgspec

from holdfast.core.errors import ConfigError
from holdfast.core.plan import Plan, PlanEstimates
from holdfast.core.spec import DecoderSpec
from holdfast.parallel.cuts import make_plan
from holdfast.planner.estimate import Estimate


def plan_of(spec: DecoderSpec, chosen: Estimate) -> Plan:
    """The plan of a candidate that fits, with the devices of its ranks, the links of its stages and what they are
    expected to do. Raises `ConfigError` where the runtime cannot cut the model so."""
    candidate = chosen.candidate
    nodes = {node for groups in candidate.replicas for group in groups for node, _ in group.places}
    if len(nodes) > 1:
        raise ConfigError(f"{candidate.name} is over {len(nodes)} nodes; Holdfast runs plans of one node so far")
    degrees = candidate.degrees
    plan = make_plan(
        spec,
        tensor=degrees,
        pipeline=len(degrees),
        data=len(candidate.replicas),
        expert=degrees[0] if candidate.expert_parallel else None,
        layers=candidate.layers if len(degrees) > 1 else (),
        shard_weights=candidate.shard_weights,
    )
    devices = tuple(tuple(index for group in groups for _, index in group.places) for groups in candidate.replicas)
    links = tuple(tuple(group.slowest_link.name for group in groups) for groups in candidate.replicas)
    return msgspec.structs.replace(plan, devices=devices, links=links, estimates=estimates_of(chosen))


def estimates_of(chosen: Estimate) -> PlanEstimates:
    assert chosen.served is not None, "only a candidate that fits becomes a plan"
    return PlanEstimates(
        requests=chosen.concurrency,
        ttft=chosen.served.ttft,
        tpot=chosen.served.tpot,
        tokens_per_second=chosen.throughput,
        kv_tokens=chosen.kv_tokens,
        memory_used=chosen.memory_used,
    )

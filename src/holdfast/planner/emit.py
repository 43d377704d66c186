"""From what the search found to the Plan that the runtime runs."""

from __future__ import annotations

import msgspec

from holdfast.core.plan import Plan, PlanEstimates
from holdfast.core.spec import DecoderSpec
from holdfast.planner.estimate import Estimate
from holdfast.planner.runnable import cut_of


def plan_of(spec: DecoderSpec, chosen: Estimate) -> Plan:
    """The plan of a candidate that fits, with the devices of its ranks, the links of its stages and what they are
    expected to do. Raises `ConfigError` where the runtime cannot cut the model so; what else it does not run,
    `runnable.Runtime` says."""
    candidate = chosen.candidate
    plan = cut_of(spec, candidate)
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

"""A found plan as data, for other programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from holdfast.hardware.catalogue import Link
from holdfast.planner.candidates import Candidate
from holdfast.planner.estimate import Estimate, Question, StageMemory
from holdfast.planner.search import Found
from holdfast.planner.show.alternatives import longest_context
from holdfast.planner.show.breakdown import Exchange, exchanges, first_token_parts, parts
from holdfast.planner.show.explain import why
from holdfast.planner.show.formulas import formulas
from holdfast.planner.show.shortfall import nothing_fits
from holdfast.planner.show.summary import error_band, is_pareto, runners, warnings


def as_json(found: Found) -> dict[str, Any]:
    """All that is known of the search. Bytes, seconds, tokens, tokens per second; None where there is no such thing.

    - `model`: name, params, active_params, layers, hidden, weight_bits, expert_bits, max_context
    - `cluster`: `nodes`, each with name, site, devices by name, network; between_sites, assumptions
    - `goal`: as it was asked, fields of `Goal`
    - `problem`: a sentence where no plan does what is asked, else None
    - `best`: a plan as in `ranking`, and with it
        `replicas`: of each, `stages` with layers [first, last) and devices [node, number in it], link, nodes
        `memory`: of a rank of each stage, its parts in bytes, `room_for_kv`, `device`; `kv_tokens`, `longest_context`
        `token`, `first_token`: parts in seconds, adding up to `tpot` and `ttft`
        `exchanges`: of a decoding step
        `bands`: share by which tpot, ttft and throughput may be off, nine times in ten
        `formulas`: section, name, formula, numbers, value
    - `ranking`: the best and its runners-up: name, fits, pareto, concurrency, ttft, tpot, throughput,
      throughput_per_device, cost, spare, kv_tokens, memory_used, misses, why; `refused`: why Holdfast does not run it
    - `better`: with -o, a plan as in `ranking` that is better than `best` but that Holdfast does not run; else None
    - `judged`: how many candidates there were
    - `warnings`: sentences
    """
    question, best = found.question, found.best
    return {
        "model": _model(question),
        "cluster": _cluster(question),
        "goal": asdict(question.goal),
        "problem": nothing_fits(found) or None,
        "best": {**_plan(found, best), **_details(found)},
        "ranking": [_plan(found, some) for some in runners(found)],
        "better": _plan(found, found.better) if found.better else None,
        "judged": len(found.ranking),
        "warnings": warnings(found),
    }


def _model(question: Question) -> dict[str, Any]:
    shape = question.shape
    return {
        "name": shape.name,
        "params": shape.params,
        "active_params": shape.active_params,
        "layers": shape.num_layers,
        "hidden": shape.hidden,
        "weight_bits": shape.weight_bits,
        "expert_bits": shape.expert_bits,
        "max_context": shape.max_context,
    }


def _cluster(question: Question) -> dict[str, Any]:
    cluster = question.cluster
    return {
        "nodes": [
            {
                "name": node.name,
                "site": node.site,
                "devices": [device.name for device in node.devices],
                "network": _link(node.network) if node.network else None,
            }
            for node in cluster.nodes
        ],
        "between_sites": _link(cluster.between_sites) if len({node.site for node in cluster.nodes}) > 1 else None,
        "assumptions": list(cluster.assumptions),
    }


def _link(link: Link) -> dict[str, Any]:
    return {"name": link.name, "kind": link.kind, "bandwidth": link.bandwidth, "latency": link.latency}


def _plan(found: Found, some: Estimate) -> dict[str, Any]:
    served = some.served
    return {
        "name": some.candidate.name,
        "fits": some.fits,
        "pareto": is_pareto(found, some),
        "concurrency": some.concurrency,
        "ttft": served.ttft if served else None,
        "tpot": served.tpot if served else None,
        "throughput": some.throughput if served else None,
        "throughput_per_device": some.throughput_per_device if served else None,
        "cost": some.cost,
        "spare": some.spare,
        "kv_tokens": some.kv_tokens,
        "memory_used": some.memory_used,
        "refused": found.refuses(some) or None,
        "misses": list(some.misses),
        "why": why(found, some) or None,
    }


def _details(found: Found) -> dict[str, Any]:
    question, best = found.question, found.best
    timed = best.served is not None
    return {
        "replicas": _replicas(best.candidate),
        "memory": [_memory(stage) for stage in best.stages],
        "longest_context": longest_context(question, best),
        "token": dict(parts(question, best)) if timed else None,
        "first_token": dict(first_token_parts(question, best)) if timed else None,
        "exchanges": [_exchange(exchange) for exchange in exchanges(question, best)] if timed else [],
        "bands": {metric: error_band(question, metric) for metric in ("tpot", "ttft", "throughput")},
        "formulas": [
            {
                "section": line.section,
                "name": line.name,
                "formula": line.formula,
                "numbers": line.numbers,
                "value": line.value,
            }
            for line in formulas(found)
        ],
    }


def _replicas(candidate: Candidate) -> list[dict[str, Any]]:
    borders = [0]
    for count in candidate.layers:
        borders.append(borders[-1] + count)
    return [
        {
            "stages": [
                {
                    "layers": [borders[index], borders[index + 1]],
                    "device": group.device.name,
                    "devices": [list(place) for place in group.places],
                    "nodes": group.nodes,
                    "link": _link(group.slowest_link) if group.degree > 1 else None,
                }
                for index, group in enumerate(groups)
            ]
        }
        for groups in candidate.replicas
    ]


def _memory(stage: StageMemory) -> dict[str, Any]:
    held = {name: size for name, size in stage.memory.parts().items() if name != "kv_cache"}
    return {**held, "room_for_kv": stage.kv_room, "device": stage.device_bytes}


def _exchange(exchange: Exchange) -> dict[str, Any]:
    return {
        "stage": exchange.stage,
        "what": exchange.what,
        "times": exchange.times,
        "ranks": exchange.ranks,
        "link": _link(exchange.link),
        "measured": exchange.path.source == "measured",
        "message": exchange.message,
        "sent": exchange.sent,
        "seconds": exchange.seconds,
        "latency": exchange.latency,
        "imbalance": exchange.imbalance,
    }

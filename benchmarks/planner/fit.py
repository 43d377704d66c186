"""The few numbers of `holdfast/planner/coefficients.toml`, fitted to measured serving.

Least squares on the logarithm of predicted / measured, robust (a row that is five times off counts little more than
one that is twice off), each number drawn a little towards where it began: weakly where nothing else is known, more
strongly the shares of physical limits, so that they stay shares.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from holdfast.planner.coefficients import parse_coefficients
from holdfast.planner.rows.metrics import kind_of
from holdfast.planner.rows.predict import predict
from holdfast.planner.rows.questions import plain_row, serving_of

SHARES = (
    "memory", "memory_4bit", "kv", "matmul_16bit", "matmul_8bit", "matmul_4bit", "attention", "passes", "all_reduce",
)  # fmt: skip
LOAD = ("queue", "layer_context")
SERVING = ("layer", "layer_eager", "step", "first_token", "burst")
OF_ENGINE = {
    "trtllm": (*SERVING, "host_row", "front_request", "front_token", "front_prompt"),
    "vllm": (*SERVING, "row", "mixing", "matmul_blackwell"),
    "sglang": (*SERVING, "row", "mixing", "most_running"),
    "fastertransformer": ("matmul", "layer", "layer_eager", "step", "row"),
    "megatron": ("matmul", "layer", "layer_eager"),
    "layerwise": ("matmul", "group_reads", "layer", "layer_eager"),
}
PULLS = {"first_token": 0.4, "matmul_blackwell": 0.4}
SHORT, PULL_SHORT = {("sglang", "first_token"), ("sglang", "layer")}, 2.0
"""Of an engine, what cannot be far from where it began; else a short series is explained by it."""
PULL_SHARE, PULL = 0.4, 0.05
"""Standard deviations of the logarithm: 1 / pull · the scale of an error."""
WEIGHTS = {"prompt_layer": 0.2, "decode_layer": 0.2}
"""Single layers of an old engine: many rows, and the least of what is asked."""
MOST_SHARE = 0.95
FREE = 2.5
"""How far a logarithm may go from where it began."""
STEP = 1e-4
"""Of a logarithm, by which slopes are measured."""
SCALE = 0.1
"""Errors up to this, as a logarithm, are noise."""


START: dict[str, dict[str, float]] = {
    "efficiency": {
        "memory": 0.85, "memory_4bit": 0.7, "kv": 0.8, "matmul_16bit": 0.7, "matmul_8bit": 0.7, "matmul_4bit": 0.6,
        "attention": 0.4, "passes": 3, "sharpness": 2, "all_reduce": 0.9,
    },
    "load": {"queue": 0.9, "layer_context": 500},
    "engine": {
        "matmul": 0.8, "matmul_blackwell": 1, "group_reads": 2, "layer": 50, "layer_eager": 500, "step": 500,
        "row": 5, "host_row": 50, "mixing": 1, "burst": 0.2, "first_token": 50_000, "front_request": 2_000,
        "front_token": 80, "front_prompt": 2, "most_running": 450,
    },
    "run": {"cached": 0.5},
}  # fmt: skip
"""Where every fit begins and is drawn to, whatever was fitted before: what is written in textbooks of GPUs, or, of
engines, the order of magnitude."""


def names(tables: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], float]]:
    """Of all that is fitted: where it is in the file, and how strongly it is drawn to where it began."""
    for share in SHARES:
        yield ("efficiency", share), PULL_SHARE
    yield ("efficiency", "sharpness"), PULL_SHARE
    for load in LOAD:
        yield ("load", load), PULL
    for engine, parts in OF_ENGINE.items():
        for part in parts:
            pull = PULL_SHORT if (engine, part) in SHORT else PULLS.get(part, PULL)
            yield ("engine", engine, part), pull
    for index, run in enumerate(tables["run"]):
        if "cached" in run:
            yield ("run", str(index), "cached"), PULL


def _place(tables: dict[str, Any], path: tuple[str, ...]) -> tuple[Any, str]:
    where: Any = tables
    for part in path[:-1]:
        where = where[int(part)] if isinstance(where, list) else where[part]
    return where, path[-1]


def fit(tables: dict[str, Any], rows: list[dict[str, str]], rounds: int = 25) -> dict[str, Any]:
    """The tables with what fits `rows` best."""
    fitted = copy.deepcopy(tables)
    paths, pulls = zip(*names(fitted), strict=True)
    places = [_place(fitted, path) for path in paths]
    begin = np.log([START[path[0]][path[-1]] for path in paths])
    values = np.array([float(row["value"]) for row in rows])
    weights = np.array([WEIGHTS.get(kind_of(row["metric"]) or "", 1) for row in rows])
    concerned = [_concerned(fitted, path, rows) for path in paths]

    def logarithms(numbers: np.ndarray, some: np.ndarray) -> np.ndarray:
        """Of the predictions for some of the rows."""
        for (where, name), number in zip(places, np.exp(numbers), strict=True):
            where[name] = float(number)
        known = parse_coefficients(fitted)
        return np.log([predict(rows[index], known).value for index in some])

    def errors(numbers: np.ndarray) -> np.ndarray:
        off = logarithms(numbers, np.arange(len(rows))) - np.log(values)
        return np.concatenate([weights * off, np.array(pulls) * (numbers - begin)])

    def slopes(numbers: np.ndarray) -> np.ndarray:
        base, found = logarithms(numbers, np.arange(len(rows))), np.zeros((len(rows) + len(paths), len(paths)))
        for index, some in enumerate(concerned):
            moved = numbers.copy()
            moved[index] += STEP if moved[index] + STEP < most[index] else -STEP
            change = logarithms(moved, some) - base[some]
            found[some, index] = weights[some] * change / (moved[index] - numbers[index])
            found[len(rows) + index, index] = pulls[index]
        return found

    least, most = begin - FREE, begin + FREE
    for index, path in enumerate(paths):
        if path[-1] in SHARES and path[-1] != "passes":
            most[index] = np.log(MOST_SHARE)  # nothing is faster than its limit
        if path[-1] == "sharpness":
            least[index] = 0
    begin = np.clip(begin, least + 1e-6, most - 1e-6)
    bounds = (least, most)
    best = least_squares(errors, begin, jac=slopes, bounds=bounds, loss="soft_l1", f_scale=SCALE, max_nfev=rounds)
    errors(best.x)
    for where, name in places:
        where[name] = float(f"{where[name]:.4g}")
    return fitted


def _concerned(tables: dict[str, Any], path: tuple[str, ...], rows: list[dict[str, str]]) -> np.ndarray:
    """Numbers of the rows whose prediction a coefficient may change: all, those of an engine, those of a series."""
    if path[0] == "engine":
        some = [serving_of(plain_row(row)).engine == path[1] for row in rows]
    elif path[0] == "run":
        some = [tables["run"][int(path[1])]["source"] in row["source"] for row in rows]
    else:
        some = [True for _ in rows]
    return np.flatnonzero(some)


COMMENTS = {
    "efficiency": "Shares of physical limits. `passes`: how often activations are read or written; `sharpness`: of\n"
    "# the roofline's corner.",
    "load": "Of measurements with a fixed number of clients: how much of Little's law their waiting shows; and the\n"
    "# context at which single layers were measured.",
    "engine": "Times in microseconds.",
    "run": "What is peculiar to a published series: the share of prompts that its prefix cache had, places that the\n"
    "# engine kept for itself, tokens that its server sent at once. Found in the residuals; for its rows only.",
    "bands": "Nine in ten rows that were not fitted are within this factor.",
}


def toml_of(tables: dict[str, Any]) -> str:
    """The text of `coefficients.toml`."""
    lines = ["# Written by `python -m benchmarks.planner --write`."]

    def table(header: str, values: dict[str, Any]) -> None:
        lines.extend(["", header])
        lines.extend(f"{key} = {json.dumps(value)}" for key, value in values.items())

    for name, values in tables.items():
        lines.extend(["", f"# {COMMENTS[name]}"])
        if isinstance(values, list):
            for entry in values:
                table(f"[[{name}]]", entry)
        elif all(isinstance(value, dict) for value in values.values()):
            for key, entry in values.items():
                table(f"[{name}.{key}]", entry)
        else:
            table(f"[{name}]", values)
    return "\n".join(lines) + "\n"

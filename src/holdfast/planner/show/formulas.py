"""The arithmetic of the chosen plan with its numbers filled in: formula = numbers = result, line by line.

The results are worked out here from what each line shows; the tests compare them with the estimate, and the numbers
of each line with its result.
"""

from __future__ import annotations

import math
from itertools import groupby

from rich.console import Console
from rich.text import Text

from holdfast.planner.estimate import Estimate, Question, price_per_hour
from holdfast.planner.search import Found
from holdfast.planner.serving import FRONT_SHARPNESS, Replica, Workload, in_front, step_of
from holdfast.planner.show.breakdown import prompt_parts, replica_of, workload_of
from holdfast.planner.show.formulas_memory import memory_lines
from holdfast.planner.show.formulas_step import step_lines
from holdfast.planner.show.lines import Line, number, seconds_of
from holdfast.planner.timing import rounded_max

USERS = "What users see"


def formulas(found: Found) -> list[Line]:
    """Of the chosen plan: memory of its fullest rank, a decoding step and one with a prompt at the slowest stage,
    what users see. Where nothing fits, memory only."""
    question, best = found.question, found.best
    lines = memory_lines(question, best)
    if best.served is None:
        return lines
    return lines + _step_lines(question, best) + _user_lines(question, best)


def show_formulas(found: Found, console: Console) -> None:
    """Print them, a heading for each section."""
    for section, lines in groupby(formulas(found), key=lambda line: line.section):
        console.print(Text(f"\n{section}", style="bold"))
        for line in lines:
            text = Text("  ")
            text.append(f"{line.name} = {line.formula}\n")
            text.append(f"      = {line.numbers}\n", style="dim")
            text.append("      = ").append(line.result, style="bold")
            console.print(text, soft_wrap=True)


def _step_lines(question: Question, some: Estimate) -> list[Line]:
    """The slowest stage's step, with prompts and without: what they add, others wait for."""
    served, replica, workload = some.served, replica_of(question, some), workload_of(question, some)
    assert served is not None
    together = replica.prompts_together(workload, served.running)
    batch = replica.rows(workload, served.running)
    with_prompts = replica.rows_with_prompts(workload, served.running, together)
    before, after = ([time.total for time in replica.step(rows)] for rows in (batch, with_prompts))
    added = [(more - less) / together for more, less in zip(after, before, strict=True)]
    slowest = added.index(max(added))
    prompts = "a prompt" if together == 1 else f"{together:.3g} prompts"
    where = f" of stage {slowest}, to which prompts add most" if len(replica.stages) > 1 else ""
    lines = step_lines(f"A decoding step{where}", replica.stages[slowest], batch, replica)
    lines += step_lines(f"A step with {prompts}{where}", replica.stages[slowest], with_prompts, replica)
    lines.append(
        Line(
            lines[-1].section, "what a prompt adds", "(step with prompts − step without) / prompts",
            f"({seconds_of(after[slowest])} − {seconds_of(before[slowest])}) / {number(together)}", added[slowest],
            seconds_of(added[slowest]),
        )
    )  # fmt: skip
    return lines


def _user_lines(question: Question, some: Estimate) -> list[Line]:
    """TPOT and TTFT of a request, tokens per second of all replicas, cost."""
    served, goal, workload = some.served, question.goal, workload_of(question, some)
    assert served is not None
    replica, output = replica_of(question, some), goal.output_len
    step, gaps = served.step, max(output - 1, 1)
    lines = [_all_stages(some)]
    prompt = sum(prompt_parts(question, some).values())
    mixing = replica.engine.mixing
    wait = (served.running - 1) * prompt * mixing / gaps
    shares = (
        Line(
            USERS, "others' prompts", "(requests at once − 1) × what a prompt adds to a step × mixing / (output − 1)",
            f"({number(served.running)} − 1) · {seconds_of(prompt)} · {number(mixing)} / {gaps}", wait,
            seconds_of(wait),
        ),
        Line(
            USERS, "TPOT", "all stages + others' prompts", f"{seconds_of(step)} + {seconds_of(wait)}", step + wait,
            seconds_of(step + wait),
        ),
    )  # fmt: skip
    first = _first_token_lines(served.running, prompt, workload, replica)
    ttft = sum(line.value for line in first)
    lines += [
        *shares, *first,
        Line(
            USERS, "TTFT", " + ".join(line.name for line in first),
            " + ".join(seconds_of(line.value) for line in first), ttft, seconds_of(ttft),
        ),
    ]  # fmt: skip
    return lines + _rate_lines(question, some, ttft, step + wait)


def _all_stages(some: Estimate) -> Line:
    """Equal stages together."""
    assert some.served is not None
    runs = [(time, len(list(same))) for time, same in groupby(time.total for time in some.served.decode)]
    total = sum(time * count for time, count in runs)
    if some.served.step > total:
        slowest = max(time for time, _ in runs)
        times = min(len(some.served.decode), some.served.running)
        return Line(
            USERS, "all stages", "parts in flight × the slowest stage, for which the others wait",
            f"{number(times)} · {seconds_of(slowest)}", some.served.step, seconds_of(some.served.step),
        )  # fmt: skip
    numbers = " + ".join(f"{count} · {seconds_of(time)}" if count > 1 else seconds_of(time) for time, count in runs)
    return Line(USERS, "all stages", "the step of every stage, one after another", numbers, total, seconds_of(total))


def _first_token_lines(running: float, prompt: float, workload: Workload, replica: Replica) -> list[Line]:
    engine, load = replica.engine, replica.known.load
    step = step_of([time.total for time in replica.decode(workload, running)], running)
    through, _ = replica.prompt(workload, running)
    chunks = math.ceil(workload.input_len / engine.chunk)
    first = engine.burst
    lines = [
        _plain("the engine", "before a prompt and after its token", engine.first_token),
        _plain("its prompt", "what it adds to a step of each stage", through),
        Line(
            USERS, "steps meanwhile", "(steps of its prompt + ½) × all stages",
            f"({chunks} + 0.5) · {seconds_of(step)}",
            (chunks + 0.5) * step, seconds_of((chunks + 0.5) * step),
        ),
        Line(
            USERS, "prompts of the same time", "share of those that come together × (requests − 1) / 2 × a prompt",
            f"{number(first)} · ({number(running)} − 1) / 2 · {seconds_of(prompt)}",
            first * (running - 1) / 2 * prompt, seconds_of(first * (running - 1) / 2 * prompt),
        ),
    ]  # fmt: skip
    wait = (running - 1) * prompt * engine.mixing / max(workload.output_len - 1, 1)
    total = sum(line.value for line in lines) + (step + wait) * workload.output_len
    queue = 0.0
    if workload.concurrency > running:
        queue = total * (workload.concurrency / running - 1) * load["queue"]
        lines.append(
            Line(
                USERS, "waiting for room", "a request's time × (requests / at once − 1) × share",
                f"{seconds_of(total)} · ({workload.concurrency} / {number(running)} − 1) · {number(load['queue'])}",
                queue, seconds_of(queue),
            )
        )  # fmt: skip
    busy = workload.concurrency * in_front(engine, workload)
    front = rounded_max(total + queue, busy, FRONT_SHARPNESS) - total - queue
    if front > 1e-6:
        lines.append(_plain("the process in front", "what it is busy longer than a request takes", front))
    return lines


def _plain(name: str, formula: str, value: float) -> Line:
    return Line(USERS, name, formula, seconds_of(value), value, seconds_of(value))


def _rate_lines(question: Question, some: Estimate, ttft: float, tpot: float) -> list[Line]:
    goal, copies = question.goal, len(some.candidate.replicas)
    busy: float = min(some.concurrency, goal.concurrency or some.concurrency)
    words, waited, served = "requests × output / (TTFT + (output − 1) × TPOT)", 0.0, some.served
    assert served is not None
    at_once = served.running * copies * busy / some.concurrency
    cycle, waits = ttft + tpot * (goal.output_len - 1), served.queue + served.front
    if at_once / (cycle - waits) < busy / cycle:
        words, busy, waited = "requests at once × output / (TTFT + (output − 1) × TPOT − waits)", at_once, waits
    rate = busy * goal.output_len / (cycle - waited)
    less = f" − {seconds_of(waited)}" if waited else ""
    lines = [
        Line(
            USERS, "tokens/s", words,
            f"{number(busy)} · {goal.output_len} / ({seconds_of(ttft)} + ({goal.output_len} − 1) · "
            f"{seconds_of(tpot)}{less})",
            rate, f"{rate:,.1f}",
        )
    ]  # fmt: skip
    price = price_per_hour(question.cluster, some.candidate)
    if price is not None:
        cost = price / (rate * 3600) * 1e6
        lines.append(
            Line(
                USERS, "cost of a million tokens", "price per hour / (tokens/s × 3600) × 1,000,000",
                f"{number(price)} / ({rate:.1f} · 3600) · 1e6", cost, f"{cost:.4g}",
            )
        )  # fmt: skip
    lines.append(
        Line(
            USERS, "left when a rank is lost", "(replicas − 1 + what one does without a rank) / replicas",
            f"({copies} − 1 + {some.reshaped:.6g}) / {copies}", some.spare, f"{some.spare:.3g}",
        )
    )  # fmt: skip
    return lines

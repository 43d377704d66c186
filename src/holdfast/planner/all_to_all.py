"""What expert parallelism over several replicas sends: every layer's rows to the ranks that hold their experts, and
the results back (DeepEP's dispatch and combine; DeepSeek-V3, arXiv:2412.19437, section 3.2.2).

A replica's t ranks have the same rows, so each sends a t-th of them. Of n ranks a row with k experts, chosen evenly,
goes to n · (1 − (1 − 1/n)^k) in the mean, once to each, and one in n of these is the sender itself. All wait for the
rank that gets most (`communication.imbalance`). Ranks of one replica that share out experts between them need none
of this: they have all rows, and their sums meet in the all-reduce that follows the layer anyway.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from holdfast.planner.communication import Path, imbalance
from holdfast.planner.shapes.shape import Experts, Layer

BYTES = 2
"""Of a number of a row, there and back: 16 bits."""


@dataclass(frozen=True, slots=True)
class AllToAll:
    """One way of one layer, of the busiest rank."""

    message: float
    """Bytes to and from all ranks, itself among them."""
    sent: float
    """Of these, bytes that leave the rank."""
    imbalance: float
    """How much more than the mean that is."""


def all_to_all(experts: Experts, hidden: int, rows: float, *, tensor: int, ranks: int) -> AllToAll:
    """`rows` of each replica, whose layers `tensor` ranks share; experts on `ranks` ranks of all replicas."""
    mine = rows / tensor
    goes_to = ranks * (1 - (1 - 1 / ranks) ** experts.num_chosen)
    busiest = imbalance(experts.num_experts, ranks, mine * ranks * experts.num_chosen)
    message = mine * goes_to * hidden * BYTES * busiest
    return AllToAll(message, message * (ranks - 1) / ranks, busiest)


def all_to_all_seconds(
    path: Path, kinds: Iterable[tuple[Layer, int]], hidden: int, rows: float, *, tensor: int, ranks: int
) -> float:
    """Of all layers of a stage, both ways."""
    return sum(
        2 * count * path.time(all_to_all(layer.experts, hidden, rows, tensor=tensor, ranks=ranks).sent)
        for layer, count in kinds
        if layer.experts is not None
    )

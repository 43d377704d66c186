"""The ranks of a replica as threads of this process, each with kernels and a share of the weights of its own. What
passes between them is what passes between processes: memory that is shared through a file descriptor."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from holdfast.core.plan import Place, ReplicaPlan, places
from holdfast.core.spec import ModelInfo
from holdfast.kernels.cpu.kernels import CpuKernels
from holdfast.models.decoder import Decoder
from holdfast.models.load import load_decoder
from holdfast.parallel.segment import Layout, RankTally, attach, create, read_tally
from holdfast.parallel.shared import SharedCollectives

TIMEOUT = 60.0


@dataclass
class Ranks:
    """`decoders`: in the order of `places`."""

    decoders: list[Decoder]
    layout: Layout
    tallies: Callable[[], list[RankTally]]

    def run(self, body: Callable[[Decoder], object]) -> list[object]:
        """`body` for every rank at once; what each returned. When one raises, the others do not wait for it."""

        def guarded(decoder: Decoder) -> object:
            try:
                return body(decoder)
            except BaseException:
                if decoder.collectives is not None:
                    decoder.collectives.abort()
                raise

        with ThreadPoolExecutor(len(self.decoders)) as pool:
            futures = [pool.submit(guarded, decoder) for decoder in self.decoders]
            return [future.result() for future in futures]


@contextmanager
def ranks_of(
    info: ModelInfo,
    replica: ReplicaPlan,
    dtype: torch.dtype,
    *,
    max_tokens: int = 512,
    bits: int = 16,
    timeout: float = TIMEOUT,
) -> Iterator[Ranks]:
    layout = Layout(replica, info.spec, max_tokens, max_tokens)
    descriptor = create(layout.num_bytes)
    try:
        memories = [attach(descriptor, layout) for _ in range(replica.num_ranks)]

        def load(place: Place) -> Decoder:
            kernels = CpuKernels(dtype, threads=1, activation_bits=bits)
            memory = memories[layout.first_rank[place.stage] + place.index]
            collectives = None
            if not place.is_alone:
                collectives = SharedCollectives(kernels, info.spec, place, layout, memory, timeout)
            return load_decoder(info, kernels, dtype, "cpu", place=place, collectives=collectives)

        def tallies() -> list[RankTally]:
            return [read_tally(memories[0], layout, place.stage, place.index) for place in places(replica)]

        yield Ranks([load(place) for place in places(replica)], layout, tallies)
    finally:
        os.close(descriptor)


def logits_of(
    info: ModelInfo,
    replica: ReplicaPlan,
    dtype: torch.dtype,
    run: Callable[[Decoder], Sequence[torch.Tensor]],
    **options: int,
) -> list[Sequence[torch.Tensor]]:
    """What `run` makes of the decoder, from every rank of the last stage."""
    with ranks_of(info, replica, dtype, **options) as ranks:
        results = ranks.run(run)
    return [result for result in results if result]  # type: ignore[misc]

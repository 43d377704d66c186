"""The engine's side of the checkpoint store, with a real scheduler and a real store, and workers that remember what
was written where."""

from __future__ import annotations

from dataclasses import dataclass, field

from holdfast.cache.blocks import BlockPool
from holdfast.cluster.keeper import _AGAIN_SECONDS, PATIENCE_SECONDS, Keeper
from holdfast.core.checkpoints import Find, Forget, Found, Keep, Kept
from holdfast.core.config import SchedulerConfig
from holdfast.core.request import SamplingParams
from holdfast.core.wire import BlocksLoaded, LoadBlocks, SampledToken, SaveBlocks, StepResult, Submit
from holdfast.schedule.scheduler import Scheduler

SIZE = 4


@dataclass
class Replica:
    """An engine without its sockets. `slots`: what is in the store, by hash; `listens`: whether it answers."""

    slots: dict[bytes, int] = field(default_factory=dict)
    num_ranks: int = 2
    num_blocks: int = 32
    max_model_len: int = 100
    listens: bool = True

    def __post_init__(self) -> None:
        self.time = 0.0
        self.asked: list[Keep | Find | Forget] = []
        self.told: list[SaveBlocks | LoadBlocks] = []
        self.broken: list[int] = []
        """Places of blocks that one of the ranks finds broken."""
        config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64)
        self.pool = BlockPool(self.num_blocks, SIZE)
        self.scheduler = Scheduler(config, self.pool, max_model_len=self.max_model_len, eos_token_ids=frozenset())
        self.keeper = Keeper(self.pool, self.num_ranks, self.asked.append, self.told.append, lambda: self.time)

    def submit(self, name: str, tokens: list[int], output: list[int] | None = None) -> None:
        params = SamplingParams(seed=0, max_tokens=50)
        self.keeper.look_up(self.scheduler.add(Submit(name, tokens, params, output_token_ids=output or [])))

    def turn(self) -> dict[str, int]:
        """The store and the workers answer, a step is made; tokens computed of each request."""
        self.keeper.keep(self.scheduler.take_news()[0])
        self.keeper.look()
        self.answer()
        self.keeper.prepare(self.scheduler.upcoming(8), len(self.scheduler.running))
        for message in self.told:
            if isinstance(message, LoadBlocks):
                for rank in range(self.num_ranks):
                    self.keeper.loaded(BlocksLoaded(message.load_id, self.broken if rank else []))
        self.told.clear()
        step = self.scheduler.schedule()
        self.keeper.save()
        self.scheduler.check_integrity() if not self.keeper.is_loading else None
        if step is None:
            return {}
        names = [request.request_id for request in [*step.new, *step.continued]]
        ends = [sequence.request_id for sequence in self.scheduler.running if sequence.num_pending]
        self.scheduler.update(StepResult(step.step_id, [SampledToken(name, 7) for name in ends], []))
        return dict(zip(names, step.num_tokens, strict=True))

    def answer(self) -> None:
        asked, self.asked[:] = self.asked[:], []
        for message in asked if self.listens else []:
            match message:
                case Keep(blocks):
                    new = [(block, self.slots.setdefault(block, len(self.slots))) for block, _ in blocks]
                    self.keeper.kept(Kept(new))
                case Find(key, blocks):
                    run = [block for block in blocks if block in self.slots]
                    self.keeper.found(Found(key, [self.slots[block] for block in run]))
                case Forget(blocks):
                    for block in blocks:
                        self.slots.pop(block, None)


PROMPT = list(range(30))


def kept_by_another() -> dict[bytes, int]:
    """What a replica that has run `PROMPT` has left in the store."""
    first = Replica()
    first.submit("a", PROMPT)
    assert first.turn() == {"a": 30}
    for _ in range(4):
        first.turn()
    first.keeper.keep(first.scheduler.take_news()[0])
    first.answer()
    first.keeper.save()
    assert len(first.slots) == 8, "34 tokens"
    assert first.keeper.num_saved == 8
    return first.slots


def test_a_request_goes_on_after_what_is_in_the_store():
    second = Replica(kept_by_another())
    second.submit("a", PROMPT, [7, 7, 7])
    assert second.turn() == {"a": 1}, "33 tokens, 8 blocks"
    assert second.keeper.num_restored == 8
    assert second.turn() == {"a": 1}
    second.submit("b", PROMPT)
    assert second.turn() == {"b": 2, "a": 1}, "it is in the prefix cache now: nobody asks"


def test_what_is_broken_is_computed_and_kept_anew():
    """Whichever rank finds it. The store forgets all that was broken, not the first alone: the next one who needs
    them has them again."""
    slots = kept_by_another()
    second = Replica(dict(slots))
    second.broken = [3, 5]
    second.submit("a", PROMPT)
    assert second.turn() == {"a": 30 - 3 * SIZE}
    second.answer()
    assert second.keeper.num_broken == 2
    assert len(second.slots) == len(slots) - 2
    second.broken = []
    second.turn()
    second.turn()
    assert second.slots.keys() == slots.keys()
    third = Replica(second.slots)
    third.submit("a", PROMPT)
    assert third.turn() == {"a": 2}


def test_a_store_that_is_silent_is_not_waited_for():
    second = Replica(kept_by_another(), listens=False)
    second.submit("a", PROMPT)
    assert second.turn() == {}
    assert second.keeper.is_busy
    second.time += PATIENCE_SECONDS + 0.01
    assert second.turn() == {"a": 30}
    assert not second.keeper.is_busy
    second.submit("b", [*PROMPT, 1])
    assert "b" in second.turn(), "nor asked again"
    second.listens = True
    second.time += _AGAIN_SECONDS + 0.01
    second.turn()  # it is asked for slots again, and answers
    second.submit("c", [9] * 20)
    assert any(isinstance(message, Find) for message in second.asked)


def test_requests_that_end_meanwhile_leave_nothing():
    """While the store looks, and while blocks are filled: the blocks become cached ones."""
    second = Replica(kept_by_another())
    second.submit("a", PROMPT)
    second.scheduler.abort(["a"])
    second.answer()
    assert not second.keeper.is_busy
    second.submit("b", PROMPT)
    second.answer()
    second.keeper.prepare(second.scheduler.upcoming(8), 0)
    assert second.keeper.is_loading
    second.scheduler.abort(["b"])
    assert second.pool.num_available == second.num_blocks - 7
    assert second.turn() == {}
    assert second.pool.num_available == second.num_blocks
    second.submit("c", PROMPT)
    assert second.turn() == {"c": 2}


def test_blocks_are_filled_where_there_is_room():
    """Not in place of what runs; whoever finds none waits as for any other block."""
    second = Replica(kept_by_another(), num_blocks=26)
    second.submit("big", [5] * 76)
    assert second.turn() == {"big": 64}
    assert second.turn() == {"big": 12}
    second.submit("a", PROMPT)
    assert second.turn() == {"big": 1}
    assert second.keeper.num_restored == 0
    second.scheduler.abort(["big"])
    assert second.turn() == {"a": 2}


def test_a_preempted_request_is_looked_up_again():
    replica = Replica(num_blocks=25)
    replica.submit("a", [1] * 40)
    replica.submit("b", [2] * 40)
    computed: dict[str, list[int]] = {"a": [], "b": []}
    for _ in range(70):
        for name, count in replica.turn().items():
            computed[name].append(count)
    assert replica.keeper.num_restored > 5, "its blocks had been given away"
    assert max(computed["b"][2:]) < 16, computed["b"]


def test_who_is_let_in_waits_for_blocks_that_are_being_filled_for_another():
    """With nobody running, too: the pool is small, and the next in line wants more than the other's load leaves."""
    replica = Replica(kept_by_another(), num_blocks=12, max_model_len=48)
    replica.submit("b", list(range(100, 124)))
    replica.submit("a", PROMPT)
    replica.answer()
    replica.keeper.prepare(replica.scheduler.upcoming(8), 0)
    [load] = replica.told
    assert isinstance(load, LoadBlocks)
    assert len(load.blocks) > 12 - 6
    assert replica.scheduler.schedule() is None
    assert replica.turn() == {"b": 24}

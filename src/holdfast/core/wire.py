"""Every message that crosses a process border: msgspec structs in msgpack, never pickle.

    gateway ──ToEngine──▶ engine ──ToWorker──▶ worker
    gateway ◀──ToGateway── engine ◀──ToEngineFromWorker── worker
What the checkpoint store and the supervisor say is in `core.checkpoints` and `core.lifecycle`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from holdfast.core import message
from holdfast.core.message import Message
from holdfast.core.plan import ExpertPlacement
from holdfast.core.request import SamplingParams, TokenLogprobs

encode, decoder = message.encode, message.decoder

FinishReason = Literal["stop", "length", "error"]


# --- gateway → engine ------------------------------------------------------------------------------


class Submit(Message, frozen=True):
    """Run one request. `request_id` is unique among live requests; `priority`: lower runs sooner."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    output_token_ids: list[int] = msgspec.field(default_factory=list)
    """What another replica has given it already: the request goes on after that."""
    gateway: int = 0
    """Epoch of the gateway that asks."""


class Abort(Message, frozen=True):
    """Forget these requests and free their blocks. Answered by nothing; unknown ids are ignored."""

    request_ids: list[str]
    gateway: int = 0


class Hello(Message, frozen=True):
    """A gateway, of this epoch, is there, or its way to this replica is another: what was asked before is forgotten.
    Answered by `EngineReady` once the engine is."""

    gateway: int
    serial: int = 0
    """How often this gateway has lost the replica before."""


class CheckWeights(Message, frozen=True):
    """Are the weights still what was loaded? Passed on to every worker; answered by `WeightsChecked` of each."""

    key: str
    gateway: int = 0


ToEngine = Submit | Abort | Hello | CheckWeights

# --- engine → gateway ------------------------------------------------------------------------------


class TokenOutput(Message, frozen=True):
    """What one step added to one request.

    `start` is the index of `token_ids[0]` in the request's output: the receiver drops what it already has.
    The message that carries a `finish` is the last one of its request.
    """

    request_id: str
    start: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    """One per token, when the request asked for them."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Once, with the first output: entries for prompt tokens 1 … n-1 (token 0 has no prediction)."""
    finish: FinishReason | None = None
    stop_token_id: int | None = None
    """The token that ended the request, when it was one of `stop_token_ids` or an end-of-sequence token."""
    num_cached_tokens: int = 0
    """Tokens taken from the prefix cache instead of being computed, with the first output after a `Submit`; or, as
    long as that is the request's first, of its last start."""
    error: str | None = None


class RankStats(Message, frozen=True):
    """What a rank has done with the others since it started. Seconds."""

    rank: str
    steps: int
    exchanges: int
    bytes_read: int
    """Of other ranks' numbers."""
    expert_rows: int
    """Rows that went through experts of this rank, once for each."""
    step_seconds: float
    """All of its steps, waits included; on CPUs."""
    waited_seconds: float
    """Of them: for the ranks of its own stage."""
    idle_seconds: float
    """Of them: for the stage before, or for room in the next."""
    moves: int
    """Grow while the rank does anything."""


class EngineStats(Message, frozen=True):
    """Gauges are now, counters since the engine's start."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_used_blocks: int
    """Blocks that live requests hold; cached blocks nobody holds do not count."""
    prefix_queries: int
    """Counter: prompt tokens looked up in the prefix cache."""
    prefix_hits: int
    """Counter: prompt tokens found there."""
    preemptions: int
    saved_blocks: int = 0
    """Counter: that went to the checkpoint store."""
    restored_blocks: int = 0
    """Counter: that came back from it."""
    retries: int = 0
    """Counter: requests that were computed anew, because their logits were not finite."""
    broken_blocks: int = 0
    """Counter: that were not what they should be."""
    ranks: list[RankStats] = msgspec.field(default_factory=list)
    """Of a replica that has several."""


class Outputs(Message, frozen=True):
    """Everything one step produced, and the engine's state after it."""

    replica: int
    epoch: int
    """Of the engine: how often one of this replica was started before it."""
    outputs: list[TokenOutput]
    stats: EngineStats
    gateway: int = 0
    """Epoch of the gateway that is answered."""


class EngineReady(Message, frozen=True):
    """The replica can take requests."""

    replica: int
    epoch: int
    max_model_len: int
    """Tokens a request may hold, prompt and output together."""
    gateway: int = 0
    num_ranks: int = 1
    weights_kept: int = 0
    """Bytes of weights that workers had in memory from before the last loss."""
    weights_loaded: int = 0
    """And that they had to read."""
    serial: int = 0
    """Of the greeting that it answers."""


class WeightsChecked(Message, frozen=True):
    """What a rank found, and its engine passes on."""

    rank: str
    key: str
    num_bytes: int
    seconds: float
    wrong: list[str]
    """Names of matrices and norms that have changed."""
    gateway: int = 0

    @property
    def replica(self) -> int:
        return int(self.rank.partition(".")[0])


ToGateway = Outputs | EngineReady | WeightsChecked

# --- engine → worker -------------------------------------------------------------------------------


class NewRequest(Message, frozen=True):
    """A request the worker does not hold: new, or back from preemption.

    `token_ids` is all of it, prompt and output so far; the first `num_computed` are in the cache already.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    block_ids: list[int]
    num_computed: int


class ContinuedRequest(Message, frozen=True):
    """A request the worker holds: what changed since the last step that named it."""

    request_id: str
    first_new: int
    """The index of `new_token_ids[0]`: the worker may know some or all of them, since it sampled them."""
    new_token_ids: list[int]
    """Tokens accepted since then. There may be more that only the worker knows: sampled in a step whose result is
    still on its way."""
    new_block_ids: list[int]
    num_computed: int


class Step(Message, frozen=True):
    """One forward pass, as a diff. `num_tokens[i]` tokens are computed for the i-th of `new` + `continued`.

    A request is sampled when the step computes its last token, and the worker appends what it sampled. One that it
    does not hold (a step that named it has failed) is passed over.
    """

    step_id: int
    new: list[NewRequest]
    continued: list[ContinuedRequest]
    num_tokens: list[int]
    dropped: list[str]
    """Requests the worker shall forget before it runs: finished, aborted or preempted."""


class PlaceExperts(Message, frozen=True):
    """Get ready for experts placed otherwise; go on meanwhile. Answered by `ExpertsLoaded`."""

    stages: tuple[tuple[ExpertPlacement, ...], ...]
    """Placements of every stage, as in its plan."""


class UseExperts(Message, frozen=True):
    """From the next step on the experts are as placed."""


class DropExperts(Message, frozen=True):
    """The experts stay where they are; what was loaded for the placement is not needed."""


class SaveBlocks(Message, frozen=True):
    """Copy these full blocks into the checkpoint store. Not answered."""

    blocks: list[tuple[int, int, bytes]]
    """Block, slot, prefix hash."""


class LoadBlocks(Message, frozen=True):
    """Fill these blocks from the checkpoint store, in this order. Answered by `BlocksLoaded`."""

    load_id: int
    blocks: list[tuple[int, int, bytes]]


class ClearBlocks(Message, frozen=True):
    """Make all numbers of these blocks 0. Not answered."""

    blocks: list[int]


ToWorker = Step | PlaceExperts | UseExperts | DropExperts | SaveBlocks | LoadBlocks | ClearBlocks | CheckWeights
"""Every worker of a replica gets the same, in the same order. Stop comes from the supervisor."""

# --- worker → engine -------------------------------------------------------------------------------


class WorkerReady(Message, frozen=True):
    """Weights are loaded; the device has room for `num_blocks` blocks of KV."""

    rank: str
    num_blocks: int
    runs_ahead: bool = False
    """A second step may be sent while one is running: the device is not kept waiting for the engine."""
    counts_operations: bool = False
    """Within a step, too, others see that it moves."""
    weights_kept: int = 0
    """Bytes that it had in memory from its last place."""
    weights_loaded: int = 0


NO_NUMBERS = -1


class SampledToken(Message, frozen=True):
    """The next token of one request."""

    request_id: str
    token_id: int
    """`NO_NUMBERS`: there is none, the logits were not finite."""
    logprobs: TokenLogprobs | None = None


class PromptLogprobs(Message, frozen=True):
    """Logprobs of a stretch of a request's prompt (a chunk's worth), in order."""

    request_id: str
    entries: list[TokenLogprobs]


class StepResult(Message, frozen=True):
    """What a step sampled: one entry per request whose last token the step computed."""

    step_id: int
    sampled: list[SampledToken]
    prompt_logprobs: list[PromptLogprobs]


class StepError(Message, frozen=True):
    """The step raised; the worker has forgotten every request named in it."""

    step_id: int
    rank: str
    error: str
    out_of_memory: bool = False
    """The device had no room for the step: a smaller one may succeed."""


class ExpertsLoaded(Message, frozen=True):
    """All that `PlaceExperts` asks for is here, or (`error`) cannot be."""

    rank: str
    num_loaded: int
    """Experts, of all layers, that were not there before."""
    error: str = ""


class BlocksLoaded(Message, frozen=True):
    """All of the blocks are filled, but for those that are not what they should be."""

    load_id: int
    broken: list[int]
    """Their places in `LoadBlocks.blocks`."""


ToEngineFromWorker = WorkerReady | StepResult | StepError | ExpertsLoaded | BlocksLoaded | WeightsChecked

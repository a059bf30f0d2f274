"""The messages of protocol version 1, as frozen values.

Agents send `AgentMessage`s to the daemon (PUSH to PULL); the daemon sends `ControlMessage`s to agents (PUB to SUB,
topic = run name). `codec` turns both into bytes and back.

``source`` is a nonce of the sending process and ``seq`` counts that process's sequenced messages from 1. The daemon
takes them in order, writes them to the recording, and acknowledges the highest one written with `Received`; until then
the agent keeps them. A `Heartbeat` is not sequenced (``seq`` 0) and says through ``oldest`` which sequence number the
agent can still resend, so that a gap is either on its way again or counted as lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sosa_stream.protocol.actions import Action

PROTOCOL_VERSION = 1


class Phase(StrEnum):
    """Where in the step the training thread is."""

    START = "start"
    DATA = "data"
    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"
    EVAL = "eval"
    CHECKPOINT = "checkpoint"
    END = "end"


class AckState(StrEnum):
    """How far a command has come on one rank."""

    HELD = "held"
    REJECTED = "rejected"
    COMMITTED = "committed"
    APPLIED = "applied"
    FAILED = "failed"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Who sent an agent message."""

    run: str
    generation: str
    source: str
    rank: int
    world_size: int
    host: str
    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """A rank has joined a generation. ``policy`` holds the run's mode, what auto may do, and the limits.

    ``pod`` is the rank's in Kubernetes, or empty. ``process`` says which process of all this is (`processes.identity`),
    ``memory_limit_bytes`` how much memory all processes of its host or container may have; empty and 0 where unknown.
    ``own_topic``: this process hears at a topic of its own what was received of it.
    """

    header: Header
    pid: int
    device: str
    versions: Mapping[str, str]
    parameters: tuple[str, ...]
    policy: Mapping[str, Any]
    pod: str = ""
    process: str = ""
    memory_limit_bytes: int = 0
    own_topic: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """Once a second from the agent's own thread, so that a stuck training thread is told apart from a dead process.

    ``dropped`` counts frames that the agent's full ring gave up; ``oldest`` is the lowest sequence number still held.
    ``memory_bytes`` is the process's resident set, ``device_memory_bytes`` what torch has allocated on its device, of
    ``device_limit_bytes``; 0 where unknown. ``gpu_uuid`` is that device, as NVML and DCGM name it, or empty. These are
    here and not in `Hello`, because a script may choose its device long after it has joined. ``epoch_batches`` is how
    many batches an epoch of the DataLoader in use has, 0 where unknown.
    """

    header: Header
    tick: int
    step: int
    phase: Phase
    oldest: int
    dropped: int
    memory_bytes: int = 0
    device_memory_bytes: int = 0
    device_limit_bytes: int = 0
    gpu_uuid: str = ""
    epoch_batches: int = 0


def _are_equal(one: object, other: object, names: tuple[str, ...]) -> bool:
    """Whether these arrays of two messages are, NaN for NaN."""
    return all(np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True) for name in names)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MetricFrame:
    """A columnar batch: ``steps`` int64 of shape (n,), ``values`` float64 of shape (n, len(columns))."""

    header: Header
    columns: tuple[str, ...]
    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, MetricFrame)
            and self.header == other.header
            and self.columns == other.columns
            and np.array_equal(self.steps, other.steps)
            and np.array_equal(self.values, other.values, equal_nan=True)
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layers:
    """Every parameter of the model at one step, once in a while: rank 0 sends it.

    ``norms`` float32 of shape (len(names),): the gradient's 2-norm, NaN where the parameter got none. ``orphans`` are
    the names of those that got one and belong to no optimizer. ``num_parameters``: how many there are, of which at most
    1,024 are named; 0 where the agent has not said. The others have the shape of ``norms`` where
    ``agent.layers_every`` asks for them, and shape (0,) elsewhere: ``num_nan`` and ``num_inf`` int64, elements of the
    gradient that are not finite; ``weights`` float32, the parameter's 2-norm before the step; ``updates`` float32, that
    of what the step did to it, NaN where it was kept from the weights.
    """

    header: Header
    step: int
    names: tuple[str, ...]
    norms: NDArray[np.float32]
    orphans: tuple[str, ...] = ()
    num_parameters: int = 0
    num_nan: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    num_inf: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    weights: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    updates: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Layers)
            and (self.header, self.step, self.names, self.orphans, self.num_parameters)
            == (other.header, other.step, other.names, other.orphans, other.num_parameters)
            and _are_equal(self, other, ("norms", "num_nan", "num_inf", "weights", "updates"))
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Features:
    """The largest floating-point input of one rank's batch, feature by feature, where ``agent.features`` asks for it.

    A feature is a channel of what has four dimensions or more, else an element of the last dimension; an input with
    more than 1,024 of them is one feature. Taken from at most 16,384 elements, spread over the batch.

    ``name`` says where the input went in, as ``Model(x)``; ``shape`` is the whole input's. The arrays have shape
    (num_features,): ``means``, ``stds``, ``lows``, ``highs`` float32 over what is finite, NaN where nothing is;
    ``num_nonfinite`` int64 elements of the sample; ``z`` float32: how far mean or spread is from its median in the
    rank's recent batches, in units of what is usual there (`agent.watch.baseline`; 12 is unusual), below 0 for less,
    infinite where something is not finite, NaN in the first batches.
    """

    header: Header
    step: int
    name: str
    shape: tuple[int, ...]
    means: NDArray[np.float32]
    stds: NDArray[np.float32]
    lows: NDArray[np.float32]
    highs: NDArray[np.float32]
    num_nonfinite: NDArray[np.int64]
    z: NDArray[np.float32]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Features)
            and (self.header, self.step, self.name, self.shape) == (other.header, other.step, other.name, other.shape)
            and _are_equal(self, other, ("means", "stds", "lows", "highs", "num_nonfinite", "z"))
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True, kw_only=True)
class KnobState:
    """A hyperparameter that the script lets fixes set: its value in use, and the bounds for any other."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """Every knob that the script has registered; sent by rank 0 when anything about them is new."""

    header: Header
    knobs: tuple[KnobState, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExceptionReport:
    """The script raised and did not catch. ``stack`` is innermost last, ``file:line function``.

    Where memory ran out, ``memory`` is what held it, in bytes by name, and ``num_parts``, if not 0, in how many parts
    the batch was then run: the script has not seen the error. ``explanation`` says what the error means, its first line
    what and in which module; empty where nobody knows.
    """

    header: Header
    type: str
    message: str
    stack: tuple[str, ...]
    step: int
    phase: Phase
    memory: Mapping[str, int] = field(default_factory=dict)
    num_parts: int = 0
    explanation: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """How far a command has come on this rank. ``digest`` of parameters and optimizer state right after, or empty."""

    header: Header
    command: str
    state: AckState
    tick: int
    step: int
    detail: str = ""
    digest: str = ""


class ProcessState(StrEnum):
    """A training process as another process of its host sees it."""

    RUNNING = "running"
    STOPPED = "stopped"
    GONE = "gone"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """A silent rank, as another of its host sees it. ``frames`` are those that its C thread has left, innermost
    last."""

    rank: int
    state: ProcessState
    frames: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stacks:
    """Where this process's threads stand, in answer to an `Inquiry`; of bounded size.

    ``training`` is the stack of the training thread, ``others`` those of the other threads one after the other, each
    line ``file:line function``, innermost last. ``works``: the training thread has used most of its time for computing
    since the last answer. ``collectives``: how many this rank has begun in each process group.
    """

    header: Header
    tick: int
    phase: Phase
    training: tuple[str, ...]
    others: tuple[str, ...] = ()
    works: bool = False
    neighbours: tuple[Neighbour, ...] = ()
    collectives: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bye:
    """The process is leaving by itself; whatever its ring lost is in ``dropped``."""

    header: Header
    reason: str
    exit_code: int
    dropped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A fix on the wire: a short ordered list of actions applied as one, by all ranks of one generation at one tick.

    ``approved`` says that a person asked for it; agents in `suggest` apply nothing else.
    """

    id: str
    run: str
    generation: str
    seq: int
    actions: tuple[Action, ...]
    reason: str
    incident: str
    expires_tick: int
    approved: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """The highest sequence number per source that is safely in the recording."""

    run: str
    sources: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SilentRank:
    """A rank of which nothing is heard: its process, for those on its host to look at."""

    rank: int
    host: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inquiry:
    """The run stands still, as it seems: where does each rank stand, and what is with those that are silent?

    Sent again with another ``number`` while that lasts, and may be missed.
    """

    run: str
    generation: str
    number: int
    silent: tuple[SilentRank, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """A sentence for whoever looks at the job's own output: an incident, a proposal, a verdict. It may be missed.

    Of an incident, ``incident_kind``, ``severity``, ``state`` and the ``step`` at which it came into that state. Of a
    fix that was judged, ``state`` is the verdict and ``step`` where it was applied; all are empty of a proposal.
    """

    run: str
    incident: str
    text: str
    incident_kind: str = ""
    severity: str = ""
    state: str = ""
    step: int = 0


AgentMessage = Hello | Heartbeat | MetricFrame | Layers | Features | Knobs | ExceptionReport | Ack | Stacks | Bye
ControlMessage = Command | Received | Inquiry | Announcement
Message = AgentMessage | ControlMessage

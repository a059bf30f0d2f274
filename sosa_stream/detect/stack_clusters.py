"""Ranks by where they stand: which one is odd, its line, and what the others wait for.

Merging the stacks of all ranks into classes of equal ones, and looking at the smallest, is the method of STAT [Arnold
et al., Stack Trace Analysis for Large Scale Debugging, IPDPS 2007], with the order of progress within a step for a tie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from sosa_stream.protocol.messages import Phase

OURS = "/sosa_stream/agent/"
"""Its frames stand around and inside those of torch, whose calls it times."""
LIBRARIES = ("site-packages", "dist-packages", "<frozen", "<string>", "/torch/", OURS, "/runpy.py")
PYTHON = ("/lib/python3", "/lib64/python3")
COLLECTIVES = ("/torch/distributed/", "/torch/nn/parallel/", "/torch/autograd/", "/torch/_tensor.py")
"""Files in whose calls a rank waits for others: collectives, and backward, in which gradients are reduced."""
SAVES = (
    "/torch/serialization.py",
    "/torch/distributed/checkpoint/",
    "/safetensors/",
    "/s3transfer/",
    "/botocore/",
    "/google/cloud/storage/",
    "/huggingface_hub/",
    "/fsspec/",
    "/wandb/",
    "/sosa_stream/agent/repair/",
    "state_dict",
)
COMPILES = ("/torch/_dynamo/", "/torch/_inductor/", "/triton/compiler/", "/triton/runtime/")
LOADS = ("/torch/utils/data/",)
PROMPTS = ("/pdb.py", "/bdb.py", "/code.py", "/IPython/", "/ipykernel/", "/debugpy/", "/pydevd")
"""Whoever is in these waits for a person."""
OUTSIDE = (
    *("/subprocess.py", "/shutil.py", "/tarfile.py", "/zipfile.py", "/urllib/request.py", "/http/client.py"),
    *("/ssl.py", "/socket.py", "/urllib3/", "/requests/", "/httpx/", "/paramiko/"),
)
"""Whoever is in these waits for another program, another host or a disk."""
EVALUATES = ("eval", "valid", "test_", "generate", "predict")
"""How the functions begin in which a model is tried out."""

_PHASES = (Phase.START, Phase.DATA, Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER)


class Activity(StrEnum):
    """What a rank is at, by its stack: how long that may take."""

    STEP = "step"
    WAIT = "wait"
    """For nobody knows what, in no collective: a download, a lock, another process."""
    WORK = "work"
    DATA = "data"
    PAUSE = "pause"
    EVAL = "eval"
    CHECKPOINT = "checkpoint"
    START = "start"
    PROMPT = "prompt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stand:
    """Where one rank stands. ``frames`` innermost last, empty where nothing is known of them.

    ``collectives``: how many it has begun in each process group.
    """

    frames: tuple[str, ...] = ()
    tick: int = 0
    phase: Phase = Phase.FORWARD
    silent: bool = False
    collectives: Mapping[str, int] = field(default_factory=dict)

    @property
    def in_collective(self) -> bool:
        innermost = next((frame for frame in reversed(self.frames) if OURS not in frame), "")
        return not self.silent and any(name in innermost for name in COLLECTIVES)

    @property
    def line(self) -> str:
        """The script's own innermost line, ``file:line function``."""
        own = [frame for frame in self.frames if _is_own(frame)]
        return (own or list(self.frames) or ["an unknown line"])[-1]

    @property
    def calls(self) -> tuple[str, ...]:
        """The frames inside the script's innermost line: what it has called."""
        inside: list[str] = []
        for frame in self.frames:
            inside = [] if _is_own(frame) else [*inside, frame]
        return tuple(inside)

    @property
    def call(self) -> str:
        """What the line has called, as far as one can see."""
        names = [_function(frame) for frame in self.frames if any(name in frame for name in COLLECTIVES)]
        return next((name for name in names if name not in ("wrapper", "_call_impl", "__call__")), "")

    @property
    def progress(self) -> tuple[int, int]:
        return self.tick, _PHASES.index(self.phase) if self.phase in _PHASES else len(_PHASES)

    @property
    def activity(self) -> Activity:
        if any(place in frame for frame in self.calls for place in PROMPTS):
            return Activity.PROMPT
        for activity, places in (
            (Activity.CHECKPOINT, SAVES),
            (Activity.START, COMPILES),
            (Activity.DATA, LOADS),
        ):
            if any(place in frame for frame in self.frames for place in places):
                return activity
        if self.phase is Phase.EVAL or any(_function(frame).startswith(EVALUATES) for frame in self.frames):
            return Activity.EVAL
        if self.phase is Phase.CHECKPOINT:
            return Activity.CHECKPOINT
        outside = any(place in frame for frame in self.calls for place in OUTSIDE)
        return Activity.PAUSE if outside else Activity.STEP


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """``odd`` ranks, all where none stands out; and why those."""

    odd: tuple[int, ...]
    why: str


def odd_ranks(stands: Mapping[int, Stand]) -> Verdict:
    """Who holds the others up.

    In this order: those that are silent; those outside any collective while others wait in one; those outside the
    largest class of equal stands; those that have come least far, for the others cannot pass them by; those that have
    begun fewer collectives in a group.
    """
    ranks = sorted(stands)
    if silent := tuple(rank for rank in ranks if stands[rank].silent):
        return Verdict(odd=silent, why="it is silent")
    outside = tuple(rank for rank in ranks if not stands[rank].in_collective)
    if outside and len(outside) < len(ranks):
        return Verdict(odd=outside, why="it waits for no other rank, the others wait for it")
    classes = clusters(stands)
    if len(classes) > 1 and len(classes[0]) > len(ranks) / 2:
        return Verdict(
            odd=tuple(rank for each in classes[1:] for rank in each), why="it stands elsewhere than most ranks"
        )
    least = min((stand.progress for stand in stands.values()), default=(0, 0))
    behind = tuple(rank for rank in ranks if stands[rank].progress == least)
    if len(behind) < len(ranks):
        return Verdict(
            odd=behind, why="a guess: it has come least far in the step, and each waits in its own collective"
        )
    for group in sorted(set[str]().union(*(stand.collectives for stand in stands.values()))):
        begun = {rank: stands[rank].collectives[group] for rank in ranks if group in stands[rank].collectives}
        if len(set(begun.values())) > 1:
            late = tuple(rank for rank in begun if begun[rank] == min(begun.values()))
            return Verdict(odd=late, why=f"it has begun fewer collectives than others in group {group}")
    return Verdict(odd=tuple(ranks), why="all ranks stand alike")


def clusters(stands: Mapping[int, Stand]) -> list[Sequence[int]]:
    """Ranks with one line and one call, the largest class first."""
    found: dict[tuple[str, str, bool], list[int]] = {}
    for rank in sorted(stands):
        stand = stands[rank]
        found.setdefault((stand.line, stand.call, stand.silent), []).append(rank)
    return sorted(found.values(), key=len, reverse=True)


def _is_own(frame: str) -> bool:
    return not any(name in frame for name in (*LIBRARIES, *PYTHON))


def _function(frame: str) -> str:
    return frame.rpartition(" ")[2]

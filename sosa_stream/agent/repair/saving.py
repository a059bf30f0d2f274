"""Who writes a checkpoint, and when: at an agreed tick all ranks together, at an end the one that can alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sosa_stream.agent.repair import checkpoints
from sosa_stream.agent.repair.actuator import Actuator, Moment, Undo
from sosa_stream.agent.repair.checkpoints import AS_IT_IS, NotWrittenError, Unnamed
from sosa_stream.agent.repair.contents import Contents, contents_of
from sosa_stream.agent.repair.optimizer_state import inner_optimizer
from sosa_stream.agent.repair.snapshots import readable
from sosa_stream.agent.repair.training_state import TrainingState
from sosa_stream.agent.step.gradients import is_sharded, reduced_by_ddp
from sosa_stream.errors import RefusedError, describe
from sosa_stream.settings import AgentSettings


class Spread(StrEnum):
    """How parameters and optimizer state lie on the ranks."""

    ALONE = "alone"
    REPLICATED = "replicated"
    SHARDED = "sharded"
    UNKNOWN = "unknown"


class Checkpoints:
    """The checkpoints of this run.

    Args:
        kept: whether the state is kept for the end of the script, which may have let go of it by then.
        num_ranks: how many take part in the job.
        folder: where they lie; known once the run has its name.
        facts: what stands in ``metadata.json`` about the run.
        standing_fixes: what is in force, as it is written beside.
    """

    def __init__(
        self,
        state: TrainingState,
        settings: AgentSettings,
        kept: bool,
        num_ranks: int,
        folder: Callable[[], Path],
        facts: Callable[[], Mapping[str, Any]] = dict,
        standing_fixes: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self.folder = folder
        self.kept = kept
        self._num_ranks = num_ranks
        self._state = state
        self._settings = settings
        self._facts = facts
        self._standing_fixes = standing_fixes
        self._seen: list[int] = []
        self._held: list[Any] = []
        self._spread = Spread.UNKNOWN

    def look(self) -> None:
        """See how the state lies on the ranks, and hold it where it is kept; cheap where nothing is new."""
        optimizers = self._state.optimizers
        if (ids := [id(optimizer) for optimizer in optimizers]) != self._seen:
            self._seen = ids
            self._spread = spread_of(self._state, self._num_ranks)
            if self.kept:
                self._held = self._state.live()

    def let_go(self) -> None:
        """Of the state of a model that is no longer trained, or of a script that has ended."""
        self._seen, self._held = [], []

    def save(self, kind: str, step: int, tick: int, still_wanted: Callable[[], bool] = lambda: True) -> str:
        """Write ``<kind>_<step>`` from this rank alone, as the state is now. Returns what came of it, in words.

        Nothing if there is nothing to tell: before the first step, or where another rank writes. Never raises.
        """
        try:
            if not self._state.optimizers:
                return ""
            if not self._seen:
                self.look()
            if self._spread in (Spread.ALONE, Spread.REPLICATED) and self._state.ranks.rank != 0:
                return ""
            name = f"{kind}_{step}"
            if self._spread is Spread.SHARDED:
                return f"{name} is not written: the state is sharded, and the ranks end each for itself"
            if self._spread is Spread.UNKNOWN:
                return f"{name} is not written: {UNKNOWN}"
            unnamed = self._write_alone(name, step, tick)
            if not still_wanted():
                unnamed.discard()
                return f"{name} is not written: it has taken too long"
            return _told(unnamed, unnamed.give_name(self._settings.checkpoint_keep))
        except Exception as error:
            return describe(error)

    def write(self, name: str, step: int, tick: int) -> Unnamed | None:
        """On all ranks at one tick: write the state under no name yet. None where another rank has written it.

        Raises:
            NotWrittenError: it could not be, on this rank or on any.
        """
        self.look()
        if self._spread is Spread.UNKNOWN:
            raise NotWrittenError(UNKNOWN)
        if self._spread is Spread.SHARDED:
            return self._write_together(name, step, tick)
        return self._write_alone(name, step, tick) if self._state.ranks.rank == 0 else None

    def _write_alone(self, name: str, step: int, tick: int) -> Unnamed:
        contents = self._contents()
        half = self._settings.checkpoint_half
        about = self._about(step, tick, contents)
        return checkpoints.write(self.folder(), name, contents, about, self._standing_fixes(), half=half)

    def _write_together(self, name: str, step: int, tick: int) -> Unnamed | None:
        ranks, half = self._state.ranks, self._settings.checkpoint_half
        problem, bad, size = "", [], 0
        try:
            contents = self._contents()
            bad, size = contents.not_finite(), contents.size_bytes // (2 if half else 1)
        except Exception as error:
            problem = describe(error)
        said = ranks.gather((problem, bad, size))
        problem = next((words for words, _, _ in said.values() if words), "")
        bad = sorted({each for _, its, _ in said.values() for each in its})
        if bad and not problem and not name.startswith(AS_IT_IS):
            problem = f"{name} is not written: {bad[0]} is not finite"
        place = None
        if ranks.rank == 0 and not problem:
            try:
                place = checkpoints.begin(self.folder(), name, sum(size for _, _, size in said.values()))
            except NotWrittenError as error:
                problem = str(error)
        told = ranks.gather((problem, str(place)))
        problem, where = told[min(told)]
        if problem:
            raise NotWrittenError(problem)
        partial = Path(where)
        found = ranks.gather(partial.is_dir())
        if apart := [rank for rank, is_there in found.items() if not is_there]:
            raise NotWrittenError(f"agent.checkpoint_dir must lie where all ranks see it; rank {apart[0]} does not")
        checkpoints.write_tensors(partial, contents, half=half, group=ranks.group())
        checkpoints.write_rest(partial, ranks.rank, contents)
        if ranks.rank != 0:
            return None
        about = self._about(step, tick, contents)
        fixes = self._standing_fixes()
        return checkpoints.finish(partial, name, about, fixes, bad, contents.left_out, half=half)

    def _contents(self) -> Contents:
        state = self._state
        return contents_of(state.models, state.optimizers, state.schedulers, state.scalers, state.registry.registered)

    def _about(self, step: int, tick: int, contents: Contents) -> dict[str, Any]:
        rest = contents.rest
        holds = {
            "models": [type(model).__name__ for model in self._state.models],
            **{what: [each["type"] for each in rest[what]] for what in ("optimizers", "schedulers")},
            "scalers": len(rest["scalers"]),
            "registered": list(rest["registered"]),
        }
        return {"step": step, "tick": tick, **self._facts(), "spread": str(self._spread), "holds": holds}


class SaveCheckpoint(Actuator):
    """``save_checkpoint``: it gets its name once all ranks have written; taken back before that, it is gone."""

    comes_first = True  # where the state is sharded, the ranks write together

    def __init__(self, checkpoints: Checkpoints, settings: AgentSettings, allowed: bool, say: Callable[[str], None]):
        self._checkpoints = checkpoints
        self._settings = settings
        self._allowed = allowed
        self._say = say
        self._unnamed: Unnamed | None = None

    def refusal(self, params: Mapping[str, Any], step: int) -> str:
        return "" if self._allowed else "this run writes no checkpoints (agent.checkpoints)"

    def apply(self, params: Mapping[str, Any], at: Moment) -> tuple[Undo, str]:
        if why := self.refusal(params, at.step):
            raise RefusedError(f"save_checkpoint: {why}")
        kind = params.get("name", "last")
        name = kind if kind == "last" else f"{kind}_{at.step}"
        unnamed = self._unnamed = self._checkpoints.write(name, at.step, at.tick)

        def undo() -> None:
            if self._unnamed is not None and self._unnamed is unnamed:
                self._unnamed.discard()
                self._unnamed = None

        return undo, _told(unnamed, self._checkpoints.folder() / name) if unnamed else f"{name} written by rank 0"

    def begin_anew(self) -> None:
        self._checkpoints.let_go()

    def keep(self) -> None:
        if self._unnamed is not None:
            try:
                self._unnamed.give_name(self._settings.checkpoint_keep)
            except NotWrittenError as error:
                self._say(str(error))
            self._unnamed = None


UNKNOWN = (
    "the ranks hold different parts of the state, and which is known only for DistributedDataParallel's "
    "parameters and for DTensors (fully_shard)"
)


def spread_of(state: TrainingState, num_ranks: int) -> Spread:
    """How the state lies on the ranks; looks at all live objects, so it is asked once."""
    if num_ranks == 1:
        return Spread.ALONE
    if not (dist.is_available() and dist.is_initialized()):
        return Spread.UNKNOWN
    optimizers = state.optimizers
    sharded = [is_sharded(optimizer) for optimizer in optimizers]
    known = all(shards or reduced_by_ddp(its) for shards, its in zip(sharded, optimizers, strict=True))
    if not known or any(inner_optimizer(its) is not its for its in optimizers):
        return Spread.UNKNOWN
    return Spread.SHARDED if any(sharded) else Spread.REPLICATED


def _told(unnamed: Unnamed, place: Path) -> str:
    return f"checkpoint {unnamed.name} ({readable(unnamed.size_bytes)}) in {place}"

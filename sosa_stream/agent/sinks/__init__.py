"""Where people already look: incidents and fixes as text and step markers in the log that the script itself writes.

Only libraries that the script has imported and opened a log with are used; none is imported here. Each has a thread of
its own, so that the training thread waits for none of them. Rank 0 alone writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sosa_stream.agent.sinks.entry import FIX, VERDICT, Entry, Sink
from sosa_stream.agent.sinks.mlflow import MLflow
from sosa_stream.agent.sinks.tensorboard import TensorBoard
from sosa_stream.agent.sinks.wandb import WeightsAndBiases
from sosa_stream.agent.sinks.worker import Worker
from sosa_stream.protocol.actions import in_words
from sosa_stream.protocol.messages import Announcement
from sosa_stream.settings import SinkChoice

CLOSE_SECONDS = 3.0
LEVELS = {"info": 1, "warning": 2, "critical": 3}
VERDICT_LEVELS = {"helped": 1, "harmed": -1}
OF_SCRIPT_ERROR = frozenset({"exception", "oom", "shape_mismatch"})


class Sinks:
    """All sinks of this process, fed from any thread.

    Args:
        choice: which; `SinkChoice.AUTO` is each that the script has open.
        step: the optimizer step that was taken last.
        say: gets a sentence when a sink is dropped.
    """

    def __init__(self, choice: SinkChoice, step: Callable[[], int], say: Callable[[str], None]) -> None:
        known: Mapping[SinkChoice, Callable[[], Sink]] = {
            SinkChoice.TENSORBOARD: lambda: TensorBoard(step),
            SinkChoice.WANDB: WeightsAndBiases,
            SinkChoice.MLFLOW: lambda: MLflow(step),
        }
        self._workers = [Worker(make(), say) for name, make in known.items() if choice in (SinkChoice.AUTO, name)]
        self._step = step
        self._num_fixes = 0
        self._error_told = False

    def look(self, history: Sequence[Mapping[str, Any]] = ()) -> None:
        """Once in a while on the training thread. ``history`` holds the commands that were applied, the newest last."""
        for done in history[self._num_fixes :]:
            self._offer_fix(done)
        self._num_fixes = len(history)
        for worker in self._workers:
            worker.sink.find()
            worker.look()

    def hear(self, told: Announcement) -> None:
        """An incident has opened, changed or ended, or a fix was judged. Proposals are no events of the run."""
        if told.state and not told.incident_kind:
            self._offer_verdict(told)
        if not told.incident_kind or (self._error_told and told.incident_kind in OF_SCRIPT_ERROR):
            return
        level = 0 if told.state == "resolved" else LEVELS.get(told.severity, 1)
        self._offer(
            Entry(
                id=told.incident, kind=told.incident_kind, level=level, step=told.step, at=time.time(), text=told.text
            )
        )

    def script_raised(self, kind: str, text: str, step: int) -> None:
        """The script ends by an error at ``step``: told here, for the daemon's word on it may come too late."""
        self._error_told = True
        text = f"step {step}: critical: {kind}: {text}"
        self._offer(Entry(id="error", kind=kind, level=LEVELS["critical"], step=step, at=time.time(), text=text))

    def close(self, history: Sequence[Mapping[str, Any]] = ()) -> None:
        """Have what waits written, within bounds, and put the libraries back as they were."""
        self.look(history)
        until = time.monotonic() + CLOSE_SECONDS
        for worker in self._workers:
            worker.close(max(0.0, until - time.monotonic()))
            if not worker.is_dropped:  # one that hangs may hold a lock of its library
                worker.sink.remove()

    def _offer_verdict(self, told: Announcement) -> None:
        now, level = max(0, self._step()), VERDICT_LEVELS.get(told.state, 0)
        text = f"step {now}: verdict: {told.text}"
        self._offer(Entry(id=told.incident, kind=VERDICT, level=level, step=now, at=time.time(), text=text))

    def _offer_fix(self, done: Mapping[str, Any]) -> None:
        step = max(0, int(done["applied_step"]))
        actions = ", ".join(in_words(each["action"], each["params"]) for each in done["actions"])
        text = f"step {step}: fix: {actions}: {done['reason']}"
        self._offer(Entry(id=done["id"], kind=FIX, level=1, step=step, at=time.time(), text=text))

    def _offer(self, entry: Entry) -> None:
        for worker in self._workers:
            worker.offer(entry)
            worker.look()

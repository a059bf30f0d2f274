"""The checkpoint of a training that ends: by itself, by an error, by SIGTERM. Nothing where none are kept."""

from __future__ import annotations

from collections.abc import Callable

from sosa_stream.agent.repair.saving import Checkpoints
from sosa_stream.agent.signals import Termination
from sosa_stream.agent.step.probe import Probe


class LastCheckpoint:
    """For the main thread. A signal may hold training up for ``sigterm_seconds``."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        probe: Probe,
        sigterm_seconds: float,
        say: Callable[[str], None],
        say_here: Callable[[str], None],
    ) -> None:
        self._checkpoints = checkpoints
        self._probe = probe
        self._say = say
        self._termination = Termination(
            lambda still_wanted: self._write("interrupted", still_wanted),
            lambda: probe.in_step,
            sigterm_seconds,
            say_here,
        )

    def install(self) -> None:
        """Listen for SIGTERM."""
        if self._checkpoints.kept:
            import torch.distributed.checkpoint  # noqa: F401  (takes a second, which a signal has no time for)

            self._termination.install()
            self._probe.at_rest = self._termination.at_rest

    def look(self) -> None:
        """Once in a while, between steps."""
        if self._checkpoints.kept:
            self._checkpoints.look()
            self._termination.recheck()

    def save(self, kind: str) -> None:
        """Training has ended: write one of this kind, and leave SIGTERM to the script."""
        if self._checkpoints.kept and (words := self._write(kind)):
            self._say(words)
        self._termination.remove()
        self._checkpoints.let_go()

    def _write(self, kind: str, still_wanted: Callable[[], bool] = lambda: True) -> str:
        probe = self._probe
        if probe.left_in_step:
            return f"no checkpoint {kind}: an optimizer step was broken off, and weights may be updated in part"
        return self._checkpoints.save(kind, probe.step, probe.tick, still_wanted)

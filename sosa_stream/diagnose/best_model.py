"""``best_model.pt``: the model's ``state_dict`` at its lowest smoothed loss, kept while the training may explode."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sosa_stream.agent.repair.best import SMOOTHING
from sosa_stream.agent.repair.copies import Copy, copies_in, copy_all, copy_tensor, finite_flags, revive
from sosa_stream.diagnose import BEST_MODEL

MOST_SHARE = 0.02
"""Of the time, at most so much goes into copying: the weights of a large model are those of a step nearby."""
WRITE_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """A copy of the weights, perhaps still on its way to the host."""

    step: int
    smoothed: float
    state: Any
    finite: list[Copy]
    ready: torch.cuda.Event | None

    def has_come(self) -> bool:
        return self.ready is None or bool(self.ready.query())  # type: ignore[no-untyped-call]

    def is_finite(self) -> bool:
        return all(bool(flag.host) for flag in self.finite)


class BestModel:
    """Copies the weights on the training thread when the smoothed loss is the lowest so far; a thread writes them.

    Args:
        path: the file, replaced whole or not at all.
        models: the script's own models, out of what wraps them.
        losses: of the steps after a given one, as far as they are known, in order.
        say: gets a sentence for the user.
    """

    def __init__(
        self,
        path: Path,
        models: Callable[[], list[nn.Module]],
        losses: Callable[[int], list[tuple[int, float]]],
        say: Callable[[str], None],
    ) -> None:
        self.path = path
        self._models = models
        self._losses = losses
        self._say = say
        self._seen = -1
        self._smoothed = math.inf
        self._not_before = 0.0
        self._kept: _Kept | None = None
        self._arriving: _Kept | None = None
        self._written: _Kept | None = None
        self._writing = threading.Lock()
        self._wanted = threading.Event()
        self._has_ended = False
        self._has_failed = False

    @property
    def step(self) -> int:
        """The last one whose update is in the weights that are kept; -1: none are."""
        return -1 if self._kept is None else self._kept.step

    def start(self) -> None:
        """Write from time to time, so that something is there after a sudden death."""
        threading.Thread(target=self._write_now_and_then, name="sosa-best-model", daemon=True).start()

    def after_step(self) -> None:
        """On the training thread, after each step; never raises."""
        if self._has_failed:
            return
        try:
            self._settle()
            for step, loss in self._losses(self._seen):
                self._seen = step
                if math.isfinite(loss):
                    before = self._smoothed
                    self._smoothed = loss if math.isinf(before) else before + SMOOTHING * (loss - before)
            lowest = math.inf if self._kept is None else self._kept.smoothed
            if self._smoothed < lowest and self._arriving is None:
                self._copy()
        except Exception as error:
            self._has_failed = True
            self._say(f"{BEST_MODEL} is not kept any more: {type(error).__name__}: {error}")

    def write(self) -> None:
        """What is kept, if it is not on disk yet. From any thread; never raises."""
        with self._writing:
            kept = self._kept
            if kept is None or kept is self._written:
                return
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                partial = self.path.with_suffix(".partial")
                torch.save(revive(kept.state), partial)
                os.replace(partial, self.path)
                self._written = kept
            except Exception as error:
                self._say(f"{BEST_MODEL} cannot be written: {type(error).__name__}: {error}")

    def write_soon(self) -> None:
        """The same, by the thread: the process may be about to end."""
        self._wanted.set()

    def close(self) -> None:
        """Training is over: write for the last time."""
        self._settle()
        self._has_ended = True
        self._wanted.set()
        self.write()

    def _copy(self) -> None:
        began = time.monotonic()
        models = self._models()
        if began < self._not_before or not models:
            return
        if any(_is_sharded(model) for model in models):
            raise TypeError("the model is sharded, and no rank has all of it")
        states = {f"{i}.{type(model).__name__}": model.state_dict() for i, model in enumerate(models)}
        state = copy_all(states if len(states) > 1 else next(iter(states.values())))
        flags = finite_flags(
            (p for model in models for p in model.parameters()), (b for model in models for b in model.buffers())
        )
        finite, ready = [copy_tensor(flag) for flag in flags], None
        if any(copy.device.type == "cuda" for copy in copies_in(state)):
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        self._arriving = _Kept(step=self._seen, smoothed=self._smoothed, state=state, finite=finite, ready=ready)
        self._settle()
        now = time.monotonic()
        self._not_before = now + (now - began) / MOST_SHARE

    def _settle(self) -> None:
        """What was copied is kept, once it is on the host, if it is finite."""
        arriving = self._arriving
        if arriving is not None and arriving.has_come():
            self._arriving = None
            if arriving.is_finite():
                self._kept = arriving

    def _write_now_and_then(self) -> None:
        while not self._has_ended:
            self._wanted.wait(WRITE_SECONDS)
            self._wanted.clear()
            if not self._has_ended:
                self.write()


def _is_sharded(model: nn.Module) -> bool:
    return any(hasattr(p, "device_mesh") or type(p).__name__ == "FlatParameter" for p in model.parameters())

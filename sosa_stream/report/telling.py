"""From a recording, or from any log that ``sosa replay`` reads, to its `Story`: one pass, in bounded space."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sosa_stream.detect.attendance import BLIND
from sosa_stream.effects import Effect, Event
from sosa_stream.engine import RunView
from sosa_stream.errors import ProtocolError, UsageError
from sosa_stream.protocol.columns import COLUMNS, EVAL_LOSS, LOG_PREFIX
from sosa_stream.protocol.messages import AgentMessage, Bye, ExceptionReport, Hello, Layers, MetricFrame
from sosa_stream.protocol.messages import Features as FeaturesMessage
from sosa_stream.protocol.recording import MAGIC, RECORD_HEAD, decode_record, read_recording
from sosa_stream.replay.feed import LogFeed
from sosa_stream.replay.folders import find_logs, run_name
from sosa_stream.replay.patterns import Family
from sosa_stream.replay.recordings import RecordingFeed, is_recording
from sosa_stream.replay.runs import runs_of
from sosa_stream.replay.sources import format_of, read_log
from sosa_stream.report.bins import Bins, Looks
from sosa_stream.report.story import MAX_FEATURES, MAX_LAYERS, Features, Raised, Story

MAX_RANKS_SHOWN = 64
MAX_CHANGES = 1000
MAX_RAISED = 64
UNUSUAL_Z = 12.0
"""As `detect.inputs` has it: 4 is the farthest of 64 usual batches."""
MEASURED = frozenset({"loss", "grad_norm", EVAL_LOSS})
"""Columns in which a NaN was measured; in others it means that nothing was looked at."""
NOT_DRAWN = frozenset({"tick", "fingerprint", "digest", "digest_chunk", "digest_owed", "model", "num_objectives"})
WANTED = {
    "loss": "no loss",
    "grad_norm": "no gradient norm: run it under the agent, or log the norm",
    "lr": "no learning rate",
}


def tell(
    source: Path,
    *,
    name: str = "",
    format: str = "auto",
    mapping: Mapping[str, str] | None = None,
    family: Family | None = None,
) -> Story:
    """Read a run to its end. ``format``, ``mapping`` and ``family`` as ``sosa replay`` has them.

    Raises:
        UsageError: it is not there, cannot be read, or holds no run or several.
    """
    if format == "sosa" or (format == "auto" and source.is_file() and is_recording(source)):
        return _of_recording(source)
    return _of_log(source, name, format, mapping or {}, family)


def _of_recording(source: Path) -> Story:
    feed, teller = RecordingFeed(), Teller()
    began_at, ended_at, num_bytes = None, None, len(MAGIC)
    for received_at, payload in read_recording(source):
        num_bytes += RECORD_HEAD.size + len(payload)
        began_at, ended_at = received_at if began_at is None else began_at, received_at
        feed.take(received_at, payload)
        try:
            teller.take(decode_record(payload))
        except ProtocolError:  # told by the feed
            continue
    if feed.engine is None:
        raise UsageError(f"{source} holds no message of a training process")
    view = feed.engine.view()
    story = teller.story(view, source, "recording")
    generations = max(1, len(feed.generations))
    missing = story.missing
    if feed.num_left_out:
        missing = (*missing, f"{feed.num_left_out} records could not be read and were left out")
    if source.stat().st_size > num_bytes:
        missing = (*missing, "the recording ends within a record: it is still being written, or was cut off")
    elif not teller.has_ended(len(view.ranks)):
        missing = (*missing, "not every rank has said that it ended: the run goes on, or was killed")
    return replace(story, began_at=began_at, ended_at=ended_at, num_generations=generations, missing=missing)


def _of_log(source: Path, name: str, format: str, mapping: Mapping[str, str], family: Family | None) -> Story:
    if format != "tensorboard":
        found = find_logs(source)
        if len(found.logs) > 1:
            some = ", ".join(str(log) for log in found.logs[:4])
            raise UsageError(f"{source} holds {len(found.logs)} logs; name one of them: {some}")
        source = found.logs[0]
    kind = format_of(source) if format == "auto" else format
    if kind == "sosa":
        return _of_recording(source)
    words, log = read_log(source, kind, family)
    runs = runs_of(log)
    if len(runs) > 1:
        raise UsageError(f"{source} holds {len(runs)} runs ({', '.join(list(runs)[:4])}); a report is of one")
    teller = Teller()
    feed = _Listening(name or run_name(source), teller, mapping)
    feed.take_whole(next(iter(runs.values())))
    feed.finish()
    story = teller.story(feed.engine.view(), source, words)
    return replace(
        story,
        incidents=feed.incidents,
        hosts=(),
        num_generations=feed.tally.num_generations,
        missing=("a log has no ranks, layers, inputs or fixes: only what its program wrote is known", *story.missing),
    )


class _Listening(LogFeed):
    """Lets a teller hear what the engine is fed with."""

    def __init__(self, run: str, teller: Teller, mapping: Mapping[str, str]) -> None:
        super().__init__(run, mapping=mapping)
        self._teller = teller

    def _handle(self, message: AgentMessage) -> list[Effect]:
        self._teller.take(message)
        return super()._handle(message)


class Teller:
    """Takes the events of one run, and tells its story."""

    def __init__(self) -> None:
        self._curves: dict[str, Bins] = {}
        self._by_rank: dict[int, Bins] = {}
        self._first, self._last, self._num_steps = -1, -1, 0
        self._rank_of_steps = -1
        self._grids: dict[str, Looks] = {}
        self._layer_names: tuple[str, ...] = ()
        self._num_parameters = 0
        self._num_models = 0
        self._features: dict[str, Looks] = {}
        self._input: str = ""
        self._before: dict[int, NDArray[np.float32]] = {}
        self._changes: deque[dict[str, Any]] = deque(maxlen=MAX_CHANGES)
        self._raised: list[Raised] = []
        self._versions: dict[str, str] = {}
        self._generation = ""
        self._departed: set[int] = set()

    def has_ended(self, num_ranks: int) -> bool:
        """Whether all ranks of the newest generation have said goodbye."""
        return len(self._departed) >= num_ranks

    def take(self, event: Event) -> None:
        """The next event, in the order of the recording."""
        if isinstance(event, MetricFrame):
            self._take_frame(event)
        elif isinstance(event, Layers):
            self._take_layers(event)
        elif isinstance(event, FeaturesMessage):
            self._take_features(event)
        elif isinstance(event, Hello):
            self._versions |= event.versions
            if event.header.generation != self._generation:
                self._generation, self._departed = event.header.generation, set()
        elif isinstance(event, Bye):
            self._departed.add(event.header.rank)
        elif isinstance(event, ExceptionReport) and len(self._raised) < MAX_RAISED:
            self._raised.append(
                Raised(
                    rank=event.header.rank,
                    host=event.header.host,
                    step=event.step,
                    type=event.type,
                    message=event.message,
                    stack=event.stack,
                    explanation=event.explanation,
                )
            )

    def story(self, view: RunView, source: Path, kind: str) -> Story:
        """What has come in so far; ``view`` of the engine that was fed with the same."""
        curves = {name: bins.curve for name, bins in self._curves.items()}
        curves = {name: curve for name, curve in curves.items() if len(curve.steps)}
        grids = {name: looks.grid for name, looks in self._grids.items()}
        means, stds = (looks.grid if (looks := self._features.get(name)) else None for name in ("means", "stds"))
        features = (
            Features(name=self._input, means=means, stds=stds, changes=tuple(self._changes)) if means and stds else None
        )
        ranks = [rank for rank in view.ranks if rank.state != BLIND]
        return Story(
            name=view.run,
            source=source,
            kind=kind,
            mode=view.mode,
            num_ranks=max(len(ranks), 1),
            hosts=tuple(dict.fromkeys(rank.host for rank in ranks)),
            versions=self._versions,
            num_steps=self._num_steps,
            first_step=self._first,
            last_step=self._last,
            curves=curves,
            by_rank={rank: bins.curve for rank, bins in sorted(self._by_rank.items())}
            if len(self._by_rank) > 1
            else {},
            layers=grids.get("norms"),
            weights=grids.get("weights"),
            updates=grids.get("updates"),
            features=features,
            incidents=view.incidents,
            commands=view.commands,
            raised=tuple(self._raised),
            states=dict(view.detectors),
            missing=tuple(self._missing(curves, grids, features)),
        )

    def _missing(self, curves: Mapping[str, object], grids: Mapping[str, object], features: object) -> list[str]:
        missing = [text for name, text in WANTED.items() if name not in curves]
        if not grids.get("norms"):
            missing.append("no norms by layer")
        elif not grids.get("weights"):
            missing.append("no norms of weights and updates by layer: sosa diagnose records them")
        if self._num_parameters > len(self._layer_names) > 0:
            seen, num = len(self._layer_names), self._num_parameters
            missing.append(f"{num - seen:,} of {num:,} parameters, biases first: their gradients were not looked at")
        if features is None:
            missing.append("no statistics of the input's features: sosa diagnose records them")
        if self._num_models > 1:
            missing.append(f"the model's parameters changed {self._num_models - 1} times; layers are those of the last")
        return missing

    def _take_frame(self, frame: MetricFrame) -> None:
        if not len(frame.steps):
            return
        if "loss" in frame.columns or "grad_norm" in frame.columns:
            rank, first, last = frame.header.rank, int(frame.steps[0]), int(frame.steps[-1])
            self._first = first if self._first < 0 else min(self._first, first)
            self._last = max(self._last, last)
            if self._rank_of_steps < 0 or rank < self._rank_of_steps:
                self._rank_of_steps, self._num_steps = rank, 0
            if rank == self._rank_of_steps:
                self._num_steps += len(frame.steps)
        for i, name in enumerate(frame.columns):
            if name in NOT_DRAWN or (name not in COLUMNS and name != EVAL_LOSS and not name.startswith(LOG_PREFIX)):
                continue
            bins = self._curves.get(name)
            if bins is None:
                tells_nan = name in MEASURED or name.startswith(LOG_PREFIX)
                bins = self._curves[name] = Bins(tells_nan=tells_nan)
            bins.add(frame.steps, frame.values[:, i])
            if name == "loss" and frame.header.world_size > 1 and frame.header.rank < MAX_RANKS_SHOWN:
                mine = self._by_rank.setdefault(frame.header.rank, Bins(tells_nan=True))
                mine.add(frame.steps, frame.values[:, i])

    def _take_layers(self, layers: Layers) -> None:
        if layers.names != self._layer_names:
            self._layer_names, self._num_parameters = layers.names, layers.num_parameters
            self._num_models += 1
            self._grids = {
                name: Looks(what, layers.names, MAX_LAYERS)
                for name, what in (
                    ("norms", "2-norm of the gradient"),
                    ("weights", "2-norm of the weights"),
                    ("updates", "2-norm of the update"),
                )
            }
        norms = layers.norms.astype(np.float64)
        if len(layers.num_nan) == len(norms):
            norms = np.where(layers.num_nan + layers.num_inf > 0, np.inf, norms)
        self._grids["norms"].add(layers.step, norms)
        for name, values in (("weights", layers.weights), ("updates", layers.updates)):
            if len(values) == len(norms):
                self._grids[name].add(layers.step, values.astype(np.float64))

    def _take_features(self, told: FeaturesMessage) -> None:
        names = [f"feature {i}" for i in range(len(told.means))]
        if told.name != self._input or (
            self._features and len(self._features["means"].names) != min(len(names), MAX_FEATURES)
        ):
            self._input = told.name
            self._before.clear()
            self._features = {
                "means": Looks("mean of the feature", names, MAX_FEATURES, mean=True),
                "stds": Looks("standard deviation of the feature", names, MAX_FEATURES, mean=True),
            }
        bad = told.num_nonfinite > 0
        self._features["means"].add(told.step, np.where(bad, np.inf, told.means.astype(np.float64)))
        self._features["stds"].add(told.step, np.where(bad, np.inf, told.stds.astype(np.float64)))
        before = self._before.get(told.header.rank)
        for i in np.flatnonzero(~np.isnan(told.z) & (np.abs(told.z) > UNUSUAL_Z)).tolist():
            self._changes.append(
                {
                    "step": told.step,
                    "rank": told.header.rank,
                    "feature": i,
                    "z": float(told.z[i]),
                    "before": float(before[i]) if before is not None and i < len(before) else None,
                    "after": float(told.means[i]),
                }
            )
        self._before[told.header.rank] = told.means

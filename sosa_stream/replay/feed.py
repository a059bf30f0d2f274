"""A log's rows into an Engine, as the agent of a world of one would have sent them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sosa_stream.detect.incidents import Incident
from sosa_stream.effects import Effect, IncidentChanged
from sosa_stream.engine import Engine
from sosa_stream.errors import NoLossError
from sosa_stream.protocol.columns import COLUMNS
from sosa_stream.protocol.messages import AgentMessage, Bye, Header, Hello, MetricFrame
from sosa_stream.replay.gaps import Gaps
from sosa_stream.replay.guess import STEP, Guess, guess_columns, known_columns
from sosa_stream.replay.lapse import Lapse
from sosa_stream.replay.log import Column, Log, joined
from sosa_stream.replay.runs import is_newest_first
from sosa_stream.replay.steps import Points, Stepper, Tally
from sosa_stream.settings import DetectSettings

MAX_FRAME_ROWS = 4096
_PATIENCE_ROWS = 64
"""Rows of mere metrics after which no loss is waited for."""
_LARGEST = 1e100
"""What is larger is fed as this, which can be squared and added up."""
_SECONDS_PER_MESSAGE = 1e-3
"""The Engine's clock here. It only has to move, by less than the silence after which a rank is lost."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stretch:
    """Losses of one generation that were fed together: ``steps`` and ``losses`` of shape (n,)."""

    generation: int
    steps: NDArray[np.int64]
    losses: NDArray[np.float64]


class LogFeed:
    """One run's log on its way into a fresh Engine, in as many parts as it comes in.

    ``mapping`` says which column is which where the guess is wrong; ``wanted`` names metrics to feed besides, as
    ``log/<name>``.
    """

    def __init__(
        self,
        run: str,
        *,
        mapping: Mapping[str, str] | None = None,
        wanted: frozenset[str] = frozenset(),
        settings: DetectSettings | None = None,
    ) -> None:
        self.engine = Engine(run, settings)
        self.guess: Guess | None = None
        self._is_guessed = False
        self.curve: list[Stretch] = []
        self.unread: list[str] = []
        """What stood in place of a loss but is no number; such cells are left out."""
        self.was_reversed = False
        """Whether the log's newest row came first."""
        self.lapse = Lapse()
        self._mapping = mapping or {}
        self._wanted = wanted
        self._waiting: list[Log] = []
        self._gaps = Gaps()
        self._seen: dict[str, None] = {}
        """The log's columns, in their order."""
        self._fed: set[str] = set()
        self._stepper = Stepper()
        self._opened: dict[str, int] = {}
        self._seq = 0
        self._generation = 0
        self._header = Header(run=run, generation="", source="log", rank=0, world_size=1, host="log", seq=0)

    @property
    def tally(self) -> Tally:
        """What has been read so far."""
        return self._stepper.tally

    def first_step(self, log: Log) -> float:
        """Where a log begins; infinite where it does not say."""
        counter = guess_columns(log, mapping=self._mapping).counter or ""
        return float(np.nanmin(log.columns[counter].values)) if counter in log.columns else np.inf

    def take_whole(self, log: Log) -> list[Effect]:
        """Feed a whole log, its oldest row first."""
        if is_newest_first(log, guess_columns(log, mapping=self._mapping).counter):
            self.was_reversed = True
            log = log.part(slice(None, None, -1))
        return self.take(log)

    def begin_anew(self) -> None:
        """What comes next is another log of the same run: a generation of its own, its columns yet to be guessed."""
        self._is_guessed = False
        self._waiting.clear()
        self._gaps = Gaps()
        self.lapse = Lapse()
        self._stepper.begin_anew()

    def take(self, log: Log) -> list[Effect]:
        """Feed the next rows; they wait until a loss has been seen, and what the mapping calls the step.

        Where a metric is wanted they wait for a loss no longer than `_PATIENCE_ROWS` rows.
        """
        log = joined([*self._waiting, log])
        guess = guess_columns(log, mapping=self._mapping, wanted=self._wanted)
        if self.guess is not None and self._is_guessed:
            guess = self.guess.extended(guess)
        elif not self._is_enough(log, guess):
            self._waiting = [log]
            return []
        return self._feed(log, guess)

    def _is_enough(self, log: Log, guess: Guess) -> bool:
        """Whether to begin with these rows; a log of mere metrics may yet come to its losses."""
        if self._mapping.get(STEP, guess.counter) not in {None, *log.columns}:
            return False
        return guess.has_loss or (guess.has_metrics and log.num_rows >= _PATIENCE_ROWS)

    def _feed(self, log: Log, guess: Guess) -> list[Effect]:
        self.guess, self._is_guessed = guess, True
        self._waiting.clear()
        self._seen |= dict.fromkeys(log.columns)
        for name in guess.columns.get("loss", ()):  # a header that is repeated in the midst is none of them
            texts = log.columns[name].unread.values() if name in log.columns else log.words.get(name, ())
            self.unread += [text for text in texts if text.strip() != name]
        self.lapse.take(log, guess)
        effects: list[Effect] = []
        for points in self._stepper.take(self._gaps.take(log, guess), guess):
            for message in self._messages(points):
                effects += self._handle(message)
        return effects

    def finish(self) -> list[Effect]:
        """The log has ended.

        Raises:
            NoLossError: it has held neither a loss nor a wanted metric, or not what ``mapping`` names.
        """
        self._seen |= dict.fromkeys(joined(self._waiting).columns)
        missing = [name for name in self._mapping.values() if name not in self._seen]
        if missing:
            raise NoLossError(f"no column {missing[0]!r}; {known_columns(self._seen)}")
        effects: list[Effect] = []
        if self.guess is None and self._waiting:
            log = joined(self._waiting)
            guess = guess_columns(log, mapping=self._mapping, wanted=self._wanted)
            effects = self._feed(log, guess) if guess.has_metrics else []
        if self.guess is None:
            known = known_columns(self._seen)
            raise NoLossError(f"no loss found in it; {known}; --map loss=NAME says which column it is")
        return effects + self._handle(Bye(header=self._next_header(), reason="end", exit_code=0, dropped=0))

    @property
    def incidents(self) -> tuple[Incident, ...]:
        """What was found so far. A log has no ranks: the one that its rows were fed as is not named."""
        return tuple(map(_without_ranks, self.engine.view().incidents))

    def blind(self) -> dict[str, tuple[str, ...]]:
        """Detectors that lack an input, and which columns they lack."""
        blind = {kind for kind, state in self.engine.view().detectors if state == "blind"}
        return {
            detector.kind: tuple(name for name in detector.requires if name not in self._fed)
            for detector in self.engine.detectors
            if detector.kind in blind
        }

    def places(self, incidents: Iterable[Incident]) -> list[int]:
        """Where incidents were detected: indices into the losses of `curve`, one after another."""
        return [self._place(self._opened.get(incident.id, 0), incident.detected_step) for incident in incidents]

    def _place(self, generation: int, step: int) -> int:
        start = last = 0
        for stretch in self.curve:
            if stretch.generation == generation:
                last = start + min(int(np.searchsorted(stretch.steps, step)), len(stretch.steps) - 1)
                if step <= stretch.steps[-1]:
                    return last
            start += len(stretch.steps)
        return last

    def _handle(self, message: AgentMessage) -> list[Effect]:
        effects: list[Effect] = []
        for effect in self.engine.handle(message, self._seq * _SECONDS_PER_MESSAGE):
            if isinstance(effect, IncidentChanged):
                self._opened.setdefault(effect.incident.id, self._generation)
                effect = replace(effect, incident=_without_ranks(effect.incident))
            effects.append(effect)
        return effects

    def _next_header(self) -> Header:
        self._seq += 1
        return replace(self._header, generation=f"log-{self._generation}", seq=self._seq)

    def _messages(self, points: Points) -> Iterator[AgentMessage]:
        if not self._seq or points.generation != self._generation:
            self._generation = points.generation
            header, policy = self._next_header(), {"mode": "observe"}
            yield Hello(header=header, pid=0, device="", versions={}, parameters=(), policy=policy)
        columns = {ours: _in_reach(column) for ours, column in points.columns.items()}
        self._fed.update(ours for ours, column in columns.items() if column.present.any())
        loss = columns.get("loss")
        if loss is not None and loss.present.any():
            steps, losses = points.steps[loss.present], loss.values[loss.present]
            self.curve.append(Stretch(generation=points.generation, steps=steps, losses=losses))
        of_steps = {ours: column for ours, column in columns.items() if ours in COLUMNS}
        logged = {ours: column for ours, column in columns.items() if ours not in COLUMNS}
        if self.guess is not None and not self.guess.has_loss:  # its steps happened, whatever their losses were
            of_steps["skipped"] = Column(values=np.zeros(len(points.steps)), present=points.is_step)
        size = max(1, MAX_FRAME_ROWS // max(1, len(logged)))
        tells = list(_runs(logged, len(points.steps), size))[::-1]
        for rows in _runs(of_steps, len(points.steps), size):
            # What was logged within or before these steps comes first: the Engine keeps it until its step is over.
            while tells and tells[-1][0] <= rows[-1]:
                told = tells.pop()
                within = int(np.searchsorted(told, rows[-1], side="right"))
                yield self._frame(points.steps, logged, told[:within])
                if within < len(told):
                    tells.append(told[within:])
            yield self._frame(points.steps, of_steps, rows)
        for told in tells[::-1]:
            yield self._frame(points.steps, logged, told)

    def _frame(self, steps: NDArray[np.int64], columns: Mapping[str, Column], rows: NDArray[np.int64]) -> MetricFrame:
        """These rows, with the columns that the first of them has: all of them have the same."""
        values = {ours: column.values[rows] for ours, column in columns.items() if column.present[rows[0]]}
        return MetricFrame(
            header=self._next_header(),
            columns=tuple(values),
            steps=steps[rows],
            values=np.column_stack(list(values.values())),
        )


def _runs(columns: Mapping[str, Column], num_rows: int, size: int) -> Iterator[NDArray[np.int64]]:
    """The rows that have any of these columns, cut where it is others of them; at most ``size`` at a time."""
    kinds = sum((column.present << i for i, column in enumerate(columns.values())), np.zeros(num_rows, dtype=np.int64))
    rows = np.flatnonzero(kinds)
    for same in np.split(rows, np.flatnonzero(np.diff(kinds[rows])) + 1):
        for first in range(0, len(same), size):
            yield same[first : first + size]


def _in_reach(column: Column) -> Column:
    values = column.values
    too_large = np.isfinite(values) & (np.abs(values) > _LARGEST)
    if not too_large.any():
        return column
    return Column(values=np.where(too_large, np.copysign(_LARGEST, values), values), present=column.present)


def _without_ranks(incident: Incident) -> Incident:
    evidence = {name: value for name, value in incident.evidence.items() if name not in ("ranks", "num_ranks")}
    return replace(incident, ranks=(), hosts=(), evidence=evidence)

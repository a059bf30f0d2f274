"""Builders for tests of what watches a run: messages from plain sequences, and a training job that is simulated.

Nothing here needs torch, a clock or a socket. The simulated job answers commands as agents do, so that a whole repair
can be tested as one pure function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from sosa_stream.decide.commands import CommandRecord
from sosa_stream.decide.requests import Request
from sosa_stream.detect.incidents import Group, Incident, IncidentState, Severity
from sosa_stream.effects import Effect, Event, Publish, Withdraw
from sosa_stream.engine import Engine
from sosa_stream.protocol.messages import Ack, AckState, Bye, Command, Header, Hello, MetricFrame

NOW = 1_700_000_000.0
"""A fixed time of receipt."""
COLUMNS = ("tick", "loss", "grad_norm", "lr", "lr_multiplier", "step_seconds", "skipped")
AUTO_POLICY: Mapping[str, Any] = {
    "mode": "auto",
    "allow": ["skip_step", "scale_lr", "clip_grad", "rollback", "stop"],
}

NO_SNAPSHOTS: Mapping[str, Any] = {**AUTO_POLICY, "snapshots": False}
"""The same where nothing can be gone back to: of a damaged run only the rate is left to turn."""


def header(rank: int = 0, world_size: int = 1, *, run: str = "run", generation: str = "g1", seq: int = 1) -> Header:
    """Who sends: rank ``r`` runs on host ``host-r``."""
    return Header(
        run=run,
        generation=generation,
        source=f"{generation}-{rank}",
        rank=rank,
        world_size=world_size,
        host=f"host-{rank}",
        seq=seq,
    )


def hello(
    rank: int = 0, world_size: int = 1, *, policy: Mapping[str, Any] | None = None, generation: str = "g1"
) -> Hello:
    """A rank joins; by default its run is only observed."""
    return Hello(
        header=header(rank, world_size, generation=generation),
        pid=1000 + rank,
        device="cpu",
        versions={},
        parameters=(),
        policy=dict(policy or {"mode": "observe"}),
    )


def bye(rank: int = 0, world_size: int = 1, *, generation: str = "g1") -> Bye:
    """A rank leaves by itself."""
    return Bye(header=header(rank, world_size, generation=generation), reason="end", exit_code=0, dropped=0)


def frame(
    loss: ArrayLike,
    *,
    rank: int = 0,
    world_size: int = 1,
    first_step: int = 0,
    grad_norm: ArrayLike = 1.0,
    lr: ArrayLike = 1e-3,
    lr_multiplier: ArrayLike = 1.0,
    skipped: ArrayLike = 0.0,
    step_seconds: float = 0.1,
    generation: str = "g1",
) -> MetricFrame:
    """Consecutive steps of one rank; scalars are repeated for every step."""
    losses = np.atleast_1d(np.asarray(loss, dtype=np.float64))
    steps = np.arange(first_step, first_step + len(losses), dtype=np.int64)
    columns = [steps, losses, grad_norm, lr, lr_multiplier, step_seconds, skipped]
    values = np.column_stack(
        [np.broadcast_to(np.asarray(column, dtype=np.float64), losses.shape) for column in columns]
    )
    return MetricFrame(
        header=header(rank, world_size, generation=generation), columns=COLUMNS, steps=steps, values=values
    )


def feed(engine: Engine, events: Iterable[Event], now: float = NOW) -> list[Effect]:
    """Hand events over, a hundredth of a second apart; all effects in order."""
    effects: list[Effect] = []
    for i, event in enumerate(events):
        effects += engine.handle(event, now + 0.01 * i)
    return effects


def incident(**fields: Any) -> Incident:
    """An open, critical NaN loss of run ``run``, but for what ``fields`` say."""
    nan_loss: dict[str, Any] = {
        "id": "i1",
        "run": "run",
        "kind": "nan_loss",
        "group": Group.NUMERICAL,
        "severity": Severity.CRITICAL,
        "state": IncidentState.OPEN,
        "first_step": 3,
        "detected_step": 4,
        "message": "loss is NaN",
    }
    return Incident(**(nan_loss | fields))


def incidents_of(losses: ArrayLike, **columns: Any) -> tuple[Incident, ...]:
    """The incidents of a one-rank run with these losses, observed only."""
    engine = Engine("run")
    feed(engine, [hello(), frame(losses, **columns)])
    return engine.view().incidents


@dataclass(kw_only=True)
class SimulatedJob:
    """A training job with a loss that falls from 4.5 to 1.8, noise, warm-up and cosine, and faults that can be planted.

    ``lr_factor(step)`` multiplies the script's learning rate, ``nan_at`` maps a step to the rank with a bad batch. A
    rate above 30 times the schedule's peak ruins the weights; only a rollback brings them back.
    """

    seed: int
    num_steps: int = 500
    world_size: int = 2
    policy: Mapping[str, Any] = field(default_factory=lambda: AUTO_POLICY)
    lr_factor: Callable[[int], float] = lambda step: 1.0
    nan_at: Mapping[int, int] = field(default_factory=dict)
    damage: Callable[[int, float], float] | None = None
    """Adds to the loss at a step, given the multiplier in force: a fault of the test's own."""
    answers: Callable[[Command], AckState | None] = lambda command: None
    """What all ranks say instead of carrying a command out."""
    stop_at: int | None = None
    """Ends the run this early; the schedule is still that of ``num_steps``."""
    batch: int = 1
    """Steps that one frame holds."""
    asks: Mapping[int, Callable[[Engine], Request]] = field(default_factory=dict)
    """What a person asks for before a step."""
    restarts: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """Steps at which new processes go on, as they were told to by a policy: what was done to the old ones is gone."""

    def run(self) -> Simulation:
        """Train to the end with an engine that watches."""
        return Simulation(self).run()


class Simulation:
    """One pass of a `SimulatedJob`: ``engine``, every effect, and the events that it was fed."""

    def __init__(self, job: SimulatedJob) -> None:
        self.job = job
        self.engine = Engine("run")
        self.effects: list[Effect] = []
        self.events: list[Event] = []
        self.published: list[Command] = []
        self._rng = np.random.default_rng(job.seed)
        self._now = NOW
        self._due: list[tuple[int, Command]] = []
        self._generation = "g1"
        self._multiplier = 1.0
        self._ruined_since: int | None = None
        self._undo: dict[str, float] = {}
        self._rows: list[list[tuple[float, ...]]] = [[] for _ in range(job.world_size)]

    @property
    def incidents(self) -> tuple[Incident, ...]:
        return self.engine.view().incidents

    @property
    def commands(self) -> tuple[CommandRecord, ...]:
        return self.engine.view().commands

    def run(self) -> Simulation:
        job = self.job
        self._join(job.policy)
        num_steps = job.num_steps if job.stop_at is None else job.stop_at
        for step in range(num_steps):
            if step in job.restarts:
                self._restart(step, job.restarts[step])
            if step in job.asks:
                self._tell(job.asks[step](self.engine))
            self._carry_out(step)
            self._train(step)
            if (step + 1) % job.batch == 0:
                self._send(step)
        self._send(num_steps - 1)
        for rank in range(job.world_size):
            self._tell(bye(rank, job.world_size, generation=self._generation))
        return self

    def _join(self, policy: Mapping[str, Any]) -> None:
        for rank in range(self.job.world_size):
            self._tell(hello(rank, self.job.world_size, policy=policy, generation=self._generation))

    def _restart(self, step: int, policy: Mapping[str, Any]) -> None:
        self._send(step - 1)
        self._generation = f"g{step}"
        self._multiplier = 1.0
        self._due, self._undo = [], {}
        self._join(policy)

    def _head(self, rank: int) -> Header:
        return header(rank, self.job.world_size, generation=self._generation)

    def _train(self, step: int) -> None:
        job, rng = self.job, self._rng
        peak = 3e-3
        schedule = min((step + 1) / 50, 1.0) * 0.5 * (1 + math.cos(math.pi * step / job.num_steps)) * peak
        lr = schedule * job.lr_factor(step)
        healthy = 1.8 + 2.7 * math.exp(-step / 120)
        noise = 0.05 + 0.05 * min(1.0, step / 100)
        excess = 0.0 if self._ruined_since is None else 5.0 * (1 - math.exp(-(step - self._ruined_since) / 2))
        if job.damage is not None:
            excess += job.damage(step, self._multiplier)
        norm = math.exp(0.4 * rng.standard_normal()) * (1.0 + 10.0 * excess) * (5.0 if rng.random() < 0.01 else 1.0)
        bad = job.nan_at.get(step)
        for rank in range(job.world_size):
            loss = math.nan if rank == bad else healthy + excess + noise * rng.standard_normal()
            grad = math.nan if bad is not None else norm
            self._rows[rank].append((step, loss, grad, lr, self._multiplier, 0.1, float(bad is not None)))
        if lr * self._multiplier > 30 * peak and self._ruined_since is None and bad is None:
            self._ruined_since = step

    def _send(self, last_step: int) -> None:
        for rank, rows in enumerate(self._rows):
            if rows:
                steps = np.arange(last_step + 1 - len(rows), last_step + 1, dtype=np.int64)
                self._tell(MetricFrame(header=self._head(rank), columns=COLUMNS, steps=steps, values=np.array(rows)))
                rows.clear()

    def _tell(self, event: Event) -> None:
        self._now += 0.01
        self.events.append(event)
        effects = self.engine.handle(event, self._now)
        self.effects += effects
        for effect in effects:
            if isinstance(effect, Publish):
                self.published.append(effect.command)
                self._due.append((3, effect.command))
            elif isinstance(effect, Withdraw):
                self._due = [(wait, command) for wait, command in self._due if command.id != effect.command]

    def _carry_out(self, step: int) -> None:
        """Three steps after a command came: held and committed by all, then applied before this step."""
        due, self._due = self._due, []
        for wait, command in due:
            answer = self.job.answers(command)
            if wait > 1:
                self._due.append((wait - 1, command))
            elif answer is not None:
                self._say(command, [answer], step)
            else:
                self._apply(command, step)
                self._say(command, [AckState.HELD, AckState.COMMITTED, AckState.APPLIED], step)

    def _say(self, command: Command, states: Sequence[AckState], step: int) -> None:
        for state in states:
            for rank in range(self.job.world_size):
                self._tell(
                    Ack(header=self._head(rank), command=command.id, state=state, tick=step, step=step, digest="d")
                )

    def _apply(self, command: Command, step: int) -> None:
        before = self._multiplier
        for action in command.actions:
            if action.action == "scale_lr":
                self._multiplier *= action.params["factor"]
            elif action.action == "rollback" and self._ruined_since is not None:
                if action.params["before_step"] <= self._ruined_since:
                    self._ruined_since = None
            elif action.action == "revert" and action.params.get("only", "scale_lr") == "scale_lr":
                self._multiplier *= self._undo[action.params["command"]]
        self._undo[command.id] = before / self._multiplier

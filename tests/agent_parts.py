"""The parts of an agent put together as `core.Agent` does it, without a daemon, a thread or an Engine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from sosa_stream.agent.core import Agent
from sosa_stream.agent.repair.actuators import Actuators, make_actuators
from sosa_stream.agent.repair.knobs import Knobs
from sosa_stream.agent.repair.ranks import Ranks, world_size
from sosa_stream.agent.repair.registry import Registry
from sosa_stream.agent.repair.snapshots import SnapshotRing
from sosa_stream.agent.repair.training_state import TrainingState
from sosa_stream.agent.step.guard import Guard
from sosa_stream.agent.step.probe import Probe
from sosa_stream.agent.transport.link import LocalLink
from sosa_stream.agent.transport.outbox import Outbox, Row, Wakeup
from sosa_stream.agent.watch.baseline import InputBaseline
from sosa_stream.agent.watch.taps import Taps
from sosa_stream.config import load_settings
from sosa_stream.detect.incidents import Severity
from sosa_stream.engine import Engine
from sosa_stream.protocol.actions import Action
from sosa_stream.protocol.messages import Ack, Command, Header
from sosa_stream.settings import AgentSettings, GuardMode, Mode

torch.set_num_threads(1)  # nets this small only lose by handing work over, most of all on a busy machine

HEADER = Header(run="run", generation="g", source="nonce", rank=0, world_size=1, host="host", seq=0)


class OpenOutbox(Outbox):
    """An outbox whose rows and messages a test reads as they come."""

    def __init__(self) -> None:
        super().__init__(64, Wakeup())
        self.rows: list[dict[str, float]] = []
        self.messages: list[Any] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.baseline = InputBaseline()
        self.broken = False

    def add_row(self, row: Row) -> None:
        if self.broken:
            raise RuntimeError("observation is broken")
        values = dict(zip(row.columns, row.read(self.baseline), strict=True))
        self.rows.append({"step": row.step, **values, **row.looks()})

    def add_logged(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.logged.append((step, {name: float(value) for name, value in metrics.items()}))

    def add_message(self, build: Callable[[Header], Any], *, urgent: bool = True) -> None:
        self.messages.append(build(HEADER))


class OneCommand:
    """A fence that lets given commands through at given ticks: on all ranks, where there is a process group."""

    def __init__(self) -> None:
        self.due: dict[int, Command] = {}
        self.elsewhere = ""
        """What kept another rank from applying it."""
        self.members = tuple(range(world_size()))

    def arrive(self, tick: int) -> Command | None:
        return self.due.pop(tick, None)

    def conclude(self, failure: str = "") -> str:
        return failure or self.elsewhere


def carry_out(actuators: Actuators, fix: Command, tick: int, step: int) -> str:
    """Apply a command as all ranks do, when none fails or this one alone: then it raises what has failed."""
    try:
        words = actuators.apply(fix, tick, step)
    except Exception:
        actuators.take_back()
        raise
    actuators.keep()
    return words


class Watch:
    """A probe with all that it needs."""

    def __init__(
        self,
        *,
        guard: bool | GuardMode = False,
        alone: bool = True,
        snapshots: bool = False,
        ranks: Ranks | None = None,
        digest_every: int = 0,
        **settings: Any,
    ) -> None:
        self.outbox = OpenOutbox()
        self.taps = Taps()
        self.said: list[str] = []
        self.registry = Registry(self.said.append)
        rank = dist.get_rank() if world_size() > 1 else 0
        self.state = TrainingState(self.registry, ranks or Ranks(rank, members=lambda: self.fence.members))
        self.errors: list[tuple[BaseException, bool]] = []
        self.ring = SnapshotRing(self.state, AgentSettings(**settings), 2000, self.said.append) if snapshots else None
        mode = guard if isinstance(guard, GuardMode) else GuardMode.SYNC if guard else GuardMode.OFF
        self.knobs = Knobs(self.said.append)
        self.actuators = make_actuators(self.state, self.ring, 10000.0, self.knobs, deliveries=self.taps.deliveries)
        self.probe = Probe(
            outbox=self.outbox,
            taps=self.taps,
            state=self.state,
            actuators=self.actuators,
            snapshots=self.ring,
            guard=Guard(mode, self.said.append),
            digest_after_fix=True,
            digest_every=digest_every,
            alone=alone,
            on_error=lambda error, in_force: self.errors.append((error, in_force)),
            tell=self.said.append,
        )
        self.taps.deliveries.tick = lambda: self.probe.tick
        self.fence = OneCommand()
        self.probe.fence = self.fence  # type: ignore[assignment]

    @property
    def rows(self) -> list[dict[str, float]]:
        return self.outbox.rows

    @property
    def acks(self) -> list[Ack]:
        return [message for message in self.outbox.messages if isinstance(message, Ack)]

    @contextmanager
    def installed(self, optimizer: Optimizer | None = None) -> Iterator[Watch]:
        """Watching, as under the runner; with an ``optimizer`` only that one, as the wrapper does."""
        self.probe.install(optimizer)
        self.registry.install()
        self.taps.install()
        try:
            yield self
        finally:
            self.probe.remove()
            self.taps.remove()
            self.registry.remove()


_ids = itertools.count()


def command(*actions: Action, approved: bool = True) -> Command:
    return Command(
        id=f"c{next(_ids)}",
        run="run",
        generation="g",
        seq=1,
        actions=actions,
        reason="test",
        incident="i1",
        expires_tick=1 << 40,
        approved=approved,
    )


def act(action: str, **params: Any) -> Action:
    return Action(action=action, params=params)


def toy(seed: int = 0) -> nn.Module:
    """A net with buffers (BatchNorm), so that restoring has something to forget."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


def batches(num: int, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(16, 4, generator=generator) for _ in range(num)]
    return [(x, x.sum(1, keepdim=True).sin()) for x in inputs]


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def train(model: nn.Module, optimizer: Optimizer, data: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for batch in data:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def bits(model: nn.Module, optimizer: Optimizer | None = None, buffers: bool = True) -> list[bytes]:
    """Everything that training has made, bit by bit."""
    tensors = [*model.parameters(), *(model.buffers() if buffers else ())]
    if optimizer is not None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                tensors += [v for _, v in sorted(optimizer.state.get(parameter, {}).items()) if torch.is_tensor(v)]
    return [t.detach().contiguous().numpy().tobytes() for t in tensors]


def poison(model: nn.Module) -> None:
    """One NaN among the gradients."""
    next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = math.nan  # type: ignore[union-attr]


@contextmanager
def watched_live(**settings: Any) -> Iterator[LocalLink]:
    """The whole agent in this process, as under the runner, with an Engine behind it; nothing is repaired."""
    overrides = {"mode": Mode.OBSERVE, **settings}
    agent = Agent(load_settings(overrides=overrides), run="live", say=lambda text: None)
    agent.taps.install()
    link = LocalLink(Engine("live"), lambda effect: None)
    agent.start_local(link)
    try:
        yield link
    except Exception as error:
        agent.report_exception(error)
        agent.flush()
        raise
    finally:
        agent.close()


def alarms(link: LocalLink) -> list[tuple[str, str]]:
    """Kind and severity of the incidents that are at least a warning, in order."""
    found = link.engine.view().incidents
    return [(incident.kind, str(incident.severity)) for incident in found if incident.severity >= Severity.WARNING]


def alarms_and_symptoms(link: LocalLink) -> set[str]:
    """Kinds of the incidents that are at least a warning, and what joined them."""
    found = link.engine.view().incidents
    return {kind for i in found if i.severity >= Severity.WARNING for kind in (i.kind, *i.symptoms)}

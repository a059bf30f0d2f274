"""The agent of one training process: puts the parts together, starts them, ends them.

The training thread meets us only in the probe's hooks. Everything that may wait (sockets, the store, the daemon's
child process) belongs to one background thread, or, for a process that watches itself, happens inside the step.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

import sosa_stream
from sosa_stream.agent import failure, process
from sosa_stream.agent.environment import can_restart, pod_name
from sosa_stream.agent.fence.fence import Fence
from sosa_stream.agent.fence.membership import Membership
from sosa_stream.agent.fence.stores import MemoryStore, RegisterStore
from sosa_stream.agent.footprint import footprint
from sosa_stream.agent.last_checkpoint import LastCheckpoint
from sosa_stream.agent.place import Identity, Place
from sosa_stream.agent.repair.actuators import make_actuators
from sosa_stream.agent.repair.diagnostics import DumpDiagnostics
from sosa_stream.agent.repair.knobs import Knobs
from sosa_stream.agent.repair.ranks import Ranks, ranks_of_node
from sosa_stream.agent.repair.registry import Registry
from sosa_stream.agent.repair.saving import Checkpoints, SaveCheckpoint
from sosa_stream.agent.repair.snapshots import SnapshotRing
from sosa_stream.agent.repair.stopping import StopMark
from sosa_stream.agent.repair.training_state import TrainingState
from sosa_stream.agent.sinks import Sinks
from sosa_stream.agent.splitting.memory import breakdown, is_out_of_memory
from sosa_stream.agent.stacks import Stacks
from sosa_stream.agent.step.attribution import Attribution
from sosa_stream.agent.step.guard import Guard
from sosa_stream.agent.step.probe import Probe
from sosa_stream.agent.transport.courier import Courier, Progress
from sosa_stream.agent.transport.link import Link, LocalLink
from sosa_stream.agent.transport.outbox import Outbox, Wakeup
from sosa_stream.agent.transport.thread import AgentThread
from sosa_stream.agent.watch.looks import Census
from sosa_stream.agent.watch.metrics import Libraries, columns_of
from sosa_stream.agent.watch.taps import Taps
from sosa_stream.protocol import messages
from sosa_stream.protocol.messages import Layers, Phase
from sosa_stream.settings import Mode, Settings, SinkChoice, Switch

EXIT_RESTART = 79
"""Exit code of a rank that a `restart` ended, with its training thread stuck; torch elastic starts them all again."""
EXIT_IN_DOUBT = 75
"""Exit code of a rank that cannot know what the others do; torch elastic then restarts them all."""

LOOK_EVERY = 8
"""Ticks between two looks for trainers that the script has imported since, and at its knobs."""


class Agent:
    """Watches, and where allowed repairs, the training in this process.

    Args:
        settings: what to do and how much.
        run: name of the run; the ranks take rank 0's.
        rank: this process among ``world_size``.
        optimizer: the one optimizer to watch; None watches every optimizer of the process and sees the loss through
            ``torch.autograd.backward``.
        say: where a sentence for the user goes; each is said once.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        run: str,
        rank: int = 0,
        world_size: int = 1,
        optimizer: Optimizer | None = None,
        parameters: Sequence[str] = (),
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.settings = settings
        self._place = Place(Identity(rank=rank, world_size=world_size), run)
        self._optimizer = optimizer
        self._parameters = parameters
        self._said: set[str] = set()
        self._say_to = say or _to_stderr
        self.taps = Taps()
        self._wakeup = Wakeup()
        self._outbox = Outbox(settings.agent.ring_frames, self._wakeup)
        self.registry = Registry(self.say)
        ranks = Ranks(
            rank,
            ranks_of_node(os.environ, rank, world_size),
            lambda: self.probe.fence.members if self.probe.fence is not None else (rank,),
            1.5 * settings.fence.outcome_seconds,  # those that are told to take an action back come that much later
        )
        self.state = TrainingState(self.registry, ranks, settings.agent.rollback_schedulers)
        self.checkpoints = Checkpoints(
            self.state,
            settings.agent,
            settings.checkpoints_wanted,
            world_size,
            lambda: Path(settings.agent.checkpoint_dir or Path(settings.home, self._place.run, "checkpoints")),
            self._checkpoint_facts,
            self.standing_fixes,
        )
        snapshots = None
        if settings.snapshots_wanted:
            snapshots = SnapshotRing(self.state, settings.agent, settings.auto.max_rollback_steps, self.say)
        self.knobs = Knobs(self.say)
        self._stop_mark = StopMark(Path(settings.home, run, "stopped"), os.environ, self._say_here)
        self.actuators = make_actuators(
            self.state,
            snapshots,
            settings.auto.max_lr_change,
            self.knobs,
            self.taps.deliveries,
            {
                "save_checkpoint": SaveCheckpoint(
                    self.checkpoints, settings.agent, settings.agent.checkpoints is not Switch.OFF, self._say_here
                ),
                "dump_diagnostics": DumpDiagnostics(self.state, self._diagnostics_path, self._facts, self._say_here),
            },
            self._stop_mark.leave,
        )
        self.after_tick: Callable[[], None] | None = None
        """Called after each step that is watched; does not raise."""
        self._local = False
        self._attribution = Attribution(alone=world_size == 1, tell=self.say) if settings.attribution_wanted else None
        self.probe = Probe(
            outbox=self._outbox,
            taps=self.taps,
            state=self.state,
            actuators=self.actuators,
            snapshots=snapshots,
            guard=Guard(settings.guard_mode, self._tell),
            attribution=self._attribution,
            digest_after_fix=settings.agent.digest_after_fix,
            digest_every=settings.agent.digest_every,
            layers_every=settings.agent.layers_every,
            features=settings.agent.features,
            alone=world_size == 1,
            on_error=self._on_error,
            tell=self._tell,
            after_tick=self._after_tick,
        )
        self.taps.deliveries.tick = lambda: self.probe.tick
        self.taps.on_compile = self.probe.looks.forward.give_up
        if rank == 0:
            self.probe.looks.tell_layers = self._tell_layers
        self._last_checkpoint = LastCheckpoint(
            self.checkpoints, self.probe, settings.agent.sigterm_seconds, self.say, self._say_here
        )
        self._libraries = Libraries(self.log)
        self._sinks = Sinks(
            settings.agent.sinks if rank == 0 else SinkChoice.OFF, lambda: max(0, self.probe.step - 1), self.say
        )
        self._stacks: Stacks | None = None
        self._courier: Courier | None = None
        self._tee: LocalLink | None = None
        self._thread: AgentThread | None = None
        self._closed = False
        self._posterior_refused = False
        self._script_raised = False
        self._memory: dict[str, int] = {}

    # -- starting --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Watch, with a thread that talks to the daemon.

        Raises:
            StopTraining: the run was stopped, and torchrun has started it again.
        """
        self._stop_mark.heed()
        self.probe.install(self._optimizer)
        self.registry.install()
        if self._optimizer is None:
            self.taps.install()
        self._thread = AgentThread(
            settings=self.settings,
            place=self._place,
            wakeup=self._wakeup,
            join=self._join,
            trains=lambda: self.has_trained,
            tee=lambda: self._tee,
            greets=self.watches_everything,
            say=self.say,
            say_here=self._say_here,
            on_error=lambda error: self._on_error(error, False),
        )
        self._thread.start()
        self._last_checkpoint.install()
        process.started(self)

    def show(self, tee: LocalLink) -> None:
        """Let ``tee`` see, from the agent's thread, what this rank sends from here on."""
        self._tee = tee

    @property
    def watches_everything(self) -> bool:
        """Whether every optimizer of the process is watched, not one wrapper's."""
        return self._optimizer is None

    @property
    def run(self) -> str:
        """The run that this process belongs to."""
        return self._place.run

    @property
    def is_closed(self) -> bool:
        """Whether it has been."""
        return self._closed

    @property
    def has_trained(self) -> bool:
        """Whether an optimizer has stepped."""
        return self.probe.tick > 0

    def start_local(self, link: LocalLink) -> None:
        """Watch with the Engine in this process: detection and repair happen inside the step."""
        self._stop_mark.heed()
        self._local = True
        link.hear = self._sinks.hear
        self.probe.install(self._optimizer)
        self.registry.install()
        self._join(self._place.alone(), link, MemoryStore())
        self._pump_local()
        self._last_checkpoint.install()
        process.started(self)

    def log(self, metrics: Mapping[str, Any] | None, more: Mapping[str, Any] | None = None) -> None:
        """What the script logs at the step that it has taken last; never raises."""
        if self._closed:
            return
        if not isinstance(metrics, Mapping | None):
            self.say(f"log: names and numbers are wanted, not {type(metrics).__name__}; it is left out")
            metrics = None
        try:
            columns, refused = columns_of({**(metrics or {}), **(more or {})})
            self._outbox.add_logged(max(0, self.probe.step - 1), columns)
            for name in refused:
                self.say(f"log: {name!r} is not a number with a name; it is left out")
        except Exception as error:
            self._on_error(error, False)

    def recent_losses(self, after: int) -> list[tuple[int, float]]:
        """Step and loss of at most the last 32 steps behind step ``after``, as far as they are on the host."""
        return self._outbox.losses(after)

    def standing_fixes(self) -> dict[str, Any]:
        """What fixes have changed and will go on changing, as it is written beside a checkpoint: JSON values.

        ``{"schema_version", "run", "generation", "fixes"}``; see `Actuators.standing_fixes`. For the training thread.
        """
        return {
            "schema_version": 1,
            "run": self._place.run,
            "generation": self._place.generation,
            "fixes": self.actuators.standing_fixes(),
        }

    def observe_posterior(self, mu: torch.Tensor, logvar: torch.Tensor) -> None:
        """A VAE's approximate posterior of one training batch; never raises."""
        try:
            self.probe.looks.posterior.observe(mu, logvar)
        except Exception as error:
            if not self._posterior_refused:  # a shape may be another in each batch
                self._posterior_refused = True
                self.say(f"observe_posterior: {error}; such batches are left out")

    def hand_over(self, model: torch.nn.Module, batch: Any, compute: Callable[[torch.nn.Module], torch.Tensor]) -> None:
        """A step is about to run ``compute(model)``, the loss of ``batch``, and might be repeated; never raises."""
        if self._attribution is not None:
            try:
                self._attribution.hand_over(model, batch, compute)
            except Exception as error:
                self._on_error(error, False)

    def see_inputs(self, model: torch.nn.Module, batch: Any) -> None:
        """The batch that is about to go into ``model``, where no hook looks for it; never raises."""
        self.probe.before_forward(model)
        if self.probe.observing:
            self.probe.looks.forward.see(model, batch)

    def say(self, text: str, every_rank: bool = False) -> None:
        """One sentence for the user, once, by rank 0 unless each rank has its own to say."""
        if text not in self._said and (every_rank or self._place.rank == 0):
            self._said.add(text)
            with contextlib.suppress(Exception):
                self._say_to(f"rank {self._place.rank}: {text}" if every_rank and self._place.rank else text)

    def _tell_layers(self, seen: Census) -> None:
        norms = np.array(seen.norms.read(), dtype=np.float32)
        self._outbox.add_message(
            lambda header: Layers(header=header, step=seen.step, names=seen.names, norms=norms, orphans=seen.orphans),
            urgent=False,
        )

    def _tell_knobs(self) -> None:
        states = self.knobs.changed() if self._place.rank == 0 else None
        if states is not None:
            self._outbox.add_message(lambda header: messages.Knobs(header=header, knobs=states), urgent=False)

    def _diagnostics_path(self, step: int) -> Path:
        return Path(self.settings.home, self._place.run, "diagnostics", f"rank{self._place.rank}-step{step}.txt")

    def _stacks_path(self, rank: int) -> Path:
        return Path(self.settings.home, self._place.run, "stacks", f"rank{rank}.txt")

    def _facts(self) -> dict[str, object]:
        return {
            "run": self._place.run,
            "generation": self._place.generation,
            "rank": f"{self._place.rank} of {self._place.world_size} on {self._place.identity.host}",
            "phase": self.taps.phase,
            "in force": self.actuators.in_force,
            "commands": "".join(f"\n  {each}" for each in self.actuators.history[-32:]),
            "last steps": "".join(f"\n  {each}" for each in self._outbox.recent()),
        }

    def _checkpoint_facts(self) -> dict[str, Any]:
        return {
            "run": self._place.run,
            "generation": self._place.generation,
            "rank": self._place.rank,
            "world_size": self._place.world_size,
            "last_step": "".join(self._outbox.recent()[-1:]),
            "versions": {"sosa_stream": sosa_stream.__version__, "torch": torch.__version__},
        }

    def _say_here(self, text: str) -> None:
        self.say(text, every_rank=True)

    def _tell(self, text: str) -> None:
        if not self._local:  # in one process the Engine's own words say more
            self.say(text)

    def _join(self, membership: Membership, link: Link, store: RegisterStore | None) -> Courier:
        fence = None
        if store is not None:
            fence = Fence(
                rank=self._place.rank,
                world_size=self._place.world_size,
                generation=membership.generation,
                store=store,
                settings=self.settings.fence,
                wake=self._wakeup.set,
            )
        if not self._local:  # in one process alone the step itself is the thread that would ask
            self._stacks = Stacks(self._place.rank, self._stacks_path)
        self._courier = Courier(
            settings=self.settings,
            identity=self._place.identity,
            membership=membership,
            link=link,
            outbox=self._outbox,
            fence=fence,
            # Never the first to touch CUDA: a script that forks afterwards could not use it in its children.
            device=torch.cuda.get_device_name() if torch.cuda.is_initialized() else "cpu",  # type: ignore[no-untyped-call]
            versions={"torch": torch.__version__},
            parameters=self._parameters,
            progress=self._progress,
            stacks=self._stacks,
            restart=self._end_for_restart if can_restart(os.environ) else None,
            footprint=lambda: replace(footprint(self.probe.device), epoch_batches=self.taps.deliveries.epoch_batches),
            pod=pod_name(os.environ),
            refusal=lambda command: self.actuators.refusal(command, self.probe.step),
            say=self.say,
            hear=self._sinks.hear,
            script_raised=lambda: self._script_raised,
        )
        self.probe.fence = fence
        return self._courier

    def _end_for_restart(self, why: str) -> None:
        self.say(f"this rank ends with exit code {EXIT_RESTART}, to be started again: {why}", every_rank=True)
        sys.stderr.flush()
        os._exit(EXIT_RESTART)

    def _progress(self) -> Progress:
        return Progress(tick=self.probe.tick, step=self.probe.step, phase=self.taps.phase)

    # -- in one process ----------------------------------------------------------------------------------------------

    def _after_tick(self) -> None:
        if self.after_tick is not None:
            self.after_tick()
        if self.probe.tick % LOOK_EVERY == 1:
            self._libraries.find()
            self._sinks.look(self.actuators.history)
            self._tell_knobs()
            self._last_checkpoint.look()
        if self._local:
            self._pump_local()

    def _pump_local(self) -> None:
        assert self._courier is not None
        self._courier.pump()
        fence = self.probe.fence
        # One round hands the step over; a command in answer takes a few more to be agreed on with ourselves.
        for _ in range(16):
            if fence is None or not fence.busy:
                break
            self._courier.pump()

    def flush(self) -> None:
        """In one process: let the Engine see now what is waiting."""
        if self._local:
            self._pump_local()

    # -- ending ------------------------------------------------------------------------------------------------------

    def may_by_itself(self, action: str) -> bool:
        """Whether this rank may do ``action`` without asking, which changes nothing that ranks must agree on."""
        allowed = self.settings.mode is Mode.AUTO and action in self.settings.auto.allow
        return allowed and not (self._courier is not None and self._courier.killed)

    def measure_memory(self) -> None:
        """Memory has run out: what holds it, before it is let go, for the coming `report_exception`."""
        with contextlib.suppress(Exception):
            optimizers = [self._optimizer] if self._optimizer is not None else self.state.optimizers
            self._memory = breakdown(optimizers)

    def report_exception(self, error: BaseException, *, ends: bool = False, num_parts: int = 0) -> str:
        """The script raised; ``ends`` where nobody catches it and the script is about to tell of it itself.

        With ``num_parts`` it did not get that far: memory had run out, and the batch was run in so many parts. Returns
        what explains the error, several lines; empty where nothing does.
        """
        if ends:
            self._script_raised = True
            if self._courier is not None:
                self._courier.ending = True
        if is_out_of_memory(error) and not self._memory:
            self.measure_memory()
        memory, self._memory = self._memory, {}
        phase = Phase.FORWARD if num_parts else self.taps.phase
        explanation = "" if num_parts else failure.explanation(error, memory)
        told = failure.report(
            error, step=self.probe.step, phase=phase, memory=memory, num_parts=num_parts, explanation=explanation
        )
        self._outbox.add_message(told)
        if ends:
            kind = "oom" if is_out_of_memory(error) else "exception"
            self._sinks.script_raised(kind, failure.in_words(error, explanation), self.probe.step)
        return explanation

    def close(self, reason: str = "end of script", exit_code: int = 0, checkpoint: str = "final") -> None:
        """Put torch back as it was, say goodbye, and wait, within bounds, until the daemon has everything.

        Args:
            checkpoint: the kind to write where checkpoints are kept: ``final``, ``error`` or ``interrupted``.
        """
        if self._closed:
            return
        self._closed = True
        process.ended(self)
        self._last_checkpoint.save(checkpoint)
        self.probe.remove()
        self.taps.remove()
        self.registry.remove()
        self._libraries.remove()
        if self._local:
            assert self._courier is not None
            self._courier.close(reason, exit_code, timeout_seconds=0.0)
        elif self._thread is not None:
            self._thread.close(reason, exit_code)
        if self._stacks is not None:
            self._stacks.close()
        self._sinks.close(self.actuators.history)

    def close_at_exit(self) -> None:
        """The interpreter ends, and nobody has said how: it remembers an exception that nobody caught."""
        self.close(checkpoint=process.ending(getattr(sys, "last_value", None)))

    def disable_in_child(self) -> None:
        """A forked worker trains nothing: there, nothing of us may run."""
        self._closed = True
        self.probe.controlling = False
        self.probe.observing = False
        self.probe.looks.remove()
        self.probe.at_rest = None
        self.taps.remove()
        self.registry.remove()
        if self._thread is not None:
            self._thread.after_fork_in_child()

    def _on_error(self, error: BaseException, in_force: bool) -> None:
        """Something of ours failed. Where all ranks must act alike this rank ends; elsewhere training goes on."""
        if in_force and self._place.world_size > 1:
            self.say(
                f"this rank cannot know what the others do and ends with exit code {EXIT_IN_DOUBT}: {error}",
                every_rank=True,
            )
            sys.stderr.flush()
            os._exit(EXIT_IN_DOUBT)
        where = "".join(traceback.format_exception(error)[-3:])
        self.say(f"an internal error, training goes on: {type(error).__name__}: {error}\n{where}", every_rank=True)


def _to_stderr(text: str) -> None:
    print(f"sosa: {text}", file=sys.stderr, flush=True)

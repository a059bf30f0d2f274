"""Two processes that train run after run in one gloo group, and the daemon that watches those that are watched.

Starting a process costs seconds and a run takes two: the processes stay, each run makes its model and its agent anew.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.rescuing.cases import NUM_STEPS, Case
from sosa_stream.config import load_settings
from sosa_stream.settings import Mode, Settings

WORLD_SIZE = 2
JOIN_SECONDS, RUN_SECONDS = 20.0, 120.0
ALLOW = (
    *("skip_step", "clip_grad", "scale_lr", "rollback", "reset_optimizer_state", "grad_accumulation", "split_batch"),
    *("set_loss_scale", "set_knob", "dump_diagnostics", "none"),
)
"""Every reversible action, and the skipping of a step."""
QUICK = {"agent.flush_seconds": 0.004, "fence.lead_seconds": 0.02, "fence.poll_seconds": 0.002}
"""A step takes 3 ms here, where it takes a second in the runs that this is for: so that a fix needs about 15 steps from
fault to tick, and not 170, whatever waits for a clock waits less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run. ``point`` is the oracle's."""

    case: Case
    arm: str
    seed: int
    point: Any = None
    run: str = ""
    daemon: str = ""


_UNKNOWN = {"value": math.inf, "clean_seconds": math.nan}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one run came to. ``value`` is the held-out loss at the end, infinite where training did not get there."""

    value: float
    initial: float
    num_steps: int
    ended: str
    seconds: float
    cpu_seconds: float
    ranks_agree: bool
    clean_seconds: float = math.nan
    """What the clean run of this program and seed took right before this one; of runs of ``auto`` only."""
    incidents: tuple[dict[str, Any], ...] = ()
    commands: tuple[dict[str, Any], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has neither infinity nor NaN."""
        unknown = {key: None for key in _UNKNOWN if not math.isfinite(getattr(self, key))}
        return {**asdict(self), **unknown}

    @classmethod
    def read(cls, values: dict[str, Any]) -> Outcome:
        unknown = {key: other for key, other in _UNKNOWN.items() if values.get(key) is None}
        return cls(**{**values, **unknown})


class Ranks:
    """The two processes and the daemon; whatever breaks is started anew."""

    def __init__(self) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="rescue-")
        self._num = itertools.count()
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        read_end, write_end = os.pipe()
        command = [sys.executable, "-m", "sosa_stream.cli", "daemon", "--home", self._home.name]
        command += ["--bind", "tcp://127.0.0.1:0", "--http", "127.0.0.1:0", "--ready-fd", str(write_end)]
        with open(Path(self._home.name) / "daemon.log", "wb") as log:
            self._daemon = subprocess.Popen(command, pass_fds=[write_end], stderr=log, stdin=subprocess.DEVNULL)
        os.close(write_end)
        with os.fdopen(read_end) as ready:
            self._address = json.loads(ready.readline())["address"]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()
        self._daemon.terminate()
        self._daemon.wait(20)
        self._home.cleanup()

    def run(self, case: Case, arm: str, seed: int, point: Any = None) -> Outcome:
        """Train once on both ranks."""
        if not self._processes:
            self._start()
        name = f"{arm}-{seed}-{next(self._num)}"
        job = Job(case=case, arm=arm, seed=seed, point=point, run=name, daemon=self._address)
        answers: list[dict[str, Any]] = []
        try:
            for pipe in self._pipes:
                pipe.send(job)
            for pipe in self._pipes:
                if not pipe.poll(RUN_SECONDS):
                    raise EOFError
                answers.append(pipe.recv())
        except (EOFError, OSError):
            codes = [process.exitcode for process in self._processes]
            self._end()
            nothing = {"value": math.inf, "initial": 0.0, "num_steps": 0, "seconds": 0.0, "cpu_seconds": 0.0}
            answers = [{**nothing, "ended": f"a rank died or hung (exit codes {codes})", "digest": ""}] * WORLD_SIZE
        first, second = answers
        seen = self._seen(name) if arm == "auto" else {}
        agree = first["digest"] == second["digest"]
        del first["digest"]
        return Outcome(**{**first, "ranks_agree": agree, **seen})

    def _seen(self, run: str) -> dict[str, Any]:
        """What the daemon saw and did, from its recording."""
        from sosa_stream.replay.recordings import replay_recording

        path = Path(self._home.name) / run / "run.sosa"
        if not path.exists():
            return {}
        replay = replay_recording(path)
        incidents = [
            {
                "kind": incident.kind,
                "severity": str(incident.severity),
                "first_step": incident.first_step,
                "detected_step": incident.detected_step,
                "symptoms": list(incident.symptoms),
            }
            for incident in replay.incidents
        ]
        kinds = {incident.id: incident.kind for incident in replay.incidents}
        commands = [
            {
                "incident": kinds.get(record.incident, ""),
                "actions": [action.as_dict() for action in record.actions],
                "state": str(record.state),
                "verdict": None if record.verdict is None else str(record.verdict),
                "applied_step": record.applied_step,
                "confidence": round(record.confidence, 3),
                "reason": record.reason[-160:],
            }
            for record in replay.commands
        ]
        return {"incidents": tuple(incidents), "commands": tuple(commands)}

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        rendezvous = Path(self._home.name) / f"port-{next(self._num)}"
        for rank in range(WORLD_SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(rendezvous), theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _end(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(1.0)
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def _serve(rank: int, rendezvous: str, pipe: Connection) -> None:
    """A rank: trains what it is told to until nobody tells it any more."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    path = Path(rendezvous)
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, WORLD_SIZE, is_master=True, wait_for_workers=False)
        path.with_suffix(".new").write_text(str(store.port))
        path.with_suffix(".new").rename(path)
    else:
        while not path.exists():
            time.sleep(0.01)
        store = dist.TCPStore("127.0.0.1", int(path.read_text()), WORLD_SIZE, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE)
    with suppress(EOFError, OSError):
        while True:
            pipe.send(_train(pipe.recv(), rank))
    os._exit(0)


def _train(job: Job, rank: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from benchmarks.rescuing.arms import ARMS, Arm, Oracle
    from benchmarks.rescuing.faults import NoFault
    from benchmarks.rescuing.programs import PROGRAMS

    fault = NoFault() if job.arm == "clean" else job.case.build()
    program = PROGRAMS[job.case.program](job.seed, rank, fault)
    initial = program.evaluate()
    arm = Oracle(program, job.point) if job.arm == "oracle" else ARMS.get(job.arm, Arm)(program)
    arm.install()
    close = _watch(job, rank, program) if job.arm == "auto" else lambda: None
    dist.barrier()
    began, cpu, ended, step = time.perf_counter(), time.process_time(), "", 0
    try:
        for step in range(NUM_STEPS):
            arm.before_step(step)
            arm.after_step(step, program.step(step))
    except SystemExit:
        ended = "stop"
    except torch.OutOfMemoryError as error:
        ended = str(error)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    dist.barrier()
    close()
    value = program.evaluate() if not ended else math.inf
    return {
        "value": value if math.isfinite(value) else math.inf,
        "initial": initial,
        "num_steps": NUM_STEPS if not ended else step,
        "ended": ended,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "digest": _digest(program),
    }


def _watch(job: Job, rank: int, program: Any) -> Any:
    """The agent as under the runner, or the wrapper where the script uses it; returns what ends it."""
    import torch.distributed as dist

    from sosa_stream.agent import process, register_knob
    from sosa_stream.agent.core import Agent
    from sosa_stream.agent.wrapper import SOSATrainingWrapper

    settings = _settings(job)
    if job.case.fault == "Memory":
        wrapper = SOSATrainingWrapper(
            program.replica, program.optimizers[0], settings, tempfile.gettempdir(), checkpoint_every=10**9, say=_quiet
        )
        program.wrapper, close = wrapper, wrapper.close
    else:
        agent = Agent(settings, run=job.run, rank=rank, world_size=WORLD_SIZE, say=_quiet)
        agent.start()
        close = agent.close
    if knob := program.knob():
        register_knob(knob)
    watching = process.current()
    deadline = time.monotonic() + JOIN_SECONDS
    while watching is not None and watching.probe.fence is None and time.monotonic() < deadline:
        time.sleep(0.005)
    dist.barrier()
    return close


def _settings(job: Job) -> Settings:
    return load_settings(
        overrides={
            "mode": Mode.AUTO,
            "run": job.run,
            "project": job.run,  # no run learns from another: cases and seeds are independent
            "auto.allow": list(ALLOW),
            "agent.daemon": job.daemon,
            "home": tempfile.gettempdir(),
            **({} if job.case.step_seconds else QUICK),
        }
    )


def _digest(program: Any) -> str:
    """Of the weights, which must be the same on all ranks whatever was done to them."""
    digest = hashlib.blake2b(digest_size=8)
    for net in program.nets:
        for parameter in net.parameters():
            digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def _quiet(text: str) -> None:
    if os.environ.get("RESCUE_TALK"):
        print(text, file=sys.stderr, flush=True)

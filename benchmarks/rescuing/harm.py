"""Healthy programs in `auto`, with everything reversible allowed: what is done to them, whether they are left alone.

Those of `benchmarks.detection.healthy`, one process each with the Engine inside the step, so that nothing depends on
the machine's speed: where nothing is applied, parameters must end bit-identical to those of the unwatched program.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

import torch

from benchmarks.detection import healthy
from benchmarks.detection.tasks import Task
from benchmarks.rescuing.ranks import ALLOW
from sosa_stream.agent import log
from sosa_stream.agent.core import Agent
from sosa_stream.agent.transport.link import LocalLink
from sosa_stream.cli.feedback import wilson_interval
from sosa_stream.config import load_settings
from sosa_stream.decide.commands import CommandRecord
from sosa_stream.engine import Engine
from sosa_stream.settings import Mode

SEEDS = (0, 1, 2)
NUM_PROCESSES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Harm:
    """One program and seed: what was applied, and whether its parameters are those of the unwatched run."""

    program: str
    seed: int
    applied: tuple[str, ...]
    identical: bool


def main() -> dict[str, object]:
    """The share of healthy runs in which anything was applied, with Wilson's 95% interval, and who they were."""
    jobs = [(number, seed) for number in range(len(healthy.PROGRAMS)) for seed in SEEDS]
    with ProcessPoolExecutor(NUM_PROCESSES, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = list(pool.map(_compare, jobs))
    touched = [one for one in found if one.applied]
    low, high = wilson_interval(len(touched), len(found))
    return {
        "runs": len(found),
        "applied": len(touched),
        "interval": [low, high],
        "untouched_but_not_identical": [asdict(one) for one in found if not (one.applied or one.identical)],
        "touched": [asdict(one) for one in touched],
    }


def _compare(job: tuple[int, int]) -> Harm:
    number, seed = job
    kind = healthy.PROGRAMS[number]
    commands = list[CommandRecord]()
    watched, alone = _train(kind, seed, commands), _train(kind, seed, None)
    applied = tuple(
        f"step {record.applied_step}: {', '.join(action.action for action in record.actions)}: {record.verdict}"
        for record in commands
        if record.applied_step is not None
    )
    return Harm(program=kind.__name__, seed=seed, applied=applied, identical=watched == alone)


def _train(kind: type[Task], seed: int, commands: list[CommandRecord] | None) -> str:
    """A digest of all parameters at the end; ``commands`` takes what an agent did, None: there is none."""
    program = kind(seed)
    engine = Engine("program")
    agent = None if commands is None else _watch(engine)
    for step in range(program.num_steps):
        if step in program.restarts:
            if agent is not None:
                agent.close("restart")
            program.restart()
            if agent is not None:
                agent = _watch(engine)
        program.step(step)
        if (step + 1) % program.validate_every == 0:
            value = program.validate()
            if value is not None:
                log(val_loss=value)
    if agent is not None and commands is not None:
        agent.close()
        commands += engine.view().commands
    digest = hashlib.blake2b(digest_size=16)
    for tensor in _tensors(program):
        digest.update(tensor.detach().numpy().tobytes())
    return digest.hexdigest()


def _watch(engine: Engine) -> Agent:
    settings = load_settings(overrides={"mode": Mode.AUTO, "auto.allow": list(ALLOW)})
    agent = Agent(settings, run="program", say=lambda text: None)
    agent.taps.install()
    agent.start_local(LocalLink(engine, lambda effect: None))
    return agent


def _tensors(program: Task) -> Iterator[torch.Tensor]:
    """Whatever the program trains, in the order of its attributes' names."""
    for _, value in sorted(vars(program).items()):
        if isinstance(value, torch.nn.Module):
            yield from (tensor.float() for tensor in value.state_dict().values() if tensor.is_floating_point())

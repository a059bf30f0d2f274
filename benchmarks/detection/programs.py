"""Runs every live program, from the cache where it is recorded, and says what each tool saw of it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks.detection import healthy, sick
from benchmarks.detection.live import events, recording, rows_of
from benchmarks.detection.others import alarms_of_others
from benchmarks.detection.score import CLASSES, HEALTHY, Case, half_damage
from benchmarks.detection.series import Row, Run, watch
from benchmarks.detection.tasks import Task
from sosa_stream.engine import Engine

SEEDS = (0, 1, 2)
NUM_PROCESSES = 2
PROGRAMS: dict[str, tuple[type[Task], ...]] = {"healthy": healthy.PROGRAMS, "sick": sick.PROGRAMS}


def cases(part: str, *, only: Sequence[str] = (), refresh: bool = False, others: bool = True) -> list[Case]:
    """``part``: ``healthy`` or ``sick``. ``only``: beginnings of programs' names."""
    wanted = [
        (part, number, seed, refresh, others)
        for number, program in enumerate(PROGRAMS[part])
        for seed in SEEDS
        if not only or program.__name__.startswith(tuple(only))
    ]
    with ProcessPoolExecutor(NUM_PROCESSES, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(_case, wanted))


def _case(job: tuple[str, int, int, bool, bool]) -> Case:
    part, number, seed, refresh, others = job
    program = PROGRAMS[part][number]
    path = recording(program, seed, refresh=refresh)
    rows = rows_of(path)
    label, onset, half = HEALTHY, None, None
    if issubclass(program, sick.Fault):
        label, onset = program.kind, program.onset
        if program.kind in CLASSES["slow"]:
            clean = rows_of(recording(twin(program), seed, refresh=refresh))
            half = _half_damage(rows, clean, onset, "eval_loss" if program.kind == "overfitting" else "loss")
    name = f"{program.__name__}/{seed}"
    run = Run(id=name, source=program.__name__, label=label, onset=onset, rows=rows, is_live=True, half_damage=half)
    alarms = {"sosa": watch(Engine(name), events(path))}
    if others:
        alarms |= alarms_of_others(rows)
    return Case(run=run, alarms=alarms)


def twin(program: type[sick.Fault]) -> type[Task]:
    """The same program without the fault."""
    same = {name: getattr(program, name) for name in ("num_steps", "validate_every")}
    return type(
        f"Clean-{program.__name__}", (program.architecture,), {"__module__": sick.__name__, "is_sick": True, **same}
    )


def _half_damage(rows: Sequence[Row], clean: Sequence[Row], onset: int, column: str) -> int | None:
    sick_points = [(int(row["step"]), row[column]) for row in rows if column in row and row["step"] >= onset]
    clean_values = [row[column] for row in clean if column in row and row["step"] >= onset]
    num = min(len(sick_points), len(clean_values))
    if num < 20:
        return None
    point = half_damage([value for _, value in sick_points[:num]], clean_values[:num])
    return None if point is None else sick_points[point][0] - onset

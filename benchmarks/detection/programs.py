"""Runs every live program, from the cache where it is recorded, and says what each tool saw of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks.detection import healthy, sick
from benchmarks.detection.live import events, recording, rows_of
from benchmarks.detection.others import alarms_of_others
from benchmarks.detection.score import HEALTHY, MEDIAN_POINTS, Case, half_damage
from benchmarks.detection.series import Row, Run, watch
from benchmarks.detection.tasks import Task
from sosa_stream.engine import Engine
from sosa_stream.protocol.columns import SAMPLED_COLUMNS

SEEDS = (0, 1, 2)
NUM_PROCESSES = 2
DAMAGE = {
    "loss_divergence": ("loss", 1.0),
    "loss_plateau": ("loss", 1.0),
    "overfitting": ("eval_loss", 1.0),
    "posterior_collapse": ("active_units", -1.0),
}
"""What shows the damage of a slow kind, and its sign: the points are where it was logged. An oscillation moves none."""
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
        if program.kind in DAMAGE:
            clean = rows_of(recording(twin(program), seed, refresh=refresh))
            half = _half_damage(rows, clean, onset, *DAMAGE[program.kind])
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


def _half_damage(rows: Sequence[Row], clean: Sequence[Row], onset: int, column: str, sign: float) -> int | None:
    """Steps from the onset."""
    steps, values = _after(rows, onset, column)
    _, clean_values = _after(clean, onset, column)
    num = min(len(values), len(clean_values))
    if num < MEDIAN_POINTS:
        return None
    point = half_damage([sign * value for value in values[:num]], [sign * value for value in clean_values[:num]])
    return None if point is None else steps[point] - onset


def _after(rows: Sequence[Row], onset: int, column: str) -> tuple[list[int], list[float]]:
    """Steps and values of a column from the onset on; of a sampled one, the looks."""
    sampled = column in SAMPLED_COLUMNS
    those = [
        row for row in rows if column in row and row["step"] >= onset and not (sampled and math.isnan(row[column]))
    ]
    return [int(row["step"]) for row in those], [row[column] for row in those]

"""Process faults, drilled: each strikes one rank of a real job at a random step after 200 clean ones or more.

One seed is in `make test`, the others in `make test-faults`. What is told of each goes into the report of pytest
(`benchmarks.drills` makes a table of it): how long it took is recorded, and only bounded generously.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torchrun_job import Job, wait_for

pytestmark = pytest.mark.torchrun

SCRIPT = Path(__file__).with_name("drilled_training.py")
SEEDS = (1, *(pytest.param(seed, marks=pytest.mark.faults) for seed in (2, 3)))
CLEAN_STEPS = 200
GENEROUS_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """``line`` is the function that a rank hangs in, ``state`` how the incident calls that.

    ``kind`` is that of the incident where the rank ends, ``how`` what of it is told.
    """

    name: str
    ranks_per_node: int = 2
    nodes: int = 1
    kind: str = "hang"
    how: str = ""
    line: str = ""
    state: str = ""


HANGS = (
    Fault(name="extra_all_reduce", nodes=2, line="extra_all_reduce", state="waiting"),
    Fault(name="sleep", ranks_per_node=4, line="sleep_for_ever", state="standing"),
    Fault(name="gil", line="hold_the_gil", state="gil_held_or_stopped"),
    Fault(name="sigstop", state="gil_held_or_stopped"),
)
ENDS = (
    Fault(name="exception", ranks_per_node=4, kind="exception", how="ValueError"),
    Fault(name="async_exception", kind="exception", how="Interference"),
    Fault(name="sigint", kind="exception", how="KeyboardInterrupt"),
    Fault(name="sigterm", kind="rank_lost", how="SIGTERM"),
    Fault(name="sigkill", nodes=2, ranks_per_node=2, kind="rank_lost", how="SIGKILL"),
    Fault(name="abort", kind="rank_lost", how="SIGABRT"),
    Fault(name="segfault", ranks_per_node=4, kind="rank_lost", how="SIGSEGV"),
)


class Drill:
    """One fault in one job: when it struck which rank, and what was told first."""

    def __init__(self, start: Callable[..., Job], fault: Fault, seed: int) -> None:
        chance = random.Random(f"{fault.name} {seed}")
        self.fault, self.step = fault, chance.randrange(CLEAN_STEPS, 2 * CLEAN_STEPS)
        self.rank = chance.randrange(fault.ranks_per_node * fault.nodes)
        self.start = lambda **options: start(
            *("--fault", f"{fault.name}@{self.step}", "--rank", str(self.rank)),
            script=SCRIPT,
            nodes=fault.nodes,
            ranks_per_node=fault.ranks_per_node,
            **options,
        )
        self.job: Job = self.start()

    def told(self) -> dict[str, Any]:
        """The first incident of the right kind, which names this rank and no other."""
        struck_at = self.job.wait(
            lambda: next((line["struck_at"] for line in self.job.steps(self.rank) if "struck_at" in line), 0.0), "it"
        )
        kind = self.fault.kind
        incident = wait_for(lambda: [one for one in self.job.incidents() if one["kind"] == kind], kind)[0]
        self.seconds = time.time() - struck_at
        assert incident["ranks"] == [self.rank], incident
        assert self.seconds < GENEROUS_SECONDS
        return incident


@pytest.fixture
def drill(start: Callable[..., Job], fault: Fault, seed: int, record_property: Callable[[str, object], None]) -> Drill:
    drill = Drill(start, fault, seed)
    told = drill.told

    def told_and_recorded() -> dict[str, Any]:
        incident = told()
        found = {name: incident[name] for name in ("kind", "severity", "ranks", "message")}
        found |= {"seconds": round(drill.seconds, 2), "step": drill.step}
        for name, value in (found | {"nodes": fault.nodes, "world_size": drill.job.world_size}).items():
            record_property(name, value)
        return incident

    drill.told = told_and_recorded  # type: ignore[method-assign]
    return drill


def named(faults: tuple[Fault, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("fault", faults, ids=lambda fault: fault.name)


@pytest.mark.parametrize("seed", SEEDS)
@named(HANGS)
def test_the_rank_that_holds_the_others_up_is_named_with_its_line(drill: Drill, fault: Fault) -> None:
    found = drill.told()
    evidence = found["evidence"]
    assert evidence["in_step"] >= CLEAN_STEPS
    may_come_back = fault.name in ("sleep", "gil")
    assert (found["state"], found["severity"]) == ("open", "warning" if may_come_back else "critical")
    assert evidence["stands_at"][str(drill.rank)].endswith(fault.line)
    others = {str(rank): "waiting" for rank in range(drill.job.world_size)}
    assert evidence["states"] == {**others, str(drill.rank): fault.state}
    assert evidence["value"] < max(5.0, 5 * evidence["baseline"])
    if fault.name == "sigstop":
        assert "stopped" in found["message"]
        os.kill(drill.job.rank_pid(drill.rank), signal.SIGCONT)
        drill.job.wait(lambda: drill.job.incidents()[0]["state"] == "resolved", "the end of the incident")
        drill.job.finish()
    assert len(drill.job.incidents()) == 1


@pytest.mark.parametrize("seed", SEEDS)
@named(ENDS)
def test_a_rank_that_ends_is_named_and_the_job_ends_as_it_does_without_us(drill: Drill, fault: Fault) -> None:
    bare = drill.start(name="bare", agent=False)
    found = drill.told()
    assert CLEAN_STEPS - 30 <= found["first_step"] <= drill.step + 1, "frames are a little behind"
    assert fault.how in (found["evidence"].get("how") or found["evidence"]["type"])
    drill.job.ended(code=1)
    bare.ended(code=1)
    assert how_it_ended(drill.job, drill.rank) == how_it_ended(bare, drill.rank)
    # A rank may have told that its peer is gone before it was known which.
    others = [one for one in drill.job.incidents() if one["id"] != found["id"]]
    assert all(one["kind"] == "exception" and one["evidence"]["lost_peer"] for one in others), others


def how_it_ended(job: Job, rank: int) -> tuple[list[str], list[str]]:
    """What torch elastic calls the first failure, and the traceback of this rank."""
    first = re.search(
        r"Root Cause.*?rank +: (\d+).*?exitcode +: (-?\d+).*?traceback : (.*?)\n",
        re.sub(r"\(pid: \d+\)", "", job.log),
        re.S,
    )
    assert first, job.log
    trace = [line for line in job.log.splitlines() if line.startswith(f"[rank{rank}]: ")]
    return [re.sub(r"PID \d+", "PID", found) for found in first.groups()], trace

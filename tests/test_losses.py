"""Which rank is called lost, when, and how that ends. Pure, but for the processes of this host."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import pytest

from sosa_stream.daemon.departures import Departures
from sosa_stream.decide.requests import Fix
from sosa_stream.detect.incidents import Incident, IncidentState, Severity
from sosa_stream.effects import Death, Departed, JobGone, Timer
from sosa_stream.engine import Engine
from sosa_stream.processes import ending, identity, may_be_here
from sosa_stream.protocol.actions import Action
from sosa_stream.protocol.messages import (
    Ack,
    AckState,
    Bye,
    ExceptionReport,
    Heartbeat,
    Hello,
    Neighbour,
    Phase,
    ProcessState,
    Stacks,
)
from sosa_stream.protocol.recording import decode_record, encode_shell_record
from sosa_stream.testing import NOW, bye, frame, header, hello

LOST_PEER = "Connection closed by peer [127.0.0.1]:4242"


class Run:
    """Ranks that step ten times a second, from time to time with an event."""

    def __init__(self, world_size: int = 2, mode: str = "observe") -> None:
        self.engine, self.world_size, self.now, self.generation = Engine("run"), world_size, NOW, "g1"
        self.policy = {"mode": mode}
        self.begin("g1")

    def begin(self, generation: str) -> None:
        self.generation, self.next_step = generation, 0
        for rank in range(self.world_size):
            self.hand(hello(rank, self.world_size, generation=generation, policy=self.policy))
        self.step(range(self.world_size), 10)

    def hand(self, event: object) -> None:
        self.engine.handle(event, self.now)  # type: ignore[arg-type]

    def step(self, ranks: Sequence[int], num: int = 1) -> None:
        for _ in range(num):
            self.now += 0.1
            for rank in ranks:
                head = {"rank": rank, "world_size": self.world_size, "generation": self.generation}
                self.hand(frame(1.0, first_step=self.next_step, **head))
            self.next_step += 1

    def beat(self, ranks: Sequence[int], seconds: float) -> None:
        for _ in range(int(seconds)):
            self.now += 1.0
            for rank in ranks:
                at = {"tick": self.next_step, "step": self.next_step, "phase": Phase.BACKWARD}
                head = header(rank, self.world_size, generation=self.generation)
                self.hand(Heartbeat(header=head, oldest=1, dropped=0, **at))

    def wait(self, seconds: int, *seen: Neighbour) -> None:
        """Rank 0 waits for the others in a collective, and says what it sees of them."""
        at = {"phase": Phase.BACKWARD, "training": ("/job/train.py:8 main", "/torch/autograd/graph.py:7 backward")}
        for _ in range(seconds):
            self.beat([0], 1.0)
            self.hand(Stacks(header=header(0, self.world_size), tick=self.next_step, neighbours=seen, **at))

    def die(self, *deaths: tuple[int, float, str]) -> None:
        self.hand(
            Departed(
                deaths=tuple(
                    Death(generation=self.generation, rank=rank, after_seconds=after, how=how)
                    for rank, after, how in deaths
                )
            )
        )

    def fail(self, rank: int, message: str) -> None:
        self.hand(
            ExceptionReport(
                header=header(rank, self.world_size, generation=self.generation),
                type="RuntimeError",
                message=message,
                stack=(),
                step=self.next_step,
                phase=Phase.BACKWARD,
            )
        )

    @property
    def incidents(self) -> tuple[Incident, ...]:
        return self.engine.view().incidents

    @property
    def states(self) -> list[str]:
        return [view.state for view in self.engine.view().ranks]


def test_of_processes_that_end_one_after_the_other_the_first_is_the_guilty_one() -> None:
    run = Run(3)
    run.die((2, 0.0, "SIGSEGV"), (0, 0.09, "SIGTERM"))
    run.now += 1.0
    run.die((1, 0.0, "SIGTERM"))
    (found,) = run.incidents
    assert (found.kind, found.ranks, found.hosts, found.severity) == ("rank_lost", (2,), ("host-2",), Severity.CRITICAL)
    assert found.evidence["followers"] == {"0": 0.09, "1": 1.0}
    assert found.evidence["last_step"] == {"2": 9}
    assert run.states == ["lost", "lost", "lost"]


def test_processes_that_are_asked_to_end_at_once_are_a_cancelled_job_and_not_those_that_crash_at_once() -> None:
    cancelled, crashed = Run(), Run()
    cancelled.die((1, 0.0, "SIGTERM"), (0, 0.01, "SIGTERM"))
    crashed.die((1, 0.0, "SIGKILL"), (0, 0.01, "SIGKILL"))
    assert [one.severity for one in cancelled.incidents] == [Severity.INFO]
    assert [one.severity for one in crashed.incidents] == [Severity.CRITICAL]


def test_a_process_that_ends_by_itself_with_0_is_not_lost() -> None:
    run = Run()
    run.die((0, 0.0, "exit code 0"), (1, 0.0, "exit code 0"))
    assert run.incidents == ()
    assert run.states == ["ended", "ended"]


def test_what_a_rank_raises_before_it_goes_is_the_cause() -> None:
    run = Run()
    run.fail(1, "no such sample")
    run.die((1, 0.0, "SIGABRT"), (0, 0.1, "SIGTERM"))
    (found,) = run.incidents
    assert (found.kind, found.ranks, found.symptoms) == ("exception", (1,), ("rank_lost",))


@pytest.mark.parametrize("told_first", [True, False])
def test_a_rank_that_has_lost_its_peer_is_not_the_cause(told_first: bool) -> None:
    run = Run()
    if told_first:
        run.fail(0, LOST_PEER)
    run.die((1, 0.0, "SIGKILL"))
    if not told_first:
        run.fail(0, LOST_PEER)
    (found,) = run.incidents
    assert (found.kind, found.ranks) == ("rank_lost", (1,))


def test_a_rank_whose_host_falls_silent_is_lost_and_the_hang_of_the_others_is_its_symptom() -> None:
    run = Run()
    run.wait(20)
    (found,) = run.incidents
    assert (found.kind, found.ranks) == ("rank_lost", (1,))
    assert found.severity is Severity.CRITICAL
    assert "hang" in found.symptoms


@pytest.mark.parametrize(
    ("state", "kind"),
    [(ProcessState.GONE, "rank_lost"), (ProcessState.STOPPED, "hang"), (ProcessState.RUNNING, "hang")],
)
def test_a_silent_rank_is_lost_at_once_if_its_process_is_gone_and_never_while_it_is_there(
    state: ProcessState, kind: str
) -> None:
    run = Run()
    run.wait(4 if state is ProcessState.GONE else 30, Neighbour(rank=1, state=state))
    (found,) = run.incidents
    assert (found.kind, found.ranks) == (kind, (1,))


def test_the_loss_is_over_once_the_next_generation_has_stepped_and_says_how() -> None:
    run = Run()
    run.die((1, 0.0, "SIGKILL"), (0, 0.1, "SIGTERM"))
    run.now += 4.0
    run.begin("g2")
    (found,) = run.incidents
    assert found.state is IncidentState.RESOLVED
    assert found.evidence["restarted_as"] == "g2"
    assert found.evidence["restarted_after_seconds"] == pytest.approx(4.0)
    assert run.states == ["live", "live"]


def test_a_second_loss_in_the_next_generation_is_an_incident_of_its_own() -> None:
    run = Run()
    run.die((1, 0.0, "SIGKILL"))
    run.begin("g2")
    run.die((0, 0.0, "SIGKILL"))
    assert [(one.ranks, one.state) for one in run.incidents] == [
        ((1,), IncidentState.RESOLVED),
        ((0,), IncidentState.OPEN),
    ]


def test_a_rank_that_is_heard_again_was_not_gone() -> None:
    run = Run()
    run.beat([0], 20.0)
    run.step([0, 1], 10)
    assert [one.state for one in run.incidents] == [IncidentState.RESOLVED]
    assert run.states == ["live", "live"]


def test_what_a_dead_rank_has_said_before_it_died_counts_and_does_not_make_it_live_again() -> None:
    run = Run()
    run.step([0])
    run.die((1, 0.0, "SIGKILL"))
    late = frame(3.0, first_step=run.next_step - 1, rank=1, world_size=2, generation="g1")
    run.hand(late)
    run.step([0], 3)
    assert run.states == ["live", "lost"]
    assert [one.state for one in run.incidents] == [IncidentState.OPEN]
    assert run.engine.view().step == run.next_step - 1, "nothing waits for it"


def test_ranks_that_all_fall_silent_are_told_as_such_and_their_fixes_stand() -> None:
    run = Run(mode="suggest")
    run.hand(Fix(who="me", action=Action(action="scale_lr", params={"factor": 0.5})))
    (command,) = run.engine.view().commands
    for rank in range(2):
        tick = {"tick": run.next_step, "step": run.next_step}
        run.hand(Ack(header=header(rank, 2), command=command.id, state=AckState.APPLIED, **tick))
    assert run.engine.view().standing == (command.id,)
    run.beat([1], 1.0)
    for _ in range(3):
        assert run.incidents == ()
        run.now += 5.0
        run.hand(Timer())
    (found,) = run.incidents
    assert (found.kind, found.ranks, found.severity) == ("rank_lost", (0, 1), Severity.INFO)
    assert not run.engine.expects_ranks
    run.beat([0, 1], 1.0)
    assert run.states == ["live", "live"]
    assert run.engine.view().standing == (command.id,)


def test_who_left_without_a_goodbye_is_told_where_the_others_said_that_it_is_gone() -> None:
    run = Run()
    run.fail(0, LOST_PEER)
    run.hand(bye(0, 2))
    run.begin("g2")
    (found,) = run.incidents
    assert (found.kind, found.ranks) == ("rank_lost", (1,))


def test_a_new_generation_without_any_complaint_is_no_loss() -> None:
    run = Run()
    run.hand(JobGone())
    run.begin("g2")
    assert run.incidents == ()


def test_departures_are_recorded() -> None:
    event = Departed(deaths=(Death(generation="g", rank=3, after_seconds=0.5, how="SIGKILL"),))
    assert decode_record(encode_shell_record(event)) == event


# -- processes -------------------------------------------------------------------------------------------------------


def joined(rank: int, pid: int, process: str) -> Hello:
    return replace(hello(rank, 2), pid=pid, process=process)


def test_a_process_is_known_by_more_than_its_number() -> None:
    own = identity(os.getpid())
    assert own
    assert may_be_here(own)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert identity(process.pid) not in ("", own)
        process.communicate(b"\n", timeout=60)
    assert identity(process.pid) == ""
    assert not may_be_here("another boot/pid:[1]/7")


@pytest.mark.parametrize(("code", "how"), [("os.kill(os.getpid(), 9)", "SIGKILL"), ("os._exit(3)", "exit code 3")])
def test_the_daemon_learns_of_the_end_of_a_process_that_is_not_its_child_and_how(code: str, how: str) -> None:
    async def learn() -> list[Death]:
        departures = Departures()
        process = subprocess.Popen(
            [sys.executable, "-c", f"import os; input(); {code}"], stdin=subprocess.PIPE
        )  # not waited for: as torch elastic would, later
        departures.meet(joined(1, process.pid, identity(process.pid)))
        assert departures.settled("run", all_of_it=True) == []
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.close()
        async with asyncio.timeout(60):
            while not (told := departures.settled("run")):
                await asyncio.sleep(0.01)
        departures.close()
        process.wait()
        return [death for _, death in told]

    (death,) = asyncio.run(learn())
    assert (death.rank, death.how) == (1, how)


def test_a_number_that_is_another_processs_by_now_is_not_taken_for_it() -> None:
    async def meet() -> list[tuple[str, Death]]:
        departures = Departures()
        later = identity(os.getpid()).rpartition("/")[0] + "/1"
        departures.meet(joined(0, os.getpid(), later))
        departures.meet(joined(1, os.getpid(), "another boot/pid:[1]/7"))
        return departures.settled("run", all_of_it=True)

    told = asyncio.run(meet())
    assert [death.rank for _, death in told] == [0]
    assert ending(os.getpid()) == ""


def interrupted(rank: int) -> Bye:
    return replace(bye(rank, 2), reason="KeyboardInterrupt", exit_code=1)


def test_a_rank_that_is_interrupted_alone_is_named_and_not_the_one_that_loses_its_connection() -> None:
    run = Run()
    run.hand(interrupted(1))
    run.fail(0, LOST_PEER)
    (found,) = run.incidents
    assert (found.kind, found.ranks, found.severity) == ("exception", (1,), Severity.WARNING)
    assert "KeyboardInterrupt" in found.message


@pytest.mark.parametrize("seconds", [2, 6])
def test_a_rank_that_is_interrupted_while_the_others_stay_is_told_after_seconds(seconds: int) -> None:
    run = Run()
    run.hand(interrupted(0))
    run.beat([1], seconds)
    assert [found.ranks for found in run.incidents] == ([(0,)] if seconds > 3 else [])


def test_ranks_that_are_interrupted_together_have_done_nothing() -> None:
    run = Run()
    for rank in range(2):
        run.hand(interrupted(rank))
    assert run.incidents == ()


def test_a_rank_that_is_asked_to_end_is_lost_where_another_lived_on_to_miss_it() -> None:
    run = Run()
    run.fail(0, LOST_PEER)
    run.hand(replace(bye(0, 2), reason="RuntimeError", exit_code=1))
    run.die((1, 0.0, "SIGTERM"))
    (found,) = run.incidents
    assert (found.kind, found.ranks) == ("rank_lost", (1,))
    assert "cancelled" not in found.message

"""When a run counts as hanging, and which rank holds it up. Pure, but for what this process tells of itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sosa_stream.agent.environment import can_restart
from sosa_stream.agent.stacks import SIGNAL, left_frames, process_state
from sosa_stream.agent.stacks import Stacks as OwnStacks
from sosa_stream.detect.incidents import Incident, IncidentState, Severity
from sosa_stream.detect.stack_clusters import Stand, odd_ranks
from sosa_stream.effects import Ask, Effect
from sosa_stream.engine import Engine
from sosa_stream.processes import identity
from sosa_stream.protocol import codec
from sosa_stream.protocol.messages import Heartbeat, Inquiry, Neighbour, Phase, ProcessState, SilentRank, Stacks
from sosa_stream.testing import NOW, bye, frame, header, hello

REDUCE = ("/job/train.py:90 main", "/usr/lib/torch/distributed/distributed_c10d.py:10 all_reduce")
BACKWARD = ("/job/train.py:80 main", "/usr/lib/torch/autograd/graph.py:10 _engine_run_backward")
SLEEP = ("/job/train.py:70 main", "/job/train.py:12 rest")
EVALUATE = ("/job/train.py:70 main", "/job/train.py:12 evaluate")
SAVE = ("/job/train.py:70 main", "/usr/lib/torch/serialization.py:900 _save")


class StandingRun:
    """A run of ranks that step ten times a second for three seconds and then stand, each in its own stack."""

    def __init__(
        self, frames: Sequence[tuple[str, ...]], *, silent: int = -1, works: int = -1, mode: str = "observe"
    ) -> None:
        self.engine = Engine("run")
        self.frames, self.silent, self.works = frames, silent, works
        self.world_size = len(frames)
        self.now = NOW
        self.effects: list[Effect] = []
        for rank in range(self.world_size):
            self.hand(hello(rank, self.world_size, policy={"mode": mode, "allow": ["restart"]}))
        self.step(30)

    def hand(self, event: object) -> None:
        effects = self.engine.handle(event, self.now)  # type: ignore[arg-type]
        self.effects += effects

    def step(self, num: int, first: int = 0) -> None:
        for step in range(first, first + num):
            self.now += 0.1
            for rank in range(self.world_size):
                self.hand(frame(1.0, rank=rank, world_size=self.world_size, first_step=step))
        self.next_step = first + num

    def stand(self, seconds: float, *, seen: ProcessState | None = None) -> None:
        """All but the silent rank beat each second, and answer what is asked."""
        for i in range(int(seconds * 4)):
            self.now += 0.25
            for rank in range(self.world_size):
                if rank == self.silent:
                    continue
                head = header(rank, self.world_size)
                asked = any(isinstance(effect, Ask) for effect in self.effects)
                if asked:
                    neighbours = (Neighbour(rank=self.silent, state=seen),) if seen is not None else ()
                    self.hand(
                        Stacks(
                            header=head,
                            tick=self.next_step - 1,
                            phase=Phase.FORWARD,
                            training=self.frames[rank],
                            works=rank == self.works,
                            neighbours=neighbours,
                        )
                    )
                if i % 4 == rank % 4:
                    self.hand(
                        Heartbeat(
                            header=head,
                            tick=self.next_step - 1,  # that of the last frame
                            step=self.next_step,
                            phase=Phase.FORWARD,
                            oldest=1,
                            dropped=0,
                        )
                    )

    @property
    def hangs(self) -> list[Incident]:
        return [one for one in self.engine.view().incidents if one.kind == "hang"]


def test_a_rank_that_sleeps_while_others_reduce_is_named_within_five_seconds() -> None:
    run = StandingRun([BACKWARD, BACKWARD, SLEEP, BACKWARD])
    run.stand(5.0)
    (found,) = run.hangs
    assert (found.ranks, found.hosts) == ((2,), ("host-2",))
    assert "rest" in found.message
    assert "main" in found.message
    assert found.evidence["value"] < 5.0


def test_heartbeats_that_say_what_frames_have_said_are_no_moves() -> None:
    run = StandingRun([BACKWARD, BACKWARD, SLEEP, BACKWARD])
    run.stand(4.25)
    assert len(run.hangs) == 1


def test_a_rank_waits_in_a_collective_whose_wait_we_time() -> None:
    timed = (*REDUCE, "/usr/lib/sosa_stream/agent/watch/own_time.py:166 wait")
    assert Stand(frames=timed).in_collective
    assert not Stand(frames=SLEEP).in_collective


def test_a_hang_opens_once_and_is_over_after_three_steps() -> None:
    run = StandingRun([BACKWARD, SLEEP])
    run.stand(20.0)
    assert [one.state for one in run.hangs] == [IncidentState.OPEN]
    run.step(3, first=run.next_step)
    assert [one.state for one in run.hangs] == [IncidentState.RESOLVED]


@pytest.mark.parametrize("pause", [EVALUATE, SAVE])
def test_a_rank_that_evaluates_or_saves_is_not_called_hanging(pause: tuple[str, ...]) -> None:
    run = StandingRun([REDUCE, pause])
    run.stand(60.0)
    assert run.hangs == []


def test_a_rank_that_computes_is_not_called_hanging() -> None:
    run = StandingRun([REDUCE, SLEEP], works=1)
    run.stand(60.0)
    assert run.hangs == []


def test_a_pause_of_all_ranks_is_no_hang_for_a_minute() -> None:
    run = StandingRun([SLEEP, SLEEP])
    run.stand(55.0)
    assert run.hangs == []
    run.stand(8.0)
    assert [one.ranks for one in run.hangs] == [(0, 1)]


def test_steps_that_are_slow_from_the_start_are_no_hang() -> None:
    run = StandingRun([BACKWARD, SLEEP])
    for _ in range(4):
        run.stand(3.0)
        run.step(1, first=run.next_step)
    run.stand(10.0)
    assert run.hangs == []
    run.stand(6.0)
    assert len(run.hangs) == 1


def test_a_rank_that_waits_for_something_unknown_is_a_warning_until_it_has_not_come_back_for_a_minute() -> None:
    run = StandingRun([REDUCE, SLEEP], mode="auto")
    run.stand(50.0)
    (found,) = run.hangs
    assert (found.severity, found.ranks, run.engine.view().commands) == (Severity.WARNING, (1,), ())
    run.stand(12.0)
    (found,) = run.hangs
    assert (found.severity, found.ranks) == (Severity.CRITICAL, (1,))
    assert [command.state for command in run.engine.view().commands] == ["published"]


@pytest.mark.parametrize(
    ("frames", "silent", "severity"),
    [
        ([BACKWARD, REDUCE, BACKWARD], -1, Severity.CRITICAL),
        ([BACKWARD, BACKWARD, SLEEP], 2, Severity.CRITICAL),
        ([REDUCE, REDUCE, REDUCE], -1, Severity.WARNING),
    ],
    ids=["apart", "stopped", "alike"],
)
def test_a_hang_is_critical_at_once_where_no_rank_could_go_on_by_itself(
    frames: list[tuple[str, ...]], silent: int, severity: Severity
) -> None:
    run = StandingRun(frames, silent=silent)
    run.stand(5.0, seen=ProcessState.STOPPED if silent >= 0 else None)
    assert [one.severity for one in run.hangs] == [severity]


def test_a_silent_rank_whose_process_is_there_may_come_back() -> None:
    run = StandingRun([BACKWARD, BACKWARD, SLEEP], silent=2)
    run.stand(5.0, seen=ProcessState.RUNNING)
    assert [one.severity for one in run.hangs] == [Severity.WARNING]


@pytest.mark.parametrize(
    "call", ["/subprocess.py:1200 wait", "/urllib/request.py:200 urlretrieve", "/shutil.py:9 move"]
)
def test_a_rank_that_waits_for_another_program_or_host_has_a_minute(call: str) -> None:
    run = StandingRun([REDUCE, (*SLEEP, f"/usr/lib/python3.11{call}")])
    run.stand(55.0)
    assert run.hangs == []
    run.stand(8.0)
    assert [one.ranks for one in run.hangs] == [(1,)]


def test_a_rank_in_a_debugger_waits_for_a_person_and_one_in_a_notebook_that_hangs_is_told() -> None:
    asks = (*SLEEP, "/usr/lib/python3.11/pdb.py:400 interaction", "/usr/lib/python3.11/cmd.py:126 cmdloop")
    run = StandingRun([REDUCE, asks])
    run.stand(1000.0)
    assert run.hangs == []
    run = StandingRun([REDUCE, ("/usr/lib/python3.11/site-packages/ipykernel/kernelapp.py:7 start", *SLEEP)])
    run.stand(6.0)
    assert len(run.hangs) == 1


@pytest.mark.parametrize("seen", [None, ProcessState.STOPPED])
def test_what_is_usual_is_learned_but_not_from_a_process_that_was_stopped(seen: ProcessState | None) -> None:
    run = StandingRun([BACKWARD, SLEEP], silent=1 if seen else -1)
    run.stand(3.5, seen=seen)
    run.step(10, first=run.next_step)
    run.stand(6.0, seen=seen)
    assert len(run.hangs) == (1 if seen else 0)


def test_a_run_that_goes_on_is_not_restarted() -> None:
    run = StandingRun([BACKWARD, REDUCE], mode="auto")
    run.stand(55.0)
    run.step(30, first=run.next_step)
    assert [one.state for one in run.hangs] == [IncidentState.RESOLVED]
    run.stand(5.0)
    assert run.engine.view().commands == ()


def test_a_long_wait_makes_unequal_collectives_no_later_told() -> None:
    run = StandingRun([REDUCE, SLEEP])
    run.stand(40.0)
    run.step(5, first=run.next_step)
    run.frames = (REDUCE, BACKWARD)
    run.stand(5.0)
    assert [found.severity for found in run.hangs] == [Severity.WARNING, Severity.CRITICAL]


def test_a_process_alone_may_wait_for_a_person_and_is_told_late() -> None:
    run = StandingRun([SLEEP])
    run.stand(290.0)
    assert run.hangs == []
    run.stand(20.0)
    assert [found.severity for found in run.hangs] == [Severity.WARNING]
    run.stand(600.0)
    assert [found.severity for found in run.hangs] == [Severity.CRITICAL]


def test_what_comes_after_a_goodbye_is_no_training() -> None:
    run = StandingRun([BACKWARD, SLEEP])
    run.hand(bye(0, 2))
    run.stand(60.0)
    assert run.hangs == []


def test_a_time_in_which_nobody_listened_is_no_hang() -> None:
    run = StandingRun([BACKWARD, SLEEP])
    run.now += 100.0
    run.stand(3.0)
    assert run.hangs == []


def test_a_silent_rank_whose_process_is_stopped_is_named_and_shown_as_such() -> None:
    run = StandingRun([BACKWARD, SLEEP], silent=1)
    run.stand(5.0, seen=ProcessState.STOPPED)
    (found,) = run.hangs
    assert found.ranks == (1,)
    assert found.evidence["states"] == {"0": "waiting", "1": "gil_held_or_stopped"}
    assert [view.state for view in run.engine.view().ranks] == ["live", "gil_held_or_stopped"]


@pytest.mark.parametrize(("mode", "states"), [("observe", []), ("suggest", ["proposed"]), ("auto", ["published"])])
def test_a_restart_goes_ahead_only_where_it_is_allowed(mode: str, states: list[str]) -> None:
    run = StandingRun([BACKWARD, REDUCE], mode=mode)
    run.stand(55.0)
    assert run.engine.view().commands == (), "it has not stood for auto.restart_after_seconds"
    run.stand(6.0)
    commands = run.engine.view().commands
    assert [command.state for command in commands] == states
    assert all([action.action for action in command.actions] == ["restart"] for command in commands)
    run.hand(hello(0, 2, generation="g2"))
    ended = {"proposed": "expired", "published": "verified"}
    assert [command.state for command in run.engine.view().commands] == [ended[state] for state in states]


def test_a_replay_asks_and_finds_the_same() -> None:
    first, second = StandingRun([BACKWARD, SLEEP]), StandingRun([BACKWARD, SLEEP])
    for run in (first, second):
        run.stand(6.0)
    assert first.effects == second.effects


@pytest.mark.parametrize(
    ("stands", "odd"),
    [
        ({0: Stand(frames=BACKWARD), 1: Stand(frames=BACKWARD), 2: Stand(frames=REDUCE)}, (2,)),
        ({0: Stand(frames=BACKWARD), 1: Stand(frames=SLEEP)}, (1,)),
        ({0: Stand(frames=SLEEP), 1: Stand(silent=True)}, (1,)),
        ({0: Stand(frames=BACKWARD, tick=7, phase=Phase.BACKWARD), 1: Stand(frames=REDUCE, tick=7)}, (1,)),
        ({0: Stand(frames=REDUCE), 1: Stand(frames=REDUCE)}, (0, 1)),
        ({0: Stand(frames=REDUCE, collectives={"0": 7}), 1: Stand(frames=REDUCE, collectives={"0": 6})}, (1,)),
    ],
)
def test_the_odd_rank_is_the_one_that_the_others_wait_for(stands: dict[int, Stand], odd: tuple[int, ...]) -> None:
    assert odd_ranks(stands).odd == odd


# -- what a process tells of itself ---------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Iterator[OwnStacks]:
    stacks = OwnStacks(0, lambda rank: tmp_path / f"rank{rank}.txt")
    yield stacks
    stacks.close()


def test_an_answer_counts_the_collectives_of_each_group(own: OwnStacks, tmp_path: Path) -> None:
    inquiry = Inquiry(run="run", generation="g1", number=1)
    assert own.answer(inquiry, 3, Phase.FORWARD)(header()).collectives == {}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        dist.all_reduce(torch.ones(1))
        dist.all_reduce(torch.ones(1))
        answer = own.answer(inquiry, 3, Phase.FORWARD)(header())
        assert list(answer.collectives.values()) == [2]
        assert codec.decode(codec.encode(answer)) == answer
    finally:
        dist.destroy_process_group()


def test_an_answer_holds_the_training_thread_as_seen_from_another(own: OwnStacks) -> None:
    answers = []
    inquiry = Inquiry(run="run", generation="g1", number=1)
    asker = threading.Thread(target=lambda: answers.append(own.answer(inquiry, 3, Phase.FORWARD)(header())))
    asker.start()
    asker.join()
    (answer,) = answers
    assert answer.training[-1].startswith(threading.__file__), "it waits in join"
    assert any("test_an_answer_holds" in line for line in answer.training)


HOLDS_THE_GIL = """
import ctypes, pathlib, sys, threading
from sosa_stream.agent.stacks import Stacks

def hold():
    print("holds", flush=True)
    ctypes.PyDLL(None).getchar()  # until the end of its standard input

stacks, over = Stacks(1, lambda rank: pathlib.Path(sys.argv[1]) / f"rank{rank}.txt"), threading.Event()

def be_the_agent():
    while not over.wait(0.001):
        stacks.alive()

agent = threading.Thread(target=be_the_agent)
agent.start()
told = pathlib.Path(sys.argv[1]) / "rank1.txt"
while not told.exists() or not told.read_text():
    pass
hold()
over.set()
agent.join()
stacks.close()
"""


@contextmanager
def holding(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", HOLDS_THE_GIL, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"holds\n"
        try:
            yield process
        finally:
            process.communicate(timeout=60)  # closes its standard input


def seen(own: OwnStacks, pid: int) -> Neighbour:
    silent = (SilentRank(rank=1, host=os.uname().nodename, pid=pid),)
    inquiry = Inquiry(run="run", generation="g1", number=1, silent=silent)
    (neighbour,) = own.answer(inquiry, 3, Phase.FORWARD)(header()).neighbours
    return neighbour


def test_a_neighbour_that_holds_its_gil_tells_where_and_goes_on(own: OwnStacks, tmp_path: Path) -> None:
    with holding(tmp_path) as process:
        told = seen(own, process.pid)
        assert told.state is ProcessState.RUNNING
        assert [line.rpartition(" ")[2] for line in told.frames] == ["<module>", "hold"]
        assert seen(own, process.pid).frames == told.frames
    assert process.returncode == 0
    assert left_frames(tmp_path / "rank1.txt") == ()


@pytest.mark.parametrize("later", [True, False])
def test_no_signal_is_sent_to_a_later_process_of_that_number_nor_to_one_that_does_not_wait_for_its_gil(
    own: OwnStacks, tmp_path: Path, later: bool
) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        head = f"{identity(process.pid)}{'0' * later} agent {process.pid} training 0x2a\n"
        (tmp_path / "rank1.txt").write_text(head)
        assert seen(own, process.pid) == Neighbour(rank=1, state=ProcessState.RUNNING, frames=())
        process.communicate(b"\n", timeout=60)
    assert process.returncode == 0, "a signal would have ended it"


def test_the_training_threads_stack_is_read_innermost_last(tmp_path: Path) -> None:
    path = tmp_path / "rank1.txt"
    path.write_text(
        "boot/ns/8 agent 9 training 0x2a\n"
        'Current thread 0x0000000b (most recent call first):\n  File "/x.py", line 1 in other\n\n'
        'Thread 0x0000002a (most recent call first):\n  File "/job/a.py", line 5 in inner\n'
        '  File "/job/a.py", line 9 in main\n'
    )
    assert left_frames(path) == ("/job/a.py:9 main", "/job/a.py:5 inner")
    assert left_frames(tmp_path / "none.txt") == ()


def test_a_signal_that_is_the_scripts_own_stays_so(own: OwnStacks, tmp_path: Path) -> None:
    before = signal.signal(SIGNAL, lambda number, frame: None)
    try:
        own.alive()
        assert not (tmp_path / "rank0.txt").exists()
    finally:
        signal.signal(SIGNAL, before)


def test_what_was_told_of_an_earlier_silence_is_forgotten(own: OwnStacks, tmp_path: Path) -> None:
    own.alive()
    head = (tmp_path / "rank0.txt").read_text()
    os.kill(os.getpid(), SIGNAL)
    assert left_frames(tmp_path / "rank0.txt")
    own.alive()
    assert (tmp_path / "rank0.txt").read_text() == head


def test_a_process_is_running_or_gone() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert process_state(os.getpid()) is ProcessState.RUNNING
    assert process_state(ended.pid) is ProcessState.GONE


@pytest.mark.parametrize(
    ("env", "can"),
    [
        ({}, False),
        ({"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0"}, False),
        ({"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "1"}, True),
        ({"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_MAX_RESTARTS": "1"}, False),
    ],
)
def test_ranks_are_not_ended_where_nobody_would_start_them_again(env: dict[str, str], can: bool) -> None:
    assert can_restart(env) is can

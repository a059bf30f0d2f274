"""What waits to leave: nothing lost that need not be, nothing out of order, nothing made up."""

from __future__ import annotations

import itertools
import math
import os
import select
from collections import deque

import numpy as np
import torch
from agent_parts import HEADER
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sosa_stream.agent.footprint import Footprint
from sosa_stream.agent.transport.outbox import MAX_ROWS_PER_FRAME, Outbox, Ring, Row, Wakeup
from sosa_stream.agent.watch.scalars import Scalars, fetch
from sosa_stream.protocol.codec import decode
from sosa_stream.protocol.messages import Bye, Header, Heartbeat, MetricFrame, Phase


class RingMachine(RuleBasedStateMachine):
    """A ring, a line that takes as many frames as it will, and a daemon that takes them in order."""

    @initialize(capacity=st.integers(1, 8))
    def start(self, capacity: int) -> None:
        self.capacity = capacity
        self.ring = Ring(capacity, resend_seconds=1.0)
        self.now = 100.0
        self.appended = 0
        self.dropped = 0
        self.line: deque[int] = deque()
        self.written = 0
        self.num_sent = 0

    def _take(self, frame: bytes) -> bool:
        if self.num_sent == 0:
            return False
        self.num_sent -= 1
        self.line.append(int(frame))
        return True

    @rule()
    def append(self) -> None:
        self.appended += 1
        if len(self.ring) == self.capacity:
            self.dropped += 1
        self.ring.append(str(self.appended).encode())

    @rule(num=st.integers(0, 10), wait=st.sampled_from([0.0, 0.5, 1.5]))
    def send(self, num: int, wait: float) -> None:
        self.now += wait
        self.num_sent = num
        self.ring.send(self._take, self.now)

    @rule(lost=st.integers(0, 10))
    def the_daemon_reads_what_the_line_did_not_lose(self, lost: int) -> None:
        for _ in range(min(lost, len(self.line))):
            self.line.pop()
        while self.line:
            seq = self.line.popleft()
            if seq == self.written + 1:
                self.written = seq

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def an_acknowledgement_comes_late_or_twice(self, data: st.DataObject) -> None:
        self.ring.acknowledge(data.draw(st.integers(1, self.written)), self.now)

    @rule()
    def reconnect(self) -> None:
        """All that is not acknowledged leaves again, in order."""
        self.line.clear()
        self.ring.rewind()
        self.num_sent = self.capacity
        self.ring.send(self._take, self.now)
        assert list(self.line) == list(range(self.ring.oldest, self.ring.next_seq))
        if self.line and self.line[0] > self.written + 1:  # the heartbeat tells the daemon of a gap
            self.written = self.line[0] - 1
        self.the_daemon_reads_what_the_line_did_not_lose(0)

    @invariant()
    def what_is_held_is_contiguous_and_dropped_is_counted(self) -> None:
        assert [int(frame) for frame in self.ring._frames] == list(range(self.ring.oldest, self.appended + 1))
        assert self.ring.next_seq == self.appended + 1
        assert len(self.ring) <= self.capacity
        assert self.ring.dropped == self.dropped
        assert self.ring.oldest <= self.ring._next <= self.ring.next_seq


TestRing = RingMachine.TestCase


def _sent(ring: Ring, now: float, accept: int = 100) -> list[int]:
    sent: list[int] = []

    def send(frame: bytes) -> bool:
        if len(sent) == accept:
            return False
        sent.append(int(frame))
        return True

    ring.send(send, now)
    return sent


def _ring(num: int, capacity: int = 16) -> Ring:
    ring = Ring(capacity, resend_seconds=1.0)
    for i in range(1, num + 1):
        ring.append(str(i).encode())
    return ring


def test_a_send_that_fails_is_taken_up_where_it_failed() -> None:
    ring = _ring(5)
    assert _sent(ring, 0.0, accept=2) == [1, 2]
    assert _sent(ring, 0.1) == [3, 4, 5]
    assert _sent(ring, 0.2) == []


def test_frames_without_an_acknowledgement_are_sent_again_after_a_while() -> None:
    ring = _ring(3)
    _sent(ring, 0.0)
    ring.acknowledge(1, 0.9)
    assert _sent(ring, 1.5) == []  # an acknowledgement was progress
    assert _sent(ring, 2.0) == [2, 3]
    assert _sent(ring, 2.1) == []


def test_a_quiet_time_is_not_a_late_acknowledgement() -> None:
    ring = _ring(1)
    _sent(ring, 0.0)
    ring.acknowledge(1, 0.1)
    _sent(ring, 50.0)
    ring.append(b"2")
    assert _sent(ring, 100.0) == [2]
    assert _sent(ring, 100.5) == []


def test_an_acknowledgement_from_a_time_before_or_beyond_all_frames_does_no_harm() -> None:
    ring = _ring(3)
    ring.acknowledge(2, 0.0)
    ring.acknowledge(1, 0.0)
    assert (ring.oldest, len(ring)) == (3, 1)
    ring.acknowledge(99, 0.0)
    assert (ring.oldest, len(ring), ring.next_seq) == (4, 0, 4)


# -- rows --------------------------------------------------------------------------------------------------------------


def header(seq: int) -> Header:
    return Header(run="run", generation="g", source="n", rank=0, world_size=1, host="h", seq=seq)


def row(step: int, **columns: float) -> Row:
    return Row(
        step=step, known=(step, 1.0, 0.1, 0, 1), names=tuple(columns), scalars=Scalars(values=tuple(columns.values()))
    )


def frames(outbox: Outbox) -> list[object]:
    outbox.flush(header)
    return [decode(frame) for frame in outbox.ring._frames]


def test_a_column_that_a_step_did_not_show_is_left_out_and_not_made_up() -> None:
    outbox = Outbox(64, Wakeup())
    for entry in [row(0, loss=1.0, grad_norm=2.0), row(1, loss=1.5, grad_norm=2.5), row(2, loss=3.0), row(3, loss=4.0)]:
        outbox.add_row(entry)
    whole, part = frames(outbox)
    assert isinstance(whole, MetricFrame)
    assert isinstance(part, MetricFrame)
    assert whole.columns == ("tick", "lr_multiplier", "step_seconds", "model", "num_objectives", "loss", "grad_norm")
    assert part.columns == ("tick", "lr_multiplier", "step_seconds", "model", "num_objectives", "loss")
    assert [*whole.steps, *part.steps] == [0, 1, 2, 3]
    assert not np.isnan(part.values).any()


def test_a_nan_in_a_frame_is_a_nan_of_the_training() -> None:
    outbox = Outbox(64, Wakeup())
    outbox.add_row(row(0, loss=math.nan))
    (frame,) = frames(outbox)
    assert isinstance(frame, MetricFrame)
    assert math.isnan(frame.values[0, frame.columns.index("loss")])


def test_rows_leave_in_order_before_the_message_that_came_after_them() -> None:
    outbox = Outbox(64, Wakeup())
    outbox.add_row(row(0, loss=1.0))
    outbox.add_message(lambda head: Bye(header=head, reason="end", exit_code=0, dropped=0))
    first, second = frames(outbox)
    assert isinstance(first, MetricFrame)
    assert isinstance(second, Bye)
    assert (first.header.seq, second.header.seq) == (1, 2)


def test_many_rows_make_frames_of_bounded_size() -> None:
    outbox = Outbox(64, Wakeup())
    for step in range(2 * MAX_ROWS_PER_FRAME + 1):
        outbox.add_row(row(step, loss=1.0))
    found = frames(outbox)
    assert [len(frame.steps) for frame in found if isinstance(frame, MetricFrame)] == [512, 512, 1]
    assert outbox.ring.next_seq == 4


def test_a_row_still_on_its_way_from_the_device_holds_back_those_after_it_and_nobody_waits() -> None:
    class Later(Scalars):
        there = False

        def ready(self) -> bool:
            return self.there

    late = Later(values=(1.0,))
    outbox = Outbox(64, Wakeup())
    outbox.add_row(Row(step=0, known=(0, 1.0, 0.1, 0, 1), names=("loss",), scalars=late))
    outbox.add_row(row(1, loss=2.0))
    assert frames(outbox) == []
    late.there = True
    (frame,) = frames(outbox)
    assert isinstance(frame, MetricFrame)
    assert list(frame.steps) == [0, 1]


def _awake(wakeup: Wakeup) -> bool:
    poll = select.poll()  # `select.select` knows only the first 1024 files
    poll.register(wakeup.fd, select.POLLIN)
    return bool(poll.poll(0))


def test_non_finite_values_and_messages_wake_the_agents_thread_and_healthy_rows_do_not() -> None:
    wakeup = Wakeup()
    outbox = Outbox(64, wakeup)
    outbox.add_row(row(0, loss=1.0))
    assert not _awake(wakeup)
    outbox.add_row(row(1, loss=math.inf))
    assert _awake(wakeup)
    wakeup.clear()
    outbox.add_message(lambda head: Bye(header=head, reason="end", exit_code=0, dropped=0), urgent=False)
    assert not _awake(wakeup)
    outbox.add_message(lambda head: Bye(header=head, reason="end", exit_code=0, dropped=0))
    assert _awake(wakeup)


def test_waking_somebody_who_is_awake_never_blocks() -> None:
    wakeup = Wakeup()
    for _ in range(100_000):  # more than a pipe holds
        wakeup.set()
    wakeup.clear()
    assert not _awake(wakeup)


def test_a_wakeup_that_nobody_holds_gives_its_descriptors_back() -> None:
    wakeup = Wakeup()
    fd = wakeup.fd
    del wakeup
    try:
        os.fstat(fd)
    except OSError:
        return
    raise AssertionError("the pipe is still open")


def test_a_daemon_that_does_not_answer_is_sent_the_same_ever_more_seldom_until_it_does() -> None:
    ring, sent = Ring(8, resend_seconds=1.0), list[float]()
    ring.append(b"1")
    for tenth in range(700):
        ring.send(lambda frame, at=tenth / 10: sent.append(at) or True, tenth / 10)  # type: ignore[misc, func-returns-value]
    gaps = [round(later - before) for before, later in itertools.pairwise(sent)]
    assert gaps[:8] == [1, 2, 4, 5, 5, 5, 5, 5]
    ring.acknowledge(1, 70.0)
    ring.append(b"2")
    for tenth in range(700, 720):
        ring.send(lambda frame, at=tenth / 10: sent.append(at) or True, tenth / 10)  # type: ignore[misc, func-returns-value]
    assert round(sent[-1] - sent[-2]) == 1


def test_a_heartbeat_tells_what_can_be_resent_and_what_was_lost() -> None:
    outbox = Outbox(2, Wakeup())
    for step in range(5):
        outbox.add_row(row(step, loss=1.0))
        outbox.flush(header)
    beat = decode(outbox.heartbeat(HEADER, 5, 5, Phase.FORWARD, Footprint(memory_bytes=7)))
    assert isinstance(beat, Heartbeat)
    assert (beat.oldest, beat.dropped, beat.tick, beat.memory_bytes) == (4, 3, 5, 7)


def test_scalars_of_the_host_are_there_at_once_whatever_their_kind() -> None:
    found = fetch([torch.tensor(1.5), 2, torch.tensor([3.0]), 0.25])
    assert found.ready()
    assert found.read() == (1.5, 2.0, 3.0, 0.25)

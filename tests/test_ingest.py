from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from sosa_stream.daemon.ingest import Intake, Ledger
from sosa_stream.daemon.run import Run
from sosa_stream.engine import Engine
from sosa_stream.protocol.codec import encode
from sosa_stream.protocol.messages import AgentMessage, Bye, Heartbeat, Phase
from sosa_stream.testing import bye, header, hello

NOW = 100.0


def message(seq: int, source: str = "s") -> AgentMessage:
    return replace(hello(), header=replace(header(seq=seq), source=source))


def heartbeat(oldest: int, source: str = "s") -> Heartbeat:
    head = replace(header(seq=0), source=source)
    return Heartbeat(header=head, tick=0, step=0, phase=Phase.START, oldest=oldest, dropped=0)


def take(ledger: Ledger, *messages: AgentMessage) -> list[Intake]:
    return [ledger.take(item, NOW) for item in messages]


def test_the_next_number_is_taken_lower_ones_are_duplicates_higher_ones_gaps() -> None:
    ledger = Ledger()
    assert take(ledger, message(1), message(1), message(3), message(2), message(3)) == [
        Intake.ACCEPT,
        Intake.DUPLICATE,
        Intake.GAP,
        Intake.ACCEPT,
        Intake.ACCEPT,
    ]
    assert (ledger.num_accepted, ledger.num_duplicates, ledger.num_gaps, ledger.num_lost) == (3, 1, 1, 0)
    assert ledger.received(0.0) == {"s": 3}


def test_a_gap_is_lost_once_the_sender_no_longer_has_it() -> None:
    ledger = Ledger()
    take(ledger, message(1), message(5), heartbeat(oldest=2))
    assert ledger.num_lost == 0
    assert take(ledger, heartbeat(oldest=5), message(5)) == [Intake.ACCEPT, Intake.ACCEPT]
    assert ledger.num_lost == 3
    assert ledger.received(0.0) == {"s": 5}


def test_a_heartbeat_of_an_empty_ring_loses_nothing() -> None:
    ledger = Ledger()
    take(ledger, message(1), message(2), heartbeat(oldest=3), heartbeat(oldest=0))
    assert ledger.num_lost == 0


def test_sources_are_counted_apart() -> None:
    ledger = Ledger()
    assert take(ledger, message(1, "a"), message(1, "b"), message(2, "a")) == [Intake.ACCEPT] * 3
    assert ledger.received(0.0) == {"a": 2, "b": 1}


def test_sources_that_are_long_silent_are_left_out() -> None:
    ledger = Ledger()
    ledger.take(message(1, "old"), 10.0)
    ledger.take(message(1, "new"), 20.0)
    assert ledger.received(heard_since=15.0) == {"new": 1}


def test_all_have_ended_when_each_has_said_bye() -> None:
    ledger = Ledger()
    assert ledger.all_ended
    take(ledger, message(1, "a"), message(1, "b"))
    assert not ledger.all_ended
    ends: list[Bye] = [replace(bye(), header=replace(header(seq=2), source=source)) for source in "ab"]
    take(ledger, ends[0])
    assert not ledger.all_ended
    take(ledger, ends[1])
    assert ledger.all_ended


@given(st.lists(st.one_of(st.integers(1, 12).map(message), st.integers(0, 12).map(heartbeat)), max_size=60))
def test_every_number_is_taken_at_most_once_in_order_and_the_rest_accounted_for(events: list[AgentMessage]) -> None:
    ledger = Ledger()
    taken = []
    recorded = []
    for event in events:
        if ledger.take(event, NOW) is Intake.ACCEPT:
            recorded.append(event)
            if event.header.seq:
                taken.append(event.header.seq)
    assert taken == sorted(set(taken))
    last = ledger.received(0.0).get("s", 0)
    assert len(taken) + ledger.num_lost == last
    # What is recorded is enough to have the numbers again.
    again = Ledger()
    assert all(intake is Intake.ACCEPT for intake in take(again, *recorded))
    assert again.received(0.0).get("s", 0) == last
    assert again.num_lost == ledger.num_lost


def test_a_daemon_that_comes_back_still_knows_who_hears_at_a_topic_of_its_own(tmp_path: Path) -> None:
    greetings = [replace(hello(0, 2), own_topic=True), hello(1, 2)]
    run = Run("run", tmp_path / "run.sosa", Engine("run"))
    for greeting in greetings:
        run.offer(greeting, encode(greeting), NOW)
    run.commit()
    new, old = (greeting.header.source for greeting in greetings)
    assert run.touched() == {new: 1, old: 1}
    assert run.touched() == {}
    run.close()
    again = Run("run", tmp_path / "run.sosa", Engine("run"))
    assert again.addressed == {new}
    assert again.recently_heard(NOW) == {old: 1}, "the other is told when it sends again"
    again.close()

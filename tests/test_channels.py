from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import zmq
from daemon_process import LOOPBACK, wait_until

from sosa_stream.errors import ConfigError
from sosa_stream.protocol import channels
from sosa_stream.protocol.channels import (
    HIGH_WATER_MARK,
    MAX_WIRE_BYTES,
    WRONG_KEY,
    AgentChannel,
    DaemonChannel,
    check_bind,
    endpoints,
    topic,
)
from sosa_stream.protocol.codec import encode
from sosa_stream.protocol.keys import AgentKeys, load_agent_keys, load_daemon_keys, new_keys
from sosa_stream.protocol.messages import Received
from sosa_stream.testing import hello


def run(act: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await act()

    asyncio.run(bounded())


async def eventually(condition: Callable[[], object], what: str) -> None:
    # In a thread, so that the daemon's end goes on meanwhile.
    await asyncio.to_thread(wait_until, condition, what)


async def collect(daemon: DaemonChannel, count: int) -> list[bytes]:
    got: list[bytes] = []
    while len(got) < count:
        got += await daemon.drain()
    return got


def test_control_is_one_port_above_metrics() -> None:
    ends = endpoints("tcp://host-1.example:7667")
    assert (ends.metrics, ends.control) == ("tcp://host-1.example:7667", "tcp://host-1.example:7668")
    assert endpoints("tcp://[::1]:7667").control == "tcp://[::1]:7668"


@pytest.mark.parametrize(
    "address", ["", "host:1", "tcp://host", "udp://host:1", "tcp://host:65535", "tcp://a b:1", "tcp://h:-1"]
)
def test_a_bad_address_is_a_config_error_that_shows_a_good_one(address: str) -> None:
    with pytest.raises(ConfigError, match="tcp://host:7667"):
        endpoints(address)


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:7667", "tcp://127.1.2.3:1", "tcp://[::1]:7667", "tcp://localhost:0"]
)
def test_loopback_needs_no_keys(address: str) -> None:
    check_bind(address, None, insecure=False)


@pytest.mark.parametrize(
    "address", ["tcp://0.0.0.0:7667", "tcp://*:7667", "tcp://[::]:7667", "tcp://gpu1:7667", "tcp://10.0.0.1:0"]
)
def test_any_other_address_needs_keys_or_a_word(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sosa keys new.*--insecure"):
        check_bind(address, None, insecure=False)
    check_bind(address, None, insecure=True)
    new_keys(tmp_path)
    check_bind(address, load_daemon_keys(tmp_path), insecure=False)


def test_messages_go_both_ways_and_only_to_their_run() -> None:
    async def act() -> None:
        async with DaemonChannel(LOOPBACK) as daemon:
            one, other = AgentChannel(daemon.address, "run"), AgentChannel(daemon.address, "run2")
            assert one.send(b"a")
            assert other.send(b"b")
            assert sorted(await collect(daemon, 2)) == [b"a", b"b"]
            heard: list[object] = []

            def published() -> bool:
                daemon.publish("run", encode(Received(run="run", sources={"s": 1})))
                heard.extend(one.receive())
                return bool(heard)

            await eventually(published, "a control message")
            assert heard[0] == Received(run="run", sources={"s": 1})
            assert other.receive() == []
            one.close()
            one.close()
            other.close()

    run(act)


def test_all_that_is_there_is_drained_at_once_up_to_the_bound() -> None:
    async def act() -> None:
        async with DaemonChannel(LOOPBACK) as daemon:
            agent = AgentChannel(daemon.address, "run")
            for index in range(40):
                assert agent.send(str(index).encode())
            got = await collect(daemon, 1)
            while len(got) < 40:
                batch = await daemon.drain(max_messages=7)
                assert len(batch) <= 7
                got += batch
            assert got == [str(index).encode() for index in range(40)]
            assert await daemon.drain(timeout_seconds=0) == []
            agent.close()

    run(act)


def test_a_full_queue_says_so_and_does_not_block() -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        agent = AgentChannel(f"tcp://127.0.0.1:{nobody.getsockname()[1]}", "run")
        sent = [agent.send(b"x") for _ in range(2 * HIGH_WATER_MARK)]
        assert sent == [True] * HIGH_WATER_MARK + [False] * HIGH_WATER_MARK
        agent.close()


def test_what_is_no_control_message_is_counted_and_left_out() -> None:
    async def act() -> None:
        async with DaemonChannel(LOOPBACK) as daemon:
            agent = AgentChannel(daemon.address, "run")
            good = Received(run="run", sources={})
            heard: list[object] = []

            def published() -> bool:
                for data in (b"\xc1", encode(hello()), encode(Received(run="other", sources={})), encode(good)):
                    daemon.publish("run", data)
                daemon._pub.send(topic("run"))
                heard.extend(agent.receive())
                return bool(heard) and len(agent.rejected) == 3

            await eventually(published, "the good message")
            assert all(message == good for message in heard)
            assert set(agent.rejected) == {"malformed", "unknown_kind", "bad_field"}
            agent.close()

    run(act)


def test_a_daemon_that_comes_back_is_counted_as_a_reconnect() -> None:
    async def act() -> None:
        async with DaemonChannel(LOOPBACK) as daemon:
            address = daemon.address
            agent = AgentChannel(address, "run")
            agent.send(b"1")
            await collect(daemon, 1)
            agent.receive()
            assert agent.reconnects == 0
        async with DaemonChannel(address) as daemon:
            assert daemon.address == address

            def reconnected() -> bool:
                agent.receive()
                return agent.reconnects == 1

            await eventually(reconnected, "a reconnect")
            agent.send(b"2")
            assert await collect(daemon, 1) == [b"2"]
        agent.close()

    run(act)


def test_waiting_ends_when_the_descriptor_is_written_to() -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        agent = AgentChannel(f"tcp://127.0.0.1:{nobody.getsockname()[1]}", "run")
        read_end, write_end = os.pipe()
        os.write(write_end, b"x")
        agent.wait(3600, read_end)
        os.close(read_end)
        os.close(write_end)
        agent.close()


def test_a_taken_port_is_a_config_error() -> None:
    async def act() -> None:
        async with DaemonChannel(LOOPBACK) as daemon:
            with pytest.raises(ConfigError, match="cannot listen"):
                await DaemonChannel(daemon.address).__aenter__()

    run(act)


def test_with_keys_messages_go_both_ways(tmp_path: Path) -> None:
    new_keys(tmp_path)

    async def act() -> None:
        async with DaemonChannel(LOOPBACK, keys=load_daemon_keys(tmp_path)) as daemon:
            agent = AgentChannel(daemon.address, "run", keys=load_agent_keys(tmp_path))
            agent.send(b"1")
            assert await collect(daemon, 1) == [b"1"]

            def published() -> object:
                daemon.publish("run", encode(Received(run="run", sources={})))
                return agent.receive()

            await eventually(published, "a control message")
            assert not daemon.take_failed_handshakes()
            agent.close()

    run(act)


@pytest.mark.parametrize("stranger", ["no key", "unknown key", "another daemon's key"])
def test_a_wrong_key_is_counted_and_nothing_comes_through(tmp_path: Path, stranger: str) -> None:
    new_keys(tmp_path / "ours")
    new_keys(tmp_path / "theirs")
    ours, theirs = load_agent_keys(tmp_path / "ours"), load_agent_keys(tmp_path / "theirs")
    keys = {
        "no key": None,
        "unknown key": AgentKeys(public=theirs.public, secret=theirs.secret, daemon_public=ours.daemon_public),
        "another daemon's key": theirs,
    }[stranger]

    async def act() -> None:
        async with DaemonChannel(LOOPBACK, keys=load_daemon_keys(tmp_path / "ours")) as daemon:
            agent = AgentChannel(daemon.address, "run", keys=keys)
            agent.send(b"x")
            await eventually(lambda: daemon.take_failed_handshakes()[WRONG_KEY], "a failed handshake")
            assert await daemon.drain(timeout_seconds=0) == []
            agent.close()

    run(act)


def test_a_frame_far_beyond_the_limit_is_not_even_read() -> None:
    async def act() -> None:
        async with DaemonChannel(LOOPBACK) as daemon:
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            push = context.socket(zmq.PUSH)
            push.connect(daemon.address)
            push.send(bytes(MAX_WIRE_BYTES + 1))
            agent = AgentChannel(daemon.address, "run")
            agent.send(b"small")
            assert await collect(daemon, 1) == [b"small"]
            agent.close()
            context.destroy(linger=0)

    run(act)


def test_zeromqs_own_heartbeats_are_off_for_they_may_end_a_process_that_was_stopped() -> None:
    with zmq.Context() as context:
        for kind in (zmq.PUSH, zmq.PULL, zmq.PUB, zmq.SUB):
            with context.socket(kind) as one:
                channels._set_options(one)
                assert (one.heartbeat_ivl, one.tcp_keepalive) == (0, 1)


def test_what_is_for_one_source_reaches_it_alone_and_all_hear_what_is_for_the_run() -> None:
    async def act() -> None:
        async with DaemonChannel(LOOPBACK) as daemon:
            with contextlib.ExitStack() as stack:
                agents = {
                    name: stack.enter_context(
                        contextlib.closing(AgentChannel(daemon.address, "run", sources=(name,) if name else ()))
                    )
                    for name in ("a", "ab", "")
                }
                heard: dict[str, list[dict[str, int]]] = {name: [] for name in agents}

                def all_heard(last: int) -> bool:
                    for source in ("a", "ab"):
                        daemon.publish("run", encode(Received(run="run", sources={source: 1})), source)
                    daemon.publish("run", encode(Received(run="run", sources={"all": last})))
                    for name, agent in agents.items():
                        heard[name] += [dict(m.sources) for m in agent.receive() if isinstance(m, Received)]
                    return all({"all": last} in got for got in heard.values())

                await eventually(lambda: all_heard(1), "the run's topic")
                await eventually(
                    lambda: all_heard(1) and {"a": 1} in heard["a"] and {"ab": 1} in heard["ab"], "what is for one"
                )
                assert {"ab": 1} not in heard["a"]
                assert {"a": 1} not in heard["ab"]
                assert all(set(got) == {"all"} for got in heard[""])

    run(act)

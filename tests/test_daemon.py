"""The daemon as a process: what is refused, what survives its death, what it does for people."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
import urllib.error
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from daemon_process import DaemonProcess, RingAgent, frame, wait_until
from webhook_server import WebhookServer

from sosa_stream.daemon.schema import open_store
from sosa_stream.detect.incidents import Severity
from sosa_stream.effects import CommandChanged, Event, IncidentChanged, Learned, Publish, Reconfigured
from sosa_stream.engine import Engine
from sosa_stream.errors import ProtocolError
from sosa_stream.protocol.channels import AgentChannel
from sosa_stream.protocol.codec import encode
from sosa_stream.protocol.keys import load_agent_keys, new_keys
from sosa_stream.protocol.messages import Ack, AckState, Command, Header, MetricFrame
from sosa_stream.protocol.recording import decode_record, read_recording
from sosa_stream.settings import DetectorOverride, DetectSettings
from sosa_stream.testing import AUTO_POLICY, NOW, SimulatedJob


def recorded_steps(home: Path, run: str = "run") -> list[int]:
    """The steps of all frames in a run's recording, in its order."""
    events = [decode_record(payload) for _, payload in read_recording(home / run / "run.sosa")]
    return [int(step) for event in events if isinstance(event, MetricFrame) for step in event.steps]


def _jump(step: int) -> float:
    return 1000.0 if step >= 200 else 1.0


def sick_run(mode: str) -> list[Event]:
    """The messages of a run whose learning rate jumps, up to the one that makes the engine want a fix."""
    job = SimulatedJob(
        seed=1,
        num_steps=400,
        policy={**AUTO_POLICY, "mode": mode},
        lr_factor=_jump,
        stop_at=260,
    )
    events = job.run().events
    engine = Engine("run")
    for index, event in enumerate(events):
        if any(isinstance(effect, CommandChanged | Publish) for effect in engine.handle(event, NOW + 0.01 * index)):
            return events[: index + 1]
    raise AssertionError("the engine wanted no fix")


def feed(agents: list[RingAgent], events: list[Event]) -> None:
    """Put the messages of a simulated run into the rings of its ranks and send them."""
    for event in events:
        assert not isinstance(event, Ack)
        agent = agents[event.header.rank]  # type: ignore[union-attr]
        head = agent.header(len(agent.ring) + 1)
        agent.ring.append(encode(replace(event, header=head)))  # type: ignore[type-var, arg-type]
        # In the order of the simulation: ranks must not run ahead of each other.
        wait_until(agent.pump, "an acknowledgement")


@pytest.fixture
def agent_of() -> Callable[..., RingAgent]:
    agents: list[RingAgent] = []

    def make(*args: object, **kwargs: object) -> RingAgent:
        agents.append(RingAgent(*args, **kwargs))  # type: ignore[arg-type]
        return agents[-1]

    yield make  # type: ignore[misc]
    for agent in agents:
        agent.channel.close()


def test_each_refusal_is_counted_by_reason_and_logged_once(tmp_path: Path) -> None:
    header = Header(run="run", generation="g", source="s", rank=0, world_size=1, host="h", seq=1)
    good = encode(frame(header, 0))
    bad = {
        "malformed": b"\xc1",
        "oversized": bytes(4 * 1024 * 1024 + 1),
        "wrong_version": good.replace(b"\xa1v\x01", b"\xa1v\x09", 1),
        "unknown_kind": good.replace(b"metrics", b"metricz", 1),
        "bad_field": encode(frame(replace(header, run="../escape"), 0)),
    }
    with DaemonProcess(tmp_path / "home") as daemon:
        channel = AgentChannel(daemon.address, "run")
        for data in bad.values():
            assert channel.send(data)
            assert channel.send(data)
        for reason in bad:
            wait_until(lambda reason=reason: daemon.metric("sosa_frames_rejected_total", reason=reason) == 2, reason)
        assert channel.send(good)
        wait_until(lambda: daemon.metric("sosa_frames_received_total", run="run") == 1, "the good frame")
        channel.close()
        assert daemon.terminate() == 0
        assert sum("was refused" in line for line in daemon.log().splitlines()) == len(bad)
    assert recorded_steps(tmp_path / "home") == [0]
    assert sorted(path.name for path in (tmp_path / "home").iterdir() if path.is_dir()) == ["run"]


def test_a_frame_of_40_megabytes_is_counted_as_oversized_and_its_sender_heard_on(tmp_path: Path) -> None:
    header = Header(run="run", generation="g", source="s", rank=0, world_size=1, host="h", seq=1)
    with DaemonProcess(tmp_path / "home") as daemon:
        channel = AgentChannel(daemon.address, "run")
        assert channel.send(bytes(40_000_000))
        assert channel.send(encode(frame(header, 0)))
        wait_until(lambda: daemon.metric("sosa_frames_rejected_total", reason="oversized") == 1, "the refusal")
        wait_until(lambda: daemon.metric("sosa_frames_received_total", run="run") == 1, "the good frame")
        channel.close()
    assert recorded_steps(tmp_path / "home") == [0]


def test_a_wrong_key_is_counted_and_the_right_one_let_in(tmp_path: Path) -> None:
    new_keys(tmp_path / "ours")
    new_keys(tmp_path / "theirs")
    with DaemonProcess(tmp_path / "home", "--keys", str(tmp_path / "ours")) as daemon:
        with RingAgent(daemon.address, keys=load_agent_keys(tmp_path / "theirs")) as stranger:
            stranger.add_frames(range(3))
            stranger.pump()
            wait_until(lambda: daemon.metric("sosa_frames_rejected_total", reason="wrong_key"), "a refusal")
            assert not stranger.pump()
        with RingAgent(daemon.address, keys=load_agent_keys(tmp_path / "ours")) as friend:
            friend.add_frames(range(5))
            wait_until(friend.pump, "acknowledgement")
    assert recorded_steps(tmp_path / "home") == list(range(5))


def test_killed_in_mid_stream_nothing_that_the_ring_holds_is_lost(tmp_path: Path) -> None:
    home, num_frames = tmp_path / "home", 0
    daemon = DaemonProcess(home)
    with RingAgent(daemon.address) as agent:
        agent.add_hello()
        for _ in range(3):
            agent.add_frames(range(num_frames, num_frames + 1000))
            num_frames += 1000
            enough = num_frames - 700
            wait_until(lambda enough=enough: agent.pump() or agent.acknowledged >= enough, "most frames")
            daemon.kill()
            assert len(recorded_steps(home)) + 1 >= agent.acknowledged, "acknowledged, and not in the recording"
            daemon = DaemonProcess(home, bind=daemon.address)
        with daemon:
            agent.add_frames(range(num_frames, num_frames + 10))
            num_frames += 10
            wait_until(agent.pump, "all frames")
            assert recorded_steps(home) == list(range(num_frames))
            # Counters are those of the recording: they go on over a restart.
            wait_until(lambda: daemon.metric("sosa_frames_received_total", run="run") == num_frames + 1, "the counter")
            assert daemon.metric("sosa_frames_lost_total", run="run") == 0
            assert agent.channel.reconnects >= 3


def test_what_a_full_ring_gave_up_is_counted_as_lost_and_the_rest_taken(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path / "home") as daemon, RingAgent(daemon.address) as agent:
        agent.add_frames(range(2))
        wait_until(agent.pump, "two frames")
        agent.add_frames(range(2, 8))
        agent._sent = 5  # 3, 4 and 5 have left the ring
        agent.channel.send(agent.heartbeat(oldest=6))
        wait_until(agent.pump, "the rest")
        wait_until(lambda: daemon.metric("sosa_frames_lost_total", run="run") == 3, "the lost ones")
    assert recorded_steps(tmp_path / "home") == [0, 1, 5, 6, 7]


def test_what_is_sent_twice_is_recorded_once(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path / "home") as daemon, RingAgent(daemon.address) as agent:
        agent.add_frames(range(4))
        wait_until(agent.pump, "acknowledgement")
        agent._sent = 0
        agent.pump()
        wait_until(lambda: daemon.metric("sosa_frames_duplicate_total", run="run") == 4, "the duplicates")
    assert recorded_steps(tmp_path / "home") == list(range(4))


def test_a_daemon_that_has_ended_leaves_in_the_store_which_detectors_were_blind(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with DaemonProcess(home) as daemon, RingAgent(daemon.address, "one", source="a") as agent:
        agent.add_frames(range(100))
        wait_until(agent.pump, "the run")
        assert daemon.terminate() == 0
    with contextlib.closing(open_store(home)) as store:
        (states,) = store.execute("SELECT states FROM detectors WHERE run = 'one'").fetchone()
    assert json.loads(states)["overfitting"] == "blind"
    assert json.loads(states)["nan_loss"] == "watching"


def test_two_runs_at_once_are_kept_apart(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with (
        DaemonProcess(home) as daemon,
        RingAgent(daemon.address, "one", source="a") as one,
        RingAgent(daemon.address, "two", source="b") as two,
    ):
        one.add_frames(range(100))
        two.add_frames(range(1000, 1200))
        wait_until(lambda: one.pump() & two.pump(), "both runs")
        wait_until(lambda: daemon.metric("sosa_frames_received_total", run="two") == 200, "the second run")
        assert daemon.metric("sosa_frames_received_total", run="one") == 100
    assert recorded_steps(home, "one") == list(range(100))
    assert recorded_steps(home, "two") == list(range(1000, 1200))


def test_a_command_is_published_until_acknowledged_also_by_a_daemon_that_was_restarted(
    tmp_path: Path, agent_of: Callable[..., RingAgent]
) -> None:
    home = tmp_path / "home"
    daemon = DaemonProcess(home)
    agents = [agent_of(daemon.address, source=f"s{rank}", rank=rank) for rank in range(2)]

    def heard(count: int) -> list[Command]:
        wait_until(lambda: agents[0].pump() and len(agents[0].commands) >= count, f"{count} publications")
        return agents[0].commands

    feed(agents, sick_run("auto"))
    first = heard(2)[0]
    daemon.kill()
    num_before = len(agents[0].commands)
    with DaemonProcess(home, bind=daemon.address) as daemon:
        # Nothing is known of a run until it is heard of: then its recording is replayed.
        agents[0].channel.send(agents[0].heartbeat(oldest=len(agents[0].ring) + 1))
        again = heard(num_before + 2)
        assert all(command == first for command in again)

        def acknowledge(state: AckState) -> None:
            for agent in agents:
                agent.add(lambda header: Ack(header=header, command=first.id, state=state, tick=210, step=210))
                wait_until(agent.pump, "an acknowledged ack")

        for state in (AckState.HELD, AckState.COMMITTED, AckState.APPLIED):
            acknowledge(state)

        def quiet() -> bool:
            # Rounds of the daemon's once-a-second word, in which several publications would have come.
            num_commands, num_received = len(agents[0].commands), agents[0].num_received
            wait_until(lambda: agents[0].pump() and agents[0].num_received >= num_received + 3, "the daemon's word")
            return len(agents[0].commands) == num_commands

        wait_until(quiet, "the end of publishing")
        wait_until(
            lambda: daemon.metric("sosa_commands_total", run="run", state="applied", verdict="none") == 1,
            "the applied command among the metrics",
        )


def test_a_person_approves_a_proposal_once(tmp_path: Path, agent_of: Callable[..., RingAgent]) -> None:
    home = tmp_path / "home"

    def sosa(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sosa_stream.cli", *arguments, "--home", str(home)]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)

    with DaemonProcess(home) as daemon:
        agents = [agent_of(daemon.address, source=f"s{rank}", rank=rank) for rank in range(2)]
        feed(agents, sick_run("suggest"))
        listed = sosa("commands").stdout.splitlines()
        assert "proposed" in listed[1]
        command = listed[1].split()[0]
        approved = sosa("approve", command)
        assert (approved.returncode, approved.stderr) == (0, "")
        wait_until(lambda: agents[0].pump() and agents[0].commands, "the command")
        assert agents[0].commands[0].id == command
        assert agents[0].commands[0].approved
        again = sosa("approve", command)
        assert again.returncode == 2
        assert "`sosa approve` is for one that is proposed" in again.stderr
    events = [decode_record(payload) for _, payload in read_recording(home / "run" / "run.sosa")]
    assert sum(type(event).__name__ == "Approve" for event in events) == 1
    # What a person did is part of the recording: a replay comes to the same commands.
    replayed = subprocess.run(
        [sys.executable, "-m", "sosa_stream.cli", "replay", str(home / "run" / "run.sosa")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert command in replayed.stdout


def test_what_a_run_has_learned_is_told_to_the_next_one_of_its_project(
    tmp_path: Path, agent_of: Callable[..., RingAgent]
) -> None:
    home = tmp_path / "home"
    with DaemonProcess(home) as daemon:
        first = [agent_of(daemon.address, "first", source=f"a{rank}", rank=rank) for rank in range(2)]
        policy = {**AUTO_POLICY, "mode": "suggest"}
        feed(first, SimulatedJob(seed=1, num_steps=260, policy=policy, lr_factor=_jump, batch=20).run().events)
        for name in ("second", "third"):
            agent = agent_of(daemon.address, name, source=name)
            agent.add_hello()
            wait_until(agent.pump, "an acknowledged hello")
        assert daemon.terminate() == 0
    recorded = {
        name: [decode_record(payload) for _, payload in read_recording(home / name / "run.sosa")]
        for name in ("first", "second", "third")
    }
    assert not any(isinstance(event, Learned) for event in recorded["first"])
    for name in ("second", "third"):
        (learned,) = [event for event in recorded[name] if isinstance(event, Learned)]
        assert [(outcome.kind, outcome.fix) for outcome in learned.outcomes] == [("lr_jump", "none")]
        assert recorded[name].index(learned) < len(recorded[name]) - 1


def test_what_people_ask_is_carried_out_survives_a_killed_daemon_and_is_audited(
    tmp_path: Path, agent_of: Callable[..., RingAgent]
) -> None:
    home = tmp_path / "home"

    def sosa(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sosa_stream.cli", *arguments, "--home", str(home)]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)

    def pump(agents: list[RingAgent]) -> bool:
        return sum(agent.pump() for agent in agents) == len(agents)

    with DaemonProcess(home) as daemon:
        agents = [agent_of(daemon.address, source=f"s{rank}", rank=rank) for rank in range(2)]
        events = sick_run("auto")
        feed(agents, events[:200])
        paused = sosa("pause", "run", "--reason", "a demo")
        assert (paused.returncode, paused.stderr) == (0, "")
        again = sosa("pause", "run")
        assert (again.returncode, "has paused it already" in again.stderr) == (1, True)
        daemon.kill()
    with DaemonProcess(home, bind=daemon.address) as daemon:
        feed(agents, events[200:])
        wait_until(lambda: "proposed" in sosa("commands").stdout, "a proposal, for it is paused still")
        assert not any(agent.commands for agent in agents)
        unknown = sosa("fix", "run", "scale_lr", "factor=5e9")
        assert (unknown.returncode, "outside [1e-06, 1000]" in unknown.stderr) == (2, True)
        fixed = sosa("fix", "run", "scale_lr", "factor=0.5", "--on-probation")
        assert (fixed.returncode, fixed.stderr) == (0, "")
        command = fixed.stdout.split()[0]
        wait_until(lambda: pump(agents) and agents[0].commands, "the command")
        asked = agents[0].commands[0]
        assert (asked.id, asked.approved, dict(asked.actions[0].params)) == (command, True, {"factor": 0.5})
        early = sosa("undo", command)
        assert (early.returncode, "is for one that is applied or verified" in early.stderr) == (2, True)
        assert sosa("resume", "run").returncode == 0
    rows = [json.loads(line) for line in sosa("audit", "--run", "run", "--json").stdout.splitlines()]
    assert [(row["what"], row["done"]) for row in rows] == [
        ("pause", True),
        ("pause", False),
        ("fix", True),
        ("resume", True),
    ]
    assert rows[2]["command"] == command
    assert all(row["who"] and row["at"] > 1e9 for row in rows)
    shown = sosa("audit").stdout.splitlines()
    assert "pause (a demo)" in shown[1]
    assert "fix scale_lr factor=0.5 --on-probation" in shown[3]


def test_sigterm_and_sigint_end_it_cleanly_with_everything_recorded(tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        home = tmp_path / number.name
        with DaemonProcess(home) as daemon, RingAgent(daemon.address) as agent:
            agent.add_frames(range(50))
            wait_until(agent.pump, "acknowledgement")
            daemon.process.send_signal(number)
            assert daemon.process.wait(20) == 0
        assert recorded_steps(home) == list(range(50))
        assert "Traceback" not in daemon.log()


def reconfigured(home: Path, run: str = "run") -> list[DetectSettings]:
    """The settings that a run's recording tells of, in its order."""
    events = [decode_record(payload) for _, payload in read_recording(home / run / "run.sosa")]
    return [event.settings for event in events if isinstance(event, Reconfigured)]


def test_sighup_takes_changed_settings_into_the_recording_of_every_run(tmp_path: Path) -> None:
    home, config = tmp_path / "home", tmp_path / "sosa.toml"
    config.write_text('[detect]\nsensitivity = "low"\n')
    with (
        DaemonProcess(home, "--config", str(config)) as daemon,
        RingAgent(daemon.address, "one") as one,
        RingAgent(daemon.address, "two") as two,
    ):
        for agent in (one, two):
            agent.add_frames(range(3))
            wait_until(agent.pump, "acknowledgement")
        assert [settings.sensitivity for settings in reconfigured(home, "one")] == ["low"]

        config.write_text("[detect.loss_spike]\nenabled = false\n")
        daemon.process.send_signal(signal.SIGHUP)
        for run in ("one", "two"):
            wait_until(lambda run=run: len(reconfigured(home, run)) == 2, "the changed settings")
        assert reconfigured(home, "one")[1] == DetectSettings(overrides={"loss_spike": DetectorOverride(enabled=False)})

        for mistake, told in (
            ("[detect", "is not TOML"),
            ("[detect.loss_spikes]\nenabled = false\n", "did you mean loss_spike"),
        ):
            config.write_text(mistake)
            daemon.process.send_signal(signal.SIGHUP)
            wait_until(lambda told=told: told in daemon.log(), told)
        assert daemon.log().count("the settings stay as they were") == 2
        assert len(reconfigured(home, "one")) == 2
        assert daemon.terminate() == 0
        assert "Traceback" not in daemon.log()


def test_settings_in_force_come_before_the_first_message_and_are_told_again_only_when_they_changed(
    tmp_path: Path,
) -> None:
    home, config = tmp_path / "home", tmp_path / "sosa.toml"
    for sensitivity, expected in (("high", ["high"]), ("high", ["high"]), ("normal", ["high", "normal"])):
        config.write_text(f'[detect]\nsensitivity = "{sensitivity}"\n')
        with DaemonProcess(home, "--config", str(config)) as daemon, RingAgent(daemon.address) as agent:
            agent.add_frames(range(3))
            wait_until(agent.pump, "acknowledgement")
            daemon.terminate()
        assert [settings.sensitivity for settings in reconfigured(home)] == expected
    first = next(decode_record(payload) for _, payload in read_recording(home / "run" / "run.sosa"))
    assert isinstance(first, Reconfigured)


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[WebhookServer]:
    """A webhook that every daemon started here posts to."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with WebhookServer() as server:
        monkeypatch.setenv("SOSA_NOTIFY", server.url)
        yield server


def nan_and_recovery() -> tuple[list[Event], list[Event]]:
    """The messages of a run up to a critical incident, and those from there on to its end and the run's."""
    nan_at = dict.fromkeys(range(100, 108), 1)
    events = SimulatedJob(seed=0, policy={"mode": "observe"}, nan_at=nan_at, num_steps=160, batch=4).run().events
    engine = Engine("run")
    for index, event in enumerate(events):
        for effect in engine.handle(event, NOW + 0.01 * index):
            if isinstance(effect, IncidentChanged) and effect.incident.severity is Severity.CRITICAL:
                return events[: index + 1], events[index + 1 :]
    raise AssertionError("no critical incident")


def test_a_critical_incident_is_posted_once_also_over_a_restart(
    tmp_path: Path, hook: WebhookServer, agent_of: Callable[..., RingAgent]
) -> None:
    home = tmp_path / "home"
    sick, rest = nan_and_recovery()
    daemon = DaemonProcess(home)
    agents = [agent_of(daemon.address, source=f"s{rank}", rank=rank) for rank in range(2)]
    feed(agents, sick)
    wait_until(lambda: hook.accepted, "the notification")
    assert hook.accepted[0]["text"].startswith("run: nan_loss of step 100 is now critical: ")
    wait_until(lambda: daemon.metric("sosa_notifications_total", outcome="sent") == 1, "the counter")
    assert daemon.metric("sosa_detection_latency_seconds_count") >= 1
    daemon.kill()
    with DaemonProcess(home, bind=daemon.address) as daemon:
        feed(agents, rest)
        wait_until(lambda: len(hook.accepted) >= 2, "the end of the incident")
        assert daemon.terminate() == 0
    assert hook.events() == ["escalated:nan_loss", "closed:nan_loss"]
    assert "secret" not in daemon.log()


def test_a_muted_kind_is_stored_and_told_to_nobody_until_the_mute_is_over(
    tmp_path: Path, hook: WebhookServer, agent_of: Callable[..., RingAgent]
) -> None:
    home = tmp_path / "home"
    sick, _ = nan_and_recovery()

    def sosa(*arguments: str) -> str:
        command = [sys.executable, "-m", "sosa_stream.cli", *arguments, "--home", str(home)]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout

    with DaemonProcess(home) as daemon:
        agents = [agent_of(daemon.address, source=f"s{rank}", rank=rank) for rank in range(2)]
        feed(agents, sick[:20])
        wait_until(lambda: "run" in sosa("incidents", "--run", "run"), "the run in the store")
        sosa("mute", "run", "nan_loss", "--for", "1h")
        wait_until(lambda: "nan_loss is muted" in daemon.log(), "the mute")
        feed(agents, sick[20:])
        wait_until(lambda: "muted" in sosa("incidents"), "the incident")
        labels = {"run": "run", "kind": "nan_loss", "severity": "critical"}
        wait_until(lambda: daemon.metric("sosa_incident_open", **labels) == 1, "the metric")
        time.sleep(0.5)
        assert hook.posted == []
        assert [agent.announcements for agent in agents] == [[], []]
        sosa("unmute", "run", "nan_loss")
        wait_until(lambda: hook.accepted, "what the mute had kept back")
        wait_until(lambda: agents[0].pump() and agents[0].announcements, "the announcement")
        assert hook.events() == ["opened:nan_loss"], "nobody knows of it yet"


def test_an_embedded_daemon_posts_what_is_left_before_it_ends(
    tmp_path: Path, hook: WebhookServer, agent_of: Callable[..., RingAgent]
) -> None:
    sick, rest = nan_and_recovery()
    hook.hold.clear()
    with DaemonProcess(tmp_path / "home", "--embedded", stdin=subprocess.PIPE) as daemon:
        agents = [agent_of(daemon.address, source=f"s{rank}", rank=rank) for rank in range(2)]
        feed(agents, [*sick, *rest])
        assert daemon.process.stdin is not None
        daemon.process.stdin.close()
        wait_until(lambda: "everything recorded" in daemon.log(), "the end of the records")
        hook.hold.set()
        assert daemon.process.wait(20) == 0
    assert hook.events() == ["escalated:nan_loss", "closed:nan_loss"]


def test_an_embedded_daemon_ends_when_its_parent_is_gone_and_all_have_said_bye(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with DaemonProcess(home, "--embedded", stdin=subprocess.PIPE) as daemon, RingAgent(daemon.address) as agent:
        agent.add_frames(range(10))
        wait_until(agent.pump, "acknowledgement")
        daemon.process.send_signal(signal.SIGINT)  # meant for the training
        agent.add_frames(range(10, 20))
        agent.add_bye()
        assert daemon.process.stdin is not None
        daemon.process.stdin.close()
        wait_until(agent.pump, "what was under way")
        assert daemon.process.wait(20) == 0
    assert recorded_steps(home) == list(range(20))


def test_an_embedded_daemon_whose_agents_were_killed_ends_too(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path / "home", "--embedded", stdin=subprocess.PIPE) as daemon:
        with RingAgent(daemon.address) as agent:
            agent.add_frames(range(10))
            wait_until(agent.pump, "acknowledgement")
        assert daemon.process.stdin is not None
        daemon.process.stdin.close()
        assert daemon.process.wait(20) == 0


@pytest.mark.parametrize("how", ["its job is gone", "it was told to end"])
def test_a_command_of_a_job_that_died_in_the_middle_of_it_gets_a_final_state(
    tmp_path: Path, agent_of: Callable[..., RingAgent], how: str
) -> None:
    home = tmp_path / "home"
    with DaemonProcess(home, "--embedded", stdin=subprocess.PIPE) as daemon:
        agents = [agent_of(daemon.address, source=f"s{rank}", rank=rank) for rank in range(2)]
        feed(agents, sick_run("auto"))
        wait_until(lambda: agents[0].pump() and agents[0].commands, "the command")
        fix = agents[0].commands[0]
        for state in (AckState.HELD, AckState.COMMITTED):
            for agent in agents:
                agent.add(lambda header, state=state: Ack(header=header, command=fix.id, state=state, tick=9, step=9))
                wait_until(agent.pump, "an acknowledged ack")
        assert daemon.process.stdin is not None
        if how == "its job is gone":
            daemon.process.stdin.close()
        else:
            daemon.process.terminate()
        assert daemon.process.wait(20) == 0
    with contextlib.closing(open_store(home)) as store:
        ((state, record),) = store.execute("SELECT state, record FROM commands")
    if how == "its job is gone":
        assert (state, json.loads(record)["detail"]) == ("aborted", "its processes are gone")
    else:  # another daemon may go on
        assert state == "committed"


def test_two_daemons_of_one_home_do_not_write_one_recording(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with (
        DaemonProcess(home) as one,
        DaemonProcess(home) as other,
        RingAgent(one.address) as agent,
        RingAgent(other.address, source="t") as intruder,
    ):
        agent.add_frames(range(3))
        wait_until(agent.pump, "acknowledgement")
        intruder.add_frames(range(3))
        intruder.pump()
        wait_until(lambda: other.metric("sosa_frames_rejected_total", reason="unrecordable"), "a refusal")
    assert recorded_steps(home) == list(range(3))


def test_health_readiness_and_metrics_are_served(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path / "home") as daemon:
        assert daemon.get("/healthz") == "ok\n"
        assert daemon.get("/readyz") == "ready\n"
        assert daemon.metric("sosa_frames_rejected_total", reason="malformed") == 0
        assert "# TYPE sosa_run_step gauge" in daemon.get("/metrics")
        with pytest.raises(urllib.error.HTTPError):
            daemon.get("/other")


def test_a_run_whose_name_is_no_folder_is_refused(tmp_path: Path) -> None:
    from sosa_stream.daemon.run import recording_path

    for name in ("", ".", "..", "a/b", "/etc", "a\\b", ".hidden", "sosa.db", "sosa.db-wal", "a\0b", "kill"):
        with pytest.raises(ProtocolError) as caught:
            recording_path(tmp_path, name)
        assert caught.value.reason == "bad_field"
    assert recording_path(tmp_path, "train-2025.01_é") == tmp_path / "train-2025.01_é" / "run.sosa"

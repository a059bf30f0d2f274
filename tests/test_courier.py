"""What the agent's courier refuses before anything reaches the fence, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from agent_parts import act, command

from sosa_stream.agent.fence.membership import Membership
from sosa_stream.agent.place import Identity
from sosa_stream.agent.transport import courier as courier_module
from sosa_stream.agent.transport.courier import Courier, Progress, may_apply
from sosa_stream.agent.transport.outbox import Outbox, Wakeup
from sosa_stream.config import load_settings
from sosa_stream.errors import ProtocolError
from sosa_stream.protocol.actions import Action
from sosa_stream.protocol.codec import decode
from sosa_stream.protocol.messages import Ack, AckState, Announcement, Command, ControlMessage, Phase, Received
from sosa_stream.settings import Mode, Settings
from sosa_stream.testing import NOW

SKIP = act("skip_step")
SCALE = act("scale_lr", factor=0.5)
REVERT = act("revert", command="c1")


def settings(mode: Mode, *allow: str) -> Settings:
    return load_settings(overrides={"mode": mode, "auto.allow": list(allow)})


class FakeLink:
    """Brings what a test puts into ``arriving`` and keeps what leaves."""

    connected = True
    reconnects = 0

    def __init__(self) -> None:
        self.arriving: list[ControlMessage] = []
        self.sent: list[Any] = []

    def send(self, data: bytes) -> bool:
        self.sent.append(decode(data))
        return True

    def receive(self) -> list[ControlMessage]:
        arriving, self.arriving = self.arriving, []
        return arriving

    def take_refused(self) -> list[ProtocolError]:
        return []

    def wait(self, timeout_seconds: float, wake_fd: int) -> None: ...

    def close(self) -> None: ...


class FakeFence:
    """Notes what is submitted, and whether this rank refused it."""

    busy = False

    def __init__(self) -> None:
        self.submitted: list[tuple[str, bool]] = []
        self.refused: list[str] = []

    def refuse(self, command: str) -> None:
        self.refused.append(command)

    def submit(self, command: Command, *, refuse: bool = False) -> None:
        self.submitted.append((command.id, refuse))

    def pump(self, now: float) -> list[Any]:
        return []


def courier_of(
    link: FakeLink,
    fence: FakeFence | None = None,
    *,
    generation: str = "g",
    mode: Mode = Mode.AUTO,
    with_settings: Settings | None = None,
    say: Callable[[str], None] = lambda text: None,
    refusal: Callable[[Command], str] = lambda command: "",
    script_raised: Callable[[], bool] = lambda: False,
) -> Courier:
    return Courier(
        settings=with_settings or settings(mode, "skip_step"),
        identity=Identity(rank=0, world_size=1, host="host", nonce="nonce"),
        membership=Membership(generation=generation, run="run", daemon="tcp://host:7667", host="host"),
        link=link,
        outbox=Outbox(64, Wakeup()),
        fence=fence,  # type: ignore[arg-type]
        device="cpu",
        versions={},
        parameters=(),
        progress=lambda: Progress(tick=7, step=7, phase=Phase.FORWARD),
        refusal=refusal,
        say=say,
        script_raised=script_raised,
    )


def answers(made: Command, *, generation: str = "g", mode: Mode = Mode.AUTO) -> tuple[list[Ack], FakeFence]:
    """What a courier of ``generation`` answers to a command that comes twice, and what it hands to its fence."""
    link, fence = FakeLink(), FakeFence()
    courier = courier_of(link, fence, generation=generation, mode=mode)
    for _ in range(2):
        link.arriving = [made]
        courier.pump()
    return [message for message in link.sent if isinstance(message, Ack)], fence


@pytest.mark.parametrize("approved", [False, True])
def test_observe_refuses_everything(approved: bool) -> None:
    for action in (SKIP, SCALE, act("stop")):
        refusal = may_apply(settings(Mode.OBSERVE, "skip_step", "scale_lr", "stop"), command(action, approved=approved))
        assert "mode is observe" in refusal


def test_suggest_refuses_what_no_person_approved_and_takes_what_one_did() -> None:
    suggest = settings(Mode.SUGGEST, "skip_step")
    assert "no person approved it" in may_apply(suggest, command(SKIP, approved=False))
    assert may_apply(suggest, command(SKIP, approved=True)) == ""
    assert may_apply(suggest, command(SCALE, approved=True)) == "", "what is allowed without a person is not asked"


def test_auto_takes_what_is_allowed_and_refuses_the_rest_by_name_unless_a_person_approved_it() -> None:
    auto = settings(Mode.AUTO, "skip_step")
    assert may_apply(auto, command(SKIP, approved=False)) == ""
    assert may_apply(auto, command(SCALE, approved=False)) == "[auto] allow does not name scale_lr"
    both = command(SKIP, SCALE, act("rollback", before_step=3), approved=False)
    assert may_apply(auto, both) == "[auto] allow does not name scale_lr, rollback"
    assert may_apply(auto, command(SKIP, SCALE, approved=True)) == ""


def test_auto_refuses_what_crosses_the_bounds_that_a_person_may_cross() -> None:
    overrides = {"mode": Mode.AUTO, "auto.allow": ["scale_lr"], "auto.bounds": {"scale_lr": {"factor": [0.6, 1.0]}}}
    bounded = load_settings(overrides=overrides)
    refusal = may_apply(bounded, command(SCALE, approved=False))
    assert refusal == "scale_lr factor=0.5 lies outside [auto.bounds.scale_lr] factor = [0.6, 1]"
    assert may_apply(bounded, command(SCALE, approved=True)) == ""
    assert may_apply(bounded, command(act("scale_lr", factor=0.6), approved=False)) == ""


@pytest.mark.parametrize("mode", list(Mode))
def test_taking_a_fix_back_is_always_allowed(mode: Mode) -> None:
    assert may_apply(settings(mode), command(REVERT, approved=False)) == ""


@pytest.mark.parametrize("mode", list(Mode))
def test_a_revert_carries_nothing_else_along(mode: Mode) -> None:
    assert may_apply(settings(mode), command(REVERT, SCALE, approved=False)) != ""


@pytest.mark.parametrize("action", [SKIP, REVERT])
def test_a_command_of_an_old_generation_is_refused_by_name_and_kept_from_the_fence(action: Action) -> None:
    made = command(action)
    acks, fence = answers(made, generation="g2")
    assert [(ack.command, ack.state, ack.detail) for ack in acks] == [
        (made.id, AckState.REJECTED, "made for generation g, this is g2")
    ]
    assert fence.submitted == []


def test_what_may_not_be_applied_is_answered_once_and_ended_at_the_fence_for_all_ranks() -> None:
    made = command(SCALE, approved=False)
    acks, fence = answers(made)
    assert [(ack.command, ack.state, ack.tick) for ack in acks] == [(made.id, AckState.REJECTED, 7)]
    assert "scale_lr" in acks[0].detail
    assert fence.submitted == [(made.id, True)]


def test_a_rank_that_fails_to_judge_a_command_refuses_it_and_its_thread_lives_on() -> None:
    def broken(command: Command) -> str:
        raise RuntimeError("deque mutated during iteration")

    link, fence = FakeLink(), FakeFence()
    courier = courier_of(link, fence, refusal=broken)
    made = command(SKIP)
    link.arriving = [made]
    courier.pump()
    (ack,) = [message for message in link.sent if isinstance(message, Ack)]
    assert (ack.state, fence.submitted) == (AckState.REJECTED, [(made.id, True)])
    assert "deque mutated" in ack.detail


def test_what_may_be_applied_goes_to_the_fence_once_and_is_not_answered_before_it() -> None:
    made = command(SKIP, approved=False)
    acks, fence = answers(made)
    assert acks == []
    assert fence.submitted == [(made.id, False)]


# -- the kill file -----------------------------------------------------------------------------------------------------


def with_kill_file(home: Path, **more: Any) -> tuple[Courier, FakeLink, FakeFence, list[str]]:
    link, fence, said = FakeLink(), FakeFence(), []  # type: ignore[var-annotated]
    overrides = {"mode": Mode.AUTO, "auto.allow": ["skip_step"], "home": str(home), **more}
    return courier_of(link, fence, with_settings=load_settings(overrides=overrides), say=said.append), link, fence, said


def acks_of(link: FakeLink) -> list[tuple[str, str]]:
    return [(ack.command, str(ack.state)) for ack in link.sent if isinstance(ack, Ack)]


def test_the_folder_of_a_run_is_no_kill_file(tmp_path: Path) -> None:
    courier, link, _, said = with_kill_file(tmp_path)
    (tmp_path / "kill").mkdir()
    link.arriving = [approved := command(SCALE)]
    courier.pump()
    assert acks_of(link) == []
    assert (approved.approved, said) == (True, [])


@pytest.mark.parametrize("where", ["kill", "run/kill", "elsewhere"])
def test_while_the_kill_file_is_there_nothing_is_held_approved_or_not_but_what_takes_back(
    tmp_path: Path, where: str
) -> None:
    named = {"auto.kill_file": str(tmp_path / where)} if where == "elsewhere" else {}
    courier, link, fence, said = with_kill_file(tmp_path, **named)
    (tmp_path / "run").mkdir()
    (tmp_path / where).touch()
    approved, own, back = command(SCALE), command(SKIP, approved=False), command(REVERT)
    link.arriving = [approved, own, back]
    courier.pump()
    assert acks_of(link) == [(approved.id, "rejected"), (own.id, "rejected")]
    assert fence.submitted == [(approved.id, True), (own.id, True), (back.id, False)]
    assert "what is in force stays in force" in said[0]

    (tmp_path / where).unlink()
    later = command(SCALE)
    link.arriving = [later]
    courier.pump()
    assert fence.submitted[-1] == (later.id, False)
    assert "applied again" in said[1]


def test_what_is_held_when_the_kill_file_appears_is_ended_on_all_ranks_without_the_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(courier_module, "time", SimpleNamespace(monotonic=lambda: now[0], time=lambda: NOW))
    courier, link, fence, _ = with_kill_file(tmp_path)
    held, back = command(SKIP, approved=False), command(REVERT)
    link.arriving = [held, back]
    courier.pump()
    (tmp_path / "kill").touch()
    courier.pump()
    assert fence.refused == [], "it is looked for at most once a second"
    now[0] += 1.0
    courier.pump()
    assert fence.refused == [held.id]


# -- the end of a job --------------------------------------------------------------------------------------------------


class DistantLink(FakeLink):
    """A daemon that can be reached from ``reached_at`` on and acknowledges everything at ``takes_at``, in seconds."""

    def __init__(self, reached_at: float, takes_at: float) -> None:
        super().__init__()
        self.now = 100.0
        self._reached_at, self._takes_at = self.now + reached_at, self.now + takes_at

    @property
    def connected(self) -> bool:  # type: ignore[override]
        return self.now >= self._reached_at

    def wait(self, timeout_seconds: float, wake_fd: int) -> None:
        self.now += timeout_seconds
        if self.now >= self._takes_at:
            self.arriving = [Received(run="run", sources={"nonce": 1000})]


@pytest.mark.parametrize(
    ("reached_at", "takes_at", "seconds", "said"),
    [
        (1e9, 1e9, 1.0, ["the daemon tcp://host:7667 never answered (address, keys?): nobody watched this run"]),
        (0.0, 1e9, 5.0, ["2 frames were not acknowledged by the daemon before the end"]),
        (0.5, 3.0, 3.0, []),
        (0.0, 0.2, 0.2, []),
    ],
    ids=["nobody is there", "it takes nothing", "reached late", "usual"],
)
def test_the_end_of_a_job_waits_only_for_a_daemon_that_is_there(
    monkeypatch: pytest.MonkeyPatch, reached_at: float, takes_at: float, seconds: float, said: list[str]
) -> None:
    link = DistantLink(reached_at, takes_at)
    monkeypatch.setattr(courier_module, "time", SimpleNamespace(monotonic=lambda: link.now))
    heard: list[str] = []
    courier_of(link, say=heard.append).close("end", 0, timeout_seconds=5.0)
    assert link.now - 100.0 == pytest.approx(seconds, abs=0.05)
    assert heard == said


def test_a_daemon_that_has_taken_nothing_for_long_is_not_waited_for_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    link = DistantLink(0.0, 1e9)
    monkeypatch.setattr(courier_module, "time", SimpleNamespace(monotonic=lambda: link.now))
    courier = courier_of(link)
    courier.pump()
    link.now += 60.0
    courier.close("end", 0, timeout_seconds=5.0)
    assert link.now - 160.0 == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("raised", [False, True])
def test_what_is_found_in_the_last_moments_is_said_unless_the_script_says_it_itself(raised: bool) -> None:
    link, heard = FakeLink(), list[str]()
    courier = courier_of(link, say=heard.append, script_raised=lambda: raised)
    found = Announcement(run="run", incident="i1", text="step 9: critical: nan_loss: …", incident_kind="nan_loss")
    link.arriving = [found, Announcement(run="run", incident="i1", text="scale_lr may help; apply: sosa approve c1")]
    courier.close("end", 0, timeout_seconds=0.0)
    assert [text for text in heard if "acknowledged" not in text] == [
        *([] if raised else ["step 9: critical: nan_loss: …"]),
        "1 incident(s) in this run: sosa incidents --run run",
    ]

"""What real ranks do with commands that they must not carry out, and with one of them stopped in mid-agreement."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import pytest
from fake_daemon import FakeDaemon
from torchrun_job import RUN, Job, kill

from sosa_stream.protocol.actions import Action
from sosa_stream.protocol.codec import encode
from sosa_stream.protocol.messages import Command

pytestmark = pytest.mark.torchrun

ALLOWED = {"SOSA_MODE": "auto", "SOSA_AUTO_ALLOW": "scale_lr", "SOSA_AUTO_MAX_LR_CHANGE": "10"}
STOPPED_SECONDS = 3.0


@pytest.fixture
def daemon() -> Iterator[FakeDaemon]:
    daemon = FakeDaemon(RUN)
    yield daemon
    daemon.close()


def watched(start: Callable[..., Job], daemon: FakeDaemon) -> tuple[Job, str]:
    """A job that this daemon hears of, and its generation."""
    job = start("--until-told", settings={**ALLOWED, "SOSA_DAEMON": daemon.address})
    hellos = job.wait(lambda: len(daemon.hellos()) == 2 and daemon.hellos(), "both ranks' hello")
    assert hellos[0].header.generation == hellos[1].header.generation
    job.wait_step(5)
    return job, hellos[0].header.generation


def command(generation: str, name: str, *, action: str = "scale_lr", seq: int = 1, **params: Any) -> Command:
    return Command(
        id=name,
        run=RUN,
        generation=generation,
        seq=seq,
        actions=(Action(action=action, params=params),),
        reason="a test",
        incident="i0",
        expires_tick=10**6,
    )


def forged(valid: Command, action: dict[str, Any]) -> bytes:
    """The bytes of a command whose action no honest daemon can publish."""
    body = msgpack.unpackb(encode(valid))
    body["actions"] = [action]
    packed: bytes = msgpack.packb(body)
    return packed


def test_commands_that_are_stale_forged_or_not_allowed_are_refused_with_the_reason(
    start: Callable[..., Job], daemon: FakeDaemon
) -> None:
    job, generation = watched(start, daemon)
    fine = command(generation, "fine", factor=0.5, seq=9)
    wrong: dict[str, tuple[Command | bytes, str]] = {
        "stale": (command("another", "stale", factor=0.5), "made for generation another"),
        "denied": (command(generation, "denied", action="clip_grad", max_norm=1.0), "allow does not name clip_grad"),
        "beyond": (command(generation, "beyond", factor=0.01), "beyond auto.max_lr_change 10"),
        "unknown": (
            forged(command(generation, "unknown", factor=0.5), {"action": "format_disk", "params": {}}),
            "unknown action 'format_disk'",
        ),
        "outside": (
            forged(command(generation, "outside", factor=0.5), {"action": "scale_lr", "params": {"factor": 1e9}}),
            "lies outside",
        ),
        "garbage": (b"\xc1garbage", ""),
    }
    for bad, _ in wrong.values():
        daemon.publish(bad)
    for name, (_, why) in wrong.items():
        if why:
            job.wait(lambda name=name: len(daemon.states(name)) == 2, f"both ranks' word on {name}")  # type: ignore[misc]
            assert daemon.states(name) == {0: ["rejected"], 1: ["rejected"]}
            assert all(why in ack.detail for ack in daemon.acks(name)), daemon.acks(name)

    # Training is unharmed, and the ranks go on listening.
    daemon.publish(fine)
    job.wait(lambda: len(daemon.applied_at("fine")) == 2, "both ranks to apply the one that is fine")
    job.wait_more_steps(20)
    job.finish()
    assert len(set(daemon.applied_at("fine").values())) == 1
    assert "internal error" not in job.log
    # Of what nobody could even read the user is told, once.
    assert job.log.count("a control message was refused") == 1
    job.digest()


@pytest.mark.parametrize("moment", ["published", "held", "committed"])
def test_a_rank_that_stops_for_three_seconds_in_mid_agreement_splits_nobody(
    start: Callable[..., Job], daemon: FakeDaemon, moment: str
) -> None:
    job, generation = watched(start, daemon)
    stopped = job.rank_pid(1)
    daemon.publish(command(generation, "fix", factor=0.5))
    if moment != "published":
        job.wait(lambda: [s for s in daemon.states("fix").values() if moment in s], f"a rank that says {moment}")
    kill(stopped, signal.SIGSTOP)
    goes_on = threading.Timer(STOPPED_SECONDS, kill, (stopped, signal.SIGCONT))
    goes_on.start()
    goes_on.join()

    outcome = ("applied", "aborted", "rejected", "failed")
    job.wait(
        lambda: (
            job.process.poll() is not None
            or all(any(s in outcome for s in daemon.states("fix").get(rank, [])) for rank in range(2))
        ),
        "an outcome on both ranks",
    )
    if job.process.poll() is None:
        job.wait_more_steps(20)
        job.tell_to_finish()
        job.ended()
        applied = daemon.applied_at("fix")
        assert (len(applied), len(set(applied.values()))) in ((0, 0), (2, 1))
        job.digest()
    else:  # in doubt: better no training than two trainings
        assert "exitcode  : 75" in job.log
        assert len(daemon.applied_at("fix")) < 2


def test_every_repair_is_applied_at_one_tick_and_leaves_the_replicas_equal(
    start: Callable[..., Job], daemon: FakeDaemon
) -> None:
    names = "none,reset_optimizer_state,grad_accumulation,skip_data,resync,dump_diagnostics,set_loss_scale,revert"
    settings = {"SOSA_MODE": "auto", "SOSA_AUTO_ALLOW": names, "SOSA_DAEMON": daemon.address}
    settings["SOSA_AGENT_DIGEST_AFTER_FIX"] = "true"
    job = start("--until-told", "--workers", "1", settings=settings)
    hellos = job.wait(lambda: len(daemon.hellos()) == 2 and daemon.hellos(), "both ranks' hello")
    job.wait_step(5)
    wanted: list[tuple[str, dict[str, Any]]] = [
        ("none", {}),
        ("reset_optimizer_state", {}),
        ("grad_accumulation", {"num_steps": 3}),
        ("skip_data", {"num_batches": 2}),
        ("resync", {"source": 1}),
        ("dump_diagnostics", {}),
        ("revert", {"command": "grad_accumulation"}),
        ("revert", {"command": "reset_optimizer_state"}),
    ]
    details: dict[str, str] = {}
    for seq, (action, params) in enumerate(wanted, start=1):
        name = f"{action}-{seq}" if action == "revert" else action
        daemon.publish(command(hellos[0].header.generation, name, action=action, seq=seq, **params))
        job.wait(lambda name=name: len(daemon.applied_at(name)) == 2, f"both ranks to apply {name}")  # type: ignore[misc]
        assert len(set(daemon.applied_at(name).values())) == 1
        applied = [ack for ack in daemon.acks(name) if ack.state == "applied"]
        assert applied[0].digest == applied[1].digest != ""
        details[name] = applied[0].detail
    assert details["skip_data"] == "the next 2 batch(es) of data go by unused"
    assert "rank 1 copied to all ranks" in details["resync"]
    daemon.publish(command(hellos[0].header.generation, "scale", action="set_loss_scale", seq=9, scale=2.0))
    job.wait(lambda: len(daemon.states("scale")) == 2, "both ranks' word on the loss scale")
    assert "no GradScaler that is switched on" in daemon.acks("scale")[0].detail
    job.wait_more_steps(20)
    job.finish()
    assert "internal error" not in job.log
    job.digest()
    step = next(ack.step for ack in daemon.acks("dump_diagnostics") if ack.state == "applied")
    for rank in range(2):
        (file,) = job.home.rglob(f"diagnostics/rank{rank}-step{step}.txt")
        assert f"rank: {rank} of 2" in file.read_text()
        assert "grad_norm=" in file.read_text()

"""Two real jobs that call themselves the same on one daemon."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemon_process import DaemonProcess
from torchrun_job import RUN, Job, wait_for

from sosa_stream.protocol.messages import Ack, MetricFrame

pytestmark = [pytest.mark.torchrun, pytest.mark.faults]

SCRIPT = Path(__file__).with_name("drilled_training.py")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """Whose home is that of the job ``one``."""
    with DaemonProcess(tmp_path / "one" / "home") as process:
        yield process


def test_of_two_jobs_of_one_name_the_newer_is_watched_the_older_named_and_spared_its_commands(
    start: Callable[..., Job], daemon: DaemonProcess
) -> None:
    settings = {"SOSA_DAEMON": daemon.address, "SOSA_MODE": "suggest"}
    older = start(script=SCRIPT, settings=settings)
    older.wait_step(50)
    (first,) = {generation for generation, _ in older.recorded_steps()}
    newer = start(name="two", script=SCRIPT, settings=settings)
    newer.wait_step(50)
    wait_for(lambda: "two jobs call themselves" in daemon.log(), "the warning")
    assert f"generation {first}" in daemon.log()

    asked = older.sosa("fix", RUN, "scale_lr", "factor=0.5")
    assert asked.returncode == 0, asked.stderr
    older.wait_command("applied", "verified")  # as the daemon has it, which both share
    older.wait_more_steps(50)
    newer.finish()
    older.finish()
    acks = [event for event in older.recorded() if isinstance(event, Ack)]
    refused = [ack for ack in acks if ack.header.generation == first]
    assert {(str(ack.state), ack.tick > 0) for ack in refused} <= {("rejected", True)}
    assert {ack.header.rank for ack in acks if ack.state == "applied" and ack not in refused} == {0, 1}
    frames = [event for event in older.recorded() if isinstance(event, MetricFrame)]
    rates = [
        value
        for frame in frames
        if frame.header.generation == first and "lr_multiplier" in frame.columns
        for value in frame.values[:, frame.columns.index("lr_multiplier")].tolist()
    ]
    assert set(rates) == {1.0}, "the older job trains on as it was"
    assert older.incidents() == []

"""Metric names and labels are a public surface: frozen here."""

from __future__ import annotations

import re
from dataclasses import replace

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sosa_stream.daemon.exporter import Snapshot, registry
from sosa_stream.daemon.run import RunSnapshot
from sosa_stream.engine import Engine
from sosa_stream.testing import SimulatedJob, feed

SURFACE = {
    "sosa_build_info": {"version"},
    "sosa_commands_total": {"run", "state", "verdict"},
    "sosa_detector_state": {"run", "kind", "state"},
    "sosa_engine_errors_total": {"run"},
    "sosa_frames_duplicate_total": {"run"},
    "sosa_frames_lost_total": {"run"},
    "sosa_frames_received_total": {"run"},
    "sosa_frames_rejected_total": {"reason"},
    "sosa_incident_open": {"run", "kind", "severity"},
    "sosa_incidents_total": {"run", "kind", "severity"},
    "sosa_notifications_total": {"outcome"},
    "sosa_run_gradient_norm": {"run"},
    "sosa_run_learning_rate": {"run"},
    "sosa_run_loss": {"run"},
    "sosa_run_ranks": {"run", "state"},
    "sosa_run_step": {"run"},
}


def snapshot() -> Snapshot:
    job = SimulatedJob(seed=1, num_steps=400, stop_at=215, lr_factor=lambda step: 1000.0 if step >= 200 else 1.0)
    engine = Engine("run")
    feed(engine, job.run().events[: -job.world_size])  # before the ranks leave, which resolves what is open
    run = RunSnapshot(
        view=engine.view(),
        num_received=5,
        num_duplicates=1,
        num_lost=2,
        num_engine_errors=0,
        incidents={("lr_jump", "critical"): 1},
        commands={("applied", "none"): 1},
    )
    return Snapshot(runs=(run,), rejected={"malformed": 3})


def text_of(shown: Snapshot) -> str:
    return generate_latest(registry(lambda: shown)).decode()


def test_names_and_labels_are_frozen() -> None:
    surface: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text_of(snapshot())):
        for sample in family.samples:
            surface.setdefault(sample.name, set()).update(sample.labels)
    assert surface == SURFACE


def test_every_family_has_help_and_counters_alone_end_in_total() -> None:
    for family in text_string_to_metric_families(text_of(snapshot())):
        assert family.documentation.endswith(".")
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter")


def test_what_is_unknown_has_no_sample() -> None:
    shown = snapshot()
    (run,) = shown.runs
    unknown = replace(shown, runs=(replace(run, view=replace(run.view, loss=None)),))
    assert "sosa_run_loss{" in text_of(shown)
    assert "sosa_run_loss{" not in text_of(unknown)


def test_reasons_of_refusal_are_shown_before_the_first_refusal() -> None:
    reasons = set(re.findall(r'reason="(\w+)"', text_of(Snapshot())))
    assert reasons == {
        *("malformed", "oversized", "wrong_version", "unknown_kind", "bad_field"),
        *("wrong_key", "bad_handshake", "too_many", "unrecordable"),
    }


def test_the_number_of_series_does_not_grow_with_the_world_size() -> None:
    def count(world_size: int) -> int:
        view = SimulatedJob(seed=1, num_steps=3, world_size=world_size).run().engine.view()
        run = replace(snapshot().runs[0], view=view)
        return sum(not line.startswith("#") for line in text_of(Snapshot(runs=(run,))).splitlines())

    assert count(2) == count(16)

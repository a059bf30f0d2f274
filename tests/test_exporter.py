"""Metric names and labels are a public surface: frozen here, and shown by real engines that were fed with frames."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from prometheus_server import promtool

from sosa_stream.daemon.run import RunSnapshot
from sosa_stream.engine import Engine
from sosa_stream.figures import Buckets
from sosa_stream.metrics.__main__ import page
from sosa_stream.metrics.catalogue import FAMILIES, LABELS
from sosa_stream.metrics.collector import TOP_K, Snapshot, registry
from sosa_stream.protocol.messages import Heartbeat, MetricFrame, Phase
from sosa_stream.testing import NOW, SimulatedJob, feed, frame, header, hello

SURFACE = {
    "sosa_annotations_total": {"outcome"},
    "sosa_build_info": {"version"},
    "sosa_commands_total": {"run", "state", "verdict"},
    "sosa_daemon_beat_timestamp_seconds": set(),
    "sosa_detection_latency_seconds_bucket": {"le"},
    "sosa_detection_latency_seconds_count": set(),
    "sosa_detection_latency_seconds_sum": set(),
    "sosa_detector_state": {"run", "kind", "state"},
    "sosa_engine_errors_total": {"run"},
    "sosa_fix_budget_left": {"run"},
    "sosa_fixes_in_force": {"run"},
    "sosa_frames_duplicate_total": {"run"},
    "sosa_frames_lost_total": {"run"},
    "sosa_frames_received_total": {"run"},
    "sosa_frames_rejected_total": {"reason"},
    "sosa_incident_open": {"run", "kind", "severity"},
    "sosa_incidents_total": {"run", "kind", "severity"},
    "sosa_ingest_queue_depth": set(),
    "sosa_notifications_total": {"outcome"},
    "sosa_rank_info": {"run", "rank", "hostname", "gpu_uuid", "pod"},
    "sosa_rank_lag_seconds_bucket": {"run", "le"},
    "sosa_rank_lag_seconds_gcount": {"run"},
    "sosa_rank_lag_seconds_gsum": {"run"},
    "sosa_rank_offence_seconds": {"run", "rank", "hostname"},
    "sosa_requests_total": {"what", "source", "outcome"},
    "sosa_run_amp_scale": {"run"},
    "sosa_run_gradient_norm": {"run"},
    "sosa_run_info": {"run", "generation", "mode", "project"},
    "sosa_run_last_event_timestamp_seconds": {"run"},
    "sosa_run_learning_rate": {"run"},
    "sosa_run_learning_rate_multiplier": {"run"},
    "sosa_run_loss": {"run"},
    "sosa_run_memory_bytes": {"run", "memory", "stat"},
    "sosa_run_step_part_seconds": {"run", "part", "stat"},
    "sosa_run_nonfinite_steps_total": {"run"},
    "sosa_run_paused": {"run"},
    "sosa_run_ranks": {"run", "state"},
    "sosa_run_ranks_in_phase": {"run", "phase"},
    "sosa_run_samples_total": {"run"},
    "sosa_run_skipped_steps_total": {"run"},
    "sosa_run_step": {"run"},
    "sosa_run_step_seconds_bucket": {"run", "le"},
    "sosa_run_step_seconds_count": {"run"},
    "sosa_run_step_seconds_sum": {"run"},
    "sosa_run_steps_total": {"run"},
    "sosa_run_world_size": {"run"},
    "sosa_store_unwritten_rows": set(),
}


def run_of(engine: Engine, now: float | None = None) -> RunSnapshot:
    return RunSnapshot(
        view=engine.view(now),
        project="vision",
        heard_at=NOW,
        num_received=5,
        num_duplicates=1,
        num_lost=2,
        num_engine_errors=0,
        incidents={("lr_jump", "critical"): 1},
        commands={("applied", "none"): 1},
    )


def sick_run() -> RunSnapshot:
    """A run in auto whose learning rate has jumped, with everything that ranks can say of themselves."""
    job = SimulatedJob(seed=1, num_steps=400, stop_at=215, lr_factor=lambda step: 1000.0 if step >= 200 else 1.0)
    simulation = job.run()
    engine = Engine("run")
    feed(engine, simulation.events[: -job.world_size])  # before the ranks leave, which resolves what is open
    scaled = frame(1.8, rank=0, world_size=2, first_step=215)
    for rank in range(2):
        more = np.column_stack([scaled.values, [[64.0, 1024.0, 0.01 * rank]]])
        columns = (*scaled.columns, "samples", "loss_scale", "wait_seconds")
        row = MetricFrame(header=header(rank, 2), columns=columns, steps=scaled.steps, values=more)
        feed(engine, [row, beat(rank, 2, step=216)], NOW + 100)
    return run_of(engine, NOW + 110)


def beat(rank: int, world_size: int, *, step: int) -> Heartbeat:
    return Heartbeat(
        header=header(rank, world_size, seq=0),
        tick=step,
        step=step,
        phase=Phase.FORWARD,
        oldest=1,
        dropped=0,
        memory_bytes=1000 * (rank + 1),
        device_memory_bytes=10 * (rank + 1),
        gpu_uuid=f"GPU-{rank}",
    )


def full() -> Snapshot:
    return Snapshot(
        runs=(sick_run(),),
        rejected={"malformed": 3},
        annotations={"sent": 1},
        requests={("fix", "alertmanager", "done"): 1},
        latency=Buckets((0.1,)).add([0.05]).histogram,
    )


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    return full()


def text_of(shown: Snapshot) -> str:
    return generate_latest(registry(lambda: shown)).decode()


def values_of(shown: Snapshot, name: str) -> dict[tuple[str, ...], float]:
    """The samples of one name by the values of their labels in alphabetical order, without the run."""
    return {
        tuple(value for label, value in sorted(sample.labels.items()) if label != "run"): sample.value
        for family in text_string_to_metric_families(text_of(shown))
        for sample in family.samples
        if sample.name == name
    }


def test_names_and_labels_are_frozen(snapshot: Snapshot) -> None:
    surface: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text_of(snapshot)):
        for sample in family.samples:
            surface.setdefault(sample.name, set()).update(sample.labels)
    ours = {name: labels for name, labels in surface.items() if not name.startswith("process_")}
    assert ours == SURFACE


def test_what_is_exposed_is_what_the_catalogue_says(snapshot: Snapshot) -> None:
    assert {name for family in FAMILIES for name in family.sample_names} == set(SURFACE)
    for family in FAMILIES:
        for name in family.sample_names:
            assert SURFACE[name] - {"le"} == set(family.labels)
    assert {label for labels in SURFACE.values() for label in labels} == set(LABELS)


def test_the_reference_page_is_written_from_the_catalogue() -> None:
    written = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert written == page(), "python -m sosa_stream.metrics > docs/metrics.md"


def test_every_name_passes_promtool(snapshot: Snapshot) -> None:
    checked = promtool("check", "metrics", stdin=text_of(snapshot))
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_promtool_finds_fault_where_there_is_one() -> None:
    wrong = promtool("check", "metrics", stdin="# HELP sosa_steps Steps.\n# TYPE sosa_steps counter\nsosa_steps 1\n")
    assert wrong.returncode != 0


def test_openmetrics_can_be_had_too(snapshot: Snapshot) -> None:
    text = generate_openmetrics(registry(lambda: snapshot)).decode()
    assert "# TYPE sosa_rank_lag_seconds gaugehistogram\n# UNIT sosa_rank_lag_seconds seconds\n" in text
    assert text.endswith("# EOF\n")


def test_every_family_has_help_and_counters_alone_end_in_total(snapshot: Snapshot) -> None:
    for family in text_string_to_metric_families(text_of(snapshot)):
        assert family.documentation.endswith(".")
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter")


def test_what_is_unknown_has_no_sample(snapshot: Snapshot) -> None:
    (run,) = snapshot.runs
    unknown = replace(snapshot, runs=(replace(run, view=replace(run.view, loss=None)),))
    assert "sosa_run_loss{" in text_of(snapshot)
    assert "sosa_run_loss{" not in text_of(unknown)


def test_a_run_that_has_said_hello_only_shows_no_number_that_it_has_not_got() -> None:
    engine = Engine("run")
    feed(engine, [hello()])
    text = text_of(Snapshot(runs=(run_of(engine),)))
    for name in ("step", "loss", "gradient_norm", "learning_rate", "amp_scale", "samples_total", "memory_bytes"):
        assert f"sosa_run_{name}{{" not in text, name
    assert "sosa_fix_budget_left{" not in text, "it applies nothing by itself"
    assert values_of(Snapshot(runs=(run_of(engine),)), "sosa_run_steps_total") == {(): 0.0}


def test_what_ranks_say_of_themselves_is_shown_over_all_of_them(snapshot: Snapshot) -> None:
    assert values_of(snapshot, "sosa_run_samples_total") == {(): 128.0}
    assert values_of(snapshot, "sosa_run_amp_scale") == {(): 1024.0}
    assert values_of(snapshot, "sosa_run_memory_bytes") == {
        ("host", "max"): 2000.0,
        ("host", "mean"): 1500.0,
        ("device", "max"): 20.0,
        ("device", "mean"): 15.0,
    }
    assert values_of(snapshot, "sosa_run_ranks_in_phase")[("forward",)] == 2.0
    assert values_of(snapshot, "sosa_run_step_part_seconds") == {("wait", "max"): 0.01, ("wait", "mean"): 0.005}


def test_reasons_of_refusal_are_shown_before_the_first_refusal() -> None:
    reasons = set(re.findall(r'reason="(\w+)"', text_of(Snapshot())))
    assert reasons == {
        *("malformed", "oversized", "wrong_version", "unknown_kind", "bad_field"),
        *("wrong_key", "bad_handshake", "too_many", "unrecordable"),
    }


def many_ranks(world_size: int, silent: Iterable[int] = ()) -> Engine:
    """So many ranks that train for two steps, and later all are heard but the ``silent``."""
    engine = Engine("run")
    everyone = range(world_size)
    for rank in everyone:
        engine.handle(hello(rank, world_size), NOW)
    for step in range(2):
        for rank in everyone:
            engine.handle(frame([2.0 - step], rank=rank, world_size=world_size, first_step=step), NOW + 1 + step)
    quiet = set(silent)
    for rank in everyone:
        if rank not in quiet:
            engine.handle(beat(rank, world_size, step=2), NOW + 10)
    return engine


def test_the_number_of_series_is_the_same_for_8_ranks_and_for_10000() -> None:
    def lines(world_size: int) -> list[str]:
        shown = Snapshot(runs=(run_of(many_ranks(world_size, silent=range(7)), NOW + 10),))
        assert len(shown.runs[0].view.ranks) == world_size
        return [line for line in text_of(shown).splitlines() if line.startswith("sosa_")]

    few, many = lines(8), lines(10_000)
    assert len(few) == len(many)
    assert sum("rank=" in line for line in many) == 2 * TOP_K


def test_ranks_are_named_up_to_the_bound_and_the_worst_before_all() -> None:
    run = run_of(many_ranks(32, silent=[30]), NOW + 10)

    def named(rank_series: int) -> list[int]:
        shown = Snapshot(runs=(run,), rank_series=rank_series)
        return sorted(int(labels[-1]) for labels in values_of(shown, "sosa_rank_info"))

    assert named(0) == [30]
    assert named(3) == [0, 1, 2, 30]
    assert named(1000) == list(range(32))


def test_a_rank_can_be_joined_with_the_figures_of_its_gpu_and_its_host(snapshot: Snapshot) -> None:
    assert values_of(snapshot, "sosa_rank_info") == {
        ("GPU-0", "host-0", "", "0"): 1.0,
        ("GPU-1", "host-1", "", "1"): 1.0,
    }
    assert set(values_of(snapshot, "sosa_rank_offence_seconds")) == {("host-0", "0"), ("host-1", "1")}


def test_healthy_ranks_are_not_named() -> None:
    run = run_of(many_ranks(8), NOW + 10.5)
    assert values_of(Snapshot(runs=(run,)), "sosa_rank_info") == {}
    assert values_of(Snapshot(runs=(run,)), "sosa_run_ranks") == {
        ("live",): 8.0,
        **{(state,): 0.0 for state in ("stale", "gil_held_or_stopped", "lost", "blind", "ended")},
    }


def test_incidents_and_commands_are_counted_from_zero() -> None:
    shown = Snapshot(runs=(run_of(Engine("run")),))
    incidents, commands = values_of(shown, "sosa_incidents_total"), values_of(shown, "sosa_commands_total")
    assert incidents["nan_loss", "critical"] == 0
    assert incidents["lr_jump", "critical"] == 1
    assert commands["verified", "helped"] == 0
    assert commands["applied", "none"] == 1

"""For every alert, series under which it fires and stops firing, and near misses: cases for `promtool test rules`.

Minutes are those since the first sample; there is one each 30 s. ``time()`` is 0 at minute 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sosa_stream.alerting.alerts import Alert

STEP_MINUTES = 0.5
LAST_MINUTE = 60
"""Of a near miss: longer than any of those alerts needs."""
Value = Callable[[float], float | None]
"""A series: its value at a minute, or None where there is no sample."""


def always(value: float) -> Value:
    return lambda minute: value


def during(start: float, end: float = math.inf, *, value: float = 1, else_: float | None = 0) -> Value:
    return lambda minute: value if start <= minute < end else else_


def since(start: float, *, value: float = 1) -> Value:
    """A series that begins with ``value``."""
    return during(start, value=value, else_=None)


def beating(until: float, again: float = math.inf) -> Value:
    """A timestamp of now, which stands still for a while."""
    return lambda minute: 60 * (until if until <= minute < again else minute)


def counting(until: float, again: float = math.inf) -> Value:
    """A counter that grows by 10 a minute, and stands still for a while."""
    return lambda minute: 10 * (min(minute, until) + max(0.0, minute - again))


def ranks(run: str = "a", *, live: Value, lost: Value | None = None, ended: Value | None = None) -> dict[str, Value]:
    states = {"live": live, "stale": always(0), "lost": lost or always(0), "ended": ended or always(0)}
    return {f'sosa_run_ranks{{run="{run}", state="{state}", instance="d:1"}}': value for state, value in states.items()}


def incident(
    kind: str, severity: str, value: Value, instance: str = "d:1", *, heard_until: float = math.inf
) -> dict[str, Value]:
    labels = f'run="a", kind="{kind}", severity="{severity}", instance="{instance}"'
    return {
        f"sosa_incident_open{{{labels}}}": value,
        f'sosa_run_last_event_timestamp_seconds{{run="a", instance="{instance}"}}': beating(heard_until),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What an alert does under some series: not firing at ``quiet``, firing at ``fires``, over at ``over``.

    ``labels`` are those of its alerts beside the severity; ``value`` and ``duration`` as the texts show them.
    """

    alert: str
    series: Mapping[str, Value]
    quiet: tuple[float, ...]
    fires: tuple[float, ...]
    over: float
    labels: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class NearMiss:
    """Series under which an alert never fires."""

    alert: str
    why: str
    series: Mapping[str, Value]


LIVE = ranks(live=always(8))
A = {"run": "a"}
COMMANDS = 'sosa_commands_total{{run="a", state="{}", verdict="{}", instance="d:1"}}'
FRAMES_LOST = 'sosa_frames_lost_total{run="a", instance="d:1"}'
STEPS = 'sosa_run_steps_total{run="a", instance="d:1"}'
BLIND = 'sosa_detector_state{{run="a", kind="{}", state="blind", instance="d:1"}}'
UP, INFO = 'up{job="x", instance="d:1"}', 'sosa_build_info{version="1", job="x", instance="d:1"}'

CASES = (
    Case(
        alert="SosaRunCritical",
        # Two of one kind, seen by two daemons: one alert.
        series={
            **incident("nan_loss", "critical", during(5, 10, value=2)),
            **incident("nan_loss", "critical", during(5, 10), "d:2"),
        },
        quiet=(4.5,),
        fires=(5, 9.5, 14),
        over=16,
        labels={**A, "kind": "nan_loss"},
    ),
    Case(
        alert="SosaRunCritical",
        # The run was killed at minute 10, which closes no incident.
        series=incident("nan_loss", "critical", during(5), heard_until=10),
        quiet=(4.5,),
        fires=(5, 19.5, 24),
        over=26,
        labels={**A, "kind": "nan_loss"},
    ),
    Case(
        alert="SosaRunWarning",
        series=incident("loss_spike", "warning", during(5, 20)),
        quiet=(4, 9.5),
        fires=(10, 24),
        over=26,
        labels={**A, "kind": "loss_spike"},
    ),
    Case(
        alert="SosaFixFailing",
        # Series that begin at 1, with their verdicts.
        series={
            COMMANDS.format("applied", "none"): since(5, value=3),
            COMMANDS.format("reverted", "harmed"): since(10),
            COMMANDS.format("reverted", "no_effect"): since(20),
        },
        quiet=(5, 19.5),
        fires=(20, 60),
        over=80,
        labels=A,
        texts={"value": "2"},
    ),
    Case(
        alert="SosaFixFailing",
        # Another run of that name, in a home of its own.
        series={
            COMMANDS.format("reverted", "harmed"): lambda minute: (
                5 if minute < 10 else None if minute < 80 else min(2, (minute - 80) // 2)
            )
        },
        quiet=(75, 83.5),
        fires=(84, 140),
        over=152,
        labels=A,
        texts={"value": "2"},
    ),
    Case(
        alert="SosaFixBudgetSpent",
        series={'sosa_fix_budget_left{run="a", instance="d:1"}': during(10, 20, value=0, else_=3), **LIVE},
        quiet=(9.5,),
        fires=(10, 24),
        over=26,
        labels=A,
    ),
    Case(
        alert="SosaRankLost",
        series=incident("rank_lost", "critical", during(5, 15)),
        quiet=(4.5, 5),
        fires=(5.5, 14.5),
        over=21,
        labels={**A, "kind": "rank_lost"},
    ),
    Case(
        alert="SosaRunSilent",
        series={
            'sosa_run_last_event_timestamp_seconds{run="a", instance="d:1"}': beating(10, 20),
            **ranks(live=during(0, 10.5, value=8), lost=during(10.5, 20, value=8), ended=during(60, value=8)),
        },
        quiet=(9, 12),
        fires=(12.5,),
        over=26,
        labels=A,
        texts={"duration": "2m 30s"},
    ),
    Case(
        alert="SosaRunStalled",
        series={
            STEPS: counting(20, 70),
            'sosa_run_ranks_in_phase{run="a", phase="backward", instance="d:1"}': always(8),
            'sosa_run_ranks_in_phase{run="a", phase="eval", instance="d:1"}': always(0),
            **LIVE,
        },
        quiet=(19, 40, 49),
        fires=(51, 70),
        over=77,
        labels=A,
    ),
    Case(
        alert="SosaRunStalled",
        # One writes a checkpoint and does not come back.
        series={
            STEPS: counting(20),
            'sosa_run_ranks_in_phase{run="a", phase="checkpoint", instance="d:1"}': during(20),
            **LIVE,
        },
        quiet=(100, 200, 214),
        fires=(217, 300),
        over=math.inf,
        labels=A,
    ),
    Case(
        alert="SosaRunPaused",
        series={'sosa_run_paused{run="a", instance="d:1"}': during(10, 800), **LIVE},
        quiet=(9, 600),
        fires=(731, 799),
        over=801,
        labels=A,
    ),
    Case(
        alert="SosaStraggler",
        series=incident("straggler", "critical", during(5, 20)),
        quiet=(4, 6.5),
        fires=(7, 24),
        over=26,
        labels={**A, "kind": "straggler"},
    ),
    Case(
        alert="SosaHang",
        series=incident("hang", "critical", during(5, 20)),
        quiet=(4.5,),
        fires=(5, 24),
        over=26,
        labels={**A, "kind": "hang"},
    ),
    Case(
        alert="SosaFramesLost",
        # The daemon was away: what was lost meanwhile is there with the first sample of the next one.
        series={FRAMES_LOST: lambda minute: 0 if minute < 10 else None if minute < 30 else 70},
        quiet=(9, 20),
        fires=(30, 44),
        over=51,
        labels=A,
        texts={"value": "70"},
    ),
    Case(
        alert="SosaFramesRejected",
        series={
            'sosa_frames_rejected_total{reason="wrong_key", instance="d:1"}': lambda minute: max(
                0, min(minute, 20) - 5
            ),
            'sosa_frames_rejected_total{reason="malformed", instance="d:1"}': always(7),
        },
        quiet=(5, 10),
        fires=(11, 25),
        over=37,
        labels={"reason": "wrong_key", "instance": "d:1"},
    ),
    Case(
        alert="SosaEngineFailing",
        series={'sosa_engine_errors_total{run="a", instance="d:1"}': during(70, value=5, else_=2)},
        quiet=(65, 69),
        fires=(75,),
        over=140,
        labels=A,
        texts={"value": "3"},
    ),
    Case(
        alert="SosaDaemonBlind",
        series={
            BLIND.format("nan_loss"): during(5, 30, else_=None),
            'sosa_run_step{run="a", instance="d:1"}': since(6, value=9),
            **LIVE,
        },
        quiet=(5, 15.5),
        fires=(16, 34),
        over=41,
        labels={**A, "kind": "nan_loss"},
    ),
    Case(
        alert="SosaStoreBehind",
        series={'sosa_store_unwritten_rows{instance="d:1"}': during(5, 20, value=12)},
        quiet=(5, 14.5),
        fires=(15, 19),
        over=26,
        labels={"instance": "d:1"},
        texts={"value": "12"},
    ),
    Case(
        alert="SosaNotificationsLost",
        series={
            'sosa_notifications_total{outcome="failed", instance="d:1"}': during(5),
            'sosa_notifications_total{outcome="sent", instance="d:1"}': counting(90),
        },
        quiet=(4.5,),
        fires=(5, 19),
        over=27,
        labels={"instance": "d:1"},
    ),
    Case(
        alert="SosaDaemonStuck",
        series={'sosa_daemon_beat_timestamp_seconds{instance="d:1"}': beating(10, 15)},
        quiet=(9, 11),
        fires=(11.5,),
        over=21,
        labels={"instance": "d:1"},
        texts={"duration": "1m 30s"},
    ),
    Case(
        alert="SosaDaemonAbsent",
        # One of two is gone.
        series={
            UP: during(0, 10, else_=0),
            INFO: during(0, 10, else_=None),
            UP.replace("d:1", "d:2"): always(1),
            INFO.replace("d:1", "d:2"): always(1),
            'up{job="node", instance="n:1"}': during(0, 5),
        },
        quiet=(5, 10.5),
        fires=(11, 60),
        over=math.inf,
        labels={"job": "x", "instance": "d:1"},
    ),
    Case(
        alert="SosaDaemonAbsent",
        # There has never been one, until there is.
        series={UP: since(10), INFO: since(10)},
        quiet=(0.5,),
        fires=(1, 9.5),
        over=10,
    ),
)

NEAR_MISSES = (
    NearMiss(
        alert="SosaRunCritical",
        why="a kind with an alert of its own, and less than critical",
        series={**incident("hang", "critical", always(1)), **incident("loss_spike", "warning", always(1))},
    ),
    NearMiss(
        alert="SosaRunWarning",
        why="it comes and goes",
        series=incident("loss_spike", "warning", lambda minute: float(minute % 5 < 3)),
    ),
    NearMiss(
        alert="SosaFixFailing",
        why="one did harm, counted as applied and as reverted; others helped, or nobody approved them",
        series={
            COMMANDS.format("applied", "harmed"): since(5),
            COMMANDS.format("reverted", "harmed"): since(6),
            COMMANDS.format("verified", "helped"): since(5, value=9),
            COMMANDS.format("expired", "not_applied"): since(5, value=9),
        },
    ),
    NearMiss(
        alert="SosaFixBudgetSpent",
        why="the run is over",
        series={'sosa_fix_budget_left{run="a", instance="d:1"}': always(0), **ranks(live=always(0), ended=always(8))},
    ),
    NearMiss(alert="SosaRankLost", why="an elastic restart", series=incident("rank_lost", "critical", during(5, 5.5))),
    NearMiss(
        alert="SosaRankLost",
        why="all were asked to end: the job was cancelled",
        series=incident("rank_lost", "info", always(1)),
    ),
    NearMiss(
        alert="SosaRunSilent",
        why="all have said goodbye",
        series={
            'sosa_run_last_event_timestamp_seconds{run="a", instance="d:1"}': beating(10),
            **ranks(live=during(0, 10, value=8), ended=during(10, value=8)),
        },
    ),
    NearMiss(
        alert="SosaRunStalled",
        why="a long evaluation",
        series={
            STEPS: counting(20),
            'sosa_run_ranks_in_phase{run="a", phase="eval", instance="d:1"}': during(20, value=8),
            **LIVE,
        },
    ),
    NearMiss(
        alert="SosaRunStalled",
        why="the run is over",
        series={STEPS: counting(20), **ranks(live=during(0, 20, value=8), ended=during(20, value=8))},
    ),
    NearMiss(alert="SosaStraggler", why="only worth knowing", series=incident("straggler", "info", always(1))),
    NearMiss(
        alert="SosaFramesRejected",
        why="one message, of a scanner",
        series={'sosa_frames_rejected_total{reason="bad_handshake", instance="d:1"}': during(10)},
    ),
    NearMiss(alert="SosaFramesLost", why="none", series={FRAMES_LOST: always(0)}),
    NearMiss(
        alert="SosaDaemonBlind",
        why="inputs that few runs have",
        series={BLIND.format("overfitting"): always(1), 'sosa_run_step{run="a"}': always(9), **LIVE},
    ),
    NearMiss(alert="SosaDaemonBlind", why="no step yet", series={BLIND.format("nan_loss"): always(1), **LIVE}),
    NearMiss(
        alert="SosaDaemonAbsent",
        why="it restarts, and another target is down",
        series={
            UP: lambda minute: float(not 10 <= minute < 11),
            INFO: during(0, 10, else_=None),
            INFO.replace('"1"', '"2"'): since(11),
            'up{job="node", instance="n:1"}': always(0),
        },
    ),
)


def promtool_file(alert: Alert, rules: str, runbooks: str) -> dict[str, Any]:
    """The document that `promtool test rules` takes, of an alert's cases and then its near misses."""
    tests = [_test(case, alert, runbooks) for case in CASES if case.alert == alert.name]
    tests += [_never(miss) for miss in NEAR_MISSES if miss.alert == alert.name]
    return {"rule_files": [rules], "evaluation_interval": "30s", "tests": tests}


def _test(case: Case, alert: Alert, runbooks: str) -> dict[str, Any]:
    texts = {**case.labels, **case.texts}
    expected = {
        "exp_labels": {"severity": str(alert.severity), **case.labels},
        "exp_annotations": {
            "summary": alert.summary.format_map(texts),
            "description": alert.description.format_map(_Absent(texts)),
            "runbook_url": f"{runbooks}/{alert.name}.md",
        },
    }
    last = max(*case.fires, case.over if math.isfinite(case.over) else 0)
    looks = {minute: [] for minute in case.quiet} | {minute: [expected] for minute in case.fires}
    if math.isfinite(case.over):
        looks[case.over] = []
    return _document(case.series, last, case.alert, looks)


class _Absent(dict[str, str]):
    """A label that an alert does not have is empty in its texts."""

    def __missing__(self, name: str) -> str:
        return ""


def _never(miss: NearMiss) -> dict[str, Any]:
    return _document(miss.series, LAST_MINUTE, miss.alert, {minute: [] for minute in range(LAST_MINUTE + 1)})


def _document(
    series: Mapping[str, Value], last: float, alert: str, looks: Mapping[float, list[dict[str, Any]]]
) -> dict[str, Any]:
    return {
        "interval": "30s",
        "input_series": [{"series": name, "values": _values(value, last)} for name, value in series.items()],
        "alert_rule_test": [
            {"eval_time": f"{60 * minute:.0f}s", "alertname": alert, "exp_alerts": expected}
            for minute, expected in sorted(looks.items())
        ],
    }


def _values(value: Value, last: float) -> str:
    minutes: Iterable[float] = (i * STEP_MINUTES for i in range(int(last / STEP_MINUTES) + 1))
    # What a scrape does not find any more is stale at once, and not after five minutes.
    return " ".join("stale" if (found := value(minute)) is None else f"{found:g}" for minute in minutes)

"""The story of a folder that `sosa report` or `sosa diagnose` left, for comparisons: its source may be gone."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sosa_stream.decide.commands import CommandRecord, CommandState, Verdict
from sosa_stream.detect.incidents import Group, Incident, IncidentState, Severity
from sosa_stream.errors import RefusedError, UsageError
from sosa_stream.protocol.actions import Action
from sosa_stream.report.bins import Bins
from sosa_stream.report.story import Curve, Raised, Story

REPORT, STATISTICS = "diagnosis_report.json", "gradient_stats.csv"
_COLUMNS = {"loss": "loss", "total_norm": "grad_norm", "lr": "lr"}
_CHUNK = 8192


def is_left(path: Path) -> bool:
    """Whether a folder is one of ours."""
    return (path / REPORT).is_file() and (path / STATISTICS).is_file()


def tell_left(path: Path) -> Story:
    """Losses, norms and rates, incidents, fixes and errors of the folder at ``path``; layers and inputs are left out.

    Raises:
        UsageError: its files cannot be read, or are not what we write.
    """
    try:
        told = json.loads((path / REPORT).read_text(encoding="utf-8"))
        curves = _curves(path / STATISTICS)
        summary = told["summary"]
        is_recording = bool(summary["hosts"])
        return Story(
            name=str(summary["run"]),
            source=path,
            kind="recording" if is_recording else "folder",
            mode=str(summary["mode"]),
            began_at=summary["began_at"],
            ended_at=summary["ended_at"],
            num_ranks=int(summary["num_ranks"]),
            hosts=tuple(summary["hosts"]),
            num_generations=int(summary["num_generations"]),
            num_steps=int(summary["total_steps"]),
            first_step=int(summary["first_step"]),
            last_step=int(summary["last_step"]),
            curves=curves,
            incidents=tuple(map(_incident, told["incidents"])),
            commands=tuple(map(_command, told["fixes"])),
            raised=tuple(
                Raised(**{**one, "stack": tuple(one["stack"])}) for one in told["exceptions"] if isinstance(one, dict)
            ),
            states=dict.fromkeys(summary["blind"], "blind"),
            missing=tuple(summary["missing"]),
        )
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, RefusedError, csv.Error) as error:
        raise UsageError(f"{path} is no folder of sosa report, or of another version: {error!r}") from None


def _curves(path: Path) -> Mapping[str, Curve]:
    bins = {ours: Bins(tells_nan=ours != "lr") for ours in _COLUMNS.values()}
    waiting: dict[str, list[tuple[int, float]]] = {ours: [] for ours in bins}

    def put_in(ours: str) -> None:
        rows, waiting[ours] = waiting[ours], []
        steps = np.array([step for step, _ in rows], dtype=np.int64)
        bins[ours].add(steps, np.array([value for _, value in rows], dtype=np.float64))

    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            step = int(row["step"])
            for theirs, ours in _COLUMNS.items():
                if row[theirs] not in ("", None):
                    waiting[ours].append((step, float(row[theirs])))
                    if len(waiting[ours]) >= _CHUNK:
                        put_in(ours)
    for ours, rows in waiting.items():
        if rows:
            put_in(ours)
    curves = {ours: each.curve for ours, each in bins.items()}
    return {ours: curve for ours, curve in curves.items() if len(curve.steps)}


def _incident(told: Mapping[str, Any]) -> Incident:
    plain = {key: value for key, value in told.items() if key != "schema_version"}
    lists = {key: tuple(plain[key]) for key in ("ranks", "hosts", "symptoms", "causes", "fixes")}
    kinds = {
        "group": Group(told["group"]),
        "severity": Severity[str(told["severity"]).upper()],
        "state": IncidentState(told["state"]),
    }
    return Incident(**{**plain, **lists, **kinds})


def _command(told: Mapping[str, Any]) -> CommandRecord:
    plain = {key: value for key, value in told.items() if key != "schema_version"}
    kinds = {
        "actions": tuple(Action(action=each["action"], params=each["params"]) for each in told["actions"]),
        "state": CommandState(told["state"]),
        "verdict": None if told["verdict"] is None else Verdict(told["verdict"]),
        "confidence": told["confidence"] if told["confidence"] is not None else math.nan,
    }
    return CommandRecord(**{**plain, **kinds, "generation": ""})

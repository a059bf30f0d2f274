"""A story as tables: ``gradient_stats.csv``, ``input_features.csv`` and ``diagnosis_report.json``."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sosa_stream.protocol.messages import Features, Layers
from sosa_stream.report.rows import Row, features, rows
from sosa_stream.report.story import Curve, Grid, Story
from sosa_stream.report.verdict import Verdict
from sosa_stream.visible import visible

SCHEMA_VERSION = 1
GRADIENT_COLUMNS = (
    *("step", "epoch", "rank", "loss", "lr", "total_norm", "max_grad_norm", "min_grad_norm"),
    *("num_nan_grads", "num_inf_grads", "suspicious_layers"),
)
FEATURE_COLUMNS = (*("step", "rank", "feature", "mean", "std", "min", "max", "num_nonfinite", "z_score", "suspicious"),)
SUSPICIOUS_RATIO = 10.0
"""Times a layer's own running mean."""
UNUSUAL_Z = 12.0
RUNNING = 0.1
MAX_NAMED = 10
EPOCHS = ("log/epoch", "epoch")


def write_tables(story: Story, found: Verdict, out: Path) -> list[Path]:
    """Write all three into the folder ``out``; their paths."""
    written = [out / "gradient_stats.csv", out / "input_features.csv", out / "diagnosis_report.json"]
    _write(written[0], GRADIENT_COLUMNS, _gradient_rows(rows(story)))
    _write(written[1], FEATURE_COLUMNS, (line for told in features(story) for line in _feature_rows(told)))
    text = json.dumps(as_json(document(story, found)), indent=2, ensure_ascii=False, allow_nan=False)
    written[2].write_text(text + "\n", encoding="utf-8")
    return written


def _write(path: Path, columns: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([_cell(value) for value in line] for line in lines)


def _cell(value: object) -> object:
    if isinstance(value, float):
        return "" if value != value else f"{value:.9g}"
    if isinstance(value, str):
        text = visible(value)
        is_harmless = text[:1] not in ("=", "+", "-", "@") or _is_number(text)
        return text if is_harmless else f"'{text}"  # or a spreadsheet would carry it out
    return value


def _is_number(text: str) -> bool:
    """Whether it is one, and not a name that begins as one does: a loss may be negative."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _gradient_rows(steps: Iterable[Row]) -> Iterator[Sequence[object]]:
    usual: defaultdict[int, dict[str, float]] = defaultdict(dict)
    for row in steps:
        epoch = next((row.values[name] for name in EPOCHS if name in row.values), math.nan)
        of_layers: Sequence[object] = (math.nan, math.nan, "", "", "")
        if row.layers is not None:
            of_layers = _of_layers(row.layers, usual[row.rank])
        yield (
            row.step,
            epoch,
            row.rank,
            _told(row.values, "loss"),
            row.values.get("lr", math.nan) * row.values.get("lr_multiplier", 1.0),
            _told(row.values, "grad_norm"),
            *of_layers,
        )


def _told(values: Mapping[str, float], name: str) -> object:
    """A NaN that was measured is told as one; a value that there is not is left empty."""
    value = values.get(name)
    if value is None:
        return ""
    return "nan" if value != value else f"{value:.9g}"


def _of_layers(look: Layers, usual: dict[str, float]) -> Sequence[object]:
    """Largest and smallest norm, NaN and infinite elements, and the layers that are far from their own mean.

    ``usual`` holds the rank's running mean of each layer, and is kept up.
    """
    norms = look.norms.astype(np.float64)
    known = norms[np.isfinite(norms)]
    told = len(look.num_nan) == len(norms)
    suspicious = []
    for i, (name, norm) in enumerate(zip(look.names, norms.tolist(), strict=True)):
        is_bad = (told and look.num_nan[i] + look.num_inf[i] > 0) or math.isinf(norm)
        mean = usual.get(name)
        if is_bad or (mean is not None and norm > SUSPICIOUS_RATIO * mean > 0.0):
            suspicious.append(name)
        elif math.isfinite(norm):
            usual[name] = norm if mean is None else (1 - RUNNING) * mean + RUNNING * norm
    more = f" and {len(suspicious) - MAX_NAMED} more" if len(suspicious) > MAX_NAMED else ""
    return (
        float(known.max()) if len(known) else math.nan,
        float(known.min()) if len(known) else math.nan,
        int(look.num_nan.sum()) if told else "",
        int(look.num_inf.sum()) if told else "",
        "; ".join(suspicious[:MAX_NAMED]) + more,
    )


def _feature_rows(told: Features) -> Iterator[Sequence[object]]:
    for i in range(len(told.means)):
        z, num_nonfinite = float(told.z[i]), int(told.num_nonfinite[i])
        yield (
            *(told.step, told.header.rank, i),
            *(float(values[i]) for values in (told.means, told.stds, told.lows, told.highs)),
            num_nonfinite,
            z,
            int(num_nonfinite > 0 or abs(z) > UNUSUAL_Z),
        )


def document(story: Story, found: Verdict) -> dict[str, Any]:
    """What ``diagnosis_report.json`` holds; may hold numbers that are not finite."""
    return {
        "schema_version": SCHEMA_VERSION,
        "summary": {
            "run": story.name,
            "source": story.source.name,
            "verdict": found.sentence,
            "severity": found.severity,
            "first": found.first,
            "next_steps": list(found.next_steps),
            "mode": story.mode,
            "began_at": story.began_at,
            "ended_at": story.ended_at,
            "num_ranks": story.num_ranks,
            "hosts": list(story.hosts),
            "num_generations": story.num_generations,
            "total_steps": story.num_steps,
            "first_step": story.first_step,
            "last_step": story.last_step,
            **_of_curve(story.curves.get("loss"), "loss"),
            **_of_curve(story.curves.get("grad_norm"), "grad_norm"),
            "missing": list(story.missing),
            "blind": [kind for kind, state in story.states.items() if state == "blind"],
        },
        "timeline": [{"step": one.step, "severity": one.severity, "text": one.text} for one in found.timeline],
        "incidents": [incident.as_dict() for incident in story.incidents],
        "fixes": [record.as_dict() for record in story.commands],
        "exceptions": [
            {
                "rank": one.rank,
                "host": one.host,
                "step": one.step,
                "type": one.type,
                "message": one.message,
                "stack": list(one.stack),
                "explanation": one.explanation,
            }
            for one in story.raised
        ],
        "layer_statistics": _layers(story.layers),
        "weight_changes": _changes(story.weights, story.updates),
        "loss_history": _history(story.curves.get("loss")),
        "feature_changes": [dict(change) for change in story.features.changes] if story.features else [],
    }


def _of_curve(curve: Curve | None, name: str) -> dict[str, Any]:
    """The last finite value, the extremes, and how many were not finite; None where there is no such value."""
    found: dict[str, Any] = dict.fromkeys((f"final_{name}", f"min_{name}", f"max_{name}", f"num_nonfinite_{name}"))
    if curve is None:
        return found
    found[f"num_nonfinite_{name}"] = int(curve.num_nonfinite.sum())
    known = np.isfinite(curve.mean)
    if known.any():
        found[f"final_{name}"] = float(curve.mean[known][-1])
        found[f"min_{name}"] = float(curve.low[known].min())
        found[f"max_{name}"] = float(curve.high[known].max())
    return found


def _layers(grid: Grid | None) -> list[dict[str, Any]]:
    """Each layer in the model's order: statistics of its gradient's norm over the looks at it."""
    return [] if grid is None else [_of_layer(name, row) for name, row in zip(grid.names, grid.values, strict=True)]


def _of_layer(name: str, row: NDArray[np.float64]) -> dict[str, Any]:
    known = row[np.isfinite(row)]
    return {
        "layer": name,
        "num_looks": int((~np.isnan(row)).sum()),
        "num_nonfinite": int(np.isinf(row).sum()),
        "mean": float(known.mean()) if len(known) else None,
        "std": float(known.std()) if len(known) else None,
        "min": float(known.min()) if len(known) else None,
        "max": float(known.max()) if len(known) else None,
    }


def _changes(weights: Grid | None, updates: Grid | None) -> list[dict[str, Any]]:
    """Each layer's weights at the first and last look, and how large an update was in between, of the weights."""
    if weights is None or updates is None:
        return []
    changes = []
    for name, of_weights, of_updates in zip(weights.names, weights.values, updates.values, strict=True):
        known = of_weights[np.isfinite(of_weights)]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = of_updates / of_weights
        ratio = ratio[np.isfinite(ratio)]
        changes.append(
            {
                "layer": name,
                "first_norm": float(known[0]) if len(known) else None,
                "last_norm": float(known[-1]) if len(known) else None,
                "update_ratio_median": float(np.median(ratio)) if len(ratio) else None,
                "update_ratio_max": float(ratio.max()) if len(ratio) else None,
            }
        )
    return changes


def _history(curve: Curve | None) -> list[dict[str, Any]]:
    """The loss by bins of steps."""
    if curve is None:
        return []
    columns = (curve.steps, curve.low, curve.mean, curve.high, curve.num_nonfinite)
    names = ("step", "min", "mean", "max", "num_nonfinite")
    return [dict(zip(names, values, strict=True)) for values in zip(*(c.tolist() for c in columns), strict=True)]


def as_json(value: Any) -> Any:
    """With every number that is not finite as None, or ``"inf"`` and ``"-inf"``: JSON has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if value != value else ("inf" if value > 0 else "-inf")
    if isinstance(value, Mapping):
        return {str(key): as_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(each) for each in value]
    return value

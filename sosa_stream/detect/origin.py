"""Where a value that is not finite comes from, by what the ranks found out in the step itself.

Repeating the step with the same batch, weights and random numbers parts a fault of the machine from one of the numbers:
silent data corruption and races do not come again [Dixit et al., Silent Data Corruptions at Scale, 2021].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sosa_stream.detect.incidents import Finding, Incident
from sosa_stream.detect.windows import RunWindows
from sosa_stream.detect.wording import on_ranks

FACTS = ("attribution", "repeated")
"""Keys of the evidence that stay with an incident: they are found out once in many steps."""


class Attribution(StrEnum):
    """What the incident says; ``unknown`` where nothing was found and the step could not be repeated."""

    DATA = "data"
    MODEL = "model"
    DATA_OR_MODEL = "data_or_model"
    HARDWARE_OR_RACE = "hardware_or_race"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Evidence and causes to show; neither where nobody has looked."""

    evidence: Mapping[str, Any]
    causes: tuple[str, ...] = ()


def origin(windows: RunWindows, ranks: tuple[int, ...]) -> Origin:
    """What ``ranks`` have found out about the newest step."""
    weights = _of(windows, "weights_nonfinite", ranks)
    if np.isnan(weights).all():
        return Origin(evidence={})
    differs = _of(windows, "repeat_differs", ranks)
    # A mask may have held infinities from the first step on; those that are new are a fault.
    new = (_of(windows, "input_nonfinite", ranks) > 0) & np.isposinf(_of(windows, "input_score", ranks))
    bad_batch = new | (_of(windows, "batch_nonfinite", ranks) > 0)
    repeated = bool(np.isfinite(differs).any())
    again = "; repeated, the step is not finite again" if repeated else ""

    def where(which: NDArray[np.bool_]) -> str:
        return on_ranks(tuple(rank for rank, is_one in zip(ranks, which, strict=True) if is_one), windows.num_ranks)

    causes: tuple[str, ...] = ()
    if (differs > 0).any():
        attribution = Attribution.HARDWARE_OR_RACE
        causes = (
            f"faulty hardware{where(differs > 0)}: with the same batch, weights and random numbers the step is finite",
            "or a race: memory that is read before it is written, a kernel without a fixed order",
        )
    elif (weights > 0).any():
        attribution = Attribution.MODEL
        causes = (f"the weights held values that are not finite before the step{again}",)
    elif bad_batch.any():
        attribution = Attribution.DATA
        causes = (f"the batch{where(bad_batch)} holds values that are not finite{again}",)
    elif repeated:
        attribution = Attribution.DATA_OR_MODEL
        causes = (f"an operation outside its domain, or overflow: batch and weights are finite{again}",)
    else:
        attribution = Attribution.UNKNOWN
    return Origin(evidence={"attribution": str(attribution), "repeated": repeated}, causes=causes)


def finds_out(finding: Finding, incident: Incident) -> bool:
    """Whether a finding of its kind tells where it comes from, of which the incident knows nothing yet."""
    return _is_known(finding.evidence) and not _is_known(incident.evidence)


def with_facts(evidence: Mapping[str, Any], incident: Incident, finding: Finding) -> dict[str, Any]:
    """``evidence``, with what has been found out of either: of the incident's first step, if anything."""
    source = finding if finds_out(finding, incident) else incident
    return {**evidence, **{name: source.evidence[name] for name in FACTS if name in source.evidence}}


def _is_known(evidence: Mapping[str, Any]) -> bool:
    return bool(evidence.get("attribution", Attribution.UNKNOWN) != Attribution.UNKNOWN)


def _of(windows: RunWindows, name: str, ranks: tuple[int, ...]) -> NDArray[np.float64]:
    return windows.over_ranks(name)[list(ranks)]

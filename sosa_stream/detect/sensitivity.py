"""How little it takes to raise an incident: one setting, and exceptions from it for single kinds."""

from __future__ import annotations

from dataclasses import replace

from sosa_stream.detect.incidents import Finding, Severity
from sosa_stream.settings import DetectSettings, Sensitivity

FACTORS = {Sensitivity.LOW: 1.5, Sensitivity.NORMAL: 1.0, Sensitivity.HIGH: 0.7}
"""What the thresholds of robust scores are multiplied with."""


def strictness(settings: DetectSettings) -> float:
    """The factor for thresholds that several kinds share: the least that any of them wants."""
    wanted = [settings.sensitivity, *(override.sensitivity for override in settings.overrides.values())]
    return min(FACTORS[sensitivity] for sensitivity in wanted if sensitivity is not None)


def admit(finding: Finding, settings: DetectSettings) -> Finding | None:
    """A finding as the settings let it through: None where they do not.

    A finding that has a score above a threshold is held to its own kind's factor here.
    """
    override = settings.overrides.get(finding.kind)
    wanted = settings.sensitivity
    if override is not None:
        wanted = override.sensitivity or wanted
    score, threshold = finding.evidence.get("score"), finding.evidence.get("threshold")
    if score is not None and threshold is not None:
        excess = FACTORS[wanted] / strictness(settings)
        if excess > 1.0 and abs(score) < threshold * excess:
            return None
    if override is not None and override.severity_cap is not None:
        cap = Severity[override.severity_cap.upper()]
        finding = replace(finding, severity=min(finding.severity, cap), cap=min(finding.cap, cap))
    return finding

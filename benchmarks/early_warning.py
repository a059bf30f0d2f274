"""``python -m benchmarks.early_warning``: would a Markov chain over windows of events warn earlier than detectors do?

The seed of this project proposed it: closed windows of events become a state (energy, diversity, size, three bits), a
sparse Markov chain learns how states follow each other, and P(a critical window within H) is the risk. It was to stay
in the product only if, on runs not tuned on and at equal false alarms per run, its lead over the best single detector
is 10 points or more on at least a quarter of the sick runs. It is not in the product; this shows why.

The chain hears every finding of every detector at sensitivity `high`. What it is compared with is the earliest warning
that any detector gives at sensitivity `normal`. Half of the sources tune: they fit the chain, and choose the window,
the horizon and the threshold. The other half is only scored. Runs: the corpus of real logs, and the live programs
whose recordings lie in the cache.
"""

from __future__ import annotations

import argparse
import bisect
import hashlib
import itertools
import math
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from benchmarks.detection import corpus, healthy, sick
from benchmarks.detection.live import CACHE, events, rows_of, source_hash
from benchmarks.detection.score import HEALTHY, share
from benchmarks.detection.series import Row, messages, watch
from benchmarks.results_file import write
from sosa_stream.detect.incidents import Finding, Severity
from sosa_stream.effects import Event
from sosa_stream.engine import Engine
from sosa_stream.settings import DetectSettings, Sensitivity

LEAD_POINTS, LEAD_SHARE = 10, 0.25
WINDOW_POINTS, HORIZONS = (8, 16, 32), (1, 4, 16)
SMOOTHING, FORGETTING = 2.0, 0.999
MARGIN = 0.05
"""Hysteresis of the energy's buckets."""
NUM_PROCESSES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """A run as the chain and the detectors saw it; times in logged points."""

    id: str
    source: str
    onset: int | None
    is_live: bool
    num_points: int
    findings: tuple[tuple[int, str, int], ...]
    """Point, kind and severity."""
    warned: int | None
    """The first warning of any detector, from the onset on or still open at it; of a healthy run, any."""


@dataclass(frozen=True, slots=True)
class State:
    """A closed window: the seed's binary twin."""

    energy: int
    diversity: int
    size: int
    critical: bool
    many_kinds: bool
    many_events: bool


def window_states(run: Heard, width: int) -> list[State]:
    """The state of each closed window, in order."""
    states: list[State] = []
    found = [[] for _ in range(run.num_points // width)]  # type: list[list[tuple[int, str, int]]]
    for finding in run.findings:
        if finding[0] // width < len(found):
            found[finding[0] // width].append(finding)
    energy_bucket = 0
    for window in found:
        energy = statistics.fmean(severity for *_, severity in window) / Severity.CRITICAL if window else 0.0
        up, down = energy - MARGIN, energy + MARGIN
        energy_bucket = max(_bucket(up, (0.0, 0.34, 0.67)), min(energy_bucket, _bucket(down, (0.0, 0.34, 0.67))))
        kinds = len({kind for _, kind, _ in window})
        states.append(
            State(
                energy_bucket if window else 0,
                min(kinds, 3),
                _bucket(len(window), (0, 2, 9)),
                any(severity >= Severity.CRITICAL for *_, severity in window),
                kinds >= 3,
                len(window) >= 10,
            )
        )
    return states


def _bucket(value: float, edges: Sequence[float]) -> int:
    return sum(value > edge for edge in edges)


class Chain:
    """Counts of transitions, Dirichlet-smoothed towards how often each state is, and forgetting."""

    def __init__(self) -> None:
        self.counts: dict[State, Counter[State]] = defaultdict(Counter)
        self.visits: Counter[State] = Counter()

    def copy(self) -> Chain:
        other = Chain()
        other.counts = defaultdict(Counter, {state: Counter(after) for state, after in self.counts.items()})
        other.visits = Counter(self.visits)
        return other

    def learn(self, before: State, after: State) -> None:
        for state in self.counts[before]:
            self.counts[before][state] *= FORGETTING  # type: ignore[assignment]
        self.counts[before][after] += 1
        self.visits[after] += 1

    def risk(self, state: State, horizon: int) -> float:
        """P(a critical window within ``horizon`` windows | this one), by dynamic programming over the known states."""
        total = sum(self.visits.values())
        if not total:
            return 0.0
        usual = {known: visits / total for known, visits in self.visits.items()}
        value = dict.fromkeys(usual, 0.0)
        for _ in range(horizon):
            reached = {known: 1.0 if known.critical else value[known] for known in usual}
            mean = sum(usual[known] * reached[known] for known in usual)
            value = {known: self._expected(known, reached, mean) for known in usual}
        return value.get(state, mean)

    def _expected(self, state: State, reached: dict[State, float], mean: float) -> float:
        after = self.counts.get(state, Counter())
        hits = sum(count * reached[known] for known, count in after.items())
        return (hits + SMOOTHING * mean) / (sum(after.values()) + SMOOTHING)


def risks(run: Heard, chain: Chain, width: int, horizon: int) -> list[tuple[int, float]]:
    """The risk at the end of each window before the first critical one, and the point at which it is known."""
    own, found, before = chain.copy(), [], None
    known: dict[State, float] = {}  # of windows without events: what the chain says of them changes slowly
    for number, state in enumerate(window_states(run, width)):
        if before is not None:
            own.learn(before, state)
        if state.critical:
            break
        if state not in known or state.size:
            known[state] = own.risk(state, horizon)
        found.append(((number + 1) * width - 1, known[state]))
        before = state
    return found


def lead(run: Heard, found: Sequence[tuple[int, float]], threshold: float) -> float:
    """Points by which the risk warns before any detector; -inf where it does not, or spoils a clean program."""
    alarm = next((point for point, risk in found if risk > threshold), None)
    if alarm is None or (run.is_live and run.onset is not None and alarm < run.onset):
        return -math.inf
    return (run.num_points if run.warned is None else run.warned) - alarm


def score(runs: Iterable[Heard], chain: Chain, width: int, horizon: int, threshold: float) -> dict[str, Any]:
    leads, false = [], []
    for run in runs:
        found = risks(run, chain, width, horizon)
        if run.onset is None:
            false.append(any(risk > threshold for _, risk in found))
        else:
            leads.append(lead(run, found, threshold))
    ahead = [value for value in leads if value > -math.inf]
    return {
        "lead_of_10_points": share(value >= LEAD_POINTS for value in leads),
        "warned_at_all": share(value > -math.inf for value in leads),
        "median_lead_where_warned": statistics.median(ahead) if ahead else None,
        "healthy_warned": share(false),
    }


def tune(runs: Sequence[Heard]) -> tuple[Chain, int, int, float]:
    """The chain, window, horizon and threshold that lead most often with no more false alarms than detectors have."""
    well = [run for run in runs if run.onset is None]
    budget = sum(run.warned is not None for run in well) / len(well)
    best: tuple[float, Chain, int, int, float] | None = None
    for width, horizon in itertools.product(WINDOW_POINTS, HORIZONS):
        chain = Chain()
        for run in runs:
            for before, after in itertools.pairwise(window_states(run, width)):
                chain.learn(before, after)
        highest = sorted(max((risk for _, risk in risks(run, chain, width, horizon)), default=0.0) for run in well)
        threshold = highest[max(len(well) - 1 - int(budget * len(well)), 0)]
        figures = score(runs, chain, width, horizon, threshold)
        if best is None or figures["lead_of_10_points"]["share"] > best[0]:
            best = figures["lead_of_10_points"]["share"], chain, width, horizon, threshold
    assert best is not None
    return best[1:]


def hear(run_id: str, source: str, onset: int | None, is_live: bool, rows: Sequence[Row], said: list[Event]) -> Heard:
    points = sorted({int(row["step"]) for row in rows if "loss" in row})
    engine = Engine(run_id, DetectSettings(sensitivity=Sensitivity.HIGH))
    taken: list[tuple[int, str, int]] = []
    take = engine._tracker.take

    def listen(findings: list[Finding], *rest: Any) -> None:
        taken.extend((finding.step, finding.kind, int(finding.severity)) for finding in findings)
        take(findings, *rest)

    engine._tracker.take = listen  # type: ignore[method-assign]
    for i, event in enumerate(said):
        engine.handle(event, 0.01 * i)
    alarms = watch(Engine(run_id), ((0.01 * i, event) for i, event in enumerate(said)))
    timely = [alarm for alarm in alarms if onset is None or alarm.detected >= onset or alarm.is_open_at(onset)]

    def point(step: int) -> int:
        return bisect.bisect_left(points, step)

    return Heard(
        id=run_id,
        source=source,
        onset=None if onset is None else point(onset),
        is_live=is_live,
        num_points=len(points),
        findings=tuple((point(step), kind, severity) for step, kind, severity in taken),
        warned=min((point(alarm.detected) for alarm in timely), default=None),
    )


def _logs(part: int) -> list[Heard]:
    path = corpus.folder()
    if path is None:
        return []
    loader = corpus._load(path)
    sources = {entry["id"]: entry["repo"] for entry in loader.index()}
    found = []
    for number, (key, label, onset, rows) in enumerate(loader.runs()):
        if number % NUM_PROCESSES == part and label != corpus.UNCLEAR:
            first = None if label == HEALTHY else int(rows[0]["step"]) if onset is None else onset
            found.append(hear(key, sources[key], first, False, rows, list(messages(rows))))
    return found


def _programs(part: int) -> list[Heard]:
    found = []
    for number, program in enumerate((*healthy.PROGRAMS, *sick.PROGRAMS)):
        for seed in range(3):
            path = CACHE / f"{program.__name__}-{seed}-{program.num_steps}-{source_hash(program)}.sosa"
            if number % NUM_PROCESSES == part and path.exists():
                onset = program.onset if issubclass(program, sick.Fault) else None
                said = [event for _, event in events(path)]
                name = f"{program.__name__}/{seed}"
                found.append(hear(name, program.__name__, onset, True, rows_of(path), said))
    return found


def tunes(run: Heard) -> bool:
    """Whether a run's source is of the half that tunes: by a hash, so that nobody has chosen."""
    return hashlib.blake2b(run.source.encode(), digest_size=1).digest()[0] % 2 == 0


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m benchmarks.early_warning", description=__doc__).parse_args(argv)
    figures: dict[str, Any] = {"needed": {"lead_points": LEAD_POINTS, "share_of_sick_runs": LEAD_SHARE}}
    with ProcessPoolExecutor(NUM_PROCESSES) as pool:
        sets = {
            "logs": [run for part in pool.map(_logs, range(NUM_PROCESSES)) for run in part],
            "programs": [run for part in pool.map(_programs, range(NUM_PROCESSES)) for run in part],
        }
    for name, runs in sets.items():
        if not runs:
            print(f"{name}: NONE ARE HERE", file=sys.stderr)
            continue
        known, unseen = [run for run in runs if tunes(run)], [run for run in runs if not tunes(run)]
        chain, width, horizon, threshold = tune(known)
        figures[name] = {
            "window_points": width,
            "horizon_windows": horizon,
            "threshold": round(threshold, 4),
            "tuned_on": score(known, chain, width, horizon, threshold),
            "unseen": score(unseen, chain, width, horizon, threshold),
            "unseen_healthy_warned_by_detectors": share(run.warned is not None for run in unseen if run.onset is None),
        }
        print(name, figures[name], flush=True)
    print(write("early_warning", figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())

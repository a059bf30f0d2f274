"""What is known of fixes: Beta posteriors of kind x fix, and how often a fault heals when nothing is done.

For a fix f against a kind k, with S = `PRIOR_STRENGTH`, p the playbook's confidence, and helped and n the counted
outcomes, each by its weight:

    prior mean   m = p[k,f] + sum over other kinds j of (helped[j,f] - n[j,f] p[j,f]) / (S + sum over j of n[j,f])
    posterior    Beta(S m + helped[k,f], S (1 - m) + n[k,f] - helped[k,f])

So the prior is worth S trials, and its mean moves by how much better or worse than the playbook says the fix has done
against other kinds; that excess is itself shrunk to zero by S trials: partial pooling as in [Efron and Morris 1975;
Gelman et al., Bayesian Data Analysis, chapter 5], with a strength that is stated instead of estimated, since a project
has too few incidents to estimate it from. With each outcome all earlier ones of its kind lose weight, as in discounted
Thompson sampling [Raj and Kalyani 2017].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from sosa_stream.decide.beta import quantile
from sosa_stream.decide.commands import Verdict
from sosa_stream.decide.playbook import NATURAL, NATURAL_OTHERWISE, PRIORS

NONE = "none"
"""The arm that is always there: nothing is done."""
PRIOR_STRENGTH = 10.0
"""Trials that the playbook's word is worth."""
MIN_COUNTED = 5.0
"""Trials of a kind x fix from which on the lower bound counts instead of the mean."""
LOWER_SHARE = 0.1
"""Of the posterior that lies below the lower bound."""
INCONCLUSIVE_WEIGHT = 0.2
"""A trial that says little is a fifth of one, half of it on either side: back in band alone may be chance."""
CREDIT: Mapping[Verdict, tuple[float, float]] = {
    Verdict.HELPED: (1.0, 1.0),
    Verdict.NO_EFFECT: (0.0, 1.0),
    Verdict.HARMED: (0.0, 1.0),
    Verdict.INCONCLUSIVE: (0.5, INCONCLUSIVE_WEIGHT),
}
"""What a verdict counts: success, and weight. `not_applied` counts nothing."""
RECOVERY_POINTS = (0, 10, 20, 40, 80, 160)
"""Where the spans of the curve of natural recovery begin; the last one is open."""
SPAN_LENGTHS = (*(end - begin for begin, end in pairwise(RECOVERY_POINTS)), RECOVERY_POINTS[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One trial as it is counted, stored and pooled. ``fix`` `none`: a fault that was left alone once a fix was due.

    Raises:
        ValueError: the weight is not in (0, 1], or ``lasted_steps`` is negative or no 64 bits.
    """

    kind: str
    fix: str
    verdict: Verdict
    weight: float = 1.0
    """1 of this project's own; less of what was imported."""
    lasted_steps: int = 0
    """From the fix, or from when it was due, until the run was well again, or nobody looked any more."""

    def __post_init__(self) -> None:
        if not 0.0 < self.weight <= 1.0 or not 0 <= self.lasted_steps < 2**63:
            raise ValueError(f"weight {self.weight!r} or lasted_steps {self.lasted_steps!r} is out of bounds")

    def as_row(self) -> tuple[str, str, str, float, int]:
        """Plain values, of which `from_row` makes the same outcome again."""
        return self.kind, self.fix, str(self.verdict), self.weight, self.lasted_steps

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> Outcome:
        """From plain values, wherever they come from.

        Raises:
            ValueError: they are not five, or one is of another type, unknown or out of bounds.
        """
        if len(row) != 5:
            raise ValueError(f"an outcome has five values, not {len(row)}")
        kind, fix, verdict, weight, lasted_steps = row
        if not isinstance(kind, str) or not isinstance(fix, str):
            raise ValueError("kind and fix of an outcome must be strings")
        if type(weight) not in (int, float) or type(lasted_steps) is not int:
            raise ValueError("weight and lasted_steps of an outcome must be numbers")
        return cls(kind=kind, fix=fix, verdict=Verdict(verdict), weight=float(weight), lasted_steps=lasted_steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Posterior:
    """What is believed of one kind x fix: Beta(``a``, ``b``) over "it helps"."""

    a: float
    b: float
    num_counted: float = 0.0
    """Outcomes of this kind and fix, by what they are worth by now."""
    num_trials: int = 0
    num_helped: int = 0

    @property
    def mean(self) -> float:
        return self.a / (self.a + self.b)

    @property
    def lower(self) -> float:
        """What it is better than with 90% belief."""
        return self.quantile(LOWER_SHARE)

    def quantile(self, share: float) -> float:
        return quantile(share, self.a, self.b)

    @property
    def confidence(self) -> float:
        """What a fix must show at the gate: the mean, and after `MIN_COUNTED` outcomes the lower bound."""
        return self.mean if self.num_counted < MIN_COUNTED else self.lower


@dataclass(slots=True)
class _Tally:
    helped: float = 0.0
    counted: float = 0.0
    num_trials: int = 0
    """Not faded, for people."""
    num_helped: int = 0

    def add(self, success: float, weight: float) -> None:
        self.helped += success * weight
        self.counted += weight

    def fade(self, factor: float) -> None:
        self.helped *= factor
        self.counted *= factor


@dataclass(slots=True)
class _Recovery:
    """For each span of time: how many faults were watched through it, also in part, and how many healed in it."""

    spans: list[_Tally] = field(default_factory=lambda: [_Tally() for _ in RECOVERY_POINTS])
    num_trials: int = 0
    num_healed: int = 0

    def add(self, steps: int, healed: bool, weight: float) -> None:
        self.num_trials += 1
        self.num_healed += healed
        for begin, length, span in zip(RECOVERY_POINTS, SPAN_LENGTHS, self.spans, strict=True):
            is_last = span is self.spans[-1]
            if healed and begin <= steps and (is_last or steps < begin + length):
                span.add(1.0, weight)
            elif steps > begin:
                passed = (steps - begin) / length
                span.add(0.0, weight * (passed if is_last else min(passed, 1.0)))


class Experience:
    """Counted outcomes. As large as the playbook, however many there were."""

    def __init__(self, outcomes: Iterable[Outcome] = (), *, discount: float = 1.0) -> None:
        """``discount`` is what an outcome is still worth after one more of its kind; 1 forgets nothing."""
        self._discount = discount
        self._tallies: dict[tuple[str, str], _Tally] = {}
        self._recoveries: dict[str, _Recovery] = {}
        for outcome in outcomes:
            self.count(outcome)

    def count(self, outcome: Outcome) -> None:
        """Take one in, after all that came before. Of a kind or fix that the playbook lacks, it says nothing here."""
        known = (outcome.kind, outcome.fix) in PRIORS or outcome.fix == NONE
        if not known or outcome.verdict not in CREDIT:
            return
        success, share = CREDIT[outcome.verdict]
        weight = outcome.weight * (1.0 if outcome.fix == NONE else share)
        self._fade(outcome.kind, self._discount**weight)
        if outcome.fix == NONE:
            recovery = self._recoveries.setdefault(outcome.kind, _Recovery())
            recovery.add(outcome.lasted_steps, outcome.verdict is Verdict.HELPED, weight)
        else:
            tally = self._tallies.setdefault((outcome.kind, outcome.fix), _Tally())
            tally.add(success, weight)
            tally.num_trials += 1
            tally.num_helped += outcome.verdict is Verdict.HELPED

    def _fade(self, kind: str, factor: float) -> None:
        spans = self._recoveries[kind].spans if kind in self._recoveries else []
        for tally in [*spans, *(tally for (of, _), tally in self._tallies.items() if of == kind)]:
            tally.fade(factor)

    def posterior(self, kind: str, fix: str) -> Posterior:
        """What is believed of one of the playbook's pairs."""
        prior, own = PRIORS[kind, fix], self._tallies.get((kind, fix), _Tally())
        others = [(tally, PRIORS[key]) for key, tally in self._tallies.items() if key[1] == fix and key[0] != kind]
        excess = sum(tally.helped - tally.counted * of_other for tally, of_other in others)
        mean = prior + excess / (PRIOR_STRENGTH + sum(tally.counted for tally, _ in others))
        return Posterior(
            a=PRIOR_STRENGTH * mean + own.helped,
            b=PRIOR_STRENGTH * (1.0 - mean) + own.counted - own.helped,
            num_counted=own.counted,
            num_trials=own.num_trials,
            num_helped=own.num_helped,
        )

    def recovery(self, kind: str, steps: float, share: float | None = None) -> float:
        """P(well again within ``steps`` | a fix was due and nothing is done), by a life table [Kaplan and Meier 1958].

        Each span has a Beta posterior over healing within it, from the playbook's prior; within a span the hazard is
        constant. ``share`` takes that quantile of every span instead of the mean.
        """
        spans = self._recoveries.get(kind, _Recovery()).spans
        lasting = 1.0
        for i, (begin, length) in enumerate(zip(RECOVERY_POINTS, SPAN_LENGTHS, strict=True)):
            if steps > begin:
                passed = (steps - begin) / length
                healing = self._span(kind, spans[i], share)
                lasting *= (1.0 - healing) ** (passed if i + 1 == len(spans) else min(passed, 1.0))
        return 1.0 - lasting

    @staticmethod
    def _span(kind: str, tally: _Tally, share: float | None) -> float:
        a = PRIOR_STRENGTH * NATURAL.get(kind, NATURAL_OTHERWISE) + tally.helped
        b = PRIOR_STRENGTH + tally.counted - a
        return a / (a + b) if share is None else quantile(share, a, b)

    def untreated(self, kind: str) -> tuple[int, int]:
        """How many faults of a kind were left alone, and how many of them healed; nothing forgotten."""
        recovery = self._recoveries.get(kind, _Recovery())
        return recovery.num_trials, recovery.num_healed

"""What training programs print: the known families of lines, as data.

A family is a few regular expressions. A line that one of them finds is a row: its named groups are columns, and so is
every ``name: value``, ``name=value`` or ``name value`` in the group ``rest``. The groups `COUNTERS` say where in the
run the row is. A row that holds nothing else, such as ``Epoch 3/10``, says it for the rows that follow.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sosa_stream.errors import UsageError

COUNTERS = ("step", "epoch", "batch", "num_batches")
"""``batch`` counts within an epoch of ``num_batches``, where the log says so."""

_NUMBER = r"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|(?:nan|inf(?:inity)?)(?![a-z]))"
_NAME = r"[a-z_]\w*(?:[ ./-]\w+){0,4}?"
PAIR = re.compile(rf"(?<![\w.])({_NAME})['\"]?\s*(?:\([^()]*\)\s*)?[:=]?\s*['\"]?[\[(]?\s*({_NUMBER})", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Lines that one kind of program prints."""

    name: str
    lines: tuple[re.Pattern[str], ...]
    keeps_last: bool = False
    """Whether lines at one place in the run repeat each other, as a progress bar's do: the last one counts."""
    completes: Callable[[dict[str, float]], None] | None = None
    """Adds to a row what its program does not print."""


def _family(name: str, *lines: str, **how: Any) -> Family:
    """``<n>`` stands for a number in group ``n``, ``<n:d>`` for a whole one."""
    patterns = []
    for line in lines:
        line = re.sub(r"<(\w+):d>", r"(?P<\1>\\d+)(?!\\.?\\d)", line)
        line = re.sub(r"(?<!\?P)<(\w+)>", lambda group: f"(?P<{group[1]}>{_NUMBER})", line)
        patterns.append(re.compile(line, re.IGNORECASE))
    return Family(name=name, lines=tuple(patterns), **how)


def _generator_loss(row: dict[str, float]) -> None:
    """CycleGAN's loss: what its generators minimise, which is all that the discriminators (``D_A``, …) do not."""
    terms = [value for name, value in row.items() if name not in COUNTERS and not name.startswith("D")]
    if terms:
        row["loss"] = sum(terms)


_STAMP = r"^\s*(?:\[[^\]]*\]\s*)?"
_BAR = r"\|[^|]*\|\s*"
_BATCH = r"(?P<batch>[1-9]\d*)/<num_batches:d> \["

# In order: where two families find about as many lines of a log, the first one is it. The last one fits almost all.
FAMILIES: tuple[Family, ...] = (
    _family(  # Hugging Face Trainer on stdout; its summary at the end is no step
        "Hugging Face",
        r"(?P<rest>\{['\"](?![^{}]*train_runtime)[^{}]*loss['\"]\s*:[^{}]*\})",
    ),
    _family("verl", r"(?:^|\s)step:<step:d> - (?P<rest>.*)"),
    _family("modded-nanogpt", _STAMP + r"step:<step:d>(?:/\d+)?\s+(?P<rest>[a-z_]+:.*)"),
    _family(
        "nanoGPT",
        r"^iter <step:d>: (?P<rest>loss .*)",
        r"^step <step:d>: train loss <eval_train_loss>, val loss <val_loss>",
    ),
    _family(
        "Megatron-LM",
        r"\biteration\s+<step:d>/\s*\d+ \|(?P<rest>.*)",
        r"\bvalidation loss at iteration <step:d> \|.*?loss value: <val_loss>",
    ),
    _family(
        "word_language_model",
        r"\| epoch +<epoch:d> \| +<batch:d>/ *<num_batches:d> batches \|(?P<rest>.*)",
        r"\| end of epoch +<epoch:d> .*?valid loss +<val_loss>",
    ),
    _family(
        "fairseq",
        r"\bepoch <epoch:d>:\s+<batch:d> / <num_batches:d> (?P<rest>loss=.*)",
        r"\bvalid\b.*?\| (?:valid_)?loss <val_loss> .*\bnum_updates <step:d>",
    ),
    _family("detectron2", r"\biter: <step:d>\s+(?P<rest>total_loss: .*)"),
    _family(
        "mmengine",
        r"\bepoch\s*(?:\(train\)\s*)?\[<epoch:d>\]\[\s*<batch:d>/<num_batches:d>\]\s+(?P<rest>.*\bloss.*)",
        r"\biter\s*(?:\(train\)\s*)?\[\s*<step:d>/\d+\]\s+(?P<rest>.*\bloss.*)",
    ),
    _family(  # what it counts are samples
        "PyTorch's MNIST",
        r"\btrain epoch: <epoch:d> \[<batch:d>/<num_batches:d> \([^()]*\)\]\s*(?P<rest>loss: .*)",
        r"\btest set: average loss: <val_loss>",
    ),
    _family("CycleGAN", r"^\(epoch: <epoch:d>, iters: <batch:d>[^)]*\) (?P<rest>.*)", completes=_generator_loss),
    _family(
        "Keras",
        r"^\W*epoch <epoch:d>/\d+\s*$",
        # Only the full bar counts, and what follows it.
        r"(?:^|[^\d./])(?P<done>\d+)/(?P=done) (?:\[=|━|-).*?(?P<rest>(?:\w+: \S+ - )*\bloss: .*)",
        r"^\s*- .*?(?P<rest>\bloss: .*\bval_loss: .*)",
    ),
    _family(
        "llm.c",
        _STAMP + r"step\s*:?\s*<step:d>(?:\s*/\s*\d+)?\s*[|,]\s*(?P<rest>.*)",
        r"^s:<step:d> (?:tel:<val_loss>|trl:<loss>|eval:<accuracy>)(?P<rest>.*)",
        r"^<step:d> (?:train <loss>|val <val_loss>|hella <accuracy>)",
        r"^\s*val(?:idation)? loss:?\s*<val_loss>\s*$",
    ),
    _family(
        "progress bar",
        # A bar over the validation set counts other batches.
        r"^\W*(?:val|test|eval)\w*\b[^|]*\bloss\W{1,3}<val_loss>[^|]*" + _BAR + r"\d+/\d+ \[",
        r"^\W*(?:val|test|eval)\w*\b[^|]*" + _BAR + r"\d+/\d+ \[[^\]]*loss[=:]\s*<val_loss>",
        r"^(?:[^|]*?\bepoch\W{0,3}<epoch:d>)?[^|]*" + _BAR + _BATCH + r"(?P<rest>[^\]]*loss[=:][^\]]*)",
        r"^(?P<rest>(?:[^|]*?\bepoch\W{0,3}<epoch:d>)?[^|]*loss\b[^|]*)" + _BAR + _BATCH,
        keeps_last=True,
    ),
    _family(
        "plain text",
        r"\b(?:cost|loss)\s+(?:after|at)\s+(?:iteration|epoch|step)\s*<step:d>\s*[:=]\s*<loss>",
        r"^(?!.*\d/\d+ (?:\[[=>.]|\[\d+:\d|━))(?=.*(?:loss|cost)\b)(?:(?=.*?\bepochs?\s*[:=#]?\s*[\[(]?\s*<epoch:d>)|)"
        r"(?:(?=.*?\b(?:global_?step|steps?|iter(?:ation)?s?|batch(?:es)?|updates?)\s*[:=#]?\s*[\[(]?\s*"
        r"<batch:d>(?:\s*/\s*<num_batches:d>)?)|)(?P<rest>.*)",
        r"^\W*epoch\W{0,4}<epoch:d>(?:\s*/\s*\d+)?\W*$",
    ),
)


def family_of(pattern: str) -> Family:
    """A family from a user's ``--pattern``.

    Raises:
        UsageError: it is no regular expression, or has no named groups.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--pattern is no regular expression: {error}") from None
    if not compiled.groupindex:
        raise UsageError("--pattern needs named groups, such as (?P<step>\\d+) and (?P<loss>\\S+)")
    return Family(name="pattern", lines=(compiled,))


def row_of(family: Family, line: str) -> dict[str, float] | None:
    """The numbers of a line, or None where the family does not know it."""
    places = _places(family, line)
    if places is None:
        return None
    row = {}
    for name, (start, end) in places.items():
        with contextlib.suppress(ValueError):  # a user's own group may hold anything
            row[name] = float(line[start:end])
    if family.completes is not None:
        family.completes(row)
    return row


class Shape:
    """Lines that differ from one in nothing but its numbers, as most lines of a log do: one match reads them.

    It gives what `row_of` gives, in a third of the time.
    """

    def __init__(self, names: tuple[str, ...], pattern: str) -> None:
        self._names = names
        self._match = re.compile(pattern, re.IGNORECASE).fullmatch

    @classmethod
    def of(cls, family: Family, line: str) -> Shape | None:
        """The shape of a line that the family knows, unless its rows are more than what the line says."""
        places = _places(family, line)
        if not places or family.keeps_last or family.completes is not None:
            return None
        pattern, at = "", 0
        for start, end in sorted(places.values()):
            number = r"\d+" if line[start:end].isdecimal() else _NUMBER
            pattern += f"{_literal(line[at:start])}({number})"
            at = end
        names = tuple(sorted(places, key=lambda name: places[name]))
        return cls(names, pattern + _literal(line[at:]))

    def row_of(self, line: str) -> dict[str, float] | None:
        """The numbers of a line, or None where it has another shape."""
        found = self._match(line)
        return dict(zip(self._names, map(float, found.groups()), strict=True)) if found else None


def _literal(text: str) -> str:
    return r"\s+".join(map(re.escape, re.split(r"\s+", text)))


def _places(family: Family, line: str) -> dict[str, tuple[int, int]] | None:
    """Where in a line each number stands, or None where the family does not know it."""
    for pattern in family.lines:
        found = pattern.search(line)
        if found:
            groups = [name for name in pattern.groupindex if name not in ("rest", "done") and found[name] is not None]
            places = {name: found.span(name) for name in groups}
            taken = set(places.values())
            if "rest" in pattern.groupindex:
                for pair in PAIR.finditer(line, *found.span("rest")):
                    if pair.span(2) not in taken:
                        places.setdefault(pair[1], pair.span(2))
            return places
    return None

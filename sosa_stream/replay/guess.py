"""Which of a log's columns mean what. Pure: names, counts and values in, a guess out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sosa_stream.errors import UsageError
from sosa_stream.protocol.columns import ALIASES, COLUMNS, EVAL_LOSS, LOG_PREFIX, plain
from sosa_stream.replay.log import Log
from sosa_stream.visible import visible

STEP = "step"
STEP_NAMES = (
    *("step", "global_step", "current_steps", "_step", "iter", "iteration", "iterations", "it", "num_updates"),
    *("n_updates", "train_step", "trainer_global_step", "train_global_step", "training_global_step"),
    *("total_timesteps", "time_total_timesteps", "timesteps", "update", "steps", "batch", "episode", "epoch", "epochs"),
)
"""Names of what counts steps, as `plain` gives them, in order of preference."""

EVAL = re.compile(r"(?:^|_)(?:val|valid|validation|eval|evaluation|test|dev|heldout)(?:_|$)")
"""What of validation is called by, as `plain` gives it."""
_NO_LOSS = re.compile(r"(?:^|_)(?:loss_scale|lossscale|loss_weight|loss_lr)")
POSTERIOR = frozenset({"kl_per_dim", "active_units", "latent_dims"})
"""Columns of ours that a VAE's script may log by the same names."""
SCALARS = {"wall_time", "step", "value"}
"""The columns of TensorBoard's CSV export, which names the tag only in the name of the file."""
_FEW = 0.05
"""A column still counts steps if this share of its cells says something else."""
_LOSS = re.compile(r"loss|(?:^|_)(?:cost|nll|objective|mse|elbo)(?:_|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """``columns``: our name to the log's names of it, whose values are added up where there are several."""

    columns: Mapping[str, tuple[str, ...]]
    counter: str | None
    """The column that counts steps; None: rows are counted."""
    epoch: str | None
    doubts: tuple[str, ...] = ()

    @property
    def has_loss(self) -> bool:
        """Whether there is a loss, of training or of validation, to detect on."""
        return "loss" in self.columns or EVAL_LOSS in self.columns

    @property
    def has_metrics(self) -> bool:
        """Whether there is a metric that the user's own rules are on."""
        return any(ours.startswith(LOG_PREFIX) for ours in self.columns)

    def extended(self, later: Guess) -> Guess:
        """With what only came up later in the log; what was guessed before stays."""
        taken = {name for names in self.columns.values() for name in names}
        fresh = {
            ours: names
            for ours, names in later.columns.items()
            if ours not in self.columns and not taken.intersection(names)
        }
        return replace(self, columns={**self.columns, **fresh}) if fresh else self


def parse_map(text: str) -> dict[str, str]:
    """``loss=train/loss,step=global_step`` as a mapping.

    Raises:
        UsageError: it is not of that form, or names what we do not know.
    """
    mapping: dict[str, str] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        ours, equals, theirs = (side.strip() for side in pair.partition("="))
        if not (ours and equals and theirs):
            raise UsageError(f"--map wants OURS=THEIRS, such as loss=train/loss, not {pair!r}")
        if ours not in (STEP, EVAL_LOSS, *COLUMNS):
            raise UsageError(f"--map knows {', '.join((STEP, *ALIASES))}, not {ours!r}")
        if ours in mapping:
            raise UsageError(f"--map names {ours} twice: {mapping[ours]!r} and {theirs!r}")
        mapping[ours] = theirs
    return mapping


def guess_columns(log: Log, *, mapping: Mapping[str, str] | None = None, wanted: frozenset[str] = frozenset()) -> Guess:
    """What the columns of a log mean.

    ``mapping`` is the user's word: what it names is not guessed, though it may not be there yet. ``wanted`` names
    metrics to carry besides, as ``log/<name>``.
    """
    mapping = mapping or {}
    columns: dict[str, tuple[str, ...]] = {
        ours: (theirs,) for ours, theirs in mapping.items() if ours != STEP and theirs in log.columns
    }
    counts = {name: count for name, count in log.counts().items() if bounded(name) not in log.columns}
    doubts = []
    for ours, find in _FINDERS.items():
        if ours in mapping:
            continue
        names, sure = find(counts)
        if names:
            columns[ours] = names
        if names and not sure:
            doubts.append(f"{ours} is a guess; --map {ours}=NAME to say otherwise, {known_columns(counts)}")
    for ours in POSTERIOR - mapping.keys():
        if names := tuple(name for name in counts if plain(name) in (ours, f"train_{ours}")):
            columns[ours] = names[:1]
    for name in counts:
        if name in wanted or plain(name) in wanted:
            columns[LOG_PREFIX + (name if name in wanted else plain(name))] = (name,)
    epoch = next((name for name in counts if plain(name) in ("epoch", "epochs")), None)
    counter = mapping[STEP] if STEP in mapping else _counter(log, columns)
    return Guess(columns=columns, counter=counter, epoch=epoch if epoch != counter else None, doubts=tuple(doubts))


def bounded(name: str) -> str | None:
    """``X`` for ``X__MIN`` and ``X__MAX``, as Weights & Biases' export calls the range behind a point."""
    return name[: -len("__MIN")] if name.endswith(("__MIN", "__MAX")) else None


def known_columns(columns: Iterable[str]) -> str:
    """The columns of a log in words."""
    names = list(map(visible, columns))
    return f"columns are {', '.join(names[:40])}{', …' if len(names) > 40 else ''}" if names else "it has no numbers"


def _named(counts: Mapping[str, int], ours: str) -> tuple[str, ...]:
    """The column whose name people use for this: of several the one with most values, then the most usual name."""
    names = [name for alias in ALIASES[ours] for name in counts if plain(name) == alias]
    return (max(names, key=counts.__getitem__),) if names else ()


def _loss(counts: Mapping[str, int]) -> tuple[tuple[str, ...], bool]:
    if named := _named(counts, "loss"):
        return named, True
    if {plain(name) for name in counts} == SCALARS:
        return tuple(name for name in counts if plain(name) == "value"), False
    losses = [name for name in counts if is_loss(name) and not EVAL.search(plain(name))]
    return _parts([name for name in losses if plain(name).startswith("train")] or losses, counts)


def _eval_loss(counts: Mapping[str, int]) -> tuple[tuple[str, ...], bool]:
    if named := _named(counts, EVAL_LOSS):
        return named, True
    losses = [name for name in counts if is_loss(name) and EVAL.search(plain(name))]
    return _parts([name for name in losses if not re.search("test|train", plain(name))] or losses, counts)


def _lr(counts: Mapping[str, int]) -> tuple[tuple[str, ...], bool]:
    if named := _named(counts, "lr"):
        return named, True
    # Lightning's lr-Adam, ultralytics' lr/pg0 and x/lr0: the first parameter group's
    groups = [name for name in counts if re.match(r"(?:x_)?lr[_\d(]|.*learning_rate", plain(name))]
    return tuple(groups[:1]), True


def _grad_norm(counts: Mapping[str, int]) -> tuple[tuple[str, ...], bool]:
    if named := _named(counts, "grad_norm"):
        return named, True
    norms = [name for name in counts if re.search(r"grad.*norm", plain(name))]
    return (tuple(norms) if len(norms) == 1 else ()), True  # many are those of the layers


def _loss_scale(counts: Mapping[str, int]) -> tuple[tuple[str, ...], bool]:
    return _named(counts, "loss_scale"), True


_FINDERS = {
    "loss": _loss,
    EVAL_LOSS: _eval_loss,
    "lr": _lr,
    "grad_norm": _grad_norm,
    "loss_scale": _loss_scale,
}


def is_loss(name: str) -> bool:
    """Whether a name is one of a loss, of training or of validation."""
    return bool(_LOSS.search(plain(name))) and not _NO_LOSS.search(plain(name))


def _parts(names: Sequence[str], counts: Mapping[str, int]) -> tuple[tuple[str, ...], bool]:
    """One loss without a usual name, or the parts of a sum that ``train/box_loss``, ``train/cls_loss`` are."""
    parts = [name for name in names if "/" in name and counts[name] == counts[names[0]]]
    same_group = {name.rpartition("/")[0] for name in parts}
    if len(parts) > 1 and len(same_group) == 1:
        return tuple(parts), True
    return tuple(names[:1]), len(names) <= 1


def _counter(log: Log, columns: Mapping[str, tuple[str, ...]]) -> str | None:
    """The first of `STEP_NAMES` that moves with the losses, or with the metrics where there are none of them.

    It has whole numbers, in most rows another than in the row before.
    """
    metrics = (names for ours, names in columns.items() if ours.startswith(LOG_PREFIX))
    names = columns.get("loss") or columns.get(EVAL_LOSS) or next(metrics, None)
    if names is None:
        return None
    rows = log.columns[names[0]].present
    for alias in STEP_NAMES:
        for name in (name for name in log.columns if plain(name) == alias):
            column = log.columns[name]
            here = column.values[rows & column.present]
            whole = here[np.isfinite(here) & (here == np.floor(here))]
            if len(whole) < (1 - _FEW) * len(here) or 2 * len(whole) < rows.sum():
                continue
            if len(here) < 2 or 2 * np.count_nonzero(np.diff(here)) >= len(here) - 1:
                return name
    return None

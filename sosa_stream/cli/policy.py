"""``sosa policy``: what a project's runs have learned of fixes; to see, to carry elsewhere, and to forget."""

from __future__ import annotations

import argparse
import json
import math
import os
import sqlite3
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sosa_stream.cli.home import add_home, given_path, home_of, table, who
from sosa_stream.config import CONFIG_VARIABLE, load_settings
from sosa_stream.daemon.outcomes import INSERT, SELECT
from sosa_stream.daemon.schema import json_line, opened_store
from sosa_stream.decide.choice import is_trusted
from sosa_stream.decide.experience import NONE, Experience, Outcome
from sosa_stream.decide.playbook import LADDERS
from sosa_stream.decide.policy import GATE
from sosa_stream.errors import SosaError, UsageError
from sosa_stream.settings import Settings

FILE_VERSION = 1
IMPORT_WEIGHT, MOST_IMPORT_WEIGHT = 0.3, 0.5
"""What another project's outcome is worth, and the most that it may be: other models, other data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Belief:
    """A row of ``sosa policy show``. `none` helped where a fault healed by itself; its mean: in a first fix's time."""

    kind: str
    fix: str
    prior: float
    trials: int
    helped: int
    mean: float
    lower: float | None
    applied: str
    """``by itself`` where the mode and ``[auto] allow`` permit it, else ``proposed``."""


def add_parser(subparsers: Any) -> None:
    """Add ``policy`` with its own commands."""
    parser = subparsers.add_parser("policy", help="what was learned of fixes: show, export, import, reset")
    commands = parser.add_subparsers(metavar="show|export|import|reset", required=True)

    show_parser = _add(commands, "show", "how far each fix is trusted, and why", show)
    show_parser.add_argument("--json", action="store_true", help="one JSON object a line")

    export_parser = _add(commands, "export", "write the project's outcomes to a file", export)
    export_parser.add_argument("file", metavar="FILE", type=given_path)

    import_parser = _add(commands, "import", "count what another project has learned, discounted", import_file)
    import_parser.add_argument("file", metavar="FILE", type=given_path)
    import_parser.add_argument(
        "--weight",
        metavar="SHARE",
        type=float,
        default=IMPORT_WEIGHT,
        help=f"what one of its outcomes is worth (default {IMPORT_WEIGHT}, at most {MOST_IMPORT_WEIGHT})",
    )

    reset_parser = _add(commands, "reset", "forget what was learned", reset)
    reset_parser.add_argument("--kind", metavar="KIND", choices=sorted(LADDERS), help="only of this kind of incident")
    reset_parser.add_argument("--yes", action="store_true", help="without asking")


def _add(subparsers: Any, name: str, help_text: str, act: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(name, help=help_text)
    parser.add_argument("--project", metavar="NAME", help="default: SOSA_PROJECT, or default")
    add_home(parser)
    parser.set_defaults(func=act)
    return parser


def show(arguments: argparse.Namespace) -> int:
    settings = _settings()
    project = _project(arguments)
    with opened_store(home_of(arguments)) as store:
        outcomes = [Outcome.from_row(row) for row in store.execute(SELECT, (project, math.inf))]
    beliefs = beliefs_of(Experience(outcomes, discount=settings.auto.discount))
    if arguments.json:
        for belief in beliefs:
            print(json_line(asdict(belief)))
        return 0
    print(f"project {project}: {len(outcomes)} outcomes counted")
    rows = [
        (
            *(belief.kind, belief.fix, f"{belief.prior:.2f}", belief.trials, belief.helped, f"{belief.mean:.2f}"),
            *(None if belief.lower is None else f"{belief.lower:.2f}", belief.applied),
        )
        for belief in beliefs
    ]
    print(table(("KIND", "FIX", "PRIOR", "TRIALS", "HELPED", "MEAN", "LOWER 10%", "APPLIED"), rows))
    return 0


def beliefs_of(known: Experience) -> list[Belief]:
    """Every fix of the playbook under its kind, in the ladder's order, after `none`."""
    beliefs = []
    for kind, fixes in LADDERS.items():
        steps = fixes[0].patience_steps
        trials, healed = known.untreated(kind)
        beliefs.append(
            Belief(
                kind=kind,
                fix=NONE,
                prior=Experience().recovery(kind, steps),
                trials=trials,
                helped=healed,
                mean=known.recovery(kind, steps),
                lower=None,
                applied="-",
            )
        )
        for fix in fixes:
            posterior = known.posterior(kind, fix.name)
            better = posterior.mean > known.recovery(kind, fix.patience_steps)
            goes_ahead = better and is_trusted(fix, posterior) and posterior.confidence >= GATE
            beliefs.append(
                Belief(
                    kind=kind,
                    fix=fix.name,
                    prior=fix.confidence,
                    trials=posterior.num_trials,
                    helped=posterior.num_helped,
                    mean=posterior.mean,
                    lower=posterior.lower,
                    applied="by itself" if goes_ahead else "proposed",
                )
            )
    return beliefs


def export(arguments: argparse.Namespace) -> int:
    project = _project(arguments)
    query = (
        "SELECT id, run, at, kind, fix, verdict, weight, lasted_steps FROM outcomes "
        "WHERE project = ? AND reset_at IS NULL AND imported_from = '' ORDER BY at, id"
    )
    with opened_store(home_of(arguments)) as store:
        found = store.execute(query, (project,))
        names = [column[0] for column in found.description]
        rows = [dict(zip(names, row, strict=True)) for row in found]
    document = {"schema_version": FILE_VERSION, "project": project, "outcomes": rows}
    try:
        arguments.file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise SosaError(f"cannot write {arguments.file}: {error.strerror}") from None
    print(f"{len(rows)} outcomes of project {project} are in {arguments.file}")
    return 0


def import_file(arguments: argparse.Namespace) -> int:
    weight, project = arguments.weight, _project(arguments)
    if not 0.0 < weight <= MOST_IMPORT_WEIGHT:
        raise UsageError(f"--weight must lie between 0 and {MOST_IMPORT_WEIGHT}, not {weight:g}")
    source, rows = _read(arguments.file, weight)
    with opened_store(home_of(arguments), read_only=False) as store:
        known = set(store.execute("SELECT id, at FROM outcomes WHERE project = ?", (project,)))
        new = [row for row in rows if known.isdisjoint({(row["id"], row["at"]), (_imported_id(row["id"]), row["at"])})]
        values = [
            (
                *(_imported_id(row["id"]), project, row["run"], row["at"], 0),
                *(*row["outcome"].as_row(), source),
            )
            for row in new
        ]
        _change(store, f"policy import --weight {weight:g}", project, f"{len(new)} outcomes", INSERT, values)
    print(f"{len(new)} outcomes of project {source} count {weight:g} each from the next run of {project} on")
    if len(new) < len(rows):
        print(f"{len(rows) - len(new)} were known already")
    return 0


def reset(arguments: argparse.Namespace) -> int:
    project = _project(arguments)
    where = "project = ? AND reset_at IS NULL AND (? IS NULL OR kind = ?)"
    key = (project, arguments.kind, arguments.kind)
    with opened_store(home_of(arguments), read_only=False) as store:
        (number,) = store.execute(f"SELECT count(*) FROM outcomes WHERE {where}", key).fetchone()
        what = f"{number} outcomes of project {project}" + (f" for {arguments.kind}" if arguments.kind else "")
        if number and not arguments.yes and not _agreed(f"forget {what}?"):
            print("nothing was forgotten")
            return 0
        update = f"UPDATE outcomes SET reset_at = ? WHERE {where}"
        _change(store, "policy reset", project, what, update, [(time.time(), *key)])
    print(f"{what} are forgotten from the next run on; runs that have begun keep what they were told")
    return 0


def _change(
    store: sqlite3.Connection, what: str, project: str, answer: str, statement: str, values: list[tuple[Any, ...]]
) -> None:
    """Carry a statement out and note who asked for it, both or neither."""
    store.execute("BEGIN IMMEDIATE")
    try:
        store.executemany(statement, values)
        store.execute(
            "INSERT INTO audit (at, who, run, what, answered_at, done, answer) VALUES (?1, ?2, '', ?3, ?1, 1, ?4)",
            (time.time(), who(), f"{what} (project {project})", answer),
        )
        store.execute("COMMIT")
    except BaseException:
        store.execute("ROLLBACK")
        raise


def _read(path: Path, weight: float) -> tuple[str, list[dict[str, Any]]]:
    """The project that a file is of, and its outcomes, each worth ``weight`` of what it was."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is no JSON; `sosa policy export FILE` writes what can be imported") from None
    if not isinstance(document, dict) or document.get("schema_version") != FILE_VERSION:
        raise UsageError(f"{path} is no export of `sosa policy` of version {FILE_VERSION}")
    try:
        rows = [_row(row, weight) for row in document["outcomes"]]
        source = str(document["project"])[:100]
        source.encode()
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"{path} is damaged: {error}") from None
    return source or "unnamed", rows


def _row(row: dict[str, Any], weight: float) -> dict[str, Any]:
    if any(type(row[name]) not in (int, float) for name in ("at", "weight")):
        raise ValueError("an outcome's at and weight must be numbers")
    if not isinstance(row["id"], str) or not isinstance(row["run"], str):
        raise ValueError("an outcome's id and run must be strings")
    values = [row["kind"], row["fix"], row["verdict"], row["weight"] * weight, row["lasted_steps"]]
    outcome, at = Outcome.from_row(values), float(row["at"])
    if not math.isfinite(at):
        raise ValueError("an outcome's at must be finite")
    "".join((row["id"], row["run"], outcome.kind, outcome.fix)).encode()  # JSON can say half a character
    return {"id": row["id"], "run": row["run"], "at": at, "outcome": outcome}


def _imported_id(key: str) -> str:
    return f"imported {key}"


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise UsageError("reset asks first, and nobody is there to answer: say --yes")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def _settings() -> Settings:
    config = os.environ.get(CONFIG_VARIABLE)
    return load_settings(path=Path(config) if config else None, env=os.environ)


def _project(arguments: argparse.Namespace) -> str:
    project: str | None = arguments.project
    return _settings().project if project is None else project

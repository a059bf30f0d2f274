"""``sosa doctor -- train.py args…``: the preflight of a training script."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from sosa_stream import extras
from sosa_stream.cli.home import given_path
from sosa_stream.doctor.findings import SCHEMA_VERSION, Answer, Status, answer_of, lines, unknown, worst
from sosa_stream.doctor.names import NAMES
from sosa_stream.errors import UsageError
from sosa_stream.visible import shown

NAME = "doctor.json"
SPARE_SECONDS = 20.0
"""Beyond its limit, after which a check that cannot be interrupted is ended with its process."""
START_SECONDS = 900.0
"""For the script to come to its last step that is looked at."""
POLL_SECONDS = 0.1


def add_parser(subparsers: Any) -> None:
    """Add ``doctor`` to the commands."""
    parser = subparsers.add_parser(
        "doctor",
        help="a few steps of a training script, and a list of questions answered from them",
        usage="sosa doctor [options] -- SCRIPT [ARG]...   (or: -- -m MODULE [ARG]...)",
        description="Runs a few steps of SCRIPT, unchanged, then leaves it, and tries on copies what can be tried. "
        "What the script itself does in these steps (files, logs) it does. Under torchrun: torchrun --nproc-per-node 2 "
        "-m sosa_stream.cli doctor -- SCRIPT. Ends with 3 where a check found what --fail-on names, 1 where the script "
        "failed before a check could be made.",
    )
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="to look at (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="CHECKS", help=f"comma-separated, of {', '.join(NAMES)}")
    parser.add_argument(
        "--seconds", type=float, default=10.0, metavar="S", help="for each check, at most (default: %(default)g)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument(
        "--out", type=given_path, metavar="DIR", help=f"folder for {NAME} and the picture of the learning rate test"
    )
    parser.add_argument(
        "--fail-on",
        choices=[Status.WARNING, Status.PROBLEM, "never"],
        default=Status.PROBLEM,
        help="end with 3 at this or worse (default: %(default)s)",
    )
    parser.add_argument("script", nargs=argparse.REMAINDER, metavar="SCRIPT", help="and its own arguments, after --")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """The command's exit code."""
    script = _script(arguments.script)
    only = tuple(filter(None, map(str.strip, arguments.only.split(","))))
    if wrong := [name for name in only if name not in NAMES]:
        raise UsageError(f"--only {wrong[0]}: there is no such check; there are {', '.join(NAMES)}")
    if not 1 <= arguments.steps <= 1000:
        raise UsageError(f"--steps must be a whole number from 1 to 1000, not {arguments.steps}")
    if not 0.5 <= arguments.seconds <= 3600.0:
        raise UsageError(f"--seconds must lie between 0.5 and 3600, not {arguments.seconds:g}")
    with extras.needed("agent", "the doctor"):
        import torch  # noqa: F401  # its process needs it: told here in a line
    out: Path | None = arguments.out
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {out} cannot be made: {error.strerror}") from None
    with tempfile.TemporaryDirectory(prefix="sosa-doctor-") as folder:
        result = Path(folder) / "answers"
        order = {
            "result": str(result),
            "num_steps": arguments.steps,
            "seconds": arguments.seconds,
            "only": only,
            "out": str(out.absolute()) if out else "",
            "script": script,
        }
        code = _examine(order, result, arguments.seconds)
        events = _read(result)
    if code == 2 and not events:
        return 2
    return _tell(events, code, script, arguments)


def _script(words: list[str]) -> list[str]:
    """What runs, without what starts it by habit."""
    words = words[1:] if words[:1] == ["--"] else list(words)
    if words and Path(words[0]).name.startswith("python") and not words[0].endswith(".py"):
        words = words[1:]
    if words and Path(words[0]).name == "torchrun":
        raise UsageError("put torchrun first: torchrun --nproc-per-node 2 -m sosa_stream.cli doctor -- train.py")
    if not words:
        raise UsageError("no script given; sosa doctor -- train.py --its --args")
    return words


def _examine(order: dict[str, Any], result: Path, seconds: float) -> int:
    """Run the process that is looked at; its exit code, negative for a signal."""
    # A preflight is no run that anybody wants to see there; and what is compiled cannot be looked into.
    environment = {"WANDB_MODE": "disabled", **os.environ, "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-m", "sosa_stream.doctor", json.dumps(order)]
    with _ended_with_us(), subprocess.Popen(command, env=environment, stdout=sys.stderr.fileno()) as process:
        try:
            limit, began = seconds + SPARE_SECONDS, time.monotonic()
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                events = _read(result)
                last = events[-1]["event"] if events else ""
                if not events and time.monotonic() - began > START_SECONDS:
                    process.terminate()
                if last in ("began", "done") and time.time() - result.stat().st_mtime > limit:
                    process.kill()
        except BaseException:
            process.terminate()
            raise
        return process.wait()


@contextmanager
def _ended_with_us() -> Iterator[None]:
    """SIGTERM, as torchrun sends it, ends the process that was started too."""

    def end(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _read(result: Path) -> list[dict[str, Any]]:
    """Complete lines; the last may be under way."""
    if not result.exists():
        return []
    return [
        json.loads(line) for line in result.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"
    ]


def _tell(events: list[dict[str, Any]], code: int, script: list[str], arguments: argparse.Namespace) -> int:
    answers = [answer_of(event) for event in events if event["event"] == "answer"]
    answers += _lost(events, answers, code)
    seen = next((event for event in events if event["event"] == "seen"), {})
    ended = next((event for event in events if event["event"] == "script"), {})
    num_ranks, num_steps = int(seen.get("ranks", 1)), int(seen.get("steps", 0))
    failed = bool(ended.get("failed")) or (not seen and code != 0)
    order = {name: i for i, name in enumerate(NAMES)}
    answers.sort(key=lambda answer: (order[answer.check], answer.rank))
    status = worst(answer.finding.status for answer in answers)
    report = {
        "schema_version": SCHEMA_VERSION,
        "script": script,
        "status": str(status),
        "num_steps": num_steps,
        "num_ranks": num_ranks,
        "script_failed": failed,
        "message": ended.get("message", ""),
        "checks": [answer.as_dict() for answer in answers],
    }
    mine = int(os.environ.get("RANK", "0"))
    if mine == 0 or failed:
        _print(report, answers, ended, arguments, code)
    if not seen.get("is_anything"):
        return 1 if failed or not num_steps else 0
    if status is Status.PROBLEM and arguments.fail_on != "never":
        return 3
    if status is Status.WARNING and arguments.fail_on == Status.WARNING:
        return 3
    return 1 if failed else 0


def _print(
    report: dict[str, Any],
    answers: list[Answer],
    ended: dict[str, Any],
    arguments: argparse.Namespace,
    code: int,
) -> None:
    if arguments.out is not None:
        (arguments.out / NAME).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if arguments.json:
        print(json.dumps(report))
        return
    name = " ".join(report["script"][:2]) if report["script"][0] == "-m" else report["script"][0]
    ranks = f" on each of {report['num_ranks']} ranks" if report["num_ranks"] > 1 else ""
    ending = f"; then the script {ended['ending']}" if ended else ""
    if not answers and code < 0:
        ending = f"; the process was ended by {signal.Signals(-code).name}"
    steps = "1 step" if report["num_steps"] == 1 else f"{report['num_steps']} steps"
    print(f"sosa doctor: {name}, {steps}{ranks}{ending}\n")
    if report["num_steps"] == 0 and not ended.get("failed") and ended:
        print("No step of an optimizer was seen in this process. If the script starts others: use torchrun.\n")
    print("\n".join(lines(answers, report["num_ranks"])))
    counts = [(sum(a.finding.status is status for a in answers), status) for status in Status]
    words = {Status.OK: "ok", Status.WARNING: "to look at", Status.PROBLEM: "to mend", Status.UNKNOWN: "unknown"}
    print("\n" + ", ".join(f"{num} {words[status]}" for num, status in reversed(counts) if num))
    if arguments.out is not None:
        print(f"All evidence: {shown(arguments.out / NAME)}")


def _lost(events: list[dict[str, Any]], answers: list[Answer], code: int) -> list[Answer]:
    """The check during which the process went."""
    began = [event for event in events if event["event"] == "began"]
    if not began or any(answer.check == began[-1]["check"] for answer in answers):
        return []
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    finding = unknown(f"the process ended with {how} during this check, and those after it were not made")
    return [Answer(check=began[-1]["check"], question=began[-1]["question"], finding=finding)]

"""``sosa diagnose -- train.py``: runs a script under the agent and leaves a folder that tells what happened."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sosa_stream.cli.home import given_path
from sosa_stream.config import CONFIG_VARIABLE, load_settings
from sosa_stream.errors import MissingExtraError, UsageError
from sosa_stream.visible import shown

DEFAULT_OUT = Path("sosa-diagnosis")
EXAMPLE = "sosa diagnose -- train.py --its --args"


def add_parser(subparsers: Any) -> None:
    """Add ``diagnose``."""
    parser = subparsers.add_parser(
        "diagnose",
        help="run a script, stop it when it breaks, and leave a folder that tells why",
        description="Runs a training script under the agent, with lines on epochs and batches, stops it on all "
        "ranks at an incident, and leaves tables, pictures, the best weights and report.html. Under torchrun: torchrun "
        "--nproc-per-node 2 -m sosa_stream.cli diagnose -- train.py. Nothing of it changes what the script computes. "
        "Exit code: the script's own; 3 where there was an incident to stop at.",
        usage="sosa diagnose [-h] [--epochs N] [--stop-on SEVERITY] [--out DIR] [--every K] "
        "-- (SCRIPT | -m MODULE) [ARG]...",
    )
    parser.add_argument("--epochs", type=int, metavar="N", help="stop after so many passes over the DataLoader")
    parser.add_argument(
        "--stop-on",
        choices=("critical", "warning"),
        default="critical",
        help="the least severity of an incident that stops the training (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=given_path,
        default=DEFAULT_OUT,
        metavar="DIR",
        help="the folder; files of ours in it are replaced (default: %(default)s)",
    )
    parser.add_argument(
        "--every",
        type=int,
        default=1,
        metavar="K",
        help="steps between two looks at every parameter and input; after 512 looks fewer (default: %(default)s)",
    )
    parser.add_argument("script", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """The exit code; see the parser."""
    env = os.environ
    for name in ("epochs", "every"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be a whole number of at least 1, not {value}")
    words = arguments.script[1:] if arguments.script[:1] == ["--"] else arguments.script
    _check(words, env)
    out = Path(os.path.abspath(arguments.out))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {shown(out)}: {error.strerror}; name another folder with --out") from None
    from sosa_stream.agent.environment import run_name
    from sosa_stream.agent.runner import parse
    from sosa_stream.detect.incidents import Severity
    from sosa_stream.diagnose.supervisor import Diagnosis, diagnose

    target = parse(words)
    assert target is not None
    config = env.get(CONFIG_VARIABLE)
    settings = load_settings(path=Path(config) if config else None, env=env)
    diagnosis = Diagnosis(
        script=tuple(words),
        out=out,
        run=run_name(settings, env, target.name),
        num_epochs=arguments.epochs or 0,
        stop_on=Severity[arguments.stop_on.upper()],
        every=arguments.every,
        rank=int(env.get("RANK", "0")),
    )
    return diagnose(diagnosis, env)


def _check(words: list[str], env: Mapping[str, str]) -> None:
    """What can be told before anything is started.

    Raises:
        UsageError: there is no script, or nothing would be seen of it.
    """
    from sosa_stream.agent.environment import is_disabled
    from sosa_stream.agent.runner import parse

    if not words or words[0] in ("-h", "--help"):
        raise UsageError(f"no script given: {EXAMPLE}")
    target = parse(words)
    assert target is not None
    if not target.is_module and not os.path.isfile(target.name):
        raise UsageError(f"there is no script {target.name!r}; behind -- comes what you give to Python: {EXAMPLE}")
    if is_disabled(env):
        raise UsageError("SOSA_DISABLE is set, and nothing would be watched: unset it")
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError("watching a training", "torch", "agent")

"""``sosa latent CHECKPOINT --model MODULE:NAME --data MODULE:NAME``: the latent code of a VAE's checkpoint."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sosa_stream import extras
from sosa_stream.cli.home import given_path
from sosa_stream.errors import SosaError, UsageError, describe
from sosa_stream.visible import shown, visible

if TYPE_CHECKING:
    from torch import nn

DEFAULT_OUT = Path("sosa-latent")
COLLAPSED_EXIT_CODE = 3
REPORT = "latent_report.json"


def add_parser(subparsers: Any) -> None:
    """Add ``latent``."""
    parser = subparsers.add_parser(
        "latent",
        help="what a VAE's checkpoint says of its latent code",
        description="Loads the checkpoint, whatever its keys are, into your model; encodes your data; says whether the "
        f"posterior has collapsed (then it ends with {COLLAPSED_EXIT_CODE}), and leaves pictures. Nothing is unpickled "
        "that could run code.",
    )
    parser.add_argument("checkpoint", type=given_path, metavar="CHECKPOINT", help="a file or folder")
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODULE:NAME",
        help="a model, or what makes one when called: with the configuration of the checkpoint if it takes an argument",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="MODULE:NAME",
        help="batches (a DataLoader, a list of tensors, …), or what gives them when called",
    )
    parser.add_argument(
        "--samples", type=_positive, default=2000, help="how many samples to encode (default: %(default)s)"
    )
    parser.add_argument("--out", type=given_path, default=DEFAULT_OUT, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(func=run)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of samples")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    with extras.needed("agent,report", "sosa latent"):
        from sosa_stream.agent.repair.loading import load_checkpoint, read_checkpoint
        from sosa_stream.report.latent import encode
        from sosa_stream.report.latent_pictures import draw_latent
    model = _model(arguments.model, read_checkpoint(arguments.checkpoint).config)
    loaded = load_checkpoint(arguments.checkpoint, model)
    if not arguments.json:
        print(visible_lines(str(loaded)), file=sys.stderr)
    batches = _called(arguments.data, _named(arguments.data), "--data")
    if not isinstance(batches, Iterable):
        raise UsageError(f"--data {arguments.data} gives a {type(batches).__name__}, not batches")
    latent = _guarded("--data or --model", encode, model, batches, arguments.samples)
    out: Path = arguments.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        made = draw_latent(out, latent, arguments.checkpoint.name)
        report = {
            **latent.as_dict(),
            "checkpoint": str(arguments.checkpoint),
            "layout": loaded.layout,
            "step": loaded.step,
            "missing": list(loaded.missing),
            "unexpected": list(loaded.unexpected),
            "mismatched": list(loaded.mismatched),
            "pictures": [path.name for path in made],
        }
        (out / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}") from None
    if arguments.json:
        print(json.dumps(report))
    else:
        print(visible(f"{arguments.checkpoint.name}: {latent.verdict()}"))
        if latent.errors is None:
            print("no reconstruction errors: the model has no decode(z) that gives something of the input's size")
        print(f"Pictures and {REPORT}: {visible(str(shown(out)))}")
    return COLLAPSED_EXIT_CODE if latent.is_collapsed else 0


def visible_lines(text: str) -> str:
    """The text for a terminal, its own lines kept."""
    return "\n".join(map(visible, text.splitlines()))


def _model(name: str, config: Mapping[str, Any] | None) -> nn.Module:
    """The model that ``name`` is or makes.

    Raises:
        UsageError: it is none, cannot be made, or wants a configuration that the checkpoint has not.
    """
    from torch import nn

    found = _named(name)
    model = found if isinstance(found, nn.Module) else _called(name, found, "--model", config)
    if not isinstance(model, nn.Module):
        raise UsageError(f"--model {name} gives a {type(model).__name__}, not a torch.nn.Module")
    return model.cpu()


def _named(name: str) -> Any:
    """What ``module:name`` is; modules of the working directory are found.

    Raises:
        UsageError: there is no such thing, or its module fails.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise UsageError(f"{name!r} names nothing: write MODULE:NAME, train:make_model for make_model in train.py")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    loaded = _guarded(f"module {module}", importlib.import_module, module)
    found = loaded
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UsageError(f"module {module} has no {attribute}")
        found = getattr(found, part)
    return found


def _called(name: str, found: Any, flag: str, config: Mapping[str, Any] | None = None) -> Any:
    """What a factory makes, with the checkpoint's configuration if it needs an argument; anything else is itself."""
    if not callable(found) or isinstance(found, Iterable):
        return found
    try:
        needed = [
            parameter
            for parameter in inspect.signature(found).parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):  # a builtin that does not tell
        needed = []
    if not needed:
        return _guarded(f"{flag} {name}", found)
    if flag == "--data" or config is None:
        without = "" if flag == "--data" else ", and the checkpoint holds no configuration"
        raise UsageError(f"{flag} {name} needs {', '.join(map(str, needed))}{without}; name what needs no argument")
    if len(needed) > 1 and all(parameter.name in config for parameter in needed):
        return _guarded(f"{flag} {name}", found, **{parameter.name: config[parameter.name] for parameter in needed})
    return _guarded(f"{flag} {name}", found, config)


def _guarded(what: str, call: Any, *arguments: Any, **named: Any) -> Any:
    """What the user's own code gives; its failure is told in a line.

    Raises:
        UsageError: it failed.
    """
    try:
        return call(*arguments, **named)
    except SosaError:
        raise
    except Exception as error:
        raise UsageError(f"{what} failed: {describe(error)}") from None

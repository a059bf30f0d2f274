"""Every command of ``sosa`` with its flags, from the parser itself."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from sosa_stream.cli import parser

HEAD = """\
# Commands

Written by `python docs/generate`, from the parser. Exit codes: 0 fine, 1 failure at run time, 2 usage or
configuration, 3 incidents at or above `--fail-on`. Machine output is on stdout, everything else on stderr.
"""


def page() -> str:
    """In Markdown."""
    return "\n".join([HEAD, *_commands(parser(), "sosa")]) + "\n"


def _commands(of: argparse.ArgumentParser, name: str) -> Iterator[str]:
    for action in of._actions:
        if not isinstance(action, argparse._SubParsersAction):
            continue
        helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for command, sub in action.choices.items():
            yield from _section(sub, f"{name} {command}", helps.get(command, ""))
            yield from _commands(sub, f"{name} {command}")


def _section(of: argparse.ArgumentParser, name: str, about: str) -> Iterator[str]:
    text = of.description or about
    yield from (f"{'#' * min(name.count(' ') + 1, 4)} {name}", "", _cell(text[:1].upper() + text[1:]), "")
    words = [(_flag(action), action) for action in of._actions]
    shown = [
        (flag, action)
        for flag, action in words
        if action.help != argparse.SUPPRESS
        and not isinstance(action, argparse._SubParsersAction | argparse._HelpAction)
    ]
    if shown:
        yield from ("| | |", "|---|---|")
        for flag, action in shown:
            yield f"| {flag} | {_cell(_help(of, action))} |"
        yield ""


def _flag(action: argparse.Action) -> str:
    metavar = action.metavar or ("" if action.nargs == 0 else (action.dest or "").upper())
    if isinstance(metavar, tuple):
        metavar = " ".join(metavar)
    if action.choices is not None and action.metavar is None:
        metavar = "{" + ",".join(map(str, action.choices)) + "}"
    if not action.option_strings:
        return f"`{metavar}`"
    value = "" if action.nargs == 0 else f" {metavar}"
    return ", ".join(f"`{option}{value}`" for option in action.option_strings).replace("|", "\\|")


def _help(of: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = action.help or ""
    return text % {**vars(action), "prog": of.prog} if "%" in text else text


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")

"""The catalogue of kinds, from the detectors and the playbook."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from sosa_stream.decide.playbook import LADDERS, Fix
from sosa_stream.detect.detectors import ALL, Detector, On
from sosa_stream.report.advice import ADVICE

HEAD = """\
# Kinds of incidents

Written by `python docs/generate`, from the detectors and from the playbook. A kind without its columns is *blind*, and
shown so. Numbers in causes are the run's own; `…` stands for them. How each was measured:
[how things are detected](../design/detection.md).
"""
SHORTEST = 16
"""What is shorter is a piece of a sentence."""
ALSO = {"nonfinite_gradient": ("nan_loss", "stuck_loss_scale"), "loss_spike": ("lost_progress",)}
"""Kinds whose incidents may come to be treated as another (`playbook.kind_of`)."""
WHEN = {
    On.STEP: "each step that all ranks have told",
    On.LOGGED: "each metric that the script logs",
    On.REPORT: "what agents and the daemon report",
    On.END: "the end of the run",
}


def page() -> str:
    """In Markdown."""
    return "\n".join([HEAD, *_table(), *(line for detector in ALL for line in _section(detector))]) + "\n"


def _table() -> Iterator[str]:
    yield from ("| kind | group | repair that is tried first |", "|---|---|---|")
    for detector in ALL:
        fixes = LADDERS.get(detector.kind) or LADDERS.get(next(iter(ALSO.get(detector.kind, ())), ""), ())
        first = f"`{fixes[0].name}`" if fixes else "advice"
        yield f"| [`{detector.kind}`](#{detector.kind}) | {detector.group} | {first} |"
    yield ""


def _section(detector: Detector) -> Iterator[str]:
    found = _Reading(detector.check)
    yield from (f"## {detector.kind}", "", _meaning(detector.check), "")
    columns = ", ".join(f"`{name}`" for name in detector.requires)
    when = " and ".join(WHEN[on] for on in detector.on)
    yield f"**Looks at** {when}" + (f"; needs {columns}." if columns else ".")
    if found.evidence:
        yield from ("", "**Evidence**: " + ", ".join(f"`{key}`" for key in found.evidence) + ".")
    if found.causes:
        yield from ("", "**Causes** that it names:", "", *(f"- {cause}" for cause in found.causes))
    kinds = (detector.kind, *ALSO.get(detector.kind, ()))
    fixes = tuple(fix for kind in kinds for fix in LADDERS.get(kind, ()))
    yield ""
    if fixes:
        yield from ("**Repairs**, in the order in which they are tried:", "", *map(_fix, fixes))
    else:
        yield "**Repair**: advice only; nothing is applied."
    yield from ("", "**What a person can do**:", "", *(f"- {advice}" for advice in ADVICE[detector.kind]), "")


def _fix(fix: Fix) -> str:
    return f"- `{fix.name}`: expected to help in {fix.confidence:.0%}, judged after {fix.patience_steps} steps at most"


def _meaning(check: Callable[..., Any]) -> str:
    """What the detector's docstring says, with the values of the constants that it names."""
    text = " ".join((inspect.getdoc(check) or "").replace("``", "`").split())
    known = vars(inspect.getmodule(check))
    return re.sub(r"`([A-Z][A-Z_]+)`", lambda name: _value(known.get(name[1]), name[0]), text)


def _value(value: object, otherwise: str) -> str:
    return f"{value:g}" if isinstance(value, int | float) else otherwise


class _Reading:
    """What the functions of a module that a check calls may put into a finding, as its source has it."""

    def __init__(self, check: Callable[..., Any]) -> None:
        self.evidence: dict[str, None] = {}
        self.causes: dict[str, None] = {}
        module = inspect.getmodule(check)
        assert isinstance(module, ModuleType)
        tree = ast.parse(inspect.getsource(module))
        self._functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        self._constants = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        self._seen: set[str] = set()
        self._read(check.__name__)

    def _read(self, name: str) -> None:
        if name in self._seen or name not in self._functions:
            return
        self._seen.add(name)
        function = self._functions[name]
        if name.lstrip("_") in {"causes", "cause"} or name.endswith("_causes"):
            self._take_texts(function)
        for node in ast.walk(function):
            if isinstance(node, ast.keyword) and node.arg == "evidence":
                self._take_keys(node.value)
            elif isinstance(node, ast.keyword) and node.arg == "causes":
                self._take_texts(node.value)
            elif isinstance(node, ast.Assign) and _names(node) & {"evidence", "causes"}:
                (self._take_keys if "evidence" in _names(node) else self._take_texts)(node.value)
            elif isinstance(node, ast.Call):
                if isinstance(node.func, ast.Name):
                    for argument in node.args:  # a helper that makes the finding is handed both
                        if isinstance(argument, ast.Dict):
                            self._take_keys(argument)
                        elif isinstance(argument, ast.Tuple):
                            self._take_texts(argument)
            elif isinstance(node, ast.Name):
                self._read(node.id)

    def _take_keys(self, value: ast.AST) -> None:
        for node in ast.walk(value):
            if isinstance(node, ast.Dict):
                keys = (key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str))
                self.evidence.update(dict.fromkeys(keys))

    def _take_texts(self, value: ast.AST) -> None:
        if isinstance(value, ast.Name) and value.id in self._constants:
            value = self._constants[value.id]
        for node in _outermost(value):
            text = _text(node).strip()
            if len(text) > SHORTEST and text[0].isalnum():
                self.causes[text] = None


def _names(node: ast.Assign) -> set[str]:
    return {target.id for target in node.targets if isinstance(target, ast.Name)}


def _outermost(value: ast.AST) -> Iterator[ast.AST]:
    """The texts in it that are no parts of other texts, and no keys or names."""
    if isinstance(value, ast.JoinedStr | ast.BinOp) or (
        isinstance(value, ast.Constant) and isinstance(value.value, str)
    ):
        yield value
    elif not isinstance(value, ast.Subscript | ast.Compare | ast.Attribute):
        body = value.body[1:] if isinstance(value, ast.FunctionDef) and ast.get_docstring(value) else None
        for child in body if body is not None else ast.iter_child_nodes(value):
            yield from _outermost(child)


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "…"

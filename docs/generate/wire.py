"""Every message of the wire with its fields, from the message classes, and every column, from their table."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any, get_args

from sosa_stream.protocol import columns, messages

HEAD = f"""\
# Wire

Written by `python docs/generate`, from `sosa_stream/protocol`. Version {messages.PROTOCOL_VERSION}, covered by SemVer.
Messages are msgpack maps with `v`, `kind` and the fields below. Agents push theirs to the daemon (ZeroMQ, PUSH to
PULL); the daemon publishes its own (PUB to SUB, the run's name as topic, at the port above). Arrays are little-endian
`bin`. What cannot be read is counted, logged once per sender, and dropped. How messages become incidents:
[the loop](../design/closed-loop.md).
"""


def page() -> str:
    """In Markdown."""
    lines = [HEAD, "## From agents", "", *_messages(messages.AgentMessage)]
    lines += ["## From the daemon", "", *_messages(messages.ControlMessage)]
    return "\n".join([*lines, *_columns()]) + "\n"


def _messages(of: Any) -> Iterator[str]:
    if of is messages.AgentMessage:
        yield from _message(messages.Header, "header (in each)")
    for kind in get_args(of):
        yield from _message(kind, kind.__name__)


def _message(kind: Any, title: str) -> Iterator[str]:
    yield from (f"### {title}", "")
    yield from ((inspect.getdoc(kind) or "").replace("``", "`"), "")
    yield from ("| field | type |", "|---|---|")
    for field in dataclasses.fields(kind):
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        yield f"| `{field.name}` | {_type(field.type)}{', may be left out' if has_default else ''} |"
    yield ""


def _type(of: Any) -> str:
    text = of if isinstance(of, str) else getattr(of, "__name__", str(of))
    return f"`{text}`".replace("|", "\\|")


def _columns() -> Iterator[str]:
    comments = _comments()
    for title, names in (("Step columns", columns.STEP_COLUMNS), ("Sampled columns", columns.SAMPLED_COLUMNS)):
        yield from (f"## {title}", "", "| column | |", "|---|---|")
        for name in names:
            yield f"| `{name}` | {comments.get(name, '')} |"
        yield ""


def _comments() -> dict[str, str]:
    """What stands behind each name in the table of columns, and in the lines below it."""
    found: dict[str, str] = {}
    source = inspect.getsource(columns)
    end = next(node.end_lineno for node in ast.parse(source).body if _assigns(node, "SAMPLED_COLUMNS"))
    name = ""
    for line in source.splitlines()[:end]:
        if match := re.match(r'\s+"(\w+)",(?:\s+#\s*(.*))?$', line):
            name = match[1]
            found[name] = match[2] or ""
        elif (match := re.match(r"\s+#\s*(.*)$", line)) and found.get(name):
            if match[1][:1].islower() or match[1][:1].isdigit():
                found[name] += " " + match[1]
            else:
                name = ""
    return {key: text.replace("|", "\\|") for key, text in found.items()}


def _assigns(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)

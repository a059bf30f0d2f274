"""Plain values, of files, variables and recordings, into settings dataclasses and back. Knows no setting by name.

A hint is the annotation of a dataclass field: ``bool``, ``int``, ``float``, ``str``, a `StrEnum`, a dataclass, one of
these ``| None``, a ``tuple`` of them or a ``Mapping`` from names to them.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Collection, Iterator, Mapping
from enum import StrEnum
from typing import Any, get_args, get_origin, get_type_hints

from sosa_stream.errors import ConfigError


class WebhookUrl(str):
    """Where notifications go. Whoever knows it may post there, so it shows itself (``repr``) by its host only."""

    __slots__ = ()

    def __repr__(self) -> str:
        scheme, _, rest = self.partition("://")
        host = re.split(r"[/?#]", rest)[0].rpartition("@")[2]
        return f"{scheme}://{host}/…" if rest else "a text that is no URL"


def walk(cls: type[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted name and the hint of every field, those of dataclasses inside included."""
    hints = get_type_hints(cls)
    for spec in dataclasses.fields(cls):
        hint = hints[spec.name]
        if dataclasses.is_dataclass(hint):
            yield from walk(hint, f"{prefix}{spec.name}.")  # type: ignore[arg-type]
        else:
            yield prefix + spec.name, hint


def parse(name: str, text: str, hint: Any) -> Any:
    """A variable's text as a value; a list is comma-separated. Raises ConfigError like `coerce`."""
    if hint is bool:
        lowered = text.strip().lower()
        if lowered not in {"1", "true", "yes", "on", "0", "false", "no", "off", ""}:
            raise ConfigError(f"{name} must be true or false, not {text!r}")
        return lowered in {"1", "true", "yes", "on"}
    if hint is int or hint is float:
        try:
            return hint(text)
        except ValueError:
            raise ConfigError(f"{name} must be a number, not {text!r}") from None
    if get_origin(hint) is tuple:
        return coerce(name, [item.strip() for item in text.split(",") if item.strip()], hint)
    return coerce(name, text, hint)


def coerce(name: str, value: Any, hint: Any) -> Any:
    """The value as its hint wants it: names become members, tables dataclasses, whole numbers fractions.

    Raises:
        ConfigError: it is of another type, or a table has an unknown key or lacks one. Begins with ``name``.
    """
    if dataclasses.is_dataclass(hint):
        return _from_table(name, value, hint)  # type: ignore[arg-type]
    if get_origin(hint) is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must hold tables, not {value!r}")
        return {key: coerce(f"{name}.{key}", item, get_args(hint)[1]) for key, item in value.items()}
    if isinstance(hint, types.UnionType):  # with None, which no file can say
        return None if value is None else coerce(name, value, get_args(hint)[0])
    if hint is WebhookUrl and isinstance(value, str):
        return WebhookUrl(value)
    if get_origin(hint) is tuple:
        if get_args(hint)[0] is WebhookUrl and isinstance(value, str):
            value = [value]
        if isinstance(value, str | bytes) or not isinstance(value, list | tuple):
            raise ConfigError(f"{name} must be a list, not {value!r}")
        return tuple(coerce(_named(name, i, item), item, get_args(hint)[0]) for i, item in enumerate(value))
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        try:
            return hint(value)
        except ValueError:
            raise ConfigError(f"{name} must be one of {', '.join(hint)}, not {value!r}") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{name} must be {hint.__name__}, not {value!r}")
    return value


def _from_table(name: str, table: Any, cls: type[Any]) -> Any:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{name} must be a table, not {table!r}")
    hints = get_type_hints(cls)
    keys = {_key(spec): spec for spec in dataclasses.fields(cls)}
    unknown = sorted(map(str, table.keys() - keys.keys()))
    if unknown:
        raise ConfigError(f"{name}: unknown setting {unknown[0]}; {suggestion(unknown[0], keys)}")
    missing = [
        key
        for key, spec in keys.items()
        if key not in table and spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{name}: {missing[0]} is missing")
    return cls(**{keys[key].name: coerce(f"{name}.{key}", item, hints[keys[key].name]) for key, item in table.items()})


def _named(name: str, i: int, item: Any) -> str:
    """Which one of a list: a table by the name in it, or by its place from 1 where it has none."""
    if not isinstance(item, Mapping):
        return name
    own = item.get("name")
    return f"{name} {own}" if own and isinstance(own, str) else f"{name} #{i + 1}"


def plain(value: Any) -> Any:
    """Without classes of ours: dicts, lists, strings, numbers. What is None is left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = {_key(spec): getattr(value, spec.name) for spec in dataclasses.fields(value)}
        return {key: plain(item) for key, item in items.items() if item is not None}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, StrEnum) else value


def _key(spec: dataclasses.Field[Any]) -> str:
    """A field's name in files: `for` is no name in Python."""
    key: str = spec.metadata.get("key", spec.name)
    return key


def is_table(hint: Any) -> bool:
    """Whether no variable can say it."""
    return get_origin(hint) is Mapping or any(dataclasses.is_dataclass(item) for item in get_args(hint))


def build(cls: type[Any], values: Mapping[str, Any], prefix: str = "") -> Any:
    """The dataclass from values by dotted name; what is not given has its default."""
    hints = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for spec in dataclasses.fields(cls):
        name = prefix + spec.name
        if dataclasses.is_dataclass(hints[spec.name]):
            arguments[spec.name] = build(hints[spec.name], values, f"{name}.")
        elif name in values:
            arguments[spec.name] = values[name]
    return cls(**arguments)


def suggestion(word: str, known: Collection[str]) -> str:
    """What to try instead of an unknown word: those like it, else all that there are."""
    near = difflib.get_close_matches(word, known, 3, 0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"

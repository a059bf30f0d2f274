"""What an exception means, as values and as text."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

MAX_TEXT = 2000


class Kind(StrEnum):
    """Mistakes and mishaps that are recognised."""

    SHAPE = "shape mismatch"
    DTYPE = "dtype mismatch"
    DEVICE = "device mismatch"
    INDEX = "index out of range"
    MEMORY = "out of memory"
    TIMEOUT = "collective timed out"
    WORKER = "DataLoader worker lost"
    DATASET = "error in a DataLoader worker"


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """What an error's own words say: a clause on what was wrong, and what to do about it, a sentence each."""

    kind: Kind
    what: str
    advice: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What an exception means; ``str()`` is what a person is shown.

    Attributes:
        kind: what was recognised.
        what: a clause on what was wrong.
        module: path of the innermost module whose forward was entered, as ``named_modules()`` of the outermost module
            spells it; its class where it belongs to none; empty outside any forward.
        module_class: its class.
        tensors: what the operation was given, ``name dtype shape``, with the device where one is not the CPU.
        line: the innermost line that is not a library's, ``file:line in function: source``; empty where there is none.
        advice: what to do, a sentence each.
    """

    kind: Kind
    what: str
    module: str = ""
    module_class: str = ""
    tensors: tuple[str, ...] = ()
    line: str = ""
    advice: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """The first line of the text."""
        where = ""
        if self.module:
            named = f" ({self.module_class})" if self.module != self.module_class else ""
            where = f" in {self.module}{named}"
        return f"{self.kind}{where}: {self.what}"

    def __str__(self) -> str:
        lines = [self.headline]
        if self.tensors:
            lines.append(f"  given: {'; '.join(self.tensors)}")
        if self.line:
            lines.append(f"  likely line: {self.line}")
        lines += [f"  try: {advice}" for advice in self.advice]
        return "\n".join(lines)[:MAX_TEXT]

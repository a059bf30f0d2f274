"""An exception of the script's, as the daemon is told of it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from sosa_stream.protocol.messages import ExceptionReport, Header, Phase

if TYPE_CHECKING:
    from sosa_stream.agent.explain.mishaps import InWorker

MAX_LINE_LENGTH = 500
MAX_FRAMES, MAX_FRAME_LENGTH, MAX_MESSAGE_LENGTH = 20, 500, 2000


def explanation(error: BaseException, memory: Mapping[str, int]) -> str:
    """What ``error`` means, in several lines; empty where nobody knows. The error is left as it is."""
    try:
        from sosa_stream.agent.explain import explain  # only where something has failed

        found = explain(error, memory)
    except Exception:
        return ""
    return str(found) if found is not None else ""


def in_words(error: BaseException, explanation: str) -> str:
    """The error, and under it what explains it."""
    return "\n".join([f"{type(error).__qualname__}: {error}"[:MAX_LINE_LENGTH], explanation]).rstrip()


def _in_worker(message: str) -> InWorker | None:
    try:
        from sosa_stream.agent.explain.mishaps import raised_in_worker

        return raised_in_worker(message)
    except Exception:
        return None


def report(
    error: BaseException,
    *,
    step: int,
    phase: Phase,
    memory: Mapping[str, int],
    num_parts: int,
    explanation: str = "",
) -> Callable[[Header], ExceptionReport]:
    """What is to be sent of ``error``: the innermost frames of its traceback, and its notes behind its words."""
    frames = traceback.extract_tb(error.__traceback__)[-MAX_FRAMES:]
    stack = tuple(f"{frame.filename}:{frame.lineno} {frame.name}"[:MAX_FRAME_LENGTH] for frame in frames)
    message = "\n".join([str(error), *getattr(error, "__notes__", ())])
    in_worker = _in_worker(str(error))
    if in_worker is not None:  # its traceback is in the job's own output
        message, phase = in_worker.message, Phase.DATA
    message = message[:MAX_MESSAGE_LENGTH]
    return lambda header: ExceptionReport(
        header=header,
        type=type(error).__qualname__,
        message=message,
        stack=stack,
        step=step,
        phase=phase,
        memory=dict(memory),
        num_parts=num_parts,
        explanation=explanation[:MAX_MESSAGE_LENGTH],
    )

"""What can go wrong, by situation. Every error tells its reader what to do next.

``ConfigError`` and ``UsageError`` are the user's to mend (exit code 2); ``ProtocolError`` is a peer's fault and is
counted, never raised into training; ``RefusedError`` is a command that an agent, or a request that
the daemon, will not carry out.
"""

from __future__ import annotations


class SosaError(Exception):
    """The root of every error that this package raises on purpose."""


class UsageError(SosaError):
    """The user asked for something that cannot be done as asked."""


class NoLossError(UsageError):
    """What was read holds nothing to detect on, and may be no log at all."""


class MissingExtraError(UsageError, ImportError):
    """A package that only a part of ours needs is not installed; ``extras``, comma-separated, bring it."""

    def __init__(self, what: str, package: str, extras: str) -> None:
        # From a clone, as the README installs it: no index is asked for a package of our name.
        super().__init__(f"{what} needs {package}; in your clone of this repository: pip install '.[{extras}]'")


class ConfigError(UsageError):
    """A setting is unknown, has the wrong type, or lies outside its bounds."""


class ProtocolError(SosaError):
    """A peer sent bytes that are not a valid message.

    ``reason`` is one of the closed set in :class:`sosa_stream.protocol.codec.Reject` and labels the counter.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class CommandRefusedError(ProtocolError):
    """A command that can be answered, but asks for an unknown action or an out-of-bound value.

    ``command`` is its id.
    """

    def __init__(self, reason: str, detail: str, *, command: str) -> None:
        super().__init__(reason, detail)
        self.command = command


class RefusedError(SosaError):
    """A command names an unknown action, an out-of-bound value, or what this rank may not do."""


class NoAnswerError(SosaError):
    """What was asked for has no answer: no daemon serves the run, or it is slow."""


class UnreachableError(SosaError):
    """No daemon answers where one was looked for, or not in our words."""


class GrafanaError(SosaError):
    """Grafana did not do what it was asked. ``status`` is that of its answer, 0 without one that can be read."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class HalfAppliedError(SosaError):
    """A fix could be neither carried out nor taken back whole: this rank's state is no longer that of the others."""


def describe(error: BaseException) -> str:
    """An error in words; with the name of its class unless it is ours, whose words are enough."""
    text = str(error)
    return text if isinstance(error, SosaError) and text else f"{type(error).__name__}: {text}".rstrip(": ")

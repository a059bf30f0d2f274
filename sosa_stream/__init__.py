"""A monitor for distributed PyTorch training that closes the loop.

Importing this package connects, registers and configures nothing, and needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sosa_stream.agent.arguments import add_sosa_arguments
    from sosa_stream.agent.explain import explain
    from sosa_stream.agent.wrapper import SOSATrainingWrapper, wrap_training

__version__ = "0.1.0"

__all__ = ["SOSATrainingWrapper", "__version__", "add_sosa_arguments", "explain", "wrap_training"]


def __getattr__(name: str) -> Any:
    # The daemon imports this package without torch; these names need it.
    if name == "explain":
        from sosa_stream import extras

        with extras.needed("agent", name):
            from sosa_stream.agent import explain
        return explain.explain
    if name == "add_sosa_arguments":
        from sosa_stream import extras

        with extras.needed("agent", name):
            from sosa_stream.agent import arguments
        return arguments.add_sosa_arguments
    if name in ("SOSATrainingWrapper", "wrap_training"):
        from sosa_stream import extras

        with extras.needed("agent", name):
            from sosa_stream.agent import wrapper
        return getattr(wrapper, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""``python -m sosa_stream.agent [options] script.py args…``: an unmodified script, watched.

What the script sees is what it would see under plain Python: ``sys.argv``, ``sys.path[0]``, ``__main__``, its own
traceback without our frames, its own exit code.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib.util
import io
import os
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, TracebackType
from typing import TYPE_CHECKING, Any

from sosa_stream import extras, faults
from sosa_stream.agent.environment import is_disabled, read_settings, run_name
from sosa_stream.errors import UsageError

if TYPE_CHECKING:  # SOSA_DISABLE=1 must run the script without torch
    from sosa_stream.agent.core import Agent

USAGE = """usage: python -m sosa_stream.agent [--inject KIND@STEP[:rank=R,key=value]]... (SCRIPT | -m MODULE) [ARG]...

Runs SCRIPT as plain Python would, and watches its training. Under torchrun:
  torchrun --nproc-per-node 2 -m sosa_stream.agent train.py --its --args

  --inject SPEC   inject a fault, e.g. nan_batch@300:rank=1 or lr_jump@200:factor=1000 (may be repeated)
  -h, --help      show this text

Settings come from the file named by SOSA_CONFIG and from SOSA_* variables: SOSA_MODE=observe|suggest|auto,
SOSA_AUTO_ALLOW=skip_step,scale_lr,..., SOSA_HOME, SOSA_RUN, SOSA_DAEMON. SOSA_DISABLE=1 only runs the script."""

NOTHING_TRAINED = (
    "no optimizer has stepped in this process: nothing was watched. Of processes that a script starts itself those are "
    "watched that torch.multiprocessing.spawn starts; torchrun starts ranks that all are"
)

# Scripts of our own package (the demo's) are scripts like any other.
_OUR_FRAMES = tuple(
    str(Path(__file__).resolve().parent.parent / name) + os.sep for name in ("agent", "doctor", "faults")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What to run: a script file or a module, its arguments, and the faults to inject."""

    name: str
    is_module: bool
    arguments: tuple[str, ...]
    inject: tuple[str, ...]


def parse(argv: list[str]) -> Target | None:
    """The command line; None asks for help. Everything after the script's name is the script's.

    Raises:
        UsageError: no script, or an unknown option before it.
    """
    inject: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            return None
        if word == "--inject" or word == "-m":
            if not rest:
                raise UsageError(f"{word} needs a value\n{USAGE}")
            value = rest.pop(0)
            if word == "-m":
                return Target(name=value, is_module=True, arguments=tuple(rest), inject=tuple(inject))
            inject.append(value)
        elif word.startswith("--inject="):
            inject.append(word.removeprefix("--inject="))
        elif word.startswith("-"):
            raise UsageError(f"unknown option {word}\n{USAGE}")
        elif not word:
            break
        else:
            return Target(name=word, is_module=False, arguments=tuple(rest), inject=tuple(inject))
    raise UsageError(f"no script given\n{USAGE}")


def main(
    argv: list[str] | None = None,
    env: Mapping[str, str] | None = None,
    prepare: Callable[[Agent], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> int:
    """Run the target. Returns an exit code, or leaves as the script left.

    Args:
        prepare: given the agent, if there is one, before the script begins.
        say: gets the agent's sentences for the user; None: standard error.
    """
    env = os.environ if env is None else env
    try:
        target = parse(sys.argv[1:] if argv is None else argv)
        if target is None:
            print(USAGE)
            return 0
        code, module = load(target)
        if is_disabled(env):
            return _run(code, module, target, None, contextlib.nullcontext())
        injected = faults.parse_faults(target.inject)
        settings, complaint = read_settings(env)
        if settings is not None or injected:
            with extras.needed("agent", "watching a training"):
                import torch  # noqa: F401
    except UsageError as error:
        print(f"sosa: {error}", file=sys.stderr)
        return 2
    rank, world_size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
    if complaint and env.get("LOCAL_RANK", "0") == "0":
        print(f"sosa: {complaint}", file=sys.stderr)
    agent = None
    if settings is not None:
        from sosa_stream.agent.core import Agent

        agent = Agent(settings, run=run_name(settings, env, target.name), rank=rank, world_size=world_size, say=say)
        agent.start()
        if prepare is not None:
            prepare(agent)
    faults.install(injected, rank)  # after our hooks: see there
    around: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if agent is not None:
        from sosa_stream.agent.spawned import watched

        around = watched(agent, target.inject, may=prepare is None and world_size == 1)
    return _run(code, module, target, agent, around)


def load(target: Target) -> tuple[CodeType, types.ModuleType]:
    """The script's code and the fresh ``__main__`` that it will run in."""
    module = types.ModuleType("__main__")
    if target.is_module:
        _set_first_path(os.getcwd())
        code, module.__spec__, filename = _find_module(target.name)
        module.__package__ = module.__spec__.name.rpartition(".")[0] if module.__spec__ else ""
    else:
        filename = os.path.join(os.getcwd(), target.name)  # as Python names it: absolute, else as it was given
        _set_first_path(str(Path(filename).resolve().parent))
        try:
            with io.open_code(filename) as file:
                source = file.read()
        except OSError as error:
            raise UsageError(f"cannot run {target.name!r}: {error.strerror}") from None
        code = _compile(source, filename)
    module.__file__ = filename
    module.__dict__["__builtins__"] = builtins
    return code, module


def _set_first_path(folder: str) -> None:
    if not sys.flags.safe_path:  # with -P Python adds none, and the first entry is another's
        sys.path[0] = folder


def _find_module(name: str) -> tuple[CodeType, importlib.machinery.ModuleSpec | None, str]:
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except (ImportError, ValueError) as error:
        raise UsageError(f"cannot run module {name!r}: {error}") from None
    loader: Any = spec.loader if spec is not None else None
    code = loader.get_code(spec.name) if spec is not None and hasattr(loader, "get_code") else None
    if spec is None or code is None:
        raise UsageError(f"there is no module {name!r} that can be run")
    return code, spec, spec.origin or name


def _compile(source: bytes, filename: str) -> CodeType:
    try:
        return compile(source, filename, "exec", dont_inherit=True)  # or our own `annotations` would be the script's
    except SyntaxError as error:
        sys.excepthook(type(error), error.with_traceback(None), None)
        raise SystemExit(1) from None


def _run(
    code: CodeType,
    module: types.ModuleType,
    target: Target,
    agent: Agent | None,
    around: contextlib.AbstractContextManager[None],
) -> int:
    """Execute the script as ``__main__``, with what is ``around`` it, and leave as it left."""
    ours = sys.modules["__main__"]  # kept alive: its globals are those of a running frame
    sys.modules["__main__"] = module
    sys.argv[:] = [target.name if not target.is_module else (module.__file__ or target.name), *target.arguments]
    try:
        with around:
            exec(code, module.__dict__)
    except SystemExit as error:
        if agent is not None:
            _tell_if_nothing_trained(agent, exit_code(error))
            agent.close("the script exited", exit_code(error), _ending(error))
        raise
    except BaseException as error:
        trim(error)
        explanation = ""
        if agent is not None and not isinstance(error, KeyboardInterrupt):  # a person who stops a job is no fault
            explanation = agent.report_exception(error, ends=True)
        sys.excepthook(type(error), error, error.__traceback__)
        if agent is not None:
            if explanation:
                agent.say(explanation, every_rank=True)
            agent.close(f"{type(error).__name__}", 1, _ending(error))
        if isinstance(error, KeyboardInterrupt):
            # Python ends by the signal, after its own clean-up, only if the exception reaches it; it is told already.
            sys.excepthook = _say_nothing
            raise
        return 1
    if agent is not None:
        _tell_if_nothing_trained(agent, 0)
        agent.close()
    del ours
    return 0


def _tell_if_nothing_trained(agent: Agent, code: int) -> None:
    if not (code or agent.has_trained or agent.is_closed):
        agent.say(NOTHING_TRAINED)


def _ending(error: BaseException) -> str:
    from sosa_stream.agent.process import ending  # there is an agent, so torch is there

    return ending(error)


def exit_code(error: SystemExit) -> int:
    """The exit code of a process that nobody keeps from ending so."""
    if error.code is None:
        return 0
    return error.code if isinstance(error.code, int) else 1


def _say_nothing(*error: object) -> None:
    """An excepthook for what has been printed."""


def trim(error: BaseException | None, seen: frozenset[int] = frozenset()) -> None:
    """Take our frames out of the traceback of ``error`` and of those that led to it."""
    if error is not None and id(error) not in seen:
        error.__traceback__ = _without_our_frames(error.__traceback__)
        for other in (error.__cause__, error.__context__):
            trim(other, seen | {id(error)})


def _without_our_frames(trace: TracebackType | None) -> TracebackType | None:
    """The same traceback with the frames of this package taken out, wherever they stand."""
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_OUR_FRAMES):
        trace = trace.tb_next
    if trace is not None:
        trace.tb_next = _without_our_frames(trace.tb_next)
    return trace

"""Inside the process that is looked at: the script runs until enough was seen, then the checks do.

Each answer is appended to a file as it comes, a JSON object a line, so that a check that kills the process costs no
answer but its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any

import torch.distributed as dist

from sosa_stream.agent import runner
from sosa_stream.agent.splitting.memory import is_out_of_memory, release
from sosa_stream.doctor import batches, ranks
from sosa_stream.doctor.capture import Leave, Recorder
from sosa_stream.doctor.checks import CHECKS, LAST, Check
from sosa_stream.doctor.context import Context, TimeUpError, limited
from sosa_stream.doctor.findings import Answer, Finding, unknown
from sosa_stream.errors import SosaError, UsageError, describe

PATIENCE_SECONDS = 60.0
"""For other ranks to have seen their steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to do, as the command line says it: ``result`` is where answers go."""

    result: Path
    num_steps: int
    seconds: float
    only: tuple[str, ...]
    out: Path | None
    script: tuple[str, ...]


@dataclass(slots=True)
class Examination:
    """Runs the script once, and the checks once, whichever way the script ends."""

    order: Order
    recorder: Recorder = field(init=False)
    _is_done: bool = False

    def __post_init__(self) -> None:
        self.recorder = Recorder(self.order.num_steps, self.examine)

    def run(self, code: CodeType, module: types.ModuleType, target: runner.Target) -> int:
        """The exit code of the process: 1 where the script failed."""
        ours = sys.modules["__main__"]  # kept alive: its globals are those of a running frame
        sys.modules["__main__"] = module
        sys.argv[:] = [target.name if not target.is_module else (module.__file__ or target.name), *target.arguments]
        seen = self.recorder.seen
        self.recorder.install()
        try:
            exec(code, module.__dict__)
            ending = "ended"
        except Leave:
            return 0
        except SystemExit as error:
            ending = f"ended with exit code {0 if error.code is None else error.code}"
        except BaseException as error:
            if self._is_done:  # it came after the checks, out of the script's own cleaning up
                return 0
            runner.trim(error)
            sys.excepthook(type(error), error, error.__traceback__)
            seen.error = error
            ending = f"failed with {type(error).__name__}"
            if isinstance(error, KeyboardInterrupt):
                return 130
        finally:
            self.recorder.close()
        del ours
        self.recorder.finish()
        self.recorder.keep_unfinished()
        message = describe(seen.error)[:500] if seen.error is not None else ""
        self._write({"event": "script", "ending": ending, "failed": seen.error is not None, "message": message})
        if not self._is_done:
            self.examine()
        return 1 if seen.error is not None else 0

    def examine(self) -> None:
        """All checks, each in its time; what one raises is its own answer."""
        self._is_done = True
        seen = self.recorder.seen
        has_group = dist.is_available() and dist.is_initialized()
        rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if has_group else (0, 1)
        self._write({"event": "seen", "steps": seen.num_steps, "ranks": num_ranks, "is_anything": self._is_anything()})
        told: Any = None
        try:
            told = batches.facts(seen.passes, seen.is_replicated)
        except Exception as error:
            told = {"digests": [], "is_replicated": False, "why": describe(error)}
        is_alone = seen.error is not None  # the others will not come
        others = {} if is_alone else ranks.exchange("facts", told, seconds=PATIENCE_SECONDS)
        context = Context(
            seen=seen,
            seconds=self.order.seconds,
            rank=rank,
            num_ranks=num_ranks,
            local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            out=self.order.out if rank == 0 else None,
            others=others,
        )
        answers = []
        wanted = [check for check in CHECKS if not self.order.only or check.name in self.order.only]
        for check in sorted(wanted, key=lambda check: check.name in LAST):
            if check.everywhere or rank == 0:
                self._write({"event": "began", "check": check.name, "question": check.question})
                answer = self._answer(check, context)
                answers.append(answer.as_dict())
                self._write({"event": "answer", **answers[-1]})
        if num_ranks > 1 and not is_alone:
            self._gather(answers, rank, num_ranks)
        self._write({"event": "done"})

    def _gather(self, answers: list[dict[str, Any]], rank: int, num_ranks: int) -> None:
        """Rank 0 takes all answers; the others stay until it has them, for the job's store may be theirs."""
        most = (len(CHECKS) + 1) * self.order.seconds + PATIENCE_SECONDS
        if rank == 0:
            for other, theirs in ranks.exchange("answers", [], seconds=most).items():
                if other:
                    for answer in theirs:
                        self._write({"event": "answer", **answer})
            ranks.exchange("all_told", True, seconds=0.0, wait_for=())
        else:
            ranks.exchange("answers", answers, seconds=0.0, wait_for=())
            ranks.exchange("all_told", True, seconds=most, wait_for=(0,))

    def _answer(self, check: Check, context: Context) -> Answer:
        began = time.monotonic()
        context.ends_at = began + 0.9 * self.order.seconds
        try:
            with limited(self.order.seconds):
                finding = check.run(context)
        except TimeUpError:
            finding = unknown(f"it took longer than {self.order.seconds:g} s; give it more by --seconds")
        except SosaError as error:
            finding = unknown(str(error))
        except Exception as error:
            finding = self._failed(error, check)
        took = time.monotonic() - began
        return Answer(check=check.name, question=check.question, finding=finding, rank=context.rank, seconds=took)

    def _failed(self, error: Exception, check: Check) -> Finding:
        if is_out_of_memory(error):
            release(error)
            return unknown(f"there is no memory for it: {describe(error).splitlines()[0][:200]}")
        if check.name == "compile":
            return unknown(f"torch.compile fails on this model here: {describe(error).splitlines()[0][:300]}")
        return unknown(f"the model could not be run again: {describe(error).splitlines()[0][:300]}")

    def _is_anything(self) -> bool:
        seen = self.recorder.seen
        return bool(seen.passes or seen.losses.calls or seen.num_steps)

    def _write(self, event: dict[str, Any]) -> None:
        with self.order.result.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


def main(argv: Sequence[str]) -> int:
    """``argv``: an order as JSON. Exit codes: 2 a script that cannot be run, 1 one that failed, 0."""
    told = json.loads(argv[0])
    order = Order(
        result=Path(told["result"]),
        num_steps=told["num_steps"],
        seconds=told["seconds"],
        only=tuple(told["only"]),
        out=Path(told["out"]) if told["out"] else None,
        script=tuple(told["script"]),
    )
    try:
        target = runner.parse(list(order.script))
        if target is None:
            raise UsageError("name a script behind --")
        code, module = runner.load(target)
    except UsageError as error:
        print(f"sosa: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return Examination(order).run(code, module, target)

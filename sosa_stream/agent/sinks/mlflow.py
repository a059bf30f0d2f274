"""MLflow: events become metrics (markers), tags and a text file of the run that the script logs to.

``mlflow.active_run()`` is of one thread. So the run is learnt from what the script logs, all of which passes two
methods of ``MlflowClient`` (mlflow 3.17): the functions of ``mlflow`` and its integrations call them too.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

from sosa_stream.agent.sinks.entry import Axis, Entry

CLIENT = "mlflow.tracking.client"
FILE = "sosa/events.txt"
MAX_TAG = 5000
"""Characters in a tag that every store takes."""
MAX_TEXTS = 1000


class MLflow:
    """Writes to the run that the script has logged to last. ``step`` gives the present optimizer step."""

    name = "MLflow"

    def __init__(self, step: Callable[[], int]) -> None:
        self._step = step
        self._axis = Axis()
        self._run = ""
        self._client: Any = None
        self._restore: list[Callable[[], None]] = []
        self._writing = threading.local()
        self._texts: list[tuple[str, str]] = []
        """What was written, each behind the tag that it is in."""

    def find(self) -> None:
        client = getattr(sys.modules.get(CLIENT), "MlflowClient", None) if not self._restore else None
        if client is not None:
            for name in ("log_metric", "log_batch"):
                original = getattr(client, name)
                setattr(client, name, functools.wraps(original)(self._seen(original)))
                self._restore.append(functools.partial(setattr, client, name, original))

    @property
    def is_open(self) -> bool:
        return bool(self._run)

    def write(self, entry: Entry) -> None:
        client, run = self._client, self._run
        tag = f"sosa.{entry.kind}.{entry.id}"
        self._texts = [*self._texts, (tag, entry.text)][-MAX_TEXTS:]
        of_tag = "\n".join(text for its, text in self._texts if its == tag)
        everything = "\n".join(text for _, text in self._texts) + "\n"
        self._writing.here = True
        try:
            at = int(1000 * entry.at)
            client.log_metric(run, entry.marker, entry.level, timestamp=at, step=self._axis.step_of(entry.step))
            client.set_tag(run, tag, of_tag[:MAX_TAG])
            client.log_text(run, everything, FILE)
        finally:
            self._writing.here = False

    def remove(self) -> None:
        for restore in self._restore:
            restore()
        self._restore.clear()

    def _seen(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def log(client: Any, run_id: str, *args: Any, **kwargs: Any) -> Any:
            result = original(client, run_id, *args, **kwargs)
            if not getattr(self._writing, "here", False):
                with contextlib.suppress(Exception):  # whatever a script calls a step: it is only not used then
                    self._note(client, run_id, _step_in(*args, **kwargs))
            return result

        return log

    def _note(self, client: Any, run: str, step: int | None) -> None:
        if run != self._run:
            self._axis = Axis()
        self._client, self._run = client, run
        if step is not None:
            self._axis.note(self._step(), step)


def _step_in(*args: Any, **kwargs: Any) -> int | None:
    """The step in the arguments of ``log_metric`` behind the run, or of the last metric of ``log_batch``."""
    metrics = kwargs.get("metrics", args[0] if args else None)
    if isinstance(metrics, list | tuple):
        return int(metrics[-1].step) if metrics else None
    step = kwargs.get("step", args[3] if len(args) > 3 else None)
    return None if step is None else int(step)

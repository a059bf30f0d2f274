"""In the training process: the script under the agent's runner, its epochs counted and its best weights kept."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from sosa_stream.agent import runner
from sosa_stream.diagnose import BEST_MODEL

if TYPE_CHECKING:
    from sosa_stream.agent.core import Agent
    from sosa_stream.diagnose.best_model import BestModel
    from sosa_stream.diagnose.epochs import Epochs

PR_SET_PDEATHSIG = 1
EXIT_TERMINATED = 128 + signal.SIGTERM


def run(words: list[str], *, rank: int, out: Path, num_epochs: int, notice: int) -> int:
    """Run the target in ``words``. Returns an exit code, or leaves as the script left.

    Args:
        num_epochs: end before the first update beyond; 0: only when the script ends.
        notice: file descriptor on which a byte says that the process is about to be ended.
    """
    best: list[BestModel] = []
    counted: list[Epochs] = []

    def prepare(agent: Agent) -> None:
        from sosa_stream.diagnose.best_model import BestModel
        from sosa_stream.diagnose.epochs import Epochs

        epochs = Epochs(num_epochs)
        counted.append(epochs)

        def count() -> None:
            epochs.before_step(agent.taps.deliveries.iterators)
            agent.probe.epoch = epochs.epoch

        agent.probe.before_tick = count
        if rank == 0:
            best.append(BestModel(out / BEST_MODEL, lambda: agent.state.models, agent.recent_losses, agent.say))
            best[0].start()
            agent.after_tick = best[0].after_step
            _listen(notice, best[0].write_soon)

    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
        os.register_at_fork(after_in_child=_terminate_by_default)
    try:
        return runner.main(words, prepare=prepare, say=_say)
    finally:
        for each in best:
            each.close()
        if rank == 0 and num_epochs and not any(epochs.epoch for epochs in counted):
            _say(f"no DataLoader was seen, so that --epochs {num_epochs} had nothing to count")


def _say(text: str) -> None:
    """What the agent says, but for what to type next: the run lies in a home of its own, and the folder tells all."""
    if "sosa approve" not in text and "sosa incidents" not in text:
        print(f"sosa: {text}", file=sys.stderr, flush=True)


def die_with(parent: int) -> None:
    """Be killed when the process ``parent``, which started this one, ends in whatever way. On Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def _terminate(signum: int, frame: FrameType | None) -> None:
    """As `sys.exit` would: the script's own ``finally`` runs, and the agent says goodbye."""
    raise SystemExit(EXIT_TERMINATED)


def _terminate_by_default() -> None:
    """The script's own children end as they always did."""
    if signal.getsignal(signal.SIGTERM) is _terminate:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _listen(notice: int, act: Callable[[], None]) -> None:
    def listen() -> None:
        try:
            while os.read(notice, 1):
                act()
        except OSError:
            return

    threading.Thread(target=listen, name="sosa-notice", daemon=True).start()

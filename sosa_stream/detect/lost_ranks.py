"""The incident `rank_lost`: which rank is gone, how it ended, what it was at, and what to do about it."""

from __future__ import annotations

from sosa_stream.detect.attendance import LOST_AFTER_SECONDS
from sosa_stream.detect.incidents import Finding, Severity
from sosa_stream.detect.losses import CANCELS, Loss, Seen
from sosa_stream.detect.windows import RunWindows
from sosa_stream.detect.wording import name_ranks

MAX_SHOWN = 64


def rank_lost(windows: RunWindows) -> Finding | None:
    """Ranks are gone without a goodbye."""
    loss = windows.reports.loss
    if loss is None:
        return None
    first = loss.views[0]
    hosts = tuple(dict.fromkeys(view.host for view in loss.views))
    who = f"{name_ranks(loss.ranks)} on {', '.join(hosts[:4])}"
    who += f" (pid {first.pid})" if len(loss.views) == 1 and first.pid else ""
    told = {
        Seen.ENDED: _ended(loss.how),
        Seen.GONE: "is gone: its process has ended without a word, as another rank of its host says",
        Seen.SILENT: f"{'has' if len(loss.views) == 1 else 'have'} been silent for {loss.silent_seconds:.0f} s",
        Seen.REPLACED: "left without a goodbye; the others lost their connection to it",
    }[loss.seen]
    where = f"in step {first.step + 1}, {first.phase}"
    after = min(loss.followers.values(), default=None)
    rest = f"; {name_ranks(tuple(sorted(loss.followers)))} went {after:.2g} s later" if after is not None else ""
    return Finding(
        kind="rank_lost",
        severity=Severity.INFO if loss.cancelled or _is_unheard(loss) else Severity.CRITICAL,
        step=windows.step,
        first_step=max(windows.step, 0),
        ranks=loss.ranks,
        message=(f"all ranks were asked to end at once ({loss.how}): the job was cancelled" if loss.cancelled else "")
        or f"{who} {told}, {where}{rest}",
        evidence={
            "value": round(loss.silent_seconds, 3),
            "baseline": 1.0,
            "window": len(loss.views),
            "threshold": LOST_AFTER_SECONDS if loss.seen is Seen.SILENT else None,
            "seen": str(loss.seen),
            "how": loss.how,
            "pids": {str(view.rank): view.pid for view in loss.views[:MAX_SHOWN]},
            "last_step": {str(view.rank): view.step for view in loss.views[:MAX_SHOWN]},
            "last_phase": {str(view.rank): str(view.phase) for view in loss.views[:MAX_SHOWN]},
            "followers": {str(rank): round(loss.followers[rank], 3) for rank in sorted(loss.followers)[:MAX_SHOWN]},
            "num_there": loss.num_there,
        },
        causes=_causes(loss, hosts),
    )


def all_there(windows: RunWindows) -> bool:
    """Whether no rank is missed any more."""
    return not windows.lost


def _is_unheard(loss: Loss) -> bool:
    """Nothing is heard of any rank: who knows whether they, or only the way to them, are gone."""
    return loss.seen is Seen.SILENT and not loss.num_there


def _ended(how: str) -> str:
    if not how:
        return "has ended without a goodbye"
    return f"was ended by {how}" if how.startswith(("SIG", "signal")) else f"has ended without a goodbye ({how})"


def _causes(loss: Loss, hosts: tuple[str, ...]) -> tuple[str, ...]:
    on = f"on {hosts[0]}"
    memory = f"memory ran out and the kernel ended it: `dmesg -T | grep -i -e 'out of memory' -e oom` {on}"
    again = "torch elastic starts the job again under `torchrun --max-restarts N`, from the script's own checkpoint"
    native = f"a fault in native code or a device (`dmesg -T | grep Xid` {on}); `python -X faulthandler` shows the line"
    match loss.how:
        case _ if loss.cancelled:
            return ("a scheduler, or whoever pressed Ctrl-C",)
        case "SIGKILL":
            return (memory, "somebody's `kill -9`, or a scheduler's", again)
        case "SIGSEGV" | "SIGBUS" | "SIGFPE" | "SIGILL":
            return (native, again)
        case "SIGABRT":
            return (
                "an assertion in native code, NCCL's watchdog, collectives that do not match: its last lines say",
                native,
                again,
            )
        case how if how in CANCELS:
            return ("somebody, or a scheduler, has asked this process alone to end", again)
        case how if how.startswith("exit code"):
            return ("it called `os._exit`, or native code ended it: its own last lines say why", again)
    if loss.seen is Seen.SILENT:
        return (f"{hosts[0]} is down, or the network between it and the daemon is cut", memory, again)
    return (memory, native, again)

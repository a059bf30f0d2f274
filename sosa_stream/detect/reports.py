"""Detectors of what ranks report between steps, such as uncaught errors, and of ranks that have come apart."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sosa_stream.detect.explained import appended, as_evidence, explained
from sosa_stream.detect.frozen import Frozen
from sosa_stream.detect.incidents import Finding, Severity
from sosa_stream.detect.memory import is_out_of_memory
from sosa_stream.detect.replicas import Replicas
from sosa_stream.detect.windows import RunWindows
from sosa_stream.detect.wording import name_ranks
from sosa_stream.protocol.messages import ExceptionReport

LOST_PEER_TYPES = frozenset({"DistBackendError", "torch.distributed.DistBackendError"})
LOST_PEER_WORDS = ("closed by peer", "reset by peer", "remote worker", "remote process exited")
"""How the collectives of gloo and NCCL say that another rank is gone (torch 2.13)."""

SHAPE_ERRORS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), cause)
    for pattern, cause in (
        (
            r"mat1 and mat2 shapes cannot be multiplied \((\d+)x(\d+) and (\d+)x(\d+)\)",
            "a linear layer made for {2} input features was given {1}",
        ),
        (
            r"expected input\[[\d, ]+\] to have (\d+) channels, but got (\d+) channels",
            "a convolution made for {0} channels was given {1}",
        ),
        (
            r"size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\) at non-singleton dimension (\d+)",
            "two tensors of sizes {0} and {1} in dimension {2} do not broadcast",
        ),
        (
            r"[Ee]xpected input batch_size \((\d+)\) to match target batch_size \((\d+)\)",
            "{0} predictions for {1} targets",
        ),
        (
            r"[Tt]arget size \((.+?\])\)\) must be the same as input size \((.+?\])\)\)",
            "targets {0}) for predictions {1})",
        ),
        (r"[Ee]xpected target size (\[.+?\]), got (\[.+?\])", "targets of shape {1} where {0} is needed"),
        (
            r"normalized_shape=(\[.+?\]).* but got input of size ?(\[.+?\])",
            "a layer norm made for {0} was given {1}",
        ),
        (r"running_mean should contain (\d+) elements not (\d+)", "a batch norm made for {1} features was given {0}"),
        (
            r"must be equal to input_size\. Expected (\d+), got (\d+)",
            "a recurrent layer for {0} features was given {1}",
        ),
        (
            r"a param with shape (\S*\[.*?\]\)?) from checkpoint, the shape in current model is (\S*\[.*?\]\)?)",
            "the checkpoint is of another model: {0} for {1}",
        ),
        (r"shape '(\[.*?\])' is invalid for input of size (\d+)", "{1} elements cannot be seen as {0}"),
        (
            r"expanded size of the tensor \((\d+)\) must match the existing size \((\d+)\)",
            "{1} cannot be expanded to {0}",
        ),
        (r"Sizes of tensors must match except in dimension", "tensors that are joined differ in another dimension"),
        (r"stack expects each tensor to be equal size", "samples of different sizes are put into one batch"),
        (r"doesn't match the broadcast shape|could not be broadcast together", "two shapes do not broadcast"),
        (r"Expected size for first two dimensions of batch2 tensor", "the factors of a batched product do not fit"),
        (r"size mismatch|[Ss]hape mismatch|shapes .* not aligned|do not broadcast", "two shapes do not fit"),
    )
)
"""How torch 2.13 and numpy say that shapes do not fit, and what each means; the first that is found explains."""
_SHAPE = re.compile(r"(?:torch\.Size\()?\[[\d, *]+\]\)?|\(\d+(?:, ?\d+)*,?\)|\b\d+(?:x\d+)+\b")
_LIBRARIES = ("site-packages", "dist-packages", "<frozen", "<string>", "/torch/")


def exception(windows: RunWindows) -> Finding | None:
    """A rank's script raised and did not catch; `oom` and `shape_mismatch` take its place where they fit."""
    report, left = windows.reports.exception, windows.reports.left
    if left and (report is None or is_of_lost_peer(report)):
        return _left(windows, left)
    if report is None or is_out_of_memory(report) or _wrong_shape(windows) is not None:
        return None
    return _exception(windows, "exception")


def shape_mismatch(windows: RunWindows) -> Finding | None:
    """A rank's script raised because shapes do not fit; explained with the shapes and the script's own last line."""
    cause = _wrong_shape(windows)
    report = windows.reports.exception
    if cause is None or report is None:
        return None
    own = [frame for frame in report.stack if not any(place in frame for place in _LIBRARIES)]
    where = (own or list(report.stack))[-1:]
    finding = _exception(windows, "shape_mismatch")
    return replace(
        finding,
        evidence={
            **finding.evidence,
            "shapes": _SHAPE.findall(report.message)[:8],
            "raised_in": where[0] if where else None,
        },
        causes=((" ".join(explained(report)) or cause) + (f", in {where[0]}" if where else ""),),
    )


def rank_desync(windows: RunWindows) -> Finding | None:
    """Ranks report different digests of parameters and optimizer state right after one fix, or part at a step.

    The ranks outside the largest group of equal digests are named; with no majority, all are. At a step: replicas, by
    their norms, of which some left the step out for a norm that is not finite, while the others took it.
    """
    digests = {rank: digest for rank, digest in windows.reports.digests.items() if digest}
    if windows.odd_ranks and not digests:
        return _apart(
            windows.odd_ranks,
            windows.step,
            f"ranks parted at step {windows.step}: some left it out, others took it; "
            f"apart from the rest: {name_ranks(windows.odd_ranks)}",
            {"ranks_without_norm": list(windows.bad_grad)},
            (
                "gradients differ after their reduction: a hook that runs on one rank, memory corruption",
                "parameters that DDP does not reduce",
            ),
        )
    if windows.replicas.news and not digests:
        return _drifted(windows)
    if windows.replicas.frozen.news and not digests:
        return _frozen_parted(windows.replicas.frozen)
    if len(set(digests.values())) < 2:
        return None
    groups: dict[str, list[int]] = {}
    for rank in sorted(digests):
        groups.setdefault(digests[rank], []).append(rank)
    largest = max(len(ranks) for ranks in groups.values())
    majority = [digest for digest, ranks in groups.items() if len(ranks) == largest]
    odd = tuple(rank for rank in sorted(digests) if len(majority) > 1 or digests[rank] != majority[0])
    step = windows.reports.digests_step
    return _apart(
        odd,
        step,
        f"parameters differ between ranks after a fix at step {step}: {name_ranks(odd)}",
        {
            "digests": {str(rank): digest for rank, digest in sorted(digests.items())},
            "has_majority": len(majority) == 1,
        },
        ("a fix took hold on some ranks only", "the ranks had drifted apart before"),
    )


def together(windows: RunWindows) -> bool:
    """Whether ranks that parted at a step have been brought together since."""
    return not (windows.came_apart or windows.replicas.parted or windows.replicas.frozen.parted)


def _drifted(windows: RunWindows) -> Finding | None:
    """What differs everywhere comes of updates that differ; what stays in one place is `silent_corruption`."""
    replicas = windows.replicas
    if replicas.is_confined:
        return None
    odd, first, what, evidence = parted(replicas)
    evidence["reduced"] = windows.norms_agree
    who = f"{name_ranks(odd)} {'differs' if len(odd) == 1 else 'differ'} from the majority"
    if not evidence["has_majority"]:
        who = f"{name_ranks(odd)} disagree, and none is believed"
    since = "differ from the first look on" if replicas.never_equal else f"differ since step {first} at the latest"
    never = "DDP does not reduce what is trained: the raw model is called, or was changed after it was wrapped"
    differs = "updates differ: another learning rate, clipping on one rank, or a model that is called past DDP"
    flip = "silent corruption: a bit that flipped in this memory; if it comes again, the host's memory or device is bad"
    if not (windows.norms_agree or replicas.never_equal):  # on purpose, perhaps
        alone = _apart(
            odd,
            first,
            f"{what} that were equal on all ranks {since}: their gradients are not reduced any more",
            evidence,
            (
                "the raw model is called instead of DDP, or DDP's hooks are lost",
                "on purpose: local SGD, or each rank trains a model of its own from here on",
            ),
        )
        return replace(alone, severity=Severity.WARNING)
    return _apart(
        odd,
        first,
        f"{what} that must be equal on all ranks {since}: {who}",
        evidence,
        (never, differs) if replicas.never_equal else (differs, flip),
    )


def _frozen_parted(frozen: Frozen) -> Finding:
    """Nobody trains these: on ranks that differ they were written to, or have changed by themselves."""
    parted = frozen.parted.values()
    odd = tuple(sorted({rank for one in parted for rank in one.odd}))
    first = min(one.step for one in parted)
    has_majority = all(one.has_majority for one in parted)
    who = name_ranks(odd) if has_majority else f"one of {name_ranks(odd)}"
    return _apart(
        odd,
        first,
        f"frozen parameters that were equal on all ranks have changed on {who}, since step {first} at the latest",
        {
            "chunks_differ": len(parted),
            "chunks_shared": frozen.num_shared,
            "has_majority": has_majority,
            "in": "frozen parameters",
            "equal_until": None,  # of them no snapshot is kept that a rollback could put back
            "frozen": frozen.chunks,
        },
        (
            "a bit that flipped in this host's memory or device; if it comes again, take the host out",
            "the script writes to frozen parameters, or loads others, on some ranks only",
        ),
    )


def parted(replicas: Replicas) -> tuple[tuple[int, ...], int, str, dict[str, Any]]:
    """Who is apart, since when, in what, and the evidence."""
    parted = replicas.parted
    until = [one.equal_until for one in parted.values() if one.equal_until is not None]
    state = [chunk for chunk in parted if chunk % 2]
    what = "optimizer state" if len(state) == len(parted) else "parameters and optimizer" if state else "parameters"
    evidence = {
        "chunks_differ": len(parted),
        "chunks_shared": replicas.num_shared,
        "has_majority": all(one.has_majority for one in parted.values()),
        "in": what,
        "equal_until": min(until) if len(until) == len(parted) else None,
    }
    odd = tuple(sorted({rank for one in parted.values() for rank in one.odd}))
    return odd, min(one.step for one in parted.values()), what, evidence


def _apart(
    ranks: tuple[int, ...], step: int, message: str, evidence: dict[str, Any], causes: tuple[str, ...]
) -> Finding:
    return Finding(
        kind="rank_desync",
        severity=Severity.CRITICAL,
        step=step,
        first_step=step,
        ranks=ranks,
        message=message,
        evidence=evidence,
        causes=causes,
    )


def _wrong_shape(windows: RunWindows) -> str | None:
    """What a shape error means; None for any other report."""
    report = windows.reports.exception
    if report is None or is_out_of_memory(report):
        return None
    for pattern, cause in SHAPE_ERRORS:
        found = pattern.search(report.message)
        if found is not None:
            return cause.format(*found.groups())
    return None


def is_of_lost_peer(report: ExceptionReport) -> bool:
    """Whether a rank says that another is gone."""
    return report.type in LOST_PEER_TYPES or any(words in report.message for words in LOST_PEER_WORDS)


def _exception(windows: RunWindows, kind: str) -> Finding:
    report = windows.reports.exception
    assert report is not None
    rank = report.header.rank
    lost_peer = is_of_lost_peer(report)
    causes = (
        ("another rank has ended: its own log says why",)
        if lost_peer
        else (f"raised in {report.stack[-1]}" if report.stack else "no stack was sent",)
    )
    return Finding(
        kind=kind,
        severity=Severity.CRITICAL,
        step=report.step,
        first_step=report.step,
        ranks=(rank,),
        message=f"rank {rank}: {report.type}: {report.message} (step {report.step}, {report.phase}){appended(report)}",
        evidence={
            "type": report.type,
            "message": report.message,
            "stack": list(report.stack),
            "phase": str(report.phase),
            "lost_peer": lost_peer,
            **as_evidence(report),
        },
        causes=(*explained(report), *causes),
    )


def _left(windows: RunWindows, left: Mapping[int, str]) -> Finding:
    """Ranks said goodbye without an error of their own, and the others failed or were ended after them."""
    who = ", ".join(f"rank {rank} left with {reason}" for rank, reason in sorted(left.items())[:8])
    return Finding(
        kind="exception",
        severity=Severity.WARNING,
        step=windows.step,
        first_step=max(windows.step, 0),
        ranks=tuple(sorted(left)),
        message=f"{who}, and the others could not go on",
        evidence={
            "type": next(iter(left.values())),
            "message": "",
            "stack": [],
            "lost_peer": False,
        },
        causes=("somebody interrupted this process alone (SIGINT), or its script called `sys.exit`",),
    )

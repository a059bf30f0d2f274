"""How much of a step goes into loading, and what would make it faster: tried here, never claimed."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from sosa_stream.doctor.context import Context
from sosa_stream.doctor.environment import num_cores
from sosa_stream.doctor.findings import Finding, Status, duration, unknown
from sosa_stream.doctor.replay import CannotReplayError, alone, first_pass
from sosa_stream.errors import describe

MUCH_LOADING, LITTLE_LOADING = 0.3, 0.05
"""Share of a step."""
ROUNDS, MOST_ROUNDS = 5, 15
NUM_BATCHES = 20
"""That a try of a DataLoader hands out, the first two not timed."""
NOISY = 0.3
"""Median deviation from the median, of the median: more, and a gain that is smaller is none."""
MOST_APART = 1.5
"""A gain by medians and one by the fastest runs differ by less, or what else the machine does has made it."""
LARGER_GAIN, MOST_GAIN = 1.3, 2.2
"""In samples a second, of twice the batch: worth it; more than there can be."""
WORTH_IT = 1.1
"""Times as fast: less lies within the noise of so few tries."""
SHARE = 0.3
"""Of the time that is left, for each comparison."""


def check(context: Context) -> Finding:
    """The share of loading in the steps seen; then loaders, AMP and a larger batch beside what there is, in turns."""
    seen = context.seen
    if not seen.step_seconds:
        return unknown("it takes two steps at least")
    step = statistics.median(seen.step_seconds)
    loads = [its["data_seconds"] for its in seen.parts if "data_seconds" in its]
    load = statistics.median(loads) if loads else None
    evidence: dict[str, Any] = {"step_seconds": step, "data_seconds": load, "num_steps": len(seen.step_seconds)}
    says = f"a step takes {duration(step)}"
    share = 0.0
    if load is None:
        says += "; how much of it is loading was not seen"
    else:
        share = min(1.0, load / step)
        evidence["loading_share"] = share
        says += f", {share:.0%} of it loading ({len(seen.step_seconds)} steps)"
    tried: dict[str, Any] = {}
    details: list[str] = []
    advice: list[str] = []
    details += _loaders(context, share, tried, advice)
    for name, trial in (("AMP", _amp), ("a larger batch", _larger)):
        try:
            details.append(trial(context, tried, advice))
        except Exception as error:  # the script's own code runs: one trial is not all
            details.append(f"{name}: not measured: {describe(error)}")
    evidence["tried"] = tried
    if share >= MUCH_LOADING and not advice:
        advice.append("loading is the bottleneck: make the dataset's own code faster, or store what it computes")
    return Finding(
        status=Status.WARNING if share >= MUCH_LOADING else Status.OK,
        says=says,
        evidence=evidence,
        details=tuple(details),
        advice=tuple(advice),
    )


def check_compile(context: Context) -> Finding:
    """A pass with and without ``torch.compile``, in turns, after the first calls have compiled it."""
    copies = context.copies()
    recorded = first_pass(context.seen)
    os.environ.pop("TORCHDYNAMO_DISABLE", None)  # which `sosa doctor` sets, for the script's own
    torch._dynamo.config.disable = False
    num_before = _num_compiled()

    def run() -> torch.Tensor:
        return copies.loss(recorded, reseed=False)

    began = time.perf_counter()
    with alone():
        compiled: Callable[[], torch.Tensor] = torch.compile(run)
        compiled().backward()  # type: ignore[no-untyped-call]
        compiled().backward()  # type: ignore[no-untyped-call]
        took = time.perf_counter() - began
        if _num_compiled() == num_before:
            return unknown("torch.compile left the model as it is: nothing of it could be compiled")
        timing = interleaved(context, lambda: run().backward(), lambda: compiled().backward())  # type: ignore[no-untyped-call]
    evidence = {**_measured(timing), "compile_seconds": took}
    says = f"forward and backward: {timing.words} ({_spans(timing)}); compiling took {duration(took)}"
    advice = ("torch.compile(model)",) if timing.is_worth_it else ()
    return Finding(status=Status.OK, says=says, evidence=evidence, advice=advice)


def _num_compiled() -> int:
    """Frames that have been compiled in this process."""
    from torch._dynamo.utils import counters

    return int(counters["frames"]["ok"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of one thing and of another, as medians; ``is_clear`` where their spread lets them be compared."""

    plain: float
    other: float
    is_clear: bool

    @property
    def words(self) -> str:
        if not self.is_clear:
            return "cannot be told, this machine is too busy"
        gain = self.plain / self.other
        if 1 / WORTH_IT < gain < WORTH_IT:
            return "as fast, within the noise"
        return f"{gain:.2g} times as fast" if gain > 1 else f"{1 / gain:.2g} times slower"

    @property
    def is_worth_it(self) -> bool:
        return self.is_clear and self.plain / self.other >= WORTH_IT


def interleaved(context: Context, plain: Callable[[], Any], other: Callable[[], Any]) -> Timing:
    """Both in turns, so that what else the machine does hits them alike."""
    runs = (plain, other)
    for run in runs:
        run()
    times: tuple[list[float], list[float]] = ([], [])
    until = context.time_left * (1.0 - SHARE)
    while len(times[0]) < ROUNDS or (len(times[0]) < MOST_ROUNDS and context.time_left > until):
        for run, its in zip(runs, times, strict=True):
            began = time.perf_counter()
            run()
            if context.seen.device.type == "cuda":
                torch.cuda.synchronize()
            its.append(time.perf_counter() - began)
    medians = [statistics.median(its) for its in times]
    off = (statistics.median(abs(t / m - 1.0) for t in its) for its, m in zip(times, medians, strict=True))
    noise = max(off)
    gain = medians[0] / medians[1]
    undisturbed = min(times[0]) / min(times[1])
    agree = 1.0 / MOST_APART < gain / undisturbed < MOST_APART
    return Timing(plain=medians[0], other=medians[1], is_clear=agree and noise < max(abs(gain - 1.0), NOISY))


def _amp(context: Context, tried: dict[str, Any], advice: list[str]) -> str:
    recorded = first_pass(context.seen)
    if any(node.autocast for node in recorded.nodes):
        return "AMP: is on already"
    copies = context.copies()
    device = context.seen.device.type

    def with_amp() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = copies.loss(recorded, reseed=False)
        loss.backward()  # type: ignore[no-untyped-call]

    with alone():
        timing = interleaved(context, lambda: copies.step(recorded, reseed=False), with_amp)
    tried["amp_bfloat16"] = _measured(timing)
    if timing.is_worth_it:
        advice.append(f'torch.autocast("{device}", dtype=torch.bfloat16) around forward and loss')
    return f"AMP in bfloat16: {timing.words} (forward and backward, {_spans(timing)})"


def _larger(context: Context, tried: dict[str, Any], advice: list[str]) -> str:
    recorded = first_pass(context.seen)
    if not recorded.batch_size:
        raise CannotReplayError("the batch's size cannot be told")
    copies = context.copies()
    with alone():
        timing = interleaved(
            context,
            lambda: copies.step(recorded, reseed=False),
            lambda: copies.step(recorded, times=2, reseed=False),
        )
    gain = 2.0 * timing.plain / timing.other
    tried["double_batch"] = {**_measured(timing), "gain": gain}
    if not timing.is_clear or gain > MOST_GAIN:
        return f"a batch twice as large: cannot be told, this machine is too busy ({_spans(timing)})"
    if gain >= LARGER_GAIN:
        advice.append("a larger batch (and a rate that fits it) uses this machine better")
    return f"a batch twice as large: {gain:.2g} times the samples a second ({_spans(timing)})"


def _measured(timing: Timing) -> dict[str, Any]:
    return {
        "seconds": timing.plain,
        "with_seconds": timing.other,
        "gain": timing.plain / timing.other,
        "is_clear": timing.is_clear,
    }


def _spans(timing: Timing) -> str:
    return f"{duration(timing.plain)} to {duration(timing.other)}"


def _loaders(context: Context, share: float, tried: dict[str, Any], advice: list[str]) -> list[str]:
    """What other numbers of workers, and pinned memory, give."""
    if not context.seen.loaders:
        return ["workers, pinning: no DataLoader was used"]
    loader = context.seen.loaders[0]
    pin = "" if torch.cuda.is_available() else "pinning: not measured, it is for GPUs and there is none here"
    if share < LITTLE_LOADING:
        return [text for text in (f"workers: can gain no more than the {share:.0%} that loading takes", pin) if text]
    told = []
    cores = int(num_cores())
    numbers = sorted({loader.num_workers, 2, min(8, max(1, cores - 1))})
    variants = {f"{num} workers": {"num_workers": num} for num in numbers}
    if not pin and not loader.pin_memory:
        variants["pinned memory"] = {"num_workers": loader.num_workers, "pin_memory": True}
    now = f"{loader.num_workers} workers"
    rates: dict[str, float] = {}
    for name, changed in [*variants.items(), *variants.items()]:  # twice, the better one: starts are uneven
        if context.time_left < 1.5:
            break
        try:
            rates[name] = max(rates.get(name, 0.0), _throughput(context, loader, changed))
        except Exception as error:
            told.append(f"{name}: not measured: {describe(error)}")
    if now in rates and len(rates) > 1:
        tried["batches_per_second"] = rates
        told.append("batches a second: " + ", ".join(f"{rate:.3g} with {name}" for name, rate in rates.items()))
        best = max(rates, key=rates.__getitem__)
        if rates[best] >= WORTH_IT * rates[now]:
            advice.append(f"DataLoader with {best}: {rates[best] / rates[now]:.2g} times the batches a second")
    else:
        told.append("workers: not measured, no time was left")
    return [text for text in (*told, pin) if text]


def _throughput(context: Context, loader: DataLoader[Any], changed: dict[str, Any]) -> float:
    """Batches a second of a loader like this one."""
    settings: dict[str, Any] = {
        "collate_fn": loader.collate_fn,
        "worker_init_fn": loader.worker_init_fn,
        "timeout": loader.timeout,
        "pin_memory": loader.pin_memory,
        **changed,
    }
    if isinstance(loader.dataset, IterableDataset):
        settings |= {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    elif loader.batch_sampler is not None:
        settings["batch_sampler"] = loader.batch_sampler
    else:
        settings |= {"batch_size": None, "sampler": loader.sampler}
    batches: Iterator[Any] = iter(DataLoader(loader.dataset, **settings))
    num = 0
    until = context.time_left * (1.0 - SHARE / 2)
    try:
        for _ in itertools.islice(batches, 2):
            pass
        began = time.perf_counter()
        for _ in itertools.islice(batches, NUM_BATCHES):
            num += 1
            if context.time_left < until:
                break
        took = time.perf_counter() - began
    finally:
        del batches
    if not num:
        raise CannotReplayError("an epoch has too few batches")
    return num / took
